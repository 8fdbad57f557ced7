//! # qcow2 images under a guest
//!
//! **Job.** What a bare guest wrote is there when `qemu-img` looks, in images of several kinds and chains; a killed process
//! leaves no damage and loses nothing that the guest was told of; images that somebody broke on purpose never hang a VM.
//! **Who is not trusted.** The VMM; the images.
//! **Why this way.** `qemu-img` knows the format from elsewhere; the same guest on a raw image is what the result is compared with.
#![allow(clippy::unwrap_used)] // in a test, a panic is the report

use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use nix::errno::Errno;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::{Value, json};
use tests::chance::Chance;
use tests::host::{require_kvm, require_root};
use tests::jail::check::check;
use tests::jail::expect::{BackEnd, Device, Setting};
use tests::payload::Payload;
use tests::qcow2::{
    KINDS, SPAN, busy, content, converted, create, disturb, drive, opened, pattern, qemu_img, well,
    written,
};
use tests::qmp::{Qmp, QmpError};
use tests::vm::{Vm, VmBuilder};

const LIMIT: Duration = Duration::from_secs(60);

/// Times that a process is killed.
const KILLS: usize = 40;

/// Times that one takes the place of another.
const UPGRADES: usize = 20;

/// A raw file, 4 MiB of zeroes.
fn zeroes(dir: &Path) -> PathBuf {
    let path = dir.join("zeroes");
    let file = std::fs::File::create(&path).unwrap();
    file.set_len(4 << 20).unwrap();
    path
}

fn vm(payload: Payload, append: &str, drives: &[String]) -> VmBuilder {
    require_kvm();
    require_root();
    let mut builder = Vm::builder()
        .args(["-machine", "microvm", "-m", "128"])
        .kernel(&payload.path(), append);
    for drive in drives {
        builder = builder.arg("-drive").arg(drive);
    }
    builder.args(["-device", "virtio-blk-device,drive=d,id=disk"])
}

/// Waits for a guest that writes and reads what it wrote, and for the end of its VM.
#[track_caller]
fn finds_what_it_wrote(vm: &mut Vm) {
    vm.wait_for("BLK-RW OK", LIMIT)
        .unwrap_or_else(|e| panic!("{e}"));
    let status = vm.wait(LIMIT).unwrap_or_else(|e| panic!("{e}"));
    assert_eq!(status.code(), Some(0), "{}", vm.messages());
}

/// The bare guest writes to some sectors of drive `d` and finds them again.
#[track_caller]
fn write(drives: &[String]) {
    write_as("sector=100 count=40", drives);
}

#[track_caller]
fn write_as(words: &str, drives: &[String]) {
    let mut vm = vm(Payload::BlkRw, words, drives).start().unwrap();
    finds_what_it_wrote(&mut vm);
}

#[test]
fn what_a_guest_wrote_is_what_qemu_finds() {
    let dir = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    let zeroes = zeroes(dir.path());
    write(&[drive("d", &zeroes, ",direct=off")]);
    for (name, options, more) in [
        ("plain", &[][..], ",direct=off"),
        ("direct", &[], ""),
        ("small", &["-o", "cluster_size=512"], ",direct=off"),
        ("large", &["-o", "cluster_size=256k"], ",direct=off"),
        ("old", &["-o", "compat=0.10"], ",direct=off"),
        ("lazy", &["-o", "lazy_refcounts=on"], ",direct=off"),
        ("full", &["-o", "preallocation=full"], ",direct=off"),
        ("narrow", &["-o", "refcount_bits=1"], ",direct=off"),
    ] {
        let image = create(dir.path(), name, options);
        write(&[drive("d", &image, &format!(",format=qcow2{more}"))]);
        well(&["check", "-q", "-f", "qcow2"], &[&image]);
        well(
            &["compare", "-q", "-F", "qcow2", "-f", "raw"],
            &[&zeroes, &image],
        );
    }
}

