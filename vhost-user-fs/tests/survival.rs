//! The serving process is killed, and the guest notices nothing: no request is lost, none is done twice, what was open stays
//! open. The front end is one that does nothing about it.

#![allow(clippy::unwrap_used)] // test code

mod raw;

use std::collections::BTreeMap;
use std::fs;
use std::os::unix::fs::MetadataExt;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::mpsc::{Receiver, channel};

use fs_device::fuse::wire::{flag, opcode};
use ipc::limits::MAX_FS_WAITERS;
use libc::{EEXIST, ENOENT, O_APPEND, O_EXCL, O_RDWR, O_WRONLY};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use raw::{Body, Client, u64_at};

/// The process inside of the jail that `outside` waits for, if there is one at this moment.
fn serving(outside: u32) -> Option<Pid> {
    let path = format!("/proc/{outside}/task/{outside}/children");
    let pid = fs::read_to_string(path).ok()?.trim().parse().ok()?;
    Some(Pid::from_raw(pid))
}

fn kill_serving(client: &Client) {
    kill(serving(client.child.id()).unwrap(), Signal::SIGKILL).unwrap();
}

fn names(entries: &[u8]) -> (Vec<String>, u64) {
    let (mut found, mut at, mut offset) = (Vec::new(), 0, 0);
    while at < entries.len() {
        offset = u64_at(entries, at + 8);
        let len = u64_at(entries, at + 16) as u32 as usize;
        found.push(String::from_utf8(entries[at + 24..at + 24 + len].to_vec()).unwrap());
        at = (at + 24 + len).next_multiple_of(8);
    }
    (found, offset)
}

#[test]
fn open_files_folders_and_locks_go_on() {
    let dir = tempfile::tempdir().unwrap();
    // More than is read of a folder at once, so that some deaths come while more of it is being read.
    for n in 0..3000 {
        fs::write(dir.path().join(format!("file-{n}")), b"").unwrap();
    }
    let options = ["-log-level", "debug", "--flock", "--posix-lock", "--xattr"];
    let mut client = Client::start(dir.path(), &options);
    let (node, fh) = client.create(1, "kept", O_RDWR).unwrap();
    assert_eq!(client.write(node, fh, 0, b"before").unwrap(), 6);
    // Removed: only the open file is left of it.
    let gone = client.create(1, "gone", O_RDWR).unwrap();
    client.write(gone.0, gone.1, 0, b"still here").unwrap();
    client
        .call(opcode::UNLINK, 1, Body::new().name("gone"))
        .unwrap();
    let opened = client
        .call(opcode::OPENDIR, 1, Body::new().zeros(8))
        .unwrap();
    let folder = u64_at(&opened, 0);
    let read = |client: &mut Client, offset| {
        let body = Body::new().u64(folder).u64(offset).u32(8000).zeros(20);
        names(&client.call(opcode::READDIR, 1, body).unwrap())
    };
    let (mut seen, mut offset) = read(&mut client, 0);
    let lock = |client: &mut Client, kind: i32, owner: u64, opcode| {
        let body = Body::new().u64(fh).u64(owner).u64(0).u64(99);
        client.call(opcode, node, body.u32(kind as u32).u32(1).u32(0).u32(0))
    };
    lock(&mut client, libc::F_WRLCK, 7, opcode::SETLK).unwrap();

    kill_serving(&client);
    assert_eq!(client.read(node, fh, 0, 100).unwrap(), b"before");
    assert_eq!(client.read(gone.0, gone.1, 0, 100).unwrap(), b"still here");
    client.write(node, fh, 6, b" and after").unwrap();
    assert_eq!(client.lookup(1, "kept").unwrap(), node, "the same inode");
    // Somebody else's lock on the same bytes is refused still, and the owner's is not in its own way.
    let other = lock(&mut client, libc::F_WRLCK, 8, opcode::SETLK);
    assert_eq!(other.unwrap_err(), libc::EAGAIN);
    lock(&mut client, libc::F_WRLCK, 7, opcode::SETLK).unwrap();

    loop {
        kill_serving(&client);
        let (more, next) = read(&mut client, offset);
        if more.is_empty() {
            break;
        }
        seen.extend(more);
        offset = next;
    }
    seen.sort_unstable();
    let count = seen.len();
    seen.dedup();
    assert_eq!((seen.len(), count), (3003, 3003), "each name once");
    client.release(node, fh).unwrap();
    assert!(client.release(node, fh).is_err());
    assert!(client.finish().success());
    assert_eq!(
        fs::read(dir.path().join("kept")).unwrap(),
        b"before and after"
    );
}

