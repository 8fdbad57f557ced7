//! Guest RAM whose clean pages are the template's, shared with all other clones.
//!
//! **Job.** Maps the template's file `memory` privately where it has something, and watches that mapping (`userfaultfd(2)`) for first
//! looks and for writes. What is looked at is mapped from the template, its block's checksum compared before. What is written to
//! moves into the VM's own memory file: it is copied there, and that file mapped in its place. Device processes have the memory
//! file mapped, where what is clean is missing: their mappings are watched as well, and what they touch moves first.
//!
//! **Who is not trusted**: whoever made the template: no byte reaches the guest before its block's checksum is right once; who can
//! write the file afterwards owns the guest, as with any snapshot. Device processes: their addresses are looked up in a table, a
//! fault can only move a unit of this VM's memory, and a call about their memory that fails is their loss.
//!
//! **Why this way.** A page is in exactly one of two places for everybody at any time. A unit moves in an order in which nobody can see
//! it in both: it is written to the memory file, which no one else can read there yet; it is mapped here, with the
//! same bytes, so that a vCPU that reads meanwhile sees no difference, and one that writes has waited; only then devices may
//! go on. Minor faults make that possible: a mapping asks even for pages that are in the page cache, which write-protects
//! the template's from the start (`UFFDIO_CONTINUE_MODE_WP`, Linux 6.4) and keeps a device from pages that were just made.
//! Where the template lies on no tmpfs, or the kernel is older, [`super::lazy`] does it by copying.
//!
//! A block that is damaged ends the process: there is nothing that a vCPU which waits for it could be given.

#![allow(unsafe_code)] // mmap over our own mapping of guest RAM, and _exit

use std::collections::BTreeMap;
use std::fs::File;
use std::num::NonZeroUsize;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::FileExt;
use std::sync::mpsc::{SyncSender, sync_channel};
use std::sync::{Arc, Mutex, PoisonError};

use ipc::log::error;
use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, ppoll};
use nix::sys::mman::{MapFlags, ProtFlags, mmap};
use nix::sys::time::TimeSpec;
use vmm_sys_util::eventfd::EventFd;

use super::GuestRam;
use super::clean::{BLOCK, BlockError, Clean, Window};
use super::pager::{Answer, Progress};
use super::uffd::{
    FEATURE_MINOR_SHMEM, FEATURE_MISSING_SHMEM, FEATURE_PAGEFAULT_FLAG_WP,
    FEATURE_WP_HUGETLBFS_SHMEM, Fault, MINOR, MISSING, PAGE, Uffd, WRITE_PROTECT,
};
use crate::snapshot::memory::Index;

/// Faults of one device that are answered before others get their turn.
const TURN: usize = 16;

