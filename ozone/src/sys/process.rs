//! Calls on the process itself: clone3(2), execveat(2), prctl(2), capset(2), identity, descriptors.

use super::check;
use nix::errno::Errno;
use std::{
    ffi::{CStr, c_char, c_int, c_long, c_ulong},
    os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd},
    ptr,
};

/// include/uapi/linux/sched.h: the new process has default signal handlers.
const CLONE_CLEAR_SIGHAND: u64 = 0x1_0000_0000;

/// include/uapi/linux/sched.h: `struct clone_args`, version 0 (64 bytes), which every kernel that
/// has clone3 takes.
#[repr(C)]
#[derive(Default)]
struct CloneArgs {
    flags: u64,
    pidfd: u64,
    child_tid: u64,
    parent_tid: u64,
    exit_signal: u64,
    stack: u64,
    stack_size: u64,
    tls: u64,
}

/// Which side of a fork this is.
pub(crate) enum Fork {
    Parent { pid: libc::pid_t, pidfd: OwnedFd },
    Child,
}

/// Forks with namespaces. The child sees a copy of all memory.
///
/// The caller must be the process's only thread: a lock held by another thread at this moment
/// would stay locked in the child for ever.
pub(crate) fn fork(namespaces: c_int) -> Result<Fork, Errno> {
    let mut pidfd: RawFd = -1;
    let mut args = CloneArgs {
        flags: namespaces as u64 | libc::CLONE_PIDFD as u64 | CLONE_CLEAR_SIGHAND,
        pidfd: (&raw mut pidfd) as u64,
        exit_signal: libc::SIGCHLD as u64,
        ..CloneArgs::default()
    };
    // SAFETY: `args` has the size that is told and points to a writable `pidfd`. No memory is
    // shared and no stack given, so the child goes on here on its own copy of the stack.
    let pid = unsafe { libc::syscall(libc::SYS_clone3, &raw mut args, size_of::<CloneArgs>()) };
    let pid = Errno::result(pid)? as libc::pid_t;
    if pid == 0 {
        return Ok(Fork::Child);
    }
    // SAFETY: on success the kernel stored a new descriptor, known to nobody else.
    let pidfd = unsafe { OwnedFd::from_raw_fd(pidfd) };
    Ok(Fork::Parent { pid, pidfd })
}

/// Forks with namespaces, by clone(2), whose flags a filter can see, and with one table of descriptors for both: what either opens or closes, the other has opened or
/// closed, and what the child had open stays open when it dies. Returns the child's number to the parent and `None` to the
/// child.
///
/// The caller must be the process's only thread, as for [`fork`]. No object of either side may close a descriptor that the
/// other uses.
pub(crate) fn fork_with_descriptors(namespaces: c_int) -> Result<Option<libc::pid_t>, Errno> {
    let flags = (namespaces | libc::CLONE_FILES | libc::SIGCHLD) as c_ulong;
    let none = ptr::null_mut::<c_int>();
    // SAFETY: as in `fork`: no memory is shared and no stack given. What the order of the last ones is does not matter, since
    // no flag uses them.
    let pid = unsafe { libc::syscall(libc::SYS_clone, flags, none, none, none, none) };
    let pid = Errno::result(pid)? as libc::pid_t;
    Ok((pid != 0).then_some(pid))
}

/// Forks with a copy of everything, descriptors included, by clone(2), whose flags a filter can see. Returns the child's number
/// to the parent and `None` to the child.
///
/// The caller must be the process's only thread, as for [`fork`].
pub(crate) fn fork_plainly() -> Result<Option<libc::pid_t>, Errno> {
    let none = ptr::null_mut::<c_int>();
    // SAFETY: as in `fork`: no memory is shared and no stack given, and no flag uses the other arguments.
    let pid = unsafe {
        libc::syscall(
            libc::SYS_clone,
            libc::SIGCHLD as c_ulong,
            none,
            none,
            none,
            none,
        )
    };
    let pid = Errno::result(pid)? as libc::pid_t;
    Ok((pid != 0).then_some(pid))
}

