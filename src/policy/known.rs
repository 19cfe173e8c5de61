//! Which pages earlier migrations have seen written, whether the guest still writes those, and where it is now in what it
//! did then.
//!
//! A guest that writes in a circle, however slowly, writes its pages in the order of the time before, faster or slower. So
//! pages are put in that order, and it is seen between which of them the guest's writes of a second lie: its place. When
//! three such looks, one after the other, find it to have gone on by as many pages as it has written, that says when each
//! of the others is due.

/// Once a guest writes less than this part of what is expected of these pages, they tell nothing any more. Before that they count
/// for less ([`Known::factor`]): in the first second of a migration a guest writes little, since its memory is only being write-protected.
const LEAST: f64 = 0.02;

/// The most that more writes than expected count for.
const MOST: f64 = 2.0;

/// Of the guest's pages: writes that have to be expected, or seen, before they are judged by.
const FEW: f64 = 1.0 / 1024.0;

/// Seconds for which writes are looked at together, how many of them there must be, and the part of all pages that they may be:
/// who goes round in two looks has no place.
const LOOK: f64 = 0.5;
const FEW_WRITES: u32 = 24;
const MOST_WRITES: f64 = 0.5;

/// The longest look that still says where the guest is.
const LONGEST: f64 = 5.0;

/// Looks that have to agree.
const LOOKS: usize = 3;

/// How far apart they may be, in parts of what was written between them, beside how finely the order is known.
const APART: f64 = 0.35;

/// The part of a look's writes that have to be in one place.
const MOSTLY: f64 = 0.6;

/// The time until the suspend is reckoned short, since what is written until then takes time, too.
const LONGER: f64 = 2.0;

/// How likely a page is written that is due.
const CERTAIN: f64 = 0.95;

/// Ages that are told apart.
const AGES: usize = 256;

/// What is known, and how it has fared.
#[derive(Debug)]
pub(super) struct Known {
    /// As in [`super::kept`].
    ages: Vec<u8>,
    /// Pages written for the first time since the guest is watched: so many were expected, so many were.
    expected: f64,
    written: f64,
    few: f64,
    /// How many pages have which age, and how many of the order come before them; all.
    counts: Vec<u32>,
    before: Vec<f64>,
    all: f64,
    /// Of each age, pages that are dirty; where the guest was when none was.
    dirty: Vec<u32>,
    from: Option<f64>,
    /// Writes of the look under way, by age, when it began, and the seconds that it covers.
    seen: Vec<u32>,
    began: f64,
    seconds: f64,
    /// The last looks, the newest last, and how many ended in a place or in none.
    looks: [Option<Place>; LOOKS],
    placed: u32,
    lost: u32,
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
    /// The part of its writes that were there.
    sure: f64,
}

impl Place {
    /// Where the guest is at a time.
    fn here(&self, now: f64) -> f64 {
        self.page + self.speed * (now - self.at)
    }
}

impl Known {
    pub fn new(ages: Vec<u8>, guest_pages: u64) -> Known {
        let counts = counts_of(&ages);
        let mut before = vec![0.0; AGES];
        let mut all = 0.0;
        // The oldest are written next.
        for (before, count) in before.iter_mut().zip(&counts).rev() {
            *before = all;
            all += f64::from(*count);
        }
        Known {
            ages,
            expected: 0.0,
            written: 0.0,
            few: (guest_pages as f64 * FEW).max(1.0),
            counts,
            before,
            all,
            dirty: vec![0; AGES],
            from: None,
            seen: vec![0; AGES],
            began: 0.0,
            seconds: 0.0,
            looks: [None; LOOKS],
            placed: 0,
            lost: 0,
            due: None,
        }
    }

    /// Whether the guest has mostly been seen to write in this order, and it is finer than the one of these ages: then it is worth
    /// keeping.
    pub fn is_finer(&self, ages: &[u8]) -> bool {
        // Pages of an age, on average over the pages.
        let coarse = |counts: &[u32]| {
            let all: f64 = counts.iter().map(|count| f64::from(*count)).sum();
            let squares: f64 = counts.iter().map(|count| f64::from(*count).powi(2)).sum();
            squares / all.max(1.0)
        };
        self.placed > self.lost && coarse(&self.counts) < coarse(&counts_of(ages))
    }

    /// Calls `each` with the pages that were seen written.
    pub fn for_each_page(&self, mut each: impl FnMut(usize)) {
        let pages = self.ages.iter().enumerate().filter(|(_, age)| **age > 0);
        pages.for_each(|(page, _)| each(page));
    }

    pub fn age(&self, page: usize) -> u8 {
        self.ages.get(page).copied().unwrap_or(0)
    }

    /// One of xl's passes begins, so that no page is dirty.
    pub fn pass_began(&mut self, now: f64) {
        self.dirty.fill(0);
        self.from = self.place().map(|place| place.here(now));
    }

    /// Takes in what was expected of a time, and what came.
    pub fn weigh(&mut self, expected: f64, written: f64) {
        self.expected += expected;
        self.written += written;
    }

