//! One static program for both sides of the lab. In guests: `check`, `tick`, `write-loop`, `race`, whose
//! datagrams are broadcast on the guests' bridge. In dom0: `ticks` and `listen`, which receive them.

mod check;
mod net;
mod race;
mod tick;
mod write_loop;

use clap::{Parser, Subcommand};

#[derive(Parser)]
#[command(version, about = "Load and measurement for the lab's guests")]
struct Arguments {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Guest: fill memory with a known pattern and check it again for ever
    Check(check::Check),
    /// Guest: send a datagram every 10 ms
    Tick(tick::Tick),
    /// Guest: dirty pages at a steady pace
    WriteLoop(write_loop::WriteLoop),
    /// Guest: rewrite pages of few contents at random, looking at what was there
    Race(race::Race),
    /// dom0: receive a guest's ticks until stdin ends, then print what was lost as JSON
    Ticks(tick::Ticks),
    /// dom0: print the checkers' reports; 1 if one is bad, 3 if none came in time
    Listen(check::Listen),
}

fn main() -> anyhow::Result<std::process::ExitCode> {
    match Arguments::parse().command {
        Command::Check(check) => check.run(),
        Command::Tick(tick) => tick.run(),
        Command::WriteLoop(write_loop) => write_loop.run(),
        Command::Race(race) => race.run(),
        Command::Ticks(ticks) => ticks.run(),
        Command::Listen(listen) => listen.run(),
    }
}
