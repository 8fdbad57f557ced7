//! The root folder of a whole VM: a folder of the host takes the place of the host's files.
//!
//! `pivot_root` instead of `chroot`: a process that is merely chrooted may not make user namespaces
//! (`current_chrooted()` in kernel/user_namespace.c), and the device processes need them.

use crate::sys::{
    process as sys,
    root::{self, MOUNT_ATTR_NODEV, MOUNT_ATTR_NOEXEC, MOUNT_ATTR_NOSUID},
    tree,
};
use nix::{
    errno::Errno,
    fcntl::{OFlag, open},
    sys::stat::Mode,
};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

/// A mount of the folder, attached nowhere. Nothing in it can be executed or is a device; the
/// programs and devices are mounts of their own.
pub(crate) fn prepare(folder: BorrowedFd<'_>) -> Result<OwnedFd, Errno> {
    let mount = tree::clone_at(folder)?;
    let attributes = MOUNT_ATTR_NOSUID | MOUNT_ATTR_NODEV | MOUNT_ATTR_NOEXEC;
    tree::set_attributes(mount.as_fd(), attributes, None)?;
    Ok(mount)
}

/// Attaches the mount over the root of this mount namespace, cut off from the host's.
pub(crate) fn attach(mount: BorrowedFd<'_>) -> Result<(), Errno> {
    root::make_private()?;
    root::move_mount_to_root(mount)
}

/// Makes the attached mount the root, and the old root unreachable.
pub(crate) fn enter(mount: BorrowedFd<'_>) -> Result<(), Errno> {
    sys::fchdir(mount)?;
    root::pivot_root_here()?;
    root::detach_here()?;
    sys::chdir_root()
}

/// A `/proc` of the caller's pid namespace, attached nowhere, with nothing but processes in it, and
/// of these only what the looking process could trace.
pub(crate) fn proc() -> Result<OwnedFd, Errno> {
    let context = root::fsopen(c"proc")?;
    for (key, value) in [(c"hidepid", c"invisible"), (c"subset", c"pid")] {
        root::fsconfig(context.as_fd(), key, Some(value))?;
    }
    root::fsconfig_create(context.as_fd())?;
    let attributes = MOUNT_ATTR_NOSUID | MOUNT_ATTR_NODEV | MOUNT_ATTR_NOEXEC;
    root::fsmount(context.as_fd(), attributes)
}

/// The host's pseudo terminals, attached nowhere: their names must mean the same outside, where
/// somebody wants to open one.
pub(crate) fn terminals() -> Result<OwnedFd, Errno> {
    let flags = OFlag::O_PATH | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC;
    let folder = open("/dev/pts", flags, Mode::empty())?;
    let mount = tree::clone_at(folder.as_fd())?;
    tree::set_attributes(mount.as_fd(), MOUNT_ATTR_NOSUID | MOUNT_ATTR_NOEXEC, None)?;
    Ok(mount)
}
