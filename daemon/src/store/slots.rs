//! Which content is in which slot, in memory: 20 bytes a slot and 6 to 12 bytes a content for the lookup.
//!
//! A slot is *taken* while it holds a content or is being written, *charged* while its bytes count as used. Charged
//! and not taken is slack: bytes on the disk that the next put uses again, or that are given back to the file system
//! when somebody else needs the room.
use std::collections::BTreeMap;
use std::fs::File;
use std::sync::Arc;
use std::sync::atomic::{AtomicU16, Ordering};

use hashbrown::HashTable;
use xenfold::page::ContentId;

use super::bits::Bits;
use super::record::BLOCK_SLOTS;

/// Where a content lies: pack × slots per pack + slot in the pack.
pub(super) type Slot = u32;

pub(super) struct Slots {
    pack_slots: u32,
    lookup: HashTable<Slot>,
    packs: Vec<Pack>,
}

struct Pack {
    file: Option<Arc<File>>,
    ids: Box<[ContentId]>,
    /// In how many images and templates the content is.
    images: Box<[u16]>,
    /// When the content was put or asked for last, in epochs of the store. Atomic: set by readers.
    used: Box<[AtomicU16]>,
    held: Bits,
    taken: Bits,
    charged: Bits,
    /// Blocks that the index does not have as they are.
    dirty: Bits,
}

impl Pack {
    fn new(slots: u32) -> Pack {
        let count = slots as usize;
        Pack {
            file: None,
            ids: vec![ContentId([0; 16]); count].into(),
            images: vec![0; count].into(),
            used: (0..count).map(|_| AtomicU16::new(0)).collect(),
            held: Bits::new(slots),
            taken: Bits::new(slots),
            charged: Bits::new(slots),
            dirty: Bits::new(slots.div_ceil(BLOCK_SLOTS)),
        }
    }

    fn images(&self, slot: u32) -> u16 {
        self.images.get(slot as usize).copied().unwrap_or(0)
    }

    fn used(&self, slot: u32) -> u16 {
        self.used
            .get(slot as usize)
            .map_or(0, |used| used.load(Ordering::Relaxed))
    }
}

/// The hash table takes its control bits from the top of the hash and its position from the bottom.
fn hash(id: &ContentId) -> u64 {
    id.lookup_key().wrapping_mul(0x9e37_79b9_7f4a_7c15)
}

fn id_in(packs: &[Pack], pack_slots: u32, slot: Slot) -> Option<&ContentId> {
    let pack = packs.get((slot / pack_slots) as usize)?;
    pack.ids.get((slot % pack_slots) as usize)
}

impl Slots {
    /// `pack_slots`: a multiple of [`BLOCK_SLOTS`], above 0.
    pub fn new(pack_slots: u32) -> Slots {
        Slots {
            pack_slots,
            lookup: HashTable::new(),
            packs: Vec::new(),
        }
    }

    pub fn pack_slots(&self) -> u32 {
        self.pack_slots
    }

    pub fn contents(&self) -> u64 {
        self.lookup.len() as u64
    }

    pub fn charged(&self) -> u64 {
        self.packs.iter().map(|pack| u64::from(pack.charged.ones())).sum()
    }

    /// Bytes of memory for the contents' index.
    pub fn memory_bytes(&self) -> u64 {
        let slots = self.packs.len() as u64 * u64::from(self.pack_slots);
        self.lookup.allocation_size() as u64 + slots * 20 + slots / 2
    }

    pub fn find(&self, id: &ContentId) -> Option<Slot> {
        let same = |slot: &Slot| id_in(&self.packs, self.pack_slots, *slot) == Some(id);
        self.lookup.find(hash(id), same).copied()
    }

    /// Finds a content and enters that it was asked for in this epoch.
    pub fn find_and_touch(&self, id: &ContentId, epoch: u16) -> Option<Slot> {
        let slot = self.find(id)?;
        let (pack, at) = self.at(slot)?;
        pack.used.get(at as usize)?.store(epoch, Ordering::Relaxed);
        Some(slot)
    }

    fn at(&self, slot: Slot) -> Option<(&Pack, u32)> {
        Some((
            self.packs.get((slot / self.pack_slots) as usize)?,
            slot % self.pack_slots,
        ))
    }

    fn at_mut(&mut self, slot: Slot) -> Option<(&mut Pack, u32)> {
        let pack = self.packs.get_mut((slot / self.pack_slots) as usize)?;
        Some((pack, slot % self.pack_slots))
    }

