//! `xenfold follow GUEST`: the agent at the source was killed while pages followed a guest; what the guest lacks is in its
//! suspended copy here, and is sent from there.
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use anyhow::{Context, Result, bail};
use parking_lot::Mutex;
use xen_sys::{Libxl, Xenctrl};
use xenfold::config::Config;
use xenfold::engine::source::{self, Ending, Following};
use xenfold::engine::{EngineError, JournalFile, chain};
use xenfold::late::journal::{Facts, Journal, JournalError, SERVER, journal_path, look};
use xenfold::migrations::FOLDER;
use xenfold::report::Figures;
use xenfold::wire::Hello;

use crate::guest::{self, AWAY, Guest, GuestFrames, KnownDomain};
use crate::progress::{Progress, summary};
use crate::record::{self, Record};
use crate::rejoin::NOBODY;
use crate::{repair, signals, source as agent};

#[derive(Debug, clap::Args)]
pub struct Arguments {
    /// The guest's name, with or without xl's `--migratedaway`, its domid, or its uuid.
    guest: String,
}

/// Where the page server of a migration writes down what another one needs. `None`: that is no name of a migration.
pub fn path(migration: &str) -> Option<PathBuf> {
    journal_path(Path::new(FOLDER), migration, SERVER)
}

/// The journal of a guest that pages still follow from here.
pub fn find(guest: &Guest) -> Option<(PathBuf, Facts)> {
    let paths = fs::read_dir(FOLDER)
        .into_iter()
        .flatten()
        .flatten()
        .map(|entry| entry.path());
    let ours = paths.filter(|path| path.extension().is_some_and(|extension| extension == SERVER));
    let mut found = ours.filter_map(|path| Some((look(&path).ok()?.facts, path)));
    let is_it = |facts: &Facts| facts.uuid == guest.uuid && facts.domid == guest.domid.get();
    let (facts, path) = found.find(|(facts, _)| is_it(facts))?;
    Some((path, facts))
}

/// Forgets what an earlier migration of a guest has left that is about to be migrated.
pub fn forget(guest: &Guest) {
    while let Some((path, _)) = find(guest) {
        if fs::remove_file(path).is_err() {
            return;
        }
    }
}

/// What is said when the suspended guest is not there any more before all of its pages were sent.
pub fn lost(guest: &str, host: &str, error: &EngineError) -> String {
    format!(
        "guest {guest} cannot go on on {host}, whose it is and where it stands still: {}. Type `ssh {host} xl destroy {guest}`, and \
         start it from its disks again, unless it runs on this host.",
        chain(error)
    )
}

/// Sends what is missing, and does at the end what xl would have done. Returns the exit status.
pub fn run(arguments: &Arguments, config: &Config) -> Result<i32> {
    let Some(mut guest) = guest::find_going(&arguments.guest)? else {
        bail!("there is no guest {} on this host", arguments.guest)
    };
    let Some((path, _)) = find(&guest) else {
        bail!(
            "no pages of guest {} follow it from here; if it is suspended, type `xenfold resume {0}`",
            arguments.guest
        )
    };
    let info = Xenctrl::open()?.domain(guest.domid)?;
    if !info.as_ref().is_some_and(guest::is_suspended) {
        bail!("guest {} is not suspended: it has not left this host", guest.name);
    }
    let (journal, found) = match Journal::take(&path) {
        Ok(taken) => taken,
        Err(JournalError::Owned) => bail!(
            "somebody sends the pages of guest {} already: `xenfold jobinfo {0}` shows how far it is",
            arguments.guest
        ),
        Err(error) => return Err(error.into()),
    };
    let facts = found.facts.clone();
    guest.name = guest.name.trim_end_matches(AWAY).to_owned();
    let record = Record::take(&guest, &facts.host, facts.ssh.clone(), &facts.migration)?;
    let events = source::events();
    let (name, host, settled) = (guest.name.clone(), facts.host.clone(), Arc::new(AtomicBool::new(false)));
    let over = settled.clone();
    // What has not gone is written down: another one can go on wherever this one ends.
    signals::handle_typed(move || {
        if over.load(Ordering::SeqCst) {
            return;
        }
        say!(
            "xenfold: ended; guest {name} is {host}'s, and stands still there as soon as it needs one of the pages that are kept \
             here. Type `xenfold follow {name}` to go on."
        );
        std::process::exit(1)
    })?;
    let domain = KnownDomain::default();
    domain.set(guest.domid);
    let figures = Arc::new(Mutex::new(Figures {
        guest: guest.name.clone(),
        host: facts.host.clone(),
        mode: "follow".into(),
        // All passes are behind it.
        iteration: 1,
        ..Figures::default()
    }));
    figures.lock().late.get_or_insert_default().started = true;
    let live = Some(record::figures_path(&guest.uuid));
    let progress = Progress::start(figures.clone(), domain.clone(), config.quiet, live)?;
    let ending = source::follow(Following {
        found,
        journal: Box::new(JournalFile::taken(journal)),
        frames: Box::new(GuestFrames::open(domain)?),
        connect: agent::connecting(facts.ssh, facts.host.clone(), facts.migration, Arc::default()),
        hello: Hello {
            program: xenfold::VERSION.into(),
            timeout_s: config.timeout,
            ..Hello::default()
        },
        figures: figures.clone(),
        events,
    })?;
    settled.store(true, Ordering::SeqCst);
    drop(progress);
    let figures = figures.lock().clone();
    end(ending, &guest, &facts.host, &path, record, &figures, config.quiet)
}

fn end(
    ending: Ending,
    guest: &Guest,
    host: &str,
    journal: &Path,
    record: Record,
    figures: &Figures,
    quiet: bool,
) -> Result<i32> {
    let name = &guest.name;
    match ending {
        Ending::Completed { .. } => {
            Libxl::open()?.destroy(guest.domid).with_context(|| {
                format!("guest {name} runs on {host} with all of its memory; its copy here is of no use, and cannot be removed: type `xl destroy {name}{AWAY}`")
            })?;
            record.close();
            if !quiet {
                summary(figures).lines().for_each(|line| say!("xenfold: {line}"));
            }
            say!("xenfold: guest {name} runs on {host} with all of its memory; its copy here was removed.");
            Ok(0)
        }
        Ending::SourceOwns(error) => {
            let done = repair::resume(guest.domid)?;
            record.close();
            say!("xenfold: {host} gave guest {name} back ({}): {done}.", chain(&error));
            Ok(1)
        }
        Ending::Unknown(EngineError::PeerAborted(why)) if why.starts_with(NOBODY) => {
            let _ = fs::remove_file(journal);
            say!(
                "xenfold: {host} does not take the pages of guest {name}: {}. Type `xenfold resume {name}`: it asks {host}, and \
                 resumes the guest here only if it is not there.",
                why
            );
            Ok(1)
        }
        Ending::Unknown(error @ EngineError::CopyGone(_)) => {
            record.close();
            say!("xenfold: {}", lost(name, host, &error));
            Ok(1)
        }
        Ending::Unknown(error) => {
            say!(
                "xenfold: the pages that guest {name} lacks on {host}, whose it is, were not sent: {}. It stands still there, and \
                 they are kept here; type `xenfold follow {name}`.",
                chain(&error)
            );
            Ok(1)
        }
    }
}
