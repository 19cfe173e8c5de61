//! A source that shares no code with the library but the two compressors.

use std::collections::HashMap;

use xenfold::codec::{Compressor, Level};

use crate::hosts::{frame_bytes, kind};
use crate::support::PAGE;

pub const KEY: [u8; 32] = [7; 32];

/// Offset and padded length of each PAGE_DATA record, and whether it is behind VERIFY, in a stream without checkpoints.
pub fn page_records(stream: &[u8]) -> Vec<(usize, usize, bool)> {
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

pub fn word(bytes: &[u8], at: usize) -> u32 {
    u32::from_le_bytes(bytes[at..at + 4].try_into().unwrap())
}

pub fn leb(out: &mut Vec<u8>, mut value: u64) {
    while value > 127 {
        out.push(value as u8 & 127 | 128);
        value >>= 7;
    }
    out.push(value as u8);
}

pub fn zigzag(value: i64) -> u64 {
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
pub fn naive_frames(stream: &[u8]) -> Vec<(u16, Vec<u8>)> {
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

pub fn hello(options: &str) -> Vec<u8> {
    let mut bytes = b"XENFOLD\n\x01\0\x01\0".to_vec();
    bytes.extend_from_slice(&(options.len() as u32).to_le_bytes());
    bytes.extend_from_slice(options.as_bytes());
    bytes.extend_from_slice(&crc32fast::hash(&bytes).to_le_bytes());
    bytes
}

pub fn numbered(hello: &[u8], frames: &[(u16, Vec<u8>)]) -> Vec<u8> {
    let mut wire = hello.to_vec();
    for (sequence, (kind, body)) in (0..).zip(frames) {
        wire.extend(frame_bytes(sequence, *kind, body));
    }
    wire
}
