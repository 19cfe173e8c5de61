//! Streams for tests: what to build ([`StreamSpec`]), the builder, proptest strategies, and a naive rebuilder that
//! shares no code with `xenfold::stream`.
//!
//! ```ignore
//! mod support;
//! let spec = support::StreamSpec { guest: support::Guest::Pvh, pages: 4096, ..Default::default() };
//! let stream = support::build_stream(&spec);
//! let memory = support::rebuild(&stream, spec.start).unwrap().pages;
//! ```
#![allow(
    dead_code,
    unused_imports,
    reason = "each integration test uses its own part of this"
)]

mod contents;
pub mod oracle;
mod rebuild;
mod strategies;

pub use contents::{Content, PAGE, Rng};
pub use rebuild::{OtherRecord, Rebuilt, rebuild};
pub use strategies::{oracle_spec, small_spec};

use std::io::{self, Write};

/// Kind of guest; it decides which records stand in the stream.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Guest {
    Pv,
    Hvm,
    Pvh,
}

/// What the stream starts with.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Start {
    /// xl's header, as in `xl migrate` and `xl save`.
    Xl,
    /// libxl's header, as `verify-stream-v2 -f libxl` wants it.
    Libxl,
}

/// How pages are put into PAGE_DATA records.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Batch {
    /// This many to a record, the last of a pass fewer.
    Fixed(usize),
    /// Between one and this many, at random.
    Mixed(usize),
    /// As Xen: up to 1024, cut at 4 MiB boundaries of the guest's memory.
    Aligned,
}

/// Where pages' contents come from: weights, relative to each other.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Mix {
    pub zero: u32,
    /// The content of any earlier page, at any distance.
    pub repeat: u32,
    /// The content of the page just before.
    pub neighbour: u32,
    /// Unique and incompressible.
    pub random: u32,
    /// Unique and compressible.
    pub text: u32,
    /// Unique, a few bytes different from an earlier page.
    pub similar: u32,
    /// One byte value all over.
    pub constant: u32,
}

impl Mix {
    pub const ALL: Mix = Mix {
        zero: 3,
        repeat: 3,
        neighbour: 1,
        random: 2,
        text: 4,
        similar: 2,
        constant: 1,
    };
    /// Nothing to gain: what the codec must step back from.
    pub const INCOMPRESSIBLE: Mix = Mix {
        zero: 0,
        repeat: 0,
        neighbour: 0,
        random: 1,
        text: 0,
        similar: 0,
        constant: 0,
    };
}

/// A stream to be built; the same one gives the same bytes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct StreamSpec {
    pub seed: u64,
    pub guest: Guest,
    /// Of the libxc stream: 2 or 3.
    pub version: u32,
    pub start: Start,
    /// Pages of the guest.
    pub pages: usize,
    /// Chance of a hole in the pfns before a page.
    pub hole_percent: u32,
    /// Passes over the guest, the last one with the guest suspended.
    pub passes: usize,
    /// Part of the pages that each pass after the first repeats; half of them with their content unchanged.
    pub dirty_percent: u32,
    /// Pages that are written again change a little where they can.
    pub rewrite_similar: bool,
    pub mix: Mix,
    /// Pages of types D and F (PV: also E), that come without data. They may have had data in an earlier pass.
    pub no_data_percent: u32,
    /// Page tables of a PV guest (types 1-4 and 9-C).
    pub page_table_percent: u32,
    pub batch: Batch,
    /// Now and then the same pfn twice in one record.
    pub repeat_in_record: bool,
    /// As `xl migrate --debug`: VERIFY and everything again.
    pub verify: bool,
    /// Remus: that many checkpoints inside the libxc stream, each with dirty pages and libxl records.
    pub checkpoints: usize,
    /// Libxc records with bit 31 set, of unknown types.
    pub optional_records: bool,
    /// Records of unknown mandatory types in both layers: for `Reader::pass_unknown`.
    pub unknown_records: bool,
    /// Non-empty EMULATOR_XENSTORE_DATA (HVM).
    pub emulator_xenstore: bool,
    /// Bodies that need padding.
    pub odd_lengths: bool,
    /// Reserved bits set and padding not zero: must be kept as it came.
    pub dirty_reserved: bool,
    /// Bytes of EMULATOR_CONTEXT after its header (HVM).
    pub emulator_context: usize,
    pub vcpus: u32,
}

