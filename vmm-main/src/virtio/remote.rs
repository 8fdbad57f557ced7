//! One device process as the control process sees it: a vhost-user front end that checks what it is told.
//!
//! **Job.** The handshake with a device process, its configuration space, and handing queues over when the guest's
//! driver is ready and taking them back when it resets the device.
//!
//! **Who is not trusted**: the device process, which reads what the guest wrote. What it claims is checked against the spec
//! that it was started with; a lie, silence or a closed socket makes the device fail, never the VM. The guest's queue
//! addresses are checked here too, so that no device process is told of memory that is not RAM.
//!
//! **Why this way.** [`Handshake`] has three steps that do not wait for each other: `begin` works before the process has
//! even been executed, since its socket exists already. With several devices call `begin` for all, do other work, then
//! `negotiate` for all, then `finish` for all: every process computes its answers while another one is read.
//!
//! Ring addresses travel as guest-physical addresses: the memory table names them as "user addresses", so a device
//! process learns nothing about where this process has its memory.

use std::fs::File;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::fs::FileExt;
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::time::{Duration, Instant};

use ipc::codec::{CodecError, decode_within, encode_within};
use ipc::control::DeviceGrant;
use ipc::counters::{self, BlockCounters};
use ipc::disk::{self, Answer, Order};
use ipc::limits::{
    DISK_ORDER_MS, MAX_CONFIG_SPACE, MAX_DEVICE_STATE, MAX_DISK_ANSWER, MAX_DISK_ORDER, MAX_FS_TAG,
    MAX_INFLIGHT_REGION, MAX_MEMORY_REGIONS,
};
use ipc::spec::DeviceSpec;
use ipc::spec::fs::FsSpec;
use ipc::spec::net::NetSpec;
use nix::errno::Errno;
use nix::sys::memfd::{MFdFlags, memfd_create};
use serde::{Deserialize, Serialize};
use thiserror::Error;
use vhost::vhost_user::message::{
    FrontendReq, VhostTransferStateDirection, VhostUserConfig, VhostUserConfigFlags,
    VhostUserMemory, VhostUserMemoryRegion, VhostUserProtocolFeatures, VhostUserVirtioFeatures,
    VhostUserVringAddr, VhostUserVringAddrFlags, VhostUserVringState,
};
use vm_memory::{
    ByteValued, Bytes, FileOffset, GuestAddress, GuestMemoryBackend, GuestMemoryMmap,
    GuestMemoryRegion,
};
use vmm_sys_util::eventfd::EventFd;

use super::link::{Link, LinkError};
use super::window::{Window, WindowError};
use crate::memory::sharing::{DeviceFaults, Orders};

/// `VIRTIO_F_VERSION_1` (virtio 1.3, section 6).
pub const F_VERSION_1: u64 = 1 << 32;
/// `VIRTIO_F_INDIRECT_DESC`.
const F_INDIRECT_DESC: u64 = 1 << 28;
/// `VIRTIO_F_EVENT_IDX`.
const F_EVENT_IDX: u64 = 1 << 29;
/// `VIRTIO_F_IN_ORDER`.
const F_IN_ORDER: u64 = 1 << 35;
/// Feature bits 0 to 23 and 50 to 63 belong to the device type (virtio 1.3, section 2.2).
const DEVICE_TYPE_FEATURES: u64 = 0x00ff_ffff | !((1 << 50) - 1);
/// What the guest may be offered at most. Others have no meaning here (legacy ones, vhost-user's own bit 30), or change
/// the transport in a way that ioeventfds with a queue number cannot follow (`NOTIFICATION_DATA`).
const OFFERABLE: u64 =
    DEVICE_TYPE_FEATURES | F_INDIRECT_DESC | F_EVENT_IDX | F_VERSION_1 | F_IN_ORDER;

/// Device IDs (virtio 1.3, section 5).
const VIRTIO_ID_NET: u32 = 1;
const VIRTIO_ID_BLOCK: u32 = 2;
const VIRTIO_ID_FS: u32 = 26;

/// Cards: `VIRTIO_NET_F_MAC` and `VIRTIO_NET_F_STATUS` (virtio 1.3, 5.1.3). What is behind them the front end of somebody else's
/// daemon tells, which need not know them.
const NET_OF_FRONT_END: u64 = 1 << 5 | 1 << 16;
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
const WELCOME: VhostUserProtocolFeatures = VhostUserProtocolFeatures::INFLIGHT_SHMFD
    .union(VhostUserProtocolFeatures::RESET_DEVICE)
    .union(VhostUserProtocolFeatures::DEVICE_STATE);
/// What a device with a window must have besides.
const WITH_WINDOW: VhostUserProtocolFeatures =
    VhostUserProtocolFeatures::BACKEND_REQ.union(VhostUserProtocolFeatures::SHMEM);
/// In the answer to `SET_DEVICE_STATE_FD`: no descriptor comes with it. All else is failure.
const NO_DESCRIPTOR: u64 = 1 << 8;

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

/// What the guest's driver said about one queue (virtio 1.3, section 4.2.2: `QueueSize`, `QueueDesc`, …).
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct QueueState {
    /// Entries at most: a power of two.
    pub max_size: u16,
    /// Entries in use: a power of two.
    pub size: u16,
    /// The driver set the queue up.
    pub ready: bool,
    /// Guest-physical address of the descriptor table, 16 bytes an entry.
    pub desc: u64,
    /// Guest-physical address of the available ring ("driver area").
    pub driver: u64,
    /// Guest-physical address of the used ring ("device area").
    pub device: u64,
}

/// A queue on its way to the device process: state and the event descriptors that go with it.
#[derive(Debug)]
pub struct QueueHandover<'a> {
    /// Queue number.
    pub index: u16,
    /// Where it is.
    pub state: &'a QueueState,
    /// Index in its available ring to go on from, unless the in-flight region knows better: 0 for a new queue.
    pub base: u16,
    /// The guest's doorbell: device process waits for it.
    pub kick: &'a EventFd,
    /// The interrupt: device process writes to it.
    pub call: &'a EventFd,
    /// Complaint about a broken ring: device process writes to it.
    pub error: &'a EventFd,
}

/// What a device process must turn out to be.
#[derive(Debug)]
struct Expected {
    id: String,
    virtio_id: u32,
    num_queues: u16,
    queue_size: u16,
    /// Bytes of its window; 0 for none.
    window: u64,
    config: ConfigFrom,
}

/// Who tells configuration space.
#[derive(Debug, Clone)]
enum ConfigFrom {
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
    const fn is_own(&self) -> bool {
        matches!(self, Self::Own)
    }

    const fn required(&self) -> VhostUserProtocolFeatures {
        match self {
            Self::Own => REQUIRED,
            Self::Fixed(_) | Self::Card(_) => REQUIRED_OF_FOREIGN,
            Self::Disk => REQUIRED_OF_FOREIGN_DISK,
        }
    }

    /// Bytes to ask the device for.
    const fn len(&self) -> usize {
        match self {
            Self::Own => MAX_CONFIG_SPACE,
            Self::Fixed(_) | Self::Card(_) => 0,
            Self::Disk => DISK_CONFIG,
        }
    }

    /// What `GET_QUEUE_NUM` must tell at least. A card's daemon counts pairs.
    const fn queues(&self, num_queues: u16) -> u16 {
        match self {
            Self::Card(_) => num_queues / 2,
            _ => num_queues,
        }
    }

    /// What to offer to a driver, of what the device `offers`.
    const fn features(&self, offers: u64) -> u64 {
        match self {
            Self::Card(_) => offers & (NET_OF_DAEMON | !DEVICE_TYPE_FEATURES) | NET_OF_FRONT_END,
            _ => offers,
        }
    }

    /// What the device is told of what the driver `accepted`.
    const fn told(&self, accepted: u64) -> u64 {
        match self {
            Self::Card(_) => accepted & !NET_OF_FRONT_END,
            _ => accepted,
        }
    }

