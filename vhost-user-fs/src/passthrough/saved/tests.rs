//! A guest's session, saved and gone on from, here and elsewhere, and forged.

use std::fs::{self, File};
use std::os::unix::fs::{OpenOptionsExt, symlink};
use std::path::Path;

use super::*;
use crate::fuse::wire::{InHeader, init};
use crate::fuse::{Body, Request};
use crate::passthrough::{Config, Origin, OwnFds, Store};

fn path_only(path: &Path) -> OwnedFd {
    let file = File::options()
        .read(true)
        .custom_flags(libc::O_PATH)
        .open(path);
    file.unwrap().into()
}

fn shared(tree: &Path, config: Config) -> Passthrough {
    let own = OwnFds::new(path_only(Path::new("/proc/self/fd")));
    let store = Store::new(config.descriptors).unwrap();
    Passthrough::new(path_only(tree), own, store, config).unwrap()
}

fn ask(tree: &mut Passthrough, nodeid: u64, body: Body<'_>) -> Result<Vec<u8>, Errno> {
    let header = InHeader {
        len: 0,
        opcode: 1,
        unique: 1,
        nodeid,
        uid: 0,
        gid: 0,
    };
    tree.begin(Origin { queue: 1, head: 0 }, &header, false);
    let mut reply = Vec::new();
    let result = tree.serve(&Request { header, body }, &mut reply, 1 << 16);
    tree.end();
    result.map(|_| reply)
}

fn word(reply: &[u8]) -> u64 {
    u64::from_ne_bytes(*reply.first_chunk().unwrap())
}

fn look(tree: &mut Passthrough, parent: u64, name: &str) -> u64 {
    let name = CString::new(name).unwrap();
    let name = Name::new(&name).unwrap();
    word(&ask(tree, parent, Body::Lookup { name }).unwrap())
}

fn open(tree: &mut Passthrough, node: u64, flags: i32) -> u64 {
    let body = Body::Open {
        flags: flags.cast_unsigned(),
        open_flags: 0,
    };
    word(&ask(tree, node, body).unwrap())
}

fn attributes(tree: &mut Passthrough, node: u64) -> Result<Vec<u8>, Errno> {
    ask(tree, node, Body::GetAttr { fh: None })
}

fn session(tree: &mut Passthrough) {
    let body = Body::Init {
        major: 7,
        minor: 38,
        max_readahead: 4096,
        flags: init::BIG_WRITES | init::MAX_PAGES,
    };
    ask(tree, 0, body).unwrap();
}

/// A tree, and a guest that knows some of it: two files in a folder, one of them removed, all open.
struct Guest {
    dir: tempfile::TempDir,
    tree: Passthrough,
    folder: u64,
    kept: u64,
    gone: u64,
    kept_open: u64,
    gone_open: u64,
    folder_open: u64,
}

