//! A tap in a network namespace of its own, with a packet socket on its other side.
//!
//! **Job.** [`Tap::in_new_namespace`]: the calling thread moves to a fresh network namespace, so that nothing of the host's
//! network takes part and nothing stays behind.
//! **Who is not trusted.** Nobody: this is test code.
//! **Why this way.** A packet socket sees and sends frames as they are, without addresses or routes.

#![allow(unsafe_code)] // taps and packet sockets

use std::fs::{File, OpenOptions};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};

use nix::errno::Errno;
use nix::sched::{CloneFlags, unshare};

/// Its name in its namespace.
pub const NAME: &str = "tap0";

#[repr(C)]
struct Ifreq {
    name: [u8; 16],
    value: [u8; 24],
}

impl Ifreq {
    fn new(value: i32) -> Self {
        let mut name = [0; 16];
        name[..NAME.len()].copy_from_slice(NAME.as_bytes());
        let mut bytes = [0; 24];
        bytes[..4].copy_from_slice(&value.to_ne_bytes());
        Self { name, value: bytes }
    }
}

fn check(result: libc::c_int) -> libc::c_int {
    Errno::result(result).unwrap()
}

fn bind(host: &File, index: i32, protocol: u16) {
    // SAFETY: all-zero bytes are a valid address structure, which holds integers only.
    let mut address: libc::sockaddr_ll = unsafe { std::mem::zeroed() };
    address.sll_family = libc::AF_PACKET as u16;
    address.sll_protocol = protocol;
    address.sll_ifindex = index;
    // SAFETY: the address and its size belong together.
    check(unsafe {
        libc::bind(
            host.as_raw_fd(),
            (&raw const address).cast(),
            size_of::<libc::sockaddr_ll>() as u32,
        )
    });
}

/// Whether the socket gets what the tap's reader sends, from now on.
pub fn listen(host: &File, on: bool) {
    // SAFETY: all-zero bytes are a valid address structure, which holds integers only.
    let mut address: libc::sockaddr_ll = unsafe { std::mem::zeroed() };
    let mut len = size_of::<libc::sockaddr_ll>() as u32;
    // SAFETY: the address and its size belong together.
    check(unsafe {
        let room = (&raw mut address).cast();
        libc::getsockname(host.as_raw_fd(), room, &raw mut len)
    });
    let protocol = if on { libc::ETH_P_ALL as u16 } else { 0 };
    bind(host, address.sll_ifindex, protocol.to_be());
}

/// See the module's page.
#[derive(Debug)]
pub struct Tap {
    /// Its queues.
    pub queues: Vec<OwnedFd>,
    /// A packet socket: what is written to it is received by the tap's reader, what that one writes can be read if it listens.
    pub host: File,
}

impl Tap {
    /// A tap with `queues` queues, up; `None`, with a line, where this process may not make one. `listens` is whether
    /// the socket gets what the tap's reader sends: each such frame is queued, which costs its sender time.
    pub fn in_new_namespace(queues: u16, listens: bool) -> Option<Self> {
        if !nix::unistd::geteuid().is_root() {
            eprintln!("skipped: a network namespace and a tap need root");
            return None;
        }
        unshare(CloneFlags::CLONE_NEWNET).unwrap();
        let queues = Self::attach(queues);
        // Nothing that the kernel sends by itself (neighbour discovery) shall come in between.
        std::fs::write(format!("/proc/sys/net/ipv6/conf/{NAME}/disable_ipv6"), "1").unwrap();
        let protocol = if listens {
            (libc::ETH_P_ALL as u16).to_be()
        } else {
            0
        };
        // SAFETY: numbers only; the new descriptor is ours.
        let host = unsafe {
            let kind = libc::SOCK_RAW | libc::SOCK_CLOEXEC;
            let fd = libc::socket(libc::AF_PACKET, kind, i32::from(protocol));
            File::from(OwnedFd::from_raw_fd(check(fd)))
        };
        let tap = Self { queues, host };
        tap.set(libc::SIOCSIFFLAGS, libc::IFF_UP | libc::IFF_RUNNING);
        let index = nix::net::if_::if_nametoindex(NAME).unwrap();
        bind(&tap.host, index as i32, protocol);
        Some(tap)
    }

    /// Opens `count` queues of the tap of this thread's namespace, which is made if there is none.
    pub fn attach(count: u16) -> Vec<OwnedFd> {
        let mut flags = libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR;
        if count > 1 {
            flags |= libc::IFF_MULTI_QUEUE;
        }
        (0..count)
            .map(|_| {
                let fd = OpenOptions::new()
                    .read(true)
                    .write(true)
                    .open("/dev/net/tun")
                    .unwrap();
                let request = Ifreq::new(flags);
                // SAFETY: the structure has the size that the kernel reads and writes.
                check(unsafe { libc::ioctl(fd.as_raw_fd(), libc::TUNSETIFF, &raw const request) });
                OwnedFd::from(fd)
            })
            .collect()
    }

    /// How many frames a queue holds for its reader.
    pub fn set_queue_len(&self, frames: i32) {
        self.set(libc::SIOCSIFTXQLEN, frames);
    }

    /// How long frames without segmentation may be, but for their Ethernet header.
    pub fn set_mtu(&self, bytes: i32) {
        self.set(libc::SIOCSIFMTU, bytes);
    }

    fn set(&self, request: libc::Ioctl, value: i32) {
        let argument = Ifreq::new(value);
        // SAFETY: the structure has the size that the kernel reads.
        check(unsafe { libc::ioctl(self.host.as_raw_fd(), request, &raw const argument) });
    }

    /// Frames that are sent from now on have a `virtio_net_hdr` of 10 bytes in front (`PACKET_VNET_HDR`), and pass
    /// by the queueing discipline.
    pub fn send_with_headers(&self) {
        // What waits in the tap's queue is charged to the socket.
        let room: libc::c_int = 512 << 20;
        let options = [
            (libc::SOL_PACKET, libc::PACKET_VNET_HDR, 1),
            (libc::SOL_PACKET, libc::PACKET_QDISC_BYPASS, 1),
            (libc::SOL_SOCKET, libc::SO_SNDBUFFORCE, room),
        ];
        for (level, option, value) in options {
            // SAFETY: the kernel reads one int.
            check(unsafe {
                libc::setsockopt(
                    self.host.as_raw_fd(),
                    level,
                    option,
                    (&raw const value).cast(),
                    size_of::<libc::c_int>() as u32,
                )
            });
        }
    }
}
