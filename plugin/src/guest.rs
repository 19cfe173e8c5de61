//! Guests as Xen and xenstore know them, and their frames as the engine wants them.
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result};
use parking_lot::Mutex;
pub use xen_sys::{AWAY, INCOMING, uuid_text};
use xen_sys::{Access, DomId, DomainInfo, ForeignMemory, ShutdownReason, XenError, Xenctrl, Xenstore, hvm_param};
use xenfold::engine::{FrameError, FrameSource};
use xenfold::page::{PAGE_SIZE, Pfn};

/// Frames that are mapped at a time.
const MAP_FRAMES: usize = 1024;

/// How long the guest under construction may take to show, once a page of it is asked for.
const PATIENCE: Duration = Duration::from_secs(10);

/// A guest on this host.
#[derive(Clone, Debug)]
pub struct Guest {
    pub domid: DomId,
    pub name: String,
    pub uuid: String,
}

/// A domain's name in xenstore.
pub fn name_of(store: &Xenstore, domid: DomId) -> Result<Option<String>> {
    Ok(store.read_string(&format!("/local/domain/{}/name", domid.get()))?)
}

/// The guest that `xl` would take for `wanted`: a domid, a name, or a uuid.
pub fn find(wanted: &str) -> Result<Option<Guest>> {
    let (xen, store) = (Xenctrl::open()?, Xenstore::open()?);
    let by_number = wanted.parse().ok().and_then(DomId::new);
    for info in xen.domains()? {
        let name = name_of(&store, info.domid)?.unwrap_or_default();
        let uuid = uuid_text(&info.uuid);
        if by_number == Some(info.domid) || name == wanted || uuid == wanted {
            return Ok(Some(Guest {
                domid: info.domid,
                name,
                uuid,
            }));
        }
    }
    Ok(None)
}

/// The same for a guest that xl may have renamed already because it goes away.
pub fn find_going(wanted: &str) -> Result<Option<Guest>> {
    match find(wanted)? {
        Some(found) => Ok(Some(found)),
        None => find(&format!("{wanted}{AWAY}")),
    }
}

/// Whether a domain waits, suspended, for what becomes of its migration.
pub fn is_suspended(info: &DomainInfo) -> bool {
    info.shutdown == Some(ShutdownReason::Suspend) && !info.dying
}

/// The guest's number, set when it becomes known.
#[derive(Clone, Default)]
pub struct KnownDomain(Arc<Mutex<Option<DomId>>>);

impl KnownDomain {
    pub fn set(&self, domid: DomId) {
        *self.0.lock() = Some(domid);
    }

    pub fn get(&self) -> Option<DomId> {
        *self.0.lock()
    }
}

/// Frames of a guest, read through foreign mappings. For HVM and PVH guests a frame's number is its page's.
pub struct GuestFrames {
    memory: ForeignMemory,
    xen: Xenctrl,
    domain: KnownDomain,
}

impl GuestFrames {
    /// Errors: Xen's libraries are missing or of another version, or this is no dom0.
    pub fn open(domain: KnownDomain) -> Result<GuestFrames, XenError> {
        Ok(GuestFrames {
            memory: ForeignMemory::open()?,
            xen: Xenctrl::open()?,
            domain,
        })
    }

    fn domid(&self) -> Result<DomId, FrameError> {
        let step = Duration::from_millis(10);
        for _ in 0..PATIENCE.as_millis() / step.as_millis() {
            if let Some(domid) = self.domain.get() {
                return Ok(domid);
            }
            std::thread::sleep(step);
        }
        Err(FrameError::NoGuest(
            "libxl-save-helper was not seen among xl's children".into(),
        ))
    }
}

/// Parameters that name pages which libxc clears when it restores HVM_PARAMS (xg_sr_restore_x86_hvm.c, handle_hvm_params): the
/// rings of console, xenstore and device models, whose other ends are new.
pub const REWRITTEN: [u32; 4] = [
    hvm_param::CONSOLE_PFN,
    hvm_param::STORE_PFN,
    hvm_param::IOREQ_PFN,
    hvm_param::BUFIOREQ_PFN,
];

impl FrameSource for GuestFrames {
    fn read(&mut self, pfns: &[Pfn], pages: &mut [u8]) -> Result<(), FrameError> {
        let domid = self.domid()?;
        for (pfns, pages) in pfns.chunks(MAP_FRAMES).zip(pages.chunks_mut(MAP_FRAMES * PAGE_SIZE)) {
            let gfns: Vec<u64> = pfns.iter().map(|pfn| pfn.get()).collect();
            let mapping = self
                .memory
                .map(domid, &gfns, Access::Read)
                .map_err(|error| FrameError::Xen(error.to_string()))?;
            let (pages, _) = pages.as_chunks_mut::<PAGE_SIZE>();
            for (index, (pfn, page)) in pfns.iter().zip(pages).enumerate() {
                mapping
                    .read(index, page)
                    .map_err(|source| FrameError::Unreadable { pfn: *pfn, source })?;
            }
        }
        Ok(())
    }

    fn check_suspended(&mut self) -> Result<(), FrameError> {
        let domid = self.domid()?;
        let info = self
            .xen
            .domain(domid)
            .map_err(|error| FrameError::Xen(error.to_string()))?;
        match info {
            Some(info) if is_suspended(&info) => Ok(()),
            Some(info) if !info.dying => Err(FrameError::Gone("it runs again".into())),
            _ => Err(FrameError::Gone("it was destroyed".into())),
        }
    }

    fn rewritten_by_xen(&mut self) -> Result<Vec<Pfn>, FrameError> {
        let domid = self.domid()?;
        // A param that was never set reads as 0, or as an error for params that this kind of guest does not have.
        Ok(REWRITTEN
            .iter()
            .filter_map(|index| self.xen.hvm_param(domid, *index).ok())
            .filter_map(Pfn::new)
            .filter(|pfn| pfn.get() != 0)
            .collect())
    }
}

/// The guest that the xl with this process number migrates, as its command line names it.
pub fn of_xl(xl: u32) -> Result<Option<Guest>> {
    match crate::process::guest_of_xl(&crate::process::arguments(xl)) {
        Some(name) => find(&name).with_context(|| format!("guest {name} cannot be looked up")),
        None => Ok(None),
    }
}
