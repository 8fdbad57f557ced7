//! # A driver that never sleeps
//!
//! **Job.** Guest memory, rings as Linux's virtio_blk lays them out (one descriptor per request, which is an indirect table of
//! three: virtio 1.3, 2.7.5.3 and 5.2.6), and the loop that keeps a number of requests in flight.
//! **Who is not trusted.** Nobody; a request that fails is a panic.
//! **Why this way.** All descriptors are written beforehand, and the used ring is polled without interrupts, so that what a request
//! costs here is a few stores: the back end is what is measured.

use std::fs::File;
use std::os::fd::AsRawFd;
use std::os::unix::net::UnixStream;
use std::sync::atomic::{Ordering, fence};
use std::time::{Duration, Instant};

use device_host::test_frontend::{BASE_FEATURES, EVENT_IDX, INDIRECT, INDIRECT_DESC, NEXT, WRITE};
use nix::sys::memfd::{MFdFlags, memfd_create};
use vhost::vhost_user::message::{VhostUserHeaderFlag, VhostUserProtocolFeatures};
use vhost::vhost_user::{Frontend, VhostUserFrontend};
use vhost::{VhostBackend, VhostUserMemoryRegionInfo, VringConfigData};
use virtio_bindings::virtio_blk::VIRTIO_BLK_F_FLUSH;
use vm_memory::{
    Bytes, FileOffset, GuestAddress, GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion,
    VolatileSlice,
};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use crate::loads::{DEPTH, IN_FLIGHT, Load, QUEUES};

/// Entries of a queue.
pub(crate) const SIZE: u16 = 256;

/// A queue's part of memory, and what is where in it.
const AREA: u64 = 0x1_0000;
const AVAILABLE: usize = 0x1000;
const USED: usize = 0x2000;
const TABLES: usize = 0x3000;
const TABLE: usize = 64;
const HEADERS: usize = 0x8000;
const HEADER: usize = 32;
const STATUS: usize = 16;
/// Where data begins.
const DATA: u64 = QUEUES as u64 * AREA;

/// How long a back end may owe a request.
const PATIENCE: Duration = Duration::from_secs(20);

/// The driver's side of a queue.
pub(crate) struct Ring {
    number: u64,
    area: VolatileSlice<'static, ()>,
    kick: EventFd,
    // Kept: the back end has the other ends.
    _call: EventFd,
    _error: EventFd,
    offered: u16,
    published: u16,
    seen: u16,
    /// When each slot's request was offered.
    since: Vec<Instant>,
    /// Sector of the next request, or the state of the generator of random ones.
    next: u64,
}

impl Ring {
    fn store<T: vm_memory::AtomicAccess>(&self, value: T, at: usize) {
        self.area.store(value, at, Ordering::Release).unwrap();
    }

    fn load(&self, at: usize) -> u16 {
        self.area.load(at, Ordering::Acquire).unwrap()
    }

    fn descriptor(&self, at: usize, raw: (u64, u32, u16, u16)) {
        let (address, len, flags, next) = raw;
        self.area.write_obj(address, at).unwrap();
        self.area.write_obj(len, at + 8).unwrap();
        self.area.write_obj(flags, at + 12).unwrap();
        self.area.write_obj(next, at + 14).unwrap();
    }

    /// Writes the descriptors of all slots that a load uses.
    fn prepare(&mut self, load: &Load) {
        let base = self.number * AREA;
        for slot in 0..load.depth {
            let (table, header) = (TABLES + slot * TABLE, HEADERS + slot * HEADER);
            let data = DATA + (self.number * load.depth as u64 + slot as u64) * load.block;
            let direction = if load.write { 0 } else { WRITE };
            let parts = [
                (base + header as u64, 16, NEXT, 1),
                (data, load.block as u32, NEXT | direction, 2),
                (base + (header + STATUS) as u64, 1, WRITE, 0),
            ];
            for (n, raw) in parts.into_iter().enumerate() {
                self.descriptor(table + n * 16, raw);
            }
            self.descriptor(slot * 16, (base + table as u64, 48, INDIRECT, 0));
            // VIRTIO_BLK_T_OUT, VIRTIO_BLK_T_IN
            self.store(u32::from(load.write), header);
        }
        // Where each begins is its own, so that sequential ones do not follow each other's pages.
        self.next = self.number + 1;
    }

    fn sector(&mut self, load: &Load, bytes: u64) -> u64 {
        let blocks = bytes / load.block;
        let block = if load.random {
            // xorshift
            self.next ^= self.next << 13;
            self.next ^= self.next >> 7;
            self.next ^= self.next << 17;
            self.next % blocks
        } else {
            self.next += 1;
            (self.next + self.number * blocks / QUEUES as u64) % blocks
        };
        block * load.block / 512
    }

    fn offer(&mut self, slot: usize, load: &Load, bytes: u64, now: Instant) {
        let sector = self.sector(load, bytes);
        let header = HEADERS + slot * HEADER;
        self.store(sector, header + 8);
        self.store(0xffu8, header + STATUS);
        let at = AVAILABLE + 4 + usize::from(self.offered % SIZE) * 2;
        // Below DEPTH.
        self.store(slot as u16, at);
        self.offered = self.offered.wrapping_add(1);
        self.since[slot] = now;
    }

    /// Shows the device what was offered, and wakes it if it wants that (virtio 1.3, 2.7.10).
    fn publish(&mut self) {
        if self.offered == self.published {
            return;
        }
        self.store(self.offered, AVAILABLE + 2);
        fence(Ordering::SeqCst);
        let event = self.load(USED + 4 + usize::from(SIZE) * 8);
        let since = self.offered.wrapping_sub(event).wrapping_sub(1);
        if since < self.offered.wrapping_sub(self.published) {
            self.kick.write(1).unwrap();
        }
        self.published = self.offered;
    }

