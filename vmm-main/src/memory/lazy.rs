//! Guest RAM that comes in from a snapshot when it is wanted.
//!
//! **Job.** Registers RAM's mapping for page faults (`userfaultfd(2)`), answers each with the block of the file `memory` that
//! holds the page, checked, and brings in all other blocks meanwhile, until RAM is whole.
//!
//! **Who is not trusted**: whoever made the file: no byte of it reaches the guest before its block's checksum is right. Device
//! processes: they map the same memory, where a page that is missing would read as zero and stay so; they get no queue
//! until RAM is whole.
//!
//! **Why this way.** Only this process's mapping has to be watched, so jails of device processes stay as they are. `UFFDIO_COPY`
//! adds a page to the memory file whole or not at all, whoever else is about to. A thread of this process rather than
//! another process: it needs what this one has, RAM and the file, and its filter leaves it nothing else.
//!
//! A block that is damaged ends the process: there is nothing that a vCPU which waits for it could be given.

#![allow(unsafe_code)] // userfaultfd has no wrapper here; see each block

use std::fs::File;
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::fs::FileExt;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, PoisonError};

use ipc::limits::SNAPSHOT_BLOCK;
use ipc::log::error;
use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use vmm_sys_util::eventfd::EventFd;

use super::GuestRam;
use crate::snapshot::memory::Index;

const BLOCK: u64 = SNAPSHOT_BLOCK as u64;
const PAGE: u64 = 4096;

/// `include/uapi/linux/userfaultfd.h`
const UFFD_API: u64 = 0xAA;
const UFFD_FEATURE_MISSING_SHMEM: u64 = 1 << 5;
const UFFDIO_REGISTER_MODE_MISSING: u64 = 1;
const UFFD_EVENT_PAGEFAULT: u8 = 0x12;
const UFFDIO_API: u64 = 0xC018_AA3F;
const UFFDIO_REGISTER: u64 = 0xC020_AA00;
const UFFDIO_UNREGISTER: u64 = 0x8010_AA01;
const UFFDIO_WAKE: u64 = 0x8010_AA02;
const UFFDIO_COPY: u64 = 0xC028_AA03;
const UFFDIO_ZEROPAGE: u64 = 0xC020_AA04;
/// Bytes of `struct uffd_msg`; the fault's address is at 16.
const MESSAGE: usize = 32;

/// One region of RAM as this process maps it.
#[derive(Debug, Clone, Copy)]
struct Window {
    host: u64,
    offset: u64,
    size: u64,
}

/// RAM that is not whole yet.
#[derive(Debug)]
pub struct LazyRam {
    uffd: OwnedFd,
    file: File,
    index: Index,
    windows: Vec<Window>,
    size: u64,
    /// Keeps the mappings.
    _ram: Arc<GuestRam>,
    progress: Arc<Progress>,
}

/// How far it is, for who waits.
#[derive(Debug)]
pub struct Progress {
    done: AtomicU64,
    whole: Mutex<bool>,
    changed: Condvar,
    event: EventFd,
}

impl Progress {
    /// Bytes that are there or were passed over because they are zero.
    pub fn done(&self) -> u64 {
        self.done.load(Ordering::Relaxed)
    }

    /// Readable when RAM is whole.
    pub const fn event(&self) -> &EventFd {
        &self.event
    }

    /// Waits until RAM is whole.
    pub fn wait(&self) {
        let mut whole = self.whole.lock().unwrap_or_else(PoisonError::into_inner);
        while !*whole {
            whole = self
                .changed
                .wait(whole)
                .unwrap_or_else(PoisonError::into_inner);
        }
    }
}

