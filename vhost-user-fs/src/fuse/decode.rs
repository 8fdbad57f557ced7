//! Requests from bytes.
//!
//! **Job.** [`decode`] checks the body of a request and gives its parts; it allocates nothing and touches no file.
//! **Who is not trusted.** The guest's kernel: lengths, names and counts may be anything.
//! **Why this way.** [`Name`] and [`XattrName`] can only be made here, so that no name reaches a system call unchecked: a
//! [`Name`] is one component of a path and can neither climb nor skip.

use std::ffi::CStr;

use nix::errno::Errno;

use super::wire::{InHeader, NO_HANDLE, opcode};

/// Longest file name in bytes (`NAME_MAX`).
pub const NAME_MAX: usize = 255;
/// Longest name of an extended attribute in bytes (`XATTR_NAME_MAX`).
pub const XATTR_NAME_MAX: usize = 255;
/// Longest target of a symbolic link in bytes (`PATH_MAX` without the terminator).
pub const TARGET_MAX: usize = 4095;
/// Largest value of an extended attribute in bytes (`XATTR_SIZE_MAX`).
pub const XATTR_SIZE_MAX: usize = 65536;
/// Largest body that is looked at, without the data of a `WRITE`: an attribute of full size, its name and its header. Longer
/// ones cannot be valid.
pub const MAX_BODY: usize = XATTR_SIZE_MAX + XATTR_NAME_MAX + 1 + 16;

/// One component of a path: not empty, not `.` or `..`, without `/`, at most [`NAME_MAX`] bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Name<'a>(&'a CStr);

impl<'a> Name<'a> {
    /// Checks `name`.
    ///
    /// # Errors
    /// `ENAMETOOLONG`, or `EINVAL` for what is no single component.
    pub fn new(name: &'a CStr) -> Result<Self, Errno> {
        let bytes = name.to_bytes();
        if bytes.len() > NAME_MAX {
            return Err(Errno::ENAMETOOLONG);
        }
        if matches!(bytes, b"" | b"." | b"..") || bytes.contains(&b'/') {
            return Err(Errno::EINVAL);
        }
        Ok(Self(name))
    }

    /// The name.
    pub fn as_c_str(self) -> &'a CStr {
        self.0
    }
}

/// Name of an extended attribute: 1 to [`XATTR_NAME_MAX`] bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct XattrName<'a>(&'a CStr);

impl<'a> XattrName<'a> {
    /// A name that this program chose.
    pub(crate) const fn of(name: &'a CStr) -> Self {
        Self(name)
    }

    fn new(name: &'a CStr) -> Result<Self, Errno> {
        match name.count_bytes() {
            1..=XATTR_NAME_MAX => Ok(Self(name)),
            _ => Err(Errno::ERANGE),
        }
    }

    /// The name.
    pub fn as_c_str(self) -> &'a CStr {
        self.0
    }
}

/// A point in time as a `SETATTR` tells it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Time {
    /// Seconds since 1970.
    pub seconds: i64,
    /// Nanoseconds, below 10⁹.
    pub nanos: u32,
}

/// `fuse_setattr_in`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SetAttr {
    /// Bits of [`fattr`](super::wire::fattr): which of the others count.
    pub valid: u32,
    /// An open file.
    pub fh: u64,
    /// New size in bytes.
    pub size: u64,
    /// New time of access.
    pub atime: Time,
    /// New time of modification.
    pub mtime: Time,
    /// New permissions.
    pub mode: u32,
    /// New owner.
    pub uid: u32,
    /// New group.
    pub gid: u32,
}

/// `fuse_lk_in`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Lock {
    /// The open file.
    pub fh: u64,
    /// Whose lock.
    pub owner: u64,
    /// First byte.
    pub start: u64,
    /// Last byte; `i64::MAX` and more mean the end of the file, wherever it is.
    pub end: u64,
    /// `F_RDLCK`, `F_WRLCK` or `F_UNLCK`.
    pub kind: u32,
    /// The locking process, in the guest.
    pub pid: u32,
    /// Whether it is a lock of flock(2), on the whole open file.
    pub flock: bool,
}

