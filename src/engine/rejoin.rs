//! A connection that was lost while pages followed the guest is set up again.
//!
//! ```text
//!   source agent                                              destination agent
//!      │  a new ssh every two seconds, until one answers          │  the guest stands still
//!      │ ◀── Hello ───────────────────────────────────────────────┤
//!      ├─ Hello(token), Rejoin(bytes heard of xl) ───────────────▶│  another token: Abort
//!      │ ◀── Missing…, [Started], Xl from there on, [Figures, Exit]┤  the guest goes on
//!      ├─ Late ─ ─ ─ ─ ─ ─ ▶                      ◀─ ─ ─ ─ Want ─ ┤
//! ```
//!
//! The source says nothing before it has chosen among the connections that came about: what it says replaces the
//! destination's connection by this one.
use std::io::{self, Read};
use std::sync::Arc;
use std::time::{Duration, Instant};

use crossbeam_channel::unbounded;

use super::error::peer_words;
use super::link::{Carrier, Hangup, LinkEnds, Outgoing, Watch, Watched};
use super::threads::spawn;
use super::{EngineError, chain};
use crate::page_set::PageSet;
use crate::wire::{FrameReader, FrameWriter, Hello, Kind, WireError, missing, u64_body};

/// Silence after which a connection is given up while pages follow the guest: there is another one to be had, and TCP, which
/// doubles its waiting time, may wait for longer than that takes.
pub(super) const SILENCE: Duration = Duration::from_secs(4);

/// A connection on which fewer pages came than these was of no use.
const FEW_PAGES: u64 = 64;

/// How much silence is borne: a host that is busy for so long would lose each connection, so the more of them in a row were of no
/// use, the more.
#[derive(Debug, Default)]
pub(super) struct Patience {
    useless: u32,
    /// Pages that were missing when the last connection began, if it was not the first.
    missing: Option<u64>,
}

impl Patience {
    /// A connection that was lost is set up again, with so many pages missing. The silence after which that one is given up.
    pub fn connected_again(&mut self, missing: u64) -> Duration {
        let useless = self
            .missing
            .is_some_and(|before| before.saturating_sub(missing) < FEW_PAGES);
        self.useless = if useless { self.useless.saturating_add(1) } else { 0 };
        self.missing = Some(missing);
        SILENCE * (1 << self.useless.min(3))
    }
}

/// How long the two may take to greet each other: hosts may be slow.
const GREETING: Duration = Duration::from_secs(30);

/// How long all of that may take.
const GREETED: Duration = Duration::from_secs(120);

/// How often a connection is tried, how soon after one that has failed was begun, and how many at once. Several, since one that began while nothing got through may take
/// long to notice that something does.
const EVERY: Duration = Duration::from_secs(2);
const AFTER_FAILED: Duration = Duration::from_secs(1);
const AT_ONCE: usize = 4;

/// The same once one has taken too long: on a slow host they are in each other's way.
const AT_ONCE_SLOW: usize = 2;

/// How long each may take at first, from when it stands where that can be seen, and at most: hosts may be slow.
const ATTEMPT: Duration = Duration::from_secs(8);
const LONGEST_ATTEMPT: Duration = Duration::from_secs(60);

/// How often it is looked around meanwhile.
const LOOK_AROUND: Duration = Duration::from_millis(100);

/// Begins another connection to the other host, on which the destination's agent speaks first.
pub type Connect = Box<dyn FnMut() -> io::Result<LinkEnds> + Send>;

pub(super) type Incoming = FrameReader<Watched<Box<dyn Read + Send>>>;

/// The source's end of a new connection.
pub(super) struct Rejoined {
    pub reader: Incoming,
    pub watch: Watch,
    pub out: Outgoing,
    pub hangup: Hangup,
    pub carrier: Arc<dyn Carrier>,
    /// Whoever goes on there looks contents up.
    pub late_known: bool,
    /// What has not arrived.
    pub missing: PageSet,
}

/// What the source says on a new connection.
pub(super) struct Saying<'a> {
    pub hello: &'a Hello,
    /// Bytes of the destination's xl that have come.
    pub heard: u64,
    /// One more than the highest page that may be missing.
    pub bound: u64,
}

