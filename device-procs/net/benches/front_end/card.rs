//! # The driver
//!
//! **Job.** Queues as Linux's virtio_net lays them out (virtio 1.3, 5.1.6): a small frame in one descriptor with its header in
//! front, a large one in an indirect table of pages; single buffers that are merged to receive. **Who is not trusted.** Nobody.
//! **Why this way.** All descriptors are written beforehand; what a packet costs here is a few stores.

use std::fs::File;
use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use device_host::test_frontend::polled::{AREA, FREE, PolledFrontend, PolledRing};
use device_host::test_frontend::{INDIRECT, NEXT, WRITE};
use virtio_bindings::virtio_net::{
    VIRTIO_NET_CTRL_MQ, VIRTIO_NET_CTRL_MQ_VQ_PAIRS_SET, VIRTIO_NET_F_CSUM, VIRTIO_NET_F_CTRL_VQ,
    VIRTIO_NET_F_GUEST_CSUM, VIRTIO_NET_F_GUEST_TSO4, VIRTIO_NET_F_HOST_TSO4, VIRTIO_NET_F_MQ,
    VIRTIO_NET_F_MRG_RXBUF,
};
use vm_memory::{Bytes, GuestAddress};

use crate::loads::{Load, NET_HEADER};

/// Entries of a queue.
pub(crate) const SIZE: u16 = 256;
/// Frames at a time in a queue that sends large ones: what their tables have room for.
pub(crate) const LARGE: u16 = 60;
const TABLE: usize = 0x200;
pub(crate) const PAGE: usize = 4096;
/// The first piece of a large frame: what is in front of its payload.
pub(crate) const HEADERS_FIRST: usize = NET_HEADER + 54;
/// Memory of a queue's frames, and of each.
const DATA: u64 = 0x60_0000;
pub(crate) const LARGE_FRAME: usize = 0x1_2000;
/// No multiple of a page: their first lines would all be in the same few places of the cache.
pub(crate) const SMALL_FRAME: usize = 0x1040;

/// How long a back end may owe a frame.
const PATIENCE: Duration = Duration::from_secs(20);

pub(crate) struct Card {
    front: PolledFrontend,
    rings: Vec<PolledRing>,
    queues: usize,
    prepared: Option<Load>,
    /// All receive buffers are the back end's.
    echoing: bool,
}

impl Card {
    /// `control` is whether the back end has a control queue of its own, which must be told how many pairs there are.
    pub(crate) fn connect(socket: UnixStream, queues: usize, control: bool) -> Self {
        let mut features = [
            VIRTIO_NET_F_CSUM,
            VIRTIO_NET_F_GUEST_CSUM,
            VIRTIO_NET_F_GUEST_TSO4,
            VIRTIO_NET_F_HOST_TSO4,
            VIRTIO_NET_F_MRG_RXBUF,
        ]
        .iter()
        .fold(0, |all, bit| all | 1 << bit);
        if queues > 1 {
            features |= 1 << VIRTIO_NET_F_MQ | 1 << VIRTIO_NET_F_CTRL_VQ;
        }
        let count = 2 * queues + 1;
        let size = (AREA + DATA) as usize * count;
        let mut front = PolledFrontend::connect(socket, count, size, features);
        let rings = (0..2 * queues).map(|n| front.start(n, SIZE)).collect();
        let mut card = Self {
            front,
            rings,
            queues,
            prepared: None,
            echoing: false,
        };
        if control && queues > 1 {
            card.set_pairs();
        }
        for ring in &card.rings {
            ring.want_no_interrupt();
        }
        card
    }

    fn set_pairs(&mut self) {
        let mut ring = self.front.start(2 * self.queues, SIZE);
        let command = [
            VIRTIO_NET_CTRL_MQ as u8,
            VIRTIO_NET_CTRL_MQ_VQ_PAIRS_SET as u8,
            self.queues as u8,
            0,
            0xff,
        ];
        for (at, byte) in command.into_iter().enumerate() {
            ring.store(byte, FREE + at);
        }
        let at = ring.address + FREE as u64;
        ring.descriptor(0, (at, 4, NEXT, 1));
        ring.descriptor(16, (at + 4, 1, WRITE, 0));
        ring.offer(0);
        ring.publish();
        let start = Instant::now();
        while ring.done().is_none() {
            assert!(
                start.elapsed() < PATIENCE,
                "the control queue is not served"
            );
        }
        assert_eq!(
            ring.load::<u8>(FREE + 4),
            0,
            "the number of pairs was refused"
        );
    }

    fn data(&self, ring: usize) -> u64 {
        (2 * self.queues as u64 + 1) * AREA + ring as u64 * DATA
    }

    fn prepare(&mut self, load: &Load) {
        if self.prepared.replace(*load) == Some(*load) {
            return;
        }
        for index in 0..self.rings.len() {
            let base = self.data(index);
            if index % 2 == 1 {
                self.prepare_frames(index, base, load);
            } else {
                for slot in 0..usize::from(SIZE) {
                    let at = base + (slot * SMALL_FRAME) as u64;
                    let raw = (at, load.buffer() as u32, WRITE, 0);
                    self.rings[index].descriptor(slot * 16, raw);
                }
            }
        }
    }

