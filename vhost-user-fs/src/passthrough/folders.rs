//! Reading folders.
//!
//! A reply is filled from getdents64(2). What was read and did not fit is kept for the next request, but of one folder only,
//! so that a guest with many open folders costs no memory; another folder then seeks back. If it is less than the reply took,
//! more is read while the guest looks at that reply: most of the time of listing a folder is the file system's.

use nix::errno::Errno;
use std::ffi::CStr;
use std::os::fd::{AsFd, BorrowedFd};

use super::Cache;
use super::handles::Handle;
use super::{Passthrough, sys};
use crate::fuse::Name;
use crate::fuse::reply::{self, Attr, Validity};
use crate::fuse::wire::{DIRENT, ENTRY_OUT, fopen};

/// Bytes of entries that are read at once.
const READ_AT_ONCE: usize = 32 * 1024;

/// Entries that were read and not yet given.
#[derive(Debug, Default)]
pub(super) struct ReadAhead {
    /// The handle that they are of; 0 is none.
    fh: u64,
    /// The position of the first of them.
    offset: u64,
    /// At most twice [`READ_AT_ONCE`].
    buffer: Vec<u8>,
    at: usize,
    end: usize,
    /// What is left is less than the last reply took, and the folder has perhaps more.
    short: bool,
}

/// One `struct linux_dirent64`.
struct Entry<'a> {
    ino: u64,
    /// Position of the next one.
    next: u64,
    kind: u8,
    name: &'a CStr,
    len: usize,
}

/// Inode number, position of the next one, and length of the first entry in `bytes`, which the kernel wrote.
fn head(bytes: &[u8]) -> Option<(u64, u64, usize)> {
    let (ino, rest) = bytes.split_first_chunk()?;
    let (next, rest) = rest.split_first_chunk()?;
    let (len, _) = rest.split_first_chunk()?;
    Some((
        u64::from_ne_bytes(*ino),
        u64::from_ne_bytes(*next),
        usize::from(u16::from_ne_bytes(*len)),
    ))
}

impl<'a> Entry<'a> {
    /// The first one in `bytes`, which the kernel wrote.
    fn parse(bytes: &'a [u8]) -> Option<Self> {
        let (ino, next, len) = head(bytes)?;
        Some(Self {
            ino,
            next,
            kind: *bytes.get(18)?,
            name: CStr::from_bytes_until_nul(bytes.get(19..len)?).ok()?,
            len,
        })
    }
}

/// Inode numbers and names of the entries in `bytes`, which the kernel wrote.
pub(super) fn names_of(mut bytes: &[u8]) -> impl Iterator<Item = (u64, &CStr)> {
    std::iter::from_fn(move || {
        let entry = Entry::parse(bytes)?;
        bytes = bytes.get(entry.len..)?;
        Some((entry.ino, entry.name))
    })
}

/// The position behind all entries in `bytes`; `None` without any.
fn end_of(mut bytes: &[u8]) -> Option<u64> {
    let mut end = None;
    // No entry is shorter than what is in front of its name.
    while let Some((_, next, len @ 19..)) = head(bytes) {
        end = Some(next);
        bytes = bytes.get(len..)?;
    }
    end
}

impl ReadAhead {
    /// Makes sure that the next entry, if there is one, is at the front. `false` at the end of the folder.
    fn fill(
        &mut self,
        handles: &mut super::handles::Handles,
        fh: u64,
        offset: u64,
    ) -> Result<bool, Errno> {
        // A handle is forgotten here before it is closed.
        if self.fh == fh && self.offset == offset && self.at < self.end {
            return Ok(true);
        }
        let (fd, position) = handles.folder(fh)?;
        // Whatever goes wrong, nothing is kept.
        self.fh = 0;
        (self.at, self.end) = (0, 0);
        if position != offset {
            sys::seek(fd, offset, libc::SEEK_SET)?;
        }
        let more = self.read_behind(fd)?;
        self.fh = fh;
        self.offset = offset;
        // The kernel stands after the last entry.
        handles.moved(fh, more.unwrap_or(offset));
        Ok(more.is_some())
    }

    /// Reads entries behind those that are there; returns the position behind them, `None` if there are no more.
    fn read_behind(&mut self, fd: BorrowedFd<'_>) -> Result<Option<u64>, Errno> {
        self.buffer.copy_within(self.at..self.end, 0);
        (self.at, self.end) = (0, self.end - self.at);
        let room = self.end + READ_AT_ONCE;
        if self.buffer.len() < room {
            self.buffer.resize(room, 0);
        }
        let fresh = &mut self.buffer[self.end..room];
        let len = sys::read_entries(fd, fresh)?;
        self.end += len;
        Ok(end_of(&fresh[..len]))
    }

    /// A reply took so many bytes of entries, and there was no room for more in it.
    fn took(&mut self, bytes: usize) {
        self.short = self.end - self.at < bytes.min(READ_AT_ONCE);
    }

    /// Reads on, if the next reply is likely to need it.
    fn read_on(&mut self, handles: &mut super::handles::Handles) {
        if !std::mem::take(&mut self.short) {
            return;
        }
        // An error is for the request that gets there.
        if let Ok((fd, _)) = handles.folder(self.fh)
            && let Ok(Some(end)) = self.read_behind(fd)
        {
            handles.moved(self.fh, end);
        }
    }
}

