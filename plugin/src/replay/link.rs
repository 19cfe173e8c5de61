//! The link between the two sides of a replay: pipes, paced without touching the bytes (splice and tee).
use std::fmt;
use std::fs::File;
use std::io::{self, Read, Seek, Write};
use std::os::fd::AsFd;
use std::str::FromStr;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use rustix::pipe::{SpliceFlags, fcntl_setpipe_size, splice};
use xenfold::wire::Hello;

use super::Side;
use super::gate::Starter;

/// Bytes in flight in each pipe.
const PIPE_BYTES: usize = 1 << 20;

/// How much may be sent at once: what a link of this rate carries in a millisecond, at least this.
const MIN_BURST: u64 = 64 << 10;

/// A link's rate; `None` is as fast as the machine.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Rate(Option<f64>);

impl FromStr for Rate {
    type Err = String;

    fn from_str(text: &str) -> Result<Rate, String> {
        let wrong = || format!("`{text}` is not a rate: none, or a number with mbit or gbit behind it");
        if text == "none" {
            return Ok(Rate(None));
        }
        let (number, unit) = match (text.strip_suffix("mbit"), text.strip_suffix("gbit")) {
            (Some(number), _) => (number, 1e6),
            (_, Some(number)) => (number, 1e9),
            _ => return Err(wrong()),
        };
        let number = number.parse::<f64>().map_err(|_| wrong())?;
        if number > 0.0 && number <= 1e6 {
            Ok(Rate(Some(number * unit / 8.0)))
        } else {
            Err(wrong())
        }
    }
}

impl Rate {
    pub fn bytes_a_second(self) -> Option<f64> {
        self.0
    }
}

impl fmt::Display for Rate {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.0 {
            None => f.write_str("none"),
            Some(bytes) if bytes >= 1e9 / 8.0 => write!(f, "{}gbit", bytes * 8.0 / 1e9),
            Some(bytes) => write!(f, "{}mbit", bytes * 8.0 / 1e6),
        }
    }
}

/// Lets bytes through at a rate: the time at which the next may go advances with what went. A link that was idle does
/// not catch up.
struct Pacer {
    rate: Option<f64>,
    next: Instant,
    /// How far whoever is paced may be ahead of the link.
    ahead: Duration,
}

impl Pacer {
    fn new(rate: Rate) -> Pacer {
        Pacer {
            rate: rate.0,
            next: Instant::now(),
            ahead: Duration::ZERO,
        }
    }

    fn burst(&self) -> usize {
        self.rate.map_or(PIPE_BYTES, |rate| {
            ((rate / 1000.0) as u64).clamp(MIN_BURST, PIPE_BYTES as u64) as usize
        })
    }

    fn sent(&mut self, bytes: usize) {
        let Some(rate) = self.rate else { return };
        let now = Instant::now();
        self.next = self.next.max(now - Duration::from_millis(2)) + Duration::from_secs_f64(bytes as f64 / rate);
        if let Some(wait) = self
            .next
            .checked_duration_since(now + self.ahead)
            .filter(|wait| *wait > Duration::from_micros(100))
        {
            thread::sleep(wait);
        }
    }
}

/// A file that takes bytes as a pipe to a link of a rate does.
pub struct Paced {
    file: File,
    pacer: Pacer,
}

impl Paced {
    pub fn new(file: File, rate: Rate) -> Paced {
        let ahead = rate.0.map_or(0.0, |rate| PIPE_BYTES as f64 / rate);
        let pacer = Pacer {
            ahead: Duration::from_secs_f64(ahead),
            ..Pacer::new(rate)
        };
        Paced { file, pacer }
    }
}

impl Write for Paced {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let n = self.file.write(bytes)?;
        self.pacer.sent(n);
        Ok(n)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.file.flush()
    }
}

/// Moves everything from one pipe to another at a rate; at least one end is a pipe. Returns the bytes moved. A
/// receiver that has closed ends it: its own error says why.
fn carry(from: impl AsFd, to: impl AsFd, rate: Rate) -> Result<u64> {
    let mut pacer = Pacer::new(rate);
    let mut total = 0;
    loop {
        match splice(&from, None, &to, None, pacer.burst(), SpliceFlags::empty()) {
            Ok(0) => return Ok(total),
            Ok(n) => {
                total += n as u64;
                pacer.sent(n);
            }
            Err(rustix::io::Errno::INTR) => {}
            Err(rustix::io::Errno::PIPE) => return Ok(total),
            Err(error) => return Err(io::Error::from(error)).context("the link between the sides broke"),
        }
    }
}

/// What went over the link: the bytes to the receiver, and the time from the first byte of the stream until all was there;
/// before that the sides got ready.
#[derive(Clone, Copy, Debug)]
pub struct Carried {
    pub bytes: u64,
    pub setup: Duration,
    pub elapsed: Duration,
}

/// Lets the sides begin when all are ready. `start`: when they were started.
struct Beginning {
    start: Instant,
    begun: thread::JoinHandle<Result<Instant>>,
}

impl Beginning {
    /// In a thread: sides that get ready talk to each other.
    fn of<const SIDES: usize>(start: Instant, mut sides: [Starter; SIDES]) -> Beginning {
        let begun = thread::spawn(move || {
            sides.iter_mut().try_for_each(Starter::wait_ready)?;
            let now = Instant::now();
            sides.iter_mut().for_each(Starter::begin);
            Ok(now)
        });
        Beginning { start, begun }
    }

