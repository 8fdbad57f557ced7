//! Installing a filter: the only `unsafe` of this crate.
//!
//! Job: set `no_new_privs`, then hand the kernel the error-answering filters and the main filter.
//! Not trusted: nobody yet; after the last call the thread itself.
//! Why this way: the filters are `static`, so there is nothing to allocate, parse or free, and
//! after the last `seccomp(2)` no further call is made that the new filter might forbid.

#![allow(unsafe_code)] // seccomp(2) and prctl(2) have no safe wrapper that takes prepared BPF

use crate::{Action, Policy, heap};
use std::io;
use std::sync::atomic::{AtomicU8, Ordering};

/// What [`install`] was last asked for, by policy: 0 nothing, else the action's position plus one.
static ASKED: [AtomicU8; Policy::ALL.len()] = [const { AtomicU8::new(0) }; Policy::ALL.len()];

/// The action that this process installed `policy` with, for any of its threads; `None` if it has not. What other
/// processes did, `/proc/PID/status` tells (`Seccomp`, `Seccomp_filters`), though not the action.
#[must_use]
pub fn in_force(policy: Policy) -> Option<Action> {
    match ASKED.get(policy as usize)?.load(Ordering::Relaxed) {
        1 => Some(Action::Kill),
        2 => Some(Action::Log),
        3 => Some(Action::Trap),
        _ => None,
    }
}

/// Why a filter could not be installed. The thread may then run with some of the filters, never
/// with more rights than before.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// `prctl(PR_SET_NO_NEW_PRIVS)` failed.
    #[error("cannot set no_new_privs")]
    NoNewPrivs(#[source] io::Error),
    /// `seccomp(2)` failed: the kernel has no seccomp, or a filter that is already there forbids
    /// another one.
    #[error("cannot install seccomp policy {policy}")]
    Seccomp {
        /// The policy.
        policy: Policy,
        /// What the kernel said.
        source: io::Error,
    },
    /// Another thread has a filter that this one does not share, so that all threads cannot get
    /// the same.
    #[error("cannot install seccomp policy {policy} for all threads: thread {tid} has its own")]
    Diverged {
        /// The policy.
        policy: Policy,
        /// The thread that differs.
        tid: libc::c_long,
    },
}

/// Installs `policy` for the calling thread and for threads and processes that it starts later.
/// Sets `no_new_privs` and [settles the heap](heap::settle). Cannot be undone.
///
/// # Errors
/// [`Error`]; never [`Error::Diverged`].
pub fn install(policy: Policy, action: Action) -> Result<(), Error> {
    apply(policy, action, 0)
}

/// Installs `policy` for every thread of the process.
///
/// # Errors
/// [`Error`].
pub fn install_all_threads(policy: Policy, action: Action) -> Result<(), Error> {
    apply(policy, action, libc::SECCOMP_FILTER_FLAG_TSYNC)
}

fn apply(policy: Policy, action: Action, flags: libc::c_ulong) -> Result<(), Error> {
    heap::settle();
    // SAFETY: prctl with these arguments reads no memory.
    let set = unsafe { libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) };
    if set != 0 {
        return Err(Error::NoNewPrivs(io::Error::last_os_error()));
    }
    load(policy, policy.program(action), flags)?;
    if let Some(asked) = ASKED.get(policy as usize) {
        asked.store(action as u8 + 1, Ordering::Relaxed);
    }
    Ok(())
}

/// Names `policy` in the call that installs it.
#[must_use]
pub fn mark(policy: Policy) -> u64 {
    MARK | policy as u64
}

/// The policy that this call installs, if it is [`install`]'s call: the fourth argument, which seccomp(2) does not have, says
/// so. For audits, which see a call's number and arguments only.
#[must_use]
pub fn traced(number: i64, args: &[u64; 6]) -> Option<Policy> {
    if number != libc::SYS_seccomp || args[0] != u64::from(libc::SECCOMP_SET_MODE_FILTER) {
        return None;
    }
    let named = |policy: &&Policy| args[3] == mark(**policy);
    Policy::ALL.iter().find(named).copied()
}

/// Bits that no pointer and no small number has.
const MARK: u64 = 0x5ec0_9011_0000_0000;

fn load(
    policy: Policy,
    filter: &'static [libc::sock_filter],
    flags: libc::c_ulong,
) -> Result<(), Error> {
    let program = libc::sock_fprog {
        // seccompiler refuses programs of 4096 instructions and more, so this cannot be cut short.
        len: filter.len() as libc::c_ushort,
        filter: filter.as_ptr().cast_mut(),
    };
    // SAFETY: `program` points to `len` initialised instructions in read-only data that live for
    // the whole run; the kernel copies them and writes nothing.
    let done = unsafe {
        libc::syscall(
            libc::SYS_seccomp,
            libc::SECCOMP_SET_MODE_FILTER,
            flags,
            &raw const program,
            // Not looked at by the kernel: for whoever traces; see `traced`.
            mark(policy),
        )
    };
    match done {
        0 => Ok(()),
        -1 => Err(Error::Seccomp {
            policy,
            source: io::Error::last_os_error(),
        }),
        tid => Err(Error::Diverged { policy, tid }),
    }
}
