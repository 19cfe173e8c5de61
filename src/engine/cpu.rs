//! Processor time.
use std::fs;
use std::time::{Duration, Instant};

use rustix::time::{ClockId, clock_gettime};

fn time_of(clock: ClockId) -> Duration {
    let time = clock_gettime(clock);
    Duration::new(time.tv_sec.unsigned_abs(), time.tv_nsec.unsigned_abs() as u32)
}

/// Of this thread.
pub fn thread_cpu() -> Duration {
    time_of(ClockId::ThreadCPUTime)
}

/// Of this process.
pub(super) fn process_cpu() -> Duration {
    time_of(ClockId::ProcessCPUTime)
}

/// Measures how long this thread is blocked: not the time in which it runs, nor that in which it could and has no
/// processor.
pub(super) struct Blocking {
    start: Instant,
    /// Both of these at the start; `None` where /proc does not tell, and all time counts.
    busy: Option<Duration>,
}

impl Blocking {
    pub fn start() -> Blocking {
        Blocking {
            start: Instant::now(),
            busy: busy(),
        }
    }

    pub fn time(&self) -> Duration {
        let elapsed = self.start.elapsed();
        let busy = busy().zip(self.busy).map(|(now, before)| now.saturating_sub(before));
        elapsed.saturating_sub(busy.unwrap_or_default())
    }
}

/// Time in which this thread ran or waited for a processor: the latter is the second number of
/// /proc/thread-self/schedstat, in nanoseconds (Documentation/scheduler/sched-stats.rst of Linux).
fn busy() -> Option<Duration> {
    let text = fs::read_to_string("/proc/thread-self/schedstat").ok()?;
    let waited = text.split_whitespace().nth(1)?.parse::<u64>().ok()?;
    Some(thread_cpu() + Duration::from_nanos(waited))
}

/// What all processors of this machine have been idle, together; `None` where /proc does not tell.
pub(super) fn idle() -> Option<Duration> {
    idle_of(&fs::read_to_string("/proc/stat").ok()?)
}

/// proc(5): the fields of the line `cpu` are user, nice, system, idle, iowait, ... in units that are 1/100 s on every x86
/// Linux.
fn idle_of(stat: &str) -> Option<Duration> {
    let mut fields = stat.lines().next()?.strip_prefix("cpu ")?.split_whitespace().skip(3);
    let mut ticks = || fields.next()?.parse::<u64>().ok();
    Some(Duration::from_millis((ticks()? + ticks()?) * 10))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_blocked_time_counts() {
        let blocking = Blocking::start();
        std::thread::sleep(Duration::from_millis(20));
        let slept = blocking.time();
        assert!(slept > Duration::from_millis(15), "{slept:?}");
        let begin = Instant::now();
        while begin.elapsed() < Duration::from_millis(50) {}
        let blocked = blocking.time().saturating_sub(slept);
        assert!(blocked < Duration::from_millis(25), "{blocked:?} while running");
    }

    #[test]
    fn idle_time_is_read() {
        let stat = "cpu  100 2 300 4000 50 0 6 7 0 0\ncpu0 1 2 3 4 5 6 7 8 0 0\n";
        assert_eq!(idle_of(stat), Some(Duration::from_millis(40_500)));
        assert_eq!(idle_of("cpu0 1 2 3 4 5\n"), None);
        assert_eq!(idle_of(""), None);
        assert!(idle().is_some());
    }
}
