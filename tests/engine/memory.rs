//! Memory that the agents take: bounded by the link's window, not by the guest.

use std::io::{self, Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::process::{Child, Command};
use std::sync::Arc;
use std::thread;
use std::time::Duration;

use xenfold::engine::destination::{self, DestinationSetup, XlInput, XlProcess};
use xenfold::engine::source::{self, Ending, SourceSetup};
use xenfold::engine::{LinkEnds, Unseen, WINDOW_ROWS};
use xenfold::wire::Hello;

use crate::support::{Batch, Guest, Mix, StreamSpec};
use crate::{OTHERS, hosts, support};

/// Writes this process's peak memory (VmHWM, bytes) into a file.
fn leave_peak(path: &Path) {
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find(|line| line.starts_with("VmHWM:")).unwrap();
    let kib: u64 = line.split_whitespace().nth(1).unwrap().parse().unwrap();
    std::fs::write(path, (kib * 1024).to_string()).unwrap();
}

fn connect(path: &Path) -> UnixStream {
    for _ in 0..1000 {
        if let Ok(stream) = UnixStream::connect(path) {
            return stream;
        }
        thread::sleep(Duration::from_millis(20));
    }
    panic!("nobody listens at {}", path.display());
}

fn ends(link: &UnixStream) -> LinkEnds {
    let hung_up = link.try_clone().unwrap();
    LinkEnds {
        to_peer: Box::new(link.try_clone().unwrap()),
        from_peer: Box::new(link.try_clone().unwrap()),
        hangup: Arc::new(move || drop(hung_up.shutdown(std::net::Shutdown::Both))),
        carrier: Arc::new(Unseen),
    }
}

/// Not a test of its own: one agent of the memory test, in a process that holds nothing else.
#[test]
fn memory_side() {
    let Some(folder) = std::env::var_os("XENFOLD_MEMORY_FOLDER") else {
        return;
    };
    let folder = Path::new(&folder);
    let timeout = Duration::from_secs(60);
    if std::env::var("XENFOLD_MEMORY_SIDE").unwrap() == "source" {
        let xl = connect(&folder.join("source.sock"));
        let link = connect(&folder.join("link.sock"));
        let hello = Hello {
            contents: true,
            ..Hello::default()
        }
        .with_key(&hosts::key());
        let setup = SourceSetup {
            to_xl: Box::new(xl.try_clone().unwrap()),
            failing: Box::new(|| {}),
            while_xl_waits: None,
            frames: None,
            verify: false,
            holding: None,
            learnt: None,
            bandwidth: None,
            contents: None,
            connect: None,
            journal: None,
            figures: Arc::default(),
            events: source::events(),
        };
        let (ending, _) = source::run(
            source::negotiate(ends(&link), &hello, timeout).unwrap(),
            setup,
            Box::new(xl),
        );
        assert!(matches!(ending, Ending::Completed { status: 0 }), "{ending:?}");
        leave_peak(&folder.join("source.peak"));
    } else {
        let listener = UnixListener::bind(folder.join("link.sock")).unwrap();
        let xl = connect(&folder.join("destination.sock"));
        let (link, _) = listener.accept().unwrap();
        let hello = Hello {
            window_rows: WINDOW_ROWS as u32,
            contents: true,
            paces: true,
            ..Hello::default()
        };
        let setup = DestinationSetup {
            xl: XlProcess {
                input: XlInput {
                    writer: Box::new(xl.try_clone().unwrap()),
                    unread: Arc::new(|| Ok(0)),
                },
                output: Box::new(xl),
                end: Box::new(|_| 0),
            },
            frames: None,
            contents: None,
            events: destination::events(),
            paging: None,
            listen: None,
            journal: None,
            hello: Hello::default(),
            watching: None,
            keep_model: None,
            before_go: Box::new(|| Ok(())),
            program: "test".into(),
            usage: || (0, 0),
        };
        let negotiated = destination::negotiate(ends(&link), &hello, timeout).unwrap();
        assert_eq!(destination::run(negotiated, setup).unwrap(), 0);
        leave_peak(&folder.join("destination.peak"));
    }
}

struct Hashing<W>(W, blake3::Hasher);

impl<W: Write> Write for Hashing<W> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let taken = self.0.write(bytes)?;
        self.1.update(&bytes[..taken]);
        Ok(taken)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.0.flush()
    }
}

