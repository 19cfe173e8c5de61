//! One group's folder: its slots, its packs, its index, its images.
//!
//! Locks, in the order in which they are taken: the store's `space`, then `index`, then `state`. The system calls
//! that move pages are made under none of them.
use std::collections::{BTreeMap, BTreeSet};
use std::fs::{self, File};
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use parking_lot::{Mutex, RwLock};
use xenfold::page::{ContentId, PAGE_SIZE, Pfn};

use super::error::{IndexError, StoreError};
use super::index::{ImageRead, Index};
use super::load::{self, damaged_io, make_folder};
use super::pack;
use super::record::ImageHead;
use super::slots::{Slot, Slots};
use super::space::Shared;

pub(super) const INDEX: &str = "index.redb";
const ASIDE: &str = "index.damaged";

/// Blocks in one transaction: about 0.5 MiB, so that the index, which redb copies before it changes it, grows little.
const FLUSH_BLOCKS: usize = 1024;

/// Contents that a crash may cost: they are flushed together when so many are new.
pub(super) const FLUSH_CONTENTS: u64 = 65_536;

pub(super) const PAGE_BYTES: u64 = PAGE_SIZE as u64;

pub(super) struct Core {
    pub name: String,
    pub folder: PathBuf,
    pub shared: Arc<Shared>,
    pub state: RwLock<Slots>,
    index: Mutex<Index>,
    /// Distinct ids of images that are being saved. They count as named, so that room for their own image is not made
    /// at their expense. Changed under `index`.
    saving: Mutex<Vec<Arc<Vec<ContentId>>>>,
    /// Key in the index → description.
    pub images: Mutex<BTreeMap<String, ImageHead>>,
    pub key_check: Mutex<Option<ContentId>>,
    /// Removed, or replaced since the key changed: nothing is held, nothing is taken.
    pub closed: AtomicBool,
    /// Contents and index values found damaged since the store was opened.
    pub damaged: AtomicU64,
    pub indexes_set_aside: AtomicU64,
    aside_bytes: AtomicU64,
    unflushed: AtomicU64,
    /// The epochs from which on contents are held for images to come, with how many want that.
    pub holds: Mutex<BTreeMap<u16, usize>>,
    fail_index: Arc<AtomicBool>,
}

impl Core {
    pub fn open(name: &str, folder: &Path, shared: &Arc<Shared>) -> Result<Core, StoreError> {
        make_folder(folder)?;
        let fail_index = Arc::new(AtomicBool::new(false));
        let mut set_aside = 0;
        let mut aside_bytes = fs::metadata(folder.join(ASIDE)).map_or(0, |meta| meta.len());
        let read = match load::read(folder, shared, &fail_index) {
            Err(StoreError::Index { source, path }) => {
                log::error!(
                    "{}",
                    chain(&source, &format!("the index {} is set aside", path.display()))
                );
                fs::rename(&path, folder.join(ASIDE)).map_err(StoreError::io("cannot set aside the index", &path))?;
                aside_bytes = fs::metadata(folder.join(ASIDE)).map_or(0, |meta| meta.len());
                set_aside = 1;
                load::read(folder, shared, &fail_index)?
            }
            read => read?,
        };
        shared.budget.charge_existing(aside_bytes);
        let core = Core {
            name: name.into(),
            folder: folder.into(),
            shared: shared.clone(),
            state: RwLock::new(read.slots),
            index: Mutex::new(read.index),
            saving: Mutex::default(),
            images: Mutex::new(read.loaded.images.into_iter().collect()),
            key_check: Mutex::new(read.loaded.key_check),
            closed: AtomicBool::new(false),
            damaged: AtomicU64::new(read.damaged + read.loaded.damaged),
            indexes_set_aside: AtomicU64::new(set_aside),
            aside_bytes: AtomicU64::new(aside_bytes),
            unflushed: AtomicU64::new(0),
            holds: Mutex::default(),
            fail_index,
        };
        core.trim_packs();
        if let Err(error) = core.recount() {
            log::error!("{}", chain(&error, "images could not be counted"));
        }
        Ok(core)
    }

    pub fn is_closed(&self) -> bool {
        self.closed.load(Ordering::Acquire)
    }

    fn index_path(&self) -> PathBuf {
        self.folder.join(INDEX)
    }

    pub fn index_bytes(&self) -> u64 {
        self.index.lock().charged_bytes() + self.aside_bytes.load(Ordering::Relaxed)
    }

