//! # A thread under ptrace
//!
//! **Job.** Stop a thread of a running process, make system calls in its name, read its seccomp filters, and let it go on
//! as if nothing had been. The calls are made with the thread's credentials, namespaces and Landlock domain, and with its
//! seccomp filter suspended: so each layer can be asked on its own.
//! **Who is not trusted.** The thread; it only ever runs one instruction of its own text, `syscall`.
//! **Why this way.** The kernel shows neither a process's Landlock domain nor its dumpable flag nor the text of its filters.
//! A probe compiled into a device would prove the probe's jail, not the device's.
#![allow(unsafe_code)] // ptrace

use std::fs::{self, File};
use std::io;
use std::os::unix::fs::FileExt;

/// General registers of a thread.
pub type Registers = libc::user_regs_struct;

const SUSPEND_SECCOMP: libc::c_int = 1 << 21; // include/uapi/linux/ptrace.h, PTRACE_O_SUSPEND_SECCOMP
const SECCOMP_GET_FILTER: libc::c_uint = 0x420c;
/// The instruction `syscall`.
const SYSCALL: [u8; 2] = [0x0f, 0x05];
/// Largest memory that [`Tracee::call_with`] lends a call.
const MAX_LENT: usize = 512;

/// A ptrace request; the result of those that have one.
pub(crate) fn request(
    request: libc::c_uint,
    tid: i32,
    address: usize,
    data: usize,
) -> io::Result<libc::c_long> {
    // SAFETY: the kernel reads or writes memory of this process only at `data`, which callers point at live memory that is
    // large enough for their request, or give as a number where it is one.
    let result = unsafe { libc::ptrace(request, tid, address, data) };
    if result < 0 {
        Err(io::Error::last_os_error())
    } else {
        Ok(result)
    }
}

/// Waits for a change of `tid`, or of any traced thread with -1: its id and its raw status.
pub(crate) fn wait(tid: i32) -> io::Result<(i32, libc::c_int)> {
    let mut status = 0;
    loop {
        // SAFETY: the kernel writes one integer, which lives here.
        let found = unsafe { libc::waitpid(tid, &raw mut status, libc::__WALL) };
        if found > 0 {
            return Ok((found, status));
        }
        let error = io::Error::last_os_error();
        if error.kind() != io::ErrorKind::Interrupted {
            return Err(error);
        }
    }
}

fn signal(tid: i32, signal: libc::c_int) {
    // SAFETY: a signal by number; a thread that is gone gets none.
    unsafe { libc::syscall(libc::SYS_tkill, tid, signal) };
}

/// A stopped thread. Dropping it lets the thread go on.
#[derive(Debug)]
pub struct Tracee {
    tid: i32,
    memory: File,
    /// Where an instruction `syscall` is.
    gadget: u64,
    /// Signals that came meanwhile.
    held: Vec<libc::c_int>,
    /// Whether dropping it ends the tracing.
    ours: bool,
    /// What it died of in a call.
    died_of: Option<libc::c_int>,
}

impl Tracee {
    /// Stops thread `tid`, wherever it is.
    ///
    /// # Errors
    /// When it may not be traced, or has ended.
    pub fn stop(tid: i32) -> io::Result<Self> {
        Self::seize(tid, SUSPEND_SECCOMP)
    }

    /// As [`Self::stop`], but its filter stays in force: a call that the filter forbids is its end.
    ///
    /// # Errors
    /// As [`Self::stop`].
    pub fn stop_behind_filter(tid: i32) -> io::Result<Self> {
        Self::seize(tid, 0)
    }

    fn seize(tid: i32, options: libc::c_int) -> io::Result<Self> {
        request(libc::PTRACE_SEIZE, tid, 0, options as usize)?;
        request(libc::PTRACE_INTERRUPT, tid, 0, 0)?;
        let mut held = Vec::new();
        loop {
            let (_, status) = wait(tid)?;
            if !libc::WIFSTOPPED(status) {
                return Err(io::Error::other(format!("thread {tid} has ended")));
            }
            if status >> 16 == libc::PTRACE_EVENT_STOP {
                break;
            }
            // It was about to take a signal.
            held.push(libc::WSTOPSIG(status));
            request(libc::PTRACE_CONT, tid, 0, 0)?;
        }
        Self::new(tid, held, true)
    }

