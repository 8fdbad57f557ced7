//! What requests do that only newer guests, or other systems than Linux, send, and which test shows it for each request that there is.

#![allow(clippy::unwrap_used)] // test code

mod raw;

use std::fs;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::Path;
use std::time::{Duration, UNIX_EPOCH};

use fs_device::fuse::wire::opcode;
use libc::{EACCES, EBADF, ENOENT, ENOTDIR, ESTALE, O_EXCL, O_RDONLY, O_RDWR};
use nix::sys::statvfs::statvfs;
use raw::{Body, Client, u32_at, u64_at};

fn tree() -> tempfile::TempDir {
    let dir = tempfile::tempdir().unwrap();
    fs::write(dir.path().join("file"), b"contents").unwrap();
    dir
}

#[test]
fn statfs_tells_the_file_systems_sizes() {
    let dir = tree();
    let mut client = Client::start(dir.path(), &[]);
    let file = client.lookup(1, "file").unwrap();
    for node in [1, file] {
        let told = client.call(opcode::STATFS, node, Body::new()).unwrap();
        let there = statvfs(dir.path()).unwrap();
        assert_eq!(u64_at(&told, 0), there.blocks());
        assert_eq!(u64_at(&told, 24), there.files());
        // Others write meanwhile.
        let (free, most) = (u64_at(&told, 8), there.blocks());
        assert!(free.abs_diff(there.blocks_free()) < most / 10, "{free}");
        assert!(u64_at(&told, 16) <= free);
        let sizes = [40, 44, 48].map(|at| u64::from(u32_at(&told, at)));
        let [block, name, fragment] = sizes;
        assert_eq!((block, name), (there.block_size(), there.name_max()));
        assert_eq!(fragment, there.fragment_size());
    }
    assert_eq!(client.call(opcode::STATFS, 77, Body::new()), Err(ESTALE));
    assert!(client.finish().success());
}

#[test]
fn statx_tells_the_time_of_birth_and_what_getattr_tells() {
    let dir = tree();
    let path = dir.path().join("file");
    // Four times that are not the same: the last change is of a later tick than the birth.
    let times = fs::FileTimes::new()
        .set_accessed(UNIX_EPOCH + Duration::from_secs(1000))
        .set_modified(UNIX_EPOCH + Duration::from_secs(2000));
    let opened = fs::File::options().write(true).open(&path).unwrap();
    opened.set_times(times).unwrap();
    let born_at = |there: &fs::Metadata| {
        let born = there.created().ok()?.duration_since(UNIX_EPOCH).ok()?;
        Some((born.as_secs().cast_signed(), i64::from(born.subsec_nanos())))
    };
    let there = loop {
        fs::set_permissions(&path, fs::Permissions::from_mode(0o640)).unwrap();
        let there = fs::metadata(&path).unwrap();
        if born_at(&there) != Some((there.ctime(), there.ctime_nsec())) {
            break there;
        }
    };
    let mut client = Client::start(dir.path(), &[]);
    let file = client.lookup(1, "file").unwrap();
    let told = client
        .call(opcode::STATX, file, Body::new().zeros(24))
        .unwrap();
    assert_eq!(told.len(), 32 + 256);
    // How long it holds, and then struct fuse_statx.
    assert_eq!(u64_at(&told, 0), 1);
    let stat = &told[32..];
    let born = born_at(&there);
    let mask = u32_at(stat, 0);
    assert_eq!(mask & libc::STATX_BASIC_STATS, libc::STATX_BASIC_STATS);
    assert_eq!(mask & libc::STATX_BTIME != 0, born.is_some());
    assert_eq!(u64::from(u32_at(stat, 16)), there.nlink());
    assert_eq!(
        (u32_at(stat, 20), u32_at(stat, 24)),
        (there.uid(), there.gid())
    );
    assert_eq!(u32_at(stat, 28), there.mode());
    let numbers = [32, 40, 48].map(|at| u64_at(stat, at));
    assert_eq!(numbers, [there.ino(), there.size(), there.blocks()]);
    let time = |at: usize| {
        (
            u64_at(stat, at).cast_signed(),
            i64::from(u32_at(stat, at + 8)),
        )
    };
    assert_eq!(time(64), (there.atime(), there.atime_nsec()));
    if let Some(born) = born {
        assert_eq!(time(80), born);
    }
    assert_eq!(time(96), (there.ctime(), there.ctime_nsec()));
    assert_eq!(time(112), (there.mtime(), there.mtime_nsec()));
    assert!(client.finish().success());
}