/// Version 2 has no clusters of zeroes, so what is found to be zeroes is written all the same.
#[test]
fn zeroes_that_a_guest_writes_are_zeroes_in_each_version() {
    const WORK: [&str; 2] = ["sector=101 count=39", "sector=121 count=39 zero=1"];
    let dir = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    let twin = zeroes(dir.path());
    for words in WORK {
        write_as(words, &[drive("d", &twin, ",direct=off")]);
    }
    for (name, version) in [("old", "compat=0.10"), ("new", "compat=1.1")] {
        for detect in ["on", "unmap,discard=unmap"] {
            let image = create(dir.path(), name, &["-o", version]);
            let more = format!(",format=qcow2,direct=off,detect-zeroes={detect}");
            for words in WORK {
                write_as(words, &[drive("d", &image, &more)]);
            }
            well(&["check", "-q", "-f", "qcow2"], &[&image]);
            well(
                &["compare", "-q", "-F", "qcow2", "-f", "raw"],
                &[&twin, &image],
            );
            std::fs::remove_file(image).unwrap();
        }
    }
}

#[test]
fn images_below_are_read_and_never_written() {
    let dir = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    let base = pattern(dir.path(), "base");
    let copy = pattern(dir.path(), "copy");
    write(&[drive("d", &copy, ",direct=off")]);
    // Compressed clusters over nothing, and a chain of three over the raw base.
    let packed = converted(&base, "packed", &["-c"]);
    let middle = create(dir.path(), "middle", &["-b", "base", "-F", "raw"]);
    let top = create(dir.path(), "top", &["-b", "middle", "-F", "qcow2"]);
    let before = [&base, &middle].map(|path| std::fs::read(path).unwrap());
    let below = ",readonly=on,direct=off";
    write(&[
        drive("b", &base, below),
        drive("m", &middle, &format!("{below},format=qcow2,backing=b")),
        drive("d", &top, ",format=qcow2,direct=off,backing=m"),
    ]);
    write(&[drive("d", &packed, ",format=qcow2,direct=off")]);
    assert!(before == [&base, &middle].map(|path| std::fs::read(path).unwrap()));
    for image in [&top, &packed] {
        well(&["check", "-q", "-f", "qcow2"], &[image]);
        well(
            &["compare", "-q", "-f", "raw", "-F", "qcow2"],
            &[&copy, image],
        );
    }
}

/// Base, image in the middle and top of a chain, and a raw copy of the base.
fn chain(dir: &Path) -> [PathBuf; 4] {
    let base = pattern(dir, "base");
    let copy = pattern(dir, "copy");
    let middle = create(dir, "middle", &["-b", "base", "-F", "raw"]);
    let top = create(dir, "top", &["-b", "middle", "-F", "qcow2"]);
    [base, middle, top, copy]
}

/// What the guest wrote is in the top and nowhere else, and the same as on `copy`.
#[track_caller]
fn is_written_on_top(chain: &[PathBuf; 4], before: &[Vec<u8>]) {
    let [base, middle, top, copy] = chain;
    let now = [base, middle].map(|path| std::fs::read(path).unwrap());
    assert!(before == now, "an image below was written");
    write(&[drive("d", copy, ",direct=off")]);
    well(&["check", "-q", "-f", "qcow2"], &[top]);
    well(&["compare", "-q", "-f", "raw", "-F", "qcow2"], &[copy, top]);
}

