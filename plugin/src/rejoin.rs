//! A source that lost its connection while pages followed the guest comes back through here: `xenfold receive --rejoin NAME`,
//! started by its new ssh, finds the agent that still runs by a socket that only root can reach, and passes the bytes on. Where
//! the agent was killed it goes on for it ([`takeover`]).
use std::fs::{self, File, Permissions};
use std::io::{self, ErrorKind, Read, Write};
use std::net::Shutdown;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Result, bail};
use crossbeam_channel::Sender;
use rustix::io::fcntl_dupfd_cloexec;
use xenfold::engine::destination::Listen;
use xenfold::engine::{LinkEnds, Unseen, refuse};
use xenfold::late::journal::JournalError;
use xenfold::migrations::FOLDER;

use crate::{receive, takeover};

/// How long the agent may take to write down that it waits: it may just have been told to start the guest.
const PATIENCE: Duration = Duration::from_secs(5);

const RETRY: Duration = Duration::from_millis(100);

/// Bytes that are passed on at once.
const PASSED_AT_ONCE: usize = 64 << 10;

/// How long a connection may take no bytes until it counts as lost.
const STUCK: Duration = Duration::from_secs(10);

/// Where the agent of a migration waits. `None`: that is no name of a migration.
fn path(folder: &Path, migration: &str) -> Option<PathBuf> {
    let valid = migration.len() == 32 && migration.bytes().all(|byte| byte.is_ascii_hexdigit());
    valid.then(|| folder.join(format!("{migration}.rejoin")))
}

/// How the agent waits for the source of a migration to come back.
pub fn listen(migration: String) -> Listen {
    Box::new(move |connections| Ok(Box::new(Listening::start(Path::new(FOLDER), &migration, connections)?)))
}

/// Waits for connections until it is dropped.
struct Listening {
    listener: UnixListener,
    path: PathBuf,
}

impl Listening {
    fn start(folder: &Path, migration: &str, connections: Sender<LinkEnds>) -> io::Result<Listening> {
        let path = path(folder, migration).ok_or(ErrorKind::InvalidInput)?;
        fs::create_dir_all(folder)?;
        remove_left_behind(folder);
        // Nobody else may reach it, not for a moment.
        let new = path.with_extension("new");
        // One that was killed here may have left it. Absent is as good.
        let _ = fs::remove_file(&new);
        let listener = UnixListener::bind(&new)?;
        fs::set_permissions(&new, Permissions::from_mode(0o600)).and_then(|()| fs::rename(&new, &path))?;
        let accepting = listener.try_clone()?;
        thread::Builder::new().name("xenfold-listen".into()).spawn(move || {
            // It fails when the other half is shut down.
            while let Ok((stream, _)) = accepting.accept() {
                // Nobody waits any more when all is over.
                match ends(stream).map(|ends| connections.send(ends)) {
                    Ok(Ok(())) => {}
                    Ok(Err(_)) => return,
                    Err(error) => log::warn!("a connection cannot be used: {error}"),
                }
            }
        })?;
        Ok(Listening { listener, path })
    }
}

impl Drop for Listening {
    fn drop(&mut self) {
        // Both fail only where there is nothing to end.
        let _ = fs::remove_file(&self.path);
        let _ = rustix::net::shutdown(&self.listener, rustix::net::Shutdown::Both);
    }
}

/// Sockets of agents that were killed.
fn remove_left_behind(folder: &Path) {
    for entry in fs::read_dir(folder).into_iter().flatten().flatten() {
        let path = entry.path();
        let ours = path.extension().is_some_and(|extension| extension == "rejoin");
        if ours && UnixStream::connect(&path).is_err_and(|error| error.kind() == ErrorKind::ConnectionRefused) {
            // Gone meanwhile is as good.
            let _ = fs::remove_file(&path);
        }
    }
}

fn ends(stream: UnixStream) -> io::Result<LinkEnds> {
    stream.set_write_timeout(Some(STUCK))?;
    let (reading, closing) = (stream.try_clone()?, stream.try_clone()?);
    Ok(LinkEnds {
        to_peer: Box::new(stream),
        from_peer: Box::new(reading),
        // Already gone is as good.
        hangup: Arc::new(move || drop(closing.shutdown(Shutdown::Both))),
        carrier: Arc::new(Unseen),
    })
}

/// What a source is told, to begin with, that need not send pages any more.
pub const NOBODY: &str = "no xenfold receives that guest here any more";

