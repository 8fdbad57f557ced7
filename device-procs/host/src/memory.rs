//! Guest RAM as this process sees it, and system calls straight on it.
//!
//! **Job.** Maps the regions that a front end announces, translates its addresses, and lends guest buffers to devices as
//! [`GuestBuffers`], which can be copied from and to, or given to `preadv`, `pwritev`, `readv` and `writev` without a copy.
//!
//! **Who is not trusted.** The front end: a region must be a file that is large enough, sizes and counts are capped, regions
//! must not overlap. The guest: it writes to these pages while we look at them, so no Rust reference to them ever exists;
//! a value is copied out once and checked after that.
//!
//! **Why this way.** Each region lies between two guards that nothing may touch ([`ipc::guarded`]): whatever 32-bit length or
//! offset went unchecked would end this process there, and not read or write what else it holds. Devices forbid `unsafe`, so
//! what they can do to guest memory is the list of methods here. Descriptors of RAM are closed once mapped: the process cannot
//! pass them on.

#![allow(unsafe_code)] // vectored I/O on memory that no Rust reference may point to

use std::fs::File;
use std::marker::PhantomData;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::rc::Rc;

use ipc::guarded::{Guarded, GuardedError};
use ipc::limits::{MAX_CHAIN_SEGMENTS, MAX_MEMORY, MAX_MEMORY_REGIONS};
use nix::errno::Errno;
use nix::unistd::{Whence, lseek};
use thiserror::Error;
use vm_memory::volatile_memory::VolatileSlice;
use vm_memory::{GuestAddress, GuestMemoryBackend, GuestMemoryMmap, GuestRegionMmap, MmapRegion};

