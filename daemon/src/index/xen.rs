//! This host as Xen and xenstore know it.
use std::collections::BTreeMap;
use std::time::Duration;

use xen_sys::{
    Access, DOM0, DomId, DomainInfo, ForeignMemory, HostMemory, MemSharing, ShareHandle, SharingError, SharingRing,
    UnshareFailure, XenError, Xenctrl, Xenstore,
};
use xenfold::engine::chain;
use xenfold::page::Pfn;

use super::helpers::Helpers;
use super::host::{Host, Page, Seen};
use crate::sharing::{GuestPage, MemShr, Nominated};

/// Frames that are mapped at a time. A mapped frame can neither be paged out nor shared, and stays its guest's.
const MAP_FRAMES: usize = 1024;

pub struct XenHost {
    xen: Xenctrl,
    sharing: MemSharing,
    memory: ForeignMemory,
    store: Xenstore,
    rings: BTreeMap<DomId, SharingRing>,
    helpers: Helpers,
}

impl XenHost {
    /// Errors: Xen's libraries are missing or of another version, or this is no dom0.
    pub fn open() -> Result<XenHost, XenError> {
        Ok(XenHost {
            xen: Xenctrl::open()?,
            sharing: MemSharing::open()?,
            memory: ForeignMemory::open()?,
            store: Xenstore::open()?,
            rings: BTreeMap::new(),
            helpers: Helpers::new("/proc"),
        })
    }

    /// `None`: it is gone.
    fn seen(&self, info: DomainInfo) -> Result<Option<Seen>, XenError> {
        let name = self
            .store
            .read_string(&format!("/local/domain/{}/name", info.domid.get()))?;
        let on_demand = match self.xen.populate_on_demand_entries(info.domid) {
            Err(XenError::NoSuchDomain(_)) => return Ok(None),
            // For PV guests there is no such thing.
            entries => entries.ok(),
        };
        Ok(Some(Seen { info, name, on_demand }))
    }
}

impl Host for XenHost {
    fn guests(&mut self) -> Result<Vec<Seen>, XenError> {
        let mut found = Vec::new();
        for info in self.xen.domains()? {
            if info.domid != DOM0 {
                found.extend(self.seen(info)?);
            }
        }
        Ok(found)
    }

    fn guest(&mut self, domid: DomId) -> Result<Option<Seen>, XenError> {
        match self.xen.domain(domid)? {
            Some(info) => self.seen(info),
            None => Ok(None),
        }
    }

    fn end_of_frames(&mut self, domid: DomId) -> Result<u64, XenError> {
        Ok(self.xen.maximum_gpfn(domid)?.saturating_add(1))
    }

    fn read(&mut self, domid: DomId, pfns: &[Pfn], pages: &mut [Page]) -> Result<Vec<bool>, XenError> {
        let mut read = Vec::with_capacity(pfns.len());
        for (pfns, pages) in pfns.chunks(MAP_FRAMES).zip(pages.chunks_mut(MAP_FRAMES)) {
            let gfns: Vec<u64> = pfns.iter().map(|pfn| pfn.get()).collect();
            let mapping = self.memory.map(domid, &gfns, Access::Read)?;
            let copied = pages.iter_mut().take(pfns.len()).enumerate();
            read.extend(copied.map(|(index, page)| mapping.read(index, page).is_ok()));
        }
        Ok(read)
    }

    fn idle_times(&mut self) -> Result<Vec<Duration>, XenError> {
        self.xen.idle_times()
    }
}

impl MemShr for XenHost {
    fn probe(&mut self) -> Result<(), String> {
        self.sharing.probe().map_err(|error| chain(&error))?;
        match self.xen.domain(DOM0) {
            // Frames that are shared cannot be mapped into it (xen/arch/x86/mm/p2m.c, p2m_add_foreign).
            Ok(Some(dom0)) if dom0.hvm => {
                Err("dom0 is a PVH guest, which cannot map shared memory: it has to be PV".into())
            }
            Ok(_) => Ok(()),
            Err(error) => Err(chain(&error)),
        }
    }

    fn enable(&mut self, domid: DomId) -> Result<(), SharingError> {
        self.sharing.enable(domid, true)
    }

    fn listen(&mut self, domid: DomId, hold: bool) -> Result<(), SharingError> {
        // The page of one that this process had for a guest of that number is unmapped first.
        self.rings.remove(&domid);
        let ring = SharingRing::take_over(domid, hold)?;
        self.rings.insert(domid, ring);
        Ok(())
    }

    fn failures(&mut self, domid: DomId) -> Vec<UnshareFailure> {
        let ring = self.rings.get_mut(&domid);
        ring.map_or_else(Vec::new, SharingRing::failures)
    }

    fn answer(&mut self, domid: DomId, failure: &UnshareFailure) -> Result<(), SharingError> {
        let ring = self.rings.get_mut(&domid);
        ring.map_or(Ok(()), |ring| ring.answer(failure))
    }

    fn forget(&mut self, domid: DomId) {
        self.rings.remove(&domid);
    }

    fn nominate(&mut self, page: GuestPage) -> Result<ShareHandle, SharingError> {
        self.sharing.nominate(page.domid, page.pfn().get())
    }

    fn share(&mut self, source: Nominated, client: Nominated, alone: bool) -> Result<(), SharingError> {
        let xens = |(page, handle): Nominated| (page.domid, page.pfn().get(), handle);
        match alone {
            true => self.sharing.share_alone(xens(source), xens(client)),
            false => self.sharing.share(xens(source), xens(client)),
        }
    }

    fn references(&mut self, page: GuestPage) -> Result<Option<u32>, SharingError> {
        self.sharing.references(page.domid, page.pfn().get())
    }

    /// Mapping a shared frame writable makes Xen copy it, or hand it over when it is the last (xen/arch/x86/mm.c,
    /// mod_l1_entry with P2M_UNSHARE).
    fn unshare(&mut self, domid: DomId, pfns: &[Pfn]) -> Result<Vec<bool>, XenError> {
        let mut done = Vec::with_capacity(pfns.len());
        for pfns in pfns.chunks(MAP_FRAMES) {
            let gfns: Vec<u64> = pfns.iter().map(|pfn| pfn.get()).collect();
            let mapping = self.memory.map(domid, &gfns, Access::ReadWrite)?;
            let no_memory = |index| {
                let error = mapping.error(index);
                error.is_some_and(|error| error.kind() == std::io::ErrorKind::OutOfMemory)
            };
            done.extend((0..gfns.len()).map(|index| !no_memory(index)));
        }
        Ok(done)
    }

    fn memory(&mut self) -> Result<HostMemory, XenError> {
        self.sharing.memory()
    }

    fn departing(&mut self) -> Vec<DomId> {
        self.helpers.look()
    }
}
