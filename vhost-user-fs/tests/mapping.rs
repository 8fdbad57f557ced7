//! The DAX window: what a guest has mapped, and what of it a front end is asked for.

#![allow(clippy::unwrap_used)] // test code

mod raw;

use std::fs;
use std::os::unix::fs::{FileExt, MetadataExt};

use device_host::test_frontend::window::{Manner, WindowServer};
use fs_device::fuse::wire::opcode;
use libc::{EACCES, EBADF, EINVAL, ENODEV, ENOMEM, ENOSYS, EROFS, O_RDONLY, O_RDWR, O_WRONLY};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use raw::{Body, Client, Reply, u32_at, u64_at};

/// The unit of mappings.
const UNIT: u64 = 2 << 20;
/// The inode itself, no open file.
const INODE: u64 = u64::MAX;
const WRITE: u64 = 1;
const READ: u64 = 2;

/// `SETUPMAPPING` of `len` bytes from `foffset` on at `moffset`.
fn map(
    client: &mut Client,
    (node, fh): (u64, u64),
    foffset: u64,
    (moffset, len): (u64, u64),
    flags: u64,
) -> Reply {
    let body = Body::new().u64(fh).u64(foffset).u64(len).u64(flags);
    client.call(opcode::SETUPMAPPING, node, body.u64(moffset))
}

fn unmap(client: &mut Client, ranges: &[(u64, u64)]) -> Reply {
    let count = u32::try_from(ranges.len()).unwrap();
    let body = ranges
        .iter()
        .fold(Body::new().u32(count), |body, (at, len)| {
            body.u64(*at).u64(*len)
        });
    client.call(opcode::REMOVEMAPPING, 1, body)
}

fn start(options: &[&str]) -> (tempfile::TempDir, WindowServer, Client) {
    let dir = tempfile::tempdir().unwrap();
    fs::write(dir.path().join("file"), vec![7; 3 * UNIT as usize]).unwrap();
    let window = WindowServer::default();
    let options = [&["-dax-window", "16M"], options].concat();
    let (client, sizes) = Client::start_with_window(dir.path(), &options, &window);
    assert_eq!(sizes, [16 << 20]);
    (dir, window, client)
}

#[test]
fn files_are_mapped_as_the_guest_says_and_unmapped() {
    let (dir, window, mut client) = start(&[]);
    let node = client.lookup(1, "file").unwrap();
    map(&mut client, (node, INODE), UNIT, (0, 2 * UNIT), READ).unwrap();
    let other = client.create(1, "other", O_RDWR).unwrap();
    map(&mut client, other, 0, (4 * UNIT, UNIT), READ | WRITE).unwrap();
    let ino = |name| fs::metadata(dir.path().join(name)).unwrap().ino();
    window.with(|state| {
        let [(0, first), (at, second)] = state.mapped.iter().collect::<Vec<_>>()[..] else {
            panic!("{:?}", state.mapped);
        };
        assert_eq!(*at, 4 * UNIT);
        assert_eq!(
            (first.offset, first.len, first.writable),
            (UNIT, 2 * UNIT, false)
        );
        assert_eq!(
            (second.offset, second.len, second.writable),
            (0, UNIT, true)
        );
        assert_eq!(first.file.metadata().unwrap().ino(), ino("file"));
        assert_eq!(second.file.metadata().unwrap().ino(), ino("other"));
        // What is not to be written is not even open for it.
        first.file.write_at(b"x", 0).unwrap_err();
        second.file.write_at(b"x", 0).unwrap();
    });
    // As Linux does when the guest's first write comes: the same range again, with another right.
    map(
        &mut client,
        (node, INODE),
        UNIT,
        (0, 2 * UNIT),
        READ | WRITE,
    )
    .unwrap();
    assert!(window.with(|state| state.mapped[&0].writable));
    unmap(&mut client, &[(4 * UNIT, UNIT), (0, 2 * UNIT)]).unwrap();
    assert_eq!(window.places(), [0; 0]);
    // Again, as a guest whose answer was lost would.
    unmap(&mut client, &[(0, 2 * UNIT)]).unwrap();
    assert!(client.finish().success());
}

#[test]
fn a_front_end_to_the_letter_gets_the_old_mapping_removed_first() {
    let (_dir, window, mut client) = start(&[]);
    window.with(|state| state.manner = Manner::Strict);
    let node = client.lookup(1, "file").unwrap();
    for flags in [READ, READ | WRITE] {
        map(&mut client, (node, INODE), 0, (UNIT, UNIT), flags).unwrap();
    }
    assert!(window.with(|state| state.mapped[&UNIT].writable));
    unmap(&mut client, &[(UNIT, UNIT)]).unwrap();
    assert_eq!(window.places(), [0; 0]);
    window.with(|state| state.manner = Manner::Refuses);
    let refused = map(&mut client, (node, INODE), 0, (0, UNIT), READ);
    assert_eq!(refused.unwrap_err(), ENOMEM);
    client.assert_alive();
    assert!(client.finish().success());
}

