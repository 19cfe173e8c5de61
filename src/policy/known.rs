//! Which pages earlier migrations have seen written, whether the guest still writes those, and where it is now in what it
//! did then.
//!
//! A guest that writes in a circle, however slowly, writes its pages in the order of the time before. While it does, the
//! time of a page's write and its age at the earlier migration's end add up to the same for all: two looks that find most
//! pages at the same sum say when each of the others is due.

/// Once a guest writes less than this part of what is expected of these pages, they tell nothing any more. Before that they count
/// for less ([`Known::factor`]): in the first second of a migration a guest writes little, since its memory is only being write-protected.
const LEAST: f64 = 0.02;

/// The most that more writes than expected count for.
const MOST: f64 = 2.0;

/// Of the guest's pages: writes that have to be expected, or seen, before they are judged by.
const FEW: f64 = 1.0 / 1024.0;

/// Seconds for which writes are looked at together, and how many of them there must be.
const LOOK: f64 = 0.75;
const FEW_WRITES: u32 = 24;

/// Sums that count as the same: so many seconds, which are the steps in which ages are known.
const SAME: usize = 3;

/// The part of the writes that have to be at the same sum, times that of the pages that were due and have been written.
const MOSTLY: f64 = 0.6;

/// The time until the suspend is reckoned short, since what is written until then takes time, too.
const LONGER: f64 = 2.0;

/// Writes expected of a page that is due.
const DUE: f64 = 3.0;

/// What is known, and how it has fared.
#[derive(Debug)]
pub(super) struct Known {
    /// As in [`super::kept`].
    ages: Vec<u8>,
    /// Pages written for the first time since the guest is watched: so many were expected, so many were.
    expected: f64,
    written: f64,
    few: f64,
    /// How many pages have which age; nearly all ages are below `length`.
    counts: Vec<u32>,
    length: f64,
    /// Writes of the look under way, by their sum, when it began, and the seconds that it covers.
    sums: Vec<u32>,
    began: f64,
    seconds: f64,
    /// Where most writes of the last looks were: the middle of their sums, and their part of all.
    looks: [Option<(f64, f64)>; 2],
}

impl Known {
    pub fn new(ages: Vec<u8>, guest_pages: u64) -> Known {
        let mut counts = vec![0u32; 256];
        for age in &ages {
            if let Some(count) = counts.get_mut(usize::from(*age)) {
                *count += u32::from(*age > 0);
            }
        }
        let most = counts.iter().sum::<u32>() / 100 * 98;
        let mut below = 0;
        let length = counts.iter().take_while(|count| {
            below += **count;
            below <= most
        });
        let length = length.count() as f64;
        Known {
            ages,
            expected: 0.0,
            written: 0.0,
            few: (guest_pages as f64 * FEW).max(1.0),
            counts,
            length,
            sums: Vec::new(),
            began: 0.0,
            seconds: 0.0,
            looks: [None; 2],
        }
    }

    /// Calls `each` with the pages that were seen written.
    pub fn for_each_page(&self, mut each: impl FnMut(usize)) {
        let pages = self.ages.iter().enumerate().filter(|(_, age)| **age > 0);
        pages.for_each(|(page, _)| each(page));
    }

    pub fn age(&self, page: usize) -> u8 {
        self.ages.get(page).copied().unwrap_or(0)
    }

    /// Seconds before the earlier migration's end, in the middle of the step in which they are known.
    fn seconds_before(&self, page: usize) -> f64 {
        f64::from(self.age(page)) - 0.5
    }

    /// Takes in what was expected of a time, and what came.
    pub fn weigh(&mut self, expected: f64, written: f64) {
        self.expected += expected;
        self.written += written;
    }

    /// A page was written `at` seconds after the watching began, for the first time since.
    pub fn written(&mut self, page: usize, at: f64) {
        let sum = (at + self.seconds_before(page)).max(0.0) as usize;
        if self.sums.len() <= sum {
            self.sums.resize(sum + 1, 0);
        }
        self.sums.get_mut(sum).into_iter().for_each(|count| *count += 1);
    }