    /// What the guest reads, from the device's reply if it was asked.
    fn space(
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

/// Where a card's `status` is, of which bit 0 says that there is a link (virtio 1.3, 5.1.4).
pub(super) const NET_STATUS: usize = 6;
/// The bits of it.
const STATUS_LINK_UP: u8 = 1;
const STATUS_ANNOUNCE: u8 = 2;

/// Bytes of an in-flight description (vhost-user, "Inflight description": size, offset, queues, queue size, and padding
/// to a multiple of 8).
const INFLIGHT_LAYOUT: usize = 24;

/// An in-flight region as its device described it. This process passes it on and never maps it, so nothing that a
/// device writes into the description or the region can harm here.
#[derive(Debug)]
struct InflightRegion {
    layout: [u8; INFLIGHT_LAYOUT],
    file: File,
    /// Which of the device's processes has it.
    process: u32,
}

impl InflightRegion {
    /// Bytes, and where they start in the file.
    fn place(&self) -> (usize, u64) {
        let word = |at: usize| {
            self.layout[at..]
                .first_chunk::<8>()
                .map_or(0, |bytes| u64::from_le_bytes(*bytes))
        };
        (usize::try_from(word(0)).unwrap_or(usize::MAX), word(8))
    }

    /// What a disk of ours has counted: the last bytes.
    fn counters(&self) -> std::io::Result<BlockCounters> {
        let (size, offset) = self.place();
        let mut bytes = [0; counters::BYTES];
        let before = size.saturating_sub(bytes.len()) as u64;
        self.file
            .read_exact_at(&mut bytes, offset.saturating_add(before))?;
        Ok(BlockCounters::from_bytes(bytes))
    }

    /// How many requests it holds that were taken and not answered (vhost-user, "Inflight I/O tracking", split virtqueue). For
    /// people to read: what a hostile process wrote there gives a wrong number and nothing else.
    fn count(&self) -> std::io::Result<u32> {
        // Before the entries of a queue, and each of them, which begins with a byte that is 1 while it is in flight.
        const HEADER: usize = 16;
        const ENTRY: usize = 16;
        // All back ends that are known here start each part on a cache line.
        const ALIGN: usize = 64;
        let (size, offset) = self.place();
        let half = |at: usize| {
            self.layout[at..]
                .first_chunk::<2>()
                .map_or(0, |bytes| usize::from(u16::from_le_bytes(*bytes)))
        };
        let (queues, entries) = (half(16), half(18));
        let mut bytes = vec![0; size.min(MAX_INFLIGHT_REGION as usize)];
        self.file.read_exact_at(&mut bytes, offset)?;
        // What follows the queues' parts is the device's own.
        let part = (HEADER + entries * ENTRY).next_multiple_of(ALIGN);
        let taken = bytes.chunks_exact(part).take(queues).flat_map(|queue| {
            let entries = queue
                .get(HEADER..)
                .unwrap_or_default()
                .chunks_exact(ENTRY)
                .take(entries);
            entries.filter(|entry| entry.first() == Some(&1))
        });
        Ok(u32::try_from(taken.count()).unwrap_or(u32::MAX))
    }
}

/// A handshake under way.
#[derive(Debug)]
pub struct Handshake {
    link: Link,
    expected: Expected,
    /// Features and protocol features, once the second half has been sent.
    negotiated: Option<(u64, VhostUserProtocolFeatures)>,
    /// Answers to the second half, if they came in [`Handshake::advance`].
    answers: Option<Vec<Vec<u8>>>,
}

impl Handshake {
    /// Sends the first half of the handshake; does not wait, not even for the process to start.
    pub fn begin(socket: UnixStream, spec: &DeviceSpec) -> Result<Self, RemoteError> {
        Self::begin_with(socket, spec, ConfigFrom::Own)
    }

    /// As [`Handshake::begin`], with a process that this VM started or with somebody else's, as `grant` says.
    pub fn begin_for(socket: UnixStream, grant: &DeviceGrant) -> Result<Self, RemoteError> {
        let config = match &grant.spec {
            DeviceSpec::Fs(spec) if grant.is_foreign() => ConfigFrom::Fixed(fs_config(spec)),
            DeviceSpec::Block(_) if grant.is_foreign() => ConfigFrom::Disk,
            DeviceSpec::Net(spec) if grant.is_foreign() => ConfigFrom::Card(net_config(spec)),
            _ => ConfigFrom::Own,
        };
        Self::begin_with(socket, &grant.spec, config)
    }

    fn begin_with(
        socket: UnixStream,
        spec: &DeviceSpec,
        config: ConfigFrom,
    ) -> Result<Self, RemoteError> {
        let mut handshake = Self {
            link: Link::new(socket),
            expected: Expected {
                id: spec.id().to_owned(),
                virtio_id: spec.virtio_id(),
                num_queues: spec.num_queues(),
                queue_size: spec.queue_size(),
                window: match spec {
                    DeviceSpec::Fs(spec) => spec.window,
                    _ => 0,
                },
                config,
            },
            negotiated: None,
            answers: None,
        };
        let link = &mut handshake.link;
        link.start_clock();
        let sent = link
            .post(FrontendReq::SET_OWNER, &[], &[])
            .and_then(|()| link.post(FrontendReq::GET_FEATURES, &[], &[]))
            .and_then(|()| link.post(FrontendReq::GET_PROTOCOL_FEATURES, &[], &[]))
            .and_then(|()| link.flush());
        handshake.check(sent)?;
        Ok(handshake)
    }

    /// Waits for the features and sends the second half; does not wait for its answers. A second call has no effect.
    pub fn negotiate(&mut self) -> Result<(), RemoteError> {
        if self.negotiated.is_some() {
            return Ok(());
        }
        self.link.start_clock();
        let values = self.link.finish();
        let values = self.check(values)?;
        self.accept(&values)
    }

    /// Goes as far as is possible without waiting, for a caller that is told when the [socket](AsFd) is readable. `true`
    /// when all answers are there, so that [`Handshake::finish`] will not wait. A process that is not as far by
    /// [`Handshake::deadline`] is given up by the next call.
    pub fn advance(&mut self) -> Result<bool, RemoteError> {
        if self.negotiated.is_none() {
            let values = self.link.try_finish();
            match self.check(values)? {
                Some(values) => self.accept(&values)?,
                None => return Ok(false),
            }
        }
        if self.answers.is_none() {
            let values = self.link.try_finish();
            self.answers = self.check(values)?;
        }
        Ok(self.answers.is_some())
    }

    /// When the process's time is over.
    pub const fn deadline(&self) -> Instant {
        self.link.deadline()
    }

    /// Checks the features and sends the second half.
    fn accept(&mut self, values: &[Vec<u8>]) -> Result<(), RemoteError> {
        let (features, protocol) = (number(values, 0), number(values, 1));
        let need = F_VERSION_1 | VhostUserVirtioFeatures::PROTOCOL_FEATURES.bits();
        if features & need != need {
            return Err(self.lacks("virtio", features, need));
        }
        let protocol = VhostUserProtocolFeatures::from_bits_truncate(protocol);
        let (mut required, config) = (self.expected.config.required(), self.expected.config.len());
        let has_window = self.expected.window != 0;
        if has_window {
            required |= WITH_WINDOW;
        }
        if !protocol.contains(required) {
            return Err(self.lacks("vhost-user", protocol.bits(), required.bits()));
        }
        let mut welcome = WELCOME;
        if self.expected.config.is_own() {
            // Who else has it watches for less than we have to.
            welcome |= VhostUserProtocolFeatures::PAGEFAULT;
        }
        let protocol = protocol & (required | welcome);
        let link = &mut self.link;
        link.start_clock();
        let sent = link
            .post(
                FrontendReq::SET_PROTOCOL_FEATURES,
                &[&protocol.bits().to_le_bytes()],
                &[],
            )
            .and_then(|()| {
                link.enable_acks();
                link.post(FrontendReq::GET_QUEUE_NUM, &[], &[])
            })
            .and_then(|()| match config {
                0 => Ok(()),
                len => post_get_config(link, len),
            })
            .and_then(|()| match has_window {
                true => link.post(FrontendReq::GET_SHMEM_CONFIG, &[], &[]),
                false => Ok(()),
            })
            .and_then(|()| link.flush());
        self.check(sent)?;
        self.negotiated = Some((features, protocol));
        Ok(())
    }

    /// Waits for the rest of the answers and checks them.
    pub fn finish(mut self) -> Result<RemoteDevice, RemoteError> {
        self.negotiate()?;
        let values = match self.answers.take() {
            Some(values) => values,
            None => {
                self.link.start_clock();
                let values = self.link.finish();
                self.check(values)?
            }
        };
        let id = self.expected.id.clone();
        let queues = number(&values, 0);
        let from = std::mem::replace(&mut self.expected.config, ConfigFrom::Own);
        let want = from.queues(self.expected.num_queues);
        if !from.is_own() && queues < u64::from(want) {
            return Err(match from {
                ConfigFrom::Disk => RemoteError::FewDiskQueues {
                    id,
                    got: queues,
                    want,
                },
                _ => RemoteError::FewQueues {
                    id,
                    got: queues,
                    want,
                },
            });
        }
        if from.is_own() && queues != u64::from(self.expected.num_queues) {
            return Err(RemoteError::Queues {
                id,
                got: queues,
                want: self.expected.num_queues,
            });
        }
        let config = from.space(&id, values.get(1), self.expected.num_queues)?;
        if self.expected.window != 0 {
            check_window(&id, values.last(), self.expected.window)?;
        }
        // `negotiate` succeeded, so this is there; an absent value would offer nothing to the guest.
        let (features, protocol) = self
            .negotiated
            .unwrap_or((0, VhostUserProtocolFeatures::empty()));
        Ok(RemoteDevice {
            id,
            virtio_id: self.expected.virtio_id,
            num_queues: self.expected.num_queues,
            queue_size: self.expected.queue_size,
            features: from.features(features & OFFERABLE),
            protocol,
            config,
            config_from: from,
            inflight: None,
            processes: 0,
            past: Vec::new(),
            counted: BlockCounters::default(),
            restored: None,
            active: Vec::new(),
            window: None,
            exposed: false,
            failed: false,
            link_down: false,
            sharing: None,
            faults: None,
            link: Some(self.link),
        })
    }

    fn check<T>(&self, result: Result<T, LinkError>) -> Result<T, RemoteError> {
        result.map_err(|source| RemoteError::Link {
            id: self.expected.id.clone(),
            source,
        })
    }

    fn lacks(&self, kind: &'static str, got: u64, need: u64) -> RemoteError {
        RemoteError::Features {
            id: self.expected.id.clone(),
            kind,
            got,
            need,
        }
    }
}

/// Whether `reply`, to `GET_SHMEM_CONFIG`, tells one region of `want` bytes: the number of regions in 32 bits, as many of padding,
/// then the bytes of each of 256 (vhost-user, "VIRTIO Shared Memory Region configuration").
fn check_window(id: &str, reply: Option<&Vec<u8>>, want: u64) -> Result<(), RemoteError> {
    let reply = reply.map_or(&[][..], Vec::as_slice);
    let regions = reply
        .first_chunk::<4>()
        .map_or(0, |word| u32::from_le_bytes(*word));
    let first = reply
        .get(8..)
        .and_then(|sizes| sizes.first_chunk::<8>())
        .map_or(0, |word| u64::from_le_bytes(*word));
    if (regions, first) == (1, want) {
        return Ok(());
    }
    Err(RemoteError::WindowSize {
        id: id.to_owned(),
        got: first,
        want,
    })
}

impl AsFd for Handshake {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.link.as_fd()
    }
}

/// A device process after a successful handshake, and what has to outlive it.
#[derive(Debug)]
pub struct RemoteDevice {
    id: String,
    virtio_id: u32,
    num_queues: u16,
    queue_size: u16,
    /// What the guest is offered.
    features: u64,
    protocol: VhostUserProtocolFeatures,
    /// Configuration space as the device last told it; reads by the guest never wake the device.
    config: Vec<u8>,
    /// Who tells configuration space.
    config_from: ConfigFrom,
    /// In-flight region. It outlives the device process: a restarted one gets it and replays what had not been answered.
    inflight: Option<InflightRegion>,
    /// Processes that this one has had before its own.
    processes: u32,
    /// Regions before this one of processes that were not followed by another one yet, for what was counted there.
    past: Vec<InflightRegion>,
    /// What was counted in regions before those.
    counted: BlockCounters,
    /// Contents that the next region starts with: those of a snapshot.
    restored: Option<Vec<u8>>,
    /// Queues that the device process runs.
    active: Vec<u16>,
    /// Where it has files mapped for the guest.
    window: Option<Arc<Window>>,
    /// A process was given queues and has neither given them back nor ended.
    exposed: bool,
    /// No process will come any more.
    failed: bool,
    /// The host has a card's link down, which each process of it is told.
    link_down: bool,
    /// Guest memory is a template's in part.
    sharing: Option<Arc<Orders>>,
    /// Faults of the process that the link leads to, if they are watched.
    faults: Option<DeviceFaults>,
    /// `None` while there is no process that can be talked to.
    link: Option<Link>,
}

impl RemoteDevice {
    /// Device id, for messages.
    pub fn id(&self) -> &str {
        &self.id
    }

