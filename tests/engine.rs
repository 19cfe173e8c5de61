//! Both engines in one process, between two xl that behave as Xen's, over streams that are generated.
#[path = "support/hosts.rs"]
mod hosts;
mod support;

use hosts::{
    Controls, Death, DestinationXl, Fate, FrameFault, Hook, OnTheWay, Outcome, Plan, SourceDeath, SourceXl, kind,
    migrate, pass,
};
use parking_lot::RwLock;
use proptest::prelude::*;
use proptest::test_runner::{Config, TestRunner};
use std::collections::HashMap;
use std::io::{self, Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::process::{Child, Command};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::{Duration, Instant};
use support::{Batch, Guest, Mix, Start, StreamSpec, build_stream, rebuild};
use xenfold::engine::destination::{self, DestinationSetup, XlInput, XlProcess};
use xenfold::engine::source::{self, Ending, SourceSetup};
use xenfold::engine::{EngineError, LinkEnds, Unseen, WINDOW_ROWS};
use xenfold::wire::Hello;

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

// ── The phases when something breaks ──

/// What must hold however a migration ends.
fn judge(name: &str, outcome: &Outcome, stream: &[u8]) {
    let Outcome {
        ending,
        source_xl,
        destination_xl,
        ..
    } = outcome;
    let all = format!(
        "{name}: {ending:?}, xl {source_xl:?} and {destination_xl:?}, {:?}",
        outcome.destination
    );
    let running = *destination_xl == DestinationXl::Running;
    // Never two guests, never none.
    let source_runs = matches!(source_xl, SourceXl::Untouched | SourceXl::Resumed);
    assert!(!(running && source_runs), "two guests: {all}");
    assert!(running || *source_xl != SourceXl::Gone, "no guest: {all}");
    assert_ne!(*destination_xl, DestinationXl::LeftIncoming, "{all}");
    let source_died = matches!(source_xl, SourceXl::Died(_));
    match ending {
        Ending::Completed { .. } => {
            assert!(running && (*source_xl == SourceXl::Gone || source_died), "{all}");
        }
        Ending::SourceOwns(_) => assert!(!running && (source_runs || source_died), "{all}"),
        Ending::Unknown(_) => assert!(*source_xl == SourceXl::Suspended || source_died, "{all}"),
    }
    // What the source's host has lied about may have been written, but no guest starts from it.
    assert!(!running || outcome.received == stream, "{all}: what came out differs");
    assert!(
        name.starts_with("lie: ") || stream.starts_with(&outcome.received),
        "{all}: what came out differs"
    );
}

/// A moment of a migration, recognized by its frame.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Moment {
    Ready,
    FirstBytes,
    FirstRows,
    LaterRows,
    End,
    Verdict,
    Received,
    Probe,
    Echo,
    Go,
    Report,
    Exit,
}

const MOMENTS: [Moment; 12] = [
    Moment::Ready,
    Moment::FirstBytes,
    Moment::FirstRows,
    Moment::LaterRows,
    Moment::End,
    Moment::Verdict,
    Moment::Received,
    Moment::Probe,
    Moment::Echo,
    Moment::Go,
    Moment::Report,
    Moment::Exit,
];

impl Moment {
    fn is_forth(self) -> bool {
        use Moment::*;
        matches!(self, FirstBytes | FirstRows | LaterRows | End | Probe | Go)
    }

    fn is(self, way: &OnTheWay) -> bool {
        let (kind, nth) = match self {
            Moment::Ready => (kind::XL, 0),
            Moment::FirstBytes => (kind::BYTES, 0),
            Moment::FirstRows => (kind::ROWS, 0),
            Moment::LaterRows => (kind::ROWS, 5),
            Moment::End => (kind::END, 0),
            Moment::Verdict => (kind::VERDICT, 0),
            Moment::Received => (kind::XL, 1),
            Moment::Probe => return way.kind == kind::PING && !way.body.is_empty(),
            Moment::Echo => (kind::PONG, 0),
            Moment::Go => (kind::GO, 0),
            Moment::Report => (kind::XL, 2),
            Moment::Exit => (kind::EXIT, 0),
        };
        (way.kind, way.nth) == (kind, nth)
    }

