//! The disk, as a live process with its filter on.

#![allow(clippy::unwrap_used)] // in a test, a panic is the report

mod disk;

use device_host::test_frontend::{
    Buffer, DeviceProcess, DriverQueue, EVENT_IDX, INDIRECT_DESC, TestFrontend,
};
use disk::*;
use ipc::spec::DeviceSpec;
use ipc::spec::block::BlockSpec;
use std::fs::File;
use std::os::fd::OwnedFd;
use tempfile::NamedTempFile;

#[test]
fn the_driver_sees_what_was_asked_for() {
    let mut plain = disk(PLAIN);
    assert_eq!(plain.front.config(0, 8), (SIZE / 512).to_le_bytes());
    assert_eq!(plain.front.config(12, 4), 62u32.to_le_bytes());
    assert_eq!(plain.front.config(20, 4), 512u32.to_le_bytes());
    assert_eq!(plain.front.config(34, 2), 1u16.to_le_bytes());
    assert_eq!(plain.front.offered & (F_RO | F_MQ), 0);
    assert_eq!(plain.front.offered & F_FLUSH, F_FLUSH);
    plain.finish();

    let options = Options {
        readonly: true,
        queues: 4,
        ..PLAIN
    };
    let mut other = disk(options);
    assert_eq!(other.front.offered & (F_RO | F_MQ), F_RO | F_MQ);
    assert_eq!(other.front.config(34, 2), 4u16.to_le_bytes());
    other.finish();
}

#[test]
fn reads_writes_flushes_and_the_serial_number() {
    let mut disk = disk(PLAIN);
    let (status, used) = disk.request(IN, 3, &[Buffer::writable(DATA, 4096)]);
    assert_eq!((status, used), (OK, 4097));
    let image = disk.image();
    assert_eq!(
        disk.front.memory.read(DATA, 4096),
        image[3 * 512..3 * 512 + 4096]
    );

    let text = [0x5a; 1536];
    disk.front.memory.write(DATA, &text);
    // Pieces that are no sectors by themselves.
    let pieces = [
        Buffer::readable(DATA, 100),
        Buffer::readable(DATA + 100, 1000),
        Buffer::readable(DATA + 1100, 436),
    ];
    assert_eq!(disk.request(OUT, 10, &pieces), (OK, 1));
    assert_eq!(disk.request(FLUSH, 0, &[]), (OK, 1));
    let after = disk.image();
    assert_eq!(after[5120..5120 + 1536], text);
    assert_eq!(after[..5120], image[..5120]);
    assert_eq!(after[5120 + 1536..], image[5120 + 1536..]);

    assert_eq!(
        disk.request(GET_ID, 0, &[Buffer::writable(DATA, 20)]),
        (OK, 21)
    );
    assert_eq!(disk.front.memory.read(DATA, 20), b"serial-0123456789\0\0\0");
    assert_eq!(
        disk.request(GET_ID, 0, &[Buffer::writable(DATA, 6)]),
        (OK, 7)
    );
    disk.finish();
}

#[test]
fn without_flush_a_write_is_still_a_write() {
    let mut disk = disk(Options {
        features: 0,
        ..PLAIN
    });
    disk.front.memory.write(DATA, &[7; 512]);
    assert_eq!(
        disk.request(OUT, 0, &[Buffer::readable(DATA, 512)]),
        (OK, 1)
    );
    assert_eq!(disk.image()[..512], [7; 512]);
    disk.finish();
}

#[test]
fn what_is_not_on_the_disk_is_an_error_and_changes_nothing() {
    let mut disk = disk(PLAIN);
    let before = disk.image();
    let last = SIZE / 512 - 1;
    let bad = [
        (IN, last, 1024),
        (IN, last + 1, 512),
        (IN, u64::MAX, 512),
        (IN, u64::MAX / 512, 512),
        (IN, 0, 511),
        (OUT, last, 1024),
        (OUT, last + 1, 512),
        (OUT, u64::MAX, 512),
        (OUT, 1 << 55, 512),
        (OUT, 0, 513),
    ];
    for (kind, sector, len) in bad {
        let buffer = Buffer {
            address: DATA,
            len,
            write: kind == IN,
        };
        let (status, used) = disk.request(kind, sector, &[buffer]);
        assert_eq!(status, IOERR, "{kind} {sector} {len}");
        assert!(used <= 1);
    }
    assert_eq!(
        disk.request(IN, last, &[Buffer::writable(DATA, 512)]),
        (OK, 513)
    );
    assert_eq!(
        disk.request(IN, last + 1, &[]),
        (OK, 1),
        "nothing, at the end"
    );
    assert_eq!(disk.image(), before);
    disk.finish();
}