impl Default for StreamSpec {
    fn default() -> Self {
        StreamSpec {
            seed: 1,
            guest: Guest::Pvh,
            version: 3,
            start: Start::Xl,
            pages: 64,
            hole_percent: 5,
            passes: 3,
            dirty_percent: 20,
            rewrite_similar: false,
            mix: Mix::ALL,
            no_data_percent: 3,
            page_table_percent: 10,
            batch: Batch::Mixed(16),
            repeat_in_record: false,
            verify: false,
            checkpoints: 0,
            optional_records: false,
            unknown_records: false,
            emulator_xenstore: false,
            odd_lengths: true,
            dirty_reserved: false,
            emulator_context: 6159,
            vcpus: 2,
        }
    }
}

impl StreamSpec {
    /// Leaves out what Xen's `verify-stream-v2` rejects although Xen accepts it, and what Xen never writes.
    pub fn for_oracle(mut self) -> Self {
        self.start = Start::Libxl;
        self.optional_records = false;
        self.unknown_records = false;
        self.emulator_xenstore = false;
        self.dirty_reserved = false;
        self.checkpoints = 0;
        self
    }
}

/// The whole stream as bytes.
pub fn build_stream(spec: &StreamSpec) -> Vec<u8> {
    let mut out = Vec::new();
    write_stream(spec, &mut out).expect("writing into a Vec");
    out
}

/// Writes the stream piece by piece, for those too large to be held.
pub fn write_stream(spec: &StreamSpec, out: impl Write) -> io::Result<()> {
    Builder::new(spec, out).stream()
}

struct Builder<'a, W> {
    spec: &'a StreamSpec,
    rng: Rng,
    out: W,
    /// Ascending pfns of the guest.
    pfns: Vec<u64>,
    /// Each page's type and content now.
    memory: Vec<(u8, Content)>,
    /// Every content ever sent, for repeats.
    sent: Vec<Content>,
    /// After VERIFY: what is sent is what was sent.
    verifying: bool,
}

impl<'a, W: Write> Builder<'a, W> {
    fn new(spec: &'a StreamSpec, out: W) -> Self {
        let mut rng = Rng::new(spec.seed);
        let mut pfn = rng.below(4);
        let mut pfns = Vec::with_capacity(spec.pages);
        for _ in 0..spec.pages {
            if rng.percent(spec.hole_percent) {
                // Now and then far away, up to the 52 bits that an entry has.
                pfn += if rng.percent(2) && pfn < 1 << 48 {
                    1 << 48
                } else {
                    1 + rng.below(2000)
                };
            }
            pfns.push(pfn);
            pfn += 1;
        }
        Builder {
            spec,
            rng,
            out,
            pfns,
            memory: Vec::new(),
            sent: Vec::new(),
            verifying: false,
        }
    }

    fn stream(mut self) -> io::Result<()> {
        if self.spec.start == Start::Xl {
            self.xl_header()?;
        }
        self.out.write_all(b"LibxlFmt\0\0\0\x02\0\0\0\0")?;
        self.unknown(0x77)?;
        self.record(1, &[])?;
        self.libxc_stream()?;
        if self.spec.guest == Guest::Hvm {
            self.emulator_records()?;
        }
        self.record(0, &[])
    }

    fn xl_header(&mut self) -> io::Result<()> {
        let (kind, kib) = (format!("{:?}", self.spec.guest).to_lowercase(), 4 * self.spec.pages);
        let json = format!(
            "{{\"c_info\": {{\"type\": \"{kind}\", \"name\": \"guest-{seed}\", \
             \"uuid\": \"7d2c9a5e-0000-4000-8000-{seed:012x}\"}}, \
             \"b_info\": {{\"max_memkb\": {kib}, \"target_memkb\": {kib}}}}}\0",
            seed = self.spec.seed & 0xffff_ffff_ffff
        );
        let tail: &[u8] = if self.spec.dirty_reserved { b"newer xl" } else { b"" };
        let mut out = b"Xen saved domain, xl format\n \0 \r".to_vec();
        let optional_flags = if self.spec.dirty_reserved { 0x8000_0001 } else { 0 };
        for word in [
            0x0102_0304,
            3,
            optional_flags,
            (4 + json.len() + tail.len()) as u32,
            json.len() as u32,
        ] {
            out.extend_from_slice(&u32::to_le_bytes(word));
        }
        out.extend_from_slice(json.as_bytes());
        out.extend_from_slice(tail);
        self.out.write_all(&out)
    }

