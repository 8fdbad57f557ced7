//! A vhost-user front end for tests: guest memory, rings as a driver builds them, and live device processes.
//!
//! **Job.** [`DeviceProcess`] starts a device binary with the descriptors, the identity and the limits that the broker gives
//! it, but without namespaces (a test has threads, and `ozone` starts no process from such), and with this process as its front end; [`TestFrontend`] negotiates; [`DriverQueue`] is the driver's side of a split virtqueue, well behaved or not.
//!
//! **Who is not trusted.** Nobody: this is test code, it panics when something is not as expected.
//!
//! **Why this way.** A device is tested as the process that ships, with its filter and its descriptors, and without KVM.
//! Compiled only with the feature `test-frontend`, which nothing in the product turns on.

#![allow(unsafe_code)] // descriptors get their fixed numbers between fork and exec
#![allow(
    clippy::unwrap_used,
    clippy::missing_panics_doc,
    clippy::needless_pass_by_value
)] // test code

pub mod polled;
pub mod tap;
pub mod window;

use std::fs::File;
use std::io::Read;
use std::os::fd::{AsFd, AsRawFd, OwnedFd, RawFd};
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::atomic::{Ordering, fence};
use std::time::Duration;

use ipc::PROTOCOL_VERSION;
use ipc::log::Level;
use ipc::spec::DeviceSpec;
use ipc::start::{
    FD_BACKEND, FD_LOG, FD_START, FD_VHOST_USER, SandboxMode, SeccompMode, StartMessage,
};
use nix::poll::{PollFd, PollFlags, ppoll};
use nix::sys::memfd::{MFdFlags, memfd_create};
use vhost::vhost_user::message::{
    VhostUserConfigFlags, VhostUserInflight, VhostUserProtocolFeatures, VhostUserVirtioFeatures,
};
use vhost::vhost_user::{Frontend, VhostUserFrontend};
use vhost::{VhostBackend, VhostUserMemoryRegionInfo, VringConfigData};
use virtio_bindings::virtio_config::VIRTIO_F_VERSION_1;
use virtio_bindings::virtio_ring::{
    VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC, VRING_DESC_F_INDIRECT, VRING_DESC_F_NEXT,
    VRING_DESC_F_WRITE,
};
use vm_memory::{
    Bytes, FileOffset, GuestAddress, GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion,
};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use window::WindowServer;

/// How long a test waits for something that must come.
const PATIENCE: Duration = Duration::from_secs(20);

/// A chain's descriptor flags.
pub const NEXT: u16 = VRING_DESC_F_NEXT as u16;
/// The device writes to the buffer.
pub const WRITE: u16 = VRING_DESC_F_WRITE as u16;
/// The buffer is a table of descriptors.
pub const INDIRECT: u16 = VRING_DESC_F_INDIRECT as u16;

/// `VIRTIO_F_VERSION_1` and vhost-user's protocol bit, which every test accepts.
pub const BASE_FEATURES: u64 =
    1 << VIRTIO_F_VERSION_1 | VhostUserVirtioFeatures::PROTOCOL_FEATURES.bits();
/// `VIRTIO_F_EVENT_IDX`
pub const EVENT_IDX: u64 = 1 << VIRTIO_RING_F_EVENT_IDX;
/// `VIRTIO_F_INDIRECT_DESC`
pub const INDIRECT_DESC: u64 = 1 << VIRTIO_RING_F_INDIRECT_DESC;

/// A device process and the log that it writes.
#[derive(Debug)]
pub struct DeviceProcess {
    child: Child,
    log: File,
    socket: Option<UnixStream>,
}

/// A start message with everything on: the filter kills.
pub fn start_message(device: DeviceSpec, backend_fds: u32) -> StartMessage {
    StartMessage {
        version: PROTOCOL_VERSION,
        device,
        backend_fds,
        userfault: false,
        beside: false,
        instead: false,
        seccomp: SeccompMode::Kill,
        // A test process has no namespaces of its own; everything that the process can do for itself is done.
        sandbox: SandboxMode::BestEffort,
        log_level: Level::Info,
    }
}

