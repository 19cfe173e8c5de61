//! Messages on the socket: a JSON header, a NUL, the payload.
use std::io::{self, BufRead, Read, Write};
use std::path::PathBuf;

use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use thiserror::Error;

use super::VERSION;
use super::message::{Refusal, Reply, Request};
use super::payload::MalformedPayload;

/// Longest header of a request.
pub const MAX_REQUEST_BYTES: usize = 64 << 10;

/// Longest header of an answer: statistics of some 15,000 groups fit, and words of a request repeated in an error.
pub const MAX_REPLY_BYTES: usize = 4 << 20;

/// Longest payload of one message: more travels in several.
pub const MAX_PAYLOAD_BYTES: usize = 4 << 20;

/// Why a message could not be carried, or what the daemon answered instead of what was asked.
#[derive(Debug, Error)]
pub enum ControlError {
    #[error("no xenfoldd answers on {path}; start it with `systemctl start xenfoldd`", path = .path.display())]
    NotRunning { path: PathBuf, source: io::Error },
    #[error("the connection to the daemon failed")]
    Io(#[from] io::Error),
    #[error("the connection was closed")]
    Closed,
    #[error("the connection broke off inside a message")]
    Cut,
    #[error("a header of more than {most} bytes")]
    LongHeader { most: usize },
    #[error("a header that is no message")]
    BadHeader(#[source] serde_json::Error),
    #[error("version {there} of the control protocol; here {VERSION} is spoken: install the same xenfold everywhere")]
    Version { there: u16 },
    #[error("a payload of {bytes} bytes; {MAX_PAYLOAD_BYTES} are allowed")]
    LongPayload { bytes: u64 },
    #[error("the payload of {what} is malformed")]
    Payload {
        what: &'static str,
        source: MalformedPayload,
    },
    #[error("the daemon refuses: {0}")]
    Refused(Refusal),
    #[error("the daemon answered {what} with something else")]
    Unexpected { what: &'static str },
}

/// A header's meaning and the bytes behind it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Message<T> {
    pub body: T,
    pub payload: Vec<u8>,
}

#[derive(Deserialize)]
struct Envelope {
    version: u16,
    #[serde(default)]
    payload_bytes: u64,
}

#[derive(Serialize)]
struct Written<'a, T> {
    version: u16,
    payload_bytes: u64,
    #[serde(flatten)]
    body: &'a T,
}

/// What travels in one direction.
pub trait Body: Serialize + DeserializeOwned {
    /// Longest header.
    const MOST_BYTES: usize;
}

impl Body for Request {
    const MOST_BYTES: usize = MAX_REQUEST_BYTES;
}

impl Body for Reply {
    const MOST_BYTES: usize = MAX_REPLY_BYTES;
}

/// Reads one message. Room is made as bytes arrive, up to the caps. Errors: [`ControlError::Closed`] when nothing
/// came; after any error the connection is of no use.
pub fn read_message<T: Body>(reader: &mut impl BufRead) -> Result<Message<T>, ControlError> {
    let mut header = Vec::new();
    let limit = T::MOST_BYTES as u64 + 1;
    reader.by_ref().take(limit).read_until(0, &mut header)?;
    if header.is_empty() {
        return Err(ControlError::Closed);
    }
    if header.pop() != Some(0) {
        let cut = (header.len() as u64) + 1 < limit;
        return Err(if cut {
            ControlError::Cut
        } else {
            ControlError::LongHeader { most: T::MOST_BYTES }
        });
    }
    // The version first: a newer one may have messages that are unknown here.
    let envelope: Envelope = serde_json::from_slice(&header).map_err(ControlError::BadHeader)?;
    if envelope.version != VERSION {
        return Err(ControlError::Version {
            there: envelope.version,
        });
    }
    if envelope.payload_bytes > MAX_PAYLOAD_BYTES as u64 {
        return Err(ControlError::LongPayload {
            bytes: envelope.payload_bytes,
        });
    }
    let body = serde_json::from_slice(&header).map_err(ControlError::BadHeader)?;
    let mut payload = Vec::new();
    reader.take(envelope.payload_bytes).read_to_end(&mut payload)?;
    if payload.len() as u64 != envelope.payload_bytes {
        return Err(ControlError::Cut);
    }
    Ok(Message { body, payload })
}

/// Writes one message. Errors: those of the socket, and a header or payload above its cap, of which nothing is sent.
pub fn write_message<T: Body>(writer: &mut impl Write, body: &T, payload: &[u8]) -> Result<(), ControlError> {
    let payload_bytes = payload.len() as u64;
    if payload.len() > MAX_PAYLOAD_BYTES {
        return Err(ControlError::LongPayload { bytes: payload_bytes });
    }
    let written = Written {
        version: VERSION,
        payload_bytes,
        body,
    };
    let mut header = serde_json::to_vec(&written).map_err(ControlError::BadHeader)?;
    if header.len() > T::MOST_BYTES {
        return Err(ControlError::LongHeader { most: T::MOST_BYTES });
    }
    header.push(0);
    writer.write_all(&header)?;
    writer.write_all(payload)?;
    writer.flush()?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(bytes: &[u8]) -> Result<Message<Request>, ControlError> {
        read_message(&mut &bytes[..])
    }

    #[test]
    fn a_message_is_json_a_nul_and_its_payload() {
        let mut bytes = Vec::new();
        write_message(&mut bytes, &Request::Want {}, b"0123456789abcdef").unwrap();
        assert_eq!(
            bytes,
            b"{\"version\":1,\"payload_bytes\":16,\"request\":\"want\"}\x000123456789abcdef"
        );
        let message = read(&bytes).unwrap();
        assert_eq!((message.body, message.payload.len()), (Request::Want {}, 16));
        for end in 0..bytes.len() {
            let error = read(&bytes[..end]).unwrap_err();
            assert_eq!(matches!(error, ControlError::Closed), end == 0, "cut at {end}: {error}");
        }
    }

    #[test]
    fn what_is_no_message_is_refused() {
        let refused = |bytes: &[u8]| read(bytes).unwrap_err();
        assert!(matches!(refused(b"not json\0"), ControlError::BadHeader(_)));
        assert!(matches!(refused(b"\0"), ControlError::BadHeader(_)));
        assert!(matches!(refused(b"{}\0"), ControlError::BadHeader(_)));
        assert!(matches!(
            refused(b"{\"version\":1,\"request\":\"dance\"}\0"),
            ControlError::BadHeader(_)
        ));
        assert!(matches!(
            refused(b"{\"version\":2,\"request\":\"dance\"}\0"),
            ControlError::Version { there: 2 }
        ));
        assert!(matches!(
            refused(b"{\"version\":1,\"request\":\"want\",\"payload_bytes\":18446744073709551615}\0"),
            ControlError::LongPayload { bytes: u64::MAX }
        ));
        assert!(matches!(
            refused(b"{\"version\":1,\"request\":\"want\",\"payload_bytes\":-1}\0"),
            ControlError::BadHeader(_)
        ));
        assert!(matches!(
            refused(&[b' '; MAX_REQUEST_BYTES + 2]),
            ControlError::LongHeader { .. }
        ));
        assert!(matches!(
            refused(&[b'['; MAX_REQUEST_BYTES]),
            ControlError::Cut | ControlError::LongHeader { .. }
        ));
        let deep = [&[b'['; 60_000][..], b"\0"].concat();
        assert!(matches!(refused(&deep), ControlError::BadHeader(_)));
    }

    #[test]
    fn members_and_codes_of_a_newer_daemon_are_ignored() {
        let bytes = b"{\"version\":1,\"reply\":\"error\",\"code\":\"too-shy\",\"message\":\"no\",\"mood\":1}\0";
        let message: Message<Reply> = read_message(&mut &bytes[..]).unwrap();
        let Reply::Error(refusal) = message.body else { panic!() };
        assert_eq!(refusal.to_string(), "no");
    }
}
