//! The child's half: from the fork to the exec, in order.
//!
//! Runs on a copy of the parent's memory and must leave nothing to chance: no allocation, no lock,
//! no panic. Every step ends in one of three ways: done; not possible here, which is reported and,
//! unless the mode is strict, tolerated; failed, which is reported and ends the child.

use super::SharedTree;
use super::report::{Report, Step};
use crate::{
    layer::Layer,
    steps::{
        caps,
        fds::{self, Kept, Placement},
        idmap::{self, Groups, Identity},
        namespaces, no_new_privs, parent_death, rlimits, root, session,
    },
    sys::{
        process::{self as sys, Argv},
        tree::clone_path,
    },
};
use nix::{
    errno::Errno,
    fcntl::OFlag,
    sched::{CpuSet, sched_setaffinity},
    sys::{
        signal::SigSet,
        stat::{Mode, fstat},
    },
    unistd::Pid,
};
use std::{
    ffi::{CString, c_int},
    os::{
        fd::{AsFd, AsRawFd, BorrowedFd, IntoRawFd, OwnedFd, RawFd},
        unix::ffi::OsStringExt,
    },
};

/// Everything that the child needs, made before the fork.
pub(super) struct Plan {
    pub(super) binary: RawFd,
    pub(super) argv: Argv,
    pub(super) placements: Vec<Placement>,
    pub(super) identity: Identity,
    /// The folder that becomes the root.
    pub(super) tree: Option<TreePlan>,
    pub(super) limits: rlimits::Limits,
    pub(super) cpus: Option<CpuSet>,
    pub(super) strict: bool,
    pub(super) trace: bool,
    /// Whether the child writes its own user map.
    pub(super) maps_itself: bool,
    /// The child's end of the socket pair.
    pub(super) report: RawFd,
    /// The parent's end, which the fork copied.
    pub(super) parents_end: RawFd,
    /// A pidfd of the parent.
    pub(super) parent: RawFd,
    /// The namespaces that clone3 made.
    pub(super) namespaces: c_int,
}

/// A folder that becomes the root.
pub(super) struct TreePlan {
    /// Its path, for the copy of its mount.
    path: CString,
    /// Device and inode, which what is found at the path is held against.
    identity: (u64, u64),
    readonly: bool,
    /// What the process keeps, by number.
    capabilities: Vec<u8>,
    /// Where in the placements its root is, followed by the jail's processes.
    placement: usize,
}

impl TreePlan {
    pub(super) fn new(tree: &SharedTree<'_>, placement: usize) -> Result<Self, Errno> {
        let link = format!("/proc/self/fd/{}", tree.folder.as_raw_fd());
        let path = nix::fcntl::readlink(link.as_str())?;
        Ok(Self {
            path: CString::new(path.into_vec()).map_err(|_| Errno::EINVAL)?,
            identity: identity(tree.folder)?,
            readonly: tree.readonly,
            capabilities: (0..64)
                .filter(|c| tree.capabilities & 1 << c != 0)
                .collect(),
            placement,
        })
    }

    /// Makes the folder the root. Returns the new root and the jail's processes, or this process's folder of descriptors.
    fn enter(&self, shared_with_host: bool, own_pids: bool) -> Result<[OwnedFd; 2], Errno> {
        // Hosts refuse it when parts of their own are hidden, as in a container.
        let made = own_pids.then(root::processes).and_then(Result::ok);
        let own_fds = match made {
            Some(made) => made,
            None => match clone_path(c"/proc/self/fd", false) {
                Err(Errno::EPERM | Errno::EINVAL | Errno::ENOSYS) => nix::fcntl::open(
                    c"/proc/self/fd",
                    OFlag::O_PATH | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC,
                    Mode::empty(),
                )?,
                other => other?,
            },
        };
        let root = root::shared_tree(&self.path, self.readonly, shared_with_host)?;
        if identity(root.as_fd())? != self.identity {
            return Err(Errno::ESTALE);
        }
        Ok([root, own_fds])
    }
}

