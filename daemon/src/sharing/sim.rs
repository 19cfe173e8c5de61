//! A made-up Xen that shares frames as Xen does: by handles, comparing nothing, copying on a write, crashing a guest for
//! which there is no frame. Guests write, give frames up and die between any two calls.
use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use parking_lot::Mutex;
use xen_sys::{DomId, HostMemory, ShareHandle, SharingError, UnshareFailure, XenError};
use xenfold::page::{PAGE_SIZE, Pfn};

use super::host::{GuestPage, MemShr, Nominated};
use crate::index::sim::{domid, guest as seen_guest, page as bytes_of};
use crate::index::{Host, Page, Seen};

/// A frame of memory.
struct Frame {
    /// Which content ([`bytes_of`]); 0: zeros.
    content: u64,
    /// Nominated or shared: its handle, and how many pages have it.
    shared: Option<(u64, u32)>,
}

pub struct World {
    frames: BTreeMap<u64, Frame>,
    next_frame: u64,
    next_handle: u64,
    /// Which frame each page has.
    p2m: BTreeMap<GuestPage, u64>,
    /// One above the last pfn that each guest has ever had a frame at (`max_mapped_pfn`, which never becomes less).
    ends: BTreeMap<DomId, u64>,
    pub guests: BTreeMap<DomId, Seen>,
    pub free: u64,
    saved: u64,
    /// What each page has to hold.
    pub expected: BTreeMap<GuestPage, u64>,
    /// Of 1000 moments between two calls, in how many something happens.
    pub restless: u64,
    pub random: u64,
    pub races: u64,
    /// Guests may die and give frames up.
    pub deadly: bool,
    pub crashed: Vec<DomId>,
    /// Guests with a ring, the failures in it, and what stands still until it is answered.
    pub listening: BTreeMap<DomId, Vec<UnshareFailure>>,
    pub standing: Vec<(GuestPage, u64)>,
    /// The pager of a guest that arrives.
    pub paged: Vec<DomId>,
    pub departing: Vec<DomId>,
    pub heap_full: bool,
    contents: u64,
    pub idle: Duration,
}

#[derive(Clone)]
pub struct SimXen(pub Arc<Mutex<World>>);

impl SimXen {
    pub fn new(seed: u64, free: u64) -> SimXen {
        SimXen(Arc::new(Mutex::new(World {
            frames: BTreeMap::new(),
            next_frame: 1,
            next_handle: 1,
            p2m: BTreeMap::new(),
            ends: BTreeMap::new(),
            guests: BTreeMap::new(),
            free,
            saved: 0,
            expected: BTreeMap::new(),
            restless: 0,
            random: seed | 1,
            races: 0,
            deadly: false,
            crashed: Vec::new(),
            listening: BTreeMap::new(),
            standing: Vec::new(),
            paged: Vec::new(),
            departing: Vec::new(),
            heap_full: false,
            contents: 8,
            idle: Duration::ZERO,
        })))
    }
}

impl World {
    /// A running guest with these contents, the first at frame 0.
    pub fn add_guest(&mut self, number: u32, name: &str, contents: &[u64]) {
        let mut seen = seen_guest(number, number as u8, name, []).seen;
        seen.info.total_pages = contents.len() as u64;
        self.guests.insert(domid(number), seen);
        self.ends.insert(domid(number), contents.len() as u64);
        for (pfn, content) in contents.iter().enumerate() {
            let page = page(number, pfn as u64);
            let frame = self.new_frame(*content);
            self.p2m.insert(page, frame);
            self.expected.insert(page, *content);
        }
    }

    pub fn contents(&mut self, contents: u64) {
        self.contents = contents;
    }

    fn new_frame(&mut self, content: u64) -> u64 {
        let frame = self.next_frame;
        self.next_frame += 1;
        self.frames.insert(frame, Frame { content, shared: None });
        frame
    }

    pub fn below(&mut self, end: u64) -> u64 {
        // xorshift64
        self.random ^= self.random << 13;
        self.random ^= self.random >> 7;
        self.random ^= self.random << 17;
        self.random % end.max(1)
    }

    /// What guests do between two calls.
    fn meanwhile(&mut self) {
        while self.below(1000) < self.restless {
            self.races += 1;
            let at = self.below(self.p2m.len() as u64) as usize;
            let Some(page) = self.p2m.keys().nth(at).copied() else {
                return;
            };
            match self.below(400) {
                0 if self.deadly && self.guests.len() > 2 => self.destroy(page.domid),
                1..=8 if self.deadly => self.give_up(page),
                _ => {
                    let content = self.below(self.contents);
                    self.write(page, content);
                }
            }
        }
    }

    /// The guest writes; without a frame for it its processor stands still, or Xen crashes it.
    pub fn write(&mut self, page: GuestPage, content: u64) {
        if !self.own(page) {
            match self.listening.get_mut(&page.domid) {
                Some(ring) => {
                    ring.push(UnshareFailure {
                        gfn: page.pfn().get(),
                        vcpu: 0,
                        paused: true,
                    });
                    self.standing.push((page, content));
                }
                None => self.crashed.push(page.domid),
            }
            return;
        }
        if let Some(frame) = self.p2m.get(&page).and_then(|frame| self.frames.get_mut(frame)) {
            frame.content = content;
            self.expected.insert(page, content);
        }
    }

