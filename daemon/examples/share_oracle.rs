//! The oracle of `scripts/lab share`: which pages of guests are equal, and which of them Xen shares. `share_oracle
//! GUEST…`, in a dom0, for guests that are paused: all their frames are read and compared by a hash of 128 bits. Prints
//! JSON: `pages` read, of them `zero`; `shareable`: those whose content another page has; `shared`: those of them whose
//! frame has several pages; `spare`: frames that could be spared; `saved`: frames that are, by Xen's counter.
#[path = "support/frames.rs"]
mod frames;

use std::collections::HashMap;

use frames::{Failure, each_frame};
use xen_sys::{DomId, MemSharing};
use xenfold::page::{ContentId, ContentKey, is_zero};

fn main() -> Result<(), Failure> {
    let sharing = MemSharing::open()?;
    let key = ContentKey::new([7; 32]);
    let mut found: HashMap<ContentId, Vec<(DomId, u64)>> = HashMap::new();
    let [mut pages, mut zero] = [0_u64; 2];
    for name in std::env::args().skip(1) {
        each_frame(&name, |domid, gfn, page| {
            pages += 1;
            zero += u64::from(is_zero(page));
            found.entry(key.id(page)).or_default().push((domid, gfn));
        })?;
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
