//! How likely a page is written again, by the time since it was written last.
//!
//! That time, the page's age, tells more than its write rate. Where one page after the other is written in a circle, a
//! page just written is the one that stays as it is the longest; where a burst is over, pages that were the hottest stay;
//! stacks and counters are never old. All three are curves of the same kind: writes a second, by age (a hazard curve).
//! Regions of memory have curves of their own, leaning on the whole guest's where they have been seen too little.
/// Ages up to these, in seconds, and all above: two for each doubling, since pages that are written in a circle are all of
/// one age when they are written again, and as far as a circle can be long that a migration shows twice.
const AGES: [f64; BINS - 1] = ages();
pub const BINS: usize = 26;

const fn ages() -> [f64; BINS - 1] {
    let mut ages = [0.05; BINS - 1];
    let mut at = 1;
    while at < ages.len() {
        ages[at] = match at % 2 {
            0 => ages[at - 2] * 2.0,
            _ => ages[at - 1] * std::f64::consts::SQRT_2,
        };
        at += 1;
    }
    ages
}

/// How much more a region must have been seen for its own curve to count half: seconds of one page.
const REGION_PRIOR: f64 = 4.0;

/// The same for the whole guest, beside the next higher ages.
const GUEST_PRIOR: f64 = 0.5;

/// Writes a second of a page of which nothing is known.
const UNKNOWN: f64 = 0.01;

/// Nothing is written never.
const LEAST: f64 = 1e-6;

/// What observations count that are no more believed in.
const DOUBT: f32 = 0.1;

/// What an earlier observation counts less by for one of the same size.
const FADE: f32 = 0.5;

/// An age: seconds since a page's last write. Pages that have not been seen written are [`NEVER`] years old.
pub const NEVER: f64 = 1e9;

const FRACTION_BITS: u32 = f64::MANTISSA_DIGITS - 1;
const FRACTION: u64 = (1 << FRACTION_BITS) - 1;

/// The bin of an age.
pub fn bin(age: f64) -> usize {
    // The place of the highest of the bits and the upper half of a doubling: this is asked for each page.
    let steps = age / AGES[0];
    if steps < 1.0 {
        return 0;
    }
    let bits = steps.to_bits();
    let doublings = (bits >> FRACTION_BITS) as usize + 1 - f64::MAX_EXP as usize;
    let upper = bits & FRACTION >= std::f64::consts::SQRT_2.to_bits() & FRACTION;
    (1 + 2 * doublings + usize::from(upper)).min(BINS - 1)
}

/// An age that stands for all of a bin.
pub fn typical(bin: usize) -> f64 {
    let start = bin.checked_sub(1).and_then(|before| AGES.get(before));
    match (start, AGES.get(bin)) {
        (None, Some(end)) => end / 2.0,
        (Some(start), Some(end)) => (start + end) / 2.0,
        _ => NEVER,
    }
}

/// What has been seen: seconds that pages spent at each age, and writes that ended them.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Seen {
    pub seconds: [f32; BINS],
    pub writes: [f32; BINS],
}

impl Seen {
    /// A page's age was at most `age`, and then it was written (or the watching ended).
    pub fn aged(&mut self, age: f64, pages: f64, written: bool) {
        let mut at = 0.0;
        for (index, end) in AGES.into_iter().chain([f64::INFINITY]).enumerate() {
            let until = age.min(end);
            if let Some(seconds) = self.seconds.get_mut(index) {
                *seconds += (pages * (until - at)) as f32;
            }
            at = until;
            if age < end {
                break;
            }
        }
        if let (true, Some(writes)) = (written, self.writes.get_mut(bin(age))) {
            *writes += pages as f32;
        }
    }

    /// Pages of unknown, high age were watched for `seconds` together, and `written` of them were written.
    pub fn watched_old(&mut self, seconds: f64, written: f64) {
        if let (Some(spent), Some(writes)) = (self.seconds.last_mut(), self.writes.last_mut()) {
            *spent += seconds as f32;
            *writes += written as f32;
        }
    }