/// As [`fork_with_descriptors`], without new namespaces and by clone(2), whose flags a filter can see. The parent gets the
/// child's number and a pidfd, which both processes have.
pub(crate) fn fork_beside() -> Result<Fork, Errno> {
    let mut pidfd: RawFd = -1;
    let flags = (libc::CLONE_FILES | libc::CLONE_PIDFD | libc::SIGCHLD) as c_ulong;
    let none = ptr::null_mut::<c_int>();
    // SAFETY: as in `fork`: no memory is shared and no stack given. With CLONE_PIDFD the third argument is where the pidfd
    // goes; what the order of the last two is does not matter, since no flag uses them.
    let pid = unsafe { libc::syscall(libc::SYS_clone, flags, none, &raw mut pidfd, none, none) };
    let pid = Errno::result(pid)? as libc::pid_t;
    if pid == 0 {
        return Ok(Fork::Child);
    }
    // SAFETY: on success the kernel stored a new descriptor. The child has it too, in the same table, and does not know it.
    let pidfd = unsafe { OwnedFd::from_raw_fd(pidfd) };
    Ok(Fork::Parent { pid, pidfd })
}

/// Ends the process at once, without running exit handlers (which belong to the parent's copy).
pub(crate) fn exit_now(status: c_int) -> ! {
    // SAFETY: ends the process.
    unsafe { libc::_exit(status) }
}

/// Moves this process into new namespaces.
pub(crate) fn unshare(namespaces: c_int) -> Result<(), Errno> {
    // SAFETY: no pointers.
    check(unsafe { libc::syscall(libc::SYS_unshare, namespaces) })
}

/// Executes the file behind `binary` without an environment. Returns only on failure.
///
/// `argv` holds pointers to terminated strings and ends with null.
pub(crate) fn exec(binary: RawFd, argv: &Argv) -> Errno {
    let environment: [*const c_char; 1] = [ptr::null()];
    // SAFETY: the path is a terminated string; `Argv` holds pointers into the strings that it
    // owns, with a null at the end; so does the empty environment.
    unsafe {
        libc::syscall(
            libc::SYS_execveat,
            binary,
            c"".as_ptr(),
            argv.pointers.as_ptr(),
            environment.as_ptr(),
            libc::AT_EMPTY_PATH,
        )
    };
    Errno::last()
}

/// An argument vector as execve(2) takes it.
pub(crate) struct Argv {
    pointers: Vec<*const c_char>,
    /// Owns what `pointers` point to.
    _strings: Vec<std::ffi::CString>,
}

impl Argv {
    pub(crate) fn new(strings: Vec<std::ffi::CString>) -> Self {
        let mut pointers: Vec<_> = strings.iter().map(|s| s.as_ptr()).collect();
        pointers.push(ptr::null());
        Self {
            pointers,
            _strings: strings,
        }
    }
}

fn prctl(option: c_int, argument: c_ulong) -> Result<c_int, Errno> {
    // SAFETY: only used with options whose argument is a number, not an address.
    Errno::result(unsafe { libc::prctl(option, argument, 0, 0, 0) })
}

/// Whether the process may gain rights from a program that it executes.
pub(crate) fn no_new_privs() -> Result<bool, Errno> {
    prctl(libc::PR_GET_NO_NEW_PRIVS, 0).map(|v| v == 1)
}

pub(crate) fn set_no_new_privs() -> Result<(), Errno> {
    prctl(libc::PR_SET_NO_NEW_PRIVS, 1).map(drop)
}

pub(crate) fn dumpable() -> Result<bool, Errno> {
    prctl(libc::PR_GET_DUMPABLE, 0).map(|v| v != 0)
}

pub(crate) fn set_dumpable(on: bool) -> Result<(), Errno> {
    prctl(libc::PR_SET_DUMPABLE, c_ulong::from(on)).map(drop)
}

pub(crate) fn die_with_parent() -> Result<(), Errno> {
    prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL as c_ulong).map(drop)
}

/// Whether `capability` is in the bounding set; `EINVAL` beyond the last that the kernel knows.
pub(crate) fn in_bounding_set(capability: c_ulong) -> Result<bool, Errno> {
    prctl(libc::PR_CAPBSET_READ, capability).map(|v| v == 1)
}

pub(crate) fn drop_from_bounding_set(capability: c_ulong) -> Result<(), Errno> {
    prctl(libc::PR_CAPBSET_DROP, capability).map(drop)
}

