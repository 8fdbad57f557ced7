//! `no_new_privs`: nothing that the process executes gives it rights that it does not have.

use crate::sys::process as sys;
use nix::errno::Errno;

/// Sets it, for good.
pub(crate) fn set() -> Result<(), Errno> {
    sys::set_no_new_privs()
}

/// Reads it back.
pub(crate) fn is_set() -> Result<bool, Errno> {
    sys::no_new_privs()
}
