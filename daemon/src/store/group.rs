//! What a migration does with one sharing group's contents.
use std::collections::HashSet;
use std::sync::Arc;

use xenfold::page::{ContentId, ContentKey, PAGE_SIZE, Pfn};

use super::core::Core;
use super::error::StoreError;
use super::pack;
use super::slots::Slot;

/// Pages written by one call at most.
const PUT_PAGES: usize = 1024;

/// Pages read and hashed by one step of a verification.
const VERIFY_PAGES: usize = 1024;

/// One sharing group's contents. Everything that reads answers "not held" rather than fail.
pub struct Group {
    pub(super) core: Arc<Core>,
    pub(super) key: ContentKey,
}

/// What a guest's memory held, or a template holds.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Image {
    /// The guest's UUID, or the template's name.
    pub guest: String,
    /// Seconds since 1970. The image with the lowest goes first when there is no room.
    pub saved_unix_s: u64,
    pub template: bool,
    /// Comes back in ascending order of page numbers.
    pub pages: Vec<(Pfn, ContentId)>,
}

#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize)]
pub struct ImageInfo {
    pub guest: String,
    pub saved_unix_s: u64,
    pub pages: u64,
    pub template: bool,
}

/// As long as this lives, contents that are put or asked for after it was made stay before images do, though no image
/// names them yet.
pub struct HoldNew {
    core: Arc<Core>,
    epoch: u16,
}

impl Drop for HoldNew {
    fn drop(&mut self) {
        let mut holds = self.core.holds.lock();
        if let Some(count) = holds.get_mut(&self.epoch) {
            *count -= 1;
            if *count == 0 {
                holds.remove(&self.epoch);
            }
        }
    }
}

impl Group {
    /// To be held during a migration whose guest's image is saved at its end.
    pub fn hold_new(&self) -> HoldNew {
        let epoch = self.core.shared.new_epoch();
        *self.core.holds.lock().entry(epoch).or_default() += 1;
        HoldNew {
            core: self.core.clone(),
            epoch,
        }
    }

    /// For each id: true when it is not held yet. Those held count as used now.
    pub fn wanted(&self, ids: &[ContentId]) -> Vec<bool> {
        let epoch = self.core.shared.epoch();
        let state = self.core.state.read();
        ids.iter().map(|id| state.find_and_touch(id, epoch).is_none()).collect()
    }

    pub fn holds(&self, id: &ContentId) -> bool {
        self.core.state.read().find(id).is_some()
    }

    /// The lookup keys of all contents, in no order.
    pub fn lookup_keys(&self) -> Vec<u64> {
        self.core.state.read().lookup_keys()
    }

    /// Takes pages of 4096 bytes that are not held yet, as far as the bound allows, and returns how many it took.
    /// Errors: `WrongId` when an id is not its page's own (nothing is taken then), those of the disk.
    pub fn put(&self, pages: &[(ContentId, &[u8])]) -> Result<usize, StoreError> {
        self.put_pages(pages, true)
    }

    /// As [`Group::put`] when the caller made the ids from these very bytes. A wrong id does no harm beyond a content
    /// that is found damaged when it is read.
    pub fn put_trusted(&self, pages: &[(ContentId, &[u8])]) -> Result<usize, StoreError> {
        self.put_pages(pages, false)
    }

    fn put_pages(&self, pages: &[(ContentId, &[u8])], check: bool) -> Result<usize, StoreError> {
        if self.core.is_closed() {
            return Err(StoreError::Closed(self.core.name.clone()));
        }
        let epoch = self.core.shared.epoch();
        let mut seen = HashSet::with_capacity(pages.len());
        let new: Vec<(ContentId, &[u8])> = {
            let state = self.core.state.read();
            let new = pages
                .iter()
                .filter(|(id, _)| state.find_and_touch(id, epoch).is_none() && seen.insert(*id));
            new.copied().collect()
        };
        for (id, page) in &new {
            if page.len() != PAGE_SIZE {
                return Err(StoreError::PageSize { bytes: page.len() });
            }
            if check && self.key.id(page) != *id {
                return Err(StoreError::WrongId(*id));
            }
        }
        let mut stored = 0;
        for pages in new.chunks(PUT_PAGES) {
            let (taken, full) = self.put_new(pages)?;
            stored += taken;
            if full {
                break;
            }
        }
        if stored > 0 && self.core.note_new(stored as u64) {
            self.core.shared.flush_aside(&self.core);
        }
        Ok(stored)
    }

