//! The outer jail, live: the command `ozone` with the example `vm_probe` as its control program.
//!
//! Needs root, and says so instead of passing silently as something else. Every story has its own
//! program name, so that they can run side by side, and checks that nothing of it is left.
//! `cargo test -p ozone` builds the examples that these stories run; `--test outer` alone does not.

use std::{
    env,
    ffi::OsStr,
    fs::{self, File},
    io::{BufRead, BufReader, Read},
    os::{
        fd::AsRawFd,
        unix::{
            fs::{MetadataExt, PermissionsExt, symlink},
            process::{CommandExt, ExitStatusExt},
        },
    },
    path::{Path, PathBuf},
    process::{Child, ChildStdout, Command, ExitStatus, Stdio},
};

const BASE: &str = "/srv/zozne";
const UID: u32 = 64_100;
const GID: u32 = 64_200;

/// `false`, with a word why, where these tests cannot run.
fn is_root(story: &str) -> bool {
    let root = nix::unistd::geteuid().is_root();
    if !root {
        println!("{story}: not run: needs root, for namespaces, mounts and device nodes");
    }
    root
}

/// A control program of a story's own, and what is left of it at the end.
struct Host {
    program: String,
    folder: tempfile::TempDir,
}

/// What one run of `ozone` gave.
struct Outcome {
    status: ExitStatus,
    out: String,
    err: String,
}

impl Outcome {
    #[track_caller]
    fn has(&self, line: &str) {
        let found = self.out.lines().any(|l| l == line);
        assert!(found, "no line {line:?} in\n{}{}", self.out, self.err);
    }

    /// The value of a line of `/proc/self/status`.
    #[track_caller]
    fn status_line(&self, key: &str) -> Vec<&str> {
        let line = self
            .out
            .lines()
            .find_map(|l| l.strip_prefix(key)?.strip_prefix(':'));
        line.unwrap_or_else(|| panic!("no {key} in\n{}{}", self.out, self.err))
            .split_whitespace()
            .collect()
    }
}

impl Host {
    fn new(story: &str) -> Self {
        let folder = tempfile::tempdir().expect("folder");
        let open = fs::Permissions::from_mode(0o755);
        fs::set_permissions(folder.path(), open).expect("mode");
        let host = Self {
            program: format!("probe-{story}-{}", std::process::id()),
            folder,
        };
        let examples = Path::new(env!("CARGO_BIN_EXE_ozone")).with_file_name("examples");
        for (example, name) in [("vm_probe", host.program.as_str()), ("jail_probe", "block")] {
            fs::copy(examples.join(example), host.path(name)).expect("a built example");
        }
        host
    }

    fn path(&self, name: impl AsRef<Path>) -> PathBuf {
        self.folder.path().join(name)
    }

    fn file(&self, name: &str, mode: u32) -> PathBuf {
        let path = self.path(name);
        fs::write(&path, "content").expect("file");
        fs::set_permissions(&path, fs::Permissions::from_mode(mode)).expect("mode");
        path
    }

    /// Whether the file system of the temporary folder has id-mapped mounts; otherwise ozone must
    /// say so, and what to do about it.
    #[track_caller]
    fn has_id_maps(&self) -> bool {
        let own = self.file("own", 0o600).display().to_string();
        let tried = self.run("maps", &["-source", &own], &["-exit", "0"]);
        if tried.status.success() {
            self.clean("maps");
            return true;
        }
        let wanted = format!("chown {UID}:{GID}");
        assert!(tried.err.trim_end().ends_with(&wanted), "{}", tried.err);
        println!("files of others: not run: the temporary folder has no id-mapped mounts");
        false
    }

    /// The jail's folder on the host.
    fn jail(&self, name: &str) -> PathBuf {
        Path::new(BASE).join(&self.program).join(name)
    }

    fn ozone(&self, name: &str) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_ozone"));
        command
            .args(["-name", name, "-exec_file"])
            .arg(self.path(&self.program))
            .args(["-uid", &UID.to_string(), "-gid", &GID.to_string()]);
        command
    }

    fn run<A: AsRef<OsStr>>(&self, name: &str, own: &[A], vm: &[&str]) -> Outcome {
        let mut command = self.ozone(name);
        command.args(own).arg("--").args(vm);
        finish(command)
    }

    /// Whether all of it could be removed.
    fn try_clean(&self, name: &str) -> bool {
        let mut command = self.ozone(name);
        command.arg("-clean-resource");
        finish(command).status.success()
    }

    #[track_caller]
    fn clean(&self, name: &str) {
        let mut command = self.ozone(name);
        command.arg("-clean-resource");
        let outcome = finish(command);
        assert!(outcome.status.success(), "{}", outcome.err);
    }

    /// Nothing is left: no folder, no cgroup, no mount.
    #[track_caller]
    fn leaves_nothing(&self) {
        let folder = Path::new(BASE).join(&self.program);
        assert!(!folder.exists(), "{} is left", folder.display());
        for group in cgroups(&self.program) {
            assert!(!group.exists(), "{} is left", group.display());
        }
        let mounts = fs::read_to_string("/proc/self/mountinfo").expect("mounts");
        assert!(!mounts.contains(&self.program), "a mount is left");
    }
}

fn finish(mut command: Command) -> Outcome {
    let output = command.stdin(Stdio::null()).output().expect("ozone runs");
    Outcome {
        status: output.status,
        out: String::from_utf8_lossy(&output.stdout).into_owned(),
        err: String::from_utf8_lossy(&output.stderr).into_owned(),
    }
}

/// Every place where a group of this program could be.
fn cgroups(program: &str) -> Vec<PathBuf> {
    let text = fs::read_to_string("/proc/self/mountinfo").expect("mounts");
    text.lines()
        .filter(|l| l.contains(" - cgroup"))
        .filter_map(|l| l.split(' ').nth(4))
        .map(|mount| Path::new(mount).join("zozne").join(program))
        .collect()
}

/// Process ids of a process's children.
fn children(pid: u32) -> Vec<u32> {
    let path = format!("/proc/{pid}/task/{pid}/children");
    let text = fs::read_to_string(path).expect("children");
    text.split_whitespace()
        .map(|p| p.parse().expect("pid"))
        .collect()
}

