//! What an administrator asks the daemon: `xenfold status`, `xenfold index`, `xenfold store`, `xenfold template`.
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result};
use clap::{Args, Subcommand};
use serde::Serialize;
use xenfold::config::Size;
use xenfold::control::{self, Client, ErrorCode, IndexStats, IndexStatus, StoreStatus, TemplateInfo};

use xen_sys::{DomId, Xenctrl, uuid_text};
use xenfold::migrations::{self, Forsaken};

use crate::progress::arriving_warning;
use crate::{arrival, guest};

/// How long the daemon may take to answer what needs no reading of the store.
pub(crate) const PATIENCE: Duration = Duration::from_secs(30);

/// Options of all commands that ask the daemon.
#[derive(Debug, Args)]
pub struct Asking {
    /// Print JSON.
    #[arg(long, global = true)]
    json: bool,
    /// Where the daemon listens.
    #[arg(long, global = true, value_name = "PATH", default_value = control::SOCKET, hide = true)]
    socket: PathBuf,
}

#[derive(Debug, Args)]
pub struct StatusArguments {
    #[command(flatten)]
    asking: Asking,
}

#[derive(Debug, Args)]
pub struct IndexArguments {
    #[command(flatten)]
    asking: Asking,
}

#[derive(Debug, Args)]
pub struct StoreArguments {
    #[command(subcommand)]
    command: StoreCommand,
    #[command(flatten)]
    asking: Asking,
}

#[derive(Debug, Subcommand)]
enum StoreCommand {
    /// What is kept, group by group, and what it takes.
    Stats,
    /// Read and hash all contents, drop those that are damaged.
    Verify,
    /// Drop contents that no image and no template names.
    Gc,
}

#[derive(Debug, Args)]
pub struct TemplateArguments {
    #[command(subcommand)]
    command: TemplateCommand,
    #[command(flatten)]
    asking: Asking,
}

#[derive(Debug, Subcommand)]
enum TemplateCommand {
    /// Keep the contents of a guest that has migrated until the template is removed.
    Add {
        /// The guest's name, its domid, or its uuid; of a guest that is not here any more its uuid.
        guest: String,
        /// The template's name, when it shall not be the guest's.
        #[arg(long)]
        name: Option<String>,
    },
    /// List the templates of all groups.
    List,
    /// Remove a template; its contents stay until their room is needed.
    Remove {
        name: String,
        /// Its group, where several have a template of that name.
        #[arg(long)]
        group: Option<String>,
    },
}

impl Asking {
    /// A connection that waits at most so long for each answer.
    pub(crate) fn connect(&self, patience: Option<Duration>) -> Result<Client> {
        Ok(Client::connect(&self.socket, patience)?)
    }

    pub(crate) fn wants_json(&self) -> bool {
        self.json
    }

    pub(crate) fn print<T: Serialize>(&self, value: &T, text: impl FnOnce(&T) -> String) -> Result<()> {
        let line = match self.json {
            true => serde_json::to_string_pretty(value)?,
            false => text(value),
        };
        match writeln!(io::stdout(), "{}", line.trim_end()) {
            // Whoever reads has read enough.
            Err(error) if error.kind() == io::ErrorKind::BrokenPipe => Ok(()),
            written => Ok(written?),
        }
    }
}

pub fn status(arguments: &StatusArguments) -> Result<()> {
    let asking = &arguments.asking;
    let forsaken = forsaken();
    // Whatever is with the daemon.
    if !asking.json {
        forsaken.iter().for_each(|one| println!("{}", forsaken_line(one)));
        for figures in arrival::all_arriving() {
            if let Some(late) = figures
                .late
                .as_ref()
                .filter(|late| late.missing + late.lost_to_save > 0)
            {
                println!("{}", arriving_warning(&figures.guest, late));
            }
        }
    }
    let status = asking.connect(Some(PATIENCE))?.status()?;
    asking.print(&control::Status { forsaken, ..status }, status_text)
}

pub fn index(arguments: &IndexArguments) -> Result<()> {
    let asking = &arguments.asking;
    asking.print(&asking.connect(Some(PATIENCE))?.index()?, index_text)
}

