//! `xenfold replay FILE`: a recorded `xl save` through both engines, over a link of a given rate, beside plain copy,
//! `zstd -1` and `lz4` over the same link.
//!
//! Each side is a process of its own ([`side`]), so that processor time and memory are its own; this process is the
//! link between them ([`link`]) and compares what came out with the file. The clock of every mode begins when both sides
//! are ready ([`gate`]) and ends when both have closed the link.
mod base;
mod gate;
mod link;
mod side;

use std::fs::File;
use std::io::{self, Read, Seek};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use rustix::fs::{MemfdFlags, memfd_create};
use serde::{Deserialize, Serialize};
use xenfold::report::Figures;
use xenfold::stream::{Event, Reader};

use self::gate::Starter;

pub use link::Rate;
pub use side::{Role, SideArguments, run_side};

#[derive(Debug, clap::Args)]
pub struct Arguments {
    /// A guest as `xl save` wrote it.
    file: PathBuf,
    /// Rates of the link, of: none, 100mbit, 1gbit, 10gbit, or any NUMBERmbit or NUMBERgbit; several with commas.
    #[arg(long, value_delimiter = ',', default_value = "1gbit")]
    link: Vec<Rate>,
    /// What to carry the file with; several with commas.
    #[arg(long, value_delimiter = ',', default_value = "xenfold,plain,zstd-1,lz4")]
    mode: Vec<Mode>,
    /// Times that every mode is run, in turn; the figures are medians.
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..=100))]
    repeat: u32,
    /// Measure sender and receiver one after the other, where the processors are too few for both at once.
    #[arg(long)]
    apart: bool,
    /// An earlier save of the guest that both hosts hold: what a return trip would cost. With `xenfold` only.
    #[arg(long, value_name = "OLD")]
    base: Option<PathBuf>,
    /// Write the figures to this file as JSON.
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum, Serialize, Deserialize)]
pub enum Mode {
    #[serde(rename = "xenfold")]
    Xenfold,
    #[serde(rename = "plain")]
    Plain,
    #[serde(rename = "zstd-1")]
    #[value(name = "zstd-1")]
    Zstd1,
    #[serde(rename = "lz4")]
    Lz4,
}

impl Mode {
    fn name(self) -> &'static str {
        match self {
            Mode::Xenfold => "xenfold",
            Mode::Plain => "plain",
            Mode::Zstd1 => "zstd-1",
            Mode::Lz4 => "lz4",
        }
    }
}

/// What one side tells at its end.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct SideFigures {
    pub cpu_ms: u64,
    pub peak_rss_bytes: u64,
    /// Xenfold's sender only.
    pub figures: Option<Figures>,
}

/// One line of the result.
#[derive(Clone, Debug, Serialize)]
struct Run {
    mode: Mode,
    link: String,
    /// "both", or the side measured with `--apart`.
    measured: &'static str,
    file_bytes: u64,
    wire_bytes: u64,
    /// Until both sides were ready, and from the stream's first byte until both had closed the link.
    setup_time_ms: u64,
    time_elapsed_ms: u64,
    /// Beside plain over the same link, the medians of interleaved runs.
    time_to_plain: Option<f64>,
    logical_mb_per_s: f64,
    sender_cpu_ms: u64,
    receiver_cpu_ms: u64,
    sender_peak_rss_bytes: u64,
    receiver_peak_rss_bytes: u64,
    #[serde(skip_serializing_if = "Option::is_none")]
    pages: Option<xenfold::report::Pages>,
    #[serde(skip_serializing_if = "Option::is_none")]
    blocks: Option<std::collections::BTreeMap<String, u64>>,
    equal: bool,
}

