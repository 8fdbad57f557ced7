//! The whole VM as the command line asked for it, checked but not yet opened or built.
//!
//! **Job.** The result of `vmm-main/src/cmdline` and the input of everything after it. Paths are text here: only the
//! broker opens them.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use crate::control::added::AdditionGrant;
use crate::limits;
use crate::log::Level;
use crate::spec::cpus::{CpuList, NodeList};
use crate::spec::fs::FsCache;
use crate::start::{SandboxMode, SeccompMode};

/// Everything that one command line says.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct VmSpec {
    /// `-name`
    pub name: Option<String>,
    /// `-uuid`, as 16 bytes in the order of the text.
    pub uuid: Option<[u8; 16]>,
    /// `-machine`
    pub machine: MachineSpec,
    /// `-smp`, `-cpu`
    pub cpus: CpuSpec,
    /// `-m`, `-mem-path`, `-mem-prealloc`, `mem-share`, `dump-guest-core`
    pub memory: MemorySpec,
    /// `-kernel`, `-initrd`, `-append`
    pub boot: BootSpec,
    /// `-drive`, by their order.
    pub drives: Vec<DriveSpec>,
    /// `-netdev`
    pub netdevs: Vec<NetdevSpec>,
    /// `-fsdev`
    pub fsdevs: Vec<FsdevSpec>,
    /// `-chardev`, and those that `-serial stdio` and the like imply.
    pub chardevs: Vec<ChardevSpec>,
    /// Id of the chardev behind the serial port; `None` without `-serial`.
    pub serial: Option<String>,
    /// `-device`, by their order; each takes one virtio-mmio slot.
    pub devices: Vec<DeviceOption>,
    /// `-hotplug`: where devices may come from that are added later.
    pub hotplug: Vec<AdditionGrant>,
    /// `-object iothread`
    pub iothreads: Vec<IothreadSpec>,
    /// `-vcpu-affinity`: at most one for each vCPU, and one for the others.
    pub vcpu_affinity: Vec<VcpuAffinity>,
    /// `-qmp`, `-mon`
    pub monitors: Vec<MonitorSpec>,
    /// `-D` and the level of `STRATOVIRT_LOG_LEVEL`.
    pub log: LogSpec,
    /// `-daemonize`
    pub daemonize: bool,
    /// `-pidfile`
    pub pidfile: Option<PathBuf>,
    /// `-incoming file:`: the snapshot to go on from.
    pub incoming: Option<PathBuf>,
    /// `-incoming …,lazy=on`: guest memory comes in when it is wanted.
    pub incoming_lazy: bool,
    /// `-snapshot-dir`: where snapshots may be made.
    pub snapshot_dirs: Vec<PathBuf>,
    /// `-S`: vCPUs wait for `cont`.
    pub start_paused: bool,
    /// `-no-reboot`: a guest reset ends the VM.
    pub no_reboot: bool,
    /// `-no-shutdown`: a guest poweroff pauses the VM.
    pub no_shutdown: bool,
    /// `-disable-seccomp`, `-seccomp kill|log|trap`
    pub seccomp: SeccompMode,
    /// `-sandbox strict`
    pub sandbox: SandboxMode,
    /// Options that were accepted without effect, for one line in the log.
    pub ignored: Vec<String>,
}

/// `-object iothread`: what the processes of the devices that name it have in common.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct IothreadSpec {
    /// `id=`
    pub id: String,
    /// `cpus=`: where they run; `None`: wherever the VM may.
    pub cpus: Option<CpuList>,
}

/// `-vcpu-affinity`
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct VcpuAffinity {
    /// `vcpu=`; `None`: all that have none of their own.
    pub vcpu: Option<u8>,
    /// `cpus=`
    pub cpus: CpuList,
}

impl VmSpec {
    /// Where vCPU `vcpu` runs; `None`: wherever the VM may.
    pub fn vcpu_cpus(&self, vcpu: u32) -> Option<CpuList> {
        let of = |wanted: Option<u32>| {
            let mut all = self.vcpu_affinity.iter();
            all.find(|one| one.vcpu.map(u32::from) == wanted)
        };
        of(Some(vcpu)).or_else(|| of(None)).map(|one| one.cpus)
    }

