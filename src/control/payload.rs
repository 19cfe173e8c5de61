//! Payloads: ids, pages, images, lookup keys, one after the other without gaps, little-endian.
use thiserror::Error;

use super::frame::MAX_PAYLOAD_BYTES;
use crate::page::{ContentId, PAGE_SIZE, Pfn};

const ID_BYTES: usize = size_of::<ContentId>();
const PUT_BYTES: usize = ID_BYTES + PAGE_SIZE;
const IMAGE_BYTES: usize = 8 + ID_BYTES;
const KEY_BYTES: usize = 8;
const _: () = assert!(ID_BYTES == 16 && IMAGE_BYTES == 24);

/// Ids in one request.
pub const MAX_IDS: usize = MAX_PAYLOAD_BYTES / ID_BYTES;
/// Pages in one `put`.
pub const MAX_PUT_PAGES: usize = MAX_PAYLOAD_BYTES / PUT_BYTES;
/// Ids in one `read`: the answer has to fit if all are found.
pub const MAX_READ_PAGES: usize = MAX_PAYLOAD_BYTES / (1 + PAGE_SIZE);
/// Pages in one part of an image.
pub const MAX_IMAGE_ENTRIES: usize = MAX_PAYLOAD_BYTES / IMAGE_BYTES;
/// Lookup keys in one part.
pub const MAX_KEYS: usize = MAX_PAYLOAD_BYTES / KEY_BYTES;

/// Why a payload is not what it should be.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub enum MalformedPayload {
    #[error("{bytes} bytes are no whole number of entries of {entry_bytes} bytes")]
    Length { bytes: usize, entry_bytes: usize },
    #[error("{entries} entries; {most} are allowed")]
    Entries { entries: usize, most: usize },
    #[error("the page number {0:#x} has more than 52 bits")]
    Pfn(u64),
    #[error("the byte {0} is neither 0 nor 1")]
    Answer(u8),
    #[error("{found} bytes where {expected} belong")]
    Answers { found: usize, expected: usize },
}

fn entries<const N: usize>(payload: &[u8]) -> Result<&[[u8; N]], MalformedPayload> {
    match payload.as_chunks::<N>() {
        (entries, []) => Ok(entries),
        _ => Err(MalformedPayload::Length {
            bytes: payload.len(),
            entry_bytes: N,
        }),
    }
}

/// The ids of a payload, at most `most`.
pub fn ids(payload: &[u8], most: usize) -> Result<Vec<ContentId>, MalformedPayload> {
    let entries = entries::<ID_BYTES>(payload)?;
    if entries.len() > most {
        return Err(MalformedPayload::Entries {
            entries: entries.len(),
            most,
        });
    }
    Ok(entries.iter().map(|id| ContentId(*id)).collect())
}

pub fn ids_payload(ids: &[ContentId]) -> Vec<u8> {
    ids.iter().flat_map(|id| id.0).collect()
}

/// The pages of a `put` with their ids.
pub fn pages(payload: &[u8]) -> Result<Vec<(ContentId, &[u8])>, MalformedPayload> {
    let pages = entries::<PUT_BYTES>(payload)?.iter().filter_map(|entry| {
        let (id, page) = entry.split_first_chunk::<ID_BYTES>()?;
        Some((ContentId(*id), page))
    });
    Ok(pages.collect())
}

pub fn pages_payload(pages: &[(ContentId, &[u8])]) -> Vec<u8> {
    let mut payload = Vec::with_capacity(pages.len() * PUT_BYTES);
    for (id, page) in pages {
        payload.extend_from_slice(&id.0);
        payload.extend_from_slice(page);
    }
    payload
}

/// The pages of a part of an image.
pub fn image_entries(payload: &[u8]) -> Result<Vec<(Pfn, ContentId)>, MalformedPayload> {
    let entry = |entry: &[u8; IMAGE_BYTES]| {
        let [a, b, c, d, e, f, g, h, id @ ..] = *entry;
        let pfn = u64::from_le_bytes([a, b, c, d, e, f, g, h]);
        Ok((Pfn::new(pfn).ok_or(MalformedPayload::Pfn(pfn))?, ContentId(id)))
    };
    entries::<IMAGE_BYTES>(payload)?.iter().map(entry).collect()
}

