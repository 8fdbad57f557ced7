//! Device nodes: a read-only tmpfs with just those that are needed, owned by the VM's user.
//!
//! The numbers are the kernel's fixed ones (Documentation/admin-guide/devices.txt), so the host's
//! `/dev` is not asked.

use crate::sys::{
    root::{self, MOUNT_ATTR_NOEXEC, MOUNT_ATTR_NOSUID, MOUNT_ATTR_RDONLY},
    tree,
};
use nix::{
    errno::Errno,
    fcntl::OFlag,
    sys::stat::{Mode, SFlag, makedev, mkdirat, mknodat},
};
use std::{
    ffi::CStr,
    os::fd::{AsFd, OwnedFd},
};

use super::folder;

/// A device node that a VM may need.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Device {
    /// KVM itself.
    Kvm,
    /// Taps that are opened by name.
    Tun,
    /// The kernel's packet mover.
    VhostNet,
    /// The kernel's vsock.
    VhostVsock,
    /// For standard streams in the background.
    Null,
    /// Sources of random numbers.
    Random,
    /// Sources of random numbers.
    Urandom,
    /// The hardware's random numbers.
    Hwrng,
    /// Pseudo terminals; needs the host's `/dev/pts` as well.
    Ptmx,
}

impl Device {
    /// All there are.
    #[cfg(test)]
    pub(crate) const ALL: [Self; 9] = [
        Self::Kvm,
        Self::Tun,
        Self::VhostNet,
        Self::VhostVsock,
        Self::Null,
        Self::Random,
        Self::Urandom,
        Self::Hwrng,
        Self::Ptmx,
    ];

    /// Path below `/dev`, major and minor number.
    pub(crate) fn node(self) -> (&'static str, u64, u64) {
        match self {
            Self::Kvm => ("kvm", 10, 232),
            Self::Tun => ("net/tun", 10, 200),
            Self::VhostNet => ("vhost-net", 10, 238),
            Self::VhostVsock => ("vhost-vsock", 10, 241),
            Self::Null => ("null", 1, 3),
            Self::Random => ("random", 1, 8),
            Self::Urandom => ("urandom", 1, 9),
            Self::Hwrng => ("hwrng", 10, 183),
            Self::Ptmx => ("ptmx", 5, 2),
        }
    }
}

/// A tmpfs with these nodes, attached nowhere. With [`Device::Ptmx`] it has an empty folder `pts`.
pub(crate) fn make(devices: &[Device], uid: u32, gid: u32) -> Result<OwnedFd, Errno> {
    let context = root::fsopen(c"tmpfs")?;
    let settings = [
        (c"size", c"4k"),
        (c"nr_inodes", c"16"), // more than all nodes, their folders and the root
        (c"mode", c"0755"),
    ];
    for (key, value) in settings {
        root::fsconfig(context.as_fd(), key, Some(value))?;
    }
    root::fsconfig_create(context.as_fd())?;
    let mount = root::fsmount(context.as_fd(), MOUNT_ATTR_NOSUID | MOUNT_ATTR_NOEXEC)?;
    let folder_mode = Mode::from_bits_truncate(0o755);
    for device in devices {
        let (path, major, minor) = device.node();
        let (inner, name) = match path.split_once('/') {
            Some((outer, name)) => {
                mkdirat(&mount, outer, folder_mode)?;
                let flags = OFlag::O_PATH | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC;
                let inner = nix::fcntl::openat(&mount, outer, flags, Mode::empty())?;
                (Some(inner), name)
            }
            None => (None, path),
        };
        let folder = inner.as_ref().unwrap_or(&mount).as_fd();
        let mode = Mode::from_bits_truncate(0o600);
        mknodat(folder, name, SFlag::S_IFCHR, mode, makedev(major, minor))?;
        let name = std::ffi::CString::new(name).map_err(|_| Errno::EINVAL)?;
        folder::give(folder, &name, uid, gid)?;
        if *device == Device::Ptmx {
            mkdirat(&mount, PTS, folder_mode)?;
        }
    }
    tree::set_attributes(mount.as_fd(), MOUNT_ATTR_RDONLY, None)?;
    Ok(mount)
}

/// Where pseudo terminals are, below `/dev`.
pub(crate) const PTS: &CStr = c"pts";
