//! The ring of vm_event (`xen/include/public/io/ring.h`, `xen/include/public/vm_event.h`): Xen puts requests in, we take
//! them out and put a response in for each. A response is what makes its request's place free again.
use std::mem::size_of;
use std::ptr::NonNull;
use std::sync::atomic::{AtomicU32, Ordering, fence};

use crate::ffi::ctrl;
use crate::foreign::PAGE_BYTES;

/// Where the entries begin, behind the indices.
const ENTRIES_AT: usize = 64;

/// The entries that a page has room for, a power of two.
pub(crate) const ENTRIES: u32 = {
    let room = (PAGE_BYTES - ENTRIES_AT) / size_of::<ctrl::vm_event_st>();
    1 << room.ilog2()
};

/// Offsets of the indices in the page, in words of 4 bytes.
const REQ_PROD: usize = 0;
const REQ_EVENT: usize = 1;
const RSP_PROD: usize = 2;
const RSP_EVENT: usize = 3;

/// Our end of a ring in a page that is shared with Xen. The page belongs to whoever made this, and outlives it.
pub(crate) struct BackRing {
    page: NonNull<u8>,
    taken: u32,
    answered: u32,
}

// SAFETY: the page is memory that any thread of the process can reach alike; the indices in it are atomics, and an entry is
// read or written only while it is ours by the indices.
unsafe impl Send for BackRing {}

impl BackRing {
    /// Empties the ring.
    ///
    /// # Safety
    /// `page` is the start of 4096 mapped, writable bytes, aligned to 4096, that stay mapped as long as the ring is used.
    pub unsafe fn init(page: NonNull<u8>) -> BackRing {
        let ring = BackRing {
            page,
            taken: 0,
            answered: 0,
        };
        // SAFETY: 64 bytes at the start of the page are the ring's indices and padding.
        unsafe { page.as_ptr().write_bytes(0, ENTRIES_AT) };
        ring.index(REQ_EVENT).store(1, Ordering::Relaxed);
        ring.index(RSP_EVENT).store(1, Ordering::Release);
        ring
    }

    fn index(&self, word: usize) -> &AtomicU32 {
        // SAFETY: one of the four words at the start of the page, which `init`'s caller vouches for; aligned, since the page
        // is. Others change it with atomic stores of 4 bytes.
        unsafe { AtomicU32::from_ptr(self.page.as_ptr().cast::<u32>().add(word)) }
    }

    fn entry(&self, index: u32) -> NonNull<ctrl::vm_event_st> {
        let offset = ENTRIES_AT + (index % ENTRIES) as usize * size_of::<ctrl::vm_event_st>();
        // SAFETY: ENTRIES of them fit behind ENTRIES_AT in the page.
        unsafe { self.page.add(offset) }.cast()
    }

    /// The next request, if there is one.
    pub fn take(&mut self) -> Option<ctrl::vm_event_st> {
        // Never more than the ring has entries, whatever the other end says.
        let waiting = self.index(REQ_PROD).load(Ordering::Acquire).wrapping_sub(self.taken);
        if waiting == 0 || waiting > ENTRIES {
            return None;
        }
        // SAFETY: the entry is in the page and aligned to 8 bytes; it is plain numbers, and Xen does not touch it before it
        // has been answered.
        let request = unsafe { self.entry(self.taken).read() };
        self.taken = self.taken.wrapping_add(1);
        // Xen tells us of the next one.
        self.index(REQ_EVENT)
            .store(self.taken.wrapping_add(1), Ordering::Release);
        fence(Ordering::SeqCst);
        Some(request)
    }

    /// Answers a request that was taken; Xen has still to be notified. False: more answers than requests.
    pub fn answer(&mut self, response: &ctrl::vm_event_st) -> bool {
        let asked = self.answered != self.taken;
        if asked {
            self.answer_unasked(response);
        }
        asked
    }

