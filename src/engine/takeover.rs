//! The destination's agent was killed while pages followed the guest: another process goes on for it.
//!
//! ```text
//!   source agent                     destination: killed          destination: this process
//!      ├─ Late ─ ─ ─ ─ ─ ─ ─ ─ ─ ─ ─ ─ ─▶ ✗                          the journal, whose owner is dead
//!      │  the connection is lost; a new ssh every two seconds        │  the guest is held still, Xen gets a new ring
//!      │ ◀── Hello ──────────────────────────────────────────────────┤
//!      ├─ Hello(token), Rejoin ─────────────────────────────────────▶│  as rejoin.rs: the guest goes on
//!      │ ◀── Missing…, [Started] ────────────────────────────────────┤
//!      ├─ Late ─ ─ ─ ─ ─ ─ ─ ─ ─ ─ ─ ─ ─ ─ ─ ─ ─▶     ◀ ─ ─ ─ ─ Want ┤
//!      │ ◀── Xl(R2, status), Figures, Exit ──────────────────────────┤  when the last page is there
//! ```
//!
//! The receiving xl has outlived its agent, and has ended with the guest started, or not: nobody reads what it said, but
//! what it did can be seen. R2 is said in its place.
use std::sync::Arc;

use crossbeam_channel::{RecvTimeoutError, bounded, unbounded};
use parking_lot::Mutex;

use super::arriving::Arriving;
use super::destination::{Listen, UNHEARD, Waiting, Watching};
use super::landing::{Landing, Taken};
use super::link::{Link, LinkEnds};
use super::said::Said;
use super::threads::spawn;
use super::{EngineError, Frames, GuestPaging, LateJournal};
use crate::late::journal::Found;
use crate::page::ContentKey;
use crate::report::DestinationFigures;
use crate::stream::xl;
use crate::wire::{Hello, Kind};

/// How the guest's start went, of which nobody has heard.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Start {
    /// It was started.
    Started,
    /// It was not, nor will it be: nothing is left of it.
    GivenBack,
    /// It is gone, and may have run; why.
    Unknown(String),
}

/// Waits until the receiving xl has ended, and looks at what it did. `true`: xl had said before that the guest runs.
pub type Look = Box<dyn FnOnce(bool) -> Start + Send>;

/// What is needed to go on.
pub struct TakeOver {
    /// What the journal says.
    pub found: Found,
    pub journal: Box<dyn LateJournal>,
    pub paging: Box<dyn GuestPaging>,
    pub frames: Frames,
    pub hello: Hello,
    /// Waits for the source, beside the one that has connected.
    pub listen: Listen,
    pub first: Option<LinkEnds>,
    pub look: Look,
    pub watching: Option<Watching>,
    /// The caller's name, and its processor time and peak memory (ms, bytes) when asked at the end.
    pub program: String,
    pub usage: fn() -> (u64, u64),
}

/// Goes on to the end. Returns the exit status that xl has, or would have. Errors: the guest could not be taken over; it is
/// as it was, but that it may be held still, and it can be tried again.
pub fn run(taking: TakeOver) -> Result<i32, EngineError> {
    let TakeOver {
        found,
        journal,
        paging,
        frames,
        hello,
        listen,
        first,
        look,
        watching,
        program,
        usage,
    } = taking;
    let key = ContentKey::from_hex(&found.facts.content_key);
    let key = key.ok_or(EngineError::Protocol("the journal has no content key"))?;
    let (token, noted) = (found.facts.token.clone(), found.noted);
    let link = Link::without()?;
    let heard_before = [&xl::R0_BANNER[..], &xl::R1_READY[..]].concat();
    let said = Arc::new(Said::before(heard_before, noted.started));
    let missing = found.missing.len();
    let landing = Landing::take_over(Taken {
        missing: found.missing.iter().collect(),
        awaited: found.awaited.iter().collect(),
        before: found.late.len().saturating_sub(missing),
        noted,
        paging,
        frames,
        journal,
        link: link.clone(),
        key,
    })?;
    log::warn!("the xenfold that received the guest was killed; going on for it, {missing} pages are missing");
    if !landing.has_ended() {
        landing.serve()?;
    }
    if let Some(watching) = watching {
        landing.tell(watching);
    }

    let ((joining, joined), (hearing, heard)) = (unbounded(), bounded::<()>(1));
    let arriving = Arriving {
        link: link.clone(),
        events: unbounded().0,
        landing: Arc::new(Mutex::new(Some(landing.clone()))),
        said: said.clone(),
        joined: Some(joined),
        watch: None,
        heard: hearing,
        model: Arc::default(),
    };
    spawn("xenfold-frames", move || arriving.go_on_reading())?;
    let waiting = Waiting {
        token,
        hello,
        listen,
        joining,
    };
    let listening = waiting.start(link.clone(), first)?;

    // The device model may need late pages before xl can start the guest.
    let (looked, to_said, to_landing, to_link) = (bounded(1), said.clone(), landing.clone(), link.clone());
    let looking = looked.0;
    spawn("xenfold-look", move || {
        let start = look(noted.started);
        if start == Start::Started && !noted.started {
            to_landing.note_started();
            to_said.started(&to_link);
        }
        // It is waited for below.
        let _ = looking.send(start);
    })?;
    let landed = landing.wait();
    let start = looked.1.recv().map_err(|_| EngineError::WorkerLost)?;
    log::debug!("the late pages: {landed:?}; the guest: {start:?}");
    let status = i32::from(start != Start::Started);
    match start {
        Start::Started => said.xl(&link, &[&xl::R2_REPORT[..], &[0]].concat(), true),
        Start::GivenBack => said.xl(&link, &[&xl::R2_REPORT[..], &[1], &xl::R3_GO_BACK[..]].concat(), true),
        Start::Unknown(why) => said.last(&link, Kind::Abort, why.into_bytes()),
    }
    let (cpu_ms, peak_rss_bytes) = usage();
    let figures = DestinationFigures {
        program,
        cpu_ms,
        peak_rss_bytes,
        late: Some(landing.figures()),
        ..DestinationFigures::default()
    };
    if let Ok(figures) = serde_json::to_vec(&figures) {
        said.last(&link, Kind::Figures, figures);
    }
    said.last(&link, Kind::Exit, (status as u32).to_le_bytes().to_vec());
    if heard.recv_timeout(UNHEARD) != Err(RecvTimeoutError::Timeout) {
        landing.forget();
    }
    drop(listening);
    Ok(status)
}
