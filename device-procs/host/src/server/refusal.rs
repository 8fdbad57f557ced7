//! What a front end may not say.
//!
//! **Job.** Tells the log why a message was refused, which the library passes through as a code only, and checks what most messages
//! have: a queue's number, and an eventfd. **Who is not trusted.** The front end.

use std::fs::File;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;

use nix::errno::Errno;
use nix::unistd::{Whence, lseek};
use thiserror::Error;
use vhost::vhost_user::{Error as VhostError, Result as VhostResult};

use super::Server;
use crate::device::Device;
use crate::fault::HostFault;
use crate::memory::MemoryError;
use crate::ring::Ring;

/// What a front end may get wrong, for the log.
#[derive(Debug, Error)]
pub(super) enum Refusal {
    #[error("{message} for queue {index}, of {count}")]
    Queue {
        message: &'static str,
        index: u32,
        count: usize,
    },
    #[error("{message}: {value:#x} is not allowed ({allowed})")]
    Value {
        message: &'static str,
        value: u64,
        allowed: &'static str,
    },
    #[error("{message} while the queue runs")]
    Running { message: &'static str },
    #[error("{message} again before SET_INFLIGHT_FD")]
    InflightAway { message: &'static str },
    #[error("{message} is not offered")]
    NotOffered { message: &'static str },
    #[error("{message}: the descriptor is no eventfd")]
    NoEvent { message: &'static str },
    #[error("{message} before SET_MEM_TABLE")]
    NoMemory { message: &'static str },
    #[error("{message}")]
    Memory {
        message: &'static str,
        source: MemoryError,
    },
    #[error("{message}")]
    Host {
        message: &'static str,
        source: HostFault,
    },
}

impl<D: Device> Server<D> {
    /// Remembers why, for the log, and gives the library its code.
    pub(super) fn refuse(&mut self, refusal: &Refusal) -> VhostError {
        self.refused = Some(ipc::log::with_causes(refusal));
        VhostError::InvalidParam
    }

    pub(super) fn ring(&mut self, message: &'static str, index: u32) -> VhostResult<&mut Ring> {
        let count = self.rings.len();
        if index as usize >= count {
            return Err(self.refuse(&Refusal::Queue {
                message,
                index,
                count,
            }));
        }
        Ok(&mut self.rings[index as usize])
    }

    /// A ring that may be described.
    pub(super) fn stopped_ring(
        &mut self,
        message: &'static str,
        index: u32,
    ) -> VhostResult<&mut Ring> {
        if self.ring(message, index)?.is_started() {
            return Err(self.refuse(&Refusal::Running { message }));
        }
        self.ring(message, index)
    }

    /// Takes what can be an eventfd and no stream: a front end that passes its own end of the vhost-user socket would never
    /// be seen to leave. Makes it one that no write waits for, since one whose counter is full would stop the device.
    /// (A front end that undoes this later stops its own device, and nobody else's.)
    pub(super) fn eventfd(
        &mut self,
        message: &'static str,
        fd: Option<File>,
    ) -> VhostResult<Option<OwnedFd>> {
        // Whatever it is: for the standard library, a stream is the owner of a descriptor, and this its FIONBIO.
        let Some(fd) = fd.map(|fd| UnixStream::from(OwnedFd::from(fd))) else {
            return Ok(None);
        };
        // An eventfd has one place, 0. Streams have none, files have others; the filter allows no call that tells more.
        if lseek(&fd, 0, Whence::SeekEnd) != Ok(0) {
            return Err(self.refuse(&Refusal::NoEvent { message }));
        }
        if let Err(error) = fd.set_nonblocking(true) {
            let errno = error.raw_os_error().map_or(Errno::EIO, Errno::from_raw);
            let source = HostFault::of("ioctl(FIONBIO)")(errno);
            return Err(self.refuse(&Refusal::Host { message, source }));
        }
        Ok(Some(fd.into()))
    }
}
