//! Decisions: numbers in, a choice out. Nothing here reads a clock, a file or a guest.
mod hold;
mod level;

pub use hold::{DirtyAgain, HoldPolicy};
pub use level::{LevelPolicy, Spent};
