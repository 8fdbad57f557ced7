//! One queue of a tap: a descriptor of which each read is a packet and each write is one.
//!
//! **Job.** Readies a queue before the jail is shut: non-blocking, with a header of [`HEADER`] bytes in front of each packet.
//! **Who is not trusted.** Nobody yet; the broker made the tap.
//! **Why this way.** The kernel's header is virtio's own (`struct virtio_net_hdr_v1`), so that packets pass without being
//! rewritten.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use device_host::tap;
use nix::errno::Errno;
use nix::fcntl::{FcntlArg, OFlag, fcntl};

use crate::error::BuildError;
use crate::header::HEADER;

/// A tap queue.
#[derive(Debug)]
pub(crate) struct TapQueue(OwnedFd);

impl TapQueue {
    pub(crate) fn new(fd: OwnedFd, queue: usize) -> Result<Self, BuildError> {
        let failed = |call| {
            move |source| BuildError::Tap {
                call,
                queue,
                source,
            }
        };
        let flags = fcntl(&fd, FcntlArg::F_GETFL).map_err(failed("fcntl"))?;
        let flags = OFlag::from_bits_retain(flags) | OFlag::O_NONBLOCK;
        fcntl(&fd, FcntlArg::F_SETFL(flags)).map_err(failed("fcntl"))?;
        tap::set_header_len(fd.as_fd(), HEADER as i32).map_err(failed("TUNSETVNETHDRSZ"))?;
        // Until a driver says otherwise the guest takes plain packets only.
        tap::set_offloads(fd.as_fd(), 0).map_err(failed("TUNSETOFFLOAD"))?;
        Ok(Self(fd))
    }

    /// Whether the kernel can segment UDP (Linux 6.2). Leaves no offload on.
    pub(crate) fn has_uso(&self) -> bool {
        tap::set_offloads(self.fd(), tap::CSUM | tap::USO).is_ok()
            && tap::set_offloads(self.fd(), 0).is_ok()
    }

    /// Reads a packet with its header, as much of it as there is room for; its length.
    pub(crate) fn read(&self, into: &mut [u8]) -> Result<usize, Errno> {
        loop {
            match nix::unistd::read(&self.0, into) {
                Err(Errno::EINTR) => {}
                other => return other,
            }
        }
    }

    /// Reads a packet that nobody wants.
    pub(crate) fn discard(&self) -> Result<(), Errno> {
        // The kernel drops what does not fit.
        let mut start = [0; HEADER + 64];
        self.read(&mut start).map(drop)
    }

    /// Sends a frame that nobody has to complete anything of.
    pub(crate) fn send(&self, frame: &[u8]) -> Result<(), Errno> {
        let packet = [&[0; HEADER], frame].concat();
        nix::unistd::write(&self.0, &packet).map(drop)
    }

    pub(crate) fn fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}
