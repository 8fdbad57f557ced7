//! The front end itself, and what an outcome can be.
//!
//! **Job.** Well-formed steps up to a running queue, and any bytes at any point. **Who is not trusted.** Nobody.
//! **Why this way.** A case says only what it does wrong.

use super::LIMIT;
use nix::sys::eventfd::{EfdFlags, EventFd};
use nix::sys::memfd::{MFdFlags, memfd_create};
use std::fs::{File, OpenOptions};
use std::os::fd::{AsFd, AsRawFd, OwnedFd, RawFd};
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::os::unix::net::UnixStream;
use tests::vhost_user::{
    Message, NEED_REPLY, REPLY, VERSION, frame, receive, request as req, send, words,
};
use tests::wait::{Deadline, readable};

pub(crate) const RAM: u64 = 16 << 20;
pub(crate) const PROTOCOL_FEATURES: u64 = 1 << 30;
pub(crate) const VERSION_1: u64 = 1 << 32;
/// MQ, REPLY_ACK, CONFIG, INFLIGHT_SHMFD, RESET_DEVICE, CONFIGURE_MEM_SLOTS.
pub(crate) const PROTOCOL: u64 = 1 | 1 << 3 | 1 << 9 | 1 << 12 | 1 << 13 | 1 << 15;

/// Parts of queue 0 in guest memory.
pub(crate) const TABLE: u64 = 0;
pub(crate) const AVAILABLE: u64 = 0x1000;
pub(crate) const USED: u64 = 0x2000;

