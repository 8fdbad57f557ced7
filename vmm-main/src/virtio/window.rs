//! Windows in the guest's memory into which a shared folder's process has files mapped (virtio 1.3, 2.10 and 5.11.6.4: DAX).
//!
//! **Job.** [`Window`] is a range of this process's addresses behind a KVM slot of its own; [`Windows::serve`] is the thread that takes
//! requests of device processes (vhost-user, `VHOST_USER_BACKEND_SHMEM_MAP` and `_UNMAP`) and puts files there, or takes them away.
//!
//! **Who is not trusted**: the device process, which sends any bytes and any descriptor. A message has one size and brings one
//! descriptor or none; anything else ends the channel. A range is whole units inside of the window, a file is a regular one. Nothing
//! is ever mapped executable, and this process never reads or writes there: what a page fault in such a file costs is a vCPU's.
//!
//! **Why this way.** A thread of its own has the few calls that it takes, so that neither the main thread nor a vCPU's may map
//! anything, and a device process that waits for an answer never waits for one that waits for it. The range is made once, between guards, and
//! never given back: there is no moment in which something else could be mapped behind the guest's window. Units of 2 MiB bound
//! the number of mappings.

#![allow(unsafe_code)] // mmap at fixed addresses

use std::collections::BTreeMap;
use std::io::IoSlice;
use std::num::NonZeroUsize;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::ptr::NonNull;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};

use ipc::guest_warn;
use ipc::limits::{DAX_UNIT, RAM_GUARD};
use ipc::rights::{self, Received};
use nix::errno::Errno;
use nix::sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags, EpollTimeout};
use nix::sys::mman::{MapFlags, ProtFlags, mmap, mmap_anonymous};
use nix::sys::socket::{MsgFlags, sendmsg};
use thiserror::Error;
use vhost::vhost_user::message::BackendReq;
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

/// Bytes of a message header: request, flags, size, of 32 bits each.
const HEADER: usize = 12;
/// Bytes of `struct VhostUserMMap` (vhost-user, "MMAP request"): id of the region in one byte, seven of padding, then offset in the
/// file, offset in the region, length and flags, of 64 bits each.
const BODY: usize = 40;
/// Version 1, and an answer is wanted.
const REQUEST_FLAGS: u32 = 1 | 1 << 3;
/// Version 1, and this is one.
const REPLY_FLAGS: u32 = 1 | 1 << 2;
/// In a mapping's flags: it can be written.
const WRITABLE: u64 = 1;
/// What the eventfd is known by; windows are known by their number.
const WAKE: u64 = u64::MAX;

/// Why there is no window, or no way to it.
#[derive(Debug, Error)]
#[error("window of device \"{id}\": {call} failed")]
pub struct WindowError {
    id: String,
    call: &'static str,
    source: Errno,
}

/// Why a channel is closed.
#[derive(Debug, Error)]
enum Misuse {
    #[error("its process closed the channel")]
    Closed,
    #[error("recvmsg failed: {0}")]
    Receive(Errno),
    #[error("its process does not take answers: {0}")]
    Answer(Errno),
    #[error("a message that is none")]
    Malformed,
}

/// What is behind one window now.
#[derive(Debug, Default)]
struct State {
    /// The device runs: requests are obeyed.
    open: bool,
    /// Ranges in which a file is, by their offset: bytes.
    mapped: BTreeMap<u64, u64>,
    /// To the device process.
    channel: Option<OwnedFd>,
    /// Everything is to go.
    clear: bool,
    /// A channel is to be made, and what came of that.
    wanted: bool,
    made: Option<Result<OwnedFd, WindowError>>,
}

/// One window.
#[derive(Debug)]
pub struct Window {
    id: String,
    number: u64,
    /// Guest-physical address and bytes.
    guest: u64,
    len: u64,
    /// Where it is here, and where a mapping is tried first.
    host: NonNull<libc::c_void>,
    trial: NonNull<libc::c_void>,
    state: Mutex<State>,
    done: Condvar,
    service: Arc<Service>,
}