#[test]
fn who_waits_for_a_lock_gets_it_when_it_is_free_and_keeps_nobody_waiting() {
    let dir = tempfile::tempdir().unwrap();
    let options = ["-log-level", "debug", "--flock", "--posix-lock"];
    let mut client = Client::start(dir.path(), &options);
    let (node, fh) = client.create(1, "file", O_RDWR).unwrap();
    let range = |owner: u64, kind: i32| {
        let body = Body::new().u64(fh).u64(owner).u64(0).u64(99);
        body.u32(kind as u32).u32(1).u64(0)
    };
    let (lock, unlock) = (libc::F_WRLCK, libc::F_UNLCK);
    // Requests are taken in their order: with an answer to this one, those before it have been looked at. Its own answer is the
    // next one, so none of those before it has had any.
    let pass = |client: &mut Client| assert_eq!(client.lookup(1, "file").unwrap(), node);
    let both = |client: &mut Client, a: (u64, u16), b: (u64, u16)| {
        let mut heads = [client.answered().0, client.answered().0];
        heads.sort_unstable();
        let mut wanted = [a.1, b.1];
        wanted.sort_unstable();
        assert_eq!(heads, wanted);
    };
    client.call(opcode::SETLK, node, range(7, lock)).unwrap();
    let waits = client.begin(opcode::SETLKW, node, range(8, lock));
    pass(&mut client);
    let gives = client.begin(opcode::SETLK, node, range(7, unlock));
    both(&mut client, waits, gives);
    client.outcome(waits.0).unwrap();
    let taken = client.call(opcode::SETLK, node, range(7, lock));
    assert_eq!(taken.unwrap_err(), libc::EAGAIN, "8 has it");

    // Whoever serves then waits as well.
    let waits = client.begin(opcode::SETLKW, node, range(9, lock));
    pass(&mut client);
    kill_serving(&client);
    pass(&mut client);
    let gives = client.begin(opcode::SETLK, node, range(8, unlock));
    both(&mut client, waits, gives);
    client.outcome(waits.0).unwrap();

    // The guest does not want it any more.
    let waits = client.begin(opcode::SETLKW, node, range(10, lock));
    pass(&mut client);
    let nobody = client.begin(opcode::INTERRUPT, 0, Body::new().u64(waits.0 + 1000));
    assert_eq!(client.answered().0, nobody.1);
    pass(&mut client);
    let stops = client.begin(opcode::INTERRUPT, 0, Body::new().u64(waits.0));
    both(&mut client, waits, stops);
    assert_eq!(client.outcome(waits.0).unwrap_err(), libc::EINTR);

    // The host gives a lock back, of which nobody tells.
    let host = fs::File::open(dir.path().join("file")).unwrap();
    host.lock().unwrap();
    let whole = Body::new().u64(fh).u64(1).u64(0).u64(i64::MAX as u64);
    let whole = whole.u32(lock as u32).u32(1).u32(flag::LK_FLOCK).u32(0);
    let waits = client.begin(opcode::SETLKW, node, whole);
    pass(&mut client);
    host.unlock().unwrap();
    assert_eq!(client.answered().0, waits.1);
    client.outcome(waits.0).unwrap();
    assert!(host.try_lock().is_err());

    // So many and no more; and none of them waits beyond the end of the queue.
    let many: Vec<_> = (0..MAX_FS_WAITERS as u64)
        .map(|n| client.begin(opcode::SETLKW, node, range(100 + n, lock)))
        .collect();
    pass(&mut client);
    let more = client.call(opcode::SETLKW, node, range(99, lock));
    assert_eq!(more.unwrap_err(), libc::ENOLCK);
    client.front.stop(&client.queue);
    for _ in &many {
        client.queue.try_used(&client.front.memory).unwrap();
    }
    for (unique, _) in many {
        assert_eq!(client.outcome(unique).unwrap_err(), libc::EAGAIN);
    }
    assert!(client.finish().success());
}

