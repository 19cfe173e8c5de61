//! One frame for equal pages of the guests of a group, copied by Xen when one of them writes.
//!
//! The scanner of the index ([`crate::index`]) reads and hashes the pages; what it has seen comes here
//! ([`Sharing::visit`]). A page that had one content in two visits ([`history`]) and has a partner joins or begins a row of
//! the shared-page table ([`table`]) after its bytes were compared ([`visit`], [`engine`]). Once a second, or up to five where that takes long, guests and free memory are
//! looked at ([`Sharing::look`], [`reserve`]), processors go on that had no frame for a write ([`waiting`]), and pages go back to their guests where they shall ([`Sharing::work`]). A guest
//! whose migration has called ([`Sharing::hold`]), or whose memory xl is saving, is left alone meanwhile: not because
//! sharing would lose its writes (Xen marks a page dirty when it is copied), but because xl owns its memory then.
//!
//! The table is made from what is seen, and is true only as of then: a guest's write shows when the page is visited next.
//! After a restart it is empty, and pages that Xen shares are taken in as they are visited.
//!
//! Locks: the state's, then the host's; never the index's state while either is held.
mod engine;
mod history;
mod host;
mod reserve;
mod samples;
#[cfg(test)]
mod sim;
mod state;
mod sweep;
mod table;
#[cfg(test)]
mod tests;
mod visit;
mod waiting;

use std::fs::File;
use std::io::Read;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use parking_lot::Mutex;
use xenfold::control::{Absent, DedupPair, DedupStats, DedupStatus};
use xenfold::page::{ContentKey, PAGE_SIZE, Pfn};

pub(crate) use self::host::{GuestPage, MemShr, Nominated};
use self::state::State;
use self::sweep::Sweeps;
use crate::index::{Host, Identity, LeftOut, Seen};
use crate::membership::Membership;

/// Pairs of guests that the status has, those with the most pages first.
const MOST_PAIRS: usize = 1000;

/// The key of a page of zeros. Ids are never zero but by chance, and bytes are compared anyway.
pub const ZERO: u64 = 0;

/// A guest, and what it may be scanned for, or why not.
pub type Judged = (Seen, Result<(Identity, Membership), LeftOut>);

/// What the configuration says of sharing.
#[derive(Clone, Copy, Debug, Default)]
pub struct Settings {
    pub enabled: bool,
    pub reserve_bytes: u64,
}

/// A page as the scanner has just read it.
#[derive(Clone, Copy, Debug)]
pub struct Sighting {
    pub pfn: Pfn,
    /// The content's lookup key in the group, or [`ZERO`]; `None`: there is no frame.
    pub key: Option<u64>,
    /// A page that had the same content when it was last seen.
    pub partner: Option<GuestPage>,
}

/// One for the process.
pub struct Sharing {
    settings: Settings,
    /// For guests whose group has no key: contents are compared on this host only.
    key: ContentKey,
    /// Why nothing can be shared on this host.
    missing: Option<String>,
    enabled: AtomicBool,
    state: Arc<Mutex<State>>,
}

/// Keeps sharing away from a guest until dropped.
pub struct Hold {
    state: Arc<Mutex<State>>,
    uuid: String,
}

impl Sharing {
    /// What this host can. Where it cannot share, nothing is done, and the status says why.
    pub fn new(settings: Settings, host: &mut dyn Host) -> Sharing {
        let missing = host.probe().err();
        let key = random_key();
        let missing = missing.or_else(|| key.is_none().then(|| "/dev/urandom cannot be read".into()));
        match (&missing, settings.enabled) {
            (Some(reason), true) => log::error!("memory of guests cannot be shared: {reason}"),
            (None, true) => log::info!("equal pages of guests of a group are shared"),
            (_, false) => {}
        }
        let enabled = settings.enabled && missing.is_none();
        let mut state = State::new(enabled, settings.reserve_bytes);
        // Of a daemon before this one, which may have been killed.
        let left = host.memory().map_or(0, |memory| memory.shared);
        if missing.is_none() && !enabled && left > 0 {
            log::warn!("sharing is off, and {left} frames are shared by guests: their pages go back to them");
            state.unshare_all = true;
        }
        Sharing {
            settings,
            key: key.unwrap_or_else(|| ContentKey::new([0; 32])),
            missing,
            enabled: AtomicBool::new(enabled),
            state: Arc::new(Mutex::new(state)),
        }
    }

    /// Whether guests that share with nobody are of interest too: their own pages may be equal.
    pub fn enabled(&self) -> bool {
        self.enabled.load(Ordering::Relaxed)
    }

    pub fn key(&self) -> &ContentKey {
        &self.key
    }

