//! # A front end without a guest
//!
//! **Job.** Starts a daemon, negotiates, sends FUSE requests as Linux lays them out and waits for their replies by interrupt,
//! and reads what the kernel says of the daemon's processes.
//! **Who is not trusted.** The daemon's own figures: the scheduler counts its processor time, `smaps` its memory.
//! **Why this way.** No guest's processor is in the figures, so they are the daemon's and the wake-ups' alone.

use std::fs;
use std::os::fd::OwnedFd;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{Ordering, fence};
use std::time::Duration;

use device_host::test_frontend::{
    BASE_FEATURES, Buffer, DriverQueue, EVENT_IDX, GuestMemory, INDIRECT_DESC, TestFrontend,
};
use fs_device::fuse::wire::{init, opcode};
use vhost::VhostBackend;
use vhost::vhost_user::message::{VhostUserHeaderFlag, VhostUserProtocolFeatures};
use vhost::vhost_user::{Frontend, VhostUserFrontend};

use crate::daemons::{Cache, Daemon};

/// Where slot `n`'s request is, and its data or reply.
pub(crate) const REQUEST: u64 = 0x10_0000;
pub(crate) const DATA: u64 = 0x80_0000;
pub(crate) const REPLY: u64 = 0x20_0000;
/// Requests at a time at most.
pub(crate) const SLOTS: usize = 4;

pub(crate) struct Session {
    pub(crate) front: TestFrontend,
    queue: DriverQueue,
    child: Child,
    unique: u64,
    /// Requests offered and replies seen, as the ring counts them.
    offered: u16,
    seen: u16,
    /// Looks for replies instead of sleeping until there is one.
    pub(crate) awake: bool,
}

/// Bytes after a request's header, in place: the generator must not be what is measured.
#[derive(Clone, Copy)]
pub(crate) struct Body {
    bytes: [u8; 256],
    len: usize,
}

impl Default for Body {
    fn default() -> Self {
        Self {
            bytes: [0; 256],
            len: 0,
        }
    }
}

impl Body {
    fn put(mut self, bytes: &[u8]) -> Self {
        self.bytes[self.len..self.len + bytes.len()].copy_from_slice(bytes);
        self.len += bytes.len();
        self
    }
    pub(crate) fn u32(self, value: u32) -> Self {
        self.put(&value.to_ne_bytes())
    }
    pub(crate) fn u64(self, value: u64) -> Self {
        self.put(&value.to_ne_bytes())
    }
    pub(crate) fn name(self, name: &str) -> Self {
        self.put(name.as_bytes()).put(&[0])
    }
    pub(crate) fn add(self, other: &Self) -> Self {
        self.put(&other.bytes[..other.len])
    }
}

/// One request.
#[derive(Clone, Copy)]
pub(crate) struct Request {
    opcode: u32,
    node: u64,
    body: Body,
    /// Bytes of data behind the body.
    data: u32,
    /// Bytes for the reply; none is expected without.
    room: u32,
}

impl Request {
    pub(crate) fn new(opcode: u32, node: u64, body: Body, data: u32, room: u32) -> Self {
        Self {
            opcode,
            node,
            body,
            data,
            room,
        }
    }
}

impl Session {
    pub(crate) fn start(daemon: &Daemon, source: &Path, cache: Cache) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("socket");
        let listener = UnixListener::bind(&path).unwrap();
        let child = launch(daemon, source, cache, OwnedFd::from(listener));
        let socket = UnixStream::connect(&path).unwrap();
        let mut session = Self {
            front: connect(socket),
            queue: DriverQueue::new(1, 128, 0x2_0000),
            child,
            unique: 0,
            offered: 0,
            seen: 0,
            awake: false,
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
        session.call(Request::new(opcode::INIT, 0, body, 0, 4096));
        session
    }

