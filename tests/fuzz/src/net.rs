//! # `net`: a driver's packets, its buffers and its control queue
//!
//! A datagram socket stands for the tap: each read is a packet and each write is one, and the offload calls do nothing under
//! `cfg(fuzzing)`. The input chooses the queue; with a receive queue its data is a packet from the network as well.

use crate::bytes::Input;
use crate::chains::{Queue, REGIONS};
use crate::{once, planted};
use device_host::fuzzing::{Bench, backend_fds};
use ipc::spec::DeviceSpec;
use ipc::spec::net::NetSpec;
use net_device::Net;
use std::os::unix::net::UnixDatagram;

const PAIRS: u16 = 2;
const HEADER: usize = 12;
/// The longest packet with its header that the device may hand to the tap.
const MAX_FRAME: usize = HEADER + 65_535 + 14 + 8;

struct Card {
    bench: Bench<Net>,
    wires: Vec<UnixDatagram>,
    /// The device's own ends, to empty them for the next input.
    taps: Vec<UnixDatagram>,
}

fn card() -> Card {
    let mut fds = Vec::new();
    let (mut taps, mut wires) = (Vec::new(), Vec::new());
    for _ in 0..PAIRS {
        let (tap, wire) = UnixDatagram::pair().expect("socketpair");
        wire.set_nonblocking(true).expect("fcntl");
        taps.push(tap.try_clone().expect("dup"));
        fds.push(tap.into());
        wires.push(wire);
    }
    let start = crate::start::message(DeviceSpec::Net(NetSpec {
        id: "net".into(),
        mac: [2, 0, 0, 0, 0, 1],
        queue_pairs: PAIRS,
        queue_size: 256,
        control_queue: true,
        vhost: false,
        limits: Default::default(),
        stands_in: None,
        poll_us: 0,
    }));
    let mut fds = backend_fds(fds);
    let device = Net::build(&start, &mut fds).expect("a card");
    Card {
        bench: Bench::new(device, &REGIONS),
        wires,
        taps,
    }
}

/// One input.
pub fn run(data: &[u8]) {
    let mut input = Input(data);
    let kind = input.byte();
    let index = u16::from(kind % 5);
    let packets = input.byte();
    let queue = Queue::read(&mut input);
    once!(Card, card(), |card: &mut Card| {
        let bench = &card.bench;
        bench.reset();
        bench.accept(queue.features);
        queue.place(bench);
        if index % 2 == 0 && index < 4 {
            for count in 0..usize::from(packets % 4) {
                let len = HEADER + usize::from(packets) * 64 * (count + 1);
                let mut packet = vec![0x55; len];
                let front = queue.data.len().min(len);
                packet[..front].copy_from_slice(&queue.data[..front]);
                let _ = card.wires[usize::from(index / 2)].send(&packet);
            }
        }
        bench.start(&queue.shape(index));
        assert!(bench.turns(4), "a guest ended the process");
        for back_end in 0..usize::from(PAIRS) {
            assert!(bench.backend_ready(back_end), "a guest ended the process");
        }
        assert!(bench.turns(4), "a guest ended the process");
        let used = queue.used(bench);
        let mut packet = vec![0; MAX_FRAME + 1];
        let mut sent = 0;
        for wire in &card.wires {
            while let Ok(len) = wire.recv(&mut packet) {
                sent += 1;
                assert!(
                    (HEADER + 14..=MAX_FRAME).contains(&len),
                    "frame of {len} bytes"
                );
                // Checksum help was asked for, and lies inside of the packet (virtio 1.3, 5.1.6.2).
                let at = |at: usize| usize::from(u16::from_le_bytes([packet[at], packet[at + 1]]));
                if packet[0] & 1 != 0 {
                    assert!(at(6) + at(8) + 2 <= len - HEADER);
                    planted!(packet[1] != 0);
                }
                assert_eq!(packet[10..12], [0, 0]);
            }
        }
        assert!(
            index % 2 == 1 || sent == 0,
            "a packet came out of queue {index}"
        );
        planted!(
            index == 4 && used.iter().any(|(_, len)| *len == 1) && queue.data.first() == Some(&4)
        );
        for tap in &card.taps {
            while tap.recv(&mut packet).is_ok() {}
        }
        let _ = used;
    });
}