    /// A thread that is traced and stopped already, and stays traced when this goes.
    pub(crate) fn borrowed(tid: i32) -> io::Result<Self> {
        Self::new(tid, Vec::new(), false)
    }

    fn new(tid: i32, held: Vec<libc::c_int>, ours: bool) -> io::Result<Self> {
        let memory = File::options()
            .read(true)
            .write(true)
            .open(format!("/proc/{tid}/mem"))?;
        let mut tracee = Self {
            tid,
            memory,
            gadget: 0,
            held,
            ours,
            died_of: None,
        };
        tracee.gadget = tracee.find_gadget()?;
        Ok(tracee)
    }

    /// Its id.
    #[must_use]
    pub fn tid(&self) -> i32 {
        self.tid
    }

    fn find_gadget(&self) -> io::Result<u64> {
        // A thread that waits in a call has just executed one.
        let behind = self.registers()?.rip.wrapping_sub(2);
        let mut bytes = [0; 2];
        if self.memory.read_exact_at(&mut bytes, behind).is_ok() && bytes == SYSCALL {
            return Ok(behind);
        }
        let maps = fs::read_to_string(format!("/proc/{}/maps", self.tid))?;
        for line in maps.lines().filter(|l| l.contains(" r-xp ")) {
            let range = line.split(' ').next().and_then(|r| r.split_once('-'));
            let number = |text: &str| u64::from_str_radix(text, 16).ok();
            let Some((Some(from), Some(to))) = range.map(|(a, b)| (number(a), number(b))) else {
                continue;
            };
            let mut text = vec![0; usize::try_from(to - from).unwrap_or(0)];
            if self.memory.read_exact_at(&mut text, from).is_err() {
                continue; // the vdso's neighbours
            }
            if let Some(at) = text.windows(2).position(|w| w == SYSCALL) {
                return Ok(from + at as u64);
            }
        }
        Err(io::Error::other("its text has no syscall instruction"))
    }

    /// Its registers.
    ///
    /// # Errors
    /// When it has been killed.
    pub fn registers(&self) -> io::Result<Registers> {
        // SAFETY: all bit patterns are registers.
        let mut registers: Registers = unsafe { std::mem::zeroed() };
        request(
            libc::PTRACE_GETREGS,
            self.tid,
            0,
            (&raw mut registers) as usize,
        )?;
        Ok(registers)
    }

    /// Changes its registers.
    ///
    /// # Errors
    /// When it has been killed.
    pub fn set_registers(&self, registers: &Registers) -> io::Result<()> {
        let data = std::ptr::from_ref(registers) as usize;
        request(libc::PTRACE_SETREGS, self.tid, 0, data).map(drop)
    }

    /// Lets it go on until it waits in one of these calls, or has.
    ///
    /// # Errors
    /// When it ends before.
    pub fn go_on_until_in(&mut self, calls: &[libc::c_long]) -> io::Result<()> {
        loop {
            let now = self.registers()?;
            let is_wanted = calls.contains(&now.orig_rax.cast_signed());
            // What the kernel puts there before a call is made.
            let is_before = now.rax.cast_signed() == -i64::from(libc::ENOSYS);
            if is_wanted && !is_before {
                return Ok(());
            }
            if is_wanted {
                request(libc::PTRACE_CONT, self.tid, 0, 0)?;
                request(libc::PTRACE_INTERRUPT, self.tid, 0, 0)?;
            } else {
                request(libc::PTRACE_SYSCALL, self.tid, 0, 0)?;
            }
            let (_, status) = wait(self.tid)?;
            if !libc::WIFSTOPPED(status) {
                return Err(io::Error::other(format!("thread {} has ended", self.tid)));
            }
            match (libc::WSTOPSIG(status), status >> 16) {
                (libc::SIGTRAP, _) => {}
                (_, event) if event != 0 => {}
                (other, _) => self.held.push(other),
            }
        }
    }

