//! Which pages are held back while the guest runs, and which of those are sent after all.
//!
//! Holding a page is always safe (whoever holds sends it in the end) but not always right: one that is not written again
//! and is still held when the guest is suspended makes the downtime longer; one that was sent and is written again is
//! sent twice. The filter weighs the two:
//!
//! 1. A page that is known to be written since xl's pass began is held: xl sends it again.
//! 2. In every pass a page is held when it is likely written again before the suspend ([`super::gaps`]); quiet pages go
//!    first that way, whatever their place in memory. In the first pass less is enough for that, and for a page that was seen
//!    written before the migration nothing more is needed. Of a guest that goes round those wait that are due next, and all of
//!    its circle until it is found in it ([`Circle`]).
//! 3. At the end of each pass but the first, held pages that have turned quiet are released.
//! 4. At the end of the last pass, or of one that leaves so little that xl's next is the last, all that is held and is
//!    worth it is released, the quietest first and the hottest last, so that each is exposed for as short as can be.
//!
//! xl sends a record with fewer than [`RECORD`] pages only as the last of a pass (the first pass, which takes in holes,
//! excepted), and that is how the end is known while xl still waits for its record to be read.
//!
//! What is known comes from a [`Model`] made before the migration, if there is one and it holds, from earlier migrations
//! ([`Known`]), from whoever has seen pages change since ([`Filter::expect_writes`]), from peeks, and from the order in which a
//! guest writes that goes round ([`Circle`]).
//! Memory: 8 bytes and 4 bits for each page below the bound, 4 bytes for each written without a place in the order, and
//! what is left of the model: its regions and working sets.
mod earlier;

use std::time::Duration;

use super::circle::Circle;
use super::gaps::{self, BINS, Gaps, REGIONS, Regions, Seen};
use super::hold::Outlook;
use super::known::Known;
use super::model::{Model, State};
use super::rate::{Pace, Rate};
use super::written::{Forecast, LastWrites, Shown, Written};
use crate::page::Pfn;
use crate::page_set::{PageSet, bits_of};

/// The time between samples where there were none: as long as any.
const UNSAMPLED: Duration = Duration::from_millis(50);

/// Pages of a full record (MAX_BATCH_SIZE in xg_sr_common.h).
pub const RECORD: usize = 1024;

/// Live passes that xl makes at most, and dirty pages with which it stops earlier (SPP_MAX_ITERATIONS and
/// SPP_TARGET_DIRTY_COUNT in xg_sr_save.c).
pub const LIVE_PASSES: u32 = 5;
pub const FEW_DIRTY: u64 = 50;

/// Whether a pass of so many pages is xl's last over the running guest.
pub fn is_last_pass(pass: u32, pages: u64) -> bool {
    pass >= LIVE_PASSES || pass > 1 && pages < FEW_DIRTY
}

/// A page likelier to be written again than this is held, and so one of which as many writes are expected as that means.
const HOLD: f64 = 0.3;
const HOLD_WRITES: f64 = 0.356_674_943_938_732_4;

/// The same in the first pass, in writes: one that is held in vain has all later passes to go in.
const HOLD_FIRST: f64 = 0.12;

/// Where fewer of the pages are still as they were, a page's last write in a pass may have been any time after its first.
const STILL: f64 = 0.3;

/// What a page less in the stop phase is worth, in pages sent.
const STOP_WORTH: f64 = 2.0;

/// How much time peeks cover together before the curves learn from them.
const LEARN_EVERY: f64 = 0.5;

/// The shortest time ahead that is reckoned with, in seconds.
const SOON: f64 = 0.05;

/// Where more than this share of writes is not where it is expected, what the model said is forgotten.
const MOST_DEVIATION: f64 = 0.5;

/// Writes that a peek must show, or was expected to, before that is judged.
const FEW_WRITES: f64 = 256.0;

/// Heat classes that held pages are sorted into.
const HEATS: usize = 64;

/// Parts of the sorted pages that are chosen whole or not.
const PARTS: usize = 64;

