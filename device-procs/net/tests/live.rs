//! The network card, as a live process with its filter on, between a driver's queues and a tap in a network namespace of the
//! test's own thread.

#![allow(clippy::unwrap_used)] // in a test, a panic is the report

use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::OwnedFd;
use std::time::{Duration, Instant};

use device_host::test_frontend::tap::Tap;
use device_host::test_frontend::{
    Buffer, DeviceProcess, DriverQueue, EVENT_IDX, TestFrontend, wait_readable,
};
use ipc::limits::NET_POLL_US;
use ipc::spec::DeviceSpec;
use ipc::spec::net::{Bucket, Limit, NetLimits, NetSpec};
use vhost::vhost_user::VhostUserFrontend;
use vhost::vhost_user::message::{VhostUserConfigFlags, VhostUserInflight};

const BINARY: &str = env!("CARGO_BIN_EXE_net");
const MAC: [u8; 6] = [0x52, 0x54, 0, 1, 2, 3];
const TX: u64 = 0x10_0000;
const RX: u64 = 0x20_0000;
/// Of a queue's place in memory.
const QUEUE: u64 = 0x2_0000;

const CSUM: u64 = 1 << 0;
const GUEST_CSUM: u64 = 1 << 1;
const GUEST_TSO4: u64 = 1 << 7;
const HOST_TSO4: u64 = 1 << 11;
const MRG_RXBUF: u64 = 1 << 15;
const CTRL_VQ: u64 = 1 << 17;
const MQ: u64 = 1 << 22;
const CTRL_GUEST_OFFLOADS: u64 = 1 << 2;
const CTRL_RX: u64 = 1 << 18;
const CTRL_VLAN: u64 = 1 << 19;
const GUEST_ANNOUNCE: u64 = 1 << 21;
const CTRL_MAC_ADDR: u64 = 1 << 23;
/// Where commands are, and their answers.
const CONTROL: u64 = 0x30_0000;
const ANSWER: u64 = CONTROL + 0x1000;

struct Card {
    process: DeviceProcess,
    front: TestFrontend,
    queues: Vec<DriverQueue>,
    host: File,
    /// The tap's queues, for another process.
    taps: Vec<OwnedFd>,
    limits: NetLimits,
    /// The in-flight region.
    region: (VhostUserInflight, File),
}

fn card(pairs: u16, features: u64) -> Option<Card> {
    limited_card(pairs, features, NetLimits::default())
}

fn spec(pairs: u16, limits: NetLimits) -> DeviceSpec {
    DeviceSpec::Net(NetSpec {
        id: "net0".into(),
        mac: MAC,
        queue_pairs: pairs,
        queue_size: 256,
        control_queue: true,
        vhost: false,
        limits,
        stands_in: None,
        poll_us: NET_POLL_US,
    })
}

fn limited_card(pairs: u16, features: u64, limits: NetLimits) -> Option<Card> {
    let tap = Tap::in_new_namespace(pairs, true)?;
    // Frames that are not small need no segmentation then.
    tap.set_mtu(9000);
    let Tap { queues: fds, host } = tap;
    let taps = fds.iter().map(|fd| fd.try_clone().unwrap()).collect();
    let spec = spec(pairs, limits);
    let count = spec.num_queues();
    let mut process = DeviceProcess::start(BINARY, spec, fds);
    let mut front = TestFrontend::connect(process.socket(), features);
    let region = front.track_inflight(count, 256);
    let queues: Vec<_> = (0..count)
        .map(|index| DriverQueue::new(usize::from(index), 16, QUEUE * u64::from(index)))
        .collect();
    for queue in &queues {
        front.start(queue);
    }
    Some(Card {
        process,
        front,
        queues,
        host,
        taps,
        limits,
        region,
    })
}

/// An Ethernet frame of a type that nobody answers (IEEE 802 local experimental).
fn frame(len: usize, mark: u8) -> Vec<u8> {
    let mut frame = vec![mark; len];
    frame[..6].copy_from_slice(&MAC);
    frame[6..12].copy_from_slice(&[2, 0, 0, 0, 0, 1]);
    frame[12..14].copy_from_slice(&[0x88, 0xb5]);
    frame
}

impl Card {
    fn transmit(&mut self, header: [u8; 12], frame: &[u8]) {
        self.front.memory.write(TX, &header);
        self.front.memory.write(TX + 12, frame);
        let buffers = [
            Buffer::readable(TX, 12),
            Buffer::readable(TX + 12, frame.len() as u32),
        ];
        assert_eq!(self.queues[1].request(&self.front.memory, &buffers), 0);
    }

