//! # Cards that get another tap while their guest runs
//!
//! **Job.** `netdev_replace` on live processes: packets go through the new tap and no longer through the old one, whichever way it was
//! named; the card's next process has it too, as has a guest that goes on from a snapshot; what cannot be is refused, and the old tap stays;
//! a process that dies at that very moment leaves the card with one of the two. **Who is not trusted.** The VMM.
//! **Why this way.** A bare guest finds each buffer that is lost or comes twice; a stock kernel's TCP finds what is lost for good.
#![allow(clippy::unwrap_used)] // in a test, a panic is the report

use std::fs;
use std::io::{Read, Write};
use std::net::TcpListener;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::process::Command;
use std::time::Duration;

use nix::fcntl::{FcntlArg, FdFlag, fcntl};
use nix::libc::{IFF_MULTI_QUEUE, IFF_NO_PI, IFF_TAP, IFF_TUN, IFF_VNET_HDR};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::{Value, json};
use tests::chance::Chance;
use tests::host::{Tap, require_kvm, require_root, tun_queue};
use tests::jail::Jail;
use tests::lab::{Flavour, Guest, Script, where_linux_boots};
use tests::payload::Payload;
use tests::procfs;
use tests::qmp::{Qmp, QmpError};
use tests::test_path;
use tests::vm::{Vm, VmBuilder, ends_well, expect};
use tests::wait::{Deadline, accept, readable};

/// For a machine that is also busy.
const LIMIT: Duration = Duration::from_secs(120);

/// Two taps on one bridge, which has the host's address.
struct Net {
    bridge: String,
    a: Tap,
    b: Tap,
}

impl Net {
    /// The names begin with `name`; the host is 10.7.`net`.1.
    fn new(name: &str, net: u8) -> Self {
        Self::made(name, net, Tap::new)
    }

    fn of_queues(name: &str, net: u8) -> Self {
        Self::made(name, net, Tap::of_queues)
    }

    fn made(name: &str, net: u8, tap: fn(&str, &str) -> Result<Tap, tests::lab::LabError>) -> Self {
        require_root();
        let bridge = format!("{name}br");
        let taps = ["a", "b"].map(|one| {
            // The bridge's is the one that counts.
            tap(&format!("{name}{one}"), &format!("192.0.2.{net}/32")).unwrap()
        });
        ip(&["link", "add", &bridge, "type", "bridge"]);
        for tap in &taps {
            ip(&["link", "set", &tap.name, "master", &bridge]);
        }
        ip(&["addr", "add", &format!("10.7.{net}.1/24"), "dev", &bridge]);
        ip(&["link", "set", &bridge, "up"]);
        let [a, b] = taps;
        Self { bridge, a, b }
    }
}

impl Drop for Net {
    fn drop(&mut self) {
        let _ = Command::new("ip")
            .args(["link", "del", &self.bridge])
            .status();
    }
}

fn ip(words: &[&str]) {
    let done = Command::new("ip").args(words).output().unwrap();
    assert!(done.status.success(), "{words:?}: {done:?}");
}

/// Packets that came from the guest through this tap.
fn sent(tap: &Tap) -> u64 {
    let path = format!("/sys/class/net/{}/statistics/rx_packets", tap.name);
    fs::read_to_string(path).unwrap().trim().parse().unwrap()
}

/// A bare guest that asks for the host's hardware address again and again.
fn bare(net: u8) -> VmBuilder {
    require_kvm();
    Vm::builder()
        .args(["-machine", "microvm", "-m", "128"])
        .kernel(
            &Payload::NetLoop.path(),
            &format!("host=10.7.{net}.1 own=10.7.{net}.2"),
        )
        .with_qmp()
}

fn with_card(net: u8, netdev: &str) -> VmBuilder {
    bare(net)
        .args(["-netdev", &format!("tap,id=n0,{netdev}"), "-device"])
        .arg(format!(
            "virtio-net-device,netdev=n0,id=card,max-restarts=1000,mac=52:54:00:00:71:{net}"
        ))
}

