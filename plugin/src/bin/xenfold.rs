//! The `xenfold` command.
#![forbid(unsafe_code)]

use std::path::Path;
use std::process::exit;

use anyhow::Result;
use clap::{Parser, Subcommand};
use xenfold::config::{self, Config};
use xenfold_plugin::{
    daemon_commands, dedup, doctor, following, job, receive, replay, resume, say, simulate, top, trace,
};

#[derive(Parser)]
#[command(name = "xenfold", version = xenfold::VERSION, about = "Live migration on Xen that sends each distinct page once")]
struct Arguments {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Receive a guest: what xenfold-ssh starts on the other host.
    Receive(receive::Arguments),
    /// Set a guest going again that a broken migration left suspended here.
    Resume(resume::Arguments),
    /// Send the pages that a guest lacks on its new host, when xenfold-ssh was killed while they followed it.
    Follow(following::Arguments),
    /// End a migration under way; the guest runs on here.
    Abort(job::AbortArguments),
    /// How far a migration under way is.
    Jobinfo(job::InfoArguments),
    #[command(hide = true)]
    GuestState(resume::StateArguments),
    /// What this host, and another one, can do, and what is missing.
    Doctor(doctor::Arguments),
    /// How the daemon of this host is.
    Status(daemon_commands::StatusArguments),
    /// Contents of running guests that the daemon knows.
    Index(daemon_commands::IndexArguments),
    /// Memory that guests of this host share.
    Dedup(dedup::Arguments),
    /// Guests, memory and migrations of this host, once a second; q ends it.
    Top(top::Arguments),
    /// Contents that the daemon keeps.
    Store(daemon_commands::StoreArguments),
    /// Images whose contents stay.
    Template(daemon_commands::TemplateArguments),
    /// Carry a saved guest through both engines and compare with plain copy, zstd and lz4.
    ///
    /// The seconds of each mode count from the first byte of the stream, when both sides are ready, until both have closed
    /// the link; what they took to get ready is the column `setup`. In a migration that goes by while ssh connects and xl
    /// starts on the other host. Memory for what comes out is there before, as a guest's is Xen's to give.
    Replay(replay::Arguments),
    /// Record which pages a running guest writes.
    Trace(trace::Arguments),
    /// Compare policies over recorded or made-up traces of writes.
    Simulate(simulate::Arguments),
    #[command(hide = true)]
    ReplaySide(replay::SideArguments),
}

fn main() {
    xen_sys::keep_freed_memory();
    env_logger::Builder::from_env(env_logger::Env::default().default_filter_or("warn"))
        .format_timestamp_millis()
        .init();
    match run(Arguments::parse().command) {
        // Threads that wait for what does not come any more end with the process.
        Ok(status) => exit(status),
        Err(error) => {
            say!("xenfold: {error:#}");
            exit(if error.is::<replay::BadInput>() { 2 } else { 1 })
        }
    }
}

fn run(command: Command) -> Result<i32> {
    match command {
        Command::Receive(arguments) => receive::run(&arguments, &configuration()?),
        Command::Resume(arguments) => resume::run(&arguments, &configuration()?).map(|()| 0),
        Command::Follow(arguments) => following::run(&arguments, &configuration()?),
        Command::Abort(arguments) => job::abort(&arguments).map(|()| 0),
        Command::Jobinfo(arguments) => job::info(&arguments).map(|()| 0),
        Command::GuestState(arguments) => resume::print_state(&arguments).map(|()| 0),
        Command::Doctor(arguments) => doctor::run(&arguments, &configuration()?),
        Command::Status(arguments) => daemon_commands::status(&arguments).map(|()| 0),
        Command::Index(arguments) => daemon_commands::index(&arguments).map(|()| 0),
        Command::Dedup(arguments) => dedup::run(&arguments).map(|()| 0),
        Command::Top(arguments) => top::run(&arguments).map(|()| 0),
        Command::Store(arguments) => daemon_commands::store(&arguments).map(|()| 0),
        Command::Template(arguments) => daemon_commands::template(&arguments).map(|()| 0),
        Command::Replay(arguments) => replay::run(&arguments).map(i32::from),
        Command::Trace(arguments) => trace::run(&arguments).map(|()| 0),
        Command::Simulate(arguments) => simulate::run(&arguments).map(|()| 0),
        Command::ReplaySide(arguments) => replay::run_side(&arguments).map(|()| 0),
    }
}

fn configuration() -> Result<Config> {
    Ok(config::read(Path::new(config::PATH))?)
}
