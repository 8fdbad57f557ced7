//! # What a stock kernel makes of a card
//!
//! **Job.** `ethtool` in a Linux guest: each property of a card is seen there, and what is changed there has its effect; the guest's
//! link and address, and packets all the while. **Who is not trusted.** The VMM.
//! **Why this way.** The driver and the program are Debian's, and both know what a card should say.
#![allow(clippy::unwrap_used)] // in a test, a panic is the report

use std::os::fd::AsRawFd;
use std::time::Duration;

use nix::fcntl::{FcntlArg, FdFlag, fcntl};
use serde_json::json;
use tests::host::Tap;
use tests::lab::{Flavour, Guest, Script, programs, where_linux_boots};
use tests::test_path;
use tests::vm::{Vm, VmBuilder};

/// Two emulations deep, a boot takes five seconds; this is for a machine that is also busy.
const LIMIT: Duration = Duration::from_secs(120);

#[track_caller]
fn expect(vm: &mut Vm, text: &str) -> String {
    vm.wait_for(text, LIMIT)
        .unwrap_or_else(|e| panic!("{e}\n{}", vm.messages()))
}

/// What the guest says from one mark to the next.
#[track_caller]
fn section(vm: &mut Vm, mark: &str) -> String {
    expect(vm, &format!("BEGIN {mark}\r\n"));
    expect(vm, &format!("END {mark}\r\n"))
}

/// The value behind `name:` in a line of its own.
#[track_caller]
fn value<'a>(text: &'a str, name: &str) -> &'a str {
    let mut lines = text.lines().map(str::trim);
    let line = lines.find_map(|line| line.strip_prefix(name)?.strip_prefix(':'));
    line.unwrap_or_else(|| panic!("no {name} in {text}")).trim()
}

/// A guest of two processors with `ethtool` on its disk, which runs `script`; `ETHTOOL` stands for the program.
fn vm(guest: &Guest, script: &str) -> (VmBuilder, tempfile::NamedTempFile) {
    let ethtool = programs::command("/tools", "ethtool");
    let lines = format!(
        "set -e\n\
         say() {{ echo \"BEGIN $1\"; shift; \"$@\" 2>&1 || echo \"STATUS $?\"; }}\n\
         end() {{ echo \"END $1\"; }}\n\
         mkdir -p /tools; mount -t ext4 -o ro /dev/vda /tools\n{}",
        script.replace("ETHTOOL", &ethtool)
    );
    let initrd = guest.initrd_with(&Script::new(&lines)).unwrap();
    let tools = programs::image("ethtool").unwrap();
    let vm = Vm::builder()
        .args(["-machine", "microvm", "-m", "256", "-smp", "2"])
        .kernel(&guest.kernel.elf, "console=ttyS0 quiet panic=-1 reboot=k")
        .arg("-initrd")
        .arg(initrd.path())
        .disk("tools", &tools, ",readonly=on");
    (vm, initrd)
}

#[track_caller]
fn ends_well(mut vm: Vm) {
    expect(&mut vm, "GUEST-END status=0");
    let status = vm.wait(LIMIT).unwrap_or_else(|e| panic!("{e}"));
    assert_eq!(status.code(), Some(0), "{}", vm.messages());
}

