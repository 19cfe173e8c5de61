//! The wire: golden bytes written by FORMAT.md's words alone, and everything that can be wrong with them.
#[path = "support/hosts.rs"]
mod hosts;
mod support;

use hosts::{frame_bytes, kind, receive, receive_alive, receive_cut};
use proptest::prelude::*;
use proptest::test_runner::{Config, TestRunner};
use std::collections::HashMap;
use std::path::PathBuf;
use std::time::Duration;
use support::{Batch, Guest, Mix, PAGE, Rng, Start, StreamSpec, build_stream, rebuild};
use xenfold::codec::{CodecError, Compressor, Decompressor, Level, MAX_ROWS, Row, rows};
use xenfold::page::{ContentId, ContentKey, Pfn};
use xenfold::page_set::PageSet;
use xenfold::policy::Kept;
use xenfold::policy::filter::Filter;
use xenfold::policy::model::Builder;
use xenfold::wire::{Frame, FrameReader, FrameWriter, Hello, Kind, LateRow, MAX_FRAME_BODY, Rows, WireError};

/// Cases of each property: `XENFOLD_CASES`, else the 10,000 that CI runs.
fn cases() -> u32 {
    std::env::var("XENFOLD_CASES")
        .ok()
        .and_then(|cases| cases.parse().ok())
        .unwrap_or(10_000)
}

const KEY: [u8; 32] = [7; 32];

// ── A source that shares no code with the library but the two compressors ──

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

/// Offset and padded length of each PAGE_DATA record, and whether it is behind VERIFY, in a stream without checkpoints.
fn page_records(stream: &[u8]) -> Vec<(usize, usize, bool)> {
    let mut at = stream
        .windows(12)
        .position(|bytes| bytes == b"\xff\xff\xff\xff\xff\xff\xff\xffXENF")
        .unwrap()
        + 40;
    let (mut found, mut frozen) = (Vec::new(), false);
    loop {
        let length = 8 + (word(stream, at + 4) as usize).next_multiple_of(8);
        match word(stream, at) {
            0 => return found,
            1 => found.push((at, length, frozen)),
            0xd => frozen = true,
            _ => {}
        }
        at += length;
    }
}

fn word(bytes: &[u8], at: usize) -> u32 {
    u32::from_le_bytes(bytes[at..at + 4].try_into().unwrap())
}

fn leb(out: &mut Vec<u8>, mut value: u64) {
    while value > 127 {
        out.push(value as u8 & 127 | 128);
        value >>= 7;
    }
    out.push(value as u8);
}

fn zigzag(value: i64) -> u64 {
    if value < 0 {
        !(value as u64) << 1 | 1
    } else {
        (value as u64) << 1
    }
}

/// What a row is, in FORMAT.md's numbers: kind, and the distance of a reference.
type Naive = (u64, i64);

fn naive_rows(entries: &[u64], rows: &[Naive]) -> Vec<u8> {
    let (mut out, mut behind, mut at) = (Vec::new(), 0i64, 0);
    while at < entries.len() {
        let length = (1..=entries.len() - at)
            .take_while(|n| entries[at + n - 1] == entries[at] + *n as u64 - 1)
            .count();
        let pfn = (entries[at] & 0xf_ffff_ffff_ffff) as i64;
        leb(&mut out, length as u64);
        leb(&mut out, entries[at] >> 52);
        leb(&mut out, zigzag(pfn - behind));
        behind = pfn + length as i64;
        at += length;
    }
    let (mut last, mut at) = (0, 0);
    while at < rows.len() {
        let length = rows[at..].iter().take_while(|row| **row == rows[at]).count();
        let (kind, distance) = rows[at];
        leb(&mut out, length as u64 * 8 + kind);
        if kind == 2 {
            leb(&mut out, zigzag(distance - last));
            last = distance;
        }
        at += length;
    }
    out
}

#[derive(Default)]
struct NaiveSource {
    holders: HashMap<Vec<u8>, u64>,
    memory: HashMap<u64, Vec<u8>>,
    digest: blake3::Hasher,
    rows: u64,
    blocks: usize,
    frames: Vec<(u16, Vec<u8>)>,
}

impl NaiveSource {
    fn digest(&mut self, head: [u32; 4], part: &[u8]) {
        for word in head {
            self.digest.update(&word.to_le_bytes());
        }
        self.digest.update(part);
    }

    fn bytes(&mut self, bytes: &[u8]) {
        if !bytes.is_empty() {
            self.digest([1, bytes.len() as u32, 0, 0], bytes);
            self.frames.push((kind::BYTES, bytes.to_vec()));
        }
    }