const R0: &[u8] = b"xl migration receiver ready, send binary domain data.\n";
const R1: &[u8] = b"domain received, ready to unpause\0";
const GO: &[u8] = b"domain is yours, you are cleared to unpause\0";
const R2_RUNNING: &[u8] = b"my copy unpause results are as follows\0\0";

/// Migrates through two processes and returns the peak memory of source and destination.
fn peaks(spec: &StreamSpec) -> [u64; 2] {
    let folder = tempfile::tempdir().unwrap();
    let path = |name: &str| folder.path().join(name);
    let (source, destination) = (
        UnixListener::bind(path("source.sock")).unwrap(),
        UnixListener::bind(path("destination.sock")).unwrap(),
    );
    let side = |name: &str| -> Child {
        Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "memory::memory_side", "--nocapture"])
            .env("XENFOLD_MEMORY_FOLDER", folder.path())
            .env("XENFOLD_MEMORY_SIDE", name)
            .stdout(std::process::Stdio::null())
            .spawn()
            .unwrap()
    };
    let mut sides = [side("source"), side("destination")];
    let mut length = 0u64;
    support::write_stream(spec, Counting(&mut length)).unwrap();
    let receiving = thread::spawn(move || {
        let (mut xl, _) = destination.accept().unwrap();
        xl.write_all(R0).unwrap();
        let mut hasher = blake3::Hasher::new();
        let mut buffer = vec![0; 1 << 20];
        let mut left = length;
        while left > 0 {
            let part = left.min(buffer.len() as u64) as usize;
            xl.read_exact(&mut buffer[..part]).unwrap();
            hasher.update(&buffer[..part]);
            left -= part as u64;
        }
        xl.write_all(R1).unwrap();
        let mut go = [0; 44];
        xl.read_exact(&mut go).unwrap();
        assert_eq!(go, GO);
        xl.write_all(R2_RUNNING).unwrap();
        hasher.finalize()
    });
    let (mut xl, _) = source.accept().unwrap();
    let mut message = [0; 54];
    xl.read_exact(&mut message).unwrap();
    assert_eq!(message, R0);
    let mut hashing = Hashing(&mut xl, blake3::Hasher::new());
    support::write_stream(spec, &mut hashing).unwrap();
    let sent = hashing.1.finalize();
    let mut message = [0; 34];
    xl.read_exact(&mut message).unwrap();
    assert_eq!(message, R1);
    xl.write_all(GO).unwrap();
    let mut message = [0; 40];
    xl.read_exact(&mut message).unwrap();
    assert_eq!(message, R2_RUNNING);
    assert_eq!(receiving.join().unwrap(), sent);
    for side in &mut sides {
        assert!(side.wait().unwrap().success());
    }
    ["source.peak", "destination.peak"].map(|name| std::fs::read_to_string(path(name)).unwrap().parse().unwrap())
}

struct Counting<'a>(&'a mut u64);

impl Write for Counting<'_> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        *self.0 += bytes.len() as u64;
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

#[test]
fn memory_stays_within_its_bound() {
    let _others = OTHERS.read();
    let incompressible = StreamSpec {
        pages: 64 << 10,
        mix: Mix::INCOMPRESSIBLE,
        ..StreamSpec::default()
    };
    let compressible = StreamSpec {
        pages: 24 << 10,
        guest: Guest::Pv,
        ..StreamSpec::default()
    };
    for spec in [incompressible, compressible] {
        let spec = StreamSpec {
            passes: 2,
            dirty_percent: 10,
            hole_percent: 0,
            batch: Batch::Aligned,
            ..spec
        };
        let bound = (64 << 20) + 32 * spec.pages as u64;
        let peaks = peaks(&spec);
        eprintln!(
            "peak memory, source and destination: {} and {} MiB",
            peaks[0] >> 20,
            peaks[1] >> 20
        );
        assert!(peaks.iter().all(|peak| *peak <= bound), "{peaks:?}, bound {bound}");
    }
}
