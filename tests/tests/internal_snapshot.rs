//! # Snapshots inside of qcow2 images
//!
//! **Job.** `blockdev-snapshot-internal-sync` and its opposite: each snapshot has what the disk had at an instant, whatever is written
//! afterwards, in images of several kinds; a process that is killed at any of its writes leaves the snapshots of before or those of
//! after; what is refused says why.
//! **Who is not trusted.** The VMM, and the part of it that writes tables.
//! **Why this way.** `qemu-img` reads each snapshot and checks each count. Kills are put before each write by strace, so that every
//! state that a kill can leave is seen, not those alone that chance brings.
#![allow(clippy::unwrap_used)] // in a test, a panic is the report

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use ipc::disk::{Answer, Order};
use ipc::limits::MAX_INTERNAL_SNAPSHOTS;
use nix::errno::Errno;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::{Value, json};
use tests::chance::Chance;
use tests::host::{require_kvm, require_root};
use tests::lab::ensure_packages;
use tests::payload::Payload;
use tests::qcow2::{
    KINDS, SPAN, busy, content, converted, create, create_sized, disturb, drive, opened, pattern,
    qemu_img, well, written,
};
use tests::qmp::{Qmp, QmpError};
use tests::vm::Vm;

const LIMIT: Duration = Duration::from_secs(120);

fn make(name: &str) -> Order {
    Order::Create {
        name: name.to_owned(),
        seconds: 1_700_000_000,
        nanoseconds: 7,
        clock: 90_000_000_001,
    }
}

fn take_away(name: &str) -> Order {
    Order::Delete {
        id: None,
        name: Some(name.to_owned()),
    }
}

/// What `qemu-img` finds in an image that nobody writes: names, and ids.
#[track_caller]
fn listed(image: &Path) -> Vec<(String, String)> {
    let output = qemu_img(&["info", "-U", "--output=json", "-f", "qcow2"], &[image]);
    assert!(output.status.success(), "{output:?}");
    let info: Value = serde_json::from_slice(&output.stdout).unwrap();
    let none = Vec::new();
    let snapshots = info["snapshots"].as_array().unwrap_or(&none);
    let text = |one: &Value, what: &str| one[what].as_str().unwrap().to_owned();
    snapshots
        .iter()
        .map(|one| (text(one, "name"), text(one, "id")))
        .collect()
}

#[track_caller]
fn names(image: &Path) -> Vec<String> {
    listed(image).into_iter().map(|(name, _)| name).collect()
}

#[test]
fn what_a_snapshot_has_is_what_the_disk_had() {
    let dir = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    let base = pattern(dir.path(), "base");
    let mut chance = Chance::new(0x5a9_5407);
    for (name, options) in KINDS {
        let image = converted(&base, name, options);
        let check = || well(&["check", "-q", "-f", "qcow2"], &[&image]);
        let mut disk = std::fs::read(&base).unwrap();
        let mut had = Vec::new();
        let mut open = opened(&image);
        // Some before and some after others are gone, and with writes in between.
        for round in 0..4u32 {
            let one = format!("{name} {round} \u{e9}");
            assert_eq!(open.order(&make(&one)), Ok(Answer::Created), "{one}");
            assert_eq!(open.order(&make(&one)), Ok(Answer::Exists), "{one}");
            check();
            had.push((one, disk.clone()));
            disturb(&mut *open, &mut disk, &mut chance, 40);
            check();
            if round == 2 {
                let (gone, _) = had.remove(1);
                let answer = open.order(&take_away(&gone)).unwrap();
                assert!(
                    matches!(&answer, Answer::Deleted(one) if one.name == gone && one.id == "2" && one.seconds == 1_700_000_000),
                    "{answer:?}"
                );
                assert_eq!(open.order(&take_away(&gone)), Ok(Answer::Unknown));
                check();
                disturb(&mut *open, &mut disk, &mut chance, 40);
            }
        }
        let Ok(Answer::Image { cluster, snapshots }) = open.order(&Order::List) else {
            panic!("no list");
        };
        assert!(cluster.is_power_of_two());
        let told: Vec<(String, String)> = snapshots
            .into_iter()
            .map(|one| (one.name, one.id))
            .collect();
        assert_eq!(told, listed(&image));
        let ids: Vec<&str> = told.iter().map(|(_, id)| id.as_str()).collect();
        assert_eq!(ids, ["1", "3", "4"]);
        check();
        for (which, wanted) in &had {
            assert!(content(&image, Some(which)) == *wanted, "{which}");
        }
        assert!(content(&image, None) == disk, "{name}");
        // Without them the disk is as it was, and everything that only they had is free.
        for (which, _) in &had {
            let answer = open.order(&take_away(which)).unwrap();
            assert!(matches!(answer, Answer::Deleted(_)), "{answer:?}");
            check();
        }
        assert!(listed(&image).is_empty());
        disturb(&mut *open, &mut disk, &mut chance, 40);
        open.flush().unwrap();
        drop(open);
        check();
        assert!(content(&image, None) == disk, "{name}");
    }
}