/// Why a region was not mapped.
#[derive(Debug, Error)]
pub enum MemoryError {
    /// More regions than allowed.
    #[error("{count} memory regions: the limit is {MAX_MEMORY_REGIONS}")]
    TooMany {
        /// Regions with the new one.
        count: usize,
    },
    /// All regions together are too large, or one has no bytes.
    #[error(
        "memory region of {size} bytes: 1 to {MAX_MEMORY} bytes are allowed for all regions together"
    )]
    Size {
        /// Size that was asked for.
        size: u64,
    },
    /// An address or offset range wraps around.
    #[error("memory region at {start:#x} of {size:#x} bytes goes beyond the address space")]
    Wraps {
        /// Its start.
        start: u64,
        /// Its size.
        size: u64,
    },
    /// The file ends before the region does, so that touching its end would kill the process.
    #[error("memory region needs {needed} bytes of its file, which has {has}")]
    FileTooShort {
        /// Offset and size of the region.
        needed: u64,
        /// Size of the file.
        has: u64,
    },
    /// Regions overlap.
    #[error("memory regions overlap or are out of order")]
    Overlap(#[source] vm_memory::region::GuestRegionCollectionError),
    /// `vm-memory` does not take the mapping.
    #[error("memory region cannot be used")]
    Region(#[source] vm_memory::mmap::MmapRegionError),
    /// It cannot be mapped between guards.
    #[error("mmap of a memory region failed")]
    Map(#[source] GuardedError),
    /// A system call failed.
    #[error("{call} of a memory region failed")]
    Call {
        /// Its name.
        call: &'static str,
        /// What the kernel said.
        source: Errno,
    },
}

/// A shared mapping of a part of a file between two guards; all of it is unmapped when dropped.
#[derive(Debug)]
pub(crate) struct Mapping(Guarded);

impl Mapping {
    /// Maps `size` bytes of `file` from `offset` on, readable and writable, never executable. The file may be closed then.
    pub(crate) fn new(file: &File, offset: u64, size: u64) -> Result<Self, MemoryError> {
        let wraps = MemoryError::Wraps {
            start: offset,
            size,
        };
        let end = offset.checked_add(size).ok_or(wraps)?;
        // Without this check a front end could make us touch pages that its file does not have (SIGBUS). One that
        // truncates the file later can still do that; ours seals its memfds against it. Sought and not asked by fstat,
        // which this libc makes a call that takes a path (newfstatat), and the filter allows none of those.
        let has = lseek(file, 0, Whence::SeekEnd).map_err(|source| MemoryError::Call {
            call: "lseek",
            source,
        })?;
        let has = u64::try_from(has).unwrap_or(0);
        if has < end {
            return Err(MemoryError::FileTooShort { needed: end, has });
        }
        let mapping = Guarded::new(file, offset, size).map_err(MemoryError::Map)?;
        Ok(Self(mapping))
    }

    /// Its first byte.
    fn address(&self) -> *mut u8 {
        self.0.address().as_ptr()
    }

    /// All of it.
    pub(crate) fn bytes(&self) -> VolatileSlice<'_> {
        // SAFETY: the mapping has `size` bytes and lives as long as `self`, which the slice borrows.
        unsafe { VolatileSlice::new(self.address(), self.0.size()) }
    }
}

/// One region of guest RAM.
#[derive(Debug, Clone)]
pub(crate) struct Region {
    /// Guest physical address of its first byte.
    pub(crate) guest: u64,
    /// Bytes.
    pub(crate) size: u64,
    /// The same first byte as the front end addresses it.
    pub(crate) user: u64,
    /// Where it is in its file.
    pub(crate) offset: u64,
    /// Kept for a process that comes after this one.
    pub(crate) file: Option<Rc<File>>,
    mapping: Rc<Mapping>,
}

impl Region {
    /// Where this process has its first byte.
    pub(crate) fn address(&self) -> u64 {
        self.mapping.address() as u64
    }

    pub(crate) fn new(
        guest: u64,
        size: u64,
        user: u64,
        file: &File,
        offset: u64,
    ) -> Result<Self, MemoryError> {
        if size == 0 || size > MAX_MEMORY {
            return Err(MemoryError::Size { size });
        }
        for start in [guest, user] {
            if start.checked_add(size).is_none() {
                return Err(MemoryError::Wraps { start, size });
            }
        }
        Ok(Self {
            guest,
            size,
            user,
            offset,
            file: None,
            mapping: Rc::new(Mapping::new(file, offset, size)?),
        })
    }

    /// Keeps the file open as well.
    pub(crate) fn with_file(self, file: File) -> Self {
        Self {
            file: Some(Rc::new(file)),
            ..self
        }
    }
}

/// All of guest RAM that this process was given.
#[derive(Debug)]
pub struct GuestRam {
    // Before `regions`, so that it is dropped before the mappings it points into.
    map: GuestMemoryMmap<()>,
    regions: Vec<Region>,
}

impl GuestRam {
    pub(crate) fn new(mut regions: Vec<Region>) -> Result<Self, MemoryError> {
        if regions.len() > MAX_MEMORY_REGIONS {
            return Err(MemoryError::TooMany {
                count: regions.len(),
            });
        }
        let total = regions
            .iter()
            .fold(0u64, |sum, r| sum.saturating_add(r.size));
        if total > MAX_MEMORY {
            return Err(MemoryError::Size { size: total });
        }
        regions.sort_unstable_by_key(|r| r.guest);
        let mut parts = Vec::with_capacity(regions.len());
        for region in &regions {
            let address = region.mapping.address();
            let prot = libc::PROT_READ | libc::PROT_WRITE;
            let flags = libc::MAP_SHARED | libc::MAP_NORESERVE;
            // SAFETY: the mapping has that many bytes, is readable and writable, and is kept by `regions`, which is dropped
            // after the map that points into it.
            let part =
                unsafe { MmapRegion::build_raw(address, region.mapping.0.size(), prot, flags) }
                    .map_err(MemoryError::Region)?;
            let wraps = MemoryError::Wraps {
                start: region.guest,
                size: region.size,
            };
            parts.push(GuestRegionMmap::new(part, GuestAddress(region.guest)).ok_or(wraps)?);
        }
        let map = GuestMemoryMmap::from_regions(parts).map_err(MemoryError::Overlap)?;
        Ok(Self { map, regions })
    }

    /// For rings: loads and stores by guest physical address.
    pub(crate) fn map(&self) -> &GuestMemoryMmap<()> {
        &self.map
    }

    pub(crate) fn regions(&self) -> &[Region] {
        &self.regions
    }

    /// Guest physical address of what the front end has at `user`.
    pub(crate) fn guest_address(&self, user: u64) -> Option<GuestAddress> {
        self.regions
            .iter()
            .find(|r| user >= r.user && user - r.user < r.size)
            .map(|r| GuestAddress(r.guest + (user - r.user)))
    }

    /// Where this process has the `len` bytes at `guest`, if they are all in one region: as those of nearly every buffer are, and
    /// without a walk over all regions that a guest's RAM can have.
    fn contiguous(&self, guest: GuestAddress, len: usize) -> Option<*mut u8> {
        // Sorted by address; the last one that begins at or before.
        let after = self.regions.partition_point(|r| r.guest <= guest.0);
        let region = self.regions.get(after.checked_sub(1)?)?;
        let offset = guest.0 - region.guest;
        if offset > region.size || region.size - offset < len as u64 {
            return None;
        }
        // Inside of the mapping, or its end.
        Some(region.mapping.address().wrapping_add(offset as usize))
    }

    /// The `len` bytes at `guest`, if they are all in one region.
    pub(crate) fn piece(&self, guest: GuestAddress, len: usize) -> Option<VolatileSlice<'_>> {
        let first = self.contiguous(guest, len)?;
        // SAFETY: that many bytes of a mapping from there on, which `self` keeps.
        Some(unsafe { VolatileSlice::new(first, len) })
    }

    /// Appends the host addresses of `len` bytes at `guest` to `list`. Fails without touching memory when a byte is outside
    /// of RAM or the list would get more than [`MAX_CHAIN_SEGMENTS`] entries.
    pub(crate) fn resolve(
        &self,
        guest: GuestAddress,
        len: u32,
        list: &mut SegmentList,
    ) -> Result<(), ResolveError> {
        if let Some(first) = self.contiguous(guest, len as usize) {
            if len == 0 {
                return Ok(());
            }
            if list.0.len() >= MAX_CHAIN_SEGMENTS {
                return Err(ResolveError::TooMany);
            }
            list.0.push(libc::iovec {
                iov_base: first.cast(),
                iov_len: len as usize,
            });
            return Ok(());
        }
        // Over the end of a region into the next one, or not in RAM.
        for slice in self.map.get_slices(guest, len as usize) {
            let slice = slice.map_err(|_| ResolveError::OutsideRam)?;
            if list.0.len() >= MAX_CHAIN_SEGMENTS {
                return Err(ResolveError::TooMany);
            }
            list.0.push(libc::iovec {
                iov_base: slice.ptr_guard_mut().as_ptr().cast(),
                iov_len: slice.len(),
            });
        }
        Ok(())
    }
}

