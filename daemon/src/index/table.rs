//! Where a group's contents are: 16 bytes for each, in hash tables that grow one at a time.
use hashbrown::HashTable;
use xenfold::page::Pfn;

/// Tables of a group. When one grows its old and new form exist together: of many small ones that does not show.
const SHARDS: usize = 64;

/// The least that a table takes, and what it takes beside its entries (hashbrown: a control byte for each place, and 16).
const TABLE_BYTES: u64 = 256;

/// The number of a guest in the index, as long as it is there.
pub type Slot = u16;

/// A guest's page.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Place {
    pub slot: Slot,
    pfn: u32,
}

impl Place {
    /// `None`: a page above 16 TiB.
    pub fn new(slot: Slot, pfn: Pfn) -> Option<Place> {
        let pfn = u32::try_from(pfn.get()).ok()?;
        Some(Place { slot, pfn })
    }

    pub fn pfn(self) -> Pfn {
        // 32 bits are always a page number.
        Pfn::new(u64::from(self.pfn)).unwrap_or_default()
    }
}

/// The id is kept by its lookup key alone: the frame is hashed again at use, and the full id decides then.
#[derive(Clone, Copy, Debug)]
struct Entry {
    key: u64,
    pfn: u32,
    slot: Slot,
    /// The round in which the page was last seen to hold this.
    round: u16,
}

impl Entry {
    fn place(&self) -> Place {
        let (slot, pfn) = (self.slot, self.pfn);
        Place { slot, pfn }
    }
}

const _: () = assert!(size_of::<Entry>() == 16);

/// What became of a content that was seen.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Noted {
    New,
    /// It was known, at this guest.
    Known,
    /// It is known at another guest.
    Elsewhere,
    Full,
}

/// A group's contents.
pub struct Table {
    shards: Vec<HashTable<Entry>>,
    bytes: u64,
}

impl Table {
    pub fn new() -> Table {
        let shards: Vec<HashTable<Entry>> = (0..SHARDS).map(|_| HashTable::new()).collect();
        let bytes = (size_of::<HashTable<Entry>>() * SHARDS) as u64;
        Table { shards, bytes }
    }

    /// Memory taken.
    pub fn bytes(&self) -> u64 {
        self.bytes
    }

    pub fn len(&self) -> u64 {
        self.shards.iter().map(|shard| shard.len() as u64).sum()
    }

    /// Notes that the place holds this content in this round of its guest's. `room_bytes` is what may be allocated.
    pub fn note(&mut self, key: u64, place: Place, round: u16, room_bytes: u64) -> Noted {
        let Some(shard) = self.shards.get_mut(shard_of(key)) else {
            return Noted::Full;
        };
        if let Some(entry) = shard.find_mut(key, |entry| entry.key == key) {
            if entry.slot != place.slot {
                return Noted::Elsewhere;
            }
            // The page noted before has not been seen with it in this round, and this one has just been.
            if entry.round != round {
                (entry.pfn, entry.round) = (place.pfn, round);
            }
            return Noted::Known;
        }
        let before = shard.allocation_size() as u64;
        if shard.len() == shard.capacity() && before.saturating_mul(2).saturating_add(TABLE_BYTES) > room_bytes {
            return Noted::Full;
        }
        let Place { slot, pfn } = place;
        let entry = Entry { key, pfn, slot, round };
        shard.insert_unique(key, entry, |entry| entry.key);
        let after = shard.allocation_size() as u64;
        self.bytes = self.bytes.saturating_sub(before).saturating_add(after);
        Noted::New
    }

    pub fn find(&self, key: u64) -> Option<Place> {
        let shard = self.shards.get(shard_of(key))?;
        shard.find(key, |entry| entry.key == key).map(Entry::place)
    }

    /// Forgets this content if that is where it is known to be.
    pub fn remove(&mut self, key: u64, place: Place) -> bool {
        let Some(shard) = self.shards.get_mut(shard_of(key)) else {
            return false;
        };
        match shard.find_entry(key, |entry| entry.key == key && entry.place() == place) {
            Ok(found) => {
                found.remove();
                true
            }
            Err(_) => false,
        }
    }

