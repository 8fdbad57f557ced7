//! A socket that the caller left open (`--fd`).

#![allow(unsafe_code)] // a descriptor that exec left open is known by its number only

use std::os::fd::{FromRawFd, OwnedFd, RawFd};

use nix::errno::Errno;

/// Takes descriptor `fd`, which nothing else in this process uses: it is 3 or more and nothing has been opened before.
pub(crate) fn take(fd: RawFd) -> Result<OwnedFd, Errno> {
    // SAFETY: F_SETFD takes any number and touches no memory.
    Errno::result(unsafe { libc::fcntl(fd, libc::F_SETFD, libc::FD_CLOEXEC) })?;
    // SAFETY: it is open, and as this is called once and before anything is opened, nobody else owns it.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}
