//! One caller: its requests in turn. What it sends is hostile until checked, though only root can connect.
use std::io::{BufRead, BufReader};
use std::os::unix::net::UnixStream;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use xenfold::control::{
    ControlError, ErrorCode, HoldingsFrom, KeyHex, MAX_IDS, MAX_IMAGE_ENTRIES, MAX_KEYS, MAX_PAYLOAD_BYTES,
    MAX_READ_PAGES, MalformedPayload, Message, Offer, Offered, Refusal, Reply, Request, ids, image_entries,
    image_payload, keys_payload, pages, read_message, read_payload, write_message,
};
use xenfold::engine::chain;
use xenfold::page::{ContentId, Pfn};
use xenfold::policy::packed;
use xenfold::policy::trace::MOST_PAGES;

use crate::daemon::{Bound, Daemon, model_failed, store_failed};
use crate::index::Index;
use crate::server::{Connections, MAX_CONNECTIONS};
use crate::store::{Group, Image};
use crate::templates;

/// How long a caller may pause inside a message, or leave an answer unread. Between messages it may take all time.
const MESSAGE_PATIENCE: Duration = Duration::from_secs(30);

/// Pages of one image: a guest of 256 GiB. While it arrives it takes 24 bytes a page.
const MAX_IMAGE_PAGES: usize = 1 << 26;

/// What goes back.
enum Answer {
    One(Reply, Vec<u8>),
    Keys(Vec<u64>),
    Image(Vec<(Pfn, ContentId)>),
}

/// What a connection has come to.
struct Connection<'a> {
    daemon: &'a Daemon,
    connections: &'a Connections,
    bound: Option<Bound>,
    /// An image of which parts have come.
    image: Option<Vec<(Pfn, ContentId)>>,
}

/// Answers until the caller goes. Errors: the connection failed, or its caller does not keep to the protocol.
pub fn serve(daemon: &Daemon, connections: &Connections, stream: &UnixStream) -> Result<(), ControlError> {
    stream.set_write_timeout(Some(MESSAGE_PATIENCE))?;
    let mut reader = BufReader::new(stream);
    let mut writer = stream;
    let mut connection = Connection {
        daemon,
        connections,
        bound: None,
        image: None,
    };
    loop {
        stream.set_read_timeout(None)?;
        if reader.fill_buf()?.is_empty() {
            return Ok(());
        }
        stream.set_read_timeout(Some(MESSAGE_PATIENCE))?;
        let message = match read_message(&mut reader) {
            Ok(message) => message,
            Err(error) => {
                // Where the next message begins is not known any more: the reason, and the end.
                if let Some(refusal) = malformed_message(&error) {
                    write_message(&mut writer, &Reply::Error(refusal), &[])?;
                }
                return Err(error);
            }
        };
        let written = match connection.answer(message) {
            Ok(Answer::One(reply, payload)) => write_message(&mut writer, &reply, &payload),
            Ok(Answer::Keys(keys)) => write_parts(writer, &keys, MAX_KEYS, keys_payload),
            Ok(Answer::Image(pages)) => write_parts(writer, &pages, MAX_IMAGE_ENTRIES, image_payload),
            Err(refusal) => write_message(&mut writer, &Reply::Error(refusal), &[]),
        };
        match written {
            // A list of more than the protocol carries. Nothing of it was sent.
            Err(ControlError::LongHeader { .. }) => {
                let refusal = refusal(ErrorCode::Store, "there is too much to list");
                write_message(&mut writer, &Reply::Error(refusal), &[])?;
            }
            written => written?,
        }
    }
}