/// A part of guest RAM that is looked at again and again: where it lies was found out once. It keeps its RAM mapped.
#[derive(Debug)]
pub(crate) struct Span {
    first: *mut u8,
    len: usize,
    _ram: Rc<GuestRam>,
}

impl Span {
    /// The `len` bytes at `guest`; `None` if they are not all in one region.
    pub(crate) fn new(ram: &Rc<GuestRam>, guest: GuestAddress, len: usize) -> Option<Self> {
        Some(Self {
            first: ram.contiguous(guest, len)?,
            len,
            _ram: ram.clone(),
        })
    }

    /// Its bytes, which the guest writes to meanwhile.
    pub(crate) fn bytes(&self) -> VolatileSlice<'_> {
        // SAFETY: `contiguous` found that many bytes in one region, which `_ram` keeps mapped.
        unsafe { VolatileSlice::new(self.first, self.len) }
    }
}

/// Why a descriptor's range is not usable.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum ResolveError {
    OutsideRam,
    TooMany,
}

/// Host addresses of a chain's buffers. Holds nothing alive: only [`GuestBuffers`], which borrows the RAM, reads it.
#[derive(Debug, Default)]
pub(crate) struct SegmentList(Vec<libc::iovec>);

impl SegmentList {
    pub(crate) fn clear(&mut self) {
        self.0.clear();
    }

    /// Pieces.
    pub(crate) fn count(&self) -> usize {
        self.0.len()
    }

    /// Bytes of the pieces from number `first` on.
    pub(crate) fn bytes_from(&self, first: usize) -> usize {
        self.0.iter().skip(first).map(|s| s.iov_len).sum()
    }

    /// Adds the pieces of `buffers`, which must be in the RAM that the others are in.
    pub(crate) fn extend(&mut self, buffers: &GuestBuffers<'_>) {
        self.0.extend_from_slice(buffers.segments);
    }

    /// As [`buffers`](Self::buffers), of the pieces in `range`: none if it is not in the list.
    pub(crate) fn part<'m>(
        &'m mut self,
        range: std::ops::Range<usize>,
        ram: &'m Rc<GuestRam>,
    ) -> GuestBuffers<'m> {
        let segments = self.0.get_mut(range).unwrap_or_default();
        let len = segments.iter().map(|s| s.iov_len).sum();
        GuestBuffers { segments, len, ram }
    }

    /// Lends the pieces to a device. The list must have been filled from `ram` since it was last cleared, which
    /// [`walk`](crate::chain::walk) does for each chain; nothing outside of this crate can call it.
    pub(crate) fn buffers<'m>(&'m mut self, ram: &'m Rc<GuestRam>) -> GuestBuffers<'m> {
        let len = self.bytes_from(0);
        GuestBuffers {
            segments: &mut self.0,
            len,
            ram,
        }
    }
}

/// Some buffers of one request, in the driver's order, as one run of bytes. Taking from the front shortens it.
#[derive(Debug)]
pub struct GuestBuffers<'m> {
    segments: &'m mut [libc::iovec],
    len: usize,
    ram: &'m Rc<GuestRam>,
}

/// At most [`PACKET_SEGMENTS`] pieces with one before or behind them. Most packets have a few, for which a large array
/// would be cleared in vain.
fn with_one_more<R>(
    segments: &[libc::iovec],
    first: Option<libc::iovec>,
    last: Option<libc::iovec>,
    call: impl FnOnce(&[libc::iovec]) -> R,
) -> R {
    fn put<'a>(
        all: &'a mut [libc::iovec],
        segments: &[libc::iovec],
        first: Option<libc::iovec>,
        last: Option<libc::iovec>,
    ) -> &'a [libc::iovec] {
        let pieces = first.iter().chain(segments).chain(last.iter());
        let mut count = 0;
        for (to, from) in all.iter_mut().zip(pieces) {
            *to = *from;
            count += 1;
        }
        &all[..count]
    }
    const NONE: libc::iovec = libc::iovec {
        iov_base: std::ptr::null_mut(),
        iov_len: 0,
    };
    match segments.len() {
        0..4 => call(put(&mut [NONE; 4], segments, first, last)),
        // A packet of 64 KiB in pages.
        4..20 => call(put(&mut [NONE; 20], segments, first, last)),
        _ => call(put(&mut [NONE; PACKET_SEGMENTS + 1], segments, first, last)),
    }
}

