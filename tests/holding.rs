//! Pages held back from a guest that runs: whatever is held, released and written when, the other host has in the end
//! what the guest had when it was suspended.
#[path = "support/hosts.rs"]
mod hosts;
#[path = "support/living.rs"]
mod living;
mod support;

use std::io::Write;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread;
use std::time::Duration;

use hosts::{DestinationXl, Fate, Hook, Outcome, Plan, SourceXl, migrate, pass};
use living::{Anything, Dice, Log, Memory, SourceFrames, around_pages, send_pages};
use parking_lot::Mutex;
use proptest::prelude::*;
use proptest::test_runner::{Config, TestRunner};
use xenfold::engine::source::Ending;
use xenfold::engine::{DowntimeLimit, EngineError, Holding, SAMPLE};
use xenfold::page::Pfn;
use xenfold::policy::{Before, Forecast, HoldPolicy};

/// What the pipe between xl and the agent holds in these tests (support/hosts.rs).
const PIPE_BYTES: u64 = 64 << 10;

#[derive(Clone, Debug)]
struct Case {
    seed: u64,
    pages: usize,
    batch: usize,
    passes: usize,
    hold_percent: u64,
    release_percent: u64,
    forecast: bool,
    busy_percent: u64,
    /// What xl's helper takes for a record, beside its writes.
    record_time: Duration,
    downtime: DowntimeLimit,
    stay_percent: u64,
    rounds: u32,
    max_time: Option<Duration>,
}

/// What any guest keeps.
const NO_LIMIT: DowntimeLimit = DowntimeLimit {
    limit: Duration::ZERO,
    abort: false,
};

fn case() -> impl Strategy<Value = Case> {
    (
        any::<u64>(),
        1usize..200,
        1usize..80,
        0usize..7,
        prop::sample::select(vec![0u64, 5, 50, 95, 100]),
        prop::sample::select(vec![0u64, 10, 100]),
        any::<bool>(),
    )
        .prop_map(
            |(seed, pages, batch, passes, hold_percent, release_percent, forecast)| Case {
                seed,
                pages,
                batch,
                passes,
                hold_percent,
                release_percent,
                forecast,
                busy_percent: 20,
                record_time: Duration::ZERO,
                downtime: NO_LIMIT,
                stay_percent: 60,
                rounds: 3,
                max_time: None,
            },
        )
}

/// Migrates a guest that runs, and compares.
fn live(case: &Case) -> Result<(Outcome, u64), String> {
    live_over(case, |_| pass())
}

/// The same over a link with a hook.
fn live_over(case: &Case, hook: impl FnOnce(Arc<Mutex<Memory>>) -> Hook) -> Result<(Outcome, u64), String> {
    let memory = Arc::new(Mutex::new(Memory::new(case.seed, case.pages as u64, case.busy_percent)));
    let (xls, passes, batch, record_time) = (memory.clone(), case.passes, case.batch, case.record_time);
    let all: Vec<u64> = (0..case.pages as u64).collect();
    let live = move |out: &mut dyn Write| {
        let (before, behind) = around_pages();
        out.write_all(&before)?;
        let mut list = all;
        for pass in 0..=passes {
            if pass > 0 {
                let mut memory = xls.lock();
                memory.suspended = pass == passes;
                list = memory.dirty.iter().map(Pfn::get).collect();
                memory.dirty.clear();
            } else {
                let mut memory = xls.lock();
                (memory.suspended, memory.in_first_pass) = (passes == 0, true);
            }
            let sent = send_pages(&xls, out, &list, batch, record_time);
            xls.lock().in_first_pass = false;
            sent?;
        }
        out.write_all(&behind)
    };
    let policy: Box<dyn HoldPolicy> = if case.forecast {
        Box::new(Forecast::new(
            case.pages as u64,
            case.pages as u64,
            SAMPLE,
            Before::default(),
            Duration::from_millis(300),
        ))
    } else {
        Box::new(Anything {
            dice: Dice(case.seed ^ 5),
            hold_percent: case.hold_percent,
            release_percent: case.release_percent,
            stay_percent: case.stay_percent,
            asked: Vec::new(),
            known: Vec::new(),
        })
    };
    let forth = hook(memory.clone());
    let plan = Plan {
        live: Some(Box::new(live)),
        verify: true,
        holding: Some(Holding {
            log: Box::new(Log(memory.clone())),
            frames: Box::new(SourceFrames(memory.clone())),
            policy,
            pipe_bytes: PIPE_BYTES,
            model_time: Duration::from_millis(200),
            max_rounds: case.rounds,
            max_time: case.max_time,
            behind: None,
            downtime: case.downtime,
        }),
        ..Plan::new(Vec::new())
    };
    let outcome = migrate(plan.hooks(move |_| (forth, pass())));
    if matches!(outcome.ending, Ending::SourceOwns(EngineError::NoConvergence { .. })) {
        return Ok((outcome, 0));
    }
    if !matches!(outcome.ending, Ending::Completed { status: 0 })
        || (outcome.source_xl, outcome.destination_xl) != (SourceXl::Gone, DestinationXl::Running)
    {
        return Err(format!("{:?}; destination {:?}", outcome.ending, outcome.destination));
    }
    let memory = memory.lock();
    for page in 0..case.pages as u64 {
        if let Some(right) = memory.page(page)
            && outcome.image.get(&page) != Some(&right)
        {
            let arrived = outcome.image.get(&page).map(|page| page[0]);
            return Err(format!("page {page} holds {:?}, and {arrived:?} arrived", right[0]));
        }
    }
    if memory.unsafe_peeks > 0 {
        return Err(format!(
            "{} of {} peeks were not safe",
            memory.unsafe_peeks, memory.peeks
        ));
    }
    Ok((outcome, memory.peeks))
}

