//! What becomes of pages that have been seen: the table is kept true, and those that stay are put together.
use std::collections::BTreeMap;

use xen_sys::DomId;

use super::engine::{Engine, MOST_AT_ONCE, Outcome, Run, Task};
use super::host::GuestPage;
use super::state::{Guest, HostLock, State};
use super::table::GroupNo;
use super::{Sighting, ZERO};
use crate::index::Identity;

/// What is wanted of a page that shall be shared with another.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Partner {
    /// It stays what it is.
    Stays,
    /// It was that when it was last looked at.
    Had,
}

impl State {
    /// Takes pages of a guest that have just been read, and shares what stays. Returns how many were nominated.
    pub fn visit(&mut self, host: &HostLock, identity: &Identity, sightings: &[Sighting]) -> u64 {
        let ours = |guest: &&Guest| guest.identity == *identity && !guest.leaving;
        let Some((group, takes_part)) = self
            .guests
            .get(&identity.domid)
            .filter(ours)
            .map(|guest| (guest.group, guest.takes_part()))
        else {
            return 0;
        };
        let candidates = self.sift(host, identity.domid, group, takes_part, sightings);
        if !self.enabled || self.unshare_all {
            return 0;
        }
        self.share(host, group, &candidates, Partner::Stays)
    }

    /// The guest's group, if its pages may be shared now.
    pub fn may_share(&self, identity: &Identity) -> Option<GroupNo> {
        let guest = self.guests.get(&identity.domid)?;
        let free = guest.identity == *identity && guest.takes_part() && !self.is_held(identity.domid, &identity.uuid);
        let shares = self.enabled && !self.unshare_all && !self.reserve.is_short();
        (free && shares).then_some(guest.group)
    }

    /// Shares pages of which it is known what they held when their guest arrived. Returns how many are shared now.
    pub fn share_arrived(&mut self, host: &HostLock, identity: &Identity, arrived: &[Sighting]) -> u64 {
        let Some(group) = self.may_share(identity) else {
            return 0;
        };
        let pages = arrived.iter().filter_map(|sighting| {
            let page = GuestPage::new(identity.domid, sighting.pfn)?;
            Some((page, sighting.key?, *sighting))
        });
        let pages: Vec<(GuestPage, u64, Sighting)> = pages.collect();
        let own = pages.iter().filter(|(page, ..)| self.table.find(*page).is_none());
        let candidates: Vec<(GuestPage, Sighting)> = own.map(|(page, _, sighting)| (*page, *sighting)).collect();
        for (page, sighting) in &candidates {
            if let Some(key) = sighting.key {
                self.seen(*page, key);
            }
        }
        self.adopt_partners(host, group, &candidates);
        self.share(host, group, &candidates, Partner::Had);
        let shared = |page: GuestPage, key: u64| {
            let row = self.table.find(page).and_then(|row| self.table.row(row));
            row.is_some_and(|row| row.key == key)
        };
        pages.iter().filter(|(page, key, _)| shared(*page, *key)).count() as u64
    }

    /// Takes partners into the table that Xen shares already: none of them need have been visited since the daemon started.
    fn adopt_partners(&mut self, host: &HostLock, group: GroupNo, candidates: &[(GuestPage, Sighting)]) {
        let mut unknown: BTreeMap<DomId, bool> = BTreeMap::new();
        for (_, sighting) in candidates {
            let (Some(partner), Some(key)) = (sighting.partner, sighting.key) else {
                continue;
            };
            if !self.fits(partner, group, key, Partner::Had) {
                continue;
            }
            let has_unknown = unknown.entry(partner.domid).or_insert_with(|| {
                let seen = host.lock().guest(partner.domid);
                let in_table = self.table.pages_of(partner.domid);
                matches!(seen, Ok(Some(seen)) if seen.info.shared_pages > in_table)
            });
            if *has_unknown {
                self.adopt(host, partner, group, key);
            }
        }
    }

