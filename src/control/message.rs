//! What is asked and answered.
use std::fmt;

use serde::{Deserialize, Serialize};

use crate::migrations::{Forsaken, UnderWay};
use crate::page::ContentKey;

/// A group's key in 64 hexadecimal digits, as far as the sender keeps to the protocol.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(transparent)]
pub struct KeyHex(String);

impl KeyHex {
    pub fn new(key: &ContentKey) -> KeyHex {
        KeyHex(key.hex())
    }

    /// `None`: it is no key.
    pub fn key(&self) -> Option<ContentKey> {
        ContentKey::from_hex(&self.0)
    }
}

impl fmt::Debug for KeyHex {
    /// Without the key, which must not get into logs.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("KeyHex(..)")
    }
}

/// A group and its key as the migration's other host has them.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Offered {
    pub group: String,
    pub key_hex: KeyHex,
}

/// What a caller asks. Variants without members are written as empty structures, so that some can be added.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "request", rename_all = "snake_case")]
pub enum Request {
    /// Binds the connection to the guest's group. `offered`: at the destination, what the source has.
    Open {
        guest_uuid: String,
        /// Its own name, without xl's suffixes: the configuration decides by it.
        guest_name: String,
        #[serde(default)]
        offered: Option<Offered>,
    },
    Want {},
    Put {},
    Read {},
    Holdings {
        #[serde(default)]
        from: HoldingsFrom,
    },
    Image {},
    SaveImage {
        last: bool,
    },
    Status {},
    Index {},
    Dedup {},
    /// Begins to share memory, or ends it and gives all pages back.
    DedupEnable {
        enable: bool,
    },
    /// Goes through a guest at once.
    DedupScan {
        guest_uuid: String,
    },
    /// What earlier migrations have taught of a guest's writes.
    Model {
        guest_uuid: String,
    },
    SaveModel {
        guest_uuid: String,
    },
    /// Which pages of a running guest change.
    Changing {
        guest_uuid: String,
        /// The guest's pages lie below this.
        bound: u64,
    },
    StoreStats {},
    StoreVerify {},
    StoreGc {},
    /// Makes a template of the guest's image, wherever a group has it.
    TemplateAdd {
        name: String,
        guest_uuid: String,
    },
    TemplateList {},
    /// `group` is needed where several groups have a template of that name.
    TemplateRemove {
        name: String,
        #[serde(default)]
        group: Option<String>,
    },
}

/// Whose contents are asked for.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum HoldingsFrom {
    #[default]
    All,
    /// What is kept: these stay.
    Store,
    /// What other running guests of the group had when they were last looked at.
    Guests,
}

fn yes() -> bool {
    true
}

/// What the daemon answers.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "reply", rename_all = "snake_case")]
pub enum Reply {
    Opened {
        group: String,
        key_hex: KeyHex,
        /// False: no contents are kept here, so that nothing need be put.
        store: bool,
        /// Contents of running guests are looked up. When neither this nor `store`: nothing need be asked.
        #[serde(default)]
        index: bool,
        /// What a guest's pages hold is of use. A daemon of before 2026-11-28 does not say.
        #[serde(default = "yes")]
        image: bool,
    },
    /// One byte for each id, and for `read` the pages found.
    Answers {},
    Done {
        #[serde(default)]
        new: u64,
    },
    /// A part of holdings or of an image, a model, or a set of pages.
    Part {
        last: bool,
    },
    /// There is no such thing.
    None {},
    Status(Box<Status>),
    Index(IndexStatus),
    Dedup(DedupStatus),
    StoreStats(StoreStats),
    Verified(Verified),
    Collected(Collected),
    Templates {
        templates: Vec<TemplateInfo>,
    },
    Error(Refusal),
}

/// Why the daemon does not do what was asked. The connection stays usable unless the request itself was malformed.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Refusal {
    pub code: ErrorCode,
    pub message: String,
}

