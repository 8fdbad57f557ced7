//! # A VM among the unfriendly
//!
//! **Job.** Device processes that lie, are silent or flood the log; streams that nobody reads: each has an end, and says why.
//! **Who is not trusted.** The program in place of `block`, and whoever holds the other end of standard error.
//! **Why this way.** The real program with one device binary exchanged, so that nothing is known to it in advance.
#![allow(clippy::unwrap_used)] // in a test, a panic is the report

use std::fs::File;
use std::io::Read;
use std::os::fd::AsFd;
use std::os::unix::fs::OpenOptionsExt;
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;
use tests::host::{require_kvm, require_root};
use tests::lying;
use tests::payload::Payload;
use tests::vm::{Vm, VmBuilder, binary};
use tests::wait::{Deadline, Watched, readable};

const LIMIT: Duration = Duration::from_secs(30);
/// Serves in place of `block`.
const LIAR: &str = env!("CARGO_BIN_EXE_lying-device");
/// Less than any time limit that the VMM has for a device.
const AT_ONCE: Duration = Duration::from_secs(3);

/// A log that is a FIFO, and its reading end.
fn fifo(dir: &Path) -> (PathBuf, File) {
    let path = dir.join("log");
    nix::unistd::mkfifo(&path, nix::sys::stat::Mode::S_IRWXU).unwrap();
    let reader = File::options()
        .read(true)
        .custom_flags(libc::O_NONBLOCK)
        .open(&path)
        .unwrap();
    (path, reader)
}

/// A VM whose disk is served by `lying-device`, in the way that `how` names.
fn with_device(dir: &Path, how: &str, log: &Path) -> Vm {
    builder(dir, how, log, Payload::Hello).start().unwrap()
}

fn builder(dir: &Path, how: &str, log: &Path, payload: Payload) -> VmBuilder {
    lying::disk(LIAR, dir, how)
        .kernel(&payload.path(), "end=halt")
        .arg("-D")
        .arg(log)
}

#[test]
fn a_lie_is_the_reason_that_is_told() {
    let dir = tempfile::tempdir().unwrap();
    let mut vm = with_device(dir.path(), "liar", &dir.path().join("log"));
    let status = vm.wait(LIMIT).unwrap();
    let messages = vm.messages();
    assert_eq!(status.code(), Some(1), "{messages}");
    assert!(
        messages.contains("malformed answer to GET_FEATURES"),
        "{messages}"
    );
}

/// Each lie in the handshake is the end of the start, with its reason.
#[test]
fn every_lie_of_the_handshake_is_told() {
    for (how, words) in [
        ("no-version-1", "offers virtio features"),
        ("no-config", "offers vhost-user features"),
        ("many-queues", "claims 99 queues"),
        ("all-queues", "claims 18446744073709551615 queues"),
        ("short-config", "bytes of configuration space"),
        ("long-config", "bytes of configuration space"),
        (
            "short-number",
            "malformed answer to GET_FEATURES: it is too short",
        ),
        ("huge", "it is larger than any message"),
        ("no-reply-flag", "it has flags that no reply has"),
        ("descriptor", "it brings descriptors"),
        ("descriptors", "it brings several descriptors"),
        ("twice", "it is for another request"),
        ("flood", "it is for another request"),
        ("half", "did not answer GET_CONFIG"),
        ("leaves", "ended with status 0"),
    ] {
        let dir = tempfile::tempdir().unwrap();
        let mut vm = with_device(dir.path(), how, &dir.path().join("log"));
        let status = vm.wait(LIMIT).unwrap();
        let messages = vm.messages();
        assert_eq!(status.code(), Some(1), "{how}: {messages}");
        assert!(messages.contains(words), "{how}: {messages}");
        assert!(vm.survivors(Deadline::after(AT_ONCE)).is_empty(), "{how}");
    }
}

/// A device that lies when its guest uses it is started again, lies again, and is given up; the VM goes on.
#[test]
fn a_device_that_lies_at_work_fails_and_the_vm_goes_on() {
    for how in [
        "no-memory",
        "no-inflight",
        "two-inflights",
        "empty-inflight",
        "leaves-at-kick",
        "wrong-ack",
        "silent-at-enable",
    ] {
        let dir = tempfile::tempdir().unwrap();
        let mut vm = builder(dir.path(), how, &dir.path().join("log"), Payload::BlkRw)
            .with_qmp()
            .start()
            .unwrap();
        let mut qmp = vm.qmp().unwrap();
        qmp.wait_failed(how, LIMIT)
            .unwrap_or_else(|e| panic!("{how}: {e}: {}", vm.messages()));
        let status = qmp.execute("query-status", serde_json::json!({})).unwrap();
        assert_eq!(status["running"], true, "{how}: {status}");
        assert_eq!(vm.process("block").unwrap(), None, "{how}");
        qmp.execute("quit", serde_json::json!({})).unwrap();
        assert_eq!(
            vm.wait(LIMIT).unwrap().code(),
            Some(0),
            "{how}: {}",
            vm.messages()
        );
    }
}

