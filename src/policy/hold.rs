//! What the engine asks while a guest runs: which pages wait, and which have waited long enough.
use std::sync::Arc;
use std::time::Duration;

use parking_lot::Mutex;

use super::filter::Filter;
use super::kept::Kept;
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

    /// The dirty bitmap was read between two of these answers.
    fn peeked(&mut self, now: Duration, peek: &PageSet);

    /// What has gone to the link by now: pages of the guest, and bytes.
    fn sent(&mut self, now: Duration, pages: u64, wire_bytes: u64);

    /// The time until the guest is suspended, as far as can be said.
    fn left(&self) -> Duration;

    /// How the migration stands; `None`: nothing is known of it yet.
    fn outlook(&self, now: Duration) -> Option<Outlook>;

    /// The dirty bitmap was read while xl waits at the end of its passes. Returns how many held pages
    /// [`HoldPolicy::release`] has now.
    fn looked(&mut self, now: Duration, peek: &PageSet) -> u64;

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

/// What is known of a guest's writes from before its migration.
#[derive(Debug, Default)]
pub struct Before {
    /// Of earlier migrations of this guest; of another size it is of no use.
    pub kept: Option<Kept>,
    /// Pages that changed while the guest's memory was read from time to time.
    pub changing: Option<PageSet>,
}

/// Holds back what a [`Filter`] forecasts, with a model of the guest's writes if they were watched before, or in an earlier
/// migration. Clones are the same one.
#[derive(Clone)]
pub struct Forecast(Arc<Mutex<Inner>>);

struct Inner {
    bound: u64,
    guest_pages: u64,
    interval: Duration,
    kept: Option<Kept>,
    changing: Option<PageSet>,
    downtime: Duration,
    builder: Option<Builder>,
    filter: Option<Filter>,
}

impl Forecast {
    /// The guest's pages lie below `bound`; `guest_pages` of them hold memory. `interval`: time between samples. `before`: what is
    /// known of its writes. `downtime`: how long the guest may stand still.
    pub fn new(bound: u64, guest_pages: u64, interval: Duration, before: Before, downtime: Duration) -> Forecast {
        Forecast(Arc::new(Mutex::new(Inner {
            bound,
            guest_pages,
            interval,
            kept: before.kept.filter(|kept| kept.bound() == bound),
            changing: before.changing,
            downtime,
            builder: None,
            filter: None,
        })))
    }

    /// How many pages are known from earlier migrations. To be asked before the first sample.
    pub fn known_pages(&self) -> u64 {
        self.0.lock().kept.as_ref().map_or(0, Kept::pages)
    }

    /// How many pages have been seen to change before. To be asked before the first sample.
    pub fn changing_pages(&self) -> u64 {
        self.0.lock().changing.as_ref().map_or(0, PageSet::len)
    }

    /// What is known by now, for the guest's next migration; `None` before xl has sent a page.
    pub fn learnt(&self) -> Option<Kept> {
        self.0.lock().filter.as_ref().map(Filter::learnt)
    }
}

impl Inner {
    fn builder(&mut self) -> &mut Builder {
        let (kept, interval) = (&mut self.kept, self.interval);
        let new = || match kept.take() {
            Some(kept) => Builder::after(kept, interval),
            None => Builder::new(self.bound, self.guest_pages, interval),
        };
        self.builder.get_or_insert_with(new)
    }

    fn filter(&mut self) -> &mut Filter {
        if self.kept.is_some() {
            // The guest was not watched before this migration.
            self.builder();
        }
        let (builder, bound, guest_pages) = (&mut self.builder, self.bound, self.guest_pages);
        self.filter.get_or_insert_with(|| {
            let model = builder.take().map(Builder::finish);
            let mut filter = Filter::new(model, bound, guest_pages);
            filter.limit_downtime(self.downtime);
            self.changing
                .take()
                .iter()
                .for_each(|pages| filter.expect_writes(pages));
            filter
        })
    }
}

impl HoldPolicy for Forecast {
    fn sampled(&mut self, written: &PageSet) {
        self.0.lock().builder().sample(written);
    }

    fn hold(&mut self, now: Duration, pfns: &[Pfn], peek: Option<&PageSet>) -> Vec<bool> {
        self.0.lock().filter().hold(now, pfns, peek)
    }

    fn release(&mut self, limit: usize) -> Vec<Pfn> {
        self.0.lock().filter().release(limit)
    }

    fn peeked(&mut self, now: Duration, peek: &PageSet) {
        self.0.lock().filter().peeked(now, peek);
    }

    fn sent(&mut self, now: Duration, pages: u64, wire_bytes: u64) {
        self.0.lock().filter().sent(now, pages, wire_bytes);
    }

    fn left(&self) -> Duration {
        self.0.lock().filter.as_ref().map_or(Duration::ZERO, Filter::left)
    }

    fn outlook(&self, now: Duration) -> Option<Outlook> {
        self.0.lock().filter.as_ref().map(|filter| filter.outlook(now))
    }

    fn looked(&mut self, now: Duration, peek: &PageSet) -> u64 {
        self.0.lock().filter().looked(now, peek)
    }

    fn stays(&mut self, pfns: &[Pfn], unchanged: Duration, waiting: u64) -> Vec<bool> {
        self.0.lock().filter().stays(pfns, unchanged, waiting)
    }
}