    /// Answers a request that another ring had. Xen then counts a place too many, so this ring is of use for nothing else.
    pub fn answer_unasked(&mut self, response: &ctrl::vm_event_st) {
        // SAFETY: the entry is in the page and aligned to 8 bytes, and ours: its request was taken, or there has been none.
        unsafe { self.entry(self.answered).write(*response) };
        self.answered = self.answered.wrapping_add(1);
        self.index(RSP_PROD).store(self.answered, Ordering::Release);
        fence(Ordering::SeqCst);
    }

    /// Requests that were taken and not answered yet.
    pub fn unanswered(&self) -> u32 {
        self.taken.wrapping_sub(self.answered)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::mem::MaybeUninit;

    #[repr(C, align(4096))]
    struct Page([u8; PAGE_BYTES]);

    fn event(gfn: u64) -> ctrl::vm_event_st {
        // SAFETY: plain numbers, all of which may be zero.
        let mut event: ctrl::vm_event_st = unsafe { MaybeUninit::zeroed().assume_init() };
        event.version = 7;
        event.u.mem_paging.gfn = gfn;
        event
    }

    /// Xen's end of the ring.
    struct Front {
        page: NonNull<u8>,
        asked: u32,
        heard: u32,
    }

    impl Front {
        fn word(&self, word: usize) -> &AtomicU32 {
            // SAFETY: as in the ring itself.
            unsafe { AtomicU32::from_ptr(self.page.as_ptr().cast::<u32>().add(word)) }
        }

        fn at(&self, index: u32) -> NonNull<ctrl::vm_event_st> {
            // SAFETY: as in the ring itself.
            unsafe {
                self.page
                    .add(64 + (index % 8) as usize * size_of::<ctrl::vm_event_st>())
            }
            .cast()
        }

        fn ask(&mut self, gfn: u64) {
            // SAFETY: the place is free: no more are asked than the ring has room for.
            unsafe { self.at(self.asked).write(event(gfn)) };
            self.asked = self.asked.wrapping_add(1);
            self.word(REQ_PROD).store(self.asked, Ordering::Release);
        }

        fn hear(&mut self) -> Option<u64> {
            if self.word(RSP_PROD).load(Ordering::Acquire) == self.heard {
                return None;
            }
            // SAFETY: the entry is an answer that was written.
            let answer = unsafe { self.at(self.heard).read() };
            self.heard = self.heard.wrapping_add(1);
            // SAFETY: plain numbers.
            Some(unsafe { answer.u.mem_paging.gfn })
        }
    }

    #[test]
    fn requests_go_round_and_are_answered_in_any_order() {
        let mut page = Box::new(Page([0xff; PAGE_BYTES]));
        let start = NonNull::new(page.0.as_mut_ptr()).unwrap();
        // SAFETY: the page lives to the end of the test.
        let mut ring = unsafe { BackRing::init(start) };
        let mut front = Front {
            page: start,
            asked: 0,
            heard: 0,
        };
        assert!(ring.take().is_none() && !ring.answer(&event(1)));
        for round in 0..100u64 {
            (0..8).for_each(|n| front.ask(round * 8 + n));
            let mut taken: Vec<_> = std::iter::from_fn(|| ring.take()).collect();
            assert_eq!((taken.len(), ring.unanswered()), (8, 8));
            taken.reverse();
            taken.iter().for_each(|request| assert!(ring.answer(request)));
            let heard: Vec<u64> = std::iter::from_fn(|| front.hear()).collect();
            assert_eq!(heard, (0..8).rev().map(|n| round * 8 + n).collect::<Vec<_>>());
        }
        // An index that no ring can have.
        front
            .word(REQ_PROD)
            .store(ring.taken.wrapping_add(9), Ordering::Release);
        assert!(ring.take().is_none());
    }

    #[test]
    fn the_abi_is_the_one_of_the_release() {
        assert_eq!(ENTRIES, 8);
        assert_eq!(std::mem::offset_of!(ctrl::vm_event_st, u), 24);
        assert_eq!(size_of::<ctrl::vm_event_paging>(), 16);
        assert_eq!(ctrl::VM_EVENT_INTERFACE_VERSION, 7);
    }
}
