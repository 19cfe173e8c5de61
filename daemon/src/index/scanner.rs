//! The rounds: all guests again and again, each from its first frame to its last.
use std::collections::VecDeque;
use std::sync::Arc;
use std::time::Duration;

use xenfold::engine::{chain, thread_cpu};
use xenfold::page::{PAGE_SIZE, Pfn, is_zero};

use super::host::{Identity, LeftOut, Page, Seen, read_of};
use super::pace::Pace;
use super::state::Outside;
use super::table::{Place, Slot, Table};
use super::{BATCH_PAGES, Index};
use crate::membership::{ALONE, Known, Membership};
use crate::sharing::{GuestPage, Judged, Sighting, ZERO};

/// How often guests and processors are looked at, and how seldom where a look takes so long that it would be more of a processor
/// than a two-hundredth.
const LOOK_EVERY: Duration = Duration::from_secs(1);
const LOOK_SELDOM: Duration = Duration::from_secs(5);
const LOOK_PART: u32 = 200;

/// Rounds begin no closer together: on a host of small guests there is no use in hashing the same all the time.
const ROUND_AT_LEAST: Duration = Duration::from_secs(30);

/// Frame numbers that the index can keep: 16 TiB.
const END_OF_PFNS: u64 = 1 << 32;

/// Numbers without a frame that are tried in one guest and round. Below 4 GiB there are at most a million; a guest can
/// put something at the end of its address space, and shall not keep the round from the others by that.
const MOST_HOLES: u64 = 4 << 20;

/// Frames that a guest owns and that need not be found: Xen puts a few at the end of the address space (rings, ACPI), behind
/// a hole that takes longer than all others.
const FEW_FRAMES: u64 = 256;

/// What trying to map a frame that is not there takes, measured in pages hashed; a guess. Most of a PVH guest's numbers
/// have no frame.
const HOLE_PAGES: f64 = 0.125;

/// What nominating and sharing a frame takes, measured in pages hashed; a guess.
const NOMINATED_PAGES: f64 = 2.0;

/// A guest that is being gone through.
struct Cursor {
    slot: Slot,
    identity: Identity,
    membership: Membership,
    next: u64,
    end: u64,
    /// Numbers without a frame so far.
    holes: u64,
    /// Frames so far, and those that the guest owns.
    found: u64,
    owned: u64,
    /// Its round in the table; `None` before the first frame.
    round: Option<u16>,
    /// Somebody waits for it: as fast as it goes.
    urgent: bool,
}

/// Goes round the guests. Time is given as a value.
pub struct Scanner {
    index: Arc<Index>,
    pace: Pace,
    looked: Option<Duration>,
    look_every: Duration,
    /// Pages hashed since the last look.
    hashed: u64,
    /// Guests that are still to come in this round.
    queue: VecDeque<Slot>,
    /// Guests that come before them, each as often as it is here.
    urgent: VecDeque<Slot>,
    cursor: Option<Cursor>,
    /// When the round began; `None` between two.
    pub(super) round_began: Option<Duration>,
    last_began: Option<Duration>,
    pages: Vec<Page>,
    /// What fails is said once.
    said: bool,
}

impl Scanner {
    pub fn new(index: Arc<Index>) -> Scanner {
        Scanner {
            pace: Pace::new(index.settings.rate_pages_per_s, index.settings.processor_percent),
            index,
            looked: None,
            look_every: LOOK_EVERY,
            hashed: 0,
            queue: VecDeque::new(),
            urgent: VecDeque::new(),
            cursor: None,
            round_began: None,
            last_began: None,
            pages: vec![[0; PAGE_SIZE]; BATCH_PAGES],
            said: false,
        }
    }

