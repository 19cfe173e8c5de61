//! The index on hosts that are made up.
use std::path::Path;

use tempfile::TempDir;
use xen_sys::ShutdownReason;
use xenfold::config;
use xenfold::control::Offer;
use xenfold::page::ContentKey;

use super::host::Seen;
use super::sim::{Sim, SimGuest, domid, guest, page, uuid};
use super::*;
use crate::keys::Keys;

const SECOND: Duration = Duration::from_secs(1);
const GROUPS: &str = "[group]\nweb = [\"web-*\"]\nmail = [\"mail-*\"]\nkeyless = [\"new-*\"]";

/// An idle host with two groups that have keys.
struct Lab {
    folder: TempDir,
    sim: Sim,
    members: Arc<Members>,
    index: Arc<Index>,
    scanner: Scanner,
    now: Duration,
}

impl Lab {
    fn new(guests: Vec<SimGuest>) -> Lab {
        Lab::with(guests, 100_000, 1 << 20, "")
    }

    fn with(guests: Vec<SimGuest>, rate_pages_per_s: u32, limit_bytes: u64, more: &str) -> Lab {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("xenfold.conf");
        std::fs::write(&path, format!("{more}\n{GROUPS}")).unwrap();
        let config = config::read(&path).unwrap();
        let keys = folder.path().join("keys");
        let members = Arc::new(Members::new(config.group, Keys::new(keys)));
        let sim = Sim::default();
        sim.0.lock().guests = guests;
        let settings = Settings {
            limit_bytes,
            rate_pages_per_s,
            processor_percent: 0,
            off: config.index_off,
            sharing: sharing::Settings::default(),
        };
        let index = Index::new(Box::new(sim.clone()), members.clone(), settings);
        let mut lab = Lab {
            folder,
            sim,
            members,
            scanner: Scanner::new(index.clone()),
            index,
            now: Duration::ZERO,
        };
        for group in ["web-x", "mail-x"] {
            lab.asking(0xff, group);
        }
        lab.run(2 * SECOND);
        lab
    }

    /// Lets the scanner do as it is told for so long, on processors that are idle.
    fn run(&mut self, time: Duration) {
        let end = self.now + time;
        while self.now < end {
            self.sim.0.lock().idle = vec![self.now + SECOND; 2];
            self.now += self.scanner.step(self.now);
        }
    }

    /// Until all guests were gone through once more.
    fn round(&mut self) {
        let rounds = self.stats().rounds;
        while self.stats().rounds == rounds {
            self.run(SECOND);
        }
    }

    fn stats(&self) -> IndexStats {
        self.index.stats_at(self.now)
    }

    fn asking(&mut self, asker: u8, name: &str) -> Membership {
        self.members.find(&uuid(asker), name, None).unwrap()
    }

    /// Which of these pages are found for a guest that arrives in the group of this name.
    fn found(&mut self, name: &str, pages: &[u64]) -> Vec<bool> {
        let asking = self.asking(0xee, name);
        let ids: Vec<ContentId> = pages.iter().map(|n| asking.key.id(&page(*n))).collect();
        let found = self.index.read(&asking, &ids);
        let right = found
            .iter()
            .zip(pages)
            .all(|(found, n)| found.as_ref().is_none_or(|bytes| **bytes == page(*n)));
        assert!(right, "another page than was asked for");
        found.iter().map(Option::is_some).collect()
    }

    fn change(&self, number: u32, change: impl FnOnce(&mut SimGuest)) {
        let mut world = self.sim.0.lock();
        change(
            world
                .guests
                .iter_mut()
                .find(|guest| guest.seen.info.domid == domid(number))
                .unwrap(),
        );
    }

    fn left_out(&self, number: u32) -> Option<String> {
        let stats = self.stats();
        let guest = stats.guests.iter().find(|guest| guest.domid == number).unwrap();
        guest.left_out.clone()
    }
}

