//! Headers and record types, named as Xen's specifications name them
//! (docs/specs/libxl-migration-stream.pandoc, docs/specs/libxc-migration-stream.pandoc).
use super::error::{Part, StreamError};
use std::fmt;

/// Size of a record's header, in either layer.
pub const RECORD_HEADER_SIZE: usize = 8;
/// Size of libxl's header.
pub const LIBXL_HEADER_SIZE: usize = 16;
/// Size of libxc's image header.
pub const IMAGE_HEADER_SIZE: usize = 24;
/// Size of libxc's domain header.
pub const DOMAIN_HEADER_SIZE: usize = 16;
/// Largest body of a libxc record (`REC_LENGTH_MAX` in xg_sr_stream_format.h); libxl has no limit.
pub const LIBXC_BODY_MAX: u32 = 128 << 20;

/// What a libxl stream starts with.
pub const LIBXL_IDENT: &[u8; 8] = b"LibxlFmt";
/// What a libxc stream starts with: the marker, all ones, and the id "XENF".
pub const IMAGE_MAGIC: &[u8; 12] = b"\xff\xff\xff\xff\xff\xff\xff\xffXENF";

/// Whose record it is: libxl's stream carries libxc's inside.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Layer {
    Libxl,
    Libxc,
}

impl fmt::Display for Layer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Layer::Libxl => "libxl",
            Layer::Libxc => "libxc",
        })
    }
}

/// Record types of libxl's layer.
pub mod libxl {
    pub const END: u32 = 0;
    pub const LIBXC_CONTEXT: u32 = 1;
    pub const EMULATOR_XENSTORE_DATA: u32 = 2;
    pub const EMULATOR_CONTEXT: u32 = 3;
    pub const CHECKPOINT_END: u32 = 4;
    pub const CHECKPOINT_STATE: u32 = 5;
}

/// Record types of libxc's layer.
pub mod libxc {
    pub const END: u32 = 0;
    pub const PAGE_DATA: u32 = 1;
    pub const X86_PV_INFO: u32 = 2;
    pub const X86_PV_P2M_FRAMES: u32 = 3;
    pub const X86_PV_VCPU_BASIC: u32 = 4;
    pub const X86_PV_VCPU_EXTENDED: u32 = 5;
    pub const X86_PV_VCPU_XSAVE: u32 = 6;
    pub const SHARED_INFO: u32 = 7;
    pub const X86_TSC_INFO: u32 = 8;
    pub const HVM_CONTEXT: u32 = 9;
    pub const HVM_PARAMS: u32 = 0xa;
    pub const TOOLSTACK: u32 = 0xb;
    pub const X86_PV_VCPU_MSRS: u32 = 0xc;
    pub const VERIFY: u32 = 0xd;
    pub const CHECKPOINT: u32 = 0xe;
    pub const CHECKPOINT_DIRTY_PFN_LIST: u32 = 0xf;
    pub const STATIC_DATA_END: u32 = 0x10;
    pub const X86_CPUID_POLICY: u32 = 0x11;
    pub const X86_MSR_POLICY: u32 = 0x12;
    /// Set in types that a reader may skip.
    pub const OPTIONAL: u32 = 0x8000_0000;
}

const LIBXL_NAMES: [&str; 6] = [
    "END",
    "LIBXC_CONTEXT",
    "EMULATOR_XENSTORE_DATA",
    "EMULATOR_CONTEXT",
    "CHECKPOINT_END",
    "CHECKPOINT_STATE",
];

const LIBXC_NAMES: [&str; 19] = [
    "END",
    "PAGE_DATA",
    "X86_PV_INFO",
    "X86_PV_P2M_FRAMES",
    "X86_PV_VCPU_BASIC",
    "X86_PV_VCPU_EXTENDED",
    "X86_PV_VCPU_XSAVE",
    "SHARED_INFO",
    "X86_TSC_INFO",
    "HVM_CONTEXT",
    "HVM_PARAMS",
    "TOOLSTACK",
    "X86_PV_VCPU_MSRS",
    "VERIFY",
    "CHECKPOINT",
    "CHECKPOINT_DIRTY_PFN_LIST",
    "STATIC_DATA_END",
    "X86_CPUID_POLICY",
    "X86_MSR_POLICY",
];

