//! Readers, writers, images, gc and verification at once: no page is wrong, nothing is counted as damaged.
use std::sync::atomic::{AtomicBool, AtomicU64};

use super::*;

#[test]
fn all_at_once() {
    let (folder, store) = store(12 * MIB);
    let groups = [store.group("a", &key(1)).unwrap(), store.group("b", &key(1)).unwrap()];
    let (stop, read) = (AtomicBool::new(false), AtomicU64::new(0));
    std::thread::scope(|scope| {
        for group in &groups {
            for start in 0..2u64 {
                let (stop, read) = (&stop, &read);
                scope.spawn(move || {
                    let mut from = start * 700;
                    while !stop.load(Ordering::Relaxed) {
                        from = (from + 37) % 3000;
                        read.fetch_add(read_right(group, from..from + 64) as u64, Ordering::Relaxed);
                    }
                });
            }
        }
        scope.spawn(|| {
            while !stop.load(Ordering::Relaxed) {
                store.gc().unwrap();
                assert_eq!(store.verify().unwrap().damaged, 0);
                assert!(store.stats().used_bytes <= 12 * MIB);
            }
        });
        let writers = groups.each_ref().map(|group| {
            scope.spawn(move || {
                for round in 0..120u64 {
                    let first = round * 53 % 3000;
                    put(group, first..first + 128).unwrap();
                    if round % 8 == 0 {
                        let saved = group.save_image(&image(&format!("g{}", round % 3), round, first..first + 128));
                        assert!(matches!(saved, Ok(()) | Err(StoreError::Full { .. })), "{saved:?}");
                    }
                }
            })
        });
        writers.into_iter().for_each(|writer| writer.join().unwrap());
        stop.store(true, Ordering::Relaxed);
    });
    assert!(read.load(Ordering::Relaxed) > 0);
    assert_eq!(damaged(&store), 0);
    assert!(allocated(folder.path()) <= 12 * MIB);
    drop(groups);
    drop(store);
    let store = open(&folder.path().join("store"), 12 * MIB);
    assert_eq!(damaged(&store), 0);
    let stats = store.stats();
    assert_eq!(
        stats.used_bytes,
        stats.groups.iter().map(|group| group.bytes).sum::<u64>()
    );
}
