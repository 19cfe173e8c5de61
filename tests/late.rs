//! Pages that follow a guest: whatever it touches and writes while they arrive, it finds what the source had when it was
//! suspended, and no page comes over what it has written itself.
#[path = "support/held.rs"]
mod held;
#[path = "support/hosts.rs"]
mod hosts;
#[path = "support/living.rs"]
mod living;
#[path = "support/paged.rs"]
mod paged;
mod support;

use std::io::Write;
use std::num::NonZeroU64;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use held::TestContents;
use hosts::mortal::{Handled, Kept, Mortal};
use hosts::{DestinationXl, Fate, Heir, Hook, ImageFrames, Listening, Outcome, Plan, SourceXl, kind, migrate, pass};
use living::{Anything, Dice, Log, Memory, SourceFrames, around_pages, send_pages};
use paged::{Faults, Paged};
use parking_lot::Mutex;
use xenfold::engine::source::{self, Ending, Following};
use xenfold::engine::takeover::{self, Start, TakeOver};
use xenfold::engine::{
    DowntimeLimit, EngineError, GuestPaging, Holding, JournalFile, LeaveBehind, LinkEnds, SAMPLE, refuse,
};
use xenfold::late::Mode;
use xenfold::late::journal::{Facts, Journal};
use xenfold::page::Pfn;
use xenfold::policy::{Before, Forecast};
use xenfold::report::LateFigures;
use xenfold::wire::{EarlyOut, Hello};

const PIPE_BYTES: u64 = 64 << 10;

#[derive(Clone, Debug)]
struct Case {
    seed: u64,
    pages: u64,
    batch: usize,
    /// What each batch takes xl to read.
    batch_time: Duration,
    passes: usize,
    mode: Mode,
    now_pages: usize,
    faults: Faults,
    /// Late pages are taken out while the guest still runs at the source.
    early: bool,
    /// Pages that the guest touches at the destination while the others come.
    touches: u64,
}

impl Default for Case {
    fn default() -> Case {
        Case {
            seed: 1,
            pages: 1500,
            batch: 200,
            batch_time: Duration::ZERO,
            passes: 3,
            mode: Mode::Postcopy,
            now_pages: 40,
            faults: Faults::default(),
            early: true,
            touches: 300,
        }
    }
}

/// The plan, the source's memory, and the guest at the destination.
fn plan(case: &Case) -> (Plan, Arc<Mutex<Memory>>, Paged) {
    let memory = Arc::new(Mutex::new(Memory::new(case.seed, case.pages, 20)));
    let (xls, passes, pages) = (memory.clone(), case.passes, case.pages);
    let (batch, batch_time) = (case.batch, case.batch_time);
    let live = move |out: &mut dyn Write| {
        let (before, behind) = around_pages();
        out.write_all(&before)?;
        let mut list: Vec<u64> = (0..pages).collect();
        for pass in 0..=passes {
            if pass > 0 {
                let mut memory = xls.lock();
                memory.suspended = pass == passes;
                list = memory.dirty.iter().map(Pfn::get).collect();
                memory.dirty.clear();
            }
            send_pages(&xls, out, &list, batch, batch_time)?;
        }
        out.write_all(&behind)
    };
    let base = Plan::new(Vec::new());
    let guest = Paged::new(base.image.clone(), case.faults);
    let (starting, source, touches, seed) = (guest.clone(), memory.clone(), case.touches, case.seed);
    let start = move || {
        if touches > 0 {
            let right = move |page: u64| Some(source.lock().page(page)?[0]);
            starting.run(seed ^ 3, touches, pages, right);
        }
    };
    let plan = Plan {
        live: Some(Box::new(live)),
        verify: true,
        paging: Some(Box::new(guest.clone())),
        early: case.early.then(|| EarlyOut {
            ring_page: case.pages + 1,
            pages: case.pages,
            highest_page: case.pages,
            never: vec![case.pages / 2],
        }),
        filled: Some(Box::new({
            let guest = guest.clone();
            move |page| guest.filled(page)
        })),
        started: Some(Box::new(start)),
        holding: Some(Holding {
            max_rounds: 30,
            max_time: None,
            log: Box::new(Log(memory.clone())),
            frames: Box::new(SourceFrames(memory.clone())),
            policy: Box::new(Forecast::new(
                case.pages,
                case.pages,
                SAMPLE,
                Before::default(),
                Duration::from_millis(300),
            )),
            pipe_bytes: PIPE_BYTES,
            model_time: Duration::from_millis(200),
            downtime: DowntimeLimit {
                limit: Duration::ZERO,
                abort: false,
            },
            behind: Some(LeaveBehind {
                mode: case.mode,
                now_pages: case.now_pages,
                announces: false,
            }),
        }),
        ..base
    };
    (plan, memory, guest)
}

