//! The daemon as a process: what it holds while it serves, how it starts and ends, and what it refuses.

#![allow(clippy::unwrap_used)] // test code

mod raw;

use std::collections::BTreeMap;
use std::ffi::OsStr;
use std::fs;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::process::{Command, Output};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use ipc::limits::FS_POLL_US;
use libc::O_RDWR;
use nix::sys::signal::{Signal, kill};
use nix::unistd::{Pid, geteuid};
use raw::Client;
use seccomp_policies::{Action, Policy};
use tests::daemon::{Daemon, with_descriptors_of_other_kinds};
use tests::trace::Tracee;
use tests::wait::{Deadline, Watched};

/// A daemon needs milliseconds; this is for a busy machine.
const LIMIT: Duration = Duration::from_secs(60);

fn output(arguments: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_vhost_user_fs"))
        .args(arguments)
        .output()
        .unwrap()
}

/// The process inside of the jail that `outside` waits for.
fn serving(outside: u32) -> u32 {
    let path = format!("/proc/{outside}/task/{outside}/children");
    fs::read_to_string(path).unwrap().trim().parse().unwrap()
}

fn status(pid: u32) -> BTreeMap<String, String> {
    let text = fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
    text.lines()
        .filter_map(|line| line.split_once(":\t"))
        .map(|(name, value)| (name.to_owned(), value.trim().to_owned()))
        .collect()
}

/// The threads of a serving process that only move data.
fn movers(pid: u32) -> Vec<u32> {
    let tasks = fs::read_dir(format!("/proc/{pid}/task")).unwrap();
    tasks
        .map(|task| task.unwrap())
        .filter(|task| {
            fs::read_to_string(task.path().join("comm"))
                .unwrap()
                .starts_with("mover")
        })
        .map(|task| task.file_name().into_string().unwrap().parse().unwrap())
        .collect()
}

/// Nanoseconds of processor time that a thread has had.
fn time_on_processor(tid: u32) -> u64 {
    let text = fs::read_to_string(format!("/proc/{tid}/schedstat")).unwrap();
    text.split(' ').next().unwrap().parse().unwrap()
}

/// Tells threads to end when it goes.
struct End<'a>(&'a AtomicBool);

impl Drop for End<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

/// What a request takes of it, of the hundred in the middle of some.
fn time_per_request(client: &mut Client) -> u64 {
    let pid = serving(client.child.id());
    let mut each: Vec<u64> = (0..15)
        .map(|_| {
            let before = time_on_processor(pid);
            (0..100).for_each(|_| client.assert_alive());
            (time_on_processor(pid) - before) / 100
        })
        .collect();
    each.sort_unstable();
    each[each.len() / 2]
}

#[test]
fn on_busy_processors_no_request_is_looked_for_that_cannot_come_meanwhile() {
    let dir = tempfile::tempdir().unwrap();
    let done = AtomicBool::new(false);
    let most = std::thread::scope(|scope| {
        let _end = End(&done);
        // More than two for each processor: who is woken waits for somebody's turn to end, or for the sleep of who woke it.
        for _ in 0..=2 * std::thread::available_parallelism().unwrap().get() {
            scope.spawn(|| {
                while !done.load(Ordering::Relaxed) {
                    std::hint::spin_loop();
                }
            });
        }
        // Each has to find out anew.
        let each = (0..6).map(|_| {
            let mut client = Client::start(dir.path(), &[]);
            let time = time_per_request(&mut client);
            assert!(client.finish().success());
            time
        });
        each.max().unwrap()
    });
    assert!(most < u64::from(FS_POLL_US) * 1000, "{most} ns");
}