    /// The next frame of our type that the host sees.
    fn host_receives(&mut self) -> Vec<u8> {
        loop {
            wait_readable(&self.host, "a frame from the guest");
            let mut buffer = vec![0; 70_000];
            let len = self.host.read(&mut buffer).unwrap();
            buffer.truncate(len);
            if buffer[12..14] == [0x88, 0xb5] || buffer[12..14] == [8, 0] {
                return buffer;
            }
        }
    }

    /// Offers receive buffers of these lengths on queue `queue`, one after the other in memory.
    fn offer(&mut self, queue: usize, lengths: &[u32]) {
        let mut at = RX;
        for len in lengths {
            let q = &mut self.queues[queue];
            let head = q.chain(&self.front.memory, &[Buffer::writable(at, *len)]);
            q.offer(&self.front.memory, head);
            at += u64::from(*len);
        }
        self.queues[queue].kick();
    }

    /// Sends a command on the control queue; its answer.
    fn command(&mut self, command: &[u8]) -> u8 {
        self.front.memory.write(CONTROL, command);
        self.front.memory.write(ANSWER, &[9]);
        let buffers = [
            Buffer::readable(CONTROL, command.len() as u32),
            Buffer::writable(ANSWER, 1),
        ];
        let queue = self.queues.last_mut().unwrap();
        assert_eq!(queue.request(&self.front.memory, &buffers), 1);
        self.front.memory.read(ANSWER, 1)[0]
    }

    /// The host sends frames of 100 bytes to these addresses, all of one VLAN or of none, and then one that everybody
    /// wants; which of them the guest got. Receive buffers must have been offered.
    fn which_arrive(&mut self, to: &[[u8; 6]], vlan: Option<u16>) -> Vec<[u8; 6]> {
        let mut list = to.to_vec();
        list.push([0xff; 6]);
        for (at, to) in list.iter().enumerate() {
            let mut one = frame(100, at as u8);
            one[..6].copy_from_slice(to);
            if let Some(id) = vlan.filter(|_| *to != [0xff; 6]) {
                one[12..14].copy_from_slice(&[0x81, 0]);
                one[14..16].copy_from_slice(&id.to_be_bytes());
            }
            self.host.write_all(&one).unwrap();
        }
        let mut got = Vec::new();
        loop {
            self.offer(0, &[1600]);
            assert_eq!(self.queues[0].wait_used(&self.front.memory).1, 112);
            let to: [u8; 6] = self.front.memory.read(RX + 12, 6).try_into().unwrap();
            if to == [0xff; 6] {
                return got;
            }
            got.push(to);
        }
    }

    /// This process is killed, and another one goes on with the rings, the tap and what this one kept.
    fn reborn(mut self) -> Self {
        self.process.kill();
        self.process.finish();
        let taps = self.taps.iter().map(|fd| fd.try_clone().unwrap()).collect();
        let spec = spec(self.taps.len() as u16, self.limits);
        self.process = DeviceProcess::start(BINARY, spec, taps);
        let accepted = self.front.accepted;
        let socket = self.process.socket();
        self.front = TestFrontend::connect_with(socket, accepted, self.front.memory);
        self.front.use_inflight(&self.region.0, &self.region.1);
        for queue in &self.queues {
            self.front.start(queue);
        }
        self
    }

    fn finish(self) -> String {
        drop(self.front);
        self.process.finish_well()
    }
}

#[test]
fn the_driver_sees_what_was_asked_for() {
    let Some(mut card) = card(2, 0) else { return };
    assert_eq!(
        card.front.config(0, 12),
        [&MAC[..], &[1, 0, 2, 0, 0, 0]].concat()
    );
    let offered = card.front.offered;
    for bit in [
        CSUM, GUEST_CSUM, GUEST_TSO4, HOST_TSO4, MRG_RXBUF, CTRL_VQ, MQ, EVENT_IDX,
    ] {
        assert_ne!(offered & bit, 0, "{bit:#x}");
    }
    card.finish();
}

#[test]
fn frames_go_both_ways() {
    let Some(mut card) = card(1, 0) else { return };
    for len in [14, 60, 1514] {
        card.transmit([0; 12], &frame(len, 7));
        assert_eq!(card.host_receives(), frame(len, 7));
    }
    card.offer(0, &[1600, 1600]);
    for (slot, len) in [(0, 60), (1, 1514)] {
        card.host.write_all(&frame(len, 9)).unwrap();
        let (_, used) = card.queues[0].wait_used(&card.front.memory);
        assert_eq!(used as usize, len + 12);
        let got = card.front.memory.read(RX + slot * 1600, used as usize);
        assert_eq!(got[..12], [0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1, 0]);
        assert_eq!(got[12..], frame(len, 9));
    }
    card.finish();
}

