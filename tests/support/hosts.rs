//! Two hosts in one process: both engines between two xl that say what Xen's say, to the byte, over a link that
//! can be cut, silenced, stalled and lied on at any frame.
#![allow(dead_code, reason = "each integration test uses its own part of this")]

#[path = "link.rs"]
mod link;
#[path = "mortal.rs"]
pub mod mortal;
#[path = "pipe.rs"]
mod pipe;
#[path = "xls.rs"]
mod xls;

use link::link;
#[allow(unused_imports, reason = "each integration test uses its own part of this")]
pub use link::{Fate, Hook, OnTheWay, frame_bytes, kind, pass};
use mortal::Mortal;
pub use pipe::{Pipe, pipe};
pub use xls::{Death, DestinationXl, FrameFault, Image, ImageFrames, Live, SourceDeath, SourceXl};
use xls::{ReceivingXl, SendingXl};

use crossbeam_channel::Sender;
use parking_lot::Mutex;
use std::collections::HashMap;
use std::io::{self, Write};
use std::num::NonZeroU64;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::mpsc;
use std::thread;
use std::time::{Duration, Instant};
use xenfold::engine::destination::{self, DestinationSetup, Listen, XlInput, XlProcess};
use xenfold::engine::source::{self, Ending, SourceSetup};
use xenfold::engine::{
    Connect, Contents, EngineError, FrameSource, GuestPaging, Holding, LateJournal, LinkEnds, Unseen, WINDOW_ROWS,
    refuse,
};
use xenfold::page::ContentKey;
use xenfold::report::Figures;
use xenfold::wire::{EarlyOut, FrameReader, Hello, Kind};

/// Longer than anything here takes; whoever is not done then hangs.
pub const DEADLINE: Duration = Duration::from_secs(120);

// ── A migration ──

/// What hooks may pull.
#[derive(Clone)]
pub struct Controls {
    pub stop_source: Arc<dyn Fn() + Send + Sync>,
    pub stop_destination: Arc<dyn Fn() + Send + Sync>,
}

/// Makes the hooks of both directions: to the destination, to the source.
pub type Hooks = Box<dyn FnOnce(&Controls) -> (Hook, Hook) + Send>;

pub struct Plan {
    /// Everything that the source's xl sends before GO.
    pub stream: Arc<Vec<u8>>,
    /// The destination can read the guest's frames.
    pub frames: bool,
    pub frame_fault: FrameFault,
    pub verify: bool,
    pub timeout: Duration,
    pub destination_dies: Option<Death>,
    pub source_dies: Option<SourceDeath>,
    pub start_status: u8,
    /// What the source's xl takes to answer R1 with GO.
    pub go_after: Duration,
    pub apply_delay: Duration,
    pub link_bytes: usize,
    /// Rows that the destination says it keeps.
    pub window_rows: usize,
    /// Source and destination speak of contents.
    pub speak_contents: [bool; 2],
    /// What source and destination hold.
    pub contents: [Option<Arc<dyn Contents>>; 2],
    /// Writes the stream in its place, as xl does while the guest runs.
    pub live: Option<Live>,
    /// With what the source holds pages back.
    pub holding: Option<Holding>,
    /// What the source may take of the link in a second.
    pub bandwidth: Option<NonZeroU64>,
    /// What the source has learnt of the guest's writes, and whether the destination keeps it.
    pub model: Option<Vec<u8>>,
    pub keeps_model: bool,
    /// What the receiving xl has built.
    pub image: Image,
    /// With what the destination leaves pages behind.
    pub paging: Option<Box<dyn GuestPaging>>,
    /// With what the source lets it do so before the guest is suspended.
    pub early: Option<EarlyOut>,
    /// Late pages may be named by their content.
    pub late_known: bool,
    /// Called for each page that the receiving xl's helper fills.
    pub filled: Option<Box<dyn Fn(u64) + Send>>,
    /// Called when the receiving xl starts the guest.
    pub started: Option<Box<dyn FnOnce() + Send>>,
    pub hooks: Hooks,
    /// The source may connect again: the hooks of each new connection, counted from 0; `None`: it does not come about.
    pub again: Option<Again>,
    /// Tokens of others that connect before the source does.
    pub strangers: Vec<String>,
    /// The destination's agent, where it may be killed: then who goes on for it.
    pub agent: Option<(Mortal, Heir)>,
    pub journal: Option<Box<dyn LateJournal>>,
    /// The source's agent, where it may be killed: then who goes on for it.
    pub source_agent: Option<(Mortal, Follower)>,
    pub source_journal: Option<Box<dyn LateJournal>>,
    /// What has become of the receiving xl.
    pub destination_xl: Arc<Mutex<Option<DestinationXl>>>,
}

