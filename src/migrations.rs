//! Migrations under way from this host, as their agents leave them in a folder for others to see: for each guest a record,
//! `UUID.json`, locked as long as its agent lives, and beside it the agent's newest figures, `UUID.figures`. While pages follow
//! a guest both hosts have the journal of that there, too ([`journal`]).
use std::fs::{self, File};
use std::io::{self, Read};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use crate::late::journal::{self, PAGER, SERVER};
use crate::report::Figures;

/// Where the agents of a host leave them.
pub const FOLDER: &str = "/run/xenfold";

/// The most that are looked at, and the most that is read of a file.
const MOST: usize = 256;
const MAX_FILE_BYTES: u64 = 256 << 10;

/// Where a guest was going, and how its host is reached.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Migration {
    pub guest: String,
    pub uuid: String,
    pub domid: u32,
    pub host: String,
    /// The ssh that was used, and its options.
    pub ssh: Vec<String>,
    /// Its name: 32 hexadecimal digits by chance.
    #[serde(default)]
    pub migration: String,
    /// Its agent's process number.
    #[serde(default)]
    pub agent: u32,
    /// The guest's size (`memory/target`) before it was made smaller for the migration.
    #[serde(default)]
    pub memory_target_kib: Option<u64>,
}

/// A migration whose agent lives.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct UnderWay {
    pub guest: String,
    pub uuid: String,
    pub domid: u32,
    pub host: String,
    /// None in its first second.
    pub figures: Option<Figures>,
}

pub fn record_path(folder: &Path, uuid: &str) -> PathBuf {
    folder.join(format!("{uuid}.json"))
}

/// Where the figures of a guest's migration are, as long as it is under way.
pub fn figures_path(folder: &Path, uuid: &str) -> PathBuf {
    folder.join(format!("{uuid}.figures"))
}

/// The migrations of this folder whose agents live, by the guests' names. What cannot be read is left out.
pub fn under_way(folder: &Path) -> Vec<UnderWay> {
    let names = fs::read_dir(folder).into_iter().flatten().flatten();
    let uuids = names.filter_map(|entry| Some(entry.file_name().to_str()?.strip_suffix(".json")?.to_owned()));
    let uuids: Vec<String> = uuids.take(MOST).collect();
    if uuids.is_empty() {
        return Vec::new();
    }
    let locks = fs::read_to_string("/proc/locks").unwrap_or_default();
    let mut found: Vec<UnderWay> = uuids
        .iter()
        .filter_map(|uuid| {
            let path = record_path(folder, uuid);
            let file = File::open(&path).ok()?;
            let inode = file.metadata().ok()?.ino();
            let migration: Migration = parsed(file).ok()?;
            // Trying the lock would get into the way of a migration that begins at this moment.
            if !holds(&locks, migration.agent, inode) {
                return None;
            }
            let figures = File::open(figures_path(folder, uuid)).and_then(parsed);
            Some(UnderWay {
                guest: migration.guest,
                uuid: migration.uuid,
                domid: migration.domid,
                host: migration.host,
                figures: figures.ok(),
            })
        })
        .collect();
    found.sort_by(|a, b| (&a.guest, a.domid).cmp(&(&b.guest, b.domid)));
    found
}

/// A guest whose late pages nobody looks after, since the process that did was killed.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Forsaken {
    pub guest: String,
    pub uuid: String,
    pub domid: u32,
    /// It came to this host, and lacks the pages here; else it went from here to `host`, and lacks them there.
    pub here: bool,
    pub host: String,
    /// Pages that it lacked when that was written down last.
    pub missing: u64,
    /// It is held still.
    pub held: bool,
}

