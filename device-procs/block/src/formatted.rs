//! A disk is a raw image or one in a format of its own, and this is where they part.
//!
//! **Job.** [`Engine`] is what the device knows: the raw engine, or [`Format`] behind a buffer. **Who is not trusted.** The
//! image, which the format looks at; requests were checked against its size. **Why this way.** A format is a trait object that another
//! program brings along: the program for raw images has no code for any, and pays one branch.

use std::fmt::Debug;
use std::os::fd::BorrowedFd;

use device_host::{BounceBuffer, GuestBuffers};
use nix::errno::Errno;

use crate::engine::{RawEngine, Started};
use crate::request::Extent;

/// Bytes that are read or written at once.
const PIECE: usize = 256 * 1024;
/// The strictest alignment of `O_DIRECT` in use.
const ALIGN: usize = 4096;

/// An image in a format of its own. All ranges are inside of [`size`](Self::size).
pub trait Format: Debug {
    /// Bytes of the disk.
    fn size(&self) -> u64;

    /// Fills all of `data`.
    ///
    /// # Errors
    /// The file, or what is in it.
    fn read(&mut self, data: &mut [u8], at: u64) -> Result<(), Errno>;

    /// Writes all of `data`.
    ///
    /// # Errors
    /// The file, or what is in it.
    fn write(&mut self, data: &[u8], at: u64) -> Result<(), Errno>;

    /// Makes a range read as zeroes; with `unmap` its space may be freed.
    ///
    /// # Errors
    /// `EOPNOTSUPP` if the format cannot do it in this way.
    fn zero(&mut self, at: u64, len: u64, unmap: bool) -> Result<(), Errno>;

    /// Everything that was written is in the file, so that it outlives this process.
    ///
    /// # Errors
    /// The file, or what is in it.
    fn commit(&mut self) -> Result<(), Errno>;

    /// Everything that was written is on the disk.
    ///
    /// # Errors
    /// The file, or what is in it.
    fn flush(&mut self) -> Result<(), Errno>;
}

/// How bytes move between guest memory and the image.
#[derive(Debug)]
#[allow(clippy::large_enum_variant)] // there is one in a process, and the raw one is to be where the device is
pub(crate) enum Engine<T> {
    Raw(RawEngine<T>),
    Formatted(Formatted),
}

/// A format with its buffer: one request after the other.
#[derive(Debug)]
pub(crate) struct Formatted {
    format: Box<dyn Format>,
    buffer: BounceBuffer,
}

impl Formatted {
    pub(crate) fn new(format: Box<dyn Format>) -> Self {
        Self {
            format,
            buffer: BounceBuffer::new(PIECE, ALIGN),
        }
    }

    fn read(&mut self, mut buffers: GuestBuffers<'_>, mut at: u64) -> Result<(), Errno> {
        while !buffers.is_empty() {
            let len = buffers.len().min(PIECE);
            let piece = &mut self.buffer.bytes()[..len];
            self.format.read(piece, at)?;
            buffers.write(piece);
            at += len as u64;
        }
        Ok(())
    }

    fn write(&mut self, mut buffers: GuestBuffers<'_>, mut at: u64) -> Result<(), Errno> {
        while !buffers.is_empty() {
            let len = buffers.len().min(PIECE);
            let piece = &mut self.buffer.bytes()[..len];
            buffers.read(piece);
            self.format.write(piece, at)?;
            at += len as u64;
        }
        // The guest is told that it is written: the death of this process must not undo it.
        self.format.commit()
    }

    fn zero(&mut self, extent: Extent, unmap: bool) -> Result<(), Errno> {
        self.format.zero(extent.at, extent.len, unmap)?;
        self.format.commit()
    }
}

impl<T> Engine<T> {
    /// Bytes that requests may reach.
    pub(crate) fn size(&self) -> u64 {
        match self {
            Self::Raw(raw) => raw.size(),
            Self::Formatted(formatted) => formatted.format.size(),
        }
    }

    /// Readable when something is finished; none if everything is done at once.
    pub(crate) fn event(&self) -> Option<BorrowedFd<'_>> {
        match self {
            Self::Raw(raw) => raw.event(),
            Self::Formatted(_) => None,
        }
    }

    /// Whether one more request can be started.
    pub(crate) fn has_room(&mut self) -> bool {
        match self {
            Self::Raw(raw) => raw.has_room(),
            Self::Formatted(_) => true,
        }
    }

    /// Tells the kernel of everything that was started.
    pub(crate) fn submit(&mut self) -> Result<(), Errno> {
        match self {
            Self::Raw(raw) => raw.submit(),
            Self::Formatted(_) => Ok(()),
        }
    }

    /// Whether [`finished`](Self::finished) may have something, without a system call.
    pub(crate) fn is_ready(&mut self) -> bool {
        match self {
            Self::Raw(raw) => raw.is_ready(),
            Self::Formatted(_) => false,
        }
    }

    /// A request that is done.
    pub(crate) fn finished(&mut self) -> Option<(T, Result<(), Errno>)> {
        match self {
            Self::Raw(raw) => raw.finished(),
            Self::Formatted(_) => None,
        }
    }

    /// Waits until everything that was started is finished.
    pub(crate) fn settle(&mut self) -> Result<(), Errno> {
        match self {
            Self::Raw(raw) => raw.settle(),
            Self::Formatted(_) => Ok(()),
        }
    }

    /// Fills all of `buffers` from `offset` on. The caller has checked the range.
    pub(crate) fn read(&mut self, buffers: GuestBuffers<'_>, offset: u64, then: T) -> Started<T> {
        match self {
            Self::Raw(raw) => raw.read(buffers, offset, then),
            Self::Formatted(formatted) => Started::Done(then, formatted.read(buffers, offset)),
        }
    }

    /// Writes all of `buffers` from `offset` on; `durable`: they are on the disk when it is done. The caller has checked the
    /// range.
    pub(crate) fn write(
        &mut self,
        buffers: GuestBuffers<'_>,
        offset: u64,
        durable: bool,
        then: T,
    ) -> Started<T> {
        match self {
            Self::Raw(raw) => raw.write(buffers, offset, durable, then),
            Self::Formatted(formatted) => {
                let mut result = formatted.write(buffers, offset);
                if durable {
                    result = result.and_then(|()| formatted.format.flush());
                }
                Started::Done(then, result)
            }
        }
    }

    /// Makes all completed writes durable.
    pub(crate) fn flush(&mut self, then: T) -> Started<T> {
        match self {
            Self::Raw(raw) => raw.flush(then),
            Self::Formatted(formatted) => Started::Done(then, formatted.format.flush()),
        }
    }

    /// The same, and waits for it.
    pub(crate) fn flush_now(&mut self) -> Result<(), Errno> {
        match self {
            Self::Raw(raw) => raw.flush_now(),
            Self::Formatted(formatted) => formatted.format.flush(),
        }
    }

    /// Makes a range read as zeroes. The caller has checked it.
    pub(crate) fn zero(&mut self, extent: Extent, then: T) -> Started<T> {
        match self {
            Self::Raw(raw) => raw.zero(extent, then),
            Self::Formatted(formatted) => Started::Done(then, formatted.zero(extent, extent.unmap)),
        }
    }

    /// What the image does not have, it may have in another way: the range reads as zeroes all the same.
    pub(crate) fn zero_otherwise(&mut self, extent: Extent) -> Result<(), Errno> {
        match self {
            Self::Raw(raw) => raw.zero_otherwise(extent),
            Self::Formatted(formatted) => formatted.zero(extent, !extent.unmap),
        }
    }
}
