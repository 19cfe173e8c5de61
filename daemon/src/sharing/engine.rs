//! How equal pages come to have one frame: nominate, read, compare all bytes, share.
//!
//! Why no byte can be wrong: a frame's handle is valid only as long as nobody has written to the frame since it was
//! nominated, and Xen shares by handles. What was read after the nomination is therefore what the frame holds when it is
//! shared, or the handle is stale and nothing happens. A row's handle is as good as a new one: its page is read now, the
//! handle is older, and a page that left the row never has that handle again.
//!
//! Handles grow, and only this process nominates: a page whose handle is above all before was nobody's but its guest's a
//! moment ago, so it is one page's frame. Of any other Xen is asked how many pages have it, before its frame is given up.
use std::collections::{BTreeMap, BTreeSet};
use std::hash::{BuildHasher, Hasher, RandomState};

use parking_lot::Mutex;
use xen_sys::{DomId, ShareHandle, SharingError};
use xenfold::engine::chain;
use xenfold::page::{PAGE_SIZE, Pfn};

use super::host::{GuestPage, Nominated};
use super::table::{GroupNo, RowId};
use crate::index::{Host, Identity, Page, read_of};

/// Pages that are shared at a time: what the engine reads is in memory together.
pub const MOST_AT_ONCE: usize = 256;

/// Pages that are said to have one content.
pub struct Task {
    pub group: GroupNo,
    pub key: u64,
    /// The row that they shall join, and one of its pages; `None`: they are to become one.
    pub row: Option<(RowId, Nominated)>,
    pub pages: Vec<GuestPage>,
}

/// What became of a task.
#[derive(Default)]
pub struct Outcome {
    /// Pages that have one frame now, with its handle; empty when none were shared. Without the page of a row.
    pub joined: Vec<GuestPage>,
    pub base: Option<Nominated>,
    /// Written to meanwhile, or of another content than they were: a hint was old.
    pub changed: Vec<GuestPage>,
    /// Xen does not share them.
    pub refused: Vec<GuestPage>,
    /// They have a frame with other pages already, another one: they keep it.
    pub elsewhere: Vec<GuestPage>,
    /// The row's page is not in the row any more.
    pub left_row: Option<GuestPage>,
}

/// What became of all of them.
#[derive(Default)]
pub struct Run {
    pub outcomes: Vec<Outcome>,
    pub nominated: u64,
    pub no_memory: bool,
    /// The last handle that Xen gave out, if it is known.
    pub newest: Option<ShareHandle>,
}

/// A run over tasks of guests that are known.
pub struct Engine<'a> {
    host: &'a Mutex<Box<dyn Host>>,
    guests: &'a BTreeMap<DomId, Identity>,
    no_memory: bool,
    /// The last handle that Xen gave out. `None`: by a process before this one, and not known.
    newest: Option<ShareHandle>,
    /// Pages that have their frame alone, for as long as nothing of this run is shared with them.
    alone: BTreeSet<GuestPage>,
}

type Bytes = BTreeMap<GuestPage, Box<Page>>;

