//! Frames of a paused guest.
use xen_sys::{Access, DomId, ForeignMemory, Libxl, PAGE_BYTES, Xenctrl};

pub type Failure = Box<dyn std::error::Error>;

/// Frames that are mapped at a time.
const BATCH: u64 = 1024;

/// Frames at the end of a guest's address space, behind a hole.
const FEW_FRAMES: u64 = 256;

/// Gives every frame of the guest to `each`, by its number. Returns who it is. Errors: it is not paused.
pub fn each_frame(name: &str, mut each: impl FnMut(DomId, u64, &[u8; PAGE_BYTES])) -> Result<DomId, Failure> {
    let (xen, memory) = (Xenctrl::open()?, ForeignMemory::open()?);
    let domid = Libxl::open()?
        .domid_of(name)?
        .ok_or_else(|| format!("there is no guest {name}"))?;
    let info = xen.domain(domid)?.ok_or("gone")?;
    if !info.paused {
        return Err(format!("guest {name} is not paused").into());
    }
    let owned = info.total_pages + info.shared_pages;
    let (end, mut found) = (xen.maximum_gpfn(domid)? + 1, 0);
    for first in (0..end).step_by(BATCH as usize) {
        let gfns: Vec<u64> = (first..end.min(first + BATCH)).collect();
        let mapping = memory.map(domid, &gfns, Access::Read)?;
        let before = found;
        for (index, gfn) in gfns.iter().enumerate() {
            let mut page = [0; PAGE_BYTES];
            if mapping.read(index, &mut page).is_ok() {
                found += 1;
                each(domid, *gfn, &page);
            }
        }
        if found == before && found + FEW_FRAMES >= owned {
            break;
        }
    }
    Ok(domid)
}
