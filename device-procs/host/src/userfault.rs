//! Page faults of this process that its front end answers.
//!
//! **Job.** Makes a userfaultfd of this process's memory from the `/dev/userfaultfd` that the broker gave, to be sent to the front end
//! (`VHOST_USER_POSTCOPY_ADVISE`).
//! **Who is not trusted.** This process, later on: it gives the descriptor away before it has seen a request of the guest, and can
//! then neither watch anything nor answer.
//! **Why this way.** A userfaultfd is bound to the memory of who makes it, so nobody else can; by the device and not by the system call,
//! since only so a process without rights may watch faults in the kernel, where `readv` and an io_uring have theirs.

#![allow(unsafe_code)] // ioctl, and a descriptor that it returns

use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd};

use nix::errno::Errno;

use crate::fault::HostFault;

/// `include/uapi/linux/userfaultfd.h`
const USERFAULTFD_IOC_NEW: u64 = 0xAA00;
const UFFDIO_API: u64 = 0xC018_AA3F;
const UFFD_API: u64 = 0xAA;
const UFFD_FEATURE_MISSING_SHMEM: u64 = 1 << 5;
const UFFD_FEATURE_MINOR_SHMEM: u64 = 1 << 10;

/// One of this process's memory.
pub(crate) fn of_this_process(device: impl AsFd) -> Result<OwnedFd, HostFault> {
    let flags = libc::O_CLOEXEC | libc::O_NONBLOCK;
    // SAFETY: makes a descriptor, takes no pointer.
    let fd = Errno::result(unsafe {
        libc::ioctl(device.as_fd().as_raw_fd(), USERFAULTFD_IOC_NEW as _, flags)
    })
    .map_err(HostFault::of("ioctl(USERFAULTFD_IOC_NEW)"))?;
    // SAFETY: the kernel just gave us this descriptor and nothing else owns it.
    let fd = unsafe { OwnedFd::from_raw_fd(fd) };
    // struct uffdio_api: version, features, ioctls.
    let mut api = [
        UFFD_API,
        UFFD_FEATURE_MISSING_SHMEM | UFFD_FEATURE_MINOR_SHMEM,
        0,
    ];
    // SAFETY: the structure lives on this stack and is as large as the request's number says.
    Errno::result(unsafe { libc::ioctl(fd.as_raw_fd(), UFFDIO_API as _, &raw mut api) })
        .map_err(HostFault::of("ioctl(UFFDIO_API)"))?;
    Ok(fd)
}