/// The part of a request that follows its header. Field names are the protocol's.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[allow(missing_docs)] // each field is named in fuse.h
pub enum Body<'a> {
    Lookup {
        name: Name<'a>,
    },
    Forget {
        nlookup: u64,
    },
    BatchForget(Forgets<'a>),
    GetAttr {
        fh: Option<u64>,
    },
    SetAttr(SetAttr),
    Statx {
        fh: Option<u64>,
    },
    ReadLink,
    Symlink {
        name: Name<'a>,
        target: &'a CStr,
    },
    Mknod {
        name: Name<'a>,
        mode: u32,
        rdev: u32,
        umask: u32,
    },
    Mkdir {
        name: Name<'a>,
        mode: u32,
        umask: u32,
    },
    Unlink {
        name: Name<'a>,
    },
    Rmdir {
        name: Name<'a>,
    },
    Rename {
        name: Name<'a>,
        newdir: u64,
        newname: Name<'a>,
        flags: u32,
    },
    Link {
        oldnodeid: u64,
        name: Name<'a>,
    },
    Open {
        flags: u32,
        open_flags: u32,
    },
    Create {
        name: Name<'a>,
        flags: u32,
        mode: u32,
        umask: u32,
        open_flags: u32,
    },
    TmpFile {
        flags: u32,
        mode: u32,
        umask: u32,
    },
    Read {
        fh: u64,
        offset: u64,
        size: u32,
    },
    Write {
        fh: u64,
        offset: u64,
        size: u32,
        write_flags: u32,
    },
    Flush {
        fh: u64,
        lock_owner: u64,
    },
    Fsync {
        fh: u64,
        datasync: bool,
    },
    Release {
        fh: u64,
        release_flags: u32,
        lock_owner: u64,
    },
    OpenDir {
        flags: u32,
    },
    ReadDir {
        fh: u64,
        offset: u64,
        size: u32,
    },
    ReadDirPlus {
        fh: u64,
        offset: u64,
        size: u32,
    },
    ReleaseDir {
        fh: u64,
    },
    FsyncDir {
        fh: u64,
        datasync: bool,
    },
    StatFs,
    Access {
        mask: u32,
    },
    SetXattr {
        name: XattrName<'a>,
        value: &'a [u8],
        flags: u32,
        setxattr_flags: u32,
    },
    GetXattr {
        name: XattrName<'a>,
        size: u32,
    },
    ListXattr {
        size: u32,
    },
    RemoveXattr {
        name: XattrName<'a>,
    },
    Lseek {
        fh: u64,
        offset: u64,
        whence: u32,
    },
    Fallocate {
        fh: u64,
        offset: u64,
        length: u64,
        mode: u32,
    },
    CopyFileRange {
        fh_in: u64,
        off_in: u64,
        nodeid_out: u64,
        fh_out: u64,
        off_out: u64,
        len: u64,
        flags: u64,
    },
    /// A part of a file is to appear in the device's shared memory region.
    SetupMapping {
        /// `None` for the file of the request's inode.
        fh: Option<u64>,
        /// In the file.
        foffset: u64,
        len: u64,
        flags: u64,
        /// In the region.
        moffset: u64,
    },
    RemoveMapping(Ranges<'a>),
    GetLk(Lock),
    SetLk {
        lock: Lock,
        wait: bool,
    },
    SyncFs,
    Interrupt {
        unique: u64,
    },
    Init {
        major: u32,
        minor: u32,
        max_readahead: u32,
        flags: u64,
    },
    Destroy,
}

/// A request, as far as it can be checked without looking at files.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Request<'a> {
    /// Its header.
    pub header: InHeader,
    /// The rest of it.
    pub body: Body<'a>,
}

/// The entries of a `BATCH_FORGET`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Forgets<'a>(&'a [u8]);

impl<'a> Forgets<'a> {
    /// Pairs of inode and number of lookups to forget.
    pub fn iter(self) -> impl Iterator<Item = (u64, u64)> + use<'a> {
        self.0.chunks_exact(16).map(|entry| {
            let mut fields = Fields(entry);
            (fields.u64().unwrap_or(0), fields.u64().unwrap_or(0))
        })
    }
}

