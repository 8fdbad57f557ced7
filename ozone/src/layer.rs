//! What a jail consists of, and how much of it a host gave.

use nix::errno::Errno;
use std::fmt;

/// What to do when the host cannot give a layer.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Sandbox {
    /// Go on with the layers that are left, and report what is missing.
    #[default]
    BestEffort,
    /// Refuse to start.
    Strict,
}

/// One protection of a jail.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Layer {
    /// Own user namespace: capabilities inside mean nothing outside.
    UserNamespace,
    /// Own mount namespace.
    MountNamespace,
    /// Own pid namespace; the process is its first.
    PidNamespace,
    /// Own session and process group, and no key of the caller's session.
    Session,
    /// Own, empty network namespace.
    NetworkNamespace,
    /// Own System V IPC and POSIX message queues.
    IpcNamespace,
    /// Own host name.
    UtsNamespace,
    /// Own view of the cgroup tree.
    CgroupNamespace,
    /// An unprivileged user and group without supplementary groups.
    Identity,
    /// The root folder is an empty, read-only, nosuid, nodev, noexec tmpfs.
    EmptyRoot,
    /// The root folder is the tree that the process serves, nosuid, nodev, noexec, and nothing else.
    TreeRoot,
    /// No capability in any of the five sets, and none to be had back.
    Capabilities,
    /// No capability but those that serving a tree takes, and no other to be had.
    TreeCapabilities,
    /// No program can give new rights.
    NoNewPrivileges,
    /// Exactly the descriptors that the process was given.
    Descriptors,
    /// Resource limits.
    Limits,
    /// The process dies with its parent.
    ParentDeath,
    /// Others of the same user cannot read its memory or trace it; no core dumps.
    NotDumpable,
    /// Landlock: no file system access.
    LandlockFiles,
    /// Landlock: no TCP bind or connect (ABI 4).
    LandlockTcp,
    /// Landlock: no signals and abstract sockets out of the jail (ABI 6).
    LandlockScopes,
}

impl fmt::Display for Layer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::UserNamespace => "user namespace",
            Self::MountNamespace => "mount namespace",
            Self::PidNamespace => "pid namespace",
            Self::Session => "own session and keys",
            Self::NetworkNamespace => "network namespace",
            Self::IpcNamespace => "ipc namespace",
            Self::UtsNamespace => "uts namespace",
            Self::CgroupNamespace => "cgroup namespace",
            Self::Identity => "unprivileged identity",
            Self::EmptyRoot => "empty root",
            Self::TreeRoot => "shared tree as root",
            Self::Capabilities => "no capabilities",
            Self::TreeCapabilities => "no capabilities but those for the tree",
            Self::NoNewPrivileges => "no new privileges",
            Self::Descriptors => "exact descriptors",
            Self::Limits => "resource limits",
            Self::ParentDeath => "death with the parent",
            Self::NotDumpable => "not dumpable",
            Self::LandlockFiles => "Landlock for files",
            Self::LandlockTcp => "Landlock for TCP",
            Self::LandlockScopes => "Landlock for signals and abstract sockets",
        })
    }
}

/// How much of a layer there is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum State {
    /// All of it.
    On,
    /// Some of it; the text says what is missing.
    Partly(&'static str),
    /// None of it: the kernel refused with this error.
    Off(Errno),
    /// None of it, for the reason in the text.
    Lacking(&'static str),
}

/// One layer of one process.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LayerReport {
    /// Which layer.
    pub layer: Layer,
    /// How much of it.
    pub state: State,
}

impl LayerReport {
    /// Whether the whole layer is there.
    #[must_use]
    pub fn is_on(&self) -> bool {
        self.state == State::On
    }
}

impl fmt::Display for LayerReport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let layer = self.layer;
        match &self.state {
            State::On => write!(f, "{layer}: on"),
            State::Partly(what) => write!(f, "{layer}: partly ({what})"),
            State::Off(errno) => write!(f, "{layer}: missing ({})", errno.desc()),
            State::Lacking(why) => write!(f, "{layer}: missing ({why})"),
        }
    }
}
