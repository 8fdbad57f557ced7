//! # Taking one layer of a jail away
//!
//! **Job.** Start a VM under ptrace and change single system calls of its processes on the way into their jails: leave one
//! out and pretend that it worked, change an argument, or slip another call in. Once everything is locked down the tracing
//! ends, and the VM runs on with what is left of its jails.
//! **Who is not trusted.** Nobody: this is the attacker that the checks are tried against.
//! **Why this way.** It works on the shipped programs. A build that can leave a layer out would prove checks on another
//! program, and would be one wrong flag away from being shipped.

use crate::procfs;
use crate::trace::{Registers, Tracee, request, wait};
use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::io;
use std::path::{Path, PathBuf};

/// Whose calls.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Who {
    /// A thread of the control process, by its name's beginning.
    Control(&'static str),
    /// The broker.
    Broker,
    /// The device process of this position on the command line, before it executes its program.
    Child(usize),
    /// The same afterwards.
    Device(usize),
}

/// A system call that is about to be made, or has just been made.
#[derive(Debug)]
pub struct Call<'a> {
    /// Its number.
    pub number: i64,
    /// Its arguments.
    pub arguments: [u64; 6],
    tracee: &'a Tracee,
}

impl Call<'_> {
    /// Bytes of the process's memory.
    ///
    /// # Errors
    /// When nothing is mapped there.
    pub fn bytes(&self, address: u64, length: usize) -> io::Result<Vec<u8>> {
        let mut bytes = vec![0; length];
        self.tracee.read(address, &mut bytes)?;
        Ok(bytes)
    }

    /// Argument `at` as a text that ends with a NUL.
    #[must_use]
    pub fn text(&self, at: usize) -> String {
        let mut bytes = Vec::new();
        let mut one = [0];
        while bytes.len() < 256
            && self
                .tracee
                .read(self.arguments[at] + bytes.len() as u64, &mut one)
                .is_ok()
            && one[0] != 0
        {
            bytes.push(one[0]);
        }
        String::from_utf8_lossy(&bytes).into_owned()
    }

    /// What descriptor `fd` leads to.
    #[must_use]
    pub fn target(&self, fd: u64) -> String {
        let link = fs::read_link(format!("/proc/{}/fd/{fd}", self.tracee.tid()));
        link.map_or(String::new(), |target| {
            target.to_string_lossy().into_owned()
        })
    }
}

/// What becomes of a call.
#[derive(Clone, Copy)]
pub enum Act {
    /// It is not made, and has this result.
    Skip(i64),
    /// Argument `.0` becomes what `.1` makes of it.
    Argument(usize, fn(u64) -> u64),
    /// This is done before it is made. The call can be changed with [`Tracee::set_registers`].
    Before(fn(&mut Tracee) -> io::Result<()>),
    /// This is done after it was made; it gets the result and may change what was written.
    After(fn(&mut Tracee, &Registers) -> io::Result<()>),
}

impl std::fmt::Debug for Act {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Skip(_) => "Skip",
            Self::Argument(..) => "Argument",
            Self::Before(_) => "Before",
            Self::After(_) => "After",
        })
    }
}

