//! # Device processes that die or hang under a guest at work
//!
//! **Job.** Invariant 7 of the design on live processes: whatever happens to a device process, the guest loses nothing, the
//! next process is jailed as the one before, and the VM goes on. **Who is not trusted.** The VMM.
//! **Why this way.** A bare guest checks every byte and every buffer itself; signals come at any moment of its loop.
#![allow(clippy::unwrap_used)] // in a test, a panic is the report

use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::sys::socket::{
    AddressFamily, Shutdown, SockFlag, SockProtocol, SockType, getsockopt, shutdown, socket,
    sockopt,
};
use nix::unistd::Pid;
use serde_json::{Value, json};
use tests::chance::Chance;
use tests::host::{Tap, ext4_image, require_kvm, require_root};
use tests::jail::Jail;
use tests::payload::Payload;
use tests::procfs;
use tests::qmp::Qmp;
use tests::vm::{Vm, VmBuilder};
use tests::wait::{Deadline, Watched, readable};

const LIMIT: Duration = Duration::from_secs(60);

struct Guest {
    vm: Vm,
    qmp: Qmp,
    /// Its image or its folder.
    dir: tempfile::TempDir,
    /// Requests in flight when processes died.
    in_flight: u64,
}

fn image(dir: &Path) -> PathBuf {
    let path = dir.join("disk.img");
    let file = std::fs::File::create(&path).unwrap();
    file.set_len(4 << 20).unwrap();
    path
}

fn builder(payload: Payload, append: &str) -> VmBuilder {
    require_kvm();
    require_root();
    Vm::builder()
        .args(["-machine", "microvm", "-m", "128"])
        .kernel(&payload.path(), append)
        .with_qmp()
}

/// A guest with one disk.
fn with_disk(payload: Payload, append: &str, restart: &str) -> Guest {
    let dir = tempfile::tempdir().unwrap();
    let disk = image(dir.path());
    let vm = builder(payload, append)
        .arg("-drive")
        .arg(format!("id=d0,file={},direct=off", disk.display()))
        .arg("-device")
        .arg(format!("virtio-blk-device,drive=d0,id=disk{restart}"));
    Guest::start(vm, dir)
}

/// A guest with one card, behind a tap with the address 10.7.`net`.1.
fn with_card(tap: &str, net: u8, restart: &str) -> Guest {
    let own = format!("host=10.7.{net}.1 own=10.7.{net}.2");
    let vm = builder(Payload::NetLoop, &own)
        .arg("-netdev")
        .arg(format!("tap,id=n0,ifname={tap}"))
        .arg("-device")
        .arg(format!(
            "virtio-net-device,netdev=n0,id=card,mac=52:54:00:00:00:{net}{restart}"
        ));
    Guest::start(vm, tempfile::tempdir().unwrap())
}

impl Guest {
    fn start(vm: VmBuilder, dir: tempfile::TempDir) -> Self {
        let vm = vm.start().unwrap();
        let qmp = vm.qmp().unwrap();
        Self {
            vm,
            qmp,
            dir,
            in_flight: 0,
        }
    }

    #[track_caller]
    fn expect(&mut self, text: &str) -> String {
        self.vm
            .wait_for(text, LIMIT)
            .unwrap_or_else(|e| panic!("{e}\n{}", self.vm.messages()))
    }

    fn type_a_byte(&mut self) {
        self.vm.console.send("x").unwrap();
    }

    #[track_caller]
    fn event(&mut self, name: &str) -> Value {
        match self.qmp.wait_event(name, LIMIT) {
            Ok(event) => event["data"].clone(),
            Err(e) => {
                let ended = self.vm.wait(Duration::from_secs(1));
                let console = self.vm.console.wait_end(Duration::from_secs(1));
                panic!("{e}, {ended:?}, {console:?}\n{}", self.vm.messages())
            }
        }
    }

    /// What DEVICE_CRASHED says, but for how many requests were in flight, which is chance.
    #[track_caller]
    fn crashed(&mut self) -> Value {
        let mut event = self.event("DEVICE_CRASHED");
        if let Some(count) = event.as_object_mut().unwrap().remove("in-flight") {
            assert!(count.as_u64().unwrap() <= 256, "{count}");
            self.in_flight += count.as_u64().unwrap();
        }
        event
    }

    fn pid(&mut self, name: &str) -> i32 {
        self.vm.process(name).unwrap().unwrap()
    }

