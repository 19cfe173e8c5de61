//! A set of pages in few bytes, for traces and for the model's working sets.
//!
//! The first byte is the kind. 0, runs: pairs of LEB128 numbers to the end, first how many pages are skipped (less one
//! from the second run on: runs do not touch), then the run's length less one. 1, bitmap: a bit for each page below the
//! bound, as [`PageSet`] has them, in bytes; bits past the bound are zero. The writer takes the shorter one.
use std::ops::Range;

use thiserror::Error;

use crate::codec::varint;
use crate::page_set::PageSet;

const RUNS: u8 = 0;
const BITMAP: u8 = 1;

/// Why bytes are no set of pages; `offset` counts from their beginning.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
pub enum PackedError {
    #[error("a set of pages without a byte")]
    Empty,
    #[error("a set of pages of unknown kind {0}")]
    Kind(u8),
    #[error("a number that is cut off or too large, at byte {offset} of a set of pages")]
    Number { offset: usize },
    #[error("a run past the guest's last page, at byte {offset} of a set of pages")]
    PastEnd { offset: usize },
    #[error("a bitmap of {found} bytes where {expected} are needed")]
    Length { found: usize, expected: u64 },
    #[error("a bit past the guest's last page")]
    Tail,
}

impl PackedError {
    /// Where in the bytes it shows.
    pub fn offset(&self) -> usize {
        match self {
            PackedError::Number { offset } | PackedError::PastEnd { offset } => *offset,
            PackedError::Tail | PackedError::Length { .. } => 1,
            PackedError::Empty | PackedError::Kind(_) => 0,
        }
    }
}

/// The most bytes that a set of pages below `pages` takes.
pub fn most_bytes(pages: u64) -> u64 {
    1 + pages.div_ceil(8)
}

/// Packs a set; never longer than [`most_bytes`].
pub fn pack(set: &PageSet) -> Vec<u8> {
    let most = usize::try_from(most_bytes(set.bound())).unwrap_or(usize::MAX);
    let mut out = vec![RUNS];
    let mut end = None;
    for run in runs_of(set) {
        let skipped = match end {
            None => run.start,
            Some(end) => run.start - end - 1,
        };
        varint::put(&mut out, skipped);
        varint::put(&mut out, run.end - run.start - 1);
        end = Some(run.end);
        if out.len() > most {
            return bitmap(set);
        }
    }
    out
}

fn bitmap(set: &PageSet) -> Vec<u8> {
    let bytes = set.words().iter().flat_map(|word| word.to_le_bytes());
    let used = usize::try_from(set.bound().div_ceil(8)).unwrap_or(usize::MAX);
    std::iter::once(BITMAP).chain(bytes.take(used)).collect()
}

/// The runs of pages in a set, ascending.
fn runs_of(set: &PageSet) -> impl Iterator<Item = Range<u64>> + '_ {
    let mut pages = set.iter().peekable();
    std::iter::from_fn(move || {
        let start = pages.next()?.get();
        let mut end = start + 1;
        while pages.next_if(|page| page.get() == end).is_some() {
            end += 1;
        }
        Some(start..end)
    })
}

/// Calls `each` with the runs of pages, ascending and below `pages`. Allocates nothing.
///
/// # Errors
/// The bytes are no packed set for this bound; `each` has been called for what was before that.
pub fn for_each_run(bytes: &[u8], pages: u64, mut each: impl FnMut(Range<u64>)) -> Result<(), PackedError> {
    match bytes.split_first() {
        None => Err(PackedError::Empty),
        Some((&RUNS, body)) => for_each_of_runs(body, pages, each),
        Some((&BITMAP, body)) => {
            let expected = pages.div_ceil(8);
            if body.len() as u64 != expected {
                let found = body.len();
                return Err(PackedError::Length { found, expected });
            }
            let mut run: Option<Range<u64>> = None;
            for (byte, index) in body.iter().zip(0u64..) {
                let mut left = *byte;
                while left != 0 {
                    let page = index * 8 + u64::from(left.trailing_zeros());
                    left &= left - 1;
                    if page >= pages {
                        return Err(PackedError::Tail);
                    }
                    match &mut run {
                        Some(run) if run.end == page => run.end += 1,
                        _ => {
                            if let Some(done) = run.replace(page..page + 1) {
                                each(done);
                            }
                        }
                    }
                }
            }
            if let Some(done) = run {
                each(done);
            }
            Ok(())
        }
        Some((&kind, _)) => Err(PackedError::Kind(kind)),
    }
}

