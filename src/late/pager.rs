//! The destination's side: what is late, who waits, and what to ask for next.
use std::collections::VecDeque;
use std::time::Duration;

use super::{Latency, Window};
use crate::page::Pfn;
use crate::report::LateFigures;

/// Pages that may have been asked for and not come: more would wait in the source's queue instead of ours.
const ASKED_AT_ONCE: usize = 256;

/// The same while all are wanted at once: the source sends no more at a time than the link takes.
const HURRIED_AT_ONCE: usize = 4096;

/// Who asks for a page.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Asking {
    /// Another domain, which tries again until it is there, and not for ever: before the guest's own.
    Domain,
    /// A processor of the guest's, which stands still meanwhile.
    Guest,
    /// Nobody: the guest gives the page up.
    GivesUp,
}

/// A page that the source is to send ahead of the others.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Want {
    pub pfn: Pfn,
    /// Somebody waits for it; otherwise it only comes along.
    pub urgent: bool,
}

/// What a page that has come is here.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Arrival {
    /// It is late: it has to be put where it belongs.
    Late,
    /// It is there already, or the guest has given it up: nothing is to be done with it.
    NotNeeded,
    /// It was never late: nobody may send it.
    Unknown,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    Late,
    /// Asked for because somebody waits, or to come along.
    Urgent,
    Along,
    /// Asked for because all are wanted at once.
    Hurried,
    /// There; `Prefetched` when it came along, until somebody wants it.
    Landed,
    Prefetched,
    GivenUp,
}

impl State {
    fn is_missing(self) -> bool {
        matches!(self, State::Late | State::Urgent | State::Along | State::Hurried)
    }
}

/// Somebody who stands still until a page is there; `R` is how the request is answered.
struct Waiting<R> {
    page: usize,
    since: Duration,
    request: R,
}

/// What is late in one guest. 9 bytes a late page.
pub struct Pager<R> {
    /// Ascending.
    pages: Vec<Pfn>,
    states: Vec<State>,
    missing: u64,
    waiting: Vec<Waiting<R>>,
    /// Of those who waited for a page that was given up.
    freed: Vec<R>,
    for_domains: VecDeque<usize>,
    for_guest: VecDeque<usize>,
    along: VecDeque<usize>,
    /// Asked for and not there.
    asked: usize,
    /// All are wanted at once; those before this one have been asked for.
    hurry: Option<usize>,
    window: Window,
    latency: Latency,
    figures: LateFigures,
}

impl<R> Pager<R> {
    /// `pages` in ascending order; what does not ascend is left out.
    pub fn new(pages: impl IntoIterator<Item = Pfn>) -> Pager<R> {
        let mut ascending: Vec<Pfn> = Vec::new();
        for pfn in pages {
            if ascending.last() < Some(&pfn) {
                ascending.push(pfn);
            }
        }
        let missing = ascending.len() as u64;
        Pager {
            states: vec![State::Late; ascending.len()],
            pages: ascending,
            missing,
            waiting: Vec::new(),
            freed: Vec::new(),
            for_domains: VecDeque::new(),
            for_guest: VecDeque::new(),
            along: VecDeque::new(),
            asked: 0,
            hurry: None,
            window: Window::default(),
            latency: Latency::default(),
            figures: LateFigures {
                pages: missing,
                ..LateFigures::default()
            },
        }
    }

    /// Pages that are neither there nor given up.
    pub fn missing(&self) -> u64 {
        self.missing
    }