    pub fn file(&self, pack: u32) -> Option<Arc<File>> {
        self.packs.get(pack as usize)?.file.clone()
    }

    pub fn set_file(&mut self, pack: u32, file: Option<Arc<File>>) {
        if let Some(pack) = self.packs.get_mut(pack as usize) {
            pack.file = file;
        }
    }

    pub fn packs(&self) -> u32 {
        self.packs.len() as u32
    }

    /// Takes up to `most` slots of slack, lowest first so that packs at the end run empty.
    pub fn take_slack(&mut self, most: usize, slots: &mut Vec<Slot>) {
        let end = slots.len() + most;
        for (pack, base) in self.packs.iter_mut().zip((0..).step_by(self.pack_slots as usize)) {
            if slots.len() >= end {
                return;
            }
            if pack.charged.ones() == 0 {
                continue;
            }
            let free: Vec<u32> = pack.charged.without(&pack.taken).take(end - slots.len()).collect();
            for at in free {
                pack.taken.set(at);
                slots.push(base + at);
            }
        }
    }

    /// Takes `most` slots that are not charged yet and charges them; new packs come into being as needed. Fewer come
    /// only when slot numbers run out (16 TiB).
    pub fn take_fresh(&mut self, most: usize, slots: &mut Vec<Slot>) {
        let end = slots.len() + most;
        let mut number = 0u32;
        while slots.len() < end {
            let Some(base) = number
                .checked_mul(self.pack_slots)
                .filter(|base| base.checked_add(self.pack_slots).is_some())
            else {
                return;
            };
            if number as usize == self.packs.len() {
                self.packs.push(Pack::new(self.pack_slots));
            }
            if let Some(pack) = self.packs.get_mut(number as usize)
                && (pack.taken.ones() < self.pack_slots && pack.charged.ones() < self.pack_slots)
            {
                let free: Vec<u32> = pack
                    .taken
                    .neither(&pack.charged, self.pack_slots)
                    .take(end - slots.len())
                    .collect();
                for at in free {
                    pack.taken.set(at);
                    pack.charged.set(at);
                    slots.push(base + at);
                }
            }
            number += 1;
        }
    }

    /// Enters what has been written to a taken slot. False: the content is held elsewhere, and the slot is slack.
    pub fn insert(&mut self, slot: Slot, id: ContentId, epoch: u16) -> bool {
        if self.find(&id).is_some() {
            self.release(slot);
            return false;
        }
        let Some((pack, at)) = self.at_mut(slot) else {
            return false;
        };
        if !pack.taken.get(at) || !pack.held.set(at) {
            return false;
        }
        pack.dirty.set(at / BLOCK_SLOTS);
        if let Some(place) = pack.ids.get_mut(at as usize) {
            *place = id;
        }
        if let Some(images) = pack.images.get_mut(at as usize) {
            *images = 0;
        }
        if let Some(used) = pack.used.get(at as usize) {
            used.store(epoch, Ordering::Relaxed);
        }
        let (packs, pack_slots) = (&self.packs, self.pack_slots);
        let rehash = |slot: &Slot| id_in(packs, pack_slots, *slot).map_or(0, hash);
        self.lookup.insert_unique(hash(&id), slot, rehash);
        true
    }

    /// Enters what the index says at open. False: the slot or the content was entered before, or cannot be.
    pub fn load(&mut self, slot: Slot, id: ContentId) -> bool {
        let number = slot / self.pack_slots;
        // The bound keeps a damaged slot number from allocating packs without end; there is no file for them anyway.
        if number as usize >= self.packs.len() || self.find(&id).is_some() {
            return false;
        }
        let Some((pack, at)) = self.at_mut(slot) else {
            return false;
        };
        if !pack.taken.set(at) {
            return false;
        }
        pack.charged.set(at);
        let entered = self.insert(slot, id, 0);
        if let Some((pack, at)) = self.at_mut(slot) {
            pack.dirty.clear(at / BLOCK_SLOTS);
        }
        entered
    }

    /// Makes room for a pack that is on the disk.
    pub fn load_pack(&mut self, number: u32, file: Arc<File>) {
        while self.packs.len() <= number as usize {
            self.packs.push(Pack::new(self.pack_slots));
        }
        self.set_file(number, Some(file));
    }

