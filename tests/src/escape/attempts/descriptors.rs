//! What can be done to descriptors that the process has.

use super::*;
use crate::escape::{Expect, Held, Jail, Which};
use libc::*;

/// A tap says the latter to whatever it does not know.
const NOT_OF_THIS_KIND: &[i32] = &[ENOTTY, EINVAL];
const NOT_ALLOWED: &[i32] = &[ENOTTY, EPERM, EBADF, EINVAL, EOPNOTSUPP, EACCES];
/// A tap asks nobody who has its descriptor for a right.
const TAP: &str =
    "the tap's kind of descriptor asks for no right; what is changed is this VM's own interface";
const OWN_QUEUE: &str = "a queue of its own tap: packets stop, for this guest";

pub(super) const LIST: &[Attempt] = &[
    each("kvm-version", SYS_ioctl, &[n(0xae00), NULL]).refused(NOT_OF_THIS_KIND),
    each("kvm-create-vm", SYS_ioctl, &[n(0xae01), NULL]).refused(NOT_OF_THIS_KIND),
    each("kvm-run", SYS_ioctl, &[n(0xae80), NULL])
        .refused(NOT_OF_THIS_KIND)
        // A vCPU's thread does just that, and comes back when its guest has something to tell.
        .only(&[
            Jail::Block,
            Jail::Qcow2,
            Jail::Net,
            Jail::Fs,
            Jail::Main,
            Jail::Qmp,
            Jail::Window,
            Jail::Mover,
        ]),
    each("vhost-owner", SYS_ioctl, &[n(0xaf01), NULL]).refused(NOT_OF_THIS_KIND),
    each(
        "terminal-input",
        SYS_ioctl,
        &[n(TIOCSTI as i32), Arg::Bytes(b"x")],
    )
    .refused(NOT_OF_THIS_KIND),
    each("terminal-control", SYS_ioctl, &[n(TIOCSCTTY as i32), n(1)]).refused(NOT_OF_THIS_KIND),
    each(
        "terminal-selection",
        SYS_ioctl,
        &[n(0x541c), Arg::Bytes(&[2; 16])],
    )
    .refused(NOT_OF_THIS_KIND),
    each(
        "immutable-flag",
        SYS_ioctl,
        &[
            Arg::N(0x4008_6602),
            Arg::Bytes(&[0x10, 0, 0, 0, 0, 0, 0, 0]),
        ],
    )
    .refused(NOT_ALLOWED),
    each(
        "freeze-file-system",
        SYS_ioctl,
        &[Arg::N(0xc004_5877), NULL],
    )
    .refused(NOT_ALLOWED),
    each(
        "trim-file-system",
        SYS_ioctl,
        &[Arg::N(0xc018_5879), Arg::Room(24)],
    )
    .refused(NOT_ALLOWED),
    each(
        "clone-range",
        SYS_ioctl,
        &[Arg::N(0x4004_9409), Arg::Fd(Which::Ram)],
    )
    .refused(&[ENOTTY, EXDEV, EINVAL, EBADF, EOPNOTSUPP, EPERM, EISDIR]),
    each("block-set-read-only", SYS_ioctl, &[n(0x125d), Arg::Room(4)]).refused(NOT_ALLOWED),
    each("block-discard", SYS_ioctl, &[n(0x1277), Arg::Room(16)]).refused(NOT_ALLOWED),
    each("block-reread-partitions", SYS_ioctl, &[n(0x125f), NULL]).refused(NOT_ALLOWED),
    each("scsi-command", SYS_ioctl, &[n(0x2285), Arg::Room(128)]).refused(NOT_ALLOWED),
    each("input-grab", SYS_ioctl, &[Arg::N(0x4004_4590), n(1)]).refused(NOT_OF_THIS_KIND),
    each(
        "loop-configure",
        SYS_ioctl,
        &[n(0x4c00), Arg::Fd(Which::Ram)],
    )
    .refused(NOT_OF_THIS_KIND),
    each(
        "interface-flags",
        SYS_ioctl,
        &[n(SIOCSIFFLAGS as i32), Arg::Room(40)],
    )
    .refused(&[ENOTTY, ENODEV, EPERM, EINVAL]),
    one(
        "tap-attach-to-other",
        SYS_ioctl,
        &[
            Arg::Fd(Which::Backend),
            Arg::N(0x4004_54ca),
            Arg::Bytes(OTHER_TAP),
        ],
    )
    .refused(&[EINVAL, EPERM, EBUSY, EEXIST])
    .only(&[Jail::Net]),
    one(
        "tap-owner",
        SYS_ioctl,
        &[Arg::Fd(Which::Backend), Arg::N(0x4004_54cc), n(1000)],
    )
    .filter_only(TAP)
    .only(&[Jail::Net]),
    one(
        "tap-persist",
        SYS_ioctl,
        &[Arg::Fd(Which::Backend), Arg::N(0x4004_54cb), n(0)],
    )
    .filter_only(TAP)
    .only(&[Jail::Net]),
    one(
        "tap-address",
        SYS_ioctl,
        &[Arg::Fd(Which::Backend), n(0x8924), Arg::Bytes(ADDRESS)],
    )
    .filter_only(TAP)
    .only(&[Jail::Net]),
    one(
        "tap-detach-queue",
        SYS_ioctl,
        &[
            Arg::Fd(Which::Backend),
            Arg::N(0x4004_54d9),
            Arg::Bytes(DETACH),
        ],
    )
    .refused(&[EINVAL, EPERM])
    .only(&[Jail::Net]),
    one(
        "tap-filter",
        SYS_ioctl,
        &[Arg::Fd(Which::Backend), Arg::N(0x4010_54d5), Arg::Room(16)],
    )
    .refused(&[EINVAL, EPERM])
    .only(&[Jail::Net]),
    one(
        "tap-carrier",
        SYS_ioctl,
        &[Arg::Fd(Which::Backend), Arg::N(0x4004_54e2), Arg::Room(4)],
    )
    .filter_only(OWN_QUEUE)
    .only(&[Jail::Net]),
    one(
        "tap-bpf",
        SYS_ioctl,
        &[
            Arg::Fd(Which::Backend),
            Arg::N(0x8004_54e0),
            Arg::Bytes(&[1, 0, 0, 0]),
        ],
    )
    .refused(&[EBADF, EINVAL])
    .only(&[Jail::Net]),
    one(
        "tap-namespace",
        SYS_ioctl,
        &[Arg::Fd(Which::Backend), n(0x54e3), NULL],
    )
    .only(&[Jail::Net]),
    one(
        "tap-link-type",
        SYS_ioctl,
        &[Arg::Fd(Which::Backend), Arg::N(0x4004_54cd), n(801)],
    )
    .refused(&[EBUSY, EPERM])
    .only(&[Jail::Net]),
    one(
        "write-read-only-image",
        SYS_pwrite64,
        &[Arg::Fd(Which::Backend), Arg::Bytes(b"loot"), n(4), n(0)],
    )
    .refused(&[EBADF])
    .passes()
    .on_readonly(),
    one(
        "punch-read-only-image",
        SYS_fallocate,
        &[Arg::Fd(Which::Backend), n(3), n(0), n(4096)],
    )
    .refused(&[EBADF])
    .passes()
    .on_readonly(),
    one(
        "cut-read-only-image",
        SYS_ftruncate,
        &[Arg::Fd(Which::Backend), n(0)],
    )
    .refused(&[EINVAL])
    .on_readonly(),
    one(
        "image-beyond-its-end",
        SYS_pwrite64,
        &[
            Arg::Fd(Which::Backend),
            Arg::Bytes(b"loot"),
            n(4),
            Arg::N(1 << 40),
        ],
    )
    .refused(&[EFBIG])
    .passes()
    .only(&[Jail::Block]),
    one(
        "image-grows-by-fallocate",
        SYS_fallocate,
        &[Arg::Fd(Which::Backend), n(0), n(0), Arg::N(1 << 40)],
    )
    .refused(&[EFBIG])
    .only(&[Jail::Block]),
    one(
        "image-grows-by-ftruncate",
        SYS_ftruncate,
        &[Arg::Fd(Which::Backend), Arg::N(1 << 40)],
    )
    .refused(&[EFBIG])
    .only(&[Jail::Block]),
    one(
        "append-flag",
        SYS_fcntl,
        &[Arg::Fd(Which::Backend), n(F_SETFL), n(O_APPEND | O_NOATIME)],
    )
    .refused(&[EPERM, EBADF]),
    one(
        "async-signals",
        SYS_fcntl,
        &[Arg::Fd(Which::Socket), n(F_SETFL), n(O_ASYNC)],
    )
    .filter_only("signals for itself"),
    one(
        "large-log-pipe",
        SYS_fcntl,
        &[Arg::Fd(Which::Log), n(F_SETPIPE_SZ), Arg::N(1 << 28)],
    )
    .refused(&[EPERM]),
    one(
        "watch-folder",
        SYS_fcntl,
        &[Arg::Fd(Which::Backend), n(1026), n(7)],
    )
    .refused(&[ENOTDIR, EBADF, EACCES]),
    one(
        "splice-from-socket",
        SYS_splice,
        &[
            Arg::Fd(Which::Socket),
            NULL,
            Arg::Fd(Which::Log),
            NULL,
            n(1),
            n(SPLICE_F_NONBLOCK as i32),
        ],
    )
    .refused(&[EAGAIN]),
    one(
        "vmsplice-read-log",
        SYS_vmsplice,
        &[
            Arg::Fd(Which::Log),
            Arg::Room(16),
            n(1),
            n(SPLICE_F_NONBLOCK as i32),
        ],
    )
    .filter_only("what any write to the log does"),
    one(
        "tee-log",
        SYS_tee,
        &[Arg::Fd(Which::Log), Arg::Fd(Which::Log), n(1), n(0)],
    )
    .refused(&[EINVAL, EBADF]),
    one(
        "read-log",
        SYS_read,
        &[Arg::Fd(Which::Log), Arg::Room(64), n(64)],
    )
    .refused(&[EBADF])
    .passes(),
    one(
        "ram-to-log",
        SYS_sendfile,
        &[Arg::Fd(Which::Log), Arg::Fd(Which::Ram), NULL, n(16)],
    )
    .filter_only("guest RAM and the log are its own"),
    one(
        "copy-file-range",
        SYS_copy_file_range,
        &[
            Arg::Fd(Which::Ram),
            NULL,
            Arg::Fd(Which::Log),
            NULL,
            n(16),
            n(0),
        ],
    )
    .refused(&[EINVAL, EXDEV])
    .passes_in_fs(),
    steps("epoll-of-foreign", epoll_nesting).refused(&[EBADF, EINVAL]),
    one(
        "pidfd-from-socket",
        SYS_getsockopt,
        &[
            Arg::Fd(Which::Log),
            n(SOL_SOCKET),
            n(77),
            Arg::Room(4),
            Arg::Bytes(&[4, 0, 0, 0]),
        ],
    )
    .refused(&[ENOTSOCK]),
    one(
        "dup-beyond-limit",
        SYS_fcntl,
        &[Arg::Fd(Which::Log), n(F_DUPFD_CLOEXEC), n(100_000)],
    )
    .refused(&[EINVAL])
    .passes(),
    one("dup3", SYS_dup3, &[Arg::Fd(Which::Log), n(100_000), n(0)]).refused(&[EBADF]),
    one(
        "quotactl-fd",
        443,
        &[
            Arg::Fd(Which::Backend),
            Arg::N(0x8000_0200),
            n(0),
            Arg::Room(64),
        ],
    )
    .refused(&[EPERM, EINVAL, ENODEV, ESRCH, ENOSYS, EROFS]),
    one("syncfs", SYS_syncfs, &[Arg::Fd(Which::Backend)])
        .filter_only("writes the host's own dirty pages of one file system back: time, no right")
        .but(
            Jail::Fs,
            Expect::KilledOr(&[EBADF]),
            Expect::Refused(&[EBADF]),
        ),
    one("sync-everything", SYS_sync, &[])
        .filter_only("writes the host's dirty pages back: time, no right"),
];

/// `struct ifreq`: another interface, `IFF_TAP | IFF_NO_PI`.
const OTHER_TAP: &[u8] =
    b"sv-other\0\0\0\0\0\0\0\0\x02\x10\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0";
/// `struct ifreq`: an Ethernet address.
const ADDRESS: &[u8] =
    b"\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\x01\0\x52\x54\0\0\0\x77\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0";
/// `struct ifreq`: `IFF_DETACH_QUEUE`.
const DETACH: &[u8] =
    b"\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\x00\x04\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0";

/// An epoll set takes only descriptors that are there.
fn epoll_nesting(m: &mut dyn Machine, held: &Held) -> Result<Verdict, Stop> {
    let event = m.put(&[1; 12])?;
    let set = m.call(SYS_epoll_create1, &[0])?;
    m.call(
        SYS_epoll_ctl,
        &[set, EPOLL_CTL_ADD as u64, held.socket as u64, event],
    )?;
    m.call(SYS_epoll_ctl, &[set, EPOLL_CTL_ADD as u64, 999, event])
        .map(Verdict::Through)
}
