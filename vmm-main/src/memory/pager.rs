//! The thread that answers page faults of guest RAM, in one of its two ways.
//!
//! **Job.** What both ways have in common: faults are answered before the thread exists as well as in it, and who waits for
//! memory learns when it is whole.
//! **Who is not trusted**: see [`super::lazy`] and [`super::sharing`].
//! **Why this way.** Which way it is depends on where the snapshot lies and on the kernel; nobody else has to know.

use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, PoisonError};

use ipc::limits::SNAPSHOT_BLOCK;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use vmm_sys_util::eventfd::EventFd;

use super::lazy::LazyRam;
use super::sharing::{Orders, SharingRam};

/// How far guest memory is on its way in, for who waits.
#[derive(Debug)]
pub struct Progress {
    done: AtomicU64,
    whole: Mutex<bool>,
    changed: Condvar,
    event: EventFd,
}

impl Progress {
    pub(super) fn new() -> std::io::Result<Self> {
        Ok(Self {
            done: AtomicU64::new(0),
            whole: Mutex::new(false),
            changed: Condvar::new(),
            event: EventFd::new(libc::EFD_NONBLOCK | libc::EFD_CLOEXEC)?,
        })
    }

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

    pub(super) fn set(&self, done: u64) {
        self.done.store(done, Ordering::Relaxed);
    }

    pub(super) fn finish(&self) {
        let mut whole = self.whole.lock().unwrap_or_else(PoisonError::into_inner);
        if *whole {
            // Who waited was told, and nobody reads the eventfd any more.
            return;
        }
        *whole = true;
        self.changed.notify_all();
        let _ = self.event.write(1);
    }
}

/// Answers faults of this process.
pub(super) trait Answer: Sync {
    /// Readable when a fault waits.
    fn descriptor(&self) -> BorrowedFd<'_>;

    /// Answers all faults that wait; `buffer` has room for a block.
    fn answer(&self, buffer: &mut [u8]);
}

/// RAM that comes in when it is wanted.
#[derive(Debug)]
pub enum Pager {
    /// Into memory of its own, until RAM is whole.
    Copying(LazyRam),
    /// It is the template's until somebody writes there, and may stay so.
    Sharing(SharingRam),
}

impl Pager {
    /// How far it is, if it is to become whole.
    #[must_use]
    pub fn progress(&self) -> Option<Arc<Progress>> {
        match self {
            Self::Copying(lazy) => Some(lazy.progress()),
            Self::Sharing(_) => None,
        }
    }

    /// What can be asked of the thread, if memory is shared.
    #[must_use]
    pub fn orders(&self) -> Option<Arc<Orders>> {
        match self {
            Self::Copying(_) => None,
            Self::Sharing(sharing) => Some(sharing.orders()),
        }
    }

    /// Answers faults of this process while `work` runs, from a thread that is gone afterwards.
    ///
    /// # Errors
    /// No thread, or no eventfd.
    pub fn serve_during<T>(&self, work: impl FnOnce() -> T) -> std::io::Result<T> {
        match self {
            Self::Copying(lazy) => serve_during(lazy, work),
            Self::Sharing(sharing) => serve_during(sharing, work),
        }
    }

    /// Does what there is to do; for a thread of its own.
    pub fn serve(self) {
        match self {
            Self::Copying(lazy) => lazy.serve(),
            Self::Sharing(sharing) => sharing.serve(),
        }
    }
}

#[allow(unsafe_code)] // an eventfd that knows only its number
fn serve_during<T>(pager: &impl Answer, work: impl FnOnce() -> T) -> std::io::Result<T> {
    let stop = EventFd::new(libc::EFD_CLOEXEC)?;
    // vmm-sys-util's eventfds know only their number.
    // SAFETY: the eventfd outlives the borrow, which ends with this function.
    let stopped = unsafe { BorrowedFd::borrow_raw(stop.as_raw_fd()) };
    std::thread::scope(|scope| {
        let server = std::thread::Builder::new().spawn_scoped(scope, || {
            let mut buffer = vec![0; SNAPSHOT_BLOCK as usize];
            loop {
                let mut polled = [
                    PollFd::new(pager.descriptor(), PollFlags::POLLIN),
                    PollFd::new(stopped.as_fd(), PollFlags::POLLIN),
                ];
                let _ = poll(&mut polled, PollTimeout::NONE);
                if polled[1].any() == Some(true) {
                    return;
                }
                pager.answer(&mut buffer);
            }
        })?;
        let result = work();
        stop.write(1)?;
        // A panic aborts the process, so joining cannot fail. The scope alone would not wait for the thread's very end.
        let _ = server.join();
        Ok(result)
    })
}
