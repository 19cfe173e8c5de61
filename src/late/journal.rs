//! What another process needs to go on with the late pages of a guest when the one that did is killed: a file for each
//! migration and side in /run/xenfold, locked as long as its owner lives, which the kernel ends with the owner.
//!
//! ```text
//!   0  "XFLATE1\n"                                    the 1 is the version
//!   8  u32 noted: bit 0 held, 1 started, 2 landed     Noted; written anew with each change, together with the rest of the
//!  12  u32 owner: its process number                  first 24 bytes
//!  16  u32 CRC-32 of the 16 bytes before
//!  20  u32 zero
//!  24  u32 length of the facts, in bytes; u32 zero
//!  32  u64 bound: one more than the highest page that may be late
//!  40  the facts: JSON ([`Facts`])
//!      the late pages: bound / 64 words of u64, rounded up; bit n % 64 of word n / 64 is page n
//!      u32 CRC-32 of all from 24 to here
//!      the pages that have come since, a bit each in the same order, in bytes. Written one by one, each behind the page
//!      itself; what is missing at the end is zero. A page that came and is not in it comes again, and is left alone then.
//!      the pages for which another domain has asked, in the same way. Of one that is missing it is not asked again: Xen tells each pager
//!      once (p2m_mem_paging_populate in xen/arch/x86/mm/mem_paging.c).
//! ```
//!
//! All numbers are little-endian. The file has its name only when it is complete; what is damaged nevertheless is noticed
//! by the two CRCs, and not used.
use std::fs::{self, File, TryLockError};
use std::io::{self, Read, Seek, Write};
use std::os::unix::fs::{FileExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use crate::page::Pfn;
use crate::page_set::PageSet;

const MAGIC: [u8; 8] = *b"XFLATE1\n";
const HEAD_BYTES: usize = 24;
const FIXED_BYTES: usize = 40;
const MAX_FACTS_BYTES: usize = 64 << 10;

/// More pages than any guest has: 16 TiB.
const MAX_BOUND: u64 = 1 << 32;

/// How the names of the two sides' files end.
pub const PAGER: &str = "pager";
pub const SERVER: &str = "server";

/// Where the journal of a migration is. `None`: that is no name of a migration.
pub fn journal_path(folder: &Path, migration: &str, side: &str) -> Option<PathBuf> {
    let valid = migration.len() == 32 && migration.bytes().all(|byte| byte.is_ascii_hexdigit());
    valid.then(|| folder.join(format!("{migration}.{side}")))
}

/// Why a journal cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum JournalError {
    #[error("there is none")]
    Absent,
    #[error("its owner lives")]
    Owned,
    #[error("{} is damaged: {what}", path.display())]
    Damaged { path: PathBuf, what: &'static str },
    #[error(transparent)]
    Io(#[from] io::Error),
}

/// What does not change.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Facts {
    pub guest: String,
    pub uuid: String,
    /// On the host where the journal is.
    pub domid: u32,
    pub migration: String,
    /// What proves that a connection is the source's.
    pub token: String,
    /// The key of content ids, 64 hexadecimal digits.
    pub content_key: String,
    /// Source: where the guest went, the ssh that reaches it, and what the pages may take of the link in a second (0: all).
    pub host: String,
    pub ssh: Vec<String>,
    pub bandwidth: u64,
    /// Destination: the receiving xl's process number, and when it started, as /proc tells it.
    pub xl: u32,
    pub xl_since: u64,
}

/// What changes: how far it has come with the guest.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Noted {
    /// The owner holds the guest still, or is about to.
    pub held: bool,
    /// xl has said that the guest runs.
    pub started: bool,
    /// All pages are there, or nobody needs them: the guest is not touched any more.
    pub landed: bool,
}

impl Noted {
    fn bits(self) -> u32 {
        u32::from(self.held) | u32::from(self.started) << 1 | u32::from(self.landed) << 2
    }

    fn from_bits(bits: u32) -> Option<Noted> {
        (bits < 8).then_some(Noted {
            held: bits & 1 != 0,
            started: bits & 2 != 0,
            landed: bits & 4 != 0,
        })
    }
}

/// A journal that is this process's. Dropped, it stays for another one.
pub struct Journal {
    file: File,
    path: PathBuf,
    come: Marks,
    awaited: Marks,
}

/// A bit for each page, in the file and here.
struct Marks {
    at: u64,
    bytes: Vec<u8>,
}