/// Every page is what the source had, or what the guest has written since.
fn compare(memory: &Mutex<Memory>, guest: &Paged, pages: u64) {
    let image = guest.stop();
    let (written, given_up, wrong) = guest.story();
    assert!(wrong.is_empty(), "{wrong:?}");
    let memory = memory.lock();
    for page in (0..pages).filter(|page| !given_up.contains(page)) {
        let right = match (written.get(&page), memory.page(page)) {
            (Some(value), _) => vec![*value; 4096],
            (None, Some(right)) => right,
            (None, None) => continue,
        };
        let found = image.get(&page);
        assert_eq!(found, Some(&right), "page {page}: {:?}", found.map(|page| page[0]));
    }
    assert_eq!(guest.condition(), (0, true, false), "pages out, paging off, held still");
}

fn completed(outcome: &Outcome) -> LateFigures {
    assert!(
        matches!(outcome.ending, Ending::Completed { status: 0 }),
        "{:?}; {:?}",
        outcome.ending,
        outcome.destination
    );
    assert_eq!(
        (outcome.source_xl, outcome.destination_xl),
        (SourceXl::Gone, DestinationXl::Running)
    );
    outcome.figures.late.clone().unwrap_or_default()
}

#[test]
fn a_guest_finds_its_memory_while_it_follows() {
    for seed in 0..30 {
        let mut dice = Dice(seed);
        let case = Case {
            seed,
            pages: 1 + dice.throw(1500),
            batch: 1 + dice.throw(300) as usize,
            batch_time: Duration::ZERO,
            passes: 1 + dice.throw(4) as usize,
            mode: [Mode::Postcopy, Mode::Hybrid][dice.throw(2) as usize],
            now_pages: dice.throw(100) as usize,
            faults: Faults {
                busy: [0, 0, 7, 100][dice.throw(4) as usize],
                ..Faults::default()
            },
            touches: dice.throw(600),
            early: dice.throw(3) > 0,
        };
        let (plan, memory, guest) = plan(&case);
        let outcome = migrate(plan);
        let late = completed(&outcome);
        compare(&memory, &guest, case.pages);
        assert!(case.early || late.early == 0, "{late:?}");
        assert_eq!(late.missing, 0, "{late:?}");
        let came = late.pushed + late.fetched + late.prefetched + late.given_up;
        assert_eq!(late.pages, came, "{late:?}");
    }
}

#[test]
fn nearly_all_follows_where_that_is_wanted() {
    let case = Case::default();
    // Where the guest gets no processor all may be there before it touches anything.
    for _ in 0..20 {
        let (plan, memory, guest) = plan(&case);
        let outcome = migrate(plan);
        let late = completed(&outcome);
        compare(&memory, &guest, case.pages);
        assert!(late.started && late.pages > case.pages * 8 / 10, "{late:?}");
        assert!(
            outcome.figures.wire_bytes < 4096 * case.pages,
            "pages that repeat cost little"
        );
        if late.faults > 0 {
            assert!(late.latency_longest_us > 0, "{late:?}");
            return;
        }
    }
    panic!("nobody ever waited for a page");
}

