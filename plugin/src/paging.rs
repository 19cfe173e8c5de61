//! A guest's pages taken out and put back by Xen, as the engine wants it.
use std::collections::HashMap;
use std::os::fd::{AsFd, OwnedFd};
use std::thread;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use xen_sys::{
    Access, DeviceModel, DomainInfo, ForeignMemory, Paging, PagingError, PagingRequest, ShutdownReason, XenError,
    Xenctrl, Xenstore, hvm_param,
};
use xenfold::engine::{FrameError, GuestPaging, Notices, PageRequest};
use xenfold::late::{Asking, Saving};
use xenfold::page::{PAGE_SIZE, Pfn, ZERO_PAGE};
use xenfold::wire::EarlyOut;

use crate::guest::{KnownDomain, is_suspended, uuid_text};

type Page = [u8; PAGE_SIZE];

/// How long somebody may have a page mapped that is being taken out.
const EVICT_PATIENCE: Duration = Duration::from_secs(2);

/// How long a page may wait for a free frame.
const MEMORY_PATIENCE: Duration = Duration::from_secs(30);

/// Pages by which a guest that has all of its memory may seem smaller than its source.
const EARLY_SLACK: u64 = 1024;

const RETRY: Duration = Duration::from_millis(20);

/// How often it is looked whether the guest is suspended.
const LOOK: Duration = Duration::from_millis(100);

/// The guest that xl builds here.
pub struct GuestPager {
    domain: KnownDomain,
    xen: Xenctrl,
    memory: ForeignMemory,
    device_model: DeviceModel,
    /// What the guest is asked for; while pages are late.
    control: Option<Control>,
    looked: Option<Instant>,
    suspended: Saving,
    paging: Option<Paging>,
    /// The guest's highest page number.
    highest: u64,
    /// What the page holds that Xen's ring is in meanwhile.
    ring_page: Option<(Pfn, Box<Page>)>,
    /// Free memory is kept back for the guest: from the first page on that is taken out.
    claimed: bool,
    /// Requests that were handed out, by their tokens.
    requests: HashMap<u64, PagingRequest>,
    next_token: u64,
    /// The guest, where another domain may have its number by now.
    uuid: Option<String>,
    /// Its pager was another process, which was killed.
    taken_over: bool,
}

impl GuestPager {
    /// Errors: the hypervisor cannot do it, Xen's libraries are missing or of another version, or this is no dom0.
    pub fn open(domain: KnownDomain) -> Result<GuestPager, PagingError> {
        Paging::probe()?;
        Ok(GuestPager {
            domain,
            xen: Xenctrl::open()?,
            memory: ForeignMemory::open()?,
            device_model: DeviceModel::open()?,
            control: None,
            looked: None,
            suspended: Saving::No,
            paging: None,
            highest: u64::MAX,
            ring_page: None,
            claimed: false,
            requests: HashMap::new(),
            next_token: 0,
            uuid: None,
            taken_over: false,
        })
    }

    /// Only as long as it is this guest.
    pub fn only(self, uuid: &str) -> GuestPager {
        GuestPager {
            uuid: Some(uuid.to_owned()),
            ..self
        }
    }

    fn domid(&self) -> Result<xen_sys::DomId, FrameError> {
        let unknown = || FrameError::NoGuest("libxl-save-helper was not seen among xl's children".into());
        self.domain.get().ok_or_else(unknown)
    }

    fn paging(&mut self) -> Result<&mut Paging, FrameError> {
        let off = || FrameError::Xen("paging is off".into());
        self.paging.as_mut().ok_or_else(off)
    }

    fn map_and<T>(
        &self,
        pfn: Pfn,
        access: Access,
        with: impl FnOnce(&xen_sys::Mapping<'_>) -> std::io::Result<T>,
    ) -> Result<T, FrameError> {
        let mapping = self.memory.map(self.domid()?, &[pfn.get()], access);
        let mapping = mapping.map_err(|error| FrameError::Xen(error.to_string()))?;
        with(&mapping).map_err(|source| FrameError::Unreadable { pfn, source })
    }

    fn write_frame(&self, pfn: Pfn, page: &Page) -> Result<(), FrameError> {
        self.map_and(pfn, Access::ReadWrite, |mapping| mapping.write(0, page))
    }
}

fn refused(error: PagingError) -> FrameError {
    FrameError::Xen(error.to_string())
}

fn xen_refused(error: xen_sys::XenError) -> FrameError {
    FrameError::Xen(error.to_string())
}

impl GuestPaging for GuestPager {
    fn enable(&mut self) -> Result<(), FrameError> {
        let domid = self.domid()?;
        let ring = self
            .xen
            .hvm_param(domid, hvm_param::PAGING_RING_PFN)
            .map_err(xen_refused)?;
        let mut page = Box::new([0; PAGE_SIZE]);
        if let Some(pfn) = Pfn::new(ring).filter(|pfn| pfn.get() != 0) {
            // A page that is not there is given back empty.
            let read = self.map_and(pfn, Access::Read, |mapping| mapping.read(0, &mut page));
            log::debug!("the ring's page {pfn}: {read:?}");
            self.ring_page = Some((pfn, page));
        }
        // Xen does not let the highest one be marked dirty.
        self.highest = self.xen.maximum_gpfn(domid).map_err(xen_refused)?;
        self.paging = Some(Paging::enable(domid).map_err(refused)?);
        Ok(())
    }

