//! Runs a plan: builds the outer jail, starts the VM in it, and stays as its parent.
//!
//! Job: do the steps on the host's side, fork into the new namespaces, hear what became of the rest,
//! and then only pass signals and the end on.
//! Not trusted: the VM, from its exec on; it never gets a descriptor of this process. Folders that
//! exist already are used only if root alone can change them.
//! Why this way: everything that is made goes on the [`Undo`] list at once, so one error path removes
//! it all, whichever step fails. The folder is given to the VM's user last of all, so that nobody but
//! root can change it while it is filled and mounted on. Mounts are made unattached before the fork and attached after it,
//! so none of them is ever seen on the host.
//!
//! ```text
//! host's side            first process of the pid namespace        the VM
//! opens, checks, makes
//! clone3  ------------>  cgroups, network, mounts, pivot_root
//!                        fork  ---------------------------------->  (waits)
//!                        no user 0, no capability  -------------->  limits, user, capabilities
//! "running"  <---------  <--------------------- stream's end -----  execve
//! no capability left     passes signals on, reaps
//! ends as the VM ended <-  status
//! ```

use crate::{
    fault::{Fault, TRIES},
    inside,
    plan::{HostStep, Item, Plan},
    steps::{cgroup, devices, folder, outer_root, place},
    sys::process::{self as sys, Fork},
    watch,
};
use nix::{
    errno::Errno,
    fcntl::{OFlag, open},
    sys::{
        signal::{SigSet, SigmaskHow},
        socket::{AddressFamily, SockFlag, SockType, socketpair},
        stat::Mode,
    },
    unistd::{Uid, UnlinkatFlags, unlinkat},
};
use std::{
    ffi::{CStr, CString},
    os::{
        fd::{AsFd, BorrowedFd, OwnedFd, RawFd},
        unix::ffi::OsStrExt,
    },
    path::Path,
};

/// Where all jails are. Its own folders are made when the first VM needs them.
const BASE: &str = "/srv";
/// The folder of this launcher in it.
pub(crate) const OURS: &CStr = c"zozne";

/// Everything that the host's side has opened and made for the inside.
pub(crate) struct Prepared {
    /// The jail's root folder, locked as long as the VM's first process lives.
    pub(crate) root: Option<OwnedFd>,
    /// Files with their names in the jail.
    pub(crate) files: Vec<(Item, place::Placed)>,
    /// Device nodes.
    pub(crate) devices: Option<OwnedFd>,
    /// The host's pseudo terminals, if they are needed.
    pub(crate) terminals: Option<OwnedFd>,
    /// A mount of the root folder.
    pub(crate) root_mount: Option<OwnedFd>,
    /// Cgroups to join.
    pub(crate) cgroups: Vec<OwnedFd>,
    /// Network namespace to enter, with the argument that names it.
    pub(crate) network: Option<(String, OwnedFd)>,
    /// Inherited descriptors that the VM keeps.
    pub(crate) kept: Vec<OwnedFd>,
}

/// What to remove again, last first, unless the VM runs.
#[derive(Default)]
struct Undo {
    entries: Vec<Made>,
}

/// A folder that was made: of the host's, of a cgroup hierarchy's, or the jail's own.
struct Made {
    parent: OwnedFd,
    name: CString,
    /// The jail's own, which goes with all that is in it: it may be the VM's user's already.
    content: Option<OwnedFd>,
}

impl Undo {
    fn add(&mut self, parent: BorrowedFd<'_>, name: &CStr) -> Result<(), Errno> {
        self.add_with(parent, name, None)
    }

    /// Folders with the parents' descriptors, outermost first.
    fn take(&mut self, folders: Vec<(OwnedFd, CString)>) {
        self.entries
            .extend(folders.into_iter().map(|(parent, name)| Made {
                parent,
                name,
                content: None,
            }));
    }

    fn add_with(
        &mut self,
        parent: BorrowedFd<'_>,
        name: &CStr,
        content: Option<BorrowedFd<'_>>,
    ) -> Result<(), Errno> {
        let made = parent.try_clone_to_owned().and_then(|parent| {
            let content = content.map(|fd| fd.try_clone_to_owned()).transpose()?;
            Ok(Made {
                parent,
                name: name.to_owned(),
                content,
            })
        });
        // Out of descriptors, it is removed at once: what is not on the list stays for ever.
        let made = made.map_err(|_| {
            let _ = unlinkat(parent, name, UnlinkatFlags::RemoveDir);
            Errno::EMFILE
        })?;
        self.entries.push(made);
        Ok(())
    }

    /// The VM runs: what was made stays.
    fn keep(mut self) {
        self.entries.clear();
    }
}

impl Drop for Undo {
    fn drop(&mut self) {
        for made in self.entries.drain(..).rev() {
            let name = made.name.to_string_lossy();
            if let Some(content) = &made.content
                && let Err(e) = folder::empty_for_good(content.as_fd())
            {
                eprintln!("ozone: {name}: cannot be emptied: {}", e.desc());
            }
            // A folder that others use too by now is not empty, and stays.
            match folder::remove_folder(made.parent.as_fd(), &made.name) {
                Ok(()) | Err(Errno::ENOTEMPTY | Errno::EEXIST | Errno::EBUSY) => {}
                Err(e) => eprintln!("ozone: {name}: cannot be removed: {}", e.desc()),
            }
        }
    }
}