pub fn image_payload(pages: &[(Pfn, ContentId)]) -> Vec<u8> {
    let mut payload = Vec::with_capacity(pages.len() * IMAGE_BYTES);
    for (pfn, id) in pages {
        payload.extend_from_slice(&pfn.get().to_le_bytes());
        payload.extend_from_slice(&id.0);
    }
    payload
}

/// The lookup keys of a part of holdings.
pub fn keys(payload: &[u8]) -> Result<impl Iterator<Item = u64>, MalformedPayload> {
    Ok(entries::<KEY_BYTES>(payload)?
        .iter()
        .map(|key| u64::from_le_bytes(*key)))
}

pub fn keys_payload(keys: &[u64]) -> Vec<u8> {
    keys.iter().flat_map(|key| key.to_le_bytes()).collect()
}

/// One byte for each page, then those that were found.
pub fn read_payload(pages: &[Option<Box<[u8]>>]) -> Vec<u8> {
    let found = pages.iter().flatten().count();
    let mut payload = Vec::with_capacity(pages.len() + found * PAGE_SIZE);
    payload.extend(pages.iter().map(|page| u8::from(page.is_some())));
    pages.iter().flatten().for_each(|page| payload.extend_from_slice(page));
    payload
}

/// The answer to a `read` of `asked` ids.
pub fn found_pages(payload: &[u8], asked: usize) -> Result<Vec<Option<&[u8; PAGE_SIZE]>>, MalformedPayload> {
    let short = MalformedPayload::Answers {
        found: payload.len(),
        expected: asked,
    };
    let (flags, rest) = payload.split_at_checked(asked).ok_or(short)?;
    let (expected, mut pages) = (answers(flags, asked)?, entries::<PAGE_SIZE>(rest)?.iter());
    let count = expected.iter().filter(|found| **found).count();
    if count != pages.len() {
        return Err(MalformedPayload::Answers {
            found: pages.len(),
            expected: count,
        });
    }
    Ok(expected
        .iter()
        .map(|found| if *found { pages.next() } else { None })
        .collect())
}

/// One byte, 0 or 1, for each id asked.
pub(super) fn answers(payload: &[u8], asked: usize) -> Result<Vec<bool>, MalformedPayload> {
    if payload.len() != asked {
        return Err(MalformedPayload::Answers {
            found: payload.len(),
            expected: asked,
        });
    }
    let answer = |byte: &u8| match byte {
        0 => Ok(false),
        1 => Ok(true),
        other => Err(MalformedPayload::Answer(*other)),
    };
    payload.iter().map(answer).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn payloads_come_back() {
        let id = |n: u8| ContentId([n; 16]);
        let page = [7; PAGE_SIZE];
        assert_eq!(ids(&ids_payload(&[id(1), id(2)]), 2).unwrap(), [id(1), id(2)]);
        let put = pages_payload(&[(id(1), &page), (id(2), &page)]);
        assert_eq!(pages(&put).unwrap(), [(id(1), &page[..]), (id(2), &page)]);
        let image = [(Pfn::new(3).unwrap(), id(1)), (Pfn::MAX, id(2))];
        assert_eq!(image_entries(&image_payload(&image)).unwrap(), image);
        assert_eq!(
            keys(&keys_payload(&[1, u64::MAX])).unwrap().collect::<Vec<_>>(),
            [1, u64::MAX]
        );
        let read = read_payload(&[None, Some(page.into())]);
        assert_eq!(found_pages(&read, 2).unwrap(), [None, Some(&page)]);
    }

    #[test]
    fn malformed_payloads_are_refused() {
        assert!(ids(&[0; 17], 9).is_err());
        assert!(ids(&[0; 32], 1).is_err());
        assert!(pages(&[0; PUT_BYTES - 1]).is_err());
        assert!(matches!(image_entries(&[0xff; 24]), Err(MalformedPayload::Pfn(_))));
        assert!(keys(&[0; 7]).is_err());
        assert!(answers(&[2], 1).is_err());
        for payload in [
            &[][..],
            &[1],
            &[1, 0],
            &[0; PAGE_SIZE + 1],
            &[1; PAGE_SIZE],
            &[1; PAGE_SIZE + 2],
        ] {
            assert!(found_pages(payload, 1).is_err(), "{} bytes", payload.len());
        }
        assert_eq!(found_pages(&[1; PAGE_SIZE + 1], 1).unwrap(), [Some(&[1; PAGE_SIZE])]);
    }
}
