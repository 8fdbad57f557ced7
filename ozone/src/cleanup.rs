//! `-clean-resource`: removes what a VM of this name left.
//!
//! Job: remove its cgroups and its folder with everything in it; mounts are gone with the VM.
//! Not trusted: the folder's content. The VM's user may have made links, deep trees and files there.
//! Why this way: nothing left is success, so it can be run at any time and again. A VM that lives is an
//! error: its first process holds a lock on the folder, which no process id that was used again can fake.

use crate::{
    cli::Options,
    exec::{self, OURS},
    fault::Fault,
    steps::{cgroup, folder},
    sys::process as sys,
};
use nix::{errno::Errno, fcntl::OFlag, sys::stat::Mode, unistd::Uid};
use std::os::fd::AsFd;

/// Cleans up.
pub(crate) fn run(options: &Options) -> Result<(), Fault> {
    if !Uid::effective().is_root() {
        return Err(Fault::new("jail", "-clean-resource must be run by root"));
    }
    let subject = format!("-name {}", options.name.to_string_lossy());
    let failed = |what: &'static str| {
        let subject = subject.clone();
        move |e| Fault::os(subject, what, e)
    };
    let flags = OFlag::O_RDONLY | OFlag::O_DIRECTORY;
    // `None`: it is not there, which is fine.
    let open = |parent, name| match folder::open_in(parent, name, flags, Mode::empty()) {
        Ok(fd) => Ok(Some(fd)),
        Err(Errno::ENOENT) => Ok(None),
        Err(e) => Err(failed("its folder cannot be opened")(e)),
    };
    let base = exec::open_base()?;
    let Some(ours) = open(base.as_fd(), OURS)? else {
        return cgroup::remove(&options.exec_name, &options.name);
    };
    exec::check_trusted(ours.as_fd(), "/srv/zozne")?;
    if let Some(program) = open(ours.as_fd(), &options.exec_name)? {
        exec::check_trusted(program.as_fd(), "the folder above the jail's")?;
        if let Some(root) = open(program.as_fd(), &options.name)? {
            // Kept until the end: whoever wants the name meanwhile finds the folder taken.
            sys::lock_exclusively(root.as_fd()).map_err(|e| match e {
                Errno::EWOULDBLOCK => Fault::new(
                    subject.clone(),
                    "its VM is running; end that first, with SIGTERM to its ozone or by QMP",
                ),
                e => failed("its folder cannot be locked")(e),
            })?;
            cgroup::remove(&options.exec_name, &options.name)?;
            folder::empty_for_good(root.as_fd()).map_err(failed("its folder cannot be emptied"))?;
            folder::remove_folder(program.as_fd(), &options.name)
                .map_err(failed("its folder cannot be removed"))?;
        } else {
            cgroup::remove(&options.exec_name, &options.name)?;
        }
    } else {
        cgroup::remove(&options.exec_name, &options.name)?;
    }
    for (parent, name) in [(&ours, options.exec_name.as_c_str()), (&base, OURS)] {
        match folder::remove_folder(parent.as_fd(), name) {
            // Other VMs are there.
            Ok(()) | Err(Errno::ENOTEMPTY | Errno::EEXIST) => {}
            Err(e) => return Err(failed("the folder above it cannot be removed")(e)),
        }
    }
    Ok(())
}