fn grants(builder: VmBuilder, net: &Net) -> VmBuilder {
    builder
        .args(["-hotplug", &format!("tap={}", net.a.name)])
        .args(["-hotplug", &format!("tap={}", net.b.name)])
}

#[track_caller]
fn run(qmp: &mut Qmp, command: &str, arguments: Value) {
    let done = qmp.execute(command, arguments);
    assert_eq!(done.unwrap(), json!({}), "{command}");
}

#[track_caller]
fn refused(qmp: &mut Qmp, arguments: &Value) -> String {
    match qmp.execute("netdev_replace", arguments.clone()) {
        Err(QmpError::Refused { description, .. }) => description,
        other => panic!("{arguments}: {other:?}"),
    }
}

/// Replaces the tap, and the id of the process that has the new one.
#[track_caller]
fn replace(vm: &mut Vm, qmp: &mut Qmp, arguments: Value) -> i32 {
    let before = vm.process("net").unwrap().unwrap();
    run(qmp, "netdev_replace", arguments);
    assert!(
        procfs::Status::of(before).is_err(),
        "{before} is still there"
    );
    let event = qmp.wait_event("DEVICE_UPGRADED", LIMIT).unwrap();
    assert_eq!(event["data"]["device"], "card", "{event}");
    let after = vm.process("net").unwrap().unwrap();
    assert_eq!(event["data"]["pid"], after);
    assert_ne!(after, before);
    after
}

/// The guest's packets go through `here`, and not through `there`.
#[track_caller]
fn goes_through(vm: &mut Vm, here: &Tap, there: &Tap) {
    let before = (sent(here), sent(there));
    // What it says waits to be read: the first ones are old.
    let more = (0..1000).any(|_| {
        expect(vm, "LOOP ");
        sent(here) > before.0 + 10
    });
    assert!(more, "nothing goes through {}", here.name);
    assert_eq!(sent(there), before.1, "through {}", there.name);
}

#[track_caller]
fn tap_of_card(qmp: &mut Qmp) -> Option<String> {
    let all = qmp.execute("query-workloads", json!({})).unwrap();
    let all = all.as_array().unwrap();
    let card = all.iter().find(|one| one["module"] == "card").unwrap();
    card["ifname"].as_str().map(str::to_owned)
}

#[track_caller]
fn stops(mut vm: Vm) {
    vm.console.send("x").unwrap();
    expect(&mut vm, "NET-LOOP OK answers ");
    ends_well(&mut vm);
}

/// What a process holds, by kind.
fn held(pid: i32) -> Vec<String> {
    let all = procfs::fds(pid).unwrap().into_values();
    let mut all: Vec<String> = all.map(|fd| fd.kind().to_owned()).collect();
    all.sort_unstable();
    all
}

#[track_caller]
fn give(qmp: &mut Qmp, name: &str, tap: &Tap) {
    let queue = tap.queue().unwrap();
    let named = json!({ "fdname": name });
    qmp.execute_with("getfd", named, &[queue.as_fd()]).unwrap();
}

#[track_caller]
fn dies(vm: &mut Vm, qmp: &mut Qmp) -> i32 {
    let card = vm.process("net").unwrap().unwrap();
    kill(Pid::from_raw(card), Signal::SIGKILL).unwrap();
    qmp.wait_event("DEVICE_RECOVERED", LIMIT).unwrap();
    vm.process("net").unwrap().unwrap()
}

#[track_caller]
fn upgrade(qmp: &mut Qmp) {
    run(qmp, "device-upgrade", json!({ "id": "card" }));
    qmp.wait_event("DEVICE_UPGRADED", LIMIT).unwrap();
}

