//! # A disk that grows while the guest runs
//!
//! **Job.** QMP's `block_resize`: what is allowed and what is refused, that the next process may write as far as the image now goes,
//! and that a stock kernel sees the new size and writes to the new end.
//! **Who is not trusted.** The VMM; and the guest, whose bytes are looked for in the image.
//! **Why this way.** The image is the host's: its length, and what is at its end, tell without the VMM's help.
#![allow(clippy::unwrap_used)] // in a test, a panic is the report

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::process::Command;
use std::time::Duration;

use serde_json::{Value, json};
use tests::host::{require_kvm, require_root};
use tests::lab::{Flavour, Guest, Script, where_linux_boots};
use tests::payload::Payload;
use tests::procfs;
use tests::qcow2::{create, qemu_img};
use tests::qmp::Qmp;
use tests::test_path;
use tests::vm::Vm;

const LIMIT: Duration = Duration::from_secs(120);
const MIB: u64 = 1 << 20;

fn image(path: &Path, bytes: u64) -> File {
    let file = File::create_new(path).unwrap();
    file.set_len(bytes).unwrap();
    file
}

fn resize(qmp: &mut Qmp, arguments: Value) -> Result<Value, String> {
    qmp.execute("block_resize", arguments)
        .map_err(|e| e.to_string())
}

#[track_caller]
fn refused(qmp: &mut Qmp, arguments: &Value, wanted: &str) {
    let said = resize(qmp, arguments.clone()).unwrap_err();
    assert!(said.contains(wanted), "{arguments}: {said}");
}

#[test]
fn an_image_grows_as_far_as_the_command_line_says_and_no_further() {
    require_kvm();
    require_root();
    let dir = tempfile::tempdir().unwrap();
    let path = |name: &str| dir.path().join(name);
    let grows = image(&path("grows"), 8 * MIB);
    let stays = image(&path("stays"), 8 * MIB);
    image(&path("read"), 8 * MIB);
    let drive =
        |id: &str, more: &str| format!("id={id},file={},direct=off{more}", path(id).display());
    let mut vm = Vm::builder()
        .args(["-machine", "microvm", "-m", "128"])
        .kernel(&Payload::FirstByte.path(), "")
        .args(["-drive", &drive("grows", ",max-size=67108864")])
        .args(["-device", "virtio-blk-device,drive=grows,id=g,bootindex=7"])
        .args(["-drive", &drive("stays", "")])
        .args(["-device", "virtio-blk-device,drive=stays,id=s"])
        .args(["-drive", &drive("read", ",readonly=on")])
        .args(["-device", "virtio-blk-device,drive=read,id=r"])
        .with_qmp()
        .start()
        .unwrap();
    let mut qmp = vm.qmp().unwrap();
    for (arguments, wanted) in [
        (
            json!({ "device": "grows", "size": 4 * MIB }),
            "device g: size 4194304 is less than the 8388608 bytes of the image, whose end the guest would lose",
        ),
        (
            json!({ "device": "grows", "size": 65 * MIB }),
            "device g: size 68157440 is out of range; allowed: 8388608 to 67108864 (max-size= of its -drive or -blockdev)",
        ),
        (
            json!({ "device": "grows", "size": 9_000_000 }),
            "device g: size 9000000 is no multiple of 512",
        ),
        (
            json!({ "device": "stays", "size": 9 * MIB }),
            "device s: its -drive or -blockdev has no max-size=, so the image keeps its 8388608 bytes",
        ),
        (
            json!({ "device": "read", "size": 9 * MIB }),
            "device r: the disk is read-only",
        ),
        (
            json!({ "device": "none", "size": 9 * MIB }),
            "Cannot find device='none' nor node-name='none' behind a disk",
        ),
        (
            json!({ "size": 9 * MIB }),
            "block_resize takes exactly one of 'device' and 'node-name'",
        ),
        (
            json!({ "device": "grows", "node-name": "grows", "size": 9 * MIB }),
            "block_resize takes exactly one of 'device' and 'node-name'",
        ),
    ] {
        refused(&mut qmp, &arguments, wanted);
    }
    assert_eq!(grows.metadata().unwrap().len(), 8 * MIB);
    assert_eq!(stays.metadata().unwrap().len(), 8 * MIB);

    // What a firmware would ask for is kept.
    let bootindex = |qmp: &mut Qmp, id: &str| {
        let path = format!("/machine/peripheral/{id}");
        let arguments = json!({ "path": path, "property": "bootindex" });
        qmp.execute("qom-get", arguments).unwrap()
    };
    assert_eq!(bootindex(&mut qmp, "g"), 7);
    assert_eq!(bootindex(&mut qmp, "s"), -1);

    let before = vm.process("block").unwrap().unwrap();
    assert_eq!(procfs::limits(before).unwrap()["Max file size"].0, 8 * MIB);
    for (name, key, size) in [("grows", "device", 16 * MIB), ("g", "node-name", 64 * MIB)] {
        let done = resize(&mut qmp, json!({ key: name, "size": size })).unwrap();
        assert_eq!(done, json!({}));
        assert_eq!(grows.metadata().unwrap().len(), size);
        let event = qmp.wait_event("DEVICE_UPGRADED", LIMIT).unwrap();
        assert_eq!(event["data"]["device"], "g");
        let pid = i32::try_from(event["data"]["pid"].as_i64().unwrap()).unwrap();
        assert_ne!(pid, before);
        assert_eq!(procfs::limits(pid).unwrap()["Max file size"].0, size);
    }
    // The same size again is no fault.
    resize(&mut qmp, json!({ "device": "grows", "size": 64 * MIB })).unwrap();
}

