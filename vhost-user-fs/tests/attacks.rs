//! What a hostile guest, and a host that changes the tree meanwhile, cannot do.

#![allow(clippy::unwrap_used)] // test code

mod raw;

use std::fs;
use std::os::unix::fs::{FileExt, MetadataExt, PermissionsExt, symlink};
use std::path::PathBuf;

use fs_device::fuse::wire::{flag, opcode};
use libc::{
    E2BIG, EBADF, EINVAL, EIO, EISDIR, ELOOP, ENAMETOOLONG, ENFILE, ENOSYS, ENOTDIR, ENXIO,
    EOPNOTSUPP, EPERM, EROFS, ESTALE, O_CREAT, O_RDONLY, O_RDWR, O_WRONLY,
};
use raw::{Body, Client, u32_at, u64_at};

/// A shared tree with a secret beside it.
struct Place {
    _dir: tempfile::TempDir,
    tree: PathBuf,
    secret: PathBuf,
}

impl Place {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let tree = dir.path().join("tree");
        let secret = dir.path().join("secret");
        fs::create_dir(&tree).unwrap();
        fs::write(&secret, b"secret").unwrap();
        fs::write(tree.join("file"), b"contents").unwrap();
        fs::create_dir(tree.join("folder")).unwrap();
        Self {
            _dir: dir,
            tree,
            secret,
        }
    }

    fn assert_secret_is_safe(&self) {
        assert_eq!(fs::read(&self.secret).unwrap(), b"secret");
        assert_eq!(fs::metadata(&self.secret).unwrap().nlink(), 1);
    }
}

/// Requests with one or two names in them, as functions of a bad name.
fn with_name(name: &str) -> Vec<(u32, Body)> {
    let n = || Body::new();
    vec![
        (opcode::LOOKUP, n().name(name)),
        (opcode::UNLINK, n().name(name)),
        (opcode::RMDIR, n().name(name)),
        (opcode::MKDIR, n().u32(0o755).u32(0).name(name)),
        (opcode::MKNOD, n().u32(0o100_644).zeros(12).name(name)),
        (opcode::SYMLINK, n().name(name).name("target")),
        (opcode::RENAME, n().u64(1).name(name).name("new")),
        (opcode::RENAME, n().u64(1).name("file").name(name)),
        (opcode::RENAME2, n().u64(1).zeros(8).name("file").name(name)),
        (
            opcode::CREATE,
            n().u32(O_RDWR as u32).u32(0o644).zeros(8).name(name),
        ),
        (opcode::LINK, n().u64(1).name(name)),
    ]
}

#[test]
fn names_lead_nowhere() {
    let place = Place::new();
    let mut client = Client::start(&place.tree, &[]);
    for name in [
        "..",
        ".",
        "",
        "/",
        "../secret",
        "folder/../../secret",
        "/etc/passwd",
        "folder/",
    ] {
        for (opcode, body) in with_name(name) {
            assert_eq!(
                client.call(opcode, 1, body),
                Err(EINVAL),
                "{opcode} {name:?}"
            );
        }
    }
    let long = "x".repeat(256);
    for (opcode, body) in with_name(&long) {
        assert_eq!(client.call(opcode, 1, body), Err(ENAMETOOLONG), "{opcode}");
    }
    let unterminated = Body::new().bytes(b"file");
    assert_eq!(client.call(opcode::LOOKUP, 1, unterminated), Err(EINVAL));
    client.assert_alive();
    place.assert_secret_is_safe();
    assert!(client.finish().success());
}

