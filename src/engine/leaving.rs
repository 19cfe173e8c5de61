//! What a guest leaves behind at the source: contents that could not be kept while they went by are read from the
//! suspended guest's frames.
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use crossbeam_channel::{Receiver, Sender, bounded};

use super::threads::spawn;
use super::{Contents, EngineError, FrameSource};
use crate::page::{ContentId, ContentKey, PAGE_SIZE, Pfn, ZERO_PAGE};
use crate::table::PageTable;

/// Pages looked at in one go: 2 MiB at most are read.
const BATCH: usize = 512;

/// Reads on its own, until it has all or is dropped.
pub(super) struct Leaving {
    stop: Arc<AtomicBool>,
    /// Ends when all has been read.
    done: Receiver<()>,
}

impl Leaving {
    /// The guest's pages must be found by page number.
    pub fn start(
        table: Arc<PageTable>,
        mut frames: Box<dyn FrameSource>,
        contents: Arc<dyn Contents>,
        key: ContentKey,
    ) -> Result<Leaving, EngineError> {
        let stop = Arc::new(AtomicBool::new(false));
        let (stopped, (end, done)) = (stop.clone(), bounded::<()>(0));
        spawn("xenfold-leave", move || {
            let _end: Sender<()> = end;
            keep_rest(&table, frames.as_mut(), contents.as_ref(), &key, &stopped);
        })?;
        Ok(Leaving { stop, done })
    }

    /// Waits until all has been read, but no longer than this.
    pub fn wait(&self, patience: Duration) {
        // Nothing is ever sent: the other end closes.
        let _ = self.done.recv_timeout(patience);
    }
}

impl Drop for Leaving {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
    }
}

fn keep_rest(
    table: &PageTable,
    frames: &mut dyn FrameSource,
    contents: &dyn Contents,
    key: &ContentKey,
    stop: &AtomicBool,
) {
    let zero = key.id(&ZERO_PAGE);
    let mut rows = table.ids().iter().filter(|(_, id)| *id != zero);
    loop {
        let batch: Vec<(Pfn, ContentId)> = rows.by_ref().take(BATCH).collect();
        if batch.is_empty() || stop.load(Ordering::Relaxed) {
            return;
        }
        let ids: Vec<ContentId> = batch.iter().map(|(_, id)| *id).collect();
        let wanted = contents.wants(&ids);
        let (pfns, ids): (Vec<Pfn>, Vec<ContentId>) = batch
            .into_iter()
            .zip(wanted)
            .filter_map(|(row, wanted)| wanted.then_some(row))
            .unzip();
        let mut pages = vec![0; pfns.len() * PAGE_SIZE];
        if let Err(error) = frames.read(&pfns, &mut pages) {
            log::debug!("frames of the suspended guest cannot be read: {error}");
            continue;
        }
        // Backends may still have written into some.
        let (pages, _) = pages.as_chunks();
        let same = key
            .ids(pages)
            .into_iter()
            .zip(ids)
            .zip(pages)
            .filter(|((now, id), _)| now == id);
        let pages: Vec<(ContentId, &[u8])> = same.map(|((_, id), page)| (id, page.as_slice())).collect();
        if !pages.is_empty() {
            contents.keep_all(&pages);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashMap;

    use parking_lot::Mutex;

    use super::*;
    use crate::engine::FrameError;
    use crate::table::PageIds;

    #[derive(Default)]
    struct Kept(Mutex<HashMap<ContentId, Vec<u8>>>);

    impl Contents for Kept {
        fn lookup_keys(&self) -> Vec<u64> {
            Vec::new()
        }

        fn read(&self, ids: &[ContentId], _: &mut [u8]) -> Vec<bool> {
            vec![false; ids.len()]
        }

        fn last_seen(&self, _: Pfn) -> Option<ContentId> {
            None
        }

        fn keep(&self, _: &[(ContentId, &[u8])]) {}

        fn wants(&self, ids: &[ContentId]) -> Vec<bool> {
            ids.iter().map(|id| !self.0.lock().contains_key(id)).collect()
        }

        fn keep_all(&self, pages: &[(ContentId, &[u8])]) {
            for (id, page) in pages {
                let before = self.0.lock().insert(*id, page.to_vec());
                assert!(before.is_none(), "it was there already");
            }
        }

        fn save_image(&self, _: &PageIds) {}
    }

    /// Each page holds its number; page 9 was written since, and the last one cannot be read.
    struct Suspended;

    const PAGES: u64 = 2000;

    fn page(pfn: Pfn) -> Vec<u8> {
        pfn.get().to_le_bytes().repeat(PAGE_SIZE / 8)
    }

    impl FrameSource for Suspended {
        fn read(&mut self, pfns: &[Pfn], pages: &mut [u8]) -> Result<(), FrameError> {
            for (pfn, out) in pfns.iter().zip(pages.chunks_exact_mut(PAGE_SIZE)) {
                if pfn.get() == PAGES - 1 {
                    return Err(FrameError::Xen("gone".into()));
                }
                out.copy_from_slice(&page(*pfn));
                out[0] ^= u8::from(pfn.get() == 9);
            }
            Ok(())
        }
    }

    #[test]
    fn the_rest_is_kept_and_nothing_else() {
        let key = ContentKey::new([7; 32]);
        let mut table = PageTable::default();
        let kept = Arc::new(Kept::default());
        for pfn in (0..PAGES).filter_map(Pfn::new) {
            table.set(pfn, key.id(&page(pfn))).unwrap();
            if (10..100).contains(&pfn.get()) {
                kept.0.lock().insert(key.id(&page(pfn)), Vec::new());
            }
        }
        let leaving = Leaving::start(Arc::new(table), Box::new(Suspended), kept.clone(), key.clone()).unwrap();
        leaving.wait(Duration::from_secs(60));
        let kept = kept.0.lock();
        let readable = PAGES as usize - 1 - BATCH;
        assert!((readable..PAGES as usize - 2).contains(&kept.len()), "{}", kept.len());
        for (id, bytes) in kept.iter().filter(|(_, bytes)| !bytes.is_empty()) {
            assert_eq!(key.id(bytes), *id);
        }
        assert!(!kept.contains_key(&key.id(&page(Pfn::new(9).unwrap()))));
        assert!(!kept.contains_key(&key.id(&ZERO_PAGE)));
    }
}
