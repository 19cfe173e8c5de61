//! The source once pages follow the guest: it serves them, connects again when the connection is lost, and another process can
//! go on for it.
use std::io::{self, Read};
use std::num::NonZeroU64;
use std::sync::Arc;
use std::time::Instant;

use crossbeam_channel::{Receiver, Sender};
use parking_lot::Mutex;

use super::super::link::{Link, Watched};
use super::super::rejoin::{self, Connect, Rejoined, SILENCE, Saying};
use super::super::serving::{Served, Serving};
use super::super::threads::spawn;
use super::super::{EngineError, FrameSource, LateJournal, chain};
use super::{Ending, Event, Negotiated, Source, SourceSetup, StreamEnd, read_frames};
use crate::late::PageServer;
use crate::late::journal::{Found, Noted};
use crate::page::ContentKey;
use crate::report::Figures;
use crate::stream::xl;
use crate::wire::{self, Agreement, FrameReader, Hello};

/// What is needed to go on for a source whose process was killed while pages followed the guest.
pub struct Following {
    pub found: Found,
    pub journal: Box<dyn LateJournal>,
    /// Reads the suspended guest's frames.
    pub frames: Box<dyn FrameSource>,
    pub connect: Connect,
    pub hello: Hello,
    pub figures: Arc<Mutex<Figures>>,
    /// See [`events`].
    pub events: (Sender<Event>, Receiver<Event>),
}

/// Connects to the destination, where the guest stands still, and sends what it lacks, to the end. Nobody has heard then what
/// the ending means: the caller destroys the copy here, or lets it go on.
pub fn follow(following: Following) -> Result<Ending, EngineError> {
    let Following {
        found,
        journal,
        frames,
        connect,
        hello,
        figures,
        events,
    } = following;
    let key = ContentKey::from_hex(&found.facts.content_key);
    let key = key.ok_or(EngineError::Protocol("the journal has no content key"))?;
    let hello = Hello {
        late: true,
        rejoin_token: Some(found.facts.token.clone()),
        ..hello
    };
    let (link, nothing) = (Link::without()?, Box::new(io::empty()) as Box<dyn Read + Send>);
    let (from_peer, watch) = Watched::new(nothing, SILENCE, Arc::new(|| {}))?;
    let negotiated = Negotiated {
        link: link.clone(),
        // The first that is read of it is that it is lost.
        reader: FrameReader::new(from_peer),
        watch,
        agreement: Agreement {
            version: wire::VERSION_MAX,
            contents: false,
            late: true,
            late_known: false,
            early: false,
            rejoin: hello.rejoin_token.clone(),
            peer: Hello::default(),
        },
        key: key.clone(),
        hello,
    };
    let bandwidth = NonZeroU64::new(found.facts.bandwidth);
    let serving = Serving::start(Served {
        pages: found.late.len(),
        server: PageServer::new(found.late, Vec::new(), bandwidth),
        frames,
        link,
        rejoins: true,
        key,
        table: Arc::default(),
        holdings: None,
        known: false,
        events: events.0.clone(),
        figures: figures.clone(),
    })?;
    serving.push();
    let setup = SourceSetup {
        to_xl: Box::new(io::sink()),
        failing: Box::new(|| {}),
        while_xl_waits: None,
        frames: None,
        verify: false,
        holding: None,
        learnt: None,
        bandwidth,
        contents: None,
        connect: Some(connect),
        journal: Some(journal),
        figures,
        events,
    };
    let mut source = Source::new(negotiated, setup)?;
    source.serving = Some(serving);
    source.handed_over = true;
    source.heard = (xl::R0_BANNER.len() + xl::R1_READY.len()) as u64;
    let ending = source.result();
    Ok(source.close(ending))
}