    /// Gives back what lies in the packs behind and between contents, after a crash above all. What cannot be given
    /// back stays charged.
    fn trim_packs(&self) {
        let mut state = self.state.write();
        for number in 0..state.packs() {
            let Some(file) = state.file(number) else { continue };
            let (free, end) = state.free_of(number);
            let base = number * state.pack_slots();
            let length = file.metadata().map_or(0, |meta| meta.len());
            let behind = length.div_ceil(PAGE_BYTES);
            if behind > u64::from(end)
                && let Err(error) = file.set_len(u64::from(end) * PAGE_BYTES)
            {
                log::warn!("{}: {error}", pack::path(&self.folder, number).display());
                let rest = u64::from(end)..behind.min(u64::from(state.pack_slots()));
                let charged = rest.filter(|at| state.charge_slack(base + *at as u32)).count() as u64;
                self.shared.budget.charge_existing(charged * PAGE_BYTES);
            }
            let held_bytes = u64::from(end - free.len() as u32) * PAGE_BYTES;
            if pack::allocated_bytes(&file).is_ok_and(|bytes| bytes <= held_bytes) {
                continue;
            }
            for (first, length) in pack::runs(&free, state.pack_slots()) {
                let slots = free.get(first..first + length).unwrap_or_default();
                let start = slots.first().copied().unwrap_or(0);
                if pack::punch(&file, start, length as u32).is_err() {
                    let charged = slots.iter().filter(|at| state.charge_slack(base + **at)).count() as u64;
                    self.shared.budget.charge_existing(charged * PAGE_BYTES);
                }
            }
        }
        drop(state);
        self.drop_empty_packs();
    }

    /// Removes packs at the end that hold nothing.
    pub fn drop_empty_packs(&self) {
        let mut state = self.state.write();
        if self.is_closed() {
            return;
        }
        let (numbers, charged) = state.pop_empty();
        for number in numbers {
            // Still under the lock: a new pack of this number must not be removed.
            if let Err(error) = fs::remove_file(pack::path(&self.folder, number))
                && error.kind() != io::ErrorKind::NotFound
            {
                log::warn!("{}: {error}", pack::path(&self.folder, number).display());
            }
        }
        self.shared.budget.refund(charged * PAGE_BYTES);
    }

    /// Files for the packs of these taken slots, by pack. A pack whose file was removed loses its contents and gets a
    /// new file.
    pub fn files_for(&self, slots: &[Slot]) -> Result<BTreeMap<u32, Arc<File>>, StoreError> {
        let mut state = self.state.write();
        let packs: BTreeSet<u32> = slots.iter().map(|slot| slot / state.pack_slots()).collect();
        let mut files = BTreeMap::new();
        for number in packs {
            let path = pack::path(&self.folder, number);
            let mut file = state.file(number);
            if file.as_ref().is_some_and(|file| pack::is_gone(file)) {
                let (dropped, uncharged) = state.lose_pack(number);
                log::error!("{} was removed: {dropped} contents are lost", path.display());
                self.damaged.fetch_add(dropped, Ordering::Relaxed);
                self.shared.budget.refund(uncharged * PAGE_BYTES);
                file = None;
            }
            let file = match file {
                Some(file) => file,
                None => {
                    let file = pack::create(&path).map_err(StoreError::io("cannot make the pack", &path))?;
                    let file = Arc::new(file);
                    state.set_file(number, Some(file.clone()));
                    file
                }
            };
            files.insert(number, file);
        }
        Ok(files)
    }

    /// Drops a content that is not what it should be. False: it is not there any more.
    pub fn drop_damaged(&self, id: &ContentId, slot: Slot) -> bool {
        let dropped = self.state.write().remove(id, slot);
        if dropped {
            self.damaged.fetch_add(1, Ordering::Relaxed);
            log::warn!(
                "{}: the content {id:?} in slot {slot} is damaged: dropped",
                self.folder.display()
            );
        }
        dropped
    }

    /// Gives up to `most` slots of slack back to the file system; returns how many.
    pub fn punch_slack(&self, most: u64) -> u64 {
        let mut slots = Vec::new();
        let (files, pack_slots) = {
            let mut state = self.state.write();
            state.take_slack(usize::try_from(most).unwrap_or(usize::MAX), &mut slots);
            let files: Vec<_> = (0..state.packs()).map(|number| state.file(number)).collect();
            (files, state.pack_slots())
        };
        let mut failed = BTreeSet::new();
        for (first, length) in pack::runs(&slots, pack_slots) {
            let start = slots.get(first).copied().unwrap_or(0);
            let file = files.get((start / pack_slots) as usize).and_then(Option::as_ref);
            let punched = file.map_or(Ok(()), |file| pack::punch(file, start % pack_slots, length as u32));
            if let Err(error) = punched {
                log::debug!("{}: no room can be given back: {error}", self.folder.display());
                failed.insert(first);
            }
        }
        let mut given_back = 0;
        let mut state = self.state.write();
        for (first, length) in pack::runs(&slots, pack_slots) {
            for slot in slots.get(first..first + length).unwrap_or_default() {
                if failed.contains(&first) {
                    state.release(*slot);
                } else {
                    given_back += u64::from(state.punched(*slot));
                }
            }
        }
        drop(state);
        self.shared.budget.refund(given_back * PAGE_BYTES);
        given_back
    }

