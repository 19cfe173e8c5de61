//! Which group a guest is in, and with which key: the only place where contents of one guest come within another's
//! reach.
use std::path::PathBuf;

use parking_lot::Mutex;
use thiserror::Error;
pub(crate) use xenfold::config::ALONE;
use xenfold::config::{Groups, TwoGroups};
use xenfold::control::{ErrorCode, Offer};
use xenfold::page::ContentKey;

use crate::keys::{KeyError, Keys};

/// Why a guest gets no group.
#[derive(Debug, Error)]
pub enum MembershipError {
    #[error("{0:?} is no guest's UUID")]
    NoUuid(String),
    #[error(transparent)]
    TwoGroups(#[from] TwoGroups),
    #[error(
        "guest {guest} is in group {offered} on the other host, and in {here} here: name the same group in both \
         /etc/xen/xenfold.conf"
    )]
    OtherGroup {
        guest: String,
        offered: String,
        here: String,
    },
    #[error(
        "group {group} has another key on the other host: copy {path} from the host whose contents shall stay to the \
         other", path = .path.display()
    )]
    OtherKey { group: String, path: PathBuf },
    #[error("the key cannot be used")]
    Key(#[from] KeyError),
}

impl MembershipError {
    pub fn code(&self) -> ErrorCode {
        match self {
            MembershipError::NoUuid(_) => ErrorCode::BadRequest,
            MembershipError::TwoGroups(_) => ErrorCode::TwoGroups,
            MembershipError::OtherGroup { .. } => ErrorCode::OtherGroup,
            MembershipError::OtherKey { .. } => ErrorCode::OtherKey,
            MembershipError::Key(_) => ErrorCode::Key,
        }
    }
}

/// A guest's place.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Membership {
    /// The guest's UUID in the one spelling by which images are kept.
    pub uuid: String,
    pub group: String,
    pub key: ContentKey,
    /// The key took the place of another one: what was kept under that is of no use.
    pub replaced: bool,
}

/// A guest's place as far as it is settled.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Known {
    /// In no configured group.
    Alone,
    /// In this group, which has no key here yet.
    NoKey(String),
    Member(Membership),
}

/// The configuration's groups and the keys.
pub struct Members {
    groups: Groups,
    /// Locked, so that of two guests which come first to a group one makes the key and the other finds it.
    keys: Mutex<Keys>,
}

impl Members {
    pub fn new(groups: Groups, keys: Keys) -> Members {
        let keys = Mutex::new(keys);
        Members { groups, keys }
    }

    /// The guest's group and key. At the destination `offer` is what the source has; without it a group that has no
    /// key gets one.
    pub fn find(&self, uuid: &str, name: &str, offer: Option<&Offer>) -> Result<Membership, MembershipError> {
        let uuid = canonical(uuid).ok_or_else(|| MembershipError::NoUuid(uuid.into()))?;
        let configured = self.groups.of(name)?;
        let alone = configured.is_none();
        let group = configured.map_or_else(|| format!("{ALONE}{uuid}"), str::to_owned);
        if let Some(offer) = offer.filter(|offer| offer.group != group) {
            return Err(MembershipError::OtherGroup {
                guest: name.into(),
                offered: offer.group.clone(),
                here: group,
            });
        }
        let keys = self.keys.lock();
        let (kept, damaged) = match keys.get(&group) {
            // Nobody else has a lone guest's key but the host it comes from: a new one is as good.
            Err(error @ KeyError::Damaged(_)) if alone => {
                log::warn!("{error}; guest {name} gets a new key");
                (None, true)
            }
            kept => (kept?, false),
        };
        let (key, replaced) = match (kept, offer) {
            (Some(kept), None) => (kept, false),
            (Some(kept), Some(offer)) if kept == offer.key => (kept, false),
            (Some(_), Some(_)) if !alone => {
                let path = keys.path(&group);
                return Err(MembershipError::OtherKey { group, path });
            }
            (kept, Some(offer)) => {
                keys.set(&group, &offer.key)?;
                (offer.key.clone(), kept.is_some() || damaged)
            }
            (None, None) => (keys.make(&group)?, damaged),
        };
        Ok(Membership {
            uuid,
            group,
            key,
            replaced,
        })
    }

    /// The guest's configured group and its key. Makes no key: one that was made here before the group's first migration
    /// came with another host's would have that migration refused.
    pub fn known(&self, uuid: &str, name: &str) -> Result<Known, MembershipError> {
        let uuid = canonical(uuid).ok_or_else(|| MembershipError::NoUuid(uuid.into()))?;
        let Some(group) = self.groups.of(name)? else {
            return Ok(Known::Alone);
        };
        Ok(match self.keys.lock().get(group)? {
            Some(key) => Known::Member(Membership {
                uuid,
                group: group.into(),
                key,
                replaced: false,
            }),
            None => Known::NoKey(group.into()),
        })
    }

