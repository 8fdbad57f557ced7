//! # Debian's stock kernel as a guest
//!
//! **Job.** What the product is for, with a guest that nobody made to suit it: boot from each kernel format, disk,
//! network, processors, reboot, power. Each test runs where Linux boots, in the nested lab if need be.
//! **Who is not trusted.** The VMM; and the guest, whose claims are checked on the host side.
//! **Why this way.** The disk is verified with `e2fsck` and by checksum, the network by what arrives.
#![allow(clippy::unwrap_used)] // in a test, a panic is the report

use std::fs;
use std::io::{Read, Write};
use std::net::TcpListener;
use std::path::Path;
use std::process::Command;
use std::time::Duration;
use tests::host::{Tap, check_ext4, ext4_image, read_from_ext4};
use tests::lab::{Flavour, Guest, Script, where_linux_boots};
use tests::test_path;
use tests::vm::{Vm, VmBuilder, ends_well, expect};
use tests::wait::accept;

/// Two emulations deep, a boot takes five seconds; this is for a machine that is also busy.
const LIMIT: Duration = Duration::from_secs(90);
const APPEND: &str = "console=ttyS0 quiet panic=-1 reboot=k";

fn guest() -> Guest {
    Guest::ready(Flavour::Cloud).unwrap()
}

fn vm(kernel: &Path, initrd: &Path, append: &str) -> VmBuilder {
    vm_of(256, kernel, initrd, append)
}

fn vm_of(mebibytes: u32, kernel: &Path, initrd: &Path, append: &str) -> VmBuilder {
    Vm::builder()
        .args(["-machine", "microvm", "-m", &mebibytes.to_string()])
        .kernel(kernel, &format!("{APPEND} {append}"))
        .arg("-initrd")
        .arg(initrd)
}

#[track_caller]
fn line_after(vm: &mut Vm, text: &str) -> String {
    expect(vm, text);
    vm.console.rest_of_line(LIMIT).unwrap()
}

#[test]
fn an_elf_kernel_boots_and_powers_off() {
    where_linux_boots(test_path!(), || {
        let guest = guest();
        let mut vm = vm(&guest.kernel.elf, &guest.initrd, "run=uname+-r")
            .start()
            .unwrap();
        expect(&mut vm, "GUEST-UP");
        expect(&mut vm, &guest.kernel.release);
        expect(&mut vm, "GUEST-END status=0");
        ends_well(&mut vm);
    });
}

#[test]
fn a_bzimage_boots_and_powers_off() {
    where_linux_boots(test_path!(), || {
        let guest = guest();
        let mut vm = vm(&guest.kernel.bzimage, &guest.initrd, "run=uname+-r")
            .start()
            .unwrap();
        expect(&mut vm, "GUEST-UP");
        expect(&mut vm, &guest.kernel.release);
        ends_well(&mut vm);
    });
}

#[test]
fn a_disk_is_mounted_written_and_clean_afterwards() {
    where_linux_boots(test_path!(), || {
        let guest = guest();
        let dir = tempfile::tempdir().unwrap();
        let content = dir.path().join("content");
        fs::create_dir(&content).unwrap();
        fs::write(content.join("from-host"), "written on the host\n").unwrap();
        let disk = dir.path().join("disk.img");
        ext4_image(&disk, 64, &content).unwrap();
        let script = Script::new(
            "set -e\n\
             mkdir -p /d\n\
             mount -t ext4 /dev/vda /d\n\
             echo SERIAL=$(cat /sys/block/vda/serial) RO=$(cat /sys/block/vda/ro)\n\
             cat /d/from-host\n\
             dd if=/dev/urandom of=/d/data bs=64k count=256 2>/dev/null\n\
             sync\n\
             echo SUM=$(md5sum < /d/data | cut -d' ' -f1)\n\
             umount /d\n",
        );
        let initrd = guest.initrd_with(&script).unwrap();
        let mut vm = vm(&guest.kernel.elf, initrd.path(), "")
            .arg("-drive")
            .arg(format!("id=d0,file={},direct=off", disk.display()))
            .args([
                "-device",
                "virtio-blk-device,drive=d0,id=b0,serial=lab-disk",
            ])
            .start()
            .unwrap();
        assert_eq!(line_after(&mut vm, "SERIAL="), "lab-disk RO=0");
        expect(&mut vm, "written on the host");
        let sum = line_after(&mut vm, "SUM=");
        expect(&mut vm, "GUEST-END status=0");
        ends_well(&mut vm);
        check_ext4(&disk).unwrap();
        let data = dir.path().join("data");
        fs::write(&data, read_from_ext4(&disk, "/data").unwrap()).unwrap();
        assert_eq!(fs::metadata(&data).unwrap().len(), 16 << 20);
        assert_eq!(md5(&data), sum);
    });
}

