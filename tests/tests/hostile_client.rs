//! # A QMP client that wants more than its socket gives
//!
//! **Job.** A client floods the control process with descriptors, more than it has room for: all are closed, and others are
//! served. It passes one that keeps for an hour whoever closes it: the VM ends when it is told to, and leaves nothing behind.
//! **Who is not trusted.** The client. It holds a QMP socket and what any user can make; no root, no rights over files.
//! **Why this way.** A pipe tells when the last copy of its end was closed, in any process, so nothing is counted or waited for.
#![allow(clippy::unwrap_used)] // in a test, a panic is the report

use std::io::{ErrorKind, Write};
use std::net::{Ipv4Addr, TcpListener, TcpStream};
use std::os::fd::{AsFd, OwnedFd};
use std::process::Command;
use std::time::Duration;

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::json;
use tests::procfs;
use tests::qmp::{Qmp, QmpError};
use tests::vm::sleeping_guest;
use tests::wait::{Deadline, readable};

const LIMIT: Duration = Duration::from_secs(30);

/// Whether every copy of the end that writes is closed, in whatever process, within [`LIMIT`].
fn all_closed(reader: &std::io::PipeReader) -> bool {
    readable(&[reader.as_fd()], Deadline::after(LIMIT))
        .unwrap()
        .is_some()
}

#[test]
fn a_flood_of_descriptors_is_closed_and_others_are_served() {
    /// Most that one message can carry.
    const AT_ONCE: usize = 253;
    /// Clients at once on one socket, but for one.
    const CLIENTS: usize = 7;
    let mut vm = sleeping_guest();
    let mut other = vm.qmp().unwrap();
    let held = procfs::fds(vm.pid()).unwrap().len();
    // Less room than one message can fill, more than what may wait and have a name.
    let limit = Command::new("prlimit")
        .arg(format!("--pid={}", vm.pid()))
        .arg(format!("--nofile={}:", held + 300))
        .output()
        .unwrap();
    assert!(limit.status.success(), "{limit:?}");

    let (reader, writer) = std::io::pipe().unwrap();
    let many = vec![writer.as_fd(); AT_ONCE];
    let mut clients: Vec<Qmp> = (0..CLIENTS).map(|_| vm.qmp().unwrap()).collect();
    for _ in 0..100 {
        for client in &mut clients {
            // White space before a command that never comes.
            client.send_with(" ", &many).unwrap();
        }
    }
    for client in &mut clients {
        // All that came before was read when this is answered.
        client.execute("query-status", json!({})).unwrap();
        for number in 0..40 {
            let name = json!({ "fdname": format!("n{number}") });
            // Refused from the 129th on, of all clients together.
            let _ = client.execute_with("getfd", name, &many);
        }
    }
    other.execute("query-status", json!({})).unwrap();
    let (_mine, file) = std::os::unix::net::UnixStream::pair().unwrap();
    let refused = other.execute_with("getfd", json!({ "fdname": "n" }), &[file.as_fd()]);
    assert!(
        refused.unwrap_err().to_string().contains("128"),
        "the names are all taken"
    );
    drop((clients, many));
    drop(writer);
    assert!(all_closed(&reader), "descriptors of the flood stay open");
    other
        .execute_with("getfd", json!({ "fdname": "n" }), &[file.as_fd()])
        .unwrap();
    // New clients find room.
    vm.qmp().unwrap().execute("quit", json!({})).unwrap();
    assert!(vm.wait(LIMIT).unwrap().success());
}

/// A socket whose last closing takes an hour: its peer, which comes along, takes nothing, and what was sent is to arrive first.
fn lingering() -> (OwnedFd, TcpStream) {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
    let mut socket = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
    let (peer, _) = listener.accept().unwrap();
    let linger = nix::libc::linger {
        l_onoff: 1,
        l_linger: 3600,
    };
    nix::sys::socket::setsockopt(&socket, nix::sys::socket::sockopt::Linger, &linger).unwrap();
    socket.set_nonblocking(true).unwrap();
    loop {
        match socket.write(&[0; 1 << 16]) {
            Ok(_) => {}
            Err(e) if e.kind() == ErrorKind::WouldBlock => break,
            Err(e) => panic!("{e}"),
        }
    }
    (socket.into(), peer)
}

#[test]
fn a_descriptor_that_takes_an_hour_to_close_keeps_no_vm_alive() {
    let closed = ("closefd", json!({ "fdname": "slow" }));
    let address = json!({ "type": "fd", "data": { "str": "slow" } });
    let backend = json!({ "type": "socket", "data": { "addr": address } });
    let daemon = ("chardev-add", json!({ "id": "d", "backend": backend }));
    for (how, (command, arguments)) in [
        (Signal::SIGTERM, &closed),
        (Signal::SIGKILL, &closed),
        (Signal::SIGTERM, &daemon),
        (Signal::SIGKILL, &daemon),
    ] {
        let mut vm = sleeping_guest();
        vm.processes().unwrap();
        let mut client = vm.qmp().unwrap();
        let (socket, _peer) = lingering();
        client
            .execute_with("getfd", json!({ "fdname": "slow" }), &[socket.as_fd()])
            .unwrap();
        drop(socket);
        if *command == "closefd" {
            client
                .send_raw(&format!(
                    "{{\"execute\":\"{command}\",\"arguments\":{arguments}}}"
                ))
                .unwrap();
        } else {
            let refused = client.execute(command, arguments.clone());
            assert!(
                matches!(&refused, Err(QmpError::Refused { description, .. })
                    if description.contains("not a unix socket")),
                "{refused:?}"
            );
        }
        kill(Pid::from_raw(vm.pid()), how).unwrap();
        vm.wait(LIMIT)
            .unwrap_or_else(|e| panic!("{how} after {command}: {e}"));
        let left = vm.survivors(Deadline::after(LIMIT));
        assert!(left.is_empty(), "{how} after {command}: {left:?}");
    }
}
