//! What everything else speaks of: guest page numbers, page sizes, content ids.
use std::fmt;

/// Size of a guest page in bytes; Xen's stream fixes it (page_shift 12).
pub const PAGE_SIZE: usize = 4096;

/// Guest page number as Xen's stream numbers them: 52 bits (`PAGE_DATA_PFN_MASK` in xg_sr_stream_format.h).
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub struct Pfn(u64);

impl Pfn {
    /// The largest page number that the stream can carry.
    pub const MAX: Pfn = Pfn((1 << 52) - 1);

    /// A page number, or `None` above 52 bits.
    pub const fn new(raw: u64) -> Option<Pfn> {
        if raw <= Self::MAX.0 { Some(Pfn(raw)) } else { None }
    }

    /// The number itself.
    pub const fn get(self) -> u64 {
        self.0
    }
}

impl fmt::Debug for Pfn {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "pfn {:#x}", self.0)
    }
}

impl fmt::Display for Pfn {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:#x}", self.0)
    }
}
