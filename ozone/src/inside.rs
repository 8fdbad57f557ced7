//! The inner side of the outer jail: the first process of its pid namespace, and the VM's start.
//!
//! Job: do the steps inside the namespaces, start the VM as the second process, give up all rights,
//! then pass signals on to it and reap whatever ends.
//! Not trusted: the VM. It runs as the same user, but this process is not dumpable, and the first
//! of its pid namespace cannot be signalled to death from within it. A filter leaves it the few calls
//! that passing on and reaping take.
//! Why this way: a first process that is not the VM lets the broker finish its clean-up when the
//! control process dies: the kernel kills everybody else the moment the first process ends.

use crate::{
    exec::{self, Prepared},
    fault::Fault,
    plan::{InsideStep, Plan},
    steps::{caps, cgroup, devices, idmap, namespaces, no_new_privs, outer_root, rlimits, session},
    sys::{
        process::{self as sys, Argv, Fork},
        tree,
    },
    watch::{self, Message},
};
use nix::{
    errno::Errno,
    poll::{PollFd, PollFlags, ppoll},
    sched::{CloneFlags, setns},
    sys::{
        signal::{SigSet, Signal, kill},
        signalfd::{SfdFlags, SignalFd},
        socket::{AddressFamily, SockFlag, SockType, socketpair},
    },
    unistd::{Pid, fchown},
};
use seccomp_policies::{Action, Policy};
use std::{
    ffi::CString,
    os::fd::{AsFd, AsRawFd, OwnedFd},
    time::{Duration, Instant},
};

/// How long the broker and others may take to finish after the control process has ended.
const LAST_WORK: Duration = Duration::from_secs(5);

/// Environment variables that the VM keeps.
const ENVIRONMENT: [&str; 1] = ["STRATOVIRT_LOG_LEVEL"];

/// Runs as the first process of the jail's pid namespace.
pub(crate) fn run(plan: &Plan, prepared: Prepared, parent: &OwnedFd) -> ! {
    let started = build(plan, prepared, parent);
    match started {
        Ok(first) => {
            let code = first.serve(parent);
            sys::exit_now(code)
        }
        Err(fault) => {
            watch::send_message(parent, &Message::Failed(fault.to_string()));
            sys::exit_now(1)
        }
    }
}

fn build(plan: &Plan, prepared: Prepared, parent: &OwnedFd) -> Result<First, Fault> {
    for step in &plan.inside {
        inside_step(*step, plan, &prepared)?;
    }
    let Prepared { root, kept, .. } = prepared;
    let failed = |what: &'static str| move |e| Fault::os("jail", what, e);
    let mut ended = SigSet::empty();
    ended.add(Signal::SIGCHLD);
    ended
        .thread_block()
        .map_err(failed("cannot block signals"))?;
    let children = SignalFd::with_flags(&ended, SfdFlags::SFD_CLOEXEC)
        .map_err(failed("cannot watch children"))?;
    let (ours, theirs) = socketpair(
        AddressFamily::Unix,
        SockType::Stream,
        None,
        SockFlag::SOCK_CLOEXEC,
    )
    .map_err(failed("cannot make a socket pair"))?;
    let daemon = plan.daemon;
    let vm = match sys::fork(0).map_err(failed("cannot fork"))? {
        Fork::Child => {
            drop(ours);
            let fault = become_vm(plan, &kept, &theirs);
            watch::send_message(parent, &Message::Failed(fault.to_string()));
            sys::exit_now(127)
        }
        Fork::Parent { pid, .. } => Pid::from_raw(pid),
    };
    drop((theirs, kept));
    give_up_rights(plan.user).map_err(failed("cannot give its rights up"))?;
    seccomp_policies::install(Policy::OzoneFirst, Action::Kill)
        .map_err(|e| Fault::new("jail", format!("cannot filter its first process: {e}")))?;
    // The VM may go on now; its exec, or its end, closes the stream.
    sys::tell(ours.as_raw_fd(), &[1]);
    if sys::await_byte(ours.as_raw_fd()).map_err(failed("lost the VM's process"))? {
        return Err(Fault::new("jail", "the VM's process spoke out of turn"));
    }
    watch::send_message(parent, &Message::Running);
    Ok(First {
        vm,
        children,
        daemon,
        status: None,
        detached: false,
        _lock: root,
    })
}

