//! Bytes off a unix socket, and the descriptors that came with them (`SCM_RIGHTS`).
//!
//! **Job.** [`receive`] takes what one recvmsg(2) brings. Every descriptor that the kernel made for it has an owner on return.
//!
//! **Who is not trusted**: the other end. It may send up to 253 descriptors with each message, wanted or not, and more than this
//! process has numbers for.
//!
//! **Why this way.** nix shows no control message at all when the kernel has cut the list, as it does when the process runs out of
//! numbers; those that had been made until then would stay open, and nobody would know of them. So the list is read here.

#![allow(unsafe_code)] // descriptors arrive as numbers

use std::io::IoSliceMut;
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd, RawFd};

use nix::errno::Errno;
use nix::libc::{self, CMSG_LEN, SCM_RIGHTS, SOL_SOCKET};
use nix::sys::socket::{MsgFlags, recvmsg};

/// Most descriptors that one message can carry (Linux, `include/net/scm.h`).
const SCM_MAX_FD: usize = 253;
/// Where control messages begin is a multiple of this (cmsg(3)), as is where their data begin.
const ALIGN: usize = size_of::<usize>();

/// What has come.
#[derive(Debug)]
pub struct Received {
    /// Bytes; 0 when the other end of a stream has left.
    pub len: usize,
    /// Descriptors, in their order, as `flags` wanted them.
    pub fds: Vec<OwnedFd>,
    /// The packet was longer than there was room, or descriptors are missing: this process or the system has no more numbers.
    pub cut: bool,
}

/// Receives into `bytes` with room for every descriptor that a message can bring; they are close-on-exec.
///
/// # Errors
/// As recvmsg(2).
pub fn receive(socket: impl AsFd, bytes: &mut [u8], flags: MsgFlags) -> Result<Received, Errno> {
    receive_with(nix::cmsg_space!([RawFd; SCM_MAX_FD]), socket, bytes, flags)
}

fn receive_with(
    mut control: Vec<u8>,
    socket: impl AsFd,
    bytes: &mut [u8],
    flags: MsgFlags,
) -> Result<Received, Errno> {
    let (len, got) = {
        let mut parts = [IoSliceMut::new(bytes)];
        let flags = flags | MsgFlags::MSG_CMSG_CLOEXEC;
        let socket = socket.as_fd().as_raw_fd();
        let message = recvmsg::<()>(socket, &mut parts, Some(&mut control), flags)?;
        (message.bytes, message.flags)
    };
    let fds = numbers(&control)
        .into_iter()
        // SAFETY: the kernel made these descriptors for this message alone, and nothing else knows their numbers.
        .map(|fd| unsafe { OwnedFd::from_raw_fd(fd) })
        .collect();
    Ok(Received {
        len,
        fds,
        cut: got.intersects(MsgFlags::MSG_TRUNC | MsgFlags::MSG_CTRUNC),
    })
}

/// The descriptors that the kernel has written into `control`, which held zeros before: `struct cmsghdr` (length with the header,
/// level, type), then the numbers.
fn numbers(control: &[u8]) -> Vec<RawFd> {
    // SAFETY: arithmetic.
    let header = unsafe { CMSG_LEN(0) } as usize;
    let mut numbers = Vec::new();
    let mut rest = control;
    while let Some((head, _)) = rest.split_at_checked(header) {
        let word = |at: usize| head[at..].first_chunk().copied().map(i32::from_ne_bytes);
        let len = head.first_chunk().copied().map_or(0, usize::from_ne_bytes);
        // Behind the last one there are zeros.
        let Some(data) = rest.get(header..len) else {
            break;
        };
        let kind = (word(ALIGN), word(ALIGN + size_of::<i32>()));
        if kind == (Some(SOL_SOCKET), Some(SCM_RIGHTS)) {
            let (chunks, _) = data.as_chunks();
            numbers.extend(chunks.iter().copied().map(libc::c_int::from_ne_bytes));
        }
        rest = rest.get(len.next_multiple_of(ALIGN)..).unwrap_or_default();
    }
    numbers
}

#[cfg(test)]
mod tests {
    use super::*;
    use nix::sys::socket::{ControlMessage, sendmsg};
    use std::io::{IoSlice, Read, Write};
    use std::os::unix::net::UnixStream;

