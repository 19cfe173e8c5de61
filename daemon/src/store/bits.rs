//! A set of small numbers, one bit each.

#[derive(Clone)]
pub(super) struct Bits {
    words: Box<[u64]>,
    ones: u32,
}

impl Bits {
    pub fn new(bits: u32) -> Bits {
        Bits {
            words: vec![0; bits.div_ceil(64) as usize].into(),
            ones: 0,
        }
    }

    pub fn get(&self, bit: u32) -> bool {
        let word = self.words.get((bit / 64) as usize);
        word.is_some_and(|word| word >> (bit % 64) & 1 != 0)
    }

    /// Whether the bit changed.
    pub fn set(&mut self, bit: u32) -> bool {
        let Some(word) = self.words.get_mut((bit / 64) as usize) else {
            return false;
        };
        let new = *word >> (bit % 64) & 1 == 0;
        *word |= 1 << (bit % 64);
        self.ones += u32::from(new);
        new
    }

    /// Whether the bit changed.
    pub fn clear(&mut self, bit: u32) -> bool {
        let Some(word) = self.words.get_mut((bit / 64) as usize) else {
            return false;
        };
        let old = *word >> (bit % 64) & 1 != 0;
        *word &= !(1 << (bit % 64));
        self.ones -= u32::from(old);
        old
    }

    pub fn clear_all(&mut self) {
        self.words.fill(0);
        self.ones = 0;
    }

    pub fn ones(&self) -> u32 {
        self.ones
    }

    /// The set bits in ascending order.
    pub fn iter(&self) -> impl Iterator<Item = u32> + '_ {
        each(self.words.iter().copied())
    }

    /// The bits that are set here and not in `other`.
    pub fn without<'a>(&'a self, other: &'a Bits) -> impl Iterator<Item = u32> + 'a {
        each(self.words.iter().zip(&other.words).map(|(here, there)| here & !there))
    }

    /// The bits below `bits` that are set neither here nor in `other`.
    pub fn neither<'a>(&'a self, other: &'a Bits, bits: u32) -> impl Iterator<Item = u32> + 'a {
        each(self.words.iter().zip(&other.words).map(|(here, there)| !(here | there)))
            .take_while(move |bit| *bit < bits)
    }
}

fn each(words: impl Iterator<Item = u64>) -> impl Iterator<Item = u32> {
    words.zip((0u32..).step_by(64)).flat_map(|(mut word, base)| {
        std::iter::from_fn(move || {
            let bit = word.trailing_zeros();
            word &= word.wrapping_sub(1);
            (bit < 64).then_some(base + bit)
        })
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bits_are_found() {
        let (mut a, mut b) = (Bits::new(130), Bits::new(130));
        for bit in [0, 63, 64, 129] {
            assert!(a.set(bit) && !a.set(bit) && a.get(bit));
        }
        b.set(64);
        assert_eq!(a.iter().collect::<Vec<_>>(), [0, 63, 64, 129]);
        assert_eq!(a.without(&b).collect::<Vec<_>>(), [0, 63, 129]);
        assert_eq!(a.neither(&b, 130).count(), 126);
        assert!(a.clear(0) && !a.clear(0));
        assert_eq!((a.ones(), a.get(1000), a.set(1000)), (3, false, false));
    }
}
