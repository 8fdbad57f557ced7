//! What each property of a disk does, seen on the live process and on the host's file.

#![allow(clippy::unwrap_used)] // in a test, a panic is the report

mod disk;

use std::os::unix::fs::MetadataExt;
use std::time::{Duration, Instant};

use device_host::test_frontend::{Buffer, DeviceProcess};
use disk::*;
use ipc::spec::DeviceSpec;
use ipc::spec::block::{Aio, BlockIo, BlockSpec, DetectZeroes};

impl Disk {
    /// Bytes that the image takes on the host's file system.
    fn space(&self) -> u64 {
        self.file.as_file().sync_all().unwrap();
        self.file.as_file().metadata().unwrap().blocks() * 512
    }

    fn ranges(&mut self, kind: u32, ranges: &[(u64, u32, u32)]) -> u8 {
        let mut bytes = Vec::new();
        for (sector, count, flags) in ranges {
            bytes.extend_from_slice(&sector.to_le_bytes());
            bytes.extend_from_slice(&count.to_le_bytes());
            bytes.extend_from_slice(&flags.to_le_bytes());
        }
        self.front.memory.write(DATA, &bytes);
        let buffer = Buffer::readable(DATA, bytes.len() as u32);
        self.request(kind, 0, &[buffer]).0
    }
}

/// Every way of I/O that a host may have to use.
fn ways() -> impl Iterator<Item = (bool, Aio)> {
    [
        (false, Aio::Off),
        (false, Aio::IoUring),
        (true, Aio::Off),
        (true, Aio::IoUring),
        (true, Aio::Native),
    ]
    .into_iter()
}

#[test]
fn discarded_ranges_are_freed_and_read_as_zeroes() {
    for (direct, aio) in ways() {
        let mut disk = disk(Options {
            direct,
            io: BlockIo {
                aio,
                discard: true,
                ..IO
            },
            features: F_FLUSH | F_DISCARD,
            ..PLAIN
        });
        let (before, mut want) = (disk.space(), disk.image());
        // Two ranges in one request, an empty one between them.
        let ranges = [(256, 512, 0), (0, 0, 0), (1024, 8, 0)];
        assert_eq!(disk.ranges(DISCARD, &ranges), OK, "{aio:?}");
        assert!(
            disk.space() + 260 * 1024 <= before + 4096,
            "{aio:?} {direct}"
        );
        want[256 * 512..768 * 512].fill(0);
        want[1024 * 512..1032 * 512].fill(0);
        assert!(disk.image() == want);

        let last = SIZE / 512;
        for bad in [
            (last, 1, 0),
            (0, (last + 1) as u32, 0),
            (u64::MAX, 1, 0),
            (0, u32::MAX, 0),
        ] {
            assert_eq!(disk.ranges(DISCARD, &[bad]), IOERR, "{bad:?}");
        }
        assert_eq!(
            disk.ranges(DISCARD, &[(0, 1, 1)]),
            UNSUPP,
            "unmap is not for discards"
        );
        assert_eq!(
            disk.ranges(DISCARD, &[(0, 0, 0); 33]),
            IOERR,
            "more than 32 ranges"
        );
        assert_eq!(disk.request(DISCARD, 0, &[]).0, IOERR, "none");
        assert_eq!(
            disk.request(DISCARD, 0, &[Buffer::readable(DATA, 15)]).0,
            IOERR
        );
        assert!(disk.image() == want);
        disk.finish();
    }
}

#[test]
fn zeroed_ranges_read_as_zeroes_and_keep_their_space_unless_it_may_be_freed() {
    for (direct, aio) in ways() {
        for discard in [false, true] {
            let mut disk = disk(Options {
                direct,
                io: BlockIo { aio, discard, ..IO },
                features: F_FLUSH | F_WRITE_ZEROES,
                ..PLAIN
            });
            assert_eq!(disk.front.config(56, 1), [u8::from(discard)]);
            let (before, mut want) = (disk.space(), disk.image());
            assert_eq!(disk.ranges(WRITE_ZEROES, &[(8, 8, 0)]), OK);
            want[4096..8192].fill(0);
            assert!(disk.image() == want);
            assert_eq!(disk.space(), before, "kept");
            assert_eq!(disk.ranges(WRITE_ZEROES, &[(512, 1024, 1)]), OK);
            want[512 * 512..1536 * 512].fill(0);
            assert!(disk.image() == want);
            let freed = before - disk.space().min(before);
            assert_eq!(freed >= 508 * 1024, discard, "{freed} bytes freed");
            disk.finish();
        }
    }
}