/// The specification's name of a record type, `None` when it has none.
pub fn kind_name(layer: Layer, kind: u32) -> Option<&'static str> {
    let names: &[&str] = match layer {
        Layer::Libxl => &LIBXL_NAMES,
        Layer::Libxc => &LIBXC_NAMES,
    };
    names.get(usize::try_from(kind).ok()?).copied()
}

/// Whether Xen's reader of that layer carries on at this type. Only libxc knows optional records.
pub(super) fn is_acceptable(layer: Layer, kind: u32) -> bool {
    kind_name(layer, kind).is_some() || (layer == Layer::Libxc && kind & libxc::OPTIONAL != 0)
}

/// The 8 bytes before a record's body.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RecordHeader {
    pub layer: Layer,
    /// One of the constants in [`libxl`] or [`libxc`], or a type unknown to the specification.
    pub kind: u32,
    /// Bytes of the body without its padding.
    pub length: u32,
    /// Where the header starts.
    pub offset: u64,
}

impl RecordHeader {
    pub(super) fn parse(raw: [u8; RECORD_HEADER_SIZE], layer: Layer, offset: u64) -> Self {
        RecordHeader {
            layer,
            kind: le32(&raw, 0),
            length: le32(&raw, 4),
            offset,
        }
    }

    /// The header as the stream has it.
    pub fn bytes(&self) -> [u8; RECORD_HEADER_SIZE] {
        let mut raw = [0; RECORD_HEADER_SIZE];
        raw[..4].copy_from_slice(&self.kind.to_le_bytes());
        raw[4..].copy_from_slice(&self.length.to_le_bytes());
        raw
    }

    /// Where the body starts.
    pub fn body_offset(&self) -> u64 {
        self.offset.saturating_add(RECORD_HEADER_SIZE as u64)
    }

    /// Bytes of the body with its padding.
    pub fn padded_length(&self) -> u64 {
        u64::from(self.length).next_multiple_of(8)
    }

    pub fn is(&self, layer: Layer, kind: u32) -> bool {
        self.layer == layer && self.kind == kind
    }

    /// The record as errors name it.
    pub fn part(&self) -> Part {
        Part::Record(self.layer, self.kind)
    }
}

/// `LibxlFmt`, version 2, little-endian.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LibxlHeader {
    raw: [u8; LIBXL_HEADER_SIZE],
}

impl LibxlHeader {
    pub(super) fn parse(raw: [u8; LIBXL_HEADER_SIZE], offset: u64) -> Result<Self, StreamError> {
        let record = Part::LibxlHeader;
        if raw[..8] != LIBXL_IDENT[..] {
            let found = raw[..8].to_vec();
            return Err(StreamError::BadMagic {
                offset,
                record,
                expected: "\"LibxlFmt\"",
                found,
            });
        }
        let header = LibxlHeader { raw };
        if header.version() != 2 {
            let found = header.version().into();
            return Err(StreamError::BadField {
                offset: offset + 8,
                record,
                field: "version",
                expected: "2",
                found,
            });
        }
        if header.options() & 1 != 0 {
            return Err(StreamError::BadField {
                offset: offset + 12,
                record,
                field: "options",
                expected: "with bit 0 clear (little-endian)",
                found: header.options().into(),
            });
        }
        Ok(header)
    }

    pub fn version(&self) -> u32 {
        be32(&self.raw, 8)
    }

    /// Bit 0 is big-endian (refused), bit 1 says that a converter made the stream from the format before Xen 4.6.
    pub fn options(&self) -> u32 {
        be32(&self.raw, 12)
    }

