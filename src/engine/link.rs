//! The connection as the engine uses it: frames out under a lock, signs of life in both directions.
use std::io::{self, Read, Write};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
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

/// Whatever carries a connection's bytes, as far as that can be looked at: an ssh.
pub trait Carrier: Send + Sync {
    /// Processor time so far; `None` where that is not known.
    fn cpu_time(&self) -> Option<Duration>;

    /// Whether the other host's kernel answers: not while it has not accepted a connection, nor where TCP has fallen back to waiting
    /// for seconds. `None` where that is not known, or not yet.
    fn is_answered(&self) -> Option<bool>;
}

/// A carrier that is not to be seen.
pub struct Unseen;

impl Carrier for Unseen {
    fn cpu_time(&self) -> Option<Duration> {
        None
    }

    fn is_answered(&self) -> Option<bool> {
        None
    }
}

/// A connection to the other host.
pub struct LinkEnds {
    pub to_peer: Box<dyn Write + Send>,
    pub from_peer: Box<dyn Read + Send>,
    pub hangup: Hangup,
    pub carrier: Arc<dyn Carrier>,
}

/// The sending half, shared by the threads of a side. It outlives a connection: where the two hosts connect again, those who
/// hold it go on with the new one.
#[derive(Clone)]
pub struct Link {
    shared: Arc<Shared>,
    /// Keeps the heartbeat going as long as anybody holds the link.
    _heartbeat: Sender<()>,
}

pub(super) type Outgoing = FrameWriter<Box<dyn Write + Send>>;

struct Shared {
    writer: Mutex<Writing>,
    /// Bytes sent, readable while a thread is stuck in sending.
    bytes: AtomicU64,
    carried_by: Mutex<(Hangup, Arc<dyn Carrier>)>,
}

struct Writing {
    /// `None` while there is no connection.
    out: Option<Outgoing>,
    /// Bytes sent on connections that were lost.
    before: u64,
}

impl Shared {
    fn write(&self, writer: &mut Writing, kind: Kind, parts: &[&[u8]]) -> io::Result<()> {
        let out = writer.out.as_mut().ok_or(io::ErrorKind::NotConnected)?;
        let result = out.write(kind, parts);
        self.bytes.store(writer.before + out.bytes(), Ordering::Relaxed);
        result
    }
}

impl Link {
    /// Takes the sending half over after the hellos and starts the heartbeat.
    pub fn start(
        to_peer: Box<dyn Write + Send>,
        hangup: Hangup,
        carrier: Arc<dyn Carrier>,
    ) -> Result<Link, EngineError> {
        let shared = Arc::new(Shared {
            writer: Mutex::new(Writing {
                out: Some(FrameWriter::new(to_peer)),
                before: 0,
            }),
            bytes: AtomicU64::new(0),
            carried_by: Mutex::new((hangup, carrier)),
        });
        let (keep, stopped) = bounded(0);
        let beating = Arc::downgrade(&shared);
        let beat = move || {
            while stopped.recv_timeout(SIGN_OF_LIFE) == Err(RecvTimeoutError::Timeout) {
                let Some(shared) = beating.upgrade() else { break };
                // A lock that is held means that something is being written: that is a sign of life, too. A failure
                // shows at the next real frame.
                if let Some(mut writer) = shared.writer.try_lock() {
                    let _ = writer.out.as_mut().map(|out| out.write(Kind::Ping, &[]));
                }
            }
        };
        spawn("xenfold-heartbeat", beat)?;
        Ok(Link {
            shared,
            _heartbeat: keep,
        })
    }

    /// Without a connection: the first one is still to come.
    pub fn without() -> Result<Link, EngineError> {
        let link = Link::start(Box::new(io::sink()), Arc::new(|| {}), Arc::new(Unseen))?;
        link.lose();
        Ok(link)
    }

    pub fn send(&self, kind: Kind, parts: &[&[u8]]) -> io::Result<()> {
        self.shared.write(&mut self.shared.writer.lock(), kind, parts)
    }

    /// Sends a frame unless another thread is stuck in sending. Whether it was handed over.
    pub fn send_if_free(&self, kind: Kind, parts: &[&[u8]]) -> bool {
        let writer = self.shared.writer.try_lock_for(SIGN_OF_LIFE);
        writer.is_some_and(|mut writer| self.shared.write(&mut writer, kind, parts).is_ok())
    }

    /// Bytes sent so far, without the hellos and the newest signs of life.
    pub fn bytes(&self) -> u64 {
        self.shared.bytes.load(Ordering::Relaxed)
    }

    /// Processor time of whatever carries the bytes.
    pub fn carrier_cpu(&self) -> Duration {
        self.carrier().cpu_time().unwrap_or_default()
    }

    /// What carries the connection that there is now.
    pub fn carrier(&self) -> Arc<dyn Carrier> {
        self.shared.carried_by.lock().1.clone()
    }

    pub fn hang_up(&self) {
        (self.hangup())();
    }