impl DeviceProcess {
    /// Starts `binary` with `backends` from descriptor 5 on.
    pub fn start(binary: &str, device: DeviceSpec, backends: Vec<OwnedFd>) -> Self {
        let message = start_message(device, backends.len() as u32);
        Self::start_with(binary, &message, backends)
    }

    /// Starts `binary` with any message.
    pub fn start_with(binary: &str, message: &StartMessage, backends: Vec<OwnedFd>) -> Self {
        let (ours, theirs) = UnixStream::pair().unwrap();
        let start = ipc::start::to_memfd(message).unwrap();
        Self::spawn(binary, theirs.into(), start, backends, Some(ours), true)
    }

    /// Starts `binary` with all rights that this process has, which it must refuse.
    pub fn start_unconfined(binary: &str, device: DeviceSpec) -> Self {
        let (ours, theirs) = UnixStream::pair().unwrap();
        let start = ipc::start::to_memfd(&start_message(device, 0)).unwrap();
        Self::spawn(binary, theirs.into(), start, Vec::new(), Some(ours), false)
    }

    /// Starts `binary` on a connected socket that somebody else holds the other end of.
    pub fn start_on(
        binary: &str,
        device: DeviceSpec,
        backends: Vec<OwnedFd>,
        socket: UnixStream,
    ) -> Self {
        let message = start_message(device, backends.len() as u32);
        let start = ipc::start::to_memfd(&message).unwrap();
        Self::spawn(binary, socket.into(), start, backends, None, true)
    }

    fn spawn(
        binary: &str,
        socket: OwnedFd,
        start: OwnedFd,
        backends: Vec<OwnedFd>,
        ours: Option<UnixStream>,
        confined: bool,
    ) -> Self {
        let (log, log_end) = std::io::pipe().unwrap();
        let log_end = OwnedFd::from(log_end);
        let mut plan: Vec<(RawFd, RawFd)> = vec![
            (log_end.as_raw_fd(), FD_LOG),
            (socket.as_raw_fd(), FD_VHOST_USER),
            (start.as_raw_fd(), FD_START),
        ];
        plan.extend(
            backends
                .iter()
                .zip(FD_BACKEND..)
                .map(|(fd, number)| (fd.as_raw_fd(), number)),
        );
        // By its descriptor: the folders above it need not be open to the user that the process runs as.
        let binary = File::open(binary).unwrap();
        let mut command = Command::new(format!("/proc/self/fd/{}", binary.as_raw_fd()));
        command
            .env_clear()
            .stdin(Stdio::null())
            .stdout(Stdio::null());
        let root = nix::unistd::geteuid().is_root();
        // SAFETY: the closure makes system calls only, on numbers that the parent keeps open until after exec.
        unsafe {
            command.pre_exec(move || {
                place_descriptors(&plan)?;
                if confined {
                    give_rights_up(root)
                } else {
                    Ok(())
                }
            });
        }
        let child = command.spawn().unwrap();
        Self {
            child,
            log: File::from(OwnedFd::from(log)),
            socket: ours,
        }
    }

    /// The front end's end of the socket, once.
    pub fn socket(&mut self) -> UnixStream {
        self.socket.take().unwrap()
    }

    /// Its process id.
    pub fn id(&self) -> u32 {
        self.child.id()
    }

    /// `SIGKILL`.
    pub fn kill(&mut self) {
        self.child.kill().unwrap();
    }

    /// Waits for its end; returns how it ended and all that it logged.
    pub fn finish(mut self) -> (ExitStatus, String) {
        drop(self.socket.take());
        let status = self.child.wait().unwrap();
        let mut log = String::new();
        self.log.read_to_string(&mut log).unwrap();
        (status, log)
    }

