//! The daemon as a process, in a temporary folder.
use std::fs;
use std::io::{Read, Write};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::{UnixDatagram, UnixStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::thread::sleep;
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process};
use tempfile::TempDir;
use xenfold::control::{
    Client, ControlError, DedupStatus, ErrorCode, HoldingsFrom, IndexStatus, MAX_PAYLOAD_BYTES, MAX_REQUEST_BYTES,
    Message, Offer, Opened, Overview, Reply, Request, StoreStatus, pages_payload, read_message, write_message,
};
use xenfold::migrations::{Migration, figures_path, record_path};
use xenfold::page::{ContentId, ContentKey, PAGE_SIZE, Pfn};
use xenfold::page_set::PageSet;
use xenfold::policy::filter::Filter;
use xenfold::policy::model::Builder;
use xenfold::report::Figures;

const GUEST: &str = "00112233-4455-6677-8899-aabbccddeeff";
const OTHER: &str = "00112233-4455-6677-8899-000000000000";
const PATIENCE: Duration = Duration::from_secs(60);

/// A host: its configuration, its state, the daemon.
struct Host {
    folder: TempDir,
    daemon: Option<Child>,
}

impl Host {
    /// `HERE` in the configuration is the folder.
    fn new(config: &str) -> Host {
        let folder = tempfile::tempdir().unwrap();
        let config = config.replace("HERE", folder.path().to_str().unwrap());
        fs::write(folder.path().join("xenfold.conf"), config).unwrap();
        Host { folder, daemon: None }
    }

    fn started(config: &str) -> Host {
        let mut host = Host::new(config);
        host.start();
        host
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    fn socket(&self) -> PathBuf {
        self.path("run/daemon.sock")
    }

    fn command(&self) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_xenfoldd"));
        command
            .arg("--config")
            .arg(self.path("xenfold.conf"))
            .arg("--state")
            .arg(self.path("state"))
            .arg("--socket")
            .arg(self.socket())
            .env_remove("NOTIFY_SOCKET")
            .stderr(Stdio::piped());
        command
    }

    fn spawn(&self) -> Child {
        self.command().spawn().unwrap()
    }

    fn start(&mut self) {
        self.daemon = Some(self.spawn());
        let deadline = Instant::now() + PATIENCE;
        // It answers when all else is there, too, and can be called before that.
        while let Err(error) = Client::connect(&self.socket(), Some(PATIENCE)).and_then(|mut client| client.status()) {
            assert!(Instant::now() < deadline, "{error}");
            sleep(Duration::from_millis(10));
        }
    }

    fn end(&mut self, signal: Signal) -> (ExitStatus, String) {
        let mut daemon = self.daemon.take().unwrap();
        kill_process(Pid::from_child(&daemon), signal).unwrap();
        let status = daemon.wait().unwrap();
        let mut said = String::new();
        daemon.stderr.take().unwrap().read_to_string(&mut said).unwrap();
        (status, said)
    }

    fn client(&self) -> Client {
        Client::connect(&self.socket(), Some(PATIENCE)).unwrap()
    }

    fn opened(&self, uuid: &str, name: &str, offer: Option<&Offer>) -> (Client, Opened) {
        let mut client = self.client();
        let opened = client.open(uuid, name, offer).unwrap();
        (client, opened)
    }

    /// The code with which a guest is refused.
    fn refused(&self, name: &str, offer: Option<&Offer>) -> ErrorCode {
        code(self.client().open(GUEST, name, offer))
    }

    fn is_well(&self) {
        self.has_room();
        let status = self.client().status().unwrap();
        assert_eq!(status.pid, self.daemon.as_ref().unwrap().id());
    }

    /// Waits until callers that have gone are forgotten.
    fn has_room(&self) {
        let deadline = Instant::now() + PATIENCE;
        while let Err(ControlError::Refused(refusal)) = self.client().status() {
            assert_eq!(refusal.code, ErrorCode::Busy);
            assert!(Instant::now() < deadline);
            sleep(Duration::from_millis(10));
        }
    }
}

impl Drop for Host {
    fn drop(&mut self) {
        if let Some(daemon) = &mut self.daemon {
            let _ = daemon.kill();
            let _ = daemon.wait();
        }
    }
}

fn code<T>(result: Result<T, ControlError>) -> ErrorCode {
    match result {
        Err(ControlError::Refused(refusal)) => refusal.code,
        Err(error) => panic!("{error}"),
        Ok(_) => panic!("it was not refused"),
    }
}

