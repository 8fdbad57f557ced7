//! The jail, looked at from outside: live processes, their `/proc`, and what happens to them.
//!
//! Has its own `main`, because starting a jail needs a single-threaded caller and the usual test
//! runner is not one. Runs every story as root (if it is root), then again as an unprivileged user.

#![allow(clippy::unwrap_used)] // a story that cannot go on has failed
#![allow(unsafe_code)] // raw calls on descriptors, ptrace and pidfds

use nix::{
    errno::Errno,
    poll::{PollFd, PollFlags, PollTimeout, poll},
    sys::{
        signal::{Signal, kill},
        socket::{AddressFamily, SockFlag, SockType, socketpair},
        wait::{Id, WaitPidFlag, WaitStatus, waitid},
    },
    unistd::{Pid, geteuid},
};
use ozone::{Child, DeviceLaunch, Identity, Layer, Limits, Pending, Sandbox, SpawnError, spawn};
use std::{
    collections::{BTreeMap, BTreeSet},
    env,
    ffi::CString,
    fs::{self, File},
    io::{BufRead, BufReader, Read, Write},
    os::{
        fd::{AsFd, FromRawFd, OwnedFd, RawFd},
        unix::{fs::MetadataExt, process::CommandExt},
    },
    path::PathBuf,
    process::{Command, ExitCode, Stdio},
    time::Instant,
};

const NAMESPACES: [&str; 7] = ["user", "mnt", "pid", "net", "ipc", "uts", "cgroup"];

/// A user that no distribution gives to anybody.
const STRANGER: u32 = 54_321;

fn probe_path() -> PathBuf {
    let me = env::current_exe().expect("the test's own path");
    let profile = me.parent().and_then(|p| p.parent()).expect("target folder");
    profile.join("examples/jail_probe")
}

fn null() -> OwnedFd {
    File::options()
        .read(true)
        .write(true)
        .open("/dev/null")
        .expect("null")
        .into()
}

struct Request {
    what: &'static str,
    binary: PathBuf,
    identity: Identity,
    mode: Sandbox,
    limits: Limits,
    /// Descriptor 2, if it is not to be null.
    errors: Option<OwnedFd>,
    /// More descriptors than 0 to 3.
    more: Vec<(OwnedFd, RawFd)>,
}

impl Request {
    fn new(what: &'static str) -> Self {
        Self {
            what,
            binary: probe_path(),
            identity: Identity::least(),
            mode: Sandbox::BestEffort,
            limits: Limits::default(),
            errors: None,
            more: Vec::new(),
        }
    }

    fn spawn(self) -> Result<(Pending, File), SpawnError> {
        let (ours, theirs) = socketpair(
            AddressFamily::Unix,
            SockType::Stream,
            None,
            SockFlag::SOCK_CLOEXEC,
        )
        .expect("socket pair");
        let errors = self.errors.unwrap_or_else(null);
        let mut fds = vec![(theirs, 3), (null(), 0), (null(), 1), (errors, 2)];
        fds.extend(self.more);
        let binary =
            File::open(&self.binary).unwrap_or_else(|e| panic!("{}: {e}", self.binary.display()));
        let pending = spawn(DeviceLaunch {
            name: "probe",
            binary: binary.as_fd(),
            argv: ["probe", self.what]
                .map(|a| CString::new(a).expect("argument"))
                .to_vec(),
            fds,
            identity: self.identity,
            tree: None,
            limits: self.limits,
            cpus: None,
            mode: self.mode,
            trace: false,
        })?;
        Ok((pending, File::from(ours)))
    }

    fn run(self) -> Result<Probe, SpawnError> {
        let (pending, link) = self.spawn()?;
        let child = pending.finish()?;
        let mut link = BufReader::new(link);
        let mut line = String::new();
        link.read_line(&mut line).expect("the probe's report");
        Ok(Probe {
            child,
            line: line.trim().to_owned(),
            link,
        })
    }
}

