//! Why a network card cannot be served.

use device_host::HostFault;
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
    /// As many of the kernel's vhost as there are queue pairs, or none.
    #[error("{pairs} queue pairs with vhost need as many descriptors of it, {fds} came")]
    VhostDescriptors {
        /// Pairs in the spec.
        pairs: u16,
        /// Descriptors.
        fds: usize,
    },
    /// The kernel does not serve the queues.
    #[error("vhost=on: descriptor {number} of the kernel's vhost-net cannot be used")]
    Vhost {
        /// Which one, from 0.
        number: usize,
        /// What failed.
        source: HostFault,
    },
    /// A limit that nobody would keep.
    #[error("vhost=on: packets do not pass this program, which cannot limit them")]
    Limits,
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
