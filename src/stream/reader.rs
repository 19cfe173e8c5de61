//! Pull parser. It reads exactly what it needs: GO follows the stream on the same pipe.
use super::error::{Part, StreamError};
use super::page_data::{PAGE_DATA_FIXED_SIZE, PageDataHead};
use super::record::{
    DomainHeader, GuestType, ImageHeader, LIBXC_BODY_MAX, Layer, LibxlHeader, RecordHeader, is_acceptable, libxc, libxl,
};
use super::xl::{XL_HEADER_SIZE, XlHeader};
use std::borrow::Cow;
use std::io::{ErrorKind, Read};

/// Room that is made for announced bytes before any of them has arrived.
const FIRST_STEP: u64 = 256 << 10;

/// One piece of the stream; a record's body is read separately.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Event {
    /// S0 and S1.
    XlHeader(XlHeader),
    /// `LibxlFmt`.
    LibxlHeader(LibxlHeader),
    /// Start of the libxc stream, after libxl's LIBXC_CONTEXT.
    ImageHeader(ImageHeader),
    DomainHeader(DomainHeader),
    /// A record; its body must be read before the next event.
    Record(RecordHeader),
    /// After libxl's END: nothing more belongs to the stream.
    End,
}

impl Event {
    /// The event's exact bytes; a record's are its header's.
    pub fn bytes(&self) -> Cow<'_, [u8]> {
        match self {
            Event::XlHeader(header) => Cow::Borrowed(header.as_bytes()),
            Event::LibxlHeader(header) => Cow::Borrowed(header.as_bytes()),
            Event::ImageHeader(header) => Cow::Borrowed(header.as_bytes()),
            Event::DomainHeader(header) => Cow::Borrowed(header.as_bytes()),
            Event::Record(header) => Cow::Owned(header.bytes().to_vec()),
            Event::End => Cow::Borrowed(&[]),
        }
    }

    /// The event as errors name it.
    pub fn part(&self) -> Part {
        match self {
            Event::XlHeader(_) => Part::XlHeader,
            Event::LibxlHeader(_) => Part::LibxlHeader,
            Event::ImageHeader(_) => Part::ImageHeader,
            Event::DomainHeader(_) => Part::DomainHeader,
            Event::Record(header) => header.part(),
            Event::End => Part::End,
        }
    }
}

/// What comes next in the stream.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Next {
    XlHeader,
    LibxlHeader,
    ImageHeader,
    DomainHeader,
    Record(Layer),
    End,
}

/// Reads a stream event by event.
#[derive(Debug)]
pub struct Reader<R> {
    inner: R,
    offset: u64,
    next: Next,
    /// Whose body `body_left` counts.
    current: Part,
    body_left: u64,
    /// Set by errors after which the position in the stream is unknown.
    failed: bool,
    pass_unknown: bool,
    guest_type: Option<GuestType>,
    /// Between libxc's CHECKPOINT and libxl's CHECKPOINT_END.
    in_checkpoint: bool,
    /// Right after libxl's CHECKPOINT_END.
    after_checkpoint: bool,
}

impl<R: Read> Reader<R> {
    /// Starts at xl's header (S0), as `xl migrate` sends and `xl save` writes it.
    pub fn new(inner: R) -> Self {
        Self::starting_at(inner, Next::XlHeader)
    }

    /// Starts at libxl's header.
    pub fn at_libxl(inner: R) -> Self {
        Self::starting_at(inner, Next::LibxlHeader)
    }

    fn starting_at(inner: R, next: Next) -> Self {
        Reader {
            inner,
            offset: 0,
            next,
            current: Part::XlHeader,
            body_left: 0,
            failed: false,
            pass_unknown: false,
            guest_type: None,
            in_checkpoint: false,
            after_checkpoint: false,
        }
    }

    /// Lets record types through that Xen 4.17 would refuse: between two xl, the peer's decides.
    pub fn pass_unknown(mut self, yes: bool) -> Self {
        self.pass_unknown = yes;
        self
    }

    /// Bytes consumed so far.
    pub fn offset(&self) -> u64 {
        self.offset
    }

    /// Bytes of the current record's body and padding that have not been read yet.
    pub fn body_left(&self) -> u64 {
        self.body_left
    }

    pub fn get_mut(&mut self) -> &mut R {
        &mut self.inner
    }

    pub fn into_inner(self) -> R {
        self.inner
    }