impl Passthrough {
    pub(super) fn open_folder(&mut self, node: u64, out: &mut Vec<u8>) -> Result<(), Errno> {
        self.room()?;
        let fd = self.inodes.folder(node)?.fd();
        let fd = self.own.reopen(fd, libc::O_RDONLY | libc::O_DIRECTORY)?;
        let handle = Handle::Folder { fd, position: 0 };
        let fh = self.handles.insert(&mut self.journal, handle)?;
        let flags = match self.config.cache {
            Cache::Never => 0,
            Cache::Auto => fopen::CACHE_DIR,
            Cache::Metadata | Cache::Always => fopen::CACHE_DIR | fopen::KEEP_CACHE,
        };
        reply::open_out(out, fh, flags);
        Ok(())
    }

    pub(super) fn read_folder(
        &mut self,
        node: u64,
        fh: u64,
        mut offset: u64,
        room: usize,
        plus: bool,
        out: &mut Vec<u8>,
    ) -> Result<(), Errno> {
        // Taken out while it is read from, since lookups need the rest of `self`.
        let mut ahead = std::mem::take(&mut self.ahead);
        let mut took = 0;
        let result = loop {
            match ahead.fill(&mut self.handles, fh, offset) {
                Ok(true) => {}
                Ok(false) => break Ok(()),
                // What is in the reply already was looked up and must reach the guest.
                Err(_) if !out.is_empty() => break Ok(()),
                Err(errno) => break Err(errno),
            }
            let Some(entry) = Entry::parse(&ahead.buffer[ahead.at..ahead.end]) else {
                break Err(Errno::EIO);
            };
            let name = entry.name.to_bytes();
            let needed = reply::dirent_len(name.len()) + if plus { ENTRY_OUT } else { 0 };
            if out.len() + needed > room || (plus && self.journal.room() == 0) {
                ahead.took(took);
                // A reply without any entry would mean the end.
                break if out.is_empty() {
                    Err(Errno::EINVAL)
                } else {
                    Ok(())
                };
            }
            if !plus || self.put_looked_up(node, &entry, out) {
                reply::dirent(out, entry.ino, entry.next, entry.kind, name);
            }
            offset = entry.next;
            ahead.offset = offset;
            ahead.at += entry.len;
            took += entry.len;
        };
        self.ahead = ahead;
        result
    }

    /// The part of a `fuse_direntplus` before the entry itself; `false` if the file is gone.
    fn put_looked_up(&mut self, node: u64, entry: &Entry<'_>, out: &mut Vec<u8>) -> bool {
        let unknown = |out: &mut Vec<u8>| {
            let attr = Attr {
                ino: entry.ino,
                mode: u32::from(entry.kind) << 12,
                ..Attr::default()
            };
            reply::entry_out(out, 0, Validity::default(), &attr);
            true
        };
        // "." and ".." are no names that can be looked up, and the guest has both.
        let Ok(name) = Name::new(entry.name) else {
            return unknown(out);
        };
        match self.find_lightly(node, name) {
            Ok((node, attr)) => {
                self.put_entry(out, node, &attr);
                true
            }
            Err(Errno::ENOENT) => false,
            // The guest may look it up by itself and learn the error then.
            Err(_) => unknown(out),
        }
    }

    /// There is no other request: reads more of the folder that is being listed.
    pub(crate) fn read_on(&mut self) {
        self.ahead.read_on(&mut self.handles);
    }

    pub(super) fn release_folder(&mut self, fh: u64) -> Result<(), Errno> {
        if self.ahead.fh == fh {
            self.ahead = ReadAhead::default();
        }
        match self.handles.remove(fh) {
            Ok(Handle::Folder { .. }) => Ok(()),
            Ok(Handle::File { .. }) => Err(Errno::EBADF),
            // It was closed, and then the process that closed it died.
            Err(_) if self.journal.again().is_some() => Ok(()),
            Err(errno) => Err(errno),
        }
    }

    pub(super) fn fsync_folder(&mut self, fh: u64, datasync: bool) -> Result<(), Errno> {
        let (fd, _) = self.handles.folder(fh)?;
        sys::sync(fd.as_fd(), datasync)
    }
}

// Used by the tests of sizes only, but said here, where it matters.
const _: () = assert!(
    DIRENT + ENTRY_OUT + 256 < 4096,
    "the longest entry fits the smallest reply"
);

#[cfg(test)]
mod tests {
    use super::*;

    /// A `struct linux_dirent64` as the kernel writes it, padded to 8 bytes.
    fn entry(ino: u64, next: u64, name: &str) -> Vec<u8> {
        let len = (19 + name.len() + 1).next_multiple_of(8);
        let mut bytes = [ino.to_ne_bytes(), next.to_ne_bytes()].concat();
        bytes.extend((len as u16).to_ne_bytes());
        bytes.push(libc::DT_REG);
        bytes.extend(name.as_bytes());
        bytes.resize(len, 0);
        bytes
    }

    #[test]
    fn the_position_behind_all_entries_is_that_of_the_last_one() {
        let all = [entry(1, 70, "a"), entry(2, 90, &"b".repeat(255))].concat();
        assert_eq!(end_of(&all), Some(90));
        assert_eq!(end_of(&[]), None);
        let first = Entry::parse(&all).unwrap();
        assert_eq!((first.ino, first.next, first.name), (1, 70, c"a"));
        let second = Entry::parse(&all[first.len..]).unwrap();
        assert_eq!((second.next, second.name.count_bytes()), (90, 255));
        // Whatever has a length that no entry has ends it.
        assert_eq!(end_of(&[0; 64]), None);
        assert_eq!(end_of(&all[..all.len() - 1]), None);
    }
}
