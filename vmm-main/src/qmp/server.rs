//! The thread that serves the sockets.

use std::collections::HashMap;
use std::error::Error as StdError;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::sync::Arc;
use std::sync::mpsc::{Receiver, SyncSender, TryRecvError, TrySendError, channel, sync_channel};
use std::time::{Duration, Instant};

use ipc::limits::{
    MAX_QMP_BACKLOG, MAX_QMP_CLIENTS, MAX_QMP_REQUEST, QMP_FLUSH_MS, QMP_PAUSE_BACKLOG,
};
use ipc::rights;
use nix::errno::Errno;
use nix::fcntl::{FcntlArg, OFlag, fcntl};
use nix::sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags, EpollTimeout};
use nix::sys::eventfd::{EfdFlags, EventFd};
use nix::sys::socket::{MsgFlags, SockFlag, accept4, send};
use thiserror::Error;

use super::command::{Inbox, Outbox, QmpError, VmCommand, answer, wake};
use super::descriptors::Descriptors;
use super::event::Event;
use super::pace::Pace;
use super::session::{Info, Session, Step, greeting};

/// Bytes read from a client at once.
const CHUNK: usize = 16 * 1024;
/// Mark of the inbox in epoll. Sources follow it.
const INBOX: u64 = 0;
/// Mark of the first client in epoll; beyond any source's.
const FIRST_CLIENT: u64 = 1 << 32;

/// A socket to serve.
#[derive(Debug)]
pub enum Source {
    /// A listening unix or TCP socket.
    Listener {
        /// The socket.
        fd: OwnedFd,
        /// [`ServerHandle::wait_for_clients`] waits for its first client.
        wait: bool,
    },
    /// One client.
    Connected(OwnedFd),
}

