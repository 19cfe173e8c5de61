//! `--verify`: reads frames back and compares them with what was last carried for them.
use super::{EngineError, FrameSource};
use crate::page::{ContentKey, PAGE_SIZE, Pfn};
use crate::table::PageIds;

/// Pages read at a time: 1 MiB.
const BATCH: usize = 256;

/// What reading a guest back has shown.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Verified {
    pub equal: u64,
    /// Not compared, because Xen's toolstack rewrites them.
    pub rewritten_by_xen: u64,
    pub different: u64,
    pub first_different: Option<Pfn>,
}

/// Reads every page that has a row and compares its content id.
pub fn read_back(ids: &PageIds, frames: &mut dyn FrameSource, key: &ContentKey) -> Result<Verified, EngineError> {
    let rewritten = frames.rewritten_by_xen()?;
    let mut verified = Verified::default();
    let mut rows = ids.iter().filter(|(pfn, _)| {
        let skip = rewritten.contains(pfn);
        verified.rewritten_by_xen += u64::from(skip);
        !skip
    });
    let mut pages = vec![0; BATCH * PAGE_SIZE];
    let (mut equal, mut different, mut first_different) = (0, 0, None);
    loop {
        let batch: Vec<_> = rows.by_ref().take(BATCH).collect();
        if batch.is_empty() {
            break;
        }
        let pfns: Vec<Pfn> = batch.iter().map(|(pfn, _)| *pfn).collect();
        let (pages, _) = pages.split_at_mut(pfns.len() * PAGE_SIZE);
        frames.read(&pfns, pages)?;
        for ((pfn, id), now) in batch.iter().zip(key.ids(pages.as_chunks().0)) {
            if now == *id {
                equal += 1;
            } else {
                different += 1;
                first_different = first_different.or(Some(*pfn));
            }
        }
    }
    drop(rows);
    Ok(Verified {
        equal,
        different,
        first_different,
        ..verified
    })
}
