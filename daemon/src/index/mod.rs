//! Contents that running guests have: which page of which guest of this host has which content.
//!
//! A hint, kept in memory only. One thread goes round the guests ([`Scanner::step`]), reads their frames in batches and
//! hashes them with their group's key, as fast as [`pace`] allows. [`Index::read`] answers for a content: the frame is
//! read and hashed again at that moment, and one that is something else by now is forgotten. Guests that nobody could ask
//! about, or whose memory must not be touched, are left out ([`host::LeftOut`]).
//!
//! Contents of different groups never mix: each group has a table of its own, found by the group's name *and* key; a
//! frame is believed to be a guest's only when that guest was there under the same name before and after it was copied.
//! What a guest that has just arrived has in common with others is shared before any round ([`arrivals`]).
//! Everything but `xen` runs without Xen.
mod arrivals;
mod changes;
mod helpers;
mod host;
mod pace;
mod scanner;
#[cfg(test)]
pub(crate) mod sim;
mod state;
mod table;
#[cfg(test)]
mod tests;
mod xen;

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use parking_lot::Mutex;
use xenfold::config::{Config, Patterns};
use xenfold::control::{Absent, DedupStatus, IndexStats, IndexStatus};
use xenfold::engine::chain;
use xenfold::page::{ContentId, PAGE_SIZE, Pfn};
use xenfold::page_set::PageSet;

use self::arrivals::Arrivals;
pub(crate) use self::host::{Host, Identity, LeftOut, Page, Seen, read_of};
pub(crate) use self::scanner::Scanner;
use self::state::State;
use self::xen::XenHost;
use crate::membership::{Members, Membership, canonical};
use crate::sharing::{self, Sharing};

/// Pages that are mapped at a time, whoever reads; one lock over the host sees to it.
const BATCH_PAGES: usize = 1024;

/// The longest that the thread sleeps: how late it may be to notice that it shall end.
const LONGEST_SLEEP: Duration = Duration::from_secs(1);

/// The nice value of the thread: guests' backends in dom0 go first.
const NICE: i32 = 19;

/// What the configuration says of the index.
pub(crate) struct Settings {
    pub(crate) limit_bytes: u64,
    pub(crate) rate_pages_per_s: u32,
    pub(crate) processor_percent: u32,
    pub(crate) off: Patterns,
    pub(crate) sharing: sharing::Settings,
}

/// One for the process.
pub struct Index {
    /// Locked after `state` was let go, never while it is held.
    host: Mutex<Box<dyn Host>>,
    members: Arc<Members>,
    settings: Settings,
    state: Mutex<State>,
    /// What is done with what the scanner sees, beside remembering it.
    sharing: Sharing,
    /// Guests, by uuid, that shall be gone through before all others.
    urgent: Mutex<Vec<String>>,
    /// Pages of guests that have arrived and are to be shared. Locked for a moment, without the others.
    arrivals: Mutex<Arrivals>,
    began: Instant,
    ended: AtomicBool,
}

impl Index {
    /// An index of the guests of `host`, with a thread that goes round them. Errors: why there is none.
    pub(crate) fn open(
        config: &Config,
        members: &Arc<Members>,
        host: impl FnOnce() -> Result<Box<dyn Host>, Absent>,
    ) -> Result<Arc<Index>, Absent> {
        if !config.index {
            return Err(absent(false, "index is false".into()));
        }
        if config.index_size.bytes() == 0 {
            return Err(absent(false, "index_size is 0".into()));
        }
        let settings = Settings {
            limit_bytes: config.index_size.bytes(),
            rate_pages_per_s: config.index_rate,
            processor_percent: config.index_processor,
            off: config.index_off.clone(),
            sharing: sharing::Settings {
                enabled: config.sharing,
                reserve_bytes: config.sharing_reserve.bytes(),
            },
        };
        let index = Index::new(host()?, members.clone(), settings);
        let started = index.start();
        started.map_err(|error| absent(true, format!("no thread can be made: {error}")))?;
        Ok(index)
    }

    pub(crate) fn new(mut host: Box<dyn Host>, members: Arc<Members>, settings: Settings) -> Arc<Index> {
        Arc::new(Index {
            sharing: Sharing::new(settings.sharing, host.as_mut()),
            urgent: Mutex::default(),
            arrivals: Mutex::default(),
            host: Mutex::new(host),
            members,
            state: Mutex::new(State::new(settings.limit_bytes)),
            settings,
            began: Instant::now(),
            ended: AtomicBool::new(false),
        })
    }

