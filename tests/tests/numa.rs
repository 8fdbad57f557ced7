//! # Memory nodes
//!
//! **Job.** `-numa` and the policies of `-object memory-backend-…`: a stock guest finds its nodes, the host's pages come from
//! where they should, every process maps all zones between guards, and snapshots know of nodes.
//! **Who is not trusted.** The VMM's own word: the guest's view is read in the guest, the host's from its kernel.
//! **Why this way.** Most machines have one node, so what needs two runs in a nested machine that has them.
#![allow(clippy::unwrap_used)] // in a test, a panic is the report

use std::collections::BTreeMap;
use std::path::Path;
use std::time::Duration;

use serde_json::json;
use tests::host::{require_kvm, require_root};
use tests::jail::check::guest_ram_of;
use tests::lab::{Flavour, Guest, Nested, Script, in_a_nested_machine};
use tests::payload::Payload;
use tests::test_path;
use tests::vm::{Vm, VmBuilder, expect};

const LIMIT: Duration = Duration::from_secs(90);

/// What the kernel tells of the mappings of a file whose name contains `name`: the policy, and pages by node (proc(5),
/// numa_maps).
fn policy_and_pages(pid: i32, name: &str) -> (String, BTreeMap<String, u64>) {
    let maps = std::fs::read_to_string(format!("/proc/{pid}/numa_maps")).unwrap();
    let line = maps.lines().find(|line| line.contains(name));
    let line = line.unwrap_or_else(|| panic!("{name} is not in {maps}"));
    let mut words = line.split_whitespace();
    let policy = words.nth(1).unwrap().to_owned();
    let pages = words.filter_map(|word| {
        let (node, count) = word.strip_prefix('N')?.split_once('=')?;
        Some((node.to_owned(), count.parse().ok()?))
    });
    (policy, pages.collect())
}

#[test]
fn a_stock_guest_finds_its_nodes_and_pages_come_from_where_they_should() {
    let machine = Nested {
        nodes: 2,
        ..Nested::default()
    };
    in_a_nested_machine(&machine, test_path!(), || {
        let guest = Guest::ready(Flavour::Cloud).unwrap();
        let script = Script::new(
            "cd /sys/devices/system/node\n\
             echo NODES=$(cat online)\n\
             for node in 0 1 2; do\n\
             echo NODE$node=$(cat node$node/cpulist):$(cat node$node/distance)\n\
             echo SIZE$node=$(grep MemTotal node$node/meminfo | tr -dc '0-9 ' | cut -d' ' -f3-)\n\
             done\n",
        );
        let initrd = guest.initrd_with(&script).unwrap();
        let shm = tempfile::tempdir_in("/dev/shm").unwrap();
        let file = shm.path().join("node-one");
        let mut vm = Vm::builder()
            .args(["-machine", "microvm", "-smp", "3", "-m", "320"])
            .kernel(&guest.kernel.elf, "console=ttyS0 quiet panic=-1 reboot=k")
            .arg("-initrd")
            .arg(initrd.path())
            .args(["-object", "memory-backend-ram,id=a,size=192M,policy=bind,host-nodes=1"])
            .arg("-object")
            .arg(format!(
                "memory-backend-file,id=b,size=128M,policy=interleave,host-nodes=0-1,prealloc=on,share=on,mem-path={}",
                file.display()
            ))
            .args(["-numa", "node,cpus=0:2,memdev=a"])
            .args(["-numa", "node,cpus=1,memdev=b"])
            .args(["-numa", "dist,src=0,dst=1,val=17"])
            .with_qmp()
            .start()
            .unwrap();
        expect(&mut vm, "GUEST-UP");
        let told = expect(&mut vm, "GUEST-END status=");
        for line in ["NODES=0-1", "NODE0=0,2:10 17", "NODE1=1:17 10", "NODE2=:"] {
            assert!(
                told.lines().any(|one| one.trim_end() == line),
                "no {line} in {told}"
            );
        }
        let pid = vm.pid();
        let (policy, pages) = policy_and_pages(pid, "memfd:guest-ram");
        assert_eq!(policy, "bind:1");
        // The guest has booted on these.
        assert!(!pages.contains_key("0") && pages["1"] > 1000, "{pages:?}");
        let (policy, pages) = policy_and_pages(pid, "node-one");
        assert_eq!(policy, "interleave:0-1");
        assert_eq!(pages.values().sum::<u64>(), 128 << 8, "{pages:?}");
        assert!(pages["0"].abs_diff(pages["1"]) < 64, "{pages:?}");
        let _ = vm.wait(LIMIT);
    });
}

