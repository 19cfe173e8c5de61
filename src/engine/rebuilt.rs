//! What both ends know to be still in memory at the destination: the newest rebuilt records.
//!
//! The destination keeps whole records, the source only their page numbers; both drop the oldest by the same rule.
use std::collections::VecDeque;
use std::ops::Range;
use std::sync::Arc;

use hashbrown::HashMap;
use parking_lot::Mutex;

use crate::page::{PAGE_SIZE, Pfn};

/// Rows that are certainly still in memory at the destination: the last this many that were carried (6 MiB). Rows of
/// every kind count, so that no sort of page makes the destination keep more.
pub const WINDOW_ROWS: usize = 1536;

/// At the source: which pages may be referred to although the destination cannot read frames.
pub struct Window {
    /// Rows that the destination keeps.
    rows: usize,
    order: VecDeque<Pfn>,
    /// How often a page stands in `order`; the last place counts.
    pages: HashMap<Pfn, Place>,
    removed: u64,
}

#[derive(Clone, Copy)]
struct Place(u64);

impl Window {
    /// `rows`: what the destination says that it keeps.
    pub fn new(rows: u32) -> Window {
        let rows = WINDOW_ROWS.min(rows as usize);
        Window {
            rows,
            order: VecDeque::new(),
            pages: HashMap::new(),
            removed: 0,
        }
    }

    /// A row of `pfn` was carried just now, with a page that may be referred to, or not.
    pub fn insert(&mut self, pfn: Pfn, plain: bool) {
        let place = self.removed + self.order.len() as u64;
        self.order.push_back(pfn);
        if plain {
            self.pages.insert(pfn, Place(place));
        } else {
            self.pages.remove(&pfn);
        }
        while self.order.len() > self.rows {
            let Some(old) = self.order.pop_front() else { break };
            if self.pages.get(&old).is_some_and(|place| place.0 == self.removed) {
                self.pages.remove(&old);
            }
            self.removed += 1;
        }
    }

    pub fn contains(&self, pfn: Pfn) -> bool {
        self.pages.contains_key(&pfn)
    }

    pub fn clear(&mut self) {
        *self = Window {
            rows: self.rows,
            ..Window::new(0)
        };
    }
}

/// One PAGE_DATA record as it will be written: header, list and pages, byte for byte xl's.
pub struct RebuiltRecord {
    /// Number of the record, counted by the destination.
    pub number: u64,
    pub bytes: Vec<u8>,
    /// Where the pages start in `bytes`.
    pub pages_at: usize,
    /// Where `bytes` goes when the record is not needed any more.
    pub spare: Spare,
}

impl Drop for RebuiltRecord {
    fn drop(&mut self) {
        self.spare.give_back(std::mem::take(&mut self.bytes));
    }
}

/// Buffers for what comes next. Among frames of all sizes that come and go beside them, records and blocks of megabytes
/// would leave holes in the heap that nothing fits into (20 MiB and more).
#[derive(Clone, Default)]
pub struct Spare(Arc<Mutex<Vec<Vec<u8>>>>);

impl Spare {
    /// As many are under way or kept at once; blocks are smaller than records, and more.
    const BUFFERS: usize = 16;

    /// A buffer with the bytes of an earlier use, and room for so many.
    pub fn take(&self, room: usize) -> Vec<u8> {
        let mut buffer = self.0.lock().pop().unwrap_or_default();
        buffer.reserve(room.saturating_sub(buffer.len()));
        buffer
    }

    pub fn give_back(&self, buffer: Vec<u8>) {
        let mut buffers = self.0.lock();
        if buffers.len() < Self::BUFFERS {
            buffers.push(buffer);
        }
    }
}

impl RebuiltRecord {
    pub fn page(&self, index: usize) -> Option<&[u8]> {
        Some(self.pages(index..index + 1)).filter(|page| !page.is_empty())
    }

    /// The bytes of pages `range`, empty outside the record.
    pub fn pages(&self, range: Range<usize>) -> &[u8] {
        let at = |page: usize| self.pages_at + page * PAGE_SIZE;
        self.bytes.get(at(range.start)..at(range.end)).unwrap_or_default()
    }
}

