//! More of what a hostile guest, alone or together with a process of the host, tries in order to reach what is not shared, to
//! keep the daemon from serving, or to make it take more than its share; each with the outcome that it must have.

#![allow(clippy::unwrap_used)] // test code

mod raw;

use std::ffi::OsStr;
use std::fs;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{MetadataExt, PermissionsExt, symlink};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use fs_device::fuse::wire::{init, opcode};
use libc::{
    E2BIG, EACCES, EBADF, EINVAL, EISDIR, ELOOP, ENAMETOOLONG, ENODATA, ENOENT, ENOSYS, ENOTDIR,
    ENOTEMPTY, ENXIO, EOPNOTSUPP, EPERM, EPROTO, ERANGE, ESTALE, EXDEV, O_RDONLY, O_RDWR, O_TRUNC,
    O_WRONLY,
};
use nix::unistd::geteuid;
use raw::{Body, Client, u32_at, u64_at};

const SECRET: &str = "the secret";

/// A shared tree, and beside it a folder that nobody inside may know.
struct Place {
    _dir: tempfile::TempDir,
    tree: PathBuf,
    outside: PathBuf,
}

impl Place {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let tree = dir.path().join("tree");
        let outside = dir.path().join("outside");
        for folder in [&tree, &outside, &tree.join("folder")] {
            fs::create_dir(folder).unwrap();
            fs::set_permissions(folder, fs::Permissions::from_mode(0o777)).unwrap();
        }
        fs::write(outside.join("target"), SECRET).unwrap();
        fs::write(tree.join("file"), "contents").unwrap();
        fs::write(tree.join("folder/target"), "harmless").unwrap();
        Self {
            _dir: dir,
            tree,
            outside,
        }
    }

    fn start(&self, options: &[&str]) -> Client {
        Client::start(&self.tree, options)
    }

    /// Nothing came in, nothing went out, the daemon serves, and ends in good order.
    #[track_caller]
    fn survives(&self, mut client: Client) {
        client.assert_alive();
        assert!(client.finish().success());
        let names: Vec<_> = fs::read_dir(&self.outside)
            .unwrap()
            .map(|e| e.unwrap().file_name())
            .collect();
        assert_eq!(names, ["target"]);
        let target = self.outside.join("target");
        assert_eq!(fs::read_to_string(&target).unwrap(), SECRET);
        let target = fs::metadata(target).unwrap();
        assert_eq!((target.nlink(), target.mode() & 0o7777), (1, 0o644));
    }
}

/// A process of the host that does something again and again.
struct Mischief {
    stop: Arc<AtomicBool>,
    thread: Option<std::thread::JoinHandle<u64>>,
}

impl Mischief {
    fn new(mut act: impl FnMut() + Send + 'static) -> Self {
        let stop = Arc::new(AtomicBool::new(false));
        let seen = stop.clone();
        let thread = std::thread::spawn(move || {
            let mut rounds = 0;
            while !seen.load(Ordering::Relaxed) {
                act();
                rounds += 1;
            }
            rounds
        });
        Self {
            stop,
            thread: Some(thread),
        }
    }

    /// How often it was done.
    fn end(mut self) -> u64 {
        self.stop.store(true, Ordering::Relaxed);
        self.thread.take().unwrap().join().unwrap()
    }
}

impl Drop for Mischief {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
    }
}

fn exchange(a: &Path, b: &Path) {
    nix::fcntl::renameat2(
        nix::fcntl::AT_FDCWD,
        a,
        nix::fcntl::AT_FDCWD,
        b,
        nix::fcntl::RenameFlags::RENAME_EXCHANGE,
    )
    .unwrap();
}

/// How often a race is tried; each try is a few requests.
const TRIES: usize = 3000;

fn attribute(reply: &[u8], at: usize) -> u32 {
    u32_at(reply, at)
}

// Races with a process of the host.

#[test]
fn a_folder_that_turns_into_a_link_under_the_guests_feet() {
    let place = Place::new();
    symlink(&place.outside, place.tree.join("link")).unwrap();
    let (folder, link) = (place.tree.join("folder"), place.tree.join("link"));
    let mischief = Mischief::new(move || exchange(&folder, &link));
    let mut client = place.start(&[]);
    let (mut read, mut refused) = (0, 0);
    for _ in 0..TRIES {
        let node = client.lookup(1, "folder").unwrap();
        match client.lookup(node, "target") {
            Ok(file) => {
                let fh = client.open(file, O_RDWR).unwrap();
                assert_eq!(client.read(file, fh, 0, 100).unwrap(), b"harmless");
                client.release(file, fh).unwrap();
                client.forget(file, 1);
                read += 1;
            }
            Err(errno) => {
                assert_eq!(errno, ENOTDIR);
                refused += 1;
            }
        }
        client.forget(node, 1);
    }
    assert!(
        mischief.end() > 0 && read > 0 && refused > 0,
        "{read} {refused}"
    );
    place.survives(client);
}

