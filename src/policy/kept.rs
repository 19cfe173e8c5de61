//! What a guest's migrations have taught of its writes, kept for its next one.
//!
//! Two seconds of watching show a guest that writes fast. Of one that takes a minute to come round to the same pages they
//! show a thirtieth; a migration, which lasts as long, shows the rest. So its end leaves: how pages of each region age
//! ([`super::gaps`]), how long before the end each page was written for the first time, which is the order of a guest that
//! goes round, and the states of the model with their transitions and working sets. Where the guest is now in what it does is
//! not in there: that may be hours later.
//!
//! Nothing that is kept is believed: the next migration holds it against what it sees (`Filter`), and a model that is wrong
//! costs pages sent twice, no more.
//!
//! # Format
//!
//! Between daemons, agents and hosts a model is these bytes, [`MOST_BYTES`] at most. Integers are little-endian, floats
//! IEEE 754.
//!
//! | field | size | |
//! | --- | --- | --- |
//! | magic | 8 | `XFMODEL\n` |
//! | version | 4 | 1 |
//! | interval_ms | 4 | between two samples of the model, at least 1 |
//! | bound | 8 | pages lie below it; at most 2²⁸ |
//! | pages_each | 8 | pages of a region, at least 1 |
//! | regions | 2 | 1 to 1024; the last one reaches to the bound |
//! | bins | 2 | ages that are told apart: 26 |
//! | length | 4 | of the body, unpacked |
//! | crc | 4 | CRC-32 over all other bytes |
//! | unit_ms | 4 | of the ages, at most 1,000,000; 0 means 1000 |
//! | body | | one zstd frame |
//!
//! The body: a byte for each page below the bound, 0 when it was not seen written, else one more than the time since
//! it was first, in units (`Ages`); for each region `bins` times f32 seconds that pages spent at that age, then `bins` times f32
//! writes that ended them, none negative or above 10¹²; u16 number of states, each: u16 region (the number of regions when
//! nothing was written), u16 samples, u16 number of followers, u32 length of the working set, the followers (u16 place in
//! the list, u16 how often), the working set ([`super::packed`], empty when left out).
//!
//! Version 1 is the first. Until 2026-11-27 the unit was a second, and 0 in its place; those programs do without a model that has one.
//! Models of before 2026-11-26 have the seconds since each page's last write instead: another order, in
//! which the guest is then not found.
use std::time::Duration;

use thiserror::Error;

use super::ages::{Ages, LONGEST_UNIT_MS};
use super::gaps::{BINS, Regions, Seen};
use super::model::State;
use super::packed;

/// Longest model in bytes. Of a guest for whom it would be longer the working sets are left out, ages are told apart less finely, or
/// nothing is kept.
pub const MOST_BYTES: usize = 4 << 20;

const MAGIC: [u8; 8] = *b"XFMODEL\n";
const VERSION: u32 = 1;
const HEADER: usize = 48;
const CRC_AT: usize = 40;
const UNIT_AT: usize = 44;

/// Regions at most, and numbers that mean anything.
const MOST_REGIONS: u16 = 1024;
const MOST_SEEN: f32 = 1e12;

/// Beside a byte a page and the working sets, which take one more.
const MOST_OTHER: u64 = 16 << 20;

/// A page that was written in an earlier migration may have been written any time in so many seconds before this one.
pub(super) const SPAN: f64 = 300.0;

/// A model as it is kept.
#[derive(Clone, Debug, PartialEq)]
pub struct Kept {
    pub(super) bound: u64,
    pub(super) regions: Regions,
    pub(super) interval: Duration,
    pub(super) seen: Vec<Seen>,
    pub(super) ages: Ages,
    pub(super) states: Vec<State>,
}

/// Why bytes are no model of use. Whoever meets it does without.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
pub enum KeptError {
    #[error("{bytes} bytes are too few or too many for a model of a guest's writes")]
    Length { bytes: usize },
    #[error("this is no model of a guest's writes: it does not begin with XFMODEL")]
    Magic,
    #[error("a model of a guest's writes of version {found}; this program knows version {VERSION}")]
    Version { found: u32 },
    #[error("a model of a guest's writes is damaged (its checksum is wrong)")]
    Checksum,
    #[error("a model of a guest's writes is damaged: {0}")]
    Damaged(&'static str),
    #[error("a model of a guest's writes for {found} page numbers; the guest has {expected}")]
    OtherGuest { found: u64, expected: u64 },
}

impl Kept {
    /// Page numbers lie below this.
    pub fn bound(&self) -> u64 {
        self.bound
    }

