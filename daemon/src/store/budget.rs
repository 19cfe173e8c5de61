//! The bound on what all groups' files take on the disk.
use parking_lot::Mutex;

/// Bytes that the files may take, and bytes that they take. Whoever makes a file longer charges first.
#[derive(Debug)]
pub(super) struct Budget {
    limit_bytes: u64,
    used_bytes: Mutex<u64>,
}

impl Budget {
    pub fn new(limit_bytes: u64) -> Budget {
        Budget {
            limit_bytes,
            used_bytes: Mutex::new(0),
        }
    }

    pub fn limit_bytes(&self) -> u64 {
        self.limit_bytes
    }

    pub fn used_bytes(&self) -> u64 {
        *self.used_bytes.lock()
    }

    /// What packs leave free: an index that drops an image first grows a little, since redb copies what it changes.
    pub fn index_reserve_bytes(&self) -> u64 {
        (self.limit_bytes / 16).min(16 << 20)
    }

    /// Charges all of it or nothing.
    pub fn try_charge(&self, bytes: u64) -> bool {
        let mut used = self.used_bytes.lock();
        match used.checked_add(bytes) {
            Some(sum) if sum <= self.limit_bytes => {
                *used = sum;
                true
            }
            _ => false,
        }
    }

    /// Charges up to `most` units and returns how many, leaving the index's reserve free.
    pub fn charge_units(&self, most: u64, unit_bytes: u64) -> u64 {
        let mut used = self.used_bytes.lock();
        let bound = self.limit_bytes - self.index_reserve_bytes();
        let units = (bound.saturating_sub(*used) / unit_bytes).min(most);
        *used += units * unit_bytes;
        units
    }

    /// Charges what is on the disk already, be it beyond the bound.
    pub fn charge_existing(&self, bytes: u64) {
        let mut used = self.used_bytes.lock();
        *used = used.saturating_add(bytes);
    }

    pub fn refund(&self, bytes: u64) {
        let mut used = self.used_bytes.lock();
        debug_assert!(*used >= bytes);
        *used = used.saturating_sub(bytes);
    }

    /// Bytes that are missing until `wanted` more and the index's reserve fit.
    pub fn missing_bytes(&self, wanted: u64) -> u64 {
        let bound = self.limit_bytes - self.index_reserve_bytes();
        self.used_bytes().saturating_add(wanted).saturating_sub(bound)
    }
}
