//! The dumb rebuilder: what a restore would have in memory at the end, found without `xenfold::stream`. It trusts its
//! input to be well-formed (anything else is `Err` with a place) and is only as fast as it happens to be.
use super::{PAGE, Start};
use std::collections::BTreeMap;

/// A record that is not PAGE_DATA.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct OtherRecord {
    /// Whether it belongs to the libxc stream.
    pub libxc: bool,
    pub kind: u32,
    /// Without padding.
    pub body: Vec<u8>,
}

/// Everything that a stream says.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Rebuilt {
    /// pfn → (type, bytes); no bytes for types D, E and F. The last one in the stream wins. Pages after VERIFY are not
    /// applied: a restore only compares them.
    pub pages: BTreeMap<u64, (u8, Vec<u8>)>,
    /// All other records in their order.
    pub others: Vec<OtherRecord>,
    /// PAGE_DATA records.
    pub page_records: usize,
    /// Entries in them.
    pub entries: usize,
    /// Entries that had a page.
    pub entries_with_data: usize,
    /// Pages after VERIFY whose bytes are not those applied before.
    pub verify_mismatches: usize,
    /// Bytes of the stream up to and including libxl's END.
    pub length: usize,
}

/// Rebuilds from a stream that starts as `start` says. What follows the stream is left alone.
pub fn rebuild(stream: &[u8], start: Start) -> Result<Rebuilt, String> {
    let mut at = 0;
    if start == Start::Xl {
        at = 48 + word(stream, 44)? as usize;
    }
    if slice(stream, at, 16)? != b"LibxlFmt\0\0\0\x02\0\0\0\0" {
        return Err(format!("no LibxlFmt at {at}"));
    }
    at += 16;
    let mut rebuilt = Rebuilt::default();
    let (mut in_libxc, mut in_checkpoint, mut verify) = (false, false, false);
    loop {
        let (kind, length) = (word(stream, at)?, word(stream, at + 4)? as usize);
        let body = slice(stream, at + 8, length)?;
        at += 8 + length.div_ceil(8) * 8;
        slice(stream, 0, at)?;
        if in_libxc && kind == 1 {
            pages(body, verify, &mut rebuilt).map_err(|what| format!("PAGE_DATA that ends at {at}: {what}"))?;
            continue;
        }
        rebuilt.others.push(OtherRecord {
            libxc: in_libxc,
            kind,
            body: body.to_vec(),
        });
        match (in_libxc, kind) {
            (false, 0) => break,
            (false, 1) => {
                if slice(stream, at, 12)? != b"\xff\xff\xff\xff\xff\xff\xff\xffXENF" {
                    return Err(format!("no image header at {at}"));
                }
                at += 24 + 16;
                in_libxc = true;
            }
            (false, 4) if in_checkpoint => (in_libxc, in_checkpoint) = (true, false),
            (true, 0xd) => verify = true,
            (true, 0xe) => (in_libxc, in_checkpoint) = (false, true),
            (true, 0) => in_libxc = false,
            _ => {}
        }
    }
    rebuilt.length = at;
    Ok(rebuilt)
}

fn pages(body: &[u8], verify: bool, rebuilt: &mut Rebuilt) -> Result<(), String> {
    let count = word(body, 0)? as usize;
    let mut data = 8 + 8 * count;
    rebuilt.page_records += 1;
    for index in 0..count {
        let entry = slice(body, 8 + 8 * index, 8)?;
        let entry = u64::from_le_bytes(entry.try_into().map_err(|_| "entry")?);
        let (page_type, pfn) = ((entry >> 60) as u8, entry & 0x000f_ffff_ffff_ffff);
        rebuilt.entries += 1;
        let bytes = if page_type < 0xd {
            rebuilt.entries_with_data += 1;
            data += PAGE;
            slice(body, data - PAGE, PAGE)?
        } else {
            &[]
        };
        if verify {
            let before = rebuilt.pages.get(&pfn).map(|page| page.1.as_slice());
            rebuilt.verify_mismatches += usize::from(before != Some(bytes));
        } else {
            rebuilt.pages.insert(pfn, (page_type, bytes.to_vec()));
        }
    }
    if data == body.len() {
        Ok(())
    } else {
        Err(format!("{} bytes, expected {data}", body.len()))
    }
}

fn slice(bytes: &[u8], at: usize, len: usize) -> Result<&[u8], String> {
    bytes
        .get(at..at + len)
        .ok_or_else(|| format!("{len} bytes at {at} are not there"))
}

fn word(bytes: &[u8], at: usize) -> Result<u32, String> {
    let raw = slice(bytes, at, 4)?;
    Ok(u32::from_le_bytes([raw[0], raw[1], raw[2], raw[3]]))
}