    /// A page was written, for the first time since the pass began.
    pub fn written(&mut self, page: usize) {
        let age = usize::from(self.age(page));
        for counts in [&mut self.seen, &mut self.dirty] {
            count_one(counts, age);
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
        match self.place() {
            Some(_) => self.placed += 1,
            None => self.lost += 1,
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
        let mut best: Option<(u32, f64, f64)> = None;
        for first in 0..ages.len() {
            // The first and the last of them are only partly written.
            let (mut pages, mut writes, mut middle, mut widest) = (0, 0, 0.0, 0u32);
            for (age, round) in ages.iter().cycle().zip(0..).skip(first).take(ages.len()) {
                let count = self.count(*age);
                let seen = self.seen.get(*age).copied().unwrap_or(0);
                let rounds = if round < ages.len() { 0.0 } else { self.all };
                writes += seen;
                middle += f64::from(seen) * (self.middle(*age) + rounds);
                widest = widest.max(count);
                if pages > 0 && pages + count > all {
                    break;
                }
                pages += count;
            }
            if writes > 0 && best.is_none_or(|(most, ..)| writes > most) {
                best = Some((writes, middle / f64::from(writes), widest.into()));
            }
        }
        best.map(|(writes, page, exact)| Place {
            at: self.began + self.seconds / 2.0,
            page,
            exact,
            speed: f64::from(all) / self.seconds,
            sure: f64::from(writes) / f64::from(all),
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

    /// Where the guest is now, if it goes on in the order.
    fn place(&self) -> Option<Place> {
        let looks: Vec<Place> = self.looks.iter().copied().collect::<Option<_>>()?;
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

    /// Expects all of them, as long as it is known where in the order the guest is: sooner or later it comes to each.
    pub fn ask_for_all(&mut self) {
        self.due = self.place().map(|place| {
            let writes = -(1.0 - place.sure * CERTAIN).ln();
            (vec![writes; AGES], 1.0 - place.sure)
        });
    }

    /// Reckons what is expected in the next `seconds` of all pages that are not dirty: [`Known::expect`] answers from it.
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
        let from = from.unwrap_or(here - place.exact).rem_euclid(self.all.max(1.0));
        let order: Vec<usize> = (1..AGES).rev().filter(|age| self.count(*age) > 0).collect();
        let end = |age: usize| self.before.get(age).copied().unwrap_or(0.0) + f64::from(self.count(age));
        let first = order.iter().position(|age| from < end(*age)).unwrap_or(0);
        let mut goes = place.speed * seconds * LONGER;
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

    /// How many times as much is written as is expected, as far as has been seen.
    pub fn factor(&self) -> f64 {
        ((self.written + self.few) / (self.expected + self.few)).min(MOST)
    }

    pub fn holds(&self) -> bool {
        self.factor() >= LEAST
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
    fn known() -> Known {
        Known::new((0..4000).map(|page| 40 - (page / 100) as u8).collect(), 4000)
    }

    /// The guest writes these pages in a second.
    fn second(known: &mut Known, pages: std::ops::Range<usize>, at: f64) {
        pages.for_each(|page| known.written(page % 4000));
        known.looked(at, 1.0);
    }

    #[test]
    fn a_circle_says_which_pages_are_due_however_fast_it_is_gone_round() {
        for speed in [30, 100, 230] {
            let mut known = known();
            let expect = |known: &mut Known, page, seconds| {
                known.ask(3.0, seconds);
                known.expect(page % 4000, 0.7)
            };
            second(&mut known, 3900..3900 + speed, 0.0);
            second(&mut known, 3900 + speed..3900 + 2 * speed, 1.0);
            assert_eq!(expect(&mut known, 900, 2.0), 0.7, "two looks are not enough");
            second(&mut known, 3900 + 2 * speed..3900 + 3 * speed, 2.0);
            let at = 3900 + 3 * speed;
            assert!(expect(&mut known, at + 50, 4.0) > 2.0, "{speed}");
            assert!(expect(&mut known, at + 8 * speed + 200, 4.0) < 0.3, "{speed}");
            assert!(expect(&mut known, at + 8 * speed, 8.0) > 2.0, "{speed}");
            // Those before are due when the guest has come round.
            let before = at + 4000 - 300;
            assert!(expect(&mut known, before, 2.0) < 0.3 && expect(&mut known, before, 4000.0 / speed as f64) > 2.0);
        }
    }

    #[test]
    fn in_the_first_pass_all_of_a_circle_is_due() {
        let mut known = known();
        known.ask_for_all();
        assert_eq!(known.expect(2000, 0.7), 0.7);
        (0..3).for_each(|look| second(&mut known, look * 100..look * 100 + 100, look as f64));
        known.ask_for_all();
        assert!([0, 2000, 3999].iter().all(|page| known.expect(*page, 0.0) > 2.0));
        assert_eq!(known.expect(4000, 0.7), 0.7, "no page of the circle");
    }

    #[test]
    fn an_order_is_kept_while_it_is_true_and_finer() {
        let mut known = known();
        let coarse: Vec<u8> = (0..4000).map(|page| 5 - (page / 1000) as u8).collect();
        assert!(!known.is_finer(&coarse), "nothing has been seen of it");
        (0..8).for_each(|look| second(&mut known, look * 100..look * 100 + 100, look as f64));
        assert!(known.is_finer(&coarse));
        let finer: Vec<u8> = (0..4000).map(|page| 80 - (page / 50) as u8).collect();
        assert!(!known.is_finer(&finer));
    }

    #[test]
    fn a_guest_that_does_something_else_is_nowhere_in_it() {
        let (mut jumps, mut little, mut anywhere) = (known(), known(), known());
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
        let mut fast = known();
        (0..3).for_each(|look| second(&mut fast, 0..4000, look as f64));
        assert_eq!(fast.place(), None, "all of it in a second");
    }

    #[test]
    fn pages_that_are_hardly_written_any_more_are_known_no_more() {
        let mut known = known();
        known.weigh(100.0, 60.0);
        assert!(known.holds() && known.factor() < 0.7);
        known.weigh(400.0, 20.0);
        assert!(
            known.holds() && known.factor() < 0.2,
            "little is written where a migration begins"
        );
        known.weigh(9000.0, 20.0);
        assert!(!known.holds());
        known.weigh(0.0, 90_000.0);
        assert_eq!(known.factor(), MOST);
    }
}
