//! Migrations between hosts that hold contents: rows that name them, deltas, and what happens when they are not there.
#[path = "support/held.rs"]
mod held;
#[path = "support/hosts.rs"]
mod hosts;
mod support;

use std::sync::Arc;
use std::sync::atomic::Ordering;

use held::TestContents;
use hosts::{DestinationXl, Outcome, Plan, SourceXl, migrate};
use proptest::prelude::*;
use proptest::test_runner::{Config, TestRunner};
use support::{Batch, Guest, Mix, Start, StreamSpec, build_stream, rebuild};
use xenfold::engine::Contents;
use xenfold::engine::source::Ending;
use xenfold::page::{ContentKey, is_zero};

fn completed(outcome: &Outcome, stream: &[u8]) -> Result<(), String> {
    if !matches!(outcome.ending, Ending::Completed { status: 0 }) {
        return Err(format!("{:?}; destination {:?}", outcome.ending, outcome.destination));
    }
    if (outcome.source_xl, outcome.destination_xl) != (SourceXl::Gone, DestinationXl::Running) {
        return Err(format!("{:?} {:?}", outcome.source_xl, outcome.destination_xl));
    }
    if outcome.received != stream {
        return Err("what came out differs".into());
    }
    Ok(())
}

fn shared(contents: &Arc<TestContents>) -> Option<Arc<dyn Contents>> {
    Some(contents.clone())
}

/// The same guest earlier: fewer passes over it, so that what the later ones bring is new.
fn earlier(spec: &StreamSpec, key: &ContentKey) -> TestContents {
    let old = StreamSpec {
        passes: 1,
        verify: false,
        checkpoints: 0,
        ..spec.clone()
    };
    TestContents::of(&rebuild(&build_stream(&old), old.start).unwrap().pages, key)
}

fn guest() -> StreamSpec {
    StreamSpec {
        seed: 77,
        guest: Guest::Pvh,
        pages: 600,
        passes: 4,
        dirty_percent: 30,
        mix: Mix {
            random: 6,
            similar: 4,
            ..Mix::ALL
        },
        batch: Batch::Mixed(60),
        ..StreamSpec::default()
    }
}

#[test]
fn what_the_destination_holds_is_named() {
    let (spec, key) = (guest(), hosts::key());
    let stream = build_stream(&spec);
    let (there, here) = (Arc::new(earlier(&spec, &key)), Arc::new(earlier(&spec, &key)));
    let without = migrate(Plan::new(stream.clone()));
    completed(&without, &stream).unwrap();
    let with = migrate(Plan {
        speak_contents: [true; 2],
        contents: [shared(&here), shared(&there)],
        ..Plan::new(stream.clone())
    });
    completed(&with, &stream).unwrap();
    let pages = with.figures.pages;
    assert!(pages.known > 200 && pages.delta > 50, "{pages:?}");
    assert!(
        with.figures.wire_bytes < without.figures.wire_bytes / 2,
        "{} {}",
        with.figures.wire_bytes,
        without.figures.wire_bytes
    );
    let destination = with.figures.destination.unwrap();
    assert!(destination.resolved_from_contents > 200, "{destination:?}");
    assert_eq!(destination.needed_pages, with.figures.needed_pages);
    // Both hosts know the guest afterwards.
    let naive = rebuild(&stream, Start::Xl).unwrap().pages;
    for host in [here, there] {
        let (saved, kept) = (host.saved.lock().unwrap(), host.kept.lock().unwrap());
        let plain = naive.iter().filter(|(_, (kind, page))| *kind == 0 && !page.is_empty());
        assert_eq!(saved.len(), plain.clone().count());
        for (pfn, (_, page)) in plain {
            assert_eq!(saved[pfn], key.id(page));
            assert!(is_zero(page) || kept[&key.id(page)] == *page);
        }
    }
}

