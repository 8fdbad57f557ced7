//! # Bare guests on the machine's own `/dev/kvm`
//!
//! **Job.** Boot, platform, transport, disk and network card, driven by guests that do exactly what they are told and
//! run where Linux cannot. **Who is not trusted.** The VMM. **Why this way.** Seconds for the whole suite, on any KVM.
#![allow(clippy::unwrap_used)] // in a test, a panic is the report

use std::path::Path;
use std::time::Duration;
use tests::host::{Tap, require_kvm, require_root};
use tests::payload::Payload;
use tests::vm::{Vm, VmBuilder, ends_well, expect};

/// A bare guest needs milliseconds; this is for a busy machine.
const LIMIT: Duration = Duration::from_secs(30);

fn vm(payload: Payload, append: &str) -> VmBuilder {
    require_kvm();
    require_root();
    Vm::builder()
        .args(["-machine", "microvm", "-m", "128"])
        .kernel(&payload.path(), append)
}

fn image(dir: &Path, sectors: u64) -> std::path::PathBuf {
    let path = dir.join("disk.img");
    std::fs::File::create(&path)
        .unwrap()
        .set_len(sectors * 512)
        .unwrap();
    path
}

#[test]
fn a_guest_writes_to_the_serial_port_and_powers_off() {
    let mut vm = vm(Payload::Hello, "").start().unwrap();
    expect(&mut vm, "! hello from a bare guest\r\n");
    ends_well(&mut vm);
}

#[test]
fn the_boot_protocol_passes_command_line_initrd_and_memory() {
    let dir = tempfile::tempdir().unwrap();
    let initrd = dir.path().join("initrd");
    std::fs::write(&initrd, b"INITRD!!\0\0\0").unwrap();
    let mut vm = vm(Payload::Machine, "one=1 two")
        .arg("-initrd")
        .arg(&initrd)
        .start()
        .unwrap();
    expect(&mut vm, "CMDLINE ");
    let line = vm.console.rest_of_line(LIMIT).unwrap();
    assert!(line.contains("one=1 two"), "{line}");
    expect(&mut vm, "INITRD ");
    let line = vm.console.rest_of_line(LIMIT).unwrap();
    let words: Vec<&str> = line.split_whitespace().collect();
    assert_eq!(
        words[1..],
        ["11", "494e495452442121"],
        "size and first bytes of the initrd"
    );
    let address = u64::from_str_radix(words[0], 16).unwrap();
    assert!(
        address >= 0x10_0000 && address + 11 <= 128 << 20 && address.is_multiple_of(4096),
        "{address:#x}"
    );
    let map = expect(&mut vm, "MACHINE OK");
    let mut ram = 0;
    for line in map.lines().filter_map(|l| l.strip_prefix("MAP ")) {
        let words: Vec<&str> = line.split_whitespace().collect();
        if words[2] == "1" {
            ram += u64::from_str_radix(words[1], 16).unwrap();
        }
    }
    // All but what lies between 640 KiB and 1 MiB, and the page or so that the VMM keeps.
    assert!(
        ((128 << 20) - (512 << 10)..=128 << 20).contains(&ram),
        "{ram:#x} bytes of RAM in\n{map}"
    );
    ends_well(&mut vm);
}

#[test]
fn append_may_come_as_several_words() {
    require_kvm();
    let mut vm = Vm::builder()
        .args(["-machine", "microvm", "-m", "128", "-kernel"])
        .arg(Payload::Machine.path())
        .args(["-append", "one=1", "two", "three=3"])
        .start()
        .unwrap();
    expect(&mut vm, "CMDLINE ");
    let line = vm.console.rest_of_line(LIMIT).unwrap();
    assert!(line.contains("one=1 two three=3"), "{line}");
    ends_well(&mut vm);
}

#[test]
fn devices_lie_on_the_bus_in_the_order_of_the_command_line() {
    let dir = tempfile::tempdir().unwrap();
    let disk = image(dir.path(), 2048);
    let tap = Tap::new("sv-probe", "10.7.1.1/24").unwrap();
    let mut vm = vm(Payload::VirtioProbe, "")
        .disk("d0", &disk, "")
        .tap("n0", &tap.name, "52:54:00:00:00:07")
        .start()
        .unwrap();
    let lines = expect(&mut vm, "PROBE OK devices 2");
    let devices: Vec<&str> = lines
        .lines()
        .filter(|l| l.contains(" id ") && !l.contains(" id 0"))
        .collect();
    assert_eq!(devices.len(), 2, "{lines}");
    for line in &devices {
        assert!(
            line.contains(" version 2 "),
            "only the non-legacy interface: {line}"
        );
        let word = |name: &str| {
            line.split(&format!(" {name} "))
                .nth(1)
                .unwrap()
                .split(' ')
                .next()
                .unwrap()
        };
        let features = u64::from_str_radix(word("features"), 16).unwrap();
        assert!(features & (1 << 32) != 0, "VIRTIO_F_VERSION_1: {line}");
    }
    let blk = devices.iter().find(|l| l.contains(" id 2 ")).unwrap();
    assert!(
        blk.contains("config 0008000000000000"),
        "capacity of 2048 sectors: {blk}"
    );
    let net = devices.iter().find(|l| l.contains(" id 1 ")).unwrap();
    assert!(
        net.contains("config 525400000007"),
        "the MAC address: {net}"
    );
    ends_well(&mut vm);
}