/// Runs the plan until the VM has ended; gives its exit status.
pub(crate) fn run(plan: &Plan) -> Result<u8, Fault> {
    let kept = take_descriptors(&plan.descriptors)?;
    if !Uid::effective().is_root() {
        return Err(Fault::new(
            "jail",
            "ozone must be started by root: it makes namespaces and device nodes",
        ));
    }
    // From here on a signal waits until there is a VM to pass it on to: a half-made jail would stay.
    let signals = watch::signals();
    signals
        .thread_block()
        .map_err(|e| Fault::os("jail", "cannot block signals", e))?;
    sys::set_umask(0o022);

    let mut undo = Undo::default();
    let mut prepared = Prepared {
        root: None,
        files: Vec::new(),
        devices: None,
        terminals: None,
        root_mount: None,
        cgroups: Vec::new(),
        network: None,
        kept,
    };
    for step in &plan.host {
        host_step(step, plan, &mut prepared, &mut undo)?;
    }
    let failed = |what: &'static str| move |e| Fault::os("jail", what, e);
    let (ours, theirs) = socketpair(
        AddressFamily::Unix,
        SockType::SeqPacket,
        None,
        SockFlag::SOCK_CLOEXEC,
    )
    .map_err(failed("cannot make a socket pair"))?;
    let namespaces =
        libc::CLONE_NEWNS | libc::CLONE_NEWPID | libc::CLONE_NEWIPC | libc::CLONE_NEWUTS;
    let pidfd = match sys::fork(namespaces).map_err(failed("cannot make namespaces (clone3)"))? {
        Fork::Child => {
            drop(ours);
            // Removing things is the parent's; its folders have no place here.
            undo.keep();
            // Ends the process: nothing of the parent's lists is dropped there.
            inside::run(plan, prepared, &theirs)
        }
        Fork::Parent { pidfd, .. } => pidfd,
    };
    drop((theirs, prepared));
    let status = watch::start(&pidfd, &ours).and_then(|()| {
        undo.keep();
        watch::until_end(&pidfd, &ours, &signals, plan.daemon)
    })?;
    Ok(watch::end_like(status))
}

/// Keeps the descriptors that the command line names, and closes all other inherited ones.
fn take_descriptors(numbers: &[RawFd]) -> Result<Vec<OwnedFd>, Fault> {
    let mut kept = Vec::with_capacity(numbers.len());
    let mut next = 3u32;
    let failed = |e| Fault::os("jail", "cannot close inherited descriptors", e);
    for &number in numbers {
        let fd = sys::adopt(number).ok_or_else(|| {
            Fault::new(
                format!("fd={number}"),
                "the command line names it, but ozone was started without such a descriptor",
            )
        })?;
        kept.push(fd);
        let number = number.unsigned_abs();
        if next < number {
            sys::close_inherited(next, number - 1).map_err(failed)?;
        }
        next = number + 1;
    }
    sys::close_inherited(next, u32::MAX).map_err(failed)?;
    Ok(kept)
}

fn host_step(
    step: &HostStep,
    plan: &Plan,
    prepared: &mut Prepared,
    undo: &mut Undo,
) -> Result<(), Fault> {
    match step {
        HostStep::OpenNetwork(path) => {
            let flags = OFlag::O_RDONLY | OFlag::O_CLOEXEC;
            let subject = format!("-netns {}", path.display());
            let fd = open(path, flags, Mode::empty())
                .map_err(|e| Fault::os(subject.clone(), "cannot be opened", e))?;
            prepared.network = Some((subject, fd));
        }
        HostStep::Prepare(item) => {
            let last = item.candidates.len().saturating_sub(1);
            for (n, path) in item.candidates.iter().enumerate() {
                let may_be_missing = item.optional || n < last;
                let placed =
                    place::prepare(&item.subject, path, item.access, plan.user, may_be_missing)?;
                if let Some(placed) = placed {
                    prepared.files.push((item.clone(), placed));
                    break;
                }
            }
        }
        HostStep::PrepareDevices(list) => {
            let (uid, gid) = plan.user;
            let failed = |what: &'static str| move |e| Fault::os("/dev of the jail", what, e);
            prepared.devices =
                Some(devices::make(list, uid, gid).map_err(failed("cannot be made"))?);
            if list.contains(&devices::Device::Ptmx) {
                let terminals = outer_root::terminals();
                prepared.terminals = Some(terminals.map_err(failed("has no terminals"))?);
            }
        }
        HostStep::MakeFolder => make_folder(plan, prepared, undo)?,
        HostStep::MakeMountPoints => {
            let path = host_path(plan);
            let failed = |what: &'static str| {
                let path = path.clone();
                move |e| Fault::os(path, what, e)
            };
            let Some(root) = &prepared.root else {
                return Err(Fault::new(path, "is not made yet"));
            };
            let files = prepared.files.iter();
            let names = files
                .map(|(item, placed)| (item.name.as_c_str(), placed.folder))
                .chain([(c"dev", true), (c"proc", true)]);
            for (name, is_folder) in names {
                let kind = if is_folder {
                    let mode = Mode::from_bits_truncate(0o700);
                    folder::make(root.as_fd(), name, mode).map(drop)
                } else {
                    folder::make_file(root.as_fd(), name)
                };
                kind.map_err(failed("cannot be filled"))?;
            }
        }
        HostStep::MakeCgroups(wanted) => {
            let mut made = Vec::new();
            let outcome = cgroup::make(wanted, &plan.program, &plan.name, &mut made);
            for group in made {
                undo.take(group.folders);
                prepared.cgroups.push(group.procs);
            }
            outcome?;
        }
    }
    Ok(())
}