#[test]
fn a_card_of_the_command_line_gets_another_tap_and_keeps_it() {
    let net = Net::new("sv-ot", 71);
    let dir = tempfile::tempdir().unwrap();
    let template = dir.path().join("template");
    let build = |ifname: &str| {
        grants(with_card(71, &format!("ifname={ifname}")), &net)
            .arg("-snapshot-dir")
            .arg(&template)
    };
    let mut vm = build(&net.a.name).start().unwrap();
    let mut qmp = vm.qmp().unwrap();
    goes_through(&mut vm, &net.a, &net.b);
    assert_eq!(tap_of_card(&mut qmp), Some(net.a.name.clone()));
    let first = vm.process("net").unwrap().unwrap();
    let jail = Jail::of(first).unwrap();
    let broker = vm.process("broker").unwrap().unwrap();
    let before = (held(broker), held(vm.pid()), held(first));

    let other = json!({ "id": "n0", "ifname": net.b.name });
    let card = replace(&mut vm, &mut qmp, other);
    goes_through(&mut vm, &net.b, &net.a);
    assert_eq!(tap_of_card(&mut qmp), Some(net.b.name.clone()));
    let now = Jail::of(card).unwrap();
    assert_eq!(now.uid, jail.uid);
    assert_eq!(now.own_namespaces, jail.own_namespaces);
    assert_eq!(now.capabilities, jail.capabilities);
    assert_eq!((held(broker), held(vm.pid()), held(card)), before);
    // Nobody has the old one, and the next processes have the new one.
    drop(net.a.queue().unwrap());
    assert!(net.b.queue().is_err(), "it is in use");
    dies(&mut vm, &mut qmp);
    goes_through(&mut vm, &net.b, &net.a);
    upgrade(&mut qmp);
    goes_through(&mut vm, &net.b, &net.a);

    // One that a client has opened, of which nothing is said but that.
    give(&mut qmp, "queue", &net.a);
    let other = json!({ "id": "n0", "type": "tap", "fd": "queue", "queues": 1 });
    replace(&mut vm, &mut qmp, other);
    goes_through(&mut vm, &net.a, &net.b);
    assert_eq!(tap_of_card(&mut qmp), None);
    drop(net.b.queue().unwrap());
    dies(&mut vm, &mut qmp);
    upgrade(&mut qmp);
    goes_through(&mut vm, &net.a, &net.b);

    // The guest goes on elsewhere, with a tap that its command line names.
    let uri = format!("file:{}", template.display());
    run(&mut qmp, "migrate", json!({ "uri": uri }));
    vm.kill().unwrap();
    drop(vm);
    let mut vm = build(&net.b.name)
        .args(["-incoming", &uri])
        .start()
        .unwrap();
    let mut qmp = vm.qmp().unwrap();
    goes_through(&mut vm, &net.b, &net.a);
    let other = json!({ "id": "n0", "ifname": net.a.name });
    replace(&mut vm, &mut qmp, other);
    goes_through(&mut vm, &net.a, &net.b);
    stops(vm);
}

#[test]
fn a_card_whose_queues_were_inherited_lets_go_of_them() {
    let net = Net::new("sv-oi", 72);
    let queue = net.a.queue().unwrap();
    fcntl(&queue, FcntlArg::F_SETFD(FdFlag::empty())).unwrap();
    let inherited = format!("fd={}", queue.as_raw_fd());
    let mut vm = grants(with_card(72, &inherited), &net).start().unwrap();
    drop(queue);
    let mut qmp = vm.qmp().unwrap();
    goes_through(&mut vm, &net.a, &net.b);
    let other = json!({ "id": "n0", "ifname": net.b.name });
    replace(&mut vm, &mut qmp, other);
    goes_through(&mut vm, &net.b, &net.a);
    drop(net.a.queue().unwrap());
    dies(&mut vm, &mut qmp);
    goes_through(&mut vm, &net.b, &net.a);
    stops(vm);
}

