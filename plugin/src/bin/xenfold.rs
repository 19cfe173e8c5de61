//! The `xenfold` command.
#![forbid(unsafe_code)]

use std::process::ExitCode;

use clap::{Parser, Subcommand};
use xenfold_plugin::replay;

#[derive(Parser)]
#[command(name = "xenfold", version = xenfold::VERSION, about = "Live migration on Xen that sends each distinct page once")]
struct Arguments {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Carry a saved guest through both engines and compare with plain copy, zstd and lz4.
    Replay(replay::Arguments),
    #[command(hide = true)]
    ReplaySide(replay::SideArguments),
}

fn main() -> ExitCode {
    env_logger::Builder::from_env(env_logger::Env::default().default_filter_or("warn")).format_timestamp_millis().init();
    let result = match Arguments::parse().command {
        Command::Replay(arguments) => replay::run(&arguments),
        Command::ReplaySide(arguments) => replay::run_side(&arguments).map(|()| 0),
    };
    match result {
        Ok(status) => ExitCode::from(status),
        Err(error) => {
            eprintln!("xenfold: {error:#}");
            ExitCode::from(if error.is::<replay::BadInput>() { 2 } else { 1 })
        }
    }
}