/// A probe in its jail. Dropping it ends it.
struct Probe {
    child: Child,
    line: String,
    link: BufReader<File>,
}

impl Probe {
    fn proc(&self, file: &str) -> String {
        let path = format!("/proc/{}/{file}", self.child.pid);
        fs::read_to_string(&path).unwrap_or_else(|e| panic!("{path}: {e}"))
    }

    fn status(&self) -> BTreeMap<String, String> {
        let text = self.proc("status");
        let pairs = text.lines().filter_map(|l| l.split_once(':'));
        pairs
            .map(|(k, v)| {
                (
                    k.to_owned(),
                    v.split_whitespace().collect::<Vec<_>>().join(" "),
                )
            })
            .collect()
    }

    fn end(self) -> WaitStatus {
        let Self { child, link, .. } = self;
        drop(link);
        waitid(Id::PIDFd(child.pidfd.as_fd()), WaitPidFlag::WEXITED).expect("the probe's end")
    }
}

fn is_root() -> bool {
    geteuid().is_root()
}

fn the_status_shows_every_layer() {
    let probe = Request::new("serve").run().unwrap();
    assert!(probe.line.starts_with("jailed: "), "{}", probe.line);
    let status = probe.status();
    let uid = if is_root() { 65534 } else { STRANGER };
    let four = format!("{uid} {uid} {uid} {uid}");
    let none = "0000000000000000";
    let expected = [
        ("Uid", four.as_str()),
        ("Gid", four.as_str()),
        ("Groups", ""),
        ("CapInh", none),
        ("CapPrm", none),
        ("CapEff", none),
        ("CapBnd", none),
        ("CapAmb", none),
        ("NoNewPrivs", "1"),
        ("Seccomp", "2"),
        ("Threads", "1"),
        ("SigBlk", none),
        ("Umask", "0077"),
    ];
    for (key, value) in expected {
        assert_eq!(status.get(key).map(String::as_str), Some(value), "{key}");
    }
    let pids: Vec<_> = status["NSpid"].split(' ').map(str::to_owned).collect();
    assert_eq!(
        pids,
        [probe.child.pid.to_string(), "1".to_owned()],
        "pids outside and inside"
    );
    assert!(matches!(probe.end(), WaitStatus::Exited(_, 0)));
}

fn every_namespace_is_its_own() {
    let probe = Request::new("open").run().unwrap();
    for kind in NAMESPACES {
        let of = |pid: String| fs::read_link(format!("/proc/{pid}/ns/{kind}")).expect("namespace");
        assert_ne!(
            of(probe.child.pid.to_string()),
            of("self".into()),
            "{kind} is shared"
        );
    }
    let on: BTreeSet<_> = probe
        .child
        .layers
        .iter()
        .filter(|l| l.is_on())
        .map(|l| l.layer)
        .collect();
    assert_eq!(on.len(), 15, "{:?}", probe.child.layers);
}

fn two_jails_share_nothing() {
    let (one, two) = (
        Request::new("open").run().unwrap(),
        Request::new("open").run().unwrap(),
    );
    for kind in NAMESPACES {
        let of = |probe: &Probe| {
            fs::read_link(format!("/proc/{}/ns/{kind}", probe.child.pid)).expect("namespace")
        };
        assert_ne!(of(&one), of(&two), "{kind} is shared");
    }
}

fn the_root_is_empty_and_read_only() {
    let probe = Request::new("open").run().unwrap();
    let root = format!("/proc/{}/root", probe.child.pid);
    assert_eq!(fs::read_dir(&root).expect("root folder").count(), 0);
    let error = fs::write(format!("{root}/file"), "x").expect_err("wrote into the root");
    assert_eq!(error.raw_os_error(), Some(libc::EROFS));
    let mounts = probe.proc("mountinfo");
    assert_eq!(mounts.lines().count(), 1, "{mounts}");
    let fields: Vec<_> = mounts.split(' ').collect();
    assert_eq!(fields[4], "/");
    for option in ["ro", "nosuid", "nodev", "noexec"] {
        assert!(fields[5].split(',').any(|o| o == option), "{mounts}");
    }
    let cwd = fs::read_link(format!("/proc/{}/cwd", probe.child.pid)).expect("working folder");
    assert_eq!(cwd, PathBuf::from("/"));
}

