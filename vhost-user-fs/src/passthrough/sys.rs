//! System calls that no dependency wraps, as functions with owners and borrows instead of numbers and pointers.
//!
//! **Job.** All `unsafe` of this crate. No policy: what may be called when is said by the callers.
//! **Who is not trusted.** Names are checked by [`Name`]'s type; buffers are this process's own.
//! **Why this way.** The list of functions here is the list of what a request can make this process do to files.

#![allow(unsafe_code)] // raw system calls on descriptors and buffers that the arguments' types keep alive

use std::ffi::{CStr, c_int, c_uint};
use std::mem::MaybeUninit;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};

use nix::errno::Errno;

use crate::fuse::Name;
use crate::fuse::decode::{Time, XattrName};

/// `include/uapi/linux/openat2.h`: how a single component is looked up. It can lead neither out of its folder, nor through a
/// magic link, nor through a symbolic link; a symbolic link itself is opened with `O_PATH | O_NOFOLLOW` only.
const RESOLVE: u64 =
    libc::RESOLVE_BENEATH | libc::RESOLVE_NO_MAGICLINKS | libc::RESOLVE_NO_SYMLINKS;

/// Text of a descriptor's number, for the folder of this process's own descriptors.
struct Number([u8; 12]);

impl Number {
    fn new(fd: BorrowedFd<'_>) -> Self {
        let mut text = [0; 12];
        // Descriptors are not negative, and have at most ten digits.
        let mut rest = fd.as_raw_fd().unsigned_abs();
        let mut digits = [0; 10];
        let mut count = 0;
        loop {
            digits[count] = b'0' + (rest % 10) as u8;
            count += 1;
            rest /= 10;
            if rest == 0 {
                break;
            }
        }
        for (to, from) in text.iter_mut().zip(digits[..count].iter().rev()) {
            *to = *from;
        }
        Self(text)
    }

    fn as_ptr(&self) -> *const libc::c_char {
        self.0.as_ptr().cast()
    }
}

fn descriptor(result: libc::c_long) -> Result<OwnedFd, Errno> {
    let number = Errno::result(result)?;
    // SAFETY: the kernel just made this descriptor for us; nobody else knows it. It fits, being a descriptor.
    Ok(unsafe { OwnedFd::from_raw_fd(number as RawFd) })
}

fn done(result: c_int) -> Result<(), Errno> {
    Errno::result(result).map(drop)
}

/// A count that a call returned.
fn count(result: isize) -> Result<usize, Errno> {
    // Not negative after the check.
    Errno::result(result).map(|n| n as usize)
}

/// Opens `name` in `folder` by openat2(2), beneath it and through no link at all. `O_NOFOLLOW | O_CLOEXEC` are always set.
pub(crate) fn open_beneath(
    folder: BorrowedFd<'_>,
    name: Name<'_>,
    flags: c_int,
    mode: u32,
) -> Result<OwnedFd, Errno> {
    // SAFETY: open_how is three integers; all zero is what the kernel demands of fields that it may add.
    let mut how: libc::open_how = unsafe { MaybeUninit::zeroed().assume_init() };
    // Open flags are not negative.
    how.flags = (flags | libc::O_NOFOLLOW | libc::O_CLOEXEC) as u64;
    how.mode = u64::from(mode);
    how.resolve = RESOLVE;
    // SAFETY: the name is a terminated string, `how` has the size that is told.
    descriptor(unsafe {
        libc::syscall(
            libc::SYS_openat2,
            folder.as_raw_fd(),
            name.as_c_str().as_ptr(),
            &raw const how,
            size_of_val(&how),
        )
    })
}

