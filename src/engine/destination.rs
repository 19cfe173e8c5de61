//! The destination's phases: in front of `xl migrate-receive`, which believes that it talks to the source's xl.
//!
//! source.rs beside this file draws the sequence.
use std::io::{self, Read, Write};
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use crossbeam_channel::{Receiver, RecvTimeoutError, Sender, bounded, unbounded};
use parking_lot::Mutex;

use super::arriving::Arriving;
use super::early::{Early, Outcome};
use super::landing::{Landing, Late, LateLanding};
use super::link::{Link, LinkEnds, Watch, Watched};
pub use super::receiving::{Rebuilding, Rebuilt, Receiving, Unread, XlInput};
use super::rejoin::{Joined, SILENCE, admit};
use super::said::Said;
use super::threads::spawn;
use super::verify::read_back;
use super::{Contents, EngineError, Frames, GuestPaging, LateJournal, chain};
use crate::page::{ContentKey, Pfn};
use crate::report::{DestinationFigures, LateFigures};
use crate::stream::xl;
use crate::table::PageIds;
use crate::wire::{Agreement, FrameReader, Hello, Kind, Verdict, WireError, have_bodies};

/// How often the pipe to xl is looked at while it takes the last bytes before END, and for what the source has learnt.
const POLL: Duration = Duration::from_millis(1);

/// How often it is looked for a reason to stop while pages come that have to be there before the guest is started.
const RESIDENT_POLL: Duration = Duration::from_millis(100);

/// Timeouts of the connection that a page which was asked for may take: what is under way comes before it.
const PATIENCE: u32 = 4;

/// How long the cause of xl's end, or its last words, may take to show.
const CAUSE: Duration = Duration::from_secs(2);

/// How long a model of the guest's writes is waited for when all else is done: a source may have none, and is not asked.
const MODEL_PATIENCE: Duration = Duration::from_millis(200);

/// How long the agent stays when all is said, until the source has heard it: it may have to connect again for that.
pub(super) const UNHEARD: Duration = Duration::from_secs(3600);

/// What the destination's phases wait for.
pub enum Event {
    Rebuilt(Box<Result<(Rebuilt, Frames), EngineError>>),
    Go(Vec<u8>),
    Abort(String),
    LinkLost(WireError),
    /// xl has closed its standard output: it has ended or is about to.
    XlEnded,
    /// Somebody wants the migration to end: a signal.
    Stop(String),
}

/// The receiving xl.
pub struct XlProcess {
    pub input: XlInput,
    pub output: Box<dyn Read + Send>,
    /// Waits for it and returns its exit status; with `true` the guest must not be left behind: whatever remains of
    /// it is destroyed.
    pub end: Box<dyn FnOnce(bool) -> i32 + Send>,
}

/// A connection on which both sides speak the same version.
pub struct Negotiated {
    link: Link,
    pub reader: FrameReader<Watched<Box<dyn Read + Send>>>,
    watch: Watch,
    pub agreement: Agreement,
    pub key: ContentKey,
    timeout: Duration,
}

/// Exchanges hellos. Errors: no xenfold of a common version at the other end.
pub fn negotiate(link: LinkEnds, hello: &Hello, timeout: Duration) -> Result<Negotiated, EngineError> {
    let LinkEnds {
        mut to_peer,
        from_peer,
        hangup,
        carrier,
    } = link;
    hello.write(&mut to_peer)?;
    let (mut from_peer, watch) = Watched::new(from_peer, timeout, hangup.clone())?;
    let agreement = hello.agree(&mut from_peer)?;
    let key = agreement.peer.key()?;
    let link = Link::start(to_peer, hangup, carrier)?;
    Ok(Negotiated {
        link,
        reader: FrameReader::new(from_peer),
        watch,
        agreement,
        key,
        timeout,
    })
}

