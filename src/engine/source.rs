//! The source's phases: between xl, which believes that it talks to ssh, and the other host.
//!
//! ```text
//!   xl migrate                  source agent                              destination agent
//!      │                           │ ◀── Have ────────────────────────────────┤
//!      │ ◀── R0 ───────────────────┤ ◀── Xl(R0) ──────────────────────────────┤  wait_ready
//!      ├─ S0 S1 S2 S3… ───────────▶├─ Bytes, Guest, Rows…, End ──────────────▶│  send_stream
//!      │                           │ ◀── Need, Settled ─ ─ Contents ─ ─ ─ ─ ─▶│
//!      │                           │ ◀── Verdict ─────────────────────────────┤  settle
//!      │ ◀── R1 ───────────────────┤ ◀── Xl(R1) ──────────────────────────────┤  wait_received
//!      │                           ├─ Ping ──────────▶ ◀────────────── Pong ──┤
//!      ├─ GO ─────────────────────▶├─ Go ════ point of no return ════════════▶│  hand_over
//!      │                           ├─ Model ─────────────────────────────────▶│
//!      │                           ├─ Late ─ ─ ─ ─ ─ ─▶ ◀─ ─ Want, Started ─ ─┤  (pages that follow; rejoin.rs)
//!      │ ◀── R2, status [, R3] ────┤ ◀── Xl ──────────────────────────────────┤  result
//! ```
use std::io::{self, Read, Write};
use std::num::NonZeroU64;
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use crossbeam_channel::{Receiver, Sender, unbounded};
use parking_lot::Mutex;

use super::behind::LeaveBehind;
use super::contents::Holdings;
use super::error::peer_words;
use super::leaving::Leaving;
use super::link::{Link, LinkEnds, Watch, Watched};
use super::pacing::{self, Pacing};
use super::rejoin::{Connect, Patience, SILENCE};
use super::sending::{Prepared, Sending, Sent};
use super::serving::Serving;
use super::threads::{join, spawn};
use super::verify::read_back;
use super::{Contents, EngineError, FrameError, FrameSource, Holding, LateJournal, chain};
use crate::codec::Compressor;
use crate::page::ContentKey;
use crate::report::{Figures, VerifyFigures};
use crate::stream::{GuestType, Reader, xl};
use crate::table::PageTable;
use crate::wire::{Agreement, Frame, FrameReader, Hello, Kind, Verdict, WireError};

mod following;
mod hearing;

pub use following::{Following, follow};
use hearing::{Signal, read_frames};

/// How long the other host may take to clean up after the migration was given up.
const CLEAN_UP: Duration = Duration::from_secs(20);

/// How long the stream may be held back until the other host has said what it holds.
const HAVE: Duration = Duration::from_secs(5);

/// How long the end of the guest's copy may be held back while what it leaves is kept: so long, and for 1 part in so
/// many of the migration's time.
const LEAVING: Duration = Duration::from_secs(10);
const LEAVING_SHARE: u32 = 20;

/// How long an answer of the other host's holds before GO, for which xl needs a moment.
const PROBE_HOLDS: Duration = Duration::from_millis(500);

/// What the source's phases wait for.
pub enum Event {
    Frame(Frame),
    LinkLost(WireError),
    /// The pipeline has ended, well or not.
    Streamed(Box<Result<StreamEnd, EngineError>>),
    /// The 44 bytes after R1, or nothing when xl closed its end.
    Go(Option<[u8; 44]>),
    /// Somebody wants the migration to end: a signal, the death of xl.
    Stop(String),
    /// xl has ended. Once the guest has been let go that ends nothing.
    XlEnded,
    /// The suspended guest has been destroyed, or runs again, before all of its pages had gone.
    CopyGone(FrameError),
}

/// xl's pipe and the table after the stream.
pub struct StreamEnd {
    sent: Sent<Box<dyn Read + Send>>,
}

type Comparing = thread::JoinHandle<Result<(Option<Box<dyn FrameSource>>, u64), EngineError>>;