#[test]
fn the_session_says_what_mappings_are_like_and_ends_them() {
    let (_dir, window, mut client) = start(&[]);
    let node = client.lookup(1, "file").unwrap();
    map(&mut client, (node, INODE), 0, (0, UNIT), READ).unwrap();
    let reply = client.init();
    // `map_alignment`, a power of two, and the flags that say that it and the attribute count.
    assert_eq!(u16::from_ne_bytes([reply[30], reply[31]]), 21);
    assert_ne!(u32_at(&reply, 12) & 1 << 26, 0);
    assert_ne!(u32_at(&reply, 32) & 1 << 1, 0);
    assert_eq!(window.places(), [0; 0], "of the session before");
    let flags = |client: &mut Client, name| {
        let entry = client
            .call(opcode::LOOKUP, 1, Body::new().name(name))
            .unwrap();
        (u64_at(&entry, 0), u32_at(&entry, 40 + 84))
    };
    let (node, file) = flags(&mut client, "file");
    client
        .call(
            opcode::MKDIR,
            1,
            Body::new().u32(0o755).u32(0).name("folder"),
        )
        .unwrap();
    let (_, folder) = flags(&mut client, "folder");
    assert_eq!((file, folder), (2, 0), "FUSE_ATTR_DAX of files alone");
    map(&mut client, (node, INODE), 0, (0, UNIT), READ).unwrap();
    client.call(opcode::DESTROY, 0, Body::new()).unwrap();
    assert_eq!(window.places(), [0; 0], "of the session that ended");
    assert!(client.finish().success());
}

#[test]
fn wrong_places_lengths_and_flags_never_reach_the_front_end() {
    let (dir, window, mut client) = start(&[]);
    std::os::unix::fs::symlink("file", dir.path().join("link")).unwrap();
    let node = client.lookup(1, "file").unwrap();
    let link = client.lookup(1, "link").unwrap();
    let asked = window.with(|state| state.asked);
    let top = 1 << 63;
    for (foffset, moffset, len, flags) in [
        (0, 0, 0, READ),
        (0, 0, 4096, READ),
        (0, 0, UNIT - 1, READ),
        (0, 0, UNIT + 1, READ),
        (0, 4096, UNIT, READ),
        (0, 16 << 20, UNIT, READ),
        (0, 15 << 20, UNIT, READ),
        (0, 0, (16 << 20) + UNIT, READ),
        (0, 14 << 20, 2 * UNIT, READ),
        (0, 0u64.wrapping_sub(UNIT), UNIT, READ),
        (0, UNIT, 0u64.wrapping_sub(UNIT), READ),
        (0, top, UNIT, READ),
        (4096, 0, UNIT, READ),
        (1, 0, UNIT, READ),
        (0u64.wrapping_sub(UNIT), 0, UNIT, READ),
        (top, 0, UNIT, READ),
        (top - UNIT, 0, UNIT, READ),
        (0, 0, UNIT, 0),
        (0, 0, UNIT, 4),
        (0, 0, UNIT, READ | 1 << 63),
    ] {
        let reply = map(&mut client, (node, INODE), foffset, (moffset, len), flags);
        assert_eq!(
            reply.unwrap_err(),
            EINVAL,
            "{foffset:#x} {moffset:#x} {len:#x} {flags:#x}"
        );
    }
    for (node, error) in [(1, ENODEV), (link, ENODEV)] {
        let reply = map(&mut client, (node, INODE), 0, (0, UNIT), READ);
        assert_eq!(reply.unwrap_err(), error);
    }
    for (at, len) in [
        (0, 0),
        (1, UNIT),
        (0, 1),
        (0, 1 << 30),
        (16 << 20, UNIT),
        (0u64.wrapping_sub(UNIT), UNIT),
    ] {
        assert_eq!(unmap(&mut client, &[(at, len)]).unwrap_err(), EINVAL);
    }
    // More entries than the request has.
    for count in [1, 2, u32::MAX] {
        let body = Body::new().u32(count).zeros(15);
        let reply = client.call(opcode::REMOVEMAPPING, 1, body);
        assert_eq!(reply.unwrap_err(), EINVAL);
    }
    assert_eq!(
        client
            .call(opcode::SETUPMAPPING, node, Body::new().zeros(39))
            .unwrap_err(),
        EINVAL
    );
    assert_eq!(window.with(|state| state.asked), asked);
    // One wrong range keeps none of the others from being unmapped.
    map(&mut client, (node, INODE), 0, (UNIT, UNIT), READ).unwrap();
    let reply = unmap(&mut client, &[(1, UNIT), (UNIT, UNIT)]);
    assert_eq!(reply.unwrap_err(), EINVAL);
    assert_eq!(window.places(), [0; 0]);
    client.assert_alive();
    assert!(client.finish().success());
}

