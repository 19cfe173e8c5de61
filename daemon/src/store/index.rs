//! The persistent form of the table of slots, and the images: one redb file a group (FORMAT.md).
//!
//! redb is believed nothing: every value has a CRC of ours, a panic inside it counts as damage, and a handle that
//! failed once is dropped and opened anew.
use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use redb::{Database, ReadableDatabase, ReadableTable, StorageBackend, TableDefinition, TableError};
use rustix::fs::SeekFrom;
use xenfold::page::{ContentId, Pfn};

use super::budget::Budget;
use super::error::IndexError;
use super::pack;
use super::record::{self, ImageHead, PART_PAGES};

/// Version of FORMAT.md.
const FORMAT: u32 = 1;

const META: TableDefinition<&str, &[u8]> = TableDefinition::new("meta");
const BLOCKS: TableDefinition<u32, &[u8]> = TableDefinition::new("blocks");
const IMAGES: TableDefinition<&str, &[u8]> = TableDefinition::new("images");
const PARTS: TableDefinition<(&str, u32), &[u8]> = TableDefinition::new("parts");

/// redb's cache; the table in memory answers what is asked often.
const CACHE_BYTES: usize = 8 << 20;

pub(super) struct Index {
    path: PathBuf,
    db: Option<Database>,
    budget: Arc<Budget>,
    /// End of what was ever written to the file: what it is charged for.
    end_bytes: Arc<AtomicU64>,
    fail: Arc<AtomicBool>,
}

/// An image's description and its pages.
pub(super) type ImageRead = (ImageHead, Vec<(Pfn, ContentId)>);

/// Takes a block's number and ids, by slot in the block.
pub(super) type BlockSink<'a> = &'a mut dyn FnMut(u32, &[(u32, ContentId)]);

/// What an index holds besides blocks and the images' pages.
#[derive(Default)]
pub(super) struct Loaded {
    pub key_check: Option<ContentId>,
    pub images: Vec<(String, ImageHead)>,
    /// Values whose CRC is wrong.
    pub damaged: u64,
}

/// The file under redb. The file's length says little (redb doubles it and leaves holes), so what was written counts.
#[derive(Debug)]
struct Backend {
    file: File,
    budget: Arc<Budget>,
    end_bytes: Arc<AtomicU64>,
    fail: Arc<AtomicBool>,
}

impl Backend {
    fn check(&self) -> io::Result<()> {
        match self.fail.load(Ordering::Relaxed) {
            true => Err(io::Error::from_raw_os_error(rustix::io::Errno::IO.raw_os_error())),
            false => Ok(()),
        }
    }
}

impl StorageBackend for Backend {
    fn len(&self) -> io::Result<u64> {
        self.check()?;
        Ok(self.file.metadata()?.len())
    }

    fn read(&self, offset: u64, out: &mut [u8]) -> io::Result<()> {
        self.check()?;
        self.file.read_exact_at(out, offset)
    }

    fn set_len(&self, len: u64) -> io::Result<()> {
        self.check()?;
        self.file.set_len(len)?;
        let end = self.end_bytes.load(Ordering::Relaxed);
        if len < end {
            self.end_bytes.store(len, Ordering::Relaxed);
            self.budget.refund(end - len);
        }
        Ok(())
    }

    fn sync_data(&self) -> io::Result<()> {
        self.check()?;
        self.file.sync_data()
    }

    fn write(&self, offset: u64, data: &[u8]) -> io::Result<()> {
        self.check()?;
        let new_end = offset.saturating_add(data.len() as u64).next_multiple_of(4096);
        let end = self.end_bytes.load(Ordering::Relaxed);
        if new_end > end {
            if !self.budget.try_charge(new_end - end) {
                return Err(io::Error::from_raw_os_error(rustix::io::Errno::NOSPC.raw_os_error()));
            }
            self.end_bytes.store(new_end, Ordering::Relaxed);
        }
        self.file.write_all_at(data, offset)
    }
}

/// Where the last data of a file ends, holes at its end left out.
fn data_end_bytes(file: &File) -> io::Result<u64> {
    let mut end = 0;
    loop {
        let data = match rustix::fs::seek(file, SeekFrom::Data(end)) {
            Ok(data) => data,
            Err(rustix::io::Errno::NXIO) => return Ok(end),
            // No holes are known here: all of it counts.
            Err(_) => return Ok(file.metadata()?.len()),
        };
        end = rustix::fs::seek(file, SeekFrom::Hole(data))?;
    }
}

