//! Pages of HVM and PVH guests that are not in memory: Xen's mem_paging (`xen/arch/x86/mm/mem_paging.c`).
//!
//! A page is *nominated*, then *evicted*: its frame is free again. Who touches it makes a request, which comes through a
//! ring; a virtual processor of the guest's stands still meanwhile, other domains try again. The page is *loaded*, and the
//! request answered. A page may be loaded without a request.
//!
//! Evicted frames go to whoever wants memory: [`Paging::claim`] keeps the guest's own back for it, or a load could fail.
//!
//! One pager for each guest. Should it end, the guest's processors stand still at evicted pages, and **turning paging off
//! then crashes the guest at its next touch**: so dropping a [`Paging`] leaves paging on. [`Paging::disable`] is for the
//! end, [`Paging::take_over`] for an heir.
use std::io;
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd};
use std::ptr::NonNull;

use crate::events::EventPort;
use crate::ffi::{ctrl, errno, symbol};
use crate::paging_ring::{BackRing, ENTRIES};
use crate::{DOM0, DomId, ForeignMemory, PAGE_BYTES, XenError, Xenctrl, hvm_param};

/// Why a guest's pages cannot be paged, or an operation was refused.
#[derive(Debug, thiserror::Error)]
pub enum PagingError {
    /// ENOSYS or EOPNOTSUPP of the memory operation: the call is not in this hypervisor.
    #[error(
        "this hypervisor cannot leave pages behind: it has to be built with UNSUPPORTED and MEM_PAGING (Debian's is not); \
         migrate with --mode precopy"
    )]
    NotBuilt,
    /// EOPNOTSUPP of `vm_event_domctl`: dom0 is PVH, or the guest has no page for the ring.
    #[error("Xen pages only guests with a ring page, and under a PV dom0; migrate with --mode precopy")]
    Unsupported,
    /// ENODEV of `vm_event_domctl`.
    #[error(
        "the guest has no nested paging (HAP), without which none of its pages can be left behind; set hap=1 in its \
         configuration, or migrate with --mode precopy"
    )]
    NoNestedPaging,
    /// EMLINK of `vm_event_domctl`.
    #[error("the guest has an IOMMU for passed-through devices; migrate with --mode precopy")]
    PassedThrough,
    /// EXDEV of `vm_event_domctl`.
    #[error(
        "the guest's memory is populated on demand; set memory and maxmem to the same, or migrate with --mode precopy"
    )]
    OnDemand,
    /// EBUSY of `vm_event_enable`.
    #[error("another program pages the guest already, or did until it ended")]
    HasPager,
    #[error("there is no domain {0}")]
    NoSuchDomain(DomId),
    /// ENOMEM.
    #[error("the host has not enough free memory")]
    NoMemory,
    /// A request that nobody answers any more.
    #[error("more answers than requests")]
    NothingAsked,
    #[error(transparent)]
    Xen(#[from] XenError),
}

/// Somebody waits for a page, or gives it up.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct PagingRequest {
    pub gfn: u64,
    /// The virtual processor that touched it: the guest's, or that of another domain (`foreign`).
    pub vcpu: u32,
    /// The guest's processor stands still until this is answered.
    pub paused: bool,
    /// Another domain: it does not wait for the answer, it tries again.
    pub foreign: bool,
    /// The guest has given the page up: there is nothing to load any more.
    pub dropped: bool,
    flags: u32,
    paging_flags: u32,
    p2m_type: u32,
}

/// What became of a page that was to be loaded.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Loaded {
    /// It holds what was given.
    Filled,
    /// It was not paged out: nothing was written. It is there, or the guest has given it up.
    NotPaged,
}

/// A guest's pager. `Send`, not `Sync`, as [`Xenctrl`] is not.
pub struct Paging {
    xen: Xenctrl,
    domid: DomId,
    ring_gfn: u64,
    /// The ring and its page, which is unmapped behind it; `None` once paging is off.
    ring: Option<(BackRing, RingPage)>,
    port: EventPort,
}

impl Paging {
    /// Requests that Xen can have waiting. A processor of a guest with more of them waits inside Xen for a place, and while one does
    /// Xen does not turn paging off (EBUSY of vm_event_disable in xen/common/vm_event.c): nobody could take over from a pager that has
    /// ended ([`Paging::take_over`]).
    pub const MOST_REQUESTS: u32 = ENTRIES;

