//! The threads that run vCPUs.
//!
//! Job: one thread per vCPU that enters the guest, hands port and memory accesses to an [`IoHandler`], and reports what
//! it cannot continue from; pause, resume and stop of all of them.
//! Who is not trusted: the guest, which chooses every access. An exit is at most one access of at most 8 bytes per
//! repetition; all of it is passed on as a slice whose length the kernel set.
//!
//! The gate. A vCPU is either *parked* (it waits at the gate and does not touch its vCPU) or *running*. `pause` closes
//! the gate, interrupts the guest, and returns when all are parked. A vCPU that met a fatal exit, or whose guest just
//! asked for a reset or power-off, closes the gate itself, so that nothing runs on while the main thread decides.
//! Interrupting: `immediate_exit` in the shared run page makes the next KVM_RUN return at once, and a signal ends the
//! one under way. The flag is set after the gate is closed and cleared before the gate is looked at, so whichever way
//! the two threads interleave, the vCPU either sees the closed gate or leaves the guest at once.
//! A parked vCPU is between two instructions: an access that was answered is completed first, so that its registers can
//! be saved.
//! Why this way: a lock per exit would cost more than the exit's work; one relaxed load of the gate's flag does not.

#![allow(unsafe_code)] // the run page is shared memory that the kernel fills; signals are masked by libc

use std::sync::atomic::{AtomicBool, AtomicU8, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::Builder;

use kvm_ioctls::{VcpuExit, VcpuFd};
use nix::unistd::{Pid, getpid, gettid};

use super::{Error, RegisterDump};

/// Answers the guest's port and memory accesses. Called on vCPU threads, possibly at the same time.
pub trait IoHandler: Send + Sync {
    /// `in` from `port`: fill `data` (1, 2 or 4 bytes).
    fn pio_read(&self, port: u16, data: &mut [u8]);
    /// `out` to `port`.
    fn pio_write(&self, port: u16, data: &[u8]);
    /// Read from an address without RAM: fill `data` (up to 8 bytes).
    fn mmio_read(&self, address: u64, data: &mut [u8]);
    /// Write to an address without RAM.
    fn mmio_write(&self, address: u64, data: &[u8]);
}

/// Why a vCPU stopped by itself.
#[derive(Debug)]
pub enum VcpuStop {
    /// Triple fault (KVM_EXIT_SHUTDOWN). Some kernels reboot this way.
    TripleFault(Box<RegisterDump>),
    /// KVM could not continue, for instance because it cannot emulate an instruction.
    InternalError {
        /// KVM's `suberror`: 1 emulation failure, 2 simultaneous exceptions, 3 delivery, 4 unexpected exit.
        suberror: u32,
        /// The words that KVM adds; for an emulation failure they hold flags and the instruction's bytes.
        data: Vec<u64>,
        /// Registers at that point.
        registers: Box<RegisterDump>,
    },
    /// The processor refused to enter the guest.
    FailEntry {
        /// The processor's reason.
        reason: u64,
        /// Registers at that point.
        registers: Box<RegisterDump>,
    },
    /// The guest used a system event (PSCI-like reset or shutdown); 1 shutdown, 2 reset, 3 crash.
    SystemEvent(u32),
    /// The guest touched memory behind which the host has nothing, or not what the access needs.
    Fault(String),
    /// The start-up closure of the thread failed, KVM_RUN returned an error, or an exit nobody asked for came up.
    Error(String),
}

/// Receives why vCPU `u32` stopped. The vCPU is parked when the sink returns.
pub type StopSink = Arc<dyn Fn(u32, VcpuStop) + Send + Sync>;

/// Runs first on each vCPU thread with the vCPU's number; an error keeps that vCPU from ever running.
pub type ThreadStart =
    Arc<dyn Fn(u32) -> Result<(), Box<dyn std::error::Error + Send + Sync>> + Send + Sync>;

/// Bytes of a vCPU thread's stack. The deepest path is an exit into a device front, a few KiB.
const STACK_SIZE: usize = 256 << 10;

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // A panic aborts the process, so a poisoned lock cannot be seen.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Want {
    Park,
    Run,
    Exit,
}

