//! The process `block-qcow2`: a disk whose image is qcow2.
//!
//! **Job.** Everything about the guest is in the library of `block`; this program adds what a qcow2 image is: `header.rs` looks at
//! it before anything else does, `image.rs` reads and writes it, `storage.rs` moves bytes on its descriptors.
//!
//! **Who is not trusted.** The guest, and the image with all that is below it: whoever made it may have made it to break this
//! process. What it says about sizes is checked before memory is taken for it; what breaks is this process, which has nothing
//! but its images, and whose end the VM outlives.
//!
//! **Why this way.** A program of its own, so that the one for raw images has no parser in it and stays small. It opens nothing: the
//! images below are named on the command line, not in the image, and come as descriptors.

#![deny(unsafe_code)]

mod header;
mod image;
mod storage;

use std::process::ExitCode;

use block_device::{Block, BuildError};

fn main() -> ExitCode {
    device_host::run("block-qcow2", |start, fds| {
        Block::build_formatted(start, |spec| {
            let image = image::Qcow2Image::open(spec, || fds.take())
                .map_err(|e| BuildError::Formatted(Box::new(e)))?;
            Ok(Box::new(image))
        })
    })
}