pub fn store(arguments: &StoreArguments) -> Result<()> {
    let asking = &arguments.asking;
    match arguments.command {
        StoreCommand::Stats => asking.print(&asking.connect(Some(PATIENCE))?.store_stats()?, stats_text),
        // Both take as long as the disk takes.
        StoreCommand::Verify => asking.print(&asking.connect(None)?.store_verify()?, |verified| {
            let mut text = format!("{} contents read, {} damaged", verified.contents, verified.damaged);
            if verified.damaged > 0 {
                text += " and dropped: look after the disk";
            }
            if verified.groups_skipped > 0 {
                text += &format!(
                    "\n{} groups have no key here and were not read",
                    verified.groups_skipped
                );
            }
            text
        }),
        StoreCommand::Gc => asking.print(&asking.connect(None)?.store_gc()?, |collected| {
            format!(
                "{} contents dropped, {} given back",
                collected.contents,
                mib(collected.bytes)
            )
        }),
    }
}

pub fn template(arguments: &TemplateArguments) -> Result<()> {
    let asking = &arguments.asking;
    let mut client = asking.connect(Some(PATIENCE))?;
    match &arguments.command {
        TemplateCommand::Add { guest, name } => {
            let (uuid, own) = uuid_of(guest)?;
            let name = name.as_deref().unwrap_or(&own);
            client.template_add(name, &uuid)?;
            let added = client.template_list()?;
            let added: Vec<TemplateInfo> = added.into_iter().filter(|template| template.name == name).collect();
            asking.print(&added, |added| templates_text(added))
        }
        TemplateCommand::List => asking.print(&client.template_list()?, |templates| templates_text(templates)),
        TemplateCommand::Remove { name, group } => {
            #[derive(Serialize)]
            struct Removed<'a> {
                removed: &'a str,
            }
            let removed = client.template_remove(name, group.as_deref());
            match removed {
                Err(control::ControlError::Refused(refusal)) if refusal.code == ErrorCode::Ambiguous => {
                    anyhow::bail!("{refusal}: `xenfold template remove {name} --group GROUP`")
                }
                removed => removed?,
            }
            asking.print(&Removed { removed: name }, |removed| {
                format!("{} removed", removed.removed)
            })
        }
    }
}

/// The uuid and the name of the guest that is meant. A uuid needs no Xen.
pub(crate) fn uuid_of(guest: &str) -> Result<(String, String)> {
    let is_uuid = guest.len() == 36 && guest.bytes().all(|byte| byte == b'-' || byte.is_ascii_hexdigit());
    match guest::find(guest) {
        Ok(Some(found)) => Ok((found.uuid, found.name)),
        _ if is_uuid => Ok((guest.into(), guest.into())),
        Ok(None) => anyhow::bail!("there is no guest {guest} on this host; name one that has left by its uuid"),
        Err(error) => Err(error).with_context(|| format!("guest {guest} cannot be looked up; name it by its uuid")),
    }
}

fn status_text(status: &control::Status) -> String {
    let store = match &status.store {
        StoreStatus::Open {
            limit_bytes,
            used_bytes,
            contents,
            images,
            templates,
        } => format!(
            "{} of {} used: {contents} contents, {images} images, {templates} templates",
            mib(*used_bytes),
            Size::new(*limit_bytes)
        ),
        StoreStatus::Absent(absent) if absent.failed => format!("FAILED, none is kept: {}", absent.reason),
        StoreStatus::Absent(absent) => format!("none is kept: {}", absent.reason),
    };
    let groups = match status.groups.as_slice() {
        [] => "none configured: every guest is alone".to_owned(),
        groups => groups.join(", "),
    };
    format!(
        "xenfoldd     {}, process {}, up {}\n\
         Xen          {}\n\
         connections  {} of {}\n\
         groups       {groups}\n\
         contents     {store}\n\
         index        {}",
        status.program,
        status.pid,
        duration(status.uptime_s),
        status.xen.as_deref().unwrap_or("none on this machine"),
        status.connections,
        status.connections_max,
        index_line(&status.index),
    )
}

/// Guests whose late pages nobody looks after, as far as they are still where that was written down.
fn forsaken() -> Vec<Forsaken> {
    let xen = Xenctrl::open().ok();
    let is_so = |one: &Forsaken| {
        let (Some(xen), Some(domid)) = (&xen, DomId::new(one.domid)) else {
            return true;
        };
        let info = xen.domain(domid).ok().flatten();
        let info = info.filter(|info| !info.dying && uuid_text(&info.uuid) == one.uuid);
        info.is_some_and(|info| one.here || guest::is_suspended(&info))
    };
    let found = migrations::forsaken(Path::new(migrations::FOLDER));
    found.into_iter().map(|(_, one)| one).filter(is_so).collect()
}