    fn libxc_stream(&mut self) -> io::Result<()> {
        let pv = self.spec.guest == Guest::Pv;
        self.out.write_all(b"\xff\xff\xff\xff\xff\xff\xff\xffXENF\0\0\0")?;
        self.out.write_all(&[self.spec.version as u8, 0, 0, 0, 0, 0, 0, 0, 0])?;
        self.out
            .write_all(&[if pv { 1 } else { 2 }, 0, 0, 0, 12, 0, 0, 0, 4, 0, 0, 0, 17, 0, 0, 0])?;
        if pv {
            self.record(2, &[8, 4, 0, 0, 0, 0, 0, 0])?;
        }
        if self.spec.version == 3 {
            self.noise(0x11, 24 * 3)?;
            self.noise(0x12, 16 * 2)?;
            self.record(0x10, &[])?;
        }
        if pv {
            let mut body = vec![0, 0, 0, 0, 0xff, 1, 0, 0];
            body.extend_from_slice(&[7; 8]);
            self.record(3, &body)?;
        }
        self.passes()?;
        self.state_records()?;
        for _ in 0..self.spec.checkpoints {
            self.record(0xe, &[])?;
            if self.spec.guest == Guest::Hvm {
                self.emulator_records()?;
            }
            self.record(4, &[])?;
            self.dirty_pass()?;
            self.state_records()?;
        }
        self.unknown(0x78)?;
        self.record(0, &[])
    }

    /// What describes the guest besides its memory, in the order in which Xen sends it.
    fn state_records(&mut self) -> io::Result<()> {
        let mut tsc = self.rng.bytes(24);
        tsc[20..].fill(0);
        self.record(8, &tsc)?;
        if self.spec.optional_records {
            let len = self.rng.below(20) as usize;
            self.noise(0x8000_0042, len)?;
        }
        if self.spec.guest != Guest::Pv {
            let len = 1200
                + if self.spec.odd_lengths {
                    self.rng.below(8) as usize
                } else {
                    0
                };
            self.noise(9, len)?;
            let mut params = vec![3, 0, 0, 0, 0, 0, 0, 0];
            params.extend(self.rng.bytes(3 * 16));
            return self.record(0xa, &params);
        }
        self.noise(7, PAGE)?;
        for vcpu in 0..self.spec.vcpus {
            for kind in [4, 5, 6, 0xc] {
                let mut body = vcpu.to_le_bytes().to_vec();
                let odd = if self.spec.odd_lengths {
                    self.rng.below(8) as usize
                } else {
                    0
                };
                body.extend_from_slice(&[0; 4]);
                body.extend(self.rng.bytes(40 + odd));
                self.record(kind, &body)?;
            }
        }
        Ok(())
    }

    fn emulator_records(&mut self) -> io::Result<()> {
        let header = [2, 0, 0, 0, 0, 0, 0, 0];
        if self.spec.emulator_xenstore {
            self.record(
                2,
                &[&header[..], b"physmap/0/start_addr\0f0000000\0physmap/0/size\0800000\0"].concat(),
            )?;
        }
        let body = [&header[..], &self.rng.bytes(self.spec.emulator_context)].concat();
        self.record(3, &body)
    }

    fn passes(&mut self) -> io::Result<()> {
        for index in 0..self.pfns.len() {
            let page = self.new_page(index);
            self.memory.push(page);
            self.sent.push(page.1);
        }
        let all: Vec<usize> = (0..self.pfns.len()).collect();
        self.pass(&all)?;
        for _ in 1..self.spec.passes {
            self.dirty_pass()?;
        }
        if self.spec.verify {
            self.record(0xd, &[])?;
            self.verifying = true;
            self.pass(&all)?;
        }
        Ok(())
    }

    fn dirty_pass(&mut self) -> io::Result<()> {
        let mut dirty = Vec::new();
        for index in 0..self.pfns.len() {
            if self.rng.percent(self.spec.dirty_percent) {
                dirty.push(index);
                if self.rng.percent(50) {
                    let page = match self.memory[index] {
                        (0, Content::Random(base) | Content::Similar { base, .. }) if self.spec.rewrite_similar => {
                            let change = self.rng.next();
                            (0, Content::Similar { base, change })
                        }
                        _ => self.new_page(index),
                    };
                    self.memory[index] = page;
                    self.sent.push(page.1);
                }
            }
        }
        self.pass(&dirty)
    }