#[test]
fn discard_is_offered_only_if_it_does_something() {
    let mut ignore = disk(PLAIN);
    assert_eq!(ignore.front.offered & F_DISCARD, 0);
    assert_eq!(ignore.ranges(DISCARD, &[(0, 8, 0)]), UNSUPP);
    ignore.finish();
    let mut readonly = disk(Options {
        readonly: true,
        io: BlockIo {
            discard: true,
            ..IO
        },
        ..PLAIN
    });
    assert_eq!(readonly.front.offered & (F_DISCARD | F_WRITE_ZEROES), 0);
    let before = readonly.image();
    assert_eq!(readonly.ranges(DISCARD, &[(0, 8, 0)]), IOERR);
    assert_eq!(readonly.ranges(WRITE_ZEROES, &[(0, 8, 0)]), IOERR);
    assert!(readonly.image() == before);
    readonly.finish();
}

#[test]
fn all_nine_combinations_of_discard_and_detect_zeroes() {
    // Manual 2.2: unmap frees only with discard=unmap, otherwise it is the same as on. A property that is absent is its default.
    for (discard, given) in [(false, "absent"), (false, "ignore"), (true, "unmap")] {
        for detect in [DetectZeroes::Off, DetectZeroes::On, DetectZeroes::Unmap] {
            let mut disk = disk(Options {
                io: BlockIo {
                    discard,
                    detect_zeroes: detect,
                    ..IO
                },
                ..PLAIN
            });
            let (before, mut want) = (disk.space(), disk.image());
            let len = 512 * 1024;
            disk.front.memory.write(DATA, &vec![0; len]);
            let zeroes = Buffer::readable(DATA, len as u32);
            assert_eq!(disk.request(OUT, 256, &[zeroes]), (OK, 1));
            want[256 * 512..256 * 512 + len].fill(0);
            assert!(disk.image() == want, "{given} {detect:?}");
            let frees = discard && detect == DetectZeroes::Unmap;
            let freed = before - disk.space().min(before);
            assert_eq!(
                freed >= len as u64 - 4096,
                frees,
                "discard {given}, {detect:?}: {freed} freed"
            );

            // One byte that is not zero, at the very end, makes it a write.
            disk.front.memory.write(DATA + len as u64 - 1, &[1]);
            assert_eq!(disk.request(OUT, 256, &[zeroes]), (OK, 1));
            want[256 * 512 + len - 1] = 1;
            assert!(disk.image() == want);
            disk.finish();
        }
    }
}

#[test]
fn the_driver_switches_the_write_cache() {
    let mut disk = disk(Options {
        features: F_FLUSH | F_CONFIG_WCE,
        ..PLAIN
    });
    assert_eq!(disk.front.config(32, 1), [1]);
    let write = |disk: &mut Disk| {
        disk.front.memory.write(DATA, &[3; 512]);
        disk.request(OUT, 0, &[Buffer::readable(DATA, 512)])
    };
    assert_eq!(write(&mut disk), (OK, 1));
    use vhost::vhost_user::VhostUserFrontend;
    use vhost::vhost_user::message::VhostUserConfigFlags;
    disk.front
        .vhost
        .set_config(32, VhostUserConfigFlags::WRITABLE, &[0])
        .unwrap();
    assert_eq!(disk.front.config(32, 1), [0]);
    assert_eq!(write(&mut disk), (OK, 1));
    assert_eq!(disk.image()[..512], [3; 512]);
    // Capacity is not the driver's to change.
    disk.front
        .vhost
        .set_config(0, VhostUserConfigFlags::WRITABLE, &[0; 8])
        .unwrap();
    assert_eq!(disk.front.config(0, 8), (SIZE / 512).to_le_bytes());
    disk.finish();
}

