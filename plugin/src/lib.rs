//! What `xl migrate` meets: `xenfold-ssh` at the source ([`source`]), `xenfold receive` at the destination
//! ([`receive`], [`arrival`], [`rejoin`], [`takeover`]), and on the administrator's terminal `xenfold resume`, `xenfold follow`
//! ([`following`]), `xenfold abort` and `xenfold
//! jobinfo` ([`job`]), `xenfold replay`, `xenfold trace` and `xenfold simulate`, and what is asked of the daemon
//! ([`daemon_commands`], [`dedup`], [`top`]).
#![forbid(unsafe_code)]

/// Says something to the administrator. Unlike `eprintln!`, which panics when the terminal has been closed, it goes on
/// when nobody listens: there may be a guest to set going yet.
#[macro_export]
macro_rules! say {
    ($($words:tt)*) => {{
        let _ = std::io::Write::write_fmt(&mut std::io::stderr(), format_args!("{}\n", format_args!($($words)*)));
    }};
}

pub mod arguments;
pub mod arrival;
pub mod balloon;
pub mod contents;
pub mod daemon_commands;
pub mod dedup;
mod dedup_page;
pub mod doctor;
pub mod following;
pub mod guest;
pub mod job;
mod may_follow;
mod model;
pub mod paging;
pub mod process;
pub mod progress;
pub mod receive;
pub mod record;
mod rejoin;
pub mod repair;
pub mod replay;
pub mod resume;
pub mod signals;
pub mod simulate;
pub mod source;
pub mod ssh;
mod takeover;
pub mod top;
pub mod trace;
pub mod usage;
pub mod writes;
