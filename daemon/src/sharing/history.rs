//! Which pages stay: what each page of a guest was when it was last looked at, and how often it was that in a row.
//! Dirtiness is never learnt from Xen: log-dirty belongs to migrations.
use crate::notes::Notes;

/// 24 bits of the content's key, 4 of how often it was seen again, 4 of how long it has to stay. Zero: never seen.
type Note = u32;

/// Beyond this a page is not watched any closer.
const MOST_SEEN: u32 = 15;

/// A page that has not stayed has to be seen twice as often the next time, up to 2^this times.
const MOST_CAUTION: u32 = 3;

#[derive(Default)]
pub struct History(Notes);

impl History {
    pub fn bytes(&self) -> u64 {
        self.0.bytes()
    }

    /// The page has this content now. True: it has had it for long enough to be shared.
    pub fn seen(&mut self, pfn: u32, key: u64) -> bool {
        let Some(note) = self.0.entry(pfn) else { return false };
        let (hash, times, caution) = (note.to_owned() >> 8, (*note >> 4) & 15, *note & 15);
        if hash != hash_of(key) {
            *note = pack(hash_of(key), 0, caution);
            return false;
        }
        let mut caution = caution;
        let mut times = (times + 1).min(MOST_SEEN);
        if times == MOST_SEEN && caution > 0 {
            // It has stayed for long: forgiven bit by bit.
            (caution, times) = (caution - 1, 1 << (caution - 1));
        }
        *note = pack(hash, times, caution);
        times >= 1 << caution
    }

    /// Whether the page had this content when it was last seen, and for long enough.
    pub fn stays(&self, pfn: u32, key: u64) -> bool {
        let note = self.0.get(pfn);
        note >> 8 == hash_of(key) && (note >> 4) & 15 >= 1 << (note & 15)
    }

    /// It was shared, or was to be, and did not stay.
    pub fn broke(&mut self, pfn: u32) {
        if let Some(note) = self.0.entry(pfn) {
            *note = pack(*note >> 8, 0, ((*note & 15) + 1).min(MOST_CAUTION));
        }
    }

    /// The least stable pages come first when sorted by this.
    pub fn stability(&self, pfn: u32) -> (u32, u32) {
        let note = self.0.get(pfn);
        (MOST_CAUTION.saturating_sub(note & 15), (note >> 4) & 15)
    }
}

/// Never zero. Two contents with one of these are compared in full before they are shared.
fn hash_of(key: u64) -> u32 {
    (key >> 40) as u32 | 1
}

fn pack(hash: u32, times: u32, caution: u32) -> Note {
    hash << 8 | times << 4 | caution
}

#[cfg(test)]
mod tests {
    use super::*;

    const A: u64 = 0x1234_5678_9abc_def0;
    const B: u64 = 0x4321_5678_9abc_def0;

    #[test]
    fn a_page_that_is_seen_twice_stays() {
        let mut history = History::default();
        assert!(!history.stays(5, A) && !history.seen(5, A) && !history.stays(5, A));
        assert!(history.seen(5, A) && history.stays(5, A) && !history.stays(5, B));
        assert!(!history.seen(5, B) && history.seen(5, B));
        assert!(!history.seen(0, 0) && history.seen(0, 0), "zero pages too");
        assert!(history.bytes() < 4096);
    }

    #[test]
    fn one_that_breaks_has_to_stay_longer_each_time() {
        let mut history = History::default();
        let times = |history: &mut History| (1..).find(|_| history.seen(9, A)).unwrap();
        assert_eq!(times(&mut history), 2);
        let mut needed = Vec::new();
        for _ in 0..4 {
            history.broke(9);
            needed.push(times(&mut history));
        }
        assert_eq!(needed, [2, 4, 8, 8]);
        assert!(history.stability(9) < history.stability(10));
        for _ in 0..60 {
            assert!(history.seen(9, A));
        }
        assert_eq!(history.stability(9).0, MOST_CAUTION, "forgiven");
    }
}