/// The last byte of a request's buffers, where many devices put a status.
#[derive(Debug)]
pub struct GuestByte<'m> {
    address: *mut u8,
    ram: &'m Rc<GuestRam>,
}

/// A [`GuestByte`] that outlives the call in which its request was taken.
#[derive(Debug)]
pub struct HeldByte {
    address: *mut u8,
    _ram: Rc<GuestRam>,
}

/// Some buffers of a request that outlive the call in which it was taken, for I/O that the kernel does meanwhile.
#[derive(Debug, Default)]
pub(crate) struct HeldBuffers {
    segments: Vec<libc::iovec>,
    /// Pieces before this one are done.
    first: usize,
    /// Keeps the mappings that the pieces are in, whatever the front end does to its memory table.
    ram: Option<Rc<GuestRam>>,
}

impl HeldBuffers {
    /// Takes over the pieces of `buffers`. The storage of an earlier request is used again.
    pub(crate) fn hold(&mut self, buffers: &GuestBuffers<'_>) {
        self.segments.clear();
        self.segments.extend_from_slice(buffers.segments);
        self.first = 0;
        self.ram = Some(buffers.ram.clone());
    }

    /// Lets go of the memory.
    pub(crate) fn release(&mut self) {
        self.segments.clear();
        self.first = 0;
        self.ram = None;
    }

    /// What is left, for the kernel: valid until the next call of a method that takes `&mut self`.
    pub(crate) fn pieces(&self) -> &[libc::iovec] {
        self.segments.get(self.first..).unwrap_or_default()
    }

    /// Takes `count` bytes off the front; returns whether any are left.
    pub(crate) fn advance(&mut self, mut count: usize) -> bool {
        while let Some(piece) = self.segments.get_mut(self.first) {
            if count < piece.iov_len {
                // Inside of the piece.
                piece.iov_base = piece.iov_base.cast::<u8>().wrapping_add(count).cast();
                piece.iov_len -= count;
                return true;
            }
            count -= piece.iov_len;
            self.first += 1;
        }
        false
    }
}

/// The first bytes of a request's buffers, where some devices put the header of a reply once they know its length.
#[derive(Debug)]
pub struct GuestHead<'m, const N: usize> {
    // As every piece has at least one byte, there are at most as many pieces as bytes.
    pieces: [libc::iovec; N],
    _ram: PhantomData<&'m GuestRam>,
}

impl<const N: usize> GuestHead<'_, N> {
    /// Writes the bytes.
    pub fn set(self, value: &[u8; N]) {
        let mut at = 0;
        for piece in &self.pieces {
            let len = piece.iov_len;
            if len > 0 {
                slice_of(piece, 0, len).copy_from(&value[at..at + len]);
            }
            at += len;
        }
    }
}

impl HeldByte {
    /// Writes the byte.
    pub fn set(self, value: u8) {
        // SAFETY: the address is inside of a region that `_ram` keeps mapped; a byte has no alignment.
        unsafe { self.address.write_volatile(value) };
    }
}

impl GuestByte<'_> {
    /// Keeps it beyond this call.
    pub fn hold(self) -> HeldByte {
        HeldByte {
            address: self.address,
            _ram: self.ram.clone(),
        }
    }

    /// Writes the byte.
    pub fn set(self, value: u8) {
        // SAFETY: the address is inside of a region that the lifetime keeps mapped; a byte has no alignment.
        unsafe { self.address.write_volatile(value) };
    }
}

impl<'m> GuestBuffers<'m> {
    /// Bytes that are left.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether no byte is left.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Number of separate pieces of memory.
    pub fn segments(&self) -> usize {
        self.segments.len()
    }

    /// The RAM that they are in.
    pub(crate) fn ram(&self) -> &Rc<GuestRam> {
        self.ram
    }

    /// Whether each piece's address and length is a multiple of `memory` and `length`, as `O_DIRECT` wants.
    pub fn is_aligned(&self, memory: usize, length: usize) -> bool {
        self.segments.iter().all(|s| {
            (s.iov_base as usize).is_multiple_of(memory) && s.iov_len.is_multiple_of(length)
        })
    }

    /// Whether all bytes are zero, at the time each was looked at.
    pub fn is_zero(&self) -> bool {
        let mut chunk = [0; 4096];
        let mut offset = 0;
        loop {
            match self.read_at(offset, &mut chunk) {
                0 => return true,
                n if chunk[..n].iter().all(|byte| *byte == 0) => offset += n,
                _ => return false,
            }
        }
    }

