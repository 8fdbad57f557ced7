//! # The loads
//!
//! **Job.** What is asked of each daemon: reading and writing one file by three sizes, in and out of order, by one job and by
//! four; making, finding, looking at, listing and removing small files.
//! **Who is not trusted.** Nobody. **Why this way.** The requests are those that Linux sends for such loads.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::time::Instant;

use fs_device::fuse::wire::opcode;

use crate::session::{Body, SLOTS, Session, u64_at};

/// Bytes of the file that is read and written: it fits the host's page cache.
pub(crate) const FILE_SIZE: u64 = 64 << 20;
/// Name of that file.
pub(crate) const DATA_FILE: &str = "data";
/// Name of the load that needs no small files before it.
pub(crate) const CREATE: &str = "create+release";

/// What the host needs for the same reads without any daemon.
pub(crate) struct Floor {
    pub(crate) size: u32,
    pub(crate) count: usize,
}

impl Floor {
    /// Reads per second of a plain loop over the file in `folder`, into the same amount of memory.
    pub(crate) fn measure(&self, folder: &Path) -> f64 {
        let file = File::open(folder.join(DATA_FILE)).unwrap();
        let size = self.size as usize;
        let mut buffer = vec![1u8; size * SLOTS];
        let blocks = FILE_SIZE / u64::from(self.size);
        let start = Instant::now();
        for n in 0..self.count {
            let slot = n % SLOTS * size;
            let place = n as u64 % blocks * u64::from(self.size);
            file.read_exact_at(&mut buffer[slot..slot + size], place)
                .unwrap();
        }
        self.count as f64 / start.elapsed().as_secs_f64()
    }
}

/// What a load does for one of its operations.
pub(crate) type Run = Box<dyn Fn(&mut Session, usize)>;

pub(crate) struct Load {
    pub(crate) name: String,
    /// Operations.
    pub(crate) count: usize,
    /// Works on small files.
    pub(crate) small: bool,
    pub(crate) floor: Option<Floor>,
    pub(crate) run: Run,
}

fn open(session: &mut Session, name: &str) -> (u64, u64) {
    let entry = session.call((opcode::LOOKUP, 1, Body::default().name(name), 0, 144));
    let node = u64_at(&entry, 0);
    let flags = Body::default().u32(libc::O_RDWR as u32).u32(0);
    let opened = session.call((opcode::OPEN, node, flags, 0, 32));
    (node, u64_at(&opened, 0))
}

pub(crate) fn all(small_files: usize) -> Vec<Load> {
    let mut loads = Vec::new();
    for (size, label, count) in [
        (4096u32, "4k", 30_000),
        (65536, "64k", 20_000),
        (1 << 20, "1M", 3_000),
    ] {
        for (write, random) in [(false, false), (false, true), (true, false), (true, true)] {
            for depth in [1, SLOTS] {
                let kind = if write { "write" } else { "read" };
                let order = if random { "rand" } else { "seq" };
                loads.push(Load {
                    name: format!("{order} {kind} {label} x{depth}"),
                    count,
                    small: false,
                    floor: (!write && !random).then_some(Floor { size, count }),
                    run: Box::new(move |session, count| {
                        let (node, fh) = open(session, DATA_FILE);
                        let blocks = FILE_SIZE / u64::from(size);
                        session.run(count, depth, |n| {
                            let n = n as u64;
                            // An odd multiplier visits every block of a power of two once.
                            let block = if random {
                                n.wrapping_mul(0x9e37_79b1)
                            } else {
                                n
                            } % blocks;
                            let body = Body::default()
                                .u64(fh)
                                .u64(block * u64::from(size))
                                .u32(size);
                            let body = body.u32(0).u64(0).u64(0);
                            if write {
                                (opcode::WRITE, node, body, size, 24)
                            } else {
                                (opcode::READ, node, body, 0, 16 + size)
                            }
                        });
                    }),
                });
            }
        }
    }
    let meta = |name: &str, run: Run| Load {
        name: name.to_owned(),
        count: small_files,
        small: true,
        floor: None,
        run,
    };
    let name = |n: usize| Body::default().name(&format!("small-{n}"));
    loads.push(meta(
        CREATE,
        Box::new(move |session, count| {
            for n in 0..count {
                let flags = libc::O_RDWR | libc::O_CREAT | libc::O_EXCL;
                let mut body = Body::default()
                    .u32(flags as u32)
                    .u32(0o100_644)
                    .u32(0)
                    .u32(0);
                body.0.extend(name(n).0);
                let made = session.call((opcode::CREATE, 1, body, 0, 160));
                let release = Body::default().u64(u64_at(&made, 128)).u64(0).u64(0);
                session.call((opcode::RELEASE, u64_at(&made, 0), release, 0, 16));
            }
        }),
    ));
    loads.push(meta(
        "lookup (first)",
        Box::new(move |session, count| {
            session.run(count, 1, |n| (opcode::LOOKUP, 1, name(n), 0, 144));
        }),
    ));
    loads.push(meta(
        "lookup (again)",
        Box::new(move |session, count| {
            session.run(count, 1, |n| (opcode::LOOKUP, 1, name(n % 100), 0, 144));
        }),
    ));
    loads.push(meta(
        "getattr",
        Box::new(move |session, count| {
            let entry = session.call((opcode::LOOKUP, 1, name(0), 0, 144));
            let node = u64_at(&entry, 0);
            let body = Body::default().u64(0).u64(0);
            session.run(count, 1, |_| (opcode::GETATTR, node, body.clone(), 0, 120));
        }),
    ));
    loads.push(meta(
        "readdirplus (entries)",
        Box::new(move |session, _| {
            let opened = session.call((opcode::OPENDIR, 1, Body::default().u64(0), 0, 32));
            let (fh, mut offset) = (u64_at(&opened, 0), 0);
            loop {
                let body = Body::default()
                    .u64(fh)
                    .u64(offset)
                    .u32(32768)
                    .u32(0)
                    .u64(0)
                    .u64(0);
                let reply = session.call((opcode::READDIRPLUS, 1, body, 0, 16 + 32768));
                let mut at = 0;
                while at < reply.len() {
                    offset = u64_at(&reply, at + 136);
                    let len = u64_at(&reply, at + 144) as u32 as usize;
                    at = (at + 152 + len).next_multiple_of(8);
                }
                if reply.is_empty() {
                    break;
                }
            }
        }),
    ));
    loads.push(meta(
        "lookup+unlink",
        Box::new(move |session, count| {
            // As a guest does; virtiofsd removes no name that was not looked up.
            session.run(2 * count, 1, |n| match n % 2 {
                0 => (opcode::LOOKUP, 1, name(n / 2), 0, 144),
                _ => (opcode::UNLINK, 1, name(n / 2), 0, 16),
            });
        }),
    ));
    loads
}