    /// `pages` pages of an age were watched for `seconds`; `written` of them were written, some time within.
    ///
    /// Where the time spans several ages the writes are laid where `curve`, the one so far, expects them.
    pub fn watched(&mut self, curve: &Curve, age: f64, seconds: f64, pages: f64, written: f64) {
        let share = (written / pages.max(1e-9)).clamp(0.0, 1.0);
        let expected = (1.0 - (-curve.expected(age, seconds)).exp()).max(1e-9);
        let mut alive = 1.0;
        let (mut at, end) = (age, age + seconds);
        for index in bin(age)..BINS {
            let until = AGES.get(index).copied().unwrap_or(f64::INFINITY).min(end);
            let width = (until - at).max(0.0);
            let hazard = curve.hazards.get(index).copied().unwrap_or(UNKNOWN);
            let dies = 1.0 - (-hazard * width).exp();
            // Among those that are written, so many are in this part.
            let here = alive * dies / expected * share;
            // Those not written spend all of it here, those written here half, those written before none.
            let still = (1.0 - share) + share * alive_among_written(alive, expected);
            if let (Some(writes), Some(spent)) = (self.writes.get_mut(index), self.seconds.get_mut(index)) {
                *writes += (pages * here) as f32;
                *spent += (pages * (still - here / 2.0).max(0.0) * width) as f32;
            }
            alive *= 1.0 - dies;
            at = until;
            if at >= end {
                break;
            }
        }
    }

    /// Lets what was seen at each age count less, the more is about to be added.
    fn fade(&mut self, more: &Seen) {
        let all = self.seconds.iter_mut().zip(&mut self.writes).zip(more.seconds);
        for ((seconds, writes), new) in all {
            let keep = 1.0 - FADE * new / (*seconds + new).max(f32::MIN_POSITIVE);
            *seconds *= keep;
            *writes *= keep;
        }
    }

    fn add(&mut self, other: &Seen) {
        let pairs = self.seconds.iter_mut().zip(&other.seconds);
        pairs
            .chain(self.writes.iter_mut().zip(&other.writes))
            .for_each(|(own, more)| *own += more);
    }
}

/// The share of those to be written that are not yet, where a share `alive` of all is not yet and `expected` will be.
fn alive_among_written(alive: f64, expected: f64) -> f64 {
    ((alive - (1.0 - expected)) / expected).clamp(0.0, 1.0)
}

/// Writes a second at each age, and how many are expected up to each.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Curve {
    hazards: [f64; BINS],
    /// Writes expected of a page from its last one until it reaches each age.
    until: [f64; BINS],
    /// Seconds that a page stays unwritten before it reaches each age, on average.
    unwritten: [f64; BINS],
}

impl Curve {
    /// `prior`: the curve to lean on, `weight`: how much, in seconds of a page.
    fn new(seen: &Seen, prior: impl Fn(usize, f64) -> f64, weight: f64) -> Curve {
        let mut hazards = [UNKNOWN; BINS];
        let mut older = UNKNOWN;
        let all = hazards.iter_mut().zip(seen.seconds).zip(seen.writes).enumerate();
        for (index, ((hazard, seconds), writes)) in all.rev() {
            let prior = prior(index, older);
            *hazard = ((f64::from(writes) + weight * prior) / (f64::from(seconds) + weight)).max(LEAST);
            older = *hazard;
        }
        let mut until = [0.0; BINS];
        let mut unwritten = [0.0; BINS];
        let (mut sum, mut before, mut spent) = (0.0f64, 0.0, 0.0);
        let ends = AGES.into_iter().chain([NEVER]);
        for (((until, unwritten), hazard), end) in until.iter_mut().zip(&mut unwritten).zip(hazards).zip(ends) {
            let more = hazard * (end - before);
            spent += (-sum).exp() * (1.0 - (-more).exp()) / hazard;
            sum += more;
            before = end;
            (*until, *unwritten) = (sum, spent);
        }
        Curve {
            hazards,
            until,
            unwritten,
        }
    }

    /// Writes expected in the next `seconds` of a page of which is known that it was written, maybe more than once,
    /// within a time of `span` seconds that ended `clean` seconds ago, and not since: its last write is taken to be
    /// anywhere in that time, as far as it is not followed by another.
    pub fn expected_sometime(&self, clean: f64, span: f64, seconds: f64) -> f64 {
        let span = span.max(0.001);
        let now = self.unwritten(clean + span) - self.unwritten(clean);
        let then = self.unwritten(clean + span + seconds) - self.unwritten(clean + seconds);
        if now < 1e-9 {
            // Nothing known has gone unwritten for so long.
            return self.expected(clean, seconds);
        }
        -(then / now).clamp(1e-9, 1.0).ln()
    }

    /// Of pages that were written `seconds` ago, and maybe again since, the part that has not been for at least half of that time.
    /// Half of it where none is written again so soon.
    pub fn unwritten_since(&self, seconds: f64) -> f64 {
        let all = self.unwritten(seconds).max(f64::MIN_POSITIVE);
        1.0 - self.unwritten(seconds / 2.0) / all
    }