    fn enable_early(&mut self, source: &EarlyOut) -> Result<bool, FrameError> {
        let Some(domid) = self.domain.get() else {
            return Ok(false);
        };
        let info = self.xen.domain(domid).map_err(xen_refused)?;
        let info = info.ok_or_else(|| FrameError::NoGuest("it is gone".into()))?;
        if info.total_pages + EARLY_SLACK < source.pages {
            return Ok(false);
        }
        let ring = Pfn::new(source.ring_page).filter(|pfn| pfn.get() != 0);
        let ring = ring.ok_or_else(|| FrameError::Xen("the guest has no page for the ring".into()))?;
        let mut page = [0; PAGE_SIZE];
        match self.map_and(ring, Access::Read, |mapping| mapping.read(0, &mut page)) {
            Ok(()) if page == ZERO_PAGE => {}
            // It is not there while paging is on, and what it holds could not be referred to.
            Ok(()) => return Err(FrameError::Xen("the guest uses the ring's page".into())),
            Err(FrameError::Unreadable { .. }) => return Ok(false),
            Err(error) => return Err(error),
        }
        // The toolstack sets it as well, with the last records.
        self.xen
            .set_hvm_param(domid, hvm_param::PAGING_RING_PFN, ring.get())
            .map_err(xen_refused)?;
        self.enable()?;
        Ok(true)
    }

    fn secure(&mut self) -> Result<(), FrameError> {
        let info = self.xen.domain(self.domid()?).map_err(xen_refused)?;
        let info = info.ok_or_else(|| FrameError::NoGuest("it is gone".into()))?;
        // A 32-bit guest's page table that Xen reads itself, on Intel processors (vmx_load_pdptrs).
        if info.shutdown == Some(ShutdownReason::Crash) {
            return Err(FrameError::Xen(
                "the guest needs a page that was taken out of it; migrate it with --mode precopy".into(),
            ));
        }
        // What the helper has allocated since the first page was taken out came out of what was kept back.
        if info.claimed_pages < info.paged_pages {
            let total = info.total_pages + info.paged_pages;
            let paging = self.paging()?;
            paging.claim(0).map_err(refused)?;
            paging.claim(total).map_err(refused)?;
            self.claimed = true;
        }
        Ok(())
    }

    fn evict(&mut self, pfns: &[Pfn]) -> Result<Vec<bool>, FrameError> {
        let total = match self.xen.domain(self.domid()?).map_err(xen_refused)? {
            Some(info) => info.total_pages,
            None => return Err(FrameError::NoGuest("it is gone".into())),
        };
        let mut evicted = Vec::with_capacity(pfns.len());
        for pfn in pfns {
            let (claimed, highest) = (self.claimed, self.highest);
            let paging = self.paging()?;
            let out = pfn.get() < highest && paging.nominate(pfn.get()).map_err(refused)?;
            if out {
                evict_nominated(paging, *pfn)?;
            }
            if out && !claimed {
                // Its frame is free for anybody until this.
                paging.claim(total).map_err(refused)?;
                self.claimed = true;
            }
            evicted.push(out);
        }
        Ok(evicted)
    }

    fn write(&mut self, pfn: Pfn, page: &Page) -> Result<(), FrameError> {
        match &mut self.ring_page {
            Some((ring, kept)) if *ring == pfn && self.paging.is_some() => {
                **kept = *page;
                Ok(())
            }
            _ => self.write_frame(pfn, page),
        }
    }

