//! A jail for a daemon that serves one tree of files.
//!
//! Job: [`enter`] forks a process whose root is the shared tree, in namespaces of its own; [`Inside::lock`] then takes every
//! right away from it that serving the tree does not need.
//! Not trusted: the process inside, once it serves. The tree's contents are not looked at here.
//! Why this way: a daemon that many front ends can use is started by a person or a manager, not by the broker, so it builds
//! its jail itself. The process outside waits; it reads nothing that the other writes. Because both have one table of
//! descriptors, what the one inside had open outlives it, and another process inside can go on with it.
//! Started by root, the jail has a user namespace in which all ids stay what they are, so that files can be given to any user
//! while the capabilities for it mean nothing outside of the tree.

pub use crate::steps::idmap::IdRange;
use crate::{
    layer::{Layer, LayerReport, State},
    steps::{
        caps, dumpable, faults,
        idmap::{self, Identity},
        landlock, namespaces, no_new_privs, parent_death, root, session, threads,
    },
    sys::{process as sys, root as mounts, tree::clone_path},
};
use nix::{
    errno::Errno,
    fcntl::{OFlag, open},
    poll::{PollFd, PollFlags, PollTimeout, poll},
    sys::{
        signal::{SigSet, Signal},
        socket::{AddressFamily, SockFlag, SockType, socketpair},
        stat::Mode,
        wait::{Id, WaitPidFlag, WaitStatus, waitid},
    },
    unistd::{self, Pid},
};
use std::{
    ffi::{CString, c_int},
    fmt::{self, Write as _},
    mem::ManuallyDrop,
    os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd},
    os::unix::ffi::OsStrExt,
    path::Path,
    time::{Duration, Instant},
};

/// How the tree becomes the root.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Kind {
    /// By pivot_root(2) in new namespaces.
    #[default]
    Namespace,
    /// By chroot(2), for hosts that allow no namespaces.
    Chroot,
}

/// What is wanted.
#[derive(Debug, Clone)]
pub struct Wanted<'a> {
    /// The tree.
    pub source: &'a Path,
    /// How it becomes the root.
    pub kind: Kind,
    /// Nothing in it may be written.
    pub readonly: bool,
    /// Capabilities that are kept if the caller has them, one bit each.
    pub capabilities: u64,
    /// Make a user namespace even though the caller is root. Capabilities that the kernel looks for in the host's namespace
    /// (`MKNOD`, `SYS_ADMIN`) do not work in it.
    pub own_users: bool,
    /// Users that exist inside, among them user 0; none stands for all of the caller's, which stay what they are. Only root can
    /// ask for some.
    pub users: &'a [IdRange],
    /// The same for groups.
    pub groups: &'a [IdRange],
}

/// Why there is no jail.
#[derive(Debug, thiserror::Error)]
pub enum TreeError {
    /// Users of an own choice are the host's root's to give.
    #[error(
        "users and groups of a user namespace are chosen by root only, with CAP_SETUID and CAP_SETGID"
    )]
    Users,
    /// Other threads would not be in it.
    #[error("the jail must be entered before threads are started; there are {0}")]
    Threads(u64),
    /// The path has a NUL in it.
    #[error("the shared folder's path cannot be given to the kernel")]
    Path,
    /// A step failed.
    #[error("sandbox: {what}")]
    Step {
        /// What was tried.
        what: &'static str,
        /// What the kernel said.
        source: Errno,
    },
    /// A step failed in the process inside.
    #[error(transparent)]
    Inside(Box<TreeError>),
    /// Landlock's calls failed in a way that an old kernel does not explain.
    #[error("sandbox: Landlock")]
    Landlock(#[from] ::landlock::RulesetError),
}

fn step(what: &'static str) -> impl FnOnce(Errno) -> TreeError {
    move |source| TreeError::Step { what, source }
}

/// Which process this is after [`enter`].
#[derive(Debug)]
pub enum Side {
    /// The one outside, which has nothing more to do than to wait.
    Outside(Outside),
    /// The one inside.
    Inside(Inside),
}

/// The process outside. It shares its table of descriptors with the one inside, so that the guest's files stay open when that
/// one is killed; it uses none of them itself.
#[derive(Debug)]
pub struct Outside {
    child: libc::pid_t,
    signals: SigSet,
    /// Of this process, for the one inside to watch.
    me: ManuallyDrop<OwnedFd>,
    /// Whether another process can be started inside.
    repeatable: bool,
}

