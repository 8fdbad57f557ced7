//! Threads that move data, as many as are wanted.
//!
//! **Job.** Starts them, each behind the filter that it has for itself. **Who is not trusted.** They, from there on.
//! **Why this way.** They are started when the process is in its jail, so that they have its rights and no others, and before the
//! filter of the thread that serves, which lets nothing be started.

use device_host::{Movers, MoversError};
use fs_device::device::Moved;
use seccomp_policies::{Action, Policy};

/// Threads when nothing is said, on a host of many processors: more copies at a time than its memory is fast for.
const MOST: usize = 3;

/// How many threads this host is good for: one for each processor that the serving thread does not take.
pub(crate) fn sensible() -> usize {
    processors().saturating_sub(1).min(MOST)
}

/// Starts `count` threads; `None` without any.
pub(crate) fn start(
    count: usize,
    action: Option<Action>,
) -> Result<Option<Movers<Moved>>, MoversError> {
    if count == 0 {
        return Ok(None);
    }
    Movers::start(count, move || {
        action.map_or(Ok(()), |action| {
            seccomp_policies::install(Policy::FsMover, action).map_err(|e| e.to_string())
        })
    })
    .map(Some)
}

/// Those that this process may run on.
fn processors() -> usize {
    nix::sched::sched_getaffinity(nix::unistd::Pid::from_raw(0)).map_or(1, |set| {
        (0..nix::sched::CpuSet::count())
            .filter(|cpu| set.is_set(*cpu).unwrap_or(false))
            .count()
    })
}
