//! The stream's reader and writer over whole streams: nothing lost, nothing believed, nothing read too far.
mod support;

use proptest::prelude::*;
use proptest::test_runner::{Config, TestRunner};
use std::collections::BTreeMap;
use std::io::{self, Cursor, Read, Write};
use support::{Batch, Guest, Start, StreamSpec, build_stream, rebuild};
use xenfold::page::PAGE_SIZE;
use xenfold::stream::{
    Event, GuestType, Layer, PageData, PageDataHead, Part, Reader, StreamError, Writer, for_each_page, libxc, libxl, xl,
};

/// Cases of each property: `XENFOLD_CASES`, else the 10,000 that CI runs.
fn cases() -> u32 {
    std::env::var("XENFOLD_CASES")
        .ok()
        .and_then(|cases| cases.parse().ok())
        .unwrap_or(10_000)
}

fn runner(cases: u32) -> TestRunner {
    // No regression files: the specification in the failure message is enough to repeat it.
    TestRunner::new(Config {
        cases,
        failure_persistence: None,
        ..Config::default()
    })
}

fn reader<R: Read>(inner: R, start: Start) -> Reader<R> {
    match start {
        Start::Xl => Reader::new(inner),
        Start::Libxl => Reader::at_libxl(inner),
    }
}

const BODY_CAP: usize = 128 << 20;

/// Reads and writes again; bodies in one of three ways, by `how`.
fn copy<R: Read>(reader: &mut Reader<R>, how: u64) -> Result<Vec<u8>, StreamError> {
    let mut writer = Writer::new(Vec::new());
    let mut body = Vec::new();
    let mut turn = how;
    loop {
        let event = reader.next()?;
        writer.write_event(&event)?;
        let header = match event {
            Event::Record(header) => header,
            Event::End => return Ok(writer.into_inner()),
            _ => continue,
        };
        assert_eq!(reader.offset(), header.body_offset());
        assert_eq!(reader.body_left(), header.padded_length());
        body.clear();
        turn = turn.wrapping_add(1);
        match turn % 3 {
            0 => reader.read_body(&mut body, BODY_CAP)?,
            1 if header.is(Layer::Libxc, libxc::PAGE_DATA) => {
                reader.read_page_data_head(&header, &mut body, BODY_CAP)?;
                let head = PageDataHead::parse(&body, header.length, header.body_offset())?;
                assert_eq!(head.pages_len() as u64, reader.body_left());
                assert_eq!(head.as_bytes(), body);
                reader.read_body(&mut body, BODY_CAP)?;
            }
            _ => {
                let mut part = vec![0; 1 + (how % 5000) as usize];
                while reader.body_left() > 0 {
                    let len = reader.read_body_part(&mut part)?;
                    body.extend_from_slice(&part[..len]);
                }
            }
        }
        assert_eq!(body.len() as u64, header.padded_length());
        if header.is(Layer::Libxc, libxc::PAGE_DATA) {
            check_page_data(&body, header.body_offset())?;
        }
        writer.write_body(&body)?;
    }
}

/// The view shows all that the body holds: what it shows gives the body again.
fn check_page_data(body: &[u8], offset: u64) -> Result<(), StreamError> {
    let data = PageData::parse(body, offset)?;
    let mut again = (data.count() as u32).to_le_bytes().to_vec();
    again.extend_from_slice(&data.reserved().to_le_bytes());
    for (index, (raw, entry)) in data.raw_entries().zip(data.entries()).enumerate() {
        again.extend_from_slice(&raw.to_le_bytes());
        assert_eq!(data.entry(index), Some(entry));
        assert_eq!(entry.pfn.get(), raw & 0xf_ffff_ffff_ffff);
        assert_eq!(u64::from(entry.page_type.raw()), raw >> 60);
        assert_eq!(entry.has_data, raw >> 60 < 0xd);
    }
    assert_eq!(data.entry(data.count()), None);
    assert_eq!(data.pages().len(), data.head().pages_len());
    again.extend_from_slice(data.pages());
    assert_eq!(again, body);
    Ok(())
}

