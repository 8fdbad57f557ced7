//! # The jail of every process, and the checks' own proof
//!
//! **Job.** Every process of a running VM is what [`tests::jail::expect`] says, and `query-sandbox` tells the same. Then the
//! checks themselves are tried: a VM is started again and again, each time with one layer taken away, and the check for that
//! layer must speak.
//! **Who is not trusted.** The VMM, and these checks. **Why this way.** The layer is taken away from the shipped programs while
//! they start, by changing one system call of theirs: so what is tried is the product and not a build made for it, and no
//! product has a switch that weakens it.
#![cfg(target_arch = "x86_64")]
#![allow(clippy::unwrap_used)] // in a test, a panic is the report

#[path = "jail/cases.rs"]
mod cases;

use cases::{CASES, Case};
use nix::sys::resource::{Resource, getrlimit, setrlimit};
use nix::unistd::{Gid, setgroups};
use serde_json::{Value, json};
use std::path::PathBuf;
use std::process::Command;
use std::time::Duration;
use tests::host::{Tap, require_kvm, require_root};
use tests::jail::check::{Check, Finding, check};
use tests::jail::expect::{BackEnd, Device, Setting};
use tests::jail::saboteur;
use tests::lab::ensure_packages;
use tests::payload::Payload;
use tests::qmp::Qmp;
use tests::trace::Tracee;
use tests::vm::{Vm, VmBuilder, binary};
use tests::wait::{Deadline, Watched};

const LIMIT: Duration = Duration::from_secs(30);

/// A VM with a disk that its guest has used, one that is read-only, and a network card.
struct Suite {
    builder: VmBuilder,
    setting: Setting,
    _tap: Option<Tap>,
    _dir: tempfile::TempDir,
}

/// Larger than what a device without an image may write.
const IMAGE: u64 = 8 << 20;

fn image(dir: &tempfile::TempDir, name: &str) -> PathBuf {
    let path = dir.path().join(name);
    let file = std::fs::File::create(&path).unwrap();
    file.set_len(IMAGE).unwrap();
    path
}

fn used_disk() -> Device {
    Device {
        id: "d0",
        binary: "block",
        back_end: BackEnd::Image {
            path: "/disk.img",
            writes: true,
            size: IMAGE,
        },
        queues: 1,
        started: 1,
    }
}

/// What a VM with these devices and so many bytes of RAM is, with one vCPU and one client.
fn setting(devices: Vec<Device>, ram: u64) -> Setting {
    Setting {
        devices,
        ram,
        vcpus: 1,
        clients: 1,
        held: Vec::new(),
        given: Vec::new(),
    }
}

fn suite(tap: &str, subnet: u8) -> Suite {
    require_kvm();
    require_root();
    let dir = tempfile::tempdir().unwrap();
    let (disk, fixed) = (image(&dir, "disk.img"), image(&dir, "fixed.img"));
    let tap = Tap::new(tap, &format!("10.7.{subnet}.1/24")).unwrap();
    let builder = Vm::builder()
        .args(["-machine", "microvm", "-m", "128"])
        .kernel(&Payload::BlkRw.path(), "end=halt")
        .disk("d0", &disk, "")
        .disk("d1", &fixed, ",readonly=on")
        .tap("n0", &tap.name, "52:54:00:00:00:11")
        .with_qmp();
    let fixed = Device {
        id: "d1",
        back_end: BackEnd::Image {
            path: "/fixed.img",
            writes: false,
            size: IMAGE,
        },
        started: 0,
        ..used_disk()
    };
    let card = Device {
        id: "n0",
        binary: "net",
        back_end: BackEnd::Tap,
        queues: 3,
        started: 0,
    };
    Suite {
        builder,
        setting: setting(vec![used_disk(), fixed, card], 128 << 20),
        _tap: Some(tap),
        _dir: dir,
    }
}