/// A change of all calls that fit.
#[derive(Debug, Clone, Copy)]
pub struct Change {
    /// Whose.
    pub who: Who,
    /// Number of the call.
    pub number: i64,
    /// Which of them.
    pub which: fn(&Call<'_>) -> bool,
    /// What is done.
    pub act: Act,
}

/// A program that stops itself and becomes `stratovirt` once it is let go on: start this instead.
///
/// # Errors
/// When it cannot be written.
pub fn stopping(program: &Path, dir: &Path) -> io::Result<PathBuf> {
    use std::os::unix::fs::PermissionsExt;
    let path = dir.join("stopped");
    let text = format!(
        "#!/bin/sh\nkill -STOP $$\nexec {} \"$@\"\n",
        program.display()
    );
    fs::write(&path, text)?;
    fs::set_permissions(&path, fs::Permissions::from_mode(0o755))?;
    Ok(path)
}

const OPTIONS: libc::c_int = libc::PTRACE_O_TRACESYSGOOD
    | libc::PTRACE_O_TRACEFORK
    | libc::PTRACE_O_TRACEVFORK
    | libc::PTRACE_O_TRACECLONE
    | libc::PTRACE_O_TRACEEXEC
    | 1 << 21; // PTRACE_O_SUSPEND_SECCOMP, so that calls that are slipped in are not killed

/// A traced thread.
#[derive(Debug, Clone, Copy)]
struct Thread {
    process: i32,
    role: Role,
    executed: bool,
    /// What the call that it is in gets at its end.
    pending: Option<Pending>,
    /// Its next call was looked at already.
    seen: bool,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Role {
    Control,
    Broker,
    Device(usize),
    Other,
}

#[derive(Debug, Clone, Copy)]
enum Pending {
    Result(i64),
    /// Index of the change.
    After(usize),
}

/// Follows the program that [`stopping`] wrote, which is `pid`, into a VM, makes `changes`, and lets everything go when the
/// control process's main thread has installed its filter: which changes were made.
///
/// # Errors
/// When the VM ended before that, or tracing failed.
pub fn follow(pid: i32, changes: &[Change]) -> io::Result<BTreeSet<usize>> {
    let mut chase = Chase {
        control: pid,
        changes,
        threads: BTreeMap::new(),
        early: BTreeSet::new(),
        children: 0,
        made: BTreeSet::new(),
    };
    let outcome = chase.run();
    chase.let_go();
    outcome.map(|()| chase.made)
}

struct Chase<'a> {
    control: i32,
    changes: &'a [Change],
    threads: BTreeMap<i32, Thread>,
    /// New threads whose parent's word has not come yet.
    early: BTreeSet<i32>,
    /// Device processes so far.
    children: usize,
    made: BTreeSet<usize>,
}

impl Chase<'_> {
    fn run(&mut self) -> io::Result<()> {
        wait_for_stop(self.control)?;
        request(libc::PTRACE_SEIZE, self.control, 0, OPTIONS as usize)?;
        let control = Thread {
            process: self.control,
            role: Role::Control,
            executed: false,
            pending: None,
            seen: false,
        };
        self.threads.insert(self.control, control);
        // The first stop is that of the stopped program; it goes on with the signal.
        let (tid, _) = wait(self.control)?;
        resume(tid, 0)?;
        // SAFETY-free: a signal to a process that is this one's child.
        nix::sys::signal::kill(
            nix::unistd::Pid::from_raw(self.control),
            nix::sys::signal::Signal::SIGCONT,
        )?;
        loop {
            let (tid, status) = wait(-1)?;
            if !libc::WIFSTOPPED(status) {
                self.threads.remove(&tid);
                if tid == self.control {
                    return Err(io::Error::other("the VM ended while it started"));
                }
                continue;
            }
            if self.stopped(tid, libc::WSTOPSIG(status), status >> 16)? {
                return Ok(());
            }
        }
    }

    /// Deals with a stop; true at the end of the start.
    fn stopped(&mut self, tid: i32, signal: libc::c_int, event: libc::c_int) -> io::Result<bool> {
        if !self.threads.contains_key(&tid) {
            self.early.insert(tid);
            return Ok(false);
        }
        match event {
            libc::PTRACE_EVENT_FORK | libc::PTRACE_EVENT_VFORK | libc::PTRACE_EVENT_CLONE => {
                let mut child: libc::c_ulong = 0;
                let data = (&raw mut child) as usize;
                request(libc::PTRACE_GETEVENTMSG, tid, 0, data)?;
                let child = i32::try_from(child).unwrap_or(0);
                self.born(tid, child)?;
            }
            libc::PTRACE_EVENT_EXEC => {
                if let Some(thread) = self.threads.get_mut(&tid) {
                    // The shell that stopped itself has become the control process.
                    thread.executed = true;
                    thread.pending = None;
                }
            }
            0 if signal == libc::SIGTRAP | 0x80 => {
                let over = self.at_call(tid)?;
                if over {
                    return Ok(true); // it stays stopped until all are let go
                }
            }
            0 => return resume(tid, signal).map(|()| false),
            _ => {}
        }
        resume(tid, 0)?;
        Ok(false)
    }