    fn hooks(self, mut act: impl FnMut(&mut OnTheWay) -> Fate + Send + 'static) -> (Hook, Hook) {
        let hook: Hook = Box::new(move |way| if self.is(way) { act(way) } else { Fate::Pass });
        if self.is_forth() {
            (hook, pass())
        } else {
            (pass(), hook)
        }
    }
}

fn small_stream() -> Vec<u8> {
    build_stream(&StreamSpec {
        pages: 120,
        batch: Batch::Fixed(9),
        guest: Guest::Hvm,
        ..StreamSpec::default()
    })
}

type Scenario = (String, Plan, Box<dyn Fn(&Outcome) + Send>);

/// Runs scenarios a dozen at a time: most of them wait. A failed one is named.
fn run_all(scenarios: Vec<Scenario>) {
    let count = scenarios.len();
    let queue = Mutex::new(scenarios.into_iter());
    let failures = Mutex::new(Vec::new());
    thread::scope(|scope| {
        for _ in 0..12 {
            scope.spawn(|| {
                while let Some((name, plan, check)) = { queue.lock().unwrap().next() } {
                    let work = || {
                        let stream = plan.stream.clone();
                        let outcome = migrate(plan);
                        judge(&name, &outcome, &stream);
                        check(&outcome);
                        // Longer than any timeout here and the signs of life; less than the 20 s of CLEAN_UP.
                        assert!(outcome.elapsed < Duration::from_secs(16), "{:?}", outcome.elapsed);
                    };
                    if let Err(panic) = std::panic::catch_unwind(std::panic::AssertUnwindSafe(work)) {
                        let text = panic.downcast_ref::<String>().cloned().unwrap_or_default();
                        failures.lock().unwrap().push(format!("{name}: {text}"));
                    }
                }
            });
        }
    });
    let failures = failures.into_inner().unwrap();
    assert!(
        failures.is_empty(),
        "{} of {count} failed:\n{}",
        failures.len(),
        failures.join("\n")
    );
}

/// Silence ends after this; signs of life come every second.
const TIMEOUT: Duration = Duration::from_secs(5);

/// Whether the guest is the source's, the destination's, or nobody can know, when the link breaks at a frame.
fn expect_at(moment: Moment, arrives: bool) -> fn(&Outcome) {
    let owns: fn(&Outcome) = |outcome| assert!(matches!(outcome.ending, Ending::SourceOwns(_)), "{:?}", outcome.ending);
    let unknown: fn(&Outcome) = |outcome| assert!(matches!(outcome.ending, Ending::Unknown(_)), "{:?}", outcome.ending);
    let completed: fn(&Outcome) = |outcome| {
        assert!(
            matches!(outcome.ending, Ending::Completed { .. }),
            "{:?}",
            outcome.ending
        )
    };
    match moment {
        Moment::Go => unknown,
        Moment::Report if !arrives => unknown,
        Moment::Report | Moment::Exit => completed,
        _ => owns,
    }
}

