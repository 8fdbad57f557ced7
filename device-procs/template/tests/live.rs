//! The harness, by its smallest device, as a live process with its filter on.

#![allow(clippy::unwrap_used)] // in a test, a panic is the report

use std::os::fd::OwnedFd;
use std::os::unix::process::ExitStatusExt;

use device_host::test_frontend::{
    BASE_FEATURES, Buffer, DeviceProcess, DriverQueue, EVENT_IDX, INDIRECT, INDIRECT_DESC, NEXT,
    REGIONS, TestFrontend, WRITE, start_message,
};
use ipc::limits::MAX_CHAIN_SEGMENTS;
use ipc::spec::DeviceSpec;
use ipc::spec::template::TemplateSpec;
use ipc::start::SandboxMode;

const BINARY: &str = env!("CARGO_BIN_EXE_template");
const IN: u64 = 0x10_0000;
const OUT: u64 = 0x20_0000;

fn spec() -> DeviceSpec {
    DeviceSpec::Template(TemplateSpec {
        id: "t0".into(),
        greeting: *b"ahoy",
    })
}

struct Bench {
    process: DeviceProcess,
    front: TestFrontend,
    queue: DriverQueue,
}

fn bench(features: u64) -> Bench {
    let mut process = DeviceProcess::start(BINARY, spec(), Vec::new());
    let mut front = TestFrontend::connect(process.socket(), features);
    let queue = DriverQueue::new(0, 16, 0);
    front.start(&queue);
    Bench {
        process,
        front,
        queue,
    }
}

impl Bench {
    fn echo(&mut self, text: &[u8]) {
        self.front.memory.write(IN, text);
        self.front.memory.write(OUT, &vec![0; text.len()]);
        let len = text.len() as u32;
        let buffers = [Buffer::readable(IN, len), Buffer::writable(OUT, len)];
        assert_eq!(self.queue.request(&self.front.memory, &buffers), len);
        assert_eq!(self.front.memory.read(OUT, text.len()), text);
    }

    fn finish(self) -> String {
        drop(self.front);
        self.process.finish_well()
    }

    /// The queue must break, the process must live and serve again after a reset.
    fn must_break(mut self, why: &str) {
        self.queue.kick();
        self.queue.wait_broken();
        assert_eq!(self.queue.used_index(&self.front.memory), 0);
        self.front
            .vhost
            .reset_device_and_negotiate(self.front.accepted);
        self.front.memory.write(0, &vec![0; 0x2_0000]);
        self.queue = DriverQueue::new(0, self.queue.size, 0);
        self.front.start(&self.queue);
        self.echo(b"as new");
        let log = self.finish();
        assert!(log.contains(why), "{log}");
    }
}

trait Renegotiate {
    fn reset_device_and_negotiate(&mut self, features: u64);
}

impl Renegotiate for vhost::vhost_user::Frontend {
    fn reset_device_and_negotiate(&mut self, features: u64) {
        use vhost::VhostBackend;
        use vhost::vhost_user::VhostUserFrontend;
        self.reset_device().unwrap();
        self.set_features(features).unwrap();
    }
}

#[test]
fn configuration_space_answers_the_greeting_and_zeros() {
    let mut bench = bench(0);
    assert_eq!(bench.front.config(0, 8), b"ahoy\0\0\0\0");
    assert_eq!(bench.front.config(2, 1), b"o");
    assert_eq!(bench.front.config(200, 56), [0; 56]);
    bench.finish();
}

#[test]
fn requests_are_echoed_many_times_round_the_ring() {
    let mut bench = bench(0);
    for round in 0..100u32 {
        bench.echo(format!("round {round}").as_bytes());
    }
    bench.finish();
}