/// Kills the serving process a moment after each word that comes, until the words end.
fn killer(outside: u32, words: &Receiver<u32>, kills: &AtomicU32) {
    while let Ok(spins) = words.recv() {
        for _ in 0..spins {
            std::hint::spin_loop();
        }
        if let Some(pid) = serving(outside)
            && kill(pid, Signal::SIGKILL).is_ok()
        {
            kills.fetch_add(1, Ordering::Relaxed);
        }
    }
}

/// Numbers that look random, the same in each run.
struct Numbers(u64);

impl Numbers {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }
}

/// What the tree must have: name to contents, `None` for a folder.
type Model = BTreeMap<String, Option<Vec<u8>>>;

/// One request whose second execution would show, and what it does to the model.
fn change(client: &mut Client, model: &mut Model, random: &mut Numbers, log: (u64, u64), n: u32) {
    let name = format!("n{n}");
    let some = |model: &Model, random: &mut Numbers| {
        let files: Vec<_> = model
            .iter()
            .filter(|(name, data)| data.is_some() && name.as_str() != "log")
            .map(|(name, _)| name.clone())
            .collect();
        let at = random.next() as usize % files.len().max(1);
        files.get(at).cloned()
    };
    match random.next() % 8 {
        0 => {
            let (node, fh) = client.create(1, &name, O_RDWR | O_EXCL).unwrap();
            client.write(node, fh, 0, name.as_bytes()).unwrap();
            client.release(node, fh).unwrap();
            client.forget(node, 1);
            let again = client.create(1, &name, O_RDWR | O_EXCL);
            assert_eq!(
                again.unwrap_err(),
                EEXIST,
                "{name} was there before this request"
            );
            model.insert(name.clone(), Some(name.into_bytes()));
        }
        1 => {
            let body = Body::new().u32(0o755).u32(0).name(&name);
            let made = client.call(opcode::MKDIR, 1, body).unwrap();
            client.forget(u64_at(&made, 0), 1);
            model.insert(name, None);
        }
        2 => {
            let Some(old) = some(model, random) else {
                return;
            };
            client
                .call(opcode::UNLINK, 1, Body::new().name(&old))
                .unwrap_or_else(|e| panic!("unlink {old}: {e}"));
            assert_eq!(client.lookup(1, &old).unwrap_err(), ENOENT);
            model.remove(&old);
        }
        3 => {
            let Some(old) = some(model, random) else {
                return;
            };
            let body = Body::new().u64(1).name(&old).name(&name);
            client
                .call(opcode::RENAME, 1, body)
                .unwrap_or_else(|e| panic!("rename {old}: {e}"));
            let data = model.remove(&old).unwrap();
            model.insert(name, data);
        }
        4 => {
            let (Some(a), Some(b)) = (some(model, random), some(model, random)) else {
                return;
            };
            // RENAME_EXCHANGE
            let body = Body::new().u64(1).u32(2).u32(0).name(&a).name(&b);
            client.call(opcode::RENAME2, 1, body).unwrap();
            let (of_a, of_b) = (model[&a].clone(), model[&b].clone());
            model.insert(a, of_b);
            model.insert(b, of_a);
        }
        5 => {
            let Some(old) = some(model, random) else {
                return;
            };
            let node = client.lookup(1, &old).unwrap();
            let body = Body::new().u64(node).name(&name);
            client.call(opcode::LINK, 1, body).unwrap();
            client.forget(node, 2);
            let data = model[&old].clone();
            model.insert(name, data);
        }
        6 => {
            let body = Body::new().name(&name).name("target");
            let made = client.call(opcode::SYMLINK, 1, body).unwrap();
            client.forget(u64_at(&made, 0), 1);
            client
                .call(opcode::UNLINK, 1, Body::new().name(&name))
                .unwrap();
        }
        _ => {
            // The offset is a lie, as it is when two guests append to the same file.
            let line = format!("line {n}\n").into_bytes();
            assert_eq!(
                client.write(log.0, log.1, 0, &line).unwrap() as usize,
                line.len()
            );
            model.get_mut("log").unwrap().as_mut().unwrap().extend(line);
        }
    }
}

