//! PAGE_DATA: u32 count, u32 reserved, `count` × u64 (type, reserved bits, pfn), then the pages that have data, in order.
//!
//! These are views: nothing is copied or allocated, and the record's bytes stay what they were, reserved bits included.
use super::error::{Part, StreamError};
use super::record::{Layer, le32, le64, libxc};
use crate::page::{PAGE_SIZE, Pfn};

/// Bits 63–60 of an entry, `XEN_DOMCTL_PFINFO_*`. A pinned page table is its own type.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[repr(u8)]
pub enum PageType {
    /// A plain page, the only one whose bytes may be referred to.
    NoTab = 0x0,
    L1Tab = 0x1,
    L2Tab = 0x2,
    L3Tab = 0x3,
    L4Tab = 0x4,
    L1TabPin = 0x9,
    L2TabPin = 0xa,
    L3TabPin = 0xb,
    L4TabPin = 0xc,
    /// Broken page, no data.
    Broken = 0xd,
    /// Allocate only, no data.
    XAlloc = 0xe,
    /// Not there (any more), no data.
    XTab = 0xf,
}

impl PageType {
    /// The type with this number, `None` for those that the specification reserves (5–8).
    pub fn new(raw: u8) -> Option<PageType> {
        Some(match raw {
            0x0 => PageType::NoTab,
            0x1 => PageType::L1Tab,
            0x2 => PageType::L2Tab,
            0x3 => PageType::L3Tab,
            0x4 => PageType::L4Tab,
            0x9 => PageType::L1TabPin,
            0xa => PageType::L2TabPin,
            0xb => PageType::L3TabPin,
            0xc => PageType::L4TabPin,
            0xd => PageType::Broken,
            0xe => PageType::XAlloc,
            0xf => PageType::XTab,
            _ => return None,
        })
    }

    /// The type's number.
    pub fn raw(self) -> u8 {
        self as u8
    }

    /// The type as an entry has it, in bits 63–60.
    pub fn bits(self) -> u64 {
        u64::from(self.raw()) << 60
    }

    /// Whether the record carries 4096 bytes for it.
    pub fn has_data(self) -> bool {
        !matches!(self, PageType::Broken | PageType::XAlloc | PageType::XTab)
    }
}

/// One page of a record.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Entry {
    pub pfn: Pfn,
    pub page_type: PageType,
    /// Whether the record carries 4096 bytes for it.
    pub has_data: bool,
}

/// Number of an entry's bits taken by the pfn (`PAGE_DATA_PFN_MASK`).
const PFN_MASK: u64 = Pfn::MAX.get();

/// Size of what stands before the pfn list.
pub const PAGE_DATA_FIXED_SIZE: usize = 8;

/// The header and pfn list of a PAGE_DATA record, checked against the record's length.
#[derive(Clone, Copy, Debug)]
pub struct PageDataHead<'a> {
    /// Header and list, exactly.
    bytes: &'a [u8],
    count: u32,
    pages: u32,
}

impl<'a> PageDataHead<'a> {
    /// Bytes of header and list, from the body's first 8 bytes. `length` is the record's, `offset` that of its body.
    ///
    /// Errors when there is no pfn, or when the list does not fit into the record: to be asked before room is made.
    pub fn size(fixed: &[u8; PAGE_DATA_FIXED_SIZE], length: u32, offset: u64) -> Result<u32, StreamError> {
        let record = Part::Record(Layer::Libxc, libxc::PAGE_DATA);
        let count = le32(fixed, 0);
        let short = |wanted| StreamError::PageDataShort {
            offset,
            record,
            count,
            wanted,
            length: length.into(),
        };
        if (length as usize) < PAGE_DATA_FIXED_SIZE {
            return Err(short(PAGE_DATA_FIXED_SIZE as u64));
        }
        if count == 0 {
            return Err(StreamError::BadField {
                offset,
                record,
                field: "count",
                expected: "of at least 1",
                found: 0,
            });
        }
        let wanted = PAGE_DATA_FIXED_SIZE as u64 + 8 * u64::from(count);
        match u32::try_from(wanted) {
            Ok(size) if size <= length => Ok(size),
            _ => Err(short(wanted)),
        }
    }

