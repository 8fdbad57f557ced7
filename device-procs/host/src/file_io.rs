//! I/O on one file that goes on while the device does something else, by io_uring.
//!
//! **Job.** Starts reads, writes, syncs and allocations on guest memory itself, holds what they need until the kernel is done,
//! and gives back what the device wanted to remember. A request is done whole or has failed: short transfers go on by themselves.
//!
//! **Who is not trusted.** Guest buffers may be unmapped by the front end meanwhile, so each request keeps its memory alive.
//! This process, once jailed: io_uring passes by the system call filter, so the kernel is told before the jail is shut which
//! operations it may ever do here (`IORING_REGISTER_RESTRICTIONS`, once, never undone). There is none that opens, connects,
//! sends, polls or takes a path, and the restrictions let nothing be registered later.
//!
//! **Why this way.** One call starts a whole batch and one more byte of shared memory tells that it is done. Slots are made once: no
//! request allocates, and a guest that has thousands in its rings has no more than the slots in the kernel. The file is not
//! registered with the ring: Linux lets go of a registered file some milliseconds after its process has ended, and the next
//! process would find the image's lock still held.

#![allow(unsafe_code)] // io_uring: the kernel reads and writes memory that no Rust reference may point to

use std::os::fd::{AsFd, AsRawFd, BorrowedFd};

use io_uring::register::Restriction;
use io_uring::{EnterFlags, IoUring, Submitter, opcode, types};
use nix::errno::Errno;

use crate::memory::{GuestBuffers, HeldBuffers};

/// Kernel threads for what cannot be done without waiting: on a file at most this many, so that they fit into the limit that
/// the jail has (`RLIMIT_NPROC`).
const WORKERS: [u32; 2] = [4, 4];

/// Bytes in flight, beyond which nothing more is started: whoever wants the queue stopped waits for these, and more does not
/// make any disk faster.
const MAX_BYTES: usize = 16 << 20;

/// What may be done to the file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Access {
    /// No operation that could change it is possible.
    Read,
    /// All operations.
    Write,
}

/// An operation on a range of bytes that moves none.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Range {
    /// The bytes read as zeros afterwards, and take no space if the file system can do that.
    Punch,
    /// The bytes read as zeros afterwards, and their space stays reserved.
    Zero,
}

/// A file with operations in flight; each has a `T` to remember.
#[derive(Debug)]
pub struct FileIo<T> {
    ring: Ring,
    /// The caller keeps it open as long as this value.
    file: types::Fd,
    slots: Vec<Slot<T>>,
    free: Vec<u16>,
    /// Operations that the kernel has not been told of.
    queued: usize,
    /// Bytes that operations in flight move.
    bytes: usize,
    /// So many are told the kernel without being asked to, if it has no more than those.
    batch: usize,
}

/// `IoUring` has no `Debug`.
struct Ring(IoUring);

impl std::fmt::Debug for Ring {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("io_uring")
    }
}

#[derive(Debug)]
struct Slot<T> {
    then: Option<T>,
    operation: Operation,
    buffers: HeldBuffers,
    /// Bytes of the buffers at the start.
    bytes: usize,
}

#[derive(Debug, Clone, Copy)]
enum Operation {
    Read { at: u64 },
    Write { at: u64, durable: bool },
    Sync,
    Range { at: u64, len: u64, kind: Range },
}

/// The right to start one operation. While it is held nothing else can be started, so it cannot be out of date.
#[derive(Debug)]
pub struct Room<'a, T> {
    io: &'a mut FileIo<T>,
    slot: u16,
}

/// Keeps the kernel's workers on this thread's processors: left alone, those of some kernels run wherever the cgroup may.
fn stay_here(submitter: &Submitter<'_>) {
    // SAFETY: all zeroes is a set without processors.
    let mut set: libc::cpu_set_t = unsafe { std::mem::zeroed() };
    // SAFETY: the kernel fills at most as many bytes as it is told.
    let known = unsafe { libc::sched_getaffinity(0, size_of_val(&set), &raw mut set) } >= 0;
    // Linux 5.14 has it; a host of more processors than the set has bits does not take it. All goes on without.
    if !known || submitter.register_iowq_aff(&set).is_err() {
        ipc::log::debug!("the kernel's workers for this image run on any processor");
    }
}

