//! What is known: the guests, each group's table, and the figures.
use std::collections::BTreeMap;
use std::time::Duration;

use xen_sys::DomId;
use xenfold::control::{IndexStats, IndexedGuest};
use xenfold::page::{ContentId, ContentKey, Pfn};
use xenfold::page_set::PageSet;

use super::changes::Changes;
use super::host::Identity;
use super::table::{Noted, Place, Slot, Table};
use crate::membership::Membership;
use crate::sharing::Sighting;

/// The part of its memory that the index notes changes of pages in, at most: one in so many.
const WATCHED_PART: u64 = 4;

/// A guest whose contents are looked up.
pub struct Indexed {
    pub identity: Identity,
    pub membership: Membership,
    /// Rounds begun.
    pub round: u16,
    /// Contents that are found at it.
    pages: u64,
    changes: Changes,
}

struct Group {
    key: ContentKey,
    table: Table,
}

/// A guest that is not indexed, for the status.
pub struct Outside {
    pub domid: u32,
    pub name: String,
    pub reason: String,
}

/// Figures that the scanner sets.
#[derive(Clone, Debug, Default)]
pub struct Figures {
    pub rounds: u64,
    pub last_round_ended: Option<Duration>,
    pub last_round_took: Duration,
    pub pages_per_s: u64,
    pub idle_share: Option<f64>,
}

pub struct State {
    limit_bytes: u64,
    guests: BTreeMap<Slot, Indexed>,
    groups: BTreeMap<String, Group>,
    pub outside: Vec<Outside>,
    pub figures: Figures,
    /// There was no room: in the round before, in this one.
    full: [bool; 2],
    answered: u64,
    stale: u64,
}

impl State {
    pub fn new(limit_bytes: u64) -> State {
        State {
            limit_bytes,
            guests: BTreeMap::new(),
            groups: BTreeMap::new(),
            outside: Vec::new(),
            figures: Figures::default(),
            full: [false; 2],
            answered: 0,
            stale: 0,
        }
    }

    fn bytes(&self) -> u64 {
        let tables: u64 = self.groups.values().map(|group| group.table.bytes()).sum();
        tables.saturating_add(self.changes_bytes())
    }

    fn changes_bytes(&self) -> u64 {
        self.guests.values().map(|guest| guest.changes.bytes()).sum()
    }

    pub fn guests(&self) -> impl Iterator<Item = (Slot, &Indexed)> {
        self.guests.iter().map(|(slot, guest)| (*slot, guest))
    }

    /// Takes a guest up. `None`: there are 65,536 already.
    pub fn enter(&mut self, identity: Identity, membership: Membership) -> Option<Slot> {
        // What was found with another key is of no use. The scanner has taken the group's guests off before.
        if let Some(group) = self.groups.get(&membership.group)
            && group.key != membership.key
        {
            self.groups.remove(&membership.group);
        }
        let slot = (0..=Slot::MAX).find(|slot| !self.guests.contains_key(slot))?;
        self.groups.entry(membership.group.clone()).or_insert_with(|| Group {
            key: membership.key.clone(),
            table: Table::new(),
        });
        let guest = Indexed {
            identity,
            membership,
            round: 0,
            pages: 0,
            changes: Changes::default(),
        };
        self.guests.insert(slot, guest);
        Some(slot)
    }

    /// From now on nothing is found at this guest. What the table still has of it goes by [`State::sweep`], before the
    /// slot is given to another guest.
    pub fn leave(&mut self, slot: Slot) -> Option<String> {
        let guest = self.guests.remove(&slot)?;
        Some(guest.membership.group)
    }

    /// Drops the group when no guest is in it any more.
    pub fn drop_if_empty(&mut self, group: &str) {
        if !self.guests.values().any(|guest| guest.membership.group == group) {
            self.groups.remove(group);
        }
    }

    /// The guest is gone through once more; returns the number of the round.
    pub fn begin(&mut self, slot: Slot, now: Duration) -> Option<u16> {
        let guest = self.guests.get_mut(&slot)?;
        guest.changes.begin(now);
        guest.round = guest.round.wrapping_add(1);
        Some(guest.round)
    }

