//! virtio-net in a process of its own (virtio 1.3, section 5.1).
//!
//! **Job.** Carries packets between a guest's queues and the queues of one tap. `device.rs` is the device, `header.rs` the
//! header in front of each packet, `receive.rs` and `transmit.rs` the two directions, `control.rs` the control queue,
//! `filter.rs` what the driver wants to receive, `limit.rs` how much may pass, `kept.rs` what outlives the process, `announce.rs` where a guest is,
//! `features.rs` what is offered, `config_space.rs` what the driver reads first, `backend/` the tap, `standalone/` the program without a VM's broker.
//!
//! **Who is not trusted.** The guest: headers, lengths, buffers. The network: of a packet no more is looked at than two addresses and a VLAN tag, and that only for a
//! driver that asks for it.
//!
//! **Why this way.** The process has the tap's descriptors and its rings; checksums and segmentation are the kernel's work.

#![forbid(unsafe_code)]

mod announce;
mod backend;
mod config_space;
mod control;
mod device;
mod error;
mod features;
mod filter;
mod header;
mod kept;
mod limit;
mod receive;
pub mod standalone;
mod transmit;

pub use device::Net;
pub use error::BuildError;