    /// The number of the iothread with this id.
    pub fn iothread(&self, id: &str) -> Option<u32> {
        let found = self.iothreads.iter().position(|one| one.id == id)?;
        u32::try_from(found).ok()
    }
}

/// Which board.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
pub enum MachineKind {
    /// No guest: for asking what this binary can do.
    None,
    /// virtio-mmio devices, no PCI, no firmware.
    #[default]
    Microvm,
}

/// `-machine`
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct MachineSpec {
    /// Board.
    pub kind: MachineKind,
}

/// `-smp` and `-cpu`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct CpuSpec {
    /// vCPUs at start: 1 to 254.
    pub cpus: u8,
    /// vCPUs at most; equals the product of the five below.
    pub maxcpus: u8,
    /// Sockets.
    pub sockets: u8,
    /// Dies in a socket.
    pub dies: u8,
    /// Clusters in a die.
    pub clusters: u8,
    /// Cores in a cluster.
    pub cores: u8,
    /// Threads in a core.
    pub threads: u8,
}

impl Default for CpuSpec {
    fn default() -> Self {
        Self {
            cpus: 1,
            maxcpus: 1,
            sockets: 1,
            dies: 1,
            clusters: 1,
            cores: 1,
            threads: 1,
        }
    }
}

/// `-m`, `-mem-path`, `-mem-prealloc`, `-object memory-backend-…`, `-numa`
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct MemorySpec {
    /// Bytes, a multiple of 1 MiB: 128 MiB to 512 GiB.
    pub size: u64,
    /// What it is made of, in the order of guest-physical addresses. Never empty; the sizes add up to `size`.
    pub zones: Vec<MemoryZone>,
    /// `-numa node`, by their numbers. Empty for a guest that knows of no nodes.
    pub nodes: Vec<NumaNode>,
    /// `-numa dist`: how far it is from node `row` to node `column`, row by row, as ACPI's SLIT has it. Empty without nodes.
    pub distances: Vec<u8>,
}

/// A part of guest RAM.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct MemoryZone {
    /// The id of its `-object`; `None` for what `-m` alone makes.
    pub id: Option<String>,
    /// Bytes, a multiple of 1 MiB.
    pub size: u64,
    /// `-mem-prealloc`: every page is there before the guest runs.
    pub prealloc: bool,
    /// `-mem-path`: a directory (hugetlbfs, say) or a file, absolute.
    pub path: Option<PathBuf>,
    /// `dump-guest-core=on|off`: it is part of a core dump of the control process.
    pub dump_guest_core: bool,
    /// `mem-share=on|off`: with `mem-path` of a file, whether it takes the guest's writes or is only what RAM begins with. Device
    /// processes share guest RAM in either case.
    pub share: bool,
    /// `policy=`
    pub policy: MemoryPolicy,
    /// `host-nodes=`: for the policies other than the default.
    pub host_nodes: NodeList,
}

/// Which of the host's memory nodes pages come from: the modes of `mbind(2)`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
pub enum MemoryPolicy {
    /// The node of whoever touches a page first.
    #[default]
    Default,
    /// The first of the given nodes, as long as it has pages.
    Preferred,
    /// The given nodes and no other.
    Bind,
    /// The given nodes in turn.
    Interleave,
}

impl MemoryPolicy {
    /// As on the command line and in QMP (`HostMemPolicy`).
    pub const fn name(self) -> &'static str {
        match self {
            Self::Default => "default",
            Self::Preferred => "preferred",
            Self::Bind => "bind",
            Self::Interleave => "interleave",
        }
    }
}

/// `-numa node`
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct NumaNode {
    /// Its vCPUs, by number.
    pub cpus: CpuList,
    /// Its memory: which of the zones. `None` for a node of processors alone.
    pub zone: Option<u32>,
}

impl Default for MemoryZone {
    fn default() -> Self {
        Self {
            id: None,
            size: limits::DEFAULT_MEMORY,
            prealloc: false,
            path: None,
            dump_guest_core: true,
            share: false,
            policy: MemoryPolicy::Default,
            host_nodes: NodeList::default(),
        }
    }
}