    /// All groups with keys that can be read.
    pub fn all(&self) -> Vec<(String, ContentKey)> {
        let keys = self.keys.lock();
        let known = keys.groups().into_iter().filter_map(|group| {
            let key = keys.get(&group).ok().flatten()?;
            Some((group, key))
        });
        known.collect()
    }

    pub fn configured(&self) -> impl Iterator<Item = &str> {
        self.groups.names()
    }
}

/// A UUID in lower case; `None` when it is none. It becomes part of file names.
pub fn canonical(uuid: &str) -> Option<String> {
    let hyphens = [8, 13, 18, 23];
    let fits = |(at, byte): (usize, u8)| match hyphens.contains(&at) {
        true => byte == b'-',
        false => byte.is_ascii_hexdigit(),
    };
    (uuid.len() == 36 && uuid.bytes().enumerate().all(fits)).then(|| uuid.to_ascii_lowercase())
}

#[cfg(test)]
mod tests {
    use super::*;

    const UUID: &str = "00112233-4455-6677-8899-aabbccddeeff";

    fn members(folder: &std::path::Path, groups: &str) -> Members {
        let path = folder.join("xenfold.conf");
        std::fs::write(&path, groups).unwrap();
        let groups = xenfold::config::read(&path).unwrap().group;
        Members::new(groups, Keys::new(folder.join("keys")))
    }

    fn offer(group: &str, byte: u8) -> Offer {
        Offer {
            group: group.into(),
            key: ContentKey::new([byte; 32]),
        }
    }

    #[test]
    fn a_guest_alone_takes_its_key_along() {
        let folder = tempfile::tempdir().unwrap();
        let members = members(folder.path(), "");
        let own = format!("guest-{UUID}");
        let first = members.find(UUID, "a", None).unwrap();
        assert_eq!((first.group.as_str(), first.replaced), (own.as_str(), false));
        assert_eq!(members.find(&UUID.to_uppercase(), "renamed", None).unwrap(), first);

        let back = members.find(UUID, "a", Some(&offer(&own, 1))).unwrap();
        assert_eq!((back.key.bytes()[0], back.replaced), (1, true));
        let again = members.find(UUID, "a", Some(&offer(&own, 1))).unwrap();
        assert_eq!((again.key.bytes()[0], again.replaced), (1, false));

        std::fs::write(folder.path().join(format!("keys/{own}.key")), "?").unwrap();
        assert!(members.find(UUID, "a", None).unwrap().replaced);
    }

    #[test]
    fn a_configured_group_keeps_its_key() {
        let folder = tempfile::tempdir().unwrap();
        let members = members(folder.path(), "[group]\nweb = [\"web-*\"]\nfast = [\"*-fast\"]");
        let adopted = members.find(UUID, "web-1", Some(&offer("web", 1))).unwrap();
        assert_eq!((adopted.key.bytes()[0], adopted.replaced), (1, false));
        assert_eq!(members.find(UUID, "web-2", None).unwrap().key, adopted.key);
        let code = |name: &str, offer: Offer| members.find(UUID, name, Some(&offer)).unwrap_err().code();
        assert_eq!(code("web-1", offer("web", 2)), ErrorCode::OtherKey);
        assert_eq!(code("web-1", offer(&format!("guest-{UUID}"), 1)), ErrorCode::OtherGroup);
        assert_eq!(code("database", offer("web", 1)), ErrorCode::OtherGroup);
        assert_eq!(code("web-fast", offer("web", 1)), ErrorCode::TwoGroups);

        std::fs::write(folder.path().join("keys/web.key"), "?").unwrap();
        assert_eq!(code("web-1", offer("web", 1)), ErrorCode::Key);
    }

    #[test]
    fn looking_up_makes_no_key() {
        let folder = tempfile::tempdir().unwrap();
        let members = members(folder.path(), "[group]\nweb = [\"web-*\"]");
        assert_eq!(members.known(UUID, "web-1").unwrap(), Known::NoKey("web".into()));
        assert_eq!(members.known(UUID, "database").unwrap(), Known::Alone);
        assert_eq!(members.keys.lock().groups().len(), 0);
        let found = members.find(UUID, "web-1", Some(&offer("web", 1))).unwrap();
        assert_eq!(members.known(UUID, "web-1").unwrap(), Known::Member(found));
        assert!(members.known("web-1", "web-1").is_err());
    }

    #[test]
    fn only_uuids_become_file_names() {
        for uuid in [
            "",
            "../../../../etc/passwd",
            &UUID[1..],
            "00112233-4455-6677-8899-aabbccddee/f",
        ] {
            assert_eq!(canonical(uuid), None);
        }
        assert_eq!(canonical(&UUID.to_uppercase()).as_deref(), Some(UUID));
    }
}
