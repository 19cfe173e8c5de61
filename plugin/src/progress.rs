//! What the administrator sees: a line a second in xl's manner, a summary, and the newest figures for who asks.
use std::fs;
use std::io::{IsTerminal, Write, stderr};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use crossbeam_channel::{Receiver, RecvTimeoutError, Sender, bounded};
use parking_lot::Mutex;
use xen_sys::Xenctrl;
use xenfold::report::{Figures, LateFigures};

use crate::guest::{KnownDomain, is_suspended};

const EVERY: Duration = Duration::from_secs(1);
/// How often the guest's state is looked at, to know when it was suspended.
const WATCH_EVERY: Duration = Duration::from_millis(100);

/// Prints and watches until it is dropped.
pub struct Progress {
    stop: Option<Sender<()>>,
    ended: Receiver<()>,
    downtime: Arc<Mutex<Downtime>>,
}

/// What has been seen of the guest's downtime.
#[derive(Clone, Copy, Default)]
struct Downtime {
    suspended: Option<Instant>,
    /// When the other host said that the guest runs there.
    over: Option<Instant>,
}

impl Progress {
    /// The newest figures are written to `live` once a second.
    pub fn start(
        figures: Arc<Mutex<Figures>>,
        domain: KnownDomain,
        quiet: bool,
        live: Option<PathBuf>,
    ) -> std::io::Result<Progress> {
        let (stop, stopped) = bounded::<()>(0);
        let (end, ended) = bounded::<()>(0);
        let downtime = Arc::new(Mutex::new(Downtime::default()));
        let seen = downtime.clone();
        let work = move || {
            let _end = end;
            let xen = Xenctrl::open().ok();
            let terminal = stderr().is_terminal();
            let start = Instant::now();
            let mut next_line = start + EVERY;
            let mut pass = 0;
            while stopped.recv_timeout(WATCH_EVERY) == Err(RecvTimeoutError::Timeout) {
                if seen.lock().suspended.is_none()
                    && let (Some(xen), Some(domid)) = (&xen, domain.get())
                    && xen.domain(domid).ok().flatten().is_some_and(|info| is_suspended(&info))
                {
                    log::debug!("the guest is suspended");
                    seen.lock().suspended = Some(Instant::now());
                }
                if figures.lock().runs_there() {
                    seen.lock().over.get_or_insert_with(Instant::now);
                }
                let iteration = figures.lock().iteration;
                if iteration != pass && !quiet {
                    pass = iteration;
                    let begin = if terminal { "\r\x1b[K" } else { "" };
                    let said = pass_line(&figures.lock());
                    said.into_iter()
                        .for_each(|said| drop(writeln!(stderr(), "{begin}xenfold: {said}")));
                }
                if Instant::now() < next_line {
                    continue;
                }
                next_line += EVERY;
                let mut now = figures.lock().clone();
                now.time_elapsed_ms = start.elapsed().as_millis() as u64;
                now.downtime_ms = seen.lock().time().map_or(0, |time| time.as_millis() as u64);
                if let Some(path) = &live {
                    publish(path, &now);
                }
                if !quiet {
                    let (begin, end) = if terminal { ("\r", "\x1b[K") } else { ("", "\n") };
                    // Nobody has to read it.
                    let _ = write!(stderr(), "{begin}xenfold: {}{end}", line(&now));
                }
            }
            if terminal && !quiet {
                let _ = writeln!(stderr());
            }
        };
        thread::Builder::new().name("xenfold-progress".into()).spawn(work)?;
        Ok(Progress {
            stop: Some(stop),
            ended,
            downtime,
        })
    }

    /// How long the guest stood, or has stood by now, to about 200 ms.
    pub fn downtime(&self) -> Option<Duration> {
        self.downtime.lock().time()
    }
}

impl Downtime {
    fn time(self) -> Option<Duration> {
        Some(self.over.unwrap_or_else(Instant::now) - self.suspended?)
    }
}

