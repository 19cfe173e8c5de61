//! Records put together: full pages, contents, deltas, and last what refers to other pages.
use std::collections::VecDeque;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use crossbeam_channel::{Receiver, Sender, select};
use hashbrown::{HashMap, HashSet};
use parking_lot::Mutex;

use super::decode::{Answer, Answers};
use super::hashing::ids_of;
use super::link::Link;
use super::pool::Pool;
use super::rebuilt::{RebuiltRecord, Recent, Spare};
use super::receiving::{
    Arrived, ArrivedBlock, ArrivedRows, Assembled, AssembledRecord, DeltaBlock, Unread, is_plain, pfn_of,
};
use super::{EngineError, Frames};
use crate::codec::{Base, Decompressor, MAX_ROWS, Row, delta};
use crate::page::{ContentKey, PAGE_SIZE, Pfn};
use crate::page_set::PageSet;
use crate::report::DestinationFigures;
use crate::stream::libxc;
use crate::wire::Kind;

/// How often the pipe to xl is looked at while waiting for a record to be applied.
const POLL: Duration = Duration::from_micros(200);

/// The largest record: header, list and pages.
const RECORD_BYTES: usize = 16 + MAX_ROWS * (8 + PAGE_SIZE);

/// Which records xl's helper has certainly applied. It applies records in order and reads the next one's header only
/// then, so a record is applied when a byte behind its end has been taken out of the pipe.
pub(super) struct Applied {
    pub records: Mutex<Records>,
    /// Bytes written to the pipe.
    pub written: AtomicU64,
    /// The outlet has ended: nothing more will be applied.
    pub closed: AtomicBool,
    unread: Unread,
}

#[derive(Default)]
pub(super) struct Records {
    /// Number of each record that may not be applied yet and its end in the stream, oldest first.
    pub pending: VecDeque<(u64, u64)>,
    newest_applied: Option<u64>,
}

impl Applied {
    pub fn new(unread: Unread) -> Applied {
        Applied {
            records: Mutex::default(),
            written: AtomicU64::new(0),
            closed: AtomicBool::new(false),
            unread,
        }
    }

    /// Waits until record `number` is applied; the time it took.
    pub fn wait(&self, number: u64) -> Result<Duration, EngineError> {
        let start = Instant::now();
        loop {
            // Bytes that are in the pipe but not counted yet make this too small, never too large.
            let written = self.written.load(Ordering::Acquire);
            let unread = (self.unread)().map_err(|error| match self.closed.load(Ordering::Acquire) {
                // The outlet has failed and let go of the pipe, of which xl ended: its error is the cause.
                true => EngineError::WorkerLost,
                false => EngineError::Xl(error),
            })?;
            let consumed = written.saturating_sub(unread);
            let mut records = self.records.lock();
            while let Some((number, _)) = records.pending.front().copied().filter(|(_, end)| *end < consumed) {
                records.newest_applied = Some(number);
                records.pending.pop_front();
            }
            if records.newest_applied >= Some(number) {
                return Ok(start.elapsed());
            }
            drop(records);
            if self.closed.load(Ordering::Acquire) {
                return Err(EngineError::WorkerLost);
            }
            thread::sleep(POLL);
        }
    }
}

/// What an assembler is made from.
pub(super) struct Assembling {
    /// One more than the highest page that may be out of the guest's memory while the stream runs.
    pub out_bound: u64,
    pub frames: Frames,
    pub applied: Arc<Applied>,
    pub pool: Pool,
    pub spare_blocks: Spare,
    pub key: ContentKey,
    pub answers: Answers,
    pub patience: Duration,
    pub link: Option<Link>,
    pub figures: Arc<Mutex<DestinationFigures>>,
}