// SAFETY: the pointers name ranges that are never unmapped; who maps something there holds the lock of `state`.
unsafe impl Send for Window {}
// SAFETY: as above.
unsafe impl Sync for Window {}

/// How the thread is woken.
#[derive(Debug)]
struct Service {
    epoll: Epoll,
    wake: EventFd,
    /// There is a thread, or will be.
    serves: AtomicBool,
}

/// All windows of a VM.
#[derive(Debug)]
pub struct Windows {
    service: Arc<Service>,
    list: Vec<Arc<Window>>,
}

fn failed(id: &str, call: &'static str) -> impl FnOnce(Errno) -> WindowError {
    let id = id.to_owned();
    move |source| WindowError { id, call, source }
}

fn errno(error: &std::io::Error) -> Errno {
    error.raw_os_error().map_or(Errno::EIO, Errno::from_raw)
}

impl Windows {
    /// None yet.
    ///
    /// # Errors
    /// No descriptors are left.
    pub fn new() -> Result<Self, WindowError> {
        let epoll =
            Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC).map_err(failed("any", "epoll_create1"))?;
        let wake = EventFd::new(EFD_NONBLOCK | libc::EFD_CLOEXEC)
            .map_err(|error| failed("any", "eventfd2")(errno(&error)))?;
        // SAFETY: the eventfd is open as long as it is borrowed.
        let fd = unsafe { BorrowedFd::borrow_raw(wake.as_raw_fd()) };
        epoll
            .add(fd, EpollEvent::new(EpollFlags::EPOLLIN, WAKE))
            .map_err(failed("any", "epoll_ctl"))?;
        Ok(Self {
            service: Arc::new(Service {
                epoll,
                wake,
                serves: AtomicBool::new(false),
            }),
            list: Vec::new(),
        })
    }

    /// Makes room for a window of `len` bytes at guest address `guest`, both multiples of [`DAX_UNIT`], for device `id`.
    ///
    /// # Errors
    /// No addresses are left.
    pub fn add(&mut self, id: &str, guest: u64, len: u64) -> Result<Arc<Window>, WindowError> {
        let window = Arc::new(Window {
            id: id.to_owned(),
            number: self.list.len() as u64,
            guest,
            len,
            host: room(len).map_err(failed(id, "mmap"))?,
            trial: room(len).map_err(failed(id, "mmap"))?,
            state: Mutex::default(),
            done: Condvar::new(),
            service: self.service.clone(),
        });
        self.list.push(window.clone());
        Ok(window)
    }

    /// How many there are.
    #[must_use]
    pub fn len(&self) -> usize {
        self.list.len()
    }

    /// Whether there is none.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.list.is_empty()
    }

    /// The guest address behind the last one.
    #[must_use]
    pub fn end(&self) -> Option<u64> {
        self.list.last().map(|window| window.guest + window.len)
    }

    /// From now on other threads wait for the one that [serves](Self::serve).
    pub fn hand_over(&self) {
        self.service.serves.store(true, Ordering::Release);
    }

    /// Takes requests, for ever.
    pub fn serve(&self) -> ! {
        let mut events = [EpollEvent::empty(); 8];
        loop {
            // Only EINTR is possible; then there are none.
            let count = self
                .service
                .epoll
                .wait(&mut events, EpollTimeout::NONE)
                .unwrap_or(0);
            for event in &events[..count] {
                if event.data() == WAKE {
                    let _ = self.service.wake.read();
                    self.list
                        .iter()
                        .for_each(|window| window.do_what_is_asked());
                } else if let Some(window) = self.list.get(event.data() as usize) {
                    window.serve();
                }
            }
        }
    }
}