    /// A taken slot that was not written, or not needed: slack from now on.
    pub fn release(&mut self, slot: Slot) {
        if let Some((pack, at)) = self.at_mut(slot)
            && !pack.held.get(at)
        {
            pack.taken.clear(at);
        }
    }

    /// Drops a content if it is where it is said to be; its slot is slack from now on.
    pub fn remove(&mut self, id: &ContentId, slot: Slot) -> bool {
        if self.find(id) != Some(slot) {
            return false;
        }
        if let Ok(entry) = self.lookup.find_entry(hash(id), |other| *other == slot) {
            entry.remove();
        }
        if let Some((pack, at)) = self.at_mut(slot) {
            pack.held.clear(at);
            pack.taken.clear(at);
            pack.dirty.set(at / BLOCK_SLOTS);
        }
        true
    }

    /// Drops all contents of a pack whose file is gone; slots that are being written stay taken. Returns contents
    /// dropped and slots no longer charged.
    pub fn lose_pack(&mut self, number: u32) -> (u64, u64) {
        let (held, before) = self.contents_of(number);
        let dropped = held.iter().filter(|(slot, id)| self.remove(id, *slot)).count();
        let Some(pack) = self.packs.get_mut(number as usize) else {
            return (0, 0);
        };
        pack.file = None;
        pack.charged = pack.taken.clone();
        (dropped as u64, u64::from(before.saturating_sub(pack.charged.ones())))
    }

    fn contents_of(&self, number: u32) -> (Vec<(Slot, ContentId)>, u32) {
        let Some(pack) = self.packs.get(number as usize) else {
            return (Vec::new(), 0);
        };
        let base = number * self.pack_slots;
        let held = pack
            .held
            .iter()
            .filter_map(|at| Some((base + at, *pack.ids.get(at as usize)?)));
        (held.collect(), pack.charged.ones())
    }

    /// Up to `most` contents from slot `from` on, in the order of slots.
    pub fn contents_from(&self, from: Slot, most: usize) -> Vec<(Slot, ContentId)> {
        let first = from / self.pack_slots;
        let each = (first..self.packs()).flat_map(|number| {
            let base = number * self.pack_slots;
            let pack = self.packs.get(number as usize);
            pack.into_iter().flat_map(move |pack| {
                pack.held
                    .iter()
                    .filter_map(move |at| Some((base + at, *pack.ids.get(at as usize)?)))
            })
        });
        each.filter(|(slot, _)| *slot >= from).take(most).collect()
    }

    /// Contents that are in at least so many images and templates, and in how many.
    pub fn named(&self, least: u16) -> Vec<(ContentId, u16)> {
        let each = self.packs.iter().flat_map(|pack| {
            let named = pack.held.iter().filter(|at| pack.images(*at) >= least);
            named.filter_map(|at| Some((*pack.ids.get(at as usize)?, pack.images(at))))
        });
        each.collect()
    }

    pub fn lookup_keys(&self) -> Vec<u64> {
        let keys = self
            .lookup
            .iter()
            .filter_map(|slot| id_in(&self.packs, self.pack_slots, *slot));
        keys.map(ContentId::lookup_key).collect()
    }

    /// One more image names these contents, each once.
    pub fn name(&mut self, ids: &[ContentId]) {
        self.count(ids, |images| images.saturating_add(1));
    }

    /// One image less names these contents.
    pub fn unname(&mut self, ids: &[ContentId]) {
        self.count(ids, |images| images.saturating_sub(1));
    }

    fn count(&mut self, ids: &[ContentId], change: impl Fn(u16) -> u16) {
        for id in ids {
            if let Some(slot) = self.find(id)
                && let Some((pack, at)) = self.at_mut(slot)
                && let Some(images) = pack.images.get_mut(at as usize)
            {
                *images = change(*images);
            }
        }
    }

    pub fn unname_all(&mut self) {
        for pack in &mut self.packs {
            pack.images.fill(0);
        }
    }

    /// Adds up, by the epoch of their last use, the contents that no image names and that were last used before
    /// `before`.
    pub fn count_unnamed(&self, before: u32, by_epoch: &mut BTreeMap<u16, u64>) {
        for pack in &self.packs {
            for at in pack.held.iter().filter(|at| pack.images(*at) == 0) {
                let used = pack.used(at);
                if u32::from(used) < before {
                    *by_epoch.entry(used).or_default() += 1;
                }
            }
        }
    }

