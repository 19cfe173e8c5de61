//! `xenfold receive --rejoin NAME` finds that the agent which received the guest was killed while pages followed it: this
//! process goes on in its place, from what that one has written down.
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result, bail};
use xen_sys::{DomId, DomainInfo, Libxl, Xenctrl, Xenstore};
use xenfold::engine::takeover::{self, Start, TakeOver};
use xenfold::engine::{JournalFile, LinkEnds};
use xenfold::late::journal::{Facts, Found, Journal, JournalError, PAGER, journal_path};
use xenfold::migrations::FOLDER;
use xenfold::wire::Hello;

use crate::guest::{GuestFrames, INCOMING, KnownDomain, name_of, uuid_text};
use crate::paging::GuestPager;
use crate::{arrival, process, rejoin, signals, usage};

/// How often it is looked whether the receiving xl has ended.
const LOOK: Duration = Duration::from_millis(100);

/// Where the pager of a migration writes down what another one needs. `None`: that is no name of a migration.
pub fn path(migration: &str) -> Option<PathBuf> {
    journal_path(Path::new(FOLDER), migration, PAGER)
}

/// Takes the journal of a pager that was killed. Errors: there is none, its owner lives, or it cannot be read.
pub fn take(migration: &str) -> Result<(Journal, Found), JournalError> {
    Journal::take(&path(migration).ok_or(JournalError::Absent)?)
}

/// Goes on, with the source at the other end of `ends`. When that is lost others may come, as with the former agent. Errors:
/// the guest is held still, and the next connection tries again.
pub fn run(journal: Journal, found: Found, ends: LinkEnds) -> Result<i32> {
    let facts = found.facts.clone();
    go_on(journal, found, ends).inspect_err(|error| arrival::trouble(&facts.uuid, &facts.guest, format!("{error:#}")))
}

fn go_on(journal: Journal, found: Found, ends: LinkEnds) -> Result<i32> {
    // As for the former one: the guest depends on this process.
    signals::handle(|| log::warn!("not now: pages of the guest are still to come"))?;
    let facts = found.facts.clone();
    let domid = DomId::new(facts.domid).context("the journal names no domain")?;
    let domain = KnownDomain::default();
    domain.set(domid);
    let source = Hello {
        guest_uuid: facts.uuid.clone(),
        guest_name: facts.guest.clone(),
        ..Hello::default()
    };
    let arriving = arrival::Arriving::new(&source);
    let figures = arriving.path();
    let taking = TakeOver {
        journal: Box::new(JournalFile::taken(journal)),
        paging: Box::new(GuestPager::open(domain.clone())?.only(&facts.uuid)),
        frames: Some(Box::new(GuestFrames::open(domain)?)),
        hello: Hello {
            program: xenfold::VERSION.into(),
            late: true,
            rejoins: true,
            frames: true,
            ..Hello::default()
        },
        listen: rejoin::listen(facts.migration.clone()),
        first: Some(ends),
        look: {
            let facts = facts.clone();
            Box::new(move |started| look(&facts, domid, started))
        },
        watching: Some(arriving.watching()),
        program: xenfold::VERSION.into(),
        usage: usage::cpu_ms_and_peak_rss_bytes,
        found,
    };
    let status = takeover::run(taking)?;
    arrival::remove(figures.as_deref());
    if status != 0 {
        arrival::forget(&facts.uuid, &facts.migration);
    }
    Ok(status)
}

/// What the receiving xl has done, whose agent is dead. It has the last word; only then the guest is as it stays.
fn look(facts: &Facts, domid: DomId, started: bool) -> Start {
    if started {
        return Start::Started;
    }
    while facts.xl != 0 && process::since(facts.xl) == Some(facts.xl_since) {
        std::thread::sleep(LOOK);
    }
    looked(facts, domid).unwrap_or_else(|error| Start::Unknown(format!("it cannot be seen whether it runs: {error:#}")))
}

fn looked(facts: &Facts, domid: DomId) -> Result<Start> {
    let Some(info) = info(&Xenctrl::open()?, domid, &facts.uuid)? else {
        return Ok(Start::Unknown(
            "it is not there: it was not started, or has ended since".into(),
        ));
    };
    let name = name_of(&Xenstore::open()?, domid)?.unwrap_or_default();
    if name.is_empty() || !name.ends_with(INCOMING) && info.cpu_time_ns == 0 {
        bail!("it is called {name:?}, and has not run");
    }
    if !name.ends_with(INCOMING) {
        return Ok(Start::Started);
    }
    if info.cpu_time_ns > 0 {
        bail!("it has run, and is called {name}");
    }
    // xl was ended before it started the guest, or destroyed it.
    Libxl::open()?.destroy(domid)?;
    Ok(Start::GivenBack)
}

/// The domain with this number, as long as it is this guest.
pub fn info(xen: &Xenctrl, domid: DomId, uuid: &str) -> Result<Option<DomainInfo>> {
    let info = xen.domain(domid)?;
    Ok(info.filter(|info| !info.dying && uuid_text(&info.uuid) == uuid))
}