/// How a migration ended, and who owns a runnable guest.
#[derive(Debug)]
pub enum Ending {
    /// xl was told how it went; the exit status of the command on the other host.
    Completed { status: i32 },
    /// Nothing was handed over: the guest is the source's, xl has been or will be told by the end of this process.
    SourceOwns(EngineError),
    /// GO may have arrived: at most one side runs the guest, and which one is not known here.
    Unknown(EngineError),
}

/// A connection on which both sides speak the same version.
pub struct Negotiated {
    link: Link,
    reader: FrameReader<Watched<Box<dyn Read + Send>>>,
    watch: Watch,
    pub agreement: Agreement,
    key: ContentKey,
    hello: Hello,
}

/// Exchanges hellos. Errors: [`WireError::Closed`] and [`WireError::NoHello`] when no xenfold answered,
/// [`WireError::NoCommonVersion`] when one of another time did: then the stream can still be carried plain.
///
/// Silence counts from the peer's hello on: before it ssh may wait for a password, and has timeouts of its own.
pub fn negotiate(link: LinkEnds, hello: &Hello, timeout: Duration) -> Result<Negotiated, EngineError> {
    let LinkEnds {
        mut to_peer,
        mut from_peer,
        hangup,
        carrier,
    } = link;
    let key = hello.key()?;
    // A failure to send shows as an end when reading, which tells more.
    let _ = hello.write(&mut to_peer);
    let agreement = hello.agree(&mut from_peer)?;
    let (from_peer, watch) = Watched::new(from_peer, timeout, hangup.clone())?;
    let link = Link::start(to_peer, hangup, carrier)?;
    Ok(Negotiated {
        link,
        reader: FrameReader::new(from_peer),
        watch,
        agreement,
        key,
        hello: hello.clone(),
    })
}

/// What the source's phases work on.
pub struct Source {
    link: Link,
    watch: Watch,
    events: Receiver<Event>,
    event_sender: Sender<Event>,
    /// Bytes of the destination's xl that have not been handed to the source's xl yet.
    inbox: Vec<u8>,
    /// The destination's answer to End, until it has been looked at.
    verdict: Option<Verdict>,
    /// Nothing comes from the other host any more.
    link_lost: bool,
    patience: Patience,
    /// Sets up another connection while pages follow the guest; what we said of ourselves, with the token.
    connect: Option<Connect>,
    journal: Option<Box<dyn LateJournal>>,
    hello: Hello,
    /// Bytes of the destination's xl that have come.
    heard: u64,
    /// Asked when the other host's xl had the guest.
    probe: Option<Probe>,
    /// xl knows that the guest runs over there: nothing of it is needed any more.
    reported: bool,
    /// GO has been sent: there is nothing left to stop.
    handed_over: bool,
    to_xl: Box<dyn Write + Send>,
    failing: Option<Box<dyn FnOnce() + Send>>,
    while_xl_waits: Option<Box<dyn FnOnce() + Send>>,
    key: ContentKey,
    agreement: Agreement,
    /// Reads the suspended source's frames.
    frames: Option<Box<dyn FrameSource>>,
    verify: bool,
    /// Keeps what the guest leaves here.
    leaving: Option<Leaving>,
    /// Sends the pages that follow the guest.
    serving: Option<Serving>,
    /// What the destination wants of them before the end of the stream has been noticed here.
    early_wants: Vec<Vec<u8>>,
    /// What is needed to hold pages back.
    holding: Option<Holding>,
    learnt: Option<Learnt>,
    bandwidth: Option<NonZeroU64>,
    /// What this host holds beside the guest.
    contents: Option<Arc<dyn Contents>>,
    /// What the destination holds, where rows may name it.
    holdings: Option<Arc<Holdings>>,
    /// The destination has said what it holds, for now.
    told: bool,
    compressor: Compressor,
    figures: Arc<Mutex<Figures>>,
    pacing: Arc<Pacing>,
    /// Until the stream is sent.
    prepared: Option<Prepared>,
    start: Instant,
}

/// The pipeline may wait for answers that do not come any more.
impl Drop for Source {
    fn drop(&mut self) {
        self.pacing.close();
    }
}

/// A question whether the other host is there.
struct Probe {
    nonce: [u8; 8],
    answered: Option<Instant>,
}

