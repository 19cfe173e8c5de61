//! Blocks: the bytes of up to [`BLOCK_PAGES`] full pages in a row, compressed as one.
use zstd::zstd_safe::{CParameter, ResetDirective};

use super::CodecError;
use crate::page::PAGE_SIZE;

/// Pages in a block of ordinary size: 1 MiB, which compresses better and faster than page by page.
pub const BLOCK_PAGES: usize = 256;

/// How a block is compressed, cheapest first. The numbers are the wire's (zstd's level is the sender's affair).
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Level {
    Raw,
    Lz4,
    Zstd(i32),
}

impl Level {
    /// The block codec's number on the wire.
    pub fn wire(self) -> u8 {
        match self {
            Level::Raw => 0,
            Level::Lz4 => 1,
            Level::Zstd(_) => 2,
        }
    }
}

/// One worker's compressor; keeps its state between blocks.
#[derive(Default)]
pub struct Compressor {
    zstd: Option<(i32, zstd::bulk::Compressor<'static>)>,
    /// What comes out, until its size is known.
    out: Vec<u8>,
}

impl Compressor {
    /// Compresses `pages` at `level`. `None` where that does not pay (less than 1/32 saved, or the library refused):
    /// the block is then sent raw.
    pub fn compress(&mut self, level: Level, pages: &[u8]) -> Option<Vec<u8>> {
        let bound = pages.len() - pages.len() / 32;
        let room = match level {
            Level::Raw => return None,
            Level::Lz4 => lz4_flex::block::get_maximum_output_size(pages.len()),
            Level::Zstd(_) => bound,
        };
        let mut out = std::mem::take(&mut self.out);
        out.resize(out.len().max(room), 0);
        let length = out.get_mut(..room).and_then(|out| match level {
            Level::Zstd(level) => self.zstd(level)?.compress_to_buffer(pages, out).ok(),
            _ => lz4_flex::block::compress_into(pages, out).ok(),
        });
        self.out = out;
        self.out
            .get(..length.filter(|length| *length < bound)?)
            .map(<[u8]>::to_vec)
    }

    /// Takes the memory that the first block would have to wait for.
    pub fn warm_up(&mut self) {
        let pages = (0..(BLOCK_PAGES * PAGE_SIZE / 8) as u64)
            .flat_map(|n| n.wrapping_mul(0x9e37_79b9_7f4a_7c15).to_le_bytes())
            .collect::<Vec<u8>>();
        self.compress(Level::Zstd(1), &pages);
    }

    fn zstd(&mut self, level: i32) -> Option<&mut zstd::bulk::Compressor<'static>> {
        let (current, compressor) = match &mut self.zstd {
            Some(zstd) => zstd,
            none => none.insert((NO_LEVEL, zstd::bulk::Compressor::default())),
        };
        if *current != level {
            *current = NO_LEVEL;
            // A block that did not fit has left zstd in the middle of it.
            let context = compressor.context_mut();
            context.reset(ResetDirective::SessionAndParameters).ok()?;
            compressor.set_compression_level(level).ok()?;
            if level == 1 {
                for parameter in FOR_LEVEL_1 {
                    compressor.set_parameter(parameter).ok()?;
                }
            }
            *current = level;
        }
        Some(compressor)
    }
}

const NO_LEVEL: i32 = i32::MIN;

/// Level 1 by itself looks back half a block and takes no match below 7 bytes. For pages of a Debian guest this leaves 3 %
/// fewer bytes in the same time.
const FOR_LEVEL_1: [CParameter; 2] = [
    CParameter::WindowLog((BLOCK_PAGES * PAGE_SIZE).ilog2()),
    CParameter::MinMatch(6),
];

/// One worker's decompressor.
pub struct Decompressor {
    zstd: Option<zstd::bulk::Decompressor<'static>>,
}

impl Default for Decompressor {
    fn default() -> Self {
        Decompressor {
            zstd: zstd::bulk::Decompressor::new().ok(),
        }
    }
}

