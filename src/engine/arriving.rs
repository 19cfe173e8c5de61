//! The destination's thread that reads what the source sends: the stream, and behind it the pages that follow the guest, over
//! as many connections as that takes.
use std::sync::Arc;

use crossbeam_channel::{Receiver, Sender};
use parking_lot::Mutex;

use super::destination::Event;
use super::error::peer_words;
use super::landing::{Landing, LateLanding};
use super::link::{Link, Watch};
use super::receiving::Receiving;
use super::rejoin::{Incoming, Joined};
use super::said::Said;
use super::threads::spawn;
use super::{EngineError, chain};
use crate::stream::xl;
use crate::wire::{Kind, WireError};

/// What the thread works with.
pub(super) struct Arriving {
    pub link: Link,
    pub events: Sender<Event>,
    pub landing: LateLanding,
    pub said: Arc<Said>,
    /// Connections that take the place of one that was lost; `None`: there will be none.
    pub joined: Option<Receiver<Joined>>,
    /// Of the first connection, where another one may follow.
    pub watch: Option<Arc<Watch>>,
    /// Told when the source has heard all.
    pub heard: Sender<()>,
    /// What the source has learnt of how the guest writes, when it comes.
    pub model: Arc<Mutex<Option<Vec<u8>>>>,
}

/// Why a connection is not read any further.
enum Ended {
    /// It is lost, or what it brings cannot be put where it belongs for now: the source connects again.
    Lost(EngineError),
    /// What came on it is not to be believed, or the source has given up. The guest stands still; somebody may have the source try
    /// again.
    Refused,
}

impl Arriving {
    /// Reads the source's frames: those of the stream become the stream, the others events. When the phases have ended
    /// nobody receives these; the connection is still read, so that the source is never stuck in sending before it has been
    /// told.
    pub fn read(self, mut reader: Incoming, receiving: Receiving) {
        let (answers, stopper) = (receiving.answers(), receiving.stopper());
        let (mut receiving, events) = (Some(receiving), &self.events);
        let (mut failed, mut let_go) = (false, false);
        loop {
            let frame = match reader.read() {
                Ok(frame) => frame,
                Err(error) => {
                    let silence = self.watch.as_ref().and_then(|watch| watch.silence_s());
                    let closed = EngineError::Wire(WireError::Closed);
                    let why = silence.map_or(closed, |seconds| EngineError::Silent { seconds });
                    let _ = events.send(Event::LinkLost(error));
                    self.go_on(Ended::Lost(why), let_go);
                    return;
                }
            };
            let kind = frame.kind;
            let taken = match kind {
                Kind::Go if frame.body.len() == xl::GO.len() => {
                    let_go = true;
                    let _ = events.send(Event::Go(frame.body));
                    continue;
                }
                Kind::Done => {
                    self.done();
                    continue;
                }
                // Before GO it is as wrong as any frame that does not belong there.
                Kind::Model if let_go => {
                    *self.model.lock() = Some(frame.body);
                    continue;
                }
                Kind::Late => {
                    if let Err(ended) = self.late(&frame.body, let_go) {
                        let why = "its pages are not what they are said to be";
                        let _ = events.send(Event::LinkLost(WireError::BadBody { kind, why }));
                        self.go_on(ended, let_go);
                        return;
                    }
                    continue;
                }
                Kind::Abort => {
                    let _ = events.send(Event::Abort(peer_words(&frame.body)));
                    if let_go {
                        self.given_up(&frame.body);
                    }
                    continue;
                }
                // A sign of life: a moment to see that the rebuilding has failed when nothing else comes.
                Kind::Ping if frame.body.is_empty() => match &receiving {
                    Some(stream) if stream.has_ended() => Err(EngineError::WorkerLost),
                    _ => continue,
                },
                Kind::Ping if receiving.is_none() => {
                    // A connection that cannot take this fails at its next read.
                    let _ = self.link.send(Kind::Pong, &[&frame.body]);
                    continue;
                }
                _ if failed => continue,
                // The last ones may come when the stream itself is complete.
                Kind::Contents => answers.arrived(&frame.body),
                kind => match &mut receiving {
                    Some(stream) => stream.frame(frame),
                    None => {
                        let why = "the stream had ended";
                        let _ = events.send(Event::LinkLost(WireError::BadBody { kind, why }));
                        return;
                    }
                },
            };
            failed = taken.is_err();
            if failed {
                stopper.stop();
            }
            let Some(stream) = receiving.take_if(|_| failed || kind == Kind::End) else {
                if failed {
                    let why = "it was not asked for";
                    let _ = events.send(Event::LinkLost(WireError::BadBody { kind, why }));
                }
                continue;
            };
            // What was asked for can still come meanwhile.
            let finished = events.clone();
            let finish = move || {
                let result = match (taken, stream.finish()) {
                    (Err(error), Err(EngineError::WorkerLost)) => Err(error),
                    (_, result) => result,
                };
                let _ = finished.send(Event::Rebuilt(Box::new(result)));
            };
            if let Err(error) = spawn("xenfold-finish", finish) {
                let _ = events.send(Event::Rebuilt(Box::new(Err(error))));
            }
        }
    }