    /// Begins, or ends and gives all pages back to their guests, as far as there is memory for it.
    /// Errors: this host cannot share.
    pub fn enable(&self, enable: bool) -> Result<(), String> {
        if let Some(reason) = self.missing.as_ref().filter(|_| enable) {
            return Err(reason.clone());
        }
        let mut state = self.state.lock();
        (state.enabled, state.unshare_all) = (enable, !enable);
        state.sweeps = Sweeps::default();
        self.enabled.store(enable, Ordering::Relaxed);
        Ok(())
    }

    /// Leaves a guest alone from the next step on.
    pub fn hold(&self, uuid: &str) -> Hold {
        let mut state = self.state.lock();
        *state.held.entry(uuid.to_owned()).or_default() += 1;
        Hold {
            state: self.state.clone(),
            uuid: uuid.to_owned(),
        }
    }

    /// What there is of guests, at each look of the scanner's.
    pub fn look(&self, host: &Mutex<Box<dyn Host>>, now: Duration, judged: &[Judged]) {
        let mut state = self.state.lock();
        if self.missing.is_none() && state.looks() {
            state.look(host, now, judged);
        }
    }

    /// Does a bit of what is due beside visits. True: there is more.
    pub fn work(&self, host: &Mutex<Box<dyn Host>>) -> bool {
        self.missing.is_none() && self.state.lock().work(host)
    }

    /// Takes pages of a guest that have just been read. Returns how many frames were nominated for it.
    pub fn visit(&self, host: &Mutex<Box<dyn Host>>, guest: &Identity, sightings: &[Sighting]) -> u64 {
        match self.missing {
            None => self.state.lock().visit(host, guest, sightings),
            Some(_) => 0,
        }
    }

    /// Whether pages of this guest are shared at this moment.
    pub fn may_share(&self, guest: &Identity) -> bool {
        self.missing.is_none() && self.state.lock().may_share(guest).is_some()
    }

    /// Shares pages of a guest that has just arrived. What they hold is known from its migration: not from a visit, and not
    /// from two. Returns how many of them have one frame with another page now.
    pub fn share_arrived(&self, host: &Mutex<Box<dyn Host>>, guest: &Identity, arrived: &[Sighting]) -> u64 {
        match self.missing {
            None => self.state.lock().share_arrived(host, guest, arrived),
            Some(_) => 0,
        }
    }

    /// For the status, with what Xen counts at this moment.
    pub fn status(&self, host: &Mutex<Box<dyn Host>>, now: Duration) -> DedupStatus {
        if let Some(reason) = &self.missing {
            return DedupStatus::Absent(Absent {
                failed: self.settings.enabled,
                reason: reason.clone(),
            });
        }
        let state = self.state.lock();
        let memory = host.lock().memory().ok().or(state.memory).unwrap_or_default();
        let page_bytes = PAGE_SIZE as u64;
        let name = |domid: xen_sys::DomId| domid.get();
        let mut pairs: Vec<_> = state.table.pairs().into_iter().collect();
        pairs.sort_by_key(|(domids, pages)| (std::cmp::Reverse(*pages), *domids));
        pairs.truncate(MOST_PAIRS);
        DedupStatus::Running(Box::new(DedupStats {
            enabled: state.enabled,
            returning: state.unshare_all,
            swept_frames: state.sweeps.frames,
            pages: state.table.pages(),
            frames: state.table.frames(),
            saved_pages: state.table.saved(),
            xen_saved_pages: memory.saved,
            xen_frames: memory.shared,
            free_bytes: memory.free.saturating_mul(page_bytes),
            reserve_bytes: self.settings.reserve_bytes,
            short: state.reserve.is_short(),
            history_bytes: state.history_bytes(),
            shared: state.counts.shared,
            broken: state.counts.broken,
            changed: state.counts.changed,
            refused: state.counts.refused,
            unshared: state.counts.unshared,
            stood: state.counts.stood,
            standing: state.standing(),
            breaks_per_s: state.breaks_per_s,
            // Whoever keeps the list of arrivals adds these.
            arrived: 0,
            arrived_shared: 0,
            arrived_waiting: 0,
            arrival_ms: None,
            arrival_waited_ms: None,
            guests: state.guests(),
            pairs: pairs
                .into_iter()
                .map(|((a, b), pages)| DedupPair {
                    domids: [name(a), name(b)],
                    pages,
                })
                .collect(),
            samples: state.samples.at(now),
        }))
    }
}

impl Drop for Hold {
    fn drop(&mut self) {
        let mut state = self.state.lock();
        if let Some(count) = state.held.get_mut(&self.uuid) {
            *count = count.saturating_sub(1);
            if *count == 0 {
                state.held.remove(&self.uuid);
            }
        }
    }
}

fn random_key() -> Option<ContentKey> {
    let mut bytes = [0; 32];
    File::open("/dev/urandom")
        .and_then(|mut file| file.read_exact(&mut bytes))
        .ok()?;
    Some(ContentKey::new(bytes))
}
