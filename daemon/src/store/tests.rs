//! The store against a naive model, under damage, and with many threads.
mod damage;
mod model;
mod threads;

use std::path::Path;

use tempfile::TempDir;
use xenfold::page::{ContentId, ContentKey, PAGE_SIZE, Pfn};

use super::*;

/// Small packs, so that tests have many.
const TEST_PACK_SLOTS: u32 = 64;

const MIB: u64 = 1 << 20;

fn key(byte: u8) -> ContentKey {
    ContentKey::new([byte; 32])
}

fn open(folder: &Path, limit_bytes: u64) -> Store {
    // Another test's child process has a copy of the lock between its fork and its exec.
    for _ in 0..200 {
        match Store::open_with(folder, limit_bytes, TEST_PACK_SLOTS) {
            Err(StoreError::InUse(_)) => std::thread::sleep(std::time::Duration::from_millis(10)),
            opened => return opened.unwrap(),
        }
    }
    panic!("{} stays locked", folder.display());
}

fn store(limit_bytes: u64) -> (TempDir, Store) {
    let folder = tempfile::tempdir().unwrap();
    let store = open(&folder.path().join("store"), limit_bytes);
    (folder, store)
}

fn page(number: u64) -> Vec<u8> {
    let mut page = vec![0xa5; PAGE_SIZE];
    page[..8].copy_from_slice(&number.to_le_bytes());
    page
}

fn id(number: u64) -> ContentId {
    key(1).id(&page(number))
}

fn ids(numbers: impl IntoIterator<Item = u64>) -> Vec<ContentId> {
    numbers.into_iter().map(id).collect()
}

fn put(group: &Group, numbers: impl IntoIterator<Item = u64>) -> Result<usize, StoreError> {
    let pages: Vec<(ContentId, Vec<u8>)> = numbers.into_iter().map(|n| (id(n), page(n))).collect();
    let pages: Vec<(ContentId, &[u8])> = pages.iter().map(|(id, page)| (*id, &page[..])).collect();
    group.put(&pages)
}

fn image(guest: &str, saved_unix_s: u64, numbers: impl IntoIterator<Item = u64>) -> Image {
    Image {
        guest: guest.into(),
        saved_unix_s,
        template: false,
        pages: (0..).map(|n| Pfn::new(n).unwrap()).zip(ids(numbers)).collect(),
    }
}

/// Reads all of them; every page that comes is the right one. Returns how many came.
fn read_right(group: &Group, numbers: impl IntoIterator<Item = u64>) -> usize {
    let numbers: Vec<u64> = numbers.into_iter().collect();
    let pages = group.read(&ids(numbers.iter().copied()));
    assert_eq!(pages.len(), numbers.len());
    let came = numbers.iter().zip(&pages).filter(|(number, read)| match read {
        Some(read) => {
            assert_eq!(read[..], page(**number)[..]);
            true
        }
        None => false,
    });
    came.count()
}

/// Bytes that the folder's files really take.
fn allocated(folder: &Path) -> u64 {
    use std::os::unix::fs::MetadataExt;
    let entries = std::fs::read_dir(folder).unwrap().flatten();
    let bytes = entries.map(|entry| match entry.metadata() {
        Ok(meta) if meta.is_dir() => allocated(&entry.path()),
        Ok(meta) => meta.blocks() * 512,
        Err(_) => 0,
    });
    bytes.sum()
}

fn damaged(store: &Store) -> u64 {
    store.stats().groups.iter().map(|group| group.damaged).sum()
}

#[test]
fn contents_come_back() {
    let (_folder, store) = store(64 * MIB);
    let group = store.group("a", &key(1)).unwrap();
    assert_eq!(put(&group, (0..300).chain(100..200)).unwrap(), 300);
    assert_eq!(put(&group, 290..310).unwrap(), 10);
    assert_eq!(group.wanted(&ids([0, 309, 310])), [false, false, true]);
    assert_eq!(read_right(&group, (0..400).rev()), 310);
    assert_eq!(group.lookup_keys().len(), 310);
    assert_eq!(damaged(&store), 0);
    let stats = serde_json::to_value(store.stats()).unwrap();
    assert_eq!(stats["groups"][0]["contents"], 310);
}

#[test]
fn many_contents_are_flushed_aside() {
    let folder = tempfile::tempdir().unwrap();
    let store = Store::open(folder.path(), 1 << 30).unwrap();
    let group = store.group("a", &key(1)).unwrap();
    let page = page(0);
    // Ids that are not their pages' own will do: nothing is read back.
    for first in (0..70_000u32).step_by(1000) {
        let ids = (first..first + 1000).map(|n| key(2).id(&n.to_le_bytes()));
        let pages: Vec<(ContentId, &[u8])> = ids.map(|id| (id, &page[..])).collect();
        assert_eq!(group.put_trusted(&pages).unwrap(), 1000);
    }
    store.shared.wait_for_flush();
    let empty_index_bytes = 100 << 10;
    assert!(group.core.index_bytes() > empty_index_bytes + 65_536 * 16);
    drop((group, store));
    let store = Store::open(folder.path(), 1 << 30).unwrap();
    assert_eq!(store.stats().groups[0].contents, 70_000);
}

