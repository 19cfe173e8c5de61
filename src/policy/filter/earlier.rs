//! What is known of the guest's writes from before its migration: taken in, held against what peeks show, and kept with what this
//! migration has shown.
use super::{Filter, middle_of};
use crate::page::Pfn;
use crate::page_set::PageSet;
use crate::policy::ages::Ages;
use crate::policy::circle::Circle;
use crate::policy::kept::{self, Kept};
use crate::policy::known::Known;
use crate::policy::written::Written;

impl Filter {
    /// Takes in what is known from earlier migrations. It is held against what peeks show, not against what was seen before the
    /// migration: a guest that is watched writes slowly, since each reading write-protects its memory anew.
    pub(super) fn remember(&mut self, ages: Ages) {
        if ages.is_empty() {
            return;
        }
        let mut written: Vec<(f64, usize)> = Vec::new();
        for pfn in (0..self.bound)
            .filter(|page| ages.contains(*page as usize))
            .filter_map(Pfn::new)
        {
            match self.last.get(pfn).time() {
                Some(at) => written.push((at, pfn.get() as usize)),
                None => self.last.set(pfn, Written::EARLIER),
            }
        }
        let mut circle = Circle::known(&ages);
        // The writes of each quarter of a second together.
        written.sort_by(|a, b| a.0.total_cmp(&b.0));
        let mut written = written.into_iter().peekable();
        for quarter in 0..self.past_ms / 250 {
            let from = f64::from(quarter) / 4.0;
            while let Some((_, page)) = written.next_if(|(at, _)| *at < from + 0.25) {
                circle.written(page);
            }
            circle.looked(from, 0.25);
        }
        self.forecast.earlier_spans(kept::SPAN);
        self.known = Some(Known::new(ages, self.guest_pages));
        self.circle = Some(circle);
    }

    /// Takes in pages that were written not long before the migration, as who reads the guest's memory has seen: in which order is not
    /// known. Like those of earlier migrations they wait in the first pass, and are held against what peeks show.
    pub fn expect_writes(&mut self, changing: &PageSet) {
        for pfn in changing.iter().take_while(|pfn| pfn.get() < self.bound) {
            if self.last.get(pfn) == Written::UNKNOWN {
                self.last.set(pfn, Written::EARLIER);
            }
        }
        if let Some(circle) = &mut self.circle {
            circle.take_in(self.last.earlier().map(|pfn| pfn.get() as usize));
        }
        if self.known.is_none() && !changing.is_empty() {
            self.forecast.earlier_spans(kept::SPAN);
            self.known = Some(Known::new(Ages::default(), self.guest_pages));
        }
    }

    /// How many of the pages known from earlier migrations had not been written `from` seconds after the watching began, and
    /// how many of those were in the next `seconds`, region by region: whether they still are what is written.
    pub(super) fn weigh(&mut self, from: f64, seconds: f64, counts: &[(u32, u32)]) {
        let Some(known) = &mut self.known else { return };
        let all = counts.iter().enumerate().filter(|(_, (pages, _))| *pages > 0);
        let (mut expected, mut written) = (0.0, 0.0);
        for (region, (pages, seen)) in all {
            let each = self.gaps.curve(region).expected_sometime(from, kept::SPAN, seconds);
            expected += f64::from(*pages) * (1.0 - (-each).exp());
            written += f64::from(*seen);
        }
        known.weigh(expected, written);
        self.forecast.earlier = known.factor();
        if !known.holds() {
            log::debug!("what was known of the guest's writes does not hold any more");
            self.known = None;
            self.circle.take_if(|circle| circle.is_earlier());
            self.circle.iter_mut().for_each(Circle::leave_out);
            self.gaps.doubt();
            self.last.forget_earlier();
        }
    }

    /// What the migration has taught so far, for the guest's next one.
    pub fn learnt(&self) -> Kept {
        let now = self.peeked.max(self.pass_began).max(f64::from(self.past_ms) / 1e3);
        let none = Ages::default();
        let before = self.known.as_ref().map_or(&none, Known::ages);
        let first = |page: usize| self.first.get(page).copied().filter(|first| *first > 0);
        let age = |page: usize| first(page).map(|first| (now - middle_of(first)).max(0.0));
        let all = |page: usize| age(page).or_else(|| before.later(page, now));
        let new = Ages::of(self.first.len(), age);
        let circle = self.circle.as_ref();
        let ages = match circle.is_some_and(|circle| circle.is_worth_keeping(new.bytes())) {
            // It stays as it was, also where it was not gone through this time.
            true => Ages::of(self.first.len(), |page| {
                all(page).map(|age| before.seconds(page).unwrap_or(age))
            }),
            false => Ages::of(self.first.len(), all),
        };
        Kept {
            bound: self.bound,
            regions: self.regions,
            interval: self.interval,
            seen: self.gaps.seen().to_vec(),
            ages,
            states: self.states.clone(),
        }
    }
}
