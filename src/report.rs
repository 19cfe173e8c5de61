//! Figures of a migration: one struct for the run, its log, `--stats` and the benchmarks.
//!
//! Names and units as libvirt and QEMU print them; "memory processed" counts guest bytes, savings show in wire bytes.
use std::collections::BTreeMap;
use std::time::Duration;

use serde::{Deserialize, Serialize};

use crate::codec::Row;
use crate::page::PAGE_SIZE;

/// What was carried, and what it cost. Times are in milliseconds, sizes in bytes, pages in numbers.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct Figures {
    pub guest: String,
    pub host: String,
    /// "xenfold"; "hybrid" or "postcopy" where pages may follow the guest.
    pub mode: String,
    pub completed: bool,
    pub time_elapsed_ms: u64,
    /// From the start until the receiving xl was ready.
    pub setup_time_ms: u64,
    /// From when the guest was seen suspended until the receiving xl reported that it runs, to about 200 ms.
    pub downtime_ms: u64,
    /// Of that, what the receiving xl took for the guest's devices (hotplug scripts, device model) when all of it was there.
    pub devices_time_ms: u64,
    pub memory_total_bytes: u64,
    pub memory_processed_bytes: u64,
    pub wire_bytes: u64,
    /// Bytes of xl's stream that were carried.
    pub stream_bytes: u64,
    /// Passes over memory that were seen to begin.
    pub iteration: u32,
    /// Pages that xl has offered in the current pass so far.
    pub iteration_pages: u64,
    pub pages: Pages,
    /// Blocks by the codec that carried them.
    pub blocks: BTreeMap<String, u64>,
    pub cpu_ms: u64,
    pub peak_rss_bytes: u64,
    /// Pages that the destination could not find and that were sent after all.
    pub needed_pages: u64,
    /// How long the guest was expected to stand still had it been suspended when the pass before this one ended; `None`
    /// where nothing is known of it.
    pub expected_downtime_ms: Option<u64>,
    /// What that was reckoned from: pages a second that the guest writes anew, those that the link takes, and bytes that
    /// one of them costs on the wire.
    pub dirty_pages_rate: u64,
    pub sent_pages_rate: u64,
    pub page_wire_bytes: u64,
    /// Whether that was within the limit after the last of five passes; `None`: xl made fewer, or it is not known.
    pub converged: Option<bool>,
    pub holding: HoldingFigures,
    /// How the guest was made smaller for the migration.
    pub balloon: Option<BalloonFigures>,
    /// Different pages of the guest that have been carried with data.
    pub distinct_pages: u64,
    pub verify: Option<VerifyFigures>,
    /// What travelled after the guest had been started at the destination.
    pub late: Option<LateFigures>,
    pub destination: Option<DestinationFigures>,
    /// Why it failed.
    pub error: Option<String>,
}

/// Pages by kind of row.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Pages {
    pub zero: u64,
    pub reference: u64,
    pub full: u64,
    /// Entries without a page.
    pub absent: u64,
    /// Contents that the destination held elsewhere, whether it found them or not.
    pub known: u64,
    /// Pages sent as the difference to one that both ends have.
    pub delta: u64,
}

impl Pages {
    /// Pages with data in xl's stream.
    pub fn carried(&self) -> u64 {
        self.zero + self.reference + self.full + self.known + self.delta
    }

    pub fn add(&mut self, row: &Row) {
        let count = match row {
            Row::Zero => &mut self.zero,
            Row::Reference(_) => &mut self.reference,
            Row::Full => &mut self.full,
            Row::Absent => &mut self.absent,
            Row::Known(_) => &mut self.known,
            Row::Delta(_) => &mut self.delta,
        };
        *count += 1;
    }
}

/// A guest that gave up memory before it was migrated.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct BalloonFigures {
    /// The size that it had and has back afterwards, and the one that it migrated with: what the toolstack calls its target.
    pub target_before_bytes: u64,
    pub target_bytes: u64,
    pub given_up_bytes: u64,
    pub time_ms: u64,
}

/// Pages that were held back because they were expected to be written again.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct HoldingFigures {
    /// Pages that earlier migrations of the guest have seen written.
    pub known_pages: u64,
    /// Pages that the host's daemon has seen change before.
    pub changing_pages: u64,
    /// Pages with data in xl's stream, those that did not travel among them.
    pub pages_from_xl: u64,
    /// How often one of them was held back.
    pub held_pages: u64,
    /// Held pages that came again from xl, so that they did not travel in between.
    pub again_pages: u64,
    /// Held pages that went while the guest ran, read from its frames.
    pub released_pages: u64,
    /// The same when it was suspended; with pages that follow the guest also others, written last.
    pub flushed_pages: u64,
    /// Pages that went although they had gone before, as they were then.
    pub repeat_pages: u64,
    /// Readings of the dirty bitmap, those that Xen was too busy for, and how long the guest was paused for them.
    pub peeks: u64,
    pub busy_peeks: u64,
    pub peek_time_us: u64,
    /// Pages that were dirty at the last reading.
    pub dirty_pages: u64,
    /// Rounds for which xl was held at the end of its passes, for how long in all, and pages that went ahead of it.
    pub rounds: u32,
    pub round_time_ms: u64,
    pub ahead_pages: u64,
}