#[test]
fn a_link_that_breaks_leaves_one_guest() {
    let _others = OTHERS.read();
    let stream = small_stream();
    let mut scenarios: Vec<Scenario> = Vec::new();
    for moment in MOMENTS {
        for fate in [
            Fate::CutBefore,
            Fate::CutAfter,
            Fate::SilenceBefore,
            Fate::SilenceAfter,
            Fate::MuteBefore,
            Fate::StallBefore,
        ] {
            let arrives = matches!(fate, Fate::CutAfter | Fate::SilenceAfter);
            let plan = Plan {
                timeout: TIMEOUT,
                ..Plan::new(stream.clone())
            }
            .hooks(move |_| moment.hooks(move |_| fate));
            // The link breaks just before GO or just after: what comes first decides.
            let check = match (moment, fate) {
                // The destination does not hear GO, gives up, and its xl can still say so.
                (Moment::Go, Fate::MuteBefore) => {
                    |outcome: &Outcome| assert!(matches!(outcome.ending, Ending::SourceOwns(_)), "{:?}", outcome.ending)
                }
                // The same, or the link is gone before it has.
                (Moment::Go, Fate::CutBefore | Fate::StallBefore) => |outcome: &Outcome| {
                    assert!(
                        outcome.was_given_back() || matches!(outcome.ending, Ending::Unknown(_)),
                        "{:?}",
                        outcome.ending
                    );
                },
                (Moment::Probe | Moment::Echo | Moment::Go, Fate::CutAfter | Fate::SilenceAfter) => |_: &Outcome| {},
                _ => expect_at(moment, arrives),
            };
            scenarios.push((format!("{moment:?} {fate:?}"), plan, Box::new(check)));
        }
    }
    run_all(scenarios);
}

/// How often the source has asked the destination whether it is there, from the end of the stream until GO.
fn asked_before_go(go_after: Duration) -> usize {
    let asked = Arc::new(Mutex::new((false, 0, 0)));
    let seen = asked.clone();
    let plan = Plan {
        go_after,
        ..Plan::new(small_stream())
    }
    .hooks(move |_| {
        let hook: Hook = Box::new(move |way| {
            let (ended, before, at_go) = &mut *seen.lock().unwrap();
            match way.kind {
                kind::END => *ended = true,
                kind::PING if *ended && !way.body.is_empty() => *before += 1,
                kind::GO => *at_go = *before,
                _ => {}
            }
            Fate::Pass
        });
        (hook, pass())
    });
    let outcome = migrate(plan);
    assert!(
        matches!(outcome.ending, Ending::Completed { .. }),
        "{:?}",
        outcome.ending
    );
    asked.lock().unwrap().2
}

/// Once its xl has the guest, and once more where GO is so late that this answer says nothing any more.
#[test]
fn the_other_host_is_asked_before_go() {
    let _others = OTHERS.read();
    for (go_after, times) in [(Duration::ZERO, 1), (Duration::from_secs(2), 2)] {
        // Where the machine is busy the answer may be old, or late, all the same.
        let asked: Vec<usize> = (0..5)
            .map(|_| asked_before_go(go_after))
            .take_while(|asked| *asked != times)
            .collect();
        assert!(
            asked.len() < 5 && !asked.contains(&0),
            "GO after {go_after:?}: asked {asked:?} times"
        );
    }
}

#[test]
fn a_stop_leaves_one_guest() {
    let _others = OTHERS.read();
    let stream = small_stream();
    let mut scenarios: Vec<Scenario> = Vec::new();
    for moment in MOMENTS {
        for at_source in [true, false] {
            let plan = Plan::new(stream.clone()).hooks(move |controls: &Controls| {
                let stop = if at_source {
                    controls.stop_source.clone()
                } else {
                    controls.stop_destination.clone()
                };
                moment.hooks(move |_| {
                    stop();
                    Fate::Pass
                })
            });
            let quick = |outcome: &Outcome| assert!(outcome.elapsed < Duration::from_secs(8), "{:?}", outcome.elapsed);
            scenarios.push((
                format!("stop at {moment:?}, source: {at_source}"),
                plan,
                Box::new(quick),
            ));
        }
    }
    // The other host does not read any more, but shows that it lives.
    for moment in [Moment::FirstRows, Moment::LaterRows, Moment::End] {
        let plan = Plan::new(stream.clone()).hooks(move |controls: &Controls| {
            let stop = controls.stop_source.clone();
            moment.hooks(move |_| {
                stop();
                Fate::StallBefore
            })
        });
        let owns = |outcome: &Outcome| assert!(matches!(outcome.ending, Ending::SourceOwns(EngineError::Stopped(_))));
        scenarios.push((format!("stop in a stall at {moment:?}"), plan, Box::new(owns)));
    }
    run_all(scenarios);
}

