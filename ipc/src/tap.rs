//! Opening a tap's queues, as the broker and a stand-alone `net` both do.
//!
//! **Job.** Name in, descriptors out; and whether a descriptor that somebody else opened is a queue that can be used.
//! **Who is not trusted.** Whoever wrote the name: a typing error must not become a new interface.
//! **Why this way.** The process that serves the card has no path and no name, so whoever starts it opens for it.

#![allow(unsafe_code)] // ioctls of the tun driver

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::fs::OpenOptionsExt;

use nix::errno::Errno;
use nix::fcntl::{FcntlArg, OFlag, fcntl};
use nix::libc;
use thiserror::Error;

mod ioctl {
    //! `linux/if_tun.h`
    use nix::libc;

    nix::ioctl_write_int!(tunsetiff, b'T', 202);
    // The header names the size of an int; the kernel fills a struct ifreq.
    nix::ioctl_read_bad!(
        tungetiff,
        nix::request_code_read!(b'T', 210, size_of::<libc::c_uint>()),
        libc::ifreq
    );
}

const IFF_TAP: libc::c_short = libc::IFF_TAP as libc::c_short;
const IFF_NO_PI: libc::c_short = libc::IFF_NO_PI as libc::c_short;
const IFF_VNET_HDR: libc::c_short = libc::IFF_VNET_HDR as libc::c_short;
const IFF_MULTI_QUEUE: libc::c_short = libc::IFF_MULTI_QUEUE as libc::c_short;

/// Why a tap cannot be had.
#[derive(Debug, Error)]
pub enum TapError {
    /// No interface has such a name.
    #[error("an interface name has 1 to {} bytes", libc::IFNAMSIZ - 1)]
    Name,
    /// There is none.
    #[error("no such network interface; make it with: ip tuntap add NAME mode tap [multi_queue]")]
    Missing,
    /// The kernel's tun driver is not to be had.
    #[error("cannot open /dev/net/tun: {0}")]
    Driver(io::Error),
    /// All its queues are taken.
    #[error("the tap device is in use by another process")]
    Busy,
    /// It was made for one queue.
    #[error(
        "cannot attach {queues} queues: make it with: ip tuntap add {ifname} mode tap multi_queue"
    )]
    OneQueue {
        /// Its name.
        ifname: String,
        /// Queues that are wanted.
        queues: u16,
    },
    /// Another kind of interface.
    #[error("not a tap device, or one made with multi_queue that wants queues=2 or more")]
    Kind,
    /// It is another user's.
    #[error("no permission to attach to this tap device")]
    Permission,
    /// Another error.
    #[error("cannot attach to the tap device: {}", .0.desc())]
    Other(Errno),
    /// A descriptor that is none.
    #[error("not an open tap device")]
    NotOne,
    /// A tun device carries packets without Ethernet headers.
    #[error("a tun device; a tap device (IFF_TAP) is needed")]
    Tun,
    /// It was opened in another way.
    #[error("the tap must be opened with IFF_VNET_HDR and IFF_NO_PI")]
    Flags,
    /// Its flags cannot be changed.
    #[error("{}", .0.desc())]
    Blocking(Errno),
}

/// Opens `queues` queues of the tap `ifname`, which is there already: each with virtio's header in front of a packet, without
/// packet information, non-blocking.
///
/// # Errors
/// [`TapError`]
pub fn open(ifname: &str, queues: u16) -> Result<Vec<OwnedFd>, TapError> {
    if ifname.is_empty() || ifname.len() >= libc::IFNAMSIZ {
        return Err(TapError::Name);
    }
    // TUNSETIFF makes an interface that is not there; a typing error must not become a new one.
    if nix::net::if_::if_nametoindex(ifname).is_err() {
        return Err(TapError::Missing);
    }
    let mut fds = Vec::with_capacity(usize::from(queues));
    for _ in 0..queues {
        let file = File::options()
            .read(true)
            .write(true)
            .custom_flags(libc::O_NONBLOCK)
            .open("/dev/net/tun")
            .map_err(TapError::Driver)?;
        // SAFETY: ifreq is plain old data, for which all zeroes is a valid value.
        let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
        for (to, from) in request.ifr_name.iter_mut().zip(ifname.bytes()) {
            *to = from as libc::c_char;
        }
        request.ifr_ifru.ifru_flags =
            IFF_TAP | IFF_NO_PI | IFF_VNET_HDR | if queues > 1 { IFF_MULTI_QUEUE } else { 0 };
        // SAFETY: the argument points to an ifreq that lives across the call.
        unsafe { ioctl::tunsetiff(file.as_raw_fd(), std::ptr::from_ref(&request) as u64) }
            .map_err(|errno| match errno {
                Errno::EBUSY => TapError::Busy,
                Errno::EINVAL if queues > 1 => TapError::OneQueue {
                    ifname: ifname.to_owned(),
                    queues,
                },
                Errno::EINVAL => TapError::Kind,
                Errno::EPERM => TapError::Permission,
                other => TapError::Other(other),
            })?;
        fds.push(file.into());
    }
    Ok(fds)
}

/// A descriptor that somebody else opened must be one queue of a tap device with virtio headers and without packet
/// information. It is made non-blocking.
///
/// # Errors
/// [`TapError`]
pub fn check(fd: &OwnedFd) -> Result<(), TapError> {
    // SAFETY: ifreq is plain old data, for which all zeroes is a valid value.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    // SAFETY: the argument points to an ifreq that lives across the call.
    unsafe { ioctl::tungetiff(fd.as_raw_fd(), &raw mut request) }.map_err(|_| TapError::NotOne)?;
    // SAFETY: TUNGETIFF fills the flags member of the union.
    let flags = unsafe { request.ifr_ifru.ifru_flags };
    if flags & IFF_TAP == 0 {
        return Err(TapError::Tun);
    }
    if flags & IFF_VNET_HDR == 0 || flags & IFF_NO_PI == 0 {
        return Err(TapError::Flags);
    }
    fcntl(fd.as_fd(), FcntlArg::F_GETFL)
        .map(OFlag::from_bits_retain)
        .and_then(|now| fcntl(fd.as_fd(), FcntlArg::F_SETFL(now | OFlag::O_NONBLOCK)))
        .map(drop)
        .map_err(TapError::Blocking)
}
