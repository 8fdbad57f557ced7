//! Sockets at which front ends of stand-alone devices come.
//!
//! **Job.** Listen at a path, or take a socket that was inherited. **Who is not trusted.** Whoever else can write to the path's
//! folder: what is there already is never served from. **Why this way.** Errors name no option, since programs spell theirs in their
//! own ways.

use std::fs::Permissions;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::{FileTypeExt, PermissionsExt};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};

use nix::errno::Errno;
use nix::sys::socket::{SockType, UnixAddr, getsockname, getsockopt, sockopt};
use nix::sys::stat::{Mode, umask};
use thiserror::Error;

/// Why nobody can come to a path; begins with the path.
#[derive(Debug, Error)]
pub enum SocketError {
    /// The socket cannot be made.
    #[error("{0}: {1}")]
    Failed(PathBuf, io::Error),
    /// Somebody is there.
    #[error("{0}: another process listens there")]
    InUse(PathBuf),
    /// Something else is there.
    #[error("{0}: exists and is no socket")]
    NoSocket(PathBuf),
}

/// Where a front end comes from.
#[derive(Debug)]
pub enum Inherited {
    /// Front ends will come to it.
    Listening(UnixListener),
    /// A front end is at its other end.
    Connected(UnixStream),
}

/// Listens at `path`, for this user only, or for the group with this number too. A socket that nobody listens at any more is
/// replaced.
///
/// # Errors
/// When somebody listens there, something else is there, or a system call fails.
pub fn listen(path: &Path, group: Option<u32>) -> Result<UnixListener, SocketError> {
    let failed = |error| SocketError::Failed(path.to_owned(), error);
    match std::fs::symlink_metadata(path) {
        Ok(found) if !found.file_type().is_socket() => {
            return Err(SocketError::NoSocket(path.to_owned()));
        }
        Ok(_) => match UnixStream::connect(path) {
            Err(error) if error.kind() == io::ErrorKind::ConnectionRefused => {
                std::fs::remove_file(path).map_err(failed)?;
            }
            _ => return Err(SocketError::InUse(path.to_owned())),
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

/// The number of a group, by number or name; a static program has nothing but the file to look names up in.
#[must_use]
pub fn group(name: &str) -> Option<u32> {
    if let Ok(number) = name.parse() {
        return Some(number);
    }
    let groups = std::fs::read_to_string("/etc/group").ok()?;
    groups.lines().find_map(|line| {
        let mut fields = line.split(':');
        (fields.next() == Some(name)).then(|| fields.nth(1)?.parse().ok())?
    })
}

/// Takes a unix stream socket. One of the network would let others in than whoever has the host's word.
///
/// # Errors
/// When it is something else.
pub fn inherited(socket: OwnedFd) -> Result<Inherited, Errno> {
    // Each fails for what is no socket.
    if getsockopt(&socket, sockopt::SockType)? != SockType::Stream
        || getsockname::<UnixAddr>(socket.as_raw_fd()).is_err()
    {
        return Err(Errno::EPROTOTYPE);
    }
    if getsockopt(&socket, sockopt::AcceptConn)? {
        Ok(Inherited::Listening(socket.into()))
    } else {
        Ok(Inherited::Connected(socket.into()))
    }
}
