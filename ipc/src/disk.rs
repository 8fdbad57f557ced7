//! What the control process has a disk's process do beside virtio: internal snapshots of its image.
//!
//! **Job.** An order and its answer as plain data, and where their bytes are written and read by vhost-user's configuration messages
//! that carry the flag of the host: the driver, whose messages have none, cannot get there. **Who is not trusted.** Each by the other:
//! both are bounded, and what is no whole message is none. **Why this way.** A device's process has no other socket than this one, and its
//! messages are at most 256 bytes long, which a name may be.

use serde::{Deserialize, Serialize};

/// The first part of an order is written here, and ends what was before.
pub const BEGIN: usize = 64;
/// Where each further part is written.
pub const MORE: usize = 65;
/// A write here has the order carried out.
pub const RUN: usize = 66;
/// A write of four bytes here, little endian, says from which byte of the answer on is read next.
pub const SEEK: usize = 67;
/// Bytes of one part of an order.
pub const PART: usize = 128;
/// Bytes that are read of an answer at once, from offset 0. The first four of the answer are its length without them, little endian.
pub const PAGE: usize = 256;

/// What is to be done.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum Order {
    /// Tell what there is.
    List,
    /// Make a snapshot of the disk as it is between two requests.
    Create {
        /// Its name.
        name: String,
        /// Seconds since 1970.
        seconds: u32,
        /// And nanoseconds.
        nanoseconds: u32,
        /// Nanoseconds that the guest has been running.
        clock: u64,
    },
    /// Take away the first one that has all of what is given.
    Delete {
        /// Its id.
        id: Option<String>,
        /// Its name.
        name: Option<String>,
    },
}

/// What came of it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum Answer {
    /// Of [`Order::List`].
    Image {
        /// Bytes of a cluster.
        cluster: u32,
        /// In the order of the image.
        snapshots: Vec<Snapshot>,
    },
    /// Of [`Order::Create`].
    Created,
    /// There is one with that name.
    Exists,
    /// Of [`Order::Delete`]: the one that was.
    Deleted(Snapshot),
    /// There is none like that.
    Unknown,
    /// This errno.
    Failed(i32),
}

/// An internal snapshot of a qcow2 image (qcow2's specification, "Snapshots").
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Snapshot {
    /// Unique in the image.
    pub id: String,
    /// May be empty, and is unique among those that were made by name.
    pub name: String,
    /// Bytes of the VM's state in it.
    pub vm_state: u64,
    /// Seconds since 1970.
    pub seconds: u32,
    /// And nanoseconds.
    pub nanoseconds: u32,
    /// Nanoseconds that the guest had been running.
    pub clock: u64,
    /// Instructions that it had executed, if somebody counted.
    pub icount: Option<u64>,
}