impl Source {
    /// From here on the destination may ask for the pages that have not gone.
    pub(super) fn serve_late(&mut self, end: &mut StreamEnd) -> Result<(), EngineError> {
        let Some(behind) = end.sent.behind.take() else {
            return Ok(());
        };
        if let Some(journal) = self.journal.as_mut().filter(|_| self.agreement.rejoin.is_some())
            && let Err(error) = journal.begin(&behind.late, Noted::default())
        {
            log::warn!(
                "it cannot be written down which pages follow the guest ({error}): should xenfold be killed, they are lost"
            );
        }
        self.serving = Some(Serving::start(Served {
            pages: behind.late.len(),
            server: PageServer::new(behind.late, behind.hot, self.bandwidth),
            frames: behind.frames,
            link: self.link.clone(),
            rejoins: self.agreement.rejoin.is_some() && self.connect.is_some(),
            key: self.key.clone(),
            table: end.sent.table.clone(),
            holdings: self.holdings.clone(),
            known: self.agreement.late_known,
            events: self.event_sender.clone(),
            figures: self.figures.clone(),
        })?);
        let (wants, serving) = (std::mem::take(&mut self.early_wants), self.serving.as_ref());
        wants
            .iter()
            .zip(serving.into_iter().cycle())
            .try_for_each(|(body, serving)| serving.want(body))
    }

    /// Whether a connection that is lost now can be set up again: the guest may run over there, and lacks pages.
    pub(super) fn may_connect_again(&self) -> bool {
        let agreed = self.agreement.rejoin.is_some() && self.connect.is_some();
        agreed && self.handed_over && self.serving.is_some() && !self.reported
    }

    /// The guest stands still over there until there is another connection. Errors: the other host does not wait for one, or
    /// somebody ended it.
    pub(super) fn connect_again(&mut self, lost: &EngineError) -> Result<(), EngineError> {
        log::warn!(
            "{}: the guest is the other host's and stands still there; the pages that it lacks are kept here. Connecting again",
            chain(lost)
        );
        self.link.lose();
        let (Some(connect), Some(serving)) = (&mut self.connect, &self.serving) else {
            return Err(EngineError::WorkerLost);
        };
        let (begin, figures, events) = (Instant::now(), self.figures.clone(), &self.events);
        figures.lock().late.get_or_insert_default().outages += 1;
        let saying = Saying {
            hello: &self.hello,
            heard: self.heard,
            bound: serving.bound(),
        };
        let connected = rejoin::connect_again(connect, &saying, || {
            figures.lock().late.get_or_insert_default().lost_for_ms = begin.elapsed().as_millis().max(1) as u64;
            // Nothing else that could come matters any more.
            events.try_iter().try_for_each(|event| match event {
                Event::Stop(reason) => Err(EngineError::Stopped(format!(
                    "{reason}, while there was no connection to the other host"
                ))),
                Event::CopyGone(error) => Err(EngineError::CopyGone(error)),
                _ => Ok(()),
            })
        });
        let outage_ms = begin.elapsed().as_millis() as u64;
        let mut known = figures.lock();
        let late = known.late.get_or_insert_default();
        (late.lost_for_ms, late.outage_ms) = (0, late.outage_ms + outage_ms);
        drop(known);
        self.link_lost = connected.is_err();
        let Rejoined {
            reader,
            watch,
            out,
            hangup,
            carrier,
            late_known,
            missing,
        } = connected?;
        log::warn!(
            "connected again after {outage_ms} ms: {} pages have not arrived",
            missing.len()
        );
        let silence = self.patience.connected_again(missing.len());
        watch.shorten(silence);
        // A host that is too busy to answer would lose each connection.
        if silence == SILENCE {
            watch.expect_answers(carrier.clone());
        }
        self.watch = watch;
        self.link.go_on(out, hangup, carrier);
        serving.connected_again(&missing, late_known)?;
        let to_events = self.event_sender.clone();
        spawn("xenfold-back", move || read_frames(reader, &to_events))?;
        Ok(())
    }
}
