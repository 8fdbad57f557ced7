//! Every option, with its properties: the one table that parsing, errors, `--help` and the manual page come from.

use super::props::{Key, Kind, Shape};
use ipc::limits;

/// One option.
#[derive(Debug)]
pub struct OptionDef {
    /// Name without dash.
    pub name: &'static str,
    /// Other names.
    pub aliases: &'static [&'static str],
    /// Heading under which it is listed.
    pub group: Group,
    /// What follows it.
    pub arg: Arg,
    /// Whether it may be given more than once.
    pub many: bool,
    /// What it does, in one or a few sentences.
    pub help: &'static str,
}

impl OptionDef {
    /// The name with its dash.
    pub fn dashed(&self) -> String {
        format!("-{}", self.name)
    }
}

/// Headings, in the order of the pages.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Group {
    /// Board, processors, memory, identity.
    Machine,
    /// Kernel, initrd, command line.
    Boot,
    /// Disks, cards, threads.
    Devices,
    /// Serial port and character devices.
    Console,
    /// QMP, start and end of the VM.
    Control,
    /// Log, daemon, pid file.
    Process,
    /// Jails.
    Sandbox,
    /// Help.
    Help,
    /// Taken for libvirt's sake, without effect.
    Accepted,
    /// Known to the manual, refused here so far.
    Later,
}

impl Group {
    /// All, in order.
    pub const ALL: [Self; 10] = [
        Self::Machine,
        Self::Boot,
        Self::Devices,
        Self::Console,
        Self::Control,
        Self::Process,
        Self::Sandbox,
        Self::Help,
        Self::Accepted,
        Self::Later,
    ];

    /// The heading.
    pub const fn title(self) -> &'static str {
        match self {
            Self::Machine => "Machine",
            Self::Boot => "Kernel",
            Self::Devices => "Devices",
            Self::Console => "Serial port and character devices",
            Self::Control => "Control",
            Self::Process => "Process and log",
            Self::Sandbox => "Sandbox",
            Self::Help => "Help",
            Self::Accepted => "Accepted without effect, as libvirt passes them",
            Self::Later => "Not supported yet",
        }
    }
}

