//! Guest RAM: made once, mapped here, and shared as file descriptors with the device processes.
//!
//! Job: a sealed memfd of the guest's size, or backing files that the broker opened, mapped below and above the hole, with
//! the (address, size, fd, offset) of each region for KVM's slots and the vhost-user memory table; and from which of the host's
//! memory nodes the pages of each zone come.
//! Who is not trusted: the device processes that get the descriptor. The seals keep them from shrinking the file
//! (which would turn this process's accesses into SIGBUS), from growing it, and from adding seals.
//! Why this way: all zones without a file of their own are in one memfd at consecutive offsets, so that one descriptor is all a
//! device gets, and `zero` frees the pages in the file itself, which empties every process's mapping at once. A policy belongs to
//! a range of that file, not to a process: pages that a device process touches first come from the right node as well. Each
//! region lies between guards ([`ipc::guarded`]), as in the device processes.

#![allow(unsafe_code)] // madvise on our own mapping has no safe wrapper, nor has vm-memory for a mapping between guards

mod begin;
mod clean;
pub mod lazy;
pub mod pager;
mod policy;
pub mod sharing;
mod uffd;

use std::fs::File;
use std::os::fd::{FromRawFd, OwnedFd};
use std::os::unix::fs::FileExt;
use std::sync::{Arc, OnceLock};

use ipc::guarded::{Guarded, GuardedError};
use ipc::spec::cpus::NodeList;
use ipc::spec::vm::MemoryPolicy;
use nix::errno::Errno;
use nix::fcntl::{FallocateFlags, FcntlArg, OFlag, SealFlag, fallocate, fcntl};
use nix::unistd::{Whence, lseek};
use vm_memory::{
    Bytes, FileOffset, GuestAddress, GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion,
    GuestRegionMmap, MmapRegion, mmap::MmapRegionBuilder,
};

use self::clean::Clean;
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
    #[error(transparent)]
    Policy(#[from] policy::PolicyError),
    #[error(
        "cannot copy the file of -mem-path or mem-path=, which the guest's writes must not reach"
    )]
    Copy(#[source] std::io::Error),
}

/// Where the pages of a zone live.
#[derive(Debug)]
pub enum Backing {
    /// A fresh memfd, sealed against shrinking, growing and more seals, which all such zones share.
    Memfd,
    /// An open file (`-mem-path`), readable and writable; it is grown to the zone's size when smaller.
    /// Files on most file systems cannot be sealed, so who else can open it must be trusted.
    File(File),
    /// The memfd, with the content of this file to begin with, which is open for reading and never written.
    Copy(File),
}

impl From<File> for Backing {
    /// A file is what the broker opened it for.
    fn from(file: File) -> Self {
        let flags = fcntl(&file, FcntlArg::F_GETFL).map(OFlag::from_bits_retain);
        match flags {
            Ok(flags) if flags & OFlag::O_ACCMODE == OFlag::O_RDONLY => Self::Copy(file),
            _ => Self::File(file),
        }
    }
}

/// A part of guest RAM that has its own properties.
#[derive(Debug)]
pub struct Zone {
    /// Bytes, a multiple of 4096.
    pub size: u64,
    /// Where the pages live.
    pub backing: Backing,
    /// Allocate all pages now instead of at first touch.
    pub prealloc: bool,
    /// Whether a core dump of this process contains it (`dump-guest-core`).
    pub dump_guest_core: bool,
    /// Which of the host's memory nodes its pages come from.
    pub policy: MemoryPolicy,
    /// The nodes, for policies other than the default.
    pub host_nodes: NodeList,
}

impl Zone {
    /// `size` bytes in the memfd, not dumped, allocated at first touch, on any node.
    #[must_use]
    pub fn new(size: u64) -> Self {
        Self {
            size,
            backing: Backing::Memfd,
            prealloc: false,
            dump_guest_core: false,
            policy: MemoryPolicy::Default,
            host_nodes: NodeList::default(),
        }
    }
}

/// How to make guest RAM.
#[derive(Debug)]
pub struct RamConfig {
    /// What it is made of, in the order of guest-physical addresses: [`MIN_SIZE`] to [`MAX_SIZE`] bytes altogether.
    pub zones: Vec<Zone>,
    /// Ask for transparent huge pages. Costs time at each first touch and gives speed later.
    pub huge_pages: bool,
}

