//! Inodes that have no descriptor, as the guest knows more than there may be: what the host renames, moves and removes meanwhile, and
//! deaths of the process that serves.

#![allow(clippy::unwrap_used)] // test code

mod raw;

use std::collections::HashSet;
use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use fs_device::fuse::wire::opcode;
use libc::{ESTALE, O_RDONLY};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use raw::{Body, Client, Reply, u32_at, u64_at};
use tests::trace::Tracee;

/// The process inside of the jail.
fn serving(client: &Client) -> Pid {
    let pid = client.child.id();
    let children = fs::read_to_string(format!("/proc/{pid}/task/{pid}/children")).unwrap();
    Pid::from_raw(children.trim().parse().unwrap())
}

/// Descriptors of the process inside whose file has this name.
fn descriptors(client: &Client, name: &str) -> usize {
    fs::read_dir(format!("/proc/{}/fd", serving(client)))
        .unwrap()
        .filter_map(|fd| fs::read_link(fd.unwrap().path()).ok())
        .filter(|target| target.file_name().is_some_and(|there| there == name))
        .count()
}

fn attributes(client: &mut Client, node: u64) -> Reply {
    client.call(opcode::GETATTR, node, Body::new().zeros(16))
}

fn ino(client: &mut Client, node: u64) -> Result<u64, i32> {
    attributes(client, node).map(|attr| u64_at(&attr, 16))
}

/// A folder that is shared with as few descriptors as there may be, and enough files to use them up.
struct Crowd {
    dir: tempfile::TempDir,
    client: Client,
    others: Vec<u64>,
}