/// Pages that travelled late. The destination counts them.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct LateFigures {
    /// Pages that were late, and those that are still missing.
    pub pages: u64,
    pub missing: u64,
    /// The guest runs at the destination.
    pub started: bool,
    /// Pages that the source has sent, those that were sent twice counted twice.
    pub sent: u64,
    /// Late pages that had to be fetched before the guest was started, because Xen does not page them out.
    pub fetched_before: u64,
    /// How long it took to take the others out of the guest, before it was started.
    pub evict_time_ms: u64,
    /// Those that were taken out of it while it still ran at the source, and how long that took.
    pub early: u64,
    pub early_time_ms: u64,
    /// Those that came back before the guest was suspended or with its last pages, and how long that took.
    pub early_back: u64,
    pub early_back_time_ms: u64,
    /// How often a processor of the guest's had to wait for a page, and another domain to try again.
    pub faults: u64,
    pub foreign_faults: u64,
    /// Pages that came because somebody waited, along with one of those, and unasked.
    pub fetched: u64,
    pub prefetched: u64,
    pub pushed: u64,
    /// Of these, pages that did not travel: another page of the guest holds the same, or this host held it elsewhere. And how
    /// often that turned out not to be so, and a page was asked for again.
    pub referred: u64,
    pub known: u64,
    pub asked_again: u64,
    /// Pages that had come along, or were about to, when they were wanted.
    pub hits: u64,
    /// Pages that the guest gave up before they came.
    pub given_up: u64,
    /// How long the guest's processors waited for a page.
    pub latency_median_us: u64,
    pub latency_p99_us: u64,
    pub latency_longest_us: u64,
    /// From when the guest could be started until the last page was there.
    pub time_ms: u64,
    /// How often the connection was lost meanwhile, for how long in all, and for how long by now (0: it is there). The guest
    /// stands still then.
    pub outages: u64,
    pub outage_ms: u64,
    pub lost_for_ms: u64,
    /// How often another process went on at the destination because the one before was killed, and the pages that had come
    /// by then: the other figures do not count them.
    pub takeovers: u64,
    pub before_takeover: u64,
    /// Another program has asked the guest to suspend itself: it is held still until its pages are there, or for a while.
    pub held_for_save: bool,
    /// Pages that were missing when another program had suspended the guest: what was saved of it lacks them.
    pub lost_to_save: u64,
    /// With `--verify`, for a guest that was paused all the time: frames that hold what came for them, and others.
    pub verified_pages: u64,
    pub different_pages: u64,
}

/// What `--verify` found.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct VerifyFigures {
    /// Frames at the destination that are as last carried.
    pub equal_pages: u64,
    /// Frames left out, because Xen's toolstack rewrites them.
    pub rewritten_by_xen_pages: u64,
    /// Frames of the suspended source that have changed since they were carried: backends finish reads into them.
    pub changed_at_source_pages: u64,
    pub time_ms: u64,
}

/// What the destination tells at the end.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct DestinationFigures {
    pub program: String,
    /// References resolved from pages still in memory, and from the guest's own frames.
    pub resolved_from_memory: u64,
    pub resolved_from_frames: u64,
    /// Contents found on this host, and those that the source had to send after all.
    pub resolved_from_contents: u64,
    pub needed_pages: u64,
    /// Time spent waiting until a record had been applied.
    pub apply_wait_ms: u64,
    pub late: Option<LateFigures>,
    pub cpu_ms: u64,
    pub peak_rss_bytes: u64,
}

impl Figures {
    /// Whether the guest runs at the destination, though pages of it may still be on their way.
    pub fn runs_there(&self) -> bool {
        self.completed || self.late.as_ref().is_some_and(|late| late.started)
    }

    /// Share of the guest's bytes that did not have to travel, 0 to 1.
    pub fn reduction(&self) -> f64 {
        if self.stream_bytes == 0 {
            0.0
        } else {
            1.0 - self.wire_bytes as f64 / self.stream_bytes as f64
        }
    }

    /// Rate at which guest memory is processed, bytes a second.
    pub fn rate(&self) -> f64 {
        self.memory_processed_bytes as f64 / Duration::from_millis(self.time_elapsed_ms.max(1)).as_secs_f64()
    }

    /// How far the pass is through the guest's memory, 0 to 100.
    pub fn pass_percent(&self) -> u64 {
        let total = (self.memory_total_bytes / PAGE_SIZE as u64).max(1);
        (self.iteration_pages.saturating_mul(100) / total).min(100)
    }

    /// Notes rows of one record.
    pub fn add_rows(&mut self, pages: Pages) {
        self.pages.zero += pages.zero;
        self.pages.reference += pages.reference;
        self.pages.full += pages.full;
        self.pages.absent += pages.absent;
        self.pages.known += pages.known;
        self.pages.delta += pages.delta;
        self.memory_processed_bytes += pages.carried() * PAGE_SIZE as u64;
    }
}
