//! What migrations have taught of a guest's writes, in this host's daemon. Without one each migration begins with what it sees.
use std::path::Path;
use std::time::Duration;

use xenfold::control::{Client, ControlError, SOCKET};
use xenfold::engine::chain;
use xenfold::policy::Kept;

/// How long the daemon may take: a migration that knows nothing is better than one that waits.
const PATIENCE: Duration = Duration::from_secs(2);

/// What is known of a guest whose pages lie below `bound`.
pub fn load(uuid: &str, bound: u64) -> Option<Kept> {
    let bytes = ask(|client| client.model(uuid))??;
    match Kept::from_bytes(&bytes, bound) {
        Ok(kept) => {
            log::debug!(
                "{} pages are known to have been written in earlier migrations",
                kept.pages()
            );
            Some(kept)
        }
        Err(error) => {
            log::debug!("what is known of the guest's writes is of no use: {error}");
            None
        }
    }
}

/// Keeps what a migration has taught, for the guest's next one from this host.
pub fn save(uuid: &str, bytes: &[u8]) {
    ask(|client| client.save_model(uuid, bytes));
}

/// `None`: there is no daemon, or it does not do it.
fn ask<T>(question: impl FnOnce(&mut Client) -> Result<T, ControlError>) -> Option<T> {
    let answer = Client::connect(Path::new(SOCKET), Some(PATIENCE)).and_then(|mut client| question(&mut client));
    answer
        .map_err(|error| log::debug!("the daemon keeps no model of the guest's writes: {}", chain(&error)))
        .ok()
}
