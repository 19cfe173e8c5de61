//! How agents and the `xenfold` command speak with the daemon of their host. [PROTOCOL.md](PROTOCOL.md) beside this file
//! describes every message.
//!
//! [`Client`] is the caller's side. [`read_message`] and [`write_message`] carry messages, [`Request`] and [`Reply`]
//! give them a meaning; the daemon uses the same.
mod client;
mod frame;
mod message;
mod payload;

pub use client::{Client, Offer, Opened};
pub use frame::{
    Body, ControlError, MAX_PAYLOAD_BYTES, MAX_REPLY_BYTES, MAX_REQUEST_BYTES, Message, read_message, write_message,
};
pub use message::{
    Absent, Collected, DedupGuest, DedupPair, DedupSample, DedupStats, DedupStatus, ErrorCode, GroupStats,
    HoldingsFrom, IndexStats, IndexStatus, IndexedGuest, KeyHex, Offered, Overview, Refusal, Reply, Request, Status,
    StoreStats, StoreStatus, TemplateInfo, Verified,
};
pub use payload::{
    MAX_IDS, MAX_IMAGE_ENTRIES, MAX_KEYS, MAX_PUT_PAGES, MAX_READ_PAGES, MalformedPayload, found_pages, ids,
    ids_payload, image_entries, image_payload, keys, keys_payload, pages, pages_payload, read_payload,
};

/// The protocol spoken here.
pub const VERSION: u16 = 1;

/// Where the daemon listens.
pub const SOCKET: &str = "/run/xenfold/daemon.sock";
