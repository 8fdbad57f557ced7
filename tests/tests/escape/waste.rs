//! What a device process that wastes costs the host and the VM's other device.
//!
//! One device process is the probe, which uses up one kind of thing; the other is the real one, with a guest that never stops
//! asking it for something and checks every answer. What the host lost is read from the kernel.

use std::fs::File;
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use ipc::limits::{MAX_DEVICE_MEMORY, MAX_INFLIGHT_REGION, MAX_LOG_LINES_PER_SECOND};
use tests::console::Console;
use tests::escape::Jail;
use tests::escape::exhaust::HOLDS;
use tests::host::{Tap, require_kvm, require_root};
use tests::payload::Payload;
use tests::procfs::{self, Status};
use tests::vm::{Vm, binary};
use tests::wait::Deadline;

const LIMIT: Duration = Duration::from_secs(60);
/// Bytes of the disk.
const DISK: u64 = 1 << 20;
/// What a process may have beside what it wastes, in bytes: its text, its stack, the pages of its tables.
const PLAIN: u64 = 16 << 20;

/// A VM with a wasteful device.
struct Run {
    vm: Vm,
    log: Console,
    program: PathBuf,
    dir: tempfile::TempDir,
    _tap: Tap,
}

impl Run {
    /// The device of kind `wasteful` does `how`; the other one works.
    fn start(wasteful: Jail, how: &str, filter: bool) -> Self {
        require_kvm();
        require_root();
        let dir = tempfile::tempdir().unwrap();
        let (name, payload, words) = match wasteful {
            Jail::Net => ("net", Payload::BlkLoop, "spin=1"),
            _ => ("block", Payload::NetLoop, "host=10.7.42.1 own=10.7.42.2"),
        };
        for each in ["stratovirt", "block", "net"] {
            let from = if each == name {
                PathBuf::from(env!("CARGO_BIN_EXE_escape-probe"))
            } else {
                binary(each).unwrap()
            };
            std::fs::copy(from, dir.path().join(each)).unwrap();
        }
        let tap = Tap::new("sv-waste", "10.7.42.1/24").unwrap();
        let (log, disk) = (dir.path().join("log"), dir.path().join("disk.img"));
        nix::unistd::mkfifo(&log, nix::sys::stat::Mode::S_IRWXU).unwrap();
        let reader = File::options()
            .read(true)
            .custom_flags(libc::O_NONBLOCK)
            .open(&log)
            .unwrap();
        File::create(&disk).unwrap().set_len(DISK).unwrap();
        let ids = match wasteful {
            Jail::Net => ("good", how),
            _ => (how, "good"),
        };
        let mut builder = Vm::builder()
            .program(dir.path().join("stratovirt"))
            .args(["-machine", "microvm", "-m", "128", "-D"])
            .arg(&log)
            .kernel(&payload.path(), words)
            .arg("-drive")
            .arg(format!("id=d0,file={},direct=off", disk.display()))
            .arg("-device")
            .arg(format!(
                "virtio-blk-device,drive=d0,id={},restart=off",
                ids.0
            ))
            .args(["-netdev", "tap,id=n0,ifname=sv-waste", "-device"])
            .arg(format!(
                "virtio-net-device,netdev=n0,id={},mac=52:54:00:00:00:42,restart=off",
                ids.1
            ));
        if !filter {
            builder = builder.arg("-disable-seccomp");
        }
        Self {
            vm: builder.start().unwrap(),
            log: Console::new(reader, None),
            program: dir.path().join(name),
            dir,
            _tap: tap,
        }
    }

    /// What the probe says once it has all it could get: how many, and the error that ended it.
    fn held(&mut self) -> (u64, i32) {
        let told = self
            .log
            .wait_for(&format!("{HOLDS} "), LIMIT)
            .and_then(|_| self.log.rest_of_line(LIMIT))
            .unwrap_or_else(|e| panic!("{}", self.vm.explain(&e)));
        let (count, errno) = told.split_once(" errno ").unwrap();
        let count = count.split(' ').next().unwrap().parse().unwrap();
        (count, errno.trim().parse().unwrap())
    }