/// The parts of the shared memory region that a `REMOVEMAPPING` names.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Ranges<'a>(&'a [u8]);

impl<'a> Ranges<'a> {
    /// Offset and length of each.
    pub fn iter(self) -> impl Iterator<Item = (u64, u64)> + use<'a> {
        Forgets(self.0).iter()
    }
}

/// Takes fields off the front of a request.
struct Fields<'a>(&'a [u8]);

impl<'a> Fields<'a> {
    fn array<const N: usize>(&mut self) -> Result<[u8; N], Errno> {
        let (head, rest) = self.0.split_first_chunk().ok_or(Errno::EINVAL)?;
        self.0 = rest;
        Ok(*head)
    }

    fn u32(&mut self) -> Result<u32, Errno> {
        self.array().map(u32::from_ne_bytes)
    }

    fn u64(&mut self) -> Result<u64, Errno> {
        self.array().map(u64::from_ne_bytes)
    }

    fn skip(&mut self, count: usize) -> Result<(), Errno> {
        self.0 = self.0.get(count..).ok_or(Errno::EINVAL)?;
        Ok(())
    }

    fn text(&mut self) -> Result<&'a CStr, Errno> {
        let text = CStr::from_bytes_until_nul(self.0).map_err(|_| Errno::EINVAL)?;
        self.skip(text.count_bytes() + 1)?;
        Ok(text)
    }

    fn name(&mut self) -> Result<Name<'a>, Errno> {
        self.text().and_then(Name::new)
    }

    fn xattr_name(&mut self) -> Result<XattrName<'a>, Errno> {
        self.text().and_then(XattrName::new)
    }

    fn bytes(&mut self, count: usize) -> Result<&'a [u8], Errno> {
        let (head, rest) = self.0.split_at_checked(count).ok_or(Errno::EINVAL)?;
        self.0 = rest;
        Ok(head)
    }
}

/// What was agreed on at `INIT` and changes layouts.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Layout {
    /// `FUSE_SETXATTR_EXT`: `fuse_setxattr_in` has 16 bytes, not 8.
    pub setxattr_ext: bool,
}

/// The request with `header`, of which `body` is the rest (for `WRITE`: without the data).
///
/// # Errors
/// `ENOSYS` for an opcode that is not served, else what is wrong with the request.
pub fn decode(header: InHeader, body: &[u8], layout: Layout) -> Result<Request<'_>, Errno> {
    let f = &mut Fields(body);
    let opcode = header.opcode;
    let body = match opcode {
        opcode::LOOKUP
        | opcode::UNLINK
        | opcode::RMDIR
        | opcode::READLINK
        | opcode::SYMLINK
        | opcode::MKNOD
        | opcode::MKDIR
        | opcode::RENAME
        | opcode::RENAME2
        | opcode::LINK => of_names(opcode, f)?,
        opcode::GETATTR | opcode::STATX | opcode::SETATTR | opcode::ACCESS => {
            of_attributes(opcode, f)?
        }
        opcode::OPEN
        | opcode::CREATE
        | opcode::TMPFILE
        | opcode::READ
        | opcode::WRITE
        | opcode::FLUSH
        | opcode::FSYNC
        | opcode::RELEASE
        | opcode::LSEEK
        | opcode::FALLOCATE
        | opcode::COPY_FILE_RANGE => of_files(opcode, f)?,
        opcode::OPENDIR
        | opcode::READDIR
        | opcode::READDIRPLUS
        | opcode::RELEASEDIR
        | opcode::FSYNCDIR => of_folders(opcode, f)?,
        opcode::SETXATTR | opcode::GETXATTR | opcode::LISTXATTR | opcode::REMOVEXATTR => {
            of_xattrs(opcode, f, layout)?
        }
        opcode::GETLK | opcode::SETLK | opcode::SETLKW => of_locks(opcode, f)?,
        opcode::FORGET
        | opcode::BATCH_FORGET
        | opcode::STATFS
        | opcode::SYNCFS
        | opcode::SETUPMAPPING
        | opcode::REMOVEMAPPING
        | opcode::INTERRUPT
        | opcode::INIT
        | opcode::DESTROY => of_the_session(opcode, f)?,
        _ => return Err(Errno::ENOSYS),
    };
    Ok(Request { header, body })
}

