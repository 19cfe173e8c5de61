//! How many pages may be hashed: the configured rate, and the configured part of a processor, both in the share of time that
//! the processors have been idle.
use std::time::Duration;

/// What is done on a host without any idle processor: this share of the configured rate, and this part of a processor. The index
/// must not die out.
const FLOOR: f64 = 0.005;

/// Pages become due in portions of this time, so that neither the thread wakes for each page nor a portion is felt.
const PORTION: Duration = Duration::from_millis(50);

/// On a busy host portions of fewer pages than these wait for more, up to a second: what is asked of Xen and xenstore for each
/// portion costs as much as some tens of pages, and every time the thread wakes it takes the place of a guest.
const FEW_PAGES: f64 = 256.0;

/// Idle times that were taken closer together than this say nothing.
const SHORTEST: Duration = Duration::from_millis(100);

/// Time comes in as a value, since any moment.
pub struct Pace {
    limit_pages_per_s: f64,
    /// Part of a processor's time.
    limit_time: f64,
    /// `None`: not known.
    idle_share: Option<f64>,
    /// The idle times last seen, and when.
    last_idle: Option<(Duration, Vec<Duration>)>,
    due_pages: f64,
    /// Seconds that may be spent; below zero when more were.
    due_time: f64,
    counted: Option<Duration>,
}

impl Pace {
    /// Percent of one processor; 0: no bound.
    pub fn new(limit_pages_per_s: u32, limit_percent: u32) -> Pace {
        Pace {
            limit_pages_per_s: f64::from(limit_pages_per_s.max(1)),
            limit_time: match limit_percent {
                0 => f64::INFINITY,
                percent => f64::from(percent) / 100.0,
            },
            idle_share: None,
            last_idle: None,
            due_pages: 0.0,
            due_time: 0.0,
            counted: None,
        }
    }

    /// Takes what Xen tells of the processors, once a second or so.
    pub fn observe(&mut self, now: Duration, idle: Vec<Duration>) {
        if let Some((then, before)) = &self.last_idle {
            let passed = now.saturating_sub(*then);
            if passed < SHORTEST {
                return;
            }
            let shares = before.iter().zip(&idle).filter_map(|(before, idle)| {
                // Zero: offline. A processor that comes back begins again, which tells nothing.
                let idle = idle.checked_sub(*before).filter(|_| !idle.is_zero())?;
                Some((idle.as_secs_f64() / passed.as_secs_f64()).min(1.0))
            });
            let (mut sum, mut count) = (0.0, 0.0);
            for share in shares {
                sum += share;
                count += 1.0;
            }
            self.idle_share = (count > 0.0).then(|| sum / count);
        }
        self.last_idle = Some((now, idle));
    }

    /// Xen does not tell: as if all processors were busy.
    pub fn observe_nothing(&mut self) {
        self.idle_share = None;
        self.last_idle = None;
    }

    pub fn idle_share(&self) -> Option<f64> {
        self.idle_share
    }

    fn rate(&self) -> f64 {
        self.limit_pages_per_s * self.idle_share.unwrap_or(0.0).max(FLOOR)
    }

    /// Seconds of a processor's time in a second.
    fn time_rate(&self) -> f64 {
        // Without a bound there is none on a busy host either.
        self.limit_time * self.idle_share.unwrap_or(0.0).max(FLOOR / self.limit_time.min(1.0))
    }

    fn portion(&self) -> f64 {
        let of_a_second = self.rate().min(FEW_PAGES);
        (self.rate() * PORTION.as_secs_f64()).max(of_a_second).max(1.0)
    }

    /// How many pages may be hashed now, at most `most`, or how long to wait until some may.
    pub fn due(&mut self, now: Duration, most: usize) -> Result<usize, Duration> {
        let passed = self.counted.map_or(Duration::ZERO, |then| now.saturating_sub(then));
        self.counted = Some(now);
        let time = self.time_rate();
        self.due_time = (self.due_time + time * passed.as_secs_f64()).min(0.0);
        // What could not be used in time is not made up for.
        let portion = self.portion();
        self.due_pages = (self.due_pages + self.rate() * passed.as_secs_f64()).min(portion * 2.0);
        let portion = portion.min(most as f64);
        if self.due_pages < portion {
            let missing = (portion - self.due_pages) / self.rate();
            // Never zero, whatever is rounded.
            return Err(Duration::from_secs_f64(missing).max(Duration::from_millis(1)));
        }
        if self.due_time < 0.0 {
            return Err(Duration::from_secs_f64(-self.due_time / time).max(Duration::from_millis(1)));
        }
        Ok((self.due_pages as usize).clamp(1, most))
    }

