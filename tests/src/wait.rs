//! # Waiting on events with a limit
//!
//! **Job.** Deadlines, "is this descriptor readable", and "has this process ended" for any process, not only for
//! a child; and what such a process has open. **Who is not trusted.** The awaited side: each wait has a limit.
//! **Why this way.** A pidfd becomes readable when its process ends, so the end of a stranger's process is an
//! event as well. `unsafe` is here because the C library's wrapper has no safe form for pidfds.
#![allow(unsafe_code)] // pidfd_open and pidfd_getfd, by number

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use std::io;
use std::net::{TcpListener, TcpStream};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::time::{Duration, Instant};

/// A moment after which waiting ends.
#[derive(Debug, Clone, Copy)]
pub struct Deadline(Instant);

impl Deadline {
    /// The moment `limit` from now.
    #[must_use]
    pub fn after(limit: Duration) -> Self {
        Self(Instant::now() + limit)
    }

    /// What is left; zero once it has passed.
    #[must_use]
    pub fn left(self) -> Duration {
        self.0.saturating_duration_since(Instant::now())
    }

    fn poll_timeout(self) -> PollTimeout {
        // Rounded up, so that a wait never ends early and spins.
        let millis = self.left().as_micros().div_ceil(1000);
        PollTimeout::try_from(millis).unwrap_or(PollTimeout::MAX)
    }
}

/// Waits until one of `fds` can be read (or is at its end); `None` when the time is over.
///
/// # Errors
/// When `poll` fails.
pub fn readable(fds: &[BorrowedFd<'_>], deadline: Deadline) -> io::Result<Option<usize>> {
    let mut polled: Vec<PollFd<'_>> = fds
        .iter()
        .map(|fd| PollFd::new(*fd, PollFlags::POLLIN))
        .collect();
    loop {
        match poll(&mut polled, deadline.poll_timeout()) {
            Ok(0) if deadline.left().is_zero() => return Ok(None),
            Ok(0) | Err(nix::errno::Errno::EINTR) => {}
            Ok(_) => {
                return Ok(polled.iter().position(|p| p.any().unwrap_or(false)));
            }
            Err(errno) => return Err(errno.into()),
        }
    }
}

/// The next connection, whose reads and writes have the limit too.
///
/// # Errors
/// When none comes in time.
pub fn accept(listener: &TcpListener, limit: Duration) -> io::Result<TcpStream> {
    if readable(&[listener.as_fd()], Deadline::after(limit))?.is_none() {
        return Err(io::ErrorKind::TimedOut.into());
    }
    let (stream, _) = listener.accept()?;
    stream.set_read_timeout(Some(limit))?;
    stream.set_write_timeout(Some(limit))?;
    Ok(stream)
}

/// What a call that makes a descriptor answered.
fn made(answer: libc::c_long) -> io::Result<OwnedFd> {
    let fd =
        i32::try_from(answer).map_err(|_| io::Error::other("a descriptor number out of range"))?;
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the kernel has just made this descriptor, and nobody else has its number.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// A process that is watched, whoever its parent is.
#[derive(Debug)]
pub struct Watched {
    /// Its id in this process's pid namespace.
    pub pid: i32,
    pidfd: OwnedFd,
}

impl Watched {
    /// Watches the process `pid`.
    ///
    /// # Errors
    /// When there is no such process.
    pub fn new(pid: i32) -> io::Result<Self> {
        // SAFETY: the call takes two integers and touches no memory of this process.
        let pidfd = made(unsafe { libc::syscall(libc::SYS_pidfd_open, pid, 0) })?;
        Ok(Self { pid, pidfd })
    }

    /// A duplicate of its descriptor `number`, as root can have of any process.
    ///
    /// # Errors
    /// It has no such descriptor, or this process may not.
    pub fn descriptor(&self, number: i32) -> io::Result<OwnedFd> {
        // SAFETY: the call takes three integers and touches no memory of this process.
        made(unsafe { libc::syscall(libc::SYS_pidfd_getfd, self.pidfd.as_raw_fd(), number, 0) })
    }

    /// Waits for its end; false when the time is over. A zombie counts as ended.
    ///
    /// # Errors
    /// When `poll` fails.
    pub fn ended(&self, deadline: Deadline) -> io::Result<bool> {
        Ok(readable(&[self.pidfd.as_fd()], deadline)?.is_some())
    }
}
