//! Stream to rows: xl's pipe in, frames out.
//!
//! Three threads in a row, each at most two records ahead of the next: [`Front`] reads records and has their pages
//! hashed, [`Classifier`] decides what each page is, and has those whose bytes travel compressed, [`Back`] writes frames
//! in order. The workers of the pool do the hashing and compressing.
use std::io::Read;
use std::num::NonZeroU64;
use std::sync::{Arc, Barrier};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use crossbeam_channel::{Receiver, RecvTimeoutError, SendTimeoutError, Sender, bounded};
use parking_lot::Mutex;

use super::behind::{Fate, LeftBehind};
use super::classify::{BlockData, Classifier, Classifying, FromXl, Ready, ReadyBlock, ReadyRows};
use super::contents::Holdings;
use super::cpu::{Blocking, idle, process_cpu};
use super::hashing::ids_of;
use super::holding::{Ahead, Held, Holding};
use super::link::Link;
use super::pacing::{Pacing, Throttle};
use super::page_record::PageRecord;
use super::pool::{Pending, Pool, processors};
use super::threads::{first_cause, join, spawn};
use super::{Contents, EngineError};
use crate::codec::MAX_ROWS;
use crate::page::{ContentKey, PAGE_SIZE, Pfn};
use crate::policy::filter::is_last_pass;
use crate::policy::{LevelPolicy, Spent};
use crate::report::{Figures, Pages};
use crate::stream::{Entry, Event, GuestType, Layer, PageDataHead, Reader, RecordHeader, libxc, libxl};
use crate::table::PageTable;
use crate::wire::{Block, Kind, Rows};

/// The largest PAGE_DATA body that becomes rows: MAX_ROWS entries, all with a page. Xen sends no larger one.
const MAX_RECORD_BODY: usize = MAX_HEAD + MAX_ROWS * PAGE_SIZE;

/// What of it stands before the pages.
const MAX_HEAD: usize = 8 + MAX_ROWS * 8;

/// Bytes of other records that travel in one frame.
const BYTES_PER_FRAME: usize = 1 << 20;

/// Pages that are looked at together while xl is held.
const LOOK_PAGES: usize = 256;

/// Records that may wait between two stages.
const STAGE_DEPTH: usize = 1;

/// How often the guest's writes may be looked at while the link is behind.
const GLANCE_EVERY: Duration = Duration::from_millis(100);

/// Records of pages between xl and the link: one with each stage and one between each two. A single processor has no use
/// for that, and after the suspend the guest waits for all of them.
fn records_under_way() -> usize {
    if processors() == 1 { 2 } else { 5 }
}

/// What takes its time to make and needs no peer: made while ssh connects and xl starts on the other host.
pub struct Prepared {
    pool: Pool,
    give_back: Sender<Vec<u8>>,
    buffers: Receiver<Vec<u8>>,
    touching: Option<JoinHandle<()>>,
}

impl Prepared {
    /// Starts the workers, and a thread that touches the buffers: each page of new memory is a fault, and all of them
    /// together take longer than reading a record.
    pub fn start() -> Result<Prepared, EngineError> {
        let pool = Pool::start()?;
        let together = Arc::new(Barrier::new(pool.workers()));
        for _ in 0..pool.workers() {
            let together = together.clone();
            // Each worker does it once.
            pool.run(move |tools| {
                tools.compressor.warm_up();
                together.wait();
            });
        }
        let (give_back, buffers) = bounded(records_under_way());
        let touched = give_back.clone();
        let touching = spawn("xenfold-buffers", move || {
            for _ in 0..records_under_way() {
                // There is room for all.
                let _ = touched.try_send(vec![1; MAX_RECORD_BODY]);
            }
        })?;
        Ok(Prepared {
            pool,
            give_back,
            buffers,
            touching: Some(touching),
        })
    }

    /// Waits until all is there; who does not wait starts with what is there.
    pub fn wait(&mut self) {
        // It cannot fail, and buffers that do not come would show when one is needed.
        let _ = self.touching.take().map(JoinHandle::join);
    }
}

