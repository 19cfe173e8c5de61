//! What sharing knows: its guests, the table, the figures; and which pages go back to their guests.
use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::time::Duration;

use parking_lot::Mutex;
use xen_sys::{DomId, HostMemory, ShareHandle, SharingError, UnshareFailure};
use xenfold::control::{DedupGuest, DedupSample};
use xenfold::engine::chain;

use super::Judged;
use super::history::History;
use super::host::GuestPage;
use super::reserve::Reserve;
use super::samples::Samples;
use super::sweep::Sweeps;
use super::table::{GroupNo, SharedTable};
use crate::index::{Host, Identity, LeftOut};

/// Pages that are made their guests' own at a time.
const UNSHARE_AT_ONCE: usize = 256;

/// With so many free frames no processor of a guest finds none when it tries again.
const ENOUGH_FRAMES: u64 = 1024;

/// What is counted since the daemon started.
#[derive(Clone, Copy, Debug, Default)]
pub struct Counts {
    /// Pages that got another one's frame.
    pub shared: u64,
    /// Pages that were written to after that, as far as it was noticed.
    pub broken: u64,
    /// Pages that were written to between being seen and being shared.
    pub changed: u64,
    /// Pages that Xen did not share.
    pub refused: u64,
    /// Pages that were made their guests' own on purpose.
    pub unshared: u64,
    /// Processors that stood still for want of a frame.
    pub stood: u64,
}

pub struct Guest {
    pub identity: Identity,
    pub group: GroupNo,
    pub history: History,
    /// Why nothing of it is shared at the moment.
    refused: Option<String>,
    /// It is sent, saved or received.
    held: bool,
    /// Its pages go back to it: it is in this group no more.
    pub leaving: bool,
    /// Processors that stand still for want of a frame.
    pub waiting: Vec<UnshareFailure>,
}

impl Guest {
    pub fn takes_part(&self) -> bool {
        !self.held && !self.leaving && self.refused.is_none()
    }
}

pub struct State {
    pub enabled: bool,
    /// Everything goes back to the guests.
    pub unshare_all: bool,
    groups: Vec<String>,
    pub guests: BTreeMap<DomId, Guest>,
    pub table: SharedTable,
    pub counts: Counts,
    pub reserve: Reserve,
    pub memory: Option<HostMemory>,
    pub samples: Samples,
    /// A page of zeros that stays and has no partner yet, for each group.
    pub zeros: HashMap<GroupNo, GuestPage>,
    /// Guests by uuid whose migration has called, and how often.
    pub held: BTreeMap<String, u64>,
    /// Guests that xl was sending or saving at the last look.
    departing: BTreeSet<DomId>,
    /// The least stable pages, which go back while memory is short.
    returning: Vec<GuestPage>,
    pub sweeps: Sweeps,
    /// Nothing can be given back before the next look.
    waiting: bool,
    pub breaks_per_s: u64,
    /// The last handle that Xen gave out, once it is known.
    pub newest_handle: Option<ShareHandle>,
    looked: Option<(Duration, u64)>,
}

pub type HostLock = Mutex<Box<dyn Host>>;

impl State {
    pub fn new(enabled: bool, reserve_bytes: u64) -> State {
        State {
            enabled,
            unshare_all: false,
            groups: Vec::new(),
            guests: BTreeMap::new(),
            table: SharedTable::default(),
            counts: Counts::default(),
            reserve: Reserve::new(reserve_bytes),
            memory: None,
            samples: Samples::default(),
            zeros: HashMap::new(),
            held: BTreeMap::new(),
            departing: BTreeSet::new(),
            returning: Vec::new(),
            sweeps: Sweeps::default(),
            waiting: false,
            breaks_per_s: 0,
            newest_handle: None,
            looked: None,
        }
    }

    fn group_no(&mut self, name: &str) -> GroupNo {
        let found = self.groups.iter().position(|group| group == name);
        let no = found.unwrap_or_else(|| {
            self.groups.push(name.to_owned());
            self.groups.len() - 1
        });
        GroupNo::try_from(no).unwrap_or(GroupNo::MAX)
    }

    /// Whether guests are of interest.
    pub fn looks(&self) -> bool {
        self.enabled || self.unshare_all || !self.guests.is_empty()
    }

    pub fn is_held(&self, domid: DomId, uuid: &str) -> bool {
        self.departing.contains(&domid) || self.held.contains_key(uuid)
    }

    pub fn history_bytes(&self) -> u64 {
        self.guests.values().map(|guest| guest.history.bytes()).sum()
    }

