//! A guest that runs and writes while xl sends it.
#![allow(dead_code, reason = "each integration test uses its own part of this")]

use std::io::{self, Write};
use std::sync::Arc;
use std::time::Duration;

use parking_lot::Mutex;
use xenfold::engine::{DirtyLog, FrameError, FrameSource};
use xenfold::page::{PAGE_SIZE, Pfn};
use xenfold::page_set::PageSet;
use xenfold::policy::{HoldPolicy, Outlook};

use crate::support::{Batch, Guest, Start, StreamSpec, build_stream};

/// Numbers that look random.
pub struct Dice(pub u64);

impl Dice {
    pub fn throw(&mut self, sides: u64) -> u64 {
        self.0 = self
            .0
            .wrapping_mul(6364136223846793005)
            .wrapping_add(1442695040888963407);
        (self.0 >> 33) % sides.max(1)
    }
}

/// A guest as Xen has it. Each page is filled with a number that grows with each write.
pub struct Memory {
    /// `None`: ballooned out.
    pub pages: Vec<Option<u64>>,
    pub dirty: PageSet,
    pub writes: u64,
    pub dice: Dice,
    pub suspended: bool,
    /// Somebody has destroyed it since: nothing of it can be read any more.
    pub destroyed: bool,
    /// xl's helper is inside its write of a record.
    pub in_write: bool,
    /// It has not come to the end of its first pass, where it reads the bitmap itself.
    pub in_first_pass: bool,
    /// The bitmap was read while the helper may have read it itself.
    pub unsafe_peeks: u64,
    pub peeks: u64,
    /// So many of a hundred readings find the bitmap in use.
    pub busy_percent: u64,
    /// It runs, but writes nothing.
    pub quiet: bool,
}

impl Memory {
    /// A guest of so many pages, a tenth of them ballooned out.
    pub fn new(seed: u64, pages: u64, busy_percent: u64) -> Memory {
        let mut dice = Dice(seed);
        Memory {
            pages: (0..pages)
                .map(|_| (dice.throw(10) > 0).then(|| dice.throw(20)))
                .collect(),
            dirty: PageSet::new(pages),
            writes: 20,
            dice: Dice(seed ^ 77),
            suspended: false,
            destroyed: false,
            in_write: false,
            in_first_pass: false,
            unsafe_peeks: 0,
            peeks: 0,
            busy_percent,
            quiet: false,
        }
    }

    /// The guest goes on for a while: it writes, mostly to the same pages, gives some up and takes some back.
    pub fn runs(&mut self) {
        if self.suspended || self.quiet {
            return;
        }
        for _ in 0..self.dice.throw(6) {
            let pages = self.pages.len() as u64;
            let hot = self.dice.throw(4) > 0;
            let page = self.dice.throw(if hot { pages / 4 } else { pages });
            self.writes += 1;
            let writes = self.writes;
            let Some(content) = self.pages.get_mut(page as usize) else {
                continue;
            };
            if content.is_some() && self.dice.throw(40) == 0 {
                // Xen does not call a page dirty that is given up.
                *content = None;
                continue;
            }
            *content = Some(writes % 300);
            self.dirty.insert(Pfn::new(page).unwrap());
        }
    }

    pub fn page(&self, page: u64) -> Option<Vec<u8>> {
        let content = (*self.pages.get(page as usize)?)?;
        Some(content.to_le_bytes().repeat(PAGE_SIZE / 8))
    }
}

/// Holds and releases as the dice say.
pub struct Anything {
    pub dice: Dice,
    pub hold_percent: u64,
    pub release_percent: u64,
    pub stay_percent: u64,
    /// Pages it was asked about since the last release.
    pub asked: Vec<Pfn>,
    /// All that it was ever asked about.
    pub known: Vec<Pfn>,
}

impl HoldPolicy for Anything {
    fn sampled(&mut self, _: &PageSet) {}

    fn hold(&mut self, _: Duration, pfns: &[Pfn], _: Option<&PageSet>) -> Vec<bool> {
        self.asked.extend(pfns);
        self.known.extend(pfns);
        pfns.iter().map(|_| self.dice.throw(100) < self.hold_percent).collect()
    }

    fn peeked(&mut self, _: Duration, _: &PageSet) {}

    fn sent(&mut self, _: Duration, _: u64, _: u64) {}

    fn release(&mut self, limit: usize) -> Vec<Pfn> {
        let all: Vec<Pfn> = self.asked.drain(..).collect();
        let released = all.into_iter().filter(|_| self.dice.throw(100) < self.release_percent);
        released.take(limit).collect()
    }

    fn left(&self) -> Duration {
        Duration::ZERO
    }

    fn outlook(&self, _: Duration) -> Option<Outlook> {
        Some(Outlook {
            downtime: Duration::from_millis(700),
            dirty_pages_rate: 10.0,
            sent_pages_rate: 100_000.0,
            page_wire_bytes: 4096.0,
        })
    }

    fn looked(&mut self, _: Duration, _: &PageSet) -> u64 {
        self.asked.clone_from(&self.known);
        self.asked.len() as u64
    }

