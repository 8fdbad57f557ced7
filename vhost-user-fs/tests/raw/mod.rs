//! A raw front end that speaks FUSE without a guest: every byte of a request is the test's own.

#![allow(
    clippy::unwrap_used,
    clippy::needless_pass_by_value,
    dead_code,
    missing_docs,
    unreachable_pub
)] // test code that several tests share in parts

use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Child, Command, ExitStatus, Stdio};

use device_host::test_frontend::window::WindowServer;
use device_host::test_frontend::{Buffer, DriverQueue, INDIRECT_DESC, TestFrontend};
use fs_device::fuse::wire::{init, opcode};

/// Where requests and replies are in guest memory.
pub const REQUEST: u64 = 0x10_0000;
pub const REPLY: u64 = 0x80_0000;
const ROOM: u32 = 0x20_0000;

pub struct Client {
    pub front: TestFrontend,
    pub queue: DriverQueue,
    pub child: Child,
    unique: u64,
    pub uid: u32,
    pub gid: u32,
}

/// A reply: error number (positive) or body.
pub type Reply = Result<Vec<u8>, i32>;

/// Starts the daemon on a connected socket; returns it and the other end.
pub fn spawn(source: &Path, options: &[&str], user: Option<u32>) -> (Child, UnixStream) {
    let (ours, theirs) = UnixStream::pair().unwrap();
    // The shell puts the socket on a number that `-fd` takes.
    let mut command = Command::new("sh");
    if let Some(id) = user {
        command.uid(id).gid(id);
    }
    let child = command
        .args(["-c", "exec \"$0\" \"$@\" 3<&0 </dev/null"])
        .arg(env!("CARGO_BIN_EXE_vhost_user_fs"))
        .args(["-fd", "3", "-source"])
        .arg(source)
        .args(options)
        .stdin(Stdio::from(OwnedFd::from(theirs)))
        .spawn()
        .unwrap();
    (child, ours)
}

impl Client {
    /// Starts the daemon and a FUSE session.
    pub fn start(source: &Path, options: &[&str]) -> Self {
        Self::start_as(source, options, None)
    }

    /// The same as another user.
    pub fn start_as(source: &Path, options: &[&str], user: Option<u32>) -> Self {
        let mut client = Self::start_without_init(source, options, user);
        client.init();
        client
    }

    fn start_without_init(source: &Path, options: &[&str], user: Option<u32>) -> Self {
        let (child, socket) = spawn(source, options, user);
        Self::with_front(child, TestFrontend::connect(socket, INDIRECT_DESC))
    }

    /// As [`start`](Self::start), by a front end that maps files for the guest; also tells the sizes of the device's regions.
    pub fn start_with_window(
        source: &Path,
        options: &[&str],
        window: &WindowServer,
    ) -> (Self, Vec<u64>) {
        let (child, socket) = spawn(source, options, None);
        let (front, sizes) =
            TestFrontend::connect_with_window(socket, INDIRECT_DESC, window.clone());
        let mut client = Self::with_front(child, front);
        client.init();
        (client, sizes)
    }

    pub fn with_front(child: Child, mut front: TestFrontend) -> Self {
        let queue = DriverQueue::new(1, 256, 0x2_0000);
        front.start(&queue);
        Self {
            front,
            queue,
            child,
            unique: 0,
            uid: 0,
            gid: 0,
        }
    }

    /// Begins a session; `fuse_init_out`.
    pub fn init(&mut self) -> Vec<u8> {
        // Everything is offered; the daemon takes what its options allow.
        let flags = u64::MAX >> 1 | init::INIT_EXT;
        let body = Body::new()
            .u32(7)
            .u32(41)
            .u32(1 << 17)
            .u32((flags & 0xffff_ffff) as u32)
            .u32((flags >> 32) as u32);
        let reply = self.call(opcode::INIT, 0, body.zeros(44)).unwrap();
        assert_eq!(reply.len(), 64);
        assert_eq!(reply[..4], 7u32.to_ne_bytes());
        reply
    }

    /// A well-formed request.
    pub fn call(&mut self, opcode: u32, node: u64, body: Body) -> Reply {
        let len = 40 + body.0.len() as u32;
        let used = self.raw(opcode, node, len, &body.0, ROOM);
        self.reply(used)
    }

