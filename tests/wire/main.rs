//! The wire: golden bytes written by FORMAT.md's words alone, and everything that can be wrong with them.
#[path = "../support/hosts.rs"]
mod hosts;
mod lies;
mod naive;
#[path = "../support/mod.rs"]
mod support;

use hosts::{frame_bytes, kind, receive, receive_cut};
use naive::{KEY, hello, naive_frames, numbered, page_records};
use std::path::PathBuf;
use std::time::Duration;
use support::{Batch, Guest, Mix, Rng, Start, StreamSpec, build_stream, rebuild};
use xenfold::codec::{Decompressor, Row, rows};
use xenfold::page::{ContentId, ContentKey};
use xenfold::page_set::PageSet;
use xenfold::policy::Kept;
use xenfold::policy::filter::Filter;
use xenfold::policy::model::Builder;
use xenfold::wire::{Frame, FrameReader, FrameWriter, Hello, Kind, LateRow, Rows, WireError};

/// Cases of each property: `XENFOLD_CASES`, else the 10,000 that CI runs.
fn cases() -> u32 {
    std::env::var("XENFOLD_CASES")
        .ok()
        .and_then(|cases| cases.parse().ok())
        .unwrap_or(10_000)
}

/// The guest that the golden wire carries: some of everything, a VERIFY pass, and a record that is too large for rows.
fn golden_stream() -> Vec<u8> {
    let spec = StreamSpec {
        seed: 20_170_401,
        guest: Guest::Pvh,
        pages: 40,
        hole_percent: 10,
        passes: 2,
        dirty_percent: 30,
        mix: Mix { random: 3, ..Mix::ALL },
        no_data_percent: 12,
        batch: Batch::Mixed(5),
        repeat_in_record: true,
        verify: true,
        optional_records: true,
        dirty_reserved: true,
        ..StreamSpec::default()
    };
    let mut stream = build_stream(&spec);
    let (at, ..) = page_records(&stream)[3];
    let mut large = 1u32.to_le_bytes().to_vec();
    large.extend_from_slice(&(8 + 8 * 1025u32).to_le_bytes());
    large.extend_from_slice(&1025u64.to_le_bytes());
    (0..1025u64).for_each(|pfn| large.extend_from_slice(&(0xf << 60 | pfn).to_le_bytes()));
    stream.splice(at..at, large);
    stream
}

fn source_hello() -> Vec<u8> {
    hello(&format!(
        r#"{{"program":"golden","content_key":"{}","verify":true,"timeout_s":30}}"#,
        "07".repeat(32)
    ))
}

const GO: &[u8] = b"domain is yours, you are cleared to unpause\0";

/// What follows End: not in the order of a migration, but one of each kind.
fn source_tail() -> Vec<(u16, Vec<u8>)> {
    vec![
        (kind::PING, b"12345678".to_vec()),
        (kind::GO, GO.to_vec()),
        (kind::PING, Vec::new()),
        (kind::PONG, b"abcdefgh".to_vec()),
        (kind::ABORT, "stopped: terminated by a signal".as_bytes().to_vec()),
    ]
}

fn destination_frames() -> Vec<(u16, Vec<u8>)> {
    let r2 = b"my copy unpause results are as follows\0\0";
    vec![
        (kind::XL, b"xl migration receiver ready, send binary domain data.\n".to_vec()),
        (kind::PING, Vec::new()),
        (
            kind::VERDICT,
            br#"{"accepted":true,"reason":"","verified_pages":7,"rewritten_by_xen_pages":2,"time_ms":5}"#.to_vec(),
        ),
        (kind::XL, b"domain received, ready to unpause\0".to_vec()),
        (kind::PONG, b"12345678".to_vec()),
        (kind::XL, r2.to_vec()),
        (
            kind::FIGURES,
            br#"{"program":"golden","resolved_from_memory":1,"resolved_from_frames":2,"apply_wait_ms":3,"cpu_ms":4,"peak_rss_bytes":5}"#.to_vec(),
        ),
        (kind::EXIT, 0i32.to_le_bytes().to_vec()),
        (kind::PING, b"abcdefgh".to_vec()),
        (kind::ABORT, b"no".to_vec()),
    ]
}

fn fixture(name: &str) -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR"))
        .join("tests/fixtures")
        .join(name)
}

/// The committed wire. `XENFOLD_BLESS=1` writes it anew.
fn golden(name: &str, made: impl FnOnce() -> Vec<u8>) -> Vec<u8> {
    let path = fixture(name);
    if std::env::var("XENFOLD_BLESS").is_ok_and(|value| value == "1") {
        std::fs::write(&path, made()).unwrap();
    }
    std::fs::read(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()))
}