    /// Whether the hypervisor was built with paging. Changes nothing. Whether a guest's pages can be paged depends on the
    /// guest besides: [`Paging::enable`].
    ///
    /// # Errors
    /// [`PagingError::NotBuilt`].
    pub fn probe() -> Result<(), PagingError> {
        let xen = Xenctrl::open()?;
        // Nobody may page the domain that asks: EPERM is the answer of a hypervisor that knows the question.
        match memory_operation(&xen, DOM0, 0, "xc_mem_paging_nominate") {
            Err(PagingError::Xen(error)) if error.raw_os_error() == Some(libc::EPERM) => Ok(()),
            Err(PagingError::Unsupported) => Err(PagingError::NotBuilt),
            Err(error @ PagingError::NotBuilt) => Err(error),
            Err(PagingError::Xen(error)) => Err(error.into()),
            _ => Ok(()),
        }
    }

    /// Turns paging on for a guest, with the ring in the page that its builder set aside (HVM_PARAM_PAGING_RING_PFN), which
    /// leaves the guest's memory until [`Paging::disable`].
    ///
    /// # Errors
    /// What is missing, each with what to do.
    pub fn enable(domid: DomId) -> Result<Paging, PagingError> {
        Paging::start(domid, false)
    }

    /// `replaces`: there may be a ring whose pager has ended.
    fn start(domid: DomId, replaces: bool) -> Result<Paging, PagingError> {
        let xen = Xenctrl::open()?;
        xen.check_version()?;
        let gfn = xen.hvm_param(domid, hvm_param::PAGING_RING_PFN)?;
        if gfn == 0 {
            return Err(PagingError::Unsupported);
        }
        let mut port = EventPort::open()?;
        let memory = ForeignMemory::open()?;
        let page = match ring_page(&xen, &memory, domid, gfn) {
            // The page of the old ring counts for the guest's as long as there is one, and may be one too many.
            Err(error) if replaces => {
                log::debug!("no page for the new ring beside the old one: {error}");
                off_if_on(&xen, domid)?;
                ring_page(&xen, &memory, domid, gfn)?
            }
            page => page?,
        };
        let page = RingPage { memory, page };
        if replaces {
            // No longer without a ring than these two calls take: another domain that touches an evicted page meanwhile would
            // have the guest crashed.
            off_if_on(&xen, domid)?;
        }
        let remote = control_on(&xen, domid)?;
        // SAFETY: a mapped page of 4096 bytes, writable, which `page` keeps mapped as long as the ring is used.
        let ring = unsafe { BackRing::init(page.page) };
        let bound = port.bind(domid, remote);
        let removed = bound.map_err(PagingError::from).and_then(|()| remove(&xen, domid, gfn));
        if let Err(error) = removed {
            // Nothing is evicted yet.
            let _ = control_off(&xen, domid);
            return Err(error);
        }
        Ok(Paging {
            xen,
            domid,
            ring_gfn: gfn,
            ring: Some((ring, page)),
            port,
        })
    }

    /// Takes over from a pager that has ended. The guest has to be paused from before this until every evicted page has been
    /// loaded: while paging is off a touch would crash it. Its processors that wait for an answer of the former pager's go on
    /// (with the guest), and ask again for what is not there.
    ///
    /// # Errors
    /// As [`Paging::enable`].
    pub fn take_over(domid: DomId) -> Result<Paging, PagingError> {
        let xen = Xenctrl::open()?;
        let mut paging = Paging::start(domid, true)?;
        let info = xen.domain(domid)?.ok_or(PagingError::NoSuchDomain(domid))?;
        for vcpu in 0..=info.max_vcpu_id.unwrap_or(0) {
            // With this flag Xen leaves the page alone that the answer names.
            let wake = PagingRequest {
                vcpu,
                paused: true,
                flags: ctrl::VM_EVENT_FLAG_VCPU_PAUSED,
                paging_flags: ctrl::MEM_PAGING_DROP_PAGE,
                ..PagingRequest::default()
            };
            if let Some((ring, _)) = &mut paging.ring {
                ring.answer_unasked(&response(&wake));
            }
            // Xen takes the answer before this returns.
            paging.port.notify()?;
        }
        drop(paging);
        Paging::start(domid, true)
    }

