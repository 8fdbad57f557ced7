//! Each option of the command line by what it changes, seen by a front end that speaks FUSE by itself or by the host.

#![allow(clippy::unwrap_used)] // test code
#![allow(unsafe_code)] // nix has no listxattr

mod raw;

use std::fs;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::{Child, Command};
use std::time::{Duration, SystemTime};

use device_host::test_frontend::{INDIRECT_DESC, TestFrontend};
use fs_device::fuse::wire::{fopen, init, opcode};
use libc::{EPERM, EROFS, O_RDONLY, O_RDWR};
use nix::sys::signal::{Signal, kill};
use nix::unistd::{Pid, geteuid};
use raw::{Body, Client, u32_at, u64_at};
use tests::daemon::Daemon;

/// A daemon needs milliseconds; this is for a busy machine.
const LIMIT: Duration = Duration::from_secs(60);

fn tree() -> tempfile::TempDir {
    let dir = tempfile::tempdir().unwrap();
    fs::set_permissions(dir.path(), fs::Permissions::from_mode(0o777)).unwrap();
    fs::write(dir.path().join("file"), "content").unwrap();
    dir
}

/// The flags of `INIT` that the daemon takes of all that there are.
fn agreed(options: &[&str]) -> u64 {
    let dir = tree();
    let mut client = Client::start(dir.path(), options);
    let offer = u64::MAX >> 1;
    let body = Body::new()
        .u32(7)
        .u32(41)
        .u32(1 << 17)
        .u32((offer & 0xffff_ffff) as u32)
        .u32((offer >> 32) as u32);
    let reply = client.call(opcode::INIT, 0, body.zeros(44)).unwrap();
    assert!(client.finish().success());
    u64::from(u32_at(&reply, 12)) | u64::from(u32_at(&reply, 32)) << 32
}

/// The process inside of the jail.
fn serving(child: &Child) -> u32 {
    let outside = child.id();
    let path = format!("/proc/{outside}/task/{outside}/children");
    fs::read_to_string(path).unwrap().trim().parse().unwrap()
}

fn status(pid: u32, field: &str) -> String {
    let text = fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
    let line = text.lines().find_map(|line| line.strip_prefix(field));
    line.unwrap().trim_start_matches(':').trim().to_owned()
}

#[test]
fn flags_of_the_session_follow_the_options() {
    let plain = agreed(&[]);
    for (options, flag, with) in [
        (&["-writeback"][..], init::WRITEBACK_CACHE, true),
        (&["-xattr", "-posix-acl"], init::POSIX_ACL, true),
        (&["-announce-submounts"], init::SUBMOUNTS, true),
        (&["-allow-mmap"], init::DIRECT_IO_ALLOW_MMAP, true),
        (&["-posix-lock"], init::POSIX_LOCKS, true),
        (&["-flock"], init::FLOCK_LOCKS, true),
        (&["-cache", "always"], init::CACHE_SYMLINKS, true),
        (&["-no-readdirplus"], init::DO_READDIRPLUS, false),
    ] {
        assert_eq!(plain & flag != 0, !with, "without {options:?}");
        assert_eq!(agreed(options) & flag != 0, with, "{options:?}");
    }
}

#[test]
fn the_cache_policy_says_how_long_things_hold() {
    for (policy, seconds, flags) in [
        ("never", 0, fopen::DIRECT_IO | fopen::PARALLEL_DIRECT_WRITES),
        ("none", 0, fopen::DIRECT_IO | fopen::PARALLEL_DIRECT_WRITES),
        (
            "metadata",
            86400,
            fopen::DIRECT_IO | fopen::PARALLEL_DIRECT_WRITES,
        ),
        ("auto", 1, 0),
        ("always", 86400, fopen::KEEP_CACHE),
    ] {
        let dir = tree();
        let mut client = Client::start(dir.path(), &["-cache", policy]);
        let entry = client
            .call(opcode::LOOKUP, 1, Body::new().name("file"))
            .unwrap();
        assert_eq!(
            (u64_at(&entry, 16), u64_at(&entry, 24)),
            (seconds, seconds),
            "{policy}"
        );
        let body = Body::new().u32(0).u32(0);
        let opened = client.call(opcode::OPEN, u64_at(&entry, 0), body).unwrap();
        assert_eq!(u32_at(&opened, 8), flags, "{policy}");
        assert!(client.finish().success());
    }
}

