//! The two xl: what Xen's say, to the byte, and what becomes of the guest when one of them is killed.
use super::link::word;
use super::pipe::{PipeReader, PipeWriter};
use parking_lot::Mutex;
use std::collections::HashMap;
use std::io::{self, Read, Write};
use std::sync::Arc;
use std::thread;
use std::time::Duration;
use xenfold::engine::{FrameError, FrameSource};
use xenfold::page::{PAGE_SIZE, Pfn};

const R0: &[u8] = b"xl migration receiver ready, send binary domain data.\n";
const R1: &[u8] = b"domain received, ready to unpause\0";
const GO: &[u8] = b"domain is yours, you are cleared to unpause\0";
const R2: &[u8] = b"my copy unpause results are as follows\0";

/// Writes a stream.
pub type Live = Box<dyn FnOnce(&mut dyn Write) -> io::Result<()> + Send>;

// ── The guest under construction, and xl at the destination ──

/// What the destination's helper has applied so far: pfn → page.
pub type Image = Arc<Mutex<HashMap<u64, Vec<u8>>>>;

/// What is wrong with reading frames back.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum FrameFault {
    #[default]
    None,
    /// One bit of every page is wrong.
    WrongBit,
    Fails,
}

pub struct ImageFrames {
    pub image: Image,
    pub fault: FrameFault,
}

impl FrameSource for ImageFrames {
    fn read(&mut self, pfns: &[Pfn], pages: &mut [u8]) -> Result<(), FrameError> {
        let image = self.image.lock();
        for (pfn, out) in pfns.iter().zip(pages.chunks_exact_mut(PAGE_SIZE)) {
            let found = image.get(&pfn.get()).filter(|_| self.fault != FrameFault::Fails);
            let unreadable = || FrameError::Unreadable {
                pfn: *pfn,
                source: io::ErrorKind::NotFound.into(),
            };
            out.copy_from_slice(found.ok_or_else(unreadable)?);
            out[77] ^= u8::from(self.fault == FrameFault::WrongBit);
        }
        Ok(())
    }
}

/// Where the receiving xl dies.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Death {
    BeforeReady,
    /// After so many bytes of the stream.
    InStream(u64),
    /// With the first half of libxl's END taken.
    AtEnd,
    BeforeReceived,
    BeforeGo,
    AfterGo,
}

/// What became of the receiving xl and its guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DestinationXl {
    Died(Death),
    /// The stream or GO did not come: the guest is destroyed.
    Destroyed,
    /// R2 could not be written: xl ended before it destroyed the guest.
    LeftIncoming,
    /// It could not start the guest, said so and destroyed it.
    StartFailed,
    Running,
}

pub struct ReceivingXl {
    pub stdin: PipeReader,
    pub stdout: PipeWriter,
    pub image: Image,
    pub received: Arc<Mutex<Vec<u8>>>,
    pub dies: Option<Death>,
    pub start_status: u8,
    pub apply_delay: Duration,
    /// Bytes of the stream taken.
    pub taken: u64,
    pub verifying: bool,
    pub filled: Option<Box<dyn Fn(u64) + Send>>,
    pub started: Option<Box<dyn FnOnce() + Send>>,
}

/// The stream ended, or xl dies here.
enum Stopped {
    Eof,
    Dies(Death),
}

impl ReceivingXl {
    pub fn run(mut self) -> DestinationXl {
        match self.phases() {
            Ok(state) => state,
            Err(Stopped::Eof) => DestinationXl::Destroyed,
            Err(Stopped::Dies(death)) => DestinationXl::Died(death),
        }
    }

    fn phases(&mut self) -> Result<DestinationXl, Stopped> {
        self.dies_at(Death::BeforeReady)?;
        self.stdout.write_all(R0).map_err(|_| Stopped::Eof)?;
        self.stream()?;
        self.dies_at(Death::BeforeReceived)?;
        self.stdout.write_all(R1).map_err(|_| Stopped::Eof)?;
        self.dies_at(Death::BeforeGo)?;
        let mut go = [0; GO.len()];
        let told = self.stdin.read_exact(&mut go).is_ok() && go == GO;
        self.dies_at(Death::AfterGo)?;
        let status = if told { self.start_status } else { 1 };
        if let Some(started) = self.started.take_if(|_| status == 0) {
            started();
        }
        if self.stdout.write_all(&[R2, &[status]].concat()).is_err() {
            return Ok(if status == 0 {
                DestinationXl::Running
            } else {
                DestinationXl::LeftIncoming
            });
        }
        if status == 0 {
            return Ok(DestinationXl::Running);
        }
        // The guest is destroyed here; that this is said matters to the source only.
        let _ = self.stdout.write_all(GO);
        Ok(if told {
            DestinationXl::StartFailed
        } else {
            DestinationXl::Destroyed
        })
    }

    fn dies_at(&self, here: Death) -> Result<(), Stopped> {
        if self.dies == Some(here) {
            Err(Stopped::Dies(here))
        } else {
            Ok(())
        }
    }

    fn take(&mut self, length: usize) -> Result<Vec<u8>, Stopped> {
        let mut bytes = vec![0; length];
        let death = match self.dies {
            Some(Death::InStream(at)) if at < self.taken + length as u64 => Some(at - self.taken),
            _ => None,
        };
        let (part, _) = bytes.split_at_mut(death.map_or(length, |at| at as usize));
        self.stdin.read_exact(part).map_err(|_| Stopped::Eof)?;
        if let (Some(_), Some(death)) = (death, self.dies) {
            return Err(Stopped::Dies(death));
        }
        self.taken += length as u64;
        self.received.lock().extend_from_slice(&bytes);
        Ok(bytes)
    }