fn inside_step(step: InsideStep, plan: &Plan, prepared: &Prepared) -> Result<(), Fault> {
    let told = |subject: &'static str, what: &'static str| move |e| Fault::os(subject, what, e);
    let missing = || Fault::new("jail", "a step is missing from the plan");
    match step {
        InsideStep::JoinCgroups => {
            for procs in &prepared.cgroups {
                cgroup::join(procs.as_fd()).map_err(told("-cgroup", "cannot be joined"))?;
            }
        }
        InsideStep::EnterNetwork => {
            let (subject, network) = prepared.network.as_ref().ok_or_else(missing)?;
            setns(network, CloneFlags::CLONE_NEWNET).map_err(|e| match e {
                Errno::EINVAL => Fault::new(subject.clone(), "not a network namespace"),
                e => Fault::os(subject.clone(), "cannot be entered", e),
            })?;
        }
        InsideStep::OwnCgroupView => sys::unshare(libc::CLONE_NEWCGROUP)
            .map_err(told("cgroup namespace", "cannot be made"))?,
        InsideStep::AttachRoot => {
            let mount = prepared.root_mount.as_ref().ok_or_else(missing)?;
            outer_root::attach(mount.as_fd()).map_err(told("root", "cannot be attached"))?;
        }
        InsideStep::AttachFiles => {
            let root = prepared.root_mount.as_ref().ok_or_else(missing)?;
            for (item, placed) in &prepared.files {
                tree::attach(placed.mount.as_fd(), root.as_fd(), &item.name)
                    .map_err(|e| Fault::os(item.subject.clone(), "cannot be attached", e))?;
            }
        }
        InsideStep::AttachDevices => {
            let root = prepared.root_mount.as_ref().ok_or_else(missing)?;
            let nodes = prepared.devices.as_ref().ok_or_else(missing)?;
            let failed = told("/dev of the jail", "cannot be attached");
            tree::attach(nodes.as_fd(), root.as_fd(), c"dev").map_err(failed)?;
            if let Some(terminals) = &prepared.terminals {
                tree::attach(terminals.as_fd(), nodes.as_fd(), devices::PTS).map_err(failed)?;
            }
        }
        InsideStep::AttachProc => {
            let root = prepared.root_mount.as_ref().ok_or_else(missing)?;
            let mount = outer_root::proc().map_err(told("/proc of the jail", "cannot be made"))?;
            tree::attach(mount.as_fd(), root.as_fd(), c"proc")
                .map_err(told("/proc of the jail", "cannot be attached"))?;
        }
        InsideStep::GiveRoot => {
            let root = prepared.root.as_ref().ok_or_else(missing)?;
            let (uid, gid) = plan.user;
            fchown(root, Some(uid.into()), Some(gid.into()))
                .map_err(told("root", "cannot be given to the VM's user"))?;
        }
        InsideStep::EnterRoot => {
            let mount = prepared.root_mount.as_ref().ok_or_else(missing)?;
            outer_root::enter(mount.as_fd()).map_err(told("root", "cannot be entered"))?;
        }
        InsideStep::HideHostName => {
            namespaces::hide_hostname().map_err(told("host name", "cannot be set"))?;
        }
        InsideStep::LeaveSession => {
            session::leave().map_err(told("session", "cannot be left"))?;
        }
    }
    Ok(())
}

/// Becomes the VM. Returns only with the reason why not.
fn become_vm(plan: &Plan, kept: &[OwnedFd], go: &OwnedFd) -> Fault {
    match try_become_vm(plan, kept, go) {
        Ok(errno) => Fault::os(
            format!("-exec_file {}", plan.program.to_string_lossy()),
            "cannot be executed",
            errno,
        ),
        Err(fault) => fault,
    }
}

