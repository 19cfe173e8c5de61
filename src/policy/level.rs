//! Which compression level makes the wire small and still costs no time.
//!
//! A byte of guest memory costs the processors `cpu` nanoseconds and the link `ratio × link` nanoseconds; the two work
//! side by side, so the slower one decides the time. A level must be clearly faster than sending raw; among those the
//! least time × √ratio wins: where times are close, fewer bytes. A link that is the slower one gets the strongest level
//! that keeps up with it, since there time and bytes are the same. Three numbers are learnt while blocks are compressed:
//! how fast this machine is and how well this guest compresses, both against the reference figures below, and how long
//! a worker waits for a processor; the link's is measured at each write.
//!
//! Whether compression pays at all is judged without that waiting: what the worker waits for may be the sending of the
//! blocks before, which costs a busy processor more the larger they are.
use std::time::Duration;

use crate::codec::Level;

struct Reference {
    level: Level,
    /// Nanoseconds a byte on one core.
    cpu_ns: f64,
    /// Compressed size of a block that `zstd -1` brings to [`ORDINARY_RATIO`].
    ratio: f64,
}

impl Reference {
    /// How strong the level is beside `zstd -1`: a block that this brings to r, the level brings to r to this power.
    /// What does not compress at one level does not at another.
    fn strength(&self) -> f64 {
        self.ratio.ln() / ORDINARY_RATIO.ln()
    }
}

/// Measured on unique pages of a Debian guest in blocks of 1 MiB. Only their proportions matter: the machine's own speed
/// is learnt.
const REFERENCES: [Reference; 6] = [
    Reference {
        level: Level::Raw,
        cpu_ns: 0.0,
        ratio: 1.0,
    },
    Reference {
        level: Level::Lz4,
        cpu_ns: 1.7,
        ratio: 0.43,
    },
    Reference {
        level: Level::Zstd(1),
        cpu_ns: 2.4,
        ratio: ORDINARY_RATIO,
    },
    Reference {
        level: Level::Zstd(3),
        cpu_ns: 4.6,
        ratio: 0.294,
    },
    Reference {
        level: Level::Zstd(6),
        cpu_ns: 14.0,
        ratio: 0.278,
    },
    Reference {
        level: Level::Zstd(9),
        cpu_ns: 24.0,
        ratio: 0.270,
    },
];
const ORDINARY_RATIO: f64 = 0.315;

/// Above this, compression is not worth the receiver's time either.
const POOR_RATIO: f64 = 0.97;

/// A level may take at most this share of the time of sending raw.
const WORTHWHILE: f64 = 0.9;

/// Longer waiting than this many times the work is taken for an accident.
const MOST_WAITING: f64 = 16.0;

/// How fast new measurements replace old ones.
const WEIGHT: f64 = 0.15;

/// Every so many blocks one is compressed although raw looks best, to notice when that changes.
const PROBE_EVERY: u32 = 16;

/// What a link is taken for until it has been measured: 1 Gbit/s.
const FIRST_LINK_NS: f64 = 8.0;

/// A level must promise to be this much better than the one in use.
const HYSTERESIS: f64 = 0.97;

/// Chooses the level of each block.
#[derive(Debug)]
pub struct LevelPolicy {
    workers: f64,
    /// What the workers spend on a byte whatever the level (hashing), ns on the reference machine.
    fixed_ns: f64,
    /// Measured cost over reference cost, in processor time.
    slowness: f64,
    /// Time over processor time while a block is compressed.
    waiting: f64,
    /// What `zstd -1` makes of this guest's blocks, computed from the level measured.
    ratio: f64,
    link_ns: f64,
    current: usize,
    blocks: u32,
    /// How many of [`REFERENCES`] may be used.
    usable: usize,
}

impl LevelPolicy {
    /// `workers`: threads that compress side by side.
    pub fn new(workers: usize) -> LevelPolicy {
        // Each worker keeps a compressor, and a strong one takes 8 MiB: together they must stay within the agent's memory.
        let usable = REFERENCES.len()
            - match workers {
                0..=2 => 0,
                3..=4 => 1,
                _ => 2,
            };
        let workers = workers.max(1) as f64;
        LevelPolicy {
            workers,
            fixed_ns: 0.6,
            slowness: 1.0,
            waiting: 1.0,
            ratio: ORDINARY_RATIO,
            link_ns: FIRST_LINK_NS,
            current: 2,
            blocks: 0,
            usable,
        }
    }

    /// The level for the next block.
    pub fn choose(&mut self) -> Level {
        self.blocks = self.blocks.wrapping_add(1);
        let best = (0..self.usable)
            .min_by(|a, b| self.cost(*a).total_cmp(&self.cost(*b)))
            .unwrap_or(0);
        if self.cost(best) < self.cost(self.current) * HYSTERESIS {
            self.current = best;
        }
        let chosen = REFERENCES
            .get(self.current)
            .map_or(Level::Raw, |reference| reference.level);
        if chosen == Level::Raw && self.blocks.is_multiple_of(PROBE_EVERY) {
            Level::Lz4
        } else {
            chosen
        }
    }