/// What the reader says about memory, to be compared with the naive rebuilder.
fn memory_of(stream: &[u8], start: Start) -> BTreeMap<u64, (u8, Vec<u8>)> {
    let mut reader = reader(stream, start).pass_unknown(true);
    let (mut pages, mut body, mut verify) = (BTreeMap::new(), Vec::new(), false);
    loop {
        let header = match reader.next().unwrap() {
            Event::Record(header) => header,
            Event::End => return pages,
            _ => continue,
        };
        body.clear();
        reader.read_body(&mut body, BODY_CAP).unwrap();
        verify |= header.is(Layer::Libxc, libxc::VERIFY);
        if header.is(Layer::Libxc, libxc::PAGE_DATA) && !verify {
            for (entry, page) in PageData::parse(&body, header.body_offset())
                .unwrap()
                .entries_with_pages()
            {
                pages.insert(
                    entry.pfn.get(),
                    (entry.page_type.raw(), page.unwrap_or_default().to_vec()),
                );
            }
        }
    }
}

/// Gives its bytes in small pieces, with an interruption now and then; counts what was taken.
struct Trickle<'a> {
    bytes: &'a [u8],
    taken: usize,
    turn: u64,
}

impl Read for Trickle<'_> {
    fn read(&mut self, out: &mut [u8]) -> io::Result<usize> {
        self.turn = self
            .turn
            .wrapping_mul(6364136223846793005)
            .wrapping_add(1442695040888963407);
        if (self.turn >> 60) == 0 {
            return Err(io::ErrorKind::Interrupted.into());
        }
        let len = (1 + (self.turn >> 33) as usize % 3000)
            .min(out.len())
            .min(self.bytes.len() - self.taken);
        out[..len].copy_from_slice(&self.bytes[self.taken..self.taken + len]);
        self.taken += len;
        Ok(len)
    }
}

#[test]
fn read_then_write_gives_the_same_bytes() {
    runner(cases())
        .run(&support::small_spec(), |spec| {
            let stream = build_stream(&spec);
            let mut piped = stream.clone();
            piped.extend_from_slice(xl::GO);
            let input = Trickle {
                bytes: &piped,
                taken: 0,
                turn: spec.seed,
            };
            let mut reader = reader(input, spec.start).pass_unknown(spec.unknown_records);
            let copied = copy(&mut reader, spec.seed).map_err(|error| TestCaseError::fail(format!("{error}")))?;
            prop_assert!(copied == stream, "the copy differs");
            prop_assert_eq!(reader.offset(), stream.len() as u64);
            // GO is still in the pipe, whole, and asking again takes none of it.
            prop_assert_eq!(reader.next().unwrap(), Event::End);
            prop_assert_eq!(reader.get_mut().taken, stream.len());
            prop_assert_eq!(&piped[reader.into_inner().taken..], xl::GO);
            Ok(())
        })
        .unwrap();
}

#[test]
fn memory_is_what_the_naive_rebuilder_finds() {
    runner(cases() / 5)
        .run(&support::small_spec(), |spec| {
            let stream = build_stream(&spec);
            let rebuilt = rebuild(&stream, spec.start).map_err(TestCaseError::fail)?;
            prop_assert_eq!(rebuilt.length, stream.len());
            prop_assert_eq!(rebuilt.pages.len(), spec.pages);
            prop_assert_eq!(rebuilt.verify_mismatches, 0);
            prop_assert!(rebuilt.pages == memory_of(&stream, spec.start), "memory differs");
            Ok(())
        })
        .unwrap();
}

#[test]
fn large_records_as_xen_sends_them() {
    for (guest, pages, batch) in [
        (Guest::Pvh, 4000, Batch::Aligned),
        (Guest::Hvm, 2048, Batch::Fixed(1024)),
        (Guest::Pv, 1500, Batch::Mixed(1024)),
    ] {
        let spec = StreamSpec {
            guest,
            pages,
            batch,
            hole_percent: 0,
            verify: true,
            ..StreamSpec::default()
        };
        let stream = build_stream(&spec);
        assert!(copy(&mut reader(&stream[..], spec.start), 0).unwrap() == stream);
        let rebuilt = rebuild(&stream, spec.start).unwrap();
        assert_eq!(rebuilt.pages.len(), pages);
        assert!(rebuilt.pages == memory_of(&stream, spec.start));
    }
}