    /// Does what is due and tells how long there is nothing to do. One step reads at most one batch.
    pub fn step(&mut self, now: Duration) -> Duration {
        let every = self.look_every;
        if self.looked.is_none_or(|looked| now.saturating_sub(looked) >= every) {
            let began = thread_cpu();
            self.look(now);
            let took = thread_cpu().saturating_sub(began);
            self.look_every = (took * LOOK_PART).clamp(LOOK_EVERY, LOOK_SELDOM);
        }
        let next_look = self
            .looked
            .map_or(Duration::ZERO, |looked| (looked + self.look_every).saturating_sub(now));
        if self.index.sharing.work(&self.index.host) {
            return Duration::ZERO;
        }
        if self.index.share_arrived(now) {
            return Duration::ZERO;
        }
        self.take_urgent();
        if self.round_began.is_none() && !self.begin_round(now) {
            return next_look;
        }
        if !self.take_next(now) {
            return Duration::ZERO;
        }
        if self.cursor.as_ref().is_some_and(|cursor| cursor.urgent) {
            self.scan(BATCH_PAGES);
            return Duration::ZERO;
        }
        match self.pace.due(now, BATCH_PAGES) {
            Ok(pages) => {
                let began = thread_cpu();
                let spent = self.scan(pages);
                self.pace.spend(spent, thread_cpu().saturating_sub(began));
                Duration::ZERO
            }
            Err(wait) => wait.min(next_look),
        }
    }

    /// Guests that somebody waits for come twice: a page that stays is one that was seen twice.
    fn take_urgent(&mut self) {
        let asked = std::mem::take(&mut *self.index.urgent.lock());
        if asked.is_empty() {
            return;
        }
        let state = self.index.state.lock();
        for uuid in asked {
            let slots = state.guests().filter(|(_, guest)| guest.identity.uuid == uuid);
            let slots: Vec<Slot> = slots.map(|(slot, _)| slot).collect();
            self.urgent.extend(slots.iter().chain(&slots));
        }
        // The guest in whose middle this comes begins anew afterwards.
        if let Some(cursor) = self.cursor.take_if(|cursor| !cursor.urgent) {
            self.queue.push_front(cursor.slot);
        }
    }

    /// Which guests there are, and how busy the processors were.
    fn look(&mut self, now: Duration) {
        let seconds = self
            .looked
            .map_or(0.0, |looked| now.saturating_sub(looked).as_secs_f64());
        self.looked = Some(now);
        let (idle, guests) = {
            let mut host = self.index.host.lock();
            (host.idle_times(), host.guests())
        };
        match idle {
            Ok(idle) => self.pace.observe(now, idle),
            Err(error) => {
                self.say(&format!("how busy the processors are is not known: {}", chain(&error)));
                self.pace.observe_nothing();
            }
        }
        match guests {
            Ok(guests) => self.welcome(now, guests),
            Err(error) => self.say(&format!("guests cannot be listed: {}", chain(&error))),
        }
        let mut state = self.index.state.lock();
        state.figures.idle_share = self.pace.idle_share();
        if seconds > 0.0 {
            state.figures.pages_per_s = (self.hashed as f64 / seconds).round() as u64;
            self.hashed = 0;
        }
    }

    fn say(&mut self, what: &str) {
        if !self.said {
            log::warn!("the index: {what}");
            self.said = true;
        }
    }

    /// Takes guests up that have come, and off those that have gone or are others by now.
    fn welcome(&mut self, now: Duration, guests: Vec<Seen>) {
        let judged = guests.into_iter().map(|seen| {
            let verdict = self.judge(&seen);
            (seen, verdict)
        });
        let judged: Vec<Judged> = judged.collect();
        self.index.sharing.look(&self.index.host, now, &judged);
        let (mut inside, mut outside) = (Vec::new(), Vec::new());
        for (seen, verdict) in judged {
            match verdict {
                Ok(one) => inside.push(one),
                Err(reason) => outside.push(Outside {
                    domid: seen.info.domid.get(),
                    name: seen.name.unwrap_or_default(),
                    reason: reason.to_string(),
                }),
            }
        }
        let gone: Vec<Slot> = {
            let mut state = self.index.state.lock();
            state.outside = outside;
            let there = |identity: &Identity, membership: &Membership| {
                inside.iter().any(|(i, m)| i == identity && m == membership)
            };
            let gone = state
                .guests()
                .filter(|(_, guest)| !there(&guest.identity, &guest.membership));
            gone.map(|(slot, _)| slot).collect()
        };
        gone.into_iter().for_each(|slot| self.take_off(slot));
        let mut state = self.index.state.lock();
        for (identity, membership) in inside {
            if state.guests().any(|(_, guest)| guest.identity == identity) {
                continue;
            }
            log::debug!(
                "guest {} ({}) is indexed in group {}",
                identity.name,
                identity.domid,
                membership.group
            );
            // In the round that is under way it comes last.
            if let Some(slot) = state.enter(identity, membership)
                && self.round_began.is_some()
            {
                self.queue.push_back(slot);
            }
        }
    }

