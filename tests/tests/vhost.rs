//! # Cards whose packets the host's kernel passes
//!
//! **Job.** `-netdev tap,vhost=on` from a guest's first packet to the death of the card's process under load: that the kernel does the
//! work, that nothing is lost but packets, that the process's jail is as small as it is said to be, and that what cannot be had with
//! it is refused. **Who is not trusted.** The VMM.
//! **Why this way.** Most machines that run tests have no `/dev/vhost-net`, so that all that needs it runs in a nested machine there, whose
//! stock kernel has it.
#![cfg(target_arch = "x86_64")]
#![allow(clippy::unwrap_used)] // in a test, a panic is the report

use std::fs;
use std::io::{Read, Write};
use std::net::TcpListener;
use std::os::unix::fs::PermissionsExt;
use std::time::Duration;

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::json;
use tests::host::{Tap, require_kvm, require_root};
use tests::jail::check::check;
use tests::jail::expect::{BackEnd, Device, Setting};
use tests::lab::{
    Flavour, Guest, Nested, Script, in_a_nested_machine, programs, where_vhost_net_is,
};
use tests::payload::Payload;
use tests::procfs;
use tests::qmp::Qmp;
use tests::test_path;
use tests::vm::{Vm, VmBuilder, expect};
use tests::wait::accept;

/// Two emulations deep, a boot takes five seconds; this is for a machine that is also busy, and for guests that it lets stand still.
const LIMIT: Duration = Duration::from_secs(200);

fn vm(kernel: &std::path::Path, append: &str, tap: &str, more: &str) -> VmBuilder {
    Vm::builder()
        .args(["-machine", "microvm", "-m", "512"])
        .kernel(kernel, append)
        .arg("-netdev")
        .arg(format!("tap,id=n0,ifname={tap},vhost=on{more}"))
        .args([
            "-device",
            "virtio-net-device,netdev=n0,id=card,mac=52:54:00:aa:bb:cc,max-restarts=100",
        ])
        .with_qmp()
}

/// The kernel's threads that serve a queue pair of process `pid`: older kernels make threads of their own, newer ones threads of the
/// process.
fn workers(pid: i32) -> usize {
    let name = format!("vhost-{pid}\n");
    let threads = fs::read_dir("/proc")
        .unwrap()
        .flatten()
        .chain(fs::read_dir(format!("/proc/{pid}/task")).unwrap().flatten());
    threads
        .filter(|thread| {
            fs::read_to_string(thread.path().join("comm")).is_ok_and(|comm| comm == name)
        })
        .count()
}

/// Has another process take the card's queues over in order: its id.
#[track_caller]
fn upgrade(vm: &mut Vm, qmp: &mut Qmp) -> i32 {
    let before = vm.process("net").unwrap().unwrap();
    qmp.execute("device-upgrade", json!({ "id": "card" }))
        .unwrap();
    let after = vm.process("net").unwrap().unwrap();
    assert_ne!(before, after);
    after
}

/// Bytes that look like nothing in particular.
fn noise(len: usize) -> Vec<u8> {
    let mut state = 0x9e37_79b9_7f4a_7c15_u64;
    let mut bytes = Vec::with_capacity(len + 8);
    while bytes.len() < len {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        bytes.extend(state.to_le_bytes());
    }
    bytes.truncate(len);
    bytes
}

