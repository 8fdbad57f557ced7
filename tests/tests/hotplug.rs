//! # Devices that come and go while the guest runs
//!
//! **Job.** Disks, cards and folders are added to a running VM, used by a stock kernel without any agent, and taken out again;
//! each is jailed as one that was there from the start, and whatever cannot be added leaves nothing behind.
//! **Who is not trusted.** The VMM; and the guest, whose files are read on the host side.
//! **Why this way.** The guest says what it sees and waits for a line between the steps, so nothing depends on time.
#![allow(clippy::unwrap_used)] // in a test, a panic is the report
#![allow(clippy::needless_pass_by_value)] // json!() at each call

#[path = "hotplug/disks.rs"]
mod disks;
#[path = "hotplug/folders.rs"]
mod folders;
#[path = "hotplug/jails.rs"]
mod jails;
#[path = "hotplug/refusals.rs"]
mod refusals;
#[path = "hotplug/stand_in.rs"]
mod stand_in;
#[path = "hotplug/stock_kernel.rs"]
mod stock_kernel;

use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use nix::unistd::Pid;
use serde_json::{Value, json};
use tests::host::{require_kvm, require_root};
use tests::payload::Payload;
use tests::qmp::{Qmp, QmpError};
use tests::vm::{Vm, VmBuilder, expect};

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

/// The VM once its guest halts.
fn started(builder: VmBuilder) -> (Vm, Qmp) {
    let mut vm = builder.start().unwrap();
    let qmp = vm.qmp().unwrap();
    expect(&mut vm, "BLK-RW OK");
    (vm, qmp)
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

#[track_caller]
fn plug(qmp: &mut Qmp, device: Value) {
    run(qmp, "device_add", device);
}

/// The device is gone when this returns.
#[track_caller]
fn unplug(qmp: &mut Qmp, device: &str) {
    run(qmp, "device_del", json!({ "id": device }));
    let deleted = qmp.wait_event("DEVICE_DELETED", LIMIT).unwrap();
    assert_eq!(deleted["data"]["device"], device);
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

/// A guest with a script tells next how often its load went round.
#[track_caller]
fn load_worked(vm: &mut Vm) {
    let rounds = vm.console.rest_of_line(LIMIT).unwrap();
    let rounds: u32 = rounds.trim().parse().unwrap();
    assert!(rounds > 0, "the load did nothing");
}

#[track_caller]
fn ends_well(vm: &mut Vm) {
    expect(vm, "GUEST-END status=0");
    let status = vm.wait(LIMIT).unwrap_or_else(|e| panic!("{e}"));
    assert_eq!(status.code(), Some(0), "{}", vm.messages());
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
