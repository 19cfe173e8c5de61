//! The write loop: a working set that stays dirty at a chosen rate.

use std::process::ExitCode;
use std::time::{Duration, Instant};

use clap::Args;

use crate::check::mix;

#[derive(Args)]
pub struct WriteLoop {
    /// MiB of the working set
    #[arg(long, default_value_t = 32, conflicts_with = "percent")]
    size: usize,
    /// The working set as a part of all memory
    #[arg(long)]
    percent: Option<usize>,
    /// MiB of pages dirtied each second
    #[arg(long, default_value_t = 10)]
    rate: usize,
    /// Bytes written in each page, from its beginning
    #[arg(long, default_value_t = 64)]
    bytes: usize,
}

const PAGE_SIZE: usize = 4096;
const SLICE: Duration = Duration::from_millis(20);

fn memory_mib() -> anyhow::Result<usize> {
    let meminfo = std::fs::read_to_string("/proc/meminfo")?;
    let total = meminfo.split_whitespace().nth(1).unwrap_or_default();
    Ok(total.parse::<usize>()? / 1024)
}

impl WriteLoop {
    pub fn run(&self) -> anyhow::Result<ExitCode> {
        let size_mib = match self.percent {
            Some(percent) => memory_mib()? * percent / 100,
            None => self.size,
        };
        let pages = size_mib * 256;
        anyhow::ensure!(pages > 0, "the working set is empty");
        let mut memory = vec![1_u8; pages * PAGE_SIZE];
        let bytes = self.bytes.clamp(1, PAGE_SIZE);
        println!("write loop: {size_mib} MiB at {} MiB/s", self.rate);

        let begin = Instant::now();
        let mut written = 0_u64;
        // Paced from here on in slices, so that a long standstill is not caught up in one burst.
        let mut slice_begin = begin;
        let pages_per_slice = (self.rate * 256) as f64 * SLICE.as_secs_f64();
        let mut owed = 0.0;
        loop {
            owed += pages_per_slice;
            while owed >= 1.0 {
                owed -= 1.0;
                let at = (written % pages as u64) as usize * PAGE_SIZE;
                for chunk in memory[at..at + bytes].chunks_mut(8) {
                    chunk.copy_from_slice(&mix(written).to_le_bytes()[..chunk.len()]);
                }
                written += 1;
            }
            std::hint::black_box(&mut memory);
            slice_begin = (slice_begin + SLICE).max(Instant::now());
            std::thread::sleep(slice_begin.saturating_duration_since(Instant::now()));
        }
    }
}