#[test]
fn sectors_are_written_flushed_and_read_back() {
    let dir = tempfile::tempdir().unwrap();
    let disk = image(dir.path(), 4096);
    let mut vm = vm(Payload::BlkRw, "sector=16 count=8 rounds=4 seed=9")
        .disk("d0", &disk, "")
        .start()
        .unwrap();
    expect(&mut vm, "BLK capacity 4096 writable");
    expect(&mut vm, "BLK-RW OK sectors 32");
    ends_well(&mut vm);
    let bytes = std::fs::read(&disk).unwrap();
    assert_eq!(bytes.len(), 4096 * 512, "the image keeps its size");
    for (index, word) in bytes.chunks_exact(8).enumerate() {
        let found = u64::from_le_bytes(word.try_into().unwrap());
        let at = index as u64;
        let inside = (16 * 64..48 * 64).contains(&at);
        let wanted = if inside {
            ((9 << 32) ^ at).wrapping_mul(0x9e37_79b9_7f4a_7c15)
        } else {
            0
        };
        assert_eq!(found, wanted, "word {index} of the image");
    }
}

#[test]
fn a_serial_number_reaches_the_guest() {
    let dir = tempfile::tempdir().unwrap();
    let disk = image(dir.path(), 4096);
    let mut vm = vm(Payload::BlkRw, "")
        .arg("-drive")
        .arg(format!("id=d0,file={},direct=off", disk.display()))
        .args(["-device", "virtio-blk-device,drive=d0,id=b0,serial=SN-0042"])
        .start()
        .unwrap();
    expect(&mut vm, "writable id SN-0042\r\n");
    expect(&mut vm, "BLK-RW OK");
    ends_well(&mut vm);
}

