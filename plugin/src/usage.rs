//! What this process has used so far.
use std::fs;
use std::time::Duration;

use rustix::time::{ClockId, clock_gettime};

/// Processor time of all threads.
pub fn cpu() -> Duration {
    let now = clock_gettime(ClockId::ProcessCPUTime);
    Duration::new(now.tv_sec.try_into().unwrap_or(0), now.tv_nsec.try_into().unwrap_or(0))
}

/// The most memory that was resident at one time (VmHWM in /proc/self/status), in bytes; 0 where /proc is absent.
pub fn peak_rss_bytes() -> u64 {
    let status = fs::read_to_string("/proc/self/status").unwrap_or_default();
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:"));
    let kib = line.and_then(|line| line.trim().trim_end_matches("kB").trim().parse::<u64>().ok());
    kib.unwrap_or(0) * 1024
}

/// Both at once, in milliseconds and bytes, as the engine asks for them.
pub fn cpu_ms_and_peak_rss_bytes() -> (u64, u64) {
    (cpu().as_millis() as u64, peak_rss_bytes())
}
