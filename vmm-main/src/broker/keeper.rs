//! The broker's end of the line to a device's keeper ([`ipc::keeper`]).
//!
//! **Job.** Follows which process serves a device that has a keeper, and has the keeper start and end them.
//! **Who is not trusted**: keeper and serving process, which are one party here since they share their descriptors. What they say
//! is followed only as far as it is in order; anything else ends the jail with both of them.
//! **Why this way.** The pid is taken from a pidfd by the kernel's own word, so that no process outside of the jail can be named.

use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::time::{Duration, Instant};

use ipc::channel::{Channel, ChannelError};
use ipc::control::Exit;
use ipc::keeper::{Order, Told};
use ipc::limits::KEEPER_PATIENCE_MS;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use thiserror::Error;

/// Why a keeper is not followed any more.
#[derive(Debug, Error)]
pub(super) enum KeeperError {
    /// Its socket, or what came over it.
    #[error("its line to the broker")]
    Line(#[from] ChannelError),
    /// A message that nothing called for.
    #[error("it says {0:?} out of order")]
    OutOfOrder(Told),
    /// What came along is no pidfd of a process that this one can see.
    #[error("it names no process that serves")]
    NoProcess,
    /// Nothing came in time.
    #[error("it has not answered in time")]
    Silent,
}

/// What the keeper told.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum News {
    /// This process serves now.
    Serves(i32),
    /// This one has ended, without having been asked to.
    Ended(i32, Exit),
    /// It can go on with what another one keeps. Only [`Keeper::is_ready`] hears this.
    Ready,
}

/// A keeper, from its first process that serves on.
#[derive(Debug)]
pub(super) struct Keeper {
    line: Channel,
    /// The process that serves.
    serving: Option<i32>,
    /// Processes whose start has not been told yet.
    awaited: usize,
}

impl Keeper {
    /// One that is about to start its first process.
    pub(super) fn new(line: Channel) -> Self {
        Self {
            line,
            serving: None,
            awaited: 1,
        }
    }

    /// The process that serves, as far as that was told.
    pub(super) fn serving(&self) -> Option<i32> {
        self.serving
    }

    /// Whether a process that serves could be started: the last one has ended.
    pub(super) fn is_idle(&self) -> bool {
        self.serving.is_none() && self.awaited == 0
    }

    /// What a process is still expected for, once that is told.
    pub(super) fn settle(&mut self) -> Result<Option<News>, KeeperError> {
        if self.awaited == 0 {
            return Ok(None);
        }
        let (told, fds) = self.wait(Instant::now() + Duration::from_millis(KEEPER_PATIENCE_MS))?;
        self.take(told, fds).map(Some)
    }

    /// Has a process started that serves `socket`, when none does, and waits for its process id.
    pub(super) fn serve(&mut self, socket: BorrowedFd<'_>) -> Result<i32, KeeperError> {
        self.line.send(&Order::Serve, &[socket])?;
        self.awaited += 1;
        let deadline = Instant::now() + Duration::from_millis(KEEPER_PATIENCE_MS);
        let (told, fds) = self.wait(deadline)?;
        match self.take(told, fds)? {
            News::Serves(pid) => Ok(pid),
            News::Ended(..) | News::Ready => Err(KeeperError::OutOfOrder(told)),
        }
    }

    fn wait(&self, deadline: Instant) -> Result<(Told, Vec<OwnedFd>), KeeperError> {
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            let timeout = PollTimeout::try_from(left).unwrap_or(PollTimeout::ZERO);
            let mut polled = [PollFd::new(self.line.as_fd(), PollFlags::POLLIN)];
            // Interrupted is as good as nothing.
            if poll(&mut polled, timeout).unwrap_or(0) == 0 && left.is_zero() {
                return Err(KeeperError::Silent);
            }
            if let Some(told) = self.line.try_receive::<Told>()? {
                return Ok(told);
            }
        }
    }

    /// The next thing that it told, if there is one.
    pub(super) fn news(&mut self) -> Result<Option<News>, KeeperError> {
        match self.line.try_receive::<Told>() {
            Ok(Some((told, fds))) => self.take(told, fds).map(Some),
            Ok(None) => Ok(None),
            Err(e) => Err(e.into()),
        }
    }

    fn take(&mut self, told: Told, mut fds: Vec<OwnedFd>) -> Result<News, KeeperError> {
        match (told, self.serving) {
            (Told::Serving, None) if self.awaited > 0 => {
                let pidfd = fds.pop().ok_or(KeeperError::NoProcess)?;
                let pid = pid_of(&pidfd).ok_or(KeeperError::NoProcess)?;
                self.awaited -= 1;
                self.serving = Some(pid);
                Ok(News::Serves(pid))
            }
            (Told::Ended(how), Some(pid)) => {
                self.serving = None;
                Ok(News::Ended(pid, how))
            }
            _ => Err(KeeperError::OutOfOrder(told)),
        }
    }

    /// Whether a process serves now, and none is about to.
    pub(super) fn is_serving(&self) -> bool {
        self.serving.is_some() && self.awaited == 0
    }

    /// Has it tell over `line` what it keeps.
    pub(super) fn offer(&self, line: BorrowedFd<'_>) -> Result<(), KeeperError> {
        Ok(self.line.send(&Order::Offer, &[line])?)
    }

    /// Has the process that serves ended, and everything sent to the keeper that was offered it.
    pub(super) fn hand_over(&self) -> Result<(), KeeperError> {
        Ok(self.line.send(&Order::HandOver, &[])?)
    }

    /// Whether a new keeper has said that it can go on with what another one keeps.
    pub(super) fn is_ready(&mut self) -> Result<bool, KeeperError> {
        match self.line.try_receive::<Told>()? {
            None => Ok(false),
            Some((Told::Ready, fds)) if fds.is_empty() => Ok(true),
            Some((told, _)) => Err(KeeperError::OutOfOrder(told)),
        }
    }

    /// Has the process that serves ended, and waits for that.
    pub(super) fn stop(&mut self) -> Result<(), KeeperError> {
        let deadline = Instant::now() + Duration::from_millis(KEEPER_PATIENCE_MS);
        self.line.send(&Order::Stop, &[])?;
        loop {
            match self.wait(deadline)? {
                (Told::Stopped, _) if self.is_idle() => return Ok(()),
                (told, fds) => drop(self.take(told, fds)?),
            }
        }
    }
}

