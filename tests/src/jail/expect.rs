//! # What each process of a VM should be
//!
//! **Job.** One table: for the control process, the broker and each kind of device its threads with their filters, its
//! capabilities, limits, descriptors and memory. A device that is not in the table is an error, so that no new kind of
//! process goes unchecked.
//! **Who is not trusted.** The product: the table is written down here, not asked for.
//! **Why this way.** Every descriptor is accounted for by number or by count; "at least" would let one more in.

use ipc::limits::{
    FS_INODE_MEMORY, MAX_DEVICE_MEMORY, MAX_FS_DESCRIPTORS, MAX_FS_TABLES, MAX_INFLIGHT_REGION,
    MAX_MEMORY_REGIONS,
};
use nix::sched::{CpuSet, sched_getaffinity};
use nix::unistd::Pid;
use seccomp_policies::Policy;

/// A device of the VM under test.
#[derive(Debug, Clone)]
pub struct Device {
    /// Its id on the command line.
    pub id: &'static str,
    /// The program that runs it, which is in [`KINDS`].
    pub binary: &'static str,
    /// What it holds behind it.
    pub back_end: BackEnd,
    /// All its queues.
    pub queues: usize,
    /// Those that the guest's driver has started.
    pub started: usize,
}

/// What is behind a device.
#[derive(Debug, Clone)]
pub enum BackEnd {
    /// An image in a file of so many bytes, by the end of its path.
    Image {
        /// End of the path.
        path: &'static str,
        /// Whether it may be written.
        writes: bool,
        /// Bytes of the file.
        size: u64,
    },
    /// An image that grows as it is written, and those below it, by the ends of their paths.
    Chain {
        /// The one that is written.
        path: &'static str,
        /// Those that are read only, from the top.
        below: Vec<&'static str>,
    },
    /// None: it stands in for a card that was taken out.
    Nothing,
    /// A tap by its name.
    Tap,
    /// A tap by its name, and the kernel's vhost-net.
    TapOfKernel,
    /// A folder, by its whole path, which is the root of the process.
    Folder {
        /// The path on the host.
        path: String,
        /// Whether nothing in it may change.
        readonly: bool,
        /// The capabilities that this takes.
        capabilities: u64,
    },
}

/// The VM under test.
#[derive(Debug, Clone)]
pub struct Setting {
    /// Its devices, in the order of the command line.
    pub devices: Vec<Device>,
    /// Bytes of its RAM.
    pub ram: u64,
    /// Its vCPUs.
    pub vcpus: usize,
    /// QMP clients that are connected.
    pub clients: usize,
    /// Ends of the paths of what the broker holds for devices that are added later: folders that are granted, and images
    /// and folders that were added.
    pub held: Vec<String>,
    /// Ids of the devices whose descriptors a client passed: the broker keeps these for a restart.
    pub given: Vec<&'static str>,
}

/// What all device processes of one program have in common.
#[derive(Debug)]
pub struct Kind {
    /// The process's name.
    pub binary: &'static str,
    /// Its filter. It comes on top of the broker's.
    pub policy: Policy,
    /// Whether it has an io_uring, for which the kernel makes worker threads.
    pub ring: bool,
}

/// Not its name: the program `net` with another filter.
const NET_VHOST: &str = "net, vhost=on";

/// Every kind of device process.
pub const KINDS: &[Kind] = &[
    Kind {
        binary: "block",
        policy: Policy::Block,
        ring: true,
    },
    Kind {
        binary: "block-qcow2",
        policy: Policy::BlockQcow2,
        ring: false,
    },
    Kind {
        binary: "net",
        policy: Policy::Net,
        ring: false,
    },
    Kind {
        binary: NET_VHOST,
        policy: Policy::NetVhost,
        ring: false,
    },
    Kind {
        binary: "fs",
        policy: Policy::VhostUserFs,
        ring: false,
    },
];