#[test]
fn links_are_not_followed() {
    let place = Place::new();
    symlink(&place.secret, place.tree.join("link")).unwrap();
    symlink("..", place.tree.join("up")).unwrap();
    let mut client = Client::start(&place.tree, &[]);
    let link = client.lookup(1, "link").unwrap();
    let up = client.lookup(1, "up").unwrap();
    assert_eq!(client.open(link, O_RDONLY), Err(ELOOP));
    assert_eq!(client.open(link, O_WRONLY), Err(ELOOP));
    assert_eq!(
        client.call(opcode::OPENDIR, up, Body::new().zeros(8)),
        Err(ENOTDIR)
    );
    assert_eq!(client.lookup(up, "secret"), Err(ENOTDIR));
    assert_eq!(client.create(up, "new", O_RDWR), Err(ENOTDIR));
    assert_eq!(client.create(1, "link", O_RDWR | O_CREAT), Err(ELOOP));
    // Cut, change permissions and give away through the link.
    let set = |valid: u32| Body::new().u32(valid).zeros(84);
    assert_eq!(client.call(opcode::SETATTR, link, set(1 << 3)), Err(EINVAL));
    assert_eq!(client.call(opcode::SETATTR, link, set(1)), Err(EOPNOTSUPP));
    // A hard link to it is one more link, not one to the secret.
    let body = Body::new().u64(link).name("link2");
    client.call(opcode::LINK, 1, body).unwrap();
    assert!(
        fs::symlink_metadata(place.tree.join("link2"))
            .unwrap()
            .is_symlink()
    );
    // Its text is the guest's to read.
    let target = client.call(opcode::READLINK, link, Body::new()).unwrap();
    assert_eq!(target, place.secret.as_os_str().as_encoded_bytes());
    // A magic link made by the guest is text too.
    let body = Body::new().name("magic").name("/proc/self/root");
    let magic = u64_at(&client.call(opcode::SYMLINK, 1, body).unwrap(), 0);
    assert_eq!(client.lookup(magic, "etc"), Err(ENOTDIR));
    client.assert_alive();
    place.assert_secret_is_safe();
    assert!(client.finish().success());
}

#[test]
fn special_files_are_never_opened() {
    let place = Place::new();
    let fifo = place.tree.join("fifo");
    nix::unistd::mkfifo(&fifo, nix::sys::stat::Mode::S_IRWXU).unwrap();
    let _socket = std::os::unix::net::UnixListener::bind(place.tree.join("socket")).unwrap();
    let mut names = vec!["fifo", "socket"];
    let device = nix::sys::stat::mknod(
        &place.tree.join("device"),
        nix::sys::stat::SFlag::S_IFCHR,
        nix::sys::stat::Mode::S_IRWXU,
        nix::libc::makedev(1, 5),
    );
    // Only root can make one.
    if device.is_ok() {
        names.push("device");
    }
    let mut client = Client::start(&place.tree, &[]);
    for name in names {
        let node = client.lookup(1, name).unwrap();
        // A pipe without a reader would block for ever.
        for flags in [O_RDONLY, O_WRONLY, O_RDWR] {
            assert_eq!(client.open(node, flags), Err(ENXIO), "{name}");
        }
        assert_eq!(client.create(1, name, O_RDWR), Err(ENXIO), "{name}");
        let body = Body::new().u32(1 << 3).zeros(84);
        assert_eq!(
            client.call(opcode::SETATTR, node, body),
            Err(EINVAL),
            "{name}"
        );
        assert_eq!(
            client.call(opcode::SYNCFS, node, Body::new().zeros(8)),
            Err(EINVAL)
        );
    }
    // The guest's own device nodes are refused by the host's kernel.
    let null = Body::new()
        .u32(libc::S_IFCHR | 0o666)
        .u32(0x103)
        .zeros(8)
        .name("null");
    let made = client.call(opcode::MKNOD, 1, null);
    assert!(matches!(made, Err(EPERM)), "{made:?}");
    assert_eq!(client.open(1, O_RDONLY), Err(EISDIR));
    client.assert_alive();
    assert!(client.finish().success());
}

