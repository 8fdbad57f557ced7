//! # The processes of a VM and their jails
//!
//! **Job.** Invariants 3, 4 and 8 of the design on live processes: who holds which descriptor, what confines whom, and
//! that nothing outlives the control process. **Who is not trusted.** The VMM and its devices.
//! **Why this way.** All of it is asked from the kernel while a guest runs; a bare guest that sleeps is enough.
#![allow(clippy::unwrap_used)] // in a test, a panic is the report

use std::collections::BTreeMap;
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;
use tests::host::{Tap, require_kvm, require_root};
use tests::jail::{Jail, NAMESPACES};
use tests::payload::Payload;
use tests::procfs::{self, Fd};
use tests::vm::{Vm, binary};
use tests::wait::{Deadline, Watched, readable};

const LIMIT: Duration = Duration::from_secs(30);
/// Within this, all processes of a VM are gone once its control process is.
const GONE: Duration = Duration::from_millis(100);

struct Running {
    vm: Vm,
    _tap: Tap,
    _dir: tempfile::TempDir,
}

/// A guest that has used its disk and now sleeps, beside a network card.
fn running(tap: &str, subnet: u8, more: &[&str]) -> Running {
    require_kvm();
    require_root();
    let dir = tempfile::tempdir().unwrap();
    let disk = dir.path().join("disk.img");
    std::fs::File::create(&disk)
        .unwrap()
        .set_len(4 << 20)
        .unwrap();
    let tap = Tap::new(tap, &format!("10.7.{subnet}.1/24")).unwrap();
    let mut vm = Vm::builder()
        .args(["-machine", "microvm", "-m", "128"])
        .kernel(&Payload::BlkRw.path(), "end=halt")
        .disk("d0", &disk, "")
        .tap("n0", &tap.name, "52:54:00:00:00:11")
        .args(more)
        .with_qmp()
        .start()
        .unwrap();
    vm.wait_for("BLK-RW OK", LIMIT)
        .unwrap_or_else(|e| panic!("{e}"));
    Running {
        vm,
        _tap: tap,
        _dir: dir,
    }
}

/// How many descriptors of each kind.
fn kinds(fds: &BTreeMap<i32, Fd>) -> BTreeMap<String, usize> {
    let mut counts = BTreeMap::new();
    for fd in fds.values() {
        *counts.entry(fd.kind().to_owned()).or_insert(0) += 1;
    }
    counts
}

#[test]
fn only_the_control_process_holds_kvm() {
    let mut running = running("sv-kvm", 11, &[]);
    let control = running.vm.pid();
    let kvm = |pid: i32| {
        procfs::fds(pid)
            .unwrap()
            .values()
            .filter(|f| f.kind().contains("kvm"))
            .count()
    };
    assert!(
        kvm(control) >= 2,
        "the VM and its processor at least: {:?}",
        procfs::fds(control)
    );
    let others = running.vm.processes().unwrap();
    assert!(
        others.len() >= 3,
        "a broker, a disk and a network card: {others:?}"
    );
    for pid in others {
        assert_eq!(kvm(pid), 0, "{:?}", Jail::of(pid));
    }
}

#[test]
fn the_control_process_holds_no_back_end() {
    let running = running("sv-back", 12, &[]);
    for (number, fd) in procfs::fds(running.vm.pid()).unwrap() {
        assert!(
            !fd.target.contains("disk.img") && !fd.target.contains("tun"),
            "descriptor {number} is {fd:?}"
        );
    }
}