impl Decompressor {
    /// Decompresses a block of `codec` (its number on the wire) that must yield exactly `pages` pages. Never allocates
    /// more than that, whatever the block claims.
    pub fn decompress(&mut self, codec: u8, block: &[u8], pages: usize) -> Result<Vec<u8>, CodecError> {
        let mut out = Vec::new();
        self.decompress_into(codec, block, pages, &mut out)?;
        Ok(out)
    }

    /// The same into a buffer, in place of what it has.
    pub fn decompress_into(
        &mut self,
        codec: u8,
        block: &[u8],
        pages: usize,
        out: &mut Vec<u8>,
    ) -> Result<(), CodecError> {
        let fail = |why: &dyn ToString| CodecError::Block {
            pages,
            why: why.to_string(),
        };
        let wanted = pages * PAGE_SIZE;
        out.clear();
        out.reserve(wanted);
        match codec {
            0 => out.extend_from_slice(block.get(..wanted).unwrap_or_default()),
            1 => {
                out.resize(wanted, 0);
                let got = lz4_flex::block::decompress_into(block, out).map_err(|error| fail(&error))?;
                out.truncate(got);
            }
            2 => {
                let zstd = self.zstd.as_mut().ok_or_else(|| fail(&"out of memory"))?;
                // Into the room that is there, which need not be zero.
                zstd.decompress_to_buffer(block, out).map_err(|error| fail(&error))?;
            }
            other => return Err(CodecError::BlockCodec(other)),
        };
        if out.len() == wanted && (codec != 0 || block.len() == wanted) {
            Ok(())
        } else {
            Err(fail(&format!("{} bytes, not {wanted}", out.len())))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn text(pages: usize) -> Vec<u8> {
        (0..pages * PAGE_SIZE).map(|i| (i / 7 % 97 + i % 5) as u8).collect()
    }

    #[test]
    fn blocks_come_back() {
        let pages = text(9);
        for level in [Level::Lz4, Level::Zstd(-3), Level::Zstd(1), Level::Zstd(6)] {
            let block = Compressor::default().compress(level, &pages).unwrap();
            assert!(block.len() < pages.len() / 2);
            assert_eq!(
                Decompressor::default().decompress(level.wire(), &block, 9),
                Ok(pages.clone())
            );
        }
        assert_eq!(Decompressor::default().decompress(0, &pages, 9), Ok(pages));
    }

    #[test]
    fn noise_is_left_raw() {
        let mut noise = vec![0; 4 * PAGE_SIZE];
        blake3::Hasher::new().finalize_xof().fill(&mut noise);
        for level in [Level::Raw, Level::Lz4, Level::Zstd(1)] {
            assert_eq!(Compressor::default().compress(level, &noise), None);
        }
    }

    #[test]
    fn the_level_changes_after_a_block_that_does_not_compress() {
        let (pages, mut noise) = (text(9), vec![0; 9 * PAGE_SIZE]);
        blake3::Hasher::new().finalize_xof().fill(&mut noise);
        let mut compressor = Compressor::default();
        for level in [1, 9, 1, 3] {
            let level = Level::Zstd(level);
            assert_eq!(compressor.compress(level, &noise), None);
            assert_eq!(
                compressor.compress(level, &pages),
                Compressor::default().compress(level, &pages)
            );
        }
    }

    #[test]
    fn blocks_that_lie_about_their_size_are_refused() {
        let pages = text(9);
        for level in [Level::Lz4, Level::Zstd(1)] {
            let block = Compressor::default().compress(level, &pages).unwrap();
            for claimed in [0, 1, 8, 10] {
                assert!(
                    Decompressor::default()
                        .decompress(level.wire(), &block, claimed)
                        .is_err()
                );
            }
        }
        assert!(Decompressor::default().decompress(0, &pages[1..], 9).is_err());
        assert_eq!(
            Decompressor::default().decompress(7, &[], 1),
            Err(CodecError::BlockCodec(7))
        );
    }
}
