//! # What the host does to a VM
//!
//! **Job.** A full disk, an image that cannot be read, a tap that is gone, a full disk for the log, a QMP client that never reads,
//! signals: each has one outcome, and it is this. **Who is not trusted.** The VMM.
//! **Why this way.** Real file systems fail for real: a tmpfs of one page with a file in it has no room, and an image that
//! was cut has no bytes.
#![allow(clippy::unwrap_used)] // in a test, a panic is the report

use std::fs::File;
use std::io::Write;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::{Value, json};
use tests::host::{Tap, require_kvm, require_root};
use tests::payload::Payload;
use tests::qmp::Qmp;
use tests::vm::{Vm, VmBuilder, ends_well};

const LIMIT: Duration = Duration::from_secs(60);
const IMAGE: u64 = 4 << 20;

/// A file system of one page, which goes away with its owner.
struct Tiny(tempfile::TempDir);

impl Tiny {
    fn new() -> Self {
        require_root();
        let dir = tempfile::tempdir().unwrap();
        let mounted = Command::new("mount")
            .args(["-t", "tmpfs", "-o", "size=4k", "tmpfs"])
            .arg(dir.path())
            .status()
            .unwrap();
        assert!(mounted.success());
        Self(dir)
    }

    fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    /// Takes the page.
    fn fill(&self) {
        std::fs::write(self.path("filler"), [1; 4096]).unwrap();
        assert!(
            std::fs::write(self.path("more"), [1]).is_err(),
            "there is room left"
        );
        std::fs::remove_file(self.path("more")).unwrap();
    }

    /// Gives it back.
    fn make_room(&self) {
        std::fs::remove_file(self.path("filler")).unwrap();
    }
}

impl Drop for Tiny {
    fn drop(&mut self) {
        // Lazily: a VM that a failed test left may still hold its image.
        let _ = Command::new("umount").arg("-l").arg(self.0.path()).status();
    }
}

fn sparse(path: &Path) {
    File::create(path).unwrap().set_len(IMAGE).unwrap();
}

fn builder(payload: Payload, append: &str) -> VmBuilder {
    require_kvm();
    Vm::builder()
        .args(["-machine", "microvm", "-m", "128"])
        .kernel(&payload.path(), append)
        .with_qmp()
}

/// A guest that writes and reads `image` as soon as it may.
fn with_disk(image: &Path, append: &str, drive: &str) -> (Vm, Qmp) {
    let vm = builder(Payload::BlkLoop, append)
        .args(["-S", "-drive"])
        .arg(format!("id=d0,file={},direct=off{drive}", image.display()))
        .args(["-device", "virtio-blk-device,drive=d0,id=disk"])
        .start()
        .unwrap();
    let qmp = vm.qmp().unwrap();
    (vm, qmp)
}

fn ask(qmp: &mut Qmp, command: &str) -> Value {
    qmp.execute(command, json!({})).unwrap()
}

#[track_caller]
fn event(vm: &Vm, qmp: &mut Qmp, name: &str) -> Value {
    match qmp.wait_event(name, LIMIT) {
        Ok(event) => event["data"].clone(),
        Err(e) => panic!("{e}\n{}", vm.messages()),
    }
}

#[test]
fn a_full_disk_stops_the_guest_until_there_is_room() {
    let host = Tiny::new();
    let image = host.path("image");
    sparse(&image);
    host.fill();
    let (mut vm, mut qmp) = with_disk(&image, "bursts=40", ",werror=enospc");
    ask(&mut qmp, "cont");
    // Once when it starts, and once more when it goes on without more room.
    for _ in 0..2 {
        let told = event(&vm, &mut qmp, "BLOCK_IO_ERROR");
        assert_eq!(
            told,
            json!({
                "qom-path": "/machine/peripheral/disk",
                "device": "d0",
                "node-name": "d0",
                "operation": "write",
                "action": "stop",
                "nospace": true,
                "reason": "No space left on device",
            })
        );
        event(&vm, &mut qmp, "STOP");
        let status = ask(&mut qmp, "query-status");
        assert_eq!(
            (&status["status"], &status["running"]),
            (&json!("io-error"), &json!(false))
        );
        assert_eq!(ask(&mut qmp, "query-block")[0]["io-status"], "nospace");
        assert_eq!(
            ask(&mut qmp, "query-workloads"),
            json!([{ "module": "disk", "state": "waiting" }])
        );
        assert_eq!(vm.process("block").unwrap(), None);
        ask(&mut qmp, "cont");
    }
    event(&vm, &mut qmp, "BLOCK_IO_ERROR");
    event(&vm, &mut qmp, "STOP");
    host.make_room();
    ask(&mut qmp, "cont");
    event(&vm, &mut qmp, "RESUME");
    let recovered = event(&vm, &mut qmp, "DEVICE_RECOVERED");
    assert_eq!(recovered["device"], "disk");
    vm.wait_for("BLK-LOOP OK bursts 40", LIMIT)
        .unwrap_or_else(|e| panic!("{e}"));
    ends_well(&mut vm);
}

