//! Pages that travel late: the guest runs at the destination, and they follow.
//!
//! - [`Pager`], at the destination: which pages are late, who waits for one, what to ask the source for.
//! - [`PageServer`], at the source: which page to send next, what was asked for before what is pushed.
//! - [`Save`]: another program saves the guest meanwhile.
//!
//! - [`journal`]: what another process needs to go on when one of the two is killed.
//!
//! But for the journal, numbers in, decisions out: time is a value, Xen and the connection are the engine's.
pub mod journal;
mod latency;
mod mode;
mod pager;
mod save;
mod server;
mod window;

pub use latency::Latency;
pub use mode::Mode;
pub use pager::{Arrival, Asking, Pager, Want};
pub use save::{Save, SaveStep, Saving};
pub use server::{Batch, Next, PageServer};
pub use window::Window;