impl Probe {
    fn came(&mut self, echo: &[u8]) {
        if echo == self.nonce {
            self.answered = Some(Instant::now());
        }
    }

    /// Whether the answer came so long ago that it says nothing of now.
    fn is_old(&self) -> bool {
        self.answered.is_some_and(|at| at.elapsed() > PROBE_HOLDS)
    }
}

/// What is known at the end of how the guest writes ([`crate::policy::Kept`]), for its next migration.
pub type Learnt = Box<dyn FnOnce() -> Option<Vec<u8>> + Send>;

/// Everything the engine needs beside the connection.
pub struct SourceSetup {
    pub to_xl: Box<dyn Write + Send>,
    /// Called when the migration has failed, before xl hears of it: from then on xl resumes the guest, and ends.
    pub failing: Box<dyn FnOnce() + Send>,
    /// Called when both xl are ready and ours waits: it has read the guest's configuration, and has done nothing to the guest.
    pub while_xl_waits: Option<Box<dyn FnOnce() + Send>>,
    /// Reads the guest's frames while it is suspended.
    pub frames: Option<Box<dyn FrameSource>>,
    /// Count frames that are not what was carried any more.
    pub verify: bool,
    /// Pages that will be written again are held back with this.
    pub holding: Option<Holding>,
    /// Asked when the guest has been let go: the other host keeps it.
    pub learnt: Option<Learnt>,
    /// Bytes a second that the stream may take of the link.
    pub bandwidth: Option<NonZeroU64>,
    /// What this host holds beside the guest.
    pub contents: Option<Arc<dyn Contents>>,
    /// Sets up another connection when this one is lost while pages follow the guest.
    pub connect: Option<Connect>,
    /// Where it is written down then how another process can go on.
    pub journal: Option<Box<dyn LateJournal>>,
    pub figures: Arc<Mutex<Figures>>,
    /// Where the caller's own events ([`Event::Stop`]) come from; see [`events`].
    pub events: (Sender<Event>, Receiver<Event>),
}

/// The channel that connects a caller's threads with the phases.
pub fn events() -> (Sender<Event>, Receiver<Event>) {
    unbounded()
}

/// What the pages of a guest held when it left, for a later migration of it.
pub struct Left {
    contents: Arc<dyn Contents>,
    table: Arc<PageTable>,
}

impl Left {
    /// Takes its time, so nobody should wait for this.
    pub fn save(&self) {
        self.contents.save_image(self.table.ids());
    }
}

/// Runs a migration from R0 to R2. `from_xl` is the pipe on which xl sends its stream. With a guest that left, what it
/// leaves.
pub fn run(negotiated: Negotiated, setup: SourceSetup, from_xl: Box<dyn Read + Send>) -> (Ending, Option<Left>) {
    let mut source = match Source::new(negotiated, setup) {
        Ok(source) => source,
        Err(error) => return (Ending::SourceOwns(error), None),
    };
    let early = (|| {
        source.wait_ready()?;
        let end = source.send_stream(from_xl)?;
        source.settle(&end)?;
        // Before xl can send it: when no thread can be started xl has still to be told nothing.
        source.expect_go(end.sent.xl)?;
        source.wait_received()?;
        Ok(end.sent.table)
    })();
    let (ending, table) = match early {
        Ok(table) => (source.hand_over(), Some(table)),
        Err(error) => (Ending::SourceOwns(error), None),
    };
    let ending = source.close(ending);
    let left = match (&ending, &source.contents, table) {
        (Ending::Completed { .. }, Some(contents), Some(table)) => Some(Left {
            contents: contents.clone(),
            table,
        }),
        _ => None,
    };
    (ending, left)
}