#[test]
fn an_xl_that_dies_leaves_one_guest() {
    let _others = OTHERS.read();
    let stream = small_stream();
    let length = stream.len();
    let mut scenarios: Vec<Scenario> = Vec::new();
    let in_stream = [0, 47, 100, 30_000, length as u64 / 2, length as u64 - 9].map(Death::InStream);
    let others = [
        Death::BeforeReady,
        Death::AtEnd,
        Death::BeforeReceived,
        Death::BeforeGo,
        Death::AfterGo,
    ];
    for death in in_stream.into_iter().chain(others) {
        let plan = Plan {
            destination_dies: Some(death),
            ..Plan::new(stream.clone())
        };
        let check = move |outcome: &Outcome| match death {
            // GO may be on its way when xl dies.
            Death::BeforeGo if matches!(outcome.ending, Ending::Unknown(EngineError::RemoteEnded(137))) => {}
            Death::AfterGo => assert!(matches!(outcome.ending, Ending::Unknown(_)), "{:?}", outcome.ending),
            _ => assert!(
                matches!(outcome.ending, Ending::SourceOwns(_)) && outcome.given_up,
                "{:?}, destination {:?}, given up: {}",
                outcome.ending,
                outcome.destination,
                outcome.given_up
            ),
        };
        scenarios.push((format!("destination {death:?}"), plan, Box::new(check)));
    }
    let in_stream = [0, 47, 30_000, length / 2, length - 9, length - 4].map(SourceDeath::InStream);
    let others = [
        SourceDeath::BeforeStream,
        SourceDeath::BeforeReceived,
        SourceDeath::BeforeGo,
        SourceDeath::AfterGo,
    ];
    for death in in_stream.into_iter().chain(others) {
        let plan = Plan {
            source_dies: Some(death),
            ..Plan::new(stream.clone())
        };
        let check = move |outcome: &Outcome| {
            let owns = matches!(outcome.ending, Ending::SourceOwns(_));
            // GO and the end of xl arrive in either order.
            assert!(owns || death == SourceDeath::AfterGo, "{:?}", outcome.ending);
        };
        scenarios.push((format!("source {death:?}"), plan, Box::new(check)));
    }
    run_all(scenarios);
}

#[test]
fn a_guest_that_does_not_start_is_given_back() {
    let _others = OTHERS.read();
    let stream = small_stream();
    let plan = Plan {
        start_status: 1,
        ..Plan::new(stream.clone())
    };
    let outcome = migrate(plan);
    judge("start fails", &outcome, &stream);
    assert!(
        matches!(outcome.ending, Ending::SourceOwns(EngineError::Refused(_))),
        "{:?}",
        outcome.ending
    );
    assert_eq!(
        (outcome.source_xl, outcome.destination_xl),
        (SourceXl::Resumed, DestinationXl::StartFailed)
    );
    assert!(outcome.elapsed < Duration::from_secs(8));
}

/// Changes one frame on its way; CRC-32 and sequence are right.
fn lie(name: &str, moment: Moment, change: fn(&mut OnTheWay), check: fn(&Outcome)) -> Scenario {
    let plan = Plan::new(small_stream()).hooks(move |_| {
        moment.hooks(move |way| {
            change(way);
            Fate::Pass
        })
    });
    (format!("lie: {name}"), plan, Box::new(check))
}

