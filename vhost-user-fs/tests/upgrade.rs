//! Another program takes the place of the daemon's, and the guest notices nothing: what it has open stays open, no request is
//! lost and none is done twice. One that cannot leaves the program that runs where it is.

#![allow(clippy::unwrap_used)] // test code

mod raw;

use std::fs;
use std::io::{BufRead, BufReader};
use std::os::unix::fs::{MetadataExt, PermissionsExt, chown};
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStderr, Command, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};

use device_host::test_frontend::{INDIRECT_DESC, TestFrontend};
use fs_device::fuse::wire::opcode;
use libc::{O_APPEND, O_EXCL, O_RDWR, O_WRONLY};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use raw::{Body, Client};
use tempfile::TempDir;

/// A daemon that may be replaced, and what it says.
struct Daemon {
    /// The folder of its program, and that one.
    _programs: TempDir,
    program: PathBuf,
    tree: TempDir,
    client: Client,
    log: BufReader<ChildStderr>,
}

const NAME: &str = "vhost_user_fs";
const BUILT: &str = env!("CARGO_BIN_EXE_vhost_user_fs");

/// Puts a program in the place of another one, as a package manager does.
fn put(from: &Path, to: &Path, change: impl FnOnce(&mut Vec<u8>)) {
    let mut program = fs::read(from).unwrap();
    change(&mut program);
    let beside = to.with_extension("new");
    fs::write(&beside, program).unwrap();
    fs::set_permissions(&beside, fs::Permissions::from_mode(0o755)).unwrap();
    fs::rename(&beside, to).unwrap();
}

/// Where `text` is in a program: in one place.
fn find(program: &[u8], text: &[u8]) -> usize {
    let windows = program.windows(text.len()).enumerate();
    let found: Vec<_> = windows
        .filter_map(|(at, window)| (window == text).then_some(at))
        .collect();
    assert_eq!(found.len(), 1, "{}", String::from_utf8_lossy(text));
    found[0]
}

/// Makes the program one that keeps its tables in another way.
fn lay_out_differently(program: &mut [u8]) {
    const MARK: &[u8] = b"kept tables of a folder, layout ";
    let at = find(program, MARK);
    program[at + MARK.len()] ^= 0x40;
}

/// A daemon that waits for its front end, at the path that is told last.
fn listening(
    user: Option<u32>,
    options: &[&str],
) -> (TempDir, PathBuf, TempDir, Child, BufReader<ChildStderr>) {
    let programs = tempfile::tempdir().unwrap();
    // Others than root execute it, too.
    fs::set_permissions(&programs, fs::Permissions::from_mode(0o755)).unwrap();
    let program = programs.path().join(NAME);
    put(Path::new(BUILT), &program, |_| {});
    let tree = tempfile::tempdir().unwrap();
    let socket = programs.path().join("socket");
    let mut command = Command::new(&program);
    if let Some(id) = user {
        chown(&programs, Some(id), Some(id)).unwrap();
        chown(&tree, Some(id), Some(id)).unwrap();
        command.uid(id).gid(id);
    }
    let mut child = command
        .args(["-log-level", "info", "-source"])
        .arg(tree.path())
        .arg("-socket-path")
        .arg(&socket)
        .args(options)
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let mut log = BufReader::new(child.stderr.take().unwrap());
    until(&mut log, "listening at");
    (programs, socket, tree, child, log)
}

impl Daemon {
    fn start(options: &[&str]) -> Self {
        Self::start_as(None, options)
    }

    fn start_as(user: Option<u32>, options: &[&str]) -> Self {
        let (programs, socket, tree, child, mut log) = listening(user, options);
        let client = Self::connect(child, &socket);
        until(&mut log, " session, ");
        Self {
            program: programs.path().join(NAME),
            _programs: programs,
            tree,
            client,
            log,
        }
    }

    fn connect(child: Child, socket: &Path) -> Client {
        let front = TestFrontend::connect(UnixStream::connect(socket).unwrap(), INDIRECT_DESC);
        let mut client = Client::with_front(child, front);
        client.init();
        client
    }