fn identity(folder: BorrowedFd<'_>) -> Result<(u64, u64), Errno> {
    fstat(folder).map(|stat| (stat.st_dev, stat.st_ino))
}

/// Builds the jail and executes the program.
pub(super) fn run(plan: &mut Plan) -> ! {
    let (step, errno) = build(plan);
    sys::tell(plan.report, &Report::Failed(step, errno).encode());
    sys::exit_now(127)
}

/// Returns only with the step that failed.
fn build(plan: &mut Plan) -> (Step, Errno) {
    match try_build(plan) {
        Err(failure) => failure,
        Ok(kept) => {
            plan.report = kept.report;
            sys::tell(kept.report, &Report::Executing.encode());
            (Step::Exec, sys::exec(kept.binary, &plan.argv))
        }
    }
}

fn try_build(plan: &mut Plan) -> Result<Kept, (Step, Errno)> {
    let at = |step| move |errno| (step, errno);
    // Else this copy would keep the stream open after the parent's death.
    sys::close_copy(plan.parents_end);
    SigSet::empty()
        .thread_set_mask()
        .map_err(at(Step::Entered))?;
    if let Some(cpus) = &plan.cpus {
        // Here and not later: what is below the exec inherits it, the kernel's workers for it included.
        sched_setaffinity(Pid::from_raw(0), cpus).map_err(at(Step::Affinity))?;
        done(plan, Step::Affinity);
    }
    done(plan, Step::Entered);

    session::leave_terminal().map_err(at(Step::Session))?;
    match session::leave_keys() {
        // Keys are counted by user, and the new session's ring is one.
        Err(Errno::EDQUOT) => tolerate(
            plan,
            Report::Partly(Layer::Session),
            (Step::Session, Errno::EDQUOT),
        )?,
        other => other.map_err(at(Step::Session))?,
    }
    done(plan, Step::Session);

    let own_users = plan.namespaces & libc::CLONE_NEWUSER != 0;
    let (strict, report) = (plan.strict, plan.report);
    let mut refused = None;
    let entered = namespaces::enter(|layer, errno| {
        refused = refused.or(Some(errno));
        sys::tell(report, &Report::Missing(layer, errno).encode());
    });
    if let Some(errno) = refused.filter(|_| strict) {
        return Err((Step::Namespaces, errno));
    }
    // Without an own user namespace this would be the host's limit.
    if own_users {
        namespaces::forbid_nested_users();
    }
    // Without an own uts namespace this would rename the host.
    if entered & libc::CLONE_NEWUTS != 0 && namespaces::hide_hostname().is_err() {
        tolerate(
            plan,
            Report::Partly(Layer::UtsNamespace),
            at(Step::Namespaces)(Errno::EPERM),
        )?;
    }
    done(plan, Step::Namespaces);

    if plan.maps_itself && own_users {
        match plan.tree {
            Some(_) => idmap::map_self_to_root(plan.identity),
            None => idmap::map_self(plan.identity),
        }
        .map_err(at(Step::UserMap))?;
        done(plan, Step::UserMap);
    }
    if plan.tree.is_some() {
        enter_tree(plan, own_users, entered)?;
        return finish(plan);
    }

    // Without an own mount namespace this would take the host's files away from the host.
    if entered & libc::CLONE_NEWNS != 0 {
        if let Err(errno) = root::empty(!own_users) {
            tolerate(
                plan,
                Report::Missing(Layer::EmptyRoot, errno),
                (Step::Root, errno),
            )?;
        }
    } else {
        let missing = Report::Missing(Layer::EmptyRoot, Errno::EPERM);
        tolerate(plan, missing, (Step::Root, Errno::EPERM))?;
    }
    done(plan, Step::Root);

    // The parent's word: the map is written. The stream's end instead: the parent is dead.
    if !sys::await_byte(plan.report).map_err(at(Step::Handshake))? {
        return Err((Step::Handshake, Errno::ESRCH));
    }
    done(plan, Step::Handshake);

    if let Err(errno) = caps::seal() {
        tolerate(
            plan,
            Report::Partly(Layer::Capabilities),
            (Step::Capabilities, errno),
        )?;
    }
    let Identity { uid, gid } = plan.identity;
    let (uid, gid) = if own_users {
        (idmap::INSIDE, idmap::INSIDE)
    } else {
        (uid, gid)
    };
    if idmap::become_user(uid, gid).map_err(at(Step::Identity))? == Groups::Kept {
        tolerate(
            plan,
            Report::Partly(Layer::Identity),
            (Step::Identity, Errno::EPERM),
        )?;
    }
    done(plan, Step::Identity);

    caps::clear().map_err(at(Step::Capabilities))?;
    done(plan, Step::Capabilities);
    finish(plan)
}

