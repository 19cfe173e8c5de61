//! The caller's side. It believes the daemon's messages no more than those of any peer.
use std::io::{self, BufReader};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

use super::frame::{ControlError, Message, read_message, write_message};
use super::message::{
    Collected, DedupStatus, HoldingsFrom, IndexStatus, KeyHex, Offered, Reply, Request, Status, StoreStats,
    TemplateInfo, Verified,
};
use super::payload::{
    self, MAX_IDS, MAX_IMAGE_ENTRIES, MAX_PUT_PAGES, MAX_READ_PAGES, MalformedPayload, found_pages, ids_payload,
    image_entries, image_payload, pages_payload,
};
use crate::page::{ContentId, ContentKey, PAGE_SIZE, Pfn};

/// A connection to the daemon. After any error but [`ControlError::Refused`] it is of no use.
pub struct Client {
    reader: BufReader<UnixStream>,
    writer: UnixStream,
}

/// The group and key that the source of a migration has.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Offer {
    pub group: String,
    pub key: ContentKey,
}

/// What a connection is bound to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Opened {
    pub group: String,
    pub key: ContentKey,
    /// False: this host keeps no contents, so that putting is of no use.
    pub store: bool,
    /// Contents of running guests are looked up. When neither this nor `store`, asking is of no use either.
    pub index: bool,
    /// False: saving an image is of no use.
    pub image: bool,
}

impl Client {
    /// Connects to the daemon that listens on `socket`. `patience` bounds each wait for the daemon; `None` waits for
    /// as long as it takes, for [`Client::store_verify`] and [`Client::store_gc`].
    /// Errors: [`ControlError::NotRunning`] when there is none.
    pub fn connect(socket: &Path, patience: Option<Duration>) -> Result<Client, ControlError> {
        let not_running = |source: io::Error| match source.kind() {
            io::ErrorKind::NotFound | io::ErrorKind::ConnectionRefused => ControlError::NotRunning {
                path: socket.into(),
                source,
            },
            _ => ControlError::Io(source),
        };
        let writer = UnixStream::connect(socket).map_err(not_running)?;
        writer.set_read_timeout(patience)?;
        writer.set_write_timeout(patience)?;
        let reader = BufReader::new(writer.try_clone()?);
        Ok(Client { reader, writer })
    }

    /// Binds the connection to the group of a guest, by its own name without xl's suffixes. At the destination `offer`
    /// is what the source has.
    pub fn open(&mut self, guest_uuid: &str, guest_name: &str, offer: Option<&Offer>) -> Result<Opened, ControlError> {
        let request = Request::Open {
            guest_uuid: guest_uuid.into(),
            guest_name: guest_name.into(),
            offered: offer.map(|offer| Offered {
                group: offer.group.clone(),
                key_hex: KeyHex::new(&offer.key),
            }),
        };
        match self.ask(&request, &[])?.body {
            Reply::Opened {
                group,
                key_hex,
                store,
                index,
                image,
            } => {
                let key = key_hex.key().ok_or(ControlError::Unexpected { what: "open" })?;
                Ok(Opened {
                    group,
                    key,
                    store,
                    index,
                    image,
                })
            }
            _ => Err(ControlError::Unexpected { what: "open" }),
        }
    }

    /// For each id: true when it is not held yet.
    pub fn want(&mut self, ids: &[ContentId]) -> Result<Vec<bool>, ControlError> {
        let mut wanted = Vec::with_capacity(ids.len());
        for ids in ids.chunks(MAX_IDS) {
            let payload = self.answers("want", &Request::Want {}, &ids_payload(ids))?;
            wanted.extend(payload::answers(&payload, ids.len()).map_err(malformed("want"))?);
        }
        Ok(wanted)
    }

    /// Gives pages of 4096 bytes to the group; returns how many were new. Errors: a page of another size
    /// ([`ControlError::Payload`]); what is not its id's content is refused.
    pub fn put(&mut self, pages: &[(ContentId, &[u8])]) -> Result<u64, ControlError> {
        let other = pages.iter().find(|(_, page)| page.len() != PAGE_SIZE);
        if let Some((_, page)) = other {
            let (bytes, entry_bytes) = (page.len(), PAGE_SIZE);
            return Err(malformed("put")(MalformedPayload::Length { bytes, entry_bytes }));
        }
        let mut all = 0u64;
        for pages in pages.chunks(MAX_PUT_PAGES) {
            match self.ask(&Request::Put {}, &pages_payload(pages))?.body {
                Reply::Done { new } => all = all.saturating_add(new),
                _ => return Err(ControlError::Unexpected { what: "put" }),
            }
        }
        Ok(all)
    }

