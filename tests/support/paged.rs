//! A guest at the destination some of whose pages are not there yet: it touches and writes them while they arrive, as Xen
//! lets it.
#![allow(dead_code, reason = "each integration test uses its own part of this")]

use std::collections::{BTreeMap, HashMap, HashSet, VecDeque};
use std::sync::Arc;
use std::thread;
use std::time::Duration;

use parking_lot::{Condvar, Mutex};
use xenfold::engine::{FrameError, GuestPaging, Notices, PageRequest};
use xenfold::late::{Asking, Saving};
use xenfold::page::{PAGE_SIZE, Pfn};
use xenfold::wire::EarlyOut;

use crate::hosts::Image;
use crate::living::Dice;

/// What is wrong with this guest or host.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Faults {
    /// The hypervisor cannot page.
    pub no_paging: bool,
    /// One in so many pages cannot be taken out.
    pub busy: u64,
    /// The guest is destroyed after so many touches.
    pub destroyed_after: Option<u64>,
    /// The so many-th page that comes cannot be put where it belongs, once.
    pub fails_at: Option<u64>,
}

/// A guest whose pages Xen holds back.
#[derive(Clone)]
pub struct Paged(Arc<Inner>);

struct Inner {
    state: Mutex<State>,
    changed: Condvar,
    image: Image,
}

#[derive(Default)]
struct State {
    faults: Faults,
    evicted: HashSet<u64>,
    requests: VecDeque<PageRequest>,
    /// Requests that have been answered.
    answered: HashSet<u64>,
    tokens: u64,
    /// Pauses that somebody holds.
    paused: u32,
    runs: bool,
    gone: bool,
    enabled: bool,
    stopped: bool,
    off: bool,
    /// What the guest has written, and the pages it has given up.
    written: BTreeMap<u64, u8>,
    given_up: HashSet<u64>,
    loads: HashMap<u64, u32>,
    /// Pages that came while the guest ran.
    came: u64,
    /// Pages that were wrong when the guest looked.
    wrong: Vec<String>,
    touches: u64,
    /// Another program saves the guest.
    save: Option<Saved>,
    /// How often it was tried to begin early, pages that came back in the stream, and whether that is over.
    early_tries: u32,
    came_back: u64,
    sealed: bool,
    saving: Saving,
}

/// What another program has saved of the guest, as xl does it.
#[derive(Clone, Debug, Default)]
pub struct Saved {
    /// Pages by now; those that were not there are missing.
    pub image: HashMap<u64, Vec<u8>>,
    /// Pages to be looked at again.
    dirty: HashSet<u64>,
    /// Pages that were not there when the guest was suspended.
    pub missing: usize,
    /// What the guest's memory was then.
    pub right: HashMap<u64, Vec<u8>>,
}

impl Paged {
    pub fn new(image: Image, faults: Faults) -> Paged {
        let state = State {
            faults,
            ..State::default()
        };
        Paged(Arc::new(Inner {
            state: Mutex::new(state),
            changed: Condvar::new(),
            image,
        }))
    }

    /// The guest runs: it touches `touches` pages at random, checks what it finds against what the source had, and writes
    /// some. `right`: the byte that fills a page.
    pub fn run(&self, seed: u64, touches: u64, pages: u64, right: impl Fn(u64) -> Option<u8> + Send + 'static) {
        let guest = self.clone();
        self.0.state.lock().runs = true;
        thread::spawn(move || {
            let mut dice = Dice(seed);
            for _ in 0..touches {
                let page = dice.throw(pages);
                let asking = match dice.throw(12) {
                    0 => Asking::Domain,
                    1 if dice.throw(4) == 0 => Asking::GivesUp,
                    _ => Asking::Guest,
                };
                if !guest.touch(page, asking) {
                    return;
                }
                if asking == Asking::Guest {
                    guest.look(page, right(page));
                    if dice.throw(3) == 0 {
                        guest.write(page, dice.throw(256) as u8);
                    }
                }
            }
        });
    }

    /// Another program saves the guest: a pass while it runs, then it asks the guest to suspend itself. The guest does so when
    /// it can run, in no time, and goes on afterwards.
    pub fn save(&self) -> Saved {
        let mut state = self.0.state.lock();
        state.save = Some(Saved {
            image: self.0.image.lock().clone(),
            ..Saved::default()
        });
        let _ = self.0.changed.wait_for(&mut state, Duration::from_millis(5));
        state.saving = Saving::Asks;
        self.0.changed.notify_all();
        // It sees that as soon as the pager does.
        let _ = self.0.changed.wait_for(&mut state, Duration::from_millis(20));
        while state.saving == Saving::Asks || state.paused > 0 {
            let _ = self.0.changed.wait_for(&mut state, Duration::from_millis(10));
        }
        state.saving = Saving::Suspended;
        let mut save = state.save.take().unwrap_or_default();
        let image = self.0.image.lock().clone();
        for page in std::mem::take(&mut save.dirty) {
            match image.get(&page) {
                Some(now) => drop(save.image.insert(page, now.clone())),
                None => drop(save.image.remove(&page)),
            }
        }
        save.missing = state.evicted.len();
        save.right = image;
        let _ = self.0.changed.wait_for(&mut state, Duration::from_millis(20));
        state.saving = Saving::No;
        save
    }

