//! What is learnt of a guest's writes before it is migrated: Ruan's state transition model of memory write (Ruan et al.,
//! *Efficient Live Migration of Virtual Machines with a Novel Data Filter*, section 3), and how old pages are when they
//! are written again ([`super::gaps`]).
//!
//! Memory is cut into regions. Every 50 ms the pages written since are looked at, and the region with the most of them is
//! the state. The model counts how states follow each other, and keeps for each state the pages that were written in at
//! least half of its samples: its local writable working set. The paper names no threshold for "frequent"; half means
//! that the page is likelier written than not while the state lasts.
//!
//! Where the guest has been migrated before, what is kept of that ([`Kept`]) is gone on with: states, transitions and ages
//! seen then count half beside what is seen now.
//!
//! Memory: at most 4 bytes for each page below the bound, while it is built and after; beside that what regions and
//! states take (2 KiB each while it is built, a tenth after). The working sets of a guest that writes so much that they do not fit are left out,
//! those of the rarest states first.
use std::time::Duration;

use super::ages::Ages;
use super::gaps::{self, BINS, Gaps, NEVER, Regions, Seen};
use super::kept::Kept;
use super::packed;
use crate::page_set::PageSet;

/// Samples that a model takes at most: ages are kept in a byte.
pub const MOST_SAMPLES: u16 = 254;

/// The age, in samples, of a page that was not written in any.
const NOT_WRITTEN: u8 = u8::MAX;

/// Where more than this share of writes is elsewhere than expected, or more or fewer, the model does not hold.
const MOST_DEVIATION: f64 = 0.5;

/// A shorter time shows where a guest writes just then, not where it writes.
const SHORT: Duration = Duration::from_secs(1);

/// Writes that a pass must have, or be expected to have, to tell anything about the model.
const FEW_WRITES: f64 = 64.0;

/// A state: the region that was the hottest; the number of regions when nothing was written.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct State {
    pub region: u16,
    pub samples: u16,
    /// States that followed, by their place in the list, and how often: the state's row of the transition matrix.
    pub next: Vec<(u16, u16)>,
    /// The working set, packed; empty: left out.
    pub working_set: Vec<u8>,
}

impl State {
    /// Earlier samples count half.
    fn fade(&mut self) {
        self.samples = self.samples.div_ceil(2);
        self.next.iter_mut().for_each(|(_, times)| *times = times.div_ceil(2));
    }
}

/// Takes samples and becomes a [`Model`].
#[derive(Debug)]
pub struct Builder {
    regions: Regions,
    bound: u64,
    interval: Duration,
    /// For each page the number of the sample in which it was written last; 0: in none.
    last: Vec<u8>,
    taken: u8,
    /// For each region, how many pages were written so many samples after they were written before; last, those not
    /// written before, by the sample.
    gaps: Vec<Vec<u32>>,
    firsts: Vec<Vec<u32>>,
    /// State and packed pages of the newest samples.
    samples: std::collections::VecDeque<(u16, Vec<u8>)>,
    packed_bytes: u64,
    states: Vec<State>,
    previous: Option<u16>,
    hits: Vec<u32>,
    /// What earlier migrations have left: how pages age, and which were written how long before their end.
    seen: Vec<Seen>,
    known: Ages,
}

impl Builder {
    /// For a guest whose pages lie below `bound`, `guest_pages` of which hold memory. `interval` is the time between
    /// samples.
    pub fn new(bound: u64, guest_pages: u64, interval: Duration) -> Builder {
        let regions = Regions::new(gaps::REGIONS, guest_pages, bound);
        Builder {
            regions,
            bound,
            interval,
            last: vec![0; usize::try_from(bound).unwrap_or(0)],
            taken: 0,
            gaps: vec![Vec::new(); regions.count()],
            firsts: vec![Vec::new(); regions.count()],
            samples: std::collections::VecDeque::new(),
            packed_bytes: 0,
            states: Vec::new(),
            previous: None,
            hits: vec![0; regions.count()],
            seen: Vec::new(),
            known: Ages::default(),
        }
    }

    /// Goes on with what is kept of the same guest.
    pub fn after(kept: Kept, interval: Duration) -> Builder {
        let mut builder = Builder::new(kept.bound, kept.bound, interval);
        builder.regions = kept.regions;
        let regions = kept.regions.count();
        builder.gaps.resize(regions, Vec::new());
        builder.firsts.resize(regions, Vec::new());
        builder.hits.resize(regions, 0);
        // States of samples of another length tell of something else.
        if kept.interval == interval {
            builder.states = kept.states;
            builder.states.iter_mut().for_each(State::fade);
        }
        (builder.seen, builder.known) = (kept.seen, kept.ages);
        builder
    }

