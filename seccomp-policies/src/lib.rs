//! Seccomp policies: one per process and per thread, as data.
//!
//! Job: hold each policy of `policies/*.toml` as ready-made BPF, install it for the calling thread,
//! and tell what it says ([`table`]).
//! Not trusted: the thread that installs a filter, from the next instruction on. A filter cannot be
//! taken back, and its default is to kill the process.
//! Why this way: policies are reviewed as files, by call name, each rule with its reason; they are
//! checked and compiled when the crate is built, so that a mistake cannot reach a running VM and
//! installing costs a few microseconds and no memory. Debug and release builds hold the same
//! filters; only the [`Action`] taken on a forbidden call can be chosen.

mod install;

pub use install::{Error, install, install_all_threads};

use std::fmt;

/// Whose filter it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Policy {
    /// The control process's event loop.
    ControlMain,
    /// The control process's QMP thread.
    ControlQmp,
    /// A thread of the control process that runs one vCPU.
    ControlVcpu,
    /// The broker, and whatever its children do before they install their own filter.
    Broker,
    /// The broker of a VM that shares a folder.
    BrokerFs,
    /// A block device process.
    Block,
    /// A network device process.
    Net,
    /// The example device process.
    Template,
    /// The file-sharing daemon.
    VhostUserFs,
    /// `ozone`: the process that a manager started.
    OzoneOutside,
    /// `ozone`: the first process of the jail's pid namespace.
    OzoneFirst,
}

/// What the kernel does when a thread makes a call that its policy does not name.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub enum Action {
    /// Kill the whole process with SIGSYS. The only choice that protects.
    #[default]
    Kill,
    /// Log the call to the audit log and let it through: for finding out what a policy lacks.
    Log,
    /// Send SIGSYS, which a debugger or handler can catch.
    Trap,
}

impl Policy {
    /// Every policy.
    pub const ALL: [Self; 11] = [
        Self::ControlMain,
        Self::ControlQmp,
        Self::ControlVcpu,
        Self::Broker,
        Self::BrokerFs,
        Self::Block,
        Self::Net,
        Self::Template,
        Self::VhostUserFs,
        Self::OzoneOutside,
        Self::OzoneFirst,
    ];

    /// What the policy says, for people and for audits.
    #[must_use]
    pub fn info(self) -> &'static PolicyInfo {
        match self {
            Self::ControlMain => &generated::CONTROL_MAIN_INFO,
            Self::ControlQmp => &generated::CONTROL_QMP_INFO,
            Self::ControlVcpu => &generated::CONTROL_VCPU_INFO,
            Self::Broker => &generated::BROKER_INFO,
            Self::BrokerFs => &generated::BROKER_FS_INFO,
            Self::Block => &generated::BLOCK_INFO,
            Self::Net => &generated::NET_INFO,
            Self::Template => &generated::TEMPLATE_INFO,
            Self::VhostUserFs => &generated::VHOST_USER_FS_INFO,
            Self::OzoneOutside => &generated::OZONE_OUTSIDE_INFO,
            Self::OzoneFirst => &generated::OZONE_FIRST_INFO,
        }
    }

    fn compiled(self) -> &'static Compiled {
        match self {
            Self::ControlMain => &generated::CONTROL_MAIN,
            Self::ControlQmp => &generated::CONTROL_QMP,
            Self::ControlVcpu => &generated::CONTROL_VCPU,
            Self::Broker => &generated::BROKER,
            Self::BrokerFs => &generated::BROKER_FS,
            Self::Block => &generated::BLOCK,
            Self::Net => &generated::NET,
            Self::Template => &generated::TEMPLATE,
            Self::VhostUserFs => &generated::VHOST_USER_FS,
            Self::OzoneOutside => &generated::OZONE_OUTSIDE,
            Self::OzoneFirst => &generated::OZONE_FIRST,
        }
    }
}

impl fmt::Display for Policy {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.info().name)
    }
}

/// What one policy says.
#[derive(Debug)]
pub struct PolicyInfo {
    /// The policy's file name without `.toml`.
    pub name: &'static str,
    /// The process, as `ps` shows it.
    pub process: &'static str,
    /// The thread, or `all`.
    pub thread: &'static str,
    /// What the thread does.
    pub about: &'static str,
    /// How many distinct calls the rules name.
    pub syscalls: usize,
    /// Length of the main filter in BPF instructions.
    pub instructions: usize,
    /// The rules, a policy's own first, then those of the shared pieces.
    pub rules: &'static [RuleInfo],
}

/// One rule.
#[derive(Debug)]
pub struct RuleInfo {
    /// The call's name.
    pub call: &'static str,
    /// The call's number on the architecture that this was built for.
    pub number: i64,
    /// Argument checks, all of which must hold; none means any arguments.
    pub args: &'static [&'static str],
    /// The error that the call is answered with instead of being made.
    pub error: Option<&'static str>,
    /// The reason for the rule.
    pub why: &'static str,
    /// The file that holds it.
    pub from: &'static str,
}

/// Every policy, sorted by name.
#[must_use]
pub fn table() -> &'static [&'static PolicyInfo] {
    &generated::TABLE
}

/// One policy's filters, as the kernel takes them.
struct Compiled {
    kill: &'static [libc::sock_filter],
    log: &'static [libc::sock_filter],
    trap: &'static [libc::sock_filter],
}

mod generated {
    use super::{Compiled, PolicyInfo, RuleInfo};

    /// One BPF instruction.
    const fn i(code: u16, jt: u8, jf: u8, k: u32) -> libc::sock_filter {
        libc::sock_filter { code, jt, jf, k }
    }

    include!(concat!(env!("OUT_DIR"), "/policies.rs"));
}