#[test]
fn the_kernel_carries_packets_and_a_process_that_is_killed_is_replaced() {
    where_vhost_net_is(test_path!(), || {
        const SIZE: usize = 10_000_000;
        let guest = Guest::ready(Flavour::Cloud).unwrap();
        // The driver of a guest with one processor uses one of two pairs, and packets for the other one would be lost.
        let tap = Tap::of_queues("sv-vhost", "10.0.9.1/24").unwrap();
        // What comes is sent back, so that both ways are seen to be right at once.
        let script = Script::new(
            "set -e\n\
             ip addr add 10.0.9.2/24 dev eth0; ip link set eth0 up\n\
             ping -c 3 -i 0.2 10.0.9.1\n\
             nc 10.0.9.1 5000 < /dev/null > /tmp/data\n\
             nc 10.0.9.1 5001 < /tmp/data\n\
             echo NET-DONE; read line\n",
        );
        let initrd = guest.initrd_with(&script).unwrap();
        let listen = |port: u16| TcpListener::bind(("10.0.9.1", port)).unwrap();
        let (down, up) = (listen(5000), listen(5001));
        let mut vm = vm(
            &guest.kernel.elf,
            "console=ttyS0 quiet panic=-1 reboot=k",
            &tap.name,
            ",queues=2",
        )
        .arg("-initrd")
        .arg(initrd.path())
        .start()
        .unwrap();
        let mut qmp = vm.qmp().unwrap();
        expect(&mut vm, "3 packets transmitted, 3 packets received");
        let data = noise(SIZE);
        let mut stream = accept(&down, LIMIT).unwrap();
        let mut card = vm.process("net").unwrap().unwrap();
        assert_eq!(
            workers(card),
            1,
            "a thread of the kernel's for one queue pair"
        );
        let before = procfs::context_switches(card).unwrap();
        stream.write_all(&data[..SIZE / 2]).unwrap();
        let woken = procfs::context_switches(card).unwrap() - before;
        println!(
            "the card's process woke {woken} times in {} bytes",
            SIZE / 2
        );
        // One packet has 64 KiB at most.
        assert!(woken < 10, "{woken} times awake: it carries packets itself");
        for part in data[SIZE / 2..].chunks(SIZE / 10) {
            stream.write_all(part).unwrap();
            kill(Pid::from_raw(card), Signal::SIGKILL).unwrap();
            let recovered = qmp.wait_event("DEVICE_RECOVERED", LIMIT).unwrap();
            assert_eq!(recovered["data"]["device"], "card", "{recovered}");
            card = vm.process("net").unwrap().unwrap();
        }
        drop(stream);
        let mut stream = accept(&up, LIMIT).unwrap();
        assert_eq!(workers(card), 1);
        let mut back = Vec::new();
        stream.read_to_end(&mut back).unwrap();
        drop(stream); // the guest's nc waits for it
        assert!(back == data, "{} bytes came back", back.len());
        expect(&mut vm, "NET-DONE");
        vm.console.send("\n").unwrap();
        expect(&mut vm, "GUEST-END status=0");
        let status = vm.wait(LIMIT).unwrap_or_else(|e| panic!("{e}"));
        assert_eq!(status.code(), Some(0), "{}", vm.messages());
    });
}

/// A bare guest asks for the host's hardware address again and again, and ends if a buffer is lost or comes twice.
#[test]
fn a_link_that_is_down_carries_nothing() {
    where_vhost_net_is(test_path!(), || {
        let tap = Tap::new("sv-vhost", "10.7.41.1/24").unwrap();
        let own = "host=10.7.41.1 own=10.7.41.2";
        let mut vm = vm(&Payload::NetLoop.path(), own, &tap.name, "")
            .start()
            .unwrap();
        let mut qmp = vm.qmp().unwrap();
        let count = |name: &str| -> u64 {
            let path = format!("/sys/class/net/sv-vhost/statistics/{name}");
            fs::read_to_string(path).unwrap().trim().parse().unwrap()
        };
        let host = std::net::UdpSocket::bind("10.7.41.1:0").unwrap();
        host.set_broadcast(true).unwrap();
        expect(&mut vm, "LOOP 10\r");
        let card = upgrade(&mut vm, &mut qmp);
        expect(&mut vm, "LOOP ");
        let link = |qmp: &mut Qmp, up: bool| {
            let link = json!({ "name": "card", "up": up });
            qmp.execute("set_link", link).unwrap();
        };
        link(&mut qmp, false);
        // The kernel has given the queues back before the answer.
        let before = ["rx_packets", "tx_packets"].map(count);
        for _ in 0..10 {
            host.send_to(&[1], "10.7.41.255:9").unwrap();
        }
        link(&mut qmp, false);
        assert_eq!(before, ["rx_packets", "tx_packets"].map(count));
        kill(Pid::from_raw(card), Signal::SIGKILL).unwrap();
        qmp.wait_event("DEVICE_RECOVERED", LIMIT).unwrap();
        assert_eq!(
            before,
            ["rx_packets", "tx_packets"].map(count),
            "for another process, too"
        );
        link(&mut qmp, true);
        // What came meanwhile is nobody's, and the guest goes on.
        let more = (0..1000).any(|_| {
            expect(&mut vm, "LOOP ");
            count("rx_packets") > before[0]
        });
        assert!(more, "nothing comes though the link is up");
        vm.console.send("x").unwrap();
        expect(&mut vm, "NET-LOOP OK answers ");
        let status = vm.wait(LIMIT).unwrap_or_else(|e| panic!("{e}"));
        assert_eq!(status.code(), Some(0), "{}", vm.messages());
    });
}