impl fmt::Display for Refusal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.message)
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum ErrorCode {
    /// The request is malformed.
    BadRequest,
    /// Another version of the protocol is spoken.
    Version,
    /// The request is not allowed at this point of the connection.
    Order,
    /// As many connections as are allowed are open.
    Busy,
    /// The configuration puts the guest into another group than offered.
    OtherGroup,
    /// The group has another key here than offered.
    OtherKey,
    /// The guest matches two groups in the configuration.
    TwoGroups,
    /// The group's key cannot be read or written.
    Key,
    /// No contents are kept on this host.
    NoStore,
    /// The store failed.
    Store,
    /// Memory cannot be shared on this host.
    NoSharing,
    /// There is no such guest, guest image or template.
    NotFound,
    /// The name fits several templates.
    Ambiguous,
    /// One that only a newer daemon knows.
    #[serde(other)]
    Unknown,
}

/// How the daemon is.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Status {
    /// Program version.
    pub program: String,
    pub pid: u32,
    pub uptime_s: u64,
    /// Connections now, this one included, and how many may be.
    pub connections: u64,
    pub connections_max: u64,
    /// Release of the hypervisor, none where there is no Xen.
    pub xen: Option<String>,
    /// Sharing groups in the configuration.
    pub groups: Vec<String>,
    pub store: StoreStatus,
    pub index: IndexStatus,
    /// Guests whose late pages nobody looks after. Left empty by the daemon: whoever asks looks, with Xen.
    pub forsaken: Vec<Forsaken>,
}

/// All figures of a host together.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct Overview {
    pub status: Status,
    pub dedup: DedupStatus,
    /// From this host to others.
    pub migrations: Vec<UnderWay>,
}

/// Whether memory is shared between guests.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "state", rename_all = "snake_case")]
pub enum DedupStatus {
    Running(Box<DedupStats>),
    /// It cannot be; `failed`: the configuration wants it.
    Absent(Absent),
}

impl Default for DedupStatus {
    fn default() -> Self {
        DedupStatus::Absent(Absent::default())
    }
}

/// What is shared. Counts of pages are of 4096 bytes; those of the table are as of the last visit of each page.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct DedupStats {
    /// False: nothing further is shared.
    pub enabled: bool,
    /// What is shared is being given back to the guests.
    pub returning: bool,
    /// Frames gone through meanwhile for shared pages that the table does not know.
    pub swept_frames: u64,
    /// Pages in the table, the frames that they have, and the frames that this spares.
    pub pages: u64,
    pub frames: u64,
    pub saved_pages: u64,
    /// The same by Xen's counters: frames spared, and frames that are shared or about to be.
    pub xen_saved_pages: u64,
    pub xen_frames: u64,
    /// Memory of the host that nobody has.
    pub free_bytes: u64,
    pub reserve_bytes: u64,
    /// There is less than the reserve: nothing further is shared.
    pub short: bool,
    /// Memory of the daemon for what it knows of pages that stay.
    pub history_bytes: u64,
    /// Since the daemon started: pages that got another's frame; that were written to afterwards; that were written to
    /// before they were shared; that Xen did not share; that were given back on purpose.
    pub shared: u64,
    pub broken: u64,
    pub changed: u64,
    pub refused: u64,
    pub unshared: u64,
    /// How often a processor of a guest stood still since then because there was no free memory for a page that it wrote
    /// to, and how many stand still now.
    pub stood: u64,
    pub standing: u64,
    /// Pages found written to in the last second.
    pub breaks_per_s: u64,
    /// Since the daemon started: pages of guests that arrived with a content which another guest of their group had; those
    /// of them that were shared at once; those that still wait for that.
    pub arrived: u64,
    pub arrived_shared: u64,
    pub arrived_waiting: u64,
    /// How long that took for the last guest, from when its migration had let go of it; and how long that was after its
    /// agent had told of its pages.
    pub arrival_ms: Option<u64>,
    pub arrival_waited_ms: Option<u64>,
    pub guests: Vec<DedupGuest>,
    /// Pages that two guests have in one frame, the numbers ascending; the same number twice: one guest's own. The 1000
    /// pairs with the most pages.
    pub pairs: Vec<DedupPair>,
    /// The oldest first.
    pub samples: Vec<DedupSample>,
}

