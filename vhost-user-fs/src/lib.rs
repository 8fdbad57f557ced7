//! vhost_user_fs: a directory of the host in a guest.
//!
//! **Job.** A virtio-fs device (virtio 1.3, 5.11) as a vhost-user back end: [`fuse`] reads requests, [`passthrough`] does them
//! on files, [`device`] joins both with the queues of the harness.
//! **Who is not trusted.** The guest, the front end, and whoever else changes the shared tree.
//! **Why this way.** The library knows neither command line nor jail, so that the same device serves as a stand-alone daemon
//! and as a process that the VMM's broker starts.

pub mod device;
pub mod fuse;
pub mod passthrough;

pub use device::FsDevice;
