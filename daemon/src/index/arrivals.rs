//! Guests that have just arrived: which of their pages another guest of the group has as well is known from their image,
//! and these are shared as soon as the guest runs under its own name and its migration has let go of it, at no rate. A round
//! would come to them much later, and would have to see each of them twice.
//!
//! The list is a hint: what is shared is compared byte by byte as ever ([`crate::sharing`]). With whom is looked up when
//! it is due: by then the other guest may be gone, be another group's or have written to the page.
use std::collections::VecDeque;
use std::time::Duration;

use xenfold::control::DedupStats;
use xenfold::page::{ContentId, Pfn};

use super::Index;
use super::host::Identity;
use super::table::{Place, Slot};
use crate::membership::Membership;
use crate::sharing::{GuestPage, Sighting};

/// Pages on the list, those of all guests together: 16 MiB of memory. The rounds see to what has no room.
const MOST_PAGES: usize = 1 << 20;

/// How long pages wait for their guest. That of a guest which has left, whose image is saved at both ends, waits in vain.
const PATIENCE: Duration = Duration::from_secs(60);

/// Pages of an image that are looked up while everybody else waits for the index.
const LOOKED_UP_AT_ONCE: usize = 1 << 14;

/// Pages that are shared between two looks at what else is due.
const SHARED_AT_ONCE: usize = 128;

/// A guest's pages that are still to be shared.
struct Arrival {
    uuid: String,
    pages: Vec<(u32, u64)>,
    all: u64,
    shared: u64,
    noted: Duration,
    /// When its migration had let go of it and the first of them were taken.
    began: Option<Duration>,
    /// When some of them were last taken.
    served: Duration,
}

/// All of them, and what became of those before.
#[derive(Default)]
pub struct Arrivals {
    waiting: VecDeque<Arrival>,
    arrived: u64,
    shared: u64,
    /// How long the last guest's pages waited for it, and took then.
    last_took: Option<(Duration, Duration)>,
}

impl Arrivals {
    fn waiting(&self) -> usize {
        self.waiting.iter().map(|arrival| arrival.pages.len()).sum()
    }

    /// Puts a guest's pages on the list, in the place of those from its arrival before.
    fn note(&mut self, uuid: &str, had: Vec<(Pfn, u64)>, now: Duration) {
        self.waiting.retain(|arrival| arrival.uuid != uuid);
        let room = MOST_PAGES.saturating_sub(self.waiting());
        let numbers = had
            .into_iter()
            .filter_map(|(pfn, key)| Some((u32::try_from(pfn.get()).ok()?, key)));
        let mut pages: Vec<(u32, u64)> = numbers.take(room).collect();
        if pages.is_empty() {
            return;
        }
        // The first page is taken first.
        pages.reverse();
        pages.shrink_to_fit();
        let all = pages.len() as u64;
        self.arrived = self.arrived.saturating_add(all);
        self.waiting.push_back(Arrival {
            uuid: uuid.to_owned(),
            pages,
            all,
            shared: 0,
            noted: now,
            began: None,
            served: now,
        });
    }

    /// The guests that have pages on the list, without those that have not come.
    fn guests(&mut self, now: Duration) -> Vec<String> {
        self.waiting.retain(|arrival| {
            let waits = now.saturating_sub(arrival.served) < PATIENCE;
            if !waits {
                let (pages, uuid) = (arrival.pages.len(), &arrival.uuid);
                log::debug!("guest {uuid} does not run here: {pages} pages of it are not shared at once");
            }
            waits
        });
        self.waiting.iter().map(|arrival| arrival.uuid.clone()).collect()
    }

    /// The guest's next pages; none when all of them have been taken.
    fn take(&mut self, uuid: &str, now: Duration) -> Vec<(u32, u64)> {
        let Some(arrival) = self.waiting.iter_mut().find(|arrival| arrival.uuid == uuid) else {
            return Vec::new();
        };
        arrival.served = now;
        arrival.began.get_or_insert(now);
        let rest = arrival.pages.len().saturating_sub(SHARED_AT_ONCE);
        arrival.pages.split_off(rest)
    }

    fn shared(&mut self, uuid: &str, pages: u64) {
        self.shared = self.shared.saturating_add(pages);
        if let Some(arrival) = self.waiting.iter_mut().find(|arrival| arrival.uuid == uuid) {
            arrival.shared = arrival.shared.saturating_add(pages);
        }
    }

    fn end(&mut self, guest: &Identity, now: Duration) {
        let Some(at) = self.waiting.iter().position(|arrival| arrival.uuid == guest.uuid) else {
            return;
        };
        if let Some(arrival) = self.waiting.remove(at) {
            let began = arrival.began.unwrap_or(now);
            let (waited, took) = (began.saturating_sub(arrival.noted), now.saturating_sub(began));
            self.last_took = Some((waited, took));
            log::info!(
                "guest {} has arrived: of {} pages that others of its group had {} are shared, which took {} ms ({} ms after \
                 its agent told of them)",
                guest.name,
                arrival.all,
                arrival.shared,
                took.as_millis(),
                waited.as_millis()
            );
        }
    }