    fn record(&mut self, body: &[u8], frozen: bool) {
        let count = word(body, 0) as usize;
        let entries: Vec<u64> = body[8..8 + 8 * count]
            .chunks(8)
            .map(|entry| u64::from_le_bytes(entry.try_into().unwrap()))
            .collect();
        let mut pages = body[8 + 8 * count..].chunks(PAGE);
        let (mut rows, mut full, mut ids) = (Vec::new(), Vec::new(), Vec::new());
        for entry in &entries {
            let pfn = entry & 0xf_ffff_ffff_ffff;
            let page = if entry >> 60 < 0xd { pages.next() } else { None };
            let row = match page {
                None => (3, 0),
                Some(page) if page.iter().all(|byte| *byte == 0) => (0, 0),
                Some(page) => match self.holders.get(page) {
                    Some(holder) if self.memory.get(holder).is_some_and(|held| held == page) => {
                        (2, pfn as i64 - *holder as i64)
                    }
                    _ => (1, 0),
                },
            };
            if row.0 == 1 {
                full.push(page.unwrap());
            }
            rows.push(row);
            ids.extend_from_slice(&entry.to_le_bytes());
            ids.extend_from_slice(&page.map_or([0; 16], |page| {
                blake3::keyed_hash(&KEY, page).as_bytes()[..16].try_into().unwrap()
            }));
            if !frozen {
                match page {
                    Some(page) => {
                        self.holders.insert(page.to_vec(), pfn);
                        self.memory.insert(pfn, page.to_vec());
                    }
                    None => drop(self.memory.remove(&pfn)),
                }
            }
        }
        self.digest([3, count as u32, word(body, 4), 0], &ids);
        self.rows += count as u64;
        let encoded = naive_rows(&entries, &rows);
        let blocks: Vec<Vec<u8>> = full.chunks(3).map(|pages| self.block(pages)).collect();
        let mut frame = Vec::new();
        let words = [
            count as u32,
            frozen.into(),
            word(body, 4),
            encoded.len() as u32,
            blocks.len() as u32,
            0,
        ];
        words
            .iter()
            .for_each(|word| frame.extend_from_slice(&word.to_le_bytes()));
        frame.extend_from_slice(&encoded);
        blocks.iter().for_each(|block| frame.extend_from_slice(block));
        self.frames.push((kind::ROWS, frame));
    }

    fn block(&mut self, pages: &[&[u8]]) -> Vec<u8> {
        let level = [Level::Raw, Level::Lz4, Level::Zstd(1), Level::Zstd(6)][self.blocks % 4];
        self.blocks += 1;
        let raw = pages.concat();
        let (codec, bytes) = match Compressor::default().compress(level, &raw) {
            Some(packed) => (level.wire(), packed),
            None => (0, raw),
        };
        let mut block = vec![codec, 0, 0, 0];
        block.extend_from_slice(&(pages.len() as u32).to_le_bytes());
        block.extend_from_slice(&(bytes.len() as u32).to_le_bytes());
        block.extend_from_slice(&bytes);
        block
    }
}

/// The frames that carry a stream, up to End.
fn naive_frames(stream: &[u8]) -> Vec<(u16, Vec<u8>)> {
    let mut source = NaiveSource::default();
    let mut at = 0;
    for (start, length, frozen) in page_records(stream) {
        source.bytes(&stream[at..start]);
        if at == 0 {
            source.frames.insert(0, (kind::GUEST, vec![2, 0, 0, 0]));
        }
        let record = &stream[start..start + length];
        if word(record, 8) > 1024 {
            (source.holders, source.memory) = Default::default();
            source.frames.push((kind::FORGET, Vec::new()));
            source.bytes(record);
        } else {
            source.record(&record[8..], frozen);
        }
        at = start + length;
    }
    let (rest, end) = stream[at..].split_at(stream.len() - at - 8);
    source.bytes(rest);
    source.digest([5, 8, 0, 0], end);
    let mut body = source.digest.finalize().as_bytes().to_vec();
    body.extend_from_slice(&source.rows.to_le_bytes());
    body.extend_from_slice(end);
    source.frames.push((kind::END, body));
    source.frames
}