#[test]
fn devices_are_jailed() {
    let mut running = running("sv-jail", 13, &[]);
    for name in ["block", "net"] {
        let pid = running
            .vm
            .process(name)
            .unwrap()
            .unwrap_or_else(|| panic!("no process {name}"));
        let jail = Jail::of(pid).unwrap();
        assert_eq!(jail.own_namespaces, NAMESPACES, "{jail}");
        assert_eq!(jail.capabilities, [0; 5], "{jail}");
        assert!(jail.no_new_privs, "{jail}");
        assert!(
            jail.threads.iter().all(|t| t.1 == 2),
            "a seccomp filter on each thread\n{jail}"
        );
        assert!(jail.root.is_empty() && jail.read_only_root, "{jail}");
        assert!(
            !readable_by_its_user(pid, jail.uid),
            "dumpable: its own user may read it\n{jail}"
        );
        assert_ne!(
            jail.uid, 0,
            "not root outside of its user namespace\n{jail}"
        );
        let limits = procfs::limits(pid).unwrap();
        for name in ["Max core file size", "Max processes"] {
            assert_ne!(
                limits[name].1,
                u64::MAX,
                "{name} is not limited: {limits:?}"
            );
        }
    }
}

/// Whether another process of the same user may look into this one. The kernel refuses that for a process that is not
/// dumpable, which no field of `/proc` shows.
fn readable_by_its_user(pid: i32, uid: u32) -> bool {
    let id = uid.to_string();
    let mut setpriv = Command::new("setpriv");
    setpriv
        .args(["--reuid", &id, "--regid", &id, "--clear-groups", "readlink"])
        .arg(format!("/proc/{pid}/ns/user"));
    setpriv.output().unwrap().status.success()
}

#[test]
fn the_kernel_shows_dumpable_processes_to_their_user() {
    require_root();
    // The other side of the question above: it must be able to say yes.
    let mut child = Command::new("setpriv")
        .args([
            "--reuid",
            "65534",
            "--regid",
            "65534",
            "--clear-groups",
            "sh",
            "-c",
            "echo; cat",
        ])
        .stdin(std::process::Stdio::piped())
        .stdout(std::process::Stdio::piped())
        .spawn()
        .unwrap();
    let output = child.stdout.as_ref().unwrap();
    assert!(
        readable(&[output.as_fd()], Deadline::after(LIMIT))
            .unwrap()
            .is_some()
    );
    let readable = readable_by_its_user(i32::try_from(child.id()).unwrap(), 65534);
    drop(child.stdin.take());
    child.wait().unwrap();
    assert!(readable);
}

#[test]
fn the_control_process_is_locked_down_before_the_guest_runs() {
    let running = running("sv-lock", 14, &[]);
    let jail = Jail::of(running.vm.pid()).unwrap();
    assert_eq!(
        jail.capabilities[1..3],
        [0, 0],
        "permitted and effective\n{jail}"
    );
    assert!(jail.no_new_privs, "{jail}");
    assert!(
        jail.threads.iter().all(|t| t.1 == 2),
        "a seccomp filter on each thread\n{jail}"
    );
}

#[test]
fn devices_hold_exactly_their_descriptors() {
    let mut running = running("sv-fds", 15, &[]);
    for (name, back_end) in [("block", "disk.img"), ("net", "tun")] {
        let pid = running
            .vm
            .process(name)
            .unwrap()
            .unwrap_or_else(|| panic!("no process {name}"));
        let fds = procfs::fds(pid).unwrap();
        for (number, fd) in &fds {
            let expected = match fd.kind() {
                "memfd" | "socket" | "eventfd" | "eventpoll" => true,
                "pipe" | "/dev/null" => *number <= 2,
                other => other.contains(back_end),
            };
            assert!(expected, "{name} holds {number}: {fd:?}");
        }
        let counts = kinds(&fds);
        assert_eq!(
            counts.get("socket"),
            Some(&1),
            "one vhost-user socket: {counts:?}"
        );
        let back_ends = fds.values().filter(|f| f.target.contains(back_end)).count();
        assert_eq!(back_ends, 1, "one back end: {counts:?}");
        // Guest RAM came as a descriptor, was mapped, and the descriptor closed: nothing can be passed on.
        assert!(
            !fds.values().any(|f| f.target.contains("guest-ram")),
            "{fds:?}"
        );
        // The disk's driver has started, the network card's has not: then there is nothing to share yet.
        let maps = std::fs::read_to_string(format!("/proc/{pid}/maps")).unwrap();
        let mapped = maps
            .lines()
            .filter(|l| l.contains("/memfd:guest-ram"))
            .count();
        assert_eq!(mapped, usize::from(name == "block"), "{maps}");
    }
}

