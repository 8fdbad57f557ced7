//! Guest RAM: made once, mapped here, and shared as file descriptors with the device processes.
//!
//! Job: a sealed memfd (or a backing file that the broker opened) of the guest's size, mapped below and above the
//! hole, with the (address, size, fd, offset) of each region for KVM's slots and the vhost-user memory table.
//! Who is not trusted: the device processes that get the descriptor. The seals keep them from shrinking the file
//! (which would turn this process's accesses into SIGBUS), from growing it, and from adding seals.
//! Why this way: one file with both regions at consecutive offsets, so that one descriptor is all a device gets, and
//! `zero` frees the pages in the file itself, which empties every process's mapping at once. Each region lies between guards
//! ([`ipc::guarded`]), as in the device processes.

#![allow(unsafe_code)] // madvise on our own mapping has no safe wrapper, nor has vm-memory for a mapping between guards

pub mod lazy;

use std::fs::File;
use std::os::fd::{FromRawFd, OwnedFd};
use std::os::unix::fs::FileExt;

use ipc::guarded::{Guarded, GuardedError};
use nix::errno::Errno;
use nix::fcntl::{FallocateFlags, FcntlArg, SealFlag, fallocate, fcntl};
use vm_memory::{
    Bytes, FileOffset, GuestAddress, GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion,
    GuestRegionMmap, MmapRegion, mmap::MmapRegionBuilder,
};

use crate::machine::layout::{HIGH_RAM_START, LOW_RAM_END};

/// The guest's memory as vm-memory sees it, without dirty bitmap.
pub type GuestMemory = GuestMemoryMmap<()>;

/// Least RAM of a guest, in bytes.
pub const MIN_SIZE: u64 = 128 << 20;
/// Most RAM of a guest, in bytes.
pub const MAX_SIZE: u64 = 512 << 30;

