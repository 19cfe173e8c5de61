//! Both engines in one process, between two xl that behave as Xen's, over streams that are generated.
mod failures;
#[path = "../support/hosts.rs"]
mod hosts;
mod memory;
#[path = "../support/mod.rs"]
mod support;

use hosts::{DestinationXl, Fate, FrameFault, Hook, Outcome, Plan, SourceXl, kind, migrate, pass};
use parking_lot::RwLock;
use proptest::prelude::*;
use proptest::test_runner::{Config, TestRunner};
use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;
use support::{Batch, Guest, Mix, Start, StreamSpec, build_stream, rebuild};
use xenfold::engine::source::Ending;
use xenfold::engine::{EngineError, WINDOW_ROWS};

/// Migrations that look at the process's threads wait until the others are done.
static OTHERS: RwLock<()> = RwLock::new(());

/// Cases of each property: `XENFOLD_CASES`, else the 10,000 that CI runs.
fn cases() -> u32 {
    std::env::var("XENFOLD_CASES")
        .ok()
        .and_then(|cases| cases.parse().ok())
        .unwrap_or(10_000)
}

fn runner(cases: u32) -> TestRunner {
    TestRunner::new(Config {
        cases,
        failure_persistence: None,
        max_shrink_iters: 0,
        ..Config::default()
    })
}

fn completed(outcome: &Outcome, stream: &[u8]) -> Result<(), String> {
    if !matches!(outcome.ending, Ending::Completed { status: 0 }) {
        return Err(format!("{:?}; destination {:?}", outcome.ending, outcome.destination));
    }
    if (outcome.source_xl, outcome.destination_xl) != (SourceXl::Gone, DestinationXl::Running) {
        return Err(format!("{:?} {:?}", outcome.source_xl, outcome.destination_xl));
    }
    if outcome.received != stream {
        let at = outcome.received.iter().zip(stream).position(|(a, b)| a != b);
        let lengths = (outcome.received.len(), stream.len());
        return Err(format!("what came out differs at {at:?}, lengths {lengths:?}"));
    }
    // An independent opinion of what the guest's memory is.
    let naive = rebuild(stream, Start::Xl)?;
    let plain: HashMap<u64, Vec<u8>> = naive
        .pages
        .into_iter()
        .filter(|(_, page)| page.0 < 0xd)
        .map(|(pfn, page)| (pfn, page.1))
        .collect();
    if plain != outcome.image {
        return Err("memory differs from the naive rebuilder's".into());
    }
    match outcome.destination {
        Ok(0) => Ok(()),
        _ => Err(format!("{:?}", outcome.destination)),
    }
}

/// A migration that must complete.
fn arrives(plan: Plan) -> Outcome {
    let stream = plan.stream.clone();
    let outcome = migrate(plan);
    completed(&outcome, &stream).unwrap();
    outcome
}

fn plan_of(spec: &StreamSpec) -> Plan {
    let mut plan = Plan::new(build_stream(spec));
    if spec.guest == Guest::Pv {
        // A PV guest's frames are not found by page number: nobody may try.
        plan.frame_fault = FrameFault::WrongBit;
    }
    plan
}

#[test]
fn generated_guests_arrive() {
    let _others = OTHERS.read();
    let strategy = (
        support::small_spec(),
        any::<[bool; 2]>(),
        prop::sample::select(vec![700usize, 64 << 10]),
    );
    runner(cases())
        .run(&strategy, |(spec, [frames, verify], link_bytes)| {
            let spec = StreamSpec {
                start: Start::Xl,
                ..spec
            };
            let plan = Plan {
                frames,
                verify,
                link_bytes,
                ..plan_of(&spec)
            };
            let stream = plan.stream.clone();
            completed(&migrate(plan), &stream).map_err(TestCaseError::fail)
        })
        .unwrap();
}

/// More pages than the window has rows, with contents that return at any distance and holders that are overwritten.
fn far_spec(guest: Guest, seed: u64) -> StreamSpec {
    StreamSpec {
        seed,
        guest,
        pages: WINDOW_ROWS * 2 + 700,
        // Holes may jump to pages above 2^32, which are not referred to.
        hole_percent: 0,
        passes: 3,
        dirty_percent: 40,
        mix: Mix {
            zero: 1,
            repeat: 5,
            neighbour: 1,
            random: 3,
            text: 1,
            similar: 0,
            constant: 1,
        },
        batch: Batch::Mixed(150),
        repeat_in_record: true,
        ..StreamSpec::default()
    }
}

