//! # `fs`: FUSE requests over a queue to the shared folder
//!
//! The input is a session: requests with any body, header and place for the reply. Node ids and file handles that replies gave
//! can be used by later requests. The folder is in memory and made anew when a session changed it; Landlock keeps this whole
//! process out of everything else, so a way out of the folder is a crash of the assertion at the end, not of this machine.

#![allow(unsafe_code)] // a signal is ignored

use crate::bytes::Input;
use crate::chains::{AVAILABLE, DATA, REGIONS, TABLE, USED};
use crate::{once, planted};
use device_host::fuzzing::{Bench, QueueShape};
use fs_device::FsDevice;
use fs_device::fuse::wire::opcode;
use fs_device::passthrough::{Cache, Config, OwnFds, Passthrough, Store};
use std::fs::{self, File};
use std::os::unix::fs::{OpenOptionsExt, symlink};
use std::path::PathBuf;

const QUEUE: u16 = 1;
const REPLY: u64 = REGIONS[1].0;
const SECRET: &[u8] = b"nobody writes here";
/// What a guest may hold.
const DESCRIPTORS: usize = 256;
/// Requests of one session.
const MAX_REQUESTS: usize = 24;

struct Folder {
    bench: Bench<FsDevice>,
    tree: PathBuf,
    _dir: tempfile::TempDir,
}

/// Opened before Landlock: the folder may not be left by path, and has to be looked at from outside.
fn folder() -> Folder {
    let dir = tempfile::tempdir_in("/dev/shm").expect("a folder in memory");
    let tree = dir.path().join("tree");
    fs::create_dir(&tree).expect("a folder");
    fs::write(dir.path().join("secret"), SECRET).expect("a file");
    fill(&tree);
    confine(dir.path());
    let open = |path: &std::path::Path| {
        File::options()
            .read(true)
            .custom_flags(libc::O_PATH)
            .open(path)
            .expect("open")
    };
    let config = Config {
        cache: Cache::Auto,
        writeback: true,
        xattr: true,
        posix_lock: true,
        flock: true,
        announce_submounts: true,
        descriptors: DESCRIPTORS,
        ..Config::default()
    };
    let store = Store::new(DESCRIPTORS).expect("memory");
    let own = OwnFds::new(open(std::path::Path::new("/proc/self/fd")).into());
    let passthrough =
        Passthrough::new(open(&tree).into(), own, store, config).expect("a shared folder");
    let device = FsDevice::new(passthrough, "fuzz").expect("a tag");
    Folder {
        bench: Bench::new(device, &REGIONS),
        tree,
        _dir: dir,
    }
}

fn fill(tree: &std::path::Path) {
    fs::write(tree.join("file"), b"contents of a file").expect("a file");
    fs::create_dir(tree.join("dir")).expect("a folder");
    fs::write(tree.join("dir/inner"), b"x").expect("a file");
    symlink("../secret", tree.join("link")).expect("a link");
}

/// What `fill` made, as long as nobody changed it.
fn is_fresh(tree: &std::path::Path) -> bool {
    let names = |path: &std::path::Path| fs::read_dir(path).map_or(0, Iterator::count);
    names(tree) == 3
        && names(&tree.join("dir")) == 1
        && fs::metadata(tree.join("file")).is_ok_and(|file| file.len() == 18)
}

/// From here on this process changes files beneath `dir` only, apart from what libFuzzer keeps beneath its own folders.
fn confine(dir: &std::path::Path) {
    use landlock::{ABI, AccessFs, PathBeneath, PathFd, Ruleset, RulesetAttr, RulesetCreatedAttr};
    let abi = ABI::V3;
    let mut rules = Ruleset::default()
        .handle_access(AccessFs::from_write(abi))
        .and_then(Ruleset::create)
        .expect("Landlock");
    let own = std::env::var_os("FUZZ_FOLDER").map(PathBuf::from);
    for path in [Some(dir.to_path_buf()), own].into_iter().flatten() {
        let beneath = PathBeneath::new(
            PathFd::new(path).expect("a folder"),
            AccessFs::from_write(abi),
        );
        rules = rules.add_rule(beneath).expect("a rule");
    }
    rules.restrict_self().expect("Landlock");
    // A guest may make a file as large as it likes; this machine's memory is not the place.
    nix::sys::resource::setrlimit(nix::sys::resource::Resource::RLIMIT_FSIZE, 1 << 20, 1 << 20)
        .expect("setrlimit");
    // SAFETY: ignoring a signal runs no handler.
    unsafe {
        nix::sys::signal::signal(
            nix::sys::signal::Signal::SIGXFSZ,
            nix::sys::signal::SigHandler::SigIgn,
        )
    }
    .expect("signal");
}

/// Whether the reply starts with a node id, and where a file handle is.
fn learned(code: u32) -> (bool, Option<usize>) {
    match code {
        opcode::LOOKUP | opcode::MKNOD | opcode::MKDIR | opcode::SYMLINK | opcode::LINK => {
            (true, None)
        }
        opcode::CREATE | opcode::TMPFILE => (true, Some(128)),
        opcode::OPEN | opcode::OPENDIR => (false, Some(0)),
        _ => (false, None),
    }
}

