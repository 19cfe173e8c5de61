//! Decisions: numbers in, a choice out. Nothing here reads a clock, a file or a guest.
//!
//! - [`LevelPolicy`]: how strongly blocks are compressed.
//! - [`Filter`](filter::Filter): which pages are held back while the guest runs. It knows what a [`model`] learnt before
//!   the migration, and goes on learning from the passes ([`gaps`]).
//! - [`simulate`]: the filter and others over [`trace`]s, recorded or [`generate`]d.
pub mod filter;
pub mod gaps;
pub mod generate;
mod level;
pub mod model;
pub mod packed;
pub mod simulate;
pub mod trace;

pub use level::{LevelPolicy, Spent};
