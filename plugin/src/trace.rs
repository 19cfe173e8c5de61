//! `xenfold trace GUEST FILE`: which pages a running guest writes, every 50 ms (`src/policy/TRACE.md`).
use std::fs::File;
use std::io::BufWriter;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM};
use xen_sys::{Bitmap, LogDirty, Peek, XenError, Xenctrl};
use xenfold::page_set::PageSet;
use xenfold::policy::trace::{INTERVAL, MOST_PAGES, Writer};

use crate::{guest, record};

#[derive(Debug, clap::Args)]
pub struct Arguments {
    /// The guest's name, domid or uuid.
    guest: String,
    /// Where the trace goes; a file that is there is replaced.
    file: PathBuf,
    /// How long the guest is watched.
    #[arg(long, default_value_t = 60, value_parser = clap::value_parser!(u32).range(1..=3600))]
    seconds: u32,
}

/// Records a trace. Ctrl-C ends it early; what there is until then is kept. Log-dirty is off in the end, whatever happens,
/// unless the process is killed.
///
/// # Errors
/// There is no such guest, it is being migrated, or its log-dirty is on already: somebody migrates it.
pub fn run(arguments: &Arguments) -> Result<()> {
    let Some(guest) = guest::find(&arguments.guest)? else {
        bail!("there is no guest {} on this host", arguments.guest)
    };
    if let Some(migration) = record::under_way(&guest.uuid)? {
        bail!(
            "guest {} is being migrated to {}; its dirty pages are the migration's. Try again when it has ended",
            guest.name,
            migration.host
        );
    }
    let stop = Arc::new(AtomicBool::new(false));
    for signal in [SIGINT, SIGHUP, SIGTERM] {
        signal_hook::flag::register(signal, Arc::clone(&stop))?;
    }
    let xen = Xenctrl::open()?;
    let bound = xen.maximum_gpfn(guest.domid)?.saturating_add(1).min(MOST_PAGES);
    let Some(info) = xen.domain(guest.domid)? else {
        bail!("guest {} has gone", guest.name)
    };
    let guest_pages = info.total_pages.min(bound);
    // Before the guest is touched.
    let path = &arguments.file;
    let file = File::create(path).with_context(|| format!("{} cannot be made", path.display()))?;
    let mut writer = Writer::new(BufWriter::new(file), bound, guest_pages, INTERVAL)?;
    let mut log_dirty = xen.log_dirty(guest.domid, bound)?;
    match log_dirty.enable() {
        Err(error @ XenError::LogDirtyRefused { .. }) => {
            return Err(error).with_context(|| {
                format!(
                    "guest {} is being migrated or saved by something else; try again when that has ended",
                    guest.name
                )
            });
        }
        enabled => enabled?,
    }
    let until = Instant::now() + Duration::from_secs(arguments.seconds.into());
    let recorded = watch(&mut log_dirty, &mut writer, until, &stop);
    // Dropping would do it, too, but say nothing to who waits.
    let off = log_dirty.off();
    let samples = recorded?;
    off.with_context(|| format!("log-dirty of guest {} stays on; migrate it to end that", guest.name))?;
    writer.finish()?;
    println!(
        "xenfold: {} s of guest {} are in {}; look at them with `xenfold simulate {2}`",
        (INTERVAL * samples).as_secs_f64(),
        guest.name,
        path.display()
    );
    Ok(())
}

/// Takes samples until it is time, or `stop` is set after the first. Returns how many.
fn watch(
    log_dirty: &mut LogDirty,
    writer: &mut Writer<BufWriter<File>>,
    until: Instant,
    stop: &AtomicBool,
) -> Result<u32> {
    let mut bitmap = Bitmap::new(log_dirty.pages());
    let (mut samples, mut next) = (0, Instant::now());
    while samples == 0 || Instant::now() < until && !stop.load(Ordering::Relaxed) {
        next += INTERVAL;
        thread::sleep(next.saturating_duration_since(Instant::now()));
        match log_dirty.clean(&mut bitmap)? {
            Peek::Read { .. } => {}
            // What was written stays for the next sample.
            Peek::Busy => bitmap.clear(),
        }
        writer.sample(&PageSet::from_words(bitmap.words(), log_dirty.pages()))?;
        samples += 1;
    }
    Ok(samples)
}
