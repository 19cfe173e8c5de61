//! A bit per page, as Xen's dirty bitmaps have them: page n is bit n % 64 of word n / 64.
use crate::page::Pfn;

/// Pages below a bound that is given when the set is made. Memory: one bit for each page below it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct PageSet {
    words: Vec<u64>,
    pages: u64,
}

impl PageSet {
    /// An empty set for pages 0 to `pages - 1`.
    pub fn new(pages: u64) -> PageSet {
        PageSet {
            words: vec![0; pages.div_ceil(64) as usize],
            pages,
        }
    }

    /// The set that a bitmap of `pages` bits stands for; words that are missing are zero, bits past the end are dropped.
    pub fn from_words(words: &[u64], pages: u64) -> PageSet {
        let mut set = PageSet::new(pages);
        set.words.iter_mut().zip(words).for_each(|(own, given)| *own = *given);
        set.clear_tail();
        set
    }

    /// One more than the highest page that the set can hold.
    pub fn bound(&self) -> u64 {
        self.pages
    }

    pub fn words(&self) -> &[u64] {
        &self.words
    }

    pub fn contains(&self, pfn: Pfn) -> bool {
        let (word, bit) = place(pfn);
        self.words.get(word).is_some_and(|word| word & bit != 0)
    }

    /// Whether the page is in the set now: false for one past the bound.
    pub fn insert(&mut self, pfn: Pfn) -> bool {
        let (word, bit) = place(pfn);
        match self.words.get_mut(word) {
            Some(word) if pfn.get() < self.pages => {
                *word |= bit;
                true
            }
            _ => false,
        }
    }

    pub fn remove(&mut self, pfn: Pfn) {
        let (word, bit) = place(pfn);
        if let Some(word) = self.words.get_mut(word) {
            *word &= !bit;
        }
    }

    /// Adds the pages of a range, as far as they are below the bound.
    pub fn insert_run(&mut self, run: std::ops::Range<u64>) {
        let end = run.end.min(self.pages);
        let mut at = run.start;
        while at < end {
            let here = (64 - at % 64).min(end - at);
            let bits = (u64::MAX >> (64 - here)) << (at % 64);
            if let Some(word) = usize::try_from(at / 64)
                .ok()
                .and_then(|index| self.words.get_mut(index))
            {
                *word |= bits;
            }
            at += here;
        }
    }

    pub fn clear(&mut self) {
        self.words.fill(0);
    }

    /// Adds the pages of `other` that are below this set's bound.
    pub fn union(&mut self, other: &PageSet) {
        self.words
            .iter_mut()
            .zip(&other.words)
            .for_each(|(own, more)| *own |= more);
        self.clear_tail();
    }

    /// Removes the pages of a bitmap.
    pub fn subtract(&mut self, words: &[u64]) {
        self.words.iter_mut().zip(words).for_each(|(own, less)| *own &= !less);
    }

    fn clear_tail(&mut self) {
        let used = self.pages % 64;
        if let (Some(last), true) = (self.words.last_mut(), used != 0) {
            *last &= (1 << used) - 1;
        }
    }

    /// How many pages are in it; this counts them.
    pub fn len(&self) -> u64 {
        self.words.iter().map(|word| u64::from(word.count_ones())).sum()
    }

    pub fn is_empty(&self) -> bool {
        self.words.iter().all(|word| *word == 0)
    }

    /// Its pages, ascending.
    pub fn iter(&self) -> impl Iterator<Item = Pfn> + '_ {
        self.iter_from(0)
    }

    /// Its pages from `first` on, ascending.
    pub fn iter_from(&self, first: u64) -> impl Iterator<Item = Pfn> + '_ {
        let start = usize::try_from(first / 64).unwrap_or(usize::MAX);
        let words = self.words.iter().zip(0u64..).skip(start);
        words.flat_map(move |(word, index)| {
            let below = if index == first / 64 {
                (1 << (first % 64)) - 1
            } else {
                0
            };
            bits_of(*word & !below).filter_map(move |bit| Pfn::new(index * 64 + bit))
        })
    }
}

/// The numbers of a word's set bits, ascending.
pub(crate) fn bits_of(mut word: u64) -> impl Iterator<Item = u64> {
    std::iter::from_fn(move || {
        let bit = (word != 0).then(|| word.trailing_zeros())?;
        word &= word - 1;
        Some(u64::from(bit))
    })
}

fn place(pfn: Pfn) -> (usize, u64) {
    let word = usize::try_from(pfn.get() / 64).unwrap_or(usize::MAX);
    (word, 1 << (pfn.get() % 64))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pfn(raw: u64) -> Pfn {
        Pfn::new(raw).unwrap()
    }

    #[test]
    fn pages_come_back_in_order() {
        let mut set = PageSet::new(130);
        for raw in [129, 0, 63, 64] {
            assert!(set.insert(pfn(raw)));
        }
        set.remove(pfn(63));
        let pages: Vec<u64> = set.iter().map(Pfn::get).collect();
        assert_eq!((pages, set.len()), (vec![0, 64, 129], 3));
        assert!(set.contains(pfn(64)) && !set.contains(pfn(63)));
        let from = |first| set.iter_from(first).map(Pfn::get).collect::<Vec<u64>>();
        assert_eq!((from(64), from(65), from(130)), (vec![64, 129], vec![129], vec![]));
        assert_eq!(PageSet::from_words(set.words(), 130), set);
    }

    #[test]
    fn runs_are_added_whole() {
        let mut set = PageSet::new(200);
        set.insert_run(60..130);
        set.insert_run(199..u64::MAX);
        set.insert_run(5..5);
        let pages: Vec<u64> = set.iter().map(Pfn::get).collect();
        assert_eq!(pages, (60..130).chain([199]).collect::<Vec<_>>());
    }

    #[test]
    fn nothing_is_past_the_bound() {
        let mut set = PageSet::new(3);
        for raw in [3, 63, 64, Pfn::MAX.get()] {
            assert!(!set.insert(pfn(raw)) && !set.contains(pfn(raw)));
            set.remove(pfn(raw));
        }
        set.union(&PageSet::from_words(&[u64::MAX, 1], 65));
        assert_eq!((set.len(), PageSet::from_words(&[u64::MAX], 3).len()), (3, 3));
        set.clear();
        assert!(set.is_empty());
    }
}
