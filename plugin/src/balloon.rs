//! `--balloon`: a guest gives up the memory that it does not use before it is migrated, and gets its size back afterwards.
//!
//! A guest's size is what xenstore's `memory/target` says: its balloon driver follows that, and `xl mem-set` writes nothing
//! else that the guest sees. Xen's own limit and `memory/static-max` stay as they are. What the guest could give up only
//! the guest knows: an agent in it has to tell ([`told_kib`]).
//!
//! It is done while xl waits for the other host's banner. By then xl has read the guest's configuration, the target in it
//! (save_domain_core_begin in xl_migrate.c, before it starts us), and the other host's libxl writes that target
//! (libxl__build_post): a guest that arrives finds its old size there and grows to it by itself. Here the target is put back
//! unless the guest has left; should this process be killed first, whoever reads its record does it.
use std::fmt;
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use parking_lot::Mutex;
use xen_sys::{DomId, Xenctrl, Xenstore};
use xenfold::report::BalloonFigures;

use crate::guest::Guest;

/// The guest keeps one part in so many of what it uses beside it, and at least so much, to live on until it is there.
const SLACK: u64 = 8;
const LEAST_SLACK_KIB: u64 = 32 << 10;

/// Less is not worth the guest's trouble.
const WORTH_KIB: u64 = 16 << 10;

/// How often it is looked how far the guest is, how long it may stand still, and how long all may take.
const LOOK_EVERY: Duration = Duration::from_millis(50);
const STALLED: Duration = Duration::from_secs(2);
const PATIENCE: Duration = Duration::from_secs(20);

const TARGET: &str = "memory/target";
const KIB_PER_PAGE: u64 = 4;

/// A guest's size, as the toolstack sets it and Xen counts it.
pub trait GuestSize {
    /// A node of the guest's in xenstore.
    fn node(&self, name: &str) -> Result<Option<String>>;

    fn set_target(&self, kib: u64) -> Result<()>;

    /// Pages that it has.
    fn pages(&self) -> Result<u64>;
}

/// A guest of this host.
pub struct HostGuest {
    xen: Xenctrl,
    store: Xenstore,
    domid: DomId,
    path: String,
}

impl HostGuest {
    pub fn open(domid: DomId) -> Result<HostGuest> {
        let (xen, store) = (Xenctrl::open()?, Xenstore::open()?);
        let path = store.domain_path(domid)?;
        Ok(HostGuest {
            xen,
            store,
            domid,
            path,
        })
    }
}

impl GuestSize for HostGuest {
    fn node(&self, name: &str) -> Result<Option<String>> {
        Ok(self.store.read_string(&format!("{}/{name}", self.path))?)
    }

    fn set_target(&self, kib: u64) -> Result<()> {
        Ok(self
            .store
            .write(&format!("{}/{TARGET}", self.path), kib.to_string().as_bytes())?)
    }

    fn pages(&self) -> Result<u64> {
        let info = self.xen.domain(self.domid)?.context("the guest is gone")?;
        Ok(info.total_pages)
    }
}

/// What the guest says it could give up, in KiB; `None`: it does not say. xe-guest-utilities write what Linux calls
/// MemAvailable to `data/meminfo_free`, which an xl guest may write; Qubes' meminfo-writer lines of /proc/meminfo to
/// `memory/meminfo`.
pub fn told_kib(guest: &dyn GuestSize) -> Result<Option<u64>> {
    if let Some(free) = guest.node("data/meminfo_free")? {
        return Ok(free.trim().parse().ok());
    }
    let Some(text) = guest.node("memory/meminfo")? else {
        return Ok(None);
    };
    let line = |name: &str| {
        let value = text.lines().find_map(|line| line.trim().strip_prefix(name))?;
        value
            .strip_prefix(':')?
            .trim()
            .trim_end_matches("kB")
            .trim()
            .parse()
            .ok()
    };
    let all = |names: [&str; 3]| {
        names
            .into_iter()
            .try_fold(0u64, |sum, name| sum.checked_add(line(name)?))
    };
    Ok(line("MemAvailable").or_else(|| all(["MemFree", "Buffers", "Cached"])))
}

/// The target for a guest that has `target` and could give up `free`, all in KiB; `None`: nothing worth it.
fn goal_kib(target: u64, free: u64, floor: u64) -> Option<u64> {
    let used = target.saturating_sub(free);
    let goal = used.saturating_add((used / SLACK).max(LEAST_SLACK_KIB)).max(floor);
    (goal.saturating_add(WORTH_KIB) <= target).then_some(goal)
}

