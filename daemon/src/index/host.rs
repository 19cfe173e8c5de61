//! What the index needs of a host, and which of its guests it leaves alone.
use std::fmt;
use std::time::Duration;

use xen_sys::{AWAY, DomId, DomainInfo, INCOMING, XenError, uuid_text};
use xenfold::page::{PAGE_SIZE, Pfn};

use crate::sharing::MemShr;

/// A page's bytes.
pub type Page = [u8; PAGE_SIZE];

/// A host with guests: Xen, or one that a test makes up.
pub trait Host: MemShr + Send {
    /// All guests, dom0 not among them.
    fn guests(&mut self) -> Result<Vec<Seen>, XenError>;

    /// The guest that has this number now.
    fn guest(&mut self, domid: DomId) -> Result<Option<Seen>, XenError>;

    /// The first frame number past the last that the guest has ever had a frame at: it never becomes less while the guest runs.
    fn end_of_frames(&mut self, domid: DomId) -> Result<u64, XenError>;

    /// Copies frames, as many as there are pages, and tells which could be read. None stays mapped.
    /// Errors: nothing could be tried.
    fn read(&mut self, domid: DomId, pfns: &[Pfn], pages: &mut [Page]) -> Result<Vec<bool>, XenError>;

    /// How long each physical processor has been idle since the host started; zero for one that is offline.
    fn idle_times(&mut self) -> Result<Vec<Duration>, XenError>;
}

/// A guest as it was a moment ago.
#[derive(Clone, Debug)]
pub struct Seen {
    pub info: DomainInfo,
    pub name: Option<String>,
    /// Frames that are populated on demand and have not been yet; `None` when Xen does not tell.
    pub on_demand: Option<u64>,
}

/// Which guest it is. Numbers are used again and uuids are double during a migration; both together are one guest's, and
/// under another name it may be in another group.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Identity {
    pub domid: DomId,
    /// In lower case.
    pub uuid: String,
    pub name: String,
}

/// Why a guest is not indexed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum LeftOut {
    /// Its page numbers are no frame numbers.
    Pv,
    Dying,
    Shutdown,
    Unnamed,
    Incoming,
    Away,
    Building,
    Paged,
    OnDemand,
    Configured,
    Alone,
    NoKey,
    /// The configuration or the key cannot be used.
    NoGroup(String),
}

impl fmt::Display for LeftOut {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            LeftOut::Pv => "PV",
            LeftOut::Dying => "ends",
            LeftOut::Shutdown => "suspended or shut down",
            LeftOut::Unnamed => "has no name yet",
            LeftOut::Incoming => "still arrives",
            LeftOut::Away => "has migrated away",
            LeftOut::Building => "has not run yet",
            LeftOut::Paged => "has pages elsewhere: reading them would fetch them",
            LeftOut::OnDemand => "has memory on demand: reading it would use it up",
            LeftOut::Configured => "in index_off",
            LeftOut::Alone => "in no group: nobody could ask for its contents",
            LeftOut::NoKey => "its group has no key yet: the first migration in the group brings it",
            LeftOut::NoGroup(reason) => return f.write_str(reason),
        })
    }
}

impl Seen {
    pub fn uuid(&self) -> String {
        uuid_text(&self.info.uuid)
    }

    /// The guest if its frames may be read now. This alone says nothing of its group.
    pub fn readable(&self) -> Result<Identity, LeftOut> {
        let info = &self.info;
        if !info.hvm {
            return Err(LeftOut::Pv);
        }
        if info.dying {
            return Err(LeftOut::Dying);
        }
        if info.shutdown.is_some() {
            return Err(LeftOut::Shutdown);
        }
        let Some(name) = self.name.as_ref().filter(|name| !name.is_empty()) else {
            return Err(LeftOut::Unnamed);
        };
        // The two ends of a migration have one uuid: what is rebuilt here must not answer for what it is rebuilt from.
        if name.ends_with(INCOMING) {
            return Err(LeftOut::Incoming);
        }
        if name.ends_with(AWAY) {
            return Err(LeftOut::Away);
        }
        // Its frames are being filled, and those on demand are not set up yet.
        if info.cpu_time_ns == 0 {
            return Err(LeftOut::Building);
        }
        if info.paged_pages > 0 {
            return Err(LeftOut::Paged);
        }
        if self.on_demand != Some(0) {
            return Err(LeftOut::OnDemand);
        }
        Ok(Identity {
            domid: info.domid,
            uuid: self.uuid(),
            name: name.clone(),
        })
    }
}

/// Reads frames of this guest and of no other. `None`: it is not there any more, or may not be read.
pub fn read_of(
    host: &mut dyn Host,
    guest: &Identity,
    pfns: &[Pfn],
    pages: &mut [Page],
) -> Result<Option<Vec<bool>>, XenError> {
    let is_it = |host: &mut dyn Host| -> Result<bool, XenError> {
        let seen = host.guest(guest.domid)?;
        Ok(seen.is_some_and(|seen| seen.readable().as_ref() == Ok(guest)))
    };
    // Before: a frame on demand must not be touched. After: the number may have become another guest's, and bytes of one
    // group's guest must not be taken for another's. The same guest at both times was there in between.
    if !is_it(host)? {
        return Ok(None);
    }
    let read = host.read(guest.domid, pfns, pages)?;
    Ok(if is_it(host)? { Some(read) } else { None })
}
