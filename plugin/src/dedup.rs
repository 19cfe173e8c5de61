//! `xenfold dedup`: memory that guests of this host share.
use std::path::PathBuf;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use clap::{Args, Subcommand};
use xenfold::config::Size;
use xenfold::control::{DedupStats, DedupStatus};

use crate::daemon_commands::{Asking, PATIENCE, duration, mib, uuid_of};
use crate::dedup_page;

pub(crate) const PAGE_BYTES: u64 = 4096;

/// Without a page given back or a frame gone through for this long, `disable` does not wait any more.
const GIVE_BACK_PATIENCE: Duration = Duration::from_secs(30);

#[derive(Debug, Args)]
pub struct Arguments {
    #[command(subcommand)]
    command: Command,
    #[command(flatten)]
    asking: Asking,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// What is shared, and what that spares.
    Status,
    /// Begin to share, until the daemon ends; `sharing` in /etc/xen/xenfold.conf is for good.
    Enable,
    /// Share nothing further and give all pages back to their guests, as far as there is memory for it.
    Disable {
        /// Do not wait until they are given back.
        #[arg(long)]
        no_wait: bool,
    },
    /// Go through a guest at once.
    Scan {
        /// The guest's name, its domid, or its uuid.
        guest: String,
    },
    /// What is shared between which guests, and how it went over time.
    Report {
        /// Write a page with charts to this file.
        #[arg(long, value_name = "FILE")]
        html: Option<PathBuf>,
    },
}

pub fn run(arguments: &Arguments) -> Result<()> {
    let asking = &arguments.asking;
    let mut client = asking.connect(Some(PATIENCE))?;
    match &arguments.command {
        Command::Status => asking.print(&client.dedup()?, status_text),
        Command::Enable => {
            client.dedup_enable(true)?;
            asking.print(&client.dedup()?, status_text)
        }
        Command::Disable { no_wait } => {
            client.dedup_enable(false)?;
            let mut status = client.dedup()?;
            let mut gained = (Instant::now(), None);
            while let DedupStatus::Running(stats) = &status
                && stats.returning
                && !no_wait
            {
                let so_far = Some((stats.pages, stats.swept_frames));
                if so_far != gained.1 {
                    gained = (Instant::now(), so_far);
                } else if gained.0.elapsed() > GIVE_BACK_PATIENCE {
                    bail!(
                        "{} pages are still shared as far as the daemon knows, and Xen spares {} frames: memory for them is \
                         missing, or their guests are being migrated; the daemon goes on",
                        stats.pages,
                        stats.xen_saved_pages
                    );
                }
                std::thread::sleep(Duration::from_millis(300));
                status = client.dedup()?;
            }
            asking.print(&status, status_text)
        }
        Command::Scan { guest } => {
            let (uuid, _) = uuid_of(guest)?;
            client.dedup_scan(&uuid)?;
            asking.print(&client.dedup()?, status_text)
        }
        Command::Report { html } => {
            let status = client.dedup()?;
            match html {
                Some(path) => {
                    let written = std::fs::write(path, dedup_page::page(&status));
                    written.with_context(|| format!("{} cannot be written", path.display()))
                }
                None => asking.print(&status, report_text),
            }
        }
    }
}

fn pages(count: u64) -> String {
    mib(count.saturating_mul(PAGE_BYTES))
}

pub(crate) fn status_text(status: &DedupStatus) -> String {
    let stats = match status {
        DedupStatus::Running(stats) => stats,
        DedupStatus::Absent(absent) if absent.failed => {
            return format!("sharing: FAILED, there is none: {}", absent.reason);
        }
        DedupStatus::Absent(absent) => return format!("sharing: none: {}", absent.reason),
    };
    let state = match (stats.enabled, stats.returning) {
        (true, _) if stats.short => "on, but free memory is below sharing_reserve: nothing further is shared",
        (true, _) => "on",
        (false, true) => "off, what is shared goes back to the guests",
        (false, false) => "off",
    };
    let mut text = format!(
        "sharing   {state}\n\
         spared    {} by the table, {} by Xen\n\
         shared    {} pages have {} frames\n\
         free      {}, sharing_reserve {}\n\
         written   {} pages after they were shared ({} a second), {} before\n\
         so far    {} shared, {} not shared by Xen, {} given back\n",
        pages(stats.saved_pages),
        pages(stats.xen_saved_pages),
        stats.pages,
        stats.frames,
        mib(stats.free_bytes),
        Size::new(stats.reserve_bytes),
        stats.broken,
        stats.breaks_per_s,
        stats.changed,
        stats.shared,
        stats.refused,
        stats.unshared,
    );
    if stats.stood > 0 {
        text += &format!(
            "no memory {} times a processor stood still for want of memory, {} do now\n",
            stats.stood, stats.standing
        );
    }
    if stats.arrived > 0 {
        text += &format!(
            "arrived   {} pages that another guest had, {} of them shared at once, {} still to come\n",
            stats.arrived, stats.arrived_shared, stats.arrived_waiting
        );
    }
    let width = |of: fn(&xenfold::control::DedupGuest) -> &str| {
        let lengths = stats.guests.iter().map(|guest| of(guest).len());
        lengths.max().unwrap_or(0).max(5)
    };
    let (name, group) = (width(|guest| &guest.name), width(|guest| &guest.group));
    if !stats.guests.is_empty() {
        text += &format!("{:>5} {:name$} {:group$} {:>10}\n", "domid", "guest", "group", "shared");
    }
    for guest in &stats.guests {
        text += &format!(
            "{:>5} {:name$} {:group$} {:>10}{}\n",
            guest.domid,
            guest.name,
            guest.group,
            guest.shared_pages,
            guest
                .left_out
                .as_ref()
                .map_or(String::new(), |reason| format!("  left alone: {reason}"))
        );
    }
    text
}

