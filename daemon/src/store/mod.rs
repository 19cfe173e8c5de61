//! STAND-IN, to be replaced by the store on the disk in the merge: the same interface over memory, for the daemon's
//! tests.
use std::collections::{BTreeMap, HashMap};
use std::path::Path;
use std::sync::Arc;

use parking_lot::Mutex;
use serde::Serialize;
use thiserror::Error;
use xenfold::page::{ContentId, ContentKey, Pfn};

#[derive(Debug, Error)]
pub enum StoreError {
    #[error("cannot use {0}")]
    Io(String, #[source] std::io::Error),
    #[error("a page came under the id {0:?}, which is not its own")]
    WrongId(ContentId),
}

#[derive(Clone, Debug, Serialize)]
pub struct Stats {
    pub limit_bytes: u64,
    pub used_bytes: u64,
    pub table_bytes: u64,
    pub groups: Vec<GroupStats>,
}

#[derive(Clone, Debug, Serialize)]
pub struct GroupStats {
    pub name: String,
    pub open: bool,
    pub contents: u64,
    pub images: u64,
    pub templates: u64,
    pub bytes: u64,
    pub damaged: u64,
    pub indexes_set_aside: u64,
}

#[derive(Clone, Copy, Debug, Default, Serialize)]
pub struct Verified {
    pub contents: u64,
    pub damaged: u64,
    pub groups_skipped: u64,
}

#[derive(Clone, Copy, Debug, Default, Serialize)]
pub struct Collected {
    pub contents: u64,
    pub bytes: u64,
}

#[derive(Clone, Debug)]
pub struct Image {
    pub guest: String,
    pub saved_unix_s: u64,
    pub template: bool,
    pub pages: Vec<(Pfn, ContentId)>,
}

#[derive(Clone, Debug, Serialize)]
pub struct ImageInfo {
    pub guest: String,
    pub saved_unix_s: u64,
    pub pages: u64,
    pub template: bool,
}

pub struct HoldNew;

pub struct Store {
    limit_bytes: u64,
    groups: Mutex<BTreeMap<String, Arc<Group>>>,
}

pub struct Group {
    key: ContentKey,
    contents: Mutex<HashMap<ContentId, Box<[u8]>>>,
    images: Mutex<BTreeMap<(bool, String), Image>>,
}

impl Store {
    pub fn open(folder: &Path, limit_bytes: u64) -> Result<Store, StoreError> {
        let error = |source| StoreError::Io(folder.display().to_string(), source);
        std::fs::create_dir_all(folder).map_err(error)?;
        Ok(Store {
            limit_bytes,
            groups: Mutex::default(),
        })
    }

    pub fn group(&self, name: &str, key: &ContentKey) -> Result<Arc<Group>, StoreError> {
        let mut groups = self.groups.lock();
        match groups.get(name) {
            Some(group) if group.key == *key => Ok(group.clone()),
            _ => {
                let (contents, images) = Default::default();
                let key = key.clone();
                let group = Arc::new(Group { key, contents, images });
                groups.insert(name.into(), group.clone());
                Ok(group)
            }
        }
    }

    pub fn stats(&self) -> Stats {
        let groups = self.groups.lock();
        let groups = groups.iter().map(|(name, group)| {
            let images = group.images.lock();
            let templates = images.keys().filter(|(template, _)| *template).count() as u64;
            GroupStats {
                name: name.clone(),
                open: true,
                contents: group.contents.lock().len() as u64,
                images: images.len() as u64 - templates,
                templates,
                bytes: 0,
                damaged: 0,
                indexes_set_aside: 0,
            }
        });
        Stats {
            limit_bytes: self.limit_bytes,
            used_bytes: 0,
            table_bytes: 0,
            groups: groups.collect(),
        }
    }

    pub fn verify(&self) -> Result<Verified, StoreError> {
        let contents = self.stats().groups.iter().map(|group| group.contents).sum();
        Ok(Verified {
            contents,
            ..Verified::default()
        })
    }

    pub fn gc(&self) -> Result<Collected, StoreError> {
        Ok(Collected::default())
    }

    pub fn flush(&self) -> Result<(), StoreError> {
        Ok(())
    }

    pub fn remove_group(&self, name: &str) -> Result<(), StoreError> {
        self.groups.lock().remove(name);
        Ok(())
    }
}

impl Group {
    pub fn hold_new(&self) -> HoldNew {
        HoldNew
    }

    pub fn wanted(&self, ids: &[ContentId]) -> Vec<bool> {
        ids.iter().map(|id| !self.contents.lock().contains_key(id)).collect()
    }

    pub fn put(&self, pages: &[(ContentId, &[u8])]) -> Result<usize, StoreError> {
        let mut new = 0;
        for (id, page) in pages {
            if self.key.id(page) != *id {
                return Err(StoreError::WrongId(*id));
            }
            new += usize::from(self.contents.lock().insert(*id, (*page).into()).is_none());
        }
        Ok(new)
    }

    pub fn read(&self, ids: &[ContentId]) -> Vec<Option<Box<[u8]>>> {
        ids.iter().map(|id| self.contents.lock().get(id).cloned()).collect()
    }

    pub fn lookup_keys(&self) -> Vec<u64> {
        self.contents.lock().keys().map(ContentId::lookup_key).collect()
    }

    pub fn save_image(&self, image: &Image) -> Result<(), StoreError> {
        let key = (image.template, image.guest.clone());
        self.images.lock().insert(key, image.clone());
        Ok(())
    }

    pub fn image(&self, guest: &str) -> Result<Option<Image>, StoreError> {
        Ok(self.images.lock().get(&(false, guest.into())).cloned())
    }

    pub fn images(&self) -> Result<Vec<ImageInfo>, StoreError> {
        let images = self.images.lock();
        let infos = images.values().map(|image| ImageInfo {
            guest: image.guest.clone(),
            saved_unix_s: image.saved_unix_s,
            pages: image.pages.len() as u64,
            template: image.template,
        });
        Ok(infos.collect())
    }

    pub fn add_template(&self, name: &str, ids: &[ContentId], saved_unix_s: u64) -> Result<(), StoreError> {
        let pages = (0..).zip(ids).filter_map(|(pfn, id)| Some((Pfn::new(pfn)?, *id)));
        self.save_image(&Image {
            guest: name.into(),
            saved_unix_s,
            template: true,
            pages: pages.collect(),
        })
    }

    pub fn remove_template(&self, name: &str) -> Result<bool, StoreError> {
        Ok(self.images.lock().remove(&(true, name.into())).is_some())
    }
}
