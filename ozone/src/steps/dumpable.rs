//! Not dumpable: no core file, no ptrace and no look into `/proc/PID` by others of the same user.
//!
//! Belongs to the inner half, since exec makes a process dumpable again.

use crate::sys::process as sys;
use nix::errno::Errno;

/// Switches dumps on again.
pub(crate) fn switch_on() -> Result<(), Errno> {
    sys::set_dumpable(true)
}

/// Switches dumps off and reads back whether they are.
pub(crate) fn switch_off() -> Result<bool, Errno> {
    sys::set_dumpable(false)?;
    sys::dumpable().map(|on| !on)
}
