//! What each page is: zero, a repeat, a content that the destination holds, a little different from one, or new.
use std::ops::Range;
use std::sync::Arc;

use crossbeam_channel::{Receiver, Sender};
use parking_lot::Mutex;

use super::contents::{Holdings, Rewritten};
use super::cpu::thread_cpu;
use super::digest::{ABSENT, Digest};
use super::hashing::Ids;
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

/// And the strongest: what differences leave is mostly zeros, or bytes that no level makes smaller.
const DELTA_LEVEL_MAX: i32 = 3;

/// From the front to the classifier.
pub(super) enum FromXl {
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

/// A page that may go as a difference.
struct Candidate {
    /// Its place in the record's list, and the index of its page.
    at: usize,
    index: usize,
    base: Base,
    /// What it is made against, once that is known: a page of some that were read together.
    bytes: Option<(Arc<Vec<u8>>, usize)>,
}

/// Bases that a worker reads in one go.
const READ_PAGES: usize = 128;

/// Words of 8 bytes in a page that must be those of its base, 1 of so many: below that the difference is no smaller.
const SIMILAR: usize = 8;

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

    pub fn run(mut self, input: Receiver<FromXl>, next: Sender<Ready>) -> Result<(PageTable, GuestType), EngineError> {
        for item in input {
            let ready = match item {
                FromXl::Bytes(bytes) => {
                    self.digest.bytes(Kind::Bytes, &bytes);
                    Ready::Bytes(bytes)
                }
                FromXl::Guest(guest_type) => {
                    self.guest_type = guest_type;
                    Ready::Guest(guest_type)
                }
                FromXl::Verify => {
                    self.frozen = true;
                    continue;
                }
                FromXl::Forget => {
                    self.table.clear();
                    self.window.clear();
                    Ready::Forget
                }
                FromXl::Pages { record, ids } => self.pages(record, ids)?,
                FromXl::End(record) => {
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
        let mut candidates = Vec::new();
        let mut again = Vec::new();
        let mut highest = None;
        for (at, (pfn, page_type, index)) in record.list.iter().enumerate() {
            let content = index.and_then(|index| contents.get(index).copied().flatten().map(|id| (index, id)));
            let (row, id) = match (index, content) {
                (None, _) => (Row::Absent, ABSENT),
                (_, None) => (Row::Zero, self.zero),
                (_, Some((index, id))) => {
                    let row = self.classify(*page_type, id, held.get(index) == Some(&true));
                    if row == Row::Full && *page_type == PageType::NoTab {
                        // Xen's records ascend. A page that stands in the record already has no base before it.
                        candidates.extend(self.candidate(*pfn, at, index, Some(*pfn) > highest));
                    }
                    if self.table.id(*pfn).is_some_and(|old| old != id) {
                        again.push((*pfn, id, index));
                    }
                    (row, id)
                }
            };
            highest = highest.max(Some(*pfn));
            self.enter(*pfn, *page_type, row, id)?;
            kinds.push(row);
            ids.push(id);
        }
        let deltas = self.similar(&record, candidates)?;
        for delta in &deltas {
            if let Some(kind) = kinds.get_mut(delta.at) {
                *kind = Row::Delta(delta.base);
            }
        }
        let mut pages = Pages::default();
        kinds.iter().for_each(|row| pages.add(row));
        let full: Vec<usize> = record
            .list
            .iter()
            .zip(&kinds)
            .filter(|(_, row)| **row == Row::Full)
            .filter_map(|(entry, _)| entry.2)
            .collect();
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
        Ok(Ready::Rows(ReadyRows {
            record,
            frozen: self.frozen,
            rows: encoded,
            blocks,
            pages,
        }))
    }

    /// What a page that is not zero is, as long as nothing is known of differences.
    fn classify(&self, page_type: PageType, id: ContentId, held: bool) -> Row {
        if page_type != PageType::NoTab {
            return Row::Full;
        }
        match self.table.holder(&id) {
            Some(holder) if self.has(holder) => Row::Reference(holder),
            _ if held => Row::Known(id),
            _ => Row::Full,
        }
    }

    /// What both ends have that the page may be close to. `first`: it is the page's first row in its record.
    fn candidate(&self, pfn: Pfn, at: usize, index: usize, first: bool) -> Option<Candidate> {
        let holdings = self.holdings.as_ref()?;
        let before = self.table.id(pfn).filter(|_| first && self.has(pfn));
        if let Some(page) = before.and_then(|before| self.rewritten.get(pfn, before)) {
            return Some(Candidate {
                at,
                index,
                base: Base::Page,
                bytes: Some((Arc::new(page.to_vec()), 0)),
            });
        }
        let base = self.contents.as_ref()?.last_seen(pfn)?;
        (holdings.contain(&[Some(base)]) == [true]).then_some(Candidate {
            at,
            index,
            base: Base::Content(base),
            bytes: None,
        })
    }

    /// Reads the bases that are not here yet, and keeps the pages that are close enough to theirs.
    fn similar(&self, record: &Arc<PageRecord>, mut candidates: Vec<Candidate>) -> Result<Vec<Candidate>, EngineError> {
        candidates.retain(|candidate| match candidate.base() {
            Some(base) => is_similar(record.pages(candidate.index..candidate.index + 1), base),
            None => self.contents.is_some(),
        });
        let mut reads = Vec::new();
        if let Some(contents) = &self.contents {
            let unread = candidates
                .iter()
                .filter_map(|candidate| Some((candidate.index, candidate.content()?)));
            let wanted: Vec<(usize, ContentId)> = unread.collect();
            for wanted in wanted.chunks(READ_PAGES) {
                let (contents, key, record, wanted) =
                    (contents.clone(), self.key.clone(), record.clone(), wanted.to_vec());
                let read = move |_: &mut Tools| read_similar(contents.as_ref(), &key, &record, &wanted);
                reads.push(self.pool.run(read));
            }
        }
        let mut unread = candidates.iter_mut().filter(|candidate| candidate.bytes.is_none());
        for read in reads {
            let (pages, right) = read.wait()?;
            let pages = Arc::new(pages);
            for (at, right) in right.into_iter().enumerate() {
                if let (Some(candidate), true) = (unread.next(), right) {
                    candidate.bytes = Some((pages.clone(), at * PAGE_SIZE));
                }
            }
        }
        candidates.retain(|candidate| candidate.bytes.is_some());
        Ok(candidates)
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

    /// The same for pages that are sent as differences.
    fn compress_deltas(&mut self, record: &Arc<PageRecord>, deltas: Vec<Candidate>) -> Vec<Pending<ReadyBlock>> {
        let each = block_pages(deltas.len());
        let mut deltas = deltas.into_iter();
        let mut blocks = Vec::new();
        loop {
            let part: Vec<Candidate> = deltas.by_ref().take(each).collect();
            if part.is_empty() {
                return blocks;
            }
            let level = self.policy.lock().choose();
            let (record, policy) = (record.clone(), self.policy.clone());
            blocks.push(self.pool.run(move |tools| {
                let indices: Vec<usize> = part.iter().map(|delta| delta.index).collect();
                let pages = record.gather(indices.iter().copied());
                let mut bases = Vec::with_capacity(pages.len());
                part.iter()
                    .filter_map(Candidate::base)
                    .for_each(|base| bases.extend_from_slice(base));
                let strength = if let Level::Zstd(level) = level {
                    level.min(DELTA_LEVEL_MAX)
                } else {
                    DELTA_LEVEL
                };
                match tools.compressor.delta(&pages, &bases, strength) {
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

impl Candidate {
    fn content(&self) -> Option<ContentId> {
        match self.base {
            Base::Content(id) => Some(id),
            Base::Page => None,
        }
    }

    fn base(&self) -> Option<&[u8]> {
        let (pages, at) = self.bytes.as_ref()?;
        pages.get(*at..at + PAGE_SIZE)
    }
}

/// Whether a difference of the page to its base would be smaller than the page.
fn is_similar(page: &[u8], base: &[u8]) -> bool {
    let words = page.as_chunks::<8>().0.iter().zip(base.as_chunks::<8>().0);
    words.filter(|(new, old)| new == old).count() * SIMILAR >= PAGE_SIZE / 8
}

/// Reads the contents that pages of the record may be made against: one behind the other, and which of them are similar
/// and what their ids say. Only the similar ones are hashed.
fn read_similar(
    contents: &dyn Contents,
    key: &ContentKey,
    record: &PageRecord,
    wanted: &[(usize, ContentId)],
) -> (Vec<u8>, Vec<bool>) {
    let ids: Vec<ContentId> = wanted.iter().map(|(_, id)| *id).collect();
    let mut pages = vec![0; ids.len() * PAGE_SIZE];
    let mut right = contents.read(&ids, &mut pages);
    right.resize(ids.len(), false);
    let (bases, _) = pages.as_chunks::<PAGE_SIZE>();
    for ((right, base), (index, _)) in right.iter_mut().zip(bases).zip(wanted) {
        *right = *right && is_similar(record.pages(*index..*index + 1), base);
    }
    let similar = bases.iter().zip(&right).filter(|(_, similar)| **similar);
    let mut read = key.ids(similar.map(|(base, _)| base)).into_iter();
    for (right, id) in right.iter_mut().zip(&ids).filter(|(right, _)| **right) {
        *right = read.next().as_ref() == Some(id);
    }
    (pages, right)
}

/// Pages of each block when `count` are split evenly.
fn block_pages(count: usize) -> usize {
    count.div_ceil(count.div_ceil(BLOCK_PAGES).max(1)).max(1)
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
    let start = thread_cpu();
    let packed = tools.compressor.compress(level, bytes);
    let cpu = thread_cpu().saturating_sub(start);
    let output = packed.as_ref().map_or(bytes.len(), Vec::len);
    policy.lock().compressed(level, bytes.len(), output, cpu);
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