/// What is late is taken out before the guest is suspended, and what comes again before that comes back first.
#[test]
fn late_pages_go_out_while_the_guest_runs_at_its_source() {
    for (mode, early) in [(Mode::Postcopy, true), (Mode::Hybrid, true), (Mode::Postcopy, false)] {
        // Where the machine is busy there may be too little time for it.
        let seen = (0..20).any(|seed| {
            let case = Case {
                seed,
                mode,
                early,
                passes: 5,
                batch: 40,
                batch_time: Duration::from_millis(4),
                pages: 4000,
                ..Case::default()
            };
            let (mut plan, memory, guest) = plan(&case);
            if let Some(holding) = plan.holding.as_mut().filter(|_| mode == Mode::Hybrid) {
                holding.policy = Box::new(Anything {
                    dice: Dice(seed),
                    hold_percent: 40,
                    release_percent: 10,
                    stay_percent: 0,
                    asked: Vec::new(),
                    known: Vec::new(),
                });
            }
            // As xl's helper needs its time, so that some have gone out when others come again.
            let outcome = migrate(Plan {
                apply_delay: Duration::from_millis(5),
                ..plan
            });
            let late = completed(&outcome);
            compare(&memory, &guest, case.pages);
            let held = outcome.figures.holding;
            // Those held last did not come again: they follow.
            match mode {
                Mode::Hybrid => assert!(held.again_pages + held.released_pages < held.held_pages, "{held:?}"),
                _ => assert_eq!((held.held_pages, held.again_pages), (0, 0)),
            }
            (late.early > 0 && guest.came_back() > 0) || (!early && late.early == 0)
        });
        assert!(seen, "{mode}: none went out, or none came again");
    }
}

#[test]
fn a_guest_that_stays_paused_is_compared_as_a_whole() {
    let case = Case {
        touches: 0,
        ..Case::default()
    };
    let (plan, memory, guest) = plan(&case);
    let outcome = migrate(plan);
    let late = completed(&outcome);
    compare(&memory, &guest, case.pages);
    assert_eq!((late.verified_pages, late.different_pages), (late.pages, 0), "{late:?}");
}

#[test]
fn without_paging_all_comes_before_the_guest_is_started() {
    let case = Case {
        faults: Faults {
            no_paging: true,
            ..Faults::default()
        },
        touches: 0,
        ..Case::default()
    };
    let (plan, memory, guest) = plan(&case);
    let outcome = migrate(plan);
    let late = completed(&outcome);
    assert_eq!(late.pages, late.fetched_before, "{late:?}");
    compare(&memory, &guest, case.pages);
}

#[test]
fn a_host_that_cannot_gets_the_guest_whole() {
    let case = Case {
        touches: 0,
        ..Case::default()
    };
    let (plan, memory, guest) = plan(&case);
    let outcome = migrate(Plan { paging: None, ..plan });
    assert_eq!(completed(&outcome).pages, 0);
    let (_, _, wrong) = guest.story();
    assert!(wrong.is_empty());
    let memory = memory.lock();
    for page in 0..case.pages {
        let right = memory.page(page);
        assert!(
            right.is_none() || outcome.image.get(&page) == right.as_ref(),
            "page {page}"
        );
    }
}

#[test]
fn a_guest_that_is_destroyed_needs_no_pages() {
    let case = Case {
        faults: Faults {
            destroyed_after: Some(20),
            ..Faults::default()
        },
        pages: 4000,
        touches: 1000,
        ..Case::default()
    };
    let (plan, _, _) = plan(&case);
    let outcome = migrate(Plan {
        link_bytes: 8 << 10,
        ..plan
    });
    completed(&outcome);
}

