//! Guests' processors that stand still because the host had no frame for a shared page that they wrote to. Each goes on when
//! its page has become its guest's own; until then it is tried again at each look. Without this Xen would crash the guest.
use xen_sys::{DomId, UnshareFailure};
use xenfold::engine::chain;
use xenfold::page::Pfn;

use super::host::GuestPage;
use super::state::{HostLock, State};

impl State {
    /// Hears which processors stand still, and lets those go on for whose pages there are frames by now.
    pub fn serve_waiting(&mut self, host: &HostLock) {
        let domids: Vec<DomId> = self.guests.keys().copied().collect();
        for domid in domids {
            self.hear(host, domid);
            let Some(guest) = self.guests.get_mut(&domid).filter(|guest| !guest.waiting.is_empty()) else {
                continue;
            };
            let waiting = std::mem::take(&mut guest.waiting);
            let still = self.let_go_on(host, domid, waiting);
            if let Some(guest) = self.guests.get_mut(&domid) {
                if still.is_empty() {
                    log::info!(
                        "guest {} goes on: there is memory for what it writes",
                        guest.identity.name
                    );
                }
                guest.waiting = still;
            }
            // Trying has failed once more, which Xen reports as well.
            self.hear(host, domid);
        }
    }

    fn hear(&mut self, host: &HostLock, domid: DomId) {
        // The host is let go before anything is answered.
        let failures = host.lock().failures(domid);
        for failure in failures {
            if !failure.paused {
                // Somebody else than the guest, who knows.
                self.answer(host, domid, &failure);
                continue;
            }
            self.counts.stood = self.counts.stood.saturating_add(1);
            if let Some(guest) = self.guests.get_mut(&domid) {
                if guest.waiting.is_empty() {
                    log::warn!(
                        "guest {} stands still: it writes to a shared page and the host has no free memory. It goes on by \
                         itself when there is some: xl mem-set DOMAIN SIZE or xl destroy DOMAIN frees it",
                        guest.identity.name
                    );
                }
                guest.waiting.push(failure);
            }
            self.reserve.ran_out();
        }
    }

    /// Returns those that still stand.
    fn let_go_on(&mut self, host: &HostLock, domid: DomId, waiting: Vec<UnshareFailure>) -> Vec<UnshareFailure> {
        let known: Vec<(Pfn, UnshareFailure)> = waiting
            .into_iter()
            .filter_map(|failure| Some((Pfn::new(failure.gfn)?, failure)))
            .collect();
        let pfns: Vec<Pfn> = known.iter().map(|(pfn, _)| *pfn).collect();
        let done = host.lock().unshare(domid, &pfns);
        let done = match done {
            Ok(done) => done,
            Err(error) => {
                log::debug!("pages of {domid} stay shared: {}", chain(&error));
                Vec::new()
            }
        };
        let mut still = Vec::new();
        for (at, (pfn, failure)) in known.into_iter().enumerate() {
            if !done.get(at).copied().unwrap_or(false) {
                still.push(failure);
                continue;
            }
            if let Some(page) = GuestPage::new(domid, pfn) {
                self.broke(page);
            }
            self.answer(host, domid, &failure);
        }
        still
    }

    fn answer(&self, host: &HostLock, domid: DomId, failure: &UnshareFailure) {
        if let Err(error) = host.lock().answer(domid, failure) {
            log::warn!(
                "a processor of {domid} stands still, and Xen does not let it go on: {}; restart xenfoldd",
                chain(&error)
            );
        }
    }

    /// Processors that stand still now.
    pub fn standing(&self) -> u64 {
        self.guests.values().map(|guest| guest.waiting.len() as u64).sum()
    }
}
