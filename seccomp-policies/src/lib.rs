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

pub mod heap;
mod install;

pub use install::{Error, in_force, install, install_all_threads, mark, traced};

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
    /// The control process's thread that brings in guest memory of a snapshot.
    ControlPager,
    /// The control process's thread that maps files of shared folders for the guest.
    ControlWindow,
    /// The broker, and whatever its children do before they install their own filter.
    Broker,
    /// The broker of a VM that shares a folder.
    BrokerFs,
    /// A block device process.
    Block,
    /// A block device process whose image is qcow2.
    BlockQcow2,
    /// A network device process.
    Net,
    /// A network device process whose packets the kernel's vhost passes.
    NetVhost,
    /// The example device process.
    Template,
    /// The file-sharing daemon.
    VhostUserFs,
    /// A thread of the file-sharing daemon that moves data between open files and guest memory.
    FsMover,
    /// The process that keeps what a guest holds of a shared folder, and starts those that serve it.
    FsKeeper,
    /// The process of the file-sharing daemon that waits outside of the jail, and starts others inside.
    FsOutside,
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

impl Action {
    /// As `-seccomp` spells it.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Kill => "kill",
            Self::Log => "log",
            Self::Trap => "trap",
        }
    }

    /// Whether a forbidden call is surely not made and its maker surely gone.
    #[must_use]
    pub const fn protects(self) -> bool {
        matches!(self, Self::Kill)
    }
}

impl Policy {
    /// Every policy.
    pub const ALL: [Self; 18] = [
        Self::ControlMain,
        Self::ControlQmp,
        Self::ControlVcpu,
        Self::ControlPager,
        Self::ControlWindow,
        Self::Broker,
        Self::BrokerFs,
        Self::Block,
        Self::BlockQcow2,
        Self::Net,
        Self::NetVhost,
        Self::Template,
        Self::VhostUserFs,
        Self::FsMover,
        Self::FsKeeper,
        Self::FsOutside,
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
            Self::ControlPager => &generated::CONTROL_PAGER_INFO,
            Self::ControlWindow => &generated::CONTROL_WINDOW_INFO,
            Self::Broker => &generated::BROKER_INFO,
            Self::BrokerFs => &generated::BROKER_FS_INFO,
            Self::Block => &generated::BLOCK_INFO,
            Self::BlockQcow2 => &generated::BLOCK_QCOW2_INFO,
            Self::Net => &generated::NET_INFO,
            Self::NetVhost => &generated::NET_VHOST_INFO,
            Self::Template => &generated::TEMPLATE_INFO,
            Self::VhostUserFs => &generated::VHOST_USER_FS_INFO,
            Self::FsMover => &generated::FS_MOVER_INFO,
            Self::FsKeeper => &generated::FS_KEEPER_INFO,
            Self::FsOutside => &generated::FS_OUTSIDE_INFO,
            Self::OzoneOutside => &generated::OZONE_OUTSIDE_INFO,
            Self::OzoneFirst => &generated::OZONE_FIRST_INFO,
        }
    }

    /// The filter itself, for comparing it with what the kernel says that a thread has.
    #[must_use]
    pub fn program(self, action: Action) -> &'static [libc::sock_filter] {
        let compiled = self.compiled();
        match action {
            Action::Kill => compiled.kill,
            Action::Log => compiled.log,
            Action::Trap => compiled.trap,
        }
    }

    fn compiled(self) -> &'static Compiled {
        match self {
            Self::ControlMain => &generated::CONTROL_MAIN,
            Self::ControlQmp => &generated::CONTROL_QMP,
            Self::ControlVcpu => &generated::CONTROL_VCPU,
            Self::ControlPager => &generated::CONTROL_PAGER,
            Self::ControlWindow => &generated::CONTROL_WINDOW,
            Self::Broker => &generated::BROKER,
            Self::BrokerFs => &generated::BROKER_FS,
            Self::Block => &generated::BLOCK,
            Self::BlockQcow2 => &generated::BLOCK_QCOW2,
            Self::Net => &generated::NET,
            Self::NetVhost => &generated::NET_VHOST,
            Self::Template => &generated::TEMPLATE,
            Self::VhostUserFs => &generated::VHOST_USER_FS,
            Self::FsMover => &generated::FS_MOVER,
            Self::FsKeeper => &generated::FS_KEEPER,
            Self::FsOutside => &generated::FS_OUTSIDE,
            Self::OzoneOutside => &generated::OZONE_OUTSIDE,
            Self::OzoneFirst => &generated::OZONE_FIRST,
        }
    }
}