    fn prepare_frames(&self, index: usize, base: u64, load: &Load) {
        let ring = &self.rings[index];
        let packet = load.packet(index);
        for slot in 0..usize::from(self.depth(load)) {
            if !load.segmented() {
                let at = base + (slot * SMALL_FRAME) as u64;
                let memory = self.front.memory();
                memory.write_slice(&packet, GuestAddress(at)).unwrap();
                ring.descriptor(slot * 16, (at, packet.len() as u32, 0, 0));
                continue;
            }
            // The headers, then pages.
            let at = base + (slot * LARGE_FRAME) as u64;
            let memory = self.front.memory();
            memory.write_slice(&packet, GuestAddress(at)).unwrap();
            let table = FREE + slot * TABLE;
            let head = HEADERS_FIRST;
            let mut offset = 0;
            let mut entries = 0;
            while offset < packet.len() {
                let len = if offset == 0 {
                    head
                } else {
                    PAGE.min(packet.len() - offset)
                };
                let next = if offset + len < packet.len() { NEXT } else { 0 };
                let raw = (at + offset as u64, len as u32, next, entries as u16 + 1);
                ring.descriptor(table + entries * 16, raw);
                offset += len;
                entries += 1;
            }
            let table = ring.address + table as u64;
            ring.descriptor(slot * 16, (table, entries as u32 * 16, INDIRECT, 0));
        }
    }

    fn depth(&self, load: &Load) -> u16 {
        if load.segmented() { LARGE } else { SIZE }
    }

    /// Keeps all queues full for `slice`; frames sent and the time that it took.
    pub(crate) fn send(&mut self, load: &Load, slice: Duration) -> (usize, Duration) {
        self.prepare(load);
        let depth = self.depth(load);
        let start = Instant::now();
        let mut owed = 0;
        for ring in self.rings.iter_mut().skip(1).step_by(2) {
            (0..depth).for_each(|slot| ring.offer(slot));
            ring.publish();
            owed += usize::from(depth);
        }
        let (mut sent, mut last, mut vain, mut over) = (0, start, 0u32, false);
        while owed > 0 {
            for ring in self.rings.iter_mut().skip(1).step_by(2) {
                let mut any = false;
                while let Some((slot, _)) = ring.done() {
                    any = true;
                    sent += 1;
                    if over {
                        owed -= 1;
                    } else {
                        ring.offer(slot);
                    }
                }
                if any {
                    ring.want_no_interrupt();
                    ring.publish();
                    vain = 0;
                    last = Instant::now();
                    over |= last - start >= slice;
                } else {
                    vain += 1;
                    std::hint::spin_loop();
                }
            }
            if vain > 1 << 22 {
                assert!(last.elapsed() < PATIENCE, "frames are not sent");
                vain = 0;
            }
        }
        (sent, last - start)
    }

    /// Frames that the host sends, and gets back before it sends the next: round trips, and the time that they took. This driver
    /// sleeps until it is interrupted, and the host until the frame is there, as a guest and a program do.
    pub(crate) fn echo(
        &mut self,
        mut host: &File,
        load: &Load,
        apart: Duration,
        slice: Duration,
    ) -> (usize, Duration) {
        self.prepare(load);
        let frame = load.frame(100);
        let mut back = vec![0; frame.len()];
        let [receive, send] = &mut self.rings[..2] else {
            panic!("a card has two queues");
        };
        if !std::mem::replace(&mut self.echoing, true) {
            (0..SIZE).for_each(|slot| receive.offer(slot));
            receive.publish();
        }
        let start = Instant::now();
        let (mut count, mut time) = (0, Duration::ZERO);
        while start.elapsed() < slice {
            let begin = Instant::now();
            host.write_all(&frame).unwrap();
            let (slot, _) = receive.wait_done();
            receive.offer(slot);
            receive.publish();
            send.offer((count % usize::from(SIZE)) as u16);
            send.publish();
            host.read_exact(&mut back).unwrap();
            let end = Instant::now();
            time += end - begin;
            count += 1;
            while send.done().is_some() {}
            while end.elapsed() < apart {
                std::hint::spin_loop();
            }
        }
        (count, time)
    }

    /// Gives the back end buffers for exactly `frames` frames that wait in each queue; how long it took them all to come.
    pub(crate) fn receive(&mut self, load: &Load, frames: usize) -> Duration {
        self.prepare(load);
        let each = frames * load.buffers();
        let mut left = vec![each; self.queues];
        let start = Instant::now();
        for (ring, left) in self.rings.iter_mut().step_by(2).zip(&mut left) {
            let count = each.min(usize::from(SIZE));
            (0..count as u16).for_each(|slot| ring.offer(slot));
            *left -= count;
            ring.publish();
        }
        let (mut owed, mut last, mut vain) = (each * self.queues, start, 0u32);
        while owed > 0 {
            for (ring, left) in self.rings.iter_mut().step_by(2).zip(&mut left) {
                let mut any = false;
                while let Some((slot, _)) = ring.done() {
                    any = true;
                    owed -= 1;
                    if *left > 0 {
                        *left -= 1;
                        ring.offer(slot);
                    }
                }
                if any {
                    ring.want_no_interrupt();
                    ring.publish();
                    vain = 0;
                    last = Instant::now();
                } else {
                    vain += 1;
                    std::hint::spin_loop();
                }
            }
            if vain > 1 << 22 {
                assert!(last.elapsed() < PATIENCE, "{owed} buffers did not come");
                vain = 0;
            }
        }
        last - start
    }
}