/// What every process has in common after its root and its user.
fn finish(plan: &mut Plan) -> Result<Kept, (Step, Errno)> {
    let at = |step| move |errno| (step, errno);
    let kept = Kept {
        binary: plan.binary,
        report: plan.report,
        parent: plan.parent,
    };
    let kept = fds::place(&mut plan.placements, kept).map_err(at(Step::Descriptors))?;
    plan.report = kept.report;
    done(plan, Step::Descriptors);

    rlimits::apply(&plan.limits).map_err(at(Step::Limits))?;
    done(plan, Step::Limits);

    no_new_privs::set().map_err(at(Step::NoNewPrivileges))?;
    done(plan, Step::NoNewPrivileges);
    parent_death::follow(kept.parent).map_err(at(Step::ParentDeath))?;
    done(plan, Step::ParentDeath);
    Ok(kept)
}

/// Root, user and capabilities of a process that serves a tree. The folder may belong to anybody and be closed to others, so
/// the parent's half of the user map comes first.
fn enter_tree(plan: &mut Plan, own_users: bool, entered: c_int) -> Result<(), (Step, Errno)> {
    let at = |step| move |errno| (step, errno);
    if !sys::await_byte(plan.report).map_err(at(Step::Handshake))? {
        return Err((Step::Handshake, Errno::ESRCH));
    }
    done(plan, Step::Handshake);
    let Some(tree) = &plan.tree else {
        return Ok(());
    };
    if entered & libc::CLONE_NEWNS == 0 {
        return Err((Step::Root, Errno::EPERM));
    }
    let own_pids = own_users && plan.namespaces & libc::CLONE_NEWPID != 0;
    let made = tree.enter(!own_users, own_pids).map_err(at(Step::Root))?;
    let wanted = plan.placements.iter_mut().skip(tree.placement);
    for (placement, made) in wanted.zip(made) {
        // Closed by exec, like every other source.
        placement.source = made.into_raw_fd();
    }
    done(plan, Step::Root);
    let mut groups = Groups::Kept;
    let drop_groups = || {
        groups = idmap::leave_groups()?;
        sys::set_umask(0);
        Ok::<(), Errno>(())
    };
    caps::grant(&tree.capabilities, drop_groups)
        .map_err(at(Step::Capabilities))?
        .map_err(at(Step::Identity))?;
    if groups == Groups::Kept {
        tolerate(
            plan,
            Report::Partly(Layer::Identity),
            (Step::Identity, Errno::EPERM),
        )?;
    }
    done(plan, Step::Identity);
    done(plan, Step::Capabilities);
    Ok(())
}

/// Reports what is not possible here; in strict mode that is the end.
fn tolerate(plan: &Plan, report: Report, failure: (Step, Errno)) -> Result<(), (Step, Errno)> {
    if plan.strict {
        return Err(failure);
    }
    sys::tell(plan.report, &report.encode());
    Ok(())
}

fn done(plan: &Plan, step: Step) {
    if plan.trace {
        sys::tell(plan.report, &Report::Done(step, sys::now()).encode());
    }
}
