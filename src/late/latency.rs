//! How long somebody waited for a page.
use std::time::Duration;

/// Buckets a doubling is divided into.
const STEPS: f64 = 8.0;

/// The shortest time that is told apart, in µs.
const FIRST_US: f64 = 16.0;

const BUCKETS: usize = 192;

/// Waiting times, counted in buckets that grow by a twelfth each, so that any number of them takes the same room.
#[derive(Clone, Debug)]
pub struct Latency {
    counts: Box<[u64; BUCKETS]>,
    total: u64,
    longest: Duration,
}

impl Default for Latency {
    fn default() -> Self {
        Latency {
            counts: Box::new([0; BUCKETS]),
            total: 0,
            longest: Duration::ZERO,
        }
    }
}

impl Latency {
    pub fn add(&mut self, time: Duration) {
        let bucket = (time.as_micros() as f64 / FIRST_US).max(1.0).log2() * STEPS;
        let bucket = (bucket as usize).min(BUCKETS - 1);
        if let Some(count) = self.counts.get_mut(bucket) {
            *count += 1;
        }
        self.total += 1;
        self.longest = self.longest.max(time);
    }

    pub fn count(&self) -> u64 {
        self.total
    }

    pub fn longest(&self) -> Duration {
        self.longest
    }

    /// The time that this share of all (0 to 1) did not exceed, to a twelfth; zero when there was none.
    pub fn quantile(&self, share: f64) -> Duration {
        let wanted = ((self.total as f64 * share).ceil() as u64).max(1);
        let mut seen = 0;
        for (bucket, count) in (1..).zip(self.counts.iter()) {
            seen += count;
            if seen >= wanted {
                let end = FIRST_US * f64::from(bucket).mul_add(1.0 / STEPS, 0.0).exp2();
                return Duration::from_micros(end as u64).min(self.longest);
            }
        }
        Duration::ZERO
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn shares_of_waiting_times_are_found() {
        let mut latency = Latency::default();
        assert_eq!(latency.quantile(0.5), Duration::ZERO);
        (1..=1000).for_each(|ms| latency.add(Duration::from_millis(ms)));
        let near = |share, ms: u64| {
            let found = latency.quantile(share).as_millis() as f64 / ms as f64;
            assert!((0.9..1.12).contains(&found), "{share}: {found}");
        };
        near(0.5, 500);
        near(0.99, 990);
        assert_eq!((latency.count(), latency.longest()), (1000, Duration::from_secs(1)));
        latency.add(Duration::from_secs(1 << 40));
        assert_eq!(
            latency.quantile(1.0),
            Duration::from_secs(1 << 40).min(latency.quantile(1.0))
        );
    }
}