fn for_each_of_runs(body: &[u8], pages: u64, mut each: impl FnMut(Range<u64>)) -> Result<(), PackedError> {
    let mut rest = body;
    let mut end: Option<u64> = None;
    while !rest.is_empty() {
        // The kind comes before the body.
        let offset = 1 + body.len() - rest.len();
        let mut number = || varint::take(&mut rest).map_err(|_| PackedError::Number { offset });
        let (skipped, length) = (number()?, number()?);
        let from = end.map_or(Some(0), |end| end.checked_add(1));
        let start = from.and_then(|from| from.checked_add(skipped));
        let run_end = start.and_then(|start| start.checked_add(length)?.checked_add(1));
        match (start, run_end) {
            (Some(start), Some(run_end)) if run_end <= pages => {
                each(start..run_end);
                end = Some(run_end);
            }
            _ => return Err(PackedError::PastEnd { offset }),
        }
    }
    Ok(())
}

/// The set that the bytes stand for; allocates a bit for each page below `pages`, which the caller has bounded.
pub fn unpack(bytes: &[u8], pages: u64) -> Result<PageSet, PackedError> {
    let mut set = PageSet::new(pages);
    for_each_run(bytes, pages, |run| set.insert_run(run))?;
    Ok(set)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::page::Pfn;

    fn set(pages: &[u64], bound: u64) -> PageSet {
        let mut set = PageSet::new(bound);
        pages.iter().for_each(|page| {
            set.insert(Pfn::new(*page).unwrap());
        });
        set
    }

    #[test]
    fn bytes_are_as_documented() {
        assert_eq!(pack(&set(&[], 100)), [RUNS]);
        // Skip 3, one page; skip 1 + 1, two pages.
        assert_eq!(pack(&set(&[3, 6, 7], 100)), [RUNS, 3, 0, 1, 1]);
        let alternating: Vec<u64> = (0..10).map(|page| page * 2).collect();
        assert_eq!(pack(&set(&alternating, 20)), [BITMAP, 0x55, 0x55, 0x05]);
    }

    #[test]
    fn bad_bytes_are_refused() {
        let walk = |bytes: &[u8]| for_each_run(bytes, 10, |_| {});
        assert_eq!(walk(&[]), Err(PackedError::Empty));
        assert_eq!(walk(&[2]), Err(PackedError::Kind(2)));
        assert_eq!(walk(&[RUNS, 1]), Err(PackedError::Number { offset: 1 }));
        assert_eq!(walk(&[RUNS, 0, 0, 7, 1]), Err(PackedError::PastEnd { offset: 3 }));
        let length = PackedError::Length { found: 1, expected: 2 };
        assert_eq!(walk(&[BITMAP, 0]), Err(length));
        assert_eq!(walk(&[BITMAP, 0, 4]), Err(PackedError::Tail));
        assert_eq!(walk(&[BITMAP, 0, 3]), Ok(()));
    }

    proptest! {
        #[test]
        fn sets_come_back(bound in 1u64..300, pages in proptest::collection::vec(0u64..300, 0..200)) {
            let pages: Vec<u64> = pages.into_iter().filter(|page| *page < bound).collect();
            let set = set(&pages, bound);
            let bytes = pack(&set);
            prop_assert!(bytes.len() as u64 <= most_bytes(bound));
            prop_assert_eq!(unpack(&bytes, bound).unwrap(), set);
        }

        #[test]
        fn any_bytes_are_a_set_or_an_error(bytes in proptest::collection::vec(any::<u8>(), 0..40), bound in 0u64..300) {
            match unpack(&bytes, bound) {
                Ok(set) => prop_assert!(set.len() <= bound),
                Err(error) => prop_assert!(error.offset() <= bytes.len()),
            }
        }
    }
}