#[test]
fn the_host_may_swap_files_at_any_time() {
    let place = Place::new();
    let mut client = Client::start(&place.tree, &[]);
    let file = client.lookup(1, "file").unwrap();
    let folder = client.lookup(1, "folder").unwrap();
    // The file that was looked up is the one that is opened, not what has its name now.
    fs::rename(place.tree.join("file"), place.tree.join("moved")).unwrap();
    symlink(&place.secret, place.tree.join("file")).unwrap();
    let fh = client.open(file, O_RDWR).unwrap();
    assert_eq!(client.read(file, fh, 0, 100).unwrap(), b"contents");
    assert_eq!(client.write(file, fh, 0, b"CON"), Ok(3));
    assert_eq!(fs::read(place.tree.join("moved")).unwrap(), b"CONtents");
    // A folder becomes a link to the outside.
    fs::remove_dir(place.tree.join("folder")).unwrap();
    symlink("..", place.tree.join("folder")).unwrap();
    assert_eq!(client.lookup(folder, "secret"), Err(libc::ENOENT));
    let again = client.lookup(1, "folder").unwrap();
    assert_ne!(again, folder);
    assert_eq!(client.lookup(again, "secret"), Err(ENOTDIR));
    // A folder leaves the tree while the guest holds it: the guest keeps that folder, and sees nothing beside or above it.
    let inner = place.tree.join("inner");
    fs::create_dir(&inner).unwrap();
    let node = client.lookup(1, "inner").unwrap();
    let outside = place.secret.with_file_name("outside");
    fs::rename(&inner, &outside).unwrap();
    assert_eq!(client.lookup(node, ".."), Err(EINVAL));
    assert_eq!(client.lookup(node, "secret"), Err(libc::ENOENT));
    let up = Body::new().name("up").name("../secret");
    if let Ok(link) = client.call(opcode::SYMLINK, node, up) {
        assert_eq!(client.open(u64_at(&link, 0), O_RDONLY), Err(ELOOP));
    }
    client.assert_alive();
    place.assert_secret_is_safe();
    assert!(client.finish().success());
}

#[test]
fn ids_and_handles_cannot_be_invented() {
    let place = Place::new();
    let mut client = Client::start(&place.tree, &[]);
    for node in [0, 2, 3, 77, u64::MAX, 1 << 32, (1 << 32) | 1] {
        assert_eq!(client.lookup(node, "file"), Err(ESTALE), "{node:#x}");
        assert_eq!(client.open(node, O_RDONLY), Err(ESTALE), "{node:#x}");
        client.forget(node, u64::MAX);
    }
    let file = client.lookup(1, "file").unwrap();
    let fh = client.open(file, O_RDWR).unwrap();
    let dir = client
        .call(opcode::OPENDIR, 1, Body::new().zeros(8))
        .unwrap();
    let dir = u64_at(&dir, 0);
    for bad in [0, dir, fh + 100, u64::MAX, fh + (1 << 32)] {
        assert_eq!(client.read(file, bad, 0, 8), Err(EBADF), "{bad:#x}");
        assert_eq!(client.write(file, bad, 0, b"x"), Err(EBADF), "{bad:#x}");
    }
    let read_dir = |fh| Body::new().u64(fh).u64(0).u32(4096).zeros(20);
    assert_eq!(client.call(opcode::READDIR, 1, read_dir(fh)), Err(EBADF));
    assert_eq!(
        client.call(opcode::FSYNCDIR, 1, Body::new().u64(fh).zeros(8)),
        Err(EBADF)
    );
    client.release(file, fh).unwrap();
    assert_eq!(client.release(file, fh), Err(EBADF));
    assert_eq!(client.read(file, fh, 0, 8), Err(EBADF));
    // Forgotten as often as looked up, and more often: gone, and the root never is.
    client.forget(file, 1);
    assert_eq!(client.open(file, O_RDONLY), Err(ESTALE));
    client.forget(file, u64::MAX);
    client.forget(1, u64::MAX);
    let again = client.lookup(1, "file").unwrap();
    assert_ne!(again, file);
    // A new session knows nothing of the old one.
    client.init();
    assert_eq!(client.open(again, O_RDONLY), Err(ESTALE));
    client.assert_alive();
    assert!(client.finish().success());
}

