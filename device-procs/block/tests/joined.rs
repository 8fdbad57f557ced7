//! Writes that follow each other on the disk and are taken together: one call of the host for many, an answer for each.

#![allow(clippy::unwrap_used)] // in a test, a panic is the report

mod disk;

use device_host::test_frontend::{Buffer, DeviceProcess, DriverQueue, GuestMemory, TestFrontend};
use disk::*;
use ipc::spec::DeviceSpec;
use ipc::spec::block::{Aio, BlockIo, BlockSpec};
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sched::{CloneFlags, unshare};
use std::time::Instant;
use tempfile::NamedTempFile;

/// Requests at once: three descriptors each, of 64.
const MANY: usize = 20;
const BLOCK: u64 = 4096;
const NONE: Option<&str> = None;
const HEADERS: u64 = 0x9_0000;
/// Data of one request, with what lies between its pieces.
const ROOM: u64 = 0x1_0000;

/// A request of a batch.
#[derive(Debug, Clone)]
struct Asked {
    kind: u32,
    sector: u64,
    /// Bytes of each piece that its data is in.
    pieces: Vec<u32>,
    fill: u8,
}

impl Asked {
    fn block(nth: u64, fill: u8) -> Self {
        Self {
            kind: OUT,
            sector: nth * BLOCK / 512,
            pieces: vec![BLOCK as u32],
            fill,
        }
    }

    /// No two bytes that are near each other, and no two requests, look the same.
    fn data(&self) -> Vec<u8> {
        let len: u32 = self.pieces.iter().sum();
        (0..len)
            .map(|at| self.fill ^ (at % 253) as u8 ^ (at / 512) as u8)
            .collect()
    }

    /// Where it is on the disk.
    fn place(&self) -> std::ops::Range<usize> {
        let start = self.sector as usize * 512;
        start..start + self.data().len()
    }
}

/// Makes all available in this order, with one store of the index; returns their heads.
fn offer(memory: &GuestMemory, queue: &mut DriverQueue, asked: &[Asked]) -> Vec<u16> {
    let mut heads = Vec::new();
    for (slot, one) in asked.iter().enumerate() {
        let slot = slot as u64;
        let header = HEADERS + slot * 32;
        let mut bytes = [0; 16];
        bytes[..4].copy_from_slice(&one.kind.to_le_bytes());
        bytes[8..].copy_from_slice(&one.sector.to_le_bytes());
        memory.write(header, &bytes);
        memory.write(header + 16, &[0xee]);
        let mut buffers = vec![Buffer::readable(header, 16)];
        let (mut at, data) = (DATA + slot * ROOM, one.data());
        let mut rest = &data[..];
        for piece in &one.pieces {
            let (this, others) = rest.split_at(*piece as usize);
            memory.write(at, this);
            buffers.push(Buffer::readable(at, *piece));
            // The next piece is elsewhere.
            at += u64::from(*piece) + 64;
            rest = others;
        }
        buffers.push(Buffer::writable(header + 16, 1));
        let head = queue.chain(memory, &buffers);
        queue.offer(memory, head);
        heads.push(head);
    }
    heads
}

fn status(memory: &GuestMemory, slot: usize) -> u8 {
    memory.read(HEADERS + slot as u64 * 32 + 16, 1)[0]
}

/// The disk finds all of them when its queue starts. Returns the status of each.
fn at_once(disk: &mut Disk, asked: &[Asked]) -> Vec<u8> {
    let base = disk.front.stop(&disk.queues[0]);
    let mut heads = offer(&disk.front.memory, &mut disk.queues[0], asked);
    disk.front.start_at(&disk.queues[0], base);
    for _ in asked {
        let (head, _) = disk.queues[0].wait_used(&disk.front.memory);
        let at = heads.iter().position(|one| *one == head);
        heads.swap_remove(at.unwrap_or_else(|| panic!("{head} was given back twice")));
    }
    (0..asked.len())
        .map(|slot| status(&disk.front.memory, slot))
        .collect()
}

fn with(aio: Aio) -> Options {
    Options {
        io: BlockIo { aio, ..IO },
        ..PLAIN
    }
}

/// Calls of the process that write to a file, the eventfds of interrupts among them.
fn writes(disk: &Disk) -> u64 {
    let told = std::fs::read_to_string(format!("/proc/{}/io", disk.process.id())).unwrap();
    let line = told.lines().find_map(|line| line.strip_prefix("syscw: "));
    line.unwrap().parse().unwrap()
}

#[test]
fn many_writes_in_a_row_are_few_calls_and_all_arrive() {
    for (aio, calls) in [(Aio::Native, 1..8), (Aio::Off, MANY as u64..u64::MAX)] {
        let mut disk = disk(with(aio));
        let asked: Vec<Asked> = (0..MANY)
            .map(|n| Asked::block(5 + n as u64, 0x80 + n as u8))
            .collect();
        let before = writes(&disk);
        assert_eq!(at_once(&mut disk, &asked), [OK; MANY], "{aio:?}");
        let count = writes(&disk) - before;
        assert!(calls.contains(&count), "{aio:?}: {count} calls");
        let image = disk.image();
        for one in &asked {
            assert!(image[one.place()] == one.data(), "{aio:?}: {one:?}");
        }
        disk.finish();
    }
}

