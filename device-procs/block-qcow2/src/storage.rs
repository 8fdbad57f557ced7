//! Bytes on a descriptor, as `imago` asks for them.
//!
//! **Job.** Positioned reads and writes that do all of their bytes. **Who is not trusted.** The image, whose tables choose every
//! place: one beyond what a file can have is an error, and one beyond the end of the file reads as zeroes, as the format has it. An
//! image whose counts of references give its own header away is not followed: nothing but a header is written where the header is.
//! Beside what that would leave of the image, `imago` 0.2.6 does not come back from a block of counts at offset 0, which its table
//! cannot tell from a missing one: it makes one more, until its stack ends.
//! **Why this way.** `imago`'s own file driver asks the kernel for more than the filter of this process allows. The end of the file is
//! counted here, since nobody else writes it.

#![allow(unsafe_code)] // the trait's I/O methods are declared unsafe

use std::fmt;
use std::fs::File;
use std::io::{self, IoSlice, IoSliceMut};
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
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

/// What an image begins with.
pub(crate) const MAGIC: [u8; 4] = *b"QFI\xfb";

/// The first bytes of `buffers`, as far as a header's magic goes.
fn beginning(buffers: &[IoSlice<'_>]) -> [u8; MAGIC.len()] {
    let mut first = [0; MAGIC.len()];
    let bytes = buffers.iter().flat_map(|buffer| buffer.iter());
    for (to, from) in first.iter_mut().zip(bytes) {
        *to = *from;
    }
    first
}

/// Whether the range has a byte of the magic in it.
const fn is_on_magic(offset: u64, length: u64) -> bool {
    offset < MAGIC.len() as u64 && length > 0
}

fn header_is_lost() -> io::Error {
    io::Error::new(
        io::ErrorKind::InvalidData,
        "the image counts its own header as free; qemu-img check tells more",
    )
}

/// An image's descriptor.
#[derive(Debug)]
pub(crate) struct Descriptor {
    file: Arc<File>,
    end: AtomicU64,
    /// Multiples that memory and places must be of: 1 through the page cache.
    memory: usize,
    place: usize,
    helper: CommonStorageHelper,
}

impl Descriptor {
    /// `direct`: it is open with `O_DIRECT`.
    pub(crate) fn new(fd: OwnedFd, direct: bool) -> Result<Self, Errno> {
        let file = Arc::new(File::from(fd));
        let (memory, place) = if direct {
            device_host::direct_io_alignment(file.as_fd()).unwrap_or((4096, 4096))
        } else {
            (1, 1)
        };
        Ok(Self {
            end: end(&file)?.into(),
            file,
            memory,
            place,
            helper: CommonStorageHelper::default(),
        })
    }

    /// Bytes of the file.
    pub(crate) fn end(&self) -> u64 {
        self.end.load(Ordering::Relaxed)
    }

    /// The same image, as it is now.
    pub(crate) fn again(&self) -> Result<Self, Errno> {
        Ok(Self {
            file: self.file.clone(),
            end: end(&self.file)?.into(),
            memory: self.memory,
            place: self.place,
            helper: CommonStorageHelper::default(),
        })
    }

    fn allocate(&self, how: FallocateFlags, offset: u64, length: u64) -> io::Result<()> {
        let how = how | FallocateFlags::FALLOC_FL_KEEP_SIZE;
        Ok(fallocate(&*self.file, how, place(offset)?, place(length)?)?)
    }
}

fn end(file: &File) -> Result<u64, Errno> {
    lseek(file, 0, Whence::SeekEnd).map(|end| u64::try_from(end).unwrap_or(0))
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
            let done = match preadv(&*self.file, &mut rest[..count], place(at)?) {
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
        let length = bufv.len();
        let mut all = bufv.into_inner();
        if is_on_magic(offset, length) && !(offset == 0 && beginning(&all) == MAGIC) {
            return Err(header_is_lost());
        }
        let mut rest = all.as_mut_slice();
        let mut at = offset;
        while !rest.is_empty() {
            let count = rest.len().min(MAX_BUFFERS);
            let done = match pwritev(&*self.file, &rest[..count], place(at)?) {
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
        if is_on_magic(offset, length) {
            return Err(header_is_lost());
        }
        let range = FallocateFlags::FALLOC_FL_ZERO_RANGE;
        match self.allocate(range, offset, length) {
            Err(error) if error.raw_os_error() == Some(Errno::EOPNOTSUPP as i32) => {
                self.allocate(FallocateFlags::FALLOC_FL_PUNCH_HOLE, offset, length)
            }
            other => other,
        }
    }

    unsafe fn pure_write_allocated_zeroes(&self, offset: u64, length: u64) -> io::Result<()> {
        if is_on_magic(offset, length) {
            return Err(header_is_lost());
        }
        self.allocate(FallocateFlags::FALLOC_FL_ZERO_RANGE, offset, length)
    }

    unsafe fn pure_discard(&self, offset: u64, length: u64) -> io::Result<()> {
        // A hint: space that stays taken is no fault.
        if is_on_magic(offset, length) {
            return Ok(());
        }
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

#[cfg(test)]
mod tests {
    use super::*;
    use imago::StorageExt;

    #[test]
    fn nothing_but_a_header_goes_where_the_header_is() {
        let mut content = [0x33; 1024];
        content[..4].copy_from_slice(&MAGIC);
        let file = tempfile::tempfile().unwrap();
        let seen = file.try_clone().unwrap();
        let image = Descriptor::new(file.into(), false).unwrap();
        image.write(&content[..], 0).unwrap();
        for (bytes, at) in [(&[0; 512][..], 0), (&MAGIC[..3], 0), (&MAGIC[..], 3)] {
            let error = image.write(bytes, at).unwrap_err();
            assert_eq!(error.kind(), io::ErrorKind::InvalidData, "{at}: {error}");
        }
        assert!(image.write_zeroes(0, 512).is_err());
        // SAFETY: nobody else uses the file.
        unsafe { image.pure_discard(0, 512) }.unwrap();
        let mut now = [0; 1024];
        std::os::unix::fs::FileExt::read_exact_at(&seen, &mut now, 0).unwrap();
        assert_eq!(now, content);
        image.write(&[0x44; 8][..], 4).unwrap();
        image.write_zeroes(512, 512).unwrap();
        std::os::unix::fs::FileExt::read_exact_at(&seen, &mut now, 0).unwrap();
        assert_eq!((&now[..4], &now[4..12]), (&MAGIC[..], &[0x44; 8][..]));
        assert_eq!(now[512..], [0; 512]);
    }
}