    /// Notes that contents are new; true when it is time to flush.
    pub fn note_new(&self, contents: u64) -> bool {
        self.unflushed.fetch_add(contents, Ordering::Relaxed) + contents >= FLUSH_CONTENTS
    }

    /// Writes to the index what changed in the table of slots.
    pub fn flush(&self) -> Result<(), StoreError> {
        let mut index = self.index.lock();
        self.unflushed.store(0, Ordering::Relaxed);
        loop {
            if self.is_closed() {
                return Ok(());
            }
            let blocks = self.state.write().take_dirty(FLUSH_BLOCKS);
            if blocks.is_empty() {
                self.drop_empty_packs();
                return Ok(());
            }
            if let Err(source) = index.write_blocks(&blocks) {
                let mut state = self.state.write();
                blocks.iter().for_each(|(block, _)| state.mark_dirty(*block));
                drop(state);
                return Err(self.index_failed(&mut index, source));
            }
        }
    }

    /// After an error of the index: when the file itself is unusable, a new one takes its place. The table in memory
    /// survives that; images do not.
    fn index_failed(&self, index: &mut Index, source: IndexError) -> StoreError {
        let damaged = match &source {
            IndexError::Panicked => true,
            IndexError::Redb(error) => matches!(**error, redb::Error::Corrupted(_)),
            IndexError::Io(error) => damaged_io(error),
            _ => false,
        };
        if damaged && !self.is_closed() {
            self.renew_index(index);
        }
        StoreError::Index {
            path: self.index_path(),
            source,
        }
    }

    fn renew_index(&self, index: &mut Index) {
        log::error!(
            "{}: the index is damaged; a new one is made, without images",
            self.folder.display()
        );
        index.abandon();
        let aside = self.folder.join(ASIDE);
        if fs::rename(self.index_path(), &aside).is_ok() {
            let bytes = fs::metadata(&aside).map_or(0, |meta| meta.len());
            self.shared
                .budget
                .refund(self.aside_bytes.swap(bytes, Ordering::Relaxed));
            self.shared.budget.charge_existing(bytes);
        }
        self.indexes_set_aside.fetch_add(1, Ordering::Relaxed);
        let pack_slots = self.state.read().pack_slots();
        let new = Index::open(
            &self.index_path(),
            &self.shared.budget,
            pack_slots,
            &self.fail_index,
            &mut |_, _| {},
        );
        match new {
            Ok((new, _)) => *index = new,
            Err(error) => log::error!("{}", chain(&error, "no new index can be made")),
        }
        if let Some(check) = *self.key_check.lock()
            && let Err(error) = index.set_key_check(&check)
        {
            log::error!("{}", chain(&error, "the key's check cannot be written"));
        }
        self.images.lock().clear();
        let mut state = self.state.write();
        state.unname_all();
        self.saving.lock().iter().for_each(|ids| state.name(ids));
        state.mark_held_dirty();
    }

    /// Removes an index that was set aside.
    pub fn remove_aside(&self) {
        if fs::remove_file(self.folder.join(ASIDE)).is_ok() {
            self.shared.budget.refund(self.aside_bytes.swap(0, Ordering::Relaxed));
        }
    }

    pub fn set_key_check(&self, check: &ContentId) -> Result<(), StoreError> {
        let mut index = self.index.lock();
        let written = index.set_key_check(check);
        written.map_err(|source| self.index_failed(&mut index, source))?;
        *self.key_check.lock() = Some(*check);
        Ok(())
    }

    /// Replaces the image `key`, for which room is made, and counts anew in how many images its contents are.
    pub fn write_image(
        &self,
        key: &str,
        template: bool,
        saved_unix_s: u64,
        pages: &[(Pfn, ContentId)],
    ) -> Result<(), StoreError> {
        let new = Arc::new(distinct(pages));
        {
            let _index = self.index.lock();
            self.saving.lock().push(new.clone());
            self.state.write().name(&new);
        }
        // Twice the ids' bytes and some: redb rounds values up, and copies before it frees.
        let bytes = (pages.len() as u64).saturating_mul(40).saturating_add(64 << 10);
        let room = self.shared.make_room(bytes);
        let mut index = self.index.lock();
        let written = match room {
            true => self.write_image_now(&mut index, key, template, saved_unix_s, pages),
            false => Err(StoreError::Full {
                limit_bytes: self.shared.budget.limit_bytes(),
            }),
        };
        self.saving.lock().retain(|ids| !Arc::ptr_eq(ids, &new));
        match written {
            Ok(old) => self.state.write().unname(&old),
            Err(error) => {
                self.state.write().unname(&new);
                return Err(error);
            }
        }
        Ok(())
    }

