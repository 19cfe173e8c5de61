//! The wire between two xenfold: a hello from each side, then frames. [FORMAT.md](FORMAT.md) beside this file describes
//! every byte.
//!
//! [`Hello`] negotiates, [`FrameWriter`] and [`FrameReader`] carry frames, `message`, `contents` and `late`
//! give their bodies a meaning.
mod contents;
mod frame;
mod hello;
mod late;
mod message;

pub use contents::{Contents, Held, Need, have_bodies};
pub use frame::{FRAME_HEADER_BYTES, Frame, FrameReader, FrameWriter, Kind, MAX_FRAME_BODY, WireError};
pub use hello::{Agreement, EarlyOut, Hello, VERSION_MAX, VERSION_MIN};
pub use late::{LatePages, LateRow, MAX_LATE_PAGES, MAX_WANTS, missing, missing_bodies, want_body, wants};
pub use message::{Block, End, Rows, Verdict, from_json, u32_body, u64_body};