/// Finding, making, moving and removing what names stand for.
fn of_names<'a>(opcode: u32, f: &mut Fields<'a>) -> Result<Body<'a>, Errno> {
    Ok(match opcode {
        opcode::LOOKUP => Body::Lookup { name: f.name()? },
        opcode::UNLINK => Body::Unlink { name: f.name()? },
        opcode::RMDIR => Body::Rmdir { name: f.name()? },
        opcode::READLINK => Body::ReadLink,
        opcode::SYMLINK => {
            let name = f.name()?;
            let target = f.text()?;
            if target.count_bytes() > TARGET_MAX {
                return Err(Errno::ENAMETOOLONG);
            }
            Body::Symlink { name, target }
        }
        opcode::MKNOD => {
            let (mode, rdev, umask) = (f.u32()?, f.u32()?, f.u32()?);
            f.skip(4)?;
            Body::Mknod {
                mode,
                rdev,
                umask,
                name: f.name()?,
            }
        }
        opcode::MKDIR => {
            let (mode, umask) = (f.u32()?, f.u32()?);
            Body::Mkdir {
                mode,
                umask,
                name: f.name()?,
            }
        }
        opcode::RENAME => {
            let newdir = f.u64()?;
            Body::Rename {
                newdir,
                flags: 0,
                name: f.name()?,
                newname: f.name()?,
            }
        }
        opcode::RENAME2 => {
            let (newdir, flags) = (f.u64()?, f.u32()?);
            f.skip(4)?;
            Body::Rename {
                newdir,
                flags,
                name: f.name()?,
                newname: f.name()?,
            }
        }
        opcode::LINK => Body::Link {
            oldnodeid: f.u64()?,
            name: f.name()?,
        },
        _ => return Err(Errno::ENOSYS),
    })
}

/// What is told of a file, and changed.
fn of_attributes<'a>(opcode: u32, f: &mut Fields<'a>) -> Result<Body<'a>, Errno> {
    Ok(match opcode {
        opcode::GETATTR => Body::GetAttr { fh: getattr_in(f)? },
        opcode::STATX => Body::Statx { fh: getattr_in(f)? },
        opcode::SETATTR => Body::SetAttr(set_attr(f)?),
        opcode::ACCESS => Body::Access { mask: f.u32()? },
        _ => return Err(Errno::ENOSYS),
    })
}

/// Open files: opening them, their data, closing them.
fn of_files<'a>(opcode: u32, f: &mut Fields<'a>) -> Result<Body<'a>, Errno> {
    Ok(match opcode {
        opcode::OPEN => Body::Open {
            flags: f.u32()?,
            open_flags: f.u32()?,
        },
        opcode::CREATE => {
            let (flags, mode, umask, open_flags) = create_in(f)?;
            Body::Create {
                flags,
                mode,
                umask,
                open_flags,
                name: f.name()?,
            }
        }
        opcode::TMPFILE => {
            // The name in the request is the kernel's own invention and means nothing.
            let (flags, mode, umask, _) = create_in(f)?;
            Body::TmpFile { flags, mode, umask }
        }
        opcode::READ => {
            let (fh, offset, size) = read_in(f)?;
            Body::Read { fh, offset, size }
        }
        opcode::WRITE => {
            let (fh, offset, size, write_flags) = (f.u64()?, f.u64()?, f.u32()?, f.u32()?);
            Body::Write {
                fh,
                offset,
                size,
                write_flags,
            }
        }
        opcode::FLUSH => {
            let fh = f.u64()?;
            f.skip(8)?;
            Body::Flush {
                fh,
                lock_owner: f.u64()?,
            }
        }
        opcode::FSYNC => {
            let (fh, datasync) = fsync_in(f)?;
            Body::Fsync { fh, datasync }
        }
        opcode::RELEASE => {
            let (fh, release_flags, lock_owner) = release_in(f)?;
            Body::Release {
                fh,
                release_flags,
                lock_owner,
            }
        }
        opcode::LSEEK => Body::Lseek {
            fh: f.u64()?,
            offset: f.u64()?,
            whence: f.u32()?,
        },
        opcode::FALLOCATE => {
            let (fh, offset, length, mode) = (f.u64()?, f.u64()?, f.u64()?, f.u32()?);
            Body::Fallocate {
                fh,
                offset,
                length,
                mode,
            }
        }
        opcode::COPY_FILE_RANGE => Body::CopyFileRange {
            fh_in: f.u64()?,
            off_in: f.u64()?,
            nodeid_out: f.u64()?,
            fh_out: f.u64()?,
            off_out: f.u64()?,
            len: f.u64()?,
            flags: f.u64()?,
        },
        _ => return Err(Errno::ENOSYS),
    })
}