impl Device {
    /// Its row of the table.
    #[must_use]
    pub fn kind(&self) -> Option<&'static Kind> {
        let binary = match self.back_end {
            BackEnd::TapOfKernel => NET_VHOST,
            _ => self.binary,
        };
        KINDS.iter().find(|kind| kind.binary == binary)
    }

    /// Whether it has an io_uring.
    #[must_use]
    pub fn has_ring(&self) -> bool {
        self.kind().is_some_and(|kind| kind.ring)
    }

    /// Threads that move data beside the one that serves: one for each further processor, at most three.
    #[must_use]
    pub fn movers(&self) -> usize {
        if !self.has_keeper() {
            return 0;
        }
        let processors = sched_getaffinity(Pid::from_raw(0)).map_or(1, |set| {
            (0..CpuSet::count())
                .filter(|cpu| set.is_set(*cpu).unwrap_or(false))
                .count()
        });
        (processors - 1).min(3)
    }

    /// Whether another process of its jail keeps its state and starts it. That one ends with the broker, and everything in
    /// its pid namespace with it.
    #[must_use]
    pub fn has_keeper(&self) -> bool {
        matches!(self.back_end, BackEnd::Folder { .. })
    }

    /// Resource limits, soft and hard alike, by the kernel's names; the caller's own are the limit where they are lower.
    #[must_use]
    pub fn limits(&self) -> Vec<(&'static str, u64)> {
        // A written image keeps the size that it has; a written folder's files are the guest's.
        let file_size = match self.back_end {
            BackEnd::Image {
                writes: true, size, ..
            } => size.max(MAX_INFLIGHT_REGION),
            BackEnd::Folder {
                readonly: false, ..
            }
            | BackEnd::Chain { .. } => u64::MAX,
            BackEnd::Folder { .. } => MAX_FS_TABLES,
            _ => MAX_INFLIGHT_REGION,
        };
        let (memory, descriptors) = match self.back_end {
            BackEnd::Folder { .. } => (
                MAX_DEVICE_MEMORY + MAX_FS_DESCRIPTORS * FS_INODE_MEMORY,
                MAX_FS_DESCRIPTORS,
            ),
            _ => (
                MAX_DEVICE_MEMORY,
                (64 + 6 * self.queues + MAX_MEMORY_REGIONS) as u64,
            ),
        };
        let locked = if self.has_ring() {
            ipc::limits::MAX_RING_MEMORY
        } else {
            0
        };
        vec![
            ("Max core file size", 0),
            ("Max msgqueue size", 0),
            ("Max realtime priority", 0),
            ("Max file size", file_size),
            ("Max data size", memory),
            ("Max locked memory", locked),
            // And a thread of the kernel's for each queue pair.
            (
                "Max processes",
                16 + u64::from(matches!(self.back_end, BackEnd::TapOfKernel)),
            ),
            ("Max open files", descriptors),
        ]
    }

    /// Its descriptors.
    #[must_use]
    pub fn descriptors(&self) -> Vec<Want> {
        let mut all = vec![
            Want::at(0, "pipe", "w"),
            Want::at(1, "pipe", "w"),
            Want::at(2, "pipe", "w"),
            Want::at(3, "socket", "rw"),
        ];
        match &self.back_end {
            BackEnd::Image { path, writes, .. } => {
                all.push(Want::at(5, path, if *writes { "rw" } else { "r" }));
            }
            BackEnd::Chain { path, below } => {
                all.push(Want::at(5, path, "rw"));
                all.extend(
                    (6..)
                        .zip(below)
                        .map(|(number, path)| Want::at(number, path, "r")),
                );
            }
            BackEnd::Nothing => {}
            BackEnd::Tap => all.push(Want::at(5, "/dev/net/tun", "rw")),
            BackEnd::TapOfKernel => {
                all.push(Want::at(5, "/dev/net/tun", "rw"));
                all.push(Want::at(6, "/dev/vhost-net", "rw"));
            }
            BackEnd::Folder { .. } => {
                // The keeper and the process that serves have all of this in common.
                all.push(Want::at(4, "memfd:folder", "rw"));
                // Its root, and the jail's processes; of these its own descriptors, to open what it has looked up.
                all.push(Want::at(5, "/", ""));
                all.push(Want::at(6, "/", ""));
                all.push(Want::at(7, "socket", "rw")); // the broker
                // The mounts of its jail, on which the descriptors are that another program may take over.
                all.push(Want::at(8, "mnt", "r"));
                all.push(Want::at(9, "pidfd", "rw"));
                all.push(Want::at(10, "/fd", ""));
                // What threads that move data tell.
                let movers = usize::from(self.movers() > 0);
                all.extend((0..movers).map(|_| Want::at(11, "eventfd", "rw")));
                // At most one more.
                all.push(Want::at(11 + movers as i32, "eventpoll", "rw"));
                all.push(Want::some("memfd:inflight", "rw"));
                all.extend((0..3 * self.started).map(|_| Want::some("eventfd", "rw")));
                return all;
            }
        }
        // What it makes itself takes the place of the start message, then those behind the back ends.
        let made = ["io_uring", "eventpoll"];
        let made = &made[usize::from(!self.has_ring())..];
        // Only a disk has two, and one back end.
        for (target, number) in made.iter().zip([4, 6]) {
            all.push(Want::at(number, target, "rw"));
        }
        all.push(Want::some("memfd:inflight", "rw"));
        // Kick, call and error.
        all.extend((0..3 * self.started).map(|_| Want::some("eventfd", "rw")));
        all
    }
}