    /// Shares pages of one group. Returns how many were nominated.
    fn share(
        &mut self,
        host: &HostLock,
        group: GroupNo,
        candidates: &[(GuestPage, Sighting)],
        partner: Partner,
    ) -> u64 {
        let identities: BTreeMap<DomId, Identity> = self
            .guests
            .iter()
            .filter(|(_, guest)| guest.takes_part() && guest.group == group)
            .map(|(domid, guest)| (*domid, guest.identity.clone()))
            .collect();
        let mut nominated = 0;
        // A partner may come with each.
        for some in candidates.chunks(MOST_AT_ONCE / 2) {
            if self.reserve.is_short() {
                break;
            }
            let tasks = self.tasks(group, some, partner);
            if !tasks.is_empty() {
                let run = Engine::new(host, &identities, self.newest_handle).run(&tasks);
                nominated += run.nominated;
                self.newest_handle = run.newest;
                self.apply(&tasks, run);
            }
        }
        nominated
    }

    /// Notes what is seen, keeps the table true, and returns the pages that may be shared.
    fn sift(
        &mut self,
        host: &HostLock,
        domid: DomId,
        group: GroupNo,
        takes_part: bool,
        sightings: &[Sighting],
    ) -> Vec<(GuestPage, Sighting)> {
        let mut candidates = Vec::new();
        let in_xen = match host.lock().guest(domid) {
            Ok(Some(seen)) => seen.info.shared_pages,
            _ => return candidates,
        };
        let in_table = self.table.pages_of(domid);
        // Shared in Xen and not in the table: by a daemon before this one, or nominated and left behind. The other way
        // round: written to, with what was there before.
        let (mut unknown, lost) = (in_xen.saturating_sub(in_table), in_table > in_xen);
        for sighting in sightings {
            let Some(page) = GuestPage::new(domid, sighting.pfn) else {
                continue;
            };
            let Some(key) = sighting.key else {
                self.broke(page);
                continue;
            };
            if let Some(id) = self.table.find(page) {
                let same = self.table.row(id).is_some_and(|row| row.key == key);
                if (same && !(lost && takes_part)) || self.still_shared(host, page, takes_part) {
                    if !same {
                        self.table.rekey(id, key);
                    }
                    self.seen(page, key);
                } else {
                    self.broke(page);
                }
                continue;
            }
            if unknown > 0 && takes_part && self.adopt(host, page, group, key) {
                unknown -= 1;
                continue;
            }
            if self.seen(page, key) && takes_part {
                candidates.push((page, *sighting));
            }
        }
        candidates
    }

    fn seen(&mut self, page: GuestPage, key: u64) -> bool {
        let guest = self.guests.get_mut(&page.domid);
        guest.is_some_and(|guest| guest.history.seen(page.number(), key))
    }

    /// The page has another content or frame than it had.
    pub fn broke(&mut self, page: GuestPage) {
        if self.table.remove(page) {
            self.counts.broken = self.counts.broken.saturating_add(1);
            self.unstable(page);
        }
    }

    fn unstable(&mut self, page: GuestPage) {
        if let Some(guest) = self.guests.get_mut(&page.domid) {
            guest.history.broke(page.number());
        }
    }

    /// Of a guest that is being sent nothing is asked: its page counts as broken when its content is another.
    fn still_shared(&self, host: &HostLock, page: GuestPage, ask: bool) -> bool {
        ask && matches!(host.lock().references(page), Ok(Some(_)))
    }