/// Whoever reads them sees all of the old figures or all of the new ones.
pub fn publish(path: &Path, figures: &Figures) {
    let new = path.with_extension("new");
    let written = serde_json::to_vec(figures)
        .map_err(std::io::Error::from)
        .and_then(|json| fs::write(&new, json))
        .and_then(|()| fs::rename(&new, path));
    if let Err(error) = written {
        log::debug!("{}: {error}", path.display());
    }
}

impl Drop for Progress {
    fn drop(&mut self) {
        drop(self.stop.take());
        // So that its last line comes before what is said next. A terminal that is held up is not waited for.
        let _ = self.ended.recv_timeout(EVERY);
    }
}

fn mib(bytes: u64) -> f64 {
    bytes as f64 / f64::from(1 << 20)
}

/// One line: pass and how far it is, rate, what went over the wire, what was saved.
pub fn line(figures: &Figures) -> String {
    if figures.iteration == 0 {
        return format!("{}: waiting for {}", figures.guest, figures.host);
    }
    if let Some(late) = figures.late.as_ref().filter(|late| late.started) {
        if late.lost_for_ms > 0 {
            return format!(
                "{}: stands still on {}, whose it is: no connection for {} s, trying again; the pages that it lacks are kept \
                 here, {} of {} were sent",
                figures.guest,
                figures.host,
                late.lost_for_ms / 1000,
                late.sent.min(late.pages),
                late.pages
            );
        }
        return format!(
            "{}: runs on {}, {} of {} late pages sent, {:.1} MiB on the wire",
            figures.guest,
            figures.host,
            late.sent,
            late.pages,
            mib(figures.wire_bytes)
        );
    }
    let percent = figures.pass_percent();
    let held = match figures.holding.rounds {
        0 => String::new(),
        rounds => format!(" (xl is held: round {rounds})"),
    };
    let expected = match figures.expected_downtime_ms {
        Some(expected) => format!(", expected downtime {expected} ms"),
        None => String::new(),
    };
    format!(
        "{}: pass {}{held}, {percent}%, {:.1} MiB/s, {:.1} MiB on the wire, {:.0}% saved{expected}",
        figures.guest,
        figures.iteration,
        figures.rate() / f64::from(1 << 20),
        mib(figures.wire_bytes),
        100.0 * figures.reduction()
    )
}

/// What is said where a pass begins, and nothing before the second one, when there is little to expect anything from.
fn pass_line(figures: &Figures) -> Option<String> {
    let expected = figures.expected_downtime_ms.filter(|_| figures.iteration > 1)?;
    Some(format!(
        "{}: pass {} begins: expected downtime {expected} ms; the guest writes {} pages a second anew, the link takes {} of \
         {:.1} KiB each",
        figures.guest,
        figures.iteration,
        figures.dirty_pages_rate,
        figures.sent_pages_rate,
        figures.page_wire_bytes as f64 / 1024.0
    ))
}

/// The same of a guest that runs on this host, and that pages follow.
pub fn arriving_line(guest: &str, late: &LateFigures) -> String {
    if late.lost_for_ms > 0 {
        format!(
            "{guest}: stands still here, and is this host's: no connection to its source for {} s; {} of its {} late pages are kept \
             there. The source connects again by itself",
            late.lost_for_ms / 1000,
            late.missing,
            late.pages
        )
    } else {
        let stands = match late.held_for_save {
            true => "stands still here, since xl is about to save or migrate it",
            false => "runs here",
        };
        format!(
            "{guest}: {stands}, {} of {} late pages are missing{}",
            late.missing,
            late.pages,
            lost_words(late)
        )
    }
}

/// What another program has lost of the guest.
fn lost_words(late: &LateFigures) -> String {
    match late.lost_to_save {
        0 => String::new(),
        lost => format!("; WHAT ANOTHER PROGRAM SAVED OF IT MEANWHILE LACKS {lost} PAGES, do not use that"),
    }
}