/// As [`open_beneath`], with `O_PATH` and several components, which were checked one by one.
pub(crate) fn find_beneath(folder: BorrowedFd<'_>, path: &CStr) -> Result<OwnedFd, Errno> {
    // SAFETY: as in `open_beneath`.
    let mut how: libc::open_how = unsafe { MaybeUninit::zeroed().assume_init() };
    // Open flags are not negative.
    how.flags = (libc::O_PATH | libc::O_NOFOLLOW | libc::O_CLOEXEC) as u64;
    how.resolve = RESOLVE;
    // SAFETY: a terminated string, `how` has the size that is told.
    descriptor(unsafe {
        libc::syscall(
            libc::SYS_openat2,
            folder.as_raw_fd(),
            path.as_ptr(),
            &raw const how,
            size_of_val(&how),
        )
    })
}

/// preadv(2) into one buffer.
pub(crate) fn read_at(file: BorrowedFd<'_>, out: &mut [u8], offset: u64) -> Result<usize, Errno> {
    let part = libc::iovec {
        iov_base: out.as_mut_ptr().cast(),
        iov_len: out.len(),
    };
    let offset = libc::off_t::try_from(offset).map_err(|_| Errno::EINVAL)?;
    // SAFETY: one part, which is writable for its length.
    count(unsafe { libc::preadv(file.as_raw_fd(), &raw const part, 1, offset) })
}

/// pwritev2(2) of one buffer.
pub(crate) fn write_at(file: BorrowedFd<'_>, bytes: &[u8], offset: u64) -> Result<usize, Errno> {
    let part = libc::iovec {
        iov_base: bytes.as_ptr().cast_mut().cast(),
        iov_len: bytes.len(),
    };
    let offset = libc::off_t::try_from(offset).map_err(|_| Errno::EINVAL)?;
    // SAFETY: one part, which is readable for its length and not written to.
    count(unsafe { libc::pwritev2(file.as_raw_fd(), &raw const part, 1, offset, 0) })
}

/// This process's own descriptors as a folder: `/proc/self/fd`, and nothing above or beside it.
#[derive(Debug)]
pub struct OwnFds(OwnedFd);

impl OwnFds {
    /// `folder` must be `/proc/self/fd` of this process.
    pub fn new(folder: OwnedFd) -> Self {
        Self(folder)
    }

    /// Opens the file behind `fd` anew. The caller knows its type: only regular files and folders may be opened without
    /// `O_PATH`.
    pub(crate) fn reopen(&self, fd: BorrowedFd<'_>, flags: c_int) -> Result<OwnedFd, Errno> {
        let number = Number::new(fd);
        let flags = (flags | libc::O_CLOEXEC) & !libc::O_NOFOLLOW;
        // SAFETY: a terminated string. Without O_CREAT and O_TMPFILE there is no fourth argument, and with O_TMPFILE the mode
        // is given by `tmpfile`.
        descriptor(unsafe {
            libc::syscall(
                libc::SYS_openat,
                self.0.as_raw_fd(),
                number.as_ptr(),
                flags,
                0,
            )
        })
    }

    /// Where the file behind `fd` is now, as this process would name it: readlinkat(2). A text that fills `out` may have been cut.
    pub(crate) fn path(&self, fd: BorrowedFd<'_>, out: &mut [u8]) -> Result<usize, Errno> {
        let number = Number::new(fd);
        // SAFETY: a terminated string; `out` is writable for its length.
        count(unsafe {
            libc::readlinkat(
                self.0.as_raw_fd(),
                number.as_ptr(),
                out.as_mut_ptr().cast(),
                out.len(),
            )
        })
    }

    /// A file without a name in the folder behind `fd`.
    pub(crate) fn tmpfile(
        &self,
        fd: BorrowedFd<'_>,
        flags: c_int,
        mode: u32,
    ) -> Result<OwnedFd, Errno> {
        let number = Number::new(fd);
        let flags = flags | libc::O_TMPFILE | libc::O_CLOEXEC;
        // SAFETY: a terminated string.
        descriptor(unsafe {
            libc::syscall(
                libc::SYS_openat,
                self.0.as_raw_fd(),
                number.as_ptr(),
                flags,
                mode,
            )
        })
    }

