//! Reading a group's folder, of which nothing is believed.
use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::io;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use xenfold::page::ContentId;

use super::core::{INDEX, PAGE_BYTES};
use super::error::{IndexError, StoreError};
use super::index::{Index, Loaded};
use super::pack;
use super::record::BLOCK_SLOTS;
use super::slots::Slots;
use super::space::Shared;

/// What a folder holds once it is read.
pub(super) struct Read {
    pub slots: Slots,
    pub index: Index,
    pub loaded: Loaded,
    pub damaged: u64,
}

pub(super) fn make_folder(folder: &Path) -> Result<(), StoreError> {
    use std::os::unix::fs::{DirBuilderExt, PermissionsExt};
    fs::DirBuilder::new()
        .recursive(true)
        .mode(0o700)
        .create(folder)
        .and_then(|()| {
            let mode = fs::metadata(folder)?.permissions().mode() & 0o777;
            // Contents are guests' memory: nobody else may look, whatever the folder was before.
            if mode & 0o077 == 0 {
                return Ok(());
            }
            fs::set_permissions(folder, fs::Permissions::from_mode(0o700))
        })
        .map_err(StoreError::io("cannot make the folder", folder))
}

/// Opens the packs and reads the index into a table of slots. `StoreError::Index`: the index is unusable.
pub(super) fn read(folder: &Path, shared: &Arc<Shared>, fail: &Arc<AtomicBool>) -> Result<Read, StoreError> {
    let pack_slots = shared.pack_slots;
    let mut slots = Slots::new(pack_slots);
    let mut lengths: BTreeMap<u32, u64> = BTreeMap::new();
    let entries = fs::read_dir(folder).map_err(StoreError::io("cannot read the folder", folder))?;
    let numbers = entries
        .flatten()
        .filter_map(|entry| pack::number(entry.file_name().to_str()?));
    let numbers: BTreeSet<u32> = numbers.collect();
    for number in &numbers {
        let path = pack::path(folder, *number);
        // Packs are numbered without gaps unless somebody removed some; a number without sense must not cost memory.
        if *number as usize > numbers.len() + 1024 {
            log::warn!("{}: no pack of this store", path.display());
            continue;
        }
        match pack::options().open(&path) {
            Ok(file) => {
                lengths.insert(*number, file.metadata().map_or(0, |meta| meta.len()));
                slots.load_pack(*number, Arc::new(file));
            }
            Err(error) => log::error!("{}: {error}", path.display()),
        }
    }
    let path = folder.join(INDEX);
    let mut damaged = 0;
    let mut sink = |block: u32, ids: &[(u32, ContentId)]| {
        let damaged_before = damaged;
        for (at, id) in ids {
            let slot = block.checked_mul(BLOCK_SLOTS).and_then(|first| first.checked_add(*at));
            let entered = slot.is_some_and(|slot| {
                let end = (u64::from(slot % pack_slots) + 1) * PAGE_BYTES;
                let there = lengths.get(&(slot / pack_slots)).is_some_and(|length| *length >= end);
                there && slots.load(slot, *id)
            });
            damaged += u64::from(!entered);
        }
        if damaged > damaged_before {
            slots.mark_dirty(block);
        }
    };
    let opened = Index::open(&path, &shared.budget, pack_slots, fail, &mut sink);
    match opened {
        Ok((index, loaded)) => {
            shared.budget.charge_existing(slots.charged() * PAGE_BYTES);
            Ok(Read {
                slots,
                index,
                loaded,
                damaged,
            })
        }
        Err(IndexError::Io(source)) if !damaged_io(&source) => {
            Err(StoreError::io("cannot open the index", path)(source))
        }
        Err(source) => Err(StoreError::Index { path, source }),
    }
}

/// Whether an error tells of the file's contents and not of its surroundings (a full disk, a folder that is read-only).
pub(super) fn damaged_io(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::InvalidData | io::ErrorKind::UnexpectedEof)
}