/// The decision maker of one migration. Times are since its start and never go back.
#[derive(Debug)]
pub struct Filter {
    bound: u64,
    guest_pages: u64,
    regions: Regions,
    gaps: Gaps,
    /// Whether what is known stems from a model that has not been refuted.
    modelled: bool,
    /// Of earlier migrations, as long as it holds.
    known: Option<Known>,
    /// The order in which the guest writes, of earlier migrations or of this one.
    circle: Option<Circle>,
    /// Only to be kept: the model's states, and the time between its samples.
    states: Vec<State>,
    interval: Duration,
    /// Added to times, so that ages from before the migration have a time.
    past_ms: u32,
    /// When each page was written last.
    last: LastWrites,
    /// When each was written first, in quarters of a second from 1, up to four hours; 0: it was not. That is the order in which a guest writes its
    /// pages that goes round once in the first pass, and goes on where it was in the next.
    first: Vec<u16>,
    /// The pass under way, from 1; 0: none yet.
    pass: u32,
    pass_began: f64,
    /// When the pass before began, and its last peek.
    before_began: f64,
    before_peeked: f64,
    /// Offered by xl in this pass so far, and how fast.
    offered: u64,
    pace: Pace,
    previous: Option<Pfn>,
    /// Whether the pass under way can be the last live one.
    may_be_last: bool,
    /// How long the guest may stand still.
    downtime: Duration,
    /// Written since the pass began, as far as is known.
    dirty: PageSet,
    /// The time of all that knowledge: of the last peek, or when the pass began. What has been written since is not known,
    /// so pages are as old as they were then.
    peeked: f64,
    /// Newly dirty pages a second, at the last peek.
    dirtying: f64,
    shown: Shown,
    /// Of each region, writes that were expected and that were seen, in so many seconds.
    judged: Vec<(f64, f64)>,
    judged_seconds: f64,
    held: PageSet,
    held_pages: u64,
    /// Pages held or dirty at the last peek.
    waiting_pages: u64,
    /// To be released, the last one first.
    queue: Vec<Pfn>,
    rate: Rate,
    forecast: Forecast,
}

impl Filter {
    /// `model`: of this guest, `None` when there is none. The guest's pages lie below `pages_bound`; `guest_pages` of
    /// them hold memory.
    pub fn new(model: Option<Model>, pages_bound: u64, guest_pages: u64) -> Filter {
        let guest_pages = guest_pages.min(pages_bound);
        let mut last = LastWrites::unknown(pages_bound);
        let mut first = vec![0; usize::try_from(pages_bound).unwrap_or(0)];
        let model = model.filter(|model| model.bound() == pages_bound);
        let past_ms = model.as_ref().map_or(0, |model| model.watched().as_millis() as u32);
        if let Some(model) = &model {
            for (page, first) in (0..).zip(&mut first) {
                if let (Some(pfn), Some(age)) = (Pfn::new(page), model.age(page)) {
                    let written = Written::at((model.watched().saturating_sub(age)).as_secs_f64());
                    last.set(pfn, written);
                    *first = written.time().map_or(0, quarter);
                }
            }
        }
        let regions = model.as_ref().map(Model::regions);
        let regions = regions.unwrap_or_else(|| Regions::new(REGIONS, guest_pages, pages_bound));
        let gaps = model.as_ref().map(Model::gaps);
        let (modelled, interval) = (model.is_some(), model.as_ref().map_or(UNSAMPLED, Model::interval));
        let (states, known) = model.map(Model::into_parts).unwrap_or_default();
        let mut filter = Filter {
            bound: pages_bound,
            guest_pages,
            regions,
            gaps: gaps.unwrap_or_else(|| Gaps::unknown(regions.count())),
            modelled,
            known: None,
            circle: None,
            states,
            interval,
            past_ms,
            first,
            last,
            pass: 0,
            pass_began: 0.0,
            before_began: 0.0,
            before_peeked: 0.0,
            offered: 0,
            pace: Pace::default(),
            previous: None,
            may_be_last: false,
            downtime: Duration::MAX,
            dirty: PageSet::new(pages_bound),
            peeked: 0.0,
            dirtying: 0.0,
            shown: Shown::default(),
            judged: Vec::new(),
            judged_seconds: 0.0,
            held: PageSet::new(pages_bound),
            held_pages: 0,
            waiting_pages: 0,
            queue: Vec::new(),
            forecast: Forecast::default(),
            rate: Rate::default(),
        };
        filter.remember(known);
        filter
    }