impl<T> FileIo<T> {
    /// For at most `depth` operations at once on `file`, which must stay open as long as the result: its number is all that is
    /// kept. To be made before the jail is shut.
    ///
    /// # Errors
    /// The host has no io_uring, or forbids it (`kernel.io_uring_disabled`, a filter), or cannot restrict it (Linux 5.10).
    pub fn new(file: BorrowedFd<'_>, depth: u16, access: Access) -> Result<Self, Errno> {
        let ring = build(u32::from(depth.max(1)))?;
        let io = |error: std::io::Error| Errno::from_raw(error.raw_os_error().unwrap_or(libc::EIO));
        let submitter = ring.submitter();
        let mut workers = WORKERS;
        submitter
            .register_iowq_max_workers(&mut workers)
            .map_err(io)?;
        stay_here(&submitter);
        let mut allowed = vec![
            Restriction::sqe_op(opcode::Read::CODE),
            Restriction::sqe_op(opcode::Readv::CODE),
        ];
        if access == Access::Write {
            for code in [
                opcode::Write::CODE,
                opcode::Writev::CODE,
                opcode::Fsync::CODE,
                opcode::Fallocate::CODE,
            ] {
                allowed.push(Restriction::sqe_op(code));
            }
        }
        submitter.register_restrictions(&mut allowed).map_err(io)?;
        submitter.register_enable_rings().map_err(io)?;
        Ok(Self {
            ring: Ring(ring),
            file: types::Fd(file.as_raw_fd()),
            slots: (0..depth.max(1))
                .map(|_| Slot {
                    then: None,
                    operation: Operation::Sync,
                    buffers: HeldBuffers::default(),
                    bytes: 0,
                })
                .collect(),
            free: (0..depth.max(1)).rev().collect(),
            queued: 0,
            bytes: 0,
            batch: usize::MAX,
        })
    }

    /// Tells the kernel as soon as `most` operations wait for that, and as many as it has already, not only when it is
    /// [asked to](Self::submit): a disk begins with the first of many while the last are still being read from the rings, and
    /// one that has enough to do is not told of every few.
    #[must_use]
    pub fn in_batches_of(mut self, most: usize) -> Self {
        self.batch = most.max(1);
        self
    }