/// What is started at the destination for a connection when the agent that waited is dead. It may wait for others.
pub type Heir = Arc<dyn Fn(LinkEnds, &Listening) + Send + Sync>;

/// What is started at the source when its agent is dead.
pub type Follower = Box<dyn FnOnce(Connect) -> Ending + Send>;

/// Who waits for connections, and every pipe that leads to the destination: they end with its agent.
#[derive(Clone, Default)]
pub struct Listening {
    sender: Arc<Mutex<Option<Sender<LinkEnds>>>>,
    pipes: Arc<Mutex<Vec<Pipe>>>,
}

impl Listening {
    /// The process that waits ends.
    pub fn end(&self) {
        *self.sender.lock() = None;
        self.pipes.lock().drain(..).for_each(|pipe| pipe.close());
    }

    /// How a process waits for connections, as long as it lives.
    pub fn listen(&self, life: Option<Mortal>) -> Listen {
        let all = self.clone();
        Box::new(move |sender| {
            *all.sender.lock() = Some(sender);
            if life.is_some_and(|life| life.is_dead()) {
                all.end();
            }
            Ok(Box::new(()))
        })
    }

    /// How a process connects, over a link without hooks.
    fn connect(&self, bytes: usize, agent: Option<(Mortal, Heir)>) -> Connect {
        let all = self.clone();
        Box::new(move || {
            let (source, mut destination, pipes) = link(bytes, pass(), pass());
            destination.hangup = source.hangup.clone();
            all.pipes.lock().extend(pipes);
            let listening = all.sender.lock().clone();
            match (listening, agent.as_ref().filter(|(life, _)| life.is_dead())) {
                (Some(listening), _) => drop(listening.send(destination)),
                (None, Some((_, heir))) => heir(destination, &all),
                (None, None) => drop(thread::spawn(|| refuse(destination, "nobody waits"))),
            }
            Ok(source)
        })
    }
}

/// Makes the hooks of new connections.
pub type Again = Box<dyn FnMut(usize) -> Option<(Hook, Hook)> + Send>;

impl Plan {
    pub fn new(stream: Vec<u8>) -> Plan {
        Plan {
            stream: Arc::new(stream),
            frames: true,
            frame_fault: FrameFault::None,
            verify: false,
            timeout: Duration::from_secs(30),
            destination_dies: None,
            source_dies: None,
            start_status: 0,
            go_after: Duration::ZERO,
            apply_delay: Duration::ZERO,
            link_bytes: 64 << 10,
            window_rows: WINDOW_ROWS,
            speak_contents: [false; 2],
            contents: [None, None],
            live: None,
            holding: None,
            bandwidth: None,
            model: None,
            keeps_model: true,
            image: Image::default(),
            paging: None,
            early: None,
            late_known: true,
            filled: None,
            started: None,
            hooks: Box::new(|_| (pass(), pass())),
            again: None,
            strangers: Vec::new(),
            agent: None,
            journal: None,
            source_agent: None,
            source_journal: None,
            destination_xl: Arc::default(),
        }
    }

    pub fn hooks(self, hooks: impl FnOnce(&Controls) -> (Hook, Hook) + Send + 'static) -> Plan {
        Plan {
            hooks: Box::new(hooks),
            ..self
        }
    }
}

pub struct Outcome {
    pub ending: Ending,
    pub source_xl: SourceXl,
    pub destination: Result<i32, EngineError>,
    pub destination_xl: DestinationXl,
    /// What the receiving xl has read of the stream.
    pub received: Vec<u8>,
    pub image: HashMap<u64, Vec<u8>>,
    pub figures: Figures,
    pub elapsed: Duration,
    /// The receiving xl was given up: what it left is destroyed by the agent.
    pub given_up: bool,
    /// Strangers that were told to go away.
    pub refused: usize,
    /// What the destination keeps of the guest's writes.
    pub model: Option<Vec<u8>>,
}