    /// Takes a page into the table that Xen shares already. False: it does not.
    fn adopt(&mut self, host: &HostLock, page: GuestPage, group: GroupNo, key: u64) -> bool {
        let Ok(Some(references)) = host.lock().references(page) else {
            return false;
        };
        // What is shared has a handle already; nominating again gives it.
        let handle = match references {
            0 | 1 => None,
            _ => host.lock().nominate(page).ok(),
        };
        // A guest that wrote to it just now made this a new one.
        self.newest_handle = self
            .newest_handle
            .map(|newest| handle.map_or(newest, |handle| newest.max(handle)));
        let row = handle.and_then(|handle| self.table.by_handle(handle));
        let row_group = row.and_then(|row| self.table.row(row)).map(|row| row.group);
        match (handle, row) {
            (Some(_), Some(row)) if row_group == Some(group) => self.table.join(row, page),
            (Some(handle), None) => drop(self.table.add(group, key, handle, page)),
            // A nomination that was left behind, or the frame of guests that are in another group by now.
            _ => {
                let _ = host.lock().unshare(page.domid, &[page.pfn()]);
            }
        }
        self.seen(page, key);
        true
    }

    /// What to share of pages of one group.
    fn tasks(&mut self, group: GroupNo, candidates: &[(GuestPage, Sighting)], wanted: Partner) -> Vec<Task> {
        let mut by_key: BTreeMap<u64, (Vec<GuestPage>, Option<GuestPage>)> = BTreeMap::new();
        for (page, sighting) in candidates {
            // An earlier part of this visit may have shared it as somebody's partner.
            if let Some(key) = sighting.key
                && self.table.find(*page).is_none()
            {
                let (pages, partner) = by_key.entry(key).or_default();
                pages.push(*page);
                *partner = partner.or(sighting.partner);
            }
        }
        let mut tasks = Vec::new();
        for (key, (mut pages, partner)) in by_key {
            let mut row = None;
            if let Some(id) = self.table.open(group, key) {
                let takes_part = |page: &&GuestPage| self.guests.get(&page.domid).is_some_and(Guest::takes_part);
                let found = self.table.row(id);
                row = found.and_then(|found| Some((id, (*found.pages.iter().find(takes_part)?, found.handle))));
                if row.is_none() {
                    continue;
                }
            } else {
                let partner = match key {
                    ZERO => self.zeros.get(&group).copied(),
                    _ => partner,
                };
                pages.extend(
                    partner.filter(|partner| !pages.contains(partner) && self.fits(*partner, group, key, wanted)),
                );
                if let ([page], ZERO) = (pages.as_slice(), key) {
                    self.zeros.insert(group, *page);
                }
                if pages.len() < 2 {
                    continue;
                }
            }
            tasks.push(Task { group, key, row, pages });
        }
        tasks
    }

    /// Whether a page that had this content may be shared.
    fn fits(&self, page: GuestPage, group: GroupNo, key: u64, wanted: Partner) -> bool {
        let guest = self.guests.get(&page.domid);
        let guest = guest.filter(|guest| guest.takes_part() && guest.group == group);
        let as_wanted = |guest: &Guest| match wanted {
            Partner::Stays => guest.history.stays(page.number(), key),
            Partner::Had => true,
        };
        guest.is_some_and(as_wanted) && self.table.find(page).is_none()
    }

    fn apply(&mut self, tasks: &[Task], run: Run) {
        for (task, outcome) in tasks.iter().zip(run.outcomes) {
            let Outcome {
                joined,
                base,
                changed,
                refused,
                left_row,
                elsewhere: _,
            } = outcome;
            let mut joining = joined.iter().copied();
            let row = match (task.row, base) {
                (Some((row, _)), _) => Some(row),
                (None, Some((_, handle))) => {
                    let first = joining.next();
                    first.map(|first| self.table.add(task.group, task.key, handle, first))
                }
                (None, None) => None,
            };
            let mut gained = 0u64;
            for page in joining {
                if let Some(row) = row {
                    self.table.join(row, page);
                    gained += 1;
                }
            }
            self.counts.shared = self.counts.shared.saturating_add(gained);
            left_row.into_iter().for_each(|page| self.broke(page));
            self.counts.changed = self.counts.changed.saturating_add(changed.len() as u64);
            self.counts.refused = self.counts.refused.saturating_add(refused.len() as u64);
            changed.iter().chain(&refused).for_each(|page| self.unstable(*page));
        }
        if run.no_memory {
            self.reserve.ran_out();
        }
    }
}