    /// Virtio device ID (virtio 1.3, section 5).
    pub const fn virtio_id(&self) -> u32 {
        self.virtio_id
    }

    /// Number of queues.
    pub const fn num_queues(&self) -> u16 {
        self.num_queues
    }

    /// Entries of a queue at most.
    pub const fn queue_size(&self) -> u16 {
        self.queue_size
    }

    /// Feature bits to offer to the guest.
    pub const fn features(&self) -> u64 {
        self.features
    }

    /// Configuration space, [`MAX_CONFIG_SPACE`] bytes, zero where the device has none.
    pub fn config(&self) -> &[u8] {
        &self.config
    }

    /// Gives the process the way to `window`, as it will give it to those that come after this one.
    pub fn set_window(&mut self, window: Arc<Window>) -> Result<(), RemoteError> {
        self.window = Some(window);
        self.tell_window()
    }

    /// Where it has files mapped for the guest.
    pub fn window(&self) -> Option<&Window> {
        self.window.as_deref()
    }

    fn tell_window(&mut self) -> Result<(), RemoteError> {
        let Some(window) = self.window.clone() else {
            return Ok(());
        };
        let channel = window.connect().map_err(|source| RemoteError::Window {
            id: self.id.clone(),
            source,
        })?;
        self.talk(|link| {
            link.post(FrontendReq::SET_BACKEND_REQ_FD, &[], &[channel.as_fd()])?;
            link.finish().map(drop)
        })
    }

    /// An error if another process could not know what this one had taken from the queues and not done.
    pub fn check_account(&self) -> Result<(), RemoteError> {
        // A packet may get lost, and the used ring tells how far the process before got.
        if matches!(self.config_from, ConfigFrom::Card(_))
            || self
                .protocol
                .contains(VhostUserProtocolFeatures::INFLIGHT_SHMFD)
        {
            return Ok(());
        }
        Err(RemoteError::NoAccount {
            id: self.id.clone(),
        })
    }

    /// Whether the device process runs queues.
    pub fn is_active(&self) -> bool {
        !self.active.is_empty()
    }

    /// Whether the device was given up.
    pub const fn is_failed(&self) -> bool {
        self.failed
    }

    /// Whether there is no process that can be talked to, and another may come.
    pub const fn is_away(&self) -> bool {
        self.link.is_none() && !self.failed
    }

    /// The vhost-user socket: it hangs up when the process ends.
    pub fn socket(&self) -> Option<BorrowedFd<'_>> {
        self.link.as_ref().map(AsFd::as_fd)
    }

    /// Does not talk to this process any more: closes its socket, upon which a process in good order ends. What was in
    /// flight is kept for the next one.
    fn hang_up(&mut self) {
        self.link = None;
        self.active.clear();
    }

    /// The process is reaped.
    pub fn process_ended(&mut self) {
        self.hang_up();
        self.exposed = false;
    }

    /// Gives the device up for good. The process is reaped.
    pub fn fail(&mut self) {
        self.process_ended();
        self.failed = true;
        self.retire_inflight();
    }

    /// What the guest reads from now on is a disk without a medium, a card without a link. `true` if that is something new.
    pub fn show_absence(&mut self) -> bool {
        let before = self.config.clone();
        match self.virtio_id {
            // Capacity (virtio 1.3, 5.2.4).
            VIRTIO_ID_BLOCK => {
                if let Some(capacity) = self.config.get_mut(..8) {
                    capacity.fill(0);
                }
            }
            VIRTIO_ID_NET => self.show_link(false),
            _ => {}
        }
        self.config != before
    }

    /// What the guest reads of a card's link from now on.
    fn show_link(&mut self, up: bool) {
        if let Some(status) = self.config.get_mut(NET_STATUS) {
            *status = u8::from(up);
        }
    }

    /// Pulls a card's cable, or plugs it in. `true` if that is something new for the guest. A process that comes later is told as well.
    pub fn set_link(&mut self, up: bool) -> Result<bool, RemoteError> {
        let before = self.config.clone();
        self.link_down = !up;
        self.show_link(up);
        if self.link.is_some() {
            self.tell_link()?;
        }
        Ok(self.config != before)
    }

    /// Has a card tell the network where the guest is. `true` if its driver is to do that, and has to be told: configuration space says
    /// so until the driver has seen it.
    pub fn announce(&mut self) -> Result<bool, RemoteError> {
        if self.virtio_id != VIRTIO_ID_NET || !self.config_from.is_own() || self.link_down {
            return Ok(false);
        }
        self.tell_status(STATUS_LINK_UP | STATUS_ANNOUNCE)?;
        self.refresh_config()?;
        let status = self.config.get(NET_STATUS);
        Ok(status.is_some_and(|status| status & STATUS_ANNOUNCE != 0))
    }

    fn tell_link(&mut self) -> Result<(), RemoteError> {
        if matches!(self.config_from, ConfigFrom::Card(_)) {
            // No daemon knows a link; it has no queues to use while there is none.
            let (active, on) = (self.active.clone(), u32::from(!self.link_down));
            return self.talk(|link| {
                for index in active {
                    let state = VhostUserVringState::new(u32::from(index), on);
                    link.post(FrontendReq::SET_VRING_ENABLE, &[state.as_slice()], &[])?;
                }
                link.finish().map(drop)
            });
        }
        self.tell_status(u8::from(!self.link_down))
    }

    fn tell_status(&mut self, status: u8) -> Result<(), RemoteError> {
        let status = [status, 0];
        // Not the driver's doing: the device takes it from nobody else.
        let flags = VhostUserConfigFlags::LIVE_MIGRATION;
        let header = VhostUserConfig::new(NET_STATUS as u32, status.len() as u32, flags);
        self.talk(|link| {
            link.post(FrontendReq::SET_CONFIG, &[header.as_slice(), &status], &[])?;
            link.finish().map(drop)
        })
    }

    /// Has a disk's process make it so many sectors long; `false` if it does not, for a reason that it has told in the log.
    pub fn set_capacity(&mut self, sectors: u64) -> Result<bool, RemoteError> {
        let capacity = sectors.to_le_bytes();
        // As for a card's status.
        let flags = VhostUserConfigFlags::LIVE_MIGRATION;
        let header = VhostUserConfig::new(0, capacity.len() as u32, flags);
        self.talk(|link| {
            link.post(
                FrontendReq::SET_CONFIG,
                &[header.as_slice(), &capacity],
                &[],
            )?;
            link.finish().map(drop)
        })?;
        self.refresh_config()?;
        Ok(self.config.starts_with(&capacity))
    }

