//! Descriptors that nothing in this process owns: the socket of `--fd` and what another program handed on, which are taken; those of a
//! serving process that is gone, which are closed.

#![allow(unsafe_code)] // a descriptor that exec left open is known by its number only

use std::os::fd::{FromRawFd, OwnedFd, RawFd};

use nix::errno::Errno;

/// Calls `with` for each open descriptor, the one that reads the list among them.
fn each(mut with: impl FnMut(RawFd)) -> Result<(), Errno> {
    let errno = |error: std::io::Error| error.raw_os_error().map_or(Errno::EIO, Errno::from_raw);
    for entry in std::fs::read_dir("/proc/self/fd").map_err(errno)? {
        let name = entry.map_err(errno)?.file_name();
        if let Some(fd) = name.to_str().and_then(|name| name.parse().ok()) {
            with(fd);
        }
    }
    Ok(())
}

/// Closes all descriptors but those that `keep` names: they belonged to a process that is gone.
pub(crate) fn close_unless(keep: impl Fn(RawFd) -> bool) -> Result<(), Errno> {
    let mut others = Vec::new();
    each(|fd| others.extend((!keep(fd)).then_some(fd)))?;
    for fd in others {
        // SAFETY: no value of this process owns it. The one that was read from is closed already, which is not an error here.
        unsafe { libc::close(fd) };
    }
    Ok(())
}

/// Takes descriptor `fd`, which the program before this one handed on, and which is named once; `None` if it is not open. It stays
/// one that is handed on.
pub(crate) fn handed_on(fd: RawFd) -> Option<OwnedFd> {
    // Those of 0 to 2 are std's.
    if fd <= 2 {
        return None;
    }
    // SAFETY: F_SETFD takes any number and touches no memory.
    Errno::result(unsafe { libc::fcntl(fd, libc::F_SETFD, 0) }).ok()?;
    // SAFETY: it is open, and nothing else in this process has been told its number.
    Some(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// Takes descriptor `fd`, which nothing else in this process uses: it is 3 or more and nothing has been opened before.
pub(crate) fn take(fd: RawFd) -> Result<OwnedFd, Errno> {
    // SAFETY: F_SETFD takes any number and touches no memory.
    Errno::result(unsafe { libc::fcntl(fd, libc::F_SETFD, libc::FD_CLOEXEC) })?;
    // SAFETY: it is open, and as this is called once and before anything is opened, nobody else owns it.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}