    fn new_page(&mut self, index: usize) -> (u8, Content) {
        let pv = self.spec.guest == Guest::Pv;
        if self.rng.percent(self.spec.no_data_percent) {
            let types: &[u8] = if pv { &[0xd, 0xe, 0xf] } else { &[0xd, 0xf] };
            return (self.rng.pick(types), Content::Zero);
        }
        if pv && self.rng.percent(self.spec.page_table_percent) {
            let page_type = self.rng.pick(&[1, 2, 3, 4, 9, 0xa, 0xb, 0xc]);
            return (page_type, Content::PageTable(self.rng.next()));
        }
        (0, self.new_content(index))
    }

    fn new_content(&mut self, index: usize) -> Content {
        let mix = self.spec.mix;
        let weights = [
            mix.zero,
            mix.repeat,
            mix.neighbour,
            mix.random,
            mix.text,
            mix.similar,
            mix.constant,
        ];
        let unique = self.rng.next();
        match self.rng.weighted(&weights) {
            0 => Content::Zero,
            1 | 2 if self.sent.is_empty() => Content::Text(unique),
            1 => self.rng.pick(&self.sent),
            2 => {
                let before = index.checked_sub(1).and_then(|index| self.memory.get(index));
                before.map_or(Content::Text(unique), |page| page.1)
            }
            3 => Content::Random(unique),
            5 => match self.sent.last() {
                Some(Content::Random(base) | Content::Similar { base, .. }) => Content::Similar {
                    base: *base,
                    change: unique,
                },
                _ => Content::Random(unique),
            },
            6 => Content::Constant(unique as u8),
            _ => Content::Text(unique),
        }
    }

    /// One pass over these pages (ascending indices).
    fn pass(&mut self, indices: &[usize]) -> io::Result<()> {
        let mut rest = indices;
        while !rest.is_empty() {
            let len = match self.spec.batch {
                Batch::Fixed(len) => len,
                Batch::Mixed(max) => 1 + self.rng.below(max as u64) as usize,
                Batch::Aligned => {
                    let end = (self.pfns[rest[0]] | 1023) + 1;
                    rest.iter().take_while(|index| self.pfns[**index] < end).count()
                }
            };
            let (batch, tail) = rest.split_at(len.clamp(1, 1024.min(rest.len())));
            rest = tail;
            if self.spec.repeat_in_record && !self.verifying && self.rng.percent(30) {
                let mut twice = vec![batch[batch.len() - 1]];
                twice.extend_from_slice(batch);
                self.page_data(&twice)?;
            } else {
                self.page_data(batch)?;
            }
            if self.spec.optional_records && self.rng.percent(10) {
                self.noise(0xc000_0000, 3)?;
            }
        }
        Ok(())
    }

    fn page_data(&mut self, batch: &[usize]) -> io::Result<()> {
        let mut body = (batch.len() as u32).to_le_bytes().to_vec();
        let dirty = self.spec.dirty_reserved;
        body.extend_from_slice(&if dirty { self.rng.next() as u32 } else { 0 }.to_le_bytes());
        for &index in batch {
            let reserved = if dirty { (self.rng.next() & 0xff) << 52 } else { 0 };
            let raw = self.pfns[index] | reserved | u64::from(self.memory[index].0) << 60;
            body.extend_from_slice(&raw.to_le_bytes());
        }
        // Of a pfn that stands twice in the record the first content is another one, and must lose.
        let twice = batch.len() > 1 && batch.first() == batch.last();
        for (position, &index) in batch.iter().enumerate() {
            let (page_type, content) = self.memory[index];
            if page_type < 0xd {
                let content = if twice && position == 0 {
                    Content::Constant(0x5a)
                } else {
                    content
                };
                content.append_to(&mut body);
            }
        }
        self.record(1, &body)
    }

    fn unknown(&mut self, kind: u32) -> io::Result<()> {
        if self.spec.unknown_records {
            self.noise(kind, 5)
        } else {
            Ok(())
        }
    }

    /// A record whose body means nothing.
    fn noise(&mut self, kind: u32, len: usize) -> io::Result<()> {
        let body = self.rng.bytes(len);
        self.record(kind, &body)
    }

    fn record(&mut self, kind: u32, body: &[u8]) -> io::Result<()> {
        self.out.write_all(&kind.to_le_bytes())?;
        self.out.write_all(&(body.len() as u32).to_le_bytes())?;
        self.out.write_all(body)?;
        let fill = if self.spec.dirty_reserved { 0xa5 } else { 0 };
        self.out.write_all(&[fill; 7][..(8 - body.len() % 8) % 8])
    }
}