/// Where a table of counts is full, snapshots make a longer one.
#[test]
fn an_image_whose_counts_have_no_room_gets_more_or_says_so() {
    let dir = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    // A table of one cluster counts 8 MiB.
    let image = create_sized(dir.path(), "full", &["-o", "cluster_size=512"], "32M");
    let table = || {
        let header = std::fs::read(&image).unwrap();
        u32::from_be_bytes(header[56..60].try_into().unwrap())
    };
    let mut open = opened(&image);
    let first = table();
    let mut made = 0;
    let mut disk = vec![0; 32 << 20];
    // Beginning where the file does not end far before what the table counts.
    let most = 7 << 20;
    disk[..most].fill(0x11);
    open.write(&disk[..most], 0).unwrap();
    open.commit().unwrap();
    while table() == first {
        made += 1;
        assert!(made < 200, "the table never had to grow");
        assert_eq!(open.order(&make(&format!("{made}"))), Ok(Answer::Created));
    }
    well(&["check", "-q", "-f", "qcow2"], &[&image]);
    open.write(&[0x22; 4096], 1 << 20).unwrap();
    open.commit().unwrap();
    well(&["check", "-q", "-f", "qcow2"], &[&image]);
    assert!(content(&image, Some("1")) == disk);
    // One bit has no room for a second reference: nothing is changed.
    let image = create(dir.path(), "narrow", &["-o", "refcount_bits=1"]);
    let mut open = opened(&image);
    open.write(&[0x33; 65536], 0).unwrap();
    assert_eq!(open.order(&make("one")), Err(Errno::EINVAL));
    open.write(&[0x44; 512], 65536).unwrap();
    open.commit().unwrap();
    assert!(listed(&image).is_empty());
    well(&["check", "-q", "-f", "qcow2"], &[&image]);
    // As many as there may be.
    let image = create_sized(dir.path(), "many", &["-o", "cluster_size=4k"], "64k");
    let mut open = opened(&image);
    for number in 0..MAX_INTERNAL_SNAPSHOTS {
        assert_eq!(
            open.order(&make(&format!("{number}"))),
            Ok(Answer::Created),
            "{number}"
        );
    }
    assert_eq!(open.order(&make("more")), Err(Errno::EFBIG));
    assert_eq!(names(&image).len(), MAX_INTERNAL_SNAPSHOTS);
    well(&["check", "-q", "-f", "qcow2"], &[&image]);
}

/// Tables of snapshots that somebody broke on purpose are an error, and the disk works on.
#[test]
fn broken_tables_of_snapshots_are_refused() {
    use std::os::unix::fs::FileExt;
    let dir = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    let whole = create(dir.path(), "whole", &[]);
    let mut open = opened(&whole);
    open.write(&[0x55; 65536], 0).unwrap();
    assert_eq!(open.order(&make("one")), Ok(Answer::Created));
    drop(open);
    let bytes = std::fs::read(&whole).unwrap();
    let table = u64::from_be_bytes(bytes[64..72].try_into().unwrap());
    for (at, value, wanted) in [
        // In the header: how many, and where.
        (60, &[0xff; 4][..], Errno::EFBIG),
        (64, &[0x7f; 8], Errno::EINVAL),
        // In the entry: its first table's place and length, and what follows it.
        (table, &[0x7f; 8], Errno::EFBIG),
        (table + 8, &[0xff; 4], Errno::EFBIG),
        (table + 36, &[0xff; 4], Errno::EFBIG),
    ] {
        let image = dir.path().join("image");
        std::fs::write(&image, &bytes).unwrap();
        let file = std::fs::File::options().write(true).open(&image).unwrap();
        file.write_all_at(value, at).unwrap();
        let mut open = opened(&image);
        let before = std::fs::read(&image).unwrap();
        assert_eq!(open.order(&take_away("one")), Err(wanted), "{at}");
        let after = std::fs::read(&image).unwrap();
        assert!(before == after, "{at}: something was written");
        let mut read = [0; 512];
        open.read(&mut read, 4096).unwrap();
        assert_eq!(read, [0x55; 512]);
    }
}