impl Marks {
    fn add(&mut self, file: &File, pfn: Pfn) -> io::Result<()> {
        let at = pfn.get() / 8;
        let byte = usize::try_from(at).ok().and_then(|at| self.bytes.get_mut(at));
        let Some(byte) = byte else { return Ok(()) };
        *byte |= 1 << (pfn.get() % 8);
        file.write_all_at(&[*byte], self.at + at)
    }

    /// Reads them where the file is now; what is missing at its end is zero.
    fn read(mut file: &File, length: u64) -> io::Result<Marks> {
        let at = file.stream_position()?;
        let mut bytes = Vec::new();
        file.take(length).read_to_end(&mut bytes)?;
        bytes.resize(usize::try_from(length).unwrap_or(usize::MAX), 0);
        Ok(Marks { at, bytes })
    }

    fn words(&self) -> Vec<u64> {
        words(&self.bytes)
    }
}

fn words(bytes: &[u8]) -> Vec<u64> {
    let words = bytes.as_chunks().0.iter();
    words.map(|word| u64::from_le_bytes(*word)).collect()
}

/// What a journal says.
pub struct Found {
    pub facts: Facts,
    pub noted: Noted,
    /// Its newest owner.
    pub owner: u32,
    /// Late pages at the beginning, and those that have not come.
    pub late: PageSet,
    pub missing: PageSet,
    /// Of the missing ones, those that another domain waits for.
    pub awaited: PageSet,
}

impl Journal {
    /// Writes one. What of an older one is there is replaced.
    ///
    /// # Errors
    /// The file system's; then there is none.
    pub fn create(path: &Path, facts: &Facts, late: &PageSet, noted: Noted) -> io::Result<Journal> {
        let new = path.with_extension("new");
        if let Some(folder) = path.parent() {
            fs::create_dir_all(folder)?;
        }
        // Of a process that was killed in here.
        let _ = fs::remove_file(&new);
        let file = File::options()
            .read(true)
            .write(true)
            .create_new(true)
            .mode(0o600)
            .open(&new)?;
        let written = file.try_lock().map_err(io::Error::from).and_then(|()| {
            let body = body(facts, late)?;
            (&file).write_all(&head(noted, std::process::id()))?;
            (&file).write_all(&body)?;
            fs::rename(&new, path)?;
            Ok((HEAD_BYTES + body.len()) as u64)
        });
        let length = late.words().len() * 8;
        let marks = |at| Marks {
            at,
            bytes: vec![0; length],
        };
        match written {
            Ok(come_at) => Ok(Journal {
                file,
                path: path.to_owned(),
                come: marks(come_at),
                awaited: marks(come_at + length as u64),
            }),
            Err(error) => {
                // It is of no use to anybody.
                let _ = fs::remove_file(&new);
                Err(error)
            }
        }
    }

    /// Takes over from an owner that has ended.
    pub fn take(path: &Path) -> Result<(Journal, Found), JournalError> {
        let file = open(path, true)?;
        match file.try_lock() {
            Ok(()) => {}
            Err(TryLockError::WouldBlock) => return Err(JournalError::Owned),
            Err(TryLockError::Error(error)) => return Err(error.into()),
        }
        // Its owner may have removed it between the two.
        let (opened, now) = (file.metadata()?, fs::metadata(path));
        if !now.is_ok_and(|now| (now.dev(), now.ino()) == (opened.dev(), opened.ino())) {
            return Err(JournalError::Absent);
        }
        let (found, come, awaited) = read(path, &file)?;
        file.write_all_at(&head(found.noted, std::process::id()), 0)?;
        Ok((
            Journal {
                file,
                path: path.to_owned(),
                come,
                awaited,
            },
            found,
        ))
    }

    pub fn note(&self, noted: Noted) -> io::Result<()> {
        self.file.write_all_at(&head(noted, std::process::id()), 0)
    }

    /// A page is where it belongs.
    pub fn came(&mut self, pfn: Pfn) -> io::Result<()> {
        self.come.add(&self.file, pfn)
    }

    /// Another domain waits for a page.
    pub fn awaited(&mut self, pfn: Pfn) -> io::Result<()> {
        self.awaited.add(&self.file, pfn)
    }

    /// Nobody has to go on.
    pub fn remove(self) -> io::Result<()> {
        fs::remove_file(&self.path)
    }
}

/// The process number of a journal's newest owner, and the file's inode: whether it lives /proc/locks tells.
pub fn owner(path: &Path) -> io::Result<(u32, u64)> {
    let mut file = File::open(path)?;
    let mut head = [0; HEAD_BYTES];
    file.read_exact(&mut head)?;
    let [.., a, b, c, d, _, _, _, _, _, _, _, _] = head;
    Ok((u32::from_le_bytes([a, b, c, d]), file.metadata()?.ino()))
}