fn the_descriptors_are_exactly_those_given() {
    if !is_root() {
        return; // only root may look
    }
    // Sources that lie on each other's targets, a hole at 4, and some that must not get in.
    let stray: Vec<OwnedFd> = (0..20).map(|_| null()).collect();
    // SAFETY: the copy keeps the number open across exec in a careless starter.
    unsafe {
        assert_eq!(
            libc::fcntl(std::os::fd::AsRawFd::as_raw_fd(&stray[7]), libc::F_SETFD, 0),
            0
        );
    };
    let mut request = Request::new("serve");
    let zero = || OwnedFd::from(File::open("/dev/zero").expect("zero"));
    request.more = vec![(zero(), 6), (zero(), 5)];
    let probe = request.run().unwrap();
    let folder = format!("/proc/{}/fd", probe.child.pid);
    let found: BTreeMap<i32, String> = fs::read_dir(folder)
        .expect("descriptors")
        .map(|e| {
            let e = e.expect("entry");
            let number = e.file_name().to_string_lossy().parse().expect("number");
            (
                number,
                fs::read_link(e.path())
                    .expect("link")
                    .to_string_lossy()
                    .into_owned(),
            )
        })
        .collect();
    assert_eq!(
        found.keys().copied().collect::<Vec<_>>(),
        [0, 1, 2, 3, 5, 6],
        "{found:?}"
    );
    assert!(found[&3].starts_with("socket:"));
    assert_eq!(
        (found[&5].as_str(), found[&6].as_str()),
        ("/dev/zero", "/dev/zero")
    );
}

fn the_limits_are_set() {
    let mut request = Request::new("serve");
    request.limits = Limits {
        descriptors: 77,
        threads: 5,
        memory: 64 << 20,
        file_size: Some(4096),
        locked_memory: 8192,
    };
    let probe = request.run().unwrap();
    let text = probe.proc("limits");
    for (name, value) in [
        ("Max core file size", "0"),
        ("Max open files", "77"),
        ("Max processes", "5"),
        ("Max file size", "4096"),
        ("Max data size", "67108864"),
        ("Max locked memory", "8192"),
        ("Max msgqueue size", "0"),
        ("Max realtime priority", "0"),
    ] {
        let line = text
            .lines()
            .find_map(|l| l.strip_prefix(name))
            .unwrap_or_else(|| panic!("{name}"));
        let both: Vec<_> = line.split_whitespace().take(2).collect();
        assert_eq!(both, [value, value], "{name}");
    }
}

fn its_session_and_process_group_are_its_own() {
    let probe = Request::new("serve").run().unwrap();
    let stat = probe.proc("stat");
    // proc(5): behind the name in brackets come state, parent, process group, session.
    let fields: Vec<_> = stat
        .rsplit(')')
        .next()
        .unwrap_or_default()
        .split_whitespace()
        .collect();
    let pid = probe.child.pid.to_string();
    assert_eq!(fields[2..4], [pid.as_str(), pid.as_str()], "{stat}");
}

fn others_of_its_user_cannot_look_inside() {
    let probe = Request::new("open").run().unwrap();
    let memory = format!("/proc/{}/mem", probe.child.pid);
    let owner = fs::metadata(&memory).expect("mem").uid();
    assert_eq!(
        owner, 0,
        "a process that is not dumpable belongs to root in /proc"
    );
    if is_root() {
        let mut other = role("--other");
        other
            .arg(probe.child.pid.to_string())
            .uid(65534)
            .gid(65534)
            .current_dir("/");
        let output = other.output().expect("another process of the probe's user");
        assert_eq!(String::from_utf8_lossy(&output.stdout), "kept out\n");
    } else {
        // The user who made the jail owns its user namespace and may trace what is in it; that is
        // the kernel's rule. Its memory file is closed to him all the same.
        let error = File::open(memory).expect_err("memory was opened");
        assert_eq!(error.raw_os_error(), Some(libc::EACCES));
    }
}

