//! Contents on the disk: pages by their ids, and which page of which guest held which of them.
//!
//! A folder per sharing group, since contents of different groups never mix: packs of raw pages and an index
//! (FORMAT.md). The table of contents is in memory, 26 to 32 bytes a content, and its persistent form is written a
//! part at a time behind it. Nothing on the disk is believed: every page is hashed with the group's key when it is
//! read, so that whatever a crash, a disk or a person did to the files, the worst answer is "not held".
//!
//! [`Store::open`], [`Store::group`], then [`Group::wanted`], [`Group::put`], [`Group::read`], [`Group::save_image`].
mod bits;
mod budget;
mod common;
mod core;
mod error;
mod group;
mod index;
mod load;
mod pack;
mod record;
mod slots;
mod space;
#[cfg(test)]
mod tests;

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::Ordering;

use parking_lot::Mutex;
use rustix::fs::{FlockOperation, flock};
use serde::Serialize;
use xenfold::page::ContentKey;

pub use self::common::COMMON;
pub use self::error::{IndexError, StoreError};
pub use self::group::{Group, HoldNew, Image, ImageInfo};

use self::core::{Core, PAGE_BYTES, chain};
use self::load::make_folder;
use self::space::Shared;

/// Slots of a pack: 256 MiB, so that a terabyte needs 4096 open files.
const PACK_SLOTS: u32 = 65_536;

/// Its id under a group's key is kept, to notice that the key is another one.
const KEY_CHECK: &[u8] = b"xenfold store: which key the contents' ids were made with";

/// Longest name of a group; it is a folder's name.
const NAME_BYTES: usize = 64;

/// All sharing groups' contents under one folder, with one bound.
pub struct Store {
    folder: PathBuf,
    shared: Arc<Shared>,
    groups: Mutex<BTreeMap<String, Entry>>,
}

struct Entry {
    core: Arc<Core>,
    /// Set when somebody has come with the key.
    group: Option<Arc<Group>>,
}

/// What the store holds, and what it takes on the disk.
#[derive(Clone, Debug, Serialize)]
pub struct Stats {
    pub limit_bytes: u64,
    /// Packs and indexes of all groups.
    pub used_bytes: u64,
    /// Memory for the tables of contents.
    pub table_bytes: u64,
    pub groups: Vec<GroupStats>,
}

#[derive(Clone, Debug, Serialize)]
pub struct GroupStats {
    pub name: String,
    /// Whether its key is known since the store was opened.
    pub open: bool,
    pub contents: u64,
    pub images: u64,
    pub templates: u64,
    /// Packs and index.
    pub bytes: u64,
    /// Contents and index values found damaged, and dropped, since the store was opened.
    pub damaged: u64,
    /// Indexes that could not be used since the store was opened.
    pub indexes_set_aside: u64,
}

/// What [`Store::verify`] found.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Verified {
    pub contents: u64,
    pub damaged: u64,
    /// Groups whose key is not known, so that nothing could be said of them.
    pub groups_skipped: u64,
}

/// What [`Store::gc`] dropped.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Collected {
    pub contents: u64,
    pub bytes: u64,
}

impl Store {
    /// Opens or makes the store. Groups' indexes that cannot be used are set aside, logged and counted. The bound
    /// should leave some MiB for each group's index; below that nothing is held.
    /// Errors: the folder cannot be used, or another process uses it.
    pub fn open(folder: &Path, limit_bytes: u64) -> Result<Store, StoreError> {
        Store::open_with(folder, limit_bytes, PACK_SLOTS)
    }

    fn open_with(folder: &Path, limit_bytes: u64, pack_slots: u32) -> Result<Store, StoreError> {
        make_folder(folder)?;
        let path = folder.join(".lock");
        let lock = pack::options().create(true).truncate(false).open(&path);
        let lock = lock.map_err(StoreError::io("cannot open the lock", path))?;
        match flock(&lock, FlockOperation::NonBlockingLockExclusive) {
            Err(rustix::io::Errno::WOULDBLOCK) => return Err(StoreError::InUse(folder.into())),
            locked => locked.map_err(|error| StoreError::io("cannot lock", folder)(error.into()))?,
        }
        let store = Store {
            folder: folder.into(),
            shared: Arc::new(Shared::new(limit_bytes, pack_slots, lock)),
            groups: Mutex::default(),
        };
        let entries = fs::read_dir(folder).map_err(StoreError::io("cannot read the folder", folder))?;
        for entry in entries.flatten() {
            let name = entry.file_name();
            let Some(name) = name.to_str().filter(|name| is_group(name)) else {
                continue;
            };
            if !entry.file_type().is_ok_and(|kind| kind.is_dir()) {
                continue;
            }
            if let Err(error) = store.open_core(name) {
                log::error!("{}", chain(&error, &format!("the group {name} cannot be used")));
            }
        }
        // The bound may be lower than the last time.
        if !store.shared.make_room(0) {
            log::warn!("{}: the store is full of templates and indexes", folder.display());
        }
        Ok(store)
    }

    fn open_core(&self, name: &str) -> Result<Arc<Core>, StoreError> {
        let core = Arc::new(Core::open(name, &self.folder.join(name), &self.shared)?);
        self.shared.add(&core);
        let entry = Entry {
            core: core.clone(),
            group: None,
        };
        self.groups.lock().insert(name.into(), entry);
        Ok(core)
    }