/// Different pages with their ids.
fn contents(key: &ContentKey, count: u64) -> Vec<(ContentId, Vec<u8>)> {
    let page = |n: u64| {
        let mut page = vec![0x5a; PAGE_SIZE];
        page[..8].copy_from_slice(&n.to_le_bytes());
        (key.id(&page), page)
    };
    (0..count).map(page).collect()
}

fn borrowed(contents: &[(ContentId, Vec<u8>)]) -> Vec<(ContentId, &[u8])> {
    contents.iter().map(|(id, page)| (*id, page.as_slice())).collect()
}

fn image_of(ids: &[ContentId]) -> Vec<(Pfn, ContentId)> {
    (0..)
        .map(|pfn| Pfn::new(pfn * 3).unwrap())
        .zip(ids.iter().copied())
        .collect()
}

fn kept_image(client: &mut Client) -> Option<Vec<(Pfn, ContentId)>> {
    let mut pages = Vec::new();
    let there = client.image(|pfn, id| pages.push((pfn, id))).unwrap();
    there.then_some(pages)
}

#[test]
fn contents_and_images_outlive_the_daemon() {
    let mut host = Host::started("store_size = \"1GiB\"");
    let (mut client, opened) = host.opened(GUEST, "guest", None);
    assert_eq!(
        (opened.group.as_str(), opened.store, opened.image),
        (&*format!("guest-{GUEST}"), true, true)
    );
    // More than fits into one message.
    let contents = contents(&opened.key, 2500);
    let ids: Vec<ContentId> = contents.iter().map(|(id, _)| *id).collect();
    let (first, rest) = contents.split_at(1000);
    assert_eq!(client.put(&borrowed(first)).unwrap(), 1000);
    let wanted = client.want(&ids).unwrap();
    assert_eq!(wanted.iter().position(|wanted| *wanted), Some(1000));
    assert_eq!(client.put(&borrowed(&contents)).unwrap(), rest.len() as u64);
    assert_eq!(kept_image(&mut client), None);
    let image = image_of(&ids);
    client.save_image(image.iter().copied()).unwrap();

    let check = |client: &mut Client| {
        let absent = ContentId([9; 16]);
        assert_eq!(
            client.read(&[absent, ids[7]]).unwrap(),
            [None, Some(contents[7].1.clone().into())]
        );
        let expected: Vec<Option<Box<[u8]>>> = contents.iter().map(|(_, page)| Some(page.clone().into())).collect();
        assert!(client.read(&ids).unwrap() == expected);
        assert_eq!(kept_image(client).as_ref(), Some(&image));
        let mut keys = Vec::new();
        client.holdings(|key| keys.push(key)).unwrap();
        let mut expected: Vec<u64> = ids.iter().map(ContentId::lookup_key).collect();
        keys.sort_unstable();
        expected.sort_unstable();
        assert_eq!(keys, expected);
    };
    check(&mut client);

    host.end(Signal::KILL);
    assert!(client.want(&ids).is_err());
    host.start();
    let (mut client, again) = host.opened(
        GUEST,
        "guest",
        Some(&Offer {
            group: opened.group.clone(),
            key: opened.key.clone(),
        }),
    );
    assert_eq!(again, opened);
    check(&mut client);

    let more = ContentId([0; 16]);
    assert_eq!(
        code(client.put(&[(more, &contents[0].1)])),
        ErrorCode::BadRequest,
        "not its id"
    );
    check(&mut client);
    // Put and not named by an image: an orderly end keeps it.
    let page = vec![1; PAGE_SIZE];
    client.put(&[(opened.key.id(&page), &page)]).unwrap();
    let (status, said) = host.end(Signal::TERM);
    assert!(status.success() && said.contains("stopped"), "{status}: {said}");
    assert!(!host.socket().exists());
    host.start();
    let (mut client, _) = host.opened(GUEST, "guest", None);
    assert!(client.read(&[opened.key.id(&page)]).unwrap()[0].is_some());
}

/// Of a guest of 64 pages that writes so many of them.
fn model(pages: u64) -> Vec<u8> {
    let mut builder = Builder::new(64, 64, Duration::from_millis(50));
    let mut written = PageSet::new(64);
    written.insert_run(0..pages);
    builder.sample(&written);
    Filter::new(Some(builder.finish()), 64, 64).learnt().to_bytes().unwrap()
}

