//! The racer: pages of few contents, equal within the guest and across guests, each rewritten at a random moment. What a
//! write replaces is compared first, so that a page which sharing gave another one's bytes is found.

use std::process::ExitCode;
use std::time::{Duration, Instant};

use clap::Args;

use crate::check::{Page, WORDS, mix};
use crate::net::{Broadcaster, REPORT_PORT};

#[derive(Args)]
pub struct Race {
    /// Name in the reports, which look like a checker's
    #[arg(long)]
    name: String,
    /// MiB of pages
    #[arg(long, default_value_t = 16)]
    size: usize,
    /// Pages rewritten each second
    #[arg(long, default_value_t = 100)]
    rate: u64,
}

/// Contents that a page has in turn; the first is zeros.
const CONTENTS: u32 = 5;

const SLICE: Duration = Duration::from_millis(20);

fn word(content: u32, position: usize) -> u64 {
    match content {
        0 => 0,
        _ => mix(u64::from(content) << 32 | position as u64),
    }
}

fn fill(page: &mut Page, content: u32) {
    for (position, slot) in page.0.iter_mut().enumerate() {
        *slot = word(content, position);
    }
}

fn first_wrong_word(page: &Page, content: u32) -> Option<usize> {
    (0..WORDS).find(|&position| page.0[position] != word(content, position))
}

impl Race {
    pub fn run(&self) -> anyhow::Result<ExitCode> {
        let reports = Broadcaster::new(REPORT_PORT)?;
        let count = self.size * 256;
        anyhow::ensure!(count > 0, "there are no pages");
        let mut pages = vec![Page([0; WORDS]); count];
        let mut contents: Vec<u32> = (0..count).map(|index| index as u32 % CONTENTS).collect();
        for (page, content) in pages.iter_mut().zip(&contents) {
            fill(page, *content);
        }
        println!("racer {}: {count} pages, {} written each second", self.name, self.rate);

        let (mut written, mut bad, mut owed) = (0_u64, 0_u64, 0.0);
        let mut seed = mix(self.name.bytes().fold(0, |sum, byte| sum * 31 + u64::from(byte)));
        let mut slice_begin = Instant::now();
        let per_slice = self.rate as f64 * SLICE.as_secs_f64();
        let mut reported = Instant::now();
        let mut printed = Instant::now();
        for pass in 1_u64.. {
            owed += per_slice;
            while owed >= 1.0 {
                owed -= 1.0;
                seed = mix(seed);
                let index = (seed % count as u64) as usize;
                if let Some(position) = first_wrong_word(&pages[index], contents[index]) {
                    bad += 1;
                    let line = format!(
                        "checker {} BAD racing page {index} content {} word {position}: {:#018x} after {written} writes",
                        self.name, contents[index], pages[index].0[position],
                    );
                    println!("{line}");
                    reports.send(&line);
                }
                contents[index] = (contents[index] + 1) % CONTENTS;
                fill(&mut pages[index], contents[index]);
                written += 1;
            }
            if reported.elapsed() > Duration::from_secs(1) {
                reported = Instant::now();
                let verdict = if bad == 0 { "ok" } else { "BAD" };
                let line = format!(
                    "checker {} {verdict} pass {pass} written {written} bad {bad}",
                    self.name
                );
                reports.send(&line);
                if printed.elapsed() > Duration::from_secs(10) {
                    printed = Instant::now();
                    println!("racer {verdict} ({written} writes, {bad} bad)");
                }
            }
            slice_begin = (slice_begin + SLICE).max(Instant::now());
            std::thread::sleep(slice_begin.saturating_duration_since(Instant::now()));
        }
        unreachable!("the passes never end")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_page_of_another_content_is_found() {
        let mut page = Page([0; WORDS]);
        assert_eq!(first_wrong_word(&page, 0), None);
        fill(&mut page, 3);
        assert_eq!(first_wrong_word(&page, 3), None);
        assert!(first_wrong_word(&page, 4).is_some());
        page.0[511] ^= 1;
        assert_eq!(first_wrong_word(&page, 3), Some(511));
    }
}
