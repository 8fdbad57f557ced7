//! # The loads
//!
//! **Job.** What is asked of each daemon: reading and writing files by three sizes, in and out of order, by one job and by four,
//! each with a file of its own; making, finding, looking at, opening, listing and removing small files.
//! **Who is not trusted.** Nobody. **Why this way.** The requests are those that Linux sends for such loads. A load is done in
//! turns, so that all daemons can take theirs within the same fraction of a second.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use fs_device::fuse::wire::opcode;
use nix::sys::eventfd::{EfdFlags, EventFd};

use crate::session::{Body, Request, SLOTS, Session, u64_at};

/// Bytes of each file that is read and written: all of them fit the host's page cache.
pub(crate) const FILE_SIZE: u64 = 64 << 20;
/// Small files of one turn.
const TURN: usize = 500;
/// How many files a guest forgets with one request here.
const FORGOTTEN: usize = 14;

/// Name of the file of a job.
pub(crate) fn data_file(job: usize) -> String {
    format!("data-{job}")
}

/// Reads and writes of files that are there.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Data {
    pub(crate) size: u32,
    write: bool,
    random: bool,
    pub(crate) jobs: usize,
}

/// What is done with small files, in this order.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Small {
    Create,
    LookupFirst,
    LookupAgain,
    GetAttr,
    Open,
    ReadDir,
    ReadDirPlus,
    Unlink,
}

impl Small {
    /// Whether all files can be gone through again, since they are as they were.
    pub(crate) fn is_repeatable(self) -> bool {
        !matches!(self, Self::Create | Self::Unlink)
    }
}

#[derive(Debug, Clone, Copy)]
pub(crate) enum Work {
    Data(Data),
    Small(Small),
}

#[derive(Debug, Clone)]
pub(crate) struct Load {
    pub(crate) name: String,
    pub(crate) work: Work,
}

impl Load {
    /// Whether a plain loop does the same on the host.
    pub(crate) fn floor(&self) -> Option<Data> {
        match self.work {
            Work::Data(data) if !data.write && !data.random => Some(data),
            _ => None,
        }
    }
}

pub(crate) fn all() -> Vec<Load> {
    let mut loads = Vec::new();
    for (size, label) in [(4096, "4k"), (65536, "64k"), (1 << 20, "1M")] {
        for (write, random) in [(false, false), (false, true), (true, false), (true, true)] {
            for jobs in [1, SLOTS] {
                let kind = if write { "write" } else { "read" };
                let order = if random { "rand" } else { "seq" };
                loads.push(Load {
                    name: format!("{order} {kind} {label} x{jobs}"),
                    work: Work::Data(Data {
                        size,
                        write,
                        random,
                        jobs,
                    }),
                });
            }
        }
    }
    let small = [
        ("create+release", Small::Create),
        ("lookup (first)", Small::LookupFirst),
        ("lookup (again)", Small::LookupAgain),
        ("stat", Small::GetAttr),
        ("open+release", Small::Open),
        ("readdir (entries)", Small::ReadDir),
        ("readdirplus (entries)", Small::ReadDirPlus),
        ("unlink", Small::Unlink),
    ];
    for (name, work) in small {
        loads.push(Load {
            name: name.to_owned(),
            work: Work::Small(work),
        });
    }
    loads
}

/// Reads per second of a plain loop over the jobs' files, into the same amount of memory.
pub(crate) fn floor(source: &Path, data: Data, time: Duration) -> f64 {
    let files: Vec<File> = (0..data.jobs)
        .map(|job| File::open(source.join(data_file(job))).unwrap())
        .collect();
    let size = data.size as usize;
    let mut buffer = vec![1u8; size * SLOTS];
    let blocks = FILE_SIZE / u64::from(data.size);
    let start = Instant::now();
    let mut done = 0u64;
    loop {
        for (job, file) in files.iter().enumerate() {
            let place = done / data.jobs as u64 % blocks * u64::from(data.size);
            let slot = job * size;
            file.read_exact_at(&mut buffer[slot..slot + size], place)
                .unwrap();
            done += 1;
        }
        if start.elapsed() >= time {
            return done as f64 / start.elapsed().as_secs_f64();
        }
    }
}