pub(crate) fn clear_ambient_set() -> Result<(), Errno> {
    prctl(
        libc::PR_CAP_AMBIENT,
        libc::PR_CAP_AMBIENT_CLEAR_ALL as c_ulong,
    )
    .map(drop)
}

pub(crate) fn in_ambient_set(capability: c_ulong) -> Result<bool, Errno> {
    let query = libc::PR_CAP_AMBIENT_IS_SET as c_ulong;
    // SAFETY: no addresses.
    let set = unsafe { libc::prctl(libc::PR_CAP_AMBIENT, query, capability, 0, 0) };
    Errno::result(set).map(|v| v == 1)
}

pub(crate) fn set_securebits(bits: c_int) -> Result<(), Errno> {
    prctl(libc::PR_SET_SECUREBITS, bits as c_ulong).map(drop)
}

/// include/uapi/linux/capability.h: `struct __user_cap_header_struct`.
#[repr(C)]
struct CapHeader {
    version: u32,
    pid: c_int,
}

/// include/uapi/linux/capability.h: `struct __user_cap_data_struct`, low and high half.
#[repr(C)]
#[derive(Default, Clone, Copy)]
struct CapData {
    effective: u32,
    permitted: u32,
    inheritable: u32,
}

const CAPABILITY_VERSION_3: u32 = 0x2008_0522;

/// Effective, permitted and inheritable capabilities as bit sets.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct CapSets {
    pub(crate) effective: u64,
    pub(crate) permitted: u64,
    pub(crate) inheritable: u64,
}

pub(crate) fn capabilities() -> Result<CapSets, Errno> {
    let mut header = CapHeader {
        version: CAPABILITY_VERSION_3,
        pid: 0,
    };
    let mut data = [CapData::default(); 2];
    // SAFETY: version 3 fills two data structures.
    check(unsafe { libc::syscall(libc::SYS_capget, &raw mut header, data.as_mut_ptr()) })?;
    let join = |low: u32, high: u32| u64::from(low) | u64::from(high) << 32;
    Ok(CapSets {
        effective: join(data[0].effective, data[1].effective),
        permitted: join(data[0].permitted, data[1].permitted),
        inheritable: join(data[0].inheritable, data[1].inheritable),
    })
}

pub(crate) fn clear_capabilities() -> Result<(), Errno> {
    let header = CapHeader {
        version: CAPABILITY_VERSION_3,
        pid: 0,
    };
    let data = [CapData::default(); 2];
    // SAFETY: version 3 reads two data structures.
    check(unsafe { libc::syscall(libc::SYS_capset, &raw const header, data.as_ptr()) })
}

/// Gives up all supplementary groups. Raw, since libc's would look for other threads to change.
pub(crate) fn drop_groups() -> Result<(), Errno> {
    // SAFETY: an empty list needs no address.
    check(unsafe { libc::syscall(libc::SYS_setgroups, 0, ptr::null::<libc::gid_t>()) })
}

pub(crate) fn set_gid(gid: libc::gid_t) -> Result<(), Errno> {
    // SAFETY: no pointers.
    check(unsafe { libc::syscall(libc::SYS_setresgid, gid, gid, gid) })
}

pub(crate) fn set_uid(uid: libc::uid_t) -> Result<(), Errno> {
    // SAFETY: no pointers.
    check(unsafe { libc::syscall(libc::SYS_setresuid, uid, uid, uid) })
}

pub(crate) fn set_umask(mask: libc::mode_t) {
    // SAFETY: no pointers, cannot fail.
    unsafe { libc::umask(mask) };
}

pub(crate) fn set_hostname(name: &CStr) -> Result<(), Errno> {
    let length = name.count_bytes();
    // SAFETY: `name` has `length` bytes.
    check(unsafe { libc::syscall(libc::SYS_sethostname, name.as_ptr(), length) })
}

pub(crate) fn chdir_root() -> Result<(), Errno> {
    // SAFETY: a terminated string.
    check(unsafe { libc::syscall(libc::SYS_chdir, c"/".as_ptr()) })
}

