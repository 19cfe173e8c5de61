//! xl held back at the end of its passes, while pages that it would send next go ahead of it.
//!
//! xl makes five passes and suspends the guest, whatever is left. But while it waits with the last record of the fifth it
//! can be kept waiting, and pages that have been written since that pass began can go from the guest's frames. xl sends them
//! once more, in the suspended guest's pass; one that has not changed costs a reference then. Each look at those pages and
//! what is sent after it is a round. Xen's dirty bitmap does not tell which of them are written again, since only xl may
//! empty it: their contents do.
//!
//! A page goes ahead when the forecast expects it to stay. One that was found changed since the look before waits until two looks
//! in a row find the same in it. xl is not held where the guest writes so fast that it cannot help, and let go when the guest would not stand still for longer than it may, when a
//! round has not lowered that time by a tenth, or after so many rounds, or so much time, as are allowed.
use std::time::Duration;

use super::hold::Outlook;
use crate::page::Pfn;
use crate::page_set::PageSet;

/// How long xl may be held.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RoundLimits {
    /// Rounds at most.
    pub rounds: u32,
    /// Time since the migration began after which no further round begins.
    pub until: Option<Duration>,
    /// How long the guest may stand still: with less expected there is no reason to hold xl.
    pub downtime: Duration,
}

/// A round has to leave at most this part of the downtime that was expected before it.
const WORTH: f64 = 0.9;

/// xl is held only where at least one waiting page of so many is expected to stay as it is, and not to look at it when one in so
/// many more would be dirty until then.
const HOPE: u64 = 8;

/// What the first look at the dirty bitmap says, with xl waiting at the end of its passes. In pages.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Hope {
    /// Held and dirty.
    pub waiting: u64,
    /// Held, not written since the pass began, and expected to stay.
    pub quiet: u64,
    /// Dirty, and expected to stay as they are now.
    pub stay: u64,
}

impl Hope {
    /// Whether holding xl can be worth it at all. Where a guest writes in a circle nothing stays, and there is no need to look at
    /// it. Pages that were held and are quiet can go however fast it writes elsewhere. `outlook`: from
    /// before the look; `wait`: what passed before it.
    pub fn is_any(&self, outlook: &Outlook, wait: Duration) -> bool {
        let enough = |pages: u64| pages.saturating_mul(HOPE) >= self.waiting;
        enough(self.quiet) || can_help(outlook, outlook.downtime, wait) && enough(self.quiet + self.stay)
    }
}

/// Were all that is dirty sent, what is written meanwhile would still be left.
fn can_help(outlook: &Outlook, expected: Duration, wait: Duration) -> bool {
    let newly = outlook.dirty_pages_rate / outlook.sent_pages_rate.max(1.0);
    (wait + expected).as_secs_f64() * newly < expected.as_secs_f64()
}

/// What is known of the pages that xl will send in the last pass. Memory: 4 bytes and 2 bits for each page below the bound.
#[derive(Debug)]
pub struct Rounds {
    limits: RoundLimits,
    /// Rounds that have begun.
    made: u32,
    /// Downtime expected after the last round, and after the one before.
    expected: Option<Duration>,
    before: Option<Duration>,
    /// Pages that have been looked at, and a sum over what was in each.
    seen: PageSet,
    sums: Vec<u32>,
    /// Pages that have gone ahead, and have not been seen changed since.
    there: PageSet,
    bound: u64,
}

/// What a look at a page says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Look {
    /// It was not looked at before.
    New,
    /// It has changed since the look before.
    Changed,
    /// It is as it was at the look before, and has not gone.
    Same,
    /// It has gone ahead as it is.
    There,
}

impl Rounds {
    /// Pages lie below `bound`.
    pub fn new(limits: RoundLimits, bound: u64) -> Rounds {
        Rounds {
            limits,
            made: 0,
            expected: None,
            before: None,
            seen: PageSet::new(0),
            sums: Vec::new(),
            there: PageSet::new(0),
            bound,
        }
    }

    /// Rounds that have been made.
    pub fn made(&self) -> u32 {
        self.made
    }