fn forsaken_line(one: &Forsaken) -> String {
    let Forsaken {
        guest, host, missing, ..
    } = one;
    if one.here {
        format!(
            "GUEST {guest} STANDS STILL here, and is this host's: the xenfold that received it was killed, and {missing} of its \
             pages are still where it came from. It goes on when xenfold-ssh connects again from there, which it does by itself; \
             where that was ended, too, type `xenfold follow {guest}` there"
        )
    } else {
        format!(
            "GUEST {guest} STANDS STILL on {host}, whose it is: xenfold-ssh was ended here while pages followed it, which are \
             kept in its suspended copy here. Type `xenfold follow {guest}`"
        )
    }
}

fn index_line(index: &IndexStatus) -> String {
    match index {
        IndexStatus::Running(stats) => {
            let guests = stats.guests.iter().filter(|guest| guest.left_out.is_none()).count();
            let full = if stats.full { ", FULL" } else { "" };
            format!(
                "{} of {} used{full}: {} contents of {guests} running guests",
                mib(stats.memory_bytes),
                Size::new(stats.limit_bytes),
                stats.pages
            )
        }
        IndexStatus::Absent(absent) if absent.failed => format!("FAILED, there is none: {}", absent.reason),
        IndexStatus::Absent(absent) => format!("none: {}", absent.reason),
    }
}

fn index_text(index: &IndexStatus) -> String {
    match index {
        IndexStatus::Running(stats) => format!("{}\n{}", index_line(index), index_figures(stats)),
        IndexStatus::Absent(_) => format!("index: {}", index_line(index)),
    }
}

fn index_figures(stats: &IndexStats) -> String {
    let round = match (stats.last_round_age_s, stats.last_round_s) {
        (Some(age), Some(took)) => format!("ended {} ago, took {}", duration(age), duration(took)),
        _ => "none yet".to_owned(),
    };
    let idle = stats
        .idle_percent
        .map_or("not known".to_owned(), |percent| format!("{percent} %"));
    let mut text = format!(
        "last round  {round}\n\
         pace        {} pages/s of {}, processors idle: {idle}\n\
         answers     {} pages, {} stale\n",
        stats.pages_per_s, stats.rate_limit_pages_per_s, stats.answered, stats.stale
    );
    if stats.full {
        text += "FULL: further contents are not found; index_size in /etc/xen/xenfold.conf bounds it\n";
    }
    if !stats.guests.is_empty() {
        let name = stats
            .guests
            .iter()
            .map(|guest| guest.name.len())
            .max()
            .unwrap_or(0)
            .max(5);
        let groups = stats.guests.iter().filter_map(|guest| guest.group.as_ref());
        let group = groups.map(String::len).max().unwrap_or(0).max(5);
        text += &format!(
            "{:>5} {:name$} {:group$} {:>10} {:>6}\n",
            "domid", "guest", "group", "pages", "visits"
        );
        for guest in &stats.guests {
            let in_group = guest.group.as_deref().unwrap_or("-");
            text += &match &guest.left_out {
                None => format!(
                    "{:>5} {:name$} {in_group:group$} {:>10} {:>6}\n",
                    guest.domid, guest.name, guest.pages, guest.visits
                ),
                Some(reason) => format!("{:>5} {:name$} left out: {reason}\n", guest.domid, guest.name),
            };
        }
    }
    text
}

fn stats_text(stats: &control::StoreStats) -> String {
    let mut text = format!(
        "{} of {} used, {} of memory\n",
        mib(stats.used_bytes),
        Size::new(stats.limit_bytes),
        mib(stats.table_bytes)
    );
    let width = stats
        .groups
        .iter()
        .map(|group| group.name.len())
        .max()
        .unwrap_or(0)
        .max(5);
    if !stats.groups.is_empty() {
        text += &format!(
            "{:width$} {:>12} {:>12} {:>7} {:>9} {:>8}\n",
            "group", "contents", "disk", "images", "templates", "damaged"
        );
    }
    for group in &stats.groups {
        text += &format!(
            "{:width$} {:>12} {:>12} {:>7} {:>9} {:>8}\n",
            group.name,
            group.contents,
            mib(group.bytes),
            group.images,
            group.templates,
            group.damaged
        );
    }
    text
}

fn templates_text(templates: &[TemplateInfo]) -> String {
    if templates.is_empty() {
        return "no templates".into();
    }
    let name = templates.iter().map(|one| one.name.len()).max().unwrap_or(0).max(8);
    let group = templates.iter().map(|one| one.group.len()).max().unwrap_or(0).max(5);
    let mut text = format!("{:name$} {:group$} {:>10}\n", "template", "group", "pages");
    for template in templates {
        text += &format!(
            "{:name$} {:group$} {:>10}\n",
            template.name, template.group, template.pages
        );
    }
    text
}

