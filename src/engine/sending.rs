//! Stream to rows: xl's pipe in, frames out.
//!
//! Three threads in a row, each at most two records ahead of the next: [`Front`] reads records and has their pages
//! hashed, [`Classifier`] decides what each page is, and has those whose bytes travel compressed, [`Back`] writes frames
//! in order. The workers of the pool do the hashing and compressing.
use std::io::Read;
use std::sync::{Arc, Barrier};
use std::thread::JoinHandle;
use std::time::Instant;

use crossbeam_channel::{Receiver, Sender, bounded};
use parking_lot::Mutex;

use super::classify::{BlockData, Classifier, Classifying, FromXl, Ready, ReadyBlock, ReadyRows};
use super::contents::Holdings;
use super::cpu::{Blocking, idle, process_cpu};
use super::hashing::ids_of;
use super::link::Link;
use super::pacing::Pacing;
use super::page_record::PageRecord;
use super::pool::{Pending, Pool, processors};
use super::threads::{first_cause, join, spawn};
use super::{Contents, EngineError};
use crate::codec::MAX_ROWS;
use crate::page::{ContentKey, PAGE_SIZE, Pfn};
use crate::policy::{LevelPolicy, Spent};
use crate::report::{Figures, Pages};
use crate::stream::{Event, GuestType, Layer, Reader, RecordHeader, libxc, libxl};
use crate::table::PageTable;
use crate::wire::{Block, Kind, Rows};

/// The largest PAGE_DATA body that becomes rows: MAX_ROWS entries, all with a page. Xen sends no larger one.
const MAX_RECORD_BODY: usize = 8 + MAX_ROWS * (8 + PAGE_SIZE);

/// Bytes of other records that travel in one frame.
const BYTES_PER_FRAME: usize = 1 << 20;

/// Records that may wait between two stages.
const STAGE_DEPTH: usize = 1;

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
    /// What the destination holds elsewhere, where rows may name contents.
    pub holdings: Option<Arc<Holdings>>,
    /// What this host holds.
    pub contents: Option<Arc<dyn Contents>>,
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
            holdings,
            contents,
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
            link,
            policy,
            figures,
            pacing,
            last_pfn: None,
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
            next: to_classifier,
        };
        let read = front.run();
        let Front { stream, next, .. } = front;
        drop(next);
        // The first stage to fail makes its neighbours end with WorkerLost; the one with a cause is reported.
        let classified = join(classifier);
        let sent = join(back);
        let (table, guest_type) = first_cause([read.err(), sent.err()], classified)?;
        Ok(Sent {
            xl: stream.into_inner(),
            table: Arc::new(table),
            guest_type,
        })
    }
}

struct Front<R> {
    stream: Reader<R>,
    pool: Pool,
    key: ContentKey,
    /// One for each record of pages that may be under way; those that were used before need no new memory.
    buffers: Receiver<Vec<u8>>,
    next: Sender<FromXl>,
}

impl<R: Read> Front<R> {
    fn pass(&self, item: FromXl) -> Result<(), EngineError> {
        self.next.send(item).map_err(|_| EngineError::WorkerLost)
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
                    self.other_record(&header)?;
                    if header.is(Layer::Libxc, libxc::VERIFY) {
                        self.pass(FromXl::Verify)?;
                    }
                }
                Event::DomainHeader(header) => {
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

    fn page_data(&mut self, header: &RecordHeader) -> Result<(), EngineError> {
        let mut buffer = self.buffers.recv().map_err(|_| EngineError::WorkerLost)?;
        if header.length as usize > MAX_RECORD_BODY {
            self.pass(FromXl::Forget)?;
            return self.other_record(header);
        }
        // The buffer's old bytes are written over: to make all of it zero first takes as long as to read it.
        let length = self.stream.body_left() as usize;
        buffer.resize(buffer.len().max(length), 0);
        let body = buffer.get_mut(..length).unwrap_or_default();
        self.stream.read_body_part(body)?;
        let count = body.first_chunk::<4>().map_or(0, |count| u32::from_le_bytes(*count));
        if count as usize > MAX_ROWS {
            self.pass(FromXl::Forget)?;
            self.pass(FromXl::Bytes(header.bytes().to_vec()))?;
            return self.parts(body);
        }
        // A valid record needs no padding; with it, one that is too short would be taken for valid and sent on mended.
        let length = length.min(header.length as usize);
        let record = Arc::new(PageRecord::parse(buffer, length, header.body_offset())?);
        let ids = ids_of(&record, record.page_count(), PageRecord::pages, &self.key, &self.pool);
        self.pass(FromXl::Pages { record, ids })
    }

    /// Bytes of any length as they are, in frames of a bounded size.
    fn parts(&self, bytes: &[u8]) -> Result<(), EngineError> {
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

struct Back {
    /// The other end of [`Front::buffers`].
    give_back: Sender<Vec<u8>>,
    link: Link,
    policy: Arc<Mutex<LevelPolicy>>,
    figures: Arc<Mutex<Figures>>,
    pacing: Option<Arc<Pacing>>,
    last_pfn: Option<Pfn>,
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

    fn send(&self, kind: Kind, parts: &[&[u8]]) -> Result<(), EngineError> {
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
        self.note(&blocks, ready.pages, ready.first, ready.last);
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

    fn note(&mut self, blocks: &[ReadyBlock], pages: Pages, first: Option<Pfn>, last: Option<Pfn>) {
        let mut figures = self.figures.lock();
        // A pass begins where the page numbers fall (a hint: two short passes can ascend).
        if first <= self.last_pfn || self.last_pfn.is_none() {
            figures.iteration += 1;
            figures.iteration_pages = 0;
        }
        self.last_pfn = last;
        figures.add_rows(pages);
        for block in blocks {
            *figures.blocks.entry(block.name.clone()).or_default() += 1;
        }
    }
}