    /// Kills process `pid` of `device` and waits for the one that takes its place: its id, how long the VMM counts, and
    /// how long it took from the signal to the event.
    #[track_caller]
    fn kill(&mut self, device: &str, pid: i32) -> (i32, f64, Duration) {
        let since = Instant::now();
        signal(pid, Signal::SIGKILL);
        let crashed = self.crashed();
        assert_eq!(
            crashed,
            json!({ "device": device, "pid": pid, "signal": 9 })
        );
        let recovered = self.event("DEVICE_RECOVERED");
        let total = since.elapsed();
        assert_eq!(recovered["device"], device);
        let next = recovered["pid"].as_i64().unwrap();
        assert_ne!(next, i64::from(pid));
        let stall = recovered["stall-ms"].as_f64().unwrap();
        assert!(stall > 0.0 && stall <= total.as_secs_f64() * 1000.0);
        (i32::try_from(next).unwrap(), stall, total)
    }

    #[track_caller]
    fn ends_well(&mut self) {
        let status = self.vm.wait(LIMIT).unwrap_or_else(|e| panic!("{e}"));
        assert_eq!(status.code(), Some(0), "{}", self.vm.messages());
    }
}

fn signal(pid: i32, signal: Signal) {
    kill(Pid::from_raw(pid), signal).unwrap();
}

/// `[50 %, 99 %, all]` of `values` are at most this.
fn percentiles(mut values: Vec<f64>) -> [f64; 3] {
    values.sort_by(f64::total_cmp);
    let at = |percent: usize| values[(values.len() * percent).div_ceil(100).max(1) - 1];
    [at(50), at(99), at(100)]
}

#[test]
fn a_disk_loses_nothing_when_its_process_is_killed_fifty_times() {
    let mut guest = with_disk(Payload::BlkLoop, "spin=1", ",max-restarts=1000");
    guest.expect("LOOP 0");
    let mut pid = guest.pid("block");
    let (mut stalls, mut totals) = (Vec::new(), Vec::new());
    for round in 0..50 {
        // Every other time at once, in the middle of the replay; else when the guest is well under way again.
        if round % 2 == 0 {
            guest.expect("LOOP ");
        }
        let (next, stall, total) = guest.kill("disk", pid);
        pid = next;
        stalls.push(stall);
        totals.push(total.as_secs_f64() * 1000.0);
    }
    guest.expect("LOOP ");
    guest.type_a_byte();
    guest.expect("BLK-LOOP OK bursts ");
    guest.ends_well();
    println!("stall in ms, 50 %, 99 %, most: {:.1?}", percentiles(stalls));
    println!("signal to event in ms: {:.1?}", percentiles(totals));
    println!("requests in flight at the deaths: {}", guest.in_flight);
}

#[test]
fn a_network_card_loses_and_repeats_no_buffer_when_its_process_is_killed() {
    let tap = Tap::new("sv-crash", "10.7.31.1/24").unwrap();
    let mut guest = with_card("sv-crash", 31, ",max-restarts=1000");
    guest.expect("LOOP 10\r");
    let mut pid = guest.pid("net");
    let mut stalls = Vec::new();
    for round in 0..20 {
        if round % 2 == 0 {
            guest.expect("LOOP ");
        }
        let (next, stall, _) = guest.kill("card", pid);
        pid = next;
        stalls.push(stall);
    }
    // Ten more answers after the last death.
    guest.expect("LOOP ");
    guest.expect("LOOP ");
    guest.type_a_byte();
    guest.expect("NET-LOOP OK answers ");
    guest.ends_well();
    drop(tap);
    println!("stall in ms, 50 %, 99 %, most: {:.1?}", percentiles(stalls));
}

#[test]
fn the_next_process_has_the_same_jail() {
    let tap = Tap::new("sv-same", "10.7.32.1/24").unwrap();
    let dir = tempfile::tempdir().unwrap();
    let disk = image(dir.path());
    let vm = builder(Payload::BlkRw, "end=halt")
        .disk("d0", &disk, "")
        .tap("n0", &tap.name, "52:54:00:00:00:32");
    let mut guest = Guest::start(vm, dir);
    guest.expect("BLK-RW OK");
    for (name, device) in [("block", "dev-d0"), ("net", "dev-n0")] {
        let pid = guest.pid(name);
        let (before, limits) = (Jail::of(pid).unwrap(), procfs::limits(pid).unwrap());
        let (next, ..) = guest.kill(device, pid);
        let after = Jail::of(next).unwrap();
        // Without their numbers: the in-flight region's descriptor comes to each of the two in another way.
        let kinds = |jail: &Jail| {
            let fds = jail.fds.values();
            let mut kinds: Vec<_> = fds.map(|fd| fd.kind().to_owned()).collect();
            kinds.sort_unstable();
            kinds
        };
        assert_eq!(kinds(&after), kinds(&before), "descriptors");
        assert_eq!(after.uid, before.uid);
        assert_eq!(after.own_namespaces, before.own_namespaces);
        // The kernel makes workers for io_uring as it needs them; they have the filter of the thread that they work for.
        let own = |jail: &Jail| {
            let worker = |name: &str| name.starts_with("iou-wrk");
            let (workers, own): (Vec<_>, Vec<_>) = jail
                .threads
                .clone()
                .into_iter()
                .partition(|(name, _)| worker(name));
            assert!(workers.iter().all(|(_, mode)| *mode == 2), "{workers:?}");
            own
        };
        assert_eq!(own(&after), own(&before), "seccomp");
        assert_eq!(after.no_new_privs, before.no_new_privs);
        assert_eq!(after.capabilities, before.capabilities);
        assert_eq!(
            (after.root, after.read_only_root),
            (before.root, before.read_only_root)
        );
        assert_eq!(procfs::limits(next).unwrap(), limits);
    }
    guest.qmp.execute("quit", json!({})).unwrap();
    guest.ends_well();
}