#[test]
fn a_file_that_turns_into_a_link_while_it_is_created_or_cut() {
    let place = Place::new();
    let (file, link) = (place.tree.join("file"), place.tree.join("link"));
    symlink(place.outside.join("target"), &link).unwrap();
    let (a, b) = (file.clone(), link.clone());
    let mischief = Mischief::new(move || exchange(&a, &b));
    let mut client = place.start(&[]);
    let mut outcomes = [0, 0];
    for _ in 0..TRIES {
        match client.create(1, "file", O_RDWR | O_TRUNC) {
            Ok((node, fh)) => {
                assert_eq!(client.write(node, fh, 0, b"overwritten"), Ok(11));
                client.release(node, fh).unwrap();
                client.forget(node, 1);
                outcomes[0] += 1;
            }
            Err(errno) => {
                assert_eq!(errno, ELOOP);
                outcomes[1] += 1;
            }
        }
    }
    mischief.end();
    assert!(outcomes.iter().all(|n| *n > 0), "{outcomes:?}");
    place.survives(client);
}

#[test]
fn a_folder_that_is_moved_out_and_back_while_the_guest_climbs() {
    let place = Place::new();
    fs::create_dir_all(place.tree.join("a/b/c")).unwrap();
    let (inside, outside) = (
        place.tree.join("a/b"),
        place.outside.with_file_name("moved"),
    );
    let mischief = Mischief::new(move || {
        fs::rename(&inside, &outside).unwrap();
        fs::rename(&outside, &inside).unwrap();
    });
    let mut client = place.start(&[]);
    let a = client.lookup(1, "a").unwrap();
    let (b, c) = loop {
        if let Ok(b) = client.lookup(a, "b")
            && let Ok(c) = client.lookup(b, "c")
        {
            break (b, c);
        }
    };
    for _ in 0..TRIES {
        // Inside or outside, a folder that is held shows itself and what is below it.
        for (node, name, errno) in [
            (c, "..", EINVAL),
            (b, "..", EINVAL),
            (b, "outside", ENOENT),
            (c, "target", ENOENT),
        ] {
            assert_eq!(client.lookup(node, name), Err(errno), "{name}");
        }
    }
    assert!(mischief.end() > 0);
    place.survives(client);
}

#[test]
fn a_name_that_comes_and_goes_is_there_or_not() {
    let place = Place::new();
    let path = place.tree.join("flicker");
    let mischief = Mischief::new(move || {
        fs::write(&path, "x").unwrap();
        fs::remove_file(&path).unwrap();
    });
    let mut client = place.start(&[]);
    for _ in 0..TRIES {
        match client.lookup(1, "flicker") {
            Ok(node) => {
                // What is held may be opened even if it has no name any more.
                let fh = client.open(node, O_RDONLY).unwrap();
                client.release(node, fh).unwrap();
                client.forget(node, 1);
            }
            Err(errno) => assert_eq!(errno, ENOENT),
        }
    }
    assert!(mischief.end() > 0);
    place.survives(client);
}

#[test]
fn a_file_that_shrinks_while_it_is_read() {
    // Whoever maps a file to read it dies of this.
    let place = Place::new();
    let path = place.tree.join("file");
    let mischief = Mischief::new(move || {
        let file = fs::File::options().write(true).open(&path).unwrap();
        file.set_len(1 << 20).unwrap();
        file.set_len(0).unwrap();
    });
    let mut client = place.start(&[]);
    let node = client.lookup(1, "file").unwrap();
    let fh = client.open(node, O_RDONLY).unwrap();
    for _ in 0..TRIES / 10 {
        let data = client.read(node, fh, 0, 1 << 20).unwrap();
        assert!(data.iter().all(|byte| *byte == 0));
    }
    assert!(mischief.end() > 0);
    place.survives(client);
}

#[test]
fn the_folder_itself_is_replaced_by_the_host() {
    let place = Place::new();
    let mut client = place.start(&[]);
    let moved = place.tree.with_file_name("elsewhere");
    fs::rename(&place.tree, &moved).unwrap();
    symlink(&place.outside, &place.tree).unwrap();
    client.lookup(1, "file").unwrap();
    assert_eq!(client.lookup(1, "target"), Err(ENOENT));
    let (node, _) = client.create(1, "new", O_RDWR).unwrap();
    assert_ne!(node, 0);
    assert!(moved.join("new").exists());
    place.survives(client);
}

// Exchanges that the guest makes itself.

#[test]
fn a_guest_exchanges_a_folder_and_a_link_and_uses_what_it_held() {
    let place = Place::new();
    let mut client = place.start(&[]);
    let up = Body::new().name("up").name("../outside");
    let link = u64_at(&client.call(opcode::SYMLINK, 1, up).unwrap(), 0);
    let folder = client.lookup(1, "folder").unwrap();
    let exchange = Body::new().u64(1).u32(2).u32(0).name("folder").name("up");
    client.call(opcode::RENAME2, 1, exchange).unwrap();
    // Nodes are files, not names.
    let file = client.lookup(folder, "target").unwrap();
    let fh = client.open(file, O_RDONLY).unwrap();
    assert_eq!(client.read(file, fh, 0, 100).unwrap(), b"harmless");
    assert_eq!(client.lookup(link, "target"), Err(ENOTDIR));
    let now = client.lookup(1, "folder").unwrap();
    assert_eq!(now, link);
    assert_eq!(client.open(now, O_RDONLY), Err(ELOOP));
    place.survives(client);
}