pub(super) struct Assembler {
    recent: Recent,
    spare: Spare,
    /// Where the decoder has buffers from.
    spare_blocks: Spare,
    frames: Frames,
    /// The guest's frames are found by page number (HVM and PVH).
    frames_by_pfn: bool,
    /// Pages without data, which may be out of the guest's memory: to read one would wait until it comes back.
    out: PageSet,
    applied: Arc<Applied>,
    next_number: u64,
    pool: Pool,
    key: ContentKey,
    decompressor: Decompressor,
    answers: Answers,
    /// How long the source may take to send what is needed.
    patience: Duration,
    link: Option<Link>,
    figures: Arc<Mutex<DestinationFigures>>,
}

/// Where the bytes of a referenced page are.
enum Source {
    /// Earlier in the same record: the index of its page.
    Here(usize),
    Recent,
    Frame,
}

impl Assembler {
    pub fn new(parts: Assembling) -> Assembler {
        let Assembling {
            out_bound,
            frames,
            applied,
            pool,
            spare_blocks,
            key,
            answers,
            patience,
            link,
            figures,
        } = parts;
        Assembler {
            recent: Recent::default(),
            spare: Spare::default(),
            spare_blocks,
            frames,
            frames_by_pfn: false,
            out: PageSet::new(out_bound),
            applied,
            next_number: 0,
            pool,
            key,
            decompressor: Decompressor::default(),
            answers,
            patience,
            link,
            figures,
        }
    }

    pub fn run(
        mut self,
        input: Receiver<Arrived>,
        stopped: Receiver<()>,
        next: Sender<Assembled>,
    ) -> Result<Frames, EngineError> {
        loop {
            let item = select! {
                recv(stopped) -> _ => return Err(EngineError::WorkerLost),
                recv(input) -> item => item,
            };
            let assembled = match item {
                Err(_) => return Ok(self.frames.filter(|_| self.frames_by_pfn)),
                Ok(Arrived::Bytes(bytes)) => Assembled::Bytes(bytes),
                Ok(Arrived::Guest(guest_type)) => {
                    self.frames_by_pfn = guest_type == 2;
                    continue;
                }
                Ok(Arrived::Rows(rows)) => Assembled::Record(self.record(rows, &stopped)?),
                Ok(Arrived::Forget) => {
                    self.recent.clear();
                    Assembled::Forget
                }
                Ok(Arrived::End(end)) => Assembled::End(end),
            };
            next.send(assembled).map_err(|_| EngineError::WorkerLost)?;
        }
    }

    fn record(&mut self, mut arrived: ArrivedRows, stopped: &Receiver<()>) -> Result<AssembledRecord, EngineError> {
        // Of the largest size always, so that any record fits into any buffer.
        let mut bytes = self.spare.take(RECORD_BYTES);
        let (pages_at, pages) = header(&arrived, &mut bytes);
        let (_, out) = bytes.split_at_mut(pages_at);
        let blocks = std::mem::take(&mut arrived.blocks);
        fill_full(&arrived.rows, blocks, &arrived.body, &self.spare_blocks, out)?;
        self.fill_contents(&mut arrived, stopped, out)?;
        let ArrivedRows {
            frozen,
            reserved,
            entries,
            rows,
            ..
        } = arrived;
        // Last, since references may go to any page before them in the record.
        let list = self.resolve(&entries, &rows, frozen, out)?;
        let record = Arc::new(RebuiltRecord {
            number: self.next_number,
            bytes,
            pages_at,
            spare: self.spare.clone(),
        });
        if !frozen {
            self.next_number += 1;
            for (entry, row) in entries.iter().zip(&rows) {
                let pfn = pfn_of(*entry);
                if *row == Row::Absent {
                    self.out.insert(pfn);
                } else {
                    self.out.remove(pfn);
                }
                if *row == Row::Absent || !is_plain(*entry) {
                    self.recent.remove(pfn);
                }
            }
            self.recent.insert(record.clone(), list, entries.len());
        }
        let ids = ids_of(&record, pages, RebuiltRecord::pages, &self.key, &self.pool);
        Ok(AssembledRecord {
            record,
            frozen,
            reserved,
            entries,
            rows,
            ids,
        })
    }

