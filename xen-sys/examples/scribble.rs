//! `scribble DOMID`: overwrites every second frame of a guest. For `scripts/lab damage`, on a guest that is thrown away
//! afterwards.
use std::error::Error;

use xen_sys::{Access, DomId, ForeignMemory, PAGE_BYTES, Xenctrl};

const FRAMES: u64 = 1024;

fn main() -> Result<(), Box<dyn Error>> {
    let domid = std::env::args().nth(1).and_then(|number| number.parse().ok());
    let domid = domid.and_then(DomId::new).ok_or("usage: scribble DOMID")?;
    let last = Xenctrl::open()?.maximum_gpfn(domid)?;
    let memory = ForeignMemory::open()?;
    let mut written = 0_u64;
    for first in (0..=last).step_by(2 * FRAMES as usize) {
        let gfns: Vec<u64> = (first..=last).step_by(2).take(FRAMES as usize).collect();
        let mapping = memory.map(domid, &gfns, Access::ReadWrite)?;
        for (index, gfn) in gfns.iter().enumerate() {
            let mut page = [0x5c; PAGE_BYTES];
            page[..8].copy_from_slice(&gfn.to_le_bytes());
            written += u64::from(mapping.write(index, &page).is_ok());
        }
    }
    println!("{written} frames of domain {} overwritten", domid.get());
    Ok(())
}
