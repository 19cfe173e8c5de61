//! Pages of guests that have just arrived.
use std::os::unix::net::UnixStream;
use std::thread::sleep;
use std::time::Instant;

use xenfold::control::Client;
use xenfold::page::ContentId;

use super::*;
use crate::daemon::Daemon;
use crate::index::sim::page as bytes_of;
use crate::membership::Membership;
use crate::server;
use crate::socket::Socket;

const PAGES: u64 = 400;

/// What the pages of an image held, the first at frame 0.
fn image(membership: &Membership, contents: &[u64]) -> Vec<(Pfn, ContentId)> {
    let page = |(pfn, content): (u64, &u64)| (Pfn::new(pfn).unwrap(), membership.key.id(&bytes_of(*content)));
    (0..).zip(contents).map(page).collect()
}

impl Lab {
    /// A host with a guest of group web that has these contents and one of group mail that has them too, both known.
    fn with(contents: &[u64]) -> Lab {
        let mut lab = Lab::new(1, 1000, 10, |world| {
            world.add_guest(1, "web-1", contents);
            world.add_guest(3, "mail-1", contents);
        });
        lab.rounds(1);
        assert_eq!(lab.stats().pages, 0);
        lab
    }

    fn member(&self, number: u8, name: &str) -> Membership {
        self.members.find(&uuid(number), name, None).unwrap()
    }

    /// A guest comes with these contents, and its agent tells of them before it ends.
    fn arrives(&mut self, number: u32, name: &str, contents: &[u64]) -> Hold {
        let hold = self.index.sharing().hold(&uuid(number as u8));
        let incoming = format!("{name}--incoming");
        self.xen.0.lock().add_guest(number, &incoming, contents);
        self.run(2 * SECOND);
        // A restless one may have ended.
        if let Some(guest) = self.xen.0.lock().guests.get_mut(&domid(number)) {
            guest.name = Some(name.into());
        }
        let membership = self.member(number as u8, name);
        self.index
            .arrived_at(self.now, &membership, &image(&membership, contents));
        hold
    }
}

#[test]
fn what_arrives_is_shared_without_a_round() {
    let contents: Vec<u64> = (1..=PAGES).collect();
    let mut lab = Lab::with(&contents);
    let rounds = lab.index.stats().rounds;
    // Two of its pages hold the same, and one what nobody else has.
    let mut arriving = contents.clone();
    arriving.extend([5, 9999]);
    let hold = lab.arrives(2, "web-2", &arriving);
    lab.run(2 * SECOND);
    let stats = lab.stats();
    assert_eq!((stats.arrived, stats.arrived_waiting), (PAGES + 1, PAGES + 1));
    assert_eq!(
        (stats.pages, stats.arrived_shared),
        (0, 0),
        "its migration has not let go of it"
    );
    drop(hold);
    lab.run(3 * SECOND);
    let stats = lab.stats();
    assert_eq!(lab.index.stats().rounds, rounds);
    assert_eq!((stats.arrived_shared, stats.arrived_waiting), (PAGES + 1, 0));
    assert_eq!((stats.saved_pages, stats.shared), (PAGES + 1, PAGES + 1));
    assert!(stats.arrival_waited_ms.is_some_and(|ms| (2000..6000).contains(&ms)));
    assert!(stats.arrival_ms.is_some_and(|ms| ms < 2000));
    lab.check_table();
    // What the rounds find is no different from what was shared by them.
    lab.rounds(2);
    lab.check_table();
    assert_eq!(lab.stats().broken, 0);
    assert!(lab.stats().pairs.iter().all(|pair| pair.domids != [1, 3]));
}

#[test]
fn an_arrival_joins_what_is_shared_already() {
    let contents: Vec<u64> = (1..=PAGES).collect();
    let mut lab = Lab::with(&contents);
    drop(lab.arrives(2, "web-2", &contents));
    lab.run(3 * SECOND);
    drop(lab.arrives(4, "web-4", &contents));
    lab.run(3 * SECOND);
    let stats = lab.stats();
    assert_eq!((stats.frames, stats.saved_pages), (PAGES, 2 * PAGES));
    assert_eq!(stats.arrived_shared, 2 * PAGES);
    lab.check_table();
}

