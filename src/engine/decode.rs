//! Frames to records whose blocks are being decompressed and whose contents are being looked up.
use std::collections::VecDeque;
use std::sync::Arc;

use crossbeam_channel::{Receiver, Sender, bounded};
use hashbrown::HashMap;
use parking_lot::{Condvar, Mutex};

use super::contents::read_checked;
use super::link::Link;
use super::pool::{Pending, Pool};
use super::rebuilt::Spare;
use super::receiving::{Arrived, ArrivedBlock, ArrivedRows, DeltaBlock, Lookup};
use super::{Contents, EngineError};
use crate::codec::block::BLOCK_PAGES;
use crate::codec::{MAX_ROWS, Row, delta, rows};
use crate::page::{ContentId, ContentKey, PAGE_SIZE};
use crate::stream::PageType;
use crate::wire::{self, Block, End, Frame, Kind, Need, Rows, u32_body};

/// Bytes of frames that may wait. A source that may have to answer keeps less under way (pacing.rs), so that whoever
/// reads the connection is not blocked while an answer comes.
const BACKLOG_BYTES: usize = 13 << 20;

/// Contents that a worker looks up in one go.
const LOOKUP_PAGES: usize = 128;

/// Answers to one record that may wait: one for each Need sent for it.
const ANSWERS: usize = 64;

/// Frames that wait to be decoded.
#[derive(Default)]
pub(super) struct Backlog {
    state: Mutex<Waiting>,
    changed: Condvar,
}

#[derive(Default)]
struct Waiting {
    frames: VecDeque<Frame>,
    bytes: usize,
    closed: bool,
}

impl Backlog {
    /// Appends a frame; blocks while too much waits. Errors: nobody takes frames any more.
    pub fn push(&self, frame: Frame) -> Result<(), EngineError> {
        let mut state = self.state.lock();
        while !state.closed && state.bytes > BACKLOG_BYTES {
            self.changed.wait(&mut state);
        }
        if state.closed {
            return Err(EngineError::WorkerLost);
        }
        state.bytes += frame.body.len();
        state.frames.push_back(frame);
        drop(state);
        self.changed.notify_all();
        Ok(())
    }

    /// The next frame; `None` when it is closed and empty.
    fn pop(&self) -> Option<Frame> {
        let mut state = self.state.lock();
        loop {
            if let Some(frame) = state.frames.pop_front() {
                state.bytes -= frame.body.len();
                drop(state);
                self.changed.notify_all();
                return Some(frame);
            }
            if state.closed {
                return None;
            }
            self.changed.wait(&mut state);
        }
    }

    /// No more frames come, or none is taken any more.
    pub fn close(&self) {
        self.state.lock().closed = true;
        self.changed.notify_all();
    }
}

/// The end where frames enter: without it none will come.
pub(super) struct Intake(pub Arc<Backlog>);

impl Drop for Intake {
    fn drop(&mut self) {
        self.0.close();
    }
}

/// Pages that the source sent because they could not be found here.
pub(super) struct Answer {
    pub rows: Vec<u16>,
    pub codec: u8,
    pub block: Vec<u8>,
}

/// Brings answers to the record that waits for them.
#[derive(Clone, Default)]
pub struct Answers(Arc<Mutex<HashMap<u64, Expected>>>);

struct Expected {
    answers: Sender<Answer>,
    /// How many of the record's rows have not come: none comes twice.
    rows: usize,
}

impl Answers {
    fn expect(&self, record: u64) -> Receiver<Answer> {
        let (sender, receiver) = bounded(ANSWERS);
        let rows = MAX_ROWS;
        self.0.lock().insert(record, Expected { answers: sender, rows });
        receiver
    }

    /// The record has what it needs.
    pub(super) fn done(&self, record: u64) {
        self.0.lock().remove(&record);
    }

