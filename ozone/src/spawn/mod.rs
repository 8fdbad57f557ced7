//! Starting a device process in its jail.
//!
//! Job: fork into new namespaces, let the child build its jail and execute the device binary with
//! exactly the descriptors it was given, and tell what the jail consists of.
//! Not trusted: the device binary. The child runs this crate's code until exec, and nothing else.
//! Why this way: `clone3` from a single-threaded process (checked, not assumed) needs no helper
//! binary and no `/bin`; the child works alone after that, so several devices start in parallel.
//! The two halves share one socket pair: the parent says that the user map is written, the child
//! says what failed, and exec closes the child's end, which is the good news.
//!
//! ```text
//! parent                                   child
//! clone3 (user, pid namespace)  -------->  mount, net, ipc, uts, cgroup namespaces
//! writes uid_map, gid_map                  empty root
//! "go"                          -------->  waits for it; bounding set, groups, gid, uid
//! (free to start the next)                 descriptors, limits, capabilities, no_new_privs
//! finish(): reads reports       <--------  death with the parent, execveat
//! ```

mod child;
mod report;

use crate::{
    layer::{Layer, LayerReport, Sandbox, State},
    steps::{fds::Placement, idmap, idmap::Identity, namespaces, rlimits::Limits, threads},
    sys::process::{self as sys, Argv, Fork},
};
use nix::{
    errno::Errno,
    sched::CpuSet,
    sys::{
        socket::{AddressFamily, MsgFlags, SockFlag, SockType, recv, send, socketpair},
        wait::{Id, WaitPidFlag, waitid},
    },
    unistd::{Pid, Uid},
};
pub use report::{Phase, Step};
use std::{
    ffi::CString,
    fmt,
    os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd},
};

/// What to start and how.
#[derive(Debug)]
pub struct DeviceLaunch<'a> {
    /// The device's name, for messages.
    pub name: &'a str,
    /// A static ELF file, opened with `O_PATH` or for reading. Whoever the process runs as must
    /// be allowed to execute it; the folders above it do not matter.
    pub binary: BorrowedFd<'a>,
    /// Arguments, the program's name first. The environment is always empty.
    pub argv: Vec<CString>,
    /// Descriptors of the new process and the numbers that they get; all others are closed there.
    /// They are closed here when [`spawn()`] returns.
    pub fds: Vec<(OwnedFd, RawFd)>,
    /// The host's user and group that the process runs as; not for one with a [tree](Self::tree).
    pub identity: Identity,
    /// The folder that the process serves, which becomes its root; without one the root is empty.
    pub tree: Option<SharedTree<'a>>,
    /// Resource limits.
    pub limits: Limits,
    /// Processors that the process, and all that it starts, runs on; `None`: the caller's.
    pub cpus: Option<CpuSet>,
    /// What to do about layers that the host cannot give.
    pub mode: Sandbox,
    /// Whether [`Child::phases`] is wanted: one time stamp per step, about 20 µs altogether.
    pub trace: bool,
}

/// A folder that becomes the root of the process that serves it.
///
/// Started by root, the process is user 0 of a user namespace in which all ids stay what they are, so that it can work with
/// the files of all users; its capabilities mean nothing outside of that namespace. Started by another user, it is user 0 of
/// a namespace in which only that user exists.
#[derive(Debug, Clone, Copy)]
pub struct SharedTree<'a> {
    /// The folder, opened with `O_PATH` or for reading. The jail is built around this very folder or not at all.
    pub folder: BorrowedFd<'a>,
    /// The tree's mounts are read-only.
    pub readonly: bool,
    /// Capabilities that the process keeps, one bit each.
    pub capabilities: u64,
    /// Number that the tree's root gets in the process.
    pub root: RawFd,
    /// Number that a `/proc` of the jail's own processes gets, or, where the host allows none, that process's folder of
    /// descriptors.
    pub processes: RawFd,
}

