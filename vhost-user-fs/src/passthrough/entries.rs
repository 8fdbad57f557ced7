//! Names: finding, making, moving and removing what they stand for.

use std::ffi::CStr;
use std::os::fd::AsFd;

use nix::errno::Errno;

use super::creds::AsUser;
use super::inodes::{Identity, Inodes};
use super::{Cache, Passthrough, sys, xattrs};
use crate::fuse::reply::{self, Attr, Validity};
use crate::fuse::wire::{flag, init};
use crate::fuse::{InHeader, Name};

const RENAME_FLAGS: u32 = libc::RENAME_NOREPLACE | libc::RENAME_EXCHANGE | libc::RENAME_WHITEOUT;

/// What was at a name before a request that makes it.
const ABSENT: u64 = 1;
const PRESENT: u64 = 2;

impl Passthrough {
    pub(super) fn lookup(
        &mut self,
        parent: u64,
        name: Name<'_>,
        out: &mut Vec<u8>,
    ) -> Result<(), Errno> {
        match self.find(parent, name) {
            Ok((node, attr)) => self.put_entry(out, node, &attr),
            // A guest that may keep everything may also keep that there is nothing.
            Err(Errno::ENOENT) if self.config.cache == Cache::Always => {
                self.put_entry(out, 0, &Attr::default());
            }
            Err(errno) => return Err(errno),
        }
        Ok(())
    }

    pub(super) fn put_entry(&self, out: &mut Vec<u8>, node: u64, attr: &Attr) {
        reply::entry_out(out, node, self.config.cache.validity(), attr);
    }

    /// The file `name` of folder `parent`, counted as looked up once.
    pub(super) fn find(&mut self, parent: u64, name: Name<'_>) -> Result<(u64, Attr), Errno> {
        let folder = self.inodes.folder(parent)?;
        let mount = folder.identity.mount;
        // Most names are known already; then a look is enough and nothing is opened. The identity that it shows is that of a
        // file in this very folder, as nothing is followed, and a known inode's identity is pinned by its descriptor.
        let stat = sys::stat_at(folder.fd(), name)?;
        let at = Some((parent, name));
        if let Some(node) = self.inodes.find(&mut self.journal, &stat, at) {
            if self.inodes.is_lost(node) {
                self.recover(node, parent, name)?;
            }
            return Ok((node, self.entry_attr(&stat, mount)));
        }
        self.find_new(parent, name)
    }

    fn recover(&mut self, node: u64, parent: u64, name: Name<'_>) -> Result<(), Errno> {
        self.room()?;
        let folder = self.inodes.folder(parent)?;
        let fd = sys::open_beneath(folder.fd(), name, libc::O_PATH, 0)?;
        let stat = sys::stat(fd.as_fd())?;
        self.inodes.recover(node, fd, &stat)
    }

    /// As [`find`](Self::find), for a file of which it is likely that nothing but its attributes will be asked: what is not
    /// known yet is not opened now.
    pub(super) fn find_lightly(
        &mut self,
        parent: u64,
        name: Name<'_>,
    ) -> Result<(u64, Attr), Errno> {
        let folder = self.inodes.folder(parent)?;
        let mount = folder.identity.mount;
        let stat = sys::stat_at(folder.fd(), name)?;
        // The mount of a folder that is looked at by its name is that of what is mounted there, as when it is opened.
        let at = Some((parent, name));
        let node = match self.inodes.find(&mut self.journal, &stat, at) {
            Some(node) => node,
            None if Inodes::is_recognizable(&stat) => {
                self.inodes.insert(&mut self.journal, None, &stat, at)?
            }
            None => return self.find_new(parent, name),
        };
        if self.inodes.is_lost(node) {
            self.recover(node, parent, name)?;
        }
        Ok((node, self.entry_attr(&stat, mount)))
    }

    /// As [`find`](Self::find), for what is not known yet.
    pub(super) fn find_new(&mut self, parent: u64, name: Name<'_>) -> Result<(u64, Attr), Errno> {
        self.room()?;
        let folder = self.inodes.folder(parent)?;
        let mount = folder.identity.mount;
        let fd = sys::open_beneath(folder.fd(), name, libc::O_PATH, 0)?;
        let stat = sys::stat(fd.as_fd())?;
        // Another name of the same file, or the file was exchanged since the first look.
        let at = Some((parent, name));
        let node = match self.inodes.find(&mut self.journal, &stat, at) {
            Some(node) => node,
            None => self.inodes.insert(&mut self.journal, Some(fd), &stat, at)?,
        };
        Ok((node, self.entry_attr(&stat, mount)))
    }