/// What can go wrong with guest RAM.
#[derive(Debug, thiserror::Error)]
#[allow(missing_docs)] // the message of each variant says all there is to say
pub enum Error {
    #[error("guest RAM of {0} bytes is out of range: 128M to 512G ({MIN_SIZE} to {MAX_SIZE})")]
    Size(u64),
    #[error("guest RAM of {0} bytes is not a multiple of 4096")]
    Alignment(u64),
    #[error("cannot create the memory file of guest RAM")]
    Memfd(#[source] Errno),
    #[error("cannot set the size of the memory file of guest RAM to {size} bytes")]
    Resize { size: u64, source: std::io::Error },
    #[error("cannot seal the memory file of guest RAM")]
    Seal(#[source] Errno),
    #[error("cannot share the memory file of guest RAM between its regions")]
    Duplicate(#[source] std::io::Error),
    #[error("cannot map {size} bytes of guest RAM at guest address {address:#x}")]
    Map {
        address: u64,
        size: u64,
        source: GuardedError,
    },
    #[error("a mapping of guest RAM cannot be used")]
    Use(#[source] vm_memory::mmap::MmapRegionError),
    #[error(
        "guest RAM region of {size} bytes at guest address {address:#x} overflows the address space"
    )]
    Region { address: u64, size: u64 },
    #[error("guest RAM regions do not form a memory map")]
    Collection(#[source] vm_memory::GuestRegionCollectionError),
    #[error("cannot allocate {size} bytes of guest RAM in advance")]
    Prealloc { size: u64, source: Errno },
    #[error("cannot apply advice {advice} to guest RAM")]
    Advise { advice: &'static str, source: Errno },
    #[error("cannot free the pages of guest RAM for a reset")]
    Zero(#[source] Errno),
}

/// Where the pages of guest RAM live.
#[derive(Debug)]
pub enum Backing {
    /// A fresh memfd, sealed against shrinking, growing and more seals.
    Memfd,
    /// An open file (`-mem-path`), readable and writable; it is grown to the guest's size when smaller.
    /// Files on most file systems cannot be sealed, so who else can open it must be trusted.
    File(File),
}

/// How to make guest RAM.
#[derive(Debug)]
pub struct RamConfig {
    /// Bytes, [`MIN_SIZE`] to [`MAX_SIZE`], a multiple of 4096.
    pub size: u64,
    /// Where the pages live.
    pub backing: Backing,
    /// Allocate all pages now instead of at first touch.
    pub prealloc: bool,
    /// Whether a core dump of this process contains guest RAM (`dump-guest-core`).
    pub dump_guest_core: bool,
    /// Ask for transparent huge pages. Costs time at each first touch and gives speed later.
    pub huge_pages: bool,
}

impl RamConfig {
    /// RAM of `size` bytes in a memfd, not dumped, allocated at first touch.
    #[must_use]
    pub fn new(size: u64) -> Self {
        Self {
            size,
            backing: Backing::Memfd,
            prealloc: false,
            dump_guest_core: false,
            huge_pages: false,
        }
    }
}

/// One contiguous piece of guest RAM, as KVM and vhost-user describe it.
#[derive(Debug, Clone, Copy)]
pub struct RamRegion<'a> {
    /// Guest-physical address.
    pub guest_address: u64,
    /// Bytes.
    pub size: u64,
    /// Where this process has it mapped.
    pub host_address: u64,
    /// The memory file.
    pub file: &'a File,
    /// Offset of the region in the file.
    pub file_offset: u64,
}

/// Guest RAM, mapped in this process.
#[derive(Debug)]
pub struct GuestRam {
    memory: GuestMemory,
    size: u64,
    prealloc: bool,
}

/// (guest address, size) of each RAM region of a guest with `size` bytes.
#[must_use]
pub fn ram_ranges(size: u64) -> Vec<(u64, u64)> {
    if size <= LOW_RAM_END {
        vec![(0, size)]
    } else {
        vec![(0, LOW_RAM_END), (HIGH_RAM_START, size - LOW_RAM_END)]
    }
}

impl GuestRam {
    /// Makes and maps guest RAM.
    ///
    /// # Errors
    /// A size out of range, or a system call that failed; see [`Error`].
    pub fn new(config: RamConfig) -> Result<Self, Error> {
        let size = config.size;
        if !(MIN_SIZE..=MAX_SIZE).contains(&size) {
            return Err(Error::Size(size));
        }
        if !size.is_multiple_of(4096) {
            return Err(Error::Alignment(size));
        }
        let file = match config.backing {
            Backing::Memfd => sealed_memfd(size)?,
            Backing::File(file) => {
                let length = file
                    .metadata()
                    .map_err(|source| Error::Resize { size, source })?
                    .len();
                if length < size {
                    file.set_len(size)
                        .map_err(|source| Error::Resize { size, source })?;
                }
                file
            }
        };
        let mut regions = Vec::with_capacity(2);
        let mut file_offset = 0;
        let shared = std::sync::Arc::new(file);
        for (address, size) in ram_ranges(size) {
            let mapping = map(&shared, file_offset, address, size)?;
            let region = GuestRegionMmap::new(mapping, GuestAddress(address))
                .ok_or(Error::Region { address, size })?;
            regions.push(region);
            file_offset += size;
        }
        let memory = GuestMemory::from_regions(regions).map_err(Error::Collection)?;
        let ram = Self {
            memory,
            size,
            prealloc: config.prealloc,
        };
        if !config.dump_guest_core {
            ram.advise(libc::MADV_DONTDUMP)
                .map_err(|source| Error::Advise {
                    advice: "MADV_DONTDUMP",
                    source,
                })?;
        }
        if config.huge_pages {
            match ram.advise(libc::MADV_HUGEPAGE) {
                // EINVAL: a kernel without transparent huge pages; the hint is then moot.
                Ok(()) | Err(Errno::EINVAL) => {}
                Err(source) => {
                    return Err(Error::Advise {
                        advice: "MADV_HUGEPAGE",
                        source,
                    });
                }
            }
        }
        if ram.prealloc {
            ram.populate(populate_threads(size))?;
        }
        Ok(ram)
    }

    /// The memory, for reading and writing guest structures and for vm-memory users.
    #[must_use]
    pub fn memory(&self) -> &GuestMemory {
        &self.memory
    }

    /// Total bytes.
    #[must_use]
    pub fn size(&self) -> u64 {
        self.size
    }

    /// End of the RAM below the hole: the smaller of the size and [`LOW_RAM_END`].
    #[must_use]
    pub fn low_end(&self) -> u64 {
        self.size.min(LOW_RAM_END)
    }

    /// The regions in order of their address: KVM's slots and the vhost-user memory table.
    pub fn regions(&self) -> impl Iterator<Item = RamRegion<'_>> {
        self.memory.iter().filter_map(|region| {
            // Always there: `new` maps regions from files only.
            let backing = region.file_offset()?;
            Some(RamRegion {
                guest_address: region.start_addr().0,
                size: region.len(),
                host_address: region.as_ptr() as u64,
                file: backing.file(),
                file_offset: backing.start(),
            })
        })
    }

    /// Copies RAM from `offset` in its file into `bytes`; `None` if that is not all in one region.
    #[must_use]
    pub fn read_at(&self, offset: u64, bytes: &mut [u8]) -> Option<()> {
        let address = self.address_of(offset)?;
        self.memory.read_slice(bytes, address).ok()
    }

    /// Copies RAM from `offset` in its file on, without touching a page that is not there.
    ///
    /// # Errors
    /// There is no such place, or the file cannot be read.
    pub fn read_file_at(&self, offset: u64, bytes: &mut [u8]) -> std::io::Result<()> {
        let region = self.regions().find(|region| {
            (region.file_offset..region.file_offset + region.size).contains(&offset)
        });
        let region = region.ok_or(std::io::ErrorKind::InvalidInput)?;
        region.file.read_exact_at(bytes, offset)
    }

    /// Copies `bytes` into RAM at `offset` in its file; `None` if that is not all in one region.
    #[must_use]
    pub fn write_at(&self, offset: u64, bytes: &[u8]) -> Option<()> {
        let address = self.address_of(offset)?;
        self.memory.write_slice(bytes, address).ok()
    }

    /// The guest-physical address of a place in the memory file.
    fn address_of(&self, offset: u64) -> Option<GuestAddress> {
        self.regions().find_map(|region| {
            let within = offset.checked_sub(region.file_offset)?;
            (within < region.size).then_some(GuestAddress(region.guest_address + within))
        })
    }

    /// Makes all RAM read as zero again, for every process that maps it, and gives the pages back.
    ///
    /// # Errors
    /// The file system of a backing file may not be able to free pages of a file.
    pub fn zero(&self) -> Result<(), Error> {
        for region in self.regions() {
            let (offset, length) = (region.file_offset.cast_signed(), region.size.cast_signed());
            fallocate(
                region.file,
                FallocateFlags::FALLOC_FL_PUNCH_HOLE | FallocateFlags::FALLOC_FL_KEEP_SIZE,
                offset,
                length,
            )
            .map_err(Error::Zero)?;
        }
        if self.prealloc {
            // One thread: the process is locked down by now and makes no more.
            self.populate(1)?;
        }
        Ok(())
    }

    /// Allocates all pages, `threads` pieces at a time.
    fn populate(&self, threads: u64) -> Result<(), Error> {
        // Whole huge pages, so that no two threads share one.
        let piece = (self.size / threads)
            .next_multiple_of(PREALLOC_ALIGNMENT)
            .max(PREALLOC_ALIGNMENT);
        let pieces: Vec<(usize, usize)> = self
            .memory
            .iter()
            .flat_map(|region| {
                let (start, size) = (region.as_ptr() as usize, region.len());
                (0..size)
                    .step_by(piece as usize)
                    .map(move |offset| (start + offset as usize, piece.min(size - offset) as usize))
            })
            .collect();
        let populate = |(start, length): (usize, usize)| {
            // SAFETY: the range lies in one mapping that `self` owns; the advice allocates its pages and changes
            // nothing that they contain.
            let result =
                unsafe { libc::madvise(start as *mut _, length, libc::MADV_POPULATE_WRITE) };
            Errno::result(result).map(drop)
        };
        let result = if threads == 1 {
            pieces.into_iter().try_for_each(populate)
        } else {
            std::thread::scope(|scope| {
                let workers: Vec<_> = pieces
                    .into_iter()
                    .map(|piece| scope.spawn(move || populate(piece)))
                    .collect();
                // A worker's panic aborts the process, so joining cannot fail.
                workers
                    .into_iter()
                    .try_for_each(|worker| worker.join().unwrap_or(Err(Errno::EAGAIN)))
            })
        };
        result.map_err(|source| Error::Prealloc {
            size: self.size,
            source,
        })
    }

    fn advise(&self, advice: i32) -> Result<(), Errno> {
        for region in self.memory.iter() {
            // SAFETY: the range is one whole mapping that `self` owns, and none of the advices used here
            // (DONTDUMP, HUGEPAGE) changes what the memory contains.
            let result = unsafe { libc::madvise(region.as_ptr().cast(), region.size(), advice) };
            Errno::result(result)?;
        }
        Ok(())
    }
}

/// 2 MiB
const PREALLOC_ALIGNMENT: u64 = 2 << 20;
/// A thread's worth of pages to allocate; less is not worth a thread.
const PREALLOC_SHARE: u64 = 64 << 20;
const PREALLOC_THREADS: u64 = 16;

fn populate_threads(size: u64) -> u64 {
    let processors = std::thread::available_parallelism().map_or(1, |count| count.get() as u64);
    (size / PREALLOC_SHARE).clamp(1, processors.min(PREALLOC_THREADS))
}

/// Maps a part of the memory file, for guest address `address`, for as long as the process lives.
fn map(
    file: &std::sync::Arc<File>,
    offset: u64,
    address: u64,
    size: u64,
) -> Result<MmapRegion, Error> {
    // Never unmapped: KVM's slots and clones of the memory map name these addresses, and neither keeps them from being used for
    // something else. A process has one guest RAM in its life.
    let guarded = Guarded::new(file, offset, size).map_err(|source| Error::Map {
        address,
        size,
        source,
    })?;
    let guarded = std::mem::ManuallyDrop::new(guarded);
    let region = MmapRegionBuilder::new(guarded.size())
        .with_mmap_prot(libc::PROT_READ | libc::PROT_WRITE)
        .with_mmap_flags(libc::MAP_SHARED | libc::MAP_NORESERVE)
        .with_file_offset(FileOffset::from_arc(file.clone(), offset));
    // SAFETY: the mapping has that many bytes, is readable and writable, and stays.
    let region = unsafe { region.with_raw_mmap_pointer(guarded.address().as_ptr()) };
    region.build().map_err(Error::Use)
}

fn sealed_memfd(size: u64) -> Result<File, Error> {
    let create = |flags: libc::c_uint| {
        // SAFETY: the name is a NUL-terminated literal and the call has no other pointer.
        let fd = Errno::result(unsafe { libc::memfd_create(c"guest-ram".as_ptr(), flags) })?;
        // SAFETY: the kernel just gave us this descriptor and nothing else owns it.
        Ok(File::from(unsafe { OwnedFd::from_raw_fd(fd) }))
    };
    let flags = libc::MFD_CLOEXEC | libc::MFD_ALLOW_SEALING;
    let file = match create(flags | libc::MFD_NOEXEC_SEAL) {
        // Kernels before 6.3 do not know the flag.
        Err(Errno::EINVAL) => create(flags),
        other => other,
    }
    .map_err(Error::Memfd)?;
    file.set_len(size)
        .map_err(|source| Error::Resize { size, source })?;
    let seals = SealFlag::F_SEAL_SHRINK | SealFlag::F_SEAL_GROW | SealFlag::F_SEAL_SEAL;
    fcntl(&file, FcntlArg::F_ADD_SEALS(seals)).map_err(Error::Seal)?;
    Ok(file)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ram_below_the_hole_is_one_region() {
        assert_eq!(ram_ranges(MIN_SIZE), [(0, MIN_SIZE)]);
        assert_eq!(ram_ranges(LOW_RAM_END), [(0, LOW_RAM_END)]);
    }

    #[test]
    fn ram_goes_on_above_the_hole() {
        assert_eq!(
            ram_ranges(LOW_RAM_END + 4096),
            [(0, LOW_RAM_END), (HIGH_RAM_START, 4096)]
        );
        assert_eq!(
            ram_ranges(MAX_SIZE),
            [(0, LOW_RAM_END), (HIGH_RAM_START, MAX_SIZE - LOW_RAM_END)]
        );
    }

    #[test]
    fn sizes_out_of_range_are_refused_with_the_range() {
        for size in [0, MIN_SIZE - 4096, MAX_SIZE + 4096] {
            let text = GuestRam::new(RamConfig::new(size)).unwrap_err().to_string();
            assert!(
                text.contains(&size.to_string()) && text.contains("128M to 512G"),
                "{text}"
            );
        }
        assert!(matches!(
            GuestRam::new(RamConfig::new(MIN_SIZE + 1)),
            Err(Error::Alignment(_))
        ));
    }

    #[test]
    fn largest_guest_maps_and_both_sides_of_the_hole_are_usable() {
        let ram = GuestRam::new(RamConfig::new(MAX_SIZE)).unwrap();
        let regions: Vec<_> = ram
            .regions()
            .map(|r| (r.guest_address, r.size, r.file_offset))
            .collect();
        assert_eq!(
            regions,
            [
                (0, LOW_RAM_END, 0),
                (HIGH_RAM_START, MAX_SIZE - LOW_RAM_END, LOW_RAM_END)
            ]
        );
        for address in [
            0,
            LOW_RAM_END - 8,
            HIGH_RAM_START,
            HIGH_RAM_START + (MAX_SIZE - LOW_RAM_END) - 8,
        ] {
            ram.memory()
                .write_obj(0x1122_3344_5566_7788u64, GuestAddress(address))
                .unwrap();
        }
        assert!(
            ram.memory()
                .write_obj(0u8, GuestAddress(LOW_RAM_END))
                .is_err()
        );
        assert!(
            ram.memory()
                .write_obj(0u8, GuestAddress(HIGH_RAM_START - 1))
                .is_err()
        );
    }

    #[test]
    fn memory_file_is_sealed_and_can_be_emptied() {
        let ram = GuestRam::new(RamConfig::new(MIN_SIZE)).unwrap();
        let region = ram.regions().next().unwrap();
        assert!(
            region.file.set_len(MIN_SIZE - 4096).is_err(),
            "shrinking must fail"
        );
        assert!(
            region.file.set_len(MIN_SIZE + 4096).is_err(),
            "growing must fail"
        );
        assert_eq!(
            fcntl(region.file, FcntlArg::F_ADD_SEALS(SealFlag::F_SEAL_WRITE)),
            Err(Errno::EPERM),
            "more seals must fail"
        );
        // A second mapping of the same file stands for a device process.
        let other =
            MmapRegion::<()>::from_file(FileOffset::new(region.file.try_clone().unwrap(), 0), 8192)
                .unwrap();
        ram.memory().write_obj(7u8, GuestAddress(4096)).unwrap();
        let other = GuestRegionMmap::new(other, GuestAddress(0)).unwrap();
        assert_eq!(
            other
                .read_obj::<u8>(vm_memory::MemoryRegionAddress(4096))
                .unwrap(),
            7
        );
        ram.zero().unwrap();
        assert_eq!(ram.memory().read_obj::<u8>(GuestAddress(4096)).unwrap(), 0);
        assert_eq!(
            other
                .read_obj::<u8>(vm_memory::MemoryRegionAddress(4096))
                .unwrap(),
            0
        );
    }

    #[test]
    fn a_backing_file_grows_to_the_size_and_can_be_populated() {
        let file = tempfile::tempfile_in("/dev/shm").unwrap();
        let mut config = RamConfig::new(MIN_SIZE);
        config.backing = Backing::File(file.try_clone().unwrap());
        config.prealloc = true;
        let ram = GuestRam::new(config).unwrap();
        let metadata = file.metadata().unwrap();
        assert_eq!(metadata.len(), MIN_SIZE);
        assert_eq!(
            std::os::unix::fs::MetadataExt::blocks(&metadata) * 512,
            MIN_SIZE
        );
        ram.zero().unwrap();
        let metadata = file.metadata().unwrap();
        assert_eq!(
            std::os::unix::fs::MetadataExt::blocks(&metadata) * 512,
            MIN_SIZE
        );
    }
}
