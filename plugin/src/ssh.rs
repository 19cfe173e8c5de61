//! Running ssh.
use std::ffi::OsStr;
use std::io::{self, Read, Write};
use std::os::unix::process::ExitStatusExt;
use std::path::Path;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::Arc;
use std::time::Duration;

use parking_lot::Mutex;
use rustix::pipe::fcntl_setpipe_size;
use xenfold::engine::{Carrier, LinkEnds};

use crate::process;

/// ssh's exit status for a failure of its own.
pub const TRANSPORT_FAILED: i32 = 255;

/// The shell's exit statuses for a command that is not there, or cannot be run.
pub const COMMAND_NOT_FOUND: [i32; 2] = [126, 127];

/// Bytes that the pipe to ssh holds.
const PIPE_BYTES: usize = 256 << 10;

/// A running ssh with a command at the other end.
pub struct Ssh {
    child: Arc<Mutex<Child>>,
}

/// ssh ignores SIGINT and SIGHUP as we do: a Ctrl-C on xl must not cut the connection over which the destination is
/// told to clean up. A shell sets that, since what is ignored stays ignored across exec.
const IGNORING: &str = r#"trap "" INT HUP; exec "$@""#;

fn command(ssh: &[String], host: &str, remote: &[String]) -> Command {
    let mut command = Command::new("/bin/sh");
    command.args(["-c", IGNORING, "sh"]).args(ssh).arg(host).args(remote);
    command
}

/// The words of the setting `ssh`.
pub fn words(setting: &str) -> Vec<String> {
    setting.split_whitespace().map(str::to_owned).collect()
}

/// Starts ssh (program and options in `ssh`) with `remote` as the command on `host`.
pub fn start(ssh: &[String], host: &str, remote: &[String]) -> io::Result<(Ssh, LinkEnds)> {
    with_pipes(command(ssh, host, remote))
}

/// The same for one of many attempts: it asks nothing and says nothing.
pub fn start_again(ssh: &[String], host: &str, remote: &[String]) -> io::Result<(Ssh, LinkEnds)> {
    let (program, options) = ssh.split_first().ok_or(io::ErrorKind::InvalidInput)?;
    let name = Path::new(program).file_name().and_then(OsStr::to_str);
    let quiet = if name == Some("ssh") { &QUIET[..] } else { &[] };
    // The first one given counts.
    let words = [program]
        .into_iter()
        .cloned()
        .chain(quiet.iter().map(|word| (*word).to_owned()));
    let words: Vec<String> = words.chain(options.iter().cloned()).collect();
    let mut command = command(&words, host, remote);
    command.stderr(Stdio::null());
    with_pipes(command)
}

/// No question, no wait for a host that is not reached: there will be another attempt.
const QUIET: [&str; 4] = ["-o", "BatchMode=yes", "-o", "ConnectTimeout=10"];

fn with_pipes(mut command: Command) -> io::Result<(Ssh, LinkEnds)> {
    let mut child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn()?;
    let pid = child.id();
    let no_pipe = || io::Error::other("ssh was started without its pipes");
    let to_peer = child.stdin.take().ok_or_else(no_pipe)?;
    // A larger pipe means that ssh and this process wake each other less often.
    if let Err(error) = fcntl_setpipe_size(&to_peer, PIPE_BYTES) {
        log::debug!("ssh's pipe stays as it is: {error}");
    }
    let to_peer: Box<dyn Write + Send> = Box::new(to_peer);
    let from_peer: Box<dyn Read + Send> = Box::new(child.stdout.take().ok_or_else(no_pipe)?);
    let child = Arc::new(Mutex::new(child));
    let killed = child.clone();
    let hangup = Arc::new(move || {
        // Already gone is as good.
        let _ = killed.lock().kill();
    });
    Ok((
        Ssh { child },
        LinkEnds {
            to_peer,
            from_peer,
            hangup,
            carrier: Arc::new(Process(pid)),
        },
    ))
}

/// ssh as whatever carries a connection.
struct Process(u32);

impl Carrier for Process {
    fn cpu_time(&self) -> Option<Duration> {
        process::cpu_time(self.0)
    }

    fn is_answered(&self) -> Option<bool> {
        process::is_answered(self.0)
    }
}

/// Runs a command on `host` to its end. Its standard output, and its exit status as ssh reports it.
pub fn run(ssh: &[String], host: &str, remote: &[String]) -> io::Result<(String, i32)> {
    let output = command(ssh, host, remote)
        .stdin(Stdio::null())
        .stderr(Stdio::inherit())
        .output()?;
    Ok((
        String::from_utf8_lossy(&output.stdout).into_owned(),
        code(output.status),
    ))
}

impl Ssh {
    /// Ends ssh, if it has not ended.
    pub fn hang_up(&self) {
        // Already gone is as good.
        let _ = self.child.lock().kill();
    }

    /// Whether ssh has ended; then nothing remains of it.
    pub fn has_ended(&self) -> bool {
        // An error means that it was waited for.
        self.child.lock().try_wait().map_or(true, |status| status.is_some())
    }

    /// Waits for ssh; its exit status is the remote command's.
    pub fn wait(&self) -> i32 {
        self.wait_for_end(None);
        self.child.lock().wait().map_or(TRANSPORT_FAILED, code)
    }

    /// The same, at most for `patience`; then ssh is ended, and there is no status.
    pub fn wait_at_most(&self, patience: Duration) -> Option<i32> {
        if self.wait_for_end(Some(patience)) {
            return Some(self.wait());
        }
        self.hang_up();
        None
    }

    /// Not waited for under the lock: a hang-up must get through.
    fn wait_for_end(&self, patience: Option<Duration>) -> bool {
        let id = self.child.lock().id();
        process::wait_for_end(id, patience)
    }
}

/// An exit status as a shell gives it.
pub fn code(status: ExitStatus) -> i32 {
    status.code().unwrap_or_else(|| 128 + status.signal().unwrap_or(0))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_ssh_that_does_not_end_is_ended() {
        let with = |program: &str, word: &str| start(&[program.to_owned()], word, &[]).unwrap().0;
        assert_eq!(with("false", "now").wait_at_most(Duration::from_secs(60)), Some(1));
        let stuck = with("sleep", "600");
        assert_eq!(stuck.wait_at_most(Duration::from_millis(50)), None);
        assert_eq!(stuck.wait(), 128 + 9);
    }
}
