//! What cannot be added, and what is left of it: nothing.

use std::fs;
use std::path::Path;

use serde_json::{Value, json};
use tests::procfs;

use super::{LIMIT, add_disk, bare, image, plug, refused, run, started};

#[test]
fn what_cannot_be_added_leaves_nothing_behind() {
    let (builder, dir) = bare(&[]);
    let images = dir.path().join("images");
    let second = image(&images, "second.img");
    let (mut vm, mut qmp) = started(builder);
    let processes = vm.processes().unwrap();
    let broker = vm.process("broker").unwrap().unwrap();
    let held = |pid: i32| -> Vec<String> {
        let mut held: Vec<String> = procfs::fds(pid)
            .unwrap()
            .into_values()
            .map(|fd| fd.kind().to_owned())
            .collect();
        held.sort_unstable();
        held
    };
    let before = (held(broker), held(vm.pid()));

    // A file is asked for that nobody granted, or that is not there.
    let file = |path: &Path| json!({ "node-name": "x", "file": { "filename": path } });
    let outside = dir.path().join("cold.img");
    let said = refused(&mut qmp, "blockdev-add", file(&outside));
    assert!(
        said.contains("not beneath a folder that may be used") && said.contains("images="),
        "{said}"
    );
    let said = refused(&mut qmp, "blockdev-add", file(&images.join("none")));
    assert!(said.contains("No such file"), "{said}");
    let said = refused(&mut qmp, "netdev_add", json!({ "id": "n", "ifname": "lo" }));
    assert!(said.contains("-hotplug: none"), "{said}");
    // Devices without a back end, or with one of another kind, or too many of them.
    let said = refused(
        &mut qmp,
        "device_add",
        json!({ "id": "y", "driver": "virtio-blk-device", "drive": "x" }),
    );
    assert!(said.contains("Block node 'x'"), "{said}");
    add_disk(&mut qmp, "node", &second, json!({}));
    let said = refused(
        &mut qmp,
        "blockdev-add",
        file(&second).as_object().map_or(Value::Null, |members| {
            let mut members = members.clone();
            members.insert("node-name".into(), "node".into());
            Value::Object(members)
        }),
    );
    assert!(said.contains("exists already"), "{said}");
    for (arguments, part) in [
        (
            json!({ "id": "dev-d0", "driver": "virtio-blk-device", "drive": "node" }),
            "'dev-d0' exists already",
        ),
        (
            json!({ "id": "y", "driver": "virtio-blk-device", "drive": "node", "addr": "0x6" }),
            "0x0 to 0x5",
        ),
        (
            json!({ "id": "y", "driver": "virtio-blk-device", "drive": "node", "addr": "0x0" }),
            "taken by device 'dev-d0'",
        ),
        (
            json!({ "id": "y", "driver": "virtio-blk-device", "drive": "node", "queue-size": 100 }),
            "not a power of two",
        ),
        (
            json!({ "id": "y", "driver": "virtio-blk-device", "drive": "node", "iothread": "z" }),
            "iothread z",
        ),
    ] {
        let said = refused(&mut qmp, "device_add", arguments);
        assert!(said.contains(part), "{said}");
    }
    let said = refused(&mut qmp, "device_del", json!({ "id": "y" }));
    assert!(said.contains("'y' not found"), "{said}");
    // The broker has opened the image; its process cannot: somebody else has locked it meanwhile.
    let lock = lock_image(&second);
    let said = refused(
        &mut qmp,
        "device_add",
        json!({ "id": "y", "driver": "virtio-blk-device", "drive": "node" }),
    );
    assert!(said.contains("holds a lock"), "{said}");
    drop(lock);
    run(&mut qmp, "blockdev-del", json!({ "node-name": "node" }));
    let said = refused(&mut qmp, "blockdev-del", json!({ "node-name": "node" }));
    assert!(said.contains("removed already"), "{said}");

    assert_eq!(vm.processes().unwrap(), processes);
    assert_eq!((held(broker), held(vm.pid())), before, "descriptors");

    // What failed can be done now, and undone.
    add_disk(&mut qmp, "node", &second, json!({}));
    plug(
        &mut qmp,
        json!({ "id": "y", "driver": "virtio-blk-device", "drive": "node" }),
    );
    assert_eq!(vm.processes().unwrap().len(), processes.len() + 1);
    let said = refused(&mut qmp, "blockdev-del", json!({ "node-name": "node" }));
    assert!(said.contains("in use by device 'y'"), "{said}");
    run(&mut qmp, "device_del", json!({ "id": "y" }));
    let deleted = qmp.wait_event("DEVICE_DELETED", LIMIT).unwrap();
    assert_eq!(
        deleted["data"],
        json!({ "device": "y", "path": "/machine/peripheral/y" })
    );
    run(&mut qmp, "blockdev-del", json!({ "node-name": "node" }));
    assert_eq!(vm.processes().unwrap(), processes);
    assert_eq!(held(broker), before.0, "the broker's descriptors");
}

/// A write lock on an image, as another VM would hold.
fn lock_image(path: &Path) -> fs::File {
    let file = fs::File::options()
        .read(true)
        .write(true)
        .open(path)
        .unwrap();
    let lock = libc_lock();
    nix::fcntl::fcntl(&file, nix::fcntl::FcntlArg::F_OFD_SETLK(&lock)).unwrap();
    file
}

fn libc_lock() -> nix::libc::flock {
    nix::libc::flock {
        l_type: nix::libc::F_WRLCK as nix::libc::c_short,
        l_whence: nix::libc::SEEK_SET as nix::libc::c_short,
        l_start: 0,
        l_len: 0,
        l_pid: 0,
    }
}
