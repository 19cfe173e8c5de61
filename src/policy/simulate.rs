//! Strategies over a dirty trace: what each would have sent, and for how long the guest would have stood still.
//!
//! The model: writes of a sample take place at its end; a trace that is too short begins anew. A page takes the link
//! its 4096 bytes, uncompressed. xl makes its passes as it does (XEN.md says how: at most five, none of fewer than 50
//! pages but the last, bits cleared as each begins), the suspended guest's last pass ends it. Who stands between xl and
//! the link reads what it holds back through xl's pipe. Before the migration the guest runs for the time in which the
//! model is made, the same for all strategies. It may have been migrated before, by ours: then what that has left is known. A
//! daemon may have seen pages change before: then ours knows which.
use std::time::Duration;

use serde::Serialize;

use super::filter::{Filter, RECORD, is_last_pass};
use super::kept::Kept;
use super::model::{Builder, Model};
use super::rounds::{Hope, Look, RoundLimits, Rounds};
use super::trace::Trace;
use crate::page::{PAGE_SIZE, Pfn};
use crate::page_set::PageSet;

/// Bytes a second that xl writes and an agent reads through a pipe.
const PIPE: f64 = 1e9;

/// Pages that the pipe takes.
const PIPE_PAGES: usize = 16;

/// Time that the paper's filter waits for a sample in each round (section 5.2), the link idle.
const PAPER_WAIT: Duration = Duration::from_millis(60);

/// Pages released at a time.
const RELEASED: usize = 256;

/// What a run is given besides the trace.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Conditions {
    /// Of the link, in bytes a second.
    pub bytes_a_second: f64,
    /// For how long the model is made; zero: without one.
    pub model_time: Duration,
    /// Time between two peeks.
    pub peek_every: Duration,
    /// How long xl is held at the end of its passes.
    pub rounds: RoundLimits,
    /// Where in the trace the model begins.
    pub begins: Duration,
    /// The guest has been migrated before, from the trace's beginning on.
    pub known: bool,
    /// Which pages were written since the trace's beginning is known, in no order: what a daemon sees that reads the guest's memory.
    pub changing: bool,
}

impl Conditions {
    /// As a migration has them: two seconds for the model, and ten peeks a second for a GiB: a hundredth of the time where one
    /// takes a millisecond.
    pub fn usual(bytes_a_second: f64, guest_pages: u64) -> Conditions {
        let gib = guest_pages as f64 * PAGE_SIZE as f64 / f64::from(1 << 30);
        let peek_every = Duration::from_secs_f64(gib / 10.0);
        Conditions {
            bytes_a_second,
            model_time: Duration::from_secs(2),
            peek_every: peek_every.max(Duration::from_millis(50)),
            rounds: RoundLimits {
                rounds: 30,
                until: None,
                downtime: Duration::from_millis(300),
            },
            begins: Duration::ZERO,
            known: false,
            changing: false,
        }
    }

    /// The samples of a trace for the time before the migration begins.
    fn samples(&self, trace: &Trace, time: Duration) -> usize {
        (time.as_nanos() / trace.interval().as_nanos().max(1)) as usize
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Strategy {
    /// libxl's passes, all of them sent.
    Plain,
    /// Pages that are known to be written again in the pass are not sent.
    DirtyAgain,
    /// Ruan's data filter (figure 3), in xl's place.
    Paper,
    /// [`Filter`].
    Ours,
    /// Who knows the future: each page once, after its last write where there is time, and the best moment to suspend.
    Clairvoyant,
}

pub const STRATEGIES: [Strategy; 5] = [
    Strategy::Plain,
    Strategy::DirtyAgain,
    Strategy::Paper,
    Strategy::Ours,
    Strategy::Clairvoyant,
];

impl Strategy {
    pub fn name(self) -> &'static str {
        match self {
            Strategy::Plain => "plain",
            Strategy::DirtyAgain => "dirty-again",
            Strategy::Paper => "paper",
            Strategy::Ours => "xenfold",
            Strategy::Clairvoyant => "clairvoyant",
        }
    }
}

/// What a strategy did. Pages are numbers of pages; a repeat is every sending of a page after its first.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize)]
pub struct Outcome {
    pub guest_pages: u64,
    pub sent_pages: u64,
    pub repeat_pages: u64,
    /// Sent while the guest was suspended.
    pub stop_pages: u64,
    pub time_elapsed_ms: u64,
    pub downtime_ms: u64,
    /// Live passes.
    pub iteration: u32,
}

impl Outcome {
    /// What a strategy costs, in pages: those sent, and those of the stop phase again, for which the guest stood still.
    pub fn cost(&self) -> u64 {
        self.sent_pages + self.stop_pages
    }