    /// Fills in the pages whose contents lie elsewhere, and those that differ from one that is here. What could not be
    /// found comes from the source: this waits for it.
    fn fill_contents(
        &mut self,
        arrived: &mut ArrivedRows,
        stopped: &Receiver<()>,
        out: &mut [u8],
    ) -> Result<(), EngineError> {
        let places = Places::of(&arrived.rows);
        let mut bases: HashMap<u16, Vec<u8>> = HashMap::new();
        let mut needed: HashSet<u16> = HashSet::new();
        let mut found = 0;
        for lookup in std::mem::take(&mut arrived.lookups) {
            let lookup = lookup.wait()?;
            let pages = lookup.rows.iter().zip(lookup.pages.chunks_exact(PAGE_SIZE));
            for ((row, page), _) in pages.zip(&lookup.right).filter(|(_, right)| **right) {
                found += 1;
                match arrived.rows.get(usize::from(*row)) {
                    Some(Row::Delta(_)) => drop(bases.insert(*row, page.to_vec())),
                    _ => places.put(out, *row, page)?,
                }
            }
            needed.extend(lookup.needed);
        }
        let mut figures = self.figures.lock();
        figures.resolved_from_contents += found;
        figures.needed_pages += needed.len() as u64;
        drop(figures);
        self.page_bases(arrived, &needed, &mut bases)?;
        for block in std::mem::take(&mut arrived.deltas) {
            if !block.rows.iter().any(|row| needed.contains(row)) {
                let pages = self.delta(&block, &arrived.body, &bases)?;
                for (row, page) in block.rows.iter().zip(pages.chunks_exact(PAGE_SIZE)) {
                    places.put(out, *row, page)?;
                }
            }
        }
        let Some(answers) = arrived.answers.take() else {
            return Ok(());
        };
        while !needed.is_empty() {
            let answer: Answer = select! {
                recv(stopped) -> _ => return Err(EngineError::WorkerLost),
                recv(answers) -> answer => answer.map_err(|_| EngineError::WorkerLost)?,
                default(self.patience) => return Err(EngineError::Protocol("pages that were asked for do not come")),
            };
            let pages = self
                .decompressor
                .decompress(answer.codec, &answer.block, answer.rows.len())?;
            for (row, page) in answer.rows.iter().zip(pages.chunks_exact(PAGE_SIZE)) {
                if !needed.remove(row) {
                    return Err(EngineError::Protocol("a page came that was not asked for"));
                }
                places.put(out, *row, page)?;
            }
        }
        self.answers.done(arrived.number);
        if let Some(link) = &self.link {
            // A connection that cannot take this fails at its next read.
            let _ = link.send(Kind::Settled, &[&arrived.number.to_le_bytes()]);
        }
        Ok(())
    }

    /// What pages held before this record that deltas in it are made against.
    fn page_bases(
        &mut self,
        arrived: &ArrivedRows,
        needed: &HashSet<u16>,
        bases: &mut HashMap<u16, Vec<u8>>,
    ) -> Result<(), EngineError> {
        let none = HashMap::new();
        let mut from_frames = Vec::new();
        for (row, (entry, kind)) in (0u16..).zip(arrived.entries.iter().zip(&arrived.rows)) {
            if *kind != Row::Delta(Base::Page) || needed.contains(&row) {
                continue;
            }
            let pfn = pfn_of(*entry);
            match self.locate(pfn, pfn, &none)? {
                Source::Frame => from_frames.push((pfn, row)),
                _ => drop(bases.insert(row, self.recent.page(pfn).unwrap_or_default().to_vec())),
            }
        }
        let places: Vec<(Pfn, usize)> = from_frames.iter().zip(0..).map(|((pfn, _), at)| (*pfn, at)).collect();
        let mut pages = vec![0; places.len() * PAGE_SIZE];
        self.read_frames(&places, &mut pages)?;
        for ((_, row), page) in from_frames.iter().zip(pages.chunks_exact(PAGE_SIZE)) {
            bases.insert(*row, page.to_vec());
        }
        Ok(())
    }