impl LazyRam {
    /// Has `ram`, which is zero and in a memfd, filled from `file` when it is wanted.
    ///
    /// # Errors
    /// This host has no userfaultfd for this process, and RAM has to be read as a whole.
    pub fn new(ram: &Arc<GuestRam>, file: File, index: Index) -> Result<Self, (File, Index)> {
        let windows: Vec<Window> = ram
            .regions()
            .map(|region| Window {
                host: region.host_address,
                offset: region.file_offset,
                size: region.size,
            })
            .collect();
        let registered = EventFd::new(libc::EFD_NONBLOCK | libc::EFD_CLOEXEC)
            .ok()
            .and_then(|event| Some((event, register(&windows).ok()?)));
        let Some((event, uffd)) = registered else {
            return Err((file, index));
        };
        Ok(Self {
            uffd,
            file,
            index,
            windows,
            size: ram.size(),
            _ram: ram.clone(),
            progress: Arc::new(Progress {
                done: AtomicU64::new(0),
                whole: Mutex::new(false),
                changed: Condvar::new(),
                event,
            }),
        })
    }

    /// How far it is.
    #[must_use]
    pub fn progress(&self) -> Arc<Progress> {
        self.progress.clone()
    }

    /// Answers faults of this process while `work` runs, from a thread that is gone afterwards.
    ///
    /// # Errors
    /// No thread, or no eventfd.
    pub fn serve_during<T>(&self, work: impl FnOnce() -> T) -> std::io::Result<T> {
        let stop = EventFd::new(libc::EFD_CLOEXEC)?;
        // vmm-sys-util's eventfds know only their number.
        // SAFETY: the eventfd outlives the borrow, which ends with this function.
        let stopped = unsafe { std::os::fd::BorrowedFd::borrow_raw(stop.as_raw_fd()) };
        std::thread::scope(|scope| {
            let server = std::thread::Builder::new().spawn_scoped(scope, || {
                let mut buffer = vec![0; BLOCK as usize];
                loop {
                    let mut polled = [
                        PollFd::new(self.uffd.as_fd(), PollFlags::POLLIN),
                        PollFd::new(stopped, PollFlags::POLLIN),
                    ];
                    let _ = poll(&mut polled, PollTimeout::NONE);
                    if polled[1].any() == Some(true) {
                        return;
                    }
                    self.answer(&mut buffer);
                }
            })?;
            let result = work();
            stop.write(1)?;
            // A panic aborts the process, so joining cannot fail. The scope alone would not wait for the thread's very end.
            let _ = server.join();
            Ok(result)
        })
    }

    /// Brings in everything, what is wanted first; then tells, and gives back to the kernel what it does better.
    pub fn serve(self) {
        let mut buffer = vec![0; BLOCK as usize];
        let blocks = self.index.sums.len() as u64;
        for block in 0..blocks {
            self.answer(&mut buffer);
            if self
                .index
                .sums
                .get(block as usize)
                .is_some_and(Option::is_some)
            {
                self.load(block, &mut buffer);
            }
            let done = ((block + 1) * BLOCK).min(self.size);
            self.progress.done.store(done, Ordering::Relaxed);
        }
        // What is still missing is zero, as a new page is. Who waits is woken and asks the kernel again.
        for window in &self.windows {
            let range = [window.host, window.size];
            // SAFETY: names a range that is registered; wakes who waits in it and unregisters it.
            unsafe {
                libc::ioctl(
                    self.uffd.as_raw_fd(),
                    UFFDIO_UNREGISTER as _,
                    &raw const range,
                )
            };
        }
        let mut whole = self
            .progress
            .whole
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        *whole = true;
        self.progress.changed.notify_all();
        let _ = self.progress.event.write(1);
    }

    /// Answers all faults that wait.
    fn answer(&self, buffer: &mut [u8]) {
        let mut message = [0; MESSAGE];
        while nix::unistd::read(&self.uffd, &mut message) == Ok(MESSAGE) {
            if message[0] != UFFD_EVENT_PAGEFAULT {
                continue;
            }
            let mut address = [0; 8];
            address.copy_from_slice(&message[16..24]);
            let address = u64::from_ne_bytes(address);
            let place = self.windows.iter().find_map(|window| {
                let within = address.checked_sub(window.host)?;
                (within < window.size).then_some((*window, within))
            });
            let Some((window, within)) = place else {
                continue;
            };
            let block = (window.offset + within) / BLOCK;
            if self
                .index
                .sums
                .get(block as usize)
                .is_some_and(Option::is_some)
            {
                self.load(block, buffer);
            } else {
                // struct uffdio_zeropage: start, length, mode, result.
                let mut zero = [address & !(PAGE - 1), PAGE, 0, 0];
                // SAFETY: adds a zero page at a registered place where there is none, or fails.
                unsafe {
                    libc::ioctl(self.uffd.as_raw_fd(), UFFDIO_ZEROPAGE as _, &raw mut zero);
                }
            }
            // Who asked for a page that was there by then waits for this.
            let range = [address & !(PAGE - 1), PAGE];
            // SAFETY: wakes who waits for this page, and nothing else.
            unsafe { libc::ioctl(self.uffd.as_raw_fd(), UFFDIO_WAKE as _, &raw const range) };
        }
    }

