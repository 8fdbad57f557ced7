//! Page faults that this process answers (`userfaultfd(2)`).
//!
//! **Job.** The calls of one userfaultfd, of this process's memory or another's, with the layouts of
//! `include/uapi/linux/userfaultfd.h`.
//!
//! **Who is not trusted**: a device process whose memory is watched. It chose the addresses that the kernel reports, so whoever reads
//! them looks each up in a table of their own; a call about its memory may fail in any way, and that is its own loss.
//!
//! **Why this way.** Seven calls with plain structures do not need a library with its own types for each, and the filter of the
//! thread that uses them names exactly these.

#![allow(unsafe_code)] // userfaultfd has no wrapper here; see each block

use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, ppoll};
use nix::sys::time::TimeSpec;

/// Bytes of the smallest page.
pub(super) const PAGE: u64 = 4096;

const UFFD_API: u64 = 0xAA;
/// A write to a page that is protected is told apart.
pub(super) const FEATURE_PAGEFAULT_FLAG_WP: u64 = 1 << 0;
/// Pages that shared memory does not have.
pub(super) const FEATURE_MISSING_SHMEM: u64 = 1 << 5;
/// Pages that shared memory has and this mapping has not.
pub(super) const FEATURE_MINOR_SHMEM: u64 = 1 << 10;
/// Write protection of files' pages.
pub(super) const FEATURE_WP_HUGETLBFS_SHMEM: u64 = 1 << 12;

/// `UFFDIO_REGISTER_MODE_MISSING`
pub(super) const MISSING: u64 = 1;
/// `UFFDIO_REGISTER_MODE_WP`
pub(super) const WRITE_PROTECT: u64 = 2;
/// `UFFDIO_REGISTER_MODE_MINOR`
pub(super) const MINOR: u64 = 4;

const UFFD_EVENT_PAGEFAULT: u8 = 0x12;
const UFFDIO_API: u64 = 0xC018_AA3F;
const UFFDIO_REGISTER: u64 = 0xC020_AA00;
const UFFDIO_UNREGISTER: u64 = 0x8010_AA01;
const UFFDIO_WAKE: u64 = 0x8010_AA02;
const UFFDIO_COPY: u64 = 0xC028_AA03;
const UFFDIO_ZEROPAGE: u64 = 0xC020_AA04;
const UFFDIO_CONTINUE: u64 = 0xC020_AA07;
const UFFDIO_CONTINUE_MODE_WP: u64 = 2;
/// Bytes of `struct uffd_msg`; the fault's flags are at 8, its address at 16.
const MESSAGE: usize = 32;

/// Somebody waits for a page.
#[derive(Debug, Clone, Copy)]
pub(super) struct Fault {
    /// Where, in whosever memory it is; not rounded.
    pub(super) address: u64,
    flags: u64,
}

impl Fault {
    /// The page of a file is there, the mapping has not got it, and it is to be read.
    pub(super) const fn reads_what_is_there(self) -> bool {
        // UFFD_PAGEFAULT_FLAG_MINOR without _WRITE and _WP.
        self.flags & 7 == 4
    }
}

/// One userfaultfd.
#[derive(Debug)]
pub(super) struct Uffd(OwnedFd);

impl Uffd {
    /// One of this process's memory, for faults in the kernel as well, with `features`.
    ///
    /// # Errors
    /// This host has none for this process, or none of these.
    pub(super) fn new(features: u64) -> Result<Self, Errno> {
        // SAFETY: makes a descriptor, takes no pointer.
        let fd =
            unsafe { libc::syscall(libc::SYS_userfaultfd, libc::O_CLOEXEC | libc::O_NONBLOCK) };
        let fd = i32::try_from(Errno::result(fd)?).map_err(|_| Errno::EBADF)?;
        // SAFETY: the kernel just gave us this descriptor and nothing else owns it.
        Self(unsafe { OwnedFd::from_raw_fd(fd) }).with(features)
    }

    /// `fd` is one of another process's memory, which has said by itself which features it has.
    pub(super) const fn of(fd: OwnedFd) -> Self {
        Self(fd)
    }

    fn with(self, features: u64) -> Result<Self, Errno> {
        // struct uffdio_api: version, features, ioctls.
        let mut api = [UFFD_API, features, 0];
        self.call(UFFDIO_API, &mut api)?;
        Ok(self)
    }

