//! What pages that follow the guest need of Xen at the destination.
use std::time::Duration;

use super::FrameError;
use crate::late::{Asking, Saving};
use crate::page::{PAGE_SIZE, Pfn};
use crate::wire::EarlyOut;

/// Somebody asks for a page that is not there.
#[derive(Clone, Copy, Debug)]
pub struct PageRequest {
    pub pfn: Pfn,
    pub asking: Asking,
    /// What the request is answered by ([`GuestPaging::answer`]).
    pub token: u64,
}

/// Takes pages out of the guest under construction and puts them back, as Xen's mem_paging does.
pub trait GuestPaging: Send {
    /// Begins. Errors: this guest's pages cannot be left behind.
    fn enable(&mut self) -> Result<(), FrameError>;

    /// The same while the guest still runs at its source, of which `source` tells. False: not yet, the guest has not got all
    /// of its memory.
    fn enable_early(&mut self, source: &EarlyOut) -> Result<bool, FrameError>;

    /// After pages were taken out early: what they need of the host's memory is kept back for them, and the guest has borne
    /// it. Errors: it is not so.
    fn secure(&mut self) -> Result<(), FrameError>;

    /// Takes pages out; which of them. Those that are not taken out hold memory and can be written to.
    fn evict(&mut self, pfns: &[Pfn]) -> Result<Vec<bool>, FrameError>;

    /// Fills a page that was not taken out. The guest does not run yet.
    fn write(&mut self, pfn: Pfn, page: &[u8; PAGE_SIZE]) -> Result<(), FrameError>;

    /// Puts a page back that was taken out; one that the guest has given up meanwhile is left alone.
    fn load(&mut self, pfn: Pfn, page: &[u8; PAGE_SIZE]) -> Result<(), FrameError>;

    /// Pages have been put back: a program that saves the guest meanwhile has to take them (again), since it may have looked
    /// for them before.
    fn mark_dirty(&mut self, pfns: &[Pfn]) -> Result<(), FrameError>;

    /// Whether another program saves the guest, or migrates it away.
    fn saving(&mut self) -> Result<Saving, FrameError>;

    /// Waits for requests, and for what [`GuestPaging::saving`] tells, beside everything else.
    fn notices(&mut self) -> Result<Box<dyn Notices>, FrameError>;

    /// Requests that have come since the last time.
    fn requests(&mut self) -> Result<Vec<PageRequest>, FrameError>;

    /// Whoever asked goes on.
    fn answer(&mut self, token: u64) -> Result<(), FrameError>;

    /// Whether there is such a guest, running or not.
    fn guest_exists(&mut self) -> Result<bool, FrameError>;

    /// Lets no processor of the guest's run, or takes that back.
    fn hold_still(&mut self, still: bool) -> Result<(), FrameError>;

    /// Whether the guest has never run and is not about to: somebody keeps it paused.
    fn has_not_run(&mut self) -> Result<bool, FrameError>;

    /// Ends. All pages are back, or the guest is gone.
    fn disable(&mut self) -> Result<(), FrameError>;

    /// Whether somebody holds the guest still.
    fn is_held(&mut self) -> Result<bool, FrameError>;

    /// In the place of [`GuestPaging::enable`]: goes on with a guest whose pager was killed. Pages that are out stay out, and
    /// processors that wait for an answer of the former pager's ask again. The guest is held still.
    fn take_over(&mut self) -> Result<(), FrameError>;
}

/// Waits for what [`GuestPaging`] tells.
pub trait Notices: Send {
    /// Whether there may be something; false after `patience`.
    fn wait(&mut self, patience: Duration) -> bool;
}
