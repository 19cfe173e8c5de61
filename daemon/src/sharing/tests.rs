//! Sharing through the scanner, on a Xen that is made up.
mod arrivals;

use std::collections::{BTreeMap, BTreeSet};

use proptest::prelude::*;
use tempfile::TempDir;
use xen_sys::{DomId, ShareHandle};
use xenfold::config;

use super::engine::{Engine, Task};
use super::sim::{SimXen, World, page};
use super::*;
use crate::index::sim::{domid, uuid};
use crate::index::{Index, Scanner, Settings as IndexSettings};
use crate::keys::Keys;
use crate::membership::Members;

const SECOND: Duration = Duration::from_secs(1);
const GROUPS: &str = "[group]\nweb = [\"web-*\"]\nmail = [\"mail-*\"]";

/// A host that shares, and its daemon.
struct Lab {
    _folder: TempDir,
    members: Arc<Members>,
    xen: SimXen,
    index: Arc<Index>,
    scanner: Scanner,
    now: Duration,
    reserve_pages: u64,
}

impl Lab {
    fn new(seed: u64, free: u64, reserve_pages: u64, world: impl FnOnce(&mut World)) -> Lab {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("xenfold.conf");
        std::fs::write(&path, GROUPS).unwrap();
        let config = config::read(&path).unwrap();
        let keys = Keys::new(folder.path().join("keys"));
        keys.make("web").unwrap();
        let members = Arc::new(Members::new(config.group, keys));
        let xen = SimXen::new(seed, free);
        world(&mut xen.0.lock());
        let (index, scanner) = start(&xen, &members, reserve_pages, true);
        let mut lab = Lab {
            _folder: folder,
            members,
            xen,
            index,
            scanner,
            now: Duration::ZERO,
            reserve_pages,
        };
        lab.run(2 * SECOND);
        lab
    }

    fn restart(&mut self) {
        self.restart_with(true);
    }

    /// With sharing on or off in the configuration.
    fn restart_with(&mut self, enabled: bool) {
        (self.index, self.scanner) = start(&self.xen, &self.members, self.reserve_pages, enabled);
    }

    fn run(&mut self, time: Duration) {
        let end = self.now + time;
        while self.now < end {
            self.xen.0.lock().idle = self.now + SECOND;
            self.now += self.scanner.step(self.now);
        }
    }

    /// Lets the scanner go round all guests so often.
    fn rounds(&mut self, count: u64) {
        let rounds = self.index.stats().rounds;
        while self.index.stats().rounds < rounds + count {
            self.run(SECOND);
        }
    }

    fn stats(&self) -> DedupStats {
        match self.index.dedup_status() {
            DedupStatus::Running(stats) => *stats,
            absent => panic!("{absent:?}"),
        }
    }

    /// The table says of every page that Xen shares with another what Xen says, and of no other.
    fn check_table(&self) {
        let world = self.xen.0.lock();
        world.check();
        let several = |pages: &&Vec<GuestPage>| pages.len() > 1;
        let sorted = |pages: &Vec<GuestPage>| pages.iter().copied().collect::<BTreeSet<_>>();
        let xen: BTreeMap<ShareHandle, BTreeSet<GuestPage>> = world
            .shared()
            .iter()
            .filter(|(_, pages)| several(pages))
            .map(|(handle, pages)| (ShareHandle::new(*handle), sorted(pages)))
            .collect();
        let state = self.index.sharing().state.lock();
        let rows = state.table.rows().filter(|row| several(&&row.pages));
        let table: BTreeMap<ShareHandle, BTreeSet<GuestPage>> =
            rows.map(|row| (row.handle, sorted(&row.pages))).collect();
        assert_eq!(table, xen);
        assert_eq!(state.table.saved(), world.saved());
    }
}

fn start(xen: &SimXen, members: &Arc<Members>, reserve_pages: u64, enabled: bool) -> (Arc<Index>, Scanner) {
    let settings = IndexSettings {
        limit_bytes: 16 << 20,
        rate_pages_per_s: 1_000_000,
        processor_percent: 0,
        off: Default::default(),
        sharing: Settings {
            enabled,
            reserve_bytes: reserve_pages * PAGE_SIZE as u64,
        },
    };
    let index = Index::new(Box::new(xen.clone()), members.clone(), settings);
    let scanner = Scanner::new(index.clone());
    (index, scanner)
}

