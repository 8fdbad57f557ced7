//! Load from a vhost-user front end without a guest, on this daemon and on others beside it.
//!
//! `cargo bench -p vhost-user-fs [-- --dir FOLDER] [--only NAME] [--rounds N]`: the same loads on the same folder by each
//! daemon in turn; prints operations per second and CPU time of the daemon per operation (the best of the rounds). Debian's
//! `/usr/lib/qemu/virtiofsd` and a `virtiofsd` in the path take part if they are there.

#![allow(missing_docs, clippy::unwrap_used, clippy::needless_pass_by_value)] // a tool for developers

use std::fs;
use std::os::fd::OwnedFd;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Instant;

use device_host::test_frontend::{Buffer, DriverQueue, GuestMemory, INDIRECT_DESC, TestFrontend};
use fs_device::fuse::wire::{init, opcode};
use vhost::VhostBackend;
use vhost::vhost_user::message::{VhostUserHeaderFlag, VhostUserProtocolFeatures};
use vhost::vhost_user::{Frontend, VhostUserFrontend};

/// Where slot `n`'s request is, and its data or reply.
const REQUEST: u64 = 0x10_0000;
const DATA: u64 = 0x80_0000;
const REPLY: u64 = 0x20_0000;
const SLOTS: usize = 4;

struct Daemon {
    name: &'static str,
    program: PathBuf,
    arguments: fn(&Path) -> Vec<String>,
}

fn daemons() -> Vec<Daemon> {
    let ours = Daemon {
        name: "vhost_user_fs",
        program: env!("CARGO_BIN_EXE_vhost_user_fs").into(),
        arguments: |source| {
            vec![
                "-fd=3".into(),
                "-source".into(),
                source.display().to_string(),
            ]
        },
    };
    let theirs = Daemon {
        name: "virtiofsd (C)",
        program: "/usr/lib/qemu/virtiofsd".into(),
        arguments: |source| {
            let source = format!("source={}", source.display());
            vec![
                "--fd=3".into(),
                "-o".into(),
                source,
                "-o".into(),
                "cache=auto".into(),
            ]
        },
    };
    let rust = Daemon {
        name: "virtiofsd (Rust)",
        program: std::env::var_os("PATH")
            .and_then(|path| {
                std::env::split_paths(&path)
                    .map(|dir| dir.join("virtiofsd"))
                    .find(|program| program.exists())
            })
            .unwrap_or_default(),
        arguments: |source| {
            vec![
                "--fd=3".into(),
                format!("--shared-dir={}", source.display()),
            ]
        },
    };
    [ours, theirs, rust]
        .into_iter()
        .filter(|d| d.program.exists())
        .collect()
}

struct Session {
    front: TestFrontend,
    queue: DriverQueue,
    child: Child,
    unique: u64,
}

#[derive(Default, Clone)]
struct Body(Vec<u8>);

impl Body {
    fn u32(mut self, value: u32) -> Self {
        self.0.extend_from_slice(&value.to_ne_bytes());
        self
    }
    fn u64(mut self, value: u64) -> Self {
        self.0.extend_from_slice(&value.to_ne_bytes());
        self
    }
    fn name(mut self, name: &str) -> Self {
        self.0.extend_from_slice(name.as_bytes());
        self.0.push(0);
        self
    }
}

/// One request: opcode, node, body, bytes of data behind the body, bytes for the reply.
type Request = (u32, u64, Body, u32, u32);