impl AsFd for Keeper {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.line.as_fd()
    }
}

/// The number of the process behind a pidfd, in this process's namespace.
fn pid_of(pidfd: &OwnedFd) -> Option<i32> {
    let path = format!("/proc/self/fdinfo/{}", pidfd.as_raw_fd());
    let info = std::fs::read_to_string(path).ok()?;
    let pid = info.lines().find_map(|line| line.strip_prefix("Pid:"))?;
    // 0 for one of another namespace, -1 for one that is gone.
    pid.trim().parse().ok().filter(|pid| *pid > 0)
}

#[cfg(test)]
mod tests {
    use super::*;
    use nix::sys::signal::Signal;
    use std::process::Command;

    /// A process and its pidfd.
    #[allow(unsafe_code)] // nix has no pidfd_open
    fn process() -> (std::process::Child, OwnedFd) {
        use std::os::fd::FromRawFd;
        let child = Command::new("sleep").arg("1000").spawn().unwrap();
        // SAFETY: no pointers; the descriptor is new and known to nobody else.
        let fd = unsafe {
            let fd = libc::syscall(libc::SYS_pidfd_open, child.id(), 0);
            OwnedFd::from_raw_fd(i32::try_from(fd).unwrap())
        };
        (child, fd)
    }

    #[test]
    fn what_serves_is_followed_and_what_is_out_of_order_is_refused() {
        let (ours, theirs) = Channel::pair().unwrap();
        let mut keeper = Keeper::new(ours);
        assert_eq!(keeper.news().unwrap(), None);
        assert!(!keeper.is_idle(), "one is on its way");
        let (mut child, pidfd) = process();
        let pid = i32::try_from(child.id()).unwrap();
        theirs.send(&Told::Serving, &[pidfd.as_fd()]).unwrap();
        assert_eq!(keeper.news().unwrap(), Some(News::Serves(pid)));
        assert_eq!(keeper.serving(), Some(pid));
        let killed = Exit::Signal(Signal::SIGKILL as i32);
        theirs.send(&Told::Ended(killed), &[]).unwrap();
        assert_eq!(keeper.news().unwrap(), Some(News::Ended(pid, killed)));
        assert!(keeper.is_idle());
        theirs.send(&Told::Ended(killed), &[]).unwrap();
        assert!(matches!(keeper.news(), Err(KeeperError::OutOfOrder(_))));
        theirs.send(&Told::Serving, &[pidfd.as_fd()]).unwrap();
        assert!(matches!(keeper.news(), Err(KeeperError::OutOfOrder(_))));
        child.kill().unwrap();
        child.wait().unwrap();
        // A process that is gone, something else, nothing at all.
        let file = std::fs::File::open("/dev/null").unwrap();
        for fds in [vec![pidfd.as_fd()], vec![file.as_fd()], vec![]] {
            let (ours, theirs) = Channel::pair().unwrap();
            let mut keeper = Keeper::new(ours);
            theirs.send(&Told::Serving, &fds).unwrap();
            assert!(matches!(keeper.news(), Err(KeeperError::NoProcess)));
        }
        drop(theirs);
        assert!(matches!(keeper.news(), Err(KeeperError::Line(_))));
    }

    #[test]
    fn a_stop_is_over_when_the_keeper_says_so_whether_or_not_it_had_anything_to_end() {
        let (ours, theirs) = Channel::pair().unwrap();
        let mut keeper = Keeper::new(ours);
        let (mut child, pidfd) = process();
        // It had been started, nobody has looked at that yet, and it ends by itself.
        theirs.send(&Told::Serving, &[pidfd.as_fd()]).unwrap();
        theirs.send(&Told::Ended(Exit::Code(0)), &[]).unwrap();
        theirs.send(&Told::Stopped, &[]).unwrap();
        keeper.stop().unwrap();
        assert!(matches!(theirs.receive::<Order>(), Ok((Order::Stop, _))));
        assert_eq!(keeper.news().unwrap(), None);
        theirs.send(&Told::Serving, &[pidfd.as_fd()]).unwrap();
        let pid = i32::try_from(child.id()).unwrap();
        assert_eq!(keeper.serve(pidfd.as_fd()).unwrap(), pid);
        let (order, fds) = theirs.receive::<Order>().unwrap();
        assert_eq!((order, fds.len()), (Order::Serve, 1));
        theirs.send(&Told::Stopped, &[]).unwrap();
        assert!(matches!(
            keeper.stop(),
            Err(KeeperError::OutOfOrder(Told::Stopped))
        ));
        child.kill().unwrap();
        child.wait().unwrap();
        let (ours, _silent) = Channel::pair().unwrap();
        assert!(matches!(Keeper::new(ours).stop(), Err(KeeperError::Silent)));
    }
}
