//! Frames of other domains in our address space (libxenforeignmemory).
use std::io;
use std::marker::PhantomData;
use std::ptr::NonNull;
use std::sync::atomic::{AtomicU64, Ordering};

use crate::ffi::{self, Logger, errno, foreignmemory, symbol};
use crate::{DomId, XenError};

/// The size of a frame.
pub const PAGE_BYTES: usize = 4096;
const WORD_BYTES: usize = 8;

/// What a mapping is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Access {
    Read,
    /// What is written does not show in the log-dirty bitmap of an HVM or PVH guest (`xen/arch/x86/mm.c`): it is not for
    /// a guest that is being migrated or saved.
    ReadWrite,
}

/// A connection to the driver that maps frames. `Send` and `Sync`: the library keeps a file descriptor and changes nothing
/// after opening (`tools/libs/foreignmemory/linux.c`); maps from several threads are several mmaps and ioctls.
pub struct ForeignMemory {
    library: &'static foreignmemory::ForeignmemoryLib,
    handle: NonNull<foreignmemory::xenforeignmemory_handle>,
    /// Last, so that it outlives the handle that logs through it.
    _logger: Logger,
}

// SAFETY: see the type; no thread-bound state.
unsafe impl Send for ForeignMemory {}
// SAFETY: see the type; all calls through `&self` leave the handle as it is.
unsafe impl Sync for ForeignMemory {}

impl ForeignMemory {
    /// # Errors
    /// [`XenError::LibraryMissing`], or [`XenError::Unavailable`] outside a dom0 or without root.
    pub fn open() -> Result<Self, XenError> {
        let library = ffi::foreignmemory()?;
        let open = symbol!(library, xenforeignmemory_open);
        symbol!(library, xenforeignmemory_close);
        let logger = Logger::quiet()?;
        // SAFETY: the logger outlives the handle.
        let handle = unsafe { open(logger.as_ptr(), 0) };
        match NonNull::new(handle) {
            Some(handle) => Ok(ForeignMemory {
                library,
                handle,
                _logger: logger,
            }),
            None => {
                let source = errno();
                Err(XenError::Unavailable {
                    what: "Xen's foreign memory driver (/dev/xen/privcmd)",
                    source,
                })
            }
        }
    }

    /// Maps frames of a domain, in the order given; a frame may be given more than once. A frame that cannot be mapped
    /// does not spoil the others: ask [`Mapping::error`].
    ///
    /// A mapped frame stays what it was, also when the domain gives it up or ends (the domain's number then stays taken
    /// until it is unmapped). Holding one makes Xen refuse to page the frame out or to share it. Works while the domain
    /// is being built.
    ///
    /// For a frame that mem_paging has evicted this **waits until the pager has loaded it**: a pager must not map what it
    /// has evicted.
    ///
    /// # Errors
    /// Only when nothing could be tried, for example ENOMEM.
    pub fn map(&self, domid: DomId, gfns: &[u64], access: Access) -> Result<Mapping<'_>, XenError> {
        let mut errors = vec![0; gfns.len()];
        let mapping = |pages, errors| Mapping {
            memory: self,
            pages,
            errors,
            access,
            _pages: PhantomData,
        };
        if gfns.is_empty() {
            return Ok(mapping(NonNull::dangling(), errors));
        }
        let map = symbol!(self.library, xenforeignmemory_map);
        symbol!(self.library, xenforeignmemory_unmap);
        let protection = match access {
            Access::Read => libc::PROT_READ,
            Access::ReadWrite => libc::PROT_READ | libc::PROT_WRITE,
        };
        // SAFETY: the handle is open; both arrays have as many elements as is said. The mapping is new memory that
        // aliases nothing of ours.
        let address = unsafe {
            map(
                self.handle.as_ptr(),
                domid.get(),
                protection,
                gfns.len(),
                gfns.as_ptr(),
                errors.as_mut_ptr(),
            )
        };
        let Some(pages) = NonNull::new(address.cast::<u8>()) else {
            return Err(XenError::call("xenforeignmemory_map", Some(domid), errno()));
        };
        Ok(mapping(pages, errors))
    }
}

impl ForeignMemory {
    /// One page, writable, that is unmapped with [`ForeignMemory::unmap_one`]; `None` when there is no such page.
    pub(crate) fn map_one(&self, domid: DomId, gfn: u64) -> Result<Option<NonNull<u8>>, XenError> {
        let mut mapping = match self.map(domid, &[gfn], Access::ReadWrite) {
            Ok(mapping) => mapping,
            // With one page, the driver may report the page's own error for the call.
            Err(XenError::Call { source, .. }) if source.raw_os_error() == Some(libc::EINVAL) => return Ok(None),
            Err(error) => return Err(error),
        };
        if mapping.error(0).is_some() {
            return Ok(None);
        }
        // A mapping of no pages unmaps nothing.
        mapping.errors.clear();
        Ok(Some(mapping.pages))
    }