/// Its queues come out of the kernel for the snapshot, with what it did; the driver says once that it uses both pairs.
#[test]
fn a_guest_goes_on_from_a_snapshot_with_both_pairs_in_the_kernel() {
    where_vhost_net_is(test_path!(), || {
        let guest = Guest::ready(Flavour::Cloud).unwrap();
        let tap = Tap::of_queues("sv-vhost", "10.0.9.1/24").unwrap();
        // Each processor sends by a pair of its own.
        let script = Script::new(
            "set -e\n\
             ip addr add 10.0.9.2/24 dev eth0; ip link set eth0 up\n\
             for round in 0 1; do\n\
               for cpu in 0 1; do taskset -c $cpu ping -c 1 -w 60 10.0.9.1 > /dev/null; done\n\
               echo ROUND $round; read line\n\
             done\n",
        );
        let initrd = guest.initrd_with(&script).unwrap();
        let dir = tempfile::tempdir().unwrap();
        let snapshot = dir.path().join("template");
        let uri = format!("file:{}", snapshot.display());
        let build = || {
            let append = "console=ttyS0 quiet panic=-1 reboot=k";
            vm(&guest.kernel.elf, append, &tap.name, ",queues=2")
                .args(["-smp", "2"])
                .arg("-initrd")
                .arg(initrd.path())
                .arg("-snapshot-dir")
                .arg(&snapshot)
        };
        let mut vm = build().start().unwrap();
        for round in 0..2 {
            expect(&mut vm, &format!("ROUND {round}"));
            let card = vm.process("net").unwrap().unwrap();
            assert_eq!(workers(card), 2, "in round {round}");
            if round == 0 {
                let mut qmp = vm.qmp().unwrap();
                qmp.execute("migrate", json!({ "uri": uri })).unwrap();
                vm.kill().unwrap();
                drop(vm);
                vm = build().arg("-incoming").arg(&uri).start().unwrap();
            }
            vm.console.send("\n").unwrap();
        }
        expect(&mut vm, "GUEST-END status=0");
        let status = vm.wait(LIMIT).unwrap_or_else(|e| panic!("{e}"));
        assert_eq!(status.code(), Some(0), "{}", vm.messages());
    });
}

#[test]
fn the_jail_is_a_cards_with_one_descriptor_more_and_its_own_filter() {
    where_vhost_net_is(test_path!(), || {
        let tap = Tap::new("sv-vhost", "10.7.42.1/24").unwrap();
        let mut vm = vm(&Payload::BlkRw.path(), "end=halt", &tap.name, "");
        let dir = tempfile::tempdir().unwrap();
        let image = dir.path().join("disk.img");
        const IMAGE: u64 = 8 << 20;
        fs::File::create(&image).unwrap().set_len(IMAGE).unwrap();
        vm = vm.disk("d0", &image, "");
        let mut vm = vm.start().unwrap();
        expect(&mut vm, "BLK-RW OK");
        let mut qmp = vm.qmp().unwrap();
        let reply = qmp.execute("query-sandbox", json!({})).unwrap();
        let card = Device {
            id: "card",
            binary: "net",
            back_end: BackEnd::TapOfKernel,
            queues: 3,
            started: 0,
        };
        let disk = Device {
            id: "dev-d0",
            binary: "block",
            back_end: BackEnd::Image {
                path: "/disk.img",
                writes: true,
                size: IMAGE,
            },
            queues: 1,
            started: 1,
        };
        let setting = Setting {
            devices: vec![card, disk],
            ram: 512 << 20,
            vcpus: 1,
            clients: 1,
            held: Vec::new(),
            given: Vec::new(),
        };
        let findings = check(&mut vm, &setting, &reply).unwrap();
        assert!(findings.is_empty(), "{findings:#?}");
        qmp.execute("quit", json!({})).unwrap();
        assert!(vm.wait(LIMIT).unwrap().success(), "{}", vm.messages());
    });
}

