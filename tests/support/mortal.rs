//! An agent that is killed: from one of its acts on nothing that it does has any effect, though its threads live on in the
//! test.
#![allow(dead_code, reason = "each integration test uses its own part of this")]

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicI64, Ordering};

use parking_lot::Mutex;
use xenfold::engine::{FrameError, GuestPaging, LateJournal, Notices, PageRequest};
use xenfold::late::Saving;
use xenfold::late::journal::Noted;
use xenfold::page::{PAGE_SIZE, Pfn};
use xenfold::page_set::PageSet;
use xenfold::wire::EarlyOut;

type Will = Box<dyn FnOnce() + Send>;

/// A process that can be killed.
#[derive(Clone)]
pub struct Mortal(Arc<Inner>);

struct Inner {
    /// Acts until it is killed.
    left: AtomicI64,
    /// They are counted from when its journal begins.
    counted: AtomicBool,
    dead: AtomicBool,
    wills: Mutex<Vec<Will>>,
}

impl Mortal {
    /// Killed right before the so many-th of its acts.
    pub fn after(acts: i64) -> Mortal {
        Mortal(Arc::new(Inner {
            left: AtomicI64::new(acts),
            counted: AtomicBool::new(false),
            dead: AtomicBool::new(false),
            wills: Mutex::default(),
        }))
    }

    pub fn is_dead(&self) -> bool {
        self.0.dead.load(Ordering::SeqCst)
    }

    /// What the kernel does when the process ends.
    pub fn on_death(&self, will: impl FnOnce() + Send + 'static) {
        self.0.wills.lock().push(Box::new(will));
    }

    pub fn kill(&self) {
        if !self.0.dead.swap(true, Ordering::SeqCst) {
            let wills: Vec<Will> = self.0.wills.lock().drain(..).collect();
            wills.into_iter().for_each(|will| will());
        }
    }

    /// From here on its acts count.
    pub fn count(&self) {
        self.0.counted.store(true, Ordering::SeqCst);
    }

    fn act(&self) -> io::Result<()> {
        if self.0.counted.load(Ordering::SeqCst) && self.0.left.fetch_sub(1, Ordering::SeqCst) <= 0 {
            self.kill();
        }
        match self.is_dead() {
            true => Err(io::Error::other("killed")),
            false => Ok(()),
        }
    }

    fn act_on_guest(&self) -> Result<(), FrameError> {
        self.act().map_err(|error| FrameError::Xen(error.to_string()))
    }
}

/// A guest's paging in the hands of a process that can be killed.
pub struct Handled<P> {
    pub paging: P,
    pub by: Mortal,
}

impl<P: GuestPaging> GuestPaging for Handled<P> {
    fn enable(&mut self) -> Result<(), FrameError> {
        self.paging.enable()
    }

    fn enable_early(&mut self, source: &EarlyOut) -> Result<bool, FrameError> {
        self.paging.enable_early(source)
    }

    fn secure(&mut self) -> Result<(), FrameError> {
        self.paging.secure()
    }

    fn evict(&mut self, pfns: &[Pfn]) -> Result<Vec<bool>, FrameError> {
        self.paging.evict(pfns)
    }

    fn write(&mut self, pfn: Pfn, page: &[u8; PAGE_SIZE]) -> Result<(), FrameError> {
        self.paging.write(pfn, page)
    }

    fn load(&mut self, pfn: Pfn, page: &[u8; PAGE_SIZE]) -> Result<(), FrameError> {
        self.by.act_on_guest()?;
        self.paging.load(pfn, page)
    }

    fn mark_dirty(&mut self, pfns: &[Pfn]) -> Result<(), FrameError> {
        self.by.act_on_guest()?;
        self.paging.mark_dirty(pfns)
    }

    fn saving(&mut self) -> Result<Saving, FrameError> {
        match self.by.is_dead() {
            true => Ok(Saving::No),
            false => self.paging.saving(),
        }
    }

    fn notices(&mut self) -> Result<Box<dyn Notices>, FrameError> {
        self.paging.notices()
    }

    fn requests(&mut self) -> Result<Vec<PageRequest>, FrameError> {
        match self.by.is_dead() {
            // Nothing comes any more, and nothing is said.
            true => Ok(Vec::new()),
            false => self.paging.requests(),
        }
    }

    fn answer(&mut self, token: u64) -> Result<(), FrameError> {
        self.by.act_on_guest()?;
        self.paging.answer(token)
    }

    fn guest_exists(&mut self) -> Result<bool, FrameError> {
        self.paging.guest_exists()
    }

    fn hold_still(&mut self, still: bool) -> Result<(), FrameError> {
        self.by.act_on_guest()?;
        self.paging.hold_still(still)
    }

    fn has_not_run(&mut self) -> Result<bool, FrameError> {
        self.paging.has_not_run()
    }

    fn disable(&mut self) -> Result<(), FrameError> {
        self.by.act_on_guest()?;
        self.paging.disable()
    }

    fn is_held(&mut self) -> Result<bool, FrameError> {
        self.paging.is_held()
    }

    fn take_over(&mut self) -> Result<(), FrameError> {
        self.by.act_on_guest()?;
        self.paging.take_over()
    }
}

/// A journal in the hands of a process that can be killed: its lock goes with the process.
pub struct Kept<J> {
    journal: Arc<Mutex<Option<J>>>,
    by: Mortal,
}

impl<J: LateJournal + 'static> Kept<J> {
    pub fn new(journal: J, by: Mortal) -> Kept<J> {
        let journal = Arc::new(Mutex::new(Some(journal)));
        let dropped = journal.clone();
        by.on_death(move || drop(dropped.lock().take()));
        Kept { journal, by }
    }

    fn with(&self, act: impl FnOnce(&mut J) -> io::Result<()>) -> io::Result<()> {
        self.by.act()?;
        self.journal.lock().as_mut().map_or(Ok(()), act)
    }
}

impl<J: LateJournal + 'static> LateJournal for Kept<J> {
    fn begin(&mut self, late: &PageSet, noted: Noted) -> io::Result<()> {
        self.by.count();
        self.with(|journal| journal.begin(late, noted))
    }

    fn note(&mut self, noted: Noted) -> io::Result<()> {
        self.with(|journal| journal.note(noted))
    }

    fn came(&mut self, pfn: Pfn) -> io::Result<()> {
        self.with(|journal| journal.came(pfn))
    }

    fn awaited(&mut self, pfn: Pfn) -> io::Result<()> {
        self.with(|journal| journal.awaited(pfn))
    }

    fn end(&mut self) {
        // Killed before is as good.
        let _ = self.with(|journal| {
            journal.end();
            Ok(())
        });
    }
}
