//! What `xl migrate` meets: `xenfold-ssh` at the source, `xenfold` at the destination and on the administrator's terminal.
#![forbid(unsafe_code)]

pub mod replay;
pub mod usage;