    /// More is not held, as far as can be seen, than goes in this time while the guest is suspended. Without a limit only xl's
    /// last pass is seen to.
    pub fn limit_downtime(&mut self, limit: Duration) {
        self.downtime = limit;
    }

    /// The pass under way, from 1.
    pub fn pass(&self) -> u32 {
        self.pass
    }

    /// Pages held back.
    pub fn held_pages(&self) -> u64 {
        self.held_pages
    }

    /// Whether the model made before the migration was given, fits the guest, and has not been refuted by a peek.
    pub fn model_holds(&self) -> bool {
        self.modelled
    }

    /// A record of a live pass came, with these page numbers in xl's order: all of them, also those without data. Says
    /// for each whether its bytes are to be held back.
    ///
    /// `peek`: the bits read since this record's page numbers were, if any were: pages written since xl's pass began.
    /// Older ones are remembered as long as they mean anything. Not to be called once the guest is suspended.
    pub fn hold(&mut self, now: Duration, pfns: &[Pfn], peek: Option<&PageSet>) -> Vec<bool> {
        let now = self.time(now);
        let (first, last) = (pfns.first().copied(), pfns.last().copied());
        if self.pass == 0 || first.is_some_and(|first| self.previous.is_some_and(|previous| first <= previous)) {
            self.begin_pass(now, pfns.len());
        }
        self.previous = last.or(self.previous);
        if let Some(peek) = peek {
            self.see(now, peek);
        }
        self.pace.record(now, pfns.len());
        let ahead = self.ahead();
        let drained = self.drained();
        if let Some(circle) = &mut self.circle {
            // A page that is held in vain in the first pass has all later ones to go in, whose time is not known yet. In those it has
            // the pass's end, until when the guest's place may be found.
            match self.pass > 1 && circle.has_place() {
                true => circle.ask(self.peeked, drained),
                false => circle.ask_for_all(),
            }
        }
        self.offered += pfns.len() as u64;
        let answers = pfns.iter().map(|pfn| self.hold_one(ahead, *pfn)).collect();
        if self.pass > 1 && pfns.len() < RECORD {
            self.end_pass(now);
        }
        answers
    }

    fn time(&self, now: Duration) -> f64 {
        now.as_secs_f64() + f64::from(self.past_ms) / 1e3
    }

    fn begin_pass(&mut self, now: f64, pages: usize) {
        self.learn();
        log::debug!(
            "pass {} ends after {} pages and {:.1} s: {} held, {} seen written",
            self.pass,
            self.offered,
            now - self.pass_began,
            self.held_pages,
            self.dirty.len()
        );
        self.pass += 1;
        self.may_be_last = is_last_pass(self.pass, pages as u64);
        if self.pass > 1 {
            self.forecast.pass_ended(self.pass_began, now);
        }
        self.before_began = self.pass_began;
        self.before_peeked = self.peeked.max(self.pass_began);
        self.pass_began = now;
        self.offered = 0;
        self.previous = None;
        // What was dirty is what xl offers now.
        self.waiting_pages = self.held_or_dirty();
        self.dirty.clear();
        if self.pass > 1 && self.circle.as_ref().is_none_or(Circle::is_outdated) {
            self.circle = None;
            let mut circle = Circle::of(&self.first);
            circle.take_in(self.last.earlier().map(|pfn| pfn.get() as usize));
            self.circle = Some(circle);
        }
        self.circle.iter_mut().for_each(|circle| circle.pass_began(now));
        self.queue.clear();
        // What was read before tells of the pass before.
        self.peeked = self.peeked.max(now);
    }

