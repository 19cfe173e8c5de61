//! Page contents, each made again from a few bytes, so that large streams need no large memory here.

/// Size of a page; a literal, so that nothing here depends on the library.
pub const PAGE: usize = 4096;

/// splitmix64: small, seeded, the same everywhere.
pub struct Rng(u64);

impl Rng {
    pub fn new(seed: u64) -> Rng {
        Rng(seed)
    }

    pub fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// Below `bound`; 0 when that is 0.
    pub fn below(&mut self, bound: u64) -> u64 {
        self.next().checked_rem(bound).unwrap_or(0)
    }

    pub fn percent(&mut self, percent: u32) -> bool {
        self.below(100) < u64::from(percent)
    }

    pub fn pick<T: Copy>(&mut self, from: &[T]) -> T {
        from[self.below(from.len() as u64) as usize]
    }

    /// An index, chosen by these weights; one past the last when all are 0.
    pub fn weighted(&mut self, weights: &[u32]) -> usize {
        let mut left = self.below(weights.iter().map(|weight| u64::from(*weight)).sum());
        for (index, weight) in weights.iter().enumerate() {
            if left < u64::from(*weight) {
                return index;
            }
            left -= u64::from(*weight);
        }
        weights.len()
    }

    pub fn bytes(&mut self, len: usize) -> Vec<u8> {
        let mut out = vec![0; len];
        self.fill(&mut out);
        out
    }

    pub fn fill(&mut self, out: &mut [u8]) {
        for chunk in out.chunks_mut(8) {
            chunk.copy_from_slice(&self.next().to_le_bytes()[..chunk.len()]);
        }
    }
}

/// What a page holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Content {
    Zero,
    Constant(u8),
    /// Incompressible.
    Random(u64),
    /// `Random(base)` with a few runs of bytes changed.
    Similar {
        base: u64,
        change: u64,
    },
    /// Compressible to about a third.
    Text(u64),
    /// Entries of a PV page table.
    PageTable(u64),
}

impl Content {
    /// Appends the page's 4096 bytes.
    pub fn append_to(self, out: &mut Vec<u8>) {
        let start = out.len();
        out.resize(start + PAGE, 0);
        self.fill(&mut out[start..]);
    }

    fn fill(self, page: &mut [u8]) {
        match self {
            Content::Zero => page.fill(0),
            Content::Constant(value) => page.fill(value),
            Content::Random(seed) => Rng::new(seed).fill(page),
            Content::Similar { base, change } => {
                Rng::new(base).fill(page);
                let mut rng = Rng::new(change);
                for _ in 0..1 + rng.below(6) {
                    let (at, len) = (rng.below(PAGE as u64) as usize, 1 + rng.below(40) as usize);
                    let end = (at + len).min(page.len());
                    rng.fill(&mut page[at..end]);
                }
            }
            Content::Text(seed) => {
                const WORDS: [&[u8; 8]; 8] = [
                    b"page tab",
                    b"le entry",
                    b"\0\0\0\0\0\0\0\0",
                    b"hypercal",
                    b"l domain",
                    b"ffff8880",
                    b" struct ",
                    b"\x48\x89\xe5\x41\x57\x41\x56\x53",
                ];
                let mut rng = Rng::new(seed);
                for word in page.chunks_mut(8) {
                    let bits = rng.next();
                    if bits.is_multiple_of(4) {
                        word.copy_from_slice(&bits.to_le_bytes());
                    } else {
                        word.copy_from_slice(WORDS[(bits >> 8) as usize % WORDS.len()]);
                    }
                }
            }
            Content::PageTable(seed) => {
                let mut rng = Rng::new(seed);
                for entry in page.chunks_mut(8) {
                    let bits = rng.next();
                    let value = if bits.is_multiple_of(3) {
                        0
                    } else {
                        ((bits >> 44) << 12) | 0x67
                    };
                    entry.copy_from_slice(&value.to_le_bytes());
                }
            }
        }
    }
}
