//! Rows to stream: frames in, xl's pipe out, byte for byte what the source's xl wrote.
//!
//! Three threads in a row: the caller hands frames to [`Receiving::frame`], which has their blocks decompressed;
//! [`Assembler`] puts records together and resolves references; [`Outlet`] hashes what it is about to write, checks
//! it against the table and writes it. The workers of the pool do the decompressing and hashing.
use std::collections::{HashMap, VecDeque};
use std::io::{self, Write};
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use crossbeam_channel::{Receiver, Sender, bounded, select};
use parking_lot::Mutex;

use super::digest::{ABSENT, Digest};
use super::pool::{Pending, Pool};
use super::rebuilt::{RebuiltRecord, Recent};
use super::sending::{first_cause, hash, join, spawn};
use super::{EngineError, Frames};
use crate::codec::{CodecError, Row, rows};
use crate::page::{ContentId, ContentKey, PAGE_SIZE, Pfn};
use crate::report::DestinationFigures;
use crate::stream::{PageType, libxc};
use crate::table::PageIds;
use crate::wire::{End, Frame, Kind, Rows, u32_body};

/// Pages that a worker hashes in one go.
const HASH_PAGES: usize = 128;

/// Records that may wait between two stages.
const STAGE_DEPTH: usize = 1;

/// How often the pipe to xl is looked at while waiting for a record to be applied.
const POLL: Duration = Duration::from_micros(200);

/// The pipe to the receiving xl.
pub struct XlInput {
    pub writer: Box<dyn Write + Send>,
    pub unread: Unread,
}

/// Bytes in the pipe to xl that it has not read yet (FIONREAD). Errors when nobody reads any more.
pub type Unread = Arc<dyn Fn() -> io::Result<u64> + Send + Sync>;

/// A stream that is being rebuilt.
pub struct Receiving {
    pool: Pool,
    next: Option<Sender<Arrived>>,
    stopper: Stopper,
    assembler: JoinHandle<Result<Frames, EngineError>>,
    outlet: JoinHandle<Result<Rebuilt, EngineError>>,
}

/// Ends a rebuilding from outside. Its stages let go of xl's pipe, which tells xl that nothing more will come.
#[derive(Clone)]
pub struct Stopper(Sender<()>);

impl Stopper {
    pub fn stop(&self) {
        // One is enough; and when the stages have ended there is nothing to stop.
        let _ = self.0.try_send(());
    }
}

/// What is left when everything up to libxl's END has been written.
pub struct Rebuilt {
    pub xl: XlInput,
    pub end: End,
    /// Digest over the whole stream, from the bytes that were written.
    pub digest: [u8; 32],
    pub rows: u64,
    /// What each plain page was last written as.
    pub ids: PageIds,
}

/// From [`Receiving::frame`] to [`Assembler`].
enum Arrived {
    Bytes(Vec<u8>),
    Guest(u32),
    Rows(ArrivedRows),
    Forget,
    End(End),
}

struct ArrivedRows {
    frozen: bool,
    reserved: u32,
    entries: Vec<u64>,
    rows: Vec<Row>,
    blocks: Vec<ArrivedBlock>,
    body: Arc<Vec<u8>>,
}

enum ArrivedBlock {
    /// Pages where they stand in the frame.
    Raw(Range<usize>),
    Packed(Pending<Result<Vec<u8>, CodecError>>),
}

/// From [`Assembler`] to [`Outlet`].
enum Assembled {
    Bytes(Vec<u8>),
    Record(AssembledRecord),
    Forget,
    End(End),
}

struct AssembledRecord {
    record: Arc<RebuiltRecord>,
    frozen: bool,
    reserved: u32,
    entries: Vec<u64>,
    rows: Vec<Row>,
    ids: Vec<Pending<Vec<Option<ContentId>>>>,
}

