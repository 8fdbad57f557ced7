//! The attempts again, in the threads of the control process of a VM that runs, and in one of a shared folder's process that has a
//! filter for itself.
//!
//! A tracer takes the thread over and makes its calls. Without the filter nothing is tried: a control process that root started
//! has root's name on the host, and what an attempt then did would be done to this machine.

use serde_json::json;
use std::collections::BTreeMap;
use std::path::Path;

use tests::escape::remote::Remote;
use tests::escape::{Held, Jail, Outcome, attempts};
use tests::host::{require_kvm, require_root};
use tests::payload::Payload;
use tests::procfs::{self, Fd, Status};
use tests::vm::{Vm, expect};
use tests::wait::{Deadline, Watched};

use super::LIMIT;

/// A VM whose guest sleeps, with a disk, or with a folder where `jail` is one's; it goes on from a snapshot where that has to come in.
fn asleep(dir: &Path, jail: Jail) -> Vm {
    if jail == Jail::Pager {
        return gone_on(dir);
    }
    let builder = Vm::builder()
        .args(["-machine", "microvm", "-m", "128"])
        .with_qmp();
    let kernel = Payload::StartDevice.path();
    let builder = if matches!(jail, Jail::Window | Jail::Mover) {
        require_root();
        let folder = dir.join("shared");
        std::fs::create_dir_all(&folder).unwrap();
        builder
            .kernel(&kernel, "device=26 queues=2")
            .arg("-fsdev")
            .arg(format!("local,id=f,path={}", folder.display()))
            .arg("-device")
            .arg("virtio-fs-device,fsdev=f,tag=share,id=fs0,restart=off,cache-size=4M")
    } else {
        let disk = dir.join("disk.img");
        std::fs::File::create(&disk)
            .unwrap()
            .set_len(super::DISK)
            .unwrap();
        builder
            .kernel(&kernel, "device=2 queues=1")
            .disk("d0", &disk, "")
    };
    let mut vm = builder.start().unwrap();
    // A guest that runs finds everything locked down.
    vm.wait_for("STARTED", LIMIT)
        .unwrap_or_else(|e| panic!("{e}"));
    vm.processes().unwrap();
    vm
}

/// A VM that goes on from a snapshot, which is made in `dir` unless it is there, and whose memory comes in when it is touched.
fn gone_on(dir: &Path) -> Vm {
    let template = dir.join("template");
    let disk = dir.join("disk.img");
    let builder = || {
        Vm::builder()
            .args(["-machine", "microvm", "-m", "128"])
            .kernel(&Payload::BlkLoop.path(), "spin=1 reads=1")
            .disk("d0", &disk, "")
            .arg("-snapshot-dir")
            .arg(dir)
            .with_qmp()
    };
    if !template.exists() {
        std::fs::File::create(&disk)
            .unwrap()
            .set_len(1 << 20)
            .unwrap();
        let mut vm = builder().start().unwrap();
        expect(&mut vm, "LOOP ");
        let mut qmp = vm.qmp().unwrap();
        qmp.execute("stop", json!({})).unwrap();
        let uri = format!("file:{}", template.display());
        qmp.execute("migrate", json!({ "uri": uri })).unwrap();
        vm.kill().unwrap();
    }
    let incoming = format!("file:{},lazy=on", template.display());
    let mut vm = builder().args(["-incoming", &incoming]).start().unwrap();
    // A guest that runs finds everything locked down.
    expect(&mut vm, "LOOP ");
    vm.processes().unwrap();
    vm
}

/// The process and the thread of it that `jail` is about.
fn place(vm: &mut Vm, jail: Jail) -> (i32, i32) {
    let (pid, name) = match jail {
        Jail::Qmp => (vm.pid(), "qmp"),
        Jail::Vcpu => (vm.pid(), "vcpu0"),
        Jail::Window => (vm.pid(), "window"),
        Jail::Pager => (vm.pid(), "pager"),
        // There is one for each processor but the first.
        Jail::Mover => (vm.process("fs").unwrap().unwrap(), "mover1"),
        _ => return (vm.pid(), vm.pid()),
    };
    let threads = Status::of_threads(pid).unwrap();
    let mut all = threads.iter();
    let found = all.find(|(_, status)| status.name() == name);
    let tid = found.unwrap_or_else(|| panic!("process {pid} has no thread {name}"));
    (pid, *tid.0)
}

