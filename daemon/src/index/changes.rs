//! Which pages of a guest change: what each was at the last visits. Dirtiness is never learnt from Xen, whose log-dirty mode
//! belongs to migrations.
use std::time::Duration;

use xenfold::page::Pfn;
use xenfold::page_set::PageSet;

use crate::notes::Notes;
use crate::sharing::ZERO;

/// Visits that are remembered.
const VISITS: u32 = 8;

/// Of those, how many with another content than before make a page one that changes, if the last one does not.
const OFTEN: u32 = 2;

/// Visits in less time than this count as one: in a moment hardly anything changes.
const APART: Duration = Duration::from_secs(30);

/// Of each page 24 bits of its content's key, and a bit for each of the last visits, the lowest for the last: whether it had
/// changed then.
#[derive(Default)]
pub struct Changes {
    notes: Notes,
    /// Whole visits of the guest.
    visits: u32,
    /// When the last visit began that counts as one, and whether the one under way does.
    began: Option<Duration>,
    counts: bool,
}

impl Changes {
    pub fn bytes(&self) -> u64 {
        self.notes.bytes()
    }

    /// A visit begins.
    pub fn begin(&mut self, now: Duration) {
        self.counts = self.began.is_none_or(|began| now.saturating_sub(began) >= APART);
        if self.counts {
            self.began = Some(now);
        }
    }

    /// The page has this content at this visit. Not noted: a page of zeros among nothing else, which may never have been used, and
    /// pages for whose notes there is no room within `most_bytes`.
    pub fn seen(&mut self, pfn: u32, key: u64, most_bytes: u64) {
        if !self.notes.has(pfn) && (key == ZERO || !self.notes.has_room(most_bytes)) {
            return;
        }
        let Some(note) = self.notes.entry(pfn) else { return };
        // Never zero, which is a page that was not seen.
        let (before, now) = (*note >> VISITS, (key >> 40) as u32 | 1);
        let changed = before != 0 && before != now;
        let visits = (*note << u32::from(self.counts)) & ((1 << VISITS) - 1);
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

    /// Whether a page changes that had these contents at visits so many seconds apart.
    fn changes(contents: &[u64], apart: u64) -> bool {
        let mut changes = Changes::default();
        for (content, visit) in contents.iter().zip(0..) {
            changes.begin(Duration::from_secs(visit * apart));
            // Its neighbour is there.
            changes.seen(701, 7 << 41, 1 << 20);
            changes.seen(700, content << 41, 1 << 20);
            changes.visited();
        }
        let pages = changes.pages(1000).unwrap();
        assert_eq!(changes.pages(700).unwrap().len(), 0, "above the bound");
        assert!(!pages.contains(Pfn::new(701).unwrap()));
        pages.contains(Pfn::new(700).unwrap())
    }

    #[test]
    fn pages_that_changed_last_or_often_are_told() {
        assert!(Changes::default().pages(9).is_none());
        let changes = |contents: &[u64]| changes(contents, 60);
        assert!(!changes(&[5, 5]) && changes(&[5, 6]) && changes(&[0, 5]) && changes(&[5, 0]));
        assert!(!changes(&[5, 6, 6]), "once, and that is over");
        assert!(changes(&[5, 6, 5, 5]) && changes(&[1, 2, 3, 3, 3, 3, 3, 3, 3]));
        assert!(!changes(&[1, 2, 3, 3, 3, 3, 3, 3, 3, 3, 3]), "long ago");
    }

    #[test]
    fn visits_in_a_moment_are_one() {
        assert!(changes(&[5, 6, 6, 6, 6], 5) && !changes(&[5, 6, 6, 6, 6], 60));
    }

    #[test]
    fn pages_without_room_and_zeros_among_themselves_are_not_noted() {
        let mut changes = Changes::default();
        changes.seen(1, 5 << 41, 1000);
        (512..1024).for_each(|pfn| changes.seen(pfn, ZERO, 1 << 20));
        assert_eq!(changes.bytes(), 0);
    }
}
