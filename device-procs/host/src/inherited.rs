//! The descriptors that a device process is born with.
//!
//! **Job.** Takes ownership of 2 (log), 3 (vhost-user), 4 (start message) and 5… (back ends), each once.
//! **Who is not trusted.** Whoever executed the binary by hand: a number that is not open, or one more than announced, is an
//! error with its number in it.
//! **Why this way.** Numbers become owners in one place, so that no descriptor has two.

#![allow(unsafe_code)] // a descriptor that exec left open is known by its number only

use std::os::fd::{FromRawFd, OwnedFd, RawFd};
use std::sync::atomic::{AtomicBool, Ordering};

use ipc::start::{FD_BACKEND, FD_LOG, FD_START, FD_VHOST_USER};
use nix::errno::Errno;

static TAKEN: AtomicBool = AtomicBool::new(false);

/// The fixed ones.
#[derive(Debug)]
pub(crate) struct Inherited {
    pub(crate) log: OwnedFd,
    pub(crate) vhost_user: OwnedFd,
    pub(crate) start: OwnedFd,
    pub(crate) backends: Backends,
}

impl Inherited {
    /// `None` if one of them is not open, or when called a second time.
    pub(crate) fn take() -> Option<Self> {
        if TAKEN.swap(true, Ordering::SeqCst)
            || ![FD_LOG, FD_VHOST_USER, FD_START].into_iter().all(is_open)
        {
            return None;
        }
        // SAFETY: the three are open, and the flag above makes this the only place that ever owns them. Standard error
        // goes through the number 2 as well, but never closes it.
        unsafe {
            Some(Self {
                log: OwnedFd::from_raw_fd(FD_LOG),
                vhost_user: OwnedFd::from_raw_fd(FD_VHOST_USER),
                start: OwnedFd::from_raw_fd(FD_START),
                backends: Backends(()),
            })
        }
    }
}

/// The right to take the back-end descriptors, once their number is known.
#[derive(Debug)]
pub(crate) struct Backends(());

impl Backends {
    /// Takes `count` of them. Fails with the number of the first one that is not open, or of the first one after them if
    /// that is open.
    pub(crate) fn take(self, count: u32) -> Result<Vec<OwnedFd>, RawFd> {
        let count = RawFd::try_from(count).map_err(|_| FD_BACKEND)?;
        let end = FD_BACKEND.checked_add(count).ok_or(FD_BACKEND)?;
        if let Some(missing) = (FD_BACKEND..end).find(|fd| !is_open(*fd)) {
            return Err(missing);
        }
        if is_open(end) {
            return Err(end);
        }
        Ok((FD_BACKEND..end)
            // SAFETY: these are open, there is one `Backends` only, and it is used up here; nothing else has been opened
            // since exec that could have such a number.
            .map(|fd| unsafe { OwnedFd::from_raw_fd(fd) })
            .collect())
    }
}

/// Closes every descriptor but 0 to 2 and `kept`: a caller that forgot to close one on exec does not lend it to what is started
/// from here. To be called before anything is opened.
///
/// # Errors
/// A kernel before Linux 5.9.
pub fn close_others(kept: Option<RawFd>) -> Result<(), Errno> {
    let close = |first: u32, last: u32| {
        if first > last {
            return Ok(());
        }
        // SAFETY: nothing in this process owns a descriptor from 3 on yet.
        Errno::result(unsafe { libc::close_range(first, last, 0) }).map(drop)
    };
    match kept.and_then(|fd| u32::try_from(fd).ok()) {
        Some(kept) => close(3, kept - 1).and_then(|()| close(kept + 1, u32::MAX)),
        None => close(3, u32::MAX),
    }
}

/// Takes descriptor `fd`, which nothing else in this process uses: it is 3 or more, nothing has been opened before, and no
/// fixed descriptors were taken.
pub(crate) fn take_one(fd: RawFd) -> Result<OwnedFd, Errno> {
    if fd <= FD_LOG || TAKEN.swap(true, Ordering::SeqCst) {
        return Err(Errno::EBADF);
    }
    // SAFETY: F_SETFD takes any number and touches no memory.
    Errno::result(unsafe { libc::fcntl(fd, libc::F_SETFD, libc::FD_CLOEXEC) })?;
    // SAFETY: it is open, and by the flag above this is the only place that ever owns it.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

fn is_open(fd: RawFd) -> bool {
    // SAFETY: F_GETFD takes any number and touches no memory.
    let result = unsafe { libc::fcntl(fd, libc::F_GETFD) };
    Errno::result(result).is_ok()
}
