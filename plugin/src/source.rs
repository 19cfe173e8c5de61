//! `xenfold-ssh`: stands where xl expects ssh.
use std::fs::{self, File};
use std::io::{self, Read, Write};
use std::num::NonZeroU64;
use std::os::unix::process::{CommandExt, parent_id};
use std::path::Path;
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::Duration;

use anyhow::{Context, Result};
use crossbeam_channel::Sender;
use parking_lot::Mutex;
use rustix::io::fcntl_dupfd_cloexec;
use rustix::pipe::{fcntl_getpipe_size, fcntl_setpipe_size};
use xen_sys::{DomainInfo, Xenctrl};
use xenfold::config::NoConvergence;
use xenfold::control::{ControlError, SOCKET};
use xenfold::engine::source::{self, Ending, Event, Learnt, Left, Negotiated, SourceSetup};
use xenfold::engine::{
    Connect, Contents, DirtyLog, DowntimeLimit, EngineError, FrameSource, Holding, JournalFile, LateJournal,
    LeaveBehind, NOW_PAGES, SAMPLE, chain, printable,
};
use xenfold::late::Mode;
use xenfold::late::journal::Facts;
use xenfold::page::{ContentKey, PAGE_SIZE};
use xenfold::policy::{Forecast, Kept};
use xenfold::report::Figures;
use xenfold::wire::{Agreement, Hello, WireError};

use crate::arguments::Arguments;
use crate::balloon::Ballooning;
use crate::contents::DaemonContents;
use crate::guest::{AWAY, Guest, GuestFrames, INCOMING, KnownDomain};
use crate::process::{self, Helper};
use crate::progress::{Progress, summary};
use crate::record::{self, Record};
use crate::ssh::{self, COMMAND_NOT_FOUND, Ssh};
use crate::writes::GuestWrites;
use crate::{balloon, following, guest, may_follow, model, repair, signals, usage};

/// How often xl's children are looked at until its helper is there.
const HELPER_EVERY: Duration = Duration::from_millis(100);

/// How long the end of a process may take to be seen after its pipes have closed.
const DYING: Duration = Duration::from_millis(200);

/// How long ssh may take to end when everything has been said: the other host's xenfold may have contents to put away, and a
/// connection can die without a sign.
const AFTERWARDS: Duration = Duration::from_secs(60);

/// Room in the pipe from xl.
const PIPE_BYTES: usize = 256 << 10;

/// A pipe cannot be larger, unless its reader has CAP_SYS_RESOURCE and asks for it (2 GiB at most).
const MAX_PIPE_BYTES: u64 = 1 << 31;

/// The words in which the destination is called; xl's command follows.
const RECEIVE: [&str; 3] = ["xenfold", "receive", "--"];

/// The same when the connection was lost while pages followed the guest; the migration's name follows.
const REJOIN: [&str; 3] = ["xenfold", "receive", "--rejoin"];

