//! Giving back what the table does not know: pages that a daemon before this one shared, when nothing shall be shared any
//! more. Every frame of a guest is mapped writable once, which leaves those that are not shared as they are.
use xen_sys::DomId;
use xenfold::engine::chain;
use xenfold::page::Pfn;

use super::Judged;
use super::state::{HostLock, State};
use crate::index::LeftOut;

/// Frames at a time.
const AT_ONCE: u64 = 1024;

/// Guests that are still to be gone through.
#[derive(Default)]
pub struct Sweeps {
    /// Each guest of this host was asked for pages that the table does not know.
    asked: bool,
    /// And the next frame of each that has some.
    left: Vec<(DomId, u64)>,
    /// Gone through so far.
    pub frames: u64,
}

impl Sweeps {
    pub fn done(&self) -> bool {
        self.asked && self.left.is_empty()
    }
}

impl State {
    /// Takes up guests of which Xen shares more than the table knows. Not before the table's pages have gone back: some of
    /// them were written to since they were last seen, and would pass for others that Xen still shares.
    pub fn plan_sweeps(&mut self, judged: &[Judged]) {
        if !self.unshare_all || self.sweeps.asked || self.knows_pages_to_give_back() {
            return;
        }
        self.sweeps.asked = true;
        for (seen, verdict) in judged {
            // Its memory may be touched: who is left out for another reason was found readable first.
            let readable = matches!(
                verdict,
                Ok(_) | Err(LeftOut::Alone | LeftOut::NoKey | LeftOut::Configured | LeftOut::NoGroup(_))
            );
            let domid = seen.info.domid;
            if readable && !self.is_held(domid, &seen.uuid()) && seen.info.shared_pages > self.table.pages_of(domid) {
                self.sweeps.left.push((domid, 0));
            }
        }
    }

    /// Goes on with one guest. `allowed`: the frames that this may take. True: there is more to do.
    pub fn sweep(&mut self, host: &HostLock, allowed: u64) -> bool {
        let Some((domid, next)) = self.sweeps.left.last().copied() else {
            return false;
        };
        let count = AT_ONCE.min(allowed);
        if count == 0 {
            return false;
        }
        let mut host = host.lock();
        let end = host.end_of_frames(domid).unwrap_or(0);
        let last = end.min(next.saturating_add(count));
        let pfns: Vec<Pfn> = (next..last).filter_map(Pfn::new).collect();
        let swept = match pfns.is_empty() {
            true => Err(None),
            false => host.unshare(domid, &pfns).map_err(Some),
        };
        match swept {
            // What there was no memory for is tried again.
            Ok(done) => {
                let done = done.iter().take_while(|done| **done).count() as u64;
                if let Some((_, next)) = self.sweeps.left.last_mut() {
                    *next = next.saturating_add(done);
                }
                self.sweeps.frames = self.sweeps.frames.saturating_add(done);
                done > 0
            }
            Err(error) => {
                if let Some(error) = error {
                    log::debug!("pages of {domid} stay shared: {}", chain(&error));
                }
                self.sweeps.left.pop();
                true
            }
        }
    }
}
