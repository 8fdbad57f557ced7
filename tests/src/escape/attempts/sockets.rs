//! Sockets of every family, and where they lead.

use super::*;
use crate::escape::{Held, Which};
use libc::*;

const NO_FAMILY: &[i32] = &[EAFNOSUPPORT, ESOCKTNOSUPPORT, EPROTONOSUPPORT, EPERM];
const SURFACE: &str =
    "a socket of its own empty network namespace; what is left is the kernel's code behind it";

pub(super) const LIST: &[Attempt] = &[
    steps("tcp-loopback", tcp_loopback).refused(&[ENETUNREACH, EACCES, ECONNREFUSED]),
    steps("tcp-outside", tcp_outside).refused(&[ENETUNREACH, EACCES]),
    steps("tcp6-outside", tcp6_outside).refused(&[
        ENETUNREACH,
        EACCES,
        EADDRNOTAVAIL,
        EAFNOSUPPORT,
    ]),
    steps("tcp-listen", tcp_listen).refused(&[EACCES]),
    steps("udp-outside", udp_outside).refused(&[ENETUNREACH]),
    steps("unix-path", unix_path).refused(&[ENOENT, EACCES]),
    steps("unix-abstract", unix_abstract).refused(&[ECONNREFUSED, EPERM]),
    steps("unix-bind", unix_bind)
        .refused(&[EROFS, EACCES])
        .filter_only_in_fs("a socket in the shared folder, as mknod makes one"),
    steps("netlink-new-link", netlink_new_link),
    steps("netlink-audit", netlink_audit).refused(&[EPERM, EPROTONOSUPPORT, ECONNREFUSED, EAGAIN]),
    one(
        "netlink-uevent",
        SYS_socket,
        &[n(AF_NETLINK), n(SOCK_RAW), n(NETLINK_KOBJECT_UEVENT)],
    )
    .filter_only(SURFACE),
    one(
        "netlink-netfilter",
        SYS_socket,
        &[n(AF_NETLINK), n(SOCK_RAW), n(NETLINK_NETFILTER)],
    )
    .filter_only(SURFACE),
    one(
        "packet",
        SYS_socket,
        &[n(AF_PACKET), n(SOCK_RAW), n(0x0300)],
    ),
    one(
        "raw-ip",
        SYS_socket,
        &[n(AF_INET), n(SOCK_RAW), n(IPPROTO_RAW)],
    ),
    one(
        "raw-icmp",
        SYS_socket,
        &[n(AF_INET), n(SOCK_RAW), n(IPPROTO_ICMP)],
    ),
    one(
        "ping",
        SYS_socket,
        &[n(AF_INET), n(SOCK_DGRAM), n(IPPROTO_ICMP)],
    )
    .refused(&[EACCES, EPERM]),
    steps("vsock-host", vsock_host).either(
        &[EAFNOSUPPORT, ENODEV, EACCES],
        "no namespace has a vsock of its own: where the host has one, it answers",
    ),
    one("alg", SYS_socket, &[n(AF_ALG), n(SOCK_SEQPACKET), n(0)]).refused(NO_FAMILY),
    one("xdp", SYS_socket, &[n(AF_XDP), n(SOCK_RAW), n(0)]).refused(NO_FAMILY),
    one("pf-key", SYS_socket, &[n(AF_KEY), n(SOCK_RAW), n(2)]).refused(NO_FAMILY),
    one(
        "bluetooth",
        SYS_socket,
        &[n(AF_BLUETOOTH), n(SOCK_RAW), n(1)],
    )
    .refused(NO_FAMILY),
    one("can", SYS_socket, &[n(AF_CAN), n(SOCK_RAW), n(1)]).refused(NO_FAMILY),
    one("tipc", SYS_socket, &[n(AF_TIPC), n(SOCK_SEQPACKET), n(0)]).refused(NO_FAMILY),
    one("rds", SYS_socket, &[n(AF_RDS), n(SOCK_SEQPACKET), n(0)]).refused(NO_FAMILY),
    one("smc", SYS_socket, &[n(43), n(SOCK_STREAM), n(0)]).refused(NO_FAMILY),
    one("qipcrtr", SYS_socket, &[n(42), n(SOCK_DGRAM), n(0)]).refused(NO_FAMILY),
    one("sctp", SYS_socket, &[n(AF_INET), n(SOCK_STREAM), n(132)]).refused(NO_FAMILY),
    one("mptcp", SYS_socket, &[n(AF_INET), n(SOCK_STREAM), n(262)]).either(NO_FAMILY, SURFACE),
    steps("all-other-families", other_families).refused(NO_FAMILY),
    one(
        "socketpair",
        SYS_socketpair,
        &[n(AF_UNIX), n(SOCK_STREAM), n(0), Arg::Room(8)],
    )
    .confined_pair(),
    steps("forged-credentials", forged_credentials)
        .passes_pair()
        .granted_in_fs("it may give files to any user; nobody reads credentials on its socket"),
    one(
        "reconnect-own-socket",
        SYS_connect,
        &[
            Arg::Fd(Which::Socket),
            Arg::Bytes(b"\x01\0\0escape\0\0"),
            n(9),
        ],
    )
    .refused(&[EISCONN, ECONNREFUSED, EPERM]),
    one(
        "listen-on-own-socket",
        SYS_listen,
        &[Arg::Fd(Which::Socket), n(1)],
    )
    .refused(&[EINVAL]),
    one(
        "attach-socket-filter",
        SYS_setsockopt,
        &[
            Arg::Fd(Which::Socket),
            n(SOL_SOCKET),
            n(SO_ATTACH_BPF),
            Arg::Bytes(&[1, 0, 0, 0]),
            n(4),
        ],
    )
    .refused(&[EBADF, EINVAL, EPERM]),
    one(
        "send-buffer-by-force",
        SYS_setsockopt,
        &[
            Arg::Fd(Which::Socket),
            n(SOL_SOCKET),
            n(SO_SNDBUFFORCE),
            Arg::Bytes(&[0, 0, 0, 0x40]),
            n(4),
        ],
    ),
];

