//! Open files.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use nix::errno::Errno;

use super::handles::Handle;
use super::{Passthrough, sys};
use crate::fuse::reply::{self, Put};
use crate::fuse::wire::flag;

/// Bytes that one request copies at most, so that other requests get their turn.
const COPY_AT_ONCE: u64 = 64 << 20;

/// Where a `WRITE` goes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Place {
    /// To the offset that the request tells.
    Told,
    /// To the end of the file, wherever it is by then; it was here.
    End(u64),
    /// The file grew from `start` to `end` since this request was begun by a process that then died: if the data is there, the
    /// request was done, or a part of it. If not, it goes to the end.
    PerhapsAt {
        /// The end of the file when the request was begun.
        start: u64,
        /// The end of the file now.
        end: u64,
    },
}

impl Passthrough {
    /// What open(2) is told for the guest's flags. Only these pass; what creates, follows, blocks, locks or bypasses the host's
    /// cache does not.
    pub(super) fn host_flags(&self, flags: u32) -> Result<i32, Errno> {
        let flags = flags.cast_signed();
        // Where each write goes is said with the write.
        let pass = libc::O_ACCMODE | libc::O_TRUNC | libc::O_SYNC | libc::O_DSYNC;
        let noatime = if self.config.noatime {
            libc::O_NOATIME
        } else {
            0
        };
        let mut host = flags & (pass | noatime);
        if host & libc::O_ACCMODE == libc::O_ACCMODE {
            return Err(Errno::EINVAL);
        }
        if self.config.readonly
            && (host & libc::O_ACCMODE != libc::O_RDONLY || host & libc::O_TRUNC != 0)
        {
            return Err(Errno::EROFS);
        }
        if self.agreed(crate::fuse::wire::init::WRITEBACK_CACHE) {
            // The guest reads what it writes only a part of, and knows the file's end itself.
            if host & libc::O_ACCMODE == libc::O_WRONLY {
                host = (host & !libc::O_ACCMODE) | libc::O_RDWR;
            }
        }
        Ok(host)
    }

    /// Opens an inode that is a regular file.
    pub(super) fn open_file(
        &mut self,
        node: u64,
        flags: u32,
        open_flags: u32,
    ) -> Result<OwnedFd, Errno> {
        self.room()?;
        let inode = self.inodes.get(node)?;
        match inode.kind {
            libc::S_IFREG => {}
            libc::S_IFDIR => return Err(Errno::EISDIR),
            libc::S_IFLNK => return Err(Errno::ELOOP),
            // The guest's kernel has its own devices and pipes behind such an inode and never asks for the host's.
            _ => return Err(Errno::ENXIO),
        }
        let host = self.host_flags(flags)?;
        if host & libc::O_TRUNC != 0 {
            self.drop_mapped_capability(inode.fd())?;
        }
        if host & libc::O_TRUNC != 0 && open_flags & flag::OPEN_KILL_SUIDGID != 0 {
            self.kill_suidgid(inode.fd())?;
        }
        self.own.reopen(inode.fd(), host)
    }

    /// Adds an open file and its `fuse_open_out`.
    pub(super) fn put_open(
        &mut self,
        file: OwnedFd,
        flags: u32,
        out: &mut Vec<u8>,
    ) -> Result<(), Errno> {
        // The guest's kernel knows the file's end itself if it gathers writes.
        let append = flags.cast_signed() & libc::O_APPEND != 0
            && !self.agreed(crate::fuse::wire::init::WRITEBACK_CACHE);
        let handle = Handle::File {
            fd: file,
            append,
            flags,
        };
        let fh = self.handles.insert(&mut self.journal, handle)?;
        reply::open_out(out, fh, self.open_reply_flags());
        Ok(())
    }

    pub(super) fn open(
        &mut self,
        node: u64,
        flags: u32,
        open_flags: u32,
        out: &mut Vec<u8>,
    ) -> Result<(), Errno> {
        let file = self.open_file(node, flags, open_flags)?;
        self.put_open(file, flags, out)
    }

