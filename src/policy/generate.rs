//! Traces made up: kinds of guests that the papers measure, scaled to any size.
use std::fmt;
use std::str::FromStr;
use std::time::Duration;

use super::trace::{INTERVAL, Trace, WriteError};
use crate::page::Pfn;
use crate::page_set::PageSet;

/// Samples a second.
const A_SECOND: u64 = 20;

/// What the guest does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// Writes so many percent of memory in a circle, all of it twice a second (the paper's MW, section 5.1).
    Loop(u8),
    /// The same at 40 MiB a second, which most links outrun.
    SlowLoop(u8),
    /// 12,000 writes a second for each GiB, anywhere in a third of memory.
    Random,
    /// For one to three seconds five percent of memory, somewhere, are written over and over, then others.
    Bursts,
    /// Short-lived processes write fresh and reused memory, the page cache grows, the kernel has its hot pages.
    Compile,
    /// Next to nothing.
    Idle,
}

/// All kinds, as they are named.
pub const KINDS: [(&str, Kind); 8] = [
    ("loop-20", Kind::Loop(20)),
    ("loop-40", Kind::Loop(40)),
    ("slow-loop-20", Kind::SlowLoop(20)),
    ("slow-loop-40", Kind::SlowLoop(40)),
    ("random", Kind::Random),
    ("bursts", Kind::Bursts),
    ("compile", Kind::Compile),
    ("idle", Kind::Idle),
];

impl FromStr for Kind {
    type Err = String;

    fn from_str(text: &str) -> Result<Kind, String> {
        let known = KINDS.iter().find(|(name, _)| *name == text);
        known.map(|(_, kind)| *kind).ok_or_else(|| {
            let names: Vec<&str> = KINDS.iter().map(|(name, _)| *name).collect();
            format!("`{text}` is no kind of guest: {}", names.join(", "))
        })
    }
}

impl fmt::Display for Kind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let known = KINDS.iter().find(|(_, kind)| kind == self);
        f.write_str(known.map_or("loop", |(name, _)| name))
    }
}

/// A trace of a guest with `pages` pages. The same numbers give the same trace.
///
/// # Errors
/// The size is out of a trace's bounds.
pub fn generate(kind: Kind, pages: u64, time: Duration, seed: u64) -> Result<Trace, WriteError> {
    let mut trace = Trace::new(pages, pages, INTERVAL)?;
    let samples = (time.as_millis() / INTERVAL.as_millis()).max(1) as u64;
    let mut guest = Guest {
        pages,
        chance: Chance(seed),
        written: PageSet::new(pages),
        processes: Vec::new(),
        burst: (0, 0),
    };
    for sample in 0..samples {
        guest.written.clear();
        guest.kernel();
        guest.work(kind, sample);
        trace.push(&guest.written);
    }
    Ok(trace)
}

/// Numbers by chance, the same on every machine (SplitMix64).
struct Chance(u64);

impl Chance {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mixed = (self.0 ^ self.0 >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let mixed = (mixed ^ mixed >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
        mixed ^ mixed >> 31
    }

    /// Below `end`.
    fn below(&mut self, end: u64) -> u64 {
        self.next() % end.max(1)
    }
}

struct Process {
    start: u64,
    pages: u64,
    /// Samples that it lives on.
    left: u64,
    /// How far its heap has grown.
    grown: u64,
}

struct Guest {
    pages: u64,
    chance: Chance,
    written: PageSet,
    processes: Vec<Process>,
    /// Where the burst is, and samples that it lasts on.
    burst: (u64, u64),
}

impl Guest {
    /// Adds so many pages from one on.
    fn run(&mut self, start: u64, length: u64) {
        self.written
            .insert_run(start..start.saturating_add(length).min(self.pages));
    }

    fn one(&mut self, page: u64) {
        if let Some(pfn) = Pfn::new(page) {
            self.written.insert(pfn);
        }
    }

    /// What every guest writes: a few hot pages, some now and then.
    fn kernel(&mut self) {
        let area = (self.pages / 64).max(1);
        self.run(area / 2, 24.min(area));
        for _ in 0..12 {
            // The low ones often.
            let (a, b) = (self.chance.below(area), self.chance.below(area));
            self.one(a * b / area);
        }
    }