    fn load(&mut self, pfn: Pfn, page: &Page) -> Result<(), FrameError> {
        let paging = self.paging()?;
        let begin = Instant::now();
        loop {
            match paging.load(pfn.get(), page) {
                // One that is not paged out has been given up: the guest has another page there, or none.
                Ok(_) => return Ok(()),
                // Memory was kept back for it, but for the moment somebody was quicker.
                Err(PagingError::NoMemory) if begin.elapsed() < MEMORY_PATIENCE => thread::sleep(RETRY),
                Err(error) => return Err(refused(error)),
            }
        }
    }

    fn mark_dirty(&mut self, pfns: &[Pfn]) -> Result<(), FrameError> {
        let gfns: Vec<u64> = pfns.iter().map(|pfn| pfn.get()).collect();
        self.device_model.mark_dirty(self.domid()?, &gfns).map_err(xen_refused)
    }

    fn saving(&mut self) -> Result<Saving, FrameError> {
        if let Some(control) = &mut self.control
            && control.asked().map_err(xen_refused)?
        {
            return Ok(Saving::Asks);
        }
        if self.looked.is_some_and(|looked| looked.elapsed() < LOOK) {
            return Ok(self.suspended);
        }
        self.looked = Some(Instant::now());
        let info = self.xen.domain(self.domid()?).map_err(xen_refused)?;
        self.suspended = match info.is_some_and(|info| is_suspended(&info)) {
            true => Saving::Suspended,
            false => Saving::No,
        };
        Ok(self.suspended)
    }

    fn notices(&mut self) -> Result<Box<dyn Notices>, FrameError> {
        let domid = self.domid()?;
        self.control = Control::watch(domid)
            .inspect_err(|error| log::warn!("it is not noticed when somebody saves the guest: {error}"))
            .ok();
        let mut descriptors = vec![self.paging()?.as_fd().try_clone_to_owned()];
        if let Some(control) = &self.control {
            descriptors.push(control.store.fd().map_err(xen_refused)?.try_clone_to_owned());
        }
        let descriptors: std::io::Result<Vec<OwnedFd>> = descriptors.into_iter().collect();
        let descriptors = descriptors.map_err(|error| FrameError::Xen(error.to_string()))?;
        Ok(Box::new(Descriptors(descriptors)))
    }

    fn requests(&mut self) -> Result<Vec<PageRequest>, FrameError> {
        let Some(paging) = &mut self.paging else {
            return Ok(Vec::new());
        };
        if readable(&paging.as_fd(), Duration::ZERO) {
            paging.take_notice().map_err(refused)?;
        }
        let mut asked = Vec::new();
        for request in paging.requests() {
            let token = self.next_token;
            self.next_token += 1;
            self.requests.insert(token, request);
            asked.push(PageRequest {
                pfn: Pfn::new(request.gfn).unwrap_or_default(),
                asking: match request {
                    PagingRequest { dropped: true, .. } => Asking::GivesUp,
                    PagingRequest { paused: true, .. } => Asking::Guest,
                    _ => Asking::Domain,
                },
                token,
            });
        }
        Ok(asked)
    }

    fn answer(&mut self, token: u64) -> Result<(), FrameError> {
        match self.requests.remove(&token) {
            Some(request) => self.paging()?.answer(&request).map_err(refused),
            None => Ok(()),
        }
    }

    fn guest_exists(&mut self) -> Result<bool, FrameError> {
        let info = self.xen.domain(self.domid()?).map_err(xen_refused)?;
        let is_it = |info: &DomainInfo| self.uuid.as_ref().is_none_or(|uuid| uuid_text(&info.uuid) == *uuid);
        Ok(info.is_some_and(|info| !info.dying && is_it(&info)))
    }

    fn hold_still(&mut self, still: bool) -> Result<(), FrameError> {
        let domid = self.domid()?;
        let done = if still {
            self.xen.pause(domid)
        } else {
            self.xen.unpause(domid)
        };
        done.map_err(xen_refused)
    }

    fn has_not_run(&mut self) -> Result<bool, FrameError> {
        let info = self.xen.domain(self.domid()?).map_err(xen_refused)?;
        Ok(info.is_some_and(|info| info.paused && info.cpu_time_ns == 0))
    }

    fn disable(&mut self) -> Result<(), FrameError> {
        if self.taken_over {
            let info = self.xen.domain(self.domid()?).map_err(xen_refused)?;
            // Never so, unless the journal was damaged; without paging the guest would be crashed at its next touch.
            if let Some(out @ 1..) = info.map(|info| info.paged_pages) {
                return Err(FrameError::Xen(format!("{out} pages are out that nobody knows of")));
            }
        }
        let claimed = self.claimed;
        if let Some(paging) = &mut self.paging {
            if claimed {
                paging.claim(0).map_err(refused)?;
            }
            paging.disable().map_err(refused)?;
        }
        self.paging = None;
        self.claimed = false;
        self.requests.clear();
        match self.ring_page.take() {
            Some((pfn, page)) => self.write_frame(pfn, &page),
            None => Ok(()),
        }
    }

