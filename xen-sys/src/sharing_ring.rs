//! Guests' processors that write to a shared page for which the host has no free frame: Xen's ring of unshare failures
//! (`mem_sharing_notify_enomem` in `xen/arch/x86/mm/mem_sharing.c`, `xen/common/vm_event.c`).
//!
//! Without a ring Xen crashes such a guest. With one the processor stands still until its failure is answered, and tries
//! again then. Should the process end that serves the ring, processors wait for the next one ([`SharingRing::take_over`]).
//!
//! Xen 4.17 keeps one note for all rings of a guest, and the first that is turned off takes it from the others, whose next
//! answer **stops the host** (`vm_event_cleanup_domain`). So there is no ring beside a pager, and none is ever turned off but
//! to be turned on again.
use std::io;
use std::mem::MaybeUninit;

use crate::events::EventPort;
use crate::ffi::{ctrl, errno, symbol};
use crate::paging::RingPage;
use crate::paging_ring::BackRing;
use crate::{DomId, ForeignMemory, SharingError, XenError, Xenctrl, hvm_param};

/// There was no frame for a page that was written to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct UnshareFailure {
    pub gfn: u64,
    /// The guest's processor, if `paused`.
    pub vcpu: u32,
    /// The processor stands still until this is answered. Else somebody else wrote, who was told.
    pub paused: bool,
}

/// A guest's ring. `Send`, not `Sync`, as [`Xenctrl`] is not. Dropping it leaves the ring on: see above.
pub struct SharingRing {
    xen: Xenctrl,
    domid: DomId,
    ring: BackRing,
    /// Behind the ring, which is in it.
    _page: RingPage,
    port: EventPort,
}

impl SharingRing {
    /// Turns the ring on, in the page that the guest's builder set aside (HVM_PARAM_SHARING_RING_PFN), which leaves the
    /// guest's memory. From a process that served it before it is taken over, and whoever waits tries again; with `hold` the
    /// guest is paused meanwhile, for a host without free memory: a processor that tried again while no ring is on would
    /// crash it.
    ///
    /// # Errors
    /// [`SharingError::HasPager`], [`SharingError::NoRing`], [`SharingError::NoMemory`] and others.
    pub fn take_over(domid: DomId, hold: bool) -> Result<SharingRing, SharingError> {
        let xen = Xenctrl::open()?;
        xen.check_version()?;
        let gfn = xen.hvm_param(domid, hvm_param::SHARING_RING_PFN)?;
        if gfn == 0 {
            return Err(SharingError::NoRing);
        }
        let paging = xen.hvm_param(domid, hvm_param::PAGING_RING_PFN)?;
        if paging != 0 {
            let memory = ForeignMemory::open()?;
            match memory.map_one(domid, paging)? {
                Some(page) => memory.unmap_one(page),
                None => return Err(SharingError::HasPager),
            }
        }
        if hold {
            xen.pause(domid)?;
        }
        let ring = turn_on(xen, domid, gfn);
        if hold {
            let unpaused = Xenctrl::open().and_then(|xen| xen.unpause(domid));
            return ring.and_then(|ring| Ok(unpaused.map(|()| ring)?));
        }
        ring
    }

    /// The guest.
    pub fn domid(&self) -> DomId {
        self.domid
    }

    /// All that have come. Each has to be answered: until then Xen has one place less for others.
    pub fn failures(&mut self) -> Vec<UnshareFailure> {
        std::iter::from_fn(|| self.ring.take()).map(failure).collect()
    }

    /// Answers a failure: its processor goes on, and fails again where there still is no frame.
    pub fn answer(&mut self, failure: &UnshareFailure) -> Result<(), SharingError> {
        if self.ring.answer(&response(failure)) {
            self.port.notify()?;
        }
        Ok(())
    }
}

fn turn_on(xen: Xenctrl, domid: DomId, gfn: u64) -> Result<SharingRing, SharingError> {
    if !turn_off(&xen, domid)? {
        return open(xen, domid, gfn);
    }
    // Somebody may wait for an answer of the process before.
    let mut ring = open(xen, domid, gfn)?;
    let info = ring.xen.domain(domid)?.ok_or(SharingError::NoSuchDomain(domid))?;
    for vcpu in 0..=info.max_vcpu_id.unwrap_or(0) {
        let wake = UnshareFailure {
            gfn: 0,
            vcpu,
            paused: true,
        };
        ring.ring.answer_unasked(&response(&wake));
        // Xen takes the answer before this returns. One that nobody waited for is nothing to it.
        ring.port.notify()?;
    }
    // Xen counts places too many now.
    drop(ring);
    let xen = Xenctrl::open()?;
    turn_off(&xen, domid)?;
    open(xen, domid, gfn)
}

fn open(xen: Xenctrl, domid: DomId, gfn: u64) -> Result<SharingRing, SharingError> {
    let mut port = EventPort::open()?;
    let memory = ForeignMemory::open()?;
    let page = match memory.map_one(domid, gfn)? {
        Some(page) => page,
        // An earlier ring took it out.
        None => {
            populate(&xen, domid, gfn)?;
            memory.map_one(domid, gfn)?.ok_or(SharingError::NoRing)?
        }
    };
    let page = RingPage { memory, page };
    let enable = symbol!(xen.handle.library, xc_memshr_ring_enable);
    let mut remote = 0;
    // SAFETY: the handle is open and `remote` is where the answer goes.
    let status = unsafe { enable(xen.handle.as_ptr(), domid.get(), &mut remote) };
    check("xc_memshr_ring_enable", domid, status)?;
    // SAFETY: a mapped page of 4096 bytes, writable, which `page` keeps mapped as long as the ring is used.
    let ring = unsafe { BackRing::init(page.page) };
    port.bind(domid, remote)?;
    // The guest shall not write there.
    remove(&xen, domid, gfn)?;
    Ok(SharingRing {
        xen,
        domid,
        ring,
        _page: page,
        port,
    })
}

