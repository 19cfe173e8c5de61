//! Where the guest is now in the order in which it wrote its pages before: in an earlier migration, or in this one's first
//! passes.
//!
//! A guest that writes in a circle, however slowly, writes its pages in the order of the time before, faster or slower. So
//! pages are put in that order, and it is seen between which of them the guest's writes of a second lie: its place. When
//! three such looks, one after the other, find it to have gone on by as many pages as it has written, that says when each
//! of the others is due. Once that has mostly been so, one look is enough.
//!
//! Pages that it is known to write, but not when, are those that it has not come to since the order was seen: between the
//! youngest and the oldest ones, in no order.
use super::ages::Ages;

/// Seconds for which writes are looked at together, how many of them there must be, and the part of all pages that they may be:
/// who goes round in two looks has no place.
const LOOK: f64 = 0.3;
const FEW_WRITES: u32 = 24;
const MOST_WRITES: f64 = 0.5;

/// The longest look that still says where the guest is.
const LONGEST: f64 = 5.0;

/// Looks that have to agree, unless the order has proved true before.
const LOOKS: usize = 3;

/// How far apart they may be, in parts of what was written between them, beside how finely the order is known.
const APART: f64 = 0.35;

/// The part of all pages that the guest has written when it has come round.
const ROUND: f64 = 0.9;

/// The part of a look's writes that have to be in one place.
const MOSTLY: f64 = 0.6;

/// What earlier looks count less by with each one.
const FADE: f64 = 0.95;

/// An order that has less than this part of another's pages lacks some.
const MOST: f64 = 0.9;

/// Seconds for which the look before the last says where the guest is, once its order has proved true.
const STALE: f64 = 1.2;

/// How many times as far the guest is thought to come: its speed is known roughly, and passes take time of their own.
const LONGER: f64 = 1.1;

/// How likely a page is written that is due.
const CERTAIN: f64 = 0.95;

/// Ages that are told apart.
const AGES: usize = 256;

/// The age of pages whose place in the order is not known, the oldest; and the youngest.
const UNORDERED: u8 = u8::MAX;
const YOUNGEST: u8 = 1;

/// An order of pages, and how it has fared.
#[derive(Debug)]
pub(super) struct Circle {
    /// Of each page, the higher the earlier it was written first; 0: it was not.
    ages: Vec<u8>,
    /// Whether that was in an earlier migration.
    earlier: bool,
    /// How many pages have which age, and how many of the order come before them; all.
    counts: Vec<u32>,
    before: Vec<f64>,
    all: f64,
    /// Pages without a place in the order that have been written since xl's pass began: they have one now.
    placed_now: Vec<u32>,
    /// Of each age, pages that are dirty; where the guest was when none was.
    dirty: Vec<u32>,
    from: Option<f64>,
    /// Writes of the look under way, by age, when it began, and the seconds that it covers.
    seen: Vec<u32>,
    began: f64,
    seconds: f64,
    /// The last looks, the newest last, and how many ended in a place or in none, the older the less each counts.
    looks: [Option<Place>; LOOKS],
    placed: f64,
    lost: f64,
    /// Pages written in those that ended in a place, and their seconds.
    gone: f64,
    gone_seconds: f64,
    /// Of a page of each age: the writes that are expected for certain, and the part that the usual ones count for.
    due: Option<(Vec<f64>, f64)>,
}

/// Where in the order the guest wrote.
#[derive(Clone, Copy, Debug, PartialEq)]
struct Place {
    /// The middle of the look, in seconds.
    at: f64,
    /// The middle of its writes, in pages from the order's beginning, and how exactly that is known.
    page: f64,
    exact: f64,
    /// Pages a second.
    speed: f64,
    /// The part of its writes that were there, beyond what chance would have there.
    sure: f64,
}

impl Place {
    /// Where the guest is at a time.
    fn here(&self, now: f64) -> f64 {
        self.page + self.speed * (now - self.at)
    }
}

