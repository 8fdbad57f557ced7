//! A disk as a live process with its filter on, and its driver.

#![allow(dead_code, missing_docs, unreachable_pub, clippy::unwrap_used)] // each suite uses its part; in a test, a panic is the report

use device_host::test_frontend::{Buffer, DeviceProcess, DriverQueue, TestFrontend};
use ipc::spec::DeviceSpec;
use ipc::spec::block::{Aio, BlockIo, BlockSpec, DetectZeroes, ImageFormat, OnError};
use std::fs::OpenOptions;
use std::os::fd::OwnedFd;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use tempfile::NamedTempFile;

pub const BINARY: &str = env!("CARGO_BIN_EXE_block");
pub const HEADER: u64 = 0x8_0000;
pub const STATUS: u64 = 0x8_1000;
pub const DATA: u64 = 0x10_0000;
pub const SIZE: u64 = 1 << 20;

pub const IN: u32 = 0;
pub const OUT: u32 = 1;
pub const FLUSH: u32 = 4;
pub const GET_ID: u32 = 8;

pub const OK: u8 = 0;
pub const IOERR: u8 = 1;
pub const UNSUPP: u8 = 2;

pub const F_RO: u64 = 1 << 5;
pub const F_FLUSH: u64 = 1 << 9;
pub const F_MQ: u64 = 1 << 12;
pub const F_CONFIG_WCE: u64 = 1 << 11;
pub const F_DISCARD: u64 = 1 << 13;
pub const F_WRITE_ZEROES: u64 = 1 << 14;

pub const DISCARD: u32 = 11;
pub const WRITE_ZEROES: u32 = 13;

#[derive(Clone, Copy)]
pub struct Options {
    pub size: u64,
    pub readonly: bool,
    pub direct: bool,
    pub queues: u16,
    pub features: u64,
    pub io: BlockIo,
}

/// As without any property.
pub const IO: BlockIo = BlockIo {
    aio: Aio::Native,
    discard: false,
    detect_zeroes: DetectZeroes::Off,
    iops_total: 0,
    poll_us: 20,
    werror: OnError::Report,
    rerror: OnError::Report,
    format: ImageFormat::Raw,
};

pub const PLAIN: Options = Options {
    size: SIZE,
    readonly: false,
    direct: false,
    queues: 1,
    features: F_FLUSH,
    io: IO,
};

pub struct Disk {
    pub process: DeviceProcess,
    pub front: TestFrontend,
    pub queues: Vec<DriverQueue>,
    pub file: NamedTempFile,
}

pub fn open(file: &NamedTempFile, options: Options) -> OwnedFd {
    OpenOptions::new()
        .read(true)
        .write(!options.readonly)
        .custom_flags(if options.direct { libc::O_DIRECT } else { 0 })
        .open(file.path())
        .unwrap()
        .into()
}

pub fn disk(options: Options) -> Disk {
    // Not in /tmp, which may be a tmpfs and then knows no alignment.
    let file = NamedTempFile::new_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    let pattern: Vec<u8> = (0..options.size)
        .map(|at| (at / 512 + at % 251) as u8)
        .collect();
    file.as_file().write_all_at(&pattern, 0).unwrap();
    disk_on(file, options)
}

pub fn disk_on(file: NamedTempFile, options: Options) -> Disk {
    let spec = DeviceSpec::Block(BlockSpec {
        id: "disk0".into(),
        readonly: options.readonly,
        direct: options.direct,
        serial: "serial-0123456789".into(),
        num_queues: options.queues,
        queue_size: 64,
        io: options.io,
    });
    let mut process = DeviceProcess::start(BINARY, spec, vec![open(&file, options)]);
    let mut front = TestFrontend::connect(process.socket(), options.features);
    let queues: Vec<_> = (0..options.queues)
        .map(|index| DriverQueue::new(usize::from(index), 64, 0x1_0000 * u64::from(index)))
        .collect();
    for queue in &queues {
        front.start(queue);
    }
    Disk {
        process,
        front,
        queues,
        file,
    }
}

impl Disk {
    pub fn header(&self, kind: u32, sector: u64) {
        let mut header = [0; 16];
        header[..4].copy_from_slice(&kind.to_le_bytes());
        header[8..].copy_from_slice(&sector.to_le_bytes());
        self.front.memory.write(HEADER, &header);
        self.front.memory.write(STATUS, &[0xee]);
    }

    /// One request; returns its status and used length.
    pub fn request(&mut self, kind: u32, sector: u64, data: &[Buffer]) -> (u8, u32) {
        self.request_on(0, kind, sector, data)
    }

    pub fn request_on(
        &mut self,
        queue: usize,
        kind: u32,
        sector: u64,
        data: &[Buffer],
    ) -> (u8, u32) {
        self.header(kind, sector);
        let mut buffers = vec![Buffer::readable(HEADER, 16)];
        buffers.extend_from_slice(data);
        buffers.push(Buffer::writable(STATUS, 1));
        let used = self.queues[queue].request(&self.front.memory, &buffers);
        (self.front.memory.read(STATUS, 1)[0], used)
    }

    pub fn image(&self) -> Vec<u8> {
        std::fs::read(self.file.path()).unwrap()
    }

    pub fn finish(self) -> String {
        drop(self.front);
        self.process.finish_well()
    }
}
