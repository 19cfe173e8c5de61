//! How fast pages go to the link, and how fast xl offers them.
use crate::page::PAGE_SIZE;

/// Pages a second before any have been sent: a link of 1 Gbit/s.
const FIRST_RATE: f64 = 30_000.0;

/// Time between two looks at the rate, and the weight of one.
const LOOK_EVERY: f64 = 0.1;
const WEIGHT: f64 = 0.3;

/// Pages and wire bytes a second, while the link is what is waited for.
#[derive(Clone, Copy, Debug)]
pub(super) struct Rate {
    pub pages: f64,
    pub bytes_each: f64,
    measured: bool,
    looked: f64,
    looked_pages: u64,
    looked_bytes: u64,
    /// Pages held since the last look: time went into reading them.
    pub held: u64,
}

impl Default for Rate {
    fn default() -> Rate {
        Rate {
            pages: FIRST_RATE,
            bytes_each: PAGE_SIZE as f64,
            measured: false,
            looked: 0.0,
            looked_pages: 0,
            looked_bytes: 0,
            held: 0,
        }
    }
}

impl Rate {
    /// What has gone to the link by now, since the migration's start.
    pub fn sent(&mut self, now: f64, pages: u64, wire_bytes: u64) {
        let (seconds, new) = (now - self.looked, pages.saturating_sub(self.looked_pages));
        if seconds < LOOK_EVERY {
            return;
        }
        // Time in which records were read and held tells nothing of the link.
        if new > 0 && self.held < new {
            let bytes = wire_bytes.saturating_sub(self.looked_bytes);
            let weight = if self.measured { WEIGHT } else { 1.0 };
            self.pages += weight * (new as f64 / seconds - self.pages);
            self.bytes_each += weight * (bytes as f64 / new as f64 - self.bytes_each);
            self.measured = true;
        }
        self.looked = now;
        self.looked_pages = pages;
        self.looked_bytes = wire_bytes;
        self.held = 0;
    }
}

/// Pages a second that xl offers, whether they are held or sent; none before any have been counted.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Pace {
    pub pages: Option<f64>,
    looked: f64,
    since: u64,
}

impl Pace {
    /// A record of so many pages begins: those before are done with.
    pub fn record(&mut self, now: f64, pages: usize) {
        let seconds = now - self.looked;
        if self.since == 0 {
            self.looked = now;
        } else if seconds >= LOOK_EVERY {
            let pace = self.since as f64 / seconds;
            self.pages = Some(self.pages.map_or(pace, |before| before + WEIGHT * (pace - before)));
            (self.looked, self.since) = (now, 0);
        }
        self.since += pages as u64;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_pace_is_known_once_records_have_passed() {
        let mut pace = Pace::default();
        // What went before the first record, the watching for one, does not count.
        pace.record(2.0, 1000);
        assert_eq!(pace.pages, None);
        pace.record(2.05, 1000);
        assert_eq!(pace.pages, None, "too soon");
        pace.record(2.5, 1000);
        assert_eq!(pace.pages, Some(4000.0));
        pace.record(3.5, 1000);
        assert_eq!(pace.pages, Some(4000.0 + WEIGHT * (1000.0 - 4000.0)));
    }
}
