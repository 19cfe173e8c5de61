//! What everything else speaks of: guest page numbers, page sizes, content ids.
use std::fmt;

use crate::page_hash::keyed_hashes;

/// Size of a guest page in bytes; Xen's stream fixes it (page_shift 12).
pub const PAGE_SIZE: usize = 4096;

/// An all-zero page.
pub const ZERO_PAGE: [u8; PAGE_SIZE] = [0; PAGE_SIZE];

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

/// Key of content ids: two hosts that hold the same key give the same page the same id, nobody else can.
#[derive(Clone, PartialEq, Eq)]
pub struct ContentKey([u8; 32]);

impl ContentKey {
    pub const fn new(bytes: [u8; 32]) -> ContentKey {
        ContentKey(bytes)
    }

    pub const fn bytes(&self) -> &[u8; 32] {
        &self.0
    }

    /// The key in 64 hexadecimal digits.
    pub fn hex(&self) -> String {
        self.0.iter().map(|byte| format!("{byte:02x}")).collect()
    }

    /// `None`: not 64 hexadecimal digits.
    pub fn from_hex(text: &str) -> Option<ContentKey> {
        let digits: Option<Vec<u8>> = text
            .chars()
            .map(|digit| u8::try_from(digit.to_digit(16)?).ok())
            .collect();
        let (pairs, []) = digits.as_deref()?.as_chunks::<2>() else {
            return None;
        };
        let bytes: Vec<u8> = pairs.iter().map(|[high, low]| high << 4 | low).collect();
        bytes.try_into().ok().map(ContentKey)
    }

    /// The id of one page: BLAKE3 with this key, cut to 128 bits. `page` may have any length; guests' pages have
    /// [`PAGE_SIZE`] bytes.
    pub fn id(&self, page: &[u8]) -> ContentId {
        ContentId::cut(blake3::keyed_hash(&self.0, page).as_bytes())
    }

    /// The id of each page, as [`ContentKey::id`] gives it, in a third of the time.
    pub fn ids<'a>(&self, pages: impl IntoIterator<Item = &'a [u8; PAGE_SIZE]>) -> Vec<ContentId> {
        let pages: Vec<_> = pages.into_iter().collect();
        let (groups, rest) = pages.as_chunks();
        let groups = groups.iter().flat_map(|group| keyed_hashes(&self.0, group));
        let groups = groups.map(|hash| ContentId::cut(&hash));
        groups.chain(rest.iter().map(|page| self.id(*page))).collect()
    }
}

impl fmt::Debug for ContentKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("ContentKey(..)")
    }
}

/// What a page holds: equal ids mean equal bytes (the "hash no." of table 3 in Kumari et al., *On
/// Speeding up Virtual Machine Migration Through Integrated Data De-Duplication Methods*, made collision-resistant).
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct ContentId(pub [u8; 16]);

impl ContentId {
    fn cut(hash: &[u8; 32]) -> ContentId {
        let mut id = [0; 16];
        id.copy_from_slice(&hash[..16]);
        ContentId(id)
    }

    /// The first 64 bits, as the lookup key of hash tables; the full id decides.
    pub fn lookup_key(&self) -> u64 {
        let [a, b, c, d, e, f, g, h, ..] = self.0;
        u64::from_le_bytes([a, b, c, d, e, f, g, h])
    }
}

impl fmt::Debug for ContentId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

/// Whether a page holds nothing but zeros.
pub fn is_zero(page: &[u8]) -> bool {
    page == ZERO_PAGE
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn many_ids_are_those_of_one_at_a_time() {
        let key = ContentKey::new([7; 32]);
        // Two groups that are hashed side by side, and a rest.
        let mut pages = [ZERO_PAGE; 35];
        pages
            .iter_mut()
            .zip(0..)
            .for_each(|(page, n)| page[usize::from(n) * 100] = n);
        let expected: Vec<_> = pages.iter().map(|page| key.id(page)).collect();
        assert_eq!(key.ids(&pages), expected);
        assert!(key.ids([]).is_empty());
    }
}