    /// Takes the body of a Contents frame. Errors: it is not valid, or nobody asked for it.
    pub fn arrived(&self, body: &[u8]) -> Result<(), EngineError> {
        let contents = wire::Contents::parse(body)?;
        let unasked = EngineError::Protocol("contents came that were not asked for");
        let mut waiting = self.0.lock();
        let Some(expected) = waiting.get_mut(&contents.record) else {
            return Err(unasked);
        };
        let Some(left) = expected.rows.checked_sub(contents.rows.len()) else {
            return Err(unasked);
        };
        if contents.block.len() > contents.rows.len() * PAGE_SIZE {
            return Err(EngineError::Protocol("contents came that are longer than their pages"));
        }
        expected.rows = left;
        let answer = Answer {
            rows: contents.rows,
            codec: contents.codec,
            block: contents.block.to_vec(),
        };
        expected.answers.try_send(answer).map_err(|_| unasked)
    }
}

pub(super) struct Decoder {
    pub pool: Pool,
    /// For decompressed blocks; [`super::assemble::Assembler`] gives them back.
    pub spare_blocks: Spare,
    pub key: ContentKey,
    pub speaks_contents: bool,
    pub contents: Option<Arc<dyn Contents>>,
    pub link: Option<Link>,
    pub answers: Answers,
    /// Rows frames so far.
    pub records: u64,
}

impl Decoder {
    pub fn run(mut self, backlog: &Backlog, next: Sender<Arrived>) -> Result<(), EngineError> {
        while let Some(frame) = backlog.pop() {
            let arrived = match frame.kind {
                Kind::Bytes => Arrived::Bytes(frame.body),
                Kind::Guest => Arrived::Guest(u32_body(frame.kind, &frame.body)?),
                Kind::Rows => Arrived::Rows(self.rows(frame.body)?),
                Kind::Forget => Arrived::Forget,
                Kind::End => Arrived::End(End::parse(&frame.body)?),
                Kind::Ping => {
                    self.say(Kind::Pong, &frame.body);
                    continue;
                }
                _ => return Err(EngineError::Protocol("a frame came that does not belong to the stream")),
            };
            next.send(arrived).map_err(|_| EngineError::WorkerLost)?;
        }
        Ok(())
    }

    fn say(&self, kind: Kind, body: &[u8]) {
        if let Some(link) = &self.link {
            // A connection that cannot take this fails at its next read.
            let _ = link.send(kind, &[body]);
        }
    }

    fn rows(&mut self, body: Vec<u8>) -> Result<ArrivedRows, EngineError> {
        let body = Arc::new(body);
        let parsed = Rows::parse(&body)?;
        let (entries, rows) = rows::decode(parsed.rows, parsed.count)?;
        for (entry, row) in entries.iter().zip(&rows) {
            let page_type = PageType::new((entry >> 60) as u8).ok_or(EngineError::Protocol(
                "a row has a page type that Xen's stream does not know",
            ))?;
            if page_type.has_data() == (*row == Row::Absent) {
                return Err(EngineError::Protocol("a row does not fit its entry's page type"));
            }
            if matches!(row, Row::Known(_) | Row::Delta(_)) && !self.speaks_contents {
                return Err(EngineError::Protocol("a row names a content, which was not agreed on"));
            }
        }
        let (blocks, deltas) = self.blocks(&body, &parsed.blocks, &rows)?;
        let number = self.records;
        self.records += 1;
        let answers = rows.iter().any(Row::names_content).then(|| self.answers.expect(number));
        let lookups = self.look_up(number, &rows, &deltas);
        let (frozen, reserved) = (parsed.frozen, parsed.reserved);
        Ok(ArrivedRows {
            number,
            frozen,
            reserved,
            entries,
            rows,
            blocks,
            deltas,
            lookups,
            answers,
            body,
        })
    }

