//! `xenfold simulate`: what strategies would have sent over dirty traces, recorded or made up, and how long the guest
//! would have stood still ([`xenfold::policy::simulate`]).
use std::fmt::Write as _;
use std::fs::File;
use std::io::BufReader;
use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context, Result};
use serde::Serialize;
use xenfold::page::PAGE_SIZE;
use xenfold::policy::RoundLimits;
use xenfold::policy::generate::{Kind, generate};
use xenfold::policy::simulate::{self, Conditions, Outcome, Strategy};
use xenfold::policy::trace::Trace;

use crate::replay::{BadInput, Rate};

#[derive(Debug, clap::Args)]
#[command(group(clap::ArgGroup::new("input").required(true).multiple(true).args(["traces", "generate"])))]
pub struct Arguments {
    /// Traces as `xenfold trace` wrote them.
    #[arg(value_name = "TRACE")]
    traces: Vec<PathBuf>,
    /// Make traces up, of: loop-20, loop-40, slow-loop-20, slow-loop-40, random, bursts, compile, idle; several with
    /// commas.
    #[arg(long, value_name = "KIND", value_delimiter = ',')]
    generate: Vec<Kind>,
    /// Rates of the link, of: 100mbit, 1gbit, or any NUMBERmbit or NUMBERgbit; several with commas.
    #[arg(long, value_delimiter = ',', default_value = "1gbit")]
    link: Vec<Rate>,
    /// Memory of a guest that is made up, in MiB.
    #[arg(long, value_name = "MIB", default_value_t = 1024, value_parser = clap::value_parser!(u64).range(1..=65536))]
    memory: u64,
    /// Seconds of a trace that is made up; one that is too short for a migration begins anew.
    #[arg(long, default_value_t = 60, value_parser = clap::value_parser!(u64).range(1..=3600))]
    seconds: u64,
    /// What chance begins with in traces that are made up.
    #[arg(long, default_value_t = 1)]
    seed: u64,
    /// Seconds for which the guest is watched before each migration; 0: not at all.
    #[arg(long, value_name = "SECONDS", default_value_t = 2, value_parser = clap::value_parser!(u64).range(0..=12))]
    model: u64,
    /// Milliseconds between two looks at the dirty pages; 100 for each GiB and at least 50 if not given. An emulated host needs
    /// some 1000.
    #[arg(long, value_name = "MS", value_parser = clap::value_parser!(u64).range(10..=60_000))]
    peek: Option<u64>,
    /// Rounds for which xenfold holds xl after its passes, while more than --downtime-limit is expected.
    #[arg(long, value_name = "N", default_value_t = 30)]
    max_iterations: u32,
    /// Milliseconds for which the guest may stand still.
    #[arg(long, value_name = "MS", default_value_t = 300)]
    downtime_limit: u64,
    /// The guest has been migrated before, at the beginning of the trace, and what that has shown is known. The migration
    /// begins in the trace's middle.
    #[arg(long)]
    known: bool,
    /// The daemon has seen which pages the guest wrote from the trace's beginning on. The migration begins in its middle.
    #[arg(long)]
    changing: bool,
    /// Write the figures to this file as JSON.
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
}

/// One line of the result.
#[derive(Debug, Serialize)]
struct Run {
    trace: String,
    link: String,
    strategy: Strategy,
    #[serde(flatten)]
    outcome: Outcome,
    /// Pages sent, in parts of the guest's.
    sent_to_guest: f64,
    /// Share of plain's repeats that were not sent.
    repeats_avoided: f64,
    /// Pages sent, and once more those sent while the guest stood still, above the clairvoyant's, in parts of the guest's.
    regret: f64,
}

/// Runs all strategies over all traces and prints a table. Errors: a file is no trace (the caller exits with 2).
pub fn run(arguments: &Arguments) -> Result<()> {
    let rates = arguments.link.iter().map(|rate| {
        let bytes = rate.bytes_a_second();
        bytes
            .map(|bytes| (rate.to_string(), bytes))
            .context("a link without a rate has no use here; give --link NUMBERmbit")
    });
    let rates = rates.collect::<Result<Vec<_>>>()?;
    let mut runs = Vec::new();
    println!("{}", heading());
    for source in sources(arguments) {
        let (name, trace) = source?;
        for (link, bytes_a_second) in &rates {
            let usual = Conditions::usual(*bytes_a_second, trace.guest_pages());
            let conditions = Conditions {
                model_time: Duration::from_secs(arguments.model),
                peek_every: arguments.peek.map_or(usual.peek_every, Duration::from_millis),
                rounds: RoundLimits {
                    rounds: arguments.max_iterations,
                    downtime: Duration::from_millis(arguments.downtime_limit),
                    ..usual.rounds
                },
                known: arguments.known,
                changing: arguments.changing,
                begins: trace.interval()
                    * (if arguments.known || arguments.changing {
                        trace.len() / 2
                    } else {
                        0
                    }) as u32,
                ..usual
            };
            for run in simulate(&name, link, &trace, &conditions) {
                println!("{}", line(&run));
                runs.push(run);
            }
        }
    }
    if let Some(path) = &arguments.json {
        let json = serde_json::to_vec_pretty(&serde_json::json!({ "runs": runs }))?;
        std::fs::write(path, json).with_context(|| format!("{} cannot be written", path.display()))?;
    }
    Ok(())
}

