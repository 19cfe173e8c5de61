//! Domains through libxenctrl.
use std::fmt;
use std::marker::PhantomData;
use std::mem::MaybeUninit;
use std::ptr::{self, NonNull};
use std::{cell::Cell, time::Duration};

use crate::ffi::{self, Logger, ctrl, errno, symbol};
use crate::{BUILT_FOR, LogDirty, XenError, XenVersion};

/// The first number that is no domain's (`DOMID_FIRST_RESERVED`, `xen/include/public/xen.h`).
const FIRST_RESERVED: u16 = 0x7ff0;

/// The number of a domain on this host. It changes with every migration and is reused after 0x7fef domains.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct DomId(u16);

/// The domain that this runs in.
pub const DOM0: DomId = DomId(0);

impl DomId {
    /// `None` for a number that Xen reserves (0x7ff0 and above).
    pub fn new(domid: u32) -> Option<Self> {
        u16::try_from(domid)
            .ok()
            .filter(|domid| *domid < FIRST_RESERVED)
            .map(DomId)
    }

    pub fn get(self) -> u32 {
        u32::from(self.0)
    }
}

/// As Xen's messages have it: `d5`.
impl fmt::Display for DomId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "d{}", self.0)
    }
}

/// Why a domain shut itself down (SHUTDOWN_*, `xen/include/public/sched.h`). During a live migration the source is in
/// `Suspend` from the moment that the guest has answered.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ShutdownReason {
    Poweroff,
    Reboot,
    Suspend,
    Crash,
    Watchdog,
    SoftReset,
    Other(u32),
}

impl ShutdownReason {
    fn from_raw(reason: u32) -> Self {
        match reason {
            ctrl::SHUTDOWN_poweroff => ShutdownReason::Poweroff,
            ctrl::SHUTDOWN_reboot => ShutdownReason::Reboot,
            ctrl::SHUTDOWN_suspend => ShutdownReason::Suspend,
            ctrl::SHUTDOWN_crash => ShutdownReason::Crash,
            ctrl::SHUTDOWN_watchdog => ShutdownReason::Watchdog,
            ctrl::SHUTDOWN_soft_reset => ShutdownReason::SoftReset,
            other => ShutdownReason::Other(other),
        }
    }
}

/// What a domain is doing, the weightiest first: one that is dying is also shut down, a paused one may also be blocked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DomainState {
    /// Destroyed; its memory is being freed, or is held by somebody's mapping.
    Dying,
    /// Has shut down and waits for the toolstack.
    Shutdown(ShutdownReason),
    /// Paused by the toolstack.
    Paused,
    /// All virtual CPUs wait for an event.
    Blocked,
    /// On a processor at this moment.
    Running,
    /// Waits for a processor.
    Runnable,
}

/// A domain as XEN_SYSCTL_getdomaininfolist tells it (`xen/include/public/domctl.h`).
#[derive(Clone, Debug)]
pub struct DomainInfo {
    pub domid: DomId,
    /// During a migration, or of a saved and restored copy, two domains on one host can have the same.
    pub uuid: [u8; 16],
    /// HVM or PVH; false for PV.
    pub hvm: bool,
    /// Hardware-assisted paging, which mem_paging and mem_sharing need.
    pub hap: bool,
    pub state: DomainState,
    /// Paused by the toolstack, whatever `state` says besides.
    pub paused: bool,
    pub shutdown: Option<ShutdownReason>,
    pub dying: bool,
    /// Pages of 4096 bytes that the domain owns now.
    pub total_pages: u64,
    pub max_pages: u64,
    /// Pages shared by memshr.
    pub shared_pages: u64,
    /// Pages evicted by mem_paging. A migration or save of a domain that has any loses them.
    pub paged_pages: u64,
    /// Pages that are kept back of the host's memory for it.
    pub claimed_pages: u64,
    /// `None` before the domain has got virtual CPUs.
    pub max_vcpu_id: Option<u32>,
    pub cpu_time_ns: u64,
}