/// What a journal says, whoever owns it.
pub fn look(path: &Path) -> Result<Found, JournalError> {
    let file = open(path, false)?;
    Ok(read(path, &file)?.0)
}

fn open(path: &Path, writing: bool) -> Result<File, JournalError> {
    match File::options().read(true).write(writing).open(path) {
        Ok(file) => Ok(file),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Err(JournalError::Absent),
        Err(error) => Err(error.into()),
    }
}

fn head(noted: Noted, owner: u32) -> Vec<u8> {
    let mut head = MAGIC.to_vec();
    head.extend_from_slice(&noted.bits().to_le_bytes());
    head.extend_from_slice(&owner.to_le_bytes());
    head.extend_from_slice(&crc32fast::hash(&head).to_le_bytes());
    head.extend_from_slice(&[0; 4]);
    head
}

fn body(facts: &Facts, late: &PageSet) -> io::Result<Vec<u8>> {
    let facts = serde_json::to_vec(facts)?;
    if facts.len() > MAX_FACTS_BYTES || late.bound() > MAX_BOUND {
        return Err(io::ErrorKind::InvalidInput.into());
    }
    let mut body = (facts.len() as u64).to_le_bytes().to_vec();
    body.extend_from_slice(&late.bound().to_le_bytes());
    body.extend_from_slice(&facts);
    late.words()
        .iter()
        .for_each(|word| body.extend_from_slice(&word.to_le_bytes()));
    body.extend_from_slice(&crc32fast::hash(&body).to_le_bytes());
    Ok(body)
}

