//! xen-sys against a running Xen, with the crate xenctrl as an independent second opinion on what it says.
//!
//! These need root in a dom0 and a guest of their own, small and of no other use: they pause it, suspend and resume it,
//! rename it, and turn its log-dirty on and off. Elsewhere they are ignored. In the lab (scripts/lab), from the checkout:
//!
//! ```sh
//! scripts/lab up
//! scripts/lab guest create xensys1 --kind small --on a
//! RUSTFLAGS='--cfg xenfold_oracle' cargo test -p xen-sys --test lab --no-run     # prints the binary's path
//! scripts/lab cp target/debug/deps/lab-HASH a:/root/xen-sys-lab
//! scripts/lab ssh a XEN_SYS_GUEST=xensys1 /root/xen-sys-lab --ignored --nocapture
//! scripts/lab guest check xensys1 && scripts/lab guest destroy xensys1
//! ```
//!
//! Without `--cfg xenfold_oracle` the oracle's tests are left out (the crate is GPL-3.0-only, its build needs libxen-dev and
//! libclang, and in the dom0 it opens `libxenctrl.so`, which is in libxen-dev).
//!
//! XEN_SYS_GUEST is the guest's name. XEN_SYS_CONFIG is the configuration file from which a second guest is created and
//! destroyed again (default: `/root/guests/NAME.cfg`, where scripts/lab keeps it).
use std::os::fd::AsRawFd;
use std::process::Command;
use std::time::{Duration, Instant};

use serial_test::serial;
use xen_sys::{
    Access, BUILT_FOR, Bitmap, DOM0, DomId, DomainInfo, DomainState, ForeignMemory, Libxl, LogDirty, MemSharing,
    PAGE_BYTES, Peek, SharingError, ShutdownReason, XenError, Xenctrl, Xenstore, hvm_param, running_version,
};

/// A number that no domain has in the lab.
fn nobody() -> DomId {
    DomId::new(0x7fee).unwrap()
}

fn guest_name() -> String {
    std::env::var("XEN_SYS_GUEST").expect("XEN_SYS_GUEST names the guest to test with (see the head of tests/lab.rs)")
}

fn guest() -> DomId {
    let name = guest_name();
    let libxl = Libxl::open().unwrap();
    libxl
        .domid_of(&name)
        .unwrap()
        .unwrap_or_else(|| panic!("there is no guest {name}"))
}

fn info(xc: &Xenctrl, domid: DomId) -> DomainInfo {
    xc.domain(domid).unwrap().expect("the guest is there")
}

fn wait_for(what: &str, limit: Duration, mut done: impl FnMut() -> bool) {
    let start = Instant::now();
    while !done() {
        assert!(start.elapsed() < limit, "waited {limit:?} for {what}");
        std::thread::sleep(Duration::from_millis(50));
    }
}

/// The guest uses processor time: it runs.
fn wait_until_it_runs(xc: &Xenctrl, domid: DomId) {
    let before = info(xc, domid).cpu_time_ns;
    wait_for("the guest to use its processor", Duration::from_secs(30), || {
        let now = info(xc, domid);
        !now.paused && now.shutdown.is_none() && now.cpu_time_ns > before
    });
}

/// Pauses for a while, also when an assertion fails meanwhile.
struct Paused<'a>(&'a Xenctrl, DomId);
impl<'a> Paused<'a> {
    fn new(xc: &'a Xenctrl, domid: DomId) -> Self {
        xc.pause(domid).unwrap();
        Paused(xc, domid)
    }
}
impl Drop for Paused<'_> {
    fn drop(&mut self) {
        self.0.unpause(self.1).unwrap();
    }
}

#[test]
#[ignore = "needs a Xen dom0"]
#[serial]
fn the_version_is_the_one_in_sys() {
    let xc = Xenctrl::open().unwrap();
    let running = running_version().expect("/sys/hypervisor");
    assert_eq!(xc.version().unwrap(), (running.major, running.minor));
    assert_eq!(running, BUILT_FOR);
}

