//! A front end's side of a shared memory region: what a device has mapped, with the library's own reading of its messages.

#![allow(unsafe_code)] // the library hands descriptors over as numbers

use std::collections::BTreeMap;
use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::sync::{Arc, Mutex, PoisonError};

use vhost::vhost_user::message::{VhostUserMMap, VhostUserMMapFlags};
use vhost::vhost_user::{
    Error as VhostError, FrontendReqHandler, HandlerResult, VhostUserFrontendReqHandlerMut,
};

/// How a front end takes requests.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Manner {
    /// A mapping of the very same range is replaced, and any range can be unmapped: as `stratovirt` does.
    #[default]
    Replaces,
    /// Nothing is mapped over a mapping, and only what was mapped can be unmapped, as one: to the letter of the specification.
    Strict,
    /// Everything is refused.
    Refuses,
}

/// One mapping.
#[derive(Debug)]
pub struct MappedFile {
    /// As it came.
    pub file: File,
    /// Offset in it.
    pub offset: u64,
    /// Bytes.
    pub len: u64,
    /// The device wants it writable.
    pub writable: bool,
}

/// What a device asked for, and what there is.
#[derive(Debug, Default)]
pub struct WindowState {
    /// How requests are taken.
    pub manner: Manner,
    /// By offset in the region.
    pub mapped: BTreeMap<u64, MappedFile>,
    /// Requests so far, refused ones as well.
    pub asked: usize,
    /// Bytes of the region.
    pub size: u64,
    /// A process that is killed when the next request has been read, before it is answered.
    pub kill: Option<nix::unistd::Pid>,
}

/// Takes a device's requests, in a thread of its own.
#[derive(Debug, Clone, Default)]
pub struct WindowServer(Arc<Mutex<WindowState>>);

impl WindowState {
    fn count(&mut self) {
        self.asked += 1;
        if let Some(pid) = self.kill.take() {
            nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGKILL).unwrap();
        }
    }
}

struct Handler(Arc<Mutex<WindowState>>);

fn refused() -> io::Error {
    io::Error::from_raw_os_error(libc::EINVAL)
}

impl VhostUserFrontendReqHandlerMut for Handler {
    fn shmem_map(&mut self, request: &VhostUserMMap, fd: &dyn AsRawFd) -> HandlerResult<u64> {
        // SAFETY: the library keeps the descriptor open during this call.
        let fd = unsafe { std::os::fd::BorrowedFd::borrow_raw(fd.as_raw_fd()) };
        let file = File::from(fd.try_clone_to_owned()?);
        let mut state = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        state.count();
        let (offset, len) = (request.shm_offset, request.len);
        let taken = state
            .mapped
            .iter()
            .any(|(at, other)| *at < offset + len && offset < at + other.len);
        let same = state
            .mapped
            .get(&offset)
            .is_some_and(|other| other.len == len);
        let allowed = match state.manner {
            Manner::Replaces => !taken || same,
            Manner::Strict => !taken,
            Manner::Refuses => false,
        };
        if !allowed || request.shmid != 0 || offset + len > state.size {
            return Err(refused());
        }
        let mapped = MappedFile {
            file,
            offset: request.fd_offset,
            len,
            writable: request.flags & VhostUserMMapFlags::WRITABLE.bits() != 0,
        };
        state.mapped.insert(offset, mapped);
        Ok(0)
    }

    fn shmem_unmap(&mut self, request: &VhostUserMMap) -> HandlerResult<u64> {
        let mut state = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        state.count();
        let (offset, len) = (request.shm_offset, request.len);
        if offset + len > state.size {
            return Err(refused());
        }
        match state.manner {
            Manner::Replaces => {
                let end = offset + len;
                state
                    .mapped
                    .retain(|at, mapped| *at + mapped.len <= offset || *at >= end);
                Ok(0)
            }
            Manner::Strict
                if state
                    .mapped
                    .get(&offset)
                    .is_some_and(|mapped| mapped.len == len) =>
            {
                state.mapped.remove(&offset);
                Ok(0)
            }
            _ => Err(refused()),
        }
    }
}

impl WindowServer {
    /// Looks at the state, or changes how requests are taken.
    pub fn with<T>(&self, look: impl FnOnce(&mut WindowState) -> T) -> T {
        look(&mut self.0.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// The offsets at which something is mapped.
    pub fn places(&self) -> Vec<u64> {
        self.with(|state| state.mapped.keys().copied().collect())
    }

    /// Serves a new channel until its other end, which is returned, is closed everywhere.
    pub(super) fn start(&self) -> OwnedFd {
        let handler = Arc::new(Mutex::new(Handler(self.0.clone())));
        let mut requests = FrontendReqHandler::new(handler).unwrap();
        requests.set_reply_ack_flag(true);
        let theirs = super::super::record::look(&Raw(requests.get_tx_raw_fd()))
            .try_clone_to_owned()
            .unwrap();
        std::thread::spawn(move || {
            while let Ok(_) | Err(VhostError::ReqHandlerError(_)) = requests.handle_request() {}
        });
        theirs
    }
}

struct Raw(std::os::fd::RawFd);

impl AsRawFd for Raw {
    fn as_raw_fd(&self) -> std::os::fd::RawFd {
        self.0
    }
}
