//! A driver that never sleeps, for benches.
//!
//! **Job.** Guest memory of any size, touched beforehand, and queues whose used ring is polled without interrupts. What a
//! request looks like is the bench's.
//! **Who is not trusted.** Nobody: this is test code.
//! **Why this way.** What a request costs here is a few stores, so the back end is what is measured.

use std::fs::File;
use std::os::fd::AsRawFd;
use std::os::unix::net::UnixStream;
use std::sync::atomic::{Ordering, fence};

use nix::sys::memfd::{MFdFlags, memfd_create};
use vhost::vhost_user::message::{VhostUserHeaderFlag, VhostUserProtocolFeatures};
use vhost::vhost_user::{Frontend, VhostUserFrontend};
use vhost::{VhostBackend, VhostUserMemoryRegionInfo, VringConfigData};
use vm_memory::{
    Bytes, FileOffset, GuestAddress, GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion,
    VolatileSlice,
};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::{BASE_FEATURES, EVENT_IDX, INDIRECT_DESC};

/// A queue's own part of memory; what is behind [`FREE`] in it is the bench's.
pub const AREA: u64 = 0x1_0000;
/// Entries of a queue at most.
pub const MAX_ENTRIES: u16 = 1024;
const AVAILABLE: usize = 0x4000;
const USED: usize = 0x5000;
/// The first byte of an area that no ring takes.
pub const FREE: usize = 0x8000;

/// A connection, and the memory behind it, which stays for good.
pub struct PolledFrontend {
    vhost: Frontend,
    memory: &'static GuestMemoryMmap<()>,
}

impl PolledFrontend {
    /// Negotiates `features` and those of the rings, with guest memory of `size` bytes from address 0 on. `queues` are as many
    /// as the back end is told of at most.
    pub fn connect(socket: UnixStream, queues: usize, size: usize, features: u64) -> Self {
        let file = File::from(memfd_create(c"bench-ram", MFdFlags::MFD_CLOEXEC).unwrap());
        file.set_len(size as u64).unwrap();
        let part = (GuestAddress(0), size, Some(FileOffset::new(file, 0)));
        let memory = GuestMemoryMmap::<()>::from_ranges_with_files([part]).unwrap();
        // Touched before anything is measured.
        memory.write_slice(&vec![0; size], GuestAddress(0)).unwrap();
        let memory: &'static GuestMemoryMmap<()> = Box::leak(Box::new(memory));

        let mut vhost = Frontend::from_stream(socket, queues as u64);
        vhost.set_owner().unwrap();
        let offered = vhost.get_features().unwrap();
        let wanted = VhostUserProtocolFeatures::MQ
            | VhostUserProtocolFeatures::REPLY_ACK
            | VhostUserProtocolFeatures::CONFIG;
        let protocol = vhost.get_protocol_features().unwrap() & wanted;
        vhost.set_protocol_features(protocol).unwrap();
        if protocol.contains(VhostUserProtocolFeatures::REPLY_ACK) {
            vhost.set_hdr_flags(VhostUserHeaderFlag::NEED_REPLY);
        }
        let needed = INDIRECT_DESC | EVENT_IDX | BASE_FEATURES | features;
        assert_eq!(
            offered & needed,
            needed,
            "the back end lacks features {:#x}",
            needed & !offered
        );
        vhost.set_features(needed).unwrap();
        let regions: Vec<VhostUserMemoryRegionInfo> = memory
            .iter()
            .map(|region| VhostUserMemoryRegionInfo {
                guest_phys_addr: region.start_addr().0,
                memory_size: region.len(),
                userspace_addr: region.as_ptr() as u64,
                mmap_offset: 0,
                mmap_handle: region.file_offset().unwrap().file().as_raw_fd(),
            })
            .collect();
        vhost.set_mem_table(&regions).unwrap();
        Self { vhost, memory }
    }

