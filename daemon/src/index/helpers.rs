//! Which guests xl sends or saves, seen by libxl's helper process that does it.
use std::path::PathBuf;

use xen_sys::DomId;

/// The processes of this host, which are gone through only when there may be another helper among them: to read what
/// some hundred processes are is too much for every look.
pub struct Helpers {
    proc: PathBuf,
    /// The number of the newest process at the last look.
    newest: Option<u64>,
    /// Gone through once more since the newest began: it has become by then what it was started for.
    settled: bool,
    found: Vec<DomId>,
}

impl Helpers {
    /// Reads below `proc`, which is /proc but for tests.
    pub fn new(proc: impl Into<PathBuf>) -> Helpers {
        Helpers {
            proc: proc.into(),
            newest: None,
            settled: false,
            found: Vec::new(),
        }
    }

    /// The domains that are saved or sent now. Called once a second or less often.
    pub fn look(&mut self) -> Vec<DomId> {
        let newest = self.newest_process();
        let same = newest.is_some() && newest == self.newest;
        // What was found is looked at until it has ended.
        if !(same && self.settled && self.found.is_empty()) {
            (self.newest, self.settled) = (newest, same);
            self.found = self.go_through();
        }
        self.found.clone()
    }

    /// From the last field of /proc/loadavg, "0.58 1.15 1.38 1/80 15375" (proc(5)).
    fn newest_process(&self) -> Option<u64> {
        let line = std::fs::read_to_string(self.proc.join("loadavg")).ok()?;
        line.split_ascii_whitespace().nth(4)?.parse().ok()
    }

    fn go_through(&self) -> Vec<DomId> {
        let processes = std::fs::read_dir(&self.proc).into_iter().flatten().flatten();
        let lines = processes.filter_map(|process| {
            let is_pid = process.file_name().to_str()?.bytes().all(|byte| byte.is_ascii_digit());
            is_pid.then(|| std::fs::read(process.path().join("cmdline")).ok())?
        });
        lines.filter_map(|line| saved_domain(&line)).collect()
    }
}

/// The domain that this process saves: `libxl-save-helper --save-domain STREAM_FD BACK_FD DOMID…`
/// (tools/libs/light/libxl_save_callout.c), each word ended by a NUL.
fn saved_domain(command_line: &[u8]) -> Option<DomId> {
    let mut words = command_line.split(|byte| *byte == 0);
    let helper = words.next()?.ends_with(b"libxl-save-helper");
    let saves = words.next()? == b"--save-domain";
    let domid = std::str::from_utf8(words.nth(2)?).ok()?.parse().ok()?;
    DomId::new(domid).filter(|_| helper && saves)
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::path::Path;

    use super::*;

    fn helper(what: &str) -> Vec<u8> {
        let words = [
            "/usr/lib/xen-4.17/bin/libxl-save-helper",
            what,
            "12",
            "13",
            "7",
            "0",
            "",
        ];
        words.join("\0").into_bytes()
    }

    #[test]
    fn a_guest_that_xl_saves_is_known_by_its_helper() {
        assert_eq!(saved_domain(&helper("--save-domain")), DomId::new(7));
        assert_eq!(saved_domain(&helper("--restore-domain")), None);
        assert_eq!(saved_domain(b"xl\0save\0"), None);
        assert_eq!(saved_domain(b""), None);
    }

    fn process(proc: &Path, pid: u64, command_line: &[u8]) {
        fs::create_dir_all(proc.join(pid.to_string())).unwrap();
        fs::write(proc.join(pid.to_string()).join("cmdline"), command_line).unwrap();
        fs::write(proc.join("loadavg"), format!("0.58 1.15 1.38 1/80 {pid}\n")).unwrap();
    }

    #[test]
    fn processes_are_gone_through_when_there_may_be_a_helper() {
        let folder = tempfile::tempdir().unwrap();
        let proc = folder.path();
        process(proc, 1, b"init\0");
        let mut helpers = Helpers::new(proc);
        assert_eq!(helpers.look(), []);
        // The newest becomes one after it was looked at.
        process(proc, 2, b"xl\0save\0");
        assert_eq!(helpers.look(), []);
        process(proc, 2, &helper("--save-domain"));
        assert_eq!(helpers.look(), [DomId::new(7).unwrap()]);
        assert_eq!(helpers.look(), [DomId::new(7).unwrap()]);
        // It ends, with no new process.
        fs::remove_dir_all(proc.join("2")).unwrap();
        assert_eq!(helpers.look(), []);
        // Nothing has begun since: nothing is read.
        fs::write(proc.join("1/cmdline"), helper("--save-domain")).unwrap();
        assert_eq!(helpers.look(), []);
        process(proc, 3, b"sshd\0");
        assert_eq!(helpers.look(), [DomId::new(7).unwrap()]);
        // Where the newest is not known all are read each time.
        fs::remove_file(proc.join("loadavg")).unwrap();
        fs::remove_dir_all(proc.join("1")).unwrap();
        assert_eq!(helpers.look(), []);
        fs::write(proc.join("3/cmdline"), helper("--save-domain")).unwrap();
        assert_eq!(helpers.look(), [DomId::new(7).unwrap()]);
    }
}
