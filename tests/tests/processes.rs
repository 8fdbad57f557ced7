//! # The processes of a VM
//!
//! **Job.** Nothing outlives the control process, and nothing holds it up. (Who holds which descriptor and what confines whom
//! is `jail.rs`.) **Who is not trusted.** The VMM and its devices.
//! **Why this way.** All of it is asked from the kernel while a guest runs; a bare guest that sleeps is enough.
#![allow(clippy::unwrap_used)] // in a test, a panic is the report

use std::os::fd::AsFd;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};
use tests::host::{Tap, require_kvm, require_root};
use tests::payload::Payload;
use tests::procfs;
use tests::vm::{Vm, binary};
use tests::wait::{Deadline, Watched, readable};

const LIMIT: Duration = Duration::from_secs(30);
/// Within this, all processes of a VM are gone once its control process is, where nothing else wants the processors: a median of
/// [`TIMES`] VMs keeps to it on a busy machine as well.
const GONE: Duration = Duration::from_millis(100);

/// How many VMs the time is the median of.
const TIMES: usize = 5;

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

#[test]
fn a_killed_control_process_leaves_nothing() {
    for signal in ["KILL", "SEGV"] {
        let mut took: Vec<Duration> = (0..TIMES)
            .map(|_| {
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
                let since = Instant::now();
                let survivors = running.vm.survivors(Deadline::after(LIMIT));
                let took = since.elapsed();
                assert!(
                    survivors.is_empty(),
                    "after SIG{signal} these still run: {survivors:?}"
                );
                assert!(
                    !socket.exists(),
                    "the QMP socket was left after SIG{signal}"
                );
                took
            })
            .collect();
        took.sort_unstable();
        assert!(took[TIMES / 2] <= GONE, "after SIG{signal}: {took:?}");
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
    assert!(vm.survivors(Deadline::after(LIMIT)).is_empty());
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
    let deadline = Deadline::after(LIMIT);
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
    // A second VM finds the pid file of the first one, says so, and leaves everything as it is.
    let second = Command::new(binary("stratovirt").unwrap())
        .args(["-machine", "none", "-pidfile"])
        .arg(&pidfile)
        .output()
        .unwrap();
    assert_eq!(second.status.code(), Some(1));
    assert_eq!(
        String::from_utf8_lossy(&second.stderr),
        format!(
            "stratovirt: -pidfile {}: exists already; remove it if no VM uses it\n",
            pidfile.display()
        )
    );
    let still = std::fs::read_to_string(&pidfile).unwrap();
    assert_eq!(still.trim(), pid.to_string());
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