#[test]
fn a_read_only_folder_refuses_and_another_does_not() {
    let dir = tree();
    let mut client = Client::start(dir.path(), &["-readonly"]);
    assert_eq!(client.create(1, "new", O_RDWR), Err(EROFS));
    let file = client.lookup(1, "file").unwrap();
    assert_eq!(client.open(file, O_RDWR), Err(EROFS));
    client.open(file, O_RDONLY).unwrap();
    assert!(client.finish().success());
    let mut client = Client::start(dir.path(), &[]);
    client.create(1, "new", O_RDWR).unwrap();
    assert!(client.finish().success());
}

fn set_xattr(client: &mut Client, node: u64, name: &str, value: &[u8]) -> Result<(), i32> {
    let len = value.len() as u32;
    // All flags were offered, so the request has its longer form.
    let body = Body::new().u32(len).u32(0).u32(0).u32(0).name(name);
    client
        .call(opcode::SETXATTR, node, body.bytes(value))
        .map(drop)
}

fn list_xattr(client: &mut Client, node: u64) -> String {
    let body = Body::new().u32(4096).u32(0);
    let list = client.call(opcode::LISTXATTR, node, body).unwrap();
    String::from_utf8(list).unwrap().replace('\0', " ")
}

/// The host's own view: names of a file's attributes.
fn on_host(path: &Path) -> String {
    let mut list = vec![0u8; 4096];
    let name = std::ffi::CString::new(path.to_str().unwrap()).unwrap();
    // SAFETY: a terminated path and a buffer of the length that is told.
    let len = unsafe { libc::listxattr(name.as_ptr(), list.as_mut_ptr().cast(), list.len()) };
    list.truncate(usize::try_from(len).unwrap());
    String::from_utf8(list).unwrap().replace('\0', " ")
}

#[test]
fn attributes_are_passed_on_when_asked_for() {
    let dir = tree();
    let mut client = Client::start(dir.path(), &[]);
    let file = client.lookup(1, "file").unwrap();
    assert_eq!(
        set_xattr(&mut client, file, "user.a", b"1"),
        Err(libc::ENOSYS)
    );
    assert!(client.finish().success());
    let mut client = Client::start(dir.path(), &["-xattr"]);
    let file = client.lookup(1, "file").unwrap();
    set_xattr(&mut client, file, "user.a", b"1").unwrap();
    assert_eq!(on_host(&dir.path().join("file")), "user.a ");
    // A list is an attribute that takes an option of its own.
    let acl = set_xattr(&mut client, file, "system.posix_acl_access", b"1");
    assert_eq!(acl, Err(libc::EOPNOTSUPP));
    assert!(client.finish().success());
}

#[test]
fn attributes_have_the_names_that_the_map_gives_them() {
    let dir = tree();
    let path = dir.path().join("file");
    let options = ["-xattr", "-xattrmap", ":map::user.vm.:"];
    let mut client = Client::start(dir.path(), &options);
    let file = client.lookup(1, "file").unwrap();
    // Neither the host's kernel nor its users take these for what the guest means by them.
    set_xattr(&mut client, file, "trusted.overlay.opaque", b"y").unwrap();
    set_xattr(&mut client, file, "security.capability", b"anything").unwrap();
    assert_eq!(
        list_xattr(&mut client, file),
        "trusted.overlay.opaque security.capability "
    );
    assert_eq!(
        on_host(&path),
        "user.vm.trusted.overlay.opaque user.vm.security.capability "
    );
    let get = Body::new().u32(64).u32(0).name("trusted.overlay.opaque");
    assert_eq!(client.call(opcode::GETXATTR, file, get).unwrap(), b"y");
    // The size that a list needs is that of the guest's names.
    let size = Body::new().u32(0).u32(0);
    let size = client.call(opcode::LISTXATTR, file, size).unwrap();
    assert_eq!(u32_at(&size, 0), 43);
    let small = Body::new().u32(42).u32(0);
    assert_eq!(
        client.call(opcode::LISTXATTR, file, small),
        Err(libc::ERANGE)
    );
    // Whoever writes to a program takes its capabilities away, by whatever name they go.
    let fh = client.open(file, O_RDWR).unwrap();
    client.write(file, fh, 0, b"x").unwrap();
    assert_eq!(on_host(&path), "user.vm.trusted.overlay.opaque ");
    let name = Body::new().name("trusted.overlay.opaque");
    client.call(opcode::REMOVEXATTR, file, name).unwrap();
    assert_eq!(on_host(&path), "");
    assert!(client.finish().success());

    let rules = ":unsupported:client:security.::/bad/client/user.no//:ok:all:user.:user.:";
    let mut client = Client::start(dir.path(), &["-xattr", "-xattrmap", rules]);
    let file = client.lookup(1, "file").unwrap();
    for (name, errno) in [
        ("security.selinux", libc::ENOTSUP),
        ("user.no", EPERM),
        ("trusted.x", EPERM),
    ] {
        let set = set_xattr(&mut client, file, name, b"1");
        assert_eq!(set, Err(errno), "{name}");
    }
    set_xattr(&mut client, file, "user.yes", b"1").unwrap();
    assert!(client.finish().success());
}