#[test]
fn the_next_process_gets_the_same_image_wherever_it_is_now() {
    let mut guest = with_disk(Payload::BlkLoop, "spin=1", "");
    guest.expect("LOOP 0");
    let pid = guest.pid("block");
    let path = guest.dir.path().join("disk.img");
    let inode = std::fs::metadata(&path).unwrap().ino();
    // As a manager does that replaces an image or cleans up early: the path leads elsewhere now.
    std::fs::remove_file(&path).unwrap();
    image(guest.dir.path());
    let (next, ..) = guest.kill("disk", pid);
    let fds = procfs::fds(next).unwrap();
    let (number, _) = fds
        .iter()
        .find(|(_, fd)| fd.target.contains("disk.img"))
        .unwrap();
    let held = std::fs::metadata(format!("/proc/{next}/fd/{number}")).unwrap();
    assert_eq!(held.ino(), inode);
    guest.expect("LOOP ");
    guest.type_a_byte();
    guest.expect("BLK-LOOP OK");
    guest.ends_well();
}

#[test]
fn a_process_that_hangs_is_ended_before_the_machine_is_reset() {
    let mut guest = with_disk(Payload::BlkLoop, "spin=1", "");
    guest.expect("LOOP 0");
    let pid = guest.pid("block");
    signal(pid, Signal::SIGSTOP);
    guest.qmp.execute("system_reset", json!({})).unwrap();
    let crashed = guest.crashed();
    assert_eq!(
        crashed,
        json!({ "device": "disk", "pid": pid, "unresponsive": true })
    );
    guest.event("RESET");
    guest.event("DEVICE_RECOVERED");
    guest.expect("LOOP 0\r");
    guest.expect("LOOP 10\r");
    guest.type_a_byte();
    guest.expect("BLK-LOOP OK");
    guest.ends_well();
}

/// A guest that has started the device of a shared folder.
fn with_folder() -> Guest {
    let dir = tempfile::tempdir().unwrap();
    let vm = builder(Payload::StartDevice, "device=26 queues=2")
        .arg("-fsdev")
        .arg(format!("local,id=f,path={}", dir.path().display()))
        .args(["-device", "virtio-fs-device,fsdev=f,tag=share,id=share"]);
    let mut guest = Guest::start(vm, dir);
    guest.expect("STARTED");
    guest
}

#[test]
fn a_folders_process_that_hangs_is_ended_by_its_keeper() {
    let mut guest = with_folder();
    let (keeper, pid) = (guest.pid("fs-keeper"), guest.pid("fs"));
    signal(pid, Signal::SIGSTOP);
    guest.qmp.execute("system_reset", json!({})).unwrap();
    let crashed = guest.crashed();
    assert_eq!(
        crashed,
        json!({ "device": "share", "pid": pid, "unresponsive": true })
    );
    guest.event("RESET");
    let next = guest.event("DEVICE_RECOVERED")["pid"].clone();
    guest.expect("STARTED");
    // The same keeper has started another one, and what the keeper has is still there.
    assert_eq!(guest.pid("fs-keeper"), keeper);
    assert_eq!(json!(guest.pid("fs")), next);
    assert_ne!(next, json!(pid));
    guest.qmp.execute("quit", json!({})).unwrap();
    guest.ends_well();
}

