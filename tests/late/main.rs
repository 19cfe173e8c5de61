//! Pages that follow a guest: whatever it touches and writes while they arrive, it finds what the source had when it was
//! suspended, and no page comes over what it has written itself.
mod cuts;
mod heirs;
#[path = "../support/held.rs"]
mod held;
#[path = "../support/hosts.rs"]
mod hosts;
#[path = "../support/living.rs"]
mod living;
#[path = "../support/paged.rs"]
mod paged;
#[path = "../support/mod.rs"]
mod support;

use std::io::Write;
use std::num::NonZeroU64;
use std::sync::Arc;
use std::time::{Duration, Instant};

use cuts::with_cuts;
use held::TestContents;
use hosts::{DestinationXl, Fate, Outcome, Plan, SourceXl, kind, migrate, pass};
use living::{Anything, Dice, Log, Memory, SourceFrames, around_pages, send_pages};
use paged::{Faults, Paged};
use parking_lot::Mutex;
use xenfold::engine::source::Ending;
use xenfold::engine::{DowntimeLimit, EngineError, Holding, LeaveBehind, SAMPLE};
use xenfold::late::Mode;
use xenfold::page::Pfn;
use xenfold::policy::{Before, Forecast};
use xenfold::report::LateFigures;
use xenfold::wire::EarlyOut;

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

/// So many pages that most are still to come when the guest is let go, though they are pushed before.
fn long() -> Case {
    Case {
        pages: 12_000,
        ..Case::default()
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
