//! What a device process has to offer, and what of it a driver is offered.
//!
//! **Job.** The features and the configuration space of each kind of device: of a process that this VM started, and of somebody else's daemon, for
//! which the command line tells part of both. **Who is not trusted**: whoever answers; features that the transport cannot follow are not passed on.
//! **Why this way.** All that depends on who is behind the socket is one enum, so that the handshake and the device have no cases for it.

use ipc::limits::{MAX_CONFIG_SPACE, MAX_FS_TAG};
use ipc::spec::fs::FsSpec;
use ipc::spec::net::NetSpec;
use vhost::vhost_user::message::{VhostUserConfig, VhostUserProtocolFeatures};
use vm_memory::ByteValued;

use super::{NET_STATUS, RemoteError};

/// `VIRTIO_F_VERSION_1` (virtio 1.3, section 6).
pub const F_VERSION_1: u64 = 1 << 32;

/// `VIRTIO_F_INDIRECT_DESC`.
const F_INDIRECT_DESC: u64 = 1 << 28;

/// `VIRTIO_F_EVENT_IDX`.
pub(super) const F_EVENT_IDX: u64 = 1 << 29;

/// `VIRTIO_F_IN_ORDER`.
const F_IN_ORDER: u64 = 1 << 35;

/// Feature bits 0 to 23 and 50 to 63 belong to the device type (virtio 1.3, section 2.2).
const DEVICE_TYPE_FEATURES: u64 = 0x00ff_ffff | !((1 << 50) - 1);

/// What the guest may be offered at most. Others have no meaning here (legacy ones, vhost-user's own bit 30), or change
/// the transport in a way that ioeventfds with a queue number cannot follow (`NOTIFICATION_DATA`).
pub(super) const OFFERABLE: u64 =
    DEVICE_TYPE_FEATURES | F_INDIRECT_DESC | F_EVENT_IDX | F_VERSION_1 | F_IN_ORDER;

/// Cards: `VIRTIO_NET_F_MAC` and `VIRTIO_NET_F_STATUS` (virtio 1.3, 5.1.3). What is behind them the front end of somebody else's
/// daemon tells, which need not know them.
pub(super) const NET_OF_FRONT_END: u64 = 1 << 5 | 1 << 16;

/// Checksums, segmentation and mergeable buffers: what such a daemon may offer to a driver. All else has to do with a control
/// queue, which daemons leave to the front end, as some do that offer it.
const NET_OF_DAEMON: u64 = 1 << 0 // CSUM
    | 1 << 1 // GUEST_CSUM
    | 0b1111 << 7 // GUEST_TSO4, GUEST_TSO6, GUEST_ECN, GUEST_UFO
    | 0b1111 << 11 // HOST_TSO4, HOST_TSO6, HOST_ECN, HOST_UFO
    | 1 << 15 // MRG_RXBUF
    | 0b111 << 54; // GUEST_USO4, GUEST_USO6, HOST_USO

/// Without these a device process cannot be used.
const REQUIRED: VhostUserProtocolFeatures = VhostUserProtocolFeatures::MQ
    .union(VhostUserProtocolFeatures::REPLY_ACK)
    .union(VhostUserProtocolFeatures::CONFIG);

/// Without these somebody else's daemon cannot be used. Configuration space is not its business: what the command line says
/// is what the guest reads.
const REQUIRED_OF_FOREIGN: VhostUserProtocolFeatures =
    VhostUserProtocolFeatures::MQ.union(VhostUserProtocolFeatures::REPLY_ACK);

/// What a disk of somebody else's must have besides: only its daemon knows its size.
const REQUIRED_OF_FOREIGN_DISK: VhostUserProtocolFeatures =
    REQUIRED_OF_FOREIGN.union(VhostUserProtocolFeatures::CONFIG);

/// `struct virtio_blk_config` up to the fields of write zeroes (virtio 1.2, 5.2.4): qemu-storage-daemon refuses to tell more
/// than it knows of.
const DISK_CONFIG: usize = 60;

/// Where the number of queues is in it.
const DISK_NUM_QUEUES: usize = 34;

/// Used if offered.
pub(super) const WELCOME: VhostUserProtocolFeatures = VhostUserProtocolFeatures::INFLIGHT_SHMFD
    .union(VhostUserProtocolFeatures::RESET_DEVICE)
    .union(VhostUserProtocolFeatures::DEVICE_STATE);

/// What a device with a window must have besides.
pub(super) const WITH_WINDOW: VhostUserProtocolFeatures =
    VhostUserProtocolFeatures::BACKEND_REQ.union(VhostUserProtocolFeatures::SHMEM);

/// What a device process must turn out to be.
#[derive(Debug)]
pub(super) struct Expected {
    pub(super) id: String,
    pub(super) virtio_id: u32,
    pub(super) num_queues: u16,
    pub(super) queue_size: u16,
    /// Bytes of its window; 0 for none.
    pub(super) window: u64,
    pub(super) config: ConfigFrom,
}