    /// The guest and its group, or why it is left out.
    fn judge(&self, seen: &Seen) -> Result<(Identity, Membership), LeftOut> {
        let identity = seen.readable()?;
        if self.index.settings.off.fit(&identity.name) {
            return Err(LeftOut::Configured);
        }
        let sharing = &self.index.sharing;
        // Nobody can ask for what these have: their group has no key, or another one. Their pages may be equal all the same.
        let unasked = |group: String| Membership {
            uuid: identity.uuid.clone(),
            group,
            key: sharing.key().clone(),
            replaced: false,
        };
        match self.index.members.known(&identity.uuid, &identity.name) {
            Ok(Known::Member(membership)) => Ok((identity, membership)),
            Ok(Known::Alone) if sharing.enabled() => {
                let membership = unasked(format!("{ALONE}{}", identity.uuid));
                Ok((identity, membership))
            }
            Ok(Known::NoKey(group)) if sharing.enabled() => {
                let membership = unasked(group);
                Ok((identity, membership))
            }
            Ok(Known::Alone) => Err(LeftOut::Alone),
            Ok(Known::NoKey(_)) => Err(LeftOut::NoKey),
            Err(error) => Err(LeftOut::NoGroup(chain(&error))),
        }
    }

    /// The slot is free for another guest when this returns, with nothing of this one left under it.
    fn take_off(&mut self, slot: Slot) {
        self.queue.retain(|queued| *queued != slot);
        self.urgent.retain(|queued| *queued != slot);
        self.cursor.take_if(|cursor| cursor.slot == slot);
        let Some(group) = self.index.state.lock().leave(slot) else {
            return;
        };
        self.sweep(&group, slot, None);
        self.index.state.lock().drop_if_empty(&group);
    }

    /// Part by part, so that a caller waits for none but the one.
    fn sweep(&self, group: &str, slot: Slot, round: Option<u16>) {
        for part in Table::parts() {
            self.index.state.lock().sweep(group, part, slot, round);
        }
    }

    fn begin_round(&mut self, now: Duration) -> bool {
        if !self.urgent.is_empty() {
            self.round_began = Some(now);
            return true;
        }
        let early = self
            .last_began
            .is_some_and(|began| now.saturating_sub(began) < ROUND_AT_LEAST);
        if early {
            return false;
        }
        self.queue = self.index.state.lock().guests().map(|(slot, _)| slot).collect();
        if self.queue.is_empty() {
            return false;
        }
        (self.round_began, self.last_began) = (Some(now), Some(now));
        true
    }

    /// Sees to it that there is a guest with frames to read. False: there is none at the moment.
    fn take_next(&mut self, now: Duration) -> bool {
        if self.cursor.as_ref().is_some_and(|cursor| cursor.next < cursor.end) {
            return true;
        }
        if let Some(cursor) = self.cursor.take() {
            // What it did not show this time it does not have any more.
            if cursor.round.is_some() {
                self.index.state.lock().visited(cursor.slot);
                self.sweep(&cursor.membership.group, cursor.slot, cursor.round);
            }
        }
        let urgent = self.urgent.pop_front();
        let Some(slot) = urgent.or_else(|| self.queue.pop_front()) else {
            let took = self
                .round_began
                .take()
                .map_or(Duration::ZERO, |began| now.saturating_sub(began));
            self.index.state.lock().end_round(now, took);
            return false;
        };
        let entered = {
            let mut state = self.index.state.lock();
            let round = state.begin(slot, now);
            let mut guests = state.guests();
            let guest = guests.find(|(number, _)| *number == slot);
            guest.map(|(_, guest)| (guest.identity.clone(), guest.membership.clone(), round))
        };
        let Some((identity, membership, round)) = entered else {
            return false;
        };
        let mut host = self.index.host.lock();
        let end = host.end_of_frames(identity.domid);
        let seen = host.guest(identity.domid);
        drop(host);
        match end.and_then(|end| Ok((end, seen?))) {
            Ok((end, seen)) => {
                // Shared frames are nobody's.
                let owned = seen.map_or(u64::MAX, |seen| {
                    seen.info.total_pages.saturating_add(seen.info.shared_pages)
                });
                self.cursor = Some(Cursor {
                    slot,
                    identity,
                    membership,
                    next: 0,
                    end: end.min(END_OF_PFNS),
                    holes: 0,
                    found: 0,
                    owned,
                    round,
                    urgent: urgent.is_some(),
                });
            }
            Err(error) => log::debug!("guest {} is left out of this round: {}", identity.name, chain(&error)),
        }
        self.cursor.as_ref().is_some_and(|cursor| cursor.next < cursor.end)
    }

