//! `xenfold receive -- xl migrate-receive …`: the destination's agent, started by ssh.
use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::OwnedFd;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::thread;
use std::time::Duration;

use anyhow::{Context, Result};
use crossbeam_channel::bounded;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::{FdFlags, fcntl_dupfd_cloexec, fcntl_setfd, ioctl_fionread};
use rustix::pipe::{PipeFlags, fcntl_setpipe_size, pipe_with};
use rustix::process::{Pid, Signal, kill_process};
use xen_sys::{DomId, Libxl, Xenctrl, Xenstore};
use xenfold::config::Config;
use xenfold::control::{ControlError, Offer, SOCKET};
use xenfold::engine::destination::{self, DestinationSetup, Event, XlInput, XlProcess};
use xenfold::engine::{
    Contents, FrameSource, GuestPaging, JournalFile, LateJournal, LinkEnds, Unseen, WINDOW_ROWS, chain,
};
use xenfold::late::journal::Facts;
use xenfold::page::ContentKey;
use xenfold::wire::{Agreement, Hello};

use crate::contents::DaemonContents;
use crate::guest::{GuestFrames, INCOMING, KnownDomain, name_of};
use crate::paging::GuestPager;
use crate::{arrival, model, process, rejoin, signals, ssh, takeover, usage};

/// Room in the pipe to xl.
const PIPE_BYTES: usize = 256 << 10;

/// How long xl may take to end after it was given up; destroying a large guest takes its time.
const XL_PATIENCE: Duration = Duration::from_secs(60);

/// xl's exit status when it could not start the guest, and has destroyed it.
const NOT_STARTED: i32 = 1;

/// How often xl's children are looked at until its helper is there.
const HELPER_EVERY: Duration = Duration::from_millis(100);

#[derive(Debug, clap::Args)]
pub struct Arguments {
    /// The source of this migration comes back, after its connection was lost. Where the process that received the guest was
    /// killed, this one goes on for it.
    #[arg(long, value_name = "MIGRATION")]
    rejoin: Option<String>,
    /// The command that receives the guest: `xl migrate-receive` with its options.
    #[arg(required_unless_present = "rejoin", last = true)]
    command: Vec<String>,
}

/// Receives one guest. Returns the exit status of xl, or 1 when the guest was not taken over.
pub fn run(arguments: &Arguments, config: &Config) -> Result<i32> {
    if let Some(migration) = &arguments.rejoin {
        return rejoin::run(migration);
    }
    let domain = KnownDomain::default();
    let frames: Option<Box<dyn FrameSource>> = match GuestFrames::open(domain.clone()) {
        Ok(frames) => Some(Box::new(frames)),
        Err(error) => {
            log::warn!("pages cannot be referred to at any distance: {}", chain(&error));
            None
        }
    };
    let (paging, late_missing) = match GuestPager::open(domain.clone()) {
        Ok(paging) => (Some(Box::new(paging) as Box<dyn GuestPaging>), String::new()),
        Err(error) => (None, chain(&error)),
    };
    let hello = Hello {
        program: xenfold::VERSION.into(),
        late: paging.is_some(),
        late_missing,
        takes_early: true,
        late_known: true,
        rejoins: true,
        frames: frames.is_some(),
        window_rows: WINDOW_ROWS as u32,
        paces: true,
        contents: true,
        keeps_model: true,
        timeout_s: config.timeout,
        ..Hello::default()
    };
    let link = link(None)?;
    let negotiated = destination::negotiate(link, &hello, Duration::from_secs(config.timeout.into()))
        .context("the source did not introduce itself; xenfold receive is started by xenfold-ssh")?;
    let events = destination::events();
    let stop = events.0.clone();
    signals::handle(move || drop(stop.send(Event::Stop("terminated by a signal".into()))))?;
    let (xl, xl_pid) = start_xl(&arguments.command, domain.clone())?;
    let source = negotiated.agreement.peer.clone();
    let journal = journal(&negotiated.agreement, &negotiated.key, xl_pid, domain);
    let (arrived, uuid) = (source.clone(), source.guest_uuid.clone());
    let arriving = arrival::Arriving::new(&source);
    let figures = arriving.path();
    let setup = DestinationSetup {
        xl,
        frames,
        contents: contents(&source, &negotiated.key),
        events,
        paging,
        listen: Some(rejoin::listen(source.migration.clone())),
        journal,
        hello,
        watching: Some(arriving.watching()),
        keep_model: Some(Box::new(move |bytes| model::save(&uuid, bytes))),
        before_go: Box::new(move || arrival::note(&arrived.guest_uuid, &arrived.migration)),
        program: xenfold::VERSION.into(),
        usage: usage::cpu_ms_and_peak_rss_bytes,
    };
    let result = destination::run(negotiated, setup);
    arrival::remove(figures.as_deref());
    match result {
        Ok(status) => {
            if status == NOT_STARTED {
                arrival::forget(&source.guest_uuid, &source.migration);
            }
            Ok(status)
        }
        Err(error) => {
            arrival::forget(&source.guest_uuid, &source.migration);
            say!(
                "xenfold receive: the guest was not taken over: {}. It is the source's.",
                chain(&error)
            );
            Ok(1)
        }
    }
}

