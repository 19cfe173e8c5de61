//! Which frames a guest writes: Xen's log-dirty mode (XEN_DOMCTL_shadow_op, `xen/arch/x86/mm/paging.c`).
//!
//! Log-dirty has one owner, and during a migration that is xl. What keeps two owners apart here:
//! - [`LogDirty::clean`] and [`LogDirty::off`] work only after this handle's own [`LogDirty::enable`];
//! - [`LogDirty::peek`] changes nothing, needs no ownership, and may be used while xl owns it, but only where xl's CLEAN
//!   cannot run: one that meets a PEEK under way fails with EBUSY and ends the migration.
//!
//! What cannot be kept apart here: xl turns a mode that it finds on off and on again, and is then cleaned by us. So turn
//! it off, or drop the handle, before xl is let go on.
use std::ptr::{self, NonNull};

use crate::domain::Handle;
use crate::ffi::{ctrl, errno, symbol};
use crate::{Bitmap, DomId, XenError};

/// What a reading found.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[must_use]
pub enum Peek {
    /// The bitmap has been read and has so many bits set. (Not Xen's own count: turning log-dirty on does not reset that,
    /// so until the first CLEAN it includes an earlier migration's.)
    Read { dirty_pages: u64 },
    /// Another log-dirty operation on this domain is parked half-way (EBUSY); the bitmap is as before. Skip this reading:
    /// retrying at once can make xl's next CLEAN fail.
    Busy,
}

/// A domain's dirty bitmap. `Send`, not `Sync`; from [`crate::Xenctrl::log_dirty`].
///
/// Dropping it turns log-dirty off if this handle turned it on.
pub struct LogDirty {
    /// Where Xen writes the bitmap; before `handle`, and freed in `drop` while that is still open.
    buffer: ctrl::xc_hypercall_buffer_t,
    memory: NonNull<u64>,
    buffer_pages: i32,
    domid: DomId,
    pages: u64,
    ours: bool,
    handle: Handle,
}

// SAFETY: `memory` and the buffer's pointer lead to a mapping of this process that this value alone owns; `Handle` is
// `Send`. Not `Sync`, as `Handle` is not.
unsafe impl Send for LogDirty {}

impl LogDirty {
    pub(crate) fn new(handle: Handle, domid: DomId, pages: u64) -> Result<Self, XenError> {
        let what = "log-dirty bitmap";
        if pages == 0 {
            return Err(XenError::Argument {
                what,
                reason: "no frames to look at",
            });
        }
        let buffer_pages = pages.div_ceil(8).div_ceil(u64::from(ctrl::XC_PAGE_SIZE));
        let Ok(buffer_pages) = i32::try_from(buffer_pages) else {
            return Err(XenError::Argument {
                what,
                reason: "more frames than a guest can have",
            });
        };
        let alloc = symbol!(handle.library, xc__hypercall_buffer_alloc_pages);
        symbol!(handle.library, xc__hypercall_buffer_free_pages);
        // What the macro DECLARE_HYPERCALL_BUFFER of xenctrl.h sets: no bouncing, the user pointer poisoned.
        let mut buffer = ctrl::xc_hypercall_buffer_t {
            hbuf: ptr::null_mut(),
            param_shadow: ptr::null_mut(),
            dir: 0,
            ubuf: ptr::without_provenance_mut(usize::MAX),
            sz: 0,
        };
        // SAFETY: the handle is open and `buffer` is an unallocated buffer as the macro would declare it; the function
        // stores nothing but the address of the mapping in it.
        let memory = unsafe { alloc(handle.as_ptr(), &mut buffer, buffer_pages) };
        let Some(memory) = NonNull::new(memory.cast::<u64>()) else {
            return Err(XenError::call("xc_hypercall_buffer_alloc_pages", Some(domid), errno()));
        };
        Ok(LogDirty {
            buffer,
            memory,
            buffer_pages,
            domid,
            pages,
            ours: false,
            handle,
        })
    }

    pub fn domid(&self) -> DomId {
        self.domid
    }

    /// The number of frames that a reading covers, from frame 0.
    pub fn pages(&self) -> u64 {
        self.pages
    }

    /// Whether this handle turned log-dirty on and has not turned it off.
    pub fn is_ours(&self) -> bool {
        self.ours
    }

    /// Takes over a log-dirty that a migration left on whose xl and helper are dead. Only for their heir: of a living
    /// migration it would take the bits.
    pub fn adopt(&mut self) {
        self.ours = true;
    }

    /// Turns log-dirty on with an empty bitmap. The guest's large mappings are split while it is on.
    ///
    /// # Errors
    /// [`XenError::LogDirtyRefused`] when it is on already: somebody else's, leave it alone. EBUSY (in
    /// [`XenError::Call`]) when an operation is parked.
    pub fn enable(&mut self) -> Result<(), XenError> {
        match self.control(
            "XEN_DOMCTL_SHADOW_OP_ENABLE_LOGDIRTY",
            ctrl::XEN_DOMCTL_SHADOW_OP_ENABLE_LOGDIRTY,
            None,
        ) {
            Ok(()) => {
                self.ours = true;
                Ok(())
            }
            Err(XenError::Call { source, .. }) if source.raw_os_error() == Some(libc::EINVAL) => {
                Err(XenError::LogDirtyRefused {
                    domid: self.domid,
                    source,
                })
            }
            Err(error) => Err(error),
        }
    }

