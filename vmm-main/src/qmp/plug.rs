//! What crosses to the main thread when something is added to the running VM.
//!
//! **Job.** The typed form of `blockdev-add`, `netdev_add`, `fsdev-add` and `device_add`. **Who is not trusted.** The client;
//! every value is within its range here, and nothing has been opened. **Why this way.** The same spec types as the command
//! line gives, so that a device that is added later is made of the same parts as one that was there from the start.

use ipc::control::added::Addition;
use ipc::limits;
use ipc::spec::block::{Aio, BlockIo, BlockSpec, DetectZeroes};
use ipc::spec::fs::{FsCache, FsSpec};
use ipc::spec::net::{NetLimits, NetSpec};
use ipc::spec::vm::{DriveSpec, FsdevSpec, NetBackend, NetdevSpec};
use ipc::spec::{DeviceSpec, vm::DeviceKind, vm::FsSource};

use super::schema::Arguments;

/// A back end that is to be added.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum NewBackend {
    /// `blockdev-add`
    Drive(DriveSpec),
    /// `netdev_add`
    Netdev(NetdevSpec),
    /// `fsdev-add`
    Fsdev(FsdevSpec),
}

/// Which of the three name spaces an id is in.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum BackendKind {
    /// Of `blockdev-add`.
    Drive,
    /// Of `netdev_add`.
    Netdev,
    /// Of `fsdev-add`.
    Fsdev,
}

impl BackendKind {
    /// For messages.
    pub const fn noun(self) -> &'static str {
        match self {
            Self::Drive => "Block node",
            Self::Netdev => "Netdev",
            Self::Fsdev => "Fsdev",
        }
    }
}

impl NewBackend {
    /// `blockdev-add`
    pub(super) fn drive(mut arguments: Arguments) -> Self {
        let mut file = arguments.object("file");
        let cache = arguments.object("cache");
        let name = file.text("filename").or_else(|| arguments.text("filename"));
        Self::Drive(DriveSpec {
            id: arguments.required_text("node-name"),
            file: name.unwrap_or_default().into(),
            readonly: arguments.flag("read-only").unwrap_or(false),
            direct: cache.flag("direct").unwrap_or(true),
            max_size: None,
            io: BlockIo {
                aio: match file.text("aio").as_deref() {
                    Some("off" | "threads") => Aio::Off,
                    Some("io_uring") => Aio::IoUring,
                    _ => Aio::Native,
                },
                discard: arguments.text("discard").as_deref() == Some("unmap"),
                detect_zeroes: match arguments.text("detect-zeroes").as_deref() {
                    Some("on") => DetectZeroes::On,
                    Some("unmap") => DetectZeroes::Unmap,
                    _ => DetectZeroes::Off,
                },
                iops_total: small(&arguments, "iops").unwrap_or(0),
                ..BlockIo::default()
            },
        })
    }

    /// `netdev_add`
    pub(super) fn netdev(mut arguments: Arguments, fds: usize) -> Self {
        let given = u16::try_from(fds).ok().filter(|count| *count > 0);
        let queues = given.or_else(|| small(&arguments, "queues"));
        Self::Netdev(NetdevSpec {
            id: arguments.required_text("id"),
            backend: match arguments.text("ifname") {
                Some(name) => NetBackend::TapName(name),
                // Their numbers are the broker's.
                None => NetBackend::TapFds(Vec::new()),
            },
            queues: queues.unwrap_or(1),
            limits: NetLimits::default(),
        })
    }

    /// `fsdev-add`
    pub(super) fn fsdev(mut arguments: Arguments) -> Self {
        let on = |name| arguments.flag(name).unwrap_or(false);
        let (readonly, xattr, posix_acl) = (on("readonly"), on("xattr"), on("posix-acl"));
        Self::Fsdev(FsdevSpec {
            id: arguments.required_text("id"),
            path: arguments.required_text("path").into(),
            readonly,
            cache: match arguments.text("cache").as_deref() {
                Some("never") => FsCache::Never,
                Some("metadata") => FsCache::Metadata,
                Some("always") => FsCache::Always,
                _ => FsCache::Auto,
            },
            xattr: xattr || posix_acl,
            posix_acl,
        })
    }

    /// Which name space it is in.
    pub const fn kind(&self) -> BackendKind {
        match self {
            Self::Drive(_) => BackendKind::Drive,
            Self::Netdev(_) => BackendKind::Netdev,
            Self::Fsdev(_) => BackendKind::Fsdev,
        }
    }