    /// A block of `input` bytes took `elapsed`, and of it `cpu` on a processor, to compress at `level`, to `output`
    /// bytes.
    pub fn compressed(&mut self, level: Level, input: usize, output: usize, cpu: Duration, elapsed: Duration) {
        let Some(reference) = REFERENCES.iter().find(|reference| reference.level == level) else {
            return;
        };
        if input == 0 || reference.cpu_ns == 0.0 {
            return;
        }
        let cpu_ns = cpu.as_nanos() as f64 / input as f64;
        let waiting = elapsed.as_secs_f64() / cpu.as_secs_f64().max(1e-9);
        self.waiting += WEIGHT * (waiting.clamp(1.0, MOST_WAITING) - self.waiting);
        self.slowness += WEIGHT * (cpu_ns / reference.cpu_ns - self.slowness);
        let measured = (output as f64 / input as f64).clamp(0.001, 1.0);
        self.ratio += WEIGHT * (measured.powf(1.0 / reference.strength()) - self.ratio);
    }

    /// Writing `bytes` to the link took `elapsed`.
    pub fn written(&mut self, bytes: usize, elapsed: Duration) {
        if bytes >= 4096 {
            self.link_ns += WEIGHT * (elapsed.as_nanos() as f64 / bytes as f64 - self.link_ns);
        }
    }

    /// What a level costs, as far as is known: the less the better.
    fn cost(&self, index: usize) -> f64 {
        let Some(reference) = REFERENCES.get(index) else {
            return f64::INFINITY;
        };
        let ratio = self.ratio.powf(reference.strength());
        let cpu = (self.fixed_ns + reference.cpu_ns) * self.slowness / self.workers;
        let link = ratio * self.link_ns;
        if reference.level == Level::Raw {
            return f64::MAX;
        }
        if ratio > POOR_RATIO || link.max(cpu) > self.link_ns * WORTHWHILE {
            return f64::INFINITY;
        }
        link.max(cpu * self.waiting) * ratio.sqrt()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Runs the policy against a link and a guest until it has settled.
    fn settled(link_ns: f64, ratio_of: impl Fn(f64) -> f64, slowness: f64) -> Level {
        settled_waiting(link_ns, ratio_of, slowness, 1.0)
    }

    fn settled_waiting(link_ns: f64, ratio_of: impl Fn(f64) -> f64, slowness: f64, waiting: f64) -> Level {
        let mut policy = LevelPolicy::new(2);
        let mut level = Level::Raw;
        for _ in 0..400 {
            level = policy.choose();
            let reference = REFERENCES.iter().find(|reference| reference.level == level).unwrap();
            let output = (1e6 * ratio_of(reference.ratio)) as usize;
            let took = Duration::from_nanos((reference.cpu_ns * slowness * 1e6) as u64);
            policy.compressed(level, 1_000_000, output, took, took.mul_f64(waiting));
            policy.written(output, Duration::from_nanos((output as f64 * link_ns) as u64));
        }
        policy.current = policy.current.min(REFERENCES.len() - 1);
        if level == Level::Lz4 {
            REFERENCES[policy.current].level
        } else {
            level
        }
    }

    #[test]
    fn the_slower_the_link_the_smaller_the_blocks() {
        assert_eq!(settled(0.8, |ratio| ratio, 1.0), Level::Raw);
        assert_eq!(settled(8.0, |ratio| ratio, 1.0), Level::Zstd(1));
        assert_eq!(settled(16.0, |ratio| ratio, 1.0), Level::Zstd(3));
        assert_eq!(settled(160.0, |ratio| ratio, 1.0), Level::Zstd(9));
    }

    #[test]
    fn a_slow_processor_steps_back() {
        assert_eq!(settled(160.0, |ratio| ratio, 40.0), Level::Zstd(1));
        assert_eq!(settled(8.0, |ratio| ratio, 40.0), Level::Raw);
    }

    #[test]
    fn a_worker_that_waits_for_a_processor_steps_back_and_still_compresses() {
        assert_eq!(settled_waiting(160.0, |ratio| ratio, 5.0, 1.0), Level::Zstd(6));
        assert_eq!(settled_waiting(160.0, |ratio| ratio, 5.0, 5.0), Level::Zstd(1));
        assert_ne!(settled_waiting(160.0, |ratio| ratio, 5.0, 15.0), Level::Raw);
    }

    #[test]
    fn noise_is_not_compressed() {
        assert_eq!(settled(8.0, |_| 1.0, 1.0), Level::Raw);
    }
}