#[test]
fn users_and_groups_are_translated_both_ways() {
    if !geteuid().is_root() {
        // Without root there is one user only.
        return;
    }
    let dir = tree();
    let options = [
        "-translate-uid=map:0:70000:1000",
        "-translate-uid=forbid-guest:5000:1",
        "--translate-gid",
        "squash-guest:0:80000:1000",
    ];
    let mut client = Client::start(dir.path(), &options);
    (client.uid, client.gid) = (5, 6);
    let (node, _) = client.create(1, "new", O_RDWR).unwrap();
    let host = fs::metadata(dir.path().join("new")).unwrap();
    assert_eq!((host.uid(), host.gid()), (70005, 80000));
    let attr = client
        .call(opcode::GETATTR, node, Body::new().zeros(16))
        .unwrap();
    // fuse_attr_out: two words of time, then fuse_attr.
    let owner = |attr: &[u8]| (u32_at(attr, 16 + 68), u32_at(attr, 16 + 72));
    assert_eq!(owner(&attr), (5, 80000), "groups have no way back");
    // FATTR_UID and FATTR_GID.
    let chown = |uid: u32, gid: u32| {
        Body::new()
            .u32(6)
            .u32(0)
            .zeros(64)
            .u32(0)
            .u32(uid)
            .u32(gid)
            .u32(0)
    };
    let body = chown(7, 7);
    assert_eq!(body.0.len(), 88);
    let attr = client.call(opcode::SETATTR, node, body).unwrap();
    assert_eq!(owner(&attr), (7, 80000));
    let host = fs::metadata(dir.path().join("new")).unwrap();
    assert_eq!((host.uid(), host.gid()), (70007, 80000));
    assert_eq!(
        client.call(opcode::SETATTR, node, chown(5000, 0)),
        Err(EPERM)
    );
    client.uid = 5000;
    assert_eq!(client.create(1, "forbidden", O_RDWR), Err(EPERM));
    client.uid = 2000; // no rule
    client.create(1, "alike", O_RDWR).unwrap();
    let host = fs::metadata(dir.path().join("alike")).unwrap();
    assert_eq!(host.uid(), 2000);
    assert!(client.finish().success());
}