#[test]
fn a_chain_may_be_made_of_nodes() {
    let dir = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    let images = chain(dir.path());
    let [base, middle, top, _] = images.each_ref().map(|path| path.display());
    let before = [&images[0], &images[1]].map(|path| std::fs::read(path).unwrap());
    require_kvm();
    require_root();
    let mut vm = Vm::builder()
        .args(["-machine", "microvm", "-m", "128"])
        .kernel(&Payload::BlkRw.path(), "sector=100 count=40")
        .args([
            "-blockdev",
            &format!("file,node-name=b,filename={base},read-only=on"),
            "-blockdev",
            &format!("file,node-name=s,filename={middle}"),
            "-blockdev",
            "qcow2,node-name=m,file=s,backing=b,read-only=on",
            "-blockdev",
            &format!(
                r#"{{"driver":"qcow2","node-name":"d","file":{{"driver":"file","filename":"{top}"}},"backing":"m"}}"#
            ),
            "-device",
            "virtio-blk-device,drive=d,id=disk",
        ])
        .start()
        .unwrap();
    finds_what_it_wrote(&mut vm);
    is_written_on_top(&images, &before);
}

/// Runs a command whose result is empty.
#[track_caller]
fn run(qmp: &mut Qmp, command: &str, arguments: &Value) {
    let returned = qmp.execute(command, arguments.clone());
    let returned = returned.unwrap_or_else(|e| panic!("{command} {arguments}: {e}"));
    assert_eq!(returned, json!({}), "{command} {arguments}");
}

#[track_caller]
fn refused(qmp: &mut Qmp, command: &str, arguments: &Value) -> String {
    match qmp.execute(command, arguments.clone()) {
        Err(QmpError::Refused { description, .. }) => description,
        other => panic!("{command} {arguments}: {other:?}"),
    }
}