/// A VM that runs, with its output.
struct Running {
    ozone: Child,
    lines: BufReader<ChildStdout>,
}

impl Running {
    /// Starts it and waits for its line `ready`.
    fn start(mut command: Command) -> Self {
        let mut ozone = command
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .spawn()
            .expect("ozone runs");
        let lines = BufReader::new(ozone.stdout.take().expect("a pipe"));
        let mut running = Self { ozone, lines };
        running.until("ready 2");
        running
    }

    fn line(&mut self) -> String {
        let mut line = String::new();
        self.lines.read_line(&mut line).expect("output");
        line.trim_end().to_owned()
    }

    #[track_caller]
    fn until(&mut self, wanted: &str) {
        loop {
            let line = self.line();
            assert!(!line.is_empty(), "ended before {wanted:?}");
            if line == wanted {
                return;
            }
        }
    }

    fn signal(&self, signal: nix::sys::signal::Signal) {
        let pid = nix::unistd::Pid::from_raw(self.ozone.id() as i32);
        nix::sys::signal::kill(pid, signal).expect("a living ozone");
    }

    fn end(mut self) -> (ExitStatus, String) {
        let status = self.ozone.wait().expect("an end");
        let mut rest = String::new();
        self.lines.read_to_string(&mut rest).expect("output");
        (status, rest)
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        // After a failure it must not outlive its story; otherwise it has ended.
        let _ = self.ozone.kill();
        let _ = self.ozone.wait();
    }
}

#[test]
fn the_vm_sees_what_it_needs_and_no_more() {
    if !is_root("the_vm_sees_what_it_needs_and_no_more") {
        return;
    }
    let host = Host::new("sees");
    let sources = [
        PathBuf::from("-source"),
        host.file("kernel", 0o644),
        host.file("disk", 0o600),
        host.file("seed", 0o600),
    ];
    let id_maps = host.has_id_maps();
    if !id_maps {
        for name in ["disk", "seed"] {
            std::os::unix::fs::chown(host.path(name), Some(UID), Some(GID)).expect("owner");
        }
    }
    // Told by another path than `./NAME`, which would say that the command line writes it.
    let vm = [
        "-kernel",
        "./kernel",
        "-drive",
        "file=./disk,id=d",
        "-drive",
        "file=./seed,id=s,readonly=on",
        "-list",
        "/",
        "-list",
        "/dev",
        "-list",
        "/proc",
        "-fds",
        "-status",
        "-env",
        "-append-to",
        "/proc/../disk",
        "-append-to",
        "/proc/../kernel",
        "-append-to",
        "/proc/../seed",
        "-read",
        "/proc/../seed",
        "-write",
        "socket",
        "-write",
        "/dev/x",
        "-write",
        "/proc/x",
        "-exit",
        "0",
    ];
    // A descriptor that nobody names, not closed at exec.
    let leak = File::open("/dev/null").expect("null");
    let mut command = host.ozone("vm");
    command.args(&sources).arg("--").args(vm);
    command
        .env("SECRET", "x")
        .env("STRATOVIRT_LOG_LEVEL", "info");
    keep(&mut command, leak.as_raw_fd());
    let seen = finish(command);
    assert!(seen.status.success(), "{}{}", seen.out, seen.err);
    let program = &host.program;
    seen.has(&format!(
        "list /: block dev disk kernel {program} proc seed"
    ));
    seen.has("list /dev: kvm");
    seen.has("list /proc: 2 self thread-self");
    seen.has("list /proc/self/fd: 0 1 2 3"); // 3 reads the list
    seen.has("env STRATOVIRT_LOG_LEVEL=info");
    assert!(!seen.out.contains("SECRET"));
    seen.has("append /proc/../disk: Ok(())");
    seen.has("append /proc/../kernel: Err(PermissionDenied)");
    seen.has("append /proc/../seed: Err(ReadOnlyFilesystem)");
    seen.has("read /proc/../seed: Ok(7)");
    seen.has("write socket: Ok(())");
    seen.has("write /dev/x: Err(ReadOnlyFilesystem)");
    let (uid, gid) = (UID.to_string(), GID.to_string());
    assert_eq!(seen.status_line("Uid"), [uid.as_str(); 4]);
    assert_eq!(seen.status_line("Gid"), [gid.as_str(); 4]);
    assert!(seen.status_line("Groups").is_empty());
    assert_eq!(seen.status_line("NoNewPrivs"), ["1"]);
    assert_eq!(seen.status_line("Pid"), ["2"]);
    for set in ["CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb"] {
        assert_eq!(seen.status_line(set), ["0000000000000000"], "{set}");
    }
    // The host's files keep their owner; what the VM wrote is there.
    let disk = fs::metadata(host.path("disk")).expect("disk");
    let owner = if id_maps { (0, 0) } else { (UID, GID) };
    assert_eq!((disk.uid(), disk.gid()), owner);
    assert_eq!(disk.mode() & 0o777, 0o600);
    let content = fs::read_to_string(host.path("disk")).expect("disk");
    assert_eq!(content, "contentprobe");
    // What the VM made can be reached from outside.
    let made = fs::metadata(host.jail("vm").join("socket")).expect("the VM's file");
    assert_eq!(made.uid(), UID);
    host.clean("vm");
    host.clean("vm");
    host.leaves_nothing();
}

/// Leaves a descriptor open in the command.
fn keep(command: &mut Command, fd: i32) {
    #[allow(unsafe_code)]
    // SAFETY: only calls fcntl, on a descriptor that lives until the command has run.
    unsafe {
        command.pre_exec(move || match nix::libc::fcntl(fd, nix::libc::F_SETFD, 0) {
            0 => Ok(()),
            _ => Err(std::io::Error::last_os_error()),
        });
    }
}