impl DomainInfo {
    /// Processor time used since the domain was built.
    pub fn cpu_time(&self) -> Duration {
        Duration::from_nanos(self.cpu_time_ns)
    }

    fn from_raw(raw: &ctrl::xc_domaininfo_t) -> Option<Self> {
        let has = |flag: u32| raw.flags & flag != 0;
        let reason = raw.flags >> ctrl::XEN_DOMINF_shutdownshift & ctrl::XEN_DOMINF_shutdownmask;
        let shutdown = has(ctrl::XEN_DOMINF_shutdown).then(|| ShutdownReason::from_raw(reason));
        let dying = has(ctrl::XEN_DOMINF_dying);
        let paused = has(ctrl::XEN_DOMINF_paused);
        let state = match shutdown {
            _ if dying => DomainState::Dying,
            Some(reason) => DomainState::Shutdown(reason),
            None if paused => DomainState::Paused,
            None if has(ctrl::XEN_DOMINF_blocked) => DomainState::Blocked,
            None if has(ctrl::XEN_DOMINF_running) => DomainState::Running,
            None => DomainState::Runnable,
        };
        Some(DomainInfo {
            domid: DomId::new(u32::from(raw.domain))?,
            uuid: raw.handle,
            hvm: has(ctrl::XEN_DOMINF_hvm_guest),
            hap: has(ctrl::XEN_DOMINF_hap),
            state,
            paused,
            shutdown,
            dying,
            total_pages: raw.tot_pages,
            max_pages: raw.max_pages,
            shared_pages: raw.shr_pages,
            paged_pages: raw.paged_pages,
            claimed_pages: raw.outstanding_pages,
            max_vcpu_id: (raw.max_vcpu_id != u32::MAX).then_some(raw.max_vcpu_id),
            cpu_time_ns: raw.cpu_time,
        })
    }
}

/// Indices for [`Xenctrl::hvm_param`] (`xen/include/public/hvm/params.h`).
pub mod hvm_param {
    use crate::ffi::ctrl;

    pub const STORE_PFN: u32 = ctrl::HVM_PARAM_STORE_PFN;
    pub const IOREQ_PFN: u32 = ctrl::HVM_PARAM_IOREQ_PFN;
    pub const BUFIOREQ_PFN: u32 = ctrl::HVM_PARAM_BUFIOREQ_PFN;
    pub const VIRIDIAN: u32 = ctrl::HVM_PARAM_VIRIDIAN;
    pub const IDENT_PT: u32 = ctrl::HVM_PARAM_IDENT_PT;
    pub const CONSOLE_PFN: u32 = ctrl::HVM_PARAM_CONSOLE_PFN;
    pub const PAGING_RING_PFN: u32 = ctrl::HVM_PARAM_PAGING_RING_PFN;
    pub const MONITOR_RING_PFN: u32 = ctrl::HVM_PARAM_MONITOR_RING_PFN;
    pub const SHARING_RING_PFN: u32 = ctrl::HVM_PARAM_SHARING_RING_PFN;
    pub const VM86_TSS_SIZED: u32 = ctrl::HVM_PARAM_VM86_TSS_SIZED;
}

/// libxenctrl's handle: the pointer, its logger and the close.
pub(crate) struct Handle {
    pub(crate) library: &'static ctrl::CtrlLib,
    pub(crate) xch: NonNull<ctrl::xc_interface>,
    /// Last, so that it outlives the handle that logs through it.
    _logger: Logger,
}

impl Handle {
    pub(crate) fn open() -> Result<Self, XenError> {
        let library = ffi::ctrl()?;
        let open = symbol!(library, xc_interface_open);
        symbol!(library, xc_interface_close);
        let logger = Logger::quiet()?;
        // SAFETY: the logger outlives the handle; without a log for the domain builder, which we do not use. No flags:
        // the locking variant, so that several handles may be used on several threads.
        let xch = unsafe { open(logger.as_ptr(), ptr::null_mut(), 0) };
        match NonNull::new(xch) {
            Some(xch) => Ok(Handle {
                library,
                xch,
                _logger: logger,
            }),
            None => {
                let source = errno();
                Err(XenError::Unavailable {
                    what: "Xen's control interface (/dev/xen/privcmd)",
                    source,
                })
            }
        }
    }