fn hello(options: &str) -> Vec<u8> {
    let mut bytes = b"XENFOLD\n\x01\0\x01\0".to_vec();
    bytes.extend_from_slice(&(options.len() as u32).to_le_bytes());
    bytes.extend_from_slice(options.as_bytes());
    bytes.extend_from_slice(&crc32fast::hash(&bytes).to_le_bytes());
    bytes
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

fn numbered(hello: &[u8], frames: &[(u16, Vec<u8>)]) -> Vec<u8> {
    let mut wire = hello.to_vec();
    for (sequence, (kind, body)) in (0..).zip(frames) {
        wire.extend(frame_bytes(sequence, *kind, body));
    }
    wire
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
    let (_, frames) = read(include_bytes!("fixtures/wire-v1-model-source.bin"));
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

// ── Lies: everything is right but what is said ──

/// Reads a Rows body as the destination does. Nothing may panic, and nothing grow beyond what a record has.
fn digest_rows(body: &[u8], touched: usize) -> Result<(), String> {
    let parsed = Rows::parse(body).map_err(|error| error.to_string())?;
    assert!(parsed.count <= MAX_ROWS && parsed.blocks.len() <= parsed.count);
    let (entries, list) = rows::decode(parsed.rows, parsed.count).map_err(|error| error.to_string())?;
    assert_eq!((entries.len(), list.len()), (parsed.count, parsed.count));
    for block in &parsed.blocks {
        // Blocks that the lie did not touch unpack as ever.
        if (block.offset..block.offset + block.bytes.len()).contains(&touched) || touched < block.offset {
            let pages = Decompressor::default().decompress(block.codec, block.bytes, block.pages);
            let pages = pages.map_err(|error| error.to_string())?;
            assert_eq!(pages.len(), block.pages * PAGE);
        }
    }
    Ok(())
}

#[test]
fn no_lie_in_a_record_does_harm() {
    let (_, frames) = golden_until_end();
    let (mut accepted, mut refused) = (0, 0);
    for (_, frame) in frames.iter().filter(|(_, frame)| frame.kind == Kind::Rows) {
        let mut body = frame.body.clone();
        let raw = Rows::parse(&frame.body).unwrap();
        let raw: Vec<_> = raw
            .blocks
            .iter()
            .filter(|block| block.codec == 0)
            .map(|block| block.offset..block.offset + block.bytes.len())
            .collect();
        for at in 0..body.len() {
            // A raw page may hold anything: one bit of each byte is enough.
            let bits = if raw.iter().any(|range| range.contains(&at)) {
                1
            } else {
                8
            };
            for bit in 0..bits {
                body[at] ^= 1 << bit;
                match digest_rows(&body, at) {
                    Ok(()) => accepted += 1,
                    Err(_) => refused += 1,
                }
                body[at] ^= 1 << bit;
            }
        }
        for end in 0..body.len().min(400) {
            assert!(digest_rows(&body[..end], 0).is_err());
        }
    }
    assert!(accepted > 1000 && refused > 1000, "{accepted} {refused}");
}

#[test]
fn no_lie_is_accepted_with_another_memory() {
    let (wire, frames) = golden_until_end();
    let hello = wire[..frames[0].0].to_vec();
    let frames: Vec<(u16, Vec<u8>)> = frames
        .into_iter()
        .map(|(_, frame)| (frame.kind as u16, frame.body))
        .collect();
    let stream = golden_stream();
    let mut config = Config {
        failure_persistence: None,
        max_shrink_iters: 0,
        ..Config::default()
    };
    config.cases = (cases() / 8).max(1);
    let strategy = (
        0..frames.len(),
        any::<prop::sample::Index>(),
        any::<bool>(),
        0u8..8,
        any::<bool>(),
    );
    let (accepted, refused) = (std::cell::Cell::new(0), std::cell::Cell::new(0));
    TestRunner::new(config)
        .run(&strategy, |(frame, at, near, bit, of_kind)| {
            let mut lied = frames.clone();
            let (kind, body) = &mut lied[frame];
            if body.is_empty() || of_kind && near && bit < 2 {
                *kind ^= 1 << bit;
            } else {
                let length = if near { body.len().min(60) } else { body.len() };
                body[at.index(length)] ^= 1 << bit;
            }
            let outcome = receive_alive(&numbered(&hello, &lied), lied.len() as u64);
            if outcome.accepted {
                accepted.set(accepted.get() + 1);
                prop_assert!(outcome.received == stream, "accepted, but another stream");
            } else {
                refused.set(refused.get() + 1);
            }
            Ok(())
        })
        .unwrap();
    assert!(
        refused.get() > accepted.get(),
        "{} accepted, {} refused",
        accepted.get(),
        refused.get()
    );
}

fn rows_body(count: u32, encoded: &[u8], blocks: &[(u8, u32, &[u8])]) -> Vec<u8> {
    let words = [count, 0, 0, encoded.len() as u32, blocks.len() as u32, 0];
    let mut body: Vec<u8> = words.iter().flat_map(|word| word.to_le_bytes()).collect();
    body.extend_from_slice(encoded);
    for (codec, pages, bytes) in blocks {
        body.extend_from_slice(&[*codec, 0, 0, 0]);
        body.extend_from_slice(&pages.to_le_bytes());
        body.extend_from_slice(&(bytes.len() as u32).to_le_bytes());
        body.extend_from_slice(bytes);
    }
    body
}

fn leb_of(numbers: &[u64]) -> Vec<u8> {
    let mut out = Vec::new();
    numbers.iter().for_each(|number| leb(&mut out, *number));
    out
}

#[test]
fn extreme_numbers_are_refused() {
    let decode = |numbers: &[u64], count| rows::decode(&leb_of(numbers), count);
    let max = u64::MAX;
    // A run that is empty, too long, longer than any; more entries than a record has.
    assert_eq!(decode(&[0, 0, 0], 1), Err(CodecError::Run { count: 1 }));
    assert_eq!(decode(&[2, 0, 0], 1), Err(CodecError::Run { count: 1 }));
    assert_eq!(decode(&[max, 0, 0], 1024), Err(CodecError::Run { count: 1024 }));
    assert_eq!(
        decode(&[1, 0, 0], MAX_ROWS + 1),
        Err(CodecError::Run { count: MAX_ROWS + 1 })
    );
    // Upper bits that an entry has not, page numbers below 0 and above 52 bits.
    assert_eq!(decode(&[1, 4096, 0, 8], 1), Err(CodecError::Pfn));
    assert_eq!(decode(&[1, 0, 1, 8], 1), Err(CodecError::Pfn));
    assert_eq!(decode(&[1, 0, zigzag(1 << 52), 8], 1), Err(CodecError::Pfn));
    assert_eq!(decode(&[2, 0, zigzag((1 << 52) - 1), 16], 2), Err(CodecError::Pfn));
    assert_eq!(decode(&[1, 0, 5, 1, 0, zigzag(i64::MAX), 16], 2), Err(CodecError::Pfn));
    assert_eq!(decode(&[1, 0, max, 8], 1), Err(CodecError::Pfn));
    // References to pages that there cannot be, kinds that there are not, rows for no entry, bytes behind the last.
    for distance in [zigzag(1), zigzag(-(1 << 52)), zigzag(i64::MIN), zigzag(i64::MAX)] {
        assert_eq!(
            decode(&[1, 0, 0, 8 + 2, distance], 1),
            Err(CodecError::Pfn),
            "{distance}"
        );
    }
    assert_eq!(decode(&[1, 0, 0, 8 + 7], 1), Err(CodecError::Kind(7)));
    // Contents without their ids.
    for kind in [4, 6] {
        assert_eq!(decode(&[1, 0, 0, 8 + kind], 1), Err(CodecError::Short));
    }
    assert_eq!(decode(&[1, 0, 0, 16], 1), Err(CodecError::Run { count: 1 }));
    assert_eq!(decode(&[1, 0, 0, 8, 0], 1), Err(CodecError::Trailing(1)));
    // The largest page number itself is fine.
    let last = Pfn::MAX.get();
    assert_eq!(
        decode(&[1, 0, zigzag(last as i64), 8], 1),
        Ok((vec![last], vec![Row::Zero]))
    );

    let one = leb_of(&[1, 0, 0, 8 + 1]);
    let page = [7u8; PAGE];
    let good = rows_body(1, &one, &[(0, 1, &page)]);
    assert!(Rows::parse(&good).is_ok());
    for (at, what) in [
        (0, "count"),
        (4, "flags"),
        (12, "rows_length"),
        (16, "blocks_count"),
        (20, "reserved"),
    ] {
        for value in [u32::MAX, 1 << 31, 1 << 20, 1025] {
            let mut bad = good.clone();
            bad[at..at + 4].copy_from_slice(&value.to_le_bytes());
            assert!(Rows::parse(&bad).is_err(), "{what} {value}");
        }
    }
    for (at, value) in [(28 + 4, u32::MAX), (28 + 4, 0), (28 + 8, u32::MAX), (28, 0x100)] {
        let mut bad = good.clone();
        bad[at..at + 4].copy_from_slice(&value.to_le_bytes());
        assert!(Rows::parse(&bad).is_err(), "{at} {value}");
    }
}

/// This process's peak memory, bytes.
fn peak() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find(|line| line.starts_with("VmHWM:")).unwrap();
    line.split_whitespace().nth(1).unwrap().parse::<u64>().unwrap() * 1024
}

#[test]
fn bombs_do_not_go_off() {
    // 1 GiB of zeros as zstd and 64 MiB as LZ4, said to be one page, or all that a record may have.
    let zstd = zstd_bomb(1 << 30);
    let lz4 = lz4_bomb(64 << 20);
    let (stream, hello) = (golden_stream(), source_hello());
    let start = naive_frames(&stream)[..2].to_vec();
    let before = peak();
    for (codec, bomb) in [(2, &zstd), (1, &lz4)] {
        assert!(bomb.len() < MAX_FRAME_BODY as usize - 4096);
        for pages in [1, 1024] {
            assert!(Decompressor::default().decompress(codec, bomb, pages).is_err());
            let encoded = leb_of(&[pages as u64, 0, 0, pages as u64 * 8 + 1]);
            let body = rows_body(pages as u32, &encoded, &[(codec, pages as u32, bomb)]);
            let frames = [start.clone(), vec![(kind::ROWS, body)]].concat();
            let outcome = receive_alive(&numbered(&hello, &frames), frames.len() as u64);
            assert!(!outcome.accepted);
            let error = outcome.result.unwrap_err();
            let named = error.to_string().contains("rows of a record") || error.to_string().contains("xl ended");
            assert!(named, "{error:?}");
        }
    }
    // Other tests may run beside this one; a bomb would be far above them.
    assert!(peak() - before < 300 << 20, "{} MiB", (peak() - before) >> 20);
    // A frame that announces more than it brings makes no room for it, one above the bound is not read at all.
    let mut header = frame_bytes(0, kind::BYTES, &[]);
    header[..4].copy_from_slice(&MAX_FRAME_BODY.to_le_bytes());
    assert!(matches!(
        FrameReader::new(&header[..]).read(),
        Err(WireError::Cut { .. })
    ));
    header[..4].copy_from_slice(&(MAX_FRAME_BODY + 1).to_le_bytes());
    assert!(matches!(
        FrameReader::new(&header[..]).read(),
        Err(WireError::TooLong { .. })
    ));
    // Hellos.
    for length in [65_537, u32::MAX] {
        let mut bytes = source_hello();
        bytes[12..16].copy_from_slice(&length.to_le_bytes());
        assert!(matches!(
            Hello::default().agree(&mut &bytes[..]),
            Err(WireError::BadHello(_))
        ));
    }
    for options in [
        "[".repeat(65_536),
        "{\"program\":".repeat(6_000),
        "{}{}".into(),
        "7".into(),
    ] {
        assert!(matches!(
            Hello::default().agree(&mut &hello_of(&options)[..]),
            Err(WireError::BadHello(_))
        ));
    }
    // A key that is none.
    for key in ["", "07", &"0g".repeat(32), &"é".repeat(32), &"07".repeat(33)] {
        let agreement = Hello::default()
            .agree(&mut &hello_of(&format!(r#"{{"content_key":"{key}"}}"#))[..])
            .unwrap();
        assert!(agreement.peer.key().is_err(), "{key}");
    }
}

fn hello_of(options: &str) -> Vec<u8> {
    hello(options)
}

/// Zeros, packed: one zstd frame of RLE blocks, 128 KiB each (RFC 8878, 3.1.1).
fn zstd_bomb(length: usize) -> Vec<u8> {
    let mut frame = vec![0x28, 0xb5, 0x2f, 0xfd, 0x00, 0x58];
    let blocks = length >> 17;
    for block in 0..blocks {
        let header = 1 << 17 << 3 | 1 << 1 | u32::from(block + 1 == blocks);
        frame.extend_from_slice(&header.to_le_bytes()[..3]);
        frame.push(0);
    }
    frame
}

/// One LZ4 block: a zero, then a match of the byte before that goes on and on.
fn lz4_bomb(length: usize) -> Vec<u8> {
    let mut block = vec![0x1f, 0, 1, 0];
    block.resize(4 + length / 255, 255);
    block.extend_from_slice(&[0, 0x50, 0, 0, 0, 0, 0]);
    block
}

#[test]
fn the_bombs_are_bombs() {
    let half = zstd_bomb(1 << 17);
    assert_eq!(Decompressor::default().decompress(2, &half, 32), Ok(vec![0; 1 << 17]));
    let unpacked = 255 * 100;
    let bomb = lz4_bomb(unpacked);
    let mut found = None;
    for pages in 1..20 {
        found = found.or(Decompressor::default().decompress(1, &bomb, pages).ok());
    }
    // It has no whole number of pages, but unpacks: too little room is what it is refused for.
    let error = Decompressor::default().decompress(1, &bomb, 1).unwrap_err().to_string();
    assert!(found.is_none() && error.contains("too small"), "{error}");
}