    /// Brings in one block, or what of it is missing.
    fn load(&self, block: u64, buffer: &mut [u8]) {
        let offset = block * BLOCK;
        // At most a block's.
        let length = (self.size - offset).min(BLOCK) as usize;
        let bytes = &mut buffer[..length];
        let sum = self.index.sums.get(block as usize).copied().flatten();
        let read = self.file.read_exact_at(bytes, offset);
        if read.is_err() || sum != Some(crc32fast::hash(bytes)) {
            let why = read
                .err()
                .map_or("its checksum is wrong".to_owned(), |e| e.to_string());
            error!(
                "-incoming: {BLOCK} bytes of the snapshot's file memory at {offset:#x} cannot be used: {why}"
            );
            // SAFETY: ends the process. Threads that wait for this block cannot be stopped in any other way.
            unsafe { libc::_exit(1) };
        }
        let Some(window) = self
            .windows
            .iter()
            .find(|window| (window.offset..window.offset + window.size).contains(&offset))
        else {
            return;
        };
        let mut at = 0;
        while at < length as u64 {
            // struct uffdio_copy: destination, source, length, mode, result.
            let mut copy = [
                window.host + (offset - window.offset) + at,
                bytes.as_ptr() as u64 + at,
                length as u64 - at,
                0,
                0,
            ];
            // SAFETY: copies from the buffer, which is at least that long, to places of RAM's mapping that have no page yet.
            let result =
                unsafe { libc::ioctl(self.uffd.as_raw_fd(), UFFDIO_COPY as _, &raw mut copy) };
            let copied = copy[4].cast_signed();
            match Errno::result(result) {
                Ok(_) => return,
                // Part of it; the place behind is next.
                Err(Errno::EAGAIN) if copied > 0 => at += copied.cast_unsigned(),
                Err(Errno::EAGAIN) => {}
                // There is a page already.
                Err(Errno::EEXIST) => at += PAGE,
                Err(e) => {
                    error!(
                        "-incoming: guest memory at {offset:#x} cannot be filled: {}",
                        e.desc()
                    );
                    // SAFETY: as above.
                    unsafe { libc::_exit(1) };
                }
            }
        }
    }
}

/// A userfaultfd for the windows.
fn register(windows: &[Window]) -> Result<OwnedFd, Errno> {
    // SAFETY: makes a descriptor, takes no pointer.
    let fd = unsafe { libc::syscall(libc::SYS_userfaultfd, libc::O_CLOEXEC | libc::O_NONBLOCK) };
    let fd = i32::try_from(Errno::result(fd)?).map_err(|_| Errno::EBADF)?;
    // SAFETY: the kernel just gave us this descriptor and nothing else owns it.
    let uffd = unsafe { OwnedFd::from_raw_fd(fd) };
    // struct uffdio_api: version, features, ioctls.
    let mut api = [UFFD_API, UFFD_FEATURE_MISSING_SHMEM, 0];
    // SAFETY: the structure lives on this stack.
    Errno::result(unsafe { libc::ioctl(fd, UFFDIO_API as _, &raw mut api) })?;
    for window in windows {
        // struct uffdio_register: start, length, mode, ioctls.
        let mut range = [window.host, window.size, UFFDIO_REGISTER_MODE_MISSING, 0];
        // SAFETY: watches a mapping of this process that lives as long as the `GuestRam` beside the descriptor.
        Errno::result(unsafe { libc::ioctl(fd, UFFDIO_REGISTER as _, &raw mut range) })?;
    }
    Ok(uffd)
}
