//! Virtio devices as the guest sees them, without anything that moves data.
//!
//! **Job.** [`core`] is what all transports share: status, features, queue addresses, configuration space. [`mmio`] puts
//! registers in front of it. [`remote`] speaks vhost-user with the device process behind it, over [`link`]. [`attention`] is how a process
//! that does not obey gets ended, and [`snapshot`] is a device in a snapshot. [`window`] is
//! guest memory into which a shared folder's process has files mapped.
//!
//! **Who is not trusted**: the guest, which writes every register with any value in any order, and the device process.
//!
//! **Why this way.** No ring is read here: the process that holds KVM knows where queues are and never what is in them.

pub mod attention;
pub mod core;
mod link;
pub mod mmio;
pub mod remote;
pub mod snapshot;
pub mod window;

#[cfg(test)]
mod fake_device;

pub use link::LinkError;
