//! Paging against a running Xen that was built with it: pages leave a guest, and come back when it touches them or when
//! they are pushed. As tests/lab.rs, whose head says how; `scripts/lab up --hypervisor paging`.
use std::collections::HashMap;
use std::os::fd::AsFd;
use std::time::{Duration, Instant};

use serial_test::serial;
use xen_sys::{Access, DomId, ForeignMemory, Libxl, Loaded, PAGE_BYTES, Paging, PagingError, Xenctrl};

type Page = Box<[u8; PAGE_BYTES]>;

fn guest() -> DomId {
    let name = std::env::var("XEN_SYS_GUEST").expect("XEN_SYS_GUEST names the guest to test with");
    let libxl = Libxl::open().unwrap();
    libxl.domid_of(&name).unwrap().expect("the guest is there")
}

fn paged(xen: &Xenctrl, domid: DomId) -> u64 {
    xen.domain(domid).unwrap().unwrap().paged_pages
}

/// Evicts pages of a paused guest, and returns what they held.
fn evict(paging: &Paging, xen: &Xenctrl, gfns: impl Iterator<Item = u64>) -> HashMap<u64, Page> {
    let (domid, memory) = (paging.domid(), ForeignMemory::open().unwrap());
    let total = xen.domain(domid).unwrap().unwrap().total_pages;
    let mut kept = HashMap::new();
    for gfn in gfns {
        if !paging.nominate(gfn).unwrap() {
            continue;
        }
        let mut page = Box::new([0; PAGE_BYTES]);
        memory
            .map(domid, &[gfn], Access::Read)
            .unwrap()
            .read(0, &mut page)
            .unwrap();
        if paging.evict(gfn).unwrap() {
            if kept.is_empty() {
                paging.claim(total).unwrap();
            }
            kept.insert(gfn, page);
        }
    }
    kept
}

fn readable(paging: &Paging, limit: Duration) -> bool {
    use std::os::fd::AsRawFd;
    let mut polled = libc::pollfd {
        fd: paging.as_fd().as_raw_fd(),
        events: libc::POLLIN,
        revents: 0,
    };
    // SAFETY: one structure that lives through the call.
    unsafe { libc::poll(&mut polled, 1, limit.as_millis() as i32) > 0 }
}

/// Serves what is asked for until `done`.
fn serve(paging: &mut Paging, kept: &mut HashMap<u64, Page>, mut done: impl FnMut(u32) -> bool) -> u32 {
    let mut served = 0;
    while !done(served) {
        if readable(paging, Duration::from_millis(20)) {
            paging.take_notice().unwrap();
        }
        for request in paging.requests() {
            if let Some(page) = kept.remove(&request.gfn).filter(|_| !request.dropped) {
                assert_eq!(paging.load(request.gfn, &page).unwrap(), Loaded::Filled);
                served += 1;
            }
            paging.answer(&request).unwrap();
        }
        assert_eq!(paging.unanswered(), 0);
    }
    served
}

fn push(paging: &Paging, kept: &mut HashMap<u64, Page>) {
    for (gfn, page) in kept.drain() {
        paging.load(gfn, &page).unwrap();
    }
}

#[test]
#[ignore = "needs a Xen dom0 with paging"]
#[serial]
fn the_hypervisor_can_page() {
    Paging::probe().unwrap();
}

#[test]
#[ignore = "needs a Xen dom0 without paging"]
#[serial]
fn the_hypervisor_cannot_page() {
    assert!(matches!(Paging::probe(), Err(PagingError::NotBuilt)));
}

#[test]
#[ignore = "needs a Xen dom0 with paging"]
#[serial]
fn pages_leave_and_come_back() {
    let (xen, domid) = (Xenctrl::open().unwrap(), guest());
    xen.pause(domid).unwrap();
    let before = xen.domain(domid).unwrap().unwrap().total_pages;
    let mut paging = Paging::enable(domid).unwrap();
    assert!(matches!(Paging::enable(domid), Err(PagingError::HasPager)));
    let start = Instant::now();
    let mut kept = evict(&paging, &xen, 0x800..0x2800);
    let evicted = kept.len() as u64;
    println!("{evicted} pages evicted in {:?}", start.elapsed());
    assert!(evicted > 4000, "{evicted}");
    assert_eq!(paged(&xen, domid), evicted);
    let one = *kept.keys().next().unwrap();
    let page = kept.remove(&one).unwrap();
    assert_eq!(paging.load(one, &page).unwrap(), Loaded::Filled);
    assert_eq!(paging.load(one, &page).unwrap(), Loaded::NotPaged);
    xen.unpause(domid).unwrap();

    let begin = Instant::now();
    let served = serve(&mut paging, &mut kept, |served| {
        served >= 20 || begin.elapsed() > Duration::from_secs(60)
    });
    println!("{served} pages were asked for in {:?}", begin.elapsed());
    assert!(served > 0);

    // Another pager, with processors that may wait for the first one's answers.
    xen.pause(domid).unwrap();
    drop(paging);
    let mut paging = Paging::take_over(domid).unwrap();
    let start = Instant::now();
    let pushed = kept.len();
    push(&paging, &mut kept);
    println!("{pushed} pages pushed in {:?}", start.elapsed());
    assert_eq!(paged(&xen, domid), 0);
    paging.claim(0).unwrap();
    xen.unpause(domid).unwrap();
    let begin = Instant::now();
    serve(&mut paging, &mut kept, |_| begin.elapsed() > Duration::from_secs(1));
    paging.disable().unwrap();
    let after = xen.domain(domid).unwrap().unwrap();
    assert_eq!((after.total_pages, after.paged_pages), (before, 0));
    // Paging can be had again, and the guest still has its ring's page.
    Paging::enable(domid).unwrap().disable().unwrap();
    let cpu = after.cpu_time_ns;
    std::thread::sleep(Duration::from_secs(3));
    assert!(xen.domain(domid).unwrap().unwrap().cpu_time_ns > cpu, "the guest runs");
}