#[test]
fn headers_and_lengths_may_be_anything() {
    let place = Place::new();
    let mut client = Client::start(&place.tree, &[]);
    let file = client.lookup(1, "file").unwrap();
    let fh = client.open(file, O_RDWR).unwrap();
    // What the header says against what is there.
    for len in [0, 1, 39, 46, 1 << 20, u32::MAX] {
        let used = client.raw(opcode::LOOKUP, 1, len, b"file\0", 4096);
        assert_eq!(client.reply(used), Err(EIO), "{len}");
    }
    let used = client.raw(opcode::LOOKUP, 1, 40, b"file\0", 4096);
    assert_eq!(
        client.reply(used),
        Err(EINVAL),
        "the name is outside of the request"
    );
    for opcode in [
        0,
        7,
        19,
        37,
        39,
        40,
        41,
        48,
        49,
        53,
        4096,
        u32::MAX,
        436_207_616,
    ] {
        assert_eq!(
            client.call(opcode, 1, Body::new().zeros(64)),
            Err(ENOSYS),
            "{opcode}"
        );
    }
    assert_eq!(
        client.call(opcode::LOOKUP, 1, Body::new().zeros(100_000)),
        Err(E2BIG)
    );
    // No room for the reply, or for its header.
    for room in [0, 1, 15] {
        assert_eq!(
            client.raw(opcode::GETATTR, 1, 56, &[0; 16], room),
            0,
            "{room}"
        );
        let body = Body::new().u64(fh).u64(0).u32(100).zeros(20);
        assert_eq!(
            client.raw(opcode::READ, file, 80, &body.0, room),
            0,
            "{room}"
        );
    }
    let used = client.raw(opcode::GETATTR, 1, 56, &[0; 16], 100);
    assert_eq!(client.reply(used), Err(EIO), "an attribute does not fit");
    // A read for more than there is room for, at impossible offsets.
    let body = Body::new().u64(fh).u64(0).u32(u32::MAX).zeros(20);
    let used = client.raw(opcode::READ, file, 80, &body.0, 20);
    assert_eq!(client.reply(used).unwrap(), b"cont");
    assert_eq!(client.read(file, fh, u64::MAX, 10), Err(EINVAL));
    assert_eq!(client.read(file, fh, i64::MAX as u64, 10), Err(EINVAL));
    // A write that announces more than it brings.
    let body = Body::new()
        .u64(fh)
        .u64(0)
        .u32(1000)
        .zeros(20)
        .bytes(b"short");
    assert_eq!(client.call(opcode::WRITE, file, body), Err(EIO));
    let body = Body::new()
        .u64(fh)
        .u64(u64::MAX)
        .u32(5)
        .zeros(20)
        .bytes(b"short");
    assert_eq!(client.call(opcode::WRITE, file, body), Err(EINVAL));
    assert_eq!(fs::read(place.tree.join("file")).unwrap(), b"contents");
    // Forgetting more than is listed.
    let body = Body::new().u32(u32::MAX).u32(0).zeros(16).0;
    assert_eq!(
        client.raw(opcode::BATCH_FORGET, 0, 40 + body.len() as u32, &body, 0),
        0
    );
    // Numbers that calls must not see.
    let lseek = |whence: u32| Body::new().u64(fh).u64(0).u32(whence).u32(0);
    assert_eq!(client.call(opcode::LSEEK, file, lseek(1)), Err(EINVAL));
    assert_eq!(client.call(opcode::LSEEK, file, lseek(99)), Err(EINVAL));
    let allocate = Body::new().u64(fh).u64(u64::MAX).u64(1).u64(0);
    assert_eq!(
        client.call(opcode::FALLOCATE, file, allocate),
        Err(libc::EFBIG)
    );
    let copy = Body::new()
        .u64(fh)
        .u64(0)
        .u64(file)
        .u64(fh)
        .u64(0)
        .u64(u64::MAX)
        .u64(1);
    assert_eq!(
        client.call(opcode::COPY_FILE_RANGE, file, copy),
        Err(EINVAL)
    );
    let rename = Body::new()
        .u64(1)
        .u32(1 << 31)
        .u32(0)
        .name("file")
        .name("other");
    assert_eq!(client.call(opcode::RENAME2, 1, rename), Err(EINVAL));
    let chown = Body::new().u32(1 << 1).zeros(72).u32(u32::MAX).zeros(8);
    assert_eq!(client.call(opcode::SETATTR, file, chown), Err(EINVAL));
    client.assert_alive();
    assert!(client.finish().success());
}