/// Two nodes a disk, as libvirt passes them.
#[test]
fn a_disk_may_be_made_of_nodes() {
    let dir = tempfile::tempdir().unwrap();
    let disk = image(dir.path(), 4096);
    std::fs::write(&disk, vec![0; 4096 * 512]).unwrap();
    let below = serde_json::json!({
        "driver": "file", "filename": disk, "node-name": "libvirt-1-storage",
        "auto-read-only": true, "discard": "unmap",
    });
    let node = |readonly| {
        serde_json::json!({
            "node-name": "libvirt-1-format", "read-only": readonly, "driver": "raw",
            "file": "libvirt-1-storage",
        })
    };
    for (readonly, append, last) in [(false, "", "BLK-RW OK"), (true, "readonly=1", "BLK-RO OK")] {
        let mut vm = vm(Payload::BlkRw, append)
            .arg("-blockdev")
            .arg(below.to_string())
            .arg("-blockdev")
            .arg(node(readonly).to_string())
            .arg("-device")
            .arg(r#"{"driver":"virtio-blk-device","drive":"libvirt-1-format","id":"virtio-disk0"}"#)
            .start()
            .unwrap();
        expect(&mut vm, last);
        ends_well(&mut vm);
    }
}

#[test]
fn a_readonly_disk_takes_no_write() {
    let dir = tempfile::tempdir().unwrap();
    let disk = image(dir.path(), 4096);
    let mut bytes = vec![0; 4096 * 512];
    bytes[8 * 512..8 * 512 + 16].copy_from_slice(b"0123456789abcdef");
    std::fs::write(&disk, &bytes).unwrap();
    let mut vm = vm(Payload::BlkRw, "readonly=1")
        .disk("d0", &disk, ",readonly=on")
        .start()
        .unwrap();
    expect(&mut vm, "readonly");
    expect(&mut vm, "BLK write status ");
    assert_eq!(
        vm.console.rest_of_line(LIMIT).unwrap(),
        "1",
        "VIRTIO_BLK_S_IOERR"
    );
    expect(
        &mut vm,
        "BLK first bytes 30313233343536373839616263646566\r\nBLK-RO OK",
    );
    ends_well(&mut vm);
    assert!(
        std::fs::read(&disk).unwrap() == bytes,
        "the image has changed"
    );
}

#[test]
fn a_disk_opened_past_the_page_cache_works() {
    let dir = tempfile::tempdir_in("/var/tmp").unwrap();
    let disk = image(dir.path(), 4096);
    let mut vm = vm(Payload::BlkRw, "")
        .arg("-drive")
        .arg(format!("id=d0,file={},direct=on", disk.display()))
        .args(["-device", "virtio-blk-device,drive=d0,id=b0"])
        .start()
        .unwrap();
    expect(&mut vm, "BLK-RW OK sectors 32");
    ends_well(&mut vm);
}

#[test]
fn frames_pass_through_the_tap() {
    let tap = Tap::new("sv-arp", "10.7.2.1/24").unwrap();
    let mut vm = vm(Payload::NetTx, "host=10.7.2.1 own=10.7.2.2")
        .tap("n0", &tap.name, "52:54:00:00:00:09")
        .start()
        .unwrap();
    expect(&mut vm, "NET mac 52:54:00:00:00:09");
    expect(&mut vm, "NET-TX OK host is at ");
    let mac = vm.console.rest_of_line(LIMIT).unwrap();
    let own = std::fs::read_to_string(format!("/sys/class/net/{}/address", tap.name)).unwrap();
    assert_eq!(mac, own.trim(), "the address of the host's side");
    ends_well(&mut vm);
}

#[test]
fn the_keyboard_controller_resets_in_place() {
    let mut vm = vm(Payload::Machine, "end=reset").start().unwrap();
    let pid = vm.pid();
    for _ in 0..3 {
        expect(&mut vm, "MACHINE OK");
    }
    assert_eq!(vm.pid(), pid);
    vm.kill().unwrap();
}

#[test]
fn the_acpi_reset_register_resets_in_place_with_its_disk() {
    let dir = tempfile::tempdir().unwrap();
    let disk = image(dir.path(), 4096);
    let mut vm = vm(Payload::BlkRw, "end=reboot")
        .disk("d0", &disk, "")
        .start()
        .unwrap();
    expect(&mut vm, "BLK-RW OK");
    let before = vm.processes().unwrap();
    expect(&mut vm, "BLK-RW OK");
    expect(&mut vm, "BLK-RW OK");
    assert_eq!(
        vm.processes().unwrap(),
        before,
        "a reset keeps the device processes"
    );
    vm.kill().unwrap();
}

#[test]
fn no_reboot_turns_a_reset_into_the_end() {
    let mut vm = vm(Payload::Machine, "end=reset")
        .arg("-no-reboot")
        .start()
        .unwrap();
    expect(&mut vm, "MACHINE OK");
    ends_well(&mut vm);
    assert!(
        !vm.console.wait_end(LIMIT).unwrap().contains("BOOT"),
        "it booted again"
    );
}

#[test]
fn a_guest_that_crashes_is_reported_with_the_registers() {
    let mut vm = vm(Payload::Machine, "end=triple").start().unwrap();
    expect(&mut vm, "MACHINE OK");
    let status = vm.wait(LIMIT).unwrap();
    assert_ne!(status.code(), Some(0));
    let messages = vm.messages().to_lowercase();
    // A software KVM stops at the missing handler already, with an internal error.
    let told = messages.contains("triple fault") || messages.contains("kvm internal error");
    assert!(told && messages.contains("rip="), "{messages}");
}

#[test]
fn the_serial_port_may_be_a_file() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("serial.log");
    let mut vm = vm(Payload::Hello, "")
        .without_serial()
        .arg("-serial")
        .arg(format!("file,path={}", file.display()))
        .start()
        .unwrap();
    ends_well(&mut vm);
    assert_eq!(
        std::fs::read_to_string(&file).unwrap(),
        "! hello from a bare guest\r\n"
    );
}

#[test]
fn two_virtual_processors_do_not_hinder_a_guest_that_uses_one() {
    let mut vm = vm(Payload::Hello, "").args(["-smp", "2"]).start().unwrap();
    expect(&mut vm, "! hello from a bare guest\r\n");
    ends_well(&mut vm);
}

/// The kernel alone is a write to guest memory: a file of `-mem-path` has it with `mem-share=on`, and stays as it was without.
#[test]
fn a_file_takes_the_guests_memory_only_if_it_is_shared() {
    require_kvm();
    require_root();
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("ram");
    let before = b"what was there".repeat(1000);
    for (share, is_written) in [
        ("", false),
        (",mem-share=off", false),
        (",mem-share=on", true),
    ] {
        std::fs::write(&file, &before).unwrap();
        let mut vm = Vm::builder()
            .args(["-machine", &format!("microvm{share}"), "-m", "128"])
            .kernel(&Payload::Hello.path(), "")
            .arg("-mem-path")
            .arg(&file)
            .start()
            .unwrap();
        expect(&mut vm, "! hello from a bare guest\r\n");
        ends_well(&mut vm);
        let after = std::fs::read(&file).unwrap();
        assert_eq!(after != before, is_written, "mem-share: {share:?}");
        assert_eq!(after.len() == 128 << 20, is_written, "mem-share: {share:?}");
    }
}
