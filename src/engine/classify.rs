//! What each page is: zero, a repeat, a content that the destination holds, a little different from one, or new.
use std::ops::Range;
use std::sync::Arc;
use std::time::Instant;

use crossbeam_channel::{Receiver, Sender};
use parking_lot::Mutex;

use super::contents::{Holdings, Rewritten, read_checked};
use super::digest::{ABSENT, Digest};
use super::page_record::PageRecord;
use super::pool::{Pending, Pool, Tools};
use super::rebuilt::Window;
use super::{Contents, EngineError};
use crate::codec::block::BLOCK_PAGES;
use crate::codec::{Base, Level, Row, rows};
use crate::page::{ContentId, ContentKey, PAGE_SIZE, Pfn};
use crate::policy::LevelPolicy;
use crate::report::Pages;
use crate::stream::{GuestType, PageType};
use crate::table::PageTable;
use crate::wire::{End, Kind};

/// zstd's level for deltas where the link asks for none.
const DELTA_LEVEL: i32 = 1;

/// Page contents: `None` for zero pages.
pub(super) type Ids = Vec<Option<ContentId>>;

/// From the front to the classifier.
pub(super) enum Read1 {
    Bytes(Vec<u8>),
    Guest(GuestType),
    Pages {
        record: Arc<PageRecord>,
        ids: Vec<Pending<Ids>>,
    },
    /// A PAGE_DATA record too large for rows follows as bytes.
    Forget,
    /// Pages that follow are only compared by Xen, not written.
    Verify,
    End([u8; 8]),
}

/// From the classifier to the back.
pub(super) enum Ready {
    Bytes(Vec<u8>),
    Guest(GuestType),
    Rows(ReadyRows),
    Forget,
    End(End),
}

pub(super) struct ReadyRows {
    pub record: Arc<PageRecord>,
    pub frozen: bool,
    pub rows: Vec<u8>,
    /// Those of full pages, then those of deltas.
    pub blocks: Vec<Pending<ReadyBlock>>,
    pub pages: Pages,
    pub first: Option<Pfn>,
    pub last: Option<Pfn>,
}

pub(super) struct ReadyBlock {
    /// The codec's number on the wire, and its name for the figures.
    pub codec: u8,
    pub name: String,
    pub pages: usize,
    pub data: BlockData,
}

pub(super) enum BlockData {
    Own(Vec<u8>),
    /// Pages of the record, in a row.
    Record(Range<usize>),
}

/// The bytes that a delta is made against.
enum BaseBytes {
    Page(Box<[u8]>),
    Content(ContentId),
}

/// What a classifier is made from.
pub(super) struct Classifying {
    pub table: PageTable,
    pub window_rows: u32,
    pub frames: bool,
    pub key: ContentKey,
    pub pool: Pool,
    pub policy: Arc<Mutex<LevelPolicy>>,
    pub holdings: Option<Arc<Holdings>>,
    pub contents: Option<Arc<dyn Contents>>,
}

pub(super) struct Classifier {
    table: PageTable,
    /// Pages that the destination still has in memory: all that may be referred to where frames cannot be read.
    window: Window,
    frames: bool,
    guest_type: GuestType,
    frozen: bool,
    digest: Digest,
    key: ContentKey,
    zero: ContentId,
    pool: Pool,
    policy: Arc<Mutex<LevelPolicy>>,
    holdings: Option<Arc<Holdings>>,
    contents: Option<Arc<dyn Contents>>,
    rewritten: Rewritten,
    /// Rows frames so far.
    records: u64,
}

impl Classifier {
    pub fn new(parts: Classifying) -> Classifier {
        let Classifying {
            table,
            window_rows,
            frames,
            key,
            pool,
            policy,
            holdings,
            contents,
        } = parts;
        Classifier {
            table,
            window: Window::new(window_rows),
            frames,
            guest_type: GuestType::Hvm,
            frozen: false,
            digest: Digest::default(),
            zero: key.id(&crate::page::ZERO_PAGE),
            key,
            pool,
            policy,
            holdings,
            contents,
            rewritten: Rewritten::default(),
            records: 0,
        }
    }

    pub fn run(mut self, input: Receiver<Read1>, next: Sender<Ready>) -> Result<(PageTable, GuestType), EngineError> {
        for item in input {
            let ready = match item {
                Read1::Bytes(bytes) => {
                    self.digest.bytes(Kind::Bytes, &bytes);
                    Ready::Bytes(bytes)
                }
                Read1::Guest(guest_type) => {
                    self.guest_type = guest_type;
                    Ready::Guest(guest_type)
                }
                Read1::Verify => {
                    self.frozen = true;
                    continue;
                }
                Read1::Forget => {
                    self.table.clear();
                    self.window.clear();
                    Ready::Forget
                }
                Read1::Pages { record, ids } => self.pages(record, ids)?,
                Read1::End(record) => {
                    self.digest.bytes(Kind::End, &record);
                    let (digest, rows) = (self.digest.finish(), self.digest.rows());
                    Ready::End(End { digest, rows, record })
                }
            };
            next.send(ready).map_err(|_| EngineError::WorkerLost)?;
        }
        Ok((self.table, self.guest_type))
    }

