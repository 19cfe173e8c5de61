//! `xenfold top` in a terminal, before a daemon that is made up.
use std::io::{BufReader, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::thread;
use std::time::Duration;

use tempfile::TempDir;
use xenfold::control::{DedupStatus, Message, Reply, Request, Status, read_message, write_message};

/// A daemon that answers `status` and `dedup` as long as somebody asks.
fn daemon() -> (TempDir, PathBuf) {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("daemon.sock");
    let listener = UnixListener::bind(&path).unwrap();
    thread::spawn(move || {
        for caller in listener.incoming() {
            answer(&caller.unwrap());
        }
    });
    (folder, path)
}

fn answer(caller: &UnixStream) {
    let mut reader = BufReader::new(caller);
    let mut writer = caller;
    while let Ok(Message { body, .. }) = read_message(&mut reader) {
        let reply = match body {
            Request::Status {} => Reply::Status(Box::new(Status {
                program: "made up".into(),
                ..Status::default()
            })),
            Request::Dedup {} => Reply::Dedup(DedupStatus::default()),
            other => panic!("{other:?}"),
        };
        write_message(&mut writer, &reply, &[]).unwrap();
    }
}

fn top(socket: &Path) -> String {
    format!("{} top --socket {}", env!("CARGO_BIN_EXE_xenfold"), socket.display())
}

/// Runs a line of shell in a terminal of its own, with these keys typed a while after it began.
fn in_terminal(line: &str, keys: &[u8]) -> Output {
    let mut script = Command::new("script")
        .args(["--quiet", "--return", "--command", line, "/dev/null"])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .expect("script, of Debian's essential package bsdutils, runs");
    let mut stdin = script.stdin.take().unwrap();
    for key in keys {
        thread::sleep(Duration::from_millis(2500));
        // It has ended when an earlier key has ended it.
        let _ = stdin.write_all(&[*key]);
    }
    let output = script.wait_with_output();
    drop(stdin);
    output.unwrap()
}

#[test]
fn a_key_ends_it_and_the_terminal_is_as_before() {
    let (_folder, socket) = daemon();
    for key in [b'q', 3] {
        let line = format!("stty -a; {}; echo status $?; stty -a", top(&socket));
        // One that says nothing before.
        let output = in_terminal(&line, &[b'x', key]);
        let text = String::from_utf8_lossy(&output.stdout).into_owned();
        let (before, rest) = text.split_once("\x1b[?1049h\x1b[?25l").unwrap();
        let (shown, after) = rest.split_once("\x1b[?25h\x1b[?1049l").unwrap();
        assert!(
            shown.matches("xenfoldd made up").count() >= 2,
            "once a second: {text:?}"
        );
        assert!(!shown.contains("\x1b[Jx"), "keys are not shown: {text:?}");
        let (status, after) = after.split_once("\r\n").unwrap();
        assert_eq!(status, "status 0");
        assert_eq!(before.trim(), after.trim());
        assert!(before.contains("icanon") && before.contains(" echo "), "{before}");
    }
}

#[test]
fn without_a_terminal_it_prints_once() {
    let (_folder, socket) = daemon();
    let words = |more: &[&str]| {
        let mut command = Command::new(env!("CARGO_BIN_EXE_xenfold"));
        command.args(["top", "--socket", socket.to_str().unwrap()]).args(more);
        let output = command.stdin(Stdio::null()).output().unwrap();
        assert!(output.status.success());
        String::from_utf8(output.stdout).unwrap()
    };
    for more in [&[][..], &["--once"]] {
        let text = words(more);
        assert!(text.starts_with("xenfoldd made up") && !text.contains('\x1b'), "{text}");
    }
    let json: serde_json::Value = serde_json::from_str(&words(&["--json"])).unwrap();
    assert_eq!(json["status"]["program"], "made up");
}

#[test]
fn without_a_daemon_the_terminal_is_not_touched() {
    let folder = tempfile::tempdir().unwrap();
    let output = in_terminal(&top(&folder.path().join("none")), &[]);
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    assert!(
        !output.status.success() && text.contains("systemctl start xenfoldd"),
        "{text}"
    );
    assert!(!text.contains('\x1b'), "{text:?}");
}