    /// Takes what there is of guests and memory, at each look of the scanner's.
    pub fn look(&mut self, host: &HostLock, now: Duration, judged: &[Judged]) {
        self.departing = host.lock().departing().into_iter().collect();
        self.part_from_others(host, judged);
        for (seen, verdict) in judged {
            match verdict {
                Ok((identity, membership)) => self.welcome(host, identity, &membership.group),
                Err(reason) => self.left_out(seen.info.domid, reason),
            }
        }
        for (domid, guest) in &mut self.guests {
            guest.held = self.departing.contains(domid) || self.held.contains_key(&guest.identity.uuid);
        }
        self.serve_waiting(host);
        self.plan_sweeps(judged);
        self.waiting = false;
        self.look_at_memory(host, now);
        let broken = self.counts.broken;
        if let Some((then, before)) = self.looked {
            let seconds = now.saturating_sub(then).as_secs_f64();
            if seconds > 0.0 {
                self.breaks_per_s = (broken.saturating_sub(before) as f64 / seconds).round() as u64;
            }
        }
        self.looked = Some((now, broken));
        self.samples.take(now, || DedupSample {
            age_s: 0,
            pages: self.table.pages(),
            saved_pages: self.table.saved(),
            broken,
        });
    }

    /// Guests that ended, or whose number is another one's by now: Xen has let their frames go.
    fn part_from_others(&mut self, host: &HostLock, judged: &[Judged]) {
        let there = |domid: DomId, uuid: &str| {
            let mut seen = judged.iter().map(|(seen, _)| seen);
            seen.any(|seen| seen.info.domid == domid && seen.uuid() == uuid && !seen.info.dying)
        };
        let gone = self
            .guests
            .iter()
            .filter(|(domid, guest)| !there(**domid, &guest.identity.uuid));
        let gone: Vec<DomId> = gone.map(|(domid, _)| *domid).collect();
        for domid in gone {
            self.guests.remove(&domid);
            host.lock().forget(domid);
            let pages = self.table.forget(domid);
            log::debug!("{domid} is gone, and {pages} shared pages with it");
        }
    }

    fn welcome(&mut self, host: &HostLock, identity: &Identity, group: &str) {
        let group = self.group_no(group);
        let enabled = self.enabled;
        if let Some(guest) = self.guests.get_mut(&identity.domid) {
            guest.identity = identity.clone();
            if guest.group == group {
                guest.leaving = false;
            } else if self.table.pages_of(identity.domid) > 0 {
                // What it shares with the group that it was in goes back first.
                guest.leaving = true;
            } else {
                (guest.group, guest.leaving) = (group, false);
            }
            return;
        }
        // Nothing of one that arrives or leaves is touched.
        if !enabled || self.is_held(identity.domid, &identity.uuid) {
            return;
        }
        let refused = match self.begin(host, identity.domid) {
            Ok(()) => None,
            // It may still be arriving.
            Err(SharingError::HasPager) => return,
            Err(error) => Some(chain(&error)),
        };
        if let Some(reason) = &refused {
            log::info!("nothing of guest {} is shared: {reason}", identity.name);
        }
        let guest = Guest {
            identity: identity.clone(),
            group,
            history: History::default(),
            refused,
            held: false,
            leaving: false,
            waiting: Vec::new(),
        };
        self.guests.insert(identity.domid, guest);
    }

    /// Frames of the guest may be shared, and it is heard when there is none for a write.
    fn begin(&self, host: &HostLock, domid: DomId) -> Result<(), SharingError> {
        let mut host = host.lock();
        host.enable(domid)?;
        // Unless there is memory for all that processors may be waiting for.
        let hold = !host.memory().is_ok_and(|memory| memory.free > ENOUGH_FRAMES);
        host.listen(domid, hold)
    }

    fn left_out(&mut self, domid: DomId, reason: &LeftOut) {
        let Some(guest) = self.guests.get_mut(&domid) else {
            return;
        };
        match reason {
            // The guest itself is as it was, and comes back or ends.
            LeftOut::Pv
            | LeftOut::Dying
            | LeftOut::Shutdown
            | LeftOut::Incoming
            | LeftOut::Away
            | LeftOut::Building
            | LeftOut::Paged
            | LeftOut::OnDemand => {}
            LeftOut::Unnamed | LeftOut::Configured | LeftOut::Alone | LeftOut::NoKey | LeftOut::NoGroup(_) => {
                guest.leaving = true;
            }
        }
    }