/// Brings a source together with whoever has its guest here.
pub fn run(migration: &str) -> Result<i32> {
    let until = Instant::now() + PATIENCE;
    loop {
        if let Some(agent) = find(Path::new(FOLDER), migration) {
            return pass_on(agent);
        }
        match takeover::take(migration) {
            Ok((journal, found)) => return takeover::run(journal, found, receive::link(Some(STUCK))?),
            Err(_) if Instant::now() < until => thread::sleep(RETRY),
            Err(JournalError::Absent) => {
                return nobody(&format!("{NOBODY}: it was not started, or is here whole"));
            }
            Err(error @ JournalError::Damaged { .. }) => {
                return nobody(&format!(
                    "xenfold was ended while pages followed that guest, and cannot go on: {error}"
                ));
            }
            // Somebody is about to go on with the guest, or a later attempt can: the source tries again.
            Err(error) => bail!("nobody can be reached who receives that guest: {error}"),
        }
    }
}

fn nobody(why: &str) -> Result<i32> {
    refuse(receive::link(Some(STUCK))?, why)?;
    Ok(1)
}

/// Passes a connection on to the agent of a migration, until either end goes.
fn pass_on(agent: UnixStream) -> Result<i32> {
    let (input, output) = (
        File::from(fcntl_dupfd_cloexec(rustix::stdio::stdin(), 3)?),
        File::from(fcntl_dupfd_cloexec(rustix::stdio::stdout(), 3)?),
    );
    let to_agent = agent.try_clone()?;
    thread::Builder::new().name("xenfold-forth".into()).spawn(move || {
        // However it ends, the agent sees an end.
        let _ = pass(&input, &to_agent);
        let _ = to_agent.shutdown(Shutdown::Both);
    })?;
    // That nobody reads any more is an end like another.
    let _ = pass(&agent, &output);
    let _ = agent.shutdown(Shutdown::Both);
    Ok(0)
}

/// Passes bytes on as they come. Not `io::copy`: it splices, and Linux (6.1) keeps a pipe locked while it waits for what comes
/// from a socket, so that whoever reads the pipe waits for the next bytes before it gets these.
fn pass(mut from: impl Read, mut to: impl Write) -> io::Result<()> {
    let mut buffer = [0; PASSED_AT_ONCE];
    loop {
        match from.read(&mut buffer) {
            Ok(0) => return Ok(()),
            Ok(n) => to.write_all(buffer.get(..n).unwrap_or_default())?,
            Err(error) if error.kind() == ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
}

/// The agent of a migration, if it is there.
fn find(folder: &Path, migration: &str) -> Option<UnixStream> {
    UnixStream::connect(path(folder, migration)?).ok()
}

#[cfg(test)]
mod tests {
    use crossbeam_channel::unbounded;

    use super::*;

    const NAME: &str = "00112233445566778899aabbccddeeff";

    #[test]
    fn an_agent_is_found_as_long_as_it_waits() {
        let folder = std::env::temp_dir().join(format!("xenfold-rejoin-{}", std::process::id()));
        let (sender, connections) = unbounded();
        let listening = Listening::start(&folder, NAME, sender).unwrap();
        let mode = fs::metadata(path(&folder, NAME).unwrap()).unwrap().permissions().mode();
        assert_eq!(mode & 0o777, 0o600);
        for _ in 0..2 {
            let mut there = find(&folder, NAME).unwrap();
            let mut here = connections.recv().unwrap();
            there.write_all(b"forth").unwrap();
            let mut got = [0; 5];
            here.from_peer.read_exact(&mut got).unwrap();
            assert_eq!(&got, b"forth");
            (here.hangup)();
            assert_eq!(there.read(&mut got).unwrap(), 0);
        }
        remove_left_behind(&folder);
        assert!(find(&folder, NAME).is_some(), "it lives");
        // The look at what was left behind is a connection, too.
        (0..2).for_each(|_| drop(connections.recv().unwrap()));
        drop(listening);
        assert!(connections.recv().is_err(), "nobody accepts any more");
        assert!(fs::read_dir(&folder).unwrap().next().is_none());
        fs::remove_dir(&folder).unwrap();
    }

    #[test]
    fn a_peer_names_no_other_file() {
        let folder = Path::new("/f");
        assert!(path(folder, NAME).is_some());
        for name in ["", "../x", "0011223344556677/8899aabbccddeef", &"0".repeat(33)] {
            assert_eq!(path(folder, name), None);
        }
    }
}