#[test]
fn models_outlive_the_daemon_and_need_no_store() {
    let mut host = Host::started("store_size = \"0\"");
    let mut client = host.client();
    assert_eq!(client.model(GUEST).unwrap(), None);
    client.save_model(GUEST, &model(3)).unwrap();
    client.save_model(GUEST, &model(5)).unwrap();
    assert_eq!(code(client.save_model(GUEST, b"no model")), ErrorCode::BadRequest);
    assert_eq!(code(client.save_model("../1", &model(3))), ErrorCode::BadRequest);
    assert_eq!(code(client.model("../1")), ErrorCode::BadRequest);
    drop(client);
    host.end(Signal::TERM);
    host.start();
    let mut client = host.client();
    assert_eq!(client.model(GUEST).unwrap(), Some(model(5)));
    assert_eq!(client.model(OTHER).unwrap(), None);
    let changing = [GUEST, "../1"].map(|uuid| client.changing(uuid, u64::MAX).unwrap());
    assert_eq!(changing, [None, None], "no guest is read here");
}

#[test]
fn the_administrator_looks_after_the_store() {
    let mut host = Host::started("[group]\nweb = [\"web-*\"]");
    let (mut client, opened) = host.opened(GUEST, "web-1", None);
    let contents = contents(&opened.key, 20);
    client.put(&borrowed(&contents)).unwrap();
    let ids: Vec<ContentId> = contents.iter().map(|(id, _)| *id).collect();
    client.save_image(image_of(&ids[..10])).unwrap();
    assert_eq!(code(client.template_add("golden", OTHER)), ErrorCode::NotFound);
    assert_eq!(code(client.template_add("golden", "web-1")), ErrorCode::BadRequest);
    client.template_add("golden", GUEST).unwrap();

    // Groups that nobody has opened since the start are known by their keys.
    drop(client);
    host.end(Signal::TERM);
    host.start();
    let mut client = host.client();
    let templates = client.template_list().unwrap();
    assert_eq!(
        (templates[0].name.as_str(), templates[0].group.as_str()),
        ("golden", "web")
    );
    assert_eq!((templates.len(), templates[0].pages), (1, 10));
    let verified = client.store_verify().unwrap();
    assert_eq!(
        (verified.contents, verified.damaged, verified.groups_skipped),
        (20, 0, 0)
    );
    assert_eq!(client.store_gc().unwrap().contents, 10, "what no image names");
    let stats = client.store_stats().unwrap();
    let group = &stats.groups[0];
    assert_eq!((group.contents, group.images, group.templates), (10, 1, 1));
    // The caller that found the daemon ready is listed until its thread has ended.
    let deadline = Instant::now() + PATIENCE;
    let status = loop {
        let status = client.status().unwrap();
        if status.connections == 1 || Instant::now() > deadline {
            break status;
        }
        sleep(Duration::from_millis(10));
    };
    assert_eq!((status.groups, status.connections), (vec!["web".to_owned()], 1));
    assert!(
        matches!(status.store, StoreStatus::Open { contents: 10, .. }),
        "{:?}",
        status.store
    );

    assert_eq!(
        code(client.template_remove("golden", Some("other"))),
        ErrorCode::NotFound
    );
    client.template_remove("golden", None).unwrap();
    assert_eq!(code(client.template_remove("golden", None)), ErrorCode::NotFound);
}