/// Runs the whole comparison. Returns the exit status: 0, or 1 when anything came out different. Errors: the file is
/// not a saved guest (the caller exits with 2), or the replay itself could not be done.
pub fn run(arguments: &Arguments) -> Result<u8> {
    let file_bytes = check(&arguments.file)?;
    let base = arguments.base.as_deref().map(index_base).transpose()?;
    let mut runs = Vec::new();
    for rate in &arguments.link {
        let sides: &[Measured] = if arguments.apart {
            &[Measured::Sender, Measured::Receiver]
        } else {
            &[Measured::Both]
        };
        for measured in sides {
            let mut rounds: Vec<Vec<Run>> = vec![Vec::new(); arguments.mode.len()];
            for round in 0..arguments.repeat {
                for (mode, done) in arguments.mode.iter().zip(&mut rounds) {
                    eprintln!(
                        "replay: {} over {rate}, {} ({} of {})",
                        mode.name(),
                        measured.name(),
                        round + 1,
                        arguments.repeat
                    );
                    let case = Case {
                        arguments,
                        base: base.as_ref(),
                        mode: *mode,
                        rate: *rate,
                        measured: *measured,
                    };
                    done.push(one_run(case, file_bytes)?);
                }
            }
            runs.extend(rounds.into_iter().filter_map(median));
            set_ratios(&mut runs, &rate.to_string(), measured.name());
        }
    }
    print(&runs);
    if let Some(path) = &arguments.json {
        let json = serde_json::to_vec_pretty(&serde_json::json!({ "runs": runs }))?;
        std::fs::write(path, json).with_context(|| format!("{} cannot be written", path.display()))?;
    }
    Ok(u8::from(runs.iter().any(|run| !run.equal)))
}

/// The error of a file that is not what it has to be.
#[derive(Debug)]
pub enum BadInput {
    Save,
    Trace,
}

impl std::fmt::Display for BadInput {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            BadInput::Save => "the file is not a guest that `xl save` wrote",
            BadInput::Trace => "the file is not a trace that `xenfold trace` wrote",
        })
    }
}

/// Reads the file once: a whole stream and nothing else. Returns its size in bytes.
fn check(path: &PathBuf) -> Result<u64> {
    let file = File::open(path)
        .with_context(|| format!("{} cannot be opened", path.display()))
        .context(BadInput::Save)?;
    let mut stream = Reader::new(io::BufReader::with_capacity(1 << 20, file));
    let mut part = vec![0; 1 << 20];
    let mut walk = || -> Result<u64> {
        while !matches!(stream.next()?, Event::End) {
            while stream.body_left() > 0 {
                stream.read_body_part(&mut part)?;
            }
        }
        let offset = stream.offset();
        let rest = io::copy(stream.get_mut(), &mut io::sink())?;
        ensure!(
            rest == 0,
            "{rest} bytes follow the end of the stream at offset {offset}"
        );
        Ok(offset)
    };
    walk()
        .with_context(|| path.display().to_string())
        .context(BadInput::Save)
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Measured {
    Both,
    Sender,
    Receiver,
}

impl Measured {
    fn name(self) -> &'static str {
        match self {
            Measured::Both => "both",
            Measured::Sender => "sender",
            Measured::Receiver => "receiver",
        }
    }
}

/// One case of what the user asked for, with the index of the base.
#[derive(Clone, Copy)]
struct Case<'a> {
    arguments: &'a Arguments,
    base: Option<&'a tempfile::NamedTempFile>,
    mode: Mode,
    rate: Rate,
    measured: Measured,
}

/// The base is read and hashed once, before anything is measured: stores know their contents.
fn index_base(save: &Path) -> Result<tempfile::NamedTempFile> {
    let mut index = tempfile::NamedTempFile::new()?;
    let mut writer = io::BufWriter::new(index.as_file_mut());
    base::write_index(save, &side::key(), &mut writer)
        .with_context(|| save.display().to_string())
        .context(BadInput::Save)?;
    io::Write::flush(&mut writer)?;
    drop(writer);
    Ok(index)
}

/// The processes of a run and the pipes to them.
struct Side {
    child: Child,
    starter: Option<Starter>,
    figures: tempfile::NamedTempFile,
}

impl Side {
    fn start(case: Case<'_>, role: Role, output: Option<&File>) -> Result<Side> {
        let Case { arguments, base, .. } = case;
        let figures = tempfile::NamedTempFile::new()?;
        let mut command = Command::new("/proc/self/exe");
        command
            .arg("replay-side")
            .arg(role.name())
            .arg(case.mode.name())
            .arg(&arguments.file)
            .arg(figures.path());
        if let Some(output) = output {
            command.arg(format!(
                "/proc/{}/fd/{}",
                std::process::id(),
                std::os::fd::AsRawFd::as_raw_fd(output)
            ));
        }
        if let (Some(save), Some(index)) = (&arguments.base, base) {
            command.arg("--base").arg(save).arg("--base-index").arg(index.path());
        }
        command.arg("--rate").arg(case.rate.to_string());
        let (starter, inherited) = gate::gate()?;
        command.args(inherited.arguments());
        let child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn()?;
        Ok(Side {
            child,
            starter: Some(starter),
            figures,
        })
    }

