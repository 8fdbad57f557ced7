//! How bytes move between guest memory and the image.
//!
//! **Job.** Reads, writes and flushes that either do all of their bytes or fail.
//! **Who is not trusted.** The image may shrink under us, and the host's disk may fail: both are an error status for the guest.
//! **Why this way.** One request at a time with `preadv` and `pwritev` on guest memory itself, no copy. With `O_DIRECT`, buffers
//! or places that the file system does not take go through one bounce buffer piece by piece; a piece that covers its first
//! or last block in part reads that block first. This module is all that an asynchronous engine has to replace.

use std::os::fd::AsFd;

use device_host::{BounceBuffer, GuestBuffers};
use nix::errno::Errno;
use nix::sys::uio::{pread, pwrite};

use crate::backend::raw::{Alignment, RawImage};

/// Bytes of the bounce buffer: a multiple of every alignment in use, small enough to stay in a cache.
const BOUNCE: usize = 64 * 1024;

/// An image with its way of I/O.
#[derive(Debug)]
pub(crate) struct Engine {
    image: RawImage,
    /// There if the image is open with `O_DIRECT`. Its pages are touched when it is first needed.
    bounce: Option<(Alignment, BounceBuffer)>,
}

impl Engine {
    pub(crate) fn new(image: RawImage) -> Self {
        let bounce = image.direct.map(|alignment| {
            let align = alignment.memory.max(alignment.offset);
            (alignment, BounceBuffer::new(BOUNCE.max(2 * align), align))
        });
        Self { image, bounce }
    }

    /// Bytes that requests may reach.
    pub(crate) fn size(&self) -> u64 {
        self.image.size
    }

    /// Fills all of `buffers` from `offset` on. The caller has checked the range.
    pub(crate) fn read(
        &mut self,
        mut buffers: GuestBuffers<'_>,
        mut offset: u64,
    ) -> Result<(), Errno> {
        while !buffers.is_empty() {
            let done = match &mut self.bounce {
                Some((alignment, bounce)) if !fits(&buffers, offset, *alignment) => {
                    let window =
                        Window::new(offset, buffers.len(), bounce.bytes().len(), *alignment);
                    window.load(&self.image, bounce.bytes())?;
                    buffers.write(window.wanted(bounce.bytes()))
                }
                _ => {
                    let done = buffers.fill_from_file(self.image.fd.as_fd(), place(offset)?)?;
                    buffers.skip(done)
                }
            };
            offset = advance(offset, done)?;
        }
        Ok(())
    }

    /// Writes all of `buffers` from `offset` on. The caller has checked the range.
    pub(crate) fn write(
        &mut self,
        mut buffers: GuestBuffers<'_>,
        mut offset: u64,
    ) -> Result<(), Errno> {
        while !buffers.is_empty() {
            let done = match &mut self.bounce {
                Some((alignment, bounce)) if !fits(&buffers, offset, *alignment) => {
                    let window =
                        Window::new(offset, buffers.len(), bounce.bytes().len(), *alignment);
                    if window.is_partial() {
                        window.load(&self.image, bounce.bytes())?;
                    }
                    let done = buffers.read(window.wanted(bounce.bytes()));
                    window.store(&self.image, bounce.bytes())?;
                    done
                }
                _ => {
                    let done = buffers.send_to_file(self.image.fd.as_fd(), place(offset)?)?;
                    buffers.skip(done)
                }
            };
            offset = advance(offset, done)?;
        }
        Ok(())
    }

    /// Makes all completed writes durable.
    pub(crate) fn flush(&self) -> Result<(), Errno> {
        nix::unistd::fdatasync(&self.image.fd)
    }
}

fn fits(buffers: &GuestBuffers<'_>, offset: u64, alignment: Alignment) -> bool {
    offset.is_multiple_of(alignment.offset as u64)
        && buffers.is_aligned(alignment.memory, alignment.offset)
}

fn place(offset: u64) -> Result<i64, Errno> {
    i64::try_from(offset).map_err(|_| Errno::EINVAL)
}

/// No progress means that the image ends before its size at start.
fn advance(offset: u64, done: usize) -> Result<u64, Errno> {
    if done == 0 {
        return Err(Errno::EIO);
    }
    offset.checked_add(done as u64).ok_or(Errno::EINVAL)
}

/// The aligned part of the image around the next piece of a request.
#[derive(Debug, PartialEq, Eq)]
struct Window {
    /// Place in the image, aligned.
    start: u64,
    /// Bytes, aligned, at most the bounce buffer's.
    len: usize,
    /// Where the piece is in the window.
    skip: usize,
    /// Bytes of the piece.
    wanted: usize,
}

impl Window {
    fn new(offset: u64, len: usize, room: usize, alignment: Alignment) -> Self {
        let align = alignment.offset as u64;
        let start = offset - offset % align;
        // Less than the alignment.
        let skip = (offset - start) as usize;
        let room = room - room % alignment.offset;
        let wanted = len.min(room - skip);
        Self {
            start,
            len: (skip + wanted).next_multiple_of(alignment.offset),
            skip,
            wanted,
        }
    }

    fn is_partial(&self) -> bool {
        self.wanted != self.len
    }

    fn wanted<'b>(&self, bounce: &'b mut [u8]) -> &'b mut [u8] {
        &mut bounce[self.skip..self.skip + self.wanted]
    }

    fn load(&self, image: &RawImage, bounce: &mut [u8]) -> Result<(), Errno> {
        let mut done = 0;
        while done < self.len {
            let at = place(self.start + done as u64)?;
            match pread(&image.fd, &mut bounce[done..self.len], at) {
                Ok(0) => return Err(Errno::EIO),
                Ok(n) => done += n,
                Err(Errno::EINTR) => {}
                Err(errno) => return Err(errno),
            }
        }
        Ok(())
    }

    fn store(&self, image: &RawImage, bounce: &mut [u8]) -> Result<(), Errno> {
        let mut done = 0;
        while done < self.len {
            let at = place(self.start + done as u64)?;
            match pwrite(&image.fd, &bounce[done..self.len], at) {
                Ok(0) => return Err(Errno::EIO),
                Ok(n) => done += n,
                Err(Errno::EINTR) => {}
                Err(errno) => return Err(errno),
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn windows_are_aligned_and_cover_the_piece() {
        let alignment = Alignment {
            memory: 512,
            offset: 4096,
        };
        let at = |offset, len| Window::new(offset, len, BOUNCE, alignment);
        let window = |start, len, skip, wanted| Window {
            start,
            len,
            skip,
            wanted,
        };
        assert_eq!(at(0, 4096), window(0, 4096, 0, 4096));
        assert_eq!(at(512, 512), window(0, 4096, 512, 512));
        assert_eq!(at(7680, 1024), window(4096, 8192, 3584, 1024));
        assert_eq!(at(512, 1 << 20), window(0, BOUNCE, 512, BOUNCE - 512));
        assert!(!at(4096, 8192).is_partial());
        assert!(at(4096, 8191).is_partial());
    }
}