    fn entry_attr(&self, stat: &libc::statx, parent_mount: u64) -> Attr {
        let mut attr = self.attr_of(stat);
        let folder = attr.mode & libc::S_IFMT == libc::S_IFDIR;
        if folder && stat.stx_mnt_id != parent_mount && self.agreed(init::SUBMOUNTS) {
            attr.flags |= flag::ATTR_SUBMOUNT;
        }
        attr
    }

    pub(super) fn read_link(&mut self, node: u64, out: &mut Vec<u8>) -> Result<(), Errno> {
        let inode = self.inodes.get(node)?;
        if inode.kind != libc::S_IFLNK {
            return Err(Errno::EINVAL);
        }
        // PATH_MAX, and one byte more to see that nothing was cut.
        out.resize(4097, 0);
        let len = sys::read_link(inode.fd(), out)?;
        if len > 4096 {
            return Err(Errno::ENAMETOOLONG);
        }
        out.truncate(len);
        Ok(())
    }

    /// The permissions of a new file. With access control lists the guest sends its mask along, since a default list of the
    /// folder replaces it.
    fn masked(&self, parent: u64, (mode, umask): (u32, u32)) -> Result<u32, Errno> {
        let mode = mode & 0o7777;
        if !self.agreed(init::DONT_MASK) {
            return Ok(mode);
        }
        if xattrs::has_default_acl(self.inodes.folder(parent)?.fd())? {
            return Ok(mode);
        }
        Ok(mode & !(umask & 0o777))
    }

    fn as_user(&self, header: &InHeader) -> Result<AsUser, Errno> {
        let (users, groups) = (&self.config.users, &self.config.groups);
        let header = InHeader {
            uid: users.to_host(header.uid).ok_or(Errno::EPERM)?,
            gid: groups.to_host(header.gid).ok_or(Errno::EPERM)?,
            ..*header
        };
        AsUser::new(&header, self.config.switch_user)
    }