/// What a case leads to.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Leads {
    /// The process goes on: it answers, and ends with status 0 when the front end leaves.
    On,
    /// The process ends with status 1 and one line that has these words.
    End(&'static str),
    /// The same, and an acknowledgement that was asked for says no before.
    No(&'static str),
    /// The process ends when the front end leaves, or before, with a status and not by a signal.
    Leave,
}

/// Name, what the front end does, what it leads to.
pub(crate) type Case = (&'static str, fn(&mut Front), Leads);

/// A live process and its front end.
pub(crate) struct Front {
    pub(crate) socket: UnixStream,
    /// Ask for acknowledgements.
    pub(crate) acks: bool,
    /// The last acknowledgement.
    pub(crate) acknowledged: Option<u64>,
    pub(crate) memory: File,
    pub(crate) kick: EventFd,
    pub(crate) call: EventFd,
    pub(crate) error: EventFd,
}

pub(crate) fn memfd(size: u64) -> File {
    let file = File::from(memfd_create(c"front-end", MFdFlags::MFD_CLOEXEC).unwrap());
    file.set_len(size).unwrap();
    file
}

pub(crate) fn event() -> EventFd {
    EventFd::from_flags(EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK).unwrap()
}

impl Front {
    pub(crate) fn new(socket: UnixStream, acks: bool) -> Self {
        Self {
            socket,
            acks,
            acknowledged: None,
            memory: memfd(RAM),
            kick: event(),
            call: event(),
            error: event(),
        }
    }

    /// Sends anything. A peer that has left already is the case's outcome, not an error here.
    pub(crate) fn raw(&mut self, bytes: &[u8], fds: &[RawFd]) {
        let mut rest = bytes;
        let mut fds = fds;
        while !rest.is_empty() {
            match send(&self.socket, rest, fds) {
                Ok(sent) => (rest, fds) = (&rest[sent..], &[]),
                Err(_) => return,
            }
        }
    }

    /// Sends a request that has no reply of its own; takes its acknowledgement.
    pub(crate) fn tell_with(&mut self, request: u32, body: &[u8], fds: &[RawFd]) {
        let flags = if self.acks {
            VERSION | NEED_REPLY
        } else {
            VERSION
        };
        self.raw(&frame(request, flags, body.len() as u32, body), fds);
        if self.acks {
            self.acknowledged = self.reply(request).and_then(|reply| reply.number());
        }
    }

    pub(crate) fn tell(&mut self, request: u32, body: &[u64]) {
        self.tell_with(request, &words(body), &[]);
    }

    /// Sends a request with a reply of its own.
    pub(crate) fn ask(&mut self, request: u32, body: &[u8]) -> Option<Message> {
        self.raw(&frame(request, VERSION, body.len() as u32, body), &[]);
        self.reply(request)
    }

    pub(crate) fn reply(&mut self, request: u32) -> Option<Message> {
        let reply = receive(&self.socket, Deadline::after(LIMIT)).unwrap()?;
        assert_eq!(reply.request, request, "a reply to another request");
        assert_eq!(reply.flags & (REPLY | 3), REPLY | VERSION);
        Some(reply)
    }

    /// Everything up to acknowledgements.
    pub(crate) fn greet(&mut self) {
        let acks = std::mem::take(&mut self.acks);
        self.tell(req::SET_OWNER, &[]);
        let features = self.ask(req::GET_FEATURES, &[]).unwrap().number().unwrap();
        assert_ne!(features & PROTOCOL_FEATURES, 0);
        self.ask(req::GET_PROTOCOL_FEATURES, &[]).unwrap();
        self.tell(
            req::SET_PROTOCOL_FEATURES,
            &[if acks { PROTOCOL } else { PROTOCOL & !(1 << 3) }],
        );
        self.acks = acks;
        self.tell(req::SET_FEATURES, &[VERSION_1 | PROTOCOL_FEATURES]);
    }

    /// One region at `guest`, of a file.
    pub(crate) fn region(&mut self, file: RawFd, guest: u64, size: u64, user: u64, offset: u64) {
        self.tell_with(
            req::SET_MEM_TABLE,
            &words(&[1, guest, size, user, offset]),
            &[file],
        );
    }

    pub(crate) fn ram(&mut self) {
        self.greet();
        let file = self.memory.as_raw_fd();
        self.region(file, 0, RAM, 0, 0);
    }

    pub(crate) fn fd_of(&mut self, request: u32, fd: RawFd) {
        self.tell_with(request, &words(&[0]), &[fd]);
    }

    pub(crate) fn describe(&mut self) {
        self.tell(req::SET_VRING_NUM, &[16 << 32]);
        self.tell(req::SET_VRING_BASE, &[0]);
        self.tell(req::SET_VRING_ADDR, &[0, TABLE, USED, AVAILABLE, 0]);
        let (call, error) = (self.call.as_raw_fd(), self.error.as_raw_fd());
        self.fd_of(req::SET_VRING_CALL, call);
        self.fd_of(req::SET_VRING_ERR, error);
    }

    pub(crate) fn go(&mut self) {
        let kick = self.kick.as_raw_fd();
        self.fd_of(req::SET_VRING_KICK, kick);
        self.tell(req::SET_VRING_ENABLE, &[1 << 32]);
    }

    /// Everything up to a running queue 0.
    pub(crate) fn run(&mut self) {
        self.ram();
        self.describe();
        self.go();
    }

    /// Makes one chain available that every device gives back or complains about: 64 readable bytes, 64 writable ones.
    pub(crate) fn offer(&mut self) {
        let mut table = words(&[0x4000, 64 | 1 << 32 | 1 << 48]);
        table.extend(words(&[0x5000, 64 | 2 << 32]));
        self.memory.write_all_at(&table, TABLE).unwrap();
        self.memory
            .write_all_at(&[0, 0, 1, 0, 0, 0], AVAILABLE)
            .unwrap();
        self.kick.write(1).unwrap();
    }

    /// The queue is declared broken.
    pub(crate) fn wait_broken(&self) {
        let ready = readable(&[self.error.as_fd()], Deadline::after(LIMIT)).unwrap();
        assert!(ready.is_some(), "the queue is not declared broken");
    }

    /// Each message waits for its turn of the loop, so that kicks before it have been served.
    pub(crate) fn turns(&mut self) {
        for _ in 0..3 {
            let _ = self.ask(req::GET_FEATURES, &[]);
        }
    }
}

pub(crate) fn open(path: &str, flags: i32) -> OwnedFd {
    OpenOptions::new()
        .read(true)
        .custom_flags(flags)
        .open(path)
        .unwrap()
        .into()
}

/// Memory of `fd` in the table.
#[allow(clippy::needless_pass_by_value)] // cases make it for this alone
pub(crate) fn table_of(f: &mut Front, fd: OwnedFd) {
    f.greet();
    f.region(fd.as_raw_fd(), 0, 0x1000, 0, 0);
}

pub(crate) fn full_pipe() -> (OwnedFd, OwnedFd) {
    let (reader, writer) = std::io::pipe().unwrap();
    let (reader, writer) = (OwnedFd::from(reader), OwnedFd::from(writer));
    let flags = |flags| nix::fcntl::fcntl(&writer, nix::fcntl::FcntlArg::F_SETFL(flags)).unwrap();
    flags(nix::fcntl::OFlag::O_NONBLOCK);
    while nix::unistd::write(&writer, &[0; 4096]).is_ok() {}
    flags(nix::fcntl::OFlag::empty());
    (reader, writer)
}

pub(crate) fn bare(f: &mut Front, request: u32, flags: u32, size: u32) {
    f.raw(&frame(request, flags, size, &[]), &[]);
}

/// `size`, `offset`, queues, entries.
pub(crate) fn inflight(size: u64, offset: u64, queues: u16, entries: u16) -> Vec<u8> {
    let mut body = words(&[size, offset]);
    body.extend(queues.to_le_bytes());
    body.extend(entries.to_le_bytes());
    body.extend([0; 4]);
    body
}

pub(crate) fn config(offset: u32, size: u32, bytes: usize) -> Vec<u8> {
    let mut body = Vec::new();
    for word in [offset, size, 0] {
        body.extend(word.to_le_bytes());
    }
    body.resize(12 + bytes, 0);
    body
}

pub(crate) fn regions(f: &mut Front, list: &[[u64; 4]]) {
    f.greet();
    let fds = vec![f.memory.as_raw_fd(); list.len()];
    let body = [vec![list.len() as u64], list.concat()].concat();
    f.tell_with(req::SET_MEM_TABLE, &words(&body), &fds);
}