/// Small, and with every kind of piece; pages are few because each of their bits would only be the same test again.
fn damage_specs() -> Vec<StreamSpec> {
    let small = StreamSpec {
        pages: 3,
        passes: 1,
        no_data_percent: 30,
        batch: Batch::Mixed(3),
        emulator_context: 13,
        vcpus: 1,
        ..StreamSpec::default()
    };
    vec![
        StreamSpec {
            guest: Guest::Hvm,
            emulator_xenstore: true,
            ..small.clone()
        },
        StreamSpec {
            guest: Guest::Pv,
            version: 2,
            ..small.clone()
        },
        StreamSpec {
            guest: Guest::Hvm,
            checkpoints: 1,
            optional_records: true,
            dirty_reserved: true,
            pages: 2,
            ..small
        },
    ]
}

/// Where each piece of a good stream starts.
fn piece_starts(stream: &[u8], start: Start) -> Vec<u64> {
    let mut reader = reader(stream, start);
    let mut starts = Vec::new();
    loop {
        starts.push(reader.offset());
        if reader.next().unwrap() == Event::End {
            return starts;
        }
        reader.read_body(&mut Vec::new(), BODY_CAP).unwrap();
    }
}

#[test]
fn every_truncation_is_an_eof_at_the_right_offset() {
    for spec in damage_specs() {
        let stream = build_stream(&spec);
        for len in 0..stream.len() {
            for how in 4000..4003 {
                match copy(&mut reader(&stream[..len], spec.start), how) {
                    Err(StreamError::UnexpectedEof { offset, wanted, record }) => {
                        assert_eq!(offset, len as u64);
                        assert!(
                            wanted >= 1 && offset + wanted <= stream.len() as u64,
                            "{wanted} in {record}"
                        );
                    }
                    other => panic!("truncated to {len}: {other:?}"),
                }
            }
        }
    }
}

#[test]
fn every_bit_flip_is_an_error_or_kept_as_it_came() {
    for spec in damage_specs() {
        let mut stream = build_stream(&spec);
        let starts = piece_starts(&stream, spec.start);
        let (mut kept, mut refused) = (0, 0);
        for bit in 0..stream.len() * 8 {
            let at = bit / 8;
            stream[at] ^= 1 << (bit % 8);
            let mut input = reader(&stream[..], spec.start);
            match copy(&mut input, 4000) {
                Ok(copied) => {
                    // A flipped record type can end the stream early; what was read is what was written.
                    assert!(copied == stream[..input.offset() as usize], "bit {bit}");
                    kept += 1;
                }
                Err(error) => {
                    // Everything before the damaged piece was good.
                    let piece = starts.iter().rev().find(|start| **start <= at as u64).unwrap();
                    assert!(error.offset() >= *piece, "bit {bit}: {error}");
                    assert!(error.offset() <= stream.len() as u64, "bit {bit}: {error}");
                    assert!(
                        error
                            .to_string()
                            .starts_with(&format!("stream offset {}, ", error.offset()))
                    );
                    // It stays an error, and nothing more is read; bodies are judged by PageData, not by the reader.
                    if error.record() != Part::Record(Layer::Libxc, libxc::PAGE_DATA) {
                        let offset = input.offset();
                        let again = input.next();
                        let stuck: Result<Event, _> = Err(StreamError::AfterError {
                            offset,
                            record: error.record(),
                        });
                        let unread = matches!(again, Err(StreamError::BodyLeft { .. }));
                        assert!(
                            unread || format!("{again:?}") == format!("{stuck:?}"),
                            "bit {bit}: {again:?}"
                        );
                        assert_eq!(input.offset(), offset);
                    }
                    refused += 1;
                }
            }
            stream[at] ^= 1 << (bit % 8);
        }
        assert!(kept > 0 && refused > 0, "{kept} kept, {refused} refused");
    }
}