impl Circle {
    /// The order of this migration, by the times at which pages were written first, in any unit; 0: not yet. Ages are ranks, a 254th
    /// of the pages each, if times are told apart as finely.
    pub fn of(first: &[u16]) -> Circle {
        let mut at: Vec<usize> = vec![0; first.iter().copied().max().map_or(0, usize::from) + 1];
        for first in first.iter().filter(|first| **first > 0) {
            if let Some(pages) = at.get_mut(usize::from(*first)) {
                *pages += 1;
            }
        }
        let all = at.iter().sum::<usize>().max(1);
        let mut before = 0;
        let mut ages = vec![0];
        for pages in at.iter().skip(1) {
            let middle = before + pages / 2;
            ages.push(UNORDERED - 1 - (middle * (AGES - 2) / all).min(AGES - 3) as u8);
            before += pages;
        }
        let age = |first: &u16| ages.get(usize::from(*first)).copied().unwrap_or(0);
        Circle::new(first.iter().map(age).collect(), false)
    }

    /// The order of earlier migrations.
    pub fn known(ages: &Ages) -> Circle {
        let age = |age: &u8| (*age).min(UNORDERED - 1);
        Circle::new(ages.bytes().iter().map(age).collect(), true)
    }

    /// Takes in pages that are known to be written, and that the guest has not come to. Those in the order are left there.
    pub fn take_in(&mut self, pages: impl Iterator<Item = usize>) {
        let (mut added, all) = (0.0, self.all.max(1.0));
        for page in pages {
            if let Some(age @ 0) = self.ages.get_mut(page) {
                *age = UNORDERED;
                added += 1.0;
            }
        }
        self.count_all();
        let looks = self.looks.iter_mut().flatten();
        looks.for_each(|look| look.page = look.page.rem_euclid(all) + added);
    }

    /// Leaves those out again: it is not known any more that they are written.
    pub fn leave_out(&mut self) {
        self.ages
            .iter_mut()
            .filter(|age| **age == UNORDERED)
            .for_each(|age| *age = 0);
        self.placed_now.clear();
        self.count_all();
        (self.from, self.looks) = (None, [None; LOOKS]);
    }

    fn new(ages: Vec<u8>, earlier: bool) -> Circle {
        let mut circle = Circle {
            ages,
            earlier,
            counts: Vec::new(),
            before: Vec::new(),
            all: 0.0,
            placed_now: Vec::new(),
            dirty: vec![0; AGES],
            from: None,
            seen: vec![0; AGES],
            began: 0.0,
            seconds: 0.0,
            looks: [None; LOOKS],
            placed: 0.0,
            lost: 0.0,
            gone: 0.0,
            gone_seconds: 0.0,
            due: None,
        };
        circle.count_all();
        circle
    }

    fn count_all(&mut self) {
        self.counts = counts_of(&self.ages);
        self.before = vec![0.0; AGES];
        self.all = 0.0;
        // The oldest are written next.
        for (before, count) in self.before.iter_mut().zip(&self.counts).rev() {
            *before = self.all;
            self.all += f64::from(*count);
        }
    }

    /// Whether the guest has mostly been seen to write in this order.
    fn is_true(&self) -> bool {
        self.placed > self.lost
    }

    pub fn is_earlier(&self) -> bool {
        self.earlier
    }

    /// Whether a new order of this migration would be better: it knows more pages than one that has not proved true.
    pub fn is_outdated(&self) -> bool {
        !self.has_place() && !self.is_true() && (!self.earlier || self.lost > self.placed)
    }

    /// Whether this is the order of earlier migrations, true, and better than the one of these ages: that has fewer pages, or is
    /// less fine. Two that begin in different places cannot be put together.
    pub fn is_worth_keeping(&self, ages: &[u8]) -> bool {
        // Pages of an age, on average over the pages.
        let coarse = |counts: &[u32]| {
            let all: f64 = counts.iter().map(|count| f64::from(*count)).sum();
            let squares: f64 = counts.iter().map(|count| f64::from(*count).powi(2)).sum();
            squares / all.max(1.0)
        };
        let (ours, others) = (self.counts.get(..UNORDERED.into()).unwrap_or_default(), counts_of(ages));
        let sum = |counts: &[u32]| counts.iter().map(|count| f64::from(*count)).sum::<f64>();
        let (mine, all) = (sum(ours), sum(&others));
        let finer = 2.0 * mine >= all && coarse(ours) < coarse(&others);
        self.earlier && self.is_true() && (all < MOST * mine || finer)
    }

    fn age(&self, page: usize) -> u8 {
        self.ages.get(page).copied().unwrap_or(0)
    }