#[test]
fn other_requests_are_unsupported() {
    let mut disk = disk(PLAIN);
    // 11 is a discard, which discard=ignore does not offer.
    for kind in [2, 3, 5, 11, 12, 14, u32::MAX] {
        assert_eq!(
            disk.request(kind, 0, &[Buffer::readable(DATA, 16)]).0,
            UNSUPP,
            "{kind}"
        );
    }
    disk.finish();
}

#[test]
fn a_read_only_disk_is_never_written() {
    let mut disk = disk(Options {
        readonly: true,
        ..PLAIN
    });
    let before = disk.image();
    disk.front.memory.write(DATA, &[1; 512]);
    assert_eq!(
        disk.request(OUT, 0, &[Buffer::readable(DATA, 512)]).0,
        IOERR
    );
    assert_eq!(disk.request(FLUSH, 0, &[]).0, OK);
    assert_eq!(disk.request(IN, 0, &[Buffer::writable(DATA, 512)]).0, OK);
    assert_eq!(disk.image(), before);
    disk.finish();
}

#[test]
fn direct_io_takes_any_buffer() {
    let mut disk = disk(Options {
        direct: true,
        ..PLAIN
    });
    let mut want = disk.image();
    // (sector, offset of the buffer, length)
    for (round, (sector, skew, len)) in [
        (0, 0, 4096),
        (8, 0, 65536),
        (1, 0, 512),
        (1, 1, 1024),
        (7, 513, 8192),
        (3, 3, 300 * 512),
    ]
    .into_iter()
    .enumerate()
    {
        let at = DATA + skew;
        let text: Vec<u8> = (0..len).map(|i| (i / 7 + round) as u8).collect();
        disk.front.memory.write(at, &text);
        let half = Buffer::readable(at, len as u32 / 2);
        let rest = Buffer::readable(at + len as u64 / 2, len as u32 - len as u32 / 2);
        assert_eq!(disk.request(OUT, sector, &[half, rest]), (OK, 1));
        let start = sector as usize * 512;
        want[start..start + len].copy_from_slice(&text);

        disk.front.memory.write(at, &vec![0; len]);
        let (status, used) = disk.request(IN, sector, &[Buffer::writable(at, len as u32)]);
        assert_eq!((status, used), (OK, len as u32 + 1));
        assert!(
            disk.front.memory.read(at, len) == text,
            "{sector} {skew} {len}"
        );
    }
    let last = SIZE / 512 - 1;
    assert_eq!(
        disk.request(OUT, last, &[Buffer::readable(DATA, 512)]).0,
        OK
    );
    let start = last as usize * 512;
    let tail = disk.front.memory.read(DATA, 512);
    want[start..].copy_from_slice(&tail);
    assert_eq!(disk.request(FLUSH, 0, &[]), (OK, 1));
    assert!(disk.image() == want);
    disk.finish();
}

#[test]
fn several_queues_indirect_tables_and_event_index_together() {
    let mut disk = disk(Options {
        queues: 3,
        features: F_FLUSH | F_MQ | EVENT_IDX | INDIRECT_DESC,
        ..PLAIN
    });
    let image = disk.image();
    for round in 0..200u64 {
        let queue = (round % 3) as usize;
        let sector = round % 100;
        disk.header(IN, sector);
        let memory = &disk.front.memory;
        let q = &mut disk.queues[queue];
        q.indirect_table = 0xa_0000 + 0x1000 * queue as u64;
        q.set_used_event(memory, q.used_index(memory));
        let buffers = [
            Buffer::readable(HEADER, 16),
            Buffer::writable(DATA, 256),
            Buffer::writable(DATA + 4096, 256),
            Buffer::writable(STATUS, 1),
        ];
        let head = q.indirect_chain(memory, &buffers);
        q.offer(memory, head);
        q.kick();
        assert_eq!(q.wait_used(memory), (head, 513));
        let start = sector as usize * 512;
        assert_eq!(memory.read(DATA, 256), image[start..start + 256]);
        assert_eq!(
            memory.read(DATA + 4096, 256),
            image[start + 256..start + 512]
        );
        assert_eq!(memory.read(STATUS, 1), [OK]);
    }
    disk.finish();
}

