//! What `xl migrate` meets: `xenfold-ssh` at the source ([`source`]), `xenfold receive` at the destination
//! ([`receive`]), and on the administrator's terminal `xenfold resume`, `xenfold replay` and what is
//! asked of the daemon ([`daemon_commands`]).
#![forbid(unsafe_code)]

pub mod arguments;
pub mod contents;
pub mod daemon_commands;
pub mod guest;
pub mod process;
pub mod progress;
pub mod receive;
pub mod record;
pub mod repair;
pub mod replay;
pub mod resume;
pub mod signals;
pub mod source;
pub mod ssh;
pub mod usage;