/// Open folders.
fn of_folders<'a>(opcode: u32, f: &mut Fields<'a>) -> Result<Body<'a>, Errno> {
    Ok(match opcode {
        opcode::OPENDIR => Body::OpenDir { flags: f.u32()? },
        opcode::READDIR => {
            let (fh, offset, size) = read_in(f)?;
            Body::ReadDir { fh, offset, size }
        }
        opcode::READDIRPLUS => {
            let (fh, offset, size) = read_in(f)?;
            Body::ReadDirPlus { fh, offset, size }
        }
        opcode::RELEASEDIR => Body::ReleaseDir {
            fh: release_in(f)?.0,
        },
        opcode::FSYNCDIR => {
            let (fh, datasync) = fsync_in(f)?;
            Body::FsyncDir { fh, datasync }
        }
        _ => return Err(Errno::ENOSYS),
    })
}

/// Extended attributes.
fn of_xattrs<'a>(opcode: u32, f: &mut Fields<'a>, layout: Layout) -> Result<Body<'a>, Errno> {
    Ok(match opcode {
        opcode::SETXATTR => {
            let (size, flags) = (f.u32()? as usize, f.u32()?);
            let mut setxattr_flags = 0;
            if layout.setxattr_ext {
                setxattr_flags = f.u32()?;
                f.skip(4)?;
            }
            if size > XATTR_SIZE_MAX {
                return Err(Errno::E2BIG);
            }
            let name = f.xattr_name()?;
            Body::SetXattr {
                name,
                flags,
                setxattr_flags,
                value: f.bytes(size)?,
            }
        }
        opcode::GETXATTR => {
            let size = f.u32()?;
            f.skip(4)?;
            Body::GetXattr {
                size,
                name: f.xattr_name()?,
            }
        }
        opcode::LISTXATTR => Body::ListXattr { size: f.u32()? },
        opcode::REMOVEXATTR => Body::RemoveXattr {
            name: f.xattr_name()?,
        },
        _ => return Err(Errno::ENOSYS),
    })
}

/// Locks.
fn of_locks<'a>(opcode: u32, f: &mut Fields<'a>) -> Result<Body<'a>, Errno> {
    Ok(match opcode {
        opcode::GETLK => Body::GetLk(lock(f)?),
        opcode::SETLK => Body::SetLk {
            lock: lock(f)?,
            wait: false,
        },
        opcode::SETLKW => Body::SetLk {
            lock: lock(f)?,
            wait: true,
        },
        _ => return Err(Errno::ENOSYS),
    })
}