    /// Forgets, in one part of the group's table, what this guest did not show in `round`; all of it without a round.
    pub fn sweep(&mut self, group: &str, part: usize, slot: Slot, round: Option<u16>) {
        let Some(group) = self.groups.get_mut(group) else {
            return;
        };
        let dropped = group.table.sweep(part, slot, round);
        if let Some(guest) = self.guests.get_mut(&slot) {
            guest.pages = guest.pages.saturating_sub(dropped);
        }
    }

    /// Notes contents that this guest has shown.
    pub fn note(&mut self, slot: Slot, seen: &[(u64, Place)]) {
        let mut room_bytes = self.limit_bytes.saturating_sub(self.bytes());
        let Some(guest) = self.guests.get_mut(&slot) else {
            return;
        };
        let Some(group) = self.groups.get_mut(&guest.membership.group) else {
            return;
        };
        for (key, place) in seen {
            let before = group.table.bytes();
            match group.table.note(*key, *place, guest.round, room_bytes) {
                Noted::New => {
                    guest.pages = guest.pages.saturating_add(1);
                    room_bytes = room_bytes.saturating_add(before).saturating_sub(group.table.bytes());
                }
                Noted::Known | Noted::Elsewhere => {}
                Noted::Full => {
                    if self.full == [false; 2] {
                        log::warn!(
                            "the index is full with {} bytes: further contents of running guests are not found; \
                             index_size in /etc/xen/xenfold.conf bounds it",
                            self.limit_bytes
                        );
                    }
                    let [_, now] = &mut self.full;
                    *now = true;
                }
            }
        }
    }

    /// Notes whether pages are what they were. As long as there is room, and all of it is not a quarter of
    /// what the index may take.
    pub fn watch(&mut self, slot: Slot, sightings: &[Sighting]) {
        let room_bytes = (self.limit_bytes / WATCHED_PART).saturating_sub(self.changes_bytes());
        let room_bytes = room_bytes.min(self.limit_bytes.saturating_sub(self.bytes()));
        if let Some(guest) = self.guests.get_mut(&slot) {
            let most_bytes = guest.changes.bytes().saturating_add(room_bytes);
            let pages = sightings
                .iter()
                .filter_map(|seen| Some((u32::try_from(seen.pfn.get()).ok()?, seen.key?)));
            pages.for_each(|(pfn, key)| guest.changes.seen(pfn, key, most_bytes));
        }
    }

    /// A guest has been gone through from its first page to its last.
    pub fn visited(&mut self, slot: Slot) {
        if let Some(guest) = self.guests.get_mut(&slot) {
            guest.changes.visited();
        }
    }

    /// Which pages of a guest change; `None`: it is not here, or was not gone through twice.
    pub fn changing(&self, uuid: &str, bound: u64) -> Option<PageSet> {
        let mut guests = self.guests.values();
        let guest = guests.find(|guest| guest.identity.uuid == uuid)?;
        guest.changes.pages(bound)
    }

    /// For each of these contents of a guest's pages, another page of its group that had it when it was last seen.
    pub fn partners(&self, slot: Slot, seen: &[(u64, Place)]) -> Vec<Option<(DomId, Place)>> {
        let group = self
            .guests
            .get(&slot)
            .and_then(|guest| self.groups.get(&guest.membership.group));
        let partner = |(key, place): &(u64, Place)| {
            let found = group?.table.find(*key).filter(|found| found != place)?;
            Some((self.guests.get(&found.slot)?.identity.domid, found))
        };
        seen.iter().map(partner).collect()
    }

    /// The lookup keys of a guest's pages, as far as another guest of its group had the same when it was last looked at.
    pub fn had_by_others(&self, asking: &Membership, pages: &[(Pfn, ContentId)]) -> Vec<(Pfn, u64)> {
        let Some(table) = self.table_of(asking) else {
            return Vec::new();
        };
        let keys = pages.iter().map(|(pfn, id)| (*pfn, id.lookup_key()));
        let others = |key: u64| table.find(key).is_some_and(|place| self.answers(place.slot, asking));
        keys.filter(|(_, key)| others(*key)).collect()
    }