/// Migrates, or carries plain. Returns the exit status: that of the command at the other end, 255 when the
/// connection failed, 1 otherwise.
pub fn run(arguments: &Arguments) -> Result<i32> {
    let ssh = ssh_words(arguments);
    if arguments.is_checkpointed() {
        return Err(plain(&ssh, arguments));
    }
    let xl = parent_id();
    let guest = guest::of_xl(xl).unwrap_or_else(|error| {
        log::warn!("the guest is not known, so it goes without what needs that: no page is held back, `xenfold abort` does not find it: {error:#}");
        None
    });
    if let Some(guest) = &guest
        && let missing @ 1.. = may_follow::still_late(guest)
    {
        say!(
            "xenfold: {missing} pages of guest {} have not come yet from where it was before: migrated now it would lose them. It is \
             untouched and runs on here; try again when they have come (`xenfold jobinfo {0}` shows how many are missing).",
            guest.name
        );
        return Ok(1);
    }
    let cannot_follow = may_follow::refusal(guest.as_ref(), &process::arguments(xl));
    let migration = hexadecimal(random::<16>()?);
    let record = match &guest {
        Some(guest) => Some(Record::take(guest, &arguments.host, ssh.clone(), &migration)?),
        None => None,
    };
    if let (Some(guest), Some(kib)) = (&guest, record.as_ref().and_then(Record::left_target))
        && let given_back = balloon::give_back_left(guest, kib)
        && given_back != Some(false)
    {
        // xl has read its configuration, with the small size, which it would have on the other host.
        if given_back.is_some() {
            record.into_iter().for_each(Record::close);
        }
        say!(
            "xenfold: guest {} is not migrated now, since it would stay small on {}. It runs on here; try again with the same \
             command.",
            guest.name,
            arguments.host
        );
        return Ok(1);
    }
    guest.iter().for_each(following::forget);
    let remote: Vec<String> = RECEIVE
        .map(str::to_owned)
        .into_iter()
        .chain(arguments.command.clone())
        .collect();
    // The daemon first: its answers may take a while, and the other host does not wait for ever.
    let (hello, contents) = hello(arguments, guest.as_ref())?;
    let hello = Hello {
        migration: migration.clone(),
        late: hello.late && cannot_follow.is_none(),
        early: guest.as_ref().filter(|_| hello.late).and_then(may_follow::early),
        rejoin_token: Some(hexadecimal(random::<16>()?)),
        ..hello
    };
    let (process, link) =
        ssh::start(&ssh, &arguments.host, &remote).context("ssh cannot be started; see `ssh` in the configuration")?;
    match source::negotiate(link, &hello, arguments.timeout()) {
        Ok(mut negotiated) => {
            if !arguments.config.dedup {
                negotiated.agreement.without_references();
            }
            let mut agent = Agent {
                arguments,
                guest,
                cannot_follow,
                contents,
                record: Arc::new(Mutex::new(record)),
                ballooning: Ballooning::default(),
                ssh,
                migration,
                process: Arc::new(Mutex::new(Some(process))),
                journal: None,
                xl,
            };
            let key = hello.key()?;
            let token = negotiated.agreement.rejoin.as_deref();
            agent.journal = token.and_then(|token| agent.journal(&key, token));
            agent.migrate(negotiated)
        }
        Err(error) => without_xenfold(arguments, &ssh, &process, record, error),
    }
}

fn ssh_words(arguments: &Arguments) -> Vec<String> {
    let mut words = ssh::words(&arguments.config.ssh);
    words.extend(arguments.ssh.iter().cloned());
    words
}

/// What we say of ourselves, and what this host holds for the guest. Without a daemon the key of content ids is for this
/// migration only.
fn hello(arguments: &Arguments, guest: Option<&Guest>) -> Result<(Hello, Option<Arc<dyn Contents>>)> {
    let hello = Hello {
        program: xenfold::VERSION.into(),
        verify: arguments.config.verify,
        late: arguments.config.mode.leaves_pages(),
        contents: arguments.config.dedup,
        late_known: true,
        timeout_s: arguments.config.timeout,
        guest_uuid: guest.map(|guest| guest.uuid.clone()).unwrap_or_default(),
        guest_name: guest.map(|guest| guest.name.clone()).unwrap_or_default(),
        ..Hello::default()
    };
    let held = guest.map(|guest| DaemonContents::open(Path::new(SOCKET), &guest.uuid, &guest.name, None));
    match held {
        Some(Ok((opened, contents))) => {
            let hello = Hello {
                group: opened.group,
                ..hello
            };
            let contents = contents.map(|contents| Arc::new(contents) as Arc<dyn Contents>);
            return Ok((hello.with_key(&opened.key), contents));
        }
        Some(Err(error @ ControlError::NotRunning { .. })) => log::debug!("{}", chain(&error)),
        Some(Err(error)) => log::warn!("the daemon is of no use, going on without it: {}", chain(&error)),
        None => {}
    }
    Ok((hello.with_key(&ContentKey::new(random()?)), None))
}