#[test]
fn links_of_every_shape_stay_text() {
    let place = Place::new();
    let mut client = place.start(&[]);
    for (number, target) in [
        "/",
        "..",
        "../outside",
        "/proc/self/root",
        "/proc/self/fd/5",
        "/proc/1/root",
        "/dev/null",
        "loop",
        "//////",
        "\u{1}",
    ]
    .into_iter()
    .enumerate()
    {
        let name = format!("link{number}");
        let body = Body::new().name(&name).name(target);
        let node = u64_at(&client.call(opcode::SYMLINK, 1, body).unwrap(), 0);
        assert_eq!(client.open(node, O_RDONLY), Err(ELOOP), "{target}");
        assert_eq!(client.lookup(node, "target"), Err(ENOTDIR), "{target}");
        let body = Body::new().zeros(8);
        assert_eq!(client.call(opcode::OPENDIR, node, body), Err(ENOTDIR));
        let text = client.call(opcode::READLINK, node, Body::new()).unwrap();
        assert_eq!(text, target.as_bytes());
        // Owner and times of the link are the link's.
        let times = Body::new().u32(1 << 5).u32(0).zeros(80);
        client.call(opcode::SETATTR, node, times).unwrap();
    }
    place.survives(client);
}

#[test]
fn a_hard_link_cannot_be_made_to_what_was_never_looked_up() {
    let place = Place::new();
    let mut client = place.start(&[]);
    for node in [0, 2, 99, u64::MAX] {
        let body = Body::new().u64(node).name("mine");
        assert_eq!(client.call(opcode::LINK, 1, body), Err(ESTALE), "{node}");
    }
    // Nor to a folder, nor from a file as if it were one.
    let folder = client.lookup(1, "folder").unwrap();
    let file = client.lookup(1, "file").unwrap();
    let link = |node: u64| Body::new().u64(node).name("mine");
    assert_eq!(client.call(opcode::LINK, 1, link(folder)), Err(EPERM));
    assert_eq!(client.call(opcode::LINK, file, link(file)), Err(ENOTDIR));
    assert_eq!(client.lookup(1, "mine"), Err(ENOENT));
    place.survives(client);
}

#[test]
fn a_file_that_the_host_moved_out_is_the_one_that_was_held_and_nothing_else() {
    let place = Place::new();
    let mut client = place.start(&[]);
    let file = client.lookup(1, "file").unwrap();
    let outside = place.outside.with_file_name("moved-out");
    fs::rename(place.tree.join("file"), &outside).unwrap();
    let fh = client.open(file, O_RDONLY).unwrap();
    assert_eq!(client.read(file, fh, 0, 100).unwrap(), b"contents");
    assert_eq!(client.lookup(1, "file"), Err(ENOENT));
    // Its name is outside: neither can it be removed nor renamed from here.
    assert_eq!(
        client.call(opcode::UNLINK, 1, Body::new().name("file")),
        Err(ENOENT)
    );
    let rename = Body::new().u64(1).name("file").name("back");
    assert_eq!(client.call(opcode::RENAME, 1, rename), Err(ENOENT));
    assert!(outside.exists());
    place.survives(client);
}

// Mounts.

#[test]
fn mounts_inside_are_entered_and_never_left_upwards() {
    if !geteuid().is_root() {
        return;
    }
    let place = Place::new();
    let below = place.tree.join("below");
    fs::create_dir(&below).unwrap();
    let mount = |args: &[&str]| {
        let status = Command::new(args[0]).args(&args[1..]).arg(&below).status();
        assert!(status.unwrap().success(), "{args:?}");
    };
    mount(&["mount", "-t", "tmpfs", "none"]);
    fs::write(below.join("inner"), "inner").unwrap();
    let mut client = place.start(&[]);
    let node = client.lookup(1, "below").unwrap();
    client.lookup(node, "inner").unwrap();
    assert_eq!(client.lookup(node, ".."), Err(EINVAL));
    // Names cannot be moved or linked over its edge.
    let rename = Body::new().u64(node).name("file").name("file");
    assert_eq!(client.call(opcode::RENAME, 1, rename), Err(EXDEV));
    let file = client.lookup(1, "file").unwrap();
    let link = Body::new().u64(file).name("file");
    assert_eq!(client.call(opcode::LINK, node, link), Err(EXDEV));
    // Its root is in use.
    let rmdir = client.call(opcode::RMDIR, 1, Body::new().name("below"));
    assert_eq!(rmdir, Err(libc::EBUSY));
    // What the host mounts later does not come in.
    let late = place.tree.join("folder");
    let bind = Command::new("mount")
        .args(["--bind"])
        .args([&place.outside, &late])
        .status();
    assert!(bind.unwrap().success());
    let folder = client.lookup(1, "folder").unwrap();
    let target = client.lookup(folder, "target").unwrap();
    let fh = client.open(target, O_RDONLY).unwrap();
    assert_eq!(client.read(target, fh, 0, 100).unwrap(), b"harmless");
    assert!(
        Command::new("umount")
            .arg(&late)
            .status()
            .unwrap()
            .success()
    );
    mount(&["umount"]);
    place.survives(client);
}

