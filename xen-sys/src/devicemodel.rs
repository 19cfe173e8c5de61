//! What a device model tells Xen (libxendevicemodel): pages that were changed from outside of the guest.
use std::ptr::NonNull;

use crate::ffi::{self, Logger, devicemodel, errno, symbol};
use crate::{DomId, XenError};

/// Pages of one call: more than a page of extents is refused by Linux (`drivers/xen/privcmd.c`, `dm_op_buf_max_size`).
const BATCH: usize = 256;

/// A connection to the driver. `Send`, not `Sync`: the library keeps a cache of buffers, and does not say for whom.
pub struct DeviceModel {
    library: &'static devicemodel::DevicemodelLib,
    handle: NonNull<devicemodel::xendevicemodel_handle>,
    /// Last, so that it outlives the handle that logs through it.
    _logger: Logger,
}

// SAFETY: the handle is file descriptors and heap data, nothing that belongs to the thread which opened it.
unsafe impl Send for DeviceModel {}

impl DeviceModel {
    /// # Errors
    /// [`XenError::LibraryMissing`], or [`XenError::Unavailable`] outside a dom0 or without root.
    pub fn open() -> Result<DeviceModel, XenError> {
        let library = ffi::devicemodel()?;
        let open = symbol!(library, xendevicemodel_open);
        symbol!(library, xendevicemodel_close);
        let logger = Logger::quiet()?;
        // SAFETY: the logger outlives the handle.
        let handle = unsafe { open(logger.as_ptr(), 0) };
        match NonNull::new(handle) {
            Some(handle) => Ok(DeviceModel {
                library,
                handle,
                _logger: logger,
            }),
            None => {
                let source = errno();
                Err(XenError::Unavailable {
                    what: "Xen's device model interface (/dev/xen/privcmd)",
                    source,
                })
            }
        }
    }

    /// Marks frames of an HVM or PVH guest dirty, for whoever reads its log-dirty bitmap (XEN_DMOP_modified_memory). Those
    /// that are not there are left out; while log-dirty is off nothing happens.
    ///
    /// # Errors
    /// EINVAL (in [`XenError::Call`]) for the guest's highest frame number: Xen compares with one too few
    /// (`xen/arch/x86/hvm/dm.c`, `modified_memory`). Frames before it in `gfns` may be unmarked then.
    pub fn mark_dirty(&self, domid: DomId, gfns: &[u64]) -> Result<(), XenError> {
        let modified = symbol!(self.library, xendevicemodel_modified_memory_bulk);
        let number = u16::try_from(domid.get()).map_err(|_| XenError::NoSuchDomain(domid))?;
        for gfns in gfns.chunks(BATCH) {
            let extent = |gfn: &u64| devicemodel::xen_dm_op_modified_memory_extent {
                nr: 1,
                pad: 0,
                first_pfn: *gfn,
            };
            let mut extents: Vec<_> = gfns.iter().map(extent).collect();
            // SAFETY: the handle is open; the call reads so many extents and writes none that we read again.
            let status = unsafe { modified(self.handle.as_ptr(), number, extents.as_mut_ptr(), extents.len() as u32) };
            if status != 0 {
                return Err(XenError::call(
                    "xendevicemodel_modified_memory_bulk",
                    Some(domid),
                    errno(),
                ));
            }
        }
        Ok(())
    }
}

impl Drop for DeviceModel {
    fn drop(&mut self) {
        if let Ok(close) = &self.library.xendevicemodel_close {
            // SAFETY: opened once, closed once.
            unsafe { close(self.handle.as_ptr()) };
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_batch_is_a_page() {
        assert_eq!(BATCH * size_of::<devicemodel::xen_dm_op_modified_memory_extent>(), 4096);
    }

    #[test]
    fn handles_can_be_sent() {
        fn send<T: Send>() {}
        send::<DeviceModel>();
    }
}
