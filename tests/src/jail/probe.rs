//! # Questions that only a process itself can ask
//!
//! **Job.** Make calls in a process's name, past its seccomp filter, whose outcome tells whether one layer is there: Landlock
//! for files, TCP, signals and abstract sockets, each alone; the dumpable flag, securebits, the signal at the parent's death.
//! **Who is not trusted.** The process. **Why this way.** Each probe would succeed if its layer alone were missing: the folder
//! exists and may be read, the port is free, the process to be signalled is of the same user and in the same pid namespace,
//! the socket is in the same network namespace.

use crate::procfs::{self, Status};
use crate::trace::Tracee;
use crate::wait::{Deadline, readable};
use nix::sched::{CloneFlags, setns};
use std::fs::File;
use std::io;
use std::os::fd::AsFd;
use std::os::linux::net::SocketAddrExt;
use std::os::unix::net::{SocketAddr, UnixListener};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

/// Landlock's ABI versions from which on it covers TCP, and signals and abstract sockets.
pub const LANDLOCK_TCP: u32 = 4;
/// See [`LANDLOCK_TCP`].
pub const LANDLOCK_SCOPES: u32 = 6;

const LIMIT: Duration = Duration::from_secs(10);
const EACCES: i64 = -(libc::EACCES as i64);
const EPERM: i64 = -(libc::EPERM as i64);

/// What of Landlock a process lacks; empty when all that the kernel's version offers is in force. `folder`: it serves one,
/// which is its root.
///
/// # Errors
/// When a probe could not be made.
pub fn missing_landlock(
    tracee: &mut Tracee,
    abi: u32,
    folder: bool,
) -> io::Result<Vec<&'static str>> {
    let mut missing = Vec::new();
    let mut look = |what, outcome: i64, refusal: i64| match outcome {
        _ if outcome == refusal => Ok(()),
        0.. => {
            missing.push(what);
            Ok(())
        }
        other => Err(io::Error::other(format!(
            "the probe of Landlock for {what} ended with {}",
            io::Error::from_raw_os_error(i32::try_from(-other).unwrap_or(0))
        ))),
    };
    if abi == 0 {
        missing.push("files");
        return Ok(missing);
    }
    let opened = if folder {
        // The rules are for what lies below its root; its own descriptors in /proc do not.
        open_folder(tracee, OWN_FDS, ".")?
    } else {
        open_folder(tracee, libc::AT_FDCWD, "/")?
    };
    look("files", opened, EACCES)?;
    if abi >= LANDLOCK_TCP {
        look("TCP", bind_tcp(tracee)?, EACCES)?;
    }
    if abi >= LANDLOCK_SCOPES {
        look("signals", signal_neighbour(tracee)?, EPERM)?;
        look("abstract sockets", connect_abstract(tracee)?, EPERM)?;
    }
    Ok(missing)
}

fn close(tracee: &mut Tracee, fd: i64) -> io::Result<()> {
    if fd >= 0 {
        tracee.call(libc::SYS_close, &[fd.cast_unsigned()])?;
    }
    Ok(())
}

/// The number of a folder's process's own descriptors.
const OWN_FDS: i32 = ipc::spec::fs::FD_PROCESSES;

fn open_folder(tracee: &mut Tracee, at: i32, path: &str) -> io::Result<i64> {
    let flags = (libc::O_RDONLY | libc::O_DIRECTORY | libc::O_CLOEXEC) as u64;
    let arguments = [at as u64, 0, flags];
    let fd = tracee.call_path(libc::SYS_openat, &arguments, 1, path)?;
    close(tracee, fd)?;
    Ok(fd)
}

fn socket(tracee: &mut Tracee, family: libc::c_int) -> io::Result<i64> {
    let kind = (libc::SOCK_STREAM | libc::SOCK_CLOEXEC | libc::SOCK_NONBLOCK) as u64;
    let fd = tracee.call(libc::SYS_socket, &[family as u64, kind, 0])?;
    if fd < 0 {
        return Err(io::Error::other(format!(
            "the probe has no socket of family {family}: {fd}"
        )));
    }
    Ok(fd)
}

/// Any port of any address, which needs no interface that is up.
fn bind_tcp(tracee: &mut Tracee) -> io::Result<i64> {
    let fd = socket(tracee, libc::AF_INET)?;
    let mut address = [0; size_of::<libc::sockaddr_in>()];
    address[..2].copy_from_slice(&(libc::AF_INET as u16).to_ne_bytes());
    let arguments = [fd.cast_unsigned(), 0, address.len() as u64];
    let outcome = tracee.call_with(libc::SYS_bind, &arguments, 1, &mut address)?;
    close(tracee, fd)?;
    Ok(outcome)
}