/// What the test below has a process of its own do, which is killed in the midst of it.
#[test]
#[ignore = "not a test: the next one starts it"]
fn one_order() {
    let variable = |name: &str| std::env::var(name).unwrap();
    let mut open = opened(&PathBuf::from(variable("IMAGE")));
    let name = variable("NAME");
    let order = match variable("ORDER").as_str() {
        "make" => make(&name),
        _ => take_away(&name),
    };
    let answer = open.order(&order).unwrap();
    assert!(
        matches!(answer, Answer::Created | Answer::Deleted(_)),
        "{answer:?}"
    );
}

#[test]
fn a_process_that_is_killed_at_any_write_leaves_the_snapshots_of_before_or_of_after() {
    ensure_packages(&["strace", "qemu-utils"]).unwrap();
    let dir = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    let whole = create_sized(dir.path(), "whole", &["-o", "cluster_size=512"], "128k");
    let mut open = opened(&whole);
    let mut disk = vec![0; 128 << 10];
    let mut chance = Chance::new(77);
    disturb(&mut *open, &mut disk, &mut chance, 20);
    let first = disk.clone();
    assert_eq!(open.order(&make("first")), Ok(Answer::Created));
    disturb(&mut *open, &mut disk, &mut chance, 20);
    drop(open);
    for (order, name, after) in [
        ("make", "second", &["first", "second"][..]),
        ("delete", "first", &[]),
    ] {
        let mut seen = Vec::new();
        for write in 1.. {
            let image = dir.path().join("image");
            std::fs::copy(&whole, &image).unwrap();
            let killed = Command::new("strace")
                .args(["-f", "-qqq", "-o", "/dev/null", "-e", "trace=pwritev"])
                .args(["-e", &format!("inject=pwritev:signal=SIGKILL:when={write}")])
                .arg(std::env::current_exe().unwrap())
                .args(["one_order", "--exact", "--ignored"])
                .envs([("ORDER", order), ("NAME", name)])
                .env("IMAGE", &image)
                .output()
                .unwrap();
            let found = names(&image);
            assert!(found == ["first"] || found == after, "{write}: {found:?}");
            // Nothing is used that is not counted: at worst there is more of it.
            let checked = qemu_img(&["check", "--output=json", "-f", "qcow2"], &[&image]);
            if killed.status.success() {
                assert!(checked.status.success(), "{checked:?}");
                assert_eq!(found, after);
            }
            // As the next process has it, and then a person.
            let mut open = opened(&image);
            let mut now = vec![0; disk.len()];
            open.read(&mut now, 0).unwrap();
            assert!(now == disk, "{order}, write {write}: the disk has changed");
            disturb(&mut *open, &mut now, &mut Chance::new(write), 10);
            drop(open);
            let _ = qemu_img(&["check", "-q", "-r", "all", "-f", "qcow2"], &[&image]);
            well(&["check", "-q", "-f", "qcow2"], &[&image]);
            assert!(content(&image, None) == now, "{order}, write {write}");
            if found.iter().any(|one| one == "first") {
                assert!(content(&image, Some("first")) == first, "write {write}");
            }
            if found.iter().any(|one| one == "second") {
                assert!(content(&image, Some("second")) == disk, "write {write}");
            }
            seen.push(found);
            if killed.status.success() {
                break;
            }
        }
        // Kills came before the one write that counts, and after it.
        println!("{order}: {} writes", seen.len());
        let changed = seen.iter().position(|found| *found == after).unwrap();
        assert!(changed > 0 && changed + 1 < seen.len(), "{changed}");
    }
}