#[derive(Debug)]
struct GateState {
    want: Want,
    parked: usize,
    /// Threads that have let go of everything.
    gone: usize,
    /// Thread id of each vCPU thread that has started.
    thread_ids: Vec<Option<Pid>>,
}

/// The gate that all vCPU threads of a VM share.
#[derive(Debug)]
pub struct Gate {
    closed: AtomicBool,
    state: Mutex<GateState>,
    changed: Condvar,
}

impl Gate {
    fn new(vcpus: usize) -> Self {
        Self {
            closed: AtomicBool::new(true),
            state: Mutex::new(GateState {
                want: Want::Park,
                parked: 0,
                gone: 0,
                thread_ids: vec![None; vcpus],
            }),
            changed: Condvar::new(),
        }
    }

    /// Parks each vCPU at its next exit, without interrupting or waiting. For device code on a vCPU thread: the
    /// calling vCPU does not return to the guest.
    pub fn close(&self) {
        let mut state = lock(&self.state);
        if state.want == Want::Run {
            state.want = Want::Park;
        }
        self.closed.store(true, Ordering::SeqCst);
    }

    fn set(&self, want: Want) {
        let mut state = lock(&self.state);
        state.want = want;
        self.closed.store(want != Want::Run, Ordering::SeqCst);
        self.changed.notify_all();
    }

    fn is_closed(&self) -> bool {
        self.closed.load(Ordering::SeqCst)
    }

    /// Waits at the gate; returns whether to run (or else to exit).
    fn wait(&self) -> bool {
        let mut state = lock(&self.state);
        state.parked += 1;
        self.changed.notify_all();
        while state.want == Want::Park {
            state = self
                .changed
                .wait(state)
                .unwrap_or_else(PoisonError::into_inner);
        }
        state.parked -= 1;
        state.want == Want::Run
    }

    /// The calling thread has let go of its vCPU and of everything else.
    fn leave(&self) {
        lock(&self.state).gone += 1;
        self.changed.notify_all();
    }
}

/// The flag in a vCPU's run page that ends its next KVM_RUN at once.
#[derive(Debug)]
struct ImmediateExit(*mut u8);

// SAFETY: the pointer is into a shared mapping that outlives this value (both live in `Shared`), and it is only ever
// used for atomic stores.
unsafe impl Send for ImmediateExit {}
// SAFETY: as above; atomic stores may come from any thread.
unsafe impl Sync for ImmediateExit {}

impl ImmediateExit {
    fn set(&self, value: u8) {
        // SAFETY: points to a byte of the vCPU's run page, which is mapped as long as the `VcpuFd` beside it lives.
        unsafe { AtomicU8::from_ptr(self.0) }.store(value, Ordering::SeqCst);
    }
}

#[derive(Debug)]
struct Shared {
    index: u32,
    immediate_exit: ImmediateExit,
    /// Held by the thread while it runs, and free while it is parked.
    vcpu: Mutex<VcpuFd>,
}

/// All vCPUs of a VM and their threads.
pub struct VcpuThreads {
    vcpus: Vec<Arc<Shared>>,
    gate: Arc<Gate>,
    /// How many threads were started.
    threads: usize,
    /// This process, for signals to its threads: asking later would be one more call for the filter to allow.
    process: Pid,
}

impl std::fmt::Debug for VcpuThreads {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("VcpuThreads")
            .field("vcpus", &self.vcpus.len())
            .field("gate", &self.gate)
            .finish()
    }
}

extern "C" fn interrupt_handler(_: libc::c_int, _: *mut libc::siginfo_t, _: *mut libc::c_void) {
    // Nothing to do: the signal's arrival ends KVM_RUN.
}

fn interrupt_signal() -> libc::c_int {
    libc::SIGRTMIN()
}

impl VcpuThreads {
    /// Takes vCPUs, none running.
    pub(crate) fn new(vcpus: Vec<VcpuFd>) -> Self {
        let gate = Arc::new(Gate::new(vcpus.len()));
        let vcpus = (0u32..)
            .zip(vcpus)
            .map(|(index, mut vcpu)| {
                let immediate_exit = ImmediateExit(&raw mut vcpu.get_kvm_run().immediate_exit);
                Arc::new(Shared {
                    index,
                    immediate_exit,
                    vcpu: Mutex::new(vcpu),
                })
            })
            .collect();
        Self {
            vcpus,
            gate,
            threads: 0,
            process: getpid(),
        }
    }