#[test]
fn a_mount_in_the_folder_gives_no_more_rights_than_the_folder() {
    if !geteuid().is_root() {
        return;
    }
    let place = Place::new();
    let below = place.tree.join("below");
    fs::create_dir(&below).unwrap();
    let mounted = Command::new("mount")
        .args(["-t", "tmpfs", "-o", "dev,suid,exec", "none"])
        .arg(&below)
        .status();
    assert!(mounted.unwrap().success());
    let client = place.start(&["-readonly"]);
    let pid = client.child.id();
    let children = fs::read_to_string(format!("/proc/{pid}/task/{pid}/children")).unwrap();
    let mounts = fs::read_to_string(format!("/proc/{}/mountinfo", children.trim())).unwrap();
    assert_eq!(mounts.lines().count(), 2, "{mounts}");
    for line in mounts.lines() {
        assert!(line.contains(" ro,nosuid,nodev,noexec"), "{line}");
    }
    place.survives(client);
    assert!(
        Command::new("umount")
            .arg(&below)
            .status()
            .unwrap()
            .success()
    );
}

// Special files.

#[test]
fn special_files_that_the_guest_makes_are_its_own_kernels_business() {
    let place = Place::new();
    let mut client = place.start(&[]);
    let mknod = |mode: u32, dev: u32, name: &str| {
        Body::new().u32(mode | 0o666).u32(dev).zeros(8).name(name)
    };
    for (mode, name) in [(libc::S_IFIFO, "fifo"), (libc::S_IFSOCK, "socket")] {
        let made = client.call(opcode::MKNOD, 1, mknod(mode, 0, name)).unwrap();
        for flags in [O_RDONLY, O_WRONLY, O_RDWR, O_RDWR | O_TRUNC] {
            assert_eq!(client.open(u64_at(&made, 0), flags), Err(ENXIO), "{name}");
        }
        assert_eq!(client.create(1, name, O_RDWR), Err(ENXIO));
    }
    // /dev/mem, /dev/sda, /dev/null.
    for (mode, dev) in [
        (libc::S_IFCHR, 0x101),
        (libc::S_IFBLK, 0x800),
        (libc::S_IFCHR, 0x103),
    ] {
        let made = client.call(opcode::MKNOD, 1, mknod(mode, dev, "device"));
        assert!(matches!(made, Err(EPERM)), "{made:?}");
    }
    // A whiteout is a device without a driver.
    if let Ok(made) = client.call(opcode::MKNOD, 1, mknod(libc::S_IFCHR, 0, "whiteout")) {
        assert_eq!(client.open(u64_at(&made, 0), O_RDONLY), Err(ENXIO));
    }
    // No type at all is a plain file, and a wrong one nothing.
    client.call(opcode::MKNOD, 1, mknod(0, 0, "plain")).unwrap();
    for mode in [libc::S_IFDIR, libc::S_IFLNK, 0o170_000, 0o030_000] {
        let made = client.call(opcode::MKNOD, 1, mknod(mode, 0, "odd"));
        assert!(matches!(made, Err(EINVAL | EPERM)), "{mode:o}: {made:?}");
    }
    place.survives(client);
}

#[test]
fn a_device_of_the_host_in_the_folder_is_not_opened() {
    if !geteuid().is_root() {
        return;
    }
    let place = Place::new();
    for (name, kind, major, minor) in [("zero", "c", "1", "5"), ("disk", "b", "254", "0")] {
        let path = place.tree.join(name);
        let status = Command::new("mknod")
            .arg(&path)
            .args([kind, major, minor])
            .status();
        assert!(status.unwrap().success());
        let mut client = place.start(&[]);
        let node = client.lookup(1, name).unwrap();
        for flags in [O_RDONLY, O_RDWR] {
            assert_eq!(client.open(node, flags), Err(ENXIO));
        }
        // Nor by another name, nor after it took the place of a file. Landlock keeps block devices where they are.
        let link = Body::new().u64(node).name("other");
        let linked = client.call(opcode::LINK, 1, link);
        if kind == "b" {
            assert_eq!(linked, Err(EACCES));
        } else {
            let other = u64_at(&linked.unwrap(), 0);
            assert_eq!(client.open(other, O_RDONLY), Err(ENXIO));
            let rename = Body::new().u64(1).name("other").name("file");
            client.call(opcode::RENAME, 1, rename).unwrap();
            assert_eq!(client.create(1, "file", O_RDWR), Err(ENXIO));
        }
        let cut = Body::new().u32(1 << 3).zeros(84);
        assert_eq!(client.call(opcode::SETATTR, node, cut), Err(EINVAL));
        place.survives(client);
        fs::remove_file(path).unwrap();
    }
}

// Owners and rights.

#[test]
fn a_set_user_id_program_counts_for_nobody_in_the_jail() {
    let place = Place::new();
    let mut client = place.start(&[]);
    let (node, _) = client.create(1, "program", O_RDWR).unwrap();
    // FATTR_MODE: the guest's own root may; on the host it is the folder's mount that decides.
    let mode = Body::new().u32(1).zeros(64).u32(0o104_755).zeros(16);
    client.call(opcode::SETATTR, node, mode).unwrap();
    // Whoever else writes to it takes the bit away.
    let fh = client.open(node, O_RDWR).unwrap();
    let write = Body::new().u64(fh).u64(0).u32(1).u32(1 << 2).zeros(16);
    client.call(opcode::WRITE, node, write.bytes(b"x")).unwrap();
    let made = fs::metadata(place.tree.join("program")).unwrap();
    assert_eq!(made.mode() & 0o7777, 0o755);
    place.survives(client);
}

