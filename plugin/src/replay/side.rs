//! One side of a replay, a process of its own: the wire on standard input and output.
use std::fs::File;
use std::io::{self, BufWriter, Read, Write};
use std::os::unix::fs::FileExt;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use hashbrown::HashMap;
use parking_lot::Mutex;
use rustix::io::fcntl_dupfd_cloexec;
use xenfold::engine::destination::XlInput;
use xenfold::engine::source::{self, Source, SourceSetup};
use xenfold::engine::{Contents, FrameError, FrameSource, LinkEnds, Unseen, WINDOW_ROWS, destination};
use xenfold::page::{ContentKey, PAGE_SIZE, Pfn};
use xenfold::report::Figures;
use xenfold::stream::PageData;
use xenfold::wire::Hello;

use super::base::Base;
use super::gate::{Gate, GateArguments, Gated};
use super::link::Paced;
use super::{Mode, Rate, SideFigures};
use crate::usage;

/// Silence that ends a replay; nothing is silent in one unless it is stuck.
const TIMEOUT: Duration = Duration::from_secs(120);

/// A side that has hung up and not ended by itself waits for the other one.
const HANGUP: Duration = Duration::from_secs(2);

#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum Role {
    Send,
    /// Does not wait for the receiver's verdict: there is none.
    SendAlone,
    /// The same, and what it sends is its output.
    Record,
    Receive,
}

impl Role {
    pub fn name(self) -> &'static str {
        match self {
            Role::Send => "send",
            Role::SendAlone => "send-alone",
            Role::Record => "record",
            Role::Receive => "receive",
        }
    }
}

#[derive(Debug, clap::Args)]
pub struct SideArguments {
    role: Role,
    mode: Mode,
    file: PathBuf,
    figures: PathBuf,
    output: Option<PathBuf>,
    /// An earlier save that both sides hold, and its index.
    #[arg(long)]
    base: Option<PathBuf>,
    #[arg(long)]
    base_index: Option<PathBuf>,
    /// What the link carries, for a side that has to do with it.
    #[arg(long)]
    rate: Rate,
    /// Where this side says that it is ready, and where it is then told to begin.
    #[command(flatten)]
    gate: GateArguments,
}

/// Plays one side and leaves its figures.
pub fn run_side(arguments: &SideArguments) -> Result<()> {
    let mut side = SideFigures::default();
    let output = || -> Result<File> {
        let path = arguments.output.as_ref().context("this side needs an output")?;
        Ok(File::options().read(true).write(true).open(path)?)
    };
    let gate = Gate::open(&arguments.gate)?;
    let wire = || -> Result<Box<dyn Write + Send>> {
        Ok(match arguments.role {
            Role::Record => Box::new(Paced::new(output()?, arguments.rate)),
            _ => Box::new(stdout()?),
        })
    };
    match (arguments.mode, arguments.role) {
        (Mode::Xenfold, Role::Receive) => receive(arguments, output()?, gate)?,
        (Mode::Xenfold, _) => side.figures = Some(send(arguments, wire()?, gate)?),
        (_, Role::Receive) => copy_in(arguments.mode, output()?, gate)?,
        _ => copy_out(arguments.mode, Gated::new(File::open(&arguments.file)?, gate), wire()?)?,
    }
    (side.cpu_ms, side.peak_rss_bytes) = usage::cpu_ms_and_peak_rss_bytes();
    std::fs::write(&arguments.figures, serde_json::to_vec(&side)?)?;
    Ok(())
}

/// Bytes that the copying modes move at once.
const COPY_BYTES: usize = 1 << 20;

fn copy(mut from: impl Read, mut to: impl Write) -> io::Result<()> {
    // Touched, as the engine's buffers are, before there is something to read.
    let mut buffer = vec![1; COPY_BYTES];
    loop {
        match from.read(&mut buffer)? {
            0 => return to.flush(),
            n => to.write_all(buffer.get(..n).unwrap_or_default())?,
        }
    }
}

fn copy_out(mode: Mode, file: Gated, wire: Box<dyn Write + Send>) -> Result<()> {
    match mode {
        Mode::Plain => copy(file, wire)?,
        Mode::Zstd1 => {
            let mut wire = zstd::Encoder::new(BufWriter::with_capacity(COPY_BYTES, wire), 1)?;
            copy(file, &mut wire)?;
            wire.finish()?.flush()?;
        }
        Mode::Lz4 => {
            let mut wire = lz4_flex::frame::FrameEncoder::new(BufWriter::with_capacity(COPY_BYTES, wire));
            copy(file, &mut wire)?;
            wire.finish()?.flush()?;
        }
        Mode::Xenfold => bail!("not a copying mode"),
    }
    Ok(())
}

fn copy_in(mode: Mode, output: File, gate: Gate) -> Result<()> {
    // Closed when all has been written.
    let _done = stdout()?;
    let wire = Gated::new(stdin()?, gate);
    match mode {
        Mode::Plain => copy(wire, output)?,
        Mode::Zstd1 => copy(zstd::Decoder::new(wire)?, output)?,
        Mode::Lz4 => copy(lz4_flex::frame::FrameDecoder::new(wire), output)?,
        Mode::Xenfold => bail!("not a copying mode"),
    }
    Ok(())
}

fn stdin() -> Result<File> {
    Ok(File::from(fcntl_dupfd_cloexec(rustix::stdio::stdin(), 3)?))
}