#[track_caller]
fn refused(qmp: &mut Qmp, command: &str, arguments: &Value) -> String {
    match qmp.execute(command, arguments.clone()) {
        Err(QmpError::Refused { description, .. }) => description,
        other => panic!("{command} {arguments}: {other:?}"),
    }
}

const CREATE: &str = "blockdev-snapshot-internal-sync";
const DELETE: &str = "blockdev-snapshot-delete-internal-sync";

/// Bursts that a disk has in it, all of each but of the last.
#[track_caller]
fn bursts(disk: &[u8]) -> u64 {
    let part = |burst: u64, place: u64| {
        let at = usize::try_from(16 + (burst * 2 + place) * 2).unwrap() * 512;
        let part = &disk[at..at + 1024];
        if part == written(burst, place) {
            return true;
        }
        assert!(part.iter().all(|byte| *byte == 0), "burst {burst} {place}");
        false
    };
    let whole = (0..SPAN / 4).take_while(|burst| part(*burst, 0) && part(*burst, 1));
    let count = whole.count() as u64;
    let later = (count + 1..SPAN / 4).filter(|burst| part(*burst, 0) || part(*burst, 1));
    assert_eq!(later.count(), 0, "later than burst {count}");
    count
}

/// The guest writes without a pause, and never two bursts at once: a snapshot has all of what it had been told of, and nothing beyond the
/// burst that is under way.
#[test]
fn snapshots_are_of_an_instant_of_a_guest_that_writes() {
    let dir = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    let (mut vm, mut qmp, image) = busy(dir.path());
    let mut next = 0;
    for number in 0..6 {
        vm.wait_for("LOOP ", LIMIT)
            .unwrap_or_else(|e| panic!("{e}"));
        let told: u64 = vm.console.rest_of_line(LIMIT).unwrap().parse().unwrap();
        let name = format!("s{number}");
        let device = if number % 2 == 0 { "d" } else { "disk" };
        let answer = qmp.execute(CREATE, json!({ "device": device, "name": name }));
        assert_eq!(answer.unwrap(), json!({}));
        assert!(told >= next, "{told}");
        next = told;
    }
    let said = refused(&mut qmp, CREATE, &json!({ "device": "d", "name": "s3" }));
    assert_eq!(said, "Snapshot with name 's3' already exists on device 'd'");
    let gone = qmp.execute(DELETE, json!({ "device": "d", "name": "s2" }));
    let gone = gone.unwrap();
    assert_eq!((&gone["id"], &gone["name"]), (&json!("3"), &json!("s2")));
    let by_id = qmp.execute(DELETE, json!({ "device": "d", "id": "2" }));
    assert_eq!(by_id.unwrap()["name"], json!("s1"));
    let said = refused(
        &mut qmp,
        DELETE,
        &json!({ "device": "d", "id": "1", "name": "s2" }),
    );
    assert_eq!(
        said,
        "Snapshot with id '1' and name 's2' does not exist on device 'd'"
    );
    let said = refused(
        &mut qmp,
        "block_resize",
        &json!({ "device": "d", "size": 128 << 20 }),
    );
    assert!(
        said.contains("cannot be made 134217728 bytes long"),
        "{said}"
    );
    // A process that follows knows them.
    let process = vm.process("block-qcow2").unwrap().unwrap();
    kill(Pid::from_raw(process), Signal::SIGKILL).unwrap();
    qmp.wait_event("DEVICE_RECOVERED", LIMIT).unwrap();
    for command in ["query-block", "query-named-block-nodes"] {
        let told = qmp.execute(command, json!({})).unwrap();
        let node = if command == "query-block" {
            &told[0]["inserted"]
        } else {
            &told[0]
        };
        let shown = &node["image"];
        assert_eq!(shown["virtual-size"], json!(64 << 20), "{command} {told}");
        assert_eq!(shown["cluster-size"], json!(512));
        let shown = shown["snapshots"].as_array().unwrap();
        let shown: Vec<&str> = shown
            .iter()
            .filter_map(|one| one["name"].as_str())
            .collect();
        assert_eq!(shown, ["s0", "s3", "s4", "s5"], "{command}");
    }
    vm.wait_for("LOOP ", LIMIT)
        .unwrap_or_else(|e| panic!("{e}"));
    let last: u64 = vm.console.rest_of_line(LIMIT).unwrap().parse().unwrap();
    vm.kill().unwrap();
    assert!(vm.survivors(tests::wait::Deadline::after(LIMIT)).is_empty());
    let checked = qemu_img(&["check", "-f", "qcow2"], &[&image]);
    assert!(matches!(checked.status.code(), Some(0 | 3)), "{checked:?}");
    assert_eq!(names(&image), ["s0", "s3", "s4", "s5"]);
    let mut before = 0;
    for name in ["s0", "s3", "s4", "s5"] {
        let now = bursts(&content(&image, Some(name)));
        assert!(now >= before, "{name}");
        println!("{name}: {now} bursts");
        before = now;
    }
    let disk = bursts(&content(&image, None));
    assert!(
        before >= next && disk >= before && disk >= last,
        "{before} {next} {disk} {last}"
    );
    // And a person can go back.
    let there = content(&image, Some("s3"));
    well(&["snapshot", "-a", "s3"], &[&image]);
    assert!(content(&image, None) == there);
    let checked = qemu_img(&["check", "-f", "qcow2"], &[&image]);
    assert!(matches!(checked.status.code(), Some(0 | 3)), "{checked:?}");
}