#[test]
fn a_lie_is_not_believed() {
    let _others = OTHERS.read();
    let refused: fn(&Outcome) = |outcome| {
        assert!(matches!(outcome.ending, Ending::SourceOwns(_)), "{:?}", outcome.ending);
        // END's second half was never written.
        assert!(outcome.received.len() < small_stream().len());
    };
    let told: fn(&Outcome) = |outcome| {
        assert!(
            matches!(outcome.destination, Err(EngineError::DigestDiffers { .. })),
            "{:?}",
            outcome.destination
        );
        let said =
            matches!(&outcome.ending, Ending::SourceOwns(EngineError::PeerAborted(why)) if why.contains("disagree"));
        assert!(said, "{:?}", outcome.ending);
    };
    let unknown: fn(&Outcome) = |outcome| assert!(matches!(outcome.ending, Ending::Unknown(_)), "{:?}", outcome.ending);
    run_all(vec![
        lie("digest", Moment::End, |way| way.body[3] ^= 1, told),
        lie("digest", Moment::End, |way| way.body[3] ^= 1, refused),
        lie("rows", Moment::End, |way| way.body[32] ^= 1, refused),
        lie("END with a body", Moment::End, |way| way.body[44] = 8, refused),
        lie("END is another record", Moment::End, |way| way.body[40] = 3, refused),
        lie(
            "a page",
            Moment::LaterRows,
            |way| *way.body.last_mut().unwrap() ^= 1,
            refused,
        ),
        lie(
            "a record",
            Moment::FirstBytes,
            |way| *way.body.last_mut().unwrap() ^= 1,
            |outcome| {
                assert!(matches!(outcome.ending, Ending::SourceOwns(_)), "{:?}", outcome.ending);
            },
        ),
        lie(
            "verdict",
            Moment::Verdict,
            |way| way.body = br#"{"accepted":false,"reason":"no"}"#.to_vec(),
            |outcome| {
                assert!(matches!(&outcome.ending, Ending::SourceOwns(EngineError::Refused(why)) if why == "no"));
            },
        ),
        lie(
            "verdict without a word",
            Moment::Verdict,
            |way| way.body = b"{}".to_vec(),
            |outcome| {
                assert!(matches!(&outcome.ending, Ending::SourceOwns(EngineError::Refused(_))));
            },
        ),
        lie(
            "no verdict",
            Moment::Verdict,
            |way| way.body = b"[]".to_vec(),
            |outcome| {
                assert!(matches!(&outcome.ending, Ending::SourceOwns(_)));
            },
        ),
        lie("R0", Moment::Ready, |way| way.body[0] ^= 1, refused),
        lie(
            "R1",
            Moment::Received,
            |way| way.body[0] ^= 1,
            |outcome| {
                assert!(matches!(&outcome.ending, Ending::SourceOwns(_)));
            },
        ),
        lie("R2", Moment::Report, |way| way.body[0] ^= 1, unknown),
        lie(
            "GO early",
            Moment::FirstRows,
            |way| (way.kind, way.body) = (kind::GO, b"go".to_vec()),
            refused,
        ),
        lie(
            "GO instead of END",
            Moment::End,
            |way| (way.kind, way.body) = (kind::GO, b"go".to_vec()),
            refused,
        ),
        lie(
            "what a destination sends",
            Moment::LaterRows,
            |way| way.kind = kind::VERDICT,
            refused,
        ),
        lie(
            "what a source sends",
            Moment::Verdict,
            |way| way.kind = kind::END,
            |outcome| {
                assert!(matches!(&outcome.ending, Ending::SourceOwns(EngineError::Protocol(_))));
            },
        ),
        lie("END twice", Moment::LaterRows, |way| way.kind = kind::END, refused),
        lie(
            "xl without end",
            Moment::Received,
            |way| way.body = vec![7; 1 << 20],
            |outcome| {
                assert!(
                    matches!(&outcome.ending, Ending::SourceOwns(EngineError::Protocol(_))),
                    "{:?}",
                    outcome.ending
                );
            },
        ),
    ]);
    // A record that was left out, the frames numbered without it.
    let plan = Plan::new(small_stream()).hooks(|_| Moment::LaterRows.hooks(|_| Fate::Lose));
    let lost: Scenario = ("lie: a lost record".into(), plan, Box::new(refused));
    run_all(vec![lost]);
}