    fn work(&mut self, kind: Kind, sample: u64) {
        let pages = self.pages;
        match kind {
            Kind::Loop(percent) => {
                let all = pages * u64::from(percent) / 100;
                self.circle(all, all * 2, sample);
            }
            Kind::SlowLoop(percent) => self.circle(pages * u64::from(percent) / 100, 40 << 8, sample),
            Kind::Random => {
                let writes = ((12_000 * pages) >> 18) / A_SECOND;
                for _ in 0..writes {
                    let page = pages / 4 + self.chance.below(pages / 3);
                    self.one(page);
                }
            }
            Kind::Bursts => self.bursts(),
            Kind::Compile => self.compile(sample),
            Kind::Idle => {}
        }
    }

    /// One page after the other, `a_second` pages a second, and again from the beginning.
    fn circle(&mut self, all: u64, a_second: u64, sample: u64) {
        let all = all.max(1);
        let each = a_second.div_ceil(A_SECOND);
        let from = self.pages / 4;
        let at = sample * each % all;
        self.run(from + at, each.min(all - at));
        self.run(from, each.saturating_sub(all - at).min(all));
    }

    fn bursts(&mut self) {
        let length = self.pages / 20;
        if self.burst.1 == 0 {
            let start = self.pages / 8 + self.chance.below(self.pages * 3 / 4);
            self.burst = (start, A_SECOND + self.chance.below(2 * A_SECOND));
        }
        self.burst.1 -= 1;
        let start = self.burst.0;
        for _ in 0..length / 3 {
            let page = start + self.chance.below(length);
            self.one(page);
        }
    }

    fn compile(&mut self, sample: u64) {
        let pages = self.pages;
        // Two run at a time, each for half a second to two, in memory that others have used before.
        while self.processes.len() < 2 {
            let size = pages / 100 + self.chance.below(pages / 40);
            let start = pages / 4 + self.chance.below(pages / 3);
            self.processes.push(Process {
                start,
                pages: size,
                left: A_SECOND / 2 + self.chance.below(A_SECOND * 3 / 2),
                grown: 0,
            });
        }
        for index in 0..self.processes.len() {
            let Some(process) = self.processes.get_mut(index) else {
                continue;
            };
            let step = process.pages / 12 + 1;
            let (start, grown) = (process.start, process.grown);
            process.grown = (grown + step).min(process.pages);
            process.left = process.left.saturating_sub(1);
            // The heap's new end, and a stack and some of the heap that change all the time.
            self.run(start + grown, step);
            self.run(start, 40);
            for _ in 0..step {
                let page = start + self.chance.below(grown.max(1));
                self.one(page);
            }
        }
        self.processes.retain(|process| process.left > 0);
        // Output and sources in the page cache, written once.
        let cache = pages * 3 / 5;
        let each = (pages >> 13).max(1);
        self.run(cache + sample * each % (pages / 3).max(1), each);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_kind_writes_what_it_says() {
        let seconds = |kind, seconds| generate(kind, 1 << 14, Duration::from_secs(seconds), 7).unwrap();
        let share = |kind, time| {
            let trace = seconds(kind, time);
            let mut all = PageSet::new(1 << 14);
            (0..trace.len()).for_each(|sample| all.union(&trace.sample(sample)));
            all.len() as f64 / f64::from(1 << 14)
        };
        for (name, kind) in KINDS {
            assert_eq!(name.parse::<Kind>().unwrap(), kind);
            assert_eq!(kind.to_string(), name);
            assert_eq!(seconds(kind, 3), seconds(kind, 3));
        }
        assert!("loop".parse::<Kind>().is_err());
        let near = |share: f64, wanted: f64| (share - wanted).abs() < 0.03;
        assert!(near(share(Kind::Loop(20), 1), 0.2));
        assert!(near(share(Kind::Loop(40), 1), 0.4));
        assert!(near(share(Kind::SlowLoop(40), 60), 0.4));
        assert!(share(Kind::Idle, 10) < 0.03);
        assert!(share(Kind::Random, 60) > 0.3 && share(Kind::Bursts, 60) > 0.5);
        assert!(share(Kind::Compile, 60) > 0.4);
    }
}