#[test]
fn what_is_learnt_reaches_hosts_that_keep_it() {
    for keeps_model in [true, false] {
        let outcome = migrate(Plan {
            model: Some(b"of the guest's writes".to_vec()),
            keeps_model,
            ..Plan::new(support::build_stream(&support::StreamSpec::default()))
        });
        assert!(
            matches!(outcome.ending, Ending::Completed { status: 0 }),
            "{:?}",
            outcome.ending
        );
        let expected = keeps_model.then(|| b"of the guest's writes".to_vec());
        assert_eq!(outcome.model, expected);
    }
}

#[test]
fn nothing_learnt_reaches_a_host_that_does_not_get_the_guest() {
    let outcome = migrate(Plan {
        model: Some(b"of the guest's writes".to_vec()),
        start_status: 1,
        ..Plan::new(support::build_stream(&support::StreamSpec::default()))
    });
    assert!(matches!(outcome.ending, Ending::SourceOwns(_)), "{:?}", outcome.ending);
}

#[test]
fn memory_is_right_whatever_is_held() {
    let cases = std::env::var("XENFOLD_CASES").ok().and_then(|cases| cases.parse().ok());
    let mut runner = TestRunner::new(Config {
        cases: cases.unwrap_or(200),
        failure_persistence: None,
        max_shrink_iters: 0,
        ..Config::default()
    });
    let peeks = AtomicU64::new(0);
    runner
        .run(&case(), |case| {
            let (outcome, peeked) = live(&case).map_err(TestCaseError::fail)?;
            peeks.fetch_add(peeked, Ordering::Relaxed);
            let held = outcome.figures.holding;
            prop_assert!(held.held_pages <= held.pages_from_xl);
            prop_assert!(outcome.figures.iteration > 0);
            Ok(())
        })
        .unwrap();
    assert!(peeks.into_inner() > 0, "the bitmap was never read");
}

/// A guest whose records are half of what the pipe takes.
fn in_small_records(seed: u64, pages: usize) -> Case {
    Case {
        seed,
        pages,
        batch: 8,
        passes: 2,
        hold_percent: 10,
        release_percent: 50,
        forecast: false,
        busy_percent: 0,
        record_time: Duration::from_micros(200),
        downtime: NO_LIMIT,
        stay_percent: 0,
        rounds: 0,
        max_time: None,
    }
}

#[test]
fn the_bitmap_is_read_between_small_records_of_the_first_pass_only() {
    let records_of = |pages| live(&in_small_records(9, pages)).unwrap().1;
    // What the helper may be ahead by is nearly all of this guest, and two thirds of that.
    assert_eq!(records_of(10_000), 0);
    assert!(records_of(16_000) > 1);
}

#[test]
fn the_bitmap_is_read_while_the_link_takes_nothing() {
    let read = Arc::new(AtomicU64::new(0));
    let counted = read.clone();
    live_over(&in_small_records(11, 16_000), move |memory| {
        let mut frames = 0;
        Box::new(move |_| {
            frames += 1;
            if frames == 40 {
                // What was under way goes as far as it can.
                thread::sleep(Duration::from_millis(500));
                let before = memory.lock().peeks;
                thread::sleep(Duration::from_secs(1));
                counted.store(memory.lock().peeks - before, Ordering::Relaxed);
            }
            Fate::Pass
        })
    })
    .unwrap();
    let read = read.load(Ordering::Relaxed);
    // More where the second took longer.
    assert!(read >= 3, "{read} times in a second");
}

#[test]
fn pages_written_again_are_not_sent_again() {
    let case = Case {
        seed: 3,
        pages: 4000,
        batch: 400,
        passes: 4,
        hold_percent: 0,
        release_percent: 0,
        forecast: true,
        busy_percent: 0,
        // A pass is longer than the time between two readings of the bitmap, on a machine of any speed.
        record_time: Duration::from_millis(10),
        downtime: NO_LIMIT,
        stay_percent: 0,
        rounds: 0,
        max_time: None,
    };
    let (outcome, _) = live(&case).unwrap();
    let figures = outcome.figures;
    let held = figures.holding;
    assert!(held.held_pages > 0, "{held:?}");
    assert_eq!(figures.iteration, 5);
    let repeats = figures.pages.carried() - figures.distinct_pages;
    assert!(
        (repeats - 200..=repeats + 200).contains(&held.repeat_pages),
        "{figures:?}"
    );
    assert_eq!(
        held.held_pages,
        held.again_pages + held.released_pages + held.flushed_pages,
        "{held:?}"
    );
    // Those that the guest has given up meanwhile go without data.
    let sent = held.pages_from_xl - held.held_pages + held.released_pages + held.flushed_pages;
    assert!((sent - 200..=sent).contains(&figures.pages.carried()), "{figures:?}");
}

