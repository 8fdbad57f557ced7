//! Pieces of the mount tree as descriptors: open_tree(2), mount_setattr(2), move_mount(2).

use super::{check, root::descriptor};
use nix::errno::Errno;
use std::{
    ffi::{CStr, c_uint},
    os::fd::{AsRawFd, BorrowedFd, OwnedFd},
};

// include/uapi/linux/mount.h
const OPEN_TREE_CLONE: c_uint = 1;
const AT_RECURSIVE: c_uint = 0x8000;
const MOVE_MOUNT_F_EMPTY_PATH: c_uint = 4;
/// Mount attribute: ids on the file system are shown through a user namespace's map.
const MOUNT_ATTR_IDMAP: u64 = 0x0010_0000;

/// include/uapi/linux/mount.h: `struct mount_attr`, version 0 (32 bytes).
#[repr(C)]
#[derive(Default)]
struct MountAttr {
    set: u64,
    clear: u64,
    propagation: u64,
    userns: u64,
}

/// A copy of the mount at `file`, showing just that file or folder, attached nowhere.
/// Needs a `file` of the caller's own mount namespace.
pub(crate) fn clone_at(file: BorrowedFd<'_>) -> Result<OwnedFd, Errno> {
    let flags = OPEN_TREE_CLONE | libc::O_CLOEXEC as c_uint | libc::AT_EMPTY_PATH as c_uint;
    let (file, here) = (file.as_raw_fd(), c"".as_ptr());
    // SAFETY: a terminated string.
    descriptor(unsafe { libc::syscall(libc::SYS_open_tree, file, here, flags) })
}

/// A copy of the mount at `path`, attached nowhere; with `recursive`, of the mounts below it too.
pub(crate) fn clone_path(path: &CStr, recursive: bool) -> Result<OwnedFd, Errno> {
    let below = if recursive { AT_RECURSIVE } else { 0 };
    let flags = OPEN_TREE_CLONE | libc::O_CLOEXEC as c_uint | below;
    // SAFETY: a terminated string.
    descriptor(unsafe { libc::syscall(libc::SYS_open_tree, libc::AT_FDCWD, path.as_ptr(), flags) })
}

/// Adds attributes to a mount and to all below it, and cuts them off from the mounts they were copied from.
pub(crate) fn restrict_below(mount: BorrowedFd<'_>, attributes: c_uint) -> Result<(), Errno> {
    let attr = MountAttr {
        set: u64::from(attributes),
        propagation: libc::MS_PRIVATE,
        ..MountAttr::default()
    };
    let flags = libc::AT_EMPTY_PATH as c_uint | AT_RECURSIVE;
    // SAFETY: a terminated string and a structure of the size that is told.
    check(unsafe {
        libc::syscall(
            libc::SYS_mount_setattr,
            mount.as_raw_fd(),
            c"".as_ptr(),
            flags,
            &raw const attr,
            size_of::<MountAttr>(),
        )
    })
}

/// Sets attributes of an unattached mount and cuts it off from the mounts it was copied from; with
/// `users`, ids on the file system are shown through that user namespace's map.
pub(crate) fn set_attributes(
    mount: BorrowedFd<'_>,
    attributes: c_uint,
    users: Option<BorrowedFd<'_>>,
) -> Result<(), Errno> {
    let attr = MountAttr {
        set: u64::from(attributes) | if users.is_some() { MOUNT_ATTR_IDMAP } else { 0 },
        propagation: libc::MS_PRIVATE,
        userns: users.map_or(0, |fd| fd.as_raw_fd() as u64),
        ..MountAttr::default()
    };
    // SAFETY: a terminated string and a structure of the size that is told.
    check(unsafe {
        libc::syscall(
            libc::SYS_mount_setattr,
            mount.as_raw_fd(),
            c"".as_ptr(),
            libc::AT_EMPTY_PATH,
            &raw const attr,
            size_of::<MountAttr>(),
        )
    })
}

/// Attaches a mount on the file or folder `name` of `folder`; a symbolic link is not followed.
pub(crate) fn attach(
    mount: BorrowedFd<'_>,
    folder: BorrowedFd<'_>,
    name: &CStr,
) -> Result<(), Errno> {
    // SAFETY: both paths are terminated strings.
    check(unsafe {
        libc::syscall(
            libc::SYS_move_mount,
            mount.as_raw_fd(),
            c"".as_ptr(),
            folder.as_raw_fd(),
            name.as_ptr(),
            MOVE_MOUNT_F_EMPTY_PATH,
        )
    })
}
