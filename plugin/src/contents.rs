//! What this host's daemon holds, as the engine wants it.
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::Result;
use crossbeam_channel::{Receiver, SendTimeoutError, Sender, bounded};
use parking_lot::Mutex;
use xenfold::control::{Client, ControlError, HoldingsFrom, Offer, Opened};
use xenfold::engine::{Contents, chain};
use xenfold::page::{ContentId, PAGE_SIZE, Pfn};
use xenfold::table::PageIds;
use xenfold::wire::{Held, have_bodies};

/// How long the daemon may take for one answer. A migration does not wait longer for it.
const PATIENCE: Duration = Duration::from_secs(5);

/// How long putting away the last pages may take when the migration is over.
const LAST_PAGES: Duration = Duration::from_secs(30);

/// Records that wait for the daemon to keep them.
const KEEP_DEPTH: usize = 1;

/// A migration waits for the daemon to keep a record for 1 part in so many of its time. What cannot be given then is not
/// kept.
const KEEP_SHARE: u32 = 20;

/// The most contents told of: 16 GiB of pages.
const MAX_TOLD: usize = 4 << 20;

/// The daemon's contents for one guest's sharing group. When the daemon fails it holds nothing any more; the migration
/// goes on without it.
pub struct DaemonContents {
    connect: Box<dyn Fn() -> Result<Client, ControlError> + Send + Sync>,
    /// Connections that are not in use.
    idle: Mutex<Vec<Client>>,
    lost: Arc<AtomicBool>,
    lookup_keys: Vec<u64>,
    held: Held,
    image: PageIds,
    /// The daemon keeps contents.
    keeps: bool,
    /// The daemon has a use for the guest's image.
    takes_image: bool,
    keep: Sender<Keep>,
    start: Instant,
    /// Time spent waiting until records were taken, and pages that were not.
    waited: Mutex<(Duration, u64)>,
}

/// For the thread that gives pages to the daemon.
enum Keep {
    Pages(Vec<u8>, Vec<ContentId>),
    /// Everything before this has been given.
    Flush(Sender<()>),
}

impl DaemonContents {
    /// Binds to the guest's group. At the destination `offer` is what the source has. `None`: the daemon knows of
    /// no contents. Errors: there is no daemon, or it refuses the offer.
    pub fn open(
        socket: &Path,
        uuid: &str,
        name: &str,
        offer: Option<&Offer>,
    ) -> Result<(Opened, Option<DaemonContents>), ControlError> {
        let mut client = Client::connect(socket, Some(PATIENCE))?;
        let opened = client.open(uuid, name, offer)?;
        if !opened.store && !opened.index {
            return Ok((opened, None));
        }
        let mut lookup_keys = Vec::new();
        client.holdings_from(HoldingsFrom::Store, |key| {
            if lookup_keys.len() < MAX_TOLD {
                lookup_keys.push(key);
            }
        })?;
        let mut held = Held::default();
        for body in have_bodies(lookup_keys.clone()) {
            // Our own filters are valid; what one of them lacks would be kept twice, which costs nothing.
            let _ = held.add(body);
        }
        // Not in `held`: what only a running guest has may be gone tomorrow, and is kept all the same.
        client.holdings_from(HoldingsFrom::Guests, |key| {
            if lookup_keys.len() < MAX_TOLD {
                lookup_keys.push(key);
            }
        })?;
        let mut image = PageIds::default();
        client.image(|pfn, id| {
            // An image that is too sparse is no guest's; what fits of it is as good a hint.
            let _ = image.set(pfn, id);
        })?;
        let again = Offer {
            group: opened.group.clone(),
            key: opened.key.clone(),
        };
        let (socket, uuid, name) = (socket.to_owned(), uuid.to_owned(), name.to_owned());
        let connect = move || {
            let mut client = Client::connect(&socket, Some(PATIENCE))?;
            client.open(&uuid, &name, Some(&again)).map(|_| client)
        };
        let (keep, kept) = bounded(KEEP_DEPTH);
        let lost = Arc::new(AtomicBool::new(false));
        let (keeper, failed) = (connect()?, lost.clone());
        let give = move || give_pages(keeper, &kept, &failed);
        thread::Builder::new().name("xenfold-keep".into()).spawn(give)?;
        let contents = DaemonContents {
            connect: Box::new(connect),
            idle: Mutex::new(vec![client]),
            lost,
            lookup_keys,
            held,
            image,
            keeps: opened.store,
            takes_image: opened.image,
            keep,
            start: Instant::now(),
            waited: Mutex::default(),
        };
        Ok((opened, Some(contents)))
    }

    /// Asks the daemon on a connection that is free. `None`: it has failed.
    fn ask<T>(&self, question: impl FnOnce(&mut Client) -> Result<T, ControlError>) -> Option<T> {
        if self.lost.load(Ordering::Relaxed) {
            return None;
        }
        let idle = self.idle.lock().pop();
        let answer = idle.map_or_else(&self.connect, Ok).and_then(|mut client| {
            let answer = question(&mut client)?;
            self.idle.lock().push(client);
            Ok(answer)
        });
        answer.map_err(|error| give_up(&self.lost, &error)).ok()
    }
}

fn give_up(lost: &AtomicBool, error: &ControlError) {
    if !lost.swap(true, Ordering::Relaxed) {
        log::warn!(
            "the daemon does not answer any more, going on without it: {}",
            chain(error)
        );
    }
}