impl fmt::Display for Policy {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        // Not from `info`: its tables are for people and audits. A process that only wants a name would have them all, 120 KiB
        // of pointers that are relocated, so private and touched, before it begins.
        f.write_str(self.compiled().name)
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
    /// How many distinct calls the rules let through, whatever their arguments. Answers are not counted, nor is what is there
    /// only for the sake of a child process, whose own filter counts it.
    pub syscalls: usize,
    /// How many there may be at most; more is a build error.
    pub budget: usize,
    /// Why that many, where it is not the figure that the kind of thread started with.
    pub budget_why: Option<&'static str>,
    /// A device file of the host, without which nothing is ever under this policy.
    pub needs: Option<&'static str>,
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
    pub args: &'static [ArgInfo],
    /// The error that the call is answered with instead of being made; `0` is the result 0.
    pub error: Option<&'static str>,
    /// The reason for the rule.
    pub why: &'static str,
    /// The file that holds it.
    pub from: &'static str,
    /// Why a run of all tests may leave the rule unused, if it may.
    pub rare: Option<Rare>,
    /// The policy of a child process for whose sake the rule is there: the child has inherited the filter.
    pub child: Option<&'static str>,
}

/// Why a run of all suites may leave a rule unused.
#[derive(Debug, Clone, Copy)]
pub struct Rare {
    /// What the call takes.
    pub takes: Takes,
    /// In words.
    pub why: &'static str,
    /// The test that makes it all the same, `folder/file::function`.
    pub test: &'static str,
}

/// What a rare call takes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Takes {
    /// Another kind of host.
    Host,
    /// Several things at the same moment.
    Chance,
}

impl RuleInfo {
    /// Whether a call with these arguments is what this rule is about.
    #[must_use]
    pub fn matches(&self, number: i64, args: &[u64; 6]) -> bool {
        self.number == number && self.args.iter().all(|arg| arg.holds(args))
    }
}

/// One check of one argument.
#[derive(Debug)]
pub struct ArgInfo {
    /// Which argument, 0 to 5.
    pub index: u8,
    /// Whether all 64 bits are compared, or the lower 32.
    pub wide: bool,
    /// How they are compared.
    pub op: Op,
    /// The bits that count.
    pub mask: u64,
    /// The check in words.
    pub text: &'static str,
    /// The values that satisfy it, any of them, with their names.
    pub values: &'static [(u64, &'static str)],
}

impl ArgInfo {
    /// Whether the call's arguments satisfy the check.
    #[must_use]
    pub fn holds(&self, args: &[u64; 6]) -> bool {
        self.values
            .iter()
            .any(|(value, _)| self.holds_for(*value, args))
    }

    /// Whether they satisfy it by this one of its values.
    #[must_use]
    pub fn holds_for(&self, value: u64, args: &[u64; 6]) -> bool {
        let Some(&given) = args.get(usize::from(self.index)) else {
            return false;
        };
        let given = if self.wide {
            given
        } else {
            given & 0xffff_ffff
        };
        match self.op {
            Op::Eq => given == value,
            Op::Ne => given != value,
            Op::Lt => given < value,
            Op::Le => given <= value,
            Op::Gt => given > value,
            Op::Ge => given >= value,
            Op::MaskedEq => given & self.mask == value,
        }
    }
}

/// How an argument is compared with a value; unsigned.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[allow(missing_docs)] // the names say it
pub enum Op {
    Eq,
    Ne,
    Lt,
    Le,
    Gt,
    Ge,
    /// Equal in the bits of the mask.
    MaskedEq,
}

/// Every policy, sorted by name.
#[must_use]
pub fn table() -> &'static [&'static PolicyInfo] {
    &generated::TABLE
}

/// One policy's filters, as the kernel takes them.
struct Compiled {
    /// As in [`PolicyInfo::name`].
    name: &'static str,
    kill: &'static [libc::sock_filter],
    log: &'static [libc::sock_filter],
    trap: &'static [libc::sock_filter],
}

mod generated {
    use super::{ArgInfo, Compiled, Op, PolicyInfo, Rare, RuleInfo, Takes};

    /// One BPF instruction.
    const fn i(code: u16, jt: u8, jf: u8, k: u32) -> libc::sock_filter {
        libc::sock_filter { code, jt, jf, k }
    }

    include!(concat!(env!("OUT_DIR"), "/policies.rs"));
}
