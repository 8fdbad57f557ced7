//! # `harness`: a front end's messages to a device process
//!
//! The input is a list of vhost-user messages with descriptors from a small table of good and bad ones. The harness's own
//! loop serves them until the stream ends. Rings that get started that way are served from prepared guest memory.

use crate::bytes::Input;
use crate::once;
use device_host::{Chain, Device, DeviceFault, HostFault, Ring};
use nix::sys::epoll::{Epoll, EpollCreateFlags};
use nix::sys::eventfd::{EfdFlags, EventFd};
use nix::sys::memfd::{MFdFlags, memfd_create};
use nix::sys::socket::{ControlMessage, MsgFlags, sendmsg};
use std::fs::File;
use std::io::IoSlice;
use std::net::Shutdown;
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::os::unix::fs::OpenOptionsExt;
use std::os::unix::net::UnixStream;

const QUEUES: u16 = 3;
const QUEUE_SIZE: u16 = 64;
/// Bytes of the file that is guest memory.
const MEMORY: usize = 0x1_0000;
/// Bytes of an input; what a socket's buffers take without being read.
const MAX: usize = 8 * 1024;

/// Gives back what it gets; its configuration space can be written.
#[derive(Debug, Default)]
pub struct Echo {
    config: [u8; 32],
}

impl Device for Echo {
    fn features(&self) -> u64 {
        0xff
    }

    fn num_queues(&self) -> u16 {
        QUEUES
    }

    fn max_queue_size(&self) -> u16 {
        QUEUE_SIZE
    }

    fn accept(&mut self, _features: u64) -> Result<(), HostFault> {
        Ok(())
    }

    fn read_config(&self, offset: usize, out: &mut [u8]) {
        device_host::copy_config(&self.config, offset, out);
    }

    fn write_config(&mut self, offset: usize, data: &[u8]) {
        if let Some(part) = self
            .config
            .get_mut(offset..offset.saturating_add(data.len()))
        {
            part.copy_from_slice(data);
        }
    }

    fn process_queue(&mut self, ring: &mut Ring) -> Result<(), DeviceFault> {
        while let Some(Chain {
            token,
            mut readable,
            mut writable,
        }) = ring.pop()?
        {
            let mut copy = [0; 256];
            let len = readable.read(&mut copy);
            let written = writable.write(&copy[..len]);
            crate::planted!(written == 100);
            ring.complete(token, written as u32)?;
        }
        Ok(())
    }
}

/// Descriptors that a front end may send, whether they fit or not.
struct Table {
    fds: Vec<OwnedFd>,
    memory: File,
    inflight: File,
    _readers: Vec<OwnedFd>,
}

fn memfd(size: u64) -> File {
    let file = File::from(memfd_create(c"fuzz", MFdFlags::MFD_CLOEXEC).expect("memfd_create"));
    file.set_len(size).expect("ftruncate");
    file
}

impl Table {
    fn new() -> Self {
        let memory = memfd(MEMORY as u64);
        let inflight = memfd(0x2000);
        let open = |path: &str, flags| {
            File::options()
                .read(true)
                .custom_flags(flags)
                .open(path)
                .expect("open")
        };
        let read_only = format!("/proc/self/fd/{}", memory.as_raw_fd());
        let (pipe_read, pipe_write) = std::io::pipe().expect("pipe");
        let (full_read, full_write) = std::io::pipe().expect("pipe");
        nix::fcntl::fcntl(
            &full_write,
            nix::fcntl::FcntlArg::F_SETFL(nix::fcntl::OFlag::O_NONBLOCK),
        )
        .expect("fcntl");
        while nix::unistd::write(&full_write, &[0; 4096]).is_ok() {}
        nix::fcntl::fcntl(
            &full_write,
            nix::fcntl::FcntlArg::F_SETFL(nix::fcntl::OFlag::empty()),
        )
        .expect("fcntl");
        let event = |flags| EventFd::from_flags(flags).expect("eventfd");
        let full = event(EfdFlags::EFD_CLOEXEC);
        nix::unistd::write(&full, &(u64::MAX - 1).to_ne_bytes()).expect("eventfd");
        let (socket, other) = UnixStream::pair().expect("socketpair");
        Self {
            fds: vec![
                memory.try_clone().expect("dup").into(),
                event(EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK).into(),
                inflight.try_clone().expect("dup").into(),
                event(EfdFlags::EFD_CLOEXEC).into(),
                full.into(),
                pipe_read.into(),
                pipe_write.into(),
                full_write.into(),
                open("/", libc::O_PATH).into(),
                open(&read_only, 0).into(),
                memfd(100).into(),
                memfd(1 << 45).into(),
                open("/dev/null", 0).into(),
                open("/", libc::O_DIRECTORY).into(),
                Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC)
                    .expect("epoll")
                    .0,
                socket.into(),
            ],
            memory,
            inflight,
            _readers: vec![full_read.into(), other.into()],
        }
    }

    /// Three rings at the same place: two chains that are good, one that is not.
    fn prepare(&self) {
        let mut ram = vec![0; MEMORY];
        let mut describe = |index: usize, address: u64, len: u32, flags: u8, next: u8| {
            let raw = &mut ram[index * 16..index * 16 + 16];
            raw[..8].copy_from_slice(&address.to_le_bytes());
            raw[8..12].copy_from_slice(&len.to_le_bytes());
            (raw[12], raw[14]) = (flags, next);
        };
        describe(0, 0x4000, 100, 1, 1);
        describe(1, 0x5000, 0x1000, 2, 0);
        describe(2, 0x3000, 32, 4, 0);
        describe(3, 0x4000, 100, 1, 3);
        describe(0x300, 0x4000, 10, 1, 1);
        describe(0x301, 0x6000, 10, 2, 0);
        ram[0x1002] = 3;
        ram[0x1004..0x100a].copy_from_slice(&[0, 0, 2, 0, 3, 0]);
        nix::sys::uio::pwrite(&self.memory, &ram, 0).expect("pwrite");
    }
}

