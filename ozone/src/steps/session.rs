//! Sessions: of the terminal and of keys.
//!
//! A process with the caller's controlling terminal can put characters into that terminal's input
//! (`TIOCSTI`), where the caller's shell reads them; one with the caller's session keyring possesses the
//! caller's keys. A signal to "the own process group" reaches every process of the caller's, pid namespaces notwithstanding.
//! Neither a VM nor a device process gets any of these.

use crate::sys::process as sys;
use nix::{errno::Errno, unistd};

/// Starts a session without a controlling terminal, and one without keys. The terminal's signals
/// go to the caller's processes only from then on.
pub(crate) fn leave() -> Result<(), Errno> {
    leave_terminal()?;
    leave_keys()
}

/// Starts a session and a process group without a controlling terminal.
pub(crate) fn leave_terminal() -> Result<(), Errno> {
    unistd::setsid().map(drop)
}

/// Starts a session without keys.
pub(crate) fn leave_keys() -> Result<(), Errno> {
    match sys::join_new_keyring() {
        // A kernel without keys has nothing to hide.
        Err(Errno::ENOSYS) => Ok(()),
        other => other,
    }
}