/// What is needed to send a stream.
pub struct Sending<R> {
    pub stream: Reader<R>,
    pub link: Link,
    pub key: ContentKey,
    pub prepared: Prepared,
    /// The destination can read the guest's frames back, so references may go to any distance.
    pub frames: bool,
    /// Rows that the destination keeps in memory.
    pub window_rows: u32,
    /// Bounds what is under way, where the destination answers.
    pub pacing: Option<Arc<Pacing>>,
    /// Bytes a second that may go to the link.
    pub bandwidth: Option<NonZeroU64>,
    /// What the destination holds elsewhere, where rows may name contents.
    pub holdings: Option<Arc<Holdings>>,
    /// What this host holds.
    pub contents: Option<Arc<dyn Contents>>,
    /// What is needed to hold pages back.
    pub holding: Option<Holding>,
    pub table: PageTable,
    pub figures: Arc<Mutex<Figures>>,
}

/// What is left when everything has been sent.
pub struct Sent<R> {
    /// xl's pipe, at the byte behind the stream.
    pub xl: R,
    /// What each page was last carried as.
    pub table: Arc<PageTable>,
    pub guest_type: GuestType,
    /// Pages that have not gone, if they may follow.
    pub behind: Option<LeftBehind>,
}

impl<R: Read + Send + 'static> Sending<R> {
    /// Sends the whole stream, up to the End frame. Blocks until xl has written it and the link has taken it.
    pub fn run(self) -> Result<Sent<R>, EngineError> {
        let Sending {
            stream,
            link,
            key,
            prepared,
            frames,
            window_rows,
            pacing,
            bandwidth,
            holdings,
            contents,
            holding,
            table,
            figures,
        } = self;
        let Prepared {
            pool,
            give_back,
            buffers,
            ..
        } = prepared;
        let (to_classifier, from_front) = bounded(STAGE_DEPTH);
        let (to_back, from_classifier) = bounded(STAGE_DEPTH);
        let policy = Arc::new(Mutex::new(LevelPolicy::new(pool.workers(), processors())));
        let classifier = Classifier::new(Classifying {
            table,
            window_rows,
            frames,
            key: key.clone(),
            pool: pool.clone(),
            policy: policy.clone(),
            holdings,
            contents,
        });
        let back = Back {
            give_back,
            link: link.clone(),
            policy,
            figures: figures.clone(),
            pacing,
            throttle: bandwidth.map(Throttle::new),
            start: Instant::now(),
            written: Instant::now(),
            guest_bytes: 0,
        };
        let classifier = spawn("xenfold-rows", move || classifier.run(from_front, to_back))?;
        let back = spawn("xenfold-send", move || back.run(from_classifier))?;
        let mut front = Front {
            stream,
            pool,
            key,
            buffers,
            link,
            held: holding.map(|holding| Held::new(holding, figures.clone())),
            figures: figures.clone(),
            pass: 0,
            pass_pages: 0,
            last_pfn: None,
            spare: None,
            next: to_classifier,
        };
        let read = front.run();
        let Front { stream, next, held, .. } = front;
        drop(next);
        // The first stage to fail makes its neighbours end with WorkerLost; the one with a cause is reported.
        let classified = join(classifier);
        let sent = join(back);
        let (table, guest_type) = first_cause([read.err(), sent.err()], classified)?;
        figures.lock().distinct_pages = table.ids().len();
        Ok(Sent {
            xl: stream.into_inner(),
            table: Arc::new(table),
            guest_type,
            behind: held.and_then(Held::end),
        })
    }
}

struct Front<R> {
    stream: Reader<R>,
    pool: Pool,
    key: ContentKey,
    /// One for each record of pages that may be under way; those that were used before need no new memory.
    buffers: Receiver<Vec<u8>>,
    link: Link,
    /// Pages held back, where the guest allows it.
    held: Option<Held>,
    figures: Arc<Mutex<Figures>>,
    /// Passes of xl's that were seen to begin.
    pass: u32,
    /// Pages of the present one so far.
    pass_pages: u64,
    last_pfn: Option<Pfn>,
    /// A buffer that was not needed. It does not go back by a sender of our own: when all others are gone, that shows.
    spare: Option<Vec<u8>>,
    next: Sender<FromXl>,
}