/// Why there is no server.
#[derive(Debug, Error)]
pub enum ServerError {
    /// A system call failed.
    #[error("QMP server: {call} failed")]
    System {
        /// The call.
        call: &'static str,
        /// What the kernel said.
        source: Errno,
    },
    /// There is no thread.
    #[error("QMP server: the thread cannot be started")]
    Thread(#[source] std::io::Error),
    /// What the thread was to do first did not work.
    #[error("QMP server: the thread cannot be locked down")]
    Start(#[source] Box<dyn StdError + Send + Sync>),
    /// The thread is gone.
    #[error("QMP server: the thread has ended")]
    Gone,
}

/// What a thread does first: its lock-down.
pub type StartHook = Box<dyn FnOnce() -> Result<(), Box<dyn StdError + Send + Sync>> + Send>;

/// The server; see [`Server::spawn`].
#[derive(Debug)]
pub struct Server(());

/// Main's end: events out, end of the server.
#[derive(Debug)]
pub struct ServerHandle {
    outbox: Option<Outbox>,
    started: Receiver<Result<(), Box<dyn StdError + Send + Sync>>>,
    waited: Receiver<()>,
    done: Receiver<()>,
}

/// Commands for main. Its descriptor is readable when there is one.
#[derive(Debug)]
pub struct Commands {
    queue: Receiver<VmCommand>,
    wake: Arc<EventFd>,
}

impl AsFd for Commands {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.wake.as_fd()
    }
}

impl Commands {
    /// The next command. Call it until there is none, each time the descriptor is readable.
    pub fn next(&self) -> Option<VmCommand> {
        self.queue.try_recv().ok().or_else(|| {
            // Cleared first, looked again then: a command that comes in between wakes again.
            clear(&self.wake);
            self.queue.try_recv().ok()
        })
    }
}

impl Server {
    /// Starts the thread `qmp`, which runs `on_start` before it looks at anything that a client sent, and then serves
    /// `sources`. Without sources there is no thread, and nothing ever comes out of [`Commands`].
    ///
    /// Everything that has to be made is made here; the thread opens nothing.
    ///
    /// # Errors
    /// The host lacks descriptors or threads.
    pub fn spawn(
        sources: Vec<Source>,
        info: Info,
        on_start: StartHook,
    ) -> Result<(ServerHandle, Commands), ServerError> {
        let failed = |call| move |source| ServerError::System { call, source };
        let event = || EventFd::from_flags(EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK);
        let capacity = (sources.len() * MAX_QMP_CLIENTS).max(1);
        let (command_sender, queue) = sync_channel(capacity);
        let command_wake = Arc::new(event().map_err(failed("eventfd"))?);
        let commands = Commands {
            queue,
            wake: Arc::clone(&command_wake),
        };
        let (started_sender, started) = channel();
        let (waited_sender, waited) = channel();
        let (done_sender, done) = channel();
        if sources.is_empty() {
            return Ok((
                ServerHandle {
                    outbox: None,
                    started,
                    waited,
                    done,
                },
                commands,
            ));
        }
        let (sender, inbox) = channel();
        let outbox = Outbox {
            sender,
            wake: Arc::new(event().map_err(failed("eventfd"))?),
        };
        let epoll = Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC).map_err(failed("epoll_create1"))?;
        let inbox_event = EpollEvent::new(EpollFlags::EPOLLIN, INBOX);
        epoll
            .add(outbox.wake.as_fd(), inbox_event)
            .map_err(failed("epoll_ctl"))?;
        let mut listeners = Vec::new();
        let mut connected = Vec::new();
        for source in sources {
            match source {
                Source::Listener { fd, wait } => {
                    let flags = fcntl(&fd, FcntlArg::F_GETFL).map_err(failed("fcntl"))?;
                    let flags = OFlag::from_bits_truncate(flags) | OFlag::O_NONBLOCK;
                    fcntl(&fd, FcntlArg::F_SETFL(flags)).map_err(failed("fcntl"))?;
                    let mark = INBOX + 1 + listeners.len() as u64;
                    epoll
                        .add(&fd, EpollEvent::new(EpollFlags::EPOLLIN, mark))
                        .map_err(failed("epoll_ctl"))?;
                    listeners.push(Listener {
                        fd,
                        wait,
                        clients: 0,
                        paused: false,
                    });
                }
                Source::Connected(fd) => connected.push(fd),
            }
        }
        let mut work = Worker {
            epoll,
            listeners,
            clients: HashMap::new(),
            descriptors: Descriptors::default(),
            lent: Vec::new(),
            next_client: FIRST_CLIENT,
            info: Arc::new(info),
            inbox,
            outbox: outbox.clone(),
            commands: command_sender,
            command_wake,
            waited: Some(waited_sender),
        };
        let body = move || {
            let result = on_start();
            let go = result.is_ok();
            let _ = started_sender.send(result);
            if go {
                for fd in connected {
                    work.add_client(fd, None);
                }
                work.run();
            }
            drop(work);
            let _ = done_sender.send(());
            // A thread's end takes calls that its filter would have to allow for nothing but that.
            loop {
                std::thread::park();
            }
        };
        std::thread::Builder::new()
            .name("qmp".into())
            .spawn(body)
            .map_err(ServerError::Thread)?;
        Ok((
            ServerHandle {
                outbox: Some(outbox),
                started,
                waited,
                done,
            },
            commands,
        ))
    }
}

impl ServerHandle {
    /// Waits until the thread has done its `on_start`. Once.
    ///
    /// # Errors
    /// What `on_start` gave.
    pub fn started(&self) -> Result<(), ServerError> {
        if self.outbox.is_none() {
            return Ok(());
        }
        self.started
            .recv()
            .map_err(|_| ServerError::Gone)?
            .map_err(ServerError::Start)
    }

    /// Waits until every listener that is to be waited for has had a client.
    ///
    /// # Errors
    /// The thread has ended.
    pub fn wait_for_clients(&self) -> Result<(), ServerError> {
        if self.outbox.is_none() {
            return Ok(());
        }
        self.waited.recv().map_err(|_| ServerError::Gone)
    }

