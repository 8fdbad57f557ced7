//! The kernel's vhost-net as the one that serves a queue.
//!
//! **Job.** The ioctls of `/dev/vhost-net` ([`VhostNet`]): own it, tell it where guest memory is in this process, give it a queue
//! and take it back.
//! **Who is not trusted.** The guest. Where its queue is was checked when the queue started, and is asked for here once more as
//! addresses that lie in one region; what is in the queue the kernel checks itself.
//! **Why this way.** An ioctl is `unsafe` in Rust, and device crates have none. A queue that the kernel has is never looked at here:
//! it is taken back first, and the kernel gives back in the order in which it took, so that its used index tells all.

#![allow(unsafe_code)] // ioctls without a safe wrapper

use std::cell::Cell;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};

use nix::errno::Errno;
use virtio_bindings::virtio_config::VIRTIO_F_VERSION_1;
use virtio_bindings::virtio_ring::{VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC};

use crate::fault::HostFault;
use crate::memory::GuestRam;

/// `linux/vhost.h` and `asm-generic/ioctl.h`; a policy names the same ones.
mod request {
    const VHOST: u64 = 0xAF;
    const fn number(direction: u64, number: u64, size: usize) -> u64 {
        direction << 30 | (size as u64) << 16 | VHOST << 8 | number
    }
    const WRITE: u64 = 1;
    const READ: u64 = 2;
    pub(super) const GET_FEATURES: u64 = number(READ, 0x00, 8);
    pub(super) const SET_FEATURES: u64 = number(WRITE, 0x00, 8);
    pub(super) const SET_OWNER: u64 = number(0, 0x01, 0);
    pub(super) const SET_MEM_TABLE: u64 = number(WRITE, 0x03, 8);
    pub(super) const SET_VRING_NUM: u64 = number(WRITE, 0x10, 8);
    pub(super) const SET_VRING_ADDR: u64 = number(WRITE, 0x11, 40);
    pub(super) const SET_VRING_BASE: u64 = number(WRITE, 0x12, 8);
    pub(super) const GET_VRING_BASE: u64 = number(READ | WRITE, 0x12, 8);
    pub(super) const SET_VRING_KICK: u64 = number(WRITE, 0x20, 8);
    pub(super) const SET_VRING_CALL: u64 = number(WRITE, 0x21, 8);
    pub(super) const SET_VRING_ERR: u64 = number(WRITE, 0x22, 8);
    pub(super) const NET_SET_BACKEND: u64 = number(WRITE, 0x30, 8);
}

/// `struct vhost_vring_state`
#[repr(C)]
struct State {
    index: u32,
    num: u32,
}

/// `struct vhost_vring_file`
#[repr(C)]
struct File {
    index: u32,
    fd: i32,
}

/// `struct vhost_vring_addr`, all addresses in this process.
#[repr(C)]
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Addresses {
    index: u32,
    flags: u32,
    descriptors: u64,
    used: u64,
    available: u64,
    log: u64,
}

/// Features of a queue that the harness offers for every device, so that the kernel must have them.
const NEEDED: u64 =
    1 << VIRTIO_F_VERSION_1 | 1 << VIRTIO_RING_F_EVENT_IDX | 1 << VIRTIO_RING_F_INDIRECT_DESC;

/// One open `/dev/vhost-net`: a receive queue, 0, and a transmit queue, 1.
#[derive(Debug)]
pub struct VhostNet {
    fd: OwnedFd,
    features: u64,
    /// This process is its owner. Newer kernels make a thread of it then, and a jail is locked with one thread only.
    owned: Cell<bool>,
}

/// A queue of a device that the kernel serves.
#[derive(Debug, Clone, Copy)]
pub struct KernelQueue<'d> {
    /// Who serves it.
    pub vhost: &'d VhostNet,
    /// Its number there: 0 receives, 1 transmits.
    pub number: u32,
    /// The tap queue behind it.
    pub tap: BorrowedFd<'d>,
    /// Whether it is to be served now.
    pub on: bool,
    /// Features of the device, not of the queue, that the driver accepted and the kernel has to know.
    pub features: u64,
}

/// A queue as the kernel is told of it.
#[derive(Debug)]
pub(crate) struct Described<'r> {
    pub(crate) size: u16,
    /// Where to go on in the available ring.
    pub(crate) base: u16,
    /// Guest physical: descriptors, available ring, used ring.
    pub(crate) parts: [u64; 3],
    pub(crate) event_idx: bool,
    pub(crate) indirect: bool,
    pub(crate) kick: Option<BorrowedFd<'r>>,
    pub(crate) call: Option<BorrowedFd<'r>>,
    pub(crate) error: Option<BorrowedFd<'r>>,
}

/// Why the kernel does not serve a queue.
#[derive(Debug)]
pub(crate) enum Refused {
    /// A part of it is not in one region of guest memory.
    Address,
    /// A call failed.
    Host(HostFault),
}

impl From<HostFault> for Refused {
    fn from(fault: HostFault) -> Self {
        Self::Host(fault)
    }
}

