//! # Disks that somebody else serves
//!
//! **Job.** `-device vhost-user-blk-device` with daemons that run already: qemu-storage-daemon, which nobody here wrote, and our own
//! `block`, which is killed while the guest works and comes back. (qemu-storage-daemon keeps no account of what it has in flight, so
//! nobody could go on safely after it.) No Linux guest is needed.
//! **Who is not trusted.** The VMM; a daemon that is not one.
//! **Why this way.** A bare guest checks every byte that it reads, and the image is compared on the host.
#![allow(clippy::unwrap_used)] // in a test, a panic is the report
#![allow(clippy::needless_pass_by_value)] // json!() at each call

use std::fs::File;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use serde_json::{Value, json};
use tests::host::{require_kvm, require_root};
use tests::lab::ensure_packages;
use tests::payload::Payload;
use tests::qmp::Qmp;
use tests::vm::{Vm, VmBuilder, binary, ends_well};

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

/// A connection to whoever listens at `socket`, for a VM that opens no path.
fn connection(socket: &Path) -> OwnedFd {
    std::os::unix::net::UnixStream::connect(socket)
        .unwrap()
        .into()
}

/// As Kata and libvirt write it.
fn socket_chardev(id: &str, path: &Path) -> Value {
    json!({
        "id": id,
        "backend": {
            "type": "socket",
            "data": {
                "wait": false,
                "server": false,
                "addr": { "type": "unix", "data": { "path": path } },
            },
        },
    })
}

#[test]
fn a_disk_of_a_daemon_is_added_and_taken_out_again() {
    let place = Place::new();
    let folder = place.socket.parent().unwrap();
    let mut daemon = Some(place.daemon(Kind::Ours));
    let mut vm = Vm::builder()
        .args(["-machine", "microvm", "-m", "128", "-S"])
        .kernel(&Payload::BlkLoop.path(), "spin=1")
        .arg("-hotplug")
        .arg(format!("sockets={}", folder.display()))
        .with_qmp()
        .start()
        .unwrap();
    let mut qmp = vm.qmp().unwrap();
    let refused = |qmp: &mut Qmp, command: &str, arguments: Value, why: &str| {
        let said = qmp.execute(command, arguments).unwrap_err().to_string();
        assert!(said.contains(why), "{command}: {said}");
    };
    let done = |qmp: &mut Qmp, command: &str, arguments: Value| {
        assert_eq!(qmp.execute(command, arguments).unwrap(), json!({}));
    };
    let device =
        json!({ "id": "x", "driver": "vhost-user-blk-device", "chardev": "c", "restart": true });
    let named = |id: &str| json!({ "id": id });
    refused(
        &mut qmp,
        "chardev-add",
        socket_chardev("c", Path::new("/run/nobody")),
        "Failed to add chardev 'c': /run/nobody: not beneath a folder",
    );
    refused(
        &mut qmp,
        "chardev-add",
        socket_chardev("c", &place.image),
        "not a socket",
    );
    refused(
        &mut qmp,
        "device_add",
        device.clone(),
        "Chardev 'c' of device 'x' was not added",
    );
    refused(
        &mut qmp,
        "chardev-remove",
        named("c"),
        "Chardev 'c' not found",
    );
    done(&mut qmp, "chardev-add", socket_chardev("c", &place.socket));
    refused(
        &mut qmp,
        "chardev-add",
        socket_chardev("c", &place.socket),
        "Chardev with id 'c' already exists",
    );
    // The first one is the serial port's.
    let chardevs = |qmp: &mut Qmp| qmp.execute("query-chardev", json!({})).unwrap()[1].clone();
    let told = |used: bool| {
        let name = format!("unix:{}", place.socket.display());
        json!({ "label": "c", "filename": name, "frontend-open": used })
    };
    assert_eq!(chardevs(&mut qmp), told(false));
    done(&mut qmp, "device_add", device.clone());
    assert_eq!(chardevs(&mut qmp), told(true));
    refused(
        &mut qmp,
        "chardev-remove",
        named("c"),
        "Chardev 'c' is busy",
    );
    let card = json!({ "type": "vhost-user", "id": "n", "chardev": "c" });
    refused(&mut qmp, "netdev_add", card.clone(), "Chardev 'c' is busy");

    // The guest works with it, and another daemon goes on after it.
    done(&mut qmp, "cont", json!({}));
    let goes_on = |vm: &mut Vm| {
        vm.wait_for("LOOP ", LIMIT)
            .unwrap_or_else(|e| panic!("{e}"))
    };
    goes_on(&mut vm);
    drop(daemon.take());
    qmp.wait_event("VHOST_USER_DISCONNECTED", LIMIT).unwrap();
    daemon = Some(place.daemon(Kind::Ours));
    let back = qmp.wait_event("DEVICE_RECOVERED", LIMIT).unwrap();
    assert_eq!(back["data"]["device"], "x");
    goes_on(&mut vm);
    vm.console.send("x").unwrap();
    vm.wait_for("BLK-LOOP OK", LIMIT)
        .unwrap_or_else(|e| panic!("{e}"));
    drop(daemon);
    ends_well(&mut vm);
}

