//! Room for new contents, and what goes when there is none: the bound is over all groups.
//!
//! What goes first: slack of other groups, contents that no image names (least recently used first), the oldest image
//! (its contents that no other image names then are the first kind), contents that a caller holds for an image to
//! come. Templates stay until they are removed. Nothing is weighed page by page: what many images name survives
//! because it takes as many evictions to make it unnamed.
use std::collections::BTreeMap;
use std::fs::File;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Weak};
use std::thread::{self, JoinHandle};

use parking_lot::Mutex;

use super::budget::Budget;
use super::core::{Core, PAGE_BYTES, chain};
use super::error::StoreError;
use super::slots::Slot;

/// At most so many contents go at once beyond what is needed: 64 MiB.
const BATCH_CONTENTS: u64 = 16_384;

/// Contents put in one epoch, the unit of age: 2^12.
const EPOCH_SHIFT: u32 = 12;

/// What all groups share.
pub(super) struct Shared {
    pub budget: Arc<Budget>,
    pub pack_slots: u32,
    cores: Mutex<Vec<Weak<Core>>>,
    /// Held while room is looked for, so that two puts do not both evict for the same bytes.
    space: Mutex<()>,
    /// Contents put since the store was opened.
    clock: AtomicU64,
    flush: Mutex<Option<JoinHandle<()>>>,
    /// Locked as long as it is open.
    _lock: File,
}

impl Shared {
    pub fn new(limit_bytes: u64, pack_slots: u32, lock: File) -> Shared {
        Shared {
            budget: Arc::new(Budget::new(limit_bytes)),
            pack_slots,
            cores: Mutex::default(),
            space: Mutex::default(),
            clock: AtomicU64::new(0),
            flush: Mutex::default(),
            _lock: lock,
        }
    }

    pub fn add(&self, core: &Arc<Core>) {
        self.cores.lock().push(Arc::downgrade(core));
    }

    /// Flushes a group on a thread of its own, so that no put waits for the disk. One at a time: while it runs,
    /// nothing happens, and the next put asks again.
    pub fn flush_aside(&self, core: &Arc<Core>) {
        let mut flush = self.flush.lock();
        if flush.as_ref().is_some_and(|running| !running.is_finished()) {
            return;
        }
        let core = core.clone();
        let work = move || {
            core.shared.make_room(0);
            // The contents are there; only a crash would lose them now.
            if let Err(error) = core.flush() {
                log::warn!("{}", chain(&error, "new contents are not in the index yet"));
            }
        };
        match thread::Builder::new().name("store flush".into()).spawn(work) {
            Ok(running) => *flush = Some(running),
            Err(error) => log::warn!("no thread to flush the store: {error}"),
        }
    }

    pub fn wait_for_flush(&self) {
        let running = self.flush.lock().take();
        if running.is_some_and(|running| running.join().is_err()) {
            log::error!("the thread that flushes the store panicked");
        }
    }

    fn cores(&self) -> Vec<Arc<Core>> {
        let mut cores = self.cores.lock();
        cores.retain(|core| core.strong_count() > 0);
        let alive = cores.iter().filter_map(Weak::upgrade);
        alive.filter(|core| !core.is_closed()).collect()
    }

    /// Stays at its last value after 2^28 contents (1 TiB): from then on age tells nothing until the next start.
    pub fn epoch(&self) -> u16 {
        u16::try_from(self.clock.load(Ordering::Relaxed) >> EPOCH_SHIFT).unwrap_or(u16::MAX)
    }

    pub fn tick(&self, contents: u64) {
        self.clock.fetch_add(contents, Ordering::Relaxed);
    }

    /// An epoch that nothing was put in so far.
    pub fn new_epoch(&self) -> u16 {
        self.tick(1 << EPOCH_SHIFT);
        self.epoch()
    }