/// Small ones are copied, others are not, and which one the next one is cannot be known.
#[test]
fn frames_of_all_sizes_follow_each_other() {
    // A large one takes two.
    const ROOM: u32 = 2100;
    let Some(mut card) = card(1, MRG_RXBUF) else {
        return;
    };
    // With their headers, around what is small; and so many small ones that the next one is expected to be so.
    let sizes = [60, 2036, 2037, 4000, 60, 14, 4000, 2035]
        .into_iter()
        .chain(std::iter::repeat_n(60, 20))
        .chain([4000, 300, 2500]);
    for (mark, len) in (1..).zip(sizes) {
        card.transmit([0; 12], &frame(len, mark));
        assert_eq!(card.host_receives(), frame(len, mark), "{len} bytes");
        card.offer(0, &[ROOM, ROOM]);
        card.host.write_all(&frame(len, !mark)).unwrap();
        let want = frame(len, !mark);
        let count = (12 + len).div_ceil(ROOM as usize);
        let mut got = Vec::new();
        for slot in 0..count as u64 {
            let (_, used) = card.queues[0].wait_used(&card.front.memory);
            let at = RX + slot * u64::from(ROOM);
            got.extend(card.front.memory.read(at, used as usize));
        }
        let header = [0, 0, 0, 0, 0, 0, 0, 0, 0, 0, count as u8, 0];
        assert_eq!(got[..12], header, "{len} bytes");
        assert_eq!(got[12..], want, "{len} bytes");
        // The next one begins with fresh buffers.
        for _ in count..2 {
            card.host.write_all(&frame(60, mark)).unwrap();
            card.queues[0].wait_used(&card.front.memory);
        }
    }
    card.finish();
}

#[test]
fn frames_wait_for_buffers() {
    let Some(mut card) = card(1, MRG_RXBUF | EVENT_IDX) else {
        return;
    };
    for mark in 1..=3 {
        card.host.write_all(&frame(100, mark)).unwrap();
    }
    // A message is answered only when the loop has had its turn with the tap.
    card.front.config(0, 6);
    for mark in 1..=3 {
        let memory = &card.front.memory;
        card.queues[0].set_used_event(memory, card.queues[0].used_index(memory));
        card.offer(0, &[200]);
        let (_, used) = card.queues[0].wait_used(&card.front.memory);
        assert_eq!(used, 112);
        assert_eq!(card.front.memory.read(RX + 12, 100), frame(100, mark));
    }
    card.finish();
}

#[test]
fn a_large_frame_is_spread_over_mergeable_buffers_all_at_once() {
    let Some(mut card) = card(1, MRG_RXBUF) else {
        return;
    };
    // Three buffers are not enough for the frame; it waits for more.
    card.offer(0, &[300, 300, 300]);
    card.host.write_all(&frame(1400, 5)).unwrap();
    card.front.config(0, 6);
    assert_eq!(card.queues[0].used_index(&card.front.memory), 0);
    let more = 5;
    let mut at = RX + 900;
    for _ in 0..more {
        let q = &mut card.queues[0];
        let head = q.chain(&card.front.memory, &[Buffer::writable(at, 300)]);
        q.offer(&card.front.memory, head);
        at += 300;
    }
    card.queues[0].kick();
    let mut lengths = Vec::new();
    for _ in 0..5 {
        lengths.push(card.queues[0].wait_used(&card.front.memory).1);
        assert_eq!(
            card.queues[0].used_index(&card.front.memory),
            5,
            "all or none"
        );
    }
    assert_eq!(lengths, [300, 300, 300, 300, 212]);
    let got = card.front.memory.read(RX, 1412);
    assert_eq!(got[10..12], [5, 0]);
    assert_eq!(got[12..], frame(1400, 5));
    // The next one goes on with the buffers that were left.
    card.host.write_all(&frame(64, 6)).unwrap();
    assert_eq!(card.queues[0].wait_used(&card.front.memory).1, 76);
    card.finish();
}

#[test]
fn a_large_frame_at_the_end_of_a_turn_is_not_forgotten() {
    let Some(mut card) = card(1, MRG_RXBUF | EVENT_IDX) else {
        return;
    };
    // One turn takes as many chains as the queue has entries: twelve small frames leave four, the large one needs five.
    for mark in 1..=12 {
        card.host.write_all(&frame(64, mark)).unwrap();
    }
    card.host.write_all(&frame(1400, 13)).unwrap();
    card.front.config(0, 6);
    card.offer(0, &[300; 16]);
    for _ in 0..12 {
        assert_eq!(card.queues[0].wait_used(&card.front.memory).1, 76);
    }
    // The first answer may come before the turn that is due, the second cannot.
    card.front.config(0, 6);
    card.front.config(0, 6);
    // A driver rings only when it is asked to, which it must have been unless the card is awake and looks.
    let q = &mut card.queues[0];
    q.set_used_event(&card.front.memory, 12);
    let head = q.chain(&card.front.memory, &[Buffer::writable(RX + 16 * 300, 300)]);
    q.offer(&card.front.memory, head);
    if q.avail_event(&card.front.memory) == 16 {
        q.kick();
    }
    let lengths: Vec<u32> = (0..5)
        .map(|_| card.queues[0].wait_used(&card.front.memory).1)
        .collect();
    assert_eq!(lengths, [300, 300, 300, 300, 212]);
    card.finish();
}