fn role_other() {
    let pid: i32 = env::args()
        .nth(2)
        .and_then(|p| p.parse().ok())
        .expect("a pid");
    // SAFETY: no pointers.
    let traced = Errno::result(unsafe { libc::ptrace(libc::PTRACE_SEIZE, pid, 0, 0) });
    assert_eq!(traced, Err(Errno::EPERM));
    assert_eq!(
        File::open(format!("/proc/{pid}/mem"))
            .expect_err("mem")
            .raw_os_error(),
        Some(libc::EACCES)
    );
    assert_eq!(
        fs::read_dir(format!("/proc/{pid}/fd"))
            .expect_err("fd")
            .raw_os_error(),
        Some(libc::EACCES)
    );
    println!("kept out");
}

/// Runs this program again in another role.
fn role(name: &str) -> Command {
    let mut command = Command::new(env::current_exe().expect("own path"));
    command
        .arg(name)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped());
    command
}

/// Polls a pidfd, which becomes readable when the process has ended.
fn ends_within(pid: Pid, milliseconds: u16, act: impl FnOnce()) -> bool {
    // SAFETY: no pointers; the result is a new descriptor.
    let pidfd = unsafe {
        let number = libc::syscall(libc::SYS_pidfd_open, pid.as_raw(), 0);
        OwnedFd::from_raw_fd(Errno::result(number).expect("pidfd") as RawFd)
    };
    act();
    let mut list = [PollFd::new(pidfd.as_fd(), PollFlags::POLLIN)];
    poll(&mut list, PollTimeout::from(milliseconds)).expect("poll") == 1
}

fn it_dies_with_its_parent() {
    let mut parent = role("--parent").spawn().expect("a parent");
    let mut line = String::new();
    BufReader::new(parent.stdout.take().expect("pipe"))
        .read_line(&mut line)
        .expect("its report");
    let pid = Pid::from_raw(
        line.trim()
            .parse()
            .unwrap_or_else(|_| panic!("no pid but {line:?}")),
    );
    let begin = Instant::now();
    let died = ends_within(pid, 2000, || {
        kill(Pid::from_raw(parent.id() as i32), Signal::SIGKILL).expect("kill");
    });
    assert!(died, "the child outlived its parent");
    assert!(
        begin.elapsed().as_millis() < 1000,
        "took {:?}",
        begin.elapsed()
    );
    parent.wait().expect("the parent's end");
}

fn role_parent() {
    let probe = Request::new("serve").run().expect("probe");
    println!("{}", probe.child.pid);
    let mut line = String::new();
    let _ = std::io::stdin().read_line(&mut line); // for ever: killed, or stdin closes
}

/// A child inherits its parent's filter: the broker's must let it build its jail.
fn a_filtered_parent_can_start_devices() {
    let output = role("--filtered-parent")
        .stdin(Stdio::null())
        .output()
        .expect("a broker");
    let text = String::from_utf8_lossy(&output.stdout);
    assert!(output.status.success(), "{} {text}", output.status);
    assert!(text.starts_with("jailed: Landlock ABI "), "{text}");
}

fn role_filtered_parent() {
    seccomp_policies::install(
        seccomp_policies::Policy::Broker,
        seccomp_policies::Action::Kill,
    )
    .expect("the broker's filter");
    let probe = Request::new("serve").run().expect("probe");
    assert_eq!(
        probe.status()["Seccomp_filters"],
        "2",
        "the broker's and its own"
    );
    println!("{}", probe.line);
    assert!(matches!(probe.end(), WaitStatus::Exited(_, 0)));
    std::io::stdout().flush().expect("flush");
}