#[test]
fn equal_pages_of_a_group_get_one_frame() {
    let mut lab = Lab::new(1, 100, 10, |world| {
        world.add_guest(1, "web-1", &[0, 1, 2, 3, 3, 0]);
        world.add_guest(2, "web-2", &[0, 1, 5, 3]);
        // Not in the group, and in one that has no key: equal pages of their own are one, no others.
        world.add_guest(3, "database", &[1, 1, 2, 0]);
        world.add_guest(4, "mail-1", &[1, 2]);
        world.add_guest(5, "mail-2", &[2]);
    });
    lab.rounds(3);
    lab.check_table();
    let stats = lab.stats();
    // web: three zeros, 1 twice, 3 three times; database: 1 twice; mail: 2 twice.
    assert_eq!((stats.pages, stats.frames, stats.saved_pages), (12, 5, 7));
    assert_eq!((stats.xen_saved_pages, stats.free_bytes), (7, 107 * 4096));
    for pages in lab.xen.0.lock().shared().values() {
        let groups: BTreeSet<u32> = pages
            .iter()
            .map(|page| [0, 1, 1, 3, 4, 4][page.domid.get() as usize])
            .collect();
        assert_eq!(groups.len(), 1, "{pages:?}");
    }
    // A write breaks a row, and is noticed.
    lab.xen.0.lock().write(page(2, 1), 77);
    lab.rounds(1);
    lab.check_table();
    assert_eq!((lab.stats().saved_pages, lab.stats().broken), (6, 1));
    // What was there before is written: Xen's count tells.
    lab.xen.0.lock().write(page(2, 3), 3);
    lab.rounds(1);
    lab.check_table();
}

#[test]
fn a_last_page_that_is_given_up_leaves_its_row() {
    let mut lab = Lab::new(1, 100, 10, |world| {
        world.add_guest(1, "web-1", &[1, 2]);
        world.add_guest(2, "web-2", &[1, 2]);
    });
    lab.rounds(3);
    assert_eq!(lab.stats().saved_pages, 2);
    lab.xen.0.lock().give_up(page(2, 1));
    lab.rounds(1);
    lab.check_table();
}

#[test]
fn pages_that_change_are_left_alone() {
    let mut lab = Lab::new(1, 100, 10, |world| {
        world.add_guest(1, "web-1", &[1, 9]);
        world.add_guest(2, "web-2", &[2, 9]);
    });
    for content in 20..26 {
        {
            let mut world = lab.xen.0.lock();
            world.write(page(1, 0), content);
            world.write(page(2, 0), content);
        }
        lab.rounds(1);
    }
    assert_eq!((lab.stats().pages, lab.stats().shared), (2, 1));
}

#[test]
fn a_guest_that_is_migrated_or_saved_is_left_alone() {
    let mut lab = Lab::new(1, 100, 10, |world| {
        world.add_guest(1, "web-1", &[1, 2]);
        world.add_guest(2, "web-2", &[1, 3]);
        world.departing = vec![domid(2)];
    });
    let hold = lab.index.sharing().hold(&uuid(1));
    lab.rounds(3);
    assert_eq!((lab.stats().pages, lab.stats().xen_frames), (0, 0));
    assert!(lab.stats().guests.iter().all(|guest| guest.left_out.is_some()));
    drop(hold);
    lab.rounds(2);
    assert_eq!(lab.stats().pages, 0);
    lab.xen.0.lock().departing.clear();
    lab.rounds(2);
    assert_eq!(lab.stats().pages, 2);
    // Nor is anything taken from it while it goes.
    let hold = lab.index.sharing().hold(&uuid(1));
    lab.run(2 * SECOND);
    lab.index.sharing().enable(false).unwrap();
    lab.run(2 * SECOND);
    assert_eq!(lab.xen.0.lock().saved(), 0, "the other one's page went back");
    assert_eq!(lab.stats().pages, 1);
    drop(hold);
    lab.run(3 * SECOND);
    assert_eq!((lab.stats().pages, lab.stats().xen_frames), (0, 0));
}

#[test]
fn a_guest_that_changes_its_group_gets_its_pages_back() {
    let mut lab = Lab::new(1, 100, 10, |world| {
        world.add_guest(1, "web-1", &[0, 1, 2]);
        world.add_guest(2, "web-2", &[0, 1, 3]);
        world.add_guest(3, "mail-1", &[1]);
    });
    lab.rounds(2);
    assert_eq!(lab.stats().saved_pages, 2);
    lab.xen.0.lock().guests.get_mut(&domid(2)).unwrap().name = Some("mail-2".into());
    lab.run(2 * SECOND);
    assert_eq!(lab.xen.0.lock().saved(), 0);
    lab.rounds(4);
    lab.check_table();
    assert_eq!(lab.stats().pairs.len(), 1);
    assert_eq!((lab.stats().pairs[0].domids, lab.stats().saved_pages), ([2, 3], 1));
}

