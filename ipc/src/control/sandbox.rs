//! What the broker has read about the jails of a VM's processes.
//!
//! **Job.** The reply to [`super::Request::Inspect`] as plain data, one message a process.
//! **Who is not trusted.** The processes that it is about: nothing in here was asked of them. Their names are their own
//! choice, so they are cut and cleaned by whoever reads them.
//! **Why this way.** A fact that could not be read is an error with the reason, never a value that looks like one.

use serde::{Deserialize, Serialize};

/// A fact, or why it could not be read.
pub type Fact<T> = Result<T, String>;

/// Whose process it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum Role {
    /// The control process.
    Control,
    /// The broker.
    Broker,
    /// The process of this index into the policy's devices.
    Device(u32),
    /// The process that holds the state of that device and starts those that serve it.
    Keeper(u32),
}

/// The namespaces of a process, by their names in `/proc/PID/ns`, in the order of [`ProcessFacts::namespaces`].
pub const NAMESPACES: [&str; 7] = ["user", "mnt", "pid", "net", "ipc", "uts", "cgroup"];

/// The capability sets, in the order of [`ThreadFacts::capabilities`].
pub const CAPABILITY_SETS: [&str; 5] = [
    "inheritable",
    "permitted",
    "effective",
    "bounding",
    "ambient",
];

/// One process.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ProcessFacts {
    /// Whose it is.
    pub role: Role,
    /// Its process id in the broker's pid namespace.
    pub pid: i32,
    /// Its name, at most 15 bytes.
    pub name: Fact<String>,
    /// Real, effective, saved and file system user id, as the broker's user namespace sees them.
    pub uids: Fact<[u32; 4]>,
    /// The same of its group.
    pub gids: Fact<[u32; 4]>,
    /// Supplementary groups.
    pub groups: Fact<Vec<u32>>,
    /// Lines of its user namespace's user map: first id inside, first id outside as the broker sees it, count.
    pub uid_map: Fact<Vec<[u32; 3]>>,
    /// The same for groups.
    pub gid_map: Fact<Vec<[u32; 3]>>,
    /// Whether others of its user may look into it and dump it.
    pub dumpable: Fact<bool>,
    /// Its threads.
    pub threads: Fact<Vec<ThreadFacts>>,
    /// Inode numbers of its namespaces, in the order of [`NAMESPACES`].
    pub namespaces: Fact<[u64; 7]>,
    /// Its root folder.
    pub root: Fact<RootFacts>,
    /// Resource limits.
    pub limits: Fact<Vec<Limit>>,
    /// Its open descriptors.
    pub fds: Fact<Vec<FdFacts>>,
    /// Its memory.
    pub memory: Fact<MemoryFacts>,
}

/// One thread.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ThreadFacts {
    /// Its id in the broker's pid namespace.
    pub tid: i32,
    /// Its name, at most 15 bytes.
    pub name: String,
    /// 0 for none, 1 for strict, 2 for a filter.
    pub seccomp: u8,
    /// How many filters it has; `None` where the kernel does not count them (before Linux 5.9).
    pub filters: Option<u32>,
    /// In the order of [`CAPABILITY_SETS`].
    pub capabilities: [u64; 5],
    /// `no_new_privs`
    pub no_new_privs: bool,
}

/// A root folder.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct RootFacts {
    /// Type of its file system.
    pub file_system: String,
    /// Options of the mount and of the file system, as `/proc/PID/mountinfo` has them.
    pub options: Vec<String>,
    /// How many mounts the process sees.
    pub mounts: u32,
    /// How many files lie in it, at most [`crate::limits::MAX_INSPECTED_NAMES`]. Not asked of a process that has the
    /// caller's root.
    pub entries: Option<u32>,
}

/// A resource limit.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Limit {
    /// The kernel's name of it ("Max open files").
    pub name: String,
    /// Soft limit; `None` for unlimited.
    pub soft: Option<u64>,
    /// Hard limit; `None` for unlimited.
    pub hard: Option<u64>,
}

/// An open descriptor.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct FdFacts {
    /// Its number.
    pub fd: i32,
    /// What it is, without a path: `socket`, `pipe`, `eventfd`, `memfd:guest-ram`, `file`, `/dev/net/tun`. `None` where the
    /// kernel shows it to nobody.
    pub kind: Option<String>,
    /// Whether it reads and whether it writes; `None` where the kernel shows it to nobody.
    pub access: Option<(bool, bool)>,
    /// Whether `kind` is what it was at lock-down, and cannot be read any more.
    pub since_lock_down: bool,
}

/// What a process has mapped.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct MemoryFacts {
    /// Mappings.
    pub mappings: u32,
    /// Those that are executable, the vdso's among them.
    pub executable: u32,
    /// Those that are writable and executable.
    pub writable_executable: u32,
    /// Those of memfds, guest RAM among them.
    pub memfds: u32,
    /// File names, without folders, of mappings that are neither the program, nor a memfd, nor anonymous. No more than
    /// [`crate::limits::MAX_INSPECTED_NAMES`].
    pub foreign: Vec<String>,
}