/// The same by a thread that is asked for each read by memory, which it looks at all the time, and tells the end of each by an
/// event that the one who asked sleeps on: what the wake-ups of one job cost with any daemon.
pub(crate) fn asked(source: &Path, data: Data, time: Duration) -> f64 {
    let file = File::open(source.join(data_file(0))).unwrap();
    let size = data.size as usize;
    let blocks = FILE_SIZE / u64::from(data.size);
    let event = EventFd::from_flags(EfdFlags::EFD_CLOEXEC).unwrap();
    let (wanted, over) = (AtomicU64::new(0), AtomicBool::new(false));
    std::thread::scope(|scope| {
        scope.spawn(|| {
            let mut buffer = vec![1u8; size];
            for done in 0.. {
                while wanted.load(Ordering::Acquire) == done {
                    if over.load(Ordering::Acquire) {
                        return;
                    }
                    std::hint::spin_loop();
                }
                let place = done % blocks * u64::from(data.size);
                file.read_exact_at(&mut buffer, place).unwrap();
                event.write(1).unwrap();
            }
        });
        let (start, mut done) = (Instant::now(), 0);
        while start.elapsed() < time {
            wanted.fetch_add(1, Ordering::Release);
            event.read().unwrap();
            done += 1;
        }
        let rate = f64::from(done) / start.elapsed().as_secs_f64();
        over.store(true, Ordering::Release);
        rate
    })
}

/// One daemon with what it was asked so far.
pub(crate) struct Part {
    pub(crate) session: Session,
    /// Node and handle of each job's file.
    data: Vec<(u64, u64)>,
    /// This daemon's folder of small files.
    folder: u64,
    files: usize,
    /// What the guest knows of the small files.
    nodes: Vec<u64>,
    /// How often each was told to it.
    told: Vec<u64>,
    /// The next small file of the load at hand, or the blocks done of a file.
    next: usize,
}

impl Part {
    /// Opens everything; the folder `name` and the data files are there.
    pub(crate) fn new(mut session: Session, name: &str, files: usize) -> Self {
        let data = (0..SLOTS)
            .map(|job| {
                let node = session.lookup(1, &data_file(job));
                let flags = Body::default().u32(libc::O_RDWR as u32).u32(0);
                let opened = session.call(Request::new(opcode::OPEN, node, flags, 0, 32));
                (node, u64_at(&opened, 0))
            })
            .collect();
        let folder = session.lookup(1, name);
        Self {
            session,
            data,
            folder,
            files,
            nodes: vec![0; files],
            told: vec![0; files],
            next: 0,
        }
    }

    /// Another load begins.
    pub(crate) fn begin(&mut self, work: Work) {
        self.next = 0;
        if matches!(
            work,
            Work::Small(Small::LookupFirst | Small::ReadDirPlus | Small::Unlink)
        ) {
            self.forget();
        }
        // A guest looks a name up before it removes it, and virtiofsd removes no other.
        if matches!(work, Work::Small(Small::Unlink)) {
            while self.next < self.files {
                self.look_up();
            }
            self.next = 0;
        }
    }

    /// Whether the load at hand has no more turns.
    pub(crate) fn is_done(&self) -> bool {
        self.next >= self.files
    }

    /// The guest's memory is short.
    fn forget(&mut self) {
        let known: Vec<(u64, u64)> = self
            .nodes
            .iter()
            .zip(&mut self.told)
            .map(|(node, told)| (*node, std::mem::take(told)))
            .filter(|(_, told)| *told > 0)
            .collect();
        for some in known.chunks(FORGOTTEN) {
            let mut body = Body::default().u32(some.len() as u32).u32(0);
            for (node, told) in some {
                body = body.u64(*node).u64(*told);
            }
            let request = Request::new(opcode::BATCH_FORGET, 0, body, 0, 0);
            self.session.send(&request);
        }
    }

    /// One turn; returns the operations done.
    pub(crate) fn turn(&mut self, work: Work, time: Duration) -> usize {
        match work {
            Work::Data(data) => self.data(data, time),
            Work::Small(small) => self.small(small),
        }
    }

    fn data(&mut self, data: Data, time: Duration) -> usize {
        let blocks = FILE_SIZE / u64::from(data.size);
        let files = &self.data;
        let start = Instant::now();
        let mut counts = [self.next as u64; SLOTS];
        let done = self.session.run(
            data.jobs,
            |job| {
                let n = counts[job];
                counts[job] += 1;
                let block = if data.random {
                    // An odd multiplier visits every block of a power of two once.
                    n.wrapping_mul(0x9e37_79b1)
                } else {
                    n
                } % blocks;
                let (node, fh) = files[job];
                let body = Body::default()
                    .u64(fh)
                    .u64(block * u64::from(data.size))
                    .u32(data.size);
                let body = body.u32(0).u64(0).u64(0);
                if data.write {
                    Request::new(opcode::WRITE, node, body, data.size, 24)
                } else {
                    Request::new(opcode::READ, node, body, 0, 16 + data.size)
                }
            },
            |_| start.elapsed() < time,
        );
        self.next += done / data.jobs;
        done
    }