#[test]
fn a_readonly_disk_is_readonly_in_the_guest() {
    where_linux_boots(test_path!(), || {
        let guest = guest();
        let dir = tempfile::tempdir().unwrap();
        let disk = dir.path().join("disk.img");
        fs::write(&disk, vec![7; 1 << 20]).unwrap();
        let script = Script::new(
            "echo RO=$(cat /sys/block/vda/ro)\n\
             dd if=/dev/zero of=/dev/vda bs=4k count=1 2>&1 && exit 1\n\
             cmp -n 1048576 /dev/vda /dev/vda && echo SUM=$(md5sum < /dev/vda | cut -d' ' -f1)\n",
        );
        let initrd = guest.initrd_with(&script).unwrap();
        let mut vm = vm(&guest.kernel.elf, initrd.path(), "")
            .disk("d0", &disk, ",readonly=on")
            .start()
            .unwrap();
        assert_eq!(line_after(&mut vm, "RO="), "1");
        assert_eq!(line_after(&mut vm, "SUM="), md5(&disk));
        expect(&mut vm, "GUEST-END status=0");
        ends_well(&mut vm);
        assert!(fs::read(&disk).unwrap().iter().all(|&b| b == 7));
    });
}

#[test]
fn the_network_carries_pings_and_a_hundred_megabytes_each_way() {
    where_linux_boots(test_path!(), || {
        const SIZE: usize = 100_000_000;
        let guest = guest();
        let tap = Tap::new("sv-linux", "10.0.2.1/24").unwrap();
        let dir = tempfile::tempdir().unwrap();
        let data = dir.path().join("data");
        fs::write(&data, noise(SIZE)).unwrap();
        let script = Script::new(
            "set -e\n\
             ip addr add 10.0.2.2/24 dev eth0; ip link set eth0 up\n\
             echo MAC=$(cat /sys/class/net/eth0/address)\n\
             ping -c 3 -i 0.2 10.0.2.1\n\
             nc 10.0.2.1 5000 < /dev/null > /tmp/data\n\
             echo SUM=$(md5sum < /tmp/data | cut -d' ' -f1)\n\
             nc 10.0.2.1 5001 < /tmp/data\n\
             echo NET-DONE; read line\n",
        );
        let initrd = guest.initrd_with(&script).unwrap();
        let (down, up) = (
            TcpListener::bind("10.0.2.1:5000").unwrap(),
            TcpListener::bind("10.0.2.1:5001").unwrap(),
        );
        let mut vm = vm_of(768, &guest.kernel.elf, initrd.path(), "")
            .tap("n0", &tap.name, "52:54:00:aa:bb:cc")
            .start()
            .unwrap();
        assert_eq!(line_after(&mut vm, "MAC="), "52:54:00:aa:bb:cc");
        expect(&mut vm, "3 packets transmitted, 3 packets received");
        let mut stream = accept(&down, LIMIT).unwrap();
        stream.write_all(&fs::read(&data).unwrap()).unwrap();
        drop(stream);
        assert_eq!(line_after(&mut vm, "SUM="), md5(&data), "host to guest");
        let mut stream = accept(&up, LIMIT).unwrap();
        let mut back = Vec::new();
        stream.read_to_end(&mut back).unwrap();
        drop(stream); // the guest's nc waits for it
        assert!(
            back == fs::read(&data).unwrap(),
            "guest to host: {} bytes",
            back.len()
        );
        expect(&mut vm, "NET-DONE");
        // and the host reaches the guest
        let ping = Command::new("ping")
            .args(["-c", "3", "-i", "0.2", "-W", "5", "10.0.2.2"])
            .output()
            .unwrap();
        assert!(
            ping.status.success(),
            "{}",
            String::from_utf8_lossy(&ping.stdout)
        );
        vm.console.send("\n").unwrap();
        expect(&mut vm, "GUEST-END status=0");
        ends_well(&mut vm);
    });
}

