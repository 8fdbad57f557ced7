//! `-daemonize`: the caller's process returns when the VM is set up, with status 0, or with 1 when it could not be.
//!
//! **Job.** Fork before anything else; the parent waits for one byte. The child leads its own session, and lets the
//! caller's terminal go when it says that it is ready.
//! **Why this way.** A manager that starts a daemon wants to know from its exit status whether there is a VM, and wants its
//! errors on standard error until then.

#![allow(unsafe_code)] // fork

use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::process::ExitCode;

use nix::errno::Errno;
use nix::unistd::ForkResult;
use thiserror::Error;

/// Why this process could not become a daemon.
#[derive(Debug, Error)]
#[error("-daemonize: {step} failed")]
pub(super) struct DaemonError {
    step: &'static str,
    source: Errno,
}

/// Which side of the fork this is.
#[derive(Debug)]
pub(super) enum Side {
    /// The caller's process: return this status.
    Caller(ExitCode),
    /// The daemon: say [`Ready::tell`] when the VM is set up.
    Daemon(Ready),
}

/// The daemon's word to the caller's process. Dropped without a word, the caller's process returns 1.
#[derive(Debug)]
pub(super) struct Ready {
    pipe: File,
    null: OwnedFd,
}

/// Forks. Must be called while this process has one thread.
pub(super) fn detach() -> Result<Side, DaemonError> {
    let failed = |step| move |source| DaemonError { step, source };
    let (reader, writer) =
        nix::unistd::pipe2(nix::fcntl::OFlag::O_CLOEXEC).map_err(failed("pipe"))?;
    let null = nix::fcntl::open(
        "/dev/null",
        nix::fcntl::OFlag::O_RDWR | nix::fcntl::OFlag::O_CLOEXEC,
        nix::sys::stat::Mode::empty(),
    )
    .map_err(failed("opening /dev/null"))?;
    // SAFETY: this process has one thread, so the child may go on as it likes.
    match unsafe { nix::unistd::fork() }.map_err(failed("fork"))? {
        ForkResult::Parent { .. } => {
            drop(writer);
            let mut word = [0u8];
            let ready = File::from(reader).read_exact(&mut word).is_ok();
            Ok(Side::Caller(if ready {
                ExitCode::SUCCESS
            } else {
                ExitCode::FAILURE
            }))
        }
        ForkResult::Child => {
            nix::unistd::setsid().map_err(failed("setsid"))?;
            Ok(Side::Daemon(Ready {
                pipe: writer.into(),
                null,
            }))
        }
    }
}

impl Ready {
    /// What must stay open until then.
    pub(super) fn descriptors(&self) -> [RawFd; 2] {
        [self.pipe.as_raw_fd(), self.null.as_raw_fd()]
    }

    /// Lets go of the caller's standard streams and of the caller. Errors that come later go to the log file; with `and_log`
    /// there is none, and the log too lets go of standard error.
    pub(super) fn tell(mut self, and_log: bool) -> Result<(), DaemonError> {
        let log = ipc::log::descriptor()
            .filter(|_| and_log)
            .map(|log| log.as_raw_fd());
        for standard in (0..3).chain(log) {
            // SAFETY: 0 to 2 are the standard streams, which nobody owns as a Rust value; the log's owner keeps its number,
            // which leads to /dev/null from here on.
            Errno::result(unsafe { libc::dup2(self.null.as_raw_fd(), standard) }).map_err(
                |source| DaemonError {
                    step: "dup2",
                    source,
                },
            )?;
        }
        // A caller that is gone does not matter any more.
        let _ = self.pipe.write_all(b"1");
        Ok(())
    }
}
