//! A device process for tests: a thread that answers vhost-user messages by a [`Script`], truthful or not.
//!
//! It is written against the protocol's text and not with the code under test, so that an error in one of them shows.

#![allow(unsafe_code)] // received descriptors are numbers

use std::io::{IoSlice, IoSliceMut};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::net::UnixStream;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::thread::JoinHandle;

use ipc::spec::DeviceSpec;
use ipc::spec::block::BlockSpec;
use nix::sys::socket::{ControlMessage, ControlMessageOwned, MsgFlags, recvmsg, sendmsg};
use vm_memory::{FileOffset, GuestAddress, GuestMemoryMmap, GuestRegionMmap, MmapRegion};

use super::remote::{Handshake, RemoteDevice, RemoteError};

// Request numbers of the vhost-user protocol.
pub(super) const GET_FEATURES: u32 = 1;
pub(super) const SET_FEATURES: u32 = 2;
pub(super) const SET_MEM_TABLE: u32 = 5;
pub(super) const SET_VRING_NUM: u32 = 8;
pub(super) const SET_VRING_ADDR: u32 = 9;
pub(super) const SET_VRING_BASE: u32 = 10;
pub(super) const GET_VRING_BASE: u32 = 11;
pub(super) const SET_VRING_KICK: u32 = 12;
pub(super) const SET_VRING_CALL: u32 = 13;
pub(super) const SET_VRING_ERR: u32 = 14;
pub(super) const GET_PROTOCOL_FEATURES: u32 = 15;
pub(super) const SET_PROTOCOL_FEATURES: u32 = 16;
pub(super) const GET_QUEUE_NUM: u32 = 17;
pub(super) const SET_VRING_ENABLE: u32 = 18;
pub(super) const GET_CONFIG: u32 = 24;
pub(super) const SET_CONFIG: u32 = 25;
pub(super) const GET_INFLIGHT_FD: u32 = 31;
pub(super) const SET_INFLIGHT_FD: u32 = 32;
pub(super) const RESET_DEVICE: u32 = 34;

/// Offered: VERSION_1, PROTOCOL_FEATURES, EVENT_IDX, NOTIFICATION_DATA (must be hidden), VIRTIO_BLK_F_FLUSH, legacy bit 24.
pub(super) const FEATURES: u64 = 1 << 32 | 1 << 30 | 1 << 29 | 1 << 38 | 1 << 9 | 1 << 24;
/// MQ, REPLY_ACK, CONFIG, RESET_DEVICE.
pub(super) const PROTOCOL: u64 = 1 | 1 << 3 | 1 << 9 | 1 << 13;

/// What to do instead of the right thing.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Misdeed {
    /// Not answer, and stay.
    Silence,
    /// Close the socket.
    Close,
    /// Answer with this header (request, flags, size) and so many zero bytes.
    Reply([u32; 3], usize),
    /// Answer a proper acknowledgement that says no.
    Refuse,
    /// Send descriptors along.
    Descriptors,
}

/// How the fake behaves.
#[derive(Debug, Clone)]
pub(super) struct Script {
    pub(super) features: u64,
    pub(super) protocol: u64,
    pub(super) queues: u64,
    pub(super) config: Vec<u8>,
    pub(super) misdeed: Option<(u32, Misdeed)>,
}

impl Default for Script {
    fn default() -> Self {
        let mut config = vec![0; 256];
        config[..8].copy_from_slice(&0x1122_3344_5566_7788u64.to_le_bytes());
        Self {
            features: FEATURES,
            protocol: PROTOCOL,
            queues: 2,
            config,
            misdeed: None,
        }
    }
}

/// A request as it arrived.
#[derive(Debug)]
pub(super) struct Seen {
    pub(super) request: u32,
    pub(super) body: Vec<u8>,
    pub(super) fds: Vec<OwnedFd>,
}

/// A running fake.
#[derive(Debug)]
pub(super) struct FakeDevice {
    pub(super) seen: Receiver<Seen>,
    thread: JoinHandle<()>,
}

impl FakeDevice {
    /// Starts the fake; gives the front end's socket.
    pub(super) fn start(script: Script) -> (UnixStream, Self) {
        let (front, back) = UnixStream::pair().unwrap();
        let (sender, seen) = channel();
        let thread = std::thread::spawn(move || serve(&back, script, &sender));
        (front, Self { seen, thread })
    }

    /// All requests so far, after the front end is gone.
    pub(super) fn requests(self) -> Vec<u32> {
        self.thread.join().unwrap();
        self.seen.iter().map(|seen| seen.request).collect()
    }

    /// Requests that have arrived by now, by number.
    pub(super) fn arrived(&self) -> Vec<Seen> {
        self.seen.try_iter().collect()
    }
}

/// The spec of a block device with two queues of 128 entries.
pub(super) fn spec() -> DeviceSpec {
    DeviceSpec::Block(BlockSpec {
        id: "disk0".into(),
        readonly: false,
        direct: false,
        serial: String::new(),
        num_queues: 2,
        queue_size: 128,
        io: Default::default(),
    })
}

/// A device behind a fake that follows `script`.
pub(super) fn connect(script: Script) -> (Result<RemoteDevice, RemoteError>, FakeDevice) {
    let (front, fake) = FakeDevice::start(script);
    (
        Handshake::begin(front, &spec()).and_then(Handshake::finish),
        fake,
    )
}