    /// Waits for an orderly end.
    pub fn finish_well(self) -> String {
        let (status, log) = self.finish();
        assert!(status.success(), "{status}: {log}");
        log
    }
}

/// Between fork and exec: the plan's descriptors get their numbers, everything else is closed on exec.
fn place_descriptors(plan: &[(RawFd, RawFd)]) -> std::io::Result<()> {
    /// Above every number that is used.
    const HIGH: RawFd = 100;
    let check = |result: libc::c_int| match result {
        -1 => Err(std::io::Error::last_os_error()),
        fd => Ok(fd),
    };
    // SAFETY (all): these calls take numbers and touch no memory; this process is about to exec.
    for (from, to) in plan {
        // SAFETY: see above.
        check(unsafe { libc::dup3(*from, to + HIGH, libc::O_CLOEXEC) })?;
    }
    for (_, to) in plan {
        // SAFETY: see above.
        check(unsafe { libc::dup2(to + HIGH, *to) })?;
    }
    let last = plan.iter().map(|(_, to)| *to).max().unwrap_or(FD_LOG);
    let flags = libc::CLOSE_RANGE_CLOEXEC as libc::c_int;
    // SAFETY: see above.
    check(unsafe { libc::close_range(last as u32 + 1, u32::MAX, flags) })?;
    Ok(())
}

/// Between fork and exec: what the harness demands of whoever starts it, on any host.
fn give_rights_up(root: bool) -> std::io::Result<()> {
    /// The user and group that own nothing.
    const NOBODY: u32 = 65534;
    let check = |result: libc::c_int| match result {
        -1 => Err(std::io::Error::last_os_error()),
        _ => Ok(()),
    };
    let none = libc::rlimit {
        rlim_cur: 0,
        rlim_max: 0,
    };
    // SAFETY: reads one structure on the stack.
    check(unsafe { libc::setrlimit(libc::RLIMIT_CORE, &raw const none) })?;
    if root {
        // SAFETY: no list is read when its length is 0; the others take numbers only.
        unsafe {
            check(libc::setgroups(0, std::ptr::null()))?;
            check(libc::setresgid(NOBODY, NOBODY, NOBODY))?;
            check(libc::setresuid(NOBODY, NOBODY, NOBODY))?;
        }
    }
    // SAFETY: takes numbers only.
    check(unsafe { libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) })
}

/// Guest memory, shared with the device: two regions with a hole between them.
#[derive(Debug)]
pub struct GuestMemory {
    map: GuestMemoryMmap<()>,
}

/// Start and size of the regions.
pub const REGIONS: [(u64, usize); 2] = [(0, 4 << 20), (8 << 20, 4 << 20)];

impl GuestMemory {
    /// Fresh memory.
    pub fn new() -> Self {
        let parts = REGIONS.map(|(start, size)| {
            let file = File::from(memfd_create(c"guest-ram", MFdFlags::MFD_CLOEXEC).unwrap());
            file.set_len(size as u64).unwrap();
            (GuestAddress(start), size, Some(FileOffset::new(file, 0)))
        });
        Self {
            map: GuestMemoryMmap::from_ranges_with_files(parts).unwrap(),
        }
    }

    /// The memory itself, for another front end.
    pub const fn map(&self) -> &GuestMemoryMmap<()> {
        &self.map
    }

    /// Writes bytes.
    pub fn write(&self, address: u64, data: &[u8]) {
        self.map.write_slice(data, GuestAddress(address)).unwrap();
    }

    /// Reads bytes.
    pub fn read(&self, address: u64, len: usize) -> Vec<u8> {
        let mut out = vec![0; len];
        self.map
            .read_slice(&mut out, GuestAddress(address))
            .unwrap();
        out
    }

