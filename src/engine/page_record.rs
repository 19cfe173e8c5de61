//! One PAGE_DATA record as it came from xl.
use std::ops::Range;

use crate::page::{PAGE_SIZE, Pfn};
use crate::stream::{PageData, PageType, StreamError};

pub(super) struct PageRecord {
    pub body: Vec<u8>,
    /// Where its pages start in `body`.
    pages_at: usize,
    pub entries: Vec<u64>,
    /// Each entry's page number, type, and the index of its page among the record's pages.
    pub list: Vec<(Pfn, PageType, Option<usize>)>,
    pub reserved: u32,
    /// The pass of xl's that it belongs to, from 1 on.
    pub pass: u32,
}

impl PageRecord {
    pub fn parse(body: Vec<u8>, offset: u64) -> Result<PageRecord, StreamError> {
        let data = PageData::parse(&body, offset)?;
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
        let pages_at = body.len() - data.pages().len();
        Ok(PageRecord {
            body,
            pages_at,
            entries,
            list,
            reserved,
            pass: 0,
        })
    }

    /// The record without the entries, and their pages, for which `keep` has no `true`. It may become empty, which no record
    /// of Xen's is.
    pub fn retain(mut self, keep: &[bool]) -> Result<PageRecord, StreamError> {
        let kept = |at: usize| keep.get(at) == Some(&true);
        let list: Vec<(usize, Option<usize>)> = (0..)
            .zip(&self.list)
            .filter(|(at, _)| kept(*at))
            .map(|(at, entry)| (at, entry.2))
            .collect();
        if list.is_empty() {
            self.entries.clear();
            self.list.clear();
            self.body.truncate(self.pages_at.min(8));
            self.pages_at = self.body.len();
            return Ok(self);
        }
        // What stays moves towards the front only, so nothing is overwritten before it has been moved.
        let (count, _) = self.body.split_at_mut(4);
        count.copy_from_slice(&(list.len() as u32).to_le_bytes());
        let mut end = 8;
        for (at, _) in &list {
            let from = 8 + at * 8;
            self.body.copy_within(from..from + 8, end);
            end += 8;
        }
        for page in list.iter().filter_map(|(_, index)| *index) {
            let from = self.pages_at + page * PAGE_SIZE;
            self.body.copy_within(from..from + PAGE_SIZE, end);
            end += PAGE_SIZE;
        }
        self.body.truncate(end);
        let pass = self.pass;
        Ok(PageRecord {
            pass,
            ..PageRecord::parse(self.body, 0)?
        })
    }

    /// Its memory, empty.
    pub fn into_buffer(mut self) -> Vec<u8> {
        self.body.clear();
        self.body
    }

    /// The bytes of pages `range`, empty outside the record.
    pub fn pages(&self, range: Range<usize>) -> &[u8] {
        let at = |page: usize| self.pages_at + page * PAGE_SIZE;
        self.body.get(at(range.start)..at(range.end)).unwrap_or_default()
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
        (self.body.len() - self.pages_at) / PAGE_SIZE
    }
}