    pub fn domid(&self) -> DomId {
        self.domid
    }

    /// The page that the ring is in; it is not the guest's while this is.
    pub fn ring_gfn(&self) -> u64 {
        self.ring_gfn
    }

    /// Makes a page read-only, to be evicted. False: it cannot be now (somebody has it mapped or it is Xen's), or there is
    /// none.
    pub fn nominate(&self, gfn: u64) -> Result<bool, PagingError> {
        refused_when_busy(memory_operation(&self.xen, self.domid, gfn, "xc_mem_paging_nominate"))
    }

    /// Frees the frame of a page that was nominated. False: somebody has touched or mapped it since; then it is there.
    pub fn evict(&self, gfn: u64) -> Result<bool, PagingError> {
        refused_when_busy(memory_operation(&self.xen, self.domid, gfn, "xc_mem_paging_evict"))
    }

    /// Fills an evicted page. Whoever waits for it is answered apart.
    ///
    /// # Errors
    /// [`PagingError::NoMemory`]: the host has no frame for it; see [`Paging::claim`].
    pub fn load(&self, gfn: u64, page: &[u8; PAGE_BYTES]) -> Result<Loaded, PagingError> {
        let load = symbol!(self.xen.handle.library, xc_mem_paging_load);
        // SAFETY: the handle is open; the call reads 4096 bytes from the buffer and writes none (it is declared without const).
        let status = unsafe {
            load(
                self.xen.handle.as_ptr(),
                self.domid.get(),
                gfn,
                page.as_ptr().cast_mut().cast(),
            )
        };
        if status == 0 {
            return Ok(Loaded::Filled);
        }
        let source = errno();
        match source.raw_os_error() {
            Some(libc::ENOENT) => Ok(Loaded::NotPaged),
            _ => Err(failed("xc_mem_paging_load", self.domid, source)),
        }
    }

    /// Keeps free memory back for this guest until it has `pages` pages again; what it evicts later is added. 0: no more.
    ///
    /// # Errors
    /// [`PagingError::NoMemory`]. EINVAL when there is a claim, or the guest has so many pages already.
    pub fn claim(&self, pages: u64) -> Result<(), PagingError> {
        let claim = symbol!(self.xen.handle.library, xc_domain_claim_pages);
        // SAFETY: the handle is open; the other arguments are numbers.
        let status = unsafe { claim(self.xen.handle.as_ptr(), self.domid.get(), pages) };
        check("xc_domain_claim_pages", self.domid, status)
    }

    /// Takes the notice of the descriptor, which has been seen to be readable ([`AsFd`]). Before [`Paging::requests`].
    pub fn take_notice(&self) -> Result<(), PagingError> {
        Ok(self.port.take()?)
    }

    /// All requests that have come. Each has to be answered: until then Xen has one place less for others.
    pub fn requests(&mut self) -> Vec<PagingRequest> {
        let Some((ring, _)) = &mut self.ring else {
            return Vec::new();
        };
        std::iter::from_fn(|| ring.take()).map(request).collect()
    }

    /// Requests that have not been answered yet.
    pub fn unanswered(&self) -> u32 {
        self.ring.as_ref().map_or(0, |(ring, _)| ring.unanswered())
    }

    /// Answers a request. A guest's processor goes on, and asks again if its page is still not there.
    pub fn answer(&mut self, request: &PagingRequest) -> Result<(), PagingError> {
        let asked = self
            .ring
            .as_mut()
            .is_some_and(|(ring, _)| ring.answer(&response(request)));
        if !asked {
            return Err(PagingError::NothingAsked);
        }
        Ok(self.port.notify()?)
    }

    /// Turns paging off and gives the ring's page back to the guest, empty. Only when no page is evicted. Nothing else is of
    /// use afterwards; after an error it can be tried again.
    pub fn disable(&mut self) -> Result<(), PagingError> {
        if self.ring.is_some() {
            control_off(&self.xen, self.domid)?;
            // The old page counts for the guest's while it is mapped.
            self.ring = None;
        }
        populate(&self.xen, self.domid, self.ring_gfn)
    }
}