    fn pid(&self) -> u32 {
        self.client.child.id()
    }

    /// Asks for the program that is there by now.
    fn ask(&self) {
        kill(Pid::from_raw(self.pid().cast_signed()), Signal::SIGUSR2).unwrap();
    }

    /// The line of the log with `text` in it, which comes next or later.
    fn says(&mut self, text: &str) -> String {
        until(&mut self.log, text)
    }

    /// Which of the texts comes first.
    fn says_one_of(&mut self, texts: &[&str]) -> usize {
        loop {
            let mut line = String::new();
            assert_ne!(self.log.read_line(&mut line).unwrap(), 0);
            if let Some(at) = texts.iter().position(|text| line.contains(text)) {
                return at;
            }
        }
    }

    /// The program is replaced by itself.
    fn upgrade(&mut self) {
        put(Path::new(BUILT), &self.program, |_| {});
        self.ask();
        let outcomes = [
            " goes on for version ",
            "program goes on",
            "program of before goes on",
        ];
        assert_eq!(self.says_one_of(&outcomes), 0, "which of {outcomes:?}");
        self.runs();
    }

    /// Both processes run the program that is there.
    fn runs(&self) {
        let wanted = fs::metadata(&self.program).unwrap().ino();
        let inside = serving(self.pid()).unwrap();
        for pid in [self.pid(), inside] {
            let found = fs::metadata(format!("/proc/{pid}/exe")).unwrap().ino();
            assert_eq!(found, wanted, "{pid}");
        }
    }

    /// Of the process outside, and of the one inside.
    fn filters(&self) -> [u32; 2] {
        [self.pid(), serving(self.pid()).unwrap()].map(|pid| {
            let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
            let mut lines = status.lines();
            let count = lines.find_map(|line| line.strip_prefix("Seccomp_filters:"));
            count.unwrap().trim().parse().unwrap()
        })
    }

    fn descriptors(&self) -> usize {
        fs::read_dir(format!("/proc/{}/fd", self.pid()))
            .unwrap()
            .count()
    }
}

/// The process inside of the jail that `outside` waits for, if there is one at this moment.
fn serving(outside: u32) -> Option<u32> {
    let path = format!("/proc/{outside}/task/{outside}/children");
    fs::read_to_string(path).ok()?.trim().parse().ok()
}

fn until(log: &mut impl BufRead, text: &str) -> String {
    let mut all = String::new();
    loop {
        let before = all.len();
        assert_ne!(log.read_line(&mut all).unwrap(), 0, "{text}: {all}");
        if all[before..].contains(text) {
            return all;
        }
    }
}

fn lock(client: &mut Client, (node, fh): (u64, u64), owner: u64) -> raw::Reply {
    let body = Body::new().u64(fh).u64(owner).u64(0).u64(99);
    let body = body.u32(libc::F_WRLCK.cast_unsigned()).u32(1).u64(0);
    client.call(opcode::SETLK, node, body)
}

/// Two open files, node and handle of each: one that has a lock, and one that is not in the folder any more and has content.
fn open_files(client: &mut Client) -> ((u64, u64), (u64, u64)) {
    let kept = client.create(1, "kept", O_RDWR).unwrap();
    let gone = client.create(1, "gone", O_RDWR).unwrap();
    client.write(gone.0, gone.1, 0, b"still here").unwrap();
    client
        .call(opcode::UNLINK, 1, Body::new().name("gone"))
        .unwrap();
    lock(client, kept, 7).unwrap();
    (kept, gone)
}

