//! Frames of HVM and PVH guests that are one in memory and copied when one of the guests writes
//! (`xen/arch/x86/mm/mem_sharing.c`, `tools/libs/ctrl/xc_memshr.c`).
//!
//! A frame is first *nominated*: from then on nobody writes to it without Xen making it an ordinary one again, which
//! ends the validity of the handle that nominating gave. **Xen compares nothing when it shares**: who shares two frames
//! nominates both, compares their bytes and shares by the two handles; with a handle that is still valid a frame holds
//! what was compared. Handles are numbers that Xen never gives twice.
//!
//! A frame becomes its guest's own again when the guest writes to it, or when it is mapped writable
//! ([`crate::ForeignMemory::map`] with [`crate::Access::ReadWrite`], `xen/arch/x86/mm.c`): nothing need be written. Where
//! other guests still have the frame that takes a free one, and fails with ENOMEM when there is none: **a guest that
//! writes then is crashed** (`xen/arch/x86/hvm/hvm.c`), unless it has a ring ([`crate::SharingRing`]).
use std::cell::Cell;
use std::io;
use std::marker::PhantomData;
use std::mem::MaybeUninit;

use crate::ffi::{ctrl, errno, symbol};
use crate::{DomId, XenError, Xenctrl};

/// What a nominated frame is known by until it is written to.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ShareHandle(u64);

impl ShareHandle {
    /// One that another host than Xen made up, in tests.
    pub fn new(raw: u64) -> ShareHandle {
        ShareHandle(raw)
    }

    pub fn get(self) -> u64 {
        self.0
    }
}

/// Why frames are not shared.
#[derive(Debug, thiserror::Error)]
pub enum SharingError {
    /// ENOSYS: the call is not in this hypervisor.
    #[error(
        "this hypervisor cannot share memory: it has to be built with UNSUPPORTED and MEM_SHARING (Debian's is not)"
    )]
    NotBuilt,
    /// EOPNOTSUPP of `mem_sharing_control`.
    #[error("the hypervisor shares memory of HVM and PVH guests only, and on Intel processors only")]
    Unsupported,
    /// ENODEV of `mem_sharing_control`.
    #[error("the guest has no nested paging (HAP), without which its memory cannot be shared")]
    NoNestedPaging,
    /// EXDEV of `mem_sharing_control`.
    #[error("the guest has a passed-through device, which would not see that its memory is shared")]
    PassedThrough,
    #[error("there is no domain {0}")]
    NoSuchDomain(DomId),
    /// This frame cannot be shared, now or at all: there is none, it is Xen's, somebody has it mapped, or the domain is
    /// ending. EINVAL, E2BIG, EEXIST, EBUSY of `nominate_page`.
    #[error("the frame cannot be shared")]
    Unsharable,
    /// The first frame of a pair has been written to since its nomination (XENMEM_SHARING_OP_S_HANDLE_INVALID).
    #[error("the frame that shall stay has been written to")]
    StaleSource,
    /// The second one has (XENMEM_SHARING_OP_C_HANDLE_INVALID).
    #[error("the frame that shall be given up has been written to")]
    StaleClient,
    /// The second frame of a pair is several pages' one frame already. Xen 4.17 takes the locks of the two domains that it is
    /// asked about, and **stops the host** when it meets a page of a third one in the frame that is given up (`share_pages`:
    /// "mm locking order violation", seen in the lab), so it is not asked.
    #[error("the frame that shall be given up is shared by other pages")]
    ClientIsShared,
    /// The guest has no page for the ring of unshare failures, or dom0 is PVH.
    #[error("the guest has no page for Xen's ring of unshare failures, without which it could be crashed")]
    NoRing,
    /// A ring beside a pager's could stop the host ([`crate::SharingRing`]).
    #[error("the guest's memory is being paged, or another program has its ring of unshare failures")]
    HasPager,
    /// Xen has no memory for what it notes of shared frames.
    #[error("Xen has no memory left")]
    NoMemory,
    #[error(transparent)]
    Xen(#[from] XenError),
}

/// The host's memory as Xen counts it, in frames of 4096 bytes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct HostMemory {
    pub total: u64,
    /// Frames that any domain may get: free ones without those that are claimed for a domain.
    pub free: u64,
    /// Frames that sharing spares at this moment (`nr_saved_mfns`).
    pub saved: u64,
    /// Frames that are nominated or shared (`nr_shared_mfns`).
    pub shared: u64,
}

/// Shares frames of this host's guests. `Send`, not `Sync`, as [`Xenctrl`] is.
pub struct MemSharing {
    xen: Xenctrl,
    _not_sync: PhantomData<Cell<()>>,
}

impl MemSharing {
    /// # Errors
    /// As [`Xenctrl::open`]. Whether the hypervisor can share is not looked at: [`MemSharing::probe`].
    pub fn open() -> Result<MemSharing, XenError> {
        Ok(MemSharing {
            xen: Xenctrl::open()?,
            _not_sync: PhantomData,
        })
    }