/// Connections that are being tried. Dropped, they end.
#[derive(Default)]
struct Attempts(Vec<Attempt>);

struct Attempt {
    number: u64,
    begun: Instant,
    hangup: Hangup,
    carrier: Arc<dyn Carrier>,
    /// Since when the other host has been known to answer.
    stood: Option<Instant>,
    /// Whether it was seen to wait for that.
    unanswered: bool,
}

impl Attempt {
    fn look(&mut self, now: Instant) {
        if self.stood.is_some() {
            return;
        }
        let answered = self.carrier.is_answered();
        self.unanswered = answered == Some(false);
        if answered == Some(true) {
            log::debug!("connection {} is answered after {:?}", self.number, now - self.begun);
            self.stood = Some(now);
        }
    }

    /// Whether the other host has taken too long over it.
    fn is_slow(&self, now: Instant, allowed: Duration) -> bool {
        now - self.stood.unwrap_or(self.begun) > allowed
    }
}

impl Attempts {
    /// Ends some; how many.
    fn end(&mut self, which: impl Fn(&Attempt) -> bool) -> usize {
        let ended = self.0.extract_if(.., |attempt| which(attempt));
        ended.map(|attempt| (attempt.hangup)()).count()
    }

    /// Ends what has no prospect. Where one stands, the others would only keep both hosts from it: it is by itself for half of
    /// `allowed`, in which case that is `true`. `allowed` grows where one was slow.
    fn clear(&mut self, now: Instant, allowed: &mut Duration) -> bool {
        self.0.iter_mut().for_each(|attempt| attempt.look(now));
        self.end(|attempt| attempt.unanswered && now - attempt.begun > SILENCE);
        if self.end(|attempt| attempt.is_slow(now, *allowed)) > 0 {
            *allowed = (*allowed * 3 / 2).min(LONGEST_ATTEMPT);
        }
        let first = self
            .0
            .iter()
            .filter_map(|attempt| Some((attempt.stood?, attempt.number)))
            .min();
        let Some((_, alone)) = first.filter(|(stood, _)| now - *stood < *allowed / 2) else {
            return false;
        };
        self.end(|attempt| attempt.number != alone);
        true
    }
}

impl Drop for Attempts {
    fn drop(&mut self) {
        self.end(|_| true);
    }
}

/// Tries until the destination answers. `look` is called all the while; what it returns ends it. Errors: that, or the
/// destination refuses for good.
pub(super) fn connect_again(
    connect: &mut Connect,
    saying: &Saying<'_>,
    mut look: impl FnMut() -> Result<(), EngineError>,
) -> Result<Rejoined, EngineError> {
    let (answers, answered) = unbounded();
    let mut attempts = Attempts::default();
    let (mut begun, mut number, mut allowed) = (Instant::now(), 0, ATTEMPT);
    let mut next = begun;
    loop {
        look()?;
        let now = Instant::now();
        let is_alone = attempts.clear(now, &mut allowed);
        let at_once = if allowed > ATTEMPT { AT_ONCE_SLOW } else { AT_ONCE };
        if now >= next && !is_alone && attempts.0.len() < at_once {
            (next, begun) = (now + EVERY, now);
            number += 1;
            log::debug!("connection {number} is begun");
            match connect() {
                Ok(mut ends) => {
                    let (hello, answers) = (saying.hello.clone(), answers.clone());
                    attempts.0.push(Attempt {
                        number,
                        begun: now,
                        hangup: ends.hangup.clone(),
                        carrier: ends.carrier.clone(),
                        stood: None,
                        unanswered: false,
                    });
                    spawn("xenfold-again", move || {
                        let answer = hello.agree(&mut ends.from_peer);
                        let answer = answer.map(|agreement| (ends, agreement.late_known));
                        // Nobody waits any more when another attempt was quicker.
                        let _ = answers.send((number, answer));
                    })?;
                }
                Err(error) => log::debug!("a new connection cannot be begun: {error}"),
            }
        }
        let Ok((answering, answer)) = answered.recv_timeout(LOOK_AROUND) else {
            continue;
        };
        let known = attempts.0.extract_if(.., |attempt| attempt.number == answering).count();
        let (ends, late_known) = match answer {
            Ok(answer) if known > 0 => answer,
            Ok((ends, _)) => {
                (ends.hangup)();
                continue;
            }
            Err(error) => {
                log::debug!("connection {answering} has failed: {}", chain(&error));
                if known > 0 {
                    next = next.min(begun + AFTER_FAILED);
                }
                continue;
            }
        };
        log::debug!("connection {answering} is there");
        attempts.end(|_| true);
        let hangup = ends.hangup.clone();
        match greet(ends, saying) {
            Ok(rejoined) => return Ok(Rejoined { late_known, ..rejoined }),
            Err(error) => {
                hangup();
                if !matches!(error, EngineError::Wire(_) | EngineError::Silent { .. }) {
                    return Err(error);
                }
                log::debug!("a new connection has failed: {}", chain(&error));
            }
        }
    }
}