impl Connection<'_> {
    fn answer(&mut self, message: Message<Request>) -> Result<Answer, Refusal> {
        let Message { body, payload } = message;
        let takes_payload = matches!(
            body,
            Request::Want {}
                | Request::Put {}
                | Request::Read {}
                | Request::SaveImage { .. }
                | Request::SaveModel { .. }
        );
        if !takes_payload && !payload.is_empty() {
            return Err(bad_request("this request has no payload".into()));
        }
        if self.image.is_some() && !matches!(body, Request::SaveImage { .. }) {
            self.image = None;
            return Err(refusal(
                ErrorCode::Order,
                "between the parts of an image: the image is dropped",
            ));
        }
        let reply = match body {
            Request::Open {
                guest_uuid,
                guest_name,
                offered,
            } => self.open(&guest_uuid, &guest_name, offered)?,
            Request::Want {} => return self.want(&payload),
            Request::Put {} => self.put(&payload)?,
            Request::Read {} => return self.read(&payload),
            Request::Holdings { from } => return self.holdings(from),
            Request::Image {} => return self.image(),
            Request::SaveImage { last } => self.save_image(&payload, last)?,
            Request::Status {} => {
                let mut status = self.daemon.status();
                status.connections = self.connections.count() as u64;
                status.connections_max = MAX_CONNECTIONS as u64;
                Reply::Status(Box::new(status))
            }
            Request::Index {} => Reply::Index(self.daemon.index_status()),
            Request::Dedup {} => Reply::Dedup(self.daemon.dedup_status()),
            Request::DedupEnable { enable } => {
                self.daemon.dedup_enable(enable)?;
                Reply::Done { new: 0 }
            }
            Request::DedupScan { guest_uuid } => {
                self.daemon.dedup_scan(&guest_uuid)?;
                Reply::Done { new: 0 }
            }
            Request::Model { guest_uuid } => {
                return Ok(match self.daemon.models.get(&guest_uuid).map_err(model_failed)? {
                    Some(bytes) => Answer::One(Reply::Part { last: true }, bytes),
                    None => Answer::One(Reply::None {}, Vec::new()),
                });
            }
            Request::SaveModel { guest_uuid } => {
                let models = &self.daemon.models;
                models.set(&guest_uuid, &payload).map_err(model_failed)?;
                Reply::Done { new: 0 }
            }
            Request::Changing { guest_uuid, bound } => return Ok(self.changing(&guest_uuid, bound)),
            Request::StoreStats {} => Reply::StoreStats(self.daemon.stats()?),
            Request::StoreVerify {} => Reply::Verified(self.daemon.verify()?),
            Request::StoreGc {} => Reply::Collected(self.daemon.collect()?),
            Request::TemplateAdd { name, guest_uuid } => {
                templates::add(self.daemon, &name, &guest_uuid)?;
                Reply::Done { new: 1 }
            }
            Request::TemplateList {} => Reply::Templates {
                templates: templates::list(self.daemon)?,
            },
            Request::TemplateRemove { name, group } => {
                templates::remove(self.daemon, &name, group.as_deref())?;
                Reply::Done { new: 0 }
            }
        };
        Ok(Answer::One(reply, Vec::new()))
    }

    fn changing(&self, uuid: &str, bound: u64) -> Answer {
        let changing = self
            .daemon
            .index()
            .and_then(|index| index.changing(uuid, bound.min(MOST_PAGES)));
        let packed = changing.map(|pages| packed::pack(&pages));
        match packed.filter(|packed| packed.len() <= MAX_PAYLOAD_BYTES) {
            Some(packed) => Answer::One(Reply::Part { last: true }, packed),
            None => Answer::One(Reply::None {}, Vec::new()),
        }
    }

    fn open(&mut self, uuid: &str, name: &str, offered: Option<Offered>) -> Result<Reply, Refusal> {
        if self.bound.is_some() {
            return Err(refusal(ErrorCode::Order, "this connection is bound to a guest already"));
        }
        let offer = match offered {
            Some(Offered { group, key_hex }) => {
                let key = key_hex
                    .key()
                    .ok_or_else(|| bad_request("the offered key is not 64 hexadecimal digits".into()))?;
                Some(Offer { group, key })
            }
            None => None,
        };
        let bound = self.daemon.bind(uuid, name, offer.as_ref())?;
        log::debug!("guest {name} ({uuid}) is in group {}", bound.membership.group);
        let index = self.daemon.index();
        let reply = Reply::Opened {
            group: bound.membership.group.clone(),
            key_hex: KeyHex::new(&bound.membership.key),
            store: bound.group.is_some(),
            index: index.is_some(),
            image: bound.group.is_some() || index.is_some_and(Index::takes_arrivals),
        };
        self.bound = Some(bound);
        Ok(reply)
    }

    fn bound(&self) -> Result<&Bound, Refusal> {
        let message = "this connection is not bound to a guest: `open` comes first";
        self.bound.as_ref().ok_or_else(|| refusal(ErrorCode::Order, message))
    }

    /// `None`: no contents are kept. Then nothing is wanted, nothing found, and what is put is dropped.
    fn group(&self) -> Result<Option<&Group>, Refusal> {
        Ok(self.bound()?.group.as_deref())
    }

    fn want(&self, payload: &[u8]) -> Result<Answer, Refusal> {
        let group = self.group()?;
        let ids = ids(payload, MAX_IDS).map_err(malformed)?;
        let wanted = group.map_or_else(|| vec![false; ids.len()], |group| group.wanted(&ids));
        Ok(Answer::One(
            Reply::Answers {},
            wanted.into_iter().map(u8::from).collect(),
        ))
    }

    fn put(&self, payload: &[u8]) -> Result<Reply, Refusal> {
        let group = self.group()?;
        let pages = pages(payload).map_err(malformed)?;
        let new = match group {
            Some(group) => group.put(&pages).map_err(store_failed)?,
            None => 0,
        };
        Ok(Reply::Done { new: new as u64 })
    }

    fn read(&self, payload: &[u8]) -> Result<Answer, Refusal> {
        let bound = self.bound()?;
        let ids = ids(payload, MAX_READ_PAGES).map_err(malformed)?;
        let mut found = match &bound.group {
            Some(group) => group.read(&ids),
            None => vec![None; ids.len()],
        };
        if let Some(index) = self.daemon.index() {
            let missing = found.iter_mut().zip(&ids).filter(|(found, _)| found.is_none());
            let (places, ids): (Vec<_>, Vec<ContentId>) = missing.unzip();
            let there = index.read(&bound.membership, &ids);
            places.into_iter().zip(there).for_each(|(place, page)| *place = page);
        }
        Ok(Answer::One(Reply::Answers {}, read_payload(&found)))
    }

    fn holdings(&self, from: HoldingsFrom) -> Result<Answer, Refusal> {
        let bound = self.bound()?;
        let mut keys = match &bound.group {
            Some(group) if from != HoldingsFrom::Guests => group.lookup_keys(),
            _ => Vec::new(),
        };
        if let Some(index) = self.daemon.index().filter(|_| from != HoldingsFrom::Store) {
            keys.extend(index.lookup_keys(&bound.membership));
        }
        Ok(Answer::Keys(keys))
    }

    fn image(&self) -> Result<Answer, Refusal> {
        let bound = self.bound()?;
        let image = match &bound.group {
            Some(group) => group.image(&bound.membership.uuid).map_err(store_failed)?,
            None => None,
        };
        // A template may have any name, but a guest's image is none.
        Ok(match image.filter(|image| !image.template) {
            Some(image) => Answer::Image(image.pages),
            None => Answer::One(Reply::None {}, Vec::new()),
        })
    }

    fn save_image(&mut self, payload: &[u8], last: bool) -> Result<Reply, Refusal> {
        self.bound()?;
        let mut all = self.image.take().unwrap_or_default();
        let part = image_entries(payload).map_err(malformed)?;
        if all.len() + part.len() > MAX_IMAGE_PAGES {
            return Err(bad_request(format!("an image of more than {MAX_IMAGE_PAGES} pages")));
        }
        all.extend(part);
        if !last {
            self.image = Some(all);
            return Ok(Reply::Done { new: 0 });
        }
        let bound = self.bound()?;
        if let Some(index) = self.daemon.index() {
            index.arrived(&bound.membership, &all);
        }
        if let Some(group) = &bound.group {
            let since_1970 = SystemTime::now().duration_since(UNIX_EPOCH);
            let image = Image {
                guest: bound.membership.uuid.clone(),
                saved_unix_s: since_1970.map_or(0, |since| since.as_secs()),
                template: false,
                pages: all,
            };
            group.save_image(&image).map_err(store_failed)?;
            // The image is saved whatever becomes of this.
            if self.daemon.auto_template
                && let Err(error) = group.renew_common(image.saved_unix_s)
            {
                log::warn!("{}", chain(&error));
            }
        }
        Ok(Reply::Done { new: 0 })
    }
}