#[test]
fn buffers_may_be_split_and_cross_nothing() {
    let mut bench = bench(0);
    bench.front.memory.write(IN, b"abcdef");
    let len = bench.queue.request(
        &bench.front.memory,
        &[
            Buffer::readable(IN, 1),
            Buffer::readable(IN + 1, 0),
            Buffer::readable(IN + 1, 5),
            Buffer::writable(OUT, 2),
            Buffer::writable(OUT + 100, 10),
        ],
    );
    assert_eq!(len, 6);
    assert_eq!(bench.front.memory.read(OUT, 2), b"ab");
    assert_eq!(bench.front.memory.read(OUT + 100, 5), b"cdef\0");
    bench.finish();
}

#[test]
fn more_than_the_cap_is_cut_and_nothing_is_nothing() {
    let mut bench = bench(0);
    let long = [Buffer::readable(IN, 8192), Buffer::writable(OUT, 8192)];
    assert_eq!(bench.queue.request(&bench.front.memory, &long), 4096);
    let none = [Buffer::readable(IN, 8192)];
    assert_eq!(bench.queue.request(&bench.front.memory, &none), 0);
    bench.finish();
}

#[test]
fn indirect_tables_are_followed() {
    let mut bench = bench(INDIRECT_DESC);
    bench.front.memory.write(IN, b"via table");
    let buffers = [Buffer::readable(IN, 9), Buffer::writable(OUT, 9)];
    let head = bench.queue.indirect_chain(&bench.front.memory, &buffers);
    bench.queue.offer(&bench.front.memory, head);
    bench.queue.kick();
    assert_eq!(bench.queue.wait_used(&bench.front.memory), (head, 9));
    assert_eq!(bench.front.memory.read(OUT, 9), b"via table");
    bench.finish();
}

#[test]
fn event_index_suppresses_interrupts_and_asks_for_kicks() {
    let mut bench = bench(EVENT_IDX);
    let memory = &bench.front.memory;
    // The driver wants to hear of the third completion only.
    bench.queue.set_used_event(memory, 2);
    for _ in 0..3 {
        let head = bench.queue.chain(memory, &[Buffer::writable(OUT, 1)]);
        bench.queue.offer(memory, head);
    }
    bench.queue.kick();
    for _ in 0..3 {
        bench.queue.wait_used(memory);
    }
    // The device has seen the ring empty, so its wish is the next entry.
    bench.queue.set_used_event(memory, 3);
    bench.echo(b"one more");
    let memory = &bench.front.memory;
    while bench.queue.avail_event(memory) != 4 {
        std::thread::yield_now();
    }
    bench.finish();
}

#[test]
fn a_driver_that_wants_no_interrupt_gets_none() {
    let mut bench = bench(0);
    let memory = &bench.front.memory;
    bench.queue.set_available_flags(memory, 1);
    let head = bench.queue.chain(memory, &[Buffer::writable(OUT, 1)]);
    bench.queue.offer(memory, head);
    bench.queue.kick();
    while bench.queue.try_used(memory).is_none() {
        std::thread::yield_now();
    }
    // A message is answered after the turn is over.
    bench.front.config(0, 4);
    assert_eq!(bench.queue.interrupts(), 0);
    bench.queue.set_available_flags(&bench.front.memory, 0);
    bench.echo(b"loud");
    bench.finish();
}

#[test]
fn a_queue_stops_and_goes_on_where_it_was() {
    let mut bench = bench(0);
    bench.echo(b"one");
    bench.echo(b"two");
    assert_eq!(bench.front.stop(&bench.queue), 2);
    // Kicked while stopped: nothing happens.
    let head = bench.queue.chain(
        &bench.front.memory,
        &[Buffer::readable(IN, 3), Buffer::writable(OUT, 3)],
    );
    bench.queue.offer(&bench.front.memory, head);
    bench.queue.kick();
    bench.front.config(0, 4);
    assert_eq!(bench.queue.used_index(&bench.front.memory), 2);
    // Started again: what is there is served without another kick.
    bench.front.start_at(&bench.queue, 2);
    assert_eq!(bench.queue.wait_used(&bench.front.memory), (head, 3));
    bench.finish();
}