#[test]
fn a_reboot_happens_in_place_twice_with_its_disk() {
    where_linux_boots(test_path!(), || {
        let guest = guest();
        let dir = tempfile::tempdir().unwrap();
        let content = dir.path().join("content");
        fs::create_dir(&content).unwrap();
        let disk = dir.path().join("disk.img");
        ext4_image(&disk, 16, &content).unwrap();
        let script = Script::new(
            "mkdir -p /d; mount -t ext4 /dev/vda /d; echo boot >> /d/boots; umount /d; mount -t ext4 -o ro /dev/vda /d\n\
             echo BOOTS=$(wc -l < /d/boots); umount /d; read next\n\
             [ \"$next\" = reboot ] && reboot -f\n",
        );
        let initrd = guest.initrd_with(&script).unwrap();
        let mut vm = vm(&guest.kernel.elf, initrd.path(), "")
            .disk("d0", &disk, "")
            .start()
            .unwrap();
        assert_eq!(line_after(&mut vm, "BOOTS="), "1");
        let processes = vm.processes().unwrap();
        for boot in ["2", "3"] {
            vm.console.send("reboot\n").unwrap();
            assert_eq!(line_after(&mut vm, "BOOTS="), boot);
            assert_eq!(
                vm.processes().unwrap(),
                processes,
                "the same processes serve on"
            );
        }
        vm.console.send("off\n").unwrap();
        expect(&mut vm, "GUEST-END");
        ends_well(&mut vm);
        check_ext4(&disk).unwrap();
    });
}

#[test]
fn no_reboot_ends_the_vm_instead() {
    where_linux_boots(test_path!(), || {
        let guest = guest();
        let mut vm = vm(&guest.kernel.elf, &guest.initrd, "then=reboot")
            .arg("-no-reboot")
            .start()
            .unwrap();
        expect(&mut vm, "GUEST-END");
        ends_well(&mut vm);
    });
}

#[test]
fn two_processors_are_seen_and_used() {
    where_linux_boots(test_path!(), || {
        let guest = guest();
        let script = Script::new(
            "taskset 1 sh -c 'echo FIRST=$(cut -d\" \" -f39 /proc/self/stat)'\n\
             taskset 2 sh -c 'echo SECOND=$(cut -d\" \" -f39 /proc/self/stat)'\n\
             grep -c ^processor /proc/cpuinfo\n",
        );
        let initrd = guest.initrd_with(&script).unwrap();
        let mut vm = vm(&guest.kernel.elf, initrd.path(), "")
            .args(["-smp", "2"])
            .start()
            .unwrap();
        assert!(line_after(&mut vm, "GUEST-UP").contains("cpus=2"));
        assert_eq!(line_after(&mut vm, "FIRST="), "0");
        assert_eq!(line_after(&mut vm, "SECOND="), "1");
        expect(&mut vm, "GUEST-END status=0");
        ends_well(&mut vm);
    });
}

#[test]
fn the_power_button_reaches_the_guest() {
    where_linux_boots(test_path!(), || {
        let guest = guest();
        // One input event is 24 bytes; the guest reads one and powers off by its own will. Nobody keeps an event for who
        // opens the button later.
        let script = Script::new(
            "exec 3</dev/input/event0; echo READY; dd bs=24 count=1 <&3 2>/dev/null | wc -c\n",
        );
        let initrd = guest.initrd_with(&script).unwrap();
        let mut vm = vm(&guest.kernel.elf, initrd.path(), "")
            .with_qmp()
            .start()
            .unwrap();
        expect(&mut vm, "READY");
        let mut qmp = vm.qmp().unwrap();
        qmp.execute("system_powerdown", serde_json::json!({}))
            .unwrap();
        qmp.wait_event("POWERDOWN", LIMIT).unwrap();
        expect(&mut vm, "24");
        expect(&mut vm, "GUEST-END status=0");
        qmp.wait_event("SHUTDOWN", LIMIT).unwrap();
        ends_well(&mut vm);
    });
}

/// Bytes that do not compress and do not repeat within any page (xorshift).
fn noise(size: usize) -> Vec<u8> {
    let mut state = 0x9e37_79b9_7f4a_7c15_u64;
    let words = std::iter::repeat_with(|| {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state.to_le_bytes()
    });
    words.take(size.div_ceil(8)).flatten().take(size).collect()
}

fn md5(file: &Path) -> String {
    let output = Command::new("md5sum").arg(file).output().unwrap();
    String::from_utf8(output.stdout)
        .unwrap()
        .split_whitespace()
        .next()
        .unwrap()
        .to_owned()
}
