//! The socket's file: made for root alone, one daemon each, left-overs of a killed one replaced.
use std::fs::{self, DirBuilder, File, OpenOptions, Permissions, TryLockError};
use std::io::{self, ErrorKind};
use std::os::unix::fs::{DirBuilderExt, FileTypeExt, OpenOptionsExt, PermissionsExt};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};

use thiserror::Error;

#[derive(Debug, Error)]
pub enum SocketError {
    #[error("another daemon listens on {path}: stop it first, with `systemctl stop xenfoldd`", path = .0.display())]
    InUse(PathBuf),
    #[error("{path} is there already, and is no socket", path = .0.display())]
    NoSocket(PathBuf),
    #[error("{what} {path}", path = path.display())]
    Io {
        what: &'static str,
        path: PathBuf,
        #[source]
        source: io::Error,
    },
}

/// A socket that is listened on; its file goes when this does.
pub struct Socket {
    pub(crate) listener: UnixListener,
    path: PathBuf,
    /// The kernel lets go of it however the process ends: it tells a living daemon from a dead one's socket.
    _lock: File,
}

impl Socket {
    /// Listens on `path`. A folder that is missing is made, for its owner alone; one that is there stays as it is.
    pub fn listen(path: &Path) -> Result<Socket, SocketError> {
        if let Some(folder) = path.parent().filter(|folder| !folder.exists()) {
            let made = DirBuilder::new().recursive(true).mode(0o700).create(folder);
            made.map_err(failed("cannot make the folder", folder))?;
        }
        let lock = lock(path)?;
        remove_stale(path)?;
        // The caller's umask keeps others out until the mode is set.
        let listener = UnixListener::bind(path).map_err(failed("cannot listen on", path))?;
        fs::set_permissions(path, Permissions::from_mode(0o600)).map_err(failed("cannot protect", path))?;
        // Poll says when somebody calls; whoever has gone again by then must not block the loop.
        listener
            .set_nonblocking(true)
            .map_err(failed("cannot listen on", path))?;
        Ok(Socket {
            listener,
            path: path.into(),
            _lock: lock,
        })
    }
}

impl Socket {
    /// Removes the file, so that nobody finds the socket any more. Another daemon still finds it in use.
    pub(crate) fn hide(&self) {
        match fs::remove_file(&self.path) {
            Err(error) if error.kind() != ErrorKind::NotFound => log::warn!("{}: {error}", self.path.display()),
            _ => {}
        }
    }
}

impl Drop for Socket {
    fn drop(&mut self) {
        self.hide();
    }
}

fn lock(socket: &Path) -> Result<File, SocketError> {
    let mut path = socket.as_os_str().to_owned();
    path.push(".lock");
    let path = PathBuf::from(path);
    let mut options = OpenOptions::new();
    let file = options.write(true).create(true).truncate(false).mode(0o600).open(&path);
    let file = file.map_err(failed("cannot open", &path))?;
    match file.try_lock() {
        Ok(()) => Ok(file),
        Err(TryLockError::WouldBlock) => Err(SocketError::InUse(socket.into())),
        Err(TryLockError::Error(error)) => Err(failed("cannot lock", &path)(error)),
    }
}

/// Removes the socket of a daemon that was killed.
fn remove_stale(path: &Path) -> Result<(), SocketError> {
    match fs::symlink_metadata(path) {
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(()),
        Err(error) => return Err(failed("cannot look at", path)(error)),
        Ok(meta) if !meta.file_type().is_socket() => return Err(SocketError::NoSocket(path.into())),
        Ok(_) => {}
    }
    match UnixStream::connect(path) {
        Ok(_) => Err(SocketError::InUse(path.into())),
        Err(error) if error.kind() == ErrorKind::ConnectionRefused => {
            log::info!("{} was left behind: replaced", path.display());
            fs::remove_file(path).map_err(failed("cannot remove", path))
        }
        Err(error) => Err(failed("cannot connect to", path)(error)),
    }
}

fn failed(what: &'static str, path: &Path) -> impl FnOnce(io::Error) -> SocketError {
    move |source| SocketError::Io {
        what,
        path: path.into(),
        source,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_left_overs_are_replaced() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("run/daemon.sock");
        let first = Socket::listen(&path).unwrap();
        let mode = |path: &Path| fs::metadata(path).unwrap().permissions().mode() & 0o777;
        assert_eq!((mode(&path), mode(path.parent().unwrap())), (0o600, 0o700));
        assert!(matches!(Socket::listen(&path), Err(SocketError::InUse(_))));
        drop(first);
        assert!(!path.exists());

        // Dropped, a listener of std leaves its file behind, as a killed daemon does.
        let other = UnixListener::bind(&path).unwrap();
        assert!(matches!(Socket::listen(&path), Err(SocketError::InUse(_))));
        drop(other);
        assert!(path.exists());
        drop(Socket::listen(&path).unwrap());

        fs::write(&path, "precious").unwrap();
        assert!(matches!(Socket::listen(&path), Err(SocketError::NoSocket(_))));
        assert_eq!(fs::read(&path).unwrap(), b"precious");
    }
}
