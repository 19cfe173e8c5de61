//! Processor time.
use std::time::Duration;

use rustix::time::{ClockId, clock_gettime};

fn time_of(clock: ClockId) -> Duration {
    let time = clock_gettime(clock);
    Duration::new(time.tv_sec.unsigned_abs(), time.tv_nsec.unsigned_abs() as u32)
}

/// Of this thread.
pub(super) fn thread_cpu() -> Duration {
    time_of(ClockId::ThreadCPUTime)
}

/// Of this process.
pub(super) fn process_cpu() -> Duration {
    time_of(ClockId::ProcessCPUTime)
}