#[test]
fn a_card_that_was_added_gets_another_tap_which_stays_its_netdevs() {
    let net = Net::new("sv-oh", 73);
    let mut vm = grants(bare(73).arg("-S"), &net).start().unwrap();
    let mut qmp = vm.qmp().unwrap();
    let broker = vm.process("broker").unwrap().unwrap();
    let netdev = json!({ "id": "n0", "type": "tap", "ifname": net.a.name });
    // No tap is attached to before its card is there.
    run(&mut qmp, "netdev_add", netdev);
    let before = held(broker);
    let other = json!({ "id": "n0", "ifname": net.b.name });
    let said = refused(&mut qmp, &other);
    assert_eq!(
        said,
        "Netdev 'n0' has no card: remove it (netdev_del) and add another one"
    );
    let card = json!({ "id": "card", "driver": "virtio-net-device", "netdev": "n0", "mac": "52:54:00:00:71:73" });
    run(&mut qmp, "device_add", card.clone());
    run(&mut qmp, "cont", json!({}));
    goes_through(&mut vm, &net.a, &net.b);
    replace(&mut vm, &mut qmp, other.clone());
    goes_through(&mut vm, &net.b, &net.a);
    dies(&mut vm, &mut qmp);
    goes_through(&mut vm, &net.b, &net.a);
    give(&mut qmp, "queue", &net.a);
    replace(&mut vm, &mut qmp, json!({ "id": "n0", "fds": "queue" }));
    dies(&mut vm, &mut qmp);
    goes_through(&mut vm, &net.a, &net.b);
    replace(&mut vm, &mut qmp, other);
    // Taken out and put in again, it is the netdev's.
    run(&mut qmp, "device_del", json!({ "id": "card" }));
    qmp.wait_event("DEVICE_DELETED", LIMIT).unwrap();
    drop([&net.a, &net.b].map(|tap| tap.queue().unwrap()));
    let mut again = card;
    again["addr"] = json!("0x0");
    run(&mut qmp, "device_add", again);
    goes_through(&mut vm, &net.b, &net.a);
    run(&mut qmp, "device_del", json!({ "id": "card" }));
    qmp.wait_event("DEVICE_DELETED", LIMIT).unwrap();
    run(&mut qmp, "netdev_del", json!({ "id": "n0" }));
    assert_eq!(held(broker), before, "the broker's descriptors");
    run(&mut qmp, "quit", json!({}));
    ends_well(&mut vm);
}

