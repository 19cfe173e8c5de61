//! Connections that break, fall silent or are set up by a stranger while pages follow.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use xenfold::engine::source::Ending;
use xenfold::late::Mode;

use crate::hosts::{self, DestinationXl, Fate, Hook, Plan, SourceXl, kind, migrate, pass};
use crate::living::Dice;
use crate::paged::Faults;
use crate::{Case, compare, completed, long, plan};

/// What a connection meets.
#[derive(Clone, Copy, Debug)]
pub struct Cut {
    pub to_destination: bool,
    /// Of this kind of frame the so many-th.
    pub kind: u16,
    pub nth: usize,
    pub fate: Fate,
}

impl Cut {
    /// Anywhere once the guest has been let go.
    pub fn at_random(dice: &mut Dice, first: bool) -> Cut {
        let (to_destination, kind, most) = match dice.throw(10) {
            0 if first => (true, kind::GO, 1),
            1 => (false, kind::WANT, 20),
            2 => (false, kind::STARTED, 1),
            // R2 is the third of a first connection, unless it is cut in pieces.
            3 => (false, kind::XL, 3),
            4 if !first => (false, kind::MISSING, 2),
            4 => (false, kind::PONG, 30),
            _ => (true, kind::LATE, 60),
        };
        let before = dice.throw(2) == 0 && kind != kind::GO;
        Cut {
            to_destination,
            kind,
            nth: dice.throw(most) as usize,
            fate: if before { Fate::CutBefore } else { Fate::CutAfter },
        }
    }

    pub fn hooks(self, let_go: Arc<AtomicBool>, cuts: Arc<AtomicU64>) -> (Hook, Hook) {
        let hook = move |forth: bool| -> Hook {
            let (let_go, cuts) = (let_go.clone(), cuts.clone());
            Box::new(move |frame: &mut hosts::OnTheWay| {
                if forth && frame.kind == kind::GO {
                    let_go.store(true, Ordering::SeqCst);
                }
                let here = forth == self.to_destination && frame.kind == self.kind && frame.nth >= self.nth;
                if !here || !let_go.load(Ordering::SeqCst) {
                    return Fate::Pass;
                }
                cuts.fetch_add(1, Ordering::SeqCst);
                self.fate
            })
        };
        (hook(true), hook(false))
    }
}

/// A plan whose connections meet these, each its own; those that follow pass all.
pub fn with_cuts(plan: Plan, cuts: Vec<Cut>) -> (Plan, Arc<AtomicU64>) {
    let (let_go, happened) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicU64::new(0)));
    let mut cuts = cuts.into_iter();
    let (first, go, count) = (cuts.next(), let_go.clone(), happened.clone());
    let next = move |cut: Option<Cut>| match cut {
        Some(cut) => cut.hooks(let_go.clone(), happened.clone()),
        None => (pass(), pass()),
    };
    let again = {
        let next = next.clone();
        move |_| Some(next(cuts.next()))
    };
    let plan = Plan {
        again: Some(Box::new(again)),
        ..plan
    };
    drop(go);
    (plan.hooks(move |_| next(first)), count)
}

/// Wherever the connection breaks while pages follow, as often as it likes: it is set up again, the guest finds its memory and
/// goes on, and xl hears how it went.
#[test]
fn a_connection_that_breaks_is_set_up_again() {
    let mut outages = 0;
    for seed in 0..24 {
        let mut dice = Dice(seed ^ 0x51ed);
        let case = Case {
            seed,
            pages: 800 + dice.throw(1500),
            mode: [Mode::Postcopy, Mode::Hybrid][dice.throw(2) as usize],
            now_pages: dice.throw(60) as usize,
            touches: dice.throw(600),
            faults: Faults {
                busy: [0, 0, 7][dice.throw(3) as usize],
                ..Faults::default()
            },
            ..Case::default()
        };
        let cuts: Vec<Cut> = (0..1 + dice.throw(3))
            .map(|n| Cut::at_random(&mut dice, n == 0))
            .collect();
        let (plan, memory, guest) = plan(&case);
        let (plan, happened) = with_cuts(
            Plan {
                link_bytes: [4 << 10, 64 << 10][dice.throw(2) as usize],
                ..plan
            },
            cuts.clone(),
        );
        let outcome = migrate(plan);
        let late = completed(&outcome);
        compare(&memory, &guest, case.pages);
        let happened = happened.load(Ordering::SeqCst);
        // One behind xl's last word needs no other connection.
        assert!(late.outages <= happened, "{cuts:?}: {late:?}, {happened}");
        outages += late.outages;
    }
    assert!(outages > 6, "{outages} connections were lost");
}

