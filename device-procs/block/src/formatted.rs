//! A disk is a raw image or one in a format of its own, and this is where they part.
//!
//! **Job.** [`Engine`] is what the device knows: the raw one, or a [`Format`] behind a buffer. **Who is not trusted.** The
//! image, which the format looks at; requests were checked against its size. **Why this way.** A format is a trait object that another
//! program brings along: the program for raw images has no code for any, and pays a call by pointer.

use std::fmt::Debug;
use std::os::fd::BorrowedFd;

use device_host::{BounceBuffer, GuestBuffers};
use ipc::disk::{Answer, Order};
use nix::errno::Errno;

use crate::engine::Started;
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

    /// Makes the disk longer, durably.
    ///
    /// # Errors
    /// `EPERM` if that is further than it may grow, `ENOMEM` if its tables would take more memory than the process may have; the file.
    fn grow(&mut self, size: u64) -> Result<(), Errno>;

    /// Does what the control process wants of the image, between two requests.
    ///
    /// # Errors
    /// `EOPNOTSUPP` if the format has nothing like that; the file, or what is in it.
    fn order(&mut self, order: &Order) -> Result<Answer, Errno>;

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

/// How bytes move between guest memory and the image. Each of the calls that start a request is done when it returns, or
/// [`finished`](Self::finished) gives `then` back later; what only the latter kind needs has an answer here for the others.
pub(crate) trait Engine<T>: Debug {
    /// Bytes that requests may reach.
    fn size(&self) -> u64;

    /// Fills all of `buffers` from `offset` on. The caller has checked the range.
    fn read(&mut self, buffers: GuestBuffers<'_>, offset: u64, then: T) -> Started<T>;

    /// Writes all of `buffers` from `offset` on; `durable`: they are on the disk when it is done. The caller has checked the
    /// range.
    fn write(
        &mut self,
        buffers: GuestBuffers<'_>,
        offset: u64,
        durable: bool,
        then: T,
    ) -> Started<T>;

    /// Makes all completed writes durable.
    fn flush(&mut self, then: T) -> Started<T>;

    /// The same, and waits for it.
    fn flush_now(&mut self) -> Result<(), Errno>;

    /// Makes a range read as zeroes. The caller has checked it.
    fn zero(&mut self, extent: Extent, then: T) -> Started<T>;

    /// What the image does not have, it may have in another way: the range reads as zeroes all the same.
    fn zero_otherwise(&mut self, extent: Extent) -> Result<(), Errno>;

    /// Writes zeroes, which every image can take. The caller has checked the range.
    fn write_zeroes(&mut self, extent: Extent) -> Result<(), Errno>;

    /// Makes the disk longer. Who has a raw image longer starts another process.
    fn grow(&mut self, _size: u64) -> Result<(), Errno> {
        Err(Errno::EPERM)
    }

    /// Does what the control process wants of the image. A raw one has nothing to offer.
    fn order(&mut self, _order: &Order) -> Result<Answer, Errno> {
        Err(Errno::EOPNOTSUPP)
    }

    /// Readable when something is finished; none if everything is done at once.
    fn event(&self) -> Option<BorrowedFd<'_>> {
        None
    }

    /// Whether one more request can be started.
    fn has_room(&mut self) -> bool {
        true
    }

    /// Does the writes that were held back, since there are no more at the moment.
    fn write_held(&mut self) {}

    /// A write of the queue whose turn it is that was held back and is done by now. All are asked for before that turn ends.
    fn written(&mut self) -> Option<(T, Result<(), Errno>)> {
        None
    }

    /// Tells the kernel of everything that was started.
    fn submit(&mut self) -> Result<(), Errno> {
        Ok(())
    }

    /// Whether [`finished`](Self::finished) may have something, without a system call.
    fn is_ready(&mut self) -> bool {
        false
    }

    /// A request that is done.
    fn finished(&mut self) -> Option<(T, Result<(), Errno>)> {
        None
    }

    /// Waits until everything that was started is finished.
    fn settle(&mut self) -> Result<(), Errno> {
        Ok(())
    }
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

    fn fill(&mut self, mut buffers: GuestBuffers<'_>, mut at: u64) -> Result<(), Errno> {
        while !buffers.is_empty() {
            let len = buffers.len().min(PIECE);
            let piece = &mut self.buffer.bytes()[..len];
            self.format.read(piece, at)?;
            buffers.write(piece);
            at += len as u64;
        }
        Ok(())
    }

    fn store(&mut self, mut buffers: GuestBuffers<'_>, mut at: u64) -> Result<(), Errno> {
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

    fn clear(&mut self, extent: Extent, unmap: bool) -> Result<(), Errno> {
        self.format.zero(extent.at, extent.len, unmap)?;
        self.format.commit()
    }
}

impl<T> Engine<T> for Formatted {
    fn size(&self) -> u64 {
        self.format.size()
    }

    fn grow(&mut self, size: u64) -> Result<(), Errno> {
        self.format.grow(size)
    }

    fn order(&mut self, order: &Order) -> Result<Answer, Errno> {
        self.format.order(order)
    }

    fn read(&mut self, buffers: GuestBuffers<'_>, offset: u64, then: T) -> Started<T> {
        Started::Done(then, self.fill(buffers, offset))
    }

    fn write(
        &mut self,
        buffers: GuestBuffers<'_>,
        offset: u64,
        durable: bool,
        then: T,
    ) -> Started<T> {
        let mut result = self.store(buffers, offset);
        if durable {
            result = result.and_then(|()| self.format.flush());
        }
        Started::Done(then, result)
    }

    fn flush(&mut self, then: T) -> Started<T> {
        Started::Done(then, self.format.flush())
    }

    fn flush_now(&mut self) -> Result<(), Errno> {
        self.format.flush()
    }

    fn zero(&mut self, extent: Extent, then: T) -> Started<T> {
        Started::Done(then, self.clear(extent, extent.unmap))
    }

    fn zero_otherwise(&mut self, extent: Extent) -> Result<(), Errno> {
        self.clear(extent, !extent.unmap)
    }

    fn write_zeroes(&mut self, extent: Extent) -> Result<(), Errno> {
        let mut done = 0;
        while done < extent.len {
            // At most a piece.
            let len = (extent.len - done).min(PIECE as u64) as usize;
            let piece = &mut self.buffer.bytes()[..len];
            piece.fill(0);
            self.format.write(piece, extent.at + done)?;
            done += len as u64;
        }
        self.format.commit()
    }
}