/// Everything the engine needs beside the connection.
pub struct DestinationSetup {
    pub xl: XlProcess,
    pub frames: Frames,
    /// What this host holds beside the guest.
    pub contents: Option<Arc<dyn Contents>>,
    /// Where the caller's own events ([`Event::Stop`]) come from; see [`events`].
    pub events: (Sender<Event>, Receiver<Event>),
    /// Leaves pages of the guest behind, where the host can.
    pub paging: Option<Box<dyn GuestPaging>>,
    /// Waits for the source to connect again.
    pub listen: Option<Listen>,
    /// Where it is written down, while pages are late, how another process can go on.
    pub journal: Option<Box<dyn LateJournal>>,
    /// The caller's own, as told to the source.
    pub hello: Hello,
    /// Called once a second while pages follow the guest, with the newest figures.
    pub watching: Option<Watching>,
    /// Called at the end with what the source has learnt of how the guest writes, as it came, for the guest's next migration.
    pub keep_model: Option<KeepModel>,
    /// Called before xl is told to go, to note it where it is found again whatever becomes of the two agents.
    pub before_go: Box<dyn FnOnce() -> io::Result<()> + Send>,
    /// The caller's name, and its processor time and peak memory (ms, bytes) when asked at the end.
    pub program: String,
    pub usage: fn() -> (u64, u64),
}

/// Begins to wait for connections of a source that lost its own; each goes into the channel. What it returns ends that
/// when it is dropped.
pub type Listen = Box<dyn FnOnce(Sender<LinkEnds>) -> io::Result<Box<dyn Send>> + Send>;

/// Keeps a model of the guest's writes ([`crate::policy::Kept`]), which nobody has checked.
pub type KeepModel = Box<dyn FnOnce(&[u8]) + Send>;

/// Hears how the late pages are.
pub type Watching = Box<dyn FnMut(&LateFigures) + Send>;

/// The channel that connects a caller's threads with the phases.
pub fn events() -> (Sender<Event>, Receiver<Event>) {
    unbounded()
}

/// Receives a guest from R0 to R2. Returns the exit status of xl. Errors: the guest was not taken over, and what
/// was built of it has been destroyed.
pub fn run(negotiated: Negotiated, setup: DestinationSetup) -> Result<i32, EngineError> {
    let Negotiated {
        link,
        reader,
        watch,
        agreement,
        key,
        timeout,
    } = negotiated;
    let DestinationSetup {
        xl,
        frames,
        contents,
        events: (event_sender, events),
        paging,
        listen,
        journal,
        hello,
        watching,
        keep_model,
        before_go,
        program,
        usage,
    } = setup;
    let XlProcess { input, output, end } = xl;
    let figures = Arc::new(Mutex::new(DestinationFigures {
        program,
        ..DestinationFigures::default()
    }));

    let late = agreement.late && paging.is_some();
    let (paging, early) = match (paging, agreement.peer.early.clone()) {
        (Some(paging), Some(source)) if agreement.early => (None, Some(Arc::new(Early::new(paging, source)))),
        (paging, _) => (paging, None),
    };
    let receiving = Receiving::start(Rebuilding {
        xl: input,
        frames,
        key: key.clone(),
        speaks_contents: agreement.contents,
        late,
        early: early.clone(),
        contents: contents.clone(),
        link: Some(link.clone()),
        patience: timeout * PATIENCE,
        figures: figures.clone(),
    })?;
    let stopper = receiving.stopper();
    let (landing, said, watch) = (LateLanding::default(), Arc::new(Said::default()), Arc::new(watch));
    let (to_link, to_events, late, saying) = (link.clone(), event_sender.clone(), landing.clone(), said.clone());
    let (joining, joined) = unbounded();
    let (hearing, heard) = bounded::<()>(1);
    let waiting = agreement.rejoin.clone().zip(listen).map(|(token, listen)| Waiting {
        token,
        hello,
        listen,
        joining,
    });
    let model = Arc::new(Mutex::new(None));
    let frames = Arriving {
        model: model.clone(),
        link: link.clone(),
        events: event_sender,
        landing: landing.clone(),
        said: said.clone(),
        joined: waiting.is_some().then_some(joined),
        watch: waiting.is_some().then(|| watch.clone()),
        heard: hearing,
    };
    spawn("xenfold-frames", move || frames.read(reader, receiving))?;
    // When somebody reads the connection, who notices that nobody takes this. Before xl says anything.
    tell_contents(&link, &agreement, contents.as_deref());
    let (relaying, relayed) = bounded::<()>(0);
    spawn("xenfold-relay", move || {
        relay_xl(output, &to_link, &to_events, &late, &saying);
        drop(relaying);
    })?;

    let destination = Destination {
        link: link.clone(),
        watch,
        events,
        key,
        verify: agreement.peer.verify,
        rejoins: waiting.is_some(),
        // Whoever goes on needs the source to connect again.
        journal: Mutex::new(journal.filter(|_| waiting.is_some())),
        waiting: Mutex::new(waiting),
        watching: Mutex::new(watching),
        paging: Mutex::new(paging),
        early,
        contents: contents.clone().filter(|_| agreement.late_known),
        landing: landing.clone(),
        listening: Arc::default(),
    };
    let listening = destination.listening.clone();
    let mut ids = PageIds::default();
    let result = destination.run(&mut ids, before_go);
    if let Err(error) = &result {
        stopper.stop();
        landing.lock().iter().for_each(|landing| landing.dismantle());
        // The source waits for the reason; when the connection is gone nobody reads it, which is no loss.
        link.send_if_free(Kind::Abort, &[chain(error).as_bytes()]);
    }
    // What nobody received may hold xl's pipe: xl ends only when that is closed.
    drop(destination);
    let status = end(result.is_err());
    // Exit comes behind xl's last words: after GO the source needs those to know whose the guest is. Whoever else still
    // holds xl's output open is not waited for.
    let _ = relayed.recv_timeout(CAUSE);
    let mut figures = figures.lock().clone();
    (figures.cpu_ms, figures.peak_rss_bytes) = usage();
    figures.late = landing.lock().as_ref().map(|landing| landing.figures());
    if let Ok(figures) = serde_json::to_vec(&figures) {
        said.last(&link, Kind::Figures, figures);
    }
    said.last(&link, Kind::Exit, (status as u32).to_le_bytes().to_vec());
    let mut unheard = false;
    if result.is_ok() && listening.lock().is_some() {
        // The source's xl has to hear it: only then it removes its copy of the guest.
        unheard = heard.recv_timeout(UNHEARD) == Err(RecvTimeoutError::Timeout);
    }
    // What was not heard can still be had from the journal.
    landing
        .lock()
        .iter()
        .filter(|_| !unheard)
        .for_each(|landing| landing.forget());
    drop(listening.lock().take());
    // The guest does not wait any more, and a later migration of it will find what it brought.
    if let Some(contents) = &contents
        && !ids.is_empty()
    {
        contents.save_image(&ids);
    }
    if let Some(keep_model) = keep_model.filter(|_| result.is_ok())
        && let Some(model) = arrived(&model)
    {
        keep_model(&model);
    }
    result.map(|()| status)
}