#[test]
fn named_descriptors_and_devices_are_kept() {
    if !is_root("named_descriptors_and_devices_are_kept") {
        return;
    }
    let host = Host::new("named");
    let null = File::open("/dev/null").expect("null");
    let number = null.as_raw_fd();
    let mut command = host.ozone("vm");
    command.args(["--", "-netdev", &format!("tap,id=n,fd={number}")]);
    command.args([
        "-netdev",
        "tap,id=m,ifname=t",
        "-device",
        "vhost-vsock-device",
    ]);
    command.args(["-fds", "-list", "/dev", "-list", "/dev/net", "-exit", "0"]);
    keep(&mut command, number);
    let seen = finish(command);
    let list = seen
        .out
        .lines()
        .find(|l| l.starts_with("list /proc/self/fd"));
    let kept = format!(" {number}");
    assert!(
        list.is_some_and(|l| l.contains(&kept)),
        "{}{}",
        seen.out,
        seen.err
    );
    seen.has("list /dev: kvm net vhost-vsock");
    seen.has("list /dev/net: tun");
    host.clean("vm");

    let missing = host.run::<&str>("vm", &[], &["-netdev", "tap,fd=987"]);
    assert!(
        missing.err.starts_with("ozone: fd=987: "),
        "{}",
        missing.err
    );
    host.leaves_nothing();
}

#[test]
fn device_jails_are_complete_inside() {
    if !is_root("device_jails_are_complete_inside") {
        return;
    }
    let host = Host::new("nested");
    // In strict mode the probe tells of every layer, or fails.
    let seen = host.run::<&str>("vm", &[], &["-device-jail", "-exit", "0"]);
    let layers: Vec<_> = seen
        .out
        .lines()
        .filter(|l| l.starts_with("layer "))
        .collect();
    assert!(layers.len() >= 14, "{}{}", seen.out, seen.err);
    assert!(layers.iter().all(|l| l.ends_with(": on")), "{layers:?}");
    assert!(seen.out.contains("jailed: Landlock ABI"), "{}", seen.out);
    host.clean("vm");
    host.leaves_nothing();
}

#[test]
fn capabilities_are_those_that_were_asked_for() {
    if !is_root("capabilities_are_those_that_were_asked_for") {
        return;
    }
    let host = Host::new("caps");
    let wanted = ["-capability", "CAP_NET_ADMIN", "CAP_SYS_NICE"];
    let seen = host.run("vm", &wanted, &["-status", "-exit", "0"]);
    let mask = format!("{:016x}", 1u64 << 12 | 1 << 23);
    for set in ["CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb"] {
        assert_eq!(seen.status_line(set), [mask.as_str()], "{set}");
    }
    host.clean("vm");
    host.leaves_nothing();
}

#[test]
fn the_end_is_the_vms_end() {
    if !is_root("the_end_is_the_vms_end") {
        return;
    }
    let host = Host::new("end");
    let ended = host.run::<&str>("vm", &[], &["-exit", "7"]);
    assert_eq!(ended.status.code(), Some(7));
    host.clean("vm");
    let aborted = host.run::<&str>("vm", &[], &["-abort"]);
    assert_eq!(aborted.status.signal(), Some(6));
    assert!(!aborted.status.core_dumped());
    host.clean("vm");
    // What the VM's other processes still do when it ends, they may finish.
    let orphaned = host.run::<&str>("vm", &[], &["-orphan", "late", "-exit", "3"]);
    assert_eq!(orphaned.status.code(), Some(3));
    let late = fs::read_to_string(host.jail("vm").join("late")).expect("the orphan's file");
    assert_eq!(late, "after the end");
    host.clean("vm");
    host.leaves_nothing();
}

#[test]
fn the_two_processes_that_stay_can_only_wait_and_pass_on() {
    use nix::sys::signal::{Signal, kill};
    if !is_root("the_two_processes_that_stay_can_only_wait_and_pass_on") {
        return;
    }
    let host = Host::new("stay");
    // What ended the VM ends its parent, which may not signal anybody, itself neither.
    for signal in [Signal::SIGKILL, Signal::SIGUSR2, Signal::SIGALRM] {
        let mut command = host.ozone("vm");
        command.args(["--", "-ready", "-wait", "-hang"]);
        let mut vm = Running::start(command);
        // Once it passes signals on, the parent has given its rights up.
        vm.signal(Signal::SIGUSR1);
        vm.until("signal SIGUSR1");
        let first = children(vm.ozone.id())[0];
        for (pid, uid) in [(vm.ozone.id(), 0), (first, UID)] {
            let status = fs::read_to_string(format!("/proc/{pid}/status")).expect("status");
            let value = |key: &str| {
                let line = status
                    .lines()
                    .find_map(|l| l.strip_prefix(key)?.strip_prefix(":\t"));
                line.unwrap_or_else(|| panic!("no {key} in {status}"))
                    .to_owned()
            };
            for (key, wanted) in [
                ("Seccomp", "2"),
                ("Seccomp_filters", "1"),
                ("NoNewPrivs", "1"),
                ("Threads", "1"),
            ] {
                assert_eq!(value(key), wanted, "{key} of {pid}");
            }
            for set in ["CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb"] {
                assert_eq!(value(set), "0000000000000000", "{set} of {pid}");
            }
            assert_eq!(value("Uid"), [uid.to_string().as_str(); 4].join("\t"));
            let core = fs::read_to_string(format!("/proc/{pid}/limits")).expect("limits");
            let core = core
                .lines()
                .find(|l| l.starts_with("Max core file size"))
                .expect("a line");
            assert_eq!(core.split_whitespace().nth(4), Some("0"), "{core}");
        }
        let inside = nix::unistd::Pid::from_raw(children(first)[0] as i32);
        kill(inside, signal).expect("a living VM");
        let (status, _) = vm.end();
        assert_eq!(status.signal(), Some(signal as i32));
        assert!(!status.core_dumped());
        host.clean("vm");
    }
    host.leaves_nothing();
}