impl Source {
    pub fn new(negotiated: Negotiated, setup: SourceSetup) -> Result<Source, EngineError> {
        let Negotiated {
            link,
            reader,
            watch,
            agreement,
            key,
            hello,
        } = negotiated;
        let SourceSetup {
            to_xl,
            failing,
            while_xl_waits,
            frames,
            verify,
            holding,
            learnt,
            bandwidth,
            contents,
            connect,
            journal,
            figures,
            events: (event_sender, events),
        } = setup;
        let to_events = event_sender.clone();
        spawn("xenfold-back", move || read_frames(reader, &to_events))?;
        let (inbox, verdict, link_lost, start) = (Vec::new(), None, false, Instant::now());
        let holdings = agreement.contents.then(Arc::default);
        let (agreement_late, announces) = (agreement.late, agreement.early);
        let bound = if agreement.contents {
            pacing::BOUND_BYTES
        } else {
            u64::MAX
        };
        Ok(Source {
            link,
            watch,
            events,
            event_sender,
            inbox,
            verdict,
            link_lost,
            patience: Patience::default(),
            connect,
            journal,
            hello,
            heard: 0,
            probe: None,
            reported: false,
            handed_over: false,
            to_xl,
            failing: Some(failing),
            while_xl_waits,
            key,
            agreement,
            frames,
            verify,
            leaving: None,
            serving: None,
            early_wants: Vec::new(),
            holding: holding.map(|holding| Holding {
                behind: holding
                    .behind
                    .filter(|_| agreement_late)
                    .map(|plan| LeaveBehind { announces, ..plan }),
                ..holding
            }),
            learnt,
            bandwidth,
            contents,
            holdings,
            told: false,
            compressor: Compressor::default(),
            figures,
            pacing: Arc::new(Pacing::new(bound)),
            prepared: Some(Prepared::start()?),
            start,
        })
    }

    /// Waits for what [`Source::new`] has set going. Nobody has to: xl sends nothing before the other host's xl has started,
    /// which takes longer. A measurement without xl does.
    pub fn wait_prepared(&mut self) -> Result<(), EngineError> {
        if let Some(prepared) = &mut self.prepared {
            prepared.wait();
        }
        self.wait_have()
    }

    /// Phase 1: the receiving xl is there (R0). xl waits for it before it does anything to the guest.
    fn wait_ready(&mut self) -> Result<(), EngineError> {
        let banner = self.message(xl::R0_BANNER.len())?;
        if banner == xl::R0_BANNER {
            if let Some(work) = self.while_xl_waits.take() {
                work();
            }
            if let Some(holding) = &mut self.holding {
                holding.watch_guest();
            }
        }
        self.tell_xl(&banner)?;
        if banner != xl::R0_BANNER {
            return Err(EngineError::Protocol("the other host's xl did not send its banner"));
        }
        self.figures.lock().setup_time_ms = self.start.elapsed().as_millis() as u64;
        Ok(())
    }

    /// Phase 2: all of xl's stream, as rows.
    pub fn send_stream(&mut self, from_xl: Box<dyn Read + Send>) -> Result<StreamEnd, EngineError> {
        self.wait_have()?;
        let prepared = self.prepared.take().map_or_else(Prepared::start, Ok)?;
        let sending = Sending {
            stream: Reader::new(from_xl).pass_unknown(true),
            link: self.link.clone(),
            key: self.key.clone(),
            prepared,
            frames: self.agreement.peer.frames,
            window_rows: self.agreement.peer.window_rows,
            pacing: self.agreement.peer.paces.then(|| self.pacing.clone()),
            bandwidth: self.bandwidth,
            holdings: self.holdings.clone(),
            contents: self.contents.clone(),
            holding: self.holding.take(),
            table: PageTable::default(),
            figures: self.figures.clone(),
        };
        let done = self.event_sender.clone();
        spawn("xenfold-stream", move || {
            let end = sending.run().map(|sent| StreamEnd { sent });
            // Nobody waits any more when the migration was stopped meanwhile.
            let _ = done.send(Event::Streamed(Box::new(end)));
        })?;
        loop {
            match self.next()? {
                Signal::Streamed(end) => {
                    log::debug!("all of xl's stream has been sent");
                    let mut end = (*end)?;
                    self.serve_late(&mut end)?;
                    return Ok(end);
                }
                Signal::Exit(status) => return Err(EngineError::RemoteEnded(status)),
                _ => {}
            }
        }
    }