    /// The gate, for devices that end or reset the guest.
    #[must_use]
    pub fn gate(&self) -> Arc<Gate> {
        self.gate.clone()
    }

    /// Starts the threads. Each runs `on_start`, then waits for [`Self::resume`]. Returns without waiting for them.
    ///
    /// # Errors
    /// A thread cannot be created, or this was called before.
    pub fn start(
        &mut self,
        io: &Arc<dyn IoHandler>,
        on_start: &ThreadStart,
        stop: &StopSink,
    ) -> Result<(), Error> {
        if self.threads > 0 {
            return Err(Error::AlreadyStarted);
        }
        vmm_sys_util::signal::register_signal_handler(interrupt_signal(), interrupt_handler)
            .map_err(Error::Signal)?;
        for shared in &self.vcpus {
            let (shared, gate) = (shared.clone(), self.gate.clone());
            let (io, on_start, stop) = (io.clone(), on_start.clone(), stop.clone());
            let index = shared.index;
            let body = move || {
                thread_main(&shared, &gate, io.as_ref(), &on_start, &stop);
                drop((shared, io, on_start, stop));
                gate.leave();
                // A thread's end takes calls that its filter would have to allow for nothing but that.
                loop {
                    std::thread::park();
                }
            };
            Builder::new()
                .name(format!("vcpu{index}"))
                .stack_size(STACK_SIZE)
                .spawn(body)
                .map_err(|source| Error::Thread {
                    vcpu: index,
                    source,
                })?;
            self.threads += 1;
        }
        Ok(())
    }

    /// Opens the gate.
    ///
    /// # Errors
    /// The threads have not been started.
    pub fn resume(&mut self) -> Result<(), Error> {
        if self.threads < self.vcpus.len() {
            return Err(Error::NotStarted);
        }
        self.gate.set(Want::Run);
        Ok(())
    }

    /// Closes the gate, interrupts the guest and waits until every vCPU is parked.
    ///
    /// # Errors
    /// None at present; the type leaves room.
    pub fn pause(&self) -> Result<(), Error> {
        self.gate.set(Want::Park);
        self.interrupt();
        let mut state = lock(&self.gate.state);
        while state.parked < self.threads {
            state = self
                .gate
                .changed
                .wait(state)
                .unwrap_or_else(PoisonError::into_inner);
        }
        Ok(())
    }

    /// Thread ids of the vCPU threads in order; waits until all have started.
    ///
    /// # Errors
    /// The threads have not been started.
    pub fn thread_ids(&self) -> Result<Vec<Pid>, Error> {
        if self.threads < self.vcpus.len() {
            return Err(Error::NotStarted);
        }
        let mut state = lock(&self.gate.state);
        loop {
            if let Some(ids) = state.thread_ids.iter().copied().collect::<Option<Vec<_>>>() {
                return Ok(ids);
            }
            state = self
                .gate
                .changed
                .wait(state)
                .unwrap_or_else(PoisonError::into_inner);
        }
    }

    /// Calls `visit` with each vCPU, all parked.
    ///
    /// # Errors
    /// [`Error::Running`] when the gate is open, or what `visit` returns.
    pub(crate) fn for_each(
        &self,
        mut visit: impl FnMut(u32, &VcpuFd) -> Result<(), Error>,
    ) -> Result<(), Error> {
        if !self.gate.is_closed() {
            return Err(Error::Running);
        }
        self.vcpus
            .iter()
            .try_for_each(|shared| visit(shared.index, &lock(&shared.vcpu)))
    }

    fn interrupt(&self) {
        let ids = lock(&self.gate.state).thread_ids.clone();
        for (shared, id) in self.vcpus.iter().zip(ids) {
            shared.immediate_exit.set(1);
            // One that has not told its id yet looks at the gate before it enters the guest.
            let Some(id) = id else { continue };
            let (process, id) = (self.process.as_raw(), id.as_raw());
            // Not pthread_kill, which blocks all signals meanwhile, with two more calls.
            // SAFETY: sends a signal that has a handler to a thread of this process, which never ends.
            unsafe { libc::syscall(libc::SYS_tgkill, process, id, interrupt_signal()) };
        }
    }
}