    /// One of xl's passes begins, so that no page is dirty.
    pub fn pass_began(&mut self, now: f64) {
        self.dirty.fill(0);
        self.from = self.place().map(|place| place.here(now));
        self.settle();
        // What was written since the last reading comes in no look.
        self.seen.fill(0);
        self.seconds = 0.0;
        if self.from.is_none() {
            self.looks = [None; LOOKS];
        }
    }

    /// Puts pages that had no place behind the youngest ones: they are the last ones that the guest has written.
    fn settle(&mut self) {
        let settled = std::mem::take(&mut self.placed_now);
        if settled.is_empty() {
            return;
        }
        let were = f64::from(self.count(UNORDERED.into()));
        for page in &settled {
            self.ages
                .get_mut(*page as usize)
                .into_iter()
                .for_each(|age| *age = YOUNGEST);
        }
        self.count_all();
        // Who was among those goes on at the first of the rest.
        let all = self.all.max(1.0);
        let place = |page: f64| match page.rem_euclid(all) {
            page if page < were => 0.0,
            page => page - settled.len() as f64,
        };
        self.from = self.from.map(place);
        self.looks
            .iter_mut()
            .flatten()
            .for_each(|look| look.page = place(look.page));
    }

    /// A page was written, for the first time since the pass began.
    pub fn written(&mut self, page: usize) {
        let age = self.age(page);
        if age == UNORDERED {
            self.placed_now.extend(u32::try_from(page));
        }
        for counts in [&mut self.seen, &mut self.dirty] {
            count_one(counts, age.into());
        }
    }

    /// All that was written in the `seconds` from a time on has been told.
    pub fn looked(&mut self, from: f64, seconds: f64) {
        if self.seconds == 0.0 {
            self.began = from;
        }
        self.seconds += seconds;
        let all: u32 = self.seen.iter().sum();
        if self.seconds < LOOK || all < FEW_WRITES && self.seconds < LONGEST {
            return;
        }
        let place = self.look(all);
        self.looks.rotate_left(1);
        if let Some(last) = self.looks.last_mut() {
            *last = place;
        }
        let placed = self.has_place();
        let lost = match place {
            // Who writes nothing new may have been everywhere.
            None => all >= FEW_WRITES,
            Some(_) => self.looks.iter().all(Option::is_some),
        };
        // Who has been nearly everywhere since the pass began goes on unseen.
        let round = f64::from(self.dirty.iter().sum::<u32>()) > self.all * ROUND;
        if (placed || lost) && !round {
            let counts = [&mut self.placed, &mut self.lost, &mut self.gone, &mut self.gone_seconds];
            counts.into_iter().for_each(|count| *count *= FADE);
            if placed {
                self.placed += 1.0;
                self.gone += f64::from(all);
                self.gone_seconds += self.seconds;
            } else {
                self.lost += 1.0;
            }
        }
        self.seen.fill(0);
        self.seconds = 0.0;
    }

    /// Where most of the look's writes are: as many pages, one after the other in the order, as were written.
    fn look(&self, all: u32) -> Option<Place> {
        if self.seconds > LONGEST || all < FEW_WRITES || f64::from(all) > self.all * MOST_WRITES {
            return None;
        }
        let ages: Vec<usize> = (1..AGES).rev().filter(|age| self.count(*age) > 0).collect();
        // Writes, the middle of them, how exactly that is known, and all pages there.
        let mut best: Option<(u32, f64, f64, u32)> = None;
        for first in 0..ages.len() {
            // The first and the last of them are only partly written.
            let (mut pages, mut writes, mut middle, mut widest, mut there) = (0, 0, 0.0, 0u32, 0);
            for (age, round) in ages.iter().cycle().zip(0..).skip(first).take(ages.len()) {
                let count = self.count(*age);
                let seen = self.seen.get(*age).copied().unwrap_or(0);
                let rounds = if round < ages.len() { 0.0 } else { self.all };
                writes += seen;
                middle += f64::from(seen) * (self.middle(*age) + rounds);
                widest = widest.max(count);
                there += count;
                if pages > 0 && pages + count > all {
                    break;
                }
                pages += count;
            }
            if writes > 0 && best.is_none_or(|(most, ..)| writes > most) {
                best = Some((writes, middle / f64::from(writes), widest.into(), there));
            }
        }
        best.map(|(writes, page, exact, there)| {
            // Who writes anywhere has as many there as there are pages.
            let chance = (f64::from(there) / self.all).min(1.0 - 1e-9);
            let part = f64::from(writes) / f64::from(all);
            Place {
                at: self.began + self.seconds / 2.0,
                page,
                exact,
                speed: f64::from(all) / self.seconds,
                sure: ((part - chance) / (1.0 - chance)).max(0.0),
            }
        })
    }