    /// The next request: its header, which says `len`, and its body.
    fn request(&mut self, opcode: u32, node: u64, len: u32, body: &[u8]) -> Vec<u8> {
        self.unique += 1;
        let header = Body::new()
            .u32(len)
            .u32(opcode)
            .u64(self.unique)
            .u64(node)
            .u32(self.uid)
            .u32(self.gid)
            .u32(1)
            .u32(0);
        [header.0.as_slice(), body].concat()
    }

    /// Any request; `len` is what its header says, `room` the bytes for the reply. Returns the used length.
    pub fn raw(&mut self, opcode: u32, node: u64, len: u32, body: &[u8], room: u32) -> u32 {
        let bytes = self.request(opcode, node, len, body);
        self.front.memory.write(REQUEST, &bytes);
        let mut buffers = vec![Buffer::readable(REQUEST, bytes.len() as u32)];
        if room > 0 {
            buffers.push(Buffer::writable(REPLY, room));
        }
        self.queue.request(&self.front.memory, &buffers)
    }

    /// Offers a request and does not wait for its reply, which will have no body. Its number, and its head in the queue.
    pub fn begin(&mut self, opcode: u32, node: u64, body: Body) -> (u64, u16) {
        // Apart from those of requests that are waited for, and from each other.
        let bytes = self.request(opcode, node, 40 + body.0.len() as u32, &body.0);
        let (request, reply) = Self::begun_at(self.unique);
        self.front.memory.write(request, &bytes);
        let buffers = [
            Buffer::readable(request, bytes.len() as u32),
            Buffer::writable(reply, 16),
        ];
        let head = self.queue.chain(&self.front.memory, &buffers);
        self.queue.offer(&self.front.memory, head);
        self.queue.kick();
        (self.unique, head)
    }

    /// Offers a `READ` or `WRITE` as Linux lays it out and does not wait for it: the request, what is written behind it, the reply's
    /// header, and room for what is read, at the places of `slot`. Its number and its head in the queue.
    pub fn begin_large(
        &mut self,
        opcode: u32,
        node: u64,
        body: Body,
        slot: u64,
        size: u32,
    ) -> (u64, u16) {
        let write = opcode == fs_device::fuse::wire::opcode::WRITE;
        let len = 40 + body.0.len() as u32 + if write { size } else { 0 };
        let bytes = self.request(opcode, node, len, &body.0);
        let (request, reply) = (REQUEST + 0x10_0000 + slot * 0x400, REPLY + slot * 0x400);
        self.front.memory.write(request, &bytes);
        let data = Self::large_at(slot);
        let head = Buffer::readable(request, bytes.len() as u32);
        let buffers = if write {
            // Two pieces that are not of a page each.
            [
                head,
                Buffer::readable(data, 1000),
                Buffer::readable(data + 1000, size - 1000),
                Buffer::writable(reply, 24),
            ]
        } else {
            [
                head,
                Buffer::writable(reply, 16),
                Buffer::writable(data, 1000),
                Buffer::writable(data + 1000, size - 1000),
            ]
        };
        let head = self.queue.chain(&self.front.memory, &buffers);
        self.queue.offer(&self.front.memory, head);
        self.queue.kick();
        (self.unique, head)
    }

    /// Where the data of a slot is, up to 384 KiB; there are 8.
    pub fn large_at(slot: u64) -> u64 {
        REPLY + 0x4_0000 + slot * 0x6_0000
    }

    /// The reply in a slot: error number, or the word behind the header.
    pub fn large_reply(&self, slot: u64, unique: u64) -> Result<u32, i32> {
        let bytes = self.front.memory.read(REPLY + slot * 0x400, 24);
        assert_eq!(u64_at(&bytes, 8), unique);
        match u32_at(&bytes, 4).cast_signed() {
            0 => Ok(u32_at(&bytes, 16)),
            error => Err(-error),
        }
    }

    fn begun_at(unique: u64) -> (u64, u64) {
        let request = REQUEST + 0x1000 + unique % 256 * 0x400;
        (request, request + 0x200)
    }

    /// Waits for the reply of whichever request that was [begun](Self::begin) is answered next: its head, and the bytes of its reply.
    pub fn answered(&mut self) -> (u16, u32) {
        self.queue.wait_used(&self.front.memory)
    }