/// A VM with a disk that its guest has used and two folders of the host, one of them read-only. Its RAM is on both sides of the
/// hole below 4 GiB.
fn suite_with_folders() -> Suite {
    require_kvm();
    require_root();
    let dir = tempfile::tempdir().unwrap();
    let disk = image(&dir, "disk.img");
    let mut builder = Vm::builder()
        .args(["-machine", "microvm", "-m", "5120"])
        .kernel(&Payload::BlkRw.path(), "end=halt")
        .disk("d0", &disk, "")
        .with_qmp();
    let mut devices = vec![used_disk()];
    // chown, dac_override, fowner, fsetid, setgid, setuid; or dac_read_search alone.
    for (id, readonly, capabilities) in [("f0", false, 0xdb), ("f1", true, 1 << 2)] {
        let path = dir.path().join(format!("folder-{id}"));
        std::fs::create_dir(&path).unwrap();
        let path = path.to_str().unwrap().to_owned();
        let more = if readonly { ",readonly=on" } else { "" };
        builder = builder
            .arg("-fsdev")
            .arg(format!("local,id=of-{id},path={path}{more}"))
            .arg("-device")
            .arg(format!("virtio-fs-device,fsdev=of-{id},tag={id},id={id}"));
        devices.push(Device {
            id,
            binary: "fs",
            back_end: BackEnd::Folder {
                path,
                readonly,
                capabilities,
            },
            queues: 2,
            started: 0,
        });
    }
    Suite {
        builder,
        setting: setting(devices, 5 << 30),
        _tap: None,
        _dir: dir,
    }
}

/// A VM with a disk that its guest has used and that is a qcow2 image on another on a raw one.
fn suite_with_a_chain() -> Suite {
    require_kvm();
    require_root();
    ensure_packages(&["qemu-utils"]).unwrap();
    let dir = tempfile::tempdir().unwrap();
    let at = |name: &str| dir.path().join(name);
    image(&dir, "base.img");
    for (name, below, format) in [
        ("middle.qcow2", "base.img", "raw"),
        ("top.qcow2", "middle.qcow2", "qcow2"),
    ] {
        let made = Command::new("qemu-img")
            .args(["create", "-q", "-f", "qcow2", "-F", format, "-b", below])
            .arg(at(name))
            .status();
        assert!(made.unwrap().success());
    }
    let drive = |id: &str, name: &str, more: &str| {
        format!("id={id},file={}{more},direct=off", at(name).display())
    };
    let builder = Vm::builder()
        .args(["-machine", "microvm", "-m", "128"])
        .kernel(&Payload::BlkRw.path(), "end=halt")
        .arg("-drive")
        .arg(drive("base", "base.img", ",readonly=on"))
        .arg("-drive")
        .arg(drive(
            "middle",
            "middle.qcow2",
            ",format=qcow2,readonly=on,backing=base",
        ))
        .arg("-drive")
        .arg(drive("top", "top.qcow2", ",format=qcow2,backing=middle"))
        .args(["-device", "virtio-blk-device,drive=top,id=d0"])
        .with_qmp();
    let disk = Device {
        binary: "block-qcow2",
        back_end: BackEnd::Chain {
            path: "/top.qcow2",
            below: vec!["/middle.qcow2", "/base.img"],
        },
        ..used_disk()
    };
    Suite {
        builder,
        setting: setting(vec![disk], 128 << 20),
        _tap: None,
        _dir: dir,
    }
}

fn query(qmp: &mut Qmp) -> Value {
    qmp.execute("query-sandbox", json!({})).unwrap()
}

fn shown(findings: &[Finding]) -> String {
    let lines = findings.iter();
    lines
        .map(|f| format!("  {}: {:?}: {}\n", f.process, f.check, f.detail))
        .collect()
}

#[test]
fn every_process_is_what_it_should_be() {
    judge(&suite("sv-jail0", 31));
}

#[test]
fn every_process_of_a_vm_with_folders_is_what_it_should_be() {
    judge(&suite_with_folders());
}

#[test]
fn every_process_of_a_vm_with_a_chain_of_images_is_what_it_should_be() {
    judge(&suite_with_a_chain());
}