    fn submit(&mut self, slot: usize, request: &Request) -> u16 {
        self.unique += 1;
        let len = 40 + request.body.len;
        let mut bytes = [0; 40 + 256];
        bytes[..4].copy_from_slice(&(len as u32 + request.data).to_ne_bytes());
        bytes[4..8].copy_from_slice(&request.opcode.to_ne_bytes());
        bytes[8..16].copy_from_slice(&self.unique.to_ne_bytes());
        bytes[16..24].copy_from_slice(&request.node.to_ne_bytes());
        bytes[40..len].copy_from_slice(&request.body.bytes[..request.body.len]);
        let slot = slot as u64;
        let at = REQUEST + slot * 0x1000;
        self.front.memory.write(at, &bytes[..len]);
        let mut buffers = [Buffer::readable(at, len as u32); 4];
        let mut count = 1;
        if request.data > 0 {
            buffers[count] = Buffer::readable(DATA + slot * 0x10_0000, request.data);
            count += 1;
        }
        if request.room > 0 {
            // As Linux lays it out: the header, then the rest.
            buffers[count] = Buffer::writable(REPLY + slot * 0x1000, 16);
            count += 1;
            if request.room > 16 {
                buffers[count] = Buffer::writable(DATA + slot * 0x10_0000, request.room - 16);
                count += 1;
            }
        }
        let buffers = &buffers[..count];
        let head = self.queue.chain(&self.front.memory, buffers);
        self.queue.offer(&self.front.memory, head);
        self.offered = self.offered.wrapping_add(1);
        // As Linux: only when the device sleeps (virtio 1.3, 2.7.10).
        let event = self.queue.avail_event(&self.front.memory);
        if !self.event_idx() || event == self.offered.wrapping_sub(1) {
            self.queue.kick();
        }
        head
    }

    fn event_idx(&self) -> bool {
        self.front.accepted & EVENT_IDX != 0
    }

    /// Nothing happens for a while.
    pub(crate) fn rest(&self, time: Duration) {
        // A reply that was seen before its interrupt came has left that behind.
        self.queue.interrupts();
        self.queue.wait_interrupt_for(time);
    }

    /// The next reply, by an interrupt if it is not there yet.
    fn wait(&mut self) -> (u16, u32) {
        let used = loop {
            if let Some(used) = self.queue.try_used(&self.front.memory) {
                break used;
            }
            if self.awake {
                std::hint::spin_loop();
                continue;
            }
            self.queue.set_used_event(&self.front.memory, self.seen);
            fence(Ordering::SeqCst);
            if let Some(used) = self.queue.try_used(&self.front.memory) {
                break used;
            }
            self.queue.wait_interrupt();
        };
        self.seen = self.seen.wrapping_add(1);
        used
    }

    fn check(&self, slot: usize, request: &Request) {
        let error = self.error(slot, request);
        assert_eq!(error, 0, "request {} failed", request.opcode);
    }

    fn error(&self, slot: usize, request: &Request) -> i32 {
        if request.room == 0 {
            return 0;
        }
        let field = self.front.memory.read(REPLY + slot as u64 * 0x1000 + 4, 4);
        i32::from_ne_bytes(field.try_into().unwrap())
    }

    /// The body of the reply to the one request that was sent.
    fn reply(&self, used: u32) -> Vec<u8> {
        let len = (used as usize).saturating_sub(16);
        self.front.memory.read(DATA, len)
    }

    /// One request that may fail.
    pub(crate) fn try_call(&mut self, request: Request) -> Result<Vec<u8>, i32> {
        self.submit(0, &request);
        let (_, used) = self.wait();
        match self.error(0, &request) {
            0 => Ok(self.reply(used)),
            error => Err(error),
        }
    }

    pub(crate) fn call(&mut self, request: Request) -> Vec<u8> {
        let used = self.send(&request);
        self.reply(used)
    }

    /// One request whose reply's body nobody looks at.
    pub(crate) fn send(&mut self, request: &Request) -> u32 {
        self.submit(0, request);
        let (_, used) = self.wait();
        self.check(0, request);
        used
    }

    pub(crate) fn lookup(&mut self, folder: u64, name: &str) -> u64 {
        let body = Body::default().name(name);
        u64_at(
            &self.call(Request::new(opcode::LOOKUP, folder, body, 0, 144)),
            0,
        )
    }

