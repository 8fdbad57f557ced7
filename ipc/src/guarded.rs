//! A file mapped between guards.
//!
//! **Job.** Maps memory that processes share (guest RAM, in-flight regions) where nothing else is near: in front of it and behind
//! it lie [`RAM_GUARD`] bytes of addresses that fault when touched.
//!
//! **Who is not trusted.** Arithmetic on lengths and offsets that a guest or a peer chose. Whatever 32-bit number went unchecked
//! ends the process in a guard, and neither reads nor writes what else it holds.
//!
//! **Why this way.** One place for every process that maps guest RAM, so that it is a property of each build and not of one for
//! tests. The room is reserved first and the file put into it in one step, so that no other mapping gets in between. It costs
//! addresses only: one more call, no memory.

#![allow(unsafe_code)] // mmap and munmap

use std::num::NonZeroUsize;
use std::os::fd::AsFd;
use std::ptr::NonNull;

use nix::errno::Errno;
use nix::libc;
use nix::sys::mman::{MapFlags, ProtFlags, mmap, mmap_anonymous, munmap};
use thiserror::Error;

use crate::limits::RAM_GUARD;

/// Why a file was not mapped.
#[derive(Debug, Error)]
pub enum GuardedError {
    /// No bytes, or more than there are addresses.
    #[error("{size} bytes cannot be mapped")]
    Size {
        /// The size that was asked for.
        size: u64,
    },
    /// The offset is beyond what a file can have.
    #[error("offset {offset:#x} is beyond any file")]
    Offset {
        /// The offset that was asked for.
        offset: u64,
    },
    /// There is no room of that size, with its guards.
    #[error("no room for {size} bytes between guards")]
    Room {
        /// Bytes with both guards.
        size: usize,
        /// What the kernel said.
        source: Errno,
    },
    /// The file cannot be mapped.
    #[error("the file cannot be mapped")]
    Map(#[source] Errno),
}

impl GuardedError {
    /// What the kernel said, if it was asked.
    #[must_use]
    pub fn errno(&self) -> Option<Errno> {
        match self {
            Self::Room { source, .. } | Self::Map(source) => Some(*source),
            Self::Size { .. } | Self::Offset { .. } => None,
        }
    }
}

/// Bytes of the smallest page of any processor that this runs on.
const PAGE: usize = 4096;
/// Where pages of a file have to begin: those of an ordinary one can then be huge pages; a file system of huge pages may want more.
/// Not more than that for all files, since every bit of it makes the place easier to guess.
const ALIGNMENTS: [usize; 2] = [2 << 20, 1 << 30];

/// A shared mapping of a part of a file, readable and writable, between two guards. All of it is unmapped when dropped.
#[derive(Debug)]
pub struct Guarded {
    address: NonNull<libc::c_void>,
    size: NonZeroUsize,
    _room: Room,
}

impl Guarded {
    /// Maps `size` bytes of `file` from `offset` on, never executable. The file may be closed then.
    ///
    /// # Errors
    /// A size of nothing or too much, an offset that is no offset of a file or is not a multiple of its page, no room.
    pub fn new(file: impl AsFd, offset: u64, size: u64) -> Result<Self, GuardedError> {
        let file_offset =
            libc::off_t::try_from(offset).map_err(|_| GuardedError::Offset { offset })?;
        let len = usize::try_from(size)
            .ok()
            .and_then(NonZeroUsize::new)
            .ok_or(GuardedError::Size { size })?;
        let mut last = Errno::EINVAL;
        for alignment in ALIGNMENTS {
            let room = len
                .get()
                .checked_next_multiple_of(PAGE)
                .and_then(|whole| whole.checked_add(2 * RAM_GUARD + alignment))
                .and_then(NonZeroUsize::new)
                .ok_or(GuardedError::Size { size })?;
            let room = Room::new(room).map_err(|source| GuardedError::Room {
                size: room.get(),
                source,
            })?;
            // As far into a huge page as the file is, so that the two can be the same pages.
            let into = usize::try_from(offset % alignment as u64).unwrap_or(0);
            let first = room.start.as_ptr() as usize + RAM_GUARD;
            let place = first + (into.wrapping_sub(first) & (alignment - 1));
            // SAFETY: the range is inside of the room that was just made, with a guard before and behind it, and nothing
            // refers to it. It is replaced in one step, so that no other thread's mapping can get in between.
            let mapped = unsafe {
                mmap(
                    NonZeroUsize::new(place),
                    len,
                    ProtFlags::PROT_READ | ProtFlags::PROT_WRITE,
                    MapFlags::MAP_SHARED | MapFlags::MAP_NORESERVE | MapFlags::MAP_FIXED,
                    file.as_fd(),
                    file_offset,
                )
            };
            match mapped {
                Ok(address) => {
                    return Ok(Self {
                        address,
                        size: len,
                        _room: room,
                    });
                }
                // Also what a file system says whose pages are larger than the alignment.
                Err(Errno::EINVAL) => last = Errno::EINVAL,
                Err(source) => return Err(GuardedError::Map(source)),
            }
        }
        Err(GuardedError::Map(last))
    }