    /// Copies the next bytes to `out` and takes them off the front. Returns how many there were: less than `out.len()` only
    /// at the end.
    pub fn read(&mut self, out: &mut [u8]) -> usize {
        self.take(out.len(), |at, piece| {
            let range = at..at + piece.len();
            if let Some(part) = out.get_mut(range) {
                piece.copy_to(part);
            }
        })
    }

    /// Copies `data` into the next bytes and takes them off the front. Returns how many fitted.
    pub fn write(&mut self, data: &[u8]) -> usize {
        self.take(data.len(), |at, piece| {
            if let Some(part) = data.get(at..at + piece.len()) {
                piece.copy_from(part);
            }
        })
    }

    /// Takes `count` bytes off the front without looking at them; returns how many there were.
    pub fn skip(&mut self, count: usize) -> usize {
        self.take(count, |_, _| ())
    }

    /// Takes the first `N` bytes off the front, to be written later; `None` if there are not as many.
    pub fn reserve<const N: usize>(&mut self) -> Option<GuestHead<'m, N>> {
        if self.len < N {
            return None;
        }
        let mut pieces = [libc::iovec {
            iov_base: std::ptr::null_mut(),
            iov_len: 0,
        }; N];
        let mut count = 0;
        self.take(N, |_, piece| {
            pieces[count] = libc::iovec {
                iov_base: piece.ptr_guard_mut().as_ptr().cast(),
                iov_len: piece.len(),
            };
            count += 1;
        });
        Some(GuestHead {
            pieces,
            _ram: PhantomData,
        })
    }

    /// Copies `data` to `offset` bytes from the front without taking anything. Returns how many fitted.
    pub fn write_at(&mut self, offset: usize, data: &[u8]) -> usize {
        let mut skip = offset;
        let mut done = 0;
        for segment in self.segments.iter() {
            if skip >= segment.iov_len {
                skip -= segment.iov_len;
                continue;
            }
            let len = (segment.iov_len - skip).min(data.len() - done);
            if len == 0 {
                break;
            }
            slice_of(segment, skip, len).copy_from(&data[done..done + len]);
            done += len;
            skip = 0;
        }
        done
    }

    /// Copies bytes from `offset` from the front to `out` without taking anything. Returns how many there were.
    pub fn read_at(&self, offset: usize, out: &mut [u8]) -> usize {
        let mut skip = offset;
        let mut done = 0;
        for segment in self.segments.iter() {
            if skip >= segment.iov_len {
                skip -= segment.iov_len;
                continue;
            }
            let len = (segment.iov_len - skip).min(out.len() - done);
            if len == 0 {
                break;
            }
            slice_of(segment, skip, len).copy_to(&mut out[done..done + len]);
            done += len;
            skip = 0;
        }
        done
    }

    /// Cuts everything after the first `count` bytes off.
    pub fn truncate(&mut self, count: usize) {
        if count >= self.len {
            return;
        }
        let mut left = count;
        let mut keep = 0;
        for segment in self.segments.iter_mut() {
            if left == 0 {
                break;
            }
            segment.iov_len = segment.iov_len.min(left);
            left -= segment.iov_len;
            keep += 1;
        }
        self.segments = &mut std::mem::take(&mut self.segments)[..keep];
        self.len = count;
    }

    /// Cuts everything after the first `count` pieces off.
    pub fn keep_segments(&mut self, count: usize) {
        if count >= self.segments.len() {
            return;
        }
        self.segments = &mut std::mem::take(&mut self.segments)[..count];
        self.len = self.segments.iter().map(|s| s.iov_len).sum();
    }

    /// Takes the last byte off the back.
    pub fn take_last_byte(&mut self) -> Option<GuestByte<'m>> {
        let last = self.segments.last_mut()?;
        last.iov_len = last.iov_len.checked_sub(1)?;
        // The address was inside of the piece, and still is.
        let address = last.iov_base.cast::<u8>().wrapping_add(last.iov_len);
        let empty = last.iov_len == 0;
        self.len -= 1;
        if empty {
            let keep = self.segments.len() - 1;
            self.segments = &mut std::mem::take(&mut self.segments)[..keep];
        }
        Some(GuestByte {
            address,
            ram: self.ram,
        })
    }

    /// `preadv`: fills the buffers from `file` at `offset`; the bytes read are not taken off.
    pub fn fill_from_file(&mut self, file: BorrowedFd<'_>, offset: i64) -> Result<usize, Errno> {
        retry(|| {
            // SAFETY: the pieces are in mapped RAM that the lifetime keeps; the kernel writes inside of them only.
            unsafe {
                libc::preadv(
                    file.as_raw_fd(),
                    self.segments.as_ptr(),
                    self.count(),
                    offset,
                )
            }
        })
    }

    /// `pwritev`: writes the buffers to `file` at `offset`; the bytes written are not taken off.
    pub fn send_to_file(&self, file: BorrowedFd<'_>, offset: i64) -> Result<usize, Errno> {
        retry(|| {
            // SAFETY: the pieces are in mapped RAM that the lifetime keeps; the kernel only reads them.
            unsafe {
                libc::pwritev(
                    file.as_raw_fd(),
                    self.segments.as_ptr(),
                    self.count(),
                    offset,
                )
            }
        })
    }

    /// As [`send_to_file`](Self::send_to_file), by `pwritev2`; to `append` is to write to the file's end, wherever it is by
    /// then (`RWF_APPEND`). `offset` is the end as far as it is known then: the overlayfs of Linux 6.1 forgets the flag.
    pub fn put_into_file(
        &self,
        file: BorrowedFd<'_>,
        offset: i64,
        append: bool,
    ) -> Result<usize, Errno> {
        let flags = if append { libc::RWF_APPEND } else { 0 };
        retry(|| {
            // SAFETY: the pieces are in mapped RAM that the lifetime keeps; the kernel only reads them.
            unsafe {
                libc::pwritev2(
                    file.as_raw_fd(),
                    self.segments.as_ptr(),
                    self.count(),
                    offset,
                    flags,
                )
            }
        })
    }

    /// Whether `file` has from `offset` on what the buffers begin with, as far as the file goes.
    pub fn begin_like_file(&self, file: BorrowedFd<'_>, offset: i64) -> Result<bool, Errno> {
        let (mut ours, mut theirs) = ([0; 4096], [0; 4096]);
        let mut done = 0;
        loop {
            let want = self.read_at(done, &mut ours);
            let part = libc::iovec {
                iov_base: theirs.as_mut_ptr().cast(),
                iov_len: want,
            };
            // At most 4 GiB were done.
            let at = offset.saturating_add(done as i64);
            // SAFETY: the piece is `theirs`, which has at least as many bytes.
            let have = retry(|| unsafe { libc::preadv(file.as_raw_fd(), &raw const part, 1, at) })?;
            if ours.get(..have) != theirs.get(..have) {
                return Ok(false);
            }
            done += have;
            if have < ours.len() {
                return Ok(true);
            }
        }
    }

    /// `readv` of one packet: the buffers first, then `rest` for what does not fit. Returns the packet's length. Pieces after
    /// the first [`PACKET_SEGMENTS`] are cut off before.
    pub fn fill_from_stream(
        &mut self,
        stream: BorrowedFd<'_>,
        rest: &mut [u8],
    ) -> Result<usize, Errno> {
        self.keep_segments(PACKET_SEGMENTS);
        let last = libc::iovec {
            iov_base: rest.as_mut_ptr().cast(),
            iov_len: rest.len(),
        };
        let last = (!rest.is_empty()).then_some(last);
        with_one_more(self.segments, None, last, |all| {
            let count = all.len() as libc::c_int; // at most PACKET_SEGMENTS + 1
            // SAFETY: the pieces are in mapped RAM that the lifetime keeps, and `rest` is borrowed mutably for the call.
            retry(|| unsafe { libc::readv(stream.as_raw_fd(), all.as_ptr(), count) })
        })
    }

    /// `writev` of `head` and then the buffers, as one packet. `EMSGSIZE` if there are more than [`PACKET_SEGMENTS`] pieces.
    pub fn send_to_stream_after(
        &self,
        head: &[u8],
        stream: BorrowedFd<'_>,
    ) -> Result<usize, Errno> {
        if self.segments.len() > PACKET_SEGMENTS {
            return Err(Errno::EMSGSIZE);
        }
        let first = libc::iovec {
            // writev does not write through this pointer.
            iov_base: head.as_ptr().cast_mut().cast(),
            iov_len: head.len(),
        };
        with_one_more(self.segments, Some(first), None, |all| {
            let count = all.len() as libc::c_int; // at most PACKET_SEGMENTS + 1
            // SAFETY: `head` is borrowed for the call, the other pieces are in mapped RAM that the lifetime keeps; the
            // kernel only reads all of them.
            retry(|| unsafe { libc::writev(stream.as_raw_fd(), all.as_ptr(), count) })
        })
    }

    fn count(&self) -> libc::c_int {
        // At most MAX_CHAIN_SEGMENTS, which is IOV_MAX.
        self.segments.len() as libc::c_int
    }

    /// Takes `count` bytes off the front and shows each piece, with its offset from the first byte taken.
    fn take(&mut self, count: usize, mut show: impl FnMut(usize, VolatileSlice<'_>)) -> usize {
        let mut done = 0;
        let mut used = 0;
        for segment in self.segments.iter_mut() {
            let len = segment.iov_len.min(count - done);
            if len > 0 {
                show(done, slice_of(segment, 0, len));
            }
            done += len;
            if len < segment.iov_len {
                // The piece has more than `len` bytes, so the sum stays inside of it.
                segment.iov_base = segment.iov_base.cast::<u8>().wrapping_add(len).cast();
                segment.iov_len -= len;
                break;
            }
            used += 1;
        }
        self.segments = &mut std::mem::take(&mut self.segments)[used..];
        self.len -= done;
        done
    }
}