/// One message: header, body, descriptors.
fn message(input: &mut Input<'_>, table: &Table) -> (Vec<u8>, Vec<RawFd>) {
    let request = input.byte();
    let mode = input.byte();
    let fds = input.byte();
    let mut body = Vec::new();
    let items = usize::from(input.byte() % 64);
    match mode & 3 {
        // As it is.
        0 => body.extend(input.take(items)),
        // Numbers of 16 bits, shifted.
        1 => {
            for _ in 0..items {
                let value = u64::from(input.u16());
                body.extend((value << (input.byte() % 64)).to_le_bytes());
            }
        }
        // Two numbers of 32 bits: a queue and something small.
        2 => {
            for _ in 0..items {
                body.extend(u32::from(input.byte()).to_le_bytes());
                body.extend(u32::from(input.u16()).to_le_bytes());
            }
        }
        // A number of things, then numbers as above: a memory table.
        _ => {
            body.extend(u64::from(items as u32).to_le_bytes());
            for _ in 0..4 * items {
                body.extend((u64::from(input.byte()) << 12).to_le_bytes());
            }
        }
    }
    let mut flags = 1u32;
    if mode & 4 != 0 {
        flags |= 8;
    }
    if mode & 8 != 0 {
        flags ^= 1 << (mode >> 4);
    }
    let mut size = body.len() as u32;
    if mode & 0x80 != 0 {
        size = size.wrapping_add(u32::from(mode >> 4 & 7)).wrapping_sub(3);
    }
    let mut bytes = Vec::new();
    for word in [u32::from(request), flags, size] {
        bytes.extend(word.to_le_bytes());
    }
    bytes.extend(body);
    // A memory table needs one a region.
    let count = match (fds >> 4) & 7 {
        7 => items,
        count => usize::from(count),
    };
    let first = usize::from(fds & 15);
    let fds = (0..count).map(|_| table.fds[first].as_raw_fd()).collect();
    (bytes, fds)
}

/// One input.
pub fn run(data: &[u8]) {
    if data.len() > MAX {
        return;
    }
    once!(Table, Table::new(), |table: &mut Table| {
        table.prepare();
        let mut input = Input(data);
        // The in-flight region that the front end may pass on.
        let len = usize::from(input.byte());
        let region = input.take(len);
        nix::sys::uio::pwrite(&table.inflight, &[0; 256], 0).expect("pwrite");
        nix::sys::uio::pwrite(&table.inflight, region, 0).expect("pwrite");
        let (front, back) = UnixStream::pair().expect("socketpair");
        front.set_nonblocking(true).expect("fcntl");
        while !input.is_empty() {
            let (bytes, fds) = message(&mut input, table);
            let rights = [ControlMessage::ScmRights(&fds)];
            let control = if fds.is_empty() { &[][..] } else { &rights[..] };
            if sendmsg::<()>(
                front.as_raw_fd(),
                &[IoSlice::new(&bytes)],
                control,
                MsgFlags::MSG_NOSIGNAL,
                None,
            )
            .is_err()
            {
                break;
            }
        }
        front.shutdown(Shutdown::Write).expect("shutdown");
        let _ = device_host::fuzzing::serve(Echo::default(), back);
        // A front end that gets descriptors closes them; there is nothing else to check in answers of any order.
        drop(front);
    });
}
