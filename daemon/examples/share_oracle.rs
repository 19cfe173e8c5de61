//! The oracle of `scripts/lab share`: which pages of guests are equal, and which of them Xen shares. `share_oracle
//! GUEST…`, in a dom0, for guests that are paused: all their frames are read and compared by a hash of 128 bits. Prints
//! JSON: `pages` read, of them `zero`; `shareable`: those whose content another page has; `shared`: those of them whose
//! frame has several pages; `spare`: frames that could be spared; `saved`: frames that are, by Xen's counter.
use std::collections::HashMap;

use xen_sys::{Access, DomId, ForeignMemory, Libxl, MemSharing, PAGE_BYTES, Xenctrl};
use xenfold::page::{ContentId, ContentKey, is_zero};

type Failure = Box<dyn std::error::Error>;

/// Frames that are mapped at a time.
const BATCH: u64 = 1024;

/// Frames at the end of a guest's address space, behind a hole.
const FEW_FRAMES: u64 = 256;

fn main() -> Result<(), Failure> {
    let (xen, sharing, libxl) = (Xenctrl::open()?, MemSharing::open()?, Libxl::open()?);
    let memory = ForeignMemory::open()?;
    let key = ContentKey::new([7; 32]);
    let mut found: HashMap<ContentId, Vec<(DomId, u64)>> = HashMap::new();
    let [mut pages, mut zero] = [0_u64; 2];
    for name in std::env::args().skip(1) {
        let domid = libxl
            .domid_of(&name)?
            .ok_or_else(|| format!("there is no guest {name}"))?;
        let info = xen.domain(domid)?.ok_or("gone")?;
        if !info.paused {
            return Err(format!("guest {name} is not paused").into());
        }
        let owned = info.total_pages + info.shared_pages;
        let (end, mut of_guest) = (xen.maximum_gpfn(domid)? + 1, 0);
        for first in (0..end).step_by(BATCH as usize) {
            let gfns: Vec<u64> = (first..end.min(first + BATCH)).collect();
            let mapping = memory.map(domid, &gfns, Access::Read)?;
            let before = of_guest;
            for (index, gfn) in gfns.iter().enumerate() {
                let mut page = [0; PAGE_BYTES];
                if mapping.read(index, &mut page).is_ok() {
                    of_guest += 1;
                    zero += u64::from(is_zero(&page));
                    found.entry(key.id(&page)).or_default().push((domid, *gfn));
                }
            }
            if of_guest == before && of_guest + FEW_FRAMES >= owned {
                break;
            }
        }
        pages += of_guest;
    }
    let [mut shareable, mut shared, mut spare] = [0_u64; 3];
    for equal in found.values().filter(|equal| equal.len() > 1) {
        shareable += equal.len() as u64;
        spare += equal.len() as u64 - 1;
        for (domid, gfn) in equal {
            let references = sharing.references(*domid, *gfn)?;
            shared += u64::from(references.is_some_and(|references| references > 1));
        }
    }
    println!(
        r#"{{"pages": {pages}, "zero": {zero}, "shareable": {shareable}, "shared": {shared}, "spare": {spare}, "saved": {}}}"#,
        sharing.memory()?.saved
    );
    Ok(())
}