    /// The contents that the group holds. The daemon has hashed them; the caller does so again before it uses them.
    pub fn read(&mut self, ids: &[ContentId]) -> Result<Vec<Option<Box<[u8]>>>, ControlError> {
        let mut found = Vec::with_capacity(ids.len());
        for ids in ids.chunks(MAX_READ_PAGES) {
            let payload = self.answers("read", &Request::Read {}, &ids_payload(ids))?;
            let pages = found_pages(&payload, ids.len()).map_err(malformed("read"))?;
            found.extend(pages.into_iter().map(|page| page.map(|page| page.as_slice().into())));
        }
        Ok(found)
    }

    /// The lookup keys of all contents that the group holds on this host, in no order, to `each`.
    pub fn holdings(&mut self, each: impl FnMut(u64)) -> Result<(), ControlError> {
        self.holdings_from(HoldingsFrom::All, each)
    }

    /// As [`Client::holdings`], of one kind. Contents of running guests may be others by the time they are read.
    pub fn holdings_from(&mut self, from: HoldingsFrom, mut each: impl FnMut(u64)) -> Result<(), ControlError> {
        self.parts("holdings", &Request::Holdings { from }, |payload| {
            payload::keys(payload)?.for_each(&mut each);
            Ok(())
        })?;
        Ok(())
    }

    /// The guest's newest image, page by page, to `each`. False: it has none.
    pub fn image(&mut self, mut each: impl FnMut(Pfn, ContentId)) -> Result<bool, ControlError> {
        self.parts("image", &Request::Image {}, |payload| {
            image_entries(payload)?.into_iter().for_each(|(pfn, id)| each(pfn, id));
            Ok(())
        })
    }

    /// Replaces the guest's image. To be called when its contents have been put.
    pub fn save_image(&mut self, pages: impl IntoIterator<Item = (Pfn, ContentId)>) -> Result<(), ControlError> {
        let mut pages = pages.into_iter().peekable();
        loop {
            let part: Vec<(Pfn, ContentId)> = pages.by_ref().take(MAX_IMAGE_ENTRIES).collect();
            let last = pages.peek().is_none();
            self.done("save_image", &Request::SaveImage { last }, &image_payload(&part))?;
            if last {
                return Ok(());
            }
        }
    }

    /// The bytes of what is kept of a guest's writes ([`crate::policy::Kept`]); `None`: nothing is.
    pub fn model(&mut self, guest_uuid: &str) -> Result<Option<Vec<u8>>, ControlError> {
        let guest_uuid = guest_uuid.into();
        self.one_part("model", &Request::Model { guest_uuid })
    }

    /// The pages of a running guest that change, as far as the daemon has read its memory: a set of pages below `bound`, packed
    /// ([`crate::policy::packed`]). `None`: the guest is not read, or not for long enough.
    pub fn changing(&mut self, guest_uuid: &str, bound: u64) -> Result<Option<Vec<u8>>, ControlError> {
        let guest_uuid = guest_uuid.into();
        self.one_part("changing", &Request::Changing { guest_uuid, bound })
    }

    /// Keeps such bytes, in the place of what was kept of the guest.
    pub fn save_model(&mut self, guest_uuid: &str, bytes: &[u8]) -> Result<(), ControlError> {
        let guest_uuid = guest_uuid.into();
        self.done("save_model", &Request::SaveModel { guest_uuid }, bytes)
    }

    pub fn status(&mut self) -> Result<Status, ControlError> {
        match self.ask(&Request::Status {}, &[])?.body {
            Reply::Status(status) => Ok(*status),
            _ => Err(ControlError::Unexpected { what: "status" }),
        }
    }

    /// What the index of running guests knows, and why it leaves which guests out.
    pub fn index(&mut self) -> Result<IndexStatus, ControlError> {
        match self.ask(&Request::Index {}, &[])?.body {
            Reply::Index(index) => Ok(index),
            _ => Err(ControlError::Unexpected { what: "index" }),
        }
    }

    /// What memory is shared between guests.
    pub fn dedup(&mut self) -> Result<DedupStatus, ControlError> {
        match self.ask(&Request::Dedup {}, &[])?.body {
            Reply::Dedup(dedup) => Ok(dedup),
            _ => Err(ControlError::Unexpected { what: "dedup" }),
        }
    }