#[test]
fn without_mergeable_buffers_a_frame_that_does_not_fit_is_dropped() {
    let Some(mut card) = card(1, 0) else { return };
    card.offer(0, &[300, 300]);
    card.host.write_all(&frame(1000, 1)).unwrap();
    card.host.write_all(&frame(100, 2)).unwrap();
    assert_eq!(card.queues[0].wait_used(&card.front.memory).1, 112);
    assert_eq!(card.front.memory.read(RX + 12, 100), frame(100, 2));
    let log = card.finish();
    assert!(log.contains("packet of 1000 bytes dropped"), "{log}");
}

/// IPv4 and TCP headers in front of `payload` bytes; the checksum is left to the device.
fn tcp(payload: usize) -> Vec<u8> {
    let mut packet = frame(14 + 20 + 20 + payload, 0xab);
    packet[12..14].copy_from_slice(&[8, 0]);
    let ip = &mut packet[14..34];
    ip.copy_from_slice(&[
        0x45, 0, 0, 0, 0, 1, 0x40, 0, 64, 6, 0, 0, 10, 0, 0, 2, 10, 0, 0, 1,
    ]);
    ip[2..4].copy_from_slice(&(40 + payload as u16).to_be_bytes());
    let sum: u32 = ip
        .chunks(2)
        .map(|b| u32::from(u16::from_be_bytes([b[0], b[1]])))
        .sum();
    let folded = !((sum & 0xffff) + (sum >> 16)) as u16;
    ip[10..12].copy_from_slice(&folded.to_be_bytes());
    packet[34..54].copy_from_slice(&[
        0, 80, 0, 81, 0, 0, 0, 1, 0, 0, 0, 1, 0x50, 0x10, 1, 0, 0, 0, 0, 0,
    ]);
    packet
}

fn gso(kind: u8) -> [u8; 12] {
    // NEEDS_CSUM, headers of 54 bytes, segments of 1448, checksum at 34 + 16.
    [1, kind, 54, 0, 0xa8, 5, 34, 0, 16, 0, 0, 0]
}

#[test]
fn a_segmented_packet_reaches_the_host_whole() {
    let Some(mut card) = card(1, CSUM | HOST_TSO4) else {
        return;
    };
    let packet = tcp(9000);
    card.transmit(gso(1), &packet);
    let got = card.host_receives();
    assert_eq!(got.len(), packet.len());
    assert_eq!(got[54..], packet[54..]);
    card.finish();
}

#[test]
fn malformed_headers_are_dropped_and_the_queue_goes_on() {
    let Some(mut card) = card(1, CSUM | HOST_TSO4) else {
        return;
    };
    let packet = tcp(3000);
    let mut hostile = vec![
        (gso(4), packet.clone()),
        (gso(3), packet.clone()),
        (gso(5), packet.clone()),
        (gso(0x81), packet.clone()),
        (gso(2), packet.clone()),
        ([0; 12], vec![1; 13]),
        ([0; 12], vec![1; 66_000]),
    ];
    for (at, value) in [(0, 0), (3, 0xff), (7, 0xff), (9, 0xff)] {
        let mut header = gso(1);
        header[at] = value;
        hostile.push((header, packet.clone()));
    }
    let mut no_size = gso(1);
    no_size[4..6].copy_from_slice(&[0, 0]);
    hostile.push((no_size, packet.clone()));
    for (header, packet) in &hostile {
        card.transmit(*header, packet);
    }
    // Shorter than a header.
    let short = [Buffer::readable(TX, 11)];
    assert_eq!(card.queues[1].request(&card.front.memory, &short), 0);
    card.transmit([0; 12], &frame(60, 3));
    assert_eq!(
        card.host_receives(),
        frame(60, 3),
        "none of the others came through"
    );
    let log = card.finish();
    assert_eq!(
        log.matches("malformed header dropped").count(),
        hostile.len() + 1,
        "{log}"
    );
}

#[test]
fn packets_in_very_many_pieces_are_sent() {
    let Some(mut card) = card(1, device_host::test_frontend::INDIRECT_DESC) else {
        return;
    };
    let whole = frame(1000, 4);
    card.front.memory.write(TX, &[0; 12]);
    card.front.memory.write(TX + 12, &whole);
    let pieces: Vec<_> = (0..506).map(|i| Buffer::readable(TX + 2 * i, 2)).collect();
    let q = &mut card.queues[1];
    let head = q.indirect_chain(&card.front.memory, &pieces);
    q.offer(&card.front.memory, head);
    q.kick();
    q.wait_used(&card.front.memory);
    assert_eq!(card.host_receives(), whole);
    card.finish();
}