fn golden_source() -> Vec<u8> {
    golden("wire-v1-source.bin", || {
        let frames = [naive_frames(&golden_stream()), source_tail()].concat();
        numbered(&source_hello(), &frames)
    })
}

fn golden_destination() -> Vec<u8> {
    golden("wire-v1-destination.bin", || {
        let options = r#"{"program":"golden","frames":true,"window_rows":2048,"timeout_s":30}"#;
        numbered(&hello(options), &destination_frames())
    })
}

/// Hello and frames as the library reads them, and where each frame starts.
fn read(wire: &[u8]) -> (Hello, Vec<(usize, Frame)>) {
    let mut rest = wire;
    let hello = Hello::default().agree(&mut rest).unwrap();
    assert_eq!(hello.version, 1);
    let mut at = wire.len() - rest.len();
    let mut reader = FrameReader::new(rest);
    let mut frames = Vec::new();
    loop {
        match reader.read() {
            Ok(frame) => {
                let length = 20 + frame.body.len();
                frames.push((at, frame));
                at += length;
            }
            Err(WireError::Closed) => break,
            Err(error) => panic!("{error}"),
        }
    }
    assert_eq!(at, wire.len());
    (hello.peer, frames)
}

// ── The golden wire ──

/// What a Rows frame says, its blocks unpacked: this does not depend on what a compressor makes of them.
fn unpacked(body: &[u8]) -> (usize, bool, u32, Vec<u64>, Vec<Row>, Vec<u8>) {
    let parsed = Rows::parse(body).unwrap();
    let (entries, list) = rows::decode(parsed.rows, parsed.count).unwrap();
    let mut again = Vec::new();
    rows::encode(&entries, &list, &mut again);
    assert_eq!(again, parsed.rows, "the library writes these rows in the same bytes");
    let pages = parsed
        .blocks
        .iter()
        .flat_map(|block| {
            Decompressor::default()
                .decompress(block.codec, block.bytes, block.pages)
                .unwrap()
        })
        .collect();
    (parsed.count, parsed.frozen, parsed.reserved, entries, list, pages)
}

#[test]
fn the_format_has_not_changed() {
    let source = golden_source();
    assert!(source.len() >= 64 << 10, "{}", source.len());
    let (hello, frames) = read(&source);
    let expected = Hello {
        program: "golden".into(),
        verify: true,
        timeout_s: 30,
        ..Hello::default()
    };
    assert_eq!(hello, expected.with_key(&ContentKey::new(KEY)));
    let expected = [naive_frames(&golden_stream()), source_tail()].concat();
    assert_eq!(frames.len(), expected.len());
    let (mut kinds, mut codecs, mut row_kinds, mut frozen) = ([0; 35], [0; 3], [0; 4], 0);
    for ((_, frame), (kind, body)) in frames.iter().zip(&expected) {
        assert_eq!(frame.kind as u16, *kind);
        kinds[*kind as usize] += 1;
        if frame.kind != Kind::Rows {
            assert_eq!(frame.body, *body);
            continue;
        }
        let said = unpacked(&frame.body);
        assert!(said == unpacked(body), "frame {}", frame.sequence);
        let parsed = Rows::parse(&frame.body).unwrap();
        parsed.blocks.iter().for_each(|block| codecs[block.codec as usize] += 1);
        frozen += u32::from(parsed.frozen);
        for row in &said.4 {
            row_kinds[match row {
                Row::Zero => 0,
                Row::Full => 1,
                Row::Reference(_) => 2,
                Row::Absent => 3,
                Row::Known(_) | Row::Delta(_) => panic!("not in this wire"),
            }] += 1;
        }
        let again = parsed.parts(|parts| parts.concat());
        assert_eq!(again, frame.body, "the library writes this frame in the same bytes");
    }
    for kind in [
        kind::BYTES,
        kind::GUEST,
        kind::ROWS,
        kind::FORGET,
        kind::END,
        kind::GO,
        kind::PING,
        kind::PONG,
        kind::ABORT,
    ] {
        assert!(kinds[kind as usize] > 0, "no frame of kind {kind}");
    }
    assert!(
        codecs.iter().chain(&row_kinds).chain([&frozen]).all(|count| *count > 2),
        "{codecs:?} {row_kinds:?} {frozen}"
    );

    let destination = golden_destination();
    let (hello, frames) = read(&destination);
    let expected = Hello {
        program: "golden".into(),
        frames: true,
        window_rows: 2048,
        timeout_s: 30,
        ..Hello::default()
    };
    assert_eq!(hello, expected);
    let said: Vec<(u16, Vec<u8>)> = frames
        .into_iter()
        .map(|(_, frame)| (frame.kind as u16, frame.body))
        .collect();
    assert_eq!(said, destination_frames());
}