    /// How many were taken, and whether the bound allowed no more.
    fn put_new(&self, pages: &[(ContentId, &[u8])]) -> Result<(usize, bool), StoreError> {
        let core = &self.core;
        let slots = core.shared.reserve(core, pages.len())?;
        let mut written = 0;
        let result = self.write_slots(&slots, pages, &mut written);
        core.shared.tick(written as u64);
        let epoch = core.shared.epoch();
        let mut state = core.state.write();
        let mut new = 0;
        for (index, (slot, (id, _))) in slots.iter().zip(pages).enumerate() {
            if index < written {
                new += usize::from(state.insert(*slot, *id, epoch));
            } else {
                state.release(*slot);
            }
        }
        drop(state);
        result.map(|()| (new, slots.len() < pages.len()))
    }

    fn write_slots(&self, slots: &[Slot], pages: &[(ContentId, &[u8])], written: &mut usize) -> Result<(), StoreError> {
        let pack_slots = self.core.shared.pack_slots;
        let files = self.core.files_for(slots)?;
        for (first, length) in pack::runs(slots, pack_slots) {
            let (Some(slot), Some(run)) = (slots.get(first), pages.get(first..first + length)) else {
                break;
            };
            let run: Vec<&[u8]> = run.iter().map(|(_, page)| *page).collect();
            let number = slot / pack_slots;
            if let Some(file) = files.get(&number) {
                let path = pack::path(&self.core.folder, number);
                pack::write(file, slot % pack_slots, &run).map_err(StoreError::io("cannot write to the pack", path))?;
            }
            *written = first + length;
        }
        Ok(())
    }

    /// The contents' bytes, each hashed again. What is damaged is dropped, counted, and not held from then on.
    pub fn read(&self, ids: &[ContentId]) -> Vec<Option<Box<[u8]>>> {
        let once = self.read_once(ids);
        let again = ids.iter().zip(once).map(|(id, found)| match found {
            Found::Page(page) => Some(page),
            Found::Nothing => None,
            Found::Damaged(slot) => match self.read_again(id, slot) {
                Found::Page(page) => Some(page),
                _ => None,
            },
        });
        again.collect()
    }

    fn read_once(&self, ids: &[ContentId]) -> Vec<Found> {
        let mut found: Vec<Found> = Vec::with_capacity(ids.len());
        found.resize_with(ids.len(), || Found::Nothing);
        let (mut places, mut slots, mut files) = (Vec::new(), Vec::new(), Vec::new());
        let epoch = self.core.shared.epoch();
        let state = self.core.state.read();
        for (index, id) in ids.iter().enumerate() {
            if let Some(slot) = state.find_and_touch(id, epoch) {
                places.push(index);
                slots.push(slot);
            }
        }
        let runs = pack::runs(&slots, state.pack_slots());
        for (first, _) in &runs {
            let pack = slots.get(*first).map(|slot| slot / state.pack_slots());
            files.push(pack.and_then(|pack| state.file(pack)));
        }
        let pack_slots = state.pack_slots();
        drop(state);
        for ((first, length), file) in runs.into_iter().zip(files) {
            let range = first..first + length;
            let (Some(slots), Some(places)) = (slots.get(range.clone()), places.get(range)) else {
                continue;
            };
            let mut pages: Vec<Box<[u8]>> = slots.iter().map(|_| vec![0; PAGE_SIZE].into()).collect();
            if let (Some(file), Some(slot)) = (file, slots.first()) {
                pack::read(&file, slot % pack_slots, &mut pages);
            }
            for ((page, slot), place) in pages.into_iter().zip(slots).zip(places) {
                if let (Some(id), Some(found)) = (ids.get(*place), found.get_mut(*place)) {
                    *found = match self.key.id(&page) == *id {
                        true => Found::Page(page),
                        false => Found::Damaged(*slot),
                    };
                }
            }
        }
        found
    }

    /// What was read from the slot is not the content. The slot may have changed hands since it was looked up; the
    /// content is damaged if it is still said to be there.
    fn read_again(&self, id: &ContentId, slot: Slot) -> Found {
        if self.core.state.read().find(id) != Some(slot)
            && let Some(Found::Page(page)) = self.read_once(std::slice::from_ref(id)).pop()
        {
            return Found::Page(page);
        }
        match self.core.drop_damaged(id, slot) {
            true => Found::Damaged(slot),
            false => Found::Nothing,
        }
    }