    /// The other device's pace: milliseconds for each ten of the guest's requests, which the guest checks.
    fn pace(&mut self) -> f64 {
        const TENS: u32 = 5;
        let next = |vm: &mut Vm| {
            vm.wait_for("LOOP ", LIMIT)
                .unwrap_or_else(|e| panic!("the other device stands still: {e}"));
        };
        // What it said before counts for nothing.
        while self.vm.console.wait_for("LOOP ", Duration::ZERO).is_ok() {}
        next(&mut self.vm);
        let since = Instant::now();
        for _ in 0..TENS {
            next(&mut self.vm);
        }
        since.elapsed().as_secs_f64() * 1000.0 / f64::from(TENS)
    }

    /// The processes that run the probe.
    fn probes(&mut self) -> Vec<i32> {
        let runs = |pid: &i32| {
            std::fs::read_link(format!("/proc/{pid}/exe")).is_ok_and(|exe| exe == self.program)
        };
        self.vm
            .processes()
            .unwrap()
            .into_iter()
            .filter(runs)
            .collect()
    }

    /// Bytes that the probe has in memory, its own and its files' that exist in memory only.
    fn resident(&mut self) -> u64 {
        let pids = self.probes();
        assert!(!pids.is_empty());
        pids.into_iter().map(|pid| memory(pid, "VmRSS")).sum()
    }

    fn broker(&mut self) -> i32 {
        // The control process's one child.
        self.vm.processes().unwrap()[0]
    }

    /// Everything ends with the VM, and how long that took.
    fn end(mut self) -> Duration {
        self.vm.processes().unwrap();
        let since = Instant::now();
        self.vm.kill().unwrap();
        let left = self.vm.survivors(Deadline::after(LIMIT));
        assert!(left.is_empty(), "{left:?} outlive the VM");
        since.elapsed()
    }
}

/// A field of `/proc/PID/status` in bytes.
fn memory(pid: i32, field: &str) -> u64 {
    let status = Status::of(pid).unwrap();
    let number = status.field(field).split(' ').next().unwrap_or("");
    number.parse::<u64>().unwrap() * 1024
}

const MIB: f64 = 1_048_576.0;

#[test]
fn memory_has_a_limit() {
    for jail in [Jail::Block, Jail::Net] {
        let mut idle = Run::start(jail, "waste-nothing", true);
        let before = idle.pace();
        idle.end();
        let mut run = Run::start(jail, "waste-memory", true);
        let (bytes, errno) = run.held();
        let (resident, pace) = (run.resident(), run.pace());
        println!(
            "{jail}: memory ends at {:.0} MiB with errno {errno}, {:.0} MiB resident; the other device: {pace:.1} ms for ten \
             requests, {before:.1} ms beside an idle process",
            bytes as f64 / MIB,
            resident as f64 / MIB
        );
        assert_eq!(errno, libc::ENOMEM);
        assert!(bytes <= MAX_DEVICE_MEMORY, "{bytes}");
        assert!(resident <= MAX_DEVICE_MEMORY + PLAIN, "{resident}");
        println!(
            "{jail}: gone {:.1} ms after the VM",
            run.end().as_secs_f64() * 1000.0
        );
    }
}

#[test]
fn a_processor_is_shared() {
    for jail in [Jail::Block, Jail::Net] {
        let mut run = Run::start(jail, "waste-processor", true);
        let _ = run.log.wait_for(HOLDS, LIMIT).unwrap();
        let pid = run.probes()[0];
        let (since, spent) = (Instant::now(), procfs::processor_time(pid).unwrap());
        let pace = run.pace();
        let share = (procfs::processor_time(pid).unwrap() - spent).as_secs_f64()
            / since.elapsed().as_secs_f64();
        println!(
            "{jail}: a process that spins has {share:.2} processors; the other device: {pace:.1} ms for ten requests"
        );
        // It has one thread, and clock ticks are coarse.
        assert!(share < 1.1, "{share}");
        run.end();
    }
}

