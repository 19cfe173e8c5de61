//! `--base OLD`: an earlier save of the guest, as both hosts' stores would hold it.
use std::collections::HashMap;
use std::fs::File;
use std::io::{self, Read, Write};
use std::os::unix::fs::FileExt;
use std::path::Path;

use anyhow::{Context, Result};
use xenfold::engine::Contents;
use xenfold::page::{ContentId, ContentKey, PAGE_SIZE, Pfn};
use xenfold::stream::{Reader, for_each_page};
use xenfold::table::PageIds;

/// One page in the index: page number, place in the file, content id.
const ENTRY_BYTES: usize = 32;

/// Hashes all pages of a save and writes where each stands to `index`. Done once and not measured: stores have it.
pub fn write_index(save: &Path, key: &ContentKey, index: &mut impl Write) -> Result<()> {
    let file = File::open(save).with_context(|| format!("{} cannot be opened", save.display()))?;
    let mut stream = Reader::new(io::BufReader::with_capacity(1 << 20, file));
    for_each_page(&mut stream, |pfn, place, page| {
        index.write_all(&pfn.get().to_le_bytes())?;
        index.write_all(&place.to_le_bytes())?;
        index.write_all(&key.id(page).0)?;
        anyhow::Ok(())
    })
}

/// The earlier save, ready to be referred to.
pub struct Base {
    save: File,
    places: HashMap<ContentId, u64>,
    image: PageIds,
}

impl Base {
    pub fn open(save: &Path, index: &Path) -> Result<Base> {
        let mut bytes = Vec::new();
        File::open(index)?.read_to_end(&mut bytes)?;
        let mut base = Base {
            save: File::open(save)?,
            places: HashMap::with_capacity(bytes.len() / ENTRY_BYTES),
            image: PageIds::default(),
        };
        for entry in bytes.chunks_exact(ENTRY_BYTES) {
            let word = |at: usize| {
                let word = entry.get(at..at + 8).and_then(|word| word.try_into().ok());
                u64::from_le_bytes(word.unwrap_or_default())
            };
            let id = ContentId(entry.get(16..).and_then(|id| id.try_into().ok()).unwrap_or_default());
            base.places.insert(id, word(8));
            base.image.set(Pfn::new(word(0)).unwrap_or_default(), id)?;
        }
        Ok(base)
    }
}

impl Contents for Base {
    fn lookup_keys(&self) -> Vec<u64> {
        self.places.keys().map(ContentId::lookup_key).collect()
    }

    fn read(&self, ids: &[ContentId], pages: &mut [u8]) -> Vec<bool> {
        let places: Vec<Option<u64>> = ids.iter().map(|id| self.places.get(id).copied()).collect();
        let mut found = vec![false; ids.len()];
        let mut from = 0;
        while from < ids.len() {
            // Pages that follow each other in the file are read at once.
            let follows = |offset: usize| {
                let place = places.get(from).copied().flatten()?;
                (places.get(from + offset).copied().flatten()? == place + (offset * PAGE_SIZE) as u64).then_some(())
            };
            let run = (0..ids.len() - from)
                .take_while(|offset| follows(*offset).is_some())
                .count();
            if let (Some(Some(place)), true) = (places.get(from), run > 0) {
                let target = pages.get_mut(from * PAGE_SIZE..(from + run) * PAGE_SIZE);
                let read = target.is_some_and(|target| self.save.read_exact_at(target, *place).is_ok());
                found.iter_mut().skip(from).take(run).for_each(|found| *found = read);
            }
            from += run.max(1);
        }
        found
    }

    fn last_seen(&self, pfn: Pfn) -> Option<ContentId> {
        self.image.get(pfn)
    }

    /// Nothing outlives a replay.
    fn keep(&self, _: &[(ContentId, &[u8])]) {}

    fn wants(&self, ids: &[ContentId]) -> Vec<bool> {
        vec![false; ids.len()]
    }

    fn keep_all(&self, _: &[(ContentId, &[u8])]) {}

    fn save_image(&self, _: &PageIds) {}
}
