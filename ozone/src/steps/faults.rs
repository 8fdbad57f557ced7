//! Fault signals keep their meaning.
//!
//! Rust's runtime catches SIGSEGV and SIGBUS to name a stack overflow, and makes calls in there
//! that no filter allows: a process that faults would seem to have broken its filter. With the
//! default action it dies of what it did.

use crate::sys::process as sys;
use nix::{errno::Errno, sys::signal::Signal};

/// Gives SIGSEGV and SIGBUS their default action.
pub(crate) fn report_plainly() -> Result<(), Errno> {
    sys::default_action(Signal::SIGSEGV)?;
    sys::default_action(Signal::SIGBUS)
}