/// What it holds that a way out could begin at.
fn held(fds: &BTreeMap<i32, Fd>) -> Held {
    let first = |kind: &str| {
        let found = fds.iter().find(|(_, fd)| fd.kind().contains(kind));
        found.map_or(-1, |(number, _)| *number)
    };
    Held {
        log: 2,
        socket: first("socket"),
        backend: first("kvm-vm"),
        ram: first("memfd"),
        kick: first("eventfd"),
        call: first("kvm-vcpu"),
        ring: -1,
    }
}

/// Makes all attempts in a thread. Each must be killed, or be refused by what it is refused by everywhere.
fn all_attempts(jail: Jail) {
    require_kvm();
    let dir = tempfile::tempdir().unwrap();
    let (mut wrong, mut killed, mut refused) = (Vec::new(), 0, 0);
    let mut running = None;
    for attempt in attempts::all() {
        let Some((expected, _)) = attempt.expected(jail) else {
            continue;
        };
        let vm = running.get_or_insert_with(|| asleep(dir.path(), jail));
        let (pid, tid) = place(vm, jail);
        let watched = Watched::new(pid).unwrap();
        let held = held(&procfs::fds(pid).unwrap());
        let mut remote = match jail {
            Jail::Mover => Remote::take_with_guest_memory(tid),
            _ => Remote::take(tid),
        }
        .unwrap();
        let outcome = Outcome::of(attempt.make(&mut remote, &held));
        let outcome = match (outcome, remote.died_of()) {
            (None, Some(libc::SIGSYS)) => Outcome::Killed,
            (Some(outcome), None) => outcome,
            other => {
                wrong.push(format!("{}: {other:?}", attempt.name));
                running = None;
                continue;
            }
        };
        drop(remote);
        match outcome {
            Outcome::Killed => {
                killed += 1;
                // The whole process, not only the thread.
                let mut vm = running.take().unwrap();
                assert!(watched.ended(Deadline::after(LIMIT)).unwrap());
                if pid != vm.pid() {
                    vm.kill().unwrap();
                }
                // The tracer may have collected it already.
                let _ = vm.wait(LIMIT);
                assert!(vm.survivors(Deadline::after(LIMIT)).is_empty());
            }
            Outcome::Through(_) => {}
            _ => refused += 1,
        }
        // The filter answers some calls instead of making them.
        let answered = outcome == Outcome::Refused(libc::ENOSYS);
        if !outcome.is(expected) && !answered {
            wrong.push(format!("{}: {outcome}, must be {expected:?}", attempt.name));
        }
        if !matches!(outcome, Outcome::Killed) {
            println!("{jail} {:32} {outcome}", attempt.name);
        }
    }
    let count = killed + refused;
    assert!(
        wrong.is_empty(),
        "{} of {count} attempts in {jail} did not end as they must:\n{}",
        wrong.len(),
        wrong.join("\n")
    );
    println!("blocked {count}/{count} in {jail}: {killed} killed, {refused} without effect");
    assert!(count >= 80);
}

#[test]
fn nothing_gets_out_of_a_vcpus_thread() {
    all_attempts(Jail::Vcpu);
}

#[test]
fn nothing_gets_out_of_the_qmp_thread() {
    all_attempts(Jail::Qmp);
}

#[test]
fn nothing_gets_out_of_the_control_processs_main_thread() {
    all_attempts(Jail::Main);
}

#[test]
fn nothing_gets_out_of_the_thread_of_windows() {
    all_attempts(Jail::Window);
}

#[test]
fn nothing_gets_out_of_the_thread_that_brings_memory_in() {
    all_attempts(Jail::Pager);
}

#[test]
fn nothing_gets_out_of_a_thread_that_moves_a_folders_data() {
    all_attempts(Jail::Mover);
}