/// As after a restart, when what is shared has been read and not been visited.
#[test]
fn an_arrival_finds_what_an_earlier_daemon_shared() {
    let contents: Vec<u64> = (1..=PAGES).collect();
    let mut lab = Lab::new(1, 1000, 10, |world| {
        world.add_guest(1, "web-1", &contents);
        world.add_guest(3, "web-3", &contents);
    });
    lab.rounds(2);
    assert_eq!(lab.stats().saved_pages, PAGES);
    lab.restart();
    let holds = [1, 3].map(|number| lab.index.sharing().hold(&uuid(number)));
    lab.rounds(1);
    assert_eq!(lab.stats().pages, 0);
    drop(holds);
    drop(lab.arrives(2, "web-2", &contents));
    lab.run(3 * SECOND);
    let stats = lab.stats();
    assert_eq!((stats.arrived_shared, stats.xen_saved_pages), (PAGES, 2 * PAGES));
    lab.rounds(2);
    lab.check_table();
    assert_eq!(lab.stats().frames, PAGES);
}

#[test]
fn a_page_that_is_written_meanwhile_is_not_shared() {
    let contents: Vec<u64> = (1..=PAGES).collect();
    let mut lab = Lab::with(&contents);
    let hold = lab.arrives(2, "web-2", &contents);
    {
        let mut world = lab.xen.0.lock();
        world.write(page(2, 5), 7777);
        world.write(page(1, 6), 8888);
    }
    drop(hold);
    lab.run(3 * SECOND);
    let stats = lab.stats();
    assert_eq!(
        (stats.saved_pages, stats.arrived_shared, stats.changed),
        (PAGES - 2, PAGES - 2, 2)
    );
    lab.check_table();
    assert_eq!(
        lab.stats().xen_frames,
        stats.frames,
        "what was nominated for nothing is its guest's own"
    );
}

#[test]
fn nothing_is_shared_with_another_group() {
    let contents: Vec<u64> = (1..=PAGES).collect();
    let mut lab = Lab::with(&contents);
    let world = &lab.xen.clone();
    world.0.lock().destroy(domid(3));
    lab.run(2 * SECOND);
    drop(lab.arrives(2, "mail-2", &contents));
    // One whose agent says that it is of another group than the configuration does.
    let web = lab.member(5, "web-5");
    drop(lab.arrives(5, "mail-5", &contents));
    lab.index.arrived_at(lab.now, &web, &image(&web, &contents));
    lab.run(3 * SECOND);
    let stats = lab.stats();
    assert_eq!((stats.pages, stats.xen_frames, stats.arrived_shared), (0, 0, 0));
}

#[test]
fn a_guest_that_ends_at_once_leaves_nothing_behind() {
    let contents: Vec<u64> = (1..=PAGES).collect();
    let mut lab = Lab::with(&contents);
    let hold = lab.arrives(2, "web-2", &contents);
    lab.xen.0.lock().destroy(domid(2));
    drop(hold);
    lab.run(3 * SECOND);
    assert_eq!(lab.stats().arrived_waiting, PAGES, "it may still come");
    lab.run(70 * SECOND);
    let stats = lab.stats();
    assert_eq!(
        (stats.arrived_waiting, stats.arrived_shared, stats.xen_frames),
        (0, 0, 0)
    );
    lab.xen.0.lock().check();
}

#[test]
fn guests_that_write_and_end_while_they_arrive_change_no_byte() {
    let mut shared = 0;
    for seed in 1..=12 {
        let contents: Vec<u64> = (0..PAGES).map(|n| n % 60).collect();
        let mut lab = Lab::new(seed, 5000, 50, |world| {
            world.contents(60);
            world.add_guest(1, "web-1", &contents);
            world.add_guest(3, "web-3", &contents);
            world.add_guest(6, "other", &contents);
        });
        (lab.xen.0.lock().restless, lab.xen.0.lock().deadly) = (100 + 30 * seed, true);
        let hold = lab.arrives(2, "web-2", &contents);
        drop(hold);
        for _ in 0..4 {
            lab.run(SECOND);
            lab.xen.0.lock().check();
        }
        shared += lab.stats().arrived_shared;
        assert!(lab.xen.0.lock().crashed.is_empty());
        lab.xen.0.lock().restless = 0;
        lab.rounds(10);
        lab.check_table();
    }
    assert!(shared > 0);
}