#[test]
fn what_cannot_be_is_refused_and_the_old_tap_stays() {
    let net = Net::new("sv-ow", 74);
    let _many = Tap::of_queues("sv-ow-many", "192.0.2.75/32").unwrap();
    let busy = Tap::new("sv-ow-busy", "192.0.2.76/32").unwrap();
    let in_use = busy.queue().unwrap();
    let dir = tempfile::tempdir().unwrap();
    let socket = dir.path().join("socket");
    let mut vm = grants(with_card(74, &format!("ifname={}", net.a.name)), &net)
        .args(["-hotplug", "tap=sv-ow-many", "-hotplug", "tap=sv-ow-busy"])
        .args(["-hotplug", "tap=sv-ow-none", "-hotplug", "tap=lo"])
        .arg("-chardev")
        .arg(format!("socket,id=c,path={}", socket.display()))
        .start()
        .unwrap();
    let mut qmp = vm.qmp().unwrap();
    let daemon = json!({ "id": "theirs", "type": "vhost-user", "chardev": "c" });
    run(&mut qmp, "netdev_add", daemon);
    goes_through(&mut vm, &net.a, &net.b);
    let card = vm.process("net").unwrap().unwrap();
    let broker = vm.process("broker").unwrap().unwrap();
    let processes = vm.processes().unwrap();
    let before = (held(broker), held(vm.pid()), held(card));

    let (tap, header) = (IFF_TAP | IFF_NO_PI, IFF_VNET_HDR);
    let passed = |qmp: &mut Qmp, name: &str, fd: OwnedFd| {
        qmp.execute_with("getfd", json!({ "fdname": name }), &[fd.as_fd()])
            .unwrap();
    };
    for (name, interface, flags) in [
        ("plain", "sv-ow-plain", tap),
        ("tun", "sv-ow-tun", IFF_TUN | IFF_NO_PI | header),
        ("one", "sv-ow-one", tap | header),
        ("two", "sv-ow-many", tap | header | IFF_MULTI_QUEUE),
    ] {
        passed(&mut qmp, name, tun_queue(interface, flags).unwrap());
    }
    passed(
        &mut qmp,
        "file",
        fs::File::open("/dev/null").unwrap().into(),
    );
    let b = &net.b.name;
    for (arguments, part) in [
        (json!({ "ifname": b }), "'id' is missing"),
        (
            json!({ "id": "n0" }),
            "netdev_replace takes one of ifname, fd and fds; given: none",
        ),
        (
            json!({ "id": "n0", "ifname": b, "fd": "one" }),
            "given: ifname, fd",
        ),
        (
            json!({ "id": "nobody", "ifname": b }),
            "Netdev 'nobody' not found",
        ),
        // A card is not its netdev.
        (
            json!({ "id": "card", "ifname": b }),
            "Netdev 'card' not found",
        ),
        (
            json!({ "id": "theirs", "ifname": b }),
            "Netdev 'theirs' is of type vhost-user, whose daemon has the tap; allowed: one of type tap",
        ),
        (json!({ "id": "n0", "ifname": b, "type": "user" }), "'type'"),
        (json!({ "id": "n0", "ifname": b, "queues": 17 }), "'queues'"),
        (
            json!({ "id": "n0", "ifname": b, "queues": 2 }),
            "Parameter 'queues' is 2, and netdev 'n0' has 1 queue pairs, which its guest knows; allowed: 1",
        ),
        (
            json!({ "id": "n0", "ifname": "sv-owa" }),
            "Tap 'sv-owa' is netdev 'n0' already",
        ),
        (
            json!({ "id": "n0", "ifname": "sixteen-bytes-xx" }),
            "'ifname'",
        ),
        (
            json!({ "id": "n0", "ifname": "eth7" }),
            "ifname eth7 is not one of the taps that may be added",
        ),
        (
            json!({ "id": "n0", "ifname": "sv-ow-none" }),
            "no such network interface",
        ),
        (json!({ "id": "n0", "ifname": "lo" }), "not a tap device"),
        (
            json!({ "id": "n0", "ifname": "sv-ow-busy" }),
            "in use by another process",
        ),
        (
            json!({ "id": "n0", "ifname": "sv-ow-many" }),
            "made with multi_queue",
        ),
        (json!({ "id": "n0", "fd": "lost" }), "'lost' not found"),
        (
            json!({ "id": "n0", "fd": "plain" }),
            "the tap must be opened with IFF_VNET_HDR and IFF_NO_PI",
        ),
        (
            json!({ "id": "n0", "fd": "tun" }),
            "a tun device; a tap device (IFF_TAP) is needed",
        ),
        (
            json!({ "id": "n0", "fd": "file" }),
            "not an open tap device",
        ),
        (
            json!({ "id": "n0", "fds": "one:two" }),
            "Netdev 'n0' has 1 queue pairs, and 2 descriptors came; one for each is needed",
        ),
        // A command took them.
        (json!({ "id": "n0", "fd": "one" }), "'one' not found"),
    ] {
        let said = refused(&mut qmp, &arguments);
        assert!(said.contains(part), "{arguments}: {said}");
    }
    goes_through(&mut vm, &net.a, &net.b);
    assert_eq!(vm.processes().unwrap(), processes);
    assert_eq!((held(broker), held(card)), (before.0, before.2));
    // What clients passed is closed by a thread that has nothing else to do.
    let closed = (0..1000).any(|_| {
        qmp.execute("query-status", json!({})).unwrap();
        held(vm.pid()) == before.1
    });
    assert!(closed, "{:?}, and before {:?}", held(vm.pid()), before.1);
    drop(in_use);
    replace(&mut vm, &mut qmp, json!({ "id": "n0", "ifname": b }));
    goes_through(&mut vm, &net.b, &net.a);
    stops(vm);
}