    /// The record's blocks: first those of full pages, which are decompressed at once, then those of deltas.
    fn blocks(
        &self,
        body: &Arc<Vec<u8>>,
        blocks: &[Block<'_>],
        rows: &[Row],
    ) -> Result<(Vec<ArrivedBlock>, Vec<DeltaBlock>), EngineError> {
        let wrong = EngineError::Protocol("a record's blocks have not as many pages as its rows say");
        let mut full = rows.iter().filter(|row| **row == Row::Full).count();
        let mut differ = (0u16..).zip(rows).filter(|(_, row)| matches!(row, Row::Delta(_)));
        let (mut now, mut later) = (Vec::new(), Vec::new());
        for block in blocks {
            let range = block.offset..block.offset + block.bytes.len();
            if full == 0 {
                let rows: Vec<u16> = differ.by_ref().take(block.pages).map(|(row, _)| row).collect();
                if rows.len() != block.pages {
                    return Err(wrong);
                }
                let codec = block.codec;
                later.push(DeltaBlock { codec, range, rows });
                continue;
            }
            full = match full.checked_sub(block.pages) {
                Some(left) if !delta::needs_bases(block.codec) => left,
                _ => return Err(wrong),
            };
            if block.codec == 0 && block.bytes.len() == block.pages * PAGE_SIZE {
                now.push(ArrivedBlock::Raw(range));
                continue;
            }
            let (body, codec, pages) = (body.clone(), block.codec, block.pages);
            let spare = self.spare_blocks.clone();
            now.push(ArrivedBlock::Packed(self.pool.run(move |tools| {
                let block = body.get(range).unwrap_or_default();
                let mut out = spare.take(BLOCK_PAGES * PAGE_SIZE);
                let decompressed = tools.decompressor.decompress_into(codec, block, pages, &mut out);
                decompressed.map(|()| out)
            })));
        }
        if full == 0 && differ.next().is_none() {
            Ok((now, later))
        } else {
            Err(wrong)
        }
    }

    /// Has the contents looked up that rows name, and the source asked for those that are not found. A delta block needs
    /// all its bases: without one of them all its pages are asked for.
    fn look_up(&self, record: u64, rows: &[Row], deltas: &[DeltaBlock]) -> Vec<Pending<Lookup>> {
        let content = |row: &u16| Some((*row, rows.get(usize::from(*row))?.content()?));
        let known: Vec<(u16, ContentId)> = (0u16..)
            .zip(rows)
            .filter(|(_, row)| matches!(row, Row::Known(_)))
            .filter_map(|(row, _)| content(&row))
            .collect();
        let known = known
            .chunks(LOOKUP_PAGES)
            .map(|wanted| self.look_up_some(record, wanted.to_vec(), None));
        let bases = deltas
            .iter()
            .filter(|block| delta::needs_bases(block.codec))
            .filter_map(|block| {
                let wanted: Vec<(u16, ContentId)> = block.rows.iter().filter_map(content).collect();
                let all = block.rows.clone();
                (!wanted.is_empty()).then(|| self.look_up_some(record, wanted, Some(all)))
            });
        known.chain(bases).collect()
    }

    fn look_up_some(&self, record: u64, wanted: Vec<(u16, ContentId)>, all: Option<Vec<u16>>) -> Pending<Lookup> {
        let (contents, key, link) = (self.contents.clone(), self.key.clone(), self.link.clone());
        self.pool.run(move |_| {
            let (rows, ids): (Vec<u16>, Vec<ContentId>) = wanted.into_iter().unzip();
            let (pages, right) = match &contents {
                Some(contents) => read_checked(contents.as_ref(), &key, &ids),
                None => (Vec::new(), vec![false; ids.len()]),
            };
            let missing = rows.iter().zip(&right).filter(|(_, right)| !**right);
            let mut needed: Vec<u16> = missing.map(|(row, _)| *row).collect();
            if let Some(all) = all.filter(|_| !needed.is_empty()) {
                needed = all;
            }
            if !needed.is_empty()
                && let Some(link) = &link
            {
                let need = Need {
                    record,
                    rows: needed.clone(),
                };
                // A connection that cannot take this fails at its next read.
                let _ = link.send(Kind::Need, &[&need.to_bytes()]);
            }
            Lookup {
                rows,
                pages,
                right,
                needed,
            }
        })
    }
}