    /// Drops up to `most` contents that no image names and that were last used before `before`.
    pub fn remove_unnamed(&mut self, before: u32, most: u64) -> u64 {
        let mut dropped = 0;
        for number in 0..self.packs() {
            let base = number * self.pack_slots;
            let Some(pack) = self.packs.get(number as usize) else {
                break;
            };
            let unnamed: Vec<(Slot, ContentId)> = pack
                .held
                .iter()
                .filter(|at| pack.images(*at) == 0 && u32::from(pack.used(*at)) < before)
                .take(usize::try_from(most - dropped).unwrap_or(usize::MAX))
                .filter_map(|at| Some((base + at, *pack.ids.get(at as usize)?)))
                .collect();
            dropped += unnamed.iter().filter(|(slot, id)| self.remove(id, *slot)).count() as u64;
            if dropped >= most {
                break;
            }
        }
        dropped
    }

    /// Gives up packs at the end that have no content. Returns their numbers and how many charged slots they had.
    pub fn pop_empty(&mut self) -> (Vec<u32>, u64) {
        let (mut numbers, mut charged) = (Vec::new(), 0);
        while let Some(pack) = self.packs.last().filter(|pack| pack.taken.ones() == 0) {
            // The index may still have blocks of this pack, which the next flush must delete.
            if pack.dirty.ones() > 0 {
                break;
            }
            charged += u64::from(pack.charged.ones());
            self.packs.pop();
            numbers.push(self.packs());
        }
        (numbers, charged)
    }

    /// A slot below the end of a pack's file whose bytes could not be given back counts as used.
    pub fn charge_slack(&mut self, slot: Slot) -> bool {
        self.at_mut(slot)
            .is_some_and(|(pack, at)| !pack.taken.get(at) && pack.charged.set(at))
    }

    /// The slot's bytes have been given back: it is neither taken nor charged any more.
    pub fn punched(&mut self, slot: Slot) -> bool {
        self.at_mut(slot).is_some_and(|(pack, at)| {
            pack.taken.clear(at);
            pack.charged.clear(at)
        })
    }

    /// Takes up to `most` dirty blocks: number and its contents, empty when there are none.
    pub fn take_dirty(&mut self, most: usize) -> Vec<(u32, Vec<(u32, ContentId)>)> {
        let mut blocks = Vec::new();
        let per_pack = self.pack_slots / BLOCK_SLOTS;
        for (pack, first) in self.packs.iter_mut().zip((0u32..).step_by(per_pack.max(1) as usize)) {
            let dirty: Vec<u32> = pack.dirty.iter().take(most - blocks.len()).collect();
            for block in dirty {
                pack.dirty.clear(block);
                let slots = (0..BLOCK_SLOTS).map(|slot| (slot, block * BLOCK_SLOTS + slot));
                let held = slots.filter(|(_, at)| pack.held.get(*at));
                let ids = held.filter_map(|(slot, at)| Some((slot, *pack.ids.get(at as usize)?)));
                blocks.push((first + block, ids.collect()));
            }
            if blocks.len() >= most {
                break;
            }
        }
        blocks
    }

    pub fn mark_dirty(&mut self, block: u32) {
        let slot = u64::from(block) * u64::from(BLOCK_SLOTS);
        if let Ok(slot) = Slot::try_from(slot)
            && let Some((pack, at)) = self.at_mut(slot)
        {
            pack.dirty.set(at / BLOCK_SLOTS);
        }
    }

    /// The index is a new one: it has none of the blocks.
    pub fn mark_held_dirty(&mut self) {
        for pack in &mut self.packs {
            pack.dirty.clear_all();
            let blocks: Vec<u32> = pack.held.iter().map(|at| at / BLOCK_SLOTS).collect();
            blocks.into_iter().for_each(|block| {
                pack.dirty.set(block);
            });
        }
    }

    /// Slots of a pack that have no content, and the first slot behind its last content, both within the pack.
    pub fn free_of(&self, number: u32) -> (Vec<u32>, u32) {
        let Some(pack) = self.packs.get(number as usize) else {
            return (Vec::new(), 0);
        };
        let end = pack.held.iter().last().map_or(0, |last| last + 1);
        let free = (0..end).filter(|at| !pack.held.get(*at)).collect();
        (free, end)
    }

    /// All contents are gone, and all packs with them. Returns the slots that were charged.
    pub fn clear(&mut self) -> u64 {
        let charged = self.charged();
        self.lookup.clear();
        self.packs.clear();
        charged
    }
}
