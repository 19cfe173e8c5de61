//! Delta blocks: pages that differ from bases of the same number and order which both ends have.
//!
//! Two ways: the bases as zstd's prefix, for bytes that moved and pages that changed much; the XOR of pages and bases,
//! whose runs of zeros cost zstd nothing, where hardly a word differs. (Svärd et al.'s XBRLE is the second; zstd codes the
//! run lengths.) A look at the words decides, so that nothing is compressed twice.
use zstd::zstd_safe::{CCtx, CParameter, DCtx};

use super::CodecError;
use super::block::{Compressor, Decompressor, Level};
use crate::page::PAGE_SIZE;

/// The XOR, compressed with zstd.
const XOR: u8 = 3;
/// zstd with the bases as prefix.
const PREFIX: u8 = 4;

/// Words of 8 bytes of which at most 1 in so many differs make an XOR that comes out as small and costs less.
const HARDLY: usize = 10;

/// Whether a block of this codec needs its bases to be decompressed.
pub fn needs_bases(codec: u8) -> bool {
    codec == XOR || codec == PREFIX
}

impl Compressor {
    /// Compresses `pages` against `bases` of the same length; the codec's number and the block. `None` where the pages
    /// are better sent as they are.
    pub fn delta(&mut self, pages: &[u8], bases: &[u8], level: i32) -> Option<(u8, Vec<u8>)> {
        let words = pages.as_chunks::<8>().0.iter().zip(bases.as_chunks::<8>().0);
        let different = words.filter(|(new, old)| new != old).count();
        if different * HARDLY > pages.len() / 8 {
            return Some((PREFIX, with_prefix(pages, bases, level)?));
        }
        let mut difference = pages.to_vec();
        xor(&mut difference, bases);
        Some((XOR, self.compress(Level::Zstd(level), &difference)?))
    }
}

impl Decompressor {
    /// Decompresses a delta block of `codec` against its bases. Errors: as for other blocks; the bases decide how many
    /// pages there must be.
    pub fn delta(&mut self, codec: u8, block: &[u8], bases: &[u8]) -> Result<Vec<u8>, CodecError> {
        let pages = bases.len() / PAGE_SIZE;
        match codec {
            XOR => {
                let mut difference = self.decompress(Level::Zstd(0).wire(), block, pages)?;
                xor(&mut difference, bases);
                Ok(difference)
            }
            PREFIX => without_prefix(block, bases).map_err(|why| CodecError::Block { pages, why }),
            other => self.decompress(other, block, pages),
        }
    }
}

fn xor(pages: &mut [u8], bases: &[u8]) {
    pages.iter_mut().zip(bases).for_each(|(byte, base)| *byte ^= base);
}

/// From this level on zstd's own parameters find matches in the bases.
const STRONG: i32 = 3;

/// Below it the table of what may match has about a place for every 8 bytes of pages and bases.
const HASH_LOG: (u32, u32) = (14, 18);

/// A context of its own: it borrows the prefix.
fn with_prefix(pages: &[u8], bases: &[u8], level: i32) -> Option<Vec<u8>> {
    let mut context = CCtx::try_create()?;
    context.set_parameter(CParameter::CompressionLevel(level)).ok()?;
    // By itself a weak level looks back less far than to the page's base, and finds nothing there.
    let window = (pages.len() + bases.len()).next_power_of_two().ilog2();
    context.set_parameter(CParameter::WindowLog(window)).ok()?;
    if level < STRONG {
        let hash = (window - 3).clamp(HASH_LOG.0, HASH_LOG.1);
        context.set_parameter(CParameter::HashLog(hash)).ok()?;
        context.set_parameter(CParameter::MinMatch(5)).ok()?;
    }
    context.ref_prefix(bases).ok()?;
    let mut out = vec![0; pages.len() - pages.len() / 32];
    let length = context.compress2(&mut out[..], pages).ok()?;
    out.truncate(length);
    out.shrink_to_fit();
    Some(out)
}

fn without_prefix(block: &[u8], bases: &[u8]) -> Result<Vec<u8>, String> {
    let mut context = DCtx::try_create().ok_or("out of memory")?;
    let mut out = vec![0; bases.len()];
    let name = |code| zstd::zstd_safe::get_error_name(code).to_owned();
    context.ref_prefix(bases).map_err(name)?;
    match context.decompress(&mut out[..], block).map_err(name)? {
        length if length == bases.len() => Ok(out),
        length => Err(format!("{length} bytes, not {}", bases.len())),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn noise(pages: usize, seed: u8) -> Vec<u8> {
        let mut bytes = vec![0; pages * PAGE_SIZE];
        let mut noise = blake3::Hasher::new();
        noise.update(&[seed]).finalize_xof().fill(&mut bytes);
        bytes
    }

    #[test]
    fn words_that_changed_in_place_cost_little() {
        let bases = noise(16, 1);
        let mut pages = bases.clone();
        for at in (100..pages.len()).step_by(5000) {
            pages[at] ^= 0x55;
        }
        let (codec, block) = Compressor::default().delta(&pages, &bases, 1).unwrap();
        assert!(codec == XOR && block.len() < 200, "{codec} {}", block.len());
        assert_eq!(Decompressor::default().delta(codec, &block, &bases), Ok(pages));
    }

    #[test]
    fn bytes_that_moved_cost_little() {
        let bases = noise(16, 1);
        let mut pages = vec![7; 24];
        pages.extend_from_slice(&bases[..bases.len() - 24]);
        let (codec, block) = Compressor::default().delta(&pages, &bases, 1).unwrap();
        assert!(codec == PREFIX && block.len() < 200, "{codec} {}", block.len());
        assert_eq!(Decompressor::default().delta(codec, &block, &bases), Ok(pages));
    }

    #[test]
    fn what_has_nothing_in_common_is_left() {
        assert_eq!(Compressor::default().delta(&noise(4, 1), &noise(4, 2), 1), None);
    }

    #[test]
    fn damaged_blocks_and_wrong_sizes_are_refused() {
        let bases = noise(4, 1);
        let mut pages = bases.clone();
        pages[9] = 1;
        let mut moved = vec![7; 24];
        moved.extend_from_slice(&bases[..bases.len() - 24]);
        for pages in [pages, moved] {
            let (codec, block) = Compressor::default().delta(&pages, &bases, 1).unwrap();
            let mut tools = Decompressor::default();
            for end in 0..block.len() {
                assert!(tools.delta(codec, &block[..end], &bases).is_err(), "cut at {end}");
            }
            assert!(tools.delta(codec, &block, &bases[PAGE_SIZE..]).is_err());
            assert!(tools.delta(codec, &block, &noise(5, 1)).is_err());
            for bit in 0..block.len() * 8 {
                let mut damaged = block.clone();
                damaged[bit / 8] ^= 1 << (bit % 8);
                // Whatever comes out has the right size; the digest over all rows judges its bytes.
                if let Ok(out) = tools.delta(codec, &damaged, &bases) {
                    assert_eq!(out.len(), bases.len());
                }
            }
        }
        assert_eq!(
            Decompressor::default().delta(9, &[], &bases),
            Err(CodecError::BlockCodec(9))
        );
    }
}