    /// Cost above the clairvoyant's, in parts of the guest's pages.
    pub fn regret(&self, clairvoyant: &Outcome) -> f64 {
        let more = self.cost() as f64 - clairvoyant.cost() as f64;
        more / (self.guest_pages as f64).max(1.0)
    }
}

/// All strategies over one trace.
pub fn all(trace: &Trace, conditions: &Conditions) -> Vec<(Strategy, Outcome)> {
    let first = Conditions {
        begins: Duration::ZERO,
        known: false,
        changing: false,
        ..*conditions
    };
    let kept = conditions
        .known
        .then(|| ours(trace, &first, model(trace, &first, None)).1);
    let model = model(trace, conditions, kept);
    let mut done: Vec<(Strategy, Outcome)> = Vec::new();
    for strategy in STRATEGIES {
        let outcome = match strategy {
            Strategy::Plain => World::new(trace, conditions).xl(|_, _, _| Vec::new(), None),
            Strategy::DirtyAgain => dirty_again(trace, conditions),
            Strategy::Paper => paper(trace, conditions, model.as_ref()),
            Strategy::Ours => ours(trace, conditions, model.clone()).0,
            Strategy::Clairvoyant => {
                // No more time than plain takes: who waits long enough meets an idle moment.
                let most = done.first().map_or(0, |(_, plain)| plain.time_elapsed_ms);
                clairvoyant(trace, conditions, Duration::from_millis(most))
            }
        };
        done.push((strategy, outcome));
    }
    done
}

/// The model of the samples before the migration.
fn model(trace: &Trace, conditions: &Conditions, kept: Option<Kept>) -> Option<Model> {
    let samples = conditions.samples(trace, conditions.model_time).min(trace.len());
    let begins = conditions.samples(trace, conditions.begins);
    let is_known = kept.is_some();
    let mut builder = match kept {
        Some(kept) => Builder::after(kept, trace.interval()),
        None => Builder::new(trace.bound(), trace.guest_pages(), trace.interval()),
    };
    let wanted = (begins..begins + samples).map(|sample| trace.sample(sample % trace.len().max(1)));
    let taken = wanted.take_while(|written| builder.sample(written)).count();
    (taken > 0 || is_known).then(|| builder.finish())
}

/// The guest, the link and what has gone over it.
struct World<'a> {
    trace: &'a Trace,
    page_time: f64,
    pipe_time: f64,
    peek_every: f64,
    /// Seconds since the migration began.
    now: f64,
    /// The next sample, and when it ends.
    sample: usize,
    interval: f64,
    sample_ends: f64,
    /// Written since xl's pass began.
    dirty: PageSet,
    /// Not at the destination as it is now.
    stale: PageSet,
    sent: PageSet,
    /// How often each page was written.
    writes: Vec<u32>,
    /// Sent ahead of xl, which sends them once more: that costs a reference, if they have not changed.
    ahead: PageSet,
    sent_pages: u64,
    repeat_pages: u64,
    passes: u32,
    /// This pass of xl's is the last while the guest runs.
    last: bool,
}

type Hold<'h> = dyn FnMut(&mut World<'_>, &[Pfn], Option<&PageSet>) -> Vec<bool> + 'h;

