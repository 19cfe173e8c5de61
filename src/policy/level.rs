//! Which compression level makes the wire small and still costs no time.
//!
//! A byte of guest memory costs the processors and the link time, side by side: the slowest decides. The processors
//! compress it, do what has to be done whatever the level (reading, hashing), and carry what is left of it through ssh,
//! which on a slow machine costs more than compressing. A level may take half as much time again as sending raw where the
//! processors are the slowest, and must be faster where the link is; among those the least time × √ratio wins: where times
//! are close, fewer bytes. A link that is the slowest gets the strongest level that keeps up with it, since there time and
//! bytes are the same.
//!
//! All of that is measured: how fast this machine is and how well this guest compresses while blocks are compressed,
//! both against the reference figures below; what the other work costs, by the processor time of this process and of
//! ssh; how much of the processors the guest, xl and others leave, by what is idle; the link, when the sender has to wait
//! for it. A link that nobody waits for could take more, nobody knows how much: what is known of it is forgotten, at once
//! where it never was more than a guess and slowly where it was measured.
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

/// Where sending raw is as slow as the link, a level must be clearly faster: what it leaves to the processors is not known
/// exactly. Where it is as slow as the processors, a level may cost some time: bytes count more.
const WORTHWHILE_FOR_LINK: f64 = 0.9;
const WORTHWHILE_FOR_PROCESSORS: f64 = 1.5;

/// What other work is taken for until it has been measured, ns a byte on the reference machine.
const FIRST_FIXED_NS: f64 = 1.2;

/// Guest bytes between two measurements of other work.
const MEASURE_EVERY: u64 = 16 << 20;

/// How fast new measurements replace old ones.
const WEIGHT: f64 = 0.15;

/// The same for a block's ratio. Blocks differ from each other, and the link has the average to carry.
const RATIO_WEIGHT: f64 = 0.04;

/// Every so many blocks one is compressed although raw looks best, to notice when that changes.
const PROBE_EVERY: u32 = 16;

/// What a link is taken for until it has been measured: 1 Gbit/s.
const FIRST_LINK_NS: f64 = 8.0;

/// Bytes on the wire that measure the link once.
const MEASURE_LINK_EVERY: usize = 1 << 20;

/// A link that the sender waited for this part of the time is full.
const FULL: f64 = 0.1;

/// How fast a measured link is forgotten while it is not full.
const FORGET: f64 = 0.002;

/// Time between two looks at how much of the processors is free. The kernel counts in steps of 10 ms.
const LOOK_EVERY: Duration = Duration::from_millis(250);

/// Processors that are always taken to be free.
const LEAST_FREE: f64 = 0.1;

/// The least part of the guest that is taken to come into blocks.
const LEAST_SHARE: f64 = 0.01;

/// A level must promise to be this much better than the one in use.
const HYSTERESIS: f64 = 0.97;

/// What the migration has cost so far.
#[derive(Clone, Copy, Debug, Default)]
pub struct Spent {
    /// Processor time of this process.
    pub own: Duration,
    /// Processor time of whatever carries the bytes (ssh); zero where that is not known.
    pub carrier: Duration,
    pub guest_bytes: u64,
    pub wire_bytes: u64,
    /// Time since some moment, the same each time.
    pub elapsed: Duration,
    /// What all processors were idle since some moment; `None` where that is not known.
    pub idle: Option<Duration>,
}

/// Chooses the level of each block.
#[derive(Debug)]
pub struct LevelPolicy {
    workers: f64,
    processors: f64,
    /// How many of these others leave to us.
    free: f64,
    /// When that was looked at last.
    looked: Spent,
    /// Processor time of this process for a byte of the guest, without compressing.
    fixed_ns: Option<f64>,
    /// Processor time that a byte on the wire costs ssh.
    carrier_ns: f64,
    /// Measured cost of compressing over reference cost.
    slowness: f64,
    /// What `zstd -1` makes of this guest's blocks, computed from the level measured.
    ratio: f64,
    ratio_measured: f64,
    link_ns: f64,
    link_measured: f64,
    /// What has been written since the link was looked at: bytes, time, and how much of that was spent waiting.
    writing: (usize, Duration, Duration),
    current: usize,
    blocks: u32,
    /// Bytes of the guest that came into blocks so far; the others went as references, or as contents that the
    /// destination holds.
    block_bytes: u64,
    /// The part of the guest that comes into blocks, once it has been measured: what a level costs and saves, it does for so many bytes only.
    share: Option<f64>,
    /// Processor time spent on compressing so far.
    compressing: Duration,
    /// At the last measurement of other work, and `compressing` and `block_bytes` then.
    measured: (Spent, Duration, u64),
    /// How many of [`REFERENCES`] may be used.
    usable: usize,
}