impl Default for MemorySpec {
    fn default() -> Self {
        Self {
            size: limits::DEFAULT_MEMORY,
            zones: vec![MemoryZone::default()],
            nodes: Vec::new(),
            distances: Vec::new(),
        }
    }
}

/// What the guest starts with.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct BootSpec {
    /// `-kernel`
    pub kernel: Option<PathBuf>,
    /// `-initrd`
    pub initrd: Option<PathBuf>,
    /// `-append`, its arguments joined by one space.
    pub cmdline: String,
}

/// `-drive`
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct DriveSpec {
    /// `id=`
    pub id: String,
    /// `file=`
    pub file: PathBuf,
    /// The files below it, the next one first: those of `backing=`, which are only read.
    pub backing: Vec<PathBuf>,
    /// `readonly=`, default off.
    pub readonly: bool,
    /// `direct=`, default on.
    pub direct: bool,
    /// `max-size=`: bytes that QMP's `block_resize` may make the disk, if its image is a file; `None`: it keeps the size that it has.
    pub max_size: Option<u64>,
    /// `aio=`, `discard=`, `detect-zeroes=`, `throttling.iops-total=`, `poll-us=`
    pub io: super::block::BlockIo,
}

impl DriveSpec {
    /// Puts this drive, a qcow2 image, on top of `lower` and what that one stands on.
    ///
    /// # Errors
    /// There would be more images below it than allowed, told without the drive's name.
    pub fn stand_on(&mut self, lower: &Self) -> Result<(), String> {
        use super::block::ImageFormat;
        let (more, raw_base) = match lower.io.format {
            ImageFormat::Raw => (0, true),
            ImageFormat::Qcow2 {
                below, raw_base, ..
            } => (below, raw_base),
        };
        let most = crate::limits::MAX_BACKING_IMAGES;
        if usize::from(more) + 1 > most {
            return Err(format!("one image too many below it; allowed: 0 to {most}"));
        }
        self.backing = std::iter::once(&lower.file)
            .chain(&lower.backing)
            .cloned()
            .collect();
        self.io.format = ImageFormat::Qcow2 {
            below: more + 1,
            raw_base,
            most: self.max_size.unwrap_or(0),
        };
        Ok(())
    }
}

/// `-netdev`
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct NetdevSpec {
    /// `id=`
    pub id: String,
    /// Where its packets go.
    pub backend: NetBackend,
    /// `queues=`: queue pairs, 1 to 16.
    pub queues: u16,
    /// `vhost=`: the kernel passes the packets.
    pub vhost: bool,
    /// `vhostfd=` or `vhostfds=`: inherited descriptors of `/dev/vhost-net`, one a queue pair; none: the broker opens it.
    pub vhost_fds: Vec<i32>,
    /// `throttling.…=`
    pub limits: super::net::NetLimits,
    /// `poll-us=`; 0 with `vhost` and with a daemon.
    pub poll_us: u32,
}

/// Where a card's packets go.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum NetBackend {
    /// `ifname=`: the broker opens the tap.
    TapName(String),
    /// `fd=` or `fds=`: inherited descriptors of an open tap, one a queue pair.
    TapFds(Vec<i32>),
    /// `vhost-user`, `chardev=`: id of the socket where somebody else's daemon listens, which exists.
    Daemon(String),
}

/// `-fsdev`
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct FsdevSpec {
    /// `id=`
    pub id: String,
    /// `path=`: a folder.
    pub path: PathBuf,
    /// `readonly=`, default off.
    pub readonly: bool,
    /// `cache=`, default auto.
    pub cache: FsCache,
    /// `xattr=`, default off.
    pub xattr: bool,
    /// `posix-acl=`, default off; needs `xattr`.
    pub posix_acl: bool,
    /// `translate-uid=`; not with `posix_acl`.
    pub users: super::ids::Translation,
    /// `translate-gid=`; not with `posix_acl`.
    pub groups: super::ids::Translation,
}