/// One trace after the other: each can be large.
fn sources(arguments: &Arguments) -> impl Iterator<Item = Result<(String, Trace)>> + '_ {
    let files = arguments.traces.iter().map(|path| {
        let name = path.display().to_string();
        let file = File::open(path).with_context(|| format!("{name} cannot be opened"));
        let read = file.and_then(|file| Trace::read(BufReader::new(file)).with_context(|| name.clone()));
        Ok((name, read.context(BadInput::Trace)?))
    });
    let made_up = arguments.generate.iter().map(|kind| {
        let pages = arguments.memory * (1 << 20) / PAGE_SIZE as u64;
        let trace = generate(*kind, pages, Duration::from_secs(arguments.seconds), arguments.seed)?;
        Ok((kind.to_string(), trace))
    });
    files.chain(made_up)
}

fn simulate(name: &str, link: &str, trace: &Trace, conditions: &Conditions) -> Vec<Run> {
    let outcomes = simulate::all(trace, conditions);
    let of = |wanted| {
        outcomes
            .iter()
            .find(|(strategy, _)| *strategy == wanted)
            .map(|(_, outcome)| *outcome)
    };
    let plain = of(Strategy::Plain).unwrap_or_default();
    let best = of(Strategy::Clairvoyant).unwrap_or_default();
    let to_run = |(strategy, outcome): &(Strategy, Outcome)| Run {
        trace: name.to_owned(),
        link: link.to_owned(),
        strategy: *strategy,
        outcome: *outcome,
        sent_to_guest: outcome.sent_pages as f64 / (outcome.guest_pages as f64).max(1.0),
        repeats_avoided: 1.0 - outcome.repeat_pages as f64 / (plain.repeat_pages as f64).max(1.0),
        regret: outcome.regret(&best),
    };
    outcomes.iter().map(to_run).collect()
}

fn heading() -> String {
    format!(
        "{:<14} {:>8} {:<12} {:>9} {:>9} {:>8} {:>8} {:>8} {:>8} {:>6} {:>7}",
        "trace", "link", "strategy", "sent", "repeats", "avoided", "seconds", "downtime", "stop", "passes", "regret"
    )
}

fn line(run: &Run) -> String {
    let outcome = &run.outcome;
    let mut line = format!("{:<14} {:>8} {:<12}", run.trace, run.link, run.strategy.name());
    let _ = write!(
        line,
        " {:>8.3}x {:>9} {:>7.1}% {:>8.2} {:>6}ms {:>8} {:>6} {:>6.1}%",
        run.sent_to_guest,
        outcome.repeat_pages,
        100.0 * run.repeats_avoided,
        Duration::from_millis(outcome.time_elapsed_ms).as_secs_f64(),
        outcome.downtime_ms,
        outcome.stop_pages,
        outcome.iteration,
        100.0 * run.regret,
    );
    line
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_that_is_no_trace_is_bad_input_with_its_place() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let trace = generate(Kind::Idle, 256, Duration::from_secs(1), 1).unwrap();
        let mut bytes = Vec::new();
        trace.write(&mut bytes).unwrap();
        bytes.truncate(100);
        std::fs::write(file.path(), &bytes).unwrap();
        let arguments = Arguments {
            max_iterations: 30,
            downtime_limit: 300,
            traces: vec![file.path().to_owned()],
            generate: vec![],
            link: vec!["1gbit".parse().unwrap()],
            memory: 1,
            seconds: 1,
            seed: 1,
            model: 2,
            peek: None,
            known: false,
            changing: false,
            json: None,
        };
        let error = run(&arguments).unwrap_err();
        assert!(error.is::<BadInput>());
        assert!(format!("{error:#}").contains("offset 100"), "{error:#}");
    }

    #[test]
    fn traces_are_judged_and_written_as_json() {
        let folder = tempfile::tempdir().unwrap();
        let (path, json) = (folder.path().join("trace"), folder.path().join("json"));
        let trace = generate(Kind::Loop(40), 4096, Duration::from_secs(6), 1).unwrap();
        trace.write(File::create(&path).unwrap()).unwrap();
        let arguments = Arguments {
            max_iterations: 30,
            downtime_limit: 300,
            traces: vec![path],
            generate: vec![Kind::Idle],
            link: vec!["100mbit".parse().unwrap(), "10mbit".parse().unwrap()],
            memory: 16,
            seconds: 5,
            seed: 1,
            model: 2,
            peek: None,
            known: false,
            changing: false,
            json: Some(json.clone()),
        };
        run(&arguments).unwrap();
        let text: serde_json::Value = serde_json::from_slice(&std::fs::read(json).unwrap()).unwrap();
        let runs = text["runs"].as_array().unwrap();
        assert_eq!(runs.len(), 2 * 2 * 5);
        assert_eq!(runs[0]["strategy"], "plain");
        assert!(runs.iter().all(|run| run["sent_pages"].as_u64().unwrap() >= 4096));
    }
}