impl LevelPolicy {
    /// `workers`: threads that compress side by side. `processors`: what this process and ssh have between them.
    pub fn new(workers: usize, processors: usize) -> LevelPolicy {
        // Each worker keeps a compressor, and a strong one takes 8 MiB: together they must stay within the agent's memory.
        let usable = REFERENCES.len()
            - match workers {
                0..=2 => 0,
                3..=4 => 1,
                _ => 2,
            };
        let (workers, processors) = (workers.max(1) as f64, processors.max(1) as f64);
        LevelPolicy {
            workers,
            processors,
            free: processors,
            looked: Spent::default(),
            fixed_ns: None,
            carrier_ns: 0.0,
            slowness: 1.0,
            ratio: ORDINARY_RATIO,
            ratio_measured: 0.0,
            link_ns: FIRST_LINK_NS,
            link_measured: 0.0,
            writing: (0, Duration::ZERO, Duration::ZERO),
            current: 2,
            blocks: 0,
            block_bytes: 0,
            share: None,
            compressing: Duration::ZERO,
            measured: (Spent::default(), Duration::ZERO, 0),
            usable,
        }
    }

    /// The level for the next block.
    pub fn choose(&mut self) -> Level {
        self.blocks = self.blocks.wrapping_add(1);
        if self.ratio_measured == 0.0 {
            // The link waits for the first blocks.
            return Level::Lz4;
        }
        let best = (0..self.usable)
            .min_by(|a, b| self.cost(*a).total_cmp(&self.cost(*b)))
            .unwrap_or(0);
        if self.cost(best) < self.cost(self.current) * HYSTERESIS {
            self.current = best;
        }
        if self.is_raw() && self.blocks.is_multiple_of(PROBE_EVERY) {
            return Level::Lz4;
        }
        REFERENCES
            .get(self.current)
            .map_or(Level::Raw, |reference| reference.level)
    }

    fn is_raw(&self) -> bool {
        self.current == 0
    }

    /// A block of `input` bytes took `cpu` of a processor to compress at `level`, to `output` bytes.
    pub fn compressed(&mut self, level: Level, input: usize, output: usize, cpu: Duration) {
        self.compressing += cpu;
        self.block_bytes += input as u64;
        let Some(reference) = REFERENCES.iter().find(|reference| reference.level == level) else {
            return;
        };
        if input == 0 || reference.cpu_ns == 0.0 {
            return;
        }
        let cpu_ns = cpu.as_nanos() as f64 / input as f64;
        // A probe stands for all the blocks that went without being looked at.
        let blocks = if self.is_raw() { PROBE_EVERY } else { 1 };
        self.slowness += for_each_of(blocks, WEIGHT) * (cpu_ns / reference.cpu_ns - self.slowness);
        let measured = (output as f64 / input as f64).clamp(0.001, 1.0);
        // Nothing is known of a guest before its first block.
        self.ratio_measured += 1.0;
        let weight = RATIO_WEIGHT.max(1.0 / self.ratio_measured);
        self.ratio += for_each_of(blocks, weight) * (measured.powf(1.0 / reference.strength()) - self.ratio);
    }

