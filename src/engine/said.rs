//! What the destination has said of its xl and of the guest's start, so that nothing of it is lost with a connection.
use std::io;

use parking_lot::{Mutex, MutexGuard};

use super::link::{Link, Outgoing};
use crate::wire::Kind;

/// Said once to whichever connection there is, and again to the next one as far as it was not heard.
#[derive(Default)]
pub(super) struct Said {
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    /// All that xl has said and that the source may know; xl says 172 bytes at most.
    xl: Vec<u8>,
    started: bool,
    /// Figures and Exit.
    last: Vec<(Kind, Vec<u8>)>,
}

impl Said {
    /// Said by a process that was killed, and that another one goes on for.
    pub fn before(xl: Vec<u8>, started: bool) -> Said {
        let last = Vec::new();
        Said {
            state: Mutex::new(State { xl, started, last }),
        }
    }

    /// Bytes of xl's for the source. `wait`: also for another thread that is stuck in sending.
    pub fn xl(&self, link: &Link, bytes: &[u8], wait: bool) {
        let mut state = self.state.lock();
        state.xl.extend_from_slice(bytes);
        if wait {
            // Not lost with the connection.
            let _ = link.send(Kind::Xl, &[bytes]);
        } else {
            link.send_if_free(Kind::Xl, &[bytes]);
        }
    }

    /// The guest runs.
    pub fn started(&self, link: &Link) {
        let mut state = self.state.lock();
        state.started = true;
        let _ = link.send(Kind::Started, &[]);
    }

    /// How it ended.
    pub fn last(&self, link: &Link, kind: Kind, body: Vec<u8>) {
        let mut state = self.state.lock();
        link.send_if_free(kind, &[&body]);
        state.last.push((kind, body));
    }

    /// Says on a new connection what was not heard. Nothing more is said until the guard is dropped: meanwhile the link goes
    /// on with that connection. Errors: the connection's, or the source has heard more than was said.
    pub fn again(&self, out: &mut Outgoing, heard: u64) -> io::Result<Quiet<'_>> {
        let state = self.state.lock();
        let unheard = usize::try_from(heard).ok().and_then(|heard| state.xl.get(heard..));
        let unheard = unheard.ok_or(io::ErrorKind::InvalidData)?;
        if state.started {
            out.write(Kind::Started, &[])?;
        }
        if !unheard.is_empty() {
            out.write(Kind::Xl, &[unheard])?;
        }
        for (kind, body) in &state.last {
            out.write(*kind, &[body])?;
        }
        Ok(Quiet { _state: state })
    }
}

/// Nothing is said as long as it lives.
pub(super) struct Quiet<'a> {
    _state: MutexGuard<'a, State>,
}
