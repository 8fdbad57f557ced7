//! What crosses to the main thread when something is added to the running VM.
//!
//! **Job.** The typed form of `blockdev-add`, `netdev_add`, `fsdev-add`, `chardev-add` and `device_add`. **Who is not trusted.** The client;
//! every value is within its range here, and nothing has been opened. **Why this way.** The same spec types as the command
//! line gives, so that a device that is added later is made of the same parts as one that was there from the start.

use ipc::control::added::Addition;
use ipc::limits;
use ipc::spec::block::{Aio, BlockIo, BlockSpec, DetectZeroes, ImageFormat};
use ipc::spec::fs::{FsCache, FsSpec};
use ipc::spec::ids::Translation;
use ipc::spec::net::{Bucket, Limit, NetLimits, NetSpec};
use ipc::spec::vm::{ChardevBackend, ChardevSpec, DriveSpec, FsdevSpec, NetBackend, NetdevSpec};
use ipc::spec::{DeviceSpec, vm::DeviceKind, vm::FsSource};

use super::schema::Arguments;

/// A back end that is to be added.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum NewBackend {
    /// `blockdev-add`, with the name of the node below a qcow2 image.
    Drive(DriveSpec, Option<String>),
    /// `netdev_add`
    Netdev(NetdevSpec),
    /// `fsdev-add`
    Fsdev(FsdevSpec),
    /// `chardev-add`: where somebody else's vhost-user daemon listens, or a connection to it.
    Chardev(ChardevSpec),
}

/// A format that is to be put over a node which was added before: what is not given is as it is there.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NodeOver {
    /// `node-name`
    pub name: String,
    /// `driver`
    pub format: ImageFormat,
    /// `backing`: the node below a qcow2 image.
    pub backing: Option<String>,
    /// `file`: the node below.
    pub file: String,
    /// `read-only`
    pub readonly: Option<bool>,
    /// `cache.direct`
    pub direct: Option<bool>,
    /// `discard`
    pub discard: Option<bool>,
    /// `detect-zeroes`
    pub detect_zeroes: Option<DetectZeroes>,
}

impl NodeOver {
    /// `blockdev-add` whose `file` is a text; `None` if it is none.
    pub(super) fn read(arguments: &mut Arguments) -> Option<Self> {
        arguments.at(&["file"])?.as_str()?;
        Some(Self {
            name: arguments.required_text("node-name"),
            format: format(arguments),
            backing: arguments.text("backing"),
            file: arguments.required_text("file"),
            readonly: arguments.flag("read-only"),
            direct: arguments.object("cache").flag("direct"),
            discard: arguments.text("discard").map(|word| word == "unmap"),
            detect_zeroes: detect_zeroes(arguments),
        })
    }

    /// What `below` is with this over it.
    ///
    /// # Errors
    /// The two contradict each other, told as QMP tells it.
    pub fn over(&self, below: &DriveSpec) -> Result<DriveSpec, String> {
        let wrong = |name: &str, given: bool, allowed: &str| {
            Err(format!(
                "Parameter '{name}' is {given}, and its image was opened by node '{}' with {}; allowed: {allowed}",
                self.file, !given
            ))
        };
        if below.readonly && self.readonly == Some(false) {
            return wrong("read-only", false, "true");
        }
        if let Some(direct) = self.direct
            && direct != below.direct
        {
            return wrong("cache.direct", direct, "the same");
        }
        let mut drive = below.clone();
        drive.id.clone_from(&self.name);
        drive.io.format = self.format;
        // Its process may do less than the node below, as libvirt has it for images that others stand on.
        drive.readonly |= self.readonly == Some(true);
        // As with -blockdev: what is said of neither node is off, and what is said of one counts.
        drive.io.discard = self.discard.unwrap_or(below.io.discard);
        drive.io.detect_zeroes = self.detect_zeroes.unwrap_or(below.io.detect_zeroes);
        Ok(drive)
    }
}

