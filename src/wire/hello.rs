//! The first bytes of each side: magic, versions, options. Both sides speak at once and each draws the same conclusion.
use std::io::{Read, Write};

use serde::{Deserialize, Serialize};

use super::frame::{WireError, read_up_to};
use crate::page::{ContentKey, Pfn};

/// The newest protocol version spoken here.
pub const VERSION_MAX: u16 = 1;
/// The oldest protocol version spoken here.
pub const VERSION_MIN: u16 = 1;

const MAGIC: [u8; 8] = *b"XENFOLD\n";
const FIXED_BYTES: usize = 16;
const MAX_OPTIONS_BYTES: u32 = 64 << 10;

/// What one side says of itself. Unknown options of a newer peer are ignored, absent ones take their defaults.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Hello {
    /// Program and version, for messages only.
    pub program: String,
    /// Source: the key of content ids for this migration, 64 hexadecimal digits.
    pub content_key: Option<String>,
    /// Source: read every frame back before libxl's END is let through.
    pub verify: bool,
    /// Destination: contents of the guest under construction can be read back (HVM and PVH).
    pub frames: bool,
    /// Destination: rows that are certainly still in memory when a reference to them comes.
    pub window_rows: u32,
    /// Destination: answers pings in the order of the stream, so that what is under way can be bounded.
    pub paces: bool,
    /// Rows may name contents that the destination holds elsewhere. Source: it answers what is needed after all.
    /// Destination: it says what it holds, before the stream begins.
    pub contents: bool,
    /// Pages may follow the guest when it runs at the destination. Source: it wants that. Destination: it can.
    pub late: bool,
    /// Destination: why it cannot.
    pub late_missing: String,
    /// Late pages may be named by a content that the destination holds. Both: they know such rows.
    pub late_known: bool,
    /// Source: what is needed to take late pages out of the guest while it still runs there, where that can be done.
    pub early: Option<EarlyOut>,
    /// Destination: it does so.
    pub takes_early: bool,
    /// Source: what proves that a new connection is this source's, when this one is lost while pages follow the guest: 32
    /// hexadecimal digits by chance.
    pub rejoin_token: Option<String>,
    /// Destination: it waits for a new connection then.
    pub rejoins: bool,
    /// Destination: it keeps what the source has learnt of how the guest writes.
    pub keeps_model: bool,
    /// Source: the guest's uuid and name, and the sharing group whose key this is.
    pub guest_uuid: String,
    pub guest_name: String,
    pub group: String,
    /// Source: names this migration. Should nobody hear whether the guest was started, the destination is asked.
    pub migration: String,
    /// Seconds of silence after which the sender of this hello gives the connection up.
    pub timeout_s: u32,
}

/// The most pages of which a guest's early ones are noted: 1 TiB.
const MAX_EARLY_PAGES: u64 = 1 << 28;

/// The most pages that are never early.
const MAX_NEVER: usize = 64;

/// What the destination has to know of the guest to take late pages out of it before it is suspended.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct EarlyOut {
    /// The page for the ring (HVM_PARAM_PAGING_RING_PFN), which otherwise comes with the last records.
    pub ring_page: u64,
    /// How many pages the guest has, and their highest number.
    pub pages: u64,
    pub highest_page: u64,
    /// Pages to which Xen's toolstack writes by itself.
    pub never: Vec<u64>,
}

impl EarlyOut {
    /// One more than the highest page that may be early.
    pub fn bound(&self) -> u64 {
        self.highest_page.saturating_add(1).min(MAX_EARLY_PAGES)
    }

    /// Pages that may not be.
    pub fn never(&self) -> impl Iterator<Item = Pfn> + '_ {
        let never = self.never.iter().take(MAX_NEVER);
        never.chain([&self.ring_page]).filter_map(|pfn| Pfn::new(*pfn))
    }
}

/// What two hellos come to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Agreement {
    pub version: u16,
    /// Both sides speak of contents, and what is under way is bounded.
    pub contents: bool,
    /// Pages may follow the guest.
    pub late: bool,
    /// Late pages may be named by content.
    pub late_known: bool,
    /// Those that are late already go out of the guest under construction while it still runs at the source.
    pub early: bool,
    /// A connection that is lost while they do is set up again; with this token.
    pub rejoin: Option<String>,
    pub peer: Hello,
}

impl Agreement {
    /// At the source: no row refers to another page. That none names a content is said in the own hello.
    pub fn without_references(&mut self) {
        self.peer.frames = false;
        self.peer.window_rows = 0;
    }
}