    /// Room for one more operation, if there is any: few large ones fill it as many small ones do.
    pub fn room(&mut self) -> Option<Room<'_, T>> {
        if self.bytes >= MAX_BYTES {
            return None;
        }
        let slot = *self.free.last()?;
        Some(Room { io: self, slot })
    }

    /// Operations that were started and not yet given back by [`finished`](Self::finished).
    pub fn in_flight(&self) -> usize {
        self.slots.len() - self.free.len()
    }

    /// Tells the kernel of all operations that were started since the last call, and lets it finish what it can.
    ///
    /// # Errors
    /// The kernel cannot take any now, for want of memory.
    pub fn submit(&mut self) -> Result<(), Errno> {
        if self.queued > 0 || self.must_enter() {
            self.enter(0)?;
        }
        Ok(())
    }

    /// An operation that is done, and how. `None` if there is none now.
    pub fn finished(&mut self) -> Option<(T, Result<(), Errno>)> {
        loop {
            let (slot, result) = {
                let entry = self.ring.0.completion().next()?;
                (entry.user_data(), entry.result())
            };
            // The kernel gives back what it was given: a slot's number.
            let index = slot as usize;
            let Some(entry) = self.slots.get_mut(index) else {
                continue;
            };
            let outcome = match (u32::try_from(result), &mut entry.operation) {
                (Err(_), _) => match Errno::from_raw(-result) {
                    Errno::EINTR | Errno::EAGAIN => None,
                    errno => Some(Err(errno)),
                },
                (Ok(done), Operation::Read { at } | Operation::Write { at, .. }) => {
                    *at += u64::from(done);
                    match (entry.buffers.advance(done as usize), done) {
                        (false, _) => Some(Ok(())),
                        // The file ends before the request does.
                        (true, 0) => Some(Err(Errno::EIO)),
                        (true, _) => None,
                    }
                }
                (Ok(_), Operation::Sync | Operation::Range { .. }) => Some(Ok(())),
            };
            match outcome {
                None => {
                    self.push(index);
                    // Whoever looks for finished operations may be about to sleep.
                    if let Err(errno) = self.enter(0) {
                        ipc::guest_warn!("io_uring_enter: {errno}");
                    }
                }
                Some(outcome) => {
                    entry.buffers.release();
                    self.bytes -= std::mem::take(&mut entry.bytes);
                    if let Some(then) = entry.then.take() {
                        // A slot's number, which is below the depth.
                        self.free.push(index as u16);
                        return Some((then, outcome));
                    }
                }
            }
        }
    }

    /// Whether [`finished`](Self::finished) may have something, without a system call.
    pub fn is_ready(&mut self) -> bool {
        !self.ring.0.completion().is_empty() || self.must_enter()
    }

    /// Sleeps until an operation is done, if any is in flight.
    ///
    /// # Errors
    /// As for [`submit`](Self::submit).
    pub fn wait(&mut self) -> Result<(), Errno> {
        if self.in_flight() > 0 && self.ring.0.completion().is_empty() {
            self.enter(1)?;
        }
        Ok(())
    }

    /// The kernel has completions to post that it posts only when it is entered.
    fn must_enter(&mut self) -> bool {
        let submission = self.ring.0.submission();
        submission.taskrun() || submission.cq_overflow()
    }

    /// Enough wait for the kernel to be told of them at once: a batch, or as many as it has, if those are more.
    fn is_batch(&mut self) -> bool {
        let posted = self.ring.0.completion().len();
        let there = self.in_flight().saturating_sub(self.queued + posted);
        self.queued >= self.batch.max(there)
    }

    fn enter(&mut self, want: u32) -> Result<(), Errno> {
        loop {
            let count = self.queued as u32; // at most the depth
            // SAFETY: all entries that are submitted were pushed by `push`, under its conditions.
            let result = unsafe {
                self.ring.0.submitter().enter::<libc::sigset_t>(
                    count,
                    want,
                    EnterFlags::GETEVENTS.bits(),
                    None,
                )
            };
            match result.map_err(|error| error.raw_os_error()) {
                Ok(taken) => {
                    self.queued = self.queued.saturating_sub(taken);
                    if self.queued == 0 {
                        return Ok(());
                    }
                }
                Err(Some(libc::EINTR)) => {}
                Err(code) => return Err(Errno::from_raw(code.unwrap_or(libc::EIO))),
            }
        }
    }

    /// Queues the slot's operation, or what is left of it.
    fn push(&mut self, index: usize) {
        let Some(slot) = self.slots.get(index) else {
            return;
        };
        let (file, pieces) = (self.file, slot.buffers.pieces());
        // At most MAX_CHAIN_SEGMENTS; a piece is at most 4 GiB - 1, and the kernel moves 2 GiB at most at a time.
        let count = pieces.len() as u32;
        let entry = match (slot.operation, pieces) {
            (Operation::Read { at }, [one]) => {
                opcode::Read::new(file, one.iov_base.cast(), one.iov_len as u32)
                    .offset(at)
                    .build()
            }
            (Operation::Read { at }, _) => opcode::Readv::new(file, pieces.as_ptr(), count)
                .offset(at)
                .build(),
            (Operation::Write { at, durable }, [one]) => {
                opcode::Write::new(file, one.iov_base.cast_const().cast(), one.iov_len as u32)
                    .offset(at)
                    .rw_flags(sync_flag(durable))
                    .build()
            }
            (Operation::Write { at, durable }, _) => {
                opcode::Writev::new(file, pieces.as_ptr(), count)
                    .offset(at)
                    .rw_flags(sync_flag(durable))
                    .build()
            }
            (Operation::Sync, _) => opcode::Fsync::new(file)
                .flags(types::FsyncFlags::DATASYNC)
                .build(),
            (Operation::Range { at, len, kind }, _) => opcode::Fallocate::new(file, len)
                .offset(at)
                .mode(mode(kind))
                .build(),
        }
        .user_data(index as u64);
        loop {
            // SAFETY: the pieces are in guest RAM that the slot keeps mapped, and the list of them is the slot's own: neither
            // is touched until the operation is given back, since only `finished` changes an occupied slot, and dropping
            // this value waits for the kernel first.
            if unsafe { self.ring.0.submission().push(&entry) }.is_ok() {
                self.queued += 1;
                return;
            }
            // Each slot has one entry at most, and there are as many entries as slots: this cannot happen twice.
            if let Err(errno) = self.enter(0) {
                ipc::guest_warn!("io_uring_enter: {errno}");
            }
        }
    }
}