#[test]
fn the_table_is_found_again_after_a_restart() {
    let contents: Vec<u64> = (0..300).map(|n| n % 40).collect();
    let mut lab = Lab::new(1, 10, 5, |world| {
        world.add_guest(1, "web-1", &contents);
        world.add_guest(2, "web-2", &contents);
        world.add_guest(3, "database", &contents);
    });
    lab.rounds(2);
    let before = lab.stats();
    assert_eq!(before.saved_pages, 900 - 80);
    lab.restart();
    // A frame that was nominated when the daemon was killed.
    lab.xen.0.lock().write(page(1, 7), 1000);
    lab.xen.nominate(page(1, 7)).unwrap();
    lab.run(3 * SECOND);
    lab.rounds(2);
    lab.check_table();
    let after = lab.stats();
    assert_eq!((after.saved_pages, after.shared), (before.saved_pages - 1, 0));
    assert_eq!(after.xen_frames, after.frames);
    // And what was shared across what is another group by now goes back.
    lab.xen.0.lock().guests.get_mut(&domid(2)).unwrap().name = Some("mail-2".into());
    lab.restart();
    lab.rounds(4);
    lab.check_table();
    assert!(lab.stats().pairs.iter().all(|pair| pair.domids[0] == pair.domids[1]));
}

/// Xen stops the host when a frame that is given up has a page of a third guest. A new daemon's table does not know yet
/// which frames are several pages' already.
#[test]
fn a_frame_of_several_pages_is_never_given_up() {
    let xen = SimXen::new(1, 10);
    for number in 1..=3 {
        let name = format!("web-{number}");
        xen.0.lock().add_guest(number, &name, &[7; 40]);
    }
    let identities: BTreeMap<DomId, Identity> = (1..=3)
        .map(|number| Identity {
            domid: domid(number),
            uuid: uuid(number as u8),
            name: format!("web-{number}"),
        })
        .map(|identity| (identity.domid, identity))
        .collect();
    let mut before = xen.clone();
    for pfn in 0..40 {
        let [first, second] = [page(1, pfn), page(2, pfn)].map(|page| (page, before.nominate(page).unwrap()));
        before.share(first, second, false).unwrap();
    }
    let host: Mutex<Box<dyn Host>> = Mutex::new(Box::new(xen.clone()));
    // Which one would stay is drawn: in 40 pairs the one of two pages would have to go sometime.
    let pair = |pfn| Task {
        group: 0,
        key: 7,
        row: None,
        pages: vec![page(3, pfn), page(1, pfn)],
    };
    let tasks: Vec<Task> = (0..40).map(pair).collect();
    let run = Engine::new(&host, &identities, None).run(&tasks);
    assert!(run.outcomes.iter().all(|outcome| outcome.joined.len() == 2));
    // Nor does it leave for another frame of several pages.
    let row = (0, (page(1, 0), before.nominate(page(1, 0)).unwrap()));
    let other = Task {
        row: Some(row),
        pages: vec![page(2, 1)],
        ..pair(0)
    };
    let run = Engine::new(&host, &identities, None).run(&[other]);
    assert_eq!(run.outcomes[0].elsewhere, [page(2, 1)]);
    let world = xen.0.lock();
    world.check();
    assert_eq!(world.saved(), 80);
}

#[test]
fn what_the_table_does_not_know_is_given_back_too() {
    let mut lab = Lab::new(1, 200, 10, |world| {
        world.add_guest(1, "web-1", &[1; 50]);
        world.add_guest(2, "web-2", &[1; 50]);
        world.add_guest(3, "database", &[2; 30]);
    });
    lab.rounds(2);
    assert_eq!(lab.xen.0.lock().saved(), 128);
    lab.restart();
    lab.index.sharing().enable(false).unwrap();
    let hold = lab.index.sharing().hold(&uuid(2));
    lab.run(3 * SECOND);
    assert_eq!(
        lab.xen.0.lock().saved(),
        49,
        "of a guest that is being migrated nothing is taken"
    );
    assert!(!lab.stats().returning);
    drop(hold);
    lab.index.sharing().enable(false).unwrap();
    lab.run(3 * SECOND);
    let stats = lab.stats();
    assert_eq!((stats.xen_saved_pages, stats.xen_frames), (0, 0));
    lab.xen.0.lock().check();
}