    /// Guest memory.
    pub const fn memory(&self) -> &'static GuestMemoryMmap<()> {
        self.memory
    }

    /// Starts and enables queue `number`, of `entries`, in area `number`.
    pub fn start(&mut self, number: usize, entries: u16) -> PolledRing {
        assert!(entries <= MAX_ENTRIES);
        let event = || EventFd::new(EFD_NONBLOCK).unwrap();
        let (kick, call, error) = (event(), event(), event());
        let base = GuestAddress(number as u64 * AREA);
        let user = self.memory.get_host_address(base).unwrap() as u64;
        let addresses = VringConfigData {
            queue_max_size: entries,
            queue_size: entries,
            flags: 0,
            desc_table_addr: user,
            used_ring_addr: user + USED as u64,
            avail_ring_addr: user + AVAILABLE as u64,
            log_addr: None,
        };
        let vhost = &mut self.vhost;
        vhost.set_vring_num(number, entries).unwrap();
        vhost.set_vring_addr(number, &addresses).unwrap();
        vhost.set_vring_base(number, 0).unwrap();
        vhost.set_vring_call(number, &call).unwrap();
        vhost.set_vring_err(number, &error).unwrap();
        vhost.set_vring_kick(number, &kick).unwrap();
        vhost.set_vring_enable(number, true).unwrap();
        PolledRing {
            entries,
            address: base.0,
            area: self.memory.get_slice(base, AREA as usize).unwrap(),
            kick,
            call,
            _error: error,
            offered: 0,
            published: 0,
            seen: 0,
        }
    }
}

/// The driver's side of a queue.
pub struct PolledRing {
    entries: u16,
    /// Guest address of its area.
    pub address: u64,
    area: VolatileSlice<'static, ()>,
    kick: EventFd,
    call: EventFd,
    // Kept: the back end has the other end.
    _error: EventFd,
    offered: u16,
    published: u16,
    seen: u16,
}

impl PolledRing {
    /// Writes into the area.
    pub fn store<T: vm_memory::AtomicAccess>(&self, value: T, at: usize) {
        self.area.store(value, at, Ordering::Release).unwrap();
    }

    /// Reads from the area.
    pub fn load<T: vm_memory::AtomicAccess>(&self, at: usize) -> T {
        self.area.load(at, Ordering::Acquire).unwrap()
    }

    /// Writes a descriptor (address, length, flags, next) at `at` in the area; the queue's own are at multiples of 16 from 0 on.
    pub fn descriptor(&self, at: usize, raw: (u64, u32, u16, u16)) {
        let (address, len, flags, next) = raw;
        self.area.write_obj(address, at).unwrap();
        self.area.write_obj(len, at + 8).unwrap();
        self.area.write_obj(flags, at + 12).unwrap();
        self.area.write_obj(next, at + 14).unwrap();
    }

    /// Makes the chain at `head` available with the next [`publish`](Self::publish).
    pub fn offer(&mut self, head: u16) {
        let at = AVAILABLE + 4 + usize::from(self.offered % self.entries) * 2;
        self.store(head, at);
        self.offered = self.offered.wrapping_add(1);
    }

    /// Shows the device what was offered, and wakes it if it wants that (virtio 1.3, 2.7.10).
    pub fn publish(&mut self) {
        if self.offered == self.published {
            return;
        }
        self.store(self.offered, AVAILABLE + 2);
        fence(Ordering::SeqCst);
        let event: u16 = self.load(USED + 4 + usize::from(self.entries) * 8);
        let since = self.offered.wrapping_sub(event).wrapping_sub(1);
        if since < self.offered.wrapping_sub(self.published) {
            self.kick.write(1).unwrap();
        }
        self.published = self.offered;
    }

    /// The next chain that is done: its head and the bytes written.
    pub fn done(&mut self) -> Option<(u16, u32)> {
        if self.load::<u16>(USED + 2) == self.seen {
            return None;
        }
        let at = USED + 4 + usize::from(self.seen % self.entries) * 8;
        let (head, len) = (self.load(at), self.load(at + 4));
        self.seen = self.seen.wrapping_add(1);
        Some((head, len))
    }

    /// The same as soon as there is one, by its interrupt.
    pub fn wait_done(&mut self) -> (u16, u32) {
        loop {
            self.store(self.seen, AVAILABLE + 4 + usize::from(self.entries) * 2);
            fence(Ordering::SeqCst);
            if let Some(done) = self.done() {
                return done;
            }
            super::wait_for(&self.call, "an interrupt");
            let _ = self.call.read();
        }
    }

    /// Interrupts would come half the indices away from here, which is never.
    pub fn want_no_interrupt(&self) {
        self.store(
            self.seen.wrapping_add(0x8000),
            AVAILABLE + 4 + usize::from(self.entries) * 2,
        );
    }
}