    fn born(&mut self, parent: i32, child: i32) -> io::Result<()> {
        let Some(by) = self.threads.get(&parent).copied() else {
            return Ok(());
        };
        let process = procfs::Status::of(child)
            .ok()
            .and_then(|status| status.field("Tgid").parse().ok())
            .unwrap_or(child);
        let thread = process == by.process;
        let role = match by.role {
            role if thread => role,
            Role::Control if by.executed => Role::Broker,
            Role::Broker => {
                self.children += 1;
                Role::Device(self.children - 1)
            }
            _ => Role::Other,
        };
        let new = Thread {
            process,
            role,
            executed: thread && by.executed,
            pending: None,
            seen: false,
        };
        self.threads.insert(child, new);
        if self.early.remove(&child) {
            resume(child, 0)?;
        }
        Ok(())
    }

    fn at_call(&mut self, tid: i32) -> io::Result<bool> {
        let Some(mut thread) = self.threads.get(&tid).copied() else {
            return Ok(false);
        };
        let mut over = false;
        if let Some(number) = entering(tid)? {
            if thread.seen {
                thread.seen = false;
            } else {
                self.entry(tid, number, &mut thread)?;
            }
        } else {
            let mut tracee = Tracee::borrowed(tid)?;
            let mut registers = tracee.registers()?;
            over = thread.role == Role::Control
                && thread.process == tid
                && thread.executed
                && registers.orig_rax == libc::SYS_seccomp as u64;
            match thread.pending.take() {
                Some(Pending::Result(result)) => {
                    registers.rax = result.cast_unsigned();
                    tracee.set_registers(&registers)?;
                    // The call's number was taken away at its start.
                    over |= thread.role == Role::Control
                        && thread.process == tid
                        && registers.orig_rax == u64::MAX
                        && result == SKIPPED_FILTER;
                    if result == SKIPPED_FILTER {
                        registers.rax = 0;
                        tracee.set_registers(&registers)?;
                    }
                }
                Some(Pending::After(change)) => {
                    if let Act::After(work) = self.changes[change].act {
                        work(&mut tracee, &registers)?;
                    }
                }
                None => {}
            }
        }
        if let Some(kept) = self.threads.get_mut(&tid) {
            *kept = thread;
        }
        Ok(over)
    }

    fn entry(&mut self, tid: i32, number: i64, thread: &mut Thread) -> io::Result<()> {
        for (index, change) in self.changes.iter().enumerate() {
            if number != change.number || !is(change.who, thread, tid) {
                continue;
            }
            let mut tracee = Tracee::borrowed(tid)?;
            let mut registers = tracee.registers()?;
            let call = Call {
                number,
                arguments: arguments(&registers),
                tracee: &tracee,
            };
            if !(change.which)(&call) {
                continue;
            }
            self.made.insert(index);
            match change.act {
                Act::Skip(result) => {
                    registers.orig_rax = u64::MAX;
                    tracee.set_registers(&registers)?;
                    let result = match number {
                        libc::SYS_seccomp => SKIPPED_FILTER,
                        _ => result,
                    };
                    thread.pending = Some(Pending::Result(result));
                }
                Act::Argument(at, work) => {
                    let slot = match at {
                        0 => &mut registers.rdi,
                        1 => &mut registers.rsi,
                        2 => &mut registers.rdx,
                        3 => &mut registers.r10,
                        4 => &mut registers.r8,
                        _ => &mut registers.r9,
                    };
                    *slot = work(*slot);
                    tracee.set_registers(&registers)?;
                }
                Act::Before(work) => before(&mut tracee, thread, work)?,
                Act::After(_) => thread.pending = Some(Pending::After(index)),
            }
        }
        Ok(())
    }