impl<'a> World<'a> {
    fn new(trace: &'a Trace, conditions: &Conditions) -> World<'a> {
        let interval = trace.interval().as_secs_f64();
        let samples = conditions.samples(trace, conditions.begins + conditions.model_time);
        let mut stale = PageSet::new(trace.bound());
        stale.insert_run(0..trace.guest_pages());
        World {
            trace,
            page_time: PAGE_SIZE as f64 / conditions.bytes_a_second,
            pipe_time: PAGE_SIZE as f64 / PIPE,
            peek_every: conditions.peek_every.as_secs_f64(),
            now: 0.0,
            sample: samples % trace.len().max(1),
            interval,
            sample_ends: interval,
            dirty: PageSet::new(trace.bound()),
            stale,
            sent: PageSet::new(trace.bound()),
            writes: vec![0; usize::try_from(trace.bound()).unwrap_or(0)],
            ahead: PageSet::new(trace.bound()),
            sent_pages: 0,
            repeat_pages: 0,
            passes: 0,
            last: false,
        }
    }

    fn time(&self) -> Duration {
        Duration::from_secs_f64(self.now)
    }

    /// Lets time go by; the guest writes meanwhile.
    fn pass_time(&mut self, seconds: f64) {
        self.now += seconds;
        while self.sample_ends <= self.now {
            let (dirty, stale, writes) = (&mut self.dirty, &mut self.stale, &mut self.writes);
            self.trace.for_each_run(self.sample, |run| {
                let pages = writes.get_mut(run.start as usize..run.end as usize);
                pages.into_iter().flatten().for_each(|writes| *writes += 1);
                dirty.insert_run(run.clone());
                stale.insert_run(run);
            });
            self.sample = (self.sample + 1) % self.trace.len().max(1);
            self.sample_ends += self.interval;
        }
    }

    fn send(&mut self, pfn: Pfn) {
        self.sent_pages += 1;
        self.repeat_pages += u64::from(self.sent.contains(pfn));
        self.sent.insert(pfn);
        self.stale.remove(pfn);
    }

    fn send_live(&mut self, pages: &[Pfn]) {
        pages.iter().for_each(|pfn| self.send(*pfn));
        self.pass_time(pages.len() as f64 * self.page_time);
    }

    /// Suspends the guest and sends what is left.
    fn stop(mut self, left: &PageSet) -> Outcome {
        let (before, suspended) = (self.sent_pages, self.now);
        left.iter().for_each(|pfn| self.send(pfn));
        debug_assert!(
            self.stale.is_empty(),
            "{} pages are not as at the source",
            self.stale.len()
        );
        let stop_pages = self.sent_pages - before;
        let downtime = stop_pages as f64 * self.page_time;
        Outcome {
            guest_pages: self.trace.guest_pages(),
            sent_pages: self.sent_pages,
            repeat_pages: self.repeat_pages,
            stop_pages,
            time_elapsed_ms: ((suspended + downtime) * 1e3) as u64,
            downtime_ms: (downtime * 1e3) as u64,
            iteration: self.passes,
        }
    }

    /// xl's passes. `hold` answers for each record which pages are held back (none: an empty answer); it may send pages
    /// by itself. `held` is kept up to date for it where it is given.
    fn xl(
        mut self,
        mut hold: impl FnMut(&mut World<'_>, &[Pfn], Option<&PageSet>) -> Vec<bool>,
        held: Option<&HeldCell>,
    ) -> Outcome {
        let hold: &mut Hold<'_> = &mut hold;
        let own = HeldCell::new(PageSet::new(self.trace.bound()));
        let held = held.unwrap_or(&own);
        let mut list: Vec<Pfn> = self.stale.iter().collect();
        let mut peeked = 0.0;
        loop {
            self.passes += 1;
            self.last = is_last_pass(self.passes, list.len() as u64);
            for record in list.chunks(RECORD) {
                let peek = (self.now - peeked >= self.peek_every).then(|| self.dirty.clone());
                if peek.is_some() {
                    peeked = self.now;
                }
                let answers = hold(&mut self, record, peek.as_ref());
                let is_held = |index: usize| answers.get(index).copied().unwrap_or(false);
                let mut go = Vec::new();
                for (index, pfn) in record.iter().enumerate() {
                    if is_held(index) {
                        held.borrow_mut().insert(*pfn);
                    } else {
                        held.borrow_mut().remove(*pfn);
                        go.push(*pfn);
                    }
                }
                let held_here = record.len() - go.len();
                self.send_live(&go);
                self.pass_time(held_here as f64 * self.pipe_time);
            }
            if self.last {
                break;
            }
            list = self.dirty.iter().collect();
            self.dirty.clear();
        }
        let mut left = held.borrow().clone();
        left.union(&self.dirty);
        let ahead: Vec<Pfn> = self.ahead.iter().filter(|pfn| !self.stale.contains(*pfn)).collect();
        ahead.into_iter().for_each(|pfn| left.remove(pfn));
        self.stop(&left)
    }

    /// Sends held pages that were not written since the pass began and are expected to stay.
    fn release(&mut self, filter: &mut Filter, held: &mut PageSet) {
        loop {
            let released = filter.release(RELEASED);
            if released.is_empty() {
                return;
            }
            for pfn in &released {
                held.remove(*pfn);
                self.ahead.insert(*pfn);
            }
            self.send_live(&released);
        }
    }

    /// xl waits with the last record of its last live pass, of which `carried` go with it: pages go ahead of it.
    fn rounds(&mut self, limits: RoundLimits, filter: &mut Filter, carried: &[Pfn], mut held: PageSet) {
        let mut rounds = Rounds::new(limits, self.trace.bound());
        let mut looked = None;
        let wait = Duration::from_secs_f64(self.peek_every);
        loop {
            let outlook = filter.outlook(self.time());
            if !rounds.goes_on(self.time(), &outlook, wait) {
                break;
            }
            self.pass_time(self.peek_every);
            let dirty = self.dirty.clone();
            let quiet = filter.looked(self.time(), &dirty);
            let waiting = dirty.len();
            let pfns: Vec<Pfn> = dirty.iter().collect();
            if looked.is_none() {
                let stays = filter.stays(&pfns, Duration::ZERO, waiting);
                let mut all = dirty.clone();
                all.union(&held);
                let hope = Hope {
                    waiting: all.len(),
                    quiet,
                    stay: stays.iter().filter(|stays| **stays).count() as u64,
                };
                if !hope.is_any(&outlook, wait) {
                    return;
                }
            }
            self.release(filter, &mut held);
            let unchanged = looked.map_or(Duration::ZERO, |before| self.time().saturating_sub(before));
            looked = Some(self.time());
            rounds.begin();
            let mut full = 0;
            for pfns in pfns.chunks(RELEASED) {
                self.pass_time(pfns.len() as f64 * self.pipe_time);
                let (mut new, mut same) = (Vec::new(), Vec::new());
                for pfn in pfns {
                    let writes = self.writes.get(pfn.get() as usize).copied().unwrap_or(0);
                    if carried.binary_search(pfn).is_ok() {
                        full += 1;
                        continue;
                    }
                    match rounds.look(*pfn, writes) {
                        Look::New => new.push(*pfn),
                        Look::Same => same.push(*pfn),
                        Look::Changed => full += 1,
                        Look::There => {}
                    }
                }
                let mut go = Vec::new();
                for (list, unchanged) in [(&new, Duration::ZERO), (&same, unchanged)] {
                    let stays = filter.stays(list, unchanged, waiting);
                    go.extend(list.iter().zip(stays).filter(|(_, stays)| *stays).map(|(pfn, _)| *pfn));
                }
                full += new.len() + same.len() - go.len();
                for pfn in &go {
                    rounds.goes(*pfn);
                    self.ahead.insert(*pfn);
                }
                self.send_live(&go);
            }
            let outside = held.iter().filter(|pfn| !dirty.contains(*pfn)).count();
            let page = Duration::from_secs_f64(self.page_time);
            let again = (waiting as usize).saturating_sub(full) as f64;
            let took = looked.map_or(Duration::ZERO, |looked| self.time().saturating_sub(looked));
            let newly = filter.outlook(self.time()).dirty_pages_rate * took.as_secs_f64();
            rounds.end(
                (full + outside) as f64 + newly,
                page,
                again,
                Duration::from_secs_f64(self.pipe_time),
            );
        }
    }
}

/// Pages held, shared between xl's passes and who holds.
type HeldCell = std::cell::RefCell<PageSet>;

fn dirty_again(trace: &Trace, conditions: &Conditions) -> Outcome {
    let mut known = PageSet::new(trace.bound());
    let mut previous = None;
    let hold = |_: &mut World<'_>, record: &[Pfn], peek: Option<&PageSet>| {
        if previous.is_some_and(|previous| record.first().is_some_and(|first| *first <= previous)) {
            known.clear();
        }
        previous = record.last().copied();
        if let Some(peek) = peek {
            known = peek.clone();
        }
        record.iter().map(|pfn| known.contains(*pfn)).collect()
    };
    World::new(trace, conditions).xl(hold, None)
}

/// What came of it, and what it leaves for the next migration.
fn ours(trace: &Trace, conditions: &Conditions, model: Option<Model>) -> (Outcome, Kept) {
    let mut filter = Filter::new(model, trace.bound(), trace.guest_pages());
    filter.limit_downtime(conditions.rounds.downtime);
    if conditions.changing {
        let mut written = PageSet::new(trace.bound());
        let before = 0..conditions.samples(trace, conditions.begins);
        before.for_each(|sample| trace.for_each_run(sample % trace.len().max(1), |run| written.insert_run(run)));
        filter.expect_writes(&written);
    }
    let held = HeldCell::new(PageSet::new(trace.bound()));
    let mut peeked = Duration::ZERO;
    let hold = |world: &mut World<'_>, record: &[Pfn], peek: Option<&PageSet>| {
        if peek.is_some() {
            peeked = world.time();
        }
        let answers = filter.hold(world.time(), record, peek);
        // A page of this record that is released at once is held no more.
        let mut answers = answers;
        loop {
            let released = filter.release(RELEASED);
            if released.is_empty() {
                break;
            }
            let mut go = Vec::new();
            for pfn in released {
                match record.binary_search(&pfn) {
                    Ok(index) => {
                        answers.get_mut(index).into_iter().for_each(|answer| *answer = true);
                        held.borrow_mut().remove(pfn);
                    }
                    Err(_) => held.borrow_mut().remove(pfn),
                }
                go.push(pfn);
                // xl does not know that it went.
                world.ahead.insert(pfn);
            }
            world.send_live(&go);
            let bytes = world.sent_pages * PAGE_SIZE as u64;
            filter.sent(world.time(), world.sent_pages, bytes);
            if world.time() - peeked >= conditions.peek_every && record.len() > PIPE_PAGES {
                peeked = world.time();
                filter.peeked(peeked, &world.dirty);
            }
        }
        let bytes = world.sent_pages * PAGE_SIZE as u64;
        filter.sent(world.time(), world.sent_pages, bytes);
        // xl can be held only while more is left of its record than its pipe takes.
        if world.last && (PIPE_PAGES + 1..RECORD).contains(&record.len()) {
            let carries = |at: usize| answers.get(at) != Some(&true);
            let carried = record.iter().enumerate().filter(|(at, _)| carries(*at));
            let carried: Vec<Pfn> = carried.map(|(_, pfn)| *pfn).collect();
            let mut waiting = held.borrow().clone();
            let held_here = record.iter().enumerate().filter(|(at, _)| !carries(*at));
            for (_, pfn) in held_here {
                waiting.insert(*pfn);
            }
            world.rounds(conditions.rounds, &mut filter, &carried, waiting);
        }
        answers
    };
    let outcome = World::new(trace, conditions).xl(hold, Some(&held));
    (outcome, filter.learnt())
}