#[test]
fn what_is_open_goes_on_in_the_new_program() {
    let mut daemon = Daemon::start(&["--flock", "--posix-lock", "--xattr"]);
    let (kept, gone) = open_files(&mut daemon.client);
    for n in 0u64..5 {
        daemon.upgrade();
        let client = &mut daemon.client;
        assert_eq!(client.write(kept.0, kept.1, n, b"x").unwrap(), 1);
        assert_eq!(client.read(gone.0, gone.1, 0, 100).unwrap(), b"still here");
        assert_eq!(client.lookup(1, "kept").unwrap(), kept.0, "the same inode");
        assert_eq!(lock(client, kept, 8).unwrap_err(), libc::EAGAIN);
        lock(client, kept, 7).unwrap();
    }
    assert!(daemon.client.finish().success());
    assert_eq!(fs::read(daemon.tree.path().join("kept")).unwrap(), b"xxxxx");
}

#[test]
fn no_request_is_lost_or_done_twice_and_nothing_piles_up() {
    // More with UPGRADES, for a long run.
    let wanted = std::env::var("UPGRADES")
        .ok()
        .and_then(|text| text.parse().ok())
        .unwrap_or(12usize);
    let mut daemon = Daemon::start(&["--thread-pool-size=2"]);
    daemon.upgrade();
    let before = (daemon.descriptors(), daemon.filters());
    let (program, pid) = (daemon.program.clone(), daemon.pid());
    let Daemon { client, log, .. } = &mut daemon;
    let file = client.create(1, "log", O_WRONLY | O_APPEND).unwrap();
    let mut written = String::new();
    std::thread::scope(|scope| {
        let upgrades = scope.spawn(move || {
            for _ in 0..wanted {
                put(Path::new(BUILT), &program, |_| {});
                kill(Pid::from_raw(pid.cast_signed()), Signal::SIGUSR2).unwrap();
                until(log, " goes on for version ");
            }
        });
        // Each of these would show if it was done twice or not at all.
        for n in 0.. {
            let name = format!("n{n}");
            let made = client.create(1, &name, O_RDWR | O_EXCL).unwrap();
            client.write(made.0, made.1, 0, name.as_bytes()).unwrap();
            client.release(made.0, made.1).unwrap();
            let body = Body::new().u64(1).name(&name).name("moved");
            client.call(opcode::RENAME, 1, body).unwrap();
            assert_eq!(client.lookup(1, &name).unwrap_err(), libc::ENOENT);
            client
                .call(opcode::UNLINK, 1, Body::new().name("moved"))
                .unwrap();
            client.forget(made.0, 1);
            let line = format!("line {n}\n");
            // The offset is a lie, as it is when two guests append to the same file.
            client.write(file.0, file.1, 0, line.as_bytes()).unwrap();
            written.push_str(&line);
            if upgrades.is_finished() {
                break;
            }
        }
    });
    println!("{} lines in {wanted} upgrades", written.lines().count());
    assert!(written.lines().count() > wanted);
    daemon.client.release(file.0, file.1).unwrap();
    daemon.client.forget(file.0, 1);
    // One more, as it was before: what each brings along goes with it.
    daemon.upgrade();
    assert_eq!(daemon.filters(), before.1);
    // One that has just begun to serve, or to wait, has a few of its own at times.
    let descriptors = daemon.descriptors();
    assert!(
        descriptors < before.0 + wanted / 2,
        "{descriptors}, not {}",
        before.0
    );
    let found = fs::read_to_string(daemon.tree.path().join("log")).unwrap();
    assert!(
        found == written,
        "{} of {} bytes",
        found.len(),
        written.len()
    );
    assert_eq!(fs::read_dir(daemon.tree.path()).unwrap().count(), 1);
    assert!(daemon.client.finish().success());
}

