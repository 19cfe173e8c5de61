//! BLAKE3 of many pages at once.
//!
//! BLAKE3 is quick because a processor's vector registers take several chunks of 1 KiB side by side; a page has only
//! four, an AVX-512 register takes sixteen. The same chunk of [`PAGES`] pages fills it: a third of the time a byte. The
//! crate has that only in a part that it does not promise to keep, so its version is exact in Cargo.toml, and a test
//! compares with `blake3::keyed_hash`.
use std::array::from_fn;

use blake3::IncrementCounter;
use blake3::platform::Platform;

use crate::page::PAGE_SIZE;

/// Pages hashed side by side.
pub const PAGES: usize = 16;

const CHUNK: usize = 1024;
const CHUNKS: usize = PAGE_SIZE / CHUNK;
/// Bytes of a chaining value, and of a hash.
const VALUE: usize = 32;
/// A node above two chunks or nodes: their chaining values.
const PARENT: usize = 2 * VALUE;

// Flags of the compression function (the BLAKE3 paper, table 3).
const CHUNK_START: u8 = 1 << 0;
const CHUNK_END: u8 = 1 << 1;
const IS_PARENT: u8 = 1 << 2;
const ROOT: u8 = 1 << 3;
const KEYED_HASH: u8 = 1 << 4;

/// What `blake3::keyed_hash` gives for each of the pages.
pub fn keyed_hashes(key: &[u8; 32], pages: &[&[u8; PAGE_SIZE]; PAGES]) -> [[u8; VALUE]; PAGES] {
    let platform = Platform::detect();
    let (words, _) = key.as_chunks::<4>();
    let key = from_fn(|i| words.get(i).map_or(0, |word| u32::from_le_bytes(*word)));
    let hash_parents = |parents: &[&[u8; PARENT]], flags, out: &mut [u8]| {
        platform.hash_many(
            parents,
            &key,
            0,
            IncrementCounter::No,
            KEYED_HASH | IS_PARENT | flags,
            0,
            0,
            out,
        );
    };

    let mut chunks = [[[0; VALUE]; CHUNKS]; PAGES];
    for counter in 0..CHUNKS {
        let inputs = pages.map(|page| &page.as_chunks::<CHUNK>().0[counter]);
        let mut values = [[0; VALUE]; PAGES];
        platform.hash_many(
            &inputs,
            &key,
            counter as u64,
            IncrementCounter::No,
            KEYED_HASH,
            CHUNK_START,
            CHUNK_END,
            values.as_flattened_mut(),
        );
        for (page, value) in chunks.iter_mut().zip(values) {
            page[counter] = value;
        }
    }

    // Two parents a page, then the root above them.
    let (parents, _) = chunks.as_flattened().as_flattened().as_chunks::<PARENT>();
    let parents: [&[u8; PARENT]; 2 * PAGES] = from_fn(|i| &parents[i]);
    let mut values = [[0; VALUE]; 2 * PAGES];
    hash_parents(&parents, 0, values.as_flattened_mut());
    let (roots, _) = values.as_flattened().as_chunks::<PARENT>();
    let roots: [&[u8; PARENT]; PAGES] = from_fn(|i| &roots[i]);
    let mut hashes = [[0; VALUE]; PAGES];
    hash_parents(&roots, ROOT, hashes.as_flattened_mut());
    hashes
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]

        #[test]
        fn as_one_at_a_time(key: [u8; 32], bytes in proptest::collection::vec(any::<u8>(), PAGES * PAGE_SIZE)) {
            let (pages, _) = bytes.as_chunks::<PAGE_SIZE>();
            let hashes = keyed_hashes(&key, &from_fn(|i| &pages[i]));
            for (page, hash) in pages.iter().zip(hashes) {
                prop_assert_eq!(*blake3::keyed_hash(&key, page).as_bytes(), hash);
            }
        }
    }
}