/// A keeper cannot do anything for anybody without its line to the broker: it ends, and its jail with it.
#[test]
fn a_keeper_without_its_line_ends_and_the_folder_gets_another_jail() {
    let mut guest = with_folder();
    let (keeper, pid) = (guest.pid("fs-keeper"), guest.pid("fs"));
    let watched = [keeper, pid].map(|pid| Watched::new(pid).unwrap());
    let held = procfs::fds(keeper).unwrap();
    let sockets = held.iter().filter(|(_, fd)| fd.kind() == "socket");
    let copies = sockets.map(|(number, _)| watched[0].descriptor(*number).unwrap());
    // The front end's is a stream.
    let lines: Vec<_> = copies
        .filter(|fd| getsockopt(fd, sockopt::SockType).unwrap() == SockType::SeqPacket)
        .collect();
    assert_eq!(lines.len(), 1, "{held:?}");
    shutdown(lines[0].as_raw_fd(), Shutdown::Both).unwrap();
    for process in &watched {
        let gone = process.ended(Deadline::after(LIMIT)).unwrap();
        assert!(gone, "{}: {}", process.pid, guest.vm.messages());
    }
    let crashed = guest.crashed();
    assert_eq!(
        crashed,
        json!({ "device": "share", "pid": pid, "status": 0 })
    );
    guest.event("DEVICE_RECOVERED");
    assert!(guest.pid("fs-keeper") != keeper && guest.pid("fs") != pid);
    guest.qmp.execute("quit", json!({})).unwrap();
    guest.ends_well();
}

#[test]
fn a_process_that_hangs_is_ended_before_the_driver_goes_on() {
    let mut guest = with_disk(Payload::BlkLoop, "bursts=20 again=1", "");
    guest.expect("IDLE");
    let pid = guest.pid("block");
    signal(pid, Signal::SIGSTOP);
    guest.type_a_byte();
    let crashed = guest.crashed();
    assert_eq!(
        crashed,
        json!({ "device": "disk", "pid": pid, "unresponsive": true })
    );
    guest.expect("BLK-LOOP OK bursts 20");
    guest.ends_well();
}

/// Whether a thread of `pid` waits for a lock or a condition, with a limit.
fn waits_with_a_limit(pid: i32) -> bool {
    let threads = std::fs::read_dir(format!("/proc/{pid}/task")).unwrap();
    threads.flatten().any(|thread| {
        // Number and arguments of the call that it is in; another word when it is in none.
        let call = std::fs::read_to_string(thread.path().join("syscall")).unwrap_or_default();
        let mut words = call.split(' ');
        words.next() == Some("202") && words.nth(3).is_some_and(|limit| limit != "0x0") // futex
    })
}

/// A freezer may strike while a vCPU waits for the end of a process that hangs: that wait goes on by a call of the kernel's choice.
#[test]
fn a_stop_while_a_process_is_ended_changes_nothing() {
    let mut guest = with_disk(Payload::BlkLoop, "bursts=20 again=1", "");
    guest.expect("IDLE");
    let (block, broker) = (guest.pid("block"), guest.pid("broker"));
    signal(block, Signal::SIGSTOP);
    // It could end the process, and so the wait, at once.
    signal(broker, Signal::SIGSTOP);
    guest.type_a_byte();
    let control = guest.vm.pid();
    // It waits for a second, which a busy machine may not let this process see: all is to end well then too.
    let since = Instant::now();
    while !waits_with_a_limit(control) && since.elapsed() < LIMIT / 4 {
        let ended = guest.vm.wait(Duration::from_millis(5));
        assert!(ended.is_err(), "{ended:?}: {}", guest.vm.messages());
    }
    signal(control, Signal::SIGSTOP);
    let state = || std::fs::read_to_string(format!("/proc/{control}/stat")).unwrap();
    assert!(
        (0..1_000_000).any(|_| state().contains(") T ")),
        "it does not stop"
    );
    signal(control, Signal::SIGCONT);
    signal(broker, Signal::SIGCONT);
    let crashed = guest.crashed();
    assert_eq!(
        crashed,
        json!({ "device": "disk", "pid": block, "unresponsive": true })
    );
    guest.expect("BLK-LOOP OK bursts 20");
    guest.ends_well();
}

#[test]
fn a_device_that_cannot_be_saved_fails_and_the_vm_goes_on() {
    for (policy, restarts) in [(",max-restarts=2", 2), (",restart=off", 0), ("", 5)] {
        let mut guest = with_disk(Payload::BlkRw, "end=halt", policy);
        guest.expect("BLK-RW OK");
        let mut pid = guest.pid("block");
        for _ in 0..restarts {
            (pid, ..) = guest.kill("disk", pid);
        }
        signal(pid, Signal::SIGKILL);
        assert_eq!(guest.crashed()["pid"], pid);
        let failed = guest.event("DEVICE_FAILED");
        assert_eq!(failed["device"], "disk", "{failed}");
        let status = guest.qmp.execute("query-status", json!({})).unwrap();
        assert_eq!(status["running"], true, "{status}");
        assert_eq!(guest.vm.process("block").unwrap(), None);
        guest.qmp.execute("quit", json!({})).unwrap();
        guest.ends_well();
    }
}

