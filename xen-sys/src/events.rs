//! Event channels (libxenevtchn): how Xen says that something waits in a ring that is shared with it.
use std::cell::Cell;
use std::marker::PhantomData;
use std::os::fd::{AsFd, BorrowedFd};
use std::ptr::NonNull;

use crate::ffi::{self, Logger, errno, evtchn, symbol};
use crate::{DomId, XenError};

/// One port bound to a domain's. `Send`, not `Sync`: what is read from the descriptor goes to one thread.
///
/// Dropping it unbinds the port.
pub(crate) struct EventPort {
    library: &'static evtchn::EvtchnLib,
    handle: NonNull<evtchn::xenevtchn_handle>,
    port: u32,
    descriptor: i32,
    /// Last, so that it outlives the handle that logs through it.
    _logger: Logger,
    _not_sync: PhantomData<Cell<()>>,
}

// SAFETY: the handle is a file descriptor and heap data, nothing that belongs to the thread which opened it.
unsafe impl Send for EventPort {}

impl EventPort {
    /// Opens the driver, with no port bound yet.
    pub fn open() -> Result<EventPort, XenError> {
        let library = ffi::evtchn()?;
        let open = symbol!(library, xenevtchn_open);
        symbol!(library, xenevtchn_close);
        let descriptor = symbol!(library, xenevtchn_fd);
        let logger = Logger::quiet()?;
        // SAFETY: the logger outlives the handle.
        let handle = unsafe { open(logger.as_ptr(), 0) };
        let Some(handle) = NonNull::new(handle) else {
            let source = errno();
            return Err(XenError::Unavailable {
                what: "Xen's event channel driver (/dev/xen/evtchn)",
                source,
            });
        };
        let mut port = EventPort {
            library,
            handle,
            port: 0,
            descriptor: -1,
            _logger: logger,
            _not_sync: PhantomData,
        };
        // SAFETY: the handle is open.
        port.descriptor = unsafe { descriptor(handle.as_ptr()) };
        if port.descriptor < 0 {
            return Err(XenError::call("xenevtchn_fd", None, errno()));
        }
        Ok(port)
    }

    /// Binds a port of ours to the domain's `remote`.
    pub fn bind(&mut self, domid: DomId, remote: u32) -> Result<(), XenError> {
        let bind = symbol!(self.library, xenevtchn_bind_interdomain);
        symbol!(self.library, xenevtchn_unbind);
        // SAFETY: the handle is open; the other arguments are numbers.
        let port = unsafe { bind(self.handle.as_ptr(), domid.get(), remote) };
        match u32::try_from(port) {
            Ok(port) => {
                self.port = port;
                Ok(())
            }
            Err(_) => Err(XenError::call("xenevtchn_bind_interdomain", Some(domid), errno())),
        }
    }

    /// Tells the other end.
    pub fn notify(&self) -> Result<(), XenError> {
        let notify = symbol!(self.library, xenevtchn_notify);
        // SAFETY: the handle is open and the port is bound in it.
        match unsafe { notify(self.handle.as_ptr(), self.port) } {
            0 => Ok(()),
            _ => Err(XenError::call("xenevtchn_notify", None, errno())),
        }
    }

    /// Takes the notice that is there and lets the next one come. **Waits when there is none**: only after the descriptor
    /// was seen to be readable. To be called before the ring is looked at, or a request could be missed.
    pub fn take(&self) -> Result<(), XenError> {
        let pending = symbol!(self.library, xenevtchn_pending);
        let unmask = symbol!(self.library, xenevtchn_unmask);
        // SAFETY: the handle is open.
        let port = unsafe { pending(self.handle.as_ptr()) };
        let Ok(port) = u32::try_from(port) else {
            return Err(XenError::call("xenevtchn_pending", None, errno()));
        };
        // SAFETY: the handle is open and has just named the port.
        match unsafe { unmask(self.handle.as_ptr(), port) } {
            0 => Ok(()),
            _ => Err(XenError::call("xenevtchn_unmask", None, errno())),
        }
    }
}

impl AsFd for EventPort {
    fn as_fd(&self) -> BorrowedFd<'_> {
        // SAFETY: the library's own descriptor, open as long as the handle that this borrows.
        unsafe { BorrowedFd::borrow_raw(self.descriptor) }
    }
}

impl Drop for EventPort {
    fn drop(&mut self) {
        if self.port != 0
            && let Ok(unbind) = &self.library.xenevtchn_unbind
        {
            // SAFETY: bound in this handle, which is open; unbound once.
            unsafe { unbind(self.handle.as_ptr(), self.port) };
        }
        if let Ok(close) = &self.library.xenevtchn_close {
            // SAFETY: opened once, closed once.
            unsafe { close(self.handle.as_ptr()) };
        }
    }
}