/// The kernel serves queues for whoever holds a descriptor, and only a process that gives them back can have a successor.
#[test]
fn a_card_with_descriptors_of_the_callers_is_given_up_when_its_process_dies() {
    where_vhost_net_is(test_path!(), || {
        let tap = Tap::new("sv-vhost", "10.7.44.1/24").unwrap();
        let own = "host=10.7.44.1 own=10.7.44.2";
        let dir = tempfile::tempdir().unwrap();
        let starter = dir.path().join("starter");
        let program = tests::vm::binary("stratovirt").unwrap();
        let lines = format!(
            "#!/bin/bash\nexec 9<>/dev/vhost-net\nexec {} \"$@\"\n",
            program.display()
        );
        fs::write(&starter, lines).unwrap();
        fs::set_permissions(&starter, fs::Permissions::from_mode(0o755)).unwrap();
        for upgraded in [false, true] {
            let mut vm = vm(&Payload::NetLoop.path(), own, &tap.name, ",vhostfd=9")
                .program(&starter)
                .start()
                .unwrap();
            let mut qmp = vm.qmp().unwrap();
            expect(&mut vm, "LOOP 10\r");
            let mut card = vm.process("net").unwrap().unwrap();
            assert_eq!(workers(card), 1);
            let held = |pid: i32| {
                let all = procfs::fds(pid).unwrap();
                all.values()
                    .filter(|fd| fd.kind() == "/dev/vhost-net")
                    .count()
            };
            let others: usize = vm
                .processes()
                .unwrap()
                .into_iter()
                .filter(|pid| *pid != card)
                .map(held)
                .sum();
            assert_eq!(
                (held(card), others),
                (1, 0),
                "the card's process has it alone"
            );
            if upgraded {
                card = upgrade(&mut vm, &mut qmp);
                assert_eq!(workers(card), 1);
            }
            kill(Pid::from_raw(card), Signal::SIGKILL).unwrap();
            if upgraded {
                qmp.wait_event("DEVICE_RECOVERED", LIMIT).unwrap();
                expect(&mut vm, "LOOP ");
            } else {
                qmp.wait_event("DEVICE_FAILED", LIMIT).unwrap();
                let want = "no other process can have its queues";
                assert!(vm.messages().contains(want), "{}", vm.messages());
            }
            qmp.execute("quit", json!({})).unwrap();
            assert!(vm.wait(LIMIT).unwrap().success(), "{}", vm.messages());
        }
    });
}

/// A VM that waits with its guest, and may have the tap added.
fn to_be_added(tap: &str, more: &[&str], address: &str) -> (Vm, Qmp) {
    let vm = Vm::builder()
        .args(["-machine", "microvm", "-m", "128", "-S", "-hotplug"])
        .arg(format!("tap={tap}"))
        .args(more)
        .kernel(
            &Payload::NetLoop.path(),
            &format!("host={address}.1 own={address}.2"),
        )
        .with_qmp()
        .start()
        .unwrap();
    let qmp = vm.qmp().unwrap();
    (vm, qmp)
}