#[test]
fn folders_are_read_whole_whatever_the_size_of_a_reply() {
    let place = Place::new();
    for n in 0..600 {
        fs::write(
            place.tree.join(format!("{n:03}-{}", "n".repeat(n % 200))),
            b"",
        )
        .unwrap();
    }
    let mut want: Vec<String> = fs::read_dir(&place.tree)
        .unwrap()
        .map(|e| e.unwrap().file_name().into_string().unwrap())
        .collect();
    want.extend([".".to_owned(), "..".to_owned()]);
    want.sort_unstable();
    let mut client = Client::start(&place.tree, &[]);
    for (opcode, head) in [(opcode::READDIR, 0), (opcode::READDIRPLUS, 128)] {
        for size in [512, 4096, 65536] {
            // Two at a time, of which what is read ahead of one is not the other's.
            let mut listings = [(); 2].map(|()| {
                let dir = client
                    .call(opcode::OPENDIR, 1, Body::new().zeros(8))
                    .unwrap();
                (u64_at(&dir, 0), 0, Vec::new())
            });
            let mut more = true;
            while std::mem::take(&mut more) {
                for (n, (fh, offset, names)) in listings.iter_mut().enumerate() {
                    // Four replies of one, three of the other.
                    for _ in n..4 {
                        let body = Body::new().u64(*fh).u64(*offset).u32(size).zeros(20);
                        let reply = client.call(opcode, 1, body).unwrap();
                        assert!(reply.len() <= size as usize);
                        more |= !reply.is_empty();
                        let mut at = 0;
                        while at < reply.len() {
                            *offset = u64_at(&reply, at + head + 8);
                            let len = u32_at(&reply, at + head + 16) as usize;
                            let start = at + head + 24;
                            let name = reply[start..start + len].to_vec();
                            names.push(String::from_utf8(name).unwrap());
                            at = (start + len).next_multiple_of(8);
                        }
                    }
                }
            }
            for (_, _, names) in &mut listings {
                names.sort_unstable();
                assert_eq!(*names, want, "{opcode} with {size}");
            }
            let fh = listings[0].0;
            // Too small for any entry; from a place that never was.
            let body = Body::new().u64(fh).u64(0).u32(8).zeros(20);
            assert_eq!(client.call(opcode, 1, body), Err(EINVAL));
            let body = Body::new().u64(fh).u64(u64::MAX).u32(4096).zeros(20);
            assert_eq!(client.call(opcode, 1, body), Err(EINVAL));
            client
                .call(opcode::RELEASEDIR, 1, Body::new().u64(fh).zeros(16))
                .unwrap();
        }
    }
    assert!(client.finish().success());
}