    /// The file that a `READ` reads.
    ///
    /// # Errors
    /// `EBADF`.
    pub fn readable(&self, fh: u64) -> Result<BorrowedFd<'_>, Errno> {
        self.handles.file(fh)
    }

    /// The file behind `file`, which may be open for writing only, to see whether a `WRITE` was done already. `None` if this
    /// process may not read it.
    ///
    /// # Errors
    /// What opening it anew says.
    pub fn to_compare(&self, file: BorrowedFd<'_>) -> Result<Option<OwnedFd>, Errno> {
        match self.own.reopen(file, libc::O_RDONLY) {
            Err(Errno::EACCES | Errno::EPERM) => Ok(None),
            other => other.map(Some),
        }
    }

    /// The file that a `WRITE` writes, prepared for it.
    ///
    /// # Errors
    /// `EBADF`, `EROFS`, or the set-user-id bit cannot be taken away.
    pub fn writable(&self, fh: u64, write_flags: u32) -> Result<(BorrowedFd<'_>, Place), Errno> {
        if self.config.readonly {
            return Err(Errno::EROFS);
        }
        let (file, append) = self.handles.file_to_write(fh)?;
        if write_flags & flag::WRITE_KILL_SUIDGID != 0 {
            self.kill_suidgid(file)?;
        }
        self.drop_mapped_capability(file)?;
        // The guest's kernel writes gathered pages to where they belong.
        if !append || write_flags & flag::WRITE_CACHE != 0 {
            return Ok((file, Place::Told));
        }
        let end = sys::stat(file)?.stx_size;
        match self.journal.again() {
            Some(again) if again.before != 0 && end > again.before - 1 => {
                let start = again.before - 1;
                Ok((file, Place::PerhapsAt { start, end }))
            }
            _ => {
                // One added, since an empty file is not the same as no note.
                self.journal.note_before(end.saturating_add(1));
                Ok((file, Place::End(end)))
            }
        }
    }

    pub(super) fn flush(&mut self, node: u64, lock_owner: u64) -> Result<(), Errno> {
        if self.config.posix_lock {
            // close(2) of any descriptor of a file ends all of the process's locks on it (POSIX).
            self.locks.release(node, lock_owner);
            return Ok(());
        }
        // Nothing to do when a descriptor is closed; the guest stops asking.
        Err(Errno::ENOSYS)
    }

    pub(super) fn fsync(&mut self, fh: u64, datasync: bool) -> Result<(), Errno> {
        sys::sync(self.handles.file(fh)?, datasync)
    }

    pub(super) fn release(
        &mut self,
        node: u64,
        fh: u64,
        release_flags: u32,
        lock_owner: u64,
    ) -> Result<(), Errno> {
        if release_flags & flag::RELEASE_FLUSH != 0 {
            self.locks.release(node, lock_owner);
        }
        // A flock ends with its open file.
        match self.handles.remove(fh) {
            Ok(Handle::File { .. }) => Ok(()),
            Ok(Handle::Folder { .. }) => Err(Errno::EBADF),
            // It was closed, and then the process that closed it died.
            Err(_) if self.journal.again().is_some() => Ok(()),
            Err(errno) => Err(errno),
        }
    }

    pub(super) fn lseek(
        &mut self,
        fh: u64,
        offset: u64,
        whence: u32,
        out: &mut Vec<u8>,
    ) -> Result<(), Errno> {
        let whence = whence.cast_signed();
        if ![
            libc::SEEK_SET,
            libc::SEEK_END,
            libc::SEEK_DATA,
            libc::SEEK_HOLE,
        ]
        .contains(&whence)
        {
            return Err(Errno::EINVAL);
        }
        // The position itself is never used: reads and writes carry their offsets.
        let at = sys::seek(self.handles.file(fh)?, offset, whence)?;
        out.u64(at);
        Ok(())
    }

    pub(super) fn fallocate(
        &mut self,
        fh: u64,
        offset: u64,
        length: u64,
        mode: u32,
    ) -> Result<(), Errno> {
        sys::allocate(self.handles.file(fh)?, mode, offset, length)
    }

    pub(super) fn copy_range(
        &mut self,
        (fh_in, off_in): (u64, u64),
        (fh_out, off_out): (u64, u64),
        len: u64,
        flags: u64,
        out: &mut Vec<u8>,
    ) -> Result<(), Errno> {
        if flags != 0 {
            return Err(Errno::EINVAL);
        }
        let from = self.handles.file(fh_in)?;
        let to = self.handles.file(fh_out)?;
        // Bounded by a constant that fits both.
        let len = len.min(COPY_AT_ONCE) as usize;
        let copied = sys::copy_range((from, off_in), (to, off_out), len, 0)?;
        out.u32(copied as u32).u32(0);
        Ok(())
    }

    pub(super) fn sync_file_system(&mut self, node: u64) -> Result<(), Errno> {
        let inode = self.inodes.get(node)?;
        if inode.kind != libc::S_IFREG && inode.kind != libc::S_IFDIR {
            return Err(Errno::EINVAL);
        }
        let opened = self
            .own
            .reopen(inode.fd(), libc::O_RDONLY | libc::O_NONBLOCK)?;
        sys::sync_file_system(opened.as_fd())
    }
}
