//! Whose fault it is: two kinds of errors that a device may return, because they end differently.
//!
//! **Job.** A [`GuestFault`] breaks one queue: it is logged (rate limited), the queue's error eventfd is signalled so that the
//! control process can set `DEVICE_NEEDS_RESET`, and the other queues go on. A [`HostFault`] ends the process, and the broker's
//! restart policy decides what happens next.
//!
//! **Who is not trusted.** The guest: nothing that it writes may become a [`HostFault`], or it could end the process at will.
//!
//! **Why this way.** One error type for both would make `?` choose the wrong ending.

use nix::errno::Errno;
use thiserror::Error;

/// What a driver did wrong with a queue.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Error)]
pub enum FaultKind {
    /// virtio 1.3, 2.7: parts of the queue are not in guest RAM or not aligned.
    #[error("queue addresses are not in guest memory or not aligned")]
    QueueAddress,
    /// virtio 1.3, 2.7.13: more chains available than the queue has entries.
    #[error("available index {index} is more than {size} entries ahead")]
    AvailIndex {
        /// The index that the driver wrote.
        index: u16,
        /// Entries of the queue.
        size: u16,
    },
    /// A descriptor index is not in the table.
    #[error("descriptor index {index} is outside of a table of {size}")]
    DescriptorIndex {
        /// The index.
        index: u16,
        /// Entries of the table.
        size: u32,
    },
    /// virtio 1.3, 2.7.5.2: a chain that never ends.
    #[error("descriptor chain has a loop")]
    Loop,
    /// virtio 1.3, 2.7.4.2: a device-readable descriptor after a device-writable one.
    #[error("readable descriptor after a writable one")]
    Order,
    /// A descriptor or table points outside of guest RAM.
    #[error("descriptor of {len} bytes at {address:#x} is outside of guest memory")]
    OutsideRam {
        /// Guest physical address.
        address: u64,
        /// Its length.
        len: u32,
    },
    /// virtio 1.3, 2.7.4: a chain of more than 2^32 bytes.
    #[error("descriptor chain has more than 4 GiB")]
    TooLarge,
    /// More descriptors or pieces of memory than [`MAX_CHAIN_SEGMENTS`](ipc::limits::MAX_CHAIN_SEGMENTS).
    #[error(
        "descriptor chain has more than {} pieces",
        ipc::limits::MAX_CHAIN_SEGMENTS
    )]
    TooManySegments,
    /// virtio 1.3, 2.7.5.3.1: an indirect table in an indirect table, with a next descriptor, without the feature, or of a
    /// length that is not a positive multiple of 16.
    #[error("malformed indirect descriptor")]
    Indirect,
    /// The used ring is full of requests that were never made available.
    #[error("queue memory cannot be accessed any more")]
    QueueMemory,
    /// The in-flight region that the front end shares is not consistent.
    #[error("in-flight region is not consistent")]
    Inflight,
    /// A request that does not have the parts that its device demands.
    #[error("request is malformed: {0}")]
    Request(&'static str),
}

/// What a driver did wrong, and on which queue.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Error)]
#[error("queue {queue}: {kind}")]
pub struct GuestFault {
    /// Queue index.
    pub queue: u16,
    /// What it was.
    pub kind: FaultKind,
}

/// A system call that must work failed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Error)]
#[error("{call} failed")]
pub struct HostFault {
    /// Its name.
    pub call: &'static str,
    /// What the kernel said.
    #[source]
    pub source: Errno,
    /// The process's exit status, by which the control process may learn what it was.
    pub status: u8,
}

impl HostFault {
    /// For `map_err`.
    pub fn of(call: &'static str) -> impl FnOnce(Errno) -> Self {
        move |source| Self {
            call,
            source,
            status: 1,
        }
    }

    /// The same, telling by the exit status what it was.
    #[must_use]
    pub const fn with_status(self, status: u8) -> Self {
        Self { status, ..self }
    }
}

/// Either kind.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Error)]
pub enum DeviceFault {
    /// Breaks one queue.
    #[error(transparent)]
    Guest(#[from] GuestFault),
    /// Ends the process.
    #[error(transparent)]
    Host(#[from] HostFault),
}
