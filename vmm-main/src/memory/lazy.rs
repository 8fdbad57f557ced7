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

#![allow(unsafe_code)] // _exit, where nothing else can end a thread that waits for a page

use std::fs::File;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::fs::FileExt;
use std::sync::Arc;

use ipc::limits::SNAPSHOT_BLOCK;
use ipc::log::error;
use nix::errno::Errno;

use super::GuestRam;
use super::clean::Window;
use super::pager::{Answer, Progress};
use super::uffd::{FEATURE_MISSING_SHMEM, MISSING, PAGE, Uffd};
use crate::snapshot::memory::Index;

const BLOCK: u64 = SNAPSHOT_BLOCK as u64;

/// RAM that is not whole yet.
#[derive(Debug)]
pub struct LazyRam {
    uffd: Uffd,
    file: File,
    index: Index,
    windows: Vec<Window>,
    size: u64,
    /// Keeps the mappings.
    _ram: Arc<GuestRam>,
    progress: Arc<Progress>,
}

impl LazyRam {
    /// Has `ram`, which is zero and in a memfd, filled from `file` when it is wanted.
    ///
    /// # Errors
    /// This host has no userfaultfd for this process, and RAM has to be read as a whole.
    pub fn new(ram: &Arc<GuestRam>, file: File, index: Index) -> Result<Self, (File, Index)> {
        let windows = Window::all(ram);
        let registered = Progress::new()
            .ok()
            .and_then(|progress| Some((progress, register(&windows).ok()?)));
        let Some((progress, uffd)) = registered else {
            return Err((file, index));
        };
        Ok(Self {
            uffd,
            file,
            index,
            windows,
            size: ram.size(),
            _ram: ram.clone(),
            progress: Arc::new(progress),
        })
    }

    /// How far it is.
    #[must_use]
    pub fn progress(&self) -> Arc<Progress> {
        self.progress.clone()
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
            self.progress.set(done);
        }
        // What is still missing is zero, as a new page is. Who waits is woken and asks the kernel again.
        for window in &self.windows {
            let _ = self.uffd.unregister(window.host, window.size);
        }
        self.progress.finish();
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
        while let Some(rest) = bytes.get(at as usize..).filter(|rest| !rest.is_empty()) {
            match self
                .uffd
                .copy(window.host + (offset - window.offset) + at, rest)
            {
                Ok(()) => return,
                // Part of it; the place behind is next.
                Err((Errno::EAGAIN, copied)) => at += copied,
                // There is a page already.
                Err((Errno::EEXIST, _)) => at += PAGE,
                Err((e, _)) => {
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

impl Answer for LazyRam {
    fn descriptor(&self) -> BorrowedFd<'_> {
        self.uffd.as_fd()
    }

    fn answer(&self, buffer: &mut [u8]) {
        while let Some(fault) = self.uffd.fault() {
            let place = self.windows.iter().find_map(|window| {
                let within = fault.address.checked_sub(window.host)?;
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
                self.uffd.zero_page(fault.address);
            }
            // Who asked for a page that was there by then waits for this.
            self.uffd.wake(fault.address & !(PAGE - 1), PAGE);
        }
    }
}

/// A userfaultfd for the windows.
fn register(windows: &[Window]) -> Result<Uffd, Errno> {
    let uffd = Uffd::new(FEATURE_MISSING_SHMEM)?;
    for window in windows {
        uffd.register(window.host, window.size, MISSING)?;
    }
    Ok(uffd)
}