    /// The slot of the next request that is done.
    fn done(&mut self) -> Option<usize> {
        if self.load(USED + 2) == self.seen {
            return None;
        }
        let slot = self.load(USED + 4 + usize::from(self.seen % SIZE) * 8);
        self.seen = self.seen.wrapping_add(1);
        let slot = usize::from(slot);
        let status: u8 = self
            .area
            .load(HEADERS + slot * HEADER + STATUS, Ordering::Acquire)
            .unwrap();
        assert_eq!(status, 0, "a request failed");
        Some(slot)
    }

    /// Interrupts would come half the indices away from here, which is never.
    fn want_no_interrupt(&self) {
        self.store(
            self.seen.wrapping_add(0x8000),
            AVAILABLE + 4 + usize::from(SIZE) * 2,
        );
    }
}

/// Keeps the load's requests in flight for `slice`, then waits for the last ones. Returns the nanoseconds of each.
pub(crate) fn run(rings: &mut [Ring], load: &Load, bytes: u64, slice: Duration) -> Vec<u32> {
    let rings = &mut rings[..load.queues];
    let start = Instant::now();
    let mut times = Vec::with_capacity(1 << 18);
    for ring in rings.iter_mut() {
        ring.prepare(load);
        ring.want_no_interrupt();
        for slot in 0..load.depth {
            ring.offer(slot, load, bytes, start);
        }
        ring.publish();
    }
    let mut owed = load.depth * load.queues;
    let mut last = start;
    let mut vain = 0u32;
    while owed > 0 {
        for ring in rings.iter_mut() {
            let mut now = None;
            while let Some(slot) = ring.done() {
                let now = *now.get_or_insert_with(Instant::now);
                let took = now.duration_since(ring.since[slot]).as_nanos();
                times.push(u32::try_from(took).unwrap_or(u32::MAX));
                if now.duration_since(start) < slice {
                    ring.offer(slot, load, bytes, now);
                } else {
                    owed -= 1;
                }
                last = now;
            }
            if now.is_some() {
                vain = 0;
                ring.want_no_interrupt();
                ring.publish();
            } else {
                vain += 1;
                std::hint::spin_loop();
            }
        }
        // Looked at now and then only: the clock costs as much as a look at the ring.
        if vain > 1 << 20 {
            assert!(last.elapsed() < PATIENCE, "a back end does not answer");
            vain = 0;
        }
    }
    times
}

/// Negotiates, and starts all queues on memory of its own, which stays for good.
pub(crate) fn connect(socket: UnixStream) -> (Frontend, Vec<Ring>) {
    let size = (DATA + IN_FLIGHT) as usize;
    let file = File::from(memfd_create(c"bench-ram", MFdFlags::MFD_CLOEXEC).unwrap());
    file.set_len(size as u64).unwrap();
    let part = (GuestAddress(0), size, Some(FileOffset::new(file, 0)));
    let memory = GuestMemoryMmap::<()>::from_ranges_with_files([part]).unwrap();
    // Touched before anything is measured.
    memory.write_slice(&vec![0; size], GuestAddress(0)).unwrap();
    let memory: &'static GuestMemoryMmap<()> = Box::leak(Box::new(memory));

    let mut front = Frontend::from_stream(socket, QUEUES as u64);
    front.set_owner().unwrap();
    let offered = front.get_features().unwrap();
    let wanted = VhostUserProtocolFeatures::MQ
        | VhostUserProtocolFeatures::REPLY_ACK
        | VhostUserProtocolFeatures::CONFIG;
    let protocol = front.get_protocol_features().unwrap() & wanted;
    front.set_protocol_features(protocol).unwrap();
    if protocol.contains(VhostUserProtocolFeatures::REPLY_ACK) {
        front.set_hdr_flags(VhostUserHeaderFlag::NEED_REPLY);
    }
    // A driver that cannot flush has every write flushed, which no driver of today wants (virtio 1.3, 5.2.5.2).
    let needed = INDIRECT_DESC | EVENT_IDX | BASE_FEATURES | 1 << VIRTIO_BLK_F_FLUSH;
    assert_eq!(offered & needed, needed, "the back end lacks features");
    front.set_features(needed).unwrap();
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
    front.set_mem_table(&regions).unwrap();
    let rings = (0..QUEUES).map(|n| start(&mut front, memory, n)).collect();
    (front, rings)
}

fn start(front: &mut Frontend, memory: &'static GuestMemoryMmap<()>, number: usize) -> Ring {
    let event = || EventFd::new(EFD_NONBLOCK).unwrap();
    let (kick, call, error) = (event(), event(), event());
    let base = GuestAddress(number as u64 * AREA);
    let user = memory.get_host_address(base).unwrap() as u64;
    let addresses = VringConfigData {
        queue_max_size: SIZE,
        queue_size: SIZE,
        flags: 0,
        desc_table_addr: user,
        used_ring_addr: user + USED as u64,
        avail_ring_addr: user + AVAILABLE as u64,
        log_addr: None,
    };
    front.set_vring_num(number, SIZE).unwrap();
    front.set_vring_addr(number, &addresses).unwrap();
    front.set_vring_base(number, 0).unwrap();
    front.set_vring_call(number, &call).unwrap();
    front.set_vring_err(number, &error).unwrap();
    front.set_vring_kick(number, &kick).unwrap();
    front.set_vring_enable(number, true).unwrap();
    Ring {
        number: number as u64,
        area: memory.get_slice(base, AREA as usize).unwrap(),
        kick,
        _call: call,
        _error: error,
        offered: 0,
        published: 0,
        seen: 0,
        since: vec![Instant::now(); DEPTH],
        next: 1,
    }
}
