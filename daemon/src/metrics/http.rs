//! As much of HTTP as a GET takes. What callers send is hostile: bounded before it is looked at, with one deadline for all.
use std::io::{self, ErrorKind, Read, Write};
use std::os::unix::net::UnixStream;
use std::time::Instant;

/// The longest request, its headers included.
const MAX_REQUEST_BYTES: usize = 8192;

/// What goes back.
pub struct Answer {
    status: &'static str,
    kind: &'static str,
    /// A header that this status wants.
    more: &'static str,
    body: String,
}

/// The caller did not keep to the deadline, or went.
pub struct TooSlow(pub io::Error);

impl Answer {
    pub fn found(kind: &'static str, body: String) -> Answer {
        Answer {
            status: "200 OK",
            kind,
            more: "",
            body,
        }
    }

    pub fn failed(why: &str) -> Answer {
        Answer::problem("500 Internal Server Error", why)
    }

    pub fn busy() -> Answer {
        Answer {
            more: "Retry-After: 5\r\n",
            ..Answer::problem("503 Service Unavailable", "others are being answered; try again later")
        }
    }

    fn problem(status: &'static str, why: &str) -> Answer {
        Answer {
            status,
            kind: "text/plain; charset=utf-8",
            more: "",
            body: format!("{why}\n"),
        }
    }

    pub fn bytes(&self) -> Vec<u8> {
        let Answer {
            status,
            kind,
            more,
            body,
        } = self;
        let length = body.len();
        let head = format!(
            "HTTP/1.1 {status}\r\nContent-Type: {kind}\r\nContent-Length: {length}\r\n{more}Connection: close\r\n\r\n"
        );
        [head.as_bytes(), body.as_bytes()].concat()
    }
}

/// Answers one question. `find` makes the answer for a path; `None`: there is none.
pub fn serve(caller: &UnixStream, deadline: Instant, find: impl FnOnce(&str) -> Option<Answer>) -> Result<(), TooSlow> {
    let answer = match read(caller, deadline).map_err(TooSlow)? {
        None => Answer::problem("431 Request Header Fields Too Large", "the request is too long"),
        Some(request) => match path(&request) {
            Ok(path) => {
                find(path).unwrap_or_else(|| Answer::problem("404 Not Found", "there is /metrics, and /metrics.json"))
            }
            Err(answer) => answer,
        },
    };
    write(caller, deadline, &answer.bytes()).map_err(TooSlow)
}

/// The request up to the empty line that ends its headers. `None`: it is too long.
fn read(mut caller: &UnixStream, deadline: Instant) -> io::Result<Option<Vec<u8>>> {
    let mut request = Vec::new();
    let mut buffer = [0; 1024];
    loop {
        caller.set_read_timeout(Some(left(deadline)?))?;
        let count = match caller.read(&mut buffer) {
            Ok(0) => return Err(ErrorKind::UnexpectedEof.into()),
            Ok(count) => count,
            Err(error) if error.kind() == ErrorKind::Interrupted => continue,
            Err(error) => return Err(error),
        };
        // A few bytes back, in case the end came in two pieces.
        let from = request.len().saturating_sub(3);
        request.extend_from_slice(buffer.get(..count).unwrap_or_default());
        if request.len() > MAX_REQUEST_BYTES {
            return Ok(None);
        }
        let new = request.get(from..).unwrap_or_default();
        if new.windows(4).any(|end| end == b"\r\n\r\n") || new.windows(2).any(|end| end == b"\n\n") {
            return Ok(Some(request));
        }
    }
}

/// What is asked for, without a query.
fn path(request: &[u8]) -> Result<&str, Answer> {
    let malformed = || Answer::problem("400 Bad Request", "this is no request of HTTP/1");
    let line = request.split(|byte| *byte == b'\n').next().unwrap_or_default();
    let line = std::str::from_utf8(line).map_err(|_| malformed())?;
    let mut words = line.trim_end_matches('\r').split(' ');
    let (Some(method), Some(target), Some(version), None) = (words.next(), words.next(), words.next(), words.next())
    else {
        return Err(malformed());
    };
    if !version.starts_with("HTTP/1.") {
        return Err(malformed());
    }
    if method != "GET" {
        return Err(Answer {
            more: "Allow: GET\r\n",
            ..Answer::problem("405 Method Not Allowed", "only GET is answered")
        });
    }
    Ok(target.split('?').next().unwrap_or(target))
}

