//! Which pages the guest writes, as the engine wants to know it.
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use xen_sys::{Bitmap, LogDirty, Peek, Urgent, XenError, Xenctrl};
use xenfold::engine::{DirtyLog, FrameError};
use xenfold::page_set::PageSet;

use crate::guest::Guest;

/// Below this page a guest's memory has no holes but small ones (HVM_BELOW_4G_RAM_END of Xen's hvm/e820.h is above), unless part of it
/// is above 4 GiB, as xl's `mmio_hole` has it; a guest that has more is looked at as a whole.
const LOW: u64 = 0xe_0000;
const FOUR_GIB: u64 = 0x10_0000;

/// By how many pages more than it has such a guest's memory may reach: holes, and what is not counted.
const HOLES: u64 = 4096;

/// The log-dirty mode of a guest that xl migrates.
pub struct GuestWrites {
    xen: Xenctrl,
    log: LogDirty,
    guest: Guest,
    bitmap: Bitmap,
    /// Pages from 0 on that are looked at while the guest runs. Far above a small guest's memory there are only some of its
    /// devices', and to look at all in between pauses it for longer.
    looked_at: u64,
    /// How long the guest did not run for the last reading while it ran.
    paused: Option<Duration>,
    /// xl has ended: log-dirty mode may be another one's by now, who would lose what is read or turned off here.
    stopped: Arc<AtomicBool>,
}

impl GuestWrites {
    /// `stopped` says when xl has ended: then nothing is read any more. Errors: Xen's libraries are missing or of another
    /// version, this is no dom0, or the guest is gone.
    pub fn open(guest: &Guest, stopped: Arc<AtomicBool>) -> Result<GuestWrites, XenError> {
        let xen = Xenctrl::open()?;
        let pages = xen.maximum_gpfn(guest.domid)?.saturating_add(1);
        let log = xen.log_dirty(guest.domid, pages)?;
        let memory = xen
            .domain(guest.domid)?
            .map(|info| info.max_pages.max(info.total_pages));
        let memory = memory.unwrap_or(pages).saturating_add(HOLES);
        Ok(GuestWrites {
            looked_at: if memory < LOW && pages <= FOUR_GIB {
                memory.min(pages)
            } else {
                pages
            },
            xen,
            log,
            guest: guest.clone(),
            bitmap: Bitmap::default(),
            paused: None,
            stopped,
        })
    }

    fn ours(&self) -> Result<(), FrameError> {
        match self.stopped.load(Ordering::Relaxed) {
            true => Err(FrameError::Xen("xl has ended, or the migration was aborted".into())),
            false => Ok(()),
        }
    }

    fn pages(&self, read: Peek) -> Option<PageSet> {
        match read {
            Peek::Read { .. } => Some(PageSet::from_words(self.bitmap.words(), self.bitmap.len())),
            Peek::Busy => None,
        }
    }
}

impl DirtyLog for GuestWrites {
    fn bound(&self) -> u64 {
        self.log.pages()
    }

    fn running(&mut self) -> bool {
        match self.xen.domain(self.guest.domid) {
            Ok(info) => info.is_some_and(|info| info.shutdown.is_none() && !info.dying),
            Err(error) => {
                log::debug!("Xen does not say whether guest {} runs: {error}", self.guest.name);
                false
            }
        }
    }

    fn peek(&mut self) -> Result<Option<PageSet>, FrameError> {
        self.ours()?;
        // The guest does not wait for this program's other threads.
        let urgent = Urgent::begin();
        let (begin, ran) = (Instant::now(), self.ran());
        let read = self.log.peek(self.looked_at, &mut self.bitmap);
        // It runs again before the call is back, and on a busy host instead of it.
        let ran = self.ran().zip(ran).map(|(now, before)| now.saturating_sub(before));
        self.paused = ran.map(|ran| begin.elapsed().saturating_sub(ran));
        drop(urgent);
        Ok(self.pages(read.map_err(refused)?))
    }

    fn paused(&self) -> Option<Duration> {
        self.paused
    }

    /// Log-dirty mode goes off again whatever happens here; should this process be killed meanwhile, xl turns it off and
    /// on when the guest is migrated or saved the next time.
    fn sample(&mut self, every: Duration, count: u32, each: &mut dyn FnMut(&PageSet)) -> Result<(), FrameError> {
        if count == 0 {
            return Ok(());
        }
        self.ours()?;
        self.log.enable().map_err(refused)?;
        let watched = self.watch(every, count, each);
        let off = self.log.off().map_err(refused);
        watched.and(off)
    }
}

impl GuestWrites {
    /// Processor time that the guest has had, of each of its processors.
    fn ran(&self) -> Option<Duration> {
        let info = self.xen.domain(self.guest.domid).ok()??;
        Some(info.cpu_time() / info.max_vcpu_id?.saturating_add(1))
    }

    fn watch(&mut self, every: Duration, count: u32, each: &mut dyn FnMut(&PageSet)) -> Result<(), FrameError> {
        let mut due = Instant::now();
        for _ in 0..count {
            due += every;
            thread::sleep(due.saturating_duration_since(Instant::now()));
            self.ours()?;
            let read = self.log.clean(&mut self.bitmap).map_err(refused)?;
            if let Some(written) = self.pages(read) {
                each(&written);
            }
        }
        Ok(())
    }
}

fn refused(error: XenError) -> FrameError {
    FrameError::Xen(error.to_string())
}