/// Who tells configuration space.
#[derive(Debug, Clone)]
pub(super) enum ConfigFrom {
    /// A process that this VM started.
    Own,
    /// The command line: the device's daemon is somebody else's.
    Fixed(Vec<u8>),
    /// Somebody else's disk, which has as many queues as the command line says.
    Disk,
    /// The command line: packets go to somebody else's daemon.
    Card(Vec<u8>),
}

impl ConfigFrom {
    pub(super) const fn is_own(&self) -> bool {
        matches!(self, Self::Own)
    }

    pub(super) const fn required(&self) -> VhostUserProtocolFeatures {
        match self {
            Self::Own => REQUIRED,
            Self::Fixed(_) | Self::Card(_) => REQUIRED_OF_FOREIGN,
            Self::Disk => REQUIRED_OF_FOREIGN_DISK,
        }
    }

    /// Bytes to ask the device for.
    pub(super) const fn len(&self) -> usize {
        match self {
            Self::Own => MAX_CONFIG_SPACE,
            Self::Fixed(_) | Self::Card(_) => 0,
            Self::Disk => DISK_CONFIG,
        }
    }

    /// What `GET_QUEUE_NUM` must tell at least. A card's daemon counts pairs.
    pub(super) const fn queues(&self, num_queues: u16) -> u16 {
        match self {
            Self::Card(_) => num_queues / 2,
            _ => num_queues,
        }
    }

    /// What to offer to a driver, of what the device `offers`.
    pub(super) const fn features(&self, offers: u64) -> u64 {
        match self {
            Self::Card(_) => offers & (NET_OF_DAEMON | !DEVICE_TYPE_FEATURES) | NET_OF_FRONT_END,
            _ => offers,
        }
    }

    /// What the device is told of what the driver `accepted`.
    pub(super) const fn told(&self, accepted: u64) -> u64 {
        match self {
            Self::Card(_) => accepted & !NET_OF_FRONT_END,
            _ => accepted,
        }
    }

    /// What the guest reads, from the device's reply if it was asked.
    pub(super) fn space(
        &self,
        id: &str,
        reply: Option<&Vec<u8>>,
        num_queues: u16,
    ) -> Result<Vec<u8>, RemoteError> {
        match self {
            Self::Own => config_space(id, reply, MAX_CONFIG_SPACE),
            Self::Fixed(config) | Self::Card(config) => Ok(config.clone()),
            Self::Disk => {
                let mut config = config_space(id, reply, DISK_CONFIG)?;
                config[DISK_NUM_QUEUES..DISK_NUM_QUEUES + 2]
                    .copy_from_slice(&num_queues.to_le_bytes());
                Ok(config)
            }
        }
    }
}

/// `struct virtio_fs_config` (virtio 1.3, 5.11.4): the tag, filled up with zeros, and the number of request queues.
pub(super) fn fs_config(spec: &FsSpec) -> Vec<u8> {
    let mut config = vec![0; MAX_CONFIG_SPACE];
    for (to, from) in config.iter_mut().zip(spec.tag.bytes().take(MAX_FS_TAG)) {
        *to = from;
    }
    config[MAX_FS_TAG..MAX_FS_TAG + 4]
        .copy_from_slice(&u32::from(spec.request_queues).to_le_bytes());
    config
}

/// `struct virtio_net_config` (virtio 1.3, 5.1.4) with a link: address, status and pairs.
pub(super) fn net_config(spec: &NetSpec) -> Vec<u8> {
    let mut config = vec![0; MAX_CONFIG_SPACE];
    config[..6].copy_from_slice(&spec.mac);
    config[NET_STATUS] = 1;
    config[8..10].copy_from_slice(&spec.queue_pairs.to_le_bytes());
    config
}

/// The `len` bytes that were asked for, filled up with zeros.
pub(super) fn config_space(
    id: &str,
    reply: Option<&Vec<u8>>,
    len: usize,
) -> Result<Vec<u8>, RemoteError> {
    const HEADER: usize = size_of::<VhostUserConfig>();
    let reply = reply.map_or(&[][..], Vec::as_slice);
    let header = reply
        .get(..HEADER)
        .and_then(VhostUserConfig::from_slice)
        .copied();
    let (offset, size) = header.map_or((0, 0), |header| (header.offset, header.size as usize));
    let bytes = reply.get(HEADER..).unwrap_or(&[]);
    if offset != 0 || size != len || bytes.len() != len {
        return Err(RemoteError::Config {
            id: id.to_owned(),
            got: bytes.len().max(size),
            offset,
            want: len,
        });
    }
    let mut space = bytes.to_vec();
    space.resize(MAX_CONFIG_SPACE, 0);
    Ok(space)
}