fn write(mut caller: &UnixStream, deadline: Instant, bytes: &[u8]) -> io::Result<()> {
    let mut rest = bytes;
    while !rest.is_empty() {
        caller.set_write_timeout(Some(left(deadline)?))?;
        match caller.write(rest) {
            Ok(0) => return Err(ErrorKind::WriteZero.into()),
            Ok(count) => rest = rest.get(count..).unwrap_or_default(),
            Err(error) if error.kind() == ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    Ok(())
}

/// Never zero, which would be no timeout at all.
fn left(deadline: Instant) -> io::Result<std::time::Duration> {
    let left = deadline.saturating_duration_since(Instant::now());
    match left.is_zero() {
        true => Err(ErrorKind::TimedOut.into()),
        false => Ok(left),
    }
}

#[cfg(test)]
mod tests {
    use std::thread;
    use std::time::Duration;

    use super::*;

    fn told(request: &[u8], patience: Duration) -> Option<String> {
        let (ours, mut theirs) = UnixStream::pair().unwrap();
        let request = request.to_vec();
        let asking = thread::spawn(move || {
            let _ = theirs.write_all(&request);
            let mut answer = String::new();
            let _ = theirs.read_to_string(&mut answer);
            answer
        });
        let found = |path: &str| (path == "/metrics").then(|| Answer::found("text/plain", "body".into()));
        let served = serve(&ours, Instant::now() + patience, found).is_ok();
        drop(ours);
        let answer = asking.join().unwrap();
        served.then_some(answer)
    }

    #[test]
    fn a_get_is_answered_and_nothing_else() {
        let status = |request: &str| {
            let answer = told(request.as_bytes(), Duration::from_secs(30)).unwrap();
            let (status, rest) = answer.split_once("\r\n").unwrap();
            let (head, body) = rest.split_once("\r\n\r\n").unwrap();
            assert!(
                head.contains(&format!("Content-Length: {}\r\n", body.len())),
                "{answer}"
            );
            status.to_owned()
        };
        for get in [
            "GET /metrics HTTP/1.1\r\nHost: xen\r\n\r\n",
            "GET /metrics?name=x HTTP/1.0\n\n",
        ] {
            assert_eq!(status(get), "HTTP/1.1 200 OK");
        }
        for (request, expected) in [
            ("GET / HTTP/1.1\r\n\r\n", "404 "),
            ("POST /metrics HTTP/1.1\r\n\r\n", "405 "),
            ("GET /metrics\r\n\r\n", "400 "),
            ("GET /metrics SPDY/3\r\n\r\n", "400 "),
            ("GET  /metrics HTTP/1.1\r\n\r\n", "400 "),
            ("\r\n\r\n", "400 "),
        ] {
            assert!(
                status(request).starts_with(&format!("HTTP/1.1 {expected}")),
                "{request}: {}",
                status(request)
            );
        }
        let long = format!(
            "GET /metrics HTTP/1.1\r\nCookie: {}\r\n\r\n",
            "x".repeat(MAX_REQUEST_BYTES)
        );
        assert!(status(&long).starts_with("HTTP/1.1 431 "));
        let binary = told(b"GET /\xff HTTP/1.1\r\n\r\n", Duration::from_secs(30)).unwrap();
        assert!(binary.starts_with("HTTP/1.1 400 "));
    }

    #[test]
    fn nobody_takes_longer_than_the_deadline() {
        let begin = Instant::now();
        let (ours, theirs) = UnixStream::pair().unwrap();
        let drops = thread::spawn(move || {
            // A byte at a time, and never an end.
            while (&theirs).write_all(b"G").is_ok() {
                thread::sleep(Duration::from_millis(5));
            }
        });
        assert!(serve(&ours, begin + Duration::from_millis(200), |_| None).is_err());
        drop(ours);
        drops.join().unwrap();
        // One that asks and does not read.
        let (ours, theirs) = UnixStream::pair().unwrap();
        (&theirs).write_all(b"GET / HTTP/1.1\r\n\r\n").unwrap();
        let large = |_: &str| Some(Answer::found("text/plain", "x".repeat(8 << 20)));
        assert!(serve(&ours, Instant::now() + Duration::from_millis(200), large).is_err());
        assert!(begin.elapsed() < Duration::from_secs(20));
    }
}
