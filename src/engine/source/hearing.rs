//! What the source hears while a phase waits: frames of the other host, and what the caller's threads tell.
use std::io::Write;

use crossbeam_channel::Sender;

use super::super::EngineError;
use super::super::error::peer_words;
use super::super::rejoin::Incoming;
use super::{Event, Source, StreamEnd, xl_ended};
use crate::codec::Level;
use crate::report::{DestinationFigures, LateFigures};
use crate::wire::{self, Frame, Kind, Need, WireError, from_json, u32_body, u64_body};

/// How hard pages are compressed that the other host needs at once.
const NEEDED_LEVEL: Level = Level::Zstd(1);

/// Want frames that may come before the end of the stream has been noticed.
const EARLY_WANTS: usize = 64;

/// Bytes of the destination's xl that may be waiting. What it has to say has 172; more is not believed to be its.
const INBOX_BYTES: usize = 64 << 10;

/// What a phase may meet.
pub(super) enum Signal {
    Xl,
    Verdict,
    Pong(Vec<u8>),
    Exit(i32),
    Streamed(Box<Result<StreamEnd, EngineError>>),
    Go(Option<[u8; 44]>),
}

impl Source {
    /// Collects `length` bytes that the destination's xl wrote.
    pub(super) fn message(&mut self, length: usize) -> Result<Vec<u8>, EngineError> {
        while self.inbox.len() < length {
            match self.next()? {
                Signal::Exit(status) => return Err(EngineError::RemoteEnded(status)),
                Signal::Go(_) => return Err(xl_ended()),
                _ => {}
            }
        }
        let rest = self.inbox.split_off(length);
        Ok(std::mem::replace(&mut self.inbox, rest))
    }

    pub(super) fn tell_xl(&mut self, bytes: &[u8]) -> Result<(), EngineError> {
        self.to_xl
            .write_all(bytes)
            .and_then(|()| self.to_xl.flush())
            .map_err(EngineError::Xl)
    }

    /// The next thing that a phase has to know of. Errors: the connection is lost, the peer gave up, somebody stops us.
    pub(super) fn next(&mut self) -> Result<Signal, EngineError> {
        loop {
            let event = self.events.recv().map_err(|_| EngineError::WorkerLost)?;
            if let Some(signal) = self.judge(event)? {
                return Ok(signal);
            }
        }
    }

    /// Deals with what concerns no phase.
    pub(super) fn judge(&mut self, event: Event) -> Result<Option<Signal>, EngineError> {
        let frame = match event {
            Event::Frame(frame) => frame,
            Event::LinkLost(error) => {
                let error = self.lost(error);
                if self.may_connect_again() {
                    self.connect_again(&error)?;
                    return Ok(None);
                }
                self.link_lost = true;
                return Err(error);
            }
            Event::XlEnded if self.handed_over => {
                log::warn!("xl was ended here; the guest is the other host's, and its pages go on to it");
                return Ok(None);
            }
            Event::XlEnded => return Err(EngineError::Stopped("xl was ended".into())),
            Event::CopyGone(error) => return Err(EngineError::CopyGone(error)),
            Event::Streamed(end) => return Ok(Some(Signal::Streamed(end))),
            Event::Go(go) => return Ok(Some(Signal::Go(go))),
            Event::Stop(reason) if self.handed_over => {
                log::warn!("too late to stop ({reason}): the guest is the other host's to start");
                return Ok(None);
            }
            Event::Stop(reason) => return Err(EngineError::Stopped(reason)),
        };
        Ok(Some(match frame.kind {
            Kind::Xl => {
                if self.inbox.len() + frame.body.len() > INBOX_BYTES {
                    return Err(EngineError::Protocol(
                        "the other host's xl says more than xl has to say",
                    ));
                }
                self.inbox.extend_from_slice(&frame.body);
                self.heard += frame.body.len() as u64;
                Signal::Xl
            }
            Kind::Verdict => {
                self.verdict = Some(from_json(frame.kind, &frame.body)?);
                Signal::Verdict
            }
            Kind::Exit => Signal::Exit(u32_body(frame.kind, &frame.body)? as i32),
            Kind::Figures => {
                let figures: DestinationFigures = from_json(frame.kind, &frame.body)?;
                let mut known = self.figures.lock();
                if let (Some(own), Some(told)) = (&mut known.late, &figures.late) {
                    *own = LateFigures {
                        sent: own.sent,
                        started: own.started,
                        outages: own.outages,
                        outage_ms: own.outage_ms,
                        lost_for_ms: 0,
                        ..told.clone()
                    };
                }
                known.destination = Some(figures);
                return Ok(None);
            }
            Kind::Pong => {
                self.pacing.answered(&frame.body);
                self.serving.iter().for_each(|serving| serving.answered(&frame.body));
                Signal::Pong(frame.body)
            }
            Kind::Ping if frame.body.is_empty() => return Ok(None),
            Kind::Ping => {
                self.say(Kind::Pong, &[&frame.body])?;
                return Ok(None);
            }
            Kind::Abort => {
                return Err(EngineError::PeerAborted(peer_words(&frame.body)));
            }
            Kind::Have | Kind::Need | Kind::Settled => {
                self.about_contents(frame)?;
                return Ok(None);
            }
            Kind::Want if self.agreement.late && self.serving.is_none() && self.early_wants.len() < EARLY_WANTS => {
                self.early_wants.push(frame.body);
                return Ok(None);
            }
            Kind::Want | Kind::Started => {
                let nothing_late = EngineError::Protocol("the other host speaks of late pages, and there are none");
                let serving = self.serving.as_ref().ok_or(nothing_late)?;
                if frame.kind == Kind::Want {
                    serving.want(&frame.body)?;
                } else {
                    self.figures.lock().late.get_or_insert_default().started = true;
                }
                return Ok(None);
            }
            _ => return Err(EngineError::Protocol("a frame came that only a source sends")),
        }))
    }

