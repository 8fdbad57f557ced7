//! virtio-blk in a process of its own (virtio 1.3, section 5.2).
//!
//! **Job.** Serves one disk to one guest: requests from the rings become I/O on one descriptor, many at once. `device.rs` is the device, `request.rs` the wire format, `config_space.rs` what the driver reads first,
//! `standalone/` the program without a VM around it, `backend/` what an image is, `engine.rs` how bytes move, `formatted.rs` where images with a format of their own come in, `throttle.rs` how fast.
//!
//! **Who is not trusted.** The guest: sectors, lengths and buffers are its choice. The image: only its size is looked at.
//!
//! **Why this way.** The process has one image descriptor, its rings, and no way to open anything.

#![forbid(unsafe_code)]

mod backend;
mod config_space;
mod device;
mod engine;
mod error;
mod formatted;
mod orders;
mod request;
mod run;
pub mod standalone;
mod throttle;

pub use device::Block;
pub use error::BuildError;
pub use formatted::Format;