#[test]
fn headers_may_be_split_and_short_ones_are_an_error() {
    let mut disk = disk(PLAIN);
    disk.header(IN, 5);
    let memory = &disk.front.memory;
    let split = [
        Buffer::readable(HEADER, 3),
        Buffer::readable(HEADER + 3, 13),
        // Data and status in one buffer.
        Buffer::writable(DATA, 513),
    ];
    assert_eq!(disk.queues[0].request(memory, &split), 513);
    assert_eq!(memory.read(DATA + 512, 1), [OK]);

    let short = [Buffer::readable(HEADER, 15), Buffer::writable(STATUS, 1)];
    disk.queues[0].request(memory, &short);
    assert_eq!(memory.read(STATUS, 1), [IOERR]);
    let none = [Buffer::writable(STATUS, 1)];
    memory.write(STATUS, &[0xee]);
    disk.queues[0].request(memory, &none);
    assert_eq!(memory.read(STATUS, 1), [IOERR]);
    disk.finish();
}

#[test]
fn a_request_without_room_for_a_status_breaks_its_queue_only() {
    let mut disk = disk(Options {
        queues: 2,
        features: F_FLUSH | F_MQ,
        ..PLAIN
    });
    disk.header(FLUSH, 0);
    let head = disk.queues[0].chain(&disk.front.memory, &[Buffer::readable(HEADER, 16)]);
    disk.queues[0].offer(&disk.front.memory, head);
    disk.queues[0].kick();
    disk.queues[0].wait_broken();
    assert_eq!(disk.request_on(1, FLUSH, 0, &[]), (OK, 1));
    let log = disk.finish();
    assert!(log.contains("no room for a status"), "{log}");
}

#[test]
fn a_large_transfer_is_whole() {
    let mut disk = disk(Options {
        size: 8 << 20,
        ..PLAIN
    });
    let image = disk.image();
    // Two megabytes that end in one region of guest memory and start in the other are not possible: there is a hole.
    let len = 2 << 20;
    assert_eq!(
        disk.request(IN, 1000, &[Buffer::writable(0x80_0000, len)]),
        (OK, len + 1)
    );
    let start = 1000 * 512;
    let got = disk.front.memory.read(0x80_0000, len as usize);
    assert!(got == image[start..start + len as usize]);
    disk.finish();
}

#[test]
fn an_image_that_shrinks_is_an_error_for_the_guest_only() {
    let mut disk = disk(PLAIN);
    disk.file.as_file().set_len(4096).unwrap();
    assert_eq!(disk.request(IN, 0, &[Buffer::writable(DATA, 4096)]).0, OK);
    assert_eq!(
        disk.request(IN, 0, &[Buffer::writable(DATA, 8192)]).0,
        IOERR
    );
    assert_eq!(
        disk.request(IN, 100, &[Buffer::writable(DATA, 512)]).0,
        IOERR
    );
    disk.finish();
}

fn a_disk() -> DeviceSpec {
    DeviceSpec::Block(BlockSpec {
        id: "disk0".into(),
        readonly: false,
        direct: false,
        serial: String::new(),
        num_queues: 1,
        queue_size: 64,
        io: Default::default(),
    })
}