    /// Its first byte.
    #[must_use]
    pub const fn address(&self) -> NonNull<u8> {
        self.address.cast()
    }

    /// Its bytes.
    #[must_use]
    pub const fn size(&self) -> usize {
        self.size.get()
    }
}

/// A range of addresses that nobody may touch, unmapped when dropped.
#[derive(Debug)]
struct Room {
    start: NonNull<libc::c_void>,
    size: NonZeroUsize,
}

impl Room {
    fn new(size: NonZeroUsize) -> Result<Self, Errno> {
        let flags = MapFlags::MAP_PRIVATE | MapFlags::MAP_ANONYMOUS | MapFlags::MAP_NORESERVE;
        // SAFETY: a new mapping at an address of the kernel's choice touches no memory that is in use.
        let start = unsafe { mmap_anonymous(None, size, ProtFlags::PROT_NONE, flags) }?;
        Ok(Self { start, size })
    }
}

impl Drop for Room {
    fn drop(&mut self) {
        // SAFETY: this value made the room, and what was mapped inside of it belongs to its owner, which is dropped
        // with it; everything that points there borrows or counts that owner.
        let _ = unsafe { munmap(self.start, self.size.get()) };
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use nix::sys::memfd::{MFdFlags, memfd_create};

    fn memfd(size: i64, flags: MFdFlags) -> std::os::fd::OwnedFd {
        let fd = memfd_create(c"guarded", flags).unwrap();
        nix::unistd::ftruncate(&fd, size).unwrap();
        fd
    }

    /// First address, end and rights of the mapping with `address`; the rights are `none` where there is none.
    fn kernel_view(address: usize) -> (usize, usize, String) {
        let maps = std::fs::read_to_string("/proc/self/maps").unwrap();
        for line in maps.lines() {
            let mut words = line.split_whitespace();
            let (start, end) = words.next().unwrap().split_once('-').unwrap();
            let hex = |text| usize::from_str_radix(text, 16).unwrap();
            if (hex(start)..hex(end)).contains(&address) {
                return (hex(start), hex(end), words.next().unwrap().to_owned());
            }
        }
        (0, 0, "none".to_owned())
    }

    #[test]
    fn nothing_may_be_touched_around_a_mapping_and_nothing_stays_of_it() {
        for (offset, size) in [
            (0x1000, 0x1801),
            (0, 4 << 20),
            (3 << 20, 1 << 20),
            (0x1ff000, 0x2000),
        ] {
            let file = memfd(8 << 20, MFdFlags::empty());
            let mapping = Guarded::new(&file, offset, size).unwrap();
            let first = mapping.address().as_ptr() as usize;
            let behind = first + (size as usize).next_multiple_of(PAGE);
            let (start, end, rights) = kernel_view(first);
            assert_eq!((start, end, &*rights), (first, behind, "rw-s"));
            assert_eq!(first % (2 << 20), (offset % (2 << 20)) as usize);
            let around = [first - 1, first - RAM_GUARD, behind, behind + RAM_GUARD - 1];
            for address in around {
                assert_eq!(kernel_view(address).2, "---p", "{address:#x}");
            }
            drop(mapping);
            for address in around.into_iter().chain([first]) {
                assert_eq!(kernel_view(address).2, "none", "{address:#x}");
            }
        }
    }

    #[test]
    fn huge_pages_of_every_size_that_the_kernel_knows_can_be_mapped() {
        let flags = |page| match page {
            0x20_0000usize => MFdFlags::MFD_HUGETLB | MFdFlags::MFD_HUGE_2MB,
            _ => MFdFlags::MFD_HUGETLB | MFdFlags::MFD_HUGE_1GB,
        };
        for page in [2 << 20, 1 << 30] {
            let known = format!("/sys/kernel/mm/hugepages/hugepages-{}kB", page >> 10);
            if std::path::Path::new(&known).exists() {
                // Only touching it would take pages, of which this host may have none.
                let file = memfd(4 << 30, flags(page));
                let mapping = Guarded::new(&file, 2 << 30, 2 << 30).unwrap();
                assert_eq!(mapping.address().as_ptr() as usize % page, 0);
            }
        }
    }

    #[test]
    fn what_cannot_be_mapped_is_refused() {
        let file = memfd(0x2000, MFdFlags::empty());
        let refused = |offset, size| Guarded::new(&file, offset, size).unwrap_err();
        assert!(matches!(refused(0, 0), GuardedError::Size { size: 0 }));
        assert!(matches!(refused(0, u64::MAX), GuardedError::Size { .. }));
        assert!(matches!(refused(1 << 63, 1), GuardedError::Offset { .. }));
        assert_eq!(refused(0, 1 << 50).errno(), Some(Errno::ENOMEM));
        assert!(matches!(
            refused(1, 0x1000),
            GuardedError::Map(Errno::EINVAL)
        ));
    }
}