#[test]
fn what_guests_of_the_group_have_is_found() {
    let zero = [0; PAGE_SIZE];
    let pages = [page(1), zero, page(2), page(1), page(3)];
    let mut lab = Lab::new(vec![
        guest(3, 1, "web-1", pages),
        guest(4, 2, "web-2", [page(3), page(4)]),
    ]);
    lab.round();
    assert_eq!(lab.found("web-9", &[1, 2, 3, 4, 5]), [true, true, true, true, false]);
    let asking = lab.asking(0xee, "web-9");
    let mut keys = lab.index.lookup_keys(&asking);
    let mut expected: Vec<u64> = [1, 2, 3, 4].map(|n| asking.key.id(&page(n)).lookup_key()).into();
    keys.sort_unstable();
    expected.sort_unstable();
    assert_eq!(keys, expected);
    let stats = lab.stats();
    assert_eq!((stats.pages, stats.answered, stats.stale, stats.full), (4, 4, 0, false));
    let of: Vec<(&str, u64)> = stats
        .guests
        .iter()
        .map(|guest| (guest.name.as_str(), guest.pages))
        .collect();
    assert_eq!(of, [("web-1", 3), ("web-2", 1)]);
    assert!(stats.last_round_age_s.is_some() && stats.memory_bytes > 0);
    // A zero page is never asked for, and would not be found.
    let id = asking.key.id(&zero);
    assert_eq!(lab.index.read(&asking, &[id]), [None]);
}

#[test]
fn a_guest_is_no_answer_to_itself() {
    let mut lab = Lab::new(vec![guest(3, 1, "web-1", [page(1)]), guest(4, 2, "web-2", [page(2)])]);
    lab.round();
    let own = lab.asking(1, "web-1");
    let ids = [1, 2].map(|n| own.key.id(&page(n)));
    let found = lab.index.read(&own, &ids);
    assert_eq!(found.iter().map(Option::is_some).collect::<Vec<_>>(), [false, true]);
    assert_eq!(lab.index.lookup_keys(&own), [ids[1].lookup_key()]);
}

#[test]
fn what_has_changed_is_stale_once_and_found_again_later() {
    let mut lab = Lab::new(vec![guest(3, 1, "web-1", [page(1), page(2)])]);
    lab.round();
    lab.change(3, |guest| {
        guest.frames.insert(0, page(7));
        guest.frames.remove(&1);
    });
    assert_eq!(lab.found("web-9", &[1, 2]), [false, false]);
    assert_eq!((lab.stats().stale, lab.stats().pages), (2, 0));
    assert_eq!(lab.found("web-9", &[1, 2, 7]), [false, false, false]);
    assert_eq!(lab.stats().stale, 2, "forgotten");
    lab.round();
    assert_eq!(lab.found("web-9", &[7]), [true]);

    // Without anybody asking, a round forgets it; a second copy takes the place of the first.
    lab.change(3, |guest| {
        guest.frames.insert(5, page(7));
    });
    lab.round();
    lab.change(3, |guest| {
        guest.frames.insert(0, page(8));
    });
    lab.round();
    assert_eq!(lab.found("web-9", &[7, 8]), [true, true]);
    lab.change(3, |guest| {
        guest.frames.insert(5, page(9));
    });
    lab.round();
    assert_eq!((lab.stats().pages, lab.stats().stale), (2, 2));
}

#[test]
fn pages_that_change_are_told() {
    let mut lab = Lab::new(vec![guest(3, 1, "web-1", [page(1), [0; PAGE_SIZE], page(2), page(1)])]);
    assert!(lab.index.changing(&uuid(1), 10).is_none(), "seen once only");
    lab.change(3, |guest| {
        guest.frames.insert(1, page(7));
        guest.frames.insert(2, [0; PAGE_SIZE]);
    });
    lab.round();
    let changing = |lab: &Lab, bound| {
        let pages = lab.index.changing(&uuid(1).to_uppercase(), bound).unwrap();
        pages.iter().map(Pfn::get).collect::<Vec<_>>()
    };
    assert_eq!((changing(&lab, 10), changing(&lab, 2)), (vec![1, 2], vec![1]));
    assert!(lab.index.changing(&uuid(2), 10).is_none());
    lab.round();
    assert_eq!(changing(&lab, 10), [0; 0]);
    let visits: Vec<u32> = lab.stats().guests.iter().map(|guest| guest.visits).collect();
    assert_eq!(visits, [3]);
}