#[test]
fn users_that_are_not_in_the_map_do_not_exist() {
    if !geteuid().is_root() {
        return;
    }
    let dir = tree();
    fs::write(dir.path().join("of-root"), "secret").unwrap();
    fs::set_permissions(
        dir.path().join("of-root"),
        fs::Permissions::from_mode(0o600),
    )
    .unwrap();
    let options = [
        "-uid-map=:0:100000:1000:",
        "-uid-map=/5000/7/1/",
        "--gid-map",
        ":0:200000:1000:",
    ];
    let mut client = Client::start(dir.path(), &options);
    let on_host = |name: &str| {
        let file = fs::metadata(dir.path().join(name)).unwrap();
        (file.uid(), file.gid())
    };
    let owner = |client: &mut Client, node: u64| {
        let attr = client
            .call(opcode::GETATTR, node, Body::new().zeros(16))
            .unwrap();
        (u32_at(&attr, 16 + 68), u32_at(&attr, 16 + 72))
    };
    for (number, (guest, host)) in [
        ((0, 0), (100_000, 200_000)),
        ((5, 6), (100_005, 200_006)),
        ((5000, 999), (7, 200_999)),
    ]
    .into_iter()
    .enumerate()
    {
        let name = format!("new-{number}");
        (client.uid, client.gid) = guest;
        let (node, _) = client.create(1, &name, O_RDWR).unwrap();
        assert_eq!(on_host(&name), host);
        assert_eq!(owner(&mut client, node), guest);
    }
    (client.uid, client.gid) = (1000, 0);
    assert_eq!(client.create(1, "nobody's", O_RDWR), Err(libc::EINVAL));
    // Not even the guest's root has a right on what belongs to someone else.
    (client.uid, client.gid) = (0, 0);
    let node = client.lookup(1, "of-root").unwrap();
    assert_eq!(owner(&mut client, node), (65534, 65534));
    assert_eq!(client.open(node, O_RDONLY), Err(libc::EACCES));
    let mode = Body::new().u32(1).u32(0).zeros(60).u32(0o666).zeros(16);
    assert_eq!(mode.0.len(), 88);
    assert_eq!(client.call(opcode::SETATTR, node, mode), Err(EPERM));

    // The next process has the same map.
    let before = serving(&client.child);
    kill(Pid::from_raw(before.cast_signed()), Signal::SIGKILL).unwrap();
    (client.uid, client.gid) = (5, 6);
    client.create(1, "later", O_RDWR).unwrap();
    assert_eq!(on_host("later"), (100_005, 200_006));
    let after = serving(&client.child);
    assert_ne!(before, after);
    let map = fs::read_to_string(format!("/proc/{after}/uid_map")).unwrap();
    let numbers: Vec<u32> = map.split_whitespace().map(|n| n.parse().unwrap()).collect();
    assert_eq!(numbers, [0, 100_000, 1000, 5000, 7, 1]);
    assert!(client.finish().success());
}

#[test]
fn only_root_chooses_the_users_that_there_are() {
    if !geteuid().is_root() {
        return;
    }
    let dir = tree();
    // His own number is what he has anyway.
    let own = ["-uid-map=:0:65534:1:", "-gid-map=:0:65534:1:"];
    let mut client = Client::start_as(dir.path(), &own, Some(65534));
    client.create(1, "new", O_RDWR).unwrap();
    assert!(client.finish().success());
    let log = dir.path().join("log");
    let options = ["-uid-map=:0:100000:10:", "-D", log.to_str().unwrap()];
    let (mut child, _socket) = raw::spawn(dir.path(), &options, Some(65534));
    assert_eq!(child.wait().unwrap().code(), Some(1));
    let said = fs::read_to_string(&log).unwrap();
    assert!(said.contains("-uid-map, -gid-map: only root"), "{said}");
}

#[test]
fn times_of_access_stay_when_asked_for() {
    let day = Duration::from_secs(86400);
    for (options, stays) in [(&["-preserve-noatime"][..], true), (&[], false)] {
        let dir = tree();
        let path = dir.path().join("file");
        let old = SystemTime::now() - 3 * day;
        let times = fs::FileTimes::new().set_accessed(old).set_modified(old);
        fs::File::options()
            .write(true)
            .open(&path)
            .unwrap()
            .set_times(times)
            .unwrap();
        let mut client = Client::start(dir.path(), options);
        let file = client.lookup(1, "file").unwrap();
        let fh = client.open(file, O_RDONLY | libc::O_NOATIME).unwrap();
        assert_eq!(client.read(file, fh, 0, 10).unwrap(), b"content");
        assert!(client.finish().success());
        let now = fs::metadata(&path).unwrap().accessed().unwrap();
        assert_eq!(now < SystemTime::now() - 2 * day, stays, "{options:?}");
    }
}

#[test]
fn the_number_of_descriptors_bounds_the_guest() {
    let dir = tree();
    for number in 0..300 {
        fs::write(dir.path().join(format!("{number}")), "").unwrap();
    }
    let mut client = Client::start(dir.path(), &["-rlimit-nofile", "256"]);
    let limits = fs::read_to_string(format!("/proc/{}/limits", serving(&client.child))).unwrap();
    let files = limits.lines().find(|l| l.starts_with("Max open files"));
    let words: Vec<&str> = files.unwrap().split_whitespace().collect();
    assert_eq!(words[3..5], ["256", "256"]);
    let nodes: Vec<u64> = (0..300)
        .map(|n| client.lookup(1, &n.to_string()).unwrap())
        .collect();
    let open = || {
        let path = format!("/proc/{}/fd", serving(&client.child));
        fs::read_dir(path).unwrap().count()
    };
    assert!((120..=256).contains(&open()), "{}", open());
    // Open files need one each, for as long as they are open.
    let files: Vec<_> = nodes
        .iter()
        .map_while(|node| client.open(*node, O_RDONLY).ok())
        .collect();
    assert_eq!(
        files.len(),
        256 - 128 - 2,
        "the root is one, and the file that is opened"
    );
    assert_eq!(client.open(nodes[299], O_RDONLY), Err(libc::ENFILE));
    client.assert_alive();
    assert!(client.finish().success());
}

