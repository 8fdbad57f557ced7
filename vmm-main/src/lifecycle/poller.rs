//! One epoll for the main thread.
//!
//! **Job.** Descriptors with a token each.
//! **Why this way.** Everything the main thread does starts with an event here: there is no second place that waits.

use std::os::fd::AsFd;
use std::time::Instant;

use nix::errno::Errno;
use nix::sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags, EpollTimeout};

/// An epoll instance with tokens.
#[derive(Debug)]
pub(super) struct Poller {
    epoll: Epoll,
}

/// Events taken in one round; more simply come in the next.
const ROUND: usize = 16;

impl Poller {
    /// An empty one.
    pub(super) fn new() -> Result<Self, Errno> {
        Ok(Self {
            epoll: Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC)?,
        })
    }

    /// Waits on `fd` for `events` from now on.
    pub(super) fn add(&self, fd: impl AsFd, token: u64, events: EpollFlags) -> Result<(), Errno> {
        self.epoll.add(fd, EpollEvent::new(events, token))
    }

    /// Does not wait on `fd` any more.
    pub(super) fn remove(&self, fd: impl AsFd) -> Result<(), Errno> {
        self.epoll.delete(fd)
    }

    /// Waits for one round of events: the tokens that have some. None when `deadline` comes first.
    pub(super) fn wait(&self, deadline: Option<Instant>) -> Result<Vec<u64>, Errno> {
        let mut events = [EpollEvent::empty(); ROUND];
        let timeout = match deadline {
            None => EpollTimeout::NONE,
            // Rounded up, so that the deadline has passed on return.
            Some(deadline) => {
                let left = deadline
                    .saturating_duration_since(Instant::now())
                    .as_millis()
                    + 1;
                EpollTimeout::try_from(left).unwrap_or(EpollTimeout::MAX)
            }
        };
        match self.epoll.wait(&mut events, timeout) {
            Ok(count) => Ok(events[..count].iter().map(EpollEvent::data).collect()),
            Err(Errno::EINTR) => Ok(Vec::new()),
            Err(e) => Err(e),
        }
    }
}