    fn hold_one(&mut self, ahead: f64, pfn: Pfn) -> bool {
        if pfn.get() >= self.bound {
            return false;
        }
        let mut last = self.last.get(pfn);
        let region = self.regions.of(pfn.get());
        let curve = self.gaps.curve(region);
        let dirty = self.dirty.contains(pfn);
        if self.pass > 1 && !dirty {
            // xl offers it, so it was written in the pass before. When it was first is known to that pass's peeks, if at
            // all; it may have been written again since.
            let first = last.time().filter(|first| *first >= self.before_began);
            let first = first.unwrap_or((self.before_peeked + self.pass_began) / 2.0);
            if let Some(earliest @ 0) = self.first.get_mut(pfn.get() as usize) {
                *earliest = quarter(first);
            }
            last = match curve.unwritten_since(self.pass_began - first) < STILL {
                true => Written::sometime_before(self.pass_began),
                false => Written::at(first),
            };
            self.last.set(pfn, last);
        }
        let usual = self.forecast.expected(last, curve, region, self.peeked, ahead);
        let circle = self.circle.as_ref();
        let expected = circle.map_or(usual, |circle| circle.expect(pfn.get() as usize, usual));
        let enough = if self.pass == 1 { HOLD_FIRST } else { HOLD_WRITES };
        let hold = dirty || expected > enough || self.pass == 1 && last == Written::EARLIER;
        if hold != self.held.contains(pfn) {
            if hold {
                self.held.insert(pfn);
                self.held_pages += 1;
            } else {
                self.held.remove(pfn);
                self.held_pages = self.held_pages.saturating_sub(1);
            }
        }
        self.rate.held += u64::from(hold);
        hold
    }

    /// Seconds until the suspend, as far as can be said: what is left of the first pass and is not hot has to be sent, all of it
    /// read, and some of what is held sent then.
    fn ahead(&self) -> f64 {
        let held = self.held_pages as f64 / 2.0 / self.rate.pages;
        let first_pass = if self.pass == 1 {
            let left = self.guest_pages.saturating_sub(self.offered) as f64;
            let hot = self.held_pages as f64 / (self.offered as f64).max(1.0);
            let pace = self.pace.pages.unwrap_or(f64::INFINITY).max(1.0);
            (left * (1.0 - hot / 2.0) / self.rate.pages).max(left / pace)
        } else {
            0.0
        };
        (first_pass + held).max(SOON)
    }

    /// Seconds until all that is held or dirty has gone: what the guest comes to before is better sent after that. In the last pass
    /// xl sends what is dirty from the suspended guest.
    fn drained(&self) -> f64 {
        let pages = match self.may_be_last {
            true => self.held_pages,
            false => self.waiting_pages.max(self.held_pages),
        };
        (pages as f64 / self.rate.pages).max(SOON)
    }

    /// Pages that are held or dirty, or both.
    fn held_or_dirty(&self) -> u64 {
        let both = self.held.words().iter().zip(self.dirty.words());
        both.map(|(held, dirty)| u64::from((held | dirty).count_ones())).sum()
    }

    /// The time until the suspend, as far as can be said.
    pub fn left(&self) -> Duration {
        Duration::try_from_secs_f64(self.ahead()).unwrap_or(Duration::MAX)
    }

    /// Takes in what was written since the pass began. That costs as much as there are pages newly written.
    fn see(&mut self, now: f64, peek: &PageSet) {
        let from = self.peeked.max(self.pass_began);
        let seconds = now - from;
        let middle = (now + from) / 2.0;
        if self.shown.is_empty() {
            self.shown = Shown::new(from, self.regions.count());
        }
        let mut newly = 0;
        let words = peek.words().iter().zip(self.dirty.words());
        for ((new, old), first) in words.zip((0..self.bound).step_by(64)) {
            for page in bits_of(new & !old)
                .map(|bit| first + bit)
                .filter(|page| *page < self.bound)
            {
                let Some(pfn) = Pfn::new(page) else { break };
                self.shown.count(self.regions.of(page), self.last.get(pfn), 1, 1);
                if let Some(circle) = &mut self.circle {
                    circle.written(page as usize);
                }
                if let Some(first @ 0) = self.first.get_mut(page as usize) {
                    *first = quarter(middle);
                }
                self.last.set(pfn, Written::at(middle));
                newly += 1;
            }
        }
        self.circle.iter_mut().for_each(|circle| circle.looked(from, seconds));
        self.dirty.union(peek);
        self.waiting_pages = self.held_or_dirty();
        self.peeked = now;
        if seconds >= SOON / 2.0 {
            self.dirtying = f64::from(newly) / seconds;
        }
        if now - self.shown.from >= LEARN_EVERY {
            self.learn();
        }
    }