#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct DedupGuest {
    pub domid: u32,
    pub name: String,
    pub group: String,
    pub shared_pages: u64,
    /// Why nothing further of it is shared, if so.
    pub left_out: Option<String>,
}

#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct DedupPair {
    pub domids: [u32; 2],
    pub pages: u64,
}

/// How it was at one time.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct DedupSample {
    pub age_s: u64,
    pub pages: u64,
    pub saved_pages: u64,
    /// Since the daemon started.
    pub broken: u64,
}

/// Whether contents are kept.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "state", rename_all = "snake_case")]
pub enum StoreStatus {
    Open {
        limit_bytes: u64,
        used_bytes: u64,
        contents: u64,
        images: u64,
        templates: u64,
    },
    Absent(Absent),
}

/// Why no contents are kept.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Absent {
    /// False: the configuration wants none.
    pub failed: bool,
    pub reason: String,
}

impl Default for StoreStatus {
    fn default() -> Self {
        StoreStatus::Absent(Absent::default())
    }
}

/// Whether contents of running guests are looked up.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "state", rename_all = "snake_case")]
pub enum IndexStatus {
    Running(IndexStats),
    Absent(Absent),
}

impl Default for IndexStatus {
    fn default() -> Self {
        IndexStatus::Absent(Absent::default())
    }
}

/// What the index knows of the running guests, and what it takes.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct IndexStats {
    /// Different contents, group by group.
    pub pages: u64,
    pub memory_bytes: u64,
    pub limit_bytes: u64,
    /// There was no room for some contents in this round or the one before.
    pub full: bool,
    /// How often all guests were gone through.
    pub rounds: u64,
    /// Since the last round ended; none before the first one has.
    pub last_round_age_s: Option<u64>,
    /// How long the last round took.
    pub last_round_s: Option<u64>,
    /// Pages read and hashed in the last second.
    pub pages_per_s: u64,
    /// The most that the configuration allows.
    pub rate_limit_pages_per_s: u64,
    /// Of the processors in the last second; none when Xen does not tell.
    pub idle_percent: Option<u8>,
    /// Pages given to callers, since the daemon started.
    pub answered: u64,
    /// Pages asked for that were something else by then, since the daemon started.
    pub stale: u64,
    pub guests: Vec<IndexedGuest>,
}

/// A guest of this host.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct IndexedGuest {
    pub domid: u32,
    pub name: String,
    pub group: Option<String>,
    /// Contents that are found at this guest; one that several have is found at one.
    pub pages: u64,
    /// How often it has been gone through: which of its pages change is known after the second time.
    pub visits: u32,
    /// Why its contents are not looked up, if they are not.
    pub left_out: Option<String>,
}

/// What the store holds, and what it takes on the disk.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct StoreStats {
    pub limit_bytes: u64,
    pub used_bytes: u64,
    /// Memory of the daemon for the tables of contents.
    pub table_bytes: u64,
    pub groups: Vec<GroupStats>,
}

#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct GroupStats {
    pub name: String,
    /// Whether it was opened with its key since the daemon started.
    pub open: bool,
    pub contents: u64,
    pub images: u64,
    pub templates: u64,
    pub bytes: u64,
    /// Contents found damaged, and dropped, since the daemon started.
    pub damaged: u64,
    /// Indexes that could not be used since the daemon started.
    pub indexes_set_aside: u64,
}

/// What a verification found.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Verified {
    pub contents: u64,
    pub damaged: u64,
    /// Groups whose key is missing, so that nothing can be said of them.
    pub groups_skipped: u64,
}

/// What was dropped because nothing names it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Collected {
    pub contents: u64,
    pub bytes: u64,
}

#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct TemplateInfo {
    pub name: String,
    pub group: String,
    pub saved_unix_s: u64,
    pub pages: u64,
}