/// How the process inside ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Ended {
    /// By itself, with this status.
    Exited(i32),
    /// By this signal; `SIGSYS` is its system call filter.
    Killed(Signal),
    /// By this process, which was told to end.
    Stopped(Signal),
}

impl Ended {
    /// Of a child of this process; `None` if it has not ended.
    pub(crate) fn of(child: libc::pid_t, flags: WaitPidFlag) -> Result<Option<Self>, Errno> {
        loop {
            return match waitid(Id::Pid(Pid::from_raw(child)), flags) {
                Err(Errno::EINTR) => continue,
                Err(errno) => Err(errno),
                Ok(WaitStatus::Exited(_, status)) => Ok(Some(Self::Exited(status))),
                Ok(WaitStatus::Signaled(_, signal, _)) => Ok(Some(Self::Killed(signal))),
                Ok(_) => Ok(None),
            };
        }
    }
}

impl fmt::Display for Ended {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Exited(status) => write!(f, "ended with status {status}"),
            Self::Killed(signal) => write!(f, "was killed by {signal}"),
            Self::Stopped(signal) => write!(f, "was told to end by {signal}"),
        }
    }
}

/// What the process outside was waiting for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Woken {
    /// The process inside has ended.
    Ended(Ended),
    /// Somebody asks for another program in this one's place (`SIGUSR2`); the process inside goes on.
    Upgrade,
}

impl Outside {
    /// Waits until the process inside ends, ends it when this one is told to, or tells that another program is wanted.
    ///
    /// # Errors
    /// Waiting is not possible; the process inside then ends with this one.
    pub fn wait(&self) -> Result<Woken, TreeError> {
        loop {
            match self.signals.wait().map_err(step("waiting for signals"))? {
                Signal::SIGCHLD => {
                    if let Some(ended) = self.reap(WaitPidFlag::WEXITED | WaitPidFlag::WNOHANG)? {
                        return Ok(Woken::Ended(ended));
                    }
                }
                Signal::SIGUSR2 => return Ok(Woken::Upgrade),
                signal => {
                    self.end()?;
                    return Ok(Woken::Ended(Ended::Stopped(signal)));
                }
            }
        }
    }

    /// Ends the process inside, which may have ended by itself meanwhile.
    ///
    /// # Errors
    /// Waiting is not possible.
    pub fn end(&self) -> Result<Ended, TreeError> {
        let _ = sys::kill_child(self.child);
        self.reap(WaitPidFlag::WEXITED)?
            .ok_or(Errno::ECHILD)
            .map_err(step("waiting for the process inside"))
    }

    /// Waits for a byte in `word`, `patience` at most; `false` if the process inside ends before, or time does.
    ///
    /// # Errors
    /// Waiting is not possible.
    pub fn is_told(&self, word: BorrowedFd<'_>, patience: Duration) -> Result<bool, TreeError> {
        let inside = sys::pidfd(self.child).map_err(step("opening a pidfd"))?;
        let deadline = Instant::now() + patience;
        let mut polled = [word, inside.as_fd()].map(|fd| PollFd::new(fd, PollFlags::POLLIN));
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            let timeout = PollTimeout::try_from(left).unwrap_or(PollTimeout::MAX);
            match poll(&mut polled, timeout) {
                Err(Errno::EINTR) => {}
                Err(errno) => return Err(step("waiting for the process inside")(errno)),
                Ok(_) => return Ok(polled[0].any().unwrap_or(false)),
            }
        }
    }

    /// Starts another process inside, in place of one that was killed, with the descriptors that are open now.
    ///
    /// # Errors
    /// [`TreeError`], on the side where it happened.
    pub fn again(self, wanted: &Wanted<'_>) -> Result<Side, TreeError> {
        let path = terminated(wanted.source)?;
        start(wanted, &path, self.me, self.signals)
    }

    /// Whether [`again`](Self::again) is possible: it is not with rights in the host's user namespace, which this process does
    /// not keep.
    #[must_use]
    pub fn is_repeatable(&self) -> bool {
        self.repeatable
    }

    /// Whether this descriptor is this process's own.
    #[must_use]
    pub fn owns(&self, fd: RawFd) -> bool {
        self.me.as_raw_fd() == fd
    }

    fn reap(&self, flags: WaitPidFlag) -> Result<Option<Ended>, TreeError> {
        Ended::of(self.child, flags).map_err(step("waiting for the process inside"))
    }
}

