//! What the source remembers of a migration under way: a file for each guest in /run/xenfold, locked while its agent
//! lives. It is there for `xenfold resume` when an agent did not live to the end.
use std::fs::{self, File, TryLockError};
use std::io::{self, Read, Seek, Write};
use std::path::PathBuf;

use anyhow::{Context, Result, bail};
use serde::{Deserialize, Serialize};

use crate::guest::Guest;

const FOLDER: &str = "/run/xenfold";

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
}

/// The locked record of a migration that this process does. Unless it is closed it stays behind for `xenfold resume`.
pub struct Record {
    file: File,
    path: PathBuf,
    migration: Migration,
}

fn path(uuid: &str) -> PathBuf {
    PathBuf::from(FOLDER).join(format!("{uuid}.json"))
}

impl Record {
    /// Takes the guest's record. Errors: another migration of the same guest is under way.
    pub fn take(guest: &Guest, host: &str, ssh: Vec<String>, migration: &str) -> Result<Record> {
        fs::create_dir_all(FOLDER).with_context(|| format!("{FOLDER} cannot be made"))?;
        let path = path(&guest.uuid);
        let file = File::options()
            .read(true)
            .write(true)
            .create(true)
            .truncate(false)
            .open(&path);
        let file = file.with_context(|| format!("{} cannot be opened", path.display()))?;
        match file.try_lock() {
            Ok(()) => {}
            Err(TryLockError::WouldBlock) => bail!(
                "guest {} is being migrated already; this second migration is refused and the guest is not touched",
                guest.name
            ),
            Err(TryLockError::Error(error)) => bail!("{} cannot be locked: {error}", path.display()),
        }
        let migration = Migration {
            guest: guest.name.clone(),
            uuid: guest.uuid.clone(),
            domid: guest.domid.get(),
            host: host.to_owned(),
            ssh,
            migration: migration.to_owned(),
        };
        let mut record = Record { file, path, migration };
        record.write()?;
        Ok(record)
    }

    fn write(&mut self) -> Result<()> {
        self.file.set_len(0)?;
        self.file.rewind()?;
        self.file.write_all(&serde_json::to_vec_pretty(&self.migration)?)?;
        Ok(())
    }

    /// The migration has come to its end, whichever: nothing has to be repaired.
    pub fn close(self) {
        if let Err(error) = fs::remove_file(&self.path) {
            log::debug!("{}: {error}", self.path.display());
        }
    }
}

/// What is known of a guest's last migration. Errors: its agent still lives.
pub fn left_behind(uuid: &str) -> Result<Option<Migration>> {
    let mut file = match File::open(path(uuid)) {
        Ok(file) => file,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(error.into()),
    };
    if let Err(TryLockError::WouldBlock) = file.try_lock_shared() {
        bail!("its migration is still under way; end it with Ctrl-C on `xl migrate`, then try again");
    }
    let mut text = String::new();
    file.read_to_string(&mut text)?;
    serde_json::from_str(&text)
        .with_context(|| format!("{} is damaged", path(uuid).display()))
        .map(Some)
}

/// Forgets a migration that was repaired.
pub fn forget(uuid: &str) {
    // Absent is as good.
    let _ = fs::remove_file(path(uuid));
}
