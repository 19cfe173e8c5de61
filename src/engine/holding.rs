//! Pages held back: those that the guest is expected to write again before it is suspended.
//!
//! xl sends a page again when it was written after the current pass began. So the bytes of a page that is about to be
//! written need not travel: a later record of xl's has newer ones. A page that was held and is *not* written again still
//! holds what it held when its pass began: it is read from the guest's frames and goes into a record of our own, at any
//! time, and all that is left right before xl's first record behind the pages, when the guest is suspended. No correctness
//! rests on when a pass begins, on the policy, or on how old the dirty bitmap is.
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use parking_lot::Mutex;

use super::behind::{Behind, Fate, LeaveBehind, LeftBehind};
use super::page_record::PageRecord;
use super::{DirtyLog, EngineError, FrameSource, read_or_gone};
use crate::codec::MAX_ROWS;
use crate::page::{PAGE_SIZE, Pfn};
use crate::page_set::PageSet;
use crate::policy::{HoldPolicy, Hope, Look, RoundLimits, Rounds};
use crate::report::Figures;
use crate::stream::{Entry, PageType};

/// Reading the dirty bitmap pauses the guest. It may take one part in so many of the time.
const PEEK_SHARE: u32 = 100;

/// The same in the first pass, which leaves some of it to the later ones.
const FIRST_PEEK_SHARE: u32 = 160;

/// The time whose share may be spent before it has gone by: what is seen early serves all of the pass.
const IN_ADVANCE: Duration = Duration::from_secs(5);

/// The shortest time between two readings, however quick they are.
const PEEK_EVERY: Duration = Duration::from_millis(50);

/// The interval of the model's samples (Ruan et al., section 3: a state each 50 ms).
pub const SAMPLE: Duration = Duration::from_millis(50);

/// Held pages that go in one record. A record has room for more, but the guest writes on while they are read.
const RELEASE_PAGES: usize = 256;

/// The longest wait for the next reading of the bitmap for which xl is held.
const ROUND_WAIT: Duration = Duration::from_secs(10);

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
    /// Rounds for which xl may be held at the end of its passes, and the time since its stream began after which it may not.
    pub max_rounds: u32,
    pub max_time: Option<Duration>,
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
    /// Have gone to the other host, as they were then.
    gone: PageSet,
    behind: Option<Behind>,
    /// Pages that are held only because it was said that they stay behind.
    announced: PageSet,
    /// Written since the pass began, at the last look.
    dirty: PageSet,
    next_peek: Instant,
    peeks: u32,
    peek_time: Duration,
    /// xl's pass, and the last page of its present record.
    pass: u32,
    last: Pfn,
    start: Instant,
    /// Held pages are being sent.
    releasing: bool,
    /// How much goes while the guest stands still has been settled.
    fitted: bool,
    rounds: Rounds,
    round: Round,
    /// Since when xl is held.
    waits: Option<Instant>,
    figures: Arc<Mutex<Figures>>,
}

/// A round under way.
#[derive(Default)]
struct Round {
    /// When its bitmap was read, and how long after that of the round before.
    began: Option<Instant>,
    unchanged: Duration,
    dirty: PageSet,
    /// Pages that xl sends all the same, those that were read among them, and the time that took.
    full: u64,
    read: u64,
    read_time: Duration,
    scratch: Vec<u8>,
}

/// Pages that go ahead of xl, and what was in them.
#[derive(Default)]
pub(super) struct Ahead {
    pfns: Vec<Pfn>,
    pages: Vec<u8>,
}

impl Ahead {
    /// Whether they are enough for a record.
    pub fn is_full(&self) -> bool {
        self.pfns.len() >= RELEASE_PAGES
    }

    pub fn is_empty(&self) -> bool {
        self.pfns.is_empty()
    }

    /// Makes a PAGE_DATA record of them. None of them is left.
    pub fn record(&mut self, buffer: Vec<u8>) -> Result<PageRecord, EngineError> {
        let record = record_of(&self.pfns, &self.pages, &vec![false; self.pfns.len()], buffer);
        self.pfns.clear();
        self.pages.clear();
        record
    }
}

