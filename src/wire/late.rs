//! Frames about pages that follow the guest: what is asked for ([`wants`]), the pages ([`LatePages`]), and which of them
//! have not come when the connection was lost ([`missing`]).
use std::ops::Range;

use super::frame::{Kind, WireError};
use crate::late::Want;
use crate::page::{ContentId, Pfn};

/// The most pages in one frame.
pub const MAX_LATE_PAGES: usize = 256;

/// The most pages that one frame asks for.
pub const MAX_WANTS: usize = 1024;

/// Bits 63–60 of a word.
const KIND_SHIFT: u32 = 60;
const PFN_MASK: u64 = Pfn::MAX.get();

const URGENT: u64 = 1;

/// What one late page is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LateRow {
    /// Its bytes come in the block; what they hash to.
    Full(ContentId),
    Zero,
    /// The source has no such page any more.
    Gone,
    /// What the page with this number holds, if it still holds what hashes to this.
    Same(ContentId, Pfn),
    /// A content that the destination seems to hold elsewhere.
    Known(ContentId),
}

const FULL: u64 = 0;
const ZERO: u64 = 1;
const GONE: u64 = 2;
const SAME: u64 = 3;
const KNOWN: u64 = 4;

/// The body of a Late frame.
#[derive(Debug, PartialEq, Eq)]
pub struct LatePages<'a> {
    pub pages: Vec<(Pfn, LateRow)>,
    pub codec: u8,
    /// The full pages, in their order.
    pub block: &'a [u8],
}

impl<'a> LatePages<'a> {
    /// Gives the body in two parts.
    pub fn parts<T>(&self, send: impl FnOnce(&[&[u8]]) -> T) -> T {
        let mut head = (self.pages.len() as u32).to_le_bytes().to_vec();
        head.extend_from_slice(&u32::from(self.codec).to_le_bytes());
        for (pfn, row) in &self.pages {
            let (kind, id, other) = match row {
                LateRow::Full(id) => (FULL, Some(id), None),
                LateRow::Zero => (ZERO, None, None),
                LateRow::Gone => (GONE, None, None),
                LateRow::Same(id, other) => (SAME, Some(id), Some(other)),
                LateRow::Known(id) => (KNOWN, Some(id), None),
            };
            head.extend_from_slice(&(kind << KIND_SHIFT | pfn.get()).to_le_bytes());
            id.iter().for_each(|id| head.extend_from_slice(&id.0));
            other
                .iter()
                .for_each(|pfn| head.extend_from_slice(&pfn.get().to_le_bytes()));
        }
        send(&[&head, self.block])
    }