#[test]
fn a_killed_disk_is_replaced_without_losing_a_request() {
    let mut disk = disk(PLAIN);
    let (region, inflight) = {
        // Tracking starts with stopped queues.
        disk.front.stop(&disk.queues[0]);
        let tracked = disk.front.track_inflight(1, 64);
        disk.front.start(&disk.queues[0]);
        tracked
    };
    disk.front.memory.write(DATA, &[0x11; 512]);
    assert_eq!(disk.request(OUT, 1, &[Buffer::readable(DATA, 512)]).0, OK);
    disk.process.kill();
    let Disk {
        process,
        front,
        mut queues,
        file,
    } = disk;
    process.finish();
    // With nothing in flight, the driver is interrupted all the same: the last answer's interrupt may have been lost.
    queues[0].interrupts();
    let mut idle = DeviceProcess::start(BINARY, a_disk(), vec![open(&file, PLAIN)]);
    let mut front = TestFrontend::connect_with(idle.socket(), F_FLUSH, front.memory);
    front.use_inflight(&region, &inflight);
    front.start_at(&queues[0], 0);
    queues[0].wait_interrupt();
    assert_eq!(queues[0].try_used(&front.memory), None);
    idle.kill();
    idle.finish();
    // Offered to nobody.
    front.memory.write(DATA, &[0x22; 512]);
    let mut header = [0; 16];
    header[0] = 1;
    header[8] = 2;
    front.memory.write(HEADER, &header);
    front.memory.write(STATUS, &[0xee]);
    let head = queues[0].chain(
        &front.memory,
        &[
            Buffer::readable(HEADER, 16),
            Buffer::readable(DATA, 512),
            Buffer::writable(STATUS, 1),
        ],
    );
    queues[0].offer(&front.memory, head);
    queues[0].kick();

    let mut second = DeviceProcess::start(BINARY, a_disk(), vec![open(&file, PLAIN)]);
    let mut front = TestFrontend::connect_with(second.socket(), F_FLUSH, front.memory);
    front.use_inflight(&region, &inflight);
    front.start_at(&queues[0], 0);
    assert_eq!(queues[0].wait_used(&front.memory), (head, 1));
    assert_eq!(front.memory.read(STATUS, 1), [OK]);
    let image = std::fs::read(file.path()).unwrap();
    assert_eq!(image[512..1024], [0x11; 512]);
    assert_eq!(image[1024..1536], [0x22; 512]);
    drop(front);
    second.finish_well();
}

/// A small generator, so that a failure can be repeated.
struct Xorshift(u64);

impl Xorshift {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }

    fn one_of(&mut self, choice: &[u64]) -> u64 {
        choice[(self.next() % choice.len() as u64) as usize]
    }
}

#[test]
fn random_rings_neither_end_the_process_nor_change_its_size() {
    use vhost::VhostBackend;
    use vhost::vhost_user::VhostUserFrontend;

    let mut disk = disk(Options {
        features: F_FLUSH | INDIRECT_DESC | EVENT_IDX,
        ..PLAIN
    });
    let mut random = Xorshift(0x5eed_0001);
    let mut broken = 0;
    for round in 0..400 {
        let queue = &mut disk.queues[0];
        let memory = &disk.front.memory;
        for index in 0..64 {
            // Addresses: data, a table, the ring itself, the hole, the end of memory, nonsense.
            let address = random.one_of(&[
                HEADER,
                STATUS,
                DATA,
                queue.indirect_table,
                queue.table,
                queue.used(),
                0x3f_ffff,
                0x40_0000,
                0xbf_ffff,
                u64::MAX - 7,
            ]);
            let len = random.one_of(&[0, 1, 16, 32, 512, 513, 4096, 1 << 20, u64::from(u32::MAX)]);
            // Mostly NEXT and WRITE, sometimes INDIRECT and bits that do not exist.
            let flags = random.one_of(&[0, 1, 1, 1, 2, 3, 3, 4, 5, 0xfff8, 0xffff]);
            let next = random.one_of(&[index + 1, index + 1, index + 1, 0, index, 63, 64, 65_535]);
            let raw = (address, len as u32, flags as u16, next as u16);
            DriverQueue::describe(memory, queue.table, index as u16, raw);
            DriverQueue::describe(memory, queue.indirect_table, index as u16, raw);
        }
        let mut header = [0; 16];
        header[..4].copy_from_slice(&(random.one_of(&[0, 1, 4, 8, 99]) as u32).to_le_bytes());
        header[8..].copy_from_slice(
            &random
                .one_of(&[0, 7, SIZE / 512 - 1, u64::MAX])
                .to_le_bytes(),
        );
        memory.write(HEADER, &header);
        for _ in 0..random.next() % 64 {
            let head = random.next() % 65;
            queue.offer(memory, head as u16);
        }
        if round % 16 == 15 {
            queue.set_available_index(memory, random.next() as u16);
        }
        queue.kick();
        // Answered only after the queue's turn, and only by a living process.
        disk.front.config(0, 8);
        broken += u32::from(disk.queues[0].is_broken());
        disk.front.vhost.reset_device().unwrap();
        let accepted = disk.front.accepted;
        disk.front.vhost.set_features(accepted).unwrap();
        disk.front.memory.write(0, &vec![0; 0x2_0000]);
        disk.queues[0] = DriverQueue::new(0, 64, 0);
        disk.front.start(&disk.queues[0]);
    }
    assert!(
        (1..400).contains(&broken),
        "both kinds happened: {broken} of 400 broke"
    );
    let (status, _) = disk.request(IN, 0, &[Buffer::writable(DATA, 512)]);
    assert_eq!(status, OK);
    assert_eq!(disk.image().len() as u64, SIZE);
    disk.finish();
}