#[test]
fn access_is_as_the_permissions_say() {
    let dir = tree();
    let path = dir.path().join("file");
    let mut client = Client::start(dir.path(), &[]);
    let file = client.lookup(1, "file").unwrap();
    let (owner, group) = (
        fs::metadata(&path).unwrap().uid(),
        fs::metadata(&path).unwrap().gid(),
    );
    let mut may = |mode: u32, uid: u32, gid: u32, mask: i32| {
        fs::set_permissions(&path, fs::Permissions::from_mode(mode)).unwrap();
        (client.uid, client.gid) = (uid, gid);
        let body = Body::new().u32(mask as u32).u32(0);
        client.call(opcode::ACCESS, file, body)
    };
    let (read, write, execute) = (libc::R_OK, libc::W_OK, libc::X_OK);
    let other = 54321;
    for (mode, uid, gid, mask, answer) in [
        (0o604, other, other, read, Ok(vec![])),
        (0o640, other, other, read, Err(EACCES)),
        (0o604, other, other, read | write, Err(EACCES)),
        (0o640, other, group, read, Ok(vec![])),
        (0o604, other, group, read, Err(EACCES)),
        // Root may what is not to be executed by nobody.
        (0o000, 0, 0, read | write, Ok(vec![])),
        (0o666, 0, 0, execute, Err(EACCES)),
        (0o001, 0, 0, execute, Ok(vec![])),
        (0o000, other, other, libc::F_OK, Ok(vec![])),
    ] {
        let asked = may(mode, uid, gid, mask);
        assert_eq!(asked, answer, "{mode:o} {uid} {gid} {mask}");
    }
    if owner != 0 {
        assert_eq!(may(0o400, owner, group, read), Ok(vec![]));
    }
    (client.uid, client.gid) = (0, 0);
    assert!(client.finish().success());
}

#[test]
fn a_file_without_a_name_gets_one_or_never_does() {
    let dir = tree();
    let mut client = Client::start(dir.path(), &[]);
    let make = |client: &mut Client, folder: u64, flags: i32| {
        let body = Body::new().u32(flags as u32).u32(0o640).zeros(8);
        let made = client.call(opcode::TMPFILE, folder, body.name("of the kernel"))?;
        Ok((u64_at(&made, 0), u64_at(&made, 128)))
    };
    let link = |client: &mut Client, node: u64, name: &str| {
        let body = Body::new().u64(node).name(name);
        client.call(opcode::LINK, 1, body)
    };
    let (node, fh) = make(&mut client, 1, O_RDWR).unwrap();
    client.write(node, fh, 0, b"written").unwrap();
    assert_eq!(client.read(node, fh, 0, 100).unwrap(), b"written");
    let names = || fs::read_dir(dir.path()).unwrap().count();
    assert_eq!(names(), 1, "the folder shows nothing of it");
    link(&mut client, node, "named").unwrap();
    let named = dir.path().join("named");
    assert_eq!(fs::read(&named).unwrap(), b"written");
    assert_eq!(fs::metadata(&named).unwrap().mode() & 0o777, 0o640);

    let (never, fh) = make(&mut client, 1, O_RDWR | O_EXCL).unwrap();
    client.write(never, fh, 0, b"x").unwrap();
    assert_eq!(link(&mut client, never, "never"), Err(ENOENT));
    assert_eq!(names(), 2);
    let file = client.lookup(1, "file").unwrap();
    assert_eq!(
        make(&mut client, file, O_RDWR),
        Err::<(u64, u64), _>(ENOTDIR)
    );
    client.release(never, fh).unwrap();
    assert!(client.finish().success());
}