/// One input.
pub fn run(data: &[u8]) {
    let mut input = Input(data);
    once!(Folder, folder(), |folder: &mut Folder| {
        let bench = &folder.bench;
        bench.reset();
        bench.accept(u64::MAX);
        bench.write(TABLE, &[0; 0x3000]);
        bench.start(&QueueShape {
            index: QUEUE,
            size: 16,
            descriptors: TABLE,
            available: AVAILABLE,
            used: USED,
            base: 0,
        });
        let mut nodes = vec![1u64];
        let mut handles = vec![0u64];
        let mut count = 0;
        while !input.is_empty() && count < MAX_REQUESTS {
            count += 1;
            let code = u32::from(input.byte());
            let node = input.byte();
            let mode = input.byte();
            let handle = handles[usize::from(input.byte()) % handles.len()];
            let len = usize::from(input.u16() % 0x2000);
            let mut body = input.take(len).to_vec();
            if mode & 1 != 0 && body.len() >= 8 {
                body[..8].copy_from_slice(&handle.to_ne_bytes());
            }
            let mut request = Vec::with_capacity(40 + body.len());
            let announced = (40 + body.len())
                .wrapping_add(usize::from(mode >> 1 & 3))
                .wrapping_sub(usize::from(mode >> 3 & 1));
            request.extend((announced as u32).to_ne_bytes());
            request.extend(code.to_ne_bytes());
            request.extend(u64::from(count as u32).to_ne_bytes());
            request.extend(
                nodes
                    .get(usize::from(node))
                    .copied()
                    .unwrap_or(u64::from(node))
                    .to_ne_bytes(),
            );
            request.extend([0; 16]);
            request.extend(body);
            let room = match mode >> 4 {
                0 => 0x8000,
                few => u32::from(few) * 12,
            };
            submit(bench, count as u16, &request, room);
            // On a busy machine a turn may end before it has begun.
            assert!(bench.turns(64), "a guest ended the process");
            let mut reply = [0; 16 + 136];
            bench.read(REPLY, &mut reply);
            let word = |at: usize| {
                u64::from_ne_bytes([0, 1, 2, 3, 4, 5, 6, 7].map(|byte| reply[at + byte]))
            };
            let used_len = used_length(bench, count as u16);
            assert!(used_len <= room, "{used_len} bytes of a reply in {room}");
            let good = used_len > 16 && word(0) >> 32 == 0;
            if used_len > 0 {
                assert_eq!(word(0) as u32, used_len, "a reply tells its length");
                assert_eq!(
                    word(8),
                    u64::from(count as u32),
                    "a reply tells its request"
                );
            }
            if good {
                let (is_node, handle_at) = learned(code);
                if is_node {
                    nodes.push(word(16));
                }
                if let Some(at) = handle_at {
                    handles.push(word(16 + at));
                }
                planted!(code == opcode::READDIRPLUS && used_len > 300);
            }
        }
        bench.reset();
        if !is_fresh(&folder.tree) {
            let _ = fs::remove_dir_all(&folder.tree);
            fs::create_dir_all(&folder.tree).expect("a folder");
            fill(&folder.tree);
        }
        // From outside of the tree, which no session may have touched.
        let secret = folder.tree.with_file_name("secret");
        assert_eq!(fs::read(secret).expect("the secret is there"), SECRET);
    });
}

/// Makes one request available: two descriptors, of which the first may be missing.
fn submit(bench: &Bench<FsDevice>, count: u16, request: &[u8], room: u32) {
    let mut table = Vec::new();
    for (address, len, flags, next) in [
        (DATA, request.len() as u32, 1u16, 1u16),
        (REPLY, room, 2, 0),
    ] {
        table.extend(address.to_le_bytes());
        table.extend(len.to_le_bytes());
        table.extend(flags.to_le_bytes());
        table.extend(next.to_le_bytes());
    }
    bench.write(TABLE, &table);
    bench.write(DATA, request);
    bench.write(REPLY, &[0; 152]);
    // Head 0, always.
    bench.write(AVAILABLE + 4 + 2 * u64::from((count - 1) % 16), &[0, 0]);
    bench.write(AVAILABLE + 2, &count.to_le_bytes());
    bench.kick(QUEUE);
}

/// Bytes that the device says it has written for request `count`.
fn used_length(bench: &Bench<FsDevice>, count: u16) -> u32 {
    let mut index = [0; 2];
    bench.read(USED + 2, &mut index);
    assert_eq!(
        u16::from_le_bytes(index),
        count,
        "each request is given back at once"
    );
    let mut element = [0; 8];
    bench.read(USED + 4 + 8 * u64::from((count - 1) % 16), &mut element);
    let [.., a, b, c, d] = element;
    u32::from_le_bytes([a, b, c, d])
}
