//! What is added is confined as what was there: the jail suite's table, for devices of names that were granted and of descriptors that a
//! client passes.

use std::os::fd::AsFd;

use nix::sys::signal::{Signal, kill};
use serde_json::json;
use tests::host::Tap;
use tests::jail::check::check;
use tests::jail::expect::{BackEnd, Device, Setting};
use tests::procfs;

use super::{
    IMAGE, LIMIT, add_disk, bare, image, open, plug, process_of, refused, run, started, unplug,
};

fn disk(id: &'static str, path: &'static str, writes: bool, started: usize) -> Device {
    Device {
        id,
        binary: "block",
        back_end: BackEnd::Image {
            path,
            writes,
            size: IMAGE,
        },
        queues: 1,
        started,
    }
}

fn card(id: &'static str) -> Device {
    Device {
        id,
        binary: "net",
        back_end: BackEnd::Tap,
        queues: 3,
        started: 0,
    }
}

#[test]
fn a_device_that_is_added_has_the_jail_of_one_that_was_there() {
    let tap = Tap::new("sv-plug", "10.7.40.1/24").unwrap();
    let shared = tempfile::tempdir().unwrap();
    let (builder, dir) = bare(&[
        "-hotplug".into(),
        "tap=sv-plug".into(),
        "-hotplug".into(),
        format!("folders={}", shared.path().display()),
    ]);
    let second = image(&dir.path().join("images"), "second.img");
    let (mut vm, mut qmp) = started(builder);
    add_disk(&mut qmp, "node", &second, json!({ "read-only": true }));
    plug(
        &mut qmp,
        json!({ "id": "hot", "driver": "virtio-blk-device", "drive": "node" }),
    );
    // As StratoVirt's clients write it.
    run(
        &mut qmp,
        "netdev_add",
        json!({ "id": "net-0", "ifname": "sv-plug" }),
    );
    plug(
        &mut qmp,
        json!({ "id": "net-0", "driver": "virtio-net-mmio", "addr": "0x0" }),
    );
    run(
        &mut qmp,
        "fsdev-add",
        json!({ "id": "share", "path": shared.path() }),
    );
    plug(
        &mut qmp,
        json!({ "id": "share", "driver": "virtio-fs-device" }),
    );
    let setting = Setting {
        devices: vec![
            disk("d0", "/cold.img", true, 1),
            disk("hot", "/second.img", false, 0),
            card("net-0"),
            Device {
                id: "share",
                binary: "fs",
                back_end: BackEnd::Folder {
                    path: shared.path().display().to_string(),
                    readonly: false,
                    capabilities: 0xdb,
                },
                queues: 2,
                started: 0,
            },
        ],
        ram: 128 << 20,
        vcpus: 1,
        clients: 1,
        held: vec![
            "/images".into(),
            "/second.img".into(),
            shared.path().display().to_string(),
            shared.path().display().to_string(),
        ],
        given: Vec::new(),
    };
    let reply = qmp.execute("query-sandbox", json!({})).unwrap();
    let findings = check(&mut vm, &setting, &reply).unwrap();
    assert!(findings.is_empty(), "{findings:#?}");
    drop(tap);
}

