//! The shared-page table: which pages have one frame. A row for each shared frame, found by its content, by its handle,
//! and by each of its pages.
use std::collections::{BTreeMap, HashMap};

use xen_sys::{DomId, ShareHandle};

use super::host::GuestPage;

/// Pages of one row. Xen finds a page among those of its frame in lists of a hash table of 256 (`mem_sharing.c`, rmap):
/// without a bound every write to a zero page would search through thousands. A second frame for each 2048 pages costs 0.05 %.
pub const MOST_PAGES: usize = 2048;

/// The number of a sharing group.
pub type GroupNo = u32;

pub type RowId = u32;

/// A shared frame.
#[derive(Clone, Debug)]
pub struct Row {
    /// The content: the lookup key of its id in the group, or [`super::ZERO`].
    pub key: u64,
    pub group: GroupNo,
    pub handle: ShareHandle,
    /// Never empty.
    pub pages: Vec<GuestPage>,
}

#[derive(Default)]
pub struct SharedTable {
    rows: Vec<Option<Row>>,
    vacant: Vec<RowId>,
    by_page: HashMap<GuestPage, RowId>,
    by_handle: HashMap<ShareHandle, RowId>,
    /// The row that further pages of a content join.
    open: HashMap<(GroupNo, u64), RowId>,
    by_guest: BTreeMap<DomId, u64>,
}

impl SharedTable {
    pub fn rows(&self) -> impl Iterator<Item = &Row> {
        self.rows.iter().flatten()
    }

    /// Frames.
    pub fn frames(&self) -> u64 {
        (self.rows.len() as u64).saturating_sub(self.vacant.len() as u64)
    }

    pub fn pages(&self) -> u64 {
        self.by_page.len() as u64
    }

    /// Frames that sharing spares: what Xen calls saved.
    pub fn saved(&self) -> u64 {
        self.pages().saturating_sub(self.frames())
    }

    pub fn pages_of(&self, domid: DomId) -> u64 {
        self.by_guest.get(&domid).copied().unwrap_or(0)
    }

    pub fn row(&self, id: RowId) -> Option<&Row> {
        self.rows.get(id as usize)?.as_ref()
    }

    pub fn find(&self, page: GuestPage) -> Option<RowId> {
        self.by_page.get(&page).copied()
    }

    pub fn by_handle(&self, handle: ShareHandle) -> Option<RowId> {
        self.by_handle.get(&handle).copied()
    }

    /// The row that a further page of this content joins, as long as it has room.
    pub fn open(&self, group: GroupNo, key: u64) -> Option<RowId> {
        let id = *self.open.get(&(group, key))?;
        self.row(id).filter(|row| row.pages.len() < MOST_PAGES).map(|_| id)
    }

    /// A frame that was nominated and has this page; further ones of the content join it from now on.
    pub fn add(&mut self, group: GroupNo, key: u64, handle: ShareHandle, page: GuestPage) -> RowId {
        self.remove(page);
        let row = Row {
            key,
            group,
            handle,
            pages: Vec::new(),
        };
        let id = match self.vacant.pop() {
            Some(id) => id,
            None => {
                self.rows.push(None);
                // As many rows as 32 bits count are 16 TiB of frames.
                (self.rows.len() - 1) as RowId
            }
        };
        if let Some(place) = self.rows.get_mut(id as usize) {
            *place = Some(row);
        }
        self.by_handle.insert(handle, id);
        self.open.insert((group, key), id);
        self.join(id, page);
        id
    }

    /// A page whose frame is this row's by now.
    pub fn join(&mut self, id: RowId, page: GuestPage) {
        if self.find(page) == Some(id) {
            return;
        }
        self.remove(page);
        if let Some(Some(row)) = self.rows.get_mut(id as usize) {
            row.pages.push(page);
            self.by_page.insert(page, id);
            *self.by_guest.entry(page.domid).or_default() += 1;
        }
    }

    /// The content is known by another key now.
    pub fn rekey(&mut self, id: RowId, key: u64) {
        let Some(Some(row)) = self.rows.get_mut(id as usize) else {
            return;
        };
        let (group, old) = (row.group, row.key);
        row.key = key;
        if self.open.get(&(group, old)) == Some(&id) {
            self.open.remove(&(group, old));
        }
        self.open.entry((group, key)).or_insert(id);
    }

