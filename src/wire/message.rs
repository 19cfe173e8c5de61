//! What the bodies of frames mean.
use serde::{Deserialize, Serialize};

use super::frame::{Kind, WireError};
use crate::codec::MAX_ROWS;

const ROWS_HEADER_BYTES: usize = 24;
const BLOCK_HEADER_BYTES: usize = 12;
const FROZEN: u32 = 1;

/// A block of pages inside a Rows frame.
#[derive(Debug, PartialEq, Eq)]
pub struct Block<'a> {
    /// The block codec's number (codec::Level::wire).
    pub codec: u8,
    /// Pages that it holds, 1 to [`MAX_ROWS`].
    pub pages: usize,
    pub bytes: &'a [u8],
    /// Where `bytes` start in the frame's body; not looked at when writing.
    pub offset: usize,
}

/// The body of a Rows frame: one PAGE_DATA record.
#[derive(Debug, PartialEq, Eq)]
pub struct Rows<'a> {
    /// Entries of the record, 1 to [`MAX_ROWS`].
    pub count: usize,
    /// The rows are not entered into the tables: pages behind a VERIFY record, which Xen compares and does not write.
    pub frozen: bool,
    /// The reserved word behind the record's count, as Xen's stream had it.
    pub reserved: u32,
    /// Encoded entries and rows (codec::rows).
    pub rows: &'a [u8],
    pub blocks: Vec<Block<'a>>,
}

/// Takes `N` bytes off the front.
fn take<const N: usize>(input: &mut &[u8]) -> Option<[u8; N]> {
    let (head, rest) = input.split_first_chunk::<N>()?;
    *input = rest;
    Some(*head)
}

fn take_slice<'a>(input: &mut &'a [u8], length: usize) -> Option<&'a [u8]> {
    let (head, rest) = input.split_at_checked(length)?;
    *input = rest;
    Some(head)
}

impl<'a> Rows<'a> {
    /// The parts of the frame's body, for `FrameWriter::write`.
    pub fn parts<T>(&self, write: impl FnOnce(&[&[u8]]) -> T) -> T {
        let mut header = Vec::with_capacity(ROWS_HEADER_BYTES);
        header.extend_from_slice(&(self.count as u32).to_le_bytes());
        header.extend_from_slice(&u32::from(self.frozen).to_le_bytes());
        header.extend_from_slice(&self.reserved.to_le_bytes());
        header.extend_from_slice(&(self.rows.len() as u32).to_le_bytes());
        header.extend_from_slice(&(self.blocks.len() as u32).to_le_bytes());
        header.extend_from_slice(&[0; 4]);
        let block_headers: Vec<[u8; BLOCK_HEADER_BYTES]> = self
            .blocks
            .iter()
            .map(|block| {
                let mut header = [0; BLOCK_HEADER_BYTES];
                header[0] = block.codec;
                header[4..8].copy_from_slice(&(block.pages as u32).to_le_bytes());
                header[8..12].copy_from_slice(&(block.bytes.len() as u32).to_le_bytes());
                header
            })
            .collect();
        let mut parts = vec![&header[..], self.rows];
        for (header, block) in block_headers.iter().zip(&self.blocks) {
            parts.push(header);
            parts.push(block.bytes);
        }
        write(&parts)
    }

    /// Reads a frame's body. Lengths and counts are checked against what is there; the rows themselves are not decoded.
    pub fn parse(body: &'a [u8]) -> Result<Rows<'a>, WireError> {
        let bad = |why| WireError::BadBody { kind: Kind::Rows, why };
        let mut rest = body;
        let input = &mut rest;
        let mut word = || {
            take::<4>(input)
                .map(u32::from_le_bytes)
                .ok_or(bad("shorter than its header"))
        };
        let (count, flags, reserved, rows_length, blocks_count, zero) = (
            word()? as usize,
            word()?,
            word()?,
            word()? as usize,
            word()? as usize,
            word()?,
        );
        if count == 0 || count > MAX_ROWS {
            return Err(bad("the number of entries is not 1 to 1024"));
        }
        if flags & !FROZEN != 0 || zero != 0 {
            return Err(bad("unknown flags or reserved bytes"));
        }
        let rows = take_slice(input, rows_length).ok_or(bad("shorter than its rows"))?;
        let mut blocks = Vec::new();
        let mut pages_left = count;
        for _ in 0..blocks_count {
            let head = take::<BLOCK_HEADER_BYTES>(input).ok_or(bad("shorter than its blocks"))?;
            let [codec, z0, z1, z2, p0, p1, p2, p3, l0, l1, l2, l3] = head;
            let pages = u32::from_le_bytes([p0, p1, p2, p3]) as usize;
            if pages == 0 || pages > pages_left || [z0, z1, z2] != [0; 3] {
                return Err(bad("a block's header is wrong"));
            }
            pages_left -= pages;
            let length = u32::from_le_bytes([l0, l1, l2, l3]) as usize;
            let offset = body.len() - input.len();
            let bytes = take_slice(input, length).ok_or(bad("shorter than its blocks"))?;
            blocks.push(Block {
                codec,
                pages,
                bytes,
                offset,
            });
        }
        if !input.is_empty() {
            return Err(bad("bytes follow the last block"));
        }
        Ok(Rows {
            count,
            frozen: flags & FROZEN != 0,
            reserved,
            rows,
            blocks,
        })
    }
}

/// The body of an End frame.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct End {
    /// BLAKE3 over the whole stream in order (engine::digest).
    pub digest: [u8; 32],
    /// Rows among it.
    pub rows: u64,
    /// libxl's END record: 8 bytes, kept back by the destination until both ends agree.
    pub record: [u8; 8],
}