/// A file system that has room for some of the writes: each is told what became of it and not of its neighbours.
#[test]
fn each_write_has_its_own_status_when_the_host_has_no_room_for_all() {
    /// Blocks that there is room for from the first one on, and one that has its place already.
    const FREE: usize = 7;
    const THERE: usize = 15;
    tests::host::require_root();
    unshare(CloneFlags::CLONE_NEWNS).unwrap();
    let private = MsFlags::MS_REC | MsFlags::MS_PRIVATE;
    mount(NONE, "/", NONE, private, NONE).unwrap();
    for aio in [Aio::Native, Aio::Off] {
        let folder = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
        let size = format!("size={}", (FREE as u64 + 1) * BLOCK);
        let kind = Some("tmpfs");
        mount(kind, folder.path(), kind, MsFlags::empty(), Some(&*size)).unwrap();
        let file = NamedTempFile::new_in(folder.path()).unwrap();
        file.as_file().set_len(SIZE).unwrap();
        let mut disk = disk_on(file, with(aio));
        let there = Asked::block(THERE as u64, 0x77);
        assert_eq!(at_once(&mut disk, &[there]), [OK]);
        let want: Vec<u8> = (0..MANY)
            .map(|n| if n < FREE || n == THERE { OK } else { IOERR })
            .collect();
        // The first time it ends in the middle of a call, later at the first block that it does not have.
        for round in 1..4 {
            for first in [0, FREE as u64 - 1, FREE as u64] {
                let asked: Vec<Asked> = (first..MANY as u64)
                    .map(|n| Asked::block(n, round * 40 + n as u8))
                    .collect();
                let context = format!("{aio:?}, round {round}, from block {first}");
                let got = at_once(&mut disk, &asked);
                assert_eq!(got, want[first as usize..], "{context}");
                let image = disk.image();
                for (one, status) in asked.iter().zip(got) {
                    let data = if status == OK {
                        one.data()
                    } else {
                        vec![0; BLOCK as usize]
                    };
                    assert!(image[one.place()] == data, "{context}: {one:?}");
                }
            }
        }
        disk.finish();
        umount2(folder.path(), MntFlags::MNT_DETACH).unwrap();
    }
}

/// Rows of every length, in pieces of every size, between requests that end them.
#[test]
fn rows_of_any_shape_arrive_as_they_are() {
    for aio in [Aio::Native, Aio::Off] {
        let mut disk = disk(Options {
            features: F_FLUSH | F_WRITE_ZEROES,
            ..with(aio)
        });
        let mut want = disk.image();
        let mut state = 0x9e37_79b9_7f4a_7c15u64;
        let mut next = |below: u64| {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            state % below
        };
        for round in 0..300u32 {
            // Requests of one batch have no order among each other: no two of them touch the same sector.
            let mut sector = next(SIZE / 512 / 4);
            let mut asked = Vec::new();
            // Descriptors: a header, a status, and the pieces.
            let mut room = 62;
            while room > 6 {
                let kind = [OUT, OUT, OUT, OUT, OUT, OUT, OUT, FLUSH][next(8) as usize];
                let sectors = [1, 8, 8, 8, 3, 64, 65][next(7) as usize];
                let pieces = match (kind, next(3)) {
                    (FLUSH, _) => vec![],
                    (_, 0) => vec![1, sectors * 512 - 13, 12],
                    _ => vec![sectors * 512],
                };
                room -= 2 + pieces.len();
                let one = Asked {
                    kind,
                    sector,
                    pieces,
                    fill: round as u8 ^ asked.len() as u8,
                };
                if one.place().end > want.len() {
                    break;
                }
                if kind == OUT {
                    want[one.place()].copy_from_slice(&one.data());
                    sector += u64::from(sectors) + [0, 0, 0, 0, 0, 1, 9][next(7) as usize];
                }
                asked.push(one);
            }
            let all_well = at_once(&mut disk, &asked).iter().all(|one| *one == OK);
            assert!(all_well, "{aio:?}, round {round}: {asked:?}");
            assert!(disk.image() == want, "{aio:?}, round {round}: {asked:?}");
        }
        disk.finish();
    }
}