#[test]
fn a_start_that_waits_for_a_silent_device_can_be_ended() {
    let dir = tempfile::tempdir().unwrap();
    let (path, log) = fifo(dir.path());
    let mut vm = with_device(dir.path(), "silent", &path);
    assert!(
        readable(&[log.as_fd()], Deadline::after(LIMIT))
            .unwrap()
            .is_some(),
        "{}",
        vm.messages()
    );
    vm.processes().unwrap();
    nix::sys::signal::kill(
        nix::unistd::Pid::from_raw(vm.pid()),
        nix::sys::signal::Signal::SIGTERM,
    )
    .unwrap();
    let status = vm.wait(AT_ONCE).unwrap();
    assert_eq!(status.signal(), Some(libc::SIGTERM), "{status}");
    assert!(vm.survivors(Deadline::after(AT_ONCE)).is_empty());
}

#[test]
fn a_log_that_nobody_reads_does_not_stop_the_broker() {
    let dir = tempfile::tempdir().unwrap();
    let (path, _log) = fifo(dir.path());
    let filler = File::options()
        .write(true)
        .custom_flags(libc::O_NONBLOCK)
        .open(&path)
        .unwrap();
    while nix::unistd::write(&filler, &[b'x'; 4096]).is_ok() {}
    let mut vm = with_device(dir.path(), "chatty", &path);
    let status = vm.wait(LIMIT).unwrap();
    let messages = vm.messages();
    assert_eq!(status.code(), Some(1), "{messages}");
    assert!(messages.contains("ended with status 3"), "{messages}");
}

#[test]
fn a_log_without_a_reader_is_an_error() {
    let dir = tempfile::tempdir().unwrap();
    let (path, reader) = fifo(dir.path());
    drop(reader);
    let mut vm = Vm::builder()
        .args(["-machine", "none"])
        .without_serial()
        .arg("-D")
        .arg(&path)
        .start()
        .unwrap();
    let status = vm.wait(LIMIT).unwrap();
    assert_eq!(status.code(), Some(1));
    assert!(vm.messages().contains("-D "), "{}", vm.messages());
}

#[test]
fn standard_error_that_takes_nothing_is_no_reason_to_abort() {
    let full = || File::options().write(true).open("/dev/full").unwrap();
    let run = |words: &[&str]| {
        Command::new(binary("stratovirt").unwrap())
            .args(words)
            .stdout(full())
            .stderr(full())
            .status()
            .unwrap()
    };
    assert_eq!(run(&["-no-such-option"]).code(), Some(1));
    assert_eq!(run(&["-version"]).code(), Some(0));
    require_kvm();
    let kernel = Payload::Hello.path();
    let guest = ["-machine", "microvm", "-m", "128", "-disable-seccomp"];
    let guest = [&guest[..], &["-serial", "pty", "-kernel"]].concat();
    assert_eq!(
        run(&[&guest[..], &[kernel.to_str().unwrap()]].concat()).code(),
        Some(0)
    );
}

#[test]
fn a_daemon_lets_go_of_its_callers_standard_error() {
    let dir = tempfile::tempdir().unwrap();
    let pidfile = dir.path().join("pid");
    let (mut reader, writer) = std::io::pipe().unwrap();
    let mut command = Command::new(binary("stratovirt").unwrap());
    command
        .args(["-machine", "none", "-daemonize", "-pidfile"])
        .arg(&pidfile)
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(writer);
    let status = command.status().unwrap();
    // The command holds the writing end too.
    drop(command);
    let pid = std::fs::read_to_string(&pidfile).unwrap();
    let watched = Watched::new(pid.trim().parse().unwrap()).unwrap();
    let ended = readable(&[reader.as_fd()], Deadline::after(AT_ONCE)).unwrap();
    nix::sys::signal::kill(
        nix::unistd::Pid::from_raw(watched.pid),
        nix::sys::signal::Signal::SIGTERM,
    )
    .unwrap();
    assert!(status.success(), "{status}");
    assert!(ended.is_some(), "somebody holds standard error still");
    let mut text = String::new();
    reader.read_to_string(&mut text).unwrap();
    assert_eq!(text, "");
    assert!(watched.ended(Deadline::after(LIMIT)).unwrap());
}

#[test]
fn without_proc_the_reason_is_told() {
    require_root();
    let out = Command::new("unshare")
        .args([
            "--mount",
            "sh",
            "-c",
            "mount -t tmpfs none /proc && exec \"$0\" -machine none",
        ])
        .arg(binary("stratovirt").unwrap())
        .output()
        .unwrap();
    let messages = String::from_utf8_lossy(&out.stderr);
    assert_eq!(out.status.code(), Some(1), "{messages}");
    assert!(messages.contains("is /proc mounted?"), "{messages}");
}
