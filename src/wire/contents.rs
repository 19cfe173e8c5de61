//! Frames about contents that the destination holds elsewhere: what it has ([`Held`]), what it needs after all
//! ([`Need`]), and the answer ([`Contents`]).
use xorf::{BinaryFuse8, BinaryFuse8Ref, DmaSerializable, Filter, FilterRef};

use super::frame::{Kind, WireError};
use crate::codec::MAX_ROWS;
use crate::page::ContentId;

/// The only kind of filter so far: binary fuse with 8-bit fingerprints, 9 bits an id, 0.4 % false positives.
const BINARY_FUSE_8: u32 = 1;
const DESCRIPTOR_BYTES: usize = 20;

/// Ids in one filter: its frame has 3.4 MB.
const FILTER_IDS: usize = 3_000_000;

/// Bodies of Have frames over contents, each given by its lookup key; the last one is empty: that is all for now.
pub fn have_bodies(mut lookup_keys: Vec<u64>) -> Vec<Vec<u8>> {
    lookup_keys.sort_unstable();
    lookup_keys.dedup();
    let filters = lookup_keys.chunks(FILTER_IDS).filter_map(|keys| {
        // Fails only for keys that are double. What is not told is sent in full.
        let filter = BinaryFuse8::try_from(keys).ok()?;
        let mut body = vec![0; 4 + DESCRIPTOR_BYTES];
        let (kind, descriptor) = body.split_at_mut(4);
        kind.copy_from_slice(&BINARY_FUSE_8.to_le_bytes());
        filter.dma_copy_descriptor_to(descriptor);
        body.extend_from_slice(filter.dma_fingerprints());
        Some(body)
    });
    filters.chain([Vec::new()]).collect()
}

/// What the destination says that it holds: about one in 250 ids that it does not hold looks held.
#[derive(Default)]
pub struct Held {
    filters: Vec<Vec<u8>>,
    bytes: usize,
}

/// What is kept of what the destination says: filters for 28 million contents. What it says beyond that is not used.
const MOST_BYTES: usize = 32 << 20;
const MOST_FILTERS: usize = 64;

impl Held {
    /// Adds what the body of a Have frame says. Errors: not a filter whose every lookup stays inside it.
    pub fn add(&mut self, body: Vec<u8>) -> Result<(), WireError> {
        if body.is_empty() {
            return Ok(());
        }
        let bad = |why| WireError::BadBody { kind: Kind::Have, why };
        let words: Vec<u32> = body
            .chunks_exact(4)
            .take(1 + DESCRIPTOR_BYTES / 4)
            .filter_map(|word| <[u8; 4]>::try_from(word).ok().map(u32::from_le_bytes))
            .collect();
        let [kind, _, _, segment, mask, count] = words[..] else {
            return Err(bad("it is shorter than a filter's header"));
        };
        if kind != BINARY_FUSE_8 {
            return Err(bad("its kind of filter is unknown"));
        }
        let slots = (body.len() - 4 - DESCRIPTOR_BYTES) as u64;
        let fits = segment.is_power_of_two()
            && mask == segment - 1
            && count > 0
            && count.is_multiple_of(segment)
            && u64::from(count) + 2 * u64::from(segment) == slots;
        if !fits || slots > u64::from(u32::MAX) {
            return Err(bad("its filter's sizes do not fit together"));
        }
        if self.filters.len() < MOST_FILTERS && self.bytes + body.len() <= MOST_BYTES {
            self.bytes += body.len();
            self.filters.push(body);
        }
        Ok(())
    }

    /// Whether the destination seems to hold this content.
    pub fn contains(&self, id: &ContentId) -> bool {
        self.filters.iter().any(|body| {
            let (_, filter) = body.split_at(4);
            let (descriptor, fingerprints) = filter.split_at(DESCRIPTOR_BYTES);
            BinaryFuse8Ref::from_dma(descriptor, fingerprints).contains(&id.lookup_key())
        })
    }

    pub fn is_empty(&self) -> bool {
        self.filters.is_empty()
    }
}

/// The body of a Need frame: pages of one record whose contents the destination could not find.
#[derive(Debug, PartialEq, Eq)]
pub struct Need {
    /// Number of the Rows frame, counted from 0.
    pub record: u64,
    /// Places in the record's list, each below [`MAX_ROWS`].
    pub rows: Vec<u16>,
}

impl Need {
    pub fn to_bytes(&self) -> Vec<u8> {
        let mut body = self.record.to_le_bytes().to_vec();
        put_rows(&mut body, &self.rows);
        body
    }

    pub fn parse(body: &[u8]) -> Result<Need, WireError> {
        let bad = |why| WireError::BadBody { kind: Kind::Need, why };
        let (record, rows) = body.split_first_chunk().ok_or(bad("it is shorter than its header"))?;
        Ok(Need {
            record: u64::from_le_bytes(*record),
            rows: take_rows(rows).ok_or(bad("its rows are not 1 to 1024 different ones"))?,
        })
    }
}

/// The body of a Contents frame: the answer to a Need.
#[derive(Debug, PartialEq, Eq)]
pub struct Contents<'a> {
    pub record: u64,
    pub rows: Vec<u16>,
    /// The block codec's number (codec::Level::wire).
    pub codec: u8,
    /// The pages of these rows, as one block.
    pub block: &'a [u8],
}

const CONTENTS_HEADER_BYTES: usize = 16;

