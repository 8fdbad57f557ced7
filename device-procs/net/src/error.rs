//! Why a network card cannot be served.

use nix::errno::Errno;
use thiserror::Error;

/// Why the device was not built.
#[derive(Debug, Error)]
pub enum BuildError {
    /// The start message is for another device.
    #[error("the start message describes no network card")]
    NotANetDevice,
    /// Descriptors and queue pairs do not match.
    #[error("{pairs} queue pairs need as many tap descriptors, {fds} came")]
    Descriptors {
        /// Pairs in the spec.
        pairs: u16,
        /// Descriptors.
        fds: usize,
    },
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
    /// A call on a tap failed.
    #[error("{call} on tap queue {queue} failed: is it a tap with IFF_VNET_HDR?")]
    Tap {
        /// Its name.
        call: &'static str,
        /// Which descriptor.
        queue: usize,
        /// What the kernel said.
        source: Errno,
    },
}
