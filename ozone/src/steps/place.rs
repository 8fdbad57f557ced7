//! Files of the host in the jail: bind mounts with rights of their own.
//!
//! A mount costs some 20 µs whatever the size of the file, shares its page cache with all other VMs, and
//! can be read-only. A copy of the programs would cost milliseconds and memory per VM; a hard link works
//! in one file system only, and would carry a change of its owner back to the host. The mount is made
//! before the jail exists, from the very descriptor that was checked.
//!
//! The VM's user gets the owner's rights by an id-mapped mount: the file's owner on the disk is shown
//! as the VM's user there, and nowhere else. The host's file keeps its owner.

use super::{elf, parent_death};
use crate::{
    fault::Fault,
    sys::{
        process::{self as sys, Fork},
        root::{MOUNT_ATTR_NODEV, MOUNT_ATTR_NOEXEC, MOUNT_ATTR_NOSUID, MOUNT_ATTR_RDONLY},
        tree,
    },
};
use nix::{
    errno::Errno,
    fcntl::{OFlag, open},
    sys::{
        stat::{FileStat, Mode, SFlag, fstat},
        wait::{Id, WaitPidFlag, waitid},
    },
};
use std::{
    fs::File,
    os::{
        fd::{AsFd, AsRawFd, OwnedFd},
        unix::fs::FileExt,
    },
    path::Path,
};

/// What the VM's user does with a file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Access {
    /// Read and execute.
    Execute,
    /// Read.
    Read,
    /// Read and write.
    Write,
}

impl Access {
    /// Permission bits of one class of users, for a file.
    fn bits(self, folder: bool) -> u32 {
        let search = u32::from(folder);
        match self {
            Self::Execute => 5,
            Self::Read => 4 | search,
            Self::Write => 6 | search,
        }
    }
}

/// A file that is ready to be attached.
#[derive(Debug)]
pub(crate) struct Placed {
    /// The mount, attached nowhere yet.
    pub(crate) mount: OwnedFd,
    /// Whether it is a folder, which needs a folder to be mounted on.
    pub(crate) folder: bool,
}

/// Opens `path` and makes a mount of it. `None` if it is not there and that is `optional`.
pub(crate) fn prepare(
    subject: &str,
    path: &Path,
    access: Access,
    (uid, gid): (u32, u32),
    optional: bool,
) -> Result<Option<Placed>, Fault> {
    let told = |what: &'static str| move |e| Fault::os(subject, what, e);
    let handle = match open(path, OFlag::O_PATH | OFlag::O_CLOEXEC, Mode::empty()) {
        Ok(handle) => handle,
        Err(Errno::ENOENT) if optional => return Ok(None),
        Err(errno) => return Err(told("cannot be opened")(errno)),
    };
    let stat = fstat(&handle).map_err(told("cannot be looked at"))?;
    let kind = SFlag::from_bits_truncate(stat.st_mode & SFlag::S_IFMT.bits());
    let (regular, folder, block) = (
        kind == SFlag::S_IFREG,
        kind == SFlag::S_IFDIR,
        kind == SFlag::S_IFBLK,
    );
    if access == Access::Execute {
        if !regular {
            return Err(Fault::new(subject, "not a regular file"));
        }
        check_program(subject, &handle)?;
    } else if !(regular || folder || block) {
        return Err(Fault::new(
            subject,
            "not a regular file, a folder or a block device",
        ));
    }
    let mount = tree::clone_at(handle.as_fd()).map_err(told("cannot be mounted elsewhere"))?;
    let users = if allows(&stat, access.bits(folder), uid, gid) {
        None
    } else {
        if !owner_allows(&stat, access.bits(folder)) {
            return Err(Fault::new(
                subject,
                format!(
                    "its owner must be allowed to {}; its mode is {:04o}",
                    match access {
                        Access::Execute => "read and execute it",
                        Access::Read => "read it",
                        Access::Write => "read and write it",
                    },
                    stat.st_mode & 0o7777
                ),
            ));
        }
        Some(users(&stat, uid, gid).map_err(told("its id map cannot be made"))?)
    };
    let mut attributes = MOUNT_ATTR_NOSUID;
    if !block {
        attributes |= MOUNT_ATTR_NODEV;
    }
    if access != Access::Execute {
        attributes |= MOUNT_ATTR_NOEXEC;
    }
    if access != Access::Write {
        attributes |= MOUNT_ATTR_RDONLY;
    }
    let set = tree::set_attributes(mount.as_fd(), attributes, users.as_ref().map(AsFd::as_fd));
    set.map_err(|e| match (e, &users) {
        (Errno::EINVAL, Some(_)) => Fault::new(
            subject,
            format!(
                "user {uid} has no right to it, and its file system has no id-mapped mounts to give \
                 one; give the file to the user: chown {uid}:{gid}"
            ),
        ),
        (e, _) => told("its mount cannot be restricted")(e),
    })?;
    Ok(Some(Placed { mount, folder }))
}

