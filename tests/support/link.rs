//! A link between the two agents that can be cut, silenced, stalled and lied on at any frame.
use super::pipe::{Pipe, PipeWriter, pipe};
use std::collections::HashMap;
use std::io::{self, Write};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use xenfold::engine::{LinkEnds, Unseen};

/// Numbers of frame kinds, as FORMAT.md has them.
pub mod kind {
    pub const BYTES: u16 = 1;
    pub const GUEST: u16 = 2;
    pub const ROWS: u16 = 3;
    pub const FORGET: u16 = 4;
    pub const END: u16 = 5;
    pub const GO: u16 = 6;
    pub const LATE: u16 = 8;
    pub const REJOIN: u16 = 9;
    pub const DONE: u16 = 10;
    pub const MODEL: u16 = 11;
    pub const XL: u16 = 16;
    pub const VERDICT: u16 = 17;
    pub const FIGURES: u16 = 18;
    pub const EXIT: u16 = 19;
    pub const WANT: u16 = 23;
    pub const STARTED: u16 = 24;
    pub const MISSING: u16 = 25;
    pub const PING: u16 = 32;
    pub const PONG: u16 = 33;
    pub const ABORT: u16 = 34;
}

/// A frame on its way, to be looked at and changed; sequence and CRC-32 are made right again.
pub struct OnTheWay {
    pub kind: u16,
    pub body: Vec<u8>,
    /// How many of this kind have passed before in this direction.
    pub nth: usize,
}

/// What happens to a frame, or to the link around it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fate {
    Pass,
    /// This frame is lost, and nobody notices.
    Lose,
    CutBefore,
    CutAfter,
    /// From here on nothing arrives any more, in either direction.
    SilenceBefore,
    SilenceAfter,
    /// Nothing arrives any more in this direction only.
    MuteBefore,
    MuteAfter,
    /// The other side does not read any more.
    StallBefore,
}

pub type Hook = Box<dyn FnMut(&mut OnTheWay) -> Fate + Send>;

/// Lets everything pass.
pub fn pass() -> Hook {
    Box::new(|_| Fate::Pass)
}

/// One direction of the link: takes frames apart and asks the hook about each.
struct Tap {
    inner: PipeWriter,
    pipe: Pipe,
    other: Pipe,
    hook: Hook,
    /// Both directions swallow what is written.
    silent: Arc<AtomicBool>,
    muted: bool,
    pending: Vec<u8>,
    hello_passed: bool,
    sequence: u64,
    seen: HashMap<u16, usize>,
}

impl Tap {
    fn forward(&mut self) -> io::Result<()> {
        if !self.hello_passed {
            if self.pending.len() < 16 || self.pending.len() < 20 + word(&self.pending, 12) as usize {
                return Ok(());
            }
            let rest = self.pending.split_off(20 + word(&self.pending, 12) as usize);
            let hello = std::mem::replace(&mut self.pending, rest);
            self.hello_passed = true;
            self.inner.write_all(&hello)?;
        }
        while self.pending.len() >= 20 && self.pending.len() >= 20 + word(&self.pending, 0) as usize {
            let rest = self.pending.split_off(20 + word(&self.pending, 0) as usize);
            let frame = std::mem::replace(&mut self.pending, rest);
            self.frame(&frame)?;
        }
        Ok(())
    }

    fn frame(&mut self, frame: &[u8]) -> io::Result<()> {
        let kind = u16::from_le_bytes([frame[4], frame[5]]);
        let nth = self.seen.entry(kind).or_default();
        let mut way = OnTheWay {
            kind,
            body: frame[20..].to_vec(),
            nth: *nth,
        };
        *nth += 1;
        let fate = (self.hook)(&mut way);
        match fate {
            Fate::CutBefore => self.cut(),
            Fate::SilenceBefore => self.silent.store(true, Ordering::SeqCst),
            Fate::MuteBefore => self.muted = true,
            Fate::StallBefore => self.pipe.wait_broken(),
            _ => {}
        }
        if fate != Fate::Lose && !self.muted && !self.silent.load(Ordering::SeqCst) {
            let bytes = frame_bytes(self.sequence, way.kind, &way.body);
            self.sequence += 1;
            self.inner.write_all(&bytes)?;
        }
        match fate {
            Fate::CutAfter => self.cut(),
            Fate::SilenceAfter => self.silent.store(true, Ordering::SeqCst),
            Fate::MuteAfter => self.muted = true,
            _ => {}
        }
        Ok(())
    }

    fn cut(&self) {
        self.pipe.close();
        self.other.close();
    }
}

/// A frame as FORMAT.md has it.
pub fn frame_bytes(sequence: u64, kind: u16, body: &[u8]) -> Vec<u8> {
    let mut bytes = (body.len() as u32).to_le_bytes().to_vec();
    bytes.extend_from_slice(&u32::from(kind).to_le_bytes());
    bytes.extend_from_slice(&sequence.to_le_bytes());
    let mut crc = crc32fast::Hasher::new();
    crc.update(&bytes);
    crc.update(body);
    bytes.extend_from_slice(&crc.finalize().to_le_bytes());
    bytes.extend_from_slice(body);
    bytes
}

impl Write for Tap {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.pending.extend_from_slice(bytes);
        self.forward().map(|()| bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// The link with hooks in both directions.
pub fn link(bytes: usize, to_destination: Hook, to_source: Hook) -> (LinkEnds, LinkEnds, [Pipe; 2]) {
    let (forth_in, forth_out, forth) = pipe(bytes);
    let (back_in, back_out, back) = pipe(bytes);
    let silent = Arc::new(AtomicBool::new(false));
    let tap = |inner, pipe: &Pipe, other: &Pipe, hook| Tap {
        inner,
        pipe: pipe.clone(),
        other: other.clone(),
        hook,
        silent: silent.clone(),
        muted: false,
        pending: Vec::new(),
        hello_passed: false,
        sequence: 0,
        seen: HashMap::new(),
    };
    let (ends, to_peer) = (
        [forth.clone(), back.clone()],
        tap(forth_in, &forth, &back, to_destination),
    );
    // The source's agent kills its ssh, the destination's makes its own input end.
    let hangup = Arc::new(move || ends.iter().for_each(Pipe::close));
    let source = LinkEnds {
        to_peer: Box::new(to_peer),
        from_peer: Box::new(back_out),
        hangup,
        carrier: Arc::new(Unseen),
    };
    let (input, to_peer) = (forth.clone(), tap(back_in, &back, &forth, to_source));
    let hangup = Arc::new(move || input.end_reading());
    let destination = LinkEnds {
        to_peer: Box::new(to_peer),
        from_peer: Box::new(forth_out),
        hangup,
        carrier: Arc::new(Unseen),
    };
    (source, destination, [forth, back])
}

pub fn word(bytes: &[u8], at: usize) -> u32 {
    u32::from_le_bytes(bytes[at..at + 4].try_into().unwrap())
}