    /// Reads its memory.
    ///
    /// # Errors
    /// When nothing is mapped there.
    pub fn read(&self, address: u64, bytes: &mut [u8]) -> io::Result<()> {
        self.memory.read_exact_at(bytes, address)
    }

    /// Writes its memory, whatever its protection.
    ///
    /// # Errors
    /// When nothing is mapped there.
    pub fn write(&self, address: u64, bytes: &[u8]) -> io::Result<()> {
        self.memory.write_all_at(bytes, address)
    }

    /// The signal that it was killed by in a call, if it was.
    #[must_use]
    pub fn died_of(&self) -> Option<libc::c_int> {
        self.died_of
    }

    /// As [`Self::call`], by another instruction of two bytes in the place of `syscall`.
    ///
    /// # Errors
    /// As [`Self::call`].
    pub fn call_by(
        &mut self,
        instruction: &[u8; 2],
        number: libc::c_long,
        arguments: &[u64],
    ) -> io::Result<i64> {
        self.write(self.gadget, instruction)?;
        let result = self.call(number, arguments);
        if self.died_of.is_none() {
            self.write(self.gadget, &SYSCALL)?;
        }
        result
    }

    /// Makes a system call in its name: its result, or a negative error number.
    ///
    /// # Errors
    /// When it has been killed meanwhile.
    pub fn call(&mut self, number: libc::c_long, arguments: &[u64]) -> io::Result<i64> {
        let before = self.registers()?;
        let mut now = before;
        now.rip = self.gadget;
        now.rax = number as u64;
        now.orig_rax = u64::MAX; // it is in no call that could be restarted
        let slots = [
            &mut now.rdi,
            &mut now.rsi,
            &mut now.rdx,
            &mut now.r10,
            &mut now.r8,
            &mut now.r9,
        ];
        for (slot, at) in slots.into_iter().zip(0..) {
            *slot = arguments.get(at).copied().unwrap_or(0);
        }
        self.set_registers(&now)?;
        loop {
            request(libc::PTRACE_SINGLESTEP, self.tid, 0, 0)?;
            let (_, status) = wait(self.tid)?;
            if !libc::WIFSTOPPED(status) {
                self.died_of = libc::WIFSIGNALED(status).then(|| libc::WTERMSIG(status));
                return Err(io::Error::other(format!(
                    "thread {} has ended in call {number}",
                    self.tid
                )));
            }
            match (libc::WSTOPSIG(status), status >> 16) {
                (libc::SIGTRAP, 0) => break,
                (_, event) if event != 0 => {}
                (other, _) => self.held.push(other),
            }
        }
        let result = self.registers()?.rax.cast_signed();
        self.set_registers(&before)?;
        Ok(result)
    }

    /// As [`Self::call`], with `memory` lent to it: argument `place` is its address, and what the call writes there
    /// comes back in it.
    ///
    /// # Errors
    /// As [`Self::call`].
    pub fn call_with(
        &mut self,
        number: libc::c_long,
        arguments: &[u64],
        place: usize,
        memory: &mut [u8],
    ) -> io::Result<i64> {
        assert!(
            memory.len() <= MAX_LENT,
            "no more is lent than a stack surely has"
        );
        // What its stack holds is put back, so that nothing has to be mapped for this.
        let address = self.registers()?.rsp;
        let mut kept = vec![0; memory.len()];
        self.read(address, &mut kept)?;
        self.write(address, memory)?;
        let mut arguments = arguments.to_vec();
        arguments[place] = address;
        let result = self.call(number, &arguments)?;
        self.read(address, memory)?;
        self.write(address, &kept)?;
        Ok(result)
    }

    /// As [`Self::call_with`], with a path or another text that ends with a NUL.
    ///
    /// # Errors
    /// As [`Self::call`].
    pub fn call_path(
        &mut self,
        number: libc::c_long,
        arguments: &[u64],
        place: usize,
        text: &str,
    ) -> io::Result<i64> {
        let mut bytes = [text.as_bytes(), &[0]].concat();
        self.call_with(number, arguments, place, &mut bytes)
    }