#[test]
fn a_guest_that_hoards_costs_a_bounded_amount() {
    let place = Place::new();
    for n in 0..400 {
        fs::write(place.tree.join(n.to_string()), b"x").unwrap();
    }
    let mut client = Client::start(&place.tree, &["-rlimit-nofile", "256"]);
    let nodes: Vec<u64> = (0..400)
        .map(|n| client.lookup(1, &n.to_string()).unwrap())
        .collect();
    // There are descriptors for a part of them only; each is the same file all the same.
    let ino = |client: &mut Client, node| {
        let attr = client.call(opcode::GETATTR, node, Body::new().zeros(16));
        attr.map(|attr| u64_at(&attr, 16))
    };
    for (n, node) in nodes.iter().enumerate() {
        let there = fs::metadata(place.tree.join(n.to_string())).unwrap();
        assert_eq!(ino(&mut client, *node), Ok(there.ino()), "{n}");
        assert_eq!(client.lookup(1, &n.to_string()), Ok(*node));
    }
    // What the guest moves or removes stays what it was, for as long as the guest knows it.
    let (removed, moved) = (nodes[3], nodes[4]);
    let inos = [removed, moved].map(|node| ino(&mut client, node).unwrap());
    for node in &nodes[100..390] {
        ino(&mut client, *node).unwrap();
    }
    client
        .call(opcode::UNLINK, 1, Body::new().name("3"))
        .unwrap();
    let body = Body::new().u64(1).u32(0).u32(0).name("4").name("moved");
    client.call(opcode::RENAME2, 1, body).unwrap();
    // Someone on the host replaces a file that has no descriptor now: it is gone, and what is there is not it.
    fs::remove_file(place.tree.join("5")).unwrap();
    symlink("/etc/passwd", place.tree.join("5")).unwrap();
    assert_eq!(ino(&mut client, nodes[5]), Err(ESTALE));
    assert_eq!(client.open(nodes[5], O_RDONLY), Err(ESTALE));
    for node in &nodes[100..390] {
        ino(&mut client, *node).unwrap();
    }
    assert_eq!(
        [removed, moved].map(|node| ino(&mut client, node).unwrap()),
        inos
    );
    // Files that are open have a descriptor each.
    let mut handles = Vec::new();
    let refused = loop {
        match client.open(nodes[0], O_RDONLY) {
            Ok(fh) => handles.push(fh),
            Err(errno) => break errno,
        }
    };
    assert_eq!(refused, ENFILE);
    assert!((100..=128).contains(&handles.len()), "{}", handles.len());
    assert_eq!(client.create(1, "new", O_RDWR), Err(ENFILE));
    assert!(!place.tree.join("new").exists());
    let used = client.call(opcode::OPENDIR, 1, Body::new().zeros(8));
    assert_eq!(used, Err(ENFILE));
    for fh in handles {
        client.release(nodes[0], fh).unwrap();
    }
    assert!(client.open(nodes[0], O_RDONLY).is_ok());
    client.assert_alive();
    assert!(client.finish().success());
}

#[test]
fn rights_do_not_leak_through_files() {
    let place = Place::new();
    let program = place.tree.join("program");
    fs::write(&program, b"x").unwrap();
    fs::set_permissions(&program, fs::Permissions::from_mode(0o4755)).unwrap();
    let mut client = Client::start(&place.tree, &[]);
    let node = client.lookup(1, "program").unwrap();
    let fh = client.open(node, O_RDWR).unwrap();
    // Someone without privileges in the guest writes to a set-user-id program.
    let body = Body::new()
        .u64(fh)
        .u64(0)
        .u32(1)
        .u32(flag::WRITE_KILL_SUIDGID)
        .zeros(16);
    client.call(opcode::WRITE, node, body.bytes(b"y")).unwrap();
    assert_eq!(fs::metadata(&program).unwrap().mode() & 0o7777, 0o755);
    // Attributes and lists are off unless asked for.
    let get = Body::new().u32(100).u32(0).name("user.x");
    assert_eq!(client.call(opcode::GETXATTR, node, get), Err(ENOSYS));
    let lock = Body::new()
        .u64(fh)
        .u64(1)
        .u64(0)
        .u64(10)
        .u32(1)
        .u32(1)
        .u64(0);
    assert_eq!(client.call(opcode::SETLK, node, lock), Err(ENOSYS));
    if nix::unistd::geteuid().is_root() {
        // Files belong to the guest's user; the id that means "do not change" is none.
        (client.uid, client.gid) = (1234, 77);
        fs::set_permissions(&place.tree, fs::Permissions::from_mode(0o777)).unwrap();
        client.create(1, "mine", O_RDWR).unwrap();
        let made = fs::metadata(place.tree.join("mine")).unwrap();
        assert_eq!((made.uid(), made.gid()), (1234, 77));
        for (uid, gid) in [(u32::MAX, 0), (0, u32::MAX), (u32::MAX, u32::MAX)] {
            (client.uid, client.gid) = (uid, gid);
            assert_eq!(client.create(1, "nobodys", O_RDWR), Err(EINVAL));
        }
        (client.uid, client.gid) = (0, 0);
        client.create(1, "roots", O_RDWR).unwrap();
        assert_eq!(
            fs::metadata(place.tree.join("roots")).unwrap().uid(),
            0,
            "taken back"
        );
    }
    client.assert_alive();
    assert!(client.finish().success());
}