/// What the source has learnt. It comes behind GO, which xl may have been quick to follow.
fn arrived(model: &Arc<Mutex<Option<Vec<u8>>>>) -> Option<Vec<u8>> {
    let until = Instant::now() + MODEL_PATIENCE;
    loop {
        // Whoever reads the connection has it, too, for as long as that is read.
        let nothing_comes = Arc::strong_count(model) == 1;
        let arrived = model.lock().take();
        if arrived.is_some() || nothing_comes || Instant::now() > until {
            return arrived;
        }
        thread::sleep(POLL);
    }
}

/// Says what this host holds, and that this is all for now.
fn tell_contents(link: &Link, agreement: &Agreement, contents: Option<&dyn Contents>) {
    if !agreement.contents {
        return;
    }
    let keys = contents.map(Contents::lookup_keys).unwrap_or_default();
    let told = have_bodies(keys)
        .iter()
        .try_for_each(|body| link.send(Kind::Have, &[body]));
    // Whoever reads the connection finds it lost, too, and says why.
    if let Err(error) = told {
        log::debug!("the other host was not told what is held here: {error}");
    }
}

/// Rebuilds a stream that goes to a file, where no xl has to be waited for, and settles it. Calls `ready` when all is
/// there that the stream's first byte needs.
pub fn rebuild(
    negotiated: Negotiated,
    input: XlInput,
    frames: Frames,
    contents: Option<Arc<dyn Contents>>,
    ready: impl FnOnce(),
) -> Result<DestinationFigures, EngineError> {
    let Negotiated {
        link,
        reader,
        watch,
        agreement,
        key,
        timeout,
    } = negotiated;
    let figures = Arc::new(Mutex::new(DestinationFigures::default()));
    let receiving = Receiving::start(Rebuilding {
        xl: input,
        frames,
        key: key.clone(),
        speaks_contents: agreement.contents,
        late: false,
        early: None,
        contents: contents.clone(),
        link: Some(link.clone()),
        patience: timeout * PATIENCE,
        figures: figures.clone(),
    })?;
    let (sender, events) = events();
    let frames = Arriving {
        link: link.clone(),
        events: sender,
        landing: LateLanding::default(),
        said: Arc::default(),
        joined: None,
        watch: None,
        heard: bounded(1).0,
        model: Arc::default(),
    };
    spawn("xenfold-frames", move || frames.read(reader, receiving))?;
    tell_contents(&link, &agreement, contents.as_deref());
    let destination = Destination {
        link,
        watch: Arc::new(watch),
        events,
        key,
        verify: agreement.peer.verify,
        rejoins: false,
        journal: Mutex::default(),
        waiting: Mutex::default(),
        watching: Mutex::default(),
        paging: Mutex::default(),
        early: None,
        contents: None,
        landing: LateLanding::default(),
        listening: Arc::default(),
    };
    ready();
    let (rebuilt, _) = destination.wait_rebuilt()?;
    destination.settle(rebuilt, None)?;
    let figures = figures.lock().clone();
    Ok(figures)
}

