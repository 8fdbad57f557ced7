//! A packet socket that carries one message and its descriptors at a time.
//!
//! **Job.** `SOCK_SEQPACKET` keeps message borders and never splits the descriptors from their bytes.
//! **Who is not trusted**: the other end. A packet larger than the cap, a truncated one, or one that brings more
//! descriptors than the cap is refused, and every descriptor it brought is closed.
//! **Why this way.** A stream would need framing, and framing is one more parser.

use std::io::IoSlice;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};

use nix::errno::Errno;
use nix::sys::socket::{
    AddressFamily, ControlMessage, MsgFlags, SockFlag, SockType, recvmsg, sendmsg, socketpair,
};
use serde::{Serialize, de::DeserializeOwned};
use thiserror::Error;

use crate::codec::{self, CodecError};
use crate::limits::{MAX_MESSAGE, MAX_MESSAGE_FDS};
use crate::rights::{self, Received};

/// Why a message did not come or go.
#[derive(Debug, Error)]
pub enum ChannelError {
    /// The other end is gone.
    #[error("peer closed the channel")]
    Closed,
    /// A socket call failed.
    #[error("{call} on a message channel failed")]
    Socket {
        /// The system call.
        call: &'static str,
        /// What the kernel said.
        source: Errno,
    },
    /// The packet was larger than the cap, or brought too many descriptors.
    #[error(
        "message was truncated: more than {MAX_MESSAGE} bytes or {MAX_MESSAGE_FDS} descriptors"
    )]
    Truncated,
    /// The bytes are no message.
    #[error("malformed message")]
    Codec(#[from] CodecError),
}

/// One end of a message channel.
#[derive(Debug)]
pub struct Channel {
    socket: OwnedFd,
}

impl Channel {
    /// A connected pair; both ends are close-on-exec.
    pub fn pair() -> Result<(Self, Self), ChannelError> {
        let (a, b) = socketpair(
            AddressFamily::Unix,
            SockType::SeqPacket,
            None,
            SockFlag::SOCK_CLOEXEC,
        )
        .map_err(|source| ChannelError::Socket {
            call: "socketpair",
            source,
        })?;
        Ok((Self { socket: a }, Self { socket: b }))
    }

    /// Takes over a connected packet socket.
    pub fn from_fd(socket: OwnedFd) -> Self {
        Self { socket }
    }

    /// Gives the socket away.
    pub fn into_fd(self) -> OwnedFd {
        self.socket
    }