    fn count(&self, age: usize) -> u32 {
        self.counts.get(age).copied().unwrap_or(0)
    }

    /// The middle of the pages of an age, in pages from the order's beginning.
    fn middle(&self, age: usize) -> f64 {
        self.before.get(age).copied().unwrap_or(0.0) + f64::from(self.count(age)) / 2.0
    }

    /// The pages from one place in the order to another, on the shorter way.
    fn way(&self, from: f64, to: f64) -> f64 {
        let ahead = (to - from).rem_euclid(self.all.max(1.0));
        if ahead > self.all / 2.0 {
            ahead - self.all
        } else {
            ahead
        }
    }

    /// Whether it is known where the guest is now.
    pub fn has_place(&self) -> bool {
        self.place().is_some()
    }

    /// Where the guest is now, if it goes on in the order.
    fn place(&self) -> Option<Place> {
        if self.is_true() {
            let sure = |look: &Place| look.sure > MOSTLY;
            let [.., before, last] = self.looks;
            // One look that shows mostly something else, or nothing, does not make it lost.
            let now = self.began + self.seconds;
            let fresh = |look: &Place| sure(look) && now - look.at < STALE;
            return last.filter(sure).or_else(|| before.filter(fresh));
        }
        let looks = self.looks.iter().copied();
        let looks: Vec<Place> = looks.collect::<Option<_>>()?;
        let (first, last) = (looks.first()?, looks.last()?);
        let agree = |a: &Place, b: &Place| {
            let written = (a.speed + b.speed) / 2.0 * (b.at - a.at);
            let apart = self.way(a.page + written, b.page).abs();
            apart <= a.exact.max(b.exact) + APART * written
        };
        let near = looks.windows(2).all(|pair| matches!(pair, [a, b] if agree(a, b)));
        let sure = looks.iter().map(|look| look.sure).fold(1.0, f64::min);
        (near && agree(first, last) && sure > MOSTLY).then_some(Place { sure, ..*last })
    }

    /// Expects all of them, as long as it is known where in the order the guest is, or the order has proved true: sooner or later
    /// it comes to each.
    pub fn ask_for_all(&mut self) {
        let sure = self.place().map(|place| place.sure);
        let sure = sure.or_else(|| self.is_true().then_some(1.0));
        self.due = sure.map(|sure| (vec![-(1.0 - sure * CERTAIN).ln(); AGES], 1.0 - sure));
    }

    /// Reckons what is expected in the next `seconds` of all pages that are not dirty: [`Circle::expect`] answers from it.
    pub fn ask(&mut self, now: f64, seconds: f64) {
        self.due = self.place().map(|place| {
            let due = self.due(&place, now, seconds);
            // Writes that make one as likely as that.
            let writes = |likely: f64| -(1.0 - likely * place.sure * CERTAIN).ln();
            (due.into_iter().map(writes).collect(), 1.0 - place.sure)
        });
    }