#[test]
fn frames_that_lie_or_fail_are_refused() {
    let _others = OTHERS.read();
    let far = Arc::new(build_stream(&far_spec(Guest::Pvh, 8)));
    for (fault, verify) in [(FrameFault::WrongBit, true), (FrameFault::Fails, true)] {
        // Nothing is resolved from frames in a small stream: only reading back finds it.
        let stream = small_stream();
        let outcome = migrate(Plan {
            frame_fault: fault,
            verify,
            ..Plan::new(stream.clone())
        });
        judge(&format!("{fault:?}"), &outcome, &stream);
        match &outcome.destination {
            Err(EngineError::VerifyFailed { count, .. }) if fault == FrameFault::WrongBit => assert!(*count > 100),
            Err(EngineError::Frame(_)) if fault == FrameFault::Fails => {}
            other => panic!("{fault:?}: {other:?}"),
        }
        assert_eq!(
            outcome.received.len(),
            stream.len() - 4,
            "END's second half is withheld"
        );
    }
    for fault in [FrameFault::WrongBit, FrameFault::Fails] {
        let plan = Plan {
            stream: far.clone(),
            frame_fault: fault,
            ..Plan::new(Vec::new())
        };
        let outcome = migrate(plan);
        judge(&format!("{fault:?}, far"), &outcome, &far);
        let named = match &outcome.destination {
            Err(EngineError::ReferenceChanged { .. }) => fault == FrameFault::WrongBit,
            Err(EngineError::Frame(_)) => fault == FrameFault::Fails,
            _ => false,
        };
        assert!(named, "{fault:?}: {:?}", outcome.destination);
    }
    let stream = small_stream();
    let outcome = arrives(Plan {
        verify: true,
        ..Plan::new(stream)
    });
    let naive = rebuild(&small_stream(), Start::Xl).unwrap();
    let plain = naive.pages.values().filter(|page| page.0 == 0).count() as u64;
    assert!(outcome.figures.verify.is_none(), "the source had no frames of its own");
    assert!(plain > 100);
}

/// Threads of this process that the engine started.
fn engine_threads() -> Vec<String> {
    let tasks = std::fs::read_dir("/proc/self/task").unwrap();
    let names = tasks.filter_map(|task| std::fs::read_to_string(task.ok()?.path().join("comm")).ok());
    names
        .map(|name| name.trim().to_owned())
        .filter(|name| name.starts_with("xenfold-"))
        .collect()
}

#[test]
fn no_thread_outlives_its_migration() {
    let _alone = OTHERS.write();
    let stream = small_stream();
    let hooks: [(Moment, Fate); 4] = [
        (Moment::LaterRows, Fate::CutBefore),
        (Moment::Verdict, Fate::CutBefore),
        (Moment::Received, Fate::CutAfter),
        (Moment::Go, Fate::CutBefore),
    ];
    for (moment, fate) in hooks {
        migrate(Plan::new(stream.clone()).hooks(move |_| moment.hooks(move |_| fate)));
    }
    for death in [
        Death::BeforeReady,
        Death::InStream(30_000),
        Death::BeforeGo,
        Death::AfterGo,
    ] {
        migrate(Plan {
            destination_dies: Some(death),
            ..Plan::new(stream.clone())
        });
    }
    migrate(Plan {
        source_dies: Some(SourceDeath::InStream(30_000)),
        ..Plan::new(stream.clone())
    });
    arrives(Plan::new(stream));
    let until = Instant::now() + Duration::from_secs(10);
    while !engine_threads().is_empty() && Instant::now() < until {
        thread::sleep(Duration::from_millis(20));
    }
    assert_eq!(engine_threads(), Vec::<String>::new());
}