    fn stays(&mut self, pfns: &[Pfn], _: Duration, _: u64) -> Vec<bool> {
        pfns.iter().map(|_| self.dice.throw(100) < self.stay_percent).collect()
    }
}

pub type Shared = Arc<Mutex<Memory>>;

pub struct Log(pub Shared);

impl DirtyLog for Log {
    fn bound(&self) -> u64 {
        self.0.lock().pages.len() as u64
    }

    fn running(&mut self) -> bool {
        let mut memory = self.0.lock();
        memory.runs();
        !memory.suspended
    }

    fn peek(&mut self) -> Result<Option<PageSet>, FrameError> {
        let mut memory = self.0.lock();
        memory.peeks += 1;
        memory.unsafe_peeks += u64::from(!memory.in_write && !memory.in_first_pass);
        let busy = memory.dice.throw(100) < memory.busy_percent;
        Ok((!busy).then(|| memory.dirty.clone()))
    }

    fn sample(&mut self, _: Duration, count: u32, each: &mut dyn FnMut(&PageSet)) -> Result<(), FrameError> {
        let mut memory = self.0.lock();
        for _ in 0..count {
            memory.runs();
            each(&memory.dirty);
            memory.dirty.clear();
        }
        Ok(())
    }
}

pub struct SourceFrames(pub Shared);

impl FrameSource for SourceFrames {
    fn read(&mut self, pfns: &[Pfn], pages: &mut [u8]) -> Result<(), FrameError> {
        let mut memory = self.0.lock();
        for (pfn, page) in pfns.iter().zip(pages.chunks_exact_mut(PAGE_SIZE)) {
            let there = !memory.destroyed;
            let gone = || FrameError::Unreadable {
                pfn: *pfn,
                source: io::Error::from_raw_os_error(22),
            };
            page.copy_from_slice(&memory.page(pfn.get()).filter(|_| there).ok_or_else(gone)?);
            memory.runs();
        }
        Ok(())
    }

    fn check_suspended(&mut self) -> Result<(), FrameError> {
        match self.0.lock().destroyed {
            true => Err(FrameError::Gone("it was destroyed".into())),
            false => Ok(()),
        }
    }
}

/// What stands before the pages of a stream, and what behind them.
pub fn around_pages() -> (Vec<u8>, Vec<u8>) {
    let stream = build_stream(&StreamSpec {
        guest: Guest::Pvh,
        start: Start::Xl,
        pages: 1,
        hole_percent: 0,
        no_data_percent: 0,
        passes: 1,
        batch: Batch::Mixed(16),
        ..StreamSpec::default()
    });
    let mut reader = xenfold::stream::Reader::new(&stream[..]);
    let (mut begin, mut end) = (0, 0);
    loop {
        let at = reader.offset() as usize;
        match reader.next().unwrap() {
            xenfold::stream::Event::Record(header) => {
                if header.is(xenfold::stream::Layer::Libxc, xenfold::stream::libxc::PAGE_DATA) {
                    begin = at;
                    reader.read_body(&mut Vec::new(), usize::MAX).unwrap();
                    end = reader.offset() as usize;
                } else {
                    reader.read_body(&mut Vec::new(), usize::MAX).unwrap();
                }
            }
            xenfold::stream::Event::End => break,
            _ => {}
        }
    }
    (stream[..begin].to_vec(), stream[end..].to_vec())
}

/// One pass of xl's helper over these pages. The guest goes on while each record is written.
pub fn send_pages(memory: &Shared, out: &mut dyn Write, pages: &[u64], batch: usize, time: Duration) -> io::Result<()> {
    for list in pages.chunks(batch.max(1)) {
        std::thread::sleep(time);
        let mut body = (list.len() as u32).to_le_bytes().to_vec();
        body.extend_from_slice(&[0; 4]);
        // As they are when the helper maps them; their bytes are those of the moment in which they are written.
        let there: Vec<(u64, bool)> = {
            let memory = memory.lock();
            list.iter().map(|page| (*page, memory.page(*page).is_some())).collect()
        };
        for (page, there) in &there {
            body.extend_from_slice(&(page | if *there { 0 } else { 0xf << 60 }).to_le_bytes());
        }
        let with_data = there.iter().filter(|(_, there)| *there).count();
        let length = body.len() + with_data * PAGE_SIZE;
        memory.lock().in_write = true;
        out.write_all(&1u32.to_le_bytes())?;
        out.write_all(&(length as u32).to_le_bytes())?;
        out.write_all(&body)?;
        for (page, _) in there.iter().filter(|(_, there)| *there) {
            let bytes = {
                let mut memory = memory.lock();
                memory.runs();
                // A frame that is mapped keeps its bytes when the guest gives it up.
                memory.page(*page).unwrap_or_else(|| vec![0xee; PAGE_SIZE])
            };
            out.write_all(&bytes)?;
        }
        let mut memory = memory.lock();
        memory.in_write = false;
        memory.runs();
    }
    Ok(())
}
