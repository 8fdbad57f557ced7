//! Namespaces and mounts.

use super::*;
use crate::escape::{Held, Which};
use libc::*;

const NEW_USERS: &[i32] = &[ENOSPC, EPERM];

pub(super) const LIST: &[Attempt] = &[
    one("unshare-user", SYS_unshare, &[n(CLONE_NEWUSER)]).refused(NEW_USERS),
    one("unshare-mount", SYS_unshare, &[n(CLONE_NEWNS)]),
    one("unshare-net", SYS_unshare, &[n(CLONE_NEWNET)]),
    one("unshare-pid", SYS_unshare, &[n(CLONE_NEWPID)]),
    one("unshare-ipc", SYS_unshare, &[n(CLONE_NEWIPC)]),
    one("unshare-uts", SYS_unshare, &[n(CLONE_NEWUTS)]),
    one("unshare-cgroup", SYS_unshare, &[n(CLONE_NEWCGROUP)]),
    one("unshare-time", SYS_unshare, &[n(0x80)]),
    one(
        "unshare-user-and-mount",
        SYS_unshare,
        &[n(CLONE_NEWUSER | CLONE_NEWNS)],
    )
    .refused(NEW_USERS),
    one(
        "clone-user",
        SYS_clone,
        &[n(CLONE_NEWUSER | SIGCHLD), NULL, NULL, NULL, NULL],
    )
    .refused(NEW_USERS),
    steps("be-root-of-new-users", root_of_new_users).refused(NEW_USERS),
    each("setns", SYS_setns, &[n(0)]).refused(&[EINVAL]),
    each(
        "setns-by-pidfd",
        SYS_setns,
        &[n(CLONE_NEWNS | CLONE_NEWNET)],
    )
    .refused(&[EINVAL]),
    each("namespace-of-socket", SYS_ioctl, &[n(0x894c), NULL]).refused(&[EPERM, ENOTTY, EINVAL]),
    each("namespace-of-tap", SYS_ioctl, &[n(0x54e3), NULL]).refused(&[EPERM, ENOTTY]),
    each("namespace-parent", SYS_ioctl, &[n(0xb702), NULL]).refused(&[ENOTTY, EINVAL]),
    one(
        "mount-tmpfs",
        SYS_mount,
        &[
            Arg::Bytes(b"x\0"),
            Arg::Bytes(b"/\0"),
            Arg::Bytes(b"tmpfs\0"),
            n(0),
            NULL,
        ],
    )
    .refused(&[EPERM, EACCES]),
    one(
        "mount-proc",
        SYS_mount,
        &[
            Arg::Bytes(b"x\0"),
            Arg::Bytes(b"/\0"),
            Arg::Bytes(b"proc\0"),
            n(0),
            NULL,
        ],
    )
    .refused(&[EPERM, EACCES]),
    one(
        "remount-writable",
        SYS_mount,
        &[
            NULL,
            Arg::Bytes(b"/\0"),
            NULL,
            Arg::N(MS_REMOUNT | MS_BIND),
            NULL,
        ],
    )
    .refused(&[EPERM, EACCES]),
    one(
        "unmount-root",
        SYS_umount2,
        &[Arg::Bytes(b"/\0"), n(MNT_DETACH)],
    ),
    one("fsopen", SYS_fsopen, &[Arg::Bytes(b"tmpfs\0"), n(0)]),
    one("fspick", SYS_fspick, &[HERE, Arg::Bytes(b"/\0"), n(0)]),
    one(
        "open-tree",
        SYS_open_tree,
        &[HERE, Arg::Bytes(b"/\0"), n(1)],
    ),
    one(
        "move-mount",
        SYS_move_mount,
        &[
            Arg::Fd(Which::Backend),
            Arg::Bytes(b"\0"),
            HERE,
            Arg::Bytes(b"/\0"),
            n(4),
        ],
    ),
    one(
        "mount-setattr",
        SYS_mount_setattr,
        &[
            HERE,
            Arg::Bytes(b"/\0"),
            n(0),
            Arg::Bytes(CLEAR_RDONLY),
            n(32),
        ],
    ),
    one(
        "pivot-root",
        SYS_pivot_root,
        &[Arg::Bytes(b"/\0"), Arg::Bytes(b"/\0")],
    ),
    one(
        "statmount",
        STATMOUNT_CALL,
        &[Arg::Bytes(STATMOUNT), Arg::Room(512), n(512), n(0)],
    )
    .refused(&[ENOENT, EPERM, ENOSYS]),
    one("hostname", SYS_sethostname, &[Arg::Bytes(b"loot"), n(4)]),
    one(
        "domain-name",
        SYS_setdomainname,
        &[Arg::Bytes(b"loot"), n(4)],
    ),
];

/// Not in this version of `libc`.
const STATMOUNT_CALL: i64 = 457;

/// `struct mount_attr`: clears `MOUNT_ATTR_RDONLY`.
const CLEAR_RDONLY: &[u8] = &{
    let mut attributes = [0u8; 32];
    attributes[8] = 1;
    attributes
};

/// `struct mnt_id_req`: size 24, mount 1, basic information.
const STATMOUNT: &[u8] = &{
    let mut request = [0u8; 24];
    request[0] = 24;
    // Unique ids begin behind 32 bits.
    request[8] = 1;
    request[12] = 1;
    request[16] = 2;
    request
};

/// User 0 of a user namespace of its own could mount, trace and configure networks in there: the wide side of the kernel.
fn root_of_new_users(m: &mut dyn Machine, _: &Held) -> Result<Verdict, Stop> {
    m.call(
        SYS_unshare,
        &[(CLONE_NEWUSER | CLONE_NEWNS | CLONE_NEWNET) as u64],
    )?;
    let kind = m.put(b"tmpfs\0")?;
    m.call(SYS_fsopen, &[kind, 0]).map(Verdict::Through)
}