// ── Memory ──

/// Writes this process's peak memory (VmHWM, bytes) into a file.
fn leave_peak(path: &Path) {
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find(|line| line.starts_with("VmHWM:")).unwrap();
    let kib: u64 = line.split_whitespace().nth(1).unwrap().parse().unwrap();
    std::fs::write(path, (kib * 1024).to_string()).unwrap();
}

fn connect(path: &Path) -> UnixStream {
    for _ in 0..1000 {
        if let Ok(stream) = UnixStream::connect(path) {
            return stream;
        }
        thread::sleep(Duration::from_millis(20));
    }
    panic!("nobody listens at {}", path.display());
}

fn ends(link: &UnixStream) -> LinkEnds {
    let hung_up = link.try_clone().unwrap();
    LinkEnds {
        to_peer: Box::new(link.try_clone().unwrap()),
        from_peer: Box::new(link.try_clone().unwrap()),
        hangup: Arc::new(move || drop(hung_up.shutdown(std::net::Shutdown::Both))),
        carrier: Arc::new(Unseen),
    }
}

/// Not a test of its own: one agent of the memory test, in a process that holds nothing else.
#[test]
fn memory_side() {
    let Some(folder) = std::env::var_os("XENFOLD_MEMORY_FOLDER") else {
        return;
    };
    let folder = Path::new(&folder);
    let timeout = Duration::from_secs(60);
    if std::env::var("XENFOLD_MEMORY_SIDE").unwrap() == "source" {
        let xl = connect(&folder.join("source.sock"));
        let link = connect(&folder.join("link.sock"));
        let hello = Hello {
            contents: true,
            ..Hello::default()
        }
        .with_key(&hosts::key());
        let setup = SourceSetup {
            to_xl: Box::new(xl.try_clone().unwrap()),
            failing: Box::new(|| {}),
            while_xl_waits: None,
            frames: None,
            verify: false,
            holding: None,
            learnt: None,
            bandwidth: None,
            contents: None,
            connect: None,
            journal: None,
            figures: Arc::default(),
            events: source::events(),
        };
        let (ending, _) = source::run(
            source::negotiate(ends(&link), &hello, timeout).unwrap(),
            setup,
            Box::new(xl),
        );
        assert!(matches!(ending, Ending::Completed { status: 0 }), "{ending:?}");
        leave_peak(&folder.join("source.peak"));
    } else {
        let listener = UnixListener::bind(folder.join("link.sock")).unwrap();
        let xl = connect(&folder.join("destination.sock"));
        let (link, _) = listener.accept().unwrap();
        let hello = Hello {
            window_rows: WINDOW_ROWS as u32,
            contents: true,
            paces: true,
            ..Hello::default()
        };
        let setup = DestinationSetup {
            xl: XlProcess {
                input: XlInput {
                    writer: Box::new(xl.try_clone().unwrap()),
                    unread: Arc::new(|| Ok(0)),
                },
                output: Box::new(xl),
                end: Box::new(|_| 0),
            },
            frames: None,
            contents: None,
            events: destination::events(),
            paging: None,
            listen: None,
            journal: None,
            hello: Hello::default(),
            watching: None,
            keep_model: None,
            before_go: Box::new(|| Ok(())),
            program: "test".into(),
            usage: || (0, 0),
        };
        let negotiated = destination::negotiate(ends(&link), &hello, timeout).unwrap();
        assert_eq!(destination::run(negotiated, setup).unwrap(), 0);
        leave_peak(&folder.join("destination.peak"));
    }
}

struct Hashing<W>(W, blake3::Hasher);

impl<W: Write> Write for Hashing<W> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let taken = self.0.write(bytes)?;
        self.1.update(&bytes[..taken]);
        Ok(taken)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.0.flush()
    }
}