#[test]
#[ignore = "needs a Xen dom0"]
#[serial]
fn domains_are_listed() {
    let (xc, domid) = (Xenctrl::open().unwrap(), guest());
    let all = xc.domains().unwrap();
    assert_eq!(all.first().map(|info| info.domid), Some(DOM0));
    assert!(!all[0].hvm && all[0].shutdown.is_none() && !all[0].paused);
    let listed = all
        .iter()
        .find(|info| info.domid == domid)
        .expect("the guest is in the list");
    let single = info(&xc, domid);
    assert_eq!(
        (listed.uuid, listed.total_pages, listed.max_pages),
        (single.uuid, single.total_pages, single.max_pages)
    );
    assert!(
        single.hvm && single.hap && !single.dying && single.total_pages > 1024,
        "{single:?}"
    );
    assert_eq!(
        (single.max_vcpu_id, single.paged_pages, single.shared_pages),
        (Some(0), 0, 0)
    );
    assert_eq!(info(&xc, DOM0).state, DomainState::Running, "we are running in it");
    assert!(xc.domain(nobody()).unwrap().is_none());
    wait_until_it_runs(&xc, domid);

    // xl's word for the same.
    let list = Command::new("xl").args(["list", "-v"]).output().unwrap();
    let list = String::from_utf8(list.stdout).unwrap();
    let mut lines = list.lines();
    lines.next();
    let mut seen = Vec::new();
    for line in lines {
        let words: Vec<&str> = line.split_whitespace().collect();
        let number = DomId::new(words[1].parse().unwrap()).unwrap();
        let uuid: String = words.iter().find(|word| word.len() == 36).unwrap().replace('-', "");
        // Other people's guests may come and go between the two lists.
        let Some(ours) = all.iter().find(|info| info.domid == number) else {
            continue;
        };
        let ours: String = ours.uuid.iter().map(|byte| format!("{byte:02x}")).collect();
        assert_eq!(ours, uuid);
        seen.push(number);
    }
    assert!(seen.contains(&DOM0) && seen.contains(&domid));
}

#[test]
#[ignore = "needs a Xen dom0"]
#[serial]
fn processors_are_idle_at_times() {
    let xc = Xenctrl::open().unwrap();
    let (start, before) = (Instant::now(), xc.idle_times().unwrap());
    std::thread::sleep(Duration::from_secs(1));
    let after = xc.idle_times().unwrap();
    // The two clocks are not read at the same moment.
    let passed = start.elapsed() + Duration::from_millis(500);
    assert_eq!(before.len(), after.len());
    assert!(after.iter().any(|idle| !idle.is_zero()));
    for (before, after) in before.iter().zip(&after) {
        assert!(after >= before && *after - *before <= passed, "{before:?} {after:?}");
    }
}

#[test]
#[ignore = "needs a Xen dom0"]
#[serial]
fn the_guest_has_all_its_memory() {
    let xc = Xenctrl::open().unwrap();
    assert_eq!(xc.populate_on_demand_entries(guest()).unwrap(), 0);
    assert!(xc.populate_on_demand_entries(nobody()).is_err());
}

#[test]
#[ignore = "needs a Xen dom0"]
#[serial]
fn calls_on_nobody_say_so() {
    let xc = Xenctrl::open().unwrap();
    assert!(matches!(xc.pause(nobody()), Err(XenError::NoSuchDomain(_))));
    assert!(matches!(xc.unpause(nobody()), Err(XenError::NoSuchDomain(_))));
    assert!(matches!(xc.maximum_gpfn(nobody()), Err(XenError::NoSuchDomain(_))));
    assert!(matches!(
        xc.hvm_param(nobody(), hvm_param::STORE_PFN),
        Err(XenError::NoSuchDomain(_))
    ));
    let mut dirty = xc.log_dirty(nobody(), 1024).unwrap();
    assert!(matches!(dirty.enable(), Err(XenError::NoSuchDomain(_))));
    assert!(matches!(
        dirty.peek(1024, &mut Bitmap::default()),
        Err(XenError::NoSuchDomain(_))
    ));
    let memory = ForeignMemory::open().unwrap();
    match memory.map(nobody(), &[0, 1], Access::Read) {
        Ok(mapping) => {
            println!("mapping nobody's frames: {:?}", mapping.error(0));
            assert_eq!(mapping.mapped(), 0);
        }
        Err(error) => println!("mapping nobody's frames: {error}, {:?}", error.raw_os_error()),
    }
    let libxl = Libxl::open().unwrap();
    assert_eq!(libxl.name(nobody()).unwrap(), None);
    let error = libxl.unpause(nobody()).unwrap_err();
    println!("libxl_domain_unpause of nobody: {error}");
    let error = libxl.destroy(nobody()).unwrap_err();
    assert!(matches!(error, XenError::NoSuchDomain(_)), "{error}");
}