/// Where it is written down how another process can go on, should this one be killed while pages follow the guest.
fn journal(agreement: &Agreement, key: &ContentKey, xl: u32, domain: KnownDomain) -> Option<Box<dyn LateJournal>> {
    let (source, token) = (&agreement.peer, agreement.rejoin.clone()?);
    let path = takeover::path(&source.migration).filter(|_| !source.guest_uuid.is_empty())?;
    let facts = Facts {
        guest: source.guest_name.clone(),
        uuid: source.guest_uuid.clone(),
        migration: source.migration.clone(),
        token,
        content_key: key.hex(),
        xl,
        xl_since: process::since(xl).unwrap_or_default(),
        ..Facts::default()
    };
    Some(Box::new(JournalFile::new(path, move || {
        let domid = domain.get().ok_or(io::ErrorKind::NotFound)?;
        Ok(Facts {
            domid: domid.get(),
            ..facts
        })
    })))
}

/// What this host holds for the guest that comes.
fn contents(source: &Hello, key: &ContentKey) -> Option<Arc<dyn Contents>> {
    if !source.contents || source.group.is_empty() {
        return None;
    }
    let offer = Offer {
        group: source.group.clone(),
        key: key.clone(),
    };
    match DaemonContents::open(Path::new(SOCKET), &source.guest_uuid, &source.guest_name, Some(&offer)) {
        Ok((_, contents)) => contents.map(|contents| Arc::new(contents) as Arc<dyn Contents>),
        Err(error @ ControlError::NotRunning { .. }) => {
            log::debug!("{}", chain(&error));
            None
        }
        Err(error) => {
            say!(
                "xenfold receive: contents that this host holds are not used: {}",
                chain(&error)
            );
            None
        }
    }
}

/// Standard input and output, with an input that can be made to end. `stuck`: how long nobody may take what is written.
pub(crate) fn link(stuck: Option<Duration>) -> Result<LinkEnds> {
    let input = fcntl_dupfd_cloexec(rustix::stdio::stdin(), 3)?;
    let output = fcntl_dupfd_cloexec(rustix::stdio::stdout(), 3)?;
    // Else sshd would never see that the connection has been closed here.
    let nowhere = File::options().read(true).write(true).open("/dev/null")?;
    rustix::stdio::dup2_stdin(&nowhere)?;
    rustix::stdio::dup2_stdout(&nowhere)?;
    let (cancelled, cancel) = pipe_with(PipeFlags::CLOEXEC)?;
    let no_writing = rustix::io::dup(&cancelled)?;
    fcntl_setfd(&no_writing, FdFlags::CLOEXEC)?;
    Ok(LinkEnds {
        to_peer: Box::new(Unblocked {
            output,
            cancelled: no_writing,
            stuck: stuck.and_then(|stuck| Timespec::try_from(stuck).ok()),
        }),
        from_peer: Box::new(Cancellable { input, cancelled }),
        // One byte is enough, and an error means that nobody reads any more.
        hangup: Arc::new(move || {
            let _ = rustix::io::write(&cancel, &[0]);
        }),
        carrier: Arc::new(Unseen),
    })
}