    /// As a front end announces it.
    pub fn regions(&self) -> Vec<VhostUserMemoryRegionInfo> {
        self.map
            .iter()
            .map(|region| VhostUserMemoryRegionInfo {
                guest_phys_addr: region.start_addr().0,
                memory_size: region.len(),
                userspace_addr: region.as_ptr() as u64,
                mmap_offset: 0,
                mmap_handle: region.file_offset().unwrap().file().as_raw_fd(),
            })
            .collect()
    }

    fn user(&self, address: u64) -> u64 {
        self.map.get_host_address(GuestAddress(address)).unwrap() as u64
    }

    fn load(&self, address: u64) -> u16 {
        u16::from_le(
            self.map
                .load(GuestAddress(address), Ordering::Acquire)
                .unwrap(),
        )
    }

    fn store(&self, address: u64, value: u16) {
        self.map
            .store(value.to_le(), GuestAddress(address), Ordering::Release)
            .unwrap();
    }
}

impl Default for GuestMemory {
    fn default() -> Self {
        Self::new()
    }
}

/// One buffer of a request.
#[derive(Debug, Clone, Copy)]
pub struct Buffer {
    /// Guest physical address.
    pub address: u64,
    /// Bytes.
    pub len: u32,
    /// Whether the device writes to it.
    pub write: bool,
}

impl Buffer {
    /// The device reads it.
    pub const fn readable(address: u64, len: u32) -> Self {
        Self {
            address,
            len,
            write: false,
        }
    }

    /// The device writes it.
    pub const fn writable(address: u64, len: u32) -> Self {
        Self {
            address,
            len,
            write: true,
        }
    }
}

/// The driver's side of a split virtqueue (virtio 1.3, 2.7).
#[derive(Debug)]
pub struct DriverQueue {
    /// Its number.
    pub index: usize,
    /// Its entries.
    pub size: u16,
    /// Guest physical address of the descriptor table; the other two parts follow.
    pub table: u64,
    /// Where an indirect table may be put.
    pub indirect_table: u64,
    next_descriptor: u16,
    next_available: u16,
    seen_used: u16,
    kick: EventFd,
    call: EventFd,
    error: EventFd,
}

impl DriverQueue {
    /// A queue in guest memory from `table` on (a multiple of 64 KiB, of which it takes 128 KiB for 4096 entries or less).
    pub fn new(index: usize, size: u16, table: u64) -> Self {
        let event = || EventFd::new(EFD_NONBLOCK).unwrap();
        Self {
            index,
            size,
            table,
            indirect_table: table + 0x1_8000,
            next_descriptor: 0,
            next_available: 0,
            seen_used: 0,
            kick: event(),
            call: event(),
            error: event(),
        }
    }

    /// Guest physical address of the available ring.
    pub fn available(&self) -> u64 {
        self.table + u64::from(self.size) * 16
    }

    /// Guest physical address of the used ring.
    pub fn used(&self) -> u64 {
        (self.available() + 6 + u64::from(self.size) * 2).next_multiple_of(64)
    }

    /// Writes one raw descriptor into a table.
    pub fn describe(memory: &GuestMemory, table: u64, index: u16, raw: (u64, u32, u16, u16)) {
        let (address, len, flags, next) = raw;
        let mut bytes = [0; 16];
        bytes[..8].copy_from_slice(&address.to_le_bytes());
        bytes[8..12].copy_from_slice(&len.to_le_bytes());
        bytes[12..14].copy_from_slice(&flags.to_le_bytes());
        bytes[14..].copy_from_slice(&next.to_le_bytes());
        memory.write(table + u64::from(index) * 16, &bytes);
    }

    /// Puts a chain into the table, without making it available; returns its head.
    pub fn chain(&mut self, memory: &GuestMemory, buffers: &[Buffer]) -> u16 {
        let head = self.next_descriptor;
        for (at, buffer) in buffers.iter().enumerate() {
            let index = (head + at as u16) % self.size;
            let last = at + 1 == buffers.len();
            let flags = if buffer.write { WRITE } else { 0 } | if last { 0 } else { NEXT };
            let next = (index + 1) % self.size;
            Self::describe(
                memory,
                self.table,
                index,
                (buffer.address, buffer.len, flags, next),
            );
        }
        self.next_descriptor = (head + buffers.len() as u16) % self.size;
        head
    }