    /// Has a disk's process do something with its image, and waits for that.
    pub fn order(&mut self, order: &Order) -> Result<Answer, RemoteError> {
        let patience = Duration::from_millis(DISK_ORDER_MS);
        let id = self.id.clone();
        let bytes = encode_within::<MAX_DISK_ORDER, _>(order);
        let bytes = bytes.map_err(|source| RemoteError::Order {
            id: id.clone(),
            source,
        })?;
        let first = self.talk(|link| {
            let mut place = disk::BEGIN;
            for part in bytes.chunks(disk::PART) {
                post_order(link, place, part)?;
                place = disk::MORE;
            }
            link.start_clock_of(patience);
            post_order(link, disk::RUN, &[0])?;
            post_answer(link)?;
            link.finish()
        })?;
        let mut answer = self.page(first.first())?;
        let length = answer
            .first_chunk()
            .map_or(0, |word| u32::from_le_bytes(*word) as usize);
        let whole = 4 + length.min(MAX_DISK_ANSWER);
        if answer.len() < whole {
            let pages = self.talk(|link| {
                for at in (disk::PAGE..whole).step_by(disk::PAGE) {
                    post_order(link, disk::SEEK, &(at as u32).to_le_bytes())?;
                    post_answer(link)?;
                }
                link.finish()
            })?;
            for page in &pages {
                answer.extend(self.page(Some(page))?);
            }
        }
        answer.truncate(whole);
        decode_within::<MAX_DISK_ANSWER, _>(&answer[4..]).map_err(|source| {
            self.hang_up();
            RemoteError::Order { id, source }
        })
    }

    fn page(&mut self, reply: Option<&Vec<u8>>) -> Result<Vec<u8>, RemoteError> {
        config_space(&self.id, reply, disk::PAGE).inspect_err(|_| self.hang_up())
    }

    /// Goes on with another process, whose handshake gave `fresh`. The guest has negotiated with the one before, so this
    /// one must offer the same; only configuration space may differ, as it may at any time: then `true`.
    pub fn take_over(&mut self, fresh: Self) -> Result<bool, RemoteError> {
        self.fits(&fresh)?;
        let before = std::mem::replace(&mut self.config, fresh.config);
        self.active.clear();
        // Those of a process that is gone; the one that comes has memory of its own, or gets what is in flight.
        let inflight = self.inflight.take();
        self.counted = self.counters();
        self.past.clear();
        self.inflight = inflight;
        self.processes = self.processes.wrapping_add(1);
        self.link = fresh.link;
        self.tell_window()?;
        self.faults = None;
        if self.link_down {
            self.show_link(false);
            self.tell_link()?;
        }
        Ok(self.config != before)
    }

    /// Whether `fresh` offers what the guest has negotiated.
    pub fn fits(&self, fresh: &Self) -> Result<(), RemoteError> {
        for (kind, got, need) in [
            ("virtio", fresh.features, self.features),
            ("vhost-user", fresh.protocol.bits(), self.protocol.bits()),
        ] {
            if got != need {
                return Err(RemoteError::Changed {
                    id: self.id.clone(),
                    kind,
                    got,
                    need,
                });
            }
        }
        Ok(())
    }

    /// Guest memory is a template's in part: whoever gets it from now on is watched, or all of it is brought in before.
    pub fn share(&mut self, sharing: Arc<Orders>) {
        self.sharing = Some(sharing);
    }

    /// Whether its process can be watched.
    pub const fn can_share(&self) -> bool {
        self.protocol.contains(VhostUserProtocolFeatures::PAGEFAULT)
    }