/// What the administrator of this host has to know of a guest that pages follow.
pub fn arriving_warning(guest: &str, late: &LateFigures) -> String {
    format!(
        "GUEST {guest} lacks {} pages that are still on the host it came from. Do not save or migrate it yet: xl would wait up to \
         40 s for them, and lose what has not come by then{}",
        late.missing,
        lost_words(late)
    )
}

/// What is said of pages that followed the guest.
fn late_lines(late: &LateFigures) -> String {
    let mut text = format!(
        "\n{} pages followed the guest in {} ms: {} pushed, {} fetched, {} prefetched ({} hits), {} given up; {} of them did \
         not travel, since another page of it ({}) or this host ({}) held the same, which was wrong {} times; {} had to come \
         before it was started; taking them out took {} ms, and {} ms while it still ran for {} of them and {} that \
         came back\n\
         {} faults of the guest waited {} ms (median), {} ms (99 %), {} ms (longest); {} of other domains",
        late.pages,
        late.time_ms,
        late.pushed,
        late.fetched,
        late.prefetched,
        late.hits,
        late.given_up,
        late.referred.saturating_add(late.known),
        late.referred,
        late.known,
        late.asked_again,
        late.fetched_before,
        late.evict_time_ms,
        late.early_time_ms,
        late.early,
        late.early_back,
        late.faults,
        late.latency_median_us as f64 / 1000.0,
        late.latency_p99_us as f64 / 1000.0,
        late.latency_longest_us as f64 / 1000.0,
        late.foreign_faults
    );
    if late.outages > 0 {
        text.push_str(&format!(
            "\nthe connection was lost {} times, for {} ms in all: the guest stood still meanwhile",
            late.outages, late.outage_ms
        ));
    }
    if late.takeovers > 0 {
        text.push_str(&format!(
            "\nthe xenfold that received the guest was killed, and another one went on for it: {} pages had come by then, which \
             are not counted as pushed or fetched",
            late.before_takeover
        ));
    }
    if late.lost_to_save > 0 {
        text.push_str(&format!("\n{}", lost_words(late).trim_start_matches("; ")));
    }
    if late.verified_pages + late.different_pages > 0 {
        text.push_str(&format!(
            "\nverified {} late pages read back equal, {} different",
            late.verified_pages, late.different_pages
        ));
    }
    text
}