impl Receiving {
    /// Starts the threads. `frames` reads the guest under construction; without it only recent pages can be referred to.
    pub fn start(
        xl: XlInput,
        frames: Frames,
        key: ContentKey,
        figures: Arc<Mutex<DestinationFigures>>,
    ) -> Result<Receiving, EngineError> {
        let pool = Pool::start()?;
        let (next, from_link) = bounded(STAGE_DEPTH);
        let (to_outlet, from_assembler) = bounded(STAGE_DEPTH);
        let (stop, stopped) = bounded(1);
        let applied = Arc::new(Applied {
            unread: xl.unread.clone(),
            ..Applied::new()
        });
        let assembler = Assembler {
            recent: Recent::default(),
            frames,
            frames_by_pfn: false,
            applied: applied.clone(),
            next_number: 0,
            pool: pool.clone(),
            key: key.clone(),
            figures,
        };
        let outlet = Outlet {
            xl,
            applied,
            ids: PageIds::default(),
            digest: Digest::default(),
            zero: key.id(&crate::page::ZERO_PAGE),
        };
        let assembler = spawn("xenfold-rebuild", move || assembler.run(from_link, stopped, to_outlet))?;
        let outlet = spawn("xenfold-write", move || outlet.run(from_assembler))?;
        Ok(Receiving {
            pool,
            next: Some(next),
            stopper: Stopper(stop),
            assembler,
            outlet,
        })
    }

    /// Whether a stage has ended, which before the End frame means that it failed.
    pub fn has_ended(&self) -> bool {
        self.assembler.is_finished() || self.outlet.is_finished()
    }

    pub fn stopper(&self) -> Stopper {
        self.stopper.clone()
    }

    /// Takes one frame of the stream. Blocks while the stages behind are busy. Errors: the frame is not valid, or a
    /// stage has failed ([`Receiving::finish`] tells why).
    pub fn frame(&mut self, frame: Frame) -> Result<(), EngineError> {
        let arrived = match frame.kind {
            Kind::Bytes => Arrived::Bytes(frame.body),
            Kind::Guest => Arrived::Guest(u32_body(frame.kind, &frame.body)?),
            Kind::Rows => Arrived::Rows(self.rows(frame.body)?),
            Kind::Forget => Arrived::Forget,
            Kind::End => Arrived::End(End::parse(&frame.body)?),
            _ => return Err(EngineError::Protocol("a frame came that does not belong to the stream")),
        };
        match &self.next {
            Some(next) => next.send(arrived).map_err(|_| EngineError::WorkerLost),
            None => Err(EngineError::WorkerLost),
        }
    }

    fn rows(&self, body: Vec<u8>) -> Result<ArrivedRows, EngineError> {
        let body = Arc::new(body);
        let parsed = Rows::parse(&body)?;
        let (entries, rows) = rows::decode(parsed.rows, parsed.count)?;
        for (entry, row) in entries.iter().zip(&rows) {
            let page_type = PageType::new((entry >> 60) as u8).ok_or(EngineError::Protocol(
                "a row has a page type that Xen's stream does not know",
            ))?;
            if page_type.has_data() == (*row == Row::Absent) {
                return Err(EngineError::Protocol("a row does not fit its entry's page type"));
            }
        }
        let full = rows.iter().filter(|row| **row == Row::Full).count();
        if parsed.blocks.iter().map(|block| block.pages).sum::<usize>() != full {
            return Err(EngineError::Protocol(
                "a record's blocks have not as many pages as its rows say",
            ));
        }
        let blocks = parsed.blocks.iter().map(|block| {
            let range = block.offset..block.offset + block.bytes.len();
            if block.codec == 0 && block.bytes.len() == block.pages * PAGE_SIZE {
                return ArrivedBlock::Raw(range);
            }
            let (body, codec, pages) = (body.clone(), block.codec, block.pages);
            ArrivedBlock::Packed(self.pool.run(move |tools| {
                tools
                    .decompressor
                    .decompress(codec, body.get(range).unwrap_or_default(), pages)
            }))
        });
        let blocks = blocks.collect();
        let (frozen, reserved) = (parsed.frozen, parsed.reserved);
        Ok(ArrivedRows {
            frozen,
            reserved,
            entries,
            rows,
            blocks,
            body,
        })
    }

