//! Which pages of a guest change: what each was at the last visits. Dirtiness is never learnt from Xen, whose log-dirty mode
//! belongs to migrations.
use xenfold::page::Pfn;
use xenfold::page_set::PageSet;

use crate::notes::Notes;

/// Visits that are remembered.
const VISITS: u32 = 8;

/// Of those, how many with another content than before make a page one that changes, if the last one does not.
const OFTEN: u32 = 2;

/// Of each page 24 bits of its content's key, and a bit for each of the last visits, the lowest for the last: whether it had
/// changed then.
#[derive(Default)]
pub struct Changes {
    notes: Notes,
    /// Whole visits of the guest.
    visits: u32,
}

impl Changes {
    pub fn bytes(&self) -> u64 {
        self.notes.bytes()
    }

    /// The page has this content at this visit. Pages for whose notes there is no room within `most_bytes` are not noted.
    pub fn seen(&mut self, pfn: u32, key: u64, most_bytes: u64) {
        if !self.notes.has_room(pfn, most_bytes) {
            return;
        }
        let Some(note) = self.notes.entry(pfn) else { return };
        // Never zero, which is a page that was not seen.
        let (before, now) = (*note >> VISITS, (key >> 40) as u32 | 1);
        let changed = before != 0 && before != now;
        let visits = (*note << 1) & ((1 << VISITS) - 1);
        *note = now << VISITS | visits | u32::from(changed);
    }

    /// The guest has been gone through from its first page to its last.
    pub fn visited(&mut self) {
        self.visits = self.visits.saturating_add(1);
    }

    pub fn visits(&self) -> u32 {
        self.visits
    }

    /// The pages below a bound that changed between the last two visits, or often of late. `None`: there were no two.
    pub fn pages(&self, bound: u64) -> Option<PageSet> {
        if self.visits < 2 {
            return None;
        }
        let mut pages = PageSet::new(bound);
        for (pfn, note) in self.notes.iter() {
            let visits = note & ((1 << VISITS) - 1);
            let changes = visits & 1 == 1 || visits.count_ones() >= OFTEN;
            if let Some(pfn) = Pfn::new(pfn.into()).filter(|pfn| changes && pfn.get() < bound) {
                pages.insert(pfn);
            }
        }
        Some(pages)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A page's content at each visit.
    fn changes(contents: &[u64]) -> bool {
        let mut changes = Changes::default();
        for content in contents {
            changes.seen(700, content << 41, 1 << 20);
            changes.visited();
        }
        let pages = changes.pages(1000).unwrap();
        assert_eq!(changes.pages(700).unwrap().len(), 0, "above the bound");
        pages.contains(Pfn::new(700).unwrap())
    }

    #[test]
    fn pages_that_changed_last_or_often_are_told() {
        assert!(Changes::default().pages(9).is_none());
        let mut none = Changes::default();
        none.seen(1, 5, 1000);
        assert_eq!(none.bytes(), 0, "no room");
        assert!(!changes(&[5, 5]) && changes(&[5, 6]) && changes(&[0, 5]) && changes(&[5, 0]));
        assert!(!changes(&[5, 6, 6]), "once, and that is over");
        assert!(changes(&[5, 6, 5, 5]) && changes(&[1, 2, 3, 3, 3, 3, 3, 3, 3]));
        assert!(!changes(&[1, 2, 3, 3, 3, 3, 3, 3, 3, 3, 3]), "long ago");
    }
}
