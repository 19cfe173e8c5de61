//! What migrations have taught of guests' writes, kept for the next one: a file each, by the guest's uuid.
//!
//! A model that is lost costs the next migration some pages sent twice. So nothing is synced, and what cannot be read is done
//! without.
use std::fs::{self, DirBuilder, File, OpenOptions};
use std::io::{self, ErrorKind, Read, Write};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::PathBuf;
use std::time::SystemTime;

use parking_lot::Mutex;
use xenfold::policy::kept::MOST_BYTES;
use xenfold::policy::{Kept, KeptError};

use crate::membership::canonical;

const SUFFIX: &str = ".model";

/// Bytes of all models together: the oldest make room.
const MOST_ALL: u64 = 64 << 20;

/// Why a model cannot be kept or read.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ModelError {
    #[error("{0} is no guest's uuid")]
    NoUuid(String),
    #[error("these bytes cannot be kept")]
    NoModel(#[from] KeptError),
    #[error("{what} {path}", path = path.display())]
    Io {
        what: &'static str,
        path: PathBuf,
        #[source]
        source: io::Error,
    },
}

/// The folder of models.
pub(crate) struct Models {
    folder: PathBuf,
    most_all: u64,
    /// One writes at a time.
    writing: Mutex<()>,
}

impl Models {
    /// The folder is made when the first model is kept.
    pub fn new(folder: PathBuf) -> Models {
        Models {
            folder,
            most_all: MOST_ALL,
            writing: Mutex::default(),
        }
    }

    fn path(&self, uuid: &str) -> Result<PathBuf, ModelError> {
        let uuid = canonical(uuid).ok_or_else(|| ModelError::NoUuid(uuid.into()))?;
        Ok(self.folder.join(format!("{uuid}{SUFFIX}")))
    }

    /// What is kept of a guest; `None`: nothing, or it is damaged.
    pub fn get(&self, uuid: &str) -> Result<Option<Vec<u8>>, ModelError> {
        let path = self.path(uuid)?;
        let mut bytes = Vec::new();
        let most = MOST_BYTES as u64 + 1;
        match File::open(&path).and_then(|file| file.take(most).read_to_end(&mut bytes)) {
            Err(error) if error.kind() == ErrorKind::NotFound => return Ok(None),
            Err(source) => {
                let what = "cannot read";
                return Err(ModelError::Io { what, path, source });
            }
            Ok(_) => {}
        }
        if let Err(error) = Kept::check(&bytes) {
            log::warn!("{}: {error}", path.display());
            return Ok(None);
        }
        Ok(Some(bytes))
    }

    /// Keeps a model, in the place of an older one of that guest.
    pub fn set(&self, uuid: &str, bytes: &[u8]) -> Result<(), ModelError> {
        let path = self.path(uuid)?;
        Kept::check(bytes)?;
        let _writing = self.writing.lock();
        let new = self.folder.join(".new");
        let write = || {
            DirBuilder::new().recursive(true).mode(0o700).create(&self.folder)?;
            self.make_room(bytes.len() as u64)?;
            let mut options = OpenOptions::new();
            let mut file = options.write(true).create(true).truncate(true).mode(0o600).open(&new)?;
            file.write_all(bytes)?;
            fs::rename(&new, &path)
        };
        write().map_err(|source| ModelError::Io {
            what: "cannot write",
            path: path.clone(),
            source,
        })
    }

    /// Removes the oldest models until so many bytes fit beside the others.
    fn make_room(&self, bytes: u64) -> io::Result<()> {
        let mut models: Vec<(SystemTime, u64, PathBuf)> = Vec::new();
        for entry in fs::read_dir(&self.folder)? {
            let entry = entry?;
            let facts = entry.metadata()?;
            if entry.file_name().to_str().is_some_and(|name| name.ends_with(SUFFIX)) {
                models.push((facts.modified()?, facts.len(), entry.path()));
            }
        }
        let mut all = bytes + models.iter().map(|(_, bytes, _)| bytes).sum::<u64>();
        models.sort();
        for (_, bytes, path) in models {
            if all <= self.most_all {
                break;
            }
            fs::remove_file(path)?;
            all -= bytes;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use xenfold::page_set::PageSet;
    use xenfold::policy::filter::Filter;
    use xenfold::policy::model::Builder;

    use super::*;
    use crate::index::sim::uuid;

    fn model(pages: u64) -> Vec<u8> {
        let mut builder = Builder::new(1000, 1000, Duration::from_millis(50));
        let mut written = PageSet::new(1000);
        written.insert_run(0..pages);
        builder.sample(&written);
        let filter = Filter::new(Some(builder.finish()), 1000, 1000);
        filter.learnt().to_bytes().unwrap()
    }

    #[test]
    fn models_are_kept_by_uuid() {
        let folder = tempfile::tempdir().unwrap();
        let models = Models::new(folder.path().join("models"));
        assert_eq!(models.get(&uuid(1)).unwrap(), None);
        models.set(&uuid(1), &model(3)).unwrap();
        models.set(&uuid(1), &model(4)).unwrap();
        models.set(&uuid(2), &model(5)).unwrap();
        // After the daemon has been started anew.
        let models = Models::new(folder.path().join("models"));
        assert_eq!(models.get(&uuid(1).to_uppercase()).unwrap(), Some(model(4)));
        assert_eq!(models.get(&uuid(2)).unwrap(), Some(model(5)));
        assert!(matches!(models.get("../key"), Err(ModelError::NoUuid(_))));
        assert!(matches!(models.set("../key", &model(1)), Err(ModelError::NoUuid(_))));
        assert!(matches!(models.set(&uuid(1), b"no model"), Err(ModelError::NoModel(_))));
        let path = models.path(&uuid(1)).unwrap();
        let mut bytes = fs::read(&path).unwrap();
        bytes.truncate(50);
        fs::write(path, bytes).unwrap();
        assert_eq!(models.get(&uuid(1)).unwrap(), None);
    }

    #[test]
    fn the_oldest_make_room() {
        let folder = tempfile::tempdir().unwrap();
        let mut models = Models::new(folder.path().into());
        models.most_all = model(9).len() as u64 * 2 + 20;
        for guest in 1..=3 {
            models.set(&uuid(guest), &model(9)).unwrap();
            let age = Duration::from_secs(100 - u64::from(guest));
            let file = File::open(models.path(&uuid(guest)).unwrap()).unwrap();
            file.set_modified(SystemTime::now() - age).unwrap();
        }
        let kept = [1, 2, 3].map(|guest| models.get(&uuid(guest)).unwrap().is_some());
        assert_eq!(kept, [false, true, true]);
    }
}