/// It does not give its queues back, so that nobody can say what it has done with them: it is ended, and followed by one with its tap.
#[test]
fn a_process_that_hangs_is_followed_by_one_with_the_same_tap() {
    let net = Net::new("sv-og", 77);
    let mut vm = grants(with_card(77, &format!("ifname={}", net.a.name)), &net)
        .start()
        .unwrap();
    let mut qmp = vm.qmp().unwrap();
    goes_through(&mut vm, &net.a, &net.b);
    let card = vm.process("net").unwrap().unwrap();
    kill(Pid::from_raw(card), Signal::SIGSTOP).unwrap();
    let other = json!({ "id": "n0", "ifname": net.b.name });
    let said = refused(&mut qmp, &other);
    assert!(
        said.starts_with("Device 'card' goes on with the process that it has: "),
        "{said}"
    );
    qmp.wait_event("DEVICE_RECOVERED", LIMIT).unwrap();
    goes_through(&mut vm, &net.a, &net.b);
    assert_eq!(tap_of_card(&mut qmp), Some(net.a.name.clone()));
    drop(net.b.queue().unwrap());
    replace(&mut vm, &mut qmp, other);
    goes_through(&mut vm, &net.b, &net.a);
    stops(vm);
}

#[test]
fn a_process_that_dies_meanwhile_leaves_the_card_with_one_tap_that_is_told() {
    let net = Net::new("sv-od", 78);
    let mut vm = grants(with_card(78, &format!("ifname={}", net.a.name)), &net)
        .start()
        .unwrap();
    let mut qmp = vm.qmp().unwrap();
    let mut chance = Chance::new(78);
    // Nobody writes to it: the time in which nothing is read is by chance.
    let (never, _writer) = std::io::pipe().unwrap();
    let (mut replaced, mut stayed) = (0, 0);
    for round in 0..30 {
        let now = tap_of_card(&mut qmp).unwrap();
        let (here, there) = if now == net.a.name {
            (&net.a, &net.b)
        } else {
            (&net.b, &net.a)
        };
        goes_through(&mut vm, here, there);
        let card = vm.process("net").unwrap().unwrap();
        let after = Duration::from_micros(chance.below(30_000));
        let never = never.try_clone().unwrap();
        let killer = std::thread::spawn(move || {
            let heard = readable(&[never.as_fd()], Deadline::after(after)).unwrap();
            assert!(heard.is_none());
            // It may be gone by then, as it should.
            let _ = kill(Pid::from_raw(card), Signal::SIGKILL);
        });
        let done = qmp.execute(
            "netdev_replace",
            json!({ "id": "n0", "ifname": there.name }),
        );
        killer.join().unwrap();
        match &done {
            Ok(_) => replaced += 1,
            Err(QmpError::Refused { description, .. }) => {
                assert!(description.starts_with("Device 'card'"), "{description}");
                stayed += 1;
                // Of the process that was killed; a later one is this loop's next.
                qmp.wait_event("DEVICE_RECOVERED", LIMIT).unwrap();
            }
            Err(other) => panic!("{round}: {other:?}"),
        }
        if done.is_ok() {
            assert_eq!(tap_of_card(&mut qmp), Some(there.name.clone()), "{round}");
        }
    }
    println!("{replaced} replaced, {stayed} stayed");
    let now = tap_of_card(&mut qmp).unwrap();
    let free = if now == net.a.name { &net.b } else { &net.a };
    drop(free.queue().unwrap());
    stops(vm);
}