    pub(crate) fn as_ptr(&self) -> *mut ctrl::xc_interface {
        self.xch.as_ptr()
    }
}

impl Drop for Handle {
    fn drop(&mut self) {
        if let Ok(close) = &self.library.xc_interface_close {
            // SAFETY: opened by xc_interface_open and closed once.
            unsafe { close(self.as_ptr()) };
        }
    }
}

// SAFETY: the handle holds file descriptors and heap data, nothing that belongs to the thread which opened it. It is not
// `Sync` (NonNull): two threads in failing calls on one handle would write its last_error at the same time
// (`tools/libs/ctrl/xc_private.c`, xc_reportv).
unsafe impl Send for Handle {}

/// A connection to the hypervisor's control interface. `Send`, not `Sync`: open one per thread.
///
/// Dropping it closes it. Opening costs a few system calls.
pub struct Xenctrl {
    pub(crate) handle: Handle,
    /// The running version, once known.
    running: Cell<Option<XenVersion>>,
    /// Not `Sync`, also should `Handle` ever become so.
    _not_sync: PhantomData<Cell<()>>,
}

impl Xenctrl {
    /// # Errors
    /// [`XenError::LibraryMissing`], [`XenError::VersionMismatch`] when only another release's library can be there, or
    /// [`XenError::Unavailable`] outside a dom0 or without root.
    pub fn open() -> Result<Self, XenError> {
        Ok(Xenctrl {
            handle: Handle::open()?,
            running: Cell::new(None),
            _not_sync: PhantomData,
        })
    }

    /// The running hypervisor's release, (major, minor).
    pub fn version(&self) -> Result<(u32, u32), XenError> {
        let running = self.running_version()?;
        Ok((running.major, running.minor))
    }

    fn running_version(&self) -> Result<XenVersion, XenError> {
        if let Some(known) = self.running.get() {
            return Ok(known);
        }
        let xc_version = symbol!(self.handle.library, xc_version);
        // SAFETY: the handle is open; XENVER_version takes no argument (`xen/include/public/version.h`).
        let packed = unsafe { xc_version(self.handle.as_ptr(), ctrl::XENVER_version as i32, ptr::null_mut()) };
        if packed < 0 {
            return Err(XenError::call("xc_version", None, errno()));
        }
        let packed = packed.cast_unsigned();
        let running = XenVersion {
            major: packed >> 16,
            minor: packed & 0xffff,
        };
        self.running.set(Some(running));
        Ok(running)
    }

    /// Refuses when the hypervisor is another release: domctl and sysctl carry structures of this one, and Xen's own
    /// answer to them is a bare EACCES.
    pub(crate) fn check_version(&self) -> Result<(), XenError> {
        same_version(BUILT_FOR, self.running_version()?)
    }

    /// All domains, dom0 included, in order of their numbers.
    ///
    /// Domains that come or go between two batches may be missing, none is listed twice.
    pub fn domains(&self) -> Result<Vec<DomainInfo>, XenError> {
        // As many as libxenctrl carries in one page, of which it keeps some at hand.
        const BATCH: usize = 4096 / size_of::<ctrl::xc_domaininfo_t>();
        let mut found = Vec::new();
        let mut first = 0;
        loop {
            let batch = self.list(first, BATCH)?;
            let Some(last) = batch.last() else { return Ok(found) };
            first = u32::from(last.domain) + 1;
            let complete = batch.len() < BATCH;
            found.extend(batch.iter().filter_map(DomainInfo::from_raw));
            if complete {
                return Ok(found);
            }
        }
    }

    /// One domain; `None` when there is no such domain.
    pub fn domain(&self, domid: DomId) -> Result<Option<DomainInfo>, XenError> {
        // The hypercall answers with the first domain from this number on.
        let found = self.list(domid.get(), 1)?;
        Ok(found
            .first()
            .and_then(DomainInfo::from_raw)
            .filter(|info| info.domid == domid))
    }

