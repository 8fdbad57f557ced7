//! Resource limits.
//!
//! They are only ever lowered, soft and hard alike: raising needs a privilege that the broker need
//! not have. A wanted value above the caller's own hard limit becomes that limit.

use nix::{
    errno::Errno,
    sys::resource::{Resource, getrlimit, setrlimit},
};

/// Limits of a device process.
///
/// A core file is never written, POSIX message queues and real-time priority are always off.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Limits {
    /// Highest descriptor number plus one. Guest RAM, kicks and calls of every queue arrive later,
    /// so it is more than what the process starts with.
    pub descriptors: u64,
    /// Threads of the process's user in its own user namespace, io_uring's workers included.
    pub threads: u64,
    /// Bytes of private memory that can be written, the program's own included (`RLIMIT_DATA`). Guest RAM is shared, so it
    /// does not count.
    pub memory: u64,
    /// Largest offset that may be written in a file, in bytes; `None` for devices that write
    /// images. A memfd that the process sizes itself counts as a file; guest RAM that arrives
    /// mapped is not affected, nor are pipes and sockets.
    pub file_size: Option<u64>,
    /// Bytes of memory that may be locked: buffers registered with io_uring.
    pub locked_memory: u64,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            descriptors: 256,
            threads: 16,
            memory: 128 << 20,
            file_size: Some(0),
            locked_memory: 0,
        }
    }
}

/// Applies the limits to this process.
pub(crate) fn apply(limits: &Limits) -> Result<(), Errno> {
    let unlimited = nix::libc::RLIM_INFINITY;
    let all = [
        (Resource::RLIMIT_CORE, 0),
        (Resource::RLIMIT_MSGQUEUE, 0),
        (Resource::RLIMIT_RTPRIO, 0),
        (
            Resource::RLIMIT_FSIZE,
            limits.file_size.unwrap_or(unlimited),
        ),
        (Resource::RLIMIT_DATA, limits.memory),
        (Resource::RLIMIT_MEMLOCK, limits.locked_memory),
        (Resource::RLIMIT_NPROC, limits.threads),
        (Resource::RLIMIT_NOFILE, limits.descriptors),
    ];
    for (resource, wanted) in all {
        let (_, hard) = getrlimit(resource)?;
        let value = wanted.min(hard);
        setrlimit(resource, value, value)?;
    }
    Ok(())
}

/// Most descriptors of the control process or its broker.
const VM_DESCRIPTORS: u64 = 4096;

/// Limits of a whole VM: those that do no harm to a control process of any size. The number of
/// processes is not limited here, since it would count those of other VMs of the same user.
pub(crate) fn apply_to_vm() -> Result<(), Errno> {
    let all = [
        (Resource::RLIMIT_CORE, 0),
        (Resource::RLIMIT_MSGQUEUE, 0),
        (Resource::RLIMIT_NOFILE, VM_DESCRIPTORS),
    ];
    for (resource, wanted) in all {
        let (_, hard) = getrlimit(resource)?;
        let value = wanted.min(hard);
        setrlimit(resource, value, value)?;
    }
    Ok(())
}