    /// `bytes` went to the link, `elapsed` after those before; for `waited` of that time the link, or the destination
    /// behind it, did not take more.
    pub fn written(&mut self, bytes: usize, elapsed: Duration, waited: Duration) {
        let (all, time, waiting) = (
            self.writing.0 + bytes,
            self.writing.1 + elapsed,
            self.writing.2 + waited,
        );
        if all < MEASURE_LINK_EVERY {
            self.writing = (all, time, waiting);
            return;
        }
        self.writing = (0, Duration::ZERO, Duration::ZERO);
        let each = |time: Duration| time.as_nanos() as f64 / all as f64;
        let sample = each(time);
        if waiting > time.mul_f64(FULL) {
            // The link drains what is under way while the sender works, so the bytes took no more than all this time, and no
            // less than what was waited for; who waits for half of the time sees all of it. In between what is known stays.
            let least = each(time.min(waiting * 2));
            let sample = self.link_ns.clamp(least, sample);
            // A guess that may be right stays a guess.
            if sample != self.link_ns {
                let weight = first_count_more(WEIGHT, &mut self.link_measured);
                self.link_ns += weight * (sample - self.link_ns);
            }
        } else if self.link_measured == 0.0 {
            self.link_ns = sample.min(self.link_ns) / 2.0;
        } else {
            self.link_ns -= FORGET * self.link_ns;
            self.link_ns = self.link_ns.min(sample);
        }
    }

    /// Takes note of what has been spent so far; looked at from time to time.
    pub fn spent(&mut self, now: Spent) {
        if !self.wants_spent(now.guest_bytes) {
            return;
        }
        let (before, compressing, block_bytes) = self.measured;
        let guest_bytes = now.guest_bytes.saturating_sub(before.guest_bytes);
        let wire_bytes = now.wire_bytes.saturating_sub(before.wire_bytes);
        let own = now.own.saturating_sub(before.own);
        let own = own.saturating_sub(self.compressing.saturating_sub(compressing));
        let sample = own.as_nanos() as f64 / guest_bytes as f64;
        learn(&mut self.fixed_ns, sample);
        // What is on its way costs later; a part with hardly any bytes tells nothing.
        if wire_bytes >= guest_bytes / 16 {
            let sample = now.carrier.saturating_sub(before.carrier).as_nanos() as f64 / wire_bytes as f64;
            self.carrier_ns += WEIGHT * (sample - self.carrier_ns);
        }
        // Blocks are compressed ahead of what has been sent.
        let sample = (self.block_bytes - block_bytes) as f64 / guest_bytes as f64;
        learn(&mut self.share, sample.clamp(LEAST_SHARE, 1.0));
        self.measured = (now, self.compressing, self.block_bytes);
        self.look(now);
        log::debug!(
            "level {:?} for {:.2} of the guest: a byte takes {:.1} ns beside compressing, {:.1} on the wire, {:.1} in ssh; \
             compressing takes {:.1} times the reference's and leaves {:.2}; {:.2} processors are free",
            REFERENCES.get(self.current).map(|reference| reference.level),
            self.share(),
            self.fixed_ns.unwrap_or_default(),
            self.link_ns,
            self.carrier_ns,
            self.slowness,
            self.ratio,
            self.free,
        );
    }

    /// Takes note of what the processors have been used for: what is idle and what we use could all be ours.
    fn look(&mut self, now: Spent) {
        let elapsed = now.elapsed.saturating_sub(self.looked.elapsed);
        if elapsed < LOOK_EVERY {
            return;
        }
        if let (Some(idle), Some(before)) = (now.idle, self.looked.idle) {
            let ours = (now.own + now.carrier).saturating_sub(self.looked.own + self.looked.carrier);
            let free = (idle.saturating_sub(before) + ours).as_secs_f64() / elapsed.as_secs_f64();
            self.free += WEIGHT * (free.clamp(LEAST_FREE, self.processors) - self.free);
        }
        self.looked = now;
    }

    /// Whether it is time for [`LevelPolicy::spent`].
    pub fn wants_spent(&self, guest_bytes: u64) -> bool {
        guest_bytes.saturating_sub(self.measured.0.guest_bytes) >= MEASURE_EVERY
    }

    /// Until it is known, all of the guest.
    fn share(&self) -> f64 {
        self.share.unwrap_or(1.0)
    }