impl<T> Room<'_, T> {
    /// Fills all of `buffers` from `offset` on.
    pub fn read(self, buffers: &GuestBuffers<'_>, at: u64, then: T) {
        self.start(Some(buffers), Operation::Read { at }, then);
    }

    /// Writes all of `buffers` from `offset` on; `durable`: the bytes are on the disk when it is done.
    pub fn write(self, buffers: &GuestBuffers<'_>, at: u64, durable: bool, then: T) {
        self.start(Some(buffers), Operation::Write { at, durable }, then);
    }

    /// Makes all writes durable that were done before.
    pub fn sync(self, then: T) {
        self.start(None, Operation::Sync, then);
    }

    /// Does something to `len` bytes from `at` on. The size of the file does not change.
    pub fn range(self, kind: Range, at: u64, len: u64, then: T) {
        self.start(None, Operation::Range { at, len, kind }, then);
    }

    fn start(self, buffers: Option<&GuestBuffers<'_>>, operation: Operation, then: T) {
        self.io.free.pop();
        let index = usize::from(self.slot);
        if let Some(slot) = self.io.slots.get_mut(index) {
            slot.then = Some(then);
            slot.operation = operation;
            if let Some(buffers) = buffers {
                slot.buffers.hold(buffers);
                slot.bytes = buffers.len();
                self.io.bytes += slot.bytes;
            }
        }
        self.io.push(index);
        // What cannot be taken now stays queued, and is an error when it is submitted at the end of the turn.
        if self.io.is_batch()
            && let Err(errno) = self.io.enter(0)
        {
            ipc::guest_warn!("io_uring_enter: {errno}");
        }
    }
}

impl<T> AsFd for FileIo<T> {
    /// Readable when an operation is done.
    fn as_fd(&self) -> BorrowedFd<'_> {
        // SAFETY: the ring's descriptor is open as long as the ring, which the result borrows.
        unsafe { BorrowedFd::borrow_raw(self.ring.0.as_raw_fd()) }
    }
}

impl<T> Drop for FileIo<T> {
    fn drop(&mut self) {
        // The kernel must not write to memory that is about to go away.
        while self.in_flight() > 0 {
            if self.wait().is_err() {
                return;
            }
            while self.finished().is_some() {}
        }
    }
}

/// Completions are posted when this process enters the kernel anyway, or sleeps: no interrupt disturbs it. (Posting them only
/// when they are asked for, `IORING_SETUP_DEFER_TASKRUN`, does not wake an epoll set on Linux 6.18.) Old kernels do it their
/// way.
fn build(depth: u32) -> Result<IoUring, Errno> {
    let mut last = Errno::ENOSYS;
    for modern in [true, false] {
        let mut builder = IoUring::builder();
        builder.setup_r_disabled().setup_clamp();
        if modern {
            builder
                .setup_single_issuer()
                .setup_coop_taskrun()
                .setup_taskrun_flag();
        }
        match builder.build(depth) {
            Ok(ring) => return Ok(ring),
            Err(error) => last = Errno::from_raw(error.raw_os_error().unwrap_or(libc::EIO)),
        }
        if last != Errno::EINVAL {
            break;
        }
    }
    Err(last)
}

fn sync_flag(durable: bool) -> i32 {
    if durable { libc::RWF_DSYNC } else { 0 }
}