#[test]
fn one_that_cannot_go_on_leaves_the_program_that_runs() {
    let mut daemon = Daemon::start(&[]);
    let file = daemon.client.create(1, "file", O_RDWR).unwrap();
    let running = fs::metadata(format!("/proc/{}/exe", daemon.pid()))
        .unwrap()
        .ino();
    let before = (serving(daemon.pid()), daemon.descriptors());
    let refused = |daemon: &mut Daemon, why: &str| {
        daemon.ask();
        let said = daemon.says("; the running program goes on");
        assert!(said.contains(why), "{said}");
        assert_eq!(said.lines().count(), 1, "one message: {said}");
        daemon.client.write(file.0, file.1, 0, b"works").unwrap();
        // It never stopped.
        assert_eq!(serving(daemon.pid()), before.0);
        assert!(daemon.descriptors() < before.1 + 3);
    };
    let program = daemon.program.clone();
    put(Path::new(BUILT), &program, |p| lay_out_differently(p));
    refused(&mut daemon, "this program goes on with layout 0x4001");
    put(Path::new("/etc/passwd"), &program, |_| {});
    refused(&mut daemon, "Exec format error");
    // What is executed can make no other calls than the daemon.
    put(Path::new("/bin/true"), &program, |_| {});
    refused(&mut daemon, "did not say that it can go on");
    // The end of it is missing.
    put(Path::new(BUILT), &program, |p| p.truncate(100_000));
    refused(&mut daemon, "it was killed by SIG");
    fs::remove_file(&program).unwrap();
    refused(&mut daemon, "No such file or directory");
    let runs = fs::metadata(format!("/proc/{}/exe", daemon.pid()))
        .unwrap()
        .ino();
    assert_eq!(runs, running);
    // A good one is taken after all of them.
    daemon.upgrade();
    assert_eq!(daemon.client.read(file.0, file.1, 0, 9).unwrap(), b"works");
    assert!(daemon.client.finish().success());
}

/// The children of a process at this moment.
fn children(of: u32) -> Vec<u32> {
    let path = format!("/proc/{of}/task/{of}/children");
    let text = fs::read_to_string(path).unwrap_or_default();
    text.split(' ').filter_map(|pid| pid.parse().ok()).collect()
}

/// Kills a process that is started beneath `outside` and is not among `known`: the first one, which is the try or what that starts,
/// or that after it, which is to serve next; `after` so many turns, so that each step is met at some time.
fn kill_what_comes(
    outside: u32,
    mut known: Vec<u32>,
    (next, after): (bool, u32),
    over: &AtomicBool,
) {
    let mut skip = next;
    while !over.load(Ordering::Acquire) {
        let mut there = children(outside);
        if !next {
            let inner: Vec<u32> = there.iter().flat_map(|pid| children(*pid)).collect();
            there.extend(inner);
        }
        there.retain(|pid| !known.contains(pid));
        let Some(&pid) = there.first() else {
            continue;
        };
        if skip {
            skip = false;
            known.push(pid);
            continue;
        }
        for _ in 0..after {
            std::hint::spin_loop();
        }
        // It may be gone by now.
        let _ = kill(Pid::from_raw(pid.cast_signed()), Signal::SIGKILL);
        return;
    }
}

#[test]
fn whoever_is_killed_on_the_way_one_of_the_two_programs_goes_on() {
    const MOST: u32 = 400;
    let mut daemon = Daemon::start(&["--posix-lock"]);
    let (kept, gone) = open_files(&mut daemon.client);
    let ends = [
        " goes on for version ",
        "; the running program goes on",
        "; the program of before goes on",
    ];
    let mut seen = [0; 3];
    let mut n = 0;
    // Each step is met at some time, and each end.
    while n < 24 || seen.contains(&0) {
        n += 1;
        assert!(n < MOST, "{seen:?}");
        put(Path::new(BUILT), &daemon.program, |_| {});
        let pid = daemon.pid();
        let known = children(pid);
        let over = AtomicBool::new(false);
        let when = (n % 2 == 0, n % 50 * 10_000);
        let said = std::thread::scope(|scope| {
            scope.spawn(|| kill_what_comes(pid, known, when, &over));
            daemon.ask();
            let said = daemon.says_one_of(&ends);
            over.store(true, Ordering::Release);
            said
        });
        seen[said] += 1;
        let client = &mut daemon.client;
        let text = format!("{n:09}");
        client.write(kept.0, kept.1, 0, text.as_bytes()).unwrap();
        assert_eq!(client.read(kept.0, kept.1, 0, 9).unwrap(), text.as_bytes());
        assert_eq!(client.read(gone.0, gone.1, 0, 100).unwrap(), b"still here");
        assert_eq!(lock(client, kept, 8).unwrap_err(), libc::EAGAIN);
    }
    println!("new, running, before: {seen:?}");
    assert!(daemon.client.finish().success());
}