#[test]
fn receive_buffers_smaller_than_a_header_break_the_queue_only() {
    // Whether small frames are expected or larger ones.
    for before in [60, 4000] {
        let Some(mut card) = card(1, MRG_RXBUF) else {
            return;
        };
        card.host.write_all(&frame(before, 1)).unwrap();
        card.offer(0, &[5000]);
        card.queues[0].wait_used(&card.front.memory);
        card.offer(0, &[11]);
        card.queues[0].wait_broken();
        card.transmit([0; 12], &frame(60, 3));
        assert_eq!(card.host_receives(), frame(60, 3));
        card.finish();
    }
}

#[test]
fn buffers_of_a_broken_queue_are_not_given_back_after_a_reset() {
    let Some(mut card) = card(1, MRG_RXBUF) else {
        return;
    };
    // The frame takes both buffers and meets a head that is outside of the queue.
    card.offer(0, &[300, 300]);
    let q = &mut card.queues[0];
    q.offer(&card.front.memory, 99);
    q.kick();
    card.host.write_all(&frame(1400, 5)).unwrap();
    q.wait_broken();
    card.front.reset();
    card.front.memory.write(q.available(), &[0; 64]);
    card.front.memory.write(q.used(), &[0; 64]);
    card.queues[0] = DriverQueue::new(0, 16, 0);
    card.front.start(&card.queues[0]);
    card.offer(0, &[300; 5]);
    card.host.write_all(&frame(1400, 6)).unwrap();
    for want in [(0, 300), (1, 300), (2, 300), (3, 300), (4, 212)] {
        assert_eq!(card.queues[0].wait_used(&card.front.memory), want);
    }
    assert_eq!(card.queues[0].used_index(&card.front.memory), 5);
    card.finish();
}

#[test]
fn the_control_queue_sets_pairs_and_refuses_the_rest() {
    let Some(mut card) = card(2, MQ | CTRL_VQ | MRG_RXBUF) else {
        return;
    };
    let control = 0x30_0000;
    for (command, want) in [
        (&[4u8, 0, 2, 0][..], 0),
        (&[4, 0, 1, 0], 0),
        (&[4, 0, 0, 0], 1),
        (&[4, 0, 3, 0], 1),
        (&[4, 0, 2], 1),
        (&[0, 0, 1], 1),
        (&[1, 0, 0, 0, 0, 0], 1),
    ] {
        card.front.memory.write(control, command);
        card.front.memory.write(control + 100, &[9]);
        let buffers = [
            Buffer::readable(control, 1),
            Buffer::readable(control + 1, command.len() as u32 - 1),
            Buffer::writable(control + 100, 1),
        ];
        assert_eq!(card.queues[4].request(&card.front.memory, &buffers), 1);
        assert_eq!(
            card.front.memory.read(control + 100, 1),
            [want],
            "{command:?}"
        );
    }
    // One pair in use: whatever tap queue the kernel chooses, the frame arrives on the first.
    card.offer(0, &[1600; 8]);
    for mark in 1..=8u8 {
        let mut one = frame(100, mark);
        one[11] = mark; // another sender, another flow
        card.host.write_all(&one).unwrap();
        assert_eq!(card.queues[0].wait_used(&card.front.memory).1, 112);
    }
    card.finish();
}

#[test]
fn both_pairs_transmit() {
    let Some(mut card) = card(2, MQ | CTRL_VQ) else {
        return;
    };
    for queue in [1, 3] {
        let mark = queue as u8;
        card.front.memory.write(TX, &[0; 12]);
        card.front.memory.write(TX + 12, &frame(80, mark));
        let buffers = [Buffer::readable(TX, 92)];
        card.queues[queue].request(&card.front.memory, &buffers);
        assert_eq!(card.host_receives(), frame(80, mark));
    }
    card.finish();
}

#[test]
fn a_tap_that_goes_away_ends_the_process() {
    let Some(mut card) = card(1, 0) else { return };
    card.offer(0, &[1600; 4]);
    card.front.config(0, 6);
    let deleted = std::process::Command::new("ip")
        .args(["link", "del", "tap0"])
        .status();
    assert!(deleted.unwrap().success());
    // Its front end stays until it is over: that is not why it ends.
    let (status, log) = card.process.finish();
    assert_eq!(status.code(), Some(1), "{log}");
    assert!(
        log.contains("reading the tap, which is gone, failed"),
        "{log}"
    );
    drop(card.front);
}

