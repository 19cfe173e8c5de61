//! Setting a source guest going again after its migration was given up while xl is dead: xl would have done it.
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal};
use xen_sys::{DomId, Libxl, Xenctrl, Xenstore};

use crate::guest::{AWAY, is_suspended, name_of};
use crate::process::{self, Helper};

/// How long a helper that was told to end may take.
const HELPER_PATIENCE: Duration = Duration::from_secs(3);

/// How long a guest that was told to suspend may take to do so, or to leave it.
const SUSPENDING: Duration = Duration::from_secs(2);

/// Ends a helper whose xl is dead; otherwise it would go on with the guest.
pub fn end_helper(helper: Helper) -> Result<()> {
    let Some(pid) = i32::try_from(helper.pid).ok().and_then(Pid::from_raw) else {
        return Ok(());
    };
    let Ok(handle) = pidfd_open(pid, PidfdFlags::empty()) else {
        return Ok(());
    };
    // The number may be another process's by now; the handle is not.
    if process::find_helper(helper.pid, "--save-domain") != Some(helper) {
        return Ok(());
    }
    for signal in [Signal::TERM, Signal::KILL] {
        if pidfd_send_signal(&handle, signal).is_err() {
            return Ok(());
        }
        if process::wait_for_end(helper.pid, Some(HELPER_PATIENCE)) {
            return Ok(());
        }
    }
    bail!("libxl-save-helper (process {}) does not end", helper.pid)
}

/// Turns off the log-dirty that a dead xl left on, gives the guest its name back, and resumes it if it is suspended.
/// Returns what was done, in words. Never to be called once GO may have been sent, unless the destination was asked.
pub fn resume(domid: DomId) -> Result<String> {
    let xen = Xenctrl::open()?;
    let Some(info) = xen.domain(domid)? else {
        bail!("domain {} does not exist any more", domid.get())
    };
    if info.dying {
        bail!("domain {} is being destroyed", domid.get());
    }
    let pages = xen.maximum_gpfn(domid)? + 1;
    let mut log_dirty = xen.log_dirty(domid, pages)?;
    log_dirty.adopt();
    // Off already is as good: xl's helper may have turned it off itself.
    let off = log_dirty.off();
    log::debug!("log-dirty of domain {}: {off:?}", domid.get());
    let store = Xenstore::open()?;
    let mut name = name_of(&store, domid)?.unwrap_or_default();
    let libxl = Libxl::open()?;
    if let Some(before) = name.strip_suffix(AWAY).map(str::to_owned) {
        libxl
            .rename(domid, &name, &before)
            .with_context(|| format!("{name} cannot be called {before} again"))?;
        name = before;
    }
    if !is_suspended(&info) && !suspends_late(&xen, &store, domid)? {
        return Ok(format!("guest {name} was not suspended and runs on here"));
    }
    libxl
        .resume(domid)
        .with_context(|| format!("guest {name} cannot be resumed"))?;
    Ok(format!("guest {name} was suspended and runs again here"))
}

/// Takes back what a dead xl has told the guest. Whether the guest suspends nevertheless.
fn suspends_late(xen: &Xenctrl, store: &Xenstore, domid: DomId) -> Result<bool> {
    let path = format!("{}/control/shutdown", store.domain_path(domid)?);
    let deadline = Instant::now() + SUSPENDING;
    match store.read_string(&path)?.as_deref() {
        // xl never asked it.
        None => return Ok(false),
        Some("suspend") => store.write(&path, b"")?,
        Some(_) => {}
    }
    while Instant::now() < deadline {
        if xen.domain(domid)?.is_some_and(|info| is_suspended(&info)) {
            return Ok(true);
        }
        thread::sleep(Duration::from_millis(50));
    }
    Ok(false)
}
