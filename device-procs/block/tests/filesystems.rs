//! The same work on images wherever hosts keep them: each file system has its own alignment, its own ways to free a range, and its
//! own idea of what io_uring may do at once, and a block device has sectors that a file has not.

#![allow(clippy::unwrap_used)] // in a test, a panic is the report

mod disk;

use device_host::test_frontend::Buffer;
use disk::*;
use ipc::spec::block::{Aio, BlockIo, DetectZeroes};
use nix::mount::{MsFlags, mount};
use nix::sched::{CloneFlags, unshare};
use std::fs::File;
use std::io::{Read, Seek, SeekFrom};
use std::path::{Path, PathBuf};
use std::process::Command;
use tempfile::{NamedTempFile, TempDir};

/// XFS takes no device of less than 300 MiB; nearly all of it stays a hole.
const DEVICE: u64 = 320 << 20;
/// An odd number of 4096-byte blocks, so that no larger block divides the disk.
const IMAGE: u64 = SIZE + 4096;
/// A file system in user space that has no fallocate(2), so that zeroes have to be written.
const NO_FALLOCATE: &str = "ntfs-3g";
const NONE: Option<&str> = None;

fn run(program: &str, args: &[&str]) -> String {
    let output = Command::new(program).args(args).output().unwrap();
    assert!(output.status.success(), "{program} {args:?}: {output:?}");
    String::from_utf8(output.stdout).unwrap().trim().to_owned()
}

/// A loop device with sectors of its own size; gone with this value.
struct Loop(String);

impl Loop {
    fn on(file: &Path, sector: u32) -> Self {
        let sector = sector.to_string();
        let file = file.to_str().unwrap();
        Self(run(
            "losetup",
            &["--find", "--show", "--sector-size", &sector, file],
        ))
    }
}

impl Drop for Loop {
    fn drop(&mut self) {
        let _ = Command::new("losetup").args(["-d", &self.0]).status();
    }
}

/// Where an image lies. The mount is in this thread's own namespace and goes away with it; the fields drop in their order.
struct Place {
    name: &'static str,
    _device: Option<Loop>,
    _files: TempDir,
    folder: PathBuf,
}

impl Place {
    fn mounted(name: &'static str, sector: u32, mkfs: &[&str]) -> Self {
        let files = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
        let folder = files.path().join("mnt");
        std::fs::create_dir(&folder).unwrap();
        let device = (!mkfs.is_empty()).then(|| {
            let backing = files.path().join("device");
            File::create(&backing).unwrap().set_len(DEVICE).unwrap();
            let device = Loop::on(&backing, sector);
            run(mkfs[0], &[&mkfs[1..], &[&device.0]].concat());
            device
        });
        let kind = name.split(' ').next().unwrap();
        let source = device.as_ref().map_or("none", |device| &device.0);
        if kind == NO_FALLOCATE {
            run(kind, &[source, folder.to_str().unwrap()]);
            return Self {
                name,
                _device: device,
                _files: files,
                folder,
            };
        }
        mount(Some(source), &folder, Some(kind), MsFlags::empty(), NONE)
            .unwrap_or_else(|error| panic!("{name}: {error}"));
        Self {
            name,
            _device: device,
            _files: files,
            folder,
        }
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        let _ = nix::mount::umount2(&self.folder, nix::mount::MntFlags::MNT_DETACH);
    }
}

/// Mounts of this thread are its own from here on.
fn own_mounts() {
    tests::host::require_root();
    unshare(CloneFlags::CLONE_NEWNS).unwrap();
    let private = MsFlags::MS_REC | MsFlags::MS_PRIVATE;
    mount(NONE, "/", NONE, private, NONE).unwrap();
}

/// What a test file's own number makes of its seed: xorshift, which names each step by its round.
fn next(state: &mut u64) -> u64 {
    *state ^= *state << 13;
    *state ^= *state >> 7;
    *state ^= *state << 17;
    *state
}