/// Writes an answer in parts, an empty one as one part.
fn write_parts<T>(
    mut writer: &UnixStream,
    all: &[T],
    most: usize,
    payload: impl Fn(&[T]) -> Vec<u8>,
) -> Result<(), ControlError> {
    let mut rest = all;
    loop {
        let (part, behind) = rest.split_at(rest.len().min(most));
        let last = behind.is_empty();
        write_message(&mut writer, &Reply::Part { last }, &payload(part))?;
        if last {
            return Ok(());
        }
        rest = behind;
    }
}

fn refusal(code: ErrorCode, message: &str) -> Refusal {
    let message = message.into();
    Refusal { code, message }
}

fn bad_request(message: String) -> Refusal {
    let code = ErrorCode::BadRequest;
    Refusal { code, message }
}

fn malformed(error: MalformedPayload) -> Refusal {
    bad_request(error.to_string())
}

/// What to say to a caller whose message cannot be read; `None`: it is gone.
fn malformed_message(error: &ControlError) -> Option<Refusal> {
    let code = match error {
        ControlError::Version { .. } => ErrorCode::Version,
        ControlError::BadHeader(_) | ControlError::LongHeader { .. } | ControlError::LongPayload { .. } => {
            ErrorCode::BadRequest
        }
        _ => return None,
    };
    let message = chain(error);
    Some(Refusal { code, message })
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;
    use std::thread::sleep;
    use std::time::Instant;

    use xenfold::config;
    use xenfold::control::{Client, HoldingsFrom, IndexStatus};
    use xenfold::page::PAGE_SIZE;

    use super::*;
    use crate::index::sim::{Sim, guest, page, uuid};
    use crate::server;
    use crate::socket::Socket;

    /// What the store lacks a running guest of the group has; what neither has is not found.
    #[test]
    fn running_guests_are_asked_after_the_store() {
        for store in [true, false] {
            let folder = tempfile::tempdir().unwrap();
            let path = |name: &str| folder.path().join(name);
            let size = if store { "1GiB" } else { "0" };
            let text = format!("store_size = \"{size}\"\nindex_rate = 1000000\n[group]\nweb = [\"web-*\"]");
            std::fs::write(path("xenfold.conf"), text).unwrap();
            let config = config::read(&path("xenfold.conf")).unwrap();
            let sim = Sim::default();
            sim.0.lock().guests = vec![guest(3, 1, "web-1", [page(1), page(2)])];
            let daemon = Arc::new(Daemon::open_on(&config, &path("state"), || Ok(Box::new(sim.clone()))));
            let socket = Socket::listen(&path("daemon.sock")).unwrap();
            let (stop, stopped) = UnixStream::pair().unwrap();
            std::thread::scope(|scope| {
                let serving = scope.spawn(|| server::serve(&daemon, &socket, &stopped));
                let mut client = Client::connect(&path("daemon.sock"), Some(MESSAGE_PATIENCE)).unwrap();
                let opened = client.open(&uuid(9), "web-9", None).unwrap();
                assert_eq!((opened.store, opened.index), (store, true));
                let deadline = Instant::now() + Duration::from_secs(60);
                while !matches!(client.index().unwrap(), IndexStatus::Running(stats) if stats.pages == 2) {
                    assert!(Instant::now() < deadline);
                    sleep(Duration::from_millis(20));
                }
                let pages = [page(0), page(1), page(2), page(3)];
                let ids = pages.map(|page| opened.key.id(&page));
                let put: Vec<(ContentId, &[u8])> = vec![(ids[0], &pages[0]), (ids[1], &pages[1])];
                assert_eq!(client.put(&put).unwrap(), if store { 2 } else { 0 });
                // What a guest has is wanted by the store all the same.
                assert_eq!(client.want(&ids).unwrap(), [false, false, store, store]);
                let found = client.read(&ids).unwrap();
                let expected = [(store, 0), (true, 1), (true, 2), (false, 3)];
                for ((found, (there, n)), page) in found.iter().zip(expected).zip(&pages) {
                    let page: Option<&[u8; PAGE_SIZE]> = there.then_some(page);
                    assert_eq!(found.as_deref(), page.map(|page| &page[..]), "{n}");
                }
                let mut count = |from| {
                    let mut keys = Vec::new();
                    client.holdings_from(from, |key| keys.push(key)).unwrap();
                    keys.len()
                };
                let kept = if store { 2 } else { 0 };
                let counted = [HoldingsFrom::Store, HoldingsFrom::Guests, HoldingsFrom::All].map(&mut count);
                assert_eq!(counted, [kept, 2, kept + 2]);
                drop(client);
                drop(stop);
                serving.join().unwrap().unwrap();
            });
        }
    }
}