    /// Goes on for a process that was killed: there is no connection, and others may come.
    pub fn go_on_reading(self) {
        self.go_on(Ended::Lost(EngineError::Wire(WireError::Closed)), true);
    }

    /// Takes late pages. Errors: they are not what they are said to be, and the source has been told, or, once the guest is let go, Xen
    /// does not take them now.
    fn late(&self, body: &[u8], let_go: bool) -> Result<(), Ended> {
        let late = self.landing.lock().clone();
        let unasked = EngineError::Protocol("late pages came before there were any");
        let taken = late.as_ref().map_or(Err(unasked), |landing| landing.arrived(body));
        taken.map_err(|error| {
            if let_go && self.joined.is_some() && matches!(error, EngineError::Frame(_)) {
                return Ended::Lost(error);
            }
            self.link.send_if_free(Kind::Abort, &[chain(&error).as_bytes()]);
            late.iter().for_each(|landing| landing.stands_still(&error));
            Ended::Refused
        })
    }

    /// The source cannot send what is missing, and ends: it will hear nothing more.
    fn given_up(&self, body: &[u8]) {
        self.done();
        if let Some(landing) = self.landing.lock().clone() {
            landing.stands_still(&EngineError::PeerAborted(peer_words(body)));
        }
    }

    fn done(&self) {
        // It is told once; whoever waits has enough with that.
        let _ = self.heard.try_send(());
    }

    /// The first connection has ended. `let_go`: the source had let the guest go, so that it may run here, and what it lacks
    /// can come on another one.
    fn go_on(self, ended: Ended, let_go: bool) {
        let Some(landing) = self.landing.lock().clone() else {
            return;
        };
        let Some(joined) = self.joined.as_ref().filter(|_| let_go) else {
            if let Ended::Lost(why) = ended {
                landing.stands_still(&why);
            }
            return;
        };
        let mut ended = ended;
        loop {
            if let Ended::Lost(why) = &ended {
                if matches!(why, EngineError::Silent { .. }) {
                    // The other direction may be open, and sshd would keep it so for as long as this process lives.
                    self.link.send_if_free(Kind::Unheard, &[]);
                }
                self.link.lose();
                landing.link_lost(why);
            }
            let Ok(first) = joined.recv() else {
                landing.stands_still(&EngineError::Wire(WireError::Closed));
                return;
            };
            let newest = joined.try_iter().last().unwrap_or(first);
            ended = match landing.connected_again(newest, &self.said) {
                Err(error) => Ended::Lost(error),
                Ok((reader, watch)) => match (self.follow(reader, &landing), watch.silence_s()) {
                    (Ended::Lost(_), Some(seconds)) => Ended::Lost(EngineError::Silent { seconds }),
                    (ended, _) => ended,
                },
            };
        }
    }

    /// Reads a connection on which only late pages come.
    fn follow(&self, mut reader: Incoming, landing: &Landing) -> Ended {
        loop {
            let frame = match reader.read() {
                Ok(frame) => frame,
                Err(error) => return Ended::Lost(EngineError::Wire(error)),
            };
            match frame.kind {
                Kind::Late => {
                    if let Err(ended) = self.late(&frame.body, true) {
                        return ended;
                    }
                }
                Kind::Abort => {
                    self.given_up(&frame.body);
                    return Ended::Refused;
                }
                Kind::Ping if frame.body.is_empty() => {}
                Kind::Ping => {
                    // A connection that cannot take this fails at its next read.
                    let _ = self.link.send(Kind::Pong, &[&frame.body]);
                }
                Kind::Done => self.done(),
                _ => {
                    landing.stands_still(&EngineError::Protocol("a frame came that does not follow a guest"));
                    return Ended::Refused;
                }
            }
        }
    }
}