#[test]
fn a_read_only_tree_stays_as_it_is() {
    let place = Place::new();
    let mut client = Client::start(&place.tree, &["-readonly", "-xattr"]);
    let file = client.lookup(1, "file").unwrap();
    for flags in [O_WRONLY, O_RDWR, O_RDONLY | libc::O_TRUNC] {
        assert_eq!(client.open(file, flags), Err(EROFS));
    }
    let fh = client.open(file, O_RDONLY).unwrap();
    assert_eq!(client.read(file, fh, 0, 100).unwrap(), b"contents");
    assert_eq!(client.write(file, fh, 0, b"x"), Err(EROFS));
    assert_eq!(client.create(1, "new", O_RDWR), Err(EROFS));
    for (opcode, body) in with_name("new").into_iter().skip(1) {
        assert_eq!(client.call(opcode, 1, body), Err(EROFS), "{opcode}");
    }
    assert_eq!(
        client.call(opcode::SETATTR, file, Body::new().u32(1).zeros(84)),
        Err(EROFS)
    );
    let set = Body::new().u32(1).u32(0).u64(0).name("user.x").bytes(b"v");
    assert_eq!(client.call(opcode::SETXATTR, file, set), Err(EROFS));
    assert!(client.finish().success());
    assert_eq!(fs::read_dir(&place.tree).unwrap().count(), 2);
}