    /// Starts the thread that goes round the guests, until [`Index::end`].
    fn start(self: &Arc<Self>) -> std::io::Result<()> {
        let index = self.clone();
        let scan = move || {
            // On Linux this is for the calling thread alone.
            if let Err(error) = rustix::process::setpriority_process(None, NICE) {
                log::debug!("the index runs at the daemon's own priority: {error}");
            }
            let mut scanner = Scanner::new(index.clone());
            while !index.ended.load(Ordering::Relaxed) {
                let wait = scanner.step(index.began.elapsed());
                if !wait.is_zero() {
                    thread::sleep(wait.min(LONGEST_SLEEP));
                }
            }
        };
        thread::Builder::new().name("index".into()).spawn(scan).map(drop)
    }

    pub(crate) fn end(&self) {
        self.ended.store(true, Ordering::Relaxed);
    }

    /// The lookup keys of what other guests of the asking guest's group had when they were last looked at. A guest is no
    /// answer to itself: at the source of its migration its memory is about to go.
    pub(crate) fn lookup_keys(&self, asking: &Membership) -> Vec<u64> {
        self.state.lock().lookup_keys(asking)
    }

    /// Contents that other guests of the asking guest's group have at this moment, each hashed with the group's key.
    pub(crate) fn read(&self, asking: &Membership, ids: &[ContentId]) -> Vec<Option<Box<[u8]>>> {
        let mut found = Vec::new();
        found.resize_with(ids.len(), || None);
        let by_guest = self.state.lock().places(asking, ids);
        for (guest, places) in by_guest {
            for places in places.chunks(BATCH_PAGES) {
                let pfns: Vec<Pfn> = places.iter().map(|(_, place)| place.pfn()).collect();
                let mut pages: Vec<Page> = vec![[0; PAGE_SIZE]; pfns.len()];
                let read = read_of(self.host.lock().as_mut(), &guest, &pfns, &mut pages);
                // Gone, suspended or renamed: the next look at all guests takes it off the list.
                let Ok(Some(read)) = read else { break };
                for (((at, place), page), read) in places.iter().zip(&pages).zip(read) {
                    let (Some(id), Some(found)) = (ids.get(*at), found.get_mut(*at)) else {
                        continue;
                    };
                    let same = read && asking.key.id(page) == *id;
                    self.state.lock().answered(asking, id.lookup_key(), *place, same);
                    if same {
                        *found = Some(page.as_slice().into());
                    }
                }
            }
        }
        found
    }

    pub(crate) fn sharing(&self) -> &Sharing {
        &self.sharing
    }

    pub(crate) fn dedup_status(&self) -> DedupStatus {
        let mut status = self.sharing.status(&self.host, self.began.elapsed());
        if let DedupStatus::Running(stats) = &mut status {
            self.arrivals.lock().tell(stats);
        }
        status
    }

    /// Goes through a guest twice as soon as it can, at no rate. False: it is none that is indexed.
    pub(crate) fn scan_now(&self, uuid: &str) -> bool {
        let Some(uuid) = canonical(uuid) else { return false };
        let known = self.state.lock().guests().any(|(_, guest)| guest.identity.uuid == uuid);
        if known {
            self.urgent.lock().push(uuid);
        }
        known
    }

    /// Which pages of a guest change, below a bound. `None`: it is not indexed, or was not gone through twice.
    pub(crate) fn changing(&self, uuid: &str, bound: u64) -> Option<PageSet> {
        self.state.lock().changing(&canonical(uuid)?, bound)
    }

    pub(crate) fn stats(&self) -> IndexStats {
        self.stats_at(self.began.elapsed())
    }

    fn stats_at(&self, now: Duration) -> IndexStats {
        IndexStats {
            limit_bytes: self.settings.limit_bytes,
            rate_limit_pages_per_s: u64::from(self.settings.rate_pages_per_s),
            ..self.state.lock().stats(now)
        }
    }
}

fn absent(failed: bool, reason: String) -> Absent {
    Absent { failed, reason }
}

/// This host. Errors: there is no Xen, or its libraries fail.
pub(crate) fn this_host() -> Result<Box<dyn Host>, Absent> {
    if xen_sys::running_version().is_none() {
        return Err(absent(false, "there is no Xen on this machine".into()));
    }
    match XenHost::open() {
        Ok(host) => Ok(Box::new(host)),
        Err(error) => Err(absent(true, chain(&error))),
    }
}

/// Says in the log what there is, and what not.
pub(crate) fn announce(index: &Result<Arc<Index>, Absent>) {
    match index {
        Ok(index) => log::info!(
            "contents of running guests are looked up, at most {} pages a second",
            index.settings.rate_pages_per_s
        ),
        Err(Absent { failed: false, reason }) => log::info!("contents of running guests are not looked up: {reason}"),
        Err(Absent { reason, .. }) => log::error!("contents of running guests cannot be looked up: {reason}"),
    }
}

/// For the status.
pub(crate) fn status(index: &Result<Arc<Index>, Absent>) -> IndexStatus {
    match index {
        Ok(index) => IndexStatus::Running(index.stats()),
        Err(absent) => IndexStatus::Absent(absent.clone()),
    }
}
