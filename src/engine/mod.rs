//! The engine: phases of a migration in order, on both sides.
//!
//! [`source::run`] stands in for ssh at the source, [`destination::run`] in front of xl at the destination; both read
//! top to bottom as the phases pass. Under them, [`sending`] turns the stream into rows and [`receiving`] rows into the
//! stream, each a pipeline of three threads and a [`pool`] of workers.
//!
//! Pipes, page sources and the end of a connection are handed in: everything here runs without Xen.
mod arriving;
mod assemble;
mod behind;
mod classify;
mod contents;
mod cpu;
mod decode;
pub mod destination;
mod digest;
mod early;
mod error;
mod guest_paging;
mod hashing;
mod holding;
mod journal;
mod landing;
mod leaving;
mod link;
mod outlet;
mod pacing;
mod page_record;
mod pool;
mod rebuilt;
mod receiving;
mod rejoin;
mod said;
mod sending;
mod serving;
pub mod source;
pub mod takeover;
#[cfg(test)]
mod tests;
mod threads;
mod verify;

pub use behind::{LeaveBehind, NOW_PAGES};
pub use contents::Contents;
pub use cpu::thread_cpu;
pub use error::{EngineError, FrameError, chain, printable};
pub use guest_paging::{GuestPaging, Notices, PageRequest};
pub use holding::{DowntimeLimit, Holding, SAMPLE};
pub use journal::{JournalFile, LateJournal};
pub use link::{Carrier, Hangup, LinkEnds, Unseen};
pub use rebuilt::WINDOW_ROWS;
pub use rejoin::{Connect, refuse};

use std::time::Duration;

use crate::page::{PAGE_SIZE, Pfn};
use crate::page_set::PageSet;

/// A guest's frames, where they can be read.
pub type Frames = Option<Box<dyn FrameSource>>;

/// Which pages of the guest are written, as Xen's log-dirty mode tells while xl migrates it.
pub trait DirtyLog: Send {
    /// One more than the highest page number that it tells of.
    fn bound(&self) -> u64;

    /// Whether the guest has not been suspended yet, nor ended.
    fn running(&mut self) -> bool;

    /// Which pages have been written since xl last emptied the bitmap; `None`: Xen is busy. Pauses the guest for the
    /// duration. Only while xl's helper certainly does not read the bitmap itself.
    fn peek(&mut self) -> Result<Option<PageSet>, FrameError>;

    /// How long the guest may have been paused for the last reading; `None`: as long as that took.
    fn paused(&self) -> Option<Duration> {
        None
    }

    /// Watches which pages are written in each of `count` intervals. Only while xl provably waits: log-dirty mode is turned
    /// on for it, and off again.
    fn sample(&mut self, every: Duration, count: u32, each: &mut dyn FnMut(&PageSet)) -> Result<(), FrameError>;
}

/// Reads guest memory by page number: the frames of a guest under construction, of a suspended one, or a file's.
pub trait FrameSource: Send {
    /// Fills `pages` with the bytes of `pfns`, 4096 each, in their order. Errors: a page that cannot be read.
    fn read(&mut self, pfns: &[Pfn], pages: &mut [u8]) -> Result<(), FrameError>;

    /// Whether these are still the frames of a suspended guest. Errors: [`FrameError::Gone`], and then nothing that was read before is
    /// to be believed: pages of a guest that ends cannot be told from those that it never had.
    fn check_suspended(&mut self) -> Result<(), FrameError> {
        Ok(())
    }

    /// Pages that Xen's toolstack itself rewrites after they were carried: they cannot be verified.
    fn rewritten_by_xen(&mut self) -> Result<Vec<Pfn>, FrameError> {
        Ok(Vec::new())
    }
}

/// Reads pages; which of them are not there any more.
fn read_or_gone(frames: &mut dyn FrameSource, pfns: &[Pfn], pages: &mut [u8]) -> Result<Vec<bool>, EngineError> {
    let mut gone = vec![false; pfns.len()];
    match frames.read(pfns, pages) {
        Ok(()) => return Ok(gone),
        Err(FrameError::Unreadable { .. }) => {}
        Err(error) => return Err(error.into()),
    }
    for ((pfn, page), gone) in pfns.iter().zip(pages.chunks_exact_mut(PAGE_SIZE)).zip(&mut gone) {
        match frames.read(&[*pfn], page) {
            Ok(()) => {}
            Err(FrameError::Unreadable { .. }) => *gone = true,
            Err(error) => return Err(error.into()),
        }
    }
    Ok(gone)
}