/// Why a device process could not be started.
#[derive(Debug, thiserror::Error)]
pub enum SpawnError {
    /// The caller has several threads, so that a fork could copy a lock that is held.
    #[error("cannot start {name}: the caller has {threads} threads instead of 1")]
    Threads {
        /// The device.
        name: String,
        /// How many there are.
        threads: u64,
    },
    /// User or group 0 was asked for, or, without privilege, somebody else.
    #[error("cannot start {name} as user {uid}, group {gid}: {rule}")]
    Identity {
        /// The device.
        name: String,
        /// The user.
        uid: u32,
        /// The group.
        gid: u32,
        /// What is allowed.
        rule: &'static str,
    },
    /// Two descriptors for one number, a negative number, or one beyond the limit.
    #[error(
        "cannot start {name}: descriptor number {target} is given twice or outside 0 to {last}"
    )]
    Target {
        /// The device.
        name: String,
        /// The number.
        target: RawFd,
        /// The highest number that the limits allow.
        last: u64,
    },
    /// The parent could not do its part.
    #[error("cannot start {name}: {what}: {source}")]
    Parent {
        /// The device.
        name: String,
        /// What was tried.
        what: &'static str,
        /// What the kernel said.
        source: Errno,
    },
    /// The child could not do a step.
    #[error("cannot start {name}: step \"{step}\" failed: {source}{}", hint(*.step, *.source))]
    Step {
        /// The device.
        name: String,
        /// The step.
        step: Step,
        /// What the kernel said.
        source: Errno,
    },
    /// The child ended without a word.
    #[error("cannot start {name}: the process ended before it executed its program")]
    Died {
        /// The device.
        name: String,
    },
    /// A layer is missing and the mode is strict.
    #[error("cannot start {name} in a strict sandbox: {}", Missing(.layers))]
    Refused {
        /// The device.
        name: String,
        /// What is missing.
        layers: Vec<LayerReport>,
    },
}

struct Missing<'a>(&'a [LayerReport]);

impl fmt::Display for Missing<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (i, layer) in self.0.iter().enumerate() {
            write!(f, "{}{layer}", if i == 0 { "" } else { "; " })?;
        }
        Ok(())
    }
}

fn hint(step: Step, errno: Errno) -> &'static str {
    match (step, errno) {
        (Step::Exec, Errno::EACCES) => {
            " (the device binary must be executable by the user that the device runs as)"
        }
        (Step::Root, Errno::ESTALE) => " (the folder was moved or replaced meanwhile)",
        (Step::Exec, Errno::ENOENT | Errno::ENOEXEC) => {
            " (the device binary must be a static ELF file: a jail has no loader)"
        }
        _ => "",
    }
}

/// A child that is building its jail. Dropping it kills the child.
#[derive(Debug)]
pub struct Pending {
    /// Always there until `finish` or drop takes it.
    inner: Option<Started>,
}

#[derive(Debug)]
struct Started {
    name: String,
    mode: Sandbox,
    /// Whether its root is a tree.
    tree: bool,
    pid: Pid,
    pidfd: OwnedFd,
    socket: OwnedFd,
    layers: Vec<LayerReport>,
    phases: Vec<Phase>,
}

/// A device process that runs its own program now.
#[derive(Debug)]
pub struct Child {
    /// Its process id, in the caller's pid namespace.
    pub pid: Pid,
    /// Readable when the process has ended; signals sent by it cannot reach another process.
    pub pidfd: OwnedFd,
    /// What its jail consists of so far: everything that is done before exec.
    pub layers: Vec<LayerReport>,
    /// When each step was done, if that was asked for.
    pub phases: Vec<Phase>,
}

/// Starts a device process and returns without waiting for it to be ready.
///
/// # Errors
/// [`SpawnError`], never `Step` or `Died`, which only [`Pending::finish`] can know. Nothing is left
/// behind after an error.
pub fn spawn(launch: DeviceLaunch<'_>) -> Result<Pending, SpawnError> {
    let start = sys::now();
    let name = launch.name;
    check_threads(name)?;
    // A privileged caller maps the child to another user; others can only let it map itself.
    let privileged = Uid::effective().is_root();
    check_identity(&launch, privileged)?;
    let (placements, tree_plan) = place(&launch)?;
    let kind = SockType::SeqPacket;
    let (ours, theirs) = socketpair(AddressFamily::Unix, kind, None, SockFlag::SOCK_CLOEXEC)
        .map_err(parents(name, "making a socket pair"))?;
    let own_pidfd = sys::own_pidfd().map_err(parents(name, "opening a pidfd of the caller"))?;

    let DeviceLaunch {
        binary,
        argv,
        fds,
        identity,
        tree,
        limits,
        cpus,
        mode,
        trace,
        ..
    } = launch;
    let mut plan = child::Plan {
        binary: binary.as_raw_fd(),
        argv: Argv::new(argv),
        placements,
        identity,
        tree: tree_plan,
        limits,
        cpus,
        strict: mode == Sandbox::Strict,
        trace,
        maps_itself: !privileged,
        report: theirs.as_raw_fd(),
        parents_end: ours.as_raw_fd(),
        parent: own_pidfd.as_raw_fd(),
        namespaces: 0,
    };
    let (pid, pidfd, refusal) = fork(&mut plan).map_err(parents(name, "clone3"))?;
    drop((theirs, own_pidfd, fds));

    let mut started = Started {
        name: name.to_owned(),
        mode,
        tree: tree.is_some(),
        pid: Pid::from_raw(pid),
        pidfd,
        socket: ours,
        layers: layers_of_clone(plan.namespaces, refusal),
        phases: Vec::new(),
    };
    if trace {
        started.note(Step::Begin, start);
        started.note(Step::Clone, sys::now());
    }
    // From here on, dropping `pending` ends the child.
    let mut pending = Pending {
        inner: Some(started),
    };
    if refusal.is_some() && mode == Sandbox::Strict {
        let layers = pending.inner.take().map(end).unwrap_or_default();
        return Err(SpawnError::Refused {
            name: name.to_owned(),
            layers,
        });
    }
    if privileged && plan.namespaces & libc::CLONE_NEWUSER != 0 {
        match tree {
            Some(_) => idmap::map_child_to(pid, &[], &[]),
            None => idmap::map_child(pid, identity),
        }
        .map_err(parents(name, "writing the child's user map"))?;
    }
    if let Some(started) = &mut pending.inner {
        send(started.socket.as_raw_fd(), &[1], MsgFlags::MSG_NOSIGNAL)
            .map_err(parents(name, "releasing the child"))?;
        if trace {
            started.note(Step::Released, sys::now());
        }
    }
    Ok(pending)
}

