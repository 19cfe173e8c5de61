//! Decisions: numbers in, a choice out. Nothing here reads a clock, a file or a guest.
//!
//! - [`LevelPolicy`]: how strongly blocks are compressed.
//! - [`HoldPolicy`]: what the engine asks about pages while the guest runs. [`Forecast`] answers with a
//!   [`Filter`](filter::Filter), which knows what a [`model`] learnt before the migration and goes on learning from the
//!   passes ([`gaps`]); a guest that goes round is found in its circle (`circle`). What a migration has taught is [`kept`] for the
//!   guest's next one.
//! - [`Rounds`]: how long xl is held at the end of its passes, and which pages go ahead of it meanwhile.
//! - [`simulate`]: the filter and others over [`trace`]s, recorded or [`generate`]d.
mod ages;
mod circle;
pub mod filter;
pub mod gaps;
pub mod generate;
mod hold;
pub mod kept;
mod known;
mod level;
pub mod model;
pub mod packed;
mod rate;
mod rounds;
pub mod simulate;
pub mod trace;
mod written;

pub use hold::{Before, Forecast, HoldPolicy, Outlook};
pub use kept::{Kept, KeptError};
pub use level::{LevelPolicy, Spent};
pub use rounds::{Hope, Look, RoundLimits, Rounds};
