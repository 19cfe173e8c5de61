//! What can go wrong with the store. None of it may stop a migration: contents that cannot be kept are not held.
use std::io;
use std::path::PathBuf;

use thiserror::Error;
use xenfold::page::ContentId;

#[derive(Debug, Error)]
pub enum StoreError {
    #[error("{what} {path}", path = path.display())]
    Io {
        what: &'static str,
        path: PathBuf,
        #[source]
        source: io::Error,
    },
    #[error("the store {path} is in use by another process; stop it, or name another folder", path = .0.display())]
    InUse(PathBuf),
    #[error("{name:?} is no name for a {what}: letters, digits, '.', '_', '-', at most {most} of them")]
    Name {
        what: &'static str,
        name: String,
        most: usize,
    },
    #[error("a page of {bytes} bytes came to the store")]
    PageSize { bytes: usize },
    #[error("a page came under the id {0:?}, which is not its own")]
    WrongId(ContentId),
    #[error("the group {0} was removed, or has another key by now")]
    Closed(String),
    #[error("the store's bound of {limit_bytes} bytes leaves no room; raise it, or remove templates")]
    Full { limit_bytes: u64 },
    #[error("the index {path}", path = path.display())]
    Index {
        path: PathBuf,
        #[source]
        source: IndexError,
    },
}

impl StoreError {
    pub(super) fn io(what: &'static str, path: impl Into<PathBuf>) -> impl FnOnce(io::Error) -> StoreError {
        let path = path.into();
        move |source| StoreError::Io { what, path, source }
    }
}

/// Why an index could not be read or written.
#[derive(Debug, Error)]
pub enum IndexError {
    #[error("cannot be read or written")]
    Io(#[source] io::Error),
    #[error("cannot be used")]
    Redb(#[source] Box<redb::Error>),
    #[error("is so damaged that reading it failed beyond repair")]
    Panicked,
    #[error("has format {found}, this program knows {known}")]
    Format { found: u32, known: u32 },
    #[error("is for packs of {found} slots, not {expected}")]
    PackSlots { found: u32, expected: u32 },
}

impl<E: Into<redb::Error>> From<E> for IndexError {
    fn from(error: E) -> IndexError {
        match error.into() {
            redb::Error::Io(error) => IndexError::Io(error),
            error => IndexError::Redb(Box::new(error)),
        }
    }
}
