//! # vhost-user messages, byte by byte
//!
//! **Job.** Frames messages as the protocol's text says ("Message Specification"), well-formed or not, and carries them with
//! descriptors. **Who is not trusted.** Nobody: this is what hostile peers of the suites are made of.
//! **Why this way.** The product and `vhost`'s library could share a misreading; this shares nothing with either.
#![allow(unsafe_code)] // descriptors arrive as numbers

use crate::wait::{Deadline, readable};
use nix::errno::Errno;
use nix::sys::socket::{ControlMessage, ControlMessageOwned, MsgFlags, recvmsg, sendmsg};
use std::io::{self, IoSlice, IoSliceMut};
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::net::UnixStream;

/// Bytes of a header.
pub const HEADER: usize = 12;
/// Flags of a request: version 1.
pub const VERSION: u32 = 1;
/// Flag of a reply.
pub const REPLY: u32 = 1 << 2;
/// Flag of a request that wants an acknowledgement.
pub const NEED_REPLY: u32 = 1 << 3;

/// Numbers of requests.
#[allow(missing_docs)] // the names are the protocol's own
pub mod request {
    pub const GET_FEATURES: u32 = 1;
    pub const SET_FEATURES: u32 = 2;
    pub const SET_OWNER: u32 = 3;
    pub const RESET_OWNER: u32 = 4;
    pub const SET_MEM_TABLE: u32 = 5;
    pub const SET_LOG_BASE: u32 = 6;
    pub const SET_LOG_FD: u32 = 7;
    pub const SET_VRING_NUM: u32 = 8;
    pub const SET_VRING_ADDR: u32 = 9;
    pub const SET_VRING_BASE: u32 = 10;
    pub const GET_VRING_BASE: u32 = 11;
    pub const SET_VRING_KICK: u32 = 12;
    pub const SET_VRING_CALL: u32 = 13;
    pub const SET_VRING_ERR: u32 = 14;
    pub const GET_PROTOCOL_FEATURES: u32 = 15;
    pub const SET_PROTOCOL_FEATURES: u32 = 16;
    pub const GET_QUEUE_NUM: u32 = 17;
    pub const SET_VRING_ENABLE: u32 = 18;
    pub const SET_BACKEND_REQ_FD: u32 = 21;
    pub const GET_CONFIG: u32 = 24;
    pub const SET_CONFIG: u32 = 25;
    pub const POSTCOPY_ADVISE: u32 = 28;
    pub const POSTCOPY_LISTEN: u32 = 29;
    pub const GET_INFLIGHT_FD: u32 = 31;
    pub const SET_INFLIGHT_FD: u32 = 32;
    pub const RESET_DEVICE: u32 = 34;
    pub const GET_MAX_MEM_SLOTS: u32 = 36;
    pub const ADD_MEM_REG: u32 = 37;
    pub const REM_MEM_REG: u32 = 38;
    pub const GET_SHARED_OBJECT: u32 = 41;
    pub const SET_DEVICE_STATE_FD: u32 = 42;
    pub const CHECK_DEVICE_STATE: u32 = 43;
}

/// A message as it came.
#[derive(Debug)]
pub struct Message {
    /// Number of the request.
    pub request: u32,
    /// Version and flags.
    pub flags: u32,
    /// What follows the header.
    pub body: Vec<u8>,
    /// Descriptors that came along.
    pub fds: Vec<OwnedFd>,
}

impl Message {
    /// The first eight bytes of the body.
    #[must_use]
    pub fn number(&self) -> Option<u64> {
        self.body
            .first_chunk()
            .map(|bytes| u64::from_le_bytes(*bytes))
    }
}

/// Header and body; the header tells `size`, whatever the body has.
#[must_use]
pub fn frame(request: u32, flags: u32, size: u32, body: &[u8]) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(HEADER + body.len());
    for word in [request, flags, size] {
        bytes.extend_from_slice(&word.to_le_bytes());
    }
    bytes.extend_from_slice(body);
    bytes
}

/// Numbers of 64 bits as a body.
#[must_use]
pub fn words(words: &[u64]) -> Vec<u8> {
    words.iter().flat_map(|word| word.to_le_bytes()).collect()
}

/// Sends bytes with descriptors on the first of them.
///
/// # Errors
/// As sendmsg(2); never a signal.
pub fn send(socket: &UnixStream, bytes: &[u8], fds: &[RawFd]) -> Result<usize, Errno> {
    let rights = [ControlMessage::ScmRights(fds)];
    let control = if fds.is_empty() { &[][..] } else { &rights[..] };
    sendmsg::<()>(
        socket.as_raw_fd(),
        &[IoSlice::new(bytes)],
        control,
        MsgFlags::MSG_NOSIGNAL,
        None,
    )
}

/// The next message; `None` when the peer has left or the time is over.
///
/// # Errors
/// As recvmsg(2).
pub fn receive(socket: &UnixStream, deadline: Deadline) -> io::Result<Option<Message>> {
    let mut fds = Vec::new();
    let mut header = [0; HEADER];
    if !fill(socket, &mut header, &mut fds, deadline)? {
        return Ok(None);
    }
    let word = |at: usize| {
        u32::from_le_bytes([header[at], header[at + 1], header[at + 2], header[at + 3]])
    };
    let size = word(8).min(1 << 16) as usize;
    let mut body = vec![0; size];
    if !fill(socket, &mut body, &mut fds, deadline)? {
        return Ok(None);
    }
    Ok(Some(Message {
        request: word(0),
        flags: word(4),
        body,
        fds,
    }))
}

fn fill(
    socket: &UnixStream,
    mut buffer: &mut [u8],
    fds: &mut Vec<OwnedFd>,
    deadline: Deadline,
) -> io::Result<bool> {
    while !buffer.is_empty() {
        if readable(&[socket.as_fd()], deadline)?.is_none() {
            return Ok(false);
        }
        let mut control = nix::cmsg_space!([RawFd; 32]);
        let mut slices = [IoSliceMut::new(buffer)];
        let message = match recvmsg::<()>(
            socket.as_raw_fd(),
            &mut slices,
            Some(&mut control),
            MsgFlags::MSG_CMSG_CLOEXEC,
        ) {
            Ok(message) => message,
            Err(Errno::ECONNRESET) => return Ok(false),
            Err(errno) => return Err(errno.into()),
        };
        for message in message.cmsgs()? {
            if let ControlMessageOwned::ScmRights(received) = message {
                // SAFETY: the kernel made these descriptors for us with this message.
                fds.extend(
                    received
                        .into_iter()
                        .map(|fd| unsafe { OwnedFd::from_raw_fd(fd) }),
                );
            }
        }
        let read = message.bytes;
        if read == 0 {
            return Ok(false);
        }
        buffer = &mut buffer[read..];
    }
    Ok(true)
}