    /// Whether the page was written in earlier migrations: how long it had not been written when this one began cannot be
    /// said.
    fn is_known(&self, page: u64) -> bool {
        usize::try_from(page).is_ok_and(|page| self.known.contains(page))
    }

    /// Takes the pages written in the next interval. False: the model has all the samples that it can take.
    pub fn sample(&mut self, written: &PageSet) -> bool {
        if u16::from(self.taken) >= MOST_SAMPLES {
            return false;
        }
        self.taken += 1;
        self.hits.fill(0);
        for page in written.iter().map(|pfn| pfn.get()) {
            let region = self.regions.of(page);
            if let Some(hits) = self.hits.get_mut(region) {
                *hits += 1;
            }
            let known = self.is_known(page);
            let Some(last) = usize::try_from(page).ok().and_then(|page| self.last.get_mut(page)) else {
                continue;
            };
            let before = std::mem::replace(last, self.taken);
            let (counts, at) = match before {
                0 if known => continue,
                0 => (&mut self.firsts, self.taken),
                last => (&mut self.gaps, self.taken - last),
            };
            if let Some(counts) = counts.get_mut(region) {
                count(counts, at.into());
            }
        }
        let state = self.enter(hottest(&self.hits));
        self.keep(state, packed::pack(written));
        true
    }

    /// Notes the transition to a region's state. Returns its place in the list.
    fn enter(&mut self, region: Option<usize>) -> u16 {
        let region = region.unwrap_or(self.regions.count()) as u16;
        let known = self.states.iter().position(|state| state.region == region);
        let index = known.unwrap_or_else(|| {
            self.states.push(State {
                region,
                samples: 0,
                next: Vec::new(),
                working_set: Vec::new(),
            });
            self.states.len() - 1
        });
        // One for each region at most, and the one of no writes.
        let place = index as u16;
        if let Some(state) = self.states.get_mut(index) {
            state.samples = state.samples.saturating_add(1);
        }
        let previous = self.previous.replace(place);
        if let Some(state) = previous.and_then(|previous| self.states.get_mut(usize::from(previous))) {
            match state.next.iter_mut().find(|(next, _)| *next == place) {
                Some((_, times)) => *times = times.saturating_add(1),
                None => state.next.push((place, 1)),
            }
        }
        place
    }

    /// Keeps a sample for the working sets. The oldest make room.
    fn keep(&mut self, state: u16, packed: Vec<u8>) {
        self.packed_bytes += packed.len() as u64;
        self.samples.push_back((state, packed));
        while self.packed_bytes > self.most_packed() {
            match self.samples.pop_front() {
                Some((_, old)) => self.packed_bytes -= old.len() as u64,
                None => break,
            }
        }
    }

    /// Of four bytes a page the ages have two, those before this migration one of them; samples have the third, working
    /// sets the fourth.
    fn most_packed(&self) -> u64 {
        self.bound
    }

    /// The model, once there are enough samples (with none, it says that nothing is written).
    pub fn finish(mut self) -> Model {
        let seconds = self.interval.as_secs_f64();
        let taken = self.taken;
        // How long ago each page was written, in place; how many pages of each region are how old.
        let mut ages = std::mem::take(&mut self.last);
        let mut alive = vec![vec![0u32; usize::from(taken) + 1]; self.regions.count()];
        for (page, age) in ages.iter_mut().enumerate() {
            let unknown = *age == 0 && self.is_known(page as u64);
            let region = alive.get_mut(self.regions.of(page as u64)).filter(|_| !unknown);
            let place = match *age {
                0 => usize::from(taken),
                last => usize::from(taken - last),
            };
            *age = if *age == 0 { NOT_WRITTEN } else { taken - *age };
            if let Some(pages) = region.and_then(|region| region.get_mut(place)) {
                *pages += 1;
            }
        }
        let mut seen = vec![Seen::default(); self.regions.count()];
        for (((seen, gaps), firsts), alive) in seen.iter_mut().zip(&self.gaps).zip(&self.firsts).zip(&alive) {
            each_count(gaps, |samples, pages| seen.aged(samples * seconds, pages, true));
            // Before they were written first these pages were of some unknown, higher age.
            each_count(firsts, |samples, pages| {
                seen.watched_old(samples * pages * seconds, pages)
            });
            if let Some((never, alive)) = alive.split_last() {
                each_count(alive, |samples, pages| seen.aged(samples * seconds, pages, false));
                seen.watched_old(f64::from(*never) * f64::from(taken) * seconds, 0.0);
            }
        }
        let seen = match self.seen.is_empty() {
            true => seen,
            false => {
                let mut all = Gaps::new(std::mem::take(&mut self.seen));
                all.learn(&seen);
                all.seen().to_vec()
            }
        };
        self.fill_working_sets();
        Model {
            regions: self.regions,
            bound: self.bound,
            interval: self.interval,
            samples: taken.into(),
            last: self.previous,
            ages,
            seen,
            states: self.states,
            known: self.known,
        }
    }