impl VhostNet {
    /// From an open `/dev/vhost-net` that nobody has owned yet.
    ///
    /// # Errors
    /// It is none, or the kernel lacks a feature (`EOPNOTSUPP`).
    pub fn new(fd: OwnedFd) -> Result<Self, HostFault> {
        let mut features = 0u64;
        // SAFETY: the kernel writes 8 bytes through the pointer.
        let result =
            unsafe { libc::ioctl(fd.as_raw_fd(), request::GET_FEATURES, &raw mut features) };
        checked("ioctl(VHOST_GET_FEATURES)", result)?;
        if features & NEEDED != NEEDED {
            return Err(HostFault::of("ioctl(VHOST_GET_FEATURES)")(
                Errno::EOPNOTSUPP,
            ));
        }
        Ok(Self {
            fd,
            features,
            owned: Cell::new(false),
        })
    }

    /// Makes this process the owner, once: the kernel reads and writes guest memory as this process has it mapped, until the
    /// descriptor is closed.
    fn own(&self) -> Result<(), HostFault> {
        if self.owned.get() {
            return Ok(());
        }
        // SAFETY: no argument.
        let result = unsafe { libc::ioctl(self.fd.as_raw_fd(), request::SET_OWNER) };
        checked("ioctl(VHOST_SET_OWNER)", result)?;
        self.owned.set(true);
        Ok(())
    }

    /// What it knows, as feature bits.
    pub const fn features(&self) -> u64 {
        self.features
    }

    /// Has the kernel serve `queue` until [`stop`](Self::stop).
    pub(crate) fn start(
        &self,
        queue: &KernelQueue<'_>,
        ring: &Described<'_>,
        ram: &GuestRam,
    ) -> Result<(), Refused> {
        let index = queue.number;
        let addresses = locate(index, ring, ram).ok_or(Refused::Address)?;
        self.own()?;
        let mut features = 1 << VIRTIO_F_VERSION_1 | queue.features & self.features;
        if ring.event_idx {
            features |= 1 << VIRTIO_RING_F_EVENT_IDX;
        }
        if ring.indirect {
            features |= 1 << VIRTIO_RING_F_INDIRECT_DESC;
        }
        // Guest memory and features are those of both queues. Whoever changes them has taken both back.
        self.set(
            "ioctl(VHOST_SET_FEATURES)",
            request::SET_FEATURES,
            &features,
        )?;
        self.set(
            "ioctl(VHOST_SET_MEM_TABLE)",
            request::SET_MEM_TABLE,
            table(ram).as_slice(),
        )?;
        let state = |num: u16| State {
            index,
            num: u32::from(num),
        };
        self.set(
            "ioctl(VHOST_SET_VRING_NUM)",
            request::SET_VRING_NUM,
            &state(ring.size),
        )?;
        self.set(
            "ioctl(VHOST_SET_VRING_BASE)",
            request::SET_VRING_BASE,
            &state(ring.base),
        )?;
        self.set(
            "ioctl(VHOST_SET_VRING_ADDR)",
            request::SET_VRING_ADDR,
            &addresses,
        )?;
        for (call, number, fd) in [
            (
                "ioctl(VHOST_SET_VRING_CALL)",
                request::SET_VRING_CALL,
                ring.call,
            ),
            (
                "ioctl(VHOST_SET_VRING_ERR)",
                request::SET_VRING_ERR,
                ring.error,
            ),
            (
                "ioctl(VHOST_NET_SET_BACKEND)",
                request::NET_SET_BACKEND,
                Some(queue.tap),
            ),
            // Last: a kick that came before wakes the kernel then.
            (
                "ioctl(VHOST_SET_VRING_KICK)",
                request::SET_VRING_KICK,
                ring.kick,
            ),
        ] {
            self.file(call, number, index, fd)?;
        }
        Ok(())
    }

    /// Takes queue `index` back: what the kernel took from it is given back, and it takes nothing more. Returns the index of the
    /// available ring to go on from.
    pub(crate) fn stop(&self, index: u32) -> Result<u16, HostFault> {
        self.file(
            "ioctl(VHOST_NET_SET_BACKEND)",
            request::NET_SET_BACKEND,
            index,
            None,
        )?;
        // Without, the next start would find the same one there and not look whether there was a kick.
        self.file(
            "ioctl(VHOST_SET_VRING_KICK)",
            request::SET_VRING_KICK,
            index,
            None,
        )?;
        let mut state = State { index, num: 0 };
        // SAFETY: the kernel reads and writes a struct of this layout.
        let result =
            unsafe { libc::ioctl(self.fd.as_raw_fd(), request::GET_VRING_BASE, &raw mut state) };
        checked("ioctl(VHOST_GET_VRING_BASE)", result)?;
        // An index of a split queue has 16 bits.
        Ok(state.num as u16)
    }

    fn file(
        &self,
        call: &'static str,
        number: u64,
        index: u32,
        fd: Option<BorrowedFd<'_>>,
    ) -> Result<(), HostFault> {
        let file = File {
            index,
            fd: fd.map_or(-1, |fd| fd.as_raw_fd()),
        };
        self.set(call, number, &file)
    }

