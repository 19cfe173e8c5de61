//! Rows of one PAGE_DATA record: which page each entry names, and what that page is.
//!
//! Bytes: first the entries as runs (`length`, the entry's upper 12 bits, page number as a difference to the one
//! expected), then the rows as runs (`length << 3 | kind`; a run of references adds its distance as a difference to
//! the distance before, a run of contents their ids). All numbers are LEB128, differences in zigzag. See wire/FORMAT.md.
use super::{CodecError, varint};
use crate::page::{ContentId, Pfn};

/// The most entries in one record (MAX_BATCH_SIZE in Xen's xg_sr_common.h).
pub const MAX_ROWS: usize = 1024;

const PFN_MASK: u64 = Pfn::MAX.get();

/// What one entry's page is (the rows of the design's shared-page table).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Row {
    /// All zero.
    Zero,
    /// Its bytes come in the record's blocks.
    Full,
    /// The bytes that this page holds at this point of the stream.
    Reference(Pfn),
    /// The entry has no page in Xen's stream (types BROKEN, XALLOC, XTAB).
    Absent,
    /// A content that the destination holds elsewhere: in its store, or in a guest that runs there.
    Known(ContentId),
    /// It differs from a page that both ends have; the difference comes in the record's blocks.
    Delta(Base),
}

impl Row {
    /// Whether the destination has to find a content elsewhere than in this guest.
    pub fn names_content(&self) -> bool {
        self.content().is_some()
    }

    /// The content that the destination has to find elsewhere than in this guest.
    pub fn content(&self) -> Option<ContentId> {
        match self {
            Row::Known(id) | Row::Delta(Base::Content(id)) => Some(*id),
            _ => None,
        }
    }
}

/// What a delta is made against.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Base {
    /// What this page held before this record.
    Page,
    /// A content that the destination holds elsewhere.
    Content(ContentId),
}

const ZERO: u64 = 0;
const FULL: u64 = 1;
const REFERENCE: u64 = 2;
const ABSENT: u64 = 3;
const KNOWN: u64 = 4;
const DELTA_PAGE: u64 = 5;
const DELTA_CONTENT: u64 = 6;

/// A row's kind and, for references, how far back it points; rows of equal `Step` make a run.
#[derive(Clone, Copy, PartialEq, Eq)]
struct Step {
    kind: u64,
    distance: i64,
}

impl Step {
    fn of(entry: u64, row: Row) -> Step {
        let (kind, distance) = match row {
            Row::Zero => (ZERO, 0),
            Row::Full => (FULL, 0),
            Row::Reference(pfn) => (REFERENCE, (entry & PFN_MASK) as i64 - pfn.get() as i64),
            Row::Absent => (ABSENT, 0),
            Row::Known(_) => (KNOWN, 0),
            Row::Delta(Base::Page) => (DELTA_PAGE, 0),
            Row::Delta(Base::Content(_)) => (DELTA_CONTENT, 0),
        };
        Step { kind, distance }
    }

    /// The row of one entry; `input` stands where its id would be.
    fn row(self, entry: u64, input: &mut &[u8]) -> Result<Row, CodecError> {
        let mut id = || {
            let (id, rest) = input.split_first_chunk::<16>().ok_or(CodecError::Short)?;
            *input = rest;
            Ok(ContentId(*id))
        };
        Ok(match self.kind {
            ZERO => Row::Zero,
            FULL => Row::Full,
            REFERENCE => {
                let pfn = ((entry & PFN_MASK) as i64)
                    .checked_sub(self.distance)
                    .and_then(|pfn| u64::try_from(pfn).ok());
                Row::Reference(pfn.and_then(Pfn::new).ok_or(CodecError::Pfn)?)
            }
            ABSENT => Row::Absent,
            KNOWN => Row::Known(id()?),
            DELTA_PAGE => Row::Delta(Base::Page),
            DELTA_CONTENT => Row::Delta(Base::Content(id()?)),
            kind => return Err(CodecError::Kind(kind)),
        })
    }
}

/// Writes entries (as Xen's stream has them: type, reserved bits, pfn) and their rows. Both have the same length.
pub fn encode(entries: &[u64], rows: &[Row], out: &mut Vec<u8>) {
    debug_assert_eq!(entries.len(), rows.len());
    let mut expected = 0u64;
    let mut rest = entries;
    while let Some(&first) = rest.first() {
        let length = run_length(rest, |index, entry| Some(*entry) == first.checked_add(index as u64));
        varint::put(out, length as u64);
        varint::put(out, first >> 52);
        varint::put_signed(out, (first & PFN_MASK) as i64 - expected as i64);
        expected = (first & PFN_MASK) + length as u64;
        rest = &rest[length..];
    }
    let steps: Vec<Step> = entries
        .iter()
        .zip(rows)
        .map(|(entry, row)| Step::of(*entry, *row))
        .collect();
    let mut last_distance = 0;
    let mut rest = &steps[..];
    while let Some(&first) = rest.first() {
        let length = run_length(rest, |_, step| *step == first);
        varint::put(out, (length as u64) << 3 | first.kind);
        if first.kind == REFERENCE {
            varint::put_signed(out, first.distance.wrapping_sub(last_distance));
            last_distance = first.distance;
        }
        let done = steps.len() - rest.len();
        for row in rows.iter().skip(done).take(length) {
            row.content().iter().for_each(|id| out.extend_from_slice(&id.0));
        }
        rest = &rest[length..];
    }
}