#[test]
#[ignore = "needs a Xen dom0"]
#[serial]
fn pauses_are_counted() {
    let (xc, domid) = (Xenctrl::open().unwrap(), guest());
    wait_until_it_runs(&xc, domid);
    xc.pause(domid).unwrap();
    assert!(info(&xc, domid).paused && info(&xc, domid).state == DomainState::Paused);
    let stopped = info(&xc, domid).cpu_time_ns;
    std::thread::sleep(Duration::from_millis(300));
    assert_eq!(
        info(&xc, domid).cpu_time_ns,
        stopped,
        "a paused guest uses no processor"
    );
    xc.pause(domid).unwrap();
    xc.unpause(domid).unwrap();
    assert!(info(&xc, domid).paused, "one of two pauses is left");
    // The other one as xl would.
    Libxl::open().unwrap().unpause(domid).unwrap();
    assert!(!info(&xc, domid).paused);
    wait_until_it_runs(&xc, domid);
    let error = xc.unpause(domid).unwrap_err();
    assert_eq!(
        error.raw_os_error(),
        Some(libc::EINVAL),
        "nothing to take back: {error}"
    );
}

/// Whether the page has what every Linux kernel has in its read-only data.
fn has_banner(page: &[u8; PAGE_BYTES]) -> bool {
    let banner = b"Linux version ";
    // SAFETY: both are given with their lengths.
    !unsafe { libc::memmem(page.as_ptr().cast(), page.len(), banner.as_ptr().cast(), banner.len()) }.is_null()
}

#[test]
#[ignore = "needs a Xen dom0"]
#[serial]
fn frames_are_numbered_and_mapped() {
    let (xc, domid) = (Xenctrl::open().unwrap(), guest());
    let memory = ForeignMemory::open().unwrap();
    let highest = xc.maximum_gpfn(domid).unwrap();
    assert_eq!(highest, 0xfefff, "a PVH guest's is always this");
    let store_frame = xc.hvm_param(domid, hvm_param::STORE_PFN).unwrap();
    assert!(store_frame > 0 && store_frame <= highest, "{store_frame:x}");

    // Everything, in batches: as many frames as the domain owns, and one of them has the kernel's banner.
    let (mut mapping_time, mut reading_time) = (Duration::ZERO, Duration::ZERO);
    let (mut mapped, mut zero, mut banner) = (0, 0, None);
    let mut page = [0; PAGE_BYTES];
    let mut errors = std::collections::BTreeMap::<i32, u64>::new();
    let last = info(&xc, domid).max_pages + 1024;
    let gfns: Vec<u64> = (0..=last).chain(highest - 1023..=highest).collect();
    for batch in gfns.chunks(1024) {
        let start = Instant::now();
        let mapping = memory.map(domid, batch, Access::Read).unwrap();
        mapping_time += start.elapsed();
        // Timed as a whole: under emulation asking for the time costs more than a page.
        let start = Instant::now();
        for index in (0..mapping.len()).filter(|index| mapping.error(*index).is_none()) {
            mapping.read(index, &mut page).unwrap();
        }
        reading_time += start.elapsed();
        assert_eq!(mapping.len(), batch.len());
        for (index, gfn) in batch.iter().enumerate() {
            match mapping.error(index) {
                None => {
                    mapping.read(index, &mut page).unwrap();
                    mapped += 1;
                    zero += u64::from(page == [0; PAGE_BYTES]);
                    if banner.is_none() && has_banner(&page) {
                        banner = Some(*gfn);
                    }
                }
                Some(error) => {
                    *errors.entry(error.raw_os_error().unwrap()).or_default() += 1;
                    let before = page;
                    assert_eq!(
                        mapping.read(index, &mut page).unwrap_err().raw_os_error(),
                        error.raw_os_error()
                    );
                    assert_eq!(page, before);
                }
            }
        }
        assert!(
            mapping.error(batch.len()).is_some(),
            "past the end is an error, not a panic"
        );
        assert!(mapping.read(batch.len(), &mut page).is_err());
        assert_eq!(mapping.write(0, &page).unwrap_err().raw_os_error(), Some(libc::EACCES));
    }
    let owned = info(&xc, domid).total_pages;
    println!(
        "{mapped} frames: mapped in {mapping_time:?} and read in {reading_time:?}, {zero} zero; the domain owns {owned}; \
         errors by errno: {errors:?}; banner in frame {banner:x?}"
    );
    assert!(banner.is_some(), "no frame has the kernel's banner");
    assert!(
        mapped as u64 <= owned && mapped as u64 + 64 >= owned,
        "{mapped} mapped of {owned}"
    );
    assert!(!errors.is_empty(), "frames past the guest's memory cannot be mapped");

    // A hole between two good frames spoils neither, and a list may repeat a frame.
    let good = banner.unwrap();
    let mapping = memory.map(domid, &[good, last, good], Access::Read).unwrap();
    let (mut one, mut other) = ([0; PAGE_BYTES], [1; PAGE_BYTES]);
    mapping.read(0, &mut one).unwrap();
    assert!(mapping.read(1, &mut page).is_err());
    mapping.read(2, &mut other).unwrap();
    assert_eq!(one, other, "the banner's page does not change");
    assert_eq!(mapping.mapped(), 2);
    assert!(memory.map(domid, &[], Access::Read).unwrap().is_empty());

    // Several threads with the one connection.
    std::thread::scope(|scope| {
        for _ in 0..4 {
            scope.spawn(|| {
                for _ in 0..50 {
                    let mapping = memory.map(domid, &[good], Access::Read).unwrap();
                    let mut page = [0; PAGE_BYTES];
                    mapping.read(0, &mut page).unwrap();
                    assert_eq!(page, one);
                }
            });
        }
    });
}

