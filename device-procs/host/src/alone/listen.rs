//! Where the front end of a stand-alone device comes from: a socket at a path, or one that was inherited.

use std::fs::Permissions;
use std::io;
use std::os::fd::{OwnedFd, RawFd};
use std::os::unix::fs::{FileTypeExt, PermissionsExt};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};

use nix::errno::Errno;
use nix::sys::socket::{getsockopt, sockopt};
use nix::sys::stat::{Mode, umask};
use thiserror::Error;

use super::Socket;

/// Why no front end can come.
#[derive(Debug, Error)]
pub enum ListenError {
    /// The socket cannot be made.
    #[error("--socket-path {0}")]
    Path(PathBuf, #[source] io::Error),
    /// Somebody is there.
    #[error("--socket-path {0}: another process listens there")]
    InUse(PathBuf),
    /// Something else is there.
    #[error("--socket-path {0}: exists and is no socket")]
    NoSocket(PathBuf),
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
    pub(super) fn open(socket: &Socket, inherited: Option<OwnedFd>) -> Result<Self, ListenError> {
        match socket {
            Socket::Path(path, group) => {
                let listener = listen(path, group.as_deref())?;
                Ok(Self::Listening(listener, Some(path.clone())))
            }
            Socket::Fd(fd) => {
                let failed = |source| ListenError::Fd { fd: *fd, source };
                let inherited = inherited.ok_or(failed(Errno::EBADF))?;
                // Fails for what is no socket.
                if getsockopt(&inherited, sockopt::AcceptConn).map_err(failed)? {
                    Ok(Self::Listening(inherited.into(), None))
                } else {
                    Ok(Self::Connected(inherited.into()))
                }
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

/// Listens at `path`, for this user only, or for `group` too. A socket that nobody listens at any more is replaced.
fn listen(path: &Path, group: Option<&str>) -> Result<UnixListener, ListenError> {
    let group = group.map(group_id).transpose()?;
    let failed = |error| ListenError::Path(path.to_owned(), error);
    match std::fs::symlink_metadata(path) {
        Ok(found) if !found.file_type().is_socket() => {
            return Err(ListenError::NoSocket(path.to_owned()));
        }
        Ok(_) => match UnixStream::connect(path) {
            Err(error) if error.kind() == io::ErrorKind::ConnectionRefused => {
                std::fs::remove_file(path).map_err(failed)?;
            }
            _ => return Err(ListenError::InUse(path.to_owned())),
        },
        Err(_) => {}
    }
    let before = umask(Mode::from_bits_truncate(0o077));
    let listener = UnixListener::bind(path).map_err(failed);
    umask(before);
    if let (Ok(_), Some(group)) = (&listener, group) {
        // In this order, nobody else can connect in between.
        std::os::unix::fs::chown(path, None, Some(group)).map_err(failed)?;
        std::fs::set_permissions(path, Permissions::from_mode(0o770)).map_err(failed)?;
    }
    ipc::log::info!("listening at {}", path.display());
    listener
}

/// The number of a group; a static program has nothing but the file to look names up in.
fn group_id(name: &str) -> Result<u32, ListenError> {
    if let Ok(number) = name.parse() {
        return Ok(number);
    }
    let unknown = || ListenError::Group(name.to_owned());
    let groups = std::fs::read_to_string("/etc/group").map_err(|_| unknown())?;
    groups
        .lines()
        .find_map(|line| {
            let mut fields = line.split(':');
            (fields.next() == Some(name)).then(|| fields.nth(1)?.parse().ok())?
        })
        .ok_or_else(unknown)
}