    /// How likely the pages of each age are written in the next `seconds`, those that are not dirty: as many of them as the guest
    /// writes meanwhile, in their order.
    fn due(&self, place: &Place, now: f64, seconds: f64) -> Vec<f64> {
        let mut due = vec![0.0; AGES];
        let here = place.here(now);
        let from = self
            .from
            .filter(|from| (0.0..place.exact).contains(&self.way(*from, here)));
        let order: Vec<usize> = (1..AGES).rev().filter(|age| self.count(*age) > 0).collect();
        let start = |age: usize| self.before.get(age).copied().unwrap_or(0.0);
        let end = |age: usize| start(age) + f64::from(self.count(age));
        let at = |page: f64| order.iter().position(|age| page < end(*age)).unwrap_or(0);
        let turn = |page: f64| page.rem_euclid(self.all.max(1.0));
        // Of the age before some may be left, and none of those before that.
        let back = || {
            let here = turn(here);
            let at = at(here);
            let before = at.checked_sub(1).unwrap_or(order.len().saturating_sub(1));
            let (now, before) = (order.get(at).copied(), order.get(before).copied());
            let widths = now.map_or(0.0, |age| here - start(age)) + before.map_or(0.0, |age| self.count(age).into());
            here - widths.min(place.exact)
        };
        let from = turn(from.unwrap_or_else(back));
        let first = at(from);
        // Where a pass begins all memory has just been write-protected, and the guest is slow for a while.
        let mean = self.gone / self.gone_seconds.max(LOOK);
        let mut goes = place.speed.max(mean) * seconds * LONGER;
        for (step, age) in order.iter().cycle().skip(first).take(order.len()).enumerate() {
            let dirty = self.dirty.get(*age).copied().unwrap_or(0);
            let open = f64::from(self.count(*age).saturating_sub(dirty)).max(1.0);
            // Of the first ones some are behind.
            let left = if step == 0 { open.min(end(*age) - from) } else { open };
            let written = goes.min(left).max(0.0);
            if let Some(due) = due.get_mut(*age) {
                *due = written / open;
            }
            goes -= written;
        }
        due
    }

    /// Writes expected of a page in the time that was asked about, where `usual` are if nothing is known of where the guest is.
    pub fn expect(&self, page: usize, usual: f64) -> f64 {
        let Some((due, rest)) = &self.due else { return usual };
        match self.age(page) {
            0 => usual,
            age => due.get(usize::from(age)).copied().unwrap_or(0.0) + rest * usual,
        }
    }
}

/// How many pages have which age; those that were not seen written do not count.
fn counts_of(ages: &[u8]) -> Vec<u32> {
    let mut counts = vec![0; AGES];
    ages.iter().for_each(|age| count_one(&mut counts, usize::from(*age)));
    counts
}

