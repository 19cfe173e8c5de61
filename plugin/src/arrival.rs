//! What the destination notes before it lets xl start a guest: which migration that was. When the source never hears how
//! it went, `xenfold resume` asks for this, also when the guest has ended or moved on, or the host was booted again.
use std::fs::{self, File};
use std::io::{self, ErrorKind, Write};
use std::path::{Path, PathBuf};
use std::time::Duration;

use xenfold::engine::destination::Watching;
use xenfold::migrations;
use xenfold::report::Figures;
use xenfold::wire::Hello;

use crate::progress::publish;

/// On a disk, unlike /run; not in the daemon's folder, which may be full or gone.
const FOLDER: &str = "/var/lib/xen/xenfold";

/// How old the figures of late pages may be, with an agent that lives.
pub const STALE: Duration = Duration::from_secs(10);

/// Where a guest's newest arrival is noted. `None`: that is no uuid.
fn path(uuid: &str) -> Option<PathBuf> {
    let valid = uuid.len() == 36 && uuid.bytes().all(|byte| byte.is_ascii_hexdigit() || byte == b'-');
    valid.then(|| PathBuf::from(FOLDER).join(uuid))
}

/// Notes that `migration` of a guest is being let go here; it is on the disk when this returns. A source that does not say
/// which migration it is will not ask.
pub fn note(uuid: &str, migration: &str) -> io::Result<()> {
    let Some(path) = path(uuid).filter(|_| !migration.is_empty()) else {
        return Ok(());
    };
    fs::create_dir_all(FOLDER)?;
    let mut file = File::create(&path)?;
    file.write_all(migration.as_bytes())?;
    file.sync_all()?;
    File::open(FOLDER)?.sync_all()
}

/// The guest was not started. What an earlier migration has noted stays.
pub fn forget(uuid: &str, migration: &str) {
    if let (Some(path), Ok(true)) = (path(uuid), is_noted(uuid, migration)) {
        // Absent is as good.
        let _ = fs::remove_file(path);
    }
}

/// Whether this host let the guest of `migration` go.
pub fn is_noted(uuid: &str, migration: &str) -> io::Result<bool> {
    let Some(path) = path(uuid) else { return Ok(false) };
    match fs::read_to_string(path) {
        Ok(noted) => Ok(noted == migration),
        Err(error) if error.kind() == ErrorKind::NotFound => Ok(false),
        Err(error) => Err(error),
    }
}

/// Tells those who ask on this host how the late pages of a guest are that runs here: for `xenfold jobinfo`.
pub struct Arriving {
    path: Option<PathBuf>,
    guest: String,
}

impl Arriving {
    pub fn new(source: &Hello) -> Arriving {
        let valid = path(&source.guest_uuid).is_some();
        Arriving {
            path: valid.then(|| figures_path(&source.guest_uuid)),
            guest: source.guest_name.clone(),
        }
    }

    pub fn path(&self) -> Option<PathBuf> {
        self.path.clone()
    }

    /// Writes each newest state down.
    pub fn watching(self) -> Watching {
        let mut figures = Figures {
            guest: self.guest,
            ..Figures::default()
        };
        Box::new(move |late| {
            figures.late = Some(late.clone());
            if let Some(path) = &self.path {
                publish(path, &figures);
            }
        })
    }
}

/// Writes down why a guest stands still here.
pub fn trouble(uuid: &str, guest: &str, why: String) {
    if path(uuid).is_some() {
        let figures = Figures {
            guest: guest.to_owned(),
            error: Some(why),
            ..Figures::default()
        };
        publish(&figures_path(uuid), &figures);
    }
}

/// Forgets what was written down.
pub fn remove(path: Option<&Path>) {
    // Absent is as good.
    path.map(fs::remove_file);
}

/// What was last written down of a guest that pages follow to this host, and how long ago. `None`: none do.
pub fn arriving(uuid: &str) -> Option<(Figures, Duration)> {
    let path = path(uuid).map(|_| figures_path(uuid))?;
    let age = fs::metadata(&path).ok()?.modified().ok()?.elapsed().unwrap_or_default();
    Some((serde_json::from_slice(&fs::read(&path).ok()?).ok()?, age))
}

/// All guests that pages follow to this host, as far as their agents live: what each has written down lately.
pub fn all_arriving() -> Vec<Figures> {
    let entries = fs::read_dir(migrations::FOLDER).into_iter().flatten().flatten();
    let uuid = |path: PathBuf| Some(path.file_name()?.to_str()?.strip_suffix(".arriving")?.to_owned());
    let found = entries.filter_map(|entry| arriving(&uuid(entry.path())?));
    found
        .filter(|(_, age)| *age < STALE)
        .map(|(figures, _)| figures)
        .collect()
}

fn figures_path(uuid: &str) -> PathBuf {
    Path::new(migrations::FOLDER).join(format!("{uuid}.arriving"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_peer_names_no_other_file() {
        assert!(path("4c1b4b9e-0d4c-4d39-9d0a-8a3a0d1d9f10").is_some());
        for uuid in [
            "",
            "../../../etc/passwd",
            "4c1b4b9e-0d4c-4d39-9d0a-8a3a0d1d9f1/",
            &"a".repeat(37),
        ] {
            assert_eq!(path(uuid), None, "{uuid}");
        }
    }
}