    /// fchmodat(2) of the file behind `fd`, which may be `O_PATH`.
    pub(crate) fn chmod(&self, fd: BorrowedFd<'_>, mode: u32) -> Result<(), Errno> {
        let number = Number::new(fd);
        // SAFETY: a terminated string. Raw, since libc's may look at flags that the kernel's call does not have.
        let result = unsafe {
            libc::syscall(
                libc::SYS_fchmodat,
                self.0.as_raw_fd(),
                number.as_ptr(),
                mode,
            )
        };
        Errno::result(result).map(drop)
    }

    /// utimensat(2); `None` leaves a time as it is, a `Some(None)` sets it to now.
    pub(crate) fn set_times(
        &self,
        fd: BorrowedFd<'_>,
        times: [Option<Option<Time>>; 2],
    ) -> Result<(), Errno> {
        let times = times.map(|time| libc::timespec {
            tv_sec: time.flatten().map_or(0, |t| t.seconds),
            tv_nsec: match time {
                None => libc::UTIME_OMIT,
                Some(None) => libc::UTIME_NOW,
                Some(Some(t)) => i64::from(t.nanos),
            },
        });
        let number = Number::new(fd);
        // SAFETY: a terminated string and two timespecs.
        done(unsafe { libc::utimensat(self.0.as_raw_fd(), number.as_ptr(), times.as_ptr(), 0) })
    }

    /// Gives the file behind `fd` one more name.
    pub(crate) fn link(
        &self,
        fd: BorrowedFd<'_>,
        folder: BorrowedFd<'_>,
        name: Name<'_>,
    ) -> Result<(), Errno> {
        let number = Number::new(fd);
        // SAFETY: two terminated strings. The first is followed to the file itself, whatever its type.
        done(unsafe {
            libc::linkat(
                self.0.as_raw_fd(),
                number.as_ptr(),
                folder.as_raw_fd(),
                name.as_c_str().as_ptr(),
                libc::AT_SYMLINK_FOLLOW,
            )
        })
    }
}

// The calls for extended attributes take no folder, so they rely on the working folder being `OwnFds`.

/// Makes `own` the working folder, which the calls for extended attributes need.
pub(crate) fn work_in(own: &OwnFds) -> Result<(), Errno> {
    nix::unistd::fchdir(&own.0)
}

/// getxattr(2) of the file behind `fd`; an empty `value` asks for the size.
pub(crate) fn get_xattr(
    fd: BorrowedFd<'_>,
    name: XattrName<'_>,
    value: &mut [u8],
) -> Result<usize, Errno> {
    let number = Number::new(fd);
    // SAFETY: terminated strings; `value` is writable for its length.
    count(unsafe {
        libc::getxattr(
            number.as_ptr(),
            name.as_c_str().as_ptr(),
            value.as_mut_ptr().cast(),
            value.len(),
        )
    })
}

/// setxattr(2).
pub(crate) fn set_xattr(
    fd: BorrowedFd<'_>,
    name: XattrName<'_>,
    value: &[u8],
    flags: c_int,
) -> Result<(), Errno> {
    let number = Number::new(fd);
    // SAFETY: terminated strings; `value` is readable for its length.
    done(unsafe {
        libc::setxattr(
            number.as_ptr(),
            name.as_c_str().as_ptr(),
            value.as_ptr().cast(),
            value.len(),
            flags,
        )
    })
}

/// listxattr(2); an empty `list` asks for the size.
pub(crate) fn list_xattr(fd: BorrowedFd<'_>, list: &mut [u8]) -> Result<usize, Errno> {
    let number = Number::new(fd);
    // SAFETY: a terminated string; `list` is writable for its length.
    count(unsafe { libc::listxattr(number.as_ptr(), list.as_mut_ptr().cast(), list.len()) })
}

