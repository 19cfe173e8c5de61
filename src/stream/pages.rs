//! The pages of a stream, one by one.
use std::io::Read;

use super::{Event, Layer, PageData, PageType, Reader, StreamError, libxc};
use crate::page::{PAGE_SIZE, Pfn, is_zero};

/// The largest PAGE_DATA body that Xen writes: 1024 pages.
const MAX_BODY: usize = 8 + 1024 * (8 + PAGE_SIZE);

/// Calls `each` with every page of ordinary memory that is not zero, in the stream's order, to the stream's end: its
/// number, the offset of its bytes in the stream, and the bytes.
///
/// Errors: of the stream, or the first of `each`.
pub fn for_each_page<R: Read, E: From<StreamError>>(
    stream: &mut Reader<R>,
    mut each: impl FnMut(Pfn, u64, &[u8; PAGE_SIZE]) -> Result<(), E>,
) -> Result<(), E> {
    let (mut body, mut other) = (Vec::new(), vec![0; 1 << 20]);
    loop {
        let header = match stream.next()? {
            Event::End => return Ok(()),
            Event::Record(header) if header.is(Layer::Libxc, libxc::PAGE_DATA) => header,
            _ => {
                while stream.body_left() > 0 {
                    stream.read_body_part(&mut other)?;
                }
                continue;
            }
        };
        body.clear();
        stream.read_body(&mut body, MAX_BODY)?;
        body.truncate(header.length as usize);
        let data = PageData::parse(&body, header.body_offset())?;
        let first = header.body_offset() + (body.len() - data.pages().len()) as u64;
        let places = (first..).step_by(PAGE_SIZE);
        let (pages, _) = data.pages().as_chunks();
        let entries = data.entries().filter(|entry| entry.has_data);
        for ((entry, page), place) in entries.zip(pages).zip(places) {
            if entry.page_type == PageType::NoTab && !is_zero(page) {
                each(entry.pfn, place, page)?;
            }
        }
    }
}