    /// Learns from what was written and what was not since it learnt last in this pass. That goes over all pages whose last write has a
    /// time.
    fn learn(&mut self) {
        let mut shown = std::mem::take(&mut self.shown);
        let (from, seconds) = (shown.from, self.peeked - shown.from);
        if shown.is_empty() || seconds < SOON / 2.0 {
            return;
        }
        self.last.count_unwritten(&self.dirty, &self.regions, &mut shown);
        self.compare(seconds, &shown.counts);
        let mut seen = vec![Seen::default(); self.regions.count()];
        for (region, (seen, counts)) in seen.iter_mut().zip(&shown.counts).enumerate() {
            let curve = self.gaps.curve(region);
            for (bin, (pages, written)) in counts.iter().enumerate().filter(|(_, (pages, _))| *pages > 0) {
                let (pages, written) = (f64::from(*pages), f64::from(*written));
                match bin + 1 {
                    BINS => seen.watched_old((pages - written / 2.0) * seconds, written),
                    _ => seen.watched(curve, gaps::typical(bin), seconds, pages, written),
                }
            }
        }
        self.gaps.learn(&seen);
        self.weigh(from, seconds, &shown.earlier);
        self.forecast.forget();
    }

    /// Drops the model where peeks show something else: the guest has changed its ways, and what comes counts more. Peeks are judged
    /// together until they cover a second: in less a guest does not write everywhere it writes.
    fn compare(&mut self, seconds: f64, counts: &[[(u32, u32); BINS]]) {
        if !self.modelled {
            return;
        }
        self.judged.resize(self.regions.count(), (0.0, 0.0));
        self.judged_seconds += seconds;
        for (region, (counts, judged)) in counts.iter().zip(&mut self.judged).enumerate() {
            let curve = self.gaps.curve(region);
            for (bin, (pages, written)) in counts.iter().enumerate().filter(|(_, (pages, _))| *pages > 0) {
                judged.0 += f64::from(*pages) * curve.written_within(gaps::typical(bin), seconds);
                judged.1 += f64::from(*written);
            }
        }
        if self.judged_seconds < 1.0 {
            return;
        }
        let sums = |(apart, all): (f64, f64), (expected, written): &(f64, f64)| {
            (apart + (expected - written).abs(), all + expected + written)
        };
        let (apart, all) = self.judged.iter().fold((0.0, 0.0), sums);
        // Hundredths of the guest are not worth a judgement.
        let few = FEW_WRITES.max(self.guest_pages as f64 / 100.0);
        if all > 2.0 * few && apart / all > MOST_DEVIATION {
            let all_expected: f64 = self.judged.iter().map(|(expected, _)| expected).sum();
            log::debug!(
                "the model of writes does not hold: {apart:.0} of {all:.0} pages are not as expected ({all_expected:.0} expected)"
            );
            self.modelled = false;
            self.gaps.doubt();
        }
        self.judged.clear();
        self.judged_seconds = 0.0;
    }