    /// Adds the figures to those of sharing.
    pub fn tell(&self, stats: &mut DedupStats) {
        stats.arrived = self.arrived;
        stats.arrived_shared = self.shared;
        stats.arrived_waiting = self.waiting() as u64;
        let ms = |time: Duration| u64::try_from(time.as_millis()).unwrap_or(u64::MAX);
        stats.arrival_ms = self.last_took.map(|(_, took)| ms(took));
        stats.arrival_waited_ms = self.last_took.map(|(waited, _)| ms(waited));
    }
}

impl Index {
    /// Whether anything is done with what arriving guests' pages held.
    pub(crate) fn takes_arrivals(&self) -> bool {
        self.sharing.enabled()
    }

    /// What a guest's pages held when it moved. Those that another guest of its group has are to be shared.
    pub(crate) fn arrived(&self, asking: &Membership, image: &[(Pfn, ContentId)]) {
        self.arrived_at(self.began.elapsed(), asking, image);
    }

    pub(crate) fn arrived_at(&self, now: Duration, asking: &Membership, image: &[(Pfn, ContentId)]) {
        if !self.takes_arrivals() {
            return;
        }
        let mut had = Vec::new();
        for part in image.chunks(LOOKED_UP_AT_ONCE) {
            let room = MOST_PAGES.saturating_sub(had.len());
            let found = self.state.lock().had_by_others(asking, part);
            had.extend(found.into_iter().take(room));
        }
        self.arrivals.lock().note(&asking.uuid, had, now);
    }

    /// Shares some pages of a guest that has arrived, if there is one. True: there may be more.
    pub(super) fn share_arrived(&self, now: Duration) -> bool {
        let guests = self.arrivals.lock().guests(now);
        guests.iter().any(|uuid| {
            let Some((slot, guest)) = self.guest_of(uuid) else {
                return false;
            };
            if !self.sharing.may_share(&guest) {
                return false;
            }
            let pages = self.arrivals.lock().take(uuid, now);
            if pages.is_empty() {
                self.arrivals.lock().end(&guest, now);
                return true;
            }
            let sightings = self.arrived_sightings(slot, &pages);
            let shared = self.sharing.share_arrived(&self.host, &guest, &sightings);
            self.arrivals.lock().shared(uuid, shared);
            true
        })
    }

    fn guest_of(&self, uuid: &str) -> Option<(Slot, Identity)> {
        let state = self.state.lock();
        let found = state.guests().find(|(_, guest)| guest.identity.uuid == uuid);
        found.map(|(slot, guest)| (slot, guest.identity.clone()))
    }

    fn arrived_sightings(&self, slot: Slot, pages: &[(u32, u64)]) -> Vec<Sighting> {
        let places = pages.iter().filter_map(|(pfn, key)| {
            let place = Place::new(slot, Pfn::new(u64::from(*pfn))?)?;
            Some((*key, place))
        });
        let places: Vec<(u64, Place)> = places.collect();
        let partners = self.state.lock().partners(slot, &places);
        let sightings = places.iter().zip(partners).map(|((key, place), partner)| Sighting {
            pfn: place.pfn(),
            key: Some(*key),
            partner: partner.and_then(|(domid, place)| GuestPage::new(domid, place.pfn())),
        });
        sightings.collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SECOND: Duration = Duration::from_secs(1);

    fn pages(count: u64) -> Vec<(Pfn, u64)> {
        (0..count).map(|pfn| (Pfn::new(pfn).unwrap(), pfn)).collect()
    }

    #[test]
    fn the_list_is_bounded_and_nobody_waits_for_ever() {
        let mut arrivals = Arrivals::default();
        arrivals.note("a", pages(10), SECOND);
        arrivals.note("b", pages(MOST_PAGES as u64), SECOND * 30);
        arrivals.note("c", pages(10), SECOND * 30);
        assert_eq!(arrivals.waiting(), MOST_PAGES);
        assert_eq!(arrivals.guests(SECOND * 60), ["a", "b"]);
        // Once more, with others.
        arrivals.note("a", pages(300), SECOND * 40);
        assert_eq!(arrivals.waiting(), MOST_PAGES);
        assert_eq!(arrivals.take("a", SECOND * 80).first(), Some(&(9, 9)));
        assert_eq!(arrivals.guests(SECOND * 95), ["a"]);
        assert!(arrivals.take("a", SECOND * 95).is_empty() && arrivals.take("b", SECOND).is_empty());
        assert_eq!((arrivals.guests(SECOND * 155).len(), arrivals.waiting()), (0, 0));
    }

    #[test]
    fn all_pages_are_taken_from_the_first_on() {
        let mut arrivals = Arrivals::default();
        arrivals.note("a", pages(300), SECOND);
        let mut taken = Vec::new();
        loop {
            let some = arrivals.take("a", SECOND);
            assert!(some.len() <= SHARED_AT_ONCE);
            if some.is_empty() {
                break;
            }
            taken.push(some);
        }
        assert_eq!(taken.len(), 3);
        assert!(taken[0].contains(&(0, 0)) && taken[2].contains(&(299, 299)));
        assert_eq!(taken.concat().len(), 300);
    }
}