    /// Has `jobs` requests at a time, the next ones of each job from `next`, as long as `go_on` says so of the number sent.
    /// Returns how many there were.
    pub(crate) fn run(
        &mut self,
        jobs: usize,
        mut next: impl FnMut(usize) -> Request,
        go_on: impl Fn(usize) -> bool,
    ) -> usize {
        assert!(jobs <= SLOTS);
        let mut running: [Option<(u16, Request)>; SLOTS] = [None; SLOTS];
        let (mut sent, mut done) = (0, 0);
        for (slot, place) in running.iter_mut().enumerate().take(jobs) {
            let request = next(slot);
            *place = Some((self.submit(slot, &request), request));
            sent += 1;
        }
        while done < sent {
            let (head, _) = self.wait();
            let slot = running
                .iter()
                .position(|r| r.as_ref().is_some_and(|(h, _)| *h == head))
                .unwrap();
            let place = &mut running[slot];
            if let Some((_, request)) = place.take() {
                self.check(slot, &request);
            }
            done += 1;
            if go_on(sent) {
                let request = next(slot);
                *place = Some((self.submit(slot, &request), request));
                sent += 1;
            }
        }
        done
    }

    /// The daemon's processes.
    pub(crate) fn processes(&self) -> Vec<u32> {
        let mut pids = vec![self.child.id()];
        let mut at = 0;
        while at < pids.len() {
            for task in tasks(pids[at]) {
                let children = fs::read_to_string(task.join("children")).unwrap_or_default();
                pids.extend(
                    children
                        .split_whitespace()
                        .filter_map(|p| p.parse::<u32>().ok()),
                );
            }
            at += 1;
        }
        pids
    }

    /// CPU time of the daemon's processes in nanoseconds.
    pub(crate) fn cpu(&self) -> u64 {
        let spent = |task: PathBuf| -> Option<u64> {
            let text = fs::read_to_string(task.join("schedstat")).ok()?;
            text.split(' ').next()?.parse().ok()
        };
        let pids = self.processes();
        pids.into_iter().flat_map(tasks).filter_map(spent).sum()
    }

    /// KiB that `file` of `/proc/PID` says under `field`, of all the daemon's processes together.
    pub(crate) fn memory(&self, file: &str, field: &str) -> u64 {
        let of = |pid: u32| -> Option<u64> {
            let text = fs::read_to_string(format!("/proc/{pid}/{file}")).ok()?;
            let line = text
                .lines()
                .find_map(|l| l.strip_prefix(field)?.strip_prefix(':'))?;
            line.split_whitespace().next()?.parse().ok()
        };
        self.processes().into_iter().filter_map(of).sum()
    }

    pub(crate) fn finish(self) {
        let Self {
            front, mut child, ..
        } = self;
        drop(front);
        child.wait().unwrap();
    }
}

/// Starts a daemon on a socket that listens.
pub(crate) fn launch(daemon: &Daemon, source: &Path, cache: Cache, listener: OwnedFd) -> Child {
    Command::new("sh")
        // In a session of its own, as a manager starts it: the scheduler groups processes by sessions, and one that makes
        // its own session would be in another group than one that does not.
        .args([
            "-c",
            "exec setsid \"$0\" \"$@\" 3<&0 </dev/null 2>/dev/null",
        ])
        .arg(&daemon.program)
        .args((daemon.arguments)(source, cache))
        .stdin(Stdio::from(listener))
        .spawn()
        .unwrap()
}

/// As `TestFrontend::connect`, content with what any daemon offers.
fn connect(socket: UnixStream) -> TestFrontend {
    let memory = GuestMemory::new();
    let mut vhost = Frontend::from_stream(socket, 2);
    vhost.set_owner().unwrap();
    let offered = vhost.get_features().unwrap();
    let accepted = offered & (INDIRECT_DESC | EVENT_IDX | BASE_FEATURES);
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

/// Folders of a process's threads in `/proc`.
fn tasks(pid: u32) -> Vec<PathBuf> {
    fs::read_dir(format!("/proc/{pid}/task"))
        .map(|dir| dir.flatten().map(|task| task.path()).collect())
        .unwrap_or_default()
}

pub(crate) fn u64_at(bytes: &[u8], at: usize) -> u64 {
    u64::from_ne_bytes(bytes[at..at + 8].try_into().unwrap())
}
