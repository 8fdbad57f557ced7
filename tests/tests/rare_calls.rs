//! # System calls that an ordinary run never makes
//!
//! **Job.** Drive the paths that only some command lines, or some hosts, take, with the filters killing: a rule that is missing
//! ends a process here and not at a user. `cargo xtask policy --audit` finds rules that nothing drives.
//! **Who is not trusted.** The policies. **Why this way.** Whole VMs, because a call may come from libc or std behind everybody's
//! back.
#![allow(clippy::unwrap_used)] // in a test, a panic is the report

use nix::fcntl::{FcntlArg, FdFlag, fcntl};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::json;
use std::fs;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::net::UnixListener;
use std::time::Duration;
use tests::host::{Tap, require_kvm};
use tests::payload::Payload;
use tests::vm::{Vm, VmBuilder};

const LIMIT: Duration = Duration::from_secs(30);

fn guest(payload: Payload, append: &str) -> VmBuilder {
    require_kvm();
    Vm::builder()
        .args(["-machine", "microvm", "-m", "128"])
        .kernel(&payload.path(), append)
        .with_qmp()
}

/// It ends as it was told to: none of its processes was killed for a call.
fn ends_well(mut vm: Vm) {
    let mut qmp = vm.qmp().unwrap();
    qmp.execute("quit", json!({})).unwrap();
    let status = vm.wait(LIMIT).unwrap();
    assert!(status.success(), "{status}: {}", vm.messages());
}

/// A port that nobody listens on now.
fn free_port() -> u16 {
    let socket = TcpListener::bind(("127.0.0.1", 0)).unwrap();
    socket.local_addr().unwrap().port()
}

#[test]
fn a_pseudo_terminal_is_made_and_used() {
    let vm = guest(Payload::FirstByte, "")
        .without_serial()
        .args(["-serial", "pty"])
        .start()
        .unwrap();
    let mut qmp = vm.qmp().unwrap();
    let chardevs = qmp.execute("query-chardev", json!({})).unwrap();
    let text = chardevs.to_string();
    let at = text.find("/dev/pts/").unwrap_or_else(|| panic!("{text}"));
    let name: String = text[at..]
        .chars()
        .take_while(|c| *c != '"' && *c != '\\')
        .collect();
    assert!(fs::metadata(&name).is_ok(), "{name}");
    drop(qmp);
    ends_well(vm);
}

#[test]
fn a_client_of_a_tcp_port_is_served() {
    let port = free_port();
    let address = format!("tcp:127.0.0.1:{port},server,nowait");
    let vm = guest(Payload::Machine, "end=halt")
        .args(["-qmp", &address])
        .start()
        .unwrap();
    drop(vm.qmp().unwrap()); // it listens on all of them by now
    let mut client = BufReader::new(TcpStream::connect(("127.0.0.1", port)).unwrap());
    client.get_ref().set_read_timeout(Some(LIMIT)).unwrap();
    let mut greeting = String::new();
    client.read_line(&mut greeting).unwrap();
    assert!(greeting.contains("QMP"), "{greeting}");
    drop(client);
    ends_well(vm);
}

/// The serial port as client of a unix socket that is there already.
#[test]
fn a_serial_port_connects_to_a_unix_socket() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("serial");
    let listener = UnixListener::bind(&path).unwrap();
    let chardev = format!("socket,id=c0,path={}", path.display());
    let vm = guest(Payload::FirstByte, "")
        .without_serial()
        .args(["-chardev", &chardev, "-serial", "chardev:c0"])
        .start()
        .unwrap();
    let (mut client, _) = listener.accept().unwrap();
    client.set_read_timeout(Some(LIMIT)).unwrap();
    let mut byte = [0];
    client.read_exact(&mut byte).unwrap();
    client.write_all(b"x").unwrap();
    ends_well(vm);
}

