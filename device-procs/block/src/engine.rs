//! How bytes move between guest memory and the image.
//!
//! **Job.** Reads, writes, flushes and zeroed ranges that either do all of their bytes or fail; several at once if the host has
//! io_uring, otherwise one after the other.
//! **Who is not trusted.** The image may shrink under us, and the host's disk may fail: both are an error status for the guest.
//! **Why this way.** Guest memory itself is what the kernel reads and writes, no copy. What can be done without waiting is done
//! at once: a write to the page cache is a copy, and handing it to a worker of the kernel costs more than the copy; those that follow
//! each other in the image are one ([`Run`]). When such a write did wait, for the disk, the next ones go to the workers, so that
//! the other queues are served. With `O_DIRECT`,
//! buffers or places that the file system does not take go through one bounce buffer piece by piece; a piece that covers its
//! first or last block in part reads that block first, and nothing else may be on its way to the disk meanwhile.

use std::collections::VecDeque;
use std::fmt::Debug;
use std::io::{IoSlice, IoSliceMut};
use std::os::fd::{AsFd, BorrowedFd};
use std::time::{Duration, Instant};

use device_host::{BounceBuffer, FileIo, GuestBuffers, Range};
use nix::errno::Errno;
use nix::fcntl::{FallocateFlags, fallocate};
use nix::sys::uio::{preadv, pwritev};

use crate::backend::raw::{Alignment, RawImage};
use crate::formatted::Engine;
use crate::request::Extent;
use crate::run::Run;

/// Bytes of the bounce buffer: a multiple of every alignment in use, small enough to stay in a cache.
const BOUNCE: usize = 64 * 1024;
/// Requests that a disk without a page cache in front of it is given at once, while more are read from the rings: of one large batch it
/// has nothing to do until the last one is in, and then this process has nothing until the disk is done.
const BATCH: usize = 8;
/// A write that took longer has waited for the disk.
const SLOW: Duration = Duration::from_micros(500);
/// Writes after a slow one that are left to the kernel's workers.
const CAREFUL: u32 = 64;
/// What is written where zeroes have to be written.
static ZEROES: [u8; 4096] = [0; 4096];

/// A raw image with its way of I/O. A request that cannot be finished at once has a `T` to remember.
#[derive(Debug)]
pub(crate) struct RawEngine<T> {
    // Before the image, which it knows by number only, so that it is dropped first.
    io: Option<FileIo<T>>,
    image: RawImage,
    /// Finished while nobody asked.
    done: VecDeque<(T, Result<(), Errno>)>,
    /// There if the image is open with `O_DIRECT`. Its pages are touched when it is first needed.
    bounce: Option<(Alignment, BounceBuffer)>,
    /// Writes that are not to be tried at once.
    careful: u32,
    /// Writes to the page cache that the next one may follow.
    run: Run<T>,
    /// Writes that were held back and are done.
    written: VecDeque<(T, Result<(), Errno>)>,
}

/// What became of a request that was started.
pub(crate) enum Started<T> {
    /// It is done, and here is what was to be remembered.
    Done(T, Result<(), Errno>),
    /// [`Engine::finished`] will give it.
    InFlight,
}

impl<T: Debug> RawEngine<T> {
    /// Without `io`, one request after the other.
    pub(crate) fn new(image: RawImage, io: Option<FileIo<T>>) -> Self {
        let bounce = image.direct.map(|alignment| {
            let align = alignment.memory.max(alignment.offset);
            (alignment, BounceBuffer::new(BOUNCE.max(2 * align), align))
        });
        let io = match bounce {
            Some(_) => io.map(|io| io.in_batches_of(BATCH)),
            None => io,
        };
        Self {
            image,
            io,
            done: VecDeque::new(),
            bounce,
            careful: 0,
            run: Run::default(),
            written: VecDeque::new(),
        }
    }