const TOKEN_DIGITS: usize = 32;

/// Whether nobody can have guessed it.
fn is_token(text: &str) -> bool {
    text.len() == TOKEN_DIGITS && text.bytes().all(|byte| byte.is_ascii_hexdigit())
}

impl Hello {
    /// The key that this hello carries. Errors: absent or not 64 hexadecimal digits.
    pub fn key(&self) -> Result<ContentKey, WireError> {
        let text = self
            .content_key
            .as_deref()
            .ok_or(WireError::BadHello("the source sent no content key"))?;
        ContentKey::from_hex(text).ok_or(WireError::BadHello("the content key is not 64 hexadecimal digits"))
    }

    pub fn with_key(mut self, key: &ContentKey) -> Hello {
        self.content_key = Some(key.hex());
        self
    }

    /// Sends this hello, offering [`VERSION_MIN`] to [`VERSION_MAX`].
    pub fn write(&self, writer: &mut impl Write) -> Result<(), WireError> {
        let options =
            serde_json::to_vec(self).map_err(|_| WireError::BadHello("own options cannot be written as JSON"))?;
        let mut bytes = Vec::with_capacity(FIXED_BYTES + options.len() + 4);
        bytes.extend_from_slice(&MAGIC);
        bytes.extend_from_slice(&VERSION_MIN.to_le_bytes());
        bytes.extend_from_slice(&VERSION_MAX.to_le_bytes());
        bytes.extend_from_slice(&(options.len() as u32).to_le_bytes());
        bytes.extend_from_slice(&options);
        bytes.extend_from_slice(&crc32fast::hash(&bytes).to_le_bytes());
        writer.write_all(&bytes)?;
        writer.flush()?;
        Ok(())
    }