fn format(arguments: &mut Arguments) -> ImageFormat {
    match arguments.text("driver").as_deref() {
        Some("qcow2") => ImageFormat::Qcow2 {
            below: 0,
            raw_base: false,
            most: 0,
        },
        _ => ImageFormat::Raw,
    }
}

fn detect_zeroes(arguments: &mut Arguments) -> Option<DetectZeroes> {
    Some(match arguments.text("detect-zeroes")?.as_str() {
        "on" => DetectZeroes::On,
        "unmap" => DetectZeroes::Unmap,
        _ => DetectZeroes::Off,
    })
}

/// As `-netdev throttling.…=`.
fn net_limits(arguments: &Arguments) -> NetLimits {
    let bucket = |name: &str| {
        let rate = arguments.uint(&format!("throttling.{name}")).unwrap_or(0);
        // A tenth of a second's worth.
        let burst = arguments.uint(&format!("throttling.{name}-burst"));
        Bucket {
            rate,
            burst: burst.unwrap_or(rate.div_ceil(10)),
        }
    };
    let limit = |direction: &str| Limit {
        packets: bucket(&format!("{direction}-packets")),
        bytes: bucket(&format!("{direction}-bytes")),
    };
    NetLimits {
        rx: limit("rx"),
        tx: limit("tx"),
    }
}

/// A tap that is to take the place of the one behind a netdev: `netdev_replace`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct OtherTap {
    /// `id`: the netdev.
    pub netdev: String,
    /// By its name, or descriptors that came along.
    pub tap: NetBackend,
    /// `queues`
    pub queues: Option<u16>,
}

impl OtherTap {
    /// `netdev_replace`
    pub(super) fn read(mut arguments: Arguments) -> Self {
        Self {
            netdev: arguments.required_text("id"),
            // The numbers of descriptors are the broker's.
            tap: match arguments.text("ifname") {
                Some(name) => NetBackend::TapName(name),
                None => NetBackend::TapFds(Vec::new()),
            },
            queues: small(&arguments, "queues"),
        }
    }
}

/// Which of the four name spaces an id is in.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum BackendKind {
    /// Of `blockdev-add`.
    Drive,
    /// Of `netdev_add`.
    Netdev,
    /// Of `fsdev-add`.
    Fsdev,
    /// Of `chardev-add`.
    Chardev,
}

impl BackendKind {
    /// For messages.
    pub const fn noun(self) -> &'static str {
        match self {
            Self::Drive => "Block node",
            Self::Netdev => "Netdev",
            Self::Fsdev => "Fsdev",
            Self::Chardev => "Chardev",
        }
    }
}

impl NewBackend {
    /// `blockdev-add`
    pub(super) fn drive(mut arguments: Arguments) -> Self {
        let mut file = arguments.object("file");
        let cache = arguments.object("cache");
        let name = file.text("filename").or_else(|| arguments.text("filename"));
        let backing = arguments.text("backing");
        let drive = DriveSpec {
            id: arguments.required_text("node-name"),
            file: name.unwrap_or_default().into(),
            readonly: arguments.flag("read-only").unwrap_or(false),
            direct: cache.flag("direct").unwrap_or(true),
            backing: Vec::new(),
            max_size: None,
            io: BlockIo {
                aio: match file.text("aio").as_deref() {
                    Some("off" | "threads") => Aio::Off,
                    Some("io_uring") => Aio::IoUring,
                    _ => Aio::Native,
                },
                discard: arguments.text("discard").as_deref() == Some("unmap"),
                detect_zeroes: detect_zeroes(&mut arguments).unwrap_or(DetectZeroes::Off),
                iops_total: small(&arguments, "iops").unwrap_or(0),
                format: format(&mut arguments),
                ..BlockIo::default()
            },
        };
        Self::Drive(drive, backing)
    }

