//! How long before the end of a migration pages were written for the first time: the order in which a guest writes.
//!
//! A byte a page, 0 where it was not seen written, else one more than its age in a unit that is as short as the oldest one allows.
//! So a circle of five seconds and one of five minutes are told apart equally well.

/// Ages that are told apart.
const STEPS: u32 = u8::MAX as u32;

/// The unit of models from before there was one.
const SECOND: u32 = 1000;

/// Longest unit: 70 hours for the oldest.
pub(super) const LONGEST_UNIT_MS: u32 = 1_000_000;

/// A page that has not been written again is forgotten once it is so many seconds old, or twice as old as the migration is long.
const FORGOTTEN: f64 = 600.0;

/// Of each page below the bound, or of none.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Ages {
    unit_ms: u32,
    bytes: Vec<u8>,
}

impl Default for Ages {
    fn default() -> Ages {
        Ages::from_parts(SECOND, Vec::new())
    }
}

impl Ages {
    /// `seconds`: a page's age, at least 0; `None`: it was not seen written. Asked twice for each.
    pub fn of(pages: usize, seconds: impl Fn(usize) -> Option<f64>) -> Ages {
        let oldest = (0..pages).filter_map(&seconds).fold(0.0, f64::max);
        let unit_ms = ((oldest * 1e3 / f64::from(STEPS)).ceil() as u32).clamp(1, LONGEST_UNIT_MS);
        let unit = f64::from(unit_ms) / 1e3;
        let byte = |page| seconds(page).map_or(0, |age| 1 + (age / unit).clamp(0.0, f64::from(STEPS - 1)) as u8);
        Ages::from_parts(unit_ms, (0..pages).map(byte).collect())
    }

    /// As they are kept; a unit of 0 is a second.
    pub fn from_parts(unit_ms: u32, bytes: Vec<u8>) -> Ages {
        let unit_ms = if unit_ms == 0 { SECOND } else { unit_ms };
        Ages { unit_ms, bytes }
    }

    /// The same with fewer steps, which compresses better.
    pub fn coarser(&self, by: u8) -> Ages {
        let byte = |byte: &u8| byte.checked_sub(1).map_or(0, |age| 1 + age / by.max(1));
        let unit_ms = self.unit_ms.saturating_mul(by.into()).min(LONGEST_UNIT_MS);
        Ages::from_parts(unit_ms, self.bytes.iter().map(byte).collect())
    }

    pub fn unit_ms(&self) -> u32 {
        self.unit_ms
    }

    /// Only to be compared with each other: the higher the earlier a page was written, 0 where it was not.
    pub fn bytes(&self) -> &[u8] {
        &self.bytes
    }

    pub fn is_empty(&self) -> bool {
        self.bytes.is_empty()
    }

    pub fn contains(&self, page: usize) -> bool {
        self.bytes.get(page).is_some_and(|byte| *byte > 0)
    }

    /// The age of a page.
    pub fn seconds(&self, page: usize) -> Option<f64> {
        let byte = self.bytes.get(page).filter(|byte| **byte > 0)?;
        Some((f64::from(*byte) - 0.5) * f64::from(self.unit_ms) / 1e3)
    }

    /// The age of a page that was not written in a migration of so many `seconds`; `None` too if it is forgotten now.
    pub fn later(&self, page: usize, seconds: f64) -> Option<f64> {
        let age = self.seconds(page)? + seconds;
        (age <= FORGOTTEN.max(2.0 * seconds)).then_some(age)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_unit_is_as_short_as_the_oldest_age_allows() {
        for (longest, unit_ms) in [(0.1, 1), (10.0, 40), (255.0, 1000), (3600.0, 14_118)] {
            let ages = Ages::of(1000, |page| (page > 0).then(|| longest * page as f64 / 999.0));
            assert_eq!(ages.unit_ms(), unit_ms);
            assert!(!ages.contains(0) && ages.seconds(0).is_none());
            for page in 1..1000 {
                let apart = ages.seconds(page).unwrap() - longest * page as f64 / 999.0;
                assert!(apart.abs() <= f64::from(unit_ms) / 1e3, "{apart} {page}");
            }
        }
        let none = Ages::of(5, |_| None);
        assert_eq!((none.bytes(), none.unit_ms()), (&[0; 5][..], 1));
    }

    #[test]
    fn ages_that_are_passed_on_stay_as_they_are() {
        let bytes: Vec<u8> = (0..=u8::MAX).collect();
        for unit_ms in [1, 40, 1000, LONGEST_UNIT_MS] {
            let ages = Ages::from_parts(unit_ms, bytes.clone());
            let again = Ages::of(256, |page| ages.seconds(page));
            assert!(
                again.bytes == ages.bytes && again.unit_ms.abs_diff(unit_ms) <= unit_ms / 256,
                "{unit_ms}"
            );
        }
        let coarse = Ages::from_parts(40, bytes).coarser(4);
        assert_eq!(
            (
                coarse.unit_ms(),
                coarse.bytes()[0],
                coarse.bytes()[4],
                coarse.bytes()[5]
            ),
            (160, 0, 1, 2)
        );
    }

    #[test]
    fn pages_that_are_not_written_any_more_are_forgotten_in_the_end() {
        let ages = Ages::from_parts(0, vec![0, 1, 200]);
        assert_eq!(ages.later(0, 9.0), None);
        assert_eq!(ages.later(1, 9.0), Some(9.5));
        assert_eq!(ages.later(2, 400.0), Some(599.5));
        assert_eq!(Ages::from_parts(3000, vec![200]).later(0, 10.0), None);
        assert_eq!(
            Ages::from_parts(3000, vec![200]).later(0, 600.0),
            Some(1198.5),
            "it has not had time to come again"
        );
    }
}
