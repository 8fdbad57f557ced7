//! The shared memory region of a device: files that the front end maps for the driver (virtio 1.3, 2.10).
//!
//! **Job.** Says to the front end what to map where and what to unmap, over the channel that it gave for requests of back ends
//! (vhost-user, `VHOST_USER_BACKEND_SHMEM_MAP` and `_UNMAP`), and waits for its answer.
//! **Who is not trusted.** The front end, as far as that goes: an answer that is none ends the channel. What is mapped where is the
//! driver's wish, which the device has checked.
//! **Why this way.** The library's own type for the channel keeps its descriptor to itself, and a connection that goes on in
//! another process must hand it on. Nothing is kept here of what is mapped: the front end knows, and a process that comes after
//! this one has nothing to find again.

use std::io::{IoSlice, IoSliceMut};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};

use ipc::limits::DAX_UNIT;
use nix::errno::Errno;
use nix::sys::socket::{ControlMessage, MsgFlags, recvmsg, sendmsg};
use thiserror::Error;
use vhost::vhost_user::message::BackendReq;

use crate::record::{Record, Word};

/// Bytes of a message header: request, flags, size, of 32 bits each.
const HEADER: usize = 12;
/// Bytes of `struct VhostUserMMap` (vhost-user, "MMAP request"): id of the region in one byte, seven of padding, then offset in the
/// file, offset in the region, length and flags, of 64 bits each.
const MAP_BYTES: usize = 40;
/// Version 1, and an answer is wanted.
const REQUEST_FLAGS: u32 = 1 | 1 << 3;
/// Version 1, and this is one.
const REPLY_FLAGS: u32 = 1 | 1 << 2;
/// Bytes of an answer: header and a 64-bit number, 0 for success.
const REPLY: usize = HEADER + 8;
/// In the flags of a mapping: it can be written.
const WRITABLE: u64 = 1;

/// In [`Word::Asked`], instead of a request: what a process before this one asked is being found out.
const FINDING_OUT: u64 = u64::MAX;

/// Why the front end did not do it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Error)]
pub enum WindowError {
    /// It said no.
    #[error("the front end refused it")]
    Refused,
    /// It cannot be asked.
    #[error("the channel to the front end is of no use: {0}")]
    Channel(Errno),
}

/// A part of the region, in bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct WindowRange {
    /// Where it begins.
    pub offset: u64,
    /// How long it is.
    pub len: u64,
}

/// Region 0, open for requests.
#[derive(Debug)]
pub struct Window {
    channel: OwnedFd,
    /// Where a process after this one finds whether an answer is owed.
    record: Option<Record>,
}

impl Window {
    pub(crate) fn new(channel: OwnedFd, record: Option<Record>) -> Self {
        Self { channel, record }
    }

    /// As the process before this one left it: an answer that was owed is taken and thrown away. The region has `len` bytes.
    ///
    /// # Errors
    /// The front end has left, or it cannot be known what it still has to say.
    pub(crate) fn resume(channel: OwnedFd, record: Record, len: u64) -> Result<Self, WindowError> {
        let window = Self::new(channel, Some(record));
        let (map, unmap) = (BackendReq::SHMEM_MAP, BackendReq::SHMEM_UNMAP);
        let asked = record.load(Word::Asked);
        // Whether the request was sent is not known. One of the other kind is, whose answer tells where the answers of the last process
        // end: for a place outside of the region, which every front end refuses.
        let (before, probe, file) = match asked {
            0 => return Ok(window),
            _ if asked == map as u64 => (map, unmap, None),
            _ if asked == unmap as u64 => (unmap, map, Some(window.channel.as_fd())),
            _ => return Err(WindowError::Channel(Errno::EINTR)),
        };
        window.note(FINDING_OUT);
        let outside = WindowRange {
            offset: len,
            len: DAX_UNIT,
        };
        window.send(probe, &body(0, outside, 0), file)?;
        let (request, _) = window.answer()?;
        if request == before as u32 && window.answer()?.0 != probe as u32 {
            return Err(WindowError::Channel(Errno::EPROTO));
        }
        window.note(0);
        Ok(window)
    }

    /// For a process that comes after this one.
    pub(crate) const fn channel(&self) -> &OwnedFd {
        &self.channel
    }