    /// Seconds that a page stays unwritten before it reaches an age, on average.
    fn unwritten(&self, age: f64) -> f64 {
        let index = bin(age);
        let hazard = self.hazards.get(index).copied().unwrap_or(UNKNOWN);
        let Some(before) = index.checked_sub(1) else {
            return (1.0 - (-hazard * age).exp()) / hazard;
        };
        let at = |list: &[f64]| list.get(before).copied().unwrap_or(0.0);
        let here = (1.0 - (-hazard * (age - at(&AGES))).exp()) / hazard;
        at(&self.unwritten) + (-at(&self.until)).exp() * here
    }

    /// Writes expected in the next `seconds` of a page of this age, were each to leave the page's age as it is.
    pub fn expected(&self, age: f64, seconds: f64) -> f64 {
        if age >= NEVER / 2.0 {
            return self.hazards.last().copied().unwrap_or(UNKNOWN) * seconds;
        }
        self.total(age + seconds) - self.total(age)
    }

    fn total(&self, age: f64) -> f64 {
        let index = bin(age);
        let hazard = self.hazards.get(index).copied().unwrap_or(UNKNOWN);
        let before = index.checked_sub(1);
        let start = before.and_then(|before| AGES.get(before)).copied().unwrap_or(0.0);
        let until = before.and_then(|before| self.until.get(before)).copied().unwrap_or(0.0);
        until + hazard * (age - start)
    }

    /// How likely a page of this age is written within `seconds`, 0 to 1.
    pub fn written_within(&self, age: f64, seconds: f64) -> f64 {
        1.0 - (-self.expected(age, seconds)).exp()
    }
}

/// The curves of all regions.
#[derive(Clone, Debug)]
pub struct Gaps {
    seen: Vec<Seen>,
    guest: Curve,
    curves: Vec<Curve>,
}

impl Gaps {
    /// From what was seen in each region.
    pub fn new(seen: Vec<Seen>) -> Gaps {
        let mut gaps = Gaps {
            seen,
            guest: Curve::new(&Seen::default(), |_, older| older, GUEST_PRIOR),
            curves: Vec::new(),
        };
        gaps.draw();
        gaps
    }

    /// Nothing is known.
    pub fn unknown(regions: usize) -> Gaps {
        Gaps::new(vec![Seen::default(); regions])
    }

    /// The curve of a region; the whole guest's for one that there is not.
    pub fn curve(&self, region: usize) -> &Curve {
        self.curves.get(region).unwrap_or(&self.guest)
    }

    /// Adds what was seen since; earlier observations fade.
    pub fn learn(&mut self, more: &[Seen]) {
        for (seen, more) in self.seen.iter_mut().zip(more) {
            seen.fade(more);
            seen.add(more);
        }
        self.draw();
    }

    /// What was seen so far in each region.
    pub fn seen(&self) -> &[Seen] {
        &self.seen
    }

    /// Lets all that was seen so far count for little beside what comes.
    pub fn doubt(&mut self) {
        for seen in &mut self.seen {
            let all = seen.seconds.iter_mut().chain(&mut seen.writes);
            all.for_each(|number| *number *= DOUBT);
        }
        self.draw();
    }

    fn draw(&mut self) {
        let mut all = Seen::default();
        self.seen.iter().for_each(|seen| all.add(seen));
        let guest = Curve::new(&all, |_, older| older, GUEST_PRIOR);
        self.guest = guest;
        let prior = |index: usize, _| guest.hazards.get(index).copied().unwrap_or(UNKNOWN);
        let curves = self.seen.iter().map(|seen| Curve::new(seen, prior, REGION_PRIOR));
        self.curves = curves.collect();
    }
}

/// Memory cut into regions of equal size (paper, section 3.1), the last one reaching to the guest's end.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Regions {
    pages_each: u64,
    count: u16,
}

/// What the paper found best (section 5.3): 256 regions, 4 MiB each in a guest of 1 GiB.
pub const REGIONS: u16 = 256;

impl Regions {
    /// `wanted` regions for memory of `guest_pages`. Pages lie below `bound`, which is far higher where memory has holes:
    /// there may be four times as many then.
    pub fn new(wanted: u16, guest_pages: u64, bound: u64) -> Regions {
        let wanted = wanted.clamp(1, u16::MAX / 4);
        let pages_each = guest_pages.min(bound).div_ceil(wanted.into()).max(1);
        let count = bound.div_ceil(pages_each).clamp(1, u64::from(wanted) * 4);
        Regions {
            pages_each,
            count: count as u16,
        }
    }

