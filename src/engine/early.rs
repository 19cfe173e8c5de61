//! Pages that are late already while the guest still runs at its source: they are taken out of the guest under construction
//! then, since whatever is left of that lengthens the time for which the guest stands still.
//!
//! Xen's toolstack must never be given a page that is out: its helper maps each page for which it has data, and that waits
//! until the page is back. So
//!
//! - a page goes out only when the record is applied that says that it is late: what was written to it before is done with;
//! - before a record is written that says anything else of it, it comes back, empty ([`Early::comes`]);
//! - pages that the toolstack itself writes to, behind the stream, are never taken out ([`EarlyOut`]);
//! - a record that is not looked into brings all pages back, and none goes out any more ([`Early::give_up`]);
//! - none goes out before the guest has (nearly) all of its memory: the ring needs its page, and what is kept back of the
//!   host's memory for the pages that are out would go to those that the helper still allocates. So a record of a second pass
//!   has to be applied before.
//!
//! A row refers to no late page, on either side, so nobody reads one; the assembler refuses a source that does.
use std::sync::Arc;
use std::time::{Duration, Instant};

use parking_lot::{Condvar, Mutex, MutexGuard};

use super::assemble::Applied;
use super::threads::spawn;
use super::{EngineError, GuestPaging};
use crate::page::{Pfn, ZERO_PAGE};
use crate::page_set::PageSet;
use crate::wire::EarlyOut;

/// Pages that are taken out in one go, while a record may have to wait.
const PAGES: usize = 32;

/// How often it is looked whether the guest has its memory.
const LOOK: Duration = Duration::from_millis(100);

/// Whose late pages are taken out while the stream runs.
pub(super) struct Early {
    state: Mutex<State>,
    changed: Condvar,
}

struct State {
    paging: Option<Box<dyn GuestPaging>>,
    source: EarlyOut,
    never: Vec<Pfn>,
    /// Late pages whose records may not be applied, and those that can go out.
    fresh: PageSet,
    ready: PageSet,
    /// The newest record that has to be applied: one with late pages, or the first of a second pass.
    newest: Option<u64>,
    /// The highest page so far, and whether a record began below it: in another pass.
    highest: Option<Pfn>,
    again: bool,
    out: PageSet,
    /// Paging is on.
    on: bool,
    over: bool,
    failed: Option<EngineError>,
    time: EarlyTime,
}

/// What taking pages out has cost, and what putting some of them back.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct EarlyTime {
    pub out: Duration,
    pub back: Duration,
    pub came_back: u64,
}

/// What has become of it when the stream is complete.
pub(super) struct Outcome {
    pub paging: Box<dyn GuestPaging>,
    /// Paging is on, and the page that the ring is in is not the guest's meanwhile.
    pub on: bool,
    pub ring_page: Option<Pfn>,
    pub out: PageSet,
    pub time: EarlyTime,
}

impl Outcome {
    /// Nothing was done before.
    pub fn none(paging: Box<dyn GuestPaging>) -> Outcome {
        Outcome {
            paging,
            on: false,
            ring_page: None,
            out: PageSet::default(),
            time: EarlyTime::default(),
        }
    }
}

impl Early {
    pub fn new(paging: Box<dyn GuestPaging>, source: EarlyOut) -> Early {
        let bound = source.bound();
        Early {
            state: Mutex::new(State {
                paging: Some(paging),
                never: source.never().collect(),
                source,
                fresh: PageSet::new(bound),
                ready: PageSet::new(bound),
                newest: None,
                highest: None,
                again: false,
                out: PageSet::new(bound),
                on: false,
                over: false,
                failed: None,
                time: EarlyTime::default(),
            }),
            changed: Condvar::new(),
        }
    }

    /// Starts the thread that takes pages out. It ends with the stream.
    pub fn start(self: &Arc<Early>, applied: Arc<Applied>) -> Result<(), EngineError> {
        let early = self.clone();
        spawn("xenfold-early", move || early.run(&applied))?;
        Ok(())
    }

    /// One more than the highest page that may go out.
    pub fn bound(&self) -> u64 {
        self.state.lock().out.bound()
    }

    /// A record of pages in ascending order was written: the first and the last of them, and those that it says are late.
    pub fn written(&self, record: u64, first: Pfn, last: Pfn, late: impl Iterator<Item = Pfn>) {
        let mut state = self.state.lock();
        if state.over {
            return;
        }

        let second = !state.again && Some(first) < state.highest;
        state.again |= second;
        state.highest = state.highest.max(Some(last));
        let mut news = second;
        for pfn in late {
            news = true;
            if !state.never.contains(&pfn) && !state.out.contains(pfn) {
                state.fresh.insert(pfn);
            }
        }
        if news {
            state.newest = Some(record);
            drop(state);
            self.changed.notify_all();
        }
    }

