//! Chardevs: where a guest's serial console leads to (`-serial`, `-chardev`).
//!
//! **Job.** A [`Chardev`] is made of descriptors that the broker opened (or standard input and output) and joins them to a
//! device front: output through [`ChardevOutput`], input into an [`InputSink`]. The main loop polls one descriptor of
//! each ([`EventSource`]) and calls [`EventSource::handle`] when it is readable.
//!
//! **Who is not trusted**: the guest and whoever is at the other end. A reader that is slow or absent never blocks a vCPU
//! ([`backlog`]); input is read only as far as the guest has room for it, so nothing grows; at most [`PENDING`] bytes
//! outlive a client that is gone.
//!
//! **Why this way.** What has to be polled changes all the time: a client comes and goes, output waits, the guest's FIFO is
//! full. Each chardev keeps an epoll set of its own for that, and the main loop knows one descriptor that never changes.

mod backlog;
mod descriptor;
pub mod terminal;

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::sync::Arc;

use ipc::log::{info, warn};
use nix::errno::Errno;
use nix::sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags, EpollTimeout};
use nix::sys::socket::{SockFlag, accept4};
use nix::sys::termios::{SetArg, tcgetattr, tcsetattr};
use thiserror::Error;
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

pub use backlog::ChardevOutput;
use backlog::Shared;
use descriptor::Descriptor;
use terminal::{RawTerminal, TerminalError};

use crate::platform::serial::SerialInput;

/// Bytes of input that wait in this process at most: what a client sent just before it left.
const PENDING: usize = 4096;
/// Bytes of input that one read takes at most.
const CHUNK: usize = 512;

/// Something that the main loop polls.
pub trait EventSource {
    /// Readable when there is something to do. The same descriptor for the life of the source.
    fn fd(&self) -> BorrowedFd<'_>;
    /// Does what there is to do; never blocks. Harmless when there is nothing.
    fn handle(&mut self);
}

/// Where a chardev's input goes.
pub trait InputSink: Send {
    /// Bytes that it would take now. After an answer of 0, or a [`InputSink::push`] that took less than it was given,
    /// [`InputSink::room_event`] becomes readable when there is room.
    fn room(&self) -> usize;
    /// Takes bytes, tells how many.
    fn push(&mut self, bytes: &[u8]) -> usize;
    /// Readable once there is room again.
    fn room_event(&self) -> &EventFd;
}

impl InputSink for SerialInput {
    fn room(&self) -> usize {
        Self::room(self)
    }

    fn push(&mut self, bytes: &[u8]) -> usize {
        Self::push(self, bytes)
    }

    fn room_event(&self) -> &EventFd {
        Self::room_event(self)
    }
}

/// Why a chardev could not be made.
#[derive(Debug, Error)]
pub enum ChardevError {
    /// A system call failed.
    #[error("chardev \"{id}\": {call} failed")]
    System {
        /// Id of the chardev.
        id: String,
        /// The system call.
        call: &'static str,
        /// What the kernel said.
        source: io::Error,
    },
    /// The terminal could not be set up.
    #[error("chardev \"{id}\"")]
    Terminal {
        /// Id of the chardev.
        id: String,
        /// Why.
        source: TerminalError,
    },
}

/// What an event of the inner epoll set is about.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u64)]
enum Slot {
    Wake,
    Room,
    Listener,
    Reader,
    Writer,
}

const SLOTS: usize = 5;

/// One chardev.
pub struct Chardev {
    id: String,
    epoll: Epoll,
    shared: Arc<Shared>,
    reader: Option<Descriptor>,
    listener: Option<OwnedFd>,
    /// The guest has to wait for the first client.
    waiting: bool,
    /// The far side of a pseudo terminal. Held so that the near side has no hang-ups to tell when its user comes and goes.
    _far_side: Option<OwnedFd>,
    /// Raw mode ends with the chardev.
    _terminal: Option<RawTerminal>,
    sink: Option<Box<dyn InputSink>>,
    /// Input of a client that left before the guest had read it.
    pending: Vec<u8>,
    /// What is in the epoll set, by slot.
    polled: [Option<EpollFlags>; SLOTS],
}

