//! # `qcow2`: an image, what is below it, and a guest that uses the disk
//!
//! The images are memory files, opened as the process `block-qcow2` opens its own; then ranges inside of the disk are read,
//! written, zeroed, discarded, committed and flushed, and snapshots inside of the image are listed, made and taken away. The disk is
//! no longer than its header says and is made of whole sectors; what is below it, and a read-only image, keep their bytes; what is told
//! of snapshots fits into an answer to the control process. An image is written in pieces, with zeroes between them: most of one is
//! zeroes, and mutations of those would reach nothing.

pub mod seeds;

use crate::bytes::Input;
use crate::planted;
use block_device::Format;
use ipc::disk::{Answer, Order};
use ipc::limits::MAX_DISK_ANSWER;
use ipc::spec::block::{BlockIo, BlockSpec, ImageFormat};
use nix::errno::Errno;
use nix::sys::memfd::{MFdFlags, memfd_create};
use std::fs::File;
use std::os::fd::OwnedFd;
use std::os::unix::fs::FileExt;

/// Bytes of a sector.
const SECTOR: u64 = 512;
/// Sectors of one operation.
const MOST: u64 = 256;
/// Operations of an input.
const OPERATIONS: u8 = 24;

/// Flag in the first byte: the lowest image is raw. The two bits below it count the images below the disk's.
pub const RAW_BASE: u8 = 4;
/// Flag in the first byte.
pub const READONLY: u8 = 8;

/// Numbers of the operations.
pub const READ: u8 = 0;
/// See [`READ`].
pub const WRITE: u8 = 1;
/// See [`READ`].
pub const ZERO: u8 = 2;
/// See [`READ`].
pub const DISCARD: u8 = 3;
/// See [`READ`].
pub const COMMIT: u8 = 4;
/// See [`READ`].
pub const FLUSH: u8 = 5;
/// Tells what snapshots there are.
pub const LIST: u8 = 6;
/// Makes a snapshot; half of its sector's number chooses one of [`NAMES`].
pub const SNAPSHOT: u8 = 7;
/// Takes the snapshot of that name away; if the number is odd, the one that has it as its id.
pub const DELETE: u8 = 8;
/// How many kinds there are.
const KINDS: u8 = 9;
/// Flag of an operation: its place is counted from the end of the disk.
pub const FROM_END: u8 = 0x80;

/// Of snapshots, and their ids: images number them from 1.
pub const NAMES: [&str; 4] = ["1", "2", "one", "two"];

/// Bytes of an image: a place is two bytes.
const LONGEST: usize = 1 << 16;

/// An image: pieces of place, length and bytes, of which there are `count`, as far as the input goes. It ends with a sector.
fn image(input: &mut Input<'_>, count: usize) -> Vec<u8> {
    let mut out = Vec::new();
    for _ in 0..count {
        if input.is_empty() {
            break;
        }
        let place = usize::from(input.u16());
        let len = usize::from(input.byte());
        let bytes = input.take(len.min(LONGEST - place));
        let end = place + bytes.len();
        if out.len() < end {
            out.resize(end.next_multiple_of(SECTOR as usize), 0);
        }
        out[place..end].copy_from_slice(bytes);
    }
    out
}

fn memory_file(bytes: &[u8]) -> File {
    let file: File = memfd_create(c"image", MFdFlags::MFD_CLOEXEC)
        .expect("memfd_create")
        .into();
    file.write_all_at(bytes, 0).expect("pwrite");
    file
}

fn is_unchanged(file: &File, bytes: &[u8]) -> bool {
    let mut now = vec![0; bytes.len()];
    file.metadata().expect("fstat").len() == bytes.len() as u64
        && file.read_exact_at(&mut now, 0).is_ok()
        && now == bytes
}