fn run_length<T>(items: &[T], mut belongs: impl FnMut(usize, &T) -> bool) -> usize {
    items
        .iter()
        .enumerate()
        .take_while(|(index, item)| belongs(*index, item))
        .count()
}

/// Reads what [`encode`] wrote for `count` entries, at most [`MAX_ROWS`]. All of `input` must be used.
pub fn decode(mut input: &[u8], count: usize) -> Result<(Vec<u64>, Vec<Row>), CodecError> {
    if count > MAX_ROWS {
        return Err(CodecError::Run { count });
    }
    let input = &mut input;
    let mut entries = Vec::with_capacity(count);
    let mut expected = 0u64;
    while entries.len() < count {
        let length = take_run(varint::take(input)?, entries.len(), count)?;
        let upper = varint::take(input)?;
        let first = (expected as i64)
            .checked_add(varint::take_signed(input)?)
            .and_then(|pfn| u64::try_from(pfn).ok());
        let first = first.ok_or(CodecError::Pfn)?;
        let last = first.checked_add(length as u64 - 1).ok_or(CodecError::Pfn)?;
        if upper >> 12 != 0 || last > PFN_MASK {
            return Err(CodecError::Pfn);
        }
        entries.extend((first..=last).map(|pfn| upper << 52 | pfn));
        expected = last + 1;
    }
    let mut rows = Vec::with_capacity(count);
    let mut last_distance = 0i64;
    while rows.len() < count {
        let head = varint::take(input)?;
        let length = take_run(head >> 3, rows.len(), count)?;
        let kind = head & 7;
        let mut distance = 0;
        if kind == REFERENCE {
            distance = last_distance.wrapping_add(varint::take_signed(input)?);
            last_distance = distance;
        }
        let step = Step { kind, distance };
        for entry in entries.iter().skip(rows.len()).take(length) {
            rows.push(step.row(*entry, input)?);
        }
    }
    if input.is_empty() {
        Ok((entries, rows))
    } else {
        Err(CodecError::Trailing(input.len()))
    }
}

fn take_run(length: u64, done: usize, count: usize) -> Result<usize, CodecError> {
    let length = usize::try_from(length).unwrap_or(usize::MAX);
    if length == 0 || length > count - done {
        Err(CodecError::Run { count })
    } else {
        Ok(length)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn pfn(raw: u64) -> Pfn {
        Pfn::new(raw).unwrap()
    }

    fn encoded(entries: &[u64], rows: &[Row]) -> Vec<u8> {
        let mut out = Vec::new();
        encode(entries, rows, &mut out);
        out
    }

    #[test]
    fn a_record_of_zeros_costs_seven_bytes() {
        let entries: Vec<u64> = (0x400..0x800).collect();
        let bytes = encoded(&entries, &[Row::Zero; 1024]);
        assert_eq!(bytes, [0x80, 8, 0, 0x80, 0x10, 0x80, 0x40]);
    }

    #[test]
    fn a_run_of_references_costs_as_much_as_one() {
        let entries: Vec<u64> = (0x400..0x800).collect();
        let rows: Vec<Row> = entries.iter().map(|entry| Row::Reference(pfn(entry - 0x3f0))).collect();
        let one = encoded(&entries[..1], &rows[..1]).len();
        assert!(one <= 12 && encoded(&entries, &rows).len() <= one + 2);
    }

    fn row() -> impl Strategy<Value = Row> {
        prop_oneof![
            Just(Row::Zero),
            Just(Row::Full),
            Just(Row::Absent),
            (0..=PFN_MASK).prop_map(|raw| Row::Reference(pfn(raw))),
            (0u64..16).prop_map(|raw| Row::Reference(pfn(raw))),
            any::<[u8; 16]>().prop_map(|id| Row::Known(ContentId(id))),
            Just(Row::Delta(Base::Page)),
            any::<[u8; 16]>().prop_map(|id| Row::Delta(Base::Content(ContentId(id)))),
        ]
    }

    proptest! {
        #[test]
        fn rows_come_back(list in prop::collection::vec((prop_oneof![any::<u64>(), 0u64..32], row()), 0..64)) {
            let (entries, rows): (Vec<u64>, Vec<Row>) = list.into_iter().unzip();
            let bytes = encoded(&entries, &rows);
            prop_assert_eq!(decode(&bytes, entries.len()), Ok((entries.clone(), rows)));
            for end in 0..bytes.len() {
                prop_assert!(decode(&bytes[..end], entries.len()).is_err());
            }
        }

        #[test]
        fn any_bytes_are_answered(bytes in prop::collection::vec(any::<u8>(), 0..64), count in 0usize..2000) {
            if let Ok((entries, rows)) = decode(&bytes, count) {
                prop_assert_eq!((entries.len(), rows.len()), (count, count));
            }
        }
    }
}