    /// Queues what is to be released now that xl waits with the last record of a pass.
    fn end_pass(&mut self, now: f64) {
        let ahead = (self.held_pages as f64 / 2.0 / self.rate.pages).max(SOON);
        let drained = self.drained();
        self.circle
            .iter_mut()
            .for_each(|circle| circle.ask(self.peeked, drained));
        let mut heats: Vec<Vec<(Pfn, f32)>> = vec![Vec::new(); HEATS];
        for pfn in self.held.iter().filter(|pfn| !self.dirty.contains(*pfn)) {
            let region = self.regions.of(pfn.get());
            let (last, curve) = (self.last.get(pfn), self.gaps.curve(region));
            let usual = self.forecast.expected(last, curve, region, self.peeked, ahead);
            let circle = self.circle.as_ref();
            let expected = circle.map_or(usual, |circle| circle.expect(pfn.get() as usize, usual));
            if let Some(heat) = heats.get_mut(heat(expected)) {
                heat.push((pfn, (expected / ahead) as f32));
            }
        }
        // Pages and the writes a second that each expects, the quietest first.
        let sorted: Vec<(Pfn, f32)> = heats.into_iter().flatten().collect();
        let is_last = self.may_be_last || self.next_is_last(now, &sorted);
        let chosen = if is_last {
            worth_releasing(&sorted, self.rate.pages)
        } else {
            let quiet = |writes: f32| f64::from(writes) * ahead < HOLD_WRITES;
            sorted.iter().take_while(|(_, writes)| quiet(*writes)).count()
        };
        log::debug!(
            "{chosen} of {} quiet held pages are to go in pass {}, which had {} pages; the last one: {is_last}",
            sorted.len(),
            self.pass,
            self.offered
        );
        self.queue = sorted.iter().take(chosen).map(|(pfn, _)| *pfn).collect();
        self.queue.reverse();
    }

    /// Whether so little has been written in this pass that xl makes the next one its last, and the guest would stand still for
    /// too long with what is held: xl is through with such a pass before much can go. `held`: pages and the writes a second that
    /// each expects.
    fn next_is_last(&self, now: f64, held: &[(Pfn, f32)]) -> bool {
        let lasted = now - self.pass_began;
        let unseen: f64 = held
            .iter()
            .map(|(_, writes)| (f64::from(*writes) * lasted).min(1.0))
            .sum();
        let dirty = self.dirty.len() as f64 + unseen;
        dirty < FEW_DIRTY as f64 && self.expected_downtime_at(self.peeked) > self.downtime
    }

    /// Pages that were held and are to be sent now from the guest's frames, at most `limit` of them, in the order in
    /// which they are to go. To be called after [`Filter::hold`], before the record's body has been read to its end, and
    /// again until it gives none: xl must not go on before they are sent. They are no longer held for the filter.
    pub fn release(&mut self, limit: usize) -> Vec<Pfn> {
        let mut released = Vec::new();
        while let Some(pfn) = (released.len() < limit).then(|| self.queue.pop()).flatten() {
            if self.held.contains(pfn) && !self.dirty.contains(pfn) {
                self.held.remove(pfn);
                self.held_pages = self.held_pages.saturating_sub(1);
                released.push(pfn);
            }
        }
        released
    }

    /// Takes in what was written since the pass began, between two records or while held pages are released: those that are dirty
    /// by now stay.
    pub fn peeked(&mut self, now: Duration, peek: &PageSet) {
        let now = self.time(now);
        let had_place = self.has_place();
        self.see(now, peek);
        // Which of those that wait are due has only now been seen (in the first pass none is released). Where it is not known any more, what
        // was seen is still the best guess.
        if self.pass > 1 && !had_place && self.has_place() {
            self.end_pass(now);
        }
    }

    /// Whether it is known where in its circle the guest is.
    fn has_place(&self) -> bool {
        self.circle.as_ref().is_some_and(Circle::has_place)
    }

    /// What has gone to the link by now, since the migration's start: guest pages, and bytes on the wire.
    pub fn sent(&mut self, now: Duration, pages: u64, wire_bytes: u64) {
        self.rate.sent(now.as_secs_f64(), pages, wire_bytes);
    }

    /// Takes in what was written since the pass began, with xl waiting at its end. Returns how many pages are to be released
    /// now.
    pub fn looked(&mut self, now: Duration, peek: &PageSet) -> u64 {
        let now = self.time(now);
        self.see(now, peek);
        self.learn();
        self.end_pass(now);
        self.queue.len() as u64
    }

