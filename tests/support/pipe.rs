//! Pipes in memory that show what real ones show: what has not been read (FIONREAD), and which end is gone.
use parking_lot::{Condvar, Mutex};
use std::collections::VecDeque;
use std::io::{self, ErrorKind, Read, Write};
use std::sync::Arc;

#[derive(Default)]
struct State {
    bytes: VecDeque<u8>,
    writer_gone: bool,
    reader_gone: bool,
}

struct Inner {
    capacity: usize,
    state: Mutex<State>,
    changed: Condvar,
}

/// Looks at a pipe, and ends it.
#[derive(Clone)]
pub struct Pipe(Arc<Inner>);

pub struct PipeWriter(Pipe);
pub struct PipeReader(Pipe);

/// A pipe that holds so many bytes before its writer waits.
pub fn pipe(capacity: usize) -> (PipeWriter, PipeReader, Pipe) {
    let (state, changed) = (Mutex::default(), Condvar::new());
    let pipe = Pipe(Arc::new(Inner {
        capacity,
        state,
        changed,
    }));
    (PipeWriter(pipe.clone()), PipeReader(pipe.clone()), pipe)
}

impl Pipe {
    /// Bytes that the reader has not taken. Errors: it is gone.
    pub fn unread(&self) -> io::Result<u64> {
        let state = self.0.state.lock();
        if state.reader_gone {
            Err(ErrorKind::BrokenPipe.into())
        } else {
            Ok(state.bytes.len() as u64)
        }
    }

    /// Both ends are gone. What is in the pipe can still be read.
    pub fn close(&self) {
        let mut state = self.0.state.lock();
        (state.writer_gone, state.reader_gone) = (true, true);
        self.0.changed.notify_all();
    }

    /// The reader finds the pipe ended.
    pub fn end_reading(&self) {
        self.0.state.lock().writer_gone = true;
        self.0.changed.notify_all();
    }

    /// Blocks until the reader is gone: a reader that does not read.
    pub fn wait_broken(&self) {
        let mut state = self.0.state.lock();
        while !state.reader_gone {
            self.0.changed.wait(&mut state);
        }
    }
}

impl Write for PipeWriter {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let Inner {
            capacity,
            state,
            changed,
        } = &*self.0.0;
        let mut state = state.lock();
        loop {
            if state.reader_gone {
                return Err(ErrorKind::BrokenPipe.into());
            }
            let room = capacity - state.bytes.len();
            if room > 0 || bytes.is_empty() {
                let taken = room.min(bytes.len());
                state.bytes.extend(&bytes[..taken]);
                changed.notify_all();
                return Ok(taken);
            }
            changed.wait(&mut state);
        }
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl Read for PipeReader {
    fn read(&mut self, out: &mut [u8]) -> io::Result<usize> {
        let Inner { state, changed, .. } = &*self.0.0;
        let mut state = state.lock();
        while state.bytes.is_empty() && !state.writer_gone {
            changed.wait(&mut state);
        }
        let taken = state.bytes.read(out)?;
        changed.notify_all();
        Ok(taken)
    }
}

impl Drop for PipeWriter {
    fn drop(&mut self) {
        self.0.end_reading();
    }
}

impl Drop for PipeReader {
    fn drop(&mut self) {
        self.0.0.state.lock().reader_gone = true;
        self.0.0.changed.notify_all();
    }
}
