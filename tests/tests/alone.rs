//! # Back ends on their own
//!
//! **Job.** `block` and `vhost_user_fs` as a person starts them, with a front end that says as little as possible: what their options
//! do, what they print, how they end. **Who is not trusted.** The process that serves, which is made to do what it must never do.
//! **Why this way.** What a guest sees behind them is shown elsewhere (`foreign_front_end`, `vhost-user-fs/tests`); a status and a
//! descriptor's flags are seen from outside.
#![allow(clippy::unwrap_used)] // in a test, a panic is the report

use std::fs::{self, File};
use std::io::{Read, Write};
use std::net::Shutdown;
use std::os::fd::OwnedFd;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::Duration;

use tests::host::require_root;
use tests::procfs::Status;
use tests::trace::Tracee;
use tests::vm::binary;
use tests::wait::{Deadline, Watched};

/// They need milliseconds; this is for a busy machine.
const LIMIT: Duration = Duration::from_secs(30);

/// A back end, its other end of the socket, and its log.
struct Alone {
    child: Child,
    front_end: UnixStream,
    log: PathBuf,
}

impl Alone {
    /// Starts `program`, which gets one end of a connection as descriptor 3.
    fn start(program: &str, words: &[&str], log: &Path) -> Self {
        let (ours, theirs) = UnixStream::pair().unwrap();
        // The shell puts the socket on the number that `--fd` takes.
        let child = Command::new("sh")
            .args(["-c", "exec \"$0\" \"$@\" 3<&0 </dev/null"])
            .arg(binary(program).unwrap())
            .args(words)
            .args(["--fd", "3", "-D"])
            .arg(log)
            .stdin(Stdio::from(OwnedFd::from(theirs)))
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        Self {
            child,
            front_end: ours,
            log: log.to_owned(),
        }
    }

    /// Asks what the device offers. Whoever answers has shut its jail: it reads nothing before.
    fn offered(&mut self) -> u64 {
        offered(&mut self.front_end)
    }

    /// The process that serves.
    fn serving(&self) -> i32 {
        serving(self.child.id())
    }

    /// Leaves it, upon which it ends; what it has logged.
    fn leave(&mut self) -> String {
        self.front_end.shutdown(Shutdown::Both).unwrap();
        let (status, said) = self.ends();
        assert_eq!(status.code(), Some(0), "{said}");
        said
    }

    fn ends(&mut self) -> (ExitStatus, String) {
        let status = ended(&mut self.child);
        (status, fs::read_to_string(&self.log).unwrap())
    }
}

#[track_caller]
fn ended(child: &mut Child) -> ExitStatus {
    let watched = Watched::new(child.id().cast_signed()).unwrap();
    assert!(watched.ended(Deadline::after(LIMIT)).unwrap(), "it goes on");
    child.wait().unwrap()
}