pub(crate) fn fchdir(folder: BorrowedFd<'_>) -> Result<(), Errno> {
    // SAFETY: no pointers.
    check(unsafe { libc::syscall(libc::SYS_fchdir, folder.as_raw_fd()) })
}

/// A pidfd of this process, for a child to watch.
pub(crate) fn own_pidfd() -> Result<OwnedFd, Errno> {
    // SAFETY: no pointers.
    pidfd(unsafe { libc::getpid() })
}

/// A pidfd of a process that this one can see.
pub(crate) fn pidfd(pid: libc::pid_t) -> Result<OwnedFd, Errno> {
    // SAFETY: no pointers.
    let number = Errno::result(unsafe { libc::syscall(libc::SYS_pidfd_open, pid, 0) })?;
    // SAFETY: the kernel just made this descriptor for us.
    Ok(unsafe { OwnedFd::from_raw_fd(number as RawFd) })
}

/// Sends SIGKILL to the process behind `pidfd`.
pub(crate) fn kill(pidfd: BorrowedFd<'_>) -> Result<(), Errno> {
    let none = ptr::null::<libc::siginfo_t>();
    // SAFETY: a null siginfo makes the kernel fill one in.
    check(unsafe {
        libc::syscall(
            libc::SYS_pidfd_send_signal,
            pidfd.as_raw_fd(),
            libc::SIGKILL,
            none,
            0,
        )
    })
}

/// Sends SIGKILL to a child that was not waited for, so that its number cannot be another's.
pub(crate) fn kill_child(pid: libc::pid_t) -> Result<(), Errno> {
    // SAFETY: no pointers.
    check(c_long::from(unsafe { libc::kill(pid, libc::SIGKILL) }))
}

/// A copy of descriptor `source`, closed at exec, with the lowest free number from `lowest` on.
pub(crate) fn copy_above(source: RawFd, lowest: RawFd) -> Result<RawFd, Errno> {
    // SAFETY: F_DUPFD_CLOEXEC takes a number. The copy is plain data for the child's short life:
    // whatever happens, exec or exit closes it.
    Errno::result(unsafe { libc::fcntl(source, libc::F_DUPFD_CLOEXEC, lowest) })
}

/// Puts a copy of `source`, kept at exec, on number `target`, closing what was there.
pub(crate) fn copy_to(source: RawFd, target: RawFd) -> Result<(), Errno> {
    // SAFETY: only called in a forked child that is about to exec: no live object of the child
    // relies on what `target` was.
    check(c_long::from(unsafe { libc::dup3(source, target, 0) }))
}

/// Marks every descriptor from `first` to `last` to be closed at exec.
pub(crate) fn close_at_exec(first: u32, last: u32) -> Result<(), Errno> {
    const CLOSE_RANGE_CLOEXEC: u32 = 4; // include/uapi/linux/close_range.h
    // SAFETY: closes nothing yet.
    check(unsafe { libc::syscall(libc::SYS_close_range, first, last, CLOSE_RANGE_CLOEXEC) })
}

/// Sends bytes without a signal when nobody listens. Lost bytes are the reader's loss.
pub(crate) fn tell(socket: RawFd, bytes: &[u8]) {
    // SAFETY: `bytes` are readable.
    unsafe {
        libc::send(
            socket,
            bytes.as_ptr().cast(),
            bytes.len(),
            libc::MSG_NOSIGNAL,
        )
    };
}

/// Waits for one byte; `false` at the end of the stream.
pub(crate) fn await_byte(socket: RawFd) -> Result<bool, Errno> {
    let mut byte = 0u8;
    loop {
        // SAFETY: one writable byte.
        let got = unsafe { libc::recv(socket, (&raw mut byte).cast(), 1, 0) };
        match Errno::result(got) {
            Err(Errno::EINTR) => {}
            other => return other.map(|n| n == 1),
        }
    }
}

/// Whether the process behind `pidfd` has ended.
pub(crate) fn has_ended(pidfd: RawFd) -> Result<bool, Errno> {
    let mut poll = libc::pollfd {
        fd: pidfd,
        events: libc::POLLIN,
        revents: 0,
    };
    // SAFETY: one pollfd.
    Errno::result(unsafe { libc::poll(&raw mut poll, 1, 0) }).map(|n| n > 0)
}