#[test]
fn capabilities_are_added_and_taken_away() {
    if !geteuid().is_root() {
        return;
    }
    let dir = tree();
    for (options, kept) in [
        (&["-modcaps=-FOWNER,+KILL"][..], 0xd3 | 1 << 5),
        (&["-modcaps=-chown:-fsetid"], 0xca),
        (&["-xattr"], 0xdb | 1 << 31),
    ] {
        let client = Client::start(dir.path(), options);
        let effective = status(serving(&client.child), "CapEff");
        let effective = u64::from_str_radix(&effective, 16).unwrap();
        assert_eq!(effective, kept, "{options:?}");
        assert!(client.finish().success());
    }
    // What counts on the host only leaves the user namespace out.
    let own = |options: &[&str]| {
        let client = Client::start(dir.path(), options);
        let user = |pid: &str| fs::read_link(format!("/proc/{pid}/ns/user")).unwrap();
        let own = user(&serving(&client.child).to_string()) != user("self");
        assert!(client.finish().success());
        own
    };
    assert!(own(&[]) && !own(&["-modcaps=+MKNOD"]));
}

/// Starts the daemon with a socket of its own.
fn listening(dir: &Path, options: &[&str]) -> Daemon {
    let program = Path::new(env!("CARGO_BIN_EXE_vhost_user_fs"));
    Daemon::sharing(program, dir, &dir.join("socket"), options).unwrap()
}

/// A front end comes and leaves.
fn end(mut daemon: Daemon, socket: &Path) {
    drop(UnixStream::connect(socket).unwrap());
    assert!(daemon.wait(LIMIT).unwrap().success());
}

#[test]
fn the_socket_is_for_its_user_or_for_a_group_too() {
    let dir = tree();
    let socket = dir.path().join("socket");
    let daemon = listening(dir.path(), &[]);
    assert!(
        daemon.said.contains(socket.to_str().unwrap()),
        "{}",
        daemon.said
    );
    assert_eq!(fs::metadata(&socket).unwrap().mode() & 0o777, 0o700);
    end(daemon, &socket);
    assert!(!socket.exists());
    if geteuid().is_root() {
        for group in ["65534", "nogroup"] {
            let daemon = listening(dir.path(), &["-socket-group", group]);
            let made = fs::metadata(&socket).unwrap();
            assert_eq!((made.mode() & 0o777, made.gid()), (0o770, 65534), "{group}");
            end(daemon, &socket);
        }
    }
    let refused = Command::new(env!("CARGO_BIN_EXE_vhost_user_fs"))
        .args(["-source", "/tmp", "-socket-path"])
        .arg(&socket)
        .args(["-socket-group", "nobody-has-this-name"])
        .output()
        .unwrap();
    assert_eq!(refused.status.code(), Some(1));
    assert_eq!(
        String::from_utf8_lossy(&refused.stderr),
        "vhost_user_fs: -socket-group nobody-has-this-name: neither a number nor a group of /etc/group\n"
    );
    assert!(!socket.exists(), "nothing is left behind");
}

#[test]
fn messages_go_where_they_are_sent() {
    let dir = tree();
    let log = dir.path().join("log");
    // Everything that is said at this level is said to the file, so there is nothing to wait for on standard error.
    let (child, socket) = raw::spawn(
        dir.path(),
        &["-D", log.to_str().unwrap(), "-log-level", "info"],
        None,
    );
    drop(socket);
    assert!(child.wait_with_output().unwrap().status.success());
    let said = fs::read_to_string(&log).unwrap();
    assert!(said.contains("the front end left"), "{said}");
    assert_eq!(fs::metadata(&log).unwrap().mode() & 0o777, 0o600);
    let (child, socket) = raw::spawn(dir.path(), &["-D", log.to_str().unwrap()], None);
    drop(socket);
    assert!(child.wait_with_output().unwrap().status.success());
    assert_eq!(
        fs::read_to_string(&log).unwrap(),
        said,
        "appended to, by nothing"
    );
}