/// The process inside, which still has all capabilities of its namespaces.
#[derive(Debug)]
pub struct Inside {
    /// The tree's root.
    pub tree: OwnedFd,
    /// `/proc/self/fd`, as a mount of its own where the host allows that.
    pub own_fds: OwnedFd,
    /// Readable when the process outside is gone; `None` without one.
    pub lifeline: Option<OwnedFd>,
    /// Keeps this process's mounts where they are, for as long as it is open anywhere.
    pub mounts: Option<OwnedFd>,
    /// Whether every user and group of the caller exists inside.
    pub all_users: bool,
    layers: Vec<LayerReport>,
    readonly: bool,
    capabilities: u64,
}

/// Proof that this process is in a jail around a tree. Only [`Inside::lock`] makes one.
#[derive(Debug)]
pub struct Locked {
    layers: Vec<LayerReport>,
    capabilities: u64,
}

impl Locked {
    /// The layers of the jail.
    #[must_use]
    pub fn layers(&self) -> &[LayerReport] {
        &self.layers
    }

    /// The capabilities that are left, one bit each.
    #[must_use]
    pub fn capabilities(&self) -> u64 {
        self.capabilities
    }
}

/// Builds the jail and starts the process inside.
///
/// # Errors
/// [`TreeError`], on the side where it happened.
pub fn enter(wanted: &Wanted<'_>) -> Result<Side, TreeError> {
    match threads::count().map_err(step("counting threads"))? {
        1 => {}
        more => return Err(TreeError::Threads(more)),
    }
    let path = terminated(wanted.source)?;
    match wanted.kind {
        Kind::Namespace => with_namespaces(wanted, &path),
        Kind::Chroot => with_chroot(wanted, &path).map(Side::Inside),
    }
}

fn terminated(path: &Path) -> Result<CString, TreeError> {
    CString::new(path.as_os_str().as_bytes()).map_err(|_| TreeError::Path)
}

/// Capabilities without which a user namespace cannot be given all ids.
const MAPPING: u64 = 1 << 6 | 1 << 7; // CAP_SETGID, CAP_SETUID

/// What the process outside keeps for the next user namespace: the right to map all ids into it, user 0 among them.
const MAPPING_LATER: u64 = MAPPING | 1 << 31; // CAP_SETFCAP

fn with_namespaces(wanted: &Wanted<'_>, path: &CString) -> Result<Side, TreeError> {
    let mut signals = SigSet::empty();
    for signal in [
        Signal::SIGCHLD,
        Signal::SIGTERM,
        Signal::SIGINT,
        Signal::SIGHUP,
        Signal::SIGUSR2,
    ] {
        signals.add(signal);
    }
    signals.thread_block().map_err(step("blocking signals"))?;
    let me = sys::own_pidfd().map_err(step("opening a pidfd"))?;
    start(wanted, path, ManuallyDrop::new(me), signals)
}

fn start(
    wanted: &Wanted<'_>,
    path: &CString,
    me: ManuallyDrop<OwnedFd>,
    signals: SigSet,
) -> Result<Side, TreeError> {
    let own = caps::read()
        .map_err(step("reading capabilities"))?
        .main
        .permitted;
    let privileged = unistd::geteuid().is_root() && own & MAPPING == MAPPING;
    let identity = Identity {
        uid: unistd::geteuid().as_raw(),
        gid: unistd::getegid().as_raw(),
    };
    let new_users = !privileged || wanted.own_users;
    let chosen = !wanted.users.is_empty() || !wanted.groups.is_empty();
    if chosen && !(privileged && new_users) {
        return Err(TreeError::Users);
    }
    // Both processes have both ends. Each closes one, and no object of either closes the other.
    let (parents_end, childs_end) = socketpair(
        AddressFamily::Unix,
        SockType::Stream,
        None,
        SockFlag::SOCK_CLOEXEC,
    )
    .map(|(parents, childs)| (ManuallyDrop::new(parents), ManuallyDrop::new(childs)))
    .map_err(step("making a socket pair"))?;
    let mut flags = libc::CLONE_NEWPID;
    if new_users {
        flags |= libc::CLONE_NEWUSER;
    }
    match sys::fork_with_descriptors(flags).map_err(step("making a process in new namespaces"))? {
        Some(pid) => {
            if new_users && privileged {
                idmap::map_child_to(pid, wanted.users, wanted.groups)
                    .map_err(step("mapping users"))?;
            }
            unistd::write(&*parents_end, b"1").map_err(step("telling the process inside"))?;
            // What is left to do needs no right but that of doing this again.
            if new_users && privileged {
                caps::keep_and_pass_on(MAPPING_LATER)
            } else {
                caps::clear()
            }
            .map_err(step("dropping capabilities"))?;
            no_new_privs::set().map_err(step("setting no_new_privs"))?;
            drop(ManuallyDrop::into_inner(parents_end));
            Ok(Side::Outside(Outside {
                child: pid,
                signals,
                me,
                repeatable: new_users,
            }))
        }
        None => {
            let (me, word) = (ManuallyDrop::into_inner(me), childs_end);
            step_inside(wanted, path, me, word, (identity, new_users, privileged))
                .map(Side::Inside)
                .map_err(|error| TreeError::Inside(Box::new(error)))
        }
    }
}