/// A VM whose disk's process stands still, as one does whose disk does not answer, and is to make a snapshot; and a client that does not
/// wait for that.
fn at_work(dir: &Path) -> (Vm, Qmp, Qmp, Pid) {
    let (mut vm, mut waits, _) = busy(dir);
    // Its driver has nothing more to say to the process itself.
    vm.wait_for("LOOP ", LIMIT)
        .unwrap_or_else(|e| panic!("{e}"));
    let other = vm.qmp().unwrap();
    let process = Pid::from_raw(vm.process("block-qcow2").unwrap().unwrap());
    kill(process, Signal::SIGSTOP).unwrap();
    let command = json!({ "execute": CREATE, "arguments": { "device": "d", "name": "slow" } });
    waits.send_raw(&command.to_string()).unwrap();
    (vm, waits, other, process)
}

#[test]
fn a_vm_whose_disk_is_slow_with_a_snapshot_can_be_watched_stopped_and_ended() {
    let dir = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    let (mut vm, mut waits, mut other, process) = at_work(dir.path());
    let mut told = |command| other.execute(command, json!({})).unwrap();
    assert_eq!(told("query-status")["status"], json!("running"));
    assert_eq!(told("query-blockstats")[0]["device"], json!("d"));
    told("stop");
    assert_eq!(told("query-status")["status"], json!("paused"));
    // What has to do with disks comes after it, in its order.
    let mut third = vm.qmp().unwrap();
    third.send_raw(r#"{"execute": "query-block"}"#).unwrap();
    let mut fourth = vm.qmp().unwrap();
    let again = json!({ "execute": CREATE, "arguments": { "device": "d", "name": "slow" } });
    fourth.send_raw(&again.to_string()).unwrap();
    other.execute("query-status", json!({})).unwrap();
    kill(process, Signal::SIGCONT).unwrap();
    assert_eq!(waits.reply(CREATE).unwrap()["return"], json!({}));
    let told = third.reply("query-block").unwrap();
    let snapshots = &told["return"][0]["inserted"]["image"]["snapshots"];
    assert_eq!(snapshots[0]["name"], json!("slow"), "{told}");
    let said = fourth.reply(CREATE).unwrap();
    assert_eq!(
        said["error"]["desc"],
        json!("Snapshot with name 'slow' already exists on device 'd'")
    );
    other.execute("cont", json!({})).unwrap();
    vm.wait_for("LOOP ", LIMIT)
        .unwrap_or_else(|e| panic!("{e}"));
    // The process dies with the order in its hands: that is told, and the next one has the disk.
    kill(process, Signal::SIGSTOP).unwrap();
    let more = json!({ "execute": CREATE, "arguments": { "device": "d", "name": "lost" } });
    waits.send_raw(&more.to_string()).unwrap();
    other.execute("query-status", json!({})).unwrap();
    kill(process, Signal::SIGKILL).unwrap();
    let said = waits.reply(CREATE).unwrap();
    assert!(said["error"]["desc"].is_string(), "{said}");
    other.wait_event("DEVICE_RECOVERED", LIMIT).unwrap();
    let made = waits.execute(CREATE, json!({ "device": "d", "name": "next" }));
    assert_eq!(made.unwrap(), json!({}));
    // The end does not wait for a disk either.
    let process = Pid::from_raw(vm.process("block-qcow2").unwrap().unwrap());
    kill(process, Signal::SIGSTOP).unwrap();
    waits.send_raw(&more.to_string()).unwrap();
    other.execute("query-status", json!({})).unwrap();
    other.execute("quit", json!({})).unwrap();
    assert_eq!(vm.wait(Duration::from_secs(20)).unwrap().code(), Some(0));
    assert!(vm.survivors(tests::wait::Deadline::after(LIMIT)).is_empty());
}

#[test]
fn a_signal_ends_a_vm_whose_disk_is_slow_with_a_snapshot() {
    let dir = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    let (mut vm, _waits, mut other, _) = at_work(dir.path());
    other.execute("query-status", json!({})).unwrap();
    kill(Pid::from_raw(vm.pid()), Signal::SIGTERM).unwrap();
    assert_eq!(vm.wait(Duration::from_secs(20)).unwrap().code(), Some(0));
    assert!(vm.survivors(tests::wait::Deadline::after(LIMIT)).is_empty());
}

#[test]
fn what_is_refused_says_why() {
    let dir = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    let raw = pattern(dir.path(), "raw");
    let image = create(dir.path(), "image", &[]);
    let fixed = create(dir.path(), "fixed", &[]);
    require_kvm();
    require_root();
    let mut builder = Vm::builder()
        .args(["-machine", "microvm", "-m", "128", "-S"])
        .kernel(&Payload::FirstByte.path(), "");
    for (id, file, more) in [
        ("r", &raw, ",direct=off"),
        ("q", &image, ",format=qcow2"),
        ("f", &fixed, ",format=qcow2,direct=off,readonly=on"),
    ] {
        builder = builder.args(["-drive", &drive(id, file, more)]).args([
            "-device",
            &format!("virtio-blk-device,drive={id},id=disk-{id}"),
        ]);
    }
    let mut vm = builder.with_qmp().start().unwrap();
    let mut qmp = vm.qmp().unwrap();
    for (device, name, wanted) in [
        (
            "none",
            "a",
            "Cannot find device='none' nor node-name='none'",
        ),
        (
            "r",
            "a",
            "Block format 'raw' used by device 'r' does not support internal snapshots",
        ),
        ("f", "a", "Device 'f' is read only"),
        ("q", "", "Name is empty"),
        ("disk-q", &"x".repeat(256), "255"),
    ] {
        let said = refused(&mut qmp, CREATE, &json!({ "device": device, "name": name }));
        assert!(said.contains(wanted), "{said}");
    }
    let said = refused(&mut qmp, DELETE, &json!({ "device": "q" }));
    assert_eq!(said, "Name or id must be provided");
    let said = refused(&mut qmp, DELETE, &json!({ "device": "q", "name": "a" }));
    assert_eq!(
        said,
        "Snapshot with id 'null' and name 'a' does not exist on device 'q'"
    );
    // A paused guest's, with O_DIRECT, and the longest name.
    for name in ["x".repeat(255).as_str(), "a"] {
        let made = qmp.execute(CREATE, json!({ "device": "q", "name": name }));
        assert_eq!(made.unwrap(), json!({}));
    }
    assert_eq!(names(&image), ["x".repeat(255).as_str(), "a"]);
    vm.kill().unwrap();
    assert!(vm.survivors(tests::wait::Deadline::after(LIMIT)).is_empty());
    well(&["check", "-q", "-f", "qcow2"], &[&image]);
}
