//! Guests whose pages followed them to this host when the process that fetched these was killed. The source's next ssh starts
//! another one; until that gets through the guest is held still here, since somebody who waits for a page in vain gives up:
//! Linux's backends after half a minute, with an I/O error.
use std::collections::HashSet;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::thread::{self, JoinHandle};

use anyhow::{Context, Result};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use xen_sys::{DomId, Xenctrl, uuid_text};
use xenfold::late::journal::{Journal, JournalError, Noted};
use xenfold::migrations::{Forsaken, forsaken};

const EVERY: Timespec = Timespec { tv_sec: 1, tv_nsec: 0 };

/// Looks once a second, until `stop` can be read from. `folder` has the agents' records. Errors: none but in the log.
pub fn start(folder: &Path, stop: OwnedFd) -> Option<JoinHandle<()>> {
    let folder = folder.to_owned();
    let watch = move || {
        let mut told = HashSet::new();
        loop {
            look(&folder, &mut told, pause);
            match poll(&mut [PollFd::new(&stop, PollFlags::IN)], Some(&EVERY)) {
                Ok(0) | Err(rustix::io::Errno::INTR) => {}
                _ => return,
            }
        }
    };
    let started = thread::Builder::new().name("forsaken".into()).spawn(watch);
    started
        .inspect_err(|error| log::error!("guests whose pager is killed are not held still: {error}"))
        .ok()
}

/// Holds those still that nobody looks after. `told`: of whom it has been said.
fn look(folder: &Path, told: &mut HashSet<PathBuf>, mut pause: impl FnMut(&Forsaken) -> Result<bool>) {
    for (path, one) in forsaken(folder) {
        if !one.here || one.held {
            continue;
        }
        let held = hold(&path, || pause(&one));
        if told.insert(path) {
            let Forsaken { guest, missing, .. } = &one;
            match held {
                Ok(true) => log::error!(
                    "the xenfold that received guest {guest} was killed while {missing} of its pages were still on the host it \
                     came from: the guest stands still here until that connects again, which xenfold-ssh does there by itself. \
                     Where it was ended, too, type `xenfold follow {guest}` there"
                ),
                Ok(false) => {}
                Err(error) => log::error!("guest {guest}, whose pager was killed, cannot be held still: {error:#}"),
            }
        }
    }
}

/// Whether it is held still now: not if somebody goes on with it, or it is gone.
fn hold(path: &Path, pause: impl FnOnce() -> Result<bool>) -> Result<bool> {
    // Whoever wants to go on waits for this lock.
    let (journal, found) = match Journal::take(path) {
        Ok(taken) => taken,
        Err(JournalError::Absent | JournalError::Owned) => return Ok(false),
        Err(error) => return Err(error.into()),
    };
    if found.noted.landed || found.noted.held {
        return Ok(false);
    }
    // First, so that whoever goes on knows of it whenever this process is killed.
    journal.note(Noted {
        held: true,
        ..found.noted
    })?;
    let paused = pause();
    if !matches!(paused, Ok(true)) {
        journal.note(found.noted)?;
    }
    paused
}

/// False: it is gone.
fn pause(one: &Forsaken) -> Result<bool> {
    let (xen, domid) = (
        Xenctrl::open()?,
        DomId::new(one.domid).context("its journal names no domain")?,
    );
    let info = xen.domain(domid)?;
    if !info.is_some_and(|info| !info.dying && uuid_text(&info.uuid) == one.uuid) {
        return Ok(false);
    }
    xen.pause(domid)?;
    Ok(true)
}

#[cfg(test)]
mod tests {
    use xenfold::late::journal::{Facts, PAGER, SERVER};
    use xenfold::page::Pfn;
    use xenfold::page_set::PageSet;

    use super::*;

    fn journal(path: &Path, guest: &str) -> Journal {
        let mut late = PageSet::new(100);
        late.insert(Pfn::new(7).unwrap());
        let facts = Facts {
            guest: guest.into(),
            ..Facts::default()
        };
        Journal::create(path, &facts, &late, Noted::default()).unwrap()
    }

    #[test]
    fn a_guest_is_held_once_when_its_pager_is_killed() {
        let folder = tempfile::tempdir().unwrap();
        let at = |name: &str, side: &str| folder.path().join(name).with_extension(side);
        let living = journal(&at("living", PAGER), "living");
        drop(journal(&at("killed", PAGER), "killed"));
        drop(journal(&at("gone", PAGER), "gone"));
        drop(journal(&at("left", SERVER), "left"));
        let landed = journal(&at("landed", PAGER), "landed");
        landed
            .note(Noted {
                landed: true,
                ..Noted::default()
            })
            .unwrap();
        drop(landed);
        let (mut told, mut held) = (HashSet::new(), Vec::new());
        for _ in 0..2 {
            look(folder.path(), &mut told, |one| {
                held.push(one.guest.clone());
                Ok(one.guest != "gone")
            });
        }
        held.sort();
        assert_eq!(held, ["gone", "gone", "killed"]);
        let (_, found) = Journal::take(&at("killed", PAGER)).unwrap();
        assert!(found.noted.held);
        let (_, found) = Journal::take(&at("gone", PAGER)).unwrap();
        assert!(!found.noted.held);
        drop(living);
    }
}
