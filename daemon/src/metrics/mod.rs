//! The daemon's figures for monitoring, on a socket of their own: `/metrics` in Prometheus' text format ([`text`]), the
//! same as JSON under `/metrics.json`. Off unless configured.
//!
//! A GET is all that is understood ([`http`]), so there is no framework: a thread for each of a few callers, each with a
//! deadline, and figures that are taken once a second at most, whoever asks how often.
mod http;
mod text;

use std::io::{self, ErrorKind};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use parking_lot::Mutex;
use rustix::event::{PollFd, PollFlags, poll};
use xenfold::control::Overview;
use xenfold::engine::chain;
use xenfold::migrations;

use self::http::{Answer, TooSlow};
use crate::daemon::Daemon;
use crate::socket::Socket;

/// Callers at a time. Whoever comes beside them is told to come again.
pub const MOST_CALLERS: usize = 4;

/// How long a caller may take for its question and the answer together.
const PATIENCE: Duration = Duration::from_secs(5);

/// As old as figures may be.
const FRESH: Duration = Duration::from_secs(1);

/// What callers are told, and where it comes from.
struct Metrics {
    daemon: Arc<Daemon>,
    /// Where the agents of this host have their records.
    migrations: PathBuf,
    taken: Mutex<Option<(Instant, Arc<Overview>)>>,
}

/// Tells figures on a socket until `stop` can be read from. `migrations` is the folder of the agents' records. Errors: none
/// but in the log; the daemon serves without.
pub fn start(daemon: &Arc<Daemon>, path: &Path, migrations: &Path, stop: OwnedFd) -> Option<JoinHandle<()>> {
    let socket = match Socket::listen(path) {
        Ok(socket) => socket,
        Err(error) => {
            log::error!(
                "no figures are told: {}; `metrics` in /etc/xen/xenfold.conf says where",
                chain(&error)
            );
            return None;
        }
    };
    let metrics = Arc::new(Metrics {
        daemon: daemon.clone(),
        migrations: migrations.into(),
        taken: Mutex::default(),
    });
    let serve = move || {
        if let Err(error) = serve(&metrics, &socket, &stop) {
            log::error!("no figures are told any more: {error}");
        }
    };
    match thread::Builder::new().name("metrics".into()).spawn(serve) {
        Ok(thread) => {
            log::info!("figures are told on {}", path.display());
            Some(thread)
        }
        Err(error) => {
            log::error!("no figures are told: no thread can be made: {error}");
            None
        }
    }
}

fn serve(metrics: &Arc<Metrics>, socket: &Socket, stop: impl AsFd) -> io::Result<()> {
    // Each caller's thread has one of these.
    let places = Arc::new(());
    loop {
        let mut ready = [
            PollFd::new(&socket.listener, PollFlags::IN),
            PollFd::new(&stop, PollFlags::IN),
        ];
        match poll(&mut ready, None) {
            Err(rustix::io::Errno::INTR) => continue,
            Err(error) => return Err(error.into()),
            Ok(_) => {}
        }
        let [_, stopped] = &ready;
        if !stopped.revents().is_empty() {
            return Ok(());
        }
        match socket.listener.accept() {
            Ok((caller, _)) => {
                let place = places.clone();
                let full = Arc::strong_count(&places) > MOST_CALLERS + 1;
                if let Err(error) = welcome(metrics, caller, place, full) {
                    log::debug!("a caller for figures cannot be served: {error}");
                }
            }
            Err(error) if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::Interrupted) => {}
            Err(error) => {
                log::warn!("callers for figures cannot be taken: {error}");
                thread::sleep(Duration::from_millis(100));
            }
        }
    }
}

fn welcome(metrics: &Arc<Metrics>, caller: UnixStream, place: Arc<()>, full: bool) -> io::Result<()> {
    if full {
        // It has the room of a new socket, and nobody waits.
        caller.set_nonblocking(true)?;
        let _ = io::Write::write(&mut &caller, &Answer::busy().bytes());
        return Ok(());
    }
    caller.set_nonblocking(false)?;
    let metrics = metrics.clone();
    let answer = move || {
        let deadline = Instant::now() + PATIENCE;
        if let Err(TooSlow(error)) = http::serve(&caller, deadline, |path| metrics.answer(path)) {
            log::debug!("a caller for figures: {error}");
        }
        drop(place);
    };
    thread::Builder::new().name("figures".into()).spawn(answer).map(drop)
}

impl Metrics {
    /// `None`: there is nothing of that name.
    fn answer(&self, path: &str) -> Option<Answer> {
        match path {
            "/metrics" => Some(Answer::found(
                "text/plain; version=0.0.4; charset=utf-8",
                text::text(&self.overview()),
            )),
            "/metrics.json" => {
                let json = serde_json::to_string_pretty(self.overview().as_ref());
                Some(match json {
                    Ok(json) => Answer::found("application/json", json),
                    Err(error) => Answer::failed(&error.to_string()),
                })
            }
            _ => None,
        }
    }

    fn overview(&self) -> Arc<Overview> {
        // Whoever comes meanwhile waits for the figures that are being taken.
        let mut taken = self.taken.lock();
        if let Some((when, overview)) = taken.as_ref().filter(|(when, _)| when.elapsed() < FRESH) {
            log::trace!("figures of {} ms ago", when.elapsed().as_millis());
            return overview.clone();
        }
        let overview = Arc::new(Overview {
            status: self.daemon.status(),
            dedup: self.daemon.dedup_status(),
            migrations: migrations::under_way(&self.migrations),
        });
        *taken = Some((Instant::now(), overview.clone()));
        overview
    }
}