/// Of a suspended guest that somebody destroys while its pages are sent none is made up: it is lost, and both hosts know.
#[test]
fn pages_of_a_source_that_is_destroyed_are_not_made_up() {
    let (plan, memory, guest) = plan(&Case { touches: 0, ..long() });
    let (plan, _) = with_cuts(plan, Vec::new());
    guest.destroy_when_held_still();
    let copy = memory.clone();
    let outcome = migrate(plan.hooks(move |_| {
        let mut let_go = false;
        let forth = move |frame: &mut hosts::OnTheWay| {
            let_go |= frame.kind == kind::GO;
            if let_go && frame.kind == kind::LATE && frame.nth >= 10 {
                copy.lock().destroyed = true;
            }
            Fate::Pass
        };
        (Box::new(forth), pass())
    }));
    assert!(
        matches!(outcome.ending, Ending::Unknown(EngineError::CopyGone(_))),
        "{:?}",
        outcome.ending
    );
    assert!(guest.is_gone(), "it was not held still");
    let memory = memory.lock();
    let mut missing = 0;
    for page in 0..long().pages {
        match (memory.page(page), outcome.image.get(&page)) {
            (Some(right), Some(found)) => assert_eq!(found, &right, "page {page}"),
            (Some(_), None) => missing += 1,
            _ => {}
        }
    }
    assert!(missing > 0, "all had come before");
}

/// A page that cannot be put where it belongs for now comes again over another connection.
#[test]
fn a_page_that_finds_no_place_comes_again() {
    let case = Case {
        faults: Faults {
            fails_at: Some(40),
            ..Faults::default()
        },
        ..long()
    };
    let (plan, memory, guest) = plan(&case);
    let (plan, _) = with_cuts(plan, Vec::new());
    let outcome = migrate(plan);
    let late = completed(&outcome);
    compare(&memory, &guest, case.pages);
    assert_eq!(late.outages, 1, "{late:?}");
}

