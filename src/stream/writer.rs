//! Writes events and bodies. Nothing is buffered here: the caller decides when bytes reach the pipe.
use super::error::{Part, StreamError};
use super::reader::Event;
use super::record::{LIBXC_BODY_MAX, Layer, RecordHeader};
use std::io::Write;

/// Writes a stream event by event, and holds each record to the length that its header announced.
#[derive(Debug)]
pub struct Writer<W> {
    inner: W,
    offset: u64,
    current: Part,
    /// Bytes of the current body and padding not written yet.
    body_left: u64,
    /// A failed write leaves an unknown part of its bytes in the output.
    failed: bool,
}

impl<W: Write> Writer<W> {
    pub fn new(inner: W) -> Self {
        Writer {
            inner,
            offset: 0,
            current: Part::XlHeader,
            body_left: 0,
            failed: false,
        }
    }

    /// Bytes written so far.
    pub fn offset(&self) -> u64 {
        self.offset
    }

    /// Bytes of the current record's body and padding that have not been written yet.
    pub fn body_left(&self) -> u64 {
        self.body_left
    }

    pub fn get_mut(&mut self) -> &mut W {
        &mut self.inner
    }

    pub fn into_inner(self) -> W {
        self.inner
    }

    /// Writes the event's bytes; a record's body is due next. [`Event::End`] writes nothing.
    pub fn write_event(&mut self, event: &Event) -> Result<(), StreamError> {
        match event {
            Event::Record(header) => self.write_header(header),
            _ => {
                self.check_usable()?;
                self.check_body_complete()?;
                self.current = event.part();
                self.put(&event.bytes())
            }
        }
    }

    /// Writes a record's header alone; its body and padding are due next.
    pub fn write_header(&mut self, header: &RecordHeader) -> Result<(), StreamError> {
        self.check_usable()?;
        self.check_body_complete()?;
        if header.layer == Layer::Libxc && header.length > LIBXC_BODY_MAX {
            let (length, cap) = (header.length.into(), LIBXC_BODY_MAX.into());
            return Err(StreamError::TooLong {
                offset: self.offset,
                record: header.part(),
                length,
                cap,
            });
        }
        self.current = header.part();
        self.put(&header.bytes())?;
        self.body_left = header.padded_length();
        Ok(())
    }

    /// Writes a part of the current body, or of its padding, as it is.
    pub fn write_body(&mut self, bytes: &[u8]) -> Result<(), StreamError> {
        self.check_usable()?;
        let given = bytes.len() as u64;
        if given > self.body_left {
            let (offset, record, left) = (self.offset, self.current, self.body_left);
            return Err(StreamError::BodyOverrun {
                offset,
                record,
                left,
                given,
            });
        }
        self.put(bytes)?;
        self.body_left -= given;
        Ok(())
    }

    /// Writes a whole record, padded with zeros; returns its header.
    pub fn write_record(&mut self, layer: Layer, kind: u32, body: &[u8]) -> Result<RecordHeader, StreamError> {
        let Ok(length) = u32::try_from(body.len()) else {
            let (record, length, cap) = (Part::Record(layer, kind), body.len() as u64, u32::MAX.into());
            return Err(StreamError::TooLong {
                offset: self.offset,
                record,
                length,
                cap,
            });
        };
        let header = RecordHeader {
            layer,
            kind,
            length,
            offset: self.offset,
        };
        self.write_header(&header)?;
        self.write_body(body)?;
        let padding = self.body_left as usize;
        self.write_body([0; 8].get(..padding).unwrap_or_default())?;
        Ok(header)
    }

    pub fn flush(&mut self) -> Result<(), StreamError> {
        self.inner.flush().map_err(|source| self.write_failed(source))
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

    fn check_body_complete(&self) -> Result<(), StreamError> {
        if self.body_left > 0 {
            let (offset, record, left) = (self.offset, self.current, self.body_left);
            return Err(StreamError::BodyLeft { offset, record, left });
        }
        Ok(())
    }

    fn put(&mut self, bytes: &[u8]) -> Result<(), StreamError> {
        self.inner
            .write_all(bytes)
            .map_err(|source| self.write_failed(source))?;
        self.offset += bytes.len() as u64;
        Ok(())
    }

    fn write_failed(&mut self, source: std::io::Error) -> StreamError {
        self.failed = true;
        StreamError::Write {
            offset: self.offset,
            record: self.current,
            source,
        }
    }
}