    /// `netdev_add`
    pub(super) fn netdev(mut arguments: Arguments, fds: usize) -> Self {
        let given = u16::try_from(fds).ok().filter(|count| *count > 0);
        let queues = given.or_else(|| small(&arguments, "queues"));
        let vhost = arguments.flag("vhost").unwrap_or(false);
        let daemon = arguments.at(&["chardev"]).is_some();
        Self::Netdev(NetdevSpec {
            id: arguments.required_text("id"),
            backend: match (arguments.text("chardev"), arguments.text("ifname")) {
                (Some(chardev), _) => NetBackend::Daemon(chardev),
                (None, Some(name)) => NetBackend::TapName(name),
                // Their numbers are the broker's.
                (None, None) => NetBackend::TapFds(Vec::new()),
            },
            queues: queues.unwrap_or(1),
            poll_us: if vhost || daemon {
                0
            } else {
                small(&arguments, "poll-us").unwrap_or(limits::NET_POLL_US)
            },
            vhost,
            // The broker opens its own.
            vhost_fds: Vec::new(),
            limits: net_limits(&arguments),
        })
    }

    /// `chardev-add`, whose address was checked to be a unix socket's or a descriptor.
    pub(super) fn chardev(mut arguments: Arguments, fds: usize) -> Self {
        let id = arguments.required_text("id");
        let mut socket = arguments.object("backend").object("data");
        let path = socket.object("addr").object("data").text("path");
        Self::Chardev(ChardevSpec {
            id,
            backend: match path {
                Some(path) if fds == 0 => ChardevBackend::Socket {
                    path: path.into(),
                    server: false,
                    nowait: true,
                },
                // Its number is the broker's.
                _ => ChardevBackend::Inherited {
                    fd: -1,
                    server: false,
                    nowait: true,
                },
            },
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
            users: Translation::default(),
            groups: Translation::default(),
        })
    }

    /// Which name space it is in.
    pub const fn kind(&self) -> BackendKind {
        match self {
            Self::Drive(..) => BackendKind::Drive,
            Self::Netdev(_) => BackendKind::Netdev,
            Self::Fsdev(_) => BackendKind::Fsdev,
            Self::Chardev(_) => BackendKind::Chardev,
        }
    }

    /// Its id.
    pub fn id(&self) -> &str {
        match self {
            Self::Drive(drive, _) => &drive.id,
            Self::Netdev(netdev) => &netdev.id,
            Self::Fsdev(fsdev) => &fsdev.id,
            Self::Chardev(chardev) => &chardev.id,
        }
    }