    fn delta(
        &mut self,
        block: &DeltaBlock,
        body: &[u8],
        bases: &HashMap<u16, Vec<u8>>,
    ) -> Result<Vec<u8>, EngineError> {
        let bytes = body.get(block.range.clone()).unwrap_or_default();
        if !delta::needs_bases(block.codec) {
            let pages = self.decompressor.decompress(block.codec, bytes, block.rows.len());
            return Ok(pages?);
        }
        let mut together = Vec::with_capacity(block.rows.len() * PAGE_SIZE);
        for row in &block.rows {
            let base = bases.get(row).filter(|base| base.len() == PAGE_SIZE);
            together.extend_from_slice(base.ok_or(EngineError::WorkerLost)?);
        }
        Ok(self.decompressor.delta(block.codec, bytes, &together)?)
    }

    /// Fills in the pages that refer to others: earlier ones of the record, too, unless it is frozen. Returns the
    /// record's plain pages and the index of each.
    fn resolve(
        &mut self,
        entries: &[u64],
        rows: &[Row],
        frozen: bool,
        out: &mut [u8],
    ) -> Result<Vec<(Pfn, usize)>, EngineError> {
        let mut list = Vec::with_capacity(entries.len());
        let refers = rows.iter().any(|row| matches!(row, Row::Reference(_)));
        let mut here: HashMap<Pfn, usize> = HashMap::with_capacity(if refers { entries.len() } else { 0 });
        let mut from_frames = Vec::new();
        let mut copies = Vec::new();
        let mut index = 0;
        for (entry, row) in entries.iter().zip(rows) {
            let pfn = pfn_of(*entry);
            if let Row::Reference(target) = row {
                match self.locate(pfn, *target, &here)? {
                    Source::Frame => from_frames.push((*target, index)),
                    source => copies.push((*target, index, source)),
                }
            }
            if frozen {
                // Xen only compares these pages: references go to what was applied before.
            } else if *row == Row::Absent || !is_plain(*entry) {
                here.remove(&pfn);
            } else {
                if refers {
                    here.insert(pfn, index);
                }
                list.push((pfn, index));
            }
            index += usize::from(*row != Row::Absent);
        }
        self.read_frames(&from_frames, out)?;
        let mut figures = self.figures.lock();
        figures.resolved_from_memory += copies.len() as u64;
        figures.resolved_from_frames += from_frames.len() as u64;
        drop(figures);
        // In order: a reference may go to a reference before it.
        for (target, index, source) in copies {
            let to = index * PAGE_SIZE;
            match source {
                Source::Here(from) if from < index => out.copy_within(from * PAGE_SIZE..(from + 1) * PAGE_SIZE, to),
                _ => {
                    let page = self.recent.page(target).ok_or(EngineError::WorkerLost)?;
                    out.get_mut(to..to + PAGE_SIZE)
                        .ok_or(EngineError::WorkerLost)?
                        .copy_from_slice(page);
                }
            }
        }
        Ok(list)
    }

    fn locate(&self, pfn: Pfn, target: Pfn, here: &HashMap<Pfn, usize>) -> Result<Source, EngineError> {
        if let Some(index) = here.get(&target) {
            Ok(Source::Here(*index))
        } else if self.recent.page(target).is_some() {
            Ok(Source::Recent)
        } else if self.frames.is_some()
            && self.frames_by_pfn
            && self.recent.dropped().is_some()
            && !self.out.contains(target)
        {
            Ok(Source::Frame)
        } else {
            Err(EngineError::DanglingReference { pfn, target })
        }
    }