#[test]
fn random_bytes_never_panic() {
    let prefixes: [&[u8]; 4] = [
        b"",
        xl::S0_MAGIC,
        b"LibxlFmt\0\0\0\x02\0\0\0\0",
        b"LibxlFmt\0\0\0\x02\0\0\0\0\x01\0\0\0\0\0\0\0",
    ];
    let strategy = (
        0usize..4,
        proptest::collection::vec(any::<u8>(), 0..200),
        any::<u64>(),
        any::<bool>(),
    );
    runner(cases())
        .run(&strategy, |(prefix, bytes, how, xl)| {
            let input = [prefixes[prefix], &bytes].concat();
            let start = if xl { Start::Xl } else { Start::Libxl };
            let _ = copy(&mut reader(&input[..], start).pass_unknown(how % 2 == 0), how);
            let _ = PageData::parse(&bytes, how);
            let _ = PageDataHead::parse(&bytes, how as u32, u64::MAX);
            Ok(())
        })
        .unwrap();
}

/// A stream whose last record announces `length` bytes and delivers `arrive` of them.
fn announced(layer: Layer, kind: u32, length: u32, arrive: usize) -> Vec<u8> {
    let mut stream = b"LibxlFmt\0\0\0\x02\0\0\0\0".to_vec();
    if layer == Layer::Libxc {
        stream.extend_from_slice(b"\x01\0\0\0\0\0\0\0");
        stream.extend_from_slice(b"\xff\xff\xff\xff\xff\xff\xff\xffXENF\0\0\0\x03\0\0\0\0\0\0\0\0");
        stream.extend_from_slice(b"\x02\0\0\0\x0c\0\0\0\x04\0\0\0\x11\0\0\0");
    }
    stream.extend_from_slice(&kind.to_le_bytes());
    stream.extend_from_slice(&length.to_le_bytes());
    stream.resize(stream.len() + arrive, 0xee);
    stream
}

fn to_last_record(stream: &[u8]) -> (Reader<&[u8]>, Event) {
    let mut reader = Reader::at_libxl(stream);
    loop {
        let event = reader.next().unwrap();
        match event {
            Event::Record(header) if header.length > 0 => return (reader, event),
            _ => {}
        }
    }
}

#[test]
fn announced_lengths_make_no_room() {
    // libxl has no limit of its own: the caller's cap decides, and room follows what arrives.
    for (layer, kind, length) in [
        (Layer::Libxl, libxl::EMULATOR_CONTEXT, u32::MAX),
        (Layer::Libxl, libxl::EMULATOR_CONTEXT, 1 << 31),
        (Layer::Libxc, libxc::HVM_CONTEXT, 128 << 20),
    ] {
        let stream = announced(layer, kind, length, 1000);
        let (mut reader, event) = to_last_record(&stream);
        let padded = u64::from(length).next_multiple_of(8);
        assert_eq!(reader.body_left(), padded);
        let (offset, mut out) = (reader.offset(), Vec::new());
        match reader.read_body(&mut out, 1 << 20) {
            Err(StreamError::TooLong {
                offset: at,
                record,
                length,
                cap,
            }) => {
                assert_eq!((at, record, length, cap), (offset, event.part(), padded, 1 << 20));
            }
            other => panic!("{other:?}"),
        }
        assert_eq!((reader.offset(), out.capacity()), (offset, 0));
        match reader.read_body(&mut out, usize::MAX) {
            Err(StreamError::UnexpectedEof {
                offset: at,
                record,
                wanted,
            }) => {
                assert_eq!((at, record, wanted), (stream.len() as u64, event.part(), padded - 1000));
            }
            other => panic!("{other:?}"),
        }
        assert_eq!(out.len(), 1000);
        assert!(out.capacity() <= 512 << 10, "{} bytes of room for 1000", out.capacity());
    }
    // Room stays within twice of what arrived.
    let stream = announced(Layer::Libxl, libxl::EMULATOR_CONTEXT, u32::MAX, 5 << 20);
    let (mut reader, _) = to_last_record(&stream);
    let mut out = Vec::new();
    assert!(reader.read_body(&mut out, usize::MAX).is_err());
    assert_eq!(out.len(), 5 << 20);
    assert!(out.capacity() <= 16 << 20, "{} bytes of room for 5 MiB", out.capacity());
}

