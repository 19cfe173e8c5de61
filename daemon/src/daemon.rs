//! What the service knows: its configuration, the groups' keys, the store.
use std::path::Path;
use std::sync::Arc;
use std::time::Instant;

use parking_lot::Mutex;
use xenfold::config::Config;
use xenfold::control::{self, Absent, DedupStatus, ErrorCode, Offer, Refusal, StoreStatus};
use xenfold::engine::chain;

use crate::index::{self, Host, Index};
use crate::keys::Keys;
use crate::membership::{Members, Membership};
use crate::models::{ModelError, Models};
use crate::sharing::Hold;
use crate::store::{Group, HoldNew, Store, StoreError};

/// Where the store is, inside the state folder. Beside it, not inside: groups are folders of the store by their names.
const STORE: &str = "store";
const KEYS: &str = "keys";
const MODELS: &str = "models";

/// One for the process.
pub struct Daemon {
    members: Arc<Members>,
    store: Result<Store, Absent>,
    index: Result<Arc<Index>, Absent>,
    pub(crate) models: Models,
    /// Contents that several guests of a group have had become a template.
    pub(crate) auto_template: bool,
    /// Held from finding a group's key to opening the group with it: the store drops what was kept under another key,
    /// so an older key must not come after a newer one.
    binding: Mutex<()>,
    started: Instant,
}

/// A guest's group, as long as a connection is bound to it.
pub(crate) struct Bound {
    pub membership: Membership,
    /// `None`: no contents are kept.
    pub group: Option<Arc<Group>>,
    /// Contents put during a migration stay until its image is saved.
    _hold: Option<HoldNew>,
    /// Its memory is the migration's.
    _unshared: Option<Hold>,
}

impl Daemon {
    /// Opens the store and the index. One that cannot be opened is logged and done without: migrations need none.
    pub fn open(config: &Config, state: &Path) -> Daemon {
        Daemon::open_on(config, state, index::this_host)
    }

    pub(crate) fn open_on(
        config: &Config,
        state: &Path,
        host: impl FnOnce() -> Result<Box<dyn Host>, Absent>,
    ) -> Daemon {
        let store = match config.store_size.bytes() {
            0 => Err(Absent {
                failed: false,
                reason: "store_size is 0".into(),
            }),
            limit_bytes => Store::open(&state.join(STORE), limit_bytes).map_err(|error| Absent {
                failed: true,
                reason: chain(&error),
            }),
        };
        match &store {
            Ok(_) => log::info!("contents are kept in {}, up to {}", state.display(), config.store_size),
            Err(Absent { failed: false, reason }) => log::info!("no contents are kept: {reason}"),
            Err(Absent { reason, .. }) => log::error!("no contents are kept: the store cannot be opened: {reason}"),
        }
        let members = Arc::new(Members::new(config.group.clone(), Keys::new(state.join(KEYS))));
        let index = Index::open(config, &members, host);
        index::announce(&index);
        Daemon {
            members,
            store,
            index,
            models: Models::new(state.join(MODELS)),
            auto_template: config.auto_template,
            binding: Mutex::default(),
            started: Instant::now(),
        }
    }

    /// Finds the guest's group and opens it.
    pub(crate) fn bind(&self, uuid: &str, name: &str, offer: Option<&Offer>) -> Result<Bound, Refusal> {
        let _binding = self.binding.lock();
        let membership = self.members.find(uuid, name, offer);
        let membership = membership.map_err(|error| Refusal {
            code: error.code(),
            message: chain(&error),
        })?;
        if membership.replaced {
            log::info!("group {} has a new key: what it held is dropped", membership.group);
        }
        let group = match &self.store {
            Ok(store) => Some(store.group(&membership.group, &membership.key).map_err(store_failed)?),
            Err(_) => None,
        };
        Ok(Bound {
            _unshared: self.index().map(|index| index.sharing().hold(&membership.uuid)),
            membership,
            _hold: group.as_ref().map(|group| group.hold_new()),
            group,
        })
    }

    /// The store, for requests that make no sense without.
    pub(crate) fn store(&self) -> Result<&Store, Refusal> {
        self.store.as_ref().map_err(|absent| Refusal {
            code: ErrorCode::NoStore,
            message: format!("no contents are kept on this host: {}", absent.reason),
        })
    }

    /// All groups that the store holds, opened where their keys are known; only then their contents can be read.
    pub(crate) fn open_groups(&self) -> Result<Vec<(String, Arc<Group>)>, Refusal> {
        let store = self.store()?;
        let _binding = self.binding.lock();
        let held = store.stats().groups;
        let mut opened = Vec::new();
        for (name, key) in self.members.all() {
            if held.iter().any(|group| group.name == name) {
                let group = store.group(&name, &key).map_err(store_failed)?;
                opened.push((name, group));
            }
        }
        Ok(opened)
    }

