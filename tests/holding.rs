//! Pages held back from a guest that runs: whatever is held, released and written when, the other host has in the end
//! what the guest had when it was suspended.
#[path = "support/hosts.rs"]
mod hosts;
mod support;

use std::io::{self, Write};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use hosts::{DestinationXl, Outcome, Plan, SourceXl, migrate};
use parking_lot::Mutex;
use proptest::prelude::*;
use proptest::test_runner::{Config, TestRunner};
use support::{Batch, Guest, Start, StreamSpec, build_stream};
use xenfold::engine::source::Ending;
use xenfold::engine::{DirtyLog, DowntimeLimit, EngineError, FrameError, FrameSource, Holding, SAMPLE};
use xenfold::page::{PAGE_SIZE, Pfn};
use xenfold::page_set::PageSet;
use xenfold::policy::{Forecast, HoldPolicy};

/// What the pipe between xl and the agent holds in these tests (support/hosts.rs).
const PIPE_BYTES: u64 = 64 << 10;

/// Numbers that look random.
struct Dice(u64);

impl Dice {
    fn throw(&mut self, sides: u64) -> u64 {
        self.0 = self
            .0
            .wrapping_mul(6364136223846793005)
            .wrapping_add(1442695040888963407);
        (self.0 >> 33) % sides.max(1)
    }
}

/// A guest as Xen has it. Each page is filled with a number that grows with each write.
struct Memory {
    /// `None`: ballooned out.
    pages: Vec<Option<u64>>,
    dirty: PageSet,
    writes: u64,
    dice: Dice,
    suspended: bool,
    /// xl's helper is inside its write of a record.
    in_write: bool,
    /// The bitmap was read while the helper may have read it itself.
    unsafe_peeks: u64,
    peeks: u64,
    /// So many of a hundred readings find the bitmap in use.
    busy_percent: u64,
}