/// A fault is told from a forbidden call.
fn a_fault_ends_it_as_a_fault() {
    let (pending, _link) = Request::new("crash").spawn().unwrap();
    let child = pending.finish().unwrap();
    let end = waitid(Id::PIDFd(child.pidfd.as_fd()), WaitPidFlag::WEXITED).expect("its end");
    assert!(
        matches!(end, WaitStatus::Signaled(_, Signal::SIGSEGV, false)),
        "{end:?}"
    );
}

/// A panic's last words get out before the filter ends what libc's abort would do.
fn a_panic_is_told() {
    let (mut words, theirs) = std::io::pipe().unwrap();
    let mut request = Request::new("panic");
    request.errors = Some(theirs.into());
    let (pending, _link) = request.spawn().unwrap();
    let child = pending.finish().unwrap();
    let mut text = String::new();
    words.read_to_string(&mut text).expect("its words");
    assert_eq!(text, "told to");
    let end = waitid(Id::PIDFd(child.pidfd.as_fd()), WaitPidFlag::WEXITED).expect("its end");
    assert!(matches!(end, WaitStatus::Signaled(_, _, false)), "{end:?}");
}

fn a_dropped_start_leaves_nothing() {
    let (pending, mut link) = Request::new("serve").spawn().unwrap();
    let pid = pending.pid();
    drop(pending);
    assert_eq!(kill(pid, None), Err(Errno::ESRCH), "still there");
    let mut rest = Vec::new();
    link.read_to_end(&mut rest).expect("the stream's end");
}

fn binaries_that_cannot_run_are_told() {
    let refuse = |path: &str| {
        let mut request = Request::new("serve");
        request.binary = path.into();
        match request.run() {
            Err(error @ SpawnError::Step { .. }) => error.to_string(),
            Err(error) => panic!("{path}: {error}"),
            Ok(_) => panic!("{path} was executed"),
        }
    };
    let message = refuse("/etc/passwd");
    assert!(message.contains("executable by the user"), "{message}");
    // Linked dynamically: the loader that it names is not there.
    let message = refuse("/bin/sh");
    assert!(message.contains("static ELF"), "{message}");
}

fn wrong_requests_are_refused() {
    let mut request = Request::new("serve");
    request.identity = Identity { uid: 0, gid: 65534 };
    assert!(matches!(request.run(), Err(SpawnError::Identity { .. })));
    let mut request = Request::new("serve");
    request.more = vec![(null(), 5), (null(), 5)];
    assert!(matches!(
        request.run(),
        Err(SpawnError::Target { target: 5, .. })
    ));
    let mut request = Request::new("serve");
    request.more = vec![(null(), 256)];
    assert!(matches!(
        request.run(),
        Err(SpawnError::Target {
            target: 256,
            last: 255,
            ..
        })
    ));
    if !is_root() {
        let mut request = Request::new("serve");
        request.identity = Identity {
            uid: 65534,
            gid: 65534,
        };
        let error = request
            .run()
            .err()
            .expect("became somebody else")
            .to_string();
        assert!(error.contains("only the caller's own"), "{error}");
    }
}

fn a_caller_with_threads_is_refused() {
    let (stop, wait) = std::sync::mpsc::channel::<()>();
    let thread = std::thread::spawn(move || wait.recv());
    assert!(matches!(
        Request::new("serve").run(),
        Err(SpawnError::Threads { threads: 2, .. })
    ));
    drop(stop);
    thread
        .join()
        .expect("thread")
        .expect_err("nothing was sent");
}