    /// Its id.
    pub fn id(&self) -> &str {
        match self {
            Self::Drive(drive) => &drive.id,
            Self::Netdev(netdev) => &netdev.id,
            Self::Fsdev(fsdev) => &fsdev.id,
        }
    }

    /// What the broker is asked for; `given` tells whether descriptors go along.
    pub fn addition(&self, given: bool) -> Addition {
        match self {
            Self::Drive(drive) if given => Addition::GivenImage {
                readonly: drive.readonly,
                direct: drive.direct,
            },
            Self::Drive(drive) => Addition::Image {
                path: drive.file.clone(),
                readonly: drive.readonly,
                direct: drive.direct,
            },
            Self::Netdev(NetdevSpec {
                backend: NetBackend::TapName(ifname),
                queues,
                ..
            }) => Addition::Tap {
                ifname: ifname.clone(),
                queues: *queues,
            },
            Self::Netdev(_) => Addition::GivenTap,
            Self::Fsdev(fsdev) => Addition::Folder {
                path: fsdev.path.clone(),
                readonly: fsdev.readonly,
            },
        }
    }
}

/// A device that is to be added: `device_add`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NewDevice {
    /// `id`
    pub id: String,
    /// What it is.
    pub kind: NewKind,
    /// `iothread`
    pub iothread: Option<String>,
    /// `restart`, `max-restarts`
    pub most: u16,
    /// `addr`: its number among the devices of its kind.
    pub addr: Option<u8>,
}

/// Its kind, with what is its own.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum NewKind {
    /// `virtio-blk-device`
    Block {
        /// `drive`, or the device's own id.
        drive: String,
        /// `serial`
        serial: Option<String>,
        /// `num-queues`
        num_queues: Option<u16>,
        /// `queue-size`
        queue_size: u16,
    },
    /// `virtio-net-device`
    Net {
        /// `netdev`, or the device's own id.
        netdev: String,
        /// `mac`
        mac: Option<[u8; 6]>,
        /// `queue-size`
        queue_size: u16,
    },
    /// `virtio-fs-device`
    Fs {
        /// `fsdev`, or the device's own id.
        fsdev: String,
        /// `tag`, or the device's id.
        tag: String,
        /// `num-request-queues`
        request_queues: u16,
        /// `queue-size`
        queue_size: u16,
    },
}

/// Drivers that `device_add` knows; StratoVirt's clients write `-mmio`.
pub(super) const DRIVERS: [&str; 6] = [
    "virtio-blk-device",
    "virtio-blk-mmio",
    "virtio-net-device",
    "virtio-net-mmio",
    "virtio-fs-device",
    "virtio-fs-mmio",
];

fn small<T: TryFrom<u64>>(arguments: &Arguments, name: &str) -> Option<T> {
    T::try_from(arguments.uint(name)?).ok()
}

impl NewDevice {
    /// `device_add`
    ///
    /// # Errors
    /// A value that the table of arguments cannot check.
    pub(super) fn read(mut arguments: Arguments) -> Result<Self, String> {
        let id = arguments.required_text("id");
        let driver = arguments.required_text("driver");
        let queue_size = small(&arguments, "queue-size");
        let behind = |name: Option<String>| name.unwrap_or_else(|| id.clone());
        let kind = match driver.split('-').nth(1) {
            Some("blk") => NewKind::Block {
                drive: behind(arguments.text("drive")),
                serial: arguments.text("serial"),
                num_queues: small(&arguments, "num-queues"),
                queue_size: queue_size.unwrap_or(limits::DEFAULT_QUEUE_SIZE),
            },
            Some("net") => NewKind::Net {
                netdev: behind(arguments.text("netdev")),
                mac: match arguments.text("mac") {
                    None => None,
                    Some(text) => Some(crate::cmdline::read_mac(&text).ok_or_else(|| {
                        format!("mac {text} is not valid; allowed: six hexadecimal bytes, as in 52:54:00:12:34:56, the first one even")
                    })?),
                },
                queue_size: queue_size.unwrap_or(limits::DEFAULT_QUEUE_SIZE),
            },
            _ => NewKind::Fs {
                fsdev: behind(arguments.text("fsdev")),
                tag: behind(arguments.text("tag")),
                request_queues: small(&arguments, "num-request-queues").unwrap_or(1),
                queue_size: queue_size.unwrap_or(limits::MAX_FS_QUEUE_SIZE),
            },
        };
        let addr = match arguments.text("addr") {
            None => None,
            Some(text) => Some(read_addr(&text, &kind)?),
        };
        let most = match arguments.flag("restart") {
            Some(false) => 0,
            _ => small(&arguments, "max-restarts").unwrap_or(limits::DEFAULT_RESTARTS),
        };
        Ok(Self {
            iothread: arguments.text("iothread"),
            id,
            kind,
            most,
            addr,
        })
    }

