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
    let asked = ask(|client| {
        let model = client.model(uuid)?;
        // A daemon of before 2026-11-27 does not know this one.
        Ok((model, client.changing(uuid, bound).unwrap_or_default()))
    });
    let (model, changing) = asked.unwrap_or_default();
    let before = Before {
        kept: model.and_then(|bytes| kept(&bytes, bound)),
        changing: changing.and_then(|bytes| pages(&bytes, bound)),
    };
    log::debug!(
        "{} pages are known from earlier migrations to be written, and {} have changed while the daemon looked",
        before.kept.as_ref().map_or(0, Kept::pages),
        before.changing.as_ref().map_or(0, PageSet::len)
    );
    before
}

fn kept(bytes: &[u8], bound: u64) -> Option<Kept> {
    Kept::from_bytes(bytes, bound)
        .map_err(|error| log::debug!("what is known of the guest's writes is of no use: {error}"))
        .ok()
}

fn pages(bytes: &[u8], bound: u64) -> Option<PageSet> {
    let mut pages = PageSet::new(bound);
    packed::for_each_run(bytes, bound, |run| pages.insert_run(run))
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