    /// Whether each of these pages is likely to stay as it is for as long as half of `waiting` pages take the link. They have
    /// been written since the pass began, maybe more than once, but not in the time `unchanged` before the last peek.
    pub fn stays(&mut self, pfns: &[Pfn], unchanged: Duration, waiting: u64) -> Vec<bool> {
        let ahead = (waiting as f64 / 2.0 / self.rate.pages).max(SOON);
        let unchanged = unchanged.as_secs_f64();
        let one = |pfn: &Pfn| {
            let curve = self.gaps.curve(self.regions.of(pfn.get()));
            let first = self.last.get(*pfn).time().unwrap_or(self.pass_began);
            let span = self.peeked - first - unchanged;
            let expected = match span > 0.0 {
                true => curve.expected_sometime(unchanged, span, ahead),
                false => curve.expected((self.peeked - first).max(0.0), ahead),
            };
            1.0 - (-expected).exp() <= HOLD
        };
        pfns.iter().map(one).collect()
    }

    /// How the migration stands: the downtime if xl suspended the guest now, and the rates that make it.
    pub fn outlook(&self, now: Duration) -> Outlook {
        Outlook {
            downtime: self.expected_downtime(now),
            dirty_pages_rate: self.dirtying,
            sent_pages_rate: self.rate.pages,
            page_wire_bytes: self.rate.bytes_each,
        }
    }

    /// Downtime if xl suspended the guest now: what is held or dirty has to be sent at the measured rate. What suspending
    /// and resuming take by themselves is not in it.
    pub fn expected_downtime(&self, now: Duration) -> Duration {
        self.expected_downtime_at(self.time(now))
    }

    fn expected_downtime_at(&self, now: f64) -> Duration {
        let known = self.held_or_dirty();
        let since = (now - self.peeked.max(self.pass_began)).max(0.0);
        let pages = (known as f64 + self.dirtying * since).min(self.bound as f64);
        Duration::try_from_secs_f64(pages / self.rate.pages).unwrap_or(Duration::MAX)
    }
}

/// The quarter of a second that a time is in, from 1.
fn quarter(time: f64) -> u16 {
    ((time * 4.0) as u16).saturating_add(1)
}

/// The middle of it.
fn middle_of(quarter: u16) -> f64 {
    (f64::from(quarter) - 0.5) / 4.0
}

/// The class of a page of which so many writes are expected: two for each doubling.
fn heat(expected: f64) -> usize {
    let place = 40.0 + 2.0 * expected.max(1e-9).log2();
    place.clamp(0.0, (HEATS - 1) as f64) as usize
}

/// How many of the pages, sorted from the quietest, are worth sending while the guest runs: a page sent now costs a
/// repeat if it is written before the suspend, and saves downtime if not. Hotter pages go later and are exposed shorter.
fn worth_releasing(sorted: &[(Pfn, f32)], rate: f64) -> usize {
    let parts = sorted.chunks(sorted.len().div_ceil(PARTS).max(1));
    let parts: Vec<(usize, f64)> = parts
        .map(|part| {
            let writes: f64 = part.iter().map(|(_, writes)| f64::from(*writes)).sum();
            (part.len(), writes / part.len() as f64)
        })
        .collect();
    let (mut best, mut chosen) = ((0.0, 0), 0);
    for last in 1..=parts.len() {
        let (mut after, mut gain) = (0.0, 0.0);
        for (pages, writes) in parts.iter().take(last).rev() {
            let pages = *pages as f64;
            let exposed = (after + pages / 2.0) / rate;
            let again = 1.0 - (-writes * exposed).exp();
            gain += pages * (STOP_WORTH - (1.0 + STOP_WORTH) * again);
            after += pages;
        }
        chosen += parts.get(last - 1).map_or(0, |(pages, _)| *pages);
        if gain > best.0 {
            best = (gain, chosen);
        }
    }
    best.1
}

#[cfg(test)]
#[path = "filter_tests.rs"]
mod tests;
