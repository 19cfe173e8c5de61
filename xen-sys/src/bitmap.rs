//! A bit per guest frame, in the order in which Xen writes it (`xen/arch/x86/mm/paging.c`): frame n is bit n % 64 of
//! little-endian word n / 64.

/// A bitmap over frames 0 to `len() - 1`. Bits past the end are always 0.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Bitmap {
    words: Vec<u64>,
    bits: u64,
}

impl Bitmap {
    /// All zero.
    pub fn new(bits: u64) -> Self {
        Bitmap {
            words: vec![0; words_for(bits)],
            bits,
        }
    }

    /// The number of frames covered.
    pub fn len(&self) -> u64 {
        self.bits
    }

    /// Whether no frame is covered (not: whether no bit is set, which is `count_ones() == 0`).
    pub fn is_empty(&self) -> bool {
        self.bits == 0
    }

    /// The bit of `frame`; false past the end.
    pub fn get(&self, frame: u64) -> bool {
        frame < self.bits && self.words[(frame / 64) as usize] >> (frame % 64) & 1 == 1
    }

    /// Sets the bit of `frame`; past the end nothing happens.
    pub fn set(&mut self, frame: u64) {
        if frame < self.bits {
            self.words[(frame / 64) as usize] |= 1 << (frame % 64);
        }
    }

    /// Clears the bit of `frame`; past the end nothing happens.
    pub fn unset(&mut self, frame: u64) {
        if frame < self.bits {
            self.words[(frame / 64) as usize] &= !(1 << (frame % 64));
        }
    }

    /// Clears all bits.
    pub fn clear(&mut self) {
        self.words.fill(0);
    }

    /// The number of bits set.
    pub fn count_ones(&self) -> u64 {
        self.words.iter().map(|word| u64::from(word.count_ones())).sum()
    }

    /// The frames whose bit is set, ascending.
    pub fn ones(&self) -> impl Iterator<Item = u64> + '_ {
        self.words.iter().enumerate().flat_map(|(index, &word)| {
            let mut left = word;
            std::iter::from_fn(move || {
                if left == 0 {
                    return None;
                }
                let bit = u64::from(left.trailing_zeros());
                left &= left - 1;
                Some(index as u64 * 64 + bit)
            })
        })
    }

    /// Sets every bit that is set in `other`, as far as this bitmap reaches.
    pub fn union(&mut self, other: &Bitmap) {
        for (mine, theirs) in self.words.iter_mut().zip(&other.words) {
            *mine |= theirs;
        }
        self.clear_tail();
    }

    /// The words, frame n being bit n % 64 of word n / 64.
    pub fn words(&self) -> &[u64] {
        &self.words
    }

    /// Takes over the size of `bits` frames and the words that `read` gives for each index.
    pub(crate) fn fill_with(&mut self, bits: u64, read: impl FnMut(usize) -> u64) {
        self.bits = bits;
        self.words.clear();
        self.words.extend((0..words_for(bits)).map(read));
        self.clear_tail();
    }

    fn clear_tail(&mut self) {
        let used = self.bits % 64;
        if let (Some(last), true) = (self.words.last_mut(), used != 0) {
            *last &= (1 << used) - 1;
        }
    }
}

fn words_for(bits: u64) -> usize {
    bits.div_ceil(64) as usize
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bits_are_where_xen_puts_them() {
        // The bytes of a bitmap in which frames 0, 9, 63, 64 and 70 are dirty.
        let bytes: [u8; 16] = [1, 2, 0, 0, 0, 0, 0, 0x80, 0x41, 0, 0, 0, 0, 0, 0, 0];
        let mut bitmap = Bitmap::default();
        bitmap.fill_with(100, |word| {
            u64::from_le_bytes(bytes[word * 8..word * 8 + 8].try_into().unwrap())
        });
        assert_eq!(bitmap.ones().collect::<Vec<_>>(), [0, 9, 63, 64, 70]);
        assert!(bitmap.get(9) && !bitmap.get(10));
        assert_eq!(bitmap.count_ones(), 5);
    }

    #[test]
    fn nothing_is_set_past_the_end() {
        let mut bitmap = Bitmap::default();
        bitmap.fill_with(65, |_| u64::MAX);
        assert_eq!(bitmap.count_ones(), 65);
        bitmap.set(65);
        bitmap.set(u64::MAX);
        assert_eq!(bitmap.count_ones(), 65);
        assert!(!bitmap.get(65) && !bitmap.get(u64::MAX));
        let mut short = Bitmap::new(3);
        short.union(&bitmap);
        assert_eq!(short.ones().collect::<Vec<_>>(), [0, 1, 2]);
        short.unset(1);
        assert_eq!(short.ones().collect::<Vec<_>>(), [0, 2]);
        short.clear();
        assert_eq!(short.count_ones(), 0);
        assert!(Bitmap::new(0).is_empty());
    }
}