#[test]
fn groups_do_not_mix() {
    let mut lab = Lab::new(vec![
        guest(3, 1, "web-1", [page(1), page(2)]),
        guest(4, 2, "mail-1", [page(1), page(3)]),
        guest(5, 3, "alone", [page(4)]),
    ]);
    lab.round();
    assert_eq!(lab.found("web-9", &[1, 2, 3, 4]), [true, true, false, false]);
    assert_eq!(lab.found("mail-9", &[1, 2, 3, 4]), [true, false, true, false]);
    assert_eq!(lab.found("alone", &[1, 2, 3, 4]), [false; 4]);
    // Ids of one group asked for in another, and a name with another key.
    let (web, mail) = (lab.asking(0xee, "web-9"), lab.asking(0xee, "mail-9"));
    assert_eq!(lab.index.read(&web, &[mail.key.id(&page(1))]), [None]);
    let (group, key) = (web.group.clone(), mail.key.clone());
    let forged = Membership { group, key, ..web };
    assert_eq!(lab.index.read(&forged, &[mail.key.id(&page(1))]), [None]);
    assert!(lab.index.lookup_keys(&forged).is_empty());
    assert!(lab.left_out(5).unwrap().contains("no group"));
    assert!(!Path::new(&lab.folder.path().join(format!("keys/guest-{}.key", uuid(3)))).exists());

    // Renamed into the other group: nothing of it is found in the old one, not even before the next look.
    lab.change(3, |guest| guest.seen.name = Some("mail-2".into()));
    assert_eq!(lab.found("web-9", &[1, 2]), [false, false]);
    lab.round();
    assert_eq!(lab.found("mail-9", &[1, 2, 3]), [true; 3]);
}

#[test]
fn a_new_key_begins_anew() {
    let mut lab = Lab::new(vec![guest(3, 1, "web-1", [page(1)])]);
    lab.round();
    let key = ContentKey::new([7; 32]);
    Keys::new(lab.folder.path().join("keys")).set("web", &key).unwrap();
    assert_eq!(lab.found("web-9", &[1]), [false], "the table is another key's");
    lab.run(2 * SECOND);
    lab.round();
    assert_eq!(lab.found("web-9", &[1]), [true]);
    // A group gets its key from the first migration.
    lab.sim.0.lock().guests.push(guest(4, 2, "new-1", [page(2)]));
    lab.run(2 * SECOND);
    assert!(lab.left_out(4).unwrap().contains("first migration"));
    let group = "keyless".to_owned();
    let offer = Offer { group, key };
    lab.members.find(&uuid(9), "new-9", Some(&offer)).unwrap();
    lab.round();
    assert_eq!(lab.found("new-9", &[2]), [true]);
}

#[test]
fn guests_come_and_go() {
    let mut lab = Lab::new(vec![]);
    assert_eq!((lab.stats().rounds, lab.stats().pages), (0, 0));
    lab.sim.0.lock().guests.push(guest(3, 1, "web-1", [page(1)]));
    lab.round();
    assert_eq!(lab.found("web-9", &[1]), [true]);

    // Suspended in its last pass: it does not answer even before the next look; resumed it does again.
    lab.change(3, |guest| guest.seen.info.shutdown = Some(ShutdownReason::Suspend));
    assert_eq!(lab.found("web-9", &[1]), [false]);
    lab.run(2 * SECOND);
    assert_eq!((lab.stats().pages, lab.stats().memory_bytes), (0, 0));
    lab.change(3, |guest| guest.seen.info.shutdown = None);
    lab.round();
    assert_eq!(lab.found("web-9", &[1]), [true]);

    // One that comes during a round is gone through in it.
    lab.change(3, |guest| {
        guest.end = 2_000_000;
        guest.seen.info.total_pages = guest.end;
    });
    let rounds = lab.stats().rounds;
    while lab.scanner.round_began.is_none() {
        lab.run(Duration::from_millis(10));
    }
    lab.sim.0.lock().guests.push(guest(4, 2, "web-2", [page(99)]));
    lab.round();
    assert_eq!(
        (lab.stats().rounds, lab.found("web-9", &[99])),
        (rounds + 1, vec![true])
    );
    lab.sim.0.lock().guests.clear();
    assert_eq!(lab.found("web-9", &[1]), [false]);
    lab.run(2 * SECOND);
    assert_eq!((lab.stats().pages, lab.stats().guests.len()), (0, 0));
}

