//! The shared-page table (table 3 in Kumari et al.): which content each guest page holds, and which page holds a content.
//!
//! [`PageIds`] is one half, page number → content id, kept by both ends. [`PageTable`], at the source, adds the other
//! half, content id → the page that was last seen to hold it. Together at most 32 bytes a page and 16 MiB.
mod ids;

use hashbrown::HashTable;

pub use ids::{PageIds, TooSparse};

use crate::page::{ContentId, Pfn};

/// Rows and contents of one guest at the source. Pages above 2³² are known but never referred to.
#[derive(Default)]
pub struct PageTable {
    ids: PageIds,
    holders: HashTable<u32>,
    lookup: Lookup,
}

/// How much of an id the lookup uses. The full id always decides; tests cut the key to provoke collisions.
#[derive(Clone, Copy)]
struct Lookup {
    mask: u64,
}

impl Default for Lookup {
    fn default() -> Self {
        Lookup { mask: u64::MAX }
    }
}

impl Lookup {
    /// The hash table takes its control bits from the top of the hash and its position from the bottom.
    fn key(self, id: &ContentId) -> u64 {
        (id.lookup_key() & self.mask).wrapping_mul(0x9e37_79b9_7f4a_7c15)
    }
}

impl PageTable {
    /// A table that looks contents up by `bits` bits of their id.
    pub fn with_lookup_bits(bits: u32) -> PageTable {
        let mask = u64::MAX.checked_shr(64u32.saturating_sub(bits)).unwrap_or(0);
        PageTable {
            lookup: Lookup { mask },
            ..PageTable::default()
        }
    }

    /// What the page holds, if it has a row.
    pub fn id(&self, pfn: Pfn) -> Option<ContentId> {
        self.ids.get(pfn)
    }

    /// A page that holds this content now.
    pub fn holder(&self, id: &ContentId) -> Option<Pfn> {
        let ids = &self.ids;
        let found = self.holders.find(self.lookup.key(id), |holder| {
            ids.get(page(*holder)).as_ref() == Some(id)
        });
        found.map(|holder| page(*holder))
    }

    /// Enters that `pfn` holds `id` from now on, and is the page to refer to for it. Errors: page numbers so far
    /// apart that the table would not stay in its bounds.
    pub fn set(&mut self, pfn: Pfn, id: ContentId) -> Result<(), TooSparse> {
        self.remove(pfn);
        self.ids.set(pfn, id)?;
        let Ok(number) = u32::try_from(pfn.get()) else {
            return Ok(());
        };
        let PageTable { ids, holders, lookup } = self;
        let same = |holder: &u32| *holder != number && ids.get(page(*holder)) == Some(id);
        match holders.find_mut(lookup.key(&id), same) {
            Some(holder) => *holder = number,
            None => {
                let rehash = |holder: &u32| ids.get(page(*holder)).map_or(0, |id| lookup.key(&id));
                holders.insert_unique(lookup.key(&id), number, rehash);
            }
        }
        Ok(())
    }

    /// The page's row is gone: nothing is known of what it holds.
    pub fn remove(&mut self, pfn: Pfn) {
        let Some(id) = self.ids.get(pfn) else { return };
        if let Ok(number) = u32::try_from(pfn.get())
            && let Ok(entry) = self
                .holders
                .find_entry(self.lookup.key(&id), |holder| *holder == number)
        {
            entry.remove();
        }
        self.ids.remove(pfn);
    }

    /// Nothing is known of any page.
    pub fn clear(&mut self) {
        self.holders.clear();
        self.ids.clear();
    }

    /// All pages with a row, and what they hold.
    pub fn ids(&self) -> &PageIds {
        &self.ids
    }
}

fn page(number: u32) -> Pfn {
    Pfn::new(number.into()).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use std::collections::HashMap;

    use proptest::prelude::*;

    use super::*;

    fn id(raw: u64) -> ContentId {
        let mut bytes = [0; 16];
        bytes[8..].copy_from_slice(&raw.to_le_bytes());
        bytes[..8].copy_from_slice(&raw.wrapping_mul(0x1234_5678_9abc_def1).to_le_bytes());
        ContentId(bytes)
    }

    #[derive(Clone, Debug)]
    enum Step {
        Set(u64, u64),
        Remove(u64),
    }

    fn step() -> impl Strategy<Value = Step> {
        prop_oneof![4 => (0u64..200, 0u64..40).prop_map(|(p, c)| Step::Set(p, c)), 1 => (0u64..200).prop_map(Step::Remove)]
    }

    proptest! {
        #[test]
        fn holders_hold_what_they_are_said_to_hold(steps in prop::collection::vec(step(), 0..400), bits in prop::sample::select(vec![0u32, 2, 8, 64])) {
            let mut table = PageTable::with_lookup_bits(bits);
            let mut model = HashMap::new();
            for step in steps {
                match step {
                    Step::Set(p, c) => {
                        table.set(page(p as u32), id(c)).unwrap();
                        model.insert(p, c);
                        prop_assert_eq!(table.holder(&id(c)), Some(page(p as u32)));
                    }
                    Step::Remove(p) => {
                        table.remove(page(p as u32));
                        model.remove(&p);
                    }
                }
                for c in 0..40 {
                    if let Some(holder) = table.holder(&id(c)) {
                        prop_assert_eq!(model.get(&holder.get()), Some(&c));
                    }
                }
            }
            for p in 0..200 {
                prop_assert_eq!(table.id(page(p)), model.get(&u64::from(p)).map(|c| id(*c)));
            }
        }
    }

    #[test]
    fn thousands_of_collisions_mix_nothing_up() {
        let mut table = PageTable::with_lookup_bits(8);
        for p in 0..5000u32 {
            table.set(page(p), id(u64::from(p))).unwrap();
        }
        assert!((0..5000u32).all(|p| table.holder(&id(u64::from(p))) == Some(page(p))));
        assert_eq!(table.holder(&id(5000)), None);
    }
}