#[test]
fn a_wrong_id_is_refused() {
    let (_folder, store) = store(64 * MIB);
    let group = store.group("a", &key(1)).unwrap();
    let (right, wrong) = (page(1), page(2));
    let refused = group.put(&[(id(1), &right), (id(3), &wrong)]);
    assert!(matches!(refused, Err(StoreError::WrongId(wrong)) if wrong == id(3)));
    assert!(matches!(
        group.put(&[(id(1), &right[..9])]),
        Err(StoreError::PageSize { bytes: 9 })
    ));
    assert!(!group.holds(&id(1)));
    // A caller that is trusted and wrong: found out when it is read.
    assert_eq!(group.put_trusted(&[(id(3), &wrong)]).unwrap(), 1);
    assert_eq!(group.read(&[id(3)]), [None]);
    assert_eq!((group.holds(&id(3)), damaged(&store)), (false, 1));
}

#[test]
fn names_are_checked() {
    let (_folder, store) = store(64 * MIB);
    for name in ["", ".", "..", ".lock", "a/b", "ä", &"x".repeat(65)] {
        assert!(
            matches!(store.group(name, &key(1)), Err(StoreError::Name { .. })),
            "{name}"
        );
    }
    let group = store.group(&"x".repeat(64), &key(1)).unwrap();
    assert!(matches!(
        group.save_image(&image("a/b", 1, [])),
        Err(StoreError::Name { .. })
    ));
}

#[test]
fn it_opens_again_with_what_was_there() {
    let folder = tempfile::tempdir().unwrap();
    {
        let store = open(folder.path(), 64 * MIB);
        let group = store.group("a", &key(1)).unwrap();
        put(&group, 0..300).unwrap();
        group.save_image(&image("guest", 7, (0..100).rev())).unwrap();
        group.add_template("base", &ids(50..60), 8).unwrap();
        assert!(matches!(Store::open(folder.path(), 1), Err(StoreError::InUse(_))));
    }
    let store = open(folder.path(), 64 * MIB);
    assert_eq!(store.stats().groups[0].contents, 300);
    assert!(!store.stats().groups[0].open);
    let group = store.group("a", &key(1)).unwrap();
    assert_eq!(read_right(&group, 0..300), 300);
    assert_eq!(
        group.image("guest").unwrap().unwrap(),
        image("guest", 7, (0..100).rev())
    );
    assert!(group.image("base").unwrap().unwrap().template);
    assert_eq!(group.image("other").unwrap(), None);
    assert_eq!(group.images().unwrap().len(), 2);
    let before = allocated(folder.path());
    assert_eq!(store.gc().unwrap().contents, 200);
    assert!(before - allocated(folder.path()) >= 190 * 4096);
    assert!(group.remove_image("guest").unwrap() && !group.remove_image("guest").unwrap());
    assert_eq!(store.gc().unwrap().contents, 90);
    assert_eq!(read_right(&group, 0..300), 10);
    assert!(group.remove_template("base").unwrap());
    store.gc().unwrap();
    assert_eq!(store.stats().groups[0].contents, 0);
    assert!(!folder.path().join("a/pack-00000").exists());
}

#[test]
fn a_new_key_drops_what_was_there() {
    let folder = tempfile::tempdir().unwrap();
    {
        let store = open(folder.path(), 64 * MIB);
        let old = store.group("a", &key(1)).unwrap();
        put(&old, 0..10).unwrap();
        let new = store.group("a", &key(2)).unwrap();
        assert_eq!(new.wanted(&ids(0..10)), [true; 10]);
        assert_eq!(read_right(&old, 0..10), 0);
        assert!(matches!(put(&old, 20..30), Err(StoreError::Closed(_))));
        store
            .group("a", &key(1))
            .map(|group| put(&group, 0..10))
            .unwrap()
            .unwrap();
    }
    let store = open(folder.path(), 64 * MIB);
    assert_eq!(store.stats().groups[0].contents, 10);
    store.group("a", &key(3)).unwrap();
    assert_eq!(store.stats().groups[0].contents, 0);
}

#[test]
fn groups_never_see_each_other() {
    let (folder, store) = store(64 * MIB);
    let (a, b) = (store.group("a", &key(1)).unwrap(), store.group("b", &key(1)).unwrap());
    put(&a, 0..100).unwrap();
    assert_eq!(b.wanted(&ids(0..100)), [true; 100]);
    assert_eq!((read_right(&b, 0..100), b.lookup_keys().len()), (0, 0));
    a.save_image(&image("guest", 1, 0..10)).unwrap();
    assert_eq!((b.image("guest").unwrap(), b.images().unwrap()), (None, vec![]));
    put(&b, 0..5).unwrap();
    store.remove_group("a").unwrap();
    assert_eq!((read_right(&a, 0..100), read_right(&b, 0..100)), (0, 5));
    assert!(!folder.path().join("store/a").exists());
    store.remove_group("a").unwrap();
}

