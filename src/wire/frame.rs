//! Frames: bounded, numbered, checked.
use std::io::{self, Read, Write};

use thiserror::Error;

/// Header of every frame, in bytes.
pub const FRAME_HEADER_BYTES: usize = 20;

/// The largest body of a frame: one PAGE_DATA record of 1024 incompressible pages with its rows, and some room.
pub const MAX_FRAME_BODY: u32 = (4 << 20) + (256 << 10);

/// What a Ping may have to be sent back: whoever has to answer may be busy with something else for a while.
const MAX_PING_BODY: u32 = 64;

/// What a frame is. The numbers are the wire's.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u16)]
pub enum Kind {
    /// Bytes of Xen's stream, to be passed on as they are (source to destination).
    Bytes = 1,
    /// The guest's type, before its first rows.
    Guest = 2,
    /// One PAGE_DATA record as rows.
    Rows = 3,
    /// Both ends empty their tables.
    Forget = 4,
    /// The stream is complete: libxl's END record and the digest over all of it.
    End = 5,
    /// xl's GO.
    Go = 6,
    /// Pages that the destination needed, in full.
    Contents = 7,
    /// Pages that follow the guest.
    Late = 8,
    /// The first frame of a new connection, when the old one was lost while pages followed the guest.
    Rejoin = 9,
    /// The source has heard how it ended: nobody will connect again.
    Done = 10,
    /// What the source's migrations have learnt of how the guest writes.
    Model = 11,
    /// Bytes that the destination's xl wrote for the source's xl.
    Xl = 16,
    /// The destination's answer to End.
    Verdict = 17,
    /// The destination's figures.
    Figures = 18,
    /// How the destination's xl ended.
    Exit = 19,
    /// A filter over contents that the destination holds.
    Have = 20,
    /// Pages whose contents it could not find.
    Need = 21,
    /// A record that named contents is complete: nothing of it will be needed.
    Settled = 22,
    /// Late pages that the destination wants before the others.
    Want = 23,
    /// The guest runs at the destination, and pages of it are still late.
    Started = 24,
    /// Late pages that have not come, on a new connection; an empty one ends the list.
    Missing = 25,
    /// Nothing has come from the source for too long while pages follow the guest: this connection is given up. Programs that do
    /// not know it take it for damage, which comes to the same.
    Unheard = 26,
    /// A sign of life; a body of 8 bytes asks for the same bytes back (both directions).
    Ping = 32,
    /// The answer to a Ping that has a body.
    Pong = 33,
    /// The sender gives up; the body says why.
    Abort = 34,
}

impl Kind {
    fn from_wire(raw: u16) -> Option<Kind> {
        use Kind::*;
        [
            Bytes, Guest, Rows, Forget, End, Go, Contents, Late, Rejoin, Done, Model, Xl, Verdict, Figures, Exit, Have,
            Need, Settled, Want, Started, Missing, Unheard, Ping, Pong, Abort,
        ]
        .into_iter()
        .find(|kind| *kind as u16 == raw)
    }
}