/// A device that was started by hand does not get its token.
fn without_a_jail_nothing_is_served() {
    let (mut ours, theirs) = std::os::unix::net::UnixStream::pair().expect("socket pair");
    let mut command = Command::new(probe_path());
    command.arg("serve").stdin(Stdio::null());
    // SAFETY: dup2 is safe between fork and exec.
    unsafe {
        let source = std::os::fd::AsRawFd::as_raw_fd(&theirs);
        command.pre_exec(move || {
            Errno::result(libc::dup2(source, 3))
                .map(drop)
                .map_err(Into::into)
        });
    }
    let mut child = command.spawn().expect("the probe");
    drop(theirs);
    let mut text = String::new();
    ours.read_to_string(&mut text).expect("its words");
    assert!(
        text.starts_with("refused: this process is not in a jail"),
        "{text:?}"
    );
    assert_eq!(child.wait().expect("its end").code(), Some(1));
}

fn the_control_process_locks_itself() {
    let output = role("--self-lock")
        .stdin(Stdio::null())
        .output()
        .expect("a process");
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    assert_eq!(text, "locked\n");
}

fn role_self_lock() {
    let mut open = File::open("/proc/self/status").expect("status");
    let report = ozone::self_lock(Sandbox::BestEffort).expect("lock-down");
    let mut text = String::new();
    open.read_to_string(&mut text)
        .expect("an open descriptor works on");
    for line in ["CapInh", "CapPrm", "CapEff", "CapAmb"] {
        assert!(
            text.contains(&format!("{line}:\t0000000000000000\n")),
            "{text}"
        );
    }
    assert!(text.contains("NoNewPrivs:\t1\n"), "{text}");
    if report.landlock_abi > 0 {
        let error = File::open("/dev/null").expect_err("a file was opened");
        assert_eq!(error.raw_os_error(), Some(libc::EACCES));
    }
    println!("locked");
}

/// A host that forbids user namespaces: the other layers stay, the report says so, strict refuses.
fn without_user_namespaces_the_rest_remains() {
    if !is_root() {
        return; // making such a host needs a map of many users
    }
    let mut host = role("--poor-host").spawn().expect("a host");
    let mut output = BufReader::new(host.stdout.take().expect("pipe"));
    let mut line = String::new();
    output.read_line(&mut line).expect("ready");
    assert_eq!(line, "ready\n");
    for map in ["uid_map", "gid_map"] {
        fs::write(format!("/proc/{}/{map}", host.id()), "0 0 65535").expect("map");
    }
    host.stdin
        .take()
        .expect("pipe")
        .write_all(b"go\n")
        .expect("go");
    let mut text = String::new();
    output.read_to_string(&mut text).expect("its words");
    assert!(host.wait().expect("its end").success(), "{text}");
    assert!(text.ends_with("done\n"), "{text}");
}

fn role_poor_host() {
    nix::sched::unshare(nix::sched::CloneFlags::CLONE_NEWUSER).expect("user namespace");
    println!("ready");
    let mut line = String::new();
    std::io::stdin().read_line(&mut line).expect("go");
    fs::write("/proc/sys/user/max_user_namespaces", "0").expect("limit");

    let request = || {
        let mut request = Request::new("open");
        request.identity = Identity {
            uid: 65533,
            gid: 65533,
        };
        request
    };
    let mut strict = request();
    strict.mode = Sandbox::Strict;
    let error = strict.run().err().expect("strict accepted it").to_string();
    assert!(
        error.contains("strict sandbox: user namespace: missing (No space left on device)"),
        "{error}"
    );

    let probe = request().run().expect("best effort");
    let missing: Vec<_> = probe
        .child
        .layers
        .iter()
        .filter(|l| !l.is_on())
        .map(|l| l.layer)
        .collect();
    assert_eq!(missing, [Layer::UserNamespace], "{:?}", probe.child.layers);
    assert!(probe.line.starts_with("jailed: "), "{}", probe.line);
    let status = probe.status();
    assert_eq!(status["Uid"], "65533 65533 65533 65533");
    for set in ["CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb"] {
        assert_eq!(status[set], "0000000000000000", "{set}");
    }
    assert!(
        fs::read_dir("/").expect("own root").count() > 3,
        "the host lost its files"
    );
    println!("done");
}

