//! The number of threads: forking, and dropping rights for a whole process, need it to be one.

use nix::errno::Errno;

/// How many threads this process has. `/proc/self/task` has a link for each, and two of its own.
pub(crate) fn count() -> Result<u64, Errno> {
    let task = nix::sys::stat::stat("/proc/self/task")?;
    Ok((task.st_nlink as u64).saturating_sub(2))
}

/// As [`count`], but waits for threads that have ended: one that was joined is counted until the kernel has let go of it,
/// which a busy machine may take its time for.
pub(crate) fn count_lasting() -> Result<u64, Errno> {
    let patience = std::time::Instant::now() + std::time::Duration::from_secs(1);
    loop {
        let count = count()?;
        if count == 1 || std::time::Instant::now() >= patience {
            return Ok(count);
        }
        std::thread::yield_now();
    }
}