    /// Ends the tracing of everything that is left.
    fn let_go(&mut self) {
        let tids: BTreeSet<i32> = self.threads.keys().chain(&self.early).copied().collect();
        for tid in tids {
            // One that is stopped already cannot be interrupted, and one that has ended not either.
            if request(libc::PTRACE_DETACH, tid, 0, 0).is_ok() {
                continue;
            }
            if request(libc::PTRACE_INTERRUPT, tid, 0, 0).is_err() {
                continue;
            }
            if let Ok((_, status)) = wait(tid)
                && libc::WIFSTOPPED(status)
            {
                let signal = libc::WSTOPSIG(status);
                let own = signal & 0x7f == libc::SIGTRAP || status >> 16 != 0;
                let signal = if own { 0 } else { signal };
                let _ = request(libc::PTRACE_DETACH, tid, 0, signal as usize);
            }
        }
    }
}

/// Marks a filter that was left out, whose call ends the start like one that was installed.
const SKIPPED_FILTER: i64 = i64::MIN;

/// Has `work` done where a call is about to be made, and lets that call be made then.
fn before(
    tracee: &mut Tracee,
    thread: &mut Thread,
    work: fn(&mut Tracee) -> io::Result<()>,
) -> io::Result<()> {
    let tid = tracee.tid();
    let call = tracee.registers()?;
    // The call is taken away, so that the thread is outside of any, and then made again.
    let mut none = call;
    none.orig_rax = u64::MAX;
    tracee.set_registers(&none)?;
    request(libc::PTRACE_SYSCALL, tid, 0, 0)?;
    wait(tid)?;
    let mut again = call;
    again.rax = call.orig_rax;
    again.rip = call.rip - 2;
    tracee.set_registers(&again)?;
    work(tracee)?;
    thread.seen = true;
    Ok(())
}

fn is(who: Who, thread: &Thread, tid: i32) -> bool {
    match (who, thread.role) {
        (Who::Control(name), Role::Control) => {
            thread.executed
                && fs::read_to_string(format!("/proc/{tid}/comm"))
                    .is_ok_and(|comm| comm.starts_with(name))
        }
        (Who::Broker, Role::Broker) => thread.executed,
        (Who::Child(wanted), Role::Device(index)) => !thread.executed && wanted == index,
        (Who::Device(wanted), Role::Device(index)) => thread.executed && wanted == index,
        _ => false,
    }
}

fn arguments(registers: &Registers) -> [u64; 6] {
    [
        registers.rdi,
        registers.rsi,
        registers.rdx,
        registers.r10,
        registers.r8,
        registers.r9,
    ]
}

/// The number of the call that the thread is at the start of; `None` at its end.
fn entering(tid: i32) -> io::Result<Option<i64>> {
    const GET_SYSCALL_INFO: libc::c_uint = 0x420e;
    const ENTRY: u8 = 1; // PTRACE_SYSCALL_INFO_ENTRY
    let mut info = [0u64; 11];
    let data = info.as_mut_ptr() as usize;
    request(GET_SYSCALL_INFO, tid, size_of_val(&info), data)?;
    // Operation and architecture, instruction pointer, stack pointer, number, arguments.
    Ok((info[0].to_ne_bytes()[0] == ENTRY).then_some(info[3].cast_signed()))
}

fn resume(tid: i32, signal: libc::c_int) -> io::Result<()> {
    match request(libc::PTRACE_SYSCALL, tid, 0, signal as usize) {
        // Killed meanwhile; its end is told.
        Err(e) if e.raw_os_error() == Some(libc::ESRCH) => Ok(()),
        other => other.map(drop),
    }
}

/// Waits until the child has stopped itself, without taking the news away from whoever waits for its end.
fn wait_for_stop(pid: i32) -> io::Result<()> {
    use nix::sys::wait::{Id, WaitPidFlag, waitid};
    let flags = WaitPidFlag::WSTOPPED | WaitPidFlag::WEXITED | WaitPidFlag::WNOWAIT;
    waitid(Id::Pid(nix::unistd::Pid::from_raw(pid)), flags)?;
    Ok(())
}
