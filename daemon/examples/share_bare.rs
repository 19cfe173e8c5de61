//! What `scripts/lab arrive` is compared with: `share_bare FIRST SECOND`, in a dom0, for two guests that are paused, with
//! no daemon beside it. They run while it shares, as they do beside the daemon. Each page of the second guest whose content the first one has, other than zeros, is shared with it
//! in the barest way that is right: nominate both, map both, compare all bytes, share. Prints JSON: `pairs` of equal pages,
//! how many were `shared`, and the milliseconds (`ms`) that this took, without those for finding them.
#[path = "support/frames.rs"]
mod frames;

use std::collections::HashMap;
use std::time::Instant;

use frames::{Failure, each_frame};
use xen_sys::{Access, ForeignMemory, MemSharing, PAGE_BYTES, Xenctrl};
use xenfold::page::{ContentId, ContentKey, is_zero};

fn main() -> Result<(), Failure> {
    let mut names = std::env::args().skip(1);
    let (Some(first), Some(second), None) = (names.next(), names.next(), names.next()) else {
        return Err("usage: share_bare FIRST SECOND".into());
    };
    let key = ContentKey::new([7; 32]);
    let mut of_first: HashMap<ContentId, u64> = HashMap::new();
    let a = each_frame(&first, |_, gfn, page| {
        if !is_zero(page) {
            of_first.entry(key.id(page)).or_insert(gfn);
        }
    })?;
    let mut pairs = Vec::new();
    let b = each_frame(&second, |_, gfn, page| {
        pairs.extend(of_first.get(&key.id(page)).map(|equal| (*equal, gfn)));
    })?;
    let (sharing, memory) = (MemSharing::open()?, ForeignMemory::open()?);
    sharing.enable(a, true)?;
    sharing.enable(b, true)?;
    let xen = Xenctrl::open()?;
    xen.unpause(a)?;
    xen.unpause(b)?;
    let mut shared = 0_u64;
    let begin = Instant::now();
    for (one, two) in &pairs {
        let (Ok(source), Ok(client)) = (sharing.nominate(a, *one), sharing.nominate(b, *two)) else {
            continue;
        };
        let (mut left, mut right) = ([0; PAGE_BYTES], [0; PAGE_BYTES]);
        let read = memory.map(a, &[*one], Access::Read)?.read(0, &mut left).is_ok()
            && memory.map(b, &[*two], Access::Read)?.read(0, &mut right).is_ok();
        if read && left == right {
            shared += u64::from(sharing.share((a, *one, source), (b, *two, client)).is_ok());
        }
    }
    let ms = begin.elapsed().as_millis();
    println!(r#"{{"pairs": {}, "shared": {shared}, "ms": {ms}}}"#, pairs.len());
    Ok(())
}
