//! The root folder: an empty, read-only tmpfs takes the place of the host's files.
//!
//! The new mount is attached over the old root, the process steps into it, and `pivot_root(".",
//! ".")` swaps the two, so that no folder is needed for the old one; then the old one is detached.

use crate::sys::{
    process as sys,
    root::{self, MOUNT_ATTR_NODEV, MOUNT_ATTR_NOEXEC, MOUNT_ATTR_NOSUID, MOUNT_ATTR_RDONLY},
};
use nix::{
    dir::Dir,
    errno::Errno,
    fcntl::OFlag,
    sys::{
        stat::Mode,
        statfs::statfs,
        statvfs::{FsFlags, statvfs},
    },
};
use std::os::fd::AsFd;

/// Empties the root. With `shared_with_host`, that is without an own user namespace, the mounts
/// must be cut off from the host's first, or the host's would be changed too.
pub(crate) fn empty(shared_with_host: bool) -> Result<(), Errno> {
    if shared_with_host {
        root::make_private()?;
    }
    let context = root::fsopen(c"tmpfs")?;
    let settings = [
        (c"size", Some(c"4k")),
        (c"nr_inodes", Some(c"1")),
        (c"mode", Some(c"0555")),
        (c"ro", None),
    ];
    for (key, value) in settings {
        root::fsconfig(context.as_fd(), key, value)?;
    }
    root::fsconfig_create(context.as_fd())?;
    let attributes = MOUNT_ATTR_RDONLY | MOUNT_ATTR_NOSUID | MOUNT_ATTR_NODEV | MOUNT_ATTR_NOEXEC;
    let mount = root::fsmount(context.as_fd(), attributes)?;
    root::move_mount_to_root(mount.as_fd())?;
    sys::fchdir(mount.as_fd())?;
    root::pivot_root_here()?;
    root::detach_here()?;
    sys::chdir_root()
}

/// A `/proc` of this pid namespace, attached nowhere, which has its processes and nothing else of the kernel's.
pub(crate) fn processes() -> Result<std::os::fd::OwnedFd, Errno> {
    let context = root::fsopen(c"proc")?;
    root::fsconfig(context.as_fd(), c"subset", Some(c"pid"))?;
    root::fsconfig_create(context.as_fd())?;
    let attributes = MOUNT_ATTR_RDONLY | MOUNT_ATTR_NOSUID | MOUNT_ATTR_NODEV | MOUNT_ATTR_NOEXEC;
    root::fsmount(context.as_fd(), attributes)
}

/// Makes the tree at `path` the root: a copy of its mounts, in which no file is a device, a program or gives rights, and with
/// `readonly` nothing can be written. Returns the new root.
pub(crate) fn shared_tree(
    path: &std::ffi::CStr,
    readonly: bool,
    shared_with_host: bool,
) -> Result<std::os::fd::OwnedFd, Errno> {
    if shared_with_host {
        root::make_private()?;
    }
    let tree = crate::sys::tree::clone_path(path, true)?;
    let mut attributes = MOUNT_ATTR_NOSUID | MOUNT_ATTR_NODEV | MOUNT_ATTR_NOEXEC;
    if readonly {
        attributes |= MOUNT_ATTR_RDONLY;
    }
    crate::sys::tree::restrict_below(tree.as_fd(), attributes)?;
    root::move_mount_to_root(tree.as_fd())?;
    sys::fchdir(tree.as_fd())?;
    root::pivot_root_here()?;
    root::detach_here()?;
    sys::chdir_root()?;
    Ok(tree)
}

/// Why the root is not one of [`shared_tree()`].
pub(crate) fn tree_fault(readonly: bool) -> Result<Option<&'static str>, Errno> {
    let flags = statvfs("/")?.flags();
    if !flags.contains(FsFlags::ST_NOSUID | FsFlags::ST_NODEV | FsFlags::ST_NOEXEC) {
        return Ok(Some("the root is not nosuid, nodev, noexec"));
    }
    if readonly && !flags.contains(FsFlags::ST_RDONLY) {
        return Ok(Some("the root is not read-only"));
    }
    Ok(None)
}

/// Why the root is not the empty one of [`empty()`].
pub(crate) fn fault() -> Result<Option<&'static str>, Errno> {
    const TMPFS: i64 = 0x0102_1994; // include/uapi/linux/magic.h
    if statfs("/")?.filesystem_type().0 as i64 != TMPFS {
        return Ok(Some("the root is not a tmpfs"));
    }
    let flags = statvfs("/")?.flags();
    let wanted = FsFlags::ST_RDONLY | FsFlags::ST_NOSUID | FsFlags::ST_NODEV | FsFlags::ST_NOEXEC;
    if !flags.contains(wanted) {
        return Ok(Some("the root is not read-only, nosuid, nodev, noexec"));
    }
    let mut folder = Dir::open("/", OFlag::O_DIRECTORY | OFlag::O_CLOEXEC, Mode::empty())?;
    for entry in folder.iter() {
        if !matches!(entry?.file_name().to_bytes(), b"." | b"..") {
            return Ok(Some("the root is not empty"));
        }
    }
    Ok(None)
}