#[test]
fn with_sharing_off_nothing_is_noted() {
    let contents: Vec<u64> = (1..=PAGES).collect();
    let mut lab = Lab::with(&contents);
    lab.index.sharing().enable(false).unwrap();
    drop(lab.arrives(2, "web-2", &contents));
    lab.run(3 * SECOND);
    let stats = lab.stats();
    assert_eq!((stats.arrived, stats.arrived_waiting, stats.pages), (0, 0, 0));
    // Turned off while pages wait.
    lab.index.sharing().enable(true).unwrap();
    lab.run(2 * SECOND);
    let hold = lab.arrives(4, "web-4", &contents);
    lab.index.sharing().enable(false).unwrap();
    drop(hold);
    lab.run(3 * SECOND);
    assert_eq!((lab.stats().arrived, lab.stats().pages), (PAGES, 0));
    lab.run(70 * SECOND);
    assert_eq!((lab.stats().arrived_waiting, lab.stats().xen_frames), (0, 0));
}

/// As an agent does it.
#[test]
fn the_image_of_a_guest_tells_what_to_share() {
    let folder = tempfile::tempdir().unwrap();
    let path = |name: &str| folder.path().join(name);
    let settings = "store_size = 0\nindex_rate = 1000000\nsharing = true\nsharing_reserve = 0\n";
    std::fs::write(path("xenfold.conf"), format!("{settings}{GROUPS}")).unwrap();
    let config = config::read(&path("xenfold.conf")).unwrap();
    let contents: Vec<u64> = (1..=20).collect();
    let xen = SimXen::new(1, 100);
    xen.0.lock().add_guest(1, "web-1", &contents);
    let daemon = Arc::new(Daemon::open_on(&config, &path("state"), || Ok(Box::new(xen.clone()))));
    let socket = Socket::listen(&path("daemon.sock")).unwrap();
    let (stop, stopped) = UnixStream::pair().unwrap();
    let stats = || match daemon.dedup_status() {
        DedupStatus::Running(stats) => *stats,
        absent => panic!("{absent:?}"),
    };
    let wait_for = |what: &str, done: &dyn Fn() -> bool| {
        let deadline = Instant::now() + 60 * SECOND;
        while !done() {
            assert!(Instant::now() < deadline, "{what}: {:?}", stats());
            sleep(Duration::from_millis(20));
        }
    };
    std::thread::scope(|scope| {
        let serving = scope.spawn(|| server::serve(&daemon, &socket, &stopped));
        let mut client = Client::connect(&path("daemon.sock"), Some(60 * SECOND)).unwrap();
        let opened = client.open(&uuid(2), "web-2", None).unwrap();
        // Its contents may be known by the host's own key first, before this caller has made its group's.
        let client = Mutex::new(client);
        wait_for("the guest is known", &|| {
            let ids: Vec<ContentId> = contents
                .iter()
                .map(|content| opened.key.id(&bytes_of(*content)))
                .collect();
            client.lock().read(&ids).unwrap().iter().all(Option::is_some)
        });
        let mut client = client.into_inner();
        xen.0.lock().add_guest(2, "web-2", &contents);
        let ids = (0..).zip(&contents);
        client
            .save_image(ids.map(|(pfn, content)| (Pfn::new(pfn).unwrap(), opened.key.id(&bytes_of(*content)))))
            .unwrap();
        assert_eq!((stats().arrived, stats().arrived_shared), (20, 0));
        drop(client);
        wait_for("its pages are shared", &|| stats().arrived_shared == 20);
        drop(stop);
        serving.join().unwrap().unwrap();
    });
    xen.0.lock().check();
    assert_eq!(xen.0.lock().saved(), 20);
}
