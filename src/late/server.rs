//! The source's side: which late page goes next.
use std::collections::VecDeque;
use std::num::NonZeroU64;
use std::time::Duration;

use super::Want;
use crate::page::Pfn;
use crate::page_set::PageSet;

/// Pages of one frame that nobody waits for.
const BATCH: usize = 32;

/// Pushed pages that may always be under way, and at most.
const LEAST: usize = 8;
const MOST: usize = 4096;

/// How much longer than on an idle link a pushed page may be under way: somebody who waits for another one waits so much
/// longer.
const UNDER_WAY: Duration = Duration::from_millis(40);

/// The shortest way seen is forgotten by and by, one part in so many with each answer: ways change.
const FORGET: u32 = 256;

/// What to do next.
#[derive(Debug, PartialEq, Eq)]
pub enum Next {
    Send(Batch),
    /// Nothing before this time, unless something is asked for or answered.
    At(Duration),
    /// Nothing before something is asked for or answered.
    Wait,
}

/// Pages of one frame.
#[derive(Debug, PartialEq, Eq)]
pub struct Batch {
    /// Counted from 1; the destination repeats it when it has put the pages where they belong.
    pub number: u64,
    pub pages: Vec<Pfn>,
    /// Somebody waits for them.
    pub urgent: bool,
    /// Pages that have to be sent in full, for whoever asked again.
    pub plain: bool,
}

/// The late pages of one guest. Three bits a page of the guest.
pub struct PageServer {
    late: PageSet,
    /// Sent, once or more.
    sent: PageSet,
    urgent: VecDeque<Pfn>,
    along: VecDeque<Pfn>,
    /// What is pushed before the rest, hottest first, and how far the rest has been pushed.
    hot: VecDeque<PageSet>,
    next: u64,
    pushing: bool,
    under_way: VecDeque<UnderWay>,
    pages_under_way: usize,
    window: usize,
    /// The shortest time in which a batch was answered lately.
    shortest: Duration,
    numbers: u64,
    bytes_per_s: Option<NonZeroU64>,
    /// When all that was pushed has had its time.
    free: Duration,
}

struct UnderWay {
    number: u64,
    pages: usize,
    sent: Duration,
}

impl PageServer {
    /// `hot`: pages that are pushed before the others, the hottest set first. `bytes_per_s`: what the push may take.
    pub fn new(late: PageSet, hot: Vec<PageSet>, bytes_per_s: Option<NonZeroU64>) -> PageServer {
        PageServer {
            sent: PageSet::new(late.bound()),
            late,
            urgent: VecDeque::new(),
            along: VecDeque::new(),
            hot: hot.into(),
            next: 0,
            pushing: false,
            under_way: VecDeque::new(),
            pages_under_way: 0,
            window: LEAST,
            shortest: Duration::MAX,
            numbers: 0,
            bytes_per_s,
            free: Duration::ZERO,
        }
    }

    /// The destination can take pages that it has not asked for.
    pub fn push(&mut self) {
        self.pushing = true;
    }

    /// The destination wants a page before the others. False: it is not late, so nobody may ask for it.
    pub fn want(&mut self, want: Want) -> bool {
        let known = self.late.contains(want.pfn);
        // More than there are late pages is nonsense, and must not cost more memory than they do.
        let queue = if want.urgent { &mut self.urgent } else { &mut self.along };
        let room = (queue.len() as u64) < self.late.bound();
        if known && room {
            queue.push_back(want.pfn);
        }
        known
    }

    pub fn next(&mut self, now: Duration) -> Next {
        if let Some(pfn) = self.urgent.pop_front() {
            // Asked for again after it was sent: what was sent could not be used.
            let plain = self.sent.contains(pfn);
            return self.batch(now, vec![pfn], true, plain);
        }
        let room = self.window.saturating_sub(self.pages_under_way).min(BATCH);
        if room == 0 || (!self.pushing && self.along.is_empty()) {
            return Next::Wait;
        }
        let mut pages = Vec::new();
        while pages.len() < room
            && let Some(pfn) = self.along.pop_front()
        {
            if !self.sent.contains(pfn) {
                pages.push(pfn);
            }
        }
        if pages.is_empty() && self.pushing {
            if self.free > now {
                return Next::At(self.free);
            }
            self.pick(room, &mut pages);
        }
        if pages.is_empty() {
            return Next::Wait;
        }
        self.batch(now, pages, false, false)
    }

