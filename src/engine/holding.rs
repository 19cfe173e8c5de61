//! Pages held back: those that the guest is expected to write again before it is suspended.
//!
//! xl sends a page again when it was written after the current pass began. So the bytes of a page that is about to be
//! written need not travel: a later record of xl's has newer ones. A page that was held and is *not* written again still
//! holds what it held when its pass began: it is read from the guest's frames and goes into a record of our own, at any
//! time, and all that is left right before xl's first record behind the pages, when the guest is suspended. No correctness
//! rests on when a pass begins, on the policy, or on how old the dirty bitmap is.
use std::sync::Arc;
use std::time::{Duration, Instant};

use parking_lot::Mutex;

use super::behind::{Behind, Fate, LeaveBehind, LeftBehind};
use super::page_record::PageRecord;
use super::{DirtyLog, EngineError, FrameSource, read_or_gone};
use crate::codec::MAX_ROWS;
use crate::page::{PAGE_SIZE, Pfn};
use crate::page_set::PageSet;
use crate::policy::HoldPolicy;
use crate::report::Figures;
use crate::stream::{Entry, PageType};

/// Reading the dirty bitmap pauses the guest. It may take one part in so many of the time.
const PEEK_SHARE: u32 = 100;

/// The shortest time between two readings, however quick they are.
const PEEK_EVERY: Duration = Duration::from_millis(50);

/// The interval of the model's samples (Ruan et al., section 3: a state each 50 ms).
pub const SAMPLE: Duration = Duration::from_millis(50);

/// Held pages that go in one record. A record has room for more, but the guest writes on while they are read.
const RELEASE_PAGES: usize = 256;

/// What is needed to hold pages back.
pub struct Holding {
    /// Which pages the guest writes.
    pub log: Box<dyn DirtyLog>,
    /// The source's own frames.
    pub frames: Box<dyn FrameSource>,
    pub policy: Box<dyn HoldPolicy>,
    /// Bytes that the pipe from xl can hold. With more of a record unread, xl's helper is inside its write.
    pub pipe_bytes: u64,
    /// How long to watch the guest before xl begins.
    pub model_time: Duration,
    pub downtime: DowntimeLimit,
    /// Pages that have not gone when the guest is suspended may follow it.
    pub behind: Option<LeaveBehind>,
}

/// How long the guest may stand still.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DowntimeLimit {
    pub limit: Duration,
    /// A guest that would stand still longer, after the last of xl's passes over it, stays where it is. Otherwise this is
    /// only said.
    pub abort: bool,
}

impl Holding {
    /// Learns how the guest writes, while xl waits for the destination's banner: later xl owns the dirty bitmap. Without
    /// it the policy knows less, so what goes wrong is of no consequence.
    pub(super) fn watch_guest(&mut self) {
        let count = self.model_time.as_millis() / SAMPLE.as_millis();
        let Holding { log, policy, .. } = self;
        let mut sampled = |written: &PageSet| policy.sampled(written);
        if let Err(error) = log.sample(SAMPLE, count as u32, &mut sampled) {
            log::debug!("the guest's writes were not watched: {error}");
        }
    }
}

/// Holds pages of one stream back.
pub(super) struct Held {
    holding: Holding,
    held: PageSet,
    behind: Option<Behind>,
    next_peek: Instant,
    start: Instant,
    /// The guest has been seen suspended.
    suspended: bool,
    figures: Arc<Mutex<Figures>>,
}

impl Held {
    pub fn new(holding: Holding, figures: Arc<Mutex<Figures>>) -> Held {
        let start = Instant::now();
        let bound = holding.log.bound();
        Held {
            held: PageSet::new(bound),
            behind: holding.behind.map(|plan| Behind::new(plan, bound)),
            next_peek: start,
            start,
            suspended: false,
            figures,
            holding,
        }
    }

    /// One of xl's passes has ended, and the next begins.
    pub fn pass(&mut self, number: u32) {
        if let Some(behind) = &mut self.behind {
            behind.pass(number);
        }
        let expected = self.holding.policy.expected_downtime(self.start.elapsed());
        self.figures.lock().expected_downtime_ms = expected.map(|time| time.as_millis() as u64);
    }

