//! # The control process is not on the data path
//!
//! **Job.** Invariant 2 of the design: under steady I/O the control process does not wake. **Who is not trusted.** The VMM.
//! **Why this way.** A thread that was not woken has not been switched to: the kernel's own counters of every thread but the
//! vCPU's say so, over hundreds of requests that a bare guest makes and checks without a pause.
#![allow(clippy::unwrap_used)] // in a test, a panic is the report

use std::collections::BTreeMap;
use std::time::Duration;

use tests::host::{require_kvm, require_root};
use tests::payload::Payload;
use tests::procfs::{self, Status};
use tests::vm::Vm;

const LIMIT: Duration = Duration::from_secs(60);

/// Context switches of each thread of process `pid`, by id, for those that are no vCPU.
fn switches(pid: i32) -> BTreeMap<i32, (String, u64)> {
    let count = |status: &Status, name| status.field(name).parse::<u64>().unwrap();
    Status::of_threads(pid)
        .unwrap()
        .into_iter()
        .filter(|(_, status)| !status.name().starts_with("vcpu"))
        .map(|(tid, status)| {
            let sum = count(&status, "voluntary_ctxt_switches")
                + count(&status, "nonvoluntary_ctxt_switches");
            (tid, (status.name().to_owned(), sum))
        })
        .collect()
}

#[test]
fn the_control_process_sleeps_while_the_disk_works() {
    require_kvm();
    require_root();
    let dir = tempfile::tempdir().unwrap();
    let disk = dir.path().join("disk.img");
    std::fs::File::create(&disk)
        .unwrap()
        .set_len(4 << 20)
        .unwrap();
    let mut vm = Vm::builder()
        .args(["-machine", "microvm", "-m", "128"])
        .kernel(&Payload::BlkLoop.path(), "spin=1")
        .with_qmp()
        .disk("d0", &disk, ",poll-us=0")
        .start()
        .unwrap();
    let expect = |vm: &mut Vm, text: &str| {
        vm.wait_for(text, LIMIT)
            .unwrap_or_else(|e| panic!("{e}\n{}", vm.messages()))
    };
    expect(&mut vm, "LOOP 20\r");
    let control = vm.pid();
    let block = vm.process("block").unwrap().unwrap();
    let broker = vm.process("broker").unwrap().unwrap();
    let (before, before_broker) = (switches(control), switches(broker));
    let worked = procfs::context_switches(block).unwrap();
    expect(&mut vm, "LOOP 320\r");
    let (after, after_broker) = (switches(control), switches(broker));
    assert!(before.len() >= 2, "main and qmp are there: {before:?}");
    assert_eq!(after, before, "a thread of the control process woke");
    assert_eq!(after_broker, before_broker, "the broker woke");
    // The counters do count: the device process, which does not poll here, was woken for what the others were not.
    assert!(procfs::context_switches(block).unwrap() > worked);
    vm.console.send("x").unwrap();
    expect(&mut vm, "BLK-LOOP OK");
}