    /// The destination says what it holds before the first page: what it says later comes too late for most of them.
    fn wait_have(&mut self) -> Result<(), EngineError> {
        let until = Instant::now() + HAVE;
        while self.holdings.is_some() && !self.told && Instant::now() < until {
            let Ok(event) = self.events.recv_deadline(until) else {
                log::warn!("the other host does not say which contents it holds");
                break;
            };
            if let Some(Signal::Exit(status)) = self.judge(event)? {
                return Err(EngineError::RemoteEnded(status));
            }
        }
        Ok(())
    }

    /// Phase 3: the destination, which keeps libxl's END back, compares what it rebuilt with what was sent.
    pub fn settle(&mut self, end: &StreamEnd) -> Result<(), EngineError> {
        let comparing = self.changed_since(end)?;
        if comparing.is_none() {
            self.leave(end)?;
        }
        loop {
            // It may have come while the pipeline was ending.
            match self.verdict.take() {
                Some(verdict) if verdict.accepted => {
                    log::debug!("the other host has all of it");
                    self.serving.iter().for_each(Serving::push);
                    let Some(comparing) = comparing else { return Ok(()) };
                    let (frames, changed) = join(comparing)?;
                    self.frames = frames;
                    self.figures.lock().verify = Some(VerifyFigures {
                        equal_pages: verdict.verified_pages,
                        rewritten_by_xen_pages: verdict.rewritten_by_xen_pages,
                        changed_at_source_pages: changed,
                        time_ms: verdict.time_ms,
                    });
                    return self.leave(end);
                }
                Some(verdict) => return Err(EngineError::Refused(peer_words(verdict.reason.as_bytes()))),
                None => {}
            }
            if let Signal::Exit(status) = self.next()? {
                return Err(EngineError::RemoteEnded(status));
            }
        }
    }

    /// With `--verify`: counts the frames of the suspended source that are not any more what was carried. Backends may
    /// still finish reads into them, so this is counted, not judged. In a thread: the destination may still ask for pages.
    fn changed_since(&mut self, end: &StreamEnd) -> Result<Option<Comparing>, EngineError> {
        if !self.verify {
            return Ok(None);
        }
        let (table, key) = (end.sent.table.clone(), self.key.clone());
        let mut frames = self.frames.take();
        let readable = end.sent.guest_type == GuestType::Hvm;
        spawn("xenfold-compare", move || {
            let result = match frames.as_mut().filter(|_| readable) {
                Some(frames) => read_back(table.ids(), frames.as_mut(), &key).map(|verified| verified.different),
                None => Ok(0),
            };
            let changed = result.unwrap_or_else(|error| {
                log::warn!("the suspended guest's frames cannot be compared: {error}");
                0
            });
            Ok((frames, changed))
        })
        .map(Some)
    }

    /// From here on the guest's frames hold what its image will name.
    fn leave(&mut self, end: &StreamEnd) -> Result<(), EngineError> {
        if end.sent.guest_type == GuestType::Hvm
            && let Some(contents) = self.contents.clone()
            && let Some(frames) = self.frames.take()
        {
            let (table, key) = (end.sent.table.clone(), self.key.clone());
            self.leaving = Some(Leaving::start(table, frames, contents, key)?);
        }
        Ok(())
    }

    /// Phase 4: the receiving xl has the guest, paused (R1). From the moment R1 is written xl counts on the other side.
    fn wait_received(&mut self) -> Result<(), EngineError> {
        let begin = Instant::now();
        let received = self.message(xl::R1_READY.len())?;
        self.figures.lock().devices_time_ms = begin.elapsed().as_millis() as u64;
        log::debug!("the other host's xl has the guest");
        // Xl takes a moment to answer with GO, in which the other host can say that it is there.
        self.probe = Some(self.ask()?);
        self.tell_xl(&received)?;
        if received != xl::R1_READY {
            return Err(EngineError::Protocol(
                "the other host's xl did not say that it received the guest",
            ));
        }
        Ok(())
    }

    /// Reads what xl says after the stream: GO, or its end.
    fn expect_go(&self, mut from_xl: Box<dyn Read + Send>) -> Result<(), EngineError> {
        let to_events = self.event_sender.clone();
        spawn("xenfold-go", move || {
            let mut go = [0; xl::GO.len()];
            let came = from_xl.read_exact(&mut go).is_ok();
            let _ = to_events.send(Event::Go(came.then_some(go)));
        })?;
        Ok(())
    }