#[test]
fn each_level_of_messages_tells_more_than_the_one_before() {
    let said = ["do not end this process", "the front end left", "accepted"];
    for (level, expected) in [
        ("error", 0),
        ("warn", 1),
        ("info", 2),
        ("debug", 3),
        ("trace", 3),
    ] {
        let dir = tree();
        let log = dir.path().join("log");
        let to = ["-D", log.to_str().unwrap(), "-seccomp", "log"];
        let options = [&to[..], &["-log-level", level]].concat();
        assert!(Client::start(dir.path(), &options).finish().success());
        let log = fs::read_to_string(&log).unwrap();
        for (n, words) in said.iter().enumerate() {
            assert_eq!(log.contains(words), n < expected, "{level}: {log}");
        }
    }
}

#[test]
fn the_filter_is_there_and_its_weakening_is_told() {
    for (action, mode, told) in [
        ("kill", "2", false),
        ("trap", "2", true),
        ("log", "2", true),
        ("allow", "0", true),
    ] {
        let dir = tree();
        let log = dir.path().join("log");
        let options = ["-seccomp", action, "-D", log.to_str().unwrap()];
        let mut client = Client::start(dir.path(), &options);
        client.assert_alive();
        assert_eq!(status(serving(&client.child), "Seccomp"), mode, "{action}");
        assert!(client.finish().success());
        let said = fs::read_to_string(&log).unwrap();
        assert_eq!(said.contains("do not end this process"), told, "{action}");
    }
}

#[test]
fn chroot_changes_the_root_and_nothing_else() {
    if !geteuid().is_root() {
        return;
    }
    let dir = tree();
    let mut client = Client::start(dir.path(), &["-sandbox", "chroot"]);
    client.lookup(1, "file").unwrap();
    // There is no process outside of it.
    let pid = client.child.id();
    let root = fs::metadata(format!("/proc/{pid}/root")).unwrap();
    let tree = fs::metadata(dir.path()).unwrap();
    assert_eq!((root.dev(), root.ino()), (tree.dev(), tree.ino()));
    let user = |pid: &str| fs::read_link(format!("/proc/{pid}/ns/user")).unwrap();
    assert_eq!(user(&pid.to_string()), user("self"));
    assert!(client.finish().success());
}

#[test]
fn mounts_in_the_folder_are_announced_when_asked_for() {
    if !geteuid().is_root() {
        return;
    }
    let dir = tree();
    let below = dir.path().join("below");
    fs::create_dir(&below).unwrap();
    let mount = Command::new("mount")
        .args(["-t", "tmpfs", "none"])
        .arg(&below)
        .status();
    assert!(mount.unwrap().success());
    // Flag 1 of fuse_attr: the root of a mount.
    for (options, flag) in [(&["-announce-submounts"][..], 1), (&[], 0)] {
        let mut client = Client::start(dir.path(), options);
        let entry = client
            .call(opcode::LOOKUP, 1, Body::new().name("below"))
            .unwrap();
        assert_eq!(u32_at(&entry, 124), flag, "{options:?}");
        assert!(client.finish().success());
    }
    assert!(
        Command::new("umount")
            .arg(&below)
            .status()
            .unwrap()
            .success()
    );
}

/// A front end at the daemon's socket.
fn connected(socket: &Path) -> TestFrontend {
    TestFrontend::connect(UnixStream::connect(socket).unwrap(), INDIRECT_DESC)
}

#[test]
fn the_folder_is_named_in_two_ways() {
    let dir = tree();
    let socket = dir.path().join("socket");
    for option in ["-source", "-shared-dir"] {
        let mut command = Command::new(env!("CARGO_BIN_EXE_vhost_user_fs"));
        let path = socket.to_str().unwrap();
        command.arg(option).arg(dir.path());
        command.args(["-socket-path", path, "-log-level", "info"]);
        let mut daemon = Daemon::start(&mut command, "listening").unwrap();
        let mut front = connected(&socket);
        // With an answer, it is in its jail.
        front.config(0, 4);
        let outside = daemon.pid();
        let children = format!("/proc/{outside}/task/{outside}/children");
        let inside = fs::read_to_string(children).unwrap();
        let root = fs::metadata(format!("/proc/{}/root", inside.trim())).unwrap();
        let shared = fs::metadata(dir.path()).unwrap();
        assert_eq!((root.dev(), root.ino()), (shared.dev(), shared.ino()));
        drop(front);
        assert!(daemon.wait(LIMIT).unwrap().success(), "{option}");
    }
}