/// Those of this folder, and where it is written down. What cannot be read is left out.
pub fn forsaken(folder: &Path) -> Vec<(PathBuf, Forsaken)> {
    let paths = fs::read_dir(folder)
        .into_iter()
        .flatten()
        .flatten()
        .map(|entry| entry.path());
    let side = |path: &Path| {
        path.extension()?
            .to_str()
            .filter(|side| [PAGER, SERVER].contains(side))
            .map(|side| side == PAGER)
    };
    let journals: Vec<(PathBuf, bool)> = paths
        .filter_map(|path| Some((side(&path)?, path)))
        .map(|(here, path)| (path, here))
        .take(MOST)
        .collect();
    if journals.is_empty() {
        return Vec::new();
    }
    let locks = fs::read_to_string("/proc/locks").unwrap_or_default();
    let dead = journals
        .into_iter()
        .filter(|(path, _)| journal::owner(path).is_ok_and(|(owner, inode)| !holds(&locks, owner, inode)));
    let mut found: Vec<(PathBuf, Forsaken)> = dead
        .filter_map(|(path, here)| {
            let found = journal::look(&path).ok().filter(|found| !found.noted.landed)?;
            let one = Forsaken {
                guest: found.facts.guest,
                uuid: found.facts.uuid,
                domid: found.facts.domid,
                here,
                host: found.facts.host,
                missing: found.missing.len(),
                held: found.noted.held,
            };
            Some((path, one))
        })
        .collect();
    found.sort_by(|(_, a), (_, b)| (&a.guest, a.domid).cmp(&(&b.guest, b.domid)));
    found
}

fn parsed<T: for<'de> Deserialize<'de>>(file: File) -> io::Result<T> {
    let mut bytes = Vec::new();
    file.take(MAX_FILE_BYTES).read_to_end(&mut bytes)?;
    Ok(serde_json::from_slice(&bytes)?)
}

/// Whether this process holds the lock of this file, by /proc/locks: `7: FLOCK  ADVISORY  WRITE 4242 00:19:1723 0 EOF`.
fn holds(locks: &str, process: u32, inode: u64) -> bool {
    locks.lines().any(|line| {
        let mut words = line.split_ascii_whitespace().skip(1);
        let is_flock = words.next() == Some("FLOCK");
        let pid = words.nth(2).and_then(|pid| pid.parse().ok());
        let file = words.next().and_then(|file| file.rsplit(':').next()?.parse().ok());
        is_flock && pid == Some(process) && file == Some(inode)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_lock_is_its_process_and_its_file() {
        let locks = "1: POSIX  ADVISORY  WRITE 7 00:19:5 0 EOF\n2: FLOCK  ADVISORY  WRITE 4242 00:19:1723 0 EOF\n";
        assert!(holds(locks, 4242, 1723));
        for (process, inode) in [(4242, 172), (424, 1723), (7, 5)] {
            assert!(!holds(locks, process, inode));
        }
        assert!(!holds("nonsense\n\n1: -> FLOCK", 0, 0));
    }

    #[test]
    fn only_migrations_whose_agents_live_are_under_way() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path();
        assert!(under_way(path).is_empty() && under_way(&path.join("none")).is_empty());
        let record = |guest: &str, uuid: &str| {
            let migration = Migration {
                guest: guest.into(),
                uuid: uuid.into(),
                agent: std::process::id(),
                ..Migration::default()
            };
            let file = File::create(record_path(path, uuid)).unwrap();
            serde_json::to_writer(&file, &migration).unwrap();
            file
        };
        let (b, a, left) = (record("b", "1"), record("a", "2"), record("left", "3"));
        b.lock().unwrap();
        a.lock().unwrap();
        drop(left);
        fs::write(path.join("4.json"), "{").unwrap();
        let figures = Figures {
            iteration: 3,
            ..Figures::default()
        };
        fs::write(figures_path(path, "2"), serde_json::to_vec(&figures).unwrap()).unwrap();
        let found = under_way(path);
        let names: Vec<&str> = found.iter().map(|one| one.guest.as_str()).collect();
        assert_eq!(names, ["a", "b"]);
        assert_eq!((&found[0].figures, &found[1].figures), (&Some(figures), &None));
    }
}