/// What is about no single file.
fn of_the_session<'a>(opcode: u32, f: &mut Fields<'a>) -> Result<Body<'a>, Errno> {
    Ok(match opcode {
        opcode::FORGET => Body::Forget { nlookup: f.u64()? },
        opcode::BATCH_FORGET => {
            let count = f.u32()? as usize;
            f.skip(4)?;
            let length = count.checked_mul(16).ok_or(Errno::EINVAL)?;
            Body::BatchForget(Forgets(f.bytes(length)?))
        }
        opcode::STATFS => Body::StatFs,
        opcode::SYNCFS => Body::SyncFs,
        opcode::SETUPMAPPING => {
            let fh = f.u64()?;
            Body::SetupMapping {
                fh: (fh != NO_HANDLE).then_some(fh),
                foffset: f.u64()?,
                len: f.u64()?,
                flags: f.u64()?,
                moffset: f.u64()?,
            }
        }
        opcode::REMOVEMAPPING => {
            let count = f.u32()? as usize;
            // The structure has no padding after the count: 4 bytes, then the entries.
            let length = count.checked_mul(16).ok_or(Errno::EINVAL)?;
            Body::RemoveMapping(Ranges(f.bytes(length)?))
        }
        opcode::INTERRUPT => Body::Interrupt { unique: f.u64()? },
        opcode::INIT => init(f)?,
        opcode::DESTROY => Body::Destroy,
        _ => return Err(Errno::ENOSYS),
    })
}

/// `fuse_read_in`, up to what is looked at: handle, position, room.
fn read_in(f: &mut Fields<'_>) -> Result<(u64, u64, u32), Errno> {
    Ok((f.u64()?, f.u64()?, f.u32()?))
}

/// `fuse_fsync_in`: the handle, and whether the data alone is meant.
fn fsync_in(f: &mut Fields<'_>) -> Result<(u64, bool), Errno> {
    Ok((f.u64()?, f.u32()? & super::wire::flag::FSYNC_FDATASYNC != 0))
}

/// `fuse_release_in`: handle, its flags, whose locks go with it.
fn release_in(f: &mut Fields<'_>) -> Result<(u64, u32, u64), Errno> {
    let fh = f.u64()?;
    f.skip(4)?;
    Ok((fh, f.u32()?, f.u64()?))
}

/// `fuse_getattr_in` and the beginning of `fuse_statx_in`: an open file, if one is meant.
fn getattr_in(f: &mut Fields<'_>) -> Result<Option<u64>, Errno> {
    let flags = f.u32()?;
    f.skip(4)?;
    let fh = f.u64()?;
    Ok((flags & super::wire::flag::GETATTR_FH != 0).then_some(fh))
}

/// `fuse_create_in`: flags, mode, mask, further flags.
fn create_in(f: &mut Fields<'_>) -> Result<(u32, u32, u32, u32), Errno> {
    Ok((f.u32()?, f.u32()?, f.u32()?, f.u32()?))
}

fn init<'a>(f: &mut Fields<'_>) -> Result<Body<'a>, Errno> {
    let (major, minor, max_readahead, flags) = (f.u32()?, f.u32()?, f.u32()?, f.u32()?);
    // The second word came with 7.36 and counts only if the first says so.
    let more = if u64::from(flags) & super::wire::init::INIT_EXT != 0 {
        f.u32()?
    } else {
        0
    };
    let flags = u64::from(flags) | u64::from(more) << 32;
    Ok(Body::Init {
        major,
        minor,
        max_readahead,
        flags,
    })
}

fn set_attr(f: &mut Fields<'_>) -> Result<SetAttr, Errno> {
    let valid = f.u32()?;
    f.skip(4)?;
    let (fh, size) = (f.u64()?, f.u64()?);
    f.skip(8)?; // lock_owner: mandatory locks are gone from Linux
    let (atime, mtime) = (f.u64()?, f.u64()?);
    f.skip(8)?; // ctime: the host's file system sets it
    let (atime_nanos, mtime_nanos) = (f.u32()?, f.u32()?);
    f.skip(4)?;
    let mode = f.u32()?;
    f.skip(4)?;
    let (uid, gid) = (f.u32()?, f.u32()?);
    let time = |seconds: u64, nanos: u32| {
        if nanos >= 1_000_000_000 {
            return Err(Errno::EINVAL);
        }
        // Seconds before 1970 travel as two's complement.
        Ok(Time {
            seconds: seconds.cast_signed(),
            nanos,
        })
    };
    use super::wire::fattr;
    let or_zero = |bit: u32, seconds, nanos| match valid & bit {
        0 => time(0, 0),
        _ => time(seconds, nanos),
    };
    Ok(SetAttr {
        valid,
        fh,
        size,
        atime: or_zero(fattr::ATIME, atime, atime_nanos)?,
        mtime: or_zero(fattr::MTIME, mtime, mtime_nanos)?,
        mode,
        uid,
        gid,
    })
}

