//! Content ids of a record's pages, found by the workers.
use std::ops::Range;
use std::sync::Arc;

use super::pool::{Pending, Pool};
use crate::page::{ContentId, ContentKey, PAGE_SIZE, is_zero};

/// Pages that a worker hashes in one go.
const HASH_PAGES: usize = 128;

/// Ids of pages in their order; `None` for a page of zeros.
pub(super) type Ids = Vec<Option<ContentId>>;

/// Starts hashing the `count` pages of a record; `pages` gives the bytes of some of them.
pub(super) fn ids_of<R: Send + Sync + 'static>(
    record: &Arc<R>,
    count: usize,
    pages: fn(&R, Range<usize>) -> &[u8],
    key: &ContentKey,
    pool: &Pool,
) -> Vec<Pending<Ids>> {
    (0..count)
        .step_by(HASH_PAGES)
        .map(|start| {
            let (record, key) = (record.clone(), key.clone());
            let range = start..count.min(start + HASH_PAGES);
            pool.run(move |_| hash(&key, pages(&record, range)))
        })
        .collect()
}

fn hash(key: &ContentKey, pages: &[u8]) -> Ids {
    let (pages, _) = pages.as_chunks::<PAGE_SIZE>();
    let zero: Vec<bool> = pages.iter().map(|page| is_zero(page)).collect();
    let others = pages.iter().zip(&zero).filter(|(_, zero)| !**zero);
    let mut ids = key.ids(others.map(|(page, _)| page)).into_iter();
    zero.iter().map(|zero| if *zero { None } else { ids.next() }).collect()
}