    /// Everything from S0 to libxl's END, read as xl, libxl and the helper do: exact sizes, one record after another.
    fn stream(&mut self) -> Result<(), Stopped> {
        let fixed = self.take(48)?;
        self.take(word(&fixed, 44) as usize)?;
        self.take(16)?;
        let (mut in_libxc, mut in_checkpoint) = (false, false);
        loop {
            let header = self.header(in_libxc)?;
            let (kind, length) = (word(&header, 0), word(&header, 4) as usize);
            let body = self.take(length.next_multiple_of(8))?;
            match (in_libxc, kind) {
                (false, 0) => return Ok(()),
                (false, 1) => {
                    self.take(24 + 16)?;
                    in_libxc = true;
                }
                (false, 4) if in_checkpoint => (in_libxc, in_checkpoint) = (true, false),
                (true, 1) => self.apply(&body[..length]).ok_or(Stopped::Eof)?,
                (true, 0xd) => self.verifying = true,
                (true, 0xe) => (in_libxc, in_checkpoint) = (false, true),
                (true, 0) => in_libxc = false,
                _ => {}
            }
        }
    }

    fn header(&mut self, in_libxc: bool) -> Result<Vec<u8>, Stopped> {
        let mut header = self.take(4)?;
        if !in_libxc && word(&header, 0) == 0 {
            self.dies_at(Death::AtEnd)?;
        }
        header.extend(self.take(4)?);
        Ok(header)
    }

    /// `None` when the record is not valid: xl ends.
    fn apply(&mut self, body: &[u8]) -> Option<()> {
        if !self.apply_delay.is_zero() {
            thread::sleep(self.apply_delay);
        }
        let (count, rest) = body.split_first_chunk::<4>()?;
        let list = (u32::from_le_bytes(*count) as usize).checked_mul(8)?;
        let (list, mut pages) = rest.get(4..)?.split_at_checked(list)?;
        if let Some(filled) = &self.filled {
            let entries = list.as_chunks().0.iter().map(|entry| u64::from_le_bytes(*entry));
            let with_data = entries.filter(|entry| entry >> 60 < 0xd);
            with_data.for_each(|entry| filled(entry & 0xf_ffff_ffff_ffff));
        }
        let mut image = self.image.lock();
        for entry in list
            .chunks_exact(8)
            .map(|entry| u64::from_le_bytes(entry.try_into().unwrap()))
        {
            let pfn = entry & 0xf_ffff_ffff_ffff;
            if entry >> 60 >= 0xd {
                if !self.verifying {
                    image.remove(&pfn);
                }
                continue;
            }
            let (page, rest) = pages.split_at_checked(PAGE_SIZE)?;
            pages = rest;
            if !self.verifying {
                image.insert(pfn, page.to_vec());
            }
        }
        Some(())
    }
}

// ── xl at the source ──

/// Where the sending xl is killed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SourceDeath {
    BeforeStream,
    InStream(usize),
    BeforeReceived,
    BeforeGo,
    AfterGo,
}

/// What became of the source's guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SourceXl {
    Untouched,
    Resumed,
    /// xl does not know what became of the other: `failed_badly`.
    Suspended,
    /// It runs at the destination, this copy is destroyed.
    Gone,
    Died(SourceDeath),
}

pub struct SendingXl {
    pub stream: Arc<Vec<u8>>,
    pub live: Option<Live>,
    pub to_agent: PipeWriter,
    pub from_agent: PipeReader,
    pub dies: Option<SourceDeath>,
    pub go_after: Duration,
}

impl SendingXl {
    pub fn run(mut self) -> SourceXl {
        let dies = self.dies;
        let died = |here| {
            if dies == Some(here) {
                Err(SourceXl::Died(here))
            } else {
                Ok(())
            }
        };
        let mut phases = || -> Result<SourceXl, SourceXl> {
            self.expect(R0, SourceXl::Untouched)?;
            died(SourceDeath::BeforeStream)?;
            if let Some(SourceDeath::InStream(at)) = dies {
                let _ = self.to_agent.write_all(&self.stream[..at]);
                return Ok(SourceXl::Died(SourceDeath::InStream(at)));
            }
            let written = match self.live.take() {
                Some(live) => live(&mut self.to_agent),
                None => self.to_agent.write_all(&self.stream),
            };
            written.map_err(|_| SourceXl::Resumed)?;
            died(SourceDeath::BeforeReceived)?;
            self.expect(R1, SourceXl::Resumed)?;
            died(SourceDeath::BeforeGo)?;
            thread::sleep(self.go_after);
            self.to_agent.write_all(GO).map_err(|_| SourceXl::Suspended)?;
            died(SourceDeath::AfterGo)?;
            self.expect(R2, SourceXl::Suspended)?;
            let mut status = [0];
            self.from_agent
                .read_exact(&mut status)
                .map_err(|_| SourceXl::Suspended)?;
            if status == [0] {
                return Ok(SourceXl::Gone);
            }
            self.expect(GO, SourceXl::Suspended)?;
            Ok(SourceXl::Resumed)
        };
        phases().unwrap_or_else(|state| state)
    }

    fn expect(&mut self, message: &[u8], otherwise: SourceXl) -> Result<(), SourceXl> {
        let mut got = vec![0; message.len()];
        self.from_agent.read_exact(&mut got).map_err(|_| otherwise)?;
        if got == message { Ok(()) } else { Err(otherwise) }
    }
}