/// removexattr(2).
pub(crate) fn remove_xattr(fd: BorrowedFd<'_>, name: XattrName<'_>) -> Result<(), Errno> {
    let number = Number::new(fd);
    // SAFETY: terminated strings.
    done(unsafe { libc::removexattr(number.as_ptr(), name.as_c_str().as_ptr()) })
}

const STATX_FLAGS: c_int = libc::AT_SYMLINK_NOFOLLOW | libc::AT_NO_AUTOMOUNT;
const STATX_MASK: c_uint = libc::STATX_BASIC_STATS | libc::STATX_BTIME | libc::STATX_MNT_ID;

fn statx(folder: BorrowedFd<'_>, path: &CStr, flags: c_int) -> Result<libc::statx, Errno> {
    let mut out = MaybeUninit::<libc::statx>::zeroed();
    // SAFETY: a terminated string and room for one statx.
    done(unsafe {
        libc::statx(
            folder.as_raw_fd(),
            path.as_ptr(),
            STATX_FLAGS | flags,
            STATX_MASK,
            out.as_mut_ptr(),
        )
    })?;
    // SAFETY: integers only, which were zeroed and then filled.
    Ok(unsafe { out.assume_init() })
}

/// statx(2) of the file behind `fd`.
pub(crate) fn stat(fd: BorrowedFd<'_>) -> Result<libc::statx, Errno> {
    statx(fd, c"", libc::AT_EMPTY_PATH)
}

/// statx(2) of `name` in `folder`, following nothing: it can be a file of that folder only.
pub(crate) fn stat_at(folder: BorrowedFd<'_>, name: Name<'_>) -> Result<libc::statx, Errno> {
    statx(folder, name.as_c_str(), 0)
}

/// readlinkat(2) of the link behind `fd`. A target that fills `out` may have been cut.
pub(crate) fn read_link(fd: BorrowedFd<'_>, out: &mut [u8]) -> Result<usize, Errno> {
    // SAFETY: a terminated string; `out` is writable for its length.
    count(unsafe {
        libc::readlinkat(
            fd.as_raw_fd(),
            c"".as_ptr(),
            out.as_mut_ptr().cast(),
            out.len(),
        )
    })
}

/// symlinkat(2). The target is the guest's to resolve; nothing here follows it.
pub(crate) fn symlink(target: &CStr, folder: BorrowedFd<'_>, name: Name<'_>) -> Result<(), Errno> {
    // SAFETY: terminated strings.
    done(unsafe {
        libc::symlinkat(
            target.as_ptr(),
            folder.as_raw_fd(),
            name.as_c_str().as_ptr(),
        )
    })
}

/// mknodat(2).
pub(crate) fn make_node(
    folder: BorrowedFd<'_>,
    name: Name<'_>,
    mode: u32,
    (major, minor): (u32, u32),
) -> Result<(), Errno> {
    // SAFETY: a terminated string.
    done(unsafe {
        libc::mknodat(
            folder.as_raw_fd(),
            name.as_c_str().as_ptr(),
            mode,
            libc::makedev(major, minor),
        )
    })
}

/// mkdirat(2).
pub(crate) fn make_folder(folder: BorrowedFd<'_>, name: Name<'_>, mode: u32) -> Result<(), Errno> {
    // SAFETY: a terminated string.
    done(unsafe { libc::mkdirat(folder.as_raw_fd(), name.as_c_str().as_ptr(), mode) })
}

/// unlinkat(2) of a file, or of an empty folder if `folder_wanted`.
pub(crate) fn unlink(
    folder: BorrowedFd<'_>,
    name: Name<'_>,
    folder_wanted: bool,
) -> Result<(), Errno> {
    let flags = if folder_wanted { libc::AT_REMOVEDIR } else { 0 };
    // SAFETY: a terminated string.
    done(unsafe { libc::unlinkat(folder.as_raw_fd(), name.as_c_str().as_ptr(), flags) })
}