#[test]
fn guest_ram_is_sealed() {
    let running = running("sv-seal", 17, &[]);
    let pid = running.vm.pid();
    let fds = procfs::fds(pid).unwrap();
    let ram: Vec<&i32> = fds
        .iter()
        .filter(|(_, f)| f.target.contains("guest-ram"))
        .map(|(n, _)| n)
        .collect();
    assert!(!ram.is_empty(), "{fds:?}");
    for number in ram {
        let file = std::fs::File::open(format!("/proc/{pid}/fd/{number}")).unwrap();
        let seals = nix::fcntl::fcntl(&file, nix::fcntl::FcntlArg::F_GET_SEALS).unwrap();
        let wanted = libc::F_SEAL_SHRINK | libc::F_SEAL_GROW | libc::F_SEAL_SEAL;
        assert_eq!(
            seals & wanted,
            wanted,
            "sealed against shrinking, growing and further seals"
        );
    }
}

#[test]
fn a_killed_control_process_leaves_nothing() {
    for signal in ["KILL", "SEGV"] {
        let mut running = running("sv-kill", 16, &[]);
        let pids = running.vm.processes().unwrap();
        assert!(pids.len() >= 3, "{pids:?}");
        let socket = running.vm.qmp_socket().unwrap();
        assert!(socket.exists());
        let pid = running.vm.pid().to_string();
        assert!(
            Command::new("kill")
                .args(["-s", signal, &pid])
                .status()
                .unwrap()
                .success()
        );
        running.vm.wait(LIMIT).unwrap();
        let survivors = running.vm.survivors(Deadline::after(GONE));
        assert!(
            survivors.is_empty(),
            "after SIG{signal} these still run: {survivors:?}"
        );
        assert!(
            !socket.exists(),
            "the QMP socket was left after SIG{signal}"
        );
    }
}

#[test]
fn a_guest_that_powers_off_leaves_nothing() {
    require_kvm();
    let mut vm = Vm::builder()
        .args(["-machine", "microvm", "-m", "128"])
        .kernel(&Payload::Hello.path(), "")
        .with_qmp()
        .start()
        .unwrap();
    let socket = vm.qmp_socket().unwrap();
    let status = vm.wait(LIMIT).unwrap();
    assert_eq!(status.code(), Some(0), "{}", vm.messages());
    assert!(vm.survivors(Deadline::after(GONE)).is_empty());
    assert!(!socket.exists(), "the QMP socket was left");
}

#[test]
fn a_killed_daemon_leaves_no_process_socket_or_pid_file() {
    require_kvm();
    require_root();
    let dir = tempfile::tempdir().unwrap();
    let (pidfile, socket, disk) = (
        dir.path().join("pid"),
        dir.path().join("qmp"),
        dir.path().join("disk.img"),
    );
    std::fs::File::create(&disk)
        .unwrap()
        .set_len(4 << 20)
        .unwrap();
    let status = daemon(&pidfile, &socket, &disk).status().unwrap();
    assert!(status.success(), "{status}");
    let pid: i32 = std::fs::read_to_string(&pidfile)
        .unwrap()
        .trim()
        .parse()
        .unwrap();
    let watched = Watched::new(pid).unwrap();
    let others: Vec<Watched> = procfs::descendants(pid)
        .unwrap()
        .into_iter()
        .filter_map(|p| Watched::new(p).ok())
        .collect();
    assert!(others.len() >= 2, "a broker and a disk");
    tests::qmp::Qmp::connect(&socket, &watched, LIMIT).unwrap();
    assert!(
        Command::new("kill")
            .args(["-s", "KILL", &pid.to_string()])
            .status()
            .unwrap()
            .success()
    );
    assert!(watched.ended(Deadline::after(LIMIT)).unwrap());
    let deadline = Deadline::after(GONE);
    for process in &others {
        assert!(
            process.ended(deadline).unwrap(),
            "process {} still runs",
            process.pid
        );
    }
    assert!(!socket.exists(), "the QMP socket was left");
    assert!(!pidfile.exists(), "the pid file was left");
    // and the next start with the same words trips over nothing
    let status = daemon(&pidfile, &socket, &disk).status().unwrap();
    assert!(status.success(), "{status}");
    let pid: i32 = std::fs::read_to_string(&pidfile)
        .unwrap()
        .trim()
        .parse()
        .unwrap();
    let watched = Watched::new(pid).unwrap();
    let mut qmp = tests::qmp::Qmp::connect(&socket, &watched, LIMIT).unwrap();
    qmp.execute("quit", serde_json::json!({})).unwrap();
    assert!(watched.ended(Deadline::after(LIMIT)).unwrap());
    assert!(!pidfile.exists(), "the pid file was left after quit");
}

