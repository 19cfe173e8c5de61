//! Migrations between hosts that hold contents: rows that name them, deltas, and what happens when they are not there.
#[path = "support/held.rs"]
mod held;
#[path = "support/hosts.rs"]
mod hosts;
mod support;

use std::path::PathBuf;
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::Duration;

use held::TestContents;
use hosts::{DestinationXl, Fate, Hook, OnTheWay, Outcome, Plan, SourceXl, frame_bytes, kind, migrate};
use proptest::prelude::*;
use proptest::test_runner::{Config, TestRunner};
use support::{Batch, Guest, Mix, Rng, Start, StreamSpec, build_stream, rebuild};
use xenfold::codec::{Decompressor, Row, delta, rows};
use xenfold::engine::Contents;
use xenfold::engine::source::Ending;
use xenfold::page::{ContentKey, is_zero};
use xenfold::wire::{self, FrameReader, Held, Need, Rows, u64_body};

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
        rewrite_similar: true,
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

/// Frame kinds of FORMAT.md.
const CONTENTS: u16 = 7;
const HAVE: u16 = 20;
const NEED: u16 = 21;
const SETTLED: u16 = 22;

/// A migration in which half of what the destination holds is gone, watched by two hooks.
fn watched(spec: &StreamSpec, hooks: (Hook, Hook)) -> (Outcome, Vec<u8>) {
    let key = hosts::key();
    let stream = build_stream(spec);
    let there = TestContents {
        gone_percent: 30,
        ..earlier(spec, &key)
    };
    let plan = Plan {
        speak_contents: [true; 2],
        contents: [shared(&Arc::new(earlier(spec, &key))), shared(&Arc::new(there))],
        timeout: Duration::from_secs(2),
        ..Plan::new(stream.clone())
    };
    (migrate(plan.hooks(|_| hooks)), stream)
}

/// Damages the `nth` frame of a kind and makes its CRC right again.
fn lie(of: u16, nth: usize, seed: u64) -> Hook {
    Box::new(move |way: &mut OnTheWay| {
        if way.kind != of || way.nth != nth || way.body.is_empty() {
            return Fate::Pass;
        }
        let mut rng = Rng::new(seed);
        // Most of what these frames say stands at their start.
        let at = rng.below((way.body.len() as u64).min(120)) as usize;
        match seed % 5 {
            0 => way.body.truncate(at),
            1 => way.body.extend_from_slice(&[0; 16]),
            2 => way.body[at] = 0xff,
            _ => way.body[at] ^= 1 << rng.below(8),
        }
        Fate::Pass
    })
}

#[test]
fn lies_about_contents_start_no_wrong_guest() {
    let spec = StreamSpec { pages: 200, ..guest() };
    let one = &|seed: u64| {
        let nth = (seed / 25) as usize % 4;
        let honest = hosts::pass;
        let hooks = match [kind::ROWS, CONTENTS, HAVE, NEED, SETTLED][(seed / 5) as usize % 5] {
            to_source @ (HAVE | NEED | SETTLED) => (honest(), lie(to_source, nth, seed)),
            to_destination => (lie(to_destination, nth, seed), honest()),
        };
        let (outcome, stream) = watched(&spec, hooks);
        let running = outcome.destination_xl == DestinationXl::Running;
        let source_runs = matches!(outcome.source_xl, SourceXl::Untouched | SourceXl::Resumed);
        assert!(
            running != source_runs,
            "{seed}: {:?} {:?}",
            outcome.ending,
            outcome.destination
        );
        assert!(!running || outcome.received == stream, "{seed}: what came out differs");
        u32::from(!running)
    };
    // Side by side: some end only when an answer does not come.
    let refused: u32 = thread::scope(|scope| {
        let each: Vec<_> = (0..200).map(|seed| scope.spawn(move || one(seed))).collect();
        each.into_iter().map(|one| one.join().unwrap()).sum()
    });
    assert!((60..200).contains(&refused), "{refused}");
}

fn recorded(to: &Arc<Mutex<Vec<u8>>>) -> Hook {
    let (to, mut sequence) = (to.clone(), 0);
    Box::new(move |way: &mut OnTheWay| {
        // Signs of life come when they please.
        if way.kind != kind::PING && way.kind != kind::PONG {
            to.lock().unwrap().extend(frame_bytes(sequence, way.kind, &way.body));
            sequence += 1;
        }
        Fate::Pass
    })
}