    /// Tells every client that has negotiated. Events and answers arrive in the order in which main sends them.
    pub fn emit(&self, event: &Event) {
        if let Some(outbox) = &self.outbox {
            outbox.send(Inbox::Event(event.message().to_string()));
        }
    }

    /// Sends what is waiting, as far as clients take it within [`QMP_FLUSH_MS`], and ends the server.
    pub fn finish(mut self) {
        self.end();
    }

    fn end(&mut self) {
        if let Some(outbox) = self.outbox.take() {
            outbox.send(Inbox::Finish);
            // A descriptor that a client has passed may keep whoever closes it. That is the thread, which the end of the process
            // ends then.
            let patience = Duration::from_millis(2 * QMP_FLUSH_MS);
            if self.done.recv_timeout(patience).is_err() {
                log::warn!("QMP is held up; its clients may not be told of the end");
            }
        }
    }
}

impl Drop for ServerHandle {
    fn drop(&mut self) {
        self.end();
    }
}

/// Makes an eventfd unreadable.
fn clear(eventfd: &EventFd) {
    let mut count = [0; 8];
    let _ = nix::unistd::read(eventfd.as_fd(), &mut count);
}

#[derive(Debug)]
struct Listener {
    fd: OwnedFd,
    /// It is still waited for.
    wait: bool,
    clients: usize,
    /// Not in epoll, until a client leaves: the host lacks something that accepting needs.
    paused: bool,
}

#[derive(Debug)]
struct Client {
    fd: OwnedFd,
    /// Which listener it came from.
    listener: Option<usize>,
    session: Session,
    /// Lines for it, of which `sent` bytes are gone.
    out: Vec<u8>,
    sent: usize,
    /// Main executes its command.
    busy: bool,
    pace: Pace,
    /// Until then it waits, because it is too fast.
    held: Option<Instant>,
    /// Nothing more comes from it.
    eof: bool,
    /// It takes nothing any more. What it has sent still counts: it may have been told to start something and leave.
    deaf: bool,
    /// It is not there any more; its commands are still executed.
    gone: bool,
    /// To be closed now.
    closed: bool,
    /// What epoll watches.
    interest: EpollFlags,
}

struct Worker {
    epoll: Epoll,
    listeners: Vec<Listener>,
    clients: HashMap<u64, Client>,
    descriptors: Descriptors,
    /// Those that went with commands to main and the broker, which have a copy each: whoever closes the last one may have to wait for
    /// as long as its maker wants (`SO_LINGER`), and that is to be this thread. With the client whose command is not answered yet.
    lent: Vec<(Option<u64>, Arc<OwnedFd>)>,
    next_client: u64,
    info: Arc<Info>,
    inbox: Receiver<Inbox>,
    outbox: Outbox,
    commands: SyncSender<VmCommand>,
    command_wake: Arc<EventFd>,
    waited: Option<std::sync::mpsc::Sender<()>>,
}

impl Worker {
    fn run(&mut self) {
        self.check_waited();
        let mut events = [EpollEvent::empty(); 16];
        loop {
            let held = self.clients.values().filter_map(|client| client.held).min();
            let timeout = held.map_or(EpollTimeout::NONE, |until| {
                let left = until.saturating_duration_since(Instant::now());
                // Rounded up: waking too early would only lead back here.
                EpollTimeout::try_from(left + Duration::from_millis(1))
                    .unwrap_or(EpollTimeout::ZERO)
            });
            let count = match self.epoll.wait(&mut events, timeout) {
                Ok(count) => count,
                Err(Errno::EINTR) => continue,
                Err(errno) => {
                    log::error!("QMP ends: epoll_wait failed: {errno}");
                    return;
                }
            };
            for event in &events[..count] {
                match event.data() {
                    INBOX => {
                        if self.take_inbox() {
                            self.flush_all();
                            return;
                        }
                    }
                    mark if mark < FIRST_CLIENT => {
                        self.accept(usize::try_from(mark - INBOX - 1).unwrap_or(usize::MAX));
                    }
                    id => self.client_event(id, event.events()),
                }
            }
            if held.is_some() {
                self.go_on_with_held();
            }
        }
    }

