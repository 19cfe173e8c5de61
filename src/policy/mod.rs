//! Decisions: numbers in, a choice out. Nothing here reads a clock, a file or a guest.
mod level;

pub use level::{LevelPolicy, Spent};