    fn pages(&mut self, record: Arc<PageRecord>, pending: Vec<Pending<Ids>>) -> Result<Ready, EngineError> {
        let mut contents = Vec::with_capacity(record.page_count());
        for part in pending {
            contents.extend(part.wait()?);
        }
        let held = self.holdings.as_ref().map(|holdings| holdings.contain(&contents));
        let held = held.unwrap_or_default();
        let mut kinds = Vec::with_capacity(record.list.len());
        let mut ids = Vec::with_capacity(record.list.len());
        let (mut full, mut deltas) = (Vec::new(), Vec::new());
        let mut pages = Pages::default();
        let mut again = Vec::new();
        let mut highest = None;
        for (pfn, page_type, index) in &record.list {
            let (row, id) = match index {
                None => (Row::Absent, ABSENT),
                Some(index) => match contents.get(*index).copied().flatten() {
                    None => (Row::Zero, self.zero),
                    Some(id) => {
                        let held = held.get(*index) == Some(&true);
                        // Xen's records ascend. A page that stands in the record already has no base before it.
                        let first = Some(*pfn) > highest;
                        let (row, base) = self.classify(*pfn, *page_type, id, held, first);
                        match base {
                            Some(base) => deltas.push((*index, base)),
                            None if row == Row::Full => full.push(*index),
                            None => {}
                        }
                        if self.table.id(*pfn).is_some_and(|old| old != id) {
                            again.push((*pfn, id, *index));
                        }
                        (row, id)
                    }
                },
            };
            pages.add(&row);
            highest = highest.max(Some(*pfn));
            self.enter(*pfn, *page_type, row, id)?;
            kinds.push(row);
            ids.push(id);
        }
        if self.holdings.is_some() && !self.frozen {
            for (pfn, id, index) in again {
                self.rewritten.insert(pfn, id, record.pages(index..index + 1));
            }
        }
        self.digest.record(record.reserved, &record.entries, &ids);
        self.keep(&record, &contents);
        if let Some(holdings) = &self.holdings
            && kinds.iter().any(Row::names_content)
        {
            holdings.retain(self.records, record.clone());
        }
        self.records += 1;
        let mut encoded = Vec::new();
        rows::encode(&record.entries, &kinds, &mut encoded);
        let mut blocks = self.compress(&record, &full);
        blocks.extend(self.compress_deltas(&record, deltas));
        let (first, last) = (
            record.list.first().map(|entry| entry.0),
            record.list.last().map(|entry| entry.0),
        );
        Ok(Ready::Rows(ReadyRows {
            record,
            frozen: self.frozen,
            rows: encoded,
            blocks,
            pages,
            first,
            last,
        }))
    }

    /// What a page that is not zero is; for a delta also the bytes that it is made against.
    fn classify(
        &self,
        pfn: Pfn,
        page_type: PageType,
        id: ContentId,
        held: bool,
        first: bool,
    ) -> (Row, Option<BaseBytes>) {
        if page_type != PageType::NoTab {
            return (Row::Full, None);
        }
        match self.table.holder(&id) {
            Some(holder) if self.has(holder) => return (Row::Reference(holder), None),
            _ if held => return (Row::Known(id), None),
            _ => {}
        }
        let Some(holdings) = &self.holdings else {
            return (Row::Full, None);
        };
        let before = self.table.id(pfn).filter(|_| first && self.has(pfn));
        if let Some(page) = before.and_then(|before| self.rewritten.get(pfn, before)) {
            return (Row::Delta(Base::Page), Some(BaseBytes::Page(page.into())));
        }
        let last_seen = self.contents.as_ref().and_then(|contents| contents.last_seen(pfn));
        match last_seen.filter(|base| holdings.contain(&[Some(*base)]) == [true]) {
            Some(base) => (Row::Delta(Base::Content(base)), Some(BaseBytes::Content(base))),
            None => (Row::Full, None),
        }
    }

    /// Whether the destination can find what a page holds that has a row.
    fn has(&self, pfn: Pfn) -> bool {
        self.reads_frames() || self.window.contains(pfn)
    }

    /// Frames are found by page number, which only HVM and PVH guests allow.
    fn reads_frames(&self) -> bool {
        self.frames && self.guest_type == GuestType::Hvm
    }

    fn enter(&mut self, pfn: Pfn, page_type: PageType, row: Row, id: ContentId) -> Result<(), EngineError> {
        if self.frozen {
            return Ok(());
        }
        let plain = row != Row::Absent && page_type == PageType::NoTab;
        if plain {
            self.table.set(pfn, id)?;
        } else {
            self.table.remove(pfn);
        }
        if !self.reads_frames() {
            self.window.insert(pfn, plain);
        }
        Ok(())
    }

