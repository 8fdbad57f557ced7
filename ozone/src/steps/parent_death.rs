//! Death with the parent.
//!
//! The kernel forgets the wish when a thread changes its user, so it is made after that; exec of a
//! program without set-user-id bits or file capabilities keeps it. A parent that died before the
//! wish was made is noticed by its pidfd, since `getppid` shows nothing across pid namespaces.

use crate::sys::process as sys;
use nix::errno::Errno;
use std::os::fd::RawFd;

/// Asks for SIGKILL at the parent's death. `Err(ESRCH)` if it has died already.
pub(crate) fn follow(parent: RawFd) -> Result<(), Errno> {
    sys::die_with_parent()?;
    if sys::has_ended(parent)? {
        return Err(Errno::ESRCH);
    }
    Ok(())
}