/// What a check has seen must be what is used afterwards: the table and the header are rewritten all the time.
#[test]
fn a_driver_that_rewrites_requests_while_they_are_read_gains_nothing() {
    use std::sync::atomic::{AtomicBool, Ordering};
    use vhost::VhostBackend;
    use vhost::vhost_user::VhostUserFrontend;

    const CANARY: u64 = DATA + 0x10_0000;
    let mut disk = disk(Options {
        features: F_FLUSH | INDIRECT_DESC | EVENT_IDX,
        ..PLAIN
    });
    let before = disk.image();
    disk.front.memory.write(CANARY, &[0xc5; 4096]);
    let (mut broken, mut answered) = (0, 0);
    for round in 0..300u64 {
        disk.header(OUT, 0);
        // A header, 512 bytes of data, a status: right at first.
        for index in 0..20 {
            let at = index * 3;
            for (offset, raw) in [
                (0, (HEADER, 16, 1)),
                (1, (DATA, 512, 1)),
                (2, (STATUS, 1, 2)),
            ] {
                let (address, len, flags) = raw;
                let raw = (address, len, flags, at + offset + 1);
                DriverQueue::describe(&disk.front.memory, disk.queues[0].table, at + offset, raw);
            }
        }
        let done = AtomicBool::new(false);
        let table = disk.queues[0].table;
        std::thread::scope(|scope| {
            let memory = &disk.front.memory;
            let (done, mut random) = (&done, Xorshift(0x5eed_0002 + round));
            scope.spawn(move || {
                while !done.load(Ordering::Relaxed) {
                    let at = (random.next() % 20) as u16 * 3;
                    let address = random.one_of(&[DATA, DATA, 0x3f_ff00, 0xbf_ff00, u64::MAX - 7]);
                    let len = random.one_of(&[512, 512, 1024, u64::from(u32::MAX)]) as u32;
                    let flags = random.one_of(&[1, 1, 1, 3, 4]) as u16;
                    DriverQueue::describe(memory, table, at + 1, (address, len, flags, at + 2));
                    // Two sectors of the image, and those around its end.
                    let sector = random.one_of(&[0, 1, SIZE / 512 - 1, SIZE / 512, u64::MAX]);
                    memory.write(HEADER + 8, &sector.to_le_bytes());
                }
            });
            let queue = &mut disk.queues[0];
            for index in 0..20 {
                queue.offer(memory, index * 3);
                queue.kick();
            }
            // Answered only after the queue's turn, and only by a living process.
            disk.front.vhost.get_queue_num().unwrap();
            done.store(true, Ordering::Relaxed);
        });
        disk.front.config(0, 8);
        answered += u32::from(disk.queues[0].used_index(&disk.front.memory));
        broken += u32::from(disk.queues[0].is_broken());
        disk.front.vhost.reset_device().unwrap();
        let accepted = disk.front.accepted;
        disk.front.vhost.set_features(accepted).unwrap();
        disk.front.memory.write(0, &vec![0; 0x2_0000]);
        disk.queues[0] = DriverQueue::new(0, 64, 0);
        disk.front.start(&disk.queues[0]);
    }
    assert!(
        broken > 0 && answered > 300,
        "{broken} broke, {answered} answered"
    );
    assert_eq!(disk.front.memory.read(CANARY, 4096), [0xc5; 4096]);
    // Requests may have written the first sectors, as many as their data was long, and the last one.
    let after = disk.image();
    assert_eq!(after.len(), before.len());
    let last = before.len() - 512;
    assert!(
        after[4096..last] == before[4096..last],
        "other sectors changed"
    );
    let (status, _) = disk.request(IN, 0, &[Buffer::writable(DATA, 512)]);
    assert_eq!(status, OK);
    disk.finish();
}