#[test]
fn wrong_descriptors_are_refused_with_their_reason() {
    let spec = |pairs| spec(pairs, NetLimits::default());
    let null = || OwnedFd::from(File::open("/dev/null").unwrap());
    let run = |pairs, fds: Vec<OwnedFd>| {
        let (status, log) = DeviceProcess::start(BINARY, spec(pairs), fds).finish();
        assert_eq!(status.code(), Some(1), "{log}");
        log
    };
    assert!(run(2, vec![null()]).contains("2 queue pairs need as many tap descriptors, 1 came"));
    assert!(run(17, vec![]).contains("queues=17: 1 to 16"));
    assert!(run(1, vec![null()]).contains("TUNSETVNETHDRSZ on tap queue 0 failed"));
}

const OTHER: [u8; 6] = [2, 0, 0, 0, 0, 2];
const GROUP: [u8; 6] = [1, 0, 0x5e, 0, 0, 1];

#[test]
fn the_driver_gets_what_it_asks_for() {
    let Some(mut card) = card(1, CTRL_VQ | CTRL_RX | CTRL_VLAN | CTRL_MAC_ADDR) else {
        return;
    };
    let all = [MAC, OTHER, GROUP];
    assert_eq!(card.which_arrive(&all, None), all, "nothing was asked for");
    assert_eq!(card.command(&[0, 0, 0]), 0);
    assert_eq!(card.which_arrive(&all, None), [MAC]);
    assert_eq!(card.command(&[0, 1, 1]), 0);
    assert_eq!(card.which_arrive(&all, None), [MAC, GROUP]);
    assert_eq!(card.command(&[0, 1, 0]), 0);
    let mut tables = vec![1, 0, 0, 0, 0, 0, 1, 0, 0, 0];
    tables.extend(GROUP);
    assert_eq!(card.command(&tables), 0);
    assert_eq!(card.which_arrive(&all, None), [MAC, GROUP]);
    assert_eq!(card.command(&[&[1, 1][..], &OTHER].concat()), 0);
    assert_eq!(card.which_arrive(&all, None), [OTHER, GROUP]);
    assert_eq!(card.command(&[2, 0, 7, 0]), 0);
    assert_eq!(card.which_arrive(&all, Some(8)), [[0; 6]; 0]);
    assert_eq!(card.which_arrive(&all, Some(7)), [OTHER, GROUP]);
    assert_eq!(card.command(&[2, 1, 7, 0]), 0);
    assert_eq!(card.which_arrive(&all, Some(7)), [[0; 6]; 0]);
    assert_eq!(card.command(&[0, 0, 1]), 0);
    assert_eq!(card.which_arrive(&all, None), all);
    for wrong in [
        &[0, 0, 2][..],
        &[0, 2, 1],
        &[1, 0, 1, 0, 0, 0],
        &[1, 0, 0xff, 0xff, 0xff, 0xff, 0, 0, 0, 0],
        &[1, 1, 1, 2, 3, 4, 5],
        &[2, 0, 0, 0x10],
        &[3, 0],
        &[5, 0, 0, 0, 0, 0, 0, 0, 0, 0],
    ] {
        assert_eq!(card.command(wrong), 1, "{wrong:?}");
    }
    assert_eq!(card.command(&[0; 20_000]), 1, "longer than any command");
    assert_eq!(card.which_arrive(&all, None), all, "errors change nothing");
    card.finish();
}

#[test]
fn a_filter_sees_frames_that_lie_across_buffers_and_beyond_them() {
    let Some(mut card) = card(1, CTRL_VQ | CTRL_RX | MRG_RXBUF) else {
        return;
    };
    assert_eq!(card.command(&[0, 0, 0]), 0);
    // While frames are small they are looked at before there is a buffer; after a larger one, in buffers: the address begins in one
    // and ends in the next, or behind all of them.
    for (before, room) in [
        (60, vec![15, 300, 300]),
        (4000, vec![15, 300, 300]),
        (4000, vec![15]),
    ] {
        card.host.write_all(&frame(before, 1)).unwrap();
        card.offer(0, &[5000]);
        card.queues[0].wait_used(&card.front.memory);
        let mut unwanted = frame(600, 1);
        unwanted[..6].copy_from_slice(&[2, 0, 0, 0, 0, 0x77]);
        card.host.write_all(&unwanted).unwrap();
        card.host.write_all(&frame(600, 2)).unwrap();
        card.offer(0, &room);
        if room.len() == 1 {
            // Both were looked at behind the only buffer, of which the second one needs more.
            card.front.config(0, 6);
            let at = RX + 15;
            let queue = &mut card.queues[0];
            let head = queue.chain(&card.front.memory, &[Buffer::writable(at, 700)]);
            queue.offer(&card.front.memory, head);
            queue.kick();
        }
        let mut got = Vec::new();
        let mut len = 0;
        while len < 612 {
            len += card.queues[0].wait_used(&card.front.memory).1;
            got = card.front.memory.read(RX, len as usize);
        }
        assert_eq!(got[12..], frame(600, 2), "after {before} bytes");
    }
    card.finish();
}