    /// Reads and hashes all contents. Returns how many there were, and how many were dropped because they are damaged: not
    /// those that have made room for others meanwhile.
    pub(super) fn verify(&self) -> (u64, u64) {
        let (mut contents, mut damaged, mut from) = (0, 0, 0);
        loop {
            let slots = self.core.state.read().contents_from(from, VERIFY_PAGES);
            let Some((last, _)) = slots.last() else {
                return (contents, damaged);
            };
            from = last.saturating_add(1);
            let ids: Vec<ContentId> = slots.iter().map(|(_, id)| *id).collect();
            for (id, found) in ids.iter().zip(self.read_once(&ids)) {
                let found = match found {
                    Found::Damaged(slot) => self.read_again(id, slot),
                    found => found,
                };
                contents += u64::from(!matches!(found, Found::Nothing));
                damaged += u64::from(matches!(found, Found::Damaged(_)));
            }
        }
    }

    /// Replaces the guest's older image, or the template of that name. To be called when its contents have been put:
    /// contents that are not held now are not counted as being in the image until the next [`super::Store::gc`].
    /// Errors: `Full` when the bound leaves no room for it; the older image is still there then, unless it went to
    /// make room.
    pub fn save_image(&self, image: &Image) -> Result<(), StoreError> {
        let mut pages = image.pages.clone();
        pages.sort_by_key(|(pfn, _)| *pfn);
        self.write_image(&image.guest, image.template, image.saved_unix_s, &pages)
    }

    fn write_image(
        &self,
        name: &str,
        template: bool,
        saved_unix_s: u64,
        pages: &[(Pfn, ContentId)],
    ) -> Result<(), StoreError> {
        let key = image_key(name, template)?;
        self.core.write_image(&key, template, saved_unix_s, pages)?;
        self.flush()
    }

    /// Writes to the index what changed since the last time: what a crash would lose. Called by itself every 65,536
    /// new contents, when an image is saved, and at the end.
    pub fn flush(&self) -> Result<(), StoreError> {
        self.core.shared.make_room(0);
        self.core.flush()
    }

    /// The guest's image; when it has none, the template of that name.
    pub fn image(&self, guest: &str) -> Result<Option<Image>, StoreError> {
        Ok(match self.read_image(guest, false)? {
            Some(image) => Some(image),
            None => self.read_image(guest, true)?,
        })
    }

    pub(super) fn read_image(&self, name: &str, template: bool) -> Result<Option<Image>, StoreError> {
        let found = self.core.read_image(&image_key(name, template)?)?;
        Ok(found.map(|(head, pages)| Image {
            guest: name.into(),
            saved_unix_s: head.saved_unix_s,
            template: head.template,
            pages,
        }))
    }

    /// All images and templates, without their pages.
    pub fn images(&self) -> Result<Vec<ImageInfo>, StoreError> {
        let images = self.core.images.lock();
        let infos = images.iter().filter_map(|(key, head)| {
            Some(ImageInfo {
                guest: key.get(2..)?.to_owned(),
                saved_unix_s: head.saved_unix_s,
                pages: head.pages,
                template: head.template,
            })
        });
        Ok(infos.collect())
    }

    /// False: the guest has no image.
    pub fn remove_image(&self, guest: &str) -> Result<bool, StoreError> {
        self.core.remove_image(&image_key(guest, false)?)
    }

    /// Keeps these contents until the template is removed. An older template of that name is replaced.
    pub fn add_template(&self, name: &str, ids: &[ContentId], saved_unix_s: u64) -> Result<(), StoreError> {
        let pages: Vec<(Pfn, ContentId)> = (0..).zip(ids).filter_map(|(n, id)| Some((Pfn::new(n)?, *id))).collect();
        self.write_image(name, true, saved_unix_s, &pages)
    }

    /// False: there is no such template.
    pub fn remove_template(&self, name: &str) -> Result<bool, StoreError> {
        self.core.remove_image(&image_key(name, true)?)
    }
}

enum Found {
    Page(Box<[u8]>),
    Nothing,
    /// The slot does not hold what the index says.
    Damaged(Slot),
}

/// Longest name of a guest or a template.
const NAME_BYTES: usize = 128;

fn image_key(name: &str, template: bool) -> Result<String, StoreError> {
    if name.len() > NAME_BYTES || !super::is_name(name) {
        return Err(StoreError::Name {
            what: "guest or template",
            name: name.into(),
            most: NAME_BYTES,
        });
    }
    Ok(format!("{}:{name}", if template { 't' } else { 'g' }))
}