/// A descriptor that should be there.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Want {
    /// Its number, if that is fixed.
    pub number: Option<i32>,
    /// A part of the link's text.
    pub target: String,
    /// `r`, `w`, `rw`, or nothing for a path that is only held.
    pub access: &'static str,
}

impl Want {
    fn at(number: i32, target: &str, access: &'static str) -> Self {
        Self {
            number: Some(number),
            target: target.to_owned(),
            access,
        }
    }

    fn some(target: &str, access: &'static str) -> Self {
        Self {
            number: None,
            target: target.to_owned(),
            access,
        }
    }
}

/// Bytes in front of and behind guest RAM that nothing may touch: what a 32-bit number can skip.
pub const RAM_GUARD: u64 = 1 << 32;

/// Most RAM below the hole for devices at the end of the first 4 GiB.
const LOW_RAM: u64 = 3 << 30;

/// Filters of the control process's threads, by the thread's name without digits at its end.
pub const CONTROL_THREADS: &[(&str, Policy)] = &[
    ("stratovirt", Policy::ControlMain),
    ("qmp", Policy::ControlQmp),
    ("vcpu", Policy::ControlVcpu),
    ("pager", Policy::ControlPager),
    ("window", Policy::ControlWindow),
];

impl Setting {
    /// The broker's filter.
    #[must_use]
    pub fn broker_policy(&self) -> Policy {
        if self.folders() {
            Policy::BrokerFs
        } else {
            Policy::Broker
        }
    }

    /// What the broker of a VM with devices keeps of root's capabilities: `DAC_OVERRIDE`, `DAC_READ_SEARCH`, `KILL`, `SETGID`,
    /// `SETUID`; with a tap by name `NET_ADMIN`, with a folder `SETFCAP`.
    #[must_use]
    pub fn broker_capabilities(&self) -> u64 {
        let taps = self.devices.iter().any(|d| {
            // One that was taken out had a tap.
            let card = matches!(
                d.back_end,
                BackEnd::Nothing | BackEnd::Tap | BackEnd::TapOfKernel
            );
            card && !self.given.contains(&d.id)
        });
        let always = 1 << 1 | 1 << 2 | 1 << 5 | 1 << 6 | 1 << 7;
        always | u64::from(taps) << 12 | u64::from(self.folders()) << 31
    }

    /// Sizes of the pieces in which a process maps guest RAM, the largest first.
    #[must_use]
    pub fn ram_pieces(&self) -> Vec<u64> {
        let low = self.ram.min(LOW_RAM);
        let mut pieces = vec![low, self.ram - low];
        pieces.retain(|&size| size > 0);
        pieces.sort_unstable_by(|a, b| b.cmp(a));
        pieces
    }

    fn folders(&self) -> bool {
        let folder = |d: &Device| matches!(d.back_end, BackEnd::Folder { .. });
        self.devices.iter().any(folder)
    }

