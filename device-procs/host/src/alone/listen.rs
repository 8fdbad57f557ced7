//! Where the front end of a stand-alone device comes from: a socket at a path, or one that was inherited.

use std::io;
use std::os::fd::{OwnedFd, RawFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::PathBuf;

use nix::errno::Errno;
use thiserror::Error;

use super::Socket;
use super::socket::{self, Inherited, SocketError};

/// Why no front end can come.
#[derive(Debug, Error)]
pub enum ListenError {
    /// The path.
    #[error("--socket-path {0}")]
    Path(SocketError),
    /// No such group.
    #[error("--socket-group {0}: neither a number nor a group of /etc/group")]
    Group(String),
    /// Not what it should be.
    #[error("--fd {fd}: not an open unix stream socket")]
    Fd {
        /// Its number.
        fd: RawFd,
        /// What the kernel said.
        source: Errno,
    },
    /// It came, but could not be let in.
    #[error("waiting for the front end")]
    Accept(#[source] io::Error),
}

/// A front end that will come, or one that is here.
pub(super) enum FrontEnd<'a> {
    Listening(&'a UnixListener),
    Here(&'a UnixStream),
}

/// The socket.
#[derive(Debug)]
pub(super) enum Door {
    /// At this path, if it is ours to remove.
    Listening(UnixListener, Option<PathBuf>),
    Connected(UnixStream),
}

impl Door {
    pub(super) fn open(place: &Socket, inherited: Option<OwnedFd>) -> Result<Self, ListenError> {
        match place {
            Socket::Path(path, group) => {
                let unknown = |name: &String| ListenError::Group(name.clone());
                let group = group
                    .as_ref()
                    .map(|name| socket::group(name).ok_or_else(|| unknown(name)))
                    .transpose()?;
                let listener = socket::listen(path, group).map_err(ListenError::Path)?;
                Ok(Self::Listening(listener, Some(path.clone())))
            }
            Socket::Fd(fd) => {
                let failed = |source| ListenError::Fd { fd: *fd, source };
                let inherited = inherited.ok_or(failed(Errno::EBADF))?;
                Ok(match socket::inherited(inherited).map_err(failed)? {
                    Inherited::Listening(listener) => Self::Listening(listener, None),
                    Inherited::Connected(stream) => Self::Connected(stream),
                })
            }
        }
    }

    pub(super) const fn front_end(&self) -> FrontEnd<'_> {
        match self {
            Self::Listening(listener, _) => FrontEnd::Listening(listener),
            Self::Connected(stream) => FrontEnd::Here(stream),
        }
    }

    /// Whether another front end can come.
    pub(super) const fn is_listening(&self) -> bool {
        matches!(self, Self::Listening(..))
    }

    /// Nobody else is to find the socket.
    pub(super) fn close(self) {
        if let Self::Listening(_, Some(path)) = self {
            // It may be gone, or belong to the next daemon's preparations by now; neither is a fault.
            let _ = std::fs::remove_file(path);
        }
    }
}