impl RamConfig {
    /// RAM of `size` bytes in a memfd, not dumped, allocated at first touch.
    #[must_use]
    pub fn new(size: u64) -> Self {
        Self {
            zones: vec![Zone::new(size)],
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
    /// Bytes of RAM at lower guest-physical addresses.
    pub ram_offset: u64,
    /// The memory file.
    pub file: &'a File,
    /// Offset of the region in the file.
    pub file_offset: u64,
}

/// A part of a zone that no hole divides: where it is in the guest, and in which file.
#[derive(Debug, Clone)]
struct Piece {
    address: u64,
    size: u64,
    file: Arc<File>,
    file_offset: u64,
    zone: usize,
}

impl Piece {
    /// Whether `next` goes on where this ends, in the guest and in the file.
    fn is_followed_by(&self, next: &Self) -> bool {
        Arc::ptr_eq(&self.file, &next.file)
            && self.address + self.size == next.address
            && self.file_offset + self.size == next.file_offset
    }
}

/// Guest RAM, mapped in this process.
#[derive(Debug)]
pub struct GuestRam {
    memory: GuestMemory,
    size: u64,
    /// (address here, bytes) of what is allocated in advance.
    prealloc: Vec<(usize, u64)>,
    dumped: bool,
    /// What is a template's still, and not in the memory file.
    clean: OnceLock<Arc<Clean>>,
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
        let RamConfig { zones, huge_pages } = config;
        let size = zones
            .iter()
            .fold(0, |sum: u64, zone| sum.saturating_add(zone.size));
        if !(MIN_SIZE..=MAX_SIZE).contains(&size) {
            return Err(Error::Size(size));
        }
        if let Some(zone) = zones.iter().find(|zone| !zone.size.is_multiple_of(4096)) {
            return Err(Error::Alignment(zone.size));
        }
        let (settings, files) = files(zones)?;
        let pieces = pieces(&files);
        let mut whole: Vec<Piece> = Vec::with_capacity(pieces.len());
        for piece in &pieces {
            match whole.last_mut() {
                Some(last) if last.is_followed_by(piece) => last.size += piece.size,
                _ => whole.push(piece.clone()),
            }
        }
        let mut regions = Vec::with_capacity(whole.len());
        for Piece {
            address,
            size,
            file,
            file_offset,
            ..
        } in whole
        {
            let mapping = map(&file, file_offset, address, size)?;
            let region = GuestRegionMmap::new(mapping, GuestAddress(address))
                .ok_or(Error::Region { address, size })?;
            regions.push(region);
        }
        let memory = GuestMemory::from_regions(regions).map_err(Error::Collection)?;
        let mut ram = Self {
            memory,
            size,
            prealloc: Vec::new(),
            dumped: settings.iter().any(|zone| zone.dump_guest_core),
            clean: OnceLock::new(),
        };
        for piece in &pieces {
            let zone = &settings[piece.zone];
            let range = (ram.here(piece)?, piece.size);
            policy::set(range, zone.policy, &zone.host_nodes)?;
            if !zone.dump_guest_core {
                advise(range, libc::MADV_DONTDUMP).map_err(|source| Error::Advise {
                    advice: "MADV_DONTDUMP",
                    source,
                })?;
            }
            if huge_pages {
                match advise(range, libc::MADV_HUGEPAGE) {
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
            if zone.prealloc {
                ram.prealloc.push(range);
            }
        }
        // Once each range has its policy, by which pages get their node.
        for ((file, start, size), zone) in files.iter().zip(&settings) {
            if let Some(source) = &zone.begin {
                begin::copy(source, file, *start, *size).map_err(Error::Copy)?;
            }
        }
        // Not to be asked in vain: how many processors there are takes a dozen calls, on files of control groups.
        if !ram.prealloc.is_empty() {
            ram.populate(populate_threads(ram.preallocated()))?;
        }
        Ok(ram)
    }

    /// Where this process has a piece.
    fn here(&self, piece: &Piece) -> Result<usize, Error> {
        let (address, size) = (piece.address, piece.size);
        self.memory
            .get_host_address(GuestAddress(address))
            .map(|at| at as usize)
            .map_err(|_| Error::Region { address, size })
    }

    /// Bytes that are allocated in advance.
    fn preallocated(&self) -> u64 {
        self.prealloc.iter().map(|(_, size)| size).sum()
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
        let mut below = 0;
        self.memory.iter().filter_map(move |region| {
            // Always there: `new` maps regions from files only.
            let backing = region.file_offset()?;
            let ram_offset = below;
            below += region.len();
            Some(RamRegion {
                guest_address: region.start_addr().0,
                size: region.len(),
                host_address: region.as_ptr() as u64,
                ram_offset,
                file: backing.file(),
                file_offset: backing.start(),
            })
        })
    }

    /// The region with the byte of RAM at `offset`, and how far into it that is.
    fn at(&self, offset: u64) -> Option<(RamRegion<'_>, u64)> {
        self.regions().find_map(|region| {
            let within = offset.checked_sub(region.ram_offset)?;
            (within < region.size).then_some((region, within))
        })
    }

    /// Copies RAM from `offset`, counted without the hole, into `bytes`; `None` if that is not all in one region.
    #[must_use]
    pub fn read_at(&self, offset: u64, bytes: &mut [u8]) -> Option<()> {
        let address = self.address_of(offset)?;
        self.memory.read_slice(bytes, address).ok()
    }

    /// Copies RAM from `offset` on, counted without the hole, without touching a page that is not there.
    ///
    /// # Errors
    /// There is no such place, or the file cannot be read.
    pub fn read_file_at(&self, offset: u64, bytes: &mut [u8]) -> std::io::Result<()> {
        let (region, within) = self.at(offset).ok_or(std::io::ErrorKind::InvalidInput)?;
        region
            .file
            .read_exact_at(bytes, region.file_offset + within)?;
        match self.clean.get() {
            Some(clean) => clean.read_over(offset, bytes),
            None => Ok(()),
        }
    }

    /// From now on a part of RAM is a template's.
    fn set_clean(&self, clean: Arc<Clean>) {
        // Once in a process's life.
        let _ = self.clean.set(clean);
    }

    /// Whether a core dump contains it.
    const fn is_dumped(&self) -> bool {
        self.dumped
    }

    /// The first place from `offset` on, counted without the hole, that may hold something else than zeros; `None` if there is
    /// none.
    ///
    /// # Errors
    /// A memory file cannot be looked at.
    pub fn next_data(&self, offset: u64) -> Result<Option<u64>, Errno> {
        let clean = self.clean.get().and_then(|clean| clean.next_data(offset));
        let clean = clean.map(|clean| clean.max(offset));
        Ok(self.next_own_data(offset)?.into_iter().chain(clean).min())
    }

    /// The same of what is in memory files.
    fn next_own_data(&self, offset: u64) -> Result<Option<u64>, Errno> {
        for region in self.regions() {
            let end = region.ram_offset + region.size;
            if end <= offset {
                continue;
            }
            let from = offset.max(region.ram_offset);
            let start = region.file_offset + (from - region.ram_offset);
            match lseek(region.file, start.cast_signed(), Whence::SeekData) {
                Ok(data) => {
                    let data = data.cast_unsigned().max(start) - region.file_offset;
                    if data < region.size {
                        return Ok(Some(region.ram_offset + data));
                    }
                }
                // Nothing up to the file's end.
                Err(Errno::ENXIO) => {}
                // A file system that does not know of holes.
                Err(Errno::EINVAL | Errno::EOPNOTSUPP) => return Ok(Some(from)),
                Err(e) => return Err(e),
            }
        }
        Ok(None)
    }

    /// Copies `bytes` into RAM at `offset`, counted without the hole; `None` if that is not all in one region.
    #[must_use]
    pub fn write_at(&self, offset: u64, bytes: &[u8]) -> Option<()> {
        let address = self.address_of(offset)?;
        self.memory.write_slice(bytes, address).ok()
    }

    /// The guest-physical address of a place in RAM, counted without the hole.
    fn address_of(&self, offset: u64) -> Option<GuestAddress> {
        let (region, within) = self.at(offset)?;
        Some(GuestAddress(region.guest_address + within))
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
        // One thread: the process is locked down by now and makes no more.
        self.populate(1)
    }

    /// Allocates all pages that are wanted in advance, `threads` pieces at a time.
    fn populate(&self, threads: u64) -> Result<(), Error> {
        let size = self.preallocated();
        // Whole huge pages, so that no two threads share one.
        let piece = (size / threads)
            .next_multiple_of(PREALLOC_ALIGNMENT)
            .max(PREALLOC_ALIGNMENT);
        let pieces: Vec<(usize, u64)> = self
            .prealloc
            .iter()
            .flat_map(|&(start, size)| {
                (0..size)
                    .step_by(piece as usize)
                    .map(move |offset| (start + offset as usize, piece.min(size - offset)))
            })
            .collect();
        let populate = |range| advise(range, libc::MADV_POPULATE_WRITE);
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
        result.map_err(|source| Error::Prealloc { size, source })
    }
}

/// Gives advice for a part of guest RAM as it is mapped here.
fn advise((start, size): (usize, u64), advice: i32) -> Result<(), Errno> {
    // SAFETY: the range is part of a mapping that stays for the life of the process, and none of the advices used here
    // (DONTDUMP, HUGEPAGE, POPULATE_WRITE) changes what the memory contains.
    let result = unsafe { libc::madvise(start as *mut _, size as usize, advice) };
    Errno::result(result).map(drop)
}

/// What a zone is beside its file.
struct Settings {
    /// What it begins with, if not zeros.
    begin: Option<File>,
    prealloc: bool,
    dump_guest_core: bool,
    policy: MemoryPolicy,
    host_nodes: NodeList,
}

/// The file of each zone, its offset there and its size.
type ZoneFiles = Vec<(Arc<File>, u64, u64)>;

/// Makes and sizes what the zones live in.
fn files(zones: Vec<Zone>) -> Result<(Vec<Settings>, ZoneFiles), Error> {
    let in_memfd = zones
        .iter()
        .filter(|zone| !matches!(zone.backing, Backing::File(_)));
    let memfd = match in_memfd.map(|zone| zone.size).sum() {
        0 => None,
        size => Some(Arc::new(sealed_memfd(size)?)),
    };
    let mut used = 0;
    let mut settings = Vec::with_capacity(zones.len());
    let mut files = Vec::with_capacity(zones.len());
    for zone in zones {
        let size = zone.size;
        let mut begin = None;
        match (zone.backing, &memfd) {
            (Backing::File(file), _) => {
                let resize = |source| Error::Resize { size, source };
                if file.metadata().map_err(resize)?.len() < size {
                    file.set_len(size).map_err(resize)?;
                }
                files.push((Arc::new(file), 0, size));
            }
            (backing, Some(memfd)) => {
                if let Backing::Copy(source) = backing {
                    begin = Some(source);
                }
                files.push((memfd.clone(), used, size));
                used += size;
            }
            // An empty zone of a memfd that has no others.
            (_, None) => return Err(Error::Size(size)),
        }
        settings.push(Settings {
            begin,
            prealloc: zone.prealloc,
            dump_guest_core: zone.dump_guest_core,
            policy: zone.policy,
            host_nodes: zone.host_nodes,
        });
    }
    Ok((settings, files))
}

/// Lays the zones out one behind the other, around the hole.
fn pieces(files: &ZoneFiles) -> Vec<Piece> {
    let sizes: Vec<u64> = files.iter().map(|(_, _, size)| *size).collect();
    let mut within = vec![0; files.len()];
    zone_ranges(&sizes)
        .into_iter()
        .map(
            |ZoneRange {
                 address,
                 size,
                 zone,
             }| {
                let (file, start, _) = &files[zone];
                let file_offset = start + within[zone];
                within[zone] += size;
                Piece {
                    address,
                    size,
                    file: file.clone(),
                    file_offset,
                    zone,
                }
            },
        )
        .collect()
}

/// A part of guest RAM that is of one zone and that no hole divides.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ZoneRange {
    /// Guest-physical address.
    pub address: u64,
    /// Bytes.
    pub size: u64,
    /// Number of the zone.
    pub zone: usize,
}

/// Where zones of these sizes are in the guest, by address.
#[must_use]
pub fn zone_ranges(sizes: &[u64]) -> Vec<ZoneRange> {
    let mut found = Vec::with_capacity(sizes.len() + 1);
    // Bytes of RAM below the zone, and below the range.
    let mut before = 0;
    for (zone, &size) in sizes.iter().enumerate() {
        let mut below = 0;
        for (start, room) in ram_ranges(sizes.iter().sum()) {
            let (from, to) = (before.max(below), (before + size).min(below + room));
            if from < to {
                found.push(ZoneRange {
                    address: start + (from - below),
                    size: to - from,
                    zone,
                });
            }
            below += room;
        }
        before += size;
    }
    found
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
fn map(file: &Arc<File>, offset: u64, address: u64, size: u64) -> Result<MmapRegion, Error> {
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
    fn zones_lie_one_behind_the_other_around_the_hole() {
        let range = |address, size, zone| ZoneRange {
            address,
            size,
            zone,
        };
        assert_eq!(
            zone_ranges(&[64 << 20, 192 << 20]),
            [range(0, 64 << 20, 0), range(64 << 20, 192 << 20, 1)]
        );
        let half = LOW_RAM_END / 2;
        assert_eq!(
            zone_ranges(&[half, LOW_RAM_END, half]),
            [
                range(0, half, 0),
                range(half, half, 1),
                range(HIGH_RAM_START, half, 1),
                range(HIGH_RAM_START + half, half, 2)
            ]
        );
    }

    #[test]
    fn zones_share_a_memfd_and_have_files_of_their_own() {
        let file = tempfile::tempfile_in("/dev/shm").unwrap();
        let mut config = RamConfig::new(64 << 20);
        config.zones.push(Zone {
            backing: Backing::File(file.try_clone().unwrap()),
            prealloc: true,
            ..Zone::new(32 << 20)
        });
        config.zones.push(Zone::new(32 << 20));
        let ram = GuestRam::new(config).unwrap();
        let regions: Vec<_> = ram
            .regions()
            .map(|r| (r.guest_address, r.size, r.ram_offset, r.file_offset))
            .collect();
        assert_eq!(
            regions,
            [
                (0, 64 << 20, 0, 0),
                (64 << 20, 32 << 20, 64 << 20, 0),
                (96 << 20, 32 << 20, 96 << 20, 64 << 20)
            ]
        );
        assert_eq!(
            std::os::unix::fs::MetadataExt::blocks(&file.metadata().unwrap()) * 512,
            32 << 20,
            "only this zone is allocated in advance"
        );
        // The last zone's first page, by every way there is.
        assert_eq!(ram.next_data(96 << 20), Ok(None));
        ram.write_at(96 << 20, b"here").unwrap();
        assert_eq!(ram.next_data(96 << 20), Ok(Some(96 << 20)));
        assert_eq!(ram.next_data(0), Ok(Some(64 << 20)), "allocated in advance");
        let mut bytes = [0; 4];
        ram.read_file_at(96 << 20, &mut bytes).unwrap();
        assert_eq!(&bytes, b"here");
        ram.zero().unwrap();
        assert_eq!(ram.next_data(96 << 20), Ok(None));
        // Zones that follow each other in the memfd are one region.
        let mut config = RamConfig::new(64 << 20);
        config.zones.push(Zone::new(64 << 20));
        assert_eq!(GuestRam::new(config).unwrap().regions().count(), 1);
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

    /// `dump-guest-core`, read back from the kernel: `dd` is "do not include area into core dump" (proc_pid_smaps(5)).
    #[test]
    fn a_core_dump_has_guest_memory_only_if_that_was_asked_for() {
        let flags = |dump_guest_core| {
            let mut config = RamConfig::new(MIN_SIZE);
            config.zones[0].dump_guest_core = dump_guest_core;
            let ram = GuestRam::new(config).unwrap();
            let at = ram.memory().get_host_address(GuestAddress(0)).unwrap() as usize;
            let smaps = std::fs::read_to_string("/proc/self/smaps").unwrap();
            let mapping = smaps.split_once(&format!("{at:x}-")).unwrap().1;
            let line = mapping.lines().find(|line| line.starts_with("VmFlags:"));
            line.unwrap().to_owned()
        };
        assert!(flags(false).contains(" dd"), "{}", flags(false));
        assert!(!flags(true).contains(" dd"), "{}", flags(true));
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
        config.zones[0].backing = Backing::File(file.try_clone().unwrap());
        config.zones[0].prealloc = true;
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