    /// `__mem_sharing_unshare_page`. False: no frame is free.
    fn own(&mut self, page: GuestPage) -> bool {
        let Some(number) = self.p2m.get(&page).copied() else {
            return true;
        };
        let Some(frame) = self.frames.get_mut(&number) else {
            return true;
        };
        let content = frame.content;
        match &mut frame.shared {
            None => true,
            Some((_, 1)) => {
                frame.shared = None;
                true
            }
            Some(_) if self.free == 0 => false,
            Some((_, references)) => {
                *references -= 1;
                self.free -= 1;
                self.saved -= 1;
                let own = self.new_frame(content);
                self.p2m.insert(page, own);
                true
            }
        }
    }

    /// The frame leaves the guest.
    pub fn give_up(&mut self, page: GuestPage) {
        self.expected.remove(&page);
        let Some(number) = self.p2m.remove(&page) else { return };
        let Some(frame) = self.frames.get_mut(&number) else {
            return;
        };
        match &mut frame.shared {
            Some((_, references)) if *references > 1 => {
                *references -= 1;
                self.saved -= 1;
            }
            _ => {
                self.frames.remove(&number);
                self.free += 1;
            }
        }
    }

    pub fn destroy(&mut self, domid: DomId) {
        self.guests.remove(&domid);
        self.listening.remove(&domid);
        self.standing.retain(|(page, _)| page.domid != domid);
        let pages: Vec<GuestPage> = self.p2m.keys().filter(|page| page.domid == domid).copied().collect();
        pages.into_iter().for_each(|page| self.give_up(page));
    }

    fn handle(&self, page: GuestPage) -> Option<(u64, u64, u32)> {
        let number = *self.p2m.get(&page)?;
        let (handle, references) = self.frames.get(&number)?.shared?;
        Some((number, handle, references))
    }

    /// Pages by the frame that they share, those alone left out.
    pub fn shared(&self) -> BTreeMap<u64, Vec<GuestPage>> {
        let mut shared: BTreeMap<u64, Vec<GuestPage>> = BTreeMap::new();
        for page in self.p2m.keys() {
            if let Some((_, handle, _)) = self.handle(*page) {
                shared.entry(handle).or_default().push(*page);
            }
        }
        shared
    }

    pub fn saved(&self) -> u64 {
        self.saved
    }

    /// Every page holds what its guest wrote, and Xen's counts are those of the frames.
    pub fn check(&self) {
        for (page, content) in &self.expected {
            let frame = self.p2m.get(page).and_then(|frame| self.frames.get(frame)).unwrap();
            assert_eq!(frame.content, *content, "a wrong byte in {page:?}");
        }
        let saved: u64 = self.shared().values().map(|pages| pages.len() as u64 - 1).sum();
        assert_eq!(saved, self.saved);
    }
}

impl MemShr for SimXen {
    fn probe(&mut self) -> Result<(), String> {
        Ok(())
    }

    fn enable(&mut self, _: DomId) -> Result<(), SharingError> {
        Ok(())
    }

    fn listen(&mut self, domid: DomId, _: bool) -> Result<(), SharingError> {
        let mut world = self.0.lock();
        if world.paged.contains(&domid) {
            return Err(SharingError::HasPager);
        }
        world.listening.insert(domid, Vec::new());
        // Whoever waited for an answer tries again.
        let (again, still) = std::mem::take(&mut world.standing)
            .into_iter()
            .partition(|(page, _)| page.domid == domid);
        world.standing = still;
        let again: Vec<(GuestPage, u64)> = again;
        again.into_iter().for_each(|(page, content)| world.write(page, content));
        Ok(())
    }

    fn failures(&mut self, domid: DomId) -> Vec<UnshareFailure> {
        let mut world = self.0.lock();
        world.meanwhile();
        world.listening.get_mut(&domid).map(std::mem::take).unwrap_or_default()
    }

    fn answer(&mut self, domid: DomId, failure: &UnshareFailure) -> Result<(), SharingError> {
        let mut world = self.0.lock();
        let stands =
            |(page, _): &(GuestPage, u64)| failure.paused && page.domid == domid && page.pfn().get() == failure.gfn;
        if let Some(at) = world.standing.iter().position(stands) {
            let (page, content) = world.standing.remove(at);
            world.write(page, content);
        }
        Ok(())
    }

    fn forget(&mut self, domid: DomId) {
        self.0.lock().listening.remove(&domid);
    }

    fn nominate(&mut self, page: GuestPage) -> Result<ShareHandle, SharingError> {
        let mut world = self.0.lock();
        world.meanwhile();
        if world.heap_full {
            return Err(SharingError::NoMemory);
        }
        if let Some((_, handle, _)) = world.handle(page) {
            return Ok(ShareHandle::new(handle));
        }
        let handle = world.next_handle;
        world.next_handle += 1;
        let frame = world.p2m.get(&page).copied().ok_or(SharingError::Unsharable)?;
        match world.frames.get_mut(&frame) {
            Some(frame) => frame.shared = Some((handle, 1)),
            None => return Err(SharingError::Unsharable),
        }
        Ok(ShareHandle::new(handle))
    }