/// As libvirt does it: a node for each file and one for what it holds, from below. The guest does not run before all is there.
#[test]
fn a_chain_is_added_and_taken_out_while_the_vm_is_there() {
    let dir = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    let images = chain(dir.path());
    let [base, middle, top, _] = &images;
    let before = [base, middle].map(|path| std::fs::read(path).unwrap());
    require_kvm();
    require_root();
    let mut vm = Vm::builder()
        .args(["-machine", "microvm", "-m", "128", "-S", "-hotplug"])
        .arg(format!("images={}", dir.path().display()))
        .kernel(&Payload::BlkRw.path(), "sector=100 count=40 end=halt")
        .with_qmp()
        .start()
        .unwrap();
    let mut qmp = vm.qmp().unwrap();
    let processes = vm.processes().unwrap();
    let storage = |name: &str, file: &Path| json!({ "driver": "file", "node-name": name, "filename": file, "auto-read-only": true, "cache": { "direct": false } });
    let format = |name: &str, file: &str, below: Value| json!({ "driver": "qcow2", "node-name": name, "file": file, "read-only": name != "top", "backing": below });
    let base_node =
        json!({ "driver": "raw", "node-name": "base", "read-only": true, "file": "base-file" });
    let disk = |node: &str| json!({ "driver": "virtio-blk-device", "id": "disk", "drive": node });
    run(&mut qmp, "blockdev-add", &storage("base-file", base));
    run(&mut qmp, "blockdev-add", &storage("middle-file", middle));
    // Not before it is read-only, and not without what it needs.
    for (below, words) in [
        ("base-file", "'base-file' is not read-only"),
        ("middle-file", "in use by block node 'middle'"),
        ("none", "node-name='none'"),
    ] {
        let said = refused(
            &mut qmp,
            "blockdev-add",
            &format("middle", "middle-file", json!(below)),
        );
        assert!(said.contains(words), "{said}");
    }
    run(
        &mut qmp,
        "blockdev-add",
        &format("middle", "middle-file", Value::Null),
    );
    let said = refused(&mut qmp, "device_add", &disk("middle"));
    assert!(said.contains("has an image below it"), "{said}");
    run(&mut qmp, "blockdev-del", &json!({ "node-name": "middle" }));
    run(&mut qmp, "blockdev-add", &base_node);
    run(
        &mut qmp,
        "blockdev-add",
        &format("middle", "middle-file", json!("base")),
    );
    let over = json!({ "driver": "raw", "node-name": "more", "file": "base" });
    for (command, arguments) in [
        ("blockdev-del", json!({ "node-name": "base" })),
        ("device_add", disk("base")),
        ("blockdev-add", over),
    ] {
        let said = refused(&mut qmp, command, &arguments);
        assert_eq!(said, "Block node 'base' is in use by block node 'middle'");
    }
    // In one step, and with another node beside it that stands on the same images.
    let whole = |name: &str, file: &Path, readonly: bool| {
        json!({
            "driver": "qcow2", "node-name": name, "read-only": readonly, "backing": "middle",
            "file": { "driver": "file", "filename": file }, "cache": { "direct": false },
        })
    };
    let beside = create(dir.path(), "beside", &["-b", "middle", "-F", "qcow2"]);
    run(&mut qmp, "blockdev-add", &whole("beside", &beside, true));
    run(&mut qmp, "blockdev-add", &whole("top", top, false));
    run(&mut qmp, "device_add", &disk("top"));
    let blocks = qmp.execute("query-block", json!({})).unwrap();
    let inserted = &blocks[0]["inserted"];
    assert_eq!(
        (&inserted["drv"], &inserted["backing_file_depth"]),
        (&json!("qcow2"), &json!(2))
    );
    run(&mut qmp, "cont", &json!({}));
    vm.wait_for("BLK-RW OK", LIMIT)
        .unwrap_or_else(|e| panic!("{e}"));
    let setting = Setting {
        devices: vec![Device {
            id: "disk",
            binary: "block-qcow2",
            back_end: BackEnd::Chain {
                path: "/top",
                below: vec!["/middle", "/base"],
            },
            queues: 1,
            started: 1,
        }],
        ram: 128 << 20,
        vcpus: 1,
        clients: 1,
        held: ["/base", "/middle", "/top", "/beside"]
            .iter()
            .map(|name| format!("{}{name}", dir.path().display()))
            .chain([dir.path().display().to_string()])
            .collect(),
        given: Vec::new(),
    };
    let sandbox = qmp.execute("query-sandbox", json!({})).unwrap();
    let findings = check(&mut vm, &setting, &sandbox).unwrap();
    assert!(findings.is_empty(), "{findings:?}");
    // The same images for the one that follows.
    let first = vm.process("block-qcow2").unwrap().unwrap();
    kill(Pid::from_raw(first), Signal::SIGKILL).unwrap();
    qmp.wait_event("DEVICE_RECOVERED", LIMIT).unwrap();
    for node in ["top", "middle"] {
        let said = refused(&mut qmp, "blockdev-del", &json!({ "node-name": node }));
        assert!(said.contains("in use by"), "{said}");
    }
    run(&mut qmp, "device_del", &json!({ "id": "disk" }));
    qmp.wait_event("DEVICE_DELETED", LIMIT).unwrap();
    for node in [
        "top",
        "beside",
        "middle",
        "base",
        "middle-file",
        "base-file",
    ] {
        run(&mut qmp, "blockdev-del", &json!({ "node-name": node }));
    }
    let nodes = qmp.execute("query-named-block-nodes", json!({})).unwrap();
    assert_eq!(nodes, json!([]));
    assert_eq!(vm.processes().unwrap(), processes);
    vm.kill().unwrap();
    is_written_on_top(&images, &before);
}

/// The rest of such a cluster is zeroed by the file system, in the way that this one knows.
#[test]
fn parts_of_clusters_that_are_zero_are_written_on_any_file_system() {
    for place in [env!("CARGO_TARGET_TMPDIR"), "/dev/shm"] {
        let dir = tempfile::tempdir_in(place).unwrap();
        let image = create(dir.path(), "image", &[]);
        let zeroed = Command::new("qemu-io")
            .args(["-f", "qcow2", "-c", "write -z 0 4M"])
            .arg(&image)
            .output()
            .unwrap();
        assert!(zeroed.status.success(), "{zeroed:?}");
        let raw = zeroes(dir.path());
        write(&[drive("d", &raw, ",direct=off")]);
        write(&[drive("d", &image, ",format=qcow2,direct=off")]);
        well(&["check", "-q", "-f", "qcow2"], &[&image]);
        well(
            &["compare", "-q", "-f", "qcow2", "-F", "raw"],
            &[&image, &raw],
        );
    }
}

