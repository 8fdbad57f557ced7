//! Why a device process cannot be used, or what it failed at.
//!
//! **Job.** One error for all that can be wrong with a device process, or with what the guest's driver says of its queues, and whose fault it is.
//! **Who is not trusted**: the device process; what is told of it here is for people to read.
//! **Why this way.** Whoever talks to a device does the same with each error: the device is without process, and the VM goes on.

use ipc::codec::CodecError;
use nix::errno::Errno;
use thiserror::Error;

use crate::virtio::link::LinkError;
use crate::virtio::window::WindowError;

/// Why a device process cannot be used, or what it failed at.
#[derive(Debug, Error)]
pub enum RemoteError {
    /// Its mapping of guest memory cannot be watched.
    #[error("device {id}: what it touches of guest memory cannot be watched")]
    Watch {
        /// The device.
        id: String,
        /// What the kernel said.
        source: Errno,
    },
    /// It could not be talked to.
    #[error("device \"{id}\"")]
    Link {
        /// Device id.
        id: String,
        /// What went wrong.
        source: LinkError,
    },
    /// An order for its image has no bytes, or what it answers is none of its answers.
    #[error("device \"{id}\": an order for its image")]
    Order {
        /// Device id.
        id: String,
        /// What is wrong.
        source: CodecError,
    },
    /// Its features lack what every device here must have.
    #[error("device \"{id}\" offers {kind} features {got:#x}, but must offer {need:#x}")]
    Features {
        /// Device id.
        id: String,
        /// "virtio" or "vhost-user".
        kind: &'static str,
        /// What it offers.
        got: u64,
        /// What is needed.
        need: u64,
    },
    /// Its features are not those of the process before it.
    #[error(
        "device \"{id}\" offers {kind} features {got:#x}, but its last process offered {need:#x}"
    )]
    Changed {
        /// Device id.
        id: String,
        /// "virtio" or "vhost-user".
        kind: &'static str,
        /// What it offers.
        got: u64,
        /// What was offered before.
        need: u64,
    },
    /// It claims another number of queues than it was started with.
    #[error("device \"{id}\" claims {got} queues, but was started with {want}")]
    Queues {
        /// Device id.
        id: String,
        /// Its claim.
        got: u64,
        /// The spec's number.
        want: u16,
    },
    /// Somebody else's daemon has fewer queues than the device is to have.
    #[error("device \"{id}\": its daemon has {got} queues; with num-request-queues={} {want} are needed", want - 1)]
    FewQueues {
        /// Device id.
        id: String,
        /// What the daemon has.
        got: u64,
        /// What the command line says.
        want: u16,
    },
    /// Somebody else's disk has fewer queues than the device is to have.
    #[error(
        "device \"{id}\": its daemon has {got} queues; with num-queues={want} as many are needed"
    )]
    FewDiskQueues {
        /// Device id.
        id: String,
        /// What the daemon has.
        got: u64,
        /// What the command line says.
        want: u16,
    },
    /// Another process could not go on with what was in flight.
    #[error(
        "device \"{id}\": restart=on needs a daemon that keeps account of requests in flight (VHOST_USER_PROTOCOL_F_INFLIGHT_SHMFD), which its daemon does not: leave restart=on out"
    )]
    NoAccount {
        /// Device id.
        id: String,
    },
    /// Its configuration space is not what was asked for.
    #[error(
        "device \"{id}\" answered {got} bytes of configuration space from offset {offset}, asked were {want} from 0"
    )]
    Config {
        /// Device id.
        id: String,
        /// Bytes that came.
        got: usize,
        /// Offset that it named.
        offset: u32,
        /// Bytes that were asked for.
        want: usize,
    },
    /// Its window has another size than it was started with.
    #[error("device \"{id}\" has a window of {got} bytes, but was started with {want}")]
    WindowSize {
        /// Device id.
        id: String,
        /// What it says.
        got: u64,
        /// The spec's number.
        want: u64,
    },
    /// There is no way to its window.
    #[error("device \"{id}\"")]
    Window {
        /// Device id.
        id: String,
        /// Why.
        source: WindowError,
    },
    /// Where a queue goes on is nowhere.
    #[error(
        "device \"{id}\" was asked where queue {queue} goes on, and answered with index {} of queue {}; allowed: index 0 to 65535 of that queue", got >> 32, *got as u32
    )]
    Base {
        /// Device id.
        id: String,
        /// Queue number.
        queue: u16,
        /// `struct vring_state` as it came: the queue's number in the lower half.
        got: u64,
    },
    /// Its in-flight region is not usable.
    #[error("device \"{id}\" gave an in-flight region without {what}")]
    Inflight {
        /// Device id.
        id: String,
        /// What it lacks.
        what: &'static str,
    },
    /// Its in-flight region cannot be read or written.
    #[error("in-flight region of device \"{id}\" cannot be {what}")]
    InflightAccess {
        /// Device id.
        id: String,
        /// "saved" or "restored".
        what: &'static str,
        /// What the kernel said.
        source: std::io::Error,
    },
    /// What it holds for the guest cannot be part of a snapshot.
    #[error(
        "device \"{id}\": what its process holds for the guest, and no register tells, cannot be {what}: {why}"
    )]
    State {
        /// Device id.
        id: String,
        /// "saved" or "restored".
        what: &'static str,
        /// Why.
        why: &'static str,
    },
    /// The file that its state goes through cannot be used.
    #[error("device \"{id}\": what its process holds for the guest cannot be {what}")]
    StateFile {
        /// Device id.
        id: String,
        /// "saved" or "restored".
        what: &'static str,
        /// What the kernel said.
        source: std::io::Error,
    },
    /// Its queues stand still for a snapshot.
    #[error("device \"{id}\" is part of a snapshot that is being made or read")]
    Held {
        /// Device id.
        id: String,
    },
    /// It failed before, and no process is there yet or any more.
    #[error("device \"{id}\" has no process that answers")]
    Failed {
        /// Device id.
        id: String,
    },
    /// Guest RAM cannot be shared with it.
    #[error("guest RAM cannot be shared with a device: {what}")]
    Memory {
        /// Why.
        what: &'static str,
    },
    /// The guest's driver put a queue outside of RAM.
    #[error(
        "queue {queue} of device \"{id}\" has its {part} at {address:#x}, outside of guest RAM"
    )]
    QueueAddress {
        /// Device id.
        id: String,
        /// Queue number.
        queue: u16,
        /// Which ring.
        part: &'static str,
        /// Its guest-physical address.
        address: u64,
    },
}

impl RemoteError {
    /// Whether the guest's driver is to blame, and the device process is as good as before.
    pub const fn is_guests_fault(&self) -> bool {
        matches!(self, Self::QueueAddress { .. })
    }

    /// Whether the device process closed its socket, as one does that ends.
    pub const fn is_hang_up(&self) -> bool {
        matches!(
            self,
            Self::Link {
                source: LinkError::Closed,
                ..
            }
        )
    }
}
