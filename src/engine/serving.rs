//! The source's thread that sends late pages: those that are asked for, then the others, from the suspended guest's frames.
//!
//! Nothing is kept of the pages: a backend may still finish reading into one, so what a page holds is what it holds when it
//! is sent.
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::Instant;

use crossbeam_channel::Sender as Events;
use parking_lot::{Condvar, Mutex};

use super::contents::Holdings;
use super::link::Link;
use super::source::Event;
use super::threads::spawn;
use super::{EngineError, FrameError, FrameSource, chain, read_or_gone};
use crate::codec::{Compressor, Level};
use crate::late::{Batch, Next, PageServer};
use crate::page::{ContentId, ContentKey, PAGE_SIZE, Pfn, is_zero};
use crate::page_set::PageSet;
use crate::report::Figures;
use crate::table::PageTable;
use crate::wire::{Kind, LatePages, LateRow, wants};

/// How hard late pages are compressed: somebody may wait for them.
const LEVEL: Level = Level::Zstd(1);

/// What tells pings behind late pages from the others.
const LATE_PING: u64 = 1 << 63;

/// What is needed to send late pages.
pub(super) struct Served {
    pub server: PageServer,
    pub pages: u64,
    pub frames: Box<dyn FrameSource>,
    pub link: Link,
    pub rejoins: bool,
    pub key: ContentKey,
    /// What the pages hold that are not late.
    pub table: Arc<PageTable>,
    /// What the destination holds, and whether it looks there for late pages.
    pub holdings: Option<Arc<Holdings>>,
    pub known: bool,
    /// Told when there is nothing left to send from.
    pub events: Events<Event>,
    pub figures: Arc<Mutex<Figures>>,
}

/// The thread, as the phases see it. Dropped, it ends.
pub(super) struct Serving {
    shared: Arc<Shared>,
    _thread: JoinHandle<()>,
}

struct Shared {
    state: Mutex<State>,
    changed: Condvar,
    start: Instant,
}

struct State {
    server: PageServer,
    closed: bool,
    /// The connection is set up again when it is lost.
    rejoins: bool,
    /// Nothing can be sent for now.
    lost: bool,
    /// Connections so far.
    connections: u64,
    /// Whoever is at the other end looks contents up.
    known: bool,
}

impl Drop for Serving {
    fn drop(&mut self) {
        self.shared.state.lock().closed = true;
        self.shared.changed.notify_all();
    }
}

impl Serving {
    pub fn start(served: Served) -> Result<Serving, EngineError> {
        let Served {
            server,
            pages,
            frames,
            link,
            rejoins,
            key,
            table,
            holdings,
            known,
            events,
            figures,
        } = served;
        figures.lock().late.get_or_insert_default().pages = pages;
        let shared = Arc::new(Shared {
            state: Mutex::new(State {
                server,
                closed: false,
                rejoins,
                lost: false,
                connections: 0,
                known,
            }),
            changed: Condvar::new(),
            start: Instant::now(),
        });
        let sender = Sender {
            zero: key.id(&crate::page::ZERO_PAGE),
            frames,
            link,
            key,
            table,
            holdings,
            sent: PageTable::default(),
            events,
            compressor: Compressor::default(),
            figures,
        };
        let with = shared.clone();
        let thread = spawn("xenfold-late", move || with.run(sender))?;
        Ok(Serving {
            shared,
            _thread: thread,
        })
    }

    /// The destination asks for pages. Errors: one of them is not late.
    pub fn want(&self, body: &[u8]) -> Result<(), EngineError> {
        let wants = wants(body)?;
        let mut state = self.shared.state.lock();
        if !wants.into_iter().all(|want| state.server.want(want)) {
            return Err(EngineError::Protocol("a page was asked for that is not late"));
        }
        drop(state);
        self.shared.changed.notify_all();
        Ok(())
    }

    /// The destination can take all pages.
    pub fn push(&self) {
        self.shared.state.lock().server.push();
        self.shared.changed.notify_all();
    }

    /// One more than the highest page that may be late.
    pub fn bound(&self) -> u64 {
        self.shared.state.lock().server.bound()
    }

    /// There is another connection, to somebody who looks contents up or not, and these are the pages that have not arrived.
    /// Errors: one of them is not late.
    pub fn connected_again(&self, missing: &PageSet, known: bool) -> Result<(), EngineError> {
        let mut state = self.shared.state.lock();
        if !state.server.connected_again(missing) {
            return Err(EngineError::Protocol("it lacks pages that were never late"));
        }
        state.lost = false;
        state.known = known;
        state.connections += 1;
        drop(state);
        self.shared.changed.notify_all();
        Ok(())
    }

    /// The destination has answered a ping: one of ours or another.
    pub fn answered(&self, body: &[u8]) {
        let number = <[u8; 8]>::try_from(body).map_or(0, u64::from_le_bytes);
        if number & LATE_PING != 0 {
            let now = self.shared.start.elapsed();
            self.shared.state.lock().server.answered(now, number & !LATE_PING);
            self.shared.changed.notify_all();
        }
    }
}