/// Kills the whole VM: nothing is left that could write anything. Then all that the guest was told of is there, and the image has no
/// damage.
#[track_caller]
fn nothing_is_lost(mut vm: Vm, image: &Path, at_least: u64) {
    vm.wait_for("LOOP ", LIMIT)
        .unwrap_or_else(|e| panic!("{e}"));
    let told = vm.console.rest_of_line(LIMIT).unwrap();
    vm.kill().unwrap();
    assert!(vm.survivors(tests::wait::Deadline::after(LIMIT)).is_empty());
    // Each line is printed when all bursts before it are done, and the last one may be cut.
    let rest = vm.console.wait_end(LIMIT).unwrap();
    let mut lines = rest.rsplit('\n').skip(1);
    let last = lines.find_map(|line| line.trim_end().strip_prefix("LOOP "));
    let bursts: u64 = last.unwrap_or(&told).parse().unwrap();
    println!("{bursts} bursts");
    // 3: clusters that nobody uses, which a kill may leave; 2 would be damage.
    let checked = qemu_img(&["check", "-f", "qcow2"], &[image]);
    assert!(matches!(checked.status.code(), Some(0 | 3)), "{checked:?}");
    let raw = image.with_extension("raw");
    well(&["convert", "-f", "qcow2", "-O", "raw"], &[image, &raw]);
    let raw = std::fs::read(raw).unwrap();
    assert!(bursts >= at_least && bursts * 4 <= SPAN, "{bursts}");
    for (burst, place) in (0..bursts).flat_map(|burst| [(burst, 0), (burst, 1)]) {
        let at = usize::try_from(16 + (burst * 2 + place) * 2).unwrap() * 512;
        assert_eq!(raw[at..at + 1024], written(burst, place), "burst {burst}");
    }
}

#[test]
fn a_killed_process_loses_nothing_and_leaves_an_image_without_damage() {
    let dir = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    let (mut vm, mut qmp, image) = busy(dir.path());
    let mut next = vm.process("block-qcow2").unwrap().unwrap();
    for _ in 0..KILLS {
        // It is in the middle of its work: the guest never pauses.
        vm.wait_for("LOOP ", LIMIT)
            .unwrap_or_else(|e| panic!("{e}"));
        kill(Pid::from_raw(next), Signal::SIGKILL).unwrap();
        let event = qmp.wait_event("DEVICE_RECOVERED", LIMIT).unwrap();
        next = i32::try_from(event["data"]["pid"].as_i64().unwrap()).unwrap();
    }
    nothing_is_lost(vm, &image, 10 * KILLS as u64);
}

