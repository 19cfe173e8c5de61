//! Everything that can be wrong with a stream. Every variant says where (`offset`, in bytes since the reader's start),
//! in which part of the stream (`record`) and what was expected there.
use super::record::{Layer, kind_name};
use std::fmt;
use std::io;

/// A part of the stream, as error messages name it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Part {
    /// xl's fixed header (S0).
    XlHeader,
    /// xl's optional data, the guest's configuration (S1).
    XlConfig,
    /// libxl's header, `LibxlFmt`.
    LibxlHeader,
    /// libxc's image header.
    ImageHeader,
    /// libxc's domain header.
    DomainHeader,
    /// The 8 bytes before a record whose type is not known yet.
    RecordHeader(Layer),
    /// A record of this layer and type.
    Record(Layer, u32),
    /// After libxl's END.
    End,
}

impl fmt::Display for Part {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match *self {
            Part::XlHeader => f.write_str("xl's header"),
            Part::XlConfig => f.write_str("xl's configuration data"),
            Part::LibxlHeader => f.write_str("libxl's header"),
            Part::ImageHeader => f.write_str("libxc's image header"),
            Part::DomainHeader => f.write_str("libxc's domain header"),
            Part::RecordHeader(layer) => write!(f, "a {layer} record header"),
            Part::Record(layer, kind) => match kind_name(layer, kind) {
                Some(name) => write!(f, "{layer} record {name}"),
                None => write!(f, "{layer} record of unknown type {kind:#x}"),
            },
            Part::End => f.write_str("the end of the stream"),
        }
    }
}

/// What is wrong with a stream, or with what was asked of its reader or writer.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum StreamError {
    /// The input failed.
    #[error("stream offset {offset}, {record}: reading failed")]
    Io {
        offset: u64,
        record: Part,
        source: io::Error,
    },

    /// The output failed.
    #[error("stream offset {offset}, {record}: writing failed")]
    Write {
        offset: u64,
        record: Part,
        source: io::Error,
    },

    /// The input ended; `offset` is its length.
    #[error("stream offset {offset}, {record}: the stream ends here, expected {wanted} more bytes")]
    UnexpectedEof { offset: u64, record: Part, wanted: u64 },

    /// A header does not start as it must.
    #[error("stream offset {offset}, {record}: expected {expected}, found \"{}\"", found.escape_ascii())]
    BadMagic {
        offset: u64,
        record: Part,
        expected: &'static str,
        found: Vec<u8>,
    },

    /// A field has a value that Xen's own reader refuses, or that makes what follows unreadable.
    #[error("stream offset {offset}, {record}: expected {field} {expected}, found {found:#x}")]
    BadField {
        offset: u64,
        record: Part,
        field: &'static str,
        expected: &'static str,
        found: u64,
    },

    /// xl's header demands features that this reader (as xl 4.17) does not know.
    #[error("stream offset {offset}, {record}: expected mandatory flags among 0x3, found also {unknown:#x}")]
    MandatoryFlags { offset: u64, record: Part, unknown: u32 },

    /// A record type that Xen's reader refuses.
    #[error(
        "stream offset {offset}, {record}: expected a type of the specification{}",
        optional_hint(record)
    )]
    UnknownRecord { offset: u64, record: Part },

    /// More bytes are announced than are allowed here.
    #[error("stream offset {offset}, {record}: expected at most {cap} bytes, found a length of {length}")]
    TooLong {
        offset: u64,
        record: Part,
        length: u64,
        cap: u64,
    },

    /// The next event was asked for, or the next one written, before the current record's body was complete.
    #[error("stream offset {offset}, {record}: expected its body to be complete, {left} bytes of it are left")]
    BodyLeft { offset: u64, record: Part, left: u64 },

    /// More bytes were to be written than the record announced.
    #[error("stream offset {offset}, {record}: expected at most {left} more bytes of its body, got {given}")]
    BodyOverrun {
        offset: u64,
        record: Part,
        left: u64,
        given: u64,
    },

    /// PAGE_DATA too short for its own header or pfn list; nothing was allocated for it.
    #[error("stream offset {offset}, {record}: expected at least {wanted} bytes for {count} pfns, found {length}")]
    PageDataShort {
        offset: u64,
        record: Part,
        count: u32,
        wanted: u64,
        length: u64,
    },

    /// PAGE_DATA whose length is not what its pfn list implies.
    #[error(
        "stream offset {offset}, {record}: expected {wanted} bytes for {count} pfns and {pages} pages, found {length}"
    )]
    PageDataLength {
        offset: u64,
        record: Part,
        count: u32,
        pages: u64,
        wanted: u64,
        length: u64,
    },

    /// A pfn of PAGE_DATA with a type that the specification reserves.
    #[error(
        "stream offset {offset}, {record}: expected a page type of 0-4 or 9-0xf for pfn {pfn:#x} (index {index}), found {found:#x}"
    )]
    PageType {
        offset: u64,
        record: Part,
        index: u32,
        pfn: u64,
        found: u8,
    },

    /// The reader or writer has failed before and no longer knows where in the stream it stands.
    #[error("stream offset {offset}, {record}: expected nothing more to be asked after an error here")]
    AfterError { offset: u64, record: Part },
}

impl StreamError {
    /// Bytes from the reader's start to what is wrong.
    pub fn offset(&self) -> u64 {
        match *self {
            StreamError::Io { offset, .. }
            | StreamError::Write { offset, .. }
            | StreamError::UnexpectedEof { offset, .. }
            | StreamError::BadMagic { offset, .. }
            | StreamError::BadField { offset, .. }
            | StreamError::MandatoryFlags { offset, .. }
            | StreamError::UnknownRecord { offset, .. }
            | StreamError::TooLong { offset, .. }
            | StreamError::BodyLeft { offset, .. }
            | StreamError::BodyOverrun { offset, .. }
            | StreamError::PageDataShort { offset, .. }
            | StreamError::PageDataLength { offset, .. }
            | StreamError::PageType { offset, .. }
            | StreamError::AfterError { offset, .. } => offset,
        }
    }

    /// The part of the stream that it is about.
    pub fn record(&self) -> Part {
        match *self {
            StreamError::Io { record, .. }
            | StreamError::Write { record, .. }
            | StreamError::UnexpectedEof { record, .. }
            | StreamError::BadMagic { record, .. }
            | StreamError::BadField { record, .. }
            | StreamError::MandatoryFlags { record, .. }
            | StreamError::UnknownRecord { record, .. }
            | StreamError::TooLong { record, .. }
            | StreamError::BodyLeft { record, .. }
            | StreamError::BodyOverrun { record, .. }
            | StreamError::PageDataShort { record, .. }
            | StreamError::PageDataLength { record, .. }
            | StreamError::PageType { record, .. }
            | StreamError::AfterError { record, .. } => record,
        }
    }
}

/// libxl has no optional records: it refuses every type that it does not know.
fn optional_hint(record: &Part) -> &'static str {
    match record {
        Part::Record(Layer::Libxc, _) => ", or one with bit 31 set",
        _ => "",
    }
}