/// What `qemu-img` says is the size of the disk in an image.
fn virtual_size(image: &Path) -> u64 {
    let output = qemu_img(&["info", "-U", "--output=json", "-f", "qcow2"], &[image]);
    let info: Value = serde_json::from_slice(&output.stdout).unwrap();
    info["virtual-size"].as_u64().unwrap()
}

#[test]
fn nodes_say_how_far_their_images_grow() {
    require_kvm();
    require_root();
    let dir = tempfile::tempdir().unwrap();
    let path = |name: &str| dir.path().join(name);
    let (below, own) = (image(&path("below"), 8 * MIB), image(&path("own"), 8 * MIB));
    let packed = create(dir.path(), "packed", &[]);
    let file = |name: &str, more: &str| {
        format!(
            "file,node-name={name}-file,filename={}{more}",
            path(name).display()
        )
    };
    let mut vm = Vm::builder().args(["-machine", "microvm", "-m", "128", "-S"]);
    for node in [
        file("below", ",max-size=16777216"),
        "raw,node-name=below,file=below-file".into(),
        file("own", ",max-size=9437184"),
        "raw,node-name=own,file=own-file,max-size=16777216".into(),
        file("packed", ""),
        "qcow2,node-name=packed,file=packed-file,max-size=16777216".into(),
    ] {
        vm = vm.args(["-blockdev", &node]);
    }
    for node in ["below", "own", "packed"] {
        let device = format!("virtio-blk-device,drive={node},id=disk-{node}");
        vm = vm.args(["-device", &device]);
    }
    let vm = vm.kernel(&Payload::FirstByte.path(), "").with_qmp();
    let vm = vm.start().unwrap();
    let mut qmp = vm.qmp().unwrap();
    for node in ["below", "own", "packed"] {
        refused(
            &mut qmp,
            &json!({ "node-name": node, "size": 17 * MIB }),
            "to 16777216 (max-size= of its -drive or -blockdev)",
        );
        let sized = json!({ "node-name": node, "size": 16 * MIB });
        assert_eq!(resize(&mut qmp, sized).unwrap(), json!({}), "{node}");
    }
    assert_eq!(below.metadata().unwrap().len(), 16 * MIB);
    assert_eq!(own.metadata().unwrap().len(), 16 * MIB);
    assert_eq!(virtual_size(&packed), 16 * MIB);
}

/// A loop device, which goes with this.
struct Loop(String);

impl Loop {
    fn on(file: &Path) -> Self {
        let output = Command::new("losetup")
            .args(["--find", "--show"])
            .arg(file)
            .output()
            .unwrap();
        assert!(output.status.success(), "{output:?}");
        Self(String::from_utf8(output.stdout).unwrap().trim().to_owned())
    }