fn hexadecimal(bytes: [u8; 16]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

fn random<const BYTES: usize>() -> Result<[u8; BYTES]> {
    let mut bytes = [0; BYTES];
    File::open("/dev/urandom")
        .and_then(|mut random| random.read_exact(&mut bytes))
        .context("/dev/urandom cannot be read")?;
    Ok(bytes)
}

/// Becomes ssh with xl's own command: the stream goes as plain xl sends it. Returns only when that fails.
fn plain(ssh: &[String], arguments: &Arguments) -> anyhow::Error {
    let mut words = ssh.iter();
    let program = words.next().map_or("ssh", String::as_str);
    let error = Command::new(program)
        .args(words)
        .arg(&arguments.host)
        .args(&arguments.command)
        .exec();
    anyhow::Error::from(error).context(format!("{program} cannot be started"))
}

/// No xenfold answered. Nothing has been read from xl yet, so the stream can still go plain.
fn without_xenfold(
    arguments: &Arguments,
    ssh: &[String],
    process: &Ssh,
    record: Option<Record>,
    error: EngineError,
) -> Result<i32> {
    if let Some(record) = record {
        record.close();
    }
    let host = &arguments.host;
    let why = match error {
        EngineError::Wire(error @ (WireError::NoHello | WireError::NoCommonVersion { .. })) => error.to_string(),
        EngineError::Wire(WireError::Closed) => match process.wait() {
            status if COMMAND_NOT_FOUND.contains(&status) => "it has no xenfold".to_owned(),
            status => {
                say!(
                    "xenfold: the connection to {host} ended before anything was sent (status {status}). The guest is \
                     untouched and runs on here; try `ssh {host} xenfold --version`."
                );
                return Ok(status.max(1));
            }
        },
        error => {
            process.hang_up();
            say!(
                "xenfold: {host} does not answer as it should: {}. The guest is untouched and runs on here; try `ssh {host} xenfold \
                 doctor`.",
                chain(&error)
            );
            return Ok(1);
        }
    };
    process.hang_up();
    if !arguments.config.fallback {
        say!(
            "xenfold: {host} cannot receive through xenfold: {why}. The guest is untouched and runs on here; install \
             xenfold on {host}, or migrate without --no-fallback."
        );
        return Ok(1);
    }
    say!(
        "xenfold: {host} cannot receive through xenfold: {why}; sending as plain xl does, without any option of xenfold's"
    );
    Err(plain(ssh, arguments))
}

/// The pipes that xl gave us as standard input and output. Those two then lead nowhere, so that the engine can end
/// the pipes before the process ends: that is when xl resumes the guest.
fn pipes_of_xl() -> Result<(File, File)> {
    let from_xl = File::from(fcntl_dupfd_cloexec(rustix::stdio::stdin(), 3)?);
    let to_xl = File::from(fcntl_dupfd_cloexec(rustix::stdio::stdout(), 3)?);
    // A larger pipe means that xl and this process wake each other less often.
    if let Err(error) = fcntl_setpipe_size(&from_xl, PIPE_BYTES) {
        log::debug!("xl's pipe stays as it is: {error}");
    }
    let nowhere = File::options().read(true).write(true).open("/dev/null")?;
    rustix::stdio::dup2_stdin(&nowhere)?;
    rustix::stdio::dup2_stdout(&nowhere)?;
    Ok((from_xl, to_xl))
}

/// One migration with a xenfold at the other end.
struct Agent<'a> {
    arguments: &'a Arguments,
    guest: Option<Guest>,
    /// Why no page of it can follow it.
    cannot_follow: Option<&'static str>,
    /// What this host holds beside the guest.
    contents: Option<Arc<dyn Contents>>,
    record: Arc<Mutex<Option<Record>>>,
    /// Whether the guest was made smaller.
    ballooning: Ballooning,
    /// ssh and its options.
    ssh: Vec<String>,
    /// This migration's name.
    migration: String,
    /// The ssh of the newest connection.
    process: Arc<Mutex<Option<Ssh>>>,
    /// Where it is written down how pages that follow the guest can be sent by another process.
    journal: Option<Box<dyn LateJournal>>,
    /// Process number of the xl that called us.
    xl: u32,
}

