//! A network card as its device process sees it: no tap name, only properties; the tap's queues are descriptors 5…, and with vhost
//! those of the kernel's vhost-net follow.

use serde::{Deserialize, Serialize};

/// What the `net` process is told. Its back-end descriptors are `queue_pairs` queues of one tap device, made by the
/// broker with `IFF_TAP | IFF_NO_PI | IFF_VNET_HDR`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct NetSpec {
    /// Device id, for logs.
    pub id: String,
    /// MAC address that the guest is told.
    pub mac: [u8; 6],
    /// Receive and transmit queue pairs: 1 to 16. As many tap descriptors follow.
    pub queue_pairs: u16,
    /// Entries of a queue: a power of two, 256 to 4096.
    pub queue_size: u16,
    /// It has a control queue. Without one the front end tells which pairs are in use: that of another VMM, or a daemon of
    /// somebody else's.
    pub control_queue: bool,
    /// The kernel's vhost-net passes the packets: as many descriptors of `/dev/vhost-net` as of the tap follow those. No limits then.
    pub vhost: bool,
    /// What may pass in a time.
    pub limits: NetLimits,
    /// The card was taken out, and its guest's driver still has it: this process answers what the driver says on the control queue, and
    /// does nothing else. The features that the card offered; no descriptors follow.
    pub stands_in: Option<u64>,
    /// Microseconds of looking for more packets before sleeping; 0 with `vhost`, where this process passes none.
    pub poll_us: u32,
}

/// Limits of a card, all its queues together.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct NetLimits {
    /// To the guest.
    pub rx: Limit,
    /// From the guest.
    pub tx: Limit,
}

/// Limits of one direction.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Limit {
    /// Packets.
    pub packets: Bucket,
    /// Bytes of packets, with their Ethernet headers.
    pub bytes: Bucket,
}

/// A bucket that is full at first and fills up steadily.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Bucket {
    /// A second; 0 is no limit.
    pub rate: u64,
    /// What a full one holds: what may pass at once after a pause.
    pub burst: u64,
}

impl NetSpec {
    /// Virtqueues: a pair each, and the control queue, if it has one (virtio 1.3, 5.1.2).
    pub const fn num_queues(&self) -> u16 {
        2 * self.queue_pairs + self.control_queue as u16
    }
}
