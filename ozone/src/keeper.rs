//! A process that holds another one's descriptors, in the same jail.
//!
//! Job: the first process of a jail around a tree forks the one that serves, with one table of descriptors for both, and can
//! do that again when that one was killed: what it had open is still open then.
//! Not trusted: the process that serves. It can close or replace any descriptor of the keeper's; the keeper then fails, and
//! with it the jail, which is what would have happened without one.
//! Why this way: no descriptor is ever sent anywhere, so keeping the guest's files open costs nothing while they are used. The
//! keeper runs nothing that a guest has a say in, and has no capability that it could use by itself: those for the next
//! process are permitted to it and not in effect.

use crate::{
    inner::Jailed,
    sys::process::{self as sys, CapSets, Fork},
};
use nix::{
    errno::Errno,
    sys::{
        signal::Signal,
        wait::{Id, WaitPidFlag, WaitStatus, waitid},
    },
    unistd::Pid,
};
use std::os::fd::OwnedFd;

/// Which process this is after [`Keeper::start`].
#[derive(Debug)]
pub enum Side {
    /// The keeper, which is told about the other one.
    Keeper(Served),
    /// The one that serves, with the jail's capabilities in effect. Nothing that it inherited as an object may be dropped:
    /// that would close the keeper's descriptor.
    Served,
}

/// The process that serves.
#[derive(Debug)]
pub struct Served {
    pid: libc::pid_t,
    /// Readable when it has ended.
    pub pidfd: OwnedFd,
}

/// How it ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Ended {
    /// By itself, with this status.
    Exited(i32),
    /// By this signal.
    Killed(Signal),
}

/// The right to be one. Only a locked jail has it.
#[derive(Debug)]
pub struct Keeper {
    capabilities: u64,
}

/// Asks once more for death with the parent: the kernel forgets that wish of a process that has looked whether it may change
/// its user. To be called while one has a way to learn that the parent is gone already.
///
/// # Errors
/// What prctl(2) says.
pub fn follow_parent() -> Result<(), Errno> {
    sys::die_with_parent()
}

impl Keeper {
    /// Makes this process the keeper: its capabilities are not in effect any more.
    ///
    /// # Errors
    /// What capset(2) says.
    pub fn of(jail: &Jailed) -> Result<Self, Errno> {
        let keeper = Self {
            capabilities: jail.capabilities(),
        };
        keeper.have(0)?;
        Ok(keeper)
    }

    fn have(&self, effective: u64) -> Result<(), Errno> {
        sys::set_capabilities(CapSets {
            effective,
            permitted: self.capabilities,
            inheritable: 0,
        })
    }

    /// Starts a process that serves.
    ///
    /// # Errors
    /// No process could be made; on the other side, its capabilities are refused.
    pub fn start(&self) -> Result<Side, Errno> {
        match sys::fork_beside()? {
            Fork::Parent { pid, pidfd } => Ok(Side::Keeper(Served { pid, pidfd })),
            Fork::Child => self.have(self.capabilities).map(|()| Side::Served),
        }
    }
}

impl Served {
    /// Takes its end, if it has ended.
    ///
    /// # Errors
    /// What waitid(2) says.
    pub fn try_reap(&self) -> Result<Option<Ended>, Errno> {
        self.reap_with(WaitPidFlag::WEXITED | WaitPidFlag::WNOHANG)
    }

    /// Ends it and waits for that.
    ///
    /// # Errors
    /// What kill(2) and waitid(2) say.
    pub fn end(&self) -> Result<Ended, Errno> {
        sys::kill_child(self.pid)?;
        loop {
            match self.reap_with(WaitPidFlag::WEXITED) {
                Ok(Some(ended)) => return Ok(ended),
                Ok(None) | Err(Errno::EINTR) => {}
                Err(errno) => return Err(errno),
            }
        }
    }

    // By number: it is this process's child and not reaped yet, so the number is its own.
    fn reap_with(&self, flags: WaitPidFlag) -> Result<Option<Ended>, Errno> {
        Ok(match waitid(Id::Pid(Pid::from_raw(self.pid)), flags)? {
            WaitStatus::Exited(_, status) => Some(Ended::Exited(status)),
            WaitStatus::Signaled(_, signal, _) => Some(Ended::Killed(signal)),
            _ => None,
        })
    }
}