impl std::fmt::Debug for Chardev {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Chardev")
            .field("id", &self.id)
            .field("reader", &self.reader)
            .field("listener", &self.listener)
            .finish_non_exhaustive()
    }
}

/// Builds the errors of one chardev.
struct Failed<'a>(&'a str);

impl Failed<'_> {
    fn at<E: Into<io::Error>>(
        &self,
        call: &'static str,
    ) -> impl FnOnce(E) -> ChardevError + use<E> {
        let id = self.0.to_owned();
        move |source| ChardevError::System {
            id,
            call,
            source: source.into(),
        }
    }
}

impl Chardev {
    /// Standard input and output. A terminal is raw from here on until the chardev is dropped. Call it before lock-down:
    /// it opens `/proc/self/fd`.
    pub fn stdio(id: &str) -> Result<Self, ChardevError> {
        let failed = Failed(id);
        let (stdin, stdout) = (io::stdin(), io::stdout());
        let reader = Descriptor::shared(stdin.as_fd(), false).map_err(failed.at("fstat"))?;
        let writer = Descriptor::shared(stdout.as_fd(), true).map_err(failed.at("fstat"))?;
        let mut chardev = Self::new(id, Some(reader), Some(writer))?;
        chardev._terminal =
            RawTerminal::enter(stdin.as_fd()).map_err(|source| ChardevError::Terminal {
                id: id.to_owned(),
                source,
            })?;
        Ok(chardev)
    }

    /// The near side of a new pseudo terminal. It is raw from the start, so that it does not send the guest's output back
    /// as input, and what nobody reads stays for the next reader.
    pub fn pty(id: &str, near_side: OwnedFd) -> Result<Self, ChardevError> {
        let failed = Failed(id);
        let settings = tcgetattr(&near_side).map_err(failed.at("tcgetattr"))?;
        let mut settings = terminal::raw(&settings);
        settings
            .output_flags
            .remove(nix::sys::termios::OutputFlags::OPOST);
        tcsetattr(&near_side, SetArg::TCSANOW, &settings).map_err(failed.at("tcsetattr"))?;
        let far_side = far_side(&near_side).map_err(failed.at("ioctl(TIOCGPTPEER)"))?;
        let mut chardev = Self::owned(id, near_side)?;
        chardev._far_side = Some(far_side);
        Ok(chardev)
    }

    /// A listening unix socket; one client at a time, the next one is accepted when it has left. With `wait` the guest is
    /// not to start before the first has come, see [`Chardev::is_ready`].
    pub fn listening(id: &str, listener: OwnedFd, wait: bool) -> Result<Self, ChardevError> {
        let failed = Failed(id);
        // The description is ours: a client that left the queue again must not block us in accept.
        let listener = Descriptor::owned(listener)
            .map_err(failed.at("fcntl"))?
            .into_fd();
        let mut chardev = Self::new(id, None, None)?;
        chardev.listener = Some(listener);
        chardev.waiting = wait;
        chardev.update();
        Ok(chardev)
    }

    /// A connected socket. When the other end leaves, output is kept up to the cap and nobody reads it.
    pub fn connected(id: &str, socket: OwnedFd) -> Result<Self, ChardevError> {
        Self::owned(id, socket)
    }

    /// A file (or fifo) that takes the output; there is no input.
    pub fn file(id: &str, file: OwnedFd) -> Result<Self, ChardevError> {
        let writer = Descriptor::owned(file).map_err(Failed(id).at("fcntl"))?;
        Self::new(id, None, Some(writer))
    }

    fn owned(id: &str, fd: OwnedFd) -> Result<Self, ChardevError> {
        let failed = Failed(id);
        let reader = Descriptor::owned(fd).map_err(failed.at("fcntl"))?;
        let writer = reader.try_clone().map_err(failed.at("dup"))?;
        Self::new(id, Some(reader), Some(writer))
    }