#[test]
fn owners_are_only_those_that_a_mapping_has() {
    let place = Place::new();
    nix::unistd::chown(&place.tree, Some(65534.into()), Some(65534.into())).unwrap();
    let mut client = Client::start_as(&place.tree, &[], Some(65534));
    let (node, _) = client.create(1, "mine", O_RDWR).unwrap();
    let chown = |uid: u32| Body::new().u32(2).zeros(72).u32(uid).zeros(8);
    // Root inside is the one user that there is; no other can be given anything.
    client.call(opcode::SETATTR, node, chown(0)).unwrap();
    for uid in [1, 1000, 65534] {
        assert_eq!(client.call(opcode::SETATTR, node, chown(uid)), Err(EINVAL));
    }
    let made = fs::metadata(place.tree.join("mine")).unwrap();
    assert_eq!(made.uid(), 65534);
    place.survives(client);
}

#[test]
fn attributes_that_mean_something_to_the_host_are_refused() {
    let place = Place::new();
    let mut client = place.start(&["-xattr"]);
    let file = client.lookup(1, "file").unwrap();
    let set = |name: &str| Body::new().u32(1).u32(0).zeros(8).name(name).bytes(b"x");
    for (name, errno) in [
        ("trusted.overlay.opaque", EPERM),
        ("system.posix_acl_access", EOPNOTSUPP),
        ("system.nfs4_acl", EOPNOTSUPP),
        ("nonsense", EOPNOTSUPP),
        ("security.capability", EINVAL),
        ("user.", EINVAL),
    ] {
        let answer = client.call(opcode::SETXATTR, file, set(name));
        assert_eq!(answer, Err(errno), "{name}");
    }
    place.survives(client);
}

// Sizes.

#[test]
fn names_and_values_have_ends() {
    let place = Place::new();
    let mut client = place.start(&["-xattr"]);
    let file = client.lookup(1, "file").unwrap();
    let longest = "n".repeat(255);
    client.create(1, &longest, O_RDWR).unwrap();
    client.lookup(1, &longest).unwrap();
    assert_eq!(client.lookup(1, &"n".repeat(256)), Err(ENAMETOOLONG));
    assert_eq!(client.lookup(1, &"n".repeat(4000)), Err(ENAMETOOLONG));
    let symlink = |len: usize| Body::new().name(&format!("l{len}")).name(&"t".repeat(len));
    client.call(opcode::SYMLINK, 1, symlink(4095)).unwrap();
    assert_eq!(
        client.call(opcode::SYMLINK, 1, symlink(4096)),
        Err(ENAMETOOLONG)
    );
    let set = |name: usize, value: usize| {
        let name = format!("user.{}", "x".repeat(name - 5));
        Body::new()
            .u32(value as u32)
            .u32(0)
            .zeros(8)
            .name(&name)
            .zeros(value)
    };
    client.call(opcode::SETXATTR, file, set(255, 1)).unwrap();
    assert_eq!(
        client.call(opcode::SETXATTR, file, set(256, 1)),
        Err(ERANGE)
    );
    assert_eq!(
        client.call(opcode::SETXATTR, file, set(20, 65537)),
        Err(E2BIG)
    );
    // A value that is said to be longer than what came.
    let lie = Body::new()
        .u32(100)
        .u32(0)
        .zeros(8)
        .name("user.lie")
        .zeros(3);
    assert_eq!(client.call(opcode::SETXATTR, file, lie), Err(EINVAL));
    let get = Body::new().u32(u32::MAX).u32(0).name("user.none");
    assert_eq!(client.call(opcode::GETXATTR, file, get), Err(ENODATA));
    place.survives(client);
}

#[test]
fn names_may_be_any_bytes_but_two() {
    let place = Place::new();
    let mut client = place.start(&[]);
    for name in [
        &b"\xff\xfe"[..],
        b"line\nbreak",
        b"-rf",
        b"...",
        b" ",
        b"\x1b[31m",
        b"%s%n",
    ] {
        let body = Body::new().u32(0o755).u32(0).bytes(name).bytes(&[0]);
        client.call(opcode::MKDIR, 1, body).unwrap();
        assert!(place.tree.join(OsStr::from_bytes(name)).is_dir());
    }
    // What follows a name's end is not part of it.
    let body = Body::new().bytes(b"file\0/../outside/target\0");
    let node = u64_at(&client.call(opcode::LOOKUP, 1, body).unwrap(), 0);
    assert_eq!(client.lookup(1, "file"), Ok(node));
    place.survives(client);
}

#[test]
fn folders_may_be_deeper_than_any_path() {
    let place = Place::new();
    let mut client = place.start(&[]);
    // PATH_MAX has room for 20 of these.
    let name = "d".repeat(200);
    let mut nodes = vec![1];
    for _ in 0..100 {
        let body = Body::new().u32(0o755).u32(0).name(&name);
        let made = client.call(opcode::MKDIR, nodes[nodes.len() - 1], body);
        nodes.push(u64_at(&made.unwrap(), 0));
    }
    let deepest = nodes[nodes.len() - 1];
    let (file, fh) = client.create(deepest, "file", O_RDWR).unwrap();
    assert_eq!(client.write(file, fh, 0, b"deep"), Ok(4));
    // Moved up and taken apart again.
    let rename = Body::new().u64(1).name("file").name("up");
    client.call(opcode::RENAME, deepest, rename).unwrap();
    assert_eq!(fs::read(place.tree.join("up")).unwrap(), b"deep");
    for pair in nodes.windows(2).rev() {
        let body = Body::new().name(&name);
        client.call(opcode::RMDIR, pair[0], body).unwrap();
    }
    place.survives(client);
}

