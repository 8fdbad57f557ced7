//! Other processes: seeing, stopping, reading and starting them.

use super::*;
use crate::escape::Held;
use libc::*;

const NOBODY_THERE: &[i32] = &[ESRCH, EPERM];
const JAILED_CHILD: &str =
    "a child has its parent's jail, and RLIMIT_NPROC bounds how many there are";

pub(super) const LIST: &[Attempt] = &[
    one(
        "ptrace-attach",
        SYS_ptrace,
        &[n(PTRACE_ATTACH as i32), n(2), NULL, NULL],
    )
    .refused(NOBODY_THERE),
    one(
        "ptrace-seize",
        SYS_ptrace,
        &[n(PTRACE_SEIZE as i32), n(2), NULL, NULL],
    )
    .refused(NOBODY_THERE),
    steps("vm-read", |m, _| of_other(m, SYS_process_vm_readv)).refused(NOBODY_THERE),
    steps("vm-write", |m, _| of_other(m, SYS_process_vm_writev)).refused(NOBODY_THERE),
    steps("kill-all", kill_all).refused(NOBODY_THERE),
    steps("kill-group", kill_group).confined(),
    steps("kill-parent", kill_parent).refused(NOBODY_THERE),
    one("kill-low-pid", SYS_kill, &[n(2), n(0)]).refused(NOBODY_THERE),
    one("tgkill-other", SYS_tgkill, &[n(2), n(2), n(0)]).refused(NOBODY_THERE),
    one("tkill-other", SYS_tkill, &[n(2), n(0)]).refused(NOBODY_THERE),
    one(
        "sigqueue-other",
        SYS_rt_sigqueueinfo,
        &[n(2), n(SIGUSR1), Arg::Room(128)],
    )
    .refused(NOBODY_THERE),
    one(
        "tgsigqueue-other",
        SYS_rt_tgsigqueueinfo,
        &[n(2), n(2), n(SIGUSR1), Arg::Room(128)],
    )
    .refused(NOBODY_THERE),
    one("pidfd-of-other", SYS_pidfd_open, &[n(2), n(0)]).refused(NOBODY_THERE),
    one(
        "pidfd-signal",
        SYS_pidfd_send_signal,
        &[Arg::Fd(super::super::Which::Socket), n(0), NULL, n(0)],
    )
    .refused(&[EBADF]),
    steps("pidfd-of-peer", pidfd_of_peer).refused(&[ENODATA, ESRCH, EINVAL, EPERM, ENOTSOCK]),
    one(
        "pidfd-getfd",
        SYS_pidfd_getfd,
        &[Arg::Fd(super::super::Which::Socket), n(3), n(0)],
    )
    .refused(&[EBADF]),
    one("kcmp-other", SYS_kcmp, &[n(1), n(2), n(0), n(0), n(0)]).refused(NOBODY_THERE),
    one(
        "process-madvise-other",
        SYS_process_madvise,
        &[
            Arg::Fd(super::super::Which::Socket),
            Arg::Room(16),
            n(1),
            n(21),
            n(0),
        ],
    )
    .refused(&[EBADF]),
    one(
        "process-mrelease-other",
        SYS_process_mrelease,
        &[Arg::Fd(super::super::Which::Socket), n(0)],
    )
    .refused(&[EBADF]),
    one(
        "limits-of-other",
        SYS_prlimit64,
        &[n(2), n(RLIMIT_NOFILE as i32), NULL, Arg::Room(16)],
    )
    .refused(NOBODY_THERE),
    one(
        "affinity-of-other",
        SYS_sched_setaffinity,
        &[n(2), n(8), Arg::Bytes(&[1, 0, 0, 0, 0, 0, 0, 0])],
    )
    .refused(NOBODY_THERE),
    one(
        "real-time",
        SYS_sched_setscheduler,
        &[n(0), n(SCHED_FIFO), Arg::Bytes(&[50, 0, 0, 0])],
    ),
    one(
        "real-time-deadline",
        SYS_sched_setattr,
        &[n(0), Arg::Bytes(DEADLINE), n(0)],
    ),
    one("nice-minus-20", SYS_setpriority, &[n(0), n(0), n(-20)]).refused(&[EACCES, EPERM]),
    one(
        "nice-of-all-of-the-user",
        SYS_setpriority,
        &[n(2), n(65534), n(19)],
    )
    .refused(&[ESRCH, EPERM, EACCES]),
    one("io-real-time", SYS_ioprio_set, &[n(1), n(0), n(1 << 13)]),
    one(
        "migrate-pages-other",
        SYS_migrate_pages,
        &[
            n(2),
            n(64),
            Arg::Bytes(&[1, 0, 0, 0, 0, 0, 0, 0]),
            Arg::Bytes(&[1, 0, 0, 0, 0, 0, 0, 0]),
        ],
    )
    .refused(&[ESRCH, EPERM, ENOSYS]),
    one(
        "move-pages-other",
        SYS_move_pages,
        &[n(2), n(0), NULL, NULL, NULL, n(0)],
    )
    .refused(&[ESRCH, EPERM, ENOSYS]),
    one(
        "robust-list-of-other",
        SYS_get_robust_list,
        &[n(2), Arg::Room(8), Arg::Room(8)],
    )
    .refused(NOBODY_THERE),
    one("join-process-group", SYS_setpgid, &[n(0), n(2)]).refused(NOBODY_THERE),
    one("fork", SYS_fork, &[]).filter_only(JAILED_CHILD),
    one(
        "vfork-by-clone",
        SYS_clone,
        &[n(SIGCHLD), NULL, NULL, NULL, NULL],
    )
    .filter_only(JAILED_CHILD),
    one("clone3", SYS_clone3, &[Arg::Bytes(CLONE3), n(88)])
        .filter_only(JAILED_CHILD)
        .answered(&[ENOSYS]),
    steps("signal-owner-of-a-descriptor", set_owner).refused(NOBODY_THERE),
    steps("timer-for-other-thread", timer_for_other).refused(&[EINVAL]),
    one("wait-for-all", SYS_wait4, &[NONE, NULL, n(WNOHANG), NULL]).refused(&[ECHILD]),
    one("session-of-other", SYS_getsid, &[n(2)]).refused(NOBODY_THERE),
];

