//! The template that a group makes by itself: contents that several of its guests have had, by page count (template-based
//! deduplication, `Template pages are selected based on number of occurrences of each page across multiple VMs`).
use std::cmp::Reverse;
use std::collections::HashSet;

use xenfold::page::ContentId;

use super::core::PAGE_BYTES;
use super::error::StoreError;
use super::group::Group;

/// Its name. Nobody else may give this name to a template.
pub const COMMON: &str = "common";

/// In how many images a content must be.
const IMAGES: u16 = 2;

/// It takes 1 part in so many of the store at most; contents of the most images are in it first.
const STORE_SHARE: u64 = 2;

impl Group {
    /// Makes the template anew. Does nothing where fewer than two guests have images and there is none. Costs a look at
    /// each content of the group.
    pub fn renew_common(&self, saved_unix_s: u64) -> Result<(), StoreError> {
        let own: HashSet<ContentId> = match self.read_image(COMMON, true)? {
            Some(image) => image.pages.into_iter().map(|(_, id)| id).collect(),
            None => HashSet::new(),
        };
        let guests = self.images()?.iter().filter(|image| !image.template).count();
        if guests < usize::from(IMAGES) && own.is_empty() {
            return Ok(());
        }
        let mut common: Vec<(u16, ContentId)> = (self.core.state.read().named(IMAGES).into_iter())
            .map(|(id, images)| (images - u16::from(own.contains(&id)), id))
            .filter(|(images, _)| *images >= IMAGES)
            .collect();
        common.sort_unstable_by_key(|(images, id)| (Reverse(*images), id.0));
        let most = self.core.shared.budget.limit_bytes() / STORE_SHARE / PAGE_BYTES;
        common.truncate(usize::try_from(most).unwrap_or(usize::MAX));
        let ids: Vec<ContentId> = common.into_iter().map(|(_, id)| id).collect();
        if ids.is_empty() {
            return self.remove_template(COMMON).map(drop);
        }
        if ids.len() == own.len() && ids.iter().all(|id| own.contains(id)) {
            return Ok(());
        }
        self.add_template(COMMON, &ids, saved_unix_s)
    }
}