/// False: there was none.
fn turn_off(xen: &Xenctrl, domid: DomId) -> Result<bool, SharingError> {
    let disable = symbol!(xen.handle.library, xc_memshr_ring_disable);
    // SAFETY: the handle is open; the other argument is a number.
    let status = unsafe { disable(xen.handle.as_ptr(), domid.get()) };
    if status == 0 {
        return Ok(true);
    }
    let source = errno();
    match source.raw_os_error() {
        Some(libc::EINVAL) => Ok(false),
        _ => Err(failed("xc_memshr_ring_disable", domid, source)),
    }
}

fn populate(xen: &Xenctrl, domid: DomId, gfn: u64) -> Result<(), SharingError> {
    let populate = symbol!(xen.handle.library, xc_domain_populate_physmap_exact);
    let mut gfn = gfn;
    // SAFETY: the handle is open; one extent is read and written, of one page, without flags.
    let status = unsafe { populate(xen.handle.as_ptr(), domid.get(), 1, 0, 0, &mut gfn) };
    check("xc_domain_populate_physmap_exact", domid, status)
}

fn remove(xen: &Xenctrl, domid: DomId, gfn: u64) -> Result<(), SharingError> {
    let decrease = symbol!(xen.handle.library, xc_domain_decrease_reservation_exact);
    let mut gfn = gfn;
    // SAFETY: the handle is open; one extent of one page is read.
    let status = unsafe { decrease(xen.handle.as_ptr(), domid.get(), 1, 0, &mut gfn) };
    check("xc_domain_decrease_reservation_exact", domid, status)
}

fn failure(raw: ctrl::vm_event_st) -> UnshareFailure {
    // SAFETY: plain numbers, whichever member of the union was written.
    let sharing = unsafe { raw.u.mem_sharing };
    UnshareFailure {
        gfn: sharing.gfn,
        vcpu: raw.vcpu_id,
        paused: raw.flags & ctrl::VM_EVENT_FLAG_VCPU_PAUSED != 0,
    }
}

/// Xen drops an answer without the version that it speaks. It looks at nothing but the processor and the flag.
fn response(failure: &UnshareFailure) -> ctrl::vm_event_st {
    // SAFETY: plain numbers, all of which may be zero.
    let mut raw: ctrl::vm_event_st = unsafe { MaybeUninit::zeroed().assume_init() };
    raw.version = ctrl::VM_EVENT_INTERFACE_VERSION;
    raw.reason = ctrl::VM_EVENT_REASON_MEM_SHARING;
    raw.vcpu_id = failure.vcpu;
    if failure.paused {
        raw.flags = ctrl::VM_EVENT_FLAG_VCPU_PAUSED;
    }
    raw.u.mem_sharing.gfn = failure.gfn;
    raw
}

fn check(what: &'static str, domid: DomId, status: i32) -> Result<(), SharingError> {
    match status {
        0 => Ok(()),
        _ => Err(failed(what, domid, errno())),
    }
}

fn failed(what: &'static str, domid: DomId, source: io::Error) -> SharingError {
    match source.raw_os_error() {
        Some(libc::ENOSYS) => SharingError::NotBuilt,
        Some(libc::EOPNOTSUPP) => SharingError::NoRing,
        Some(libc::ENODEV) => SharingError::NoNestedPaging,
        Some(libc::EBUSY) => SharingError::HasPager,
        Some(libc::ENOMEM) => SharingError::NoMemory,
        Some(libc::ESRCH) => SharingError::NoSuchDomain(domid),
        _ => SharingError::Xen(XenError::call(what, Some(domid), source)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_answer_names_the_processor_that_stands_still() {
        // SAFETY: plain numbers, all of which may be zero.
        let mut raw: ctrl::vm_event_st = unsafe { MaybeUninit::zeroed().assume_init() };
        (raw.flags, raw.vcpu_id) = (ctrl::VM_EVENT_FLAG_VCPU_PAUSED, 3);
        raw.u.mem_sharing.gfn = 0x1234;
        let stands = failure(raw);
        let expected = UnshareFailure {
            gfn: 0x1234,
            vcpu: 3,
            paused: true,
        };
        assert_eq!(stands, expected);
        let answer = response(&stands);
        assert_eq!(
            (answer.version, answer.reason, answer.flags, answer.vcpu_id),
            (7, 2, 1, 3)
        );
        // Of a dom0 process that was told: its processor is not the guest's.
        raw.flags = ctrl::VM_EVENT_FLAG_FOREIGN;
        assert_eq!(response(&failure(raw)).flags, 0);
    }

    #[test]
    fn codes_become_what_they_mean() {
        let domid = DomId::new(7).unwrap();
        let error = |code| failed("xc_memshr_ring_enable", domid, io::Error::from_raw_os_error(code));
        assert!(matches!(error(libc::EBUSY), SharingError::HasPager));
        assert!(matches!(error(libc::EOPNOTSUPP), SharingError::NoRing));
        assert!(matches!(error(libc::ENOMEM), SharingError::NoMemory));
        assert!(error(libc::EBUSY).to_string().contains("paged"));
    }

    #[test]
    fn handles_can_be_sent() {
        fn send<T: Send>() {}
        send::<SharingRing>();
    }
}