#[test]
fn the_library_frames_it_in_the_same_bytes() {
    for wire in [golden_source(), golden_destination()] {
        let (_, frames) = read(&wire);
        let mut writer = FrameWriter::new(Vec::new());
        frames
            .iter()
            .for_each(|(_, frame)| writer.write(frame.kind, &[&frame.body]).unwrap());
        assert_eq!(writer.bytes() as usize, wire.len() - frames[0].0);
        let mut again = Vec::new();
        let mut writer = FrameWriter::new(&mut again);
        frames
            .iter()
            .for_each(|(_, frame)| writer.write(frame.kind, &[&frame.body]).unwrap());
        assert!(again == wire[frames[0].0..]);
    }
}

fn words(words: &[u64]) -> Vec<u8> {
    words.iter().flat_map(|word| word.to_le_bytes()).collect()
}

/// A connection that takes the place of one that was lost while pages followed the guest.
fn golden_again() -> [Vec<u8>; 2] {
    let source = || {
        let options = format!(
            r#"{{"program":"golden","late":true,"rejoin_token":"{}","timeout_s":30}}"#,
            "0f".repeat(16)
        );
        let mut late = [3u32, 0]
            .iter()
            .flat_map(|word| word.to_le_bytes())
            .collect::<Vec<u8>>();
        late.extend(words(&[0x20]));
        late.extend([0xaa; 16]);
        late.extend(words(&[1 << 60 | 0x21, 2 << 60 | 0x22]));
        late.extend([7; 4096]);
        let frames = [
            (kind::REJOIN, words(&[88])),
            (kind::LATE, late),
            (kind::PING, words(&[1 << 63 | 1])),
            (kind::DONE, Vec::new()),
        ];
        numbered(&hello(&options), &frames)
    };
    let destination = || {
        let frames = [
            (kind::MISSING, words(&[0x20, 3, 0x30, 0x1000])),
            (kind::MISSING, Vec::new()),
            (kind::STARTED, Vec::new()),
            (kind::XL, b"my copy".to_vec()),
            (kind::WANT, words(&[1 << 60 | 0x20, 0x21])),
            (kind::PONG, words(&[1 << 63 | 1])),
            (kind::EXIT, 0i32.to_le_bytes().to_vec()),
        ];
        numbered(
            &hello(r#"{"program":"golden","late":true,"rejoins":true,"timeout_s":30}"#),
            &frames,
        )
    };
    [
        golden("wire-v1-late-source.bin", source),
        golden("wire-v1-late-destination.bin", destination),
    ]
}

/// Late pages that are named by content, and what is said of pages that go out early.
fn golden_known() -> Vec<u8> {
    golden("wire-v1-late-known-source.bin", || {
        let early = r#"{"ring_page":1044472,"pages":49168,"highest_page":1044479,"never":[1044479,1044475]}"#;
        let options = format!(
            r#"{{"program":"golden","contents":true,"late":true,"late_known":true,"early":{early},"timeout_s":30}}"#
        );
        let mut late: Vec<u8> = [3u32, 0].iter().flat_map(|word| word.to_le_bytes()).collect();
        late.extend(words(&[4 << 60 | 0x20]));
        late.extend([0xbb; 16]);
        late.extend(words(&[0x21]));
        late.extend([0xaa; 16]);
        late.extend(words(&[3 << 60 | 0x22]));
        late.extend([0xaa; 16]);
        late.extend(words(&[0x21]));
        late.extend([7; 4096]);
        numbered(
            &hello(&options),
            &[(kind::LATE, late), (kind::PING, words(&[1 << 63 | 1]))],
        )
    })
}

#[test]
fn the_format_of_late_pages_that_are_known_has_not_changed() {
    let wire = golden_known();
    let (hello, frames) = read(&wire);
    let early = hello.early.clone().unwrap();
    assert_eq!(
        (early.ring_page, early.pages, early.bound()),
        (1_044_472, 49_168, 1_044_480)
    );
    assert_eq!(early.never().count(), 3);
    let destination = |known| Hello {
        contents: true,
        paces: true,
        late: true,
        late_known: known,
        takes_early: known,
        ..Hello::default()
    };
    for known in [true, false] {
        let agreed = destination(known).agree(&mut &wire[..]).unwrap();
        assert_eq!((agreed.late_known, agreed.early), (known, known));
    }
    let late = xenfold::wire::LatePages::parse(&frames[0].1.body).unwrap();
    let [(_, known), (_, full), (_, same)] = late.pages[..] else {
        panic!("{late:?}")
    };
    let (aa, bb) = (ContentId([0xaa; 16]), ContentId([0xbb; 16]));
    let other = xenfold::page::Pfn::new(0x21).unwrap();
    assert_eq!(
        [known, full, same],
        [LateRow::Known(bb), LateRow::Full(aa), LateRow::Same(aa, other)]
    );
    let mut again = Vec::new();
    late.parts(|parts| again = parts.concat());
    assert_eq!(again, frames[0].1.body);
    // A page of the next kind is refused.
    let mut unknown = frames[0].1.body.clone();
    unknown[15] = 0x50;
    assert!(xenfold::wire::LatePages::parse(&unknown).is_err());
}

#[test]
fn the_format_of_another_connection_has_not_changed() {
    let [source, destination] = golden_again();
    let (own, forth) = read(&source);
    let (theirs, back) = read(&destination);
    let token = "0f".repeat(16);
    assert_eq!(theirs.agree(&mut &source[..]).unwrap().rejoin.as_ref(), Some(&token));
    assert_eq!(own.agree(&mut &destination[..]).unwrap().rejoin, Some(token));
    let kinds = |frames: &[(usize, Frame)]| frames.iter().map(|(_, frame)| frame.kind).collect::<Vec<Kind>>();
    assert_eq!(kinds(&forth), [Kind::Rejoin, Kind::Late, Kind::Ping, Kind::Done]);
    assert_eq!(xenfold::wire::u64_body(Kind::Rejoin, &forth[0].1.body).unwrap(), 88);
    let late = xenfold::wire::LatePages::parse(&forth[1].1.body).unwrap();
    assert_eq!((late.pages.len(), late.block), (3, &[7; 4096][..]));
    let (missing, end, wants) = (&back[0].1, &back[1].1, &back[4].1);
    assert_eq!(
        xenfold::wire::missing(&missing.body).unwrap(),
        [0x20..0x23, 0x30..0x1030]
    );
    assert_eq!((end.kind, end.body.len()), (Kind::Missing, 0));
    assert_eq!(xenfold::wire::wants(&wants.body).unwrap().len(), 2);
    let pages = (0x20..0x23).chain(0x30..0x1030).filter_map(xenfold::page::Pfn::new);
    assert_eq!(
        xenfold::wire::missing_bodies(pages),
        std::slice::from_ref(&missing.body)
    );
}

/// What a source has learnt of a guest that writes page 3 all the time and a region of 4 pages by turns with another.
fn learnt() -> Kept {
    let mut builder = Builder::new(1024, 1024, Duration::from_millis(50));
    for turn in 0..40 {
        let mut written = PageSet::new(1024);
        let first = if turn % 2 == 0 { 8 } else { 100 };
        written.insert_run(first..first + 4);
        written.insert_run(3..4);
        builder.sample(&written);
    }
    Filter::new(Some(builder.finish()), 1024, 1024).learnt()
}

#[test]
fn the_format_of_a_model_has_not_changed() {
    let source = golden("wire-v1-model-unit-source.bin", || {
        let model = learnt().to_bytes().unwrap();
        let frames = [(kind::GO, GO.to_vec()), (kind::MODEL, model)];
        numbered(&source_hello(), &frames)
    });
    let destination = golden("wire-v1-model-destination.bin", || {
        numbered(&hello(r#"{"program":"golden","keeps_model":true,"timeout_s":30}"#), &[])
    });
    let (hello, frames) = read(&destination);
    assert!(hello.keeps_model && frames.is_empty());
    let (hello, frames) = read(&source);
    assert!(!hello.keeps_model);
    let kinds: Vec<Kind> = frames.iter().map(|(_, frame)| frame.kind).collect();
    assert_eq!(kinds, [Kind::Go, Kind::Model]);
    let kept = Kept::from_bytes(&frames[1].1.body, 1024).unwrap();
    assert_eq!(kept, learnt());
    assert_eq!(kept.pages(), 9);
}

/// Ages in seconds, before models had a unit of their own.
#[test]
fn a_model_without_a_unit_is_still_read() {
    let (_, frames) = read(include_bytes!("../fixtures/wire-v1-model-source.bin"));
    let kept = Kept::from_bytes(&frames[1].1.body, 1024).unwrap();
    assert_eq!((kept.bound(), kept.pages()), (1024, 9));
    assert_eq!(Kept::from_bytes(&kept.to_bytes().unwrap(), 1024), Ok(kept));
}

/// The golden wire up to End, as a migration begins.
fn golden_until_end() -> (Vec<u8>, Vec<(usize, Frame)>) {
    let mut wire = golden_source();
    let (_, mut frames) = read(&wire);
    let end = frames.iter().position(|(_, frame)| frame.kind == Kind::End).unwrap();
    wire.truncate(frames[end + 1].0);
    frames.truncate(end + 1);
    (wire, frames)
}

#[test]
fn the_golden_wire_becomes_the_stream() {
    let (wire, _) = golden_until_end();
    let outcome = receive(&wire);
    let stream = golden_stream();
    assert!(outcome.accepted, "{:?}", outcome.result);
    assert!(outcome.received == stream, "what came out differs");
    rebuild(&stream, Start::Xl).unwrap();
}

// ── Damage ──

/// So many frames before frame `index`, so that it is the next one.
fn before(index: usize) -> Vec<u8> {
    (0..index as u64)
        .flat_map(|sequence| frame_bytes(sequence, kind::PING, &[]))
        .collect()
}

fn read_last(wire: &[u8], index: usize) -> Result<Frame, WireError> {
    let mut reader = FrameReader::new(wire);
    (0..index).for_each(|_| drop(reader.read().unwrap()));
    reader.read()
}

#[test]
fn every_bit_and_every_cut_is_noticed() {
    let mut bits = 0usize;
    for wire in [golden_source(), golden_destination()] {
        let (_, frames) = read(&wire);
        let hello = wire[..frames[0].0].to_vec();
        for end in 0..hello.len() {
            assert!(Hello::default().agree(&mut &hello[..end]).is_err(), "cut at {end}");
        }
        for bit in 0..hello.len() * 8 {
            let mut damaged = hello.clone();
            damaged[bit / 8] ^= 1 << (bit % 8);
            assert!(Hello::default().agree(&mut &damaged[..]).is_err(), "bit {bit}");
        }
        bits += hello.len() * 8;
        for (index, (at, frame)) in frames.iter().enumerate() {
            let mut part = before(index);
            let start = part.len();
            part.extend_from_slice(&wire[*at..at + 20 + frame.body.len()]);
            for end in start..part.len() {
                let error = read_last(&part[..end], index).unwrap_err();
                let expected = if end == start {
                    matches!(error, WireError::Closed)
                } else {
                    matches!(error, WireError::Cut { .. })
                };
                assert!(expected, "frame {index}, cut at {end}: {error}");
            }
            for bit in start * 8..part.len() * 8 {
                part[bit / 8] ^= 1 << (bit % 8);
                assert!(
                    read_last(&part, index).is_err(),
                    "frame {index}, bit {}",
                    bit - start * 8
                );
                part[bit / 8] ^= 1 << (bit % 8);
            }
            bits += (part.len() - start) * 8;
        }
    }
    assert!(bits > 64 << 13, "{bits}");
}

#[test]
fn frames_come_once_and_in_order() {
    let (wire, frames) = golden_until_end();
    let piece = |index: usize| {
        let (at, frame) = &frames[index];
        wire[*at..at + 20 + frame.body.len()].to_vec()
    };
    let hello = &wire[..frames[0].0];
    let all: Vec<Vec<u8>> = (0..frames.len()).map(piece).collect();
    let mut twice = all.clone();
    twice.insert(8, all[7].clone());
    let mut swapped = all.clone();
    swapped.swap(7, 8);
    let mut missing = all.clone();
    missing.remove(7);
    let mut replayed = all.clone();
    replayed[30] = all[7].clone();
    for pieces in [twice, swapped, missing, replayed] {
        let outcome = receive(&[hello, &pieces.concat()].concat());
        assert!(!outcome.accepted);
        assert!(
            outcome.result.unwrap_err().to_string().contains("connection"),
            "out of sequence"
        );
    }
}

#[test]
fn a_cut_wire_is_not_accepted() {
    let (wire, frames) = golden_until_end();
    let mut rng = Rng::new(3);
    let boundaries = frames.iter().map(|(at, _)| *at).step_by(5);
    let others: Vec<usize> = (0..20).map(|_| rng.below(wire.len() as u64) as usize).collect();
    for end in boundaries.chain(others).chain([0, wire.len() - 1]) {
        let outcome = receive_cut(&wire[..end]);
        assert!(!outcome.accepted && outcome.result.is_err(), "cut at {end}");
    }
}