    /// Nanoseconds that a byte of the guest keeps the processors busy when it is compressed at `cpu_ns` to `ratio`.
    fn work(&self, cpu_ns: f64, ratio: f64) -> f64 {
        let compressing = self.share() * cpu_ns * self.slowness;
        let carrying = self.share() * ratio * self.carrier_ns;
        let fixed = self.fixed_ns.unwrap_or(FIRST_FIXED_NS * self.slowness);
        let all = (fixed + compressing + carrying) / self.free;
        [carrying, compressing / self.workers].into_iter().fold(all, f64::max)
    }

    /// What a level costs, as far as is known: the less the better.
    fn cost(&self, index: usize) -> f64 {
        let Some(reference) = REFERENCES.get(index) else {
            return f64::INFINITY;
        };
        if reference.level == Level::Raw {
            return f64::MAX;
        }
        let ratio = self.ratio.powf(reference.strength());
        let link_ns = self.share() * self.link_ns;
        let time = self.work(reference.cpu_ns, ratio).max(ratio * link_ns);
        let raw = self.work(0.0, 1.0);
        let most = if link_ns > raw {
            link_ns * WORTHWHILE_FOR_LINK
        } else {
            raw * WORTHWHILE_FOR_PROCESSORS
        };
        if ratio > POOR_RATIO || time > most {
            return f64::INFINITY;
        }
        time * ratio.sqrt()
    }
}

/// The weight of one measurement that stands for so many, each of which has `weight`.
fn for_each_of(measurements: u32, weight: f64) -> f64 {
    1.0 - (1.0 - weight).powf(f64::from(measurements))
}

/// The first measurement counts fully.
fn learn(known: &mut Option<f64>, sample: f64) {
    let known = known.get_or_insert(sample);
    *known += WEIGHT * (sample - *known);
}

