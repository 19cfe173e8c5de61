//! What /proc tells of the processes around us: xl and libxl's helper.
use std::fs;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::process::{Pid, PidfdFlags, pidfd_open};
use xen_sys::DomId;

/// Arguments of a process; empty when it is gone.
pub fn arguments(pid: u32) -> Vec<String> {
    let raw = fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
    let words = raw
        .split(|byte| *byte == 0)
        .map(|word| String::from_utf8_lossy(word).into_owned());
    let mut words: Vec<String> = words.collect();
    words.pop();
    words
}

/// Its parent, `None` when it is gone.
pub fn parent(pid: u32) -> Option<u32> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    // The name stands in parentheses and may contain any character.
    stat.rsplit_once(')')?.1.split_whitespace().nth(1)?.parse().ok()
}

/// Processor time that a process has used; `None` when it is gone.
pub fn cpu_time(pid: u32) -> Option<Duration> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    let fields = stat.rsplit_once(')')?.1.split_whitespace();
    let ticks: u64 = fields
        .skip(11)
        .take(2)
        .filter_map(|field| field.parse::<u64>().ok())
        .sum();
    // The unit that /proc speaks in is 1/100 s on every x86 Linux, whatever the kernel's own.
    Some(Duration::from_millis(ticks * 10))
}

/// When it started, in a unit of the kernel's: with its number, this names a process for good. `None` when it is gone.
pub fn since(pid: u32) -> Option<u64> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    let mut fields = stat.rsplit_once(')')?.1.split_whitespace();
    // One that has ended, and that its parent has not looked after, is gone, too.
    let state = fields.next().filter(|state| *state != "Z" && *state != "X");
    state.and(fields.nth(18)?.parse().ok())
}

/// Waits until a process has ended, at most for `patience`. Whether it has; one that is not there has, too.
pub fn wait_for_end(pid: u32, patience: Option<Duration>) -> bool {
    let Some(pid) = i32::try_from(pid).ok().and_then(Pid::from_raw) else {
        return true;
    };
    let Ok(handle) = pidfd_open(pid, PidfdFlags::empty()) else {
        return true;
    };
    let deadline = patience.map(|patience| Instant::now() + patience);
    loop {
        let left = deadline.map(|deadline| deadline.saturating_duration_since(Instant::now()));
        let left = left.and_then(|left| Timespec::try_from(left).ok());
        match poll(&mut [PollFd::new(&handle, PollFlags::IN)], left.as_ref()) {
            Err(rustix::io::Errno::INTR) => {}
            Ok(0) => return false,
            _ => return true,
        }
    }
}

/// Whether the other host's kernel answers a process's TCP connection: not while it has not accepted it, nor where so much was
/// lost that TCP sends one segment at a time and waits for seconds in between. `None`: there is none, or the process is gone.
pub fn is_answered(pid: u32) -> Option<bool> {
    let open = fs::read_dir(format!("/proc/{pid}/fd")).ok()?.flatten();
    let open = open.filter_map(|entry| fs::read_link(entry.path()).ok());
    let sockets: Vec<String> = open
        .filter_map(|to| Some(to.to_str()?.strip_prefix("socket:[")?.strip_suffix(']')?.to_owned()))
        .collect();
    let tables =
        ["tcp", "tcp6"].map(|table| fs::read_to_string(format!("/proc/{pid}/net/{table}")).unwrap_or_default());
    let lines = tables.iter().flat_map(|table| table.lines());
    // Number, both addresses, state, queues, timer, times sent again, owner, timeout, inode, references, place in memory, waiting
    // time in 1/100 s, two more, segments under way at most (Linux, Documentation/networking/proc_net_tcp.rst).
    let answered = lines.filter_map(|line| {
        let fields: Vec<&str> = line.split_whitespace().collect();
        let (state, inode) = (fields.get(3)?, fields.get(9)?);
        if !sockets.iter().any(|socket| socket == inode) {
            return None;
        }
        let number = |field: usize| fields.get(field).and_then(|field| field.parse::<u32>().ok());
        let is_stuck = number(15) == Some(1) && number(12) >= Some(STUCK);
        Some(*state != SYN_SENT && !is_stuck)
    });
    answered.max()
}

/// So long, in 1/100 s, does TCP wait by then: it doubles the time whenever nothing comes, and begins with a fifth of a second.
const STUCK: u32 = 200;

/// A connection's state while nothing has come back (include/net/tcp_states.h).
const SYN_SENT: &str = "02";

fn all() -> impl Iterator<Item = u32> {
    let entries = fs::read_dir("/proc").into_iter().flatten().flatten();
    entries.filter_map(|entry| entry.file_name().to_str()?.parse().ok())
}

