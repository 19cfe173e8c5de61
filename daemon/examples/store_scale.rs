//! How the store does with many contents: memory, lookups, puts, reads.
//!
//! `cargo run --release -p xenfoldd --example store_scale -- FOLDER [CONTENTS] [--trusted]`
//!
//! CONTENTS (default 10,000,000) pages of 4096 bytes are put into FOLDER, of which only the first bytes differ; it
//! takes that much disk. `--trusted` leaves out the hashing at put.
use std::hint::black_box;
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::{Duration, Instant};

use xenfold::page::{ContentId, ContentKey, PAGE_SIZE, Pfn};
use xenfoldd::store::{Image, Store};

const BATCH: u64 = 1024;

fn page(number: u64) -> [u8; PAGE_SIZE] {
    let mut page = [0x5a; PAGE_SIZE];
    page[..8].copy_from_slice(&number.to_le_bytes());
    page
}

fn rate(what: &str, contents: u64, time: Duration) {
    let per_s = contents as f64 / time.as_secs_f64();
    println!(
        "{what:<34} {per_s:>12.0} contents/s  {:>7.3} GB/s of pages",
        per_s * 4096.0 / 1e9
    );
}

fn run(folder: PathBuf, contents: u64, trusted: bool) -> Result<(), Box<dyn std::error::Error>> {
    let key = ContentKey::new([9; 32]);
    let limit_bytes = contents * 4096 * 5 / 4 + (256 << 20);
    let store = Store::open(&folder, limit_bytes)?;
    let group = store.group("scale", &key)?;
    let (mut ids, mut putting, mut hashing) = (Vec::new(), Duration::ZERO, Duration::ZERO);
    for first in (0..contents).step_by(BATCH as usize) {
        let pages: Vec<_> = (first..contents.min(first + BATCH)).map(page).collect();
        let begin = Instant::now();
        let batch: Vec<(ContentId, &[u8])> = pages.iter().map(|page| (key.id(page), &page[..])).collect();
        hashing += begin.elapsed();
        let begin = Instant::now();
        if trusted {
            group.put_trusted(&batch)?;
        } else {
            group.put(&batch)?;
        }
        putting += begin.elapsed();
        ids.extend(batch.iter().map(|(id, _)| *id));
    }
    rate("hashing alone", contents, hashing);
    rate(
        if trusted { "put, trusted" } else { "put, hashed again" },
        contents,
        putting,
    );

    // The order of a guest that was shuffled: a step that shares no factor with the number.
    let step = (contents * 618 / 1000) | 1;
    let shuffled: Vec<ContentId> = (0..contents).map(|n| ids[(n * step % contents) as usize]).collect();
    for (what, ids) in [("wanted, held, in order", &ids), ("wanted, held, shuffled", &shuffled)] {
        let begin = Instant::now();
        let wanted: usize = ids
            .chunks(BATCH as usize)
            .map(|ids| black_box(group.wanted(ids)).iter().filter(|wanted| **wanted).count())
            .sum();
        rate(what, contents, begin.elapsed());
        assert_eq!(wanted, 0);
    }
    let absent: Vec<ContentId> = (0..contents.min(1 << 20)).map(|n| key.id(&n.to_le_bytes())).collect();
    let begin = Instant::now();
    for ids in absent.chunks(BATCH as usize) {
        assert!(group.wanted(ids).into_iter().all(|wanted| wanted));
    }
    rate("wanted, not held", absent.len() as u64, begin.elapsed());

    let some = contents.min(500_000) as usize;
    for (what, ids) in [("read, in order", &ids), ("read, shuffled", &shuffled)] {
        // The second time the pages are in the page cache.
        for _ in 0..2 {
            let begin = Instant::now();
            for ids in ids[..some].chunks(BATCH as usize) {
                assert!(black_box(group.read(ids)).iter().all(Option::is_some));
            }
            rate(what, some as u64, begin.elapsed());
        }
    }
    let image = Image {
        guest: "scale".into(),
        saved_unix_s: 1,
        template: false,
        pages: (0..).filter_map(Pfn::new).zip(shuffled).collect(),
    };
    let begin = Instant::now();
    group.save_image(&image)?;
    rate("save_image", contents, begin.elapsed());
    let begin = Instant::now();
    assert_eq!(
        group.image("scale")?.map(|image| image.pages.len()),
        Some(contents as usize)
    );
    rate("image", contents, begin.elapsed());

    let stats = store.stats();
    println!(
        "table in memory                    {:>12.1} bytes/content",
        stats.table_bytes as f64 / contents as f64
    );
    let index_bytes: u64 = stats
        .groups
        .iter()
        .map(|group| group.bytes - group.contents * 4096)
        .sum();
    println!(
        "index with one image on the disk   {:>12.1} bytes/content",
        index_bytes as f64 / contents as f64
    );
    drop((group, store));
    let begin = Instant::now();
    let store = Store::open(&folder, limit_bytes)?;
    rate("open", contents, begin.elapsed());
    assert_eq!(
        store.stats().groups.iter().map(|group| group.contents).sum::<u64>(),
        contents
    );
    // Half of the room: the image goes, then half of the contents.
    drop(store);
    let begin = Instant::now();
    let store = Store::open(&folder, contents * 4096 / 2 + (64 << 20))?;
    let left: u64 = store.stats().groups.iter().map(|group| group.contents).sum();
    rate("evicted at open", contents - left, begin.elapsed());
    Ok(())
}

fn main() -> ExitCode {
    let mut arguments: Vec<String> = std::env::args().skip(1).collect();
    let trusted = arguments.iter().any(|argument| argument == "--trusted");
    arguments.retain(|argument| argument != "--trusted");
    let contents = match arguments.get(1).map(|number| number.parse()) {
        None => 10_000_000,
        Some(Ok(contents)) if contents > 0 => contents,
        Some(_) => return usage(),
    };
    let Some(folder) = arguments.first() else {
        return usage();
    };
    match run(folder.into(), contents, trusted) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("store_scale: {error}");
            ExitCode::FAILURE
        }
    }
}

fn usage() -> ExitCode {
    eprintln!("usage: store_scale FOLDER [CONTENTS] [--trusted]");
    ExitCode::from(64)
}