fn read(path: &Path, mut file: &File) -> Result<(Found, Marks, Marks), JournalError> {
    let damaged = |what| JournalError::Damaged {
        path: path.to_owned(),
        what,
    };
    let short = || damaged("it is short");
    let mut fixed = [0; FIXED_BYTES];
    file.read_exact(&mut fixed).map_err(|_| short())?;
    let (head, rest) = fixed.split_at(HEAD_BYTES);
    let word = |at: usize| {
        head.get(at..at + 4)
            .and_then(|word| Some(u32::from_le_bytes(word.try_into().ok()?)))
    };
    let (noted, owner, crc) = (word(8).ok_or_else(short)?, word(12).ok_or_else(short)?, word(16));
    if !head.starts_with(&MAGIC) {
        return Err(damaged("it is of another version"));
    }
    if head.get(..16).map(crc32fast::hash) != crc || word(20) != Some(0) {
        return Err(damaged("its head is not as it was written"));
    }
    let noted = Noted::from_bits(noted).ok_or_else(|| damaged("its head is not as it was written"))?;
    let (length, bound) = rest.split_at(8);
    let number = |bytes: &[u8]| bytes.try_into().map_or(u64::MAX, u64::from_le_bytes);
    let (length, bound) = (number(length), number(bound));
    if length > MAX_FACTS_BYTES as u64 || bound > MAX_BOUND {
        return Err(damaged("its sizes are not"));
    }
    let late_bytes = bound.div_ceil(64) * 8;
    let mut body = rest.to_vec();
    let wanted = length + late_bytes;
    file.take(wanted).read_to_end(&mut body)?;
    let mut crc = [0; 4];
    file.read_exact(&mut crc).map_err(|_| short())?;
    if crc32fast::hash(&body) != u32::from_le_bytes(crc) {
        return Err(damaged("it is not as it was written"));
    }
    let (facts, late) = body
        .get(16..)
        .and_then(|body| body.split_at_checked(usize::try_from(length).ok()?))
        .ok_or_else(short)?;
    let facts = serde_json::from_slice(facts).map_err(|_| damaged("its facts are not the JSON expected"))?;
    let late = PageSet::from_words(&words(late), bound);
    let come = Marks::read(file, late_bytes)?;
    // Where a byte of the ones before is missing none of these is there.
    let mut awaited = Marks::read(file, late_bytes)?;
    awaited.at = come.at + late_bytes;
    let mut missing = late.clone();
    missing.subtract(&come.words());
    let mut waits = missing.clone();
    waits.subtract(&awaited.words().iter().map(|word| !word).collect::<Vec<_>>());
    let found = Found {
        facts,
        noted,
        owner,
        late,
        missing,
        awaited: waits,
    };
    Ok((found, come, awaited))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pfn(raw: u64) -> Pfn {
        Pfn::new(raw).unwrap()
    }

    fn facts() -> Facts {
        Facts {
            guest: "web".into(),
            domid: 7,
            migration: "00112233445566778899aabbccddeeff".into(),
            ..Facts::default()
        }
    }

    fn late() -> PageSet {
        let mut late = PageSet::new(1000);
        late.insert_run(100..500);
        late
    }

    fn pages(set: &PageSet) -> Vec<u64> {
        set.iter().map(Pfn::get).collect()
    }

    #[test]
    fn another_process_goes_on_where_the_first_was() {
        let folder = tempfile::tempdir().unwrap();
        let path = journal_path(folder.path(), &facts().migration, PAGER).unwrap();
        assert!(matches!(Journal::take(&path), Err(JournalError::Absent)));
        let mut first = Journal::create(&path, &facts(), &late(), Noted::default()).unwrap();
        assert!(matches!(Journal::take(&path), Err(JournalError::Owned)));
        for page in (100..498).chain([7, 5000]) {
            first.came(pfn(page)).unwrap();
        }
        let noted = Noted {
            held: true,
            started: true,
            landed: false,
        };
        for page in [200, 499] {
            first.awaited(pfn(page)).unwrap();
        }
        first.note(noted).unwrap();
        assert_eq!(look(&path).unwrap().owner, std::process::id());
        drop(first);
        let (mut second, found) = Journal::take(&path).unwrap();
        assert_eq!((found.facts, found.noted), (facts(), noted));
        assert_eq!((found.late.len(), pages(&found.missing)), (400, vec![498, 499]));
        assert_eq!(pages(&found.awaited), [499], "the other one has come");
        second.came(pfn(498)).unwrap();
        drop(second);
        let (third, found) = Journal::take(&path).unwrap();
        assert_eq!(pages(&found.missing), [499]);
        assert_eq!(fs::metadata(&path).unwrap().mode() & 0o777, 0o600);
        third.remove().unwrap();
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 0);
    }

    #[test]
    fn damage_is_noticed() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("x.pager");
        drop(Journal::create(&path, &facts(), &late(), Noted::default()).unwrap());
        let whole = fs::read(&path).unwrap();
        let is_damaged = |bytes: &[u8]| {
            fs::write(&path, bytes).unwrap();
            matches!(look(&path), Err(JournalError::Damaged { .. }))
        };
        for end in 0..whole.len() {
            assert!(is_damaged(&whole[..end]), "cut at {end}");
        }
        for bit in 0..whole.len() * 8 {
            let mut other = whole.clone();
            other[bit / 8] ^= 1 << (bit % 8);
            assert!(is_damaged(&other), "bit {bit}");
        }
        assert!(!is_damaged(&whole));
    }

    /// The layout is this version's.
    #[test]
    fn the_format_is_held() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("x.pager");
        let mut late = PageSet::new(70);
        late.insert(pfn(65));
        let mut journal = Journal::create(&path, &Facts::default(), &late, Noted::default()).unwrap();
        journal.came(pfn(65)).unwrap();
        let bytes = fs::read(&path).unwrap();
        let json = serde_json::to_vec(&Facts::default()).unwrap();
        let (head, rest) = bytes.split_at(HEAD_BYTES);
        assert_eq!(&head[..12], b"XFLATE1\n\0\0\0\0");
        assert_eq!(
            rest[..16],
            [&(json.len() as u64).to_le_bytes()[..], &70u64.to_le_bytes()].concat()
        );
        let (body, come) = rest[16..].split_at(json.len() + 16 + 4);
        assert_eq!(body[..json.len()], json);
        assert_eq!(
            body[json.len()..][..16],
            [0, 0, 0, 0, 0, 0, 0, 0, 2, 0, 0, 0, 0, 0, 0, 0]
        );
        assert_eq!(come, [0, 0, 0, 0, 0, 0, 0, 0, 2]);
        journal.awaited(pfn(64)).unwrap();
        let bytes = fs::read(&path).unwrap();
        let (come, awaited) = bytes[HEAD_BYTES + 16 + json.len() + 16 + 4..].split_at(16);
        assert_eq!((come[8], come.len()), (2, 16));
        assert_eq!(awaited, [0, 0, 0, 0, 0, 0, 0, 0, 1]);
    }

    #[test]
    fn a_peer_names_no_other_file() {
        let folder = Path::new("/f");
        for name in ["", "../x", "0011223344556677/8899aabbccddeef", &"0".repeat(33)] {
            assert_eq!(journal_path(folder, name, PAGER), None);
        }
    }
}