/// What it tells when the parent could not do its part: what was tried, and what the kernel said.
fn parents(name: &str, what: &'static str) -> impl FnOnce(Errno) -> SpawnError {
    move |source| SpawnError::Parent {
        name: name.to_owned(),
        what,
        source,
    }
}

/// This process has no other thread, so that a fork copies no lock that is held.
fn check_threads(name: &str) -> Result<(), SpawnError> {
    match threads::count().map_err(parents(name, "counting the caller's threads"))? {
        1 => Ok(()),
        threads => Err(SpawnError::Threads {
            name: name.to_owned(),
            threads,
        }),
    }
}

/// The process runs as somebody whom this one may choose.
fn check_identity(launch: &DeviceLaunch<'_>, privileged: bool) -> Result<(), SpawnError> {
    let Identity { uid, gid } = launch.identity;
    let rule = match (uid, gid) {
        _ if launch.tree.is_some() => return Ok(()),
        (0, _) | (_, 0) => "a device process must not be user 0 or group 0 of the host",
        _ if !privileged && !launch.identity.is_own() => "without privilege only the caller's own",
        _ => return Ok(()),
    };
    Err(SpawnError::Identity {
        name: launch.name.to_owned(),
        uid,
        gid,
        rule,
    })
}

/// Where each descriptor goes, those that come with a tree last, and the tree.
fn place(
    launch: &DeviceLaunch<'_>,
) -> Result<(Vec<Placement>, Option<child::TreePlan>), SpawnError> {
    let DeviceLaunch { name, limits, .. } = launch;
    let mut placements = placements(name, &launch.fds, limits)?;
    let Some(tree) = &launch.tree else {
        return Ok((placements, None));
    };
    let made = [tree.root, tree.processes];
    let taken = |target: &RawFd| placements.iter().any(|p| p.target == *target);
    if made.iter().any(taken) || made[0] == made[1] {
        return Err(SpawnError::Target {
            name: (*name).to_owned(),
            target: tree.root,
            last: limits.descriptors.saturating_sub(1),
        });
    }
    let plan = child::TreePlan::new(tree, placements.len())
        .map_err(parents(name, "finding the folder's path"))?;
    // The child fills the sources in: they exist in its namespaces only.
    placements.extend(made.map(|target| Placement { source: -1, target }));
    Ok((placements, Some(plan)))
}

/// The layers that clone3 makes, of which it made those in `made`.
fn layers_of_clone(made: libc::c_int, refusal: Option<Errno>) -> Vec<LayerReport> {
    [
        (libc::CLONE_NEWUSER, Layer::UserNamespace),
        (libc::CLONE_NEWPID, Layer::PidNamespace),
    ]
    .map(|(flag, layer)| {
        let state = match refusal {
            Some(errno) if made & flag == 0 => State::Off(errno),
            _ => State::On,
        };
        LayerReport { layer, state }
    })
    .into()
}

impl Started {
    fn note(&mut self, step: Step, at: u64) {
        self.phases.push(Phase { step, at });
    }
}

/// Kills a child, collects it, and gives the layers that are missing.
fn end(started: Started) -> Vec<LayerReport> {
    let _ = sys::kill(started.pidfd.as_fd());
    let _ = waitid(Id::PIDFd(started.pidfd.as_fd()), WaitPidFlag::WEXITED);
    started.layers.into_iter().filter(|l| !l.is_on()).collect()
}

