//! The oracle of `scripts/lab siblings`: how many pages of a migration's stream the destination could have had without
//! their bytes. `held_pages STREAM [SAVE…]`: STREAM is what xl wrote to the migration's pipe, each SAVE the memory of a
//! guest on the destination (`xl save`). All pages of all of them are compared by a hash of 256 bits. Prints JSON:
//! pages that are not zero, and of them `elsewhere` (in one of the saves) and `before` (not there, but at that moment in
//! a page of this guest that had arrived).
use std::collections::{HashMap, HashSet};
use std::fs::File;
use std::io::BufReader;

use xenfold::page::Pfn;
use xenfold::stream::{Reader, for_each_page};

type Failure = Box<dyn std::error::Error>;
type Hash = [u8; 32];

fn main() -> Result<(), Failure> {
    let mut files = std::env::args().skip(1);
    let stream = files.next().ok_or("usage: held_pages STREAM [SAVE…]")?;
    let mut elsewhere: HashSet<Hash> = HashSet::new();
    for save in files {
        each_page(&save, |_, hash| {
            elsewhere.insert(hash);
        })?;
    }
    let mut arrived: HashMap<Pfn, Hash> = HashMap::new();
    let mut holders: HashMap<Hash, u32> = HashMap::new();
    let [mut pages, mut held, mut before] = [0_u64; 3];
    each_page(&stream, |pfn, hash| {
        pages += 1;
        if elsewhere.contains(&hash) {
            held += 1;
        } else if holders.get(&hash).is_some_and(|holders| *holders > 0) {
            before += 1;
        }
        *holders.entry(hash).or_default() += 1;
        if let Some(holders) = arrived.insert(pfn, hash).and_then(|old| holders.get_mut(&old)) {
            *holders -= 1;
        }
    })?;
    println!(r#"{{"pages": {pages}, "elsewhere": {held}, "before": {before}}}"#);
    Ok(())
}

/// Number and hash of each page that is not zero.
fn each_page(file: &str, mut page: impl FnMut(Pfn, Hash)) -> Result<(), Failure> {
    let mut stream = Reader::new(BufReader::with_capacity(1 << 20, File::open(file)?)).pass_unknown(true);
    for_each_page(&mut stream, |pfn, _, bytes| {
        page(pfn, *blake3::hash(bytes).as_bytes());
        Ok(())
    })
}