/// A guest that was made smaller.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Shrunk {
    /// The target that it had, and the one that it was given.
    pub before_kib: u64,
    pub target_kib: u64,
    /// Pages that it gave up.
    pub pages: u64,
    pub time: Duration,
}

/// Why a guest goes as large as it is.
#[derive(Debug, PartialEq, Eq)]
pub enum Kept {
    /// It does not say what it uses.
    Silent,
    /// It has no target.
    NoTarget,
    /// It uses nearly all that it may be shrunk by.
    Used,
    /// It was told, and gave nothing up.
    NoAnswer,
    Stopped,
}

impl fmt::Display for Kept {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Kept::Silent => {
                "it does not tell how much memory it could give up (an agent in it has to write that to data/meminfo_free in \
                 xenstore, in KiB)"
            }
            Kept::NoTarget => "xenstore has no memory/target of it that is a number",
            Kept::Used => "it uses what it has, or is at the floor",
            Kept::NoAnswer => "it gives nothing up: no balloon driver runs in it",
            Kept::Stopped => "the migration is being ended",
        })
    }
}

/// Has the guest give up what it does not use, down to `floor_kib`, and waits for it, not long. `note` is told the target
/// that it had before anything is changed. `stop`: somebody wants the migration to end.
pub fn shrink(
    guest: &dyn GuestSize,
    floor_kib: u64,
    note: &mut dyn FnMut(u64) -> Result<()>,
    stop: &dyn Fn() -> bool,
) -> Result<Result<Shrunk, Kept>> {
    let target = guest.node(TARGET)?.and_then(|target| target.trim().parse().ok());
    let Some(before_kib) = target else {
        return Ok(Err(Kept::NoTarget));
    };
    let Some(free) = told_kib(guest)? else {
        return Ok(Err(Kept::Silent));
    };
    let Some(goal) = goal_kib(before_kib, free, floor_kib) else {
        return Ok(Err(Kept::Used));
    };
    note(before_kib)?;
    let (begin, had) = (Instant::now(), guest.pages()?);
    let wanted = (before_kib - goal) / KIB_PER_PAGE;
    guest.set_target(goal)?;
    // Whatever fails from here on: it is not left small.
    let gave = match wait(guest, had, wanted, stop) {
        Ok(gave) => gave,
        Err(error) => {
            guest.set_target(before_kib)?;
            return Err(error);
        }
    };
    if gave == 0 || stop() {
        guest.set_target(before_kib)?;
        return Ok(Err(if stop() { Kept::Stopped } else { Kept::NoAnswer }));
    }
    // What it could not give up it is not pressed for any more.
    let target_kib = goal.max(before_kib.saturating_sub(gave * KIB_PER_PAGE));
    if target_kib != goal
        && let Err(error) = guest.set_target(target_kib)
    {
        guest.set_target(before_kib)?;
        return Err(error);
    }
    Ok(Ok(Shrunk {
        before_kib,
        target_kib,
        pages: gave,
        time: begin.elapsed(),
    }))
}

/// Waits until the guest, which had `had` pages, has given `wanted` up or does not go on. How many it gave.
fn wait(guest: &dyn GuestSize, had: u64, wanted: u64, stop: &dyn Fn() -> bool) -> Result<u64> {
    let (begin, mut moved, mut gave) = (Instant::now(), Instant::now(), 0);
    while gave < wanted && moved.elapsed() < STALLED && begin.elapsed() < PATIENCE && !stop() {
        thread::sleep(LOOK_EVERY);
        let now = had.saturating_sub(guest.pages()?);
        if now > gave {
            (gave, moved) = (now, Instant::now());
        }
    }
    Ok(gave)
}

/// Gives the guest the size back that it had, unless somebody else has set another one since.
pub fn restore(guest: &dyn GuestSize, shrunk: Shrunk) -> Result<()> {
    let now = guest.node(TARGET)?;
    if now.and_then(|target| target.trim().parse().ok()) == Some(shrunk.target_kib) {
        guest.set_target(shrunk.before_kib)?;
    }
    Ok(())
}

/// The same for a guest whose agent was killed: what it had stands in the agent's record. One that is larger meanwhile
/// was set so by somebody else. Whether there was anything to do.
pub fn restore_left(guest: &dyn GuestSize, before_kib: u64) -> Result<bool> {
    let now: Option<u64> = guest.node(TARGET)?.and_then(|target| target.trim().parse().ok());
    let small = now.is_some_and(|now| now < before_kib);
    if small {
        guest.set_target(before_kib)?;
    }
    Ok(small)
}

