//! The connection as the engine uses it: frames out under a lock, signs of life in both directions.
use std::io::{self, Read, Write};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use crossbeam_channel::{RecvTimeoutError, Sender, bounded};
use parking_lot::Mutex;

use super::EngineError;
use super::threads::spawn;
use crate::wire::{FrameWriter, Kind};

/// How often a side that has nothing to say shows that it lives.
const SIGN_OF_LIFE: Duration = Duration::from_secs(1);

/// Ends the connection for good, whatever is blocked on it: kills ssh, closes sockets.
pub type Hangup = Arc<dyn Fn() + Send + Sync>;

/// Processor time so far of whatever carries the bytes; `None` where that is not known.
pub type Carrier = Arc<dyn Fn() -> Option<Duration> + Send + Sync>;

/// A connection to the other host.
pub struct LinkEnds {
    pub to_peer: Box<dyn Write + Send>,
    pub from_peer: Box<dyn Read + Send>,
    pub hangup: Hangup,
    pub carrier: Carrier,
}

/// The sending half, shared by the threads of a side.
#[derive(Clone)]
pub struct Link {
    writer: Arc<Mutex<FrameWriter<Box<dyn Write + Send>>>>,
    /// Bytes sent, readable while a thread is stuck in sending.
    bytes: Arc<AtomicU64>,
    hangup: Hangup,
    carrier: Carrier,
    /// Keeps the heartbeat going as long as anybody holds the link.
    _heartbeat: Sender<()>,
}

impl Link {
    /// Takes the sending half over after the hellos and starts the heartbeat.
    pub fn start(to_peer: Box<dyn Write + Send>, hangup: Hangup, carrier: Carrier) -> Result<Link, EngineError> {
        let writer = Arc::new(Mutex::new(FrameWriter::new(to_peer)));
        let (keep, stopped) = bounded(0);
        let beating = Arc::downgrade(&writer);
        let beat = move || {
            while stopped.recv_timeout(SIGN_OF_LIFE) == Err(RecvTimeoutError::Timeout) {
                let Some(writer) = beating.upgrade() else { break };
                // A lock that is held means that something is being written: that is a sign of life, too. A failure
                // shows at the next real frame.
                if let Some(mut writer) = writer.try_lock() {
                    let _ = writer.write(Kind::Ping, &[]);
                }
            }
        };
        spawn("xenfold-heartbeat", beat)?;
        Ok(Link {
            writer,
            bytes: Arc::default(),
            hangup,
            carrier,
            _heartbeat: keep,
        })
    }

    pub fn send(&self, kind: Kind, parts: &[&[u8]]) -> io::Result<()> {
        self.write(&mut self.writer.lock(), kind, parts)
    }

    fn write(&self, writer: &mut FrameWriter<Box<dyn Write + Send>>, kind: Kind, parts: &[&[u8]]) -> io::Result<()> {
        let result = writer.write(kind, parts);
        self.bytes.store(writer.bytes(), Ordering::Relaxed);
        result
    }

    /// Sends a frame unless another thread is stuck in sending. Whether it was handed over.
    pub fn send_if_free(&self, kind: Kind, parts: &[&[u8]]) -> bool {
        let writer = self.writer.try_lock_for(SIGN_OF_LIFE);
        writer.is_some_and(|mut writer| self.write(&mut writer, kind, parts).is_ok())
    }

    /// Bytes sent so far, without the hello and the newest signs of life.
    pub fn bytes(&self) -> u64 {
        self.bytes.load(Ordering::Relaxed)
    }

    /// Processor time of whatever carries the bytes.
    pub fn carrier_cpu(&self) -> Duration {
        (self.carrier)().unwrap_or_default()
    }

    pub fn hang_up(&self) {
        (self.hangup)();
    }
}

/// What a [`Watched`] reader has not been told yet: it is not inside `read`.
const NOT_READING: u64 = u64::MAX;

/// A reader whose `read` may not take longer than a timeout. Only the time inside `read` counts: a side that is busy
/// otherwise does not take the other for dead.
pub struct Watched<R> {
    inner: R,
    /// When the current `read` began, in ms since `start`.
    began: Arc<AtomicU64>,
    start: Instant,
}

impl<R: Read> Watched<R> {
    /// Watches `inner`; when nothing arrives for `timeout` the connection is hung up. The watch ends with the handle.
    pub fn new(inner: R, timeout: Duration, hangup: Hangup) -> Result<(Watched<R>, Watch), EngineError> {
        let start = Instant::now();
        let began = Arc::new(AtomicU64::new(NOT_READING));
        let fired = Arc::new(AtomicU64::new(0));
        let (keep, stopped) = bounded::<()>(0);
        let (seen, note) = (began.clone(), fired.clone());
        let watch = move || {
            let step = (timeout / 8).max(Duration::from_millis(10));
            while stopped.recv_timeout(step) == Err(RecvTimeoutError::Timeout) {
                let began = seen.load(Ordering::Relaxed);
                let silence = start.elapsed().saturating_sub(Duration::from_millis(began));
                if silence > timeout {
                    note.store(silence.as_secs().max(1), Ordering::Relaxed);
                    hangup();
                    break;
                }
            }
        };
        spawn("xenfold-watch", watch)?;
        Ok((Watched { inner, began, start }, Watch { _keep: keep, fired }))
    }
}

impl<R: Read> Read for Watched<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        self.began
            .store(self.start.elapsed().as_millis() as u64, Ordering::Relaxed);
        let result = self.inner.read(buffer);
        self.began.store(NOT_READING, Ordering::Relaxed);
        result
    }
}

/// Keeps a watch alive; dropped, nothing is hung up any more.
pub struct Watch {
    _keep: Sender<()>,
    fired: Arc<AtomicU64>,
}

impl Watch {
    /// Seconds of silence after which the connection was hung up, if it was.
    pub fn silence_s(&self) -> Option<u64> {
        Some(self.fired.load(Ordering::Relaxed)).filter(|seconds| *seconds > 0)
    }
}