impl AsFd for Paging {
    /// Readable when Xen has something to say.
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.port.as_fd()
    }
}

/// The ring's page in our address space.
pub(crate) struct RingPage {
    pub memory: ForeignMemory,
    pub page: NonNull<u8>,
}

// SAFETY: the mapping belongs to the process, not to a thread; it is used through BackRing only.
unsafe impl Send for RingPage {}

impl Drop for RingPage {
    fn drop(&mut self) {
        self.memory.unmap_one(self.page);
    }
}

fn request(raw: ctrl::vm_event_st) -> PagingRequest {
    // SAFETY: plain numbers, whichever member of the union was written.
    let paging = unsafe { raw.u.mem_paging };
    PagingRequest {
        gfn: paging.gfn,
        vcpu: raw.vcpu_id,
        paused: raw.flags & ctrl::VM_EVENT_FLAG_VCPU_PAUSED != 0,
        foreign: raw.flags & ctrl::VM_EVENT_FLAG_FOREIGN != 0,
        dropped: paging.flags & ctrl::MEM_PAGING_DROP_PAGE != 0,
        flags: raw.flags,
        paging_flags: paging.flags,
        p2m_type: paging.p2mt,
    }
}

/// Xen drops an answer without the version that it speaks.
fn response(request: &PagingRequest) -> ctrl::vm_event_st {
    // SAFETY: plain numbers, all of which may be zero.
    let mut raw: ctrl::vm_event_st = unsafe { MaybeUninit::zeroed().assume_init() };
    raw.version = ctrl::VM_EVENT_INTERFACE_VERSION;
    raw.reason = ctrl::VM_EVENT_REASON_MEM_PAGING;
    raw.flags = request.flags;
    raw.vcpu_id = request.vcpu;
    raw.u.mem_paging = ctrl::vm_event_paging {
        gfn: request.gfn,
        p2mt: request.p2m_type,
        flags: request.paging_flags,
    };
    raw
}

fn memory_operation(xen: &Xenctrl, domid: DomId, gfn: u64, what: &'static str) -> Result<(), PagingError> {
    let operation = match what {
        "xc_mem_paging_evict" => symbol!(xen.handle.library, xc_mem_paging_evict),
        _ => symbol!(xen.handle.library, xc_mem_paging_nominate),
    };
    // SAFETY: the handle is open; the other arguments are numbers.
    let status = unsafe { operation(xen.handle.as_ptr(), domid.get(), gfn) };
    check(what, domid, status)
}

fn refused_when_busy(result: Result<(), PagingError>) -> Result<bool, PagingError> {
    match result {
        Ok(()) => Ok(true),
        Err(PagingError::HasPager) => Ok(false),
        Err(error) => Err(error),
    }
}

fn control_on(xen: &Xenctrl, domid: DomId) -> Result<u32, PagingError> {
    let enable = symbol!(xen.handle.library, xc_mem_paging_enable);
    let mut port = 0;
    // SAFETY: the handle is open and `port` is where the answer goes.
    let status = unsafe { enable(xen.handle.as_ptr(), domid.get(), &mut port) };
    check("xc_mem_paging_enable", domid, status)?;
    Ok(port)
}

fn control_off(xen: &Xenctrl, domid: DomId) -> Result<(), PagingError> {
    xen.check_version()?;
    let disable = symbol!(xen.handle.library, xc_mem_paging_disable);
    // SAFETY: the handle is open; the other argument is a number.
    let status = unsafe { disable(xen.handle.as_ptr(), domid.get()) };
    check("xc_mem_paging_disable", domid, status)
}

fn off_if_on(xen: &Xenctrl, domid: DomId) -> Result<(), PagingError> {
    match control_off(xen, domid) {
        // It was off.
        Err(PagingError::Xen(error)) if error.raw_os_error() == Some(libc::EINVAL) => Ok(()),
        result => result,
    }
}

/// The page for a ring, mapped.
fn ring_page(xen: &Xenctrl, memory: &ForeignMemory, domid: DomId, gfn: u64) -> Result<NonNull<u8>, PagingError> {
    if let Some(page) = memory.map_one(domid, gfn)? {
        return Ok(page);
    }
    // An earlier pager took it out.
    populate(xen, domid, gfn)?;
    let missing = || XenError::Argument {
        what: "the ring's page",
        reason: "it cannot be mapped",
    };
    Ok(memory.map_one(domid, gfn)?.ok_or_else(missing)?)
}