/// Pieces of one packet that are given to the kernel at once. A driver that has tens of pieces for a 64 KiB packet is normal
/// (17 pages and a header); the array is on the stack, so the number is kept small.
pub const PACKET_SEGMENTS: usize = 63;

/// `len` bytes of `segment` from `skip` on; the caller has checked that they are there.
fn slice_of(segment: &libc::iovec, skip: usize, len: usize) -> VolatileSlice<'_> {
    debug_assert!(skip + len <= segment.iov_len);
    // SAFETY: segments come from `GuestRam::resolve` and are only ever shortened, so these bytes are inside of a mapped
    // region, and the borrow of the segment is inside of the borrow of the RAM.
    unsafe { VolatileSlice::new(segment.iov_base.cast::<u8>().wrapping_add(skip), len) }
}

/// Repeats a call that a signal interrupted.
fn retry(mut call: impl FnMut() -> isize) -> Result<usize, Errno> {
    loop {
        match Errno::result(call()) {
            // Not negative here.
            Ok(n) => return Ok(n as usize),
            Err(Errno::EINTR) => {}
            Err(errno) => return Err(errno),
        }
    }
}

/// A page-aligned buffer for I/O that guest memory is not aligned well enough for.
#[derive(Debug)]
pub struct BounceBuffer {
    storage: Vec<u8>,
    start: usize,
    size: usize,
}