#[test]
#[ignore = "needs a Xen dom0"]
#[serial]
fn frames_are_written() {
    let (xc, domid) = (Xenctrl::open().unwrap(), guest());
    let memory = ForeignMemory::open().unwrap();
    let _paused = Paused::new(&xc, domid);
    // A frame's own bytes back, and for a moment others, in a guest that does not run.
    let mapping = memory.map(domid, &[0x1000], Access::ReadWrite).unwrap();
    let mut page = [0; PAGE_BYTES];
    mapping.read(0, &mut page).unwrap();
    let inverted = page.map(|byte| !byte);
    mapping.write(0, &inverted).unwrap();
    let mut seen = [0; PAGE_BYTES];
    memory
        .map(domid, &[0x1000], Access::Read)
        .unwrap()
        .read(0, &mut seen)
        .unwrap();
    mapping.write(0, &page).unwrap();
    assert!(seen == inverted);
    mapping.read(0, &mut seen).unwrap();
    assert!(seen == page);
}

fn read(dirty: &mut LogDirty, bitmap: &mut Bitmap, clean: bool) -> u64 {
    let reading = if clean {
        dirty.clean(bitmap)
    } else {
        dirty.peek(dirty.pages(), bitmap)
    };
    match reading.unwrap() {
        Peek::Read { dirty_pages } => {
            assert_eq!(dirty_pages, bitmap.count_ones());
            dirty_pages
        }
        Peek::Busy => panic!("busy, though nobody else uses log-dirty"),
    }
}

