//! What this host's daemon knows of a guest's writes: from its earlier migrations, and from reading its memory. Without one each
//! migration begins with what it sees.
use std::path::Path;
use std::time::Duration;

use xenfold::control::{Client, ControlError, SOCKET};
use xenfold::engine::chain;
use xenfold::page_set::PageSet;
use xenfold::policy::{Before, Kept, packed};

/// How long the daemon may take: a migration that knows nothing is better than one that waits.
const PATIENCE: Duration = Duration::from_secs(2);

/// What is known of a guest whose pages lie below `bound`.
pub fn load(uuid: &str, bound: u64) -> Before {
    let before = Before {
        kept: kept(uuid, bound),
        changing: changing(uuid, bound),
    };
    log::debug!(
        "{} pages are known to have been written in earlier migrations, and {} have changed since",
        before.kept.as_ref().map_or(0, Kept::pages),
        before.changing.as_ref().map_or(0, PageSet::len)
    );
    before
}

fn kept(uuid: &str, bound: u64) -> Option<Kept> {
    let bytes = ask(|client| client.model(uuid))??;
    Kept::from_bytes(&bytes, bound)
        .map_err(|error| log::debug!("what is known of the guest's writes is of no use: {error}"))
        .ok()
}

fn changing(uuid: &str, bound: u64) -> Option<PageSet> {
    let bytes = ask(|client| client.changing(uuid, bound))??;
    let mut pages = PageSet::new(bound);
    packed::for_each_run(&bytes, bound, |run| pages.insert_run(run))
        .map_err(|error| log::debug!("which pages of the guest change is of no use: {error}"))
        .ok()?;
    Some(pages)
}

/// Keeps what a migration has taught, for the guest's next one from this host.
pub fn save(uuid: &str, bytes: &[u8]) {
    ask(|client| client.save_model(uuid, bytes));
}

/// `None`: there is no daemon, or it does not do it.
fn ask<T>(question: impl FnOnce(&mut Client) -> Result<T, ControlError>) -> Option<T> {
    let answer = Client::connect(Path::new(SOCKET), Some(PATIENCE)).and_then(|mut client| question(&mut client));
    answer
        .map_err(|error| log::debug!("the daemon does not tell of the guest's writes: {}", chain(&error)))
        .ok()
}
