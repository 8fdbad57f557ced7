//! The vhost-user socket of one device process: requests out, replies in, never later than a deadline.
//!
//! **Job.** Frames vhost-user messages (vhost-user protocol, "Message Specification"), sends any number of them before it
//! waits for the first reply, and pairs replies with requests.
//!
//! **Who is not trusted**: the device process. A reply that does not come, comes in drips, is for another request, has
//! another size than its kind, or brings a descriptor that nobody asked for is an error; after one the link is of no
//! further use and its owner drops it. Nothing is allocated by a size that the peer names.
//!
//! **Why this way.** Message layouts come from the `vhost` crate, but not its `Frontend`: that one treats the `EAGAIN` of a
//! receive timeout as "try again", so a back end that never answers would make it spin for ever. It also waits for each
//! reply before the next request, which costs two context switches a message; a queue takes seven messages, and
//! start-up time is counted in fractions of a millisecond.

use std::collections::VecDeque;
use std::io::IoSlice;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use ipc::limits::{DEVICE_REPLY_MS, DEVICE_START_MS};
use ipc::rights;
use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, ppoll};
use nix::sys::socket::{ControlMessage, MsgFlags, sendmsg};
use thiserror::Error;
use vhost::vhost_user::message::{
    FrontendReq, MAX_MSG_SIZE, VhostUserConfig, VhostUserHeaderFlag, VhostUserInflight,
    VhostUserShMemConfig,
};

/// Bytes of a message header: request, flags, size; 32 bits each, little-endian on every machine we run on.
pub(crate) const HEADER: usize = 12;
/// Requests that wait for their reply at most. More would fill the socket buffers of both directions one day, with both
/// sides waiting for the other to read.
const WINDOW: usize = 64;

/// Why a device process could not be talked to.
#[derive(Debug, Error)]
pub enum LinkError {
    /// The process closed its end or died.
    #[error("device process closed its vhost-user socket")]
    Closed,
    /// No answer in time.
    #[error(
        "device process did not answer {} within {limit} ms",
        .request.map_or_else(|| "a message".to_owned(), |request| format!("{request:?}"))
    )]
    Timeout {
        /// What it was asked.
        request: Option<FrontendReq>,
        /// Milliseconds that it had.
        limit: u64,
    },
    /// A socket call failed.
    #[error("{call} on a vhost-user socket failed")]
    Socket {
        /// The system call.
        call: &'static str,
        /// What the kernel said.
        source: Errno,
    },
    /// The bytes that came are no answer to what was asked.
    #[error("device process gave a malformed answer to {request:?}: {what}")]
    Malformed {
        /// What it was asked.
        request: FrontendReq,
        /// What is wrong.
        what: &'static str,
    },
    /// The process understood and said no.
    #[error("device process refused {request:?}")]
    Refused {
        /// What it was asked.
        request: FrontendReq,
    },
}

impl LinkError {
    /// Whether requests and replies still pair up after this error.
    pub(crate) const fn is_refusal(&self) -> bool {
        matches!(self, Self::Refused { .. })
    }
}

/// One end of a vhost-user conversation.
#[derive(Debug)]
pub(crate) struct Link {
    socket: UnixStream,
    /// Encoded requests that wait for company: one `sendmsg` takes them all.
    outbox: Vec<u8>,
    /// Received bytes that are not yet a whole reply.
    inbox: Vec<u8>,
    /// Descriptors that came and nobody has taken yet.
    received: Vec<OwnedFd>,
    /// Requests whose reply has not been read, oldest first.
    pending: VecDeque<FrontendReq>,
    /// Replies with a value, in the order of their requests.
    values: Vec<Vec<u8>>,
    /// The first refusal since the last [`Link::finish`].
    refused: Option<FrontendReq>,
    /// Whether the peer acknowledges requests that have no reply of their own (`REPLY_ACK`).
    acks: bool,
    /// Bytes that the reply to a memory table has; 0 where it has none.
    table: usize,
    /// When patience ends.
    deadline: Instant,
    /// What it was set to, in milliseconds.
    limit: u64,
}

impl Link {
    pub(crate) fn new(socket: UnixStream) -> Self {
        Self {
            socket,
            outbox: Vec::new(),
            inbox: Vec::new(),
            received: Vec::new(),
            pending: VecDeque::new(),
            values: Vec::new(),
            refused: None,
            acks: false,
            table: 0,
            deadline: Instant::now(),
            limit: 0,
        }
    }

    /// Gives the peer [`DEVICE_REPLY_MS`] from now for everything up to the next call of this.
    pub(crate) fn start_clock(&mut self) {
        self.set_clock(DEVICE_REPLY_MS);
    }

    /// The same for a process that has just been started: [`DEVICE_START_MS`].
    pub(crate) fn start_first_clock(&mut self) {
        self.set_clock(DEVICE_START_MS);
    }

    fn set_clock(&mut self, limit: u64) {
        self.deadline = Instant::now() + Duration::from_millis(limit);
        self.limit = limit;
    }

    /// The same for what takes a peer longer, which has `limit` milliseconds and was begun before.
    pub(crate) fn set_deadline(&mut self, deadline: Instant, limit: u64) {
        self.deadline = deadline;
        self.limit = limit;
    }

