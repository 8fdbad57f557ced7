//! # Devices that come and go while the guest runs
//!
//! **Job.** Disks, cards and folders are added to a running VM, used by a stock kernel without any agent, and taken out again;
//! each is jailed as one that was there from the start, and whatever cannot be added leaves nothing behind.
//! **Who is not trusted.** The VMM; and the guest, whose files are read on the host side.
//! **Why this way.** The guest says what it sees and waits for a line between the steps, so nothing depends on time.
#![allow(clippy::unwrap_used)] // in a test, a panic is the report
#![allow(clippy::needless_pass_by_value)] // json!() at each call

use std::fs;
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};
use std::time::Duration;

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::{Value, json};
use tests::daemon::Daemon;
use tests::host::{Tap, check_ext4, ext4_image, read_from_ext4, require_kvm, require_root};
use tests::jail::check::check;
use tests::jail::expect::{BackEnd, Device, Setting};
use tests::lab::{Flavour, Guest, Script, where_linux_boots};
use tests::payload::Payload;
use tests::procfs;
use tests::qmp::{Qmp, QmpError};
use tests::test_path;
use tests::vm::{Vm, VmBuilder, expect};
use tests::wait::Deadline;

/// Two emulations deep, a boot takes five seconds; this is for a machine that is also busy.
const LIMIT: Duration = Duration::from_secs(90);
const IMAGE: u64 = 8 << 20;

#[track_caller]
fn run(qmp: &mut Qmp, command: &str, arguments: Value) {
    let returned = qmp.execute(command, arguments.clone());
    assert_eq!(
        returned.unwrap_or_else(|e| panic!("{command} {arguments}: {e}")),
        json!({})
    );
}

#[track_caller]
fn refused(qmp: &mut Qmp, command: &str, arguments: Value) -> String {
    match qmp.execute(command, arguments.clone()) {
        Err(QmpError::Refused { description, .. }) => description,
        other => panic!("{command} {arguments}: {other:?}"),
    }
}

fn image(dir: &Path, name: &str) -> PathBuf {
    let path = dir.join(name);
    fs::File::create(&path).unwrap().set_len(IMAGE).unwrap();
    path
}

/// A bare guest with one disk, which has read and written it and halts.
fn bare(more: &[String]) -> (VmBuilder, tempfile::TempDir) {
    require_kvm();
    require_root();
    let dir = tempfile::tempdir().unwrap();
    fs::create_dir(dir.path().join("images")).unwrap();
    let disk = image(dir.path(), "cold.img");
    let builder = Vm::builder()
        .args(["-machine", "microvm", "-m", "128"])
        .kernel(&Payload::BlkRw.path(), "end=halt")
        .disk("d0", &disk, "")
        .args(more)
        .arg("-hotplug")
        .arg(format!("images={}", dir.path().join("images").display()))
        .with_qmp();
    (builder, dir)
}