/// The destination has said who it is.
fn greet(ends: LinkEnds, saying: &Saying<'_>) -> Result<Rejoined, EngineError> {
    let LinkEnds {
        mut to_peer,
        from_peer,
        hangup,
        carrier,
    } = ends;
    let (from_peer, watch) = Watched::new(from_peer, GREETING, hangup.clone())?;
    // A failure to send shows as an end when reading, which tells more.
    let _ = saying.hello.write(&mut to_peer);
    let mut out: Outgoing = FrameWriter::new(to_peer);
    let _ = out.write(Kind::Rejoin, &[&saying.heard.to_le_bytes()]);
    let mut reader = FrameReader::new(from_peer);
    let mut pages = PageSet::new(saying.bound);
    let (mut behind, begin) = (0, Instant::now());
    loop {
        let frame = reader.read()?;
        // Signs of life alone are no answer.
        if begin.elapsed() > GREETED {
            return Err(EngineError::Silent {
                seconds: GREETED.as_secs(),
            });
        }
        match frame.kind {
            Kind::Missing if frame.body.is_empty() => break,
            Kind::Missing => {
                for run in missing(&frame.body)? {
                    if run.start < behind || run.end > saying.bound {
                        return Err(EngineError::Protocol("it lacks pages that were never late"));
                    }
                    behind = run.end;
                    pages.insert_run(run);
                }
            }
            Kind::Ping if frame.body.is_empty() => {}
            Kind::Abort => return Err(EngineError::PeerAborted(peer_words(&frame.body))),
            _ => return Err(EngineError::Protocol("a new connection began with another frame")),
        }
    }
    Ok(Rejoined {
        reader,
        watch,
        out,
        hangup,
        carrier,
        late_known: false,
        missing: pages,
    })
}

/// The destination's end of a new connection.
pub(super) struct Joined {
    pub reader: Incoming,
    pub watch: Watch,
    pub out: Outgoing,
    pub hangup: Hangup,
    pub carrier: Arc<dyn Carrier>,
    /// Bytes of xl that the source has heard.
    pub heard: u64,
}

/// Hears who connects. Errors: it does not know the token, or says nothing.
pub(super) fn admit(ends: LinkEnds, hello: &Hello, token: &str) -> Result<Joined, EngineError> {
    let LinkEnds {
        mut to_peer,
        from_peer,
        hangup,
        carrier,
    } = ends;
    hello.write(&mut to_peer)?;
    let (mut from_peer, watch) = Watched::new(from_peer, GREETING, hangup.clone())?;
    let agreement = hello.agree(&mut from_peer)?;
    let mut out: Outgoing = FrameWriter::new(to_peer);
    if !agreement
        .rejoin
        .is_some_and(|said| same(said.as_bytes(), token.as_bytes()))
    {
        const WRONG: &str = "whoever connects is not the source of this guest";
        out.write(Kind::Abort, &[WRONG.as_bytes()])
            .map_err(|error| EngineError::Wire(error.into()))?;
        return Err(EngineError::Protocol(WRONG));
    }
    let mut reader = FrameReader::new(from_peer);
    let frame = reader.read()?;
    if frame.kind != Kind::Rejoin {
        return Err(EngineError::Protocol("a new connection began with another frame"));
    }
    let heard = u64_body(frame.kind, &frame.body)?;
    Ok(Joined {
        reader,
        watch,
        out,
        hangup,
        carrier,
        heard,
    })
}

