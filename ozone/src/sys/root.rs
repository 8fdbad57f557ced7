//! The mount calls behind an empty root: fsopen(2), fsconfig(2), fsmount(2), move_mount(2),
//! pivot_root(2).

use super::check;
use nix::errno::Errno;
use std::{
    ffi::{CStr, c_long, c_uint},
    os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd},
    ptr,
};

// include/uapi/linux/mount.h
const FSOPEN_CLOEXEC: c_uint = 1;
const FSMOUNT_CLOEXEC: c_uint = 1;
const FSCONFIG_SET_FLAG: c_uint = 0;
const FSCONFIG_SET_STRING: c_uint = 1;
const FSCONFIG_CMD_CREATE: c_uint = 6;
const MOVE_MOUNT_F_EMPTY_PATH: c_uint = 4;
/// Mount attribute: read-only.
pub(crate) const MOUNT_ATTR_RDONLY: c_uint = 1;
/// Mount attribute: set-user-id bits have no effect.
pub(crate) const MOUNT_ATTR_NOSUID: c_uint = 2;
/// Mount attribute: device nodes cannot be opened.
pub(crate) const MOUNT_ATTR_NODEV: c_uint = 4;
/// Mount attribute: nothing can be executed.
pub(crate) const MOUNT_ATTR_NOEXEC: c_uint = 8;

pub(super) fn descriptor(result: c_long) -> Result<OwnedFd, Errno> {
    let number = Errno::result(result)?;
    // SAFETY: the kernel just made this descriptor for us; nobody else knows it.
    Ok(unsafe { OwnedFd::from_raw_fd(number as RawFd) })
}

/// A file system context.
pub(crate) fn fsopen(kind: &CStr) -> Result<OwnedFd, Errno> {
    // SAFETY: `kind` is a terminated string.
    descriptor(unsafe { libc::syscall(libc::SYS_fsopen, kind.as_ptr(), FSOPEN_CLOEXEC) })
}

/// Sets `key` to `value`, or switches the flag `key` on.
pub(crate) fn fsconfig(
    context: BorrowedFd<'_>,
    key: &CStr,
    value: Option<&CStr>,
) -> Result<(), Errno> {
    let (command, value) = match value {
        Some(value) => (FSCONFIG_SET_STRING, value.as_ptr()),
        None => (FSCONFIG_SET_FLAG, ptr::null()),
    };
    // SAFETY: strings are terminated, or null where the command takes none.
    check(unsafe {
        libc::syscall(
            libc::SYS_fsconfig,
            context.as_raw_fd(),
            command,
            key.as_ptr(),
            value,
            0,
        )
    })
}

/// Makes the superblock.
pub(crate) fn fsconfig_create(context: BorrowedFd<'_>) -> Result<(), Errno> {
    let none = ptr::null::<u8>();
    // SAFETY: the command takes no pointers.
    check(unsafe {
        libc::syscall(
            libc::SYS_fsconfig,
            context.as_raw_fd(),
            FSCONFIG_CMD_CREATE,
            none,
            none,
            0,
        )
    })
}

/// A mount of the file system that is attached nowhere.
pub(crate) fn fsmount(context: BorrowedFd<'_>, attributes: c_uint) -> Result<OwnedFd, Errno> {
    let (context, flags) = (context.as_raw_fd(), FSMOUNT_CLOEXEC);
    // SAFETY: no pointers.
    descriptor(unsafe { libc::syscall(libc::SYS_fsmount, context, flags, attributes) })
}

/// Attaches a mount on top of the current root.
pub(crate) fn move_mount_to_root(mount: BorrowedFd<'_>) -> Result<(), Errno> {
    // SAFETY: both paths are terminated strings.
    check(unsafe {
        libc::syscall(
            libc::SYS_move_mount,
            mount.as_raw_fd(),
            c"".as_ptr(),
            libc::AT_FDCWD,
            c"/".as_ptr(),
            MOVE_MOUNT_F_EMPTY_PATH,
        )
    })
}

/// Makes the working folder the root.
pub(crate) fn chroot_here() -> Result<(), Errno> {
    // SAFETY: a terminated string.
    check(unsafe { libc::syscall(libc::SYS_chroot, c".".as_ptr()) })
}

/// Makes the mount that the working folder is on the root, and puts the old root over it.
pub(crate) fn pivot_root_here() -> Result<(), Errno> {
    let here = c".".as_ptr();
    // SAFETY: a terminated string.
    check(unsafe { libc::syscall(libc::SYS_pivot_root, here, here) })
}

/// Takes the mount at the working folder, with everything on it, out of this namespace.
pub(crate) fn detach_here() -> Result<(), Errno> {
    // SAFETY: a terminated string.
    check(unsafe { libc::syscall(libc::SYS_umount2, c".".as_ptr(), libc::MNT_DETACH) })
}

/// Makes all mounts private, so that what happens here stays here.
pub(crate) fn make_private() -> Result<(), Errno> {
    let flags = libc::MS_REC | libc::MS_PRIVATE;
    let none = ptr::null::<u8>();
    // SAFETY: the path is a terminated string; source, type and data may be null for these flags.
    check(unsafe { libc::syscall(libc::SYS_mount, none, c"/".as_ptr(), none, flags, none) })
}