#[test]
fn a_daemon_that_is_started_with_sharing_off_gives_back_what_is_shared() {
    let mut lab = Lab::new(1, 200, 10, |world| {
        world.add_guest(1, "web-1", &[1; 50]);
        world.add_guest(2, "web-2", &[1; 50]);
    });
    lab.rounds(2);
    assert_eq!(lab.xen.0.lock().saved(), 99);
    lab.restart_with(false);
    lab.run(3 * SECOND);
    let stats = lab.stats();
    assert_eq!((stats.enabled, stats.returning), (false, false));
    assert_eq!((stats.xen_saved_pages, stats.xen_frames), (0, 0));
    lab.xen.0.lock().check();
}

/// As many pages of the table were written to since they were last seen as Xen shares that the table does not know.
#[test]
fn an_old_table_hides_no_shared_page() {
    let mut lab = Lab::new(1, 200, 10, |world| {
        for number in 1..=2 {
            let mut contents = vec![1; 50];
            contents.push(100 + u64::from(number));
            world.add_guest(number, &format!("web-{number}"), &contents);
        }
    });
    lab.rounds(2);
    assert_eq!(lab.stats().pages, 100);
    for pfn in 0..5 {
        lab.xen.0.lock().write(page(1, pfn), 1000 + pfn);
        lab.xen.0.lock().write(page(2, pfn), 2000 + pfn);
    }
    let [first, second] = [1, 2].map(|number| {
        lab.xen.0.lock().write(page(number, 50), 9);
        (page(number, 50), lab.xen.nominate(page(number, 50)).unwrap())
    });
    lab.xen.share(first, second, false).unwrap();
    lab.index.sharing().enable(false).unwrap();
    lab.run(4 * SECOND);
    let stats = lab.stats();
    assert_eq!((stats.pages, stats.xen_saved_pages, stats.xen_frames), (0, 0, 0));
    assert!(!stats.returning);
}

#[test]
fn memory_for_writes_is_kept() {
    let contents = vec![5; 400];
    let mut lab = Lab::new(1, 0, 100, |world| {
        world.add_guest(1, "web-1", &contents);
        world.add_guest(2, "web-2", &contents);
    });
    // A full host: what sharing spares is the reserve.
    lab.rounds(2);
    assert_eq!((lab.stats().saved_pages, lab.stats().short), (799, false));
    // Another guest takes nearly all of it: what remains goes to pages that may break, and is not used up.
    lab.xen.0.lock().free = 90;
    lab.run(5 * SECOND);
    let stats = lab.stats();
    assert!(stats.short && stats.unshared > 0, "{stats:?}");
    assert_eq!(stats.free_bytes / 4096, 25);
    assert_eq!(stats.saved_pages, stats.xen_saved_pages);
    lab.rounds(2);
    assert_eq!(lab.stats().saved_pages, stats.saved_pages, "nothing further is shared");
    lab.xen.0.lock().free = 500;
    lab.rounds(9);
    assert_eq!((lab.stats().saved_pages, lab.stats().short), (799, false));
    // Given back as far as there is memory, and then the rest.
    lab.index.sharing().enable(false).unwrap();
    lab.run(3 * SECOND);
    let stats = lab.stats();
    assert!(
        stats.returning && stats.pages > 0 && stats.free_bytes >= 20 * 4096,
        "{stats:?}"
    );
    lab.xen.0.lock().free = 2000;
    lab.run(5 * SECOND);
    let stats = lab.stats();
    assert_eq!((stats.returning, stats.pages, stats.xen_frames), (false, 0, 0));
    assert!(lab.xen.0.lock().crashed.is_empty());
    lab.xen.0.lock().check();
}

/// A guest takes all memory at once, and others write to all that they share.
#[test]
fn a_guest_that_writes_without_memory_stands_still_and_goes_on() {
    let mut lab = Lab::new(1, 0, 100, |world| {
        world.add_guest(1, "web-1", &[5; 400]);
        world.add_guest(2, "web-2", &[5; 400]);
    });
    lab.rounds(2);
    lab.xen.0.lock().free = 3;
    for pfn in 0..400 {
        lab.xen.0.lock().write(page(1, pfn), 1000 + pfn);
    }
    lab.run(2 * SECOND);
    let stats = lab.stats();
    assert!(
        stats.standing > 300 && stats.stood >= stats.standing && stats.short,
        "{stats:?}"
    );
    // Also when the daemon is killed meanwhile: the next one hears of them again.
    lab.restart();
    lab.run(2 * SECOND);
    assert_eq!(lab.stats().standing, stats.standing);
    // Some of the memory, then all that is needed.
    lab.xen.0.lock().free += 100;
    lab.run(2 * SECOND);
    assert_eq!(lab.stats().standing, stats.standing - 100);
    lab.xen.0.lock().free += 1000;
    lab.run(2 * SECOND);
    assert_eq!(lab.stats().standing, 0);
    {
        let world = lab.xen.0.lock();
        world.check();
        assert!(world.crashed.is_empty() && world.standing.is_empty());
        assert_eq!(world.expected[&page(1, 399)], 1399);
    }
    lab.rounds(3);
    lab.check_table();
}