    fn small(&mut self, small: Small) -> usize {
        let first = self.next;
        match small {
            Small::Create => self.create(),
            Small::LookupFirst | Small::LookupAgain => self.look_up(),
            Small::GetAttr => self.each(|_, node| {
                let body = Body::default().u64(0).u64(0);
                Request::new(opcode::GETATTR, node, body, 0, 120)
            }),
            Small::Open => self.open(),
            Small::ReadDir => return self.list(false),
            Small::ReadDirPlus => return self.list(true),
            Small::Unlink => {
                let folder = self.folder;
                self.each(|n, _| Request::new(opcode::UNLINK, folder, name(n), 0, 16));
            }
        }
        self.next - first
    }

    fn turn_end(&self) -> usize {
        self.files.min(self.next + TURN)
    }

    fn each(&mut self, mut request: impl FnMut(usize, u64) -> Request) {
        let (mut n, end) = (self.next, self.turn_end());
        let nodes = &self.nodes;
        self.session.run(
            1,
            |_| {
                let request = request(n, nodes[n]);
                n += 1;
                request
            },
            |sent| sent < end - self.next,
        );
        self.next = end;
    }

    fn look_up(&mut self) {
        for n in self.next..self.turn_end() {
            let request = Request::new(opcode::LOOKUP, self.folder, name(n), 0, 144);
            let entry = self.session.call(request);
            self.nodes[n] = u64_at(&entry, 0);
            self.told[n] += 1;
        }
        self.next = self.turn_end();
    }

    fn create(&mut self) {
        for n in self.next..self.turn_end() {
            let flags = libc::O_RDWR | libc::O_CREAT | libc::O_EXCL;
            let body = Body::default().u32(flags as u32).u32(0o100_644);
            let body = body.u32(0).u32(0).add(&name(n));
            let request = Request::new(opcode::CREATE, self.folder, body, 0, 160);
            let made = self.session.call(request);
            (self.nodes[n], self.told[n]) = (u64_at(&made, 0), 1);
            self.release(self.nodes[n], u64_at(&made, 128));
        }
        self.next = self.turn_end();
    }

    fn open(&mut self) {
        for n in self.next..self.turn_end() {
            let flags = Body::default().u32(libc::O_RDONLY as u32).u32(0);
            let node = self.nodes[n];
            let request = Request::new(opcode::OPEN, node, flags, 0, 32);
            let opened = self.session.call(request);
            self.release(node, u64_at(&opened, 0));
        }
        self.next = self.turn_end();
    }

    fn release(&mut self, node: u64, fh: u64) {
        let body = Body::default().u64(fh).u64(0).u64(0);
        self.session
            .call(Request::new(opcode::RELEASE, node, body, 0, 16));
    }

    /// The whole folder, since daemons read ahead; returns how many entries it has.
    fn list(&mut self, plus: bool) -> usize {
        let folder = self.folder;
        let flags = Body::default().u64(0);
        let request = Request::new(opcode::OPENDIR, folder, flags, 0, 32);
        let fh = u64_at(&self.session.call(request), 0);
        let (code, entry) = if plus {
            (opcode::READDIRPLUS, 128)
        } else {
            (opcode::READDIR, 0)
        };
        let (mut offset, mut entries) = (0, 0);
        loop {
            let body = Body::default().u64(fh).u64(offset).u32(32768);
            let body = body.u32(0).u64(0).u64(0);
            let reply = self
                .session
                .call(Request::new(code, folder, body, 0, 16 + 32768));
            let mut at = 0;
            while at < reply.len() {
                offset = u64_at(&reply, at + entry + 8);
                let len = u64_at(&reply, at + entry + 16) as u32 as usize;
                let name = &reply[at + entry + 24..at + entry + 24 + len];
                if plus && let Some(n) = number(name) {
                    self.nodes[n] = u64_at(&reply, at);
                    self.told[n] += 1;
                }
                at = (at + entry + 24 + len).next_multiple_of(8);
                entries += 1;
            }
            if reply.is_empty() {
                break;
            }
        }
        let body = Body::default().u64(fh).u64(0).u64(0);
        self.session
            .call(Request::new(opcode::RELEASEDIR, folder, body, 0, 16));
        self.next = self.files;
        entries
    }
}

fn name(n: usize) -> Body {
    Body::default().name(&format!("small-{n}"))
}

fn number(name: &[u8]) -> Option<usize> {
    std::str::from_utf8(name.strip_prefix(b"small-")?)
        .ok()?
        .parse()
        .ok()
}