/// What follows an option.
#[derive(Debug, Clone, Copy)]
pub enum Arg {
    /// Nothing.
    Flag,
    /// One argument; the word stands for it in a synopsis.
    Text(&'static str),
    /// One argument, unless the next one starts with `-`.
    Optional(&'static str),
    /// One argument and all after it until the next that starts with `-`.
    Words(&'static str),
    /// One argument: a property list.
    Props {
        /// Key of the leading word that selects a shape; empty if there is one shape only.
        selector: &'static str,
        /// What the leading word names, for errors.
        noun: &'static str,
        /// The forms.
        shapes: &'static [Shape],
        /// Leading words that the manual knows and this build does not.
        later: &'static [&'static str],
    },
}

const fn key(name: &'static str, kind: Kind, default: &'static str, help: &'static str) -> Key {
    Key {
        name,
        kind,
        required: false,
        default,
        help,
    }
}

const fn net_rate(name: &'static str, help: &'static str) -> Key {
    key(name, Kind::Int(0, limits::MAX_NET_RATE), "0", help)
}

const fn net_burst(name: &'static str) -> Key {
    key(
        name,
        Kind::Int(1, limits::MAX_NET_RATE),
        "100 ms worth",
        "what of them may pass at once after a pause",
    )
}

const fn must(name: &'static str, kind: Kind, help: &'static str) -> Key {
    Key {
        name,
        kind,
        required: true,
        default: "",
        help,
    }
}

const fn one(implied: &'static str, keys: &'static [Key]) -> Shape {
    Shape {
        name: "",
        help: "",
        implied,
        keys,
    }
}

const fn form(name: &'static str, help: &'static str, keys: &'static [Key]) -> Shape {
    Shape {
        name,
        help,
        implied: "",
        keys,
    }
}

const CPUS: Kind = Kind::Int(1, limits::MAX_VCPUS as u64);

/// `-machine`
const MACHINE: &[Shape] = &[one(
    "type",
    &[
        key(
            "type",
            Kind::Text(32),
            "microvm",
            "board: microvm (also MicroVm), or none for a VM without a guest, which only answers QMP",
        ),
        key(
            "accel",
            Kind::Text(32),
            "kvm",
            "accelerators by preference, separated by ':'; kvm must be one",
        ),
        key(
            "usb",
            Kind::Fixed(&["off"]),
            "off",
            "there is no USB controller on these boards",
        ),
        key(
            "dump-guest-core",
            Kind::Bool,
            "on",
            "whether guest memory is part of a core dump of the control process, of which the kernel makes none from the moment that the jail is closed, before the guest runs; QMP's dump-guest-memory writes it in either case",
        ),
        key(
            "mem-share",
            Kind::Bool,
            "off",
            "with -mem-path FILE, whether the file takes the guest's writes; off: guest memory begins with a copy of it, which takes the time and the memory of what it has; device processes share guest memory in either case",
        ),
        key(
            "graphics",
            Kind::Fixed(&["off"]),
            "off",
            "there is no display",
        ),
        key(
            "vmport",
            Kind::Fixed(&["off"]),
            "off",
            "there is no VMware port",
        ),
        key("hpet", Kind::Fixed(&["off"]), "off", "there is no HPET"),
        key(
            "kernel-irqchip",
            Kind::Fixed(&["on"]),
            "on",
            "the interrupt controllers are KVM's",
        ),
        key(
            "acpi",
            Kind::Fixed(&["on"]),
            "on",
            "the board describes itself by ACPI",
        ),
        key(
            "memory-backend",
            Kind::Id,
            "",
            "id of the -object memory-backend-… that is guest memory",
        ),
    ],
)];

/// `-smp`
const SMP: &[Shape] = &[one(
    "cpus",
    &[
        must("cpus", CPUS, "vCPUs at start"),
        key(
            "maxcpus",
            CPUS,
            "the product of the topology, or cpus",
            "vCPUs at most",
        ),
        key(
            "sockets",
            CPUS,
            "1, or what maxcpus leaves if cores is given",
            "sockets",
        ),
        key("dies", CPUS, "1", "dies in a socket"),
        key("clusters", CPUS, "1", "clusters in a die"),
        key("cores", CPUS, "what maxcpus leaves", "cores in a cluster"),
        key(
            "threads",
            CPUS,
            "1, or what maxcpus leaves if cores and sockets are given",
            "threads in a core",
        ),
    ],
)];

/// `-cpu`
const CPU: &[Shape] = &[one(
    "model",
    &[
        must(
            "model",
            Kind::Choice(&["host"]),
            "processor model; the guest sees the host's",
        ),
        key(
            "pmu",
            Kind::Fixed(&["off"]),
            "off",
            "performance counters of aarch64",
        ),
        key(
            "migratable",
            Kind::Fixed(&["on", "off"]),
            "off",
            "accepted as libvirt passes it",
        ),
    ],
)];

/// `-m`
const MEMORY: &[Shape] = &[one("size", &[must("size", Kind::Size, "guest memory")])];

/// `-name`
const NAME: &[Shape] = &[one(
    "guest",
    &[
        must("guest", Kind::Text(limits::MAX_NAME), "name of the VM"),
        key(
            "debug-threads",
            Kind::Fixed(&["on", "off"]),
            "on",
            "threads always have names",
        ),
        key("process", Kind::Later, "", "name of the process"),
    ],
)];

/// `-hotplug`
const HOTPLUG: &[Shape] = &[one(
    "",
    &[
        key(
            "images",
            Kind::Path,
            "",
            "a folder: every image beneath it may become a disk; symbolic links are not followed",
        ),
        key(
            "folders",
            Kind::Path,
            "",
            "a folder: it and every folder beneath it may be shared with the guest",
        ),
        key(
            "tap",
            Kind::Text(15),
            "",
            "a tap device that may become a card",
        ),
        key(
            "sockets",
            Kind::Path,
            "",
            "a folder: a vhost-user daemon that listens at a socket anywhere beneath it may serve a device; it gets all of the guest's memory",
        ),
        key(
            "vhost",
            Kind::Choice(&["on"]),
            "",
            "taps that are added may be served by the host's kernel, with `netdev_add` of `vhost`: as -netdev vhost=on, that is outside of every jail",
        ),
        key(
            "readonly",
            Kind::Bool,
            "off",
            "images or folders are for reading only",
        ),
    ],
)];

/// `-drive`
const NODE_NAME: Key = must(
    "node-name",
    Kind::Id,
    "name that a device or another node refers to",
);
const NODE_READONLY: Key = key(
    "read-only",
    Kind::Bool,
    "off",
    "the guest cannot write, nor can the process that serves it",
);
const NODE_DIRECT: Key = key(
    "cache.direct",
    Kind::Bool,
    "off",
    "the host's page cache is not used (O_DIRECT)",
);
const NODE_NO_FLUSH: Key = key(
    "cache.no-flush",
    Kind::Fixed(&["off"]),
    "off",
    "flushes are always done",
);
const NODE_AUTO: Key = key(
    "auto-read-only",
    Kind::Bool,
    "",
    "accepted; it is never done",
);
const NODE_DISCARD: Key = key(
    "discard",
    Kind::Choice(&["unmap", "ignore"]),
    "ignore",
    "whether a discard of the guest frees space on the host",
);
const NODE_ZEROES: Key = key(
    "detect-zeroes",
    Kind::Choice(&["unmap", "on", "off"]),
    "off",
    "as -drive detect-zeroes=",
);

const NODE_MAX_SIZE: Key = key(
    "max-size",
    Kind::Int(0, limits::MAX_IMAGE_SIZE),
    "",
    "as -drive max-size=; without it, that of the node below, if there is one",
);

const FILE_NODE: &[Key] = &[
    NODE_NAME,
    must("filename", Kind::Path, "image or block device of the host"),
    NODE_READONLY,
    NODE_DIRECT,
    NODE_NO_FLUSH,
    NODE_AUTO,
    NODE_DISCARD,
    NODE_ZEROES,
    NODE_MAX_SIZE,
    key(
        "aio",
        Kind::Choice(&["native", "io_uring", "threads"]),
        "io_uring if the host allows it",
        "as -drive aio=; threads: one request after the other",
    ),
    key(
        "locking",
        Kind::Choice(&["auto", "on"]),
        "",
        "accepted; images are always locked",
    ),
];

/// The file of a format that is no node of its own.
const NODE_BELOW: Key = key(
    "file",
    Kind::Id,
    "",
    "node-name of the node that holds it, which then belongs to this one; or file.filename",
);
const NODE_BELOW_DRIVER: Key = key(
    "file.driver",
    Kind::Choice(&["file", "host_device"]),
    "file",
    "what file.filename is",
);
const NODE_BELOW_NAME: Key = key(
    "file.filename",
    Kind::Path,
    "",
    "image or block device of the host, if no node has it",
);
const NODE_BELOW_AIO: Key = key(
    "file.aio",
    Kind::Choice(&["native", "io_uring", "threads"]),
    "io_uring if the host allows it",
    "as -drive aio=; threads: one request after the other",
);
const NODE_BELOW_LOCKING: Key = key(
    "file.locking",
    Kind::Choice(&["auto", "on"]),
    "",
    "accepted; images are always locked",
);

const BLOCKDEV: &[Shape] = &[
    form("file", "An image in a file", FILE_NODE),
    form("host_device", "A block device of the host", FILE_NODE),
    form(
        "raw",
        "What another node or a file holds, as it is",
        &[
            NODE_NAME,
            NODE_BELOW,
            NODE_BELOW_DRIVER,
            NODE_BELOW_NAME,
            NODE_BELOW_AIO,
            NODE_BELOW_LOCKING,
            NODE_READONLY,
            NODE_DIRECT,
            NODE_NO_FLUSH,
            NODE_AUTO,
            NODE_DISCARD,
            NODE_ZEROES,
            NODE_MAX_SIZE,
        ],
    ),
    form(
        "qcow2",
        "The disk in a qcow2 image, which another node or a file holds",
        &[
            NODE_NAME,
            NODE_BELOW,
            NODE_BELOW_DRIVER,
            NODE_BELOW_NAME,
            NODE_BELOW_AIO,
            NODE_BELOW_LOCKING,
            key(
                "backing",
                Kind::Id,
                "",
                "node-name of the node below this image: one before this with read-only=on, which no device can have then; what the \
                 image itself names is never opened",
            ),
            NODE_READONLY,
            NODE_DIRECT,
            NODE_NO_FLUSH,
            NODE_AUTO,
            NODE_DISCARD,
            NODE_ZEROES,
            NODE_MAX_SIZE,
        ],
    ),
];

const DRIVE: &[Shape] = &[one(
    "",
    &[
        must("id", Kind::Id, "name that a device refers to"),
        must("file", Kind::Path, "image or block device of the host"),
        key(
            "readonly",
            Kind::Bool,
            "off",
            "the guest cannot write, nor can the process that serves it",
        ),
        key(
            "direct",
            Kind::Bool,
            "on",
            "the host's page cache is not used (O_DIRECT)",
        ),
        key(
            "format",
            Kind::Choice(&["raw", "qcow2"]),
            "raw",
            "format of the image; it is never guessed",
        ),
        key(
            "backing",
            Kind::Id,
            "",
            "id of the -drive below a qcow2 image: one before this with readonly=on, which no device can have then; what the image \
             itself names is never opened",
        ),
        key(
            "if",
            Kind::Fixed(&["none"]),
            "none",
            "the drive belongs to a -device",
        ),
        key("media", Kind::Fixed(&["disk"]), "disk", "kind of medium"),
        key(
            "aio",
            Kind::Choice(&["native", "io_uring", "off"]),
            "native with direct=on, otherwise io_uring if the host allows it",
            "how the host's file is read and written: many requests at once, or (off) one after the other; native needs direct=on, io_uring a host that allows it",
        ),
        key(
            "throttling.iops-total",
            Kind::Int(0, limits::MAX_IOPS as u64),
            "0",
            "requests a second on average over all queues, 0 for no limit; after a pause the guest may catch up by 100 ms worth",
        ),
        key(
            "discard",
            Kind::Choice(&["unmap", "ignore"]),
            "ignore",
            "whether a discard of the guest frees space on the host",
        ),
        key(
            "detect-zeroes",
            Kind::Choice(&["unmap", "on", "off"]),
            "off",
            "a write of zeroes only marks its range as zero (on), or frees it if discard=unmap (unmap)",
        ),
        key(
            "poll-us",
            Kind::Int(0, limits::MAX_POLL_US as u64),
            "50",
            "microseconds that the device may look for more work before it sleeps, if that has paid lately",
        ),
        key(
            "werror",
            Kind::Choice(&["report", "ignore", "stop", "enospc"]),
            "report",
            "when the host fails a write: the guest is told, or not, or stops (enospc: only if no space is left) until QMP's \
             cont, which tries again",
        ),
        key(
            "rerror",
            Kind::Choice(&["report", "ignore", "stop"]),
            "report",
            "the same for reads",
        ),
        key(
            "max-size",
            Kind::Int(0, limits::MAX_IMAGE_SIZE),
            "",
            "bytes that QMP's block_resize may make the image, if it is a file; without it the image keeps its size",
        ),
        key("unit", Kind::Later, "", "flash bank of if=pflash"),
    ],
)];

/// `-netdev`
const NETDEV: &[Shape] = &[
    form(
        "tap",
        "A tap device of the host",
        &[
            must("id", Kind::Id, "name that a device refers to"),
            key(
                "ifname",
                Kind::Text(15),
                "",
                "the tap, which is opened; wins over fd and fds",
            ),
            key(
                "fd",
                Kind::Fds(1),
                "",
                "inherited descriptor of an open tap",
            ),
            key(
                "fds",
                Kind::Fds(limits::MAX_NET_QUEUE_PAIRS as usize),
                "",
                "inherited descriptors of one open tap, one a queue",
            ),
            key(
                "queues",
                Kind::Int(1, limits::MAX_NET_QUEUE_PAIRS as u64),
                "as many as fds, or 1",
                "queue pairs",
            ),
            key(
                "vhost",
                Kind::Bool,
                "off",
                "the host's kernel passes the packets (vhost-net); not with throttling, and nothing is filtered by address or VLAN",
            ),
            key(
                "vhostfd",
                Kind::Fds(1),
                "",
                "inherited descriptor of /dev/vhost-net, which is opened otherwise; a card with it does not survive its process, but for device-upgrade",
            ),
            key(
                "vhostforce",
                Kind::Bool,
                "off",
                "accepted with vhost=on: there is no other way then",
            ),
            key(
                "vhostfds",
                Kind::Fds(limits::MAX_NET_QUEUE_PAIRS as usize),
                "",
                "inherited descriptors of /dev/vhost-net, one a queue pair",
            ),
            net_rate(
                "throttling.rx-packets",
                "packets a second to the guest, over all queues, 0 for no limit",
            ),
            net_burst("throttling.rx-packets-burst"),
            net_rate(
                "throttling.rx-bytes",
                "bytes of packets a second to the guest, over all queues, 0 for no limit",
            ),
            net_burst("throttling.rx-bytes-burst"),
            net_rate(
                "throttling.tx-packets",
                "packets a second from the guest, over all queues, 0 for no limit",
            ),
            net_burst("throttling.tx-packets-burst"),
            net_rate(
                "throttling.tx-bytes",
                "bytes of packets a second from the guest, over all queues, 0 for no limit",
            ),
            net_burst("throttling.tx-bytes-burst"),
            key(
                "poll-us",
                Kind::Int(0, limits::MAX_POLL_US as u64),
                "50; 0 with vhost=on",
                "microseconds that the card may look for more packets, of the guest's and of the tap's, before it sleeps, if that has paid lately; not with vhost=on",
            ),
            key(
                "script",
                Kind::Fixed(&["no"]),
                "no",
                "no script is ever run",
            ),
            key(
                "downscript",
                Kind::Fixed(&["no"]),
                "no",
                "no script is ever run",
            ),
        ],
    ),
    form(
        "vhost-user",
        "A daemon that runs already: net, dpdk-testpmd, Open vSwitch, …",
        &[
            must("id", Kind::Id, "name that a device refers to"),
            must(
                "chardev",
                Kind::Id,
                "a -chardev socket, where the daemon listens",
            ),
            key(
                "queues",
                Kind::Int(1, 1),
                "1",
                "queue pairs; more need a control queue, which daemons leave to the front end, and this one reads no queue",
            ),
            key(
                "vhostforce",
                Kind::Bool,
                "on",
                "accepted: there is no other way",
            ),
        ],
    ),
];

/// `-fsdev`
const FSDEV: &[Shape] = &[form(
    "local",
    "A folder of the host",
    &[
        must("id", Kind::Id, "name that a device refers to"),
        must("path", Kind::Path, "the folder"),
        key("readonly", Kind::Bool, "off", "nothing in it can change"),
        key(
            "cache",
            Kind::Choice(&["never", "metadata", "auto", "always"]),
            "auto",
            "what the guest may keep: nothing; names and attributes; these for a second, and contents that have not \
             changed; everything, as if nobody else used the folder",
        ),
        key("xattr", Kind::Bool, "off", "extended attributes"),
        key(
            "posix-acl",
            Kind::Bool,
            "off",
            "POSIX access control lists; needs xattr=on",
        ),
        key(
            "translate-uid",
            Kind::Text(4096),
            "",
            "users of the guest are others on the host: rules as of vhost_user_fs(1), with + between them, as in \
             map:0:100000:65536+forbid-guest:65536:1; not with posix-acl",
        ),
        key("translate-gid", Kind::Text(4096), "", "the same for groups"),
        key(
            "security_model",
            Kind::Fixed(&["passthrough", "none"]),
            "passthrough",
            "owners and rights are the files' own",
        ),
        key("fmode", Kind::Later, "", "rights of new files"),
        key("dmode", Kind::Later, "", "rights of new folders"),
    ],
)];

const FS_TAG: Key = must(
    "tag",
    Kind::Text(limits::MAX_FS_TAG),
    "name that the guest mounts by: mount -t virtiofs TAG /mnt",
);
const FS_QUEUE_SIZE: Key = key(
    "queue-size",
    Kind::PowerOfTwo(
        limits::MIN_FS_QUEUE_SIZE as u64,
        limits::MAX_FS_QUEUE_SIZE as u64,
    ),
    "1024",
    "entries of each queue; a request of 1 MiB takes 260",
);
const FS_QUEUES: Key = key(
    "num-request-queues",
    Kind::Int(1, limits::MAX_FS_REQUEST_QUEUES as u64),
    "1",
    "queues for requests",
);

/// `-device`
const DEVICE: &[Shape] = &[
    form(
        "virtio-blk-device",
        "A disk",
        &[
            must("drive", Kind::Id, "id of its -drive"),
            key(
                "id",
                Kind::Id,
                "made from kind and position",
                "name of the device",
            ),
            key(
                "serial",
                Kind::Text(limits::BLOCK_ID_BYTES),
                "",
                "serial number that the guest reads",
            ),
            key(
                "num-queues",
                Kind::Int(1, limits::MAX_BLOCK_QUEUES as u64),
                "one a vCPU, at most 32",
                "request queues",
            ),
            key(
                "queue-size",
                Kind::PowerOfTwo(4, 1024),
                "256",
                "entries of each queue",
            ),
            key(
                "iothread",
                Kind::Id,
                "",
                "id of an -object iothread; the disk's own process has its threads",
            ),
            RESTART,
            MAX_RESTARTS,
            key(
                "bootindex",
                Kind::Int(0, 255),
                "",
                "its place in the order of boot, 0 first, which a management tool can ask for (qom-get); this board has no firmware that would",
            ),
        ],
    ),
    form(
        "vhost-user-blk-device",
        "A disk, served by a daemon that runs already: qemu-storage-daemon, block, …",
        &[
            must(
                "chardev",
                Kind::Id,
                "id of the -chardev socket where the daemon listens",
            ),
            key(
                "id",
                Kind::Id,
                "made from kind and position",
                "name of the device",
            ),
            key(
                "num-queues",
                Kind::Int(1, limits::MAX_BLOCK_QUEUES as u64),
                "one a vCPU, at most 32",
                "request queues; the daemon must have as many",
            ),
            key(
                "queue-size",
                Kind::PowerOfTwo(4, 1024),
                "128",
                "entries of each queue",
            ),
            key(
                "restart",
                Kind::Bool,
                "off",
                "when the daemon leaves, its socket is tried again until one is there, which gets the requests that were in flight; for a daemon that keeps account of these (block does, qemu-storage-daemon does not)",
            ),
            key(
                "bootindex",
                Kind::Int(0, 255),
                "",
                "its place in the order of boot, 0 first, which a management tool can ask for (qom-get); this board has no firmware that would",
            ),
        ],
    ),
    form(
        "virtio-net-device",
        "A network card",
        &[
            must("netdev", Kind::Id, "id of its -netdev"),
            key(
                "id",
                Kind::Id,
                "made from kind and position",
                "name of the device",
            ),
            key(
                "mac",
                Kind::Mac,
                "52:54:00:12:34:56, the last byte one more for each further card",
                "MAC address",
            ),
            key(
                "mq",
                Kind::Bool,
                "on if the netdev has several queues",
                "several queue pairs",
            ),
            key(
                "queue-size",
                Kind::PowerOfTwo(256, 4096),
                "256",
                "entries of each queue",
            ),
            key(
                "iothread",
                Kind::Id,
                "",
                "id of an -object iothread; the card's own process has its threads",
            ),
            RESTART,
            MAX_RESTARTS,
        ],
    ),
    form(
        "virtio-fs-device",
        "A folder, shared by a process of this VM",
        &[
            must("fsdev", Kind::Id, "id of its -fsdev"),
            FS_TAG,
            key(
                "id",
                Kind::Id,
                "made from kind and position",
                "name of the device",
            ),
            FS_QUEUES,
            FS_QUEUE_SIZE,
            key(
                "cache-size",
                Kind::Window,
                "0",
                "window in the guest's memory into which files are mapped (DAX)",
            ),
            key(
                "iothread",
                Kind::Id,
                "",
                "id of an -object iothread; the folder's own process has its threads",
            ),
            RESTART,
            MAX_RESTARTS,
        ],
    ),
    form(
        "vhost-user-fs-device",
        "A folder, shared by a daemon that runs already: vhost_user_fs or virtiofsd",
        &[
            must(
                "chardev",
                Kind::Id,
                "id of the -chardev socket where the daemon listens",
            ),
            FS_TAG,
            key(
                "id",
                Kind::Id,
                "made from kind and position",
                "name of the device",
            ),
            FS_QUEUES,
            FS_QUEUE_SIZE,
            key(
                "restart",
                Kind::Bool,
                "off",
                "when the daemon leaves, its socket is tried again until one is there; for a daemon that keeps what the guest has open",
            ),
        ],
    ),
];

const RESTART: Key = key(
    "restart",
    Kind::Bool,
    "on",
    "its process is started again when it dies, and the guest loses nothing",
);
const MAX_RESTARTS: Key = key(
    "max-restarts",
    Kind::Int(1, limits::MAX_RESTARTS as u64),
    "5",
    "restarts in 10 seconds, after which the device has failed",
);

/// Devices of the manual that need a part which is not here yet.
const LATER_DEVICES: &[&str] = &[
    "nec-usb-xhci",
    "pcie-root-port",
    "ramfb",
    "scsi-cd",
    "scsi-hd",
    "usb-camera",
    "usb-host",
    "usb-kbd",
    "usb-storage",
    "usb-tablet",
    "vfio-pci",
    "vhost-user-blk-pci",
    "vhost-user-fs-pci",
    "vhost-vsock-device",
    "vhost-vsock-pci",
    "virtconsole",
    "virtio-balloon-device",
    "virtio-balloon-pci",
    "virtio-9p-device",
    "virtio-blk-pci",
    "virtio-fs-pci",
    "virtio-gpu-pci",
    "virtio-net-pci",
    "virtio-rng-device",
    "virtio-rng-pci",
    "virtio-scsi-pci",
    "virtio-serial-device",
    "virtio-serial-pci",
    "virtserialport",
    "ivshmem-scream",
];

const BACKEND_ID: Key = must(
    "id",
    Kind::Id,
    "name that -machine memory-backend= or -numa node,memdev= refers to",
);
const BACKEND_SIZE: Key = must(
    "size",
    Kind::Bytes,
    "its size; that of all guest memory is 128M at least and the same as that of -m, if that is given",
);
const BACKEND_POLICY: Key = key(
    "policy",
    Kind::Choice(&["default", "preferred", "bind", "interleave"]),
    "default",
    "which of host-nodes its pages come from: the first of them while it has any, none but them, or all in turn",
);
const BACKEND_NODES: Key = key(
    "host-nodes",
    Kind::Nodes,
    "",
    "memory nodes of the host, for every policy but the default",
);
const BACKEND_MEM_PREALLOC: Key = key("mem-prealloc", Kind::Bool, "off", "the same as prealloc=");
const BACKEND_DUMP_GUEST_CORE: Key = key("dump-guest-core", Kind::Bool, "on", "the same as dump=");
const BACKEND_SHARE: Key = key(
    "share",
    Kind::Bool,
    "off",
    "as mem-share= of -machine; device processes share guest memory in either case",
);
const BACKEND_PREALLOC: Key = key("prealloc", Kind::Bool, "off", "as -mem-prealloc");
const BACKEND_DUMP: Key = key("dump", Kind::Bool, "on", "as dump-guest-core= of -machine");

/// `-vcpu-affinity`
const VCPU_AFFINITY: &[Shape] = &[one(
    "",
    &[
        key(
            "vcpu",
            Kind::Int(0, limits::MAX_VCPUS as u64 - 1),
            "all without one of their own",
            "which vCPU",
        ),
        must("cpus", Kind::Cpus, "where it runs"),
    ],
)];

/// `-numa`
const NUMA: &[Shape] = &[
    form(
        "node",
        "A node: which vCPUs are near which memory",
        &[
            key(
                "nodeid",
                Kind::Int(0, limits::MAX_NUMA_NODES as u64 - 1),
                "the next one",
                "its number; no number may be left out",
            ),
            key(
                "cpus",
                Kind::Vcpus,
                "none",
                "its vCPUs; each vCPU has one node",
            ),
            key(
                "memdev",
                Kind::Id,
                "none",
                "id of the -object memory-backend-… that is its memory; guest memory is that of all nodes, in their order",
            ),
        ],
    ),
    form(
        "dist",
        "How far it is from one node to another",
        &[
            must(
                "src",
                Kind::Int(0, limits::MAX_NUMA_NODES as u64 - 1),
                "from",
            ),
            must("dst", Kind::Int(0, limits::MAX_NUMA_NODES as u64 - 1), "to"),
            must(
                "val",
                Kind::Int(10, 255),
                "10 within a node and nowhere else; 255 where there is no way; 20 if not given, or what the way back has",
            ),
        ],
    ),
];

/// `-object`
const OBJECT: &[Shape] = &[
    form(
        "iothread",
        "What the processes of some devices have in common",
        &[
            must("id", Kind::Id, "name that a device refers to"),
            key(
                "cpus",
                Kind::Cpus,
                "wherever the VM may",
                "where the processes of the devices that name it run, and what the kernel does for them",
            ),
        ],
    ),
    form(
        "secret",
        "A secret, as libvirt passes one; nothing here has a use for it, and its file is not opened",
        &[
            must("id", Kind::Id, "name that others refer to"),
            key(
                "format",
                Kind::Choice(&["raw", "base64"]),
                "raw",
                "how it is written",
            ),
            key("file", Kind::Path, "", "file that it is in"),
        ],
    ),
    form(
        "memory-backend-ram",
        "Guest memory without a file",
        &[
            BACKEND_ID,
            BACKEND_SIZE,
            BACKEND_SHARE,
            BACKEND_PREALLOC,
            BACKEND_MEM_PREALLOC,
            BACKEND_DUMP,
            BACKEND_DUMP_GUEST_CORE,
            BACKEND_POLICY,
            BACKEND_NODES,
        ],
    ),
    form(
        "memory-backend-memfd",
        "The same: guest memory without a file always is a memfd",
        &[
            BACKEND_ID,
            BACKEND_SIZE,
            BACKEND_SHARE,
            BACKEND_PREALLOC,
            BACKEND_MEM_PREALLOC,
            BACKEND_DUMP,
            BACKEND_DUMP_GUEST_CORE,
            BACKEND_POLICY,
            BACKEND_NODES,
            key(
                "hugetlb",
                Kind::Fixed(&["off"]),
                "off",
                "huge pages; give mem-path= a hugetlbfs instead",
            ),
            key("seal", Kind::Fixed(&["on"]), "on", "its size never changes"),
        ],
    ),
    form(
        "memory-backend-file",
        "Guest memory in a file, as -mem-path",
        &[
            BACKEND_ID,
            BACKEND_SIZE,
            must(
                "mem-path",
                Kind::Path,
                "a file, or a directory to make one in; absolute",
            ),
            BACKEND_SHARE,
            BACKEND_PREALLOC,
            BACKEND_MEM_PREALLOC,
            BACKEND_DUMP,
            BACKEND_DUMP_GUEST_CORE,
            BACKEND_POLICY,
            BACKEND_NODES,
        ],
    ),
];

const SERVER: Key = key("server", Kind::Bool, "off", "listens; otherwise connects");
const NOWAIT: Key = key("nowait", Kind::Bool, "off", "does not wait for a client");
const WAIT: Key = key("wait", Kind::Bool, "on", "the opposite of nowait");
const SOCKET_PATH: Key = must("path", Kind::Path, "unix socket");
const CHARDEV_PATH: Key = key("path", Kind::Path, "", "unix socket; this or fd is needed");
const CHARDEV_FD: Key = key(
    "fd",
    Kind::Fds(1),
    "",
    "inherited unix socket, which listens with server",
);
const FILE_PATH: Key = must("path", Kind::Path, "file that takes the output");
const CHARDEV_ID: Key = must("id", Kind::Id, "name that others refer to");
const MUX: Key = key("mux", Kind::Fixed(&["off"]), "off", "one user only");
const STDIO_HELP: &str = "Standard input and output; a terminal is put into raw mode";
const PTY_HELP: &str =
    "A new pseudo terminal, whose name is printed at the start and shown by query-chardev";
const SOCKET_HELP: &str = "A unix socket";
const FILE_HELP: &str = "A file, for output only";

/// `-chardev`
const CHARDEV: &[Shape] = &[
    form(
        "stdio",
        STDIO_HELP,
        &[
            CHARDEV_ID,
            MUX,
            key(
                "signal",
                Kind::Fixed(&["off"]),
                "off",
                "^C goes to the guest",
            ),
        ],
    ),
    form("pty", PTY_HELP, &[CHARDEV_ID, MUX]),
    form(
        "socket",
        SOCKET_HELP,
        &[
            CHARDEV_ID,
            CHARDEV_PATH,
            CHARDEV_FD,
            SERVER,
            NOWAIT,
            WAIT,
            MUX,
        ],
    ),
    form(
        "file",
        FILE_HELP,
        &[
            CHARDEV_ID,
            FILE_PATH,
            MUX,
            key(
                "append",
                Kind::Fixed(&["off"]),
                "off",
                "the file is emptied",
            ),
        ],
    ),
];

/// `-serial`
const SERIAL: &[Shape] = &[
    form("stdio", STDIO_HELP, &[]),
    form("pty", PTY_HELP, &[]),
    form("socket", SOCKET_HELP, &[SOCKET_PATH, SERVER, NOWAIT, WAIT]),
    form("file", FILE_HELP, &[FILE_PATH]),
    form("none", "No serial port", &[]),
];

/// `-qmp`
const QMP: &[Shape] = &[one(
    "address",
    &[
        must("address", Kind::Text(4096), "unix:PATH or tcp:HOST:PORT"),
        SERVER,
        NOWAIT,
        WAIT,
    ],
)];

/// `-mon`
const MON: &[Shape] = &[one(
    "chardev",
    &[
        must("chardev", Kind::Id, "id of a -chardev socket"),
        key("mode", Kind::Fixed(&["control"]), "control", "QMP"),
        key("id", Kind::Id, "", "name of the monitor"),
        key(
            "pretty",
            Kind::Fixed(&["off"]),
            "off",
            "answers take one line each",
        ),
    ],
)];

const DENY: Kind = Kind::Choice(&["deny", "allow"]);

/// `-sandbox`
const SANDBOX: &[Shape] = &[one(
    "mode",
    &[
        must(
            "mode",
            Kind::Choice(&["strict", "best-effort", "on"]),
            "strict refuses to start when the host lacks a layer of a jail; best-effort (also on) goes on and says what is \
         missing",
        ),
        key(
            "obsolete",
            DENY,
            "deny",
            "always denied: accepted as libvirt passes it",
        ),
        key(
            "elevateprivileges",
            Kind::Choice(&["deny", "allow", "children"]),
            "deny",
            "always denied, likewise",
        ),
        key(
            "spawn",
            DENY,
            "deny",
            "always denied once the VM is set up, likewise",
        ),
        key("resourcecontrol", DENY, "deny", "always denied, likewise"),
    ],
)];

const SECCOMP: &[Shape] = &[one(
    "action",
    &[must(
        "action",
        Kind::Choice(&["kill", "log", "trap"]),
        "what happens to a system call that a filter does not allow",
    )],
)];

const ACCEL: &[Shape] = &[one(
    "accel",
    &[must("accel", Kind::Fixed(&["kvm"]), "the accelerator")],
)];

const fn props(shapes: &'static [Shape]) -> Arg {
    Arg::Props {
        selector: "",
        noun: "",
        shapes,
        later: &[],
    }
}

const fn def(group: Group, name: &'static str, arg: Arg, help: &'static str) -> OptionDef {
    OptionDef {
        name,
        aliases: &[],
        group,
        arg,
        many: false,
        help,
    }
}

const fn repeated(group: Group, name: &'static str, arg: Arg, help: &'static str) -> OptionDef {
    OptionDef {
        name,
        aliases: &[],
        group,
        arg,
        many: true,
        help,
    }
}

const fn accepted(name: &'static str, arg: Arg) -> OptionDef {
    OptionDef {
        name,
        aliases: &[],
        group: Group::Accepted,
        arg,
        many: true,
        help: "",
    }
}

const fn later(name: &'static str, help: &'static str) -> OptionDef {
    OptionDef {
        name,
        aliases: &[],
        group: Group::Later,
        arg: Arg::Text("…"),
        many: true,
        help,
    }
}

/// All options, in the order of the pages.
pub static OPTIONS: &[OptionDef] = &[
    def(Group::Machine, "machine", props(MACHINE), "The board."),
    def(
        Group::Machine,
        "accel",
        props(ACCEL),
        "The accelerator, which is always KVM.",
    ),
    def(Group::Machine, "cpu", props(CPU), "The processor."),
    def(
        Group::Machine,
        "smp",
        props(SMP),
        "vCPUs and their topology: sockets * dies * clusters * cores * threads = maxcpus >= cpus.",
    ),
    repeated(
        Group::Machine,
        "vcpu-affinity",
        props(VCPU_AFFINITY),
        "Where a vCPU runs, from before its first instruction on. A processor that this process may not use is an error.",
    ),
    def(
        Group::Machine,
        "m",
        props(MEMORY),
        "Guest memory, 128M to 512G in whole MiB; 256M if not given.",
    ),
    repeated(
        Group::Machine,
        "numa",
        Arg::Props {
            selector: "type",
            noun: "part of a NUMA machine",
            shapes: NUMA,
            later: &["cpu", "hmat-cache", "hmat-lb"],
        },
        "Nodes of a machine whose memory is not equally far from all vCPUs, at most 8. With nodes -mem-path and -mem-prealloc have no effect: each memory-backend has its own.",
    ),
    def(
        Group::Machine,
        "mem-prealloc",
        Arg::Flag,
        "Make every page of guest memory before the guest runs.",
    ),
    def(
        Group::Machine,
        "mem-path",
        Arg::Text("PATH"),
        "Back guest memory by this file (see mem-share= of -machine) or by a new file without a name in this directory (a hugetlbfs, say). The path is absolute.",
    ),
    def(
        Group::Machine,
        "name",
        props(NAME),
        "Name of the VM, 1 to 255 characters.",
    ),
    def(
        Group::Machine,
        "uuid",
        Arg::Text("UUID"),
        "UUID of the VM, 8-4-4-4-12 hexadecimal digits.",
    ),
    def(
        Group::Boot,
        "kernel",
        Arg::Text("FILE"),
        "Linux kernel: an ELF vmlinux or a bzImage.",
    ),
    def(
        Group::Boot,
        "initrd",
        Arg::Text("FILE"),
        "Initial RAM disk.",
    ),
    def(
        Group::Boot,
        "append",
        Arg::Words("TEXT"),
        "Kernel command line: one argument, or several up to the next that starts with '-'.",
    ),
    repeated(
        Group::Devices,
        "drive",
        props(DRIVE),
        "What a disk holds. At most 6 disks; each -device takes one drive.",
    ),
    repeated(
        Group::Devices,
        "blockdev",
        Arg::Props {
            selector: "driver",
            noun: "block driver",
            shapes: BLOCKDEV,
            later: &["luks", "nbd", "null-co", "host_cdrom"],
        },
        "The same as -drive, as QEMU and libvirt name it: a node, which a -device or another node refers to.",
    ),
    repeated(
        Group::Devices,
        "netdev",
        Arg::Props {
            selector: "type",
            noun: "netdev type",
            shapes: NETDEV,
            later: &["user", "bridge", "socket"],
        },
        "Where a network card's packets go.",
    ),
    repeated(
        Group::Devices,
        "fsdev",
        Arg::Props {
            selector: "fsdriver",
            noun: "fsdev type",
            shapes: FSDEV,
            later: &["proxy", "synth"],
        },
        "A folder that a device shares with the guest.",
    ),
    repeated(
        Group::Devices,
        "hotplug",
        props(HOTPLUG),
        "Where disks, folders and cards may come from that QMP adds to the running VM. Whoever takes the VM over reaches what is granted here.",
    ),
    repeated(
        Group::Devices,
        "device",
        Arg::Props {
            selector: "driver",
            noun: "device",
            shapes: DEVICE,
            later: LATER_DEVICES,
        },
        "A device of the guest, in a jailed process of its own. At most 11, of them 6 disks and 2 cards.",
    ),
    repeated(
        Group::Devices,
        "object",
        Arg::Props {
            selector: "qom-type",
            noun: "object",
            shapes: OBJECT,
            later: &["rng-random", "tls-creds-x509", "authz-simple"],
        },
        "A thing that devices refer to. At most 8 iothreads: each device keeps a process of its own, and those that name one iothread share its processors.",
    ),
    def(
        Group::Console,
        "serial",
        Arg::Props {
            selector: "backend",
            noun: "backend",
            shapes: SERIAL,
            later: &[],
        },
        "The serial port (ttyS0): one of these, or chardev:ID for a -chardev.",
    ),
    repeated(
        Group::Console,
        "chardev",
        Arg::Props {
            selector: "backend",
            noun: "backend",
            shapes: CHARDEV,
            later: &[
                "null", "vc", "ringbuf", "udp", "pipe", "parallel", "spicevmc", "testdev", "tty",
                "serial",
            ],
        },
        "A character device, for -serial or -mon, or the socket of a vhost-user daemon.",
    ),
    repeated(
        Group::Control,
        "qmp",
        props(QMP),
        "QMP socket. With server,nowait the VM starts at once; with server alone it waits for a client.",
    ),
    repeated(
        Group::Control,
        "mon",
        props(MON),
        "QMP on the socket of a -chardev.",
    ),
    def(
        Group::Control,
        "S",
        Arg::Flag,
        "Do not start the vCPUs; QMP's cont does.",
    ),
    def(
        Group::Control,
        "no-reboot",
        Arg::Flag,
        "A reboot of the guest ends the VM.",
    ),
    def(
        Group::Control,
        "no-shutdown",
        Arg::Flag,
        "A power-off of the guest pauses the VM; QMP's quit ends it.",
    ),
    def(
        Group::Process,
        "D",
        Arg::Optional("FILE"),
        "Log to FILE, or to standard error. STRATOVIRT_LOG_LEVEL sets the level: error (the default), warn, info, \
         debug, trace.",
    ),
    def(
        Group::Process,
        "daemonize",
        Arg::Flag,
        "Go to the background once the VM is set up. Not with -serial stdio, nor with -D without a file; without -D \
         nothing is logged from then on.",
    ),
    def(
        Group::Control,
        "incoming",
        Arg::Text("file:PATH[,lazy=on]"),
        "Go on from the snapshot in folder PATH instead of booting, with the command line that it was made with; paths of images and other names may differ. -kernel is for reboots. With lazy=on the guest runs at once and its memory comes in meanwhile, what is wanted first; devices wait until all is there, and damage of the file memory is found only then and ends the VM.",
    ),
    repeated(
        Group::Control,
        "snapshot-dir",
        Arg::Text("DIR"),
        "Let migrate make snapshots: the folder DIR itself, or folders in it. Without, migrate is refused, since nothing may be written that the command line does not name. Whoever takes the VM over can replace and fill what is granted here.",
    ),
    def(
        Group::Process,
        "pidfile",
        Arg::Text("FILE"),
        "Write the process id to FILE, which must not exist, and remove it at the end. Also without -daemonize.",
    ),
    def(
        Group::Sandbox,
        "sandbox",
        props(SANDBOX),
        "What to do when the host lacks a layer of a jail. The jails themselves cannot be switched off.",
    ),
    def(
        Group::Sandbox,
        "seccomp",
        props(SECCOMP),
        "What happens to a system call that a filter does not allow; log and trap are for finding faults.",
    ),
    def(
        Group::Sandbox,
        "disable-seccomp",
        Arg::Flag,
        "No system call filters; all other layers of the jails stay. Warned about.",
    ),
    OptionDef {
        name: "help",
        aliases: &["h"],
        group: Group::Help,
        arg: Arg::Flag,
        many: true,
        help: "Print this help.",
    },
    OptionDef {
        name: "version",
        aliases: &["V"],
        group: Group::Help,
        arg: Arg::Flag,
        many: true,
        help: "Print the version.",
    },
    accepted("overcommit", Arg::Text("…")),
    accepted("no-user-config", Arg::Flag),
    accepted("nodefaults", Arg::Flag),
    accepted("enable-kvm", Arg::Flag),
    accepted("msg", Arg::Text("…")),
    accepted("rtc", Arg::Text("…")),
    accepted("nographic", Arg::Flag),
    accepted("realtime", Arg::Text("…")),
    accepted("display", Arg::Text("…")),
    accepted("usb", Arg::Flag),
    accepted("boot", Arg::Text("…")),
    accepted(
        "audiodev",
        Arg::Props {
            selector: "driver",
            noun: "audio driver",
            shapes: &[form(
                "none",
                "No sound",
                &[must("id", Kind::Id, "name that a sound card refers to")],
            )],
            later: &[
                "alsa", "dbus", "jack", "oss", "pa", "pipewire", "sdl", "spice", "wav",
            ],
        },
    ),
    later("no-acpi", "A board that does not describe itself by ACPI."),
    later("smbios", "SMBIOS tables."),
    later("global", "Defaults of a kind of device."),
    later("trace", "Events to trace."),
    later("vnc", "Remote display."),
];

/// The option that `name`, without dashes, names.
pub(super) fn find(name: &str) -> Option<&'static OptionDef> {
    OPTIONS
        .iter()
        .find(|option| option.name == name || option.aliases.contains(&name))
}