    /// Goes on with clients that have waited long enough.
    fn go_on_with_held(&mut self) {
        let now = Instant::now();
        let ids: Vec<u64> = self
            .clients
            .iter()
            .filter(|(_, client)| client.held.is_some_and(|until| until <= now))
            .map(|(id, _)| *id)
            .collect();
        for id in ids {
            self.service(id);
        }
    }

    /// Answers and events, in their order. Whether that was the end.
    fn take_inbox(&mut self) -> bool {
        clear(&self.outbox.wake);
        loop {
            match self.inbox.try_recv() {
                Ok(Inbox::Answer {
                    client: id,
                    message,
                }) => {
                    if let Some(client) = self.clients.get_mut(&id) {
                        client.busy = false;
                        client.push(&message);
                        client.flush();
                    }
                    self.take_back(id);
                    self.service(id);
                }
                Ok(Inbox::Event(message)) => {
                    let ids: Vec<u64> = self.clients.keys().copied().collect();
                    for id in ids {
                        if let Some(client) = self.clients.get_mut(&id)
                            && client.session.negotiated()
                        {
                            client.push(&message);
                            self.service(id);
                        }
                    }
                }
                Ok(Inbox::Finish) => return true,
                // This thread has a sender itself, so it cannot be disconnected.
                Err(TryRecvError::Empty | TryRecvError::Disconnected) => return false,
            }
        }
    }

    /// The command of client `answered` has an answer, so the broker has no copy that it does not need. One that main still has is
    /// closed after the next answer.
    fn take_back(&mut self, answered: u64) {
        self.lent.retain_mut(|(client, fd)| {
            if *client == Some(answered) {
                *client = None;
            }
            client.is_some() || Arc::strong_count(fd) > 1
        });
    }

    /// Takes what listens for new clients.
    fn accept(&mut self, at: usize) {
        loop {
            let Some(listener) = self.listeners.get_mut(at) else {
                return;
            };
            let fd = match accept(&listener.fd) {
                Ok(fd) => fd,
                Err(Errno::EAGAIN) => return,
                // That client is gone again.
                Err(Errno::EINTR | Errno::ECONNABORTED) => continue,
                Err(errno) => {
                    log::warn!("QMP takes no clients until one leaves: accept4 failed: {errno}");
                    let _ = self.epoll.delete(&listener.fd);
                    listener.paused = true;
                    return;
                }
            };
            if listener.clients == MAX_QMP_CLIENTS {
                let error =
                    QmpError::generic(format!("Too many clients; allowed: {MAX_QMP_CLIENTS}"));
                let mut line = answer(None, &Err(error));
                line.push_str("\r\n");
                let _ = send(
                    fd.as_raw_fd(),
                    line.as_bytes(),
                    MsgFlags::MSG_DONTWAIT | MsgFlags::MSG_NOSIGNAL,
                );
                continue;
            }
            listener.clients += 1;
            listener.wait = false;
            self.add_client(fd, Some(at));
            self.check_waited();
        }
    }

    fn check_waited(&mut self) {
        if self.listeners.iter().all(|listener| !listener.wait)
            && let Some(waited) = self.waited.take()
        {
            let _ = waited.send(());
        }
    }

    fn add_client(&mut self, fd: OwnedFd, listener: Option<usize>) {
        let id = self.next_client;
        self.next_client += 1;
        let interest = EpollFlags::EPOLLIN;
        let added = self.epoll.add(&fd, EpollEvent::new(interest, id));
        let mut client = Client {
            fd,
            listener,
            session: Session::default(),
            out: Vec::new(),
            sent: 0,
            busy: false,
            pace: Pace::new(Instant::now()),
            held: None,
            eof: false,
            deaf: false,
            gone: false,
            closed: false,
            interest,
        };
        if let Err(errno) = added {
            log::warn!("a QMP client is turned away: epoll_ctl failed: {errno}");
            client.closed = true;
        }
        client.push(&greeting());
        self.clients.insert(id, client);
        self.service(id);
    }