/// A file system of its own that can be made to stand still: whoever writes to it waits.
struct StandingStill {
    /// Where it is mounted.
    place: PathBuf,
    _dir: tempfile::TempDir,
}

impl StandingStill {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let (content, place) = (dir.path().join("content"), dir.path().join("place"));
        for folder in [&content, &place] {
            std::fs::create_dir(folder).unwrap();
        }
        let image = dir.path().join("image");
        ext4_image(&image, 16, &content).unwrap();
        run(Command::new("mount")
            .args(["-o", "loop"])
            .arg(&image)
            .arg(&place));
        Self { place, _dir: dir }
    }

    fn freeze(&self, how: &str) {
        run(Command::new("fsfreeze").arg(how).arg(&self.place));
    }
}

impl Drop for StandingStill {
    fn drop(&mut self) {
        // It may stand still still.
        let _ = Command::new("fsfreeze").arg("-u").arg(&self.place).output();
        let _ = Command::new("umount").arg("-l").arg(&self.place).status();
    }
}

#[track_caller]
fn run(command: &mut Command) {
    let output = command.output().unwrap();
    assert!(output.status.success(), "{command:?}: {output:?}");
}

/// A process that dies while the host's disk keeps it waiting has requests in flight for certain; they are told, and done once.
#[test]
fn what_was_in_flight_is_told_and_is_done_by_the_next_process() {
    for aio in ["io_uring", "off"] {
        let still = StandingStill::new();
        let disk = image(&still.place);
        let vm = builder(Payload::BlkLoop, "spin=1")
            .arg("-drive")
            .arg(format!(
                "id=d0,file={},direct=off,aio={aio}",
                disk.display()
            ))
            .args(["-device", "virtio-blk-device,drive=d0,id=disk"]);
        let mut guest = Guest::start(vm, tempfile::tempdir().unwrap());
        guest.expect("LOOP 0");
        let pid = guest.pid("block");
        still.freeze("-f");
        // The kernel's word for somebody who waits for a disk, and cannot be killed meanwhile.
        let deadline = Deadline::after(LIMIT);
        let waits = || {
            let threads = procfs::Status::of_threads(pid).unwrap();
            threads
                .values()
                .any(|thread| thread.field("State").starts_with('D'))
        };
        while !waits() {
            assert!(!deadline.left().is_zero(), "{aio}: nothing is written");
        }
        signal(pid, Signal::SIGKILL);
        still.freeze("-u");
        let crashed = guest.crashed();
        assert_eq!(
            crashed,
            json!({ "device": "disk", "pid": pid, "signal": 9 })
        );
        assert!(guest.in_flight > 0, "{aio}");
        guest.event("DEVICE_RECOVERED");
        guest.expect("LOOP ");
        guest.type_a_byte();
        guest.expect("BLK-LOOP OK bursts ");
        guest.ends_well();
    }
}

/// A snapshot that is asked for while a device's process is dead, or does not answer, has the state of the next one.
#[test]
fn a_snapshot_waits_for_a_device_that_is_being_restarted() {
    let templates = tempfile::tempdir().unwrap();
    let dir = tempfile::tempdir().unwrap();
    let disk = image(dir.path());
    let vm = builder(Payload::BlkLoop, "spin=1")
        .arg("-drive")
        .arg(format!("id=d0,file={},direct=off", disk.display()))
        .args(["-device", "virtio-blk-device,drive=d0,id=disk"])
        .arg("-snapshot-dir")
        .arg(templates.path());
    let mut guest = Guest::start(vm, dir);
    guest.expect("LOOP 0");
    for (how, name) in [(Signal::SIGKILL, "killed"), (Signal::SIGSTOP, "stopped")] {
        let pid = guest.pid("block");
        signal(pid, how);
        let place = templates.path().join(name);
        let uri = format!("file:{}", place.display());
        guest.qmp.execute("migrate", json!({ "uri": uri })).unwrap();
        assert!(place.join("state").exists() && place.join("memory").exists());
        let recovered = guest.event("DEVICE_RECOVERED");
        assert_ne!(recovered["pid"], pid, "{name}");
        let status = guest.qmp.execute("query-status", json!({})).unwrap();
        assert_eq!(status["running"], true, "{status}");
        guest.expect("LOOP ");
    }
    guest.type_a_byte();
    guest.expect("BLK-LOOP OK bursts ");
    guest.ends_well();
}