    /// xl's last pass over the running guest is done, but for the record that it waits with: it suspends the guest next.
    pub fn last_pass(&mut self) -> Result<(), EngineError> {
        let Some(expected) = self.holding.policy.expected_downtime(self.start.elapsed()) else {
            return Ok(());
        };
        let DowntimeLimit { limit, abort } = self.holding.downtime;
        let mut figures = self.figures.lock();
        figures.expected_downtime_ms = Some(expected.as_millis() as u64);
        figures.converged = Some(expected <= limit);
        if expected > limit && abort && self.behind.is_none() {
            return Err(EngineError::NoConvergence {
                expected_ms: expected.as_millis() as u64,
                limit_ms: limit.as_millis() as u64,
            });
        }
        Ok(())
    }

    /// Whether the guest runs. Then all that xl has written so far belongs to a live pass, since its last one comes after
    /// the suspend.
    pub fn guest_runs(&mut self) -> bool {
        self.holding.log.running()
    }

    /// Reads the dirty bitmap, if it is time. `unread`: bytes of a record that xl's helper has still to write or that
    /// wait in the pipe. Only while they are more than the pipe can hold is the helper certainly writing, and does not
    /// read the bitmap itself: two readings at once would fail, and its own ends the migration.
    fn look(&mut self, unread: u64) -> Option<PageSet> {
        let begin = Instant::now();
        if unread <= self.holding.pipe_bytes || begin < self.next_peek {
            return None;
        }
        let answer = self.holding.log.peek();
        let took = begin.elapsed();
        self.next_peek = begin + (took * PEEK_SHARE).max(PEEK_EVERY);
        let mut figures = self.figures.lock();
        figures.holding.peek_time_us += took.as_micros() as u64;
        match answer {
            Ok(Some(dirty)) => {
                figures.holding.peeks += 1;
                figures.holding.dirty_pages = dirty.len();
                return Some(dirty);
            }
            Ok(None) => figures.holding.busy_peeks += 1,
            Err(error) => {
                log::debug!("the dirty bitmap cannot be read, so it is done without: {error}");
                self.next_peek = begin + Duration::from_secs(3600);
            }
        }
        None
    }

    /// Decides what becomes of the pages of a record of xl's; `None`: all go. `unread`: bytes of it that have not been read,
    /// while the guest runs; `None`: it does not any more.
    pub fn keep(&mut self, list: &[Entry], unread: Option<u64>) -> Option<Vec<Fate>> {
        if unread.is_none() {
            self.fit_downtime();
        }
        let all = self.behind.as_ref().is_some_and(Behind::takes_all);
        let wanted = match unread {
            Some(unread) if !all => {
                let peek = self.look(unread);
                let pfns: Vec<Pfn> = list.iter().map(|entry| entry.pfn).collect();
                self.holding.policy.hold(self.start.elapsed(), &pfns, peek.as_ref())
            }
            _ => Vec::new(),
        };
        let mut wanted = wanted.into_iter();
        let fates: Vec<Fate> = list
            .iter()
            .map(|entry| {
                let wait = wanted.next() == Some(true);
                self.fate(entry, wait, unread.is_some())
            })
            .collect();
        let held = fates.iter().filter(|fate| **fate == Fate::Hold).count() as u64;
        let mut figures = self.figures.lock();
        figures.holding.pages_from_xl += list.iter().filter(|entry| entry.has_data).count() as u64;
        figures.holding.held_pages += held;
        fates.iter().any(|fate| *fate != Fate::Carry).then_some(fates)
    }

    /// The guest stands still: what goes before it is started should take no longer than is allowed, at the rate so far.
    fn fit_downtime(&mut self) {
        if let Some(behind) = self.behind.as_mut().filter(|_| !self.suspended) {
            self.suspended = true;
            let pages = self.figures.lock().pages.carried() as f64;
            let share = self.holding.downtime.limit.as_secs_f64() / self.start.elapsed().as_secs_f64().max(0.001);
            behind.fit((pages * share) as u64);
        }
    }