#[test]
fn a_card_that_is_added_is_the_kernels_too_where_that_is_granted() {
    where_vhost_net_is(test_path!(), || {
        let tap = Tap::new("sv-vhost", "10.7.45.1/24").unwrap();
        let grant = ["-hotplug", "vhost=on"];
        let (mut vm, mut qmp) = to_be_added(&tap.name, &grant, "10.7.45");
        let netdev = json!({ "type": "tap", "id": "n", "ifname": tap.name, "vhost": true });
        let card = json!({ "id": "card", "driver": "virtio-net-device", "netdev": "n", "mac": "52:54:00:aa:bb:cc" });
        for (command, arguments) in [
            ("netdev_add", netdev),
            ("device_add", card),
            ("cont", json!({})),
        ] {
            qmp.execute(command, arguments).unwrap();
        }
        expect(&mut vm, "LOOP 10\r");
        let first = vm.process("net").unwrap().unwrap();
        assert_eq!(workers(first), 1);
        kill(Pid::from_raw(first), Signal::SIGKILL).unwrap();
        qmp.wait_event("DEVICE_RECOVERED", LIMIT).unwrap();
        expect(&mut vm, "LOOP ");
        let second = vm.process("net").unwrap().unwrap();
        assert_ne!(first, second);
        assert_eq!(workers(second), 1);
        vm.console.send("x").unwrap();
        expect(&mut vm, "NET-LOOP OK answers ");
        let status = vm.wait(LIMIT).unwrap_or_else(|e| panic!("{e}"));
        assert_eq!(status.code(), Some(0), "{}", vm.messages());
    });
}

/// On this machine's own, which need not have it.
#[test]
fn a_card_that_is_added_is_the_kernels_for_who_was_granted_that_only() {
    require_kvm();
    require_root();
    let tap = Tap::new("sv-vhost1", "10.7.46.1/24").unwrap();
    let (mut vm, mut qmp) = to_be_added(&tap.name, &[], "10.7.46");
    let netdev = json!({ "type": "tap", "id": "n", "ifname": tap.name, "vhost": true });
    let told = qmp.execute("netdev_add", netdev).unwrap_err().to_string();
    let want = "Netdev 'n': vhost takes -hotplug vhost=on when the VM is started";
    assert!(told.contains(want), "{told}");
    let netdev = json!({ "type": "tap", "id": "n", "ifname": tap.name, "vhost": true, "throttling.rx-bytes": 9 });
    let told = qmp.execute("netdev_add", netdev).unwrap_err().to_string();
    let want = "Parameter 'throttling.rx-bytes' contradicts 'vhost'";
    assert!(told.contains(want), "{told}");
    qmp.execute("quit", json!({})).unwrap();
    assert!(vm.wait(LIMIT).unwrap().success(), "{}", vm.messages());
    if std::path::Path::new("/dev/vhost-net").exists() {
        return;
    }
    // Granted, and not to be had.
    let (mut vm, mut qmp) = to_be_added(&tap.name, &["-hotplug", "vhost=on"], "10.7.46");
    let netdev = json!({ "type": "tap", "id": "n", "ifname": tap.name, "vhost": true });
    qmp.execute("netdev_add", netdev).unwrap();
    let card = json!({ "id": "card", "driver": "virtio-net-device", "netdev": "n" });
    let told = qmp.execute("device_add", card).unwrap_err().to_string();
    assert!(told.contains("/dev/vhost-net: cannot open: "), "{told}");
    qmp.execute("quit", json!({})).unwrap();
    assert!(vm.wait(LIMIT).unwrap().success(), "{}", vm.messages());
}

/// On this machine's own, which need not have it.
#[test]
fn what_cannot_be_had_is_told_before_the_guest_runs() {
    require_kvm();
    require_root();
    let tap = Tap::new("sv-vhost0", "10.7.43.1/24").unwrap();
    let refused = |more: &str| {
        let mut vm = vm(&Payload::NetLoop.path(), "", &tap.name, more)
            .start()
            .unwrap();
        let status = vm.wait(LIMIT).unwrap_or_else(|e| panic!("{e}"));
        assert_eq!(status.code(), Some(1), "{}", vm.messages());
        vm.messages()
    };
    let told = refused(",vhostfd=99");
    let want = "-netdev vhostfd=99: no such open descriptor was inherited (device card)";
    assert!(told.contains(want), "{told}");
    if !std::path::Path::new("/dev/vhost-net").exists() {
        let told = refused("");
        let want = "-netdev vhost=on: /dev/vhost-net: cannot open: ";
        assert!(told.contains(want), "{told}");
        assert!(
            told.contains("the host's kernel module vhost_net is needed"),
            "{told}"
        );
    }
}