#[test]
fn attributes_and_locks_work_when_asked_for() {
    let place = Place::new();
    let options = ["-xattr", "-posix-lock", "-flock"];
    let mut client = Client::start(&place.tree, &options);
    let file = client.lookup(1, "file").unwrap();
    let set = Body::new()
        .u32(5)
        .u32(0)
        .u64(0)
        .name("user.test")
        .bytes(b"value");
    match client.call(opcode::SETXATTR, file, set) {
        Ok(_) => {
            let get = |size: u32| Body::new().u32(size).u32(0).name("user.test");
            let size = client.call(opcode::GETXATTR, file, get(0)).unwrap();
            assert_eq!(u32_at(&size, 0), 5);
            assert_eq!(
                client.call(opcode::GETXATTR, file, get(100)).unwrap(),
                b"value"
            );
            assert_eq!(
                client.call(opcode::GETXATTR, file, get(2)),
                Err(libc::ERANGE)
            );
            let list = client
                .call(opcode::LISTXATTR, file, Body::new().u32(1000).u32(0))
                .unwrap();
            assert!(list.windows(10).any(|w| w == b"user.test\0"));
            let name = Body::new().name("user.test");
            client
                .call(opcode::REMOVEXATTR, file, name.clone())
                .unwrap();
            assert_eq!(
                client.call(opcode::REMOVEXATTR, file, name),
                Err(libc::ENODATA)
            );
        }
        // The temporary folder's file system may have none.
        Err(errno) => assert_eq!(errno, EOPNOTSUPP),
    }
    let acl = Body::new().u32(100).u32(0).name("system.posix_acl_access");
    assert_eq!(
        client.call(opcode::GETXATTR, file, acl),
        Err(EOPNOTSUPP),
        "not asked for"
    );

    let fh = client.open(file, O_RDWR).unwrap();
    let lock = |owner: u64, start: u64, end: u64, kind: i32| {
        Body::new()
            .u64(fh)
            .u64(owner)
            .u64(start)
            .u64(end)
            .u32(kind as u32)
            .u32(1)
            .u64(0)
    };
    client
        .call(opcode::SETLK, file, lock(1, 0, 9, libc::F_WRLCK))
        .unwrap();
    assert_eq!(
        client.call(opcode::SETLK, file, lock(2, 5, 5, libc::F_RDLCK)),
        Err(libc::EAGAIN)
    );
    client
        .call(opcode::SETLK, file, lock(2, 10, u64::MAX, libc::F_WRLCK))
        .unwrap();
    let taken = client
        .call(opcode::GETLK, file, lock(3, 3, 4, libc::F_WRLCK))
        .unwrap();
    assert_eq!((u64_at(&taken, 0), u64_at(&taken, 8)), (0, 9));
    // The owner closes a descriptor of the file: all its locks are gone.
    client
        .call(opcode::FLUSH, file, Body::new().u64(fh).u64(0).u64(1))
        .unwrap();
    client
        .call(opcode::SETLK, file, lock(3, 0, 9, libc::F_WRLCK))
        .unwrap();
    // flock: the lock of an open file, seen by the host.
    let whole = |fh: u64, kind: i32| {
        let lock = Body::new()
            .u64(fh)
            .u64(1)
            .u64(0)
            .u64(i64::MAX as u64)
            .u32(kind as u32);
        lock.u32(1).u32(flag::LK_FLOCK).u32(0)
    };
    client
        .call(opcode::SETLK, file, whole(fh, libc::F_WRLCK))
        .unwrap();
    let host = fs::File::open(place.tree.join("file")).unwrap();
    assert!(host.try_lock().is_err());
    client
        .call(opcode::SETLK, file, whole(fh, libc::F_UNLCK))
        .unwrap();
    host.try_lock().unwrap();
    assert_eq!(
        client.call(opcode::SETLK, file, whole(fh, libc::F_RDLCK)),
        Err(libc::EAGAIN)
    );
    client.assert_alive();
    assert!(client.finish().success());
}

/// No attack, but the calls behind it have a filter before them: data is made durable in every way, and found among holes.
#[test]
fn files_are_synced_and_their_holes_are_found() {
    let place = Place::new();
    let sparse = fs::File::create(place.tree.join("sparse")).unwrap();
    sparse.write_all_at(b"data", 1 << 20).unwrap();
    sparse.set_len(4 << 20).unwrap();
    let mut client = Client::start(&place.tree, &[]);
    let file = client.lookup(1, "sparse").unwrap();
    let fh = client.open(file, libc::O_RDWR).unwrap();
    for data_only in [0, 1] {
        let body = Body::new().u64(fh).u32(data_only).u32(0);
        assert_eq!(client.call(opcode::FSYNC, file, body), Ok(vec![]));
    }
    // The whole file system, as the guest asks for when it unmounts.
    symlink("sparse", place.tree.join("link")).unwrap();
    let link = client.lookup(1, "link").unwrap();
    for (node, answer) in [(1, Ok(vec![])), (file, Ok(vec![])), (link, Err(EINVAL))] {
        let body = Body::new().zeros(8);
        assert_eq!(client.call(opcode::SYNCFS, node, body), answer);
    }
    let mut seek = |from: u64, whence: i32| {
        let body = Body::new().u64(fh).u64(from).u32(whence as u32).u32(0);
        client
            .call(opcode::LSEEK, file, body)
            .map(|reply| u64_at(&reply, 0))
    };
    let data = seek(0, libc::SEEK_DATA).unwrap();
    let hole = seek(data, libc::SEEK_HOLE).unwrap();
    // A file system without holes has data everywhere.
    assert!(
        data <= 1 << 20 && hole > 1 << 20 && hole <= 4 << 20,
        "{data} {hole}"
    );
    assert_eq!(seek(4 << 20, libc::SEEK_DATA), Err(libc::ENXIO));
    client.assert_alive();
}
