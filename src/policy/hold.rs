//! What the engine asks while a guest runs: which pages wait, and which have waited long enough.
use std::time::Duration;

use crate::page::Pfn;
use crate::page_set::PageSet;

/// Decides which pages to hold back. Any answer is right for the guest's memory: a page that is written after its pass
/// began comes again from xl, and what is still held at the end is read from the suspended guest. A wrong answer costs a
/// page sent twice, or one more sent while the guest stands still. Times are since the migration began.
pub trait HoldPolicy: Send {
    /// Pages written in one interval of the model's, before xl has begun. In their order.
    fn sampled(&mut self, written: &PageSet);

    /// Whether to hold each of `pfns`, one record of xl's: pages ascend within a pass and fall where one begins. `dirty`:
    /// pages that have been written since the pass began, as they were last read; `None`: not read in this pass.
    fn hold(&mut self, now: Duration, pfns: &[Pfn], dirty: Option<&PageSet>) -> Vec<bool>;

    /// What has gone to the link by now: pages of the guest, and bytes.
    fn sent(&mut self, now: Duration, pages: u64, wire_bytes: u64);

    /// Which held pages to send now, `limit` at most: those that are not expected to be written again.
    fn release(&mut self, now: Duration, held: &PageSet, dirty: Option<&PageSet>, limit: usize) -> Vec<Pfn>;

    /// How long the guest would stand still if xl suspended it now.
    fn expected_downtime(&self, held: &PageSet, dirty: Option<&PageSet>) -> Option<Duration>;
}

/// Holds back what is known to come again, and nothing else: pages that have been written since their pass began.
pub struct DirtyAgain;

impl HoldPolicy for DirtyAgain {
    fn sampled(&mut self, _: &PageSet) {}

    fn hold(&mut self, _: Duration, pfns: &[Pfn], dirty: Option<&PageSet>) -> Vec<bool> {
        pfns.iter()
            .map(|pfn| dirty.is_some_and(|dirty| dirty.contains(*pfn)))
            .collect()
    }

    fn sent(&mut self, _: Duration, _: u64, _: u64) {}

    fn release(&mut self, _: Duration, _: &PageSet, _: Option<&PageSet>, _: usize) -> Vec<Pfn> {
        Vec::new()
    }

    fn expected_downtime(&self, _: &PageSet, _: Option<&PageSet>) -> Option<Duration> {
        None
    }
}