    /// The downtime that the last round has left.
    pub fn expected(&self) -> Option<Duration> {
        self.expected
    }

    /// Whether another round is to begin. `outlook`: as it is if xl were let go now and no round had been made; `wait`: what
    /// passes before the round's look.
    pub fn goes_on(&self, now: Duration, outlook: &Outlook, wait: Duration) -> bool {
        let worth = match (self.before, self.expected) {
            (Some(before), Some(after)) => after <= before.mul_f64(WORTH),
            _ => true,
        };
        let in_time = self.limits.until.is_none_or(|until| now < until);
        let expected = self.expected.unwrap_or(outlook.downtime);
        // However fast it writes, what is quiet can go: the first look shows whether there is any ([`Hope`]), if not much more is
        // written until then.
        let soon = wait.as_secs_f64() * outlook.dirty_pages_rate * HOPE as f64;
        let may_look = self.made == 0 && soon < expected.as_secs_f64() * outlook.sent_pages_rate;
        let can_help = may_look || can_help(outlook, expected, wait);
        worth && can_help && in_time && self.made < self.limits.rounds && expected > self.limits.downtime
    }

    /// Whether the time for holding xl is over in the middle of a round.
    pub fn is_over(&self, now: Duration) -> bool {
        self.limits.until.is_some_and(|until| now >= until)
    }

    /// A round begins.
    pub fn begin(&mut self) {
        if self.made == 0 {
            self.seen = PageSet::new(self.bound);
            self.there = PageSet::new(self.bound);
            self.sums = vec![0; usize::try_from(self.bound).unwrap_or(0)];
        }
        self.made += 1;
    }

    /// Looks at a page that holds something with this sum.
    pub fn look(&mut self, pfn: Pfn, sum: u32) -> Look {
        let Some(known) = usize::try_from(pfn.get()).ok().and_then(|page| self.sums.get_mut(page)) else {
            return Look::Changed;
        };
        let same = std::mem::replace(known, sum) == sum;
        if !self.seen.contains(pfn) {
            self.seen.insert(pfn);
            return Look::New;
        }
        if !same {
            self.there.remove(pfn);
            return Look::Changed;
        }
        match self.there.contains(pfn) {
            true => Look::There,
            false => Look::Same,
        }
    }

    /// A page goes ahead, as it was at its last look.
    pub fn goes(&mut self, pfn: Pfn) {
        self.there.insert(pfn);
    }

    /// Whether it has gone ahead, and was not seen changed since.
    pub fn is_there(&self, pfn: Pfn) -> bool {
        self.there.contains(pfn)
    }

