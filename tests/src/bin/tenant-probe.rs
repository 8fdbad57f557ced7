//! # A process of one VM's jail that reaches for another's
//!
//! **Job.** Enter the mount, pid, network, ipc, uts and cgroup namespaces of a process, become a user without capabilities,
//! and try what the command line names, one line of outcome each: `tenant-probe PID UID GID ATTEMPT…`.
//! **Who is not trusted.** This program: it stands for a control process that was taken over, and has neither its filter
//! nor its Landlock domain, so that only the outer jail is between it and the others.
//! **Why this way.** What isolation is worth is what an attempt from inside meets; the outside only sees intentions.
//!
//! Attempts: `processes` prints the users of all visible processes; `open:PATH`, `connect:PATH`, `abstract:NAME`,
//! `tcp:ADDRESS`, `signal:PID`, `pidfd:PID`, `ptrace:PID`, `memory:PID`, `make-shm:KEY` and `shm:KEY` try that.

#![allow(unsafe_code)] // fork into the pid namespace, and calls on processes and segments that nix has no wrapper for

use nix::errno::Errno;
use nix::sched::{CloneFlags, setns};
use nix::sys::wait::waitpid;
use nix::unistd::{ForkResult, Gid, Pid, Uid, fork, setgroups, setresgid, setresuid};
use std::ffi::c_long;
use std::net::TcpStream;
use std::os::fd::{FromRawFd, OwnedFd};
use std::os::linux::net::SocketAddrExt;
use std::os::unix::net::{SocketAddr, UnixStream};
use std::process::ExitCode;
use std::time::Duration;

/// Bytes of the shared memory segment.
const SEGMENT: usize = 4096;

fn main() -> ExitCode {
    let words: Vec<String> = std::env::args().skip(1).collect();
    let [pid, uid, gid, attempts @ ..] = words.as_slice() else {
        return ExitCode::from(2);
    };
    let (Ok(pid), Ok(uid), Ok(gid)) = (pid.parse(), uid.parse(), gid.parse()) else {
        return ExitCode::from(2);
    };
    if let Err(error) = enter(pid) {
        eprintln!("cannot enter the namespaces of {pid}: {error}");
        return ExitCode::from(3);
    }
    // SAFETY: this process has one thread.
    match unsafe { fork() } {
        Ok(ForkResult::Child) => {
            if let Err(error) = become_user(uid, gid) {
                eprintln!("cannot become {uid}:{gid}: {error}");
                return ExitCode::from(4);
            }
            for attempt in attempts {
                println!("{attempt} = {}", outcome(attempt));
            }
            ExitCode::SUCCESS
        }
        Ok(ForkResult::Parent { child }) => match waitpid(child, None) {
            Ok(nix::sys::wait::WaitStatus::Exited(_, 0)) => ExitCode::SUCCESS,
            _ => ExitCode::from(5),
        },
        Err(_) => ExitCode::from(6),
    }
}

fn check(result: c_long) -> Result<c_long, Errno> {
    Errno::result(result)
}

fn enter(pid: libc::pid_t) -> Result<(), Errno> {
    // SAFETY: no pointers.
    let number = check(unsafe { libc::syscall(libc::SYS_pidfd_open, pid, 0) })?;
    // SAFETY: the kernel just made this descriptor.
    let pidfd = unsafe { OwnedFd::from_raw_fd(i32::try_from(number).map_err(|_| Errno::EBADF)?) };
    let all = CloneFlags::CLONE_NEWNS
        | CloneFlags::CLONE_NEWPID
        | CloneFlags::CLONE_NEWNET
        | CloneFlags::CLONE_NEWIPC
        | CloneFlags::CLONE_NEWUTS
        | CloneFlags::CLONE_NEWCGROUP;
    setns(&pidfd, all)
}

/// Leaves user 0, and with it every capability: the kernel empties the sets.
fn become_user(uid: u32, gid: u32) -> Result<(), Errno> {
    setgroups(&[])?;
    let (uid, gid) = (Uid::from_raw(uid), Gid::from_raw(gid));
    setresgid(gid, gid, gid)?;
    setresuid(uid, uid, uid)
}