/// Frames of a migration with contents, as they were written once. `XENFOLD_BLESS=1` writes them anew.
fn golden() -> [Vec<u8>; 2] {
    let path = |name| PathBuf::from(concat!(env!("CARGO_MANIFEST_DIR"), "/tests/fixtures")).join(name);
    let paths = ["wire-v1-contents-source.bin", "wire-v1-contents-destination.bin"].map(path);
    if std::env::var("XENFOLD_BLESS").is_ok_and(|value| value == "1") {
        let spec = StreamSpec {
            pages: 60,
            dirty_percent: 60,
            mix: Mix {
                similar: 20,
                ..Mix::ALL
            },
            ..guest()
        };
        let logs = [Arc::default(), Arc::default()];
        let (outcome, stream) = watched(&spec, (recorded(&logs[0]), recorded(&logs[1])));
        completed(&outcome, &stream).unwrap();
        for (path, log) in paths.iter().zip(logs) {
            std::fs::write(path, &*log.lock().unwrap()).unwrap();
        }
    }
    paths.map(|path| std::fs::read(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display())))
}

#[test]
fn the_golden_frames_are_read_and_written_in_the_same_bytes() {
    let (mut kinds, mut row_kinds, mut codecs) = ([0; 35], [0; 3], [0; 2]);
    for wire in golden() {
        let mut reader = FrameReader::new(&wire[..]);
        while let Ok(frame) = reader.read() {
            kinds[frame.kind as usize] += 1;
            let again = match frame.kind as u16 {
                kind::ROWS => {
                    let parsed = Rows::parse(&frame.body).unwrap();
                    let (entries, list) = rows::decode(parsed.rows, parsed.count).unwrap();
                    for row in &list {
                        match row {
                            Row::Known(_) => row_kinds[0] += 1,
                            Row::Delta(base) => row_kinds[1 + usize::from(*base == xenfold::codec::Base::Page)] += 1,
                            _ => {}
                        }
                    }
                    let needs_bases = |block: &&wire::Block<'_>| delta::needs_bases(block.codec);
                    for block in parsed.blocks.iter().filter(needs_bases) {
                        codecs[usize::from(block.codec) - 3] += 1;
                    }
                    let mut encoded = Vec::new();
                    rows::encode(&entries, &list, &mut encoded);
                    assert_eq!(encoded, parsed.rows);
                    parsed.parts(|parts| parts.concat())
                }
                CONTENTS => {
                    let contents = wire::Contents::parse(&frame.body).unwrap();
                    let pages = contents.rows.len();
                    Decompressor::default()
                        .decompress(contents.codec, contents.block, pages)
                        .unwrap();
                    contents.parts(|parts| parts.concat())
                }
                HAVE => {
                    Held::default().add(frame.body.clone()).unwrap();
                    continue;
                }
                NEED => Need::parse(&frame.body).unwrap().to_bytes(),
                SETTLED => u64_body(frame.kind, &frame.body).unwrap().to_le_bytes().to_vec(),
                _ => continue,
            };
            assert_eq!(again, frame.body);
        }
    }
    for kind in [kind::ROWS, CONTENTS, HAVE, NEED, SETTLED] {
        assert!(kinds[usize::from(kind)] > 1, "no frame of kind {kind}");
    }
    assert!(row_kinds.iter().all(|count| *count > 2), "{row_kinds:?}");
    assert!(codecs.iter().sum::<u32>() > 2, "{codecs:?}");
}

#[test]
fn every_bit_and_every_cut_of_the_golden_frames_is_noticed() {
    for wire in golden() {
        let mut at = 0;
        let mut sequence = 0;
        while at < wire.len() {
            let length = 20 + u32::from_le_bytes(wire[at..at + 4].try_into().unwrap()) as usize;
            let mut frame = wire[at..at + length].to_vec();
            let mut before: Vec<u8> = (0..sequence).flat_map(|n| frame_bytes(n, kind::PING, &[])).collect();
            let start = before.len();
            before.extend_from_slice(&frame);
            let read = |wire: &[u8]| {
                let mut reader = FrameReader::new(wire);
                (0..sequence).for_each(|_| drop(reader.read().unwrap()));
                reader.read().is_ok()
            };
            assert!(read(&before));
            // Long frames are blocks; a bit in 97 of theirs will do.
            let step = if frame.len() > 3000 { 97 } else { 1 };
            for bit in (0..frame.len() * 8).step_by(step) {
                frame[bit / 8] ^= 1 << (bit % 8);
                before[start..].copy_from_slice(&frame);
                assert!(!read(&before), "frame {sequence}, bit {bit}");
                frame[bit / 8] ^= 1 << (bit % 8);
            }
            before[start..].copy_from_slice(&frame);
            for end in (start..before.len()).step_by(step) {
                assert!(!read(&before[..end]), "frame {sequence}, cut at {end}");
            }
            at += length;
            sequence += 1;
        }
    }
}
