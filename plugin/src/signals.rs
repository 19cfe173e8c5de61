//! Signals: Ctrl-C and hang-ups end xl, not its agents; they stay and clean up. TERM ends the migration in order.
use std::io;
use std::thread;

use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM};
use signal_hook::iterator::Signals;

/// From now on SIGINT and SIGHUP do nothing, SIGTERM calls `stop`: for what xl has started.
pub fn handle(stop: impl Fn() + Send + 'static) -> io::Result<()> {
    call_at(&[SIGTERM], stop)
}

/// From now on SIGHUP does nothing, SIGINT and SIGTERM call `stop`: for what was typed.
pub fn handle_typed(stop: impl Fn() + Send + 'static) -> io::Result<()> {
    call_at(&[SIGINT, SIGTERM], stop)
}

fn call_at(stopping: &'static [i32], stop: impl Fn() + Send + 'static) -> io::Result<()> {
    let mut signals = Signals::new([SIGHUP, SIGINT, SIGTERM])?;
    let wait = move || {
        signals
            .forever()
            .filter(|signal| stopping.contains(signal))
            .for_each(|_| stop())
    };
    thread::Builder::new().name("xenfold-signals".into()).spawn(wait)?;
    Ok(())
}