    /// Turns "exists" into success for what the process before this one made for the same request, before it died.
    fn unless_made(
        &self,
        made: Result<(), Errno>,
        at: (u64, Name<'_>),
        kind: u32,
    ) -> Result<(), Errno> {
        match made {
            Err(Errno::EEXIST) if self.made_before(at, kind) => Ok(()),
            other => other,
        }
    }

    /// Before something is made: notes that nothing is there. Times alone would not tell, since file systems stamp by ticks of
    /// some milliseconds.
    fn note_making(&self, (parent, name): (u64, Name<'_>)) -> Result<(), Errno> {
        if self.journal.again().is_some_and(|again| again.before != 0) {
            return Ok(());
        }
        let there = sys::stat_at(self.inodes.folder(parent)?.fd(), name).map(drop);
        self.journal.note_time();
        self.journal.note_before(if there == Err(Errno::ENOENT) {
            ABSENT
        } else {
            PRESENT
        });
        Ok(())
    }

    /// Whether what is there is of this type and as new as the request at hand, which may have been done already.
    fn made_before(&self, (parent, name): (u64, Name<'_>), kind: u32) -> bool {
        let Some(again) = self.journal.again().filter(|again| again.before == ABSENT) else {
            return false;
        };
        let Ok(stat) = self
            .inodes
            .folder(parent)
            .and_then(|folder| sys::stat_at(folder.fd(), name))
        else {
            return false;
        };
        // Without a time of birth, that of the last change, which nothing in the guest can have moved meanwhile.
        let time = if stat.stx_mask & libc::STATX_BTIME != 0 {
            stat.stx_btime
        } else {
            stat.stx_ctime
        };
        let nanos = u64::try_from(time.tv_sec)
            .map_or(0, |seconds| seconds.saturating_mul(1_000_000_000))
            .saturating_add(u64::from(time.tv_nsec));
        u32::from(stat.stx_mode) & libc::S_IFMT == kind && nanos >= again.began
    }

    fn put_new(&mut self, parent: u64, name: Name<'_>, out: &mut Vec<u8>) -> Result<(), Errno> {
        let (node, attr) = self.find_new(parent, name)?;
        self.put_entry(out, node, &attr);
        Ok(())
    }

    pub(super) fn symlink(
        &mut self,
        header: &InHeader,
        name: Name<'_>,
        target: &CStr,
        out: &mut Vec<u8>,
    ) -> Result<(), Errno> {
        self.room()?;
        let folder = self.inodes.folder(header.nodeid)?;
        let user = self.as_user(header)?;
        self.note_making((header.nodeid, name))?;
        let made = sys::symlink(target, folder.fd(), name);
        drop(user);
        self.unless_made(made, (header.nodeid, name), libc::S_IFLNK)?;
        self.put_new(header.nodeid, name, out)
    }

    pub(super) fn mknod(
        &mut self,
        header: &InHeader,
        name: Name<'_>,
        mode: (u32, u32),
        rdev: u32,
        out: &mut Vec<u8>,
    ) -> Result<(), Errno> {
        self.room()?;
        let kind = mode.0 & libc::S_IFMT;
        let permissions = self.masked(header.nodeid, mode)?;
        let folder = self.inodes.folder(header.nodeid)?;
        let user = self.as_user(header)?;
        self.note_making((header.nodeid, name))?;
        let made = sys::make_node(
            folder.fd(),
            name,
            kind | permissions,
            reply::unpack_dev(rdev),
        );
        drop(user);
        let device = [libc::S_IFBLK, libc::S_IFCHR].contains(&kind);
        let made = match made {
            // Landlock's word for it. mknod(2) has another one for those who may not make devices, which programs know.
            Err(Errno::EACCES) if device => Err(Errno::EPERM),
            other => other,
        };
        // No type means a regular file.
        let kind = if kind == 0 { libc::S_IFREG } else { kind };
        self.unless_made(made, (header.nodeid, name), kind)?;
        self.put_new(header.nodeid, name, out)
    }

    pub(super) fn mkdir(
        &mut self,
        header: &InHeader,
        name: Name<'_>,
        mode: (u32, u32),
        out: &mut Vec<u8>,
    ) -> Result<(), Errno> {
        self.room()?;
        let permissions = self.masked(header.nodeid, mode)?;
        let folder = self.inodes.folder(header.nodeid)?;
        let user = self.as_user(header)?;
        self.note_making((header.nodeid, name))?;
        let made = sys::make_folder(folder.fd(), name, permissions);
        drop(user);
        self.unless_made(made, (header.nodeid, name), libc::S_IFDIR)?;
        self.put_new(header.nodeid, name, out)
    }

    pub(super) fn unlink(
        &mut self,
        parent: u64,
        name: Name<'_>,
        folder_wanted: bool,
    ) -> Result<(), Errno> {
        self.keep_open(parent, name)?;
        match sys::unlink(self.inodes.folder(parent)?.fd(), name, folder_wanted) {
            // It was removed, and then the process that removed it died.
            Err(Errno::ENOENT) if self.journal.again().is_some() => Ok(()),
            other => other,
        }
    }

    pub(super) fn rename(
        &mut self,
        from: (u64, Name<'_>),
        to: (u64, Name<'_>),
        flags: u32,
    ) -> Result<(), Errno> {
        if flags & !RENAME_FLAGS != 0 {
            return Err(Errno::EINVAL);
        }
        self.keep_open(from.0, from.1)?;
        self.keep_open(to.0, to.1)?;
        let source = self.inodes.folder(from.0)?.fd();
        let target = self.inodes.folder(to.0)?.fd();
        let again = self.journal.again();
        let mut done = false;
        if flags & (libc::RENAME_EXCHANGE | libc::RENAME_WHITEOUT) != 0 {
            // Afterwards both names exist as before; only what is behind them tells whether it was done.
            let now = sys::stat_at(source, from.1)?.stx_ino;
            done = again.is_some_and(|again| again.before != 0 && again.before != now);
            if !done {
                self.journal.note_before(now);
            }
        }
        if !done {
            match sys::rename((source, from.1), (target, to.1), flags) {
                // It was moved, and then the process that moved it died.
                Err(Errno::ENOENT) if again.is_some() => sys::stat_at(target, to.1).map(drop),
                other => other,
            }?;
        }
        self.is_now_at(to);
        if flags & libc::RENAME_EXCHANGE != 0 {
            self.is_now_at(from);
        }
        Ok(())
    }

    /// The guest has moved a file there, and need not look it up again to know that; it can be opened from there.
    fn is_now_at(&mut self, (parent, name): (u64, Name<'_>)) {
        let folder = self.inodes.folder(parent);
        if let Ok(stat) = folder.and_then(|folder| sys::stat_at(folder.fd(), name)) {
            self.inodes.seen_at(&stat, (parent, name));
        }
    }

    pub(super) fn link(
        &mut self,
        old: u64,
        parent: u64,
        name: Name<'_>,
        out: &mut Vec<u8>,
    ) -> Result<(), Errno> {
        let inode = self.inodes.get(old)?;
        let folder = self.inodes.folder(parent)?;
        let linked = self.own.link(inode.fd(), folder.fd(), name);
        let stat = sys::stat(inode.fd())?;
        match linked {
            Err(Errno::EEXIST) if self.journal.again().is_some() => {
                let there = sys::stat_at(folder.fd(), name)?;
                if Identity::of(&there) != Identity::of(&stat) {
                    return Err(Errno::EEXIST);
                }
            }
            other => other?,
        }
        let attr = self.entry_attr(&stat, stat.stx_mnt_id);
        // One name more is one lookup more.
        let node = self
            .inodes
            .find(&mut self.journal, &stat, Some((parent, name)))
            .ok_or(Errno::ESTALE)?;
        self.put_entry(out, node, &attr);
        Ok(())
    }

    pub(super) fn create(
        &mut self,
        header: &InHeader,
        name: Name<'_>,
        mode: (u32, u32),
        (flags, open_flags): (u32, u32),
        out: &mut Vec<u8>,
    ) -> Result<(), Errno> {
        self.room()?;
        let permissions = self.masked(header.nodeid, mode)?;
        let folder = self.inodes.folder(header.nodeid)?;
        let host_flags = self.host_flags(flags)? & !libc::O_TRUNC;
        let user = self.as_user(header)?;
        // Without it, a file that is there is opened, whoever made it.
        if flags & libc::O_EXCL.cast_unsigned() != 0 {
            self.note_making((header.nodeid, name))?;
        }
        let made = sys::open_beneath(
            folder.fd(),
            name,
            host_flags | libc::O_CREAT | libc::O_EXCL,
            permissions,
        );
        drop(user);
        match made {
            Ok(file) => {
                let fd = self.own.reopen(file.as_fd(), libc::O_PATH)?;
                let stat = sys::stat(fd.as_fd())?;
                let at = Some((header.nodeid, name));
                let node = match self.inodes.find(&mut self.journal, &stat, at) {
                    Some(node) => node,
                    None => self.inodes.insert(&mut self.journal, Some(fd), &stat, at)?,
                };
                self.put_entry(out, node, &self.attr_of(&stat));
                self.put_open(file, flags, out)
            }
            // Someone was faster; what is there may be anything, so it is looked at before it is opened.
            Err(Errno::EEXIST)
                if flags & libc::O_EXCL.cast_unsigned() == 0
                    || self.made_before((header.nodeid, name), libc::S_IFREG) =>
            {
                let (node, attr) = self.find(header.nodeid, name)?;
                let opened = self.open_file(node, flags, open_flags);
                let file = opened.inspect_err(|_| self.forget(node, 1))?;
                // An O_TRUNC may have changed it.
                let attr = sys::stat(file.as_fd()).map_or(attr, |stat| self.attr_of(&stat));
                self.put_entry(out, node, &attr);
                self.put_open(file, flags, out)
            }
            Err(errno) => Err(errno),
        }
    }

    pub(super) fn tmpfile(
        &mut self,
        header: &InHeader,
        mode: (u32, u32),
        flags: u32,
        out: &mut Vec<u8>,
    ) -> Result<(), Errno> {
        self.room()?;
        let permissions = self.masked(header.nodeid, mode)?;
        let folder = self.inodes.folder(header.nodeid)?;
        // With O_EXCL it can never get a name.
        let exclusive = flags.cast_signed() & libc::O_EXCL;
        let host_flags = (self.host_flags(flags)? & !libc::O_TRUNC) | exclusive;
        let user = self.as_user(header)?;
        let file = self.own.tmpfile(folder.fd(), host_flags, permissions)?;
        drop(user);
        let fd = self.own.reopen(file.as_fd(), libc::O_PATH)?;
        let stat = sys::stat(fd.as_fd())?;
        let node = self
            .inodes
            .insert(&mut self.journal, Some(fd), &stat, None)?;
        // It has no name that could be kept.
        reply::entry_out(out, node, Validity::default(), &self.attr_of(&stat));
        self.put_open(file, flags, out)
    }
}