    /// Sends one message with `fds`, of which the peer gets duplicates.
    pub fn send<T: Serialize>(
        &self,
        message: &T,
        fds: &[BorrowedFd<'_>],
    ) -> Result<(), ChannelError> {
        let bytes = codec::encode(message)?;
        if fds.len() > MAX_MESSAGE_FDS {
            return Err(ChannelError::Truncated);
        }
        let raw: Vec<RawFd> = fds.iter().map(AsRawFd::as_raw_fd).collect();
        let rights = [ControlMessage::ScmRights(&raw)];
        let control: &[ControlMessage<'_>] = if raw.is_empty() { &[] } else { &rights };
        loop {
            match sendmsg::<()>(
                self.socket.as_raw_fd(),
                &[IoSlice::new(&bytes)],
                control,
                MsgFlags::MSG_NOSIGNAL,
                None,
            ) {
                Ok(_) => return Ok(()),
                Err(Errno::EINTR) => {}
                Err(Errno::EPIPE | Errno::ECONNRESET) => return Err(ChannelError::Closed),
                Err(source) => {
                    return Err(ChannelError::Socket {
                        call: "sendmsg",
                        source,
                    });
                }
            }
        }
    }

    /// Waits for one message; its descriptors arrive close-on-exec.
    pub fn receive<T: DeserializeOwned>(&self) -> Result<(T, Vec<OwnedFd>), ChannelError> {
        self.receive_with(MsgFlags::empty())?
            .ok_or(ChannelError::Closed)
    }

    /// Takes one message if one is there.
    pub fn try_receive<T: DeserializeOwned>(
        &self,
    ) -> Result<Option<(T, Vec<OwnedFd>)>, ChannelError> {
        self.receive_with(MsgFlags::MSG_DONTWAIT)
    }

    fn receive_with<T: DeserializeOwned>(
        &self,
        flags: MsgFlags,
    ) -> Result<Option<(T, Vec<OwnedFd>)>, ChannelError> {
        // Room for one byte more than allowed would not tell more: the kernel flags a cut packet.
        let Some(len) = self.next_len(flags)? else {
            // A packet that comes from now on would find no room.
            return Ok(None);
        };
        let mut buffer = vec![0u8; len.min(MAX_MESSAGE)];
        let Received { len, fds, cut } = loop {
            match rights::receive(&self.socket, &mut buffer, flags) {
                Ok(received) => break received,
                // The kernel says once that the peer left with messages unread; what it had sent before is still there.
                Err(Errno::EINTR | Errno::ECONNRESET) => {}
                Err(Errno::EAGAIN) => return Ok(None),
                Err(source) => {
                    return Err(ChannelError::Socket {
                        call: "recvmsg",
                        source,
                    });
                }
            }
        };
        if cut || fds.len() > MAX_MESSAGE_FDS {
            return Err(ChannelError::Truncated);
        }
        if len == 0 {
            return Err(ChannelError::Closed);
        }
        Ok(Some((codec::decode(&buffer[..len])?, fds)))
    }

    /// Length of the packet that waits, so that small messages take small buffers; `None` if none does.
    fn next_len(&self, flags: MsgFlags) -> Result<Option<usize>, ChannelError> {
        loop {
            // Not recv, so that a filter need not allow one more call.
            match recvmsg::<()>(
                self.socket.as_raw_fd(),
                &mut [],
                None,
                flags | MsgFlags::MSG_PEEK | MsgFlags::MSG_TRUNC,
            ) {
                Ok(message) => return Ok(Some(message.bytes)),
                // As in `receive_with`.
                Err(Errno::EINTR | Errno::ECONNRESET) => {}
                Err(Errno::EAGAIN) => return Ok(None),
                Err(source) => {
                    return Err(ChannelError::Socket {
                        call: "recvmsg",
                        source,
                    });
                }
            }
        }
    }
}

impl AsFd for Channel {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::{Read, Write};

    #[test]
    fn message_and_descriptor_arrive_together() {
        let (a, b) = Channel::pair().unwrap();
        let (mut reader, writer) = std::io::pipe().unwrap();
        a.send(&String::from("pipe"), &[writer.as_fd()]).unwrap();
        drop(writer);
        let (text, mut fds): (String, _) = b.receive().unwrap();
        assert_eq!(text, "pipe");
        let mut writer = std::fs::File::from(fds.pop().unwrap());
        writer.write_all(b"x").unwrap();
        drop(writer);
        let mut got = String::new();
        reader.read_to_string(&mut got).unwrap();
        assert_eq!(got, "x");
    }

    #[test]
    fn a_closed_peer_is_told_apart_from_silence() {
        let (a, b) = Channel::pair().unwrap();
        assert!(b.try_receive::<u32>().unwrap().is_none());
        drop(a);
        assert!(matches!(b.receive::<u32>(), Err(ChannelError::Closed)));
        assert!(matches!(b.send(&1u32, &[]), Err(ChannelError::Closed)));
    }

    /// A packet may come between any two steps of a look that does not wait.
    #[test]
    fn no_message_is_cut_whenever_it_comes() {
        const COUNT: u32 = 50_000;
        let (a, b) = Channel::pair().unwrap();
        let sender = std::thread::spawn(move || {
            for number in 0..COUNT {
                a.send(&number, &[]).unwrap();
            }
        });
        let mut expected = 0;
        while expected < COUNT {
            if let Some((number, _)) = b.try_receive::<u32>().unwrap() {
                assert_eq!(number, expected);
                expected += 1;
            }
        }
        sender.join().unwrap();
    }

    #[test]
    fn too_many_descriptors_are_refused_and_closed() {
        let (a, b) = Channel::pair().unwrap();
        let (reader, writer) = std::io::pipe().unwrap();
        let raw = vec![writer.as_raw_fd(); MAX_MESSAGE_FDS + 1];
        sendmsg::<()>(
            a.socket.as_raw_fd(),
            &[IoSlice::new(&[0; 4])],
            &[ControlMessage::ScmRights(&raw)],
            MsgFlags::empty(),
            None,
        )
        .unwrap();
        drop(writer);
        assert!(matches!(b.receive::<u32>(), Err(ChannelError::Truncated)));
        // Every copy is closed: the pipe has no writer left.
        let mut rest = Vec::new();
        let mut reader = reader;
        assert_eq!(reader.read_to_end(&mut rest).unwrap(), 0);
    }

    #[test]
    fn last_words_of_a_peer_that_left_messages_unread_are_received() {
        let (a, b) = Channel::pair().unwrap();
        a.send(&1u32, &[]).unwrap();
        a.send(&2u32, &[]).unwrap();
        assert_eq!(b.receive::<u32>().unwrap().0, 1);
        b.send(&7u32, &[]).unwrap();
        drop(b);
        assert_eq!(a.receive::<u32>().unwrap().0, 7);
        assert!(matches!(a.receive::<u32>(), Err(ChannelError::Closed)));
    }
}
