//! Page number → content id, dense where the guest has memory.
use hashbrown::HashMap;
use thiserror::Error;

use crate::page::{ContentId, Pfn};

/// Pages in a chunk; one bit each in its map.
const CHUNK_PAGES: u64 = 64;

/// Chunks that may exist whatever the number of pages in them: 16 MiB.
const FREE_CHUNKS: u64 = 16 << 10;

/// The page numbers lie so far apart that remembering their contents would cost far more than 16 bytes a page. No
/// guest looks like that; a peer that lies may.
#[derive(Debug, Error, PartialEq, Eq)]
#[error("page numbers are too far apart to be a guest's memory ({pages} pages in {chunks} chunks of {CHUNK_PAGES})")]
pub struct TooSparse {
    pub pages: u64,
    pub chunks: u64,
}

struct Chunk {
    present: u64,
    ids: [ContentId; CHUNK_PAGES as usize],
}

/// What each page holds. Memory: 16 bytes a page in chunks of 64, and at most 16 MiB for chunks that are not full.
#[derive(Default)]
pub struct PageIds {
    chunks: HashMap<u64, Box<Chunk>>,
    pages: u64,
}

fn position(pfn: Pfn) -> (u64, usize, u64) {
    let slot = pfn.get() % CHUNK_PAGES;
    (pfn.get() / CHUNK_PAGES, slot as usize, 1 << slot)
}

impl PageIds {
    pub fn get(&self, pfn: Pfn) -> Option<ContentId> {
        let (chunk, slot, bit) = position(pfn);
        let chunk = self.chunks.get(&chunk)?;
        if chunk.present & bit != 0 {
            chunk.ids.get(slot).copied()
        } else {
            None
        }
    }

    pub fn set(&mut self, pfn: Pfn, id: ContentId) -> Result<(), TooSparse> {
        let (index, slot, bit) = position(pfn);
        let chunks = self.chunks.len() as u64;
        let full = chunks >= FREE_CHUNKS + self.pages * 2 / CHUNK_PAGES;
        if full && !self.chunks.contains_key(&index) {
            return Err(TooSparse {
                pages: self.pages,
                chunks,
            });
        }
        let empty = || {
            Box::new(Chunk {
                present: 0,
                ids: [ContentId([0; 16]); CHUNK_PAGES as usize],
            })
        };
        let chunk = self.chunks.entry(index).or_insert_with(empty);
        if let Some(place) = chunk.ids.get_mut(slot) {
            *place = id;
        }
        self.pages += u64::from(chunk.present & bit == 0);
        chunk.present |= bit;
        Ok(())
    }

    pub fn remove(&mut self, pfn: Pfn) {
        let (index, _, bit) = position(pfn);
        if let Some(chunk) = self.chunks.get_mut(&index) {
            self.pages -= u64::from(chunk.present & bit != 0);
            chunk.present &= !bit;
        }
    }

    pub fn clear(&mut self) {
        *self = PageIds::default();
    }

    /// Pages that have a row.
    pub fn len(&self) -> u64 {
        self.pages
    }

    pub fn is_empty(&self) -> bool {
        self.pages == 0
    }

    /// All pages with a row in ascending order.
    pub fn iter(&self) -> impl Iterator<Item = (Pfn, ContentId)> + '_ {
        let mut order: Vec<u64> = self.chunks.keys().copied().collect();
        order.sort_unstable();
        order.into_iter().flat_map(move |index| {
            let pages = (index * CHUNK_PAGES..).take(CHUNK_PAGES as usize).filter_map(Pfn::new);
            pages.filter_map(move |pfn| Some((pfn, self.get(pfn)?)))
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pfn(raw: u64) -> Pfn {
        Pfn::new(raw).unwrap()
    }

    #[test]
    fn rows_come_in_order() {
        let mut ids = PageIds::default();
        for raw in [700, 3, 64, 63, Pfn::MAX.get()] {
            ids.set(pfn(raw), ContentId([raw as u8; 16])).unwrap();
        }
        ids.remove(pfn(64));
        let rows: Vec<u64> = ids.iter().map(|(pfn, _)| pfn.get()).collect();
        assert_eq!(rows, [3, 63, 700, Pfn::MAX.get()]);
        assert_eq!(
            (ids.len(), ids.get(pfn(64)), ids.get(pfn(3))),
            (4, None, Some(ContentId([3; 16])))
        );
    }

    #[test]
    fn scattered_pages_meet_a_bound() {
        let mut ids = PageIds::default();
        let stored = (0..u64::MAX)
            .take_while(|n| ids.set(pfn(n * 1000), ContentId([0; 16])).is_ok())
            .count();
        assert!((16 << 10..17 << 10).contains(&stored), "{stored}");
    }
}