    fn starter(&mut self) -> Result<Starter> {
        self.starter.take().context("a side of the replay begins once")
    }

    fn finish(mut self) -> Result<SideFigures> {
        let status = self.child.wait()?;
        ensure!(status.success(), "a side of the replay ended with {status}");
        let mut text = String::new();
        self.figures.as_file_mut().rewind()?;
        self.figures.as_file_mut().read_to_string(&mut text)?;
        serde_json::from_str(&text).context("a side of the replay left no figures")
    }
}

fn one_run(case: Case<'_>, file_bytes: u64) -> Result<Run> {
    let Case {
        mode, rate, measured, ..
    } = case;
    let output = File::from(memfd_create("xenfold-replay", MemfdFlags::CLOEXEC)?);
    reserve(&output, file_bytes)?;
    // Apart, the receiver is fed what a sender produced over the same link before.
    let recorded = File::from(memfd_create("xenfold-wire", MemfdFlags::CLOEXEC)?);
    let start = Instant::now();
    let (carried, sender, receiver);
    match measured {
        Measured::Both => {
            let mut to = Side::start(case, Role::Receive, Some(&output))?;
            let mut from = Side::start(case, Role::Send, None)?;
            carried = link::between(start, &mut from, &mut to, rate, None)?;
            receiver = to.finish()?;
            sender = from.finish()?;
        }
        Measured::Sender => {
            let mut from = Side::start(case, Role::SendAlone, None)?;
            carried = link::to_nowhere(start, &mut from, rate)?;
            sender = from.finish()?;
            receiver = SideFigures::default();
        }
        Measured::Receiver => {
            reserve(&recorded, file_bytes)?;
            sender = record(case, &output, &recorded)?;
            rustix::fs::ftruncate(&output, 0)?;
            reserve(&output, file_bytes)?;
            let start = Instant::now();
            let mut to = Side::start(case, Role::Receive, Some(&output))?;
            carried = link::Carried {
                bytes: recorded.metadata()?.len(),
                ..link::from_recording(start, &recorded, &mut to, rate, mode == Mode::Xenfold)?
            };
            receiver = to.finish()?;
        }
    }
    let equal = measured == Measured::Sender || same(&case.arguments.file, &output)?;
    Ok(Run {
        mode,
        link: rate.to_string(),
        measured: measured.name(),
        file_bytes,
        wire_bytes: carried.bytes,
        setup_time_ms: carried.setup.as_millis() as u64,
        time_elapsed_ms: carried.elapsed.as_millis() as u64,
        time_to_plain: None,
        logical_mb_per_s: file_bytes as f64 / 1e6 / carried.elapsed.as_secs_f64(),
        sender_cpu_ms: sender.cpu_ms,
        receiver_cpu_ms: receiver.cpu_ms,
        sender_peak_rss_bytes: sender.peak_rss_bytes,
        receiver_peak_rss_bytes: receiver.peak_rss_bytes,
        pages: sender.figures.as_ref().map(|figures| figures.pages),
        blocks: sender.figures.map(|figures| figures.blocks),
        equal,
    })
}

/// What a sender that has its machine for itself puts on the link: it writes to the recording itself, since whoever carried
/// it there would take processor time from it, and it would compress otherwise. What it may leave out because the receiver
/// holds it takes a receiver's answers, so with a base there is one beside it.
fn record(case: Case<'_>, output: &File, recorded: &File) -> Result<SideFigures> {
    if case.base.is_none() {
        let mut from = Side::start(case, Role::Record, Some(recorded))?;
        link::to_recording(&mut from)?;
        return from.finish();
    }
    let mut to = Side::start(case, Role::Receive, Some(output))?;
    let mut from = Side::start(case, Role::Send, None)?;
    link::between(Instant::now(), &mut from, &mut to, case.rate, Some(recorded))?;
    to.finish()?;
    from.finish()
}