    /// A batch has gone as a frame of so many bytes.
    pub fn sent(&mut self, now: Duration, batch: &Batch, bytes: usize) {
        batch.pages.iter().for_each(|pfn| {
            self.sent.insert(*pfn);
        });
        if let Some(rate) = self.bytes_per_s {
            let time = Duration::from_secs_f64(bytes as f64 / rate.get() as f64);
            self.free = self.free.max(now) + time;
        }
    }

    /// The destination has put the pages of a batch where they belong. Batches are answered in their order; what was not sent
    /// is somebody else's.
    pub fn answered(&mut self, now: Duration, number: u64) {
        if self.under_way.front().is_none_or(|oldest| oldest.number != number) {
            return;
        }
        let Some(UnderWay { pages, sent, .. }) = self.under_way.pop_front() else {
            return;
        };
        self.pages_under_way = self.pages_under_way.saturating_sub(pages);
        let took = now.saturating_sub(sent);
        self.shortest = took.min(self.shortest.saturating_add(self.shortest / FORGET));
        self.window = if took < self.shortest + UNDER_WAY {
            (self.window + pages).min(MOST)
        } else {
            self.window.saturating_sub(pages).max(LEAST)
        };
    }

    /// There is a new connection: nothing that was sent on the old one and not answered may be believed to have arrived.
    /// `missing` are the pages that the destination has not got. False: one of them is not late, so it cannot be missing.
    pub fn connected_again(&mut self, missing: &PageSet) -> bool {
        if missing.iter().any(|pfn| !self.late.contains(pfn)) {
            return false;
        }
        self.urgent.clear();
        self.along.clear();
        self.under_way.clear();
        self.pages_under_way = 0;
        self.window = LEAST;
        self.shortest = Duration::MAX;
        self.next = 0;
        self.sent = PageSet::new(self.late.bound());
        let there = self.late.iter().filter(|pfn| !missing.contains(*pfn));
        there.for_each(|pfn| {
            self.sent.insert(pfn);
        });
        true
    }

    /// One more than the highest page that may be late.
    pub fn bound(&self) -> u64 {
        self.late.bound()
    }

    fn batch(&mut self, now: Duration, pages: Vec<Pfn>, urgent: bool, plain: bool) -> Next {
        self.numbers += 1;
        self.pages_under_way += pages.len();
        self.under_way.push_back(UnderWay {
            number: self.numbers,
            pages: pages.len(),
            sent: now,
        });
        Next::Send(Batch {
            number: self.numbers,
            pages,
            urgent,
            plain,
        })
    }

