//! Frames of which everything is right but what they say.

use proptest::prelude::*;
use proptest::test_runner::{Config, TestRunner};
use xenfold::codec::{CodecError, Decompressor, MAX_ROWS, Row, rows};
use xenfold::page::Pfn;
use xenfold::wire::{FrameReader, Hello, Kind, MAX_FRAME_BODY, Rows, WireError};

use crate::hosts::{frame_bytes, kind, receive_alive};
use crate::naive::{hello, leb, naive_frames, numbered, zigzag};
use crate::support::PAGE;
use crate::{cases, golden_stream, golden_until_end, source_hello};

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
