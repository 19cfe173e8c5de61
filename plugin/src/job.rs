//! `xenfold abort GUEST` and `xenfold jobinfo GUEST`: a migration under way, from another terminal.
use std::fs;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal};
use xen_sys::Xenctrl;
use xenfold::report::Figures;

use crate::guest::{self, AWAY, Guest};
use crate::progress::{arriving_line, line, summary};
use crate::record::{self, Migration};
use crate::{arrival, following, process};

/// How long an agent that is to end may take: the other host cleans up first, and xl resumes the guest.
const ENDING: Duration = Duration::from_secs(60);

/// How long xl may take to resume a guest then.
const RESUMING: Duration = Duration::from_secs(10);

#[derive(Debug, clap::Args)]
pub struct AbortArguments {
    /// The guest's name, domid or uuid.
    guest: String,
}

#[derive(Debug, clap::Args)]
pub struct InfoArguments {
    /// The guest's name, domid or uuid.
    guest: String,
    /// All figures, as JSON.
    #[arg(long)]
    json: bool,
}

/// The guest and its migration. Errors: there is no such guest here, or it is not being migrated.
fn under_way(name: &str) -> Result<(Guest, Migration)> {
    let Some(found) = guest::find_going(name)? else {
        bail!("there is no guest {name} on this host")
    };
    match record::under_way(&found.uuid)? {
        Some(migration) => Ok((found, migration)),
        None => bail!("guest {} is not being migrated through xenfold", found.name),
    }
}

/// Ends a migration. Before GO the guest goes on here; after it nothing can be aborted any more, and the migration goes to
/// its end. Waits for that, and says whose the guest is.
pub fn abort(arguments: &AbortArguments) -> Result<()> {
    let (guest, migration) = under_way(&arguments.guest)?;
    let host = &migration.host;
    let name = guest.name.trim_end_matches(AWAY);
    let late = newest(&guest).and_then(|figures| figures.late);
    // Where its connection is lost the attempts to set it up again are ended.
    if late.is_some_and(|late| late.started && late.lost_for_ms == 0) {
        bail!(
            "too late: guest {name} runs on {host}, whose it is, and its pages follow it; `xenfold jobinfo {name}` shows how far they \
             are"
        )
    }
    let agent = i32::try_from(migration.agent).ok().and_then(Pid::from_raw);
    let agent = agent.context("its agent is of an older version; end it with Ctrl-C on `xl migrate`")?;
    // Its number may have become another process's only if it has ended, and then the record is not locked any more.
    let handle = pidfd_open(agent, PidfdFlags::empty());
    let same = record::under_way(&guest.uuid)?.as_ref() == Some(&migration);
    if let (Ok(handle), true) = (handle, same) {
        pidfd_send_signal(&handle, Signal::TERM).context("its agent cannot be told to end")?;
    }
    if !process::wait_for_end(migration.agent, Some(ENDING)) {
        bail!(
            "the migration of guest {name} to {host} has not ended after {} s, and {host} may own the guest already; `xenfold jobinfo \
             {name}` shows how far it is",
            ENDING.as_secs()
        );
    }
    println!("xenfold: {}", whose(&guest, host)?);
    Ok(())
}

/// The newest figures of a migration under way, if they can be had.
fn newest(guest: &Guest) -> Option<Figures> {
    serde_json::from_str(&fs::read_to_string(record::figures_path(&guest.uuid)).ok()?).ok()
}

/// What has become of a guest whose migration has ended. xl resumes a suspended one when the agent has gone.
fn whose(guest: &Guest, host: &str) -> Result<String> {
    let xen = Xenctrl::open()?;
    let name = guest.name.trim_end_matches(AWAY);
    let until = Instant::now() + RESUMING;
    loop {
        match xen.domain(guest.domid)?.filter(|info| !info.dying) {
            None => bail!(
                "too late: guest {name} is not here any more. It was handed over to {host}, or it has ended; \
                 look for it with `ssh {host} xl list`"
            ),
            Some(info) if !guest::is_suspended(&info) => break,
            Some(_) if Instant::now() < until => thread::sleep(Duration::from_millis(200)),
            Some(_) if following::find(guest).is_some() => bail!(
                "the migration has ended; guest {name} is {host}'s and stands still there, and the pages that it lacks are here: \
                 type `xenfold follow {name}`"
            ),
            Some(_) => {
                bail!("the migration has ended and guest {name} is suspended here; type `xenfold resume {name}`")
            }
        }
    }
    // An agent that was still connecting leaves its record.
    record::forget(&guest.uuid);
    Ok(format!(
        "aborted; guest {name} is this host's and runs on here. Migrate it again with the same command."
    ))
}

/// Prints how the pages of a guest are that follow it to this host. False: none do.
fn arriving_info(arguments: &InfoArguments) -> Result<bool> {
    let Some(found) = guest::find(&arguments.guest)? else {
        return Ok(false);
    };
    let Some((figures, age)) = arrival::arriving(&found.uuid) else {
        return Ok(false);
    };
    if let (Some(why), false) = (&figures.error, arguments.json) {
        bail!(
            "guest {} stands still here, and is this host's; xenfold could not go on with it: {why}. It is tried again when its \
             source connects",
            found.name
        );
    }
    let late = figures.late.clone().unwrap_or_default();
    if arguments.json {
        println!("{}", serde_json::to_string(&figures)?);
    } else {
        println!("{}", arriving_line(&found.name, &late));
    }
    if age > arrival::STALE && late.missing > 0 {
        bail!(
            "xenfold, which fetches its pages, was ended {} s ago: guest {} stands still as soon as it needs one of the {} pages \
             that are missing. It goes on when its source connects again, which xenfold-ssh does there by itself; where that was \
             ended, too, type `xenfold follow {1}` there",
            age.as_secs(),
            found.name,
            late.missing
        );
    }
    Ok(true)
}

/// Prints the newest figures of a migration.
pub fn info(arguments: &InfoArguments) -> Result<()> {
    let migration = under_way(&arguments.guest);
    if migration.is_err() && arriving_info(arguments)? {
        return Ok(());
    }
    let (guest, migration) = migration?;
    let path = record::figures_path(&guest.uuid);
    let json = fs::read_to_string(&path).with_context(|| {
        format!(
            "there are no figures of guest {} yet: its migration has just begun, or ssh to {} is still connecting; it runs on here",
            guest.name, migration.host
        )
    })?;
    if arguments.json {
        println!("{json}");
        return Ok(());
    }
    let figures: Figures = serde_json::from_str(&json).with_context(|| format!("{} is damaged", path.display()))?;
    println!("{}\n{}", line(&figures), summary(&figures));
    Ok(())
}