    fn new(
        id: &str,
        reader: Option<Descriptor>,
        writer: Option<Descriptor>,
    ) -> Result<Self, ChardevError> {
        let failed = Failed(id);
        let epoll =
            Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC).map_err(failed.at("epoll_create1"))?;
        let wake = EventFd::new(EFD_NONBLOCK | libc::EFD_CLOEXEC).map_err(failed.at("eventfd2"))?;
        let mut chardev = Self {
            id: id.to_owned(),
            epoll,
            shared: Shared::new(writer, wake),
            reader,
            listener: None,
            waiting: false,
            _far_side: None,
            _terminal: None,
            sink: None,
            pending: Vec::new(),
            polled: [None; SLOTS],
        };
        chardev.update();
        Ok(chardev)
    }

    /// Id of the chardev.
    pub fn id(&self) -> &str {
        &self.id
    }

    /// Whether the guest may start: false while a `server` without `nowait` has had no client.
    pub const fn is_ready(&self) -> bool {
        !self.waiting
    }

    /// The output side, for any thread.
    pub fn output(&self) -> ChardevOutput {
        ChardevOutput(self.shared.clone())
    }

    /// Bytes of output that were dropped because nobody read them.
    pub fn dropped(&self) -> u64 {
        self.shared.lock().dropped()
    }

    /// Says where input goes. Until then none is read.
    pub fn connect_input(&mut self, sink: Box<dyn InputSink>) {
        // A room event of an earlier sink is not one of this.
        self.poll(Slot::Room, None);
        self.sink = Some(sink);
        self.take_input();
        self.update();
    }

    /// Lets a client in, if one waits and none is there.
    fn accept(&mut self) {
        let Some(listener) = &self.listener else {
            return;
        };
        let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
        let reader = match accept4(listener.as_raw_fd(), flags) {
            Ok(client) => Descriptor::socket(adopt(client)),
            // It left again, or a signal came: the next event tells.
            Err(Errno::EAGAIN | Errno::EINTR | Errno::ECONNABORTED) => return,
            Err(error) => {
                warn!("chardev \"{}\": accept4 failed: {error}", self.id);
                return;
            }
        };
        match reader.try_clone() {
            Ok(writer) => {
                info!("chardev \"{}\": client connected", self.id);
                self.reader = Some(reader);
                self.waiting = false;
                let mut backlog = self.shared.lock();
                backlog.writer = Some(writer);
                backlog.flush();
            }
            Err(error) => warn!("chardev \"{}\": client refused: {error}", self.id),
        }
    }

    /// The other end is gone, for reading, for writing or for both.
    fn drop_reader(&mut self) {
        self.poll(Slot::Reader, None);
        if self.reader.take().is_some_and(|reader| reader.is_socket()) {
            info!("chardev \"{}\": client left", self.id);
            self.drop_writer();
        }
    }

    fn drop_writer(&mut self) {
        self.poll(Slot::Writer, None);
        let mut backlog = self.shared.lock();
        backlog.lost = false;
        backlog.writer = None;
    }

    /// Moves input to the guest as far as it has room.
    fn take_input(&mut self) {
        let Some(sink) = &mut self.sink else { return };
        while !self.pending.is_empty() {
            let taken = sink.push(&self.pending);
            if taken == 0 {
                return;
            }
            self.pending.drain(..taken);
        }
        let mut buffer = [0; CHUNK];
        loop {
            let (room, Some(reader)) = (sink.room(), &self.reader) else {
                return;
            };
            if room == 0 {
                return;
            }
            match reader.read(&mut buffer[..room.min(CHUNK)]) {
                Ok(0) => return self.drop_reader(),
                Ok(count) => {
                    let taken = sink.push(&buffer[..count]);
                    // Only this thread pushes, so there is as much room as there was said to be; were there less, the
                    // rest would wait.
                    self.pending.extend_from_slice(&buffer[taken..count]);
                }
                Err(Errno::EINTR) => {}
                Err(Errno::EAGAIN) => return,
                Err(error) => {
                    info!("chardev \"{}\": input ended: {error}", self.id);
                    return self.drop_reader();
                }
            }
        }
    }

    /// A client hung up: takes what it had still sent, within bounds, so that the next one can come in.
    fn take_leftovers(&mut self) {
        let mut buffer = [0; CHUNK];
        while let Some(reader) = &self.reader
            && self.pending.len() < PENDING
            && let Ok(count @ 1..) = reader.read(&mut buffer)
        {
            self.pending.extend_from_slice(&buffer[..count]);
        }
        self.drop_reader();
    }

    /// Has in the epoll set what is worth waiting for now.
    fn update(&mut self) {
        let has_room = self.sink.as_ref().map(|sink| sink.room() > 0);
        let reader = match (&self.reader, has_room) {
            (Some(_), Some(true)) => Some(EpollFlags::EPOLLIN),
            // Hang-ups are told without being asked for.
            (Some(reader), _) if reader.is_socket() => Some(EpollFlags::empty()),
            _ => None,
        };
        let backlog = self.shared.lock();
        let writer =
            (backlog.writer.is_some() && !backlog.is_empty()).then_some(EpollFlags::EPOLLOUT);
        drop(backlog);
        let listener = (self.reader.is_none()).then_some(EpollFlags::EPOLLIN);
        self.poll(Slot::Wake, Some(EpollFlags::EPOLLIN));
        self.poll(Slot::Room, has_room.map(|_| EpollFlags::EPOLLIN));
        self.poll(Slot::Listener, listener);
        self.poll(Slot::Writer, writer);
        if !self.poll(Slot::Reader, reader) && reader == Some(EpollFlags::EPOLLIN) {
            // A regular file or /dev/null: it cannot be waited for because it is always ready.
            self.take_input();
        }
    }

    /// Waits for `wanted` on the descriptor of `slot` from now on. False if that descriptor cannot be waited for.
    fn poll(&mut self, slot: Slot, wanted: Option<EpollFlags>) -> bool {
        let before = self.polled[slot as usize];
        if before == wanted {
            return true;
        }
        let backlog = self.shared.lock();
        let fd = match slot {
            Slot::Wake => Some(borrow(&self.shared.wake)),
            Slot::Room => self.sink.as_ref().map(|sink| borrow(sink.room_event())),
            Slot::Listener => self.listener.as_ref().map(AsFd::as_fd),
            Slot::Reader => self.reader.as_ref().map(AsFd::as_fd),
            Slot::Writer => backlog.writer.as_ref().map(AsFd::as_fd),
        };
        let Some(fd) = fd else {
            self.polled[slot as usize] = None;
            return true;
        };
        let event = |flags| EpollEvent::new(flags, slot as u64);
        let result = match (before, wanted) {
            (None, Some(flags)) => self.epoll.add(fd, event(flags)),
            (Some(_), Some(flags)) => self.epoll.modify(fd, &mut event(flags)),
            (_, None) => self.epoll.delete(fd),
        };
        match result {
            Ok(()) => {
                self.polled[slot as usize] = wanted;
                true
            }
            Err(Errno::EPERM) => false,
            Err(error) => {
                warn!("chardev \"{}\": epoll_ctl failed: {error}", self.id);
                true
            }
        }
    }
}