    /// Reads the bitmap without changing it. The guest is paused for the duration (milliseconds per GiB of frames), so only as
    /// many frames are looked at as are asked for, from frame 0 on; the others' bits are 0.
    ///
    /// When log-dirty is off, or the domain is dying, nothing is dirty and no error is given.
    /// A paused or suspended guest's frames still become dirty where backends write into granted ones: one for each
    /// packet that arrives.
    ///
    /// # Errors
    /// ENOMEM (in [`XenError::Call`]) when Xen ran out of memory for the bitmap: it is incomplete, and xl's own readings
    /// fail as well.
    pub fn peek(&mut self, frames: u64, bitmap: &mut Bitmap) -> Result<Peek, XenError> {
        let operation = ctrl::XEN_DOMCTL_SHADOW_OP_PEEK;
        self.read("XEN_DOMCTL_SHADOW_OP_PEEK", operation, frames, bitmap)
    }

    /// Reads the bitmap and empties Xen's copy in one step, the guest paused meanwhile.
    ///
    /// # Errors
    /// [`XenError::LogDirtyNotOurs`] without [`LogDirty::enable`] before; otherwise as [`LogDirty::peek`].
    pub fn clean(&mut self, bitmap: &mut Bitmap) -> Result<Peek, XenError> {
        if !self.ours {
            return Err(XenError::LogDirtyNotOurs(self.domid));
        }
        let operation = ctrl::XEN_DOMCTL_SHADOW_OP_CLEAN;
        self.read("XEN_DOMCTL_SHADOW_OP_CLEAN", operation, self.pages, bitmap)
    }

    /// Turns log-dirty off, if this handle turned it on; otherwise does nothing, so that xl's stays on.
    pub fn off(&mut self) -> Result<(), XenError> {
        if !self.ours {
            return Ok(());
        }
        self.control("XEN_DOMCTL_SHADOW_OP_OFF", ctrl::XEN_DOMCTL_SHADOW_OP_OFF, None)?;
        self.ours = false;
        Ok(())
    }

    fn read(&mut self, what: &'static str, operation: u32, frames: u64, bitmap: &mut Bitmap) -> Result<Peek, XenError> {
        // Whole words of them, as far as there are frames.
        let words = frames.min(self.pages).div_ceil(64) as usize;
        let frames = (words as u64 * 64).min(self.pages);
        // For a dying domain Xen answers success and writes nothing (paging_domctl): the last reading must not show.
        // SAFETY: the mapping has a bit for each of `pages`, which `words` do not pass, and is ours alone outside of a hypercall.
        unsafe { ptr::write_bytes(self.memory.as_ptr(), 0, words) };
        match self.control(what, operation, Some(frames)) {
            Ok(()) => {}
            Err(XenError::Call { source, .. }) if source.raw_os_error() == Some(libc::EBUSY) => return Ok(Peek::Busy),
            Err(error) => return Err(error),
        }
        bitmap.fill_with(self.pages, |word| match word < words {
            // SAFETY: the mapping has room for `words`; Xen writes to it during the hypercall only, and words are
            // little-endian on this architecture.
            true => unsafe { self.memory.add(word).read() },
            false => 0,
        });
        Ok(Peek::Read {
            dirty_pages: bitmap.count_ones(),
        })
    }

    /// `frames`: asks for the bits of so many, `pages` at most.
    fn control(&mut self, what: &'static str, operation: u32, frames: Option<u64>) -> Result<(), XenError> {
        let logdirty_control = symbol!(self.handle.library, xc_logdirty_control);
        let (buffer, frames) = match frames {
            Some(frames) => (&raw mut self.buffer, frames),
            None => (ptr::null_mut(), 0),
        };
        // SAFETY: the handle is open, the release was checked when this was made; `buffer` is null or an allocated
        // hypercall buffer with room for `frames` bits rounded up to whole pages (Xen writes no byte past the last bit's);
        // the counts are not asked for.
        let covered = unsafe {
            logdirty_control(
                self.handle.as_ptr(),
                self.domid.get(),
                operation,
                buffer,
                frames,
                0,
                ptr::null_mut(),
            )
        };
        if covered < 0 {
            Err(XenError::call(what, Some(self.domid), errno()))
        } else {
            Ok(())
        }
    }
}

impl Drop for LogDirty {
    fn drop(&mut self) {
        if let Err(error) = self.off() {
            log::warn!("log-dirty of {} stays on: {error}", self.domid);
        }
        if let Ok(free) = &self.handle.library.xc__hypercall_buffer_free_pages {
            // SAFETY: allocated with the same handle and number of pages, freed once, the handle still open.
            unsafe { free(self.handle.as_ptr(), &mut self.buffer, self.buffer_pages) };
        }
    }
}