    /// Takes over the size that its file has now.
    fn look_again(&self) {
        let status = Command::new("losetup").args(["-c", &self.0]).status();
        assert!(status.unwrap().success());
    }
}

impl Drop for Loop {
    fn drop(&mut self) {
        let _ = Command::new("losetup").args(["-d", &self.0]).status();
    }
}

#[test]
fn a_block_device_of_the_host_has_the_size_that_it_has() {
    require_kvm();
    require_root();
    let dir = tempfile::tempdir().unwrap();
    let backing = dir.path().join("backing");
    let file = image(&backing, 8 * MIB);
    let device = Loop::on(&backing);
    let vm = Vm::builder()
        .args(["-machine", "microvm", "-m", "128"])
        .kernel(&Payload::FirstByte.path(), "")
        .arg("-drive")
        .arg(format!("id=host,file={},direct=off", device.0))
        .args(["-device", "virtio-blk-device,drive=host,id=h"])
        .with_qmp()
        .start()
        .unwrap();
    let mut qmp = vm.qmp().unwrap();
    let wanted = "device h: size 16777216 is not that of the host's block device, 8388608";
    refused(
        &mut qmp,
        &json!({ "device": "host", "size": 16 * MIB }),
        wanted,
    );
    file.set_len(16 * MIB).unwrap();
    device.look_again();
    resize(&mut qmp, json!({ "device": "host", "size": 16 * MIB })).unwrap();
    let event = qmp.wait_event("DEVICE_UPGRADED", LIMIT).unwrap();
    assert_eq!(event["data"]["device"], "h");
}

#[test]
fn a_stock_kernel_sees_its_disk_grow_and_writes_to_the_new_end() {
    where_linux_boots(test_path!(), || {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("disk");
        let file = image(&path, 8 * MIB);
        let script = Script::new(
            "size() { cat /sys/block/vda/size; }\n\
             [ $(size) = 16384 ] || exit 1\n\
             dd if=/dev/zero of=/dev/vda bs=512 seek=16384 count=1 conv=fsync 2>/dev/null && exit 2\n\
             echo WAITING\n\
             until [ $(size) = 49152 ]; do sleep 0.1; done\n\
             echo the-new-end > /tail\n\
             dd if=/tail of=/dev/vda bs=512 seek=49151 conv=sync,fsync 2>/dev/null || exit 3\n\
             dmesg | grep -q 'vda.*new size: 49152 512-byte' || exit 4\n\
             echo GROWN\n",
        );
        let guest = Guest::ready(Flavour::Cloud).unwrap();
        let initrd = guest.initrd_with(&script).unwrap();
        let mut vm = Vm::builder()
            .args(["-machine", "microvm", "-m", "256"])
            .kernel(&guest.kernel.elf, "console=ttyS0 quiet panic=-1 reboot=k")
            .arg("-initrd")
            .arg(initrd.path())
            .arg("-drive")
            .arg(format!(
                "id=d,file={},direct=off,max-size=33554432",
                path.display()
            ))
            .args(["-device", "virtio-blk-device,drive=d,id=disk"])
            .with_qmp()
            .start()
            .unwrap();
        let mut qmp = vm.qmp().unwrap();
        vm.wait_for("WAITING", LIMIT)
            .unwrap_or_else(|e| panic!("{e}"));
        resize(&mut qmp, json!({ "device": "d", "size": 24 * MIB })).unwrap();
        vm.wait_for("GUEST-END status=", LIMIT)
            .unwrap_or_else(|e| panic!("{e}"));
        assert_eq!(vm.console.rest_of_line(LIMIT).unwrap(), "0 then=poweroff");
        vm.wait(LIMIT).unwrap_or_else(|e| panic!("{e}"));
        assert_eq!(file.metadata().unwrap().len(), 24 * MIB);
        let mut tail = [0; 12];
        File::open(&path)
            .unwrap()
            .read_exact_at(&mut tail, 24 * MIB - 512)
            .unwrap();
        assert_eq!(&tail, b"the-new-end\n");
    });
}