    /// Waits until all that came has been written. Frames come back where they can be found by page number. Errors: the
    /// cause of whatever failed first; `WorkerLost` when the stream ended before its End frame and nothing else failed.
    pub fn finish(mut self) -> Result<(Rebuilt, Frames), EngineError> {
        self.next = None;
        let frames = join(self.assembler);
        let rebuilt = join(self.outlet);
        match (frames, rebuilt) {
            (Ok(frames), Ok(rebuilt)) => Ok((rebuilt, frames)),
            (frames, rebuilt) => first_cause([frames.err(), rebuilt.err()], Err(EngineError::WorkerLost)),
        }
    }
}

/// Which records xl's helper has certainly applied. It applies records in order and reads the next one's header only
/// then, so a record is applied when a byte behind its end has been taken out of the pipe (DESIGN.md, page sources).
struct Applied {
    records: Mutex<Records>,
    /// Bytes written to the pipe.
    written: AtomicU64,
    /// The outlet has ended: nothing more will be applied.
    closed: AtomicBool,
    unread: Unread,
}

#[derive(Default)]
struct Records {
    /// Number of each record that may not be applied yet and its end in the stream, oldest first.
    pending: VecDeque<(u64, u64)>,
    newest_applied: Option<u64>,
}

impl Applied {
    fn new() -> Applied {
        Applied {
            records: Mutex::default(),
            written: AtomicU64::new(0),
            closed: AtomicBool::new(false),
            unread: Arc::new(|| Ok(0)),
        }
    }

    /// Waits until record `number` is applied; the time it took.
    fn wait(&self, number: u64) -> Result<Duration, EngineError> {
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

struct Assembler {
    recent: Recent,
    frames: Frames,
    /// The guest's frames are found by page number (HVM and PVH).
    frames_by_pfn: bool,
    applied: Arc<Applied>,
    next_number: u64,
    pool: Pool,
    key: ContentKey,
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
    fn run(
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
                Ok(Arrived::Rows(rows)) => Assembled::Record(self.record(rows)?),
                Ok(Arrived::Forget) => {
                    self.recent.clear();
                    Assembled::Forget
                }
                Ok(Arrived::End(end)) => Assembled::End(end),
            };
            next.send(assembled).map_err(|_| EngineError::WorkerLost)?;
        }
    }

    fn record(&mut self, arrived: ArrivedRows) -> Result<AssembledRecord, EngineError> {
        let ArrivedRows {
            frozen,
            reserved,
            entries,
            rows,
            blocks,
            body,
        } = arrived;
        let pages = rows.iter().filter(|row| **row != Row::Absent).count();
        let pages_at = 16 + entries.len() * 8;
        let mut bytes = Vec::with_capacity(pages_at + pages * PAGE_SIZE);
        bytes.extend_from_slice(&libxc::PAGE_DATA.to_le_bytes());
        bytes.extend_from_slice(&((8 + entries.len() * 8 + pages * PAGE_SIZE) as u32).to_le_bytes());
        bytes.extend_from_slice(&(entries.len() as u32).to_le_bytes());
        bytes.extend_from_slice(&reserved.to_le_bytes());
        entries
            .iter()
            .for_each(|entry| bytes.extend_from_slice(&entry.to_le_bytes()));
        bytes.resize(pages_at + pages * PAGE_SIZE, 0);
        let (_, out) = bytes.split_at_mut(pages_at);
        fill_full(&rows, blocks, &body, out)?;
        let list = self.resolve(&entries, &rows, frozen, out)?;
        let record = Arc::new(RebuiltRecord {
            number: self.next_number,
            bytes,
            pages_at,
        });
        if !frozen {
            self.next_number += 1;
            for (entry, row) in entries.iter().zip(&rows) {
                if *row == Row::Absent || !is_plain(*entry) {
                    self.recent.remove(pfn_of(*entry));
                }
            }
            self.recent.insert(record.clone(), list, entries.len());
        }
        let ids = (0..pages)
            .step_by(HASH_PAGES)
            .map(|start| {
                let (record, key, end) = (record.clone(), self.key.clone(), pages.min(start + HASH_PAGES));
                self.pool.run(move |_| {
                    let at = |page: usize| record.pages_at + page * PAGE_SIZE;
                    hash(&key, record.bytes.get(at(start)..at(end)).unwrap_or_default())
                })
            })
            .collect();
        Ok(AssembledRecord {
            record,
            frozen,
            reserved,
            entries,
            rows,
            ids,
        })
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
        let mut here: HashMap<Pfn, usize> = HashMap::new();
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
                here.insert(pfn, index);
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
        } else if self.frames.is_some() && self.frames_by_pfn && self.recent.dropped().is_some() {
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

fn pfn_of(entry: u64) -> Pfn {
    Pfn::new(entry & Pfn::MAX.get()).unwrap_or_default()
}

fn is_plain(entry: u64) -> bool {
    PageType::new((entry >> 60) as u8) == Some(PageType::NoTab)
}

/// Puts the pages of the blocks where the rows sent in full want them.
fn fill_full(rows: &[Row], blocks: Vec<ArrivedBlock>, body: &[u8], out: &mut [u8]) -> Result<(), EngineError> {
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
            ArrivedBlock::Packed(pending) => fill(&pending.wait()??),
        }
    }
    Ok(())
}