#[test]
fn a_stock_kernels_connection_survives_and_it_says_nothing_of_it() {
    where_linux_boots(test_path!(), || {
        const SIZE: usize = 4_000_000;
        let guest = Guest::ready(Flavour::Cloud).unwrap();
        let net = Net::of_queues("sv-ol", 79);
        let script = Script::new(
            "set -e\n\
             ip addr add 10.7.79.2/24 dev eth0; ip link set eth0 up\n\
             for cpu in 0 1; do taskset -c $cpu ping -c 1 -w 60 10.7.79.1 > /dev/null; done\n\
             dmesg > /tmp/before\n\
             nc 10.7.79.1 5000 < /dev/null > /tmp/data\n\
             nc 10.7.79.1 5001 < /tmp/data\n\
             for cpu in 0 1; do taskset -c $cpu ping -c 1 -w 60 10.7.79.1 > /dev/null; done\n\
             dmesg | tail -n +$(($(wc -l < /tmp/before) + 1)) > /tmp/after\n\
             sed 's/^/LATER /' /tmp/after\n\
             grep -i -E 'virtio|eth0|net|link|IPv|hung|stall|lockup|BUG|WARN' /tmp/after | sed 's/^/KERNEL-SAID /' || true\n\
             cat /sys/class/net/eth0/statistics/rx_errors /sys/class/net/eth0/statistics/tx_errors | sed 's/^/ERRORS /'\n\
             cat /sys/class/net/eth0/carrier_changes | sed 's/^/CARRIER /'\n\
             echo NET-DONE; read line\n",
        );
        let initrd = guest.initrd_with(&script).unwrap();
        let listen = |port: u16| TcpListener::bind(("10.7.79.1", port)).unwrap();
        let (down, up) = (listen(5000), listen(5001));
        let builder = Vm::builder()
            .args(["-machine", "microvm", "-m", "256", "-smp", "2"])
            .kernel(&guest.kernel.elf, "console=ttyS0 quiet panic=-1 reboot=k")
            .arg("-initrd")
            .arg(initrd.path())
            .arg("-netdev")
            .arg(format!("tap,id=n0,ifname={},queues=2", net.a.name))
            .args([
                "-device",
                "virtio-net-device,netdev=n0,id=card,mq=on,mac=52:54:00:00:71:79",
            ])
            .with_qmp();
        let mut vm = grants(builder, &net).start().unwrap();
        let mut qmp = vm.qmp().unwrap();
        let data: Vec<u8> = (0..SIZE as u32)
            .map(|at| (at.wrapping_mul(2_654_435_761) >> 24) as u8)
            .collect();
        let mut stream = accept(&down, LIMIT).unwrap();
        let mut stalls = Vec::new();
        let turn = |qmp: &mut Qmp, to: &Tap| {
            let other = json!({ "id": "n0", "ifname": to.name, "queues": 2 });
            run(qmp, "netdev_replace", other);
            assert_eq!(tap_of_card(qmp), Some(to.name.clone()));
            let event = qmp.wait_event("DEVICE_UPGRADED", LIMIT).unwrap();
            event["data"]["stall-ms"].as_f64().unwrap()
        };
        let mut taps = [&net.b, &net.a].into_iter().cycle();
        for part in data.chunks(SIZE / 4) {
            stream.write_all(part).unwrap();
            stalls.push(turn(&mut qmp, taps.next().unwrap()));
        }
        drop(stream);
        let mut stream = accept(&up, LIMIT).unwrap();
        let mut back = Vec::new();
        for _ in 0..4 {
            let mut part = vec![0; SIZE / 4];
            stream.read_exact(&mut part).unwrap();
            back.extend(part);
            stalls.push(turn(&mut qmp, taps.next().unwrap()));
        }
        assert_eq!(stream.read(&mut [0]).unwrap(), 0);
        drop(stream); // the guest's nc waits for it
        assert!(back == data, "{} bytes came back", back.len());
        let said = expect(&mut vm, "NET-DONE");
        assert!(!said.contains("KERNEL-SAID"), "{said}");
        // What it says of its clocks, two emulations deep, is not the card's doing; see LATER for it.
        // The link was up once.
        let want = "ERRORS 0\r\nERRORS 0\r\nCARRIER 2\r\n";
        assert!(said.contains(want), "{said}");
        println!("gaps in ms: {stalls:.2?}");
        vm.console.send("\n").unwrap();
        expect(&mut vm, "GUEST-END status=0");
        ends_well(&mut vm);
    });
}