impl Shared {
    fn run(&self, mut sender: Sender) {
        let mut state = self.state.lock();
        while !state.closed {
            if state.lost {
                self.changed.wait(&mut state);
                continue;
            }
            match state.server.next(self.start.elapsed()) {
                Next::Wait => self.changed.wait(&mut state),
                Next::At(time) => {
                    // Whatever wakes it, it looks again.
                    let _ = self.changed.wait_until(&mut state, self.start + time);
                }
                Next::Send(batch) => {
                    let (connection, known) = (state.connections, state.known);
                    drop(state);
                    let sent = sender.send(&batch, known);
                    state = self.state.lock();
                    match sent {
                        // What went to a connection that is gone has not arrived: its pages are among the missing ones.
                        _ if state.connections != connection => {}
                        Ok(bytes) => state.server.sent(self.start.elapsed(), &batch, bytes),
                        Err(EngineError::Frame(error @ FrameError::Gone(_))) => {
                            state.closed = true;
                            // The phases have ended when nobody receives this.
                            let _ = sender.events.send(Event::CopyGone(error));
                        }
                        Err(error) => {
                            if matches!(error, EngineError::Wire(_)) {
                                log::debug!("late pages cannot be sent: {}", chain(&error));
                            } else {
                                log::warn!("late pages cannot be read here: {}", chain(&error));
                                // The guest must not run on and wait for them.
                                sender.link.hang_up();
                            }
                            // The reader of the connection finds it broken, too, and tells the phases.
                            state.lost = state.rejoins;
                            state.closed |= !state.lost;
                        }
                    }
                }
            }
        }
    }
}

struct Sender {
    frames: Box<dyn FrameSource>,
    link: Link,
    key: ContentKey,
    zero: ContentId,
    table: Arc<PageTable>,
    holdings: Option<Arc<Holdings>>,
    /// What the late pages held that were sent.
    sent: PageTable,
    events: Events<Event>,
    compressor: Compressor,
    figures: Arc<Mutex<Figures>>,
}

/// Pages, and what each is.
type Rows = Vec<(Pfn, LateRow)>;

impl Sender {
    /// Sends a batch, and a ping behind it. Bytes that went to the link.
    fn send(&mut self, batch: &Batch, known: bool) -> Result<usize, EngineError> {
        let (rows, full) = self.rows(batch, known)?;
        let packed = self.compressor.compress(LEVEL, &full);
        let frame = LatePages {
            pages: rows,
            codec: packed.as_ref().map_or(Level::Raw, |_| LEVEL).wire(),
            block: packed.as_ref().unwrap_or(&full),
        };
        let bytes = frame.parts(|parts| {
            let bytes: usize = parts.iter().map(|part| part.len()).sum();
            self.say(Kind::Late, parts).map(|()| bytes)
        })?;
        self.say(Kind::Ping, &[&(batch.number | LATE_PING).to_le_bytes()])?;
        let mut figures = self.figures.lock();
        figures.wire_bytes = self.link.bytes();
        figures.stream_bytes += (batch.pages.len() * PAGE_SIZE) as u64;
        figures.memory_processed_bytes += (batch.pages.len() * PAGE_SIZE) as u64;
        figures.late.get_or_insert_default().sent += batch.pages.len() as u64;
        Ok(bytes)
    }

    fn say(&self, kind: Kind, parts: &[&[u8]]) -> Result<(), EngineError> {
        self.link
            .send(kind, parts)
            .map_err(|error| EngineError::Wire(error.into()))
    }

    /// What each page is, and the bytes of those that are sent in full.
    fn rows(&mut self, batch: &Batch, known: bool) -> Result<(Rows, Vec<u8>), EngineError> {
        let mut pages = vec![0; batch.pages.len() * PAGE_SIZE];
        let gone = read_or_gone(self.frames.as_mut(), &batch.pages, &mut pages)?;
        self.frames.check_suspended()?;
        let (pages, _) = pages.as_chunks::<PAGE_SIZE>();
        let ids = self.key.ids(pages);
        let held = match self.holdings.as_ref().filter(|_| known && !batch.plain) {
            Some(holdings) => holdings.seem_held(&ids),
            None => vec![false; ids.len()],
        };
        let (mut rows, mut full) = (Vec::new(), Vec::new());
        for ((((pfn, page), id), gone), held) in batch.pages.iter().zip(pages).zip(ids).zip(gone).zip(held) {
            let row = if gone {
                LateRow::Gone
            } else if id == self.zero && is_zero(page) {
                LateRow::Zero
            } else if let Some(other) = self.holder(&id).filter(|_| !batch.plain) {
                LateRow::Same(id, other)
            } else if held {
                LateRow::Known(id)
            } else {
                full.extend_from_slice(page);
                LateRow::Full(id)
            };
            if !gone {
                // Without it, pages like this one are sent in full.
                let _ = self.sent.set(*pfn, id);
            }
            rows.push((*pfn, row));
        }
        Ok((rows, full))
    }

    /// A page that the destination has, and that held this content once.
    fn holder(&self, id: &ContentId) -> Option<Pfn> {
        self.sent.holder(id).or_else(|| self.table.holder(id))
    }
}