    /// Sends `count` copies of a pipe's end that writes, and returns the one that reads: it ends when no copy is left.
    fn flood(socket: &UnixStream, count: usize) -> std::io::PipeReader {
        let (reader, writer) = std::io::pipe().unwrap();
        let raw = vec![writer.as_raw_fd(); count];
        let rights = [ControlMessage::ScmRights(&raw)];
        let bytes = [IoSlice::new(b"four")];
        let flags = MsgFlags::empty();
        assert_eq!(
            sendmsg::<()>(socket.as_raw_fd(), &bytes, &rights, flags, None),
            Ok(4)
        );
        reader
    }

    fn ends(mut reader: std::io::PipeReader) {
        let mut rest = Vec::new();
        assert_eq!(reader.read_to_end(&mut rest).unwrap(), 0);
    }

    #[test]
    fn as_many_as_a_message_carries_arrive_and_are_owned() {
        let (a, b) = UnixStream::pair().unwrap();
        for count in [0, 1, 2, 3, SCM_MAX_FD] {
            let reader = flood(&a, count);
            let mut bytes = [0; 16];
            let got = receive(&b, &mut bytes, MsgFlags::MSG_DONTWAIT).unwrap();
            assert_eq!((got.len, got.fds.len(), got.cut), (4, count, false));
            for fd in &got.fds {
                let flags = nix::fcntl::fcntl(fd, nix::fcntl::FcntlArg::F_GETFD).unwrap();
                assert_eq!(flags, libc::FD_CLOEXEC);
            }
            drop(got);
            ends(reader);
        }
    }

    #[test]
    fn of_a_list_that_was_cut_nothing_stays_open() {
        let (a, b) = UnixStream::pair().unwrap();
        // Less room than descriptors: the kernel cuts the list as it does when there are no more numbers.
        for room in [nix::cmsg_space!([RawFd; 4]), nix::cmsg_space!(RawFd)] {
            let least = room.len() / size_of::<usize>() - 2;
            let reader = flood(&a, 9);
            let got = receive_with(room, &b, &mut [0; 16], MsgFlags::empty()).unwrap();
            assert!(got.cut);
            assert!(got.fds.len() >= least && got.fds.len() < 9, "{got:?}");
            drop(got);
            ends(reader);
        }
    }

    #[test]
    fn a_peer_that_left_and_one_that_is_silent_are_told_apart() {
        let (a, b) = UnixStream::pair().unwrap();
        let nothing = receive(&b, &mut [0; 16], MsgFlags::MSG_DONTWAIT);
        assert_eq!(nothing.unwrap_err(), Errno::EAGAIN);
        (&a).write_all(b"x").unwrap();
        drop(a);
        assert_eq!(receive(&b, &mut [0; 16], MsgFlags::empty()).unwrap().len, 1);
        assert_eq!(receive(&b, &mut [0; 16], MsgFlags::empty()).unwrap().len, 0);
    }

    #[test]
    fn other_control_messages_and_lengths_that_make_no_sense_bring_nothing() {
        let message = |len: usize, level: i32, kind: i32, data: &[i32]| {
            let mut bytes = len.to_ne_bytes().to_vec();
            for word in [level, kind].iter().chain(data) {
                bytes.extend(word.to_ne_bytes());
            }
            bytes.resize(bytes.len().next_multiple_of(ALIGN), 0);
            bytes
        };
        let rights = |data: &[i32]| message(16 + 4 * data.len(), SOL_SOCKET, SCM_RIGHTS, data);
        let other = message(16 + 12, SOL_SOCKET, libc::SCM_CREDENTIALS, &[7, 7, 7]);
        assert_eq!(numbers(&[other, rights(&[3, 4, 5])].concat()), [3, 4, 5]);
        for len in [0, 1, 15, 25, 1 << 20, usize::MAX] {
            let wrong = message(len, SOL_SOCKET, SCM_RIGHTS, &[3, 4]);
            assert!(numbers(&wrong).is_empty(), "{len}");
        }
        assert!(numbers(&rights(&[])).is_empty());
        assert!(numbers(&[0; 64]).is_empty());
        assert!(numbers(&[]).is_empty());
    }
}
