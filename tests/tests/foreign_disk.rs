//! # Disks that somebody else serves
//!
//! **Job.** `-device vhost-user-blk-device` with daemons that run already: qemu-storage-daemon, which nobody here wrote, and our own
//! `block`, which is killed while the guest works and comes back. (qemu-storage-daemon keeps no account of what it has in flight, so
//! nobody could go on safely after it.) No Linux guest is needed.
//! **Who is not trusted.** The VMM; a daemon that is not one.
//! **Why this way.** A bare guest checks every byte that it reads, and the image is compared on the host.
#![allow(clippy::unwrap_used)] // in a test, a panic is the report

use std::fs::File;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use serde_json::json;
use tests::host::{require_kvm, require_root};
use tests::lab::ensure_packages;
use tests::payload::Payload;
use tests::vm::{Vm, VmBuilder, binary};

const LIMIT: Duration = Duration::from_secs(60);

#[derive(Debug, Clone, Copy)]
enum Kind {
    Qemu,
    Ours,
}

/// A daemon, which is killed when this is dropped.
struct Daemon(Child);

impl Daemon {
    /// Serves `image` to whoever connects to `socket`, where somebody listens when this returns.
    fn start(kind: Kind, image: &Path, socket: &Path, queues: u16) -> Self {
        let _ = std::fs::remove_file(socket);
        let listener = UnixListener::bind(socket).unwrap();
        let mut command = Command::new("sh");
        // The listener becomes descriptor 3.
        command.args(["-c", "exec \"$@\" 3<&0 </dev/null", "-"]);
        match kind {
            Kind::Qemu => command
                .arg("qemu-storage-daemon")
                .arg("--blockdev")
                .arg(format!(
                    "driver=file,node-name=disk,locking=off,filename={}",
                    image.display()
                ))
                .arg("--export")
                .arg(format!(
                    "type=vhost-user-blk,id=out,node-name=disk,writable=on,num-queues={queues},addr.type=fd,addr.str=3"
                )),
            Kind::Ours => command
                .arg(binary("block").unwrap())
                .arg("--file")
                .arg(image)
                .arg(format!("--num-queues={queues}"))
                .args(["--fd=3", "--keep"]),
        };
        let child = command
            .stdin(Stdio::from(OwnedFd::from(listener)))
            .spawn()
            .unwrap();
        Self(child)
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

struct Place {
    _dir: tempfile::TempDir,
    image: PathBuf,
    socket: PathBuf,
}

impl Place {
    /// With an image of 2 MiB.
    fn new() -> Self {
        require_kvm();
        require_root();
        ensure_packages(&["qemu-system-common"]).unwrap();
        let dir = tempfile::tempdir().unwrap();
        let (image, socket) = (dir.path().join("disk.img"), dir.path().join("socket"));
        File::create(&image).unwrap().set_len(2 << 20).unwrap();
        Self {
            _dir: dir,
            image,
            socket,
        }
    }

    fn daemon(&self, kind: Kind) -> Daemon {
        Daemon::start(kind, &self.image, &self.socket, 2)
    }

    fn vm(&self, payload: Payload, append: &str, more: &str) -> VmBuilder {
        Vm::builder()
            .args(["-machine", "microvm", "-m", "128"])
            .kernel(&payload.path(), append)
            .arg("-chardev")
            .arg(format!("socket,id=c,path={}", self.socket.display()))
            .arg("-device")
            .arg(format!("vhost-user-blk-device,chardev=c,id=x{more}"))
            .with_qmp()
    }
}

#[track_caller]
fn ends_well(vm: &mut Vm) {
    let status = vm.wait(LIMIT).unwrap_or_else(|e| panic!("{e}"));
    assert_eq!(status.code(), Some(0), "{}", vm.messages());
}

#[test]
fn a_guest_writes_to_disks_of_daemons() {
    for kind in [Kind::Qemu, Kind::Ours] {
        let place = Place::new();
        let _daemon = place.daemon(kind);
        let mut vm = place
            .vm(Payload::BlkRw, "sector=16 count=8 rounds=4 seed=9", "")
            .start()
            .unwrap();
        vm.wait_for("BLK capacity 4096 writable", LIMIT)
            .unwrap_or_else(|e| panic!("{kind:?} {e}"));
        vm.wait_for("BLK-RW OK sectors 32", LIMIT)
            .unwrap_or_else(|e| panic!("{kind:?} {e}"));
        ends_well(&mut vm);
        let bytes = std::fs::read(&place.image).unwrap();
        for (at, word) in (0u64..).zip(bytes.chunks_exact(8)) {
            let wanted = if (16 * 64..48 * 64).contains(&at) {
                ((9 << 32) ^ at).wrapping_mul(0x9e37_79b9_7f4a_7c15)
            } else {
                0
            };
            let found = u64::from_le_bytes(word.try_into().unwrap());
            assert_eq!(found, wanted, "{kind:?}: word {at} of the image");
        }
    }
}

#[test]
fn a_guest_loses_nothing_when_its_disks_daemon_is_killed_and_comes_back() {
    let place = Place::new();
    let mut daemon = Some(place.daemon(Kind::Ours));
    let mut vm = place
        .vm(Payload::BlkLoop, "spin=1", ",restart=on")
        .start()
        .unwrap();
    let mut qmp = vm.qmp().unwrap();
    let goes_on = |vm: &mut Vm| {
        vm.wait_for("LOOP ", LIMIT)
            .unwrap_or_else(|e| panic!("{e}"));
    };
    for _ in 0..3 {
        goes_on(&mut vm);
        drop(daemon.take());
        let gone = qmp.wait_event("VHOST_USER_DISCONNECTED", LIMIT).unwrap();
        assert_eq!(gone["data"], json!({ "device": "x" }));
        let gone = qmp.wait_event("DEVICE_CRASHED", LIMIT).unwrap();
        // Nobody here knows its number.
        assert_eq!(
            (&gone["data"]["device"], &gone["data"]["pid"]),
            (&json!("x"), &json!(0))
        );
        daemon = Some(place.daemon(Kind::Ours));
        let back = qmp.wait_event("VHOST_USER_CONNECTED", LIMIT).unwrap();
        assert_eq!(back["data"], json!({ "device": "x" }));
        let back = qmp.wait_event("DEVICE_RECOVERED", LIMIT).unwrap();
        assert_eq!(back["data"]["device"], "x");
    }
    vm.console.send("x").unwrap();
    vm.wait_for("BLK-LOOP OK", LIMIT)
        .unwrap_or_else(|e| panic!("{e}"));
    ends_well(&mut vm);
}

#[test]
fn a_vm_goes_on_without_its_disks_daemon() {
    let place = Place::new();
    let daemon = place.daemon(Kind::Qemu);
    let vm = place.vm(Payload::FirstByte, "", "").start().unwrap();
    let mut qmp = vm.qmp().unwrap();
    let found = qmp
        .execute(
            "qom-get",
            json!({ "path": "/machine/peripheral/x", "property": "chardev" }),
        )
        .unwrap();
    assert_eq!(found, "c");
    drop(daemon);
    let failed = qmp.wait_event("DEVICE_FAILED", LIMIT).unwrap();
    assert_eq!(failed["data"]["device"], "x");
    let status = qmp.execute("query-status", json!({})).unwrap();
    assert_eq!(status["status"], "running", "{status}");
}

#[test]
fn what_a_daemon_cannot_do_is_told_at_the_start() {
    let place = Place::new();
    let refused = |more: &str| {
        let mut vm = place.vm(Payload::FirstByte, "", more).start().unwrap();
        let status = vm.wait(LIMIT).unwrap();
        assert_eq!(status.code(), Some(1));
        vm.messages()
    };
    let said = refused("");
    let wanted = format!(
        "-chardev id=c {}: cannot connect: No such file or directory (os error 2); a vhost-user daemon must listen there",
        place.socket.display()
    );
    assert!(said.contains(&wanted), "{said}");
    for kind in [Kind::Qemu, Kind::Ours] {
        let _daemon = place.daemon(kind);
        let said = refused(",num-queues=3");
        let wanted = "device \"x\": its daemon has 2 queues; with num-queues=3 as many are needed";
        assert!(said.contains(wanted), "{kind:?}: {said}");
    }
    let _daemon = place.daemon(Kind::Qemu);
    let said = refused(",restart=on");
    let wanted = "device \"x\": restart=on needs a daemon that keeps account of requests in flight";
    assert!(said.contains(wanted), "{said}");
}