/// Why memory is not shared; the text goes behind "memory is copied: ".
#[derive(Debug, thiserror::Error)]
pub enum Refusal {
    /// Parts of RAM differ in what holds for them.
    #[error("memory has policies of its own for nodes, or is dumped in part")]
    Zones,
    /// Too many units.
    #[error("the snapshot is too large")]
    Large,
    /// This process cannot watch its memory in that way.
    #[error("this host has no userfaultfd with minor faults and write protection for this process")]
    Uffd(#[source] Errno),
    /// Not a tmpfs, or this host cannot.
    #[error("the file memory is not on a tmpfs, or this kernel is older than Linux 6.4")]
    File(#[source] Errno),
    /// A call failed.
    #[error("{call} failed")]
    Call {
        /// Which.
        call: &'static str,
        /// What the kernel said.
        source: Errno,
    },
    /// A block is damaged.
    #[error("the checksum of its first block, at {0:#x}, is wrong")]
    Damaged(u64),
}

/// RAM that is partly the template's.
#[derive(Debug)]
pub struct SharingRam {
    uffd: Uffd,
    ram: Arc<GuestRam>,
    clean: Arc<Clean>,
    orders: Arc<Orders>,
}

/// What the main thread asks of the pager.
#[derive(Debug)]
enum Order {
    /// A device process has mapped the memory file.
    Watch(String, Watched, SyncSender<Result<(), Errno>>),
    /// Everything becomes the VM's own, as it is.
    Everything,
    /// Everything becomes the VM's own, and is zero.
    Nothing(SyncSender<()>),
}

/// Where orders are left for the pager.
#[derive(Debug)]
pub struct Orders {
    left: Mutex<Vec<Order>>,
    event: EventFd,
    /// Of everything on its way in.
    progress: Arc<Progress>,
}

/// A device process's mapping of guest RAM.
#[derive(Debug)]
struct Watched {
    uffd: Arc<Uffd>,
    regions: Vec<Window>,
}

impl Watched {
    /// The offset in RAM of one of its addresses.
    fn offset(&self, address: u64) -> Option<u64> {
        self.regions.iter().find_map(|region| {
            let within = address.checked_sub(region.host)?;
            (within < region.size).then(|| region.offset + within)
        })
    }

    /// Where it has a part of RAM, as far as that is in one region.
    fn address(&self, offset: u64, length: u64) -> Option<u64> {
        self.regions.iter().find_map(|region| {
            let within = offset.checked_sub(region.offset)?;
            (within.checked_add(length)? <= region.size).then(|| region.host.wrapping_add(within))
        })
    }
}

/// The userfaultfd of a device process's memory.
#[derive(Debug, Clone)]
pub struct DeviceFaults(Arc<Uffd>);

impl DeviceFaults {
    /// What a device process sent. Were it something else, its faults would not be answered, and nobody would wait for it.
    #[must_use]
    pub fn new(fd: OwnedFd) -> Self {
        Self(Arc::new(Uffd::of(fd)))
    }
}

impl Orders {
    /// Watches the mapping of guest RAM of device `id`, in place of the one that it had: (offset in RAM, bytes, its address) of
    /// each region. The device may touch it when this returns.
    ///
    /// # Errors
    /// It has no such mapping.
    pub fn watch(
        &self,
        id: &str,
        faults: &DeviceFaults,
        regions: impl IntoIterator<Item = (u64, u64, u64)>,
    ) -> Result<(), Errno> {
        let (tell, told) = sync_channel(1);
        let regions = regions
            .into_iter()
            .map(|(offset, size, host)| Window { host, offset, size });
        let watched = Watched {
            uffd: faults.0.clone(),
            regions: regions.collect(),
        };
        self.leave(Order::Watch(id.to_owned(), watched, tell));
        told.recv().unwrap_or(Err(Errno::EPIPE))
    }

    /// Has everything become the VM's own, for those that map the memory file and cannot be watched.
    pub fn bring_in(&self) -> Arc<Progress> {
        self.leave(Order::Everything);
        self.progress.clone()
    }

    /// Everything is the VM's own when this returns, and what was the template's is zero. No vCPU runs, no device has a queue.
    pub fn forget(&self) {
        let (tell, told) = sync_channel(1);
        self.leave(Order::Nothing(tell));
        let _ = told.recv();
    }

    fn leave(&self, order: Order) {
        self.left
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .push(order);
        let _ = self.event.write(1);
    }
}

impl SharingRam {
    /// Has `ram`, which is zero and in a memfd, be that of `file` until somebody writes there.
    ///
    /// # Errors
    /// Why that is not possible, and what was given. RAM is as it was before.
    pub fn new(
        ram: &Arc<GuestRam>,
        file: File,
        index: Index,
    ) -> Result<Self, (Refusal, File, Index)> {
        let clean = match Clean::new(ram, file, index) {
            Ok(clean) => clean,
            Err((file, index)) => return Err((Refusal::Large, file, index)),
        };
        match over(ram, &clean) {
            Ok((uffd, orders)) => {
                let clean = Arc::new(clean);
                ram.set_clean(clean.clone());
                Ok(Self {
                    uffd,
                    ram: ram.clone(),
                    clean,
                    orders: Arc::new(orders),
                })
            }
            Err(refusal) => {
                for window in clean.windows() {
                    // It was mapped like that before, so it can be again, and if not, filling it will tell.
                    let _ = own_mapping(ram, window.host, window.offset, window.size);
                }
                let (file, index) = clean.into_parts();
                Err((refusal, file, index))
            }
        }
    }

    /// For the main thread.
    #[must_use]
    pub fn orders(&self) -> Arc<Orders> {
        self.orders.clone()
    }

    /// Answers faults and does what it is told, for ever.
    pub fn serve(self) {
        let mut buffer = vec![0; BLOCK as usize];
        let mut devices: BTreeMap<String, Watched> = BTreeMap::new();
        let mut wholly = false;
        // vmm-sys-util's eventfds know only their number.
        // SAFETY: `self` owns the eventfd and outlives the borrow.
        let event = unsafe { BorrowedFd::borrow_raw(self.orders.event.as_raw_fd()) };
        loop {
            let mut polled = vec![
                PollFd::new(self.uffd.as_fd(), PollFlags::POLLIN),
                PollFd::new(event, PollFlags::POLLIN),
            ];
            polled.extend(
                devices
                    .values()
                    .map(|watched| PollFd::new(watched.uffd.as_fd(), PollFlags::POLLIN)),
            );
            let timeout = wholly.then(|| TimeSpec::new(0, 0));
            let _ = ppoll(&mut polled, timeout, None);
            drop(polled);
            self.answer(&mut buffer);
            for watched in devices.values() {
                self.answer_device(watched, &mut buffer);
            }
            let _ = self.orders.event.read();
            let left = {
                let mut left = self
                    .orders
                    .left
                    .lock()
                    .unwrap_or_else(PoisonError::into_inner);
                std::mem::take(&mut *left)
            };
            for order in left {
                match order {
                    Order::Watch(id, watched, tell) => {
                        let _ = tell.send(self.watch(&watched));
                        devices.insert(id, watched);
                    }
                    Order::Everything => wholly = true,
                    Order::Nothing(tell) => {
                        self.forget();
                        let _ = tell.send(());
                    }
                }
            }
            wholly = wholly && self.bring_in(&mut buffer);
        }
    }

    /// Another unit becomes the VM's own, for those that wait until all are; `false` if all are.
    fn bring_in(&self, buffer: &mut [u8]) -> bool {
        let progress = &self.orders.progress;
        match self.clean.next_clean(0) {
            Some(offset) => {
                self.take(offset, buffer);
                progress.set(offset);
                true
            }
            None => {
                progress.set(self.ram.size());
                progress.finish();
                false
            }
        }
    }

    /// Watches a device process's mapping where there is something to watch.
    fn watch(&self, watched: &Watched) -> Result<(), Errno> {
        for window in self.clean.windows() {
            if self
                .clean
                .next_clean(window.offset)
                .is_none_or(|clean| clean >= window.offset + window.size)
            {
                continue;
            }
            let address = watched
                .address(window.offset, window.size)
                .ok_or(Errno::EFAULT)?;
            watched
                .uffd
                .register(address, window.size, MISSING | MINOR)?;
        }
        Ok(())
    }

    fn answer_device(&self, watched: &Watched, buffer: &mut [u8]) {
        for _ in 0..TURN {
            // A descriptor of somebody else's: reading it may wait, for ever, where nothing is said to be there.
            if !watched.uffd.has_news() {
                return;
            }
            let Some(fault) = watched.uffd.fault() else {
                return;
            };
            let page = fault.address & !(PAGE - 1);
            let found = watched
                .offset(page)
                .and_then(|offset| Some((self.clean.window(offset)?, offset)));
            if let Some((window, offset)) = found {
                self.take(offset, buffer);
                let (start, end) = self.clean.unit(window, offset);
                if let Some(address) = watched.address(start, end - start) {
                    // From here on its pages come from the memory file alone, as they do where nobody watches.
                    let _ = watched.uffd.unregister(address, end - start);
                }
            }
            watched.uffd.wake(page, PAGE);
        }
    }

    /// Answers one fault of this process.
    fn answer_one(&self, fault: Fault, buffer: &mut [u8]) {
        let page = fault.address & !(PAGE - 1);
        if let Some((window, offset)) = self.clean.of_address(page)
            && self.clean.is_clean(offset)
            && !(fault.reads_what_is_there()
                && self.clean.has(offset)
                && self.share(window, offset, buffer))
        {
            self.take(offset, buffer);
        }
        // Who asked for what was done meanwhile waits for this.
        self.uffd.wake(page, PAGE);
    }

    /// Maps the template's pages of the block with this offset; `false` if it has no such page.
    fn share(&self, window: Window, offset: u64, buffer: &mut [u8]) -> bool {
        if let Err(e) = self.clean.check(offset, buffer) {
            unusable(offset, &e);
        }
        let block = offset & !(BLOCK - 1);
        let end = (block + BLOCK).min(window.offset + window.size);
        let mut there = true;
        for piece in (block.max(window.offset)..end).step_by(self.clean.piece() as usize) {
            let until = (piece + self.clean.piece()).min(end);
            let mut at = piece;
            while at < until && self.clean.is_clean(piece) {
                let host = window.host + (at - window.offset);
                at += match self.uffd.map_protected(host, until - at) {
                    Ok(()) => until - at,
                    Err((Errno::EAGAIN, mapped)) => mapped,
                    // It is mapped already.
                    Err((Errno::EEXIST, mapped)) => mapped + PAGE,
                    // The template has no such page.
                    Err((_, mapped)) => {
                        there &= at + mapped != offset & !(PAGE - 1);
                        mapped + PAGE
                    }
                };
            }
        }
        there
    }

    /// The unit with this offset becomes the VM's own.
    fn take(&self, offset: u64, buffer: &mut [u8]) {
        let Some(window) = self.clean.window(offset) else {
            return;
        };
        if !self.clean.is_clean(offset) {
            return;
        }
        let (start, end) = self.clean.unit(window, offset);
        let mut at = start;
        while at < end {
            let until = ((at & !(BLOCK - 1)) + BLOCK).min(end);
            if self.clean.has(at) {
                let block = match self.clean.block(at, buffer) {
                    Ok(block) => block,
                    Err(e) => unusable(at, &e),
                };
                let first = (at % BLOCK) as usize;
                let piece = &block[first..first + (until - at) as usize];
                if let Err(e) = self
                    .file()
                    .map_or(Ok(()), |file| file.write_all_at(piece, at))
                {
                    not_taken(at, &e);
                }
            }
            at = until;
        }
        let host = window.host + (start - window.offset);
        if let Err(e) = own_mapping(&self.ram, host, start, end - start) {
            not_taken(start, &e.into());
        }
        self.clean.taken(offset);
        self.uffd.wake(host, end - start);
    }

    /// All becomes the VM's own, empty.
    fn forget(&self) {
        for window in self.clean.windows() {
            if let Err(e) = own_mapping(&self.ram, window.host, window.offset, window.size) {
                not_taken(window.offset, &e.into());
            }
            let mut at = window.offset;
            while at < window.offset + window.size {
                self.clean.taken(at);
                at = self.clean.unit(*window, at).1;
            }
            self.uffd.wake(window.host, window.size);
        }
    }

    fn file(&self) -> Option<&File> {
        self.ram.regions().next().map(|region| region.file)
    }
}

impl Answer for SharingRam {
    fn descriptor(&self) -> BorrowedFd<'_> {
        self.uffd.as_fd()
    }

    fn answer(&self, buffer: &mut [u8]) {
        while let Some(fault) = self.uffd.fault() {
            self.answer_one(fault, buffer);
        }
    }
}

/// Maps the template over RAM and watches that.
fn over(ram: &GuestRam, clean: &Clean) -> Result<(Uffd, Orders), Refusal> {
    let call = |call| move |source| Refusal::Call { call, source };
    let no_event = |e: std::io::Error| {
        call("eventfd2")(e.raw_os_error().map_or(Errno::EMFILE, Errno::from_raw))
    };
    let uffd = Uffd::new(
        FEATURE_MISSING_SHMEM
            | FEATURE_MINOR_SHMEM
            | FEATURE_PAGEFAULT_FLAG_WP
            | FEATURE_WP_HUGETLBFS_SHMEM,
    )
    .map_err(Refusal::Uffd)?;
    let orders = Orders {
        left: Mutex::new(Vec::new()),
        event: EventFd::new(libc::EFD_NONBLOCK | libc::EFD_CLOEXEC).map_err(no_event)?,
        progress: Arc::new(Progress::new().map_err(no_event)?),
    };
    for window in clean.windows() {
        let (host, size) = (window.host, window.size);
        map_over(
            ram,
            host,
            size,
            MapFlags::MAP_PRIVATE,
            clean.file(),
            window.offset,
        )
        .map_err(call("mmap"))?;
        uffd.register(host, size, MISSING | WRITE_PROTECT | MINOR)
            .map_err(Refusal::File)?;
    }
    // Whether the kernel can do what comes later is seen at the first block.
    if let Some(first) = clean.windows().first() {
        let mut buffer = vec![0; BLOCK as usize];
        clean
            .check(first.offset, &mut buffer)
            .map_err(|_| Refusal::Damaged(first.offset))?;
        match uffd.map_protected(first.host, PAGE) {
            // A file with holes where there are zeroes.
            Ok(()) | Err((Errno::EFAULT, _)) => {}
            Err((source, _)) => return Err(Refusal::File(source)),
        }
    }
    Ok((uffd, orders))
}

/// Maps the VM's memory file, at `offset`, over `size` bytes of this process's mapping of RAM at `host`.
fn own_mapping(ram: &GuestRam, host: u64, offset: u64, size: u64) -> Result<(), Errno> {
    let file = ram.regions().next().map(|region| region.file);
    let file = file.ok_or(Errno::ENODEV)?;
    map_over(ram, host, size, MapFlags::MAP_SHARED, file, offset)
}

fn map_over(
    ram: &GuestRam,
    host: u64,
    size: u64,
    kind: MapFlags,
    file: &File,
    offset: u64,
) -> Result<(), Errno> {
    let size = size as usize;
    let length = NonZeroUsize::new(size).ok_or(Errno::EINVAL)?;
    // SAFETY: the range is part of RAM's mapping, which stays until the process ends and is only used through volatile accesses; what
    // it holds for the guest is the same before and after, or nobody uses it (see the module's page).
    let mapped = unsafe {
        mmap(
            NonZeroUsize::new(host as usize),
            length,
            ProtFlags::PROT_READ | ProtFlags::PROT_WRITE,
            kind | MapFlags::MAP_FIXED | MapFlags::MAP_NORESERVE,
            file,
            libc::off_t::try_from(offset).map_err(|_| Errno::EOVERFLOW)?,
        )
    }?;
    if !ram.is_dumped() {
        // SAFETY: the range is the mapping that was just made; the advice changes nothing that it holds.
        Errno::result(unsafe { libc::madvise(mapped.as_ptr(), size, libc::MADV_DONTDUMP) })?;
    }
    Ok(())
}

fn unusable(offset: u64, why: &BlockError) -> ! {
    error!(
        "-incoming: {BLOCK} bytes of the snapshot's file memory at {:#x} cannot be used: {why}",
        offset & !(BLOCK - 1)
    );
    // SAFETY: ends the process. Threads that wait for this block cannot be stopped in any other way.
    unsafe { libc::_exit(1) }
}

fn not_taken(offset: u64, why: &std::io::Error) -> ! {
    error!("-incoming: guest memory at {offset:#x} cannot be filled: {why}");
    // SAFETY: as above.
    unsafe { libc::_exit(1) }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Where a process has its memory is what it says; whatever that is, it leads to no offset outside of the regions.
    #[test]
    fn addresses_that_nobody_has_lead_nowhere() {
        const SIZE: u64 = 1 << 20;
        let null = File::open("/dev/null").unwrap();
        let region = |host, offset| Window {
            host,
            offset,
            size: SIZE,
        };
        for (first, second) in [
            (0, 0),
            (u64::MAX, 0),
            (u64::MAX - SIZE / 2, 4096),
            (4096, 4096 + SIZE / 2),
            (1, u64::MAX - SIZE),
        ] {
            let watched = Watched {
                uffd: DeviceFaults::new(null.try_clone().unwrap().into()).0,
                regions: vec![region(first, 0), region(second, 4 * SIZE)],
            };
            for address in [0, 1, 4096, SIZE, u64::MAX / 2, u64::MAX - SIZE, u64::MAX] {
                let lies_in = |offset: u64| offset < SIZE || (4 * SIZE..5 * SIZE).contains(&offset);
                assert!(watched.offset(address).is_none_or(lies_in), "{address:#x}");
            }
            assert_eq!(watched.address(SIZE, 1), None);
            assert_eq!(watched.address(SIZE - 1, 2), None);
            assert_eq!(watched.address(4 * SIZE, u64::MAX), None);
            assert_eq!(watched.address(0, SIZE), Some(first));
            assert_eq!(
                watched.address(5 * SIZE - 1, 1),
                Some(second.wrapping_add(SIZE - 1))
            );
        }
    }
}