#[test]
fn ethtool_tells_each_property_and_what_it_changes_has_its_effect() {
    // Made out here, where it is kept.
    programs::image("ethtool").unwrap();
    where_linux_boots(test_path!(), || {
        let guest = Guest::ready(Flavour::Cloud).unwrap();
        let tap = Tap::of_queues("sv-ethtool", "10.7.61.1/24").unwrap();
        let (vm, _initrd) = vm(
            &guest,
            "ip addr add 10.7.61.2/24 dev eth0; ip link set eth0 up\n\
             for what in i k l g; do say $what ETHTOOL -$what eth0; end $what; done\n\
             for count in 1 2 3; do\n\
               say L$count ETHTOOL -L eth0 combined $count; ETHTOOL -l eth0\n\
               ping -c 3 -i 0.2 -w 60 10.7.61.1; end L$count\n\
             done\n\
             say K ETHTOOL -K eth0 tso off tx off gro off; ETHTOOL -k eth0; ping -c 3 -i 0.2 -w 60 10.7.61.1; end K\n\
             ip link set eth0 address 52:54:00:61:00:03\n\
             say mac cat /sys/class/net/eth0/address; ping -c 3 -i 0.2 -w 60 10.7.61.1; end mac\n\
             say S ETHTOOL -S eth0; end S\n\
             say up ETHTOOL eth0; end up; read line\n\
             say down ETHTOOL eth0; end down; read line\n\
             say again ETHTOOL eth0; ping -c 3 -i 0.2 -w 60 10.7.61.1; end again\n",
        );
        let mut vm = vm
            .arg("-netdev")
            .arg(format!("tap,id=n0,ifname={},queues=2", tap.name))
            .args([
                "-device",
                "virtio-net-device,netdev=n0,id=card,mac=52:54:00:61:00:02,mq=on,queue-size=512",
            ])
            .with_qmp()
            .start()
            .unwrap();
        let driver = section(&mut vm, "i");
        assert_eq!(value(&driver, "driver"), "virtio_net");
        // The ACPI device that it is behind.
        assert!(
            value(&driver, "bus-info").starts_with("LNRO0005:"),
            "{driver}"
        );

        let offloads = section(&mut vm, "k");
        for (name, state) in [
            ("rx-checksumming", "on [fixed]"),
            ("tx-checksumming", "on"),
            ("scatter-gather", "on"),
            ("tcp-segmentation-offload", "on"),
            ("tx-tcp-segmentation", "on"),
            ("tx-tcp-ecn-segmentation", "on"),
            ("tx-tcp6-segmentation", "on"),
            ("rx-gro-hw", "on"),
            ("rx-vlan-filter", "on [fixed]"),
        ] {
            assert_eq!(value(&offloads, name), state, "{name} in {offloads}");
        }

        let pairs = section(&mut vm, "l");
        let combined = |text: &str| -> Vec<String> {
            let all = text
                .lines()
                .filter_map(|line| line.strip_prefix("Combined:"));
            all.map(|value| value.trim().to_owned()).collect()
        };
        assert_eq!(combined(&pairs), ["2", "2"], "{pairs}");
        let rings = section(&mut vm, "g");
        for name in ["RX", "TX"] {
            assert_eq!(value(&rings, name), "512", "{rings}");
        }

        let pings = "3 packets transmitted, 3 packets received";
        for (count, now, refused) in [("L1", "1", false), ("L2", "2", false), ("L3", "2", true)] {
            let said = section(&mut vm, count);
            assert_eq!(combined(&said), ["2", now], "{said}");
            assert_eq!(said.contains("STATUS"), refused, "{said}");
            assert!(said.contains(pings), "{said}");
        }
        let offloads = section(&mut vm, "K");
        for name in ["tx-checksumming", "tcp-segmentation-offload"] {
            assert_eq!(value(&offloads, name), "off", "{offloads}");
        }
        assert!(offloads.contains(pings), "{offloads}");

        // The host answers to the new address, and those packets reach the guest.
        let said = section(&mut vm, "mac");
        assert!(
            said.contains("52:54:00:61:00:03") && said.contains(pings),
            "{said}"
        );

        let counts = section(&mut vm, "S");
        let sum = |direction: &str| -> u64 {
            let queues = [0, 1].map(|queue| format!("{direction}_queue_{queue}_packets"));
            queues
                .iter()
                .map(|name| value(&counts, name).parse::<u64>().unwrap())
                .sum()
        };
        // Five times three pings, an ARP request at the least.
        for direction in ["rx", "tx"] {
            assert!(sum(direction) >= 16, "{direction} in {counts}");
        }

        let mut qmp = vm.qmp().unwrap();
        for (mark, up) in [("up", false), ("down", true)] {
            let said = section(&mut vm, mark);
            let detected = if up { "no" } else { "yes" };
            assert_eq!(value(&said, "Link detected"), detected, "{said}");
            qmp.execute("set_link", json!({ "name": "card", "up": up }))
                .unwrap();
            vm.console.send("\n").unwrap();
        }
        let said = section(&mut vm, "again");
        assert_eq!(value(&said, "Link detected"), "yes", "{said}");
        assert!(said.contains(pings), "{said}");
        ends_well(vm);
    });
}

/// As Kata starts a VM: whoever starts it has opened the queues.
#[test]
fn a_card_of_inherited_queues_uses_all_of_them() {
    programs::image("ethtool").unwrap();
    where_linux_boots(test_path!(), || {
        let guest = Guest::ready(Flavour::Cloud).unwrap();
        let tap = Tap::of_queues("sv-ethtool", "10.7.61.1/24").unwrap();
        let queues = ipc::tap::open(&tap.name, 2).unwrap();
        let (vm, _initrd) = vm(
            &guest,
            "ip addr add 10.7.61.2/24 dev eth0; ip link set eth0 up\n\
             for cpu in 0 1; do taskset -c $cpu ping -c 2 -i 0.2 -w 60 10.7.61.1; done\n\
             say mac cat /sys/class/net/eth0/address; end mac; say l ETHTOOL -l eth0; end l\n",
        );
        for queue in &queues {
            fcntl(queue, FcntlArg::F_SETFD(FdFlag::empty())).unwrap();
        }
        let [first, second] = [0, 1].map(|at| queues[at].as_raw_fd());
        let mut vm = vm
            .arg("-netdev")
            .arg(format!("tap,id=n0,fds={first}:{second}"))
            .args(["-device", "virtio-net-device,netdev=n0,id=card"])
            .start()
            .unwrap();
        drop(queues);
        for _ in 0..2 {
            expect(&mut vm, "2 packets transmitted, 2 packets received");
        }
        // The first one that no other card has.
        let mac = section(&mut vm, "mac");
        assert!(mac.contains("52:54:00:12:34:56"), "{mac}");
        let pairs = section(&mut vm, "l");
        assert!(pairs.contains("Combined:\t2"), "{pairs}");
        ends_well(vm);
    });
}