    /// Returns the ids of the image that was replaced.
    fn write_image_now(
        &self,
        index: &mut Index,
        key: &str,
        template: bool,
        saved_unix_s: u64,
        pages: &[(Pfn, ContentId)],
    ) -> Result<Vec<ContentId>, StoreError> {
        if self.is_closed() {
            return Err(StoreError::Closed(self.name.clone()));
        }
        let old = self.distinct_of(index, key)?;
        let head = index.write_image(key, template, saved_unix_s, pages);
        let head = head.map_err(|source| self.index_failed(index, source))?;
        self.images.lock().insert(key.into(), head);
        Ok(old)
    }

    /// False: there was none.
    pub fn remove_image(&self, key: &str) -> Result<bool, StoreError> {
        let mut index = self.index.lock();
        if !self.images.lock().contains_key(key) {
            return Ok(false);
        }
        let old = self.distinct_of(&mut index, key)?;
        let removed = index.remove_image(key);
        removed.map_err(|source| self.index_failed(&mut index, source))?;
        self.images.lock().remove(key);
        self.state.write().unname(&old);
        Ok(true)
    }

    /// An image that its index cannot give up no longer protects contents.
    pub fn forget_image(&self, key: &str) {
        self.images.lock().remove(key);
        if let Err(error) = self.recount() {
            log::warn!("{}", chain(&error, "images could not be counted"));
        }
    }

    fn distinct_of(&self, index: &mut Index, key: &str) -> Result<Vec<ContentId>, StoreError> {
        if !self.images.lock().contains_key(key) {
            return Ok(Vec::new());
        }
        let image = index.read_image(key);
        let image = image.map_err(|source| self.index_failed(index, source))?;
        Ok(image.map_or_else(Vec::new, |(_, pages)| distinct(&pages)))
    }

    pub fn read_image(&self, key: &str) -> Result<Option<ImageRead>, StoreError> {
        if !self.images.lock().contains_key(key) {
            return Ok(None);
        }
        let mut index = self.index.lock();
        let image = index.read_image(key);
        image.map_err(|source| self.index_failed(&mut index, source))
    }

    /// Counts anew, from the images, in how many of them each content is.
    pub fn recount(&self) -> Result<(), StoreError> {
        let mut index = self.index.lock();
        let keys: Vec<String> = self.images.lock().keys().cloned().collect();
        {
            let mut state = self.state.write();
            state.unname_all();
            self.saving.lock().iter().for_each(|ids| state.name(ids));
        }
        for key in keys {
            let ids = self.distinct_of(&mut index, &key)?;
            self.state.write().name(&ids);
        }
        Ok(())
    }

    /// Contents last used from this epoch on are not to be dropped before images are.
    pub fn held_from(&self) -> u32 {
        self.holds
            .lock()
            .keys()
            .next()
            .map_or(u32::MAX, |epoch| u32::from(*epoch))
    }

    /// The group is no more: nothing is held from here on, and the folder goes.
    pub fn retire(&self) -> Result<(), StoreError> {
        let mut index = self.index.lock();
        let mut state = self.state.write();
        self.closed.store(true, Ordering::Release);
        self.shared.budget.refund(state.clear() * PAGE_BYTES);
        self.images.lock().clear();
        drop(state);
        index.abandon();
        self.shared.budget.refund(self.aside_bytes.swap(0, Ordering::Relaxed));
        match fs::remove_dir_all(&self.folder) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => {
                Err(StoreError::io("cannot remove the group's folder", &self.folder)(error))
            }
            _ => Ok(()),
        }
    }

    #[cfg(test)]
    pub fn fail_index(&self, fail: bool) {
        self.fail_index.store(fail, Ordering::Relaxed);
    }
}

impl Drop for Core {
    fn drop(&mut self) {
        if let Err(error) = self.flush() {
            log::warn!("{}", chain(&error, "contents since the last flush are lost"));
        }
        self.index.lock().abandon();
        if !self.is_closed() {
            let charged = self.state.write().clear() * PAGE_BYTES;
            self.shared
                .budget
                .refund(charged + self.aside_bytes.load(Ordering::Relaxed));
        }
    }
}

fn distinct(pages: &[(Pfn, ContentId)]) -> Vec<ContentId> {
    let mut ids: Vec<ContentId> = pages.iter().map(|(_, id)| *id).collect();
    ids.sort_unstable_by_key(|id| id.0);
    ids.dedup();
    ids
}

/// An error with its causes in one line.
pub(super) fn chain(error: &dyn std::error::Error, what: &str) -> String {
    let mut line = format!("{what}: {error}");
    let mut source = error.source();
    while let Some(error) = source {
        line.push_str(&format!(": {error}"));
        source = error.source();
    }
    line
}
