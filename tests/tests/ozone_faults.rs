//! # `ozone` when something goes wrong, at every single system call
//!
//! **Job.** Let every call that building an outer jail takes fail once, and kill `ozone` at every one of them: a start that
//! fails leaves nothing, and after a kill `-clean-resource` leaves nothing, as often as one likes.
//! **Who is not trusted.** Nobody: the faults are the machine's (no memory, no descriptors, a broken disk, the OOM killer).
//! **Why this way.** The list of calls is taken from a start that was watched by strace, which then injects the faults from
//! outside: no step can be forgotten, and the program under test has no hooks.
#![allow(clippy::unwrap_used)] // in a test, a panic is the report

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::ops::RangeInclusive;
use std::os::unix::fs::{PermissionsExt, chown};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;
use tests::host::require_root;
use tests::lab::ensure_packages;
use tests::procfs;
use tests::vm::binary;
use tests::wait::{Deadline, Watched};

const UID: u32 = 64_401;
/// How long the rest of a killed jail may take to end.
const END: Duration = Duration::from_secs(20);

/// Calls that are no steps: memory (a failure is the allocator's, and ends the program at once), the start and end of a
/// program, and what strace itself needs to start it.
const NO_STEPS: [&str; 19] = [
    "arch_prctl",
    "brk",
    "execve",
    "exit",
    "exit_group",
    "getrandom",
    "madvise",
    "mmap",
    "mprotect",
    "mremap",
    "munmap",
    "prlimit64",
    "readlink",
    "rseq",
    "rt_sigreturn",
    "sched_getaffinity",
    "set_robust_list",
    "set_tid_address",
    "sigaltstack",
];

/// Calls that the kernel does not refuse with these arguments; a refused close would even leave the descriptor open, which it
/// never does.
const NEVER_FAIL: [&str; 8] = [
    "close",
    "pause",
    "geteuid",
    "getpid",
    "gettid",
    "rt_sigaction",
    "rt_sigprocmask",
    "umask",
];

/// A host with a program of its own, a network namespace and files for a jail.
struct Host {
    program: String,
    network: String,
    dir: tempfile::TempDir,
    limits: Vec<String>,
}

/// One run of `ozone`.
struct Outcome {
    success: bool,
    /// Whether the control program was executed.
    ran: bool,
    errors: String,
    trace: String,
}

impl Host {
    fn new(story: &str) -> Self {
        require_root();
        ensure_packages(&["strace", "iproute2"]).unwrap();
        let program = format!("faults-{story}-{}", std::process::id());
        let network = program.clone();
        let added = Command::new("ip")
            .args(["netns", "add", &network])
            .status()
            .unwrap();
        assert!(added.success());
        let dir = tempfile::tempdir().unwrap();
        fs::set_permissions(dir.path(), fs::Permissions::from_mode(0o755)).unwrap();
        fs::copy(binary("stratovirt").unwrap(), dir.path().join(&program)).unwrap();
        fs::copy(binary("block").unwrap(), dir.path().join("block")).unwrap();
        for name in ["kernel", "disk"] {
            let path = dir.path().join(name);
            fs::write(&path, name).unwrap();
            chown(&path, Some(UID), Some(UID)).unwrap();
        }
        // Root's own, so that it takes an id-mapped mount, where the file system has them.
        fs::write(dir.path().join("mapped"), "").unwrap();
        fs::set_permissions(dir.path().join("mapped"), fs::Permissions::from_mode(0o600)).unwrap();
        let mounts = fs::read_to_string("/proc/self/mountinfo").unwrap();
        let limits = if mounts.contains(" - cgroup") {
            [
                "-numa",
                "0",
                "-cgroup",
                "cpuset.cpus=0",
                "memory.limit_in_bytes=1G",
            ]
            .map(str::to_owned)
            .to_vec()
        } else {
            println!("faults of cgroups: not run: no hierarchy is mounted");
            Vec::new()
        };
        let mut host = Self {
            program,
            network,
            dir,
            limits,
        };
        let tried = host.run(&[]);
        if !tried.success {
            assert!(
                tried.errors.contains("no id-mapped mounts"),
                "{}",
                tried.errors
            );
            println!("faults of id-mapped mounts: not run: the temporary folder has none");
            chown(host.dir.path().join("mapped"), Some(UID), Some(UID)).unwrap();
            host.leaves_nothing("a refused source");
        } else {
            host.clean();
        }
        // One plain run, so that what is made once for all is there or is not, as in every later one.
        host.limits.shrink_to_fit();
        host
    }