impl BounceBuffer {
    /// `size` bytes, the first of which is at a multiple of `align` (a power of two).
    pub fn new(size: usize, align: usize) -> Self {
        let storage = vec![0; size + align];
        let start = storage.as_ptr().align_offset(align).min(align);
        Self {
            storage,
            start,
            size,
        }
    }

    /// The buffer.
    pub fn bytes(&mut self) -> &mut [u8] {
        &mut self.storage[self.start..self.start + self.size]
    }
}

/// What `O_DIRECT` demands of a request on `file`: multiples of a buffer's address, and of a place and length in the file
/// (`statx(2)`, `STATX_DIOALIGN`). `None` if the kernel or the file system does not say.
pub fn direct_io_alignment(file: BorrowedFd<'_>) -> Option<(usize, usize)> {
    // SAFETY: all-zero bytes are a valid statx structure, which holds integers only.
    let mut stat: libc::statx = unsafe { std::mem::zeroed() };
    // SAFETY: the path is an empty C string, with which AT_EMPTY_PATH means the descriptor itself; the structure is ours.
    let result = unsafe {
        libc::statx(
            file.as_raw_fd(),
            c"".as_ptr(),
            libc::AT_EMPTY_PATH,
            libc::STATX_DIOALIGN,
            &raw mut stat,
        )
    };
    Errno::result(result).ok()?;
    if stat.stx_mask & libc::STATX_DIOALIGN == 0 || stat.stx_dio_mem_align == 0 {
        return None;
    }
    Some((
        stat.stx_dio_mem_align as usize,
        stat.stx_dio_offset_align as usize,
    ))
}

#[cfg(test)]
mod tests {
    use super::*;
    use nix::sys::memfd::{MFdFlags, memfd_create};
    use std::os::fd::AsFd;
    use std::sync::atomic::Ordering;
    use vm_memory::Bytes;

    fn memfd(size: u64) -> File {
        let file = File::from(memfd_create(c"ram", MFdFlags::MFD_CLOEXEC).unwrap());
        file.set_len(size).unwrap();
        file
    }

    fn ram() -> Rc<GuestRam> {
        let file = memfd(0x4000);
        Rc::new(
            GuestRam::new(vec![
                Region::new(0x2000, 0x2000, 0x7000_2000, &file, 0x2000).unwrap(),
                Region::new(0, 0x2000, 0x7000_0000, &file, 0).unwrap(),
            ])
            .unwrap(),
        )
    }

    #[test]
    fn a_file_that_is_too_short_is_refused_before_it_is_mapped() {
        let file = memfd(0x1000);
        for (offset, size) in [(0, 0x1001), (0x1000, 1), (u64::MAX, 1), (0, 0)] {
            assert!(
                Region::new(0, size, 0, &file, offset).is_err(),
                "{offset} {size}"
            );
        }
        assert!(Region::new(0, 0x1000, 0, &file, 0).is_ok());
    }

    #[test]
    fn overlapping_wrapping_and_too_many_regions_are_refused() {
        let file = memfd(0x2000);
        let at = |guest, user| Region::new(guest, 0x2000, user, &file, 0);
        assert!(GuestRam::new(vec![at(0, 0).unwrap(), at(0x1000, 0x2000).unwrap()]).is_err());
        assert!(at(u64::MAX - 0x1000, 0).is_err());
        assert!(at(0, u64::MAX - 0x1000).is_err());
        let many = (0..=MAX_MEMORY_REGIONS as u64)
            .map(|i| at(i * 0x2000, i * 0x2000).unwrap())
            .collect();
        assert!(matches!(
            GuestRam::new(many),
            Err(MemoryError::TooMany { .. })
        ));
    }

