//! Decisions: numbers in, a choice out. Nothing here reads a clock, a file or a guest.
//!
//! - [`LevelPolicy`]: how strongly blocks are compressed.
//! - [`HoldPolicy`]: what the engine asks about pages while the guest runs. [`Forecast`] answers with a
//!   [`Filter`](filter::Filter), which knows what a [`model`] learnt before the migration and goes on learning from the
//!   passes ([`gaps`]).
//! - [`simulate`]: the filter and others over [`trace`]s, recorded or [`generate`]d.
pub mod filter;
pub mod gaps;
pub mod generate;
mod hold;
mod level;
pub mod model;
pub mod packed;
pub mod simulate;
pub mod trace;

pub use hold::{Forecast, HoldPolicy};
pub use level::{LevelPolicy, Spent};