    /// The next event. After [`Event::End`] it is that again, without reading.
    ///
    /// Errors: the current record's body is not read (nothing is lost, read it); anything else ends the reading.
    #[expect(
        clippy::should_implement_trait,
        reason = "an Iterator would invite to ignore bodies and errors"
    )]
    pub fn next(&mut self) -> Result<Event, StreamError> {
        self.check_usable()?;
        if self.body_left > 0 {
            let (offset, record, left) = (self.offset, self.current, self.body_left);
            return Err(StreamError::BodyLeft { offset, record, left });
        }
        let event = self.read_event();
        self.failed = event.is_err();
        event
    }

    /// Appends the rest of the current body, padding included. `cap` bounds the bytes appended; when it is exceeded
    /// nothing has been read and the body can still be read in parts.
    pub fn read_body(&mut self, out: &mut Vec<u8>, cap: usize) -> Result<(), StreamError> {
        self.check_usable()?;
        self.check_cap(self.body_left, cap)?;
        self.append_body(out, self.body_left)
    }

    /// Fills `buf` as far as the current body, padding included, goes; returns how far.
    pub fn read_body_part(&mut self, buf: &mut [u8]) -> Result<usize, StreamError> {
        self.check_usable()?;
        let len = usize::try_from(self.body_left).unwrap_or(usize::MAX).min(buf.len());
        let (part, _) = buf.split_at_mut(len);
        self.fill(part, self.current, self.body_left)?;
        Ok(len)
    }

    /// Appends header and pfn list of the current record, a PAGE_DATA whose body has not been touched, for
    /// [`PageDataHead::parse`]: the pages stay in the pipe. Errors when the list does not fit into the record or, with
    /// its first 8 bytes appended, into `cap`; what was not appended can then still be read.
    pub fn read_page_data_head(
        &mut self,
        record: &RecordHeader,
        out: &mut Vec<u8>,
        cap: usize,
    ) -> Result<(), StreamError> {
        self.check_usable()?;
        let mut fixed = [0; PAGE_DATA_FIXED_SIZE];
        if self.body_left < fixed.len() as u64 {
            // An error, with the right words.
            PageDataHead::size(&fixed, record.length, record.body_offset())?;
        }
        self.read_body_part(&mut fixed)?;
        out.extend_from_slice(&fixed);
        let size = PageDataHead::size(&fixed, record.length, record.body_offset())?;
        self.check_cap(size.into(), cap)?;
        self.append_body(out, u64::from(size).saturating_sub(fixed.len() as u64))
    }

    fn check_usable(&self) -> Result<(), StreamError> {
        if self.failed {
            return Err(StreamError::AfterError {
                offset: self.offset,
                record: self.current,
            });
        }
        Ok(())
    }

    fn check_cap(&self, length: u64, cap: usize) -> Result<(), StreamError> {
        let cap = cap as u64;
        if length > cap {
            return Err(StreamError::TooLong {
                offset: self.offset,
                record: self.current,
                length,
                cap,
            });
        }
        Ok(())
    }

    fn append_body(&mut self, out: &mut Vec<u8>, len: u64) -> Result<(), StreamError> {
        let len = len.min(self.body_left);
        let before = self.offset;
        let result = self.append(out, len, self.current);
        self.body_left -= self.offset - before;
        result
    }

    fn read_event(&mut self) -> Result<Event, StreamError> {
        let offset = self.offset;
        match self.next {
            Next::XlHeader => self.read_xl_header(),
            Next::LibxlHeader => {
                let header = LibxlHeader::parse(self.read_array(Part::LibxlHeader)?, offset)?;
                self.next = Next::Record(Layer::Libxl);
                Ok(Event::LibxlHeader(header))
            }
            Next::ImageHeader => {
                let header = ImageHeader::parse(self.read_array(Part::ImageHeader)?, offset)?;
                self.next = Next::DomainHeader;
                Ok(Event::ImageHeader(header))
            }
            Next::DomainHeader => {
                let header = DomainHeader::parse(self.read_array(Part::DomainHeader)?, offset)?;
                self.guest_type = Some(header.guest_type());
                self.next = Next::Record(Layer::Libxc);
                Ok(Event::DomainHeader(header))
            }
            Next::Record(layer) => self.read_record_header(layer),
            Next::End => Ok(Event::End),
        }
    }

    fn read_xl_header(&mut self) -> Result<Event, StreamError> {
        let offset = self.offset;
        let fixed: [u8; XL_HEADER_SIZE] = self.read_array(Part::XlHeader)?;
        let optional_data_len = XlHeader::check_fixed(&fixed, offset)?;
        self.current = Part::XlConfig;
        let mut raw = fixed.to_vec();
        self.append(&mut raw, optional_data_len.into(), self.current)?;
        let header = XlHeader::parse(raw, offset)?;
        self.next = Next::LibxlHeader;
        Ok(Event::XlHeader(header))
    }

    fn read_record_header(&mut self, layer: Layer) -> Result<Event, StreamError> {
        let offset = self.offset;
        let raw = self.read_array(Part::RecordHeader(layer))?;
        let mut header = RecordHeader::parse(raw, layer, offset);
        // COLO's libxl writes CHECKPOINT_STATE between the checkpoint and libxc's next record. Only HVM guests have
        // COLO, and they have no record 5 of libxc's.
        if self.after_checkpoint && header.kind == libxl::CHECKPOINT_STATE && self.guest_type == Some(GuestType::Hvm) {
            header.layer = Layer::Libxl;
        }
        let record = header.part();
        self.current = record;
        if !self.pass_unknown && !is_acceptable(header.layer, header.kind) {
            return Err(StreamError::UnknownRecord { offset, record });
        }
        if header.layer == Layer::Libxc && header.length > LIBXC_BODY_MAX {
            let (length, cap) = (header.length.into(), LIBXC_BODY_MAX.into());
            return Err(StreamError::TooLong {
                offset: offset + 4,
                record,
                length,
                cap,
            });
        }
        self.body_left = header.padded_length();
        self.follow(&header, layer);
        Ok(Event::Record(header))
    }

    /// The order of the stream: which record hands over to which layer.
    fn follow(&mut self, header: &RecordHeader, layer: Layer) {
        self.after_checkpoint = false;
        self.next = match (header.layer, header.kind) {
            (Layer::Libxl, libxl::END) => Next::End,
            (Layer::Libxl, libxl::LIBXC_CONTEXT) => Next::ImageHeader,
            (Layer::Libxc, libxc::END) => Next::Record(Layer::Libxl),
            // Remus and COLO: libxl's records of one checkpoint stand inside the libxc stream.
            (Layer::Libxc, libxc::CHECKPOINT) => {
                self.in_checkpoint = true;
                Next::Record(Layer::Libxl)
            }
            (Layer::Libxl, libxl::CHECKPOINT_END) if self.in_checkpoint => {
                self.in_checkpoint = false;
                self.after_checkpoint = true;
                Next::Record(Layer::Libxc)
            }
            _ => Next::Record(layer),
        };
    }

    fn read_array<const N: usize>(&mut self, record: Part) -> Result<[u8; N], StreamError> {
        let mut raw = [0; N];
        self.current = record;
        self.fill(&mut raw, record, N as u64)?;
        Ok(raw)
    }

    /// Fills `buf`. `wanted` is what the record still has, for the error; it is also what `body_left` counts down.
    fn fill(&mut self, mut buf: &mut [u8], record: Part, wanted: u64) -> Result<(), StreamError> {
        let start = self.offset;
        while !buf.is_empty() {
            match self.inner.read(buf) {
                Ok(0) => {
                    self.failed = true;
                    let wanted = wanted - (self.offset - start);
                    return Err(StreamError::UnexpectedEof {
                        offset: self.offset,
                        record,
                        wanted,
                    });
                }
                Ok(got) => {
                    self.offset += got as u64;
                    self.body_left = self.body_left.saturating_sub(got as u64);
                    buf = buf.get_mut(got..).unwrap_or_default();
                }
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(source) => {
                    self.failed = true;
                    return Err(StreamError::Io {
                        offset: self.offset,
                        record,
                        source,
                    });
                }
            }
        }
        Ok(())
    }

    /// Appends exactly `len` bytes. Room is made for what has arrived and as much again, never for `len` alone.
    fn append(&mut self, out: &mut Vec<u8>, len: u64, record: Part) -> Result<(), StreamError> {
        let mut arrived = 0;
        while arrived < len {
            let step = (len - arrived).min(FIRST_STEP.max(arrived));
            out.reserve(usize::try_from(step).unwrap_or(0));
            let before = out.len();
            // Through `take` no more than the step can be read; read_to_end spares zeroing the room.
            let result = self.inner.by_ref().take(step).read_to_end(out);
            let got = (out.len() - before) as u64;
            arrived += got;
            self.offset += got;
            match result {
                Ok(_) if got == step => {}
                Ok(_) => {
                    self.failed = true;
                    return Err(StreamError::UnexpectedEof {
                        offset: self.offset,
                        record,
                        wanted: len - arrived,
                    });
                }
                Err(source) => {
                    self.failed = true;
                    return Err(StreamError::Io {
                        offset: self.offset,
                        record,
                        source,
                    });
                }
            }
        }
        Ok(())
    }
}