#[test]
fn a_guest_that_does_not_start_stays_with_its_source() {
    let (plan, _, _) = plan(&Case {
        touches: 0,
        ..Case::default()
    });
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

/// Late pages whose contents the destination holds do not travel; what is not there after all, or is something else by then, is
/// asked for. A destination that does not know such rows gets none.
#[test]
fn late_pages_that_are_held_there_do_not_travel() {
    for (late_known, seed) in [(true, 1), (true, 2), (true, 3), (false, 4)] {
        let case = Case {
            seed,
            touches: 300,
            ..Case::default()
        };
        let (plan, memory, guest) = plan(&case);
        let key = hosts::key();
        let all: Vec<Vec<u8>> = (0..300_u64).map(|content| content.to_le_bytes().repeat(512)).collect();
        let held = TestContents {
            pages: all
                .into_iter()
                .map(|page| (key.id(page[..].try_into().unwrap()), page))
                .collect(),
            gone_percent: 10,
            changed_percent: 10,
            ..TestContents::default()
        };
        let held = Arc::new(held);
        let outcome = migrate(Plan {
            speak_contents: [true, true],
            contents: [None, Some(held.clone())],
            late_known,
            ..plan
        });
        let late = completed(&outcome);
        compare(&memory, &guest, case.pages);
        if late_known {
            assert!(late.known > 20 && late.asked_again > 0, "{late:?}");
        } else {
            assert_eq!(late.known, 0, "{late:?}");
        }
    }
}

/// A source that lies: none of it gets into the guest.
#[test]
fn wrong_pages_are_refused() {
    let lies: [fn(&mut Vec<u8>); 3] = [
        // A page that was never late.
        |body| body[8..14].copy_from_slice(&[0xff, 0xff, 0xff, 0xff, 0xff, 0]),
        // A content that is not what it is said to be: every id is wrong.
        |body| {
            let end = body.len().min(32);
            body[16..end].iter_mut().for_each(|byte| *byte ^= 0x55);
        },
        // An end in between.
        |body| body.truncate(11),
    ];
    for lie in lies {
        let (plan, memory, guest) = plan(&Case {
            touches: 0,
            now_pages: 0,
            ..Case::default()
        });
        guest.destroy_when_held_still();
        let outcome = migrate(plan.hooks(move |_| {
            let forth = move |frame: &mut hosts::OnTheWay| {
                // The first frames may hold no ids.
                if frame.kind == kind::LATE && frame.nth == 10 {
                    lie(&mut frame.body);
                }
                Fate::Pass
            };
            (Box::new(forth), pass())
        }));
        let ended = matches!(outcome.ending, Ending::Completed { .. });
        let (_, _, wrong) = guest.story();
        assert!(wrong.is_empty(), "{wrong:?}");
        let memory = memory.lock();
        for (page, found) in &outcome.image {
            let right = memory.page(*page);
            assert!(right.is_none() || right.as_ref() == Some(found), "page {page}");
        }
        assert!(!ended || guest.condition().0 == 0);
    }
}

/// What a connection meets.
#[derive(Clone, Copy, Debug)]
struct Cut {
    to_destination: bool,
    /// Of this kind of frame the so many-th.
    kind: u16,
    nth: usize,
    fate: Fate,
}

impl Cut {
    /// Anywhere once the guest has been let go.
    fn at_random(dice: &mut Dice, first: bool) -> Cut {
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

    fn hooks(self, let_go: Arc<AtomicBool>, cuts: Arc<AtomicU64>) -> (Hook, Hook) {
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
fn with_cuts(plan: Plan, cuts: Vec<Cut>) -> (Plan, Arc<AtomicU64>) {
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

/// So many pages that most are still to come when the guest is let go, though they are pushed before.
fn long() -> Case {
    Case {
        pages: 12_000,
        ..Case::default()
    }
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

/// What `xenfold receive --rejoin` does at the destination when the agent was killed. Each is killed in its turn, after so
/// many acts; the last one is not.
fn heir(folder: &Path, plan: &Plan, guest: &Paged, mut lives: Vec<i64>) -> (Heir, Arc<Mutex<Vec<String>>>) {
    lives.reverse();
    let (path, guest) = (folder.join("journal"), guest.clone());
    let (image, xl, lives) = (plan.image.clone(), plan.destination_xl.clone(), Mutex::new(lives));
    let errors: Arc<Mutex<Vec<String>>> = Arc::default();
    let noted = errors.clone();
    let heir = move |ends: LinkEnds, all: &Listening| {
        let (journal, found) = match Journal::take(&path) {
            Ok(taken) => taken,
            Err(error) => {
                // Nobody reads that when the connection is cut, too.
                drop(std::thread::spawn(move || refuse(ends, &error.to_string())));
                return;
            }
        };
        let life = Mortal::after(lives.lock().pop().unwrap_or(i64::MAX));
        life.count();
        let journal = Kept::new(JournalFile::taken(journal), life.clone());
        let (all, all_again) = (all.clone(), all.clone());
        life.on_death(move || all.end());
        let listen = all_again.listen(Some(life.clone()));
        let xl = xl.clone();
        let look = move |_| {
            let until = Instant::now() + Duration::from_secs(20);
            while xl.lock().is_none() && Instant::now() < until {
                std::thread::sleep(Duration::from_millis(2));
            }
            match *xl.lock() {
                Some(DestinationXl::Running) => Start::Started,
                other => Start::Unknown(format!("{other:?}")),
            }
        };
        let taking = TakeOver {
            found,
            journal: Box::new(journal),
            paging: Box::new(Handled {
                paging: guest.clone(),
                by: life.clone(),
            }),
            frames: Some(Box::new(ImageFrames {
                image: image.clone(),
                fault: hosts::FrameFault::None,
            })),
            hello: Hello {
                late: true,
                rejoins: true,
                ..Hello::default()
            },
            listen,
            first: Some(ends),
            look: Box::new(look),
            watching: None,
            program: "heir".into(),
            usage: || (1, 2),
        };
        let noted = noted.clone();
        std::thread::spawn(move || {
            if let Err(error) = takeover::run(taking)
                && !life.is_dead()
            {
                noted.lock().push(error.to_string());
            }
            // The process ends.
            life.kill();
        });
    };
    (Arc::new(heir), errors)
}

/// A plan whose destination's agents are killed after so many acts each.
fn with_deaths(plan: Plan, guest: &Paged, folder: &Path, lives: &[i64]) -> (Plan, Mortal, Arc<Mutex<Vec<String>>>) {
    let (first, others) = lives.split_first().unwrap();
    let life = Mortal::after(*first);
    let (heir, errors) = heir(folder, &plan, guest, others.to_vec());
    let facts = Facts {
        token: hosts::TOKEN.into(),
        content_key: hosts::key().hex(),
        ..Facts::default()
    };
    let journal = JournalFile::new(folder.join("journal"), || Ok(facts));
    let paging: Box<dyn GuestPaging> = Box::new(Handled {
        paging: guest.clone(),
        by: life.clone(),
    });
    let plan = Plan {
        paging: Some(paging),
        journal: Some(Box::new(Kept::new(journal, life.clone()))),
        agent: Some((life.clone(), heir)),
        again: Some(Box::new(|_| Some((pass(), pass())))),
        ..plan
    };
    (plan, life, errors)
}

/// Whenever the agent that holds the guest is killed, and whoever goes on for it: the guest finds its memory, is let go in
/// the end, and the source's copy goes only then.
#[test]
fn an_agent_that_is_killed_has_an_heir() {
    let (mut killed, mut whole) = (0, 0);
    for seed in 0..40 {
        let mut dice = Dice(seed ^ 0xdead);
        let case = Case {
            seed,
            pages: 800 + dice.throw(3000),
            mode: [Mode::Postcopy, Mode::Hybrid][dice.throw(2) as usize],
            now_pages: dice.throw(60) as usize,
            touches: dice.throw(600),
            faults: Faults {
                busy: [0, 0, 7][dice.throw(3) as usize],
                destroyed_after: (dice.throw(6) == 0).then(|| dice.throw(300)),
                ..Faults::default()
            },
            ..Case::default()
        };
        let lives: Vec<i64> = (0..1 + dice.throw(3))
            .map(|_| {
                let most = [10, 400, 4000][dice.throw(3) as usize];
                dice.throw(most) as i64
            })
            .collect();
        let folder = tempfile::tempdir().unwrap();
        let (plan, memory, guest) = plan(&case);
        let (plan, life, errors) = with_deaths(plan, &guest, folder.path(), &lives);
        let outcome = migrate(plan);
        assert_eq!(*errors.lock(), [] as [String; 0], "{lives:?}");
        let (_, _, wrong) = guest.story();
        assert!(wrong.is_empty(), "{lives:?}: {wrong:?}");
        killed += u64::from(life.is_dead());
        if matches!(outcome.ending, Ending::Completed { .. }) {
            completed(&outcome);
            if !guest.is_gone() {
                compare(&memory, &guest, case.pages);
            }
            let journals = std::fs::read_dir(folder.path()).unwrap().count();
            // The last one may still be about to remove it.
            assert!(journals <= 1, "{lives:?}");
            whole += u64::from(life.is_dead());
        } else {
            // Before the guest was let go: xl has destroyed what it had, and nothing runs twice.
            assert_ne!(
                outcome.destination_xl,
                DestinationXl::Running,
                "{lives:?}: {:?}",
                outcome.ending
            );
            assert_ne!(outcome.source_xl, SourceXl::Gone, "{lives:?}");
        }
    }
    assert!(
        killed > 25 && whole > 20,
        "{killed} were killed, {whole} guests went on"
    );
}

/// The agent is killed at one frame after another.
#[test]
fn an_agent_is_killed_at_any_frame() {
    for (to_destination, kind, nth, before) in [
        (true, kind::LATE, 0, true),
        (true, kind::LATE, 20, false),
        (false, kind::WANT, 3, true),
        (false, kind::STARTED, 0, true),
        (false, kind::STARTED, 0, false),
        (false, kind::PONG, 10, true),
        (false, kind::XL, 2, true),
        (false, kind::XL, 2, false),
        (false, kind::FIGURES, 0, true),
    ] {
        let case = long();
        let folder = tempfile::tempdir().unwrap();
        let (plan, memory, guest) = plan(&case);
        let (plan, life, errors) = with_deaths(plan, &guest, folder.path(), &[i64::MAX]);
        let journal = folder.path().join("journal");
        let outcome = migrate(plan.hooks(move |_| {
            let hook = move |forth: bool| -> Hook {
                let (journal, life) = (journal.clone(), life.clone());
                Box::new(move |frame: &mut hosts::OnTheWay| {
                    let here = forth == to_destination && frame.kind == kind && frame.nth >= nth;
                    // Before that there is nothing to go on with: the guest is not let go yet.
                    match here && journal.exists() {
                        true if before => {
                            life.kill();
                            Fate::CutBefore
                        }
                        true => {
                            let life = life.clone();
                            std::thread::spawn(move || life.kill());
                            Fate::CutAfter
                        }
                        false => Fate::Pass,
                    }
                })
            };
            (hook(true), hook(false))
        }));
        let late = completed(&outcome);
        compare(&memory, &guest, case.pages);
        assert_eq!(*errors.lock(), [] as [String; 0], "{kind}");
        assert_eq!(late.missing, 0, "{late:?}");
    }
}

/// A plan whose source's agent is killed at some frame once the guest has been let go.
fn with_dying_source(plan: Plan, memory: &Arc<Mutex<Memory>>, folder: &Path, cut: Cut) -> (Plan, Mortal) {
    let (life, path) = (Mortal::after(i64::MAX), folder.join("source"));
    let facts = Facts {
        token: hosts::TOKEN.into(),
        content_key: hosts::key().hex(),
        ..Facts::default()
    };
    let journal = JournalFile::new(path.clone(), || Ok(facts));
    let memory = memory.clone();
    let follower = move |connect| {
        let (journal, found) = Journal::take(&path).unwrap();
        let following = Following {
            found,
            journal: Box::new(JournalFile::taken(journal)),
            frames: Box::new(SourceFrames(memory)),
            connect,
            hello: Hello::default(),
            figures: Arc::default(),
            events: source::events(),
        };
        let ending = source::follow(following).unwrap();
        assert!(!path.exists() || matches!(ending, Ending::Unknown(_)));
        ending
    };
    let (killed, dies) = (life.clone(), life.clone());
    let plan = Plan {
        source_journal: Some(Box::new(Kept::new(journal, life.clone()))),
        source_agent: Some((life, Box::new(follower))),
        again: Some(plan.again.unwrap_or_else(|| Box::new(|_| Some((pass(), pass()))))),
        ..plan
    };
    let let_go = Arc::new(AtomicBool::new(false));
    let plan = plan.hooks(move |_| {
        let hook = move |forth: bool| -> Hook {
            let (let_go, killed) = (let_go.clone(), killed.clone());
            Box::new(move |frame: &mut hosts::OnTheWay| {
                if forth && frame.kind == kind::GO {
                    let_go.store(true, Ordering::SeqCst);
                }
                let here = forth == cut.to_destination && frame.kind == cut.kind && frame.nth >= cut.nth;
                if !here || !let_go.load(Ordering::SeqCst) {
                    return Fate::Pass;
                }
                // By another thread than the agent's own, as a signal comes.
                let killed = killed.clone();
                std::thread::spawn(move || killed.kill()).join().unwrap();
                cut.fate
            })
        };
        (hook(true), hook(false))
    });
    (plan, dies)
}

/// The source's agent is killed while pages follow: they can be sent by another process, and the copy stays until they have
/// come. Whether the destination's is killed, too, is all the same.
#[test]
fn a_source_that_is_killed_has_an_heir() {
    let mut killed = 0;
    for seed in 0..12 {
        let mut dice = Dice(seed ^ 0xfeed);
        let (to_destination, kind, most) = [
            (true, kind::LATE, 10),
            (true, kind::LATE, 60),
            (false, kind::WANT, 10),
            (false, kind::STARTED, 1),
            (false, kind::PONG, 30),
        ][dice.throw(5) as usize];
        let cut = Cut {
            to_destination,
            kind,
            nth: dice.throw(most) as usize,
            fate: Fate::CutBefore,
        };
        let case = Case {
            seed,
            touches: dice.throw(600),
            ..long()
        };
        let folder = tempfile::tempdir().unwrap();
        let (plan, memory, guest) = plan(&case);
        let both = dice.throw(2) == 0;
        let (plan, errors) = if both {
            let lives = [3000 + dice.throw(9000) as i64, dice.throw(3000) as i64];
            let (plan, _, errors) = with_deaths(plan, &guest, folder.path(), &lives);
            (plan, errors)
        } else {
            (plan, Arc::default())
        };
        let (plan, life) = with_dying_source(plan, &memory, folder.path(), cut);
        let outcome = migrate(plan);
        assert_eq!(*errors.lock(), [] as [String; 0], "{cut:?}");
        assert!(
            matches!(outcome.ending, Ending::Completed { status: 0 }),
            "{cut:?}, {both}: {:?}",
            outcome.ending
        );
        compare(&memory, &guest, case.pages);
        killed += usize::from(life.is_dead());
        // A dead agent cannot tell it any more.
        let left = if life.is_dead() {
            SourceXl::Suspended
        } else {
            SourceXl::Gone
        };
        assert_eq!(outcome.source_xl, left, "{cut:?}");
    }
    assert!(killed > 6, "{killed} were killed");
}

/// A source that lied is not believed; another process that sends what is right is.
#[test]
fn after_a_wrong_page_it_can_be_tried_again() {
    let case = long();
    let folder = tempfile::tempdir().unwrap();
    let (plan, memory, guest) = plan(&case);
    let cut = Cut {
        to_destination: false,
        kind: kind::ABORT,
        nth: 0,
        fate: Fate::CutAfter,
    };
    let (mut plan, life) = with_dying_source(plan, &memory, folder.path(), cut);
    let hooks = plan.hooks;
    plan.hooks = Box::new(move |controls| {
        let (mut forth, back) = hooks(controls);
        let (mut let_go, mut lied) = (false, false);
        let lies = move |frame: &mut hosts::OnTheWay| {
            let_go |= frame.kind == kind::GO;
            if let_go && frame.kind == kind::LATE && frame.nth >= 10 && !lied {
                lied = true;
                frame.body.truncate(11);
            }
            forth(frame)
        };
        (Box::new(lies), back)
    });
    let outcome = migrate(plan);
    assert!(life.is_dead(), "nobody gave up");
    assert!(
        matches!(outcome.ending, Ending::Completed { status: 0 }),
        "{:?}",
        outcome.ending
    );
    compare(&memory, &guest, case.pages);
}

/// Another program saves the guest while pages follow, slowly: they come at once, the guest waits for that, and all of it is
/// saved; what came after it was looked at, too.
#[test]
fn a_save_meanwhile_has_all_of_the_guest() {
    for seed in 0..3 {
        let case = Case {
            seed,
            touches: 2000,
            ..long()
        };
        let (plan, memory, guest) = plan(&case);
        let (saving, saved) = (guest.clone(), Arc::new(Mutex::new(None)));
        let (keep, mut begun) = (saved.clone(), false);
        let outcome = migrate(
            Plan {
                // Alone, the push would take minutes.
                bandwidth: NonZeroU64::new(64 << 10),
                ..plan
            }
            .hooks(move |_| {
                let back = move |frame: &mut hosts::OnTheWay| {
                    if frame.kind == kind::STARTED && !std::mem::replace(&mut begun, true) {
                        let (saving, keep) = (saving.clone(), keep.clone());
                        std::thread::spawn(move || *keep.lock() = Some(saving.save()));
                    }
                    Fate::Pass
                };
                (pass(), Box::new(back))
            }),
        );
        let late = completed(&outcome);
        compare(&memory, &guest, case.pages);
        let until = Instant::now() + Duration::from_secs(10);
        while saved.lock().is_none() && Instant::now() < until {
            std::thread::sleep(Duration::from_millis(5));
        }
        let saved = saved.lock().take().unwrap();
        assert_eq!((saved.missing, late.lost_to_save), (0, 0), "{late:?}");
        let wrong: Vec<&u64> = saved
            .right
            .iter()
            .filter(|(page, right)| saved.image.get(page) != Some(right))
            .map(|(page, _)| page)
            .collect();
        assert!(wrong.is_empty(), "{} pages were not saved: {wrong:?}", wrong.len());
        assert!(outcome.elapsed < Duration::from_secs(30), "{:?}", outcome.elapsed);
    }
}
