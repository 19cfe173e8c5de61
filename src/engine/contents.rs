//! Contents beside the guest that migrates: what this host holds ([`Contents`]), and what the source knows of what the
//! destination holds ([`Holdings`]).
use std::collections::{BTreeMap, VecDeque};
use std::sync::Arc;

use hashbrown::HashMap;
use parking_lot::{Mutex, RwLock};

use super::page_record::PageRecord;
use crate::page::{ContentId, ContentKey, PAGE_SIZE, Pfn};
use crate::table::PageIds;
use crate::wire::{Held, Need, WireError};

/// Contents that this host holds for the guest's sharing group: in its store, in guests that run here. All of it is
/// hints: guests write their pages, files get damaged. What is read is hashed before it is used.
pub trait Contents: Send + Sync {
    /// [`ContentId::lookup_key`] of all contents held, for the destination's filter.
    fn lookup_keys(&self) -> Vec<u64>;

    /// Fills `pages` with the contents `ids`, 4096 bytes each, in their order; which of them were found.
    fn read(&self, ids: &[ContentId], pages: &mut [u8]) -> Vec<bool>;

    /// What a page of this guest held when the guest was last here.
    fn last_seen(&self, pfn: Pfn) -> Option<ContentId>;

    /// Offers pages for keeping. Waits for a small share of the migration's time at most: what cannot be taken then is not
    /// kept.
    fn keep(&self, pages: &[(ContentId, &[u8])]);

    /// Which of these contents would be kept, and are not held yet.
    fn wants(&self, ids: &[ContentId]) -> Vec<bool>;

    /// Keeps pages, however long it takes.
    fn keep_all(&self, pages: &[(ContentId, &[u8])]);

    /// What the guest's pages hold as it leaves or arrives. Called when nobody waits for the guest any more.
    fn save_image(&self, ids: &PageIds);
}

/// Reads contents and hashes them: the pages one behind the other, and which of them are what their ids say.
pub(super) fn read_checked(contents: &dyn Contents, key: &ContentKey, ids: &[ContentId]) -> (Vec<u8>, Vec<bool>) {
    let mut pages = vec![0; ids.len() * PAGE_SIZE];
    let found = contents.read(ids, &mut pages);
    let right = key.ids(pages.as_chunks().0).into_iter().zip(ids).enumerate();
    let right = right
        .map(|(index, (read, id))| found.get(index) == Some(&true) && read == *id)
        .collect();
    (pages, right)
}

/// Bytes of records that the source keeps because the destination may still need pages of them: above it, pages are
/// sent in full.
const RETAINED_BYTES: usize = 32 << 20;

/// What the source knows of the destination's contents, and the records that it may be asked for.
#[derive(Default)]
pub(super) struct Holdings {
    held: RwLock<Held>,
    retained: Mutex<Retained>,
}

#[derive(Default)]
struct Retained {
    records: BTreeMap<u64, Arc<PageRecord>>,
    bytes: usize,
}

impl Holdings {
    /// The destination holds more.
    pub fn add(&self, body: Vec<u8>) -> Result<(), WireError> {
        self.held.write().add(body)
    }

    /// Which of these contents the destination seems to hold; none while it may still ask for too much.
    pub fn contain(&self, ids: &[Option<ContentId>]) -> Vec<bool> {
        let held = self.held.read();
        let room = self.retained.lock().bytes < RETAINED_BYTES;
        ids.iter()
            .map(|id| room && id.is_some_and(|id| held.contains(&id)))
            .collect()
    }

    /// The same for pages of which nothing is kept: what is not there after all is asked for, and read again.
    pub fn seem_held(&self, ids: &[ContentId]) -> Vec<bool> {
        let held = self.held.read();
        ids.iter().map(|id| held.contains(id)).collect()
    }

    /// Keeps a record that names contents until the destination has settled it.
    pub fn retain(&self, number: u64, record: Arc<PageRecord>) {
        let mut retained = self.retained.lock();
        retained.bytes += record.length();
        retained.records.insert(number, record);
    }

    pub fn settled(&self, number: u64) {
        let mut retained = self.retained.lock();
        if let Some(record) = retained.records.remove(&number) {
            retained.bytes -= record.length();
        }
    }