/// renameat2(2).
pub(crate) fn rename(
    from: (BorrowedFd<'_>, Name<'_>),
    to: (BorrowedFd<'_>, Name<'_>),
    flags: c_uint,
) -> Result<(), Errno> {
    // SAFETY: terminated strings.
    let result = unsafe {
        libc::syscall(
            libc::SYS_renameat2,
            from.0.as_raw_fd(),
            from.1.as_c_str().as_ptr(),
            to.0.as_raw_fd(),
            to.1.as_c_str().as_ptr(),
            flags,
        )
    };
    Errno::result(result).map(drop)
}

/// fchownat(2) of the file behind `fd`; `None` leaves an id as it is.
pub(crate) fn chown(fd: BorrowedFd<'_>, uid: Option<u32>, gid: Option<u32>) -> Result<(), Errno> {
    // SAFETY: a terminated string.
    done(unsafe {
        libc::fchownat(
            fd.as_raw_fd(),
            c"".as_ptr(),
            uid.unwrap_or(u32::MAX),
            gid.unwrap_or(u32::MAX),
            libc::AT_EMPTY_PATH,
        )
    })
}

/// ftruncate(2).
pub(crate) fn truncate(file: BorrowedFd<'_>, size: u64) -> Result<(), Errno> {
    let size = i64::try_from(size).map_err(|_| Errno::EFBIG)?;
    // SAFETY: no pointers.
    done(unsafe { libc::ftruncate(file.as_raw_fd(), size) })
}

/// fsync(2) or fdatasync(2).
pub(crate) fn sync(file: BorrowedFd<'_>, data_only: bool) -> Result<(), Errno> {
    // SAFETY: no pointers.
    done(unsafe {
        if data_only {
            libc::fdatasync(file.as_raw_fd())
        } else {
            libc::fsync(file.as_raw_fd())
        }
    })
}

/// syncfs(2).
pub(crate) fn sync_file_system(file: BorrowedFd<'_>) -> Result<(), Errno> {
    // SAFETY: no pointers.
    done(unsafe { libc::syncfs(file.as_raw_fd()) })
}

/// lseek(2).
pub(crate) fn seek(file: BorrowedFd<'_>, offset: u64, whence: c_int) -> Result<u64, Errno> {
    let offset = i64::try_from(offset).map_err(|_| Errno::EINVAL)?;
    // SAFETY: no pointers.
    let at = Errno::result(unsafe { libc::lseek(file.as_raw_fd(), offset, whence) })?;
    Ok(at.cast_unsigned())
}

/// fallocate(2).
pub(crate) fn allocate(
    file: BorrowedFd<'_>,
    mode: u32,
    offset: u64,
    length: u64,
) -> Result<(), Errno> {
    let number = |n: u64| i64::try_from(n).map_err(|_| Errno::EFBIG);
    let (offset, length) = (number(offset)?, number(length)?);
    // SAFETY: no pointers.
    done(unsafe { libc::fallocate(file.as_raw_fd(), mode.cast_signed(), offset, length) })
}