fn add_disk(qmp: &mut Qmp, node: &str, path: &Path, more: Value) {
    let mut arguments = json!({
        "node-name": node,
        "driver": "raw",
        "file": { "driver": "file", "filename": path },
        "cache": { "direct": false },
    });
    if let (Some(all), Some(more)) = (arguments.as_object_mut(), more.as_object()) {
        all.extend(more.clone());
    }
    run(qmp, "blockdev-add", arguments);
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
    let mut vm = builder.start().unwrap();
    let mut qmp = vm.qmp().unwrap();
    expect(&mut vm, "BLK-RW OK");
    add_disk(&mut qmp, "node", &second, json!({ "read-only": true }));
    run(
        &mut qmp,
        "device_add",
        json!({ "id": "hot", "driver": "virtio-blk-device", "drive": "node" }),
    );
    // As StratoVirt's clients write it.
    run(
        &mut qmp,
        "netdev_add",
        json!({ "id": "net-0", "ifname": "sv-plug" }),
    );
    run(
        &mut qmp,
        "device_add",
        json!({ "id": "net-0", "driver": "virtio-net-mmio", "addr": "0x0" }),
    );
    run(
        &mut qmp,
        "fsdev-add",
        json!({ "id": "share", "path": shared.path() }),
    );
    run(
        &mut qmp,
        "device_add",
        json!({ "id": "share", "driver": "virtio-fs-device" }),
    );
    let block = Device {
        id: "d0",
        binary: "block",
        back_end: BackEnd::Image {
            path: "/cold.img",
            writes: true,
            size: IMAGE,
        },
        queues: 1,
        started: 1,
    };
    let setting = Setting {
        devices: vec![
            block,
            Device {
                id: "hot",
                binary: "block",
                back_end: BackEnd::Image {
                    path: "/second.img",
                    writes: false,
                    size: IMAGE,
                },
                queues: 1,
                started: 0,
            },
            Device {
                id: "net-0",
                binary: "net",
                back_end: BackEnd::Tap,
                queues: 3,
                started: 0,
            },
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
        run(
            &mut qmp,
            "device_add",
            json!({ "id": id, "driver": "virtio-blk-mmio", "drive": id, "addr": "1", "romfile": "" }),
        );
        assert_eq!(vm.processes().unwrap().len(), alone.len() + 1);
        run(&mut qmp, "device_del", json!({ "id": id }));
        let deleted = qmp.wait_event("DEVICE_DELETED", LIMIT).unwrap();
        assert_eq!(deleted["data"]["device"], id.as_str());
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

#[test]
fn what_cannot_be_added_leaves_nothing_behind() {
    let (builder, dir) = bare(&[]);
    let images = dir.path().join("images");
    let second = image(&images, "second.img");
    let mut vm = builder.start().unwrap();
    let mut qmp = vm.qmp().unwrap();
    expect(&mut vm, "BLK-RW OK");
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
    run(
        &mut qmp,
        "device_add",
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

/// As libvirt adds a disk: the file first, then the format over it, each with a name of its own, and the device last.
#[test]
fn a_format_is_put_over_a_node_and_taken_off_again() {
    let (builder, dir) = bare(&[]);
    let image = image(&dir.path().join("images"), "second.img");
    let mut vm = builder.start().unwrap();
    let mut qmp = vm.qmp().unwrap();
    expect(&mut vm, "BLK-RW OK");
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
    run(&mut qmp, "device_add", device("format"));
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

    run(&mut qmp, "device_del", json!({ "id": "hot" }));
    qmp.wait_event("DEVICE_DELETED", LIMIT).unwrap();
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

fn open(path: &Path, write: bool) -> fs::File {
    fs::File::options()
        .read(true)
        .write(write)
        .open(path)
        .unwrap()
}

#[track_caller]
fn process_of(qmp: &mut Qmp, device: &str) -> Pid {
    let all = qmp.execute("query-workloads", json!({})).unwrap();
    let pid = all
        .as_array()
        .unwrap()
        .iter()
        .find(|one| one["module"] == device)
        .and_then(|one| one["pid"].as_i64());
    Pid::from_raw(i32::try_from(pid.unwrap()).unwrap())
}

/// A client that wants nothing granted opens everything itself.
#[test]
fn descriptors_that_a_client_passes_become_devices() {
    let tap = Tap::new("sv-given", "10.7.42.1/24").unwrap();
    let (builder, dir) = bare(&[]);
    let outside = image(dir.path(), "outside.img");
    let mut vm = builder.start().unwrap();
    let mut qmp = vm.qmp().unwrap();
    expect(&mut vm, "BLK-RW OK");
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
    run(
        &mut qmp,
        "device_add",
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
    run(
        &mut qmp,
        "device_add",
        json!({ "id": "card", "driver": "virtio-net-device", "netdev": "net" }),
    );

    let setting = Setting {
        devices: vec![
            Device {
                id: "d0",
                binary: "block",
                back_end: BackEnd::Image {
                    path: "/cold.img",
                    writes: true,
                    size: IMAGE,
                },
                queues: 1,
                started: 1,
            },
            Device {
                id: "hot",
                binary: "block",
                back_end: BackEnd::Image {
                    path: "/outside.img",
                    writes: true,
                    size: IMAGE,
                },
                queues: 1,
                started: 0,
            },
            Device {
                id: "card",
                binary: "net",
                back_end: BackEnd::Tap,
                queues: 3,
                started: 0,
            },
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
        run(&mut qmp, "device_del", json!({ "id": device }));
        qmp.wait_event("DEVICE_DELETED", LIMIT).unwrap();
    }
    run(&mut qmp, "blockdev-del", json!({ "node-name": "node" }));
    run(&mut qmp, "netdev_del", json!({ "id": "net" }));
    assert_eq!(held(broker), before.0, "the broker's descriptors");
    // Nobody has the queue any more.
    tap.queue().unwrap();
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
        run(
            &mut qmp,
            "device_add",
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
        run(
            &mut qmp,
            "device_add",
            json!({ "id": "card", "driver": "virtio-net-device", "netdev": "net", "addr": "0x0" }),
        );
        run(
            &mut qmp,
            "fsdev-add",
            json!({ "id": "fs", "path": at("folder") }),
        );
        run(
            &mut qmp,
            "device_add",
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
            run(&mut qmp, "device_del", json!({ "id": id }));
            let deleted = qmp.wait_event("DEVICE_DELETED", LIMIT).unwrap();
            assert_eq!(deleted["data"]["device"], id);
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
    let loaded: usize = vm
        .console
        .rest_of_line(LIMIT)
        .unwrap()
        .trim()
        .parse()
        .unwrap();
    assert!(loaded > 0, "the load did nothing");
    expect(&mut vm, "GUEST-END status=0");
    let status = vm.wait(LIMIT).unwrap_or_else(|e| panic!("{e}"));
    assert_eq!(status.code(), Some(0), "{}", vm.messages());
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

/// What the guest does with a folder that comes and goes. `poll` waits, as a guest without udev has to.
const FOLDER_SCRIPT: &str = r#"
set -e
poll() { until eval "$1"; do usleep 20000; done; }
mkdir -p /f
i=0
echo READY
while read what && [ "$what" = go ]; do
  poll 'mount -t virtiofs share /f 2>/dev/null'
  (
    n=0
    while [ ! -e /stop ]; do
      dd if=/dev/urandom of=/tmp-load bs=16k count=8 2>/dev/null
      cp /tmp-load /f/load; sync; echo 3 > /proc/sys/vm/drop_caches
      cmp /tmp-load /f/load || { echo LOAD-WRONG; exit 1; }
      n=$((n+1)); echo $n > /rounds
    done
  ) &
  load=$!
  poll '[ -s /rounds ]'
  dd if=/dev/urandom of=/f/round-$i bs=64k count=16 conv=fsync 2>/dev/null
  echo 3 > /proc/sys/vm/drop_caches
  echo FOLDER $(cat /f/name) $(md5sum < /f/round-$i | cut -d' ' -f1)
  read what
  touch /stop; wait $load; rm /stop
  umount /f
  echo LOADED $(cat /rounds)
  rm /rounds
  read what
  i=$((i+1))
done
dmesg | grep -i -E 'error|warn|BUG|stall|fail' | grep -v -i -E 'correctable|EBUSY|RAS:' || true
echo SCRIPT-END
"#;

/// A folder of a daemon that was there before: by a chardev that is added and removed, and by one of the command line that no
/// device of it uses, each of them more than once and with another daemon each time.
#[test]
fn a_stock_kernel_uses_folders_of_daemons_that_come_and_go() {
    where_linux_boots(test_path!(), || {
        let guest = Guest::ready(Flavour::Cloud).unwrap();
        let dir = tempfile::tempdir().unwrap();
        let at = |name: &str| dir.path().join(name);
        fs::create_dir(at("sockets")).unwrap();
        let initrd = guest.initrd_with(&Script::new(FOLDER_SCRIPT)).unwrap();
        let mut vm = Vm::builder()
            .args(["-machine", "microvm", "-m", "256"])
            .kernel(&guest.kernel.elf, "console=ttyS0 quiet panic=-1 reboot=k")
            .arg("-initrd")
            .arg(initrd.path())
            .arg("-chardev")
            .arg(format!(
                "socket,id=cold,path={},server,nowait",
                at("cold").display()
            ))
            .arg("-hotplug")
            .arg(format!("sockets={}", at("sockets").display()))
            .with_qmp()
            .start()
            .unwrap();
        let mut qmp = vm.qmp().unwrap();
        expect(&mut vm, "READY");
        let mut sums = Vec::new();
        for round in 0..4 {
            let tree = at(&format!("tree-{round}"));
            fs::create_dir(&tree).unwrap();
            fs::write(tree.join("name"), format!("tree-{round}")).unwrap();
            let cold = round % 2 == 0;
            let (chardev, socket) = if cold {
                ("cold", at("cold"))
            } else {
                ("hot", at("sockets/hot"))
            };
            let device = json!({
                "id": "folder", "driver": "vhost-user-fs-device", "chardev": chardev, "tag": "share", "addr": "0x0",
            });
            if cold {
                // Nobody listens yet, or any more.
                let why = refused(&mut qmp, "device_add", device.clone());
                assert!(why.contains("-chardev id=cold"), "{why}");
            }
            let program = tests::vm::binary("vhost_user_fs").unwrap();
            let mut daemon = Daemon::sharing(&program, &tree, &socket, &[]).unwrap();
            if !cold {
                let address = json!({ "type": "unix", "data": { "path": socket } });
                let backend =
                    json!({ "type": "socket", "data": { "addr": address, "server": false } });
                qmp.execute("chardev-add", json!({ "id": "hot", "backend": backend }))
                    .unwrap();
            }
            run(&mut qmp, "device_add", device.clone());
            let why = refused(&mut qmp, "chardev-remove", json!({ "id": chardev }));
            assert!(why.contains(&format!("'{chardev}'")), "{why}");
            vm.console.send("go\n").unwrap();
            expect(&mut vm, &format!("FOLDER tree-{round} "));
            let sum = vm.console.rest_of_line(LIMIT).unwrap();
            sums.push((tree.join(format!("round-{round}")), sum.trim().to_owned()));
            vm.console.send("unmount\n").unwrap();
            expect(&mut vm, "LOADED ");
            let loaded: u32 = vm
                .console
                .rest_of_line(LIMIT)
                .unwrap()
                .trim()
                .parse()
                .unwrap();
            assert!(loaded > 0, "the load did nothing");
            run(&mut qmp, "device_del", json!({ "id": "folder" }));
            let deleted = qmp.wait_event("DEVICE_DELETED", LIMIT).unwrap();
            assert_eq!(deleted["data"]["device"], "folder");
            // Nobody has its socket any more.
            daemon.wait(LIMIT).unwrap();
            if !cold {
                run(&mut qmp, "chardev-remove", json!({ "id": "hot" }));
            }
            vm.console.send("gone\n").unwrap();
        }
        let known = qmp.execute("query-chardev", json!({})).unwrap();
        let cold = known.as_array().unwrap().iter();
        let cold: Vec<_> = cold.filter(|one| one["label"] == "cold").collect();
        assert_eq!(cold.len(), 1, "{known}");
        assert_eq!(cold[0]["frontend-open"], false, "{known}");
        vm.console.send("stop\n").unwrap();
        expect(&mut vm, "GUEST-END status=0");
        let status = vm.wait(LIMIT).unwrap_or_else(|e| panic!("{e}"));
        assert_eq!(status.code(), Some(0), "{}", vm.messages());
        for (file, sum) in sums {
            assert_eq!(md5(&fs::read(&file).unwrap()), sum, "{}", file.display());
        }
    });
}

fn md5(bytes: &[u8]) -> String {
    use std::io::Write;
    use std::process::{Command, Stdio};
    let mut child = Command::new("md5sum")
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    child.stdin.take().unwrap().write_all(bytes).unwrap();
    let output = child.wait_with_output().unwrap();
    String::from_utf8(output.stdout).unwrap()[..32].to_owned()
}
