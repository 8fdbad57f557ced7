//! # `block`: requests of a driver to the disk
//!
//! Chains go through the ring, the chain walk, the request parser and the engine to a file of 64 KiB. Whatever is asked, the
//! file keeps its size, and a read-only disk its contents.

use crate::bytes::Input;
use crate::chains::{Queue, REGIONS};
use crate::{once, planted};
use block_device::Block;
use device_host::fuzzing::{Bench, backend_fds};
use ipc::spec::DeviceSpec;
use ipc::spec::block::BlockSpec;
use std::fs::File;
use std::os::unix::fs::{FileExt, OpenOptionsExt};

const SIZE: u64 = 0x1_0000;

struct Disk {
    bench: Bench<Block>,
    image: File,
}

fn disk(readonly: bool) -> Disk {
    let dir = tempfile::tempdir().expect("a folder");
    let path = dir.path().join("disk");
    let image = File::create_new(&path).expect("an image");
    image.set_len(SIZE).expect("an image");
    let image = File::options()
        .read(true)
        .write(true)
        .open(&path)
        .expect("an image");
    let fd = File::options()
        .read(true)
        .write(!readonly)
        .custom_flags(libc::O_CLOEXEC)
        .open(&path)
        .expect("an image");
    let start = crate::start::message(DeviceSpec::Block(BlockSpec {
        id: "disk".into(),
        readonly,
        direct: false,
        serial: "fuzz".into(),
        num_queues: 2,
        queue_size: 256,
        io: Default::default(),
    }));
    let mut fds = backend_fds(vec![fd.into()]);
    let device = Block::build(&start, &mut fds).expect("a disk");
    Disk {
        bench: Bench::new(device, &REGIONS),
        image,
    }
}

/// One input.
pub fn run(data: &[u8]) {
    let mut input = Input(data);
    let kind = input.byte();
    let queue = Queue::read(&mut input);
    let serve = |disk: &mut Disk| {
        let bench = &disk.bench;
        bench.reset();
        bench.accept(queue.features);
        queue.place(bench);
        let index = u16::from(kind >> 1 & 1);
        bench.start(&queue.shape(index));
        assert!(bench.turns(4), "a guest ended the process");
        let used = queue.used(bench);
        assert_eq!(disk.image.metadata().expect("fstat").len(), SIZE);
        // A read of a whole sector, through an indirect table.
        planted!(used.iter().any(|(_, len)| *len == 513) && queue.features & 1 << 28 != 0);
        let _ = used;
    };
    if kind & 1 == 0 {
        once!(Disk, disk(false), serve);
    } else {
        once!(Disk, disk(true), |disk: &mut Disk| {
            serve(disk);
            let mut sector = [0; 512];
            disk.image.read_exact_at(&mut sector, 0).expect("pread");
            assert_eq!(sector, [0; 512], "a read-only disk was written");
        });
    }
}