#[test]
fn many_requests_are_in_flight_at_once_and_none_is_lost_when_the_queue_stops() {
    for (direct, aio) in ways() {
        let mut disk = disk(Options {
            direct,
            queues: 2,
            io: BlockIo { aio, ..IO },
            ..PLAIN
        });
        let image = disk.image();
        const SLOTS: u64 = 20;
        for round in 0..5 {
            for slot in 0..SLOTS {
                let sector = (slot * 37 + round * 11) % (SIZE / 512 - 8);
                let header = 0x9_0000 + slot * 32;
                let mut bytes = [0; 16];
                bytes[8..].copy_from_slice(&sector.to_le_bytes());
                let memory = &disk.front.memory;
                memory.write(header, &bytes);
                memory.write(header + 16, &[0xee]);
                let data = DATA + slot * 4096;
                let buffers = [
                    Buffer::readable(header, 16),
                    Buffer::writable(data, 4096),
                    Buffer::writable(header + 16, 1),
                ];
                let queue = &mut disk.queues[(slot % 2) as usize];
                let head = queue.chain(memory, &buffers);
                queue.offer(memory, head);
            }
            disk.queues[0].kick();
            disk.queues[1].kick();
            let bases: Vec<u16> = (0..2)
                .map(|index| disk.front.stop(&disk.queues[index]))
                .collect();
            // What was taken is done: the used index tells the same as the base that the process gave back.
            for (queue, base) in disk.queues.iter().zip(&bases) {
                assert_eq!(queue.used_index(&disk.front.memory), *base);
            }
            for (index, base) in bases.into_iter().enumerate() {
                disk.front.start_at(&disk.queues[index], base);
            }
            for queue in &mut disk.queues {
                for _ in 0..SLOTS / 2 {
                    let (_, used) = queue.wait_used(&disk.front.memory);
                    assert_eq!(used, 4097);
                }
            }
            for slot in 0..SLOTS {
                let sector = (slot * 37 + round * 11) % (SIZE / 512 - 8);
                let at = sector as usize * 512;
                assert_eq!(disk.front.memory.read(0x9_0000 + slot * 32 + 16, 1), [OK]);
                assert!(disk.front.memory.read(DATA + slot * 4096, 4096) == image[at..at + 4096]);
            }
        }
        disk.finish();
    }
}

#[test]
fn the_limit_on_requests_is_kept_over_all_queues() {
    const IOPS: u32 = 2_000;
    let mut disk = disk(Options {
        queues: 2,
        io: BlockIo {
            iops_total: IOPS,
            ..IO
        },
        ..PLAIN
    });
    let start = Instant::now();
    let mut done = 0;
    while start.elapsed() < Duration::from_millis(1_500) {
        let (status, _) = disk.request_on(done as usize % 2, IN, 0, &[Buffer::writable(DATA, 512)]);
        assert_eq!(status, OK);
        done += 1;
    }
    let seconds = start.elapsed().as_secs_f64();
    // The burst of 100 ms comes on top; a busy machine may be slower, and never faster.
    let most = (seconds + 0.1) * f64::from(IOPS) * 1.02 + 1.0;
    assert!(f64::from(done) <= most, "{done} requests in {seconds} s");
    assert!(
        done > IOPS / 2,
        "{done} requests in {seconds} s: the limit holds too much back"
    );
    disk.finish();
}

#[test]
fn an_idle_disk_sleeps() {
    let mut disk = disk(Options {
        io: BlockIo { poll_us: 200, ..IO },
        ..PLAIN
    });
    for _ in 0..100 {
        disk.request(IN, 0, &[Buffer::writable(DATA, 512)]);
    }
    let ticks = |disk: &Disk| {
        let stat =
            std::fs::read_to_string(format!("/proc/{}/schedstat", disk.process.id())).unwrap();
        stat.split(' ').next().unwrap().parse::<u64>().unwrap()
    };
    // It answers a message, and then has nothing to do: no time passes for it until the next one.
    disk.front.config(0, 8);
    let before = ticks(&disk);
    let mut fds = [nix::poll::PollFd::new(
        std::os::fd::AsFd::as_fd(disk.file.as_file()),
        nix::poll::PollFlags::empty(),
    )];
    nix::poll::poll(&mut fds, nix::poll::PollTimeout::from(300u16)).unwrap();
    let spent = Duration::from_nanos(ticks(&disk) - before);
    assert!(
        spent < Duration::from_millis(3),
        "{spent:?} in 300 ms of nothing to do"
    );
    disk.finish();
}

#[test]
fn wrong_values_have_their_message() {
    for (io, message) in [
        (
            BlockIo { poll_us: 201, ..IO },
            "poll-us=201: 0 to 200 is allowed",
        ),
        (
            BlockIo {
                iops_total: 1_000_001,
                ..IO
            },
            "throttling.iops-total=1000001: 0 to 1000000 is allowed",
        ),
    ] {
        let file = tempfile::NamedTempFile::new().unwrap();
        let spec = DeviceSpec::Block(BlockSpec {
            id: "d".into(),
            readonly: false,
            direct: false,
            serial: String::new(),
            num_queues: 1,
            queue_size: 64,
            io,
        });
        let fds = vec![open(&file, PLAIN)];
        let (status, log) = DeviceProcess::start(BINARY, spec, fds).finish();
        assert_eq!(status.code(), Some(1));
        assert!(log.contains(message), "{log}");
    }
}