    /// Hands `queues` over and starts them. `features` are those that the driver accepted.
    pub fn activate(
        &mut self,
        features: u64,
        memory: &GuestMemoryMmap<()>,
        queues: &[QueueHandover<'_>],
    ) -> Result<(), RemoteError> {
        for queue in queues {
            self.check_queue(memory, queue)?;
        }
        let features =
            self.config_from.told(features) | VhostUserVirtioFeatures::PROTOCOL_FEATURES.bits();
        self.exposed |= self.link.is_some();
        if let Some(window) = &self.window {
            window.open();
        }
        self.talk(|link| link.post(FrontendReq::SET_FEATURES, &[&features.to_le_bytes()], &[]))?;
        self.post_memory(memory)?;
        if self
            .protocol
            .contains(VhostUserProtocolFeatures::INFLIGHT_SHMFD)
        {
            let mut region = match self.inflight.take() {
                Some(region) => region,
                None => self.get_inflight()?,
            };
            region.process = self.processes;
            if let Some(bytes) = &self.restored {
                // A process whose region cannot be filled is replaced, and the next one has to have what was in flight.
                self.fill_inflight(&region, bytes)?;
                self.restored = None;
            }
            let sent = self.talk(|link| {
                link.post(
                    FrontendReq::SET_INFLIGHT_FD,
                    &[&region.layout],
                    &[region.file.as_fd()],
                )
            });
            self.inflight = Some(region);
            sent?;
        }
        let bases = queues.iter().map(|queue| self.base(memory, queue));
        let bases: Vec<u16> = bases.collect();
        self.talk(|link| {
            for (queue, base) in queues.iter().zip(bases) {
                post_queue(link, queue, base)?;
            }
            link.finish().map(drop)
        })?;
        self.active = queues.iter().map(|queue| queue.index).collect();
        if self.link_down && matches!(self.config_from, ConfigFrom::Card(_)) {
            self.tell_link()?;
        }
        Ok(())
    }

    /// Where the device goes on in a queue's available ring. A daemon that serves a card does not know how far the one before it
    /// got, or it does not say; it goes through buffers in their order (as QEMU too relies on), and the used ring has a number
    /// of those that are done, which is passed on and means nothing here. A new queue has 0 there.
    fn base(&self, memory: &GuestMemoryMmap<()>, queue: &QueueHandover<'_>) -> u16 {
        /// Of `idx` in the used ring (virtio 1.3, 2.7.8).
        const USED_IDX: u64 = 2;
        let address = GuestAddress(queue.state.device.wrapping_add(USED_IDX));
        match self.config_from {
            ConfigFrom::Card(_) => memory.read_obj(address).map_or(queue.base, u16::from_le),
            _ => queue.base,
        }
    }

    /// Takes the queues back. On return the device process does not touch guest memory any more. After an error it may,
    /// until [`RemoteDevice::process_ended`]: whoever started it has to end it before guest memory gets a new owner.
    pub fn deactivate(&mut self) -> Result<(), RemoteError> {
        let active = std::mem::take(&mut self.active);
        if self.virtio_id == VIRTIO_ID_NET
            && let Some(status) = self.config.get_mut(NET_STATUS)
        {
            // The next driver is asked nothing.
            *status &= !STATUS_ANNOUNCE;
        }
        // Counted to the end of what the driver asked for; what was in flight belongs to a driver that is gone.
        let stopped = self.take_queues(active);
        self.retire_inflight();
        self.restored = None;
        // Last: it may have had something mapped until here.
        if let Some(window) = &self.window {
            window.close();
        }
        stopped
    }

    fn take_queues(&mut self, active: Vec<u16>) -> Result<(), RemoteError> {
        if !self.exposed {
            return Ok(());
        }
        let resets = self
            .protocol
            .contains(VhostUserProtocolFeatures::RESET_DEVICE);
        self.talk(|link| {
            for index in active {
                let state = VhostUserVringState::new(u32::from(index), 0);
                link.post(FrontendReq::GET_VRING_BASE, &[state.as_slice()], &[])?;
            }
            if resets {
                link.post(FrontendReq::RESET_DEVICE, &[], &[])?;
            }
            link.finish().map(drop)
        })?;
        self.exposed = false;
        Ok(())
    }

    /// Stops the queues in order: what was taken from them is done, and they can be handed over again. Gives each queue's
    /// number and the index in its available ring to go on from.
    pub fn stop_queues(&mut self) -> Result<Vec<(u16, u16)>, RemoteError> {
        let active = self.active.clone();
        let values = self.talk(|link| {
            for index in &active {
                let state = VhostUserVringState::new(u32::from(*index), 0);
                link.post(FrontendReq::GET_VRING_BASE, &[state.as_slice()], &[])?;
            }
            link.finish()
        })?;
        self.active.clear();
        self.exposed = false;
        let mut bases = Vec::with_capacity(active.len());
        for (queue, value) in active.into_iter().zip(&values) {
            // `struct vring_state`: the queue's number, then the index, which goes around at 16 bits; of 32 bits each.
            let state = number(std::slice::from_ref(value), 0);
            match (state as u32, u16::try_from(state >> 32)) {
                (told, Ok(base)) if told == u32::from(queue) => bases.push((queue, base)),
                _ => {
                    self.hang_up();
                    return Err(RemoteError::Base {
                        id: self.id.clone(),
                        queue,
                        got: state,
                    });
                }
            }
        }
        Ok(bases)
    }

    /// What a disk of ours has counted since the VM began, or before that in the VM whose snapshot this is; zeros for any other
    /// device. Nobody is asked: the numbers are in the in-flight region.
    pub fn counters(&self) -> BlockCounters {
        let ours = self.virtio_id == VIRTIO_ID_BLOCK && self.config_from.is_own();
        let regions = self.past.iter().chain(&self.inflight);
        regions
            .filter(|_| ours)
            .filter_map(|region| region.counters().ok())
            .fold(self.counted, |before, counters| counters.after(&before))
    }

    /// What is in flight belongs to nobody any more. What was counted is not read here: a vCPU's thread comes this way, and
    /// may read no file.
    fn retire_inflight(&mut self) {
        if let Some(region) = self.inflight.take() {
            // One process hands out the same memory each time, and counts on in it.
            self.past.retain(|past| past.process != region.process);
            self.past.push(region);
        }
    }

    /// How many requests were taken and not answered, as far as the in-flight region tells.
    pub fn in_flight(&self) -> Option<u32> {
        self.inflight.as_ref()?.count().ok()
    }

    /// What the in-flight region holds, for a snapshot; `None` if there is none.
    pub fn save_inflight(&self) -> Result<Option<Vec<u8>>, RemoteError> {
        let Some(region) = &self.inflight else {
            return Ok(None);
        };
        let (size, offset) = region.place();
        let told = |source| RemoteError::InflightAccess {
            id: self.id.clone(),
            what: "saved",
            source,
        };
        let mut bytes = vec![0; size.min(MAX_INFLIGHT_REGION as usize)];
        region
            .file
            .read_exact_at(&mut bytes, offset)
            .map_err(told)?;
        Ok(Some(bytes))
    }

    /// The next in-flight region starts with what a snapshot says.
    pub fn restore_inflight(&mut self, bytes: Option<Vec<u8>>) {
        self.restored = bytes;
    }

    /// Whether its process holds something for the guest that no register and no queue tells.
    pub fn has_state(&self) -> bool {
        self.virtio_id == VIRTIO_ID_FS
    }

    /// What its process holds for the guest, for a snapshot. It goes through `exchange`, an empty file that nobody else has.
    /// All queues are stopped.
    pub fn save_state(&mut self, exchange: Option<&File>) -> Result<Vec<u8>, RemoteError> {
        let what = "saved";
        let exchange = exchange.ok_or_else(|| RemoteError::State {
            id: self.id.clone(),
            what,
            why: "the broker gave no memory for it",
        })?;
        self.move_state(VhostTransferStateDirection::SAVE, exchange, what)?;
        let failed = |source| RemoteError::StateFile {
            id: self.id.clone(),
            what,
            source,
        };
        // One copy, whatever the process writes from now on.
        let mut bytes = Vec::new();
        loop {
            const PIECE: usize = 64 << 10;
            let start = bytes.len();
            bytes.resize(start + PIECE, 0);
            let read = exchange
                .read_at(&mut bytes[start..], start as u64)
                .map_err(failed)?;
            bytes.truncate(start + read);
            if bytes.len() > MAX_DEVICE_STATE {
                return Err(failed(std::io::ErrorKind::FileTooLarge.into()));
            }
            if read == 0 {
                return Ok(bytes);
            }
        }
    }

    /// Has its process go on with what a snapshot holds. No queue has been started.
    pub fn load_state(&mut self, bytes: &[u8]) -> Result<(), RemoteError> {
        let what = "restored";
        let exchange = memfd_create(c"device-state", MFdFlags::MFD_CLOEXEC)
            .map(File::from)
            .map_err(Into::into)
            .and_then(|file| file.write_all_at(bytes, 0).map(|()| file))
            .map_err(|source| RemoteError::StateFile {
                id: self.id.clone(),
                what,
                source,
            })?;
        self.move_state(VhostTransferStateDirection::LOAD, &exchange, what)
    }

    fn move_state(
        &mut self,
        direction: VhostTransferStateDirection,
        exchange: &File,
        what: &'static str,
    ) -> Result<(), RemoteError> {
        let failed = |id: &str, why| RemoteError::State {
            id: id.to_owned(),
            what,
            why,
        };
        if !self
            .protocol
            .contains(VhostUserProtocolFeatures::DEVICE_STATE)
        {
            return Err(failed(
                &self.id,
                "it does not offer that (VHOST_USER_PROTOCOL_F_DEVICE_STATE)",
            ));
        }
        // `struct vhost_user_transfer_device_state`: the direction, and the phase, of which there is one: queues are stopped.
        let mut body = [0; 8];
        body[..4].copy_from_slice(&(direction as u32).to_le_bytes());
        let values = self.talk(|link| {
            link.post(
                FrontendReq::SET_DEVICE_STATE_FD,
                &[&body],
                &[exchange.as_fd()],
            )?;
            link.post(FrontendReq::CHECK_DEVICE_STATE, &[], &[])?;
            link.finish()
        })?;
        if (number(&values, 0), number(&values, 1)) == (NO_DESCRIPTOR, 0) {
            Ok(())
        } else {
            Err(failed(&self.id, "its process tells why in its log"))
        }
    }

    fn fill_inflight(&self, region: &InflightRegion, bytes: &[u8]) -> Result<(), RemoteError> {
        let (size, offset) = region.place();
        let told = |source| RemoteError::InflightAccess {
            id: self.id.clone(),
            what: "restored",
            source,
        };
        if bytes.len() > size {
            return Err(told(std::io::ErrorKind::FileTooLarge.into()));
        }
        region.file.write_all_at(bytes, offset).map_err(told)
    }

    /// Writes into configuration space and reads back what became of it. Whether the device takes the bytes is its
    /// decision: a refusal is no failure. The caller has checked the bounds.
    pub fn write_config(&mut self, offset: u32, bytes: &[u8]) -> Result<(), RemoteError> {
        if self.config_from.len() == 0 {
            return Ok(());
        }
        let header =
            VhostUserConfig::new(offset, bytes.len() as u32, VhostUserConfigFlags::empty());
        let result = self.talk(|link| {
            link.post(FrontendReq::SET_CONFIG, &[header.as_slice(), bytes], &[])?;
            match link.finish() {
                Err(error) if error.is_refusal() => Ok(()),
                other => other.map(drop),
            }
        });
        result.and_then(|()| self.refresh_config())
    }

    /// Reads the configuration space again.
    pub fn refresh_config(&mut self) -> Result<(), RemoteError> {
        if self.config_from.len() == 0 {
            return Ok(());
        }
        let len = self.config_from.len();
        let values = self.talk(|link| {
            post_get_config(link, len)?;
            link.finish()
        })?;
        match self
            .config_from
            .space(&self.id, values.first(), self.num_queues)
        {
            Ok(config) => {
                self.config = config;
                Ok(())
            }
            Err(error) => {
                self.hang_up();
                Err(error)
            }
        }
    }

    /// Runs `conversation` against the clock; any error in it ends the device.
    fn talk<T>(
        &mut self,
        conversation: impl FnOnce(&mut Link) -> Result<T, LinkError>,
    ) -> Result<T, RemoteError> {
        let Some(link) = &mut self.link else {
            return Err(RemoteError::Failed {
                id: self.id.clone(),
            });
        };
        link.start_clock();
        conversation(link).map_err(|source| {
            self.hang_up();
            RemoteError::Link {
                id: self.id.clone(),
                source,
            }
        })
    }

    fn post_memory(&mut self, memory: &GuestMemoryMmap<()>) -> Result<(), RemoteError> {
        let mut body = Vec::new();
        let mut fds = Vec::new();
        for region in memory.iter() {
            let Some(backing) = region.file_offset() else {
                return Err(RemoteError::Memory {
                    what: "a region has no file",
                });
            };
            let address = region.start_addr().0;
            let entry = VhostUserMemoryRegion::new(address, region.len(), address, backing.start());
            body.extend_from_slice(entry.as_slice());
            fds.push(backing.file().as_fd());
        }
        if fds.is_empty() || fds.len() > MAX_MEMORY_REGIONS {
            return Err(RemoteError::Memory {
                what: "it has no region or too many",
            });
        }
        let header = VhostUserMemory::new(fds.len() as u32);
        let Some(sharing) = self.sharing.clone() else {
            return self.talk(|link| {
                link.post(
                    FrontendReq::SET_MEM_TABLE,
                    &[header.as_slice(), &body],
                    &fds,
                )
            });
        };
        if !self.can_share() {
            sharing.bring_in().wait();
            self.sharing = None;
            return self.post_memory(memory);
        }
        let faults = match &self.faults {
            Some(faults) => faults.clone(),
            None => self.listen(header.as_slice().len() + body.len())?,
        };
        // The same table, with the process's own addresses.
        let values = self.talk(|link| {
            link.finish()?;
            link.post(
                FrontendReq::SET_MEM_TABLE,
                &[header.as_slice(), &body],
                &fds,
            )?;
            link.finish()
        })?;
        let answer = values
            .first()
            .and_then(|value| value.get(header.as_slice().len()..));
        let answer = answer.unwrap_or_default();
        // `struct VhostUserMemoryRegion`: guest address, size, user address, offset in the file; 64 bits each.
        let regions = answer
            .chunks_exact(32)
            .zip(memory.iter())
            .map(|(entry, region)| {
                let mut address = [0; 8];
                address.copy_from_slice(&entry[16..24]);
                let offset = region.file_offset().map_or(0, FileOffset::start);
                (offset, region.len(), u64::from_le_bytes(address))
            });
        if let Err(source) = sharing.watch(&self.id, &faults, regions) {
            self.hang_up();
            return Err(RemoteError::Watch {
                id: self.id.clone(),
                source,
            });
        }
        // It may touch its memory from here on.
        self.talk(|link| {
            link.tell(FrontendReq::SET_MEM_TABLE, &[0; 8]);
            Ok(())
        })
    }

    /// Has the process tell of its page faults; memory tables are answered from here on, by as many bytes as they have.
    fn listen(&mut self, table: usize) -> Result<DeviceFaults, RemoteError> {
        let fd = self.talk(|link| {
            // Alone on the way, so that the descriptor is known to belong to this reply.
            link.finish()?;
            link.post(FrontendReq::POSTCOPY_ADVISE, &[], &[])?;
            link.finish()?;
            let fd = link.take_fd();
            link.post(FrontendReq::POSTCOPY_LISTEN, &[], &[])?;
            link.finish()?;
            link.expect_table(table);
            Ok(fd)
        })?;
        match fd {
            Some(fd) => {
                let faults = DeviceFaults::new(fd);
                self.faults = Some(faults.clone());
                Ok(faults)
            }
            None => {
                self.hang_up();
                Err(RemoteError::Watch {
                    id: self.id.clone(),
                    source: Errno::EBADF,
                })
            }
        }
    }

    fn get_inflight(&mut self) -> Result<InflightRegion, RemoteError> {
        let mut ask = [0; INFLIGHT_LAYOUT];
        ask[16..18].copy_from_slice(&self.num_queues.to_le_bytes());
        ask[18..20].copy_from_slice(&self.queue_size.to_le_bytes());
        let (values, fd) = self.talk(|link| {
            // Alone on the way, so that the descriptor is known to belong to this reply.
            link.finish()?;
            link.post(FrontendReq::GET_INFLIGHT_FD, &[&ask], &[])?;
            let values = link.finish()?;
            Ok((values, link.take_fd()))
        })?;
        let layout = values
            .first()
            .and_then(|value| <[u8; INFLIGHT_LAYOUT]>::try_from(&value[..]).ok());
        let what = match (layout, fd) {
            (Some(layout), Some(fd)) if layout[..8] != [0; 8] => {
                // What this process has counted is in this memory, too.
                self.past.retain(|past| past.process != self.processes);
                return Ok(InflightRegion {
                    layout,
                    file: File::from(fd),
                    process: self.processes,
                });
            }
            (_, None) => "a descriptor",
            _ => "a size",
        };
        self.hang_up();
        Err(RemoteError::Inflight {
            id: self.id.clone(),
            what,
        })
    }

    fn check_queue(
        &self,
        memory: &GuestMemoryMmap<()>,
        queue: &QueueHandover<'_>,
    ) -> Result<(), RemoteError> {
        // Sizes of virtio 1.3, section 2.7, with the event index fields.
        let size = u64::from(queue.state.size);
        for (part, address, len) in [
            ("descriptor table", queue.state.desc, 16 * size),
            ("available ring", queue.state.driver, 6 + 2 * size),
            ("used ring", queue.state.device, 6 + 8 * size),
        ] {
            let inside = memory
                .find_region(GuestAddress(address))
                .is_some_and(|region| {
                    let from = address - region.start_addr().0;
                    len <= region.len() - from
                });
            if !inside {
                return Err(RemoteError::QueueAddress {
                    id: self.id.clone(),
                    queue: queue.index,
                    part,
                    address,
                });
            }
        }
        Ok(())
    }
}

/// Everything that one queue takes. The order matters: a device may start on the kick descriptor, so it comes last but
/// for the explicit enabling.
fn post_queue(link: &mut Link, queue: &QueueHandover<'_>, base: u16) -> Result<(), LinkError> {
    let index = u32::from(queue.index);
    let number = VhostUserVringState::new(index, u32::from(queue.state.size));
    link.post(FrontendReq::SET_VRING_NUM, &[number.as_slice()], &[])?;
    let base = VhostUserVringState::new(index, u32::from(base));
    link.post(FrontendReq::SET_VRING_BASE, &[base.as_slice()], &[])?;
    let addresses = VhostUserVringAddr::new(
        index,
        VhostUserVringAddrFlags::empty(),
        queue.state.desc,
        queue.state.device,
        queue.state.driver,
        0,
    );
    link.post(FrontendReq::SET_VRING_ADDR, &[addresses.as_slice()], &[])?;
    for (request, event) in [
        (FrontendReq::SET_VRING_CALL, queue.call),
        (FrontendReq::SET_VRING_ERR, queue.error),
        (FrontendReq::SET_VRING_KICK, queue.kick),
    ] {
        link.post(
            request,
            &[&u64::from(index).to_le_bytes()],
            &[borrow(event)],
        )?;
    }
    let enable = VhostUserVringState::new(index, 1);
    link.post(FrontendReq::SET_VRING_ENABLE, &[enable.as_slice()], &[])
}

/// Asks for the first `len` bytes of configuration space, at most all of it. The front end's request has to carry as many bytes
/// as it wants back.
fn post_get_config(link: &mut Link, len: usize) -> Result<(), LinkError> {
    let header = VhostUserConfig::new(0, len as u32, VhostUserConfigFlags::empty());
    link.post(
        FrontendReq::GET_CONFIG,
        &[header.as_slice(), &[0; MAX_CONFIG_SPACE][..len]],
        &[],
    )
}

/// Writes where only the host does.
fn post_order(link: &mut Link, place: usize, data: &[u8]) -> Result<(), LinkError> {
    let flags = VhostUserConfigFlags::LIVE_MIGRATION;
    let header = VhostUserConfig::new(place as u32, data.len() as u32, flags);
    link.post(FrontendReq::SET_CONFIG, &[header.as_slice(), data], &[])
}

/// Reads where only the host does.
fn post_answer(link: &mut Link) -> Result<(), LinkError> {
    let flags = VhostUserConfigFlags::LIVE_MIGRATION;
    let header = VhostUserConfig::new(0, disk::PAGE as u32, flags);
    link.post(
        FrontendReq::GET_CONFIG,
        &[header.as_slice(), &[0; disk::PAGE]],
        &[],
    )
}

/// `struct virtio_fs_config` (virtio 1.3, 5.11.4): the tag, filled up with zeros, and the number of request queues.
fn fs_config(spec: &FsSpec) -> Vec<u8> {
    let mut config = vec![0; MAX_CONFIG_SPACE];
    for (to, from) in config.iter_mut().zip(spec.tag.bytes().take(MAX_FS_TAG)) {
        *to = from;
    }
    config[MAX_FS_TAG..MAX_FS_TAG + 4]
        .copy_from_slice(&u32::from(spec.request_queues).to_le_bytes());
    config
}

/// `struct virtio_net_config` (virtio 1.3, 5.1.4) with a link: address, status and pairs.
fn net_config(spec: &NetSpec) -> Vec<u8> {
    let mut config = vec![0; MAX_CONFIG_SPACE];
    config[..6].copy_from_slice(&spec.mac);
    config[NET_STATUS] = 1;
    config[8..10].copy_from_slice(&spec.queue_pairs.to_le_bytes());
    config
}

/// The `len` bytes that were asked for, filled up with zeros.
fn config_space(id: &str, reply: Option<&Vec<u8>>, len: usize) -> Result<Vec<u8>, RemoteError> {
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

/// Value `index` of a reply list as a number; the link has checked its size.
fn number(values: &[Vec<u8>], index: usize) -> u64 {
    values
        .get(index)
        .and_then(|value| value.first_chunk::<8>())
        .map_or(0, |bytes| u64::from_le_bytes(*bytes))
}

#[allow(unsafe_code)] // vmm-sys-util's EventFd has no AsFd
pub(super) fn borrow(event: &EventFd) -> BorrowedFd<'_> {
    use std::os::fd::AsRawFd;
    // SAFETY: the descriptor belongs to `event`, which the result borrows.
    unsafe { BorrowedFd::borrow_raw(event.as_raw_fd()) }
}

#[cfg(test)]
mod tests {
    use super::super::fake_device::{self as fake, FakeDevice, Misdeed, Script, connect, memory};
    use super::*;
    use std::time::Duration;