/// What a process leaves that is killed after a table is known and before its cluster is counted: the next one counts it, so that it
/// gives the cluster to nothing else.
#[test]
fn tables_that_a_killed_process_did_not_count_are_counted() {
    let dir = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    for (name, options) in [
        ("new", &[][..]),
        ("old", &["-o", "compat=0.10"]),
        ("small", &["-o", "cluster_size=512"]),
    ] {
        let image = create(dir.path(), name, options);
        let drives = [drive("d", &image, ",format=qcow2,direct=off")];
        write(&drives);
        let (file, bytes) = (
            std::fs::File::options().write(true).open(&image).unwrap(),
            std::fs::read(&image).unwrap(),
        );
        let be64 = |at: usize| u64::from_be_bytes(bytes[at..at + 8].try_into().unwrap());
        let cluster = 1 << bytes[23];
        let (l1, block) = (be64(40), be64(be64(48) as usize));
        let mut entries = (l1 as usize..).step_by(8).map(be64);
        let l2 = entries.find(|entry| *entry != 0).unwrap() & 0x00ff_ffff_ffff_fe00;
        for table in [l1, l2] {
            let count = block + 2 * (table / cluster);
            std::os::unix::fs::FileExt::write_all_at(&file, &[0; 2], count).unwrap();
        }
        let broken = qemu_img(&["check", "-q", "-f", "qcow2"], &[&image]);
        assert!(!broken.status.success(), "{name} {broken:?}");
        let mut wanted = content(&image, None);
        let mut vm = vm(Payload::BlkRw, "sector=5000 count=40", &drives)
            .start()
            .unwrap();
        finds_what_it_wrote(&mut vm);
        well(&["check", "-q", "-f", "qcow2"], &[&image]);
        let after = content(&image, None);
        let new = 5000 * 512..5160 * 512;
        wanted[new.clone()].copy_from_slice(&after[new]);
        assert!(wanted == after, "{name}: something else has changed");
    }
}

/// The new process is there while the old one makes tables, which it must not have read before.
#[test]
fn a_process_that_takes_anothers_place_knows_the_tables_that_it_made() {
    let dir = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    let (mut vm, mut qmp, image) = busy(dir.path());
    for _ in 0..UPGRADES {
        vm.wait_for("LOOP ", LIMIT)
            .unwrap_or_else(|e| panic!("{e}"));
        let upgraded = qmp.execute("device-upgrade", json!({ "id": "disk" }));
        assert!(upgraded.is_ok(), "{upgraded:?}: {}", vm.messages());
        qmp.wait_event("DEVICE_UPGRADED", LIMIT).unwrap();
    }
    nothing_is_lost(vm, &image, UPGRADES as u64);
}

/// Bytes of the disk in an image that a VM has open.
#[track_caller]
fn virtual_size(image: &Path) -> u64 {
    let output = qemu_img(&["info", "-U", "--output=json", "-f", "qcow2"], &[image]);
    assert!(output.status.success(), "{output:?}");
    let info: Value = serde_json::from_slice(&output.stdout).unwrap();
    info["virtual-size"].as_u64().unwrap()
}

const MIB: u64 = 1 << 20;

#[test]
fn a_disk_grows_under_a_guest_that_writes() {
    let dir = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    let (mut vm, mut qmp, image) = busy(dir.path());
    let process = vm.process("block-qcow2").unwrap();
    for size in [65 * MIB, 200 * MIB, 1024 * MIB, 1024 * MIB] {
        vm.wait_for("LOOP ", LIMIT)
            .unwrap_or_else(|e| panic!("{e}"));
        run(
            &mut qmp,
            "block_resize",
            &json!({ "device": "d", "size": size }),
        );
        assert_eq!(virtual_size(&image), size);
    }
    assert_eq!(vm.process("block-qcow2").unwrap(), process);
    for (size, words) in [
        (
            1025 * MIB,
            "allowed: 1073741824 to 1073741824 (max-size= of its -drive or -blockdev)",
        ),
        (64 * MIB, "is less than the 1073741824 bytes of the image"),
        (1024 * MIB + 1, "is no multiple of 512"),
    ] {
        let said = refused(
            &mut qmp,
            "block_resize",
            &json!({ "device": "d", "size": size }),
        );
        assert!(said.contains(words), "{said}");
    }
    // The process that follows reads the size from the image.
    kill(Pid::from_raw(process.unwrap()), Signal::SIGKILL).unwrap();
    qmp.wait_event("DEVICE_RECOVERED", LIMIT).unwrap();
    nothing_is_lost(vm, &image, 30);
    assert_eq!(virtual_size(&image), 1024 * MIB);
}

