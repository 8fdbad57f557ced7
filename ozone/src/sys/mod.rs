//! System calls that no dependency wraps, as safe functions with plain arguments.
//!
//! Job: hold this crate's `unsafe`. No policy: what is called in which order is said in `steps/`
//! and `spawn/`.
//! Not trusted: nothing here; arguments come from this crate.
//! Why this way: the calls of the child run between `clone3` and `execveat`, so none of them may
//! allocate, take a lock or touch libc's state, and none does.

#![allow(unsafe_code)] // raw system calls

pub(crate) mod code;
pub(crate) mod process;
pub(crate) mod root;
pub(crate) mod tree;

use nix::errno::Errno;

/// A system call's outcome without a value.
fn check(result: libc::c_long) -> Result<(), Errno> {
    Errno::result(result).map(drop)
}