#[test]
fn a_flood_of_the_log_is_a_trickle_outside() {
    const LINES: u32 = 3 * MAX_LOG_LINES_PER_SECOND;
    let mut run = Run::start(Jail::Block, "waste-log", true);
    let line = "x".repeat(200);
    run.log.wait_for(&line, LIMIT).unwrap();
    let broker = run.broker();
    let (since, before) = (Instant::now(), memory(broker, "VmRSS"));
    let spent = procfs::processor_time(broker).unwrap();
    for _ in 0..LINES {
        run.log.wait_for(&line, LIMIT).unwrap();
    }
    let took = since.elapsed();
    let spent =
        (procfs::processor_time(broker).unwrap() - spent).as_secs_f64() / took.as_secs_f64();
    // Nobody reads any more: the log is full soon, and stays so.
    let pace = run.pace();
    let grown = memory(broker, "VmRSS").saturating_sub(before);
    println!(
        "log: {LINES} lines took {:.1} s, {spent:.2} processors in the broker, which grew by {grown} bytes; unread, the other \
         device: {pace:.1} ms for ten requests",
        took.as_secs_f64()
    );
    // The first second's share may have been waiting.
    assert!(took >= Duration::from_millis(1900), "{took:?}");
    assert!(grown < 4 << 20, "{grown}");
    run.end();
}

#[test]
fn a_disk_keeps_its_size() {
    let mut run = Run::start(Jail::Block, "waste-disk", true);
    let (bytes, errno) = run.held();
    let disk = std::fs::metadata(run.dir.path().join("disk.img")).unwrap();
    println!(
        "disk of {DISK} bytes: writing ends at {bytes} with errno {errno}; {} bytes on the host",
        disk.blocks() * 512
    );
    assert_eq!(errno, libc::EFBIG);
    assert!(
        disk.len() <= DISK.max(MAX_INFLIGHT_REGION),
        "{}",
        disk.len()
    );
    run.pace();
    run.end();
}

/// Milliseconds that writing and flushing a block of a file takes in `dir`, the median of some.
fn flush(dir: &Path) -> f64 {
    let file = File::create(dir.join("other")).unwrap();
    let mut times: Vec<f64> = (0..51)
        .map(|_| {
            let since = Instant::now();
            nix::sys::uio::pwrite(&file, &[1; 4096], 0).unwrap();
            nix::unistd::fdatasync(&file).unwrap();
            since.elapsed().as_secs_f64() * 1000.0
        })
        .collect();
    times.sort_by(f64::total_cmp);
    times[times.len() / 2]
}

#[test]
fn flushes_without_end_leave_others_theirs() {
    let mut run = Run::start(Jail::Block, "waste-nothing", true);
    run.pace();
    let before = flush(run.dir.path());
    run.end();
    let mut run = Run::start(Jail::Block, "waste-flushes", true);
    run.log.wait_for("ready", LIMIT).unwrap();
    let pace = run.pace();
    let during = flush(run.dir.path());
    println!(
        "flushes without end: one of somebody else takes {during:.2} ms, {before:.2} ms before; the other device: {pace:.1} ms for ten requests"
    );
    run.end();
}

#[test]
fn without_a_filter_descriptors_processes_and_files_in_memory_have_limits() {
    let mut run = Run::start(Jail::Block, "waste-descriptors", false);
    let (count, errno) = run.held();
    let most = procfs::limits(run.probes()[0]).unwrap()["Max open files"].1;
    println!("descriptors end at {count} with errno {errno}; the limit is {most}");
    assert_eq!(errno, libc::EMFILE);
    assert!(count < most, "{count}");
    run.pace();
    run.end();

    let mut run = Run::start(Jail::Block, "waste-processes", false);
    let (count, errno) = run.held();
    let (alive, pace) = (run.probes().len() as u64, run.pace());
    println!(
        "processes end at {count} with errno {errno}, {alive} are alive; the other device: {pace:.1} ms for ten requests"
    );
    assert_eq!(errno, libc::EAGAIN);
    assert!(count < 16 && alive <= 16, "{count} {alive}");
    run.end();

    let mut run = Run::start(Jail::Block, "waste-shared-memory", false);
    let (bytes, errno) = run.held();
    println!(
        "files in memory end at {:.0} MiB with errno {errno}",
        bytes as f64 / MIB
    );
    assert_eq!(errno, libc::EMFILE);
    assert!(bytes <= most * MAX_INFLIGHT_REGION, "{bytes}");
    run.pace();
    run.end();
}
