//! What a front end's memory or descriptors would otherwise kill this process with.
//!
//! **Job.** Guest RAM is a file of the front end's. One that makes its file shorter while it is mapped turns an access into
//! SIGBUS: here it ends the process in order, with a line in the log. A descriptor that grows a file beyond this process's
//! limit would be SIGXFSZ: the call fails instead.
//!
//! **Who is not trusted.** The front end. Ours seals its memory against shrinking; others need not.
//!
//! **Why this way.** Seals cannot be demanded: huge pages and files of `-mem-path` have none, nor have all memfds of foreign
//! front ends. What the handler does is two system calls that every filter allows; a page that is gone cannot be repaired.

#![allow(unsafe_code)] // signal handlers

use std::os::fd::AsRawFd;
use std::os::raw::c_int;

use nix::errno::Errno;
use nix::sys::signal::{SaFlags, SigAction, SigHandler, SigSet, Signal, sigaction};

use crate::fault::HostFault;

/// Without a time: nothing but plain system calls is allowed in a handler.
const LAST_WORDS: &[u8] =
    b"ERROR guest memory: the front end's file ends before a page that is in use (it was made shorter)\n";

extern "C" fn memory_is_gone(_: c_int) {
    // Looking at what was set once takes no lock.
    let log = ipc::log::descriptor().map_or(ipc::start::FD_LOG, |fd| fd.as_raw_fd());
    // SAFETY: write and _exit may be called in a handler; the bytes are static.
    unsafe {
        libc::write(log, LAST_WORDS.as_ptr().cast(), LAST_WORDS.len());
        libc::_exit(1);
    }
}

/// For the rest of this process's life. Before its filter, which allows no change any more.
pub(crate) fn prepare() -> Result<(), HostFault> {
    let set = |signal, handler| {
        let action = SigAction::new(handler, SaFlags::empty(), SigSet::empty());
        // SAFETY: the handler above touches nothing that the code that it interrupts could be changing.
        unsafe { sigaction(signal, &action) }.map(drop)
    };
    set(Signal::SIGBUS, SigHandler::Handler(memory_is_gone))
        .and_then(|()| set(Signal::SIGXFSZ, SigHandler::SigIgn))
        .map_err(|errno: Errno| HostFault::of("sigaction")(errno))
}
