//! The oracle of `scripts/lab share`: which pages of guests are equal, and which of them Xen shares. `share_oracle
//! GUEST…`, in a dom0, for guests that are paused: all their frames are read and compared by a hash of 128 bits. Prints
//! JSON: `pages` read, of them `zero`; `shareable`: those whose content another page has; `shared`: those of them whose
//! frame has several pages; `foreign`: pages whose frame has more pages than these guests have of that content, so that a
//! guest that is not named has it as well; `spare`: frames that could be spared; `saved`: frames that are, by Xen's counter.
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
    let [mut shareable, mut shared, mut spare, mut foreign] = [0_u64; 4];
    for equal in found.values() {
        let count = equal.len() as u64;
        for (domid, gfn) in equal {
            let references = sharing.references(*domid, *gfn)?.map_or(1, u64::from);
            foreign += u64::from(references > count);
            shared += u64::from(count > 1 && references > 1);
        }
        spare += count - 1;
        shareable += if count > 1 { count } else { 0 };
    }
    println!(
        r#"{{"pages": {pages}, "zero": {zero}, "shareable": {shareable}, "shared": {shared}, "foreign": {foreign}, "spare": {spare}, "saved": {}}}"#,
        sharing.memory()?.saved
    );
    Ok(())
}
