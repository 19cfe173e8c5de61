//! The command line of `xenfold-ssh`: ssh's own options, ours among them, the host, the command.
use std::path::PathBuf;
use std::time::Duration;

use thiserror::Error;
use xenfold::config::{Config, MAX_DOWNTIME_MS, MAX_ITERATIONS, MAX_TIME_S, Size};
use xenfold::late::Mode;

/// ssh's options that take a value (ssh(1), OpenSSH 9).
const SSH_OPTIONS_WITH_VALUE: &str = "BbcDEeFIiJLlmOoPpQRSWw";

pub const USAGE: &str = "\
usage: xl migrate -s xenfold-ssh GUEST HOST
       xl migrate -s 'xenfold-ssh [OPTIONS] [ssh's options]' GUEST HOST

  --verify         read every frame of the rebuilt guest back before it may start
  --no-fallback    fail when the other host has no xenfold, instead of sending as plain xl does
  --stats FILE     write all figures of the migration to FILE as JSON
  --timeout SECONDS  silence after which the other host is given up (15)
  --bandwidth MIB  MiB a second that the migration may take of the link (0: all it can get)
  --balloon MIB    before it is migrated the guest gives up memory that it does not use, but stays at least so large; it has
                   its size back afterwards (0: it keeps its size)
  --downtime-limit MS  how long the pages that are left when the guest is suspended may take (300); what its devices and
                   --verify take comes on top. What happens when it would be longer is on_no_convergence in the
                   configuration: go-on (the summary says so), or abort
  --max-iterations N  rounds for which xl is held after its passes, while they lower the downtime: pages that stay go ahead (30;
                   0: it is never held)
  --max-time SECONDS  how long after xl has begun to send it may still be held by that (0: no limit)
  --mode MODE      when the guest starts on the other host: precopy (when all of its memory is there), hybrid (its memory is
                   sent while it runs, what is missing when it is suspended follows), postcopy (nearly all follows)
  --no-hold        send every page of each pass, also those that will be written again
  --no-dedup       send every page that is not zero, also those whose content has been sent or is there, to compare
  --quiet          no lines of progress, no summary
  --version, --help

/etc/xen/xenfold.conf sets the same for every migration: verify, fallback, stats, timeout,
downtime_limit, on_no_convergence, max_iterations, max_time, bandwidth, balloon, hold, model_seconds, mode, dedup, quiet, ssh.";

/// Why a command line cannot be followed.
#[derive(Debug, Error, PartialEq, Eq)]
pub enum ArgumentError {
    #[error("{0} needs a value")]
    ValueMissing(String),
    #[error("{option} takes a number from {least} to {most}, not `{value}`")]
    BadNumber {
        option: String,
        value: String,
        least: u32,
        most: u32,
    },
    #[error("--mode takes precopy, hybrid or postcopy, not `{0}`")]
    BadMode(String),
    #[error("no host and command: xenfold-ssh is called by `xl migrate -s xenfold-ssh GUEST HOST`")]
    NoCommand,
    #[error("unknown option {0}")]
    Unknown(String),
}

/// What one migration is to be done with.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Arguments {
    pub config: Config,
    /// Options for ssh, as they came.
    pub ssh: Vec<String>,
    pub host: String,
    /// The command for the other host: `xl migrate-receive` with its options.
    pub command: Vec<String>,
}

/// What to do.
#[derive(Debug, PartialEq, Eq)]
pub enum Action {
    Migrate(Box<Arguments>),
    Help,
    Version,
}

/// Reads the arguments behind the program's name. Options before the host are ours when they begin with `--`.
pub fn parse(config: Config, arguments: impl IntoIterator<Item = String>) -> Result<Action, ArgumentError> {
    let mut parsed = Arguments {
        config,
        ..Arguments::default()
    };
    let mut rest = arguments.into_iter();
    while let Some(argument) = rest.next() {
        let mut value = || rest.next().ok_or_else(|| ArgumentError::ValueMissing(argument.clone()));
        match argument.as_str() {
            "--help" => return Ok(Action::Help),
            "--version" => return Ok(Action::Version),
            "--verify" => parsed.config.verify = true,
            "--no-fallback" => parsed.config.fallback = false,
            "--no-hold" => parsed.config.hold = false,
            "--no-dedup" => parsed.config.dedup = false,
            "--quiet" => parsed.config.quiet = true,
            "--stats" => parsed.config.stats = Some(PathBuf::from(value()?)),
            "--timeout" => parsed.config.timeout = number(&argument, value()?, 3600)?,
            "--downtime-limit" => parsed.config.downtime_limit = number(&argument, value()?, MAX_DOWNTIME_MS)?,
            "--max-iterations" => parsed.config.max_iterations = number_from(0, &argument, value()?, MAX_ITERATIONS)?,
            "--max-time" => parsed.config.max_time = number_from(0, &argument, value()?, MAX_TIME_S)?,
            "--mode" => {
                let name = value()?;
                parsed.config.mode = Mode::named(&name).ok_or(ArgumentError::BadMode(name))?;
            }
            "--bandwidth" => {
                let mib = number_from(0, &argument, value()?, MAX_BANDWIDTH_MIB)?;
                parsed.config.bandwidth = Size::new(u64::from(mib) << 20);
            }
            "--balloon" => {
                let mib = number_from(0, &argument, value()?, MAX_BALLOON_MIB)?;
                parsed.config.balloon = Size::new(u64::from(mib) << 20);
            }
            "--" => {}
            long if long.starts_with("--") => return Err(ArgumentError::Unknown(argument)),
            short if short.starts_with('-') && short.len() > 1 => {
                let takes_value = short
                    .chars()
                    .nth(1)
                    .is_some_and(|option| SSH_OPTIONS_WITH_VALUE.contains(option));
                let separate = takes_value && short.len() == 2;
                let extra = if separate { Some(value()?) } else { None };
                parsed.ssh.push(argument);
                parsed.ssh.extend(extra);
            }
            _ => {
                parsed.host = argument;
                parsed.command = rest.collect();
                break;
            }
        }
    }
    if parsed.host.is_empty() || parsed.command.is_empty() {
        return Err(ArgumentError::NoCommand);
    }
    Ok(Action::Migrate(Box::new(parsed)))
}

