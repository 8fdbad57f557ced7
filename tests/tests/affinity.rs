//! # Where vCPUs and device processes run
//!
//! **Job.** `-object iothread,cpus=` and `-vcpu-affinity`, read back from the kernel: `Cpus_allowed_list` of every thread of
//! every process of a VM, those that replace others and those that are added later included.
//! **Who is not trusted.** The VMM.
//! **Why this way.** The kernel's word is the effect; the host's own set is asked for, so that one processor is enough for
//! most of it.
#![allow(clippy::unwrap_used)] // in a test, a panic is the report

use std::path::Path;
use std::time::Duration;

use nix::sched::sched_getaffinity;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::json;
use tests::host::{require_kvm, require_root};
use tests::payload::Payload;
use tests::procfs::Status;
use tests::vm::{Vm, VmBuilder};

/// A bare guest needs milliseconds; this is for a busy machine.
const LIMIT: Duration = Duration::from_secs(30);

/// Processors that this process may use.
fn own() -> Vec<usize> {
    let set = sched_getaffinity(Pid::from_raw(0)).unwrap();
    (0..1024)
        .filter(|cpu| set.is_set(*cpu) == Ok(true))
        .collect()
}

/// The first and the last of them; a host with one processor proves less.
fn two() -> (usize, usize) {
    let own = own();
    (own[0], *own.last().unwrap())
}

fn image(dir: &Path, name: &str) -> std::path::PathBuf {
    let path = dir.join(name);
    let file = std::fs::File::create(&path).unwrap();
    file.set_len(4 << 20).unwrap();
    path
}

fn builder(dir: &Path, words: &str) -> VmBuilder {
    require_kvm();
    require_root();
    let words = words.split_whitespace();
    Vm::builder()
        .args(["-machine", "microvm", "-m", "128"])
        .kernel(&Payload::BlkLoop.path(), "spin=1")
        .arg("-drive")
        .arg(format!(
            "id=d,file={},direct=off",
            image(dir, "a").display()
        ))
        .args(words)
}

/// `Cpus_allowed_list` of each thread of `pid`, by the thread's name.
fn threads(pid: i32) -> Vec<(String, String)> {
    let threads = Status::of_threads(pid).unwrap().into_values();
    threads
        .map(|status| {
            let cpus = status.field("Cpus_allowed_list").to_owned();
            (status.name().to_owned(), cpus)
        })
        .collect()
}

#[track_caller]
fn all_on(pid: i32, cpu: usize) {
    let threads = threads(pid);
    assert!(!threads.is_empty());
    for (name, cpus) in threads {
        assert_eq!(cpus, cpu.to_string(), "thread {name} of {pid}");
    }
}

#[test]
fn vcpus_and_device_processes_run_where_they_are_told() {
    let (first, last) = two();
    let dir = tempfile::tempdir().unwrap();
    std::fs::create_dir(dir.path().join("more")).unwrap();
    image(&dir.path().join("more"), "b");
    let mut vm = builder(
        dir.path(),
        &format!(
            "-smp 2 -vcpu-affinity vcpu=0,cpus={last} -vcpu-affinity cpus={first} \
             -object iothread,id=io,cpus={last} -object iothread,id=free \
             -device virtio-blk-device,drive=d,id=disk,iothread=io -hotplug images={}",
            dir.path().join("more").display()
        ),
    )
    .with_qmp()
    .start()
    .unwrap();
    let mut qmp = vm.qmp().unwrap();
    vm.wait_for("LOOP 1", LIMIT)
        .unwrap_or_else(|e| panic!("{e}"));
    let disk = vm.process("block").unwrap().unwrap();
    all_on(disk, last);
    // Each vCPU by the thread id that QMP tells, as a management tool would do it; the rest stays as it was.
    let mut pinned = Vec::new();
    let cpus = qmp.execute("query-cpus-fast", json!({})).unwrap();
    for (cpu, wanted) in cpus.as_array().unwrap().iter().zip([last, first]) {
        let thread = i32::try_from(cpu["thread-id"].as_i64().unwrap()).unwrap();
        let status = &Status::of_threads(vm.pid()).unwrap()[&thread];
        assert_eq!(status.field("Cpus_allowed_list"), wanted.to_string());
        pinned.push(thread);
    }
    assert_eq!(pinned.len(), 2);
    let here = Status::of(std::process::id() as i32).unwrap();
    // KVM's own helpers are threads of this process too, and come from the vCPU that needed them first.
    let main = Status::of(vm.pid()).unwrap();
    assert_eq!(main.field("Cpus_allowed"), here.field("Cpus_allowed"));
    let told = qmp.execute("query-iothreads", json!({})).unwrap();
    let of = |at: usize| (told[at]["id"].as_str(), told[at]["thread-id"].as_i64());
    assert_eq!(of(0), (Some("io"), Some(i64::from(disk))));
    // One that no device uses is this process.
    assert_eq!(of(1), (Some("free"), Some(i64::from(vm.pid()))));
    assert_eq!(told.as_array().unwrap().len(), 2);

    // The one that replaces it, and one that comes later.
    kill(Pid::from_raw(disk), Signal::SIGKILL).unwrap();
    let recovered = qmp.wait_event("DEVICE_RECOVERED", LIMIT).unwrap();
    let next = i32::try_from(recovered["data"]["pid"].as_i64().unwrap()).unwrap();
    assert_ne!(next, disk);
    all_on(next, last);
    let file = dir.path().join("more/b");
    let node = json!({ "node-name": "n", "file": { "driver": "file", "filename": file }, "cache": { "direct": false } });
    qmp.execute("blockdev-add", node).unwrap();
    let device =
        json!({ "driver": "virtio-blk-device", "id": "late", "drive": "n", "iothread": "io" });
    qmp.execute("device_add", device).unwrap();
    let late = vm
        .processes()
        .unwrap()
        .into_iter()
        .find(|pid| *pid != next && Status::of(*pid).is_ok_and(|status| status.name() == "block"))
        .unwrap();
    all_on(late, last);
}

#[test]
fn processors_that_may_not_be_used_are_named() {
    let dir = tempfile::tempdir().unwrap();
    let beyond = own().last().unwrap() + 1;
    for (words, part) in [
        (
            format!("-object iothread,id=io,cpus=0:{beyond}"),
            format!("-object iothread,id=io,cpus={}: allowed: ", list(beyond)),
        ),
        (
            format!("-vcpu-affinity vcpu=0,cpus={beyond}"),
            format!("-vcpu-affinity vcpu=0,cpus={beyond}: allowed: "),
        ),
    ] {
        let mut vm = builder(dir.path(), &words).start().unwrap();
        let status = vm.wait(LIMIT).unwrap_or_else(|e| panic!("{e}"));
        assert_eq!(status.code(), Some(1));
        let said = vm.messages();
        assert!(said.contains(&part), "{said}");
    }
}

/// `0:N` as the VMM writes it.
fn list(beyond: usize) -> String {
    match beyond {
        1 => "0-1".into(),
        _ => format!("0:{beyond}"),
    }
}