fn host_path(plan: &Plan) -> String {
    format!(
        "{BASE}/{}/{}/{}",
        OURS.to_string_lossy(),
        plan.program.to_string_lossy(),
        plan.name.to_string_lossy()
    )
}

/// Opens [`BASE`], which root alone may change.
pub(crate) fn open_base() -> Result<OwnedFd, Fault> {
    let base = folder::open_absolute(Path::new(BASE)).map_err(|e| match e {
        Errno::ELOOP => Fault::new(BASE, "is a symbolic link; it must be a folder"),
        e => Fault::os(BASE, "cannot be opened", e),
    })?;
    check_trusted(base.as_fd(), BASE)?;
    Ok(base)
}

/// Refuses a folder that others than root could change.
pub(crate) fn check_trusted(fd: BorrowedFd<'_>, path: &str) -> Result<(), Fault> {
    match folder::is_trusted(fd) {
        Ok(true) => Ok(()),
        Ok(false) => Err(Fault::new(
            path,
            "must belong to root and be writable by root only",
        )),
        Err(e) => Err(Fault::os(path, "cannot be looked at", e)),
    }
}

/// Opens the folder that the jail's own is made in, and makes that one.
fn make_root(plan: &Plan, undo: &mut Undo) -> Result<OwnedFd, Fault> {
    let mut path = BASE.to_owned();
    let mut parent = open_base()?;
    for name in [OURS, &plan.program] {
        path = format!("{path}/{}", name.to_string_lossy());
        let (inner, new) = folder::ensure(parent.as_fd(), name).map_err(|e| match e {
            Errno::ELOOP | Errno::ENOTDIR => Fault::new(path.clone(), "exists and is not a folder"),
            e => Fault::os(path.clone(), "cannot be made", e),
        })?;
        if new {
            undo.add(parent.as_fd(), name)
                .map_err(|e| Fault::os(path.clone(), "cannot be made", e))?;
        }
        check_trusted(inner.as_fd(), &path)?;
        parent = inner;
    }
    path = host_path(plan);
    let mode = Mode::from_bits_truncate(0o700);
    let root = folder::make(parent.as_fd(), &plan.name, mode).map_err(|e| match e {
        Errno::EEXIST => Fault::new(
            format!("-name {}", plan.name.to_string_lossy()),
            format!(
                "{path} exists already: the name is in use, or what an ended VM left is still \
                 there; see -clean-resource"
            ),
        ),
        e => Fault::os(path.clone(), "cannot be made", e),
    })?;
    undo.add_with(parent.as_fd(), &plan.name, Some(root.as_fd()))
        .map_err(|e| Fault::os(path, "cannot be made", e))?;
    Ok(root)
}

fn make_folder(plan: &Plan, prepared: &mut Prepared, undo: &mut Undo) -> Result<(), Fault> {
    let mut tries = 1;
    let root = loop {
        match make_root(plan, undo) {
            Err(fault) if fault.is_vanished() && tries < TRIES => tries += 1,
            other => break other?,
        }
    };
    let path = host_path(plan);
    let failed = |what: &'static str| {
        let path = path.clone();
        move |e| Fault::os(path, what, e)
    };
    // Held by the VM's first process, so that cleaning up can tell whether it lives.
    sys::lock_exclusively(root.as_fd()).map_err(failed("cannot be locked"))?;
    prepared.root_mount =
        Some(outer_root::prepare(root.as_fd()).map_err(failed("cannot be mounted"))?);
    prepared.root = Some(root);
    Ok(())
}

/// Unblocks every signal, for a program that is executed next.
pub(crate) fn unblock_signals() -> Result<(), Errno> {
    SigSet::all()
        .thread_swap_mask(SigmaskHow::SIG_UNBLOCK)
        .map(drop)
}

/// A path of one component, from the root.
pub(crate) fn in_root(name: &CStr) -> CString {
    let mut path = b"/".to_vec();
    path.extend(std::ffi::OsStr::from_bytes(name.to_bytes()).as_bytes());
    CString::new(path).unwrap_or_default()
}