#[test]
fn a_stopped_guest_can_be_reset_or_ended() {
    let host = Tiny::new();
    let image = host.path("image");
    sparse(&image);
    host.fill();
    let (mut vm, mut qmp) = with_disk(&image, "bursts=40", ",werror=stop");
    ask(&mut qmp, "cont");
    event(&vm, &mut qmp, "BLOCK_IO_ERROR");
    event(&vm, &mut qmp, "STOP");
    host.make_room();
    ask(&mut qmp, "system_reset");
    event(&vm, &mut qmp, "RESET");
    assert_eq!(ask(&mut qmp, "query-status")["status"], "io-error");
    host.fill();
    ask(&mut qmp, "cont");
    event(&vm, &mut qmp, "BLOCK_IO_ERROR");
    event(&vm, &mut qmp, "STOP");
    kill(Pid::from_raw(vm.pid()), Signal::SIGTERM).unwrap();
    let data = event(&vm, &mut qmp, "SHUTDOWN");
    assert_eq!(data["reason"], "host-signal");
    ends_well(&mut vm);
}

#[test]
fn without_werror_the_guest_is_told_and_with_ignore_it_is_not() {
    let host = Tiny::new();
    let image = host.path("image");
    sparse(&image);
    host.fill();
    for (werror, said) in [
        ("", "status 1"),
        (",werror=report", "status 1"),
        // What was not written reads back as zeroes.
        (",werror=ignore", "differs in burst 1"),
    ] {
        let (mut vm, mut qmp) = with_disk(&image, "bursts=40", werror);
        ask(&mut qmp, "cont");
        vm.wait_for(said, LIMIT)
            .unwrap_or_else(|e| panic!("{werror}: {e}"));
        ends_well(&mut vm);
        // The server is gone, so this is everything that it said.
        let stop = qmp.wait_event("STOP", LIMIT);
        assert!(stop.is_err(), "{werror}: {stop:?}");
    }
}

#[test]
fn an_image_that_cannot_be_read_stops_the_guest() {
    let dir = tempfile::tempdir().unwrap();
    let image = dir.path().join("image");
    sparse(&image);
    // A write behind the new end would make the image longer again.
    let (mut vm, mut qmp) = with_disk(&image, "spin=1 reads=1", ",rerror=stop");
    ask(&mut qmp, "cont");
    vm.wait_for("LOOP 10\r", LIMIT)
        .unwrap_or_else(|e| panic!("{e}"));
    File::options()
        .write(true)
        .open(&image)
        .unwrap()
        .set_len(0)
        .unwrap();
    let told = event(&vm, &mut qmp, "BLOCK_IO_ERROR");
    assert_eq!(
        (&told["operation"], &told["nospace"], &told["action"]),
        (&json!("read"), &json!(false), &json!("stop"))
    );
    event(&vm, &mut qmp, "STOP");
    assert_eq!(ask(&mut qmp, "query-block")[0]["io-status"], "failed");
    ask(&mut qmp, "quit");
    ends_well(&mut vm);
}

#[test]
fn a_tap_that_vanishes_costs_the_card_and_not_the_vm() {
    let tap = Tap::new("sv-gone", "10.7.41.1/24").unwrap();
    let mut vm = builder(Payload::NetLoop, "host=10.7.41.1 own=10.7.41.2")
        .tap("n0", &tap.name, "52:54:00:00:00:41")
        .start()
        .unwrap();
    let mut qmp = vm.qmp().unwrap();
    vm.wait_for("LOOP 10\r", LIMIT)
        .unwrap_or_else(|e| panic!("{e}"));
    let removed = Command::new("ip")
        .args(["link", "del", &tap.name])
        .status()
        .unwrap();
    assert!(removed.success());
    let failed = event(&vm, &mut qmp, "DEVICE_FAILED");
    assert_eq!(failed["device"], "dev-n0", "{failed}");
    assert_eq!(vm.process("net").unwrap(), None);
    ask(&mut qmp, "quit");
    ends_well(&mut vm);
}

#[test]
fn a_full_disk_for_the_log_loses_lines_and_nothing_else() {
    let host = Tiny::new();
    let log = host.path("log");
    let dir = tempfile::tempdir().unwrap();
    let image = dir.path().join("image");
    sparse(&image);
    let mut vm = builder(Payload::BlkLoop, "bursts=40")
        .env("STRATOVIRT_LOG_LEVEL", "trace")
        .disk("d0", &image, "")
        .arg("-D")
        .arg(&log)
        .start()
        .unwrap();
    vm.wait_for("BLK-LOOP OK bursts 40", LIMIT)
        .unwrap_or_else(|e| panic!("{e}"));
    ends_well(&mut vm);
    assert_eq!(
        std::fs::metadata(&log).unwrap().len(),
        4096,
        "the disk was not full"
    );
}

#[test]
fn a_client_that_never_reads_delays_nobody() {
    let mut vm = builder(Payload::Machine, "end=halt").start().unwrap();
    vm.wait_for("MACHINE OK", LIMIT)
        .unwrap_or_else(|e| panic!("{e}"));
    let mut lazy = UnixStream::connect(vm.qmp_socket().unwrap()).unwrap();
    lazy.write_all(b"{'execute':'qmp_capabilities'}").unwrap();
    lazy.set_nonblocking(true).unwrap();
    // Until the server takes no more of it; the answers are far larger than the requests.
    let requests = b"{'execute':'query-qmp-schema'}".repeat(4096);
    while lazy.write(&requests).is_ok() {}
    let mut qmp = vm.qmp().unwrap();
    for _ in 0..20 {
        ask(&mut qmp, "stop");
        event(&vm, &mut qmp, "STOP");
        ask(&mut qmp, "cont");
        event(&vm, &mut qmp, "RESUME");
    }
    assert_eq!(ask(&mut qmp, "query-status")["running"], true);
    ask(&mut qmp, "quit");
    ends_well(&mut vm);
}