#[test]
fn a_number_that_is_another_guests_by_now_answers_for_nobody() {
    let mut lab = Lab::new(vec![guest(3, 1, "web-1", [page(1), page(2)])]);
    lab.round();
    // The same content in another group: it must not show.
    lab.sim.0.lock().guests = vec![guest(3, 2, "mail-1", [page(1), page(2)])];
    assert_eq!(lab.found("web-9", &[1, 2]), [false, false]);
    lab.run(2 * SECOND);
    lab.round();
    assert_eq!(lab.found("mail-9", &[1, 2]), [true, true]);
    assert_eq!(lab.found("web-9", &[1, 2]), [false, false]);
    // And just while it is read.
    let other = guest(3, 3, "web-1", [page(1), page(2)]);
    lab.sim.0.lock().meanwhile = Some(Box::new(|guests| *guests = vec![other]));
    assert_eq!(lab.found("mail-9", &[1, 2]), [false, false]);
    // While the scanner reads: with this group's key nothing of the other's is noted.
    lab.run(2 * SECOND);
    lab.round();
    assert_eq!(lab.found("web-9", &[1]), [true]);
    let other = guest(3, 4, "mail-1", [page(5)]);
    lab.sim.0.lock().meanwhile = Some(Box::new(|guests| *guests = vec![other]));
    lab.run(Duration::from_secs(31));
    lab.round();
    assert_eq!(
        (lab.found("mail-9", &[5]), lab.found("web-9", &[5])),
        (vec![true], vec![false])
    );
}

#[test]
fn the_two_ends_of_a_migration_do_not_answer() {
    let mut lab = Lab::new(vec![guest(3, 1, "web-1--incoming", [page(1)])]);
    lab.run(Duration::from_secs(40));
    assert!(lab.left_out(3).unwrap().contains("arrives"));
    assert_eq!((lab.found("web-9", &[1]), lab.stats().pages), (vec![false], 0));
    lab.change(3, |guest| guest.seen.name = Some("web-1".into()));
    lab.round();
    assert_eq!(lab.found("web-9", &[1]), [true]);
    lab.change(3, |guest| guest.seen.name = Some("web-1--migratedaway".into()));
    assert_eq!(lab.found("web-9", &[1]), [false]);
    lab.run(2 * SECOND);
    assert!(lab.left_out(3).unwrap().contains("away"));
    assert_eq!(lab.stats().pages, 0);
}

#[test]
fn memory_that_must_not_be_touched_is_not() {
    type Spoil = fn(&mut Seen);
    let spoils: [(&str, Spoil); 9] = [
        ("PV", |seen| seen.info.hvm = false),
        ("ends", |seen| seen.info.dying = true),
        ("shut down", |seen| seen.info.shutdown = Some(ShutdownReason::Crash)),
        ("no name", |seen| seen.name = None),
        ("not run yet", |seen| seen.info.cpu_time_ns = 0),
        ("elsewhere", |seen| seen.info.paged_pages = 1),
        ("on demand", |seen| seen.on_demand = Some(1)),
        ("on demand", |seen| seen.on_demand = None),
        ("index_off", |seen| seen.name = Some("web-db".into())),
    ];
    let guests = (1..).zip(&spoils).map(|(number, (_, spoil))| {
        let mut guest = guest(number, number as u8, "web-1", [page(1)]);
        spoil(&mut guest.seen);
        guest
    });
    let mut lab = Lab::with(guests.collect(), 1000, 1 << 20, "index_off = [\"*-db\"]");
    lab.run(Duration::from_secs(60));
    for (number, (says, _)) in (1..).zip(&spoils) {
        let reason = lab.left_out(number).unwrap();
        assert!(reason.contains(says), "{reason}");
    }
    assert_eq!(lab.sim.0.lock().copied, 0);
    assert!(guest(1, 1, "web-1", []).seen.readable().is_ok(), "unspoilt");
}

#[test]
fn memory_is_bounded() {
    let mut lab = Lab::with(
        vec![guest(3, 1, "web-1", (1..20_000).map(page))],
        100_000,
        128 << 10,
        "",
    );
    lab.round();
    let stats = lab.stats();
    assert!(stats.full && stats.memory_bytes <= 128 << 10, "{stats:?}");
    assert!(stats.pages > 2000 && stats.pages < 20_000);
    assert_eq!(stats.guests[0].pages, stats.pages);
    // There is room again when the guest needs less.
    lab.change(3, |guest| guest.frames.retain(|pfn, _| *pfn < 1000));
    lab.round();
    lab.round();
    let stats = lab.stats();
    assert!(!stats.full && stats.pages == 1000, "{stats:?}");
    assert!(lab.sim.0.lock().most_at_once <= BATCH_PAGES);
}

#[test]
fn the_rate_is_kept() {
    let mut lab = Lab::with(vec![guest(3, 1, "web-1", (1..50_000).map(page))], 2000, 16 << 20, "");
    let before = lab.sim.0.lock().copied;
    lab.run(10 * SECOND);
    let copied = lab.sim.0.lock().copied - before;
    assert!((19_000..=21_000).contains(&copied), "{copied}");
    assert!(lab.stats().pages_per_s.abs_diff(2000) < 200);
    assert_eq!(lab.stats().idle_percent, Some(100));
}