#[test]
fn many_are_forgotten_at_once() {
    let dir = tree();
    let mut client = Client::start(dir.path(), &[]);
    let names: Vec<String> = (0..50).map(|n| n.to_string()).collect();
    let mut nodes = Vec::new();
    for name in &names {
        fs::write(dir.path().join(name), "").unwrap();
        nodes.push(client.lookup(1, name).unwrap());
    }
    // The first was looked up twice.
    assert_eq!(client.lookup(1, "0"), Ok(nodes[0]));
    let mut batch = Body::new().u32(50).u32(0);
    for node in &nodes {
        batch = batch.u64(*node).u64(1);
    }
    let len = 40 + batch.0.len() as u32;
    assert_eq!(client.raw(opcode::BATCH_FORGET, 0, len, &batch.0, 4096), 0);
    assert!(client.open(nodes[0], O_RDONLY).is_ok());
    for node in &nodes[1..] {
        assert_eq!(client.open(*node, O_RDONLY), Err(ESTALE));
    }
    assert!(client.finish().success());
}

#[test]
fn a_folder_is_synced_by_its_handle() {
    let dir = tree();
    let mut client = Client::start(dir.path(), &[]);
    let opened = client.call(opcode::OPENDIR, 1, Body::new().zeros(8));
    let folder = u64_at(&opened.unwrap(), 0);
    let file = client.lookup(1, "file").unwrap();
    let fh = client.open(file, O_RDONLY).unwrap();
    for data_only in [0, 1] {
        let body = |fh: u64| Body::new().u64(fh).u32(data_only).u32(0);
        assert_eq!(client.call(opcode::FSYNCDIR, 1, body(folder)), Ok(vec![]));
        assert_eq!(client.call(opcode::FSYNCDIR, 1, body(fh)), Err(EBADF));
    }
    assert!(client.finish().success());
}