    pub(crate) fn stats(&self) -> Result<control::StoreStats, Refusal> {
        let stats = self.store()?.stats();
        let groups = stats.groups.into_iter().map(|group| control::GroupStats {
            name: group.name,
            open: group.open,
            contents: group.contents,
            images: group.images,
            templates: group.templates,
            bytes: group.bytes,
            damaged: group.damaged,
            indexes_set_aside: group.indexes_set_aside,
        });
        Ok(control::StoreStats {
            limit_bytes: stats.limit_bytes,
            used_bytes: stats.used_bytes,
            table_bytes: stats.table_bytes,
            groups: groups.collect(),
        })
    }

    pub(crate) fn verify(&self) -> Result<control::Verified, Refusal> {
        self.open_groups()?;
        let verified = self.store()?.verify().map_err(store_failed)?;
        Ok(control::Verified {
            contents: verified.contents,
            damaged: verified.damaged,
            groups_skipped: verified.groups_skipped,
        })
    }

    pub(crate) fn collect(&self) -> Result<control::Collected, Refusal> {
        let collected = self.store()?.gc().map_err(store_failed)?;
        Ok(control::Collected {
            contents: collected.contents,
            bytes: collected.bytes,
        })
    }

    pub(crate) fn status(&self) -> control::Status {
        let store = match (&self.store, self.stats()) {
            (Ok(_), Ok(stats)) => StoreStatus::Open {
                limit_bytes: stats.limit_bytes,
                used_bytes: stats.used_bytes,
                contents: stats.groups.iter().map(|group| group.contents).sum(),
                images: stats.groups.iter().map(|group| group.images).sum(),
                templates: stats.groups.iter().map(|group| group.templates).sum(),
            },
            (Err(absent), _) => StoreStatus::Absent(absent.clone()),
            (_, Err(refusal)) => StoreStatus::Absent(Absent {
                failed: true,
                reason: refusal.message,
            }),
        };
        control::Status {
            program: xenfold::VERSION.into(),
            pid: std::process::id(),
            uptime_s: self.started.elapsed().as_secs(),
            xen: xen_sys::running_version().map(|version| version.to_string()),
            groups: self.members.configured().map(str::to_owned).collect(),
            store,
            index: self.index_status(),
            ..control::Status::default()
        }
    }

    pub(crate) fn index(&self) -> Option<&Index> {
        self.index.as_deref().ok()
    }

    pub(crate) fn index_status(&self) -> control::IndexStatus {
        index::status(&self.index)
    }

    pub(crate) fn dedup_status(&self) -> DedupStatus {
        match &self.index {
            Ok(index) => index.dedup_status(),
            Err(absent) => DedupStatus::Absent(Absent {
                reason: format!("there is no index: {}", absent.reason),
                ..absent.clone()
            }),
        }
    }

    pub(crate) fn dedup_enable(&self, enable: bool) -> Result<(), Refusal> {
        let enabled = match &self.index {
            Ok(index) => index.sharing().enable(enable),
            Err(absent) => Err(format!("there is no index: {}", absent.reason)),
        };
        enabled.map_err(|reason| Refusal {
            code: ErrorCode::NoSharing,
            message: format!("memory of guests cannot be shared: {reason}"),
        })
    }

    pub(crate) fn dedup_scan(&self, uuid: &str) -> Result<(), Refusal> {
        match self.index().is_some_and(|index| index.scan_now(uuid)) {
            true => Ok(()),
            false => Err(Refusal {
                code: ErrorCode::NotFound,
                message: format!("guest {uuid} is not looked at; `xenfold index` says why"),
            }),
        }
    }

    /// Lets guests alone from now on.
    pub fn end_index(&self) {
        if let Some(index) = self.index() {
            index.end();
        }
    }

    /// Writes what a crash would lose.
    pub fn flush(&self) {
        if let Ok(store) = &self.store
            && let Err(error) = store.flush()
        {
            log::error!("the store cannot be written: {}", chain(&error));
        }
    }
}

/// The same of a model that cannot be kept or read.
pub(crate) fn model_failed(error: ModelError) -> Refusal {
    let code = match error {
        ModelError::Io { .. } => ErrorCode::Store,
        _ => ErrorCode::BadRequest,
    };
    let message = chain(&error);
    log::warn!("{message}");
    Refusal { code, message }
}

/// What a failing store is to a caller: one thing less to refer to.
pub(crate) fn store_failed(error: StoreError) -> Refusal {
    let code = match error {
        StoreError::WrongId(_) | StoreError::PageSize { .. } | StoreError::Name { .. } => ErrorCode::BadRequest,
        _ => ErrorCode::Store,
    };
    let message = chain(&error);
    log::warn!("{message}");
    Refusal { code, message }
}