    /// Offers the record's contents to the store.
    fn keep(&self, record: &PageRecord, ids: &Ids) {
        let Some(contents) = &self.contents else { return };
        let plain = record.list.iter().filter(|entry| entry.1 == PageType::NoTab);
        let pages: Vec<(ContentId, &[u8])> = plain
            .filter_map(|(_, _, index)| {
                let index = (*index)?;
                Some((ids.get(index).copied().flatten()?, record.pages(index..index + 1)))
            })
            .collect();
        contents.keep(&pages);
    }

    /// Splits the full pages into blocks of about [`BLOCK_PAGES`] and hands each to a worker.
    fn compress(&mut self, record: &Arc<PageRecord>, full: &[usize]) -> Vec<Pending<ReadyBlock>> {
        full.chunks(block_pages(full.len()))
            .map(|indices| {
                let level = self.policy.lock().choose();
                let (record, indices, policy) = (record.clone(), indices.to_vec(), self.policy.clone());
                self.pool
                    .run(move |tools| compress_block(tools, &record, &indices, level, &policy))
            })
            .collect()
    }

    /// The same for pages that are sent as deltas. A block whose bases cannot be read is sent in full.
    fn compress_deltas(
        &mut self,
        record: &Arc<PageRecord>,
        deltas: Vec<(usize, BaseBytes)>,
    ) -> Vec<Pending<ReadyBlock>> {
        let each = block_pages(deltas.len());
        let mut deltas = deltas.into_iter();
        let mut blocks = Vec::new();
        loop {
            let (indices, bases): (Vec<usize>, Vec<BaseBytes>) = deltas.by_ref().take(each).unzip();
            if indices.is_empty() {
                return blocks;
            }
            let level = self.policy.lock().choose();
            let (record, policy) = (record.clone(), self.policy.clone());
            let (contents, key) = (self.contents.clone(), self.key.clone());
            blocks.push(self.pool.run(move |tools| {
                let delta = gather_bases(bases, contents.as_deref(), &key).and_then(|bases| {
                    let pages = record.gather(indices.iter().copied());
                    let level = if let Level::Zstd(level) = level {
                        level
                    } else {
                        DELTA_LEVEL
                    };
                    tools.compressor.delta(&pages, &bases, level)
                });
                match delta {
                    Some((codec, block)) => ReadyBlock {
                        codec,
                        name: "delta".into(),
                        pages: indices.len(),
                        data: BlockData::Own(block),
                    },
                    None => compress_block(tools, &record, &indices, level, &policy),
                }
            }));
        }
    }
}

/// Pages of each block when `count` are split evenly.
fn block_pages(count: usize) -> usize {
    count.div_ceil(count.div_ceil(BLOCK_PAGES).max(1)).max(1)
}

/// Bases one behind the other. `None`: one of them is not there any more.
fn gather_bases(bases: Vec<BaseBytes>, contents: Option<&dyn Contents>, key: &ContentKey) -> Option<Vec<u8>> {
    let ids: Vec<ContentId> = bases
        .iter()
        .filter_map(|base| match base {
            BaseBytes::Content(id) => Some(*id),
            BaseBytes::Page(_) => None,
        })
        .collect();
    let read = match contents {
        Some(contents) if !ids.is_empty() => {
            let (pages, right) = read_checked(contents, key, &ids);
            right.iter().all(|right| *right).then_some(pages)?
        }
        _ => Vec::new(),
    };
    let mut read = read.chunks_exact(PAGE_SIZE);
    let mut gathered = Vec::with_capacity(bases.len() * PAGE_SIZE);
    for base in &bases {
        match base {
            BaseBytes::Page(page) => gathered.extend_from_slice(page),
            BaseBytes::Content(_) => gathered.extend_from_slice(read.next()?),
        }
    }
    Some(gathered)
}

fn compress_block(
    tools: &mut Tools,
    record: &PageRecord,
    indices: &[usize],
    level: Level,
    policy: &Mutex<LevelPolicy>,
) -> ReadyBlock {
    // Pages that stand in a row need not be copied together.
    let source = match (indices.first(), indices.last()) {
        (Some(&first), Some(&last)) if last - first + 1 == indices.len() => BlockData::Record(first..last + 1),
        _ => BlockData::Own(record.gather(indices.iter().copied())),
    };
    let bytes = match &source {
        BlockData::Own(bytes) => bytes,
        BlockData::Record(range) => record.pages(range.clone()),
    };
    let start = Instant::now();
    let packed = tools.compressor.compress(level, bytes);
    let output = packed.as_ref().map_or(bytes.len(), Vec::len);
    policy.lock().compressed(level, bytes.len(), output, start.elapsed());
    let (level, data) = match packed {
        Some(packed) => (level, BlockData::Own(packed)),
        None => (Level::Raw, source),
    };
    let name = match level {
        Level::Raw => "raw".to_owned(),
        Level::Lz4 => "lz4".to_owned(),
        Level::Zstd(level) => format!("zstd-{level}"),
    };
    ReadyBlock {
        codec: level.wire(),
        name,
        pages: indices.len(),
        data,
    }
}