fn lock(f: &mut Fields<'_>) -> Result<Lock, Errno> {
    let (fh, owner, start, end) = (f.u64()?, f.u64()?, f.u64()?, f.u64()?);
    let (kind, pid, flags) = (f.u32()?, f.u32()?, f.u32()?);
    let known = [libc::F_RDLCK, libc::F_WRLCK, libc::F_UNLCK];
    if !known.iter().any(|k| i64::from(*k) == i64::from(kind)) || start > end {
        return Err(Errno::EINVAL);
    }
    let flock = flags & super::wire::flag::LK_FLOCK != 0;
    Ok(Lock {
        fh,
        owner,
        start,
        end,
        kind,
        pid,
        flock,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn header(opcode: u32) -> InHeader {
        InHeader {
            len: 0,
            opcode,
            unique: 7,
            nodeid: 1,
            uid: 0,
            gid: 0,
        }
    }

    fn decode_as(opcode: u32, body: &[u8]) -> Result<Body<'_>, Errno> {
        decode(header(opcode), body, Layout { setxattr_ext: true }).map(|r| r.body)
    }

    #[test]
    fn names_that_are_no_single_component_are_refused() {
        for bad in [&b""[..], b".", b"..", b"/", b"a/b", b"../x", b"/etc", b"a/"] {
            let body = [bad, b"\0"].concat();
            for opcode in [opcode::LOOKUP, opcode::UNLINK, opcode::RMDIR] {
                assert_eq!(decode_as(opcode, &body), Err(Errno::EINVAL), "{bad:?}");
            }
            let rename = [&[0; 8], &b"ok\0"[..], &body].concat();
            assert_eq!(
                decode_as(opcode::RENAME, &rename),
                Err(Errno::EINVAL),
                "{bad:?}"
            );
            let create = [&[0; 16], &body[..]].concat();
            assert_eq!(
                decode_as(opcode::CREATE, &create),
                Err(Errno::EINVAL),
                "{bad:?}"
            );
        }
        for fine in [&b"..."[..], b".a", b"a b", b"\xff\xfe"] {
            let body = [fine, b"\0"].concat();
            assert!(decode_as(opcode::LOOKUP, &body).is_ok(), "{fine:?}");
        }
        let long = [vec![b'x'; NAME_MAX + 1], vec![0]].concat();
        assert_eq!(decode_as(opcode::LOOKUP, &long), Err(Errno::ENAMETOOLONG));
        assert!(decode_as(opcode::LOOKUP, &long[1..]).is_ok());
        assert_eq!(
            decode_as(opcode::LOOKUP, b"unterminated"),
            Err(Errno::EINVAL)
        );
    }

    /// Bodies that are just long enough, by opcode.
    const SHORTEST: &[(u32, usize)] = &[
        (opcode::LOOKUP, 2),
        (opcode::FORGET, 8),
        (opcode::GETATTR, 16),
        (opcode::SETATTR, 84),
        (opcode::MKNOD, 18),
        (opcode::MKDIR, 10),
        (opcode::RENAME, 12),
        (opcode::RENAME2, 20),
        (opcode::LINK, 10),
        (opcode::OPEN, 8),
        (opcode::CREATE, 18),
        (opcode::READ, 20),
        (opcode::WRITE, 24),
        (opcode::FLUSH, 24),
        (opcode::FSYNC, 12),
        (opcode::RELEASE, 24),
        (opcode::SETXATTR, 18),
        (opcode::GETXATTR, 10),
        (opcode::LSEEK, 20),
        (opcode::FALLOCATE, 28),
        (opcode::COPY_FILE_RANGE, 56),
        (opcode::SETLK, 44),
        (opcode::INTERRUPT, 8),
        (opcode::INIT, 16),
    ];

    #[test]
    fn short_bodies_are_refused_at_every_length() {
        for (opcode, shortest) in SHORTEST {
            // Zeros as fixed fields, then names of one letter.
            let mut body = vec![0; *shortest];
            let names = match *opcode {
                opcode::RENAME | opcode::RENAME2 => 4,
                opcode::LOOKUP
                | opcode::MKNOD
                | opcode::MKDIR
                | opcode::LINK
                | opcode::CREATE
                | opcode::SETXATTR
                | opcode::GETXATTR => 2,
                _ => 0,
            };
            let at = body.len() - names;
            body[at..].copy_from_slice(&b"a\0b\0"[..names]);
            assert!(decode_as(*opcode, &body).is_ok(), "{opcode}");
            for len in 0..body.len() {
                assert!(
                    decode_as(*opcode, &body[..len]).is_err(),
                    "{opcode} with {len} bytes"
                );
            }
        }
    }

    #[test]
    fn counts_are_checked_against_what_is_there() {
        for count in [2u32, u32::MAX, 1 << 28] {
            let body = [&count.to_ne_bytes()[..], &[0; 4], &[0; 16]].concat();
            assert_eq!(decode_as(opcode::BATCH_FORGET, &body), Err(Errno::EINVAL));
        }
        let body = [
            &1u32.to_ne_bytes()[..],
            &[0; 4],
            &5u64.to_ne_bytes(),
            &9u64.to_ne_bytes(),
        ];
        let body = body.concat();
        let Ok(Body::BatchForget(forgets)) = decode_as(opcode::BATCH_FORGET, &body) else {
            panic!("a batch of one is fine");
        };
        assert_eq!(forgets.iter().collect::<Vec<_>>(), [(5, 9)]);

        let setxattr = |size: u32| [&size.to_ne_bytes()[..], &[0; 12], b"user.a\0", b"xy"].concat();
        assert!(decode_as(opcode::SETXATTR, &setxattr(2)).is_ok());
        assert_eq!(
            decode_as(opcode::SETXATTR, &setxattr(3)),
            Err(Errno::EINVAL)
        );
        assert_eq!(
            decode_as(opcode::SETXATTR, &setxattr(65537)),
            Err(Errno::E2BIG)
        );
    }

    #[test]
    fn impossible_times_and_locks_are_refused() {
        let mut body = [0u8; 88];
        body[0] = 1 << 4; // FATTR_ATIME
        body[56..60].copy_from_slice(&1_000_000_000u32.to_ne_bytes());
        assert_eq!(decode_as(opcode::SETATTR, &body), Err(Errno::EINVAL));
        body[56..60].copy_from_slice(&999_999_999u32.to_ne_bytes());
        body[32..40].copy_from_slice(&(-5i64).to_ne_bytes());
        let Ok(Body::SetAttr(set)) = decode_as(opcode::SETATTR, &body) else {
            panic!("a time before 1970 is fine");
        };
        assert_eq!(
            set.atime,
            Time {
                seconds: -5,
                nanos: 999_999_999
            }
        );

        let lock = |start: u64, end: u64, kind: u32| {
            [
                &[0; 16],
                &start.to_ne_bytes()[..],
                &end.to_ne_bytes(),
                &kind.to_ne_bytes(),
                &[0; 8],
            ]
            .concat()
        };
        assert!(decode_as(opcode::SETLK, &lock(1, 1, 0)).is_ok());
        assert_eq!(decode_as(opcode::SETLK, &lock(2, 1, 0)), Err(Errno::EINVAL));
        assert_eq!(decode_as(opcode::SETLK, &lock(1, 2, 3)), Err(Errno::EINVAL));
    }

    #[test]
    fn no_bytes_make_the_decoder_panic() {
        // A xorshift generator: the same bytes in each run, so that a failure can be repeated.
        let mut state = 0x9e37_79b9_7f4a_7c15u64;
        let mut next = || {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            state
        };
        let mut body = vec![0u8; 256];
        for round in 0..200_000u32 {
            for chunk in body.chunks_exact_mut(8) {
                chunk.copy_from_slice(&next().to_ne_bytes());
            }
            let len = next() as usize % body.len();
            let ext = round & 1 == 0;
            let _ = decode(
                header(round % 60),
                &body[..len],
                Layout { setxattr_ext: ext },
            );
        }
    }
}