/// The weight of a measurement that is not the first: `weight`, but more for the first ones, so that a wrong guess is soon
/// forgotten.
fn first_count_more(weight: f64, measured: &mut f64) -> f64 {
    *measured += 1.0;
    weight.max(1.0 / (*measured + 1.0))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A machine, a link and a guest.
    struct World {
        processors: usize,
        link_ns: f64,
        slowness: f64,
        fixed_ns: f64,
        carrier_ns: f64,
        /// Processors that others keep busy.
        others: f64,
        /// The part of the guest that comes into blocks.
        share: f64,
    }

    const WORLD: World = World {
        processors: 2,
        link_ns: 8.0,
        slowness: 1.0,
        fixed_ns: 1.2,
        carrier_ns: 0.0,
        others: 0.0,
        share: 1.0,
    };

    impl World {
        /// Runs the policy until it has settled.
        fn settled(&self, ratio_of: impl Fn(f64) -> f64) -> Level {
            let (mut policy, mut spent) = (LevelPolicy::new(2, self.processors), Spent::default());
            self.run(&mut policy, &mut spent, 400, ratio_of);
            REFERENCES[policy.current].level
        }

        fn run(&self, policy: &mut LevelPolicy, spent: &mut Spent, blocks: u32, ratio_of: impl Fn(f64) -> f64) {
            for _ in 0..blocks {
                let level = policy.choose();
                let reference = REFERENCES.iter().find(|reference| reference.level == level).unwrap();
                let (input, output) = (1e6, 1e6 * ratio_of(reference.ratio));
                let cpu = Duration::from_nanos((reference.cpu_ns * self.slowness * input) as u64);
                policy.compressed(level, input as usize, output as usize, cpu);
                let guest = input / self.share;
                let work = cpu.as_secs_f64() + self.fixed_ns * guest * 1e-9 + self.carrier_ns * output * 1e-9;
                let processors = self.processors as f64;
                let link = output * self.link_ns * 1e-9;
                let elapsed = link.max(work / (processors - self.others));
                let idle = (processors - self.others) * elapsed - work;
                let work = work / (processors - self.others);
                policy.written(
                    output as usize,
                    Duration::from_secs_f64(link.max(work)),
                    Duration::from_secs_f64((link - work).max(0.0)),
                );
                spent.own += cpu + Duration::from_nanos((self.fixed_ns * guest) as u64);
                spent.carrier += Duration::from_nanos((self.carrier_ns * output) as u64);
                spent.guest_bytes += guest as u64;
                spent.wire_bytes += output as u64;
                spent.elapsed += Duration::from_secs_f64(elapsed);
                spent.idle = Some(spent.idle.unwrap_or_default() + Duration::from_secs_f64(idle.max(0.0)));
                policy.spent(*spent);
            }
        }
    }

    #[test]
    fn the_slower_the_link_the_smaller_the_blocks() {
        let settled = |link_ns| World { link_ns, ..WORLD }.settled(|ratio| ratio);
        assert_eq!(settled(0.8), Level::Raw);
        assert_eq!(settled(8.0), Level::Zstd(1));
        assert_eq!(settled(16.0), Level::Zstd(3));
        assert_eq!(settled(160.0), Level::Zstd(9));
    }

    #[test]
    fn a_slow_processor_steps_back() {
        let slow = World {
            slowness: 40.0,
            fixed_ns: 48.0,
            ..WORLD
        };
        // Either is within a tenth of the other.
        let light = World { link_ns: 160.0, ..slow }.settled(|ratio| ratio);
        assert!([Level::Lz4, Level::Zstd(1)].contains(&light), "{light:?}");
        assert_eq!(slow.settled(|ratio| ratio), Level::Raw);
    }

    #[test]
    fn a_guest_that_needs_the_processor_gets_a_part_of_it() {
        let world = World {
            processors: 1,
            link_ns: 160.0,
            slowness: 5.0,
            fixed_ns: 12.0,
            ..WORLD
        };
        assert_eq!(world.settled(|ratio| ratio), Level::Zstd(3));
        assert_eq!(World { others: 0.5, ..world }.settled(|ratio| ratio), Level::Zstd(1));
    }

    #[test]
    fn a_guest_of_which_little_is_sent_has_little_to_save() {
        let world = World {
            link_ns: 44.0,
            others: 1.5,
            ..WORLD
        };
        assert_eq!(world.settled(|ratio| ratio), Level::Zstd(3));
        let light = World { share: 0.1, ..world }.settled(|ratio| ratio);
        assert!([Level::Raw, Level::Lz4, Level::Zstd(1)].contains(&light), "{light:?}");
        // Nor costs it much, beside what has to be done for all of the guest.
        let fast = World { link_ns: 0.8, ..WORLD };
        assert_eq!(fast.settled(|ratio| ratio), Level::Raw);
        assert_eq!(World { share: 0.2, ..fast }.settled(|ratio| ratio), Level::Zstd(1));
    }

    #[test]
    fn a_slow_moment_is_soon_forgotten() {
        let world = World {
            processors: 1,
            link_ns: 220.0,
            slowness: 5.0,
            fixed_ns: 60.0,
            carrier_ns: 80.0,
            ..WORLD
        };
        let (mut policy, mut spent) = (LevelPolicy::new(1, 1), Spent::default());
        world.run(&mut policy, &mut spent, 200, |ratio| ratio);
        assert!(!policy.is_raw());
        let slow = World {
            slowness: 100.0,
            ..world
        };
        slow.run(&mut policy, &mut spent, 10, |ratio| ratio);
        assert!(policy.is_raw());
        world.run(&mut policy, &mut spent, PROBE_EVERY + 1, |ratio| ratio);
        assert!(!policy.is_raw());
    }

    #[test]
    fn what_ssh_costs_is_saved_too() {
        // An emulated processor with a link that it cannot fill.
        let world = World {
            processors: 1,
            link_ns: 5.0,
            slowness: 5.0,
            fixed_ns: 50.0,
            carrier_ns: 60.0,
            ..WORLD
        };
        assert_eq!(world.settled(|ratio| ratio), Level::Zstd(1));
        let fast = World {
            carrier_ns: 0.0,
            fixed_ns: 0.5,
            link_ns: 0.8,
            ..WORLD
        };
        assert_eq!(fast.settled(|ratio| ratio), Level::Raw);
    }

    #[test]
    fn noise_is_not_compressed() {
        assert_eq!(WORLD.settled(|_| 1.0), Level::Raw);
    }
}
