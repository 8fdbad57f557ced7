//! Attributes of files and of the file system.

use std::os::fd::BorrowedFd;

use nix::errno::Errno;

use super::{Passthrough, Translation, sys};
use crate::fuse::InHeader;
use crate::fuse::decode::SetAttr;
use crate::fuse::reply::{self, Attr, Put};
use crate::fuse::wire::{fattr, flag, init};

/// statx(2) in the protocol's terms, with the host's users.
fn attr_of(stat: &libc::statx) -> Attr {
    let time = |t: &libc::statx_timestamp| (t.tv_sec, t.tv_nsec);
    Attr {
        ino: stat.stx_ino,
        size: stat.stx_size,
        blocks: stat.stx_blocks,
        atime: time(&stat.stx_atime),
        mtime: time(&stat.stx_mtime),
        ctime: time(&stat.stx_ctime),
        btime: (stat.stx_mask & libc::STATX_BTIME != 0).then(|| time(&stat.stx_btime)),
        mode: u32::from(stat.stx_mode),
        nlink: stat.stx_nlink,
        uid: stat.stx_uid,
        gid: stat.stx_gid,
        rdev: (stat.stx_rdev_major, stat.stx_rdev_minor),
        blksize: stat.stx_blksize,
        flags: 0,
    }
}

impl Passthrough {
    /// What the guest sees of a file.
    pub(super) fn attr_of(&self, stat: &libc::statx) -> Attr {
        let attr = attr_of(stat);
        let regular = attr.mode & libc::S_IFMT == libc::S_IFREG;
        Attr {
            flags: if regular && self.agreed(init::HAS_INODE_DAX) {
                flag::ATTR_DAX
            } else {
                0
            },
            uid: self.config.users.to_guest(attr.uid),
            gid: self.config.groups.to_guest(attr.gid),
            ..attr
        }
    }

    pub(super) fn get_attr(&mut self, node: u64, out: &mut Vec<u8>) -> Result<(), Errno> {
        let stat = sys::stat(self.inodes.get(node)?.fd())?;
        reply::attr_out(out, self.config.cache.validity(), &self.attr_of(&stat));
        Ok(())
    }

    pub(super) fn statx(&mut self, node: u64, out: &mut Vec<u8>) -> Result<(), Errno> {
        let stat = sys::stat(self.inodes.get(node)?.fd())?;
        reply::statx_out(out, self.config.cache.validity(), &self.attr_of(&stat));
        Ok(())
    }

    pub(super) fn set_attr(
        &mut self,
        node: u64,
        set: &SetAttr,
        out: &mut Vec<u8>,
    ) -> Result<(), Errno> {
        let has = |bit: u32| set.valid & bit != 0;
        let inode = self.inodes.get(node)?;
        let fd = inode.fd();
        if has(fattr::MODE) {
            if inode.kind == libc::S_IFLNK {
                return Err(Errno::EOPNOTSUPP);
            }
            self.own.chmod(fd, set.mode & 0o7777)?;
        }
        if has(fattr::UID | fattr::GID) {
            let id = |bit, id: u32| {
                // The kernel takes this number as "unchanged", which is not what was asked for.
                if has(bit) && id == u32::MAX {
                    return Err(Errno::EINVAL);
                }
                Ok(has(bit).then_some(id))
            };
            let translated = |rules: &Translation, id: Option<u32>| {
                id.map(|id| rules.to_host(id).ok_or(Errno::EPERM))
                    .transpose()
            };
            let uid = translated(&self.config.users, id(fattr::UID, set.uid)?)?;
            let gid = translated(&self.config.groups, id(fattr::GID, set.gid)?)?;
            self.drop_mapped_capability(fd)?;
            sys::chown(fd, uid, gid)?;
        }
        if has(fattr::SIZE) {
            if inode.kind != libc::S_IFREG {
                return Err(Errno::EINVAL);
            }
            if has(fattr::KILL_SUIDGID) {
                self.kill_suidgid(fd)?;
            }
            self.drop_mapped_capability(fd)?;
            if has(fattr::FH) {
                sys::truncate(self.handles.file(set.fh)?, set.size)?;
            } else {
                let file = self.own.reopen(fd, libc::O_WRONLY | libc::O_NONBLOCK)?;
                sys::truncate(std::os::fd::AsFd::as_fd(&file), set.size)?;
            }
        }
        if has(fattr::ATIME | fattr::MTIME) {
            let time = |bit, now, time| {
                if !has(bit) {
                    None
                } else if has(now) {
                    Some(None)
                } else {
                    Some(Some(time))
                }
            };
            self.own.set_times(
                fd,
                [
                    time(fattr::ATIME, fattr::ATIME_NOW, set.atime),
                    time(fattr::MTIME, fattr::MTIME_NOW, set.mtime),
                ],
            )?;
        }
        self.get_attr(node, out)
    }

    /// Takes the set-user-id bit away, and the set-group-id bit of what the group may execute: someone who is not privileged
    /// in the guest changes the contents, and the capability to keep the bits is this daemon's only.
    pub(super) fn kill_suidgid(&self, fd: BorrowedFd<'_>) -> Result<(), Errno> {
        let mode = u32::from(sys::stat(fd)?.stx_mode);
        let mut kept = mode & !libc::S_ISUID;
        if mode & libc::S_IXGRP != 0 {
            kept &= !libc::S_ISGID;
        }
        if kept == mode {
            return Ok(());
        }
        self.own.chmod(fd, kept & 0o7777)
    }

    pub(super) fn stat_fs(&mut self, node: u64, out: &mut Vec<u8>) -> Result<(), Errno> {
        let st = sys::stat_file_system(self.inodes.get(node)?.fd())?;
        out.u64(st.f_blocks).u64(st.f_bfree).u64(st.f_bavail);
        out.u64(st.f_files).u64(st.f_ffree);
        // Block and name sizes are small positive numbers.
        let small = |n: i64| u32::try_from(n).unwrap_or(u32::MAX);
        out.u32(small(st.f_bsize))
            .u32(small(st.f_namelen))
            .u32(small(st.f_frsize));
        out.u32(0).zeros(24);
        Ok(())
    }

    /// By the permission bits alone: a guest that mounts virtio-fs checks permissions itself and does not ask.
    pub(super) fn access(&mut self, header: &InHeader, mask: u32) -> Result<(), Errno> {
        let stat = self.attr_of(&sys::stat(self.inodes.get(header.nodeid)?.fd())?);
        let mode = stat.mode;
        let wanted = mask & 7;
        let granted = if header.uid == 0 {
            // What nobody may execute, root may not either.
            if mode & 0o111 == 0 && mode & libc::S_IFMT == libc::S_IFREG {
                6
            } else {
                7
            }
        } else if header.uid == stat.uid {
            mode >> 6
        } else if header.gid == stat.gid {
            mode >> 3
        } else {
            mode
        };
        if wanted & !granted == 0 {
            Ok(())
        } else {
            Err(Errno::EACCES)
        }
    }
}