impl Session {
    fn start(daemon: &Daemon, source: &Path) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("socket");
        let listener = UnixListener::bind(&path).unwrap();
        let child = Command::new("sh")
            .args(["-c", "exec \"$0\" \"$@\" 3<&0 </dev/null 2>/dev/null"])
            .arg(&daemon.program)
            .args((daemon.arguments)(source))
            .stdin(Stdio::from(OwnedFd::from(listener)))
            .spawn()
            .unwrap();
        let socket = UnixStream::connect(&path).unwrap();
        let mut session = Self {
            front: connect(socket),
            queue: DriverQueue::new(1, 128, 0x2_0000),
            child,
            unique: 0,
        };
        // Daemons of virtiofsd's kind want to know the first queue as well.
        session.front.start(&DriverQueue::new(0, 128, 0x6_0000));
        session.front.start(&session.queue);
        let flags = init::ASYNC_READ | init::BIG_WRITES | init::MAX_PAGES | init::DO_READDIRPLUS;
        let body = Body::default()
            .u32(7)
            .u32(31)
            .u32(1 << 17)
            .u32(flags as u32);
        session.call((opcode::INIT, 0, body, 0, 4096));
        session
    }

    fn submit(&mut self, slot: usize, request: &Request) -> u16 {
        let (opcode, node, body, data, room) = request;
        self.unique += 1;
        let len = 40 + body.0.len() as u32;
        let header = Body::default()
            .u32(len + data)
            .u32(*opcode)
            .u64(self.unique)
            .u64(*node);
        let mut bytes = header.u64(0).u64(0).0;
        bytes.extend_from_slice(&body.0);
        let slot = slot as u64;
        let at = REQUEST + slot * 0x1000;
        self.front.memory.write(at, &bytes);
        let mut buffers = vec![Buffer::readable(at, len)];
        if *data > 0 {
            buffers.push(Buffer::readable(DATA + slot * 0x10_0000, *data));
        }
        if *room > 0 {
            // As Linux lays it out: the header, then the rest.
            buffers.push(Buffer::writable(REPLY + slot * 0x1000, 16));
            if *room > 16 {
                buffers.push(Buffer::writable(DATA + slot * 0x10_0000, room - 16));
            }
        }
        let head = self.queue.chain(&self.front.memory, &buffers);
        self.queue.offer(&self.front.memory, head);
        self.queue.kick();
        head
    }

    fn check(&self, slot: usize, used: u32, request: &Request) {
        let header = self.front.memory.read(REPLY + slot as u64 * 0x1000, 16);
        let error = i32::from_ne_bytes(header[4..8].try_into().unwrap());
        assert_eq!(error, 0, "request {} of {used} bytes failed", request.0);
    }

    fn call(&mut self, request: Request) -> Vec<u8> {
        self.submit(0, &request);
        let (_, used) = self.queue.wait_used(&self.front.memory);
        self.check(0, used, &request);
        self.front
            .memory
            .read(DATA, (used as usize).saturating_sub(16))
    }

    /// `count` requests, `depth` of them at a time.
    fn run(&mut self, count: usize, depth: usize, mut next: impl FnMut(usize) -> Request) {
        assert!(depth <= SLOTS);
        let mut running: Vec<Option<(u16, Request)>> = vec![None; depth];
        let (mut sent, mut done) = (0, 0);
        while done < count {
            for (slot, place) in running.iter_mut().enumerate() {
                if place.is_none() && sent < count {
                    let request = next(sent);
                    let head = self.submit(slot, &request);
                    *place = Some((head, request));
                    sent += 1;
                }
            }
            let (head, used) = self.queue.wait_used(&self.front.memory);
            let slot = running
                .iter()
                .position(|r| r.as_ref().is_some_and(|(h, _)| *h == head))
                .unwrap();
            let (_, request) = running[slot].take().unwrap();
            self.check(slot, used, &request);
            done += 1;
        }
    }

    /// CPU time of the daemon and its children in nanoseconds.
    fn cpu(&self) -> u64 {
        let mut pids = vec![self.child.id()];
        let mut total = 0;
        while let Some(pid) = pids.pop() {
            let Ok(tasks) = fs::read_dir(format!("/proc/{pid}/task")) else {
                continue;
            };
            for task in tasks.flatten() {
                let read = |file| fs::read_to_string(task.path().join(file)).unwrap_or_default();
                let spent = read("schedstat");
                total += spent
                    .split(' ')
                    .next()
                    .and_then(|n| n.parse::<u64>().ok())
                    .unwrap_or(0);
                pids.extend(
                    read("children")
                        .split_whitespace()
                        .filter_map(|p| p.parse::<u32>().ok()),
                );
            }
        }
        total
    }

    fn finish(self) {
        let Self {
            front, mut child, ..
        } = self;
        drop(front);
        child.wait().unwrap();
    }
}

/// As `TestFrontend::connect`, content with what any daemon offers.
fn connect(socket: UnixStream) -> TestFrontend {
    let memory = GuestMemory::new();
    let mut vhost = Frontend::from_stream(socket, 2);
    vhost.set_owner().unwrap();
    let offered = vhost.get_features().unwrap();
    let accepted = offered & (INDIRECT_DESC | device_host::test_frontend::BASE_FEATURES);
    let wanted = VhostUserProtocolFeatures::MQ | VhostUserProtocolFeatures::REPLY_ACK;
    let protocol = vhost.get_protocol_features().unwrap() & wanted;
    vhost.set_protocol_features(protocol).unwrap();
    if protocol.contains(VhostUserProtocolFeatures::REPLY_ACK) {
        vhost.set_hdr_flags(VhostUserHeaderFlag::NEED_REPLY);
    }
    vhost.set_features(accepted).unwrap();
    vhost.set_mem_table(&memory.regions()).unwrap();
    TestFrontend {
        vhost,
        memory,
        offered,
        accepted,
    }
}

/// Files of the loads that make, find and remove them. Each costs a descriptor, of which hosts allow 20,000 and more.
const SMALL_FILES: usize = 10_000;
const FILE_SIZE: u64 = 64 << 20;