/// Signal 0, which only asks, to a process of the same user in the same pid namespace.
fn signal_neighbour(tracee: &mut Tracee) -> io::Result<i64> {
    let neighbour = Neighbour::of(tracee.tid())?;
    tracee.call(libc::SYS_kill, &[neighbour.pid_there as u64, 0])
}

/// A process outside of the jail that the jailed one could see and signal.
struct Neighbour {
    child: Child,
    pid_there: i32,
}

impl Neighbour {
    fn of(pid: i32) -> io::Result<Self> {
        let status = Status::of(pid)?;
        let user = status.uids().first().copied().unwrap_or(0).to_string();
        let child = Command::new("nsenter")
            .args(["-t", &pid.to_string(), "-p", "setpriv", "--reuid", &user])
            .args(["--regid", &user, "--clear-groups", "sh", "-c"])
            .arg("echo; exec cat")
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()?;
        let output = child.stdout.as_ref().ok_or(io::ErrorKind::BrokenPipe)?;
        let there = readable(&[output.as_fd()], Deadline::after(LIMIT))?.is_some();
        let own = i32::try_from(child.id()).unwrap_or(0);
        // nsenter waits for the one that it has forked into the namespace.
        let inside = procfs::descendants(own)?.last().copied().unwrap_or(own);
        let pid_there = Status::of(inside)?
            .namespaced_pids()
            .last()
            .copied()
            .filter(|_| there);
        let pid_there = pid_there.ok_or_else(|| io::Error::other("no neighbour in the jail"))?;
        Ok(Self { child, pid_there })
    }
}

impl Drop for Neighbour {
    fn drop(&mut self) {
        // The end of its input is the end of it.
        drop(self.child.stdin.take());
        let _ = self.child.wait();
    }
}

/// To a socket that somebody outside of the jail has bound in the same network namespace.
fn connect_abstract(tracee: &mut Tracee) -> io::Result<i64> {
    let name = format!("jail-probe-{}", std::process::id());
    let namespace = File::open(format!("/proc/{}/ns/net", tracee.tid()))?;
    let to_bind = SocketAddr::from_abstract_name(&name)?;
    // A thread of its own, since it does not come back from there.
    let _listener = std::thread::spawn(move || -> io::Result<UnixListener> {
        setns(namespace, CloneFlags::CLONE_NEWNET)?;
        UnixListener::bind_addr(&to_bind)
    })
    .join()
    .map_err(|_| io::Error::other("the listener's thread has panicked"))??;
    let fd = socket(tracee, libc::AF_UNIX)?;
    let mut address = (libc::AF_UNIX as u16).to_ne_bytes().to_vec();
    address.push(0);
    address.extend(name.as_bytes());
    let arguments = [fd.cast_unsigned(), 0, address.len() as u64];
    let outcome = tracee.call_with(libc::SYS_connect, &arguments, 1, &mut address)?;
    close(tracee, fd)?;
    Ok(outcome)
}

/// Whether the process can be dumped.
///
/// # Errors
/// When it has ended.
pub fn dumpable(tracee: &mut Tracee) -> io::Result<bool> {
    Ok(tracee.call(libc::SYS_prctl, &[libc::PR_GET_DUMPABLE as u64])? != 0)
}

/// The thread's securebits (`include/uapi/linux/securebits.h`).
///
/// # Errors
/// When it has ended.
pub fn securebits(tracee: &mut Tracee) -> io::Result<i64> {
    tracee.call(libc::SYS_prctl, &[libc::PR_GET_SECUREBITS as u64])
}

/// The process's session of keys; a negative error number where there are none.
///
/// # Errors
/// When it has ended.
pub fn session_keys(tracee: &mut Tracee) -> io::Result<i64> {
    const SESSION: i64 = -3; // include/uapi/linux/keyctl.h, KEY_SPEC_SESSION_KEYRING
    tracee.call(libc::SYS_keyctl, &[0, SESSION.cast_unsigned(), 0])
}

/// Whether the process can make a user namespace. One that can is in it from then on.
///
/// # Errors
/// When it has ended.
pub fn makes_users(tracee: &mut Tracee) -> io::Result<bool> {
    let outcome = tracee.call(libc::SYS_unshare, &[libc::CLONE_NEWUSER as u64])?;
    Ok(outcome == 0)
}

/// The signal that the process gets at its parent's death; 0 for none.
///
/// # Errors
/// When it has ended.
pub fn signal_at_parents_death(tracee: &mut Tracee) -> io::Result<i32> {
    let mut signal = [0; 4];
    let arguments = [libc::PR_GET_PDEATHSIG as u64, 0];
    tracee.call_with(libc::SYS_prctl, &arguments, 1, &mut signal)?;
    Ok(i32::from_ne_bytes(signal))
}
