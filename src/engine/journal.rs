//! Where the destination writes down how far it has come with late pages, should it be killed.
use std::io;
use std::path::PathBuf;

use crate::late::journal::{Facts, Journal, Noted};
use crate::page::Pfn;
use crate::page_set::PageSet;

/// What another process needs to go on is kept here.
pub trait LateJournal: Send {
    /// Before the guest may run without these pages.
    fn begin(&mut self, late: &PageSet, noted: Noted) -> io::Result<()>;

    fn note(&mut self, noted: Noted) -> io::Result<()>;

    /// A page is where it belongs.
    fn came(&mut self, pfn: Pfn) -> io::Result<()>;

    /// Another domain waits for a page.
    fn awaited(&mut self, pfn: Pfn) -> io::Result<()>;

    /// Nobody has to go on.
    fn end(&mut self);
}

/// The journal in its file.
pub struct JournalFile {
    path: PathBuf,
    facts: Option<Box<dyn FnOnce() -> io::Result<Facts> + Send>>,
    journal: Option<Journal>,
}

impl JournalFile {
    /// One that begins when the guest is let go; `facts` are known by then.
    pub fn new(path: PathBuf, facts: impl FnOnce() -> io::Result<Facts> + Send + 'static) -> JournalFile {
        JournalFile {
            path,
            facts: Some(Box::new(facts)),
            journal: None,
        }
    }

    /// One that was taken over.
    pub fn taken(journal: Journal) -> JournalFile {
        JournalFile {
            path: PathBuf::new(),
            facts: None,
            journal: Some(journal),
        }
    }
}

impl LateJournal for JournalFile {
    fn begin(&mut self, late: &PageSet, noted: Noted) -> io::Result<()> {
        let facts = self.facts.take().ok_or(io::ErrorKind::AlreadyExists)?;
        self.journal = Some(Journal::create(&self.path, &facts()?, late, noted)?);
        Ok(())
    }

    fn note(&mut self, noted: Noted) -> io::Result<()> {
        self.journal.as_ref().map_or(Ok(()), |journal| journal.note(noted))
    }

    fn came(&mut self, pfn: Pfn) -> io::Result<()> {
        self.journal.as_mut().map_or(Ok(()), |journal| journal.came(pfn))
    }

    fn awaited(&mut self, pfn: Pfn) -> io::Result<()> {
        self.journal.as_mut().map_or(Ok(()), |journal| journal.awaited(pfn))
    }

    fn end(&mut self) {
        if let Some(Err(error)) = self.journal.take().map(Journal::remove) {
            log::warn!("the journal of late pages cannot be removed: {error}");
        }
    }
}