/// The lines at the end.
pub fn summary(figures: &Figures) -> String {
    let pages = &figures.pages;
    let blocks: Vec<String> = figures
        .blocks
        .iter()
        .map(|(name, count)| format!("{count} {name}"))
        .collect();
    let mut text = format!(
        "time elapsed {} ms (setup {} ms, downtime {} ms, {} of them for devices), {} passes\n\
         memory processed {:.1} MiB: {} zero, {} references, {} known, {} deltas, {} full pages, {} without data\n\
         wire {:.1} MiB instead of {:.1} MiB, {:.1}% saved; blocks: {}",
        figures.time_elapsed_ms,
        figures.setup_time_ms,
        figures.downtime_ms,
        figures.devices_time_ms,
        figures.iteration,
        mib(figures.memory_processed_bytes),
        pages.zero,
        pages.reference,
        pages.known,
        pages.delta,
        pages.full,
        pages.absent,
        mib(figures.wire_bytes),
        mib(figures.stream_bytes),
        100.0 * figures.reduction(),
        if blocks.is_empty() {
            "none".to_owned()
        } else {
            blocks.join(", ")
        },
    );
    if let Some(balloon) = &figures.balloon {
        text.push_str(&format!(
            "\nthe guest gave up {:.0} MiB before it was migrated (--balloon), in {} ms: {:.0} MiB instead of {:.0} MiB, to which \
             it grows again afterwards",
            mib(balloon.given_up_bytes),
            balloon.time_ms,
            mib(balloon.target_bytes),
            mib(balloon.target_before_bytes)
        ));
    }
    if figures.converged == Some(false) {
        text.push_str(&format!(
            "\nthe guest writes faster than the link takes: after the last pass it was expected to stand still for {} ms",
            figures.expected_downtime_ms.unwrap_or_default()
        ));
    }
    if figures.needed_pages > 0 {
        text.push_str(&format!(
            "\n{} pages were not there any more at the destination and were sent after all",
            figures.needed_pages
        ));
    }
    let holding = &figures.holding;
    if holding.held_pages > 0 {
        text.push_str(&format!(
            "\nheld back {} of xl's {} pages: {} came again, {} were sent while the guest ran, {} when it was suspended; \
             {} pages went more than once; the dirty bitmap was read {} times in {} ms",
            holding.held_pages,
            holding.pages_from_xl,
            holding.again_pages,
            holding.released_pages,
            holding.flushed_pages,
            holding.repeat_pages,
            holding.peeks,
            holding.peek_time_us / 1000
        ));
    }
    if holding.known_pages > 0 {
        text.push_str(&format!(
            "\n{} pages were known from earlier migrations to be written",
            holding.known_pages
        ));
    }
    if holding.changing_pages > 0 {
        text.push_str(&format!(
            "\n{} pages had changed while xenfoldd looked at the guest's memory",
            holding.changing_pages
        ));
    }
    if holding.rounds > 0 {
        text.push_str(&format!(
            "\nxl was held for {} rounds, {} ms, and {} pages went ahead of it; expected downtime then {} ms",
            holding.rounds,
            holding.round_time_ms,
            holding.ahead_pages,
            figures.expected_downtime_ms.unwrap_or_default()
        ));
    }
    if let Some(late) = &figures.late {
        text.push_str(&late_lines(late));
    }
    match &figures.verify {
        Some(verify) if verify.equal_pages == 0 => text.push_str(&format!(
            "\nverified nothing: {} cannot read the frames of this guest",
            figures.host
        )),
        Some(verify) => text.push_str(&format!(
            "\nverified {} frames read back equal ({} rewritten by Xen left out) in {} ms; {} changed at the source since",
            verify.equal_pages, verify.rewritten_by_xen_pages, verify.time_ms, verify.changed_at_source_pages
        )),
        None => {}
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_tells_how_far_it_is() {
        let mut figures = Figures {
            guest: "g1".into(),
            host: "b".into(),
            ..Figures::default()
        };
        assert_eq!(line(&figures), "g1: waiting for b");
        figures = Figures {
            iteration: 2,
            iteration_pages: 256,
            memory_total_bytes: 4 << 20,
            memory_processed_bytes: 20 << 20,
            time_elapsed_ms: 10_000,
            stream_bytes: 20 << 20,
            wire_bytes: 5 << 20,
            ..figures
        };
        assert_eq!(
            line(&figures),
            "g1: pass 2, 25%, 2.0 MiB/s, 5.0 MiB on the wire, 75% saved"
        );
        assert_eq!(pass_line(&figures), None, "nothing is expected yet");
        figures.expected_downtime_ms = Some(480);
        figures.holding.rounds = 3;
        (
            figures.dirty_pages_rate,
            figures.sent_pages_rate,
            figures.page_wire_bytes,
        ) = (300, 25_000, 1536);
        assert_eq!(
            line(&figures),
            "g1: pass 2 (xl is held: round 3), 25%, 2.0 MiB/s, 5.0 MiB on the wire, 75% saved, expected downtime 480 ms"
        );
        assert_eq!(
            pass_line(&figures).unwrap(),
            "g1: pass 2 begins: expected downtime 480 ms; the guest writes 300 pages a second anew, the link takes 25000 of 1.5 \
             KiB each"
        );
        assert!(summary(&figures).contains("held for 3 rounds"));
    }
}