    /// Stops the guest where it is, and returns its memory.
    pub fn stop(&self) -> HashMap<u64, Vec<u8>> {
        let mut state = self.0.state.lock();
        state.stopped = true;
        let image = self.0.image.lock().clone();
        drop(state);
        image
    }

    /// Waits until the page is there, as the guest would. False: the guest is gone.
    fn touch(&self, page: u64, asking: Asking) -> bool {
        let mut state = self.0.state.lock();
        state.touches += 1;
        if state.faults.destroyed_after.is_some_and(|after| state.touches > after) {
            state.gone = true;
            return false;
        }
        if asking == Asking::GivesUp {
            if state.evicted.remove(&page) {
                state.given_up.insert(page);
                self.ask(&mut state, page, asking);
            }
            return true;
        }
        let mut tries = 0;
        while state.evicted.contains(&page) {
            if state.gone {
                return false;
            }
            tries += 1;
            let token = self.ask(&mut state, page, asking);
            if asking == Asking::Domain {
                // It tries again, and goes on with something else if that does not help.
                let _ = self.0.changed.wait_for(&mut state, Duration::from_millis(1));
                if tries > 3 {
                    return true;
                }
                continue;
            }
            while !state.answered.contains(&token) && !state.gone {
                self.0.changed.wait(&mut state);
            }
        }
        while state.paused > 0 && !state.gone {
            self.0.changed.wait(&mut state);
        }
        !state.gone
    }

    fn ask(&self, state: &mut State, page: u64, asking: Asking) -> u64 {
        let token = state.tokens;
        state.tokens += 1;
        let pfn = Pfn::new(page).unwrap();
        state.requests.push_back(PageRequest { pfn, asking, token });
        self.0.changed.notify_all();
        token
    }

    fn look(&self, page: u64, right: Option<u8>) {
        let mut state = self.0.state.lock();
        if state.given_up.contains(&page) {
            return;
        }
        let expected = state.written.get(&page).copied().or(right);
        let image = self.0.image.lock();
        let found = image.get(&page).map(|page| page[0]);
        if expected.is_some() && found != expected {
            let wrong = format!("page {page} holds {found:?} instead of {expected:?}");
            state.wrong.push(wrong);
        }
    }

    fn write(&self, page: u64, value: u8) {
        let mut state = self.0.state.lock();
        if state.stopped {
            return;
        }
        if let Some(place) = self.0.image.lock().get_mut(&page) {
            place.fill(value);
            state.written.insert(page, value);
            if let Some(save) = &mut state.save {
                save.dirty.insert(page);
            }
        }
    }

    /// What the guest has written, which pages it has given up, and what was wrong.
    pub fn story(&self) -> (BTreeMap<u64, u8>, HashSet<u64>, Vec<String>) {
        let state = self.0.state.lock();
        let mut wrong = state.wrong.clone();
        let twice = state.loads.iter().filter(|(_, loads)| **loads > 1);
        wrong.extend(twice.map(|(page, loads)| format!("page {page} was loaded {loads} times")));
        (state.written.clone(), state.given_up.clone(), wrong)
    }

    /// Pages that are out, whether paging is off, and whether the guest is held still.
    pub fn condition(&self) -> (usize, bool, bool) {
        let state = self.0.state.lock();
        (state.evicted.len(), state.off || !state.enabled, state.paused > 0)
    }

    /// xl's helper fills a page. One that is out would hold it up for ever.
    pub fn filled(&self, page: u64) {
        let mut state = self.0.state.lock();
        if state.evicted.contains(&page) {
            state.wrong.push(format!("xl was given page {page}, which is out"));
        }
    }

    /// How many pages were put back while the stream came.
    pub fn came_back(&self) -> u64 {
        self.0.state.lock().came_back
    }

    pub fn is_gone(&self) -> bool {
        self.0.state.lock().gone
    }

    /// Somebody destroys the guest once it is held still.
    pub fn destroy_when_held_still(&self) {
        let guest = self.clone();
        thread::spawn(move || {
            let mut state = guest.0.state.lock();
            while state.paused == 0 && !state.off {
                // Whatever wakes it, it looks again.
                let _ = guest.0.changed.wait_for(&mut state, Duration::from_millis(100));
            }
            state.gone = !state.off;
            drop(state);
            guest.0.changed.notify_all();
        });
    }
}

impl GuestPaging for Paged {
    fn enable(&mut self) -> Result<(), FrameError> {
        let mut state = self.0.state.lock();
        if state.faults.no_paging {
            return Err(FrameError::Xen("no paging here".into()));
        }
        state.enabled = true;
        Ok(())
    }

    fn enable_early(&mut self, source: &EarlyOut) -> Result<bool, FrameError> {
        let mut state = self.0.state.lock();
        assert!(source.bound() > 0);
        state.early_tries += 1;
        if state.early_tries < 2 {
            return Ok(false);
        }
        drop(state);
        self.enable()?;
        Ok(true)
    }

