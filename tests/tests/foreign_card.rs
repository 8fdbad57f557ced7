//! # Cards that somebody else serves
//!
//! **Job.** `-netdev vhost-user` with a daemon that runs already: `dpdk-testpmd`, which nobody here wrote and which answers ARP
//! requests by itself, ends while the guest works and comes back. No Linux guest is needed.
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
use tests::host::{require_kvm, require_root};
use tests::lab::ensure_packages;
use tests::payload::Payload;
use tests::vm::{Vm, VmBuilder};

const LIMIT: Duration = Duration::from_secs(60);

/// `dpdk-testpmd`, which is killed when this is dropped.
struct Testpmd {
    child: Child,
    /// It stops when nobody reads what it says.
    _console: Console,
}

impl Testpmd {
    /// Listens at `socket` when this returns.
    fn start(socket: &Path) -> Self {
        let _ = std::fs::remove_file(socket);
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
            _console: console,
        }
    }
}

impl Drop for Testpmd {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

struct Place {
    _dir: tempfile::TempDir,
    socket: PathBuf,
}

impl Place {
    fn new() -> Self {
        require_kvm();
        require_root();
        ensure_packages(&["dpdk-dev", "librte-net-vhost23"]).unwrap();
        let dir = tempfile::tempdir().unwrap();
        let socket = dir.path().join("socket");
        Self { _dir: dir, socket }
    }

    fn vm(&self, payload: Payload, more: &str) -> VmBuilder {
        let words = "host=10.7.98.1 own=10.7.98.2";
        Vm::builder()
            .args(["-machine", "microvm", "-m", "128"])
            .kernel(&payload.path(), words)
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

#[track_caller]
fn ends_well(vm: &mut Vm) {
    let status = vm.wait(LIMIT).unwrap_or_else(|e| panic!("{e}"));
    assert_eq!(status.code(), Some(0), "{}", vm.messages());
}

#[test]
fn a_guest_gets_an_answer_through_somebody_elses_daemon() {
    let place = Place::new();
    let _daemon = Testpmd::start(&place.socket);
    let mut vm = place.vm(Payload::NetTx, "").start().unwrap();
    vm.wait_for("NET mac 52:54:00:00:62:02", LIMIT)
        .unwrap_or_else(|e| panic!("{e}"));
    vm.wait_for("NET-TX OK host is at ", LIMIT)
        .unwrap_or_else(|e| panic!("{e}"));
    ends_well(&mut vm);
}

#[test]
fn a_card_goes_on_when_its_daemon_was_killed_and_comes_back() {
    let place = Place::new();
    let mut daemon = Some(Testpmd::start(&place.socket));
    let mut vm = place.vm(Payload::NetLoop, "").start().unwrap();
    let mut qmp = vm.qmp().unwrap();
    for _ in 0..2 {
        goes_on(&mut vm);
        drop(daemon.take());
        let gone = qmp.wait_event("VHOST_USER_DISCONNECTED", LIMIT).unwrap();
        assert_eq!(gone["data"], json!({ "device": "x" }));
        daemon = Some(Testpmd::start(&place.socket));
        let back = qmp.wait_event("VHOST_USER_CONNECTED", LIMIT).unwrap();
        assert_eq!(back["data"], json!({ "device": "x" }));
        let back = qmp.wait_event("DEVICE_RECOVERED", LIMIT).unwrap();
        assert_eq!(back["data"]["device"], "x");
    }
    goes_on(&mut vm);
    vm.console.send("x").unwrap();
    vm.wait_for("NET-LOOP OK answers ", LIMIT)
        .unwrap_or_else(|e| panic!("{e}"));
    ends_well(&mut vm);
}

#[test]
fn a_daemons_queues_work_again_when_the_link_is_up_again() {
    let place = Place::new();
    let _daemon = Testpmd::start(&place.socket);
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
    vm.console.send("x").unwrap();
    vm.wait_for("NET-LOOP OK answers ", LIMIT)
        .unwrap_or_else(|e| panic!("{e}"));
    ends_well(&mut vm);
}

#[test]
fn what_is_no_daemon_is_told_at_the_start() {
    let place = Place::new();
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