impl Held {
    pub fn new(holding: Holding, figures: Arc<Mutex<Figures>>) -> Held {
        let start = Instant::now();
        let bound = holding.log.bound();
        let limits = RoundLimits {
            rounds: holding.max_rounds,
            until: holding.max_time,
            downtime: holding.downtime.limit,
        };
        Held {
            held: PageSet::new(bound),
            gone: PageSet::new(bound),
            behind: holding.behind.map(|plan| Behind::new(plan, bound)),
            announced: PageSet::new(bound),
            dirty: PageSet::new(bound),
            next_peek: start,
            peeks: 0,
            peek_time: Duration::ZERO,
            pass: 0,
            last: Pfn::default(),
            start,
            releasing: false,
            fitted: false,
            rounds: Rounds::new(limits, bound),
            round: Round::default(),
            waits: None,
            figures,
            holding,
        }
    }

    /// Whether pages may follow the guest.
    pub fn leaves_behind(&self) -> bool {
        self.behind.is_some()
    }

    /// One of xl's passes has ended, and the next begins.
    pub fn pass(&mut self, number: u32) {
        self.pass = number;
        if let Some(behind) = &mut self.behind {
            behind.pass(number);
            self.dirty.clear();
        }
        self.expect();
    }

    /// How long the guest would stand still if it was suspended now, as far as that is known.
    fn expect(&self) -> Option<Duration> {
        let outlook = self.holding.policy.outlook(self.start.elapsed());
        let expected = self.rounds.expected().or(outlook.map(|outlook| outlook.downtime));
        let outlook = outlook.unwrap_or_default();
        let mut figures = self.figures.lock();
        figures.expected_downtime_ms = expected.map(|time| time.as_millis() as u64);
        figures.dirty_pages_rate = outlook.dirty_pages_rate as u64;
        figures.sent_pages_rate = outlook.sent_pages_rate as u64;
        figures.page_wire_bytes = outlook.page_wire_bytes as u64;
        expected
    }

