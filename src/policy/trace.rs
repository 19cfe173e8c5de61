//! Dirty traces: which pages a guest wrote in each interval. TRACE.md beside this file has the format.
use std::io::{self, Read, Write};
use std::ops::Range;
use std::time::Duration;

use thiserror::Error;

use super::packed::{self, PackedError};
use crate::page_set::PageSet;

const MAGIC: [u8; 8] = *b"XFDIRTY\0";
const VERSION: u32 = 1;

/// 1 TiB of guest memory.
pub const MOST_PAGES: u64 = 1 << 28;
pub const MOST_SAMPLES: u32 = 1 << 20;
pub const MOST_INTERVAL: Duration = Duration::from_secs(60);

/// What all sets of a trace may take in memory.
const MOST_BYTES: u64 = 1 << 30;

/// The interval of recorded traces, the paper's (section 3.1).
pub const INTERVAL: Duration = Duration::from_millis(50);

/// Why bytes are no trace. Offsets count from the beginning of the file.
#[derive(Debug, Error)]
pub enum TraceError {
    #[error("the trace cannot be read at offset {offset}")]
    Read {
        offset: u64,
        #[source]
        source: io::Error,
    },
    #[error("the trace ends too early, at offset {offset}")]
    Short { offset: u64 },
    #[error("not a dirty trace: it does not begin with XFDIRTY")]
    Magic,
    #[error("a dirty trace of version {found}; this program knows version {VERSION}")]
    Version { found: u32 },
    #[error("{what} at offset {offset} is {value}: out of bounds")]
    Bounds {
        what: &'static str,
        offset: u64,
        value: u64,
    },
    #[error("the set of pages at offset {offset} is damaged")]
    Set {
        offset: u64,
        #[source]
        source: PackedError,
    },
    #[error("the trace's checksum at offset {offset} is wrong: it is damaged")]
    Checksum { offset: u64 },
    #[error("bytes follow the end of the trace at offset {offset}")]
    Trailing { offset: u64 },
}

/// A trace that cannot be written.
#[derive(Debug, Error)]
pub enum WriteError {
    #[error("the trace cannot be written")]
    Io(#[from] io::Error),
    #[error("{what} of {value} cannot be in a trace")]
    Bounds { what: &'static str, value: u64 },
}

/// A trace in memory, its sets packed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Trace {
    bound: u64,
    guest_pages: u64,
    interval: Duration,
    samples: Vec<Vec<u8>>,
}

impl Trace {
    /// A trace without samples yet. Errors: as for [`Writer::new`].
    pub fn new(bound: u64, guest_pages: u64, interval: Duration) -> Result<Trace, WriteError> {
        check(bound, guest_pages, interval)?;
        Ok(Trace {
            bound,
            guest_pages,
            interval,
            samples: Vec::new(),
        })
    }

    /// Adds the pages written in the next interval.
    pub fn push(&mut self, written: &PageSet) {
        self.samples.push(packed::pack(written));
    }

    /// Pages are below this.
    pub fn bound(&self) -> u64 {
        self.bound
    }

    /// How many pages hold memory.
    pub fn guest_pages(&self) -> u64 {
        self.guest_pages
    }

    pub fn interval(&self) -> Duration {
        self.interval
    }

    pub fn len(&self) -> usize {
        self.samples.len()
    }

    pub fn is_empty(&self) -> bool {
        self.samples.is_empty()
    }

    /// Calls `each` with the runs of pages written in a sample; none for a sample that there is not.
    pub fn for_each_run(&self, sample: usize, each: impl FnMut(Range<u64>)) {
        if let Some(bytes) = self.samples.get(sample) {
            // Packed here, or checked when read.
            let _ = packed::for_each_run(bytes, self.bound, each);
        }
    }

    /// The pages written in a sample.
    pub fn sample(&self, sample: usize) -> PageSet {
        let mut set = PageSet::new(self.bound);
        self.for_each_run(sample, |run| set.insert_run(run));
        set
    }