#[test]
fn the_driver_chooses_offloads_among_those_negotiated() {
    let features = CTRL_VQ | CTRL_GUEST_OFFLOADS | GUEST_CSUM | GUEST_TSO4;
    let Some(mut card) = card(1, features) else {
        return;
    };
    let set = |bits: u64| [&[5, 0][..], &bits.to_le_bytes()].concat();
    assert_eq!(card.command(&set(GUEST_CSUM | GUEST_TSO4)), 0);
    assert_eq!(card.command(&set(0)), 0);
    assert_eq!(card.command(&set(GUEST_CSUM)), 0);
    assert_eq!(card.command(&set(GUEST_CSUM | 1 << 8)), 1, "TSO6 was not");
    assert_eq!(card.command(&set(u64::MAX)), 1);
    // What the kernel was told shows in the tap's features.
    let tso = |want: &str| {
        let out = std::process::Command::new("ip")
            .args(["-d", "link", "show", "tap0"])
            .output();
        let text = String::from_utf8(out.unwrap().stdout).unwrap();
        assert!(text.contains(want), "{text}");
    };
    tso("tap0");
    card.finish();
}

#[test]
fn what_the_driver_told_outlives_the_process() {
    let features = CTRL_VQ | CTRL_RX | MQ | MRG_RXBUF;
    let Some(mut card) = card(2, features) else {
        return;
    };
    assert_eq!(card.command(&[4, 0, 2, 0]), 0);
    assert_eq!(card.command(&[0, 0, 0]), 0);
    let mut card = card.reborn();
    // Frames of many flows come by both queues of the tap, and so on both queues of the card.
    for queue in [0, 2] {
        let at = RX + queue as u64 * 0x1_0000;
        for slot in 0..8u64 {
            let q = &mut card.queues[queue];
            let head = q.chain(
                &card.front.memory,
                &[Buffer::writable(at + slot * 1600, 1600)],
            );
            q.offer(&card.front.memory, head);
        }
        card.queues[queue].kick();
    }
    let mut seen = [false; 3];
    for flow in 0..=255u8 {
        for to in [OTHER, MAC] {
            let mut one = frame(100, flow);
            one[..6].copy_from_slice(&to);
            // Addresses of IPv4 make the flow.
            one[12..14].copy_from_slice(&[8, 0]);
            one[14] = 0x45;
            one[26..34].copy_from_slice(&[10, 0, 0, flow, 10, 0, 1, flow]);
            card.host.write_all(&one).unwrap();
        }
        let memory = &card.front.memory;
        let (queue, head) = loop {
            let found = [0, 2].into_iter().find_map(|queue| {
                let (head, len) = card.queues[queue].try_used(memory)?;
                assert_eq!(len, 112);
                Some((queue, head))
            });
            match found {
                Some(found) => break found,
                None => std::thread::yield_now(),
            }
        };
        let at = RX + queue as u64 * 0x1_0000 + u64::from(head % 8) * 1600;
        assert_eq!(memory.read(at + 12, 6), MAC, "the filter was told once");
        seen[queue] = true;
        if seen == [true, false, true] {
            card.finish();
            return;
        }
        let q = &mut card.queues[queue];
        q.offer(&card.front.memory, head);
        q.kick();
    }
    panic!("one queue gets nothing: {seen:?}");
}

#[test]
fn while_the_link_is_down_nothing_passes() {
    let Some(mut card) = card(1, 0) else { return };
    let set = |card: &mut Card, offset, data: &[u8], flags| {
        card.front.vhost.set_config(offset, flags, data).unwrap();
        card.front.config(6, 2)
    };
    let host = VhostUserConfigFlags::LIVE_MIGRATION;
    let driver = VhostUserConfigFlags::empty();
    assert_eq!(
        set(&mut card, 6, &[0, 0], driver),
        [1, 0],
        "not the driver's"
    );
    assert_eq!(set(&mut card, 0, &[9, 9], host), [1, 0]);
    assert_eq!(card.front.config(0, 6), MAC);
    card.offer(0, &[1600; 2]);
    assert_eq!(set(&mut card, 6, &[0, 0], host), [0, 0]);
    card.host.write_all(&frame(100, 1)).unwrap();
    card.transmit([0; 12], &frame(100, 2));
    // The messages are answered one after the other, with a look at the tap in between if there were one.
    card.front.config(6, 2);
    assert_eq!(card.queues[0].used_index(&card.front.memory), 0);
    assert_eq!(set(&mut card, 6, &[1, 0], host), [1, 0]);
    card.host.write_all(&frame(100, 3)).unwrap();
    card.transmit([0; 12], &frame(100, 4));
    assert_eq!(card.queues[0].wait_used(&card.front.memory).1, 112);
    let got = card.front.memory.read(RX + 12, 100);
    assert_eq!(got, frame(100, 3), "what came meanwhile is gone");
    // The packet socket hears what it sends itself, too.
    let mut heard = Vec::new();
    while heard.last() != Some(&4) {
        heard.push(card.host_receives()[20]);
    }
    assert!(!heard.contains(&2), "{heard:?}");
    card.finish();
}