/// Room of `len` bytes between guards, which nothing may touch, for as long as the process lives.
fn room(len: u64) -> Result<NonNull<libc::c_void>, Errno> {
    let whole = usize::try_from(len)
        .ok()
        .and_then(|len| len.checked_add(2 * RAM_GUARD + DAX_UNIT as usize))
        .and_then(NonZeroUsize::new)
        .ok_or(Errno::ENOMEM)?;
    let flags = MapFlags::MAP_PRIVATE | MapFlags::MAP_ANONYMOUS | MapFlags::MAP_NORESERVE;
    // SAFETY: a new mapping at an address of the kernel's choice touches no memory that is in use.
    let start = unsafe { mmap_anonymous(None, whole, ProtFlags::PROT_NONE, flags) }?;
    let first = start.as_ptr() as usize + RAM_GUARD;
    // So that files in huge pages can be mapped by them.
    NonZeroUsize::new(first.next_multiple_of(DAX_UNIT as usize))
        .map(|address| start.with_addr(address))
        .ok_or(Errno::ENOMEM)
}

/// A request, as it came.
struct Message {
    request: u32,
    file_offset: u64,
    offset: u64,
    len: u64,
    flags: u64,
    file: Option<OwnedFd>,
}

impl Window {
    /// Guest-physical address.
    #[must_use]
    pub const fn guest_address(&self) -> u64 {
        self.guest
    }

    /// Bytes.
    #[must_use]
    pub const fn size(&self) -> u64 {
        self.len
    }

    /// How many ranges of it have a file behind them.
    #[must_use]
    pub fn ranges(&self) -> usize {
        self.lock().mapped.len()
    }