    /// The pages that the destination needs, one behind the other. `None`: it cannot need them.
    pub fn needed(&self, need: &Need) -> Option<Vec<u8>> {
        let record = self.retained.lock().records.get(&need.record)?.clone();
        let indices: Option<Vec<usize>> = need
            .rows
            .iter()
            .map(|row| record.list.get(usize::from(*row))?.2)
            .collect();
        Some(record.gather(indices?))
    }
}

/// Pages kept for deltas: 8 MiB.
const REWRITTEN_PAGES: usize = 2048;

/// When all places are taken, 1 page in so many that come anew takes the oldest one's: a guest that rewrites more pages
/// than are kept, one after the other, would else find none of them.
const ADMITTED: usize = 8;

/// The newest bytes of pages that were carried more than once. They are likely to be carried again, changed a little.
#[derive(Default)]
pub(super) struct Rewritten {
    pages: HashMap<Pfn, (ContentId, Box<[u8]>)>,
    /// In the order of entering; a page may stand here that has been replaced since.
    order: VecDeque<(Pfn, ContentId)>,
    /// Pages that came when all places were taken.
    late: usize,
}

impl Rewritten {
    pub fn insert(&mut self, pfn: Pfn, id: ContentId, page: &[u8]) {
        if self.pages.len() >= REWRITTEN_PAGES && !self.pages.contains_key(&pfn) {
            self.late += 1;
            if !self.late.is_multiple_of(ADMITTED) {
                return;
            }
            while let Some((old, id)) = self.order.pop_front() {
                if self.is(old, id) {
                    self.pages.remove(&old);
                    break;
                }
            }
        }
        self.pages.insert(pfn, (id, page.into()));
        self.order.push_back((pfn, id));
        if self.order.len() > 2 * REWRITTEN_PAGES {
            let mut order = std::mem::take(&mut self.order);
            order.retain(|(pfn, id)| self.is(*pfn, *id));
            self.order = order;
        }
    }

    fn is(&self, pfn: Pfn, id: ContentId) -> bool {
        self.get(pfn, id).is_some()
    }

    /// The bytes of a page, if they are those of this content.
    pub fn get(&self, pfn: Pfn, id: ContentId) -> Option<&[u8]> {
        self.pages
            .get(&pfn)
            .filter(|(newest, _)| *newest == id)
            .map(|(_, page)| &page[..])
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rewritten_pages_are_bounded_and_the_newest() {
        let mut pages = Rewritten::default();
        let pfn = |raw: u64| Pfn::new(raw).unwrap();
        let id = |raw: usize| ContentId([raw as u8; 16]);
        for round in 0..3 * REWRITTEN_PAGES {
            pages.insert(pfn(round as u64 % 700), id(round), &[round as u8; PAGE_SIZE]);
        }
        assert_eq!(pages.pages.len(), 700);
        let last = 3 * REWRITTEN_PAGES - 1;
        assert_eq!(
            pages.get(pfn(last as u64 % 700), id(last)),
            Some(&[last as u8; PAGE_SIZE][..])
        );
        assert_eq!(pages.get(pfn(last as u64 % 700), id(last - 1)), None);
        for round in 0..REWRITTEN_PAGES {
            pages.insert(pfn(10_000 + round as u64), id(1), &[0; PAGE_SIZE]);
        }
        assert_eq!(pages.pages.len(), REWRITTEN_PAGES);
        assert!(pages.order.len() <= 2 * REWRITTEN_PAGES);
    }

    #[test]
    fn more_pages_than_there_are_places_are_found_in_part() {
        let mut pages = Rewritten::default();
        let all = 2 * REWRITTEN_PAGES as u64;
        let mut found = 0;
        for round in 0..4_u8 {
            for pfn in (0..all).filter_map(Pfn::new) {
                found += u64::from(round > 0 && pages.get(pfn, ContentId([round - 1; 16])).is_some());
                pages.insert(pfn, ContentId([round; 16]), &[round; PAGE_SIZE]);
            }
        }
        assert!(found > 3 * all / 4, "{found} of {}", 3 * all);
        assert!(pages.pages.len() <= REWRITTEN_PAGES);
    }
}
