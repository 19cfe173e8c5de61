//! What ends a migration early.
use std::error::Error;
use std::io;

use crate::codec::CodecError;
use crate::page::Pfn;
use crate::stream::StreamError;
use crate::table::TooSparse;
use crate::wire::WireError;

/// A frame of the guest could not be read.
#[derive(Debug, thiserror::Error)]
pub enum FrameError {
    #[error("the guest under construction was not found: {0}")]
    NoGuest(String),
    #[error("the suspended guest, whose memory this is, is not there any more: {0}")]
    Gone(String),
    #[error("page {pfn} cannot be read")]
    Unreadable { pfn: Pfn, source: io::Error },
    #[error("Xen refused: {0}")]
    Xen(String),
}

/// Why the stream did not get through. Before GO each of these leaves the guest running at the source.
#[derive(Debug, thiserror::Error)]
pub enum EngineError {
    #[error("xl's stream is not what was expected")]
    Stream(#[from] StreamError),
    #[error("the connection to the other host failed")]
    Wire(#[from] WireError),
    #[error("nothing came from the other host for {seconds} s")]
    Silent { seconds: u64 },
    #[error("rows of a record are not valid")]
    Codec(#[from] CodecError),
    #[error("writing to xl failed: it has ended")]
    Xl(#[source] io::Error),
    #[error("the memory of the guest cannot be reached")]
    Frame(#[from] FrameError),
    #[error("pages that follow the guest are lost")]
    CopyGone(#[source] FrameError),
    #[error(transparent)]
    TooSparse(#[from] TooSparse),
    #[error("page {pfn} refers to page {target}, which holds nothing yet")]
    DanglingReference { pfn: Pfn, target: Pfn },
    #[error("page {target}, referred to by page {pfn}, does not hold any more what it held when it arrived")]
    ReferenceChanged { pfn: Pfn, target: Pfn },
    #[error("page {pfn} does not hold the content that was named for it")]
    ContentDiffers { pfn: Pfn },
    #[error("the peer does not keep to the protocol: {0}")]
    Protocol(&'static str),
    #[error("the two hosts disagree about the guest's {rows} rows: the rebuilt memory is not the one that was sent")]
    DigestDiffers { rows: u64 },
    #[error("{count} pages read back are not what was carried for them; the first is page {first}")]
    VerifyFailed { count: u64, first: Pfn },
    #[error("the other host refused the rebuilt guest: {0}")]
    Refused(String),
    #[error("the other host gave up: {0}")]
    PeerAborted(String),
    #[error("xl on the other host ended with status {0}")]
    RemoteEnded(i32),
    #[error(
        "the guest writes faster than the link takes: it would stand still for about {expected_ms} ms, and no more than {limit_ms} are allowed"
    )]
    NoConvergence { expected_ms: u64, limit_ms: u64 },
    #[error(
        "xl compares all of the guest's memory (--debug), some of which was to follow it: leave --debug out, or use --mode precopy"
    )]
    ComparedWhole,
    #[error("stopped: {0}")]
    Stopped(String),
    #[error("it cannot be noted that the guest starts here")]
    NotNoted(#[source] io::Error),
    #[error("a worker thread ended early")]
    WorkerLost,
    #[error("no thread could be started")]
    Thread(#[source] io::Error),
}

/// What the peer says of its failure, fit for a terminal.
pub(super) fn peer_words(body: &[u8]) -> String {
    printable(&String::from_utf8_lossy(body))
}

/// A peer's words fit for a terminal: one line, not too long, without control characters.
pub fn printable(text: &str) -> String {
    let clean = |character: char| if character.is_control() { ' ' } else { character };
    text.chars().take(MOST_PEER_WORDS).map(clean).collect()
}

const MOST_PEER_WORDS: usize = 2000;

/// An error and all that caused it, in one line.
pub fn chain(error: &dyn Error) -> String {
    let mut text = error.to_string();
    let mut next = error.source();
    while let Some(cause) = next {
        let words = cause.to_string();
        if !text.ends_with(&words) {
            text.push_str(": ");
            text.push_str(&words);
        }
        next = cause.source();
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_peer_does_not_write_to_the_terminal() {
        assert_eq!(peer_words(b"no room\x1b[2J\nhere\xff"), "no room [2J here\u{fffd}");
        assert_eq!(peer_words(&[b'a'; 5000]).len(), MOST_PEER_WORDS);
    }
}