impl Outcome {
    /// The source has the guest because the other host's xl said that it does not run there.
    pub fn was_given_back(&self) -> bool {
        matches!(self.ending, Ending::SourceOwns(EngineError::Refused(_)))
    }
}

fn spawn<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> mpsc::Receiver<T> {
    let (done, result) = mpsc::channel();
    thread::spawn(move || {
        let _ = done.send(work());
    });
    result
}

fn wait<T>(result: &mpsc::Receiver<T>, deadline: Instant, what: &str) -> T {
    let left = deadline.saturating_duration_since(Instant::now());
    result
        .recv_timeout(left)
        .unwrap_or_else(|error| panic!("{what}: {error} (hangs, or panicked)"))
}

/// The key of all migrations here.
pub fn key() -> ContentKey {
    ContentKey::new([7; 32])
}

/// How both sides come to new connections.
fn connections(
    bytes: usize,
    again: Option<Again>,
    mut strangers: Vec<String>,
    refused: Arc<AtomicUsize>,
    all: Listening,
    agent: Option<(Mortal, Heir)>,
) -> (Option<Connect>, Option<Listen>) {
    let Some(mut again) = again else { return (None, None) };
    let life = agent.as_ref().map(|(life, _)| life.clone());
    let (listening, listen, mut number) = (all.sender.clone(), all.listen(life), 0);
    let connect = move || {
        let hooks = again(number).ok_or(io::ErrorKind::HostUnreachable)?;
        number += 1;
        let (source, mut destination, pipes) = link(bytes, hooks.0, hooks.1);
        all.pipes.lock().extend(pipes);
        destination.hangup = source.hangup.clone();
        let until = Instant::now() + Duration::from_secs(1);
        let is_dead = || agent.as_ref().is_some_and(|(agent, _)| agent.is_dead());
        while listening.lock().is_none() && Instant::now() < until && !is_dead() {
            thread::sleep(Duration::from_millis(5));
        }
        for token in strangers.drain(..) {
            if let Some(listening) = &*listening.lock() {
                refused.fetch_add(usize::from(is_refused(bytes, listening, &token)), Ordering::SeqCst);
            }
        }
        match listening.lock().clone() {
            Some(listening) => drop(listening.send(destination)),
            None if is_dead() => {
                if let Some((_, heir)) = &agent {
                    heir(destination, &all);
                }
            }
            None => drop(thread::spawn(|| refuse(destination, "nobody waits"))),
        }
        Ok(source)
    };
    (Some(Box::new(connect)), Some(listen))
}

/// Connects as long as the process lives.
fn while_alive(mut connect: Connect, life: Option<Mortal>) -> Connect {
    Box::new(move || match &life {
        Some(life) if life.is_dead() => Err(io::ErrorKind::HostUnreachable.into()),
        _ => connect(),
    })
}

/// Whether the destination tells a stranger to go away.
fn is_refused(bytes: usize, listening: &Sender<LinkEnds>, token: &str) -> bool {
    let (mut stranger, destination, _) = link(bytes, pass(), pass());
    listening.send(destination).unwrap();
    let hello = Hello {
        late: true,
        rejoin_token: Some(token.into()),
        ..Hello::default()
    };
    hello.agree(&mut stranger.from_peer).unwrap();
    hello.write(&mut stranger.to_peer).unwrap();
    FrameReader::new(stranger.from_peer).read().unwrap().kind == Kind::Abort
}

/// What proves that a new connection is the source's.
pub const TOKEN: &str = "000102030405060708090a0b0c0d0e0f";

