//! # Cards that somebody else serves
//!
//! **Job.** `-netdev vhost-user` with a daemon that runs already: `dpdk-testpmd`, which nobody here wrote and which answers ARP
//! requests by itself, and our own `net`; each is killed while the guest works and comes back. No Linux guest is needed.
//! **Who is not trusted.** The VMM; a daemon that is not one.
//! **Why this way.** A bare guest checks each buffer that it gets back: none may be lost or come twice, whoever serves.
#![allow(clippy::unwrap_used)] // in a test, a panic is the report

use std::os::fd::OwnedFd;
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use serde_json::json;
use tests::console::Console;
use tests::host::{Tap, require_kvm, require_root};
use tests::lab::ensure_packages;
use tests::payload::Payload;
use tests::vm::{Vm, VmBuilder, binary, ends_well};

const LIMIT: Duration = Duration::from_secs(60);

/// The host's address on the tap of our own daemon; `dpdk-testpmd` has all addresses.
const HOST: &str = "10.7.98.1";

#[derive(Debug, Clone, Copy)]
enum Kind {
    Testpmd,
    Ours,
}

/// A daemon, which is killed when this is dropped.
struct Daemon {
    child: Child,
    /// `dpdk-testpmd` stops when nobody reads what it says.
    _console: Option<Console>,
}

impl Daemon {
    /// Somebody listens at the place's socket when this returns.
    fn start(kind: Kind, place: &Place) -> Self {
        let _ = std::fs::remove_file(&place.socket);
        match kind {
            Kind::Testpmd => Self::testpmd(&place.socket),
            Kind::Ours => Self::ours(&place.socket, &place.tap.name),
        }
    }

    fn ours(socket: &Path, tap: &str) -> Self {
        let listener = UnixListener::bind(socket).unwrap();
        let child = Command::new("sh")
            // The listener becomes descriptor 3.
            .args(["-c", "exec \"$@\" 3<&0 </dev/null", "-"])
            .arg(binary("net").unwrap())
            .args(["--tap", tap, "--fd=3", "--keep"])
            .stdin(Stdio::from(OwnedFd::from(listener)))
            .spawn()
            .unwrap();
        Self {
            child,
            _console: None,
        }
    }