#[test]
fn references_reach_any_distance() {
    let _others = OTHERS.read();
    for guest in [Guest::Pvh, Guest::Hvm, Guest::Pv] {
        for frames in [true, false] {
            let spec = far_spec(guest, 5);
            let delay = Duration::from_micros(if guest == Guest::Pvh { 300 } else { 0 });
            let outcome = arrives(Plan {
                frames,
                apply_delay: delay,
                ..plan_of(&spec)
            });
            let figures = outcome.figures.destination.unwrap();
            let by_frames = frames && guest != Guest::Pv;
            assert_eq!(
                figures.resolved_from_frames > 100,
                by_frames,
                "{guest:?} {frames} {figures:?}"
            );
            assert!(figures.resolved_from_memory > 100, "{guest:?} {frames} {figures:?}");
            assert_eq!((figures.cpu_ms, figures.peak_rss_bytes), (1, 2));
            // Every repeat costs a reference where the frames can be read, whatever its distance.
            if by_frames {
                let naive = rebuild(&build_stream(&spec), Start::Xl).unwrap();
                let pages = outcome.figures.pages;
                assert_eq!(pages.carried(), naive.entries_with_data as u64);
                assert!(pages.full * 2 < pages.carried(), "{pages:?}");
            }
        }
    }
}

#[test]
fn records_with_the_fewest_pages_fill_the_window() {
    let _others = OTHERS.read();
    let spec = StreamSpec {
        batch: Batch::Fixed(1),
        no_data_percent: 40,
        passes: 2,
        ..far_spec(Guest::Pvh, 6)
    };
    arrives(plan_of(&spec));
    arrives(Plan {
        frames: false,
        ..plan_of(&spec)
    });
}

#[test]
fn a_smaller_window_is_kept_to() {
    let _others = OTHERS.read();
    let plan = Plan {
        frames: false,
        window_rows: 10,
        ..plan_of(&StreamSpec {
            passes: 2,
            ..far_spec(Guest::Pvh, 7)
        })
    };
    let small = arrives(plan).figures.pages.reference;
    let usual = arrives(Plan {
        frames: false,
        ..plan_of(&StreamSpec {
            passes: 2,
            ..far_spec(Guest::Pvh, 7)
        })
    });
    let none = arrives(Plan {
        frames: false,
        window_rows: 0,
        ..plan_of(&StreamSpec {
            passes: 2,
            ..far_spec(Guest::Pvh, 7)
        })
    });
    assert_eq!(none.figures.pages.reference, 0, "nothing is kept");
    assert!(
        small * 3 < usual.figures.pages.reference,
        "{small} {:?}",
        usual.figures.pages
    );
}

#[test]
fn xens_checker_accepts_what_is_rebuilt() {
    let _others = OTHERS.read();
    let Some(oracle) = support::oracle::find() else { return };
    runner((cases() / 500).clamp(3, 20))
        .run(&support::oracle_spec(), |spec| {
            let stream = build_stream(&StreamSpec {
                start: Start::Xl,
                ..spec
            });
            let outcome = migrate(Plan {
                frame_fault: FrameFault::Fails,
                frames: false,
                ..Plan::new(stream.clone())
            });
            completed(&outcome, &stream).map_err(TestCaseError::fail)?;
            let libxl = outcome
                .received
                .windows(8)
                .position(|bytes| bytes == b"LibxlFmt")
                .unwrap();
            oracle.check(&outcome.received[libxl..]).map_err(TestCaseError::fail)
        })
        .unwrap();
}

// ── Streams that the generator does not make ──

fn record(kind: u32, body: &[u8]) -> Vec<u8> {
    let mut bytes = kind.to_le_bytes().to_vec();
    bytes.extend_from_slice(&(body.len() as u32).to_le_bytes());
    bytes.extend_from_slice(body);
    bytes.resize(bytes.len().next_multiple_of(8), 0);
    bytes
}

/// A PAGE_DATA record; pages without a filling have no data.
fn page_data(pages: &[(u64, Option<u8>)]) -> Vec<u8> {
    let mut body = (pages.len() as u64).to_le_bytes().to_vec();
    for (pfn, filling) in pages {
        body.extend_from_slice(&(pfn | if filling.is_some() { 0 } else { 0xf << 60 }).to_le_bytes());
    }
    pages
        .iter()
        .filter_map(|page| page.1)
        .for_each(|filling| body.extend_from_slice(&[filling; 4096]));
    record(1, &body)
}

