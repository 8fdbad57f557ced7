//! What a qcow2 image is to the disk's process.
//!
//! **Job.** `header.rs` looks at the image before anything else does, `counts.rs` mends what a killed process left, `image.rs` reads and writes it,
//! `snapshots.rs` makes and takes away what is kept of it, by way of `mappings.rs` and `refcounts.rs`, `storage.rs` moves bytes on its
//! descriptors. **Who is not trusted.** The image and all that is below it: whoever made it may have made it to break this
//! process. What it says about sizes is checked before memory is taken for it. **Why this way.** A library beside the program, so that
//! the fuzz target `qcow2` takes the process's own way in; that way is all that it shows.

#![deny(unsafe_code)]

mod counts;
mod header;
mod image;
mod mappings;
mod refcounts;
mod snapshots;
mod storage;

use std::os::fd::OwnedFd;

pub use block_device::Format;

use block_device::BuildError;
use ipc::spec::block::BlockSpec;

/// Opens the disk that `spec` describes; `next` gives the descriptors of its images, the disk's own first. `beside`: another process
/// writes it until the first request comes here, so that its tables are read then.
///
/// # Errors
/// [`BuildError::Formatted`]: an image cannot be read, is refused, or is missing.
pub fn open(
    spec: &BlockSpec,
    beside: bool,
    next: impl FnMut() -> Option<OwnedFd>,
) -> Result<Box<dyn Format>, BuildError> {
    let image = image::Qcow2Image::open(spec, beside, next)
        .map_err(|e| BuildError::Formatted(Box::new(e)))?;
    Ok(Box::new(image))
}
