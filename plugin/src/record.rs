//! What the source remembers of a migration under way: a file for each guest in /run/xenfold, locked while its agent
//! lives. It is there for `xenfold resume` when an agent did not live to the end, and tells `xenfold abort` who the agent
//! is. Beside it, for `xenfold jobinfo`, the agent's newest figures.
use std::fs::{self, File, TryLockError};
use std::io::{self, Read, Seek, Write};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
pub use xenfold::migrations::Migration;
use xenfold::migrations::{self, FOLDER};

use crate::guest::Guest;

/// The locked record of a migration that this process does. Unless it is closed it stays behind for `xenfold resume`.
pub struct Record {
    file: File,
    migration: Migration,
}

fn path(uuid: &str) -> PathBuf {
    migrations::record_path(Path::new(FOLDER), uuid)
}

/// Where the figures of a guest's migration are, as long as it is under way.
pub fn figures_path(uuid: &str) -> PathBuf {
    migrations::figures_path(Path::new(FOLDER), uuid)
}

impl Record {
    /// Takes the guest's record. Errors: another migration of the same guest is under way.
    pub fn take(guest: &Guest, host: &str, ssh: Vec<String>, migration: &str) -> Result<Record> {
        fs::create_dir_all(FOLDER).with_context(|| format!("{FOLDER} cannot be made"))?;
        let path = path(&guest.uuid);
        let mut file = loop {
            let file = File::options()
                .read(true)
                .write(true)
                .create(true)
                .truncate(false)
                .open(&path);
            let file = file.with_context(|| format!("{} cannot be opened", path.display()))?;
            match file.try_lock() {
                // Unless it was removed between the two.
                Ok(()) if is_at(&file, &path)? => break file,
                Ok(()) => {}
                Err(TryLockError::WouldBlock) => bail!(
                    "guest {} is being migrated already; this second migration is refused and the guest is not touched; \
                     `xenfold jobinfo {0}` shows the first, `xenfold abort {0}` ends it",
                    guest.name
                ),
                Err(TryLockError::Error(error)) => bail!("{} cannot be locked: {error}", path.display()),
            }
        };
        // An agent that was killed while the guest was small.
        let left = read(&mut file, &guest.uuid).ok();
        let left = left.filter(|left| left.domid == guest.domid.get());
        let migration = Migration {
            guest: guest.name.clone(),
            uuid: guest.uuid.clone(),
            domid: guest.domid.get(),
            host: host.to_owned(),
            ssh,
            migration: migration.to_owned(),
            agent: std::process::id(),
            memory_target_kib: left.and_then(|left| left.memory_target_kib),
        };
        let mut record = Record { file, migration };
        record.write()?;
        // Of a migration whose agent was killed.
        remove(&figures_path(&guest.uuid));
        Ok(record)
    }

    /// The size that the guest had before an agent that was killed made it smaller.
    pub fn left_target(&self) -> Option<u64> {
        self.migration.memory_target_kib
    }

    /// Notes the size that the guest had before it is made smaller: should this process be killed, the record says so.
    pub fn note_target(&mut self, kib: u64) -> Result<()> {
        self.migration.memory_target_kib = Some(kib);
        self.write().context("the guest's size cannot be noted")
    }

    fn write(&mut self) -> Result<()> {
        self.file.set_len(0)?;
        self.file.rewind()?;
        self.file.write_all(&serde_json::to_vec_pretty(&self.migration)?)?;
        Ok(())
    }

    /// The migration has come to its end, whichever: nothing has to be repaired.
    pub fn close(self) {
        remove_all(&self.migration.uuid);
    }
}

/// Whether the path still leads to the file.
fn is_at(file: &File, path: &Path) -> io::Result<bool> {
    let (opened, now) = (file.metadata()?, fs::metadata(path));
    Ok(now.is_ok_and(|now| (now.dev(), now.ino()) == (opened.dev(), opened.ino())))
}

/// Absent is as good.
fn remove(path: &Path) {
    match fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => log::debug!("{}: {error}", path.display()),
        _ => {}
    }
}

fn remove_all(uuid: &str) {
    remove(&figures_path(uuid));
    remove(&path(uuid));
}

/// The migration of a guest whose agent lives, if there is one.
pub fn under_way(uuid: &str) -> Result<Option<Migration>> {
    let mut file = match File::open(path(uuid)) {
        Ok(file) => file,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(error.into()),
    };
    match file.try_lock_shared() {
        Err(TryLockError::WouldBlock) => read(&mut file, uuid).map(Some),
        _ => Ok(None),
    }
}

fn read(file: &mut File, uuid: &str) -> Result<Migration> {
    let mut text = String::new();
    file.read_to_string(&mut text)?;
    serde_json::from_str(&text).with_context(|| format!("{} is damaged", path(uuid).display()))
}

/// What is known of a guest's last migration. Errors: its agent still lives.
pub fn left_behind(uuid: &str) -> Result<Option<Migration>> {
    let mut file = match File::open(path(uuid)) {
        Ok(file) => file,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(error.into()),
    };
    if let Err(TryLockError::WouldBlock) = file.try_lock_shared() {
        bail!(
            "its migration is still under way: `xenfold jobinfo` shows how far it is, and whose the guest is; where it is not too late \
             `xenfold abort` ends it"
        );
    }
    read(&mut file, uuid).map(Some)
}

/// Forgets a migration that was repaired, unless another one of the guest has begun.
pub fn forget(uuid: &str) {
    if let Ok(file) = File::open(path(uuid))
        && file.try_lock().is_ok()
    {
        remove_all(uuid);
    }
}