// Files that are not what a request takes them for.

#[test]
fn requests_fit_the_kind_of_their_file() {
    let place = Place::new();
    let mut client = place.start(&[]);
    let file = client.lookup(1, "file").unwrap();
    let folder = client.lookup(1, "folder").unwrap();
    let n = Body::new;
    for (opcode, node, body, errno) in [
        (opcode::READLINK, file, n(), EINVAL),
        (opcode::READLINK, folder, n(), EINVAL),
        (opcode::OPENDIR, file, n().zeros(8), ENOTDIR),
        (opcode::OPEN, folder, n().u32(0).u32(0), EISDIR),
        (opcode::LOOKUP, file, n().name("x"), ENOTDIR),
        (
            opcode::MKDIR,
            file,
            n().u32(0o755).u32(0).name("x"),
            ENOTDIR,
        ),
        (opcode::SYMLINK, file, n().name("x").name("y"), ENOTDIR),
        (opcode::UNLINK, file, n().name("x"), ENOTDIR),
        (opcode::UNLINK, 1, n().name("folder"), EISDIR),
        (opcode::RMDIR, 1, n().name("file"), ENOTDIR),
        (opcode::RMDIR, 1, n().name("folder"), ENOTEMPTY),
        (opcode::SETATTR, folder, n().u32(1 << 3).zeros(84), EINVAL),
        (
            opcode::RENAME,
            1,
            n().u64(file).name("file").name("x"),
            ENOTDIR,
        ),
        (
            opcode::RENAME,
            1,
            n().u64(folder).name("folder").name("x"),
            EINVAL,
        ),
        (
            opcode::TMPFILE,
            file,
            n().u32(O_RDWR as u32).u32(0o600).zeros(8).name("x"),
            ENOTDIR,
        ),
    ] {
        assert_eq!(client.call(opcode, node, body), Err(errno), "{opcode}");
    }
    place.survives(client);
}

#[test]
fn handles_do_what_they_were_opened_for() {
    let place = Place::new();
    let mut client = place.start(&[]);
    let file = client.lookup(1, "file").unwrap();
    let reader = client.open(file, O_RDONLY).unwrap();
    assert_eq!(client.write(file, reader, 0, b"x"), Err(EBADF));
    let n = Body::new;
    let allocate = n().u64(reader).u64(0).u64(100).u64(0);
    assert_eq!(client.call(opcode::FALLOCATE, file, allocate), Err(EBADF));
    let writer = client.open(file, O_WRONLY).unwrap();
    assert_eq!(client.read(file, writer, 0, 8), Err(EBADF));
    // FATTR_SIZE with FATTR_FH of a reader.
    let cut = n().u32(1 << 3 | 1 << 6).u32(0).u64(reader).zeros(72);
    assert_eq!(client.call(opcode::SETATTR, file, cut), Err(EINVAL));
    let opened = client.call(opcode::OPENDIR, 1, n().zeros(8)).unwrap();
    let folder = u64_at(&opened, 0);
    for (opcode, body) in [
        (opcode::LSEEK, n().u64(folder).u64(0).u32(3).u32(0)),
        (opcode::FSYNC, n().u64(folder).zeros(8)),
        (opcode::RELEASE, n().u64(folder).zeros(16)),
    ] {
        assert_eq!(client.call(opcode, 1, body), Err(EBADF), "{opcode}");
    }
    let release = n().u64(reader).zeros(16);
    assert_eq!(client.call(opcode::RELEASEDIR, 1, release), Err(EBADF));
    assert_eq!(fs::read(place.tree.join("file")).unwrap(), b"contents");
    place.survives(client);
}

#[test]
fn flags_of_an_open_that_are_not_a_guests_to_give_do_not_pass() {
    let place = Place::new();
    let mut client = place.start(&[]);
    let file = client.lookup(1, "file").unwrap();
    // With O_PATH nothing could be read, with O_DIRECT not at this address, with O_CREAT|O_EXCL it exists, with O_DIRECTORY
    // it is none.
    for junk in [
        libc::O_PATH,
        libc::O_DIRECT,
        libc::O_CREAT | libc::O_EXCL,
        libc::O_DIRECTORY,
        libc::O_TMPFILE,
        libc::O_NOFOLLOW,
        libc::O_NONBLOCK | libc::O_ASYNC,
        libc::O_CLOEXEC,
        1 << 30,
    ] {
        let fh = client.open(file, O_RDONLY | junk).unwrap();
        assert_eq!(client.read(file, fh, 1, 3).unwrap(), b"ont", "{junk:#o}");
        client.release(file, fh).unwrap();
    }
    assert_eq!(client.open(file, libc::O_ACCMODE), Err(EINVAL));
    place.survives(client);
}

// Sessions.