#[test]
fn signals_reach_the_vm_and_a_running_vm_is_not_cleaned() {
    use nix::sys::signal::Signal;
    if !is_root("signals_reach_the_vm_and_a_running_vm_is_not_cleaned") {
        return;
    }
    let host = Host::new("signals");
    let mut command = host.ozone("vm");
    command.args([
        "--", "-ready", "-wait", "-wait", "-wait", "-wait", "-wait", "-exit", "4",
    ]);
    let mut vm = Running::start(command);

    let mut clean = host.ozone("vm");
    clean.arg("-clean-resource");
    let refused = finish(clean);
    assert!(!refused.status.success());
    assert!(
        refused.err.contains("-name vm: its VM is running"),
        "{}",
        refused.err
    );
    let again = host.run::<&str>("vm", &[], &["-exit", "0"]);
    assert!(again.err.contains("-name vm: ") && again.err.contains("exists already"));
    assert!(host.jail("vm").exists());

    // Once it passes signals on, the parent has given its rights up.
    vm.signal(Signal::SIGUSR1);
    vm.until("signal SIGUSR1");
    let status = fs::read_to_string(format!("/proc/{}/status", vm.ozone.id())).expect("status");
    for set in ["CapPrm", "CapEff", "CapBnd"] {
        assert!(
            status.contains(&format!("{set}:\t0000000000000000")),
            "{status}"
        );
    }
    // Neither it nor the first process inside holds anything of the host but what it needs.
    let first = children(vm.ozone.id())[0];
    let held = |pid: u32| {
        let links = fs::read_dir(format!("/proc/{pid}/fd")).expect("descriptors");
        let mut held: Vec<_> = links
            .flatten()
            .filter(|link| {
                link.file_name()
                    .to_string_lossy()
                    .parse::<u32>()
                    .unwrap_or(0)
                    > 2
            })
            .filter_map(|link| fs::read_link(link.path()).ok())
            .map(|target| {
                let text = target.to_string_lossy().into_owned();
                text.split(":[").next().unwrap_or_default().to_owned()
            })
            .collect();
        held.sort();
        held
    };
    let jail = host.jail("vm").display().to_string();
    assert_eq!(held(first), [jail.as_str(), "anon_inode", "socket"]);
    assert_eq!(held(vm.ozone.id()), ["anon_inode", "anon_inode", "socket"]);
    for signal in [
        Signal::SIGHUP,
        Signal::SIGQUIT,
        Signal::SIGINT,
        Signal::SIGTERM,
    ] {
        vm.signal(signal);
        vm.until(&format!("signal {signal}"));
    }
    assert_eq!(vm.end().0.code(), Some(4));
    host.clean("vm");
    // The one that the probe does not wait for ends it.
    let mut command = host.ozone("vm");
    command.args(["--", "-ready", "-hang"]);
    let vm = Running::start(command);
    vm.signal(Signal::SIGUSR2);
    assert_eq!(vm.end().0.signal(), Some(Signal::SIGUSR2 as i32));
    host.clean("vm");
    host.leaves_nothing();
}

/// The first process inside is the VM's reaper: whoever kills it ends the VM, and the host's side says so under its filter.
#[test]
fn a_killed_first_process_is_told() {
    use nix::sys::signal::{Signal, kill};
    if !is_root("a_killed_first_process_is_told") {
        return;
    }
    let host = Host::new("first");
    let mut command = host.ozone("vm");
    command
        .args(["--", "-ready", "-wait", "-hang"])
        .stderr(Stdio::piped());
    let mut vm = Running::start(command);
    // Once it passes signals on, the parent is under its filter.
    vm.signal(Signal::SIGUSR1);
    vm.until("signal SIGUSR1");
    let mut errors = vm.ozone.stderr.take().expect("a pipe");
    let first = nix::unistd::Pid::from_raw(children(vm.ozone.id())[0] as i32);
    kill(first, Signal::SIGKILL).expect("a living first process");
    let (status, _) = vm.end();
    assert_eq!(status.code(), Some(1));
    let mut told = String::new();
    errors.read_to_string(&mut told).expect("its errors");
    assert_eq!(told, "ozone: jail: its first process was killed\n");
    host.clean("vm");
    host.leaves_nothing();
}

#[test]
fn a_killed_parent_takes_the_vm_with_it() {
    use nix::sys::signal::Signal;
    if !is_root("a_killed_parent_takes_the_vm_with_it") {
        return;
    }
    let host = Host::new("killed");
    let mut command = host.ozone("vm");
    command.args(["--", "-ready", "-hang"]);
    let vm = Running::start(command);
    vm.signal(Signal::SIGKILL);
    // The output ends when the VM has: it holds the pipe.
    let (status, _) = vm.end();
    assert_eq!(status.signal(), Some(9));
    // Its first process ends at the same time; the lock goes with that one.
    let mut tries = 0;
    loop {
        let mut clean = host.ozone("vm");
        clean.arg("-clean-resource");
        let cleaned = finish(clean);
        if cleaned.status.success() {
            break;
        }
        assert!(cleaned.err.contains("running"), "{}", cleaned.err);
        tries += 1;
        assert!(tries < 1000, "it never ended");
    }
    host.leaves_nothing();
}

#[test]
fn a_vm_in_the_background_outlives_its_parent() {
    if !is_root("a_vm_in_the_background_outlives_its_parent") {
        return;
    }
    let host = Host::new("daemon");
    let mut command = host.ozone("vm");
    command.args(["--", "-daemonize", "-ready", "-wait", "-exit", "0"]);
    let mut ozone = command
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .spawn()
        .expect("ozone runs");
    let mut lines = BufReader::new(ozone.stdout.take().expect("a pipe"));
    assert!(ozone.wait().expect("an end").success());
    let mut line = String::new();
    lines.read_line(&mut line).expect("output");
    assert_eq!(line, "ready 3\n");
    let mut clean = host.ozone("vm");
    clean.arg("-clean-resource");
    assert!(finish(clean).err.contains("its VM is running"));
    // It is the process of this user that has the program open.
    let mut ended = 0;
    for entry in fs::read_dir("/proc").expect("proc").flatten() {
        let Ok(exe) = fs::read_link(entry.path().join("exe")) else {
            continue;
        };
        if exe == Path::new("/").join(&host.program)
            && let Ok(pid) = entry.file_name().to_string_lossy().parse()
        {
            let pid = nix::unistd::Pid::from_raw(pid);
            nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGTERM).expect("living");
            ended += 1;
        }
    }
    assert_eq!(ended, 1);
    line.clear();
    lines
        .read_to_string(&mut line)
        .expect("the end of its output");
    assert_eq!(line, "signal SIGTERM\n");
    let mut tries = 0;
    loop {
        let mut clean = host.ozone("vm");
        clean.arg("-clean-resource");
        if finish(clean).status.success() {
            break;
        }
        tries += 1;
        assert!(tries < 1000, "its first process never ended");
    }
    host.leaves_nothing();
}