struct Outlet {
    xl: XlInput,
    applied: Arc<Applied>,
    ids: PageIds,
    digest: Digest,
    zero: ContentId,
}

impl Outlet {
    fn run(mut self, input: Receiver<Assembled>) -> Result<Rebuilt, EngineError> {
        let result = self.write_all(input);
        self.applied.closed.store(true, Ordering::Release);
        let end = result?;
        let Outlet { xl, digest, ids, .. } = self;
        Ok(Rebuilt {
            xl,
            end,
            digest: digest.finish(),
            rows: digest.rows(),
            ids,
        })
    }

    fn write_all(&mut self, input: Receiver<Assembled>) -> Result<End, EngineError> {
        for item in input {
            match item {
                Assembled::Bytes(bytes) => {
                    self.digest.bytes(Kind::Bytes, &bytes);
                    self.write(&bytes)?;
                }
                Assembled::Record(record) => self.record(record)?,
                Assembled::Forget => self.ids.clear(),
                Assembled::End(end) => {
                    self.digest.bytes(Kind::End, &end.record);
                    return Ok(end);
                }
            }
        }
        Err(EngineError::WorkerLost)
    }

    fn write(&mut self, bytes: &[u8]) -> Result<(), EngineError> {
        self.xl
            .writer
            .write_all(bytes)
            .and_then(|()| self.xl.writer.flush())
            .map_err(EngineError::Xl)?;
        self.applied.written.fetch_add(bytes.len() as u64, Ordering::Release);
        Ok(())
    }

    /// Enters the record's rows, checks what was referred to, and only then writes the record.
    fn record(&mut self, assembled: AssembledRecord) -> Result<(), EngineError> {
        let AssembledRecord {
            record,
            frozen,
            reserved,
            entries,
            rows,
            ids: pending,
        } = assembled;
        let mut contents = Vec::new();
        for part in pending {
            contents.extend(part.wait()?);
        }
        let mut contents = contents.into_iter().map(|id| id.unwrap_or(self.zero));
        let mut ids = Vec::with_capacity(entries.len());
        for (entry, row) in entries.iter().zip(&rows) {
            let pfn = pfn_of(*entry);
            let id = if *row == Row::Absent {
                ABSENT
            } else {
                contents.next().ok_or(EngineError::WorkerLost)?
            };
            if let Row::Reference(target) = row {
                match self.ids.get(*target) {
                    None => return Err(EngineError::DanglingReference { pfn, target: *target }),
                    Some(expected) if expected != id => {
                        return Err(EngineError::ReferenceChanged { pfn, target: *target });
                    }
                    Some(_) => {}
                }
            }
            if !frozen {
                if *row == Row::Absent || !is_plain(*entry) {
                    self.ids.remove(pfn);
                } else {
                    self.ids.set(pfn, id)?;
                }
            }
            ids.push(id);
        }
        self.digest.record(reserved, &entries, &ids);
        if !frozen {
            let end = self.applied.written.load(Ordering::Relaxed) + record.bytes.len() as u64;
            self.applied.records.lock().pending.push_back((record.number, end));
        }
        self.write(&record.bytes)
    }
}
