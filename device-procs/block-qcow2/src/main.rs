//! The process `block-qcow2`: a disk whose image is qcow2.
//!
//! **Job.** Everything about the guest is in the library of `block`; this crate's library adds what a qcow2 image is.
//!
//! **Who is not trusted.** The guest, and the image with all that is below it. What breaks is this process, which has nothing
//! but its images, and whose end the VM outlives.
//!
//! **Why this way.** A program of its own, so that the one for raw images has no parser in it and stays small. It opens nothing: the
//! images below are named on the command line, not in the image, and come as descriptors.

#![forbid(unsafe_code)]

use std::process::ExitCode;

use block_device::Block;

fn main() -> ExitCode {
    device_host::run("block-qcow2", |start, fds| {
        Block::build_formatted(start, |spec| {
            qcow2_disk::open(spec, start.beside, || fds.take())
        })
    })
}
