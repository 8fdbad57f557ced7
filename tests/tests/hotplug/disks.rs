//! Disks as Kata and libvirt add and take them out.

use std::path::Path;

use serde_json::json;
use tests::procfs;
use tests::vm::expect;
use tests::wait::Deadline;

use super::{LIMIT, bare, image, plug, process_of, refused, run, started, unplug};

/// The command line, the commands, their arguments and their order are those of Kata's driver for StratoVirt and of its client
/// govmm, down to the address in decimal digits and the ROM that no device has.
#[test]
fn kata_starts_a_vm_adds_and_removes_a_disk_and_kills_it() {
    // Kata asks for io_uring's and Linux AIO's kind of file: O_DIRECT, which not every temporary folder has.
    let place = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    let volume = image(place.path(), "volume.img");
    let (builder, _dir) = bare(&[
        "-name".into(),
        "sandbox-1".into(),
        "-uuid".into(),
        "01234567-89ab-cdef-0123-456789abcdef".into(),
        "-smp".into(),
        "2".into(),
        "-disable-seccomp".into(),
        "-hotplug".into(),
        format!("images={}", place.path().display()),
    ]);
    let mut vm = builder.start().unwrap();
    expect(&mut vm, "BLK-RW OK");
    // Its shim connects, asks what it wants to know, and hangs up; the next call connects anew.
    let mut first = vm.qmp().unwrap();
    let cpus = first.execute("query-cpus", json!({})).unwrap();
    let threads: Vec<(u64, i64)> = cpus
        .as_array()
        .unwrap()
        .iter()
        .map(|cpu| {
            (
                cpu["CPU"].as_u64().unwrap(),
                cpu["thread_id"].as_i64().unwrap(),
            )
        })
        .collect();
    assert_eq!(threads.iter().map(|one| one.0).collect::<Vec<_>>(), [0, 1]);
    for (_, thread) in &threads {
        let task = format!("/proc/{}/task/{thread}", vm.pid());
        assert!(Path::new(&task).exists(), "{task}");
    }
    drop(first);
    let alone = vm.processes().unwrap();
    let mut qmp = vm.qmp().unwrap();
    // More volumes than there is room for at once. It never removes what it opened for one that it takes out; names come again.
    for round in 0..15 {
        let id = format!("drive-{}", round % 13);
        run(
            &mut qmp,
            "blockdev-add",
            json!({
                "driver": "raw",
                "read-only": false,
                "file": { "driver": "file", "filename": volume, "aio": "native" },
                "node-name": id,
            }),
        );
        plug(
            &mut qmp,
            json!({ "id": id, "driver": "virtio-blk-mmio", "drive": id, "addr": "1", "romfile": "" }),
        );
        assert_eq!(vm.processes().unwrap().len(), alone.len() + 1);
        unplug(&mut qmp, &id);
        assert_eq!(vm.processes().unwrap(), alone);
        if round == 0 {
            // What it does when a step fails.
            run(&mut qmp, "blockdev-del", json!({ "node-name": id }));
        }
        let held = procfs::fds(vm.process("broker").unwrap().unwrap()).unwrap();
        let volumes = held
            .values()
            .filter(|fd| fd.kind().ends_with("/volume.img"));
        let volumes = volumes.count();
        assert!(
            (usize::from(round > 0)..=11).contains(&volumes),
            "{volumes}"
        );
    }
    drop(qmp);
    vm.kill().unwrap();
    let left = vm.survivors(Deadline::after(LIMIT));
    assert!(left.is_empty(), "{left:?}");
}

