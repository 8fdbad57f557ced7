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
}

#[derive(Default, Clone)]
pub(crate) struct Body(pub(crate) Vec<u8>);

impl Body {
    pub(crate) fn u32(mut self, value: u32) -> Self {
        self.0.extend_from_slice(&value.to_ne_bytes());
        self
    }
    pub(crate) fn u64(mut self, value: u64) -> Self {
        self.0.extend_from_slice(&value.to_ne_bytes());
        self
    }
    pub(crate) fn name(mut self, name: &str) -> Self {
        self.0.extend_from_slice(name.as_bytes());
        self.0.push(0);
        self
    }
}

/// One request: opcode, node, body, bytes of data behind the body, bytes for the reply.
pub(crate) type Request = (u32, u64, Body, u32, u32);

impl Session {
    pub(crate) fn start(daemon: &Daemon, source: &Path, cache: Cache) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("socket");
        let listener = UnixListener::bind(&path).unwrap();
        let child = Command::new("sh")
            // In a session of its own, as a manager starts it: the scheduler groups processes by sessions, and one that makes
            // its own session would be in another group than one that does not.
            .args([
                "-c",
                "exec setsid \"$0\" \"$@\" 3<&0 </dev/null 2>/dev/null",
            ])
            .arg(&daemon.program)
            .args((daemon.arguments)(source, cache))
            .stdin(Stdio::from(OwnedFd::from(listener)))
            .spawn()
            .unwrap();
        let socket = UnixStream::connect(&path).unwrap();
        let mut session = Self {
            front: connect(socket),
            queue: DriverQueue::new(1, 128, 0x2_0000),
            child,
            unique: 0,
            offered: 0,
            seen: 0,
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

    /// The next reply, by an interrupt if it is not there yet.
    fn wait(&mut self) -> (u16, u32) {
        let used = loop {
            if let Some(used) = self.queue.try_used(&self.front.memory) {
                break used;
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

    fn check(&self, slot: usize, used: u32, request: &Request) {
        let error = self.error(slot);
        assert_eq!(error, 0, "request {} of {used} bytes failed", request.0);
    }

    fn error(&self, slot: usize) -> i32 {
        let header = self.front.memory.read(REPLY + slot as u64 * 0x1000, 16);
        i32::from_ne_bytes(header[4..8].try_into().unwrap())
    }

    /// One request that may fail.
    pub(crate) fn try_call(&mut self, request: Request) -> Result<Vec<u8>, i32> {
        self.submit(0, &request);
        let (_, used) = self.wait();
        match self.error(0) {
            0 => Ok(self
                .front
                .memory
                .read(DATA, (used as usize).saturating_sub(16))),
            error => Err(error),
        }
    }

    pub(crate) fn call(&mut self, request: Request) -> Vec<u8> {
        self.submit(0, &request);
        let (_, used) = self.wait();
        self.check(0, used, &request);
        self.front
            .memory
            .read(DATA, (used as usize).saturating_sub(16))
    }

    /// `count` requests, `depth` of them at a time.
    pub(crate) fn run(
        &mut self,
        count: usize,
        depth: usize,
        mut next: impl FnMut(usize) -> Request,
    ) {
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
            let (head, used) = self.wait();
            let slot = running
                .iter()
                .position(|r| r.as_ref().is_some_and(|(h, _)| *h == head))
                .unwrap();
            let (_, request) = running[slot].take().unwrap();
            self.check(slot, used, &request);
            done += 1;
        }
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
