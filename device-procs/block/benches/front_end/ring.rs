//! # A driver that never sleeps
//!
//! **Job.** Guest memory, rings as Linux's virtio_blk lays them out (one descriptor per request, which is an indirect table of
//! three: virtio 1.3, 2.7.5.3 and 5.2.6), and the loop that keeps a number of requests in flight.
//! **Who is not trusted.** Nobody; a request that fails is a panic.
//! **Why this way.** All descriptors are written beforehand, and the used ring is polled without interrupts, so that what a request
//! costs here is a few stores: the back end is what is measured.

use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use device_host::test_frontend::polled::{AREA, FREE, PolledFrontend, PolledRing};
use device_host::test_frontend::{INDIRECT, NEXT, WRITE};
use virtio_bindings::virtio_blk::VIRTIO_BLK_F_FLUSH;

use crate::loads::{DEPTH, IN_FLIGHT, Load, QUEUES};

/// Entries of a queue.
pub(crate) const SIZE: u16 = 256;

/// What is where in a queue's area.
const TABLES: usize = FREE;
const TABLE: usize = 64;
const HEADERS: usize = 0xc000;
const HEADER: usize = 32;
const STATUS: usize = 16;
/// Where data begins.
const DATA: u64 = QUEUES as u64 * AREA;

/// How long a back end may owe a request.
const PATIENCE: Duration = Duration::from_secs(20);

/// The driver's side of a queue.
pub(crate) struct Ring {
    number: u64,
    queue: PolledRing,
    /// When each slot's request was offered.
    since: Vec<Instant>,
    /// Sector of the next request, or the state of the generator of random ones.
    next: u64,
}

impl Ring {
    /// Writes the descriptors of all slots that a load uses.
    fn prepare(&mut self, load: &Load) {
        let base = self.queue.address;
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
                self.queue.descriptor(table + n * 16, raw);
            }
            self.queue
                .descriptor(slot * 16, (base + table as u64, 48, INDIRECT, 0));
            // VIRTIO_BLK_T_OUT, VIRTIO_BLK_T_IN
            self.queue.store(u32::from(load.write), header);
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
        self.queue.store(sector, header + 8);
        self.queue.store(0xffu8, header + STATUS);
        // Below DEPTH.
        self.queue.offer(slot as u16);
        self.since[slot] = now;
    }

    /// The slot of the next request that is done.
    fn done(&mut self) -> Option<usize> {
        let slot = usize::from(self.queue.done()?.0);
        let status: u8 = self.queue.load(HEADERS + slot * HEADER + STATUS);
        assert_eq!(status, 0, "a request failed");
        Some(slot)
    }
}

/// Keeps the load's requests in flight for `slice`, then waits for the last ones. Returns the nanoseconds of each.
pub(crate) fn run(rings: &mut [Ring], load: &Load, bytes: u64, slice: Duration) -> Vec<u32> {
    let rings = &mut rings[..load.queues];
    let start = Instant::now();
    let mut times = Vec::with_capacity(1 << 18);
    for ring in rings.iter_mut() {
        ring.prepare(load);
        ring.queue.want_no_interrupt();
        for slot in 0..load.depth {
            ring.offer(slot, load, bytes, start);
        }
        ring.queue.publish();
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
                ring.queue.want_no_interrupt();
                ring.queue.publish();
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
pub(crate) fn connect(socket: UnixStream) -> (PolledFrontend, Vec<Ring>) {
    let size = (DATA + IN_FLIGHT) as usize;
    // A driver that cannot flush has every write flushed, which no driver of today wants (virtio 1.3, 5.2.5.2).
    let mut front = PolledFrontend::connect(socket, QUEUES, size, 1 << VIRTIO_BLK_F_FLUSH);
    let rings = (0..QUEUES)
        .map(|number| Ring {
            number: number as u64,
            queue: front.start(number, SIZE),
            since: vec![Instant::now(); DEPTH],
            next: 1,
        })
        .collect();
    (front, rings)
}
