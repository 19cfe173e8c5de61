//! Which pages stay behind when the guest is suspended, to follow it when it runs at the destination.
//!
//! A page that stays behind stands in the stream as an entry of type XALLOC: Xen's toolstack makes room for it, and writes
//! nothing. Its last entry decides: one with data takes it back.
use super::FrameSource;
use crate::late::Mode;
use crate::page::Pfn;
use crate::page_set::PageSet;
use crate::stream::Entry;

/// Pages of the last pass that go before the guest is started: what it wrote last is what it touches first, and a
/// hypercall whose argument lies in a missing page fails.
pub const NOW_PAGES: usize = 2048;

/// What goes however slow the link is.
const LEAST_NOW: usize = 64;

/// Passes whose pages are told apart by how lately they were written.
const RECENT: usize = 4;

/// How much of the guest may stay behind.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LeaveBehind {
    pub mode: Mode,
    /// Pages that go all the same once it is suspended.
    pub now_pages: usize,
    /// The destination takes pages out before that: it is told of those that are likely to stay behind.
    pub announces: bool,
}

/// What becomes of an entry of xl's.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fate {
    Carry,
    /// It is left out: its page comes again, or is read later.
    Hold,
    /// Its page stays behind.
    Behind,
}

/// What stays behind so far.
pub(super) struct Behind {
    mode: Mode,
    now: usize,
    announces: bool,
    late: PageSet,
    /// Pages written in each of the last passes, the newest last.
    recent: Vec<PageSet>,
}

/// What has stayed behind when the stream is complete.
pub struct LeftBehind {
    pub late: PageSet,
    /// What was written lately, the latest first.
    pub hot: Vec<PageSet>,
    pub frames: Box<dyn FrameSource>,
}

impl Behind {
    pub fn new(plan: LeaveBehind, bound: u64) -> Behind {
        Behind {
            mode: plan.mode,
            now: plan.now_pages,
            announces: plan.announces,
            late: PageSet::new(bound),
            recent: Vec::new(),
        }
    }

    /// One of xl's passes begins. All that it has was written during the one before, but for the first one.
    pub fn pass(&mut self, number: u32) {
        if number > 1 {
            self.recent.push(PageSet::new(self.late.bound()));
            if self.recent.len() > RECENT {
                self.recent.remove(0);
            }
        }
    }

    /// What goes before the guest is started has to fit into so many pages. Without a rate nothing is known, and where nearly
    /// all stays behind there is little more than what it touches first.
    pub fn fit(&mut self, pages: u64) {
        if self.mode == Mode::Hybrid {
            self.now = self
                .now
                .min(usize::try_from(pages).unwrap_or(usize::MAX).max(LEAST_NOW));
        }
    }

    /// Whether a page that xl sends while the guest runs stays behind whatever is known of it.
    pub fn takes_all(&self) -> bool {
        self.mode == Mode::Postcopy
    }

    /// Whether the destination is told right before the suspend what will stay behind. Where all does, xl's own entries say so.
    pub fn announces(&self) -> bool {
        self.announces && !self.takes_all()
    }

    /// What will stay behind, as far as can be seen: of the pages that wait (`held`) and those that xl sends once more (`dirty`)
    /// all but the first of the latter, which go.
    pub fn announced(&self, held: &PageSet, dirty: &PageSet) -> PageSet {
        let mut pages = held.clone();
        pages.union(dirty);
        dirty.iter().take(self.now).for_each(|pfn| pages.remove(pfn));
        pages
    }

    /// The guest runs, and xl sends a page that is to stay behind.
    pub fn live(&mut self, entry: &Entry) -> Fate {
        if let Some(recent) = self.recent.last_mut() {
            recent.insert(entry.pfn);
        }
        if !self.takes_all() {
            return Fate::Carry;
        }
        self.leave(entry.pfn)
    }

    /// The guest is suspended, and xl sends a page.
    pub fn suspended(&mut self, entry: &Entry) -> Fate {
        if let Some(recent) = self.recent.last_mut() {
            recent.insert(entry.pfn);
        }
        if let Some(left) = self.now.checked_sub(1) {
            self.now = left;
            self.late.remove(entry.pfn);
            return Fate::Carry;
        }
        self.leave(entry.pfn)
    }

    fn leave(&mut self, pfn: Pfn) -> Fate {
        match (self.late.contains(pfn), self.late.insert(pfn)) {
            (true, _) => Fate::Hold,
            (false, true) => Fate::Behind,
            // Past the bound: nothing could be known of it.
            (false, false) => Fate::Carry,
        }
    }

    /// A page of xl's goes, or has no data any more.
    pub fn carried(&mut self, pfn: Pfn) {
        self.late.remove(pfn);
    }

    /// Pages that are still to go before the guest is started, of those that were not sent because they were held (`held`)
    /// and of those that were written lately.
    pub fn now(&mut self, held: &PageSet, limit: usize) -> Vec<Pfn> {
        let limit = limit.min(self.now);
        let recent = self.recent.iter().rev().flat_map(PageSet::iter);
        let waits = |pfn: &Pfn| held.contains(*pfn) || self.late.contains(*pfn);
        let mut pages: Vec<Pfn> = recent.filter(waits).take(limit).collect();
        pages.sort_unstable();
        pages.dedup();
        self.now -= pages.len();
        pages.iter().for_each(|pfn| self.late.remove(*pfn));
        pages
    }

    /// Pages that were held and stay behind: so many as go into a record.
    pub fn rest(&mut self, held: &mut PageSet, limit: usize) -> Vec<Pfn> {
        let rest: Vec<Pfn> = held.iter().take(limit).collect();
        for pfn in &rest {
            held.remove(*pfn);
            self.late.insert(*pfn);
        }
        rest
    }

    pub fn end(self, frames: Box<dyn FrameSource>) -> Option<LeftBehind> {
        let Behind { late, mut recent, .. } = self;
        recent.reverse();
        (!late.is_empty()).then_some(LeftBehind {
            late,
            hot: recent,
            frames,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_sent_at_the_suspend_is_not_said_to_stay_behind() {
        let set = |runs: &[std::ops::Range<u64>]| {
            let mut set = PageSet::new(100);
            runs.iter().for_each(|run| set.insert_run(run.clone()));
            set
        };
        let plan = |mode| LeaveBehind {
            mode,
            now_pages: 3,
            announces: true,
        };
        let behind = Behind::new(plan(Mode::Hybrid), 100);
        assert!(behind.announces() && !Behind::new(plan(Mode::Postcopy), 100).announces());
        // Held pages that are dirty are among the first that xl sends, too.
        let announced = behind.announced(&set(&[10..12, 50..52]), &set(&[10..11, 20..24]));
        assert_eq!(announced, set(&[11..12, 22..24, 50..52]));
    }
}
