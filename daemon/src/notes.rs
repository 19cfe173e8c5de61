//! A word of 32 bits for each page of a guest, taken when one of its 512 is first noted.
use std::collections::BTreeMap;

/// Pages noted together.
const CHUNK: usize = 512;

/// What they take, with their place in the tree.
const CHUNK_BYTES: u64 = (CHUNK * size_of::<u32>() + 64) as u64;

/// Zero where nothing was noted.
#[derive(Default)]
pub(crate) struct Notes {
    chunks: BTreeMap<u32, Box<[u32; CHUNK]>>,
}

impl Notes {
    /// Memory taken.
    pub fn bytes(&self) -> u64 {
        self.chunks.len() as u64 * CHUNK_BYTES
    }

    /// Whether noting a page takes no further memory.
    pub fn has(&self, pfn: u32) -> bool {
        self.chunks.contains_key(&(pfn / CHUNK as u32))
    }

    /// Whether any page can be noted within so many bytes.
    pub fn has_room(&self, most_bytes: u64) -> bool {
        self.bytes() + CHUNK_BYTES <= most_bytes
    }

    pub fn get(&self, pfn: u32) -> u32 {
        let chunk = self.chunks.get(&(pfn / CHUNK as u32));
        chunk
            .and_then(|chunk| chunk.get(pfn as usize % CHUNK))
            .copied()
            .unwrap_or(0)
    }

    pub fn entry(&mut self, pfn: u32) -> Option<&mut u32> {
        let chunk = self.chunks.entry(pfn / CHUNK as u32);
        chunk
            .or_insert_with(|| Box::new([0; CHUNK]))
            .get_mut(pfn as usize % CHUNK)
    }

    /// All that are not zero, by their pages.
    pub fn iter(&self) -> impl Iterator<Item = (u32, u32)> + '_ {
        let pages = self.chunks.iter().flat_map(|(chunk, notes)| {
            let first = chunk * CHUNK as u32;
            (first..=first.saturating_add(CHUNK as u32 - 1)).zip(notes.iter().copied())
        });
        pages.filter(|(_, note)| *note != 0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn notes_are_found_by_their_pages() {
        let mut notes = Notes::default();
        for pfn in [3, 511, 512, u32::MAX] {
            assert_eq!(notes.get(pfn), 0);
            *notes.entry(pfn).unwrap() = pfn / 2;
        }
        assert_eq!(notes.get(513), 0);
        let all: Vec<_> = notes.iter().collect();
        assert_eq!(all, [(3, 1), (511, 255), (512, 256), (u32::MAX, u32::MAX / 2)]);
        assert!(notes.has(4) && !notes.has(1024) && notes.bytes() == 3 * CHUNK_BYTES);
        assert!(notes.has_room(4 * CHUNK_BYTES) && !notes.has_room(4 * CHUNK_BYTES - 1));
    }
}