#[track_caller]
fn judge(suite: &Suite) {
    let mut vm = suite.builder.clone().start().unwrap();
    vm.wait_for("BLK-RW OK", LIMIT)
        .unwrap_or_else(|e| panic!("{e}"));
    let mut qmp = vm.qmp().unwrap();
    let reply = query(&mut qmp);
    let findings = check(&mut vm, &suite.setting, &reply).unwrap();
    assert!(findings.is_empty(), "{}", shown(&findings));
    for process in reply["processes"].as_array().unwrap() {
        assert_eq!(process["missing-layers"], json!([]), "{process}");
    }
    // All of it is looked at from outside, and nobody noticed.
    let again = query(&mut qmp);
    for (before, after) in reply["processes"]
        .as_array()
        .unwrap()
        .iter()
        .zip(again["processes"].as_array().unwrap())
    {
        // A heap grows.
        let rest = before.as_object().unwrap().iter();
        for (member, value) in rest.filter(|(member, _)| *member != "memory") {
            let (mut then, mut now) = (value.clone(), after[member].clone());
            if member == "root" && then["entries"].is_null() {
                // The host's own root, where others mount as they like.
                then["mounts"].take();
                now["mounts"].take();
            }
            assert_eq!(then, now, "{member} of {}", before["role"]);
        }
    }
    qmp.execute("quit", json!({})).unwrap();
    assert!(vm.wait(LIMIT).unwrap().success(), "{}", vm.messages());
}

/// A disk's process maps guest RAM when its driver starts, which is later than the cases can change anything.
#[test]
fn guards_that_a_disk_loses_while_it_runs_are_missed() {
    let suite = suite("sv-jail2", 33);
    for in_front in [true, false] {
        let mut vm = suite.builder.clone().start().unwrap();
        vm.wait_for("BLK-RW OK", LIMIT)
            .unwrap_or_else(|e| panic!("{e}"));
        let mut qmp = vm.qmp().unwrap();
        let disk = vm.processes().unwrap()[1];
        cases::unmap_guard(&mut Tracee::stop(disk).unwrap(), in_front).unwrap();
        let reply = query(&mut qmp);
        let findings = check(&mut vm, &suite.setting, &reply).unwrap();
        let only = findings
            .iter()
            .all(|f| f.process == "d0" && f.check == Check::Guards);
        assert!(only && findings.len() == 1, "{}", shown(&findings));
        qmp.execute("quit", json!({})).unwrap();
        assert!(vm.wait(LIMIT).unwrap().success(), "{}", vm.messages());
    }
}

/// The caller's groups are there to be lost, and its limits as high as they may be.
fn with_much_to_lose() {
    for resource in [
        Resource::RLIMIT_CORE,
        Resource::RLIMIT_RTPRIO,
        Resource::RLIMIT_MSGQUEUE,
        Resource::RLIMIT_MEMLOCK,
        Resource::RLIMIT_NOFILE,
        Resource::RLIMIT_NPROC,
    ] {
        let (_, hard) = getrlimit(resource).unwrap();
        // A caller without CAP_SYS_RESOURCE keeps what it has.
        if setrlimit(resource, hard.max(50), hard.max(50)).is_err() {
            setrlimit(resource, hard, hard).unwrap();
        }
    }
    setgroups(&[Gid::from_raw(4), Gid::from_raw(24)]).unwrap();
}

/// Whether the caller has nothing that this case could leave to a device: its own limit is what the jail's would be.
fn is_void(case: &Case) -> bool {
    let Check::Limit(name) = case.caught.1 else {
        return false;
    };
    let own = tests::procfs::limits(i32::try_from(std::process::id()).unwrap()).unwrap();
    own[name] == (0, 0)
}

/// Starts a VM without one layer: what is wrong with how that was found, if anything is.
fn try_case(suite: &Suite, case: &Case) -> Result<(), String> {
    let dir = tempfile::tempdir().unwrap();
    let program = saboteur::stopping(&binary("stratovirt").unwrap(), dir.path()).unwrap();
    let mut vm = suite.builder.clone().program(program).start().unwrap();
    let made = guarded(vm.pid(), || saboteur::follow(vm.pid(), case.changes))
        .map_err(|e| format!("it did not start: {e}\n{}", vm.messages()))?;
    if let Some(unmade) = (0..case.changes.len()).find(|at| !made.contains(at)) {
        return Err(format!("change {unmade} was never made"));
    }
    vm.wait_for("BLK-RW OK", LIMIT)?;
    let mut qmp = vm.qmp().map_err(|e| e.to_string())?;
    let reply = query(&mut qmp);
    let findings = check(&mut vm, &suite.setting, &reply)?;
    let (process, wanted) = case.caught;
    let found = findings
        .iter()
        .any(|f| f.process == process && f.check == wanted);
    // A process with more rights may be closed to the broker, which then says so.
    let only = findings.iter().all(|f| {
        f.check == wanted || case.also.contains(&f.check) || matches!(f.check, Check::Unread(_))
    });
    if found && only {
        return told(&suite.setting, case.caught, &reply);
    }
    Err(format!(
        "{wanted:?} should have been found of {process}, but this was:\n{}",
        shown(&findings)
    ))
}

