//! Packs: files of raw pages, one slot of 4096 bytes after the other.
use std::fs::{File, OpenOptions};
use std::io::{self, IoSlice, IoSliceMut};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use rustix::fs::{FallocateFlags, OFlags, fallocate, fstat};
use rustix::io::{Errno, preadv, pwritev};
use xenfold::page::PAGE_SIZE;

use super::slots::Slot;

/// Pages in one system call; the kernel takes at most 1024 (IOV_MAX).
const CALL_PAGES: usize = 1024;

const PAGE_BYTES: u64 = PAGE_SIZE as u64;

pub(super) fn path(folder: &Path, pack: u32) -> PathBuf {
    folder.join(format!("pack-{pack:05}"))
}

/// The number of a pack by its file's name.
pub(super) fn number(name: &str) -> Option<u32> {
    let digits = name.strip_prefix("pack-")?;
    let number = digits.parse().ok()?;
    (digits.len() >= 5 && format!("{number:05}") == digits).then_some(number)
}

/// Never follows a link: a folder that somebody else can write to must not lead the daemon to other files.
pub(super) fn options() -> OpenOptions {
    let mut options = OpenOptions::new();
    options.read(true).write(true).mode(0o600);
    options.custom_flags((OFlags::NOFOLLOW | OFlags::CLOEXEC).bits() as i32);
    options
}

/// An empty pack; what a crash left in its place is cut off.
pub(super) fn create(path: &Path) -> io::Result<File> {
    options().create(true).truncate(true).open(path)
}

/// Whether the file has no name any more: what is written to it is lost, and its room is not ours to count.
pub(super) fn is_gone(file: &File) -> bool {
    fstat(file).is_ok_and(|stat| stat.st_nlink == 0)
}

/// Bytes that the file takes on the disk.
pub(super) fn allocated_bytes(file: &File) -> io::Result<u64> {
    let stat = fstat(file)?;
    Ok(u64::try_from(stat.st_blocks).unwrap_or(0).saturating_mul(512))
}

/// Parts `slots` into runs that follow one another on the disk: first index and length.
pub(super) fn runs(slots: &[Slot], pack_slots: u32) -> Vec<(usize, usize)> {
    let mut runs: Vec<(usize, usize)> = Vec::new();
    let mut next = None;
    for (index, slot) in slots.iter().enumerate() {
        match runs.last_mut() {
            Some((_, length)) if next == Some(*slot) && *length < CALL_PAGES && slot % pack_slots != 0 => *length += 1,
            _ => runs.push((index, 1)),
        }
        next = slot.checked_add(1);
    }
    runs
}

/// Writes pages one after the other from a slot of the pack on.
pub(super) fn write(file: &File, slot: u32, pages: &[&[u8]]) -> io::Result<()> {
    let mut slices: Vec<IoSlice> = pages.iter().map(|page| IoSlice::new(page)).collect();
    let mut left = &mut slices[..];
    let mut offset = u64::from(slot) * PAGE_BYTES;
    while !left.is_empty() {
        match pwritev(file, left, offset) {
            Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
            Ok(written) => {
                offset += written as u64;
                IoSlice::advance_slices(&mut left, written);
            }
            Err(Errno::INTR) => {}
            Err(error) => return Err(error.into()),
        }
    }
    Ok(())
}

/// Reads pages one after the other from a slot of the pack on. Pages behind the end of the file, and those that the
/// disk does not give back, come as they are in `pages`: the hash tells.
pub(super) fn read(file: &File, slot: u32, pages: &mut [Box<[u8]>]) {
    let mut offset = u64::from(slot) * PAGE_BYTES;
    let mut slices: Vec<IoSliceMut> = pages.iter_mut().map(|page| IoSliceMut::new(page)).collect();
    let mut left = &mut slices[..];
    while !left.is_empty() {
        match preadv(file, left, offset) {
            Ok(0) => return,
            Ok(read) => {
                offset += read as u64;
                IoSliceMut::advance_slices(&mut left, read);
            }
            Err(Errno::INTR) => {}
            Err(_) => {
                // One bad sector must not cost its neighbours: go on behind the page that could not be read.
                let rest = PAGE_SIZE - (offset % PAGE_BYTES) as usize;
                offset += rest as u64;
                IoSliceMut::advance_slices(&mut left, rest);
            }
        }
    }
}

/// Gives slots' room back to the file system.
pub(super) fn punch(file: &File, slot: u32, slots: u32) -> io::Result<()> {
    let mode = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
    let (offset, length) = (u64::from(slot) * PAGE_BYTES, u64::from(slots) * PAGE_BYTES);
    Ok(fallocate(file, mode, offset, length)?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn runs_end_where_the_disk_has_a_gap_or_a_pack_ends() {
        assert_eq!(runs(&[3, 4, 6, 7, 8, 9, 2], 8), [(0, 2), (2, 2), (4, 2), (6, 1)]);
        assert_eq!(runs(&[], 8), []);
    }

    #[test]
    fn names_of_packs() {
        assert_eq!(number("pack-00012"), Some(12));
        assert_eq!(number("pack-123456"), Some(123_456));
        for other in ["pack-12", "pack-000012", "pack-+0001", "index.redb", "pack-"] {
            assert_eq!(number(other), None, "{other}");
        }
    }
}