    /// Phase 5: GO. When anything breaks before it is sent, xl is answered here (R2 with status 1, then R3) and
    /// resumes the guest; after it nothing is answered that did not come from the destination.
    fn hand_over(&mut self) -> Ending {
        let mut failure = None;
        let go = loop {
            match self.next() {
                Ok(Signal::Go(Some(go))) if go == *xl::GO => break go,
                Ok(Signal::Go(_)) => return Ending::SourceOwns(xl_ended()),
                Ok(Signal::Exit(status)) => failure = Some(EngineError::RemoteEnded(status)),
                Ok(Signal::Pong(echo)) => self.probe.iter_mut().for_each(|probe| probe.came(&echo)),
                Ok(_) => {}
                // xl has R1 and will send GO; only then can it be told that nothing became of it.
                Err(error) => failure = failure.or(Some(error)),
            }
        };
        if let Some(error) = failure.or_else(|| self.is_there().err()) {
            return self.take_back(error);
        }
        log::debug!("xl lets the guest go");
        // ── Point of no return: the destination may run the guest from here on. Nothing below fails ordinarily. ──
        if let Err(error) = self.link.send(Kind::Go, &[&go]) {
            // What the other host said before the connection broke tells more, and is still there to be read.
            log::warn!("GO could not be sent: {error}");
        }
        self.handed_over = true;
        if self.may_connect_again() {
            self.watch.shorten(SILENCE);
            self.watch.expect_answers(self.link.carrier());
        }
        // With pages that follow these come first.
        if self.serving.is_none() {
            self.tell_learnt();
        }
        self.result()
    }

    /// The other host keeps what has been learnt of the guest's writes. Behind GO and behind late pages: the guest does not wait
    /// for it.
    fn tell_learnt(&mut self) {
        let learnt = self.learnt.take().filter(|_| self.agreement.peer.keeps_model);
        if let Some(model) = learnt.and_then(|learnt| learnt()) {
            // Only its next migration would miss it.
            let _ = self.link.send(Kind::Model, &[&model]);
        }
    }

    /// Asks the other host whether it is there.
    fn ask(&self) -> Result<Probe, EngineError> {
        let nonce = (self.start.elapsed().as_nanos() as u64).to_le_bytes();
        self.say(Kind::Ping, &[&nonce])?;
        Ok(Probe { nonce, answered: None })
    }

    /// Whether the other host is still there, right before GO.
    fn is_there(&mut self) -> Result<(), EngineError> {
        let mut probe = match self.probe.take() {
            Some(probe) if !probe.is_old() => probe,
            _ => self.ask()?,
        };
        while probe.answered.is_none() {
            match self.next()? {
                Signal::Pong(echo) => probe.came(&echo),
                Signal::Exit(status) => return Err(EngineError::RemoteEnded(status)),
                _ => {}
            }
        }
        Ok(())
    }

    /// Answers xl in the destination's place: the guest did not start there, the source may resume it.
    fn take_back(&mut self, error: EngineError) -> Ending {
        self.failing();
        let answer = [&xl::R2_REPORT[..], &[1], &xl::R3_GO_BACK[..]].concat();
        match self.tell_xl(&answer) {
            Ok(()) => Ending::SourceOwns(error),
            Err(_) => Ending::SourceOwns(EngineError::Stopped(format!("xl ended, and before that: {error}"))),
        }
    }