    /// Reads a body. Errors: too many pages, an unknown kind, a page number above 52 bits, or an end in between. Whether the
    /// block holds as many pages as are full shows when it is decompressed.
    pub fn parse(body: &'a [u8]) -> Result<LatePages<'a>, WireError> {
        let bad = |why| WireError::BadBody { kind: Kind::Late, why };
        let mut rest = body;
        let count = take::<4>(&mut rest).map(u32::from_le_bytes);
        let codec = take::<4>(&mut rest).map(u32::from_le_bytes);
        let (Some(count), Some(codec)) = (count, codec) else {
            return Err(bad("it is shorter than its header"));
        };
        let codec = u8::try_from(codec).map_err(|_| bad("its reserved bytes are not zero"))?;
        if count == 0 || count as usize > MAX_LATE_PAGES {
            return Err(bad("it has no pages or too many"));
        }
        let mut pages = Vec::with_capacity(count as usize);
        for _ in 0..count {
            let short = bad("it ends inside its list");
            let word = take::<8>(&mut rest).map(u64::from_le_bytes).ok_or(short)?;
            let pfn = page(word & !(0xf << KIND_SHIFT)).ok_or(bad("a page number is too large"))?;
            let mut id = || {
                take::<16>(&mut rest)
                    .map(ContentId)
                    .ok_or(bad("it ends inside its list"))
            };
            let row = match word >> KIND_SHIFT {
                FULL => LateRow::Full(id()?),
                ZERO => LateRow::Zero,
                GONE => LateRow::Gone,
                SAME => {
                    let id = id()?;
                    let other = take::<8>(&mut rest).map(u64::from_le_bytes).and_then(page);
                    LateRow::Same(id, other.ok_or(bad("a page number is too large or missing"))?)
                }
                KNOWN => LateRow::Known(id()?),
                _ => return Err(bad("a page is of an unknown kind")),
            };
            pages.push((pfn, row));
        }
        Ok(LatePages {
            pages,
            codec,
            block: rest,
        })
    }
}

/// The body of a Want frame.
pub fn want_body(wants: &[Want]) -> Vec<u8> {
    let words = wants
        .iter()
        .map(|want| (u64::from(want.urgent) * URGENT) << KIND_SHIFT | want.pfn.get());
    words.flat_map(u64::to_le_bytes).collect()
}

/// Reads the body of a Want frame.
pub fn wants(body: &[u8]) -> Result<Vec<Want>, WireError> {
    let bad = |why| WireError::BadBody { kind: Kind::Want, why };
    let (words, []) = body.as_chunks::<8>() else {
        return Err(bad("it is no list of 8-byte numbers"));
    };
    if words.is_empty() || words.len() > MAX_WANTS {
        return Err(bad("it asks for no pages or too many"));
    }
    let want = |word: &[u8; 8]| {
        let word = u64::from_le_bytes(*word);
        let urgent = word >> KIND_SHIFT;
        let pfn = page(word & !(0xf << KIND_SHIFT)).filter(|_| urgent <= URGENT);
        Some(Want {
            pfn: pfn?,
            urgent: urgent == URGENT,
        })
    };
    words
        .iter()
        .map(|word| want(word).ok_or(bad("a page number is too large, or of an unknown kind")))
        .collect()
}

/// Runs of pages in one Missing frame.
const MAX_RUNS: usize = 4096;

const RUN_BYTES: usize = 16;

/// The bodies of Missing frames for pages in ascending order, without the empty one at the end.
pub fn missing_bodies(pages: impl Iterator<Item = Pfn>) -> Vec<Vec<u8>> {
    let mut runs: Vec<Range<u64>> = Vec::new();
    for page in pages.map(Pfn::get) {
        match runs.last_mut() {
            Some(run) if run.end == page => run.end += 1,
            _ => runs.push(page..page + 1),
        }
    }
    let words = |run: &Range<u64>| [run.start, run.end - run.start];
    let body = |runs: &[Range<u64>]| runs.iter().flat_map(words).flat_map(u64::to_le_bytes).collect();
    runs.chunks(MAX_RUNS).map(body).collect()
}

/// Reads the body of a Missing frame that is not empty: runs of pages, ascending.
pub fn missing(body: &[u8]) -> Result<Vec<Range<u64>>, WireError> {
    let bad = |why| WireError::BadBody {
        kind: Kind::Missing,
        why,
    };
    let (words, []) = body.as_chunks::<RUN_BYTES>() else {
        return Err(bad("it is no list of runs"));
    };
    if words.len() > MAX_RUNS {
        return Err(bad("it has too many runs"));
    }
    let mut runs: Vec<Range<u64>> = Vec::with_capacity(words.len());
    for [a, b, c, d, e, f, g, h, rest @ ..] in words {
        let first = u64::from_le_bytes([*a, *b, *c, *d, *e, *f, *g, *h]);
        let end = first.checked_add(u64::from_le_bytes(*rest));
        let run = first..end.ok_or(bad("a page number is too large"))?;
        let ascends = runs.last().is_none_or(|before| before.end < run.start);
        if run.is_empty() || run.end - 1 > PFN_MASK || !ascends {
            return Err(bad("its runs do not ascend, or are empty"));
        }
        runs.push(run);
    }
    Ok(runs)
}

fn page(number: u64) -> Option<Pfn> {
    if number > PFN_MASK { None } else { Pfn::new(number) }
}

fn take<const BYTES: usize>(rest: &mut &[u8]) -> Option<[u8; BYTES]> {
    let (first, other) = rest.split_first_chunk::<BYTES>()?;
    *rest = other;
    Some(*first)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn pfn(raw: u64) -> Pfn {
        Pfn::new(raw).unwrap()
    }

    fn row() -> impl Strategy<Value = LateRow> {
        prop_oneof![
            any::<[u8; 16]>().prop_map(|id| LateRow::Full(ContentId(id))),
            Just(LateRow::Zero),
            Just(LateRow::Gone),
            any::<[u8; 16]>().prop_map(|id| LateRow::Known(ContentId(id))),
            (any::<[u8; 16]>(), 0..=PFN_MASK).prop_map(|(id, other)| LateRow::Same(ContentId(id), pfn(other))),
        ]
    }

    #[test]
    fn the_bytes_are_those_of_the_format() {
        let pages = LatePages {
            pages: vec![
                (pfn(0x12), LateRow::Full(ContentId([0xaa; 16]))),
                (pfn(0x13), LateRow::Zero),
                (pfn(0x15), LateRow::Same(ContentId([0xbb; 16]), pfn(0x10))),
                (pfn(0x16), LateRow::Known(ContentId([0xcc; 16]))),
            ],
            codec: 2,
            block: b"block",
        };
        let body = pages.parts(|parts| parts.concat());
        let mut expected = vec![4, 0, 0, 0, 2, 0, 0, 0];
        expected.extend([0x12, 0, 0, 0, 0, 0, 0, 0]);
        expected.extend([0xaa; 16]);
        expected.extend([0x13, 0, 0, 0, 0, 0, 0, 0x10]);
        expected.extend([0x15, 0, 0, 0, 0, 0, 0, 0x30]);
        expected.extend([0xbb; 16]);
        expected.extend([0x10, 0, 0, 0, 0, 0, 0, 0]);
        expected.extend([0x16, 0, 0, 0, 0, 0, 0, 0x40]);
        expected.extend([0xcc; 16]);
        expected.extend(b"block");
        assert_eq!(body, expected);
        let asked = [
            Want {
                pfn: pfn(7),
                urgent: true,
            },
            Want {
                pfn: pfn(8),
                urgent: false,
            },
        ];
        let body = want_body(&asked);
        assert_eq!(body, [7, 0, 0, 0, 0, 0, 0, 0x10, 8, 0, 0, 0, 0, 0, 0, 0]);
        assert_eq!(wants(&body).unwrap(), asked);
        assert!(wants(&[]).is_err() && wants(&body[1..]).is_err() && wants(&[0xff; 8]).is_err());
    }

    #[test]
    fn missing_pages_come_back() {
        let pages = [3, 4, 5, 9, 0xf_ffff_ffff_ffff].map(pfn);
        let bodies = missing_bodies(pages.into_iter());
        let expected: [[u64; 2]; 3] = [[3, 3], [9, 1], [0xf_ffff_ffff_ffff, 1]];
        assert_eq!(
            bodies,
            [expected
                .as_flattened()
                .iter()
                .flat_map(|word| word.to_le_bytes())
                .collect::<Vec<u8>>()]
        );
        assert_eq!(missing(&bodies[0]).unwrap(), [3..6, 9..10, PFN_MASK..PFN_MASK + 1]);
        assert!(missing_bodies(std::iter::empty()).is_empty());
        let many = missing_bodies((0..10_000).map(|page| pfn(page * 2)));
        assert_eq!(many.iter().flat_map(|body| missing(body).unwrap()).count(), 10_000);
        let words = |words: &[u64]| words.iter().flat_map(|word| word.to_le_bytes()).collect::<Vec<u8>>();
        for wrong in [
            words(&[3, 0]),
            words(&[3, u64::MAX]),
            words(&[PFN_MASK, 2]),
            words(&[3, 2, 4, 1]),
            words(&[3, 2, 5, 1]),
            words(&[3]),
            words(&[1, 1].repeat(5000)),
        ] {
            assert!(missing(&wrong).is_err(), "{wrong:?}");
        }
    }

    proptest! {
        #[test]
        fn pages_come_back(pages in prop::collection::vec(((0..=PFN_MASK).prop_map(pfn), row()), 1..40), block: Vec<u8>) {
            let body = LatePages { pages: pages.clone(), codec: 1, block: &block }.parts(|parts| parts.concat());
            let parsed = LatePages::parse(&body).unwrap();
            prop_assert_eq!((&parsed.pages, parsed.codec, parsed.block), (&pages, 1, &block[..]));
            let list = body.len() - block.len();
            for end in 0..list {
                prop_assert!(LatePages::parse(&body[..end]).is_err());
            }
        }

        #[test]
        fn any_bytes_are_answered(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
            if let Ok(parsed) = LatePages::parse(&bytes) {
                prop_assert!(parsed.pages.len() <= MAX_LATE_PAGES);
            }
            let _ = wants(&bytes);
            let _ = missing(&bytes);
        }
    }
}