impl Guest {
    /// Replaces the process of `device` and gives the id of the next one, and how long neither served, in ms.
    #[track_caller]
    fn upgrade(&mut self, device: &str, pid: i32) -> (i32, f64) {
        let done = self
            .qmp
            .execute("device-upgrade", json!({ "id": device }))
            .unwrap();
        assert_eq!(done, json!({}));
        // The answer comes when it is reaped.
        assert!(procfs::Status::of(pid).is_err(), "{pid} is still there");
        let event = self.event("DEVICE_UPGRADED");
        assert_eq!(event["device"], device);
        let next = i32::try_from(event["pid"].as_i64().unwrap()).unwrap();
        assert_ne!(next, pid);
        (next, event["stall-ms"].as_f64().unwrap())
    }

    #[track_caller]
    fn no_upgrade(&mut self, device: &str) -> String {
        match self.qmp.execute("device-upgrade", json!({ "id": device })) {
            Err(tests::qmp::QmpError::Refused { description, .. }) => description,
            other => panic!("{other:?}"),
        }
    }
}

#[test]
fn a_disks_process_is_replaced_under_load_and_nothing_is_lost() {
    let mut guest = with_disk(Payload::BlkLoop, "spin=1", "");
    guest.expect("LOOP 0");
    let mut pid = guest.pid("block");
    let before = Jail::of(pid).unwrap();
    let mut stalls = Vec::new();
    // More often than restarts are allowed: it is not one.
    for round in 0..50 {
        if round % 2 == 0 {
            guest.expect("LOOP ");
        }
        let (next, stall) = guest.upgrade("disk", pid);
        pid = next;
        stalls.push(stall);
    }
    let after = Jail::of(pid).unwrap();
    assert_eq!(after.uid, before.uid);
    assert_eq!(after.own_namespaces, before.own_namespaces);
    assert_eq!(after.capabilities, before.capabilities);
    // One that dies after that is recovered as any, with the image locked as before.
    let (next, ..) = guest.kill("disk", pid);
    guest.upgrade("disk", next);
    guest.expect("LOOP ");
    guest.type_a_byte();
    guest.expect("BLK-LOOP OK bursts ");
    guest.ends_well();
    println!("gap in ms, 50 %, 99 %, most: {:.2?}", percentiles(stalls));
}

#[test]
fn what_a_disk_has_counted_outlives_its_process_and_a_reset_of_the_disk() {
    let mut guest = with_disk(Payload::BlkLoop, "bursts=20 again=1", "");
    let counted = |guest: &mut Guest| {
        let disks = guest.qmp.execute("query-blockstats", json!({})).unwrap();
        let stats = &disks[0]["stats"];
        ["rd_operations", "wr_operations", "wr_bytes"].map(|name| stats[name].as_u64().unwrap())
    };
    // Two reads and two writes of a KiB each burst.
    let once = [40, 40, 40 << 10];
    guest.expect("IDLE");
    assert_eq!(counted(&mut guest), once);
    let pid = guest.pid("block");
    let (next, ..) = guest.kill("disk", pid);
    assert_eq!(counted(&mut guest), once, "after a death");
    guest.upgrade("disk", next);
    assert_eq!(counted(&mut guest), once, "after an upgrade");
    guest.qmp.execute("system_reset", json!({})).unwrap();
    guest.event("RESET");
    guest.expect("IDLE");
    assert_eq!(counted(&mut guest), once.map(|number| 2 * number));
}

#[test]
fn a_cards_process_is_replaced_under_load_and_no_buffer_is_lost() {
    let tap = Tap::new("sv-next", "10.7.33.1/24").unwrap();
    let mut guest = with_card("sv-next", 33, "");
    guest.expect("LOOP 10\r");
    let mut pid = guest.pid("net");
    let mut stalls = Vec::new();
    for _ in 0..20 {
        guest.expect("LOOP ");
        let (next, stall) = guest.upgrade("card", pid);
        pid = next;
        stalls.push(stall);
    }
    // Killed, it attaches to the tap again, which nobody else has.
    guest.kill("card", pid);
    guest.expect("LOOP ");
    guest.expect("LOOP ");
    guest.type_a_byte();
    guest.expect("NET-LOOP OK answers ");
    guest.ends_well();
    drop(tap);
    println!("gap in ms, 50 %, 99 %, most: {:.2?}", percentiles(stalls));
}