/// Whether `query-sandbox` names the layer as missing too, if it knows it and could read it.
fn told(setting: &Setting, (process, check): (&str, Check), reply: &Value) -> Result<(), String> {
    let (layer, member) = match check {
        Check::SeccompMode => ("seccomp", "threads"),
        Check::NoNewPrivileges => ("no-new-privs", "threads"),
        Check::Capabilities("bounding") if process != "broker" => ("empty-bounding-set", "threads"),
        Check::Capabilities(_) if process != "broker" => ("no-capabilities", "threads"),
        Check::Dumpable => ("not-dumpable", "dumpable"),
        Check::Namespace("user") => ("user-namespace", "namespaces"),
        Check::Namespace("mnt") => ("mount-namespace", "namespaces"),
        Check::Namespace("pid") => ("pid-namespace", "namespaces"),
        Check::Namespace("net") => ("network-namespace", "namespaces"),
        Check::Namespace("ipc") => ("ipc-namespace", "namespaces"),
        Check::Namespace("uts") => ("uts-namespace", "namespaces"),
        Check::Namespace("cgroup") => ("cgroup-namespace", "namespaces"),
        Check::RootWritable => ("read-only-root", "root"),
        Check::RootForeign if process.starts_with('f') => ("restricted-root", "root"),
        Check::RootForeign | Check::RootNotEmpty => ("empty-root", "root"),
        Check::User => ("unprivileged-user", "uids"),
        Check::Groups => ("no-supplementary-groups", "groups"),
        Check::WritableCode => ("no-writable-code", "memory"),
        Check::ForeignFile => ("no-foreign-files", "memory"),
        _ => return Ok(()),
    };
    let at = match process {
        "control" => 0,
        "broker" => 1,
        id => setting.devices.iter().position(|d| d.id == id).unwrap() + 2,
    };
    // Each device has one process in this order; a keeper comes in between.
    let all = reply["processes"].as_array().unwrap();
    let mut own = all.iter().filter(|facts| facts["role"] != "keeper");
    let facts = own.nth(at).unwrap();
    let missing = facts["missing-layers"].as_array().unwrap();
    if missing.contains(&json!(layer)) || facts["unreadable"][member].is_string() {
        return Ok(());
    }
    Err(format!("query-sandbox does not miss {layer}: {missing:?}"))
}

/// Does `work`, which waits for process `pid` without a limit; at the limit the process is killed, which ends the wait.
fn guarded<T>(pid: i32, work: impl FnOnce() -> T) -> T {
    let watched = Watched::new(pid).unwrap();
    let (over, told) = std::sync::mpsc::channel::<()>();
    std::thread::scope(|scope| {
        scope.spawn(move || {
            let late = told.recv_timeout(LIMIT) == Err(std::sync::mpsc::RecvTimeoutError::Timeout);
            if late
                && !watched
                    .ended(Deadline::after(Duration::ZERO))
                    .unwrap_or(true)
            {
                let pid = nix::unistd::Pid::from_raw(pid);
                let _ = nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGKILL);
            }
        });
        let result = work();
        drop(over);
        result
    })
}

#[test]
fn each_layer_that_is_taken_away_is_missed() {
    let (plain, folders) = (suite("sv-jail1", 32), suite_with_folders());
    with_much_to_lose();
    let only = std::env::var("JAIL_CASE").unwrap_or_default();
    let mut failures = Vec::new();
    let mut tried = 0;
    for case in CASES.iter().filter(|case| case.name.contains(&only)) {
        if is_void(case) {
            println!("void here, for the caller's own limit is 0: {}", case.name);
            continue;
        }
        tried += 1;
        let suite = if case.caught.0.starts_with('f') {
            &folders
        } else {
            &plain
        };
        match try_case(suite, case) {
            Ok(()) => println!("found by {:?}: {}", case.caught.1, case.name),
            Err(why) => failures.push(format!("{}: {why}", case.name)),
        }
    }
    println!("{} of {tried} found", tried - failures.len());
    assert!(failures.is_empty(), "{}", failures.join("\n"));
    assert!(tried >= 30 || !only.is_empty());
}
