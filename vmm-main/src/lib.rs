//! `stratovirt` as a library: the control process and its broker, so that tests and fuzz targets reach every part.
//!
//! **Job.** The binary in `main.rs` is a few lines; everything else is here.
//! **Who is not trusted** is said in each module.

mod affinity;
pub mod boot;
pub mod broker;
pub mod chardev;
pub mod cmdline;
pub mod kvm;
pub mod lifecycle;
pub mod machine;
pub mod memory;
pub mod platform;
pub mod qmp;
pub mod snapshot;
pub mod virtio;
