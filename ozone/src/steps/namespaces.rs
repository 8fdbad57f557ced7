//! Namespaces: which there are, how they are entered, and the host name inside.
//!
//! The user and pid namespaces must be made by clone3 itself. The others the child makes for
//! itself afterwards: a network namespace alone takes a good part of the whole start, and this way
//! the parent can start the next process meanwhile.

use crate::{layer::Layer, sys::process as sys};
use nix::{errno::Errno, fcntl, sys::stat::Mode, unistd};
use std::ffi::c_int;

/// What clone3 makes, best first: a host that refuses the first may grant one of the next.
pub(crate) const AT_CLONE: [c_int; 4] = [
    libc::CLONE_NEWUSER | libc::CLONE_NEWPID,
    libc::CLONE_NEWPID,
    libc::CLONE_NEWUSER,
    0,
];

/// What the child makes for itself.
pub(crate) const LATER: [(c_int, Layer); 5] = [
    (libc::CLONE_NEWNS, Layer::MountNamespace),
    (libc::CLONE_NEWNET, Layer::NetworkNamespace),
    (libc::CLONE_NEWIPC, Layer::IpcNamespace),
    (libc::CLONE_NEWUTS, Layer::UtsNamespace),
    (libc::CLONE_NEWCGROUP, Layer::CgroupNamespace),
];

/// Enters all of [`LATER`]. If the host refuses them together, each is tried alone and `refused`
/// hears of those that failed. Returns the flags of those that were entered.
pub(crate) fn enter(mut refused: impl FnMut(Layer, Errno)) -> c_int {
    let all = LATER.iter().fold(0, |flags, (flag, _)| flags | flag);
    if sys::unshare(all).is_ok() {
        return all;
    }
    let mut entered = 0;
    for (flag, layer) in LATER {
        match sys::unshare(flag) {
            Ok(()) => entered |= flag,
            Err(errno) => refused(layer, errno),
        }
    }
    entered
}

/// In an own user namespace: no further one can be made in it, so that nobody becomes his own root
/// there, which opens the wide side of the kernel (mounts, networks) to code that has no right
/// otherwise. It is the second lock on that door, behind the filter, and not a layer of its own:
/// where there is no `/proc/sys`, as inside of an outer jail, the filter stands alone.
pub(crate) fn forbid_nested_users() {
    let flags = fcntl::OFlag::O_WRONLY | fcntl::OFlag::O_CLOEXEC;
    let path = c"/proc/sys/user/max_user_namespaces";
    if let Ok(limit) = fcntl::open(path, flags, Mode::empty()) {
        let _ = unistd::write(&limit, b"0");
    }
}

/// Gives an own uts namespace a name that tells nothing about the host.
pub(crate) fn hide_hostname() -> Result<(), Errno> {
    sys::set_hostname(c"jail")
}
