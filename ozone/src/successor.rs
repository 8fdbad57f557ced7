//! Another program beside this process, for a try, and in its place.
//!
//! Job: start a program with some descriptors on the numbers that they have, hear what it says until it ends; execute it, or
//! one that is open, in place of the program that runs.
//! Not trusted: what the program that is tried says, beyond its length.
//! Why this way: a process that waits outside of a jail shares its descriptors with the one inside, so what it executes is
//! named by a path while that one lives, and never by a number: behind that there might be a file of the guest's.

use crate::{
    sys::process::{self as sys, Argv},
    tree::Ended,
};
use nix::{
    errno::Errno,
    poll::{PollFd, PollFlags, PollTimeout, poll},
    sys::wait::WaitPidFlag,
    unistd,
};
use std::{
    collections::BTreeSet,
    ffi::{CStr, CString},
    os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd},
    time::{Duration, Instant},
};

/// Bytes of what a program says that are read.
const SAID: usize = 2048;

/// What a program is started with.
pub struct Words {
    argv: Argv,
    environment: Argv,
}

impl Words {
    /// Arguments, the program's name first, and environment, as `NAME=VALUE`.
    #[must_use]
    pub fn new(arguments: Vec<CString>, environment: Vec<CString>) -> Self {
        Self {
            argv: Argv::new(arguments),
            environment: Argv::new(environment),
        }
    }
}

/// What became of a program that was tried.
#[derive(Debug)]
pub struct Tried {
    /// What it said.
    pub said: Vec<u8>,
    /// How it ended; `None` if it had to be ended, because it took too long.
    pub ended: Option<Ended>,
}

/// Starts the program at `path` in a process beside this one, which has a copy of the descriptors 0 to 2 and `kept`, and no
/// others, and waits for its end, for `patience` at most. What it writes to the other end of `hears`, `says`, is what it says.
///
/// The caller must be the process's only thread.
///
/// # Errors
/// It could not be started, or not be waited for. That there is no such program is its own end, with status 127, and what it says.
pub fn try_out(
    path: &CStr,
    words: &Words,
    kept: &[RawFd],
    (hears, says): (OwnedFd, OwnedFd),
    patience: Duration,
) -> Result<Tried, Errno> {
    let Some(child) = sys::fork_plainly()? else {
        let errno = execute_alone(path, words, kept, says.as_raw_fd());
        sys::tell(says.as_raw_fd(), errno.desc().as_bytes());
        sys::exit_now(127);
    };
    // The child has it: then its end is the end of what is said.
    drop(says);
    let deadline = Instant::now() + patience;
    let heard = sys::pidfd(child).and_then(|process| {
        let said = listen(hears.as_fd(), deadline)?;
        Ok((said, is_ready(process.as_fd(), deadline)?))
    });
    if !matches!(heard, Ok((_, true))) {
        // It may have ended by itself meanwhile.
        let _ = sys::kill_child(child);
    }
    let ended = Ended::of(child, WaitPidFlag::WEXITED)?;
    let (said, ended_by_itself) = heard?;
    Ok(Tried {
        said,
        ended: ended.filter(|_| ended_by_itself),
    })
}

fn execute_alone(path: &CStr, words: &Words, kept: &[RawFd], says: RawFd) -> Errno {
    let numbers: BTreeSet<u32> = kept
        .iter()
        .chain([&says])
        .filter_map(|fd| u32::try_from(*fd).ok())
        .filter(|fd| *fd > 2)
        .collect();
    let mut next = 3;
    let mut all = || -> Result<(), Errno> {
        sys::die_with_parent()?;
        for &number in &numbers {
            if number > next {
                sys::close_inherited(next, number - 1)?;
            }
            sys::keep_number_at_exec(number.cast_signed())?;
            next = number + 1;
        }
        sys::close_inherited(next, u32::MAX)
    };
    match all() {
        Ok(()) => sys::exec_path(path, &words.argv, &words.environment),
        Err(errno) => errno,
    }
}

/// What is said until the other end is closed.
fn listen(hears: BorrowedFd<'_>, deadline: Instant) -> Result<Vec<u8>, Errno> {
    let mut said = Vec::new();
    while said.len() < SAID && is_ready(hears, deadline)? {
        let mut some = [0; 256];
        match unistd::read(hears, &mut some) {
            Ok(0) => break,
            Ok(len) => said.extend_from_slice(&some[..len]),
            Err(Errno::EINTR) => {}
            Err(errno) => return Err(errno),
        }
    }
    Ok(said)
}

/// Waits until `fd` can be read; `false` after `deadline`.
fn is_ready(fd: BorrowedFd<'_>, deadline: Instant) -> Result<bool, Errno> {
    loop {
        let left = deadline.saturating_duration_since(Instant::now());
        let timeout = PollTimeout::try_from(left).unwrap_or(PollTimeout::MAX);
        match poll(&mut [PollFd::new(fd, PollFlags::POLLIN)], timeout) {
            Err(Errno::EINTR) => {}
            other => return other.map(|count| count > 0),
        }
    }
}

/// Lets the program that is executed next have descriptor `fd`, on the same number.
///
/// # Errors
/// It is not open.
pub fn hand_on(fd: RawFd) -> Result<(), Errno> {
    sys::keep_number_at_exec(fd)
}

/// Has all descriptors from 3 on closed when another program is executed, but those that are [handed on](hand_on) from now on.
///
/// # Errors
/// What close_range(2) says.
pub fn hand_on_nothing() -> Result<(), Errno> {
    sys::close_at_exec(3, u32::MAX)
}

/// Executes the program at `path` in place of this one. Returns only on failure.
#[must_use]
pub fn take_place(path: &CStr, words: &Words) -> Errno {
    sys::exec_path(path, &words.argv, &words.environment)
}

/// As [`take_place`], of a program that is open.
#[must_use]
pub fn give_place_back(program: BorrowedFd<'_>, words: &Words) -> Errno {
    sys::exec_open(program, &words.argv, &words.environment)
}