#[test]
fn nothing_is_left_when_a_step_fails() {
    if !is_root("nothing_is_left_when_a_step_fails") {
        return;
    }
    let host = Host::new("undo");
    let disk = host.file("disk", 0o666).display().to_string();
    let secret = host.file("secret", 0o000).display().to_string();
    let cases: &[(&[&str], &str)] = &[
        (
            &["-source", "/no/such"],
            "-source /no/such: cannot be opened",
        ),
        (
            &["-source", &disk, "-netns", "/etc/passwd"],
            "-netns /etc/passwd: not a network namespace",
        ),
        (
            &["-source", &disk, "-netns", "/no/ns"],
            "-netns /no/ns: cannot be opened",
        ),
        (
            &["-source", "/dev/null"],
            "-source /dev/null: not a regular file",
        ),
        (
            &["-source", &secret],
            "its owner must be allowed to read and write it",
        ),
    ];
    for (own, wanted) in cases {
        let failed = host.run("vm", own, &["-exit", "0"]);
        assert_eq!(failed.status.code(), Some(1), "{own:?}");
        assert!(failed.err.contains(wanted), "{own:?}: {}", failed.err);
        host.leaves_nothing();
    }
    let dynamic = {
        let mut command = Command::new(env!("CARGO_BIN_EXE_ozone"));
        command.args([
            "-name",
            "vm",
            "-exec_file",
            "/bin/sh",
            "-uid",
            "1",
            "-gid",
            "1",
            "--",
        ]);
        finish(command)
    };
    assert!(
        dynamic
            .err
            .contains("-exec_file /bin/sh: not statically linked"),
        "{}",
        dynamic.err
    );
    let script = host.file("script", 0o755);
    fs::write(&script, "#!/bin/sh\n").expect("script");
    let mut command = Command::new(env!("CARGO_BIN_EXE_ozone"));
    command
        .args(["-name", "vm", "-uid", "1", "-gid", "1", "-exec_file"])
        .arg(&script)
        .arg("--");
    assert!(finish(command).err.contains("not an ELF file"));
}

#[test]
fn prepared_folders_and_links_are_refused() {
    if !is_root("prepared_folders_and_links_are_refused") {
        return;
    }
    let host = Host::new("links");
    let elsewhere = host.path("elsewhere");
    fs::create_dir(&elsewhere).expect("folder");
    fs::create_dir_all(BASE).expect("base");
    let above = Path::new(BASE).join(&host.program);

    symlink(&elsewhere, &above).expect("link");
    let refused = host.run::<&str>("vm", &[], &["-exit", "0"]);
    assert!(
        refused.err.contains("exists and is not a folder"),
        "{}",
        refused.err
    );
    let mut clean = host.ozone("vm");
    clean.arg("-clean-resource");
    assert!(!finish(clean).status.success());
    fs::remove_file(&above).expect("link");

    fs::create_dir(&above).expect("folder");
    symlink(&elsewhere, above.join("vm")).expect("link");
    let refused = host.run::<&str>("vm", &[], &["-exit", "0"]);
    assert!(refused.err.contains("exists already"), "{}", refused.err);
    fs::remove_file(above.join("vm")).expect("link");

    for (uid, mode) in [(UID, 0o755), (0, 0o777), (0, 0o775)] {
        std::os::unix::fs::chown(&above, Some(uid), Some(0)).expect("owner");
        fs::set_permissions(&above, fs::Permissions::from_mode(mode)).expect("mode");
        let refused = host.run::<&str>("vm", &[], &["-exit", "0"]);
        let wanted = "must belong to root and be writable by root only";
        assert!(refused.err.contains(wanted), "{}", refused.err);
    }
    fs::remove_dir(&above).expect("folder");
    assert_eq!(fs::read_dir(&elsewhere).expect("folder").count(), 0);
    host.clean("vm");
    host.leaves_nothing();
}

#[test]
fn cleaning_survives_what_a_vm_can_leave() {
    if !is_root("cleaning_survives_what_a_vm_can_leave") {
        return;
    }
    let host = Host::new("litter");
    let outside = host.file("outside", 0o644);
    assert!(
        host.run::<&str>("vm", &[], &["-exit", "0"])
            .status
            .success()
    );
    let jail = host.jail("vm");
    symlink(&outside, jail.join("link")).expect("link");
    symlink(host.folder.path(), jail.join("folder")).expect("link");
    let mut deep = jail.join("deep");
    for _ in 0..300 {
        fs::create_dir(&deep).expect("folder");
        fs::write(deep.join("x"), "").expect("file");
        deep.push("d");
    }
    host.clean("vm");
    assert!(outside.exists());
    host.leaves_nothing();
}

/// Which version of cgroups has the controller here, and where.
fn cgroup_with(controller: &str) -> Option<(u8, PathBuf)> {
    let text = fs::read_to_string("/proc/self/mountinfo").expect("mounts");
    text.lines().find_map(|line| {
        let (left, right) = line.split_once(" - ")?;
        let mount = PathBuf::from(left.split(' ').nth(4)?);
        if right.starts_with("cgroup ") {
            let options = right.split(' ').nth(2)?;
            return options
                .split(',')
                .any(|o| o == controller)
                .then_some((1, mount));
        }
        let list = fs::read_to_string(mount.join("cgroup.controllers")).ok()?;
        (right.starts_with("cgroup2 ") && list.split_whitespace().any(|c| c == controller))
            .then_some((2, mount))
    })
}