    /// Writes all of it. Errors: there are no samples, or too many; the output does not take it.
    pub fn write(&self, out: impl Write) -> Result<(), WriteError> {
        let mut writer = Writer::new(out, self.bound, self.guest_pages, self.interval)?;
        self.samples.iter().try_for_each(|bytes| writer.packed(bytes))?;
        writer.finish().map(drop)
    }

    /// Reads one to its end; memory is bounded whatever the bytes are.
    pub fn read(input: impl Read) -> Result<Trace, TraceError> {
        Reader::new(input).read()
    }
}

fn check(bound: u64, guest_pages: u64, interval: Duration) -> Result<(), WriteError> {
    let whole_ms = interval.subsec_nanos().is_multiple_of(1_000_000);
    if bound == 0 || bound > MOST_PAGES {
        let what = "a guest's bound";
        return Err(WriteError::Bounds { what, value: bound });
    }
    if guest_pages > bound {
        let (what, value) = ("a number of pages", guest_pages);
        return Err(WriteError::Bounds { what, value });
    }
    if interval.is_zero() || interval > MOST_INTERVAL || !whole_ms {
        let (what, value) = ("an interval in microseconds", interval.as_micros() as u64);
        return Err(WriteError::Bounds { what, value });
    }
    Ok(())
}

/// Writes a trace sample by sample.
pub struct Writer<W> {
    out: W,
    crc: crc32fast::Hasher,
    bound: u64,
    samples: u32,
}

impl<W: Write> Writer<W> {
    /// Writes the header. Errors: a number is out of the format's bounds, the interval no whole milliseconds; or the
    /// output fails.
    pub fn new(out: W, bound: u64, guest_pages: u64, interval: Duration) -> Result<Writer<W>, WriteError> {
        check(bound, guest_pages, interval)?;
        let mut writer = Writer {
            out,
            crc: crc32fast::Hasher::new(),
            bound,
            samples: 0,
        };
        writer.put(&MAGIC)?;
        writer.put(&VERSION.to_le_bytes())?;
        writer.put(&(interval.as_millis() as u32).to_le_bytes())?;
        writer.put(&bound.to_le_bytes())?;
        writer.put(&guest_pages.to_le_bytes())?;
        Ok(writer)
    }

    fn put(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.crc.update(bytes);
        self.out.write_all(bytes)
    }

    /// The pages written in the next interval; those past the bound are left out.
    pub fn sample(&mut self, written: &PageSet) -> Result<(), WriteError> {
        if written.bound() == self.bound {
            return self.packed(&packed::pack(written));
        }
        self.packed(&packed::pack(&PageSet::from_words(written.words(), self.bound)))
    }

    fn packed(&mut self, bytes: &[u8]) -> Result<(), WriteError> {
        if self.samples == MOST_SAMPLES {
            let (what, value) = ("a number of samples", u64::from(MOST_SAMPLES) + 1);
            return Err(WriteError::Bounds { what, value });
        }
        self.samples += 1;
        self.put(&(bytes.len() as u32).to_le_bytes())?;
        Ok(self.put(bytes)?)
    }

    /// Writes the end. Errors: there was no sample, or the output fails.
    pub fn finish(mut self) -> Result<W, WriteError> {
        if self.samples == 0 {
            let what = "a number of samples";
            return Err(WriteError::Bounds { what, value: 0 });
        }
        self.put(&0u32.to_le_bytes())?;
        let samples = self.samples;
        self.put(&samples.to_le_bytes())?;
        self.out.write_all(&self.crc.finalize().to_le_bytes())?;
        self.out.flush()?;
        Ok(self.out)
    }
}

struct Reader<R> {
    input: R,
    offset: u64,
    crc: crc32fast::Hasher,
}

impl<R: Read> Reader<R> {
    fn new(input: R) -> Reader<R> {
        Reader {
            input,
            offset: 0,
            crc: crc32fast::Hasher::new(),
        }
    }

    /// Memory grows with what comes, not with what is announced.
    fn take(&mut self, length: u64) -> Result<Vec<u8>, TraceError> {
        let mut bytes = Vec::new();
        let read = (&mut self.input).take(length).read_to_end(&mut bytes);
        read.map_err(|source| TraceError::Read {
            offset: self.offset,
            source,
        })?;
        self.offset += bytes.len() as u64;
        if (bytes.len() as u64) < length {
            return Err(TraceError::Short { offset: self.offset });
        }
        self.crc.update(&bytes);
        Ok(bytes)
    }