    /// All has been carried.
    fn end(self, bytes: u64) -> Result<Carried> {
        let end = Instant::now();
        let begun = self.begun.join().ok().context("nobody let the sides begin")??;
        Ok(Carried {
            bytes,
            setup: begun - self.start,
            elapsed: end - begun,
        })
    }
}

/// Connects two sides until both have closed. What goes to the receiver is also written to `record`.
pub fn between(start: Instant, from: &mut Side, to: &mut Side, rate: Rate, record: Option<&File>) -> Result<Carried> {
    let beginning = Beginning::of(start, [from.starter()?, to.starter()?]);
    let (from, to) = (&mut from.child, &mut to.child);
    let (wire_out, wire_in) = (pipe(from.stdout.take())?, pipe(to.stdin.take())?);
    let (back_out, back_in) = (pipe(to.stdout.take())?, pipe(from.stdin.take())?);
    let back = thread::spawn(move || carry(back_out, back_in, Rate(None)));
    let bytes = match record {
        None => carry(wire_out, wire_in, rate)?,
        Some(record) => {
            let bytes = carry_recorded(&wire_out, &wire_in, record, rate)?;
            // The receiver of a copy ends when its input does.
            drop(wire_in);
            bytes
        }
    };
    back.join().ok().context("the link between the sides ended early")??;
    beginning.end(bytes)
}

fn carry_recorded(mut from: &File, mut to: &File, mut record: &File, rate: Rate) -> Result<u64> {
    let mut pacer = Pacer::new(rate);
    let mut buffer = vec![0; pacer.burst()];
    let mut total = 0;
    loop {
        let n = from.read(&mut buffer)?;
        if n == 0 {
            return Ok(total);
        }
        let part = buffer.get(..n).unwrap_or_default();
        record.write_all(part)?;
        to.write_all(part)?;
        total += n as u64;
        pacer.sent(n);
    }
}

/// A sender alone: it is answered with a hello and what it sends is thrown away.
pub fn to_nowhere(start: Instant, from: &mut Side, rate: Rate) -> Result<Carried> {
    let beginning = Beginning::of(start, [from.starter()?]);
    let from = &mut from.child;
    let wire_out = pipe(from.stdout.take())?;
    let mut back_in = pipe(from.stdin.take())?;
    answer(&mut back_in);
    let nowhere = File::options().write(true).open("/dev/null")?;
    let bytes = carry(wire_out, nowhere, rate)?;
    beginning.end(bytes)
}

/// A sender that writes to a recording itself, as fast as a link takes it.
pub fn to_recording(from: &mut Side) -> Result<()> {
    let beginning = Beginning::of(Instant::now(), [from.starter()?]);
    let mut back_in = pipe(from.child.stdin.take())?;
    answer(&mut back_in);
    // It writes nothing here, and closes it at its end.
    io::copy(&mut pipe(from.child.stdout.take())?, &mut io::sink())?;
    beginning.end(0).map(drop)
}

/// Says hello in the receiver's place. A sender of another mode does not read this.
fn answer(back_in: &mut File) {
    let hello = Hello {
        frames: true,
        ..Hello::default()
    };
    let _ = hello.write(back_in);
}

/// A receiver alone, fed from a recording. One that `answers` takes an end of the wire for a broken connection, and is
/// ready when it has heard the hello.
pub fn from_recording(
    start: Instant,
    mut recorded: &File,
    to: &mut Side,
    rate: Rate,
    answers: bool,
) -> Result<Carried> {
    recorded.rewind()?;
    let mut starter = to.starter()?;
    let to = &mut to.child;
    let mut wire_in = pipe(to.stdin.take())?;
    let back_out = pipe(to.stdout.take())?;
    let nowhere = File::options().write(true).open("/dev/null")?;
    let back = thread::spawn(move || carry(back_out, nowhere, Rate(None)));
    if answers {
        Hello::default().agree(&mut recorded)?;
        let length = recorded.stream_position()?;
        recorded.rewind()?;
        io::copy(&mut recorded.take(length), &mut wire_in)?;
    }
    starter.wait_ready()?;
    let begun = Instant::now();
    starter.begin();
    let bytes = carry(recorded, &wire_in, rate)?;
    // Dropped at once where it does not answer.
    let open = answers.then_some(wire_in);
    back.join().ok().context("the link ended early")??;
    let elapsed = begun.elapsed();
    drop(open);
    Ok(Carried {
        bytes,
        setup: begun - start,
        elapsed,
    })
}

fn pipe(end: Option<impl Into<std::os::fd::OwnedFd>>) -> Result<File> {
    let file = File::from(end.context("a side of the replay has no pipe")?.into());
    fcntl_setpipe_size(&file, PIPE_BYTES)?;
    Ok(file)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rates_are_read_and_printed() {
        for text in ["none", "100mbit", "1gbit", "10gbit", "2.5gbit"] {
            assert_eq!(text.parse::<Rate>().unwrap().to_string(), text);
        }
        for text in ["", "fast", "0mbit", "-1gbit", "1kbit", "nangbit"] {
            assert!(text.parse::<Rate>().is_err(), "{text}");
        }
    }
}