    fn fate(&mut self, entry: &Entry, wait: bool, runs: bool) -> Fate {
        let plain = entry.has_data && entry.page_type == PageType::NoTab;
        if let Some(behind) = &mut self.behind
            && plain
        {
            let fate = if runs {
                behind.live(entry)
            } else {
                behind.suspended(entry)
            };
            if fate != Fate::Carry {
                self.held.remove(entry.pfn);
                return fate;
            }
        }
        if wait && plain && self.held.insert(entry.pfn) {
            return Fate::Hold;
        }
        self.held.remove(entry.pfn);
        if let Some(behind) = &mut self.behind {
            behind.carried(entry.pfn);
        }
        Fate::Carry
    }

    /// Held pages that need not wait any longer, while the guest runs. `wire_bytes`: what has gone to the link so far.
    pub fn due(&mut self, wire_bytes: u64) -> Vec<Pfn> {
        let now = self.start.elapsed();
        let pages = self.figures.lock().pages.carried();
        self.holding.policy.sent(now, pages, wire_bytes);
        loop {
            let mut pfns = self.holding.policy.release(RELEASE_PAGES);
            let last = pfns.is_empty();
            pfns.retain(|pfn| self.held.contains(*pfn));
            if last || !pfns.is_empty() {
                self.figures.lock().holding.released_pages += pfns.len() as u64;
                return pfns;
            }
        }
    }

    /// Pages that are still held when xl has sent all of its own, the guest being suspended: so many as go into a record.
    pub fn rest(&mut self) -> Vec<Pfn> {
        let pfns: Vec<Pfn> = match &mut self.behind {
            Some(behind) => behind.now(&self.held, MAX_ROWS),
            None => self.held.iter().take(MAX_ROWS).collect(),
        };
        self.figures.lock().holding.flushed_pages += pfns.len() as u64;
        pfns
    }

    /// A PAGE_DATA record of these pages as they are now, which are then held no longer. One that is not there any more
    /// goes without data, as xl sends it.
    pub fn read(&mut self, pfns: &[Pfn], mut buffer: Vec<u8>) -> Result<PageRecord, EngineError> {
        let mut pages = vec![0; pfns.len() * PAGE_SIZE];
        let gone = read_or_gone(self.holding.frames.as_mut(), pfns, &mut pages)?;
        // The buffer's old bytes are written over, as where xl's records are read.
        let with_data = gone.iter().filter(|gone| !**gone).count();
        let length = 8 + pfns.len() * 8 + with_data * PAGE_SIZE;
        buffer.resize(buffer.len().max(length), 0);
        let (head, rest) = buffer.split_at_mut(8);
        head.copy_from_slice(&(pfns.len() as u64).to_le_bytes());
        let (list, data) = rest.split_at_mut(pfns.len() * 8);
        for ((pfn, gone), entry) in pfns.iter().zip(&gone).zip(list.chunks_exact_mut(8)) {
            let page_type = if *gone { PageType::XTab } else { PageType::NoTab };
            entry.copy_from_slice(&(pfn.get() | page_type.bits()).to_le_bytes());
        }
        let there = pages.chunks_exact(PAGE_SIZE).zip(&gone).filter(|(_, gone)| !**gone);
        for ((page, _), place) in there.zip(data.chunks_exact_mut(PAGE_SIZE)) {
            place.copy_from_slice(page);
        }
        pfns.iter().for_each(|pfn| self.held.remove(*pfn));
        Ok(PageRecord::parse(buffer, length, 0)?)
    }

    /// A record that says of pages that they stay behind; `None`: there are no more.
    pub fn rest_behind(&mut self) -> Result<Option<PageRecord>, EngineError> {
        let Some(behind) = &mut self.behind else {
            return Ok(None);
        };
        let rest = behind.rest(&mut self.held, MAX_ROWS);
        if rest.is_empty() {
            return Ok(None);
        }
        let mut body = (rest.len() as u64).to_le_bytes().to_vec();
        for pfn in &rest {
            body.extend_from_slice(&(pfn.get() | PageType::XAlloc.bits()).to_le_bytes());
        }
        let length = body.len();
        Ok(Some(PageRecord::parse(body, length, 0)?))
    }

    /// The stream is complete: what has stayed behind.
    pub fn end(self) -> Option<LeftBehind> {
        self.behind?.end(self.holding.frames)
    }
}