/// Takes the output's memory before anything is measured: the memory of a guest comes from Xen, not from faults of who
/// writes it. The output is as long as what is written to it.
fn reserve(output: &File, bytes: u64) -> Result<()> {
    rustix::fs::fallocate(output, rustix::fs::FallocateFlags::KEEP_SIZE, 0, bytes)
        .context("there is no memory for what comes out")
}

/// Compares the two byte for byte and says where they differ.
fn same(path: &PathBuf, output: &File) -> Result<bool> {
    let mut output = output;
    output.rewind()?;
    let (mut a, mut b) = (vec![0; 1 << 20], vec![0; 1 << 20]);
    let mut file = File::open(path)?;
    let mut offset = 0;
    loop {
        let n = file.read(&mut a)?;
        let wanted = a.get(..n).unwrap_or_default();
        let got = b.get_mut(..n).unwrap_or_default();
        if let Err(error) = output.read_exact(got) {
            if error.kind() != io::ErrorKind::UnexpectedEof {
                bail!(error);
            }
            eprintln!("replay: what came out ends before offset {}", offset + n);
            return Ok(false);
        }
        if let Some(at) = wanted.iter().zip(got.iter()).position(|(a, b)| a != b) {
            eprintln!("replay: what came out differs from the file at offset {}", offset + at);
            return Ok(false);
        }
        if n == 0 {
            let more = output.read(&mut b)?;
            if more > 0 {
                eprintln!("replay: what came out goes on behind the file's end at offset {offset}");
            }
            return Ok(more == 0);
        }
        offset += n;
    }
}

/// The run of median time; it differs if any did.
fn median(mut runs: Vec<Run>) -> Option<Run> {
    let equal = runs.iter().all(|run| run.equal);
    runs.sort_by_key(|run| run.time_elapsed_ms);
    let middle = runs.len() / 2;
    let run = runs.into_iter().nth(middle)?;
    Some(Run { equal, ..run })
}

fn set_ratios(runs: &mut [Run], link: &str, measured: &str) {
    let same = |run: &&mut Run| run.link == link && run.measured == measured;
    let plain = runs
        .iter_mut()
        .find(|run| same(run) && run.mode == Mode::Plain)
        .map(|run| run.time_elapsed_ms);
    for run in runs.iter_mut().filter(same) {
        run.time_to_plain = plain.map(|plain| run.time_elapsed_ms as f64 / plain.max(1) as f64);
    }
}

fn print(runs: &[Run]) {
    println!(
        "{:<8} {:>8} {:>9} {:>12} {:>7} {:>6} {:>8} {:>8} {:>9} {:>9} {:>9} {:>9} {:>8}  result",
        "mode",
        "link",
        "measured",
        "wire bytes",
        "of file",
        "setup",
        "seconds",
        "to plain",
        "MB/s",
        "send cpu",
        "recv cpu",
        "send MiB",
        "recv MiB"
    );
    for run in runs {
        println!(
            "{:<8} {:>8} {:>9} {:>12} {:>6.1}% {:>6.3} {:>8.3} {:>8} {:>9.0} {:>8.2}s {:>8.2}s {:>9.0} {:>8.0}  {}",
            run.mode.name(),
            run.link,
            run.measured,
            run.wire_bytes,
            100.0 * run.wire_bytes as f64 / run.file_bytes.max(1) as f64,
            Duration::from_millis(run.setup_time_ms).as_secs_f64(),
            Duration::from_millis(run.time_elapsed_ms).as_secs_f64(),
            run.time_to_plain
                .map_or_else(|| "-".to_owned(), |ratio| format!("{ratio:.3}")),
            run.logical_mb_per_s,
            run.sender_cpu_ms as f64 / 1e3,
            run.receiver_cpu_ms as f64 / 1e3,
            run.sender_peak_rss_bytes as f64 / f64::from(1 << 20),
            run.receiver_peak_rss_bytes as f64 / f64::from(1 << 20),
            match (run.equal, run.measured) {
                (false, _) => "DIFFERENT",
                // Nobody has rebuilt anything.
                (true, "sender") => "-",
                _ => "equal",
            },
        );
    }
    if let Some(pages) = runs.iter().find_map(|run| run.pages) {
        println!(
            "pages by kind: {} zero, {} references, {} known, {} deltas, {} full, {} without data",
            pages.zero, pages.reference, pages.known, pages.delta, pages.full, pages.absent
        );
    }
}