impl<'a> Engine<'a> {
    pub fn new(
        host: &'a Mutex<Box<dyn Host>>,
        guests: &'a BTreeMap<DomId, Identity>,
        newest: Option<ShareHandle>,
    ) -> Engine<'a> {
        Engine {
            host,
            guests,
            no_memory: false,
            newest,
            alone: BTreeSet::new(),
        }
    }

    /// Shares what is equal. Whatever was nominated and is not shared in the end is its guest's own again.
    pub fn run(mut self, tasks: &[Task]) -> Run {
        let mut outcomes: Vec<Outcome> = Vec::new();
        let mut nominated: Vec<Vec<Nominated>> = Vec::new();
        for task in tasks {
            let mut outcome = Outcome::default();
            nominated.push(self.nominate(task, &mut outcome));
            outcomes.push(outcome);
        }
        let all: Vec<GuestPage> = nominated.iter().flatten().map(|(page, _)| *page).collect();
        let members = tasks.iter().filter_map(|task| task.row.map(|(_, (page, _))| page));
        let bytes = self.read(all.iter().copied().chain(members));
        for ((task, nominated), outcome) in tasks.iter().zip(&nominated).zip(&mut outcomes) {
            self.share(task, nominated, &bytes, outcome);
        }
        let of_outcome = |outcome: &Outcome| [outcome.joined.clone(), outcome.elsewhere.clone()].concat();
        let shared: Vec<GuestPage> = outcomes.iter().flat_map(of_outcome).collect();
        self.give_back(all.iter().copied().filter(|page| !shared.contains(page)));
        Run {
            outcomes,
            nominated: all.len() as u64,
            no_memory: self.no_memory,
            newest: self.newest,
        }
    }

    fn nominate(&mut self, task: &Task, outcome: &mut Outcome) -> Vec<Nominated> {
        let mut nominated = Vec::new();
        for page in &task.pages {
            if self.no_memory || !self.guests.contains_key(&page.domid) {
                continue;
            }
            let nomination = self.nominate_one(*page);
            match nomination {
                Ok(handle) => nominated.push((*page, handle)),
                Err(SharingError::NoMemory) => self.no_memory = true,
                Err(SharingError::Unsharable) => outcome.refused.push(*page),
                Err(error) => {
                    log::debug!("{} of {}: {}", page.pfn(), page.domid, chain(&error));
                    outcome.refused.push(*page);
                }
            }
        }
        nominated
    }

    fn nominate_one(&mut self, page: GuestPage) -> Result<ShareHandle, SharingError> {
        let mut host = self.host.lock();
        // Where nothing is known of handles yet: what is its guest's own gets a new one.
        let own = self.newest.is_none() && matches!(host.references(page), Ok(None));
        let handle = host.nominate(page)?;
        if own || self.newest.is_some_and(|newest| handle > newest) {
            self.newest = Some(handle);
            self.alone.insert(page);
        }
        Ok(handle)
    }

    /// The bytes of pages as they are now; without those of a guest that is not the one it was.
    fn read(&self, pages: impl Iterator<Item = GuestPage>) -> Bytes {
        let mut by_guest: BTreeMap<DomId, Vec<GuestPage>> = BTreeMap::new();
        pages.for_each(|page| by_guest.entry(page.domid).or_default().push(page));
        let mut bytes = Bytes::new();
        for (domid, mut pages) in by_guest {
            let Some(identity) = self.guests.get(&domid) else {
                continue;
            };
            pages.sort_unstable();
            pages.dedup();
            let pfns: Vec<Pfn> = pages.iter().map(|page| page.pfn()).collect();
            let mut buffer: Vec<Page> = vec![[0; PAGE_SIZE]; pfns.len()];
            match read_of(self.host.lock().as_mut(), identity, &pfns, &mut buffer) {
                Ok(Some(read)) => {
                    let there = pages.iter().zip(buffer).zip(read).filter(|(_, read)| *read);
                    bytes.extend(there.map(|((page, bytes), _)| (*page, Box::new(bytes))));
                }
                Ok(None) => {}
                Err(error) => log::debug!("guest {} cannot be read: {}", identity.name, chain(&error)),
            }
        }
        bytes
    }

    /// Compares with one page, and shares what equals it.
    fn share(&mut self, task: &Task, nominated: &[Nominated], bytes: &Bytes, outcome: &mut Outcome) {
        let there: Vec<Nominated> = nominated
            .iter()
            .copied()
            .filter(|(page, _)| bytes.contains_key(page))
            .collect();
        let base = match task.row {
            Some((_, member)) => member,
            // A frame of several pages cannot be given up (xen-sys, SharingError::ClientIsShared), so it stays. Else which one
            // survives is nobody's choice: a guest that could tell would get its own frame, which it may have chosen for a bit
            // that flips, under the page of another.
            None => {
                let of_several = there.iter().find(|(page, _)| self.is_shared(*page));
                outcome.elsewhere.extend(of_several.map(|(page, _)| *page));
                match of_several.or_else(|| there.get(random_below(there.len()))) {
                    Some(base) => *base,
                    None => return,
                }
            }
        };
        let Some(expected) = bytes.get(&base.0) else {
            outcome.left_row = task.row.map(|_| base.0);
            return;
        };
        for page in there {
            if page.0 == base.0 || self.no_memory {
                continue;
            }
            if self.is_shared(page.0) {
                outcome.elsewhere.push(page.0);
                continue;
            }
            if bytes.get(&page.0) != Some(expected) {
                outcome.changed.push(page.0);
                continue;
            }
            let alone = self.alone.remove(&page.0);
            self.alone.remove(&base.0);
            let shared = self.host.lock().share(base, page, alone);
            match shared {
                Ok(()) => outcome.joined.push(page.0),
                Err(SharingError::ClientIsShared) => outcome.elsewhere.push(page.0),
                Err(SharingError::StaleSource) => {
                    // What has joined keeps the frame; the page that was its first does not have it any more.
                    match task.row {
                        Some(_) => outcome.left_row = Some(base.0),
                        None => outcome.changed.push(base.0),
                    }
                    break;
                }
                Err(SharingError::NoMemory) => self.no_memory = true,
                Err(SharingError::StaleClient) => outcome.changed.push(page.0),
                Err(error) => {
                    log::debug!("{} of {}: {}", page.0.pfn(), page.0.domid, chain(&error));
                    outcome.refused.push(page.0);
                }
            }
        }
        if !outcome.joined.is_empty() {
            outcome.base = Some(base);
            if task.row.is_none() && !outcome.changed.contains(&base.0) {
                outcome.joined.push(base.0);
            }
        }
    }

    /// Whether the page's frame is that of other pages, too. Nobody but this engine can make it so.
    fn is_shared(&self, page: GuestPage) -> bool {
        !self.alone.contains(&page) && matches!(self.host.lock().references(page), Ok(Some(pages)) if pages > 1)
    }

    /// Takes nominations back: frames of one page, which needs no memory.
    fn give_back(&self, pages: impl Iterator<Item = GuestPage>) {
        let mut by_guest: BTreeMap<DomId, Vec<Pfn>> = BTreeMap::new();
        pages.for_each(|page| by_guest.entry(page.domid).or_default().push(page.pfn()));
        for (domid, pfns) in by_guest {
            if let Err(error) = self.host.lock().unshare(domid, &pfns) {
                // The guest takes them back itself when it writes to them.
                log::debug!("{} frames of {domid} stay nominated: {}", pfns.len(), chain(&error));
            }
        }
    }
}

/// A number below `end`, 0 for 0. From the keys that the standard library draws for its hash tables, which start with the
/// kernel's randomness.
fn random_below(end: usize) -> usize {
    let random = RandomState::new().build_hasher().finish();
    usize::try_from(random)
        .unwrap_or_default()
        .checked_rem(end)
        .unwrap_or(0)
}