#[test]
fn libxc_bodies_end_at_128_mib() {
    for length in [(128 << 20) + 1, u32::MAX] {
        let stream = announced(Layer::Libxc, libxc::PAGE_DATA, length, 8);
        let mut reader = Reader::at_libxl(&stream[..]);
        let error = loop {
            if let Err(error) = reader.next() {
                break error;
            }
        };
        assert!(matches!(error, StreamError::TooLong { .. }), "{error}");
        assert_eq!(error.record(), Part::Record(Layer::Libxc, libxc::PAGE_DATA));
        assert_eq!(error.offset(), stream.len() as u64 - 12);
    }
}

#[test]
fn page_data_counts_are_checked_before_room_is_made() {
    for (count, length) in [(u32::MAX, 128 << 20), (1 << 29, 128 << 20), (2, 16), (1, 8), (0, 16)] {
        let mut stream = announced(Layer::Libxc, libxc::PAGE_DATA, length, 0);
        stream.extend_from_slice(&u64::from(count).to_le_bytes());
        let (mut reader, event) = to_last_record(&stream);
        let Event::Record(header) = event else {
            panic!("{event:?}")
        };
        let mut out = Vec::new();
        let error = reader.read_page_data_head(&header, &mut out, BODY_CAP).unwrap_err();
        assert_eq!(error.offset(), header.body_offset(), "{error}");
        assert!(out.capacity() <= 64, "{}", out.capacity());
    }
    // The list fits into the record, but not into the caller's cap.
    let mut stream = announced(Layer::Libxc, libxc::PAGE_DATA, 8 + 8 * 100_000, 0);
    stream.extend_from_slice(&100_000u64.to_le_bytes());
    let (mut reader, event) = to_last_record(&stream);
    let Event::Record(header) = event else {
        panic!("{event:?}")
    };
    let mut out = Vec::new();
    let error = reader.read_page_data_head(&header, &mut out, 64 << 10).unwrap_err();
    assert!(
        matches!(
            error,
            StreamError::TooLong {
                length: 800_008,
                cap: 0x10000,
                ..
            }
        ),
        "{error}"
    );
    assert_eq!(reader.body_left(), 800_000);
}

#[test]
fn xl_configuration_ends_at_16_mib() {
    let mut stream = build_stream(&StreamSpec::default());
    stream[44..48].copy_from_slice(&((16 << 20) + 5u32).to_le_bytes());
    let error = Reader::new(&stream[..]).next().unwrap_err();
    assert!(
        matches!(
            error,
            StreamError::TooLong {
                offset: 44,
                record: Part::XlHeader,
                ..
            }
        ),
        "{error}"
    );
    // At the limit it is tried, and found missing.
    stream[44..48].copy_from_slice(&((16 << 20) + 4u32).to_le_bytes());
    let error = Reader::new(&stream[..]).next().unwrap_err();
    let len = stream.len() as u64;
    assert!(matches!(error, StreamError::UnexpectedEof { offset, record: Part::XlConfig, .. } if offset == len));
}

#[test]
fn unknown_records_are_refused_or_passed() {
    let spec = StreamSpec {
        unknown_records: true,
        optional_records: true,
        ..StreamSpec::default()
    };
    let stream = build_stream(&spec);
    let error = copy(&mut reader(&stream[..], spec.start), 0).unwrap_err();
    assert!(
        matches!(
            error,
            StreamError::UnknownRecord {
                record: Part::Record(Layer::Libxl, 0x77),
                ..
            }
        ),
        "{error}"
    );
    assert!(
        error.to_string().contains("libxl record of unknown type 0x77"),
        "{error}"
    );
    assert!(copy(&mut reader(&stream[..], spec.start).pass_unknown(true), 0).unwrap() == stream);
    // Optional ones of libxc pass always.
    let spec = StreamSpec {
        unknown_records: false,
        ..spec
    };
    let stream = build_stream(&spec);
    assert!(copy(&mut reader(&stream[..], spec.start), 0).unwrap() == stream);
}

