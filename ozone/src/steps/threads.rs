//! The number of threads: forking, and dropping rights for a whole process, need it to be one.

use nix::errno::Errno;

/// How many threads this process has. `/proc/self/task` has a link for each, and two of its own.
pub(crate) fn count() -> Result<u64, Errno> {
    let task = nix::sys::stat::stat("/proc/self/task")?;
    Ok((task.st_nlink as u64).saturating_sub(2))
}