#[test]
fn a_fresh_process_finishes_what_a_killed_one_left() {
    // A queue whose in-flight region says that head 2 was taken before head 0 when the process died.
    let mut first = DeviceProcess::start(BINARY, spec(), Vec::new());
    let mut front = TestFrontend::connect(first.socket(), 0);
    let mut queue = DriverQueue::new(0, 16, 0);
    let (region, file) = front.track_inflight(1, 16);
    front.start(&queue);
    for text in [b"aa", b"bb"] {
        front.memory.write(IN, text);
        let buffers = [Buffer::readable(IN, 2), Buffer::writable(OUT, 2)];
        assert_eq!(queue.request(&front.memory, &buffers), 2);
    }
    first.kill();
    first.finish();

    // Two more are offered and, as the region tells, were taken: 6 first, then 4.
    for (at, text) in [(0u64, b"cc"), (1, b"dd")] {
        front.memory.write(IN + at * 16, text);
        let buffers = [
            Buffer::readable(IN + at * 16, 2),
            Buffer::writable(OUT + at * 16, 2),
        ];
        let head = queue.chain(&front.memory, &buffers);
        assert_eq!(u64::from(head), 4 + 2 * at);
        queue.offer(&front.memory, head);
        let mut entry = [0u8; 16];
        entry[0] = 1;
        entry[8..].copy_from_slice(&(100 - at).to_le_bytes());
        let place = 16 + u64::from(head) * 16;
        std::os::unix::fs::FileExt::write_all_at(&file, &entry, place).unwrap();
    }

    let mut second = DeviceProcess::start(BINARY, spec(), Vec::new());
    let memory = front.memory;
    let mut front = TestFrontend::connect_with(second.socket(), 0, memory);
    front.use_inflight(&region, &file);
    // The front end does not know better than 0; the region does.
    front.start_at(&queue, 0);
    assert_eq!(queue.wait_used(&front.memory), (6, 2));
    assert_eq!(queue.wait_used(&front.memory), (4, 2));
    assert_eq!(front.memory.read(OUT, 2), b"cc");
    assert_eq!(front.memory.read(OUT + 16, 2), b"dd");
    front.memory.write(IN, b"ee");
    let buffers = [Buffer::readable(IN, 2), Buffer::writable(OUT, 2)];
    assert_eq!(queue.request(&front.memory, &buffers), 2);
    assert_eq!(queue.used_index(&front.memory), 5, "each once");
    drop(front);
    second.finish_well();
}

#[test]
fn looping_chains_break_the_queue_only() {
    let mut bench = bench(0);
    let (m, q) = (&bench.front.memory, &mut bench.queue);
    DriverQueue::describe(m, q.table, 0, (IN, 1, NEXT, 1));
    DriverQueue::describe(m, q.table, 1, (IN, 1, NEXT, 0));
    q.offer(m, 0);
    bench.must_break("loop");
}

#[test]
fn wrong_indices_break_the_queue_only() {
    let mut bench1 = bench(0);
    bench1.queue.offer(&bench1.front.memory, 16);
    bench1.must_break("descriptor index 16 is outside of a table of 16");

    let mut bench2 = bench(0);
    let (m, q) = (&bench2.front.memory, &mut bench2.queue);
    DriverQueue::describe(m, q.table, 0, (IN, 1, NEXT, 999));
    q.offer(m, 0);
    bench2.must_break("descriptor index 999");

    let mut bench3 = bench(0);
    bench3.queue.set_available_index(&bench3.front.memory, 17);
    bench3.must_break("available index 17");
}

#[test]
fn buffers_outside_of_memory_break_the_queue_only() {
    let hole = REGIONS[0].1 as u64;
    for (address, len) in [
        (hole, 1),
        (hole - 1, 2),
        (u64::MAX, 1),
        (0, u32::MAX),
        (u64::MAX - 1, u32::MAX),
    ] {
        let mut bench = bench(0);
        let (m, q) = (&bench.front.memory, &mut bench.queue);
        DriverQueue::describe(m, q.table, 0, (address, len, WRITE, 0));
        q.offer(m, 0);
        bench.must_break("outside of guest memory");
    }
}

