//! The guest and its late pages, which are worked on under one lock.
use std::time::{Duration, Instant};

use super::super::journal::LateJournal;
use super::super::rejoin::Patience;
use super::super::verify::read_back;
use super::super::{EngineError, FrameError, Frames, GuestPaging};
use super::Landed;
use crate::codec::Decompressor;
use crate::late::journal::Noted;
use crate::late::{Arrival, Pager, Save};
use crate::page::{ContentId, ContentKey, PAGE_SIZE, Pfn};
use crate::report::LateFigures;
use crate::table::PageIds;

pub struct State {
    pub pager: Pager<u64>,
    pub paging: Box<dyn GuestPaging>,
    /// Late pages that were not taken out of the guest, ascending.
    pub resident: Vec<Pfn>,
    pub decompressor: Decompressor,
    /// Reads pages that others are the same as.
    pub frames: Frames,
    /// What the pages held that came, where that is to be verified.
    pub came: Option<PageIds>,
    /// When the guest could be started.
    pub started: Option<Instant>,
    pub figures: LateFigures,
    /// Nobody needs the pages any more.
    pub gone: bool,
    pub ended: Option<Landed>,
    /// The guest stands still because pages cannot come.
    pub stands: bool,
    /// They will not come any more.
    pub broken: bool,
    /// Since when there is no connection.
    pub lost: Option<Instant>,
    pub patience: Patience,
    /// For another process, should this one be killed.
    pub journal: Option<Box<dyn LateJournal>>,
    pub noted: Noted,
    /// Late pages that had come when this process took over.
    pub before: u64,
    /// Another program saves the guest.
    pub save: Save,
    /// That pages cannot be marked dirty has been said.
    pub unmarked: bool,
}

impl State {
    pub fn new(pager: Pager<u64>, paging: Box<dyn GuestPaging>, frames: Frames) -> State {
        State {
            pager,
            paging,
            resident: Vec::new(),
            decompressor: Decompressor::default(),
            frames,
            came: None,
            started: None,
            figures: LateFigures::default(),
            gone: false,
            ended: None,
            stands: false,
            broken: false,
            lost: None,
            patience: Patience::default(),
            journal: None,
            noted: Noted::default(),
            before: 0,
            save: Save::default(),
            unmarked: false,
        }
    }

    /// Whether the guest has been destroyed here: then nobody needs its pages.
    pub fn guest_has_ended(&mut self) -> bool {
        if !self.gone && matches!(self.paging.guest_exists(), Ok(false)) {
            self.pager.abandon();
            self.gone = true;
        }
        self.gone
    }

    /// Holds the guest still. When it does, if not now: for a message.
    pub fn pause(&mut self) -> String {
        if self.stands {
            return String::new();
        }
        match self.hold() {
            Ok(()) => String::new(),
            Err(error) => format!(" as soon as it needs one ({error})"),
        }
    }

    /// Whoever takes over has to know of it, at whichever moment this process is killed.
    pub fn hold(&mut self) -> Result<(), FrameError> {
        self.note(|noted| noted.held = true);
        self.paging.hold_still(true)?;
        self.stands = true;
        Ok(())
    }

    pub fn note(&mut self, change: impl FnOnce(&mut Noted)) {
        let before = self.noted;
        change(&mut self.noted);
        if let Some(journal) = self.journal.as_mut().filter(|_| self.noted != before)
            && let Err(error) = journal.note(self.noted)
        {
            log::warn!("how it is with the guest cannot be written down: {error}");
        }
    }

    /// Pages are where they belong: whoever saves the guest hears of it before those who waited for them go on.
    pub fn come(&mut self, now: Duration, pfns: &[Pfn]) -> Result<(), EngineError> {
        if pfns.is_empty() {
            return Ok(());
        }
        if let (Err(error), false) = (self.paging.mark_dirty(pfns), self.unmarked) {
            self.unmarked = true;
            log::warn!(
                "pages that come late cannot be marked ({error}): do not save or migrate the guest with xl before all are there"
            );
        }
        for pfn in pfns {
            // Behind the mark: what is not in it comes again, and is marked then.
            if let Some(Err(error)) = self.journal.as_mut().map(|journal| journal.came(*pfn)) {
                log::debug!("that page {pfn} has come cannot be written down: {error}");
            }
            for token in self.pager.landed(now, *pfn) {
                self.paging.answer(token)?;
            }
        }
        Ok(())
    }

    /// Lets the guest go on, unless there is another reason to hold it still.
    pub fn let_run(&mut self) {
        if self.lost.is_none() && !self.broken && !self.save.holds() {
            self.unpause();
        }
    }

    /// Lets the guest go on that was held still.
    pub fn unpause(&mut self) {
        if self.stands {
            match self.paging.hold_still(false) {
                Ok(()) => {
                    self.stands = false;
                    self.note(|noted| noted.held = false);
                }
                Err(error) => log::error!("the guest cannot be unpaused ({error}); type `xl unpause` with its name"),
            }
        }
    }

    /// What another page of the guest holds, if that is what is wanted; `put` are there already. One that is not there is not
    /// looked at: that would wait for ourselves.
    pub fn same(&mut self, key: &ContentKey, id: ContentId, other: Pfn, put: &[Pfn]) -> Option<[u8; PAGE_SIZE]> {
        if self.pager.judge(other) == Arrival::Late && !put.contains(&other) {
            return None;
        }
        let mut page = [0; PAGE_SIZE];
        self.frames.as_mut()?.read(&[other], &mut page).ok()?;
        (key.id(&page) == id).then_some(page)
    }

    /// Turns paging off. A processor that asked for a page just before that came has asked by the time that it stands still.
    pub fn let_go(&mut self, key: &ContentKey) -> Result<(), FrameError> {
        let paused = self.paging.has_not_run()?;
        let stood = self.stands;
        if !stood {
            self.hold()?;
        }
        let answered = self.paging.requests().and_then(|requests| {
            requests
                .iter()
                .try_for_each(|request| self.paging.answer(request.token))
        });
        let off = answered.and_then(|()| self.paging.disable());
        if let (Ok(()), true, Some(came), Some(frames)) = (&off, paused, &self.came, &mut self.frames) {
            match read_back(came, frames.as_mut(), key) {
                Ok(verified) => {
                    self.figures.verified_pages = verified.equal;
                    self.figures.different_pages = verified.different;
                }
                Err(error) => log::warn!("the late pages cannot be verified: {error}"),
            }
        }
        if !stood {
            self.unpause();
        }
        off
    }
}