impl<R: Read> Front<R> {
    fn pass(&mut self, mut item: FromXl) -> Result<(), EngineError> {
        loop {
            item = match self.next.send_timeout(item, GLANCE_EVERY) {
                Ok(()) => return Ok(()),
                Err(SendTimeoutError::Timeout(item)) => item,
                Err(SendTimeoutError::Disconnected(_)) => return Err(EngineError::WorkerLost),
            };
            self.held.iter_mut().for_each(Held::glance);
        }
    }

    fn run(&mut self) -> Result<(), EngineError> {
        loop {
            match self.stream.next()? {
                Event::Record(header) if header.is(Layer::Libxl, libxl::END) => {
                    self.skip_body(&header)?;
                    self.pass(FromXl::End(header.bytes()))?;
                }
                Event::Record(header) if header.is(Layer::Libxc, libxc::PAGE_DATA) => self.page_data(&header)?,
                Event::Record(header) => {
                    if header.layer == Layer::Libxc {
                        self.flush()?;
                    }
                    self.other_record(&header)?;
                    if header.is(Layer::Libxc, libxc::VERIFY) {
                        if self.held.as_ref().is_some_and(Held::leaves_behind) {
                            return Err(EngineError::ComparedWhole);
                        }
                        self.pass(FromXl::Verify)?;
                        // What follows is only compared.
                        self.held = None;
                    }
                }
                Event::DomainHeader(header) => {
                    // Only where frames are found by page number can a held page be read later.
                    self.held = self.held.take().filter(|_| header.guest_type() == GuestType::Hvm);
                    self.pass(FromXl::Guest(header.guest_type()))?;
                    self.pass(FromXl::Bytes(header.as_bytes().to_vec()))?;
                }
                Event::End => return Ok(()),
                other => self.parts(&other.bytes())?,
            }
        }
    }

    /// libxl's END has no body; should a later Xen give it one, it would have to be carried.
    fn skip_body(&mut self, header: &RecordHeader) -> Result<(), EngineError> {
        if header.length == 0 {
            Ok(())
        } else {
            Err(EngineError::Protocol("libxl's END record has a body"))
        }
    }

    /// Room for the pages of a record.
    fn buffer(&mut self) -> Result<Vec<u8>, EngineError> {
        if let Some(spare) = self.spare.take() {
            return Ok(spare);
        }
        loop {
            match self.buffers.recv_timeout(GLANCE_EVERY) {
                Ok(buffer) => return Ok(buffer),
                Err(RecvTimeoutError::Timeout) => self.held.iter_mut().for_each(Held::glance),
                Err(RecvTimeoutError::Disconnected) => return Err(EngineError::WorkerLost),
            }
        }
    }

    fn page_data(&mut self, header: &RecordHeader) -> Result<(), EngineError> {
        let mut buffer = self.buffer()?;
        if header.length as usize > MAX_RECORD_BODY {
            self.pass(FromXl::Forget)?;
            return self.other_record(header);
        }
        // The buffer's old bytes are written over: to make all of it zero first takes as long as to read it.
        let length = self.stream.body_left() as usize;
        buffer.resize(buffer.len().max(length), 0);
        let body = buffer.get_mut(..length).unwrap_or_default();
        // What is wrong with the list shows when all of the record has been read.
        let mut list = Vec::new();
        let head = self.stream.read_page_data_head(header, &mut list, MAX_HEAD);
        let (keep, wrong) = match head {
            Ok(()) => (self.hold_back(header, &list)?, None),
            Err(error) => (None, Some(error)),
        };
        let (start, pages) = body.split_at_mut(list.len().min(length));
        start.copy_from_slice(list.get(..start.len()).unwrap_or_default());
        self.stream
            .read_body_part(pages)
            .map_err(|error| wrong.unwrap_or(error))?;
        let count = body.first_chunk::<4>().map_or(0, |count| u32::from_le_bytes(*count));
        if count as usize > MAX_ROWS {
            self.pass(FromXl::Forget)?;
            self.pass(FromXl::Bytes(header.bytes().to_vec()))?;
            return self.parts(body);
        }
        // A valid record needs no padding; with it, one that is too short would be taken for valid and sent on mended.
        let length = length.min(header.length as usize);
        let mut record = PageRecord::parse(buffer, length, header.body_offset())?;
        if let Some(keep) = keep {
            record = record.retain(&keep)?;
        }
        if record.list.is_empty() {
            self.spare = Some(record.into_buffer());
            return Ok(());
        }
        self.pages(record)
    }