/// What the control process orders: the library answers, or says why not.
fn order(disk: &mut dyn Format, kind: u8, choice: u16) -> Result<(), Errno> {
    let name = NAMES[usize::from(choice / 2) % NAMES.len()].to_owned();
    let by_id = choice % 2 == 1;
    let answer = disk.order(&match kind {
        LIST => Order::List,
        SNAPSHOT => Order::Create {
            name,
            seconds: 1,
            nanoseconds: 2,
            clock: 3,
        },
        _ if by_id => Order::Delete {
            id: Some(name),
            name: None,
        },
        _ => Order::Delete {
            id: None,
            name: Some(name),
        },
    })?;
    assert!(
        ipc::codec::encode_within::<MAX_DISK_ANSWER, _>(&answer).is_ok(),
        "an answer that cannot be given"
    );
    let fits = match kind {
        LIST => matches!(answer, Answer::Image { .. }),
        SNAPSHOT => matches!(answer, Answer::Created | Answer::Exists),
        _ => matches!(answer, Answer::Deleted(_) | Answer::Unknown),
    };
    assert!(fits, "{answer:?} to an order of kind {kind}");
    Ok(())
}

/// Whether the disk's last sector was written and then discarded.
fn work(disk: &mut dyn Format, mut operations: Input<'_>) -> bool {
    let sectors = disk.size() / SECTOR;
    let (mut written, mut discarded) = (false, false);
    let mut buffer = Vec::new();
    while !operations.is_empty() && sectors > 0 {
        let kind = operations.byte();
        let chosen = operations.u16();
        let place = u64::from(chosen) % sectors;
        let sector = if kind & FROM_END == 0 {
            place
        } else {
            sectors - 1 - place
        };
        let count = (u64::from(operations.byte()) + 1)
            .min(MOST)
            .min(sectors - sector);
        let (at, len) = (sector * SECTOR, count * SECTOR);
        let kind = (kind & !FROM_END) % KINDS;
        // A write is committed before its guest is told, as `Formatted` does it.
        let result = match kind {
            READ => {
                buffer.resize(len as usize, 0);
                disk.read(&mut buffer, at)
            }
            WRITE => {
                buffer.resize(len as usize, 0);
                buffer.fill(0x5a);
                disk.write(&buffer, at).and_then(|()| disk.commit())
            }
            ZERO => disk.zero(at, len, false).and_then(|()| disk.commit()),
            DISCARD => disk.zero(at, len, true).and_then(|()| disk.commit()),
            COMMIT => disk.commit(),
            FLUSH => disk.flush(),
            _ => order(disk, kind, chosen),
        };
        if result.is_ok() && sector + count == sectors {
            written |= kind == WRITE;
            discarded |= written && kind == DISCARD;
        }
    }
    discarded
}

/// One input.
pub fn run(data: &[u8]) {
    let mut input = Input(data);
    let kind = input.byte();
    let below = (kind & 3).min(2);
    let readonly = kind & READONLY != 0;
    let raw_base = kind & RAW_BASE != 0 && below > 0;
    let count = input.byte().min(OPERATIONS);
    let operations = Input(input.take(usize::from(count) * 4));
    let mut contents = Vec::new();
    for _ in 0..below {
        let pieces = usize::from(input.byte());
        contents.push(image(&mut input, pieces));
    }
    contents.insert(0, image(&mut input, usize::MAX));
    let files: Vec<File> = contents.iter().map(|bytes| memory_file(bytes)).collect();
    let spec = BlockSpec {
        id: "disk".into(),
        readonly,
        direct: false,
        serial: String::new(),
        num_queues: 1,
        queue_size: 256,
        io: BlockIo {
            format: ImageFormat::Qcow2 {
                below,
                raw_base,
                most: 0,
            },
            ..BlockIo::default()
        },
    };
    let mut descriptors = files
        .iter()
        .map(|file| OwnedFd::from(file.try_clone().expect("dup")));
    let Ok(mut disk) = qcow2_disk::open(&spec, false, || descriptors.next()) else {
        return;
    };
    // What the file lacks is zeroes.
    let said = Input(contents[0].get(24..).unwrap_or_default()).array();
    assert!(disk.size() <= u64::from_be_bytes(said) && disk.size() % SECTOR == 0);
    let discarded = work(&mut *disk, operations);
    drop(disk);
    for (file, bytes) in files.iter().zip(&contents).skip(usize::from(!readonly)) {
        assert!(
            is_unchanged(file, bytes),
            "an image that is only read was written"
        );
    }
    planted!(below > 0 && discarded);
}
