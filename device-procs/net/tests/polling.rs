//! How long a card stays awake for the next packet, as a live process with its filter on: `poll-us`.
//!
//! **Job.** Packets that follow each other find the card awake, in both directions, and the driver need not kick; a card with nothing to
//! do, or with little, sleeps. **Who is not trusted.** The machine: somebody else's turn on a processor ends looking for a while, so
//! that cards are started until one had an undisturbed row of packets.
//! **Why this way.** The kernel counts each time that a process goes to sleep, and what it uses of a processor.

#![allow(clippy::unwrap_used)] // in a test, a panic is the report

use std::fs::File;
use std::io::Write;
use std::os::fd::AsFd;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use device_host::test_frontend::tap::Tap;
use device_host::test_frontend::{
    Buffer, DeviceProcess, DriverQueue, EVENT_IDX, GuestMemory, TestFrontend,
};
use ipc::spec::DeviceSpec;
use ipc::spec::net::NetSpec;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use tests::procfs::{Status, processor_time};

const BINARY: &str = env!("CARGO_BIN_EXE_net");
const DATA: u64 = 0x10_0000;
const LEN: u32 = 12 + 60;
/// From one packet to the next, in turns: a look that finds no packet before it is over is too short for the second or wakes late for the
/// first. The second is enough for a card that does not look to be asleep, and less than the longest look.
const APART: [Duration; 2] = [Duration::from_micros(40), Duration::from_micros(120)];
/// A packet that is seen while it is looked for takes less; one that is seen when a look in vain is over takes more.
const PROMPT: Duration = Duration::from_micros(50);
/// So many packets in a row that found the card awake are no accident.
const ROW: usize = 16;
/// Packets after which a card that was interrupted is given up: it will not look again for seconds.
const TRIES: usize = 100;
/// How long a machine may be too busy for one undisturbed row.
const LIMIT: Duration = Duration::from_secs(60);
/// Receive buffers that the driver has offered, so that nothing of its queue tells of a packet.
const AHEAD: usize = 8;

fn spec(poll_us: u32, vhost: bool) -> DeviceSpec {
    DeviceSpec::Net(NetSpec {
        id: "net0".into(),
        mac: [2, 0, 0, 0, 0, 1],
        queue_pairs: 1,
        queue_size: 256,
        control_queue: true,
        vhost,
        limits: Default::default(),
        poll_us,
        stands_in: None,
    })
}

#[derive(Debug, Clone, Copy)]
enum Way {
    ToTheTap,
    ToTheGuest,
}

struct Card {
    process: DeviceProcess,
    front: TestFrontend,
    receive: Queue,
    transmit: Queue,
    host: File,
}

struct Queue {
    queue: DriverQueue,
    offered: u16,
}

impl Queue {
    fn new(index: usize) -> Self {
        Self {
            queue: DriverQueue::new(index, 16, 0x2_0000 * index as u64),
            offered: 0,
        }
    }

    /// Whether the card had to be kicked (virtio 1.3, 2.7.10).
    fn offer(&mut self, memory: &GuestMemory, buffer: Buffer) -> bool {
        let head = self.queue.chain(memory, &[buffer]);
        self.queue.offer(memory, head);
        let wanted = self.queue.avail_event(memory) == self.offered;
        self.offered = self.offered.wrapping_add(1);
        if wanted {
            self.queue.kick();
        }
        wanted
    }
}

/// The machine's other work waits, where that may be asked for; where not, it disturbs.
fn keep_others_out(thread: i32) {
    let mut chrt = Command::new("chrt");
    chrt.args(["--rr", "--pid", "1", &thread.to_string()]);
    let _ = chrt.stderr(Stdio::null()).status();
}

fn card(poll_us: u32) -> Option<Card> {
    let Tap { queues, host } = Tap::in_new_namespace(1, false)?;
    let mut process = DeviceProcess::start(BINARY, spec(poll_us, false), queues);
    let mut front = TestFrontend::connect(process.socket(), EVENT_IDX);
    let (mut receive, transmit) = (Queue::new(0), Queue::new(1));
    front.start(&receive.queue);
    front.start(&transmit.queue);
    for _ in 0..AHEAD {
        receive.offer(&front.memory, Buffer::writable(DATA, LEN));
    }
    let ids = [process.id().cast_signed(), nix::unistd::gettid().as_raw()];
    ids.into_iter().for_each(keep_others_out);
    Some(Card {
        process,
        front,
        receive,
        transmit,
        host,
    })
}

