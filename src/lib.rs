//! Xenfold's pure library: everything that makes `xl migrate` send each distinct page once, without Xen and without unsafe code.
//!
//! `stream` reads and writes Xen's migration stream, `table` knows which page holds which content, `codec` turns pages
//! into rows and back, `policy` decides, `wire` frames the rows between two hosts, `engine` runs the phases of a
//! migration in order, `late` knows which pages follow a guest that runs already. Beside them `config` reads the
//! configuration, `control` speaks with the daemon, and `migrations` finds those that are under way.
#![forbid(unsafe_code)]

pub mod codec;
pub mod config;
pub mod control;
pub mod engine;
pub mod late;
pub mod migrations;
pub mod page;
mod page_hash;
pub mod page_set;
pub mod policy;
pub mod report;
pub mod stream;
pub mod table;
pub mod wire;

/// Version of the programs, with the commit they were built from.
pub const VERSION: &str = concat!(env!("CARGO_PKG_VERSION"), " (", env!("XENFOLD_BUILD"), ")");
