//! `xenfold doctor [HOST]`: what this host, and another one, can do, and what is missing for the rest.
use std::path::Path;
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result};
use xen_sys::{BUILT_FOR, DomainInfo, Paging, Xenctrl, Xenstore};
use xenfold::config::Config;
use xenfold::control::{Client, SOCKET};
use xenfold::engine::chain;

use crate::guest::name_of;
use crate::{may_follow, ssh};

/// How long the daemon may take to answer.
const DAEMON: Duration = Duration::from_secs(5);

#[derive(Debug, clap::Args)]
pub struct Arguments {
    /// The host that guests are to be migrated to; it is asked by ssh.
    host: Option<String>,
}

/// Prints what was found. Returns 1 where no guest can be migrated at all, and the other host's status if that is not 0.
pub fn run(arguments: &Arguments, config: &Config) -> Result<i32> {
    let here = here();
    println!("this host:");
    here.lines.iter().for_each(|line| println!("  {line}"));
    let status = i32::from(!here.can_migrate);
    let Some(host) = &arguments.host else { return Ok(status) };
    println!("{host}:");
    let words = ssh::words(&config.ssh);
    let (program, options) = words.split_first().context("the configuration names no ssh")?;
    let asked = Command::new(program)
        .args(options)
        .args([host.as_str(), "xenfold", "doctor"])
        .output()
        .with_context(|| format!("{program} cannot be started"))?;
    for line in String::from_utf8_lossy(&asked.stdout).lines().skip(1) {
        println!("{line}");
    }
    let there = ssh::code(asked.status);
    if ssh::COMMAND_NOT_FOUND.contains(&there) {
        println!("  it has no xenfold: guests go there as plain xl sends them; install it there");
    } else if there != 0 && asked.stdout.is_empty() {
        println!("  it cannot be asked (status {there}); try `ssh {host} xenfold doctor`");
    }
    Ok(if status == 0 { there } else { status })
}

struct Found {
    lines: Vec<String>,
    can_migrate: bool,
}

fn here() -> Found {
    let xen = match Xenctrl::open().and_then(|xen| xen.version().map(|version| (xen, version))) {
        Ok((xen, (major, minor))) => {
            let version = format!("Xen {major}.{minor}, xenfold is built for {BUILT_FOR}");
            (Some(xen), version, true)
        }
        Err(error) => (None, chain(&error), false),
    };
    let (xen, version, can_migrate) = xen;
    let mut lines = vec![version];
    lines.push(match Paging::probe() {
        Ok(()) => "guests can come here with --mode precopy, hybrid and postcopy".into(),
        Err(error) => format!("guests can come here with --mode precopy only: {}", chain(&error)),
    });
    lines.push(match Client::connect(Path::new(SOCKET), Some(DAEMON)) {
        Ok(_) => "xenfoldd runs: contents are kept across migrations".into(),
        Err(error) => format!("contents are not kept across migrations: {}", chain(&error)),
    });
    let guests = xen.and_then(|xen| xen.domains().ok()).unwrap_or_default();
    lines.extend(guests.iter().filter(|info| info.domid.get() > 0).map(guest));
    Found { lines, can_migrate }
}

/// What can become of one guest.
fn guest(info: &DomainInfo) -> String {
    let name = Xenstore::open()
        .ok()
        .and_then(|store| name_of(&store, info.domid).ok()?);
    let name = name.unwrap_or_else(|| info.domid.to_string());
    match may_follow::of_kind(info) {
        _ if info.paged_pages > 0 => format!(
            "guest {name} cannot be migrated or saved yet: {} of its pages have not come from where it was before",
            info.paged_pages
        ),
        None => format!("guest {name} can go with any mode"),
        Some(why) => format!("guest {name} can go with --mode precopy only: {why}"),
    }
}