    /// From now on the peer acknowledges every request.
    pub(crate) fn enable_acks(&mut self) {
        self.acks = true;
    }

    /// From now on a memory table is answered by one of this many bytes.
    pub(crate) fn expect_table(&mut self, bytes: usize) {
        self.table = bytes;
    }

    /// Queues a message that nobody answers.
    pub(crate) fn tell(&mut self, request: FrontendReq, body: &[u8]) {
        for word in [request as u32, 1, body.len() as u32] {
            self.outbox.extend_from_slice(&word.to_le_bytes());
        }
        self.outbox.extend_from_slice(body);
    }

    /// Bytes that the reply to `request` has at least and, but for `GET_CONFIG`, at most; `None` if it has no reply of its own.
    fn reply_size(&self, request: FrontendReq) -> Option<usize> {
        match request {
            FrontendReq::SET_MEM_TABLE if self.table > 0 => Some(self.table),
            other => reply_size(other),
        }
    }

    /// Queues or sends one request; its reply is read by [`Link::finish`].
    pub(crate) fn post(
        &mut self,
        request: FrontendReq,
        body: &[&[u8]],
        fds: &[BorrowedFd<'_>],
    ) -> Result<(), LinkError> {
        if self.pending.len() >= WINDOW {
            self.flush()?;
            while !self.pending.is_empty() {
                self.read_reply()?;
            }
        }
        let size: usize = body.iter().map(|part| part.len()).sum();
        debug_assert!(size <= MAX_MSG_SIZE);
        let replies = self.reply_size(request).is_some();
        let mut flags = 1; // protocol version
        if self.acks && !replies {
            flags |= VhostUserHeaderFlag::NEED_REPLY.bits();
        }
        // Descriptors ride on the first byte of their `sendmsg`, and must be on the first byte of their message.
        if !fds.is_empty() {
            self.flush()?;
        }
        for word in [request as u32, flags, size as u32] {
            self.outbox.extend_from_slice(&word.to_le_bytes());
        }
        for part in body {
            self.outbox.extend_from_slice(part);
        }
        if !fds.is_empty() {
            let bytes = std::mem::take(&mut self.outbox);
            self.send(&bytes, fds)?;
        }
        if replies || self.acks {
            self.pending.push_back(request);
        }
        Ok(())
    }

    /// Sends what is queued.
    pub(crate) fn flush(&mut self) -> Result<(), LinkError> {
        let bytes = std::mem::take(&mut self.outbox);
        self.send(&bytes, &[])
    }

    /// Sends what is queued and reads all replies that are due. Gives the values that they brought, in order.
    pub(crate) fn finish(&mut self) -> Result<Vec<Vec<u8>>, LinkError> {
        self.flush()?;
        while !self.pending.is_empty() {
            self.read_reply()?;
        }
        let values = std::mem::take(&mut self.values);
        match self.refused.take() {
            Some(request) => Err(LinkError::Refused { request }),
            None => Ok(values),
        }
    }

    /// As [`Link::finish`], but without waiting for the peer: `None` while replies are missing and patience lasts.
    pub(crate) fn try_finish(&mut self) -> Result<Option<Vec<Vec<u8>>>, LinkError> {
        // What this process sends fits the socket's buffer, so this waits for nobody but a peer that reads nothing.
        self.flush()?;
        let deadline = std::mem::replace(&mut self.deadline, Instant::now());
        let result = self.finish();
        self.deadline = deadline;
        match result {
            // Nothing is lost: what has come of a reply stays in the inbox.
            Err(LinkError::Timeout { .. }) if Instant::now() < deadline => Ok(None),
            other => other.map(Some),
        }
    }

    /// When patience ends.
    pub(crate) const fn deadline(&self) -> Instant {
        self.deadline
    }

    /// The only descriptor that came with the replies of the last [`Link::finish`].
    pub(crate) fn take_fd(&mut self) -> Option<OwnedFd> {
        let fd = self.received.pop();
        self.received.clear();
        fd
    }

    fn send(&mut self, mut bytes: &[u8], fds: &[BorrowedFd<'_>]) -> Result<(), LinkError> {
        let raw: Vec<RawFd> = fds.iter().map(AsRawFd::as_raw_fd).collect();
        let rights = [ControlMessage::ScmRights(&raw)];
        let mut control: &[ControlMessage<'_>] = if raw.is_empty() { &[] } else { &rights };
        while !bytes.is_empty() {
            match sendmsg::<()>(
                self.socket.as_raw_fd(),
                &[IoSlice::new(bytes)],
                control,
                MsgFlags::MSG_NOSIGNAL | MsgFlags::MSG_DONTWAIT,
                None,
            ) {
                Ok(sent) => {
                    bytes = &bytes[sent..];
                    control = &[];
                }
                Err(Errno::EINTR) => {}
                Err(Errno::EAGAIN) => self.wait(PollFlags::POLLOUT)?,
                Err(Errno::EPIPE | Errno::ECONNRESET) => return Err(LinkError::Closed),
                Err(source) => {
                    return Err(LinkError::Socket {
                        call: "sendmsg",
                        source,
                    });
                }
            }
        }
        Ok(())
    }

    /// Reads the reply of the oldest pending request.
    fn read_reply(&mut self) -> Result<(), LinkError> {
        let Some(&request) = self.pending.front() else {
            return Ok(());
        };
        let malformed = |what| LinkError::Malformed { request, what };
        self.fill(HEADER)?;
        let word = |at: usize| {
            let mut bytes = [0; 4];
            bytes.copy_from_slice(&self.inbox[at..at + 4]);
            u32::from_le_bytes(bytes)
        };
        let (code, flags, size) = (word(0), word(4), word(8) as usize);
        if code != request as u32 {
            return Err(malformed("it is for another request"));
        }
        if flags & !VhostUserHeaderFlag::NEED_REPLY.bits() != 1 | VhostUserHeaderFlag::REPLY.bits()
        {
            return Err(malformed("it has flags that no reply has"));
        }
        if size > MAX_MSG_SIZE {
            return Err(malformed("it is larger than any message"));
        }
        self.fill(HEADER + size)?;
        let body = self.inbox[HEADER..HEADER + size].to_vec();
        self.inbox.drain(..HEADER + size);
        let brings = matches!(
            request,
            FrontendReq::GET_INFLIGHT_FD | FrontendReq::POSTCOPY_ADVISE
        );
        if !brings && !self.received.is_empty() {
            return Err(malformed("it brings descriptors"));
        }
        match self.reply_size(request) {
            None => {
                let Ok(value) = <[u8; 8]>::try_from(body.as_slice()) else {
                    return Err(malformed("an acknowledgement has 8 bytes"));
                };
                if u64::from_le_bytes(value) != 0 {
                    self.refused.get_or_insert(request);
                }
            }
            Some(least) if body.len() < least => return Err(malformed("it is too short")),
            Some(least) if body.len() > least && request != FrontendReq::GET_CONFIG => {
                return Err(malformed("it is too long"));
            }
            Some(_) => self.values.push(body),
        }
        self.pending.pop_front();
        Ok(())
    }

    /// Has at least `len` bytes in the inbox on return.
    fn fill(&mut self, len: usize) -> Result<(), LinkError> {
        let mut buffer = [0u8; HEADER + MAX_MSG_SIZE];
        while self.inbox.len() < len {
            let got = match rights::receive(&self.socket, &mut buffer, MsgFlags::MSG_DONTWAIT) {
                Ok(received) => received,
                Err(Errno::EINTR) => continue,
                Err(Errno::EAGAIN) => {
                    self.wait(PollFlags::POLLIN)?;
                    continue;
                }
                Err(Errno::ECONNRESET) => return Err(LinkError::Closed),
                Err(source) => {
                    return Err(LinkError::Socket {
                        call: "recvmsg",
                        source,
                    });
                }
            };
            if got.len == 0 {
                return Err(LinkError::Closed);
            }
            self.received.extend(got.fds);
            if self.received.len() > 1 {
                return Err(match self.pending.front() {
                    Some(&request) => LinkError::Malformed {
                        request,
                        what: "it brings several descriptors",
                    },
                    None => LinkError::Closed,
                });
            }
            if got.cut {
                return Err(LinkError::Socket {
                    call: "recvmsg",
                    source: Errno::ENOBUFS,
                });
            }
            self.inbox.extend_from_slice(&buffer[..got.len]);
        }
        Ok(())
    }

    /// Waits until the socket is ready or patience ends.
    fn wait(&self, events: PollFlags) -> Result<(), LinkError> {
        loop {
            let left = self.deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Err(LinkError::Timeout {
                    request: self.pending.front().copied(),
                    limit: self.limit,
                });
            }
            // Not poll, which a stop signal makes go on as restart_syscall, one more call for the filters to allow.
            let timeout = Some(left.into());
            match ppoll(
                &mut [PollFd::new(self.socket.as_fd(), events)],
                timeout,
                None,
            ) {
                Ok(0) | Err(Errno::EINTR) => {}
                Ok(_) => return Ok(()),
                Err(source) => {
                    return Err(LinkError::Socket {
                        call: "ppoll",
                        source,
                    });
                }
            }
        }
    }
}

impl AsFd for Link {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

/// As the specification has it.
const fn reply_size(request: FrontendReq) -> Option<usize> {
    match request {
        FrontendReq::GET_FEATURES
        | FrontendReq::GET_PROTOCOL_FEATURES
        | FrontendReq::GET_QUEUE_NUM
        | FrontendReq::SET_DEVICE_STATE_FD
        | FrontendReq::CHECK_DEVICE_STATE
        | FrontendReq::GET_VRING_BASE => Some(8),
        FrontendReq::POSTCOPY_ADVISE => Some(0),
        FrontendReq::GET_CONFIG => Some(size_of::<VhostUserConfig>()),
        FrontendReq::GET_SHMEM_CONFIG => Some(size_of::<VhostUserShMemConfig>()),
        FrontendReq::GET_INFLIGHT_FD => Some(size_of::<VhostUserInflight>()),
        _ => None,
    }
}