fn daemon(pidfile: &Path, socket: &Path, disk: &Path) -> Command {
    let log: PathBuf = pidfile.with_extension("log");
    let mut command = Command::new(binary("stratovirt").unwrap());
    command
        .args(["-machine", "microvm", "-m", "128", "-daemonize", "-kernel"])
        .arg(Payload::FirstByte.path())
        .arg("-pidfile")
        .arg(pidfile)
        .arg("-qmp")
        .arg(format!("unix:{},server,nowait", socket.display()))
        .arg("-drive")
        .arg(format!("id=d0,file={},direct=off", disk.display()))
        .args(["-device", "virtio-blk-device,drive=d0,id=b0"])
        .arg("-serial")
        .arg(format!(
            "file,path={}",
            pidfile.with_extension("serial").display()
        ))
        .arg("-D")
        .arg(log);
    command
}

#[test]
fn an_absent_reader_does_not_block_the_guest() {
    require_kvm();
    // A pipe that nobody reads, as standard output. It holds 64 KiB; the guest writes four times that, and must still
    // power off.
    let (reader, writer) = std::io::pipe().unwrap();
    let mut child = Command::new(binary("stratovirt").unwrap())
        .args([
            "-machine", "microvm", "-m", "128", "-serial", "stdio", "-kernel",
        ])
        .arg(Payload::Machine.path())
        .args(["-append", "flood=256"])
        .stdin(std::process::Stdio::null())
        .stdout(writer)
        .spawn()
        .unwrap();
    let watched = Watched::new(i32::try_from(child.id()).unwrap()).unwrap();
    let ended = watched.ended(Deadline::after(LIMIT)).unwrap();
    if !ended {
        child.kill().unwrap();
    }
    let status = child.wait().unwrap();
    assert!(ended && status.success(), "{status}");
    assert!(
        readable(&[reader.as_fd()], Deadline::after(GONE))
            .unwrap()
            .is_some(),
        "the guest's text is in the pipe"
    );
}

#[test]
fn a_vm_that_waits_for_its_first_client_can_be_ended() {
    require_kvm();
    let dir = tempfile::tempdir().unwrap();
    let (monitor, serial) = (dir.path().join("qmp"), dir.path().join("serial"));
    let mut child = Command::new(binary("stratovirt").unwrap())
        .args(["-machine", "microvm", "-m", "128", "-kernel"])
        .arg(Payload::FirstByte.path())
        .arg("-qmp")
        .arg(format!("unix:{},server,nowait", monitor.display()))
        .arg("-chardev")
        .arg(format!("socket,id=c0,path={},server", serial.display()))
        .args(["-serial", "chardev:c0"])
        .spawn()
        .unwrap();
    let pid = i32::try_from(child.id()).unwrap();
    let watched = Watched::new(pid).unwrap();
    let qmp = tests::qmp::Qmp::connect_raw(&monitor, &watched, LIMIT).unwrap();
    nix::sys::signal::kill(
        nix::unistd::Pid::from_raw(pid),
        nix::sys::signal::Signal::SIGTERM,
    )
    .unwrap();
    let ended = watched.ended(Deadline::after(LIMIT)).unwrap();
    if !ended {
        child.kill().unwrap();
    }
    child.wait().unwrap();
    drop(qmp);
    assert!(ended, "SIGTERM was not heard");
}
