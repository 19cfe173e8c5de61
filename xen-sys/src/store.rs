//! xenstore (libxenstore): the tree in which the toolstack keeps a domain's name, devices and requests.
use std::ffi::{CStr, c_char};
use std::io;
use std::os::fd::{BorrowedFd, RawFd};
use std::ptr::NonNull;

use crate::ffi::{self, c_string, errno, store, symbol};
use crate::{DomId, XenError};

/// A change under a watched path.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct WatchEvent {
    /// The node that changed: the watched path or one below it.
    pub path: String,
    /// As given to [`Xenstore::watch`].
    pub token: String,
}

/// A connection to xenstored. `Send` and `Sync`: the library serialises requests under its own locks and reads replies in a
/// thread of its own once something is watched (`tools/libs/store/xs.c`).
///
/// Every request sets SIGPIPE to ignored and back, for the whole process.
pub struct Xenstore {
    library: &'static store::StoreLib,
    handle: NonNull<store::xs_handle>,
}

// SAFETY: see the type.
unsafe impl Send for Xenstore {}
// SAFETY: see the type; libxenstore is built with USE_PTHREAD everywhere.
unsafe impl Sync for Xenstore {}

impl Xenstore {
    /// # Errors
    /// [`XenError::LibraryMissing`], or [`XenError::Unavailable`] when xenstored does not run or we are not root.
    pub fn open() -> Result<Self, XenError> {
        let library = ffi::store()?;
        let open = symbol!(library, xs_open);
        symbol!(library, xs_close);
        // SAFETY: the flag makes an unwatched path silent at once (its meaning is in xenstore.h).
        let handle = unsafe { open(u64::from(store::XS_UNWATCH_FILTER)) };
        match NonNull::new(handle) {
            Some(handle) => Ok(Xenstore { library, handle }),
            None => {
                let source = errno();
                Err(XenError::Unavailable {
                    what: "xenstore",
                    source,
                })
            }
        }
    }

    /// The value of a node, without a terminator; `None` when there is no such node.
    pub fn read(&self, path: &str) -> Result<Option<Vec<u8>>, XenError> {
        let read = symbol!(self.library, xs_read);
        let path = c_string("xs_read", path)?;
        let mut length = 0;
        // SAFETY: the handle is open, `path` ends in NUL, `length` is where the size goes. Outside a transaction.
        let value = unsafe { read(self.handle.as_ptr(), store::XBT_NULL, path.as_ptr(), &mut length) };
        let Some(value) = Allocated::new(value) else {
            return missing_is_none("xs_read", errno());
        };
        // SAFETY: the library returned `length` bytes there.
        let bytes = unsafe { std::slice::from_raw_parts(value.0.as_ptr().cast::<u8>(), length as usize) };
        Ok(Some(bytes.to_vec()))
    }

    /// The value of a node as text; bytes that are not UTF-8 are replaced.
    pub fn read_string(&self, path: &str) -> Result<Option<String>, XenError> {
        Ok(self
            .read(path)?
            .map(|value| String::from_utf8_lossy(&value).into_owned()))
    }

    /// Sets a node, which is created with its parents if need be.
    pub fn write(&self, path: &str, value: &[u8]) -> Result<(), XenError> {
        let write = symbol!(self.library, xs_write);
        let path = c_string("xs_write", path)?;
        let Ok(length) = u32::try_from(value.len()) else {
            return Err(XenError::Argument {
                what: "xs_write",
                reason: "a value of 4 GiB",
            });
        };
        // SAFETY: the handle is open, `path` ends in NUL and `value` has `length` bytes.
        let done = unsafe {
            write(
                self.handle.as_ptr(),
                store::XBT_NULL,
                path.as_ptr(),
                value.as_ptr().cast(),
                length,
            )
        };
        check("xs_write", done)
    }

    /// Removes a node and all below it. That it is not there is no error.
    pub fn rm(&self, path: &str) -> Result<(), XenError> {
        let rm = symbol!(self.library, xs_rm);
        let path = c_string("xs_rm", path)?;
        // SAFETY: the handle is open and `path` ends in NUL.
        match check("xs_rm", unsafe {
            rm(self.handle.as_ptr(), store::XBT_NULL, path.as_ptr())
        }) {
            Err(error) if error.raw_os_error() == Some(libc::ENOENT) => Ok(()),
            other => other,
        }
    }

    /// The names of the nodes right below one; empty when there is no such node.
    pub fn directory(&self, path: &str) -> Result<Vec<String>, XenError> {
        let directory = symbol!(self.library, xs_directory);
        let path = c_string("xs_directory", path)?;
        let mut count = 0;
        // SAFETY: the handle is open, `path` ends in NUL, `count` is where the number goes.
        let names = unsafe { directory(self.handle.as_ptr(), store::XBT_NULL, path.as_ptr(), &mut count) };
        let Some(names) = Allocated::new(names) else {
            return Ok(missing_is_none("xs_directory", errno())?.unwrap_or_default());
        };
        // SAFETY: the library returned `count` pointers to strings ending in NUL, all in this one allocation.
        Ok(unsafe { strings(&names, count as usize) })
    }

    /// Watches a node and all below it. An event comes at once, also if the node does not exist, and then one for each
    /// change, with `token`.
    pub fn watch(&self, path: &str, token: &str) -> Result<(), XenError> {
        let watch = symbol!(self.library, xs_watch);
        let (path, token) = (c_string("xs_watch", path)?, c_string("xs_watch", token)?);
        // SAFETY: the handle is open and both strings end in NUL.
        check("xs_watch", unsafe {
            watch(self.handle.as_ptr(), path.as_ptr(), token.as_ptr())
        })
    }

