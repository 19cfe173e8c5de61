//! The service's loop: a thread for each caller, a bounded number of them, an orderly end.
use std::collections::HashMap;
use std::io::{self, ErrorKind};
use std::net::Shutdown;
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use parking_lot::{Condvar, Mutex};
use rustix::event::{PollFd, PollFlags, poll};
use xenfold::control::{ErrorCode, Refusal, Reply, write_message};
use xenfold::engine::chain;

use crate::connection;
use crate::daemon::Daemon;
use crate::socket::Socket;

/// Callers at a time. A migration needs one at each end; each may hold a request and its answer in memory.
pub const MAX_CONNECTIONS: usize = 64;

/// How long callers' requests may take to end once the service shall; a verification is not waited for.
const END_PATIENCE: Duration = Duration::from_secs(10);

/// How long a caller that is turned away may take to listen.
const REFUSAL_PATIENCE: Duration = Duration::from_secs(1);

/// The callers, so that their connections can be ended.
#[derive(Default)]
pub(crate) struct Connections {
    open: Mutex<HashMap<u64, UnixStream>>,
    ended: Condvar,
}

impl Connections {
    pub fn count(&self) -> usize {
        self.open.lock().len()
    }
}

/// Takes its connection off the list, also when the thread panics.
struct Listed {
    connections: Arc<Connections>,
    number: u64,
}

impl Drop for Listed {
    fn drop(&mut self) {
        self.connections.open.lock().remove(&self.number);
        self.connections.ended.notify_all();
    }
}

/// Answers callers until `stop` can be read from; then ends their connections and writes the store.
/// Errors: poll fails, which leaves nothing to do but end.
pub fn serve(daemon: &Arc<Daemon>, socket: &Socket, stop: impl AsFd) -> io::Result<()> {
    let connections = Arc::new(Connections::default());
    let mut number = 0u64;
    let served = loop {
        let mut ready = [
            PollFd::new(&socket.listener, PollFlags::IN),
            PollFd::new(&stop, PollFlags::IN),
        ];
        match poll(&mut ready, None) {
            Err(rustix::io::Errno::INTR) => continue,
            Err(error) => break Err(error.into()),
            Ok(_) => {}
        }
        let [_, stopped] = &ready;
        if !stopped.revents().is_empty() {
            break Ok(());
        }
        match socket.listener.accept() {
            Ok((stream, _)) => {
                number = number.wrapping_add(1);
                if let Err(error) = start(daemon, &connections, number, stream) {
                    log::warn!("a caller cannot be served: {error}");
                }
            }
            Err(error) if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::Interrupted) => {}
            Err(error) => {
                // Out of files or memory: callers wait in the queue until there are some again.
                log::warn!("callers cannot be taken: {error}");
                thread::sleep(Duration::from_millis(100));
            }
        }
    };
    // Nobody finds the daemon any more; then its callers lose it.
    socket.hide();
    daemon.end_index();
    end(&connections);
    daemon.flush();
    served
}

fn start(daemon: &Arc<Daemon>, connections: &Arc<Connections>, number: u64, stream: UnixStream) -> io::Result<()> {
    stream.set_nonblocking(false)?;
    if connections.count() >= MAX_CONNECTIONS {
        log::warn!("{MAX_CONNECTIONS} callers are connected: another one is turned away");
        stream.set_write_timeout(Some(REFUSAL_PATIENCE))?;
        let refusal = Reply::Error(Refusal {
            code: ErrorCode::Busy,
            message: format!("the daemon has {MAX_CONNECTIONS} callers already; try again later"),
        });
        // It may be gone: no harm.
        let _ = write_message(&mut &stream, &refusal, &[]);
        return Ok(());
    }
    connections.open.lock().insert(number, stream.try_clone()?);
    let listed = Listed {
        connections: connections.clone(),
        number,
    };
    let daemon = daemon.clone();
    let serve = move || {
        match connection::serve(&daemon, &listed.connections, &stream) {
            Ok(()) => {}
            Err(error) => log::debug!("caller {number}: {}", chain(&error)),
        }
        drop(stream);
        drop(listed);
    };
    // When no thread can be made, what it was to own is dropped: the connection is closed and off the list.
    thread::Builder::new().name(format!("caller-{number}")).spawn(serve)?;
    Ok(())
}

fn end(connections: &Connections) {
    let mut open = connections.open.lock();
    for stream in open.values() {
        // One that has been closed meanwhile needs no more.
        let _ = stream.shutdown(Shutdown::Both);
    }
    let deadline = Instant::now() + END_PATIENCE;
    while !open.is_empty() {
        if connections.ended.wait_until(&mut open, deadline).timed_out() {
            log::warn!("{} requests are not waited for", open.len());
            return;
        }
    }
}