    /// Begins to share memory, or ends it and has all pages given back, which takes its time.
    pub fn dedup_enable(&mut self, enable: bool) -> Result<(), ControlError> {
        self.done("dedup_enable", &Request::DedupEnable { enable }, &[])
    }

    /// Has a guest gone through at once, twice.
    pub fn dedup_scan(&mut self, guest_uuid: &str) -> Result<(), ControlError> {
        let guest_uuid = guest_uuid.into();
        self.done("dedup_scan", &Request::DedupScan { guest_uuid }, &[])
    }

    pub fn store_stats(&mut self) -> Result<StoreStats, ControlError> {
        match self.ask(&Request::StoreStats {}, &[])?.body {
            Reply::StoreStats(stats) => Ok(stats),
            _ => Err(ControlError::Unexpected { what: "store_stats" }),
        }
    }

    /// Has all contents read and hashed. Takes as long as reading the store takes.
    pub fn store_verify(&mut self) -> Result<Verified, ControlError> {
        match self.ask(&Request::StoreVerify {}, &[])?.body {
            Reply::Verified(verified) => Ok(verified),
            _ => Err(ControlError::Unexpected { what: "store_verify" }),
        }
    }

    /// Has contents dropped that no image or template names.
    pub fn store_gc(&mut self) -> Result<Collected, ControlError> {
        match self.ask(&Request::StoreGc {}, &[])?.body {
            Reply::Collected(collected) => Ok(collected),
            _ => Err(ControlError::Unexpected { what: "store_gc" }),
        }
    }

    /// Keeps the contents of a guest's image until the template is removed.
    pub fn template_add(&mut self, name: &str, guest_uuid: &str) -> Result<(), ControlError> {
        let (name, guest_uuid) = (name.into(), guest_uuid.into());
        self.done("template_add", &Request::TemplateAdd { name, guest_uuid }, &[])
    }

    pub fn template_list(&mut self) -> Result<Vec<TemplateInfo>, ControlError> {
        match self.ask(&Request::TemplateList {}, &[])?.body {
            Reply::Templates { templates } => Ok(templates),
            _ => Err(ControlError::Unexpected { what: "template_list" }),
        }
    }

    pub fn template_remove(&mut self, name: &str, group: Option<&str>) -> Result<(), ControlError> {
        let (name, group) = (name.into(), group.map(Into::into));
        self.done("template_remove", &Request::TemplateRemove { name, group }, &[])
    }

    fn ask(&mut self, request: &Request, payload: &[u8]) -> Result<Message<Reply>, ControlError> {
        match write_message(&mut self.writer, request, payload) {
            Ok(()) => self.answer(),
            // A daemon that refuses and closes may do so before it has read all: its reason is worth more than EPIPE.
            Err(error @ ControlError::Io(_)) => match self.answer() {
                Err(refused @ ControlError::Refused(_)) => Err(refused),
                _ => Err(error),
            },
            Err(error) => Err(error),
        }
    }

    fn answer(&mut self) -> Result<Message<Reply>, ControlError> {
        let message: Message<Reply> = read_message(&mut self.reader)?;
        match message.body {
            Reply::Error(refusal) => Err(ControlError::Refused(refusal)),
            _ => Ok(message),
        }
    }

    fn answers(&mut self, what: &'static str, request: &Request, payload: &[u8]) -> Result<Vec<u8>, ControlError> {
        match self.ask(request, payload)? {
            Message {
                body: Reply::Answers {},
                payload,
            } => Ok(payload),
            _ => Err(ControlError::Unexpected { what }),
        }
    }

    fn done(&mut self, what: &'static str, request: &Request, payload: &[u8]) -> Result<(), ControlError> {
        match self.ask(request, payload)?.body {
            Reply::Done { .. } => Ok(()),
            _ => Err(ControlError::Unexpected { what }),
        }
    }

    /// An answer that is bytes of one part, or that there is none.
    fn one_part(&mut self, what: &'static str, request: &Request) -> Result<Option<Vec<u8>>, ControlError> {
        let mut bytes = Vec::new();
        let there = self.parts(what, request, |payload| {
            bytes = payload.to_vec();
            Ok(())
        })?;
        Ok(there.then_some(bytes))
    }