/// Forks with the most namespaces that the host allows; the child does not return from here.
/// Gives the refusal of the best variant, if it was refused.
fn fork(plan: &mut child::Plan) -> Result<(libc::pid_t, OwnedFd, Option<Errno>), Errno> {
    let mut refusal = None;
    for namespaces in namespaces::AT_CLONE {
        plan.namespaces = namespaces;
        match sys::fork(namespaces) {
            Ok(Fork::Child) => child::run(plan),
            Ok(Fork::Parent { pid, pidfd }) => return Ok((pid, pidfd, refusal)),
            Err(errno @ (Errno::EAGAIN | Errno::ENOMEM)) => return Err(errno),
            Err(errno) => refusal = refusal.or(Some(errno)),
        }
    }
    Err(refusal.unwrap_or(Errno::EINVAL))
}

fn placements(
    name: &str,
    fds: &[(OwnedFd, RawFd)],
    limits: &Limits,
) -> Result<Vec<Placement>, SpawnError> {
    let mut list: Vec<Placement> = Vec::with_capacity(fds.len());
    for (fd, target) in fds {
        let target = *target;
        let outside = u64::try_from(target).map_or(true, |t| t >= limits.descriptors);
        if outside || list.iter().any(|p| p.target == target) {
            let last = limits.descriptors.saturating_sub(1);
            return Err(SpawnError::Target {
                name: name.to_owned(),
                target,
                last,
            });
        }
        list.push(Placement {
            source: fd.as_raw_fd(),
            target,
        });
    }
    Ok(list)
}

impl Pending {
    /// Waits until the child has executed its program, or says why it could not.
    ///
    /// # Errors
    /// [`SpawnError`]; the child is gone then.
    pub fn finish(mut self) -> Result<Child, SpawnError> {
        let Some(mut started) = self.inner.take() else {
            return Err(SpawnError::Died {
                name: String::new(),
            });
        };
        let outcome = read_reports(&mut started);
        let missing = || {
            started
                .layers
                .iter()
                .filter(|l| !l.is_on())
                .cloned()
                .collect::<Vec<_>>()
        };
        let error = match outcome {
            Ok(()) if started.mode == Sandbox::Strict && !missing().is_empty() => {
                SpawnError::Refused {
                    name: started.name.clone(),
                    layers: missing(),
                }
            }
            Ok(()) => {
                let Started {
                    pid,
                    pidfd,
                    layers,
                    phases,
                    ..
                } = started;
                return Ok(Child {
                    pid,
                    pidfd,
                    layers,
                    phases,
                });
            }
            Err(error) => error,
        };
        end(started);
        Err(error)
    }

    /// The child's process id, in the caller's pid namespace.
    #[must_use]
    pub fn pid(&self) -> Pid {
        self.inner.as_ref().map_or(Pid::from_raw(0), |s| s.pid)
    }
}

impl AsFd for Pending {
    /// Readable as soon as there is something to [`finish`](Pending::finish) with; with
    /// [`DeviceLaunch::trace`] that can be before exec, so `finish` may wait a little.
    fn as_fd(&self) -> BorrowedFd<'_> {
        match &self.inner {
            Some(started) => started.socket.as_fd(),
            None => unreachable!("only finish and drop empty it, and both consume it"),
        }
    }
}

impl Drop for Pending {
    fn drop(&mut self) {
        if let Some(started) = self.inner.take() {
            end(started);
        }
    }
}

fn read_reports(started: &mut Started) -> Result<(), SpawnError> {
    let name = || started.name.clone();
    let mut buffer = [0; report::SIZE];
    let mut given = report::Given::default();
    loop {
        let length = match recv(started.socket.as_raw_fd(), &mut buffer, MsgFlags::empty()) {
            Ok(length) => length,
            Err(Errno::EINTR) => continue,
            Err(source) => {
                let what = "reading the child's reports";
                return Err(SpawnError::Parent {
                    name: name(),
                    what,
                    source,
                });
            }
        };
        match report::Report::decode(buffer.get(..length).unwrap_or_default()) {
            // The end of the stream without `Executing` before it: the child died.
            None if !given.executing => return Err(SpawnError::Died { name: name() }),
            None => break,
            Some(report::Report::Failed(step, source)) => {
                return Err(SpawnError::Step {
                    name: name(),
                    step,
                    source,
                });
            }
            Some(report::Report::Missing(layer, errno)) => {
                given.missing.push((layer, State::Off(errno)));
            }
            Some(report::Report::Partly(layer)) => given
                .missing
                .push((layer, State::Partly(report::partly(layer)))),
            Some(report::Report::Done(step, at)) => started.phases.push(Phase { step, at }),
            Some(report::Report::Executing) => given.executing = true,
        }
    }
    if !started.phases.is_empty() {
        started.phases.push(Phase {
            step: Step::Exec,
            at: sys::now(),
        });
    }
    started
        .layers
        .extend(given.layers().into_iter().map(|mut report| {
            report.layer = match report.layer {
                Layer::EmptyRoot if started.tree => Layer::TreeRoot,
                Layer::Capabilities if started.tree => Layer::TreeCapabilities,
                other => other,
            };
            report
        }));
    Ok(())
}
