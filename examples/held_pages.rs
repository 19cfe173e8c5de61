//! The oracle of `scripts/lab siblings`: how many pages of a migration's stream the destination could have had without
//! their bytes. `held_pages STREAM [SAVE…]`: STREAM is what xl wrote to the migration's pipe, each SAVE the memory of a
//! guest on the destination (`xl save`). All pages of all of them are compared by a hash of 256 bits. Prints JSON:
//! pages that are not zero, and of them `elsewhere` (in one of the saves) and `before` (not there, but earlier in the
//! stream).
use std::collections::HashSet;
use std::fs::File;
use std::io::BufReader;

use xenfold::page::{PAGE_SIZE, is_zero};
use xenfold::stream::{Event, Layer, PageData, PageType, Reader, libxc};

type Failure = Box<dyn std::error::Error>;
type Hash = [u8; 32];

/// The largest PAGE_DATA body that Xen writes: 1024 pages.
const MAX_BODY: usize = 8 + 1024 * (8 + PAGE_SIZE);

fn main() -> Result<(), Failure> {
    let mut files = std::env::args().skip(1);
    let stream = files.next().ok_or("usage: held_pages STREAM [SAVE…]")?;
    let mut elsewhere: HashSet<Hash> = HashSet::new();
    for save in files {
        each_page(&save, |hash| {
            elsewhere.insert(hash);
        })?;
    }
    let mut seen: HashSet<Hash> = HashSet::new();
    let [mut pages, mut held, mut before] = [0_u64; 3];
    each_page(&stream, |hash| {
        pages += 1;
        let again = !seen.insert(hash);
        if elsewhere.contains(&hash) {
            held += 1;
        } else if again {
            before += 1;
        }
    })?;
    println!(r#"{{"pages": {pages}, "elsewhere": {held}, "before": {before}}}"#);
    Ok(())
}

/// The hash of each page that is not zero.
fn each_page(file: &str, mut page: impl FnMut(Hash)) -> Result<(), Failure> {
    let mut stream = Reader::new(BufReader::with_capacity(1 << 20, File::open(file)?)).pass_unknown(true);
    let (mut body, mut part) = (Vec::new(), vec![0; 1 << 20]);
    loop {
        let header = match stream.next()? {
            Event::End => return Ok(()),
            Event::Record(header) if header.is(Layer::Libxc, libxc::PAGE_DATA) => header,
            _ => {
                while stream.body_left() > 0 {
                    let length = stream.body_left().min(part.len() as u64) as usize;
                    stream.read_body_part(&mut part[..length])?;
                }
                continue;
            }
        };
        body.clear();
        stream.read_body(&mut body, MAX_BODY)?;
        body.truncate(header.length as usize);
        let data = PageData::parse(&body, header.body_offset())?;
        let entries = data.entries().filter(|entry| entry.has_data);
        for (entry, bytes) in entries.zip(data.pages().chunks_exact(PAGE_SIZE)) {
            if entry.page_type == PageType::NoTab && !is_zero(bytes) {
                page(*blake3::hash(bytes).as_bytes());
            }
        }
    }
}