impl Memory {
    /// The guest goes on for a while: it writes, mostly to the same pages, gives some up and takes some back.
    fn runs(&mut self) {
        if self.suspended {
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

    fn page(&self, page: u64) -> Option<Vec<u8>> {
        let content = (*self.pages.get(page as usize)?)?;
        Some(content.to_le_bytes().repeat(PAGE_SIZE / 8))
    }
}

type Shared = Arc<Mutex<Memory>>;

struct Log(Shared);

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
        memory.unsafe_peeks += u64::from(!memory.in_write);
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

struct SourceFrames(Shared);

impl FrameSource for SourceFrames {
    fn read(&mut self, pfns: &[Pfn], pages: &mut [u8]) -> Result<(), FrameError> {
        let mut memory = self.0.lock();
        for (pfn, page) in pfns.iter().zip(pages.chunks_exact_mut(PAGE_SIZE)) {
            let gone = || FrameError::Unreadable {
                pfn: *pfn,
                source: io::Error::from_raw_os_error(22),
            };
            page.copy_from_slice(&memory.page(pfn.get()).ok_or_else(gone)?);
            memory.runs();
        }
        Ok(())
    }
}

/// Holds and releases as the dice say.
struct Anything {
    dice: Dice,
    hold_percent: u64,
    release_percent: u64,
    /// Pages it was asked about since the last release.
    asked: Vec<Pfn>,
}

impl HoldPolicy for Anything {
    fn sampled(&mut self, _: &PageSet) {}

    fn hold(&mut self, _: Duration, pfns: &[Pfn], _: Option<&PageSet>) -> Vec<bool> {
        self.asked.extend(pfns);
        pfns.iter().map(|_| self.dice.throw(100) < self.hold_percent).collect()
    }

    fn sent(&mut self, _: Duration, _: u64, _: u64) {}

    fn release(&mut self, limit: usize) -> Vec<Pfn> {
        let all: Vec<Pfn> = self.asked.drain(..).collect();
        let released = all.into_iter().filter(|_| self.dice.throw(100) < self.release_percent);
        released.take(limit).collect()
    }

    fn expected_downtime(&self, _: Duration) -> Option<Duration> {
        Some(Duration::from_millis(700))
    }
}

/// What stands before the pages of a stream, and what behind them.
fn around_pages() -> (Vec<u8>, Vec<u8>) {
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
fn send_pages(memory: &Shared, out: &mut dyn Write, pages: &[u64], batch: usize, time: Duration) -> io::Result<()> {
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

#[derive(Clone, Debug)]
struct Case {
    seed: u64,
    pages: usize,
    batch: usize,
    passes: usize,
    hold_percent: u64,
    release_percent: u64,
    forecast: bool,
    busy_percent: u64,
    /// What xl's helper takes for a record, beside its writes.
    record_time: Duration,
    downtime: DowntimeLimit,
}

/// What any guest keeps.
const NO_LIMIT: DowntimeLimit = DowntimeLimit {
    limit: Duration::ZERO,
    abort: false,
};

fn case() -> impl Strategy<Value = Case> {
    (
        any::<u64>(),
        1usize..200,
        1usize..80,
        0usize..5,
        prop::sample::select(vec![0u64, 5, 50, 95, 100]),
        prop::sample::select(vec![0u64, 10, 100]),
        any::<bool>(),
    )
        .prop_map(
            |(seed, pages, batch, passes, hold_percent, release_percent, forecast)| Case {
                seed,
                pages,
                batch,
                passes,
                hold_percent,
                release_percent,
                forecast,
                busy_percent: 20,
                record_time: Duration::ZERO,
                downtime: NO_LIMIT,
            },
        )
}

/// Migrates a guest that runs, and compares.
fn live(case: &Case) -> Result<(Outcome, u64), String> {
    let mut dice = Dice(case.seed);
    let memory = Arc::new(Mutex::new(Memory {
        pages: (0..case.pages)
            .map(|_| (dice.throw(10) > 0).then(|| dice.throw(20)))
            .collect(),
        dirty: PageSet::new(case.pages as u64),
        writes: 20,
        dice: Dice(case.seed ^ 77),
        suspended: false,
        in_write: false,
        unsafe_peeks: 0,
        peeks: 0,
        busy_percent: case.busy_percent,
    }));
    let (xls, passes, batch, record_time) = (memory.clone(), case.passes, case.batch, case.record_time);
    let all: Vec<u64> = (0..case.pages as u64).collect();
    let live = move |out: &mut dyn Write| {
        let (before, behind) = around_pages();
        out.write_all(&before)?;
        let mut list = all;
        for pass in 0..=passes {
            if pass > 0 {
                let mut memory = xls.lock();
                memory.suspended = pass == passes;
                list = memory.dirty.iter().map(Pfn::get).collect();
                memory.dirty.clear();
            } else if passes == 0 {
                xls.lock().suspended = true;
            }
            send_pages(&xls, out, &list, batch, record_time)?;
        }
        out.write_all(&behind)
    };
    let policy: Box<dyn HoldPolicy> = if case.forecast {
        Box::new(Forecast::new(case.pages as u64, case.pages as u64, SAMPLE))
    } else {
        Box::new(Anything {
            dice: Dice(case.seed ^ 5),
            hold_percent: case.hold_percent,
            release_percent: case.release_percent,
            asked: Vec::new(),
        })
    };
    let outcome = migrate(Plan {
        live: Some(Box::new(live)),
        verify: true,
        holding: Some(Holding {
            log: Box::new(Log(memory.clone())),
            frames: Box::new(SourceFrames(memory.clone())),
            policy,
            pipe_bytes: PIPE_BYTES,
            model_time: Duration::from_millis(200),
            downtime: case.downtime,
        }),
        ..Plan::new(Vec::new())
    });
    if matches!(outcome.ending, Ending::SourceOwns(EngineError::NoConvergence { .. })) {
        return Ok((outcome, 0));
    }
    if !matches!(outcome.ending, Ending::Completed { status: 0 })
        || (outcome.source_xl, outcome.destination_xl) != (SourceXl::Gone, DestinationXl::Running)
    {
        return Err(format!("{:?}; destination {:?}", outcome.ending, outcome.destination));
    }
    let memory = memory.lock();
    for page in 0..case.pages as u64 {
        if let Some(right) = memory.page(page)
            && outcome.image.get(&page) != Some(&right)
        {
            let arrived = outcome.image.get(&page).map(|page| page[0]);
            return Err(format!("page {page} holds {:?}, and {arrived:?} arrived", right[0]));
        }
    }
    if memory.unsafe_peeks > 0 {
        return Err(format!(
            "{} of {} peeks were not safe",
            memory.unsafe_peeks, memory.peeks
        ));
    }
    Ok((outcome, memory.peeks))
}

#[test]
fn memory_is_right_whatever_is_held() {
    let cases = std::env::var("XENFOLD_CASES").ok().and_then(|cases| cases.parse().ok());
    let mut runner = TestRunner::new(Config {
        cases: cases.unwrap_or(200),
        failure_persistence: None,
        max_shrink_iters: 0,
        ..Config::default()
    });
    let peeks = AtomicU64::new(0);
    runner
        .run(&case(), |case| {
            let (outcome, peeked) = live(&case).map_err(TestCaseError::fail)?;
            peeks.fetch_add(peeked, Ordering::Relaxed);
            let held = outcome.figures.holding;
            prop_assert!(held.held_pages <= held.pages_from_xl);
            prop_assert_eq!(
                outcome.figures.iteration > 0,
                !outcome.image.is_empty() || held.pages_from_xl == 0
            );
            Ok(())
        })
        .unwrap();
    assert!(peeks.into_inner() > 0, "the bitmap was never read");
}

#[test]
fn pages_written_again_are_not_sent_again() {
    let case = Case {
        seed: 3,
        pages: 4000,
        batch: 400,
        passes: 4,
        hold_percent: 0,
        release_percent: 0,
        forecast: true,
        busy_percent: 0,
        // A pass is longer than the time between two readings of the bitmap, on a machine of any speed.
        record_time: Duration::from_millis(10),
        downtime: NO_LIMIT,
    };
    let (outcome, _) = live(&case).unwrap();
    let figures = outcome.figures;
    let held = figures.holding;
    assert!(held.held_pages > 0, "{held:?}");
    assert_eq!(figures.iteration, 5);
    // Those that the guest has given up meanwhile go without data.
    let sent = held.pages_from_xl - held.held_pages + held.released_pages + held.flushed_pages;
    assert!((sent - 200..=sent).contains(&figures.pages.carried()), "{figures:?}");
}

#[test]
fn a_guest_that_does_not_converge_stays_where_that_is_wanted() {
    let case = Case {
        seed: 4,
        pages: 2000,
        batch: 300,
        passes: 5,
        hold_percent: 50,
        release_percent: 10,
        forecast: false,
        busy_percent: 20,
        record_time: Duration::ZERO,
        downtime: DowntimeLimit {
            limit: Duration::from_millis(699),
            abort: true,
        },
    };
    let (outcome, _) = live(&case).unwrap();
    assert!(
        matches!(outcome.ending, Ending::SourceOwns(EngineError::NoConvergence { .. })),
        "{:?}",
        outcome.ending
    );
    assert_eq!(outcome.source_xl, SourceXl::Resumed);
    assert_ne!(outcome.destination_xl, DestinationXl::Running);
}
