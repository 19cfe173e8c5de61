//! When pages were written last, as far as is known, and what is to be expected of them by that.
use super::gaps::{self, BINS, Curve, NEVER};

/// A page of which is only known that it has not been written for so many seconds counts as one that was written then. In
/// shorter times that would blur how pages age that are written all the time.
const SETTLED: f64 = 1.0;

/// When a page was written last: milliseconds above bit 0, which says whether it may as well have been a while before. 0:
/// not known.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Written(u32);

impl Written {
    pub const UNKNOWN: Written = Written(0);

    /// Sometime before this migration: when it was watched first, at the earliest time that there is.
    pub const EARLIER: Written = Written(1);

    /// Times past 24 days stay there.
    pub fn at(seconds: f64) -> Written {
        Written(((seconds * 1e3).max(1.0) as u32).min(u32::MAX / 2) << 1)
    }

    pub fn sometime_before(seconds: f64) -> Written {
        Written(Written::at(seconds).0 | 1)
    }

    pub fn is_sometime(self) -> bool {
        self.0 & 1 == 1
    }

    pub fn time(self) -> Option<f64> {
        (self != Written::UNKNOWN).then(|| f64::from(self.0 >> 1) / 1e3)
    }

    /// At most so old.
    pub fn age(self, now: f64) -> f64 {
        self.time().map_or(NEVER, |time| (now - time).max(0.0))
    }
}

/// Reckons what is to be expected of pages; remembers the last answer for those whose last write is not known exactly,
/// which are the same all over a region.
#[derive(Debug, Default)]
pub struct Forecast {
    /// The passes so far, by their end and their length.
    passes: Vec<(Written, f64)>,
    /// How much is written of what was written earlier, in parts of what was then.
    pub earlier: f64,
    remembered: Option<(Written, usize, f64, f64)>,
    answer: f64,
}

impl Forecast {
    /// Earlier migrations ended within so many seconds before.
    pub fn earlier_spans(&mut self, seconds: f64) {
        self.passes.push((Written::EARLIER, seconds));
    }

    /// The curves have learnt something.
    pub fn forget(&mut self) {
        self.remembered = None;
    }

    pub fn pass_ended(&mut self, began: f64, ended: f64) {
        self.passes.push((Written::sometime_before(ended), ended - began));
    }

    /// Writes expected of a page in the next `seconds`.
    pub fn expected(&mut self, last: Written, curve: &Curve, region: usize, now: f64, seconds: f64) -> f64 {
        if !last.is_sometime() {
            return curve.expected(last.age(now), seconds);
        }
        let question = (last, region, now, seconds);
        if self.remembered != Some(question) {
            let pass = self.passes.iter().rev().find(|(ended, _)| *ended == last);
            let span = pass.map_or(1.0, |(_, span)| *span);
            self.answer = curve.expected_sometime(last.age(now), span, seconds);
            if last == Written::EARLIER {
                self.answer *= self.earlier;
            }
            self.remembered = Some(question);
        }
        self.answer
    }
}

/// What peeks have shown that the curves have not learnt yet: pages that could be written since `from`, and how many of them
/// were.
#[derive(Debug, Default)]
pub struct Shown {
    pub from: f64,
    /// Of each region, by the pages' ages then.
    pub counts: Vec<[(u32, u32); BINS]>,
    /// The same of pages that are only known from earlier migrations.
    pub earlier: Vec<(u32, u32)>,
}

impl Shown {
    pub fn new(from: f64, regions: usize) -> Shown {
        Shown {
            from,
            counts: vec![[(0, 0); BINS]; regions],
            earlier: vec![(0, 0); regions],
        }
    }

    pub fn is_empty(&self) -> bool {
        self.counts.is_empty()
    }

    /// `last`: as it was before.
    pub fn count(&mut self, region: usize, last: Written, written: bool) {
        let add = |count: &mut (u32, u32)| {
            count.0 += 1;
            count.1 += u32::from(written);
        };
        if last == Written::EARLIER {
            return self.earlier.get_mut(region).into_iter().for_each(add);
        }
        let age = last.age(self.from);
        let bin = match last {
            Written::UNKNOWN => BINS - 1,
            last if last.is_sometime() && age < SETTLED => return,
            _ => gaps::bin(age),
        };
        let counts = self.counts.get_mut(region);
        counts.and_then(|region| region.get_mut(bin)).into_iter().for_each(add);
    }
}