#[test]
fn a_session_can_begin_end_and_begin_again_in_any_order() {
    let place = Place::new();
    let mut client = place.start(&[]);
    let file = client.lookup(1, "file").unwrap();
    let fh = client.open(file, O_RDONLY).unwrap();
    client.call(opcode::DESTROY, 0, Body::new()).unwrap();
    assert_eq!(client.open(file, O_RDONLY), Err(ESTALE));
    assert_eq!(client.read(file, fh, 0, 1), Err(EBADF));
    let hello = |major: u32, minor: u32| {
        let flags = init::INIT_EXT as u32;
        Body::new()
            .u32(major)
            .u32(minor)
            .u32(0)
            .u32(flags)
            .zeros(48)
    };
    for (major, minor) in [(0, 0), (6, 99), (7, 0), (7, 26)] {
        let answer = client.call(opcode::INIT, 0, hello(major, minor));
        assert_eq!(answer, Err(EPROTO), "{major}.{minor}");
    }
    // A newer guest is told the version and asks again.
    let answer = client.call(opcode::INIT, 0, hello(8, 0)).unwrap();
    assert_eq!(u32_at(&answer, 0), 7);
    let short = client.call(opcode::INIT, 0, Body::new().u32(7));
    assert_eq!(short, Err(EINVAL));
    client.init();
    let file = client.lookup(1, "file").unwrap();
    client.init();
    client.init();
    assert_eq!(client.open(file, O_RDONLY), Err(ESTALE));
    place.survives(client);
}

#[test]
fn interrupts_and_forgets_of_nothing_have_no_answer_and_no_effect() {
    let place = Place::new();
    let mut client = place.start(&[]);
    let file = client.lookup(1, "file").unwrap();
    for unique in [0, 1, u64::MAX] {
        let body = Body::new().u64(unique);
        assert_eq!(client.raw(opcode::INTERRUPT, 0, 48, &body.0, 4096), 0);
    }
    let mut batch = Body::new().u32(4).u32(0);
    for (node, count) in [(0, 1), (77, u64::MAX), (u64::MAX, 5), (file, 0)] {
        batch = batch.u64(node).u64(count);
    }
    let len = 40 + batch.0.len() as u32;
    assert_eq!(client.raw(opcode::BATCH_FORGET, 0, len, &batch.0, 4096), 0);
    client.open(file, O_RDONLY).unwrap();
    place.survives(client);
}

#[test]
fn requests_of_every_number_with_every_short_body_are_answered() {
    let place = Place::new();
    let mut client = place.start(&["-xattr", "-posix-lock", "-flock"]);
    let noise: Vec<u8> = (0..64u8).map(|n| n.wrapping_mul(151)).collect();
    let silent = [opcode::FORGET, opcode::BATCH_FORGET];
    for opcode in 0..64 {
        for len in 0..noise.len() {
            for fill in [&noise[..len], &vec![0; len], &vec![0xff; len]] {
                let used = client.raw(opcode, 1, 40 + len as u32, fill, 4096);
                // An interrupt that says of what has no answer.
                let interrupt = opcode == opcode::INTERRUPT && len >= 8;
                if silent.contains(&opcode) || interrupt {
                    assert_eq!(used, 0, "{opcode} {len}");
                } else {
                    // Good or bad, it has a header that fits.
                    let _ = client.reply(used);
                }
            }
        }
    }
    // It may have removed names that it could guess, and nothing else.
    client.init();
    assert_eq!(client.call(63, 1, Body::new()), Err(ENOSYS));
    place.survives(client);
}

// Numbers.

/// How often; `cargo xtask test vhost-user-fs a_million --operations 1000000` for more.
fn many() -> u64 {
    std::env::var("HOSTILE_OPERATIONS").map_or(20_000, |count| count.parse().unwrap())
}

fn resident(pid: &str) -> u64 {
    let text = fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
    let line = text
        .lines()
        .find(|line| line.starts_with("RssAnon"))
        .unwrap();
    let kib = line.split_whitespace().nth(1).unwrap();
    kib.parse().unwrap()
}

#[test]
fn a_million_lookups_opens_and_files_take_no_more_than_a_few() {
    let place = Place::new();
    let mut client = place.start(&[]);
    let pid = client.child.id();
    let children = fs::read_to_string(format!("/proc/{pid}/task/{pid}/children")).unwrap();
    let inside = children.trim();
    let round = |client: &mut Client, n: u64| {
        let file = client.lookup(1, "file").unwrap();
        let fh = client.open(file, O_RDONLY).unwrap();
        client.release(file, fh).unwrap();
        let (node, fh) = client.create(1, "new", O_RDWR).unwrap();
        let body = Body::new().name("new");
        client.call(opcode::UNLINK, 1, body).unwrap();
        client.release(node, fh).unwrap();
        client.forget(node, 1);
        if n.is_multiple_of(2) {
            client.forget(file, 1);
        }
    };
    for n in 0..1000 {
        round(&mut client, n);
    }
    client.assert_alive();
    let before = (resident(inside), open_files(inside));
    for n in 0..many() {
        round(&mut client, n);
    }
    // What was forgotten goes after the reply and before the next request.
    client.assert_alive();
    let after = (resident(inside), open_files(inside));
    assert!(after.0 <= before.0 + 256, "KiB: {before:?} {after:?}");
    assert_eq!(after.1, before.1, "descriptors");
    place.survives(client);
}

fn open_files(pid: &str) -> usize {
    fs::read_dir(format!("/proc/{pid}/fd")).unwrap().count()
}