#[test]
fn the_serving_process_holds_what_it_needs_and_nothing_else() {
    let dir = tempfile::tempdir().unwrap();
    let mut client = Client::start(dir.path(), &["--thread-pool-size=2"]);
    let pid = serving(client.child.id());
    let status = status(pid);
    for set in ["CapInh", "CapAmb"] {
        assert_eq!(status[set], "0000000000000000", "{set}");
    }
    // CHOWN, DAC_OVERRIDE, FOWNER, FSETID, SETGID, SETUID, in its own user namespace.
    for set in ["CapPrm", "CapEff", "CapBnd"] {
        assert_eq!(status[set], "00000000000000db", "{set}");
    }
    assert_eq!(status["NoNewPrivs"], "1");
    assert_eq!(status["Seccomp"], "2");
    assert_eq!(status["Threads"], "3");
    for kind in ["user", "mnt", "pid", "net", "ipc", "uts", "cgroup"] {
        let of = |pid: &str| fs::read_link(format!("/proc/{pid}/ns/{kind}")).unwrap();
        assert_ne!(of(&pid.to_string()), of("self"), "{kind}");
    }
    let mounts = fs::read_to_string(format!("/proc/{pid}/mountinfo")).unwrap();
    let root = mounts.lines().next().unwrap();
    assert_eq!(mounts.lines().count(), 1, "{mounts}");
    assert!(root.contains(" / rw,nosuid,nodev,noexec"), "{root}");
    // The process outside waits. Of root's rights it has those that the next serving process's user namespace needs: SETGID,
    // SETUID, SETFCAP.
    let outside = self::status(client.child.id());
    for set in ["CapPrm", "CapEff"] {
        assert_eq!(outside[set], "00000000800000c0", "{set}");
    }
    let filters = |pid: u32| {
        let stopped = Tracee::stop(pid.cast_signed()).unwrap();
        stopped.filters().unwrap()
    };
    let only = |policy: Policy| policy.program(Action::Kill).to_vec();
    assert_eq!(filters(client.child.id()), [only(Policy::FsOutside)]);
    assert_eq!(filters(pid), [only(Policy::VhostUserFs)]);
    // Threads that move data have a filter and no right that it has not.
    let movers = movers(pid);
    assert_eq!(movers.len(), 2);
    for mover in &movers {
        let status = self::status(*mover);
        for set in ["CapPrm", "CapEff", "CapBnd", "NoNewPrivs"] {
            assert_eq!(status[set], self::status(pid)[set], "{set}");
        }
        assert_eq!(filters(*mover), [only(Policy::FsMover)]);
    }
    // One that goes on for it has inherited the filter of the process outside.
    kill(Pid::from_raw(pid.cast_signed()), Signal::SIGKILL).unwrap();
    client.assert_alive();
    let next = serving(client.child.id());
    let both = [Policy::FsOutside, Policy::VhostUserFs].map(only);
    assert_eq!(filters(next), both);
    let both = [Policy::FsOutside, Policy::FsMover].map(only);
    let movers = self::movers(next);
    assert_eq!(movers.len(), 2);
    for mover in movers {
        assert_eq!(filters(mover), both);
    }
    assert!(client.finish().success());
}

/// The number of the system call that process `pid` waits in, if it does.
fn call_of(pid: u32) -> Option<i64> {
    let text = fs::read_to_string(format!("/proc/{pid}/syscall")).ok()?;
    text.split(' ').next()?.parse().ok()
}

#[test]
fn one_that_waits_for_its_front_end_can_be_killed_too() {
    let dir = tempfile::tempdir().unwrap();
    let socket = dir.path().join("socket");
    let program = Path::new(env!("CARGO_BIN_EXE_vhost_user_fs"));
    let mut daemon = Daemon::sharing(program, dir.path(), &socket, &[]).unwrap();
    let outside = daemon.pid().cast_unsigned();
    let children = format!("/proc/{outside}/task/{outside}/children");
    // Killed before, it is one that could not be started. What it waits in shows that it waits; there is no event.
    let waits = || {
        let child = fs::read_to_string(&children).ok()?.trim().parse().ok()?;
        (call_of(child) == Some(libc::SYS_accept4)).then_some(child)
    };
    let deadline = Deadline::after(LIMIT);
    let inside: u32 = loop {
        if let Some(pid) = waits() {
            break pid;
        }
        assert!(!deadline.left().is_zero(), "{}", daemon.said);
    };
    let watched = Watched::new(inside.cast_signed()).unwrap();
    kill(Pid::from_raw(inside.cast_signed()), Signal::SIGKILL).unwrap();
    // One that is about to die might still take the connection.
    assert!(watched.ended(Deadline::after(LIMIT)).unwrap());
    // Taken by the next one, which ends when its front end leaves.
    drop(UnixStream::connect(&socket).unwrap());
    assert!(daemon.wait(LIMIT).unwrap().success());
    assert!(!socket.exists());
}