#[test]
fn groups_and_keys_decide_who_shares() {
    let host = Host::started("[group]\nweb = [\"web-*\"]\nfast = [\"*-fast\"]");
    let offer = |group: &str, byte: u8| Offer {
        group: group.into(),
        key: ContentKey::new([byte; 32]),
    };
    // A configured group: its first host makes the key, the guests share.
    let (mut first, web) = host.opened(GUEST, "web-1", None);
    let page = vec![3; PAGE_SIZE];
    let id = web.key.id(&page);
    first.put(&[(id, &page)]).unwrap();
    let (mut second, same) = host.opened(OTHER, "web-2", None);
    assert_eq!((same.group.as_str(), &same.key), ("web", &web.key));
    assert!(second.read(&[id]).unwrap()[0].is_some());
    // A guest alone: its own key, nothing of others'.
    let (mut alone, own) = host.opened(OTHER, "database", None);
    assert_ne!(own.key, web.key);
    assert_eq!(alone.read(&[id]).unwrap(), [None]);
    let mode = |name: &str| fs::metadata(host.path(name)).unwrap().permissions().mode() & 0o777;
    assert_eq!(
        (mode("state/keys"), mode("state/keys/web.key"), mode("run/daemon.sock")),
        (0o700, 0o600, 0o600)
    );

    // The destination: the group has to be the same, the key is adopted, replaced for a guest alone, else refused.
    assert_eq!(host.refused("web-1", Some(&offer("other", 1))), ErrorCode::OtherGroup);
    assert_eq!(host.refused("database", Some(&offer("web", 1))), ErrorCode::OtherGroup);
    assert_eq!(host.refused("web-1", Some(&offer("web", 1))), ErrorCode::OtherKey);
    assert_eq!(host.refused("web-fast", None), ErrorCode::TwoGroups);
    let (_, adopted) = host.opened(GUEST, "a-fast", Some(&offer("fast", 7)));
    assert_eq!(adopted.key, ContentKey::new([7; 32]));
    alone.put(&[(own.key.id(&page), &page)]).unwrap();
    let (mut replaced, new) = host.opened(OTHER, "database", Some(&offer(&own.group, 8)));
    assert_eq!(new.key, ContentKey::new([8; 32]));
    assert_eq!(replaced.read(&[own.key.id(&page)]).unwrap(), [None]);
    assert!(code(alone.put(&[(own.key.id(&page), &page)])) == ErrorCode::Store);
    assert_eq!(code(host.client().open("web-1", "web-1", None)), ErrorCode::BadRequest);
}

#[test]
fn without_an_index_the_daemon_runs_on() {
    let no_xen = xen_sys::running_version().is_none();
    for (config, reason) in [
        ("", "no Xen"),
        ("index = false", "index is false"),
        ("index_size = 0", "index_size"),
    ] {
        if config.is_empty() && !no_xen {
            eprintln!("SKIPPED: this machine runs Xen");
            continue;
        }
        let mut host = Host::started(config);
        let (mut client, opened) = host.opened(GUEST, "guest", None);
        assert!(!opened.index && opened.store);
        let page = vec![3; PAGE_SIZE];
        client.put(&[(opened.key.id(&page), &page)]).unwrap();
        for (from, expected) in [
            (HoldingsFrom::All, 1),
            (HoldingsFrom::Store, 1),
            (HoldingsFrom::Guests, 0),
        ] {
            let mut count = 0;
            client.holdings_from(from, |_| count += 1).unwrap();
            assert_eq!(count, expected, "{from:?}");
        }
        let index = client.index().unwrap();
        assert_eq!(index, client.status().unwrap().index);
        assert!(
            matches!(&index, IndexStatus::Absent(absent) if !absent.failed && absent.reason.contains(reason)),
            "{index:?}"
        );
        let (_, said) = host.end(Signal::TERM);
        assert!(said.contains("are not looked up"), "{said}");
    }
    let status = Host::new("index_rate = 0").spawn().wait().unwrap();
    assert!(!status.success());
}

#[test]
fn a_second_daemon_is_refused() {
    let host = Host::started("");
    let second = host.spawn().wait_with_output().unwrap();
    let said = String::from_utf8_lossy(&second.stderr).into_owned();
    assert!(
        !second.status.success() && said.contains("another daemon listens"),
        "{said}"
    );
    host.is_well();
}

#[test]
fn without_a_store_the_daemon_runs_on() {
    for (config, spoilt, failed) in [("store_size = 0", false, false), ("", true, true)] {
        let mut host = Host::new(config);
        if spoilt {
            fs::create_dir(host.path("state")).unwrap();
            fs::write(host.path("state/store"), "no folder").unwrap();
        }
        host.start();
        let (mut client, opened) = host.opened(GUEST, "guest", None);
        assert!(!opened.store);
        // Nor is memory shared.
        assert!(!opened.image);
        let contents = contents(&opened.key, 2);
        let ids = [contents[0].0, contents[1].0];
        assert_eq!(client.want(&ids).unwrap(), [false; 2]);
        assert_eq!(client.put(&borrowed(&contents)).unwrap(), 0);
        assert_eq!(client.read(&ids).unwrap(), [None, None]);
        client.holdings(|_| panic!("nothing is held")).unwrap();
        client.save_image(image_of(&ids)).unwrap();
        assert_eq!(kept_image(&mut client), None);
        assert_eq!(code(client.store_stats()), ErrorCode::NoStore);
        assert_eq!(code(client.store_gc()), ErrorCode::NoStore);
        assert_eq!(code(client.template_list()), ErrorCode::NoStore);
        let StoreStatus::Absent(absent) = client.status().unwrap().store else {
            panic!()
        };
        assert_eq!(absent.failed, failed, "{}", absent.reason);
        let (_, said) = host.end(Signal::INT);
        assert!(said.contains("no contents are kept"), "{said}");
    }
}