fn give_pages(mut client: Client, pages: &Receiver<Keep>, lost: &AtomicBool) {
    for keep in pages {
        match keep {
            Keep::Pages(bytes, ids) if !lost.load(Ordering::Relaxed) => {
                let given = client.want(&ids).and_then(|wanted| {
                    let pages = ids.iter().copied().zip(bytes.chunks_exact(PAGE_SIZE)).zip(wanted);
                    let pages: Vec<_> = pages.filter(|(_, wanted)| *wanted).map(|(page, _)| page).collect();
                    if pages.is_empty() { Ok(0) } else { client.put(&pages) }
                });
                if let Err(error) = given {
                    give_up(lost, &error);
                }
            }
            Keep::Pages(..) => {}
            // Nobody waits any more when it took too long.
            Keep::Flush(done) => drop(done.send(())),
        }
    }
}

impl Contents for DaemonContents {
    fn lookup_keys(&self) -> Vec<u64> {
        self.lookup_keys.clone()
    }

    fn read(&self, ids: &[ContentId], pages: &mut [u8]) -> Vec<bool> {
        let found = self.ask(|client| client.read(ids)).unwrap_or_default();
        let mut there = vec![false; ids.len()];
        let places = pages.chunks_exact_mut(PAGE_SIZE).zip(&mut there);
        for (page, (place, there)) in found.iter().zip(places) {
            if let Some(page) = page.as_ref().filter(|page| page.len() == PAGE_SIZE) {
                place.copy_from_slice(page);
                *there = true;
            }
        }
        there
    }

    fn last_seen(&self, pfn: Pfn) -> Option<ContentId> {
        self.image.get(pfn)
    }

    fn keep(&self, pages: &[(ContentId, &[u8])]) {
        if !self.keeps || self.lost.load(Ordering::Relaxed) {
            return;
        }
        let mut waited = self.waited.lock();
        let patience = (self.start.elapsed() / KEEP_SHARE).saturating_sub(waited.0);
        if patience.is_zero() && self.keep.is_full() {
            waited.1 += pages.len() as u64;
            return;
        }
        let new = pages.iter().filter(|(id, _)| !self.held.contains(id));
        let (mut bytes, mut ids) = (Vec::new(), Vec::new());
        for (id, page) in new {
            ids.push(*id);
            bytes.extend_from_slice(page);
        }
        if ids.is_empty() {
            return;
        }
        let (count, begin) = (ids.len() as u64, Instant::now());
        match self.keep.send_timeout(Keep::Pages(bytes, ids), patience) {
            Ok(()) => {}
            Err(SendTimeoutError::Timeout(_)) => waited.1 += count,
            Err(SendTimeoutError::Disconnected(_)) => self.lost.store(true, Ordering::Relaxed),
        }
        waited.0 += begin.elapsed();
    }

    fn wants(&self, ids: &[ContentId]) -> Vec<bool> {
        if !self.keeps {
            return Vec::new();
        }
        self.ask(|client| client.want(ids)).unwrap_or_default()
    }

    fn keep_all(&self, pages: &[(ContentId, &[u8])]) {
        self.ask(|client| client.put(pages));
    }

    fn save_image(&self, ids: &PageIds) {
        // At the destination it would take a processor from the guest as that begins to run.
        if !self.takes_image {
            return;
        }
        let (done, given) = bounded(1);
        let flushed = self.keep.send_timeout(Keep::Flush(done), LAST_PAGES).is_ok();
        let (_, left_out) = *self.waited.lock();
        if left_out > 0 {
            log::info!("{left_out} pages were not kept: the daemon was too slow for them");
        }
        if flushed && given.recv_timeout(LAST_PAGES).is_ok() {
            self.ask(|client| client.save_image(ids.iter()));
        }
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::net::{UnixListener, UnixStream};

    use xenfold::control::{KeyHex, Reply, Request, read_message, write_message};
    use xenfold::page::ContentKey;

    use super::*;

    /// Answers as a daemon that keeps nothing, and has a use for images or not. What it was asked goes into `asked`.
    fn answer(caller: UnixStream, image: bool, asked: &Mutex<Vec<Request>>) {
        let mut reader = std::io::BufReader::new(&caller);
        while let Ok(message) = read_message::<Request>(&mut reader) {
            let reply = match message.body {
                Request::Open { .. } => Reply::Opened {
                    group: "group".into(),
                    key_hex: KeyHex::new(&ContentKey::new([7; 32])),
                    store: false,
                    index: true,
                    image,
                },
                Request::Holdings { .. } => Reply::Part { last: true },
                Request::Image {} => Reply::None {},
                _ => Reply::Done { new: 0 },
            };
            asked.lock().push(message.body);
            write_message(&mut &caller, &reply, &[]).unwrap();
        }
    }

    #[test]
    fn what_is_of_no_use_to_the_daemon_does_not_go_there() {
        for image in [false, true] {
            let folder = tempfile::tempdir().unwrap();
            let socket = folder.path().join("socket");
            let listener = UnixListener::bind(&socket).unwrap();
            let asked = Arc::new(Mutex::default());
            let heard = asked.clone();
            thread::spawn(move || {
                for caller in listener.incoming() {
                    let heard = heard.clone();
                    thread::spawn(move || answer(caller.unwrap(), image, &heard));
                }
            });
            let (_, contents) = DaemonContents::open(&socket, "uuid", "guest", None).unwrap();
            let contents = contents.expect("guests' contents are looked up");
            asked.lock().clear();
            let page = [1; PAGE_SIZE];
            let id = ContentKey::new([7; 32]).id(&page);
            contents.keep(&[(id, &page)]);
            assert!(contents.wants(&[id]).is_empty());
            let mut ids = PageIds::default();
            ids.set(Pfn::new(3).unwrap(), id).unwrap();
            contents.save_image(&ids);
            let wanted = if image {
                vec![Request::SaveImage { last: true }]
            } else {
                Vec::new()
            };
            assert_eq!(*asked.lock(), wanted);
        }
    }
}
