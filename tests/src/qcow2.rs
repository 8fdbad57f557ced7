//! # qcow2 images in tests
//!
//! **Job.** Makes images, asks `qemu-img` about them, has a guest write to one without a pause, and does to one what its process does.
//! **Who is not trusted.** The product: `qemu-img` knows the format from elsewhere. **Why this way.** Several suites judge the same
//! images by the same words.
#![allow(clippy::unwrap_used, clippy::missing_panics_doc)] // in a test, a panic is the report

use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use ipc::spec::block::{BlockIo, BlockSpec, ImageFormat};
use nix::errno::Errno;
use qcow2_disk::Format;

use crate::chance::Chance;
use crate::host::{require_kvm, require_root};
use crate::lab::ensure_packages;
use crate::payload::Payload;
use crate::qmp::Qmp;
use crate::vm::Vm;

/// What `qemu-img` says to these words about these files.
#[must_use]
pub fn qemu_img(words: &[&str], files: &[&Path]) -> Output {
    ensure_packages(&["qemu-utils"]).unwrap();
    let mut command = Command::new("qemu-img");
    command.args(words).args(files).output().unwrap()
}

/// As [`qemu_img`], which must be content with them.
#[track_caller]
pub fn well(words: &[&str], files: &[&Path]) {
    let output = qemu_img(words, files);
    assert!(output.status.success(), "{words:?} {output:?}");
}

/// An image of 4 MiB.
#[must_use]
pub fn create(dir: &Path, name: &str, options: &[&str]) -> PathBuf {
    create_sized(dir, name, options, "4M")
}

/// An image of this size.
#[must_use]
pub fn create_sized(dir: &Path, name: &str, options: &[&str], size: &str) -> PathBuf {
    let path = dir.join(name);
    let words: Vec<&str> = ["create", "-q", "-f", "qcow2"]
        .into_iter()
        .chain(options.iter().copied())
        .collect();
    ensure_packages(&["qemu-utils"]).unwrap();
    let output = Command::new("qemu-img")
        .args(words)
        .arg(&path)
        .arg(size)
        .output()
        .unwrap();
    assert!(output.status.success(), "{output:?}");
    path
}

/// Kinds of images that differ in how they are laid out, each with what `qemu-img convert` makes one of. Every one counts several
/// references to a cluster.
pub const KINDS: [(&str, &[&str]); 7] = [
    ("plain", &[]),
    ("small", &["-o", "cluster_size=512"]),
    ("large", &["-o", "cluster_size=256k"]),
    ("old", &["-o", "compat=0.10"]),
    ("packed", &["-c"]),
    ("narrow", &["-o", "refcount_bits=4"]),
    ("wide", &["-o", "refcount_bits=64,cluster_size=1k"]),
];

/// An image of what a raw file has.
#[track_caller]
#[must_use]
pub fn converted(raw: &Path, name: &str, options: &[&str]) -> PathBuf {
    let image = raw.with_file_name(name);
    let convert = ["convert", "-q", "-f", "raw", "-O", "qcow2"];
    let words: Vec<&str> = convert.iter().chain(options).copied().collect();
    well(&words, &[raw, &image]);
    image
}

/// A raw file, 4 MiB of a pattern.
#[must_use]
pub fn pattern(dir: &Path, name: &str) -> PathBuf {
    let path = dir.join(name);
    let bytes: Vec<u8> = (0..4u32 << 20).map(|at| (at / 512 % 251) as u8).collect();
    std::fs::write(&path, bytes).unwrap();
    path
}

/// A `-drive` with this id and file.
#[must_use]
pub fn drive(id: &str, file: &Path, more: &str) -> String {
    format!("id={id},file={}{more}", file.display())
}

/// Sectors that `blk-loop` goes round in: each burst takes clusters that nobody had, as long as the test runs.
pub const SPAN: u64 = 120_000;

/// What `blk-loop` writes: two times two sectors in each burst.
#[must_use]
pub fn written(burst: u64, place: u64) -> Vec<u8> {
    let word =
        |word: u64| ((burst + 1) << 40 ^ place << 20 ^ word).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    (0..128).flat_map(|n| word(n).to_le_bytes()).collect()
}

/// A guest that writes without a pause to a new image in small clusters, so that most bursts make a table of it.
#[must_use]
pub fn busy(dir: &Path) -> (Vm, Qmp, PathBuf) {
    // Tables of 64 and 256 entries.
    let image = create_sized(dir, "image", &["-o", "cluster_size=512"], "64M");
    let device = drive("d", &image, ",format=qcow2,direct=off,max-size=1073741824");
    require_kvm();
    require_root();
    let vm = Vm::builder()
        .args(["-machine", "microvm", "-m", "128"])
        .kernel(&Payload::BlkLoop.path(), &format!("spin=1 span={SPAN}"))
        .arg("-drive")
        .arg(device)
        .args([
            "-device",
            "virtio-blk-device,drive=d,id=disk,max-restarts=100",
        ])
        .with_qmp()
        .start()
        .unwrap();
    let qmp = vm.qmp().unwrap();
    (vm, qmp, image)
}

/// What snapshot `name` of an image has, or without a name the disk.
#[track_caller]
#[must_use]
pub fn content(image: &Path, name: Option<&str>) -> Vec<u8> {
    let raw = image.with_extension("raw");
    let snapshot = name.map(|name| format!("snapshot.name={name}"));
    let mut words = vec!["convert", "-f", "qcow2", "-O", "raw"];
    if let Some(snapshot) = &snapshot {
        words.extend(["-l", snapshot]);
    }
    well(&words, &[image, &raw]);
    std::fs::read(raw).unwrap()
}

/// An image as its process has it.
#[track_caller]
#[must_use]
pub fn opened(image: &Path) -> Box<dyn Format> {
    let file = std::fs::File::options().read(true).write(true).open(image);
    let mut fds = vec![std::os::fd::OwnedFd::from(file.unwrap())];
    let spec = BlockSpec {
        id: "disk".into(),
        readonly: false,
        direct: false,
        serial: String::new(),
        num_queues: 1,
        queue_size: 256,
        io: BlockIo {
            format: ImageFormat::Qcow2 {
                below: 0,
                raw_base: false,
                most: u64::MAX,
            },
            ..BlockIo::default()
        },
    };
    qcow2_disk::open(&spec, false, || fds.pop()).unwrap()
}

/// Writes, zeroes and discards at random places of the disk, as its process does when a guest asks for it.
#[track_caller]
pub fn disturb(open: &mut dyn Format, disk: &mut [u8], chance: &mut Chance, times: usize) {
    let sectors = disk.len() as u64 / 512;
    for _ in 0..times {
        let first = chance.below(sectors);
        let count = (1 + chance.below(300)).min(sectors - first);
        let (at, len) = (first * 512, count * 512);
        let range = &mut disk[at as usize..(at + len) as usize];
        match chance.below(4) {
            kind @ 0..=1 => match open.zero(at, len, kind == 0) {
                Ok(()) => range.fill(0),
                // Version 2 has no clusters of zeroes: the device writes some.
                Err(errno) => assert_eq!(errno, Errno::EOPNOTSUPP),
            },
            _ => {
                range.fill(chance.below(255) as u8 + 1);
                open.write(range, at).unwrap();
            }
        }
        open.commit().unwrap();
    }
    open.flush().unwrap();
}
