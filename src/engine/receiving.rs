//! Rows to stream: frames in, xl's pipe out, byte for byte what the source's xl wrote.
//!
//! Three threads in a row behind a queue of frames: [`Decoder`] has blocks decompressed and contents looked up,
//! [`Assembler`] puts records together and resolves references, [`Outlet`] hashes what it is about to write, checks it
//! against the table and writes it. The workers of the pool do the looking up, decompressing and hashing.
use std::io::{self, Write};
use std::ops::Range;
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::Duration;

use crossbeam_channel::{Receiver, Sender, bounded};
use parking_lot::Mutex;

use super::assemble::{Applied, Assembler, Assembling};
use super::decode::{Answer, Answers, Backlog, Decoder, Intake};
use super::early::Early;
use super::link::Link;
use super::outlet::Outlet;
use super::pool::{Pending, Pool};
use super::rebuilt::{RebuiltRecord, Spare};
use super::threads::{first_cause, join, spawn};
use super::{Contents, EngineError, Frames};
use crate::codec::{CodecError, Row};
use crate::page::{ContentId, ContentKey, Pfn};
use crate::report::DestinationFigures;
use crate::stream::PageType;
use crate::table::PageIds;
use crate::wire::{End, Frame};

/// Records that may wait between two stages, beside the one that each has in hand.
const STAGE_DEPTH: usize = 0;

/// The pipe to the receiving xl.
pub struct XlInput {
    pub writer: Box<dyn Write + Send>,
    pub unread: Unread,
}

/// Bytes in the pipe to xl that it has not read yet (FIONREAD). Errors when nobody reads any more.
pub type Unread = Arc<dyn Fn() -> io::Result<u64> + Send + Sync>;

/// What a rebuilding is made from.
pub struct Rebuilding {
    pub xl: XlInput,
    /// Reads the guest under construction; without it only recent pages can be referred to.
    pub frames: Frames,
    pub key: ContentKey,
    /// Both sides speak of contents.
    pub speaks_contents: bool,
    /// Pages may follow the guest.
    pub late: bool,
    /// Takes late pages out while the stream runs.
    pub(super) early: Option<Arc<Early>>,
    /// Contents that this host holds.
    pub contents: Option<Arc<dyn Contents>>,
    /// Where to say what is needed and what has been taken up.
    pub link: Option<Link>,
    /// How long the source may take to send what is needed.
    pub patience: Duration,
    pub figures: Arc<Mutex<DestinationFigures>>,
}

/// A stream that is being rebuilt.
pub struct Receiving {
    intake: Intake,
    answers: Answers,
    stopper: Stopper,
    decoder: JoinHandle<Result<(), EngineError>>,
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
    /// Pages that are to follow the guest, ascending.
    pub late: Vec<Pfn>,
}

/// From [`Decoder`] to [`Assembler`].
pub(super) enum Arrived {
    Bytes(Vec<u8>),
    Guest(u32),
    Rows(ArrivedRows),
    Forget,
    End(End),
}

pub(super) struct ArrivedRows {
    /// Counted from 0 over all Rows frames.
    pub number: u64,
    pub frozen: bool,
    pub reserved: u32,
    pub entries: Vec<u64>,
    pub rows: Vec<Row>,
    pub blocks: Vec<ArrivedBlock>,
    pub deltas: Vec<DeltaBlock>,
    pub lookups: Vec<Pending<Lookup>>,
    /// Where answers come for what was not found.
    pub answers: Option<Receiver<Answer>>,
    pub body: Arc<Vec<u8>>,
}

pub(super) enum ArrivedBlock {
    /// Pages where they stand in the frame.
    Raw(Range<usize>),
    Packed(Pending<Result<Vec<u8>, CodecError>>),
}

/// A block that needs its bases before it can be decompressed.
pub(super) struct DeltaBlock {
    pub codec: u8,
    /// Its bytes in the frame.
    pub range: Range<usize>,
    /// Places of its pages in the record's list.
    pub rows: Vec<u16>,
}

/// What was found of the contents that some rows name.
pub(super) struct Lookup {
    /// The rows, and what each was looking for.
    pub rows: Vec<u16>,
    /// Their contents, one behind the other, and which are right.
    pub pages: Vec<u8>,
    pub right: Vec<bool>,
    /// Rows that the source was asked for.
    pub needed: Vec<u16>,
}