    /// The frequent pages of each state, the most frequent states first.
    fn fill_working_sets(&mut self) {
        let mut order: Vec<usize> = (0..self.states.len()).collect();
        order.sort_by_key(|index| std::cmp::Reverse(self.states.get(*index).map(|state| state.samples)));
        let sampled: std::collections::BTreeSet<u16> = self.samples.iter().map(|(state, _)| *state).collect();
        for state in sampled.into_iter().map(usize::from) {
            self.states
                .get_mut(state)
                .into_iter()
                .for_each(|state| state.working_set.clear());
        }
        let before: usize = self.states.iter().map(|state| state.working_set.len()).sum();
        let mut left = self.most_packed().saturating_sub(before as u64);
        // A count for each page, for one state at a time: the pages are gone through in parts, to stay within bounds.
        const PART: u64 = 1 << 16;
        for index in order {
            let sets: Vec<&[u8]> = self
                .samples
                .iter()
                .filter(|(state, _)| usize::from(*state) == index)
                .map(|(_, set)| set.as_slice())
                .collect();
            if sets.is_empty() {
                continue;
            }
            let frequent = sets.len().div_ceil(2).max(1);
            let mut working_set = PageSet::new(self.bound);
            let mut from = 0;
            while from < self.bound {
                let to = (from + PART).min(self.bound);
                let mut counts = vec![0u8; (to - from) as usize];
                for set in &sets {
                    let _ = packed::for_each_run(set, self.bound, |run| {
                        let (start, end) = (run.start.clamp(from, to) - from, run.end.clamp(from, to) - from);
                        let part = counts.get_mut(start as usize..end as usize).unwrap_or_default();
                        part.iter_mut().for_each(|count| *count = count.saturating_add(1));
                    });
                }
                let pages = counts
                    .iter()
                    .zip(from..)
                    .filter(|(count, _)| usize::from(**count) >= frequent);
                pages.for_each(|(_, page)| working_set.insert_run(page..page + 1));
                from = to;
            }
            let packed = packed::pack(&working_set);
            if let (Some(rest), Some(state)) = (left.checked_sub(packed.len() as u64), self.states.get_mut(index)) {
                left = rest;
                state.working_set = packed;
            }
        }
    }
}

/// Counts one more at a place; the list grows to it.
fn count(counts: &mut Vec<u32>, at: usize) {
    if counts.len() <= at {
        counts.resize(at + 1, 0);
    }
    if let Some(count) = counts.get_mut(at) {
        *count += 1;
    }
}

fn each_count(counts: &[u32], mut each: impl FnMut(f64, f64)) {
    let counted = counts.iter().enumerate().filter(|(_, pages)| **pages > 0);
    counted.for_each(|(samples, pages)| each(samples as f64, f64::from(*pages)));
}

/// The place of the largest number, the first among equals; `None`: all are 0.
fn hottest(hits: &[u32]) -> Option<usize> {
    let (index, most) = hits.iter().enumerate().rev().max_by_key(|(_, hits)| **hits)?;
    (*most > 0).then_some(index)
}

/// What is known of a guest's writes.
#[derive(Clone, Debug, PartialEq)]
pub struct Model {
    regions: Regions,
    bound: u64,
    interval: Duration,
    samples: u16,
    /// The state of the last sample.
    last: Option<u16>,
    /// For each page, how many samples before the end it was written last.
    ages: Vec<u8>,
    /// Of each region.
    seen: Vec<Seen>,
    states: Vec<State>,
    /// Of an earlier migration; empty: there was none.
    known: Ages,
}

/// How far the pages written in a time are from what the model expects.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Fit {
    pub expected_pages: f64,
    pub written_pages: u64,
    pub over: Duration,
    /// 0: as expected, region by region; 1: nothing is.
    pub deviation: f64,
}

impl Fit {
    /// Whether the model still holds: else it is to be dropped, or built anew (paper, section 3.3).
    pub fn holds(&self) -> bool {
        let few = self.expected_pages < FEW_WRITES && (self.written_pages as f64) < FEW_WRITES;
        few || self.over < SHORT || self.deviation <= MOST_DEVIATION
    }
}