    /// What the broker is asked for; `given` tells whether descriptors go along.
    pub fn addition(&self, given: bool) -> Addition {
        match self {
            Self::Drive(drive, _) if given => Addition::GivenImage {
                readonly: drive.readonly,
                direct: drive.direct,
            },
            Self::Drive(drive, _) => Addition::Image {
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
            Self::Chardev(ChardevSpec {
                backend: ChardevBackend::Socket { path, .. },
                ..
            }) => Addition::Socket { path: path.clone() },
            Self::Chardev(_) => Addition::GivenSocket,
        }
    }

    /// Whether somebody else's daemon is behind it.
    pub const fn is_foreign(&self) -> bool {
        matches!(
            self,
            Self::Chardev(_)
                | Self::Netdev(NetdevSpec {
                    backend: NetBackend::Daemon(_),
                    ..
                })
        )
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
    /// `restart`, `max-restarts`; `None`: as is usual for its kind.
    pub most: Option<u16>,
    /// `addr`: its number among the devices of its kind.
    pub addr: Option<u8>,
    /// It is named as StratoVirt's clients do, `-mmio` and with the id of its back end, which goes with it then.
    pub goes_along: bool,
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
    /// `vhost-user-blk-device`
    ForeignBlock {
        /// `chardev`
        chardev: String,
        /// `num-queues`
        num_queues: Option<u16>,
        /// `queue-size`
        queue_size: u16,
    },
    /// `vhost-user-fs-device`
    ForeignFs {
        /// `chardev`
        chardev: String,
        /// `tag`, or the device's id.
        tag: String,
        /// `num-request-queues`
        request_queues: u16,
        /// `queue-size`
        queue_size: u16,
    },
}

/// Drivers that `device_add` knows; StratoVirt's clients write `-mmio`.
pub(super) const DRIVERS: [&str; 8] = [
    "virtio-blk-device",
    "virtio-blk-mmio",
    "virtio-net-device",
    "virtio-net-mmio",
    "virtio-fs-device",
    "virtio-fs-mmio",
    "vhost-user-blk-device",
    "vhost-user-fs-device",
];

/// Whether devices of `driver` have this property, as on the command line; `romfile`, which none has, may be given to any.
fn has_property(driver: &str, name: &str) -> bool {
    let foreign = driver.starts_with("vhost-user-");
    let is = |kind: &str| driver.contains(kind);
    match name {
        "drive" | "serial" => is("-blk-") && !foreign,
        "num-queues" => is("-blk-"),
        "netdev" | "mac" => is("-net-"),
        "fsdev" => is("-fs-") && !foreign,
        "tag" | "num-request-queues" => is("-fs-"),
        "iothread" | "max-restarts" => !foreign,
        _ => true,
    }
}

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
        let chardev = arguments.text("chardev");
        let foreign = driver.starts_with("vhost-user-");
        match &chardev {
            None if foreign => return Err("Parameter 'chardev' is missing".into()),
            Some(_) if !foreign => {
                return Err(format!(
                    "Property '{driver}.chardev' not found; a card's is of its netdev"
                ));
            }
            _ => {}
        }
        if let Some(name) = arguments.names().find(|name| !has_property(&driver, name)) {
            return Err(format!("Property '{driver}.{name}' not found"));
        }
        let request_queues = small(&arguments, "num-request-queues").unwrap_or(1);
        let num_queues = small(&arguments, "num-queues");
        let part = if foreign { 2 } else { 1 };
        let kind = match (driver.split('-').nth(part), chardev) {
            (Some("blk"), Some(chardev)) => NewKind::ForeignBlock {
                chardev,
                num_queues,
                queue_size: queue_size.unwrap_or(limits::FOREIGN_DISK_QUEUE_SIZE),
            },
            (_, Some(chardev)) => NewKind::ForeignFs {
                chardev,
                tag: behind(arguments.text("tag")),
                request_queues,
                queue_size: queue_size.unwrap_or(limits::MAX_FS_QUEUE_SIZE),
            },
            (Some("blk"), None) => NewKind::Block {
                drive: behind(arguments.text("drive")),
                serial: arguments.text("serial"),
                num_queues,
                queue_size: queue_size.unwrap_or(limits::DEFAULT_QUEUE_SIZE),
            },
            (Some("net"), None) => NewKind::Net {
                netdev: behind(arguments.text("netdev")),
                mac: match arguments.text("mac") {
                    None => None,
                    Some(text) => Some(crate::cmdline::read_mac(&text).ok_or_else(|| {
                        format!("mac {text} is not valid; allowed: six hexadecimal bytes, as in 52:54:00:12:34:56, the first one even")
                    })?),
                },
                queue_size: queue_size.unwrap_or(limits::DEFAULT_QUEUE_SIZE),
            },
            (_, None) => NewKind::Fs {
                fsdev: behind(arguments.text("fsdev")),
                tag: behind(arguments.text("tag")),
                request_queues,
                queue_size: queue_size.unwrap_or(limits::MAX_FS_QUEUE_SIZE),
            },
        };
        let addr = match arguments.text("addr") {
            None => None,
            Some(text) => Some(read_addr(&text, &kind)?),
        };
        let given = small(&arguments, "max-restarts");
        let most = match arguments.flag("restart") {
            Some(false) if given.is_some() => {
                return Err("max-restarts contradicts restart=false; allowed with it: none".into());
            }
            Some(false) => Some(0),
            Some(true) => Some(given.unwrap_or(limits::DEFAULT_RESTARTS)),
            None if foreign => None,
            None => given,
        };
        let mut device = Self {
            iothread: arguments.text("iothread"),
            id,
            kind,
            most,
            addr,
            goes_along: false,
        };
        device.goes_along = driver.ends_with("-mmio") && device.backend().1 == device.id;
        Ok(device)
    }