    /// The next pages that nobody has asked for.
    fn pick(&mut self, room: usize, pages: &mut Vec<Pfn>) {
        while let Some(hot) = self.hot.front_mut() {
            let wanted = hot.iter().take(room);
            let found: Vec<Pfn> = wanted.collect();
            found.iter().for_each(|pfn| hot.remove(*pfn));
            let fresh = found
                .iter()
                .filter(|pfn| self.late.contains(**pfn) && !self.sent.contains(**pfn));
            pages.extend(fresh);
            if found.is_empty() {
                self.hot.pop_front();
            }
            if !pages.is_empty() {
                return;
            }
        }
        let rest = self.late.iter_from(self.next);
        let fresh = rest.filter(|pfn| !self.sent.contains(*pfn)).take(room);
        pages.extend(fresh);
        if let Some(last) = pages.last() {
            self.next = last.get() + 1;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pfn(raw: u64) -> Pfn {
        Pfn::new(raw).unwrap()
    }

    fn set(pages: impl IntoIterator<Item = u64>) -> PageSet {
        let mut set = PageSet::new(4096);
        pages.into_iter().for_each(|page| {
            set.insert(pfn(page));
        });
        set
    }

    fn want(page: u64, urgent: bool) -> Want {
        Want { pfn: pfn(page), urgent }
    }

    /// Sends what is due, all of it answered at once.
    fn drain(server: &mut PageServer) -> Vec<u64> {
        let mut sent = Vec::new();
        while let Next::Send(batch) = server.next(Duration::ZERO) {
            server.sent(Duration::ZERO, &batch, 100);
            server.answered(Duration::ZERO, batch.number);
            sent.extend(batch.pages.iter().map(|pfn| pfn.get()));
        }
        sent
    }

    #[test]
    fn what_is_waited_for_goes_first_and_the_hottest_next() {
        let mut server = PageServer::new(set(0..1000), vec![set([900, 7, 5000]), set([500, 7])], None);
        assert_eq!(
            server.next(Duration::ZERO),
            Next::Wait,
            "nothing is pushed before it can be taken"
        );
        assert!(server.want(want(3, true)) && server.want(want(4, false)) && !server.want(want(2000, true)));
        assert_eq!(drain(&mut server), [3, 4]);
        server.push();
        server.want(want(800, false));
        let all = drain(&mut server);
        assert_eq!(all[..4], [800, 7, 900, 500]);
        let mut sorted = all.clone();
        sorted.sort_unstable();
        sorted.dedup();
        assert_eq!((all.len(), sorted.len()), (998, 998), "each page once");
        // What could not be used is sent again, in full.
        server.want(want(3, true));
        let Next::Send(batch) = server.next(Duration::ZERO) else {
            panic!()
        };
        assert!(batch.plain && batch.urgent);
    }

    #[test]
    fn little_is_under_way_where_the_link_is_slow() {
        let mut server = PageServer::new(set(0..4096), vec![], None);
        server.push();
        let mut now = Duration::ZERO;
        // A link that takes 1 ms a page.
        let mut queue: VecDeque<Batch> = VecDeque::new();
        let mut under_way = Vec::new();
        let way = Duration::from_millis(120);
        for _ in 0..300 {
            while let Next::Send(batch) = server.next(now) {
                server.sent(now, &batch, 4096);
                queue.push_back(batch);
            }
            under_way.push(queue.iter().map(|batch| batch.pages.len()).sum::<usize>());
            let Some(batch) = queue.pop_front() else { break };
            now += Duration::from_millis(batch.pages.len() as u64);
            // The answer comes later, as it would over a long way.
            server.answered(now + way, batch.number);
            server.answered(now + way, batch.number + 77);
        }
        let most = under_way.iter().skip(20).max().unwrap();
        assert!((8..=128).contains(most), "{most} ms of pages under way");
        // What is waited for does not wait for room.
        while let Next::Send(_) = server.next(now) {}
        server.want(want(4000, true));
        assert!(matches!(server.next(now), Next::Send(batch) if batch.urgent));
    }

    #[test]
    fn the_push_keeps_to_its_bandwidth() {
        let rate = NonZeroU64::new(1000);
        let mut server = PageServer::new(set(0..100), vec![], rate);
        server.push();
        let Next::Send(batch) = server.next(Duration::ZERO) else {
            panic!()
        };
        server.sent(Duration::ZERO, &batch, 500);
        server.answered(Duration::ZERO, batch.number);
        assert_eq!(server.next(Duration::ZERO), Next::At(Duration::from_millis(500)));
        server.want(want(99, true));
        assert!(matches!(server.next(Duration::ZERO), Next::Send(_)));
        assert!(matches!(server.next(Duration::from_millis(500)), Next::Send(_)));
    }

    #[test]
    fn a_new_connection_begins_with_what_is_missing() {
        let mut server = PageServer::new(set(0..100), vec![], None);
        server.push();
        drain(&mut server);
        assert!(!server.connected_again(&set([4000])), "it was never late");
        assert!(server.connected_again(&set([5, 50])));
        assert_eq!(drain(&mut server), [5, 50]);
    }
}