#[test]
fn limits_are_read_back_from_the_cgroups() {
    use nix::sys::signal::Signal;
    if !is_root("limits_are_read_back_from_the_cgroups") {
        return;
    }
    let (Some((version, memory)), Some((_, cpuset))) =
        (cgroup_with("memory"), cgroup_with("cpuset"))
    else {
        println!("limits: not run: no cgroup hierarchy of version 1 or 2 with memory and cpuset");
        return;
    };
    println!("limits: cgroup version {version}");
    let host = Host::new("limits");
    let own = "-numa 0 -cgroup cpuset.cpus=0 memory.limit_in_bytes=64M";
    let mut command = host.ozone("vm");
    command.args(own.split(' '));
    command.args(["--", "-status", "-ready", "-wait", "-exit", "0"]);
    let vm = Running::start(command);
    let group = |mount: &Path| mount.join("zozne").join(&host.program).join("vm");
    let read = |path: PathBuf| {
        let text = fs::read_to_string(&path);
        text.unwrap_or_else(|e| panic!("{}: {e}", path.display()))
            .trim()
            .to_owned()
    };
    let file = if version == 1 {
        "memory.limit_in_bytes"
    } else {
        "memory.max"
    };
    assert_eq!(read(group(&memory).join(file)), (64 << 20).to_string());
    assert_eq!(read(group(&cpuset).join("cpuset.cpus")), "0");
    assert_eq!(read(group(&cpuset).join("cpuset.mems")), "0");
    // The VM and its first process are in; the parent is not.
    let procs = read(group(&memory).join("cgroup.procs"));
    assert_eq!(procs.lines().count(), 2, "{procs}");
    assert!(!procs.lines().any(|pid| pid == vm.ozone.id().to_string()));
    vm.signal(Signal::SIGTERM);
    assert!(vm.end().0.success());
    host.clean("vm");
    host.leaves_nothing();

    for (own, wanted) in [
        (
            "-numa 0 -cgroup cpuset.cpus=4095",
            "-cgroup cpuset.cpus=4095: 4095 is not there",
        ),
        (
            "-numa 77 -cgroup cpuset.cpus=0",
            "-numa 77: 77 is not there",
        ),
        (
            "-cgroup memory.limit_in_bytes=4096",
            "memory.limit_in_bytes is too small",
        ),
    ] {
        let own: Vec<_> = own.split(' ').collect();
        let failed = host.run("vm", &own, &["-exit", "0"]);
        assert!(failed.err.contains(wanted), "{own:?}: {}", failed.err);
        host.leaves_nothing();
    }
}

#[test]
fn two_vms_cannot_see_each_other() {
    use nix::sys::signal::Signal;
    if !is_root("two_vms_cannot_see_each_other") {
        return;
    }
    let host = Host::new("two");
    // A process in a network namespace of its own lends it.
    let mut lender = Command::new("cat");
    lender.stdin(Stdio::piped()).stdout(Stdio::null());
    #[allow(unsafe_code)]
    // SAFETY: one system call.
    unsafe {
        lender.pre_exec(|| {
            let flags = nix::sched::CloneFlags::CLONE_NEWNET;
            nix::sched::unshare(flags).map_err(std::io::Error::from)
        });
    }
    let mut lender = lender.spawn().expect("cat");
    let network = format!("/proc/{}/ns/net", lender.id());
    let mut command = host.ozone("one");
    command.args(["-netns", &network, "--", "-ready", "-wait", "-exit", "0"]);
    let one = Running::start(command);
    let other = (UID + 1).to_string();
    let mut command = Command::new(env!("CARGO_BIN_EXE_ozone"));
    command
        .args(["-name", "two", "-exec_file"])
        .arg(host.path(&host.program))
        .args(["-uid", &other, "-gid", &other])
        .args(["--", "-list", "/proc", "-ready", "-wait", "-exit", "0"]);
    let mut two = Running::start(command);
    let vm_of = |ozone: u32| children(children(ozone)[0])[0];
    let (first, second) = (vm_of(one.ozone.id()), vm_of(two.ozone.id()));
    let namespace = |pid: u32, kind: &str| {
        fs::read_link(format!("/proc/{pid}/ns/{kind}")).expect("a namespace")
    };
    for kind in ["mnt", "pid", "ipc", "uts", "cgroup", "net"] {
        assert_ne!(namespace(first, kind), namespace(second, kind), "{kind}");
    }
    for kind in ["mnt", "pid", "ipc", "uts", "cgroup"] {
        assert_ne!(
            namespace(first, kind),
            namespace(std::process::id(), kind),
            "{kind}"
        );
    }
    assert_eq!(
        namespace(first, "net"),
        fs::read_link(&network).expect("lent")
    );
    two.signal(Signal::SIGTERM);
    two.until("signal SIGTERM");
    one.signal(Signal::SIGTERM);
    for vm in [one, two] {
        assert!(vm.end().0.success());
    }
    lender
        .kill()
        .and_then(|()| lender.wait())
        .expect("the lender");
    host.clean("one");
    host.clean("two");
    host.leaves_nothing();
}