/// A reader that ends when something is written to the other end of `cancelled`.
struct Cancellable {
    input: OwnedFd,
    cancelled: OwnedFd,
}

impl Read for Cancellable {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let mut polled = [
            PollFd::new(&self.input, PollFlags::IN),
            PollFd::new(&self.cancelled, PollFlags::IN),
        ];
        poll(&mut polled, None)?;
        if !polled[1].revents().is_empty() {
            return Err(io::ErrorKind::ConnectionAborted.into());
        }
        Ok(rustix::io::read(&self.input, buffer)?)
    }
}

/// A writer that does not wait for room any more once something is written to the other end of `cancelled`.
struct Unblocked {
    output: OwnedFd,
    cancelled: OwnedFd,
    /// How long it waits before that; `None`: as long as it takes.
    stuck: Option<Timespec>,
}

/// Bytes that go into a pipe with any room at once.
const AT_ONCE: usize = 4096;

impl Write for Unblocked {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let bytes = bytes.get(..AT_ONCE).unwrap_or(bytes);
        let mut polled = [
            PollFd::new(&self.output, PollFlags::OUT),
            PollFd::new(&self.cancelled, PollFlags::IN),
        ];
        if poll(&mut polled, self.stuck.as_ref())? == 0 {
            return Err(io::ErrorKind::TimedOut.into());
        }
        if polled[0].revents().is_empty() {
            // Somebody may read yet: a last word goes through, but is not waited for long.
            let last = Timespec::try_from(LAST_WORD).ok();
            if poll(&mut polled[..1], last.as_ref())? == 0 {
                return Err(io::ErrorKind::TimedOut.into());
            }
        }
        Ok(rustix::io::write(&self.output, bytes)?)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// How long it waits for room then.
const LAST_WORD: Duration = Duration::from_millis(500);

/// Starts xl with pipes on both sides, and a thread that finds the guest it builds.
fn start_xl(command: &[String], domain: KnownDomain) -> Result<(XlProcess, u32)> {
    let (stdin, to_xl) = pipe_with(PipeFlags::CLOEXEC)?;
    let (from_xl, stdout) = pipe_with(PipeFlags::CLOEXEC)?;
    fcntl_setpipe_size(&to_xl, PIPE_BYTES)?;
    // xl does not write to ssh itself: it would end with it, and the guest may be running by then.
    let (words, stderr) = pipe_with(PipeFlags::CLOEXEC)?;
    // xl inherits the reading ends of its own output, too: should this process be killed, its report still finds
    // somewhere to go, and it destroys the guest instead of ending before that.
    let kept = [rustix::io::dup(&from_xl)?, rustix::io::dup(&words)?];
    kept.iter().try_for_each(|kept| fcntl_setfd(kept, FdFlags::empty()))?;
    let (program, options) = command.split_first().context("no command to receive with")?;
    let child = Command::new(program)
        .args(options)
        .stdin(Stdio::from(stdin))
        .stdout(Stdio::from(stdout))
        .stderr(Stdio::from(stderr))
        .spawn();
    let child = child.with_context(|| format!("{program} cannot be started"))?;
    drop(kept);
    let (saying, said) = bounded::<()>(0);
    thread::Builder::new().name("xenfold-words".into()).spawn(move || {
        pass_words(words);
        drop(saying);
    })?;
    let pid = child.id();
    let found = domain.clone();
    thread::Builder::new().name("xenfold-helper".into()).spawn(move || {
        // Not until its arguments are empty: they are, for a moment, while a process becomes another program.
        while !process::wait_for_end(pid, Some(HELPER_EVERY)) {
            if let Some(helper) = process::find_helper(pid, "--restore-domain") {
                found.set(helper.domid);
                return;
            }
        }
    })?;
    let watched = to_xl.try_clone()?;
    let xl = XlProcess {
        input: XlInput {
            writer: Box::new(File::from(to_xl)),
            unread: Arc::new(move || unread(&watched)),
        },
        output: Box::new(File::from(from_xl)),
        end: Box::new(move |given_up| {
            let status = end_xl(child, &domain, given_up);
            // Its last words before ours. Whoever else still holds its output open is not waited for.
            let _ = said.recv_timeout(LAST_WORD);
            status
        }),
    };
    Ok((xl, pid))
}

/// What xl says goes to our own standard error. When nobody hears that any more it is still taken from xl.
fn pass_words(words: OwnedFd) {
    let mut words = File::from(words);
    let mut buffer = [0; 4096];
    while let Ok(taken @ 1..) = words.read(&mut buffer) {
        let _ = io::stderr().write_all(buffer.get(..taken).unwrap_or_default());
    }
}

/// Bytes in a pipe that its reader has not taken. Errors: it has no reader any more.
fn unread(pipe: &OwnedFd) -> io::Result<u64> {
    let mut polled = [PollFd::new(pipe, PollFlags::empty())];
    poll(&mut polled, Some(&Timespec { tv_sec: 0, tv_nsec: 0 }))?;
    if polled[0].revents().contains(PollFlags::ERR) {
        return Err(io::ErrorKind::BrokenPipe.into());
    }
    Ok(ioctl_fionread(pipe)?)
}

/// Waits for xl. Given up, it has a minute to destroy the guest by itself; what it leaves is destroyed here.
fn end_xl(mut child: Child, domain: &KnownDomain, given_up: bool) -> i32 {
    if !process::wait_for_end(child.id(), given_up.then_some(XL_PATIENCE))
        && let Some(pid) = i32::try_from(child.id()).ok().and_then(Pid::from_raw)
    {
        // Gone meanwhile is as good.
        let _ = kill_process(pid, Signal::TERM);
    }
    let status = child.wait().map_or(1, ssh::code);
    if given_up && let Some(domid) = domain.get() {
        match destroy_leftover(domid) {
            Ok(false) => {}
            Ok(true) => say!(
                "xenfold receive: xl left domain {} behind; it was destroyed",
                domid.get()
            ),
            Err(error) => say!(
                "xenfold receive: what is left of the guest (domain {}) cannot be destroyed: {error:#}; type `xl destroy {}`",
                domid.get(),
                domid.get()
            ),
        }
    }
    status
}

/// Destroys the guest under construction if it is still there and was never started. Whether it was.
fn destroy_leftover(domid: DomId) -> Result<bool> {
    let (xen, store) = (Xenctrl::open()?, Xenstore::open()?);
    let Some(info) = xen.domain(domid)? else {
        return Ok(false);
    };
    let name = name_of(&store, domid)?.unwrap_or_default();
    if info.dying || !name.ends_with(INCOMING) {
        return Ok(false);
    }
    Libxl::open()?.destroy(domid)?;
    Ok(true)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_nobody_takes_is_not_waited_for() {
        let (_reader, output) = pipe_with(PipeFlags::CLOEXEC).unwrap();
        let (cancelled, cancel) = pipe_with(PipeFlags::CLOEXEC).unwrap();
        let mut writer = Unblocked {
            output,
            cancelled,
            stuck: Timespec::try_from(Duration::from_millis(50)).ok(),
        };
        let error = writer.write_all(&vec![0; 1 << 20]).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::TimedOut);
        writer.stuck = None;
        rustix::io::write(&cancel, &[0]).unwrap();
        assert_eq!(writer.write(&[0]).unwrap_err().kind(), io::ErrorKind::TimedOut);
    }
}
