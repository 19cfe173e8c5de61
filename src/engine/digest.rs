//! Digest over the whole stream, computed by both ends from the bytes that each has at hand.
use crate::page::ContentId;
use crate::wire::Kind;

/// What stands for the content of an entry that has none.
pub const ABSENT: ContentId = ContentId([0; 16]);

/// BLAKE3 over all that goes to the receiving xl, in order: a head of 16 bytes for each part (the frame's kind, its
/// length in bytes or entries, a record's reserved word, zero), then the part. Bytes stand as they are; each row as its
/// entry and its content id.
#[derive(Default)]
pub struct Digest {
    hasher: blake3::Hasher,
    rows: u64,
}

impl Digest {
    /// Takes in the bytes of one frame: of Bytes, or libxl's END record.
    pub fn bytes(&mut self, kind: Kind, bytes: &[u8]) {
        self.head(kind, bytes.len(), 0);
        self.hasher.update(bytes);
    }

    /// Takes in the rows of one record.
    pub fn record(&mut self, reserved: u32, entries: &[u64], ids: &[ContentId]) {
        self.head(Kind::Rows, entries.len(), reserved);
        let mut bytes = Vec::with_capacity(entries.len() * 24);
        for (entry, id) in entries.iter().zip(ids) {
            bytes.extend_from_slice(&entry.to_le_bytes());
            bytes.extend_from_slice(&id.0);
        }
        self.hasher.update(&bytes);
        self.rows += entries.len() as u64;
    }

    fn head(&mut self, kind: Kind, length: usize, reserved: u32) {
        for word in [kind as u32, length as u32, reserved, 0] {
            self.hasher.update(&word.to_le_bytes());
        }
    }

    pub fn rows(&self) -> u64 {
        self.rows
    }

    pub fn finish(&self) -> [u8; 32] {
        *self.hasher.finalize().as_bytes()
    }
}