    /// Where this process has it.
    #[must_use]
    pub fn host_address(&self) -> u64 {
        self.host.as_ptr() as u64
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        // A panic ends the process, so nobody sees a poisoned lock.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A channel for a new device process, whose end it is given. The one of the process before it is closed.
    ///
    /// # Errors
    /// No descriptors are left.
    pub fn connect(&self) -> Result<OwnedFd, WindowError> {
        let mut state = self.lock();
        if !self.service.serves.load(Ordering::Acquire) {
            return self.new_channel(&mut state);
        }
        // The caller's filter lets it make no socket.
        state.wanted = true;
        self.wake();
        loop {
            if let Some(made) = state.made.take() {
                return made;
            }
            state = self.wait(state);
        }
    }

    fn new_channel(&self, state: &mut State) -> Result<OwnedFd, WindowError> {
        let (ours, theirs) =
            UnixStream::pair().map_err(|e| failed(&self.id, "socketpair")(errno(&e)))?;
        // Closed, it leaves the epoll by itself.
        state.channel = None;
        self.service
            .epoll
            .add(&ours, EpollEvent::new(EpollFlags::EPOLLIN, self.number))
            .map_err(failed(&self.id, "epoll_ctl"))?;
        state.channel = Some(ours.into());
        Ok(theirs.into())
    }

    fn wake(&self) {
        // Fails only when 2^64 - 2 wait already.
        let _ = self.service.wake.write(1);
    }

    fn wait<'a>(&self, state: MutexGuard<'a, State>) -> MutexGuard<'a, State> {
        self.done
            .wait(state)
            .unwrap_or_else(PoisonError::into_inner)
    }

    /// The driver is ready: requests are obeyed from now on.
    pub fn open(&self) {
        self.lock().open = true;
    }

    /// The driver resets the device: nothing is mapped on return, and no request is obeyed until [`open`](Self::open).
    pub fn close(&self) {
        let mut state = self.lock();
        state.open = false;
        if state.mapped.is_empty() {
            return;
        }
        state.clear = true;
        self.wake();
        while state.clear {
            state = self.wait(state);
        }
    }

    /// What another thread waits for.
    fn do_what_is_asked(&self) {
        let mut state = self.lock();
        if std::mem::take(&mut state.clear) {
            self.reserve(self.host, 0, self.len);
            state.mapped.clear();
        }
        if std::mem::take(&mut state.wanted) {
            let made = self.new_channel(&mut state);
            state.made = Some(made);
        }
        self.done.notify_all();
    }

    fn serve(&self) {
        let mut state = self.lock();
        let Some(channel) = &state.channel else {
            return;
        };
        let served = receive(channel.as_fd()).and_then(|message| {
            let Some(message) = message else {
                return Ok(());
            };
            let done = self.obey(&mut state, &message);
            match &state.channel {
                Some(channel) => answer(channel.as_fd(), message.request, done),
                None => Ok(()),
            }
        });
        if let Err(misuse) = served {
            if !matches!(misuse, Misuse::Closed) {
                guest_warn!("window of device \"{}\" is closed: {misuse}", self.id);
            }
            state.channel = None;
        }
    }

    fn obey(&self, state: &mut State, message: &Message) -> bool {
        let (offset, len) = (message.offset, message.len);
        let whole = len != 0 && offset.is_multiple_of(DAX_UNIT) && len.is_multiple_of(DAX_UNIT);
        let end = offset.checked_add(len).filter(|end| *end <= self.len);
        let (true, true, Some(end)) = (state.open, whole, end) else {
            return false;
        };
        match &message.file {
            Some(file) => self.map(state, message, file, end),
            None => self.unmap(state, offset, end),
        }
    }

    fn map(&self, state: &mut State, message: &Message, file: &OwnedFd, end: u64) -> bool {
        let (offset, len) = (message.offset, message.len);
        let overlaps = state
            .mapped
            .range(..end)
            .next_back()
            .is_some_and(|(at, bytes)| at + bytes > offset);
        // The very same range gets another file, or the right to write, in one step.
        if overlaps && state.mapped.get(&offset) != Some(&len) {
            return false;
        }
        let Ok(file_offset) = libc::off_t::try_from(message.file_offset) else {
            return false;
        };
        if message.flags & !WRITABLE != 0 || !is_regular(file) {
            return false;
        }
        let rights = if message.flags & WRITABLE == 0 {
            ProtFlags::PROT_READ
        } else {
            ProtFlags::PROT_READ | ProtFlags::PROT_WRITE
        };
        let put = |room: NonNull<libc::c_void>| {
            let (address, len) = (room.as_ptr() as usize + offset as usize, len as usize);
            let (Some(address), Some(len)) = (NonZeroUsize::new(address), NonZeroUsize::new(len))
            else {
                return false;
            };
            let flags = MapFlags::MAP_SHARED | MapFlags::MAP_NORESERVE | MapFlags::MAP_FIXED;
            // SAFETY: the range is inside of one of the two rooms, which were made for this and hold nothing that this process
            // refers to.
            unsafe { mmap(Some(address), len, rights, flags, file, file_offset) }.is_ok()
        };
        // A mapping that fails may leave a hole, and a hole behind the guest's window is where other memory of this process could come
        // to be. So it fails elsewhere first, if it fails.
        let possible = put(self.trial);
        self.reserve(self.trial, offset, len);
        if !possible {
            return false;
        }
        if put(self.host) {
            state.mapped.insert(offset, len);
            return true;
        }
        self.reserve(self.host, offset, len);
        state.mapped.remove(&offset);
        false
    }

    /// Takes away what lies in the range; what lies in it in part stays, and that is an error.
    fn unmap(&self, state: &mut State, offset: u64, end: u64) -> bool {
        let across = |at: u64, len: u64| at < end && at + len > offset;
        let inside = |at: u64, len: u64| at >= offset && at + len <= end;
        let mut all = state.mapped.iter();
        if all.any(|(at, len)| across(*at, *len) && !inside(*at, *len)) {
            return false;
        }
        let before = state.mapped.len();
        state.mapped.retain(|at, len| !inside(*at, *len));
        if state.mapped.len() != before {
            self.reserve(self.host, offset, end - offset);
        }
        true
    }

    /// Makes a part of a room what it was in the beginning.
    fn reserve(&self, room: NonNull<libc::c_void>, offset: u64, len: u64) {
        let address = NonZeroUsize::new(room.as_ptr() as usize + offset as usize);
        let flags = MapFlags::MAP_PRIVATE
            | MapFlags::MAP_ANONYMOUS
            | MapFlags::MAP_NORESERVE
            | MapFlags::MAP_FIXED;
        let Some(len) = NonZeroUsize::new(len as usize) else {
            return;
        };
        // SAFETY: the range is inside of a room, and holds nothing that this process refers to.
        let done = unsafe { mmap_anonymous(address, len, ProtFlags::PROT_NONE, flags) };
        if let Err(errno) = done {
            // What the guest would see there from now on cannot be told.
            ipc::log::error!("window of device \"{}\": mmap failed: {errno}", self.id);
            std::process::abort();
        }
    }
}