pub(crate) fn mib(bytes: u64) -> String {
    let tenths = u128::from(bytes) * 10 / (1 << 20);
    format!("{}.{} MiB", tenths / 10, tenths % 10)
}

pub(crate) fn duration(seconds: u64) -> String {
    match seconds {
        0..120 => format!("{seconds} s"),
        120..7200 => format!("{} min", seconds / 60),
        7200..172_800 => format!("{} h", seconds / 3600),
        _ => format!("{} days", seconds / 86_400),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn texts_say_what_there_is() {
        let mut status = control::Status {
            program: "1.0".into(),
            uptime_s: 7300,
            ..Default::default()
        };
        status.store = StoreStatus::Open {
            limit_bytes: 4 << 30,
            used_bytes: 3 << 19,
            contents: 7,
            images: 1,
            templates: 0,
        };
        let text = status_text(&status);
        assert!(
            text.contains("up 2 h") && text.contains("1.5 MiB of 4GiB used: 7 contents"),
            "{text}"
        );
        assert!(
            text.contains("none on this machine") && text.contains("every guest is alone"),
            "{text}"
        );
        status.store = StoreStatus::Absent(control::Absent {
            failed: true,
            reason: "no disk".into(),
        });
        assert!(status_text(&status).contains("FAILED, none is kept: no disk"));

        let stats = control::StoreStats {
            groups: vec![control::GroupStats {
                name: "web".into(),
                contents: 12,
                ..Default::default()
            }],
            ..Default::default()
        };
        let text = stats_text(&stats);
        let widths: Vec<usize> = text.lines().skip(1).map(str::len).collect();
        assert!(widths.len() == 2 && widths[0] == widths[1], "{text}");
        assert_eq!(templates_text(&[]), "no templates");
    }

    #[test]
    fn forsaken_guests_come_with_what_to_type() {
        let mut one = Forsaken {
            guest: "web".into(),
            here: true,
            host: "b".into(),
            missing: 7,
            ..Forsaken::default()
        };
        let line = forsaken_line(&one);
        assert!(
            line.contains("web STANDS STILL here") && line.contains("7 of its pages"),
            "{line}"
        );
        one.here = false;
        let line = forsaken_line(&one);
        assert!(line.contains("on b") && line.contains("`xenfold follow web`"), "{line}");
    }

    #[test]
    fn the_index_says_what_it_knows() {
        let absent = |failed| {
            IndexStatus::Absent(control::Absent {
                failed,
                reason: "no Xen".into(),
            })
        };
        assert_eq!(index_text(&absent(false)), "index: none: no Xen");
        assert!(index_text(&absent(true)).contains("FAILED"));
        let guest = |domid, name: &str, left_out: Option<&str>| control::IndexedGuest {
            domid,
            name: name.into(),
            group: left_out.is_none().then(|| "web".into()),
            pages: 7,
            visits: 2,
            left_out: left_out.map(Into::into),
        };
        let stats = IndexStats {
            pages: 7,
            memory_bytes: 3 << 19,
            limit_bytes: 256 << 20,
            full: true,
            last_round_age_s: Some(30),
            last_round_s: Some(130),
            pages_per_s: 1234,
            rate_limit_pages_per_s: 20_000,
            idle_percent: Some(50),
            answered: 3,
            stale: 2,
            guests: vec![guest(3, "web-1", None), guest(12, "database", Some("PV"))],
            ..Default::default()
        };
        let text = index_text(&IndexStatus::Running(stats));
        for says in [
            "1.5 MiB of 256MiB used, FULL: 7 contents of 1 running guests",
            "ended 30 s ago, took 2 min",
            "1234 pages/s of 20000, processors idle: 50 %",
            "3 pages, 2 stale",
            "FULL: further",
            "    3 web-1    web            7      2",
            "   12 database left out: PV",
        ] {
            assert!(text.contains(says), "{says}: {text}");
        }
    }

    #[test]
    fn without_a_daemon_the_next_step_is_named() {
        let folder = tempfile::tempdir().unwrap();
        let arguments = StatusArguments {
            asking: Asking {
                json: false,
                socket: folder.path().join("none"),
            },
        };
        let error = status(&arguments).unwrap_err().to_string();
        assert!(error.contains("systemctl start xenfoldd"), "{error}");
    }
}