impl Index {
    /// Opens or makes the index and reads it. An error says that this file cannot be used; the caller sets it aside,
    /// and forgets the blocks that came before the error.
    pub fn open(
        path: &Path,
        budget: &Arc<Budget>,
        pack_slots: u32,
        fail: &Arc<AtomicBool>,
        sink: BlockSink,
    ) -> Result<(Index, Loaded), IndexError> {
        let mut index = Index {
            path: path.into(),
            db: None,
            budget: budget.clone(),
            end_bytes: Arc::default(),
            fail: fail.clone(),
        };
        if let Ok(file) = pack::options().open(path) {
            let end = data_end_bytes(&file).map_err(IndexError::Io)?.next_multiple_of(4096);
            index.end_bytes.store(end, Ordering::Relaxed);
            budget.charge_existing(end);
        }
        // redb does not look at its checksums when it opens a file that was closed well.
        let opened = index.with(|_| Ok(()));
        let checked = opened.and_then(|()| {
            let db = index.db.as_mut().ok_or(IndexError::Panicked)?;
            let check = catch_unwind(AssertUnwindSafe(|| db.check_integrity()));
            check.map_err(|_| IndexError::Panicked)??;
            index.with(|db| load(db, pack_slots, sink))
        });
        match checked {
            Ok(loaded) => Ok((index, loaded)),
            Err(error) => {
                index.close();
                budget.refund(index.end_bytes.swap(0, Ordering::Relaxed));
                Err(error)
            }
        }
    }

    pub fn charged_bytes(&self) -> u64 {
        self.end_bytes.load(Ordering::Relaxed)
    }

    fn reopen(&self) -> Result<Database, IndexError> {
        let file = pack::options()
            .create(true)
            .truncate(false)
            .open(&self.path)
            .map_err(IndexError::Io)?;
        let backend = Backend {
            file,
            budget: self.budget.clone(),
            end_bytes: self.end_bytes.clone(),
            fail: self.fail.clone(),
        };
        let mut builder = Database::builder();
        builder.set_cache_size(CACHE_BYTES);
        Ok(builder.create_with_backend(backend)?)
    }

    /// Runs `work` on the database. After a failure the handle is dropped, since redb refuses everything from then
    /// on; the next call opens the file anew, in the state of its last commit.
    fn with<T>(&mut self, work: impl FnOnce(&Database) -> Result<T, IndexError>) -> Result<T, IndexError> {
        let result = catch_unwind(AssertUnwindSafe(|| {
            if self.db.is_none() {
                self.db = Some(self.reopen()?);
            }
            self.db.as_ref().map_or(Err(IndexError::Panicked), work)
        }));
        let result = result.unwrap_or(Err(IndexError::Panicked));
        if result.is_err() {
            self.close();
        }
        result
    }

    /// Lets go of the file.
    pub fn close(&mut self) {
        let db = self.db.take();
        let _ = catch_unwind(AssertUnwindSafe(|| drop(db)));
    }

    /// Lets go of the file for good: it is no longer ours to count.
    pub fn abandon(&mut self) {
        self.close();
        self.budget.refund(self.end_bytes.swap(0, Ordering::Relaxed));
    }

    pub fn set_key_check(&mut self, check: &ContentId) -> Result<(), IndexError> {
        self.with(|db| {
            let write = db.begin_write()?;
            write.open_table(META)?.insert("key_check", &check.0[..])?;
            Ok(write.commit()?)
        })
    }

    /// Writes blocks of ids; a block without ids goes.
    pub fn write_blocks(&mut self, blocks: &[(u32, Vec<(u32, ContentId)>)]) -> Result<(), IndexError> {
        self.with(|db| {
            let write = db.begin_write()?;
            {
                let mut table = write.open_table(BLOCKS)?;
                for (block, ids) in blocks {
                    if ids.is_empty() {
                        table.remove(block)?;
                    } else {
                        let value = record::encode_block(*block, ids.iter().copied());
                        table.insert(block, &value[..])?;
                    }
                }
            }
            Ok(write.commit()?)
        })
    }