    fn secure(&mut self) -> Result<(), FrameError> {
        Ok(())
    }

    fn evict(&mut self, pfns: &[Pfn]) -> Result<Vec<bool>, FrameError> {
        let mut state = self.0.state.lock();
        if !state.enabled {
            state.wrong.push("a page was taken out, and paging is off".into());
        }
        let busy = state.faults.busy;
        let out = |pfn: &Pfn| busy == 0 || !pfn.get().is_multiple_of(busy);
        for pfn in pfns.iter().filter(|pfn| out(pfn)) {
            if !state.evicted.insert(pfn.get()) {
                state.wrong.push(format!("{pfn} was taken out twice"));
            }
            state.loads.remove(&pfn.get());
            self.0.image.lock().remove(&pfn.get());
        }
        Ok(pfns.iter().map(out).collect())
    }

    fn write(&mut self, pfn: Pfn, page: &[u8; PAGE_SIZE]) -> Result<(), FrameError> {
        let mut state = self.0.state.lock();
        if state.runs || state.evicted.contains(&pfn.get()) {
            state.wrong.push(format!("{pfn} was written to"));
        }
        self.0.image.lock().insert(pfn.get(), page.to_vec());
        Ok(())
    }

    fn load(&mut self, pfn: Pfn, page: &[u8; PAGE_SIZE]) -> Result<(), FrameError> {
        let mut state = self.0.state.lock();
        if state.gone {
            return Err(FrameError::Xen("there is no such domain".into()));
        }
        state.came += u64::from(state.runs);
        if state.faults.fails_at == Some(state.came) {
            state.faults.fails_at = None;
            return Err(FrameError::Xen("no memory for now".into()));
        }
        // One that is there is left alone.
        if state.evicted.remove(&pfn.get()) {
            state.came_back += u64::from(!state.sealed);
            self.0.image.lock().insert(pfn.get(), page.to_vec());
            *state.loads.entry(pfn.get()).or_default() += 1;
        }
        self.0.changed.notify_all();
        Ok(())
    }

    fn mark_dirty(&mut self, pfns: &[Pfn]) -> Result<(), FrameError> {
        let mut state = self.0.state.lock();
        if pfns.iter().any(|pfn| state.evicted.contains(&pfn.get())) {
            state.wrong.push("a page was marked that is not there".into());
        }
        if let Some(save) = &mut state.save {
            save.dirty.extend(pfns.iter().map(|pfn| pfn.get()));
        }
        Ok(())
    }

    fn saving(&mut self) -> Result<Saving, FrameError> {
        let mut state = self.0.state.lock();
        let seen = state.saving;
        if seen == Saving::Asks {
            state.saving = Saving::No;
        }
        Ok(seen)
    }

    fn notices(&mut self) -> Result<Box<dyn Notices>, FrameError> {
        self.0.state.lock().sealed = true;
        Ok(Box::new(self.clone()))
    }

    fn requests(&mut self) -> Result<Vec<PageRequest>, FrameError> {
        Ok(self.0.state.lock().requests.drain(..).collect())
    }

    fn answer(&mut self, token: u64) -> Result<(), FrameError> {
        let mut state = self.0.state.lock();
        if state.gone {
            return Err(FrameError::Xen("there is no such domain".into()));
        }
        state.answered.insert(token);
        drop(state);
        self.0.changed.notify_all();
        Ok(())
    }

    fn guest_exists(&mut self) -> Result<bool, FrameError> {
        Ok(!self.0.state.lock().gone)
    }

    fn hold_still(&mut self, still: bool) -> Result<(), FrameError> {
        let mut state = self.0.state.lock();
        state.paused = if still {
            state.paused + 1
        } else {
            state.paused.saturating_sub(1)
        };
        drop(state);
        self.0.changed.notify_all();
        Ok(())
    }

    fn has_not_run(&mut self) -> Result<bool, FrameError> {
        Ok(!self.0.state.lock().runs)
    }

    fn disable(&mut self) -> Result<(), FrameError> {
        let mut state = self.0.state.lock();
        if !state.evicted.is_empty() && !state.gone {
            state.wrong.push("paging was turned off with pages out".into());
        }
        state.off = true;
        state.enabled = false;
        Ok(())
    }

    fn is_held(&mut self) -> Result<bool, FrameError> {
        Ok(self.0.state.lock().paused > 0)
    }

    fn take_over(&mut self) -> Result<(), FrameError> {
        let mut state = self.0.state.lock();
        if state.paused == 0 {
            state.wrong.push("it was taken over while it ran".into());
        }
        (state.enabled, state.off) = (true, false);
        // What was asked on the old ring is asked again.
        state.requests.clear();
        let tokens = state.tokens;
        state.answered.extend(0..tokens);
        drop(state);
        self.0.changed.notify_all();
        Ok(())
    }
}

impl Notices for Paged {
    fn wait(&mut self, patience: Duration) -> bool {
        let mut state = self.0.state.lock();
        if state.requests.is_empty() && state.saving != Saving::Asks {
            // Whatever wakes it, it looks.
            let _ = self.0.changed.wait_for(&mut state, patience);
        }
        !state.requests.is_empty()
    }
}
