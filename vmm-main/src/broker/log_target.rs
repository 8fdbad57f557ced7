//! The log on standard error.
//!
//! **Job.** The one descriptor that this VM's processes log to when no `-D` names a file: standard error.
//! **Who is not trusted**: who reads the log, or does not; and a device process, which can write enough to fill any pipe.
//! **Why this way.** A write that waits for a reader stops the broker, and then nobody ends the device processes of a VM
//! that was killed. So what can wait gets an open file description of its own with `O_NONBLOCK`: that of standard error is
//! shared with the caller's shell, whose flags are not ours to change. Lines that find no room are lost.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::{FileTypeExt, OpenOptionsExt};

const NEVER_WAIT: i32 = libc::O_NONBLOCK | libc::O_NOCTTY;

/// Standard error.
pub(super) fn standard_error() -> io::Result<OwnedFd> {
    let shared = io::stderr().as_fd().try_clone_to_owned()?;
    never_waits(shared)
}

/// A descriptor for what `shared` leads to on which no write waits, where the kernel has a way to get one.
fn never_waits(shared: OwnedFd) -> io::Result<OwnedFd> {
    let file = File::from(shared);
    let kind = file.metadata()?.file_type();
    if !kind.is_fifo() && !kind.is_char_device() {
        // A regular file never waits. A socket cannot be opened again.
        return Ok(file.into());
    }
    let number = std::os::fd::AsRawFd::as_raw_fd(&file);
    // Without /proc, or for a terminal of another mount namespace: waiting is better than no log at all.
    Ok(File::options()
        .write(true)
        .custom_flags(NEVER_WAIT)
        .open(format!("/proc/self/fd/{number}"))
        .unwrap_or(file)
        .into())
}

#[cfg(test)]
mod tests {
    use super::*;
    use nix::errno::Errno;
    use nix::fcntl::{FcntlArg, OFlag, fcntl};

    #[test]
    fn a_pipe_that_nobody_reads_is_full_and_not_waited_for() {
        let (_reader, writer) = io::pipe().unwrap();
        let shared = OwnedFd::from(writer);
        let log = never_waits(shared.try_clone().unwrap()).unwrap();
        let full = (0..1000).find_map(|_| nix::unistd::write(&log, &[b'x'; 4096]).err());
        assert_eq!(full, Some(Errno::EAGAIN));
        let flags = OFlag::from_bits_retain(fcntl(&shared, FcntlArg::F_GETFL).unwrap());
        assert!(!flags.contains(OFlag::O_NONBLOCK), "the caller's own flags");
    }
}