#[test]
fn a_card_tells_the_network_where_its_guest_is() {
    let tap = Tap::new("sv-where", "10.7.36.1/24").unwrap();
    let mut guest = with_card("sv-where", 36, "");
    guest.expect("LOOP 10\r");
    // All frames of all interfaces; the guest's address is the only one of its kind.
    let frames = socket(
        AddressFamily::Packet,
        SockType::Raw,
        SockFlag::SOCK_CLOEXEC,
        SockProtocol::EthAll,
    )
    .unwrap();
    let mut frames = std::fs::File::from(frames);
    for arguments in [
        json!({}),
        json!({ "interfaces": ["card"] }),
        json!({ "interfaces": ["n0"], "rounds": 3 }),
    ] {
        guest.qmp.execute("announce-self", arguments).unwrap();
        loop {
            let ready = readable(&[frames.as_fd()], Deadline::after(LIMIT)).unwrap();
            assert!(ready.is_some(), "no reverse ARP request");
            let mut frame = [0; 2048];
            let len = std::io::Read::read(&mut frames, &mut frame).unwrap();
            // This driver does not know how to announce itself, so that its card does.
            if len == 60 && frame[6..14] == [0x52, 0x54, 0, 0, 0, 0x36, 0x80, 0x35] {
                break;
            }
        }
    }
    for (name, why) in [
        ("nobody", "Device 'nobody' not found"),
        ("d0", "Device 'd0' not found"),
    ] {
        let error = guest
            .qmp
            .execute("announce-self", json!({ "interfaces": [name] }))
            .unwrap_err();
        assert!(error.to_string().contains(why), "{error}");
    }
    guest.type_a_byte();
    guest.expect("NET-LOOP OK answers ");
    guest.ends_well();
    drop(tap);
}

#[test]
fn a_cards_link_is_down_until_it_is_up_whatever_becomes_of_its_process() {
    let tap = Tap::new("sv-link", "10.7.35.1/24").unwrap();
    let mut guest = with_card("sv-link", 35, "");
    let count = |name: &str| -> u64 {
        let path = format!("/sys/class/net/sv-link/statistics/{name}");
        std::fs::read_to_string(path)
            .unwrap()
            .trim()
            .parse()
            .unwrap()
    };
    let host = std::net::UdpSocket::bind("10.7.35.1:0").unwrap();
    host.set_broadcast(true).unwrap();
    // Packets to the guest that its card took from the tap, of one that is sent now. A process looks at its tap before
    // it answers a message, so that the answer is late enough.
    let taken = |guest: &mut Guest, name: &str, up: bool| {
        let before = count("tx_packets");
        host.send_to(&[1], "10.7.35.255:9").unwrap();
        let link = json!({ "name": name, "up": up });
        guest.qmp.execute("set_link", link).unwrap();
        count("tx_packets") - before
    };
    guest.expect("LOOP 10\r");
    let pid = guest.pid("net");
    let nobody = json!({ "name": "nobody", "up": false });
    let error = guest.qmp.execute("set_link", nobody).unwrap_err();
    assert!(
        error.to_string().contains("Device 'nobody' not found"),
        "{error}"
    );
    assert_ne!(taken(&mut guest, "card", true), 0, "the link is up");
    // By its netdev's name as well as by its own.
    guest
        .qmp
        .execute("set_link", json!({ "name": "n0", "up": false }))
        .unwrap();
    let sent = count("rx_packets");
    assert_eq!(taken(&mut guest, "n0", false), 0, "the link is down");
    guest.kill("card", pid);
    assert_eq!(
        taken(&mut guest, "card", false),
        0,
        "for another process, too"
    );
    assert_eq!(count("rx_packets"), sent);
    guest
        .qmp
        .execute("set_link", json!({ "name": "card", "up": true }))
        .unwrap();
    let more = (0..1000).any(|_| {
        guest.expect("LOOP ");
        count("rx_packets") > sent
    });
    assert!(more, "nothing comes though the link is up");
    guest.type_a_byte();
    guest.expect("NET-LOOP OK answers ");
    guest.ends_well();
    drop(tap);
}

/// Puts another program in the place of `to`, as a package manager does.
fn put(from: &Path, to: &Path) {
    let beside = to.with_extension("new");
    std::fs::copy(from, &beside).unwrap();
    std::fs::rename(&beside, to).unwrap();
}