    /// The round is over. `full`: pages that would have to go while the guest is suspended; `again`: those that would only come
    /// through xl's pipe once more; with what one of each takes.
    pub fn end(&mut self, full: f64, full_time: Duration, again: f64, again_time: Duration) {
        let seconds = full * full_time.as_secs_f64() + again * again_time.as_secs_f64();
        self.before = self.expected;
        self.expected = Some(Duration::try_from_secs_f64(seconds).unwrap_or(Duration::MAX));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MS: Duration = Duration::from_millis(1);

    fn limits(rounds: u32, until: Option<Duration>) -> RoundLimits {
        RoundLimits {
            rounds,
            until,
            downtime: 300 * MS,
        }
    }

    /// Of a guest that writes nothing.
    fn outlook(downtime: Duration) -> Outlook {
        Outlook {
            downtime,
            sent_pages_rate: 1000.0,
            ..Outlook::default()
        }
    }

    fn goes_on(rounds: &Rounds, now: Duration, expected: Duration) -> bool {
        rounds.goes_on(now, &outlook(expected), Duration::ZERO)
    }

    #[test]
    fn a_guest_that_writes_faster_than_it_is_sent_is_not_helped() {
        let mut rounds = Rounds::new(limits(9, None), 100);
        let writes = |rounds: &Rounds, rate, wait| {
            let outlook = Outlook {
                dirty_pages_rate: rate,
                ..outlook(400 * MS)
            };
            rounds.goes_on(MS, &outlook, wait)
        };
        assert!(
            writes(&rounds, 9000.0, Duration::ZERO),
            "the first look shows what is quiet"
        );
        rounds.begin();
        assert!(writes(&rounds, 900.0, Duration::ZERO) && !writes(&rounds, 1000.0, Duration::ZERO));
        assert!(writes(&rounds, 280.0, 1000 * MS) && !writes(&rounds, 300.0, 1000 * MS));
    }

    fn pfn(page: u64) -> Pfn {
        Pfn::new(page).unwrap()
    }

    #[test]
    fn a_page_goes_when_it_is_found_the_same() {
        let mut rounds = Rounds::new(limits(9, None), 100);
        rounds.begin();
        assert_eq!(rounds.look(pfn(7), 0), Look::New);
        rounds.begin();
        assert_eq!(rounds.look(pfn(7), 0), Look::Same);
        rounds.goes(pfn(7));
        assert_eq!(rounds.look(pfn(7), 0), Look::There);
        assert_eq!(rounds.look(pfn(7), 1), Look::Changed);
        assert!(!rounds.is_there(pfn(7)));
        assert_eq!(rounds.look(pfn(7), 1), Look::Same);
        // Past the bound nothing is known.
        assert_eq!(rounds.look(pfn(100), 1), Look::Changed);
        assert_eq!(rounds.look(pfn(100), 1), Look::Changed);
    }

    #[test]
    fn xl_is_held_while_it_helps() {
        let mut rounds = Rounds::new(limits(9, None), 100);
        assert!(!goes_on(&rounds, MS, 300 * MS), "it would not stand still for too long");
        assert!(goes_on(&rounds, MS, 301 * MS));
        for (full, more) in [(2000.0, true), (1000.0, true), (890.0, true), (802.0, false)] {
            rounds.begin();
            rounds.end(full, MS, 10.0, Duration::ZERO);
            assert_eq!(goes_on(&rounds, MS, MS), more, "{full}");
        }
        assert_eq!((rounds.made(), rounds.expected()), (4, Some(802 * MS)));
        rounds.begin();
        // What comes again costs its time, too.
        rounds.end(100.0, MS, 210.0, MS);
        assert_eq!(rounds.expected(), Some(310 * MS));
        assert!(goes_on(&rounds, MS, MS));
        rounds.begin();
        rounds.end(100.0, MS, 100.0, MS);
        assert!(!goes_on(&rounds, MS, MS), "now it is short enough");
    }

    #[test]
    fn where_all_is_written_again_xl_is_not_held() {
        let any = |quiet, stay, dirty_pages_rate| {
            let outlook = Outlook {
                dirty_pages_rate,
                ..outlook(400 * MS)
            };
            let waiting = 80;
            Hope { waiting, quiet, stay }.is_any(&outlook, Duration::ZERO)
        };
        assert!(any(0, 10, 900.0) && any(5, 5, 900.0) && !any(0, 9, 900.0));
        assert!(!any(9, 71, 1000.0), "it writes faster than is sent");
        assert!(any(10, 0, 1000.0), "what is quiet can go all the same");
        assert!(Hope::default().is_any(&outlook(400 * MS), 300 * MS));
    }

    #[test]
    fn rounds_and_time_are_limited() {
        assert!(!goes_on(&Rounds::new(limits(0, None), 100), MS, 900 * MS));
        let timed = Rounds::new(limits(9, Some(5 * MS)), 100);
        assert!(goes_on(&timed, 4 * MS, 900 * MS) && !goes_on(&timed, 5 * MS, 900 * MS));
        assert!(timed.is_over(5 * MS) && !timed.is_over(4 * MS));
        let mut two = Rounds::new(limits(2, None), 100);
        for (full, more) in [(9000.0, true), (4000.0, false)] {
            two.begin();
            two.end(full, MS, 0.0, MS);
            assert_eq!(goes_on(&two, MS, MS), more, "{full}");
        }
        assert_eq!(two.made(), 2);
    }
}