    fn u32(&mut self) -> Result<u32, TraceError> {
        let bytes = self.take(4)?;
        let short = TraceError::Short { offset: self.offset };
        bytes.try_into().map(u32::from_le_bytes).map_err(|_| short)
    }

    fn u64(&mut self) -> Result<u64, TraceError> {
        let (low, high) = (self.u32()?, self.u32()?);
        Ok(u64::from(high) << 32 | u64::from(low))
    }

    fn read(mut self) -> Result<Trace, TraceError> {
        let within = |what, offset, value: u64, range: Range<u64>| match range.contains(&value) {
            true => Ok(value),
            false => Err(TraceError::Bounds { what, offset, value }),
        };
        match self.take(8) {
            Ok(magic) if magic == MAGIC => {}
            Err(error @ TraceError::Read { .. }) => return Err(error),
            _ => return Err(TraceError::Magic),
        }
        match self.u32()? {
            VERSION => {}
            found => return Err(TraceError::Version { found }),
        }
        let most_ms = MOST_INTERVAL.as_millis() as u64;
        let interval_ms = within("the interval", 12, self.u32()?.into(), 1..most_ms + 1)?;
        let bound = within("the bound", 16, self.u64()?, 1..MOST_PAGES + 1)?;
        let guest_pages = within("the number of pages", 24, self.u64()?, 0..bound + 1)?;
        let mut samples: Vec<Vec<u8>> = Vec::new();
        let mut bytes = 0;
        loop {
            let offset = self.offset;
            let length = u64::from(self.u32()?);
            within("a set's length", offset, length, 0..packed::most_bytes(bound) + 1)?;
            if length == 0 {
                break;
            }
            // The bookkeeping of a short set takes memory, too.
            bytes += length + 32;
            within("the size of all sets", offset, bytes, 0..MOST_BYTES + 1)?;
            let most = u64::from(MOST_SAMPLES);
            within("the number of samples", offset, samples.len() as u64, 0..most)?;
            let (offset, set) = (self.offset, self.take(length)?);
            packed::for_each_run(&set, bound, |_| {}).map_err(|source| TraceError::Set {
                offset: offset + source.offset() as u64,
                source,
            })?;
            samples.push(set);
        }
        self.read_end(samples.len() as u64)?;
        Ok(Trace {
            bound,
            guest_pages,
            interval: Duration::from_millis(interval_ms),
            samples,
        })
    }

