//! # A power failure
//!
//! **Job.** What a guest was told is durable is there after the whole machine has lost its power in the middle of more writes,
//! whatever kind of image it is in. **Who is not trusted.** The VMM, the kernel between the image and its disk, and the guest's word:
//! the sums are taken again on the host.
//!
//! **Why this way.** A killed process loses nothing, since what it wrote is the kernel's. So the kernel dies: the VM runs in the nested
//! machine with its images on a disk of that one, which is reset without a word. What was not flushed by then is in no file here.
#![allow(clippy::unwrap_used)] // in a test, a panic is the report

use std::fs::{self, File};
use std::io::Write;
use std::path::Path;
use std::process::Command;
use std::time::Duration;

use tests::host::{ext4_image, read_from_ext4, recover_ext4, require_root};
use tests::lab::{
    Flavour, Guest, Nested, Script, chain, cut_the_power, ensure_packages, in_nested,
    until_the_power_fails,
};
use tests::test_path;
use tests::vm::Vm;

const LIMIT: Duration = Duration::from_secs(120);
/// A folder that the nested machine has in common with this one, under its path.
const SHARED: &str = concat!(env!("CARGO_TARGET_TMPDIR"), "/power-failure");
/// Where the nested machine has its disk.
const MOUNTED: &str = "/run/images";
/// Files that are durable in each image before the power fails.
const FILES: usize = 6;
/// Images on that disk, with what the VM is told of each.
const IMAGES: [(&str, &str); 3] = [
    ("cached.img", ",direct=off"),
    ("direct.img", ""),
    ("cached.qcow2", ",direct=off,format=qcow2"),
];

fn run(program: &str, words: &[&str], files: &[&Path]) {
    let status = Command::new(program).args(words).args(files).status();
    assert!(status.unwrap().success(), "{program} {words:?} {files:?}");
}

#[test]
fn what_a_guest_has_flushed_outlives_a_power_failure() {
    require_root();
    let dir = Path::new(SHARED);
    let told = dir.join("told");
    if in_nested() {
        write_until_the_end(&told);
    }
    ensure_packages(&["qemu-utils", "e2fsprogs"]).unwrap();
    // What a run that was ended left there.
    let _ = fs::remove_dir_all(dir);
    fs::create_dir(dir).unwrap();
    let content = dir.join("content");
    fs::create_dir(&content).unwrap();
    let seed = dir.join("seed.img");
    ext4_image(&seed, 48, &content).unwrap();
    let disk = dir.join("disk.img");
    for (name, _) in &IMAGES[..2] {
        run("cp", &["--sparse=always"], &[&seed, &content.join(name)]);
    }
    let words = ["convert", "-f", "raw", "-O", "qcow2"];
    run("qemu-img", &words, &[&seed, &content.join(IMAGES[2].0)]);
    ext4_image(&disk, 512, &content).unwrap();
    let nested = Nested {
        share: Some(dir.to_owned()),
        qemu: vec![
            "-drive".into(),
            format!("id=images,if=none,format=raw,file={}", disk.display()),
            "-device".into(),
            "virtio-blk-pci,drive=images".into(),
        ],
        ..Nested::default()
    };
    until_the_power_fails(&nested, test_path!());

    recover_ext4(&disk).unwrap();
    let told = fs::read_to_string(&told).unwrap();
    for (number, (name, more)) in IMAGES.into_iter().enumerate() {
        let image = dir.join("after");
        fs::write(&image, read_from_ext4(&disk, &format!("/{name}")).unwrap()).unwrap();
        if more.contains("qcow2") {
            // 3: clusters that nobody uses; 2 would be damage.
            let checked = Command::new("qemu-img")
                .args(["check", "-f", "qcow2"])
                .arg(&image)
                .output()
                .unwrap();
            assert!(matches!(checked.status.code(), Some(0 | 3)), "{checked:?}");
            let raw = dir.join("raw");
            run(
                "qemu-img",
                &["convert", "-f", "qcow2", "-O", "raw"],
                &[&image, &raw],
            );
            fs::rename(raw, &image).unwrap();
        }
        recover_ext4(&image).unwrap_or_else(|e| panic!("{name}: {}", chain(&e)));
        for file in 1..=FILES {
            let data = read_from_ext4(&image, &format!("/f{file}")).unwrap();
            let copy = dir.join("data");
            fs::write(&copy, &data).unwrap();
            let sum = Command::new("md5sum").arg(&copy).output().unwrap();
            let sum = String::from_utf8(sum.stdout).unwrap()[..32].to_owned();
            let line = format!("{number} {file} {sum}\n");
            assert!(told.contains(&line), "{name}: {line} is not among\n{told}");
        }
    }
    fs::remove_dir_all(dir).unwrap();
}

/// In the nested machine: a guest fills its disks, and as soon as it has said that enough is durable, there is no machine any more.
fn write_until_the_end(told: &Path) -> ! {
    fs::create_dir(MOUNTED).unwrap();
    run("mount", &["-t", "ext4", "/dev/vda", MOUNTED], &[]);
    let guest = Guest::ready(Flavour::Cloud).unwrap();
    let script = Script::new(&format!(
        "set -e\n\
         for n in 0 1 2; do\n\
           d=/dev/vd$(echo abc | cut -c$((n + 1)))\n\
           mkdir /m$n; mount -t ext4 $d /m$n\n\
         done\n\
         for file in $(seq {FILES}); do for n in 0 1 2; do\n\
           dd if=/dev/urandom of=/m$n/f$file bs=64k count=8 conv=fsync 2>/dev/null\n\
           echo DURABLE $n $file $(md5sum < /m$n/f$file | cut -d' ' -f1)\n\
           dd if=/dev/urandom of=/m$n/more$file bs=64k count=8 2>/dev/null\n\
         done; done\n\
         while true; do for n in 0 1 2; do dd if=/dev/urandom of=/m$n/busy bs=64k count=32 2>/dev/null; done; done\n"
    ));
    let initrd = guest.initrd_with(&script).unwrap();
    let mut vm = Vm::builder()
        .args(["-machine", "microvm", "-m", "256"])
        .kernel(&guest.kernel.elf, "console=ttyS0 quiet panic=-1 reboot=k")
        .arg("-initrd")
        .arg(initrd.path());
    for (number, (name, more)) in IMAGES.into_iter().enumerate() {
        vm = vm
            .arg("-drive")
            .arg(format!("id=d{number},file={MOUNTED}/{name}{more}"))
            .arg("-device")
            .arg(format!("virtio-blk-device,drive=d{number},id=disk{number}"));
    }
    let mut vm = vm.start().unwrap();
    let mut lines = File::create(told).unwrap();
    for _ in 0..FILES * IMAGES.len() {
        vm.wait_for("DURABLE ", LIMIT)
            .unwrap_or_else(|e| panic!("{e}"));
        let line = vm.console.rest_of_line(LIMIT).unwrap();
        writeln!(lines, "{line}").unwrap();
    }
    lines.sync_all().unwrap();
    cut_the_power();
}