/// 1 MiB of guest RAM at 0 and 1 MiB at 4 GiB, from one file.
pub(super) fn memory() -> GuestMemoryMmap<()> {
    let file = std::sync::Arc::new(tempfile::tempfile().unwrap());
    file.set_len(2 << 20).unwrap();
    let region = |address, offset| {
        let offset = FileOffset::from_arc(file.clone(), offset);
        let mapping = MmapRegion::from_file(offset, 1 << 20).unwrap();
        GuestRegionMmap::new(mapping, GuestAddress(address)).unwrap()
    };
    GuestMemoryMmap::from_regions(vec![region(0, 0), region(4 << 30, 1 << 20)]).unwrap()
}

fn serve(socket: &UnixStream, mut script: Script, seen: &Sender<Seen>) {
    let mut acks = false;
    while let Some(message) = receive(socket) {
        let (request, need_reply) = (message.request, message.flags & 8 != 0);
        let misdeed = script
            .misdeed
            .filter(|(at, _)| *at == request)
            .map(|(_, what)| what);
        let body = message.body.clone();
        let _ = seen.send(Seen {
            request,
            body: message.body,
            fds: message.fds,
        });
        let value = match request {
            GET_FEATURES => Some(script.features.to_le_bytes().to_vec()),
            GET_PROTOCOL_FEATURES => Some(script.protocol.to_le_bytes().to_vec()),
            GET_QUEUE_NUM => Some(script.queues.to_le_bytes().to_vec()),
            GET_VRING_BASE => Some(body.clone()),
            GET_CONFIG => {
                let mut reply = vec![0; 4];
                reply.extend((script.config.len() as u32).to_le_bytes());
                reply.extend([0; 4]);
                reply.extend(&script.config);
                Some(reply)
            }
            GET_INFLIGHT_FD => {
                let mut reply = 4096u64.to_le_bytes().to_vec();
                reply.extend(&body[8..]);
                Some(reply)
            }
            SET_PROTOCOL_FEATURES => {
                acks = true;
                None
            }
            SET_CONFIG => {
                if misdeed.is_none() {
                    let at = u32::from_le_bytes(body[..4].try_into().unwrap()) as usize;
                    script.config[at..at + body.len() - 12].copy_from_slice(&body[12..]);
                }
                None
            }
            _ => None,
        };
        assert!(
            !need_reply || acks,
            "acknowledgement asked for before it was negotiated"
        );
        assert!(
            !(need_reply && value.is_some()),
            "request {request} has a reply of its own"
        );
        let (mut header, mut reply) = match (value, need_reply) {
            (Some(value), _) => ([request, 5, value.len() as u32], value),
            (None, true) => ([request, 5, 8], vec![0; 8]),
            (None, false) => continue,
        };
        let mut fds = Vec::new();
        let file = tempfile::tempfile().unwrap();
        if request == GET_INFLIGHT_FD {
            fds.push(file.as_raw_fd());
        }
        match misdeed {
            None => {}
            Some(Misdeed::Silence) => continue,
            Some(Misdeed::Close) => return,
            Some(Misdeed::Reply(other, len)) => (header, reply) = (other, vec![0; len]),
            Some(Misdeed::Refuse) => reply[0] = 1,
            Some(Misdeed::Descriptors) => fds.extend([file.as_raw_fd(), file.as_raw_fd()]),
        }
        let mut bytes: Vec<u8> = header.iter().flat_map(|word| word.to_le_bytes()).collect();
        bytes.extend(reply);
        let rights = [ControlMessage::ScmRights(&fds)];
        let control = if fds.is_empty() { &[][..] } else { &rights[..] };
        let flags = MsgFlags::MSG_NOSIGNAL;
        if sendmsg::<()>(
            socket.as_raw_fd(),
            &[IoSlice::new(&bytes)],
            control,
            flags,
            None,
        )
        .is_err()
        {
            return;
        }
    }
}

struct Message {
    request: u32,
    flags: u32,
    body: Vec<u8>,
    fds: Vec<OwnedFd>,
}

fn receive(socket: &UnixStream) -> Option<Message> {
    let mut fds = Vec::new();
    let mut header = [0; 12];
    read_exact(socket, &mut header, &mut fds)?;
    let word = |at: usize| u32::from_le_bytes(header[at..at + 4].try_into().unwrap());
    assert!(word(8) <= 4096, "message of {} bytes", word(8));
    let mut body = vec![0; word(8) as usize];
    let with_header = fds.len();
    read_exact(socket, &mut body, &mut fds)?;
    assert_eq!(
        fds.len(),
        with_header,
        "descriptors must come with the header"
    );
    Some(Message {
        request: word(0),
        flags: word(4),
        body,
        fds,
    })
}

fn read_exact(socket: &UnixStream, mut buffer: &mut [u8], fds: &mut Vec<OwnedFd>) -> Option<()> {
    while !buffer.is_empty() {
        let mut control = nix::cmsg_space!([RawFd; 32]);
        let mut slices = [IoSliceMut::new(buffer)];
        let flags = MsgFlags::MSG_CMSG_CLOEXEC;
        let message =
            recvmsg::<()>(socket.as_raw_fd(), &mut slices, Some(&mut control), flags).ok()?;
        for message in message.cmsgs().unwrap() {
            if let ControlMessageOwned::ScmRights(received) = message {
                // SAFETY: the kernel made these descriptors for us with this message.
                fds.extend(
                    received
                        .into_iter()
                        .map(|fd| unsafe { OwnedFd::from_raw_fd(fd) }),
                );
            }
        }
        let read = message.bytes;
        if read == 0 {
            return None;
        }
        buffer = &mut buffer[read..];
    }
    Some(())
}