#[test]
fn wrong_order_and_wrong_tables_break_the_queue_only() {
    let mut order = bench(0);
    let (m, q) = (&order.front.memory, &mut order.queue);
    DriverQueue::describe(m, q.table, 0, (OUT, 1, WRITE | NEXT, 1));
    DriverQueue::describe(m, q.table, 1, (IN, 1, 0, 0));
    q.offer(m, 0);
    order.must_break("readable descriptor after a writable one");

    // (features, address of table, its length, flags)
    for (features, len, flags) in [
        (0, 16, INDIRECT),
        (INDIRECT_DESC, 0, INDIRECT),
        (INDIRECT_DESC, 17, INDIRECT),
        (INDIRECT_DESC, 16, INDIRECT | NEXT),
    ] {
        let mut bench = bench(features);
        let (m, q) = (&bench.front.memory, &mut bench.queue);
        DriverQueue::describe(m, q.indirect_table, 0, (IN, 1, 0, 0));
        DriverQueue::describe(m, q.table, 0, (q.indirect_table, len, flags, 1));
        q.offer(m, 0);
        bench.must_break("malformed indirect");
    }

    let mut nested = bench(INDIRECT_DESC);
    let (m, q) = (&nested.front.memory, &mut nested.queue);
    DriverQueue::describe(m, q.indirect_table, 0, (q.indirect_table, 16, INDIRECT, 0));
    DriverQueue::describe(m, q.table, 0, (q.indirect_table, 16, INDIRECT, 0));
    q.offer(m, 0);
    nested.must_break("malformed indirect");
}

#[test]
fn chains_with_too_many_pieces_break_the_queue_only() {
    let mut bench = bench(INDIRECT_DESC);
    let buffers = vec![Buffer::readable(IN, 1); MAX_CHAIN_SEGMENTS + 1];
    let head = bench.queue.indirect_chain(&bench.front.memory, &buffers);
    bench.queue.offer(&bench.front.memory, head);
    bench.must_break("pieces");
}

#[test]
fn queues_outside_of_memory_are_broken_from_the_start() {
    use vhost::VhostBackend;
    let mut process = DeviceProcess::start(BINARY, spec(), Vec::new());
    let mut front = TestFrontend::connect(process.socket(), 0);
    // The used ring reaches into the hole between the regions; the addresses are the guest's choice.
    let queue = DriverQueue::new(0, 256, REGIONS[0].1 as u64 - 256 * 16 - 1024);
    front.start(&queue);
    queue.wait_broken();
    front.vhost.get_vring_base(0).unwrap();
    drop(front);
    let log = process.finish_well();
    assert!(log.contains("queue addresses"), "{log}");
}

#[test]
fn a_lying_front_end_ends_its_connection_with_a_line() {
    use vhost::VhostBackend;
    use vhost::vhost_user::VhostUserFrontend;
    type Lie = fn(&mut TestFrontend);
    let lies: [(&str, Lie); 6] = [
        ("SET_VRING_NUM", |f| {
            let _ = f.vhost.set_vring_num(0, 100);
        }),
        ("SET_VRING_NUM for queue 1, of 1", |f| {
            let _ = f.vhost.set_vring_num(1, 16);
        }),
        ("SET_FEATURES", |f| {
            let _ = f.vhost.set_features(BASE_FEATURES | 1 << 50);
        }),
        ("GET_INFLIGHT_FD", |f| {
            let wanted = vhost::vhost_user::message::VhostUserInflight::new(0, 0, 2, 16);
            let _ = f.vhost.get_inflight_fd(&wanted);
        }),
        ("SET_MEM_TABLE: memory region needs", |f| {
            let mut regions = f.memory.regions();
            regions[1].mmap_offset = 4096;
            let _ = f.vhost.set_mem_table(&regions);
        }),
        ("REM_MEM_REG", |f| {
            let mut region = f.memory.regions()[0];
            region.guest_phys_addr = 1 << 40;
            let _ = f.vhost.remove_mem_region(&region);
        }),
    ];
    for (name, lie) in lies {
        let mut process = DeviceProcess::start(BINARY, spec(), Vec::new());
        let mut front = TestFrontend::connect(process.socket(), 0);
        lie(&mut front);
        drop(front);
        let (status, log) = process.finish();
        assert_eq!(status.code(), Some(1), "{name}: {log}");
        assert!(log.contains(name), "{name}: {log}");
    }
}