    /// With a record's list read and its pages still in the pipe, so that xl's helper waits: looks at the guest, decides
    /// which of the pages go with the record, and sends earlier ones that need not wait any longer. `None`: all go.
    fn hold_back(&mut self, header: &RecordHeader, body: &[u8]) -> Result<Option<Vec<Fate>>, EngineError> {
        let Ok(head) = PageDataHead::parse(body, header.length, header.body_offset()) else {
            return Ok(None);
        };
        let list: Vec<Entry> = head.entries().collect();
        self.number(&list);
        let Some(held) = &mut self.held else { return Ok(None) };
        let runs = held.guest_runs();
        let keep = held.keep(&list, runs.then(|| self.stream.body_left()));
        if runs {
            self.release()?;
        }
        if runs && self.held.is_some() && self.ends_passes(&list) {
            let carried = carried(&list, keep.as_deref());
            self.rounds(&carried)?;
            if let Some(held) = &mut self.held {
                held.last_pass()?;
            }
            self.announce(&carried)?;
        }
        Ok(keep)
    }

    /// Says which pages will stay behind: xl suspends the guest next. `carried`: pages of its present record that go.
    fn announce(&mut self, carried: &[Pfn]) -> Result<(), EngineError> {
        let unread = self.stream.body_left();
        let Some(held) = &mut self.held else { return Ok(()) };
        let records = held.announce(unread, carried)?;
        records.into_iter().try_for_each(|record| self.pages(record))
    }

    /// Sends held pages that need not wait any longer.
    fn release(&mut self) -> Result<(), EngineError> {
        let unread = self.stream.body_left();
        while let Some(held) = &mut self.held {
            let due = held.due(self.link.bytes(), unread);
            if due.is_empty() {
                break;
            }
            self.held_pages(&due)?;
        }
        Ok(())
    }

    /// Holds xl, which waits with the last record of its passes over the running guest, while pages go ahead of it.
    fn rounds(&mut self, carried: &[Pfn]) -> Result<(), EngineError> {
        let (unread, mut ahead) = (self.stream.body_left(), Ahead::default());
        while let Some(dirty) = self.held.as_mut().and_then(|held| held.begin_round(unread)) {
            self.release()?;
            let mut pages = dirty.iter();
            loop {
                let pfns: Vec<Pfn> = pages.by_ref().take(LOOK_PAGES).collect();
                if let Some(held) = &mut self.held {
                    held.look_at(&pfns, carried, &mut ahead)?;
                }
                if ahead.is_full() || pfns.is_empty() && !ahead.is_empty() {
                    let buffer = self.buffer()?;
                    self.pages(ahead.record(buffer)?)?;
                }
                if pfns.is_empty() {
                    break;
                }
            }
            self.held.iter_mut().for_each(Held::end_round);
        }
        Ok(())
    }