#[test]
fn without_a_store_pages_that_are_written_again_go_as_deltas() {
    let spec = StreamSpec {
        mix: Mix {
            similar: 20,
            ..Mix::ALL
        },
        ..guest()
    };
    let stream = build_stream(&spec);
    for frames in [true, false] {
        let outcome = migrate(Plan {
            speak_contents: [true; 2],
            frames,
            ..Plan::new(stream.clone())
        });
        completed(&outcome, &stream).unwrap();
        assert_eq!(outcome.figures.pages.known, 0);
        assert!(
            outcome.figures.pages.delta > 20 || !frames,
            "{:?}",
            outcome.figures.pages
        );
    }
}

/// Half of what the destination said is not there any more, or is something else by now.
#[test]
fn stale_contents_are_sent_after_all() {
    let (spec, key) = (guest(), hosts::key());
    let stream = build_stream(&spec);
    for (gone, changed) in [(50, 0), (0, 50), (25, 25), (100, 0), (0, 100)] {
        let there = TestContents {
            gone_percent: gone,
            changed_percent: changed,
            ..earlier(&spec, &key)
        };
        // The source's own bases are no better.
        let here = TestContents {
            changed_percent: changed / 5,
            ..earlier(&spec, &key)
        };
        let outcome = migrate(Plan {
            speak_contents: [true; 2],
            contents: [shared(&Arc::new(here)), shared(&Arc::new(there))],
            ..Plan::new(stream.clone())
        });
        completed(&outcome, &stream).unwrap();
        assert!(outcome.figures.needed_pages > 50, "{gone} {changed}");
    }
}

/// An older xenfold, or one with another key: nothing is named.
#[test]
fn hosts_that_do_not_speak_of_contents_get_none() {
    let (spec, key) = (guest(), hosts::key());
    let stream = build_stream(&spec);
    for speak in [[false, true], [true, false]] {
        let there = Arc::new(earlier(&spec, &key));
        let outcome = migrate(Plan {
            speak_contents: speak,
            contents: [shared(&Arc::new(earlier(&spec, &key))), shared(&there)],
            ..Plan::new(stream.clone())
        });
        completed(&outcome, &stream).unwrap();
        let pages = outcome.figures.pages;
        assert_eq!(
            (pages.known, pages.delta, there.read.load(Ordering::Relaxed)),
            (0, 0, 0)
        );
    }
    let other = Arc::new(earlier(&spec, &ContentKey::new([9; 32])));
    let outcome = migrate(Plan {
        speak_contents: [true; 2],
        contents: [None, shared(&other)],
        ..Plan::new(stream.clone())
    });
    completed(&outcome, &stream).unwrap();
    assert!(other.len() > 200 && outcome.figures.pages.known < 20);
}

#[test]
fn generated_guests_arrive_whatever_is_held() {
    let cases = std::env::var("XENFOLD_CASES")
        .ok()
        .and_then(|cases| cases.parse().ok())
        .unwrap_or(1_000);
    let mut runner = TestRunner::new(Config {
        cases,
        failure_persistence: None,
        max_shrink_iters: 0,
        ..Config::default()
    });
    let faults = (0u64..60, 0u64..40, 0u64..30, any::<[bool; 3]>(), 0usize..300);
    let strategy = (support::small_spec(), faults);
    runner
        .run(
            &strategy,
            |(spec, (gone, changed, changed_here, flags, window_rows))| {
                // Remus goes plain, and saves do not migrate.
                let spec = StreamSpec {
                    start: Start::Xl,
                    checkpoints: 0,
                    ..spec
                };
                let key = hosts::key();
                let stream = build_stream(&spec);
                let there = TestContents {
                    gone_percent: gone,
                    changed_percent: changed,
                    ..earlier(&spec, &key)
                };
                let here = TestContents {
                    changed_percent: changed_here,
                    ..earlier(&spec, &key)
                };
                let outcome = migrate(Plan {
                    speak_contents: [true; 2],
                    contents: [
                        shared(&Arc::new(here)).filter(|_| flags[0]),
                        shared(&Arc::new(there)).filter(|_| flags[1]),
                    ],
                    frames: flags[2],
                    window_rows,
                    ..Plan::new(stream.clone())
                });
                completed(&outcome, &stream).map_err(TestCaseError::fail)
            },
        )
        .unwrap();
}