/// From [`Assembler`] to [`Outlet`].
pub(super) enum Assembled {
    Bytes(Vec<u8>),
    Record(AssembledRecord),
    Forget,
    End(End),
}

pub(super) struct AssembledRecord {
    pub record: Arc<RebuiltRecord>,
    pub frozen: bool,
    pub reserved: u32,
    pub entries: Vec<u64>,
    pub rows: Vec<Row>,
    pub ids: Vec<Pending<Vec<Option<ContentId>>>>,
}

impl Receiving {
    /// Starts the threads.
    pub fn start(parts: Rebuilding) -> Result<Receiving, EngineError> {
        let Rebuilding {
            xl,
            frames,
            key,
            speaks_contents,
            late,
            early,
            contents,
            link,
            patience,
            figures,
        } = parts;
        let pool = Pool::start()?;
        let (to_assembler, from_decoder) = bounded(STAGE_DEPTH);
        let (to_outlet, from_assembler) = bounded(STAGE_DEPTH);
        let (stop, stopped) = bounded(1);
        let applied = Arc::new(Applied::new(xl.unread.clone()));
        let backlog = Arc::new(Backlog::default());
        let answers = Answers::default();
        let spare_blocks = Spare::default();
        let decoder = Decoder {
            pool: pool.clone(),
            spare_blocks: spare_blocks.clone(),
            key: key.clone(),
            speaks_contents,
            contents: contents.clone(),
            link: link.clone(),
            answers: answers.clone(),
            records: 0,
        };
        if let Some(early) = &early {
            early.start(applied.clone())?;
        }
        let assembler = Assembler::new(Assembling {
            out_bound: early.as_ref().map_or(0, |early| early.bound()),
            frames,
            applied: applied.clone(),
            pool,
            spare_blocks,
            key: key.clone(),
            answers: answers.clone(),
            patience,
            link,
            figures,
        });
        let outlet = Outlet::new(xl, applied, key, contents, late, early);
        let queue = backlog.clone();
        let decoder = spawn("xenfold-decode", move || {
            let result = decoder.run(&queue, to_assembler);
            queue.close();
            result
        })?;
        let assembler = spawn("xenfold-rebuild", move || {
            assembler.run(from_decoder, stopped, to_outlet)
        })?;
        let outlet = spawn("xenfold-write", move || outlet.run(from_assembler))?;
        Ok(Receiving {
            intake: Intake(backlog),
            answers,
            stopper: Stopper(stop),
            decoder,
            assembler,
            outlet,
        })
    }

    /// Whether a stage has ended, which before the End frame means that it failed.
    pub fn has_ended(&self) -> bool {
        self.decoder.is_finished() || self.assembler.is_finished() || self.outlet.is_finished()
    }

    pub fn stopper(&self) -> Stopper {
        self.stopper.clone()
    }

    /// Where pages go that were asked for: they overtake the frames that wait.
    pub fn answers(&self) -> Answers {
        self.answers.clone()
    }

    /// Takes one frame of the stream, or a Ping to be answered in its turn. Blocks while too much waits to be decoded.
    /// Errors: a stage has failed ([`Receiving::finish`] tells why).
    pub fn frame(&mut self, frame: Frame) -> Result<(), EngineError> {
        self.intake.0.push(frame)
    }

    /// Waits until all that came has been written. Frames come back where they can be found by page number. Errors: the
    /// cause of whatever failed first; `WorkerLost` when the stream ended before its End frame and nothing else failed.
    ///
    /// The answers to what was asked for must still be able to come meanwhile.
    pub fn finish(self) -> Result<(Rebuilt, Frames), EngineError> {
        drop(self.intake);
        let decoded = join(self.decoder);
        let frames = join(self.assembler);
        let rebuilt = join(self.outlet);
        match (decoded, frames, rebuilt) {
            (Ok(()), Ok(frames), Ok(rebuilt)) => Ok((rebuilt, frames)),
            (decoded, frames, rebuilt) => first_cause(
                [decoded.err(), frames.err(), rebuilt.err()],
                Err(EngineError::WorkerLost),
            ),
        }
    }
}

pub(super) fn pfn_of(entry: u64) -> Pfn {
    Pfn::new(entry & Pfn::MAX.get()).unwrap_or_default()
}

pub(super) fn page_type(entry: u64) -> Option<PageType> {
    PageType::new((entry >> 60) as u8)
}

pub(super) fn is_plain(entry: u64) -> bool {
    page_type(entry) == Some(PageType::NoTab)
}