#[test]
fn a_program_that_does_not_come_up_leaves_the_old_process_serving() {
    let programs = tempfile::tempdir().unwrap();
    let at = |name: &str| programs.path().join(name);
    for name in ["stratovirt", "block"] {
        std::fs::copy(tests::vm::binary(name).unwrap(), at(name)).unwrap();
    }
    let dir = tempfile::tempdir().unwrap();
    let disk = image(dir.path());
    let vm = builder(Payload::BlkLoop, "spin=1")
        .program(at("stratovirt"))
        .disk("d0", &disk, "");
    let mut guest = Guest::start(vm, dir);
    guest.expect("LOOP 0");
    let pid = guest.pid("block");
    // One that ends at once, one that is no program, none at all.
    put(&tests::vm::binary("net").unwrap(), &at("block"));
    let said = guest.no_upgrade("dev-d0");
    assert!(
        said.contains("goes on with the process that it has"),
        "{said}"
    );
    put(Path::new("/etc/passwd"), &at("block"));
    guest.no_upgrade("dev-d0");
    std::fs::remove_file(at("block")).unwrap();
    let said = guest.no_upgrade("dev-d0");
    assert!(said.contains("device binary block"), "{said}");
    assert_eq!(guest.pid("block"), pid, "the old process");
    guest.expect("LOOP ");
    // The next version of it.
    put(&tests::vm::binary("block").unwrap(), &at("block"));
    let (next, _) = guest.upgrade("dev-d0", pid);
    let runs = std::fs::metadata(format!("/proc/{next}/exe")).unwrap();
    assert_eq!(runs.ino(), std::fs::metadata(at("block")).unwrap().ino());
    let said = guest.no_upgrade("dev-d1");
    assert!(said.contains("'dev-d1' not found"), "{said}");
    guest.expect("LOOP ");
    guest.type_a_byte();
    guest.expect("BLK-LOOP OK");
    guest.ends_well();
}

/// Two guests that write and check a disk each and one that answers a stream of frames, whose device processes are killed and
/// now and then replaced, one every 50 to 500 ms, for 5 seconds or as many minutes as are asked for. Each guest checks all
/// of its bytes and frames itself and says so in the end.
#[test]
fn devices_die_at_any_moment_and_guests_notice_nothing() {
    let length = match std::env::var("RECOVERY_MINUTES") {
        Ok(minutes) => Duration::from_secs(60 * minutes.parse::<u64>().unwrap()),
        Err(_) => Duration::from_secs(5),
    };
    let seed = u64::from(std::process::id()) << 32 | 0x5eed;
    println!("chance: {seed:#x}");
    let mut chance = Chance::new(seed);
    let tap = Tap::new("sv-soak", "10.7.34.1/24").unwrap();
    let card = with_card("sv-soak", 34, ",max-restarts=1000");
    let disk = || with_disk(Payload::BlkLoop, "spin=1", ",max-restarts=1000");
    let mut guests = [
        (card, "card", "net"),
        (disk(), "disk", "block"),
        (disk(), "disk", "block"),
    ];
    let mut pids = Vec::new();
    for (guest, _, program) in &mut guests {
        guest.expect("LOOP 10\r");
        pids.push(guest.pid(program));
    }
    let (mut stalls, mut gaps) = (Vec::new(), Vec::new());
    // Nobody writes to it: the time between two deaths is the time for which nothing is read.
    let (never, _writer) = std::io::pipe().unwrap();
    let begin = Instant::now();
    while begin.elapsed() < length {
        let pause = Duration::from_millis(50 + chance.below(450));
        let heard = readable(&[never.as_fd()], Deadline::after(pause)).unwrap();
        assert!(heard.is_none());
        let at = chance.below(3) as usize;
        let (guest, device, _) = &mut guests[at];
        if chance.below(5) == 0 {
            let (next, gap) = guest.upgrade(device, pids[at]);
            pids[at] = next;
            gaps.push(gap);
        } else {
            let (next, stall, _) = guest.kill(device, pids[at]);
            pids[at] = next;
            stalls.push(stall);
        }
    }
    for (guest, ..) in &mut guests {
        // One that had lost a request would wait for it for ever.
        guest.expect("LOOP ");
        guest.type_a_byte();
        guest.expect("-LOOP OK ");
        guest.ends_well();
    }
    drop(tap);
    let in_flight: u64 = guests.iter().map(|(guest, ..)| guest.in_flight).sum();
    println!(
        "{} kills with {in_flight} requests in flight, {} upgrades in {:.0} s",
        stalls.len(),
        gaps.len(),
        begin.elapsed().as_secs_f64()
    );
    assert!(!stalls.is_empty());
    println!("stall in ms, 50 %, 99 %, most: {:.1?}", percentiles(stalls));
    if !gaps.is_empty() {
        println!("gap in ms, 50 %, 99 %, most: {:.2?}", percentiles(gaps));
    }
}