/// A number on the command line says nothing about what is there.
#[test]
fn a_descriptor_that_is_no_unix_stream_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let words = ["-fd", "3", "-source"].map(OsStr::new);
    let words = [&words[..], &[dir.path().as_os_str()]].concat();
    let program = Path::new(env!("CARGO_BIN_EXE_vhost_user_fs"));
    for (what, status, said) in with_descriptors_of_other_kinds(program, &words).unwrap() {
        assert_eq!(status, Some(1), "{what}: {said}");
        let expected = "vhost_user_fs: -fd 3: not an open unix stream socket";
        assert!(said.starts_with(expected), "{what}: {said}");
    }
}

#[test]
fn a_read_only_tree_takes_one_right_and_a_read_only_mount() {
    let dir = tempfile::tempdir().unwrap();
    let client = Client::start(dir.path(), &["-readonly"]);
    let pid = serving(client.child.id());
    if geteuid().is_root() {
        assert_eq!(status(pid)["CapEff"], "0000000000000004", "DAC_READ_SEARCH");
    }
    let mounts = fs::read_to_string(format!("/proc/{pid}/mountinfo")).unwrap();
    assert!(mounts.contains(" / ro,nosuid,nodev,noexec"), "{mounts}");
    assert!(client.finish().success());
}

#[test]
fn both_processes_end_together() {
    let dir = tempfile::tempdir().unwrap();
    // The one outside is told to end.
    let mut client = Client::start(dir.path(), &[]);
    kill(
        Pid::from_raw(client.child.id().cast_signed()),
        Signal::SIGTERM,
    )
    .unwrap();
    assert!(client.child.wait().unwrap().success());
    // The one outside is killed: the connection ends, because the one inside does. It changed its user before, which
    // makes the kernel forget that it was to die with its parent.
    let mut client = Client::start(dir.path(), &[]);
    if geteuid().is_root() {
        fs::set_permissions(
            dir.path(),
            std::os::unix::fs::PermissionsExt::from_mode(0o777),
        )
        .unwrap();
        (client.uid, client.gid) = (1234, 1234);
    }
    client.create(1, "file", O_RDWR).unwrap();
    let inside = serving(client.child.id());
    let watched = Watched::new(inside.cast_signed()).unwrap();
    client.child.kill().unwrap();
    client.child.wait().unwrap();
    assert!(
        watched
            .ended(Deadline::after(Duration::from_secs(5)))
            .unwrap()
    );
    // The one inside is killed: another one goes on.
    let mut client = Client::start(dir.path(), &[]);
    let inside = serving(client.child.id());
    kill(Pid::from_raw(inside.cast_signed()), Signal::SIGKILL).unwrap();
    client.assert_alive();
    assert_ne!(serving(client.child.id()), inside);
    assert!(client.finish().success());
}