/// A PVH guest's stream with these libxc records where the pages stand.
fn stream_with(records: &[Vec<u8>]) -> Vec<u8> {
    let frame = build_stream(&StreamSpec {
        pages: 0,
        passes: 1,
        ..StreamSpec::default()
    });
    // STATIC_DATA_END is the last record before the pages.
    let at = frame
        .windows(8)
        .position(|bytes| bytes == [0x10, 0, 0, 0, 0, 0, 0, 0])
        .unwrap()
        + 8;
    [&frame[..at], &records.concat(), &frame[at..]].concat()
}

#[test]
fn a_verify_pass_may_differ_from_what_was_applied() {
    let _others = OTHERS.read();
    // Page 1 has changed since it was applied, and page 2 holds what page 1 was applied with: the reference goes to
    // the page as applied, not to the one that Xen only compares.
    let stream = stream_with(&[
        page_data(&[(1, Some(5)), (2, Some(6)), (3, Some(7))]),
        record(0xd, &[]),
        page_data(&[(1, Some(8)), (2, Some(5)), (3, None), (4, Some(7))]),
    ]);
    for frames in [true, false] {
        arrives(Plan {
            frames,
            ..Plan::new(stream.clone())
        });
    }
}

#[test]
fn records_larger_than_xen_s_pass_as_they_are() {
    let _others = OTHERS.read();
    let many: Vec<(u64, Option<u8>)> = (0..1100).map(|pfn| (pfn, None)).collect();
    let large: Vec<(u64, Option<u8>)> = (0..1030).map(|pfn| (pfn, Some(pfn as u8))).collect();
    let some: Vec<(u64, Option<u8>)> = (0..300).map(|pfn| (pfn, Some(1 + pfn as u8 / 2))).collect();
    let others: Vec<(u64, Option<u8>)> = (2000..2300).map(|pfn| (pfn, Some(1 + pfn as u8 / 2))).collect();
    let stream = stream_with(&[
        page_data(&some),
        page_data(&many),
        page_data(&others),
        page_data(&some),
        page_data(&large),
        page_data(&others),
        page_data(&[(7, None)]),
        page_data(&some),
    ]);
    let mut forgets = 0;
    for frames in [true, false] {
        let count = Arc::new(AtomicUsize::new(0));
        let seen = count.clone();
        let plan = Plan {
            frames,
            ..Plan::new(stream.clone())
        }
        .hooks(move |_| {
            let forth: Hook = Box::new(move |way| {
                seen.fetch_add(usize::from(way.kind == kind::FORGET), Ordering::SeqCst);
                Fate::Pass
            });
            (forth, pass())
        });
        arrives(plan);
        forgets += count.load(Ordering::SeqCst);
    }
    assert_eq!(forgets, 4);
}

#[test]
fn a_large_configuration_passes() {
    let _others = OTHERS.read();
    let stream = build_stream(&StreamSpec::default());
    let length = u32::from_le_bytes(stream[44..48].try_into().unwrap()) as usize;
    let more = 9 << 20;
    let mut large = stream[..44].to_vec();
    large.extend_from_slice(&((length + more) as u32).to_le_bytes());
    large.extend_from_slice(&stream[48..48 + length]);
    large.resize(large.len() + more, b' ');
    large.extend_from_slice(&stream[48 + length..]);
    arrives(Plan::new(large));
}

#[test]
fn what_xen_refuses_is_not_repaired() {
    let _others = OTHERS.read();
    // A PAGE_DATA record that is 4 bytes too short for its pages, its padding making up for them.
    let mut short = page_data(&[(1, Some(5))]);
    let length = u32::from_le_bytes(short[4..8].try_into().unwrap()) - 4;
    short[4..8].copy_from_slice(&length.to_le_bytes());
    let outcome = migrate(Plan::new(stream_with(&[short])));
    assert!(
        matches!(outcome.ending, Ending::SourceOwns(EngineError::Stream(_))),
        "{:?}",
        outcome.ending
    );
    assert_eq!(
        (outcome.source_xl, outcome.destination_xl),
        (SourceXl::Resumed, DestinationXl::Destroyed)
    );
}