impl Drop for VcpuThreads {
    fn drop(&mut self) {
        self.gate.set(Want::Exit);
        self.interrupt();
        let mut state = lock(&self.gate.state);
        while state.gone < self.threads {
            state = self
                .gate
                .changed
                .wait(state)
                .unwrap_or_else(PoisonError::into_inner);
        }
    }
}

/// Lets only the interrupting signal (and faults, which cannot be blocked usefully) reach this thread, so that signals
/// for the process go to the main thread.
fn mask_signals() {
    // SAFETY: plain libc calls on a set that lives on this stack.
    unsafe {
        let mut set: libc::sigset_t = std::mem::zeroed();
        libc::sigfillset(&raw mut set);
        for signal in [
            interrupt_signal(),
            libc::SIGSEGV,
            libc::SIGBUS,
            libc::SIGILL,
            libc::SIGFPE,
            libc::SIGSYS,
        ] {
            libc::sigdelset(&raw mut set, signal);
        }
        libc::pthread_sigmask(libc::SIG_SETMASK, &raw const set, std::ptr::null_mut());
    }
}

fn thread_main(
    shared: &Shared,
    gate: &Gate,
    io: &dyn IoHandler,
    on_start: &ThreadStart,
    stop: &StopSink,
) {
    mask_signals();
    {
        let mut state = lock(&gate.state);
        if let Some(id) = state.thread_ids.get_mut(shared.index as usize) {
            *id = Some(gettid());
        }
        gate.changed.notify_all();
    }
    let mut usable = true;
    if let Err(error) = on_start(shared.index) {
        usable = false;
        stop(
            shared.index,
            VcpuStop::Error(format!("start of the vCPU's thread: {error}")),
        );
    }
    let mut has_run = false;
    while gate.wait() {
        if !usable {
            gate.close();
            continue;
        }
        let mut vcpu = lock(&shared.vcpu);
        if has_run {
            // Time passed that the guest did not see: its watchdogs must not take that for a hang. EINVAL: this guest
            // does not use kvmclock.
            let _ = vcpu.kvmclock_ctrl();
        }
        has_run = true;
        shared.immediate_exit.set(0);
        if let Some(reason) = run(&mut vcpu, shared.index, gate, io) {
            gate.close();
            drop(vcpu);
            stop(shared.index, reason);
        }
    }
}

/// What an exit leaves to do once the borrow of the run page has ended.
enum After {
    /// Another round.
    Round,
    /// The access was served, which KVM has yet to hear.
    Served,
    Port(PortAccess),
    Stop(VcpuStop),
    TripleFault,
    InternalError,
    FailEntry(u64),
}

/// Accesses to one port, and where their data are in the run page. Only [`enter`] makes one.
struct PortAccess {
    port: u16,
    data: *mut u8,
    length: usize,
    write: bool,
}

/// Runs the guest until the gate closes (`None`) or it cannot go on.
fn run(vcpu: &mut VcpuFd, index: u32, gate: &Gate, io: &dyn IoHandler) -> Option<VcpuStop> {
    // Whether KVM has yet to hear what became of the last access: it completes the instruction at the next KVM_RUN.
    let mut unfinished = false;
    loop {
        if gate.is_closed() {
            if !unfinished {
                return None;
            }
            // Completes the access and comes back without entering the guest, or asks for the access's next part.
            vcpu.set_kvm_immediate_exit(1);
        }
        unfinished = false;
        match enter(vcpu, io) {
            After::Round => {}
            After::Served => unfinished = true,
            After::Port(access) => {
                serve_port(vcpu, &access, io);
                unfinished = true;
            }
            After::Stop(stop) => return Some(stop),
            After::TripleFault => return Some(with_registers(vcpu, index, VcpuStop::TripleFault)),
            After::FailEntry(reason) => {
                return Some(with_registers(vcpu, index, |registers| {
                    VcpuStop::FailEntry { reason, registers }
                }));
            }
            After::InternalError => return Some(internal_error(vcpu, index)),
        }
    }
}