/// What `iperf3` says of one second, in bits, from the guest and to it, in a machine whose card's packets this program passes or the
/// kernel.
fn iperf3(guest: &Guest, vhost: bool) -> [f64; 2] {
    let tap = Tap::new("sv-iperf", "10.7.62.1/24").unwrap();
    let program = programs::command("/tools", "iperf3");
    let script = Script::new(&format!(
        "set -e\n\
         mkdir -p /tools; mount -t ext4 -o ro /dev/vda /tools\n\
         ip addr add 10.7.62.2/24 dev eth0; ip link set eth0 up\n\
         ping -c 1 -w 60 10.7.62.1 > /dev/null\n\
         for way in '' -R; do {program} -c 10.7.62.1 -t 5 -O 1 $way > /dev/null; done\n\
         echo IPERF-DONE\n"
    ));
    let initrd = guest.initrd_with(&script).unwrap();
    let mut server = std::process::Command::new("iperf3")
        .args(["-s", "-B", "10.7.62.1", "-J"])
        .stdout(std::process::Stdio::piped())
        .spawn()
        .unwrap();
    let how = if vhost { ",vhost=on" } else { "" };
    let mut vm = Vm::builder()
        .args(["-machine", "microvm", "-m", "256"])
        .kernel(&guest.kernel.elf, "console=ttyS0 quiet panic=-1 reboot=k")
        .arg("-initrd")
        .arg(initrd.path())
        .disk("tools", &programs::image("iperf3").unwrap(), ",readonly=on")
        .arg("-netdev")
        .arg(format!("tap,id=n0,ifname={}{how}", tap.name))
        .args([
            "-device",
            "virtio-net-device,netdev=n0,id=card,mac=52:54:00:00:62:02",
        ])
        .start()
        .unwrap();
    expect(&mut vm, "IPERF-DONE");
    expect(&mut vm, "GUEST-END status=0");
    server.kill().unwrap();
    let output = server.wait_with_output().unwrap().stdout;
    // One object for each run, and nothing between them.
    let runs: Vec<serde_json::Value> = serde_json::Deserializer::from_slice(&output)
        .into_iter()
        .map(Result::unwrap)
        .collect();
    let [from, to] = &runs[..] else {
        panic!("{}", String::from_utf8_lossy(&output));
    };
    let rate = |run: &serde_json::Value, sum: &str| {
        let rate = run["end"][sum]["bits_per_second"].as_f64();
        rate.filter(|rate| *rate > 0.0)
            .unwrap_or_else(|| panic!("{run}"))
    };
    [rate(from, "sum_received"), rate(to, "sum_sent")]
}

/// A ratio, and no figure: in the nested machine all of it is emulated.
#[test]
#[ignore = "measures for minutes: run by `cargo xtask test vhost --long`"]
fn iperf3_in_a_guest_beside_the_kernels_vhost_net() {
    // Made out here, where it is kept.
    programs::image("iperf3").unwrap();
    let nested = Nested {
        limit: Some(Duration::from_secs(900)),
        ..Nested::default()
    };
    in_a_nested_machine(&nested, test_path!(), || {
        let guest = Guest::ready(Flavour::Cloud).unwrap();
        for round in 0..3 {
            let [own_from, own_to] = iperf3(&guest, false);
            let [kernel_from, kernel_to] = iperf3(&guest, true);
            println!(
                "round {round}: from the guest {:.0} and {:.0} Mbit/s, {:.2} times the kernel's; to it {:.0} and {:.0}, {:.2} times",
                own_from / 1e6,
                kernel_from / 1e6,
                own_from / kernel_from,
                own_to / 1e6,
                kernel_to / 1e6,
                own_to / kernel_to
            );
        }
    });
}