#[test]
#[ignore = "needs a Xen dom0"]
#[serial]
fn dirty_frames_are_logged() {
    let (xc, domid) = (Xenctrl::open().unwrap(), guest());
    wait_until_it_runs(&xc, domid);
    let pages = xc.maximum_gpfn(domid).unwrap() + 1;
    let mut bitmap = Bitmap::default();
    let mut dirty = xc.log_dirty(domid, pages).unwrap();
    assert!(matches!(xc.log_dirty(domid, 0), Err(XenError::Argument { .. })));
    assert!(matches!(xc.log_dirty(domid, u64::MAX), Err(XenError::Argument { .. })));
    assert!(matches!(dirty.clean(&mut bitmap), Err(XenError::LogDirtyNotOurs(_))));
    assert_eq!(read(&mut dirty, &mut bitmap, false), 0, "off: nothing is dirty");

    dirty.enable().unwrap();
    assert!(dirty.is_ours());
    // A second reader may look, and may not take over, clean or end it.
    let mut second = xc.log_dirty(domid, pages).unwrap();
    assert!(matches!(second.enable(), Err(XenError::LogDirtyRefused { .. })));
    assert!(matches!(second.clean(&mut bitmap), Err(XenError::LogDirtyNotOurs(_))));
    second.off().unwrap();
    wait_until_it_runs(&xc, domid);
    std::thread::sleep(Duration::from_secs(1));
    let peeked = read(&mut second, &mut bitmap, false);
    assert!(peeked > 0, "a second of a running guest dirties something");
    drop(second);

    let first = bitmap.clone();
    let cleaned = read(&mut dirty, &mut bitmap, true);
    assert!(cleaned >= peeked, "PEEK took nothing away");
    assert!(first.ones().all(|frame| bitmap.get(frame)));
    println!("dirty after a second: peeked {peeked}, cleaned {cleaned} of {pages} frames");
    {
        let _paused = Paused::new(&xc, domid);
        read(&mut dirty, &mut bitmap, true);
        // Nothing but what dom0's backends put into granted frames (gnttab_mark_dirty), such as packets that arrive.
        let quiet = read(&mut dirty, &mut bitmap, false);
        assert!(quiet < 64, "{quiet} frames of a paused guest are dirty");
        assert_eq!(bitmap.len(), pages);
        // What is written through a mapping does not show (the note at Access::ReadWrite). 0x1000 is the kernel's text.
        let memory = ForeignMemory::open().unwrap();
        let mapping = memory.map(domid, &[0x1000], Access::ReadWrite).unwrap();
        let mut page = [0; PAGE_BYTES];
        mapping.read(0, &mut page).unwrap();
        mapping.write(0, &page).unwrap();
        drop(mapping);
        let _ = read(&mut dirty, &mut bitmap, false);
        assert!(!bitmap.get(0x1000));
        let socket = std::net::UdpSocket::bind("0.0.0.0:0").unwrap();
        socket.set_broadcast(true).unwrap();
        let sent = (0..20).filter(|_| socket.send_to(b"x", "10.9.0.255:9").is_ok()).count();
        std::thread::sleep(Duration::from_secs(1));
        let backends = read(&mut dirty, &mut bitmap, false);
        println!("paused: {quiet} dirty, after {sent} broadcasts {backends}");
    }
    wait_until_it_runs(&xc, domid);
    let start = Instant::now();
    for _ in 0..20 {
        read(&mut dirty, &mut bitmap, false);
    }
    println!("PEEK of {pages} frames: {:?} each", start.elapsed() / 20);
    assert!(bitmap.count_ones() > 0);
    dirty.off().unwrap();
    assert!(!dirty.is_ours());
    assert_eq!(read(&mut dirty, &mut bitmap, false), 0, "off again");

    // Dropping the owner ends it: it can be turned on again.
    dirty.enable().unwrap();
    drop(dirty);
    let mut again = xc.log_dirty(domid, pages).unwrap();
    again.enable().unwrap();
    again.off().unwrap();
}