impl Guest {
    fn new(config: Config) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let at = dir.path().join("tree");
        fs::create_dir_all(at.join("folder")).unwrap();
        fs::write(at.join("folder/kept"), "contents").unwrap();
        fs::write(at.join("folder/gone"), "contents").unwrap();
        let mut tree = shared(&at, config);
        session(&mut tree);
        let folder = look(&mut tree, ROOT_ID, "folder");
        let kept = look(&mut tree, folder, "kept");
        let gone = look(&mut tree, folder, "gone");
        let kept_open = open(&mut tree, kept, libc::O_RDWR | libc::O_APPEND);
        let gone_open = open(&mut tree, gone, libc::O_RDONLY);
        let folder_open = word(&ask(&mut tree, folder, Body::OpenDir { flags: 0 }).unwrap());
        fs::remove_file(at.join("folder/gone")).unwrap();
        Self {
            dir,
            tree,
            folder,
            kept,
            gone,
            kept_open,
            gone_open,
            folder_open,
        }
    }

    fn at(&self) -> std::path::PathBuf {
        self.dir.path().join("tree")
    }

    fn saved(&mut self) -> Saved {
        let bytes = self.tree.save().unwrap();
        decode_within::<MAX_DEVICE_STATE, _>(&bytes).unwrap()
    }

    #[track_caller]
    fn goes_on_in(&self, tree: &mut Passthrough) {
        attributes(tree, self.folder).unwrap();
        attributes(tree, self.kept).unwrap();
        assert_eq!(attributes(tree, self.gone).unwrap_err(), Errno::ESTALE);
        let (file, append) = tree.handles.file_to_write(self.kept_open).unwrap();
        assert!(append);
        assert_eq!(sys::stat(file).unwrap().stx_size, 8);
        assert_eq!(sys::write_at(file, b"C", 0).unwrap(), 1);
        assert_eq!(tree.readable(self.gone_open).unwrap_err(), Errno::ESTALE);
        assert_eq!(tree.writable(self.gone_open, 0).unwrap_err(), Errno::ESTALE);
        let read = Body::ReadDir {
            fh: self.folder_open,
            offset: 0,
            size: 4096,
        };
        assert!(!ask(tree, self.folder, read).unwrap().is_empty());
        // The folder's numbers are looked up and forgotten as if nothing had been.
        assert_eq!(look(tree, ROOT_ID, "folder"), self.folder);
        let forget = |nlookup| Body::Forget { nlookup };
        ask(tree, self.kept, forget(1)).unwrap();
        assert_eq!(attributes(tree, self.kept).unwrap_err(), Errno::ESTALE);
        ask(tree, self.gone, forget(1)).unwrap();
        let release = Body::Release {
            fh: self.gone_open,
            release_flags: 0,
            lock_owner: 0,
        };
        ask(tree, self.gone, release).unwrap();
        assert_eq!(tree.readable(self.gone_open).unwrap_err(), Errno::EBADF);
    }
}

#[test]
fn what_the_guest_holds_is_found_again_in_the_same_tree_and_in_a_copy() {
    let mut guest = Guest::new(Config::default());
    let bytes = guest.tree.save().unwrap();
    let mut same = shared(&guest.at(), Config::default());
    same.load(&bytes).unwrap();
    guest.goes_on_in(&mut same);
    let copy = guest.dir.path().join("copy");
    fs::create_dir_all(copy.join("folder")).unwrap();
    fs::write(copy.join("folder/kept"), "contents").unwrap();
    let mut other = shared(&copy, Config::default());
    other.load(&bytes).unwrap();
    guest.goes_on_in(&mut other);
    assert_eq!(fs::read(copy.join("folder/kept")).unwrap(), b"Contents");
}

#[test]
fn another_file_in_the_place_of_a_known_one_is_not_taken_for_it() {
    let mut guest = Guest::new(Config::default());
    let bytes = guest.tree.save().unwrap();
    let kept = guest.at().join("folder/kept");
    fs::write(guest.at().join("new"), "new").unwrap();
    fs::rename(guest.at().join("new"), &kept).unwrap();
    let mut same = shared(&guest.at(), Config::default());
    same.load(&bytes).unwrap();
    attributes(&mut same, guest.folder).unwrap();
    let stale = attributes(&mut same, guest.kept).unwrap_err();
    assert_eq!(stale, Errno::ESTALE);
    let stale = same.writable(guest.kept_open, 0).unwrap_err();
    assert_eq!(stale, Errno::ESTALE);
    // By its name there is the new one, under another number.
    assert_ne!(look(&mut same, guest.folder, "kept"), guest.kept);
}

#[test]
fn more_files_than_descriptors_are_opened_when_they_are_needed() {
    let config = Config {
        descriptors: 40,
        ..Config::default()
    };
    let dir = tempfile::tempdir().unwrap();
    fs::create_dir(dir.path().join("many")).unwrap();
    for n in 0..200 {
        fs::write(dir.path().join("many").join(n.to_string()), "").unwrap();
    }
    let mut tree = shared(dir.path(), config.clone());
    session(&mut tree);
    let many = look(&mut tree, ROOT_ID, "many");
    let nodes: Vec<u64> = (0..200)
        .map(|n| look(&mut tree, many, &n.to_string()))
        .collect();
    let bytes = tree.save().unwrap();
    let mut next = shared(dir.path(), config);
    next.load(&bytes).unwrap();
    assert!(next.held() <= 40, "{}", next.held());
    for node in nodes {
        attributes(&mut next, node).unwrap();
    }
}