impl<'a> Contents<'a> {
    pub fn parts<T>(&self, write: impl FnOnce(&[&[u8]]) -> T) -> T {
        let mut header = self.record.to_le_bytes().to_vec();
        header.extend_from_slice(&(self.rows.len() as u32).to_le_bytes());
        header.extend_from_slice(&[self.codec, 0, 0, 0]);
        put_rows(&mut header, &self.rows);
        write(&[&header, self.block])
    }

    pub fn parse(body: &'a [u8]) -> Result<Contents<'a>, WireError> {
        let bad = |why| WireError::BadBody {
            kind: Kind::Contents,
            why,
        };
        let (header, rest) = body
            .split_first_chunk::<CONTENTS_HEADER_BYTES>()
            .ok_or(bad("it is shorter than its header"))?;
        let [r0, r1, r2, r3, r4, r5, r6, r7, n0, n1, n2, n3, codec, 0, 0, 0] = *header else {
            return Err(bad("reserved bytes are not zero"));
        };
        let count = u32::from_le_bytes([n0, n1, n2, n3]) as usize;
        let (rows, block) = count
            .checked_mul(2)
            .and_then(|bytes| rest.split_at_checked(bytes))
            .ok_or(bad("it is shorter than its rows"))?;
        Ok(Contents {
            record: u64::from_le_bytes([r0, r1, r2, r3, r4, r5, r6, r7]),
            rows: take_rows(rows).ok_or(bad("its rows are not 1 to 1024 different ones"))?,
            codec,
            block,
        })
    }
}

fn put_rows(body: &mut Vec<u8>, rows: &[u16]) {
    rows.iter().for_each(|row| body.extend_from_slice(&row.to_le_bytes()));
}

/// All of `bytes` as places in a record, in ascending order.
fn take_rows(bytes: &[u8]) -> Option<Vec<u16>> {
    let rows: Vec<u16> = bytes
        .chunks(2)
        .map(|row| row.try_into().ok().map(u16::from_le_bytes))
        .collect::<Option<_>>()?;
    let ascending = rows.windows(2).all(|pair| pair.first() < pair.last());
    let last = usize::from(*rows.last()?);
    (ascending && last < MAX_ROWS).then_some(rows)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn id(number: u64) -> ContentId {
        let mut bytes = [0; 16];
        bytes[..8].copy_from_slice(&number.wrapping_mul(0x9e37_79b9_7f4a_7c15).to_le_bytes());
        ContentId(bytes)
    }

    #[test]
    fn what_is_held_is_found() {
        for count in [1u64, 2, 5, 100, 20_000] {
            let keys = (0..count).chain(0..count / 2).map(|number| id(number).lookup_key());
            let mut held = Held::default();
            for body in have_bodies(keys.collect()) {
                assert!(
                    body.len() as u64 * 8 < count * 10 + 2000,
                    "{count}: {} bytes",
                    body.len()
                );
                held.add(body).unwrap();
            }
            assert!((0..count).all(|number| held.contains(&id(number))));
            let wrong = (count..count + 100_000)
                .filter(|number| held.contains(&id(*number)))
                .count();
            assert!(wrong < 1000, "{count}: {wrong} false positives");
        }
        let mut held = Held::default();
        for body in have_bodies(Vec::new()) {
            held.add(body).unwrap();
        }
        assert!(held.is_empty() && !held.contains(&id(1)));
        // A destination that goes on and on.
        let body = have_bodies(vec![1, 2, 3]).swap_remove(0);
        (0..2 * MOST_FILTERS).for_each(|_| held.add(body.clone()).unwrap());
        assert_eq!(held.filters.len(), MOST_FILTERS);
    }

    #[test]
    fn filters_that_lie_are_refused_or_stay_inside() {
        let body = have_bodies((0..1000).map(|number| id(number).lookup_key()).collect()).remove(0);
        for end in 1..body.len() {
            assert!(Held::default().add(body[..end].to_vec()).is_err(), "cut at {end}");
        }
        for bit in 0..(4 + DESCRIPTOR_BYTES) * 8 {
            let mut damaged = body.clone();
            damaged[bit / 8] ^= 1 << (bit % 8);
            let mut held = Held::default();
            if held.add(damaged).is_ok() {
                // Whatever it says: a lookup outside the filter would panic.
                (0..5000).for_each(|number| assert!([true, false].contains(&held.contains(&id(number)))));
            }
        }
    }

    #[test]
    fn needs_and_contents_come_back_and_damage_does_not() {
        let need = Need {
            record: 77,
            rows: vec![0, 5, 1023],
        };
        let body = need.to_bytes();
        assert_eq!(body, [77, 0, 0, 0, 0, 0, 0, 0, 0, 0, 5, 0, 255, 3]);
        assert_eq!(Need::parse(&body).unwrap(), need);
        for wrong in [
            &body[..8],
            &body[..9],
            &[&body[..], &[0, 4]].concat(),
            &[&body[..], &[255, 3]].concat(),
        ] {
            assert!(Need::parse(wrong).is_err(), "{wrong:?}");
        }
        let contents = Contents {
            record: 77,
            rows: vec![0, 5],
            codec: 2,
            block: b"block",
        };
        let body = contents.parts(|parts| parts.concat());
        assert_eq!(
            body[..20],
            [77, 0, 0, 0, 0, 0, 0, 0, 2, 0, 0, 0, 2, 0, 0, 0, 0, 0, 5, 0]
        );
        assert_eq!(Contents::parse(&body).unwrap(), contents);
        for end in 0..20 {
            assert!(Contents::parse(&body[..end]).is_err(), "cut at {end}");
        }
        for byte in 13..16 {
            let mut damaged = body.clone();
            damaged[byte] = 1;
            assert!(Contents::parse(&damaged).is_err());
        }
    }
}
