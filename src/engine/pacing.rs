//! How far the source may run ahead of the destination.
//!
//! A slow destination is not felt by a source whose bytes wait in ssh and sockets: compressed rows of many seconds of
//! work fit there, and after the suspend the guest would wait for all of them. So every Rows frame is followed by a
//! Ping that the destination answers when it takes it up, and what is not answered is bounded: by what it lately took
//! up in [`AHEAD`], and never below [`LEAST_BYTES`].
use std::collections::VecDeque;
use std::num::NonZeroU64;
use std::time::{Duration, Instant};

use parking_lot::{Condvar, Mutex};

use super::EngineError;

/// Work that may be under way, in time.
const AHEAD: Duration = Duration::from_millis(250);

/// Guest bytes that may always be under way: two full records.
const LEAST_BYTES: u64 = 8 << 20;

/// How fast new measurements of the rate replace old ones.
const WEIGHT: f64 = 0.25;

/// Guest bytes that may be under way where the destination may ask for pages: it has to hold what comes meanwhile.
pub const BOUND_BYTES: u64 = 12 << 20;

/// Rows under way.
pub struct Pacing {
    bound: u64,
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Default)]
struct State {
    /// Numbers of the pings that are not answered and the guest bytes before each, oldest first.
    pending: VecDeque<(u64, u64)>,
    bytes: u64,
    sent: u64,
    /// Guest bytes a second that the destination takes up.
    rate: f64,
    answered: Option<Instant>,
    closed: bool,
}

impl State {
    fn window(&self) -> u64 {
        LEAST_BYTES.max((self.rate * AHEAD.as_secs_f64()) as u64)
    }
}

impl Pacing {
    /// Never more than `bound` guest bytes are under way.
    pub fn new(bound: u64) -> Pacing {
        Pacing {
            bound,
            state: Mutex::default(),
            changed: Condvar::new(),
        }
    }

    /// Waits until `bytes` more may go; the body of the ping to send behind them. Errors: the connection has ended.
    pub fn before(&self, bytes: u64) -> Result<[u8; 8], EngineError> {
        let mut state = self.state.lock();
        while !state.closed && state.bytes > 0 && state.bytes + bytes > state.window().min(self.bound) {
            self.changed.wait(&mut state);
        }
        if state.closed {
            return Err(EngineError::WorkerLost);
        }
        state.sent += 1;
        state.bytes += bytes;
        let number = state.sent;
        state.pending.push_back((number, bytes));
        Ok(number.to_le_bytes())
    }

    /// The destination has answered a ping. One that was not sent here is somebody else's.
    pub fn answered(&self, body: &[u8]) {
        let Ok(number) = <[u8; 8]>::try_from(body).map(u64::from_le_bytes) else {
            return;
        };
        let mut state = self.state.lock();
        if state.pending.front().is_none_or(|(oldest, _)| *oldest != number) {
            return;
        }
        let Some((_, bytes)) = state.pending.pop_front() else {
            return;
        };
        state.bytes -= bytes;
        let now = Instant::now();
        if let Some(last) = state.answered.replace(now) {
            let rate = bytes as f64 / now.duration_since(last).as_secs_f64().max(1e-6);
            state.rate += WEIGHT * (rate - state.rate);
        }
        drop(state);
        self.changed.notify_all();
    }

    /// Nothing will be answered any more.
    pub fn close(&self) {
        self.state.lock().closed = true;
        self.changed.notify_all();
    }
}

/// Keeps what is sent below a rate that the administrator set.
pub struct Throttle {
    bytes_per_s: f64,
    /// When all that was sent so far has had its time.
    free: Instant,
}

impl Throttle {
    pub fn new(bytes_per_s: NonZeroU64) -> Throttle {
        Throttle {
            bytes_per_s: bytes_per_s.get() as f64,
            free: Instant::now(),
        }
    }

    /// Waits until what was sent before has had its time, then counts `bytes` more. What was not used is lost.
    pub fn before(&mut self, bytes: usize) {
        std::thread::sleep(self.free.saturating_duration_since(Instant::now()));
        self.free = self.free.max(Instant::now()) + Duration::from_secs_f64(bytes as f64 / self.bytes_per_s);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_rate_is_kept_to() {
        let begin = Instant::now();
        let mut throttle = Throttle::new(NonZeroU64::new(1 << 20).unwrap());
        (0..5).for_each(|_| throttle.before(10 << 10));
        assert!(
            begin.elapsed() >= Duration::from_micros(39_000),
            "{:?}",
            begin.elapsed()
        );
    }

    #[test]
    fn what_is_under_way_is_bounded() {
        let pacing = std::sync::Arc::new(Pacing::new(u64::MAX));
        let first = pacing.before(4 << 20).unwrap();
        let second = pacing.before(4 << 20).unwrap();
        let waiting = pacing.clone();
        let third = std::thread::spawn(move || waiting.before(4 << 20));
        pacing.answered(b"not ours");
        pacing.answered(&second);
        assert!(!third.is_finished(), "answers come in order");
        pacing.answered(&first);
        assert_eq!(third.join().unwrap().unwrap(), 3u64.to_le_bytes());
        pacing.close();
        assert!(pacing.before(1).is_err());
    }
}