    pub fn as_bytes(&self) -> &[u8] {
        &self.raw
    }
}

/// libxc's image header, version 2 or 3, little-endian.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ImageHeader {
    raw: [u8; IMAGE_HEADER_SIZE],
}

impl ImageHeader {
    pub(super) fn parse(raw: [u8; IMAGE_HEADER_SIZE], offset: u64) -> Result<Self, StreamError> {
        let record = Part::ImageHeader;
        if raw[..12] != IMAGE_MAGIC[..] {
            let found = raw[..12].to_vec();
            let expected = "eight bytes of 0xff and \"XENF\"";
            return Err(StreamError::BadMagic {
                offset,
                record,
                expected,
                found,
            });
        }
        let header = ImageHeader { raw };
        if !matches!(header.version(), 2 | 3) {
            return Err(StreamError::BadField {
                offset: offset + 12,
                record,
                field: "version",
                expected: "2 or 3",
                found: header.version().into(),
            });
        }
        if header.options() & 1 != 0 {
            return Err(StreamError::BadField {
                offset: offset + 16,
                record,
                field: "options",
                expected: "with bit 0 clear (little-endian)",
                found: header.options().into(),
            });
        }
        Ok(header)
    }

    pub fn version(&self) -> u32 {
        be32(&self.raw, 12)
    }

    pub fn options(&self) -> u16 {
        (be32(&self.raw, 16) >> 16) as u16
    }

    pub fn as_bytes(&self) -> &[u8] {
        &self.raw
    }
}

/// What libxc takes the guest for; PVH is [`GuestType::Hvm`] to it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum GuestType {
    Pv,
    Hvm,
}

/// libxc's domain header.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DomainHeader {
    raw: [u8; DOMAIN_HEADER_SIZE],
    guest_type: GuestType,
}

impl DomainHeader {
    pub(super) fn parse(raw: [u8; DOMAIN_HEADER_SIZE], offset: u64) -> Result<Self, StreamError> {
        let record = Part::DomainHeader;
        let guest_type = match le32(&raw, 0) {
            1 => GuestType::Pv,
            2 => GuestType::Hvm,
            found => {
                let (field, expected, found) = ("type", "1 (PV) or 2 (HVM, PVH)", found.into());
                return Err(StreamError::BadField {
                    offset,
                    record,
                    field,
                    expected,
                    found,
                });
            }
        };
        let page_shift = le32(&raw, 4) & 0xffff;
        if page_shift != 12 {
            let (field, expected, found) = ("page_shift", "12", page_shift.into());
            return Err(StreamError::BadField {
                offset: offset + 4,
                record,
                field,
                expected,
                found,
            });
        }
        Ok(DomainHeader { raw, guest_type })
    }

    pub fn guest_type(&self) -> GuestType {
        self.guest_type
    }

    /// Version of the Xen that wrote the stream (major, minor); major 0 is the converter from the legacy format.
    pub fn xen_version(&self) -> (u32, u32) {
        (le32(&self.raw, 8), le32(&self.raw, 12))
    }

    pub fn as_bytes(&self) -> &[u8] {
        &self.raw
    }
}

/// `N` bytes at `at`; zeros stand for what is not there, so that no input can panic here.
pub(super) fn bytes_at<const N: usize>(raw: &[u8], at: usize) -> [u8; N] {
    raw.get(at..)
        .and_then(|tail| tail.first_chunk::<N>())
        .copied()
        .unwrap_or([0; N])
}

pub(super) fn le32(raw: &[u8], at: usize) -> u32 {
    u32::from_le_bytes(bytes_at(raw, at))
}

pub(super) fn le64(raw: &[u8], at: usize) -> u64 {
    u64::from_le_bytes(bytes_at(raw, at))
}

fn be32(raw: &[u8], at: usize) -> u32 {
    u32::from_be_bytes(bytes_at(raw, at))
}