#[test]
fn what_cannot_be_done_is_said() {
    let dir = tempfile::tempdir().unwrap();
    let tree = dir.path().to_str().unwrap();
    let file = dir.path().join("file");
    fs::write(&file, b"").unwrap();
    let file = file.to_str().unwrap();
    let busy = dir.path().join("busy");
    let _listener = UnixListener::bind(&busy).unwrap();
    let busy = busy.to_str().unwrap();
    let missing = "/does/not/exist";
    for (arguments, code, words) in [
        (&["-source", tree][..], 2, &["-socket-path"][..]),
        (&["-source", tree, "-fd", "77"], 1, &["-fd 77"]),
        (
            &["-source", missing, "-socket-path", file],
            1,
            &["-source", missing],
        ),
        (
            &["-source", file, "-socket-path", "/tmp/x"],
            1,
            &[file, "not a folder"],
        ),
        (
            &["-source", tree, "-socket-path", file],
            1,
            &[file, "no socket"],
        ),
        (
            &["-source", tree, "-socket-path", busy],
            1,
            &[busy, "listens"],
        ),
        (
            &["-source", tree, "-socket-path", missing],
            1,
            &[missing, "No such file"],
        ),
        (
            &["-source", tree, "-socket-path", missing, "-D", "/does/not"],
            1,
            &["-D /does/not"],
        ),
    ] {
        let output = output(arguments);
        let text = String::from_utf8_lossy(&output.stderr).into_owned();
        assert_eq!(output.status.code(), Some(code), "{arguments:?}: {text}");
        for word in words {
            assert!(
                text.contains(word),
                "{arguments:?}: {text:?} does not name {word:?}"
            );
        }
    }
    let help = output(&["-help"]);
    assert!(help.status.success());
    assert!(String::from_utf8_lossy(&help.stdout).contains("-socket-path PATH"));
}

/// Runs the same tests of files as a user without any privilege.
#[test]
fn it_works_without_root() {
    if !geteuid().is_root() {
        // The other tests are run without root then.
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    std::os::unix::fs::chown(dir.path(), Some(65534), Some(65534)).unwrap();
    let mut client = Client::start_as(dir.path(), &[], Some(65534));
    client.uid = 4321; // nobody here may be that; the file is the daemon's user's
    let (node, fh) = client.create(1, "file", O_RDWR).unwrap();
    assert_eq!(client.write(node, fh, 0, b"hello"), Ok(5));
    assert_eq!(client.read(node, fh, 0, 10).unwrap(), b"hello");
    // Another one goes on, which has no rights but its own either.
    let inside = serving(client.child.id());
    kill(Pid::from_raw(inside.cast_signed()), Signal::SIGKILL).unwrap();
    assert_eq!(client.read(node, fh, 0, 10).unwrap(), b"hello");
    let made = fs::metadata(dir.path().join("file")).unwrap();
    assert_eq!(std::os::unix::fs::MetadataExt::uid(&made), 65534);
    let pid = serving(client.child.id());
    let map = fs::read_to_string(format!("/proc/{pid}/uid_map")).unwrap();
    assert_eq!(
        map.split_whitespace().collect::<Vec<_>>(),
        ["0", "65534", "1"]
    );
    assert!(client.finish().success());
}

#[test]
fn a_daemon_at_rest_gives_back_the_code_that_it_does_not_need() {
    let dir = tempfile::tempdir().unwrap();
    fs::write(dir.path().join("file"), b"contents").unwrap();
    let mut client = Client::start(dir.path(), &[]);
    let pid = serving(client.child.id());
    let code = || -> u64 {
        let text = &status(pid)["RssFile"];
        text.trim_end_matches(" kB").trim().parse().unwrap()
    };
    let file = client.lookup(1, "file").unwrap();
    let fh = client.open(file, O_RDWR).unwrap();
    let before = code();
    let process = Watched::new(pid.cast_signed()).unwrap();
    let deadline = Deadline::after(Duration::from_secs(30));
    while code() + 256 > before {
        assert!(!deadline.left().is_zero(), "{} of {before} KiB", code());
        // Nothing tells when it has, so it is looked at every now and then.
        let ended = process.ended(Deadline::after(Duration::from_millis(100)));
        assert!(!ended.unwrap());
    }
    assert_eq!(client.read(file, fh, 0, 100).unwrap(), b"contents");
    assert!(client.finish().success());
}