#[test]
fn the_name_to_mount_by_is_in_the_configuration_space() {
    for (options, name) in [(&["-tag", "other"][..], "other"), (&[], "myfs")] {
        let dir = tree();
        let mut client = Client::start(dir.path(), options);
        let space = client.front.config(0, 36);
        assert_eq!(space[..name.len()], *name.as_bytes());
        assert!(space[name.len()..].iter().all(|byte| *byte == 0));
        assert!(client.finish().success());
    }
}

#[test]
fn inodes_are_descriptors_whether_or_not_handles_are_preferred() {
    let dir = tree();
    for when in ["never", "prefer"] {
        let mut client = Client::start(dir.path(), &["-inode-file-handles", when]);
        client.lookup(1, "file").unwrap();
        // The file is known by folder and name until it is opened for the first time, and held from then on.
        let node = client.lookup(1, "file").unwrap();
        client.open(node, O_RDONLY).unwrap();
        let pid = serving(&client.child);
        let held = fs::read_dir(format!("/proc/{pid}/fd"))
            .unwrap()
            .filter_map(|fd| fs::read_link(fd.unwrap().path()).ok())
            .filter(|target| target.ends_with("file"))
            .count();
        assert_eq!(held, 2, "{when}: the inode, and the open file");
        assert!(client.finish().success());
    }
    let refused = Command::new(env!("CARGO_BIN_EXE_vhost_user_fs"))
        .args([
            "-source",
            "/tmp",
            "-fd",
            "3",
            "-inode-file-handles",
            "mandatory",
        ])
        .output()
        .unwrap();
    assert_eq!(refused.status.code(), Some(2));
    let said = String::from_utf8(refused.stderr).unwrap();
    assert!(
        said.contains("-inode-file-handles mandatory: never or prefer"),
        "{said}"
    );
    assert!(said.contains("CAP_DAC_READ_SEARCH"), "{said}");
}

/// Which test shows what an option changes: its file and its name.
const SHOWN_BY: &[(&str, &str, &str)] = &[
    ("source", "options.rs", "the_folder_is_named_in_two_ways"),
    (
        "shared-dir",
        "options.rs",
        "the_folder_is_named_in_two_ways",
    ),
    (
        "socket-path",
        "options.rs",
        "the_folder_is_named_in_two_ways",
    ),
    (
        "socket-group",
        "options.rs",
        "the_socket_is_for_its_user_or_for_a_group_too",
    ),
    ("fd", "raw/mod.rs", "spawn"),
    ("D", "options.rs", "messages_go_where_they_are_sent"),
    (
        "log-level",
        "options.rs",
        "each_level_of_messages_tells_more_than_the_one_before",
    ),
    (
        "seccomp",
        "options.rs",
        "the_filter_is_there_and_its_weakening_is_told",
    ),
    (
        "sandbox",
        "options.rs",
        "chroot_changes_the_root_and_nothing_else",
    ),
    (
        "modcaps",
        "options.rs",
        "capabilities_are_added_and_taken_away",
    ),
    (
        "rlimit-nofile",
        "options.rs",
        "the_number_of_descriptors_bounds_the_guest",
    ),
    (
        "cache",
        "options.rs",
        "the_cache_policy_says_how_long_things_hold",
    ),
    (
        "writeback",
        "options.rs",
        "flags_of_the_session_follow_the_options",
    ),
    (
        "readonly",
        "options.rs",
        "a_read_only_folder_refuses_and_another_does_not",
    ),
    (
        "xattr",
        "options.rs",
        "attributes_are_passed_on_when_asked_for",
    ),
    (
        "xattrmap",
        "options.rs",
        "attributes_have_the_names_that_the_map_gives_them",
    ),
    (
        "posix-acl",
        "options.rs",
        "flags_of_the_session_follow_the_options",
    ),
    (
        "announce-submounts",
        "options.rs",
        "mounts_in_the_folder_are_announced_when_asked_for",
    ),
    (
        "allow-mmap",
        "options.rs",
        "flags_of_the_session_follow_the_options",
    ),
    (
        "no-readdirplus",
        "options.rs",
        "flags_of_the_session_follow_the_options",
    ),
    (
        "posix-lock",
        "attacks.rs",
        "attributes_and_locks_work_when_asked_for",
    ),
    (
        "flock",
        "attacks.rs",
        "attributes_and_locks_work_when_asked_for",
    ),
    (
        "translate-uid",
        "options.rs",
        "users_and_groups_are_translated_both_ways",
    ),
    (
        "translate-gid",
        "options.rs",
        "users_and_groups_are_translated_both_ways",
    ),
    (
        "uid-map",
        "options.rs",
        "users_that_are_not_in_the_map_do_not_exist",
    ),
    (
        "gid-map",
        "options.rs",
        "users_that_are_not_in_the_map_do_not_exist",
    ),
    (
        "preserve-noatime",
        "options.rs",
        "times_of_access_stay_when_asked_for",
    ),
    ("dax-window", "mapping.rs", "start"),
    (
        "tag",
        "options.rs",
        "the_name_to_mount_by_is_in_the_configuration_space",
    ),
    (
        "thread-pool-size",
        "daemon.rs",
        "the_serving_process_holds_what_it_needs_and_nothing_else",
    ),
    (
        "inode-file-handles",
        "options.rs",
        "inodes_are_descriptors_whether_or_not_handles_are_preferred",
    ),
    (
        "print-capabilities",
        "options.rs",
        "what_virtiofsds_users_write_works",
    ),
    ("help", "options.rs", "what_virtiofsds_users_write_works"),
    ("version", "options.rs", "what_virtiofsds_users_write_works"),
];