/// The paper's algorithm (figure 3) with xl's limits on passes: whole rounds are planned from the state of the last
/// sample and the likeliest states after it. A model that does not hold disables it (section 3.3).
fn paper(trace: &Trace, conditions: &Conditions, model: Option<&Model>) -> Outcome {
    let mut world = World::new(trace, conditions);
    let mut dirty = world.stale.clone();
    let mut filtered = PageSet::new(trace.bound());
    let mut enabled = model;
    let mut began = 0.0;
    loop {
        world.passes += 1;
        if world.passes > 1 {
            let over = Duration::from_secs_f64(world.now - began);
            enabled = enabled.filter(|model| model.check(&dirty, over).holds());
        }
        began = world.now;
        let last = is_last_pass(world.passes, dirty.len() + filtered.len());
        let mut list = dirty;
        list.union(&filtered);
        filtered.clear();
        if let Some(model) = enabled {
            world.pass_time(PAPER_WAIT.as_secs_f64());
            let before = (world.sample + trace.len() - 1) % trace.len().max(1);
            let state = model.identify(&trace.sample(before));
            let over = Duration::from_secs_f64(list.len() as f64 * world.page_time);
            let forecast = state.map(|state| model.forecast(state, over));
            let forecast = forecast.unwrap_or_else(|| PageSet::new(trace.bound()));
            for pfn in list.iter().filter(|pfn| forecast.contains(*pfn)) {
                filtered.insert(pfn);
            }
        }
        let go: Vec<Pfn> = list.iter().filter(|pfn| !filtered.contains(*pfn)).collect();
        go.chunks(RECORD).for_each(|pages| world.send_live(pages));
        dirty = std::mem::replace(&mut world.dirty, PageSet::new(trace.bound()));
        if last {
            break;
        }
    }
    dirty.union(&filtered);
    world.stop(&dirty)
}