fn outcome(attempt: &str) -> String {
    let (what, value) = attempt.split_once(':').unwrap_or((attempt, ""));
    let number = || value.parse::<i32>().map_err(|_| Errno::EINVAL);
    let result = match what {
        "processes" => return users(),
        "open" => std::fs::OpenOptions::new().read(true).open(value).map(drop),
        "connect" => UnixStream::connect(value).map(drop),
        "abstract" => SocketAddr::from_abstract_name(value)
            .and_then(|a| UnixStream::connect_addr(&a))
            .map(drop),
        "tcp" => match value.parse() {
            Ok(address) => TcpStream::connect_timeout(&address, Duration::from_secs(2)).map(drop),
            Err(_) => Err(Errno::EINVAL.into()),
        },
        "signal" => number()
            .and_then(|n| nix::sys::signal::kill(Pid::from_raw(n), None))
            .map_err(Into::into),
        "pidfd" => number()
            // SAFETY: no pointers; the descriptor goes with the process.
            .and_then(|n| check(unsafe { libc::syscall(libc::SYS_pidfd_open, n, 0) }))
            .map(drop)
            .map_err(Into::into),
        "ptrace" => number().and_then(seize).map_err(Into::into),
        "memory" => number().and_then(read_memory).map_err(Into::into),
        "make-shm" => number()
            .and_then(|key| segment(key, true))
            .map_err(Into::into),
        "shm" => number()
            .and_then(|key| segment(key, false))
            .map_err(Into::into),
        _ => Err(Errno::EINVAL.into()),
    };
    match result {
        Ok(()) => "ok".to_owned(),
        Err(error) => error.raw_os_error().map_or_else(
            || error.to_string(),
            |code| {
                Errno::from_raw(code)
                    .to_string()
                    .split(':')
                    .next()
                    .unwrap_or_default()
                    .to_owned()
            },
        ),
    }
}

fn seize(pid: i32) -> Result<(), Errno> {
    // SAFETY: no addresses are read for this request.
    check(unsafe { libc::ptrace(libc::PTRACE_SEIZE, pid, 0, 0) }).map(drop)
}

fn read_memory(pid: i32) -> Result<(), Errno> {
    let mut byte = 0u8;
    let local = libc::iovec {
        iov_base: (&raw mut byte).cast(),
        iov_len: 1,
    };
    // Some address: a process that is there and may be read answers with EFAULT at worst.
    let remote = libc::iovec {
        iov_base: 0x1000 as *mut _,
        iov_len: 1,
    };
    // SAFETY: one writable byte here; the other address is the other process's.
    check(
        unsafe { libc::process_vm_readv(pid, &raw const local, 1, &raw const remote, 1, 0) }
            as c_long,
    )
    .map(drop)
}

fn segment(key: i32, make: bool) -> Result<(), Errno> {
    let flags = if make {
        libc::IPC_CREAT | libc::IPC_EXCL | 0o666
    } else {
        0
    };
    // SAFETY: no pointers.
    check(c_long::from(unsafe { libc::shmget(key, SEGMENT, flags) })).map(drop)
}

/// The users of all processes that `/proc` shows.
fn users() -> String {
    let Ok(entries) = std::fs::read_dir("/proc") else {
        return "no /proc".to_owned();
    };
    let mut users: Vec<String> = entries
        .flatten()
        .filter(|e| e.file_name().to_string_lossy().parse::<u32>().is_ok())
        .map(|e| {
            let status = std::fs::read_to_string(e.path().join("status")).unwrap_or_default();
            let line = status.lines().find_map(|l| l.strip_prefix("Uid:"));
            line.and_then(|l| l.split_whitespace().next())
                .unwrap_or("unknown")
                .to_owned()
        })
        .collect();
    users.sort();
    users.dedup();
    users.join(" ")
}