fn check_program(subject: &str, handle: &OwnedFd) -> Result<(), Fault> {
    // The descriptor's own file once more, now for reading.
    let path = format!("/proc/self/fd/{}", handle.as_raw_fd());
    let mut head = [0; elf::ENOUGH];
    let length = File::open(path)
        .and_then(|file| file.read_at(&mut head, 0))
        .map_err(|e| Fault::new(subject, format!("cannot be read: {e}")))?;
    match elf::fault(&head[..length]) {
        None => Ok(()),
        Some(why) => Err(Fault::new(subject, why)),
    }
}

/// Whether the permission bits let this user without other groups do it.
fn allows(stat: &FileStat, wanted: u32, uid: u32, gid: u32) -> bool {
    let class = if stat.st_uid == uid {
        stat.st_mode >> 6
    } else if stat.st_gid == gid {
        stat.st_mode >> 3
    } else {
        stat.st_mode
    };
    class & wanted == wanted
}

fn owner_allows(stat: &FileStat, wanted: u32) -> bool {
    (stat.st_mode >> 6) & wanted == wanted
}

/// A user namespace in which the file's owner and group are the VM's: the map of an id-mapped mount.
fn users(stat: &FileStat, uid: u32, gid: u32) -> Result<OwnedFd, Errno> {
    let parent = sys::own_pidfd()?;
    let (pid, pidfd) = match sys::fork(libc::CLONE_NEWUSER)? {
        Fork::Child => {
            // Waits for SIGKILL: the namespace lives as long as something is in it. A parent that was killed sends it too.
            if parent_death::follow(parent.as_raw_fd()).is_err() {
                sys::exit_now(1);
            }
            loop {
                nix::unistd::pause();
            }
        }
        Fork::Parent { pid, pidfd } => (pid, pidfd),
    };
    let put = |file: &str, on_disk: u32, shown: u32| {
        let path = format!("/proc/{pid}/{file}");
        let target = open(
            path.as_str(),
            OFlag::O_WRONLY | OFlag::O_CLOEXEC,
            Mode::empty(),
        )?;
        nix::unistd::write(&target, format!("{on_disk} {shown} 1").as_bytes())
    };
    let namespace = put("uid_map", stat.st_uid, uid)
        .and_then(|_| put("gid_map", stat.st_gid, gid))
        .and_then(|_| {
            let path = format!("/proc/{pid}/ns/user");
            open(
                path.as_str(),
                OFlag::O_RDONLY | OFlag::O_CLOEXEC,
                Mode::empty(),
            )
        });
    sys::kill(pidfd.as_fd())?;
    waitid(Id::PIDFd(pidfd.as_fd()), WaitPidFlag::WEXITED)?;
    namespace
}

#[cfg(test)]
mod tests {
    use super::*;

    fn stat(mode: u32, uid: u32, gid: u32) -> FileStat {
        let mut stat = nix::sys::stat::stat("/proc/self/exe").unwrap();
        (stat.st_mode, stat.st_uid, stat.st_gid) = (mode, uid, gid);
        stat
    }

    #[test]
    fn rights_follow_the_first_class_that_fits() {
        let write = Access::Write.bits(false);
        assert!(allows(&stat(0o100_600, 7, 0), write, 7, 8));
        assert!(!allows(&stat(0o100_066, 7, 8), write, 7, 8));
        assert!(!allows(&stat(0o100_646, 1, 8), write, 7, 8));
        assert!(allows(&stat(0o100_006, 1, 2), write, 7, 8));
        assert!(allows(
            &stat(0o100_755, 0, 0),
            Access::Execute.bits(false),
            7,
            8
        ));
        assert!(!allows(
            &stat(0o040_744, 0, 0),
            Access::Read.bits(true),
            7,
            8
        ));
    }
}