    #[test]
    fn buffers_cross_regions_and_are_taken_in_order() {
        let ram = ram();
        ram.map()
            .write_slice(b"abcdef", GuestAddress(0x1ffd))
            .unwrap();
        let mut list = SegmentList::default();
        ram.resolve(GuestAddress(0x1ffd), 6, &mut list).unwrap();
        let mut buffers = list.buffers(&ram);
        assert_eq!((buffers.len(), buffers.segments()), (6, 2));
        let mut two = [0; 2];
        assert_eq!(buffers.read(&mut two), 2);
        assert_eq!(&two, b"ab");
        let mut peek = [0; 3];
        assert_eq!(buffers.read_at(1, &mut peek), 3);
        assert_eq!(&peek, b"def");
        buffers.take_last_byte().unwrap().set(b'F');
        assert_eq!(
            buffers.write_at(1, b"DEX"),
            2,
            "the last byte is not ours any more"
        );
        assert_eq!(buffers.write(b"C"), 1);
        buffers.truncate(1);
        assert_eq!(buffers.write(b"12"), 1);
        assert!(buffers.is_empty());
        assert!(buffers.take_last_byte().is_none());
        let mut all = [0; 6];
        ram.map()
            .read_slice(&mut all, GuestAddress(0x1ffd))
            .unwrap();
        assert_eq!(&all, b"abC1EF");
    }

    #[test]
    fn a_span_is_in_one_region_or_there_is_none() {
        let ram = ram();
        for (at, len, found) in [
            (0, 0x2000, true),
            (0x1ffe, 2, true),
            (0x1ffe, 3, false),
            (0x2000, 0x2000, true),
            (0x3fff, 2, false),
            (0x4000, 1, false),
            (u64::MAX, 1, false),
            (1, usize::MAX, false),
        ] {
            let span = Span::new(&ram, GuestAddress(at), len);
            assert_eq!(span.is_some(), found, "{len} bytes at {at:#x}");
            assert_eq!(ram.piece(GuestAddress(at), len).is_some(), found);
        }
        let span = Span::new(&ram, GuestAddress(0x2000), 4).unwrap();
        span.bytes().store(7u16, 2, Ordering::Release).unwrap();
        assert_eq!(ram.map().read_obj::<u16>(GuestAddress(0x2002)).unwrap(), 7);
        assert!(span.bytes().load::<u16>(3, Ordering::Relaxed).is_err());
        assert!(span.bytes().load::<u16>(4, Ordering::Relaxed).is_err());
    }

    #[test]
    fn a_head_is_written_after_the_rest() {
        let ram = ram();
        let mut list = SegmentList::default();
        ram.resolve(GuestAddress(0x1ffe), 3, &mut list).unwrap();
        ram.resolve(GuestAddress(0x100), 4, &mut list).unwrap();
        let mut buffers = list.buffers(&ram);
        let head = buffers.reserve::<4>().unwrap();
        assert_eq!((buffers.len(), buffers.write(b"xyz")), (3, 3));
        head.set(b"abcd");
        assert!(buffers.reserve::<1>().is_none());
        let mut bytes = [0; 3];
        ram.map()
            .read_slice(&mut bytes, GuestAddress(0x1ffe))
            .unwrap();
        assert_eq!(&bytes, b"abc");
        let mut bytes = [0; 4];
        ram.map()
            .read_slice(&mut bytes, GuestAddress(0x100))
            .unwrap();
        assert_eq!(&bytes, b"dxyz");
    }

    #[test]
    fn ranges_outside_of_ram_do_not_resolve() {
        let ram = ram();
        let mut list = SegmentList::default();
        for (address, len) in [(0x4000, 1), (0x3fff, 2), (u64::MAX, 1), (0, u32::MAX)] {
            assert_eq!(
                ram.resolve(GuestAddress(address), len, &mut list),
                Err(ResolveError::OutsideRam)
            );
        }
        assert_eq!(ram.guest_address(0x7000_3fff), Some(GuestAddress(0x3fff)));
        assert_eq!(ram.guest_address(0x7000_4000), None);
    }

    #[test]
    fn files_are_read_and_written_in_place() {
        let ram = ram();
        let file = memfd(16);
        nix::sys::uio::pwrite(&file, b"0123456789abcdef", 0).unwrap();
        let mut list = SegmentList::default();
        ram.resolve(GuestAddress(0x1ffc), 8, &mut list).unwrap();
        let mut buffers = list.buffers(&ram);
        assert_eq!(buffers.fill_from_file(file.as_fd(), 4), Ok(8));
        assert_eq!(buffers.send_to_file(file.as_fd(), 0), Ok(8));
        let mut got = [0; 16];
        nix::sys::uio::pread(&file, &mut got, 0).unwrap();
        assert_eq!(&got, b"456789ab89abcdef");
    }
}