/// Why the wire cannot be believed any further. Each is final for the connection.
#[derive(Debug, Error)]
pub enum WireError {
    #[error("the connection broke")]
    Io(#[from] io::Error),
    #[error("the connection ended inside {what}")]
    Cut { what: &'static str },
    #[error("the connection ended")]
    Closed,
    #[error("the other host has heard nothing for too long")]
    Unheard,
    #[error("the peer does not speak xenfold's protocol (no hello)")]
    NoHello,
    #[error("the hello is not valid: {0}")]
    BadHello(&'static str),
    #[error("no common protocol version: here {here_min} to {here_max}, there {there_min} to {there_max}")]
    NoCommonVersion {
        here_min: u16,
        here_max: u16,
        there_min: u16,
        there_max: u16,
    },
    #[error("frame {sequence} has an unknown kind {kind}")]
    UnknownKind { sequence: u64, kind: u16 },
    #[error("frame {expected} was due, frame {got} came")]
    OutOfSequence { expected: u64, got: u64 },
    #[error("frame {sequence} announces {length} bytes, more than it may have")]
    TooLong { sequence: u64, length: u64 },
    #[error("frame {sequence} was damaged on the way (CRC-32 {computed:#010x}, sent as {sent:#010x})")]
    Damaged { sequence: u64, computed: u32, sent: u32 },
    #[error("a frame of kind {kind:?} is not valid: {why}")]
    BadBody { kind: Kind, why: &'static str },
}

/// One frame as it came.
#[derive(Debug)]
pub struct Frame {
    pub kind: Kind,
    pub sequence: u64,
    pub body: Vec<u8>,
}

/// Writes frames in sequence. Every byte that leaves is counted.
pub struct FrameWriter<W> {
    inner: W,
    sequence: u64,
    bytes: u64,
}

impl<W: Write> FrameWriter<W> {
    pub fn new(inner: W) -> FrameWriter<W> {
        FrameWriter {
            inner,
            sequence: 0,
            bytes: 0,
        }
    }

    /// Bytes written so far, headers included.
    pub fn bytes(&self) -> u64 {
        self.bytes
    }

    /// Writes one frame whose body is the parts in order, and flushes it. Errors: those of the connection;
    /// `InvalidInput` when the body is larger than [`MAX_FRAME_BODY`].
    pub fn write(&mut self, kind: Kind, parts: &[&[u8]]) -> io::Result<()> {
        let length = parts.iter().map(|part| part.len()).sum::<usize>();
        let length = u32::try_from(length)
            .ok()
            .filter(|length| *length <= MAX_FRAME_BODY)
            .ok_or_else(|| io::Error::new(io::ErrorKind::InvalidInput, "frame body above its bound"))?;
        let mut header = [0; FRAME_HEADER_BYTES];
        header[0..4].copy_from_slice(&length.to_le_bytes());
        header[4..6].copy_from_slice(&(kind as u16).to_le_bytes());
        header[8..16].copy_from_slice(&self.sequence.to_le_bytes());
        let mut crc = crc32fast::Hasher::new();
        crc.update(&header[..16]);
        parts.iter().for_each(|part| crc.update(part));
        header[16..20].copy_from_slice(&crc.finalize().to_le_bytes());
        self.inner.write_all(&header)?;
        for part in parts {
            self.inner.write_all(part)?;
        }
        self.inner.flush()?;
        self.sequence += 1;
        self.bytes += (FRAME_HEADER_BYTES + length as usize) as u64;
        Ok(())
    }
}

/// Reads frames and refuses all that is not the next undamaged one.
pub struct FrameReader<R> {
    inner: R,
    sequence: u64,
}

impl<R: Read> FrameReader<R> {
    pub fn new(inner: R) -> FrameReader<R> {
        FrameReader { inner, sequence: 0 }
    }

    /// The next frame. Its body takes as much memory as the header announces, which is at most [`MAX_FRAME_BODY`].
    pub fn read(&mut self) -> Result<Frame, WireError> {
        let mut header = [0; FRAME_HEADER_BYTES];
        match read_up_to(&mut self.inner, &mut header)? {
            0 => return Err(WireError::Closed),
            FRAME_HEADER_BYTES => {}
            _ => {
                return Err(WireError::Cut {
                    what: "a frame's header",
                });
            }
        }
        let [
            l0,
            l1,
            l2,
            l3,
            k0,
            k1,
            r0,
            r1,
            s0,
            s1,
            s2,
            s3,
            s4,
            s5,
            s6,
            s7,
            c0,
            c1,
            c2,
            c3,
        ] = header;
        let length = u32::from_le_bytes([l0, l1, l2, l3]);
        let kind = u16::from_le_bytes([k0, k1]);
        let got = u64::from_le_bytes([s0, s1, s2, s3, s4, s5, s6, s7]);
        let sent = u32::from_le_bytes([c0, c1, c2, c3]);
        let sequence = self.sequence;
        if got != sequence {
            return Err(WireError::OutOfSequence {
                expected: sequence,
                got,
            });
        }
        let is_ping = [Kind::Ping as u16, Kind::Pong as u16].contains(&kind);
        if length > MAX_FRAME_BODY || (is_ping && length > MAX_PING_BODY) {
            return Err(WireError::TooLong {
                sequence,
                length: length.into(),
            });
        }
        let mut body = Vec::with_capacity(length as usize);
        let arrived = (&mut self.inner).take(length.into()).read_to_end(&mut body)?;
        if arrived != length as usize {
            return Err(WireError::Cut { what: "a frame's body" });
        }
        let mut crc = crc32fast::Hasher::new();
        crc.update(&header[..16]);
        crc.update(&body);
        let computed = crc.finalize();
        if computed != sent {
            return Err(WireError::Damaged {
                sequence,
                computed,
                sent,
            });
        }
        let kind = Kind::from_wire(kind).ok_or(WireError::UnknownKind { sequence, kind })?;
        if [r0, r1] != [0, 0] {
            return Err(WireError::BadBody {
                kind,
                why: "reserved header bytes are not zero",
            });
        }
        self.sequence += 1;
        Ok(Frame { kind, sequence, body })
    }
}

/// Reads until `buffer` is full or the input ends; the number of bytes read.
pub(super) fn read_up_to(reader: &mut impl Read, buffer: &mut [u8]) -> io::Result<usize> {
    let mut filled = 0;
    while let Some(rest) = buffer.get_mut(filled..).filter(|rest| !rest.is_empty()) {
        match reader.read(rest) {
            Ok(0) => break,
            Ok(n) => filled += n,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    Ok(filled)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn frame(kind: Kind, body: &[u8]) -> Vec<u8> {
        let mut out = Vec::new();
        FrameWriter::new(&mut out).write(kind, &[body]).unwrap();
        out
    }

    #[test]
    fn a_frame_has_these_bytes() {
        let bytes = frame(Kind::Ping, b"12345678");
        assert_eq!(bytes[..16], [8, 0, 0, 0, 32, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0]);
        assert_eq!(
            bytes[16..20],
            crc32fast::hash(&[&bytes[..16], b"12345678"].concat()).to_le_bytes()
        );
        assert_eq!(bytes[20..], *b"12345678");
    }

    #[test]
    fn replayed_reordered_and_long_frames_are_refused() {
        let bytes = frame(Kind::Ping, b"");
        let twice = [bytes.clone(), bytes].concat();
        let mut reader = FrameReader::new(&twice[..]);
        assert!(reader.read().is_ok());
        assert!(matches!(
            reader.read(),
            Err(WireError::OutOfSequence { expected: 1, got: 0 })
        ));

        let mut long = [0u8; FRAME_HEADER_BYTES];
        long[..4].copy_from_slice(&u32::MAX.to_le_bytes());
        for long in [&long[..], &frame(Kind::Ping, &[0; 65]), &frame(Kind::Pong, &[0; 65])] {
            assert!(matches!(FrameReader::new(long).read(), Err(WireError::TooLong { .. })));
        }
        assert!(FrameReader::new(&frame(Kind::Ping, &[0; 64])[..]).read().is_ok());
    }

    #[test]
    fn every_bit_matters() {
        let bytes = frame(Kind::Go, b"domain is yours");
        for bit in 0..bytes.len() * 8 {
            let mut damaged = bytes.clone();
            damaged[bit / 8] ^= 1 << (bit % 8);
            assert!(FrameReader::new(&damaged[..]).read().is_err(), "bit {bit}");
        }
    }
}