/// As libvirt adds a disk: the file first, then the format over it, each with a name of its own, and the device last.
#[test]
fn a_format_is_put_over_a_node_and_taken_off_again() {
    let (builder, dir) = bare(&[]);
    let image = image(&dir.path().join("images"), "second.img");
    let (_vm, mut qmp) = started(builder);
    let storage = json!({
        "node-name": "storage",
        "driver": "file",
        "filename": image,
        "cache": { "direct": false },
        "discard": "unmap",
    });
    let format = json!({
        "node-name": "format",
        "driver": "raw",
        "file": "storage",
        "read-only": false,
        "detect-zeroes": "on",
    });
    let said = refused(&mut qmp, "blockdev-add", format.clone());
    assert!(said.contains("node-name='storage'"), "{said}");
    run(&mut qmp, "blockdev-add", storage.clone());
    let mut contradicts = format.clone();
    contradicts["cache"] = json!({ "direct": true });
    let said = refused(&mut qmp, "blockdev-add", contradicts);
    assert!(said.contains("'cache.direct' is true"), "{said}");
    let mut contradicts = format.clone();
    contradicts["backing"] = json!("storage");
    let said = refused(&mut qmp, "blockdev-add", contradicts);
    assert_eq!(said, "Parameter 'backing' needs driver qcow2");
    run(&mut qmp, "blockdev-add", format.clone());
    // Both names are taken, and the one below belongs to the other.
    for again in [format, storage] {
        let said = refused(&mut qmp, "blockdev-add", again);
        assert!(said.contains("exists already"), "{said}");
    }
    let below = json!({ "node-name": "storage" });
    let said = refused(&mut qmp, "blockdev-del", below.clone());
    assert_eq!(
        said,
        "Block node 'storage' is in use by block node 'format'"
    );
    let over_itself = json!({ "node-name": "third", "driver": "raw", "file": "format" });
    let said = refused(&mut qmp, "blockdev-add", over_itself);
    assert!(said.contains("is a format itself"), "{said}");

    let iothread = json!({ "qom-type": "iothread", "id": "io", "poll-max-ns": 32768 });
    run(&mut qmp, "object-add", iothread.clone());
    let said = refused(&mut qmp, "object-add", iothread);
    assert!(said.contains("duplicate"), "{said}");
    let device = |drive: &str| json!({ "id": "hot", "driver": "virtio-blk-device", "drive": drive, "iothread": "io" });
    let said = refused(&mut qmp, "device_add", device("storage"));
    assert!(said.contains("was not added"), "{said}");
    plug(&mut qmp, device("format"));
    let disks = qmp.execute("query-block", json!({})).unwrap();
    let hot = &disks[1];
    assert_eq!(
        (&hot["device"], &hot["qdev"]),
        (&json!("format"), &json!("hot"))
    );
    assert_eq!(hot["inserted"]["file"], json!(image));
    assert_eq!(hot["inserted"]["detect_zeroes"], "on");
    let threads = qmp.execute("query-iothreads", json!({})).unwrap();
    let serves = process_of(&mut qmp, "hot").as_raw();
    assert_eq!(
        (&threads[0]["id"], &threads[0]["thread-id"]),
        (&json!("io"), &json!(serves))
    );
    let said = refused(&mut qmp, "object-del", json!({ "id": "io" }));
    assert!(said.contains("in use by device 'hot'"), "{said}");
    let over = json!({ "node-name": "format" });
    let said = refused(&mut qmp, "blockdev-del", over.clone());
    assert!(said.contains("in use by device 'hot'"), "{said}");

    unplug(&mut qmp, "hot");
    run(&mut qmp, "object-del", json!({ "id": "io" }));
    let said = refused(&mut qmp, "object-del", json!({ "id": "io" }));
    assert_eq!(said, "object 'io' not found");
    run(&mut qmp, "blockdev-del", over);
    let nodes = qmp.execute("query-named-block-nodes", json!({})).unwrap();
    assert_eq!(nodes[1]["node-name"], "storage");
    assert_eq!(nodes[1]["detect_zeroes"], "off", "as it was added");
    run(&mut qmp, "blockdev-del", below);
    let nodes = qmp.execute("query-named-block-nodes", json!({})).unwrap();
    assert_eq!(nodes.as_array().unwrap().len(), 1);
}