impl EventSource for Chardev {
    fn fd(&self) -> BorrowedFd<'_> {
        self.epoll.0.as_fd()
    }

    fn handle(&mut self) {
        let mut events = [EpollEvent::empty(); SLOTS];
        // Interrupted: the descriptor is still readable and the main loop calls again.
        let count = self
            .epoll
            .wait(&mut events, EpollTimeout::ZERO)
            .unwrap_or(0);
        for event in &events[..count] {
            let slot = event.data();
            if slot == Slot::Wake as u64 {
                let _ = self.shared.wake.read();
            } else if slot == Slot::Room as u64 {
                let _ = self.sink.as_ref().map(|sink| sink.room_event().read());
            } else if slot == Slot::Listener as u64 {
                self.accept();
            } else if slot == Slot::Reader as u64
                && event
                    .events()
                    .intersects(EpollFlags::EPOLLHUP | EpollFlags::EPOLLERR)
                && !event.events().contains(EpollFlags::EPOLLIN)
            {
                self.take_leftovers();
            }
        }
        self.take_input();
        // Whatever the events were: at the end of a VM this is the last chance of its last words.
        self.shared.lock().flush();
        if self.shared.lock().lost {
            self.drop_writer();
            if self.reader.as_ref().is_some_and(Descriptor::is_socket) {
                self.take_leftovers();
            }
        }
        self.update();
    }
}