    /// Each of these requests reads what its number says from `value`, which has at least so many bytes.
    fn set<T: ?Sized>(&self, call: &'static str, number: u64, value: &T) -> Result<(), HostFault> {
        let argument = std::ptr::from_ref(value).cast::<u8>();
        // SAFETY: the kernel only reads: a struct of the request's size, which each caller passes, and for a table of memory as
        // many entries behind it as its first word says, which `table` has put there.
        let result = unsafe { libc::ioctl(self.fd.as_fd().as_raw_fd(), number, argument) };
        checked(call, result)
    }
}

fn checked(call: &'static str, result: libc::c_int) -> Result<(), HostFault> {
    Errno::result(result).map(drop).map_err(HostFault::of(call))
}

/// `struct vhost_memory`: le32 count, le32 padding, then `struct vhost_memory_region`, four 64-bit words each: guest physical
/// address, size, address in this process, flags.
fn table(ram: &GuestRam) -> Vec<u64> {
    let regions = ram.regions();
    let mut words = Vec::with_capacity(1 + 4 * regions.len());
    // At most MAX_MEMORY_REGIONS. The count is the word's first half in this order of bytes.
    words.push((regions.len() as u64).to_le());
    for region in regions {
        words.extend([region.guest, region.size, region.address(), 0]);
    }
    words
}

/// Where the parts of a queue are in this process (virtio 1.3, 2.7), if each is in one region.
fn locate(index: u32, ring: &Described<'_>, ram: &GuestRam) -> Option<Addresses> {
    let size = u64::from(ring.size);
    let here = |guest: u64, len: u64| {
        ram.regions().iter().find_map(|region| {
            let offset = guest.checked_sub(region.guest)?;
            let fits = offset.checked_add(len)? <= region.size;
            fits.then(|| region.address() + offset)
        })
    };
    let [descriptors, available, used] = ring.parts;
    Some(Addresses {
        index,
        flags: 0,
        descriptors: here(descriptors, 16 * size)?,
        // Flags, index, entries, and the index of the other side's wish.
        available: here(available, 4 + 2 * size + 2)?,
        used: here(used, 4 + 8 * size + 2)?,
        log: 0,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::memory::Region;
    use nix::sys::memfd::{MFdFlags, memfd_create};

    fn ram() -> GuestRam {
        let file = std::fs::File::from(memfd_create(c"ram", MFdFlags::MFD_CLOEXEC).unwrap());
        file.set_len(0x8000).unwrap();
        let region = |guest, offset| Region::new(guest, 0x4000, guest, &file, offset).unwrap();
        GuestRam::new(vec![region(0x1_0000, 0), region(0x1_4000, 0x4000)]).unwrap()
    }

    fn described(parts: [u64; 3]) -> Described<'static> {
        Described {
            size: 256,
            base: 0,
            parts,
            event_idx: true,
            indirect: true,
            kick: None,
            call: None,
            error: None,
        }
    }

    #[test]
    fn parts_are_found_where_this_process_has_them() {
        let ram = ram();
        let [first, second] = [0, 1].map(|n: usize| ram.regions()[n].address());
        let found = locate(1, &described([0x1_0000, 0x1_3000, 0x1_4010]), &ram).unwrap();
        assert_eq!(found.index, 1);
        assert_eq!(found.descriptors, first);
        assert_eq!(found.available, first + 0x3000);
        assert_eq!(found.used, second + 0x10);
    }

    #[test]
    fn a_part_that_crosses_into_another_region_or_leaves_is_refused() {
        let ram = ram();
        let good = [0x1_0000, 0x1_3000, 0x1_4010];
        assert!(locate(0, &described(good), &ram).is_some());
        // Contiguous for the guest, with guards between them here.
        for bad in [
            [0x1_3008, good[1], good[2]],
            [good[0], 0x1_3e00, good[2]],
            [good[0], good[1], 0x1_7800],
            [0xf000, good[1], good[2]],
            [u64::MAX, good[1], good[2]],
        ] {
            assert_eq!(locate(0, &described(bad), &ram), None, "{bad:x?}");
        }
        // To the last byte.
        let last = [good[0], 0x1_4000 - (4 + 512 + 2), 0x1_8000 - (4 + 2048 + 2)];
        assert!(locate(0, &described(last), &ram).is_some());
    }

    #[test]
    fn the_kernel_is_told_of_memory_as_it_is_mapped_here() {
        let ram = ram();
        let [first, second] = [0, 1].map(|n: usize| ram.regions()[n].address());
        assert_eq!(
            table(&ram),
            [2, 0x1_0000, 0x4000, first, 0, 0x1_4000, 0x4000, second, 0]
        );
    }

    #[test]
    fn what_is_no_vhost_net_is_refused() {
        let fd = memfd_create(c"none", MFdFlags::MFD_CLOEXEC).unwrap();
        let fault = VhostNet::new(fd).unwrap_err();
        assert_eq!(fault.source, Errno::ENOTTY);
        assert_eq!(fault.call, "ioctl(VHOST_GET_FEATURES)");
    }
}