/// Compares without telling by the time it takes how much was right.
fn same(one: &[u8], other: &[u8]) -> bool {
    one.len() == other.len() && one.iter().zip(other).fold(0, |differ, (a, b)| differ | (a ^ b)) == 0
}

/// Tells a source that connects again that nobody here waits for it, and why.
pub fn refuse(mut ends: LinkEnds, why: &str) -> Result<(), EngineError> {
    Hello {
        program: crate::VERSION.into(),
        ..Hello::default()
    }
    .write(&mut ends.to_peer)?;
    let (mut from_peer, _watch) = Watched::new(ends.from_peer, GREETING, ends.hangup)?;
    Hello::default().agree(&mut from_peer)?;
    let abort = FrameWriter::new(&mut ends.to_peer).write(Kind::Abort, &[why.as_bytes()]);
    abort.map_err(WireError::Io)?;
    // It goes when it has heard that. What it says until then must find a reader, or it hears nothing.
    let (mut rest, begin) = ([0; 4096], Instant::now());
    while begin.elapsed() < GREETED && from_peer.read(&mut rest).map_err(WireError::Io)? > 0 {}
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::super::link::tests::Answered;
    use super::*;

    #[test]
    fn patience_grows_with_connections_that_are_of_no_use() {
        let mut patience = Patience::default();
        let mut seconds = |missing| patience.connected_again(missing).as_secs();
        let useless = [1000, 990, 990, 980, 980].map(&mut seconds);
        assert_eq!(useless, [4, 8, 16, 32, 32]);
        assert_eq!([900, 850, 100].map(seconds), [4, 8, 4]);
    }

    /// Attempts that were begun so many seconds ago and stand, wait for an answer, or cannot be seen to.
    fn attempts(begun: &[(u64, Option<bool>)], now: Instant) -> Attempts {
        let numbered = (1..).zip(begun);
        let attempts = numbered.map(|(number, (ago, stands))| Attempt {
            number,
            begun: now - Duration::from_secs(*ago),
            hangup: Arc::new(|| ()),
            carrier: Arc::new(Answered(*stands)),
            stood: None,
            unanswered: false,
        });
        Attempts(attempts.collect())
    }

    #[test]
    fn an_attempt_that_stands_is_by_itself_for_a_while() {
        let start = Instant::now() + Duration::from_secs(100);
        let mut allowed = ATTEMPT;
        let mut look = |attempts: &mut Attempts, seconds: u64| {
            let alone = attempts.clear(start + Duration::from_secs(seconds), &mut allowed);
            let left: Vec<u64> = attempts.0.iter().map(|attempt| attempt.number).collect();
            (alone, left, allowed.as_secs())
        };
        let mut several = attempts(&[(4, Some(false)), (2, Some(true)), (1, Some(true)), (0, None)], start);
        assert_eq!(look(&mut several, 0), (true, vec![2], 8));
        assert_eq!(look(&mut several, 3), (true, vec![2], 8));
        assert_eq!(look(&mut several, 4), (false, vec![2], 8), "others may begin");
        assert_eq!(look(&mut several, 9), (false, vec![], 12), "it was slow");
    }

    #[test]
    fn what_is_not_answered_allows_no_more_time() {
        let start = Instant::now() + Duration::from_secs(100);
        let mut allowed = ATTEMPT;
        let mut unanswered = attempts(&[(6, Some(false)), (4, Some(false)), (6, None)], start);
        assert!(!unanswered.clear(start, &mut allowed));
        let left: Vec<u64> = unanswered.0.iter().map(|attempt| attempt.number).collect();
        assert_eq!((left, allowed), (vec![2, 3], ATTEMPT));
        let mut unseen = attempts(&[(9, None), (7, None)], start);
        assert!(!unseen.clear(start, &mut allowed));
        assert_eq!((unseen.0.len(), allowed), (1, ATTEMPT * 3 / 2));
    }

    #[test]
    fn tokens_are_compared_whole() {
        assert!(same(b"0123", b"0123"));
        for other in ["0124", "1123", "012", "01234", ""] {
            assert!(!same(b"0123", other.as_bytes()), "{other}");
        }
    }
}