    fn list(&self, first: u32, count: usize) -> Result<Vec<ctrl::xc_domaininfo_t>, XenError> {
        self.check_version()?;
        let getinfolist = symbol!(self.handle.library, xc_domain_getinfolist);
        let mut buffer: Vec<MaybeUninit<ctrl::xc_domaininfo_t>> = vec![MaybeUninit::zeroed(); count];
        // SAFETY: the handle is open; the buffer has room for `count` structures of the ABI that
        // check_version has just confirmed.
        let written = unsafe { getinfolist(self.handle.as_ptr(), first, count as u32, buffer.as_mut_ptr().cast()) };
        let Ok(written) = usize::try_from(written) else {
            return Err(XenError::call("xc_domain_getinfolist", None, errno()));
        };
        // SAFETY: the structure is plain numbers, for which zeroed memory is valid as well as what Xen wrote.
        Ok(buffer
            .iter()
            .take(written.min(count))
            .map(|info| unsafe { info.assume_init() })
            .collect())
    }

    /// The highest guest frame number, whether or not a frame is there: a PVH guest's is 0xfefff whatever its memory.
    pub fn maximum_gpfn(&self, domid: DomId) -> Result<u64, XenError> {
        let maximum_gpfn = symbol!(self.handle.library, xc_domain_maximum_gpfn);
        let mut gpfn: ctrl::xen_pfn_t = 0;
        // SAFETY: the handle is open and `gpfn` is where the answer goes.
        let status = unsafe { maximum_gpfn(self.handle.as_ptr(), domid.get(), &mut gpfn) };
        check("xc_domain_maximum_gpfn", domid, status)?;
        Ok(gpfn)
    }

    /// Pauses the domain. Xen counts: as many [`Xenctrl::unpause`] set it going again, whoever else paused it.
    pub fn pause(&self, domid: DomId) -> Result<(), XenError> {
        self.check_version()?;
        let pause = symbol!(self.handle.library, xc_domain_pause);
        // SAFETY: the handle is open; the other argument is a number.
        let status = unsafe { pause(self.handle.as_ptr(), domid.get()) };
        check("xc_domain_pause", domid, status)
    }

    /// Takes one pause back. EINVAL (in [`XenError::Call`]) when the domain was not paused.
    pub fn unpause(&self, domid: DomId) -> Result<(), XenError> {
        self.check_version()?;
        let unpause = symbol!(self.handle.library, xc_domain_unpause);
        // SAFETY: the handle is open; the other argument is a number.
        let status = unsafe { unpause(self.handle.as_ptr(), domid.get()) };
        check("xc_domain_unpause", domid, status)
    }

    /// An HVM parameter of an HVM or PVH domain ([`hvm_param`]); for a PV domain EINVAL.
    pub fn hvm_param(&self, domid: DomId, index: u32) -> Result<u64, XenError> {
        let get = symbol!(self.handle.library, xc_hvm_param_get);
        let mut value = 0;
        // SAFETY: the handle is open and `value` is where the answer goes.
        let status = unsafe { get(self.handle.as_ptr(), domid.get(), index, &mut value) };
        check("xc_hvm_param_get", domid, status)?;
        Ok(value)
    }

    /// Sets an HVM parameter of an HVM or PVH domain.
    pub fn set_hvm_param(&self, domid: DomId, index: u32, value: u64) -> Result<(), XenError> {
        let set = symbol!(self.handle.library, xc_hvm_param_set);
        // SAFETY: the handle is open; the other arguments are numbers.
        let status = unsafe { set(self.handle.as_ptr(), domid.get(), index, value) };
        check("xc_hvm_param_set", domid, status)
    }