    fn read_frames(&mut self, wanted: &[(Pfn, usize)], out: &mut [u8]) -> Result<(), EngineError> {
        let (Some(frames), Some(dropped)) = (&mut self.frames, self.recent.dropped()) else {
            return Ok(());
        };
        if wanted.is_empty() {
            return Ok(());
        }
        let waited = self.applied.wait(dropped)?;
        self.figures.lock().apply_wait_ms += waited.as_millis() as u64;
        let pfns: Vec<Pfn> = wanted.iter().map(|(pfn, _)| *pfn).collect();
        let mut pages = vec![0; pfns.len() * PAGE_SIZE];
        frames.read(&pfns, &mut pages)?;
        for ((_, index), page) in wanted.iter().zip(pages.chunks_exact(PAGE_SIZE)) {
            let place = out.get_mut(index * PAGE_SIZE..(index + 1) * PAGE_SIZE);
            place.ok_or(EngineError::WorkerLost)?.copy_from_slice(page);
        }
        Ok(())
    }
}

/// Puts the record's first bytes into a buffer, makes room for its pages, and empties those that are zero: the others have
/// what was there before until they are filled. Where the pages start, and their number.
fn header(arrived: &ArrivedRows, bytes: &mut Vec<u8>) -> (usize, usize) {
    let ArrivedRows {
        reserved,
        entries,
        rows,
        ..
    } = arrived;
    let pages = rows.iter().filter(|row| **row != Row::Absent).count();
    let mut head = Vec::with_capacity(16 + entries.len() * 8);
    head.extend_from_slice(&libxc::PAGE_DATA.to_le_bytes());
    head.extend_from_slice(&((8 + entries.len() * 8 + pages * PAGE_SIZE) as u32).to_le_bytes());
    head.extend_from_slice(&(entries.len() as u32).to_le_bytes());
    head.extend_from_slice(&reserved.to_le_bytes());
    entries
        .iter()
        .for_each(|entry| head.extend_from_slice(&entry.to_le_bytes()));
    bytes.resize(head.len() + pages * PAGE_SIZE, 0);
    let (start, out) = bytes.split_at_mut(head.len());
    start.copy_from_slice(&head);
    let present = rows.iter().filter(|row| **row != Row::Absent);
    let zero = present.zip(out.chunks_exact_mut(PAGE_SIZE));
    zero.filter(|(row, _)| **row == Row::Zero)
        .for_each(|(_, page)| page.fill(0));
    (head.len(), pages)
}

/// Where each row's page stands among the record's pages.
struct Places(Vec<usize>);

impl Places {
    fn of(rows: &[Row]) -> Places {
        let mut next = 0;
        let places = rows.iter().map(|row| {
            let place = next;
            next += usize::from(*row != Row::Absent);
            place
        });
        Places(places.collect())
    }

    fn put(&self, out: &mut [u8], row: u16, page: &[u8]) -> Result<(), EngineError> {
        let at = self.0.get(usize::from(row)).ok_or(EngineError::WorkerLost)? * PAGE_SIZE;
        let place = out.get_mut(at..at + PAGE_SIZE).ok_or(EngineError::WorkerLost)?;
        place.copy_from_slice(page);
        Ok(())
    }
}

/// Puts the pages of the blocks where the rows sent in full want them.
fn fill_full(
    rows: &[Row],
    blocks: Vec<ArrivedBlock>,
    body: &[u8],
    spare: &Spare,
    out: &mut [u8],
) -> Result<(), EngineError> {
    let mut places = rows
        .iter()
        .filter(|row| **row != Row::Absent)
        .zip(out.chunks_exact_mut(PAGE_SIZE))
        .filter_map(|(row, place)| if *row == Row::Full { Some(place) } else { None });
    let mut fill = |pages: &[u8]| {
        pages
            .chunks_exact(PAGE_SIZE)
            .zip(&mut places)
            .for_each(|(page, place)| place.copy_from_slice(page))
    };
    for block in blocks {
        match block {
            ArrivedBlock::Raw(range) => fill(body.get(range).unwrap_or_default()),
            ArrivedBlock::Packed(pending) => {
                let pages = pending.wait()??;
                fill(&pages);
                spare.give_back(pages);
            }
        }
    }
    Ok(())
}