    fn misbehave(request: u32, what: Misdeed) -> Script {
        Script {
            misdeed: Some((request, what)),
            ..Script::default()
        }
    }

    fn queue(size: u16, desc: u64, driver: u64, device: u64) -> QueueState {
        QueueState {
            max_size: 128,
            size,
            ready: true,
            desc,
            driver,
            device,
        }
    }

    fn activate(device: &mut RemoteDevice, state: &QueueState) -> Result<(), RemoteError> {
        let event = || EventFd::new(0).unwrap();
        let (kick, call, error) = (event(), event(), event());
        let both = [0, 1].map(|index| QueueHandover {
            base: 0,
            index,
            state,
            kick: &kick,
            call: &call,
            error: &error,
        });
        device.activate(F_VERSION_1, &memory(), &both)
    }

    #[test]
    fn a_truthful_device_is_accepted_and_hides_what_the_transport_cannot_do() {
        let (device, _fake) = connect(Script::default());
        let device = device.unwrap();
        assert_eq!(device.features(), F_VERSION_1 | F_EVENT_IDX | 1 << 9);
        assert_eq!(
            (device.virtio_id(), device.num_queues(), device.queue_size()),
            (2, 2, 128)
        );
        assert_eq!(device.config()[..8], 0x1122_3344_5566_7788u64.to_le_bytes());
        assert_eq!(device.config().len(), MAX_CONFIG_SPACE);
    }

    #[test]
    fn the_steps_of_several_handshakes_can_be_interleaved() {
        let started: Vec<_> = (0..3)
            .map(|_| FakeDevice::start(Script::default()))
            .collect();
        let mut fakes = Vec::new();
        let mut handshakes = Vec::new();
        for (socket, fake) in started {
            handshakes.push(Handshake::begin(socket, &fake::spec()).unwrap());
            fakes.push(fake);
        }
        for handshake in &mut handshakes {
            handshake.negotiate().unwrap();
        }
        for handshake in handshakes {
            handshake.finish().unwrap();
        }
    }