#[test]
fn a_guest_that_does_not_converge_stays_where_that_is_wanted() {
    let case = Case {
        seed: 4,
        pages: 2000,
        batch: 300,
        passes: 5,
        hold_percent: 50,
        release_percent: 10,
        forecast: false,
        busy_percent: 20,
        record_time: Duration::ZERO,
        downtime: DowntimeLimit {
            limit: Duration::from_millis(699),
            abort: true,
        },
        stay_percent: 0,
        rounds: 0,
        max_time: None,
    };
    let (outcome, _) = live(&case).unwrap();
    assert!(
        matches!(outcome.ending, Ending::SourceOwns(EngineError::NoConvergence { .. })),
        "{:?}",
        outcome.ending
    );
    assert_eq!(outcome.source_xl, SourceXl::Resumed);
    assert_ne!(outcome.destination_xl, DestinationXl::Running);
}

/// A guest that wrote 600 pages while xl sent its last pass, and is quiet since. xl ends its passes before the fifth with one of
/// few pages.
fn quiet_at_the_end(rounds: u32, max_time: Option<Duration>, passes: u32) -> Outcome {
    let memory = Arc::new(Mutex::new(Memory::new(1, 2000, 0)));
    {
        let mut memory = memory.lock();
        memory.quiet = true;
        (0..2000).for_each(|page| memory.pages[page as usize] = Some(1 << 20 | page));
    }
    let xls = memory.clone();
    let live = move |out: &mut dyn Write| {
        let (before, behind) = around_pages();
        out.write_all(&before)?;
        let all: Vec<u64> = (0..2000).collect();
        send_pages(&xls, out, &all, 400, Duration::ZERO)?;
        for pass in 2..=passes {
            // With fewer than 50 xl ends its passes.
            let few: Vec<u64> = (0..if passes < 5 { 40 } else { 50 }).collect();
            if pass == passes {
                let mut memory = xls.lock();
                for page in 100..700 {
                    memory.pages[page as usize] = Some(2 << 20 | page);
                    memory.dirty.insert(Pfn::new(page).unwrap());
                }
            }
            send_pages(&xls, out, &few, 400, Duration::ZERO)?;
        }
        let list: Vec<u64> = {
            let mut memory = xls.lock();
            memory.suspended = true;
            memory.dirty.iter().map(Pfn::get).collect()
        };
        send_pages(&xls, out, &list, 400, Duration::ZERO)?;
        out.write_all(&behind)
    };
    let outcome = migrate(Plan {
        live: Some(Box::new(live)),
        verify: true,
        holding: Some(Holding {
            log: Box::new(Log(memory.clone())),
            frames: Box::new(SourceFrames(memory.clone())),
            policy: Box::new(Anything {
                dice: Dice(1),
                hold_percent: 0,
                release_percent: 0,
                stay_percent: 100,
                asked: Vec::new(),
                known: Vec::new(),
            }),
            pipe_bytes: PIPE_BYTES,
            max_rounds: rounds,
            max_time,
            model_time: Duration::ZERO,
            behind: None,
            downtime: NO_LIMIT,
        }),
        ..Plan::new(Vec::new())
    });
    assert!(
        matches!(outcome.ending, Ending::Completed { status: 0 }),
        "{:?}",
        outcome.ending
    );
    let memory = memory.lock();
    assert!((0..2000).all(|page| outcome.image.get(&page) == memory.page(page).as_ref()));
    assert_eq!(memory.unsafe_peeks, 0);
    outcome
}

#[test]
fn pages_go_ahead_of_xl_and_cost_a_reference_when_it_repeats_them() {
    let plain = quiet_at_the_end(0, None, 5).figures;
    assert_eq!((plain.holding.rounds, plain.holding.ahead_pages), (0, 0));
    assert_eq!((plain.pages.full, plain.expected_downtime_ms), (2600, Some(700)));

    for passes in [2, 5] {
        let held = quiet_at_the_end(30, None, passes).figures;
        assert!(held.holding.rounds > 0, "{:?}", held.holding);
        assert_eq!(held.holding.ahead_pages, 600);
        assert_eq!(held.pages.full, 2600, "each content once");
        assert!(held.expected_downtime_ms < Some(100), "{:?}", held.expected_downtime_ms);
        if passes == 5 {
            assert_eq!(held.pages.reference, plain.pages.reference + 600);
        }
    }

    let timed = quiet_at_the_end(30, Some(Duration::ZERO), 5).figures;
    assert_eq!((timed.holding.rounds, timed.holding.ahead_pages), (0, 0));
}