    /// How many pages were seen written.
    pub fn pages(&self) -> u64 {
        self.ages.bytes().iter().filter(|age| **age > 0).count() as u64
    }

    /// `None`: it would be too long.
    pub fn to_bytes(&self) -> Option<Vec<u8>> {
        let fits = |bytes: &Vec<u8>| bytes.len() <= MOST_BYTES;
        let ways = [(true, 1), (false, 1), (false, 4), (false, 16)];
        ways.into_iter()
            .find_map(|(working_sets, by)| self.packed(working_sets, &self.ages.coarser(by)).filter(fits))
    }

    fn packed(&self, working_sets: bool, ages: &Ages) -> Option<Vec<u8>> {
        let mut body = ages.bytes().to_vec();
        for seen in &self.seen {
            let numbers = seen.seconds.iter().chain(&seen.writes);
            numbers.for_each(|number| body.extend_from_slice(&number.to_le_bytes()));
        }
        body.extend_from_slice(&(self.states.len() as u16).to_le_bytes());
        for state in &self.states {
            let set = state.working_set.as_slice();
            let set = if working_sets { set } else { &[] };
            for word in [state.region, state.samples, state.next.len() as u16] {
                body.extend_from_slice(&word.to_le_bytes());
            }
            body.extend_from_slice(&(set.len() as u32).to_le_bytes());
            for word in state.next.iter().flat_map(|(place, times)| [place, times]) {
                body.extend_from_slice(&word.to_le_bytes());
            }
            body.extend_from_slice(set);
        }
        let mut bytes = MAGIC.to_vec();
        bytes.extend_from_slice(&VERSION.to_le_bytes());
        bytes.extend_from_slice(&(self.interval.as_millis() as u32).to_le_bytes());
        bytes.extend_from_slice(&self.bound.to_le_bytes());
        bytes.extend_from_slice(&self.regions.pages_each().to_le_bytes());
        bytes.extend_from_slice(&(self.regions.count() as u16).to_le_bytes());
        bytes.extend_from_slice(&(BINS as u16).to_le_bytes());
        bytes.extend_from_slice(&u32::try_from(body.len()).ok()?.to_le_bytes());
        bytes.extend_from_slice(&[0; UNIT_AT - CRC_AT]);
        bytes.extend_from_slice(&ages.unit_ms().to_le_bytes());
        bytes.extend_from_slice(&zstd::bulk::compress(&body, 1).ok()?);
        let crc = checksum(&bytes).to_le_bytes();
        bytes.get_mut(CRC_AT..CRC_AT + crc.len())?.copy_from_slice(&crc);
        Some(bytes)
    }

    /// Whether bytes are a model at all, without unpacking it: enough for whoever only keeps it.
    pub fn check(bytes: &[u8]) -> Result<(), KeptError> {
        Header::read(bytes).map(drop)
    }

