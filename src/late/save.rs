//! Somebody saves or migrates the guest with another program while pages of it are late.
//!
//! Such a program reads a page that is not there as one that the guest has given up, so what has not come when it has
//! suspended the guest is lost to it. It asks the guest to suspend itself, and gives it a minute for that: held still, the
//! guest does not answer before its pages are there. Not for all of that minute, since a request to which a guest answers
//! when nobody waits any more leaves it suspended.
use std::time::Duration;

/// How long the guest is held still; libxl waits for 60 s (`libxl_dom_suspend.c`).
const HOLD: Duration = Duration::from_secs(40);

/// What another program does with the guest.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Saving {
    #[default]
    No,
    /// It has asked the guest to suspend itself since this was last looked for.
    Asks,
    /// The guest is suspended.
    Suspended,
}

/// What to do about it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SaveStep {
    /// The guest is to be held still, and all pages are to come as fast as they can.
    Hold,
    /// It took too long: the guest may go on, and will be suspended.
    Release,
    /// The guest is suspended, and what is missing is not in what is saved of it. It is not held still any more.
    Lost,
}

/// How far it is.
#[derive(Debug, Default)]
pub struct Save {
    held_since: Option<Duration>,
    suspended: bool,
}

impl Save {
    /// What is seen while pages are missing.
    pub fn seen(&mut self, now: Duration, saving: Saving) -> Option<SaveStep> {
        let was_suspended = std::mem::replace(&mut self.suspended, saving == Saving::Suspended);
        match (saving, self.held_since) {
            (Saving::Suspended, _) => {
                self.held_since = None;
                (!was_suspended).then_some(SaveStep::Lost)
            }
            (Saving::Asks, None) => {
                self.held_since = Some(now);
                Some(SaveStep::Hold)
            }
            (_, Some(since)) if now.saturating_sub(since) >= HOLD => {
                self.held_since = None;
                Some(SaveStep::Release)
            }
            _ => None,
        }
    }

    /// Whether the guest is held still for it.
    pub fn holds(&self) -> bool {
        self.held_since.is_some()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn s(s: u64) -> Duration {
        Duration::from_secs(s)
    }

    #[test]
    fn the_guest_is_held_for_a_while_and_what_is_lost_is_said_once() {
        let mut save = Save::default();
        assert_eq!(save.seen(s(0), Saving::No), None);
        assert_eq!(save.seen(s(1), Saving::Asks), Some(SaveStep::Hold));
        assert_eq!(save.seen(s(2), Saving::Asks), None);
        assert_eq!(save.seen(s(40), Saving::No), None);
        assert!(save.holds());
        assert_eq!(save.seen(s(41), Saving::No), Some(SaveStep::Release));
        assert!(!save.holds());
        assert_eq!(save.seen(s(42), Saving::Suspended), Some(SaveStep::Lost));
        assert_eq!(save.seen(s(43), Saving::Suspended), None);
        // It was a copy, and there is another one.
        assert_eq!(save.seen(s(50), Saving::No), None);
        assert_eq!(save.seen(s(51), Saving::Asks), Some(SaveStep::Hold));
        assert_eq!(save.seen(s(52), Saving::Suspended), Some(SaveStep::Lost));
        assert!(!save.holds());
    }
}