#[test]
fn each_option_of_the_help_has_a_test_that_shows_its_effect() {
    let help = Command::new(env!("CARGO_BIN_EXE_vhost_user_fs"))
        .arg("--help")
        .output()
        .unwrap();
    let help = String::from_utf8(help.stdout).unwrap();
    let options: Vec<&str> = help
        .lines()
        .filter_map(|line| line.strip_prefix("  -")?.split_whitespace().next())
        .collect();
    assert!(options.len() >= SHOWN_BY.len(), "{options:?}");
    for option in options {
        let shown = SHOWN_BY.iter().find(|(name, ..)| *name == option);
        let (_, file, test) = shown.unwrap_or_else(|| panic!("no test shows what -{option} does"));
        let path = Path::new(env!("CARGO_MANIFEST_DIR"))
            .join("tests")
            .join(file);
        let text = fs::read_to_string(path).unwrap();
        let body = text
            .split_once(&format!("fn {test}("))
            .map(|(_, rest)| rest);
        let body = body.unwrap_or_else(|| panic!("{file} has no {test}"));
        let (body, _) = body.split_once("\n}\n").unwrap();
        let used = ["\"", "=", ","].iter().any(|end| {
            ["\"-", "\"--"]
                .iter()
                .any(|start| body.contains(&format!("{start}{option}{end}")))
        });
        assert!(used, "{file}: {test} does not use -{option}");
    }
}

#[test]
fn what_virtiofsds_users_write_works() {
    let dir = tree();
    let options = [
        "--thread-pool-size=0",
        "--inode-file-handles=prefer",
        "--cache=none",
        "--announce-submounts",
        "--xattr",
        "--xattrmap=:map::user.virtiofs.:",
        "--sandbox=namespace",
        "--log-level=debug",
        "--tag",
        "other",
    ];
    let mut client = Client::start(dir.path(), &options);
    client.lookup(1, "file").unwrap();
    assert!(client.finish().success());
    let output = |argument: &str| {
        let output = Command::new(env!("CARGO_BIN_EXE_vhost_user_fs"))
            .arg(argument)
            .output()
            .unwrap();
        assert!(output.status.success(), "{argument}");
        String::from_utf8(output.stdout).unwrap()
    };
    assert_eq!(
        output("--print-capabilities"),
        "{\n  \"type\": \"fs\",\n  \"features\": [\"separate-options\"]\n}\n"
    );
    assert!(output("--help").contains("-xattrmap RULES"));
    assert!(output("--version").starts_with("vhost_user_fs "));
    // The other name of -source.
    let refused = Command::new(env!("CARGO_BIN_EXE_vhost_user_fs"))
        .args(["--shared-dir", "/does/not/exist", "--fd=7"])
        .output()
        .unwrap();
    assert_eq!(refused.status.code(), Some(1));
}