/// What a caller of the bare socket gets: all answers until the daemon closes.
fn answers(socket: &Path, sent: &[u8]) -> Vec<Reply> {
    let mut stream = UnixStream::connect(socket).unwrap();
    // The daemon may close before it has read all.
    let _ = stream.write_all(sent);
    let _ = stream.shutdown(std::net::Shutdown::Write);
    stream.set_read_timeout(Some(PATIENCE)).unwrap();
    let mut reader = std::io::BufReader::new(stream);
    let mut answers = Vec::new();
    loop {
        match read_message(&mut reader) {
            Ok(Message { body, .. }) => answers.push(body),
            Err(ControlError::Closed | ControlError::Io(_)) => return answers,
            Err(error) => panic!("{error}"),
        }
    }
}

fn written(request: &Request, payload: &[u8]) -> Vec<u8> {
    let mut bytes = Vec::new();
    write_message(&mut bytes, request, payload).unwrap();
    bytes
}

fn open_request() -> Vec<u8> {
    let open = Request::Open {
        guest_uuid: GUEST.into(),
        guest_name: "guest".into(),
        offered: None,
    };
    written(&open, &[])
}

fn only_error(answers: &[Reply]) -> ErrorCode {
    match answers {
        [Reply::Error(refusal)] => refusal.code,
        other => panic!("{other:?}"),
    }
}

#[test]
fn hostile_callers_are_answered_and_survived() {
    let host = Host::started("");
    let socket = host.socket();
    let text = |header: &str| only_error(&answers(&socket, header.as_bytes()));
    assert_eq!(text("GET / HTTP/1.1\r\n\r\n\0"), ErrorCode::BadRequest);
    assert_eq!(text("{\"version\":1,\"request\":\"dance\"}\0"), ErrorCode::BadRequest);
    assert_eq!(text("{\"version\":7,\"request\":\"dance\"}\0"), ErrorCode::Version);
    let long = format!(
        "{{\"version\":1,\"request\":\"put\",\"payload_bytes\":{}}}\0",
        MAX_PAYLOAD_BYTES + 1
    );
    assert_eq!(text(&long), ErrorCode::BadRequest);
    assert_eq!(text(&" ".repeat(MAX_REQUEST_BYTES + 1)), ErrorCode::BadRequest);
    assert_eq!(text(&("[".repeat(50_000) + "\0")), ErrorCode::BadRequest);

    // Requests that are out of order, or malformed inside, leave the connection in use.
    let mut client = host.client();
    assert_eq!(code(client.want(&[ContentId([0; 16])])), ErrorCode::Order);
    assert_eq!(code(client.save_image([])), ErrorCode::Order);
    client.open(GUEST, "guest", None).unwrap();
    assert_eq!(code(client.open(GUEST, "guest", None)), ErrorCode::Order);
    client.status().unwrap();
    let requests = [
        (Request::Want {}, vec![0; 15]),
        (Request::Read {}, vec![0; 16 * 1024]),
        (Request::Put {}, vec![0; PAGE_SIZE]),
        (Request::SaveImage { last: true }, vec![0xff; 24]),
        (Request::Status {}, vec![0; 1]),
    ];
    for (request, payload) in requests {
        let sent = [open_request(), written(&request, &payload), open_request()].concat();
        let answers = answers(&socket, &sent);
        let [Reply::Opened { .. }, Reply::Error(inner), Reply::Error(again)] = answers.as_slice() else {
            panic!("{request:?}: {answers:?}")
        };
        assert_eq!(
            (inner.code, again.code),
            (ErrorCode::BadRequest, ErrorCode::Order),
            "{request:?}"
        );
    }
    let entry = [&[0; 8][..], &[1; 16]].concat();
    let part = written(&Request::SaveImage { last: false }, &entry);
    let image = written(&Request::Image {}, &[]);
    let answers = answers(&socket, &[open_request(), part, image.clone(), image].concat());
    let [
        Reply::Opened { .. },
        Reply::Done { .. },
        Reply::Error(order),
        Reply::None {},
    ] = answers.as_slice()
    else {
        panic!("{answers:?}")
    };
    assert_eq!(order.code, ErrorCode::Order);
    host.is_well();
}