#[test]
fn memory_slots_come_and_go() {
    use vhost::vhost_user::VhostUserFrontend;
    let mut bench = bench(0);
    assert!(bench.front.vhost.get_max_mem_slots().unwrap() >= 8);
    let second = bench.front.memory.regions()[1];
    bench.front.vhost.remove_mem_region(&second).unwrap();
    bench.echo(b"first region");
    bench.front.vhost.add_mem_region(&second).unwrap();
    let (m, q) = (&bench.front.memory, &mut bench.queue);
    m.write(REGIONS[1].0, b"second");
    assert_eq!(
        q.request(
            m,
            &[Buffer::readable(REGIONS[1].0, 6), Buffer::writable(OUT, 6)]
        ),
        6
    );
    assert_eq!(m.read(OUT, 6), b"second");
    bench.finish();
}

#[test]
fn wrong_starts_are_refused() {
    let run = |message, backends| {
        let (status, log) = DeviceProcess::start_with(BINARY, &message, backends).finish();
        assert_eq!(status.code(), Some(1), "{log}");
        log
    };
    let mut message = start_message(spec(), 0);
    message.version += 1;
    assert!(run(message, Vec::new()).contains("protocol version"));

    let pipe = || OwnedFd::from(std::io::pipe().unwrap().0);
    let log = run(start_message(spec(), 1), Vec::new());
    assert!(log.contains("descriptor 5 does not fit"), "{log}");
    let log = run(start_message(spec(), 0), vec![pipe()]);
    assert!(log.contains("descriptor 5 does not fit"), "{log}");
    let log = run(start_message(spec(), 1), vec![pipe()]);
    assert!(log.contains("1 back-end descriptors are not used"), "{log}");
    let log = run(start_message(spec(), 1000), Vec::new());
    assert!(log.contains("at most"), "{log}");

    let block = DeviceSpec::Block(ipc::spec::block::BlockSpec {
        id: "d".into(),
        readonly: false,
        direct: false,
        serial: String::new(),
        num_queues: 1,
        queue_size: 16,
        io: Default::default(),
    });
    let log = run(start_message(block, 0), Vec::new());
    assert!(log.contains("is for block, this is template"), "{log}");
}

#[test]
fn a_process_that_is_not_confined_refuses_to_serve() {
    if !nix::unistd::geteuid().is_root() {
        eprintln!("skipped: only root has rights that could be left over");
        return;
    }
    let (status, log) = DeviceProcess::start_unconfined(BINARY, spec()).finish();
    assert_eq!(status.code(), Some(1), "{log}");
    assert!(log.contains("this process is not in a jail"), "{log}");

    // What a host may lack is a warning otherwise, and an end in strict mode.
    let mut message = start_message(spec(), 0);
    message.sandbox = SandboxMode::Strict;
    let (status, log) = DeviceProcess::start_with(BINARY, &message, Vec::new()).finish();
    assert_eq!(status.code(), Some(1), "{log}");
    assert!(log.contains("strict sandbox refused"), "{log}");
}

#[test]
fn started_by_hand_it_says_what_it_is() {
    let output = std::process::Command::new(BINARY)
        .stdin(std::process::Stdio::null())
        .output()
        .unwrap();
    assert_eq!(output.status.code(), Some(2));
    let text = String::from_utf8(output.stderr).unwrap();
    assert!(text.contains("a part of stratovirt"), "{text}");
}

#[test]
fn a_killed_process_says_so() {
    let mut process = DeviceProcess::start(BINARY, spec(), Vec::new());
    process.kill();
    let (status, _) = process.finish();
    assert_eq!(status.signal(), Some(9));
}
