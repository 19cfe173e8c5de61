//! What the engine asks while a guest runs: which pages wait, and which have waited long enough.
use std::time::Duration;

use super::filter::Filter;
use super::model::Builder;
use crate::page::Pfn;
use crate::page_set::PageSet;

/// Decides which pages to hold back. Any answer is right for the guest's memory: a page that is written after its pass
/// began comes again from xl, and what is still held at the end is read from the suspended guest. A wrong answer costs a
/// page sent twice, or one more sent while the guest stands still. Times are since the migration began.
pub trait HoldPolicy: Send {
    /// Pages written in one interval of the model's, before xl has begun. In their order.
    fn sampled(&mut self, written: &PageSet);

    /// Whether to hold each of `pfns`, one record of xl's: pages ascend within a pass and fall where one begins. `peek`:
    /// pages written since the pass began, where they were read for this record.
    fn hold(&mut self, now: Duration, pfns: &[Pfn], peek: Option<&PageSet>) -> Vec<bool>;

    /// Which held pages to send now, before the record that [`HoldPolicy::hold`] was last asked about; `limit` at most, in
    /// their order. Asked again until there are none.
    fn release(&mut self, limit: usize) -> Vec<Pfn>;

    /// What has gone to the link by now: pages of the guest, and bytes.
    fn sent(&mut self, now: Duration, pages: u64, wire_bytes: u64);

    /// How the migration stands; `None`: nothing is known of it yet.
    fn outlook(&self, now: Duration) -> Option<Outlook>;

    /// The dirty bitmap was read while xl waits at the end of its passes.
    fn looked(&mut self, now: Duration, peek: &PageSet);

    /// Whether each of `pfns`, which are dirty and have not changed for `unchanged`, is expected to stay as it is until the
    /// guest is suspended, `waiting` pages having to go before.
    fn stays(&mut self, pfns: &[Pfn], unchanged: Duration, waiting: u64) -> Vec<bool>;
}

/// What is to be expected of a migration, from how the guest writes and what the link takes.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Outlook {
    /// How long the guest would stand still if xl suspended it now. What suspending and resuming take by themselves is not
    /// in it.
    pub downtime: Duration,
    /// Pages a second that the guest writes and has not written before in xl's pass.
    pub dirty_pages_rate: f64,
    /// Pages a second that go over the link, and bytes that one of them costs there on average.
    pub sent_pages_rate: f64,
    pub page_wire_bytes: f64,
}

/// Holds back what a [`Filter`] forecasts, with a model of the guest's writes if they were watched before.
pub struct Forecast {
    bound: u64,
    guest_pages: u64,
    interval: Duration,
    builder: Option<Builder>,
    filter: Option<Filter>,
}

impl Forecast {
    /// The guest's pages lie below `bound`; `guest_pages` of them hold memory. `interval`: time between samples.
    pub fn new(bound: u64, guest_pages: u64, interval: Duration) -> Forecast {
        Forecast {
            bound,
            guest_pages,
            interval,
            builder: None,
            filter: None,
        }
    }

    fn filter(&mut self) -> &mut Filter {
        let (builder, bound, guest_pages) = (&mut self.builder, self.bound, self.guest_pages);
        self.filter.get_or_insert_with(|| {
            let model = builder.take().map(Builder::finish);
            Filter::new(model, bound, guest_pages)
        })
    }
}

impl HoldPolicy for Forecast {
    fn sampled(&mut self, written: &PageSet) {
        let new = || Builder::new(self.bound, self.guest_pages, self.interval);
        self.builder.get_or_insert_with(new).sample(written);
    }

    fn hold(&mut self, now: Duration, pfns: &[Pfn], peek: Option<&PageSet>) -> Vec<bool> {
        self.filter().hold(now, pfns, peek)
    }

    fn release(&mut self, limit: usize) -> Vec<Pfn> {
        self.filter().release(limit)
    }

    fn sent(&mut self, now: Duration, pages: u64, wire_bytes: u64) {
        self.filter().sent(now, pages, wire_bytes);
    }

    fn outlook(&self, now: Duration) -> Option<Outlook> {
        self.filter.as_ref().map(|filter| filter.outlook(now))
    }

    fn looked(&mut self, now: Duration, peek: &PageSet) {
        self.filter().looked(now, peek);
    }

    fn stays(&mut self, pfns: &[Pfn], unchanged: Duration, waiting: u64) -> Vec<bool> {
        self.filter().stays(pfns, unchanged, waiting)
    }
}