    /// What ends the connection that there is now, and no later one.
    pub fn hangup(&self) -> Hangup {
        self.shared.carried_by.lock().0.clone()
    }

    /// The connection is lost: whoever sends meets an error, until there is another one.
    pub fn lose(&self) {
        // Whoever is stuck in sending lets go of the lock.
        self.hang_up();
        let mut writer = self.shared.writer.lock();
        writer.before += writer.out.take().map_or(0, |out| out.bytes());
    }

    /// Goes on with another connection, on which something may have been sent already.
    pub fn go_on(&self, out: Outgoing, hangup: Hangup, carrier: Arc<dyn Carrier>) {
        *self.shared.carried_by.lock() = (hangup, carrier);
        let mut writer = self.shared.writer.lock();
        self.shared.bytes.store(writer.before + out.bytes(), Ordering::Relaxed);
        writer.out = Some(out);
    }
}

/// What a [`Watched`] reader has not been told yet: it is not inside `read`.
const NOT_READING: u64 = u64::MAX;

/// How often a watch looks.
const LEAST_STEP: Duration = Duration::from_millis(10);
const MOST_STEP: Duration = Duration::from_millis(250);

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
        let allowed = Arc::new(Mutex::new(Allowed {
            silence: timeout,
            answered: None,
        }));
        let began = Arc::new(AtomicU64::new(NOT_READING));
        let fired = Arc::new(AtomicU64::new(0));
        let (keep, stopped) = bounded::<()>(0);
        let unanswered = Arc::new(AtomicBool::new(false));
        let (seen, note, limit, stuck) = (began.clone(), fired.clone(), allowed.clone(), unanswered.clone());
        let watch = move || {
            let step = (timeout / 8).clamp(LEAST_STEP, MOST_STEP);
            while stopped.recv_timeout(step) == Err(RecvTimeoutError::Timeout) {
                let began = seen.load(Ordering::Relaxed);
                let silence = start.elapsed().saturating_sub(Duration::from_millis(began));
                let limit = limit.lock();
                if silence > limit.silence {
                    note.store(silence.as_secs().max(1), Ordering::Relaxed);
                } else if limit.is_unanswered() {
                    stuck.store(true, Ordering::Relaxed);
                } else {
                    continue;
                }
                drop(limit);
                hangup();
                break;
            }
        };
        spawn("xenfold-watch", watch)?;
        let watch = Watch {
            _keep: keep,
            allowed,
            fired,
            unanswered,
        };
        Ok((Watched { inner, began, start }, watch))
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

/// What a watch allows.
struct Allowed {
    silence: Duration,
    /// What the other host's kernel has to answer.
    answered: Option<Arc<dyn Carrier>>,
}

impl Allowed {
    fn is_unanswered(&self) -> bool {
        let carrier = self.answered.as_ref();
        carrier.is_some_and(|carrier| carrier.is_answered() == Some(false))
    }
}

/// Keeps a watch alive; dropped, nothing is hung up any more.
pub struct Watch {
    _keep: Sender<()>,
    allowed: Arc<Mutex<Allowed>>,
    fired: Arc<AtomicU64>,
    unanswered: Arc<AtomicBool>,
}

impl Watch {
    /// From here on no longer silence is allowed than this.
    pub fn shorten(&self, timeout: Duration) {
        let mut allowed = self.allowed.lock();
        allowed.silence = allowed.silence.min(timeout);
    }

    /// From here on the other host's kernel has to answer `carrier`.
    pub fn expect_answers(&self, carrier: Arc<dyn Carrier>) {
        self.allowed.lock().answered = Some(carrier);
    }

    /// Whether the connection was hung up because it did not.
    pub fn is_unanswered(&self) -> bool {
        self.unanswered.load(Ordering::Relaxed)
    }

    /// Seconds of silence after which the connection was hung up, if it was.
    pub fn silence_s(&self) -> Option<u64> {
        Some(self.fired.load(Ordering::Relaxed)).filter(|seconds| *seconds > 0)
    }
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;

    /// A carrier of which this is known.
    pub struct Answered(pub Option<bool>);

    impl Carrier for Answered {
        fn cpu_time(&self) -> Option<Duration> {
            None
        }

        fn is_answered(&self) -> Option<bool> {
            self.0
        }
    }

    #[test]
    fn a_connection_that_is_not_answered_is_hung_up() {
        let hung_up = |answered| {
            let (sender, hangups) = bounded(1);
            let hangup = Arc::new(move || {
                let _ = sender.try_send(());
            });
            let (_reader, watch) = Watched::new(io::empty(), Duration::from_millis(80), hangup).unwrap();
            watch.expect_answers(Arc::new(Answered(answered)));
            let hung_up = hangups.recv_timeout(Duration::from_millis(500)).is_ok();
            (hung_up, watch.is_unanswered(), watch.silence_s())
        };
        assert_eq!(hung_up(Some(false)), (true, true, None));
        assert_eq!(hung_up(Some(true)), (false, false, None));
        assert_eq!(hung_up(None), (false, false, None));
    }
}
