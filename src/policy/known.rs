//! Which pages earlier migrations have seen written, and whether the guest still writes those.
use super::ages::Ages;

/// Once a guest writes less than this part of what is expected of these pages, they tell nothing any more. Before that they count
/// for less ([`Known::factor`]): in the first second of a migration a guest writes little, since its memory is only being write-protected.
const LEAST: f64 = 0.02;

/// The most that more writes than expected count for.
const MOST: f64 = 2.0;

/// Of the guest's pages: writes that have to be expected, or seen, before they are judged by.
const FEW: f64 = 1.0 / 1024.0;

/// What is known, and how it has fared.
#[derive(Debug)]
pub(super) struct Known {
    ages: Ages,
    /// Pages written for the first time since the guest is watched: so many were expected, so many were.
    expected: f64,
    written: f64,
    few: f64,
}

impl Known {
    pub fn new(ages: Ages, guest_pages: u64) -> Known {
        Known {
            ages,
            expected: 0.0,
            written: 0.0,
            few: (guest_pages as f64 * FEW).max(1.0),
        }
    }

    pub fn ages(&self) -> &Ages {
        &self.ages
    }

    /// Takes in what was expected of a time, and what came.
    pub fn weigh(&mut self, expected: f64, written: f64) {
        self.expected += expected;
        self.written += written;
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

    #[test]
    fn pages_that_are_hardly_written_any_more_are_known_no_more() {
        let mut known = Known::new(Ages::of(4000, |_| Some(0.0)), 4000);
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