/// Each story by its function's name.
macro_rules! stories {
    ($($name:ident)*) => { &[$((stringify!($name), $name as fn())),*] };
}

const STORIES: &[(&str, fn())] = stories! {
    the_status_shows_every_layer
    every_namespace_is_its_own
    two_jails_share_nothing
    the_root_is_empty_and_read_only
    the_descriptors_are_exactly_those_given
    its_session_and_process_group_are_its_own
    the_limits_are_set
    others_of_its_user_cannot_look_inside
    it_dies_with_its_parent
    a_filtered_parent_can_start_devices
    a_fault_ends_it_as_a_fault
    a_panic_is_told
    a_dropped_start_leaves_nothing
    binaries_that_cannot_run_are_told
    wrong_requests_are_refused
    a_caller_with_threads_is_refused
    without_a_jail_nothing_is_served
    the_control_process_locks_itself
    without_user_namespaces_the_rest_remains
};

/// Runs one story in this process. Panics abort nothing in tests: a story's panic is caught.
fn run_story(name: &str) -> bool {
    let story = STORIES.iter().find(|(known, _)| *known == name);
    story.is_some_and(|(_, story)| std::panic::catch_unwind(story).is_ok())
}

/// Runs one story in a process of a user without privileges.
fn run_story_as_stranger(name: &str) -> bool {
    Command::new(env::current_exe().expect("own path"))
        .args(["--story", name])
        .uid(STRANGER)
        .gid(STRANGER)
        .current_dir("/")
        .status()
        .expect("unprivileged run")
        .success()
}

/// What test runners ask of a test program: a list, or those tests whose name is, or contains, a word.
fn runner(arguments: &[String]) -> ExitCode {
    let has = |flag: &str| arguments.iter().any(|a| a == flag);
    let words: Vec<&String> = arguments
        .iter()
        .filter(|a| !a.starts_with('-') && *a != "terse")
        .collect();
    let users: &[&str] = if is_root() {
        &["root", "user"]
    } else {
        &["user"]
    };
    let mut stories = Vec::new();
    for user in users {
        stories.extend(
            STORIES
                .iter()
                .map(|(name, _)| (*user, *name, format!("{user}::{name}"))),
        );
    }
    stories.retain(|(_, _, full)| {
        words.is_empty()
            || words.iter().any(|w| {
                if has("--exact") {
                    *w == full
                } else {
                    full.contains(*w)
                }
            })
    });
    if has("--list") {
        // None of them is one that is left out unless asked for.
        if !has("--ignored") {
            stories
                .iter()
                .for_each(|(_, _, full)| println!("{full}: test"));
        }
        return ExitCode::SUCCESS;
    }
    let (mut passed, mut failed) = (0, 0);
    for (user, name, full) in stories {
        let good = if user == "user" && is_root() {
            run_story_as_stranger(name)
        } else {
            run_story(name)
        };
        println!("test {full} ... {}", if good { "ok" } else { "FAILED" });
        if good { passed += 1 } else { failed += 1 }
    }
    println!("{passed} passed, {failed} failed");
    ExitCode::from(u8::from(failed > 0))
}

fn main() -> ExitCode {
    let arguments: Vec<String> = env::args().skip(1).collect();
    match arguments.first().map(String::as_str) {
        Some("--parent") => role_parent(),
        Some("--filtered-parent") => role_filtered_parent(),
        Some("--other") => role_other(),
        Some("--self-lock") => role_self_lock(),
        Some("--poor-host") => role_poor_host(),
        Some("--story") => {
            let name = arguments.get(1).map_or("", String::as_str);
            return ExitCode::from(u8::from(!run_story(name)));
        }
        _ => return runner(&arguments),
    }
    ExitCode::SUCCESS
}