#[test]
#[ignore = "needs a Xen dom0"]
#[serial]
fn xenstore_is_read_written_and_watched() {
    let (domid, name) = (guest(), guest_name());
    let store = Xenstore::open().unwrap();
    let home = store.domain_path(domid).unwrap();
    assert_eq!(home, format!("/local/domain/{}", domid.get()));
    assert_eq!(
        store.read_string(&format!("{home}/name")).unwrap().as_deref(),
        Some(name.as_str())
    );
    assert!(store.directory(&home).unwrap().contains(&"name".to_string()));
    assert_eq!(store.read("/tool/xen-sys-test/none").unwrap(), None);
    assert!(store.directory("/tool/xen-sys-test/none").unwrap().is_empty());
    assert!(matches!(store.read("a\0b"), Err(XenError::Argument { .. })));
    assert_eq!(
        store.read("not a path!").unwrap_err().raw_os_error(),
        Some(libc::EINVAL)
    );

    let node = format!("/tool/xen-sys-test-{}", std::process::id());
    store.rm(&node).unwrap();
    let readable = |wait_ms| {
        let mut poll = libc::pollfd {
            fd: store.fd().unwrap().as_raw_fd(),
            events: libc::POLLIN,
            revents: 0,
        };
        // SAFETY: one pollfd, whose descriptor is the store's.
        unsafe { libc::poll(&mut poll, 1, wait_ms) == 1 }
    };
    assert!(store.try_event().unwrap().is_none());
    store.watch(&node, "mine").unwrap();
    let event = store.next_event().unwrap();
    assert_eq!(
        (event.path.as_str(), event.token.as_str()),
        (node.as_str(), "mine"),
        "one comes at once"
    );
    assert!(store.try_event().unwrap().is_none());
    assert!(!readable(100));

    store.write(&format!("{node}/key"), b"a\0value").unwrap();
    assert!(readable(5000));
    let event = store.try_event().unwrap().expect("the write");
    assert_eq!(event.path, format!("{node}/key"));
    assert!(store.try_event().unwrap().is_none());
    assert_eq!(
        store.read(&format!("{node}/key")).unwrap().as_deref(),
        Some(&b"a\0value"[..])
    );
    assert_eq!(store.directory(&node).unwrap(), ["key"]);
    store.write(&format!("{node}/empty"), b"").unwrap();
    assert_eq!(store.read(&format!("{node}/empty")).unwrap().as_deref(), Some(&b""[..]));
    store.next_event().unwrap();

    // One thread waits while another works, on one connection.
    std::thread::scope(|scope| {
        let waiter = scope.spawn(|| store.next_event().unwrap());
        for _ in 0..100 {
            store.read(&format!("{node}/key")).unwrap();
        }
        Xenstore::open().unwrap().write(&format!("{node}/key"), b"2").unwrap();
        assert_eq!(waiter.join().unwrap().path, format!("{node}/key"));
    });
    store.unwatch(&node, "mine").unwrap();
    store.rm(&node).unwrap();
    store.rm(&node).unwrap();
    assert_eq!(store.read(&format!("{node}/key")).unwrap(), None);
    assert!(store.try_event().unwrap().is_none(), "no event after unwatch");

    // Closing with a watch set ends the library's thread.
    let second = Xenstore::open().unwrap();
    second.watch(&node, "left").unwrap();
    drop(second);
}

#[test]
#[ignore = "needs a Xen dom0"]
#[serial]
fn libxl_names_and_renames() {
    let (domid, name) = (guest(), guest_name());
    let libxl = Libxl::open().unwrap();
    assert_eq!(libxl.name(domid).unwrap().as_deref(), Some(name.as_str()));
    assert_eq!(libxl.name(DOM0).unwrap().as_deref(), Some("Domain-0"));
    assert_eq!(libxl.domid_of(&name).unwrap(), Some(domid));
    assert_eq!(libxl.domid_of("no-such-guest").unwrap(), None);
    let other = format!("{name}--migratedaway");
    assert!(libxl.rename(domid, "not-its-name", &other).is_err());
    assert_eq!(libxl.name(domid).unwrap().as_deref(), Some(name.as_str()));
    libxl.rename(domid, &name, &other).unwrap();
    assert_eq!(libxl.domid_of(&other).unwrap(), Some(domid));
    libxl.rename(domid, &other, &name).unwrap();
    assert_eq!(libxl.name(domid).unwrap().as_deref(), Some(name.as_str()));
}

#[test]
#[ignore = "needs a Xen dom0"]
#[serial]
fn libxl_resumes_a_suspended_guest() {
    let (xc, domid) = (Xenctrl::open().unwrap(), guest());
    let store = Xenstore::open().unwrap();
    wait_until_it_runs(&xc, domid);
    // As xl asks a guest to suspend.
    let control = format!("{}/control/shutdown", store.domain_path(domid).unwrap());
    store.write(&control, b"suspend").unwrap();
    wait_for("the guest to suspend", Duration::from_secs(60), || {
        info(&xc, domid).shutdown.is_some()
    });
    let suspended = info(&xc, domid);
    assert_eq!(suspended.shutdown, Some(ShutdownReason::Suspend));
    assert_eq!(suspended.state, DomainState::Shutdown(ShutdownReason::Suspend));
    // A suspended guest's memory is readable: the source of every late page.
    let memory = ForeignMemory::open().unwrap();
    assert_eq!(memory.map(domid, &[0x1000, 0x1001], Access::Read).unwrap().mapped(), 2);
    Libxl::open().unwrap().resume(domid).unwrap();
    wait_until_it_runs(&xc, domid);
}