#[test]
fn a_guest_without_a_session_goes_on_with_none() {
    let dir = tempfile::tempdir().unwrap();
    let bytes = shared(dir.path(), Config::default()).save().unwrap();
    let mut tree = shared(dir.path(), Config::default());
    tree.load(&bytes).unwrap();
    assert_eq!(attributes(&mut tree, ROOT_ID).unwrap_err(), Errno::ESTALE);
    session(&mut tree);
    attributes(&mut tree, ROOT_ID).unwrap();
}

#[test]
fn a_forged_state_leads_to_nothing_outside_of_the_tree() {
    let mut guest = Guest::new(Config::default());
    fs::write(guest.dir.path().join("secret"), "secret").unwrap();
    symlink("../secret", guest.at().join("link")).unwrap();
    symlink("..", guest.at().join("up")).unwrap();
    let absolute = guest.dir.path().join("secret");
    let absolute = absolute.to_str().unwrap();
    for path in [
        "../secret",
        "link",
        "up/secret",
        absolute,
        "folder/../../secret",
        "",
        ".",
        "folder//kept",
    ] {
        let mut saved = guest.saved();
        // Not the tree of before: path and kind decide.
        saved.root = (1, 1);
        saved.known[1].file.path = Some(path.into());
        saved.open[0].file.path = Some(path.into());
        let bytes = encode_within::<MAX_DEVICE_STATE, _>(&saved).unwrap();
        let mut tree = shared(&guest.at(), Config::default());
        tree.load(&bytes).unwrap();
        let error = attributes(&mut tree, guest.kept).unwrap_err();
        assert_eq!(error, Errno::ESTALE, "{path}");
        let error = tree.readable(guest.kept_open).unwrap_err();
        assert_eq!(error, Errno::ESTALE, "{path}");
    }
}

#[test]
fn what_no_table_has_is_refused() {
    let mut guest = Guest::new(Config::default());
    type Change = fn(&mut Saved);
    let changes: [(&str, Change); 13] = [
        ("version 9", |saved| saved.version = 9),
        ("FUSE flags", |saved| saved.agreed |= 1 << 62),
        ("without a session", |saved| saved.agreed = 0),
        ("more files", |saved| saved.inodes.0 = u32::MAX),
        ("more files", |saved| saved.inodes.0 = 0),
        ("more files", |saved| saved.handles.0 = u32::MAX),
        ("an inode", |saved| saved.known[0].id = ROOT_ID),
        ("an inode", |saved| saved.known[0].id = 0),
        ("an inode", |saved| saved.known[1].id = saved.known[0].id),
        ("an inode", |saved| saved.known[2].id += 100),
        ("an inode", |saved| saved.known[0].lookups = 0),
        ("an inode", |saved| saved.known[0].kind = 0o777),
        ("an open file", |saved| saved.open[0].number = 0),
    ];
    for (expected, change) in changes {
        let mut saved = guest.saved();
        change(&mut saved);
        let bytes = encode_within::<MAX_DEVICE_STATE, _>(&saved).unwrap();
        let mut tree = shared(&guest.at(), Config::default());
        let error = tree.load(&bytes).unwrap_err().to_string();
        assert!(error.contains(expected), "{expected}: {error}");
    }
    let bytes = guest.tree.save().unwrap();
    let mut tree = shared(&guest.at(), Config::default());
    for length in 0..bytes.len() {
        assert!(tree.load(&bytes[..length]).is_err(), "{length}");
    }
    assert!(tree.load(&[0xff; 4096]).is_err());
    // A folder that is read-only now gives no file for writing.
    let readonly = Config {
        readonly: true,
        ..Config::default()
    };
    let mut tree = shared(&guest.at(), readonly);
    tree.load(&bytes).unwrap();
    attributes(&mut tree, guest.kept).unwrap();
    assert_eq!(tree.readable(guest.kept_open).unwrap_err(), Errno::ESTALE);
    // Locks that hold on the host are known to the kernel alone.
    let locks = Config {
        flock: true,
        ..Config::default()
    };
    let mut tree = shared(&guest.at(), locks);
    assert!(matches!(tree.save(), Err(StateError::Locks)));
    assert!(matches!(tree.load(&bytes), Err(StateError::Locks)));
}