fn mode(kind: Range) -> i32 {
    match kind {
        Range::Punch => libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE,
        Range::Zero => libc::FALLOC_FL_ZERO_RANGE | libc::FALLOC_FL_KEEP_SIZE,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

    fn file(bytes: usize) -> std::fs::File {
        use std::io::Write;
        let mut file = tempfile::tempfile_in(env!("CARGO_MANIFEST_DIR")).unwrap();
        file.write_all(&vec![7; bytes]).unwrap();
        file
    }

    fn next<T>(io: &mut FileIo<T>) -> (T, Result<(), Errno>) {
        loop {
            io.submit().unwrap();
            if let Some(done) = io.finished() {
                return done;
            }
            let mut fds = [PollFd::new(io.as_fd(), PollFlags::POLLIN)];
            assert_eq!(
                poll(&mut fds, PollTimeout::from(20_000u16)),
                Ok(1),
                "nothing came in 20 s"
            );
        }
    }

    #[test]
    fn what_is_done_later_is_told() {
        let file = file(8192);
        let mut io = FileIo::new(file.as_fd(), 4, Access::Write).unwrap();
        io.room().unwrap().sync("sync");
        assert_eq!(next(&mut io), ("sync", Ok(())));
        io.room().unwrap().range(Range::Punch, 0, 4096, "punch");
        assert_eq!(next(&mut io), ("punch", Ok(())));
    }

    #[test]
    fn a_batch_is_on_its_way_before_anybody_submits() {
        let file = file(8192);
        let mut io = FileIo::new(file.as_fd(), 8, Access::Write)
            .unwrap()
            .in_batches_of(3);
        for (queued, name) in [(1, "a"), (2, "b"), (0, "c"), (1, "d")] {
            io.room().unwrap().sync(name);
            assert_eq!(io.queued, queued, "{name}");
        }
        let mut done: Vec<_> = (0..4).map(|_| next(&mut io)).collect();
        done.sort_unstable_by_key(|(name, _)| *name);
        assert_eq!(done, ["a", "b", "c", "d"].map(|name| (name, Ok(()))));
    }

    #[test]
    fn what_has_enough_to_do_is_told_of_more_at_once() {
        use crate::memory::{GuestRam, Region, SegmentList};
        use nix::sys::memfd::{MFdFlags, memfd_create};
        let ram = std::fs::File::from(memfd_create(c"ram", MFdFlags::MFD_CLOEXEC).unwrap());
        ram.set_len(4096).unwrap();
        let ram = Region::new(0, 4096, 0, &ram, 0).unwrap();
        let ram = std::rc::Rc::new(GuestRam::new(vec![ram]).unwrap());
        let mut byte = SegmentList::default();
        ram.resolve(vm_memory::GuestAddress(0), 1, &mut byte)
            .unwrap();
        // Reads that the kernel has until somebody writes.
        let (out, pipe) = nix::unistd::pipe().unwrap();
        let mut io = FileIo::new(out.as_fd(), 16, Access::Read)
            .unwrap()
            .in_batches_of(2);
        for (nth, queued) in [1, 0, 1, 0, 1, 2, 3, 0].into_iter().enumerate() {
            io.room().unwrap().read(&byte.buffers(&ram), 0, nth);
            assert_eq!(io.queued, queued, "{nth}");
        }
        nix::unistd::write(&pipe, &[7; 8]).unwrap();
        let mut done: Vec<_> = (0..8).map(|_| next(&mut io)).collect();
        done.sort_unstable_by_key(|(nth, _)| *nth);
        assert!(done.into_iter().eq((0..8).map(|nth| (nth, Ok(())))));
    }

    #[test]
    fn the_kernels_workers_stay_on_this_threads_processors() {
        use nix::sched::{CpuSet, sched_getaffinity, sched_setaffinity};
        use nix::unistd::{Pid, gettid};
        let own = sched_getaffinity(Pid::from_raw(0)).unwrap();
        let last = (0..1024).rfind(|cpu| own.is_set(*cpu) == Ok(true)).unwrap();
        let mut set = CpuSet::new();
        set.set(last).unwrap();
        sched_setaffinity(Pid::from_raw(0), &set).unwrap();
        let file = file(8192);
        let mut io = FileIo::new(file.as_fd(), 4, Access::Write).unwrap();
        // A sync waits for the disk, so a worker does it, and stays for the next one.
        io.room().unwrap().sync(());
        assert_eq!(next(&mut io), ((), Ok(())));
        let workers: Vec<String> = std::fs::read_dir("/proc/self/task")
            .unwrap()
            .filter_map(|task| std::fs::read_to_string(task.ok()?.path().join("status")).ok())
            .filter(|status| status.contains(&format!("Name:\tiou-wrk-{}\n", gettid())))
            .collect();
        assert!(!workers.is_empty());
        for status in workers {
            assert!(
                status.contains(&format!("Cpus_allowed_list:\t{last}\n")),
                "{status}"
            );
        }
    }
}