/// Writes, reads, frees and zeroes at places that no block divides, and reads the host's file back whole.
fn work(name: &str, file: NamedTempFile, direct: bool, aio: Aio) {
    let context = format!("{name}, direct={direct}, {aio:?}");
    let options = Options {
        size: IMAGE,
        direct,
        io: BlockIo {
            aio,
            discard: true,
            detect_zeroes: DetectZeroes::Unmap,
            ..IO
        },
        features: F_FLUSH | F_DISCARD | F_WRITE_ZEROES,
        ..PLAIN
    };
    let mut want = vec![0; IMAGE as usize];
    let mut disk = disk_on(file, options);
    let mut state = 0x5eed_0001;
    for round in 0..150_u64 {
        let sectors = 1 + next(&mut state) % 64;
        let sector = next(&mut state) % (IMAGE / 512 - sectors);
        let (start, len) = (sector as usize * 512, sectors as usize * 512);
        let context = format!("{context}, round {round}: {sectors} sectors at {sector}");
        // A guest's buffer begins anywhere.
        let at = DATA + next(&mut state) % 3 * 517;
        match round % 5 {
            0..=2 => {
                let text: Vec<u8> = match round % 3 {
                    // Which detect-zeroes looks for.
                    0 => vec![0; len],
                    _ => (0..len).map(|i| (i / 11) as u8 ^ round as u8).collect(),
                };
                disk.front.memory.write(at, &text);
                let data = [Buffer::readable(at, len as u32)];
                assert_eq!(disk.request(OUT, sector, &data), (OK, 1), "{context}");
                want[start..start + len].copy_from_slice(&text);
            }
            kind => {
                let kind = if kind == 3 { DISCARD } else { WRITE_ZEROES };
                let mut range = [0; 16];
                range[..8].copy_from_slice(&sector.to_le_bytes());
                range[8..12].copy_from_slice(&(sectors as u32).to_le_bytes());
                disk.front.memory.write(at, &range);
                let data = [Buffer::readable(at, 16)];
                let status = match kind {
                    // The driver writes them itself.
                    WRITE_ZEROES if name == NO_FALLOCATE => UNSUPP,
                    _ => OK,
                };
                assert_eq!(disk.request(kind, 0, &data), (status, 1), "{context}");
                // What is freed reads as zeroes where the host can free it. A disk may keep what it was only asked to free, in
                // whole or in part, so the guest's view becomes what is wanted, and must be one of the two.
                let read = read_back(&mut disk, sector, len, &context);
                let kept = &mut want[start..start + len];
                if kind == WRITE_ZEROES && status == OK {
                    kept.fill(0);
                }
                for (index, (byte, kept)) in read.iter().zip(kept).enumerate() {
                    assert!(*byte == 0 || byte == kept, "{context}, byte {index}");
                    *kept = *byte;
                }
            }
        }
        let read = read_back(&mut disk, sector, len, &context);
        assert!(read == want[start..start + len], "{context}");
    }
    assert_eq!(disk.request(FLUSH, 0, &[]), (OK, 1), "{context}");
    // Not `metadata().len()`, which is 0 for a block device.
    let mut image = vec![0; IMAGE as usize];
    let mut file = File::open(disk.file.path()).unwrap();
    file.read_exact(&mut image).unwrap();
    assert!(image == want, "{context}");
    disk.finish();
}

fn read_back(disk: &mut Disk, sector: u64, len: usize, context: &str) -> Vec<u8> {
    let at = DATA + (1 << 16) + sector % 5 * 3;
    disk.front.memory.write(at, &vec![0xaa; len]);
    let data = [Buffer::writable(at, len as u32)];
    let answer = disk.request(IN, sector, &data);
    assert_eq!(answer, (OK, len as u32 + 1), "{context}");
    disk.front.memory.read(at, len)
}

const WAYS: [(bool, Aio); 5] = [
    (false, Aio::Off),
    (false, Aio::IoUring),
    (true, Aio::Off),
    (true, Aio::IoUring),
    (true, Aio::Native),
];

#[test]
fn each_file_system_that_hosts_have_keeps_what_was_written() {
    own_mounts();
    tests::lab::ensure_packages(&["xfsprogs", "e2fsprogs", "ntfs-3g"]).unwrap();
    let places: [(&str, u32, &[&str]); 5] = [
        (NO_FALLOCATE, 512, &["mkfs.ntfs", "-Q", "-q"]),
        ("tmpfs", 512, &[]),
        ("ext4 of 1k blocks", 512, &["mkfs.ext4", "-q", "-b", "1024"]),
        ("xfs", 512, &["mkfs.xfs", "-q"]),
        (
            "xfs of 4k sectors",
            4096,
            &["mkfs.xfs", "-q", "-s", "size=4096"],
        ),
    ];
    for (name, sector, mkfs) in places {
        let place = Place::mounted(name, sector, mkfs);
        for (direct, aio) in WAYS {
            let file = NamedTempFile::new_in(&place.folder).unwrap();
            file.as_file().set_len(IMAGE).unwrap();
            work(place.name, file, direct, aio);
        }
    }
}

#[test]
fn block_devices_of_both_sector_sizes_keep_what_was_written() {
    tests::host::require_root();
    for sector in [512, 4096] {
        for (direct, aio) in WAYS {
            let backing = NamedTempFile::new_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
            backing.as_file().set_len(IMAGE).unwrap();
            let device = Loop::on(backing.path(), sector);
            let node = File::options()
                .read(true)
                .write(true)
                .open(&device.0)
                .unwrap();
            let mut size = &node;
            assert_eq!(size.seek(SeekFrom::End(0)).unwrap(), IMAGE);
            // The node is nobody's to delete.
            let mut path = NamedTempFile::from_parts(
                node,
                tempfile::TempPath::try_from_path(PathBuf::from(&device.0)).unwrap(),
            );
            path.disable_cleanup(true);
            work(&format!("{sector}-byte sectors"), path, direct, aio);
        }
    }
}

#[test]
fn an_image_of_huge_pages_can_be_read_and_is_refused_where_it_would_be_written() {
    own_mounts();
    let place = Place::mounted("hugetlbfs", 512, &[]);
    // All of it is a hole, which takes no page.
    let file = NamedTempFile::new_in(&place.folder).unwrap();
    file.as_file().set_len(4 << 20).unwrap();
    let refused = ipc::image::open(file.path(), false, false).unwrap_err();
    assert_eq!(
        refused.to_string(),
        "its file system has no write(2); use readonly=on if the guest only reads"
    );
    ipc::image::open(file.path(), true, false).unwrap();
    let mut disk = disk_on(
        file,
        Options {
            readonly: true,
            ..PLAIN
        },
    );
    let read = read_back(&mut disk, 1001, 40 * 512, "hugetlbfs");
    assert!(read == vec![0; 40 * 512]);
    disk.finish();
}
