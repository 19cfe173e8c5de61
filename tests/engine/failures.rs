//! The phases when something breaks: never two guests, never none.

use std::sync::{Arc, Mutex};
use std::thread;
use std::time::{Duration, Instant};

use xenfold::engine::EngineError;
use xenfold::engine::source::Ending;

use crate::hosts::{
    Controls, Death, DestinationXl, Fate, FrameFault, Hook, OnTheWay, Outcome, Plan, SourceDeath, SourceXl, kind,
    migrate, pass,
};
use crate::support::{Batch, Guest, Start, StreamSpec, build_stream, rebuild};
use crate::{OTHERS, arrives, far_spec};

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
