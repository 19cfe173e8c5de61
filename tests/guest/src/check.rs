//! The memory checker. Each page's contents follow from its index and its generation alone. Every
//! pass checks all pages and then gives some a new generation, so that a page that a migration
//! carried in an older state is found as surely as one that it damaged. An eighth of the pages gets
//! all of that: programs write the same pages again, and a guest of which every page turns into
//! noise within minutes is none that anybody has.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::process::ExitCode;
use std::time::{Duration, Instant};

use clap::Args;

use crate::net::{Broadcaster, Listener, REPORT_PORT};

#[derive(Args)]
pub struct Check {
    /// Name in the reports
    #[arg(long)]
    name: String,
    /// MiB to fill
    #[arg(long, default_value_t = 16)]
    size: usize,
    /// Pages in a thousand that are rewritten after each pass, all of them among those that live
    #[arg(long, default_value_t = 10)]
    change: u64,
    /// Rest between passes
    #[arg(long, default_value_t = 500)]
    pause_ms: u64,
    /// End after so many passes (0: never)
    #[arg(long, default_value_t = 0)]
    passes: u64,
}

pub const WORDS: usize = 512;

#[derive(Clone)]
#[repr(align(4096))]
pub struct Page(pub [u64; WORDS]);

/// SplitMix64: a cheap bijection whose outputs look random.
pub fn mix(value: u64) -> u64 {
    let mut z = value.wrapping_add(0x9e37_79b9_7f4a_7c15);
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

/// The contents of a page: of eight, one is zero, two repeat one of 16 contents, two compress well, three do not
/// compress. Of those three a new generation makes one wholly new, and in the others it writes an eighth of the page,
/// as programs write records.
fn word(index: usize, generation: u32, position: usize) -> u64 {
    let written = match index % 8 {
        6 | 7 => last_written(generation, position / (WORDS / 8)),
        _ => generation,
    };
    let position = position as u64;
    let own = mix(index as u64 | u64::from(written) << 40);
    match index % 8 {
        0 if generation.is_multiple_of(2) => 0,
        1 | 2 => mix(mix(own % 16) ^ position),
        3 | 4 => mix((own & 0xff) ^ (position / 32)) & 0x0303_0303_0303_0303 | 0x2020_2020_2020_2020,
        _ => mix(own ^ position),
    }
}

/// The generation that last wrote an eighth of a page, when each generation writes one of them, in turn.
fn last_written(generation: u32, eighth: usize) -> u32 {
    let since = (generation + 8 - eighth as u32) % 8;
    generation.saturating_sub(since)
}

/// One page in so many is rewritten.
const LIVES: u64 = 8;

/// Of each kind as many.
fn lives(index: usize) -> bool {
    mix(index as u64).is_multiple_of(LIVES)
}

fn fill(page: &mut Page, index: usize, generation: u32) {
    for (position, slot) in page.0.iter_mut().enumerate() {
        *slot = word(index, generation, position);
    }
}

fn first_wrong_word(page: &Page, index: usize, generation: u32) -> Option<usize> {
    (0..WORDS).find(|&position| page.0[position] != word(index, generation, position))
}

/// The guest's pfn of a page of ours, 0 where the kernel does not tell.
fn pfn_of(page: &Page) -> u64 {
    let entry = std::ptr::from_ref(page).addr() as u64 / 4096 * 8;
    let mut bytes = [0; 8];
    match File::open("/proc/self/pagemap").and_then(|map| map.read_exact_at(&mut bytes, entry)) {
        Ok(()) => u64::from_le_bytes(bytes) & ((1 << 55) - 1),
        Err(_) => 0,
    }
}

impl Check {
    pub fn run(&self) -> anyhow::Result<ExitCode> {
        let reports = Broadcaster::new(REPORT_PORT)?;
        let count = self.size * 256;
        let mut pages = vec![Page([0; WORDS]); count];
        let mut generations = vec![0_u32; count];
        for (index, page) in pages.iter_mut().enumerate() {
            fill(page, index, 0);
        }
        println!("checker {}: {count} pages filled", self.name);

        let mut bad = 0_u64;
        let mut printed = Instant::now();
        for pass in 1.. {
            for (index, page) in pages.iter_mut().enumerate() {
                let Some(position) = first_wrong_word(page, index, generations[index]) else {
                    continue;
                };
                bad += 1;
                let line = format!(
                    "checker {} BAD pfn {:#x} page {index} generation {} word {position}: {:#018x}, expected {:#018x} (pass {pass})",
                    self.name,
                    pfn_of(page),
                    generations[index],
                    page.0[position],
                    word(index, generations[index], position),
                );
                println!("{line}");
                reports.send(&line);
                fill(page, index, generations[index]);
            }
            // A bad page is told in every later report too: a listener may come late.
            let verdict = if bad == 0 { "ok" } else { "BAD" };
            let line = format!("checker {} {verdict} pass {pass} pages {count} bad {bad}", self.name);
            reports.send(&line);
            if pass == 1 || printed.elapsed() > Duration::from_secs(10) {
                printed = Instant::now();
                println!("checker {verdict} {pass} ({count} pages, {bad} bad)");
            }
            if pass == self.passes {
                return Ok(ExitCode::from(u8::from(bad > 0)));
            }
            for (index, page) in pages.iter_mut().enumerate() {
                if lives(index) && mix(pass ^ (index as u64) << 32) % 1000 < self.change * LIVES {
                    generations[index] += 1;
                    fill(page, index, generations[index]);
                }
            }
            std::thread::sleep(Duration::from_millis(self.pause_ms));
        }
        unreachable!("the passes end above or never")
    }
}

#[derive(Args)]
pub struct Listen {
    /// Only this guest's reports
    #[arg(long)]
    name: Option<String>,
    /// Give up after so long
    #[arg(long, default_value_t = 60)]
    seconds: u64,
    /// End well after so many passes that began and ended while we listened (0: listen to the end)
    #[arg(long, default_value_t = 2)]
    passes: u64,
}

impl Listen {
    pub fn run(&self) -> anyhow::Result<ExitCode> {
        let listener = Listener::new(REPORT_PORT)?;
        let begin = Instant::now();
        let mut first_pass = None;
        while begin.elapsed() < Duration::from_secs(self.seconds) {
            let Some(received) = listener.receive()? else {
                continue;
            };
            let words: Vec<&str> = received.line.split_whitespace().collect();
            let ["checker", name, verdict, rest @ ..] = words.as_slice() else {
                continue;
            };
            if self.name.as_deref().is_some_and(|wanted| wanted != *name) {
                continue;
            }
            println!("{:.3} {}", received.at.as_secs_f64(), received.line);
            if *verdict != "ok" {
                return Ok(ExitCode::FAILURE);
            }
            let ["pass", pass, ..] = rest else { continue };
            let pass: u64 = pass.parse().unwrap_or(0);
            // The pass that ends first began before we listened.
            let first = *first_pass.get_or_insert(pass);
            if self.passes > 0 && pass >= first + self.passes {
                return Ok(ExitCode::SUCCESS);
            }
        }
        if self.passes == 0 {
            return Ok(ExitCode::SUCCESS);
        }
        eprintln!("no {} passes reported in {} s", self.passes, self.seconds);
        Ok(ExitCode::from(3))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_stale_and_a_damaged_page_are_found() {
        for index in 0..64 {
            let mut page = Page([0; WORDS]);
            fill(&mut page, index, 4);
            assert_eq!(first_wrong_word(&page, index, 4), None);
            page.0[77] ^= 1;
            assert_eq!(first_wrong_word(&page, index, 4), Some(77));
        }
        let mut page = Page([0; WORDS]);
        fill(&mut page, 7, 4);
        assert_eq!(first_wrong_word(&page, 7, 5), Some(320));
        fill(&mut page, 8, 4);
        assert!(page.0.iter().all(|&word| word == 0));
        assert_eq!(first_wrong_word(&page, 8, 5), Some(0));
    }

    #[test]
    fn pages_of_each_kind_live() {
        for kind in 0..8 {
            let lively = (kind..8000).step_by(8).filter(|&index| lives(index)).count();
            assert!((90..160).contains(&lively), "{lively} of kind {kind}");
        }
    }

    #[test]
    fn a_generation_writes_an_eighth_of_some_pages() {
        for generation in 8..24 {
            let mut page = Page([0; WORDS]);
            fill(&mut page, 6, generation);
            let wrong: Vec<usize> = (0..WORDS)
                .filter(|&position| page.0[position] != word(6, generation + 1, position))
                .collect();
            let eighth = (generation as usize + 1) % 8 * (WORDS / 8);
            assert_eq!(wrong, (eighth..eighth + WORDS / 8).collect::<Vec<_>>());
        }
    }
}