    fn share(&mut self, source: Nominated, client: Nominated, _alone: bool) -> Result<(), SharingError> {
        let mut world = self.0.lock();
        world.meanwhile();
        if world.p2m.get(&source.0) == world.p2m.get(&client.0) {
            // Also when both have none.
            return Ok(());
        }
        let (to, handle, _) = world.handle(source.0).ok_or(SharingError::StaleSource)?;
        let (from, other, references) = world.handle(client.0).ok_or(SharingError::StaleClient)?;
        if handle != source.1.get() {
            return Err(SharingError::StaleSource);
        }
        if other != client.1.get() {
            return Err(SharingError::StaleClient);
        }
        let moving: Vec<GuestPage> = world
            .p2m
            .iter()
            .filter(|(_, frame)| **frame == from)
            .map(|(page, _)| *page)
            .collect();
        assert_eq!(moving.len(), references as usize);
        let asked = [source.0.domid, client.0.domid];
        assert!(
            moving.iter().all(|page| asked.contains(&page.domid)),
            "Xen stops the host: the frame that is given up has a page of a third guest"
        );
        for page in moving {
            world.p2m.insert(page, to);
        }
        world.frames.remove(&from);
        if let Some(Frame {
            shared: Some((_, count)),
            ..
        }) = world.frames.get_mut(&to)
        {
            *count += references;
        }
        world.free += 1;
        world.saved += 1;
        Ok(())
    }

    fn references(&mut self, page: GuestPage) -> Result<Option<u32>, SharingError> {
        let mut world = self.0.lock();
        world.meanwhile();
        Ok(world.handle(page).map(|(_, _, references)| references))
    }

    fn unshare(&mut self, domid: DomId, pfns: &[Pfn]) -> Result<Vec<bool>, XenError> {
        let mut world = self.0.lock();
        let own = |pfn: &Pfn| {
            world.meanwhile();
            let own = world.own(GuestPage::new(domid, *pfn).unwrap());
            if let Some(ring) = world.listening.get_mut(&domid).filter(|_| !own) {
                // Who maps a page is told, and the ring as well.
                ring.push(UnshareFailure {
                    gfn: pfn.get(),
                    vcpu: 0,
                    paused: false,
                });
            }
            own
        };
        Ok(pfns.iter().map(own).collect())
    }

    fn memory(&mut self) -> Result<HostMemory, XenError> {
        let world = self.0.lock();
        Ok(HostMemory {
            total: world.frames.len() as u64 + world.free,
            free: world.free,
            saved: world.saved,
            shared: world.shared().len() as u64,
        })
    }

    fn departing(&mut self) -> Vec<DomId> {
        self.0.lock().departing.clone()
    }
}

impl Host for SimXen {
    fn guests(&mut self) -> Result<Vec<Seen>, XenError> {
        let domids: Vec<DomId> = self.0.lock().guests.keys().copied().collect();
        Ok(domids.into_iter().filter_map(|domid| self.guest(domid).ok()?).collect())
    }

    fn guest(&mut self, domid: DomId) -> Result<Option<Seen>, XenError> {
        let mut world = self.0.lock();
        world.meanwhile();
        let pages: Vec<GuestPage> = world.p2m.keys().filter(|page| page.domid == domid).copied().collect();
        let shared = pages.iter().filter(|page| world.handle(**page).is_some()).count() as u64;
        let seen = world.guests.get(&domid).cloned();
        Ok(seen.map(|mut seen| {
            seen.info.shared_pages = shared;
            seen.info.total_pages = pages.len() as u64 - shared;
            seen
        }))
    }

    fn end_of_frames(&mut self, domid: DomId) -> Result<u64, XenError> {
        Ok(self.0.lock().ends.get(&domid).copied().unwrap_or(0))
    }

    fn read(&mut self, domid: DomId, pfns: &[Pfn], pages: &mut [Page]) -> Result<Vec<bool>, XenError> {
        let mut world = self.0.lock();
        let read = pfns.iter().zip(pages).map(|(pfn, page)| {
            world.meanwhile();
            let frame = world.p2m.get(&GuestPage::new(domid, *pfn).unwrap());
            let content = frame
                .and_then(|frame| world.frames.get(frame))
                .map(|frame| frame.content);
            if let Some(content) = content {
                *page = if content == 0 {
                    [0; PAGE_SIZE]
                } else {
                    bytes_of(content)
                };
            }
            content.is_some()
        });
        Ok(read.collect())
    }

    fn idle_times(&mut self) -> Result<Vec<Duration>, XenError> {
        Ok(vec![self.0.lock().idle; 2])
    }
}

pub fn page(number: u32, pfn: u64) -> GuestPage {
    GuestPage::new(domid(number), Pfn::new(pfn).unwrap()).unwrap()
}