    /// Name and kind of its back end.
    pub fn backend(&self) -> (BackendKind, &str) {
        match &self.kind {
            NewKind::Block { drive, .. } => (BackendKind::Drive, drive),
            NewKind::Net { netdev, .. } => (BackendKind::Netdev, netdev),
            NewKind::Fs { fsdev, .. } => (BackendKind::Fsdev, fsdev),
        }
    }

    /// What its process is told, if `backend` is one for it. `vcpus` and `mac` stand in for what was not given.
    pub fn spec(
        &self,
        backend: &NewBackend,
        vcpus: u16,
        default_mac: [u8; 6],
    ) -> Option<DeviceSpec> {
        let id = self.id.clone();
        Some(match (&self.kind, backend) {
            (
                NewKind::Block {
                    serial,
                    num_queues,
                    queue_size,
                    ..
                },
                NewBackend::Drive(drive),
            ) => DeviceSpec::Block(BlockSpec {
                id,
                readonly: drive.readonly,
                direct: drive.direct,
                serial: serial.clone().unwrap_or_default(),
                num_queues: num_queues.unwrap_or(vcpus.min(limits::MAX_BLOCK_QUEUES)),
                queue_size: *queue_size,
                io: drive.io,
            }),
            (
                NewKind::Net {
                    mac, queue_size, ..
                },
                NewBackend::Netdev(netdev),
            ) => DeviceSpec::Net(NetSpec {
                id,
                mac: mac.unwrap_or(default_mac),
                queue_pairs: netdev.queues,
                queue_size: *queue_size,
                limits: netdev.limits,
            }),
            (
                NewKind::Fs {
                    tag,
                    request_queues,
                    queue_size,
                    ..
                },
                NewBackend::Fsdev(fsdev),
            ) => DeviceSpec::Fs(FsSpec {
                id,
                tag: tag.clone(),
                readonly: fsdev.readonly,
                cache: fsdev.cache,
                xattr: fsdev.xattr,
                posix_acl: fsdev.posix_acl,
                request_queues: *request_queues,
                queue_size: *queue_size,
            }),
            _ => return None,
        })
    }

    /// As the command line would name it.
    pub fn option(&self, spec: &DeviceSpec) -> DeviceKind {
        match (&self.kind, spec) {
            (
                NewKind::Net {
                    netdev, queue_size, ..
                },
                DeviceSpec::Net(spec),
            ) => DeviceKind::Net {
                netdev: netdev.clone(),
                mac: spec.mac,
                queue_size: *queue_size,
            },
            (
                NewKind::Fs {
                    fsdev,
                    tag,
                    request_queues,
                    queue_size,
                },
                _,
            ) => DeviceKind::Fs {
                source: FsSource::Fsdev(fsdev.clone()),
                tag: tag.clone(),
                request_queues: *request_queues,
                queue_size: *queue_size,
            },
            _ => DeviceKind::Block {
                drive: self.backend().1.to_owned(),
                serial: match &self.kind {
                    NewKind::Block { serial, .. } => serial.clone(),
                    _ => None,
                },
                num_queues: spec.num_queues(),
                queue_size: spec.queue_size(),
            },
        }
    }
}

/// `0x1`, as StratoVirt's clients write it, or `1`.
fn read_addr(text: &str, kind: &NewKind) -> Result<u8, String> {
    let most = match kind {
        NewKind::Block { .. } => limits::MAX_MICROVM_DISKS,
        NewKind::Net { .. } => limits::MAX_MICROVM_NICS,
        NewKind::Fs { .. } => limits::MAX_MMIO_DEVICES,
    } - 1;
    let number = match text.strip_prefix("0x") {
        Some(hex) => u8::from_str_radix(hex, 16).ok(),
        None => text.parse().ok(),
    };
    number
        .filter(|number| usize::from(*number) <= most)
        .ok_or_else(|| format!("addr {text} is not valid; allowed: 0x0 to {most:#x}"))
}