    /// All that was written in the `seconds` from a time on has been told.
    pub fn looked(&mut self, from: f64, seconds: f64) {
        if self.seconds == 0.0 {
            self.began = from;
        }
        self.seconds += seconds;
        let all: u32 = self.sums.iter().sum();
        if self.seconds < LOOK || all < FEW_WRITES {
            return;
        }
        // The longer the look, the less it is known when a page was written.
        let width = SAME + self.seconds as usize;
        let windows = (0..self.sums.len()).map(|first| {
            let window: u32 = self.sums.iter().skip(first).take(width).sum();
            (window, first)
        });
        let best = windows.rev().max();
        let look = best.map(|(most, first)| {
            let sum = first as f64 + width as f64 / 2.0;
            let right = f64::from(most) / self.due_in(sum).max(1.0);
            (sum, f64::from(most) / f64::from(all) * right.min(1.0))
        });
        self.looks = [self.looks[1], look];
        self.sums.clear();
        self.seconds = 0.0;
    }

    /// How many pages would have been due in the look under way, were this the sum.
    fn due_in(&self, sum: f64) -> f64 {
        let (from, to) = (self.began - 1.0, self.began + self.seconds + 1.0);
        let due = self.counts.iter().enumerate().filter(|(age, _)| {
            let due = sum - (*age as f64 - 0.5);
            *age > 0 && from <= due && due < to
        });
        let pages: u32 = due.map(|(_, pages)| *pages).sum();
        f64::from(pages) * self.seconds / (to - from)
    }

    /// The sum at which writes are now, and how surely.
    fn place(&self) -> Option<(f64, f64)> {
        let [Some((before, sure_before)), Some((now, sure))] = self.looks else {
            return None;
        };
        let sure = sure.min(sure_before);
        ((before - now).abs() < SAME as f64 && sure > MOSTLY).then_some((now, sure))
    }

    /// Writes expected of a page in the next `seconds`, where `usual` are if nothing is known of where the guest is.
    pub fn expect(&self, page: usize, now: f64, seconds: f64, usual: f64) -> f64 {
        let Some((sum, sure)) = self.place() else {
            return usual;
        };
        let slack = SAME as f64 / 2.0;
        let mut due = sum - self.seconds_before(page);
        if due + slack < now {
            // Its turn is over, so it is the next time.
            due += self.length;
        }
        let is_due = due - slack < now + seconds * LONGER;
        sure * f64::from(u8::from(is_due)) * DUE + (1.0 - sure) * usual
    }

    /// How many times as much is written as is expected, as far as has been seen.
    pub fn factor(&self) -> f64 {
        ((self.written + self.few) / (self.expected + self.few)).min(MOST)
    }

    pub fn holds(&self) -> bool {
        self.factor() >= LEAST
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// 100 pages for each of the last 20 seconds before the end, in their order.
    fn known() -> Known {
        Known::new((0..2000).map(|page| 20 - (page / 100) as u8).collect(), 2000)
    }

    /// The guest writes the pages of a second in a second.
    fn second(known: &mut Known, pages: std::ops::Range<usize>, at: f64) {
        let step = 1.0 / pages.len() as f64;
        for (count, page) in pages.enumerate() {
            known.written(page, at + step * count as f64);
        }
        known.looked(at, 1.0);
    }

    #[test]
    fn a_circle_says_which_pages_are_due() {
        let mut known = known();
        second(&mut known, 500..600, 0.0);
        assert_eq!(known.expect(900, 1.0, 2.0, 0.7), 0.7, "one look is not enough");
        second(&mut known, 600..700, 1.0);
        let expect = |page, seconds| known.expect(page, 2.0, seconds, 0.7);
        assert!(expect(750, 0.1) > 2.0 && expect(1500, 0.1) < 0.3);
        assert!(expect(1500, 8.0) > 2.0);
        // Those before are due when the guest has come round.
        assert!(expect(100, 2.0) < 0.3 && expect(100, 10.0) > 2.0);
    }

    #[test]
    fn a_guest_that_does_something_else_is_nowhere_in_it() {
        let (mut jumps, mut little) = (known(), known());
        second(&mut jumps, 500..600, 0.0);
        second(&mut jumps, 1500..1600, 1.0);
        assert_eq!(jumps.place(), None);
        // Most of what would have been due is not written.
        second(&mut little, 500..530, 0.0);
        second(&mut little, 600..630, 1.0);
        assert_eq!(little.place(), None);
        let mut anywhere = known();
        for at in 0..2 {
            for page in 0..400 {
                anywhere.written(page * 7 % 2000, at as f64 + 0.5);
            }
            anywhere.looked(at as f64, 1.0);
        }
        assert_eq!(anywhere.place(), None);
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
