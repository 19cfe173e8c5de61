//! The ticker: what a guest's user notices of a migration is the longest gap in its datagrams.

use std::process::ExitCode;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use clap::Args;

use crate::net::{self, Broadcaster, Listener, TICK_PORT};

const PERIOD: Duration = Duration::from_millis(10);

#[derive(Args)]
pub struct Tick {
    /// Name in the datagrams
    #[arg(long)]
    name: String,
}

impl Tick {
    pub fn run(&self) -> anyhow::Result<ExitCode> {
        let ticks = Broadcaster::new(TICK_PORT)?;
        let begin = Instant::now();
        let mut due = begin;
        for sequence in 0_u64.. {
            ticks.send(&format!("tick {} {sequence} {}", self.name, begin.elapsed().as_nanos()));
            // What was missed while the guest stood still is not caught up.
            due = (due + PERIOD).max(Instant::now());
            std::thread::sleep(due.saturating_duration_since(Instant::now()));
        }
        unreachable!("2^64 ticks last longer than the guest")
    }
}

/// How long a guest may be silent after what was listened to has ended.
const LAST_TICK: Duration = Duration::from_secs(60);

#[derive(Args)]
pub struct Ticks {
    /// The guest to listen to
    #[arg(long)]
    name: String,
    /// Listen so long instead of until stdin ends
    #[arg(long)]
    seconds: Option<u64>,
}

/// What arrived, from timestamps and sequence numbers alone.
#[derive(Default)]
struct Tally {
    received: u64,
    lost: u64,
    /// A sequence number at or below one seen before: reordering, or the guest runs twice.
    backward: u64,
    newest: Option<(u64, Duration)>,
    longest_gap: Duration,
    longest_gap_began: Duration,
}

impl Tally {
    fn add(&mut self, sequence: u64, at: Duration) {
        self.received += 1;
        let Some((newest, newest_at)) = self.newest else {
            self.newest = Some((sequence, at));
            return;
        };
        let gap = at.saturating_sub(newest_at);
        if gap > self.longest_gap {
            self.longest_gap = gap;
            self.longest_gap_began = newest_at;
        }
        if sequence <= newest {
            self.backward += 1;
            self.newest = Some((newest, at));
        } else {
            self.lost += sequence - newest - 1;
            self.newest = Some((sequence, at));
        }
    }
}

impl Tally {
    /// Nothing has come since the newest tick: that is a gap, too.
    fn end(&mut self, at: Duration) {
        if let Some((_, newest_at)) = self.newest
            && at.saturating_sub(newest_at) > self.longest_gap
        {
            self.longest_gap = at.saturating_sub(newest_at);
            self.longest_gap_began = newest_at;
        }
    }
}

fn milliseconds(duration: Duration) -> f64 {
    (duration.as_secs_f64() * 10_000.0).round() / 10.0
}

impl Ticks {
    pub fn run(&self) -> anyhow::Result<ExitCode> {
        let listener = Listener::new(TICK_PORT)?;
        let ended = Arc::new(AtomicBool::new(false));
        if self.seconds.is_none() {
            let ended = Arc::clone(&ended);
            std::thread::spawn(move || {
                let _ = std::io::copy(&mut std::io::stdin(), &mut std::io::sink());
                ended.store(true, Ordering::Relaxed);
            });
        }
        eprintln!("listening");
        let begin = Instant::now();
        let begin_at = net::now();
        let limit = Duration::from_secs(self.seconds.unwrap_or(u64::MAX));
        let mut tally = Tally::default();
        // A migration ends before its guest is heard again: the gap ends with the first tick behind it.
        let mut last_wait: Option<(u64, Instant)> = None;
        while begin.elapsed() < limit {
            if ended.load(Ordering::Relaxed) {
                let (before, since) = *last_wait.get_or_insert((tally.received, Instant::now()));
                if tally.received > before || since.elapsed() > LAST_TICK {
                    break;
                }
            }
            let Some(received) = listener.receive()? else {
                continue;
            };
            let mut words = received.line.split(' ');
            if words.next() == Some("tick")
                && words.next() == Some(&self.name)
                && let Some(Ok(sequence)) = words.next().map(str::parse)
            {
                tally.add(sequence, received.at);
            }
        }
        tally.end(net::now());
        let silence = tally
            .newest
            .map_or(begin.elapsed(), |(_, at)| net::now().saturating_sub(at));
        println!(
            "{{\"name\":\"{}\",\"listened_ms\":{},\"received\":{},\"lost\":{},\"backward\":{},\"longest_gap_ms\":{},\"longest_gap_at_ms\":{},\"silent_at_end_ms\":{}}}",
            self.name,
            milliseconds(begin.elapsed()),
            tally.received,
            tally.lost,
            tally.backward,
            milliseconds(tally.longest_gap),
            milliseconds(tally.longest_gap_began.saturating_sub(begin_at)),
            milliseconds(silence),
        );
        Ok(ExitCode::from(u8::from(tally.received == 0)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tally_counts_gaps_losses_and_doubles() {
        let mut tally = Tally::default();
        for (sequence, at_ms) in [(5, 1000), (6, 1010), (9, 1300), (9, 1305), (10, 1310)] {
            tally.add(sequence, Duration::from_millis(at_ms));
        }
        assert_eq!((tally.received, tally.lost, tally.backward), (5, 2, 1));
        assert_eq!(tally.longest_gap, Duration::from_millis(290));
        assert_eq!(tally.longest_gap_began, Duration::from_millis(1010));
        tally.end(Duration::from_millis(1600));
        assert_eq!(tally.longest_gap, Duration::from_millis(290));
        tally.end(Duration::from_millis(1610));
        assert_eq!(tally.longest_gap, Duration::from_millis(300));
    }
}
