//! What sharing needs of a host, beside what the index reads through.
use xen_sys::{DomId, HostMemory, ShareHandle, SharingError, UnshareFailure, XenError};
use xenfold::page::Pfn;

/// A page of a guest of this host, wherever its frame is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct GuestPage {
    pub domid: DomId,
    pfn: u32,
}

impl GuestPage {
    /// `None`: a page above 16 TiB.
    pub fn new(domid: DomId, pfn: Pfn) -> Option<GuestPage> {
        let pfn = u32::try_from(pfn.get()).ok()?;
        Some(GuestPage { domid, pfn })
    }

    pub fn number(self) -> u32 {
        self.pfn
    }

    pub fn pfn(self) -> Pfn {
        // 32 bits are always a page number.
        Pfn::new(u64::from(self.pfn)).unwrap_or_default()
    }
}

/// A page whose frame is nominated, and by which handle.
pub type Nominated = (GuestPage, ShareHandle);

/// A host that shares frames: Xen, or one that a test makes up. What holds of Xen is in `xen-sys`, `sharing.rs`.
pub trait MemShr {
    /// Whether it can at all. Errors: a sentence that says what is missing.
    fn probe(&mut self) -> Result<(), String>;

    /// Lets frames of this guest be shared. Errors: why not.
    fn enable(&mut self, domid: DomId) -> Result<(), SharingError>;

    /// From now on a processor of the guest's that has no frame for a write stands still until it is answered, instead of the
    /// guest being crashed. `hold`: the guest is paused meanwhile.
    /// Errors: why not; [`SharingError::HasPager`] may pass.
    fn listen(&mut self, domid: DomId, hold: bool) -> Result<(), SharingError>;

    /// The writes for which there was no frame, since this was last asked.
    fn failures(&mut self, domid: DomId) -> Vec<UnshareFailure>;

    /// Its processor goes on.
    fn answer(&mut self, domid: DomId, failure: &UnshareFailure) -> Result<(), SharingError>;

    /// The guest is gone.
    fn forget(&mut self, domid: DomId);

    /// Nobody writes to the frame from now on without its handle becoming invalid.
    fn nominate(&mut self, page: GuestPage) -> Result<ShareHandle, SharingError>;

    /// Puts the first page's frame in the place of the second's. Compares nothing. `alone`: it is known that nobody else has
    /// the second one's frame, and not looked at.
    fn share(&mut self, source: Nominated, client: Nominated, alone: bool) -> Result<(), SharingError>;

    /// Of how many pages this page's frame is the frame; `None`: it is its guest's own.
    fn references(&mut self, page: GuestPage) -> Result<Option<u32>, SharingError>;

    /// Makes pages their guest's own. For each: false when there was no memory for it. Pages that are not shared stay as
    /// they are. Errors: nothing could be tried.
    fn unshare(&mut self, domid: DomId, pfns: &[Pfn]) -> Result<Vec<bool>, XenError>;

    fn memory(&mut self) -> Result<HostMemory, XenError>;

    /// Guests whose memory xl is sending or saving at this moment.
    fn departing(&mut self) -> Vec<DomId>;
}