fn populate(xen: &Xenctrl, domid: DomId, gfn: u64) -> Result<(), PagingError> {
    let populate = symbol!(xen.handle.library, xc_domain_populate_physmap_exact);
    let mut gfn = gfn;
    // SAFETY: the handle is open; one extent is read and written, of one page, without flags.
    let status = unsafe { populate(xen.handle.as_ptr(), domid.get(), 1, 0, 0, &mut gfn) };
    check("xc_domain_populate_physmap_exact", domid, status)
}

fn remove(xen: &Xenctrl, domid: DomId, gfn: u64) -> Result<(), PagingError> {
    let decrease = symbol!(xen.handle.library, xc_domain_decrease_reservation_exact);
    let mut gfn = gfn;
    // SAFETY: the handle is open; one extent of one page is read.
    let status = unsafe { decrease(xen.handle.as_ptr(), domid.get(), 1, 0, &mut gfn) };
    check("xc_domain_decrease_reservation_exact", domid, status)
}

fn check(what: &'static str, domid: DomId, status: i32) -> Result<(), PagingError> {
    match status {
        0 => Ok(()),
        _ => Err(failed(what, domid, errno())),
    }
}

fn failed(what: &'static str, domid: DomId, source: io::Error) -> PagingError {
    match source.raw_os_error() {
        Some(libc::ENOSYS) => PagingError::NotBuilt,
        Some(libc::EOPNOTSUPP) => PagingError::Unsupported,
        Some(libc::ENODEV) => PagingError::NoNestedPaging,
        Some(libc::EMLINK) => PagingError::PassedThrough,
        Some(libc::EXDEV) => PagingError::OnDemand,
        Some(libc::EBUSY) => PagingError::HasPager,
        Some(libc::ENOMEM) => PagingError::NoMemory,
        Some(libc::ESRCH) => PagingError::NoSuchDomain(domid),
        _ => PagingError::Xen(XenError::call(what, Some(domid), source)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn codes_become_what_they_mean() {
        let domid = DomId::new(7).unwrap();
        let error = |code| failed("xc_mem_paging_enable", domid, io::Error::from_raw_os_error(code));
        assert!(matches!(error(libc::ENOSYS), PagingError::NotBuilt));
        assert!(error(libc::ENOSYS).to_string().contains("MEM_PAGING"));
        for (code, says) in [
            (libc::EOPNOTSUPP, "PV dom0"),
            (libc::ENODEV, "hap=1"),
            (libc::EMLINK, "passed-through"),
            (libc::EXDEV, "maxmem"),
            (libc::EBUSY, "another program"),
            (libc::ENOMEM, "free memory"),
            (libc::ESRCH, "d7"),
        ] {
            assert!(error(code).to_string().contains(says), "{}", error(code));
        }
        assert!(matches!(error(libc::EPERM), PagingError::Xen(XenError::Call { .. })));
        assert!(matches!(refused_when_busy(Err(error(libc::EBUSY))), Ok(false)));
    }

    #[test]
    fn an_answer_is_its_request_with_the_version() {
        // SAFETY: plain numbers, all of which may be zero.
        let mut raw: ctrl::vm_event_st = unsafe { MaybeUninit::zeroed().assume_init() };
        raw.flags = 3;
        raw.vcpu_id = 5;
        raw.u.mem_paging = ctrl::vm_event_paging {
            gfn: 0x1234,
            p2mt: 10,
            flags: 3,
        };
        let request = request(raw);
        assert!(request.paused && request.foreign && request.dropped);
        let answer = response(&request);
        // SAFETY: the member that was written.
        let paging = unsafe { answer.u.mem_paging };
        assert_eq!(
            (answer.version, answer.reason, answer.flags, answer.vcpu_id),
            (7, 3, 3, 5)
        );
        assert_eq!((paging.gfn, paging.p2mt, paging.flags), (0x1234, 10, 3));
    }

    #[test]
    fn handles_can_be_sent() {
        fn send<T: Send>() {}
        send::<Paging>();
    }
}