#[test]
fn the_callers_terminal_and_keys_stay_outside() {
    if !is_root("the_callers_terminal_and_keys_stay_outside") {
        return;
    }
    let host = Host::new("session");
    let words = ["-session", "-ready", "-wait", "-exit", "0"];
    let run = |mut command: Command| {
        let pty = nix::pty::openpty(None, None).expect("a pseudo terminal");
        let terminal = || Stdio::from(pty.slave.try_clone().expect("a copy"));
        command.stdin(terminal()).stdout(Stdio::piped());
        #[allow(unsafe_code)]
        // SAFETY: two system calls; descriptor 0 is the terminal by then.
        unsafe {
            command.pre_exec(|| {
                nix::unistd::setsid()?;
                match nix::libc::ioctl(0, nix::libc::TIOCSCTTY, 0) {
                    0 => Ok(()),
                    _ => Err(std::io::Error::last_os_error()),
                }
            });
        }
        let mut child = command.spawn().expect("it runs");
        let mut lines = BufReader::new(child.stdout.take().expect("a pipe"));
        let mut seen = Vec::new();
        while !seen.last().is_some_and(|l: &String| l.starts_with("ready")) {
            let mut line = String::new();
            assert_ne!(lines.read_line(&mut line).expect("output"), 0, "{seen:?}");
            seen.push(line.trim_end().to_owned());
        }
        // Control-C at the terminal.
        nix::unistd::write(&pty.master, b"\x03").expect("a key");
        let mut rest = String::new();
        lines.read_to_string(&mut rest).expect("output");
        assert_eq!(rest, "signal SIGINT\n");
        assert!(child.wait().expect("an end").success());
        seen
    };
    let mut command = Command::new(host.path(&host.program));
    command.args(words);
    let outside = run(command);
    let mut command = host.ozone("vm");
    command.arg("--").args(words);
    let inside = run(command);
    assert_ne!(
        outside[0], "terminal 0",
        "the pseudo terminal did not become the controlling one"
    );
    assert_eq!(inside[0], "terminal 0");
    assert!(inside[1].starts_with("keyring "), "{inside:?}");
    assert_ne!(inside[1], outside[1]);
    host.clean("vm");
    host.leaves_nothing();
}

/// A tenant who owns a folder above and changes it as fast as it goes: whatever is there when ozone looks, it makes nothing through a
/// link, gives nothing away, and uses no folder of the tenant's.
#[test]
fn a_folder_that_turns_into_a_link_during_set_up_leads_nowhere() {
    if !is_root("a_folder_that_turns_into_a_link_during_set_up_leads_nowhere") {
        return;
    }
    let host = Host::new("swap");
    fs::create_dir_all(BASE).expect("base");
    let above = Path::new(BASE).join(&host.program);
    let own = Path::new(BASE).join(format!("{}-tenants", host.program));
    let victim = host.path("victim");
    fs::create_dir(&victim).expect("folder");
    // What a launcher that follows would change: a program's place, a device folder, a file of root's.
    fs::create_dir(victim.join("vm")).expect("folder");
    fs::write(victim.join("vm").join(&host.program), "root's").expect("file");
    let owner = |path: &Path| {
        fs::metadata(path)
            .map(|m| (m.uid(), m.gid(), m.mode()))
            .expect("there")
    };
    let before = [owner(&victim), owner(&victim.join("vm"))];
    let stop = std::sync::atomic::AtomicBool::new(false);
    let (mut refused, mut started) = (0, 0);
    std::thread::scope(|scope| {
        let swapper = scope.spawn(|| {
            let mut rounds = 0u32;
            while !stop.load(std::sync::atomic::Ordering::Relaxed) {
                // All of it fails now and then, when ozone has something there.
                let _ = fs::create_dir(&own);
                let _ = std::os::unix::fs::chown(&own, Some(UID), Some(GID));
                let _ = fs::rename(&own, &above);
                let _ = fs::remove_dir(&above);
                let _ = symlink(&victim, &above);
                let _ = fs::remove_file(&above);
                rounds += 1;
            }
            rounds
        });
        for _ in 0..150 {
            let outcome = host.run::<&str>("vm", &[], &["-exit", "0"]);
            if outcome.status.success() {
                started += 1;
                let cleaned = (0..100).any(|_| host.try_clean("vm"));
                assert!(cleaned, "it is never clean");
            } else {
                refused += 1;
                assert!(outcome.err.starts_with("ozone: "), "{}", outcome.err);
            }
        }
        stop.store(true, std::sync::atomic::Ordering::Relaxed);
        assert!(swapper.join().expect("the tenant") > 150);
    });
    println!("{refused} refused, {started} started");
    assert!(refused > 0, "the tenant was never in the way");
    assert_eq!(before, [owner(&victim), owner(&victim.join("vm"))]);
    let names = |path: &Path| {
        fs::read_dir(path)
            .expect("folder")
            .flatten()
            .map(|e| e.file_name())
            .collect::<Vec<_>>()
    };
    assert_eq!(names(&victim), ["vm"]);
    assert_eq!(names(&victim.join("vm")), [host.program.as_str()]);
    assert_eq!(
        fs::read_to_string(victim.join("vm").join(&host.program)).expect("file"),
        "root's"
    );
    let _ = fs::remove_file(&above);
    let _ = fs::remove_dir(&own);
    host.clean("vm");
    host.leaves_nothing();
}

/// Files that wait in a folder of the jail's name, hard links to root's among them, are neither used nor changed.
#[test]
fn a_folder_that_waits_with_hard_links_is_refused() {
    if !is_root("a_folder_that_waits_with_hard_links_is_refused") {
        return;
    }
    let host = Host::new("hard");
    let jail = host.jail("vm");
    let secret = host.file("secret", 0o600);
    // On the file system of the jail, so that a hard link is possible.
    let there = Path::new(BASE).join(format!("secret-{}", std::process::id()));
    fs::create_dir_all(&jail).expect("folder");
    fs::copy(&secret, &there).expect("file");
    for name in [host.program.as_str(), "block", "disk"] {
        fs::hard_link(&there, jail.join(name)).expect("link");
    }
    std::os::unix::fs::chown(&jail, Some(UID), Some(GID)).expect("owner");
    let before = fs::metadata(&there).expect("file");
    let disk = host.file("disk", 0o666).display().to_string();
    let refused = host.run("vm", &["-source", &disk], &["-exit", "0"]);
    assert_eq!(refused.status.code(), Some(1));
    assert!(refused.err.contains("exists already"), "{}", refused.err);
    let same = |path: &Path| {
        let now = fs::metadata(path).expect("file");
        assert_eq!(
            (now.uid(), now.gid(), now.mode()),
            (before.uid(), before.gid(), before.mode())
        );
        assert_eq!(fs::read_to_string(path).expect("file"), "content");
    };
    same(&there);
    // Cleaning takes the names, and nothing of the file.
    host.clean("vm");
    same(&there);
    fs::remove_file(&there).expect("file");
    host.leaves_nothing();
}

