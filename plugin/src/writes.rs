//! Which pages the guest writes, as the engine wants to know it.
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use xen_sys::{Bitmap, LogDirty, Peek, XenError, Xenctrl};
use xenfold::engine::{DirtyLog, FrameError};
use xenfold::page_set::PageSet;

use crate::guest::Guest;

/// The log-dirty mode of a guest that xl migrates.
pub struct GuestWrites {
    xen: Xenctrl,
    log: LogDirty,
    guest: Guest,
    bitmap: Bitmap,
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
        Ok(GuestWrites {
            xen,
            log,
            guest: guest.clone(),
            bitmap: Bitmap::default(),
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
        let read = self.log.peek(&mut self.bitmap).map_err(refused)?;
        Ok(self.pages(read))
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