    /// Whether the hypervisor was built with memory sharing. Changes nothing. Whether it shares a guest's memory depends on
    /// guest and processor besides: [`MemSharing::enable`].
    ///
    /// # Errors
    /// [`SharingError::NotBuilt`].
    pub fn probe(&self) -> Result<(), SharingError> {
        match self.audit() {
            // A release build of Xen has the calls and no audit.
            Ok(_) => Ok(()),
            Err(SharingError::Unsupported) => Ok(()),
            Err(error) => Err(error),
        }
    }

    /// Has Xen check its own notes of shared frames; returns how many mistakes it found. It writes them to its log.
    ///
    /// # Errors
    /// [`SharingError::Unsupported`]: this is a release build of Xen.
    pub fn audit(&self) -> Result<u32, SharingError> {
        let audit = symbol!(self.xen.handle.library, xc_memshr_audit);
        // SAFETY: the handle is open.
        let found = unsafe { audit(self.xen.handle.as_ptr()) };
        u32::try_from(found).map_err(|_| failed("xc_memshr_audit", None, errno()))
    }

    /// Lets frames of this guest be shared, or no further ones: those that are shared stay so.
    ///
    /// # Errors
    /// What is missing: [`SharingError::NotBuilt`], [`SharingError::Unsupported`], [`SharingError::NoNestedPaging`],
    /// [`SharingError::PassedThrough`].
    pub fn enable(&self, domid: DomId, enable: bool) -> Result<(), SharingError> {
        self.xen.check_version()?;
        let control = symbol!(self.xen.handle.library, xc_memshr_control);
        // SAFETY: the handle is open; the other arguments are numbers.
        let status = unsafe { control(self.xen.handle.as_ptr(), domid.get(), i32::from(enable)) };
        check("xc_memshr_control", domid, status)
    }

    /// Makes the frame read-only for everybody and gives its handle; of a frame that is nominated or shared already, the
    /// one that it has. It stays nominated until the guest writes to it or it is mapped writable.
    ///
    /// # Errors
    /// [`SharingError::Unsharable`], [`SharingError::NoMemory`], [`SharingError::NoSuchDomain`].
    pub fn nominate(&self, domid: DomId, gfn: u64) -> Result<ShareHandle, SharingError> {
        let nominate = symbol!(self.xen.handle.library, xc_memshr_nominate_gfn);
        let mut handle = 0;
        // SAFETY: the handle is open and `handle` is where the answer goes.
        let status = unsafe { nominate(self.xen.handle.as_ptr(), domid.get(), gfn, &mut handle) };
        check("xc_memshr_nominate_gfn", domid, status)?;
        Ok(ShareHandle(handle))
    }

    /// Gives up the second frame (the client's) and puts the first one (the source's) in its place, wherever the second
    /// was. **Compares nothing.** Two frames that are one already are a success, and so, by Xen, are two numbers that have
    /// no frame any more: [`MemSharing::references`] tells.
    ///
    /// # Errors
    /// [`SharingError::StaleSource`], [`SharingError::StaleClient`]: written to since they were nominated, nothing is
    /// changed. [`SharingError::ClientIsShared`]. Frames that somebody else shares at the same moment are not seen: only one
    /// process of a host may share.
    pub fn share(
        &self,
        source: (DomId, u64, ShareHandle),
        client: (DomId, u64, ShareHandle),
    ) -> Result<(), SharingError> {
        if self.references(client.0, client.1)?.is_some_and(|pages| pages > 1) {
            return Err(SharingError::ClientIsShared);
        }
        self.share_alone(source, client)
    }

    /// The same, for a second frame of which the caller knows that it is one page's: its handle is a new one, which nothing
    /// has been shared by. **If it is not, Xen may stop the host** ([`SharingError::ClientIsShared`]).
    ///
    /// # Errors
    /// As [`MemSharing::share`].
    pub fn share_alone(
        &self,
        source: (DomId, u64, ShareHandle),
        client: (DomId, u64, ShareHandle),
    ) -> Result<(), SharingError> {
        let share = symbol!(self.xen.handle.library, xc_memshr_share_gfns);
        // SAFETY: the handle is open; the other arguments are numbers.
        let status = unsafe {
            share(
                self.xen.handle.as_ptr(),
                source.0.get(),
                source.1,
                source.2.0,
                client.0.get(),
                client.1,
                client.2.0,
            )
        };
        match status {
            0 => Ok(()),
            _ => Err(share_failed(source.0, errno())),
        }
    }

    /// Of how many guests' pages this frame is the one frame; `None` when it is neither nominated nor shared. Changes
    /// nothing. A debug build of Xen writes two lines to its log for each call.
    pub fn references(&self, domid: DomId, gfn: u64) -> Result<Option<u32>, SharingError> {
        let debug = symbol!(self.xen.handle.library, xc_memshr_debug_gfn);
        // SAFETY: the handle is open; the other arguments are numbers.
        let found = unsafe { debug(self.xen.handle.as_ptr(), domid.get(), gfn) };
        match u32::try_from(found) {
            Ok(references) => Ok(Some(references)),
            Err(_) => match failed("xc_memshr_debug_gfn", Some(domid), errno()) {
                SharingError::Unsharable => Ok(None),
                error => Err(error),
            },
        }
    }