#[test]
fn the_network_learns_where_the_guest_is() {
    let status = |card: &mut Card, status: u8| {
        let host = VhostUserConfigFlags::LIVE_MIGRATION;
        card.front.vhost.set_config(6, host, &[status, 0]).unwrap();
        card.front.config(6, 2)
    };
    // A driver that announces itself is asked to, until it says that it has seen it.
    let Some(mut able) = card(1, CTRL_VQ | GUEST_ANNOUNCE) else {
        return;
    };
    assert_eq!(status(&mut able, 3), [3, 0]);
    assert_eq!(able.command(&[3, 1]), 1, "no such command");
    assert_eq!(able.front.config(6, 2), [3, 0]);
    assert_eq!(able.command(&[3, 0]), 0);
    assert_eq!(able.front.config(6, 2), [1, 0]);
    able.finish();
    // For one that cannot, a frame is sent, if there is a link.
    let mut other = card(1, 0).unwrap();
    assert_eq!(status(&mut other, 2), [0, 0]);
    assert_eq!(status(&mut other, 1), [1, 0]);
    other.transmit([0; 12], &frame(100, 1));
    assert_eq!(status(&mut other, 3), [1, 0]);
    other.transmit([0; 12], &frame(100, 2));
    let mut types = Vec::new();
    loop {
        wait_readable(&other.host, "a frame");
        let mut seen = [0; 200];
        let len = other.host.read(&mut seen).unwrap();
        if seen[12..14] == [0x80, 0x35] {
            let mut want = [0; 60];
            want[..6].fill(0xff);
            want[6..12].copy_from_slice(&MAC);
            want[12..22].copy_from_slice(&[0x80, 0x35, 0, 1, 8, 0, 6, 4, 0, 3]);
            want[22..28].copy_from_slice(&MAC);
            want[32..38].copy_from_slice(&MAC);
            assert_eq!(seen[..len], want);
            types.push(0);
        } else if seen[12..14] == [0x88, 0xb5] {
            types.push(seen[20]);
            if seen[20] == 2 {
                break;
            }
        }
    }
    assert_eq!(types, [1, 0, 2]);
    other.finish();
}

/// Frames that pass in `time`, with packets of `len` bytes.
fn rate(limits: NetLimits, len: usize, time: Duration, receive: bool) -> Option<f64> {
    let mut card = limited_card(1, 0, limits)?;
    let start = Instant::now();
    let mut count = 0;
    while start.elapsed() < time {
        if receive {
            card.host.write_all(&frame(len, 1)).unwrap();
            card.offer(0, &[1600]);
            card.queues[0].wait_used(&card.front.memory);
        } else {
            card.transmit([0; 12], &frame(len, 1));
        }
        count += 1;
    }
    // Whoever looks late sees more time, and as many packets more.
    let rate = f64::from(count) / start.elapsed().as_secs_f64();
    card.finish();
    Some(rate)
}

#[test]
fn limits_hold_in_both_directions_and_for_both_units() {
    let none = Limit::default();
    let packets = Limit {
        packets: Bucket {
            rate: 500,
            burst: 1,
        },
        bytes: Bucket::default(),
    };
    let bytes = Limit {
        packets: Bucket::default(),
        bytes: Bucket {
            rate: 500_000,
            burst: 1000,
        },
    };
    for limit in [packets, bytes] {
        for receive in [false, true] {
            let (rx, tx) = if receive {
                (limit, none)
            } else {
                (none, limit)
            };
            let limits = NetLimits { rx, tx };
            let Some(got) = rate(limits, 1000, Duration::from_secs(1), receive) else {
                return;
            };
            // Never more, but for the burst and one packet that is under way; less only as far as this machine is late.
            assert!(got <= 505.0, "{got} a second ({limits:?})");
            assert!(got > 100.0, "{got} a second ({limits:?})");
            // The other direction is free.
            let other = rate(limits, 1000, Duration::from_millis(200), !receive).unwrap();
            assert!(other > 600.0, "{other} a second ({limits:?})");
        }
    }
}
