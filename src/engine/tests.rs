//! The pipelines alone, with what a caller cannot choose: how much of a content id the table's lookup uses.
use std::io;
use std::sync::Arc;

use parking_lot::Mutex;

use self::support::{Batch, Guest, Mix, StreamSpec, build_stream};
use super::link::{Link, Unseen};
use super::receiving::{Rebuilding, Receiving, XlInput};
use super::sending::{Prepared, Sending};
use crate::page::ContentKey;
use crate::report::Figures;
use crate::stream::Reader;
use crate::table::PageTable;
use crate::wire::{FrameReader, Kind};

#[path = "../../tests/support/mod.rs"]
mod support;

/// What is written into it, kept.
#[derive(Clone, Default)]
struct Kept(Arc<Mutex<Vec<u8>>>);

impl io::Write for Kept {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0.lock().extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// Sends a stream and rebuilds it. Returns what came out up to libxl's END, and the references sent.
fn through(stream: &[u8], table: PageTable) -> (Vec<u8>, u64) {
    let (wire, figures) = (Kept::default(), Arc::new(Mutex::new(Figures::default())));
    let key = ContentKey::new([3; 32]);
    let sending = Sending {
        stream: Reader::new(io::Cursor::new(stream.to_vec())),
        link: Link::start(Box::new(wire.clone()), Arc::new(|| {}), Arc::new(Unseen)).unwrap(),
        key: key.clone(),
        prepared: Prepared::start().unwrap(),
        frames: false,
        window_rows: u32::MAX,
        pacing: None,
        bandwidth: None,
        holdings: None,
        contents: None,
        holding: None,
        table,
        figures: figures.clone(),
    };
    sending.run().unwrap();
    let out = Kept::default();
    let xl = XlInput {
        writer: Box::new(out.clone()),
        unread: Arc::new(|| Ok(0)),
    };
    let mut receiving = Receiving::start(Rebuilding {
        xl,
        frames: None,
        key,
        speaks_contents: false,
        late: false,
        early: None,
        contents: None,
        link: None,
        patience: std::time::Duration::from_secs(60),
        figures: Arc::default(),
    })
    .unwrap();
    let wire = wire.0.lock().clone();
    let mut reader = FrameReader::new(&wire[..]);
    let end = loop {
        let frame = reader.read().unwrap();
        let last = frame.kind == Kind::End;
        if frame.kind != Kind::Ping {
            receiving.frame(frame).unwrap();
        }
        if last {
            break receiving.finish().unwrap().0;
        }
    };
    assert_eq!((end.digest, end.rows), (end.end.digest, end.end.rows));
    let references = figures.lock().pages.reference;
    (out.0.lock().clone(), references)
}

#[test]
fn colliding_lookups_give_no_wrong_page() {
    let spec = StreamSpec {
        guest: Guest::Hvm,
        pages: 900,
        hole_percent: 0,
        mix: Mix {
            random: 6,
            repeat: 6,
            ..Mix::ALL
        },
        batch: Batch::Mixed(60),
        ..StreamSpec::default()
    };
    let stream = build_stream(&spec);
    let (_, usual) = through(&stream, PageTable::default());
    assert!(usual > 300, "{usual}");
    for bits in [0, 3, 8] {
        let (out, references) = through(&stream, PageTable::with_lookup_bits(bits));
        assert!(out == stream[..stream.len() - 8], "{bits} bits: what came out differs");
        assert_eq!(references, usual, "{bits} bits: the full id decides");
    }
}
