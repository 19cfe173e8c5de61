//! One PAGE_DATA record as it came from xl.
use std::ops::Range;

use super::behind::Fate;
use crate::page::{PAGE_SIZE, Pfn};
use crate::stream::{PageData, PageType, StreamError};

/// Where an entry has its page's type.
const TYPE_MASK: u64 = 0xf << 60;

pub(super) struct PageRecord {
    /// The body, and behind its length what stood in the buffer before.
    buffer: Vec<u8>,
    length: usize,
    /// Where its pages start in the body.
    pages_at: usize,
    pub entries: Vec<u64>,
    /// Each entry's page number, type, and the index of its page among the record's pages.
    pub list: Vec<(Pfn, PageType, Option<usize>)>,
    pub reserved: u32,
}

impl PageRecord {
    /// The record whose body are the first `length` bytes of the buffer.
    pub fn parse(buffer: Vec<u8>, length: usize, offset: u64) -> Result<PageRecord, StreamError> {
        let data = PageData::parse(buffer.get(..length).unwrap_or_default(), offset)?;
        let entries = data.raw_entries().collect();
        let reserved = data.reserved();
        let mut pages = 0..;
        let list = data
            .entries()
            .map(|entry| {
                (
                    entry.pfn,
                    entry.page_type,
                    entry.has_data.then(|| pages.next()).flatten(),
                )
            })
            .collect();
        let pages_at = length - data.pages().len();
        Ok(PageRecord {
            buffer,
            length,
            pages_at,
            entries,
            list,
            reserved,
        })
    }

    /// The record without the entries that are held, and their pages; those that stay behind become entries of type XALLOC.
    /// It may become empty, which no record of Xen's is.
    pub fn retain(mut self, fates: &[Fate]) -> Result<PageRecord, StreamError> {
        let fate = |at: usize| fates.get(at).copied().unwrap_or(Fate::Hold);
        let list: Vec<(usize, Option<usize>)> = (0..)
            .zip(&self.list)
            .filter(|(at, _)| fate(*at) != Fate::Hold)
            .map(|(at, entry)| (at, entry.2.filter(|_| fate(at) == Fate::Carry)))
            .collect();
        if list.is_empty() {
            return Ok(PageRecord {
                length: 0,
                pages_at: 0,
                entries: Vec::new(),
                list: Vec::new(),
                ..self
            });
        }
        // What stays moves towards the front only, so nothing is overwritten before it has been moved.
        let (count, _) = self.buffer.split_at_mut(4);
        count.copy_from_slice(&(list.len() as u32).to_le_bytes());
        let mut end = 8;
        for (at, _) in &list {
            let from = 8 + at * 8;
            self.buffer.copy_within(from..from + 8, end);
            if fate(*at) == Fate::Behind
                && let Some(word) = self.buffer.get_mut(end..).and_then(<[u8]>::first_chunk_mut::<8>)
            {
                let entry = u64::from_le_bytes(*word) & !TYPE_MASK | PageType::XAlloc.bits();
                *word = entry.to_le_bytes();
            }
            end += 8;
        }
        for page in list.iter().filter_map(|(_, index)| *index) {
            let from = self.pages_at + page * PAGE_SIZE;
            self.buffer.copy_within(from..from + PAGE_SIZE, end);
            end += PAGE_SIZE;
        }
        PageRecord::parse(self.buffer, end, 0)
    }

    /// Its memory, with what is in it.
    pub fn into_buffer(self) -> Vec<u8> {
        self.buffer
    }

    /// Bytes of the body.
    pub fn length(&self) -> usize {
        self.length
    }

    /// The bytes of pages `range`, empty outside the record.
    pub fn pages(&self, range: Range<usize>) -> &[u8] {
        let at = |page: usize| self.pages_at + page * PAGE_SIZE;
        let body = self.buffer.get(..self.length).unwrap_or_default();
        body.get(at(range.start)..at(range.end)).unwrap_or_default()
    }

    /// The bytes of the pages with these indices, one behind the other.
    pub fn gather(&self, indices: impl IntoIterator<Item = usize>) -> Vec<u8> {
        let mut bytes = Vec::new();
        for index in indices {
            bytes.extend_from_slice(self.pages(index..index + 1));
        }
        bytes
    }

    pub fn page_count(&self) -> usize {
        (self.length - self.pages_at) / PAGE_SIZE
    }
}
