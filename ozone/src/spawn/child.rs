//! The child's half: from the fork to the exec, in order.
//!
//! Runs on a copy of the parent's memory and must leave nothing to chance: no allocation, no lock,
//! no panic. Every step ends in one of three ways: done; not possible here, which is reported and,
//! unless the mode is strict, tolerated; failed, which is reported and ends the child.

use super::report::{Report, Step};
use crate::{
    layer::Layer,
    steps::{
        caps,
        fds::{self, Kept, Placement},
        idmap::{self, Groups, Identity},
        namespaces, no_new_privs, parent_death, rlimits, root,
    },
    sys::process::{self as sys, Argv},
};
use nix::{errno::Errno, sys::signal::SigSet};
use std::{ffi::c_int, os::fd::RawFd};

/// Everything that the child needs, made before the fork.
pub(super) struct Plan {
    pub(super) binary: RawFd,
    pub(super) argv: Argv,
    pub(super) placements: Vec<Placement>,
    pub(super) identity: Identity,
    pub(super) limits: rlimits::Limits,
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
    done(plan, Step::Entered);

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
        idmap::map_self(plan.identity).map_err(at(Step::UserMap))?;
        done(plan, Step::UserMap);
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

    caps::clear().map_err(at(Step::Capabilities))?;
    done(plan, Step::Capabilities);
    no_new_privs::set().map_err(at(Step::NoNewPrivileges))?;
    done(plan, Step::NoNewPrivileges);
    parent_death::follow(kept.parent).map_err(at(Step::ParentDeath))?;
    done(plan, Step::ParentDeath);
    Ok(kept)
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