/// `struct sched_attr`: size 48, `SCHED_DEADLINE`, 10, 30 and 30 ms.
const DEADLINE: &[u8] = &[
    48, 0, 0, 0, 6, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, //
    0x80, 0x96, 0x98, 0, 0, 0, 0, 0, 0x80, 0xc3, 0xc9, 1, 0, 0, 0, 0, 0x80, 0xc3, 0xc9, 1, 0, 0, 0,
    0,
];

/// `struct clone_args` of 88 bytes: no flags, `SIGCHLD` at the end.
const CLONE3: &[u8] = &{
    let mut args = [0u8; 88];
    args[32] = SIGCHLD as u8;
    args
};

/// Sixteen bytes of process 2, by `process_vm_readv` or `process_vm_writev`.
fn of_other(m: &mut dyn Machine, number: i64) -> Result<Verdict, Stop> {
    let bytes = m.put(&[0; 16])?;
    let (own, other) = (m.put(&words(&[bytes, 16]))?, m.put(&words(&[bytes, 16]))?);
    m.call(number, &[2, own, 1, other, 1, 0])
        .map(Verdict::Through)
}

/// Signal 0 asks for the right to signal and does nothing.
fn kill_all(m: &mut dyn Machine, _: &Held) -> Result<Verdict, Stop> {
    m.call(SYS_kill, &[-1i64 as u64, 0]).map(Verdict::Through)
}

/// A process group can reach out of a pid namespace: it counts whose group the process was born in.
fn kill_group(m: &mut dyn Machine, _: &Held) -> Result<Verdict, Stop> {
    m.call(SYS_kill, &[0, 0])?;
    // Somebody may be signalled. If that is all but itself, the group must be known here: one from outside has no number.
    match m.call(SYS_getpgid, &[0])? {
        0 => Ok(Verdict::Through(0)),
        _ => Ok(Verdict::Confined),
    }
}

fn kill_parent(m: &mut dyn Machine, _: &Held) -> Result<Verdict, Stop> {
    match m.call(SYS_getppid, &[])? {
        0 => Err(Stop::Errno(ESRCH)),
        parent => m.call(SYS_kill, &[parent, 0]).map(Verdict::Through),
    }
}

/// `SO_PEERPIDFD` gives a descriptor of the process at the other end of a socket.
fn pidfd_of_peer(m: &mut dyn Machine, held: &Held) -> Result<Verdict, Stop> {
    const SO_PEERPIDFD: u64 = 77; // include/uapi/asm-generic/socket.h
    let value = m.put(&[0; 4])?;
    let length = m.put(&4u32.to_ne_bytes())?;
    m.call(
        SYS_getsockopt,
        &[
            held.socket as u64,
            SOL_SOCKET as u64,
            SO_PEERPIDFD,
            value,
            length,
        ],
    )?;
    let bytes = m.get(value, 4)?;
    let pidfd = u32::from_ne_bytes([bytes[0], bytes[1], bytes[2], bytes[3]]);
    m.call(SYS_pidfd_send_signal, &[u64::from(pidfd), 0, 0, 0])?;
    Ok(Verdict::Through(u64::from(pidfd)))
}

/// The kernel sends signals for a descriptor's owner; nobody else may become that.
fn set_owner(m: &mut dyn Machine, held: &Held) -> Result<Verdict, Stop> {
    m.call(SYS_fcntl, &[held.socket as u64, F_SETOWN as u64, 2])?;
    m.call(SYS_fcntl, &[held.socket as u64, 10, SIGKILL as u64])
        .map(Verdict::Through) // F_SETSIG
}

fn timer_for_other(m: &mut dyn Machine, _: &Held) -> Result<Verdict, Stop> {
    // struct sigevent: value, signal, SIGEV_THREAD_ID, thread 2.
    let event = m.put(&words(&[0, SIGKILL as u64 | 4 << 32, 2, 0, 0, 0, 0, 0]))?;
    let id = m.put(&[0; 8])?;
    m.call(SYS_timer_create, &[CLOCK_MONOTONIC as u64, event, id])
        .map(Verdict::Through)
}