/// A client that wants nothing granted opens everything itself.
#[test]
fn descriptors_that_a_client_passes_become_devices() {
    let tap = Tap::new("sv-given", "10.7.42.1/24").unwrap();
    let (builder, dir) = bare(&[]);
    let outside = image(dir.path(), "outside.img");
    let (mut vm, mut qmp) = started(builder);
    let broker = vm.process("broker").unwrap().unwrap();
    let held = |pid: i32| procfs::fds(pid).unwrap().len();
    let before = (held(broker), held(vm.pid()));

    let blockdev = json!({
        "node-name": "node",
        "driver": "raw",
        "read-only": false,
        "file": { "driver": "file", "filename": "/dev/fdset/3" },
        "cache": { "direct": false },
    });
    let said = refused(&mut qmp, "blockdev-add", blockdev.clone());
    assert!(said.contains("no such set"), "{said}");
    let said = refused(&mut qmp, "add-fd", json!({ "fdset-id": 3 }));
    assert_eq!(said, "No file descriptor supplied via SCM_RIGHTS");
    // What is no image is found to be none by who opens it.
    let (socket, _other) = std::os::unix::net::UnixStream::pair().unwrap();
    let set = json!({ "fdset-id": 3, "opaque": "rw:outside" });
    qmp.execute_with("add-fd", set.clone(), &[socket.as_fd()])
        .unwrap();
    let said = refused(&mut qmp, "blockdev-add", blockdev.clone());
    assert!(said.contains("neither a regular file"), "{said}");
    run(&mut qmp, "remove-fd", json!({ "fdset-id": 3 }));
    // One for reading only does not do.
    let reading = open(&outside, false);
    qmp.execute_with("add-fd", set.clone(), &[reading.as_fd()])
        .unwrap();
    let said = refused(&mut qmp, "blockdev-add", blockdev.clone());
    assert!(said.contains("open for reading and writing"), "{said}");
    let writing = open(&outside, true);
    let added = qmp.execute_with("add-fd", set, &[writing.as_fd()]).unwrap();
    assert_eq!(added["fdset-id"], 3);
    drop((reading, writing));
    run(&mut qmp, "blockdev-add", blockdev);
    let sets = qmp.execute("query-fdsets", json!({})).unwrap();
    assert_eq!(
        sets[0]["fds"][1],
        json!({ "fd": added["fd"], "opaque": "rw:outside" })
    );
    assert_eq!(sets[0]["fds"].as_array().unwrap().len(), 2);
    run(&mut qmp, "remove-fd", json!({ "fdset-id": 3 }));
    plug(
        &mut qmp,
        json!({ "id": "hot", "driver": "virtio-blk-device", "drive": "node" }),
    );

    // A card on a tap that the client has opened; one that is none first.
    let file = open(&outside, true);
    let name = json!({ "fdname": "queue0" });
    qmp.execute_with("getfd", name.clone(), &[file.as_fd()])
        .unwrap();
    let netdev = json!({ "id": "net", "type": "tap", "fds": "queue0" });
    let said = refused(&mut qmp, "netdev_add", netdev.clone());
    assert!(said.contains("not an open tap"), "{said}");
    let said = refused(&mut qmp, "netdev_add", netdev.clone());
    assert_eq!(said, "File descriptor named 'queue0' not found");
    drop(file);
    let queue = tap.queue().unwrap();
    qmp.execute_with("getfd", name, &[queue.as_fd()]).unwrap();
    drop(queue);
    run(&mut qmp, "netdev_add", netdev);
    plug(
        &mut qmp,
        json!({ "id": "card", "driver": "virtio-net-device", "netdev": "net" }),
    );

    let setting = Setting {
        devices: vec![
            disk("d0", "/cold.img", true, 1),
            disk("hot", "/outside.img", true, 0),
            card("card"),
        ],
        ram: 128 << 20,
        vcpus: 1,
        clients: 1,
        held: vec!["/images".into()],
        given: vec!["hot", "card"],
    };
    for round in 0..2 {
        let reply = qmp.execute("query-sandbox", json!({})).unwrap();
        let findings = check(&mut vm, &setting, &reply).unwrap();
        assert!(findings.is_empty(), "{round}: {findings:#?}");
        if round == 0 {
            // The next process gets the same descriptors.
            for device in ["hot", "card"] {
                kill(process_of(&mut qmp, device), Signal::SIGKILL).unwrap();
                qmp.wait_event("DEVICE_RECOVERED", LIMIT).unwrap();
            }
        }
    }
    for device in ["hot", "card"] {
        unplug(&mut qmp, device);
    }
    run(&mut qmp, "blockdev-del", json!({ "node-name": "node" }));
    run(&mut qmp, "netdev_del", json!({ "id": "net" }));
    assert_eq!(held(broker), before.0, "the broker's descriptors");
    // Nobody has the queue any more.
    tap.queue().unwrap();
}