    /// Which they are, ascending.
    pub fn missing_pages(&self) -> impl Iterator<Item = Pfn> + '_ {
        let pages = self.pages.iter().zip(&self.states);
        pages.filter(|(_, state)| state.is_missing()).map(|(pfn, _)| *pfn)
    }

    /// Somebody asks for a page. The request comes back when it can be answered at once; otherwise it is kept until the page
    /// is there ([`Pager::landed`]).
    pub fn asked(&mut self, now: Duration, pfn: Pfn, asking: Asking, request: R) -> Option<R> {
        let Some((page, state)) = self.find(pfn) else {
            return Some(request);
        };
        if asking == Asking::GivesUp {
            self.give_up(page);
            return Some(request);
        }
        match state {
            State::GivenUp | State::Landed => return Some(request),
            State::Prefetched => {
                self.hit();
                self.set(page, State::Landed);
                return Some(request);
            }
            State::Along => self.hit(),
            State::Late | State::Urgent | State::Hurried => {}
        }
        self.figures.faults += u64::from(asking == Asking::Guest);
        self.figures.foreign_faults += u64::from(asking == Asking::Domain);
        if state != State::Urgent {
            let queue = match asking {
                Asking::Domain => &mut self.for_domains,
                _ => &mut self.for_guest,
            };
            queue.push_back(page);
            self.set(page, State::Urgent);
        }
        if state == State::Late {
            self.neighbours(page);
        }
        if asking == Asking::Domain {
            // It does not wait for the answer, and Xen has room for another request.
            return Some(request);
        }
        let since = now;
        self.waiting.push(Waiting { page, since, request });
        None
    }

    /// What to ask the source for now, the most urgent first; at most `limit`.
    pub fn wants(&mut self, limit: usize) -> Vec<Want> {
        let mut wants = Vec::new();
        while wants.len() < limit {
            let urgent = self.for_domains.pop_front().or_else(|| self.for_guest.pop_front());
            let along = |pager: &mut Pager<R>| {
                let free = pager.asked < ASKED_AT_ONCE;
                free.then(|| pager.along.pop_front()).flatten()
            };
            let Some(page) = urgent.or_else(|| along(self)).or_else(|| self.hurried()) else {
                break;
            };
            // It may have come meanwhile, pushed.
            let wanted = self.states.get(page).is_some_and(|state| match urgent {
                Some(_) => *state == State::Urgent,
                None => matches!(state, State::Along | State::Hurried),
            });
            if let Some(pfn) = self.pages.get(page).copied().filter(|_| wanted) {
                self.asked += 1;
                wants.push(Want {
                    pfn,
                    urgent: urgent.is_some(),
                });
            }
        }
        wants
    }

    /// All pages are wanted as fast as they can come, whatever the push may take of the link.
    pub fn hurry(&mut self) {
        self.hurry.get_or_insert(0);
    }

    fn hurried(&mut self) -> Option<usize> {
        let from = self.hurry.filter(|_| self.asked < HURRIED_AT_ONCE)?;
        let rest = self.states.get(from..).unwrap_or_default();
        let found = rest.iter().position(|state| *state == State::Late).map(|at| from + at);
        self.hurry = Some(found.map_or(self.states.len(), |page| page + 1));
        self.set(found?, State::Hurried);
        found
    }

    /// What is to be done with a page that comes.
    pub fn judge(&self, pfn: Pfn) -> Arrival {
        match self.find(pfn) {
            None => Arrival::Unknown,
            Some((_, state)) if state.is_missing() => Arrival::Late,
            Some(_) => Arrival::NotNeeded,
        }
    }

    /// A page is where it belongs. Returns the requests to answer.
    pub fn landed(&mut self, now: Duration, pfn: Pfn) -> Vec<R> {
        let Some((page, state)) = self.find(pfn).filter(|(_, state)| state.is_missing()) else {
            return Vec::new();
        };
        match state {
            State::Urgent => self.figures.fetched += 1,
            State::Along => self.figures.prefetched += 1,
            _ => self.figures.pushed += 1,
        }
        self.set(
            page,
            if state == State::Along {
                State::Prefetched
            } else {
                State::Landed
            },
        );
        self.done(state);
        let answered = self.waiting_for(page);
        let request = |waiting: Waiting<R>| {
            self.latency.add(now.saturating_sub(waiting.since));
            waiting.request
        };
        answered.into_iter().map(request).collect()
    }

    /// Requests to answer of those who waited for pages that were given up meanwhile.
    pub fn freed(&mut self) -> Vec<R> {
        std::mem::take(&mut self.freed)
    }

    fn waiting_for(&mut self, page: usize) -> Vec<Waiting<R>> {
        self.waiting.extract_if(.., |waiting| waiting.page == page).collect()
    }

    /// A page that came could not be used: it has to be asked for again.
    pub fn again(&mut self, pfn: Pfn) {
        if let Some((page, state)) = self.find(pfn).filter(|(_, state)| state.is_missing()) {
            self.asked -= usize::from(state != State::Late && self.asked > 0);
            self.set(page, State::Urgent);
            self.for_guest.push_back(page);
        }
    }

    /// A page is there already, and what comes for it is not to be used.
    pub fn leave_alone(&mut self, pfn: Pfn) {
        if let Some((page, _)) = self.find(pfn) {
            self.give_up(page);
        }
    }

    /// A page is to be there soon, though nobody waits for it.
    pub fn bring(&mut self, pfn: Pfn) {
        if let Some((page, State::Late)) = self.find(pfn) {
            self.set(page, State::Along);
            self.along.push_back(page);
        }
    }

    /// The connection was lost with all that was asked for: it is asked for again.
    pub fn connected_again(&mut self) {
        self.asked = 0;
        self.for_domains.clear();
        self.for_guest.clear();
        self.along.clear();
        for (page, state) in self.states.iter_mut().enumerate() {
            match state {
                State::Urgent => self.for_guest.push_back(page),
                State::Along | State::Hurried => *state = State::Late,
                _ => {}
            }
        }
        self.hurry = self.hurry.map(|_| 0);
    }

    /// Nothing comes any more, since the guest is gone: all who wait are let go.
    pub fn abandon(&mut self) -> Vec<R> {
        self.missing = 0;
        self.states.fill(State::GivenUp);
        self.waiting.drain(..).map(|waiting| waiting.request).collect()
    }

    pub fn figures(&self) -> LateFigures {
        LateFigures {
            missing: self.missing,
            latency_median_us: self.latency.quantile(0.5).as_micros() as u64,
            latency_p99_us: self.latency.quantile(0.99).as_micros() as u64,
            latency_longest_us: self.latency.longest().as_micros() as u64,
            ..self.figures.clone()
        }
    }

    fn find(&self, pfn: Pfn) -> Option<(usize, State)> {
        let page = self.pages.binary_search(&pfn).ok()?;
        Some((page, self.states.get(page).copied()?))
    }

    fn set(&mut self, page: usize, state: State) {
        if let Some(place) = self.states.get_mut(page) {
            *place = state;
        }
    }

    fn hit(&mut self) {
        self.figures.hits += 1;
        self.window.hit();
    }

    /// One missing page less.
    fn done(&mut self, before: State) {
        self.missing = self.missing.saturating_sub(1);
        if before != State::Late {
            self.asked = self.asked.saturating_sub(1);
        }
    }

    /// The guest has given a page up. A processor may wait for it all the same: it has seen it before.
    fn give_up(&mut self, page: usize) {
        let Some(state) = self.states.get(page).copied() else {
            return;
        };
        if state.is_missing() {
            self.figures.given_up += 1;
            self.set(page, State::GivenUp);
            self.done(state);
            let waited = self.waiting_for(page);
            self.freed.extend(waited.into_iter().map(|waiting| waiting.request));
        }
    }

    /// The next late pages behind this one come along.
    fn neighbours(&mut self, page: usize) {
        let room = self.window.missed();
        let mut picked = 0;
        for next in page + 1..self.pages.len().min(page + 1 + 4 * room) {
            if picked == room {
                break;
            }
            if self.states.get(next) == Some(&State::Late) {
                self.set(next, State::Along);
                self.along.push_back(next);
                picked += 1;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pfn(raw: u64) -> Pfn {
        Pfn::new(raw).unwrap()
    }

    fn pager(pages: std::ops::Range<u64>) -> Pager<u32> {
        Pager::new(pages.map(pfn))
    }

    fn ms(ms: u64) -> Duration {
        Duration::from_millis(ms)
    }

    #[test]
    fn whoever_waits_is_answered_when_the_page_is_there() {
        let mut pager = pager(100..110);
        assert_eq!(pager.asked(ms(0), pfn(99), Asking::Guest, 1), Some(1), "not late");
        assert_eq!(pager.asked(ms(0), pfn(104), Asking::Guest, 2), None);
        assert_eq!(pager.asked(ms(5), pfn(104), Asking::Guest, 3), None);
        let wants = pager.wants(100);
        assert_eq!((wants[0].pfn, wants[0].urgent), (pfn(104), true));
        assert!(wants[1..].iter().all(|want| !want.urgent), "{wants:?}");
        assert_eq!(pager.wants(100), [], "asked for once");
        assert_eq!(pager.judge(pfn(104)), Arrival::Late);
        assert_eq!(pager.landed(ms(20), pfn(104)), [2, 3]);
        assert_eq!(pager.judge(pfn(104)), Arrival::NotNeeded);
        assert_eq!(
            (pager.judge(pfn(99)), pager.landed(ms(21), pfn(99))),
            (Arrival::Unknown, vec![])
        );
        assert_eq!(pager.landed(ms(21), pfn(104)), [] as [u32; 0], "a duplicate");
        assert_eq!(pager.asked(ms(30), pfn(104), Asking::Guest, 4), Some(4));
        let figures = pager.figures();
        assert_eq!((figures.faults, figures.fetched, figures.missing), (2, 1, 9));
        assert_eq!(figures.latency_longest_us, 20_000);
    }

    #[test]
    fn other_domains_come_first_and_do_not_wait() {
        let mut pager = pager(0..1000);
        assert_eq!(pager.asked(ms(0), pfn(10), Asking::Guest, 1), None);
        assert_eq!(pager.asked(ms(0), pfn(500), Asking::Domain, 2), Some(2));
        assert_eq!(
            pager.asked(ms(0), pfn(500), Asking::Domain, 3),
            Some(3),
            "it tries again"
        );
        let wants = pager.wants(2);
        assert_eq!(
            wants.iter().map(|want| want.pfn).collect::<Vec<_>>(),
            [pfn(500), pfn(10)]
        );
    }

    #[test]
    fn pages_given_up_are_not_waited_for() {
        let mut pager = pager(0..3);
        assert_eq!(pager.asked(ms(0), pfn(1), Asking::GivesUp, 1), Some(1));
        assert_eq!(pager.asked(ms(0), pfn(1), Asking::Guest, 2), Some(2));
        assert_eq!(pager.judge(pfn(1)), Arrival::NotNeeded);
        assert_eq!((pager.missing(), pager.figures().given_up), (2, 1));
        pager.landed(ms(0), pfn(0));
        pager.landed(ms(0), pfn(2));
        assert_eq!(pager.missing(), 0);
    }

    #[test]
    fn who_waits_for_a_page_that_is_given_up_goes_on() {
        let mut pager = pager(0..3);
        assert_eq!(pager.asked(ms(0), pfn(1), Asking::Guest, 1), None);
        assert_eq!(pager.asked(ms(0), pfn(2), Asking::Guest, 2), None);
        assert_eq!(pager.asked(ms(1), pfn(1), Asking::GivesUp, 3), Some(3));
        assert_eq!((pager.freed(), pager.freed()), (vec![1], vec![]));
        assert_eq!(pager.landed(ms(2), pfn(2)), [2]);
    }

    #[test]
    fn neighbours_come_along_while_they_are_of_use() {
        let mut pager = pager(0..10_000);
        // A guest that reads on and on.
        let mut waited = 0;
        for page in 0..2000 {
            if pager.asked(ms(page), pfn(page), Asking::Guest, 0).is_none() {
                waited += 1;
            }
            for want in pager.wants(1000) {
                pager.landed(ms(page), want.pfn);
            }
        }
        assert!(waited < 100, "{waited} of 2000 pages were waited for");
        // One that jumps.
        let before = pager.figures().prefetched;
        for n in 0..300 {
            pager.asked(ms(0), pfn(2100 + n * 7919 % 7800), Asking::Guest, 0);
            for want in pager.wants(1000) {
                pager.landed(ms(0), want.pfn);
            }
        }
        let along = pager.figures().prefetched - before;
        assert!(along < 700, "{along} pages came along with 300");
    }

    #[test]
    fn after_a_lost_connection_all_is_asked_for_again() {
        let mut pager = pager(0..100);
        pager.asked(ms(0), pfn(7), Asking::Guest, 1);
        let first = pager.wants(1000);
        pager.landed(ms(0), pfn(8));
        pager.connected_again();
        let again = pager.wants(1000);
        assert_eq!((first[0], again.len()), (again[0], 1));
        assert_eq!(pager.missing_pages().count(), 99);
        pager.leave_alone(pfn(9));
        assert_eq!((pager.judge(pfn(9)), pager.missing()), (Arrival::NotNeeded, 98));
        pager.again(pfn(7));
        assert_eq!(pager.wants(1000), [first[0]]);
        assert_eq!(pager.abandon(), [1]);
        assert_eq!((pager.missing(), pager.judge(pfn(50))), (0, Arrival::NotNeeded));
    }

    #[test]
    fn all_can_be_wanted_at_once() {
        let mut pager = pager(0..10_000);
        assert_eq!(pager.asked(ms(0), pfn(500), Asking::Guest, 1), None);
        pager.hurry();
        let mut wants = pager.wants(usize::MAX);
        assert_eq!((wants.len(), wants[0].pfn), (HURRIED_AT_ONCE, pfn(500)));
        // Somebody waits for one that was asked for already, among thousands.
        assert_eq!(pager.asked(ms(0), pfn(3000), Asking::Guest, 2), None);
        assert_eq!(
            pager.wants(1).first().map(|want| (want.pfn, want.urgent)),
            Some((pfn(3000), true))
        );
        pager.connected_again();
        wants = pager.wants(usize::MAX);
        let mut come = 0;
        while let Some(want) = wants.pop() {
            pager.landed(ms(0), want.pfn);
            come += 1;
            wants.extend(pager.wants(usize::MAX));
        }
        assert_eq!((come, pager.missing(), pager.figures().fetched), (10_000, 0, 2));
    }

    #[test]
    fn not_too_much_is_asked_for_at_once() {
        let mut pager = pager(0..100_000);
        for n in 0..200 {
            pager.asked(ms(0), pfn(n * 400), Asking::Guest, 0);
        }
        let wants = pager.wants(usize::MAX);
        assert_eq!(wants.iter().filter(|want| want.urgent).count(), 200);
        assert!(wants.len() <= ASKED_AT_ONCE, "{}", wants.len());
    }
}
