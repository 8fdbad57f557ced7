//! Reading and writing descriptors without ever waiting.
//!
//! **Job.** One `write` and one `read` for terminals, pipes, sockets and files, which say `EAGAIN` instead of blocking.
//!
//! **Who is not trusted**: whoever is on the other side; it may never read, or go away at any time.
//!
//! **Why this way.** `O_NONBLOCK` belongs to the open file description, and that of standard input and output is shared
//! with the shell that started us and everything else on that terminal: setting it breaks them, even after we are gone.
//! So standard input and output are opened a second time through `/proc/self/fd`, which makes a description of our own;
//! where that is impossible (sockets, a terminal of another mount namespace), a flag on the call or a look before the
//! write does instead.

use std::fs::{File, OpenOptions};
use std::io::{self, IoSlice, IoSliceMut};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::OpenOptionsExt;

use nix::errno::Errno;
use nix::fcntl::{FcntlArg, OFlag, fcntl};
use nix::poll::{PollFd, PollFlags, ppoll};
use nix::sys::socket::{MsgFlags, recvmsg, sendmsg};
use nix::sys::stat::{SFlag, fstat};
use nix::sys::time::TimeSpec;

/// Most bytes of a write that was preceded by a look: less than a pipe has free when it is ready (`PIPE_BUF`).
const GUARDED_WRITE: usize = 512;

/// How a descriptor is kept from blocking.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Manner {
    /// Its description has `O_NONBLOCK`, or it is a regular file, which never blocks.
    Plain,
    /// A flag on every call.
    Socket,
    /// A look before every call: its description is shared.
    Guarded,
}

/// A descriptor that this process reads or writes without waiting.
#[derive(Debug)]
pub(super) struct Descriptor {
    fd: OwnedFd,
    manner: Manner,
}

impl Descriptor {
    /// Takes over a descriptor whose description nobody else has.
    pub(super) fn owned(fd: OwnedFd) -> Result<Self, Errno> {
        let manner = if is(&fd, SFlag::S_IFSOCK)? {
            Manner::Socket
        } else {
            Manner::Plain
        };
        let flags = OFlag::from_bits_retain(fcntl(&fd, FcntlArg::F_GETFL)?);
        fcntl(&fd, FcntlArg::F_SETFL(flags | OFlag::O_NONBLOCK))?;
        Ok(Self { fd, manner })
    }

    /// Takes over a connected socket.
    pub(super) const fn socket(fd: OwnedFd) -> Self {
        Self {
            fd,
            manner: Manner::Socket,
        }
    }

    /// A descriptor for the file behind `shared`, whose description stays as it is. Needs `/proc`, hence before lock-down.
    pub(super) fn shared(shared: BorrowedFd<'_>, writes: bool) -> io::Result<Self> {
        let manner = if is(shared, SFlag::S_IFSOCK)? {
            Manner::Socket
        } else if is(shared, SFlag::S_IFREG)? {
            // A second description would start at offset 0 and overwrite what is there.
            Manner::Plain
        } else {
            match reopen(shared, writes) {
                Ok(file) => {
                    return Ok(Self {
                        fd: file.into(),
                        manner: Manner::Plain,
                    });
                }
                Err(_) => Manner::Guarded,
            }
        };
        Ok(Self {
            fd: shared.try_clone_to_owned()?,
            manner,
        })
    }

    /// Another descriptor for the same description, since a poll set holds each only once.
    pub(super) fn try_clone(&self) -> io::Result<Self> {
        Ok(Self {
            fd: self.fd.try_clone()?,
            manner: self.manner,
        })
    }

    /// Gives the descriptor away.
    pub(super) fn into_fd(self) -> OwnedFd {
        self.fd
    }

    pub(super) const fn is_socket(&self) -> bool {
        matches!(self.manner, Manner::Socket)
    }

    /// Writes some of `bytes`. `EAGAIN` if none can be taken now.
    pub(super) fn write(&self, bytes: &[u8]) -> Result<usize, Errno> {
        match self.manner {
            Manner::Plain => nix::unistd::write(&self.fd, bytes),
            Manner::Socket => {
                let flags = MsgFlags::MSG_DONTWAIT | MsgFlags::MSG_NOSIGNAL;
                // Not send: the filters allow sendmsg for other sockets anyway. The same below.
                sendmsg::<()>(
                    self.fd.as_raw_fd(),
                    &[IoSlice::new(bytes)],
                    &[],
                    flags,
                    None,
                )
            }
            Manner::Guarded => {
                self.look(PollFlags::POLLOUT)?;
                nix::unistd::write(&self.fd, &bytes[..bytes.len().min(GUARDED_WRITE)])
            }
        }
    }

