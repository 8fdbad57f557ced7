//! The ioctls that a network device needs on its tap.
//!
//! **Job.** Header length and offloads of an open tap queue, and whether it gets packets.
//! **Who is not trusted.** Nobody: descriptors come from the broker, the flags from the negotiated features.
//! **Why this way.** An ioctl is `unsafe` in Rust, and device crates have none; here are exactly those that the `net` policy
//! allows.

#![allow(unsafe_code)] // ioctls without a safe wrapper

use std::os::fd::{AsRawFd, BorrowedFd};

use nix::errno::Errno;

/// Checksums of packets to the guest may be left to it.
pub const CSUM: u32 = 0x01;
/// TCP segmentation over IPv4.
pub const TSO4: u32 = 0x02;
/// TCP segmentation over IPv6.
pub const TSO6: u32 = 0x04;
/// TCP segmentation with ECN bits.
pub const TSO_ECN: u32 = 0x08;
/// UDP fragmentation.
pub const UFO: u32 = 0x10;
/// UDP segmentation over IPv4 and IPv6; the kernel takes both or none (Linux 6.2).
pub const USO: u32 = 0x20 | 0x40;

/// Makes `len` bytes precede each packet in both directions (`TUNSETVNETHDRSZ`).
///
/// # Errors
/// The descriptor is no tap, or the length is less than 10.
pub fn set_header_len(tap: BorrowedFd<'_>, len: i32) -> Result<(), Errno> {
    if cfg!(fuzzing) {
        return Ok(()); // there, a socket stands for the tap
    }
    // SAFETY: the kernel reads one int through the pointer.
    let result = unsafe { libc::ioctl(tap.as_raw_fd(), libc::TUNSETVNETHDRSZ, &raw const len) };
    Errno::result(result).map(drop)
}

/// What packets to the guest may look like (`TUNSETOFFLOAD`).
///
/// # Errors
/// The descriptor is no tap, or the kernel does not know a flag.
pub fn set_offloads(tap: BorrowedFd<'_>, flags: u32) -> Result<(), Errno> {
    if cfg!(fuzzing) {
        return Ok(());
    }
    let flags = libc::c_ulong::from(flags);
    // SAFETY: the argument is a number.
    let result = unsafe { libc::ioctl(tap.as_raw_fd(), libc::TUNSETOFFLOAD, flags) };
    Errno::result(result).map(drop)
}

/// Whether the kernel spreads packets over this queue as well (`TUNSETQUEUE`). A queue is attached when it is opened, and stays as
/// it is told until its last descriptor is closed.
///
/// # Errors
/// The descriptor is no queue of a tap with several.
pub fn attach(tap: BorrowedFd<'_>, on: bool) -> Result<(), Errno> {
    // SAFETY: ifreq is plain old data, for which all zeroes is a valid value.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    let flag = if on {
        libc::IFF_ATTACH_QUEUE
    } else {
        libc::IFF_DETACH_QUEUE
    };
    request.ifr_ifru.ifru_flags = flag as libc::c_short; // 0x200 or 0x400
    // SAFETY: the kernel reads a struct ifreq.
    let result = unsafe { libc::ioctl(tap.as_raw_fd(), libc::TUNSETQUEUE, &raw const request) };
    match Errno::result(result) {
        // It is as it shall be.
        Ok(_) | Err(Errno::EINVAL) => Ok(()),
        Err(errno) => Err(errno),
    }
}