    /// Has faults of a mapping told here.
    pub(super) fn register(&self, start: u64, length: u64, mode: u64) -> Result<(), Errno> {
        // struct uffdio_register: start, length, mode, ioctls.
        self.call(UFFDIO_REGISTER, &mut [start, length, mode, 0])
    }

    /// The kernel answers faults by itself again; wakes who waits.
    pub(super) fn unregister(&self, start: u64, length: u64) -> Result<(), Errno> {
        self.call(UFFDIO_UNREGISTER, &mut [start, length])
    }

    /// Has who waits for these pages ask again.
    pub(super) fn wake(&self, start: u64, length: u64) {
        // There is nothing else to be done for who waits.
        let _ = self.call(UFFDIO_WAKE, &mut [start, length]);
    }

    /// Adds a zero page where there is none.
    pub(super) fn zero_page(&self, address: u64) {
        // struct uffdio_zeropage: start, length, mode, result. There may be a page by now.
        let _ = self.call(UFFDIO_ZEROPAGE, &mut [address & !(PAGE - 1), PAGE, 0, 0]);
    }

    /// Adds pages with `bytes` where there are none; tells the bytes that were copied with an error.
    pub(super) fn copy(&self, to: u64, bytes: &[u8]) -> Result<(), (Errno, u64)> {
        // struct uffdio_copy: destination, source, length, mode, result.
        let mut copy = [to, bytes.as_ptr() as u64, bytes.len() as u64, 0, 0];
        self.call(UFFDIO_COPY, &mut copy)
            .map_err(|e| (e, u64::try_from(copy[4].cast_signed()).unwrap_or(0)))
    }

    /// Maps pages that their file has, so that a write is told; tells the bytes that were mapped with an error.
    pub(super) fn map_protected(&self, start: u64, length: u64) -> Result<(), (Errno, u64)> {
        // struct uffdio_continue: start, length, mode, result.
        let mut range = [start, length, UFFDIO_CONTINUE_MODE_WP, 0];
        self.call(UFFDIO_CONTINUE, &mut range)
            .map_err(|e| (e, u64::try_from(range[3].cast_signed()).unwrap_or(0)))
    }

    /// Whether something waits to be read, as far as the descriptor says.
    pub(super) fn has_news(&self) -> bool {
        let mut polled = [PollFd::new(self.0.as_fd(), PollFlags::POLLIN)];
        ppoll(&mut polled, Some(TimeSpec::new(0, 0)), None).is_ok()
            && polled[0]
                .revents()
                .is_some_and(|events| events.contains(PollFlags::POLLIN))
    }

    /// The next fault, if one waits. Whatever else is told ends the turn, so that who tells a lot keeps nobody here.
    pub(super) fn fault(&self) -> Option<Fault> {
        let mut message = [0; MESSAGE];
        let told = nix::unistd::read(&self.0, &mut message) == Ok(MESSAGE);
        let word = |at: usize| {
            let mut bytes = [0; 8];
            bytes.copy_from_slice(&message[at..at + 8]);
            u64::from_ne_bytes(bytes)
        };
        (told && message[0] == UFFD_EVENT_PAGEFAULT).then(|| Fault {
            address: word(16),
            flags: word(8),
        })
    }

    fn call<const WORDS: usize>(
        &self,
        request: u64,
        words: &mut [u64; WORDS],
    ) -> Result<(), Errno> {
        // SAFETY: the structure lives on the caller's stack and has the size that the request's number names. What it does is to
        // add pages to watched mappings where none are, to watch mappings or leave off, and to wake who waits: no memory that
        // Rust code refers to changes what it holds.
        Errno::result(unsafe { libc::ioctl(self.0.as_raw_fd(), request as _, words.as_mut_ptr()) })
            .map(drop)
    }
}

impl AsFd for Uffd {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A device process may send any descriptor, one that waits in `read` too.
    #[test]
    fn what_has_nothing_to_say_is_not_waited_for() {
        let (reader, mut writer) = std::io::pipe().unwrap();
        let other = Uffd::of(reader.into());
        assert!(!other.has_news());
        std::io::Write::write_all(&mut writer, &[UFFD_EVENT_PAGEFAULT; MESSAGE]).unwrap();
        assert!(other.has_news() && other.fault().is_some());
        drop(writer);
        assert!(!other.has_news(), "an end is no news");
    }
}
