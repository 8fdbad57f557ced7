//! Why a disk cannot be served.

use nix::errno::Errno;
use thiserror::Error;

/// Why the device was not built.
#[derive(Debug, Error)]
pub enum BuildError {
    /// The start message is for another device.
    #[error("the start message describes no disk")]
    NotABlockDevice,
    /// It is not for this program.
    #[error("the start message is for an image in another format")]
    Format,
    /// The image in its own format cannot be served.
    #[error("image")]
    Formatted(#[source] Box<dyn std::error::Error + Send + Sync>),
    /// No descriptor came with it.
    #[error("a disk needs one back-end descriptor, its image")]
    NoImage,
    /// Out of range.
    #[error("{property}={value}: {allowed} is allowed")]
    Property {
        /// Name in the spec.
        property: &'static str,
        /// What it was.
        value: u64,
        /// What it may be.
        allowed: &'static str,
    },
    /// The descriptor's flags and the spec disagree.
    #[error("image descriptor is {is}, the disk is to be {wanted}")]
    Flags {
        /// What the descriptor can do.
        is: &'static str,
        /// What the spec says.
        wanted: &'static str,
    },
    /// The image is no file or block device.
    #[error("image is no regular file or block device (mode {mode:#o})")]
    Kind {
        /// `st_mode`.
        mode: u32,
    },
    /// `aio=io_uring` on a host that does not give it.
    #[error(
        "io_uring cannot be had (Linux 5.15 or newer and kernel.io_uring_disabled=0 are needed); aio=off does without"
    )]
    Engine {
        /// What the kernel said.
        source: Errno,
    },
    /// A call on the image failed.
    #[error("{call} on the image failed")]
    Image {
        /// Its name.
        call: &'static str,
        /// What the kernel said.
        source: Errno,
    },
}