/// What the threads around the engine have seen.
#[derive(Clone, Default)]
struct Seen {
    domain: KnownDomain,
    helper: Arc<Mutex<Option<Helper>>>,
    xl_ended: Arc<Mutex<bool>>,
    /// Somebody wants the migration to end.
    stopped: Arc<AtomicBool>,
    /// xl was dead already when the migration failed: nobody but us sets the guest going.
    xl_was_dead: Arc<Mutex<bool>>,
}

impl Agent<'_> {
    fn migrate(mut self, negotiated: Negotiated) -> Result<i32> {
        let seen = Seen::default();
        if let Some(guest) = &self.guest {
            seen.domain.set(guest.domid);
        }
        let figures = Arc::new(Mutex::new(self.first_figures()));
        let events = source::events();
        self.watch(&seen, &events.0)?;
        let live = self.guest.as_ref().map(|guest| record::figures_path(&guest.uuid));
        let progress = Progress::start(figures.clone(), seen.domain.clone(), self.arguments.config.quiet, live)?;
        let (from_xl, to_xl) = pipes_of_xl()?;
        let mode = self.mode(&negotiated.agreement);
        let guest_pages = {
            let mut figures = figures.lock();
            figures.mode = mode_name(mode);
            figures.memory_total_bytes / PAGE_SIZE as u64
        };
        let (holding, forecast) = self.holding(&seen, &from_xl, guest_pages, mode).unzip();
        {
            let holding = &mut figures.lock().holding;
            holding.known_pages = forecast.as_ref().map_or(0, Forecast::known_pages);
            holding.changing_pages = forecast.as_ref().map_or(0, Forecast::changing_pages);
        }
        let learning = forecast.clone();
        let (was_dead, xl) = (seen.xl_was_dead.clone(), self.xl);
        let setup = SourceSetup {
            to_xl: Box::new(to_xl),
            while_xl_waits: self.shrinking(&seen, &figures, mode),
            failing: Box::new(move || *was_dead.lock() = process::wait_for_end(xl, Some(DYING))),
            frames: self.frames(&seen.domain),
            verify: self.arguments.config.verify,
            holding,
            learnt: learning.map(|forecast| Box::new(move || bytes_of(&forecast)) as Learnt),
            bandwidth: NonZeroU64::new(self.arguments.config.bandwidth.bytes()),
            contents: self.contents.take(),
            connect: Some(connecting(
                self.ssh.clone(),
                self.arguments.host.clone(),
                self.migration.clone(),
                self.process.clone(),
            )),
            journal: self.journal.take(),
            figures: figures.clone(),
            events,
        };
        let (ending, left) = source::run(negotiated, setup, Box::new(from_xl));
        let downtime = progress.downtime();
        drop(progress);
        let mut last = figures.lock().clone();
        last.downtime_ms = downtime.map_or(0, |time| time.as_millis() as u64);
        (last.cpu_ms, last.peak_rss_bytes) = usage::cpu_ms_and_peak_rss_bytes();
        let status = self.end(ending, &seen, &mut last);
        // Also where the guest has left: it may come back by another way than xenfold's.
        if let (Some(guest), Some(bytes)) = (&self.guest, forecast.as_ref().and_then(bytes_of)) {
            model::save(&guest.uuid, &bytes);
        }
        self.write_stats(&last);
        // Nobody waits any more, and a later migration of the guest will find what it left.
        left.iter().for_each(Left::save);
        Ok(status)
    }

    /// Where it is written down how another process can go on, should this one be killed while pages follow the guest.
    fn journal(&self, key: &ContentKey, token: &str) -> Option<Box<dyn LateJournal>> {
        let (guest, path) = (self.guest.as_ref()?, following::path(&self.migration)?);
        let facts = Facts {
            guest: guest.name.clone(),
            uuid: guest.uuid.clone(),
            domid: guest.domid.get(),
            migration: self.migration.clone(),
            token: token.to_owned(),
            content_key: key.hex(),
            host: self.arguments.host.clone(),
            ssh: self.ssh.clone(),
            bandwidth: self.arguments.config.bandwidth.bytes(),
            ..Facts::default()
        };
        Some(Box::new(JournalFile::new(path, || Ok(facts))))
    }

    fn first_figures(&self) -> Figures {
        let name = self
            .guest
            .as_ref()
            .map_or_else(|| "guest".to_owned(), |guest| guest.name.clone());
        let info = self
            .guest
            .as_ref()
            .and_then(|guest| Xenctrl::open().ok()?.domain(guest.domid).ok()?);
        Figures {
            guest: name,
            host: self.arguments.host.clone(),
            mode: "xenfold".into(),
            memory_total_bytes: info.map_or(0, |info| info.total_pages * PAGE_SIZE as u64),
            ..Figures::default()
        }
    }

    /// The source's own frames, for `--verify` and for what the guest leaves here.
    fn frames(&self, domain: &KnownDomain) -> Option<Box<dyn FrameSource>> {
        if !self.arguments.config.verify && self.contents.is_none() {
            return None;
        }
        match GuestFrames::open(domain.clone()) {
            Ok(frames) => Some(Box::new(frames)),
            Err(error) => {
                log::warn!("the guest's frames cannot be read: {}", chain(&error));
                None
            }
        }
    }

    /// The mode that is wanted, if it can be had. Otherwise that is said.
    fn mode(&self, agreement: &Agreement) -> Mode {
        let wanted = self.arguments.config.mode;
        if !wanted.leaves_pages() || agreement.late {
            return wanted;
        }
        let host = &self.arguments.host;
        let why = match (self.cannot_follow, agreement.peer.late_missing.as_str()) {
            (Some(why), _) => why.to_owned(),
            (None, "") => format!("xenfold on {host} cannot do that; install the same version there"),
            (None, why) => format!("{host}: {}", printable(why)),
        };
        say!("xenfold: all of the guest goes before it is started (--mode precopy), none of it can follow: {why}");
        Mode::Precopy
    }

    /// Has the guest give up what it does not use, where that is wanted.
    fn shrinking(&self, seen: &Seen, figures: &Arc<Mutex<Figures>>, mode: Mode) -> Option<Box<dyn FnOnce() + Send>> {
        let floor_kib = self.arguments.config.balloon.bytes() >> 10;
        let guest = self.guest.clone().filter(|_| floor_kib > 0)?;
        if mode.leaves_pages() {
            say!(
                "xenfold: guest {} keeps its size: with --mode {mode} it would grow again on {} while its own pages still need \
                 that memory",
                guest.name,
                self.arguments.host
            );
            return None;
        }
        let (ballooning, record) = (self.ballooning.clone(), self.record.clone());
        let (stopped, figures) = (seen.stopped.clone(), figures.clone());
        Some(Box::new(move || {
            let mut note = |kib| record.lock().as_mut().map_or(Ok(()), |record| record.note_target(kib));
            let stop = || stopped.load(Ordering::Relaxed);
            if let Some((shrunk, pages)) = ballooning.shrink(&guest, floor_kib, &mut note, &stop) {
                let mut figures = figures.lock();
                figures.balloon = Some(shrunk.into());
                figures.memory_total_bytes = pages * PAGE_SIZE as u64;
            }
        }))
    }

    /// Why a guest that writes too fast is not kept here.
    fn cannot_abort(&self, mode: Mode) -> Option<&'static str> {
        if mode.leaves_pages() {
            Some("with --mode hybrid or postcopy what is missing follows it")
        } else if !self.arguments.config.hold {
            Some("with --no-hold nothing is known of its writes")
        } else if self.guest.is_none() {
            Some("xenfold does not know the guest")
        } else if self.guest.as_ref().is_some_and(may_follow::is_pv) {
            Some("it is a PV guest, whose writes are not looked at")
        } else {
            None
        }
    }

    /// What is needed to hold pages back. Where something of it is missing, each pass is sent whole.
    /// With what they are chosen by.
    fn holding(&self, seen: &Seen, from_xl: &File, guest_pages: u64, mode: Mode) -> Option<(Holding, Forecast)> {
        let config = &self.arguments.config;
        let leaves = mode.leaves_pages();
        if config.on_no_convergence == NoConvergence::Abort
            && let Some(why) = self.cannot_abort(mode)
        {
            say!(
                "xenfold: the guest goes however long it stands still, which on_no_convergence = \"abort\" does not change: {why}"
            );
        }
        let guest = self.guest.as_ref().filter(|_| config.hold || leaves)?;
        // What is written does not matter to a guest whose pages all stay behind.
        let model_seconds = if mode == Mode::Postcopy {
            0
        } else {
            config.model_seconds
        };
        let opened = GuestWrites::open(guest, seen.stopped.clone())
            .and_then(|log| Ok((log, GuestFrames::open(seen.domain.clone())?)));
        let (log, frames) = match opened {
            Ok(opened) => opened,
            Err(error) => {
                log::warn!("no page can be held back: {}", chain(&error));
                return None;
            }
        };
        let before = model::load(&guest.uuid, log.bound());
        let downtime = Duration::from_millis(config.downtime_limit.into());
        let forecast = Forecast::new(log.bound(), guest_pages, SAMPLE, before, downtime);
        let holding = Holding {
            policy: Box::new(forecast.clone()),
            log: Box::new(log),
            frames: Box::new(frames),
            // A pipe whose size is not known holds no more than the largest that anybody may have.
            pipe_bytes: fcntl_getpipe_size(from_xl).map_or(MAX_PIPE_BYTES, |bytes| bytes as u64),
            downtime: DowntimeLimit {
                limit: downtime,
                abort: config.on_no_convergence == NoConvergence::Abort,
            },
            max_rounds: config.max_iterations,
            max_time: (config.max_time > 0).then(|| Duration::from_secs(config.max_time.into())),
            model_time: Duration::from_secs(model_seconds.into()),
            behind: leaves.then_some(LeaveBehind {
                mode,
                now_pages: NOW_PAGES,
                announces: false,
            }),
        };
        Some((holding, forecast))
    }

    /// Starts the threads that wait for signals, for the end of xl, and for its helper.
    fn watch(&self, seen: &Seen, events: &Sender<Event>) -> Result<()> {
        let (stop, stopped) = (events.clone(), seen.stopped.clone());
        // The phases have ended when nobody receives these.
        signals::handle(move || {
            stopped.store(true, Ordering::Relaxed);
            drop(stop.send(Event::Stop("aborted".into())));
        })?;
        let (xl, stop, ended, stopped) = (self.xl, events.clone(), seen.xl_ended.clone(), seen.stopped.clone());
        thread::Builder::new().name("xenfold-xl".into()).spawn(move || {
            process::wait_for_end(xl, None);
            *ended.lock() = true;
            stopped.store(true, Ordering::Relaxed);
            let _ = stop.send(Event::XlEnded);
        })?;
        let (seen, stop, expected) = (seen.clone(), events.clone(), self.guest.clone());
        thread::Builder::new().name("xenfold-helper".into()).spawn(move || {
            while !*seen.xl_ended.lock() {
                if let Some(helper) = process::find_helper(xl, "--save-domain") {
                    *seen.helper.lock() = Some(helper);
                    seen.domain.set(helper.domid);
                    if expected.is_some_and(|guest| guest.domid != helper.domid) {
                        let _ = stop.send(Event::Stop(
                            "xl migrates another guest than its command line names".into(),
                        ));
                    }
                    return;
                }
                thread::sleep(HELPER_EVERY);
            }
        })?;
        Ok(())
    }

    /// Says how it ended, who owns the guest, and what to type next; sets the source going where xl cannot any more.
    fn end(&mut self, ending: Ending, seen: &Seen, figures: &mut Figures) -> i32 {
        let (guest, host) = (figures.guest.clone(), figures.host.clone());
        // A guest that is still suspended finds its size when it is resumed.
        if !matches!(ending, Ending::Completed { .. }) {
            self.ballooning.restore(&guest);
        }
        match ending {
            Ending::Completed { status } => {
                self.close_record();
                if !self.arguments.config.quiet {
                    summary(figures).lines().for_each(|line| say!("xenfold: {line}"));
                }
                if *seen.xl_ended.lock() && copy_is_left(seen) {
                    say!(
                        "xenfold: guest {guest} runs on {host}, but xl was ended here before it could remove its copy. \
                         Check with `ssh {host} xl list`, then type `xl destroy {guest}{AWAY}`."
                    );
                    return 1;
                }
                // Of several connections only the last word counts, which has been heard.
                if status == 0 && figures.late.as_ref().is_none_or(|late| late.outages == 0) {
                    let process = self.process.lock();
                    let ended = process.as_ref().and_then(|ssh| ssh.wait_at_most(AFTERWARDS));
                    ended.unwrap_or(status)
                } else {
                    status
                }
            }
            Ending::SourceOwns(error) => {
                let (why, next) = (chain(&error), next_step(&error));
                // First the guest, then the words.
                let whose = if *seen.xl_was_dead.lock() {
                    self.repair(seen, &guest)
                } else if *seen.xl_ended.lock() && is_left_suspended(seen) {
                    format!(
                        "xl was ended before it had resumed guest {guest}, which is this host's. Type `xenfold resume {guest}`."
                    )
                } else if is_gone(seen) {
                    self.close_record();
                    format!(
                        "guest {guest} has ended on this host, or was destroyed, before it was moved; {host} destroys what it \
                         has of it. If `xl list` shows {guest}{INCOMING} there, destroy that."
                    )
                } else {
                    self.close_record();
                    format!(
                        "guest {guest} is this host's and runs on here (xl resumes it); {host} destroys what it has of it. {next}"
                    )
                };
                say!("xenfold: migration of guest {guest} to {host} failed: {why}\nxenfold: {whose}");
                figures.error = Some(why);
                exit_status(&error)
            }
            Ending::Unknown(error @ EngineError::CopyGone(_)) => {
                figures.error = Some(chain(&error));
                self.close_record();
                say!("xenfold: {}", following::lost(&guest, &host, &error));
                exit_status(&error)
            }
            Ending::Unknown(error) if figures.late.as_ref().is_some_and(|late| late.started) => {
                figures.error = Some(chain(&error));
                say!(
                    "xenfold: the connection failed while pages followed guest {guest} to {host}: {}\n\
                     xenfold: it was started on {host}, whose it is, and stands still there; the pages that it lacks are here \
                     only, in the suspended {guest}{AWAY}. To send them type `xenfold follow {guest}`. To take the guest back \
                     as it was when it was suspended instead, if it has not written to its disks since: `ssh {host} xl destroy \
                     {guest}`, then `xenfold resume {guest} --force`.",
                    chain(&error)
                );
                exit_status(&error)
            }
            Ending::Unknown(error) => {
                if let (EngineError::PeerAborted(_), Some(path)) = (&error, following::path(&self.migration)) {
                    // Nobody there waits for pages. Absent is as good.
                    let _ = fs::remove_file(path);
                }
                figures.error = Some(chain(&error));
                say!(
                    "xenfold: the connection failed after {host} was told to start guest {guest}: {}\n\
                     xenfold: it may run there; the copy here is suspended and safe. Type `xenfold resume {guest}`: it \
                     asks {host}, and resumes the guest here only if it does not run there.",
                    chain(&error)
                );
                exit_status(&error)
            }
        }
    }

    /// xl is dead and cannot resume the guest: that is done here. Returns how it went, in words.
    fn repair(&mut self, seen: &Seen, guest: &str) -> String {
        let helper = *seen.helper.lock();
        let repaired = helper
            .map_or(Ok(()), repair::end_helper)
            .and_then(|()| match seen.domain.get() {
                Some(domid) => repair::resume(domid),
                None => Ok("the guest was not touched yet".into()),
            });
        match repaired {
            Ok(done) => {
                self.close_record();
                format!("xl was ended; {done}. Try again with the same command.")
            }
            Err(error) => format!(
                "xl was ended, and guest {guest} could not be set going again: {error:#}. It is this host's; \
                 type `xenfold resume {guest}`."
            ),
        }
    }

    fn close_record(&mut self) {
        if let Some(record) = self.record.lock().take() {
            record.close();
        }
    }

    fn write_stats(&self, figures: &Figures) {
        let Some(path) = &self.arguments.config.stats else {
            return;
        };
        let written = serde_json::to_vec_pretty(figures)
            .map_err(io::Error::from)
            .and_then(|json| {
                let mut file = File::create(path)?;
                file.write_all(&json)
            });
        if let Err(error) = written {
            say!("xenfold: the figures cannot be written to {}: {error}", path.display());
        }
    }
}

