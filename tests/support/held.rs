//! Contents that a host holds, with faults: some have changed since, some are gone.
#![allow(dead_code, reason = "each integration test uses its own part of this")]

use std::collections::{BTreeMap, HashMap};
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};

use xenfold::engine::Contents;
use xenfold::page::{ContentId, ContentKey, PAGE_SIZE, Pfn, is_zero};
use xenfold::table::PageIds;

#[derive(Default)]
pub struct TestContents {
    pub pages: HashMap<ContentId, Vec<u8>>,
    pub image: HashMap<u64, ContentId>,
    /// Of 100 contents that are told, how many are not there when they are read, and how many are others by then.
    pub gone_percent: u64,
    pub changed_percent: u64,
    pub read: AtomicU64,
    pub kept: Mutex<HashMap<ContentId, Vec<u8>>>,
    pub saved: Mutex<BTreeMap<u64, ContentId>>,
}

impl TestContents {
    /// Holds what an earlier guest's plain pages held.
    pub fn of(pages: &BTreeMap<u64, (u8, Vec<u8>)>, key: &ContentKey) -> TestContents {
        let mut held = TestContents::default();
        for (pfn, (kind, page)) in pages {
            if *kind == 0 && page.len() == PAGE_SIZE && !is_zero(page) {
                held.image.insert(*pfn, key.id(page));
                held.pages.insert(key.id(page), page.clone());
            }
        }
        held
    }

    pub fn len(&self) -> usize {
        self.pages.len()
    }
}

impl Contents for TestContents {
    fn lookup_keys(&self) -> Vec<u64> {
        self.pages.keys().map(ContentId::lookup_key).collect()
    }

    fn read(&self, ids: &[ContentId], pages: &mut [u8]) -> Vec<bool> {
        self.read.fetch_add(ids.len() as u64, Ordering::Relaxed);
        ids.iter()
            .zip(pages.chunks_exact_mut(PAGE_SIZE))
            .map(|(id, out)| {
                let dice = u64::from(id.0[15]) * 100 / 256;
                let Some(page) = self.pages.get(id).filter(|_| dice >= self.gone_percent) else {
                    return false;
                };
                out.copy_from_slice(page);
                if dice < self.gone_percent + self.changed_percent {
                    out[usize::from(id.0[14])] ^= 1;
                }
                true
            })
            .collect()
    }

    fn last_seen(&self, pfn: Pfn) -> Option<ContentId> {
        self.image.get(&pfn.get()).copied()
    }

    fn keep(&self, pages: &[(ContentId, &[u8])]) {
        let mut kept = self.kept.lock().unwrap();
        pages
            .iter()
            .for_each(|(id, page)| drop(kept.insert(*id, page.to_vec())));
    }

    fn wants(&self, ids: &[ContentId]) -> Vec<bool> {
        let kept = self.kept.lock().unwrap();
        ids.iter().map(|id| !kept.contains_key(id)).collect()
    }

    fn keep_all(&self, pages: &[(ContentId, &[u8])]) {
        self.keep(pages);
    }

    fn save_image(&self, ids: &PageIds) {
        *self.saved.lock().unwrap() = ids.iter().map(|(pfn, id)| (pfn.get(), id)).collect();
    }
}