    fn read_end(&mut self, samples: u64) -> Result<(), TraceError> {
        let (offset, value) = (self.offset, u64::from(self.u32()?));
        if value != samples || value == 0 {
            let what = "the number of samples";
            return Err(TraceError::Bounds { what, offset, value });
        }
        let (offset, crc) = (self.offset, self.crc.clone().finalize());
        if self.u32()? != crc {
            return Err(TraceError::Checksum { offset });
        }
        match self.take(1) {
            Err(TraceError::Short { .. }) => Ok(()),
            Err(error) => Err(error),
            Ok(_) => Err(TraceError::Trailing {
                offset: self.offset.saturating_sub(1),
            }),
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::page::Pfn;

    fn trace(bound: u64, samples: &[Vec<u64>]) -> Trace {
        let mut trace = Trace::new(bound, bound / 2, INTERVAL).unwrap();
        for sample in samples {
            let mut set = PageSet::new(bound);
            sample.iter().for_each(|page| {
                set.insert(Pfn::new(*page).unwrap());
            });
            trace.push(&set);
        }
        trace
    }

    fn bytes(trace: &Trace) -> Vec<u8> {
        let mut out = Vec::new();
        trace.write(&mut out).unwrap();
        out
    }

    #[test]
    fn bytes_are_as_documented() {
        let golden = [
            b"XFDIRTY\0".as_slice(),
            &[1, 0, 0, 0, 50, 0, 0, 0, 100, 0, 0, 0, 0, 0, 0, 0],
            &[50, 0, 0, 0, 0, 0, 0, 0],
            // Pages 3, 6 and 7; no pages.
            &[5, 0, 0, 0, 0, 3, 0, 1, 1],
            &[1, 0, 0, 0, 0],
            &[0, 0, 0, 0, 2, 0, 0, 0],
            &0xfcca_119a_u32.to_le_bytes(),
        ]
        .concat();
        let trace = trace(100, &[vec![3, 6, 7], vec![]]);
        assert_eq!(bytes(&trace), golden);
        assert_eq!(Trace::read(&golden[..]).unwrap(), trace);
    }

    #[test]
    fn damage_is_said_with_its_place() {
        let good = bytes(&trace(100, &[vec![3, 6, 7], vec![]]));
        let damaged = |at: usize, value: u8| {
            let mut bytes = good.clone();
            bytes[at] = value;
            Trace::read(&bytes[..]).unwrap_err().to_string()
        };
        assert!(damaged(0, 0).contains("XFDIRTY"));
        assert!(damaged(8, 2).contains("version 2"));
        assert!(
            damaged(13, 255).contains("interval at offset 12"),
            "{}",
            damaged(13, 255)
        );
        assert!(damaged(20, 255).contains("bound at offset 16"));
        assert!(damaged(25, 1).contains("pages at offset 24"));
        assert!(damaged(34, 1).contains("length at offset 32"));
        assert!(damaged(36, 9).contains("pages at offset 36"));
        assert!(damaged(37, 99).contains("pages at offset 39"), "{}", damaged(37, 99));
        assert!(damaged(50, 3).contains("samples at offset 50"), "{}", damaged(50, 3));
        assert!(damaged(55, 0).contains("checksum at offset 54"));
        let longer = [good.clone(), vec![0]].concat();
        assert!(matches!(
            Trace::read(&longer[..]),
            Err(TraceError::Trailing { offset: 58 })
        ));
        for length in 8..good.len() {
            let cut = Trace::read(&good[..length]);
            assert!(matches!(cut, Err(TraceError::Short { offset }) if offset == length as u64));
        }
    }

    #[test]
    fn nothing_large_is_kept_for_an_announcement() {
        let mut bytes = bytes(&trace(100, &[vec![]]));
        bytes.truncate(32);
        bytes[16..24].copy_from_slice(&MOST_PAGES.to_le_bytes());
        bytes.extend((1u32 << 25).to_le_bytes());
        assert!(matches!(Trace::read(&bytes[..]), Err(TraceError::Short { .. })));
    }

    #[test]
    fn what_the_format_cannot_hold_is_not_written() {
        for (bound, pages, ms) in [
            (0, 0, 50),
            (MOST_PAGES + 1, 1, 50),
            (10, 11, 50),
            (10, 10, 0),
            (10, 10, 60_001),
        ] {
            assert!(Trace::new(bound, pages, Duration::from_millis(ms)).is_err());
        }
        assert!(Trace::new(10, 10, Duration::from_micros(1500)).is_err());
        assert!(Writer::new(Vec::new(), 10, 10, INTERVAL).unwrap().finish().is_err());
    }

    proptest! {
        #[test]
        fn traces_come_back(samples in proptest::collection::vec(proptest::collection::vec(0u64..200, 0..80), 1..8)) {
            let trace = trace(200, &samples);
            let bytes = bytes(&trace);
            let read = Trace::read(&bytes[..]).unwrap();
            for (index, pages) in samples.iter().enumerate() {
                let set = read.sample(index);
                prop_assert!(pages.iter().all(|page| set.contains(Pfn::new(*page).unwrap())));
            }
            prop_assert_eq!(read, trace);
        }

        #[test]
        fn damaged_bytes_are_an_error(at in 0usize..200, bit in 0u8..8) {
            let good = bytes(&trace(100, &[vec![3, 6, 7], (0..50).map(|page| page * 2).collect()]));
            let mut bytes = good.clone();
            let at = at % bytes.len();
            bytes[at] ^= 1 << bit;
            prop_assert!(Trace::read(&bytes[..]).is_err());
        }
    }
}
