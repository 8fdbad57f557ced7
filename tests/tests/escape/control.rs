//! The attempts again, in the threads of the control process of a VM that runs.
//!
//! A tracer takes the thread over and makes its calls. Without the filter nothing is tried: a control process that root started
//! has root's name on the host, and what an attempt then did would be done to this machine.

use std::collections::BTreeMap;

use tests::escape::remote::Remote;
use tests::escape::{Held, Jail, Outcome, attempts};
use tests::host::require_kvm;
use tests::payload::Payload;
use tests::procfs::{self, Fd, Status};
use tests::vm::Vm;
use tests::wait::Deadline;

use super::LIMIT;

/// A VM whose guest sleeps.
fn asleep(dir: &std::path::Path) -> Vm {
    let disk = dir.join("disk.img");
    std::fs::File::create(&disk)
        .unwrap()
        .set_len(super::DISK)
        .unwrap();
    let mut vm = Vm::builder()
        .args(["-machine", "microvm", "-m", "128"])
        .kernel(&Payload::StartDevice.path(), "device=2 queues=1")
        .disk("d0", &disk, "")
        .with_qmp()
        .start()
        .unwrap();
    // A guest that runs finds everything locked down.
    vm.wait_for("STARTED", LIMIT)
        .unwrap_or_else(|e| panic!("{e}"));
    vm.processes().unwrap();
    vm
}

/// The thread that `jail` is about.
fn thread(vm: &Vm, jail: Jail) -> i32 {
    let name = match jail {
        Jail::Qmp => "qmp",
        Jail::Vcpu => "vcpu0",
        _ => return vm.pid(),
    };
    let threads = Status::of_threads(vm.pid()).unwrap();
    let found = threads.iter().find(|(_, status)| status.name() == name);
    *found.unwrap_or_else(|| panic!("no thread {name}")).0
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
        let vm = running.get_or_insert_with(|| asleep(dir.path()));
        let held = held(&procfs::fds(vm.pid()).unwrap());
        let mut remote = Remote::take(thread(vm, jail)).unwrap();
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