/// No connection for a while: the guest stands still, and nothing of it is wrong when it goes on.
#[test]
fn the_guest_stands_still_without_a_connection() {
    let case = Case {
        touches: 3000,
        ..long()
    };
    let (plan, memory, guest) = plan(&case);
    let cut = Cut {
        to_destination: true,
        kind: kind::LATE,
        nth: 10,
        fate: Fate::CutAfter,
    };
    let (plan, _) = with_cuts(plan, vec![cut]);
    let (watched, stood) = (guest.clone(), Arc::new(AtomicBool::new(false)));
    let (seen, mut tries) = (stood.clone(), 0);
    let outcome = migrate(Plan {
        again: Some(Box::new(move |_| {
            tries += 1;
            if tries == 1 {
                return None;
            }
            let (out, _, held) = watched.condition();
            seen.store(out > 0 && held, Ordering::SeqCst);
            Some((pass(), pass()))
        })),
        ..plan
    });
    let late = completed(&outcome);
    compare(&memory, &guest, case.pages);
    assert!(stood.load(Ordering::SeqCst), "it was not held still");
    assert!(late.outages == 1 && late.outage_ms >= 1500, "{late:?}");
}

/// A connection on which nothing comes any more, in one direction or both, is given up after seconds.
#[test]
fn silence_is_noticed() {
    for (to_destination, kind, fate) in [
        (true, kind::LATE, Fate::SilenceAfter),
        (true, kind::LATE, Fate::MuteBefore),
        (false, kind::PONG, Fate::MuteAfter),
    ] {
        let case = long();
        let (plan, memory, guest) = plan(&case);
        let cut = Cut {
            to_destination,
            kind,
            nth: 3,
            fate,
        };
        let (plan, _) = with_cuts(plan, vec![cut]);
        let outcome = migrate(plan);
        let late = completed(&outcome);
        compare(&memory, &guest, case.pages);
        assert!(
            late.outages == 1 && outcome.elapsed < Duration::from_secs(40),
            "{late:?}"
        );
    }
}

/// What does not know the token is refused, and the source still gets through.
#[test]
fn a_stranger_is_refused() {
    let case = long();
    let (plan, memory, guest) = plan(&case);
    let cut = Cut {
        to_destination: true,
        kind: kind::LATE,
        nth: 3,
        fate: Fate::CutAfter,
    };
    let (plan, _) = with_cuts(plan, vec![cut]);
    let wrong: Vec<u8> = hosts::TOKEN.bytes().rev().collect();
    let outcome = migrate(Plan {
        strangers: vec![String::from_utf8(wrong).unwrap(), String::new(), "x".repeat(32)],
        ..plan
    });
    completed(&outcome);
    compare(&memory, &guest, case.pages);
    assert_eq!(outcome.refused, 3);
}

/// GO never reached the destination, which gives up: nobody waits there, and the source says that it does not know.
#[test]
fn without_go_nobody_waits() {
    let (plan, _, _) = plan(&Case {
        touches: 0,
        ..Case::default()
    });
    let (plan, _) = with_cuts(
        plan,
        vec![Cut {
            to_destination: true,
            kind: kind::GO,
            nth: 0,
            fate: Fate::CutBefore,
        }],
    );
    let outcome = migrate(plan);
    // The destination gives up, and its xl may say so before the link is gone in that direction, too.
    let source_xl = match outcome.was_given_back() {
        true => SourceXl::Resumed,
        false => {
            assert!(matches!(outcome.ending, Ending::Unknown(_)), "{:?}", outcome.ending);
            SourceXl::Suspended
        }
    };
    assert_eq!(
        (outcome.source_xl, outcome.destination_xl),
        (source_xl, DestinationXl::Destroyed)
    );
}

/// The guest could not be started, and the connection breaks before the source hears of it.
#[test]
fn a_guest_that_did_not_start_goes_back_over_a_new_connection() {
    for nth in [2, 3] {
        let (plan, _, _) = plan(&Case {
            touches: 0,
            ..Case::default()
        });
        let cut = Cut {
            to_destination: false,
            kind: kind::XL,
            nth,
            fate: Fate::CutBefore,
        };
        let (plan, _) = with_cuts(plan, vec![cut]);
        let outcome = migrate(Plan {
            start_status: 1,
            ..plan
        });
        assert!(matches!(outcome.ending, Ending::SourceOwns(_)), "{:?}", outcome.ending);
        assert_eq!(
            (outcome.source_xl, outcome.destination_xl),
            (SourceXl::Resumed, DestinationXl::StartFailed)
        );
    }
}