/// The best that could be: for each moment to suspend, pages wait for the link from their last write before it on, and
/// those still waiting then are the stop phase's. The moment with the fewest of them is taken, and of those the first.
fn clairvoyant(trace: &Trace, conditions: &Conditions, most: Duration) -> Outcome {
    let world = World::new(trace, conditions);
    let (interval, guest_pages) = (world.interval, trace.guest_pages());
    let each = interval / world.page_time;
    // Pages by the sample in which they were written last; 0: before the migration.
    let mut last = vec![0u32; usize::try_from(trace.bound()).unwrap_or(0)];
    let mut pages = vec![guest_pages];
    let first = world.sample;
    let samples = (most.as_secs_f64() / interval).ceil().max(1.0) as u32;
    let mut best: Option<(f64, f64)> = None;
    for number in 0..=samples {
        if number > 0 {
            pages.push(0);
            let sample = (first + number as usize - 1) % trace.len().max(1);
            trace.for_each_run(sample, |run| {
                for last in last.get_mut(run.start as usize..run.end as usize).unwrap_or_default() {
                    if let Some(count) = pages.get_mut(*last as usize) {
                        *count = count.saturating_sub(1);
                    }
                    *last = number;
                    if let Some(count) = pages.get_mut(number as usize) {
                        *count += 1;
                    }
                }
            });
        }
        let waiting = pages.split_last().map_or(0.0, |(newest, before)| {
            let waiting = before
                .iter()
                .fold(0.0, |waiting: f64, pages| (waiting + *pages as f64 - each).max(0.0));
            waiting + *newest as f64
        });
        let time = f64::from(number) * interval + waiting * world.page_time;
        let fits = time <= most.as_secs_f64() || number == 0;
        if fits && best.is_none_or(|(fewest, _)| waiting < fewest - 0.5) {
            best = Some((waiting, time));
        }
    }
    let (waiting, time) = best.unwrap_or_default();
    Outcome {
        guest_pages,
        sent_pages: guest_pages,
        repeat_pages: 0,
        stop_pages: waiting as u64,
        time_elapsed_ms: (time * 1e3) as u64,
        downtime_ms: (waiting * world.page_time * 1e3) as u64,
        iteration: 0,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::policy::filter::LIVE_PASSES;
    use crate::policy::generate::{KINDS, Kind, generate};

    const PAGES: u64 = 1 << 15;

    /// 128 MiB over 100 Mbit/s take as long as a GiB over a fast link.
    fn outcomes(kind: Kind, seed: u64) -> Vec<Outcome> {
        let trace = generate(kind, PAGES, Duration::from_secs(20), seed).unwrap();
        let outcomes = all(&trace, &Conditions::usual(1e8 / 8.0, PAGES));
        outcomes.into_iter().map(|(_, outcome)| outcome).collect()
    }

    #[test]
    fn nothing_is_left_out_and_pages_add_up() {
        for (name, kind) in KINDS {
            for (outcome, strategy) in outcomes(kind, 3).iter().zip(STRATEGIES) {
                // That no page was left behind is checked where the guest stops.
                assert_eq!(outcome.sent_pages, PAGES + outcome.repeat_pages, "{name} {strategy:?}");
                assert!(outcome.stop_pages <= PAGES && outcome.iteration <= LIVE_PASSES);
                assert!(outcome.regret(outcome) == 0.0);
            }
        }
    }

    #[test]
    fn write_loops_are_hardly_sent_twice() {
        for kind in [Kind::Loop(20), Kind::Loop(40)] {
            let all = outcomes(kind, 5);
            let (plain, ours) = (all[0], all[3]);
            assert!(
                ours.repeat_pages * 10 <= plain.repeat_pages,
                "{kind}: {ours:?} {plain:?}"
            );
            assert!(ours.sent_pages * 10 <= PAGES * 12, "{kind}: {ours:?}");
            assert!(
                ours.downtime_ms * 20 <= plain.downtime_ms * 21,
                "{kind}: {ours:?} {plain:?}"
            );
            assert!(ours.time_elapsed_ms <= plain.time_elapsed_ms);
        }
    }

    /// A guest that writes so many percent of its memory in a circle, once in so many seconds.
    fn circle(percent: u64, seconds: u64) -> Trace {
        let mut trace = Trace::new(PAGES, PAGES, Duration::from_millis(50)).unwrap();
        let (all, first) = (PAGES * percent / 100, PAGES / 4);
        let each = all / (seconds * 20);
        for sample in 0..100 * 20 {
            let mut written = PageSet::new(PAGES);
            let at = first + sample * each % all;
            written.insert_run(at..at + each);
            trace.push(&written);
        }
        trace
    }

    #[test]
    fn slow_write_loops_are_hardly_sent_twice_when_they_are_known() {
        for (percent, seconds) in [(20, 13), (40, 13)] {
            let trace = circle(percent, seconds);
            let first = Conditions::usual(1e8 / 8.0, PAGES);
            let second = Conditions {
                known: true,
                begins: Duration::from_secs(43),
                ..first
            };
            let watched = Conditions {
                changing: true,
                known: false,
                ..second
            };
            let avoided = |conditions| {
                let all = all(&trace, conditions);
                let (plain, ours) = (all[0].1, all[3].1);
                assert!(ours.downtime_ms <= plain.downtime_ms + 200, "{ours:?} {plain:?}");
                1.0 - ours.repeat_pages as f64 / plain.repeat_pages as f64
            };
            let (before, after, watched) = (avoided(&first), avoided(&second), avoided(&watched));
            assert!(
                after >= 0.9 && before < 0.8 && watched >= 0.9,
                "{percent} %, {seconds} s: {before} {after} {watched}"
            );
        }
    }

    #[test]
    fn what_is_known_and_does_not_hold_any_more_does_no_harm() {
        // The guest was busy at first, and is idle now.
        let mut trace = Trace::new(PAGES, PAGES, Duration::from_millis(50)).unwrap();
        let busy = circle(40, 5);
        for sample in 0..60 * 20 {
            match sample < 30 * 20 {
                true => trace.push(&busy.sample(sample)),
                false => trace.push(&PageSet::new(PAGES)),
            }
        }
        let conditions = Conditions {
            known: true,
            begins: Duration::from_secs(35),
            ..Conditions::usual(1e8 / 8.0, PAGES)
        };
        let ours = all(&trace, &conditions)[3].1;
        assert_eq!((ours.sent_pages, ours.repeat_pages), (PAGES, 0));
        assert!(ours.downtime_ms < 20, "{ours:?}");
    }

    #[test]
    fn pages_that_stay_go_ahead_of_xl() {
        // 3000 pages are written in each second, always others, and 100 all the time: what one pass leaves is mostly quiet.
        let mut trace = Trace::new(PAGES, PAGES, Duration::from_millis(50)).unwrap();
        for sample in 0..400u64 {
            let mut written = PageSet::new(PAGES);
            let first = 1000 + sample * 150 % (PAGES - 2000);
            written.insert_run(first..first + 150);
            written.insert_run(0..100);
            trace.push(&written);
        }
        let usual = Conditions::usual(2e7, PAGES);
        let none = RoundLimits {
            rounds: 0,
            ..usual.rounds
        };
        let without = all(&trace, &Conditions { rounds: none, ..usual })[3].1;
        let with = all(&trace, &usual)[3].1;
        assert!(with.downtime_ms * 4 <= without.downtime_ms * 3, "{with:?} {without:?}");
        assert!(with.stop_pages < without.stop_pages && with.time_elapsed_ms <= without.time_elapsed_ms * 3 / 2);
    }

    #[test]
    fn an_idle_guest_is_sent_as_ever() {
        let all = outcomes(Kind::Idle, 5);
        assert!(all[3].repeat_pages <= all[0].repeat_pages);
        assert!(all[3].stop_pages < 200, "{:?}", all[3]);
        assert!(all[3].time_elapsed_ms <= all[0].time_elapsed_ms * 101 / 100);
    }

    #[test]
    fn plain_makes_the_passes_that_xl_makes() {
        // 600 pages over and over: a pass of all, four of those, and the last.
        let mut trace = Trace::new(4096, 4096, Duration::from_millis(50)).unwrap();
        let mut written = PageSet::new(4096);
        written.insert_run(0..600);
        trace.push(&written);
        let conditions = Conditions {
            model_time: Duration::ZERO,
            ..Conditions::usual(1e7, 4096)
        };
        let outcomes = all(&trace, &conditions);
        let plain = outcomes[0].1;
        assert_eq!((plain.iteration, plain.sent_pages), (5, 4096 + 5 * 600));
        assert_eq!((plain.repeat_pages, plain.stop_pages), (5 * 600, 600));
        assert_eq!(plain.downtime_ms, 245);
        let best = outcomes[4].1;
        assert_eq!((best.sent_pages, best.stop_pages), (4096, 600));
    }
}