#[test]
fn what_no_image_names_goes_first_then_the_oldest_image() {
    let (folder, store) = store(16 * MIB);
    let (a, b) = (store.group("a", &key(1)).unwrap(), store.group("b", &key(1)).unwrap());
    put(&a, 0..400).unwrap();
    a.add_template("base", &ids(0..100), 1).unwrap();
    a.save_image(&image("old", 10, 50..250)).unwrap();
    a.save_image(&image("new", 20, 200..400)).unwrap();
    // Unnamed contents of both groups make room for one another.
    for round in 0..20 {
        assert_eq!(put(&b, (0..200).map(|n| 1000 + round * 200 + n)).unwrap(), 200);
        assert!(store.stats().used_bytes <= 16 * MIB && allocated(folder.path()) <= 16 * MIB);
    }
    assert_eq!((read_right(&a, 0..400), a.images().unwrap().len()), (400, 3));
    // What is held for an image to come makes images go, the oldest first, and templates never.
    let hold = b.hold_new();
    let mut next = 100_000;
    while a.images().unwrap().len() == 3 {
        put(&b, next..next + 20).unwrap();
        next += 20;
    }
    let names: Vec<String> = a.images().unwrap().into_iter().map(|image| image.guest).collect();
    assert_eq!(names, ["new", "base"]);
    assert_eq!(read_right(&a, (0..100).chain(200..400)), 300);
    for round in 0..30 {
        put(&b, (0..200).map(|n| 200_000 + round * 200 + n)).unwrap();
    }
    drop(hold);
    assert_eq!((a.images().unwrap().len(), read_right(&a, 0..100)), (1, 100));
    assert!(allocated(folder.path()) <= 16 * MIB);
    assert_eq!(damaged(&store), 0);
}

#[test]
fn what_several_guests_had_becomes_a_template() {
    let (_folder, store) = store(16 * MIB);
    let (group, other) = (store.group("a", &key(1)).unwrap(), store.group("b", &key(1)).unwrap());
    let common = || -> Vec<ContentId> {
        let template = group.images().unwrap().into_iter().find(|image| image.template);
        assert!(template.is_none_or(|image| image.guest == COMMON));
        let image = group.image(COMMON).unwrap();
        let mut ids: Vec<ContentId> = image
            .into_iter()
            .flat_map(|image| image.pages)
            .map(|(_, id)| id)
            .collect();
        ids.sort_unstable_by_key(|id| id.0);
        ids
    };
    let sorted = |numbers: std::ops::Range<u64>| {
        let mut ids = ids(numbers);
        ids.sort_unstable_by_key(|id| id.0);
        ids
    };
    put(&group, 0..500).unwrap();
    put(&other, 0..500).unwrap();
    other.save_image(&image("three", 5, 0..500)).unwrap();
    group.save_image(&image("one", 10, 0..300)).unwrap();
    group.renew_common(10).unwrap();
    assert_eq!(common(), []);
    group.save_image(&image("two", 20, 200..400)).unwrap();
    group.renew_common(20).unwrap();
    assert_eq!(common(), sorted(200..300));
    // Being in the template does not count, nor does the same guest twice.
    group.save_image(&image("two", 30, 250..400)).unwrap();
    group.renew_common(30).unwrap();
    assert_eq!(common(), sorted(250..300));
    group.save_image(&image("two", 40, 250..400)).unwrap();
    group.renew_common(40).unwrap();
    assert_eq!(common(), sorted(250..300));
    // When room is short it outlives the images, and what is held for an image to come.
    let hold = other.hold_new();
    let mut next = 100_000;
    while group.images().unwrap().len() > 1 {
        put(&other, next..next + 100).unwrap();
        next += 100;
    }
    assert_eq!((common(), read_right(&group, 250..300)), (sorted(250..300), 50));
    drop(hold);
}

#[test]
fn templates_may_fill_it_and_then_nothing_more_fits() {
    let (folder, store) = store(8 * MIB);
    let group = store.group("a", &key(1)).unwrap();
    let mut held = 0;
    for first in (0..2500).step_by(100) {
        held += put(&group, first..first + 100).unwrap();
        let held: Vec<u64> = (0..first + 100).filter(|n| group.holds(&id(*n))).collect();
        if let Err(error) = group.add_template("all", &ids(held), 1) {
            assert!(matches!(error, StoreError::Full { .. }), "{error}");
        }
    }
    assert!(held >= 1000, "{held}");
    assert!(allocated(folder.path()) <= 8 * MIB);
    // Only what the template does not name makes room.
    let named = group.image("all").unwrap().unwrap().pages;
    assert!(named.len() + put(&group, 10_000..10_500).unwrap() <= 2048);
    assert!(named.iter().all(|(_, id)| group.holds(id)));
    // A lower bound the next time: templates stay, and nothing is put.
    let contents = named.len() as u64;
    drop((group, store));
    let store = open(&folder.path().join("store"), 4 * MIB);
    let group = store.group("a", &key(1)).unwrap();
    assert_eq!(store.stats().groups[0].contents, contents);
    assert_eq!(put(&group, 10_000..10_100).unwrap(), 0);
}