fn kill_loop(requests: u32, kill_each: u32) -> (u32, u32) {
    let dir = tempfile::tempdir().unwrap();
    let mut client = Client::start(dir.path(), &["-log-level", "error"]);
    let log = client.create(1, "log", O_WRONLY | O_APPEND).unwrap();
    let mut model = Model::from([("log".to_owned(), Some(Vec::new()))]);
    let kills = AtomicU32::new(0);
    let outside = client.child.id();
    std::thread::scope(|scope| {
        let (tell, words) = channel();
        let count = &kills;
        scope.spawn(move || killer(outside, &words, count));
        let mut random = Numbers(0x5eed_1234_5678_9abc);
        for n in 0..requests {
            if n % kill_each == 0 {
                tell.send(random.next() as u32 % 20_000).unwrap();
            }
            change(&mut client, &mut model, &mut random, log, n);
        }
        drop(tell);
    });
    // Every lookup was counted as often as the guest was told of it: forgetting that often makes the inode go.
    let (node, fh) = log;
    client.release(node, fh).unwrap();
    client.forget(node, 1);
    let stale = client.call(opcode::GETATTR, node, Body::new().zeros(16));
    assert_eq!(stale.unwrap_err(), libc::ESTALE);
    let open = fs::read_dir(format!("/proc/{outside}/fd")).unwrap().count();
    assert!(client.finish().success());
    let mut found = Model::new();
    for entry in fs::read_dir(dir.path()).unwrap().map(Result::unwrap) {
        let folder = entry.metadata().unwrap().mode() & libc::S_IFMT == libc::S_IFDIR;
        let data = (!folder).then(|| fs::read(entry.path()).unwrap());
        found.insert(entry.file_name().into_string().unwrap(), data);
    }
    assert_eq!(
        found.keys().collect::<Vec<_>>(),
        model.keys().collect::<Vec<_>>()
    );
    for (name, data) in &model {
        assert!(found[name] == *data, "{name} differs");
    }
    (kills.into_inner(), u32::try_from(open).unwrap())
}

#[test]
fn a_kill_loop_under_load_changes_no_byte_and_no_count() {
    // More with SURVIVAL_REQUESTS, for a long run.
    let requests = std::env::var("SURVIVAL_REQUESTS")
        .ok()
        .and_then(|text| text.parse().ok())
        .unwrap_or(3_000);
    let (kills, open) = kill_loop(requests, 30);
    println!("{kills} kills in {requests} requests");
    assert!(kills > requests / 60, "{kills} kills only");
    assert!(open < 40, "{open} descriptors are open at the end");
}

/// Bytes that tell which file and which round they are of, anew in each place.
fn pattern(file: u64, round: u64, len: usize) -> Vec<u8> {
    let mut numbers = Numbers(0x9e37_79b9 + (file << 32) + round);
    let words = (0..len.div_ceil(8)).flat_map(|_| numbers.next().to_le_bytes());
    words.take(len).collect()
}

