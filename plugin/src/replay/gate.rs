//! The start of a run: the clock of every mode begins when both sides are ready and the stream's first byte is offered.
//!
//! A migration's agents are ready long before xl sends anything: ssh has connected, they have said hello, and xl on the
//! other host has started. What a side does until then is its setup, and a figure of its own.
use std::fs::File;
use std::io::{self, PipeReader, PipeWriter, Read, Write};
use std::os::fd::{AsFd, AsRawFd};

use anyhow::{Context, Result};
use rustix::io::{FdFlags, fcntl_setfd};

/// The numbers of the pipes that a side inherits.
#[derive(Debug, clap::Args)]
pub struct GateArguments {
    #[arg(long)]
    ready: i32,
    #[arg(long)]
    begin: i32,
}

/// A side's end.
pub struct Gate {
    ready: File,
    begin: File,
}

impl Gate {
    pub fn open(arguments: &GateArguments) -> Result<Gate> {
        let path = |number: i32| format!("/proc/self/fd/{number}");
        Ok(Gate {
            ready: File::options().write(true).open(path(arguments.ready))?,
            begin: File::open(path(arguments.begin))?,
        })
    }

    /// Says that this side is ready. Who does not listen any more has ended, and this side will.
    pub fn ready(&self) {
        let _ = (&self.ready).write_all(&[1]);
    }

    fn wait(&self) -> io::Result<()> {
        (&self.begin).read_exact(&mut [0])
    }
}

/// What a side reads from: its first read says that the side is ready, and waits for the beginning.
pub struct Gated {
    from: File,
    gate: Option<Gate>,
}

impl Gated {
    pub fn new(from: File, gate: Gate) -> Gated {
        Gated { from, gate: Some(gate) }
    }
}

impl Read for Gated {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        if let Some(gate) = self.gate.take() {
            gate.ready();
            gate.wait()?;
        }
        self.from.read(buffer)
    }
}

/// The other end of a side's gate.
pub struct Starter {
    ready: PipeReader,
    begin: PipeWriter,
}

/// What a side inherits, until it has been started.
pub struct Inherited(PipeWriter, PipeReader);

impl Inherited {
    pub fn arguments(&self) -> [String; 4] {
        let number = |end: &dyn AsRawFd| end.as_raw_fd().to_string();
        ["--ready".into(), number(&self.0), "--begin".into(), number(&self.1)]
    }
}

pub fn gate() -> Result<(Starter, Inherited)> {
    let (ready, says_ready) = io::pipe()?;
    let (begins, begin) = io::pipe()?;
    for end in [says_ready.as_fd(), begins.as_fd()] {
        fcntl_setfd(end, FdFlags::empty())?;
    }
    Ok((Starter { ready, begin }, Inherited(says_ready, begins)))
}

impl Starter {
    /// Errors: the side has ended instead.
    pub fn wait_ready(&mut self) -> Result<()> {
        let ended = "a side of the replay ended before it was ready";
        self.ready.read_exact(&mut [0]).context(ended)
    }

    /// A side that does not wait for it is not held up.
    pub fn begin(&mut self) {
        let _ = self.begin.write_all(&[1]);
    }
}