    /// A model of a guest whose pages lie below `bound`. Takes nothing that could lead outside of its memory.
    pub fn from_bytes(bytes: &[u8], bound: u64) -> Result<Kept, KeptError> {
        let header = Header::read(bytes)?;
        if header.bound != bound {
            let found = header.bound;
            return Err(KeptError::OtherGuest { found, expected: bound });
        }
        let damaged = KeptError::Damaged;
        let body = zstd::bulk::decompress(header.packed, header.length as usize);
        let body = body.map_err(|_| damaged("its body cannot be unpacked"))?;
        if body.len() != header.length as usize {
            return Err(damaged("its body has another length"));
        }
        let mut rest = Rest(&body);
        let ages = Ages::from_parts(header.unit_ms, rest.take(bound as usize)?.to_vec());
        let mut seen = vec![Seen::default(); header.regions.count()];
        for seen in &mut seen {
            for number in seen.seconds.iter_mut().chain(&mut seen.writes) {
                *number = f32::from_le_bytes(rest.array()?);
                if !(0.0..=MOST_SEEN).contains(number) {
                    return Err(damaged("a number out of bounds"));
                }
            }
        }
        let count = rest.u16()?;
        if usize::from(count) > header.regions.count() + 1 {
            return Err(damaged("too many states"));
        }
        let states = (0..count).map(|_| state(&mut rest, &header, count));
        let states = states.collect::<Result<Vec<_>, _>>()?;
        if !rest.0.is_empty() {
            return Err(damaged("bytes follow its last state"));
        }
        Ok(Kept {
            bound,
            regions: header.regions,
            interval: header.interval,
            seen,
            ages,
            states,
        })
    }
}

fn state(rest: &mut Rest<'_>, header: &Header<'_>, states: u16) -> Result<State, KeptError> {
    let (region, samples, followers) = (rest.u16()?, rest.u16()?, rest.u16()?);
    let length = u32::from_le_bytes(rest.array()?);
    if usize::from(region) > header.regions.count() || followers > states {
        return Err(KeptError::Damaged("a state out of bounds"));
    }
    let next = (0..followers).map(|_| Ok((rest.u16()?, rest.u16()?)));
    let next = next.collect::<Result<Vec<_>, KeptError>>()?;
    let set = rest.take(length as usize)?;
    let whole = set.is_empty() || packed::for_each_run(set, header.bound, |_| {}).is_ok();
    if !whole || next.iter().any(|(place, _)| *place >= states) {
        return Err(KeptError::Damaged("a state out of bounds"));
    }
    Ok(State {
        region,
        samples,
        next,
        working_set: set.to_vec(),
    })
}

fn checksum(bytes: &[u8]) -> u32 {
    let mut crc = crc32fast::Hasher::new();
    crc.update(bytes.get(..CRC_AT).unwrap_or_default());
    crc.update(bytes.get(CRC_AT + 4..).unwrap_or_default());
    crc.finalize()
}

struct Header<'a> {
    interval: Duration,
    bound: u64,
    regions: Regions,
    length: u32,
    unit_ms: u32,
    packed: &'a [u8],
}

impl Header<'_> {
    fn read(bytes: &[u8]) -> Result<Header<'_>, KeptError> {
        let wrong_length = KeptError::Length { bytes: bytes.len() };
        if bytes.len() > MOST_BYTES {
            return Err(wrong_length);
        }
        let (header, packed) = bytes.split_at_checked(HEADER).ok_or(wrong_length)?;
        let mut rest = Rest(header);
        if rest.array()? != MAGIC {
            return Err(KeptError::Magic);
        }
        match u32::from_le_bytes(rest.array()?) {
            VERSION => {}
            found => return Err(KeptError::Version { found }),
        }
        let interval_ms = u32::from_le_bytes(rest.array()?);
        let (bound, pages_each) = (u64::from_le_bytes(rest.array()?), u64::from_le_bytes(rest.array()?));
        let (regions, bins, length) = (rest.u16()?, rest.u16()?, u32::from_le_bytes(rest.array()?));
        let crc = u32::from_le_bytes(rest.array()?);
        if crc != checksum(bytes) {
            return Err(KeptError::Checksum);
        }
        let unit_ms = u32::from_le_bytes(rest.array()?);
        let most = bound.saturating_mul(2).saturating_add(MOST_OTHER);
        let right = (1..=super::trace::MOST_PAGES).contains(&bound)
            && interval_ms > 0
            && pages_each > 0
            && (1..=MOST_REGIONS).contains(&regions)
            && usize::from(bins) == BINS
            && u64::from(length) <= most
            && unit_ms <= LONGEST_UNIT_MS;
        match right {
            true => Ok(Header {
                interval: Duration::from_millis(interval_ms.into()),
                bound,
                regions: Regions::from_parts(pages_each, regions),
                length,
                unit_ms,
                packed,
            }),
            false => Err(KeptError::Damaged("its header has numbers out of bounds")),
        }
    }
}

/// What has not been read yet.
struct Rest<'a>(&'a [u8]);

impl<'a> Rest<'a> {
    fn take(&mut self, length: usize) -> Result<&'a [u8], KeptError> {
        let (taken, rest) = self
            .0
            .split_at_checked(length)
            .ok_or(KeptError::Damaged("it is cut off"))?;
        self.0 = rest;
        Ok(taken)
    }

    fn array<const N: usize>(&mut self) -> Result<[u8; N], KeptError> {
        let taken = self.take(N)?;
        taken.try_into().map_err(|_| KeptError::Damaged("it is cut off"))
    }

    fn u16(&mut self) -> Result<u16, KeptError> {
        self.array().map(u16::from_le_bytes)
    }
}

#[cfg(test)]
#[path = "kept_tests.rs"]
mod tests;