#[test]
fn xl_header_tells_the_guest() {
    let spec = StreamSpec {
        seed: 0xabc,
        pages: 10,
        ..StreamSpec::default()
    };
    let stream = build_stream(&spec);
    let Event::XlHeader(header) = Reader::new(&stream[..]).next().unwrap() else {
        panic!("no xl header")
    };
    assert_eq!(header.name(), Some("guest-2748"));
    assert_eq!(header.uuid(), Some("7d2c9a5e-0000-4000-8000-000000000abc"));
    assert_eq!(header.memory_kib(), Some(40));
    assert!(header.json().ends_with(b"}}"));
}

#[test]
fn guest_type_is_libxc_s() {
    for (guest, expected) in [
        (Guest::Pv, GuestType::Pv),
        (Guest::Hvm, GuestType::Hvm),
        (Guest::Pvh, GuestType::Hvm),
    ] {
        let stream = build_stream(&StreamSpec {
            guest,
            start: Start::Libxl,
            ..StreamSpec::default()
        });
        let mut reader = Reader::at_libxl(&stream[..]);
        let found = loop {
            if let Event::DomainHeader(header) = reader.next().unwrap() {
                break header.guest_type();
            }
        };
        assert_eq!(found, expected);
    }
}

/// Past the test harness, which shows what a passing test prints to nobody.
fn skipped(what: &str) {
    let _ = writeln!(io::stderr(), "SKIPPED: {what}");
}

/// A small PVH guest's `xl save` from the lab, unpacked.
fn capture() -> Option<Vec<u8>> {
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/fixtures/small-pvh.save.zst");
    if !std::path::Path::new(path).exists() {
        let required = std::env::var("XENFOLD_REQUIRE_ORACLES").is_ok_and(|value| value == "1");
        assert!(!required, "XENFOLD_REQUIRE_ORACLES=1, but {path} is not there");
        skipped(&format!("{path} is not there; NO real stream is checked"));
        return None;
    }
    let mut decoder = zstd::Decoder::new(std::fs::File::open(path).unwrap()).unwrap();
    // Packed with --long: a window of up to 2 GiB.
    decoder.window_log_max(31).unwrap();
    let mut stream = Vec::new();
    decoder.read_to_end(&mut stream).unwrap();
    Some(stream)
}

#[test]
fn a_real_stream_is_kept_and_understood() {
    let Some(stream) = capture() else { return };
    let copied = copy(&mut Reader::new(&stream[..]), 4000).unwrap();
    assert!(copied == stream, "the copy differs");
    let rebuilt = rebuild(&stream, Start::Xl).unwrap();
    assert_eq!(rebuilt.length, stream.len());
    assert!(rebuilt.pages.len() > 1000, "{} pages", rebuilt.pages.len());
    assert!(rebuilt.pages == memory_of(&stream, Start::Xl), "memory differs");
    let mut memory = BTreeMap::new();
    for_each_page(&mut Reader::new(&stream[..]), |pfn, place, page| {
        assert!(stream[place as usize..].starts_with(page));
        memory.insert(pfn.get(), (0, page.to_vec()));
        Ok::<(), StreamError>(())
    })
    .unwrap();
    let mut expected = rebuilt.pages.clone();
    expected.retain(|_, (kind, page)| *kind == 0 && page.iter().any(|byte| *byte != 0));
    assert!(memory == expected, "pages differ one by one");
    // As Xen writes it for PVH: 11, 12, 10, PAGE_DATA…, 8, 9, 0A, 0 between libxl's 1 and 0.
    let kinds: Vec<(bool, u32)> = rebuilt
        .others
        .iter()
        .map(|record| (record.libxc, record.kind))
        .collect();
    let libxc = [0x11, 0x12, 0x10, 8, 9, 0xa, 0].map(|kind| (true, kind));
    assert_eq!(kinds, [&[(false, 1)], &libxc[..], &[(false, 0)]].concat());
    let Event::XlHeader(header) = Reader::new(&stream[..]).next().unwrap() else {
        panic!("no xl header")
    };
    assert!(header.name().is_some() && header.uuid().is_some() && header.memory_kib().is_some());
}