impl End {
    pub fn to_bytes(&self) -> [u8; 48] {
        let mut body = [0; 48];
        body[..32].copy_from_slice(&self.digest);
        body[32..40].copy_from_slice(&self.rows.to_le_bytes());
        body[40..].copy_from_slice(&self.record);
        body
    }

    pub fn parse(mut body: &[u8]) -> Result<End, WireError> {
        let input = &mut body;
        match (take(input), take(input), take(input), input.is_empty()) {
            (Some(digest), Some(rows), Some(record), true) => Ok(End {
                digest,
                rows: u64::from_le_bytes(rows),
                record,
            }),
            _ => Err(WireError::BadBody {
                kind: Kind::End,
                why: "it has not 48 bytes",
            }),
        }
    }
}

/// The body of a Verdict frame, JSON: whether the rebuilt guest is the one that was sent.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Verdict {
    pub accepted: bool,
    /// Why not.
    pub reason: String,
    /// With `verify`: frames read back and found as last carried.
    pub verified_pages: u64,
    /// With `verify`: frames left out because Xen rewrites them.
    pub rewritten_by_xen_pages: u64,
    /// With `verify`: how long that took.
    pub time_ms: u64,
}

/// Reads a JSON body.
pub fn from_json<T: serde::de::DeserializeOwned>(kind: Kind, body: &[u8]) -> Result<T, WireError> {
    serde_json::from_slice(body).map_err(|_| WireError::BadBody {
        kind,
        why: "it is not the JSON expected",
    })
}

/// Reads a body that is one little-endian u32 (Guest: the libxc guest type; Exit: the exit status).
pub fn u32_body(kind: Kind, body: &[u8]) -> Result<u32, WireError> {
    <[u8; 4]>::try_from(body)
        .map(u32::from_le_bytes)
        .map_err(|_| WireError::BadBody {
            kind,
            why: "it has not 4 bytes",
        })
}

/// Reads a body that is one little-endian u64 (Settled: the record's number).
pub fn u64_body(kind: Kind, body: &[u8]) -> Result<u64, WireError> {
    <[u8; 8]>::try_from(body)
        .map(u64::from_le_bytes)
        .map_err(|_| WireError::BadBody {
            kind,
            why: "it has not 8 bytes",
        })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_come_back_and_damage_does_not() {
        let rows = Rows {
            count: 3,
            frozen: true,
            reserved: 7,
            rows: b"rows",
            blocks: vec![
                Block {
                    codec: 2,
                    pages: 2,
                    bytes: b"block",
                    offset: 24 + 4 + 12,
                },
                Block {
                    codec: 0,
                    pages: 1,
                    bytes: b"",
                    offset: 24 + 4 + 12 + 5 + 12,
                },
            ],
        };
        let body = rows.parts(|parts| parts.concat());
        assert_eq!(
            body[..24],
            [3, 0, 0, 0, 1, 0, 0, 0, 7, 0, 0, 0, 4, 0, 0, 0, 2, 0, 0, 0, 0, 0, 0, 0]
        );
        assert_eq!(Rows::parse(&body).unwrap(), rows);
        for end in 0..body.len() {
            assert!(Rows::parse(&body[..end]).is_err(), "cut at {end}");
        }
        assert!(Rows::parse(&[&body[..], b"x"].concat()).is_err());
    }

    #[test]
    fn end_comes_back() {
        let end = End {
            digest: [9; 32],
            rows: 77,
            record: [0; 8],
        };
        assert_eq!(End::parse(&end.to_bytes()).unwrap(), end);
        assert!(End::parse(&end.to_bytes()[1..]).is_err());
    }
}