    /// Takes an answer in parts. False: the answer is that there is none.
    fn parts(
        &mut self,
        what: &'static str,
        request: &Request,
        mut take: impl FnMut(&[u8]) -> Result<(), MalformedPayload>,
    ) -> Result<bool, ControlError> {
        let mut message = self.ask(request, &[])?;
        loop {
            let last = match message.body {
                Reply::Part { last } => last,
                Reply::None {} => return Ok(false),
                _ => return Err(ControlError::Unexpected { what }),
            };
            take(&message.payload).map_err(malformed(what))?;
            if last {
                return Ok(true);
            }
            message = self.answer()?;
        }
    }
}

fn malformed(what: &'static str) -> impl Fn(MalformedPayload) -> ControlError {
    move |source| ControlError::Payload { what, source }
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use super::*;

    /// What a call makes of these answers of a daemon that closes then.
    fn told<T>(answers: &[u8], call: impl FnOnce(&mut Client) -> Result<T, ControlError>) -> Result<T, ControlError> {
        let (mut daemon, writer) = UnixStream::pair().unwrap();
        daemon.write_all(answers).unwrap();
        daemon.shutdown(std::net::Shutdown::Write).unwrap();
        let reader = BufReader::new(writer.try_clone().unwrap());
        call(&mut Client { reader, writer })
    }

    fn answer(reply: &Reply, payload: &[u8]) -> Vec<u8> {
        let mut bytes = Vec::new();
        write_message(&mut bytes, reply, payload).unwrap();
        bytes
    }

    #[test]
    fn a_daemon_that_lies_is_an_error() {
        let id = ContentId([1; 16]);
        let answers = |payload: &[u8]| answer(&Reply::Answers {}, payload);
        let malformed = [
            told(&answers(&[]), |client| client.want(&[id]).map(drop)),
            told(&answers(&[2]), |client| client.want(&[id]).map(drop)),
            told(&answers(&[1; 9]), |client| client.read(&[id]).map(drop)),
            told(&answer(&Reply::Part { last: true }, &[0; 7]), |client| {
                client.holdings(drop)
            }),
            told(&answer(&Reply::Part { last: true }, &[0xff; 24]), |client| {
                client.image(|_, _| {}).map(drop)
            }),
        ];
        for told in malformed {
            assert!(matches!(told, Err(ControlError::Payload { .. })), "{told:?}");
        }
        let no_key = b"{\"version\":1,\"reply\":\"opened\",\"group\":\"g\",\"key_hex\":\"12\",\"store\":true}\0";
        let unexpected = [
            told(no_key, |client| client.open("", "", None).map(drop)),
            told(&answers(&[]), |client| client.status().map(drop)),
            told(&answer(&Reply::None {}, &[]), |client| {
                client.put(&[(id, &[0; PAGE_SIZE])]).map(drop)
            }),
        ];
        for told in unexpected {
            assert!(matches!(told, Err(ControlError::Unexpected { .. })), "{told:?}");
        }
        let more = answer(&Reply::Part { last: false }, &[0; 8]);
        assert!(matches!(
            told(&more, |client| client.holdings(drop)),
            Err(ControlError::Closed)
        ));
        assert!(matches!(
            told(&more[..9], |client| client.holdings(drop)),
            Err(ControlError::Cut)
        ));
        let short = told(&[], |client| client.put(&[(id, &[0; 5])]));
        assert!(matches!(short, Err(ControlError::Payload { .. })));
    }

    #[test]
    fn parts_are_put_together() {
        let parts = [
            answer(&Reply::Part { last: false }, &1u64.to_le_bytes()),
            answer(&Reply::Part { last: true }, &2u64.to_le_bytes()),
        ];
        let mut keys = Vec::new();
        told(&parts.concat(), |client| client.holdings(|key| keys.push(key))).unwrap();
        assert_eq!(keys, [1, 2]);
        assert!(!told(&answer(&Reply::None {}, &[]), |client| client.image(|_, _| {})).unwrap());
    }

    #[test]
    fn an_older_daemon_takes_images() {
        let key_hex = "12".repeat(32);
        let older = format!(
            "{{\"version\":1,\"reply\":\"opened\",\"group\":\"g\",\"key_hex\":\"{key_hex}\",\"store\":true}}\0"
        );
        let opened = told(older.as_bytes(), |client| client.open("", "", None)).unwrap();
        assert!(opened.store && !opened.index && opened.image);
    }
}