fn report_text(status: &DedupStatus) -> String {
    let mut text = status_text(status);
    let DedupStatus::Running(stats) = status else {
        return text;
    };
    text += &pairs_text(stats);
    if !stats.samples.is_empty() {
        text += &format!("\n{:>10} {:>12} {:>12}\n", "ago", "spared", "written");
    }
    // A screen of them, evenly.
    let every = stats.samples.len().div_ceil(20).max(1);
    for sample in stats.samples.iter().step_by(every) {
        text += &format!(
            "{:>10} {:>12} {:>12}\n",
            duration(sample.age_s),
            pages(sample.saved_pages),
            sample.broken
        );
    }
    text
}

fn pairs_text(stats: &DedupStats) -> String {
    let mut text = String::new();
    let name = |domid: u32| {
        let guest = stats.guests.iter().find(|guest| guest.domid == domid);
        guest.map_or_else(|| format!("domain {domid}"), |guest| guest.name.clone())
    };
    for pair in &stats.pairs {
        let [a, b] = pair.domids;
        let between = match a == b {
            true => format!("within {}", name(a)),
            false => format!("{} and {}", name(a), name(b)),
        };
        text += &format!("\n{between}: {} pages, {}", pair.pages, pages(pair.pages));
    }
    text + "\n"
}

#[cfg(test)]
mod tests {
    use xenfold::control::{Absent, DedupGuest, DedupPair, DedupSample};

    use super::*;

    #[test]
    fn texts_say_what_is_shared_and_what_is_missing() {
        let guest = |domid, name: &str, left_out: Option<&str>| DedupGuest {
            domid,
            name: name.into(),
            group: "web".into(),
            shared_pages: 512,
            left_out: left_out.map(Into::into),
        };
        let stats = DedupStats {
            enabled: true,
            pages: 1024,
            frames: 512,
            saved_pages: 512,
            arrived: 9,
            arrived_shared: 7,
            xen_saved_pages: 513,
            free_bytes: 1 << 30,
            reserve_bytes: 256 << 20,
            guests: vec![
                guest(3, "web-1", None),
                guest(4, "web-22", Some("passed-through device")),
            ],
            pairs: vec![
                DedupPair {
                    domids: [3, 4],
                    pages: 256,
                },
                DedupPair {
                    domids: [3, 3],
                    pages: 1,
                },
            ],
            samples: vec![DedupSample::default(); 100],
            ..DedupStats::default()
        };
        let text = report_text(&DedupStatus::Running(Box::new(stats.clone())));
        for says in [
            "sharing   on\n",
            "2.0 MiB by the table, 2.0 MiB by Xen",
            "1024 pages have 512 frames",
            "arrived   9 pages that another guest had, 7 of them shared at once, 0 still to come\n",
            "1024.0 MiB, sharing_reserve 256MiB",
            "    3 web-1  web          512\n",
            "    4 web-22 web          512  left alone: passed-through device",
            "web-1 and web-22: 256 pages, 1.0 MiB",
            "within web-1: 1 pages",
        ] {
            assert!(text.contains(says), "{says}: {text}");
        }
        assert!(text.lines().count() < 40);
        let short = DedupStats { short: true, ..stats };
        assert!(status_text(&DedupStatus::Running(Box::new(short))).contains("below sharing_reserve"));
        let absent = |failed| {
            DedupStatus::Absent(Absent {
                failed,
                reason: "built without".into(),
            })
        };
        assert_eq!(status_text(&absent(false)), "sharing: none: built without");
        assert!(report_text(&absent(true)).contains("FAILED"));
    }
}