    /// Reads and hashes the next frames of the guest, and has equal ones shared. Returns what that took, in pages hashed.
    fn scan(&mut self, pages: usize) -> f64 {
        let Some(cursor) = &mut self.cursor else {
            return 0.0;
        };
        let last = cursor.end.min(cursor.next.saturating_add(pages as u64));
        let pfns: Vec<Pfn> = (cursor.next..last).filter_map(Pfn::new).collect();
        let room = self.pages.len().min(pfns.len());
        let Some(buffer) = self.pages.get_mut(..room) else {
            return 0.0;
        };
        cursor.next = last;
        let read = read_of(self.index.host.lock().as_mut(), &cursor.identity, &pfns, buffer);
        let read = match read {
            Ok(Some(read)) => read,
            Ok(None) => {
                // The next look says what has become of it.
                self.cursor = None;
                return 0.0;
            }
            Err(error) => {
                log::debug!("guest {} cannot be read: {}", cursor.identity.name, chain(&error));
                self.cursor = None;
                return 0.0;
            }
        };
        let there = read.iter().filter(|read| **read).count() as u64;
        let pages = pfns.iter().zip(buffer.iter()).zip(&read);
        // Zero pages travel as a bit.
        let pages = pages.filter(|((_, page), read)| **read && !is_zero(*page));
        let (places, pages): (Vec<_>, Vec<_>) = pages
            .filter_map(|((pfn, page), _)| Some((Place::new(cursor.slot, *pfn)?, page)))
            .unzip();
        let ids = cursor.membership.key.ids(pages);
        let seen: Vec<_> = ids.iter().map(|id| id.lookup_key()).zip(places).collect();
        let holes = (read.len() as u64).saturating_sub(there);
        cursor.holes = cursor.holes.saturating_add(holes);
        cursor.found = cursor.found.saturating_add(there);
        let all_found = there == 0 && cursor.found.saturating_add(FEW_FRAMES) >= cursor.owned;
        if all_found || cursor.holes > MOST_HOLES {
            cursor.end = cursor.next;
        }
        self.hashed = self.hashed.saturating_add(there);
        let slot = cursor.slot;
        let sharing = &self.index.sharing;
        let sightings = {
            let mut state = self.index.state.lock();
            state.note(slot, &seen);
            let partners = match sharing.enabled() {
                true => state.partners(slot, &seen),
                false => vec![None; seen.len()],
            };
            let sightings = sightings(&pfns, &read, &seen, &partners);
            state.watch(slot, &sightings);
            sightings
        };
        let mut spent = there as f64 + holes as f64 * HOLE_PAGES;
        if sharing.enabled() {
            let nominated = sharing.visit(&self.index.host, &cursor.identity, &sightings);
            spent += nominated as f64 * NOMINATED_PAGES;
        }
        spent
    }
}

/// What is seen of a batch: the pages that were read are zero unless they are among those with keys.
fn sightings(
    pfns: &[Pfn],
    read: &[bool],
    seen: &[(u64, Place)],
    partners: &[Option<(xen_sys::DomId, Place)>],
) -> Vec<Sighting> {
    let mut keyed = seen.iter().zip(partners).peekable();
    let sighting = |(pfn, read): (&Pfn, &bool)| {
        let keyed = keyed.next_if(|((_, place), _)| place.pfn() == *pfn);
        let partner = keyed.and_then(|(_, partner)| *partner);
        Sighting {
            pfn: *pfn,
            key: read.then(|| keyed.map_or(ZERO, |((key, _), _)| *key)),
            partner: partner.and_then(|(domid, place)| GuestPage::new(domid, place.pfn())),
        }
    };
    pfns.iter().zip(read).map(sighting).collect()
}