/// Which test shows what a request does: its file and its name.
const SHOWN_BY: &[(&str, &str, &str)] = &[
    ("LOOKUP", "attacks.rs", "names_lead_nowhere"),
    (
        "FORGET",
        "escapes.rs",
        "a_handle_outlives_the_guests_knowledge_of_its_file",
    ),
    (
        "GETATTR",
        "attacks.rs",
        "a_guest_that_hoards_costs_a_bounded_amount",
    ),
    (
        "SETATTR",
        "escapes.rs",
        "owners_are_only_those_that_a_mapping_has",
    ),
    ("READLINK", "escapes.rs", "links_of_every_shape_stay_text"),
    ("SYMLINK", "escapes.rs", "links_of_every_shape_stay_text"),
    (
        "MKNOD",
        "escapes.rs",
        "special_files_that_the_guest_makes_are_its_own_kernels_business",
    ),
    ("MKDIR", "escapes.rs", "folders_may_be_deeper_than_any_path"),
    ("UNLINK", "survival.rs", "change"),
    ("RMDIR", "escapes.rs", "folders_may_be_deeper_than_any_path"),
    ("RENAME", "survival.rs", "change"),
    ("LINK", "survival.rs", "change"),
    (
        "OPEN",
        "options.rs",
        "the_cache_policy_says_how_long_things_hold",
    ),
    (
        "READ",
        "survival.rs",
        "large_requests_that_several_threads_are_at_are_done_once_whoever_dies",
    ),
    (
        "WRITE",
        "survival.rs",
        "large_requests_that_several_threads_are_at_are_done_once_whoever_dies",
    ),
    (
        "STATFS",
        "requests.rs",
        "statfs_tells_the_file_systems_sizes",
    ),
    (
        "RELEASE",
        "survival.rs",
        "a_file_is_closed_after_what_others_still_read_of_it",
    ),
    (
        "FSYNC",
        "attacks.rs",
        "files_are_synced_and_their_holes_are_found",
    ),
    (
        "SETXATTR",
        "attacks.rs",
        "attributes_and_locks_work_when_asked_for",
    ),
    (
        "GETXATTR",
        "attacks.rs",
        "attributes_and_locks_work_when_asked_for",
    ),
    (
        "LISTXATTR",
        "attacks.rs",
        "attributes_and_locks_work_when_asked_for",
    ),
    (
        "REMOVEXATTR",
        "attacks.rs",
        "attributes_and_locks_work_when_asked_for",
    ),
    (
        "FLUSH",
        "attacks.rs",
        "attributes_and_locks_work_when_asked_for",
    ),
    (
        "INIT",
        "escapes.rs",
        "a_session_can_begin_end_and_begin_again_in_any_order",
    ),
    (
        "OPENDIR",
        "attacks.rs",
        "folders_are_read_whole_whatever_the_size_of_a_reply",
    ),
    (
        "READDIR",
        "attacks.rs",
        "folders_are_read_whole_whatever_the_size_of_a_reply",
    ),
    (
        "RELEASEDIR",
        "attacks.rs",
        "folders_are_read_whole_whatever_the_size_of_a_reply",
    ),
    (
        "FSYNCDIR",
        "requests.rs",
        "a_folder_is_synced_by_its_handle",
    ),
    (
        "GETLK",
        "attacks.rs",
        "attributes_and_locks_work_when_asked_for",
    ),
    (
        "SETLK",
        "attacks.rs",
        "attributes_and_locks_work_when_asked_for",
    ),
    (
        "SETLKW",
        "survival.rs",
        "who_waits_for_a_lock_gets_it_when_it_is_free_and_keeps_nobody_waiting",
    ),
    ("ACCESS", "requests.rs", "access_is_as_the_permissions_say"),
    (
        "CREATE",
        "escapes.rs",
        "a_handle_outlives_the_guests_knowledge_of_its_file",
    ),
    (
        "INTERRUPT",
        "survival.rs",
        "who_waits_for_a_lock_gets_it_when_it_is_free_and_keeps_nobody_waiting",
    ),
    (
        "DESTROY",
        "escapes.rs",
        "a_session_can_begin_end_and_begin_again_in_any_order",
    ),
    ("BATCH_FORGET", "requests.rs", "many_are_forgotten_at_once"),
    ("FALLOCATE", "escapes.rs", "space_and_copies_have_bounds"),
    (
        "READDIRPLUS",
        "attacks.rs",
        "folders_are_read_whole_whatever_the_size_of_a_reply",
    ),
    (
        "RENAME2",
        "moved.rs",
        "a_guest_may_rename_more_files_than_there_are_descriptors",
    ),
    (
        "LSEEK",
        "attacks.rs",
        "files_are_synced_and_their_holes_are_found",
    ),
    (
        "COPY_FILE_RANGE",
        "escapes.rs",
        "space_and_copies_have_bounds",
    ),
    ("SETUPMAPPING", "mapping.rs", "map"),
    ("REMOVEMAPPING", "mapping.rs", "unmap"),
    (
        "SYNCFS",
        "attacks.rs",
        "files_are_synced_and_their_holes_are_found",
    ),
    (
        "TMPFILE",
        "requests.rs",
        "a_file_without_a_name_gets_one_or_never_does",
    ),
    (
        "STATX",
        "requests.rs",
        "statx_tells_the_time_of_birth_and_what_getattr_tells",
    ),
];

#[test]
fn each_request_has_a_test_that_shows_what_it_does() {
    let read = |path: &str| {
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join(path);
        fs::read_to_string(path).unwrap()
    };
    let wire = read("src/fuse/wire.rs");
    let (_, numbers) = wire.split_once("opcode: u32 {").unwrap();
    let (numbers, _) = numbers.split_once('}').unwrap();
    let requests: Vec<&str> = numbers
        .split(',')
        .filter_map(|item| Some(item.split_once('=')?.0.trim()))
        .collect();
    assert_eq!(requests.len(), SHOWN_BY.len());
    for request in requests {
        let shown = SHOWN_BY.iter().find(|(name, ..)| *name == request);
        let (_, file, test) = shown.unwrap_or_else(|| panic!("no test shows what {request} does"));
        let text = read(&format!("tests/{file}"));
        let body = text.split_once(&format!("fn {test}("));
        let (_, body) = body.unwrap_or_else(|| panic!("{file} has no {test}"));
        let (body, _) = body.split_once("\n}\n").unwrap();
        // By its number, or by the client's own function.
        let number = format!("opcode::{request}");
        let follows = |rest: &str| !rest.starts_with(|c: char| c == '_' || c.is_alphanumeric());
        let sent = body.contains(&format!("client.{}(", request.to_lowercase()))
            || body.split(number.as_str()).skip(1).any(follows);
        assert!(sent, "{file}: {test} does not send {request}");
    }
}