/// What comes behind a row on the same sectors comes after it.
#[test]
fn a_read_or_zeroes_behind_a_row_find_it_written() {
    for (aio, kind) in [Aio::Native, Aio::Off]
        .into_iter()
        .flat_map(|aio| [(aio, IN), (aio, WRITE_ZEROES)])
    {
        let mut disk = disk(Options {
            features: F_FLUSH | F_WRITE_ZEROES,
            ..with(aio)
        });
        let rows: Vec<Asked> = (0..4).map(|n| Asked::block(n, 0x10 + n as u8)).collect();
        let base = disk.front.stop(&disk.queues[0]);
        let (memory, queue) = (&disk.front.memory, &mut disk.queues[0]);
        offer(memory, queue, &rows);
        // The third block.
        let (header, data) = (HEADERS + 4 * 32, DATA + 4 * ROOM);
        let mut bytes = [0; 16];
        bytes[..4].copy_from_slice(&kind.to_le_bytes());
        let buffer = if kind == IN {
            bytes[8..].copy_from_slice(&16u64.to_le_bytes());
            Buffer::writable(data, BLOCK as u32)
        } else {
            memory.write(data, &[16u64.to_le_bytes(), 8u64.to_le_bytes()].concat());
            Buffer::readable(data, 16)
        };
        memory.write(header, &bytes);
        memory.write(header + 16, &[0xee]);
        let ends = [
            Buffer::readable(header, 16),
            Buffer::writable(header + 16, 1),
        ];
        let head = queue.chain(memory, &[ends[0], buffer, ends[1]]);
        queue.offer(memory, head);
        disk.front.start_at(&disk.queues[0], base);
        for slot in 0..5 {
            disk.queues[0].wait_used(&disk.front.memory);
            assert!(slot < 4 || (0..5).all(|n| status(&disk.front.memory, n) == OK));
        }
        if kind == IN {
            let got = disk.front.memory.read(data, BLOCK as usize);
            assert!(got == rows[2].data(), "{aio:?}: the read was first");
        }
        let image = disk.image();
        for (nth, one) in rows.iter().enumerate() {
            let want = if kind == WRITE_ZEROES && nth == 2 {
                vec![0; BLOCK as usize]
            } else {
                one.data()
            };
            assert!(image[one.place()] == want, "{aio:?}, {kind}: {one:?}");
        }
        disk.finish();
    }
}

#[test]
fn the_limit_counts_each_write_of_a_row() {
    const IOPS: u32 = 400;
    let mut disk = disk(Options {
        io: BlockIo {
            iops_total: IOPS,
            ..IO
        },
        ..PLAIN
    });
    let asked: Vec<Asked> = (0..MANY).map(|n| Asked::block(n as u64, 1)).collect();
    let start = Instant::now();
    let rounds = 6;
    for _ in 0..rounds {
        assert_eq!(at_once(&mut disk, &asked), [OK; MANY]);
    }
    let least = (rounds * MANY) as f64 / f64::from(IOPS) * 0.98 - 0.1;
    let took = start.elapsed().as_secs_f64();
    assert!(took >= least, "{took} s, at least {least} s wanted");
    disk.finish();
}

/// Killed while a row is on its way, at its beginning, in its middle or at its end: the next process finishes it.
#[test]
fn a_process_that_is_killed_in_a_row_loses_none_of_it() {
    let spec = || {
        DeviceSpec::Block(BlockSpec {
            id: "disk0".into(),
            readonly: false,
            direct: false,
            serial: String::new(),
            num_queues: 1,
            queue_size: 64,
            io: Default::default(),
        })
    };
    let mut disk = disk(PLAIN);
    disk.front.stop(&disk.queues[0]);
    let (region, inflight) = disk.front.track_inflight(1, 64);
    disk.front.start(&disk.queues[0]);
    let Disk {
        mut process,
        mut front,
        mut queues,
        file,
    } = disk;
    let queue = &mut queues[0];
    for round in 0..40u16 {
        let mut asked: Vec<Asked> = (0..MANY as u64)
            .map(|nth| Asked {
                kind: OUT,
                sector: u64::from(round) + nth * 24,
                pieces: vec![24 * 512],
                fill: (round * 31) as u8 ^ nth as u8,
            })
            .collect();
        // Taken first, and done last: what is in flight is not what the used index tells.
        asked[0] = Asked {
            kind: FLUSH,
            sector: 0,
            pieces: vec![],
            fill: 0,
        };
        let mut heads = offer(&front.memory, queue, &asked);
        let before = queue.used_index(&front.memory);
        queue.kick();
        while queue.used_index(&front.memory).wrapping_sub(before) < round % 4 {
            std::hint::spin_loop();
        }
        process.kill();
        process.finish();
        process = DeviceProcess::start(BINARY, spec(), vec![open(&file, PLAIN)]);
        front = TestFrontend::connect_with(process.socket(), F_FLUSH, front.memory);
        front.use_inflight(&region, &inflight);
        front.start_at(queue, 0);
        for _ in 0..MANY {
            let (head, _) = queue.wait_used(&front.memory);
            let at = heads.iter().position(|one| *one == head);
            heads.swap_remove(at.unwrap_or_else(|| panic!("round {round}: {head} twice")));
        }
        let image = std::fs::read(file.path()).unwrap();
        for (slot, one) in asked.iter().enumerate() {
            assert_eq!(status(&front.memory, slot), OK, "round {round}, {slot}");
            assert!(image[one.place()] == one.data(), "round {round}: {one:?}");
        }
    }
    drop(front);
    process.finish_well();
}