    pub(crate) fn unmap_one(&self, page: NonNull<u8>) {
        if let Ok(unmap) = &self.library.xenforeignmemory_unmap {
            // SAFETY: mapped by `map_one` as one page, and its owner unmaps it once.
            unsafe { unmap(self.handle.as_ptr(), page.as_ptr().cast(), 1) };
        }
    }
}

impl Drop for ForeignMemory {
    fn drop(&mut self) {
        if let Ok(close) = &self.library.xenforeignmemory_close {
            // SAFETY: opened once, closed once; every Mapping borrows self and is gone.
            unsafe { close(self.handle.as_ptr()) };
        }
    }
}

/// Mapped frames, unmapped when dropped. `Send` and `Sync`.
///
/// The guest writes to its memory while we look at it, so no reference to it is ever made: pages are copied word by word
/// with relaxed atomics, and a page that the guest is writing may arrive half old, half new.
pub struct Mapping<'a> {
    memory: &'a ForeignMemory,
    pages: NonNull<u8>,
    /// As the driver gave them: 0 or a negative errno.
    errors: Vec<i32>,
    access: Access,
    /// Words that others may change at any time.
    _pages: PhantomData<&'a AtomicU64>,
}

// SAFETY: `pages` is shared memory that every thread of the process can reach alike; accesses are atomic.
unsafe impl Send for Mapping<'_> {}
// SAFETY: as above; through `&self` there are atomic loads and stores only.
unsafe impl Sync for Mapping<'_> {}

impl Mapping<'_> {
    /// The number of frames asked for.
    pub fn len(&self) -> usize {
        self.errors.len()
    }

    pub fn is_empty(&self) -> bool {
        self.errors.is_empty()
    }

    /// Why frame `index` (of the list given to [`ForeignMemory::map`]) is not mapped; `None` when it is. EINVAL: there is
    /// no frame. An index past the end is an error as well.
    pub fn error(&self, index: usize) -> Option<io::Error> {
        match self.errors.get(index) {
            Some(0) => None,
            Some(&error) => Some(io::Error::from_raw_os_error(error.wrapping_abs())),
            None => Some(io::Error::new(
                io::ErrorKind::InvalidInput,
                "no such frame in this mapping",
            )),
        }
    }

    /// The number of frames that are mapped.
    pub fn mapped(&self) -> usize {
        self.errors.iter().filter(|error| **error == 0).count()
    }

    /// Copies frame `index` out.
    ///
    /// # Errors
    /// The frame's own ([`Mapping::error`]); the buffer is then as before.
    pub fn read(&self, index: usize, page: &mut [u8; PAGE_BYTES]) -> io::Result<()> {
        let frame = self.frame(index)?;
        for (offset, bytes) in page.chunks_exact_mut(WORD_BYTES).enumerate() {
            // SAFETY: `frame` is the start of a mapped page of 4096 bytes, aligned to it, and `offset` is below 512. Loads of 8
            // bytes from a read-only mapping are plain loads on this architecture.
            let word = unsafe { AtomicU64::from_ptr(frame.as_ptr().add(offset)) }.load(Ordering::Relaxed);
            bytes.copy_from_slice(&word.to_ne_bytes());
        }
        Ok(())
    }

    /// Copies `page` into frame `index`.
    ///
    /// # Errors
    /// The frame's own ([`Mapping::error`]); EACCES when mapped with [`Access::Read`].
    pub fn write(&self, index: usize, page: &[u8; PAGE_BYTES]) -> io::Result<()> {
        if self.access != Access::ReadWrite {
            return Err(io::Error::from_raw_os_error(libc::EACCES));
        }
        let frame = self.frame(index)?;
        for (offset, bytes) in page.chunks_exact(WORD_BYTES).enumerate() {
            let mut word = [0; WORD_BYTES];
            word.copy_from_slice(bytes);
            // SAFETY: as in `read`, and the mapping is writable.
            unsafe { AtomicU64::from_ptr(frame.as_ptr().add(offset)) }
                .store(u64::from_ne_bytes(word), Ordering::Relaxed);
        }
        Ok(())
    }

    /// The start of a frame that is mapped.
    fn frame(&self, index: usize) -> io::Result<NonNull<u64>> {
        if let Some(error) = self.error(index) {
            return Err(error);
        }
        // SAFETY: `error` has checked the index; the mapping has a page for each element of `errors`.
        Ok(unsafe { self.pages.add(index * PAGE_BYTES) }.cast())
    }
}

impl Drop for Mapping<'_> {
    fn drop(&mut self) {
        if self.errors.is_empty() {
            return;
        }
        if let Ok(unmap) = &self.memory.library.xenforeignmemory_unmap {
            // SAFETY: mapped by xenforeignmemory_map with as many pages, unmapped once.
            let status = unsafe {
                unmap(
                    self.memory.handle.as_ptr(),
                    self.pages.as_ptr().cast(),
                    self.errors.len(),
                )
            };
            if status != 0 {
                log::warn!("cannot unmap {} frames: {}", self.errors.len(), errno());
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn handles_can_be_shared() {
        fn shared<T: Send + Sync>() {}
        shared::<ForeignMemory>();
        shared::<Mapping<'_>>();
    }
}
