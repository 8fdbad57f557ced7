//! placeholder
pub mod chardev;
pub mod cmdline;
pub mod kvm;
pub mod memory;
pub mod boot;
pub mod machine;
pub mod platform;
pub mod virtio;