impl Card {
    fn pid(&self) -> i32 {
        self.process.id().cast_signed()
    }

    fn sleeps(&self) -> u64 {
        let status = Status::of(self.pid()).unwrap();
        status.field("voluntary_ctxt_switches").parse().unwrap()
    }

    /// One packet; whether the card had to be kicked for it.
    fn packet(&mut self, way: Way) -> bool {
        let memory = &self.front.memory;
        let (kicked, queue) = match way {
            Way::ToTheTap => {
                let kicked = self.transmit.offer(memory, Buffer::readable(DATA, LEN));
                (kicked, &mut self.transmit)
            }
            Way::ToTheGuest => {
                self.host.write_all(&[0; 60]).unwrap();
                (false, &mut self.receive)
            }
        };
        let start = Instant::now();
        while queue.queue.try_used(memory).is_none() {
            assert!(start.elapsed() < LIMIT, "the packet is not there");
            std::hint::spin_loop();
        }
        match way {
            Way::ToTheTap => kicked,
            Way::ToTheGuest => self.receive.offer(memory, Buffer::writable(DATA, LEN)),
        }
    }

    /// Sends so many packets one after the other, or until [`ROW`] in a row found the card awake; whether they did.
    fn is_awake(&mut self, way: Way, packets: usize) -> bool {
        let (mut row, mut slept) = (0, self.sleeps());
        for number in 0..packets {
            let start = Instant::now();
            let kicked = self.packet(way);
            let late = start.elapsed() > PROMPT;
            let sleeps = self.sleeps();
            row = if kicked || late || sleeps != slept {
                0
            } else {
                row + 1
            };
            slept = sleeps;
            if row == ROW {
                return true;
            }
            while start.elapsed() < APART[number % 2] {
                std::hint::spin_loop();
            }
        }
        false
    }

    fn finish(self) {
        drop(self.front);
        self.process.finish_well();
    }
}

/// Time in which nothing comes.
fn pause(card: &Card, time: Duration) {
    let mut none = [PollFd::new(card.host.as_fd(), PollFlags::empty())];
    let time = PollTimeout::try_from(time).unwrap();
    assert_eq!(poll(&mut none, time).unwrap(), 0);
}

#[test]
fn packets_that_follow_each_other_find_a_card_awake_that_looks_for_them() {
    for way in [Way::ToTheTap, Way::ToTheGuest] {
        let start = Instant::now();
        loop {
            let Some(mut card) = card(200) else { return };
            let awake = card.is_awake(way, TRIES);
            card.finish();
            if awake {
                break;
            }
            assert!(
                start.elapsed() < LIMIT,
                "{way:?}: no {ROW} packets in a row without a sleep, a kick or a wait"
            );
        }
        // As opposed to one that is told not to look.
        let Some(mut card) = card(0) else { return };
        assert!(!card.is_awake(way, 10 * TRIES), "{way:?}");
        card.finish();
    }
}

#[test]
fn a_card_with_little_to_do_sleeps() {
    const PACKETS: u32 = 100;
    let Some(mut card) = card(200) else { return };
    let spent = |card: &Card| processor_time(card.pid()).unwrap();
    // It has had reason to look for long.
    for way in [Way::ToTheTap, Way::ToTheGuest] {
        card.is_awake(way, TRIES);
    }
    // A message is answered, and then there is nothing to do.
    card.front.config(0, 6);
    let before = spent(&card);
    pause(&card, Duration::from_millis(300));
    let idle = spent(&card) - before;
    assert!(
        idle < Duration::from_millis(3),
        "{idle:?} in 300 ms without a packet"
    );
    // Packets so far apart that no look would find the next one.
    let before = spent(&card);
    for _ in 0..PACKETS {
        card.packet(Way::ToTheGuest);
        pause(&card, Duration::from_millis(2));
    }
    let each = (spent(&card) - before) / PACKETS;
    assert!(
        each < Duration::from_micros(150),
        "{each:?} for a packet, which is as if each was looked for"
    );
    card.finish();
}

#[test]
fn times_that_are_not_allowed_are_refused() {
    for (poll_us, vhost) in [(201, false), (20, true)] {
        let spec = spec(poll_us, vhost);
        let (status, log) = DeviceProcess::start(BINARY, spec, Vec::new()).finish();
        assert_eq!(status.code(), Some(1), "{log}");
        let message = format!("poll-us={poll_us}: 0 to 200, with vhost=on 0 is allowed");
        assert!(log.contains(&message), "{log}");
    }
}