/// A process of the VM's user, outside of the jail, that works in the folder while root removes it.
#[test]
fn cleaning_is_not_led_astray_by_who_still_works_there() {
    if !is_root("cleaning_is_not_led_astray_by_who_still_works_there") {
        return;
    }
    let host = Host::new("astray");
    let victim = host.path("victim");
    fs::create_dir(&victim).expect("folder");
    fs::write(victim.join("kept"), "").expect("file");
    for _ in 0..20 {
        assert!(
            host.run::<&str>("vm", &[], &["-exit", "0"])
                .status
                .success()
        );
        let jail = host.jail("vm");
        let mut worker = Command::new(host.path(&host.program))
            .args(["-ready", "-churn"])
            .arg(&victim)
            .uid(UID)
            .gid(GID)
            .current_dir(&jail)
            .stdout(Stdio::piped())
            .spawn()
            .expect("a process of the tenant's");
        let mut line = String::new();
        let mut out = BufReader::new(worker.stdout.take().expect("a pipe"));
        out.read_line(&mut line).expect("a word");
        assert!(line.starts_with("ready"), "{line}");
        let mut tries = 0;
        while !host.try_clean("vm") {
            tries += 1;
            assert!(tries < 100, "it is never clean");
        }
        worker
            .kill()
            .and_then(|()| worker.wait())
            .expect("a living worker");
        assert!(!jail.exists());
        assert!(victim.join("kept").exists());
    }
    assert_eq!(fs::read_dir(&victim).expect("folder").count(), 1);
    host.leaves_nothing();
}

/// Failures that only the kernel's exec can tell, after everything else was done.
#[test]
fn nothing_is_left_when_the_program_cannot_be_executed() {
    if !is_root("nothing_is_left_when_the_program_cannot_be_executed") {
        return;
    }
    let host = Host::new("exec");
    let mut program = fs::read(host.path(&host.program)).expect("the program");
    // No program headers (System V ABI, chapter 4: `e_phnum`): nothing asks for a loader, and there is nothing to load.
    program[56..58].fill(0);
    fs::write(host.path(&host.program), program).expect("a broken program");
    for limits in ["", "-cgroup memory.limit_in_bytes=64M"] {
        if !limits.is_empty() && cgroup_with("memory").is_none() {
            println!("with limits: not run: no cgroup hierarchy has the memory controller");
            continue;
        }
        let own: Vec<_> = limits.split_whitespace().collect();
        let failed = host.run("vm", &own, &["-exit", "0"]);
        assert_eq!(failed.status.code(), Some(1));
        let wanted = format!(
            "ozone: -exec_file {}: cannot be executed: Exec format error\n",
            host.program
        );
        assert_eq!(failed.err, wanted);
        host.leaves_nothing();
    }
}

/// One wrong value of each argument, and the whole message.
#[test]
fn wrong_values_have_exact_messages() {
    let known = "-name, -exec_file, -gid, -uid, -capability, -netns, -source, -numa, -cgroup, -clean-resource";
    let after = "what is for stratovirt comes after --";
    let ids = "not a number in the allowed range, 1 to 4294967294";
    let bytes = format!(
        "not a number of bytes; allowed: 1 to {}, also with K, M or G",
        i64::MAX
    );
    let cases: &[(&str, &str)] = &[
        (
            "-name a/b",
            "-name a/b: must be a plain name: no '/', no control character, not '.' or '..'",
        ),
        ("-uid x", &format!("-uid x: {ids}")),
        (
            "-uid -1",
            &format!("-1: no such argument; allowed are {known}; {after}"),
        ),
        (
            "-uid 0",
            "-uid 0: a VM never runs as root; allowed: 1 to 4294967294",
        ),
        ("-gid 4294967295", &format!("-gid 4294967295: {ids}")),
        (
            "-capability CAP_X",
            "-capability CAP_X: no such capability; allowed are the names of capabilities(7), from CAP_CHOWN to CAP_CHECKPOINT_RESTORE",
        ),
        ("-netns", "-netns: needs a value"),
        (
            "-netns /a /b",
            &format!("-netns /b: takes one value; {after}"),
        ),
        ("-source /", "-source /: does not end with a file name"),
        (
            "-source /x/dev",
            "-source /x/dev: the name dev is taken in the jail: by dev, proc, a program or another source",
        ),
        (
            "-numa 0",
            "-numa 0: has no effect without -cgroup cpuset.cpus=LIST",
        ),
        (
            "-numa x -cgroup cpuset.cpus=0",
            "-numa x: not a list of numbers from 0 to 65535; allowed is a memory node, or a list like 0-1",
        ),
        (
            "-cgroup cpuset.cpus=0",
            "-cgroup cpuset.cpus=0: also needs -numa NODE, the memory node that belongs to these processors",
        ),
        (
            "-cgroup cpuset.cpus=1-0 -numa 0",
            "-cgroup cpuset.cpus=1-0: a range goes upwards; allowed is a list of processors, like 0-1,4",
        ),
        (
            "-cgroup memory.limit_in_bytes=1T",
            &format!("-cgroup memory.limit_in_bytes=1T: {bytes}"),
        ),
        (
            "-cgroup pids.max=3",
            "-cgroup pids.max=3: no such controller; allowed: cpuset.cpus, memory.limit_in_bytes",
        ),
        (
            "-clean-resource now",
            &format!("-clean-resource now: takes no value; {after}"),
        ),
        (
            "-color red",
            &format!("-color: no such argument; allowed are {known}; {after}"),
        ),
    ];
    for (words, wanted) in cases {
        let mut command = Command::new(env!("CARGO_BIN_EXE_ozone"));
        // The least that is needed, but for what the case gives itself.
        for (option, value) in [
            ("-name", "vm"),
            ("-exec_file", "/x/stratovirt"),
            ("-uid", "1"),
            ("-gid", "1"),
        ] {
            if !words.split(' ').any(|w| w == option) {
                command.args([option, value]);
            }
        }
        command.args(words.split(' '));
        let outcome = finish(command);
        assert_eq!(outcome.err, format!("ozone: {wanted}\n"), "{words}");
        assert_eq!(outcome.status.code(), Some(1), "{words}");
        assert_eq!(outcome.out, "", "{words}");
    }
}
