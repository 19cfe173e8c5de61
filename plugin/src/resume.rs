//! `xenfold resume GUEST`: a source that was left suspended goes on, after the destination was asked.
use std::fs;

use anyhow::{Context, Result, bail};
use xen_sys::{Xenctrl, Xenstore};
use xenfold::config::Config;

use crate::guest::{self, Guest, INCOMING};
use crate::record::{self, Migration};
use crate::{arrival, balloon, following, repair, ssh};

#[derive(Debug, clap::Args)]
pub struct Arguments {
    /// The guest's name, with or without xl's `--migratedaway`, its domid, or its uuid.
    guest: String,
    /// The host it was going to, where that is not known here any more.
    #[arg(long)]
    host: Option<String>,
    /// Resume although the other host cannot be asked. If it runs the guest, two will run, on one disk.
    #[arg(long)]
    force: bool,
}

#[derive(Debug, clap::Args)]
pub struct StateArguments {
    uuid: String,
    /// The name of the migration that may have brought it.
    migration: Option<String>,
}

/// What a host says of a guest: `xenfold guest-state` prints it as one word.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Held {
    Absent,
    /// Paused as `NAME--incoming`: left over from a migration that did not come to its end.
    Incoming,
    Present,
    /// Not there, but it was started there by the migration that is asked for.
    Gone,
}

impl Held {
    fn word(self) -> &'static str {
        match self {
            Held::Absent => "absent",
            Held::Incoming => "incoming",
            Held::Present => "present",
            Held::Gone => "gone",
        }
    }
}

/// Prints what this host holds of a guest.
pub fn print_state(arguments: &StateArguments) -> Result<()> {
    let mut held = held_here(&arguments.uuid)?;
    if let (Held::Absent, Some(migration)) = (held, &arguments.migration)
        && arrival::is_noted(&arguments.uuid, migration)?
    {
        held = Held::Gone;
    }
    println!("{}", held.word());
    Ok(())
}

fn held_here(uuid: &str) -> Result<Held> {
    let (xen, store) = (Xenctrl::open()?, Xenstore::open()?);
    let mut held = Held::Absent;
    for info in xen
        .domains()?
        .iter()
        .filter(|info| !info.dying && guest::uuid_text(&info.uuid) == uuid)
    {
        let name = guest::name_of(&store, info.domid)?.unwrap_or_default();
        if !name.ends_with(INCOMING) {
            return Ok(Held::Present);
        }
        held = Held::Incoming;
    }
    Ok(held)
}

/// Repairs a source. Errors: why not, who owns a runnable guest, and what to do next.
pub fn run(arguments: &Arguments, config: &Config) -> Result<()> {
    let Some(found) = guest::find_going(&arguments.guest)? else {
        bail!("there is no guest {} on this host", arguments.guest)
    };
    let info = Xenctrl::open()?.domain(found.domid)?;
    if !info.as_ref().is_some_and(guest::is_suspended) {
        if let Ok(Some(left)) = record::left_behind(&found.uuid)
            && let Some(kib) = left.memory_target_kib
            && left.domid == found.domid.get()
            && balloon::give_back_left(&found, kib) == Some(true)
        {
            record::forget(&found.uuid);
            return Ok(());
        }
        bail!("guest {} is not suspended: there is nothing to resume", found.name);
    }
    let following = following::find(&found);
    if let (Some((_, facts)), false) = (&following, arguments.force) {
        bail!(
            "guest {} was let go to {}, and pages that it lacks there are here only: it is that host's, or nobody's yet. Type \
             `xenfold follow {0}`: it sends them, or says what to do",
            facts.guest,
            facts.host
        );
    }
    let migration = record::left_behind(&found.uuid)?;
    let size = migration.as_ref().and_then(|migration| migration.memory_target_kib);
    ask_destination(arguments, config, &found, migration)?;
    let done = repair::resume(found.domid)?;
    if let Some(kib) = size {
        balloon::give_back_left(&found, kib);
    }
    record::forget(&found.uuid);
    // Of no use any more: the guest has gone on here.
    following.map(|(path, _)| fs::remove_file(path));
    println!("xenfold: {done}");
    Ok(())
}

fn ask_destination(arguments: &Arguments, config: &Config, guest: &Guest, migration: Option<Migration>) -> Result<()> {
    let Guest { name, uuid, .. } = guest;
    let ssh = migration
        .as_ref()
        .map_or_else(|| ssh::words(&config.ssh), |migration| migration.ssh.clone());
    let name_of_migration = migration.as_ref().map(|migration| migration.migration.clone());
    let Some(host) = arguments.host.clone().or(migration.map(|migration| migration.host)) else {
        if arguments.force {
            return Ok(());
        }
        bail!(
            "it is not known here where guest {name} was going; if it runs nowhere else, type \
             `xenfold resume {} --host HOST`, or --force when there is no such host any more",
            arguments.guest
        );
    };
    let mut question = ["xenfold", "guest-state", uuid].map(str::to_owned).to_vec();
    question.extend(name_of_migration.filter(|name| !name.is_empty()));
    let (answer, status) = ssh::run(&ssh, &host, &question).context("ssh cannot be started")?;
    match (answer.trim(), status) {
        ("absent", 0) => Ok(()),
        ("present", 0) => bail!(
            "{host} holds guest {name} and owns it: two would run on one disk. If it is well there, end the copy here \
             with `xl destroy {name}`"
        ),
        ("incoming", 0) => bail!(
            "{host} still has a paused copy of guest {name}; end that first with `ssh {host} xl destroy \
             DOMID` (its name there ends in {INCOMING}), then type `xenfold resume {}` again",
            arguments.guest
        ),
        ("gone", 0) if arguments.force => {
            say!("xenfold: guest {name} ran on {host}; resuming because of --force");
            Ok(())
        }
        ("gone", 0) => bail!(
            "{host} has started guest {name} and does not hold it any more: it has ended there or moved on. Look for it, and \
             end the copy here with `xl destroy {name}`. Only if it runs nowhere, and what it did on {host} may be lost, \
             type `xenfold resume {} --force`",
            arguments.guest
        ),
        _ if arguments.force => {
            say!("xenfold: {host} could not be asked; resuming because of --force");
            Ok(())
        }
        _ => bail!(
            "{host} could not be asked whether it runs guest {name} (status {status}). Make sure that it does not, then \
             type `xenfold resume {} --force`",
            arguments.guest
        ),
    }
}