    fn testpmd(socket: &Path) -> Self {
        let mut child = Command::new("dpdk-testpmd")
            .args(["--no-huge", "-m", "128", "--no-pci", "--no-telemetry"])
            .args(["-l", "0,1", "--no-shconf"])
            .arg(format!("--vdev=net_vhost0,iface={}", socket.display()))
            .args(["--", "--forward-mode=icmpecho", "--auto-start"])
            .args(["--total-num-mbufs=4096"])
            // It ends with its standard input.
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        let output = OwnedFd::from(child.stdout.take().unwrap());
        let mut console = Console::new(output, None);
        console
            // By then it listens; what it says later is kept back in its buffer.
            .wait_for("Checking link statuses", LIMIT)
            .unwrap_or_else(|e| panic!("{e}"));
        Self {
            child,
            _console: Some(console),
        }
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

struct Place {
    _dir: tempfile::TempDir,
    socket: PathBuf,
    tap: Tap,
}

impl Place {
    /// With a tap of this name.
    fn new(tap: &str) -> Self {
        require_kvm();
        require_root();
        ensure_packages(&["dpdk-dev", "librte-net-vhost23"]).unwrap();
        let dir = tempfile::tempdir().unwrap();
        let socket = dir.path().join("socket");
        let tap = Tap::new(tap, &format!("{HOST}/24")).unwrap();
        Self {
            _dir: dir,
            socket,
            tap,
        }
    }

    fn vm(&self, payload: Payload, more: &str) -> VmBuilder {
        let words = format!("host={HOST} own=10.7.98.2");
        Vm::builder()
            .args(["-machine", "microvm", "-m", "128"])
            .kernel(&payload.path(), &words)
            .arg("-chardev")
            .arg(format!("socket,id=c,path={}", self.socket.display()))
            .args(["-netdev", "vhost-user,id=n,chardev=c", "-device"])
            .arg(format!(
                "virtio-net-device,netdev=n,id=x,mac=52:54:00:00:62:02{more}"
            ))
            .with_qmp()
    }
}

fn goes_on(vm: &mut Vm) {
    for _ in 0..3 {
        vm.wait_for("LOOP ", LIMIT)
            .unwrap_or_else(|e| panic!("{e}"));
    }
}

#[test]
fn a_guest_gets_an_answer_through_somebody_elses_daemon() {
    let place = Place::new("svcard0");
    for kind in [Kind::Testpmd, Kind::Ours] {
        let _daemon = Daemon::start(kind, &place);
        let mut vm = place.vm(Payload::NetTx, "").start().unwrap();
        vm.wait_for("NET mac 52:54:00:00:62:02", LIMIT)
            .unwrap_or_else(|e| panic!("{kind:?}: {e}"));
        vm.wait_for("NET-TX OK host is at ", LIMIT)
            .unwrap_or_else(|e| panic!("{kind:?}: {e}"));
        ends_well(&mut vm);
    }
}

#[test]
fn a_card_goes_on_when_testpmd_was_killed_and_comes_back() {
    comes_back(Kind::Testpmd, &Place::new("svcard1"));
}

#[test]
fn a_card_goes_on_when_a_stand_alone_net_was_killed_and_comes_back() {
    comes_back(Kind::Ours, &Place::new("svcard2"));
}

/// The guest is told to stop, and has had all its answers.
#[track_caller]
fn stops(vm: &mut Vm) {
    vm.console.send("x").unwrap();
    vm.wait_for("NET-LOOP OK answers ", LIMIT)
        .unwrap_or_else(|e| panic!("{e}"));
    ends_well(vm);
}

fn comes_back(kind: Kind, place: &Place) {
    let mut daemon = Some(Daemon::start(kind, place));
    let mut vm = place.vm(Payload::NetLoop, "").start().unwrap();
    let mut qmp = vm.qmp().unwrap();
    for _ in 0..2 {
        goes_on(&mut vm);
        drop(daemon.take());
        let gone = qmp.wait_event("VHOST_USER_DISCONNECTED", LIMIT).unwrap();
        assert_eq!(gone["data"], json!({ "device": "x" }));
        daemon = Some(Daemon::start(kind, place));
        let back = qmp.wait_event("VHOST_USER_CONNECTED", LIMIT).unwrap();
        assert_eq!(back["data"], json!({ "device": "x" }));
        let back = qmp.wait_event("DEVICE_RECOVERED", LIMIT).unwrap();
        assert_eq!(back["data"]["device"], "x");
    }
    goes_on(&mut vm);
    stops(&mut vm);
}

#[test]
fn a_card_of_a_daemon_is_added_and_goes_on_with_the_next_one() {
    let place = Place::new("svcard5");
    let mut daemon = Some(Daemon::start(Kind::Ours, &place));
    let mut vm = Vm::builder()
        .args(["-machine", "microvm", "-m", "128", "-S", "-hotplug"])
        .arg(format!(
            "sockets={}",
            place.socket.parent().unwrap().display()
        ))
        .kernel(
            &Payload::NetLoop.path(),
            &format!("host={HOST} own=10.7.98.2"),
        )
        .with_qmp()
        .start()
        .unwrap();
    let mut qmp = vm.qmp().unwrap();
    let card = json!({ "id": "x", "driver": "virtio-net-device", "netdev": "n", "mac": "52:54:00:00:62:02" });
    let netdev = json!({ "type": "vhost-user", "id": "n", "chardev": "c", "vhostforce": true });
    let said = qmp.execute("netdev_add", netdev.clone()).unwrap_err();
    assert!(
        said.to_string().contains("chardev \"c\" not found"),
        "{said}"
    );
    let address = json!({ "type": "unix", "data": { "path": place.socket } });
    let backend =
        json!({ "type": "socket", "data": { "wait": false, "server": false, "addr": address } });
    for (command, arguments) in [
        ("chardev-add", json!({ "id": "c", "backend": backend })),
        ("netdev_add", netdev),
        ("device_add", card),
        ("cont", json!({})),
    ] {
        assert_eq!(qmp.execute(command, arguments).unwrap(), json!({}));
    }
    goes_on(&mut vm);
    drop(daemon.take());
    qmp.wait_event("VHOST_USER_DISCONNECTED", LIMIT).unwrap();
    daemon = Some(Daemon::start(Kind::Ours, &place));
    qmp.wait_event("DEVICE_RECOVERED", LIMIT).unwrap();
    goes_on(&mut vm);
    vm.console.send("x").unwrap();
    vm.wait_for("NET-LOOP OK answers ", LIMIT)
        .unwrap_or_else(|e| panic!("{e}"));
    ends_well(&mut vm);
    drop(daemon);
}

/// Its daemon need not be there before the card is.
#[test]
fn a_card_is_added_behind_a_chardev_of_the_command_line() {
    let place = Place::new("svcard6");
    let mut vm = Vm::builder()
        .args(["-machine", "microvm", "-m", "128", "-S", "-chardev"])
        .arg(format!("socket,id=c,path={}", place.socket.display()))
        .kernel(
            &Payload::NetLoop.path(),
            &format!("host={HOST} own=10.7.98.2"),
        )
        .with_qmp()
        .start()
        .unwrap();
    let mut qmp = vm.qmp().unwrap();
    let open = |qmp: &mut tests::qmp::Qmp| {
        let all = qmp.execute("query-chardev", json!({})).unwrap();
        let all = all.as_array().unwrap();
        let found = all.iter().find(|one| one["label"] == "c").unwrap();
        found["frontend-open"].as_bool().unwrap()
    };
    let netdev = json!({ "type": "vhost-user", "id": "n", "chardev": "c" });
    qmp.execute("netdev_add", netdev).unwrap();
    let again = json!({ "type": "vhost-user", "id": "m", "chardev": "c" });
    let said = qmp.execute("netdev_add", again).unwrap_err().to_string();
    assert!(said.contains("Chardev 'c' is busy"), "{said}");
    let card = json!({ "id": "x", "driver": "virtio-net-device", "netdev": "n", "mac": "52:54:00:00:62:02" });
    let said = qmp.execute("device_add", card.clone()).unwrap_err();
    assert!(said.to_string().contains("cannot connect"), "{said}");
    assert!(!open(&mut qmp));
    let mut daemon = Some(Daemon::start(Kind::Ours, &place));
    qmp.execute("device_add", card).unwrap();
    assert!(open(&mut qmp));
    qmp.execute("cont", json!({})).unwrap();
    goes_on(&mut vm);
    drop(daemon.take());
    qmp.wait_event("VHOST_USER_DISCONNECTED", LIMIT).unwrap();
    daemon = Some(Daemon::start(Kind::Ours, &place));
    qmp.wait_event("DEVICE_RECOVERED", LIMIT).unwrap();
    goes_on(&mut vm);
    for (command, id, why) in [
        ("netdev_del", "n", "Netdev 'n' is in use by device 'x'"),
        ("chardev-remove", "c", "Chardev 'c' is busy"),
    ] {
        let said = qmp.execute(command, json!({ "id": id })).unwrap_err();
        assert!(said.to_string().contains(why), "{command}: {said}");
    }
    qmp.execute("device_del", json!({ "id": "x" })).unwrap();
    qmp.wait_event("DEVICE_DELETED", LIMIT).unwrap();
    qmp.execute("netdev_del", json!({ "id": "n" })).unwrap();
    assert!(!open(&mut qmp));
    let said = qmp.execute("chardev-remove", json!({ "id": "c" }));
    let said = said.unwrap_err().to_string();
    let why = "Chardev 'c' is of the command line, and stays as long as the VM";
    assert!(said.contains(why), "{said}");
    qmp.execute("quit", json!({})).unwrap();
    ends_well(&mut vm);
    drop(daemon);
}

#[test]
fn a_daemons_queues_work_again_when_the_link_is_up_again() {
    let place = Place::new("svcard3");
    let _daemon = Daemon::start(Kind::Testpmd, &place);
    let mut vm = place.vm(Payload::NetLoop, "").start().unwrap();
    let mut qmp = vm.qmp().unwrap();
    for _ in 0..3 {
        goes_on(&mut vm);
        for up in [false, true] {
            // Its queues are its own again before the answer, and the guest's packet waits in one.
            let arguments = json!({ "name": "x", "up": up });
            qmp.execute("set_link", arguments).unwrap();
        }
    }
    goes_on(&mut vm);
    stops(&mut vm);
}

#[test]
fn what_is_no_daemon_is_told_at_the_start() {
    let place = Place::new("svcard4");
    let refused = || {
        let mut vm = place.vm(Payload::FirstByte, "").start().unwrap();
        let status = vm.wait(LIMIT).unwrap();
        assert_eq!(status.code(), Some(1));
        vm.messages()
    };
    let said = refused();
    let wanted = format!(
        "-chardev id=c {}: cannot connect: No such file or directory (os error 2); a vhost-user daemon must listen there",
        place.socket.display()
    );
    assert!(said.contains(&wanted), "{said}");
    // It takes the connection and leaves.
    let listener = UnixListener::bind(&place.socket).unwrap();
    let leaves = std::thread::spawn(move || drop(listener.accept().unwrap()));
    let said = refused();
    assert!(said.contains("device \"x\""), "{said}");
    leaves.join().unwrap();
}
