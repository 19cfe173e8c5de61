//! This host as Xen and xenstore know it.
use std::time::Duration;

use xen_sys::{Access, DOM0, DomId, DomainInfo, ForeignMemory, XenError, Xenctrl, Xenstore};
use xenfold::page::Pfn;

use super::host::{Host, Page, Seen};

/// Frames that are mapped at a time. A mapped frame can neither be paged out nor shared, and stays its guest's.
const MAP_FRAMES: usize = 1024;

pub struct XenHost {
    xen: Xenctrl,
    memory: ForeignMemory,
    store: Xenstore,
}

impl XenHost {
    /// Errors: Xen's libraries are missing or of another version, or this is no dom0.
    pub fn open() -> Result<XenHost, XenError> {
        Ok(XenHost {
            xen: Xenctrl::open()?,
            memory: ForeignMemory::open()?,
            store: Xenstore::open()?,
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