    /// Calls `advance` whenever something has come, as the main loop does.
    fn advance(handshake: &mut Handshake) -> Result<(), RemoteError> {
        use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
        loop {
            let left = handshake
                .deadline()
                .saturating_duration_since(Instant::now());
            let timeout = PollTimeout::try_from(left.as_millis() + 1).unwrap();
            poll(
                &mut [PollFd::new(handshake.as_fd(), PollFlags::POLLIN)],
                timeout,
            )
            .unwrap();
            if handshake.advance()? {
                return Ok(());
            }
        }
    }

    #[test]
    fn a_handshake_goes_on_whenever_something_has_come() {
        let (socket, _fake) = FakeDevice::start(Script::default());
        let mut handshake = Handshake::begin(socket, &fake::spec()).unwrap();
        advance(&mut handshake).unwrap();
        assert!(handshake.advance().unwrap(), "it stays so");
        assert_eq!(handshake.finish().unwrap().num_queues(), 2);
    }

    #[test]
    fn a_handshake_that_stops_half_way_does_not_hold_its_caller_and_ends() {
        // A header that promises a body, and never the body.
        for misdeed in [
            Misdeed::Silence,
            Misdeed::Reply([fake::GET_CONFIG, 5, 268], 200),
        ] {
            let (socket, _fake) = FakeDevice::start(misbehave(fake::GET_CONFIG, misdeed));
            let mut handshake = Handshake::begin(socket, &fake::spec()).unwrap();
            let start = Instant::now();
            assert!(!handshake.advance().is_ok_and(|done| done));
            assert!(start.elapsed() < Duration::from_secs(1));
            let error = advance(&mut handshake).unwrap_err();
            assert!(
                matches!(
                    error,
                    RemoteError::Link {
                        source: LinkError::Timeout { .. },
                        ..
                    }
                ),
                "{error:?}"
            );
        }
    }

    #[test]
    fn lies_about_queues_features_and_configuration_are_told() {
        let (device, _fake) = connect(Script {
            queues: 3,
            ..Script::default()
        });
        assert!(matches!(
            device,
            Err(RemoteError::Queues {
                got: 3,
                want: 2,
                ..
            })
        ));
        let (device, _fake) = connect(Script {
            queues: u64::MAX,
            ..Script::default()
        });
        assert!(matches!(device, Err(RemoteError::Queues { .. })));
        for len in [0, 8, 255, 257, 4000] {
            let (device, _fake) = connect(Script {
                config: vec![0; len],
                ..Script::default()
            });
            assert!(
                matches!(device, Err(RemoteError::Config { .. })),
                "{len}: {device:?}"
            );
        }
        let (device, _fake) = connect(Script {
            features: 1 << 30,
            ..Script::default()
        });
        assert!(matches!(
            device,
            Err(RemoteError::Features { kind: "virtio", .. })
        ));
        let (device, _fake) = connect(Script {
            protocol: 1,
            ..Script::default()
        });
        assert!(matches!(
            device,
            Err(RemoteError::Features {
                kind: "vhost-user",
                ..
            })
        ));
    }

    #[test]
    fn garbage_is_an_error_at_every_step() {
        for request in [
            fake::GET_FEATURES,
            fake::GET_PROTOCOL_FEATURES,
            fake::GET_QUEUE_NUM,
            fake::GET_CONFIG,
        ] {
            for misdeed in [
                Misdeed::Reply([request, 5, u32::MAX], 0),
                Misdeed::Reply([request, 5, 4097], 0),
                Misdeed::Reply([request, 5, 4], 4),
                Misdeed::Reply([request, 5, 0], 0),
                Misdeed::Reply([request, 1, 8], 8),
                Misdeed::Reply([request, 6, 8], 8),
                Misdeed::Reply([request, 0x8000_0005, 8], 8),
                Misdeed::Reply([request + 1, 5, 8], 8),
                Misdeed::Reply([0, 0, 0], 0),
                Misdeed::Reply([u32::MAX; 3], 1000),
                Misdeed::Descriptors,
                Misdeed::Close,
            ] {
                let (device, _fake) = connect(misbehave(request, misdeed));
                let error = device.unwrap_err();
                assert!(
                    matches!(error, RemoteError::Link { .. }),
                    "{misdeed:?}: {error:?}"
                );
            }
        }
    }

    #[test]
    fn silence_ends_in_an_error() {
        let start = Instant::now();
        let (device, _fake) = connect(misbehave(fake::GET_QUEUE_NUM, Misdeed::Silence));
        // The reply to the next request comes, and is not the one that is waited for.
        assert!(matches!(
            device,
            Err(RemoteError::Link {
                source: LinkError::Malformed { .. },
                ..
            })
        ));
        let (device, _fake) = connect(misbehave(fake::GET_CONFIG, Misdeed::Silence));
        assert!(matches!(
            device,
            Err(RemoteError::Link {
                source: LinkError::Timeout {
                    request: Some(FrontendReq::GET_CONFIG)
                },
                ..
            })
        ));
        assert!(start.elapsed() < Duration::from_secs(60));
    }

    #[test]
    fn a_reply_in_drips_is_bound_by_the_same_time() {
        // A header that promises a body, and never the body.
        let misdeed = Misdeed::Reply([fake::GET_CONFIG, 5, 268], 200);
        let (device, _fake) = connect(misbehave(fake::GET_CONFIG, misdeed));
        assert!(matches!(
            device,
            Err(RemoteError::Link {
                source: LinkError::Timeout { .. },
                ..
            })
        ));
    }

    #[test]
    fn activation_tells_everything_and_reset_takes_it_back() {
        let (device, fake) = connect(Script::default());
        let mut device = device.unwrap();
        fake.arrived();
        let state = queue(128, 0x1000, 4 << 30, 0x3000);
        activate(&mut device, &state).unwrap();
        assert!(device.is_active());
        let seen = fake.arrived();
        let one_queue = [
            fake::SET_VRING_NUM,
            fake::SET_VRING_BASE,
            fake::SET_VRING_ADDR,
            fake::SET_VRING_CALL,
            fake::SET_VRING_ERR,
            fake::SET_VRING_KICK,
            fake::SET_VRING_ENABLE,
        ];
        let want: Vec<u32> = [fake::SET_FEATURES, fake::SET_MEM_TABLE]
            .into_iter()
            .chain(one_queue)
            .chain(one_queue)
            .collect();
        assert_eq!(
            seen.iter().map(|seen| seen.request).collect::<Vec<_>>(),
            want
        );
        let body = |request: u32| {
            &seen
                .iter()
                .rfind(|seen| seen.request == request)
                .unwrap()
                .body
        };
        let words = |request| -> Vec<u64> {
            let chunks = body(request).chunks_exact(8);
            chunks
                .map(|chunk| u64::from_le_bytes(chunk.try_into().unwrap()))
                .collect()
        };
        assert_eq!(words(fake::SET_FEATURES), [F_VERSION_1 | 1 << 30]);
        // Number of regions; then guest address, size, "user" address, offset in the file.
        assert_eq!(
            words(fake::SET_MEM_TABLE),
            [2, 0, 1 << 20, 0, 0, 4 << 30, 1 << 20, 4 << 30, 1 << 20]
        );
        // Index and flags; then descriptor table, used ring, available ring, log.
        assert_eq!(words(fake::SET_VRING_ADDR), [1, 0x1000, 0x3000, 4 << 30, 0]);
        assert_eq!(words(fake::SET_VRING_NUM), [1 | 128 << 32]);
        assert_eq!(words(fake::SET_VRING_BASE), [1]);
        assert_eq!(words(fake::SET_VRING_KICK), [1]);
        let fds: Vec<usize> = seen.iter().map(|seen| seen.fds.len()).collect();
        assert_eq!(fds, [0, 2, 0, 0, 0, 1, 1, 1, 0, 0, 0, 0, 1, 1, 1, 0]);

        device.deactivate().unwrap();
        assert!(!device.is_active());
        device.deactivate().unwrap();
        drop(device);
        assert_eq!(
            fake.requests(),
            [
                fake::GET_VRING_BASE,
                fake::GET_VRING_BASE,
                fake::RESET_DEVICE
            ]
        );
    }