    fn ozone(&self) -> Command {
        let mut command = Command::new(binary("ozone").unwrap());
        self.words(&mut command);
        command
    }

    fn words(&self, command: &mut Command) {
        let uid = UID.to_string();
        command
            .args(["-name", "vm", "-exec_file"])
            .arg(self.dir.path().join(&self.program))
            .args(["-uid", &uid, "-gid", &uid]);
    }

    /// Starts a jail whose control program only tells its version, under strace with these words.
    fn run(&self, strace: &[String]) -> Outcome {
        let log = self.dir.path().join("trace");
        let mut command = Command::new("strace");
        command
            .args(["-f", "-qq", "-o"])
            .arg(&log)
            .args(strace)
            .arg(binary("ozone").unwrap());
        self.words(&mut command);
        command
            .args(["-netns", &format!("/run/netns/{}", self.network)])
            .args(&self.limits);
        command
            .arg("-source")
            .args(["kernel", "disk", "mapped"].map(|n| self.dir.path().join(n)));
        command.args(["--", "-kernel", "./kernel", "-version"]);
        let (out, err) = (self.dir.path().join("out"), self.dir.path().join("err"));
        let mut child = command
            .stdin(Stdio::null())
            .stdout(fs::File::create(&out).unwrap())
            .stderr(fs::File::create(&err).unwrap())
            .spawn()
            .unwrap();
        let watched = Watched::new(i32::try_from(child.id()).unwrap()).unwrap();
        if !watched.ended(Deadline::after(END)).unwrap() {
            for pid in procfs::descendants(watched.pid).unwrap() {
                let _ = kill(Pid::from_raw(pid), Signal::SIGKILL);
            }
            panic!(
                "{strace:?}: it hangs; {}",
                fs::read_to_string(&log).unwrap()
            );
        }
        let status = child.wait().unwrap();
        let errors = fs::read(&err).unwrap();
        let trace = fs::read_to_string(&log).unwrap();
        let exec = format!("execve(\"/{}\"", self.program);
        Outcome {
            success: status.success(),
            ran: trace
                .lines()
                .any(|l| l.contains(&exec) && !l.contains("= -1")),
            errors: String::from_utf8_lossy(&errors).into_owned(),
            trace,
        }
    }

    /// Cleans up; a jail whose last process is just ending is asked again.
    fn clean(&self) {
        let deadline = Deadline::after(END);
        loop {
            let output = self.ozone().arg("-clean-resource").output().unwrap();
            let errors = String::from_utf8_lossy(&output.stderr);
            if output.status.success() {
                return;
            }
            let ending =
                errors.contains("its VM is running") || errors.contains("still has processes");
            assert!(ending && !deadline.left().is_zero(), "{errors}");
        }
    }

    /// What is there of this host's jails.
    fn left(&self) -> Vec<PathBuf> {
        let mounts = fs::read_to_string("/proc/self/mountinfo").unwrap();
        let groups = mounts
            .lines()
            .filter(|l| l.contains(" - cgroup"))
            .filter_map(|l| l.split(' ').nth(4));
        let mut places: Vec<PathBuf> = groups
            .map(|m| Path::new(m).join("zozne").join(&self.program))
            .collect();
        places.push(Path::new("/srv/zozne").join(&self.program));
        places.retain(|p| p.exists());
        if mounts
            .lines()
            .any(|l| l.contains(&format!("/zozne/{}", self.program)))
        {
            places.push("a mount".into());
        }
        places
    }

    #[track_caller]
    fn leaves_nothing(&self, after: &str) {
        let left = self.left();
        assert!(left.is_empty(), "after {after}: {left:?}");
    }