/// The only one, so that the peer sees when it is closed: that is when a side is done, not at the process's end.
fn stdout() -> Result<File> {
    let wire = File::from(fcntl_dupfd_cloexec(rustix::stdio::stdout(), 3)?);
    rustix::stdio::dup2_stdout(File::options().write(true).open("/dev/null")?)?;
    Ok(wire)
}

fn link(wire: Box<dyn Write + Send>) -> Result<LinkEnds> {
    Ok(LinkEnds {
        to_peer: wire,
        from_peer: Box::new(stdin()?),
        hangup: Arc::new(|| {
            // Whoever hangs up because of an error still has to say which.
            std::thread::spawn(|| {
                std::thread::sleep(HANGUP);
                eprintln!("replay: the other side does not answer");
                std::process::exit(70);
            });
        }),
        carrier: Arc::new(Unseen),
    })
}

/// The key of content ids in a replay.
pub fn key() -> ContentKey {
    ContentKey::new(*b"replayed, so nothing is secret..")
}

fn hello() -> Hello {
    Hello {
        program: xenfold::VERSION.into(),
        contents: true,
        ..Hello::default()
    }
}

fn base(arguments: &SideArguments) -> Result<Option<Arc<dyn Contents>>> {
    let (Some(save), Some(index)) = (&arguments.base, &arguments.base_index) else {
        return Ok(None);
    };
    Ok(Some(Arc::new(Base::open(save, index)?)))
}

fn send(arguments: &SideArguments, wire: Box<dyn Write + Send>, gate: Gate) -> Result<Figures> {
    let contents = base(arguments)?;
    let file = File::open(&arguments.file)?;
    let negotiated = source::negotiate(link(wire)?, &hello().with_key(&key()), TIMEOUT)?;
    let figures = Arc::new(Mutex::new(Figures {
        mode: "xenfold".into(),
        ..Figures::default()
    }));
    let setup = SourceSetup {
        to_xl: Box::new(io::sink()),
        failing: Box::new(|| {}),
        while_xl_waits: None,
        frames: None,
        verify: false,
        holding: None,
        learnt: None,
        bandwidth: None,
        contents,
        connect: None,
        journal: None,
        figures: figures.clone(),
        events: source::events(),
    };
    let mut source = Source::new(negotiated, setup)?;
    source.wait_prepared()?;
    let end = source.send_stream(Box::new(Gated::new(file, gate)))?;
    if arguments.role == Role::Send {
        source.settle(&end)?;
    }
    // Closes the wire; what is left of the stream may go later.
    drop(source);
    let figures = figures.lock().clone();
    Ok(figures)
}

fn receive(arguments: &SideArguments, output: File, gate: Gate) -> Result<()> {
    let hello = Hello {
        frames: true,
        window_rows: WINDOW_ROWS as u32,
        paces: true,
        ..hello()
    };
    let contents = base(arguments)?;
    let negotiated = destination::negotiate(link(Box::new(stdout()?))?, &hello, TIMEOUT)?;
    let image = Arc::new(Mutex::new(Image {
        file: output,
        written: 0,
        places: Places::default(),
    }));
    let input = XlInput {
        writer: Box::new(ImageWriter(image.clone())),
        unread: Arc::new(|| Ok(0)),
    };
    let frames = Some(Box::new(ImageFrames(image)) as Box<dyn FrameSource>);
    destination::rebuild(negotiated, input, frames, contents, || gate.ready())?;
    Ok(())
}

/// What has been rebuilt so far: the saved guest itself, and where in it each page's newest bytes are.
struct Image {
    file: File,
    written: u64,
    places: Places,
}

/// Places in a file by page number, in groups of 64 neighbours: what a replay needs for itself should not hide what the
/// engine needs.
#[derive(Default)]
struct Places(HashMap<u64, Box<[u64; 64]>>);

impl Places {
    fn set(&mut self, pfn: Pfn, place: u64) {
        let group = self.0.entry(pfn.get() / 64).or_insert_with(|| Box::new([0; 64]));
        if let Some(entry) = group.get_mut((pfn.get() % 64) as usize) {
            *entry = place;
        }
    }

    /// No page is at the file's begin.
    fn get(&self, pfn: Pfn) -> Option<u64> {
        let place = *self.0.get(&(pfn.get() / 64))?.get((pfn.get() % 64) as usize)?;
        (place > 0).then_some(place)
    }
}

struct ImageWriter(Arc<Mutex<Image>>);

impl Write for ImageWriter {
    /// The engine writes a record in one call.
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let mut image = self.0.lock();
        image.file.write_all(bytes)?;
        if let Some((_, body)) = bytes.split_at_checked(8)
            && let Ok(data) = PageData::parse(body, 0)
        {
            let mut place = image.written + (bytes.len() - data.pages().len()) as u64;
            for entry in data.entries().filter(|entry| entry.has_data) {
                image.places.set(entry.pfn, place);
                place += PAGE_SIZE as u64;
            }
        }
        image.written += bytes.len() as u64;
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

struct ImageFrames(Arc<Mutex<Image>>);

impl FrameSource for ImageFrames {
    fn read(&mut self, pfns: &[Pfn], pages: &mut [u8]) -> Result<(), FrameError> {
        let image = self.0.lock();
        for (pfn, page) in pfns.iter().zip(pages.chunks_exact_mut(PAGE_SIZE)) {
            let missing = || io::Error::from(io::ErrorKind::NotFound);
            let place = image.places.get(*pfn).ok_or_else(missing);
            place
                .and_then(|place| image.file.read_exact_at(page, place))
                .map_err(|source| FrameError::Unreadable { pfn: *pfn, source })?;
        }
        Ok(())
    }
}