fn try_become_vm(plan: &Plan, kept: &[OwnedFd], go: &OwnedFd) -> Result<Errno, Fault> {
    let told = |what: &'static str| move |e| Fault::os("jail", what, e);
    let strings = |list: Vec<CString>| Argv::new(list);
    let environment = ENVIRONMENT
        .iter()
        .filter_map(|name| {
            let value = std::env::var_os(name)?;
            CString::new([name.as_bytes(), b"=", value.as_encoded_bytes()].concat()).ok()
        })
        .collect();
    let argv = strings(plan.argv.clone());
    let environment = strings(environment);
    if !sys::await_byte(go.as_raw_fd()).map_err(told("lost the first process"))? {
        return Err(Fault::new("jail", "the first process of the jail ended"));
    }
    rlimits::apply_to_vm().map_err(told("cannot set resource limits"))?;
    let (uid, gid) = plan.user;
    caps::grant(&plan.capabilities, || {
        idmap::become_user(uid, gid).map(drop)
    })
    .map_err(told("-capability: cannot be set"))?
    .map_err(|e| Fault::os(format!("-uid {uid} -gid {gid}"), "cannot become it", e))?;
    no_new_privs::set().map_err(told("no_new_privs"))?;
    for fd in kept {
        sys::keep_at_exec(fd.as_fd()).map_err(told("cannot pass descriptors on"))?;
    }
    sys::default_action(Signal::SIGPIPE).map_err(told("cannot reset signals"))?;
    exec::unblock_signals().map_err(told("cannot unblock signals"))?;
    let path = exec::in_root(&plan.program);
    Ok(sys::exec_path(&path, &argv, &environment))
}

/// Becomes the VM's user without any capability, out of its reach, bound to the host's side.
fn give_up_rights((uid, gid): (u32, u32)) -> Result<(), Errno> {
    caps::grant(&[], || idmap::become_user(uid, gid).map(drop))??;
    sys::set_dumpable(false)?;
    no_new_privs::set()?;
    sys::die_with_parent()
}

/// The first process, once the VM runs.
struct First {
    vm: Pid,
    children: SignalFd,
    /// The VM will go to the background.
    daemon: bool,
    /// How the VM ended.
    status: Option<i32>,
    /// It went to the background: the host's side is gone, this process stays.
    detached: bool,
    /// Held until the end, so that `-clean-resource` sees it.
    _lock: Option<OwnedFd>,
}

impl First {
    /// Passes signals on and reaps until nobody is left.
    fn serve(mut self, parent: &OwnedFd) -> i32 {
        let mut deadline: Option<Instant> = None;
        while self.reap(parent).is_ok() {
            if self.status.is_some() && !self.detached {
                deadline.get_or_insert_with(|| Instant::now() + LAST_WORK);
            }
            let timeout = match deadline.map(|d| d.saturating_duration_since(Instant::now())) {
                Some(Duration::ZERO) => break,
                Some(left) => Some(left.into()),
                None => None,
            };
            let mut fds = [
                PollFd::new(self.children.as_fd(), PollFlags::POLLIN),
                PollFd::new(parent.as_fd(), PollFlags::POLLIN),
            ];
            let watched = if self.detached { 1 } else { 2 };
            // Not poll, which a stop signal makes go on as restart_syscall, one more call for the filter to allow.
            if let Err(errno) = ppoll(&mut fds[..watched], timeout, None)
                && errno != Errno::EINTR
            {
                break;
            }
            let spoken = watched == 2 && fds[1].any().unwrap_or(true);
            if fds[0].any().unwrap_or(true) {
                let _ = self.children.read_signal();
            }
            if spoken {
                match watch::receive_message(parent) {
                    Ok(Some(Message::Signal(number))) => self.pass_on(number),
                    Ok(Some(_)) => {}
                    // The host's side was killed: so is the VM.
                    Ok(None) | Err(_) => return 1,
                }
            }
        }
        if !self.detached {
            let status = self.status.unwrap_or(1 << 8);
            watch::send_message(parent, &Message::Ended(status));
        }
        0
    }

    fn pass_on(&self, number: i32) {
        if let (Ok(signal), None) = (Signal::try_from(number), self.status) {
            // It may have ended this moment; then there is nobody to tell.
            let _ = kill(self.vm, signal);
        }
    }

    /// Takes the ends of children. `ECHILD` when there are none left.
    fn reap(&mut self, parent: &OwnedFd) -> Result<(), Errno> {
        while let Some((pid, status)) = sys::reap()? {
            if pid != self.vm.as_raw() {
                continue;
            }
            self.status = Some(status);
            if self.daemon && status == 0 {
                sys::outlive_parent()?;
                self.detached = true;
                watch::send_message(parent, &Message::Ended(status));
            }
        }
        Ok(())
    }
}
