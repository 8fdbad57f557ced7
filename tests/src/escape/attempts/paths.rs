//! Files by path, handle and magic link.

use super::*;
use crate::escape::{Held, Which};
use libc::*;

const NO_FILES: &[i32] = &[EACCES, ENOENT];
const OWN_FOLDER: &str = "the root is the shared folder";
const READ_ONLY: &[i32] = &[EROFS, EACCES];

pub(super) const LIST: &[Attempt] = &[
    one(
        "open-passwd",
        SYS_openat,
        &[HERE, Arg::Bytes(b"/etc/passwd\0"), n(O_RDONLY)],
    )
    .refused(NO_FILES)
    .passes_in_fs(),
    one(
        "open-passwd-old-call",
        SYS_open,
        &[Arg::Bytes(b"/etc/passwd\0"), n(O_RDONLY)],
    )
    .refused(NO_FILES),
    one(
        "open-proc-self-mem",
        SYS_openat,
        &[HERE, Arg::Bytes(b"/proc/self/mem\0"), n(O_RDWR)],
    )
    .refused(NO_FILES)
    .passes_in_fs(),
    one(
        "open-proc-1-root",
        SYS_openat,
        &[HERE, Arg::Bytes(b"/proc/1/root/etc/shadow\0"), n(O_RDONLY)],
    )
    .refused(NO_FILES)
    .passes_in_fs(),
    one(
        "open-proc-sysrq",
        SYS_openat,
        &[HERE, Arg::Bytes(b"/proc/sysrq-trigger\0"), n(O_WRONLY)],
    )
    .refused(NO_FILES)
    .passes_in_fs(),
    one(
        "open-core-pattern",
        SYS_openat,
        &[
            HERE,
            Arg::Bytes(b"/proc/sys/kernel/core_pattern\0"),
            n(O_WRONLY),
        ],
    )
    .refused(NO_FILES)
    .passes_in_fs(),
    one(
        "open-sys",
        SYS_openat,
        &[
            HERE,
            Arg::Bytes(b"/sys/kernel\0"),
            n(O_RDONLY | O_DIRECTORY),
        ],
    )
    .refused(NO_FILES)
    .passes_in_fs(),
    one(
        "open-dev-kvm",
        SYS_openat,
        &[HERE, Arg::Bytes(b"/dev/kvm\0"), n(O_RDWR)],
    )
    .refused(NO_FILES)
    .passes_in_fs(),
    one(
        "open-dev-mem",
        SYS_openat,
        &[HERE, Arg::Bytes(b"/dev/mem\0"), n(O_RDWR)],
    )
    .refused(NO_FILES)
    .passes_in_fs(),
    one(
        "open-dev-tun",
        SYS_openat,
        &[HERE, Arg::Bytes(b"/dev/net/tun\0"), n(O_RDWR)],
    )
    .refused(NO_FILES)
    .passes_in_fs(),
    one(
        "open-tty",
        SYS_openat,
        &[HERE, Arg::Bytes(b"/dev/tty\0"), n(O_RDWR)],
    )
    .refused(NO_FILES)
    .passes_in_fs(),
    one(
        "open-root",
        SYS_openat,
        &[HERE, Arg::Bytes(b"/\0"), n(O_RDONLY | O_DIRECTORY)],
    )
    .refused(NO_FILES)
    .granted_in_fs(OWN_FOLDER),
    one(
        "open-parent",
        SYS_openat,
        &[HERE, Arg::Bytes(b"..\0"), n(O_RDONLY | O_DIRECTORY)],
    )
    .refused(NO_FILES)
    .granted_in_fs(OWN_FOLDER),
    steps("open-path-and-climb", climb)
        .refused(NO_FILES)
        .passes_in_fs(),
    one(
        "openat2-parent",
        SYS_openat2,
        &[
            HERE,
            Arg::Bytes(b"../../../etc/passwd\0"),
            Arg::Room(24),
            n(24),
        ],
    )
    .refused(NO_FILES)
    .passes_in_fs(),
    one(
        "reopen-image-for-writing",
        SYS_openat,
        &[HERE, Arg::Bytes(b"/proc/self/fd/5\0"), n(O_RDWR)],
    )
    .refused(NO_FILES)
    .on_readonly(),
    one(
        "reopen-dev-fd",
        SYS_openat,
        &[HERE, Arg::Bytes(b"/dev/fd/5\0"), n(O_RDWR)],
    )
    .refused(NO_FILES)
    .passes_in_fs(),
    one(
        "create-file",
        SYS_creat,
        &[Arg::Bytes(b"/loot\0"), n(0o600)],
    )
    .refused(READ_ONLY)
    .filter_only_in_fs(OWN_FOLDER),
    one(
        "create-nameless",
        SYS_openat,
        &[HERE, Arg::Bytes(b"/\0"), n(O_TMPFILE | O_RDWR), n(0o600)],
    )
    .refused(READ_ONLY)
    .granted_in_fs(OWN_FOLDER),
    one(
        "mkdir",
        SYS_mkdirat,
        &[HERE, Arg::Bytes(b"/loot\0"), n(0o700)],
    )
    .refused(READ_ONLY)
    .granted_in_fs(OWN_FOLDER),
    one(
        "mknod-kmem",
        SYS_mknodat,
        &[
            HERE,
            Arg::Bytes(b"/kmem\0"),
            Arg::N((S_IFCHR | 0o600) as u64),
            n(0x102),
        ],
    )
    .refused(&[EPERM, EROFS, EACCES])
    .passes_in_fs(),
    one(
        "symlink",
        SYS_symlinkat,
        &[Arg::Bytes(b"/etc/passwd\0"), HERE, Arg::Bytes(b"/loot\0")],
    )
    .refused(READ_ONLY)
    .granted_in_fs(OWN_FOLDER),
    one(
        "link-image",
        SYS_linkat,
        &[
            Arg::Fd(Which::Backend),
            Arg::Bytes(b"\0"),
            HERE,
            Arg::Bytes(b"/loot\0"),
            n(AT_EMPTY_PATH),
        ],
    )
    .refused(&[ENOENT, EXDEV, EPERM, EACCES])
    .passes_in_fs(),
    one(
        "unlink",
        SYS_unlinkat,
        &[HERE, Arg::Bytes(b"/etc/passwd\0"), n(0)],
    )
    .refused(&[ENOENT, EROFS, EACCES])
    .passes_in_fs(),
    one(
        "rename",
        SYS_rename,
        &[Arg::Bytes(b"/etc/passwd\0"), Arg::Bytes(b"/loot\0")],
    )
    .refused(&[ENOENT, EROFS, EACCES]),
    one(
        "truncate-passwd",
        SYS_truncate,
        &[Arg::Bytes(b"/etc/passwd\0"), n(0)],
    )
    .refused(NO_FILES),
    one(
        "readlink-exe",
        SYS_readlink,
        &[Arg::Bytes(b"/proc/self/exe\0"), Arg::Room(256), n(256)],
    )
    .refused(NO_FILES),
    one(
        "stat-passwd",
        SYS_statx,
        &[
            HERE,
            Arg::Bytes(b"/etc/passwd\0"),
            n(0),
            n(0x7ff),
            Arg::Room(256),
        ],
    )
    .refused(NO_FILES)
    .passes_in_fs(),
    one(
        "access-passwd",
        SYS_faccessat2,
        &[HERE, Arg::Bytes(b"/etc/passwd\0"), n(R_OK), n(0)],
    )
    .refused(NO_FILES),
    one("chdir-etc", SYS_chdir, &[Arg::Bytes(b"/etc\0")]).refused(NO_FILES),
    one("fchdir-backend", SYS_fchdir, &[Arg::Fd(Which::Backend)])
        .refused(&[ENOTDIR, EACCES])
        .filter_only_in_fs(OWN_FOLDER),
    one("chroot", SYS_chroot, &[Arg::Bytes(b"/\0")]),
    one(
        "open-by-handle",
        SYS_open_by_handle_at,
        &[
            Arg::Fd(Which::Backend),
            Arg::Bytes(&[8, 0, 0, 0, 1, 0, 0, 0, 2, 0, 0, 0, 0, 0, 0, 0]),
            n(O_RDONLY),
        ],
    )
    .refused(&[EPERM, ESTALE, EBADF]),
    steps("handle-of-root", handle_of_root).refused(&[EPERM, ENOENT, EOPNOTSUPP]),
    one("fanotify", SYS_fanotify_init, &[n(0), n(O_RDONLY)]),
    steps("inotify-root", inotify_root).refused(NO_FILES),
    one(
        "execve-shell",
        SYS_execve,
        &[Arg::Bytes(b"/bin/sh\0"), NULL, NULL],
    )
    .refused(NO_FILES),
    one(
        "chmod-image",
        SYS_fchmod,
        &[Arg::Fd(Which::Backend), n(0o4777)],
    )
    .refused(&[EPERM, EACCES, EBADF, EROFS]),
    one(
        "chown-image",
        SYS_fchown,
        &[Arg::Fd(Which::Backend), n(1000), n(1000)],
    )
    .refused(&[EPERM, EACCES, EBADF, EROFS]),
    one(
        "xattr-image",
        SYS_fsetxattr,
        &[
            Arg::Fd(Which::Backend),
            Arg::Bytes(b"security.capability\0"),
            Arg::Room(20),
            n(20),
            n(0),
        ],
    )
    .refused(&[EPERM, EACCES, EBADF, EROFS, EINVAL]),
    one("acct", SYS_acct, &[Arg::Bytes(b"/loot\0")]),
];