/// The same, and says what came of it. Whether the guest was small; `None`: it may be so still.
pub fn give_back_left(guest: &Guest, before_kib: u64) -> Option<bool> {
    let (name, mib) = (&guest.name, before_kib >> 10);
    match HostGuest::open(guest.domid).and_then(|size| restore_left(&size, before_kib)) {
        Ok(small) => {
            if small {
                say!(
                    "xenfold: an earlier migration of guest {name} was killed and left it small; it has its {mib} MiB back"
                );
            }
            Some(small)
        }
        Err(error) => {
            say!(
                "xenfold: an earlier migration of guest {name} was killed and may have left it small: {error:#}. Give it its size \
                 back with `xl mem-set {name} {mib}`."
            );
            None
        }
    }
}

/// What became of the wish to make a guest smaller, from when it is wished until the migration has ended.
#[derive(Clone, Default)]
pub struct Ballooning(Arc<Mutex<Option<(DomId, Shrunk)>>>);

impl Ballooning {
    /// Makes the guest smaller, or says why not. Then the guest's size is known.
    pub fn shrink(
        &self,
        guest: &Guest,
        floor_kib: u64,
        note: &mut dyn FnMut(u64) -> Result<()>,
        stop: &dyn Fn() -> bool,
    ) -> Option<(Shrunk, u64)> {
        let size = HostGuest::open(guest.domid);
        let shrunk = size.and_then(|size| Ok((shrink(&size, floor_kib, note, stop)?, size)));
        let why = match shrunk {
            Ok((Ok(shrunk), size)) => {
                *self.0.lock() = Some((guest.domid, shrunk));
                match size.pages() {
                    Ok(pages) => return Some((shrunk, pages)),
                    Err(error) => log::warn!("how large guest {} is now is not known: {error:#}", guest.name),
                }
                return None;
            }
            Ok((Err(kept), _)) => kept.to_string(),
            Err(error) => format!("{error:#}"),
        };
        say!("xenfold: guest {} keeps its size: {why}", guest.name);
        None
    }

    /// The migration has failed: the guest has its size back here.
    pub fn restore(&self, name: &str) {
        let Some((domid, shrunk)) = self.0.lock().take() else {
            return;
        };
        if let Err(error) = HostGuest::open(domid).and_then(|size| restore(&size, shrunk)) {
            say!(
                "xenfold: guest {name} was made smaller for the migration, and cannot be given its size back: {error:#}. Type \
                 `xl mem-set {name} {}`.",
                shrunk.before_kib >> 10
            );
        }
    }
}

impl From<Shrunk> for BalloonFigures {
    fn from(shrunk: Shrunk) -> BalloonFigures {
        BalloonFigures {
            target_before_bytes: shrunk.before_kib << 10,
            target_bytes: shrunk.target_kib << 10,
            given_up_bytes: (shrunk.pages * KIB_PER_PAGE) << 10,
            time_ms: shrunk.time.as_millis() as u64,
        }
    }
}

#[cfg(test)]
mod tests {
    use std::cell::{Cell, RefCell};
    use std::collections::BTreeMap;

    use super::*;

    /// A guest with a balloon driver that gives up so many pages at each look, down to where it cannot.
    struct Balloon {
        nodes: RefCell<BTreeMap<String, String>>,
        pages: Cell<u64>,
        step: u64,
        least: u64,
        fails: bool,
    }

    const MIB: u64 = 1 << 10;

    fn guest(target_mib: u64, told: Option<(&str, &str)>) -> Balloon {
        let told = told.map(|(name, value)| (name.to_owned(), value.to_owned()));
        let target = (TARGET.to_owned(), (target_mib * MIB).to_string());
        Balloon {
            nodes: RefCell::new(told.into_iter().chain([target]).collect()),
            pages: Cell::new(target_mib * 256),
            step: 40_000,
            least: 0,
            fails: false,
        }
    }

    impl Balloon {
        fn target(&self) -> u64 {
            self.nodes.borrow()[TARGET].parse().unwrap()
        }

        fn shrink(&self, floor_mib: u64) -> Result<Shrunk, Kept> {
            shrink(self, floor_mib * MIB, &mut |_| Ok(()), &|| false).unwrap()
        }
    }

    impl GuestSize for Balloon {
        fn node(&self, name: &str) -> Result<Option<String>> {
            Ok(self.nodes.borrow().get(name).cloned())
        }

        fn set_target(&self, kib: u64) -> Result<()> {
            self.nodes.borrow_mut().insert(TARGET.into(), kib.to_string());
            Ok(())
        }

        fn pages(&self) -> Result<u64> {
            anyhow::ensure!(!self.fails || self.target() == 640 * MIB, "Xen does not answer");
            let pages = self.pages.get();
            let goal = (self.target() / 4).max(self.least);
            self.pages.set(pages.saturating_sub(self.step).max(goal).min(pages));
            Ok(pages)
        }
    }

