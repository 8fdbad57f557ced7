//! # What each process of a VM should be
//!
//! **Job.** One table: for the control process, the broker and each kind of device its threads with their filters, its
//! capabilities, limits, descriptors and memory. A device that is not in the table is an error, so that no new kind of
//! process goes unchecked.
//! **Who is not trusted.** The product: the table is written down here, not asked for.
//! **Why this way.** Every descriptor is accounted for by number or by count; "at least" would let one more in.

use seccomp_policies::Policy;

/// A device of the VM under test.
#[derive(Debug, Clone)]
pub struct Device {
    /// Its id on the command line.
    pub id: &'static str,
    /// The program that runs it, which is in [`KINDS`].
    pub binary: &'static str,
    /// What it holds behind it: a part of the link's text in `/proc/PID/fd`, and whether it may write.
    pub back_ends: Vec<(String, bool)>,
    /// All its queues.
    pub queues: usize,
    /// Those that the guest's driver has started.
    pub started: usize,
}

/// The VM under test.
#[derive(Debug, Clone)]
pub struct Setting {
    /// Its devices, in the order of the command line.
    pub devices: Vec<Device>,
    /// Its vCPUs.
    pub vcpus: usize,
    /// QMP clients that are connected.
    pub clients: usize,
}

/// What all device processes of one program have in common.
#[derive(Debug)]
pub struct Kind {
    /// The program, and the process's name.
    pub binary: &'static str,
    /// Its filter. It comes on top of the broker's.
    pub policy: Policy,
    /// Largest file that it may write, in bytes.
    pub file_size: u64,
}

/// Every kind of device process.
pub const KINDS: &[Kind] = &[
    Kind {
        binary: "block",
        policy: Policy::Block,
        // Or its image, where that is larger; those of a VM under test are not.
        file_size: ipc::limits::MAX_INFLIGHT_REGION,
    },
    Kind {
        binary: "net",
        policy: Policy::Net,
        file_size: ipc::limits::MAX_INFLIGHT_REGION,
    },
];

impl Device {
    /// Its row of the table.
    #[must_use]
    pub fn kind(&self) -> Option<&'static Kind> {
        KINDS.iter().find(|kind| kind.binary == self.binary)
    }

    /// Resource limits, soft and hard alike, by the kernel's names.
    #[must_use]
    pub fn limits(&self) -> Vec<(&'static str, u64)> {
        let file_size = self.kind().map(|kind| kind.file_size);
        let descriptors = 64 + 6 * self.queues + ipc::limits::MAX_MEMORY_REGIONS;
        vec![
            ("Max core file size", 0),
            ("Max msgqueue size", 0),
            ("Max realtime priority", 0),
            ("Max file size", file_size.unwrap_or(0)),
            ("Max data size", ipc::limits::MAX_DEVICE_MEMORY),
            ("Max locked memory", 0),
            ("Max processes", 16),
            ("Max open files", descriptors as u64),
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
            Want::at(4, "eventpoll", "rw"),
        ];
        for ((target, writes), number) in self.back_ends.iter().zip(5..) {
            all.push(Want::at(number, target, if *writes { "rw" } else { "r" }));
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

/// Capabilities that the broker of a VM with a device, and with a tap by name, keeps of root's: `DAC_OVERRIDE`,
/// `DAC_READ_SEARCH`, `KILL`, `SETGID`, `SETUID`; `NET_ADMIN`.
pub const BROKER_CAPABILITIES: u64 = 1 << 1 | 1 << 2 | 1 << 5 | 1 << 6 | 1 << 7 | 1 << 12;

/// Filters of the control process's threads, by the thread's name without digits at its end.
pub const CONTROL_THREADS: &[(&str, Policy)] = &[
    ("stratovirt", Policy::ControlMain),
    ("qmp", Policy::ControlQmp),
    ("vcpu", Policy::ControlVcpu),
];

impl Setting {
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
        // The board's own: serial port, events of the machine, power button, pauses; two of the QMP thread.
        all.extend((0..CONTROL_EVENTFDS).map(|_| Want::some("eventfd", "rw")));
        for device in &self.devices {
            all.push(Want::some("socket", "rw"));
            // Kick and call; for the device, its error and its call for attention.
            all.extend((0..2 * device.queues + 2).map(|_| Want::some("eventfd", "rw")));
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
        for device in &self.devices {
            all.push(Want::some("pipe", "r")); // its log
            all.push(Want::some("pidfd", "rw"));
            for (target, _) in &device.back_ends {
                if device.binary == "block" {
                    all.push(Want::some(target, "")); // the path of its image, for a restart
                }
            }
        }
        all
    }
}

/// Eventfds of a control process that belong to no device.
const CONTROL_EVENTFDS: usize = 7;

/// A thread that KVM makes in the process that first runs a vCPU. It is the kernel's: it runs no instruction of the process,
/// and there is none where KVM splits no huge pages.
pub const KVM_WORKER: &str = "kvm-nx-lpage-re";