#[test]
#[ignore = "needs a Xen dom0"]
#[serial]
fn libxl_destroys_and_leaves_our_children_alone() {
    let name = format!("{}-second", guest_name());
    let config = std::env::var("XEN_SYS_CONFIG").unwrap_or_else(|_| format!("/root/guests/{}.cfg", guest_name()));
    // Two contexts at once, as two threads would have, and a child of ours the while.
    let (libxl, also) = (Libxl::open().unwrap(), Libxl::open().unwrap());
    let mut child = Command::new("sh").args(["-c", "sleep 1; exit 7"]).spawn().unwrap();
    // Paused and without its interface, so that it has no part in the network.
    let mut create = Command::new("xl");
    create.args(["create", "-q", "-p", &config, &format!("name=\"{name}\""), "vif=[]"]);
    assert!(create.status().unwrap().success());
    let domid = libxl.domid_of(&name).unwrap().expect("just created");
    let xc = Xenctrl::open().unwrap();
    // Its frames are there before it has run for the first time.
    let before = info(&xc, domid);
    assert!(before.paused);
    let memory = ForeignMemory::open().unwrap();
    assert_eq!(memory.map(domid, &[0x1000, 0x1001], Access::Read).unwrap().mapped(), 2);
    libxl.destroy(domid).unwrap();
    wait_for("the domain to go", Duration::from_secs(30), || {
        xc.domain(domid).unwrap().is_none()
    });
    assert_eq!(libxl.domid_of(&name).unwrap(), None);
    assert_eq!(child.wait().unwrap().code(), Some(7), "libxl took our child's status");
    drop(also);
    drop(libxl);
    Libxl::open().unwrap();
}

/// What the crate xenctrl, written by others over the same library, says to the same questions.
#[cfg(xenfold_oracle)]
mod oracle {
    use super::*;
    use xenctrl::XenControl;

    #[test]
    #[ignore = "needs a Xen dom0"]
    #[serial]
    fn agrees_on_domains_and_frames() {
        let domid = guest();
        let (ours, theirs) = (Xenctrl::open().unwrap(), XenControl::new_default().unwrap());
        let mut next = 0;
        let mut seen = 0;
        for info in ours.domains().unwrap() {
            let raw = theirs.domain_getinfolist(next).unwrap().expect("as many domains");
            assert_eq!(u32::from(raw.domain), info.domid.get());
            assert_eq!(raw.handle, info.uuid);
            assert_eq!(raw.max_pages, info.max_pages);
            assert_eq!(raw.flags & 2 != 0, info.hvm);
            assert_eq!(raw.flags & 8 != 0, info.paused);
            assert_eq!(raw.flags & 4 != 0, info.shutdown.is_some());
            assert!(raw.cpu_time >= info.cpu_time_ns, "asked later");
            if info.domid == domid {
                assert_eq!(raw.tot_pages, info.total_pages);
                assert_eq!(
                    theirs.domain_maximum_gpfn(info.domid.get()).unwrap(),
                    ours.maximum_gpfn(info.domid).unwrap()
                );
            }
            next = info.domid.get() + 1;
            seen += 1;
        }
        assert!(seen >= 2);
        println!("{seen} domains agree");
    }

    #[test]
    #[ignore = "needs a Xen dom0"]
    #[serial]
    fn agrees_on_pauses() {
        let domid = guest();
        let (ours, theirs) = (Xenctrl::open().unwrap(), XenControl::new_default().unwrap());
        let paused = || {
            theirs
                .domain_getinfolist(domid.get())
                .unwrap()
                .expect("the guest")
                .flags
                & 8
                != 0
        };
        ours.pause(domid).unwrap();
        assert!(paused());
        theirs.domain_unpause(domid.get()).unwrap();
        assert!(!info(&ours, domid).paused);
        theirs.domain_pause(domid.get()).unwrap();
        assert!(info(&ours, domid).paused);
        ours.unpause(domid).unwrap();
        assert!(!paused());
    }
}