    const FREE: &str = "data/meminfo_free";

    #[test]
    fn a_guest_gives_up_what_it_does_not_use() {
        let guest = guest(640, Some((FREE, "409600")));
        let shrunk = guest.shrink(128).unwrap();
        // It uses 240 MiB, and keeps an eighth or 32 MiB beside that.
        assert_eq!((shrunk.before_kib, shrunk.target_kib), (640 * MIB, 272 * MIB));
        assert_eq!((shrunk.pages, guest.target()), (368 * 256, 272 * MIB));
        assert_eq!(BalloonFigures::from(shrunk).given_up_bytes, 368 << 20);
        restore(&guest, shrunk).unwrap();
        assert_eq!(guest.target(), 640 * MIB);
    }

    #[test]
    fn not_below_the_floor_and_not_for_little() {
        let lines = "MemTotal: 900 kB\nMemFree: 300000 kB\nBuffers:  100000 kB\nCached: 9600 kB\nSwapTotal: 0 kB\n";
        assert_eq!(
            guest(640, Some(("memory/meminfo", lines)))
                .shrink(512)
                .unwrap()
                .target_kib,
            512 * MIB
        );
        for (floor, free) in [(630, "409600"), (0, "40000"), (0, "0"), (4096, "409600")] {
            let guest = guest(640, Some((FREE, free)));
            assert_eq!(guest.shrink(floor), Err(Kept::Used), "{floor} {free}");
            assert_eq!(guest.target(), 640 * MIB);
        }
        // More free than there is: the guest may say anything.
        let most = u64::MAX.to_string();
        assert_eq!(
            guest(640, Some((FREE, &most))).shrink(100).unwrap().target_kib,
            100 * MIB
        );
    }

    #[test]
    fn a_guest_that_does_not_tell_is_left_alone() {
        for told in [
            None,
            Some((FREE, "much")),
            Some(("memory/meminfo", "123456")),
            Some(("memory/meminfo", "MemFree: 1")),
        ] {
            let guest = guest(640, told);
            assert_eq!(guest.shrink(64), Err(Kept::Silent), "{told:?}");
            assert_eq!(guest.target(), 640 * MIB);
        }
        let guest = guest(640, Some((FREE, "409600")));
        guest.nodes.borrow_mut().insert(TARGET.into(), "".into());
        assert_eq!(guest.shrink(64), Err(Kept::NoTarget));
    }

    #[test]
    fn what_a_guest_cannot_give_up_it_keeps() {
        let stuck = Balloon {
            least: 400 * 256,
            ..guest(640, Some((FREE, "409600")))
        };
        let shrunk = stuck.shrink(64).unwrap();
        assert_eq!((shrunk.target_kib, stuck.target()), (400 * MIB, 400 * MIB));
        let deaf = Balloon {
            least: u64::MAX,
            ..guest(640, Some((FREE, "409600")))
        };
        assert_eq!(deaf.shrink(64), Err(Kept::NoAnswer));
        assert_eq!(deaf.target(), 640 * MIB);
    }

    #[test]
    fn it_has_its_size_back_whatever_goes_wrong() {
        let guest = guest(640, Some((FREE, "409600")));
        let mut noted = None;
        let mut note = |before| {
            noted = Some(before);
            Ok(())
        };
        assert_eq!(shrink(&guest, 0, &mut note, &|| true).unwrap(), Err(Kept::Stopped));
        assert_eq!((guest.target(), noted), (640 * MIB, Some(640 * MIB)));
        // Where it cannot be noted nothing is changed.
        assert!(shrink(&guest, 0, &mut |_| anyhow::bail!("no room"), &|| false).is_err());
        assert_eq!(guest.target(), 640 * MIB);
        let broken = Balloon { fails: true, ..guest };
        assert!(shrink(&broken, 0, &mut |_| Ok(()), &|| false).is_err());
        assert_eq!(broken.target(), 640 * MIB);
    }

    #[test]
    fn a_size_that_somebody_else_set_stays() {
        let guest = guest(640, Some((FREE, "409600")));
        let shrunk = guest.shrink(64).unwrap();
        guest.set_target(300 * MIB).unwrap();
        restore(&guest, shrunk).unwrap();
        assert_eq!(guest.target(), 300 * MIB);
        assert!(restore_left(&guest, 640 * MIB).unwrap());
        assert!(!restore_left(&guest, 500 * MIB).unwrap());
        assert_eq!(guest.target(), 640 * MIB);
    }
}
