//! When xl is let go on to suspend the guest (after Piao's adaptive pre-copy, in Mazrekaj et al.).
//!
//! xl makes at most five passes over a running guest, whatever they are worth. In its last one it can be held back: then
//! the guest's dirty pages are sent ahead of it, in rounds, while that lowers the downtime to be expected.
use std::time::Duration;

/// What the administrator allows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// A guest that would stand still no longer than this is suspended.
    pub downtime: Duration,
    /// The most rounds while xl is held back.
    pub iterations: u32,
    /// From the migration's start; then xl is held back no longer.
    pub time: Option<Duration>,
    /// What becomes of a guest whose downtime does not come below the limit.
    pub no_convergence: NoConvergence,
}

/// What becomes of a guest that cannot converge.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum NoConvergence {
    /// It is suspended all the same, as plain xl does.
    #[default]
    GoOn,
    /// It stays where it is.
    Abort,
}

/// What to do with xl, which waits.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Next {
    /// Hold it, and send what is dirty.
    Round,
    /// Let it go on. `converged`: the downtime to be expected is within the limit.
    LetGo { converged: bool },
    Abort,
}

/// Decides after each round.
#[derive(Debug)]
pub struct Control {
    limits: Limits,
    rounds: u32,
    /// The lowest downtime that was to be expected so far.
    best: Option<Duration>,
}

/// A round pays when it leaves at most this part of the downtime that was to be expected before it.
const PAYS: f64 = 0.9;

impl Control {
    pub fn new(limits: Limits) -> Control {
        Control {
            limits,
            rounds: 0,
            best: None,
        }
    }

    /// Rounds that were decided on.
    pub fn rounds(&self) -> u32 {
        self.rounds
    }

    /// `expected`: how long the guest would stand still if xl went on now. `None`: not known, so there is nothing to wait
    /// for.
    pub fn next(&mut self, elapsed: Duration, expected: Option<Duration>) -> Next {
        let Some(expected) = expected else {
            return Next::LetGo { converged: true };
        };
        if expected <= self.limits.downtime {
            return Next::LetGo { converged: true };
        }
        let pays = self.best.is_none_or(|best| expected <= best.mul_f64(PAYS));
        self.best = Some(self.best.map_or(expected, |best| best.min(expected)));
        let in_time = self.limits.time.is_none_or(|limit| elapsed < limit);
        if pays && in_time && self.rounds < self.limits.iterations {
            self.rounds += 1;
            return Next::Round;
        }
        match self.limits.no_convergence {
            NoConvergence::GoOn => Next::LetGo { converged: false },
            NoConvergence::Abort => Next::Abort,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LIMITS: Limits = Limits {
        downtime: Duration::from_millis(300),
        iterations: 10,
        time: None,
        no_convergence: NoConvergence::GoOn,
    };

    fn ms(ms: u64) -> Option<Duration> {
        Some(Duration::from_millis(ms))
    }

    #[test]
    fn rounds_go_on_while_they_pay() {
        let mut control = Control::new(LIMITS);
        let decided: Vec<Next> = [4000, 2000, 1000, 950]
            .into_iter()
            .map(|expected| control.next(Duration::ZERO, ms(expected)))
            .collect();
        let end = Next::LetGo { converged: false };
        assert_eq!(decided, [Next::Round, Next::Round, Next::Round, end]);
        assert_eq!(control.rounds(), 3);
    }

    #[test]
    fn limits_are_kept_to() {
        let mut control = Control::new(LIMITS);
        assert_eq!(control.next(Duration::ZERO, ms(300)), Next::LetGo { converged: true });
        assert_eq!(control.next(Duration::ZERO, None), Next::LetGo { converged: true });
        let abort = Limits {
            iterations: 1,
            no_convergence: NoConvergence::Abort,
            ..LIMITS
        };
        let mut control = Control::new(abort);
        assert_eq!(control.next(Duration::ZERO, ms(4000)), Next::Round);
        assert_eq!(control.next(Duration::ZERO, ms(2000)), Next::Abort);
        let mut control = Control::new(Limits {
            time: Some(Duration::from_secs(9)),
            ..LIMITS
        });
        assert_eq!(control.next(Duration::from_secs(8), ms(4000)), Next::Round);
        assert_eq!(
            control.next(Duration::from_secs(9), ms(2000)),
            Next::LetGo { converged: false }
        );
    }
}