#[test]
fn what_is_read_of_a_folder_is_forgotten_when_it_does_not_fit() {
    let place = Place::new();
    for n in 0..100 {
        fs::write(place.tree.join(format!("entry{n}")), "").unwrap();
    }
    let mut client = place.start(&[]);
    let pid = client.child.id();
    let children = fs::read_to_string(format!("/proc/{pid}/task/{pid}/children")).unwrap();
    let inside = children.trim();
    let opened = client
        .call(opcode::OPENDIR, 1, Body::new().zeros(8))
        .unwrap();
    let fh = u64_at(&opened, 0);
    let before = open_files(inside);
    let mut given = Vec::new();
    for size in [1, 100, 160, 300, 1000, 5000] {
        let body = Body::new().u64(fh).u64(0).u32(size).zeros(20);
        let Ok(reply) = client.call(opcode::READDIRPLUS, 1, body) else {
            continue;
        };
        let mut at = 0;
        while at < reply.len() {
            given.push(u64_at(&reply, at));
            let name = attribute(&reply, at + 128 + 16) as usize;
            at = (at + 128 + 24 + name).next_multiple_of(8);
        }
    }
    // Each node was given as often as the guest has to forget it, and no other is held.
    for node in given.iter().filter(|node| **node != 0) {
        client.forget(*node, 1);
    }
    // What was forgotten goes after the reply and before the next request.
    client.assert_alive();
    assert_eq!(open_files(inside), before);
    place.survives(client);
}

#[test]
fn a_handle_outlives_the_guests_knowledge_of_its_file() {
    let place = Place::new();
    let mut client = place.start(&[]);
    let file = client.lookup(1, "file").unwrap();
    let fh = client.open(file, O_RDWR).unwrap();
    client
        .call(opcode::UNLINK, 1, Body::new().name("file"))
        .unwrap();
    client.forget(file, u64::MAX);
    assert_eq!(client.open(file, O_RDONLY), Err(ESTALE));
    assert_eq!(client.read(file, fh, 0, 100).unwrap(), b"contents");
    // Another file with the name is another file.
    let (other, _) = client.create(1, "file", O_RDWR).unwrap();
    assert_ne!(other, file);
    client.release(file, fh).unwrap();
    assert_eq!(client.read(file, fh, 0, 100), Err(EBADF));
    place.survives(client);
}

#[test]
fn space_and_copies_have_bounds() {
    let place = Place::new();
    let mut client = place.start(&[]);
    let file = client.lookup(1, "file").unwrap();
    let fh = client.open(file, O_RDWR).unwrap();
    let n = Body::new;
    let allocate = |offset: u64, length: u64, mode: u64| {
        // The mode has 32 bits; what follows it is padding.
        n().u64(fh).u64(offset).u64(length).u64(mode)
    };
    for (body, errno) in [
        (allocate(0, 0, 0), EINVAL),
        (allocate(i64::MAX as u64, 1, 0), libc::EFBIG),
        (allocate(0, u64::MAX, 0), libc::EFBIG),
        (allocate(0, 1, 0x8000), EOPNOTSUPP),
    ] {
        assert_eq!(client.call(opcode::FALLOCATE, file, body), Err(errno));
    }
    let copy = |from: u64, to: u64, len: u64| {
        n().u64(fh)
            .u64(from)
            .u64(file)
            .u64(fh)
            .u64(to)
            .u64(len)
            .u64(0)
    };
    let range = opcode::COPY_FILE_RANGE;
    assert_eq!(
        client.call(range, file, copy(0, 4, 8)),
        Err(EINVAL),
        "overlaps"
    );
    assert_eq!(client.call(range, file, copy(u64::MAX, 0, 8)), Err(EINVAL));
    let copied = client.call(range, file, copy(100, 0, u64::MAX)).unwrap();
    assert_eq!(u32_at(&copied, 0), 0, "nothing is behind the end");
    assert_eq!(fs::read(place.tree.join("file")).unwrap(), b"contents");
    place.survives(client);
}

#[test]
fn locks_of_a_guest_have_a_quota() {
    let place = Place::new();
    let mut client = place.start(&["-posix-lock"]);
    let file = client.lookup(1, "file").unwrap();
    let fh = client.open(file, O_RDWR).unwrap();
    let lock = |owner: u64, kind: u32| {
        let at = owner;
        Body::new()
            .u64(fh)
            .u64(owner)
            .u64(at)
            .u64(at)
            .u32(kind)
            .u32(1)
            .u64(0)
    };
    let refused = (0..5000).find_map(|owner| {
        client
            .call(opcode::SETLK, file, lock(owner, libc::F_WRLCK as u32))
            .err()
            .map(|errno| (owner, errno))
    });
    assert_eq!(refused, Some((4096, libc::ENOLCK)));
    for kind in [3, 99, u32::MAX] {
        assert_eq!(client.call(opcode::SETLK, file, lock(1, kind)), Err(EINVAL));
    }
    // An owner that gives its lock back makes room.
    let flush = Body::new().u64(fh).u64(0).u64(7);
    client.call(opcode::FLUSH, file, flush).unwrap();
    client
        .call(opcode::SETLK, file, lock(4097, libc::F_WRLCK as u32))
        .unwrap();
    place.survives(client);
}
