//! xenfoldd, the dom0 service: it keeps contents across migrations, knows those of running guests, and answers for
//! both, inside sharing groups only.
//!
//! [`daemon::Daemon`] is what the service knows, [`server::serve`] its loop; `connection` follows one caller,
//! `membership` decides which group and key a guest has, `keys` keeps the keys, `store` the contents, `models` what is known of guests' writes; `index` knows those
//! of running guests, and `sharing` gives equal ones of a group one frame. [`metrics`] tells the figures of all that, [`forsaken`] looks after guests whose pager
//! was killed. The protocol is the library's ([`xenfold::control`]).
#![forbid(unsafe_code)]

mod connection;
pub mod daemon;
pub mod forsaken;
mod index;
mod keys;
mod membership;
pub mod metrics;
mod models;
mod notes;
pub mod server;
mod sharing;
pub mod socket;
pub mod store;
mod templates;