    /// A view of header and list. `body` holds at least these (what follows is not looked at), `length` is that of the
    /// record as its header has it, `offset` that of its body.
    ///
    /// Errors when a page type is reserved, or when header, list and the pages that the list implies are not `length`.
    pub fn parse(body: &'a [u8], length: u32, offset: u64) -> Result<Self, StreamError> {
        let record = Part::Record(Layer::Libxc, libxc::PAGE_DATA);
        let Some(fixed) = body.first_chunk::<{ PAGE_DATA_FIXED_SIZE }>() else {
            let (wanted, length) = (PAGE_DATA_FIXED_SIZE as u64, body.len() as u64);
            return Err(StreamError::PageDataShort {
                offset,
                record,
                count: 0,
                wanted,
                length,
            });
        };
        let size = Self::size(fixed, length, offset)?;
        let count = le32(fixed, 0);
        let Some(bytes) = body.get(..size as usize) else {
            let (wanted, length) = (size.into(), body.len() as u64);
            return Err(StreamError::PageDataShort {
                offset,
                record,
                count,
                wanted,
                length,
            });
        };
        let mut head = PageDataHead { bytes, count, pages: 0 };
        for (index, raw) in (0u32..).zip(head.raw_entries()) {
            let found = (raw >> 60) as u8;
            match PageType::new(found) {
                Some(page_type) => head.pages += u32::from(page_type.has_data()),
                None => {
                    let offset = offset.saturating_add(PAGE_DATA_FIXED_SIZE as u64 + 8 * u64::from(index));
                    return Err(StreamError::PageType {
                        offset,
                        record,
                        index,
                        pfn: raw & PFN_MASK,
                        found,
                    });
                }
            }
        }
        let pages = u64::from(head.pages);
        let wanted = u64::from(size) + pages * PAGE_SIZE as u64;
        if wanted != u64::from(length) {
            let length = length.into();
            return Err(StreamError::PageDataLength {
                offset,
                record,
                count,
                pages,
                wanted,
                length,
            });
        }
        Ok(head)
    }

    /// Number of entries.
    pub fn count(&self) -> usize {
        self.count as usize
    }

    /// Number of entries that have data.
    pub fn pages(&self) -> usize {
        self.pages as usize
    }

    /// Bytes of page data after the list.
    pub fn pages_len(&self) -> usize {
        self.pages() * PAGE_SIZE
    }

    /// The u32 after the count: 0 from Xen, kept as it came.
    pub fn reserved(&self) -> u32 {
        le32(self.bytes, 4)
    }

    /// Entries as the record has them, reserved bits included.
    pub fn raw_entries(&self) -> impl ExactSizeIterator<Item = u64> + Clone + use<'a> {
        let list = self.bytes.get(PAGE_DATA_FIXED_SIZE..).unwrap_or_default();
        list.chunks_exact(8).map(|raw| le64(raw, 0))
    }

    /// Entry `index`, `None` from [`count`](Self::count) on.
    pub fn entry(&self, index: usize) -> Option<Entry> {
        if index >= self.count() {
            return None;
        }
        Some(entry(le64(self.bytes, PAGE_DATA_FIXED_SIZE + 8 * index)))
    }

    pub fn entries(&self) -> impl ExactSizeIterator<Item = Entry> + Clone + use<'a> {
        self.raw_entries().map(entry)
    }

    /// Header and list as the stream has them.
    pub fn as_bytes(&self) -> &'a [u8] {
        self.bytes
    }
}

/// Only for entries whose type has been checked; a reserved one would read as XTAB.
fn entry(raw: u64) -> Entry {
    let page_type = PageType::new((raw >> 60) as u8).unwrap_or(PageType::XTab);
    let pfn = Pfn::new(raw & PFN_MASK).unwrap_or_default();
    Entry {
        pfn,
        page_type,
        has_data: page_type.has_data(),
    }
}

/// A whole PAGE_DATA body.
#[derive(Clone, Copy, Debug)]
pub struct PageData<'a> {
    head: PageDataHead<'a>,
    pages: &'a [u8],
}

impl<'a> PageData<'a> {
    /// A view of a whole body (a valid one needs no padding); `offset` is where it starts.
    pub fn parse(body: &'a [u8], offset: u64) -> Result<Self, StreamError> {
        let Ok(length) = u32::try_from(body.len()) else {
            let record = Part::Record(Layer::Libxc, libxc::PAGE_DATA);
            let (length, cap) = (body.len() as u64, super::record::LIBXC_BODY_MAX.into());
            return Err(StreamError::TooLong {
                offset,
                record,
                length,
                cap,
            });
        };
        let head = PageDataHead::parse(body, length, offset)?;
        let pages = body.get(head.bytes.len()..).unwrap_or_default();
        Ok(PageData { head, pages })
    }

    /// Header and list alone.
    pub fn head(&self) -> &PageDataHead<'a> {
        &self.head
    }

    /// Number of entries.
    pub fn count(&self) -> usize {
        self.head.count()
    }

    /// Entry `index`, `None` from [`count`](Self::count) on.
    pub fn entry(&self, index: usize) -> Option<Entry> {
        self.head.entry(index)
    }

    pub fn entries(&self) -> impl ExactSizeIterator<Item = Entry> + Clone + use<'a> {
        self.head.entries()
    }

    /// Entries as the record has them, reserved bits included.
    pub fn raw_entries(&self) -> impl ExactSizeIterator<Item = u64> + Clone + use<'a> {
        self.head.raw_entries()
    }

    /// The u32 after the count: 0 from Xen, kept as it came.
    pub fn reserved(&self) -> u32 {
        self.head.reserved()
    }

    /// The bytes of all pages that have data, in the order of their entries.
    pub fn pages(&self) -> &'a [u8] {
        self.pages
    }

    /// Each entry with its page, where it has one.
    pub fn entries_with_pages(&self) -> impl Iterator<Item = (Entry, Option<&'a [u8]>)> + use<'a> {
        let mut pages = self.pages.chunks_exact(PAGE_SIZE);
        self.entries()
            .map(move |entry| (entry, if entry.has_data { pages.next() } else { None }))
    }
}