    /// Has `file` mapped from `file_offset` on at `at`, where nothing is mapped, or this very range was: it is replaced then.
    ///
    /// # Errors
    /// See [`WindowError`].
    pub fn map(
        &self,
        file: BorrowedFd<'_>,
        file_offset: u64,
        at: WindowRange,
        writable: bool,
    ) -> Result<(), WindowError> {
        let body = body(file_offset, at, if writable { WRITABLE } else { 0 });
        let map = || self.ask(BackendReq::SHMEM_MAP, &body, Some(file));
        match map() {
            // The specification has nothing mapped over a mapping; front ends that go by it want the old one removed first.
            Err(WindowError::Refused) if self.unmap(at).is_ok() => map(),
            other => other,
        }
    }

    /// Has what is mapped at `at` unmapped.
    ///
    /// # Errors
    /// See [`WindowError`].
    pub fn unmap(&self, at: WindowRange) -> Result<(), WindowError> {
        self.ask(BackendReq::SHMEM_UNMAP, &body(0, at, 0), None)
    }

    fn ask(
        &self,
        request: BackendReq,
        body: &[u8; MAP_BYTES],
        file: Option<BorrowedFd<'_>>,
    ) -> Result<(), WindowError> {
        self.note(request as u64);
        self.send(request, body, file)?;
        let (answered, done) = self.answer()?;
        if answered != request as u32 {
            return Err(WindowError::Channel(Errno::EPROTO));
        }
        self.note(0);
        if done {
            Ok(())
        } else {
            Err(WindowError::Refused)
        }
    }

    fn send(
        &self,
        request: BackendReq,
        body: &[u8; MAP_BYTES],
        file: Option<BorrowedFd<'_>>,
    ) -> Result<(), WindowError> {
        let mut message = [0; HEADER + MAP_BYTES];
        let words = [request as u32, REQUEST_FLAGS, MAP_BYTES as u32];
        for (to, word) in message.chunks_exact_mut(4).zip(words) {
            to.copy_from_slice(&word.to_ne_bytes());
        }
        message[HEADER..].copy_from_slice(body);
        let fds = file.map(|file| [file.as_raw_fd()]);
        let rights = fds.as_ref().map(|fds| [ControlMessage::ScmRights(fds)]);
        let control = rights.as_ref().map_or(&[][..], |rights| &rights[..]);
        let sent = loop {
            match sendmsg::<()>(
                self.channel.as_raw_fd(),
                &[IoSlice::new(&message)],
                control,
                MsgFlags::MSG_NOSIGNAL,
                None,
            ) {
                Err(Errno::EINTR) => {}
                other => break other.map_err(WindowError::Channel)?,
            }
        };
        // A stream takes a message of this size as a whole unless it is closed.
        if sent != message.len() {
            return Err(WindowError::Channel(Errno::EPIPE));
        }
        Ok(())
    }

    /// Waits for an answer: which request it is for, and whether it is a yes.
    fn answer(&self) -> Result<(u32, bool), WindowError> {
        let mut reply = [0; REPLY];
        let mut have = 0;
        while have < REPLY {
            let mut parts = [IoSliceMut::new(&mut reply[have..])];
            match recvmsg::<()>(
                self.channel.as_raw_fd(),
                &mut parts,
                None,
                MsgFlags::MSG_CMSG_CLOEXEC,
            ) {
                Err(Errno::EINTR) => {}
                Err(errno) => return Err(WindowError::Channel(errno)),
                Ok(message) if message.bytes == 0 => {
                    return Err(WindowError::Channel(Errno::ECONNRESET));
                }
                Ok(message) => have += message.bytes,
            }
        }
        let word = |at: usize| {
            let mut word = [0; 4];
            word.copy_from_slice(&reply[at..at + 4]);
            u32::from_ne_bytes(word)
        };
        let wanted = 1 << 3;
        if word(4) & !wanted != REPLY_FLAGS || word(8) != 8 {
            return Err(WindowError::Channel(Errno::EPROTO));
        }
        Ok((word(0), reply[HEADER..] == [0; 8]))
    }

    fn note(&self, asked: u64) {
        if let Some(record) = self.record {
            record.store(Word::Asked, asked);
        }
    }
}

fn body(file_offset: u64, at: WindowRange, flags: u64) -> [u8; MAP_BYTES] {
    let mut body = [0; MAP_BYTES];
    // Region 0 and padding come first.
    let words = [0, file_offset, at.offset, at.len, flags];
    for (to, word) in body.chunks_exact_mut(8).zip(words) {
        to.copy_from_slice(&word.to_ne_bytes());
    }
    body
}