    /// Frames of the domain that are populated on demand and have not been yet. **Mapping such a frame populates it, and
    /// Xen crashes the domain when there is no memory set aside for it any more** (`xen/arch/x86/mm/p2m-pod.c`).
    pub fn populate_on_demand_entries(&self, domid: DomId) -> Result<u64, XenError> {
        let get = symbol!(self.handle.library, xc_domain_get_pod_target);
        let (mut total, mut cache, mut entries) = (0, 0, 0);
        // SAFETY: the handle is open; the pointers are where the answers go.
        let status = unsafe { get(self.handle.as_ptr(), domid.get(), &mut total, &mut cache, &mut entries) };
        check("xc_domain_get_pod_target", domid, status)?;
        Ok(entries)
    }

    /// Access to the domain's dirty bitmap over its frames 0 to `pages - 1`; changes nothing yet. The handle is
    /// independent of this one (it has a connection of its own).
    pub fn log_dirty(&self, domid: DomId, pages: u64) -> Result<LogDirty, XenError> {
        self.check_version()?;
        LogDirty::new(Handle::open()?, domid, pages)
    }
}

/// 0 is success; otherwise errno, which nothing has touched since the call.
fn check(what: &'static str, domid: DomId, status: i32) -> Result<(), XenError> {
    if status == 0 {
        Ok(())
    } else {
        Err(XenError::call(what, Some(domid), errno()))
    }
}

fn same_version(built: XenVersion, running: XenVersion) -> Result<(), XenError> {
    if built == running {
        Ok(())
    } else {
        Err(XenError::VersionMismatch { built, running })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn raw(flags: u32) -> ctrl::xc_domaininfo_t {
        // SAFETY: plain numbers, all of which may be zero.
        let mut raw: ctrl::xc_domaininfo_t = unsafe { MaybeUninit::zeroed().assume_init() };
        raw.domain = 5;
        raw.flags = flags;
        raw
    }

    #[test]
    fn domids_end_where_xens_do() {
        assert_eq!(DomId::new(0), Some(DOM0));
        assert_eq!(DomId::new(0x7fef).map(DomId::get), Some(0x7fef));
        assert_eq!(DomId::new(0x7ff0), None);
        assert_eq!(DomId::new(0x10000), None);
        assert_eq!(DomId::new(u32::MAX), None);
        assert_eq!(DomId::new(12).unwrap().to_string(), "d12");
    }

    #[test]
    fn flags_become_states() {
        let info = |flags| DomainInfo::from_raw(&raw(flags)).unwrap();
        assert_eq!(info(0x22).state, DomainState::Running);
        assert!(info(0x22).hvm);
        assert_eq!(info(0x12).state, DomainState::Blocked);
        let paused = info(0x1a);
        assert_eq!(
            (paused.state, paused.paused, paused.shutdown),
            (DomainState::Paused, true, None)
        );
        let suspended = info(0x2_0006);
        assert_eq!(suspended.state, DomainState::Shutdown(ShutdownReason::Suspend));
        assert_eq!(info(0x2_0007).state, DomainState::Dying);
        assert_eq!(info(0x9_0004).shutdown, Some(ShutdownReason::Other(9)));
        assert_eq!(info(0x102).state, DomainState::Runnable);
        assert!(info(0x102).hap && !info(2).hap);
    }

    #[test]
    fn the_abi_is_the_one_of_the_release() {
        assert_eq!(size_of::<ctrl::xc_domaininfo_t>(), 112);
        assert_eq!(std::mem::offset_of!(ctrl::xc_domaininfo_t, cpu_time), 56);
        assert_eq!(size_of::<ctrl::xc_hypercall_buffer_t>(), 40);
        assert_eq!(size_of::<ctrl::xc_shadow_op_stats_t>(), 8);
    }

    #[test]
    fn another_release_is_refused() {
        let built = XenVersion { major: 4, minor: 17 };
        assert!(same_version(built, built).is_ok());
        let running = XenVersion { major: 4, minor: 18 };
        assert!(matches!(
            same_version(built, running),
            Err(XenError::VersionMismatch { .. })
        ));
    }

    #[test]
    fn handles_can_be_sent() {
        fn send<T: Send>() {}
        send::<Xenctrl>();
        send::<LogDirty>();
    }
}