    /// The page has a frame of its own, or none. False: it was in no row.
    pub fn remove(&mut self, page: GuestPage) -> bool {
        let Some(id) = self.by_page.remove(&page) else {
            return false;
        };
        if let Some(count) = self.by_guest.get_mut(&page.domid) {
            *count = count.saturating_sub(1);
            if *count == 0 {
                self.by_guest.remove(&page.domid);
            }
        }
        let Some(place) = self.rows.get_mut(id as usize) else {
            return true;
        };
        let Some(row) = place else { return true };
        if let Some(at) = row.pages.iter().position(|other| *other == page) {
            row.pages.swap_remove(at);
        }
        if row.pages.is_empty() {
            let (entry, handle) = ((row.group, row.key), row.handle);
            *place = None;
            self.vacant.push(id);
            self.by_handle.remove(&handle);
            if self.open.get(&entry) == Some(&id) {
                self.open.remove(&entry);
            }
        }
        true
    }

    /// All pages that are in rows.
    pub fn all_pages(&self) -> impl Iterator<Item = GuestPage> {
        self.by_page.keys().copied()
    }

    /// The guest is gone, or all of it is its own again.
    pub fn forget(&mut self, domid: DomId) -> u64 {
        if self.pages_of(domid) == 0 {
            return 0;
        }
        let pages: Vec<GuestPage> = self.all_pages().filter(|page| page.domid == domid).collect();
        for page in &pages {
            self.remove(*page);
        }
        pages.len() as u64
    }

    /// How many pages any two guests have in one frame; with itself, where a guest has several pages in one.
    pub fn pairs(&self) -> BTreeMap<(DomId, DomId), u64> {
        let mut pairs = BTreeMap::new();
        for row in self.rows() {
            let mut counts: BTreeMap<DomId, u64> = BTreeMap::new();
            for page in &row.pages {
                *counts.entry(page.domid).or_default() += 1;
            }
            for (a, of_a) in &counts {
                if *of_a > 1 {
                    *pairs.entry((*a, *a)).or_default() += of_a - 1;
                }
                for (b, of_b) in counts.range(..*a) {
                    *pairs.entry((*b, *a)).or_default() += of_a.min(of_b);
                }
            }
        }
        pairs
    }
}

#[cfg(test)]
mod tests {
    use xenfold::page::Pfn;

    use super::*;

    fn page(domid: u32, pfn: u64) -> GuestPage {
        GuestPage::new(DomId::new(domid).unwrap(), Pfn::new(pfn).unwrap()).unwrap()
    }

    #[test]
    fn rows_live_as_long_as_they_have_pages() {
        let mut table = SharedTable::default();
        let handle = ShareHandle::new;
        let row = table.add(0, 7, handle(1), page(1, 1));
        table.join(row, page(2, 1));
        table.join(row, page(2, 1));
        table.join(row, page(1, 9));
        assert_eq!((table.pages(), table.frames(), table.saved()), (3, 1, 2));
        assert_eq!((table.open(0, 7), table.open(1, 7)), (Some(row), None));
        let pairs: Vec<_> = table.pairs().into_values().collect();
        assert_eq!(pairs, [1, 1]);
        // A page that is in another frame by now is in that row only.
        let other = table.add(0, 8, handle(2), page(1, 9));
        assert_eq!((table.find(page(1, 9)), table.saved()), (Some(other), 1));
        table.rekey(other, 9);
        assert_eq!((table.open(0, 8), table.open(0, 9)), (None, Some(other)));
        assert_eq!(table.forget(DomId::new(1).unwrap()), 2);
        assert_eq!((table.by_handle(handle(2)), table.open(0, 9)), (None, None));
        assert_eq!((table.pages(), table.frames()), (1, 1));
        assert!(table.remove(page(2, 1)) && !table.remove(page(2, 1)));
        assert_eq!((table.pages(), table.frames(), table.by_guest.len()), (0, 0, 0));
        assert_eq!(table.add(0, 7, handle(3), page(1, 1)), row, "numbers are used again");
    }

    #[test]
    fn a_full_row_takes_no_more() {
        let mut table = SharedTable::default();
        let row = table.add(0, 7, ShareHandle::new(1), page(1, 0));
        for pfn in 1..MOST_PAGES as u64 {
            assert_eq!(table.open(0, 7), Some(row));
            table.join(row, page(1, pfn));
        }
        assert_eq!(table.open(0, 7), None);
    }
}
