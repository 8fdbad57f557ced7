//! Bytes on a descriptor, as `imago` asks for them.
//!
//! **Job.** Positioned reads and writes that do all of their bytes. **Who is not trusted.** The image, whose tables choose every
//! place: one beyond what a file can have is an error, and one beyond the end of the file reads as zeroes, as the format has it.
//! **Why this way.** `imago`'s own file driver asks the kernel for more than the filter of this process allows. The end of the file is
//! counted here, since nobody else writes it.

#![allow(unsafe_code)] // the trait's I/O methods are declared unsafe

use std::fmt;
use std::fs::File;
use std::io::{self, IoSlice, IoSliceMut};
use std::os::fd::{AsFd, OwnedFd};
use std::sync::atomic::{AtomicU64, Ordering};

use imago::Storage;
use imago::io_buffers::{IoVector, IoVectorMut};
use imago::storage::drivers::CommonStorageHelper;
use nix::errno::Errno;
use nix::fcntl::{FallocateFlags, fallocate};
use nix::sys::uio::{preadv, pwritev};
use nix::unistd::{Whence, lseek};

/// Buffers of one call; Linux takes up to 1024.
const MAX_BUFFERS: usize = 1024;

/// An image's descriptor.
#[derive(Debug)]
pub(crate) struct Descriptor {
    file: File,
    end: AtomicU64,
    /// Multiples that memory and places must be of: 1 through the page cache.
    memory: usize,
    place: usize,
    helper: CommonStorageHelper,
}

impl Descriptor {
    /// `direct`: it is open with `O_DIRECT`.
    pub(crate) fn new(fd: OwnedFd, direct: bool) -> Result<Self, Errno> {
        let end = lseek(&fd, 0, Whence::SeekEnd)?;
        let (memory, place) = if direct {
            device_host::direct_io_alignment(fd.as_fd()).unwrap_or((4096, 4096))
        } else {
            (1, 1)
        };
        Ok(Self {
            file: fd.into(),
            end: u64::try_from(end).unwrap_or(0).into(),
            memory,
            place,
            helper: CommonStorageHelper::default(),
        })
    }

    fn allocate(&self, how: FallocateFlags, offset: u64, length: u64) -> io::Result<()> {
        let how = how | FallocateFlags::FALLOC_FL_KEEP_SIZE;
        Ok(fallocate(&self.file, how, place(offset)?, place(length)?)?)
    }
}

fn place(offset: u64) -> io::Result<i64> {
    i64::try_from(offset).map_err(|_| io::Error::from_raw_os_error(Errno::EINVAL as i32))
}

impl fmt::Display for Descriptor {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("image")
    }
}

impl Storage for Descriptor {
    fn mem_align(&self) -> usize {
        self.memory
    }

    fn req_align(&self) -> usize {
        self.place
    }

    fn size(&self) -> io::Result<u64> {
        Ok(self.end.load(Ordering::Relaxed))
    }

    unsafe fn pure_readv(&self, bufv: IoVectorMut<'_>, offset: u64) -> io::Result<()> {
        let mut all = bufv.into_inner();
        let mut rest = all.as_mut_slice();
        let mut at = offset;
        while !rest.is_empty() {
            let count = rest.len().min(MAX_BUFFERS);
            let done = match preadv(&self.file, &mut rest[..count], place(at)?) {
                Ok(0) => {
                    for buffer in rest.iter_mut() {
                        buffer.fill(0);
                    }
                    return Ok(());
                }
                Ok(done) => done,
                Err(Errno::EINTR) => continue,
                Err(errno) => return Err(errno.into()),
            };
            IoSliceMut::advance_slices(&mut rest, done);
            at += done as u64;
        }
        Ok(())
    }

    unsafe fn pure_writev(&self, bufv: IoVector<'_>, offset: u64) -> io::Result<()> {
        let mut all = bufv.into_inner();
        let mut rest = all.as_mut_slice();
        let mut at = offset;
        while !rest.is_empty() {
            let count = rest.len().min(MAX_BUFFERS);
            let done = match pwritev(&self.file, &rest[..count], place(at)?) {
                Ok(0) if rest.iter().all(|buffer| buffer.is_empty()) => break,
                Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
                Ok(done) => done,
                Err(Errno::EINTR) => continue,
                Err(errno) => return Err(errno.into()),
            };
            IoSlice::advance_slices(&mut rest, done);
            at += done as u64;
        }
        self.end.fetch_max(at, Ordering::Relaxed);
        Ok(())
    }

    unsafe fn pure_write_zeroes(&self, offset: u64, length: u64) -> io::Result<()> {
        let range = FallocateFlags::FALLOC_FL_ZERO_RANGE;
        match self.allocate(range, offset, length) {
            Err(error) if error.raw_os_error() == Some(Errno::EOPNOTSUPP as i32) => {
                self.allocate(FallocateFlags::FALLOC_FL_PUNCH_HOLE, offset, length)
            }
            other => other,
        }
    }

    unsafe fn pure_write_allocated_zeroes(&self, offset: u64, length: u64) -> io::Result<()> {
        self.allocate(FallocateFlags::FALLOC_FL_ZERO_RANGE, offset, length)
    }

    unsafe fn pure_discard(&self, offset: u64, length: u64) -> io::Result<()> {
        // A hint: space that stays taken is no fault.
        let _ = self.allocate(FallocateFlags::FALLOC_FL_PUNCH_HOLE, offset, length);
        Ok(())
    }

    fn flush(&self) -> io::Result<()> {
        Ok(())
    }

    fn sync(&self) -> io::Result<()> {
        self.file.sync_data()
    }

    unsafe fn invalidate_cache(&self) -> io::Result<()> {
        Ok(())
    }

    fn get_storage_helper(&self) -> &CommonStorageHelper {
        &self.helper
    }
}