#[test]
fn callers_may_go_at_every_byte() {
    let host = Host::started("");
    let (_, opened) = host.opened(GUEST, "guest", None);
    let contents = contents(&opened.key, 1);
    let talk = [
        open_request(),
        written(&Request::Want {}, &contents[0].0.0),
        written(&Request::SaveImage { last: false }, &[0; 24]),
        written(&Request::Put {}, &pages_payload(&borrowed(&contents))),
    ]
    .concat();
    let small = talk.len() - PAGE_SIZE;
    for end in (0..small).chain((small..talk.len()).step_by(509)) {
        for reply in answers(&host.socket(), &talk[..end]) {
            assert!(!matches!(reply, Reply::Error(_)), "cut at {end}: {reply:?}");
        }
    }
    // Gone without reading what was answered.
    for _ in 0..100 {
        let mut stream = UnixStream::connect(host.socket()).unwrap();
        stream.write_all(&talk).unwrap();
    }
    host.is_well();
    let (mut client, _) = host.opened(GUEST, "guest", None);
    assert_eq!(kept_image(&mut client), None, "nothing half is kept");
}

#[test]
fn callers_beyond_the_bound_are_turned_away() {
    let host = Host::started("");
    let silent: Vec<Client> = (0..xenfoldd::server::MAX_CONNECTIONS).map(|_| host.client()).collect();
    assert_eq!(code(host.client().status()), ErrorCode::Busy);
    drop(silent);
    host.is_well();
}

#[test]
fn a_wrong_configuration_is_an_error_with_its_line() {
    let host = Host::new("store_size = \"4GiB\"\nstore_sise = 1\n");
    let output = host.spawn().wait_with_output().unwrap();
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(!output.status.success() && said.contains("line 2"), "{said}");
}

#[test]
fn systemd_hears_when_callers_are_served() {
    let host = Host::new("");
    let path = host.path("notify");
    let notify = UnixDatagram::bind(&path).unwrap();
    notify.set_read_timeout(Some(PATIENCE)).unwrap();
    let mut daemon = host.command().env("NOTIFY_SOCKET", &path).spawn().unwrap();
    let mut said = [0; 64];
    let length = notify.recv(&mut said).unwrap();
    assert!(said[..length].starts_with(b"READY=1"));
    host.client().status().unwrap();
    daemon.kill().unwrap();
    daemon.wait().unwrap();
}

#[test]
fn without_xen_sharing_is_refused_in_a_sentence() {
    let host = Host::started("store_size = 0\nsharing = true");
    let mut client = host.client();
    match client.dedup().unwrap() {
        DedupStatus::Absent(absent) => assert!(absent.reason.contains("no Xen"), "{absent:?}"),
        running => panic!("{running:?}"),
    }
    let refused = |refused: Result<(), ControlError>, code: ErrorCode| match refused {
        Err(ControlError::Refused(refusal)) => assert_eq!(refusal.code, code, "{refusal}"),
        other => panic!("{other:?}"),
    };
    refused(client.dedup_enable(true), ErrorCode::NoSharing);
    refused(client.dedup_scan(GUEST), ErrorCode::NotFound);
    // The connection is as good as before.
    client.status().unwrap();
}

const METRICS: &str = "store_size = \"64MiB\"\nmetrics = \"HERE/run/metrics.sock\"";

impl Host {
    /// The socket of the figures, connected.
    fn figures(&self) -> UnixStream {
        let stream = UnixStream::connect(self.path("run/metrics.sock")).unwrap();
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        stream
    }

    /// What a caller of that socket gets for these bytes.
    fn told(&self, request: &[u8]) -> String {
        let mut stream = self.figures();
        // The daemon may close before it has read all.
        let _ = stream.write_all(request);
        let mut answer = String::new();
        let _ = stream.read_to_string(&mut answer);
        answer
    }

    fn get(&self, path: &str) -> String {
        let answer = self.told(format!("GET {path} HTTP/1.1\r\nHost: xen\r\n\r\n").as_bytes());
        assert!(answer.starts_with("HTTP/1.1 200 OK\r\n"), "{answer}");
        answer.split_once("\r\n\r\n").unwrap().1.to_owned()
    }
}