    /// So many have been hashed, which took so much of a processor's time.
    pub fn spend(&mut self, pages: f64, time: Duration) {
        self.due_pages -= pages;
        self.due_time -= time.as_secs_f64();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SECOND: Duration = Duration::from_secs(1);

    fn ms(ms: u64) -> Duration {
        Duration::from_millis(ms)
    }

    /// Pages hashed in this many seconds, by a caller that waits as it is told.
    fn hashed(pace: &mut Pace, from: Duration, seconds: u32) -> usize {
        let (mut now, mut all) = (from, 0);
        while now < from + SECOND * seconds {
            match pace.due(now, 1024) {
                Ok(pages) => {
                    pace.spend(pages as f64, Duration::ZERO);
                    all += pages;
                }
                Err(wait) => now += wait,
            }
        }
        all
    }

    #[test]
    fn busy_processors_slow_it_down() {
        let mut pace = Pace::new(20_000, 0);
        let near = |pages: usize, expected: usize| pages.abs_diff(expected) <= expected / 10 + 5;
        assert!(near(hashed(&mut pace, ms(0), 10), 1000), "nothing is known yet");
        pace.observe(SECOND * 10, vec![SECOND * 50; 4]);
        assert_eq!(pace.idle_share(), None, "one look is no difference");
        for (at, gained, share) in [(20, 10, 1.0), (30, 5, 0.5), (40, 0, 0.0), (50, 15, 1.0)] {
            let (_, before) = pace.last_idle.clone().unwrap();
            pace.observe(SECOND * at, before.iter().map(|idle| *idle + SECOND * gained).collect());
            assert_eq!(pace.idle_share(), Some(share));
            let pages = hashed(&mut pace, SECOND * at, 10);
            let expected = 200_000.0 * f64::max(share, FLOOR);
            assert!(near(pages, expected as usize), "{pages} at {share}");
        }
        pace.observe_nothing();
        assert!(near(hashed(&mut pace, SECOND * 70, 10), 1000));
    }

    /// Ten pages each twentieth of a second would cost as much as the pages in what is asked for each portion.
    #[test]
    fn a_slow_pace_has_few_portions() {
        for (limit, portions) in [(20_000, 9..=10), (100_000, 18..=20), (6000, 9..=10)] {
            let mut pace = Pace::new(limit, 0);
            let (mut now, mut all) = (ms(0), 0);
            while now < SECOND * 10 {
                match pace.due(now, 1024) {
                    Ok(pages) => {
                        pace.spend(pages as f64, Duration::ZERO);
                        all += 1;
                    }
                    Err(wait) => now += wait,
                }
            }
            assert!(portions.contains(&all), "{all} in ten seconds");
        }
    }

    #[test]
    fn processors_count_alike_and_offline_ones_do_not() {
        let mut pace = Pace::new(100, 0);
        pace.observe(ms(0), vec![SECOND, SECOND, Duration::ZERO, SECOND]);
        pace.observe(ms(50), vec![SECOND * 9; 4]);
        assert_eq!(pace.idle_share(), None, "too close together");
        // Idle, busy, offline, back from being offline.
        pace.observe(ms(1000), vec![SECOND * 2, SECOND, Duration::ZERO, ms(10)]);
        assert_eq!(pace.idle_share(), Some(0.5));
        pace.observe(ms(2000), vec![]);
        assert_eq!(pace.idle_share(), None);
    }

    #[test]
    fn lost_time_is_not_made_up_for() {
        let mut pace = Pace::new(20_000, 0);
        pace.observe(ms(0), vec![SECOND]);
        pace.observe(ms(1000), vec![SECOND * 2]);
        assert!(pace.due(ms(1000), 1024).is_err());
        assert_eq!(pace.due(SECOND * 3600, 1024), Ok(1024));
        pace.spend(2000.0, Duration::ZERO);
        assert!(pace.due(SECOND * 3600, 1024).is_err());
        // Time that stands still or runs back.
        assert!(pace.due(ms(5), 1024).is_err());

        let mut slow = Pace::new(1, 0);
        assert_eq!(slow.due(ms(0), 1024), Err(SECOND * 200));
        assert_eq!(slow.due(SECOND * 200, 1024), Ok(1));
    }

    /// Each portion takes as long as its pages do: of a second of a processor's time, so much goes into it.
    #[test]
    fn it_takes_no_more_of_a_processor_than_it_may() {
        for (idle, page_us, percent, expected) in [
            (1000, 500, 25, 500),
            (500, 500, 25, 250),
            (0, 500, 25, 10),
            (1000, 10, 25, 20_000),
        ] {
            let mut pace = Pace::new(20_000, percent);
            pace.observe(ms(0), vec![SECOND]);
            pace.observe(ms(1000), vec![SECOND + ms(idle)]);
            let (mut now, mut all) = (ms(1000), 0);
            while now < ms(101_000) {
                match pace.due(now, 1024) {
                    Ok(pages) => {
                        let time = Duration::from_micros(page_us * pages as u64);
                        pace.spend(pages as f64, time);
                        all += pages;
                        // Others run meanwhile, too.
                        now += time * 2;
                    }
                    Err(wait) => now += wait,
                }
            }
            let found = all as f64 / 100.0;
            assert!(
                (found / f64::from(expected) - 1.0).abs() < 0.15,
                "{found} a second, not {expected}"
            );
        }
    }
}