    /// Reads into `buffer`; 0 at the end. `EAGAIN` if there is nothing now.
    pub(super) fn read(&self, buffer: &mut [u8]) -> Result<usize, Errno> {
        match self.manner {
            Manner::Plain => nix::unistd::read(&self.fd, buffer),
            Manner::Socket => {
                let mut parts = [IoSliceMut::new(buffer)];
                let flags = MsgFlags::MSG_DONTWAIT;
                recvmsg::<()>(self.fd.as_raw_fd(), &mut parts, None, flags).map(|got| got.bytes)
            }
            Manner::Guarded => {
                self.look(PollFlags::POLLIN)?;
                nix::unistd::read(&self.fd, buffer)
            }
        }
    }

    fn look(&self, events: PollFlags) -> Result<(), Errno> {
        let now = Some(TimeSpec::new(0, 0));
        match ppoll(&mut [PollFd::new(self.fd.as_fd(), events)], now, None)? {
            0 => Err(Errno::EAGAIN),
            // Errors and hang-ups count as ready: the call itself tells.
            _ => Ok(()),
        }
    }
}

impl AsFd for Descriptor {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

fn is(fd: impl AsFd, kind: SFlag) -> Result<bool, Errno> {
    Ok(fstat(fd)?.st_mode & SFlag::S_IFMT.bits() == kind.bits())
}

fn reopen(fd: BorrowedFd<'_>, writes: bool) -> io::Result<File> {
    OpenOptions::new()
        .read(!writes)
        .write(writes)
        .custom_flags(libc::O_NONBLOCK | libc::O_NOCTTY | libc::O_CLOEXEC)
        .open(format!("/proc/self/fd/{}", fd.as_raw_fd()))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn nonblocking(fd: impl AsFd) -> bool {
        OFlag::from_bits_retain(fcntl(fd, FcntlArg::F_GETFL).unwrap()).contains(OFlag::O_NONBLOCK)
    }

    /// Writes until it is refused; gives how much went.
    fn fill(writer: &Descriptor) -> usize {
        let mut total = 0;
        loop {
            match writer.write(&[b'x'; 4096]) {
                Ok(count) => total += count,
                Err(Errno::EAGAIN) => return total,
                Err(error) => panic!("{error}"),
            }
        }
    }

    #[test]
    fn a_full_pipe_or_socket_or_terminal_refuses_and_stays_as_it_was() {
        let (reader, writer) = std::io::pipe().unwrap();
        let (left, _right) = std::os::unix::net::UnixStream::pair().unwrap();
        let pair = nix::pty::openpty(None, None).unwrap();
        for fd in [writer.as_fd(), left.as_fd(), pair.slave.as_fd()] {
            let ours = Descriptor::shared(fd, true).unwrap();
            assert!(fill(&ours) > 0);
            assert!(!nonblocking(fd), "the shared description must not change");
        }
        let ours = Descriptor::shared(reader.as_fd(), false).unwrap();
        assert!(ours.read(&mut [0; 16]).unwrap() == 16);
        assert!(!nonblocking(&reader));
    }

    #[test]
    fn a_guarded_descriptor_does_not_block_either() {
        let (reader, writer) = std::io::pipe().unwrap();
        let writer = Descriptor {
            fd: writer.into(),
            manner: Manner::Guarded,
        };
        let reader = Descriptor {
            fd: reader.into(),
            manner: Manner::Guarded,
        };
        assert_eq!(reader.read(&mut [0]), Err(Errno::EAGAIN));
        assert!(fill(&writer) >= 4096);
        assert_eq!(reader.read(&mut [0; 8]), Ok(8));
        drop(reader);
        assert_eq!(writer.write(b"x"), Err(Errno::EPIPE));
    }

    #[test]
    fn a_regular_file_goes_on_where_it_is() {
        use std::io::{Read, Seek, Write};
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(b"before ").unwrap();
        let ours = Descriptor::shared(file.as_fd(), true).unwrap();
        ours.write(b"after").unwrap();
        let mut text = String::new();
        file.rewind().unwrap();
        file.read_to_string(&mut text).unwrap();
        assert_eq!(text, "before after");
    }
}