/// Opens the far side of a pseudo terminal without a path.
#[allow(unsafe_code)] // nix has no TIOCGPTPEER
fn far_side(near_side: &OwnedFd) -> Result<OwnedFd, Errno> {
    let flags = libc::O_RDWR | libc::O_NOCTTY | libc::O_CLOEXEC;
    // SAFETY: TIOCGPTPEER takes its flags by value and touches no memory of ours.
    let fd = unsafe { libc::ioctl(near_side.as_raw_fd(), libc::TIOCGPTPEER, flags) };
    Errno::result(fd).map(adopt)
}

/// Owns a descriptor that the kernel has just made for us.
#[allow(unsafe_code)] // descriptors come as numbers
fn adopt(fd: i32) -> OwnedFd {
    // SAFETY: the callers pass the fresh result of a system call, and nothing else knows the number.
    unsafe { OwnedFd::from_raw_fd(fd) }
}

#[allow(unsafe_code)] // vmm-sys-util's EventFd has no AsFd
fn borrow(event: &EventFd) -> BorrowedFd<'_> {
    // SAFETY: the descriptor belongs to `event`, which the result borrows.
    unsafe { BorrowedFd::borrow_raw(event.as_raw_fd()) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::platform::serial::SerialSink;
    use ipc::limits::MAX_CHARDEV_BACKLOG;
    use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
    use std::io::{Read, Write};
    use std::os::unix::net::{UnixListener, UnixStream};
    use std::sync::Mutex;

    /// A guest with a FIFO of a few bytes.
    #[derive(Clone)]
    #[allow(clippy::type_complexity)] // bytes and room, and what tells of room
    struct Fifo(Arc<(Mutex<(Vec<u8>, usize)>, EventFd)>);

    impl Fifo {
        fn of(size: usize) -> Self {
            let event = EventFd::new(EFD_NONBLOCK).unwrap();
            Self(Arc::new((Mutex::new((Vec::new(), size)), event)))
        }

        /// The guest reads all.
        fn read(&self) -> Vec<u8> {
            let bytes = std::mem::take(&mut self.0.0.lock().unwrap().0);
            self.0.1.write(1).unwrap();
            bytes
        }
    }

    impl InputSink for Fifo {
        fn room(&self) -> usize {
            let state = self.0.0.lock().unwrap();
            state.1 - state.0.len()
        }

        fn push(&mut self, bytes: &[u8]) -> usize {
            let count = self.room().min(bytes.len());
            self.0
                .0
                .lock()
                .unwrap()
                .0
                .extend_from_slice(&bytes[..count]);
            count
        }

        fn room_event(&self) -> &EventFd {
            &self.0.1
        }
    }

    fn is_due(chardev: &Chardev) -> bool {
        let mut fds = [PollFd::new(chardev.fd(), PollFlags::POLLIN)];
        poll(&mut fds, PollTimeout::ZERO).unwrap() == 1
    }

    /// What the main loop does until nothing is left to do. An endless run is a busy loop.
    fn settle(chardev: &mut Chardev) {
        for _ in 0..1000 {
            if !is_due(chardev) {
                return;
            }
            chardev.handle();
        }
        panic!("the chardev keeps the main loop busy: {chardev:?}");
    }

    /// The guest reads until there is nothing more.
    fn drain(chardev: &mut Chardev, fifo: &Fifo) -> Vec<u8> {
        let mut all = Vec::new();
        loop {
            settle(chardev);
            match fifo.read() {
                bytes if bytes.is_empty() => return all,
                bytes => all.extend(bytes),
            }
        }
    }

    /// Waits until the guest has `len` bytes of input: a terminal delivers later than it takes.
    fn input(chardev: &mut Chardev, fifo: &Fifo, len: usize) -> Vec<u8> {
        let mut all = Vec::new();
        while all.len() < len {
            let mut fds = [PollFd::new(chardev.fd(), PollFlags::POLLIN)];
            assert_eq!(
                poll(&mut fds, PollTimeout::from(10_000u16)),
                Ok(1),
                "no input"
            );
            all.extend(drain(chardev, fifo));
        }
        all
    }

    fn socket() -> (tempfile::TempDir, std::path::PathBuf, OwnedFd) {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("serial");
        let listener = UnixListener::bind(&path).unwrap();
        (dir, path, listener.into())
    }

    fn read_exactly(stream: &mut UnixStream, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        stream.read_exact(&mut bytes).unwrap();
        bytes
    }

    #[test]
    fn a_connected_socket_carries_both_directions() {
        let (ours, mut theirs) = UnixStream::pair().unwrap();
        let mut chardev = Chardev::connected("c", ours.into()).unwrap();
        assert!(chardev.is_ready());
        let fifo = Fifo::of(64);
        chardev.connect_input(Box::new(fifo.clone()));
        chardev.output().push(b"login: ");
        assert_eq!(read_exactly(&mut theirs, 7), b"login: ");
        theirs.write_all(b"root\n").unwrap();
        settle(&mut chardev);
        assert_eq!(fifo.read(), b"root\n");
    }

    #[test]
    fn input_waits_for_the_guest_without_loss_or_busy_loop() {
        let (ours, mut theirs) = UnixStream::pair().unwrap();
        let mut chardev = Chardev::connected("c", ours.into()).unwrap();
        let fifo = Fifo::of(16);
        chardev.connect_input(Box::new(fifo.clone()));
        let sent: Vec<u8> = (0..3000).map(|i| (i % 251) as u8).collect();
        theirs.write_all(&sent).unwrap();
        settle(&mut chardev);
        assert_eq!(fifo.0.0.lock().unwrap().0.len(), 16, "no more than fits");
        assert_eq!(drain(&mut chardev, &fifo), sent);
    }

    #[test]
    fn without_a_sink_input_is_left_where_it_is() {
        let (ours, mut theirs) = UnixStream::pair().unwrap();
        let mut chardev = Chardev::connected("c", ours.into()).unwrap();
        theirs.write_all(b"early").unwrap();
        settle(&mut chardev);
        let fifo = Fifo::of(64);
        chardev.connect_input(Box::new(fifo.clone()));
        assert_eq!(drain(&mut chardev, &fifo), b"early");
    }

    #[test]
    fn a_reader_that_never_reads_costs_the_oldest_bytes_and_nothing_else() {
        let (ours, mut theirs) = UnixStream::pair().unwrap();
        let mut chardev = Chardev::connected("c", ours.into()).unwrap();
        let mut output = chardev.output();
        let mut written = 0u64;
        // More than any socket buffer and the backlog hold; every line says where it stands.
        for line in 0..200_000u64 {
            let line = format!("{line:09}\n");
            output.push(line.as_bytes());
            written += line.len() as u64;
        }
        settle(&mut chardev);
        let dropped = chardev.dropped();
        assert!(dropped > 0 && dropped < written - MAX_CHARDEV_BACKLOG as u64);
        // Now it reads: everything but what was dropped comes, the newest last.
        let mut got = Vec::new();
        while (got.len() as u64) < written - dropped {
            let mut part = [0; 65536];
            let count = theirs.read(&mut part).unwrap();
            got.extend_from_slice(&part[..count]);
            settle(&mut chardev);
        }
        assert_eq!(got.len() as u64, written - dropped);
        assert!(got.ends_with(b"000199999\n"));
        output.push(b"and on");
        assert_eq!(read_exactly(&mut theirs, 6), b"and on");
    }

    #[test]
    fn one_overlong_piece_keeps_its_end() {
        let (_dir, _path, listener) = socket();
        let chardev = Chardev::listening("c", listener, false).unwrap();
        chardev.output().push(b"first");
        let mut piece = vec![b'a'; MAX_CHARDEV_BACKLOG];
        piece.extend(b"end");
        chardev.output().push(&piece);
        assert_eq!(chardev.dropped(), 8);
    }

    #[test]
    fn clients_of_a_server_come_and_go_one_at_a_time() {
        let (_dir, path, listener) = socket();
        let mut chardev = Chardev::listening("c", listener, true).unwrap();
        let fifo = Fifo::of(64);
        chardev.connect_input(Box::new(fifo.clone()));
        let mut output = chardev.output();
        output.push(b"boot\n");
        settle(&mut chardev);
        assert!(!chardev.is_ready());
        let mut first = UnixStream::connect(&path).unwrap();
        settle(&mut chardev);
        assert!(chardev.is_ready());
        assert_eq!(read_exactly(&mut first, 5), b"boot\n");
        // The second waits, and what it says is not lost.
        let mut second = UnixStream::connect(&path).unwrap();
        second.write_all(b"second").unwrap();
        first.write_all(b"first").unwrap();
        settle(&mut chardev);
        assert_eq!(fifo.read(), b"first");
        output.push(b"1");
        assert_eq!(read_exactly(&mut first, 1), b"1");
        drop(first);
        assert_eq!(drain(&mut chardev, &fifo), b"second");
        output.push(b"2");
        assert_eq!(read_exactly(&mut second, 1), b"2");
        drop(second);
        settle(&mut chardev);
        assert!(chardev.is_ready(), "only the first client is waited for");
        output.push(b"nobody");
        settle(&mut chardev);
        let mut third = UnixStream::connect(&path).unwrap();
        settle(&mut chardev);
        assert_eq!(read_exactly(&mut third, 6), b"nobody");
    }

    #[test]
    fn a_client_that_left_while_the_guest_does_not_read_makes_way() {
        let (_dir, path, listener) = socket();
        let mut chardev = Chardev::listening("c", listener, false).unwrap();
        let fifo = Fifo::of(8);
        chardev.connect_input(Box::new(fifo.clone()));
        let mut first = UnixStream::connect(&path).unwrap();
        settle(&mut chardev);
        first.write_all(b"0123456789abcdef").unwrap();
        settle(&mut chardev);
        drop(first);
        settle(&mut chardev);
        let mut second = UnixStream::connect(&path).unwrap();
        settle(&mut chardev);
        chardev.output().push(b"hello");
        assert_eq!(read_exactly(&mut second, 5), b"hello");
        second.write_all(b"!").unwrap();
        assert_eq!(drain(&mut chardev, &fifo), b"0123456789abcdef!");
        // A client that leaves a lot leaves at most a few kilobytes.
        second.write_all(&[b'x'; 100_000]).unwrap();
        drop(second);
        settle(&mut chardev);
        assert!(chardev.pending.len() < PENDING + CHUNK);
    }

    #[test]
    fn a_client_that_is_gone_is_noticed_by_writing() {
        let (_dir, path, listener) = socket();
        let mut chardev = Chardev::listening("c", listener, false).unwrap();
        let client = UnixStream::connect(&path).unwrap();
        settle(&mut chardev);
        drop(client);
        let mut output = chardev.output();
        output.push(b"kept");
        output.push(b" too");
        let mut next = UnixStream::connect(&path).unwrap();
        settle(&mut chardev);
        assert_eq!(read_exactly(&mut next, 8), b"kept too");
    }

    #[test]
    fn a_pty_keeps_output_for_a_late_reader_and_does_not_echo() {
        let pair = nix::pty::openpty(None, None).unwrap();
        let name = nix::unistd::ttyname(&pair.slave).unwrap();
        drop(pair.slave);
        let mut chardev = Chardev::pty("c", pair.master).unwrap();
        let fifo = Fifo::of(64);
        chardev.connect_input(Box::new(fifo.clone()));
        chardev.output().push(b"early\n");
        settle(&mut chardev);
        assert_eq!(fifo.read(), b"");
        for turn in 0..2 {
            let mut reader = std::fs::File::options()
                .read(true)
                .write(true)
                .open(&name)
                .unwrap();
            let mut text = [0; 6];
            if turn == 1 {
                chardev.output().push(b"later\n");
            }
            reader.read_exact(&mut text).unwrap();
            assert_eq!(&text, if turn == 0 { b"early\n" } else { b"later\n" });
            reader.write_all(b"\x03\r").unwrap();
            assert_eq!(input(&mut chardev, &fifo, 2), b"\x03\r");
            drop(reader);
            settle(&mut chardev);
        }
    }

    #[test]
    fn a_pty_that_nobody_reads_does_not_block() {
        let pair = nix::pty::openpty(None, None).unwrap();
        drop(pair.slave);
        let mut chardev = Chardev::pty("c", pair.master).unwrap();
        for _ in 0..100 {
            chardev.output().push(&[b'x'; 4096]);
        }
        settle(&mut chardev);
        assert!(chardev.dropped() > 0);
    }

    #[test]
    fn a_file_takes_all_output() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("console");
        let file = std::fs::File::create(&path).unwrap();
        let mut chardev = Chardev::file("c", file.into()).unwrap();
        chardev.connect_input(Box::new(Fifo::of(8)));
        for _ in 0..1000 {
            chardev.output().push(&[b'x'; 1000]);
        }
        settle(&mut chardev);
        assert_eq!(
            (std::fs::metadata(&path).unwrap().len(), chardev.dropped()),
            (1_000_000, 0)
        );
    }

    #[test]
    fn input_from_a_regular_file_is_read_to_its_end() {
        let mut file = tempfile::tempfile().unwrap();
        let sent = vec![b'y'; 10_000];
        file.write_all(&sent).unwrap();
        std::io::Seek::rewind(&mut file).unwrap();
        let reader = Descriptor::shared(file.as_fd(), false).unwrap();
        let mut chardev = Chardev::new("c", Some(reader), None).unwrap();
        let fifo = Fifo::of(64);
        chardev.connect_input(Box::new(fifo.clone()));
        assert_eq!(drain(&mut chardev, &fifo), sent);
        assert!(chardev.reader.is_none());
    }

    #[test]
    fn pipes_as_standard_input_and_output_end_without_a_busy_loop() {
        let (stdin, mut typed) = std::io::pipe().unwrap();
        let (mut shown, stdout) = std::io::pipe().unwrap();
        let reader = Descriptor::shared(stdin.as_fd(), false).unwrap();
        let writer = Descriptor::shared(stdout.as_fd(), true).unwrap();
        drop((stdin, stdout));
        let mut chardev = Chardev::new("c", Some(reader), Some(writer)).unwrap();
        let fifo = Fifo::of(8);
        chardev.connect_input(Box::new(fifo.clone()));
        typed.write_all(b"0123456789").unwrap();
        drop(typed);
        assert_eq!(drain(&mut chardev, &fifo), b"0123456789");
        // Input has ended, output has not.
        chardev.output().push(b"still here");
        let mut text = [0; 10];
        shown.read_exact(&mut text).unwrap();
        assert_eq!(&text, b"still here");
        drop(shown);
        chardev.output().push(b"into the void");
        settle(&mut chardev);
        chardev.output().push(b"into the void");
        settle(&mut chardev);
    }
}
