//! Safe handles over Xen's libraries.
//!
//! - [`Xenctrl`] (libxenctrl): domains, pause and unpause, HVM parameters, idle times, and from it [`LogDirty`];
//! - [`MemSharing`] (libxenctrl): equal frames of guests made one, copied when one of them is written to;
//! - [`Paging`] (libxenctrl, libxenevtchn): pages that are not in memory, loaded when somebody touches them;
//! - [`DeviceModel`] (libxendevicemodel): pages that were filled from outside marked dirty;
//! - [`ForeignMemory`] (libxenforeignmemory): a domain's frames, mapped in batches with an error per frame;
//! - [`Xenstore`] (libxenstore): read, write, watch;
//! - [`Libxl`] (libxenlight): what repairs a guest that xl left behind: resume, rename, unpause, destroy.
//!
//! The libraries are opened at run time by full soname, so a program that contains this crate starts on a machine without
//! Xen and gets an [`XenError`] from `open` there. libxenctrl's and libxenlight's ABI changes with each release: only the
//! release that the bindings were made from is opened ([`BUILT_FOR`]), and calls that the hypervisor itself versions are
//! refused when another release is running.
//!
//! Threads: every handle is `Send`. [`ForeignMemory`] and [`Xenstore`] are `Sync` too; [`Xenctrl`], [`LogDirty`],
//! [`MemSharing`], [`Paging`] and [`Libxl`] are not (each says why): open one per thread, they are cheap. No handle survives `fork`.
//!
//! This is the only crate with unsafe code; `ffi` is private and everything public is safe to call with any arguments.

#[cfg(not(all(target_os = "linux", target_arch = "x86_64")))]
compile_error!("xen-sys knows Xen's ABI on x86-64 Linux only");

mod allocator;
mod bitmap;
mod devicemodel;
mod domain;
mod error;
mod events;
mod ffi;
mod foreign;
mod libxl;
mod logdirty;
mod names;
mod paging;
mod paging_ring;
mod priority;
mod processors;
mod sharing;
mod sharing_ring;
mod store;

pub use allocator::keep_freed_memory;
pub use bitmap::Bitmap;
pub use devicemodel::DeviceModel;
pub use domain::{DOM0, DomId, DomainInfo, DomainState, ShutdownReason, Xenctrl, hvm_param};
pub use error::{XenError, XenVersion};
pub use foreign::{Access, ForeignMemory, Mapping, PAGE_BYTES};
pub use libxl::Libxl;
pub use logdirty::{LogDirty, Peek};
pub use names::{AWAY, INCOMING, uuid_text};
pub use paging::{Loaded, Paging, PagingError, PagingRequest};
pub use priority::Urgent;
pub use sharing::{HostMemory, MemSharing, ShareHandle, SharingError};
pub use sharing_ring::{SharingRing, UnshareFailure};
pub use store::{WatchEvent, Xenstore};

/// The Xen release whose headers the bindings were made from, the only one whose libxenctrl and libxenlight are opened.
pub const BUILT_FOR: XenVersion = XenVersion {
    major: ffi::XEN_VERSION.0,
    minor: ffi::XEN_VERSION.1,
};

/// The release of the hypervisor that runs here, from `/sys/hypervisor/version`: `None` when there is none.
///
/// Needs neither a library nor root; [`Xenctrl::version`] asks the hypervisor itself.
pub fn running_version() -> Option<XenVersion> {
    let number = |name: &str| -> Option<u32> {
        std::fs::read_to_string(format!("/sys/hypervisor/version/{name}"))
            .ok()?
            .trim()
            .parse()
            .ok()
    };
    let is_xen = std::fs::read_to_string("/sys/hypervisor/type").is_ok_and(|kind| kind.trim() == "xen");
    if !is_xen {
        return None;
    }
    Some(XenVersion {
        major: number("major")?,
        minor: number("minor")?,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Every `open` on a machine that is no dom0: an error that says what is missing, with or without the libraries.
    #[test]
    fn without_xen_every_open_is_an_error() {
        if running_version().is_some() {
            eprintln!("SKIPPED: this machine runs Xen; tests/lab.rs is for it");
            return;
        }
        let errors = [
            Xenctrl::open().err(),
            ForeignMemory::open().err(),
            DeviceModel::open().err(),
            Xenstore::open().err(),
            Libxl::open().err(),
        ];
        for error in errors {
            let error = error.expect("there is no Xen here");
            let text = error.to_string();
            match error {
                XenError::LibraryMissing { name, package, .. } => {
                    assert!(
                        text.contains(&name) && text.contains(&package) && name.contains(".so."),
                        "{text}"
                    );
                }
                XenError::Unavailable { what, .. } => assert!(text.contains(what) && text.contains("dom0"), "{text}"),
                XenError::Libxl { what, .. } => assert!(text.contains(what), "{text}"),
                _ => panic!("{text}"),
            }
            println!("{text}");
        }
    }
}
