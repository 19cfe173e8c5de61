//! Digest over all rows, computed by both ends from the bytes that each has at hand.
use crate::page::ContentId;

/// What stands for the content of an entry that has none.
pub const ABSENT: ContentId = ContentId([0; 16]);

/// BLAKE3 over (entry as Xen's stream has it, content id) of every row in order.
#[derive(Default)]
pub struct Digest {
    hasher: blake3::Hasher,
    rows: u64,
}

impl Digest {
    /// Takes in the rows of one record.
    pub fn record(&mut self, entries: &[u64], ids: &[ContentId]) {
        let mut bytes = Vec::with_capacity(entries.len() * 24);
        for (entry, id) in entries.iter().zip(ids) {
            bytes.extend_from_slice(&entry.to_le_bytes());
            bytes.extend_from_slice(&id.0);
        }
        self.hasher.update(&bytes);
        self.rows += entries.len() as u64;
    }

    pub fn rows(&self) -> u64 {
        self.rows
    }

    pub fn finish(&self) -> [u8; 32] {
        *self.hasher.finalize().as_bytes()
    }
}