    /// Name and kind of its back end.
    pub fn backend(&self) -> (BackendKind, &str) {
        match &self.kind {
            NewKind::Block { drive, .. } => (BackendKind::Drive, drive),
            NewKind::Net { netdev, .. } => (BackendKind::Netdev, netdev),
            NewKind::Fs { fsdev, .. } => (BackendKind::Fsdev, fsdev),
            NewKind::ForeignBlock { chardev, .. } | NewKind::ForeignFs { chardev, .. } => {
                (BackendKind::Chardev, chardev)
            }
        }
    }

    /// How often its process, or the connection to somebody else's, may be another one. A daemon may not know what a disk's or a
    /// folder's guest had under way; a connection that a client passed cannot be made again.
    pub fn restarts(&self, passed: bool) -> u16 {
        let foreign = matches!(
            self.kind,
            NewKind::ForeignBlock { .. } | NewKind::ForeignFs { .. }
        );
        match self.most {
            _ if passed => 0,
            None if foreign => 0,
            most => most.unwrap_or(limits::DEFAULT_RESTARTS),
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
                NewBackend::Drive(drive, _),
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
                // Daemons leave it to the front end, and ours reads no queue.
                control_queue: !backend.is_foreign(),
                vhost: netdev.vhost,
                limits: netdev.limits,
                stands_in: None,
                poll_us: netdev.poll_us,
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
                users: fsdev.users.clone(),
                groups: fsdev.groups.clone(),
                request_queues: *request_queues,
                queue_size: *queue_size,
                // Its place in the guest's memory would have to be made while the guest runs.
                window: 0,
            }),
            (
                NewKind::ForeignBlock {
                    num_queues,
                    queue_size,
                    ..
                },
                NewBackend::Chardev(_),
            ) => DeviceSpec::Block(BlockSpec {
                // What the daemon knows better is not said here, as for one of the command line.
                id,
                readonly: false,
                direct: false,
                serial: String::new(),
                num_queues: num_queues.unwrap_or(vcpus.min(limits::MAX_BLOCK_QUEUES)),
                queue_size: *queue_size,
                io: BlockIo::default(),
            }),
            (
                NewKind::ForeignFs {
                    tag,
                    request_queues,
                    queue_size,
                    ..
                },
                NewBackend::Chardev(_),
            ) => DeviceSpec::Fs(FsSpec {
                id,
                tag: tag.clone(),
                readonly: false,
                cache: FsCache::default(),
                xattr: false,
                posix_acl: false,
                users: Translation::default(),
                groups: Translation::default(),
                request_queues: *request_queues,
                queue_size: *queue_size,
                window: 0,
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
                window: 0,
            },
            (
                NewKind::ForeignFs {
                    chardev,
                    tag,
                    request_queues,
                    queue_size,
                },
                _,
            ) => DeviceKind::Fs {
                source: FsSource::Chardev(chardev.clone()),
                tag: tag.clone(),
                request_queues: *request_queues,
                queue_size: *queue_size,
                window: 0,
            },
            (NewKind::ForeignBlock { chardev, .. }, _) => DeviceKind::ForeignBlock {
                chardev: chardev.clone(),
                num_queues: spec.num_queues(),
                queue_size: spec.queue_size(),
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
        NewKind::Block { .. } | NewKind::ForeignBlock { .. } => limits::MAX_MICROVM_DISKS,
        NewKind::Net { .. } => limits::MAX_MICROVM_NICS,
        NewKind::Fs { .. } | NewKind::ForeignFs { .. } => limits::MAX_MMIO_DEVICES,
    } - 1;
    let number = match text.strip_prefix("0x") {
        Some(hex) => u8::from_str_radix(hex, 16).ok(),
        None => text.parse().ok(),
    };
    number
        .filter(|number| usize::from(*number) <= most)
        .ok_or_else(|| format!("addr {text} is not valid; allowed: 0x0 to {most:#x}"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn arguments(command: &str, given: serde_json::Value) -> Result<Arguments, String> {
        let command = super::super::schema::find(command).unwrap();
        let serde_json::Value::Object(given) = given else {
            panic!("{given}");
        };
        super::super::schema::arguments(command, given).map_err(|error| error.desc)
    }

    #[test]
    fn a_netdev_has_the_limits_that_it_is_given() {
        let given = json!({
            "id": "n", "ifname": "tap0",
            "throttling.rx-bytes": 1_000_000, "throttling.tx-packets": 5, "throttling.tx-packets-burst": 7,
        });
        let NewBackend::Netdev(netdev) =
            NewBackend::netdev(arguments("netdev_add", given).unwrap(), 0)
        else {
            panic!("no netdev");
        };
        let none = Bucket::default();
        let bucket = |rate, burst| Bucket { rate, burst };
        let rx = Limit {
            packets: none,
            bytes: bucket(1_000_000, 100_000),
        };
        let tx = Limit {
            packets: bucket(5, 7),
            bytes: none,
        };
        assert_eq!(netdev.limits, NetLimits { rx, tx });
        let too_much = json!({ "id": "n", "ifname": "tap0", "throttling.rx-bytes": u64::MAX });
        let said = arguments("netdev_add", too_much).unwrap_err();
        assert!(said.contains("'throttling.rx-bytes'"), "{said}");
    }

    #[test]
    fn a_device_takes_the_properties_of_its_kind_and_no_others() {
        let read = |driver: &str, more: serde_json::Value| {
            let mut given = json!({ "id": "d", "driver": driver });
            if driver.starts_with("vhost-user-") {
                given["chardev"] = "c".into();
            }
            if let (Some(given), Some(more)) = (given.as_object_mut(), more.as_object()) {
                given.extend(more.clone());
            }
            NewDevice::read(arguments("device_add", given)?)
        };

        for (property, value, like) in [
            ("drive", json!("x"), "virtio-blk-"),
            ("serial", json!("x"), "virtio-blk-"),
            ("num-queues", json!(2), "-blk-"),
            ("netdev", json!("x"), "-net-"),
            ("mac", json!("02:00:00:00:00:01"), "-net-"),
            ("fsdev", json!("x"), "virtio-fs-"),
            ("tag", json!("x"), "-fs-"),
            ("num-request-queues", json!(2), "-fs-"),
            ("iothread", json!("x"), "virtio-"),
            ("max-restarts", json!(7), "virtio-"),
            ("restart", json!(true), ""),
            ("queue-size", json!(256), ""),
            ("romfile", json!(""), ""),
        ] {
            for driver in DRIVERS {
                let said = read(driver, json!({ property: value.clone() }));
                if driver.contains(like) {
                    assert!(said.is_ok(), "{driver} {property}: {said:?}");
                } else {
                    let want = format!("Property '{driver}.{property}' not found");
                    assert_eq!(said, Err(want));
                }
            }
        }
        let disk = |more| read("virtio-blk-device", more);
        let most = |more| disk(more).unwrap().restarts(false);
        assert_eq!(most(json!({})), 5);
        assert_eq!(most(json!({ "max-restarts": 7 })), 7);
        assert_eq!(most(json!({ "restart": false })), 0);
        assert_eq!(
            disk(json!({ "restart": false, "max-restarts": 7 })).unwrap_err(),
            "max-restarts contradicts restart=false; allowed with it: none"
        );
        let said = disk(json!({ "max-restarts": 0 })).unwrap_err();
        assert!(
            said.contains("'max-restarts'") && said.contains("1 to 1000"),
            "{said}"
        );
        // A daemon that comes back may not know what the guest had under way.
        let foreign = |more| read("vhost-user-fs-device", more).unwrap().restarts(false);
        assert_eq!(
            (foreign(json!({})), foreign(json!({ "restart": true }))),
            (0, 5)
        );
    }

    #[test]
    fn a_card_looks_for_packets_as_long_as_its_netdev_says() {
        for (more, poll_us) in [
            (json!({}), limits::NET_POLL_US),
            (json!({ "poll-us": 200 }), 200),
            (json!({ "poll-us": 0 }), 0),
            (json!({ "vhost": true }), 0),
        ] {
            let mut given = json!({ "id": "n", "ifname": "tap0" });
            if let (Some(given), Some(more)) = (given.as_object_mut(), more.as_object()) {
                given.extend(more.clone());
            }
            let netdev = NewBackend::netdev(arguments("netdev_add", given).unwrap(), 0);
            let card = json!({ "id": "c", "driver": "virtio-net-device", "netdev": "n" });
            let card = NewDevice::read(arguments("device_add", card).unwrap()).unwrap();
            let spec = card.spec(&netdev, 1, [2, 0, 0, 0, 0, 1]);
            assert!(
                matches!(&spec, Some(DeviceSpec::Net(card)) if card.poll_us == poll_us),
                "{more}: {spec:?}"
            );
        }
        let too_long = json!({ "id": "n", "ifname": "tap0", "poll-us": 201 });
        let said = arguments("netdev_add", too_long).unwrap_err();
        assert!(said.contains("'poll-us'") && said.contains("200"), "{said}");
    }

    #[test]
    fn a_format_says_only_what_it_was_given() {
        let NewBackend::Drive(below, _) = NewBackend::drive(
            arguments(
                "blockdev-add",
                json!({ "node-name": "s", "driver": "file", "filename": "/x", "discard": "unmap", "read-only": true }),
            )
            .unwrap(),
        ) else {
            panic!("no drive");
        };
        let over = |more: serde_json::Value| {
            let mut given = json!({ "node-name": "f", "driver": "raw", "file": "s" });
            if let (Some(given), Some(more)) = (given.as_object_mut(), more.as_object()) {
                given.extend(more.clone());
            }
            let mut arguments = arguments("blockdev-add", given).unwrap();
            NodeOver::read(&mut arguments).unwrap().over(&below)
        };
        let same = over(json!({})).unwrap();
        assert_eq!(same.id, "f");
        assert_eq!(
            DriveSpec {
                id: "s".into(),
                ..same
            },
            below
        );
        let other = over(json!({ "discard": "ignore", "detect-zeroes": "unmap" })).unwrap();
        assert!(!other.io.discard);
        assert_eq!(other.io.detect_zeroes, DetectZeroes::Unmap);
        let qcow2 = over(json!({ "driver": "qcow2", "backing": null })).unwrap();
        let alone = ImageFormat::Qcow2 {
            below: 0,
            raw_base: false,
            most: 0,
        };
        assert_eq!(qcow2.io.format, alone);
        for (contradiction, name) in [
            (json!({ "read-only": false }), "read-only"),
            (json!({ "cache": { "direct": false } }), "cache.direct"),
        ] {
            let said = over(contradiction).unwrap_err();
            assert!(said.contains(name), "{said}");
        }
        let mut plain = arguments(
            "blockdev-add",
            json!({ "node-name": "s", "file": { "filename": "/x" } }),
        )
        .unwrap();
        assert_eq!(NodeOver::read(&mut plain), None);
    }
}
