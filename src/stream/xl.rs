//! What `xl` itself says on the wire, around libxl's stream (tools/xl/xl.h, xl_migrate.c, xl_vmcontrol.c).
use super::error::{Part, StreamError};
use super::record::le32;
use serde::Deserialize;
use serde_json::Value;

/// R0, destination to source, without a NUL: the receiver is ready.
pub const R0_BANNER: &[u8; 54] = b"xl migration receiver ready, send binary domain data.\n";
/// First 32 bytes of S0, source to destination.
pub const S0_MAGIC: &[u8; 32] = b"Xen saved domain, xl format\n \0 \r";
/// R1, destination to source: everything has arrived.
pub const R1_READY: &[u8; 34] = b"domain received, ready to unpause\0";
/// S9, source to destination: the point of no return.
pub const GO: &[u8; 44] = b"domain is yours, you are cleared to unpause\0";
/// R2, destination to source; one status byte follows, 0 = running.
pub const R2_REPORT: &[u8; 39] = b"my copy unpause results are as follows\0";
/// R3, destination to source after R2 with a status other than 0: the source may resume.
pub const R3_GO_BACK: &[u8; 44] = GO;

/// Size of S0.
pub const XL_HEADER_SIZE: usize = 48;
/// Most bytes of configuration (S1) that are accepted; xl sets no limit, real ones are some kilobytes.
pub const XL_CONFIG_MAX: u32 = 16 << 20;

/// S0 says its numbers' byte order with this one.
const BYTEORDER: u32 = 0x0102_0304;
const FLAG_JSON: u32 = 1;
const FLAG_STREAM_V2: u32 = 2;

/// xl's header (S0) and its optional data (S1).
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct XlHeader {
    raw: Vec<u8>,
    config_len: usize,
    facts: Facts,
}

/// What xenfold wants to know of the guest's configuration.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
struct Facts {
    name: Option<String>,
    uuid: Option<String>,
    memory_kib: Option<u64>,
}

impl XlHeader {
    /// Checks S0 as xl does and returns how many bytes of optional data follow it.
    pub(super) fn check_fixed(raw: &[u8; XL_HEADER_SIZE], offset: u64) -> Result<u32, StreamError> {
        let record = Part::XlHeader;
        if raw[..32] != S0_MAGIC[..] {
            let (expected, found) = ("\"Xen saved domain, xl format\\n \\x00 \\r\"", raw[..32].to_vec());
            return Err(StreamError::BadMagic {
                offset,
                record,
                expected,
                found,
            });
        }
        let byteorder = le32(raw, 32);
        if byteorder != BYTEORDER {
            let (field, expected, found) = ("byteorder", "0x1020304", byteorder.into());
            return Err(StreamError::BadField {
                offset: offset + 32,
                record,
                field,
                expected,
                found,
            });
        }
        let flags = le32(raw, 36);
        let unknown = flags & !(FLAG_JSON | FLAG_STREAM_V2);
        if unknown != 0 {
            return Err(StreamError::MandatoryFlags {
                offset: offset + 36,
                record,
                unknown,
            });
        }
        if flags & FLAG_STREAM_V2 == 0 {
            // xl would hand such a stream to its converter; nothing after this header is in the format read here.
            let (field, expected) = ("mandatory_flags", "with bit 1 set (stream v2, Xen 4.6 or later)");
            return Err(StreamError::BadField {
                offset: offset + 36,
                record,
                field,
                expected,
                found: flags.into(),
            });
        }
        let optional_data_len = le32(raw, 44);
        let cap = XL_CONFIG_MAX + 4;
        if optional_data_len > cap {
            let (length, cap) = (optional_data_len.into(), cap.into());
            return Err(StreamError::TooLong {
                offset: offset + 44,
                record,
                length,
                cap,
            });
        }
        Ok(optional_data_len)
    }

    /// `raw` is S0 and all its optional data.
    pub(super) fn parse(raw: Vec<u8>, offset: u64) -> Result<Self, StreamError> {
        let optional = raw.get(XL_HEADER_SIZE..).unwrap_or_default();
        // xl takes the configuration from the optional data's start and ignores a tail that it does not understand.
        let config_len = if optional.is_empty() {
            0
        } else {
            let room = optional.len().checked_sub(4);
            let announced = le32(optional, 0);
            match room {
                Some(room) if announced as usize <= room => announced as usize,
                _ => {
                    return Err(StreamError::BadField {
                        offset: offset + XL_HEADER_SIZE as u64,
                        record: Part::XlConfig,
                        field: "configuration length",
                        expected: "to fit into optional_data_len",
                        found: announced.into(),
                    });
                }
            }
        };
        let mut header = XlHeader {
            raw,
            config_len,
            facts: Facts::default(),
        };
        header.facts = Facts::read(header.json());
        Ok(header)
    }

    /// The guest's configuration without the NUL that ends it: JSON from every xl since 4.4. Empty when there is none.
    pub fn json(&self) -> &[u8] {
        let start = XL_HEADER_SIZE + 4;
        let config = self.raw.get(start..start + self.config_len).unwrap_or_default();
        config.strip_suffix(b"\0").unwrap_or(config)
    }

    /// The guest's name at the destination (`-C` may have changed it), `None` when it cannot be told.
    pub fn name(&self) -> Option<&str> {
        self.facts.name.as_deref()
    }

    /// The guest's uuid as xl writes it, `None` when it cannot be told.
    pub fn uuid(&self) -> Option<&str> {
        self.facts.uuid.as_deref()
    }

    /// The guest's maximum memory (`max_memkb`, else `target_memkb`), `None` when it cannot be told.
    pub fn memory_kib(&self) -> Option<u64> {
        self.facts.memory_kib
    }

    pub fn mandatory_flags(&self) -> u32 {
        le32(&self.raw, 36)
    }

    pub fn optional_flags(&self) -> u32 {
        le32(&self.raw, 40)
    }

    /// S0 and S1.
    pub fn as_bytes(&self) -> &[u8] {
        &self.raw
    }
}

impl Facts {
    /// Lenient: xl decides whether the configuration is good. Leaves are read as values so that one of an unexpected
    /// type costs only itself.
    fn read(json: &[u8]) -> Facts {
        #[derive(Deserialize)]
        struct Config {
            #[serde(default)]
            c_info: CInfo,
            #[serde(default)]
            b_info: BInfo,
        }
        #[derive(Deserialize, Default)]
        struct CInfo {
            name: Option<Value>,
            uuid: Option<Value>,
        }
        #[derive(Deserialize, Default)]
        struct BInfo {
            max_memkb: Option<Value>,
            target_memkb: Option<Value>,
        }
        let Ok(config) = serde_json::from_slice::<Config>(json) else {
            return Facts::default();
        };
        let text = |value: Option<Value>| match value {
            Some(Value::String(text)) => Some(text),
            _ => None,
        };
        let number = |value: &Option<Value>| value.as_ref().and_then(Value::as_u64);
        Facts {
            name: text(config.c_info.name),
            uuid: text(config.c_info.uuid),
            memory_kib: number(&config.b_info.max_memkb).or_else(|| number(&config.b_info.target_memkb)),
        }
    }
}