    /// Reads the peer's hello, ours being this one, and agrees on the newest common version. Errors: [`WireError::Closed`] when nothing came,
    /// [`WireError::NoHello`] when something else did, [`WireError::NoCommonVersion`].
    pub fn agree(&self, reader: &mut impl Read) -> Result<Agreement, WireError> {
        let mut fixed = [0; FIXED_BYTES];
        let arrived = read_up_to(reader, &mut fixed)?;
        if arrived == 0 {
            return Err(WireError::Closed);
        }
        let common = arrived.min(MAGIC.len());
        if fixed.get(..common) != MAGIC.get(..common) {
            return Err(WireError::NoHello);
        }
        if arrived < FIXED_BYTES {
            return Err(WireError::Cut { what: "the hello" });
        }
        let [_, _, _, _, _, _, _, _, n0, n1, x0, x1, l0, l1, l2, l3] = fixed;
        let there_min = u16::from_le_bytes([n0, n1]);
        let there_max = u16::from_le_bytes([x0, x1]);
        let length = u32::from_le_bytes([l0, l1, l2, l3]);
        if length > MAX_OPTIONS_BYTES {
            return Err(WireError::BadHello("its options are longer than 64 KiB"));
        }
        let mut options = Vec::new();
        reader.take(length.into()).read_to_end(&mut options)?;
        let mut sent = [0; 4];
        if options.len() != length as usize || read_up_to(reader, &mut sent)? != sent.len() {
            return Err(WireError::Cut { what: "the hello" });
        }
        let mut crc = crc32fast::Hasher::new();
        crc.update(&fixed);
        crc.update(&options);
        if crc.finalize().to_le_bytes() != sent {
            return Err(WireError::BadHello("it was damaged on the way"));
        }
        let version = there_max.min(VERSION_MAX);
        if version < there_min.max(VERSION_MIN) {
            return Err(WireError::NoCommonVersion {
                here_min: VERSION_MIN,
                here_max: VERSION_MAX,
                there_min,
                there_max,
            });
        }
        let peer: Hello = serde_json::from_slice(&options)
            .map_err(|_| WireError::BadHello("its options are not the JSON expected"))?;
        let contents = self.contents && peer.contents && (self.paces || peer.paces);
        let late = self.late && peer.late;
        let early = self.early.is_some() && peer.takes_early || self.takes_early && peer.early.is_some();
        let token = match (&self.rejoin_token, &peer.rejoin_token) {
            (Some(token), None) if peer.rejoins => Some(token),
            (None, Some(token)) if self.rejoins => Some(token),
            _ => None,
        };
        let rejoin = token.filter(|token| late && is_token(token)).cloned();
        Ok(Agreement {
            version,
            contents,
            late,
            late_known: late && contents && self.late_known && peer.late_known,
            early: late && early,
            rejoin,
            peer,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn written(hello: &Hello) -> Vec<u8> {
        let mut bytes = Vec::new();
        hello.write(&mut bytes).unwrap();
        bytes
    }

    #[test]
    fn a_hello_arrives() {
        let key = ContentKey::new([0xa5; 32]);
        let hello = Hello {
            program: "xenfold".into(),
            verify: true,
            ..Hello::default()
        }
        .with_key(&key);
        let agreement = Hello::default().agree(&mut &written(&hello)[..]).unwrap();
        assert_eq!(
            agreement,
            Agreement {
                version: VERSION_MAX,
                contents: false,
                late: false,
                late_known: false,
                early: false,
                rejoin: None,
                peer: hello
            }
        );
        assert_eq!(agreement.peer.key().unwrap(), key);
    }

    #[test]
    fn a_lost_connection_comes_back_where_both_can() {
        let source = |token: &str| Hello {
            late: true,
            rejoin_token: Some(token.into()),
            ..Hello::default()
        };
        let destination = |rejoins| Hello {
            late: true,
            rejoins,
            ..Hello::default()
        };
        let token = "0123456789abcdef0123456789ABCDEF";
        let agreed = |here: &Hello, there: &Hello| here.agree(&mut &written(there)[..]).unwrap().rejoin;
        assert_eq!(agreed(&source(token), &destination(true)).as_deref(), Some(token));
        assert_eq!(agreed(&destination(true), &source(token)).as_deref(), Some(token));
        assert_eq!(agreed(&source(token), &destination(false)), None);
        assert_eq!(agreed(&destination(false), &source(token)), None);
        assert_eq!(agreed(&destination(true), &source("short")), None);
        let early = Hello {
            late: false,
            ..source(token)
        };
        assert_eq!(agreed(&destination(true), &early), None, "nothing follows");
    }

    #[test]
    fn pages_go_out_early_where_both_can() {
        let source = Hello {
            late: true,
            early: Some(EarlyOut {
                ring_page: 9,
                highest_page: u64::MAX,
                never: vec![3; 1000],
                ..EarlyOut::default()
            }),
            ..Hello::default()
        };
        let destination = |late, takes_early| Hello {
            late,
            takes_early,
            ..Hello::default()
        };
        let agreed = |here: &Hello, there: &Hello| here.agree(&mut &written(there)[..]).unwrap().early;
        for (late, takes_early) in [(true, true), (false, true), (true, false)] {
            let destination = destination(late, takes_early);
            let both = (agreed(&source, &destination), agreed(&destination, &source));
            assert_eq!(both, (late && takes_early, late && takes_early));
        }
        let early = source.early.unwrap();
        assert_eq!((early.bound(), early.never().count()), (MAX_EARLY_PAGES, MAX_NEVER + 1));
    }

    #[test]
    fn options_of_a_newer_peer_are_ignored() {
        let options = br#"{"program":"later","shape":"of things to come"}"#;
        let mut bytes = [
            &MAGIC[..],
            &[1, 0, 9, 0],
            &(options.len() as u32).to_le_bytes(),
            options,
        ]
        .concat();
        bytes.extend_from_slice(&crc32fast::hash(&bytes).to_le_bytes());
        let agreement = Hello::default().agree(&mut &bytes[..]).unwrap();
        assert_eq!(
            (agreement.version, agreement.peer.program.as_str()),
            (VERSION_MAX, "later")
        );
    }

    #[test]
    fn versions_without_overlap_are_named() {
        let mut bytes = [&MAGIC[..], &[8, 0, 9, 0], &2u32.to_le_bytes(), b"{}"].concat();
        bytes.extend_from_slice(&crc32fast::hash(&bytes).to_le_bytes());
        let error = Hello::default().agree(&mut &bytes[..]).unwrap_err();
        assert_eq!(
            error.to_string(),
            "no common protocol version: here 1 to 1, there 8 to 9"
        );
    }

    #[test]
    fn damage_and_cuts_are_refused() {
        let bytes = written(&Hello::default());
        for end in 0..bytes.len() {
            assert!(Hello::default().agree(&mut &bytes[..end]).is_err(), "cut at {end}");
        }
        for bit in 0..bytes.len() * 8 {
            let mut damaged = bytes.clone();
            damaged[bit / 8] ^= 1 << (bit % 8);
            assert!(Hello::default().agree(&mut &damaged[..]).is_err(), "bit {bit}");
        }
        assert!(matches!(
            Hello::default().agree(&mut &b"xl migration receiver ready"[..]),
            Err(WireError::NoHello)
        ));
    }
}
