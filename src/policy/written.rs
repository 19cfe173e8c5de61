//! When pages were written last, as far as is known, and what is to be expected of them by that.
use super::gaps::{self, BINS, Curve, NEVER, Regions};
use crate::page::Pfn;
use crate::page_set::{PageSet, bits_of};

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

    pub fn is_timed(self) -> bool {
        self != Written::UNKNOWN && self != Written::EARLIER
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

/// When each page below a bound was written last. Memory: 4 bytes and 2 bits a page.
#[derive(Debug)]
pub struct LastWrites {
    of: Vec<Written>,
    /// Pages with a time, and those that only earlier migrations have seen written: of the others nothing is known, and all that
    /// have no time need not be looked at one by one.
    timed: PageSet,
    earlier: PageSet,
}

impl LastWrites {
    pub fn unknown(bound: u64) -> LastWrites {
        LastWrites {
            of: vec![Written::UNKNOWN; usize::try_from(bound).unwrap_or(0)],
            timed: PageSet::new(bound),
            earlier: PageSet::new(bound),
        }
    }

    /// Of a page past the bound nothing is known.
    pub fn get(&self, pfn: Pfn) -> Written {
        let page = usize::try_from(pfn.get()).ok();
        page.and_then(|page| self.of.get(page))
            .copied()
            .unwrap_or(Written::UNKNOWN)
    }

    pub fn set(&mut self, pfn: Pfn, written: Written) {
        if let Some(last) = usize::try_from(pfn.get()).ok().and_then(|page| self.of.get_mut(page)) {
            *last = written;
            for (kind, pages) in [
                (written == Written::EARLIER, &mut self.earlier),
                (written.is_timed(), &mut self.timed),
            ] {
                match kind {
                    true => _ = pages.insert(pfn),
                    false => pages.remove(pfn),
                }
            }
        }
    }

    /// Pages of which it is only known that they were written before this migration.
    pub fn earlier(&self) -> impl Iterator<Item = Pfn> + '_ {
        self.earlier.iter()
    }

    /// What earlier migrations have seen is of no account any more.
    pub fn forget_earlier(&mut self) {
        let earlier: Vec<Pfn> = self.earlier.iter().collect();
        earlier.into_iter().for_each(|pfn| self.set(pfn, Written::UNKNOWN));
    }

    /// Counts all pages but the `written` ones, which have the set's bound, as not written.
    pub fn count_unwritten(&self, written: &PageSet, regions: &Regions, shown: &mut Shown) {
        let sets = written.words().iter().zip(self.timed.words()).zip(self.earlier.words());
        for (((written, timed), earlier), first) in sets.zip((0..self.of.len() as u64).step_by(64)) {
            let here = u64::MAX >> (64 - (self.of.len() as u64 - first).min(64));
            let open = here & !written;
            let untimed = open & !timed;
            let one_by_one = match regions.of(first) == regions.of(first + 63) {
                true => {
                    let region = regions.of(first);
                    shown.count(region, Written::EARLIER, (untimed & earlier).count_ones(), 0);
                    shown.count(region, Written::UNKNOWN, (untimed & !earlier).count_ones(), 0);
                    open & timed
                }
                false => open,
            };
            for pfn in bits_of(one_by_one).filter_map(|bit| Pfn::new(first + bit)) {
                shown.count(regions.of(pfn.get()), self.get(pfn), 1, 0);
            }
        }
    }
}

/// Reckons what is to be expected of pages; remembers the last answers for those whose last write is not known exactly,
/// which are the same all over a region.
#[derive(Debug, Default)]
pub struct Forecast {
    /// The passes so far, by their end and their length.
    passes: Vec<(Written, f64)>,
    /// How much is written of what was written earlier, in parts of what was then.
    pub earlier: f64,
    /// Of pages of which nothing is known, of those written in earlier migrations, and of those written at some time in a pass.
    remembered: [Option<(Question, f64)>; 3],
}

/// A last write, a region, a time, and the seconds from then on.
type Question = (Written, usize, f64, f64);

impl Forecast {
    /// Earlier migrations ended within so many seconds before.
    pub fn earlier_spans(&mut self, seconds: f64) {
        self.passes.push((Written::EARLIER, seconds));
    }

    /// The curves have learnt something.
    pub fn forget(&mut self) {
        self.remembered = [None; 3];
    }

    pub fn pass_ended(&mut self, began: f64, ended: f64) {
        self.passes.push((Written::sometime_before(ended), ended - began));
    }

    /// Writes expected of a page in the next `seconds`.
    pub fn expected(&mut self, last: Written, curve: &Curve, region: usize, now: f64, seconds: f64) -> f64 {
        let kind = match last {
            Written::UNKNOWN => 0,
            Written::EARLIER => 1,
            last if last.is_sometime() => 2,
            last => return curve.expected(last.age(now), seconds),
        };
        let question = (last, region, now, seconds);
        let remembered = self.remembered.get(kind).copied().flatten();
        if let Some((_, answer)) = remembered.filter(|(asked, _)| *asked == question) {
            return answer;
        }
        let answer = match last {
            Written::UNKNOWN => curve.expected(NEVER, seconds),
            _ => {
                let pass = self.passes.iter().rev().find(|(ended, _)| *ended == last);
                let span = pass.map_or(1.0, |(_, span)| *span);
                let factor = if last == Written::EARLIER { self.earlier } else { 1.0 };
                factor * curve.expected_sometime(last.age(now), span, seconds)
            }
        };
        if let Some(place) = self.remembered.get_mut(kind) {
            *place = Some((question, answer));
        }
        answer
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

    /// Counts `pages` of a region, of which `written` were written. `last`: as it was before.
    pub fn count(&mut self, region: usize, last: Written, pages: u32, written: u32) {
        let add = |count: &mut (u32, u32)| {
            count.0 += pages;
            count.1 += written;
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