impl Crowd {
    /// `make` prepares the folder.
    fn new(make: impl FnOnce(&Path)) -> Self {
        let dir = tempfile::tempdir().unwrap();
        make(dir.path());
        for n in 0..300 {
            fs::write(dir.path().join(format!("other-{n}")), "").unwrap();
        }
        let mut client = Client::start(dir.path(), &["-rlimit-nofile", "256"]);
        let others = (0..300)
            .map(|n| client.lookup(1, &format!("other-{n}")).unwrap())
            .collect();
        Self {
            dir,
            client,
            others,
        }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// Uses so many other files that this one's descriptor is given up.
    #[track_caller]
    fn without_descriptor(&mut self, name: &str, but: usize) {
        for node in &self.others {
            attributes(&mut self.client, *node).unwrap();
        }
        assert_eq!(descriptors(&self.client, name), but, "{name}");
    }
}

#[test]
fn what_the_guest_has_open_is_the_same_file_wherever_the_host_moves_it() {
    let mut crowd = Crowd::new(|dir| {
        fs::create_dir(dir.join("elsewhere")).unwrap();
        fs::write(dir.join("log"), "first\n").unwrap();
    });
    let node = crowd.client.lookup(1, "log").unwrap();
    let fh = crowd.client.open(node, O_RDONLY).unwrap();
    let there = fs::metadata(crowd.path("log")).unwrap().ino();
    crowd.without_descriptor("log", 1);

    // As logs are rotated.
    fs::rename(crowd.path("log"), crowd.path("elsewhere/log.1")).unwrap();
    fs::write(crowd.path("log"), "second, longer\n").unwrap();
    let attr = attributes(&mut crowd.client, node).unwrap();
    assert_eq!((u64_at(&attr, 16), u64_at(&attr, 24)), (there, 6));
    let again = crowd.client.open(node, O_RDONLY).unwrap();
    assert_eq!(crowd.client.read(node, again, 0, 100).unwrap(), b"first\n");
    let new = crowd.client.lookup(1, "log").unwrap();
    assert_ne!(new, node);

    // Removed, and another process serves by then.
    fs::remove_file(crowd.path("elsewhere/log.1")).unwrap();
    kill(serving(&crowd.client), Signal::SIGKILL).unwrap();
    let attr = attributes(&mut crowd.client, node).unwrap();
    assert_eq!((u64_at(&attr, 16), u32_at(&attr, 80)), (there, 0), "links");
    crowd.client.release(node, again).unwrap();
    assert_eq!(crowd.client.read(node, fh, 0, 100).unwrap(), b"first\n");
    crowd.client.assert_alive();
    assert!(crowd.client.finish().success());
}

#[test]
fn what_the_host_renamed_in_its_folder_is_found_and_what_it_took_away_is_stale() {
    let names = ["renamed", "removed", "replaced", "away"];
    let mut crowd = Crowd::new(|dir| {
        fs::create_dir_all(dir.join("folder/deep")).unwrap();
        fs::create_dir(dir.join("elsewhere")).unwrap();
        fs::write(dir.join("folder/deep/file"), "deep").unwrap();
        for name in names {
            fs::write(dir.join(name), name).unwrap();
        }
    });
    let [renamed, removed, replaced, away] =
        names.map(|name| crowd.client.lookup(1, name).unwrap());
    let folder = crowd.client.lookup(1, "folder").unwrap();
    let deep = crowd.client.lookup(folder, "deep").unwrap();
    let file = crowd.client.lookup(deep, "file").unwrap();
    let inos = [renamed, file, away].map(|node| ino(&mut crowd.client, node).unwrap());
    for name in names.into_iter().chain(["file"]) {
        crowd.without_descriptor(name, 0);
    }

    fs::rename(crowd.path("renamed"), crowd.path("another-name")).unwrap();
    // Something else has its name by now.
    fs::write(crowd.path("renamed"), "another").unwrap();
    fs::rename(crowd.path("folder/deep/file"), crowd.path("folder/deep/f")).unwrap();
    fs::rename(crowd.path("folder/deep"), crowd.path("folder/d")).unwrap();
    fs::rename(crowd.path("folder"), crowd.path("renamed-folder")).unwrap();
    fs::remove_file(crowd.path("removed")).unwrap();
    fs::remove_file(crowd.path("replaced")).unwrap();
    std::os::unix::fs::symlink("/etc/passwd", crowd.path("replaced")).unwrap();
    fs::rename(crowd.path("away"), crowd.path("elsewhere/away")).unwrap();

    let client = &mut crowd.client;
    assert_eq!(ino(client, renamed), Ok(inos[0]));
    let fh = client.open(renamed, O_RDONLY).unwrap();
    assert_eq!(client.read(renamed, fh, 0, 100).unwrap(), b"renamed");
    assert_eq!(ino(client, file), Ok(inos[1]));
    for node in [removed, replaced] {
        assert_eq!(ino(client, node), Err(ESTALE));
        assert_eq!(client.open(node, O_RDONLY), Err(ESTALE));
    }
    // In another folder it is not looked for; the guest finds it there, and it is the same.
    assert_eq!(ino(client, away), Err(ESTALE));
    let elsewhere = client.lookup(1, "elsewhere").unwrap();
    assert_eq!(client.lookup(elsewhere, "away"), Ok(away));
    assert_eq!(ino(client, away), Ok(inos[2]));

    // It is known where it was found, and gives its descriptor up like any other.
    client.release(renamed, fh).unwrap();
    crowd.without_descriptor("another-name", 0);
    assert_eq!(ino(&mut crowd.client, renamed), Ok(inos[0]));
    crowd.client.assert_alive();
    assert!(crowd.client.finish().success());
}

fn unlink(client: &mut Client, folder: u64, name: &str) {
    let body = Body::new().name(name);
    client.call(opcode::UNLINK, folder, body).unwrap();
}

#[test]
fn a_file_with_several_names_is_found_by_any_that_is_left() {
    const FILES: usize = 300;
    let folders = ["first", "second", "third"];
    let mut crowd = Crowd::new(|dir| {
        for folder in folders {
            fs::create_dir(dir.join(folder)).unwrap();
        }
        for n in 0..FILES {
            let name = dir.join(format!("first/{n}"));
            fs::write(&name, n.to_string()).unwrap();
            fs::hard_link(&name, dir.join(format!("second/{n}"))).unwrap();
        }
    });
    let client = &mut crowd.client;
    let [first, second, third] = folders.map(|name| client.lookup(1, name).unwrap());
    let mut nodes = Vec::new();
    for n in 0..FILES {
        let name = n.to_string();
        let node = client.lookup(first, &name).unwrap();
        assert_eq!(client.lookup(second, &name), Ok(node));
        // The guest gives it one more, and never looks for one again: it keeps what it knows (`--cache always`).
        let linked = client.call(opcode::LINK, third, Body::new().u64(node).name(&name));
        assert_eq!(u64_at(&linked.unwrap(), 0), node);
        nodes.push(node);
    }
    let all_are_there = |client: &mut Client, links: u32| {
        for (n, node) in nodes.iter().enumerate() {
            let attr = attributes(client, *node).unwrap_or_else(|e| panic!("{n}: {e}"));
            assert_eq!(u32_at(&attr, 80), links, "{n}");
            let fh = client.open(*node, O_RDONLY).unwrap();
            let data = client.read(*node, fh, 0, 100).unwrap();
            assert_eq!(data, n.to_string().as_bytes());
            client.release(*node, fh).unwrap();
        }
    };
    // The one that it saw last goes, by its own hand, and then one by the host's while there is no descriptor of most.
    for n in 0..FILES {
        unlink(client, third, &n.to_string());
    }
    all_are_there(client, 2);
    let all: HashSet<usize> = (0..FILES).collect();
    let open: HashSet<usize> = open_numbers(client).collect();
    assert!(open.len() < FILES / 2 + 100, "{}", open.len());
    for n in all.difference(&open) {
        fs::remove_file(crowd.dir.path().join(format!("second/{n}"))).unwrap();
    }
    let client = &mut crowd.client;
    for n in &open {
        unlink(client, second, &n.to_string());
    }
    all_are_there(client, 1);
    crowd.client.assert_alive();
    assert!(crowd.client.finish().success());
}

/// The files with a number as a name that the process inside has descriptors of.
fn open_numbers(client: &Client) -> impl Iterator<Item = usize> {
    let all = fs::read_dir(format!("/proc/{}/fd", serving(client))).unwrap();
    all.filter_map(|fd| fs::read_link(fd.unwrap().path()).ok())
        .filter_map(|target| target.file_name()?.to_str()?.parse().ok())
}

#[test]
fn as_many_folders_as_that_may_each_have_been_renamed_and_no_more() {
    // `LEVELS` of `passthrough/moved.rs`: the file and the folders above it.
    const LEVELS: usize = 16;
    for folders in [LEVELS - 1, LEVELS] {
        let name = |level: usize| format!("level-{level}");
        let mut path = PathBuf::new();
        let mut crowd = Crowd::new(|dir| {
            for n in 0..300 {
                fs::create_dir(dir.join(format!("folder-{n}"))).unwrap();
            }
            path.extend((0..folders).map(name));
            fs::create_dir_all(dir.join(&path)).unwrap();
            fs::write(dir.join(&path).join("file"), "found").unwrap();
        });
        let mut above = vec![1];
        for level in 0..folders {
            let parent = above[level];
            above.push(crowd.client.lookup(parent, &name(level)).unwrap());
        }
        let file = crowd.client.lookup(above[folders], "file").unwrap();
        // Folders give theirs up when there is nothing else.
        let folder = |n| crowd.client.lookup(1, &format!("folder-{n}")).unwrap();
        crowd.others = (0..300).map(folder).collect();
        for name in (0..folders).map(name).chain(["file".to_owned()]) {
            crowd.without_descriptor(&name, 0);
        }

        let renamed = |path: &Path| path.with_file_name("renamed");
        let path = crowd.dir.path().join(path);
        fs::rename(path.join("file"), path.join("renamed")).unwrap();
        for folder in path.ancestors().take(folders) {
            fs::rename(folder, renamed(folder)).unwrap();
        }
        let client = &mut crowd.client;
        let found = ino(client, file);
        assert_eq!(found.is_ok(), folders < LEVELS, "{found:?}");
        // Whoever goes there finds it in any case.
        for level in 0..folders {
            let parent = above[level];
            assert_eq!(client.lookup(parent, "renamed"), Ok(above[level + 1]));
        }
        assert_eq!(client.lookup(above[folders], "renamed"), Ok(file));
        let fh = client.open(file, O_RDONLY).unwrap();
        assert_eq!(client.read(file, fh, 0, 100).unwrap(), b"found");
        crowd.client.assert_alive();
        assert!(crowd.client.finish().success());
    }
}

/// How many; `cargo xtask test vhost-user-fs many_more --operations 1000000` for more.
fn many() -> usize {
    std::env::var("HOSTILE_OPERATIONS").map_or(5_000, |count| count.parse().unwrap())
}

#[test]
fn many_more_inodes_than_descriptors_are_each_the_same_file_whoever_serves() {
    let dir = tempfile::tempdir().unwrap();
    let name = |n: usize| format!("{}/{n}", n / 1000);
    for n in 0..many() {
        if n.is_multiple_of(1000) {
            fs::create_dir(dir.path().join((n / 1000).to_string())).unwrap();
        }
        fs::write(dir.path().join(name(n)), "").unwrap();
    }
    let mut client = Client::start(dir.path(), &["-rlimit-nofile", "1000"]);
    let mut nodes = Vec::new();
    for n in 0..many() {
        let folder = client.lookup(1, &(n / 1000).to_string()).unwrap();
        nodes.push(client.lookup(folder, &n.to_string()).unwrap());
    }
    // One in each hundred has another name by now, one is gone.
    for n in (0..many()).step_by(100) {
        let moved = dir.path().join(format!("{}-moved", name(n)));
        fs::rename(dir.path().join(name(n)), moved).unwrap();
        fs::remove_file(dir.path().join(name(n + 1))).unwrap();
    }
    let mut stale = 0;
    for (n, node) in nodes.iter().enumerate() {
        if n.is_multiple_of(many() / 5) {
            kill(serving(&client), Signal::SIGKILL).unwrap();
        }
        let there = match n % 100 {
            0 => format!("{}-moved", name(n)),
            _ => name(n),
        };
        let found = ino(&mut client, *node);
        if n % 100 == 1 {
            // One of the last that were looked up has its descriptor still, and is a file without a name.
            stale += usize::from(found == Err(ESTALE));
            continue;
        }
        let there = fs::metadata(dir.path().join(there)).unwrap().ino();
        assert_eq!(found, Ok(there), "{n}");
    }
    assert!(stale + 10 >= (many() - 1000) / 100, "{stale}");
    let open = fs::read_dir(format!("/proc/{}/fd", serving(&client)));
    let open = open.unwrap().count();
    assert!((500..=1000).contains(&open), "{open}");
    client.assert_alive();
    assert!(client.finish().success());
}

#[test]
fn a_guest_may_rename_more_files_than_there_are_descriptors() {
    let mut crowd = Crowd::new(|dir| fs::create_dir(dir.join("new")).unwrap());
    let client = &mut crowd.client;
    let new = client.lookup(1, "new").unwrap();
    let rename = |client: &mut Client, from: (u64, &str), to: (u64, &str), flags: u32| {
        let body = Body::new().u64(to.0).u32(flags).u32(0);
        client.call(opcode::RENAME2, from.0, body.name(from.1).name(to.1))
    };
    for n in 0..300 {
        let (from, to) = (format!("other-{n}"), format!("renamed-{n}"));
        rename(client, (1, &from), (new, &to), 0).unwrap();
    }
    // Two of them change places.
    let exchange = libc::RENAME_EXCHANGE;
    rename(client, (new, "renamed-0"), (new, "renamed-1"), exchange).unwrap();
    for n in 0..300 {
        let there = [1, 0].get(n).copied().unwrap_or(n);
        let there = crowd.dir.path().join(format!("new/renamed-{there}"));
        let there = fs::metadata(there).unwrap().ino();
        let node = crowd.others[n];
        assert_eq!(ino(client, node), Ok(there), "{n}");
        let fh = client.open(node, O_RDONLY).unwrap();
        client.release(node, fh).unwrap();
    }
    crowd.client.assert_alive();
    assert!(crowd.client.finish().success());
}

#[test]
fn an_exchange_that_was_done_when_its_process_died_is_known_and_not_done_again() {
    let mut crowd = Crowd::new(|dir| {
        for name in ["here", "there"] {
            fs::create_dir(dir.join(name)).unwrap();
        }
        fs::write(dir.join("here/one"), "first").unwrap();
        fs::write(dir.join("there/two"), "second").unwrap();
    });
    let client = &mut crowd.client;
    let [here, there] = ["here", "there"].map(|name| client.lookup(1, name).unwrap());
    let [one, two] =
        [(here, "one"), (there, "two")].map(|(parent, name)| client.lookup(parent, name).unwrap());
    for name in ["one", "two"] {
        crowd.without_descriptor(name, 0);
    }

    let client = &mut crowd.client;
    let mut stopped = Tracee::stop_behind_filter(serving(client).as_raw()).unwrap();
    let body = Body::new().u64(there).u32(libc::RENAME_EXCHANGE).u32(0);
    let (unique, head) = client.begin(opcode::RENAME2, here, body.name("one").name("two"));
    assert_eq!(stopped.run_through(libc::SYS_renameat2).unwrap(), 0);
    stopped.kill().unwrap();
    assert_eq!(client.answered().0, head);
    client.outcome(unique).unwrap();

    let read = |name: &str| fs::read_to_string(crowd.dir.path().join(name)).unwrap();
    assert_eq!([read("here/one"), read("there/two")], ["second", "first"]);
    // Each is known where it is now, and gives its descriptor up like any other.
    for name in ["one", "two"] {
        crowd.without_descriptor(name, 0);
    }
    let client = &mut crowd.client;
    for (node, data) in [(one, b"first".as_slice()), (two, b"second")] {
        let fh = client.open(node, O_RDONLY).unwrap();
        assert_eq!(client.read(node, fh, 0, 100).unwrap(), data);
        client.release(node, fh).unwrap();
    }
    crowd.client.assert_alive();
    assert!(crowd.client.finish().success());
}