    fn about_contents(&mut self, frame: Frame) -> Result<(), EngineError> {
        let unasked = EngineError::Protocol("the other host speaks of contents that were not agreed on");
        let holdings = self.holdings.clone().ok_or(unasked)?;
        match frame.kind {
            Kind::Have => {
                self.told |= frame.body.is_empty();
                holdings.add(frame.body)?;
            }
            Kind::Need => {
                let need = Need::parse(&frame.body)?;
                let unknown = EngineError::Protocol("the other host needs a page that named no content");
                let pages = holdings.needed(&need).ok_or(unknown)?;
                self.figures.lock().needed_pages += need.rows.len() as u64;
                let packed = self.compressor.compress(NEEDED_LEVEL, &pages);
                let answer = wire::Contents {
                    record: need.record,
                    rows: need.rows,
                    codec: packed.as_ref().map_or(Level::Raw, |_| NEEDED_LEVEL).wire(),
                    block: packed.as_ref().unwrap_or(&pages),
                };
                answer.parts(|parts| self.say(Kind::Contents, parts))?;
            }
            _ => holdings.settled(u64_body(frame.kind, &frame.body)?),
        }
        Ok(())
    }

    pub(super) fn say(&self, kind: Kind, parts: &[&[u8]]) -> Result<(), EngineError> {
        self.link
            .send(kind, parts)
            .map_err(|error| EngineError::Wire(error.into()))
    }

    fn lost(&self, error: WireError) -> EngineError {
        match self.watch.silence_s() {
            Some(seconds) => EngineError::Silent { seconds },
            None if self.watch.is_unanswered() => EngineError::Wire(WireError::Unheard),
            None => EngineError::Wire(error),
        }
    }
}

/// Reads frames until the connection is lost.
pub(super) fn read_frames(mut reader: Incoming, events: &Sender<Event>) {
    loop {
        let event = match reader.read() {
            Ok(frame) if frame.kind == Kind::Unheard => Event::LinkLost(WireError::Unheard),
            Ok(frame) => Event::Frame(frame),
            Err(error) => Event::LinkLost(error),
        };
        let last = matches!(event, Event::LinkLost(_));
        if events.send(event).is_err() || last {
            return;
        }
    }
}

#[cfg(test)]
mod tests {
    use std::io::{self, Read};
    use std::sync::Arc;

    use super::super::{SILENCE, Watched, events};
    use super::*;
    use crate::wire::{FrameReader, FrameWriter};

    #[test]
    fn a_connection_that_the_other_host_has_given_up_is_lost() {
        let mut sent = Vec::new();
        let mut wire = FrameWriter::new(&mut sent);
        wire.write(Kind::Ping, &[]).unwrap();
        wire.write(Kind::Unheard, &[]).unwrap();
        // It stays open.
        let reader: Box<dyn Read + Send> = Box::new(io::Cursor::new(sent).chain(io::repeat(0)));
        let (reader, _watch) = Watched::new(reader, SILENCE, Arc::new(|| {})).unwrap();
        let (sender, events) = events();
        read_frames(FrameReader::new(reader), &sender);
        let seen: Vec<Event> = events.try_iter().collect();
        assert!(
            matches!(&seen[..], [Event::Frame(ping), Event::LinkLost(WireError::Unheard)] if ping.kind == Kind::Ping),
            "{} events",
            seen.len()
        );
    }
}
