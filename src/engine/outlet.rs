//! Records checked against the table, counted into the digest, and written to xl.
use std::io::Write;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use crossbeam_channel::Receiver;

use super::assemble::Applied;
use super::digest::{ABSENT, Digest};
use super::early::Early;
use super::rebuilt::RebuiltRecord;
use super::receiving::{Assembled, AssembledRecord, Rebuilt, XlInput, is_plain, page_type, pfn_of};
use super::{Contents, EngineError};
use crate::codec::Row;
use crate::page::{ContentId, ContentKey};
use crate::stream::PageType;
use crate::table::PageIds;
use crate::wire::{End, Kind};

pub(super) struct Outlet {
    xl: XlInput,
    applied: Arc<Applied>,
    ids: PageIds,
    /// Pages that are late, where there may be some.
    late: Option<PageIds>,
    early: Option<Arc<Early>>,
    digest: Digest,
    zero: ContentId,
    contents: Option<Arc<dyn Contents>>,
}

impl Outlet {
    pub fn new(
        xl: XlInput,
        applied: Arc<Applied>,
        key: ContentKey,
        contents: Option<Arc<dyn Contents>>,
        late: bool,
        early: Option<Arc<Early>>,
    ) -> Outlet {
        Outlet {
            late: late.then(PageIds::default),
            early,
            xl,
            applied,
            ids: PageIds::default(),
            digest: Digest::default(),
            zero: key.id(&crate::page::ZERO_PAGE),
            contents,
        }
    }

    pub fn run(mut self, input: Receiver<Assembled>) -> Result<Rebuilt, EngineError> {
        let result = self.write_all(input);
        self.applied.closed.store(true, Ordering::Release);
        if let (Err(_), Some(early)) = (&result, &self.early) {
            // The cause is known.
            let _ = early.end();
        }
        let end = result?;
        let Outlet {
            xl, digest, ids, late, ..
        } = self;
        Ok(Rebuilt {
            xl,
            end,
            digest: digest.finish(),
            rows: digest.rows(),
            ids,
            late: late.iter().flat_map(PageIds::iter).map(|(pfn, _)| pfn).collect(),
        })
    }

    fn write_all(&mut self, input: Receiver<Assembled>) -> Result<End, EngineError> {
        for item in input {
            match item {
                Assembled::Bytes(bytes) => {
                    self.digest.bytes(Kind::Bytes, &bytes);
                    self.write(&bytes)?;
                }
                Assembled::Record(record) => self.record(record)?,
                Assembled::Forget => {
                    self.ids.clear();
                    self.early.as_ref().map_or(Ok(()), |early| early.give_up())?;
                }
                Assembled::End(end) => {
                    self.digest.bytes(Kind::End, &end.record);
                    return Ok(end);
                }
            }
        }
        Err(EngineError::WorkerLost)
    }

    fn write(&mut self, bytes: &[u8]) -> Result<(), EngineError> {
        self.xl
            .writer
            .write_all(bytes)
            .and_then(|()| self.xl.writer.flush())
            .map_err(EngineError::Xl)?;
        self.applied.written.fetch_add(bytes.len() as u64, Ordering::Release);
        Ok(())
    }

    /// Enters the record's rows, checks what was referred to, and only then writes the record.
    fn record(&mut self, assembled: AssembledRecord) -> Result<(), EngineError> {
        let AssembledRecord {
            record,
            frozen,
            reserved,
            entries,
            rows,
            ids: pending,
        } = assembled;
        let mut contents = Vec::new();
        for part in pending {
            contents.extend(part.wait()?);
        }
        let mut contents = contents.into_iter().map(|id| id.unwrap_or(self.zero));
        let mut ids = Vec::with_capacity(entries.len());
        for (entry, row) in entries.iter().zip(&rows) {
            let pfn = pfn_of(*entry);
            let id = if *row == Row::Absent {
                ABSENT
            } else {
                contents.next().ok_or(EngineError::WorkerLost)?
            };
            if let Row::Reference(target) = row {
                match self.ids.get(*target) {
                    None => return Err(EngineError::DanglingReference { pfn, target: *target }),
                    Some(expected) if expected != id => {
                        return Err(EngineError::ReferenceChanged { pfn, target: *target });
                    }
                    Some(_) => {}
                }
            }
            if let Row::Known(expected) = row
                && *expected != id
            {
                return Err(EngineError::ContentDiffers { pfn });
            }
            if !frozen {
                if *row == Row::Absent || !is_plain(*entry) {
                    self.ids.remove(pfn);
                } else {
                    self.ids.set(pfn, id)?;
                }
                match &mut self.late {
                    Some(late) if page_type(*entry) == Some(PageType::XAlloc) => late.set(pfn, ABSENT)?,
                    Some(late) => late.remove(pfn),
                    None => {}
                }
            }
            ids.push(id);
        }
        self.digest.record(reserved, &entries, &ids);
        self.keep(&record, &entries, &rows, &ids);
        if !frozen {
            let end = self.applied.written.load(Ordering::Relaxed) + record.bytes.len() as u64;
            self.applied.records.lock().pending.push_back((record.number, end));
        }
        let Some(early) = self.early.clone() else {
            return self.write(&record.bytes);
        };
        let (late, here): (Vec<u64>, Vec<u64>) = entries
            .iter()
            .partition(|entry| page_type(**entry) == Some(PageType::XAlloc));
        early.comes(here.into_iter().map(pfn_of))?;
        self.write(&record.bytes)?;
        if let (false, Some(first), Some(last)) = (frozen, entries.first(), entries.last()) {
            early.written(
                record.number,
                pfn_of(*first),
                pfn_of(*last),
                late.into_iter().map(pfn_of),
            );
        }
        Ok(())
    }

    /// Offers the record's contents to the store.
    fn keep(&self, record: &RebuiltRecord, entries: &[u64], rows: &[Row], ids: &[ContentId]) {
        let Some(contents) = &self.contents else { return };
        let mut index = 0..;
        let mut pages = Vec::new();
        for ((entry, row), id) in entries.iter().zip(rows).zip(ids) {
            if *row == Row::Absent {
                continue;
            }
            let page = index.next().and_then(|index| record.page(index));
            if let Some(page) = page
                && is_plain(*entry)
                && *id != self.zero
            {
                pages.push((*id, page));
            }
        }
        contents.keep(&pages);
    }
}