/// Runs the guest up to its next exit, and serves an access to memory, whose data the exit has with it.
fn enter(vcpu: &mut VcpuFd, io: &dyn IoHandler) -> After {
    match vcpu.run() {
        Ok(VcpuExit::IoOut(port, data)) => After::Port(PortAccess {
            port,
            data: data.as_ptr().cast_mut(),
            length: data.len(),
            write: true,
        }),
        Ok(VcpuExit::IoIn(port, data)) => After::Port(PortAccess {
            port,
            data: data.as_mut_ptr(),
            length: data.len(),
            write: false,
        }),
        Ok(VcpuExit::MmioRead(address, data)) => {
            io.mmio_read(address, data);
            After::Served
        }
        Ok(VcpuExit::MmioWrite(address, data)) => {
            io.mmio_write(address, data);
            After::Served
        }
        // A halt exits only without in-kernel LAPIC; these ask for nothing but another round.
        Ok(VcpuExit::Intr | VcpuExit::IrqWindowOpen | VcpuExit::Hlt) => After::Round,
        Ok(VcpuExit::Shutdown) => After::TripleFault,
        Ok(VcpuExit::InternalError) => After::InternalError,
        Ok(VcpuExit::FailEntry(reason, _)) => After::FailEntry(reason),
        Ok(VcpuExit::SystemEvent(kind, _)) => After::Stop(VcpuStop::SystemEvent(kind)),
        Ok(VcpuExit::MemoryFault { flags, gpa, size }) => After::Stop(VcpuStop::Fault(format!(
            "access to guest address {gpa:#x} ({size} bytes, flags {flags:#x}) failed on the host"
        ))),
        Ok(other) => After::Stop(VcpuStop::Error(format!("unexpected exit {other:?}"))),
        Err(error) => match error.errno() {
            // Interrupted: the gate tells whether that was meant. The flag is cleared first, see the module page.
            libc::EINTR => {
                vcpu.set_kvm_immediate_exit(0);
                After::Round
            }
            libc::EAGAIN => After::Round,
            libc::EFAULT => After::Stop(VcpuStop::Fault(format!("KVM_RUN: {error}"))),
            _ => After::Stop(VcpuStop::Error(format!("KVM_RUN: {error}"))),
        },
    }
}

/// Serves the accesses to a port for which the last [`enter`] came back.
fn serve_port(vcpu: &mut VcpuFd, access: &PortAccess, io: &dyn IoHandler) {
    // SAFETY: the last exit was KVM_EXIT_IO, so this is the union's valid member; `size` is 1, 2 or 4.
    let size = usize::from(unsafe { vcpu.get_kvm_run().__bindgen_anon_1.io.size });
    // SAFETY: kvm-ioctls gave this range of the run page for this exit; nothing else refers to it until
    // the next KVM_RUN, which this thread makes.
    let data = unsafe { std::slice::from_raw_parts_mut(access.data, access.length) };
    // String instructions bring several accesses to one port at once.
    for one in data.chunks_exact_mut(size.max(1)) {
        if access.write {
            io.pio_write(access.port, one);
        } else {
            io.pio_read(access.port, one);
        }
    }
}

/// What KVM says of itself where it could not go on.
fn internal_error(vcpu: &mut VcpuFd, index: u32) -> VcpuStop {
    // SAFETY: the last exit was KVM_EXIT_INTERNAL_ERROR, so this is the union's valid member.
    let internal = unsafe { vcpu.get_kvm_run().__bindgen_anon_1.internal };
    let count = internal.data.len().min(internal.ndata as usize);
    let data = internal.data[..count].to_vec();
    let suberror = internal.suberror;
    with_registers(vcpu, index, |registers| VcpuStop::InternalError {
        suberror,
        data,
        registers,
    })
}

fn with_registers(
    vcpu: &VcpuFd,
    index: u32,
    build: impl FnOnce(Box<RegisterDump>) -> VcpuStop,
) -> VcpuStop {
    match RegisterDump::read(vcpu, index) {
        Ok(registers) => build(Box::new(registers)),
        Err(error) => VcpuStop::Error(format!(
            "the vCPU stopped and its registers cannot be read: {error}"
        )),
    }
}