/// copy_file_range(2) between two offsets.
pub(crate) fn copy_range(
    from: (BorrowedFd<'_>, u64),
    to: (BorrowedFd<'_>, u64),
    length: usize,
    flags: c_uint,
) -> Result<usize, Errno> {
    let number = |n: u64| i64::try_from(n).map_err(|_| Errno::EINVAL);
    let (mut at, mut onto) = (number(from.1)?, number(to.1)?);
    // SAFETY: two writable offsets.
    count(unsafe {
        libc::copy_file_range(
            from.0.as_raw_fd(),
            &raw mut at,
            to.0.as_raw_fd(),
            &raw mut onto,
            length,
            flags,
        )
    })
}

/// getdents64(2).
pub(crate) fn read_entries(folder: BorrowedFd<'_>, out: &mut [u8]) -> Result<usize, Errno> {
    // SAFETY: `out` is writable for its length.
    let result = unsafe {
        libc::syscall(
            libc::SYS_getdents64,
            folder.as_raw_fd(),
            out.as_mut_ptr(),
            out.len(),
        )
    };
    Errno::result(result).map(|n| n as usize)
}

/// fstatfs(2).
pub(crate) fn stat_file_system(fd: BorrowedFd<'_>) -> Result<libc::statfs, Errno> {
    let mut out = MaybeUninit::<libc::statfs>::zeroed();
    // SAFETY: room for one statfs.
    done(unsafe { libc::fstatfs(fd.as_raw_fd(), out.as_mut_ptr()) })?;
    // SAFETY: integers only, which were zeroed and then filled.
    Ok(unsafe { out.assume_init() })
}

/// flock(2) without waiting.
pub(crate) fn flock(file: BorrowedFd<'_>, operation: c_int) -> Result<(), Errno> {
    // SAFETY: no pointers.
    done(unsafe { libc::flock(file.as_raw_fd(), operation | libc::LOCK_NB) })
}

/// A lock on a range of an open file description: `F_OFD_SETLK` or `F_OFD_GETLK`.
pub(crate) fn range_lock(
    file: BorrowedFd<'_>,
    command: c_int,
    lock: &mut libc::flock,
) -> Result<(), Errno> {
    // SAFETY: one writable flock structure.
    done(unsafe { libc::fcntl(file.as_raw_fd(), command, std::ptr::from_mut(lock)) })
}

/// Makes this thread's effective user `uid` and group `gid`, and with them its file system ids. Raw, because libc's would
/// change all threads.
pub(crate) fn become_group(gid: u32) -> Result<(), Errno> {
    // SAFETY: no pointers.
    Errno::result(unsafe { libc::syscall(libc::SYS_setresgid, u32::MAX, gid, u32::MAX) }).map(drop)
}

/// See [`become_group`].
pub(crate) fn become_user(uid: u32) -> Result<(), Errno> {
    // SAFETY: no pointers.
    Errno::result(unsafe { libc::syscall(libc::SYS_setresuid, u32::MAX, uid, u32::MAX) }).map(drop)
}

/// Nanoseconds since 1970 by the clock that file systems stamp with.
pub(crate) fn coarse_time() -> u64 {
    let mut now = libc::timespec {
        tv_sec: 0,
        tv_nsec: 0,
    };
    // SAFETY: one writable timespec; the clock always exists.
    unsafe { libc::clock_gettime(libc::CLOCK_REALTIME_COARSE, &raw mut now) };
    // Not negative between 1970 and 2262.
    now.tv_sec.cast_unsigned() * 1_000_000_000 + now.tv_nsec.cast_unsigned()
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::fd::AsFd;

    #[test]
    fn numbers_are_decimal_and_terminated() {
        for number in [0, 7, 10, 42, 1_000_000, i32::MAX] {
            // SAFETY: only its number is looked at.
            let fd = unsafe { BorrowedFd::borrow_raw(number) };
            let text = Number::new(fd);
            let text = CStr::from_bytes_until_nul(&text.0).unwrap();
            assert_eq!(text.to_str().unwrap(), number.to_string());
        }
    }

    #[test]
    fn no_link_is_followed_and_no_folder_left() {
        let dir = tempfile::tempdir().unwrap();
        std::os::unix::fs::symlink("/etc/passwd", dir.path().join("link")).unwrap();
        std::fs::write(dir.path().join("file"), b"x").unwrap();
        let folder = OwnedFd::from(std::fs::File::open(dir.path()).unwrap());
        let open =
            |name: &CStr, flags| open_beneath(folder.as_fd(), Name::new(name).unwrap(), flags, 0);
        assert!(open(c"file", libc::O_RDONLY).is_ok());
        assert_eq!(open(c"link", libc::O_RDONLY).unwrap_err(), Errno::ELOOP);
        let link = open(c"link", libc::O_PATH).unwrap();
        assert_eq!(
            u32::from(stat(link.as_fd()).unwrap().stx_mode) & libc::S_IFMT,
            libc::S_IFLNK
        );
    }
}