/// Closes a descriptor that this copy of the process does not need. For use in a forked child,
/// where the parent's objects are never dropped.
pub(crate) fn close_copy(fd: RawFd) {
    // SAFETY: the child's copy of the owning object is forgotten at exec or exit.
    unsafe { libc::close(fd) };
}

/// Monotonic clock in nanoseconds.
pub(crate) fn now() -> u64 {
    let mut time = libc::timespec {
        tv_sec: 0,
        tv_nsec: 0,
    };
    // SAFETY: one writable timespec; the clock always exists.
    unsafe { libc::clock_gettime(libc::CLOCK_MONOTONIC, &raw mut time) };
    time.tv_sec as u64 * 1_000_000_000 + time.tv_nsec as u64
}

/// Sets the three main capability sets of the calling thread.
pub(crate) fn set_capabilities(sets: CapSets) -> Result<(), Errno> {
    let header = CapHeader {
        version: CAPABILITY_VERSION_3,
        pid: 0,
    };
    let half = |shift: u32| CapData {
        effective: (sets.effective >> shift) as u32,
        permitted: (sets.permitted >> shift) as u32,
        inheritable: (sets.inheritable >> shift) as u32,
    };
    let data = [half(0), half(32)];
    // SAFETY: version 3 reads two data structures.
    check(unsafe { libc::syscall(libc::SYS_capset, &raw const header, data.as_ptr()) })
}

/// Adds a capability that is permitted and inheritable to those that survive exec.
pub(crate) fn raise_ambient(capability: c_ulong) -> Result<(), Errno> {
    let raise = libc::PR_CAP_AMBIENT_RAISE as c_ulong;
    // SAFETY: no addresses.
    let raised = unsafe { libc::prctl(libc::PR_CAP_AMBIENT, raise, capability, 0, 0) };
    Errno::result(raised).map(drop)
}

/// Lets the calling process live on when its parent ends.
pub(crate) fn outlive_parent() -> Result<(), Errno> {
    prctl(libc::PR_SET_PDEATHSIG, 0).map(drop)
}

/// Back to what the kernel does with a signal by itself.
pub(crate) fn default_action(signal: nix::sys::signal::Signal) -> Result<(), Errno> {
    // SAFETY: the default action runs no handler.
    unsafe { nix::sys::signal::signal(signal, nix::sys::signal::SigHandler::SigDfl) }.map(drop)
}

/// Sends the calling process a signal, at once or a little later, by a timer: in contrast to tgkill(2), a filter can let
/// a process do that without letting it signal others.
pub(crate) fn signal_self(signal: nix::sys::signal::Signal) -> Result<(), Errno> {
    // SAFETY: plain numbers and an address that nobody uses; all zero is a value of it.
    let mut event: libc::sigevent = unsafe { std::mem::zeroed() };
    event.sigev_notify = libc::SIGEV_SIGNAL;
    event.sigev_signo = signal as c_int;
    let mut timer: c_int = 0;
    let clock = libc::CLOCK_MONOTONIC;
    // SAFETY: a readable event and a writable number, which is what the kernel's timer_t is.
    check(unsafe {
        libc::syscall(
            libc::SYS_timer_create,
            clock,
            &raw const event,
            &raw mut timer,
        )
    })?;
    let soon = libc::timespec {
        tv_sec: 0,
        tv_nsec: 1,
    };
    let once = libc::itimerspec {
        it_interval: libc::timespec {
            tv_sec: 0,
            tv_nsec: 0,
        },
        it_value: soon,
    };
    let nowhere = ptr::null::<libc::itimerspec>();
    // SAFETY: a readable time; the old one is not asked for.
    check(unsafe { libc::syscall(libc::SYS_timer_settime, timer, 0, &raw const once, nowhere) })
}

/// Takes over a descriptor that came with exec, if it is open.
///
/// Each number may be taken once, before the process opens anything itself.
pub(crate) fn adopt(number: RawFd) -> Option<OwnedFd> {
    // SAFETY: only asks whether the number is open.
    let open = unsafe { libc::fcntl(number, libc::F_SETFD, libc::FD_CLOEXEC) } == 0;
    // SAFETY: open, and by the caller's word nobody else's.
    open.then(|| unsafe { OwnedFd::from_raw_fd(number) })
}