#[test]
fn one_that_still_waits_for_its_front_end_is_replaced_too() {
    let (programs, socket, _tree, child, mut log) = listening(None, &[]);
    let ask = || kill(Pid::from_raw(child.id().cast_signed()), Signal::SIGUSR2).unwrap();
    for _ in 0..3 {
        put(Path::new(BUILT), &programs.path().join(NAME), |_| {});
        ask();
        until(&mut log, " goes on for version ");
    }
    put(
        Path::new("/etc/passwd"),
        &programs.path().join(NAME),
        |_| {},
    );
    ask();
    until(&mut log, "; the running program goes on");
    let mut client = Daemon::connect(child, &socket);
    client.assert_alive();
    assert!(client.finish().success());
    assert!(!socket.exists());
}

#[test]
fn whoever_started_it_with_whatever_rights() {
    for (user, options) in [
        (Some(12345), &[][..]),
        (
            None,
            &["-uid-map=:0:100000:1000:", "-gid-map=:0:100000:1000:"][..],
        ),
        (None, &["-readonly"][..]),
        (None, &["-seccomp", "allow"][..]),
        (
            None,
            &[
                "-seccomp",
                "log",
                "-cache",
                "never",
                "-rlimit-nofile",
                "5000",
            ][..],
        ),
    ] {
        let mut daemon = Daemon::start_as(user, options);
        let rights = |daemon: &Daemon| {
            [daemon.pid(), serving(daemon.pid()).unwrap()].map(|pid| {
                let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
                let wanted = [
                    "CapPrm",
                    "CapEff",
                    "CapBnd",
                    "NoNewPrivs",
                    "Uid",
                    "Seccomp:",
                ];
                let is_wanted = |line: &&str| wanted.iter().any(|name| line.starts_with(name));
                let lines: Vec<_> = status
                    .lines()
                    .filter(is_wanted)
                    .map(str::to_owned)
                    .collect();
                let map = fs::read_to_string(format!("/proc/{pid}/uid_map")).unwrap();
                (lines, map)
            })
        };
        let before = rights(&daemon);
        for _ in 0..2 {
            daemon.upgrade();
            daemon.client.assert_alive();
            assert_eq!(rights(&daemon), before, "{options:?}");
            // The next one comes as after any death.
            let inside = serving(daemon.pid()).unwrap();
            kill(Pid::from_raw(inside.cast_signed()), Signal::SIGKILL).unwrap();
            daemon.client.assert_alive();
            assert_eq!(rights(&daemon), before, "{options:?}");
        }
        assert!(daemon.client.finish().success());
    }
}

#[test]
fn a_daemon_that_cannot_be_followed_says_so_or_goes_on() {
    // Rights of the host's namespace.
    let mut daemon = Daemon::start(&["-modcaps=+MKNOD"]);
    daemon.ask();
    let said = daemon.says("; the running program goes on");
    assert!(said.contains("-modcaps"), "{said}");
    daemon.client.assert_alive();
    assert!(daemon.client.finish().success());
    // There is nobody outside.
    let mut daemon = Daemon::start(&["-sandbox", "chroot"]);
    daemon.ask();
    daemon.client.assert_alive();
    assert!(daemon.client.finish().success());
    // The one that serves is not the one to ask.
    let mut daemon = Daemon::start(&[]);
    let inside = serving(daemon.pid()).unwrap();
    kill(Pid::from_raw(inside.cast_signed()), Signal::SIGUSR2).unwrap();
    daemon.client.assert_alive();
    assert_eq!(serving(daemon.pid()), Some(inside));
    assert!(daemon.client.finish().success());
}