    /// The outcome of the request that was [begun](Self::begin) with this number, which has been answered.
    pub fn outcome(&self, unique: u64) -> Result<(), i32> {
        let bytes = self.front.memory.read(Self::begun_at(unique).1, 16);
        assert_eq!(u64_at(&bytes, 8), unique);
        match u32_at(&bytes, 4).cast_signed() {
            0 => Ok(()),
            error => Err(-error),
        }
    }

    /// The reply of `used` bytes.
    pub fn reply(&self, used: u32) -> Reply {
        let bytes = self.front.memory.read(REPLY, used as usize);
        let word = |at: usize| u32::from_ne_bytes(bytes[at..at + 4].try_into().unwrap());
        assert_eq!(word(0), used, "length in the header and used length");
        assert_eq!(bytes[8..16], self.unique.to_ne_bytes(), "unique");
        match word(4).cast_signed() {
            0 => Ok(bytes[16..].to_vec()),
            error => {
                assert_eq!(used, 16, "an error has no body");
                Err(-error)
            }
        }
    }

    pub fn lookup(&mut self, parent: u64, name: &str) -> Result<u64, i32> {
        self.call(opcode::LOOKUP, parent, Body::new().name(name))
            .map(|r| u64_at(&r, 0))
    }

    pub fn open(&mut self, node: u64, flags: i32) -> Result<u64, i32> {
        let body = Body::new().u32(flags.cast_unsigned()).u32(0);
        self.call(opcode::OPEN, node, body).map(|r| u64_at(&r, 0))
    }

    pub fn read(&mut self, node: u64, fh: u64, offset: u64, size: u32) -> Reply {
        let body = Body::new().u64(fh).u64(offset).u32(size).zeros(20);
        self.call(opcode::READ, node, body)
    }

    pub fn write(&mut self, node: u64, fh: u64, offset: u64, data: &[u8]) -> Result<u32, i32> {
        let body = Body::new()
            .u64(fh)
            .u64(offset)
            .u32(data.len() as u32)
            .zeros(20);
        self.call(opcode::WRITE, node, body.bytes(data))
            .map(|r| u32_at(&r, 0))
    }

    pub fn create(&mut self, parent: u64, name: &str, flags: i32) -> Result<(u64, u64), i32> {
        let body = Body::new()
            .u32(flags.cast_unsigned())
            .u32(0o100_644)
            .u32(0)
            .u32(0);
        self.call(opcode::CREATE, parent, body.name(name))
            .map(|r| (u64_at(&r, 0), u64_at(&r, 128)))
    }

    pub fn forget(&mut self, node: u64, count: u64) {
        let body = Body::new().u64(count);
        assert_eq!(self.raw(opcode::FORGET, node, 48, &body.0, 0), 0);
    }

    pub fn release(&mut self, node: u64, fh: u64) -> Reply {
        self.call(opcode::RELEASE, node, Body::new().u64(fh).zeros(16))
    }

    /// The session still works.
    pub fn assert_alive(&mut self) {
        let reply = self
            .call(opcode::GETATTR, 1, Body::new().zeros(16))
            .unwrap();
        assert_eq!(reply.len(), 104);
    }

    /// Closes the connection; the daemon must end by itself.
    pub fn finish(self) -> ExitStatus {
        let Self {
            front, mut child, ..
        } = self;
        drop(front);
        child.wait().unwrap()
    }
}

pub fn u64_at(bytes: &[u8], at: usize) -> u64 {
    u64::from_ne_bytes(bytes[at..at + 8].try_into().unwrap())
}

pub fn u32_at(bytes: &[u8], at: usize) -> u32 {
    u32::from_ne_bytes(bytes[at..at + 4].try_into().unwrap())
}

/// Builds the body of a request.
#[derive(Debug, Clone, Default)]
pub struct Body(pub Vec<u8>);

impl Body {
    pub fn new() -> Self {
        Self::default()
    }

    pub fn u32(self, value: u32) -> Self {
        self.bytes(&value.to_ne_bytes())
    }

    pub fn u64(self, value: u64) -> Self {
        self.bytes(&value.to_ne_bytes())
    }

    pub fn zeros(self, count: usize) -> Self {
        self.bytes(&vec![0; count])
    }

    pub fn bytes(mut self, bytes: &[u8]) -> Self {
        self.0.extend_from_slice(bytes);
        self
    }

    pub fn name(self, name: &str) -> Self {
        self.bytes(name.as_bytes()).bytes(&[0])
    }
}