    /// A record is about to be written that has these pages, or says that there are none. Errors: of taking pages out, too.
    pub fn comes(&self, pfns: impl Iterator<Item = Pfn>) -> Result<(), EngineError> {
        let mut state = self.state.lock();
        for pfn in pfns {
            state.fresh.remove(pfn);
            state.ready.remove(pfn);
            if state.out.contains(pfn) {
                state.back(pfn)?;
            }
        }
        state.failed.take().map_or(Ok(()), Err)
    }

    /// It is not known any more which pages come.
    pub fn give_up(&self) -> Result<(), EngineError> {
        let mut state = self.state.lock();
        state.end();
        let out: Vec<Pfn> = state.out.iter().collect();
        out.into_iter().try_for_each(|pfn| state.back(pfn))?;
        state.off()?;
        drop(state);
        self.changed.notify_all();
        Ok(())
    }

    /// The stream is complete, or has failed. `None`: it had been ended before.
    pub fn end(&self) -> Result<Option<Outcome>, EngineError> {
        let mut state = self.state.lock();
        state.end();
        self.changed.notify_all();
        if let Some(error) = state.failed.take() {
            return Err(error);
        }
        let (out, on, time) = (std::mem::take(&mut state.out), state.on, state.time);
        let ring_page = Pfn::new(state.source.ring_page).filter(|_| on);
        let outcome = |paging| Outcome {
            paging,
            on,
            ring_page,
            out,
            time,
        };
        Ok(state.paging.take().map(outcome))
    }

    fn run(&self, applied: &Applied) {
        let mut state = self.state.lock();
        let mut applied_until = None;
        loop {
            while state.newest == applied_until && !state.over {
                self.changed.wait(&mut state);
            }
            let (Some(newest), false) = (state.newest, state.over) else {
                return;
            };
            let again = state.again;
            let fresh = std::mem::replace(&mut state.fresh, PageSet::new(0));
            state.fresh = PageSet::new(fresh.bound());
            state.ready.union(&fresh);
            if MutexGuard::unlocked(&mut state, || applied.wait(newest)).is_err() {
                // The stream has ended.
                return;
            }
            applied_until = Some(newest);
            if again && let Err(error) = self.take_out(&mut state) {
                state.failed = Some(error);
                state.end();
            }
        }
    }

    fn take_out(&self, state: &mut MutexGuard<'_, State>) -> Result<(), EngineError> {
        let mut from = 0;
        loop {
            while !state.on && !state.over && !state.begin() {
                let _ = self.changed.wait_for(state, LOOK);
            }
            let pfns: Vec<Pfn> = state.ready.iter_from(from).take(PAGES).collect();
            let (Some(last), false) = (pfns.last(), state.over) else {
                return Ok(());
            };
            from = last.get() + 1;
            state.take_out(&pfns)?;
            // Whoever has a record to write does not wait for all of them.
            MutexGuard::bump(state);
        }
    }
}

impl State {
    /// Turns paging on, once the guest has its memory.
    fn begin(&mut self) -> bool {
        let Some(paging) = &mut self.paging else { return false };
        match paging.enable_early(&self.source) {
            Ok(on) => self.on = on,
            Err(error) => {
                // What is to be said of it is said when the stream is complete.
                log::debug!("no page is taken out before the guest is suspended: {error}");
                self.end();
            }
        }
        self.on
    }

    fn take_out(&mut self, pfns: &[Pfn]) -> Result<(), EngineError> {
        let Some(paging) = &mut self.paging else { return Ok(()) };
        let begin = Instant::now();
        let evicted = paging.evict(pfns)?;
        self.time.out += begin.elapsed();
        for (pfn, evicted) in pfns.iter().zip(evicted) {
            self.ready.remove(*pfn);
            if evicted {
                // Another record may have said the same meanwhile.
                self.fresh.remove(*pfn);
                self.out.insert(*pfn);
            }
        }
        Ok(())
    }

    fn back(&mut self, pfn: Pfn) -> Result<(), EngineError> {
        if let Some(paging) = &mut self.paging {
            let begin = Instant::now();
            paging.load(pfn, &ZERO_PAGE)?;
            self.out.remove(pfn);
            self.time.back += begin.elapsed();
            self.time.came_back += 1;
        }
        Ok(())
    }

    fn off(&mut self) -> Result<(), EngineError> {
        if let Some(paging) = self.paging.as_mut().filter(|_| self.on) {
            paging.disable()?;
            self.on = false;
        }
        Ok(())
    }

    fn end(&mut self) {
        self.over = true;
        self.fresh.clear();
        self.ready.clear();
    }
}