/// A path descriptor needs no right to read; from it upwards.
fn climb(m: &mut dyn Machine, _: &Held) -> Result<Verdict, Stop> {
    let root = m.put(b"/\0")?;
    let folder = m.call(
        SYS_openat,
        &[AT_FDCWD as u64, root, (O_PATH | O_DIRECTORY) as u64],
    )?;
    let up = m.put(b"../../../../etc/passwd\0")?;
    m.call(SYS_openat, &[folder, up, O_RDONLY as u64])
        .map(Verdict::Through)
}

/// The root's handle alone is no right; opening it is.
fn handle_of_root(m: &mut dyn Machine, _: &Held) -> Result<Verdict, Stop> {
    let path = m.put(b"/\0")?;
    let mut header = vec![0; 136];
    header[0] = 128;
    let handle = m.put(&header)?;
    let id = m.put(&[0; 4])?;
    m.call(
        SYS_name_to_handle_at,
        &[AT_FDCWD as u64, path, handle, id, 0],
    )?;
    m.call(
        SYS_open_by_handle_at,
        &[AT_FDCWD as u64, handle, O_RDONLY as u64],
    )
    .map(Verdict::Through)
}

/// To see what others do with files, there must be files.
fn inotify_root(m: &mut dyn Machine, _: &Held) -> Result<Verdict, Stop> {
    let watcher = m.call(SYS_inotify_init1, &[0])?;
    let path = m.put(b"/etc\0")?;
    m.call(
        SYS_inotify_add_watch,
        &[watcher, path, u64::from(IN_ALL_EVENTS)],
    )
    .map(Verdict::Through)
}