/// In the new process: `outside` is its parent's pidfd, `word` says that its users are there.
fn step_inside(
    wanted: &Wanted<'_>,
    path: &CString,
    outside: OwnedFd,
    word: ManuallyDrop<OwnedFd>,
    (identity, new_users, privileged): (Identity, bool, bool),
) -> Result<Inside, TreeError> {
    // What asks for another program is for the process outside, though a manager may send it to both.
    let mut blocked = SigSet::empty();
    blocked.add(Signal::SIGUSR2);
    blocked
        .thread_set_mask()
        .map_err(step("unblocking signals"))?;
    faults::report_plainly().map_err(step("resetting signals"))?;
    parent_death::follow(outside.as_raw_fd()).map_err(step("following the process outside"))?;
    if !sys::await_byte(word.as_raw_fd()).map_err(step("waiting for users"))? {
        return Err(step("waiting for users")(Errno::ESRCH));
    }
    drop(ManuallyDrop::into_inner(word));
    if new_users && !privileged {
        idmap::map_self_to_root(identity).map_err(step("mapping users"))?;
    }
    let mut inside = enter_namespaces(wanted, path, new_users)?;
    // The mounts were made by the host's root, who may have no number in here.
    if !wanted.users.is_empty() || !wanted.groups.is_empty() {
        sys::set_gid(0).map_err(step("becoming group 0"))?;
        sys::set_uid(0).map_err(step("becoming user 0"))?;
    }
    inside.lifeline = Some(outside);
    inside.all_users = privileged;
    Ok(inside)
}

fn enter_namespaces(
    wanted: &Wanted<'_>,
    path: &CString,
    new_users: bool,
) -> Result<Inside, TreeError> {
    let mut layers = Vec::new();
    let mut note = |layer, state| layers.push(LayerReport { layer, state });
    note(
        Layer::UserNamespace,
        if new_users {
            State::On
        } else {
            State::Lacking("capabilities of the host's namespace were asked for")
        },
    );
    note(Layer::PidNamespace, State::On);
    session::leave_terminal().map_err(step("starting a session"))?;
    note(
        Layer::Session,
        match session::leave_keys() {
            Ok(()) => State::On,
            Err(Errno::EDQUOT) => State::Lacking("the user's quota of keys is used up"),
            Err(errno) => return Err(step("starting a session of keys")(errno)),
        },
    );
    // Without an own user namespace this would be the host's limit.
    if new_users {
        namespaces::forbid_nested_users();
    }
    let entered: c_int = namespaces::enter(|layer, errno| note(layer, State::Off(errno)));
    if entered & libc::CLONE_NEWNS == 0 {
        return Err(step("making a mount namespace")(Errno::EPERM));
    }
    for (flag, layer) in namespaces::LATER {
        if entered & flag != 0 {
            note(layer, State::On);
        }
    }
    if entered & libc::CLONE_NEWUTS != 0 {
        namespaces::hide_hostname().map_err(step("setting the host name"))?;
    }
    let own_fds = own_fds()?;
    let mounts = open(
        c"/proc/self/ns/mnt",
        OFlag::O_RDONLY | OFlag::O_CLOEXEC,
        Mode::empty(),
    )
    .map_err(step("opening the mount namespace"))?;
    let tree = root::shared_tree(path, wanted.readonly, !new_users)
        .map_err(step("making the shared folder the root"))?;
    Ok(Inside {
        tree,
        own_fds,
        lifeline: None,
        mounts: Some(mounts),
        all_users: false,
        layers,
        readonly: wanted.readonly,
        capabilities: wanted.capabilities,
    })
}

/// `/proc/self/fd` without a way to the rest of `/proc`, where mounts can be copied.
fn own_fds() -> Result<OwnedFd, TreeError> {
    match clone_path(c"/proc/self/fd", false) {
        Ok(fd) => Ok(fd),
        Err(Errno::EPERM | Errno::EINVAL | Errno::ENOSYS) => open(
            c"/proc/self/fd",
            OFlag::O_PATH | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC,
            Mode::empty(),
        )
        .map_err(step("opening /proc/self/fd")),
        Err(errno) => Err(step("opening /proc/self/fd")(errno)),
    }
}