/// A guest with a disk and two nodes, whose memory is of these kinds.
fn two_nodes(dir: &Path, first: &str, second: &str) -> VmBuilder {
    Vm::builder()
        .args(["-machine", "microvm", "-m", "128", "-smp", "2"])
        .kernel(&Payload::BlkLoop.path(), "spin=1")
        .disk("d0", &dir.join("disk.img"), "")
        .arg("-object")
        .arg(format!("{first},id=a,size=64M"))
        .arg("-object")
        .arg(format!("{second},id=b,size=64M"))
        .args(["-numa", "node,cpus=1,memdev=a"])
        .args(["-numa", "node,cpus=0,memdev=b"])
        .arg("-snapshot-dir")
        .arg(dir)
        .with_qmp()
}

fn folder_with_a_disk() -> tempfile::TempDir {
    require_kvm();
    require_root();
    let dir = tempfile::tempdir_in("/dev/shm").unwrap();
    let disk = std::fs::File::create(dir.path().join("disk.img")).unwrap();
    disk.set_len(1 << 20).unwrap();
    dir
}

#[test]
fn every_process_maps_all_zones_between_guards_and_clients_are_told() {
    let dir = folder_with_a_disk();
    let file = format!("memory-backend-file,mem-path={}", dir.path().display());
    let mut vm = two_nodes(dir.path(), "memory-backend-memfd", &file)
        .start()
        .unwrap();
    expect(&mut vm, "LOOP ");
    // The broker comes first and maps none.
    let disk = vm.processes().unwrap()[1];
    for pid in [vm.pid(), disk] {
        assert_eq!(
            guest_ram_of(pid).unwrap(),
            (vec![64 << 20, 64 << 20], Vec::new())
        );
    }
    let mut qmp = vm.qmp().unwrap();
    let cpus = qmp.execute("query-cpus-fast", json!({})).unwrap();
    let nodes: Vec<_> = cpus.as_array().unwrap().iter().collect();
    assert_eq!(
        [&nodes[0]["props"]["node-id"], &nodes[1]["props"]["node-id"]],
        [&json!(1), &json!(0)]
    );
    let zones = qmp.execute("query-memdev", json!({})).unwrap();
    assert_eq!(zones[1]["id"], "b");
    assert_eq!(zones[1]["size"], 64 << 20);
    assert_eq!(zones[1]["policy"], "default");
    assert_eq!(zones[1]["host-nodes"], json!([]));
}

#[test]
fn a_snapshot_goes_on_with_the_same_nodes_on_other_memory_and_with_no_others() {
    let dir = folder_with_a_disk();
    let file = format!("memory-backend-file,mem-path={}", dir.path().display());
    let memfd = "memory-backend-ram";
    let template = dir.path().join("template");
    let incoming = format!("file:{}", template.display());
    let mut vm = two_nodes(dir.path(), memfd, &file).start().unwrap();
    // Files and a memfd, in either order, and a memfd for both, which may come in later.
    for (first, second, lazy) in [
        (&*file, memfd, ""),
        (memfd, memfd, ",lazy=on"),
        (&*file, &*file, ""),
    ] {
        expect(&mut vm, "LOOP ");
        let mut qmp = vm.qmp().unwrap();
        qmp.execute("stop", json!({})).unwrap();
        let uri = format!("file:{}", template.display());
        qmp.execute("migrate", json!({ "uri": uri })).unwrap();
        vm.kill().unwrap();
        drop(vm);
        vm = two_nodes(dir.path(), first, second)
            .arg("-incoming")
            .arg(format!("{incoming}{lazy}"))
            .start()
            .unwrap();
    }
    expect(&mut vm, "LOOP ");
    vm.console.send("x").unwrap();
    expect(&mut vm, "BLK-LOOP OK bursts ");
    assert_eq!(vm.wait(LIMIT).unwrap().code(), Some(0));

    let mut other = two_nodes(dir.path(), memfd, memfd)
        .args(["-numa", "dist,src=0,dst=1,val=30"])
        .args(["-incoming", &incoming])
        .start()
        .unwrap();
    assert_eq!(other.wait(LIMIT).unwrap().code(), Some(1));
    assert!(
        other
            .messages()
            .contains("has a guest with 2 memory nodes; -numa gives 2, or other"),
        "{}",
        other.messages()
    );
}

#[test]
fn a_node_that_the_host_does_not_have_is_refused_with_those_that_it_has() {
    let dir = folder_with_a_disk();
    let mut vm = two_nodes(
        dir.path(),
        "memory-backend-ram,policy=preferred,host-nodes=1023",
        "memory-backend-ram",
    )
    .start()
    .unwrap();
    assert_eq!(vm.wait(LIMIT).unwrap().code(), Some(1));
    let messages = vm.messages();
    assert!(
        messages.contains("guest RAM cannot be on memory nodes 1023 of this host; allowed: 0"),
        "{messages}"
    );
}