impl Attempt {
    /// A pair of connected sockets leads nowhere.
    const fn confined_pair(self) -> Self {
        self.filter_only("both ends are its own")
    }

    /// `sendmsg` is what a device answers with; the kernel looks at what is in it.
    const fn passes_pair(self) -> Self {
        // The latter where user 0 is nobody inside.
        self.refused(&[EPERM, EINVAL]).passes()
    }
}

fn socket(m: &mut dyn Machine, family: i32, kind: i32, protocol: i32) -> Result<u64, Stop> {
    m.call(SYS_socket, &[family as u64, kind as u64, protocol as u64])
}

/// `struct sockaddr_in`.
fn inet(address: [u8; 4], port: u16) -> Vec<u8> {
    let mut bytes = vec![AF_INET as u8, 0];
    bytes.extend(port.to_be_bytes());
    bytes.extend(address);
    bytes.extend([0; 8]);
    bytes
}

fn connect(m: &mut dyn Machine, fd: u64, address: &[u8]) -> Result<Verdict, Stop> {
    let at = m.put(address)?;
    m.call(SYS_connect, &[fd, at, address.len() as u64])?;
    Ok(Verdict::Through(fd))
}

fn tcp_loopback(m: &mut dyn Machine, _: &Held) -> Result<Verdict, Stop> {
    let fd = socket(m, AF_INET, SOCK_STREAM, 0)?;
    connect(m, fd, &inet([127, 0, 0, 1], 22))
}

fn tcp_outside(m: &mut dyn Machine, _: &Held) -> Result<Verdict, Stop> {
    let fd = socket(m, AF_INET, SOCK_STREAM, 0)?;
    connect(m, fd, &inet([192, 0, 2, 1], 80))
}

fn tcp6_outside(m: &mut dyn Machine, _: &Held) -> Result<Verdict, Stop> {
    let fd = socket(m, AF_INET6, SOCK_STREAM, 0)?;
    let mut address = vec![AF_INET6 as u8, 0, 0, 80, 0, 0, 0, 0, 0x20, 1, 0x0d, 0xb8];
    address.extend([0; 11]);
    address.extend([1, 0, 0, 0, 0]);
    connect(m, fd, &address)
}

fn tcp_listen(m: &mut dyn Machine, _: &Held) -> Result<Verdict, Stop> {
    let fd = socket(m, AF_INET, SOCK_STREAM, 0)?;
    let address = inet([0; 4], 4711);
    let at = m.put(&address)?;
    m.call(SYS_bind, &[fd, at, address.len() as u64])?;
    m.call(SYS_listen, &[fd, 1]).map(Verdict::Through)
}

fn udp_outside(m: &mut dyn Machine, _: &Held) -> Result<Verdict, Stop> {
    let fd = socket(m, AF_INET, SOCK_DGRAM, 0)?;
    let address = inet([192, 0, 2, 1], 53);
    let (at, data) = (m.put(&address)?, m.put(b"loot")?);
    m.call(SYS_sendto, &[fd, data, 4, 0, at, address.len() as u64])
        .map(Verdict::Through)
}

/// The suite listens there.
fn unix_path(m: &mut dyn Machine, _: &Held) -> Result<Verdict, Stop> {
    let fd = socket(m, AF_UNIX, SOCK_STREAM, 0)?;
    connect(m, fd, b"\x01\0/run/stratovirt-escape\0")
}

/// The suite listens at this name too.
fn unix_abstract(m: &mut dyn Machine, _: &Held) -> Result<Verdict, Stop> {
    let fd = socket(m, AF_UNIX, SOCK_STREAM, 0)?;
    connect(m, fd, b"\x01\0\0stratovirt-escape")
}