/// `-chardev`
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ChardevSpec {
    /// `id=`, or `serial0` and so on for one that `-serial` implies.
    pub id: String,
    /// What it leads to.
    pub backend: ChardevBackend,
}

/// What a chardev leads to.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum ChardevBackend {
    /// This process's standard input and output.
    Stdio,
    /// A new pseudo terminal, whose name is printed and shown in QMP.
    Pty,
    /// A unix socket.
    Socket {
        /// `path=`
        path: PathBuf,
        /// `server`: listens; otherwise connects.
        server: bool,
        /// `nowait`: the guest starts without a client.
        nowait: bool,
    },
    /// An inherited unix socket.
    Inherited {
        /// `fd=`
        fd: i32,
        /// `server`: it listens; otherwise it is connected.
        server: bool,
        /// `nowait`: the guest starts without a client.
        nowait: bool,
    },
    /// A file that takes the output.
    File {
        /// `path=`
        path: PathBuf,
    },
}

/// `-device`
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct DeviceOption {
    /// `id=`, or one made from its kind and position.
    pub id: String,
    /// What it is.
    pub kind: DeviceKind,
    /// `iothread=`
    pub iothread: Option<String>,
    /// What happens when its process dies.
    pub restart: RestartPolicy,
    /// `bootindex=`: its place in the order of boot, 0 first, for a firmware that asks; no other device has the same.
    pub bootindex: Option<u8>,
}

/// `-device …,restart=,max-restarts=`
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct RestartPolicy {
    /// Restarts within [`RESTART_WINDOW_MS`](crate::limits::RESTART_WINDOW_MS) at most; 0 with `restart=off`.
    pub most: u16,
}

/// The devices that `-device` can name.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum DeviceKind {
    /// `virtio-blk-device`
    Block {
        /// `drive=`: id of a drive that exists.
        drive: String,
        /// `serial=`: at most 20 bytes.
        serial: Option<String>,
        /// `num-queues=`, default min(vCPUs, 32).
        num_queues: u16,
        /// `queue-size=`, default 256.
        queue_size: u16,
    },
    /// `vhost-user-blk-device`
    ForeignBlock {
        /// `chardev=`: id of the socket where its daemon listens, which exists.
        chardev: String,
        /// `num-queues=`, default min(vCPUs, 32).
        num_queues: u16,
        /// `queue-size=`, default 128.
        queue_size: u16,
    },
    /// `virtio-net-device`
    Net {
        /// `netdev=`: id of a netdev that exists.
        netdev: String,
        /// `mac=`, or the one made for it.
        mac: [u8; 6],
        /// `queue-size=`, default 256.
        queue_size: u16,
    },
    /// `virtio-fs-device`, `vhost-user-fs-device`
    Fs {
        /// Where the folder is served.
        source: FsSource,
        /// `tag=`: 1 to 36 bytes.
        tag: String,
        /// `num-request-queues=`, default 1.
        request_queues: u16,
        /// `queue-size=`, default 1024.
        queue_size: u16,
        /// `cache-size=` in bytes, default 0: none.
        window: u64,
    },
}

/// Who serves a shared folder.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum FsSource {
    /// `fsdev=`: a process of this VM, for the fsdev with this id, which exists.
    Fsdev(String),
    /// `chardev=`: somebody else's daemon, at the socket of the chardev with this id, which exists.
    Chardev(String),
}

/// A QMP socket.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct MonitorSpec {
    /// Where it is.
    pub address: MonitorAddress,
    /// `server`: listens; otherwise connects.
    pub server: bool,
    /// `nowait`: the VM starts without a client.
    pub nowait: bool,
}

/// Address of a QMP socket.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum MonitorAddress {
    /// `unix:PATH`
    Unix(PathBuf),
    /// An inherited unix socket, of `-chardev socket,fd=`.
    Inherited(i32),
    /// `tcp:HOST:PORT`
    Tcp {
        /// Host name or address.
        host: String,
        /// Port.
        port: u16,
    },
}

/// `-D`
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct LogSpec {
    /// `STRATOVIRT_LOG_LEVEL`, default error.
    pub level: Level,
    /// `-D FILE`; `None` is standard error.
    pub file: Option<PathBuf>,
}
