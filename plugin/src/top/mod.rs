//! `xenfold top`: what this host shares and sends, in the terminal, once a second.
mod table;
mod terminal;

use std::io::{IsTerminal, stdin, stdout};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM};
use signal_hook::low_level::pipe;
use xenfold::control::Overview;
use xenfold::migrations;

use self::table::table;
use self::terminal::{Terminal, width};
use crate::daemon_commands::Asking;

const EVERY: Duration = Duration::from_secs(1);

/// How long the daemon may take for an answer.
const PATIENCE: Duration = Duration::from_secs(5);

/// Ctrl-C and Ctrl-D arrive as these.
const ENDING_KEYS: [u8; 4] = [b'q', b'Q', 3, 4];

#[derive(Debug, clap::Args)]
pub struct Arguments {
    /// Print the figures once.
    #[arg(long)]
    once: bool,
    #[command(flatten)]
    asking: Asking,
}

/// Shows the figures until q or Ctrl-C; without a terminal once.
pub fn run(arguments: &Arguments) -> Result<()> {
    let asking = &arguments.asking;
    // Before the terminal is touched: without a daemon there is nothing to show.
    let first = overview(asking)?;
    if arguments.once || asking.wants_json() || !stdin().is_terminal() || !stdout().is_terminal() {
        let width = width().unwrap_or(usize::MAX);
        return asking.print(&first, |overview| table(overview, width).join("\n"));
    }
    live(asking, first)
}

fn overview(asking: &Asking) -> Result<Overview> {
    let mut client = asking.connect(Some(PATIENCE))?;
    Ok(Overview {
        status: client.status()?,
        dedup: client.dedup()?,
        migrations: migrations::under_way(Path::new(migrations::FOLDER)),
    })
}

fn live(asking: &Asking, first: Overview) -> Result<()> {
    let (end, ended) = UnixStream::pair().context("signals cannot be taken")?;
    for signal in [SIGTERM, SIGINT, SIGHUP] {
        pipe::register(signal, end.try_clone()?).context("signals cannot be taken")?;
    }
    let mut terminal = Terminal::take().context("the terminal cannot be set up; try `xenfold top --once`")?;
    let mut now = Ok(first);
    loop {
        let lines = match &now {
            Ok(overview) => table(overview, width().unwrap_or(usize::MAX)),
            Err(error) => vec![format!("xenfold top: {error:#}"), "q ends".into()],
        };
        terminal.draw(&lines)?;
        if is_ended(&mut terminal, &ended, Instant::now() + EVERY)? {
            return Ok(());
        }
        // A daemon that is started again is found again.
        now = overview(asking);
    }
}

/// Waits until `until`. True: a key or a signal says that this is all.
fn is_ended(terminal: &mut Terminal, ended: &UnixStream, until: Instant) -> Result<bool> {
    loop {
        let left = until.saturating_duration_since(Instant::now());
        let timeout = Timespec::try_from(left).unwrap_or(Timespec { tv_sec: 1, tv_nsec: 0 });
        let stdin = stdin();
        let mut ready = [PollFd::new(&stdin, PollFlags::IN), PollFd::new(ended, PollFlags::IN)];
        match poll(&mut ready, Some(&timeout)) {
            Err(Errno::INTR) => continue,
            Err(error) => return Err(error.into()),
            Ok(0) => return Ok(false),
            Ok(_) => {}
        }
        let [typed, stopped] = &ready;
        if !stopped.revents().is_empty() {
            return Ok(true);
        }
        if !typed.revents().is_empty() {
            // No keys where some were told of: the terminal is gone.
            let keys = terminal.keys()?;
            if keys.is_empty() || keys.iter().any(|key| ENDING_KEYS.contains(key)) {
                return Ok(true);
            }
        }
    }
}