const R0: &[u8] = b"xl migration receiver ready, send binary domain data.\n";
const R1: &[u8] = b"domain received, ready to unpause\0";
const GO: &[u8] = b"domain is yours, you are cleared to unpause\0";
const R2_RUNNING: &[u8] = b"my copy unpause results are as follows\0\0";

/// Migrates through two processes and returns the peak memory of source and destination.
fn peaks(spec: &StreamSpec) -> [u64; 2] {
    let folder = tempfile::tempdir().unwrap();
    let path = |name: &str| folder.path().join(name);
    let (source, destination) = (
        UnixListener::bind(path("source.sock")).unwrap(),
        UnixListener::bind(path("destination.sock")).unwrap(),
    );
    let side = |name: &str| -> Child {
        Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "memory_side", "--nocapture"])
            .env("XENFOLD_MEMORY_FOLDER", folder.path())
            .env("XENFOLD_MEMORY_SIDE", name)
            .stdout(std::process::Stdio::null())
            .spawn()
            .unwrap()
    };
    let mut sides = [side("source"), side("destination")];
    let mut length = 0u64;
    support::write_stream(spec, Counting(&mut length)).unwrap();
    let receiving = thread::spawn(move || {
        let (mut xl, _) = destination.accept().unwrap();
        xl.write_all(R0).unwrap();
        let mut hasher = blake3::Hasher::new();
        let mut buffer = vec![0; 1 << 20];
        let mut left = length;
        while left > 0 {
            let part = left.min(buffer.len() as u64) as usize;
            xl.read_exact(&mut buffer[..part]).unwrap();
            hasher.update(&buffer[..part]);
            left -= part as u64;
        }
        xl.write_all(R1).unwrap();
        let mut go = [0; 44];
        xl.read_exact(&mut go).unwrap();
        assert_eq!(go, GO);
        xl.write_all(R2_RUNNING).unwrap();
        hasher.finalize()
    });
    let (mut xl, _) = source.accept().unwrap();
    let mut message = [0; 54];
    xl.read_exact(&mut message).unwrap();
    assert_eq!(message, R0);
    let mut hashing = Hashing(&mut xl, blake3::Hasher::new());
    support::write_stream(spec, &mut hashing).unwrap();
    let sent = hashing.1.finalize();
    let mut message = [0; 34];
    xl.read_exact(&mut message).unwrap();
    assert_eq!(message, R1);
    xl.write_all(GO).unwrap();
    let mut message = [0; 40];
    xl.read_exact(&mut message).unwrap();
    assert_eq!(message, R2_RUNNING);
    assert_eq!(receiving.join().unwrap(), sent);
    for side in &mut sides {
        assert!(side.wait().unwrap().success());
    }
    ["source.peak", "destination.peak"].map(|name| std::fs::read_to_string(path(name)).unwrap().parse().unwrap())
}

struct Counting<'a>(&'a mut u64);

impl Write for Counting<'_> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        *self.0 += bytes.len() as u64;
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

#[test]
fn memory_stays_within_its_bound() {
    let _others = OTHERS.read();
    let incompressible = StreamSpec {
        pages: 64 << 10,
        mix: Mix::INCOMPRESSIBLE,
        ..StreamSpec::default()
    };
    let compressible = StreamSpec {
        pages: 24 << 10,
        guest: Guest::Pv,
        ..StreamSpec::default()
    };
    for spec in [incompressible, compressible] {
        let spec = StreamSpec {
            passes: 2,
            dirty_percent: 10,
            hole_percent: 0,
            batch: Batch::Aligned,
            ..spec
        };
        let bound = (64 << 20) + 32 * spec.pages as u64;
        let peaks = peaks(&spec);
        eprintln!(
            "peak memory, source and destination: {} and {} MiB",
            peaks[0] >> 20,
            peaks[1] >> 20
        );
        assert!(peaks.iter().all(|peak| *peak <= bound), "{peaks:?}, bound {bound}");
    }
}