/// Grows a disk of 4 MiB to 16 before its guest runs, which then writes beyond the old end.
#[track_caller]
fn grown(drives: &[String], sector: u64) -> Result<(), String> {
    let mut vm = vm(Payload::BlkRw, &format!("sector={sector} count=40"), drives)
        .arg("-S")
        .with_qmp()
        .start()
        .unwrap();
    let mut qmp = vm.qmp().unwrap();
    let resized = qmp.execute(
        "block_resize",
        json!({ "device": "disk", "size": 16 * MIB }),
    );
    run(&mut qmp, "cont", &json!({}));
    if let Err(error) = resized {
        let status = vm.wait(LIMIT).unwrap_or_else(|e| panic!("{e}"));
        return Err(format!("{error} {status} {}", vm.messages()));
    }
    vm.wait_for("BLK capacity 32768 ", LIMIT)
        .unwrap_or_else(|e| panic!("{e}"));
    vm.wait_for("BLK-RW OK", LIMIT)
        .unwrap_or_else(|e| panic!("{e}"));
    vm.wait(LIMIT).unwrap_or_else(|e| panic!("{e}"));
    Ok(())
}

#[test]
fn a_disk_that_grows_shows_nothing_of_what_is_below_its_old_end() {
    let dir = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    let base = dir.path().join("base");
    std::fs::write(&base, vec![0x5a; 9 * MIB as usize]).unwrap();
    let under = drive("b", &base, ",readonly=on,direct=off");
    let over = ["-b", "base", "-F", "raw"];
    for (name, options, sector) in [
        ("plain", &[][..], 20_000),
        ("small", &["-o", "cluster_size=512"], 8192),
        ("large", &["-o", "cluster_size=256k"], 9001),
    ] {
        let options: Vec<&str> = over.iter().chain(options).copied().collect();
        let image = create(dir.path(), name, &options);
        let top = drive(
            "d",
            &image,
            ",format=qcow2,direct=off,backing=b,max-size=16777216",
        );
        grown(&[under.clone(), top], sector).unwrap();
        well(&["check", "-q", "-f", "qcow2"], &[&image]);
        let raw = content(&image, None);
        assert_eq!(raw.len() as u64, 16 * MIB);
        let (written, end) = (sector * 512, (sector + 160) * 512);
        for (at, byte) in raw.iter().enumerate() {
            let at = at as u64;
            if (written..end).contains(&at) {
                continue;
            }
            let wanted = if at < 4 * MIB { 0x5a } else { 0 };
            assert_eq!(*byte, wanted, "{name}: byte {at}");
        }
    }
    // The older version has no clusters of zeroes, and one without max-size= keeps its size.
    let options: Vec<&str> = over.iter().chain(&["-o", "compat=0.10"]).copied().collect();
    let image = create(dir.path(), "old", &options);
    let top = drive(
        "d",
        &image,
        ",format=qcow2,direct=off,backing=b,max-size=16777216",
    );
    let said = grown(&[under, top], 20_000).unwrap_err();
    assert!(
        said.contains("cannot be made 16777216 bytes long"),
        "{said}"
    );
    assert_eq!(virtual_size(&image), 4 * MIB);
    well(&["check", "-q", "-f", "qcow2"], &[&image]);
    let image = create(dir.path(), "stays", &[]);
    let top = drive("d", &image, ",format=qcow2,direct=off");
    let said = grown(&[top], 20_000).unwrap_err();
    assert!(
        said.contains(
            "its -drive or -blockdev has no max-size=, so the image keeps its 4194304 bytes"
        ),
        "{said}"
    );
}