/// Frames of the guest that are zero, as many as this.
fn zero_frames(memory: &ForeignMemory, domid: DomId, count: usize) -> Vec<u64> {
    let mut found = Vec::new();
    for first in (0..1 << 20).step_by(512) {
        let gfns: Vec<u64> = (first..first + 512).collect();
        let mapping = memory.map(domid, &gfns, Access::Read).unwrap();
        for (index, gfn) in gfns.iter().enumerate() {
            let mut page = [1; PAGE_BYTES];
            if mapping.read(index, &mut page).is_ok() && page == [0; PAGE_BYTES] {
                found.push(*gfn);
            }
        }
        if found.len() >= count {
            break;
        }
    }
    found
}

/// Needs a hypervisor with memory sharing (scripts/lab up --hypervisor paging); on another one, that it says so.
#[test]
#[ignore = "needs a Xen dom0"]
#[serial]
fn frames_are_shared_and_become_their_guests_own_again() {
    let (xc, sharing, domid) = (Xenctrl::open().unwrap(), MemSharing::open().unwrap(), guest());
    if let Err(error) = sharing.probe() {
        assert!(matches!(error, SharingError::NotBuilt), "{error}");
        assert!(matches!(sharing.enable(domid, true), Err(SharingError::NotBuilt)));
        assert_eq!(sharing.memory().unwrap().saved, 0);
        eprintln!("SKIPPED: {error}");
        return;
    }
    assert!(matches!(
        sharing.enable(nobody(), true),
        Err(SharingError::NoSuchDomain(_))
    ));
    sharing.enable(domid, true).unwrap();
    let _paused = Paused::new(&xc, domid);
    let memory = ForeignMemory::open().unwrap();
    let before = sharing.memory().unwrap();
    assert!(before.free > 0 && before.free < before.total);
    let mut pairs = Vec::new();
    for gfn in zero_frames(&memory, domid, 64) {
        // Rings and the like are refused.
        match sharing.nominate(domid, gfn) {
            Ok(handle) => pairs.push((gfn, handle)),
            Err(error) => assert!(matches!(error, SharingError::Unsharable), "{error}"),
        }
    }
    let [a, b, c, ..] = pairs[..] else {
        panic!("three frames of zeros")
    };
    assert_eq!(sharing.nominate(domid, a.0).unwrap(), a.1, "nominated already");
    assert_eq!(sharing.references(domid, a.0).unwrap(), Some(1));
    let own = |gfns: &[u64]| {
        let mapping = memory.map(domid, gfns, Access::ReadWrite).unwrap();
        assert_eq!(mapping.mapped(), gfns.len());
    };
    // Mapped writable it is the guest's own, and its handle is worth nothing.
    own(&[c.0]);
    assert_eq!(sharing.references(domid, c.0).unwrap(), None);
    let share =
        |source: (u64, _), client: (u64, _)| sharing.share((domid, source.0, source.1), (domid, client.0, client.1));
    assert!(matches!(share(c, a), Err(SharingError::StaleSource)));
    assert!(matches!(share(a, c), Err(SharingError::StaleClient)));
    share(a, b).unwrap();
    assert_eq!(sharing.references(domid, b.0).unwrap(), Some(2));
    assert_eq!(sharing.nominate(domid, b.0).unwrap(), a.1);
    let shared = sharing.memory().unwrap();
    assert_eq!(shared.saved, before.saved + 1);
    assert!(info(&xc, domid).shared_pages >= 2);
    let mut page = [1; PAGE_BYTES];
    memory
        .map(domid, &[b.0], Access::Read)
        .unwrap()
        .read(0, &mut page)
        .unwrap();
    assert_eq!(page, [0; PAGE_BYTES], "reading leaves it shared");
    assert_eq!(sharing.references(domid, b.0).unwrap(), Some(2));
    own(&pairs.iter().map(|(gfn, _)| *gfn).collect::<Vec<_>>());
    assert_eq!(sharing.references(domid, a.0).unwrap(), None);
    assert_eq!(sharing.memory().unwrap().saved, before.saved);
    match sharing.audit() {
        Ok(mistakes) => assert_eq!(mistakes, 0),
        Err(error) => assert!(matches!(error, SharingError::Unsupported), "{error}"),
    }
}