/// What a migration has taught of the guest's writes, as it is kept.
fn bytes_of(forecast: &Forecast) -> Option<Vec<u8>> {
    forecast.learnt().as_ref().and_then(Kept::to_bytes)
}

/// Runs ssh again, where the destination's agent still holds the guest. `newest`: the ssh of the newest connection.
pub fn connecting(ssh: Vec<String>, host: String, migration: String, newest: Arc<Mutex<Option<Ssh>>>) -> Connect {
    let remote: Vec<String> = REJOIN.into_iter().map(str::to_owned).chain([migration]).collect();
    let mut older: Vec<Ssh> = Vec::new();
    Box::new(move || {
        older.retain(|ssh| !ssh.has_ended());
        let (process, ends) = ssh::start_again(&ssh, &host, &remote)?;
        older.extend(newest.lock().replace(process));
        Ok(ends)
    })
}

/// Whether the guest's copy is still here, when xl should have destroyed it.
fn copy_is_left(seen: &Seen) -> bool {
    domain_now(seen).is_some_and(|info| !info.dying)
}

/// Whether the guest stands, when xl should have resumed it.
fn is_left_suspended(seen: &Seen) -> bool {
    domain_now(seen).is_some_and(|info| guest::is_suspended(&info))
}

/// Whether there is no such domain any more.
fn is_gone(seen: &Seen) -> bool {
    let looked = seen.domain.get().map(|domid| Xenctrl::open()?.domain(domid));
    looked.is_some_and(|looked| looked.is_ok_and(|info| info.is_none_or(|info| info.dying)))
}

fn domain_now(seen: &Seen) -> Option<DomainInfo> {
    Xenctrl::open().ok()?.domain(seen.domain.get()?).ok()?
}

/// What to type when a migration has failed for this.
fn next_step(error: &EngineError) -> &'static str {
    match error {
        EngineError::NoConvergence { .. } => {
            "Try again when it writes less, with a higher --downtime-limit or --bandwidth, with more --max-iterations, or with \
             on_no_convergence = \"go-on\" in the configuration."
        }
        EngineError::ComparedWhole => "Try again without --debug, or with --mode precopy.",
        _ => "Try again with the same command.",
    }
}

/// As the figures name it.
fn mode_name(mode: Mode) -> String {
    match mode {
        Mode::Precopy => "xenfold".into(),
        mode => mode.to_string(),
    }
}

fn exit_status(error: &EngineError) -> i32 {
    match error {
        EngineError::RemoteEnded(status) if *status != 0 => *status,
        EngineError::Wire(_) | EngineError::Silent { .. } => ssh::TRANSPORT_FAILED,
        _ => 1,
    }
}