    fn client_event(&mut self, id: u64, events: EpollFlags) {
        let Some(client) = self.clients.get_mut(&id) else {
            return;
        };
        if events.intersects(EpollFlags::EPOLLHUP | EpollFlags::EPOLLERR) {
            client.drain();
            client.gone = true;
            client.eof = true;
            client.stop_sending();
            let _ = self.epoll.delete(&client.fd);
        } else if events.contains(EpollFlags::EPOLLIN) {
            client.read();
        }
        self.service(id);
    }

    /// Goes on with a client as far as it goes now, and closes it if that was all.
    fn service(&mut self, id: u64) {
        let Some(client) = self.clients.get_mut(&id) else {
            return;
        };
        client.flush();
        while !client.busy && !client.closed && client.backlog() < QMP_PAUSE_BACKLOG {
            let now = Instant::now();
            if client.held.is_some_and(|until| now < until) {
                break;
            }
            let step = client.session.step(&self.info, id, &mut self.descriptors);
            client.held = step.as_ref().and_then(|_| client.pace.take(now).err());
            match step {
                None => {
                    // All that has come is done with, and nothing more will.
                    client.closed |= client.eof && client.backlog() == 0;
                    break;
                }
                Some(Step::Answer(message)) => client.push(&message),
                Some(Step::HangUp(message)) => {
                    client.push(&message);
                    client.flush();
                    client.closed = true;
                }
                Some(Step::Forward(forward)) => {
                    client.busy = true;
                    let brings = forward.brings().into_iter();
                    self.lent.extend(brings.map(|fd| (Some(id), fd)));
                    let command = forward.build(id, &self.info, &self.outbox);
                    match self.commands.try_send(command) {
                        Ok(()) => wake(&self.command_wake),
                        // The reply that is dropped with it answers.
                        Err(TrySendError::Full(_) | TrySendError::Disconnected(_)) => {}
                    }
                }
            }
            client.flush();
        }
        if client.closed {
            self.close(id);
        } else if !client.gone {
            let mut wanted = EpollFlags::empty();
            let takes_input = !client.busy
                && !client.eof
                && client.held.is_none()
                && client.backlog() < QMP_PAUSE_BACKLOG;
            wanted.set(EpollFlags::EPOLLIN, takes_input);
            wanted.set(EpollFlags::EPOLLOUT, client.backlog() > 0);
            if wanted != client.interest {
                client.interest = wanted;
                let mut event = EpollEvent::new(wanted, id);
                if let Err(errno) = self.epoll.modify(&client.fd, &mut event) {
                    log::warn!("a QMP client is dropped: epoll_ctl failed: {errno}");
                    self.close(id);
                }
            }
        }
    }

    fn close(&mut self, id: u64) {
        let Some(client) = self.clients.remove(&id) else {
            return;
        };
        if let Some(listener) = client.listener.and_then(|at| self.listeners.get_mut(at)) {
            listener.clients -= 1;
        }
        // Closing takes it out of epoll. What it had in use may be what a listener waits for.
        drop(client);
        self.descriptors.forget(id);
        for (at, listener) in self
            .listeners
            .iter_mut()
            .enumerate()
            .filter(|(_, one)| one.paused)
        {
            let event = EpollEvent::new(EpollFlags::EPOLLIN, INBOX + 1 + at as u64);
            listener.paused = self.epoll.add(&listener.fd, event).is_err();
        }
    }

