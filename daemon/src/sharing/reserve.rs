//! Free memory that is kept for pages that break. Every write to a shared page takes a free frame, and Xen crashes the
//! guest when there is none.
use xen_sys::HostMemory;

/// Frames that are left to guests when pages are unshared on purpose: a quarter of the mark.
const FLOOR_PART: u64 = 4;

/// Sharing begins again when there is this part more than the mark.
const BACK_PART: u64 = 8;

/// The marks. All in frames.
#[derive(Clone, Copy, Debug, Default)]
pub struct Reserve {
    pub configured: u64,
    short: bool,
}

impl Reserve {
    pub fn new(configured_bytes: u64) -> Reserve {
        Reserve {
            configured: configured_bytes / xenfold::page::PAGE_SIZE as u64,
            short: false,
        }
    }

    /// Below this sharing stops and the least stable pages become their guests' own as long as there are frames for them.
    /// No more than can break is needed: on a host that is full sharing begins all the same, since the first frames that it
    /// spares are the reserve.
    pub fn mark(&self, memory: &HostMemory) -> u64 {
        self.configured.min(memory.saved)
    }

    /// Takes the host's memory; true: it is short.
    pub fn look(&mut self, memory: &HostMemory) -> bool {
        let mark = self.mark(memory);
        let back = mark.saturating_add(mark / BACK_PART);
        self.short = match self.short {
            false => memory.free < mark,
            true => memory.free < back,
        };
        self.short
    }

    pub fn is_short(&self) -> bool {
        self.short
    }

    /// Xen had no memory for what it notes: short until the next look says otherwise.
    pub fn ran_out(&mut self) {
        self.short = true;
    }

    /// How many pages may be unshared now, each of which takes a frame at most.
    pub fn may_unshare(&self, memory: &HostMemory) -> u64 {
        memory.free.saturating_sub(self.mark(memory) / FLOOR_PART)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn memory(free: u64, saved: u64) -> HostMemory {
        HostMemory {
            total: 100_000,
            free,
            saved,
            shared: 1,
        }
    }

    #[test]
    fn the_mark_is_no_more_than_can_break() {
        let mut reserve = Reserve::new(1000 * 4096);
        assert!(!reserve.look(&memory(0, 0)), "a full host may begin");
        assert!(!reserve.look(&memory(50, 50)));
        assert!(reserve.look(&memory(49, 50)));
        assert_eq!(reserve.may_unshare(&memory(49, 50)), 49 - 12);
        assert!(reserve.look(&memory(1100, 5000)), "a little more than the mark");
        assert!(!reserve.look(&memory(1125, 5000)) && !reserve.is_short());
        assert!(reserve.look(&memory(999, 5000)));
        assert_eq!(reserve.may_unshare(&memory(100, 5000)), 0);
        assert!(!reserve.look(&memory(5, 4)), "what could break did");
        reserve.ran_out();
        assert!(reserve.is_short());
    }
}