/// A record and its plain pages, each with its index in the record.
struct Kept {
    record: Arc<RebuiltRecord>,
    pages: Vec<(Pfn, usize)>,
    /// Entries of every kind.
    rows: usize,
}

/// At the destination: the newest records, at least [`WINDOW_ROWS`] rows of them.
#[derive(Default)]
pub struct Recent {
    records: VecDeque<Kept>,
    /// The newest place of each page: record number and index of the page in it.
    places: HashMap<Pfn, (u64, usize)>,
    rows: usize,
    /// The newest record that is not kept any more.
    dropped: Option<u64>,
}

impl Recent {
    /// The newest bytes of a page, if they are still here.
    pub fn page(&self, pfn: Pfn) -> Option<&[u8]> {
        let (number, index) = self.places.get(&pfn)?;
        let first = self.records.front()?.record.number;
        let kept = self.records.get(usize::try_from(number.checked_sub(first)?).ok()?)?;
        kept.record.page(*index)
    }

    /// Takes a record of `rows` rows in; `pages` are its plain pages with the index of each.
    pub fn insert(&mut self, record: Arc<RebuiltRecord>, pages: Vec<(Pfn, usize)>, rows: usize) {
        for (pfn, index) in &pages {
            self.places.insert(*pfn, (record.number, *index));
        }
        self.rows += rows;
        self.records.push_back(Kept { record, pages, rows });
        while let Some(Kept {
            record: oldest,
            pages,
            rows,
        }) = self.records.front()
        {
            if self.rows - rows < WINDOW_ROWS {
                break;
            }
            for (pfn, index) in pages {
                if self.places.get(pfn) == Some(&(oldest.number, *index)) {
                    self.places.remove(pfn);
                }
            }
            self.rows -= rows;
            self.dropped = Some(oldest.number);
            self.records.pop_front();
        }
    }

    /// Nothing is known any more of what the page holds.
    pub fn remove(&mut self, pfn: Pfn) {
        self.places.remove(&pfn);
    }

    /// Forgets all pages; the records before this point count as dropped.
    pub fn clear(&mut self) {
        if let Some(newest) = self.records.back() {
            self.dropped = Some(newest.record.number);
        }
        self.records.clear();
        self.places.clear();
        self.rows = 0;
    }

    /// The newest record that a page not found here may have come in.
    pub fn dropped(&self) -> Option<u64> {
        self.dropped
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pfn(raw: u64) -> Pfn {
        Pfn::new(raw).unwrap()
    }

    #[test]
    fn the_destination_has_what_the_source_counts_on() {
        let mut window = Window::new(u32::MAX);
        let mut recent = Recent::default();
        let mut place = 0u64;
        for number in 0..200u64 {
            let count = (number * 37 % 90 + 1) as usize;
            let pages: Vec<(Pfn, usize)> = (0..count).map(|i| (pfn((place + i as u64) * 7 % 3001), i)).collect();
            // Every third record ends with entries that have no page.
            let absent: Vec<Pfn> = (0..number % 3 * 20).map(|i| pfn((place + i) * 11 % 3001)).collect();
            let bytes: Vec<u8> = pages
                .iter()
                .flat_map(|(p, _)| [(p.get() % 251 + number % 3) as u8; PAGE_SIZE])
                .collect();
            pages.iter().for_each(|(p, _)| window.insert(*p, true));
            absent.iter().for_each(|p| window.insert(*p, false));
            let rows = pages.len() + absent.len();
            recent.insert(
                Arc::new(RebuiltRecord {
                    number,
                    bytes,
                    pages_at: 0,
                    spare: Spare::default(),
                }),
                pages,
                rows,
            );
            absent.iter().for_each(|p| recent.remove(*p));
            place += count as u64;
            for raw in 0..3001 {
                assert!(
                    !window.contains(pfn(raw)) || recent.page(pfn(raw)).is_some(),
                    "record {number}, page {raw}"
                );
            }
        }
        assert!(recent.dropped().is_some() && recent.rows < WINDOW_ROWS + 130);
    }
}
