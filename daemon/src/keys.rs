//! The groups' keys: one file each, root's only. Whoever has a group's key can ask which contents its guests have.
use std::fs::{self, DirBuilder, File, OpenOptions};
use std::io::{self, ErrorKind, Read, Write};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};

use thiserror::Error;
use xenfold::page::ContentKey;

const SUFFIX: &str = ".key";

/// A key file holds 64 hexadecimal digits and a line feed; more than this is no key.
const FILE_BYTES: u64 = 128;

#[derive(Debug, Error)]
pub enum KeyError {
    #[error("{what} {path}", path = path.display())]
    Io {
        what: &'static str,
        path: PathBuf,
        #[source]
        source: io::Error,
    },
    #[error("{path} holds no key: remove it, or copy that of another host of the group", path = .0.display())]
    Damaged(PathBuf),
}

/// The folder of keys.
pub struct Keys {
    folder: PathBuf,
}

impl Keys {
    /// The folder is made when the first key is.
    pub fn new(folder: PathBuf) -> Keys {
        Keys { folder }
    }

    /// Where the group's key is kept. Group names are checked before they come here: they contain no '/' and do not
    /// begin with '.'.
    pub fn path(&self, group: &str) -> PathBuf {
        self.folder.join(format!("{group}{SUFFIX}"))
    }

    /// The group's key; `None` before there is one.
    pub fn get(&self, group: &str) -> Result<Option<ContentKey>, KeyError> {
        let path = self.path(group);
        let mut text = String::new();
        match File::open(&path).and_then(|file| file.take(FILE_BYTES).read_to_string(&mut text)) {
            Err(error) if error.kind() == ErrorKind::NotFound => Ok(None),
            Err(error) if error.kind() == ErrorKind::InvalidData => Err(KeyError::Damaged(path)),
            Err(error) => Err(failed("cannot read the key", &path)(error)),
            Ok(_) => match ContentKey::from_hex(text.trim_end()) {
                Some(key) => Ok(Some(key)),
                None => Err(KeyError::Damaged(path)),
            },
        }
    }

    /// A new random key for the group, kept.
    pub fn make(&self, group: &str) -> Result<ContentKey, KeyError> {
        let source = Path::new("/dev/urandom");
        let mut bytes = [0; 32];
        File::open(source)
            .and_then(|mut file| file.read_exact(&mut bytes))
            .map_err(failed("cannot read", source))?;
        let key = ContentKey::new(bytes);
        self.set(group, &key)?;
        Ok(key)
    }

    /// Keeps a key, in the place of an older one. It is on the disk when this returns, and never half: a host whose
    /// group loses its key loses what it holds.
    pub fn set(&self, group: &str, key: &ContentKey) -> Result<(), KeyError> {
        DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(&self.folder)
            .and_then(|()| fs::set_permissions(&self.folder, fs::Permissions::from_mode(0o700)))
            .map_err(failed("cannot make the folder", &self.folder))?;
        // One name for all: writers are serialized, and what a crash left behind is overwritten.
        let new = self.folder.join(".new");
        let write = || {
            let mut options = OpenOptions::new();
            let mut file = options.write(true).create(true).truncate(true).mode(0o600).open(&new)?;
            file.set_permissions(fs::Permissions::from_mode(0o600))?;
            writeln!(file, "{}", key.hex())?;
            file.sync_all()?;
            fs::rename(&new, self.path(group))?;
            File::open(&self.folder)?.sync_all()
        };
        write().map_err(failed("cannot write the key", &self.path(group)))
    }

    /// The groups that have keys.
    pub fn groups(&self) -> Vec<String> {
        let entries = fs::read_dir(&self.folder).into_iter().flatten().flatten();
        let names = entries.filter_map(|entry| Some(entry.file_name().to_str()?.strip_suffix(SUFFIX)?.to_owned()));
        names.collect()
    }
}

fn failed(what: &'static str, path: &Path) -> impl FnOnce(io::Error) -> KeyError {
    move |source| KeyError::Io {
        what,
        path: path.into(),
        source,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keys_are_kept_for_root_alone() {
        let folder = tempfile::tempdir().unwrap();
        let keys = Keys::new(folder.path().join("keys"));
        assert_eq!((keys.get("web").unwrap(), keys.groups().len()), (None, 0));
        let key = keys.make("web").unwrap();
        assert_eq!(keys.get("web").unwrap(), Some(key.clone()));
        assert_ne!(keys.make("other").unwrap(), key);
        let mode = |path: &Path| fs::metadata(path).unwrap().permissions().mode() & 0o777;
        assert_eq!(mode(&folder.path().join("keys")), 0o700);
        assert_eq!(mode(&folder.path().join("keys/web.key")), 0o600);
        let other = ContentKey::new([1; 32]);
        keys.set("web", &other).unwrap();
        assert_eq!(keys.get("web").unwrap(), Some(other));
        let mut groups = keys.groups();
        groups.sort();
        assert_eq!(groups, ["other", "web"]);
    }

    #[test]
    fn what_is_no_key_is_not_taken_for_one() {
        let folder = tempfile::tempdir().unwrap();
        let keys = Keys::new(folder.path().into());
        for text in [&b""[..], b"12", &[b'g'; 64], &[0xff; 64], &[b'1'; 200]] {
            fs::write(folder.path().join("web.key"), text).unwrap();
            assert!(matches!(keys.get("web"), Err(KeyError::Damaged(_))));
        }
    }
}