    /// The group of this name, made if there is none. When its contents were made with another key they are dropped,
    /// and handles of the group that were given out before hold nothing any more.
    /// Names: letters, digits, '.', '_', '-', at most 64, the first not '.'.
    pub fn group(&self, name: &str, key: &ContentKey) -> Result<Arc<Group>, StoreError> {
        if !is_group(name) {
            return Err(StoreError::Name {
                what: "group",
                name: name.into(),
                most: NAME_BYTES,
            });
        }
        let mut groups = self.groups.lock();
        let mut core = match groups.get(name) {
            Some(Entry { group: Some(group), .. }) if group.key == *key => return Ok(group.clone()),
            Some(entry) => Some(entry.core.clone()),
            None => None,
        };
        let check = key.id(KEY_CHECK);
        if let Some(old) = &core {
            let other = old
                .key_check
                .lock()
                .map_or(old.state.read().contents() > 0, |stored| stored != check);
            if other {
                log::warn!("the group {name} has another key: its contents are dropped");
                groups.remove(name);
                old.retire()?;
                core = None;
            }
        }
        let core = match core {
            Some(core) => core,
            None => {
                let core = Arc::new(Core::open(name, &self.folder.join(name), &self.shared)?);
                self.shared.add(&core);
                core
            }
        };
        if core.key_check.lock().is_none() {
            core.set_key_check(&check)?;
        }
        let group = Arc::new(Group {
            core: core.clone(),
            key: key.clone(),
        });
        let entry = Entry {
            core,
            group: Some(group.clone()),
        };
        groups.insert(name.into(), entry);
        Ok(group)
    }

    fn cores(&self) -> Vec<(Arc<Core>, Option<Arc<Group>>)> {
        let groups = self.groups.lock();
        let entries = groups.values();
        entries.map(|entry| (entry.core.clone(), entry.group.clone())).collect()
    }

    pub fn stats(&self) -> Stats {
        let mut table_bytes = 0;
        let groups = self.cores().into_iter().map(|(core, group)| {
            let index_bytes = core.index_bytes();
            let (images, templates) = {
                let images = core.images.lock();
                let templates = images.values().filter(|head| head.template).count() as u64;
                (images.len() as u64 - templates, templates)
            };
            let state = core.state.read();
            table_bytes += state.memory_bytes();
            GroupStats {
                name: core.name.clone(),
                open: group.is_some(),
                contents: state.contents(),
                images,
                templates,
                bytes: state.charged() * PAGE_BYTES + index_bytes,
                damaged: core.damaged.load(Ordering::Relaxed),
                indexes_set_aside: core.indexes_set_aside.load(Ordering::Relaxed),
            }
        });
        let groups = groups.collect();
        Stats {
            limit_bytes: self.shared.budget.limit_bytes(),
            used_bytes: self.shared.budget.used_bytes(),
            table_bytes,
            groups,
        }
    }

    /// Reads and hashes every content of all groups whose key is known, and drops damaged ones.
    pub fn verify(&self) -> Result<Verified, StoreError> {
        let mut verified = Verified::default();
        for (core, group) in self.cores() {
            let Some(group) = group else {
                verified.groups_skipped += 1;
                continue;
            };
            let (contents, damaged) = group.verify();
            verified.contents += contents;
            verified.damaged += damaged;
            if damaged > 0 {
                core.flush()?;
            }
        }
        Ok(verified)
    }

    /// Drops what no image or template names and nobody holds ([`Group::hold_new`]), gives its room back, and removes
    /// indexes that were set aside.
    pub fn gc(&self) -> Result<Collected, StoreError> {
        let before = self.shared.budget.used_bytes();
        let mut contents = 0;
        for (core, _) in self.cores() {
            core.recount()?;
            let held_from = core.held_from();
            contents += core.state.write().remove_unnamed(held_from, u64::MAX);
            core.punch_slack(u64::MAX);
            core.remove_aside();
            core.flush()?;
        }
        self.shared.make_room(0);
        Ok(Collected {
            contents,
            bytes: before.saturating_sub(self.shared.budget.used_bytes()),
        })
    }

    /// Writes all groups' indexes: what a crash would lose.
    pub fn flush(&self) -> Result<(), StoreError> {
        self.cores().into_iter().try_for_each(|(core, _)| core.flush())
    }

    /// Removes a group with all its contents, images and templates. There need not be such a group.
    pub fn remove_group(&self, name: &str) -> Result<(), StoreError> {
        let Some(entry) = self.groups.lock().remove(name) else {
            return Ok(());
        };
        entry.core.retire()
    }
}

impl Drop for Store {
    fn drop(&mut self) {
        self.shared.wait_for_flush();
    }
}

fn is_name(name: &str) -> bool {
    let allowed = |byte: u8| byte.is_ascii_alphanumeric() || matches!(byte, b'.' | b'_' | b'-');
    !name.is_empty() && name.bytes().all(allowed)
}

fn is_group(name: &str) -> bool {
    name.len() <= NAME_BYTES && !name.starts_with('.') && is_name(name)
}
