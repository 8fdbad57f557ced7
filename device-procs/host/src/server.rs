//! The vhost-user back end: one device, its queues, one front end, one event loop.
//!
//! **Job.** Answers vhost-user messages, polls kicks and back ends, gives the device its turns.
//!
//! States of a queue: *described* (size, addresses, base) -> *started* (a kick descriptor came) -> *running* (also enabled).
//! `GET_VRING_BASE` stops it. A guest fault makes it *broken* until it is started anew; the vring error eventfd
//! (`SET_VRING_ERR`) is signalled once, on which the control process sets `DEVICE_NEEDS_RESET` (virtio 1.3, 2.1.2).
//!
//! **Who is not trusted.** The front end: a message that does not fit ends the connection, and with it the process. Queue
//! addresses and sizes are the guest's choice even though the front end sends them, so those break the queue only.
//!
//! **Why this way.** `vhost-user-backend`'s handler refuses in-flight regions and wants threads; `vhost`'s request trait is
//! enough. Kicks are polled edge-triggered and never read: an eventfd that nobody reads still wakes on each write, that is one
//! system call less per kick, and the counter tells a restarted process that there was a kick before it.

use std::fs::File;
use std::io::{self, IoSlice, IoSliceMut};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::rc::Rc;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use ipc::limits::{MAX_CONFIG_SPACE, MAX_MEMORY_REGIONS};
use ipc::rights;
use nix::errno::Errno;
use nix::fcntl::{FcntlArg, SealFlag, fcntl};
use nix::sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags, EpollTimeout};
use nix::sys::socket::{MsgFlags, recvmsg, sendmsg};
use nix::unistd::{Whence, lseek};
use thiserror::Error;
use vhost::VhostUserMemoryRegionBase;
use vhost::vhost_user::message::{
    FrontendReq, VhostTransferStateDirection, VhostTransferStatePhase, VhostUserConfigFlags,
    VhostUserHeaderFlag, VhostUserInflight, VhostUserLog, VhostUserMemoryRegion,
    VhostUserProtocolFeatures, VhostUserShMemConfig, VhostUserSharedMsg,
    VhostUserSingleMemoryRegion, VhostUserVirtioFeatures, VhostUserVringAddrFlags,
    VhostUserVringState,
};
use vhost::vhost_user::{
    BackendReqHandler, Error as VhostError, GpuBackend, Result as VhostResult,
    VhostUserBackendReqHandlerMut,
};
use virtio_bindings::virtio_config::VIRTIO_F_VERSION_1;
use virtio_bindings::virtio_ring::{VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC};

use crate::counters::Counters;
use crate::device::{Device, Interest};
use crate::fault::{DeviceFault, FaultKind, GuestFault, HostFault};
use crate::inflight::{InflightQueue, queue_bytes};
use crate::kept::{KeptArea, area_bytes};
use crate::memory::{GuestRam, Mapping, MemoryError, Region};
use crate::patience::Patience;
use crate::record::{self, Record, Word};
use crate::ring::{Ring, UserAddresses};
use crate::vhost_net::Refused;
use crate::window::Window;

#[cfg(fuzzing)]
#[path = "fuzzing.rs"]
pub mod fuzzing;

/// Bits that the harness offers for every device.
const RING_FEATURES: u64 = 1 << VIRTIO_F_VERSION_1
    | 1 << VIRTIO_RING_F_EVENT_IDX
    | 1 << VIRTIO_RING_F_INDIRECT_DESC
    | VhostUserVirtioFeatures::PROTOCOL_FEATURES.bits();

/// `epoll` data: the socket, then kicks, then back ends.
pub(crate) const SOCKET: u64 = 0;
pub(crate) const FIRST_KICK: u64 = 1;
const FIRST_BACKEND: u64 = 1 << 32;

/// Events taken from one `epoll_wait`.
const EVENTS: usize = 16;

/// Looks at the rings between two looks at the clock.
const LOOKS: usize = 16;

/// Why serving ended.
#[derive(Debug, Error)]
pub enum ServeError {
    /// The front end sent something that it may not.
    #[error("front end: {what}")]
    Frontend {
        /// Which message, and what is wrong with it.
        what: String,
        /// The library's view.
        #[source]
        source: VhostError,
    },
    /// The host failed.
    #[error(transparent)]
    Host(#[from] HostFault),
    /// The device asks for something that virtio does not have.
    #[error(
        "device has {queues} queues of {size} entries: 1 to {} queues, a power of two of entries are possible",
        ipc::limits::MAX_QUEUES
    )]
    Shape {
        /// Its queues.
        queues: u16,
        /// Entries of each.
        size: u16,
    },
}