/// What is needed to wait for a source that connects again.
pub(super) struct Waiting {
    pub token: String,
    pub hello: Hello,
    pub listen: Listen,
    pub joining: Sender<Joined>,
}

struct Destination {
    link: Link,
    watch: Arc<Watch>,
    events: Receiver<Event>,
    key: ContentKey,
    verify: bool,
    rejoins: bool,
    /// Until the guest is let go.
    journal: Mutex<Option<Box<dyn LateJournal>>>,
    waiting: Mutex<Option<Waiting>>,
    watching: Mutex<Option<Watching>>,
    listening: Arc<Mutex<Option<Box<dyn Send>>>>,
    /// Until pages are late.
    paging: Mutex<Option<Box<dyn GuestPaging>>>,
    /// Has it in its place, where pages are taken out while the stream runs.
    early: Option<Arc<Early>>,
    /// For late pages that are named by their content.
    contents: Option<Arc<dyn Contents>>,
    landing: LateLanding,
}

impl Destination {
    /// Leaves in `ids` what the guest's pages hold, once that is agreed on.
    fn run(&self, ids: &mut PageIds, before_go: impl FnOnce() -> io::Result<()>) -> Result<(), EngineError> {
        let (rebuilt, frames) = self.wait_rebuilt()?;
        let mut xl;
        (xl, *ids) = self.settle(rebuilt, frames)?;
        let go = self.wait_go()?;
        // First: should the connection be lost while a slow disk takes the note, whoever connects again finds somebody.
        self.expect_another_connection();
        before_go().map_err(EngineError::NotNoted)?;
        // ── Point of no return: xl may start the guest from here on. ──
        // So few bytes go into a pipe whole or not at all: when this fails xl has ended without them, the guest with it.
        xl.write_all(&go).and_then(|()| xl.flush()).map_err(EngineError::Xl)?;
        self.wait_xl();
        Ok(())
    }

    /// Phase 1: frames become xl's stream, up to libxl's END record.
    fn wait_rebuilt(&self) -> Result<(Rebuilt, Frames), EngineError> {
        let mut ended: Option<Instant> = None;
        loop {
            let event = match ended {
                None => self.next()?,
                Some(ended) => match self.events.recv_deadline(ended + CAUSE) {
                    Ok(event) => self.judge(event)?,
                    Err(_) => return Err(xl_ended()),
                },
            };
            match event {
                Event::Rebuilt(result) => return *result,
                // When the rebuilding has failed it has let go of xl's pipe, and xl is quicker to tell.
                Event::XlEnded => ended = Some(Instant::now()),
                event => early(&event)?,
            }
        }
    }