    fn look_at_memory(&mut self, host: &HostLock, now: Duration) {
        let was = self.reserve.is_short();
        match host.lock().memory() {
            Ok(memory) => {
                self.reserve.look(&memory);
                self.memory = Some(memory);
            }
            Err(error) => {
                log::debug!(
                    "the host's memory is not known at {} s: {}",
                    now.as_secs(),
                    chain(&error)
                );
                self.reserve.ran_out();
            }
        }
        let short = self.reserve.is_short();
        if short != was {
            match short {
                true => log::warn!("free memory is below sharing_reserve: nothing further is shared"),
                false => log::info!("free memory is above sharing_reserve again"),
            }
        }
        self.returning.clear();
        if short && self.enabled {
            let mut pages: Vec<((u32, u32), GuestPage)> = self
                .table
                .all_pages()
                .filter_map(|page| {
                    let guest = self.guests.get(&page.domid).filter(|guest| guest.takes_part())?;
                    Some((guest.history.stability(page.number()), page))
                })
                .collect();
            let count = pages.len().min(UNSHARE_AT_ONCE);
            if count < pages.len() {
                pages.select_nth_unstable(count);
            }
            self.returning = pages.into_iter().take(count).map(|(_, page)| page).collect();
        }
    }

    /// Gives pages back that shall be, a few at a time. True: there is more to do at once.
    pub fn work(&mut self, host: &HostLock) -> bool {
        if self.waiting {
            return false;
        }
        let pages = self.due_back();
        if pages.is_empty() {
            // Those of guests that are held come later.
            self.unshare_all &= self.table.pages() > 0 || !self.sweeps.done();
            if !self.unshare_all {
                self.waiting = true;
                return false;
            }
        }
        let memory = host.lock().memory();
        let allowed = memory.map_or(0, |memory| {
            self.memory = Some(memory);
            self.reserve.may_unshare(&memory)
        });
        if pages.is_empty() {
            let more = self.sweep(host, allowed);
            self.waiting = !more;
            return more;
        }
        let allowed = usize::try_from(allowed).unwrap_or(usize::MAX);
        let count = pages.len().min(allowed);
        let done = self.unshare(host, pages.get(..count).unwrap_or(&pages));
        self.waiting = done == 0;
        done > 0
    }

    /// Whether the table has pages of guests that may be touched.
    pub fn knows_pages_to_give_back(&self) -> bool {
        let held = |page: &GuestPage| self.guests.get(&page.domid).is_none_or(|guest| guest.held);
        !self.table.all_pages().all(|page| held(&page))
    }

    fn due_back(&mut self) -> Vec<GuestPage> {
        let guests = &self.guests;
        let everything = self.unshare_all;
        let wanted = |page: &GuestPage| {
            let guest = guests.get(&page.domid);
            guest.is_some_and(|guest| !guest.held && (everything || guest.leaving))
        };
        if everything || guests.values().any(|guest| guest.leaving) {
            let pages: Vec<GuestPage> = self.table.all_pages().filter(wanted).take(UNSHARE_AT_ONCE).collect();
            if !pages.is_empty() {
                return pages;
            }
        }
        std::mem::take(&mut self.returning)
    }

    /// Returns how many pages are their guest's own now.
    fn unshare(&mut self, host: &HostLock, pages: &[GuestPage]) -> u64 {
        let mut by_guest: BTreeMap<DomId, Vec<GuestPage>> = BTreeMap::new();
        for page in pages {
            by_guest.entry(page.domid).or_default().push(*page);
            // Of a row that has one page left that page needs no frame to be its guest's own.
            if let Some(row) = self.table.find(*page).and_then(|row| self.table.row(row))
                && let [a, b] = row.pages.as_slice()
            {
                let other = if a == page { *b } else { *a };
                if self.guests.get(&other.domid).is_some_and(|guest| !guest.held) {
                    by_guest.entry(other.domid).or_default().push(other);
                }
            }
        }
        let mut all = 0u64;
        for (domid, pages) in by_guest {
            let pfns: Vec<_> = pages.iter().map(|page| page.pfn()).collect();
            match host.lock().unshare(domid, &pfns) {
                Ok(done) => {
                    for (page, _) in pages.iter().zip(done).filter(|(_, done)| *done) {
                        all += u64::from(self.table.remove(*page));
                    }
                }
                Err(error) => log::debug!("pages of {domid} stay shared: {}", chain(&error)),
            }
        }
        self.counts.unshared = self.counts.unshared.saturating_add(all);
        all
    }

    /// For the status.
    pub fn guests(&self) -> Vec<DedupGuest> {
        let guests = self.guests.values().map(|guest| {
            let domid = guest.identity.domid;
            let held = guest.held.then(|| "is being migrated or saved".to_owned());
            let leaving = guest
                .leaving
                .then(|| "has left its group: its pages go back to it".to_owned());
            DedupGuest {
                domid: domid.get(),
                name: guest.identity.name.clone(),
                group: self.groups.get(guest.group as usize).cloned().unwrap_or_default(),
                shared_pages: self.table.pages_of(domid),
                left_out: guest.refused.clone().or(held).or(leaving),
            }
        });
        guests.collect()
    }
}
