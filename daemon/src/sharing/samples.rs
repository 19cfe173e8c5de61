//! How sharing went over time, for the report: a bounded number of samples, which get rarer as time goes on.
use std::time::Duration;

use xenfold::control::DedupSample;

/// As many as a chart has points.
const MOST: usize = 512;

const FIRST_EVERY: Duration = Duration::from_secs(5);

pub struct Samples {
    every: Duration,
    taken: Vec<(Duration, DedupSample)>,
}

impl Default for Samples {
    fn default() -> Samples {
        Samples {
            every: FIRST_EVERY,
            taken: Vec::new(),
        }
    }
}

impl Samples {
    /// Takes a sample when one is due.
    pub fn take(&mut self, now: Duration, sample: impl FnOnce() -> DedupSample) {
        let due = self
            .taken
            .last()
            .is_none_or(|(then, _)| now.saturating_sub(*then) >= self.every);
        if !due {
            return;
        }
        if self.taken.len() >= MOST {
            let mut odd = false;
            self.taken.retain(|_| {
                odd = !odd;
                odd
            });
            self.every = self.every.saturating_mul(2);
        }
        self.taken.push((now, sample()));
    }

    /// The oldest first.
    pub fn at(&self, now: Duration) -> Vec<DedupSample> {
        let samples = self.taken.iter().map(|(then, sample)| DedupSample {
            age_s: now.saturating_sub(*then).as_secs(),
            ..sample.clone()
        });
        samples.collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn samples_get_rarer_and_never_too_many() {
        let mut samples = Samples::default();
        for second in 0..20_000 {
            samples.take(Duration::from_secs(second), || DedupSample {
                pages: second,
                ..DedupSample::default()
            });
            assert!(samples.taken.len() <= MOST);
        }
        let all = samples.at(Duration::from_secs(20_000));
        assert!(all.len() > MOST / 4);
        assert_eq!((all[0].pages, all[0].age_s), (0, 20_000));
        assert!(all.is_sorted_by(|a, b| a.age_s > b.age_s));
    }
}