/// A ring beside a pager's would stop the host.
#[test]
fn a_guest_that_is_being_paged_is_taken_up_when_its_pager_has_ended() {
    let mut lab = Lab::new(1, 100, 10, |world| {
        world.add_guest(1, "web-1", &[5; 40]);
        world.add_guest(2, "web-2", &[5; 40]);
        world.paged = vec![domid(2)];
    });
    lab.rounds(3);
    assert_eq!(lab.stats().saved_pages, 39);
    lab.xen.0.lock().paged.clear();
    lab.rounds(3);
    assert_eq!(lab.stats().saved_pages, 79);
    lab.check_table();
}

#[test]
fn a_heap_without_room_is_no_harm() {
    let mut lab = Lab::new(1, 100, 10, |world| {
        world.add_guest(1, "web-1", &[1, 2, 3]);
        world.add_guest(2, "web-2", &[1, 2, 3]);
        world.heap_full = true;
    });
    lab.rounds(3);
    assert_eq!((lab.stats().pages, lab.stats().xen_frames), (0, 0));
    lab.xen.0.lock().heap_full = false;
    lab.rounds(3);
    assert_eq!(lab.stats().saved_pages, 3);
}

#[test]
fn a_guest_is_scanned_at_once_when_asked_for() {
    let mut lab = Lab::new(1, 100, 10, |world| {
        world.add_guest(1, "web-1", &[1; 3000]);
    });
    lab.rounds(1);
    assert!(!lab.index.scan_now(&uuid(9)) && lab.index.scan_now(&uuid(1)));
    lab.run(SECOND);
    // Two frames: a row is full with 2048 pages or a batch more.
    assert_eq!((lab.stats().pages, lab.stats().frames), (3000, 2));
}

#[test]
fn a_hypervisor_without_sharing_is_said_plainly() {
    let mut host: Box<dyn Host> = Box::new(crate::index::sim::Sim::default());
    let settings = Settings {
        enabled: true,
        reserve_bytes: 0,
    };
    let sharing = Sharing::new(settings, host.as_mut());
    assert!(!sharing.enabled());
    assert!(sharing.enable(true).unwrap_err().contains("MEM_SHARING"));
    let status = sharing.status(&Mutex::new(host), SECOND);
    assert!(matches!(status, DedupStatus::Absent(absent) if absent.failed && absent.reason.contains("UNSUPPORTED")));
}

/// Guests that write, give frames up and die at every step, a daemon that is killed in between; returns the races.
fn race(seed: u64, restless: u64, rounds: u64) -> u64 {
    let mut lab = Lab::new(seed, 5000, 50, |world| {
        world.contents(6);
        for number in 1..=5 {
            let contents: Vec<u64> = (0..40).map(|_| world.below(6)).collect();
            let name = if number == 5 {
                "other".into()
            } else {
                format!("web-{number}")
            };
            world.add_guest(number, &name, &contents);
        }
        (world.restless, world.deadly) = (restless, true);
    });
    for round in 0..rounds {
        lab.rounds(1);
        lab.xen.0.lock().check();
        if round % 5 == seed % 5 {
            lab.restart();
        }
    }
    // Everybody rests: what the table says is true, and what can be shared is.
    lab.xen.0.lock().restless = 0;
    lab.rounds(18);
    lab.check_table();
    let world = lab.xen.0.lock();
    assert!(world.crashed.is_empty());
    let mut frames: BTreeSet<(bool, u64)> = BTreeSet::new();
    let pages = world
        .expected
        .iter()
        .filter(|(page, content)| !frames.insert((page.domid == domid(5), **content)));
    // Nearly: two rows that came to the same content apart from each other stay two.
    let equal = pages.count() as u64;
    assert!(
        world.saved() <= equal && world.saved() * 100 >= equal * 95,
        "{} of {equal}",
        world.saved()
    );
    world.races
}

#[test]
fn ten_thousand_races_change_no_byte() {
    let mut races = 0;
    let mut seed = 1;
    while races < 10_000 {
        races += race(seed, 100 + seed * 37 % 400, 6);
        seed += 1;
    }
    println!("{races} races in {seed} hosts");
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(8))]
    #[test]
    fn any_races_change_no_byte(seed in any::<u64>(), restless in 1u64..700, rounds in 1u64..8) {
        race(seed, restless, rounds);
    }
}