    /// Takes slots for up to `wanted` contents, in ascending order; fewer when the bound does not allow more.
    pub fn reserve(&self, core: &Core, wanted: usize) -> Result<Vec<Slot>, StoreError> {
        let _space = self.space.lock();
        let mut slots = Vec::with_capacity(wanted);
        loop {
            {
                let mut state = core.state.write();
                if core.is_closed() {
                    return Err(StoreError::Closed(core.name.clone()));
                }
                state.take_slack(wanted - slots.len(), &mut slots);
                let before = slots.len();
                let granted = self.budget.charge_units((wanted - before) as u64, PAGE_BYTES);
                state.take_fresh(granted as usize, &mut slots);
                let unused = granted - (slots.len() - before) as u64;
                self.budget.refund(unused * PAGE_BYTES);
                if unused > 0 {
                    break;
                }
            }
            if slots.len() == wanted || !self.evict(Some(core), (wanted - slots.len()) as u64) {
                break;
            }
        }
        slots.sort_unstable();
        Ok(slots)
    }

    /// Makes room for so many bytes of index. False: there is none.
    pub fn make_room(&self, bytes: u64) -> bool {
        let _space = self.space.lock();
        loop {
            let missing = self.budget.missing_bytes(bytes);
            if missing == 0 {
                return true;
            }
            if !self.evict(None, missing.div_ceil(PAGE_BYTES)) {
                return false;
            }
        }
    }

    /// One step towards room for `pages` more pages: slack for `core`, or bytes for all. False: nothing is left that
    /// may go.
    fn evict(&self, core: Option<&Core>, pages: u64) -> bool {
        let cores = self.cores();
        let others = cores
            .iter()
            .filter(|other| core.is_none_or(|core| !std::ptr::eq(core, other.as_ref())));
        let mut left = pages;
        for other in others {
            left -= other.punch_slack(left).min(left);
        }
        if left < pages {
            return true;
        }
        let contents: u64 = cores.iter().map(|core| core.state.read().contents()).sum();
        let batch = pages.max((contents / 64).min(BATCH_CONTENTS));
        if drop_unnamed(&cores, batch, true) > 0 {
            return true;
        }
        drop_oldest_image(&cores) || drop_unnamed(&cores, batch, false) > 0
    }
}

fn drop_unnamed(cores: &[Arc<Core>], most: u64, respect_holds: bool) -> u64 {
    let before = |core: &Core| if respect_holds { core.held_from() } else { u32::MAX };
    let mut by_epoch = BTreeMap::new();
    for core in cores {
        core.state.read().count_unnamed(before(core), &mut by_epoch);
    }
    let mut sum = 0u64;
    let reached = by_epoch.iter().find(|(_, contents)| {
        sum += **contents;
        sum >= most
    });
    let Some(last) = reached
        .or(by_epoch.last_key_value())
        .map(|(epoch, _)| u32::from(*epoch))
    else {
        return 0;
    };
    let mut dropped = 0;
    // All that is older first, then of the epoch in question what is still needed.
    for bound in [last, last + 1] {
        for core in cores {
            let bound = bound.min(before(core));
            dropped += core.state.write().remove_unnamed(bound, most - dropped);
            if dropped >= most {
                return dropped;
            }
        }
    }
    dropped
}

fn drop_oldest_image(cores: &[Arc<Core>]) -> bool {
    let mut oldest: Option<(u64, &Arc<Core>, String)> = None;
    for core in cores {
        for (key, head) in core.images.lock().iter().filter(|(_, head)| !head.template) {
            if oldest.as_ref().is_none_or(|(saved, _, _)| head.saved_unix_s < *saved) {
                oldest = Some((head.saved_unix_s, core, key.clone()));
            }
        }
    }
    let Some((_, core, key)) = oldest else { return false };
    log::info!("{}: the image {key} is dropped to make room", core.folder.display());
    if let Err(error) = core.remove_image(&key) {
        log::warn!("{}", chain(&error, "its index did not take that"));
        core.forget_image(&key);
    }
    true
}