/// Closes the descriptors from `first` to `last`, which came with exec and belong to nobody here.
pub(crate) fn close_inherited(first: u32, last: u32) -> Result<(), Errno> {
    // SAFETY: called before the process opens anything, so no object of it has such a descriptor.
    check(unsafe { libc::syscall(libc::SYS_close_range, first, last, 0) })
}

/// Executes the program at `path`. Returns only on failure.
pub(crate) fn exec_path(path: &CStr, argv: &Argv, environment: &Argv) -> Errno {
    // SAFETY: the path is terminated; `Argv` holds pointers to strings that it owns, then null.
    unsafe {
        libc::syscall(
            libc::SYS_execve,
            path.as_ptr(),
            argv.pointers.as_ptr(),
            environment.pointers.as_ptr(),
        )
    };
    Errno::last()
}

/// As [`exec_path`], of a program that is open. Returns only on failure.
pub(crate) fn exec_open(program: BorrowedFd<'_>, argv: &Argv, environment: &Argv) -> Errno {
    // SAFETY: as in `exec_path`.
    unsafe {
        libc::syscall(
            libc::SYS_execveat,
            program.as_raw_fd(),
            c"".as_ptr(),
            argv.pointers.as_ptr(),
            environment.pointers.as_ptr(),
            libc::AT_EMPTY_PATH,
        )
    };
    Errno::last()
}

/// Lets a descriptor live on in the program that is executed next, on the same number.
pub(crate) fn keep_at_exec(fd: BorrowedFd<'_>) -> Result<(), Errno> {
    // SAFETY: clears a flag.
    Errno::result(unsafe { libc::fcntl(fd.as_raw_fd(), libc::F_SETFD, 0) }).map(drop)
}

/// As [`keep_at_exec`], for a number that no object here owns. `EBADF` if it is not open.
pub(crate) fn keep_number_at_exec(fd: RawFd) -> Result<(), Errno> {
    // SAFETY: clears a flag, of a descriptor that is kept open for the program that is executed next.
    Errno::result(unsafe { libc::fcntl(fd, libc::F_SETFD, 0) }).map(drop)
}

/// Locks a file or folder for all copies of the descriptor together, until the last is closed.
/// `EWOULDBLOCK` if somebody else holds a lock.
pub(crate) fn lock_exclusively(fd: BorrowedFd<'_>) -> Result<(), Errno> {
    // SAFETY: no pointers.
    Errno::result(unsafe { libc::flock(fd.as_raw_fd(), libc::LOCK_EX | libc::LOCK_NB) }).map(drop)
}

/// Takes the end of any child: its process id and its status of wait(2); `None` if none has ended
/// yet, `ECHILD` if there are none.
pub(crate) fn reap() -> Result<Option<(libc::pid_t, c_int)>, Errno> {
    let mut status = 0;
    // SAFETY: a writable number.
    let pid = Errno::result(unsafe { libc::waitpid(-1, &raw mut status, libc::WNOHANG) })?;
    Ok((pid > 0).then_some((pid, status)))
}

/// Gives the process a session keyring of its own, without keys.
pub(crate) fn join_new_keyring() -> Result<(), Errno> {
    const KEYCTL_JOIN_SESSION_KEYRING: c_long = 1; // include/uapi/linux/keyctl.h
    let no_name = ptr::null::<c_char>();
    // SAFETY: without a name there is no address.
    check(unsafe { libc::syscall(libc::SYS_keyctl, KEYCTL_JOIN_SESSION_KEYRING, no_name) })
}

/// The kernel's version of Landlock, 0 if it has none or it is switched off.
pub(crate) fn landlock_abi() -> u32 {
    const CREATE_RULESET_VERSION: libc::c_uint = 1; // include/uapi/linux/landlock.h
    // SAFETY: with this flag the call takes a null pointer and the size 0, and gives a number.
    let version = unsafe {
        libc::syscall(
            libc::SYS_landlock_create_ruleset,
            std::ptr::null::<libc::c_void>(),
            0_usize,
            CREATE_RULESET_VERSION,
        )
    };
    u32::try_from(version).unwrap_or(0)
}
