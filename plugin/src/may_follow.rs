//! Whether pages of a guest may follow it, as this host sees it.
use xen_sys::{DomainInfo, Paging, Xenctrl, hvm_param};
use xenfold::wire::EarlyOut;

use crate::guest::{self, Guest};

/// Why no page of this guest can follow it; `None`: nothing is known here that speaks against it. `xl`: the command line of
/// the xl that migrates it.
pub fn refusal(guest: Option<&Guest>, xl: &[String]) -> Option<&'static str> {
    // xl takes any beginning of the word for it.
    if xl
        .iter()
        .any(|word| word.len() > 2 && "--debug".starts_with(word.as_str()))
    {
        return Some("`xl migrate --debug` compares all of its memory before it is started; leave --debug out");
    }
    let Some(info) = guest.and_then(info) else {
        return Some("xenfold does not know the guest: its name is not on xl's command line");
    };
    of_kind(&info)
}

/// The same of a guest that is looked at apart from a migration.
pub fn of_kind(info: &DomainInfo) -> Option<&'static str> {
    if !info.hvm {
        Some("it is a PV guest, whose page tables Xen's toolstack rewrites; only HVM and PVH guests can")
    } else if !info.hap {
        Some("it has no nested paging; set hap=1 in its configuration and start it again")
    } else if info.max_vcpu_id.is_some_and(|highest| highest >= Paging::MOST_REQUESTS) {
        Some("it has more than 8 processors: Xen has no room for what all of them may wait for at once")
    } else {
        None
    }
}

/// Whether it is known to be a PV guest.
pub fn is_pv(guest: &Guest) -> bool {
    info(guest).is_some_and(|info| !info.hvm)
}

/// Pages of a guest that have not come yet from where it was before. Saved or migrated now it would lose them.
pub fn still_late(guest: &Guest) -> u64 {
    info(guest).map_or(0, |info| info.paged_pages)
}

/// What the destination has to know to take late pages out of the guest before it is suspended. `None`: that cannot be done.
pub fn early(guest: &Guest) -> Option<EarlyOut> {
    let xen = Xenctrl::open().ok()?;
    let info = info(guest)?;
    let param = |index| xen.hvm_param(guest.domid, index).ok();
    // Xen would not find pages that it maps when it loads the processors' state (xen/arch/x86/hvm/viridian), and does
    // without them from then on.
    if param(hvm_param::VIRIDIAN).is_some_and(|features| features != 0) {
        return None;
    }
    Some(EarlyOut {
        ring_page: param(hvm_param::PAGING_RING_PFN).filter(|pfn| *pfn != 0)?,
        pages: info.total_pages,
        highest_page: xen.maximum_gpfn(guest.domid).ok()?,
        never: guest::REWRITTEN.iter().filter_map(|index| param(*index)).collect(),
    })
}

fn info(guest: &Guest) -> Option<DomainInfo> {
    Xenctrl::open().ok()?.domain(guest.domid).ok()?
}

#[cfg(test)]
mod tests {
    use xen_sys::{DomId, DomainState};

    use super::*;

    #[test]
    fn reasons_are_named() {
        let words = |line: &str| line.split(' ').map(str::to_owned).collect::<Vec<_>>();
        for word in ["--debug", "--deb", "--d"] {
            let debug = refusal(None, &words(&format!("xl migrate {word} -s xenfold-ssh g h")));
            assert!(debug.is_some_and(|why| why.contains("--debug")), "{word}: {debug:?}");
        }
        let unknown = refusal(None, &words("xl migrate g h"));
        assert!(unknown.is_some_and(|why| why.contains("does not know")), "{unknown:?}");
        let of = |hvm, hap| of_kind(&guest(hvm, hap));
        assert!(of(false, false).is_some_and(|why| why.starts_with("it is a PV guest")));
        assert!(
            of(true, false).is_some_and(|why| why.contains("set hap=1")),
            "on shadow page tables"
        );
        assert_eq!(of(true, true), None);
        let of_size = |vcpus: u32| {
            of_kind(&DomainInfo {
                max_vcpu_id: Some(vcpus - 1),
                ..guest(true, true)
            })
        };
        assert!(of_size(8).is_none() && of_size(9).is_some_and(|why| why.contains("more than 8 processors")));
    }

    fn guest(hvm: bool, hap: bool) -> DomainInfo {
        DomainInfo {
            domid: DomId::new(7).unwrap(),
            uuid: [7; 16],
            hvm,
            hap,
            state: DomainState::Running,
            paused: false,
            shutdown: None,
            dying: false,
            total_pages: 100,
            max_pages: 100,
            shared_pages: 0,
            paged_pages: 0,
            claimed_pages: 0,
            max_vcpu_id: Some(0),
            cpu_time_ns: 1,
        }
    }
}