/// What a load does for one of its operations.
type Run = Box<dyn Fn(&mut Session, usize)>;

struct Load {
    name: String,
    count: usize,
    run: Run,
}

fn u64_at(bytes: &[u8], at: usize) -> u64 {
    u64::from_ne_bytes(bytes[at..at + 8].try_into().unwrap())
}

fn open(session: &mut Session, name: &str) -> (u64, u64) {
    let entry = session.call((opcode::LOOKUP, 1, Body::default().name(name), 0, 144));
    let node = u64_at(&entry, 0);
    let flags = Body::default().u32(libc::O_RDWR as u32).u32(0);
    let opened = session.call((opcode::OPEN, node, flags, 0, 32));
    (node, u64_at(&opened, 0))
}

fn loads() -> Vec<Load> {
    let mut loads = Vec::new();
    for (size, label, count) in [
        (4096u32, "4k", 60_000),
        (65536, "64k", 15_000),
        (1 << 20, "1M", 2_000),
    ] {
        for (write, random) in [(false, false), (false, true), (true, false), (true, true)] {
            for depth in [1, SLOTS] {
                let kind = if write { "write" } else { "read" };
                let order = if random { "rand" } else { "seq" };
                loads.push(Load {
                    name: format!("{order} {kind} {label} x{depth}"),
                    count,
                    run: Box::new(move |session, count| {
                        let (node, fh) = open(session, "data");
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
        count: SMALL_FILES,
        run,
    };
    let name = |n: usize| Body::default().name(&format!("small-{n}"));
    loads.push(meta(
        "create+release",
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

struct Options {
    dir: Option<PathBuf>,
    only: Option<String>,
    rounds: usize,
}

fn options() -> Options {
    let mut options = Options {
        dir: None,
        only: None,
        rounds: 3,
    };
    let mut arguments = std::env::args().skip(1);
    while let Some(argument) = arguments.next() {
        let mut value = || {
            arguments
                .next()
                .unwrap_or_else(|| panic!("{argument} needs a value"))
        };
        match argument.as_str() {
            "--dir" => options.dir = Some(value().into()),
            "--only" => options.only = Some(value()),
            "--rounds" => options.rounds = value().parse().unwrap(),
            "--bench" => {}
            other => panic!("{other}: the options are --dir FOLDER, --only NAME and --rounds N"),
        }
    }
    options
}

fn main() {
    let options = options();
    let place = match &options.dir {
        Some(dir) => tempfile::tempdir_in(dir).unwrap(),
        None => tempfile::tempdir().unwrap(),
    };
    let source = place.path();
    fs::write(source.join("data"), vec![0x5a; FILE_SIZE as usize]).unwrap();
    let daemons = daemons();
    print!("{:<24}", "load");
    for daemon in &daemons {
        print!("{:>30}", daemon.name);
    }
    println!(
        "\n{:<24}{}",
        "",
        "       ops/s  CPU µs/op  ratio".repeat(daemons.len())
    );
    let mut logs = vec![0.0; daemons.len()];
    let mut lines = 0;
    for load in loads() {
        if options
            .only
            .as_ref()
            .is_some_and(|only| !load.name.contains(only))
        {
            continue;
        }
        let mut best = vec![(0.0f64, f64::MAX); daemons.len()];
        for _ in 0..options.rounds {
            for (daemon, best) in daemons.iter().zip(&mut best) {
                // Loads on small files need them, whoever made them.
                if load.name != "create+release" && load.count == SMALL_FILES {
                    for n in 0..load.count {
                        fs::write(source.join(format!("small-{n}")), b"").unwrap();
                    }
                }
                let mut session = Session::start(daemon, source);
                let (cpu, start) = (session.cpu(), Instant::now());
                (load.run)(&mut session, load.count);
                let seconds = start.elapsed().as_secs_f64();
                let cpu = (session.cpu() - cpu) as f64 / 1000.0 / load.count as f64;
                session.finish();
                best.0 = best.0.max(load.count as f64 / seconds);
                best.1 = best.1.min(cpu);
                for n in 0..SMALL_FILES {
                    let _ = fs::remove_file(source.join(format!("small-{n}")));
                }
            }
        }
        print!("{:<24}", load.name);
        lines += 1;
        for ((ops, cpu), log) in best.iter().zip(&mut logs) {
            let ratio = best[0].0 / ops;
            *log += ratio.ln();
            print!("{ops:>12.0}{cpu:>11.2}{ratio:>7.2}");
        }
        println!();
    }
    print!("{:<24}", "geometric mean");
    for log in logs {
        print!("{:>30.2}", (log / f64::from(lines)).exp());
    }
    println!();
}