impl Model {
    pub fn bound(&self) -> u64 {
        self.bound
    }

    pub fn interval(&self) -> Duration {
        self.interval
    }

    /// How long the guest was watched.
    pub fn watched(&self) -> Duration {
        self.interval * u32::from(self.samples)
    }

    pub fn regions(&self) -> Regions {
        self.regions
    }

    /// How many states were seen.
    pub fn states(&self) -> usize {
        self.states.len()
    }

    /// The states, and what is known of each page from earlier migrations.
    pub(super) fn into_parts(self) -> (Vec<State>, Ages) {
        (self.states, self.known)
    }

    /// How pages of each region age.
    pub fn gaps(&self) -> Gaps {
        Gaps::new(self.seen.clone())
    }

    /// How long before the model's end a page was written last; `None`: not while it was built.
    pub fn age(&self, page: u64) -> Option<Duration> {
        let age = usize::try_from(page).ok().and_then(|page| self.ages.get(page))?;
        (*age != NOT_WRITTEN).then(|| self.interval * u32::from(*age))
    }

    /// The state that the pages written in one interval stand for; `None`: one that was never seen.
    pub fn identify(&self, written: &PageSet) -> Option<u16> {
        let mut hits = vec![0u32; self.regions.count()];
        for pfn in written.iter() {
            if let Some(hits) = hits.get_mut(self.regions.of(pfn.get())) {
                *hits += 1;
            }
        }
        let region = hottest(&hits).unwrap_or(self.regions.count());
        let place = self.states.iter().position(|state| usize::from(state.region) == region);
        place.map(|place| place as u16)
    }

    /// The state of the last sample.
    pub fn last(&self) -> Option<u16> {
        self.last
    }

    /// The likeliest state after one; `None`: none ever followed.
    fn next(&self, state: u16) -> Option<u16> {
        let next = &self.states.get(usize::from(state))?.next;
        let (next, _) = next.iter().rev().max_by_key(|(_, times)| *times)?;
        Some(*next)
    }

    /// The pages of all working sets that are likeliest met within a time from a state on (paper, figure 3, lines 17–21).
    pub fn forecast(&self, from: u16, over: Duration) -> PageSet {
        let mut pages = PageSet::new(self.bound);
        let mut seen = vec![false; self.states.len()];
        let steps = over.as_nanos() / self.interval.as_nanos().max(1);
        let mut state = from;
        for _ in 0..steps {
            let Some(next) = self.next(state) else { break };
            state = next;
            let place = usize::from(state);
            match seen.get_mut(place) {
                // The likeliest way goes round from here.
                Some(seen) if *seen => break,
                Some(seen) => *seen = true,
                None => break,
            }
            if let Some(state) = self.states.get(place).filter(|state| !state.working_set.is_empty()) {
                let _ = packed::for_each_run(&state.working_set, self.bound, |run| pages.insert_run(run));
            }
        }
        pages
    }

    /// Holds the pages written in a time against the model: is as much written as it expects, and where?
    pub fn check(&self, written: &PageSet, over: Duration) -> Fit {
        let mut by_age = vec![[0u32; BINS]; self.regions.count()];
        for (page, age) in self.ages.iter().enumerate() {
            let age = match *age {
                NOT_WRITTEN => NEVER,
                age => self.interval.as_secs_f64() * f64::from(age),
            };
            let region = by_age.get_mut(self.regions.of(page as u64));
            if let Some(pages) = region.and_then(|region| region.get_mut(gaps::bin(age))) {
                *pages += 1;
            }
        }
        let mut found = vec![0.0; self.regions.count()];
        for pfn in written.iter() {
            if let Some(found) = found.get_mut(self.regions.of(pfn.get())) {
                *found += 1.0;
            }
        }
        let gaps = self.gaps();
        let (mut apart, mut all, mut expected_pages) = (0.0, 0.0, 0.0);
        for (region, (by_age, found)) in by_age.iter().zip(&found).enumerate() {
            let curve = gaps.curve(region);
            let ages = by_age.iter().enumerate().filter(|(_, pages)| **pages > 0);
            let expected: f64 = ages
                .map(|(bin, pages)| f64::from(*pages) * curve.written_within(gaps::typical(bin), over.as_secs_f64()))
                .sum();
            apart += (expected - found).abs();
            all += expected + found;
            expected_pages += expected;
        }
        Fit {
            expected_pages,
            written_pages: written.len(),
            over,
            deviation: if all > 0.0 { apart / all } else { 0.0 },
        }
    }
}

#[cfg(test)]
#[path = "model_tests.rs"]
mod tests;