/// Runs a migration to its end. Panics when anything hangs.
pub fn migrate(plan: Plan) -> Outcome {
    let start = Instant::now();
    let deadline = start + DEADLINE;
    let (source_events, destination_events) = (source::events(), destination::events());
    let (to_source, to_destination) = (source_events.0.clone(), destination_events.0.clone());
    let stop_source = Arc::new(move || drop(to_source.send(source::Event::Stop("by the test".into()))));
    let stop_destination = Arc::new(move || drop(to_destination.send(destination::Event::Stop("by the test".into()))));
    let controls = Controls {
        stop_source: stop_source.clone(),
        stop_destination,
    };
    let (forth, back) = (plan.hooks)(&controls);
    let refused = Arc::new(AtomicUsize::new(0));
    let listening = Listening::default();
    let destination_agent = plan.agent.clone();
    let agent_life = plan.agent.as_ref().map(|(agent, _)| agent.clone());
    let (connect, listen) = connections(
        plan.link_bytes,
        plan.again,
        plan.strangers,
        refused.clone(),
        listening.clone(),
        plan.agent,
    );
    let (source_link, destination_link, link) = link(plan.link_bytes, forth, back);
    listening.pipes.lock().extend(link.clone());
    let figures = Arc::new(Mutex::new(Figures::default()));

    // The source: xl and agent.
    let (to_agent, from_xl, stream_pipe) = pipe(64 << 10);
    let (to_xl, from_agent, answers_pipe) = pipe(64 << 10);
    let xl = SendingXl {
        stream: plan.stream.clone(),
        live: plan.live,
        to_agent,
        from_agent,
        dies: plan.source_dies,
        go_after: plan.go_after,
    };
    let source_xl = spawn(move || {
        let state = xl.run();
        if matches!(state, SourceXl::Died(_)) {
            // The agent watches its parent.
            stop_source();
        }
        state
    });
    let hello = Hello {
        program: "source".into(),
        verify: plan.verify,
        late: plan.holding.as_ref().is_some_and(|holding| holding.behind.is_some()),
        contents: plan.speak_contents[0],
        early: plan.early,
        late_known: plan.late_known,
        rejoin_token: connect.is_some().then(|| TOKEN.into()),
        ..Hello::default()
    }
    .with_key(&key());
    let [source_contents, destination_contents] = plan.contents;
    let (holding, model, bandwidth) = (plan.holding, plan.model, plan.bandwidth);
    let (noted, timeout, ended) = (figures.clone(), plan.timeout, link.clone());
    let (source_life, follower) = plan.source_agent.unzip();
    if let Some(agent) = &source_life {
        let pipes = [stream_pipe.clone(), answers_pipe.clone()];
        let (all, link) = (listening.clone(), link.clone());
        agent.on_death(move || {
            pipes.iter().chain(&link).for_each(Pipe::close);
            all.pipes.lock().drain(..).for_each(|pipe| pipe.close());
        });
    }
    let (connect, source_journal) = (
        connect.map(|connect| while_alive(connect, source_life.clone())),
        plan.source_journal,
    );
    let agent = spawn(move || {
        let ending = match source::negotiate(source_link, &hello, timeout) {
            Ok(negotiated) => {
                let to_xl = Box::new(to_xl);
                let setup = SourceSetup {
                    to_xl,
                    failing: Box::new(|| {}),
                    while_xl_waits: None,
                    frames: None,
                    verify: false,
                    holding,
                    learnt: model.map(|model| Box::new(move || Some(model)) as source::Learnt),
                    bandwidth,
                    contents: source_contents,
                    connect,
                    journal: source_journal,
                    figures: noted,
                    events: source_events,
                };
                let (ending, left) = source::run(negotiated, setup, Box::new(from_xl));
                left.iter().for_each(source::Left::save);
                ending
            }
            Err(error) => Ending::SourceOwns(error),
        };
        // The process ends here, with all that it has open.
        stream_pipe.close();
        answers_pipe.close();
        ended.iter().for_each(Pipe::close);
        ending
    });

    // The destination: agent and xl.
    let (to_xl, stdin, stdin_pipe) = pipe(256 << 10);
    let (stdout, from_xl, _) = pipe(64 << 10);
    let (image, received) = (plan.image, Arc::new(Mutex::new(Vec::new())));
    let xl = ReceivingXl {
        stdin,
        stdout,
        image: image.clone(),
        received: received.clone(),
        started: plan.started,
        filled: plan.filled,
        dies: plan.destination_dies,
        start_status: plan.start_status,
        apply_delay: plan.apply_delay,
        taken: 0,
        verifying: false,
    };
    let state = plan.destination_xl.clone();
    let destination_xl = spawn(move || {
        let ended = xl.run();
        *state.lock() = Some(ended);
        ended
    });
    if let Some(agent) = &agent_life {
        let (stdin, listening) = (stdin_pipe.clone(), listening.clone());
        agent.on_death(move || {
            stdin.close();
            listening.end();
        });
    }
    let frames = plan.frames.then(|| ImageFrames {
        image: image.clone(),
        fault: plan.frame_fault,
    });
    let hello = Hello {
        program: "destination".into(),
        late: plan.paging.is_some(),
        takes_early: plan.paging.is_some(),
        late_known: plan.late_known,
        frames: plan.frames,
        window_rows: plan.window_rows as u32,
        contents: plan.speak_contents[1],
        paces: plan.speak_contents[1],
        rejoins: listen.is_some(),
        keeps_model: plan.keeps_model,
        ..Hello::default()
    };
    let paging = plan.paging;
    let kept = Arc::new(Mutex::new(None));
    let keeping = kept.clone();
    let (journal, gave_up) = (plan.journal, Arc::new(AtomicBool::new(false)));
    let (giving_up, ended) = (gave_up.clone(), link);
    let watched = stdin_pipe.clone();
    let end = move |given_up| {
        giving_up.store(given_up, Ordering::SeqCst);
        let state = wait(&destination_xl, deadline, "the receiving xl");
        match state {
            DestinationXl::Running => 0,
            DestinationXl::Died(_) => 137,
            _ => 1,
        }
    };
    let setup_xl = XlProcess {
        input: XlInput {
            writer: Box::new(to_xl),
            unread: Arc::new(move || watched.unread()),
        },
        output: Box::new(from_xl),
        end: Box::new(end),
    };
    let destination = spawn(move || {
        let result = destination::negotiate(destination_link, &hello, timeout).and_then(|negotiated| {
            let setup = DestinationSetup {
                xl: setup_xl,
                frames: frames.map(|frames| Box::new(frames) as Box<dyn FrameSource>),
                contents: destination_contents,
                events: destination_events,
                paging,
                listen,
                journal,
                hello: hello.clone(),
                watching: None,
                keep_model: Some(Box::new(move |model| *keeping.lock() = Some(model.to_vec()))),
                before_go: Box::new(|| Ok(())),
                program: "test".into(),
                usage: || (1, 2),
            };
            destination::run(negotiated, setup)
        });
        stdin_pipe.close();
        ended.iter().for_each(Pipe::close);
        result
    });

    let ending = loop {
        match (agent.recv_timeout(Duration::from_millis(20)), &source_life) {
            (Ok(ending), _) => break ending,
            (Err(_), Some(life)) if life.is_dead() => {
                let (follower, connect) = (follower.unwrap(), listening.connect(plan.link_bytes, destination_agent));
                break wait(&spawn(move || follower(connect)), deadline, "the follower");
            }
            _ if Instant::now() > deadline => panic!("the source's agent hangs"),
            _ => {}
        }
    };
    // Nobody connects any more.
    *listening.sender.lock() = None;
    let source_xl = wait(&source_xl, deadline, "the sending xl");
    let destination = match &agent_life {
        Some(agent) if agent.is_dead() => Err(EngineError::Stopped("killed".into())),
        _ => wait(&destination, deadline, "the destination's agent"),
    };
    let destination_xl = plan.destination_xl.lock().take();
    let (received, model) = (received.lock().clone(), kept.lock().take());
    let (image, figures) = (image.lock().clone(), figures.lock().clone());
    Outcome {
        ending,
        source_xl,
        destination,
        destination_xl: destination_xl.unwrap_or(DestinationXl::Destroyed),
        received,
        image,
        figures,
        elapsed: start.elapsed(),
        given_up: gave_up.load(Ordering::SeqCst),
        refused: refused.load(Ordering::SeqCst),
        model,
    }
}