    /// Phase 2: END is kept back until libxl has taken everything before it and both hosts agree about the guest's
    /// memory. Nothing outside has been touched yet: from END on disks are attached and a device model runs.
    fn settle(&self, rebuilt: Rebuilt, frames: Frames) -> Result<(Box<dyn Write + Send>, PageIds), EngineError> {
        let Rebuilt {
            mut xl,
            end,
            digest,
            rows,
            mut ids,
            late,
        } = rebuilt;
        let (first, rest) = end.record.split_at(4);
        xl.writer
            .write_all(first)
            .and_then(|()| xl.writer.flush())
            .map_err(EngineError::Xl)?;
        while (xl.unread)().map_err(EngineError::Xl)? > 0 {
            self.check_events()?;
            thread::sleep(POLL);
        }
        if (end.digest, end.rows) != (digest, rows) {
            return Err(EngineError::DigestDiffers { rows: end.rows });
        }
        let start = Instant::now();
        let mut verdict = Verdict {
            accepted: true,
            ..Verdict::default()
        };
        let mut frames = frames;
        let early = self.early.as_ref().map_or(Ok(None), |early| early.end())?;
        if let Some(ring) = early.as_ref().and_then(|early| early.ring_page) {
            // It holds nothing, and is not there for now.
            ids.remove(ring);
        }
        if let (true, Some(frames)) = (self.verify, &mut frames) {
            let verified = read_back(&ids, frames.as_mut(), &self.key)?;
            if let Some(first) = verified.first_different {
                return Err(EngineError::VerifyFailed {
                    count: verified.different,
                    first,
                });
            }
            verdict.verified_pages = verified.equal;
            verdict.rewritten_by_xen_pages = verified.rewritten_by_xen;
            verdict.time_ms = start.elapsed().as_millis() as u64;
        }
        self.leave_behind(late, early, frames)?;
        self.check_events()?;
        let verdict = serde_json::to_vec(&verdict).map_err(|_| EngineError::WorkerLost)?;
        self.link
            .send(Kind::Verdict, &[&verdict])
            .map_err(|error| EngineError::Wire(error.into()))?;
        xl.writer
            .write_all(rest)
            .and_then(|()| xl.writer.flush())
            .map_err(EngineError::Xl)?;
        Ok((xl.writer, ids))
    }

    /// The late pages are taken out of the guest. From here on Xen says when one of them is touched.
    fn leave_behind(&self, pages: Vec<Pfn>, early: Option<Outcome>, frames: Frames) -> Result<(), EngineError> {
        let Some(Outcome {
            mut paging,
            on,
            out,
            time,
            ..
        }) = early.or_else(|| self.paging.lock().take().map(Outcome::none))
        else {
            return Ok(());
        };
        if pages.is_empty() {
            return if on { Ok(paging.disable()?) } else { Ok(()) };
        }
        let landing = Landing::prepare(Late {
            pages,
            on,
            out,
            early_time: time,
            paging,
            frames,
            verify: self.verify,
            link: self.link.clone(),
            rejoins: self.rejoins,
            key: self.key.clone(),
            contents: self.contents.clone(),
        })?;
        *self.landing.lock() = Some(landing.clone());
        if landing.ask_resident()? {
            while !landing.wait_resident(RESIDENT_POLL) {
                self.check_events()?;
            }
        }
        landing.serve()
    }

    /// Phase 3: xl's R1 goes back by itself; then the source's GO comes, or the end of the connection.
    fn wait_go(&self) -> Result<Vec<u8>, EngineError> {
        loop {
            match self.next()? {
                Event::Go(go) => return Ok(go),
                event => early(&event)?,
            }
        }
    }

    /// The guest is about to run without some of its pages: should the connection be lost, the source can set up another one.
    fn expect_another_connection(&self) {
        let Some(landing) = self.landing.lock().clone() else {
            return;
        };
        if let Some(watching) = self.watching.lock().take() {
            landing.tell(watching);
        }
        if let Some(journal) = self.journal.lock().take() {
            landing.keep(journal);
        }
        let Some(waiting) = self.waiting.lock().take() else {
            return;
        };
        self.watch.shorten(SILENCE);
        match waiting.start(self.link.clone(), None) {
            Ok(listening) => *self.listening.lock() = Some(listening),
            Err(error) => log::warn!("the source cannot connect again should it have to: {}", chain(&error)),
        }
    }

    /// Phase 4: xl reports (R2, by itself) and ends. What becomes of the connection does not matter any more.
    fn wait_xl(&self) {
        while let Ok(event) = self.events.recv() {
            if matches!(event, Event::XlEnded) {
                return;
            }
        }
    }

    fn check_events(&self) -> Result<(), EngineError> {
        while let Ok(event) = self.events.try_recv() {
            early(&self.judge(event)?)?;
        }
        Ok(())
    }

    fn next(&self) -> Result<Event, EngineError> {
        self.events
            .recv()
            .map_err(|_| EngineError::WorkerLost)
            .and_then(|event| self.judge(event))
    }