    /// Phase 6: how it went over there (R2), passed on to xl, which then destroys its copy or takes it back.
    fn result(&mut self) -> Ending {
        let report = match self.last_words(xl::R2_REPORT.len() + 1) {
            Ok(report) => report,
            Err(error) => return Ending::Unknown(error),
        };
        log::debug!("the other host's xl has started the guest, or not");
        let started = report.strip_prefix(xl::R2_REPORT) == Some(&[0]);
        self.figures.lock().completed = started;
        // The guest runs over there: only the removal of its copy waits, and for that only a while.
        if let Some(leaving) = self.leaving.take_if(|_| started) {
            leaving.wait(LEAVING.min(self.start.elapsed() / LEAVING_SHARE));
        }
        // That xl is gone changes nothing any more.
        let _ = self.tell_xl(&report);
        self.reported = started;
        if report.get(..xl::R2_REPORT.len()) != Some(xl::R2_REPORT) {
            return Ending::Unknown(EngineError::Protocol(
                "the other host's xl did not say how the guest's start went",
            ));
        }
        if started {
            // Whoever took the guest over after an outage does not keep it.
            let outages = self.figures.lock().late.as_ref().map_or(0, |late| late.outages);
            if self.serving.is_some() && outages == 0 {
                self.tell_learnt();
            }
            return Ending::Completed {
                status: self.exit_status(),
            };
        }
        match self.last_words(xl::R3_GO_BACK.len()) {
            Ok(back) => {
                let _ = self.tell_xl(&back);
                if back != xl::R3_GO_BACK {
                    let why = "the other host's xl did not give the guest back";
                    return Ending::Unknown(EngineError::Protocol(why));
                }
                Ending::SourceOwns(EngineError::Refused("the guest could not be started there".into()))
            }
            Err(error) => Ending::Unknown(error),
        }
    }

    /// What the other host's xl says after GO. An agent that gives up then has not handed GO over; xl itself says so, too.
    fn last_words(&mut self, length: usize) -> Result<Vec<u8>, EngineError> {
        loop {
            match self.message(length) {
                // With pages on their way it is no last word: what it cannot have, it will not report on.
                Err(EngineError::PeerAborted(why)) if self.serving.is_none() => {
                    log::warn!("the other host gave up: {why}");
                }
                result => return result,
            }
        }
    }

    fn exit_status(&mut self) -> i32 {
        loop {
            match self.next() {
                Ok(Signal::Exit(status)) => return status,
                Ok(_) => {}
                // The guest runs over there; how its xl ended afterwards is of no consequence.
                Err(_) => return 0,
            }
        }
    }

    /// Ends the connection. After a failure the other host is told, and given time to clean up, so that the next
    /// migration of the same guest finds nothing in its way.
    pub fn close(&mut self, ending: Ending) -> Ending {
        let mut figures = self.figures.lock();
        figures.time_elapsed_ms = self.start.elapsed().as_millis() as u64;
        figures.wire_bytes = self.link.bytes();
        drop(figures);
        if self.reported && self.agreement.rejoin.is_some() {
            // The other host waits for this, in case that we had to connect again.
            self.link.send_if_free(Kind::Done, &[]);
        }
        let copy_gone = match &ending {
            Ending::Unknown(error @ EngineError::CopyGone(_)) => Some(error),
            _ => None,
        };
        if let Some(error) = copy_gone {
            self.link.send_if_free(Kind::Abort, &[chain(error).as_bytes()]);
        }
        if !matches!(ending, Ending::Unknown(_)) || copy_gone.is_some() {
            self.journal.iter_mut().for_each(|journal| journal.end());
        }
        if let Ending::SourceOwns(error) = &ending {
            self.serving = None;
            self.failing();
            // The stream's threads let go of xl's pipe, too.
            self.pacing.close();
            // xl resumes the guest when its pipe ends, and need not wait for the other host's cleaning up.
            self.to_xl = Box::new(io::sink());
            let reason = chain(error);
            let until = Instant::now() + CLEAN_UP;
            if self.link.send_if_free(Kind::Abort, &[reason.as_bytes()]) && !self.link_lost {
                while let Ok(event) = self.events.recv_deadline(until) {
                    match event {
                        Event::LinkLost(_) => break,
                        Event::Frame(frame) if frame.kind == Kind::Exit => break,
                        _ if Instant::now() > until => break,
                        _ => {}
                    }
                }
            }
            self.link.hang_up();
        }
        ending
    }

    fn failing(&mut self) {
        if let Some(failing) = self.failing.take() {
            failing();
        }
    }
}

fn xl_ended() -> EngineError {
    EngineError::Stopped("xl ended before it let the guest go".into())
}