    /// The parts in which the table is swept, so that nobody waits for all of it.
    pub fn parts() -> std::ops::Range<usize> {
        0..SHARDS
    }

    /// Forgets what was not seen at this guest in `round`, or everything of it; returns how much that was.
    pub fn sweep(&mut self, part: usize, slot: Slot, round: Option<u16>) -> u64 {
        let Some(shard) = self.shards.get_mut(part) else {
            return 0;
        };
        let (before, bytes) = (shard.len(), shard.allocation_size() as u64);
        shard.retain(|entry| entry.slot != slot || Some(entry.round) == round);
        if shard.len() < shard.capacity() / 4 {
            shard.shrink_to_fit(|entry| entry.key);
        }
        self.bytes = self
            .bytes
            .saturating_sub(bytes)
            .saturating_add(shard.allocation_size() as u64);
        before.saturating_sub(shard.len()) as u64
    }

    pub fn entries(&self) -> impl Iterator<Item = (u64, Slot)> {
        let entries = self.shards.iter().flatten();
        entries.map(|entry| (entry.key, entry.slot))
    }
}

/// By bits that the tables themselves do not use before they have 2^40 places; ids are evenly distributed.
fn shard_of(key: u64) -> usize {
    (key >> 40) as usize % SHARDS
}

#[cfg(test)]
mod tests {
    use super::*;

    fn place(slot: Slot, pfn: u64) -> Place {
        Place::new(slot, Pfn::new(pfn).unwrap()).unwrap()
    }

    /// Distinct and even, as ids are.
    fn key(n: u64) -> u64 {
        (n + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15)
    }

    #[test]
    fn contents_are_where_they_were_last_seen() {
        let mut table = Table::new();
        let room = 1 << 20;
        assert_eq!(table.note(key(1), place(1, 5), 1, room), Noted::New);
        assert_eq!(table.note(key(1), place(1, 9), 1, room), Noted::Known);
        assert_eq!(table.find(key(1)), Some(place(1, 5)), "the first of a round");
        assert_eq!(table.note(key(1), place(2, 3), 1, room), Noted::Elsewhere);
        assert_eq!(table.note(key(1), place(1, 9), 2, room), Noted::Known);
        assert_eq!(table.find(key(1)), Some(place(1, 9)));
        assert!(!table.remove(key(1), place(1, 5)));
        assert!(table.remove(key(1), place(1, 9)));
        assert_eq!((table.find(key(1)), table.len()), (None, 0));
        assert_eq!(Place::new(1, Pfn::new(1 << 32).unwrap()), None);
    }

    #[test]
    fn memory_is_bounded_and_given_back() {
        let mut table = Table::new();
        let limit = 1 << 20;
        let mut full = 0;
        for n in 0..200_000 {
            let room = limit - table.bytes();
            full += u64::from(table.note(key(n), place((n % 2) as Slot, n), 1, room) == Noted::Full);
            assert!(table.bytes() <= limit);
        }
        let taken = table.len();
        assert!(full > 0 && taken + full == 200_000);
        assert!(
            (19..=40).contains(&(table.bytes() / taken)),
            "{} for {taken}",
            table.bytes()
        );
        let swept: u64 = Table::parts().map(|part| table.sweep(part, 0, None)).sum();
        assert!(swept > taken / 3 && table.len() == taken - swept);
        assert!(table.entries().all(|(_, slot)| slot == 1));
        let swept: u64 = Table::parts().map(|part| table.sweep(part, 1, Some(1))).sum();
        assert_eq!(swept, 0);
        let swept: u64 = Table::parts().map(|part| table.sweep(part, 1, Some(2))).sum();
        assert!(swept > 0);
        assert_eq!(table.len(), 0);
        assert!(table.bytes() < 1 << 14, "{}", table.bytes());
    }
}