    fn is_held(&mut self) -> Result<bool, FrameError> {
        let info = self.xen.domain(self.domid()?).map_err(xen_refused)?;
        Ok(info.is_some_and(|info| info.paused))
    }

    /// What the ring's page held before is not known any more; Xen's toolstack leaves it empty.
    fn take_over(&mut self) -> Result<(), FrameError> {
        self.paging = Some(Paging::take_over(self.domid()?).map_err(refused)?);
        // Its claim outlives a pager.
        (self.claimed, self.taken_over) = (true, true);
        Ok(())
    }
}

/// Evicts a page that was nominated, which is not undone otherwise: left so, the guest would be crashed at its next write to
/// it once paging is off. Somebody may have it mapped for a moment.
fn evict_nominated(paging: &Paging, pfn: Pfn) -> Result<(), FrameError> {
    let begin = Instant::now();
    while !paging.evict(pfn.get()).map_err(refused)? {
        if begin.elapsed() > EVICT_PATIENCE {
            return Err(FrameError::Xen(format!(
                "page {pfn} was to be taken out, and somebody has it mapped"
            )));
        }
        thread::sleep(RETRY);
    }
    Ok(())
}

/// What libxl asks a guest for: it writes a word into xenstore, which the guest takes out.
struct Control {
    store: Xenstore,
    path: String,
    word: Word,
}

impl Control {
    fn watch(domid: xen_sys::DomId) -> Result<Control, XenError> {
        let store = Xenstore::open()?;
        let path = format!("{}/control/shutdown", store.domain_path(domid)?);
        store.watch(&path, "xenfold")?;
        Ok(Control {
            store,
            path,
            word: Word::default(),
        })
    }

    /// Whether the guest has been asked to suspend itself since the last time.
    fn asked(&mut self) -> Result<bool, XenError> {
        let mut asked = false;
        while self.store.try_event()?.is_some() {
            let word = self.store.read_string(&self.path)?.unwrap_or_default();
            asked |= self.word.changed(&word);
        }
        Ok(asked)
    }
}

/// The word that was there when it was last read; none: it has not been.
#[derive(Default)]
struct Word(Option<String>);

impl Word {
    /// Somebody has written it. True: to ask for a suspend, as far as can be seen: the guest may have taken the word out before
    /// it was read here.
    fn changed(&mut self, word: &str) -> bool {
        let before = self.0.replace(word.to_owned());
        match before.as_deref() {
            Some("") => matches!(word, "" | "suspend"),
            before => word == "suspend" && before != Some(word),
        }
    }
}

struct Descriptors(Vec<OwnedFd>);

impl Notices for Descriptors {
    fn wait(&mut self, patience: Duration) -> bool {
        any_readable(&self.0, patience)
    }
}

fn readable(descriptor: &impl AsFd, patience: Duration) -> bool {
    any_readable(std::slice::from_ref(descriptor), patience)
}

fn any_readable(descriptors: &[impl AsFd], patience: Duration) -> bool {
    let patience = Timespec::try_from(patience).ok();
    let mut polled: Vec<PollFd> = descriptors
        .iter()
        .map(|descriptor| PollFd::new(descriptor, PollFlags::IN))
        .collect();
    let ready = poll(&mut polled, patience.as_ref());
    ready.is_ok_and(|ready| ready > 0)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn asked(words: &[&str]) -> Vec<bool> {
        let mut word = Word::default();
        words.iter().map(|now| word.changed(now)).collect()
    }

    #[test]
    fn a_suspend_is_seen_also_when_the_guest_is_quicker() {
        // The first is what was there before.
        assert_eq!(asked(&["", "suspend", ""]), [false, true, false]);
        assert_eq!(
            asked(&["suspend", "suspend", "", "suspend"]),
            [true, false, false, true]
        );
        assert_eq!(
            asked(&["", "", ""]),
            [false, true, true],
            "taken out before it was read"
        );
        assert_eq!(asked(&["", "poweroff", ""]), [false, false, false]);
        assert_eq!(asked(&["poweroff", "", "suspend"]), [false, false, true]);
    }
}