fn is_descendant(mut pid: u32, ancestor: u32) -> bool {
    while pid > 1 {
        if pid == ancestor {
            return true;
        }
        let Some(next) = parent(pid) else { return false };
        pid = next;
    }
    false
}

/// libxl's helper and the domain it works on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Helper {
    pub pid: u32,
    pub domid: DomId,
}

/// Finds the helper that saves (`--save-domain`) or restores (`--restore-domain`) below `ancestor`.
pub fn find_helper(ancestor: u32, direction: &str) -> Option<Helper> {
    all().find_map(|pid| {
        let domid = helper_domid(&arguments(pid), direction)?;
        is_descendant(pid, ancestor).then_some(Helper { pid, domid })
    })
}

/// `libxl-save-helper --save-domain STREAM_FD BACK_FD NUMBERS…`, the first number being the domid
/// (tools/libs/light/libxl_save_callout.c).
fn helper_domid(arguments: &[String], direction: &str) -> Option<DomId> {
    match arguments {
        [program, what, _, _, domid, ..] if program.ends_with("libxl-save-helper") && what == direction => {
            domid.parse().ok().and_then(DomId::new)
        }
        _ => None,
    }
}

/// The guest as named on an `xl migrate` command line: the argument before the last, the options skipped.
pub fn guest_of_xl(arguments: &[String]) -> Option<String> {
    let mut words = arguments.iter().skip_while(|word| *word != "migrate").skip(1);
    let mut positional = Vec::new();
    while let Some(word) = words.next() {
        match word.as_str() {
            "-C" | "-s" => drop(words.next()),
            option if option.starts_with('-') && option.len() > 1 => {}
            _ => positional.push(word.clone()),
        }
    }
    match &positional[..] {
        [guest, _host] => Some(guest.clone()),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use std::net::TcpListener;
    use std::process::{Child, Command, Stdio};
    use std::thread;

    use super::*;

    fn words(line: &str) -> Vec<String> {
        line.split(' ').map(str::to_owned).collect()
    }

    #[test]
    fn the_guest_is_found_on_xls_command_line() {
        for line in [
            "xl migrate g1 host",
            "xl -v migrate --debug -s xenfold-ssh g1 host",
            "/usr/sbin/xl migrate -C /etc/g.cfg -sxenfold-ssh -p g1 host",
        ] {
            assert_eq!(guest_of_xl(&words(line)).as_deref(), Some("g1"), "{line}");
        }
        assert_eq!(guest_of_xl(&words("bash -c true")), None);
    }

    #[test]
    fn the_helper_names_its_domain() {
        let line = words("/usr/lib/xen-4.17/bin/libxl-save-helper --restore-domain 0 12 7 0 1");
        assert_eq!(helper_domid(&line, "--restore-domain"), DomId::new(7));
        assert_eq!(helper_domid(&line, "--save-domain"), None);
        assert_eq!(helper_domid(&words("sshd: root"), "--save-domain"), None);
    }

    #[test]
    fn a_connection_is_seen_once_it_is_answered() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        // One connection may wait to be accepted; Linux does not answer any more.
        rustix::net::listen(&listener, 0).unwrap();
        let script = format!(
            "exec 3<>/dev/tcp/{}",
            listener.local_addr().unwrap().to_string().replace(':', "/")
        );
        let mut connecting: Vec<Child> = (0..2)
            .map(|_| {
                let script = format!("{script}; read -r");
                let mut child = Command::new("bash");
                let child = child.args(["-c", &script]).stdin(Stdio::piped()).spawn().unwrap();
                while is_answered(child.id()).is_none() {
                    thread::sleep(Duration::from_millis(5));
                }
                child
            })
            .collect();
        let seen: Vec<Option<bool>> = connecting.iter().map(|child| is_answered(child.id())).collect();
        for child in &mut connecting {
            child.kill().unwrap();
            child.wait().unwrap();
            assert_eq!(is_answered(child.id()), None);
        }
        assert_eq!(seen, [Some(true), Some(false)]);
    }

    #[test]
    fn our_own_process_is_there() {
        let me = std::process::id();
        assert!(is_descendant(me, parent(me).unwrap()));
        assert!(!arguments(me).is_empty());
        let since = since(me);
        assert!(since.is_some_and(|since| since > 0) && since == super::since(me));
        let mut ended = std::process::Command::new("true").spawn().unwrap();
        assert!(wait_for_end(ended.id(), None));
        assert_eq!(super::since(ended.id()), None);
        ended.wait().unwrap();
    }
}