    /// Lets it go on until it has made a system call of this number: the result of that, or a negative error number. It is stopped before
    /// it knows.
    ///
    /// # Errors
    /// When it has ended before.
    pub fn run_through(&mut self, number: libc::c_long) -> io::Result<i64> {
        loop {
            request(libc::PTRACE_SYSCALL, self.tid, 0, 0)?;
            let (_, status) = wait(self.tid)?;
            if !libc::WIFSTOPPED(status) {
                return Err(io::Error::other(format!(
                    "thread {} has ended before call {number}",
                    self.tid
                )));
            }
            match (libc::WSTOPSIG(status), status >> 16) {
                (libc::SIGTRAP, 0) => {
                    let registers = self.registers()?;
                    let result = registers.rax.cast_signed();
                    // Which is what the kernel has there on the way in.
                    let before = result == -i64::from(libc::ENOSYS);
                    if registers.orig_rax == number as u64 && !before {
                        return Ok(result);
                    }
                }
                (_, event) if event != 0 => {}
                (other, _) => self.held.push(other),
            }
        }
    }

    /// Kills it where it is.
    ///
    /// # Errors
    /// When it is gone already.
    pub fn kill(mut self) -> io::Result<()> {
        signal(self.tid, libc::SIGKILL);
        self.held.clear();
        self.ours = false;
        // Its parent is told when its tracer knows.
        while !libc::WIFSIGNALED(wait(self.tid)?.1) {}
        Ok(())
    }

    /// Its seccomp filters, the oldest first, each as the kernel was given it.
    ///
    /// # Errors
    /// When this process has a filter itself, or the kernel was built without `CONFIG_CHECKPOINT_RESTORE`.
    pub fn filters(&self) -> io::Result<Vec<Vec<libc::sock_filter>>> {
        let mut all = Vec::new();
        loop {
            let length = match request(SECCOMP_GET_FILTER, self.tid, all.len(), 0) {
                Ok(length) => usize::try_from(length).unwrap_or(0),
                // No filter at all, or no more.
                Err(e) if matches!(e.raw_os_error(), Some(libc::ENOENT | libc::EINVAL)) => {
                    return Ok(all);
                }
                Err(e) => return Err(e),
            };
            let empty = libc::sock_filter {
                code: 0,
                jt: 0,
                jf: 0,
                k: 0,
            };
            let mut program = vec![empty; length];
            request(
                SECCOMP_GET_FILTER,
                self.tid,
                all.len(),
                program.as_mut_ptr() as usize,
            )?;
            all.push(program);
        }
    }
}

impl Drop for Tracee {
    fn drop(&mut self) {
        if self.ours {
            // It fails only for one that is gone.
            let _ = request(libc::PTRACE_DETACH, self.tid, 0, 0);
        }
        for held in self.held.drain(..) {
            signal(self.tid, held);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::process::{Command, Stdio};

    #[test]
    fn calls_are_made_in_the_name_of_another_process() {
        crate::host::require_root();
        let mut child = Command::new("cat")
            .stdin(Stdio::piped())
            .stdout(Stdio::null())
            .spawn()
            .unwrap();
        let pid = i32::try_from(child.id()).unwrap();
        let mut tracee = Tracee::stop(pid).unwrap();
        assert_eq!(tracee.call(libc::SYS_getpid, &[]).unwrap(), i64::from(pid));
        let opened = tracee
            .call_path(
                libc::SYS_openat,
                &[libc::AT_FDCWD as u64, 0, 0],
                1,
                "/dev/zero",
            )
            .unwrap();
        assert_eq!(
            fs::read_link(format!("/proc/{pid}/fd/{opened}"))
                .unwrap()
                .to_str(),
            Some("/dev/zero")
        );
        let missing = tracee
            .call_path(
                libc::SYS_openat,
                &[libc::AT_FDCWD as u64, 0, 0],
                1,
                "/nowhere",
            )
            .unwrap();
        assert_eq!(missing, -i64::from(libc::ENOENT));
        assert!(tracee.filters().unwrap().is_empty());
        drop(tracee);
        drop(child.stdin.take());
        assert!(child.wait().unwrap().success(), "it went on where it was");
    }
}