#[test]
fn large_requests_that_several_threads_are_at_are_done_once_whoever_dies() {
    const FILES: u64 = 4;
    const SIZE: u32 = 300 << 10;
    let rounds = std::env::var("SURVIVAL_REQUESTS")
        .ok()
        .and_then(|text| text.parse().ok())
        .map_or(120, |requests: u64| requests / 8);
    let dir = tempfile::tempdir().unwrap();
    let options = ["-log-level", "error", "--thread-pool-size=3"];
    let mut client = Client::start(dir.path(), &options);
    let files: Vec<_> = (0..FILES)
        .map(|file| {
            let flags = O_RDWR | O_EXCL;
            client.create(1, &format!("file-{file}"), flags).unwrap()
        })
        .collect();
    let kills = AtomicU32::new(0);
    let outside = client.child.id();
    let place = |round: u64| round % 2 * u64::from(SIZE);
    std::thread::scope(|scope| {
        let (tell, words) = channel();
        let count = &kills;
        scope.spawn(move || killer(outside, &words, count));
        let mut random = Numbers(0x5eed_4321_8765_cba9);
        for round in 1..=rounds {
            // Each file's one half is written while what the last round wrote to the other is read.
            let mut begun = BTreeMap::new();
            for (slot, &(node, fh)) in (0..).zip(&files) {
                let data = pattern(slot, round, SIZE as usize);
                client.front.memory.write(Client::large_at(slot), &data);
                let body = Body::new().u64(fh).u64(place(round)).u32(SIZE).zeros(20);
                let (unique, head) = client.begin_large(opcode::WRITE, node, body, slot, SIZE);
                begun.insert(head, (slot, unique));
                let room = Client::large_at(FILES + slot);
                client.front.memory.write(room, &vec![0; SIZE as usize]);
                let body = Body::new().u64(fh).u64(place(round - 1)).u32(SIZE);
                let body = body.zeros(20);
                let slot = FILES + slot;
                let (unique, head) = client.begin_large(opcode::READ, node, body, slot, SIZE);
                begun.insert(head, (slot, unique));
                if round % 3 == 0 && slot == FILES + 1 {
                    tell.send(random.next() as u32 % 100_000).unwrap();
                }
            }
            while !begun.is_empty() {
                let (head, used) = client.answered();
                let (slot, unique) = begun.remove(&head).expect("each is answered once");
                if slot < FILES {
                    assert_eq!(client.large_reply(slot, unique), Ok(SIZE));
                    assert_eq!(used, 24);
                    continue;
                }
                client.large_reply(slot, unique).unwrap();
                if round == 1 {
                    // Nothing is there yet, or what is being written.
                    continue;
                }
                assert_eq!(used, 16 + SIZE);
                let read = client
                    .front
                    .memory
                    .read(Client::large_at(slot), SIZE as usize);
                let file = slot - FILES;
                assert!(
                    read == pattern(file, round - 1, SIZE as usize),
                    "{file} in {round}"
                );
            }
        }
        drop(tell);
    });
    let kills = kills.into_inner();
    println!("{kills} kills in {rounds} rounds");
    assert!(u64::from(kills) > rounds / 6, "{kills} kills only");
    for (file, &(node, fh)) in (0..).zip(&files) {
        client.release(node, fh).unwrap();
        client.forget(node, 1);
        let found = fs::read(dir.path().join(format!("file-{file}"))).unwrap();
        for round in [rounds - 1, rounds] {
            let at = place(round) as usize;
            let part = &found[at..at + SIZE as usize];
            assert!(
                part == pattern(file, round, SIZE as usize),
                "{file} at {at}"
            );
        }
    }
    assert!(client.finish().success());
}

#[test]
fn a_file_is_closed_after_what_others_still_read_of_it() {
    let dir = tempfile::tempdir().unwrap();
    let size = 300u32 << 10;
    let data = pattern(1, 1, size as usize);
    fs::write(dir.path().join("file"), &data).unwrap();
    let options = ["-log-level", "error", "--thread-pool-size=3"];
    let mut client = Client::start(dir.path(), &options);
    let node = client.lookup(1, "file").unwrap();
    for _ in 0..50 {
        let fh = client.open(node, libc::O_RDONLY).unwrap();
        let mut begun = BTreeMap::new();
        for slot in 0..8 {
            let body = Body::new().u64(fh).u64(0).u32(size).zeros(20);
            let (unique, head) = client.begin_large(opcode::READ, node, body, slot, size);
            begun.insert(head, (slot, unique));
        }
        // No guest does that before it has the answers; a hostile one gets what it asked for first, and no other file's bytes.
        let release = client.begin(opcode::RELEASE, node, Body::new().u64(fh).zeros(16));
        let mut released = false;
        for _ in 0..9 {
            let (head, used) = client.answered();
            if head == release.1 {
                released = true;
                continue;
            }
            let (slot, unique) = begun.remove(&head).unwrap();
            client.large_reply(slot, unique).unwrap();
            assert_eq!(used, 16 + size);
            let read = client
                .front
                .memory
                .read(Client::large_at(slot), size as usize);
            assert!(read == data);
        }
        assert!(released);
        client.outcome(release.0).unwrap();
    }
    assert!(client.finish().success());
}