#[test]
fn a_mapping_takes_no_more_rights_than_opening_does() {
    let (_dir, window, mut client) = start(&[]);
    let node = client.lookup(1, "file").unwrap();
    let read = client.open(node, O_RDONLY).unwrap();
    let write = client.open(node, O_WRONLY).unwrap();
    let both = client.open(node, O_RDWR).unwrap();
    let mut one = |fh, flags| map(&mut client, (node, fh), 0, (0, UNIT), flags);
    assert_eq!(one(read, READ | WRITE).unwrap_err(), EACCES);
    assert_eq!(one(write, WRITE).unwrap_err(), EACCES);
    assert_eq!(one(write, READ).unwrap_err(), EACCES);
    assert_eq!(one(both + 100, READ).unwrap_err(), EBADF);
    assert_eq!(window.places(), [0; 0]);
    one(read, READ).unwrap();
    one(both, READ | WRITE).unwrap();
    let folder = client
        .call(opcode::OPENDIR, 1, Body::new().zeros(8))
        .unwrap();
    let reply = map(&mut client, (1, u64_at(&folder, 0)), 0, (0, UNIT), READ);
    assert_eq!(reply.unwrap_err(), EBADF);
    assert!(client.finish().success());

    let (_dir, window, mut client) = start(&["-readonly"]);
    let node = client.lookup(1, "file").unwrap();
    let mut one = |flags| map(&mut client, (node, INODE), 0, (0, UNIT), flags);
    assert_eq!(one(READ | WRITE).unwrap_err(), EROFS);
    assert_eq!(one(WRITE).unwrap_err(), EROFS);
    one(READ).unwrap();
    window.with(|state| state.mapped[&0].file.write_at(b"x", 0).unwrap_err());
    assert!(client.finish().success());
}

#[test]
fn without_a_window_nothing_is_mapped() {
    let dir = tempfile::tempdir().unwrap();
    fs::write(dir.path().join("file"), b"contents").unwrap();
    // The front end knows nothing of windows; or the daemon has none.
    for options in [&["-dax-window", "16M"][..], &[]] {
        let mut client = Client::start(dir.path(), options);
        let reply = client.init();
        assert_eq!(u32_at(&reply, 12) & 1 << 26, 0);
        let entry = client
            .call(opcode::LOOKUP, 1, Body::new().name("file"))
            .unwrap();
        assert_eq!(u32_at(&entry, 40 + 84), 0);
        let node = u64_at(&entry, 0);
        let reply = map(&mut client, (node, INODE), 0, (0, UNIT), READ);
        assert_eq!(reply.unwrap_err(), ENOSYS);
        assert_eq!(unmap(&mut client, &[(0, UNIT)]).unwrap_err(), ENOSYS);
        assert!(client.finish().success());
    }
}

/// The process inside of the daemon's jail.
fn serving(client: &Client) -> Option<Pid> {
    let outside = client.child.id();
    let path = format!("/proc/{outside}/task/{outside}/children");
    let pid = fs::read_to_string(path).ok()?.trim().parse().ok()?;
    Some(Pid::from_raw(pid))
}

#[test]
fn a_process_that_is_killed_while_it_waits_for_an_answer_leaves_none_behind() {
    let (_dir, window, mut client) = start(&["-log-level", "debug"]);
    let node = client.lookup(1, "file").unwrap();
    for flags in [READ, READ | WRITE, READ] {
        // The guest's request is done again by the next process, which must not take the last one's answer for its own.
        let killed = serving(&client).unwrap();
        window.with(|state| state.kill = Some(killed));
        map(&mut client, (node, INODE), 0, (0, UNIT), flags).unwrap();
        assert_ne!(serving(&client), Some(killed));
        let wanted = flags & WRITE != 0;
        assert_eq!(window.with(|state| state.mapped[&0].writable), wanted);
        window.with(|state| state.manner = Manner::Refuses);
        let refused = map(&mut client, (node, INODE), 0, (UNIT, UNIT), READ);
        assert_eq!(refused.unwrap_err(), ENOMEM);
        window.with(|state| state.manner = Manner::Replaces);
        map(&mut client, (node, INODE), 0, (UNIT, UNIT), READ).unwrap();
        let killed = serving(&client).unwrap();
        window.with(|state| state.kill = Some(killed));
        unmap(&mut client, &[(UNIT, UNIT)]).unwrap();
        assert_ne!(serving(&client), Some(killed));
        assert_eq!(window.places(), [0]);
    }
    assert!(client.finish().success());
}

#[test]
fn a_killed_process_leaves_mappings_as_they_are_and_the_next_one_goes_on() {
    let (_dir, window, mut client) = start(&["-log-level", "debug"]);
    let node = client.lookup(1, "file").unwrap();
    map(&mut client, (node, INODE), 0, (0, UNIT), READ).unwrap();
    for round in 1..5 {
        // None at the moment if the last one gave an answer while it died.
        if let Some(pid) = serving(&client) {
            kill(pid, Signal::SIGKILL).unwrap();
        }
        let at = round * UNIT;
        map(&mut client, (node, INODE), 0, (at, UNIT), READ | WRITE).unwrap();
        assert_eq!(window.places(), [0, at]);
        unmap(&mut client, &[(at, UNIT)]).unwrap();
    }
    unmap(&mut client, &[(0, UNIT)]).unwrap();
    assert_eq!(window.places(), [0; 0]);
    assert!(client.finish().success());
}
