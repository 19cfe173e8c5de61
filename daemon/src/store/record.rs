//! The index's own values as bytes (FORMAT.md). Every one carries a CRC-32 over its key and itself.
use xenfold::page::{ContentId, Pfn};

/// Slots whose ids are one value of the index.
pub(super) const BLOCK_SLOTS: u32 = 32;

/// Pages in one part of an image. With some runs it stays below 64 KiB, which redb would round up to 128; at worst,
/// each page alone in its run, it has 28 bytes a page.
pub(super) const PART_PAGES: usize = 3968;

/// An image's description; its pages are in parts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct ImageHead {
    pub template: bool,
    pub saved_unix_s: u64,
    pub pages: u64,
    pub parts: u32,
}

fn sealed(key: &[u8], body: Vec<u8>) -> Vec<u8> {
    let mut value = crc(key, &body).to_le_bytes().to_vec();
    value.extend(body);
    value
}

fn crc(key: &[u8], body: &[u8]) -> u32 {
    let mut crc = crc32fast::Hasher::new();
    crc.update(key);
    crc.update(body);
    crc.finalize()
}

fn opened<'a>(key: &[u8], value: &'a [u8]) -> Option<&'a [u8]> {
    let (stored, body) = value.split_first_chunk::<4>()?;
    (u32::from_le_bytes(*stored) == crc(key, body)).then_some(body)
}

/// The ids in one block's slots; `ids` are in the order of the slots.
pub(super) fn encode_block(block: u32, ids: impl Iterator<Item = (u32, ContentId)>) -> Vec<u8> {
    let mut held = 0u32;
    let mut body = vec![0; 4];
    for (slot, id) in ids {
        held |= 1u32.unbounded_shl(slot);
        body.extend(id.0);
    }
    if let Some(place) = body.first_chunk_mut::<4>() {
        *place = held.to_le_bytes();
    }
    sealed(&block.to_le_bytes(), body)
}

/// Slot in the block and id; `None`: damaged.
pub(super) fn decode_block(block: u32, value: &[u8]) -> Option<Vec<(u32, ContentId)>> {
    let (held, ids) = opened(&block.to_le_bytes(), value)?.split_first_chunk::<4>()?;
    let held = u32::from_le_bytes(*held);
    let (ids, rest) = ids.as_chunks::<16>();
    let slots = (0..BLOCK_SLOTS).filter(|slot| held >> slot & 1 != 0);
    (rest.is_empty() && ids.len() == held.count_ones() as usize)
        .then(|| slots.zip(ids.iter().map(|id| ContentId(*id))).collect())
}

pub(super) fn encode_head(key: &str, head: &ImageHead) -> Vec<u8> {
    let mut body = vec![u8::from(head.template), 0, 0, 0];
    body.extend(head.parts.to_le_bytes());
    body.extend(head.pages.to_le_bytes());
    body.extend(head.saved_unix_s.to_le_bytes());
    sealed(key.as_bytes(), body)
}

pub(super) fn decode_head(key: &str, value: &[u8]) -> Option<ImageHead> {
    let (flags, rest) = opened(key.as_bytes(), value)?.split_first_chunk::<4>()?;
    let (parts, rest) = rest.split_first_chunk::<4>()?;
    let (pages, rest) = rest.split_first_chunk::<8>()?;
    let saved_unix_s: &[u8; 8] = rest.try_into().ok()?;
    let template = match flags {
        [0, 0, 0, 0] => false,
        [1, 0, 0, 0] => true,
        _ => return None,
    };
    Some(ImageHead {
        template,
        saved_unix_s: u64::from_le_bytes(*saved_unix_s),
        pages: u64::from_le_bytes(*pages),
        parts: u32::from_le_bytes(*parts),
    })
}

fn part_key(key: &str, part: u32) -> Vec<u8> {
    [key.as_bytes(), &part.to_le_bytes()].concat()
}

/// Up to [`PART_PAGES`] pages in ascending order: runs of page numbers, then the ids.
pub(super) fn encode_part(key: &str, part: u32, pages: &[(Pfn, ContentId)]) -> Vec<u8> {
    let mut runs: Vec<(u64, u32)> = Vec::new();
    for (pfn, _) in pages {
        match runs.last_mut() {
            Some((first, length)) if *first + u64::from(*length) == pfn.get() => *length += 1,
            _ => runs.push((pfn.get(), 1)),
        }
    }
    let mut body = Vec::with_capacity(4 + runs.len() * 12 + pages.len() * 16);
    body.extend((runs.len() as u32).to_le_bytes());
    for (first, length) in runs {
        body.extend(first.to_le_bytes());
        body.extend(length.to_le_bytes());
    }
    for (_, id) in pages {
        body.extend(id.0);
    }
    sealed(&part_key(key, part), body)
}