/// A guest that writes the header of another format, with a backing file of the host, gets back what it wrote: nobody looks.
#[test]
fn an_image_that_looks_like_another_format_stays_raw() {
    // QCOW2, version 3: magic, version, offset and length of the backing file's name.
    let mut header = [0u8; 512];
    header[..8].copy_from_slice(b"QFI\xfb\0\0\0\x03");
    header[8..16].copy_from_slice(&112u64.to_be_bytes());
    header[16..20].copy_from_slice(&11u32.to_be_bytes());
    header[24..32].copy_from_slice(&(1u64 << 40).to_be_bytes());
    header[112..123].copy_from_slice(b"/etc/passwd");
    let mut disk = disk(PLAIN);
    disk.front.memory.write(DATA, &header);
    assert_eq!(
        disk.request(OUT, 0, &[Buffer::readable(DATA, 512)]),
        (OK, 1)
    );
    let Disk {
        process,
        front,
        file,
        ..
    } = disk;
    drop(front);
    process.finish_well();
    // The next process, on the same image: the size and the bytes are the file's.
    let mut disk = disk_on(file, PLAIN);
    assert_eq!(disk.front.config(0, 8), (SIZE / 512).to_le_bytes());
    let (status, _) = disk.request(IN, 0, &[Buffer::writable(DATA, 512)]);
    assert_eq!(status, OK);
    assert_eq!(disk.front.memory.read(DATA, 512), header);
    disk.finish();
}

#[test]
fn wrong_specs_are_refused_with_their_reason() {
    let file = NamedTempFile::new().unwrap();
    let good = BlockSpec {
        id: "d".into(),
        readonly: true,
        direct: false,
        serial: String::new(),
        num_queues: 1,
        queue_size: 64,
        io: Default::default(),
    };
    let run = |spec: BlockSpec, fds: Vec<OwnedFd>| {
        let (status, log) = DeviceProcess::start(BINARY, DeviceSpec::Block(spec), fds).finish();
        assert_eq!(status.code(), Some(1), "{log}");
        log
    };
    let image = || vec![OwnedFd::from(File::open(file.path()).unwrap())];
    let mut spec = good.clone();
    spec.num_queues = 33;
    assert!(run(spec, image()).contains("num-queues=33: 1 to 32"));
    let mut spec = good.clone();
    spec.queue_size = 100;
    assert!(run(spec, image()).contains("queue-size=100: a power of two"));
    let mut spec = good.clone();
    spec.serial = "x".repeat(21);
    assert!(run(spec, image()).contains("at most 20 bytes"));
    let mut spec = good.clone();
    spec.readonly = false;
    assert!(run(spec, image()).contains("read-only"));
    assert!(run(good.clone(), Vec::new()).contains("one back-end descriptor"));
    let pipe = OwnedFd::from(std::io::pipe().unwrap().0);
    let log = run(good, vec![pipe]);
    assert!(log.contains("no regular file or block device"), "{log}");
}

/// Requests that take long, and a front end that does not want to wait for all of them: a driver's reset, for one.
#[test]
fn a_queue_of_large_requests_stops_between_two_of_them() {
    let file = NamedTempFile::new_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    file.as_file().set_len(1 << 30).unwrap();
    let mut disk = disk_on(
        file,
        Options {
            features: F_FLUSH | INDIRECT_DESC,
            ..PLAIN
        },
    );
    disk.header(IN, 0);
    let mut buffers = vec![Buffer::readable(HEADER, 16)];
    buffers.extend((0..700).map(|_| Buffer::writable(8 << 20, 1 << 20)));
    buffers.push(Buffer::writable(STATUS, 1));
    let queue = &mut disk.queues[0];
    let head = queue.indirect_chain(&disk.front.memory, &buffers);
    for _ in 0..64 {
        queue.offer(&disk.front.memory, head);
    }
    queue.kick();
    assert_eq!(
        queue.wait_used(&disk.front.memory),
        (head, (700 << 20) + 1),
        "the first one is done"
    );
    let base = disk.front.stop(&disk.queues[0]);
    let used = disk.queues[0].used_index(&disk.front.memory);
    assert_eq!(base, used, "what was taken is answered");
    assert!(used < 64, "all were done before the front end was heard");
    disk.finish();
}
