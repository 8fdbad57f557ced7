//! A stock kernel whose disk, card and folder come and go while it works on another disk.

use std::fs;
use std::os::fd::AsFd;
use std::path::Path;

use serde_json::json;
use tests::host::{Tap, check_ext4, ext4_image, read_from_ext4};
use tests::lab::{Flavour, Guest, Script, where_linux_boots};
use tests::test_path;
use tests::vm::{Vm, expect};

use super::{LIMIT, add_disk, ends_well, load_worked, md5, open, plug, run, unplug};

/// What the guest does in each round. `poll` waits, as a guest without udev has to.
const SCRIPT: &str = r#"
set -e
poll() { until eval "$1"; do usleep 20000; done; }
mkdir -p /d /f /load
mount -t ext4 /dev/vda /load
(
  n=0
  while [ ! -e /stop ]; do
    dd if=/dev/urandom of=/tmp-load bs=16k count=8 2>/dev/null
    cp /tmp-load /load/file; sync; echo 3 > /proc/sys/vm/drop_caches
    cmp /tmp-load /load/file || { echo LOAD-WRONG; break; }
    n=$((n+1))
  done
  echo LOAD-ROUNDS $n
) &
load=$!
i=0
echo READY
while read what && [ "$what" = go ]; do
  poll '[ "$(cat /sys/block/vdb/size 2>/dev/null || echo 0)" != 0 ]'
  poll '[ -b /dev/vdb ]'
  mount -t ext4 /dev/vdb /d
  dd if=/dev/urandom of=/d/round-$i bs=16k count=16 2>/dev/null
  echo DISK $(cat /d/name) $(md5sum < /d/round-$i | cut -d' ' -f1)
  umount /d
  poll '[ -e /sys/class/net/eth0 ]'
  ip link set eth0 up
  ip addr show dev eth0 | grep -q 10.7.41.2 || ip addr add 10.7.41.2/24 dev eth0
  poll '[ "$(cat /sys/class/net/eth0/carrier)" = 1 ]'
  poll 'ping -c 1 -W 2 10.7.41.1 > /dev/null'
  echo CARD
  poll 'mount -t virtiofs share /f 2>/dev/null'
  cp /f/from-host /f/from-guest-$i
  echo FOLDER $(cat /f/from-host)
  umount /f
  echo USED $i
  read what
  poll '[ "$(cat /sys/block/vdb/size)" = 0 ]'
  poll '[ "$(cat /sys/class/net/eth0/carrier)" = 0 ]'
  # For the answer to each of these the kernel waits with a processor, without end.
  ip link set eth0 promisc on; ip link set eth0 promisc off
  [ $((i % 2)) = 0 ] || ip link set eth0 down
  echo GONE $i
  i=$((i+1))
done
touch /stop
wait $load
umount /load
dmesg | grep -i -E 'error|warn|BUG|stall|fail' | grep -v -i -E 'correctable|EBUSY|RAS:' || true
echo SCRIPT-END
"#;

#[test]
fn a_stock_kernel_uses_what_comes_and_goes() {
    where_linux_boots(test_path!(), || comes_and_goes(4));
}

#[test]
#[ignore = "takes three minutes: run by `cargo xtask test hotplug --long`"]
fn a_stock_kernel_uses_what_comes_and_goes_twenty_times() {
    where_linux_boots(test_path!(), || comes_and_goes(20));
}