#[test]
fn internal_snapshots_keep_what_they_have() {
    let dir = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    let base = pattern(dir.path(), "base");
    let written = pattern(dir.path(), "written");
    write(&[drive("d", &written, ",direct=off")]);
    let written = std::fs::read(written).unwrap();
    let mut chance = Chance::new(0x5eed);
    for (name, options) in KINDS {
        let image = converted(&base, name, options);
        let snapshot = |what, which| well(&["snapshot", what, which], &[&image]);
        let check = || well(&["check", "-q", "-f", "qcow2"], &[&image]);
        snapshot("-c", "one");
        write(&[drive("d", &image, ",format=qcow2,direct=off")]);
        check();
        snapshot("-c", "two");
        let mut disk = written.clone();
        let mut open = opened(&image);
        // Its snapshots are of a disk of this size.
        let longer = 2 * disk.len() as u64;
        assert_eq!(open.grow(longer), Err(Errno::EOPNOTSUPP));
        disturb(&mut *open, &mut disk, &mut chance, 60);
        drop(open);
        check();
        snapshot("-c", "three");
        let third = disk.clone();
        disturb(&mut *opened(&image), &mut disk, &mut chance, 60);
        check();
        let first = std::fs::read(&base).unwrap();
        for (which, wanted) in [
            (Some("one"), &first),
            (Some("two"), &written),
            (Some("three"), &third),
            (None, &disk),
        ] {
            let same = content(&image, which) == *wanted;
            assert!(same, "{name}: {which:?}");
        }
        // Gone back to and taken away, they leave nothing that is not counted right.
        snapshot("-a", "two");
        check();
        assert!(content(&image, None) == written, "{name}");
        for which in ["one", "two", "three"] {
            snapshot("-d", which);
        }
        check();
        assert!(content(&image, None) == written, "{name}");
    }
}

/// Starts a VM with an image and returns its messages once it has ended, by itself or because its guest gave up.
#[track_caller]
fn ends(image: &Path) -> String {
    let drives = [drive("d", image, ",format=qcow2,direct=off")];
    let mut vm = vm(Payload::BlkRw, "", &drives).start().unwrap();
    vm.wait(LIMIT).unwrap_or_else(|e| panic!("{e}"));
    vm.messages()
}

#[test]
fn images_that_are_refused_say_why() {
    let dir = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    for (at, bytes, part) in [
        (0, &b"RAW!"[..], "does not begin as a qcow2 image does"),
        (4, &[0, 0, 0, 9], "qcow2 version 9"),
        (20, &[0, 0, 0, 63], "clusters of 2^63 bytes"),
        (20, &[0, 0, 0, 21], "bytes of memory"),
        (24, &[0x7f; 8], "a disk of"),
        (32, &[0, 0, 0, 1], "encrypted"),
        (36, &[0xff; 4], "bytes of memory"),
        (36, &[0; 4], "a table of 0 entries"),
        (56, &[0xff; 4], "bytes of memory"),
        (79, &[1], "not closed"),
        (79, &[4], "in another file"),
        (14, &[1], "has an image below it"),
    ] {
        let image = create(dir.path(), "image", &[]);
        let file = std::fs::File::options().write(true).open(&image).unwrap();
        file.write_all_at(bytes, at).unwrap();
        let said = ends(&image);
        assert!(said.contains(part), "{at}: {said}");
    }
}

#[test]
fn broken_tables_end_in_an_error_and_not_in_a_hang() {
    let dir = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    // Where qemu-img puts them: the table of counts, its block, the first table of mappings, and one of the second.
    let data = pattern(dir.path(), "data");
    for cluster in 1..5u64 {
        for value in [0xff, 0x80, 0x40, 0x01, 0x00, 0x7f] {
            let image = converted(&data, "image", &[]);
            let file = std::fs::File::options().write(true).open(&image).unwrap();
            let entry = [value; 8];
            for word in 0..64 {
                file.write_all_at(&entry, cluster * 65536 + word * 8)
                    .unwrap();
            }
            // A table that points at itself.
            if value == 0x40 {
                let to_itself = ((1u64 << 63) | (cluster * 65536)).to_be_bytes();
                file.write_all_at(&to_itself, cluster * 65536).unwrap();
            }
            ends(&image);
        }
    }
}