#[test]
fn figures_are_told_as_text_and_as_json() {
    let mut host = Host::started(METRICS);
    let (mut client, opened) = host.opened(GUEST, "guest", None);
    client.put(&borrowed(&contents(&opened.key, 20))).unwrap();
    // A migration whose agent is this process, and one whose agent was killed.
    let record = |uuid: &str| {
        let migration = Migration {
            guest: "we\"b".into(),
            uuid: uuid.into(),
            host: "b".into(),
            agent: std::process::id(),
            ..Migration::default()
        };
        let file = fs::File::create(record_path(&host.path("run"), uuid)).unwrap();
        serde_json::to_writer(&file, &migration).unwrap();
        file
    };
    let agent = record(GUEST);
    agent.lock().unwrap();
    drop(record(OTHER));
    let figures = Figures {
        iteration: 2,
        wire_bytes: 12345,
        ..Figures::default()
    };
    fs::write(
        figures_path(&host.path("run"), GUEST),
        serde_json::to_vec(&figures).unwrap(),
    )
    .unwrap();
    let text = host.get("/metrics");
    for line in [
        "xenfold_store_up 1",
        "xenfold_store_contents 20",
        "xenfold_store_limit_bytes 67108864",
        "xenfold_migrations 1",
        "xenfold_migration_wire_bytes{domid=\"0\",guest=\"we\\\"b\",host=\"b\"} 12345",
    ] {
        assert!(text.lines().any(|one| one == line), "{line}\n{text}");
    }
    let overview: Overview = serde_json::from_str(&host.get("/metrics.json")).unwrap();
    assert_eq!(overview.status.pid, client.status().unwrap().pid);
    assert!(matches!(overview.status.store, StoreStatus::Open { contents: 20, .. }));
    assert_eq!(overview.migrations.len(), 1);
    assert_eq!(overview.migrations[0].figures.as_ref(), Some(&figures));
    let mode = fs::metadata(host.path("run/metrics.sock"))
        .unwrap()
        .permissions()
        .mode();
    assert_eq!(mode & 0o777, 0o600);
    assert!(host.told(b"GET /etc/passwd HTTP/1.1\r\n\r\n").contains(" 404 "));
    drop(client);
    let (status, said) = host.end(Signal::TERM);
    assert!(status.success() && said.contains("figures are told on"), "{said}");
    assert!(!host.path("run/metrics.sock").exists());
}

#[test]
fn nobody_holds_the_figures_up() {
    let host = Host::started(METRICS);
    // More than are answered at a time, who say nothing, or never come to an end.
    let silent: Vec<UnixStream> = (0..3).map(|_| host.figures()).collect();
    let slow: Vec<UnixStream> = (0..9).map(|_| host.figures()).collect();
    for mut stream in &slow {
        let _ = stream.write_all(b"GET /metrics HTTP/1.1\r\nX: ");
    }
    host.is_well();
    for bytes in [&b"\xff\x00\r\n\r\n"[..], b"POST / HTTP/1.1\r\n\r\n", &[b'x'; 100_000]] {
        assert!(!host.told(bytes).contains(" 200 "));
    }
    host.is_well();
    // They are still there: their time is up before long.
    let deadline = Instant::now() + PATIENCE;
    while !host.told(b"GET /metrics HTTP/1.0\r\n\r\n").contains(" 200 OK") {
        assert!(Instant::now() < deadline);
        sleep(Duration::from_millis(50));
    }
    drop((silent, slow));
    for _ in 0..50 {
        let mut stream = host.figures();
        let _ = stream.write_all(b"GET /metrics HTTP/1.1\r\n\r\n");
    }
    host.is_well();
}

#[test]
fn figures_are_told_only_where_it_is_configured() {
    let host = Host::started("store_size = 0");
    assert!(!host.path("run/metrics.sock").exists());
    let mut host = Host::new("metrics = \"HERE/taken\"");
    fs::write(host.path("taken"), "no socket").unwrap();
    host.start();
    host.is_well();
    let (_, said) = host.end(Signal::TERM);
    assert!(said.contains("no figures are told") && said.contains("taken"), "{said}");
    let wrong = Host::new("store_size = 0\nmetrics = \"metrics.sock\"");
    let said = wrong.spawn().wait_with_output().unwrap().stderr;
    assert!(String::from_utf8_lossy(&said).contains("line 2"));
}