/// Xen's own checker: `XENFOLD_VERIFY_STREAM` is the path of `verify-stream-v2` (Debian: package xen-utils-4.17,
/// /usr/lib/xen-4.17/bin), its Python library is found beside it or through `PYTHONPATH`.
fn oracle() -> Option<(String, String)> {
    let required = std::env::var("XENFOLD_REQUIRE_ORACLES").is_ok_and(|value| value == "1");
    let Ok(script) = std::env::var("XENFOLD_VERIFY_STREAM") else {
        assert!(
            !required,
            "XENFOLD_REQUIRE_ORACLES=1, but XENFOLD_VERIFY_STREAM does not name verify-stream-v2"
        );
        skipped("XENFOLD_VERIFY_STREAM does not name Xen's verify-stream-v2; streams are NOT checked by it");
        return None;
    };
    let library = std::env::var("PYTHONPATH").unwrap_or_else(|_| {
        let bin = std::path::Path::new(&script).parent().expect("a path with a directory");
        bin.join("../lib/python").to_string_lossy().into_owned()
    });
    Some((script, library))
}

fn verify_stream((script, library): &(String, String), stream: &[u8]) -> Result<(), String> {
    let mut file = tempfile::NamedTempFile::new().map_err(|error| error.to_string())?;
    io::copy(&mut Cursor::new(stream), &mut file).map_err(|error| error.to_string())?;
    let output = std::process::Command::new("python3")
        .env("PYTHONPATH", library)
        .args([
            script.as_ref(),
            "-f".as_ref(),
            "libxl".as_ref(),
            "-i".as_ref(),
            file.path().as_os_str(),
        ])
        .output()
        .map_err(|error| error.to_string())?;
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    if output.status.success() {
        Ok(())
    } else {
        Err(format!("{}: {said}", output.status))
    }
}

#[test]
fn xens_checker_accepts_what_is_written() {
    let Some(oracle) = oracle() else { return };
    if let Some(real) = capture() {
        let libxl = real.windows(8).position(|bytes| bytes == b"LibxlFmt").unwrap();
        verify_stream(&oracle, &copy(&mut Reader::at_libxl(&real[libxl..]), 4000).unwrap()).unwrap();
    }
    // A process each: some dozens, and one with records of 4 MiB.
    let large = StreamSpec {
        pages: 3000,
        batch: Batch::Aligned,
        ..StreamSpec::default()
    }
    .for_oracle();
    let check = |spec: &StreamSpec| {
        let stream = build_stream(spec);
        let copied = copy(&mut Reader::at_libxl(&stream[..]), 0).map_err(|error| error.to_string())?;
        verify_stream(&oracle, &copied)
    };
    check(&large).unwrap();
    runner((cases() / 100).clamp(10, 100))
        .run(&support::oracle_spec(), |spec| {
            check(&spec).map_err(TestCaseError::fail)
        })
        .unwrap();
    // It does look: a page type that is not allowed, and an end cut off.
    let mut bad = build_stream(&StreamSpec {
        pages: 1,
        no_data_percent: 0,
        hole_percent: 0,
        ..large
    });
    let at = bad
        .windows(8)
        .position(|bytes| bytes == [1, 0, 0, 0, 0x10, 0x10, 0, 0])
        .unwrap();
    bad[at + 8 + 8 + 7] |= 0x50;
    verify_stream(&oracle, &bad).unwrap_err();
    bad[at + 8 + 8 + 7] &= 0xf;
    verify_stream(&oracle, &bad).unwrap();
    bad.pop();
    verify_stream(&oracle, &bad).unwrap_err();
}

#[test]
fn page_size_is_the_library_s() {
    assert_eq!(support::PAGE, PAGE_SIZE);
}