#[test]
fn a_failing_host_is_outlived() {
    let mut lab = Lab::new(vec![guest(3, 1, "web-1", [page(1)])]);
    lab.round();
    lab.sim.0.lock().failing = true;
    lab.run(Duration::from_secs(40));
    assert_eq!(
        lab.found("web-9", &[1]),
        [true],
        "guests are what they were last known to be"
    );
    lab.sim.0.lock().failing = false;
}

#[test]
fn a_guest_with_frames_far_apart_does_not_hold_up_the_others() {
    let mut far = guest(3, 1, "web-1", [page(1)]);
    far.end = u64::MAX;
    far.seen.info.total_pages = u64::MAX;
    let mut lab = Lab::with(vec![far, guest(4, 2, "web-2", [page(2)])], 1_000_000, 1 << 20, "");
    lab.run(Duration::from_secs(10));
    assert_eq!(lab.stats().rounds, 1);
    assert_eq!(lab.found("web-9", &[1, 2]), [true, true]);
}

#[test]
fn the_hole_behind_all_frames_is_not_walked() {
    let mut pvh = guest(3, 1, "web-1", (0..2000).map(page));
    pvh.end = 1 << 20;
    // Rings and the like, at the end.
    pvh.seen.info.total_pages += 4;
    let mut lab = Lab::with(vec![pvh], 1000, 1 << 20, "");
    lab.run(Duration::from_secs(4));
    assert_eq!((lab.stats().rounds, lab.stats().pages), (1, 2000));
}

/// Ten million contents of two guests: memory, rates, and whether the pace is kept. By hand, its figures are printed:
/// `cargo test --release -p xenfoldd --lib ten_million -- --ignored --nocapture`
#[test]
#[ignore = "takes a minute; for its figures"]
fn ten_million_pages() {
    const RATE: u32 = 250_000;
    const PAGES: [u64; 2] = [6_000_000, 4_000_000];
    let guests = [(3u32, PAGES[0]), (4, PAGES[1])].map(|(number, pages)| {
        let mut guest = guest(number, number as u8, &format!("web-{number}"), []);
        (guest.end, guest.generated, guest.seen.info.total_pages) = (pages, true, pages);
        guest
    });
    let mut lab = Lab::with(guests.into(), RATE, 1 << 30, "");
    let (mut most, mut busy) = (0, Duration::ZERO);
    while lab.stats().rounds == 0 {
        let before = lab.sim.0.lock().copied;
        let begin = Instant::now();
        lab.run(SECOND);
        busy += begin.elapsed();
        most = most.max(lab.sim.0.lock().copied - before);
    }
    let stats = lab.stats();
    let contents = stats.pages as f64;
    assert_eq!(stats.pages, PAGES.iter().sum::<u64>());
    println!("contents                    {contents}");
    println!(
        "memory a content            {:.1} bytes",
        stats.memory_bytes as f64 / contents
    );
    println!(
        "read, hashed, entered       {:.0} a second",
        contents / busy.as_secs_f64()
    );
    println!("the most in a second        {most} at a rate of {RATE}");
    assert!(most <= RATE as usize * 11 / 10);

    let asking = lab.asking(0xee, "web-9");
    let held = |n: u64| sim::generated(domid(3), Pfn::new(n * 3_900_001 % PAGES[0]).unwrap());
    for (what, pages) in [
        (
            "found, read, hashed again",
            (0..200 * 1024).map(held).collect::<Vec<Page>>(),
        ),
        ("not there", (0..200 * 1024).map(page).collect()),
    ] {
        let ids: Vec<ContentId> = pages.iter().map(|page| asking.key.id(page)).collect();
        let begin = Instant::now();
        let found: usize = ids
            .chunks(1024)
            .map(|ids| lab.index.read(&asking, ids).iter().flatten().count())
            .sum();
        let took = begin.elapsed().as_secs_f64();
        println!(
            "{what:<27} {found} of {}, {:.0} a second",
            ids.len(),
            ids.len() as f64 / took
        );
        assert_eq!(found, if what == "not there" { 0 } else { ids.len() });
    }
    let begin = Instant::now();
    let keys = lab.index.lookup_keys(&asking).len();
    println!(
        "keys for a filter           {keys} in {:.2} s",
        begin.elapsed().as_secs_f64()
    );
}