    /// Takes back a watch; no event for it comes afterwards.
    pub fn unwatch(&self, path: &str, token: &str) -> Result<(), XenError> {
        let unwatch = symbol!(self.library, xs_unwatch);
        let (path, token) = (c_string("xs_unwatch", path)?, c_string("xs_unwatch", token)?);
        // SAFETY: the handle is open and both strings end in NUL.
        check("xs_unwatch", unsafe {
            unwatch(self.handle.as_ptr(), path.as_ptr(), token.as_ptr())
        })
    }

    /// Waits for the next event; without a watch for ever.
    pub fn next_event(&self) -> Result<WatchEvent, XenError> {
        let read_watch = symbol!(self.library, xs_read_watch);
        let mut count = 0;
        // SAFETY: the handle is open and `count` is where the number of strings goes.
        let event = unsafe { read_watch(self.handle.as_ptr(), &mut count) };
        match Allocated::new(event) {
            Some(event) => watch_event(&event, count as usize),
            None => Err(XenError::call("xs_read_watch", None, errno())),
        }
    }

    /// An event that has arrived; `None` when there is none. After [`Xenstore::fd`] has become readable call this until
    /// it gives `None`.
    pub fn try_event(&self) -> Result<Option<WatchEvent>, XenError> {
        let check_watch = symbol!(self.library, xs_check_watch);
        // SAFETY: the handle is open.
        let event = unsafe { check_watch(self.handle.as_ptr()) };
        match Allocated::new(event) {
            // xs_check_watch asserts that there are at least two strings.
            Some(event) => watch_event(&event, 2).map(Some),
            None => {
                let error = errno();
                match error.raw_os_error() {
                    Some(libc::EAGAIN) => Ok(None),
                    _ => Err(XenError::call("xs_check_watch", None, error)),
                }
            }
        }
    }

    /// Readable when an event may have arrived; for poll. Not to be read from.
    pub fn fd(&self) -> Result<BorrowedFd<'_>, XenError> {
        let fileno = symbol!(self.library, xs_fileno);
        // SAFETY: the handle is open.
        let fd: RawFd = unsafe { fileno(self.handle.as_ptr()) };
        if fd < 0 {
            return Err(XenError::call("xs_fileno", None, errno()));
        }
        // SAFETY: the descriptor is the handle's pipe, open until xs_close, which needs self by value.
        Ok(unsafe { BorrowedFd::borrow_raw(fd) })
    }

    /// Where a domain's own part of the tree is, `/local/domain/N`, whether or not it exists.
    pub fn domain_path(&self, domid: DomId) -> Result<String, XenError> {
        let get_domain_path = symbol!(self.library, xs_get_domain_path);
        // SAFETY: the handle is open.
        let path = unsafe { get_domain_path(self.handle.as_ptr(), domid.get()) };
        let Some(path) = Allocated::new(path) else {
            return Err(XenError::call("xs_get_domain_path", Some(domid), errno()));
        };
        // SAFETY: the library returned a string that ends in NUL.
        Ok(unsafe { CStr::from_ptr(path.0.as_ptr()) }
            .to_string_lossy()
            .into_owned())
    }
}

impl Drop for Xenstore {
    fn drop(&mut self) {
        if let Ok(close) = &self.library.xs_close {
            // SAFETY: opened once, closed once; nobody waits in next_event, as that would borrow self.
            unsafe { close(self.handle.as_ptr()) };
        }
    }
}

/// Memory that a Xen library got from malloc for us.
pub(crate) struct Allocated<T>(pub(crate) NonNull<T>);

impl<T> Allocated<T> {
    pub(crate) fn new(pointer: *mut T) -> Option<Self> {
        NonNull::new(pointer).map(Allocated)
    }
}

impl<T> Drop for Allocated<T> {
    fn drop(&mut self) {
        // SAFETY: the function's documentation says to free() what it returns, all in one go.
        unsafe { libc::free(self.0.as_ptr().cast()) };
    }
}

/// # Safety
/// `list` holds at least `count` pointers to strings that end in NUL and live as long as it.
unsafe fn strings(list: &Allocated<*mut c_char>, count: usize) -> Vec<String> {
    (0..count)
        .map(|index| {
            // SAFETY: the caller's promise.
            let text = unsafe { CStr::from_ptr(*list.0.as_ptr().add(index)) };
            text.to_string_lossy().into_owned()
        })
        .collect()
}

/// An event's strings are the path (XS_WATCH_PATH, 0) and the token (XS_WATCH_TOKEN, 1).
fn watch_event(event: &Allocated<*mut c_char>, count: usize) -> Result<WatchEvent, XenError> {
    if count < 2 {
        let source = io::Error::new(io::ErrorKind::InvalidData, "an event without path and token");
        return Err(XenError::call("xs_read_watch", None, source));
    }
    // SAFETY: the library returned that many pointers to strings ending in NUL, in this one allocation.
    let mut words = unsafe { strings(event, 2) }.into_iter();
    match (words.next(), words.next()) {
        (Some(path), Some(token)) => Ok(WatchEvent { path, token }),
        _ => unreachable!("two strings were asked for"),
    }
}

fn check(what: &'static str, done: bool) -> Result<(), XenError> {
    if done {
        Ok(())
    } else {
        Err(XenError::call(what, None, errno()))
    }
}

fn missing_is_none<T>(what: &'static str, error: io::Error) -> Result<Option<T>, XenError> {
    match error.raw_os_error() {
        Some(libc::ENOENT) => Ok(None),
        _ => Err(XenError::call(what, None, error)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn handles_can_be_shared() {
        fn shared<T: Send + Sync>() {}
        shared::<Xenstore>();
    }
}