/// Disk, card and folder come and go so many times.
fn comes_and_goes(rounds: usize) {
    let guest = Guest::ready(Flavour::Cloud).unwrap();
    let tap = Tap::new("sv-hot", "10.7.41.1/24").unwrap();
    let dir = tempfile::tempdir().unwrap();
    let at = |name: &str| dir.path().join(name);
    fs::create_dir(at("content")).unwrap();
    ext4_image(&at("cold.img"), 16, &at("content")).unwrap();
    fs::create_dir(at("images")).unwrap();
    fs::create_dir(at("folder")).unwrap();
    fs::write(at("folder/from-host"), "folder-of-the-host").unwrap();
    // Two disks take turns: what the guest reads must be of the one that is there.
    for name in ["first", "second"] {
        fs::write(at("content/name"), name).unwrap();
        ext4_image(&at(&format!("images/{name}")), 16, &at("content")).unwrap();
    }
    let initrd = guest.initrd_with(&Script::new(SCRIPT)).unwrap();
    let mut vm = Vm::builder()
        .args(["-machine", "microvm", "-m", "256"])
        .kernel(&guest.kernel.elf, "console=ttyS0 quiet panic=-1 reboot=k")
        .arg("-initrd")
        .arg(initrd.path())
        .disk("d0", &at("cold.img"), "")
        .arg("-hotplug")
        .arg(format!("images={}", at("images").display()))
        .arg("-hotplug")
        .arg(format!("folders={}", at("folder").display()))
        .args(["-hotplug", "tap=sv-hot"])
        .with_qmp()
        .start()
        .unwrap();
    let mut qmp = vm.qmp().unwrap();
    expect(&mut vm, "READY");
    let mut sums = Vec::new();
    let begin = std::time::Instant::now();
    for round in 0..rounds {
        let name = ["first", "second"][round % 2];
        let image = at(&format!("images/{name}"));
        // By names that were granted and by descriptors, in turns.
        let given = round % 2 == 1;
        if given {
            let file = open(&image, true);
            let set = qmp.execute_with("add-fd", json!({}), &[file.as_fd()]);
            let set = set.unwrap()["fdset-id"].clone();
            add_disk(
                &mut qmp,
                "node",
                Path::new(&format!("/dev/fdset/{set}")),
                json!({}),
            );
            run(&mut qmp, "remove-fd", json!({ "fdset-id": set }));
            let queue = tap.queue().unwrap();
            let name = json!({ "fdname": "queue" });
            qmp.execute_with("getfd", name, &[queue.as_fd()]).unwrap();
        } else {
            add_disk(&mut qmp, "node", &image, json!({}));
        }
        plug(
            &mut qmp,
            json!({ "id": "disk", "driver": "virtio-blk-device", "drive": "node", "addr": "0x1" }),
        );
        run(
            &mut qmp,
            "netdev_add",
            if given {
                json!({ "id": "net", "type": "tap", "fd": "queue" })
            } else {
                json!({ "id": "net", "type": "tap", "ifname": "sv-hot" })
            },
        );
        plug(
            &mut qmp,
            json!({ "id": "card", "driver": "virtio-net-device", "netdev": "net", "addr": "0x0" }),
        );
        run(
            &mut qmp,
            "fsdev-add",
            json!({ "id": "fs", "path": at("folder") }),
        );
        plug(
            &mut qmp,
            json!({ "id": "folder", "driver": "virtio-fs-device", "fsdev": "fs", "tag": "share", "addr": "0x0" }),
        );
        vm.console.send("go\n").unwrap();
        expect(&mut vm, &format!("DISK {name} "));
        let sum = vm.console.rest_of_line(LIMIT).unwrap();
        sums.push((image, format!("/round-{round}"), sum.trim().to_owned()));
        expect(&mut vm, "CARD");
        expect(&mut vm, "FOLDER folder-of-the-host");
        expect(&mut vm, &format!("USED {round}"));
        for id in ["disk", "card", "folder"] {
            unplug(&mut qmp, id);
        }
        run(&mut qmp, "blockdev-del", json!({ "node-name": "node" }));
        run(&mut qmp, "netdev_del", json!({ "id": "net" }));
        run(&mut qmp, "fsdev-del", json!({ "id": "fs" }));
        vm.console.send("gone\n").unwrap();
        expect(&mut vm, &format!("GONE {round}"));
    }
    println!("{rounds} rounds in {:.1} s", begin.elapsed().as_secs_f64());
    vm.console.send("stop\n").unwrap();
    expect(&mut vm, "LOAD-ROUNDS ");
    load_worked(&mut vm);
    ends_well(&mut vm);
    for name in ["first", "second"] {
        check_ext4(&at(&format!("images/{name}"))).unwrap();
    }
    check_ext4(&at("cold.img")).unwrap();
    for (image, file, sum) in sums {
        assert_eq!(md5(&read_from_ext4(&image, &file).unwrap()), sum, "{file}");
    }
    for round in 0..rounds {
        let copy = fs::read(at(&format!("folder/from-guest-{round}"))).unwrap();
        assert_eq!(copy, b"folder-of-the-host");
    }
    drop(tap);
}