fn is_regular(file: &OwnedFd) -> bool {
    let mut stat = std::mem::MaybeUninit::<libc::stat>::zeroed();
    // SAFETY: the kernel fills one such structure. The plain call, since libc's own takes a path as well.
    let result = unsafe { libc::syscall(libc::SYS_fstat, file.as_raw_fd(), stat.as_mut_ptr()) };
    // SAFETY: all-zero bytes are a value of it.
    let stat = unsafe { stat.assume_init() };
    result == 0 && stat.st_mode & libc::S_IFMT == libc::S_IFREG
}

/// The next message; `None` if there is none yet.
fn receive(channel: BorrowedFd<'_>) -> Result<Option<Message>, Misuse> {
    let mut bytes = [0; HEADER + BODY];
    let received = match rights::receive(channel, &mut bytes, MsgFlags::MSG_DONTWAIT) {
        Ok(received) => received,
        Err(Errno::EAGAIN | Errno::EINTR) => return Ok(None),
        Err(Errno::ECONNRESET) => return Err(Misuse::Closed),
        Err(errno) => return Err(Misuse::Receive(errno)),
    };
    let Received {
        len,
        fds: mut files,
        cut,
    } = received;
    if cut {
        return Err(Misuse::Receive(Errno::ENOBUFS));
    }
    if len == 0 {
        return Err(Misuse::Closed);
    }
    let word = |at: usize| {
        bytes[at..]
            .first_chunk::<4>()
            .map_or(0, |word| u32::from_ne_bytes(*word))
    };
    let long = |at: usize| {
        bytes[HEADER + at..]
            .first_chunk::<8>()
            .map_or(0, |word| u64::from_ne_bytes(*word))
    };
    let wanted = match word(0) {
        request if request == BackendReq::SHMEM_MAP as u32 => 1,
        request if request == BackendReq::SHMEM_UNMAP as u32 => 0,
        _ => return Err(Misuse::Malformed),
    };
    // Region 0 is the only one.
    let fits = (word(4), word(8) as usize) == (REQUEST_FLAGS, BODY) && bytes[HEADER] == 0;
    if len != bytes.len() || !fits || files.len() != wanted {
        return Err(Misuse::Malformed);
    }
    Ok(Some(Message {
        request: word(0),
        file_offset: long(8),
        offset: long(16),
        len: long(24),
        flags: long(32),
        file: files.pop(),
    }))
}

fn answer(channel: BorrowedFd<'_>, request: u32, done: bool) -> Result<(), Misuse> {
    let mut reply = [0; HEADER + 8];
    let words = [request, REPLY_FLAGS, 8, u32::from(!done), 0];
    for (to, word) in reply.chunks_exact_mut(4).zip(words) {
        to.copy_from_slice(&word.to_ne_bytes());
    }
    let flags = MsgFlags::MSG_DONTWAIT | MsgFlags::MSG_NOSIGNAL;
    match sendmsg::<()>(
        channel.as_raw_fd(),
        &[IoSlice::new(&reply)],
        &[],
        flags,
        None,
    ) {
        Ok(sent) if sent == reply.len() => Ok(()),
        Ok(_) => Err(Misuse::Answer(Errno::EMSGSIZE)),
        Err(Errno::EPIPE | Errno::ECONNRESET) => Err(Misuse::Closed),
        Err(errno) => Err(Misuse::Answer(errno)),
    }
}

#[cfg(test)]
#[path = "window_tests.rs"]
mod tests;