    /// A pass begins where the page numbers fall (a hint: two short passes can ascend).
    fn number(&mut self, list: &[Entry]) {
        let first = list.first().map(|entry| entry.pfn);
        if first <= self.last_pfn || self.last_pfn.is_none() {
            self.pass += 1;
            self.pass_pages = 0;
            let mut figures = self.figures.lock();
            (figures.iteration, figures.iteration_pages) = (self.pass, 0);
            drop(figures);
            if let Some(held) = &mut self.held {
                held.pass(self.pass);
            }
        }
        self.last_pfn = list.last().map(|entry| entry.pfn);
        self.pass_pages = self.pass_pages.saturating_add(list.len() as u64);
        self.figures.lock().iteration_pages += list.iter().filter(|entry| entry.has_data).count() as u64;
    }

    /// Whether this record is the last of xl's last pass over the running guest: its fifth, or one of few pages.
    fn ends_passes(&self, list: &[Entry]) -> bool {
        is_last_pass(self.pass, self.pass_pages) && list.len() < MAX_ROWS
    }

    fn pages(&mut self, record: PageRecord) -> Result<(), EngineError> {
        if let Some(held) = &mut self.held {
            held.goes(&record);
        }
        let record = Arc::new(record);
        let ids = ids_of(&record, record.page_count(), PageRecord::pages, &self.key, &self.pool);
        self.pass(FromXl::Pages { record, ids })
    }

    /// Sends all pages that are still held: xl has sent all of its own.
    fn flush(&mut self) -> Result<(), EngineError> {
        while let Some(held) = &mut self.held {
            let rest = held.rest();
            if rest.is_empty() {
                break;
            }
            if held.guest_runs() {
                return Err(EngineError::Protocol("xl ended its passes while the guest runs"));
            }
            self.held_pages(&rest)?;
        }
        while let Some(held) = &mut self.held
            && let Some(record) = held.rest_behind()?
        {
            if held.guest_runs() {
                return Err(EngineError::Protocol("xl ended its passes while the guest runs"));
            }
            self.pages(record)?;
        }
        Ok(())
    }

    /// Sends these held pages as they are in the guest's frames.
    fn held_pages(&mut self, pfns: &[Pfn]) -> Result<(), EngineError> {
        let body = self.buffer()?;
        let Some(held) = &mut self.held else { return Ok(()) };
        let record = held.read(pfns, body)?;
        self.pages(record)
    }

    /// Bytes of any length as they are, in frames of a bounded size.
    fn parts(&mut self, bytes: &[u8]) -> Result<(), EngineError> {
        bytes
            .chunks(BYTES_PER_FRAME)
            .try_for_each(|part| self.pass(FromXl::Bytes(part.to_vec())))
    }

    fn other_record(&mut self, header: &RecordHeader) -> Result<(), EngineError> {
        let mut bytes = header.bytes().to_vec();
        loop {
            let have = bytes.len();
            let more = self.stream.body_left().min((BYTES_PER_FRAME - have) as u64) as usize;
            bytes.resize(have + more, 0);
            self.stream.read_body_part(bytes.get_mut(have..).unwrap_or_default())?;
            self.pass(FromXl::Bytes(std::mem::take(&mut bytes)))?;
            if self.stream.body_left() == 0 {
                return Ok(());
            }
        }
    }
}

/// Pages of a record of xl's that go, in their order.
fn carried(list: &[Entry], fates: Option<&[Fate]>) -> Vec<Pfn> {
    let goes = |at: usize| {
        let fate = fates.and_then(|fates| fates.get(at));
        fate.is_none_or(|fate| *fate == Fate::Carry)
    };
    let pages = list.iter().enumerate().filter(|(at, _)| goes(*at));
    let mut pages: Vec<Pfn> = pages.map(|(_, entry)| entry.pfn).collect();
    pages.sort_unstable();
    pages
}

struct Back {
    /// The other end of [`Front::buffers`].
    give_back: Sender<Vec<u8>>,
    link: Link,
    policy: Arc<Mutex<LevelPolicy>>,
    figures: Arc<Mutex<Figures>>,
    pacing: Option<Arc<Pacing>>,
    throttle: Option<Throttle>,
    start: Instant,
    /// When the rows before had gone.
    written: Instant,
    /// Bytes of page records so far.
    guest_bytes: u64,
}