    fn zero_now(&self, extent: Extent, kind: Range) -> Result<(), Errno> {
        let how = match kind {
            Range::Punch => FallocateFlags::FALLOC_FL_PUNCH_HOLE,
            Range::Zero => FallocateFlags::FALLOC_FL_ZERO_RANGE,
        };
        let how = how | FallocateFlags::FALLOC_FL_KEEP_SIZE;
        fallocate(&self.image.fd, how, place(extent.at)?, place(extent.len)?)
    }

    fn fits(&self, buffers: &GuestBuffers<'_>, offset: u64) -> bool {
        self.bounce
            .as_ref()
            .is_none_or(|(alignment, _)| fits(buffers, offset, *alignment))
    }

    fn read_now(&mut self, mut buffers: GuestBuffers<'_>, mut offset: u64) -> Result<(), Errno> {
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

    fn write_now(&mut self, mut buffers: GuestBuffers<'_>, mut offset: u64) -> Result<(), Errno> {
        if self.bounce.is_some() {
            // Blocks that are read to be written back must not change in between.
            self.settle()?;
        }
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

    /// Does something that may wait for the disk, and remembers if it did.
    fn watched<R>(&mut self, does: impl FnOnce(&mut Self) -> R) -> R {
        let start = Instant::now();
        let result = does(self);
        if start.elapsed() > SLOW {
            self.careful = CAREFUL;
        }
        result
    }
}

/// Writes all of `buffers` from `offset` on, where nothing has to be aligned.
pub(crate) fn write_whole(
    file: BorrowedFd<'_>,
    mut buffers: GuestBuffers<'_>,
    mut offset: u64,
) -> Result<(), Errno> {
    while !buffers.is_empty() {
        let done = buffers.send_to_file(file, place(offset)?)?;
        buffers.skip(done);
        offset = advance(offset, done)?;
    }
    Ok(())
}

impl<T: Debug> Engine<T> for RawEngine<T> {
    fn size(&self) -> u64 {
        self.image.size
    }

    fn event(&self) -> Option<BorrowedFd<'_>> {
        self.io.as_ref().map(AsFd::as_fd)
    }

    fn has_room(&mut self) -> bool {
        self.io.as_mut().is_none_or(|io| io.room().is_some())
    }

    fn submit(&mut self) -> Result<(), Errno> {
        self.io.as_mut().map_or(Ok(()), FileIo::submit)
    }

    fn is_ready(&mut self) -> bool {
        !self.done.is_empty() || self.io.as_mut().is_some_and(FileIo::is_ready)
    }

    fn finished(&mut self) -> Option<(T, Result<(), Errno>)> {
        self.done
            .pop_front()
            .or_else(|| self.io.as_mut().and_then(FileIo::finished))
    }

    fn settle(&mut self) -> Result<(), Errno> {
        if let Some(io) = &mut self.io {
            while io.in_flight() > 0 {
                io.wait()?;
                while let Some(one) = io.finished() {
                    self.done.push_back(one);
                }
            }
        }
        Ok(())
    }

    fn write_held(&mut self) {
        if !self.run.is_empty() {
            self.watched(|engine| {
                engine
                    .run
                    .write(engine.image.fd.as_fd(), &mut engine.written);
            });
        }
    }

    fn written(&mut self) -> Option<(T, Result<(), Errno>)> {
        self.written.pop_front()
    }

    fn read(&mut self, buffers: GuestBuffers<'_>, offset: u64, then: T) -> Started<T> {
        if !buffers.is_empty()
            && self.fits(&buffers, offset)
            && let Some(room) = self.io.as_mut().and_then(FileIo::room)
        {
            room.read(&buffers, offset, then);
            return Started::InFlight;
        }
        self.write_held();
        Started::Done(then, self.read_now(buffers, offset))
    }

    fn write(
        &mut self,
        buffers: GuestBuffers<'_>,
        offset: u64,
        durable: bool,
        then: T,
    ) -> Started<T> {
        let cached = self.bounce.is_none() && !durable && self.careful == 0 && self.io.is_some();
        let mut then = then;
        if cached && self.run.goes_on(offset, buffers.len()) {
            match self.run.hold(&buffers, then) {
                Ok(()) => return Started::InFlight,
                Err(back) => then = back,
            }
            self.write_held();
            // There is room now.
            match self.run.hold(&buffers, then) {
                Ok(()) => return Started::InFlight,
                Err(back) => then = back,
            }
        }
        self.write_held();
        if !buffers.is_empty()
            && !cached
            && self.fits(&buffers, offset)
            && let Some(room) = self.io.as_mut().and_then(FileIo::room)
        {
            self.careful = self.careful.saturating_sub(1);
            room.write(&buffers, offset, durable, then);
            return Started::InFlight;
        }
        let mut result = if cached {
            self.run.begin(offset + buffers.len() as u64);
            self.watched(|engine| engine.write_now(buffers, offset))
        } else {
            self.write_now(buffers, offset)
        };
        if durable {
            result = result.and_then(|()| self.flush_now());
        }
        Started::Done(then, result)
    }

    fn flush(&mut self, then: T) -> Started<T> {
        self.write_held();
        if let Some(room) = self.io.as_mut().and_then(FileIo::room) {
            room.sync(then);
            return Started::InFlight;
        }
        Started::Done(then, self.flush_now())
    }

    fn zero(&mut self, extent: Extent, then: T) -> Started<T> {
        self.write_held();
        // A block device takes whole blocks of its own only.
        let (blocks, ends) = extent.split(self.image.zero_unit);
        for end in ends.into_iter().flatten() {
            if let Err(errno) = self.write_zeroes(end) {
                return Started::Done(then, Err(errno));
            }
        }
        let Some(extent) = blocks else {
            return Started::Done(then, Ok(()));
        };
        let kind = if extent.unmap {
            Range::Punch
        } else {
            Range::Zero
        };
        if let Some(room) = self.io.as_mut().and_then(FileIo::room) {
            room.range(kind, extent.at, extent.len, then);
            return Started::InFlight;
        }
        Started::Done(then, self.zero_now(extent, kind))
    }

    fn zero_otherwise(&mut self, extent: Extent) -> Result<(), Errno> {
        let other = if extent.unmap {
            Range::Zero
        } else {
            Range::Punch
        };
        // The ends are written already.
        let (blocks, _) = extent.split(self.image.zero_unit);
        blocks.map_or(Ok(()), |blocks| self.zero_now(blocks, other))
    }

    fn write_zeroes(&mut self, extent: Extent) -> Result<(), Errno> {
        if self.bounce.is_some() {
            // As for any write that may read a block to write it back.
            self.settle()?;
        }
        let (mut at, end) = (extent.at, extent.at + extent.len);
        while at < end {
            let left = usize::try_from(end - at).map_err(|_| Errno::EINVAL)?;
            let done = match &mut self.bounce {
                Some((alignment, bounce)) => {
                    let window = Window::new(at, left, bounce.bytes().len(), *alignment);
                    if window.is_partial() {
                        window.load(&self.image, bounce.bytes())?;
                    }
                    window.wanted(bounce.bytes()).fill(0);
                    window.store(&self.image, bounce.bytes())?;
                    window.wanted
                }
                None => {
                    let piece = IoSlice::new(&ZEROES[..left.min(ZEROES.len())]);
                    match pwritev(&self.image.fd, &[piece], place(at)?) {
                        Err(Errno::EINTR) => continue,
                        other => other?,
                    }
                }
            };
            at = advance(at, done)?;
        }
        Ok(())
    }

    fn flush_now(&mut self) -> Result<(), Errno> {
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
            let mut rest = [IoSliceMut::new(&mut bounce[done..self.len])];
            match preadv(&image.fd, &mut rest, at) {
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
            match pwritev(&image.fd, &[IoSlice::new(&bounce[done..self.len])], at) {
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