    /// Puts a chain into an indirect table, and one descriptor for it into the queue's; returns its head.
    pub fn indirect_chain(&mut self, memory: &GuestMemory, buffers: &[Buffer]) -> u16 {
        for (at, buffer) in buffers.iter().enumerate() {
            let last = at + 1 == buffers.len();
            let flags = if buffer.write { WRITE } else { 0 } | if last { 0 } else { NEXT };
            let raw = (buffer.address, buffer.len, flags, at as u16 + 1);
            Self::describe(memory, self.indirect_table, at as u16, raw);
        }
        let head = self.next_descriptor;
        let raw = (self.indirect_table, buffers.len() as u32 * 16, INDIRECT, 0);
        Self::describe(memory, self.table, head, raw);
        self.next_descriptor = (head + 1) % self.size;
        head
    }

    /// Makes a head available, whatever it is, without a kick.
    pub fn offer(&mut self, memory: &GuestMemory, head: u16) {
        let slot = u64::from(self.next_available % self.size);
        memory.store(self.available() + 4 + slot * 2, head);
        self.next_available = self.next_available.wrapping_add(1);
        memory.store(self.available() + 2, self.next_available);
        fence(Ordering::SeqCst);
    }

    /// Writes any available index.
    pub fn set_available_index(&mut self, memory: &GuestMemory, index: u16) {
        self.next_available = index;
        memory.store(self.available() + 2, index);
    }

    /// Tells the device that something is available.
    pub fn kick(&self) {
        self.kick.write(1).unwrap();
    }

    /// With event index: what the driver wants to be interrupted for.
    pub fn set_used_event(&self, memory: &GuestMemory, index: u16) {
        memory.store(self.available() + 4 + u64::from(self.size) * 2, index);
    }

    /// With event index: what the device wants to be kicked for.
    pub fn avail_event(&self, memory: &GuestMemory) -> u16 {
        memory.load(self.used() + 4 + u64::from(self.size) * 8)
    }

    /// Flags of the available ring (`VIRTQ_AVAIL_F_NO_INTERRUPT` is 1).
    pub fn set_available_flags(&self, memory: &GuestMemory, flags: u16) {
        memory.store(self.available(), flags);
    }

    /// Index of the used ring.
    pub fn used_index(&self, memory: &GuestMemory) -> u16 {
        memory.load(self.used() + 2)
    }

    /// The next used element, if there is one: head and length.
    pub fn try_used(&mut self, memory: &GuestMemory) -> Option<(u16, u32)> {
        if self.used_index(memory) == self.seen_used {
            return None;
        }
        let slot = u64::from(self.seen_used % self.size);
        let element = memory.read(self.used() + 4 + slot * 8, 8);
        self.seen_used = self.seen_used.wrapping_add(1);
        let id = u32::from_le_bytes(element[..4].try_into().unwrap());
        let len = u32::from_le_bytes(element[4..].try_into().unwrap());
        Some((u16::try_from(id).unwrap(), len))
    }

    /// Waits for the next used element by its interrupt.
    pub fn wait_used(&mut self, memory: &GuestMemory) -> (u16, u32) {
        loop {
            if let Some(used) = self.try_used(memory) {
                return used;
            }
            wait_for(&self.call, "an interrupt");
            let _ = self.call.read();
        }
    }

    /// Waits until the device declares the queue broken.
    pub fn wait_broken(&self) {
        wait_for(&self.error, "the error eventfd");
        self.error.read().unwrap();
    }

    /// Whether the device has declared the queue broken since the last time that this was asked.
    pub fn is_broken(&self) -> bool {
        self.error.read().is_ok()
    }