/// What a front end may get wrong, for the log.
#[derive(Debug, Error)]
enum Refusal {
    #[error("{message} for queue {index}, of {count}")]
    Queue {
        message: &'static str,
        index: u32,
        count: usize,
    },
    #[error("{message}: {value:#x} is not allowed ({allowed})")]
    Value {
        message: &'static str,
        value: u64,
        allowed: &'static str,
    },
    #[error("{message} while the queue runs")]
    Running { message: &'static str },
    #[error("{message} again before SET_INFLIGHT_FD")]
    InflightAway { message: &'static str },
    #[error("{message} is not offered")]
    NotOffered { message: &'static str },
    #[error("{message}: the descriptor is no eventfd")]
    NoEvent { message: &'static str },
    #[error("{message} before SET_MEM_TABLE")]
    NoMemory { message: &'static str },
    #[error("{message}")]
    Memory {
        message: &'static str,
        source: MemoryError,
    },
    #[error("{message}")]
    Host {
        message: &'static str,
        source: HostFault,
    },
}

pub(crate) struct Server<D> {
    pub(crate) device: D,
    pub(crate) rings: Vec<Ring>,
    pub(crate) epoll: Epoll,
    /// What each back end is polled for now.
    polled: Vec<Interest>,
    pub(crate) ram: Option<Rc<GuestRam>>,
    pub(crate) features: u64,
    pub(crate) protocol_features: u64,
    /// Written after each message, for a process that comes after this one.
    pub(crate) record: Option<Record>,
    /// The in-flight region in use: where it starts, its queues and their entries.
    pub(crate) inflight_shape: (u64, u16, u16),
    /// Handed out on `GET_INFLIGHT_FD` and back with `SET_INFLIGHT_FD`, which may bring another one as well; made before
    /// the jail was shut, since nothing can be made inside, and not duplicated either.
    pub(crate) inflight_memory: Option<File>,
    pub(crate) inflight_given: bool,
    /// Of this process's memory, for a front end that asks for it before it sends guest RAM.
    userfault: Option<OwnedFd>,
    /// Behind the in-flight region's queues, if this device keeps something.
    kept: Option<KeptArea>,
    /// How long to look for work before sleeping.
    patience: Patience,
    /// The device has finished something while it was looked for.
    finished: bool,
    /// The device takes requests.
    begun: bool,
    /// The last transfer of the device's state has worked.
    state_moved: bool,
    /// The shared memory region, if the device has one and the front end takes requests for it.
    pub(crate) window: Option<Arc<Window>>,
    /// The last refusal or host fault, for the log: the library passes only a code through.
    refused: Option<String>,
    fatal: Option<HostFault>,
}

/// A connected device: runs until the front end leaves.
pub(crate) struct Connection<D: Device> {
    pub(crate) server: Arc<Mutex<Server<D>>>,
    pub(crate) messages: BackendReqHandler<Mutex<Server<D>>>,
}

/// Things that are made before the jail is shut and used inside.
#[derive(Debug)]
pub(crate) struct Resources {
    epoll: Epoll,
    inflight_memory: File,
    pub(crate) userfault: Option<OwnedFd>,
}

impl Resources {
    /// For a device with all its queues.
    pub(crate) fn prepare(device: &impl Device) -> Result<Self, ServeError> {
        let (queues, queue_size) = (device.num_queues(), device.max_queue_size());
        let shape = ServeError::Shape {
            queues,
            size: queue_size,
        };
        if queues == 0 || queues > ipc::limits::MAX_QUEUES || !queue_size.is_power_of_two() {
            return Err(shape);
        }
        use nix::sys::memfd::{MFdFlags, memfd_create};
        let epoll =
            Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC).map_err(HostFault::of("epoll_create1"))?;
        let memory = memfd_create(
            c"inflight",
            MFdFlags::MFD_CLOEXEC | MFdFlags::MFD_ALLOW_SEALING,
        )
        .map_err(HostFault::of("memfd_create"))?;
        let size = region_bytes(device, queues, queue_size);
        // At most 33 queues of 32768 entries of 16 bytes.
        nix::unistd::ftruncate(&memory, size as libc::off_t)
            .map_err(HostFault::of("ftruncate of the in-flight region"))?;
        // Who gets it can do nothing to the next process that maps it.
        let seals = SealFlag::F_SEAL_SHRINK | SealFlag::F_SEAL_GROW | SealFlag::F_SEAL_SEAL;
        fcntl(&memory, FcntlArg::F_ADD_SEALS(seals))
            .map_err(HostFault::of("fcntl(F_ADD_SEALS)"))?;
        Ok(Self {
            epoll,
            inflight_memory: memory.into(),
            userfault: None,
        })
    }
}

impl<D: Device> Connection<D> {
    pub(crate) fn new(
        stream: UnixStream,
        device: D,
        resources: Resources,
    ) -> Result<Self, ServeError> {
        let connection = Self::unpolled(stream, device, resources)?;
        connection.poll()?;
        Ok(connection)
    }

    /// Watches the front end's socket and the back ends.
    pub(crate) fn poll(&self) -> Result<(), ServeError> {
        let mut server = lock(&self.server);
        server
            .epoll
            .add(
                record::look(&self.messages),
                EpollEvent::new(EpollFlags::EPOLLIN, SOCKET),
            )
            .map_err(HostFault::of("epoll_ctl of the vhost-user socket"))?;
        Ok(server.poll_backends()?)
    }

    pub(crate) fn unpolled(
        stream: UnixStream,
        device: D,
        resources: Resources,
    ) -> Result<Self, ServeError> {
        let queues = device.num_queues();
        let size = device.max_queue_size();
        let rings = (0..queues)
            .map(|index| Ring::new(index, size))
            .collect::<Option<Vec<_>>>()
            .ok_or(ServeError::Shape { queues, size })?;
        let Resources {
            epoll,
            inflight_memory,
            userfault,
        } = resources;
        let polled = vec![Interest::NONE; device.backends().len()];
        // `BackendReqHandler` wants a handler with interior mutability. One thread, so the lock is never waited for.
        #[allow(clippy::arc_with_non_send_sync)]
        let server = Arc::new(Mutex::new(Server {
            device,
            rings,
            epoll,
            polled,
            ram: None,
            features: 0,
            protocol_features: 0,
            record: None,
            inflight_shape: (0, 0, 0),
            inflight_memory: Some(inflight_memory),
            inflight_given: false,
            userfault,
            kept: None,
            patience: Patience::default(),
            finished: false,
            begun: false,
            state_moved: false,
            window: None,
            refused: None,
            fatal: None,
        }));
        Ok(Self {
            messages: BackendReqHandler::from_stream(stream, server.clone()),
            server,
        })
    }

    /// Serves until the front end closes the connection.
    pub(crate) fn run(&mut self) -> Result<(), ServeError> {
        let mut events = [EpollEvent::empty(); EVENTS];
        loop {
            let count = lock(&self.server).wait(&mut events)?;
            let mut message = false;
            for event in &events[..count] {
                match event.data() {
                    SOCKET => message = true,
                    data => lock(&self.server).event(data, event.events())?,
                }
            }
            // Last, since a message may take away what the other events are about.
            if message && !self.message()? {
                return Ok(());
            }
            lock(&self.server).take_turns()?;
        }
    }

    /// One message; `false` when the front end has left.
    pub(crate) fn message(&mut self) -> Result<bool, ServeError> {
        let record = lock(&self.server).record;
        let Some(record) = record else {
            return self.obey();
        };
        record.store(Word::Busy, 1);
        let result = self.obey();
        lock(&self.server).save(record);
        record.store(Word::Busy, 0);
        result
    }

    fn obey(&mut self) -> Result<bool, ServeError> {
        if self.early_enable() {
            return Ok(true);
        }
        if let Some(done) = self.channel() {
            return done.map(|()| true);
        }
        let result = self.messages.handle_request();
        let mut server = lock(&self.server);
        if let Some(fault) = server.fatal.take() {
            return Err(fault.into());
        }
        let refused = server.refused.take();
        match result {
            Ok(()) | Err(VhostError::SocketRetry(_)) => Ok(true),
            Err(VhostError::Disconnected) => Ok(false),
            // It may leave without having read all answers, or with one on its way.
            Err(VhostError::SocketBroken(source))
                if matches!(
                    source.kind(),
                    io::ErrorKind::ConnectionReset | io::ErrorKind::BrokenPipe
                ) =>
            {
                Ok(false)
            }
            Err(source) => Err(ServeError::Frontend {
                what: refused.unwrap_or_else(|| "message cannot be served".to_owned()),
                source,
            }),
        }
    }
}

impl<D: Device> Connection<D> {
    /// QEMU's network card sends SET_VRING_ENABLE once, before SET_FEATURES, when nobody can know yet whether the message is
    /// allowed; the library refuses it then. Such a message, and no other, is taken off the socket and obeyed here.
    /// A queue is served only after it has been started all the same, which takes the features.
    fn early_enable(&self) -> bool {
        /// Request, flags and payload size, then queue and state, all of 32 bits.
        const LEN: usize = 20;
        let mut server = lock(&self.server);
        if server.features != 0 {
            return false;
        }
        let socket = self.messages.as_raw_fd();
        let take = |flags| {
            let mut bytes = [0; LEN];
            let mut parts = [IoSliceMut::new(&mut bytes)];
            let flags = flags | MsgFlags::MSG_DONTWAIT;
            match recvmsg::<()>(socket, &mut parts, None, flags) {
                Ok(message) if message.bytes == LEN => Some(bytes),
                _ => None,
            }
        };
        let Some(bytes) = take(MsgFlags::MSG_PEEK) else {
            return false;
        };
        let word = |at: usize| {
            let mut word = [0; 4];
            word.copy_from_slice(&bytes[at..at + 4]);
            u32::from_ne_bytes(word)
        };
        let (request, flags, size, index, state) = (word(0), word(4), word(8), word(12), word(16));
        // Version 1, no reply, no answer wanted.
        if (request, flags, size) != (FrontendReq::SET_VRING_ENABLE as u32, 1, 8) || state > 1 {
            return false;
        }
        let Some(ring) = server.rings.get_mut(index as usize) else {
            return false;
        };
        ring.enabled = state == 1;
        let number = ring.index();
        server.device.enabled(number, state == 1);
        take(MsgFlags::empty()).is_some()
    }
}

/// Bytes of a message's header.
const HEADER: usize = 12;

impl<D: Device> Connection<D> {
    /// Obeys `SET_BACKEND_REQ_FD`, if that is next: the library would keep the descriptor of the channel to itself, which a process
    /// after this one needs as well. `None` for other messages, and from front ends that have not said that they know of windows.
    fn channel(&self) -> Option<Result<(), ServeError>> {
        let needed = VhostUserProtocolFeatures::BACKEND_REQ
            | VhostUserProtocolFeatures::SHMEM
            | VhostUserProtocolFeatures::REPLY_ACK;
        let mut server = lock(&self.server);
        if server.protocol_features & needed.bits() != needed.bits() {
            return None;
        }
        let socket = self.messages.as_raw_fd();
        let mut bytes = [0; HEADER];
        let mut parts = [IoSliceMut::new(&mut bytes)];
        let flags = MsgFlags::MSG_PEEK | MsgFlags::MSG_DONTWAIT;
        match recvmsg::<()>(socket, &mut parts, None, flags) {
            Ok(message) if message.bytes == HEADER => {}
            _ => return None,
        }
        let word = |at: usize| {
            let mut word = [0; 4];
            word.copy_from_slice(&bytes[at..at + 4]);
            u32::from_ne_bytes(word)
        };
        let (request, flags, size) = (word(0), word(4), word(8));
        let wants_answer = VhostUserHeaderFlag::NEED_REPLY.bits();
        // Version 1, no reply, no payload.
        if request != FrontendReq::SET_BACKEND_REQ_FD as u32
            || flags & !wants_answer != 1
            || size != 0
        {
            return None;
        }
        let Some(channel) = take_descriptor(record::look(&self.messages)) else {
            let what = "SET_BACKEND_REQ_FD without one descriptor".to_owned();
            let source = VhostError::InvalidMessage;
            return Some(Err(ServeError::Frontend { what, source }));
        };
        let window = Window::new(channel, server.record);
        server.open_window(window);
        if flags & wants_answer == 0 {
            return Some(Ok(()));
        }
        let mut reply = Vec::with_capacity(HEADER + 8);
        for word in [request, 1 | VhostUserHeaderFlag::REPLY.bits(), 8, 0, 0] {
            reply.extend_from_slice(&word.to_ne_bytes());
        }
        // One that has left is seen to have done so by the next look at the socket.
        let _ = sendmsg::<()>(
            socket,
            &[IoSlice::new(&reply)],
            &[],
            MsgFlags::MSG_NOSIGNAL,
            None,
        );
        Some(Ok(()))
    }
}

/// Takes a message without payload off `socket`, and the one descriptor that came with it.
fn take_descriptor(socket: impl AsFd) -> Option<OwnedFd> {
    let mut got = rights::receive(socket, &mut [0; HEADER], MsgFlags::MSG_DONTWAIT).ok()?;
    match got.fds.len() {
        1 if !got.cut => got.fds.pop(),
        _ => None,
    }
}

pub(crate) fn lock<D>(server: &Mutex<Server<D>>) -> MutexGuard<'_, Server<D>> {
    // A panic ends the process, so nobody sees a poisoned lock.
    server.lock().unwrap_or_else(PoisonError::into_inner)
}

fn flags(interest: Interest) -> EpollFlags {
    let mut flags = EpollFlags::empty();
    if interest.readable {
        flags |= EpollFlags::EPOLLIN;
    }
    if interest.writable {
        flags |= EpollFlags::EPOLLOUT;
    }
    if interest.edge {
        flags |= EpollFlags::EPOLLET;
    }
    flags
}

impl<D: Device> Server<D> {
    fn wait(&mut self, events: &mut [EpollEvent]) -> Result<usize, HostFault> {
        if self.is_due() {
            // Whoever does not sleep is not kicked.
            self.look_at_rings();
        } else if !self.look_for_work() {
            for ring in &mut self.rings {
                if let Err(kind) = ring.listen() {
                    ring.break_with(kind);
                }
            }
            self.finished |= !self.is_due() && !self.device.may_sleep();
        }
        let now = self.is_due() || self.finished;
        let timeout = if now {
            EpollTimeout::ZERO
        } else {
            self.device.wake_at().map_or(EpollTimeout::NONE, until)
        };
        let asleep = (!now && !self.device.poll_limit().is_zero()).then(Instant::now);
        loop {
            match self.epoll.wait(events, timeout) {
                Err(Errno::EINTR) => {}
                other => {
                    let count = other.map_err(HostFault::of("epoll_wait"))?;
                    // A look at the rings does not see the front end's messages. Were they counted, each start would end in
                    // looks for a guest that does not run yet.
                    let woken = events.get(..count).unwrap_or_default();
                    let by_message = matches!(woken, [event] if event.data() == SOCKET);
                    if let Some(since) = asleep
                        && !by_message
                    {
                        self.patience
                            .slept(since.elapsed(), self.device.poll_limit());
                    }
                    return Ok(count);
                }
            }
        }
    }

    fn is_due(&self) -> bool {
        self.device.is_due() || self.rings.iter().any(|ring| ring.due)
    }

    /// Gives those that have more since they were last looked at a turn. Returns whether there are any.
    fn look_at_rings(&mut self) -> bool {
        let mut found = false;
        for ring in &mut self.rings {
            if ring.has_more() {
                ring.want_turn();
                found = true;
            }
        }
        found
    }

    /// Stays awake for a while, if that has paid lately, and looks at the rings and the back end without any system call.
    /// Messages of the front end wait meanwhile, for less than [`Device::poll_limit`].
    fn look_for_work(&mut self) -> bool {
        let limit = self.device.poll_limit();
        if limit.is_zero() {
            return false;
        }
        let window = self.patience.window(limit);
        if window.is_zero() {
            return false;
        }
        let start = Instant::now();
        let (found, time) = loop {
            let found = (0..LOOKS).any(|_| {
                self.finished |= self.device.has_finished();
                let found = self.look_at_rings() || self.finished;
                if !found {
                    std::hint::spin_loop();
                }
                found
            });
            let time = start.elapsed();
            if found || time >= window {
                break (found, time);
            }
        };
        self.patience.looked(time, limit);
        found
    }

    fn event(&mut self, data: u64, ready: EpollFlags) -> Result<(), HostFault> {
        if let Some(index) = data.checked_sub(FIRST_BACKEND) {
            // Counted from a usize in `new`.
            return self.backend_event(index as usize, ready);
        }
        if let Some(ring) = data
            .checked_sub(FIRST_KICK)
            .and_then(|index| self.rings.get_mut(index as usize))
        {
            ring.due = ring.is_running();
        }
        Ok(())
    }

    fn backend_event(&mut self, index: usize, ready: EpollFlags) -> Result<(), HostFault> {
        let failed = ready.intersects(EpollFlags::EPOLLERR | EpollFlags::EPOLLHUP);
        let ready = Interest {
            readable: failed || ready.contains(EpollFlags::EPOLLIN),
            writable: failed || ready.contains(EpollFlags::EPOLLOUT),
            edge: false,
        };
        self.rings.iter_mut().for_each(Ring::refill_budget);
        let result = self.device.backend_ready(index, ready, &mut self.rings);
        self.after_device(result)?;
        self.end_turns();
        Ok(())
    }

    /// One turn for each queue that is due.
    fn take_turns(&mut self) -> Result<(), HostFault> {
        if !self.begun && !self.begin()? {
            return Ok(());
        }
        let mut any = std::mem::take(&mut self.finished) | self.device.is_due();
        for index in 0..self.rings.len() {
            let Some(ring) = self.rings.get_mut(index) else {
                break;
            };
            if !ring.due {
                continue;
            }
            if !ring.is_running() {
                ring.due = false;
                continue;
            }
            if let Err(kind) = ring.begin_turn() {
                ring.break_with(kind);
                continue;
            }
            any = true;
            let result = self.device.process_queue(ring);
            self.after_device(result)?;
        }
        if any {
            self.settle()?;
        }
        if any || self.device.wake_at().is_some_and(|at| at <= Instant::now()) {
            let result = self.device.after_turns(&mut self.rings);
            self.after_device(result)?;
            self.end_turns();
        }
        Ok(())
    }

    /// Gives the kernel the queues that it is to serve now, and takes back those that it is not to serve any more.
    fn settle(&mut self) -> Result<(), HostFault> {
        for ring in self.rings.iter_mut().filter(|ring| ring.outside) {
            let Some(queue) = self.device.kernel_queue(ring.index()) else {
                continue;
            };
            match (queue.on && ring.may_run(), ring.is_lent()) {
                (true, false) => match ring.lend(&queue) {
                    Ok(()) => ipc::log::debug!("queue {}: the kernel serves it", ring.index()),
                    Err(Refused::Address) => ring.break_with(FaultKind::QueueAddress),
                    Err(Refused::Host(fault)) => return Err(fault),
                },
                (false, true) => ring.take_back(&queue)?,
                _ => {}
            }
        }
        Ok(())
    }

    /// Takes back what the kernel has of those queues.
    fn take_back(&mut self, mut which: impl FnMut(u16) -> bool) -> Result<(), HostFault> {
        for ring in self.rings.iter_mut().filter(|ring| which(ring.index())) {
            if let Some(queue) = self.device.kernel_queue(ring.index()) {
                ring.take_back(&queue)?;
            }
        }
        Ok(())
    }

    /// The library is told of a fault by its code only.
    fn or_fatal(&mut self, result: Result<(), HostFault>) -> VhostResult<()> {
        result.map_err(|fault| {
            self.fatal = Some(fault);
            VhostError::BackendInternalError
        })
    }

    /// Takes queue `index` back from the kernel, if that has it: it is about to be told something else of it.
    fn taken_back(&mut self, index: u32) -> VhostResult<()> {
        let result = self.take_back(|ring| u32::from(ring) == index);
        self.or_fatal(result)
    }

    /// After a message that changes what the kernel serves, before its answer.
    fn settled(&mut self) -> VhostResult<()> {
        let result = self.settle();
        self.or_fatal(result)
    }

    /// Whether the device takes requests now. If not, queues wait for the next one that starts.
    fn begin(&mut self) -> Result<bool, HostFault> {
        if !self.is_due() {
            return Ok(false);
        }
        self.begun = self.device.begin(&self.rings)?;
        if !self.begun {
            self.rings.iter_mut().for_each(|ring| ring.due = false);
        }
        Ok(self.begun)
    }

    fn end_turns(&mut self) {
        for ring in self.rings.iter_mut().filter(|r| r.is_running()) {
            if let Err(kind) = ring.end_turn() {
                ring.break_with(kind);
            }
        }
    }

    /// Nothing is in flight afterwards, so queues may be stopped.
    fn drain(&mut self) -> Result<(), HostFault> {
        let result = self.device.drain(&mut self.rings);
        self.after_device(result)?;
        self.end_turns();
        Ok(())
    }

    /// For a process that comes after this one.
    fn keep(&mut self) {
        if let Some(area) = &self.kept
            && let Some(what) = self.device.keep()
        {
            area.store(&what);
        }
    }

    fn after_device(&mut self, result: Result<(), DeviceFault>) -> Result<(), HostFault> {
        self.keep();
        match result {
            Ok(()) => {}
            Err(DeviceFault::Guest(fault)) => self.break_ring(fault),
            Err(DeviceFault::Host(fault)) => return Err(fault),
        }
        self.poll_backends()
    }

    fn break_ring(&mut self, fault: GuestFault) {
        if let Some(ring) = self.rings.get_mut(usize::from(fault.queue)) {
            ring.break_with(fault.kind);
        }
    }

    fn poll_backends(&mut self) -> Result<(), HostFault> {
        if (0..self.polled.len()).all(|i| self.polled[i] == self.device.interest(i)) {
            return Ok(());
        }
        for (index, fd) in self.device.backends().into_iter().enumerate() {
            let interest = self.device.interest(index);
            let Some(polled) = self.polled.get_mut(index).filter(|p| **p != interest) else {
                continue;
            };
            let mut event = EpollEvent::new(flags(interest), FIRST_BACKEND + index as u64);
            // One that is not polled leaves the set: errors would be reported even with no interest in it.
            match (*polled == Interest::NONE, interest == Interest::NONE) {
                (true, _) => self.epoll.add(fd, event),
                (false, true) => self.epoll.delete(fd),
                (false, false) => self.epoll.modify(fd, &mut event),
            }
            .map_err(HostFault::of("epoll_ctl of a back end"))?;
            *polled = interest;
        }
        Ok(())
    }

    fn offered(&self) -> u64 {
        self.device.features() | RING_FEATURES
    }

    /// Remembers why, for the log, and gives the library its code.
    fn refuse(&mut self, refusal: &Refusal) -> VhostError {
        self.refused = Some(ipc::log::with_causes(refusal));
        VhostError::InvalidParam
    }

    fn ring(&mut self, message: &'static str, index: u32) -> VhostResult<&mut Ring> {
        let count = self.rings.len();
        if index as usize >= count {
            return Err(self.refuse(&Refusal::Queue {
                message,
                index,
                count,
            }));
        }
        Ok(&mut self.rings[index as usize])
    }

    /// A ring that may be described.
    fn stopped_ring(&mut self, message: &'static str, index: u32) -> VhostResult<&mut Ring> {
        if self.ring(message, index)?.is_started() {
            return Err(self.refuse(&Refusal::Running { message }));
        }
        self.ring(message, index)
    }

    /// Takes what can be an eventfd and no stream: a front end that passes its own end of the vhost-user socket would never
    /// be seen to leave. Makes it one that no write waits for, since one whose counter is full would stop the device.
    /// (A front end that undoes this later stops its own device, and nobody else's.)
    fn eventfd(&mut self, message: &'static str, fd: Option<File>) -> VhostResult<Option<OwnedFd>> {
        // Whatever it is: for the standard library, a stream is the owner of a descriptor, and this its FIONBIO.
        let Some(fd) = fd.map(|fd| UnixStream::from(OwnedFd::from(fd))) else {
            return Ok(None);
        };
        // An eventfd has one place, 0. Streams have none, files have others; the filter allows no call that tells more.
        if lseek(&fd, 0, Whence::SeekEnd) != Ok(0) {
            return Err(self.refuse(&Refusal::NoEvent { message }));
        }
        if let Err(error) = fd.set_nonblocking(true) {
            let errno = error.raw_os_error().map_or(Errno::EIO, Errno::from_raw);
            let source = HostFault::of("ioctl(FIONBIO)")(errno);
            return Err(self.refuse(&Refusal::Host { message, source }));
        }
        Ok(Some(fd.into()))
    }

    /// The device may have files mapped for the driver from now on.
    pub(crate) fn open_window(&mut self, window: Window) {
        let window = Arc::new(window);
        self.window = Some(window.clone());
        self.device.open_window(window);
    }

    fn drained(&mut self) -> VhostResult<()> {
        let result = self.drain();
        self.or_fatal(result)
    }

    fn unpoll_kick(&mut self, index: usize) {
        if let Some(kick) = self.rings.get_mut(index).and_then(|ring| ring.kick.take()) {
            // A descriptor that was closed elsewhere would be gone from the set already; ours is open until here.
            let _ = self.epoll.delete(&kick);
        }
    }

    fn stop_ring(&mut self, index: usize) -> u16 {
        self.unpoll_kick(index);
        self.rings.get_mut(index).map_or(0, Ring::stop)
    }

    pub(crate) fn set_regions(
        &mut self,
        message: &'static str,
        regions: Vec<Region>,
    ) -> VhostResult<()> {
        let ram = match GuestRam::new(regions) {
            Ok(ram) => Rc::new(ram),
            Err(source) => return Err(self.refuse(&Refusal::Memory { message, source })),
        };
        let taken = self.take_back(|_| true);
        self.or_fatal(taken)?;
        for ring in self
            .rings
            .iter_mut()
            .filter(|r| r.is_started() && !r.is_broken())
        {
            if let Err(kind) = ring.place(&ram) {
                ring.break_with(kind);
            }
        }
        self.ram = Some(ram);
        self.settled()
    }

    pub(crate) fn use_inflight(
        &mut self,
        region: &VhostUserInflight,
        file: &File,
    ) -> VhostResult<()> {
        let message = "SET_INFLIGHT_FD";
        if self.rings.iter().any(Ring::is_started) {
            return Err(self.refuse(&Refusal::Running { message }));
        }
        let needed = self.inflight_bytes(message, region)?;
        if region.mmap_size < needed {
            return Err(self.refuse(&Refusal::Value {
                message,
                value: region.mmap_size,
                allowed: "the size that GET_INFLIGHT_FD told",
            }));
        }
        let mapping = match Mapping::new(file, region.mmap_offset, needed) {
            Ok(mapping) => Rc::new(mapping),
            Err(source) => return Err(self.refuse(&Refusal::Memory { message, source })),
        };
        for (index, ring) in self.rings.iter_mut().enumerate() {
            let part = (index < usize::from(region.num_queues))
                .then(|| InflightQueue::new(mapping.clone(), index, region.queue_size));
            ring.set_inflight(part);
        }
        self.inflight_shape = (region.mmap_offset, region.num_queues, region.queue_size);
        if let Some(start) = counters_start(&self.device, region.num_queues, region.queue_size) {
            let counters = Counters::new(mapping.clone(), start);
            self.device.count_in(counters);
        }
        let most = self.device.kept_len();
        if most > 0 {
            let start = usize::from(region.num_queues) * queue_bytes(region.queue_size);
            let area = KeptArea::new(mapping, start, most);
            if let Some(kept) = area.load() {
                self.device.go_on_with(&kept);
            }
            self.kept = Some(area);
            self.keep();
        }
        Ok(())
    }

    /// Without a front end that tracks requests in flight they are tracked for this program's own sake.
    pub(crate) fn track_by_default(&mut self) -> Result<(), ServeError> {
        let (queues, size) = (self.device.num_queues(), self.device.max_queue_size());
        let Some(file) = self.inflight_memory.take() else {
            return Ok(());
        };
        // Who asks for it gets it emptied.
        self.inflight_given = true;
        let region = VhostUserInflight::new(u64::MAX, 0, queues, size);
        let used = self.use_inflight(&region, &file);
        self.inflight_memory = Some(file);
        used.map_err(|source| self.refused_record(source))
    }

    /// What was recorded, or made here, is not usable.
    pub(crate) fn refused_record(&mut self, source: VhostError) -> ServeError {
        let what = self.refused.take().unwrap_or_else(|| "record".to_owned());
        ServeError::Frontend { what, source }
    }

    pub(crate) fn unusable(&mut self, error: &MemoryError) -> ServeError {
        self.refused = Some(ipc::log::with_causes(error));
        self.refused_record(VhostError::InvalidParam)
    }

    /// A region that came with a message; its file is kept only for a process that comes after this one.
    fn kept(&self, region: Region, file: File) -> Region {
        if self.record.is_some() {
            region.with_file(file)
        } else {
            region
        }
    }

    fn inflight_bytes(
        &mut self,
        message: &'static str,
        region: &VhostUserInflight,
    ) -> VhostResult<u64> {
        if usize::from(region.num_queues) > self.rings.len() {
            return Err(self.refuse(&Refusal::Value {
                message,
                value: u64::from(region.num_queues),
                allowed: "at most the device's queues",
            }));
        }
        if region.queue_size > self.device.max_queue_size() {
            return Err(self.refuse(&Refusal::Value {
                message,
                value: u64::from(region.queue_size),
                allowed: "at most the device's queue size",
            }));
        }
        Ok(region_bytes(&self.device, region.num_queues, region.queue_size) as u64)
    }
}

/// Bytes of an in-flight region: the queues' parts, what the device keeps, and what it counts.
fn region_bytes(device: &impl Device, queues: u16, queue_size: u16) -> usize {
    counters_start(device, queues, queue_size).map_or_else(
        || kept_end(device, queues, queue_size),
        |start| start + ipc::counters::BYTES,
    )
}

fn kept_end(device: &impl Device, queues: u16, queue_size: u16) -> usize {
    usize::from(queues) * queue_bytes(queue_size) + area_bytes(device.kept_len())
}

/// Where a device's counters are in the region: at its end, on a cache line.
fn counters_start(device: &impl Device, queues: u16, queue_size: u16) -> Option<usize> {
    device
        .counts()
        .then(|| kept_end(device, queues, queue_size).next_multiple_of(64))
}

/// The time until `at` in `epoll_wait`'s milliseconds: rounded up, so that it is over afterwards.
fn until(at: Instant) -> EpollTimeout {
    let left = at.saturating_duration_since(Instant::now());
    let millis = left.as_nanos().div_ceil(1_000_000);
    EpollTimeout::try_from(millis.min(60_000) as i32).unwrap_or(EpollTimeout::ZERO)
}

/// Zeroes the first `size` bytes of the region, for a front end that asks for a fresh one again.
fn clear(file: &File, size: u64) -> Result<(), MemoryError> {
    let mapping = Mapping::new(file, 0, size)?;
    let bytes = mapping.bytes();
    let zeros = [0u8; 256];
    let mut done = 0;
    while done < bytes.len() {
        let Ok(rest) = bytes.offset(done) else { break };
        rest.copy_from(&zeros);
        done += zeros.len().min(rest.len());
    }
    Ok(())
}

impl<D: Device> VhostUserBackendReqHandlerMut for Server<D> {
    fn set_owner(&mut self) -> VhostResult<()> {
        Ok(())
    }

    fn reset_owner(&mut self) -> VhostResult<()> {
        // Deprecated; the specification tells back ends to ignore it or to disable all rings.
        self.reset_device()
    }

    fn reset_device(&mut self) -> VhostResult<()> {
        self.drained()?;
        let taken = self.take_back(|_| true);
        self.or_fatal(taken)?;
        for index in 0..self.rings.len() {
            self.unpoll_kick(index);
            self.rings[index].reset();
        }
        self.features = 0;
        self.device.reset();
        self.keep();
        self.poll_backends().map_err(|fault| {
            self.fatal = Some(fault);
            VhostError::BackendInternalError
        })
    }

    fn get_features(&mut self) -> VhostResult<u64> {
        Ok(self.offered())
    }

    fn set_features(&mut self, features: u64) -> VhostResult<()> {
        let message = "SET_FEATURES";
        if features & !self.offered() != 0 {
            return Err(self.refuse(&Refusal::Value {
                message,
                value: features & !self.offered(),
                allowed: "bits that GET_FEATURES told",
            }));
        }
        self.features = features;
        ipc::log::debug!("features {features:#x} accepted");
        let taken = self.take_back(|_| true);
        self.or_fatal(taken)?;
        if let Err(source) = self.device.accept(features) {
            return Err(self.refuse(&Refusal::Host { message, source }));
        }
        self.settled()
    }

    fn set_mem_table(
        &mut self,
        regions: &[VhostUserMemoryRegion],
        files: Vec<File>,
        postcopy_listening: Option<bool>,
    ) -> VhostResult<Option<Vec<VhostUserMemoryRegionBase>>> {
        let message = "SET_MEM_TABLE";
        // Who did not want it before will not: nobody is left who could watch this process.
        self.userfault = None;
        let mut list = Vec::with_capacity(regions.len());
        for (region, file) in regions.iter().zip(files) {
            match Region::new(
                region.guest_phys_addr,
                region.memory_size,
                region.user_addr,
                &file,
                region.mmap_offset,
            ) {
                Ok(region) => list.push(self.kept(region, file)),
                Err(source) => return Err(self.refuse(&Refusal::Memory { message, source })),
            }
        }
        let bases = list.iter().map(Region::address).collect();
        self.set_regions(message, list)?;
        Ok((postcopy_listening == Some(true)).then_some(bases))
    }

    fn set_vring_num(&mut self, index: u32, num: u32) -> VhostResult<()> {
        let message = "SET_VRING_NUM";
        let ring = self.stopped_ring(message, index)?;
        if u16::try_from(num).is_ok_and(|size| ring.set_size(size)) {
            return Ok(());
        }
        Err(self.refuse(&Refusal::Value {
            message,
            value: u64::from(num),
            allowed: "a power of two up to the device's queue size",
        }))
    }

    fn set_vring_addr(
        &mut self,
        index: u32,
        flags: VhostUserVringAddrFlags,
        descriptor: u64,
        used: u64,
        available: u64,
        _log: u64,
    ) -> VhostResult<()> {
        let message = "SET_VRING_ADDR";
        if !flags.is_empty() {
            return Err(self.refuse(&Refusal::Value {
                message,
                value: u64::from(flags.bits()),
                allowed: "no flags: dirty logging is not offered",
            }));
        }
        self.stopped_ring(message, index)?.addresses = Some(UserAddresses {
            descriptors: descriptor,
            available,
            used,
        });
        Ok(())
    }

    fn set_vring_base(&mut self, index: u32, base: u32) -> VhostResult<()> {
        let message = "SET_VRING_BASE";
        let ring = self.stopped_ring(message, index)?;
        if let Ok(base) = u16::try_from(base) {
            ring.base = base;
            return Ok(());
        }
        Err(self.refuse(&Refusal::Value {
            message,
            value: u64::from(base),
            allowed: "0 to 65535",
        }))
    }

    fn get_vring_base(&mut self, index: u32) -> VhostResult<VhostUserVringState> {
        self.ring("GET_VRING_BASE", index)?;
        self.drained()?;
        self.taken_back(index)?;
        let base = self.stop_ring(index as usize);
        Ok(VhostUserVringState::new(index, u32::from(base)))
    }

    fn set_vring_kick(&mut self, index: u8, fd: Option<File>) -> VhostResult<()> {
        let message = "SET_VRING_KICK";
        let queue = u32::from(index);
        self.ring(message, queue)?;
        let Some(fd) = fd else {
            return Err(self.refuse(&Refusal::NotOffered {
                message: "SET_VRING_KICK without a descriptor (polling)",
            }));
        };
        let Some(ram) = self.ram.clone() else {
            return Err(self.refuse(&Refusal::NoMemory { message }));
        };
        let Some(fd) = self.eventfd(message, Some(fd))? else {
            return Err(self.refuse(&Refusal::NoEvent { message }));
        };
        self.taken_back(queue)?;
        self.unpoll_kick(usize::from(index));
        let event = EpollEvent::new(
            EpollFlags::EPOLLIN | EpollFlags::EPOLLET,
            FIRST_KICK + u64::from(index),
        );
        // Nobody is to wake here for what the kernel serves.
        let outside = self.device.kernel_queue(u16::from(index)).is_some();
        if !outside && let Err(errno) = self.epoll.add(&fd, event) {
            let source = HostFault::of("epoll_ctl")(errno);
            return Err(self.refuse(&Refusal::Host { message, source }));
        }
        let protocol = self.features & VhostUserVirtioFeatures::PROTOCOL_FEATURES.bits() != 0;
        let event_idx = self.features & (1 << VIRTIO_RING_F_EVENT_IDX) != 0;
        let indirect = self.features & (1 << VIRTIO_RING_F_INDIRECT_DESC) != 0;
        let ring = self.ring(message, queue)?;
        ring.kick = Some(fd);
        ring.outside = outside;
        if ring.is_started() {
            return self.settled();
        }
        // Without protocol features there is no SET_VRING_ENABLE, and a started ring is enabled.
        if !protocol {
            ring.enabled = true;
        }
        if let Err(fault) = ring.start(&ram, event_idx, indirect) {
            ring.break_with(fault.kind);
        }
        ipc::log::debug!("queue {index}: started with {} entries", ring.size());
        self.settled()
    }

    fn set_vring_call(&mut self, index: u8, fd: Option<File>) -> VhostResult<()> {
        let message = "SET_VRING_CALL";
        self.ring(message, u32::from(index))?;
        let fd = self.eventfd(message, fd)?;
        self.taken_back(u32::from(index))?;
        self.ring(message, u32::from(index))?.set_call(fd);
        self.settled()
    }

    fn set_vring_err(&mut self, index: u8, fd: Option<File>) -> VhostResult<()> {
        let message = "SET_VRING_ERR";
        self.ring(message, u32::from(index))?;
        let fd = self.eventfd(message, fd)?;
        self.taken_back(u32::from(index))?;
        self.ring(message, u32::from(index))?.error = fd;
        self.settled()
    }

    fn get_protocol_features(&mut self) -> VhostResult<VhostUserProtocolFeatures> {
        Ok(VhostUserProtocolFeatures::MQ
            | VhostUserProtocolFeatures::REPLY_ACK
            | VhostUserProtocolFeatures::CONFIG
            | VhostUserProtocolFeatures::INFLIGHT_SHMFD
            | VhostUserProtocolFeatures::RESET_DEVICE
            | if self.device.takes_single_regions() {
                VhostUserProtocolFeatures::CONFIGURE_MEM_SLOTS
            } else {
                VhostUserProtocolFeatures::empty()
            }
            | if self.device.has_state() {
                VhostUserProtocolFeatures::DEVICE_STATE
            } else {
                VhostUserProtocolFeatures::empty()
            }
            | if self.device.window_len() > 0 {
                VhostUserProtocolFeatures::BACKEND_REQ | VhostUserProtocolFeatures::SHMEM
            } else {
                VhostUserProtocolFeatures::empty()
            }
            | if self.userfault.is_some() {
                VhostUserProtocolFeatures::PAGEFAULT
            } else {
                VhostUserProtocolFeatures::empty()
            })
    }

    fn postcopy_advice(&mut self) -> VhostResult<File> {
        match self.userfault.take() {
            Some(userfault) => Ok(userfault.into()),
            None => Err(self.refuse(&Refusal::NotOffered {
                message: "POSTCOPY_ADVISE",
            })),
        }
    }

    fn postcopy_listen(&mut self) -> VhostResult<()> {
        Ok(())
    }

    fn postcopy_end(&mut self) -> VhostResult<()> {
        Ok(())
    }

    fn postcopy_ack_mem_regions(&mut self) -> VhostResult<()> {
        Ok(())
    }

    fn set_protocol_features(&mut self, features: u64) -> VhostResult<()> {
        let offered = self.get_protocol_features()?.bits();
        if features & !offered != 0 {
            return Err(self.refuse(&Refusal::Value {
                message: "SET_PROTOCOL_FEATURES",
                value: features & !offered,
                allowed: "bits that GET_PROTOCOL_FEATURES told",
            }));
        }
        self.protocol_features = features;
        Ok(())
    }

    fn get_queue_num(&mut self) -> VhostResult<u64> {
        Ok(self.device.told_queues())
    }

    fn set_vring_enable(&mut self, index: u32, enable: bool) -> VhostResult<()> {
        self.ring("SET_VRING_ENABLE", index)?;
        if !enable {
            self.drained()?;
        }
        let ring = self.ring("SET_VRING_ENABLE", index)?;
        ring.enabled = enable;
        let number = ring.index();
        ipc::log::debug!("queue {index}: enabled {enable}");
        ring.due = ring.is_running();
        self.device.enabled(number, enable);
        if !self.begun {
            // They may have been waiting for this one.
            self.rings.iter_mut().for_each(Ring::want_turn);
        }
        self.settled()
    }

    fn get_config(
        &mut self,
        offset: u32,
        size: u32,
        flags: VhostUserConfigFlags,
    ) -> VhostResult<Vec<u8>> {
        let (offset, size) = (offset as usize, size as usize);
        if offset > MAX_CONFIG_SPACE || size > MAX_CONFIG_SPACE - offset {
            return Err(self.refuse(&Refusal::Value {
                message: "GET_CONFIG",
                value: (offset as u64).saturating_add(size as u64),
                allowed: "up to 256 bytes",
            }));
        }
        let mut out = vec![0; size];
        // As for SET_CONFIG.
        if flags.contains(VhostUserConfigFlags::LIVE_MIGRATION) {
            self.device.read_config_as_host(offset, &mut out);
        } else {
            self.device.read_config(offset, &mut out);
        }
        Ok(out)
    }

    fn set_config(
        &mut self,
        offset: u32,
        data: &[u8],
        flags: VhostUserConfigFlags,
    ) -> VhostResult<()> {
        let offset = offset as usize;
        if offset > MAX_CONFIG_SPACE || data.len() > MAX_CONFIG_SPACE - offset {
            return Err(self.refuse(&Refusal::Value {
                message: "SET_CONFIG",
                value: (offset as u64).saturating_add(data.len() as u64),
                allowed: "up to 256 bytes",
            }));
        }
        // The specification's word for what is not the driver's doing.
        if flags.contains(VhostUserConfigFlags::LIVE_MIGRATION) {
            self.device.write_config_as_host(offset, data);
            let polled = self.poll_backends();
            self.or_fatal(polled)?;
            return self.settled();
        }
        self.device.write_config(offset, data);
        Ok(())
    }

    fn set_gpu_socket(&mut self, _gpu_backend: GpuBackend) -> VhostResult<()> {
        Err(self.refuse(&Refusal::NotOffered {
            message: "GPU_SET_SOCKET",
        }))
    }

    fn get_shared_object(&mut self, _uuid: VhostUserSharedMsg) -> VhostResult<File> {
        Err(self.refuse(&Refusal::NotOffered {
            message: "GET_SHARED_OBJECT",
        }))
    }

    fn get_inflight_fd(
        &mut self,
        wanted: &VhostUserInflight,
    ) -> VhostResult<(VhostUserInflight, File)> {
        let message = "GET_INFLIGHT_FD";
        if self.rings.iter().any(Ring::is_started) {
            return Err(self.refuse(&Refusal::Running { message }));
        }
        let size = self.inflight_bytes(message, wanted)?;
        // What is counted goes on.
        let kept = kept_end(&self.device, wanted.num_queues, wanted.queue_size);
        let Some(file) = self.inflight_memory.take() else {
            return Err(self.refuse(&Refusal::InflightAway { message }));
        };
        if std::mem::replace(&mut self.inflight_given, true)
            && let Err(source) = clear(&file, kept as u64)
        {
            return Err(self.refuse(&Refusal::Memory { message, source }));
        }
        let reply = VhostUserInflight::new(size, 0, wanted.num_queues, wanted.queue_size);
        Ok((reply, file))
    }

    fn set_inflight_fd(&mut self, region: &VhostUserInflight, file: File) -> VhostResult<()> {
        self.use_inflight(region, &file)?;
        // Who asks for one again gets this, emptied.
        self.inflight_given = true;
        self.inflight_memory = Some(file);
        Ok(())
    }

    fn get_max_mem_slots(&mut self) -> VhostResult<u64> {
        Ok(MAX_MEMORY_REGIONS as u64)
    }

    fn add_mem_region(
        &mut self,
        region: &VhostUserSingleMemoryRegion,
        fd: File,
        postcopy_listening: Option<bool>,
    ) -> VhostResult<Option<VhostUserMemoryRegionBase>> {
        let message = "ADD_MEM_REG";
        self.userfault = None;
        let mut regions = self
            .ram
            .as_ref()
            .map_or(Vec::new(), |r| r.regions().to_vec());
        match Region::new(
            region.guest_phys_addr,
            region.memory_size,
            region.user_addr,
            &fd,
            region.mmap_offset,
        ) {
            Ok(region) => regions.push(self.kept(region, fd)),
            Err(source) => return Err(self.refuse(&Refusal::Memory { message, source })),
        }
        let base = regions.last().map(Region::address);
        self.set_regions(message, regions)?;
        Ok(base.filter(|_| postcopy_listening == Some(true)))
    }

    fn remove_mem_region(&mut self, region: &VhostUserSingleMemoryRegion) -> VhostResult<()> {
        let (guest, size, user) = (region.guest_phys_addr, region.memory_size, region.user_addr);
        let message = "REM_MEM_REG";
        let mut regions = self
            .ram
            .as_ref()
            .map_or(Vec::new(), |r| r.regions().to_vec());
        let before = regions.len();
        regions.retain(|r| (r.guest, r.size, r.user) != (guest, size, user));
        if regions.len() == before {
            return Err(self.refuse(&Refusal::Value {
                message,
                value: guest,
                allowed: "a region that was added",
            }));
        }
        self.set_regions(message, regions)
    }

    /// The front end's file is used as it is: all is written, or read, before the reply.
    fn set_device_state_fd(
        &mut self,
        direction: VhostTransferStateDirection,
        _phase: VhostTransferStatePhase,
        fd: File,
    ) -> VhostResult<Option<File>> {
        let message = "SET_DEVICE_STATE_FD";
        self.state_moved = false;
        if self.protocol_features & VhostUserProtocolFeatures::DEVICE_STATE.bits() == 0 {
            return Err(self.refuse(&Refusal::NotOffered { message }));
        }
        if self.rings.iter().any(Ring::is_started) {
            return Err(self.refuse(&Refusal::Running { message }));
        }
        let moved = match direction {
            VhostTransferStateDirection::SAVE => self.device.save_state(fd.as_fd()),
            VhostTransferStateDirection::LOAD => self.device.load_state(fd.as_fd()),
        };
        match moved {
            Ok(()) => {
                self.state_moved = true;
                Ok(None)
            }
            // The library tells the front end that it failed, and goes on.
            Err(why) => {
                ipc::log::error!("{message}: {why}");
                Err(VhostError::InvalidOperation("device state"))
            }
        }
    }

    fn check_device_state(&mut self) -> VhostResult<()> {
        if self.state_moved {
            return Ok(());
        }
        Err(VhostError::InvalidOperation("device state"))
    }

    fn get_shmem_config(&mut self) -> VhostResult<VhostUserShMemConfig> {
        match self.device.window_len() {
            0 => Err(self.refuse(&Refusal::NotOffered {
                message: "GET_SHMEM_CONFIG",
            })),
            len => Ok(VhostUserShMemConfig::new(1, &[len])),
        }
    }

    fn set_log_base(&mut self, _log: &VhostUserLog, _file: File) -> VhostResult<()> {
        Err(self.refuse(&Refusal::NotOffered {
            message: "SET_LOG_BASE",
        }))
    }
}
