//! A host that is made up, for tests.
use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use parking_lot::Mutex;
use xen_sys::{DomId, DomainInfo, DomainState, HostMemory, ShareHandle, SharingError, UnshareFailure, XenError};
use xenfold::page::{PAGE_SIZE, Pfn};

use super::host::{Host, Page, Seen};
use crate::sharing::{GuestPage, MemShr, Nominated};

/// A guest of a host that is made up.
pub struct SimGuest {
    pub seen: Seen,
    pub frames: BTreeMap<u64, Page>,
    pub end: u64,
    /// Each frame that is not among those has a content that no other guest has.
    pub generated: bool,
}

type Meanwhile = Box<dyn FnOnce(&mut Vec<SimGuest>) + Send>;

#[derive(Default)]
pub struct World {
    pub guests: Vec<SimGuest>,
    pub idle: Vec<Duration>,
    pub copied: usize,
    pub most_at_once: usize,
    pub failing: bool,
    /// Happens when frames are next read, after the first look at the guest.
    pub meanwhile: Option<Meanwhile>,
}

#[derive(Clone, Default)]
pub struct Sim(pub Arc<Mutex<World>>);

impl Host for Sim {
    fn guests(&mut self) -> Result<Vec<Seen>, XenError> {
        let world = self.0.lock();
        match world.failing {
            true => Err(XenError::NoSuchDomain(domid(1))),
            false => Ok(world.guests.iter().map(|guest| guest.seen.clone()).collect()),
        }
    }

    fn guest(&mut self, domid: DomId) -> Result<Option<Seen>, XenError> {
        let world = self.0.lock();
        let found = world.guests.iter().find(|guest| guest.seen.info.domid == domid);
        Ok(found.map(|guest| guest.seen.clone()))
    }

    fn end_of_frames(&mut self, domid: DomId) -> Result<u64, XenError> {
        let world = self.0.lock();
        let found = world.guests.iter().find(|guest| guest.seen.info.domid == domid);
        found.map(|guest| guest.end).ok_or(XenError::NoSuchDomain(domid))
    }

    fn read(&mut self, domid: DomId, pfns: &[Pfn], pages: &mut [Page]) -> Result<Vec<bool>, XenError> {
        assert_eq!(pfns.len(), pages.len());
        let mut world = self.0.lock();
        if let Some(meanwhile) = world.meanwhile.take() {
            meanwhile(&mut world.guests);
        }
        world.most_at_once = world.most_at_once.max(pfns.len());
        let guest = world.guests.iter().find(|guest| guest.seen.info.domid == domid);
        let guest = guest.ok_or(XenError::NoSuchDomain(domid))?;
        let read = pfns
            .iter()
            .zip(pages)
            .map(|(pfn, page)| match guest.frames.get(&pfn.get()) {
                Some(bytes) => {
                    *page = *bytes;
                    true
                }
                None if guest.generated => {
                    *page = generated(domid, *pfn);
                    true
                }
                None => false,
            });
        let read: Vec<bool> = read.collect();
        world.copied += read.iter().filter(|read| **read).count();
        Ok(read)
    }

    fn idle_times(&mut self) -> Result<Vec<Duration>, XenError> {
        Ok(self.0.lock().idle.clone())
    }
}

/// A hypervisor without sharing.
impl MemShr for Sim {
    fn probe(&mut self) -> Result<(), String> {
        Err(SharingError::NotBuilt.to_string())
    }

    fn enable(&mut self, _: DomId) -> Result<(), SharingError> {
        Err(SharingError::NotBuilt)
    }

    fn listen(&mut self, _: DomId, _: bool) -> Result<(), SharingError> {
        Err(SharingError::NotBuilt)
    }

    fn failures(&mut self, _: DomId) -> Vec<UnshareFailure> {
        Vec::new()
    }

    fn answer(&mut self, _: DomId, _: &UnshareFailure) -> Result<(), SharingError> {
        Err(SharingError::NotBuilt)
    }

    fn forget(&mut self, _: DomId) {}

    fn nominate(&mut self, _: GuestPage) -> Result<ShareHandle, SharingError> {
        Err(SharingError::NotBuilt)
    }

    fn share(&mut self, _: Nominated, _: Nominated, _: bool) -> Result<(), SharingError> {
        Err(SharingError::NotBuilt)
    }

    fn references(&mut self, _: GuestPage) -> Result<Option<u32>, SharingError> {
        Err(SharingError::NotBuilt)
    }

    fn unshare(&mut self, _: DomId, pfns: &[Pfn]) -> Result<Vec<bool>, XenError> {
        Ok(vec![true; pfns.len()])
    }

    fn memory(&mut self) -> Result<HostMemory, XenError> {
        Ok(HostMemory::default())
    }

    fn departing(&mut self) -> Vec<DomId> {
        Vec::new()
    }
}

pub fn domid(number: u32) -> DomId {
    DomId::new(number).unwrap()
}

pub fn page(n: u64) -> Page {
    let mut page = [0x5a; PAGE_SIZE];
    page[..8].copy_from_slice(&n.to_le_bytes());
    page
}

/// What a frame of a guest holds whose contents are generated.
pub fn generated(domid: DomId, pfn: Pfn) -> Page {
    page(u64::from(domid.get()) << 40 | pfn.get())
}

pub fn uuid(n: u8) -> String {
    format!("00000000-0000-0000-0000-0000000000{n:02x}")
}

/// A running guest with these pages, the first at frame 0.
pub fn guest(number: u32, uuid: u8, name: &str, pages: impl IntoIterator<Item = Page>) -> SimGuest {
    let mut bytes = [0; 16];
    bytes[15] = uuid;
    let frames: BTreeMap<u64, Page> = (0..).zip(pages).collect();
    SimGuest {
        seen: Seen {
            info: DomainInfo {
                domid: domid(number),
                uuid: bytes,
                hvm: true,
                hap: true,
                state: DomainState::Running,
                paused: false,
                shutdown: None,
                dying: false,
                total_pages: frames.len() as u64,
                max_pages: frames.len() as u64,
                shared_pages: 0,
                paged_pages: 0,
                claimed_pages: 0,
                max_vcpu_id: Some(0),
                cpu_time_ns: 1,
            },
            name: Some(name.into()),
            on_demand: Some(0),
        },
        end: frames.len() as u64 + 5,
        frames,
        generated: false,
    }
}