    pub fn end_round(&mut self, now: Duration, took: Duration) {
        self.figures.rounds = self.figures.rounds.saturating_add(1);
        self.figures.last_round_ended = Some(now);
        self.figures.last_round_took = took;
        let [_, full] = self.full;
        self.full = [full, false];
    }

    /// The table that the asking guest may hear of.
    fn table_of(&self, asking: &Membership) -> Option<&Table> {
        let group = self.groups.get(&asking.group).filter(|group| group.key == asking.key)?;
        Some(&group.table)
    }

    /// Whether what is found at this guest is an answer to the asking one.
    fn answers(&self, slot: Slot, asking: &Membership) -> bool {
        let guest = self.guests.get(&slot);
        guest.is_some_and(|guest| guest.identity.uuid != asking.uuid && guest.membership.group == asking.group)
    }

    pub fn lookup_keys(&self, asking: &Membership) -> Vec<u64> {
        let Some(table) = self.table_of(asking) else {
            return Vec::new();
        };
        let entries = table.entries().filter(|(_, slot)| self.answers(*slot, asking));
        entries.map(|(key, _)| key).collect()
    }

    /// Where to look for contents, guest by guest: the place in `ids`, and where its page was. With the guests' identities,
    /// since a slot may be another guest's a moment later.
    pub fn places(&self, asking: &Membership, ids: &[ContentId]) -> Vec<(Identity, Vec<(usize, Place)>)> {
        let Some(table) = self.table_of(asking) else {
            return Vec::new();
        };
        let mut by_slot: BTreeMap<Slot, Vec<(usize, Place)>> = BTreeMap::new();
        for (at, id) in ids.iter().enumerate() {
            if let Some(place) = table.find(id.lookup_key())
                && self.answers(place.slot, asking)
            {
                by_slot.entry(place.slot).or_default().push((at, place));
            }
        }
        let by_guest = by_slot.into_iter().filter_map(|(slot, places)| {
            let guest = self.guests.get(&slot)?;
            Some((guest.identity.clone(), places))
        });
        by_guest.collect()
    }

    /// A page was asked for: it was still the same, or is forgotten.
    pub fn answered(&mut self, asking: &Membership, key: u64, place: Place, same: bool) {
        if same {
            self.answered = self.answered.saturating_add(1);
            return;
        }
        self.stale = self.stale.saturating_add(1);
        let removed = match self.groups.get_mut(&asking.group) {
            Some(group) if group.key == asking.key => group.table.remove(key, place),
            _ => false,
        };
        if removed && let Some(guest) = self.guests.get_mut(&place.slot) {
            guest.pages = guest.pages.saturating_sub(1);
        }
    }

    pub fn stats(&self, now: Duration) -> IndexStats {
        let indexed = self.guests.values().map(|guest| IndexedGuest {
            domid: guest.identity.domid.get(),
            name: guest.identity.name.clone(),
            group: Some(guest.membership.group.clone()),
            pages: guest.pages,
            visits: guest.changes.visits(),
            left_out: None,
        });
        let outside = self.outside.iter().map(|outside| IndexedGuest {
            domid: outside.domid,
            name: outside.name.clone(),
            left_out: Some(outside.reason.clone()),
            ..IndexedGuest::default()
        });
        let mut guests: Vec<IndexedGuest> = indexed.chain(outside).collect();
        guests.sort_by_key(|guest| guest.domid);
        let figures = &self.figures;
        let ended = figures.last_round_ended;
        IndexStats {
            pages: self.groups.values().map(|group| group.table.len()).sum(),
            memory_bytes: self.bytes(),
            full: self.full != [false; 2],
            rounds: figures.rounds,
            last_round_age_s: ended.map(|ended| now.saturating_sub(ended).as_secs()),
            last_round_s: ended.map(|_| figures.last_round_took.as_secs()),
            pages_per_s: figures.pages_per_s,
            idle_percent: figures
                .idle_share
                .map(|share| (share * 100.0).round().clamp(0.0, 100.0) as u8),
            answered: self.answered,
            stale: self.stale,
            guests,
            ..IndexStats::default()
        }
    }
}
