//! xenfoldd, the dom0 service.
#![forbid(unsafe_code)]

use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::Arc;
use std::thread::JoinHandle;

use anyhow::{Context, Result};
use clap::Parser;
use rustix::fs::Mode;
use signal_hook::consts::{SIGINT, SIGTERM};
use signal_hook::low_level::pipe;
use xenfold::{config, control};
use xenfoldd::daemon::Daemon;
use xenfoldd::socket::Socket;
use xenfoldd::{forsaken, metrics, server};

#[derive(Parser)]
#[command(name = "xenfoldd", version = xenfold::VERSION, about = "Keeps contents of guests across migrations")]
struct Arguments {
    /// The configuration.
    #[arg(long, value_name = "FILE", default_value = config::PATH)]
    config: PathBuf,
    /// Where contents and keys are kept, instead of `store` in the configuration.
    #[arg(long, value_name = "DIR")]
    state: Option<PathBuf>,
    /// Where to listen.
    #[arg(long, value_name = "PATH", default_value = control::SOCKET)]
    socket: PathBuf,
}

fn main() -> ExitCode {
    env_logger::Builder::from_env(env_logger::Env::default().default_filter_or("info"))
        .format_timestamp_millis()
        .init();
    match run(&Arguments::parse()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("xenfoldd: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(arguments: &Arguments) -> Result<()> {
    // Memory of guests and keys to it: whatever is made here is root's alone.
    rustix::process::umask(Mode::RWXG | Mode::RWXO);
    let config = config::read(&arguments.config)?;

    // Signals first, so that one during the start is not lost.
    let (stop, stopped) = UnixStream::pair().context("signals cannot be taken")?;
    for signal in [SIGTERM, SIGINT] {
        pipe::register(signal, stop.try_clone()?).context("signals cannot be taken")?;
    }
    // The socket before the store: its lock tells of another daemon before that one's store is in the way.
    // Declared before it too, hence dropped behind it: no other daemon starts before the store is closed.
    let socket = Socket::listen(&arguments.socket)?;
    let state: &Path = arguments.state.as_deref().unwrap_or(&config.store);
    let daemon = Arc::new(Daemon::open(&config, state));
    if xen_sys::running_version().is_none() {
        log::warn!("there is no Xen here: contents are kept and answered for, nothing else");
    }
    log::info!("listening on {}", arguments.socket.display());
    // The agents have their records beside the socket.
    let records = arguments.socket.parent().unwrap_or(Path::new("/"));
    let telling = match &config.metrics {
        Some(path) => metrics::start(&daemon, path, records, stopped.try_clone()?.into()),
        None => None,
    };
    let watching = forsaken::start(records, stopped.try_clone()?.into());
    sd_notify::notify(&[sd_notify::NotifyState::Ready]).context("systemd cannot be told")?;

    server::serve(&daemon, &socket, &stopped).context("callers cannot be waited for")?;
    // It has been told to end as well, and removes its socket.
    drop(telling.map(JoinHandle::join));
    drop(watching.map(JoinHandle::join));
    log::info!("stopped");
    Ok(())
}