    /// As kept: neither may be 0.
    pub(super) fn from_parts(pages_each: u64, count: u16) -> Regions {
        Regions { pages_each, count }
    }

    pub(super) fn pages_each(&self) -> u64 {
        self.pages_each
    }

    pub fn count(&self) -> usize {
        self.count.into()
    }

    /// The region of a page.
    pub fn of(&self, page: u64) -> usize {
        let last = u64::from(self.count.saturating_sub(1));
        (page / self.pages_each.max(1)).min(last) as usize
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_circle_makes_young_pages_the_safe_ones() {
        let mut seen = Seen::default();
        let nothing = *Gaps::unknown(1).curve(0);
        // 1000 pages, each written 1 s after it was written before.
        seen.watched(&nothing, 0.0, 0.8, 1000.0, 0.0);
        seen.watched(&nothing, 0.8, 0.8, 1000.0, 1000.0);
        let gaps = Gaps::new(vec![seen]);
        let curve = gaps.curve(0);
        assert!(curve.written_within(0.0, 0.5) < 0.05);
        assert!(curve.written_within(0.7, 0.5) > 0.5);
    }

    #[test]
    fn random_writes_have_a_flat_curve() {
        let mut gaps = Gaps::unknown(1);
        // One write a second: of pages watched for 1 s, 63 % are written.
        for _ in 0..50 {
            let mut seen = Seen::default();
            seen.watched(gaps.curve(0), 0.0, 1.0, 1000.0, 632.0);
            seen.watched(gaps.curve(0), 1.0, 1.0, 1000.0, 632.0);
            gaps.learn(&[seen]);
        }
        for age in [0.0, 0.3, 1.0] {
            let likely = gaps.curve(0).written_within(age, 1.0);
            assert!((likely - 0.632).abs() < 0.1, "at {age}: {likely}");
        }
    }

    #[test]
    fn a_page_written_some_time_ago_is_of_no_certain_age() {
        let flat = Curve::new(
            &Seen {
                seconds: [100.0; BINS],
                writes: [200.0; BINS],
            },
            |_, older| older,
            0.0,
        );
        for (clean, span) in [(0.0, 1.0), (0.5, 3.0), (3.0, 0.05)] {
            let expected = flat.expected_sometime(clean, span, 0.25);
            assert!((expected - 0.5).abs() < 0.01, "{clean} {span}: {expected}");
        }
        // A circle of 0.4 s: half of the pages are written in half of it, the rest in the other half.
        let (mut seconds, mut writes) = ([100.0; BINS], [0.0; BINS]);
        (seconds[bin(0.2)], writes[bin(0.2)]) = (1.0, 1000.0);
        let circle = Curve::new(&Seen { seconds, writes }, |_, older| older, 0.0);
        let half = 1.0 - (-circle.expected_sometime(0.0, 5.0, 0.1)).exp();
        assert!((half - 0.5).abs() < 0.05, "{half}");
        assert!(circle.expected_sometime(0.1, 5.0, 0.15) > 3.0);
    }

    #[test]
    fn pages_that_are_written_all_the_time_are_hardly_ever_old() {
        let one = |writes: f32| Seen {
            seconds: [1000.0; BINS],
            writes: [writes; BINS],
        };
        let still = |writes, seconds| Curve::new(&one(writes), |_, older| older, 0.0).unwritten_since(seconds);
        assert!((still(0.001, 10.0) - 0.5).abs() < 0.01, "nearly all of them");
        // One write a second: exp(-5) of the pages get half as old.
        assert!(still(1000.0, 10.0) < 0.01);
    }

    #[test]
    fn ages_are_told_apart_by_their_bins() {
        for index in 0..BINS {
            let start = if index == 0 { 0.0 } else { AGES[index - 1] };
            let end = AGES.get(index).copied().unwrap_or(NEVER);
            for age in [start * 1.000_001, typical(index), end * 0.999_999] {
                assert_eq!(bin(age), index, "{age}");
            }
        }
        assert_eq!((bin(0.0), bin(NEVER)), (0, BINS - 1));
    }

    #[test]
    fn regions_cover_every_page() {
        for (guest, bound) in [(1, 1), (1000, 1000), (49_152, 1_044_480), (262_144, 262_144)] {
            let regions = Regions::new(REGIONS, guest, bound);
            assert!(regions.of(0) == 0 && regions.of(u64::MAX) == regions.count() - 1);
            assert!(regions.count() <= usize::from(REGIONS) * 4);
        }
        assert_eq!(Regions::new(REGIONS, 262_144, 262_144).of(1024), 1);
    }
}