/// A manager that opened the tap itself hands a descriptor over (`fd=`): the broker looks what it is.
#[test]
fn a_card_takes_a_tap_that_was_opened_before() {
    let tap = Tap::new("sv-held", "10.7.5.1/24").unwrap();
    let queue = tap.queue().unwrap();
    let card = |fd: i32| {
        guest(Payload::NetTx, "host=10.7.5.1 own=10.7.5.2 end=halt")
            .arg("-netdev")
            .arg(format!("tap,id=n0,fd={fd}"))
            .args(["-device", "virtio-net-device,netdev=n0,id=c0"])
    };
    let inherited = |fd: &dyn AsFd| fcntl(fd.as_fd(), FcntlArg::F_SETFD(FdFlag::empty())).unwrap();
    inherited(&queue);
    let mut vm = card(queue.as_raw_fd()).start().unwrap();
    // Else the interface would stay busy here.
    drop(queue);
    vm.wait_for("NET-TX OK", LIMIT)
        .unwrap_or_else(|e| panic!("{e}"));
    ends_well(vm);

    let other = fs::File::open("/dev/null").unwrap();
    inherited(&other);
    let mut vm = card(other.as_raw_fd()).start().unwrap();
    let status = vm.wait(LIMIT).unwrap();
    let messages = vm.messages();
    assert_eq!(status.code(), Some(1), "{messages}");
    assert!(messages.contains("not an open tap device"), "{messages}");
}

/// A guest that has written, flushed and read a disk, and the folder that the disk is in.
fn worked_on_a_disk(more: &str) -> (Vm, tempfile::TempDir) {
    let dir = tempfile::tempdir().unwrap();
    let disk = dir.path().join("disk.img");
    fs::write(&disk, vec![0; 1 << 20]).unwrap();
    let mut vm = guest(Payload::BlkRw, "end=halt")
        .disk("d0", &disk, more)
        .start()
        .unwrap();
    vm.wait_for("BLK-RW OK", LIMIT)
        .unwrap_or_else(|e| panic!("{e}"));
    (vm, dir)
}

/// Flushes of a disk that does without io_uring are made one by one.
#[test]
fn a_disk_without_a_ring_flushes() {
    let (vm, _dir) = worked_on_a_disk(",aio=off");
    ends_well(vm);
}

/// A host may have no IPv6; the call is made all the same, and the answer told.
#[test]
fn a_client_comes_by_ipv6() {
    let free = TcpListener::bind("[::1]:0").and_then(|socket| socket.local_addr());
    let port = free.as_ref().map_or(9, SocketAddr::port);
    let mut vm = guest(Payload::Machine, "end=halt")
        .args(["-qmp", &format!("tcp:[::1]:{port},server,nowait")])
        .start()
        .unwrap();
    if free.is_err() {
        assert_eq!(vm.wait(LIMIT).unwrap().code(), Some(1));
        let messages = vm.messages();
        assert!(messages.contains("cannot listen"), "{messages}");
        return;
    }
    drop(vm.qmp().unwrap()); // it listens on all of them by now
    let mut client = BufReader::new(TcpStream::connect(("::1", port)).unwrap());
    client.get_ref().set_read_timeout(Some(LIMIT)).unwrap();
    let mut greeting = String::new();
    client.read_line(&mut greeting).unwrap();
    assert!(greeting.contains("QMP"), "{greeting}");
    drop(client);
    ends_well(vm);
}

#[test]
fn memory_that_was_allocated_in_advance_is_so_after_a_reset() {
    let mut vm = guest(Payload::Machine, "end=halt")
        .arg("-mem-prealloc")
        .start()
        .unwrap();
    vm.wait_for("MACHINE OK", LIMIT)
        .unwrap_or_else(|e| panic!("{e}"));
    let mut qmp = vm.qmp().unwrap();
    qmp.execute("system_reset", json!({})).unwrap();
    vm.wait_for("MACHINE OK", LIMIT)
        .unwrap_or_else(|e| panic!("{e}"));
    drop(qmp);
    ends_well(vm);
}

/// A manager's freezer, a debugger, or Ctrl-Z: a wait that was interrupted goes on by calls of the kernel's choice.
#[test]
fn every_process_goes_on_after_a_stop() {
    let (mut vm, _dir) = worked_on_a_disk("");
    let mut all = vm.processes().unwrap();
    all.push(vm.pid());
    assert!(all.len() >= 3, "{all:?}");
    for pid in &all {
        let stopped = format!("{pid}: it does not stop");
        kill(Pid::from_raw(*pid), Signal::SIGSTOP).unwrap();
        // A process that has stopped shows so; until then there is nothing to wait on but its state.
        let state = || fs::read_to_string(format!("/proc/{pid}/stat")).unwrap();
        assert!(
            (0..1_000_000).any(|_| state().contains(") T ")),
            "{stopped}"
        );
        kill(Pid::from_raw(*pid), Signal::SIGCONT).unwrap();
    }
    let mut qmp = vm.qmp().unwrap();
    qmp.execute("query-status", json!({})).unwrap();
    assert_eq!(vm.processes().unwrap().len() + 1, all.len());
    drop(qmp);
    ends_well(vm);
}