    /// Every call of a whole start, with the numbers of those that are `ozone`'s: std's start makes some before.
    fn steps(&self) -> BTreeMap<String, RangeInclusive<usize>> {
        let whole = self.run(&[]);
        assert!(whole.success && whole.ran, "{}", whole.errors);
        self.clean();
        self.leaves_nothing("a whole start");
        let mut counts: BTreeMap<(&str, &str), usize> = BTreeMap::new();
        let mut before: BTreeMap<&str, usize> = BTreeMap::new();
        let mut started = false;
        let mut inside: BTreeSet<&str> = BTreeSet::new();
        let exec = format!("execve(\"/{}\"", self.program);
        for line in whole.trace.lines() {
            // "PID  call(arguments) = result"; the second half of an interrupted line starts with "<".
            let Some((pid, rest)) = line.split_once(' ') else {
                continue;
            };
            let Some((call, _)) = rest.trim_start().split_once('(') else {
                continue;
            };
            if rest.contains(&exec) {
                inside.insert(pid);
            }
            // The first thing that it does is to close what it inherited.
            started |= call == "close_range";
            if !started {
                *before.entry(call).or_default() += 1;
            }
            // From its exec on the control program has its own tests.
            if !inside.contains(pid) && call.chars().all(|c| c.is_ascii_alphanumeric() || c == '_')
            {
                *counts.entry((pid, call)).or_default() += 1;
            }
        }
        let mut most: BTreeMap<&str, usize> = BTreeMap::new();
        for ((_, call), count) in counts {
            let most = most.entry(call).or_default();
            *most = count.max(*most);
        }
        let steps: BTreeMap<_, _> = most
            .into_iter()
            .filter(|(call, _)| !NO_STEPS.contains(call))
            .map(|(call, most)| {
                (
                    call.to_owned(),
                    before.get(call).copied().unwrap_or(0) + 1..=most,
                )
            })
            .collect();
        // Those without which there is no jail: the list is not of something else.
        for call in [
            "openat2",
            "mkdirat",
            "open_tree",
            "move_mount",
            "clone3",
            "pivot_root",
            "setns",
            "setresuid",
            "capset",
        ] {
            assert!(steps.contains_key(call), "no {call} in {steps:?}");
        }
        steps
    }
}

impl Drop for Host {
    fn drop(&mut self) {
        // They fail only when there is nothing left.
        let _ = self.ozone().arg("-clean-resource").output();
        let _ = Command::new("ip")
            .args(["netns", "del", &self.network])
            .status();
    }
}

#[test]
fn a_fault_at_any_call_is_undone() {
    let host = Host::new("error");
    let (mut failed, mut survived, mut missed) = (0, 0, 0);
    for (call, numbers) in host.steps() {
        if NEVER_FAIL.contains(&call.as_str()) {
            continue;
        }
        for nth in numbers {
            let fault = format!("{call}:error=EIO:when={nth}");
            let only = format!("trace=execve,{call}");
            let outcome = host.run(&["-e".into(), only, "-e".into(), format!("inject={fault}")]);
            // Who reads how often depends on who is faster.
            missed += usize::from(!outcome.trace.contains("(INJECTED)"));
            if outcome.ran {
                survived += 1;
            } else {
                failed += 1;
                assert!(!outcome.success, "{fault}: success without a VM");
                let told = outcome
                    .errors
                    .lines()
                    .any(|l| l.starts_with("ozone: ") && l.matches(": ").count() >= 2);
                assert!(told || call == "write", "{fault}: {:?}", outcome.errors);
                host.leaves_nothing(&fault);
            }
            host.clean();
            host.leaves_nothing(&format!("{fault} and cleaning"));
        }
    }
    println!("{failed} faults ended a start, {survived} did not, {missed} did not happen");
    // Most calls of a start are not there for nothing.
    assert!(
        failed > 100 && failed > survived && missed < 10,
        "{failed} {survived} {missed}"
    );
}

#[test]
fn a_kill_at_any_call_can_be_cleaned_up() {
    let host = Host::new("kill");
    let (mut littered, mut missed) = (0, 0);
    for (call, numbers) in host.steps() {
        for nth in numbers {
            let fault = format!("{call}:signal=KILL:when={nth}");
            let only = format!("trace=execve,{call}");
            let outcome = host.run(&["-e".into(), only, "-e".into(), format!("inject={fault}")]);
            missed += usize::from(!outcome.trace.contains("killed by SIGKILL"));
            littered += usize::from(!host.left().is_empty());
            host.clean();
            host.leaves_nothing(&format!("{fault} and cleaning"));
            host.clean();
        }
    }
    println!("{littered} kills left something to clean, {missed} did not happen");
    assert!(littered > 50 && missed < 10, "{littered} {missed}");
}