    /// Waits for an interrupt, and takes it.
    pub fn wait_interrupt(&self) {
        wait_for(&self.call, "an interrupt");
        let _ = self.call.read();
    }

    /// Whether an interrupt comes within `time`; it is not taken.
    pub fn wait_interrupt_for(&self, time: Duration) -> bool {
        // SAFETY: the descriptor is open as long as `self` is borrowed.
        let fd = unsafe { std::os::fd::BorrowedFd::borrow_raw(self.call.as_raw_fd()) };
        let mut fds = [PollFd::new(fd, PollFlags::POLLIN)];
        ppoll(&mut fds, Some(time.into()), None).unwrap() > 0
    }

    /// Interrupts since the last time that this was asked.
    pub fn interrupts(&self) -> u64 {
        self.call.read().unwrap_or(0)
    }

    /// Offers one chain of buffers, kicks, waits for it; returns the used length.
    pub fn request(&mut self, memory: &GuestMemory, buffers: &[Buffer]) -> u32 {
        let head = self.chain(memory, buffers);
        self.offer(memory, head);
        self.kick();
        let (used, len) = self.wait_used(memory);
        assert_eq!(used, head);
        len
    }
}

fn wait_for(event: &EventFd, what: &str) {
    // SAFETY: the descriptor is open as long as `event` is borrowed.
    let fd = unsafe { std::os::fd::BorrowedFd::borrow_raw(event.as_raw_fd()) };
    let mut fds = [PollFd::new(fd, PollFlags::POLLIN)];
    let ready = ppoll(&mut fds, Some(PATIENCE.into()), None).unwrap();
    assert!(ready > 0, "{what} did not come in {PATIENCE:?}");
}

/// Waits until `fd` can be read.
pub fn wait_readable(fd: impl AsFd, what: &str) {
    let mut fds = [PollFd::new(fd.as_fd(), PollFlags::POLLIN)];
    let ready = ppoll(&mut fds, Some(PATIENCE.into()), None).unwrap();
    assert!(ready > 0, "{what} did not come in {PATIENCE:?}");
}

/// The front end: sets queues up and keeps the connection open.
pub struct TestFrontend {
    /// The library's front end, for messages that a test sends itself.
    pub vhost: Frontend,
    /// Guest memory.
    pub memory: GuestMemory,
    /// What the device offers.
    pub offered: u64,
    /// What was accepted.
    pub accepted: u64,
}

impl TestFrontend {
    /// Negotiates everything up to guest memory. Accepts `features` of what is offered, and [`BASE_FEATURES`].
    pub fn connect(socket: UnixStream, features: u64) -> Self {
        Self::connect_with(socket, features, GuestMemory::new())
    }

    /// The same with memory that is there already, as after a device's death.
    pub fn connect_with(socket: UnixStream, features: u64, memory: GuestMemory) -> Self {
        Self::negotiate(socket, features, memory, VhostUserProtocolFeatures::empty())
    }

    fn negotiate(
        socket: UnixStream,
        features: u64,
        memory: GuestMemory,
        more: VhostUserProtocolFeatures,
    ) -> Self {
        let mut vhost = Frontend::from_stream(socket, 64);
        vhost.set_owner().unwrap();
        let offered = vhost.get_features().unwrap();
        let accepted = (features | BASE_FEATURES) & offered;
        let protocol = vhost.get_protocol_features().unwrap();
        let wanted = VhostUserProtocolFeatures::MQ
            | VhostUserProtocolFeatures::REPLY_ACK
            | VhostUserProtocolFeatures::CONFIG
            | VhostUserProtocolFeatures::INFLIGHT_SHMFD
            | VhostUserProtocolFeatures::RESET_DEVICE
            | VhostUserProtocolFeatures::CONFIGURE_MEM_SLOTS
            | more;
        assert!(protocol.contains(wanted), "{protocol:?}");
        vhost.set_protocol_features(wanted).unwrap();
        vhost.set_hdr_flags(vhost::vhost_user::message::VhostUserHeaderFlag::NEED_REPLY);
        vhost.set_features(accepted).unwrap();
        vhost.set_mem_table(&memory.regions()).unwrap();
        Self {
            vhost,
            memory,
            offered,
            accepted,
        }
    }