impl Drop for Alone {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// GET_FEATURES, of version 1, without a body; the answer has one of 8 bytes behind a header of 12.
fn offered(front_end: &mut UnixStream) -> u64 {
    let words: Vec<u8> = [1_u32, 1, 0]
        .into_iter()
        .flat_map(u32::to_ne_bytes)
        .collect();
    front_end.write_all(&words).unwrap();
    let mut answer = [0; 20];
    front_end.read_exact(&mut answer).unwrap();
    u64::from_ne_bytes(answer[12..].try_into().unwrap())
}

fn serving(outside: u32) -> i32 {
    let path = format!("/proc/{outside}/task/{outside}/children");
    let children = fs::read_to_string(path).unwrap();
    children.trim().parse().unwrap()
}

/// Has the process run into nothing: a fault of its own, which no signal from outside is to the first process of a namespace.
fn fault(pid: i32) {
    let mut tracee = Tracee::stop(pid).unwrap();
    // Its last answer is out before it has noted that: a death in between would be the end of the connection.
    let waits = [
        libc::SYS_epoll_wait,
        libc::SYS_epoll_pwait,
        libc::SYS_epoll_pwait2,
    ];
    tracee.go_on_until_in(&waits).unwrap();
    let mut registers = tracee.registers().unwrap();
    registers.rip = 0;
    registers.orig_rax = u64::MAX; // no call is made again
    tracee.set_registers(&registers).unwrap();
}

/// Has it make a call that no back end may.
fn forbidden_call(pid: i32) {
    let mut tracee = Tracee::stop_behind_filter(pid).unwrap();
    let said = tracee.call(libc::SYS_socket, &[libc::AF_INET as u64, 1, 0]);
    assert!(said.is_err(), "{said:?}");
    assert_eq!(tracee.died_of(), Some(libc::SIGSYS));
}

fn image(dir: &Path) -> PathBuf {
    let image = dir.join("disk.img");
    File::create(&image).unwrap().set_len(1 << 20).unwrap();
    image
}

/// The flags of the image's descriptor, as open(2) has them.
fn flags_of(pid: i32, fd: i32) -> i32 {
    let info = fs::read_to_string(format!("/proc/{pid}/fdinfo/{fd}")).unwrap();
    let line = info.lines().find_map(|line| line.strip_prefix("flags:"));
    i32::from_str_radix(line.unwrap().trim(), 8).unwrap()
}

#[test]
fn a_disks_options_have_their_effect() {
    const VIRTIO_BLK_F_RO: u64 = 1 << 5;
    const VIRTIO_BLK_F_DISCARD: u64 = 1 << 13;
    require_root();
    // The project's own folder is on a disk: a tmpfs may have no O_DIRECT.
    let dir = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    let (image, log) = (image(dir.path()), dir.path().join("log"));
    let file = format!("--file={}", image.display());
    fs::write(&log, "what was there before\n").unwrap();

    let mut plain = Alone::start("block", &[&file, "--log-level", "info"], &log);
    let features = plain.offered();
    assert_eq!(features & (VIRTIO_BLK_F_RO | VIRTIO_BLK_F_DISCARD), 0);
    let pid = plain.serving();
    assert_eq!(flags_of(pid, 5) & libc::O_ACCMODE, libc::O_RDWR);
    assert_eq!(flags_of(pid, 5) & libc::O_DIRECT, 0);
    assert_eq!(Status::of(pid).unwrap().seccomp_mode(), 2);
    let said = plain.leave();
    assert!(said.starts_with("what was there before\n"), "{said}");
    assert!(said.contains("the front end left"), "{said}");
    let mut spoken = String::new();
    let mut stderr = plain.child.stderr.take().unwrap();
    stderr.read_to_string(&mut spoken).unwrap();
    assert_eq!(spoken, "", "all of it goes to -D");

    let words = [&file, "--readonly", "--direct", "--seccomp=allow"];
    let mut other = Alone::start("block", &words, &log);
    assert_eq!(other.offered() & VIRTIO_BLK_F_RO, VIRTIO_BLK_F_RO);
    let pid = other.serving();
    assert_eq!(flags_of(pid, 5) & libc::O_ACCMODE, libc::O_RDONLY);
    assert_eq!(flags_of(pid, 5) & libc::O_DIRECT, libc::O_DIRECT);
    assert_eq!(Status::of(pid).unwrap().seccomp_mode(), 0);
    other.leave();
    let mut frees = Alone::start("block", &[&file, "--discard=unmap"], &log);
    assert_eq!(frees.offered() & VIRTIO_BLK_F_DISCARD, VIRTIO_BLK_F_DISCARD);
    frees.leave();

    let said = |words: &[&str]| {
        let output = Command::new(binary("block").unwrap())
            .args(words)
            .output()
            .unwrap();
        let text = |bytes| String::from_utf8(bytes).unwrap();
        (
            output.status.code(),
            text(output.stdout),
            text(output.stderr),
        )
    };
    let (status, told, _) = said(&["--print-capabilities"]);
    let told: serde_json::Value = serde_json::from_str(&told).unwrap();
    assert_eq!((status, &told["type"]), (Some(0), &"block".into()));
    let (status, told, _) = said(&["--version"]);
    assert!(status == Some(0) && told.starts_with("block "), "{told}");
    let (status, told, wrong) = said(&["--file", "x", "--aio", "threads", "--fd", "3"]);
    assert_eq!((status, told.as_str()), (Some(2), ""));
    assert!(
        wrong.starts_with("block: ") && wrong.lines().count() == 1,
        "{wrong}"
    );
    let none = dir.path().join("none");
    let (status, _, wrong) = said(&["--file", none.to_str().unwrap(), "--socket-path", "/x"]);
    assert_eq!(status, Some(1));
    assert!(wrong.contains("No such file"), "{wrong}");
}

#[test]
fn a_disks_socket_is_for_its_user_and_the_group_that_is_named() {
    require_root();
    let dir = tempfile::tempdir().unwrap();
    let (image, socket) = (image(dir.path()), dir.path().join("disk.sock"));
    let mut rights = Vec::new();
    for group in [&["--keep"][..], &["--keep", "--socket-group", "12"]] {
        let mut child = Command::new(binary("block").unwrap())
            .arg("--file")
            .arg(&image)
            .arg("--socket-path")
            .arg(&socket)
            .args(group)
            .args(["--log-level", "info"])
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        let log = child.stderr.take().unwrap();
        let mut lines = std::io::BufRead::lines(std::io::BufReader::new(log));
        lines.find(|line| line.as_ref().unwrap().contains("listening"));
        let found = fs::metadata(&socket).unwrap();
        rights.push((found.permissions().mode() & 0o777, found.gid()));
        child.kill().unwrap();
        child.wait().unwrap();
        // The next one replaces what this one left.
        assert!(socket.exists());
    }
    assert_eq!(rights, [(0o700, 0), (0o770, 12)]);
}

#[test]
fn a_forbidden_call_is_the_end_and_is_told() {
    require_root();
    let dir = tempfile::tempdir().unwrap();
    let log = dir.path().join("log");
    let file = format!("--file={}", image(dir.path()).display());
    let mut disk = Alone::start("block", &[&file, "--keep"], &log);
    disk.offered();
    forbidden_call(disk.serving());
    let (status, said) = disk.ends();
    assert_eq!(status.code(), Some(1), "{said}");
    assert!(said.contains("killed by its system call filter"), "{said}");

    let source = format!("-source={}", dir.path().display());
    let mut folder = Alone::start("vhost_user_fs", &[&source], &log);
    folder.offered();
    forbidden_call(folder.serving());
    let (status, said) = folder.ends();
    assert_eq!(status.code(), Some(128 + libc::SIGSYS), "{said}");
    assert!(said.contains("killed by SIGSYS"), "{said}");
}

#[test]
fn five_faults_are_survived_and_the_sixth_is_the_end() {
    require_root();
    let dir = tempfile::tempdir().unwrap();
    let log = dir.path().join("log");
    let source = format!("-source={}", dir.path().display());
    let mut folder = Alone::start("vhost_user_fs", &[&source], &log);
    let first = folder.offered();
    for _ in 0..5 {
        let before = folder.serving();
        fault(before);
        // Another one answers on the same connection.
        assert_eq!(folder.offered(), first);
        assert_ne!(folder.serving(), before);
    }
    fault(folder.serving());
    let (status, said) = folder.ends();
    assert_eq!(status.code(), Some(128 + libc::SIGSEGV), "{said}");
    assert_eq!(said.matches("another one goes on").count(), 5, "{said}");

    let image = image(dir.path());
    let socket = dir.path().join("disk.sock");
    let mut disk = Command::new(binary("block").unwrap())
        .arg("--file")
        .arg(&image)
        .arg("--socket-path")
        .arg(&socket)
        .args(["--log-level", "info"])
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let stderr = disk.stderr.take().unwrap();
    let mut lines = std::io::BufRead::lines(std::io::BufReader::new(stderr)).map(Result::unwrap);
    lines.find(|line| line.contains("listening")).unwrap();
    for _ in 0..6 {
        let mut front_end = UnixStream::connect(&socket).unwrap();
        offered(&mut front_end);
        fault(serving(disk.id()));
        // It has no front end any more.
        assert_eq!(front_end.read(&mut [0]).unwrap(), 0);
        lines.find(|line| line.contains("killed")).unwrap();
    }
    assert_eq!(ended(&mut disk).code(), Some(1));
    let rest: Vec<String> = lines.collect();
    assert!(
        rest.concat()
            .contains("killed 6 times within 10 s: given up"),
        "{rest:?}"
    );
    assert!(!socket.exists());
}