/// Appends a part's pages. `None`: damaged, and nothing is appended.
pub(super) fn decode_part(key: &str, part: u32, value: &[u8], pages: &mut Vec<(Pfn, ContentId)>) -> Option<()> {
    let (count, rest) = opened(&part_key(key, part), value)?.split_first_chunk::<4>()?;
    let count = u32::from_le_bytes(*count) as usize;
    let (runs, ids) = rest.split_at_checked(count.checked_mul(12)?)?;
    let (ids, left) = ids.as_chunks::<16>();
    if !left.is_empty() || ids.len() > PART_PAGES {
        return None;
    }
    let mut pfns = Vec::with_capacity(ids.len());
    for run in runs.as_chunks::<12>().0 {
        let (first, length) = run.split_first_chunk::<8>()?;
        let first = u64::from_le_bytes(*first);
        let length = u32::from_le_bytes(length.try_into().ok()?);
        if length as usize > ids.len() - pfns.len() {
            return None;
        }
        let end = first.checked_add(u64::from(length))?;
        Pfn::new(end.checked_sub(1)?)?;
        pfns.extend((first..end).filter_map(Pfn::new));
    }
    if pfns.len() != ids.len() {
        return None;
    }
    pages.extend(pfns.into_iter().zip(ids.iter().map(|id| ContentId(*id))));
    Some(())
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn hex(bytes: &[u8]) -> String {
        bytes.iter().map(|byte| format!("{byte:02x}")).collect()
    }

    fn pfn(raw: u64) -> Pfn {
        Pfn::new(raw).unwrap()
    }

    #[test]
    fn literal_bytes() {
        let block = encode_block(7, [(0, ContentId([0xaa; 16])), (31, ContentId([0xbb; 16]))].into_iter());
        let head = ImageHead {
            template: true,
            saved_unix_s: 0x6543_2100,
            pages: 3,
            parts: 1,
        };
        let pages = [
            (pfn(5), ContentId([1; 16])),
            (pfn(6), ContentId([2; 16])),
            (pfn(0x1_0000_0000), ContentId([3; 16])),
        ];
        let (head_bytes, part) = (encode_head("t:base", &head), encode_part("t:base", 0, &pages));
        assert_eq!(
            [hex(&block), hex(&head_bytes), hex(&part)],
            include_str!("golden.txt").lines().collect::<Vec<_>>()[..]
        );
        assert_eq!(decode_head("t:base", &head_bytes), Some(head));
        assert_eq!(decode_head("g:base", &head_bytes), None);
        assert_eq!(decode_block(8, &block), None);
        assert_eq!(decode_block(7, &block).unwrap().len(), 2);
        let mut back = Vec::new();
        decode_part("t:base", 0, &part, &mut back).unwrap();
        assert_eq!(back, pages);
        assert_eq!(decode_part("t:base", 1, &part, &mut back), None);
    }

    proptest! {
        #[test]
        fn parts_come_back(raw in prop::collection::btree_map(0u64..2000, any::<[u8; 16]>(), 0..300)) {
            let pages: Vec<_> = raw.into_iter().map(|(p, id)| (pfn(p), ContentId(id))).collect();
            let mut back = Vec::new();
            decode_part("g:x", 9, &encode_part("g:x", 9, &pages), &mut back).unwrap();
            prop_assert_eq!(back, pages);
        }

        #[test]
        fn damage_is_refused_not_fatal(mut body in prop::collection::vec(any::<u8>(), 0..200), sealed_well: bool) {
            let mut value = if sealed_well { sealed(&part_key("g:x", 0), body.clone()) } else { body.clone() };
            let mut pages = Vec::new();
            if decode_part("g:x", 0, &value, &mut pages).is_none() {
                prop_assert!(pages.is_empty());
            }
            value = sealed(&3u32.to_le_bytes(), std::mem::take(&mut body));
            let _ = decode_block(3, &value);
            let _ = decode_head("g:x", &value);
        }
    }
}