/// A terabyte a second: more is a mistake.
const MAX_BANDWIDTH_MIB: u32 = 1 << 20;

/// Sixteen terabytes are more than a guest of Xen's can have.
const MAX_BALLOON_MIB: u32 = 16 << 20;

/// A value from 1 to `most`.
fn number(option: &str, value: String, most: u32) -> Result<u32, ArgumentError> {
    number_from(1, option, value, most)
}

fn number_from(least: u32, option: &str, value: String, most: u32) -> Result<u32, ArgumentError> {
    let number = value.parse().ok().filter(|number| (least..=most).contains(number));
    number.ok_or_else(|| ArgumentError::BadNumber {
        option: option.into(),
        value,
        least,
        most,
    })
}

impl Arguments {
    pub fn timeout(&self) -> Duration {
        Duration::from_secs(self.config.timeout.into())
    }

    /// Remus and COLO speak the stream in both directions: they are carried plain.
    pub fn is_checkpointed(&self) -> bool {
        let mut options = self
            .command
            .iter()
            .skip_while(|word| *word != "migrate-receive")
            .skip(1);
        options.any(|word| {
            let short = word.starts_with('-') && !word.starts_with("--");
            word.starts_with("--colo") || word.starts_with("--userspace-colo") || (short && word.contains('r'))
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn migrate(line: &str) -> Arguments {
        match parse(Config::default(), line.split_whitespace().map(str::to_owned)) {
            Ok(Action::Migrate(arguments)) => *arguments,
            other => panic!("{line}: {other:?}"),
        }
    }

    #[test]
    fn options_of_ssh_and_ours_are_told_apart() {
        let parsed = migrate("--verify -p 2222 -oPort=1 -4 --stats /tmp/s -i key host xl migrate-receive -e");
        assert_eq!(parsed.ssh, ["-p", "2222", "-oPort=1", "-4", "-i", "key"]);
        assert_eq!(
            (parsed.host.as_str(), parsed.command.join(" ").as_str()),
            ("host", "xl migrate-receive -e")
        );
        assert!(parsed.config.verify && parsed.config.fallback && !parsed.is_checkpointed());
        assert_eq!(parsed.config.stats, Some(PathBuf::from("/tmp/s")));
    }

    #[test]
    fn checkpointed_streams_are_known() {
        for (line, checkpointed) in [
            ("h xl migrate-receive", false),
            ("h xl -vvv migrate-receive -e -p", false),
            ("h xl migrate-receive -r", true),
            ("h xl migrate-receive --colo --userspace-colo-proxy", true),
        ] {
            assert_eq!(migrate(line).is_checkpointed(), checkpointed, "{line}");
        }
    }

    #[test]
    fn wrong_lines_are_explained() {
        let error = |line: &str| parse(Config::default(), line.split_whitespace().map(str::to_owned)).unwrap_err();
        assert_eq!(error(""), ArgumentError::NoCommand);
        assert_eq!(error("host"), ArgumentError::NoCommand);
        assert_eq!(error("--verfy host xl"), ArgumentError::Unknown("--verfy".into()));
        assert_eq!(error("-p"), ArgumentError::ValueMissing("-p".into()));
        assert_eq!(error("--mode live h xl"), ArgumentError::BadMode("live".into()));
        assert_eq!(migrate("--mode hybrid h xl").config.mode, Mode::Hybrid);
        let held = migrate("--max-iterations 0 --max-time 60 h xl").config;
        assert_eq!((held.max_iterations, held.max_time), (0, 60));
        assert!(error("--max-iterations 10001 h xl").to_string().contains("0 to 10000"));
        assert!(error("--max-time 86401 h xl").to_string().contains("0 to 86400"));
        assert_eq!(migrate("--balloon 128 h xl").config.balloon, Size::new(128 << 20));
        let limited = Config {
            max_time: 60,
            bandwidth: Size::new(1 << 20),
            balloon: Size::new(1 << 20),
            ..Config::default()
        };
        let words = "--max-time 0 --bandwidth 0 --balloon 0 h xl".split_whitespace();
        match parse(limited, words.map(str::to_owned)) {
            Ok(Action::Migrate(none)) => assert_eq!(none.config, Config::default()),
            other => panic!("{other:?}"),
        }
        assert!(error("--timeout 0 h xl").to_string().contains("1 to 3600"));
    }
}