fn count_one(counts: &mut [u32], age: usize) {
    if let Some(count) = counts.get_mut(age) {
        *count += u32::from(age > 0);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// 100 pages for each of the last 40 seconds before the end, in their order.
    fn circle() -> Circle {
        Circle::new((0..4000).map(|page| 40 - (page / 100) as u8).collect(), true)
    }

    /// The guest writes these pages in a second.
    fn second(circle: &mut Circle, pages: std::ops::Range<usize>, at: f64) {
        pages.for_each(|page| circle.written(page % 4000));
        circle.looked(at, 1.0);
    }

    #[test]
    fn a_circle_says_which_pages_are_due_however_fast_it_is_gone_round() {
        for speed in [30, 100, 230] {
            let mut circle = circle();
            let expect = |circle: &mut Circle, page, seconds| {
                circle.ask(3.0, seconds);
                circle.expect(page % 4000, 0.7)
            };
            second(&mut circle, 3900..3900 + speed, 0.0);
            second(&mut circle, 3900 + speed..3900 + 2 * speed, 1.0);
            assert_eq!(expect(&mut circle, 900, 2.0), 0.7, "two looks are not enough");
            second(&mut circle, 3900 + 2 * speed..3900 + 3 * speed, 2.0);
            let at = 3900 + 3 * speed;
            assert!(expect(&mut circle, at + 50, 8.0) > 2.0, "{speed}");
            assert!(expect(&mut circle, at + 8 * speed + 200, 4.0) < 0.3, "{speed}");
            assert!(expect(&mut circle, at + 8 * speed, 15.0) > 2.0, "{speed}");
            // Those before are due when the guest has come round.
            let before = at + 4000 - 300;
            assert!(expect(&mut circle, before, 2.0) < 0.3 && expect(&mut circle, before, 8000.0 / speed as f64) > 2.0);
        }
    }

    #[test]
    fn pages_of_no_order_come_between_the_youngest_and_the_oldest() {
        // As above, and 2000 pages more that are written after those.
        let ages = (0..6000).map(|page| if page < 4000 { 40 - (page / 100) as u8 } else { 0 });
        let mut circle = Circle::new(ages.collect(), true);
        circle.take_in(3900..6000);
        assert_eq!(circle.counts[usize::from(UNORDERED)], 2000);
        let second = |circle: &mut Circle, second: usize| {
            (3600..3700).for_each(|page| circle.written(page + second * 100));
            circle.looked(second as f64, 1.0);
        };
        (0..8).for_each(|at| second(&mut circle, at));
        let expect = |circle: &mut Circle, now, page, seconds| {
            circle.ask(now, seconds);
            circle.expect(page, 0.7)
        };
        assert!(expect(&mut circle, 8.0, 5000, 9.0) > 0.5, "half of them are due");
        assert!(
            [0, 2000, 3500]
                .iter()
                .all(|page| expect(&mut circle, 8.0, *page, 9.0) < 0.3)
        );
        assert!(expect(&mut circle, 8.0, 5000, 36.0) > 2.0 && expect(&mut circle, 8.0, 0, 36.0) > 2.0);
        // Those that it has been to are behind it.
        circle.pass_began(8.0);
        second(&mut circle, 8);
        assert!(expect(&mut circle, 9.0, 4100, 9.0) < 0.3 && expect(&mut circle, 9.0, 5000, 9.0) > 0.5);
        (9..24).for_each(|at| second(&mut circle, at));
        assert!(expect(&mut circle, 24.0, 10, 7.0) > 1.0 && expect(&mut circle, 24.0, 2000, 7.0) < 0.3);
    }

    #[test]
    fn in_the_first_pass_all_of_a_circle_is_due() {
        let mut circle = circle();
        circle.ask_for_all();
        assert_eq!(circle.expect(2000, 0.7), 0.7);
        (0..3).for_each(|look| second(&mut circle, look * 100..look * 100 + 100, look as f64));
        circle.ask_for_all();
        assert!([0, 2000, 3999].iter().all(|page| circle.expect(*page, 0.0) > 2.0));
        assert_eq!(circle.expect(4000, 0.7), 0.7, "no page of the circle");
    }

    #[test]
    fn a_guest_that_has_come_round_is_not_lost() {
        let mut circle = circle();
        (0..40).for_each(|look| second(&mut circle, look * 100..look * 100 + 100, look as f64));
        for look in 40..200 {
            (0..30).for_each(|page| circle.written((page * 997 + look) % 4000));
            circle.looked(look as f64, 1.0);
        }
        assert!(circle.is_true());
        circle.pass_began(200.0);
        second(&mut circle, 1500..1600, 200.0);
        assert!(circle.has_place(), "one look is enough");
    }

    #[test]
    fn an_order_is_true_that_is_seen_again_and_may_be_finer() {
        let mut circle = circle();
        let coarse: Vec<u8> = (0..4000).map(|page| 5 - (page / 1000) as u8).collect();
        assert!(!circle.is_worth_keeping(&coarse), "nothing has been seen of it");
        (0..8).for_each(|look| second(&mut circle, look * 100..look * 100 + 100, look as f64));
        assert!(circle.is_worth_keeping(&coarse));
        let finer: Vec<u8> = (0..4000).map(|page| 80 - (page / 50) as u8).collect();
        assert!(!circle.is_worth_keeping(&finer));
    }

    #[test]
    fn a_guest_that_does_something_else_is_nowhere_in_it() {
        let (mut jumps, mut little, mut anywhere) = (circle(), circle(), circle());
        for look in 0..3 {
            second(&mut jumps, 500 + look * 1000..600 + look * 1000, look as f64);
            // Most of what would have been due is not written.
            second(&mut little, 500 + look * 100..530 + look * 100, look as f64);
            for page in 0..400 {
                anywhere.written(page * 7 % 4000);
            }
            anywhere.looked(look as f64, 1.0);
        }
        assert_eq!((jumps.place(), little.place(), anywhere.place()), (None, None, None));
        let mut fast = circle();
        (0..3).for_each(|look| second(&mut fast, 0..4000, look as f64));
        assert_eq!(fast.place(), None, "all of it in a second");
    }

    #[test]
    fn the_order_of_first_writes_is_a_circle() {
        // Of 4000 pages 10 are written at each time from the second on; page 0 is not.
        let first: Vec<u16> = (0..4000)
            .map(|page| if page == 0 { 0 } else { 2 + page / 10 })
            .collect();
        let circle = Circle::of(&first);
        assert_eq!((circle.age(0), circle.all), (0, 3999.0));
        assert!((1..3999).all(|page| circle.age(page) >= circle.age(page + 1) && circle.age(page) > 0));
        assert!(circle.counts.iter().all(|pages| *pages <= 20), "{:?}", circle.counts);
        assert_eq!(Circle::of(&[0; 10]).all, 0.0);
    }
}