    /// xl's last pass over the running guest is done, but for the record that it waits with: it suspends the guest next.
    pub fn last_pass(&mut self) -> Result<(), EngineError> {
        let Some(expected) = self.expect() else {
            return Ok(());
        };
        let DowntimeLimit { limit, abort } = self.holding.downtime;
        self.figures.lock().converged = Some(expected <= limit);
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
    /// read the bitmap itself: two readings at once would fail, and its own ends the migration. Or while it is certainly in the
    /// midst of its first pass, which has all page numbers.
    fn look(&mut self, unread: u64) -> Option<PageSet> {
        let begin = Instant::now();
        if unread <= self.holding.pipe_bytes && !self.is_first_pass() || begin < self.next_peek {
            return None;
        }
        let answer = self.holding.log.peek();
        let elapsed = begin.elapsed();
        let took = self.holding.log.paused().map_or(elapsed, |paused| paused.min(elapsed));
        self.peeks += 1;
        self.peek_time += took;
        // The later passes are short, and count: part of the first one's share is for them. Some of it may be spent in advance; the
        // rest goes evenly over the pass, since an order in which the guest writes is only as fine as the readings are dense.
        let (share, in_advance) = match self.pass {
            1 => (FIRST_PEEK_SHARE, (self.holding.policy.left() / 2).min(IN_ADVANCE)),
            _ => (PEEK_SHARE, Duration::ZERO),
        };
        let pace = (self.peek_time / self.peeks * PEEK_SHARE / 4).max(PEEK_EVERY);
        let earned = (self.peek_time * share).saturating_sub(in_advance);
        self.next_peek = (begin + pace).max(self.start + earned);
        let mut figures = self.figures.lock();
        figures.holding.peek_time_us += took.as_micros() as u64;
        match answer {
            Ok(Some(dirty)) => {
                figures.holding.peeks += 1;
                figures.holding.dirty_pages = dirty.len();
                if self.behind.as_ref().is_some_and(Behind::announces) {
                    self.dirty = dirty.clone();
                }
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

    /// Between two records, while the link is behind: a slow one may take seconds for each. Reads the bitmap in xl's first pass only,
    /// since nothing tells that its helper is inside a write.
    pub fn glance(&mut self) {
        if !self.behind.as_ref().is_some_and(Behind::takes_all)
            && let Some(dirty) = self.look(0)
        {
            self.holding.policy.peeked(self.start.elapsed(), &dirty);
        }
    }

    /// Whether xl's helper has certainly not come to the end of its first pass: that has all page numbers one after the other, each
    /// at least eight bytes, so it is no further ahead than the pipe, what it writes and what it prepares can hold.
    fn is_first_pass(&self) -> bool {
        let ahead = self.holding.pipe_bytes / 8 + 2 * MAX_ROWS as u64;
        self.pass == 1 && self.last.get().saturating_add(ahead) < self.holding.log.bound()
    }

    /// Decides what becomes of the pages of a record of xl's; `None`: all go. `unread`: bytes of it that have not been read,
    /// while the guest runs; `None`: it does not any more.
    pub fn keep(&mut self, list: &[Entry], unread: Option<u64>) -> Option<Vec<Fate>> {
        if unread.is_none() {
            self.fit_downtime();
        }
        self.last = list.last().map_or(self.last, |entry| entry.pfn);
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
        let (mut held, mut again) = (0, 0);
        let fates: Vec<Fate> = list
            .iter()
            .map(|entry| {
                let wait = wanted.next() == Some(true);
                again += u64::from(self.held.contains(entry.pfn) && !self.announced.contains(entry.pfn));
                self.announced.remove(entry.pfn);
                let fate = self.fate(entry, wait, unread.is_some());
                held += u64::from(fate == Fate::Hold && self.held.contains(entry.pfn));
                fate
            })
            .collect();
        let mut figures = self.figures.lock();
        figures.holding.pages_from_xl += list.iter().filter(|entry| entry.has_data).count() as u64;
        figures.holding.held_pages += held;
        figures.holding.again_pages += again;
        fates.iter().any(|fate| *fate != Fate::Carry).then_some(fates)
    }

    /// What goes while the guest stands still should take no longer than is allowed, at the rate so far.
    fn fit_downtime(&mut self) {
        if let Some(behind) = self.behind.as_mut().filter(|_| !self.fitted) {
            self.fitted = true;
            let pages = self.figures.lock().pages.carried() as f64;
            let share = self.holding.downtime.limit.as_secs_f64() / self.start.elapsed().as_secs_f64().max(0.001);
            behind.fit((pages * share) as u64);
        }
    }

    /// Records that say what will stay behind, now that the guest is suspended next, for the destination to take it out before.
    /// `unread`: bytes of xl's present record; `carried`: pages in it that go.
    ///
    /// Where a pass was not seen to begin the bitmap may have been read in the one before, and xl will not send all of them again.
    /// So they are held.
    pub fn announce(&mut self, unread: u64, carried: &[Pfn]) -> Result<Vec<PageRecord>, EngineError> {
        if !self.behind.as_ref().is_some_and(Behind::announces) {
            return Ok(Vec::new());
        }
        self.fit_downtime();
        self.look(unread);
        let Some(behind) = &self.behind else {
            return Ok(Vec::new());
        };
        let mut pages = behind.announced(&self.held, &self.dirty);
        carried.iter().for_each(|pfn| pages.remove(*pfn));
        for pfn in pages.iter().filter(|pfn| !self.held.contains(*pfn)) {
            self.announced.insert(pfn);
        }
        self.held.union(&pages);
        let pages: Vec<Pfn> = pages.iter().collect();
        pages.chunks(MAX_ROWS).map(record_behind).collect()
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

    /// A record goes to the other host.
    pub fn goes(&mut self, record: &PageRecord) {
        let mut repeats = 0;
        for (pfn, _, page) in &record.list {
            if page.is_some() {
                repeats += u64::from(self.gone.contains(*pfn));
                self.gone.insert(*pfn);
            }
        }
        self.figures.lock().holding.repeat_pages += repeats;
    }

    /// Held pages that need not wait any longer, while the guest runs; to be asked again until there are none. `wire_bytes`:
    /// what has gone to the link so far; `unread`: bytes of xl's present record.
    pub fn due(&mut self, wire_bytes: u64, unread: u64) -> Vec<Pfn> {
        if self.releasing
            && let Some(dirty) = self.look(unread)
        {
            self.holding.policy.peeked(self.start.elapsed(), &dirty);
        }
        let now = self.start.elapsed();
        let pages = self.figures.lock().pages.carried();
        self.holding.policy.sent(now, pages, wire_bytes);
        loop {
            let mut pfns = self.holding.policy.release(RELEASE_PAGES);
            let last = pfns.is_empty();
            pfns.retain(|pfn| self.held.contains(*pfn));
            self.releasing = !last;
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
    pub fn read(&mut self, pfns: &[Pfn], buffer: Vec<u8>) -> Result<PageRecord, EngineError> {
        let mut pages = vec![0; pfns.len() * PAGE_SIZE];
        let gone = read_or_gone(self.holding.frames.as_mut(), pfns, &mut pages)?;
        pfns.iter().for_each(|pfn| self.held.remove(*pfn));
        record_of(pfns, &pages, &gone, buffer)
    }

    /// xl waits with the last record of its last pass over the running guest, `unread` bytes of it still to come. Begins
    /// another round while that helps: reads which pages xl will send in the suspended guest's pass, and waits for it first,
    /// since reading pauses the guest.
    ///
    /// Whatever is sent of those pages is right: xl sends each of them once more, as it is in the end.
    pub fn begin_round(&mut self, unread: u64) -> Option<PageSet> {
        let outlook = self.holding.policy.outlook(self.start.elapsed())?;
        let wait = self.next_peek.saturating_duration_since(Instant::now());
        let now = self.start.elapsed() + wait;
        if self.behind.is_some()
            || unread <= self.holding.pipe_bytes
            || wait > ROUND_WAIT
            || !self.rounds.goes_on(now, &outlook, wait)
        {
            return None;
        }
        let waits = Instant::now();
        thread::sleep(wait);
        let began = Instant::now();
        let dirty = self.look(unread)?;
        let policy = &mut self.holding.policy;
        let quiet = policy.looked(self.start.elapsed(), &dirty);
        // Where nearly all is likely written again there is no need to look at it.
        if self.round.began.is_none() {
            let both = self.held.words().iter().zip(dirty.words());
            let mut hope = Hope {
                waiting: both.map(|(held, dirty)| u64::from((held | dirty).count_ones())).sum(),
                quiet,
                stay: 0,
            };
            let mut pages = dirty.iter().peekable();
            while pages.peek().is_some() {
                let pfns: Vec<Pfn> = pages.by_ref().take(RELEASE_PAGES).collect();
                let stays = policy.stays(&pfns, Duration::ZERO, dirty.len());
                hope.stay += stays.iter().filter(|stays| **stays).count() as u64;
            }
            if !hope.is_any(&outlook, wait) {
                log::debug!("xl is not held: {hope:?}, {outlook:?}");
                return None;
            }
        }
        if !self.guest_runs() {
            return None;
        }
        self.waits.get_or_insert(waits);
        self.rounds.begin();
        self.round = Round {
            began: Some(began),
            unchanged: self.round.began.map_or(Duration::ZERO, |before| began - before),
            dirty: dirty.clone(),
            scratch: std::mem::take(&mut self.round.scratch),
            ..Round::default()
        };
        Some(dirty)
    }

    /// Looks at pages that xl will send, and adds those that go before to `ahead`. `carried`: pages that xl is just
    /// sending, in their order; what was written to them earlier would come after.
    pub fn look_at(&mut self, pfns: &[Pfn], carried: &[Pfn], ahead: &mut Ahead) -> Result<(), EngineError> {
        if self.rounds.is_over(self.start.elapsed()) {
            self.round.full += pfns.iter().filter(|pfn| !self.rounds.is_there(**pfn)).count() as u64;
            return Ok(());
        }
        let begin = Instant::now();
        let free: Vec<Pfn> = pfns
            .iter()
            .copied()
            .filter(|pfn| carried.binary_search(pfn).is_err())
            .collect();
        self.round.full += (pfns.len() - free.len()) as u64;
        let mut pages = std::mem::take(&mut self.round.scratch);
        pages.resize(free.len() * PAGE_SIZE, 0);
        let gone = read_or_gone(self.holding.frames.as_mut(), &free, &mut pages)?;
        let (mut new, mut same) = (Vec::new(), Vec::new());
        for ((pfn, page), gone) in free.iter().zip(pages.chunks_exact(PAGE_SIZE)).zip(gone) {
            match self.rounds.look(*pfn, crc32fast::hash(page)) {
                // xl says so, without data.
                _ if gone => {}
                Look::New => new.push((*pfn, page)),
                Look::Changed => self.round.full += 1,
                Look::Same => same.push((*pfn, page)),
                Look::There => {}
            }
        }
        self.round.read += free.len() as u64;
        self.round.read_time += begin.elapsed();
        let mut goes = Vec::new();
        for (list, unchanged) in [(new, Duration::ZERO), (same, self.round.unchanged)] {
            let pfns: Vec<Pfn> = list.iter().map(|(pfn, _)| *pfn).collect();
            let stays = self.holding.policy.stays(&pfns, unchanged, self.round.dirty.len());
            for (page, stays) in list.into_iter().zip(stays) {
                match stays {
                    true => goes.push(page),
                    false => self.round.full += 1,
                }
            }
        }
        self.figures.lock().holding.ahead_pages += goes.len() as u64;
        // As xl's records ascend.
        goes.sort_unstable_by_key(|(pfn, _)| *pfn);
        for (pfn, page) in goes {
            self.rounds.goes(pfn);
            ahead.pfns.push(pfn);
            ahead.pages.extend_from_slice(page);
        }
        self.round.scratch = pages;
        Ok(())
    }

    /// All pages of a round have been looked at, and those that go ahead are on their way.
    pub fn end_round(&mut self) {
        let Some(outlook) = self.holding.policy.outlook(self.start.elapsed()) else {
            return;
        };
        let round = &self.round;
        let took = round.began.map_or(Duration::ZERO, |began| began.elapsed());
        let both = self.held.words().iter().zip(round.dirty.words());
        let held: u64 = both.map(|(held, dirty)| u64::from((held & !dirty).count_ones())).sum();
        let newly = outlook.dirty_pages_rate * took.as_secs_f64();
        let full = (round.full + held) as f64 + newly;
        let full_time = Duration::try_from_secs_f64(1.0 / outlook.sent_pages_rate).unwrap_or(Duration::MAX);
        // What comes again has to be read, hashed and sent as a reference: about what it takes to read it here.
        let again_time = round.read_time.div_f64(round.read.max(1) as f64);
        let again = (round.dirty.len() as f64 - round.full as f64).max(0.0);
        self.rounds.end(full, full_time, again, again_time);
        let expected = self.expect();
        let mut figures = self.figures.lock();
        figures.holding.rounds = self.rounds.made();
        figures.holding.round_time_ms = self.waits.map_or(0, |since| since.elapsed().as_millis() as u64);
        log::debug!(
            "round {}: {} pages dirty, {} of them not as sent; expected downtime {expected:?}",
            self.rounds.made(),
            round.dirty.len(),
            round.full
        );
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
        record_behind(&rest).map(Some)
    }

    /// The stream is complete: what has stayed behind.
    pub fn end(self) -> Option<LeftBehind> {
        self.behind?.end(self.holding.frames)
    }
}

/// A PAGE_DATA record that says of pages that they stay behind.
fn record_behind(pfns: &[Pfn]) -> Result<PageRecord, EngineError> {
    let mut body = (pfns.len() as u64).to_le_bytes().to_vec();
    for pfn in pfns {
        body.extend_from_slice(&(pfn.get() | PageType::XAlloc.bits()).to_le_bytes());
    }
    let length = body.len();
    Ok(PageRecord::parse(body, length, 0)?)
}

/// A PAGE_DATA record of pages, in a buffer whose old bytes are written over. Those that are `gone` go without data.
fn record_of(pfns: &[Pfn], pages: &[u8], gone: &[bool], mut buffer: Vec<u8>) -> Result<PageRecord, EngineError> {
    let with_data = gone.iter().filter(|gone| !**gone).count();
    let length = 8 + pfns.len() * 8 + with_data * PAGE_SIZE;
    buffer.resize(buffer.len().max(length), 0);
    let (head, rest) = buffer.split_at_mut(8);
    head.copy_from_slice(&(pfns.len() as u64).to_le_bytes());
    let (list, data) = rest.split_at_mut(pfns.len() * 8);
    for ((pfn, gone), entry) in pfns.iter().zip(gone).zip(list.chunks_exact_mut(8)) {
        let page_type = if *gone { PageType::XTab } else { PageType::NoTab };
        entry.copy_from_slice(&(pfn.get() | page_type.bits()).to_le_bytes());
    }
    let there = pages.chunks_exact(PAGE_SIZE).zip(gone).filter(|(_, gone)| !**gone);
    for ((page, _), place) in there.zip(data.chunks_exact_mut(PAGE_SIZE)) {
        place.copy_from_slice(page);
    }
    Ok(PageRecord::parse(buffer, length, 0)?)
}
