//! # Who wakes while a device works
//!
//! **Job.** The control process is not on the data path: under steady I/O it does not wake. A card's process does, but where its netdev
//! lets it look for packets (`poll-us`). **Who is not trusted.** The VMM.
//! **Why this way.** A thread that was not woken has not been switched to: the kernel's own counters of every thread but the
//! vCPU's say so, over hundreds of requests that a bare guest makes and checks without a pause.
#![allow(clippy::unwrap_used)] // in a test, a panic is the report

use std::collections::BTreeMap;
use std::process::{Command, Stdio};

use serde_json::json;
use tests::host::{Tap, require_kvm, require_root};
use tests::payload::Payload;
use tests::procfs::{self, Status};
use tests::vm::{Vm, ends_well, expect};

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

/// The machine's other work waits for all threads of this process, where that may be asked for; where not, it disturbs.
fn keep_others_out(pid: i32) {
    let mut chrt = Command::new("chrt");
    chrt.args(["--rr", "--all-tasks", "--pid", "1", &pid.to_string()]);
    let _ = chrt.stderr(Stdio::null()).status();
}

/// How often the card's process has gone to sleep by the time that the guest has its thousandth answer.
fn sleeps_of_card(vm: &mut Vm) -> u64 {
    expect(vm, "LOOP 0\r");
    let card = vm.process("net").unwrap().unwrap();
    // Who reads what the guest says is not to come behind.
    for pid in [nix::unistd::getpid().as_raw(), card, vm.pid()] {
        keep_others_out(pid);
    }
    expect(vm, "LOOP 1000\r");
    let status = Status::of(card).unwrap();
    let count = status.field("voluntary_ctxt_switches");
    count.parse().unwrap()
}

#[test]
fn a_card_sleeps_less_where_its_netdev_lets_it_look_for_packets() {
    require_kvm();
    require_root();
    let tap = Tap::new("sv-poll", "10.7.74.1/24").unwrap();
    let guest = || {
        Vm::builder()
            .args(["-machine", "microvm", "-m", "128"])
            .kernel(&Payload::NetLoop.path(), "host=10.7.74.1 own=10.7.74.2")
            .with_qmp()
    };
    let mut sleeps = Vec::new();
    for poll_us in [0, 200] {
        // Of the command line, and added.
        let netdev = format!("tap,id=n,ifname={},poll-us={poll_us}", tap.name);
        let mut vm = guest()
            .args(["-netdev", &netdev])
            .args(["-device", "virtio-net-device,netdev=n,id=card"])
            .start()
            .unwrap();
        sleeps.push(sleeps_of_card(&mut vm));
        vm.console.send("x").unwrap();
        ends_well(&mut vm);

        let mut vm = guest()
            .args(["-S", "-hotplug", &format!("tap={}", tap.name)])
            .start()
            .unwrap();
        let mut qmp = vm.qmp().unwrap();
        for (command, arguments) in [
            (
                "netdev_add",
                json!({ "id": "n", "ifname": tap.name, "poll-us": poll_us }),
            ),
            (
                "device_add",
                json!({ "id": "card", "driver": "virtio-net-device", "netdev": "n" }),
            ),
            ("cont", json!({})),
        ] {
            qmp.execute(command, arguments).unwrap();
        }
        sleeps.push(sleeps_of_card(&mut vm));
        vm.console.send("x").unwrap();
        ends_well(&mut vm);
    }
    let [given, added, looks, added_looks] = sleeps[..] else {
        panic!("{sleeps:?}");
    };
    assert!(given >= 900 && added >= 900, "{sleeps:?}");
    assert!(looks <= 500 && added_looks <= 500, "{sleeps:?}");
}