#[test]
fn daemons_that_are_gone_or_that_a_client_passed_are_added_and_taken_out_as_well() {
    let place = Place::new();
    let folder = place.socket.parent().unwrap();
    let vm = Vm::builder()
        .args(["-machine", "microvm", "-m", "128", "-S"])
        .kernel(&Payload::FirstByte.path(), "")
        .arg("-hotplug")
        .arg(format!("sockets={}", folder.display()))
        .with_qmp()
        .start()
        .unwrap();
    let mut qmp = vm.qmp().unwrap();
    let refused = |qmp: &mut Qmp, command: &str, arguments: Value, why: &str| {
        let said = qmp.execute(command, arguments).unwrap_err().to_string();
        assert!(said.contains(why), "{command}: {said}");
    };
    let done = |qmp: &mut Qmp, command: &str, arguments: Value| {
        assert_eq!(qmp.execute(command, arguments).unwrap(), json!({}));
    };
    let named = |id: &str| json!({ "id": id });
    let disk = |id: &str, chardev: &str, restart: bool| json!({ "id": id, "driver": "vhost-user-blk-device", "chardev": chardev, "restart": restart });
    let gone = |qmp: &mut Qmp, id: &str| {
        let deleted = qmp.wait_event("DEVICE_DELETED", LIMIT).unwrap();
        assert_eq!(deleted["data"]["device"], id);
    };
    // One that left is taken out while its socket is tried again.
    let daemon = place.daemon(Kind::Ours);
    done(&mut qmp, "chardev-add", socket_chardev("c", &place.socket));
    done(&mut qmp, "device_add", disk("x", "c", true));
    drop(daemon);
    std::fs::remove_file(&place.socket).unwrap();
    qmp.wait_event("DEVICE_CRASHED", LIMIT).unwrap();
    done(&mut qmp, "device_del", named("x"));
    gone(&mut qmp, "x");
    // There is nobody.
    refused(&mut qmp, "device_add", disk("x", "c", true), "No such file");
    // One that keeps no account cannot be gone on without, and one that does too little is not taken.
    let daemon = place.daemon(Kind::Qemu);
    let why = "restart=on needs a daemon that keeps account";
    refused(&mut qmp, "device_add", disk("x", "c", true), why);
    let mut many = disk("x", "c", false);
    many["num-queues"] = 3.into();
    refused(&mut qmp, "device_add", many, "its daemon has 2 queues");
    done(&mut qmp, "device_add", disk("x", "c", false));
    done(&mut qmp, "device_del", named("x"));
    gone(&mut qmp, "x");
    drop(daemon);
    // A card's netdev has it to itself.
    done(
        &mut qmp,
        "netdev_add",
        json!({ "type": "vhost-user", "id": "n", "chardev": "c" }),
    );
    refused(
        &mut qmp,
        "chardev-remove",
        named("c"),
        "Chardev 'c' is busy",
    );
    refused(
        &mut qmp,
        "device_add",
        disk("x", "c", false),
        "in use by netdev 'n'",
    );
    done(&mut qmp, "netdev_del", named("n"));
    done(&mut qmp, "chardev-remove", named("c"));

    // Nothing is granted for a connection that a client passes, which serves once.
    let daemon = place.daemon(Kind::Ours);
    let socket = connection(&place.socket);
    qmp.execute_with("getfd", json!({ "fdname": "daemon" }), &[socket.as_fd()])
        .unwrap();
    drop(socket);
    let passed = json!({
        "id": "p",
        "backend": {
            "type": "socket",
            "data": { "addr": { "type": "fd", "data": { "str": "daemon" } } },
        },
    });
    done(&mut qmp, "chardev-add", passed);
    done(&mut qmp, "device_add", disk("y", "p", true));
    drop(daemon);
    let failed = qmp.wait_event("DEVICE_FAILED", LIMIT).unwrap();
    assert_eq!(failed["data"]["device"], "y");
    done(&mut qmp, "device_del", named("y"));
    gone(&mut qmp, "y");
    refused(
        &mut qmp,
        "device_add",
        disk("y", "p", false),
        "serves one device once",
    );
    done(&mut qmp, "chardev-remove", named("p"));
    let left = qmp.execute("query-chardev", json!({})).unwrap();
    assert_eq!(left.as_array().unwrap().len(), 1, "{left}");
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