impl Back {
    fn run(mut self, input: Receiver<Ready>) -> Result<(), EngineError> {
        for item in input {
            let mut stream_bytes = 0;
            match item {
                Ready::Bytes(bytes) => {
                    self.send(Kind::Bytes, &[&bytes])?;
                    stream_bytes = bytes.len();
                }
                Ready::Guest(guest_type) => {
                    let number: u32 = if guest_type == GuestType::Pv { 1 } else { 2 };
                    self.send(Kind::Guest, &[&number.to_le_bytes()])?;
                }
                Ready::Rows(rows) => {
                    stream_bytes = 8 + rows.record.length();
                    let record = self.rows(rows)?;
                    // It may be kept until the destination has answered. Whether Front has ended does not matter here.
                    let body = Arc::try_unwrap(record).map_or_else(|_| Vec::new(), PageRecord::into_buffer);
                    let _ = self.give_back.try_send(body);
                }
                Ready::Forget => {
                    self.send(Kind::Forget, &[])?;
                    let _ = self.give_back.try_send(Vec::new());
                }
                Ready::End(end) => {
                    self.send(Kind::End, &[&end.to_bytes()])?;
                    stream_bytes = end.record.len();
                }
            }
            let wire_bytes = self.link.bytes();
            let mut figures = self.figures.lock();
            figures.stream_bytes += stream_bytes as u64;
            figures.wire_bytes = wire_bytes;
        }
        Ok(())
    }

    fn send(&mut self, kind: Kind, parts: &[&[u8]]) -> Result<(), EngineError> {
        if let Some(throttle) = &mut self.throttle {
            throttle.before(parts.iter().map(|part| part.len()).sum());
        }
        self.link
            .send(kind, parts)
            .map_err(|error| EngineError::Wire(error.into()))
    }

    fn rows(&mut self, ready: ReadyRows) -> Result<Arc<PageRecord>, EngineError> {
        let blocks = ready
            .blocks
            .into_iter()
            .map(Pending::wait)
            .collect::<Result<Vec<_>, _>>()?;
        let frame = Rows {
            count: ready.record.entries.len(),
            frozen: ready.frozen,
            reserved: ready.record.reserved,
            rows: &ready.rows,
            blocks: blocks
                .iter()
                .map(|block| Block {
                    codec: block.codec,
                    pages: block.pages,
                    bytes: match &block.data {
                        BlockData::Own(bytes) => bytes,
                        BlockData::Record(range) => ready.record.pages(range.clone()),
                    },
                    offset: 0,
                })
                .collect(),
        };
        let guest_bytes = ready.record.length() as u64;
        let blocking = Blocking::start();
        let ping = self
            .pacing
            .as_ref()
            .map(|pacing| pacing.before(guest_bytes))
            .transpose()?;
        let bytes = frame.parts(|parts| {
            let bytes: usize = parts.iter().map(|part| part.len()).sum();
            self.send(Kind::Rows, parts).map(|()| bytes)
        })?;
        let (now, waited) = (Instant::now(), blocking.time());
        self.policy.lock().written(bytes, now - self.written, waited);
        self.written = now;
        if let Some(ping) = ping {
            self.send(Kind::Ping, &[&ping])?;
        }
        self.note(&blocks, ready.pages);
        self.guest_bytes += guest_bytes;
        if self.policy.lock().wants_spent(self.guest_bytes) {
            let spent = Spent {
                own: process_cpu(),
                carrier: self.link.carrier_cpu(),
                guest_bytes: self.guest_bytes,
                wire_bytes: self.link.bytes(),
                elapsed: self.start.elapsed(),
                idle: idle(),
            };
            self.policy.lock().spent(spent);
        }
        Ok(ready.record)
    }

    fn note(&mut self, blocks: &[ReadyBlock], pages: Pages) {
        let mut figures = self.figures.lock();
        figures.add_rows(pages);
        for block in blocks {
            *figures.blocks.entry(block.name.clone()).or_default() += 1;
        }
    }
}