    /// Descriptors of a control process with the console on pipes, messages in a file, one QMP socket and a kernel.
    #[must_use]
    pub fn control_descriptors(&self) -> Vec<Want> {
        let mut all = vec![
            Want::at(0, "pipe", "r"),
            Want::at(1, "pipe", "w"),
            Want::at(2, "/stderr", "w"),
            Want::some("/stderr", "w"), // the log
            Want::some("socket", "rw"), // the broker
            Want::some("socket", "rw"), // QMP's listener
            Want::some("memfd:guest-ram", "rw"),
            Want::some("kvm-vm", "rw"),
            Want::some("/blk-rw", "r"), // the kernel, for a reset
            Want::some("signalfd", "rw"),
            Want::some("eventpoll", "rw"), // of the main loop
            Want::some("eventpoll", "rw"), // of the QMP thread
            Want::some("eventpoll", "rw"), // of the serial port's other end
            Want::some("pipe", "r"),       // the serial port's own way to standard input and output
            Want::some("pipe", "w"),
        ];
        all.extend((0..self.vcpus).map(|n| Want::some(&format!("kvm-vcpu:{n}"), "rw")));
        all.extend((0..self.clients).map(|_| Want::some("socket", "rw")));
        // The board's own: serial port, events of the machine, power button, slots, generation id, pauses; two of the QMP thread.
        all.extend((0..CONTROL_EVENTFDS).map(|_| Want::some("eventfd", "rw")));
        for device in &self.devices {
            all.push(Want::some("socket", "rw"));
            // Kicks; for the device its interrupt, its error and its call for attention.
            all.extend((0..device.queues + 3).map(|_| Want::some("eventfd", "rw")));
            if device.started > 0 {
                all.push(Want::some("memfd:inflight", "rw"));
            }
        }
        all
    }

    /// Descriptors of the broker.
    #[must_use]
    pub fn broker_descriptors(&self) -> Vec<Want> {
        let mut all = vec![
            Want::at(0, "pipe", "r"),
            Want::at(1, "pipe", "w"),
            Want::at(2, "/stderr", "w"),
            Want::some("/stderr", "w"), // the log
            Want::some("socket", "rw"), // the control process
            Want::some("/fd", "r"),     // of the control process, for query-sandbox
            Want::some("/maps", "r"),   // the same
        ];
        all.extend(self.held.iter().map(|path| Want::some(path, "")));
        for device in &self.devices {
            all.push(Want::some("pipe", "r")); // its log
            all.push(Want::some("pidfd", "rw"));
            // The same image or folder again, for a restart.
            let given = self.given.contains(&device.id);
            match &device.back_end {
                BackEnd::Image { path, writes, .. } if given => {
                    all.push(Want::some(path, if *writes { "rw" } else { "r" }));
                }
                BackEnd::Image { path, writes, .. } => {
                    all.push(Want::some(path, ""));
                    // The process's own, for one that takes its place while it runs.
                    all.push(Want::some(path, if *writes { "rw" } else { "r" }));
                }
                BackEnd::Chain { path, below } => {
                    all.push(Want::some(path, ""));
                    all.push(Want::some(path, "rw"));
                    all.extend(below.iter().map(|path| Want::some(path, "")));
                    all.extend(below.iter().map(|path| Want::some(path, "r")));
                }
                BackEnd::Folder { path, .. } => {
                    all.push(Want::some(path, ""));
                    all.push(Want::some("socket", "rw")); // the keeper
                }
                BackEnd::Nothing => {}
                // Never a descriptor of the kernel's vhost-net: each process has its own.
                BackEnd::Tap | BackEnd::TapOfKernel => {
                    all.push(Want::some("/dev/net/tun", "rw"));
                }
            }
        }
        all
    }
}

/// Eventfds of a control process that belong to no device.
const CONTROL_EVENTFDS: usize = 10;

/// A thread that KVM makes in the process that first runs a vCPU. It is the kernel's: it runs no instruction of the process,
/// and there is none where KVM splits no huge pages.
pub const KVM_WORKER: &str = "kvm-nx-lpage-re";

/// How the names begin of threads that move data for a shared folder.
pub const MOVER: &str = "mover";

/// How the names begin of threads that the kernel makes for io_uring: they run no instruction of the process, have its filter,
/// and come and go.
pub const RING_WORKER: &str = "iou-wrk-";