fn unix_bind(m: &mut dyn Machine, _: &Held) -> Result<Verdict, Stop> {
    let fd = socket(m, AF_UNIX, SOCK_STREAM, 0)?;
    let address = b"\x01\0/loot\0";
    let at = m.put(address)?;
    m.call(SYS_bind, &[fd, at, address.len() as u64])
        .map(Verdict::Through)
}

/// Sends a netlink message (netlink(7)) that asks for an acknowledgement; 0 in that is a yes.
fn netlink(
    m: &mut dyn Machine,
    protocol: i32,
    kind: u16,
    flags: u16,
    length: u32,
) -> Result<Verdict, Stop> {
    let fd = socket(m, AF_NETLINK, SOCK_RAW, protocol)?;
    let mut message = length.to_ne_bytes().to_vec();
    message.extend(kind.to_ne_bytes());
    message.extend((flags | (NLM_F_REQUEST | NLM_F_ACK) as u16).to_ne_bytes());
    message.resize(length as usize, 0);
    let at = m.put(&message)?;
    m.call(SYS_sendto, &[fd, at, u64::from(length), 0, 0, 0])?;
    let answer = m.put(&[0; 128])?;
    m.call(SYS_recvfrom, &[fd, answer, 128, MSG_DONTWAIT as u64, 0, 0])?;
    // struct nlmsghdr, 16 bytes, then struct nlmsgerr, which begins with the error number.
    let bytes = m.get(answer, 20)?;
    match i32::from_ne_bytes([bytes[16], bytes[17], bytes[18], bytes[19]]) {
        0 => Ok(Verdict::Through(fd)),
        error => Err(Stop::Errno(-error)),
    }
}

/// `RTM_NEWLINK`: rtnetlink(7).
fn netlink_new_link(m: &mut dyn Machine, _: &Held) -> Result<Verdict, Stop> {
    netlink(m, NETLINK_ROUTE, 16, NLM_F_CREATE as u16, 32)
}

/// `AUDIT_SET`: include/uapi/linux/audit.h.
fn netlink_audit(m: &mut dyn Machine, _: &Held) -> Result<Verdict, Stop> {
    netlink(m, NETLINK_AUDIT, 1001, 0, 56)
}

/// The host's vsock is no part of any namespace: family 40, address 2.
fn vsock_host(m: &mut dyn Machine, _: &Held) -> Result<Verdict, Stop> {
    let fd = socket(m, AF_VSOCK, SOCK_STREAM, 0)?;
    let mut address = vec![40, 0, 0, 0, 22, 0, 0, 0, 2, 0, 0, 0];
    address.extend([0; 4]);
    match connect(m, fd, &address) {
        // Somebody was there to refuse.
        Err(Stop::Errno(ECONNRESET | ECONNREFUSED | ETIMEDOUT)) => Ok(Verdict::Through(fd)),
        other => other,
    }
}

/// Families that no other attempt is about.
fn other_families(m: &mut dyn Machine, _: &Held) -> Result<Verdict, Stop> {
    let known = [
        AF_UNIX,
        AF_INET,
        AF_INET6,
        AF_NETLINK,
        AF_PACKET,
        AF_VSOCK,
        AF_ALG,
        AF_XDP,
        AF_KEY,
        AF_BLUETOOTH,
        AF_CAN,
        AF_TIPC,
        AF_RDS,
        43,
        42,
    ];
    let mut last = Stop::Errno(EAFNOSUPPORT);
    for family in (0..48).filter(|f| !known.contains(f)) {
        for kind in [SOCK_STREAM, SOCK_DGRAM, SOCK_RAW, SOCK_SEQPACKET] {
            match socket(m, family, kind, 0) {
                Ok(_) => return Ok(Verdict::Through(family as u64)),
                Err(Stop::Gone) => return Err(Stop::Gone),
                Err(stop) => last = stop,
            }
        }
    }
    Err(last)
}

/// `SCM_CREDENTIALS` that say user 0 (unix(7)).
fn forged_credentials(m: &mut dyn Machine, held: &Held) -> Result<Verdict, Stop> {
    let data = m.put(b"x")?;
    let buffer = m.put(&words(&[data, 1]))?;
    // struct cmsghdr: 28 bytes, SOL_SOCKET, SCM_CREDENTIALS; then pid 1, user 0, group 0.
    let control = m.put(&words(&[28, 1 | 2 << 32, 1, 0]))?;
    let message = m.put(&words(&[0, 0, buffer, 1, control, 32, 0]))?;
    m.call(
        SYS_sendmsg,
        &[held.socket as u64, message, MSG_NOSIGNAL as u64],
    )
    .map(Verdict::Through)
}
