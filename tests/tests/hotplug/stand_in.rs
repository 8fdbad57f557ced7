//! Who answers the driver of a card that was taken out: a process in a card's jail, without a tap, that goes when another card comes.
//!
//! That it answers is shown by the stock kernel in `stock_kernel.rs`, which would stand still.

use std::time::Duration;

use nix::sys::signal::{Signal, kill};
use serde_json::json;
use tests::host::{Tap, require_kvm, require_root};
use tests::jail::check::check;
use tests::jail::expect::{BackEnd, Device, Setting};
use tests::payload::Payload;
use tests::qmp::Qmp;
use tests::vm::{Vm, expect};
use tests::wait::{Deadline, Watched};

use super::{LIMIT, plug, process_of, run, unplug};

/// A guest whose driver has accepted a control queue (virtio 1.3, 5.1.3: bit 17) and set up all three.
const DRIVER: &str = "device=1 queues=3 features=131072";

/// A VM with a card of the command line, whose driver halts.
fn with_card(dir: &std::path::Path, tap: &Tap) -> (Vm, Qmp) {
    require_kvm();
    require_root();
    // By the name that the table of descriptors has for a kernel.
    let kernel = dir.join("blk-rw");
    std::fs::copy(Payload::StartDevice.path(), &kernel).unwrap();
    let mut vm = Vm::builder()
        .args(["-machine", "microvm", "-m", "128"])
        .kernel(&kernel, DRIVER)
        .tap("n0", &tap.name, "52:54:00:00:40:01")
        .arg("-hotplug")
        .arg(format!("tap={}", tap.name))
        .env("STRATOVIRT_LOG_LEVEL", "info")
        .with_qmp()
        .start()
        .unwrap();
    let qmp = vm.qmp().unwrap();
    expect(&mut vm, "STARTED");
    (vm, qmp)
}

/// The process that stands in, once it has the queues: nothing but the log tells of it.
fn stand_in(vm: &mut Vm, qmp: &mut Qmp) -> i32 {
    let deadline = Deadline::after(LIMIT);
    loop {
        // The answer comes after all that the main loop had to do before.
        qmp.execute("query-status", json!({})).unwrap();
        let pid = vm.process("net").unwrap();
        let has_queues = |pid: &i32| {
            vm.messages()
                .contains(&format!("process {pid} answers the driver"))
        };
        if let Some(pid) = pid.filter(has_queues) {
            return pid;
        }
        assert!(!deadline.left().is_zero(), "{}", vm.messages());
    }
}

#[test]
fn it_has_the_jail_of_a_card_and_no_tap() {
    let tap = Tap::new("sv-in", "10.7.42.1/24").unwrap();
    let dir = tempfile::tempdir().unwrap();
    let (mut vm, mut qmp) = with_card(dir.path(), &tap);
    let card = process_of(&mut qmp, "dev-n0");
    unplug(&mut qmp, "dev-n0");
    let other = stand_in(&mut vm, &mut qmp);
    assert_ne!(other, card.as_raw());
    // The tap is whoever's who opens it, and no device is listed.
    drop(tap.queue().unwrap());
    let workloads = qmp.execute("query-workloads", json!({})).unwrap();
    assert_eq!(workloads, json!([]));
    let setting = Setting {
        devices: vec![Device {
            id: "dev-n0",
            binary: "net",
            back_end: BackEnd::Nothing,
            queues: 3,
            started: 3,
        }],
        ram: 128 << 20,
        vcpus: 1,
        clients: 1,
        held: Vec::new(),
        given: Vec::new(),
    };
    let reply = qmp.execute("query-sandbox", json!({})).unwrap();
    let findings = check(&mut vm, &setting, &reply).unwrap();
    assert!(findings.is_empty(), "{findings:#?}");
}

#[test]
fn it_leaves_when_another_card_comes_whatever_became_of_it() {
    let tap = Tap::new("sv-il", "10.7.43.1/24").unwrap();
    let dir = tempfile::tempdir().unwrap();
    let (mut vm, mut qmp) = with_card(dir.path(), &tap);
    let mut device = "dev-n0".to_owned();
    for round in 0..8 {
        unplug(&mut qmp, &device);
        if round > 0 {
            run(&mut qmp, "netdev_del", json!({ "id": "again" }));
        }
        let old = match round % 4 {
            // On its way, or not yet.
            0 => None,
            1 => Some(stand_in(&mut vm, &mut qmp)),
            2 => {
                let pid = stand_in(&mut vm, &mut qmp);
                end(pid);
                Some(pid)
            }
            _ => {
                let pid = stand_in(&mut vm, &mut qmp);
                kill(nix::unistd::Pid::from_raw(pid), Signal::SIGSTOP).unwrap();
                Some(pid)
            }
        };
        run(
            &mut qmp,
            "netdev_add",
            json!({ "id": "again", "type": "tap", "ifname": tap.name }),
        );
        device = format!("card{round}");
        plug(
            &mut qmp,
            json!({ "id": device, "driver": "virtio-net-device", "netdev": "again", "addr": "0x0" }),
        );
        let pid = process_of(&mut qmp, &device).as_raw();
        assert_eq!(vm.process("net").unwrap(), Some(pid), "round {round}");
        assert_ne!(old, Some(pid));
        while let Some(event) = qmp.next_event(Duration::ZERO).unwrap() {
            let name = event["event"].as_str().unwrap();
            assert!(!name.starts_with("DEVICE_"), "round {round}: {event}");
        }
    }
    // With the guest's reset nobody needs it.
    unplug(&mut qmp, &device);
    let pid = stand_in(&mut vm, &mut qmp);
    let watched = Watched::new(pid).unwrap();
    run(&mut qmp, "system_reset", json!({}));
    assert!(watched.ended(Deadline::after(LIMIT)).unwrap());
}

/// Kills a process and waits for its end.
fn end(pid: i32) {
    let watched = Watched::new(pid).unwrap();
    kill(nix::unistd::Pid::from_raw(pid), Signal::SIGKILL).unwrap();
    assert!(watched.ended(Deadline::after(LIMIT)).unwrap());
}