    /// The end: gives clients that are slow a moment.
    fn flush_all(&mut self) {
        let deadline = Instant::now() + Duration::from_millis(QMP_FLUSH_MS);
        let mut events = [EpollEvent::empty(); 16];
        for client in self.clients.values_mut() {
            client.flush();
        }
        // Nobody is listened to any more: only room to write is of interest.
        self.clients.retain(|_, client| client.backlog() > 0);
        let _ = self.epoll.delete(self.outbox.wake.as_fd());
        for listener in &self.listeners {
            let _ = self.epoll.delete(&listener.fd);
        }
        for (id, client) in &self.clients {
            let mut event = EpollEvent::new(EpollFlags::EPOLLOUT, *id);
            let _ = self.epoll.modify(&client.fd, &mut event);
        }
        while !self.clients.is_empty() {
            let left = deadline.saturating_duration_since(Instant::now());
            let Ok(timeout) = EpollTimeout::try_from(left) else {
                return;
            };
            match self.epoll.wait(&mut events, timeout) {
                Ok(0) => return,
                Ok(count) => {
                    for event in &events[..count] {
                        let id = event.data();
                        let Some(client) = self.clients.get_mut(&id) else {
                            continue;
                        };
                        client.flush();
                        if client.backlog() == 0 {
                            self.clients.remove(&id);
                        }
                    }
                }
                Err(Errno::EINTR) => {}
                Err(_) => return,
            }
        }
    }
}

impl Client {
    /// Bytes that wait for it.
    fn backlog(&self) -> usize {
        self.out.len() - self.sent
    }

    /// Adds one line for it, or drops it if too much is waiting.
    fn push(&mut self, line: &str) {
        if self.deaf || self.closed {
            return;
        }
        self.out.drain(..self.sent);
        self.sent = 0;
        if self.out.len() + line.len() > MAX_QMP_BACKLOG {
            log::warn!("a QMP client that does not read is dropped");
            self.closed = true;
            return;
        }
        self.out.extend_from_slice(line.as_bytes());
        self.out.extend_from_slice(b"\r\n");
    }

    /// Sends what the socket takes now.
    fn flush(&mut self) {
        while self.backlog() > 0 && !self.closed {
            let flags = MsgFlags::MSG_DONTWAIT | MsgFlags::MSG_NOSIGNAL;
            match send(self.fd.as_raw_fd(), &self.out[self.sent..], flags) {
                Ok(count) => self.sent += count,
                Err(Errno::EINTR) => {}
                Err(Errno::EAGAIN) => return,
                Err(_) => self.stop_sending(),
            }
        }
        if self.backlog() == 0 {
            self.out.clear();
            self.sent = 0;
        }
    }

    fn stop_sending(&mut self) {
        self.deaf = true;
        self.out = Vec::new();
        self.sent = 0;
    }

    /// Takes one chunk. Whether there may be more.
    fn read(&mut self) -> bool {
        let mut chunk = [0; CHUNK];
        match rights::receive(&self.fd, &mut chunk, MsgFlags::MSG_DONTWAIT) {
            Ok(got) if got.len == 0 => self.eof = true,
            Ok(got) => {
                // A command uses one; the others are closed, as QEMU does.
                self.session
                    .push(&chunk[..got.len], got.fds.into_iter().next());
                return true;
            }
            Err(Errno::EINTR) => return true,
            Err(Errno::EAGAIN) => {}
            Err(_) => self.eof = true,
        }
        false
    }

    /// Takes what is left in the socket of a client that has hung up, as far as one request may be long.
    fn drain(&mut self) {
        for _ in 0..MAX_QMP_REQUEST / CHUNK {
            if !self.read() {
                break;
            }
        }
    }
}

/// A client of `listener`.
#[allow(unsafe_code)] // the kernel hands the descriptor over as a number
fn accept(listener: &OwnedFd) -> Result<OwnedFd, Errno> {
    let fd = accept4(listener.as_raw_fd(), SockFlag::SOCK_CLOEXEC)?;
    // SAFETY: accept4 has just made this descriptor, and nobody else knows its number.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}