fn with_chroot(wanted: &Wanted<'_>, path: &CString) -> Result<Inside, TreeError> {
    // What asks for another program, which there is nobody to start.
    let mut blocked = SigSet::empty();
    blocked.add(Signal::SIGUSR2);
    blocked.thread_block().map_err(step("blocking signals"))?;
    let own_fds = own_fds()?;
    let tree = open(
        path.as_c_str(),
        OFlag::O_PATH | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC,
        Mode::empty(),
    )
    .map_err(step("opening the shared folder"))?;
    sys::fchdir(tree.as_fd()).map_err(step("entering the shared folder"))?;
    mounts::chroot_here().map_err(step("chroot (it needs CAP_SYS_CHROOT)"))?;
    sys::chdir_root().map_err(step("entering the shared folder"))?;
    let own = caps::read()
        .map_err(step("reading capabilities"))?
        .main
        .permitted;
    let lacking = |layer| LayerReport {
        layer,
        state: State::Lacking("chroot was asked for"),
    };
    Ok(Inside {
        tree,
        own_fds,
        lifeline: None,
        mounts: None,
        all_users: unistd::geteuid().is_root() && own & MAPPING == MAPPING,
        layers: vec![
            lacking(Layer::UserNamespace),
            lacking(Layer::MountNamespace),
        ],
        readonly: wanted.readonly,
        capabilities: wanted.capabilities,
    })
}

impl Inside {
    /// Gives up all other rights for good: capabilities, new privileges, files outside of the tree, TCP, signals to others.
    ///
    /// # Errors
    /// [`TreeError`]; the process should then end.
    pub fn lock(&mut self) -> Result<Locked, TreeError> {
        let mut layers = std::mem::take(&mut self.layers);
        let mut note = |layer, state| layers.push(LayerReport { layer, state });
        if self.all_users {
            match sys::drop_groups() {
                Ok(()) => note(Layer::Identity, State::On),
                Err(errno) => note(Layer::Identity, State::Off(errno)),
            }
        }
        let have = caps::read()
            .map_err(step("reading capabilities"))?
            .main
            .permitted;
        let kept = have & self.capabilities;
        let sealed = match caps::keep(kept).map_err(step("dropping capabilities"))? {
            true => State::On,
            false => State::Partly("the bounding set cannot be reduced without CAP_SETPCAP"),
        };
        let left = caps::read().map_err(step("reading capabilities"))?.main;
        if left.permitted | left.effective != kept || left.inheritable != 0 {
            return Err(step("dropping capabilities")(Errno::EPERM));
        }
        note(Layer::Capabilities, sealed);
        no_new_privs::set().map_err(step("setting no_new_privs"))?;
        note(Layer::NoNewPrivileges, State::On);
        if !dumpable::switch_off().map_err(step("switching dumps off"))? {
            return Err(step("switching dumps off")(Errno::EPERM));
        }
        note(Layer::NotDumpable, State::On);
        let landlock = landlock::only_tree(self.tree.as_fd(), self.readonly)?;
        layers.extend(landlock.layers);
        Ok(Locked {
            layers,
            capabilities: kept,
        })
    }
}

/// The number of a capability by its name without `CAP_`, as of Linux 5.9 (include/uapi/linux/capability.h).
#[must_use]
pub fn capability(name: &str) -> Option<u32> {
    caps::by_name(&format!("CAP_{name}")).map(u32::from)
}

/// The layers that are missing or partial, for a log.
#[must_use]
pub fn describe_missing(layers: &[LayerReport]) -> Option<String> {
    let mut text = String::new();
    for layer in layers.iter().filter(|l| !l.is_on()) {
        let separator = if text.is_empty() { "" } else { "; " };
        // Writing to a string does not fail.
        let _ = write!(text, "{separator}{layer}");
    }
    (!text.is_empty()).then_some(text)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn capabilities_have_the_kernels_numbers() {
        for (name, number) in [
            ("CHOWN", 0),
            ("SETUID", 7),
            ("SYS_ADMIN", 21),
            ("MKNOD", 27),
            ("SETFCAP", 31),
        ] {
            assert_eq!(capability(name), Some(number), "{name}");
        }
        assert_eq!(capability("CHECKPOINT_RESTORE"), Some(40));
        assert_eq!(capability("CAP_CHOWN"), None);
        assert_eq!(capability("chown"), None);
    }
}