    fn judge(&self, event: Event) -> Result<Event, EngineError> {
        match event {
            Event::LinkLost(error) => Err(match self.watch.silence_s() {
                Some(seconds) => EngineError::Silent { seconds },
                None => EngineError::Wire(error),
            }),
            Event::Abort(reason) => Err(EngineError::PeerAborted(reason)),
            Event::Stop(reason) => Err(EngineError::Stopped(reason)),
            event => Ok(event),
        }
    }
}

fn xl_ended() -> EngineError {
    EngineError::Refused("xl ended before the guest was handed over".into())
}

/// What must not come before the guest is handed over.
fn early(event: &Event) -> Result<(), EngineError> {
    match event {
        Event::XlEnded => Err(xl_ended()),
        Event::Go(_) => Err(EngineError::Protocol("xl was told to go early")),
        _ => Ok(()),
    }
}

/// Carries what xl writes to the source. When the connection is gone its output is still drained: xl must be able to
/// write its report, or it ends before it has destroyed the guest.
///
/// With pages that follow the guest its report (R2) waits for the last of them: with it the source's xl destroys the guest's
/// memory there.
fn relay_xl(mut output: Box<dyn Read + Send>, link: &Link, events: &Sender<Event>, landing: &LateLanding, said: &Said) {
    let before_report = xl::R0_BANNER.len() + xl::R1_READY.len();
    let (mut passed, mut report) = (0, Vec::new());
    let mut buffer = [0; 4096];
    loop {
        match output.read(&mut buffer) {
            Ok(0) | Err(_) => break,
            Ok(n) => {
                let bytes = buffer.get(..n).unwrap_or_default();
                let now = if landing.lock().is_some() {
                    n.min(before_report.saturating_sub(passed))
                } else {
                    n
                };
                let (now, later) = bytes.split_at(now);
                passed += now.len();
                if !now.is_empty() {
                    said.xl(link, now, false);
                }
                report.extend_from_slice(later.get(..REPORT_BYTES.saturating_sub(report.len())).unwrap_or(later));
                if report.len() > xl::R2_REPORT.len() {
                    pass_report(&mut report, link, landing, said);
                }
            }
        }
    }
    if !report.is_empty() {
        said.xl(link, &report, landing.lock().is_some());
    }
    // The phases have ended when nobody receives this.
    let _ = events.send(Event::XlEnded);
}

/// Bytes of xl's report and of what follows it when the guest was not started.
const REPORT_BYTES: usize = xl::R2_REPORT.len() + 1 + xl::R3_GO_BACK.len();

/// xl has said how the guest's start went. When it runs, that is passed on when its last page has come.
fn pass_report(report: &mut Vec<u8>, link: &Link, landing: &LateLanding, said: &Said) {
    let landing = landing.lock().clone();
    if let Some(landing) = &landing {
        if report.strip_prefix(xl::R2_REPORT) == Some(&[0]) {
            landing.note_started();
            said.started(link);
            let landed = landing.wait();
            log::debug!("the late pages: {landed:?}");
        } else {
            landing.dismantle();
        }
    }
    said.xl(link, report, landing.is_some());
    report.clear();
}

impl Waiting {
    /// Whoever connects and knows the token takes the place of the connection before. `first`: somebody who has connected.
    pub fn start(self, link: Link, first: Option<LinkEnds>) -> Result<Box<dyn Send>, EngineError> {
        let Waiting {
            token,
            hello,
            listen,
            joining,
        } = self;
        let (connecting, connected) = unbounded::<LinkEnds>();
        // It is received below.
        first.into_iter().for_each(|first| drop(connecting.send(first)));
        let guard = listen(connecting).map_err(|error| EngineError::Wire(error.into()))?;
        spawn("xenfold-rejoin", move || {
            for ends in connected {
                let (token, hello, joining, link) = (token.clone(), hello.clone(), joining.clone(), link.clone());
                // Each in a thread of its own: one that says nothing holds nobody up.
                let admitted = spawn("xenfold-admit", move || {
                    let hangup = ends.hangup.clone();
                    match admit(ends, &hello, &token) {
                        Ok(joined) => {
                            let before = link.hangup();
                            // Nobody waits any more when all is over.
                            let _ = joining.send(joined);
                            before();
                        }
                        Err(error) => {
                            log::warn!("a connection was refused: {}", chain(&error));
                            hangup();
                        }
                    }
                });
                if let Err(error) = admitted {
                    log::warn!("{}", chain(&error));
                }
            }
        })?;
        Ok(guard)
    }
}