    /// The host's memory (XEN_SYSCTL_physinfo, XENMEM_get_sharing_freed_pages, XENMEM_get_sharing_shared_pages). Without
    /// sharing nothing is saved.
    pub fn memory(&self) -> Result<HostMemory, XenError> {
        self.xen.check_version()?;
        let library = self.xen.handle.library;
        let physinfo = symbol!(library, xc_physinfo);
        let freed = symbol!(library, xc_sharing_freed_pages);
        let used = symbol!(library, xc_sharing_used_frames);
        let mut info: MaybeUninit<ctrl::xc_physinfo_t> = MaybeUninit::zeroed();
        // SAFETY: the handle is open; the structure is of the ABI that check_version has just confirmed.
        let status = unsafe { physinfo(self.xen.handle.as_ptr(), info.as_mut_ptr()) };
        if status != 0 {
            return Err(XenError::call("xc_physinfo", None, errno()));
        }
        // SAFETY: plain numbers, for which zeroed memory is valid as well as what Xen wrote.
        let info = unsafe { info.assume_init() };
        // SAFETY: the handle is open.
        let saved = unsafe { freed(self.xen.handle.as_ptr()) };
        let saved = u64::try_from(saved).map_err(|_| XenError::call("xc_sharing_freed_pages", None, errno()))?;
        // SAFETY: the handle is open.
        let shared = unsafe { used(self.xen.handle.as_ptr()) };
        let shared = u64::try_from(shared).map_err(|_| XenError::call("xc_sharing_used_frames", None, errno()))?;
        Ok(HostMemory {
            total: info.total_pages,
            free: info.free_pages.saturating_sub(info.outstanding_pages),
            saved,
            shared,
        })
    }
}

fn check(what: &'static str, domid: DomId, status: i32) -> Result<(), SharingError> {
    match status {
        0 => Ok(()),
        _ => Err(failed(what, Some(domid), errno())),
    }
}

fn failed(what: &'static str, domid: Option<DomId>, source: io::Error) -> SharingError {
    match (source.raw_os_error(), domid) {
        (Some(libc::ENOSYS), _) => SharingError::NotBuilt,
        (Some(libc::EOPNOTSUPP), _) => SharingError::Unsupported,
        (Some(libc::ENODEV), _) => SharingError::NoNestedPaging,
        (Some(libc::EXDEV), _) => SharingError::PassedThrough,
        (Some(libc::ENOMEM), _) => SharingError::NoMemory,
        (Some(libc::ESRCH), Some(domid)) => SharingError::NoSuchDomain(domid),
        (Some(libc::EINVAL | libc::E2BIG | libc::EEXIST | libc::EBUSY), _) => SharingError::Unsharable,
        _ => SharingError::Xen(XenError::call(what, domid, source)),
    }
}

/// Sharing answers with two numbers of its own, which libxenctrl puts into errno like any other.
fn share_failed(domid: DomId, source: io::Error) -> SharingError {
    match source.raw_os_error().map(i32::wrapping_neg) {
        Some(ctrl::XENMEM_SHARING_OP_S_HANDLE_INVALID) => SharingError::StaleSource,
        Some(ctrl::XENMEM_SHARING_OP_C_HANDLE_INVALID) => SharingError::StaleClient,
        _ => failed("xc_memshr_share_gfns", Some(domid), source),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn codes_become_what_they_mean() {
        let domid = DomId::new(7).unwrap();
        let error = |code| failed("xc_memshr_control", Some(domid), io::Error::from_raw_os_error(code));
        assert!(matches!(error(libc::ENOSYS), SharingError::NotBuilt));
        assert!(error(libc::ENOSYS).to_string().contains("MEM_SHARING"));
        assert!(matches!(error(libc::EXDEV), SharingError::PassedThrough));
        assert!(matches!(error(libc::E2BIG), SharingError::Unsharable));
        assert!(matches!(error(libc::ESRCH), SharingError::NoSuchDomain(found) if found == domid));
        assert!(matches!(error(libc::EPERM), SharingError::Xen(XenError::Call { .. })));
        let stale = |code| share_failed(domid, io::Error::from_raw_os_error(code));
        assert!(matches!(stale(10), SharingError::StaleSource));
        assert!(matches!(stale(9), SharingError::StaleClient));
        assert!(matches!(stale(libc::ENOMEM), SharingError::NoMemory));
    }

    #[test]
    fn the_abi_is_the_one_of_the_release() {
        assert_eq!(size_of::<ctrl::xc_physinfo_t>(), 112);
        assert_eq!(std::mem::offset_of!(ctrl::xc_physinfo_t, free_pages), 48);
    }

    #[test]
    fn handles_can_be_sent() {
        fn send<T: Send>() {}
        send::<MemSharing>();
    }
}