// ── A destination alone, and whoever writes to it ──

pub struct Received {
    /// A verdict that accepts was sent.
    pub accepted: bool,
    pub result: Result<i32, EngineError>,
    pub received: Vec<u8>,
}

/// How long a destination may be silent until whoever writes to it goes away.
const QUIET: Duration = Duration::from_secs(5);

/// Gives a destination these bytes, hello and all, waits for its answer and goes away. Panics when it hangs.
pub fn receive(wire: &[u8]) -> Received {
    receive_from(wire, None, QUIET)
}

/// The same from a source that goes away right behind the last byte.
pub fn receive_cut(wire: &[u8]) -> Received {
    receive_from(wire, None, Duration::ZERO)
}

/// The same from a source that shows that it lives, from this frame number on.
pub fn receive_alive(wire: &[u8], sequence: u64) -> Received {
    receive_from(wire, Some(sequence), QUIET / 5)
}

fn receive_from(wire: &[u8], alive: Option<u64>, quiet: Duration) -> Received {
    let deadline = Instant::now() + DEADLINE;
    let (mut forth, from_peer, forth_pipe) = pipe(1 << 20);
    let (to_peer, mut back, back_pipe) = pipe(1 << 20);
    let hung_up = forth_pipe.clone();
    let link = LinkEnds {
        to_peer: Box::new(to_peer),
        from_peer: Box::new(from_peer),
        hangup: Arc::new(move || hung_up.end_reading()),
        carrier: Arc::new(Unseen),
    };
    let (to_xl, stdin, stdin_pipe) = pipe(256 << 10);
    let (stdout, from_xl, _) = pipe(64 << 10);
    let (image, received) = (Image::default(), Arc::new(Mutex::new(Vec::new())));
    let xl = ReceivingXl {
        filled: None,
        stdin,
        stdout,
        image: image.clone(),
        received: received.clone(),
        started: None,
        dies: None,
        start_status: 0,
        apply_delay: Duration::ZERO,
        taken: 0,
        verifying: false,
    };
    let xl = spawn(move || xl.run());
    let watched = stdin_pipe.clone();
    let setup = DestinationSetup {
        xl: XlProcess {
            input: XlInput {
                writer: Box::new(to_xl),
                unread: Arc::new(move || watched.unread()),
            },
            output: Box::new(from_xl),
            end: Box::new(move |_| {
                wait(&xl, deadline, "the receiving xl");
                1
            }),
        },
        frames: None,
        contents: None,
        events: destination::events(),
        paging: None,
        listen: None,
        journal: None,
        hello: Hello::default(),
        watching: None,
        keep_model: None,
        before_go: Box::new(|| Ok(())),
        program: "test".into(),
        usage: || (0, 0),
    };
    let hello = Hello {
        window_rows: WINDOW_ROWS as u32,
        ..Hello::default()
    };
    let ended = [forth_pipe.clone(), back_pipe];
    let agent = spawn(move || {
        let result =
            destination::negotiate(link, &hello, DEADLINE).and_then(|negotiated| destination::run(negotiated, setup));
        stdin_pipe.close();
        ended.iter().for_each(Pipe::close);
        result
    });
    let (answered, answer) = mpsc::channel();
    let listening = spawn(move || {
        xenfold::wire::Hello::default().agree(&mut back).ok()?;
        let mut reader = xenfold::wire::FrameReader::new(back);
        while let Ok(frame) = reader.read() {
            let kind = frame.kind as u16;
            if kind == kind::VERDICT || kind == kind::ABORT {
                let accepted = kind == kind::VERDICT && frame.body.starts_with(b"{\"accepted\":true");
                let _ = answered.send(accepted);
            }
        }
        Some(())
    });
    // A destination that has given up reads no more.
    let _ = forth.write_all(wire);
    let until = Instant::now() + quiet;
    let mut sequences = alive.unwrap_or_default()..;
    let accepted = loop {
        let patience = if alive.is_some() { quiet / 20 } else { quiet };
        match answer.recv_timeout(patience) {
            Ok(accepted) => break accepted,
            Err(mpsc::RecvTimeoutError::Timeout) if Instant::now() < until => {
                let sign = sequences.next().map(|sequence| frame_bytes(sequence, kind::PING, &[]));
                let _ = forth.write_all(&sign.unwrap_or_default());
            }
            Err(_) => break false,
        }
    };
    if accepted {
        // The rest of END and R1 are on their way.
        let until = Instant::now() + DEADLINE;
        while !received.lock().ends_with(&[0; 8]) && Instant::now() < until {
            thread::sleep(Duration::from_millis(1));
        }
    }
    drop(forth);
    forth_pipe.close();
    let result = wait(&agent, deadline, "the destination's agent");
    wait(&listening, deadline, "the listener");
    let received = received.lock().clone();
    Received {
        accepted,
        result,
        received,
    }
}