    /// Replaces an image, all of it or nothing. `pages` ascend.
    pub fn write_image(
        &mut self,
        key: &str,
        template: bool,
        saved_unix_s: u64,
        pages: &[(Pfn, ContentId)],
    ) -> Result<ImageHead, IndexError> {
        let head = ImageHead {
            template,
            saved_unix_s,
            pages: pages.len() as u64,
            parts: u32::try_from(pages.len().div_ceil(PART_PAGES)).unwrap_or(u32::MAX),
        };
        self.with(|db| {
            let write = db.begin_write()?;
            {
                let mut parts = write.open_table(PARTS)?;
                parts.retain_in((key, 0)..=(key, u32::MAX), |_, _| false)?;
                for (part, pages) in (0..).zip(pages.chunks(PART_PAGES)) {
                    parts.insert((key, part), &record::encode_part(key, part, pages)[..])?;
                }
                let value = record::encode_head(key, &head);
                write.open_table(IMAGES)?.insert(key, &value[..])?;
            }
            Ok(write.commit()?)
        })?;
        Ok(head)
    }

    pub fn remove_image(&mut self, key: &str) -> Result<(), IndexError> {
        self.with(|db| {
            let write = db.begin_write()?;
            {
                write
                    .open_table(PARTS)?
                    .retain_in((key, 0)..=(key, u32::MAX), |_, _| false)?;
                write.open_table(IMAGES)?.remove(key)?;
            }
            Ok(write.commit()?)
        })
    }

    /// An image's pages in ascending order; those of damaged parts are missing. `None`: no such image.
    pub fn read_image(&mut self, key: &str) -> Result<Option<ImageRead>, IndexError> {
        let path = self.path.clone();
        self.with(|db| {
            let read = db.begin_read()?;
            let Some(head) = read.open_table(IMAGES)?.get(key)? else {
                return Ok(None);
            };
            let Some(head) = record::decode_head(key, head.value()) else {
                return Ok(None);
            };
            let mut pages = Vec::new();
            for entry in read.open_table(PARTS)?.range((key, 0)..(key, head.parts))? {
                let (place, value) = entry?;
                if record::decode_part(key, place.value().1, value.value(), &mut pages).is_none() {
                    log::warn!("{}: a part of the image {key} is damaged", path.display());
                }
            }
            Ok(Some((head, pages)))
        })
    }
}

fn number(meta: &impl ReadableTable<&'static str, &'static [u8]>, name: &str) -> Result<Option<u32>, IndexError> {
    let value = meta.get(name)?;
    Ok(value.and_then(|value| Some(u32::from_le_bytes(value.value().try_into().ok()?))))
}

fn load(db: &Database, pack_slots: u32, sink: BlockSink) -> Result<Loaded, IndexError> {
    let read = db.begin_read()?;
    let meta = match read.open_table(META) {
        Err(TableError::TableDoesNotExist(_)) => {
            initialize(db, pack_slots)?;
            return Ok(Loaded::default());
        }
        meta => meta?,
    };
    match number(&meta, "format")? {
        Some(FORMAT) => {}
        found => {
            return Err(IndexError::Format {
                found: found.unwrap_or(0),
                known: FORMAT,
            });
        }
    }
    match number(&meta, "pack_slots")? {
        Some(slots) if slots == pack_slots => {}
        found => {
            return Err(IndexError::PackSlots {
                found: found.unwrap_or(0),
                expected: pack_slots,
            });
        }
    }
    let key_check = meta.get("key_check")?;
    let mut loaded = Loaded {
        key_check: key_check.and_then(|check| Some(ContentId(check.value().try_into().ok()?))),
        ..Loaded::default()
    };
    for entry in read.open_table(BLOCKS)?.iter()? {
        let (block, value) = entry?;
        match record::decode_block(block.value(), value.value()) {
            Some(ids) => sink(block.value(), &ids),
            None => loaded.damaged += 1,
        }
    }
    for entry in read.open_table(IMAGES)?.iter()? {
        let (key, value) = entry?;
        match record::decode_head(key.value(), value.value()) {
            Some(head) => loaded.images.push((key.value().to_owned(), head)),
            None => loaded.damaged += 1,
        }
    }
    Ok(loaded)
}

fn initialize(db: &Database, pack_slots: u32) -> Result<(), IndexError> {
    let write = db.begin_write()?;
    {
        let mut meta = write.open_table(META)?;
        meta.insert("format", &FORMAT.to_le_bytes()[..])?;
        meta.insert("pack_slots", &pack_slots.to_le_bytes()[..])?;
        write.open_table(BLOCKS)?;
        write.open_table(IMAGES)?;
        write.open_table(PARTS)?;
    }
    Ok(write.commit()?)
}