    #[test]
    fn a_card_of_somebody_elses_daemon_has_the_front_ends_face_and_no_control_queue() {
        let grant = DeviceGrant {
            spec: DeviceSpec::Net(NetSpec {
                id: "net0".into(),
                mac: [2, 0, 0, 0, 0, 1],
                queue_pairs: 1,
                control_queue: false,
                vhost: false,
                queue_size: 128,
                limits: Default::default(),
            }),
            backend: ipc::control::BackendGrant::Socket {
                option: "-chardev id=c".into(),
                path: "/s".into(),
            },
            iothread: None,
        };
        // CTRL_VQ, MQ and MTU, which are not passed on, and MRG_RXBUF, which is.
        let (csum, mtu, mergeable, control, mq) = (1, 1 << 3, 1 << 15, 1 << 17, 1 << 22);
        let (front, fake) = FakeDevice::start(Script {
            features: F_VERSION_1 | 1 << 30 | csum | mtu | mergeable | control | mq,
            // A pair.
            queues: 1,
            protocol: 1 | 1 << 3,
            ..Script::default()
        });
        let handshake = Handshake::begin_for(front, &grant).unwrap();
        let mut device = handshake.finish().unwrap();
        assert_eq!(device.num_queues(), 2);
        assert_eq!(
            device.features(),
            F_VERSION_1 | csum | mergeable | NET_OF_FRONT_END
        );
        assert_eq!(device.config()[..10], [2, 0, 0, 0, 0, 1, 1, 0, 1, 0]);
        fake.arrived();

        // 7 buffers are done, as the used ring says.
        let memory = memory();
        let state = queue(128, 0x1000, 4 << 30, 0x3000);
        memory.write_obj(7_u16, GuestAddress(0x3002)).unwrap();
        let event = || EventFd::new(0).unwrap();
        let (kick, call, error) = (event(), event(), event());
        let both = [0, 1].map(|index| QueueHandover {
            base: 0,
            index,
            state: &state,
            kick: &kick,
            call: &call,
            error: &error,
        });
        device.activate(device.features(), &memory, &both).unwrap();
        let seen = fake.arrived();
        let of = |seen: &[fake::Seen], request| -> Vec<Vec<u8>> {
            let found = seen.iter().filter(|seen| seen.request == request);
            found.map(|seen| seen.body.clone()).collect()
        };
        let told = (F_VERSION_1 | 1 << 30 | csum | mergeable).to_le_bytes();
        assert_eq!(of(&seen, fake::SET_FEATURES), [told]);
        let words = |index: u32, value: u32| [index.to_le_bytes(), value.to_le_bytes()].concat();
        assert_eq!(of(&seen, fake::SET_VRING_BASE), [words(0, 7), words(1, 7)]);

        for up in [false, true] {
            assert!(device.set_link(up).unwrap());
            assert_eq!(device.config()[NET_STATUS], u8::from(up));
            let seen = fake.arrived();
            let want = [words(0, u32::from(up)), words(1, u32::from(up))];
            assert_eq!(of(&seen, fake::SET_VRING_ENABLE), want);
            assert_eq!(seen.len(), 2, "{seen:?}");
        }
        device.set_link(false).unwrap();
        fake.arrived();
        device.activate(device.features(), &memory, &both).unwrap();
        let seen = fake.arrived();
        let last = of(&seen, fake::SET_VRING_ENABLE);
        assert_eq!(last[last.len() - 2..], [words(0, 0), words(1, 0)]);
    }

    #[test]
    fn many_queues_stay_within_the_window() {
        let spec = DeviceSpec::Net(ipc::spec::net::NetSpec {
            id: "net0".into(),
            mac: [2, 0, 0, 0, 0, 1],
            queue_pairs: 16,
            control_queue: true,
            vhost: false,
            queue_size: 256,
            limits: Default::default(),
        });
        let (front, fake) = FakeDevice::start(Script {
            queues: 33,
            ..Script::default()
        });
        let mut device = Handshake::begin(front, &spec)
            .and_then(Handshake::finish)
            .unwrap();
        let state = queue(256, 0x1000, 0x3000, 0x4000);
        let event = EventFd::new(0).unwrap();
        let queues: Vec<_> = (0..33)
            .map(|index| QueueHandover {
                base: 0,
                index,
                state: &state,
                kick: &event,
                call: &event,
                error: &event,
            })
            .collect();
        device.activate(F_VERSION_1, &memory(), &queues).unwrap();
        drop(device);
        let requests = fake.requests();
        let enabled = requests
            .iter()
            .filter(|&&request| request == fake::SET_VRING_ENABLE);
        assert_eq!(enabled.count(), 33);
    }

    #[test]
    fn an_inflight_region_is_fetched_once_and_dropped_at_reset() {
        let protocol = fake::PROTOCOL | 1 << 12;
        let (device, fake) = connect(Script {
            protocol,
            ..Script::default()
        });
        let mut device = device.unwrap();
        let state = queue(128, 0x1000, 0x2000, 0x3000);
        activate(&mut device, &state).unwrap();
        device.deactivate().unwrap();
        activate(&mut device, &state).unwrap();
        drop(device);
        let requests = fake.requests();
        let count = |wanted| {
            requests
                .iter()
                .filter(|&&request| request == wanted)
                .count()
        };
        assert_eq!(
            (count(fake::GET_INFLIGHT_FD), count(fake::SET_INFLIGHT_FD)),
            (2, 2)
        );
    }

    #[test]
    fn requests_in_flight_are_counted_and_lies_about_them_do_no_harm() {
        let region = |size: u64, queues: u16, entries: u16, bytes: &[u8]| {
            let mut layout = [0; INFLIGHT_LAYOUT];
            layout[..8].copy_from_slice(&size.to_le_bytes());
            layout[16..18].copy_from_slice(&queues.to_le_bytes());
            layout[18..20].copy_from_slice(&entries.to_le_bytes());
            let file = tempfile::tempfile().unwrap();
            file.write_all_at(bytes, 0).unwrap();
            InflightRegion {
                layout,
                file,
                process: 0,
            }
        };
        // Two queues of three entries in 64 bytes each.
        let mut bytes = [0; 128];
        for at in [16, 48, 64 + 32] {
            bytes[at] = 1;
        }
        assert_eq!(region(128, 2, 3, &bytes).count().unwrap(), 3);
        assert_eq!(region(128, 2, 2, &bytes).count().unwrap(), 2);
        for (size, queues, entries) in [
            (0, 0, 0),
            (0, 9, 9),
            (128, 0, 3),
            (128, 200, 3),
            (128, u16::MAX, u16::MAX),
        ] {
            let _ = region(size, queues, entries, &bytes).count().unwrap();
        }
        assert!(region(u64::MAX, 2, 3, &bytes).count().is_err());
        assert!(region(129, 2, 3, &bytes).count().is_err());
    }

    #[test]
    fn counters_are_the_end_of_the_region_wherever_a_device_says_that_is() {
        use ipc::counters::{Field, Kind};
        let region = |size: u64, offset: u64| {
            let mut layout = [0; INFLIGHT_LAYOUT];
            layout[..8].copy_from_slice(&size.to_le_bytes());
            layout[8..16].copy_from_slice(&offset.to_le_bytes());
            let file = tempfile::tempfile().unwrap();
            file.write_all_at(&7u64.to_le_bytes(), 64).unwrap();
            file.write_all_at(&[0xff; 8], 56).unwrap();
            file.set_len(64 + counters::BYTES as u64).unwrap();
            InflightRegion {
                layout,
                file,
                process: 0,
            }
        };
        let size = 64 + counters::BYTES as u64;
        let told = region(size, 0).counters().unwrap();
        assert_eq!(told.get(Kind::Read, Field::Operations), 7);
        for (size, offset) in [(size + 1, 0), (u64::MAX, 0), (size, u64::MAX), (size, 1)] {
            assert!(region(size, offset).counters().is_err(), "{size} {offset}");
        }
        // One that is smaller than they are: some numbers, and no harm.
        assert!(region(1, 0).counters().is_ok());
    }

    #[test]
    fn a_refusal_or_death_in_activation_leaves_the_device_without_process() {
        for what in [
            Misdeed::Refuse,
            Misdeed::Close,
            Misdeed::Reply([1, 2, 3], 3),
        ] {
            for request in [
                fake::SET_FEATURES,
                fake::SET_MEM_TABLE,
                fake::SET_VRING_KICK,
            ] {
                let (device, _fake) = connect(misbehave(request, what));
                let mut device = device.unwrap();
                let state = queue(128, 0x1000, 0x2000, 0x3000);
                assert!(activate(&mut device, &state).is_err(), "{what:?}");
                assert!(device.is_away());
                let again = activate(&mut device, &state);
                assert!(
                    matches!(again, Err(RemoteError::Failed { .. })),
                    "{again:?}"
                );
                assert!(device.deactivate().is_err(), "it may still touch memory");
                device.process_ended();
                device.deactivate().unwrap();
            }
        }
    }

    #[test]
    fn queues_outside_of_ram_never_reach_the_device() {
        let (device, fake) = connect(Script::default());
        let mut device = device.unwrap();
        fake.arrived();
        let end = 1 << 20;
        for state in [
            queue(128, end, 0x2000, 0x3000),
            queue(128, end - 16, 0x2000, 0x3000),
            queue(128, 0x1000, end - 4, 0x3000),
            queue(128, 0x1000, 0x2000, end - 1024),
            queue(128, u64::MAX - 15, 0x2000, 0x3000),
            queue(128, 0x1000, u64::MAX - 1, 0x3000),
            queue(128, 0x1000, 0x2000, 2 << 30),
        ] {
            let error = activate(&mut device, &state).unwrap_err();
            assert!(error.is_guests_fault(), "{error}");
        }
        assert!(!device.is_away() && fake.arrived().is_empty());
        // The last bytes of RAM are RAM.
        activate(
            &mut device,
            &queue(128, end - 2048, 0x2000, end - 2048 - 1032),
        )
        .unwrap();
    }

    #[test]
    fn configuration_writes_come_back_as_the_device_took_them() {
        let (device, _fake) = connect(Script::default());
        let mut device = device.unwrap();
        device.write_config(32, &[7]).unwrap();
        assert_eq!(device.config()[32], 7);
        let (device, _fake) = connect(misbehave(fake::SET_CONFIG, Misdeed::Refuse));
        let mut device = device.unwrap();
        device.write_config(32, &[7]).unwrap();
        assert_eq!(device.config()[32], 0);
        assert!(!device.is_away(), "a refused write is the guest's affair");
        let (device, _fake) = connect(misbehave(fake::SET_CONFIG, Misdeed::Close));
        let mut device = device.unwrap();
        assert!(device.write_config(32, &[7]).is_err());
        assert!(device.is_away());
    }
}
