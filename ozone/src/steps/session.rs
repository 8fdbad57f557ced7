//! Sessions: of the terminal and of keys.
//!
//! A process with the caller's controlling terminal can put characters into that terminal's input
//! (`TIOCSTI`), where the caller's shell reads them; one with the caller's session keyring possesses the
//! caller's keys. A VM gets neither.

use crate::sys::process as sys;
use nix::{errno::Errno, unistd};

/// Starts a session without a controlling terminal, and one without keys. The terminal's signals
/// go to the caller's processes only from then on.
pub(crate) fn leave() -> Result<(), Errno> {
    unistd::setsid()?;
    match sys::join_new_keyring() {
        // A kernel without keys has nothing to hide.
        Err(Errno::ENOSYS) => Ok(()),
        other => other,
    }
}