    /// As [`connect`](Self::connect), and takes requests for the device's shared memory region with `window`. Also tells the sizes of its
    /// regions, as the device says.
    pub fn connect_with_window(
        socket: UnixStream,
        features: u64,
        window: WindowServer,
    ) -> (Self, Vec<u64>) {
        let more = VhostUserProtocolFeatures::BACKEND_REQ | VhostUserProtocolFeatures::SHMEM;
        let mut front = Self::negotiate(socket, features, GuestMemory::new(), more);
        let sizes = front.window_sizes();
        window.with(|state| state.size = sizes.first().copied().unwrap_or(0));
        front.vhost.set_backend_request_fd(&window.start()).unwrap();
        (front, sizes)
    }

    fn window_sizes(&mut self) -> Vec<u64> {
        let config = self.vhost.get_shmem_config().unwrap();
        let regions = config.nregions as usize;
        let sizes = config.memory_sizes;
        assert!(sizes[regions..].iter().all(|size| *size == 0));
        sizes[..regions].to_vec()
    }

    /// Describes, starts and enables a queue from index 0 on.
    pub fn start(&mut self, queue: &DriverQueue) {
        self.start_at(queue, 0);
    }

    /// The same from available index `base` on.
    pub fn start_at(&mut self, queue: &DriverQueue, base: u16) {
        let addresses = VringConfigData {
            queue_max_size: queue.size,
            queue_size: queue.size,
            flags: 0,
            desc_table_addr: self.memory.user(queue.table),
            used_ring_addr: self.memory.user(queue.used()),
            avail_ring_addr: self.memory.user(queue.available()),
            log_addr: None,
        };
        let index = queue.index;
        self.vhost.set_vring_num(index, queue.size).unwrap();
        self.vhost.set_vring_addr(index, &addresses).unwrap();
        self.vhost.set_vring_base(index, base).unwrap();
        self.vhost.set_vring_call(index, &queue.call).unwrap();
        self.vhost.set_vring_err(index, &queue.error).unwrap();
        self.vhost.set_vring_kick(index, &queue.kick).unwrap();
        self.vhost.set_vring_enable(index, true).unwrap();
    }

    /// Resets the device and accepts the same features again.
    pub fn reset(&mut self) {
        self.vhost.reset_device().unwrap();
        self.vhost.set_features(self.accepted).unwrap();
    }

    /// Stops a queue; returns the next available index.
    pub fn stop(&mut self, queue: &DriverQueue) -> u16 {
        let base = self.vhost.get_vring_base(queue.index).unwrap();
        u16::try_from(base).unwrap()
    }

    /// Reads configuration space.
    pub fn config(&mut self, offset: u32, len: u32) -> Vec<u8> {
        let zeros = vec![0; len as usize];
        let flags = VhostUserConfigFlags::empty();
        let (_, bytes) = self.vhost.get_config(offset, len, flags, &zeros).unwrap();
        bytes
    }

    /// Asks for a fresh in-flight region and hands it back, as front ends do.
    pub fn track_inflight(&mut self, queues: u16, size: u16) -> (VhostUserInflight, File) {
        let wanted = VhostUserInflight::new(0, 0, queues, size);
        let (region, file) = self.vhost.get_inflight_fd(&wanted).unwrap();
        self.use_inflight(&region, &file);
        (region, file)
    }

    /// Hands a region over.
    pub fn use_inflight(&mut self, region: &VhostUserInflight, file: &File) {
        self.vhost
            .set_inflight_fd(region, file.as_raw_fd())
            .unwrap();
    }
}
