//! The virtio-fs device (virtio 1.3, 5.11).
//!
//! **Job.** Takes requests from the queues, copies their headers once, lets [`Passthrough`] do them and writes the replies.
//! The data of `READ` and `WRITE` goes between the guest's own pages and the file, without a copy.
//! **Who is not trusted.** The guest: lengths in headers are held against the buffers that are really there; replies never
//! get larger than the room for them.
//! **Why this way.** One thread does every request to its end before the next, so there is no order to get wrong and nothing
//! left behind when a queue stops. The high-priority queue is served by the same code: what may wait there is the guest's
//! business. Only the copying of large `READ`s and `WRITE`s may be left to others ([`Movers`]), while this thread goes on with the
//! next request: both name a place in an open file and change no table, so whatever comes in between, and another try after the
//! death of this process, finds them as a disk would have them. What closes a file waits for them. And a request for a lock that somebody else has stays behind: it is tried again whenever others had their turn, since
//! the guest may have given the lock back itself, and every few milliseconds, since the host may have.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::time::{Duration, Instant};

use device_host::{
    Chain, Device, DeviceFault, GuestBuffers, HostFault, Interest, Movers, Moving, Ring, Token,
    Window, WindowError, WindowRange,
};
use ipc::limits::{DAX_UNIT, FS_LOCK_RETRY_MS, FS_POLL_US, MAX_FS_WAITERS};
use nix::errno::Errno;

use crate::fuse::decode::MAX_BODY;
use crate::fuse::decode::{Lock, Ranges};
use crate::fuse::reply::{self, Put};
use crate::fuse::wire::{IN_HEADER, OUT_HEADER, WRITE_IN, WRITE_OUT, opcode};
use crate::fuse::{Body, InHeader, decode};
use crate::passthrough::{Origin, Outcome, Passthrough, Place, is_writable};

/// Bytes of the name that the guest mounts by (virtio 1.3, 5.11.4).
pub const TAG_BYTES: usize = 36;
/// Request queues beside the high-priority one.
pub const REQUEST_QUEUES: u16 = 8;
/// Without a request for so long, a guest counts as being at rest.
const REST: Duration = Duration::from_secs(1);
/// Entries of a queue at most; a `WRITE` of 1 MiB needs 256 and a few.
pub const QUEUE_SIZE: u16 = 1024;

/// Bytes of a `READ` or `WRITE` from which on it may be left to other threads.
const LARGE_READ: usize = 32 << 10;
const LARGE_WRITE: usize = 4 << 10;

/// A shared tree as a device.
#[derive(Debug)]
pub struct FsDevice {
    tree: Passthrough,
    tag: [u8; TAG_BYTES],
    /// Request queues that there are, and those that the driver is told of.
    queues: (u16, u16),
    queue_size: u16,
    /// Readable when the process that waits for this one is gone.
    lifeline: Option<OwnedFd>,
    /// Bytes of the shared memory region that the device has, 0 if none, and the way to it, if the front end has it too.
    window_len: u64,
    window: Option<Arc<Window>>,
    /// What to do after [`REST`] without a request, and whether there were any since the last look, and when it is due.
    rest: Option<fn()>,
    served: bool,
    rest_at: Option<Instant>,
    /// The body of the request at hand.
    body: Vec<u8>,
    /// The body of its reply.
    reply: Vec<u8>,
    /// The request at hand is for a lock that has to be waited for.
    blocked: Option<(InHeader, Lock)>,
    waiters: Vec<Waiter>,
    /// When their locks are asked for again, even if nothing happens.
    retry_at: Option<Instant>,
    /// Threads that copy, if there are any.
    movers: Option<Movers<Moved>>,
    /// The request at hand is left to them.
    moving: Option<(Moving, Reply)>,
}

/// A request whose data other threads move.
#[derive(Debug)]
pub struct Moved {
    queue: u16,
    token: Token,
    reply: Reply,
}

/// The reply that is in the guest's memory already, and is right if all bytes are moved.
#[derive(Debug, Clone, Copy)]
struct Reply {
    unique: u64,
    /// Bytes of the data.
    size: usize,
    write: bool,
}

impl Reply {
    /// Its length, header and body with `result`: bytes of the data.
    fn of(self, result: Result<usize, Errno>) -> (u32, [u8; OUT_HEADER + WRITE_OUT]) {
        let (len, body, error) = match (result, self.write) {
            // At most `size`, which is 32 bits in a request.
            (Ok(count), true) => ((OUT_HEADER + WRITE_OUT) as u32, count as u32, 0),
            (Ok(count), false) => (OUT_HEADER as u32 + count as u32, 0, 0),
            (Err(errno), _) => (OUT_HEADER as u32, 0, errno as i32),
        };
        let mut bytes = [0; OUT_HEADER + WRITE_OUT];
        bytes[..OUT_HEADER].copy_from_slice(&reply::header(len, error, self.unique));
        bytes[OUT_HEADER..OUT_HEADER + 4].copy_from_slice(&body.to_ne_bytes());
        (len, bytes)
    }

    /// Bytes of it in front of the data of a `READ`, or all of them.
    fn fixed(self, result: Result<usize, Errno>) -> usize {
        if self.write && result.is_ok() {
            OUT_HEADER + WRITE_OUT
        } else {
            OUT_HEADER
        }
    }
}

/// A request for a lock that somebody else has.
#[derive(Debug)]
struct Waiter {
    queue: u16,
    token: Token,
    header: InHeader,
    lock: Lock,
    /// The guest does not want to wait any longer.
    interrupted: bool,
}

impl FsDevice {
    /// Shares `tree` as `tag`; `None` if the tag has no bytes or more than [`TAG_BYTES`].
    pub fn new(tree: Passthrough, tag: &str) -> Option<Self> {
        let mut padded = [0; TAG_BYTES];
        padded
            .get_mut(..tag.len())
            .filter(|room| !room.is_empty())?
            .copy_from_slice(tag.as_bytes());
        Some(Self {
            tree,
            tag: padded,
            queues: (REQUEST_QUEUES, 1),
            queue_size: QUEUE_SIZE,
            lifeline: None,
            window_len: 0,
            window: None,
            rest: None,
            served: false,
            rest_at: None,
            body: Vec::new(),
            reply: Vec::new(),
            blocked: None,
            waiters: Vec::new(),
            retry_at: None,
            movers: None,
            moving: None,
        })
    }

    /// Has large reads and writes copied by these threads as well.
    #[must_use]
    pub fn with_movers(self, movers: Option<Movers<Moved>>) -> Self {
        Self { movers, ..self }
    }

    /// Has `request_queues` of `queue_size` entries. Without this there are more than the driver is told of, for front ends that
    /// are set to more.
    #[must_use]
    pub fn with_queues(self, request_queues: u16, queue_size: u16) -> Self {
        Self {
            queues: (request_queues, request_queues),
            queue_size,
            ..self
        }
    }

    /// Has a shared memory region of `len` bytes, in which files can be mapped; a multiple of [`DAX_UNIT`], 0 for none.
    #[must_use]
    pub fn with_window(self, len: u64) -> Self {
        Self {
            window_len: len,
            ..self
        }
    }

    /// Ends serving when `lifeline` becomes readable. The kernel's own way to die with a parent does not survive a change of
    /// the user.
    #[must_use]
    pub fn with_lifeline(self, lifeline: Option<OwnedFd>) -> Self {
        Self { lifeline, ..self }
    }

    /// Calls `rest` whenever there was no request for a second: memory that a guest at rest does not need can be given back.
    #[must_use]
    pub fn with_rest(self, rest: fn()) -> Self {
        Self {
            rest: Some(rest),
            ..self
        }
    }

    /// Does one request; returns the bytes that were written for the guest.
    fn serve(
        &mut self,
        (origin, replayed): (Origin, bool),
        mut readable: GuestBuffers<'_>,
        writable: GuestBuffers<'_>,
    ) -> u32 {
        let mut head = [0; IN_HEADER];
        if readable.read(&mut head) < IN_HEADER {
            ipc::guest_warn!("request without a whole header");
            return 0;
        }
        let header = InHeader::read(&head);
        self.tree.begin(origin, &header, replayed);
        let announced = (header.len as usize).checked_sub(IN_HEADER);
        let Some(len) = announced.filter(|len| *len <= readable.len()) else {
            ipc::guest_warn!("request of {} bytes in smaller buffers", header.len);
            return self.answer(&header, writable, Err(Errno::EIO));
        };
        readable.truncate(len);
        let take = match header.opcode {
            opcode::WRITE => len.min(WRITE_IN),
            _ if len > MAX_BODY => return self.answer(&header, writable, Err(Errno::E2BIG)),
            _ => len,
        };
        let mut body = std::mem::take(&mut self.body);
        body.resize(take, 0);
        readable.read(&mut body);
        let written = self.serve_body(header, &body, readable, writable);
        self.body = body;
        written
    }

    fn serve_body(
        &mut self,
        header: InHeader,
        body: &[u8],
        data: GuestBuffers<'_>,
        writable: GuestBuffers<'_>,
    ) -> u32 {
        self.reply.clear();
        let request = match decode(header, body, self.tree.layout()) {
            Ok(request) => request,
            Err(errno) => return self.answer(&header, writable, Err(errno)),
        };
        match request.body {
            Body::Read { fh, offset, size } => self.read(&header, (fh, offset, size), writable),
            Body::Write {
                fh,
                offset,
                size,
                write_flags,
            } => {
                let request = (fh, offset, size, write_flags);
                match self.write(&header, request, data, &writable) {
                    // The reply is written below; what it tells is decided later.
                    Ok(None) => 0,
                    Ok(Some(written)) => {
                        self.reply.u32(written).u32(0);
                        self.answer(&header, writable, Ok(()))
                    }
                    Err(errno) => self.answer(&header, writable, Err(errno)),
                }
            }
            Body::SetupMapping {
                fh,
                foffset,
                len,
                flags,
                moffset,
            } => {
                let at = WindowRange {
                    offset: moffset,
                    len,
                };
                let result = self.map((header.nodeid, fh), foffset, at, flags);
                self.answer(&header, writable, result)
            }
            Body::RemoveMapping(ranges) => {
                let result = self.unmap(ranges);
                self.answer(&header, writable, result)
            }
            body => {
                self.settle_before(&body);
                // What a session before this one mapped goes with it.
                if matches!(body, Body::Init { .. } | Body::Destroy) {
                    self.unmap_all();
                }
                if let Body::Interrupt { unique } = body {
                    // One that has been answered meanwhile is no news.
                    let waiter = self.waiters.iter_mut().find(|w| w.header.unique == unique);
                    if let Some(waiter) = waiter {
                        waiter.interrupted = true;
                    }
                }
                let room = writable.len().saturating_sub(OUT_HEADER);
                match self.tree.serve(&request, &mut self.reply, room) {
                    Ok(Outcome::Silent) => 0,
                    Ok(Outcome::Reply) => self.answer(&header, writable, Ok(())),
                    Ok(Outcome::Waits) if self.waiters.len() >= MAX_FS_WAITERS => {
                        self.answer(&header, writable, Err(Errno::ENOLCK))
                    }
                    Ok(Outcome::Waits) => {
                        if let Body::SetLk { lock, .. } = body {
                            self.blocked = Some((header, lock));
                        }
                        0
                    }
                    Err(errno) => self.answer(&header, writable, Err(errno)),
                }
            }
        }
    }

    fn read(
        &mut self,
        header: &InHeader,
        (fh, offset, size): (u64, u64, u32),
        mut writable: GuestBuffers<'_>,
    ) -> u32 {
        let Some(head) = writable.reserve::<OUT_HEADER>() else {
            ipc::guest_warn!("READ without room for a reply");
            return 0;
        };
        writable.truncate(size as usize);
        let file = i64::try_from(offset)
            .map_err(|_| Errno::EINVAL)
            .and_then(|offset| Ok((offset, self.tree.readable(fh)?)));
        let result = match file {
            Ok((offset, file)) => {
                if writable.len() >= LARGE_READ
                    && let Some(movers) = &mut self.movers
                    && let Some(moving) = movers.read(file, offset, &writable)
                {
                    let reply = Reply {
                        unique: header.unique,
                        size: writable.len(),
                        write: false,
                    };
                    let (len, bytes) = reply.of(Ok(reply.size));
                    let mut fixed = [0; OUT_HEADER];
                    fixed.copy_from_slice(&bytes[..OUT_HEADER]);
                    head.set(&fixed);
                    self.moving = Some((moving, reply));
                    return len;
                }
                writable.fill_from_file(file, offset)
            }
            Err(errno) => Err(errno),
        };
        let (len, error) = match result {
            // At most `size`.
            Ok(n) => (OUT_HEADER as u32 + n as u32, 0),
            Err(errno) => (OUT_HEADER as u32, errno as i32),
        };
        head.set(&reply::header(len, error, header.unique));
        len
    }

    /// Bytes written; `None` if others do it.
    fn write(
        &mut self,
        header: &InHeader,
        (fh, offset, size, flags): (u64, u64, u32, u32),
        mut data: GuestBuffers<'_>,
        writable: &GuestBuffers<'_>,
    ) -> Result<Option<u32>, Errno> {
        if data.len() < size as usize {
            return Err(Errno::EIO);
        }
        data.truncate(size as usize);
        let (file, place) = self.tree.writable(fh, flags)?;
        let (offset, append) = match place {
            Place::Told => (offset, false),
            Place::End(end) => (end, true),
            Place::PerhapsAt { start, end } => {
                let at = i64::try_from(start).map_err(|_| Errno::EINVAL)?;
                let done = match self.tree.to_compare(file)? {
                    Some(readable) => data.begin_like_file(readable.as_fd(), at)?,
                    None => end.checked_sub(start) == Some(u64::from(size)),
                };
                if done { (start, false) } else { (end, true) }
            }
        };
        let offset = i64::try_from(offset).map_err(|_| Errno::EINVAL)?;
        if place == Place::Told
            && data.len() >= LARGE_WRITE
            && writable.len() >= OUT_HEADER + WRITE_OUT
            && let Some(movers) = &mut self.movers
            && let Some(moving) = movers.write(file, offset, &data)
        {
            let reply = Reply {
                unique: header.unique,
                size: data.len(),
                write: true,
            };
            self.moving = Some((moving, reply));
            return Ok(None);
        }
        let written = data.put_into_file(file, offset, append)?;
        // At most `size`.
        Ok(Some(written as u32))
    }

    /// What closes files that others are at comes after them. Guests wait for the replies before they release a file.
    fn settle_before(&mut self, body: &Body<'_>) {
        let Some(movers) = &mut self.movers else {
            return;
        };
        let closes = match body {
            Body::Release { fh, .. } => self.tree.readable(*fh).is_ok_and(|file| movers.uses(file)),
            Body::Init { .. } | Body::Destroy => movers.in_flight() > 0,
            _ => false,
        };
        if closes {
            movers.settle();
        }
    }

    /// Whether a back end is the event that something was moved.
    fn is_of_movers(&self, index: usize) -> bool {
        index == 0 && self.movers.is_some()
    }

    /// Answers those whose data is where it belongs.
    fn answer_moved(&mut self, rings: &mut [Ring]) -> Result<(), DeviceFault> {
        let Some(movers) = &mut self.movers else {
            return Ok(());
        };
        while let Some((moved, result)) = movers.finished() {
            let Moved {
                queue,
                token,
                reply,
            } = moved;
            let ring = rings.get_mut(usize::from(queue));
            let Some(ring) = ring.filter(|ring| ring.is_running()) else {
                continue;
            };
            let (len, bytes) = reply.of(result);
            if reply.write || result != Ok(reply.size) {
                let mut writable = ring.writable_of(&token)?;
                writable.write(&bytes[..reply.fixed(result)]);
            }
            ring.complete(token, len)?;
            ring.interrupt()?;
        }
        Ok(())
    }

    /// The shared memory region, and whether `at` is a part of it that can be mapped.
    fn window(&self, at: WindowRange) -> Result<&Window, Errno> {
        let window = self.window.as_deref().ok_or(Errno::ENOSYS)?;
        let end = at.offset.checked_add(at.len).ok_or(Errno::EINVAL)?;
        let aligned = at.offset.is_multiple_of(DAX_UNIT) && at.len.is_multiple_of(DAX_UNIT);
        if !aligned || at.len == 0 || end > self.window_len {
            return Err(Errno::EINVAL);
        }
        Ok(window)
    }

    /// Has a part of a file mapped at `at`.
    fn map(
        &mut self,
        (node, fh): (u64, Option<u64>),
        foffset: u64,
        at: WindowRange,
        flags: u64,
    ) -> Result<(), Errno> {
        self.window(at)?;
        let writable = is_writable(flags)?;
        let end = foffset.checked_add(at.len).ok_or(Errno::EINVAL)?;
        if !foffset.is_multiple_of(DAX_UNIT) || i64::try_from(end).is_err() {
            return Err(Errno::EINVAL);
        }
        let window = self.window.clone().ok_or(Errno::ENOSYS)?;
        let file = self.tree.file_to_map(node, fh, writable)?;
        window
            .map(file.as_fd(), foffset, at, writable)
            .map_err(refused)
    }

    /// Has parts of the region unmapped. All of them are tried.
    fn unmap(&self, ranges: Ranges<'_>) -> Result<(), Errno> {
        if !self.tree.has_mappings() {
            return Err(Errno::ENOSYS);
        }
        let mut result = Ok(());
        for (offset, len) in ranges.iter() {
            let at = WindowRange { offset, len };
            let one = self.window(at).and_then(|window| match window.unmap(at) {
                // There was nothing, as when this is done again for a process that died.
                Ok(()) | Err(WindowError::Refused) => Ok(()),
                Err(error) => Err(refused(error)),
            });
            result = result.and(one);
        }
        result
    }

    fn unmap_all(&self) {
        if let Some(window) = &self.window {
            let all = WindowRange {
                offset: 0,
                len: self.window_len,
            };
            match window.unmap(all) {
                // Not every front end unmaps what it was not asked for piece by piece.
                Ok(()) | Err(WindowError::Refused) => {}
                Err(error) => ipc::guest_warn!("mappings of the last session stay: {error}"),
            }
        }
    }

    /// Answers those that wait, as far as `outcome` has an answer for them.
    fn answer_waiters(
        &mut self,
        rings: &mut [Ring],
        outcome: impl Fn(&mut Passthrough, &Waiter) -> Result<bool, Errno>,
    ) -> Result<(), DeviceFault> {
        for waiter in std::mem::take(&mut self.waiters) {
            let result = outcome(&mut self.tree, &waiter);
            if result == Ok(false) {
                self.waiters.push(waiter);
                continue;
            }
            let ring = rings.get_mut(usize::from(waiter.queue));
            let Some(ring) = ring.filter(|ring| !ring.is_broken()) else {
                continue;
            };
            let writable = ring.writable_of(&waiter.token)?;
            self.reply.clear();
            let written = self.answer(&waiter.header, writable, result.map(drop));
            ring.complete(waiter.token, written)?;
            ring.interrupt()?;
        }
        Ok(())
    }

    /// Writes header and body of a reply.
    fn answer(
        &mut self,
        header: &InHeader,
        mut writable: GuestBuffers<'_>,
        result: Result<(), Errno>,
    ) -> u32 {
        if matches!(header.opcode, opcode::FORGET | opcode::BATCH_FORGET) {
            return 0;
        }
        let body: &[u8] = match result {
            Ok(()) => &self.reply,
            Err(_) => &[],
        };
        let mut error = result.err().map_or(0, |errno| errno as i32);
        let mut len = OUT_HEADER + body.len();
        let mut body = body;
        if len > writable.len() {
            if writable.len() < OUT_HEADER {
                ipc::guest_warn!("request {} without room for a reply", header.opcode);
                return 0;
            }
            (body, len, error) = (&[], OUT_HEADER, libc::EIO);
        }
        // Replies have less than the 4 GiB that a chain may have.
        let len = len as u32;
        writable.write(&reply::header(len, error, header.unique));
        writable.write(body);
        len
    }
}

/// What the guest is told when the front end does not do it.
fn refused(error: WindowError) -> Errno {
    ipc::guest_warn!("a mapping cannot be changed: {error}");
    match error {
        // No memory, too many mappings, a file that cannot be mapped: it does not say.
        WindowError::Refused => Errno::ENOMEM,
        WindowError::Channel(_) => Errno::EIO,
    }
}

impl Device for FsDevice {
    fn features(&self) -> u64 {
        // VIRTIO_FS_F_NOTIFICATION is not offered: this daemon has nothing to tell unasked.
        0
    }

    fn num_queues(&self) -> u16 {
        1 + self.queues.0
    }

    fn max_queue_size(&self) -> u16 {
        self.queue_size
    }

    fn accept(&mut self, _features: u64) -> Result<(), HostFault> {
        Ok(())
    }

    /// `struct virtio_fs_config`: the tag and the number of request queues, of which one thread needs only one.
    fn read_config(&self, offset: usize, out: &mut [u8]) {
        let mut space = [0; TAG_BYTES + 4];
        space[..TAG_BYTES].copy_from_slice(&self.tag);
        space[TAG_BYTES..].copy_from_slice(&u32::from(self.queues.1).to_le_bytes());
        device_host::copy_config(&space, offset, out);
    }

    fn process_queue(&mut self, ring: &mut Ring) -> Result<(), DeviceFault> {
        let index = ring.index();
        self.served = true;
        while let Some(chain) = ring.pop()? {
            let Chain {
                token,
                readable,
                writable,
            } = chain;
            let origin = Origin {
                queue: index,
                head: token.head(),
            };
            let written = self.serve((origin, token.is_replayed()), readable, writable);
            if let Some((moving, reply)) = self.moving.take() {
                let moved = Moved {
                    queue: index,
                    token,
                    reply,
                };
                if let Some(movers) = &mut self.movers {
                    movers.remember(moving, moved);
                }
                self.tree.end();
                continue;
            }
            if let Some((header, lock)) = self.blocked.take() {
                self.waiters.push(Waiter {
                    queue: index,
                    token,
                    header,
                    lock,
                    interrupted: false,
                });
                self.tree.end();
                continue;
            }
            ring.complete(token, written)?;
            self.tree.end();
            // A driver that waits wakes up while the next request is done.
            ring.interrupt()?;
        }
        Ok(())
    }

    fn window_len(&self) -> u64 {
        self.window_len
    }

    fn open_window(&mut self, window: Arc<Window>) {
        self.tree.offer_mappings();
        self.window = Some(window);
    }

    fn poll_limit(&self) -> Duration {
        Duration::from_micros(u64::from(FS_POLL_US))
    }

    fn has_finished(&mut self) -> bool {
        self.movers.as_ref().is_some_and(Movers::has_finished)
    }

    fn may_sleep(&mut self) -> bool {
        self.movers.as_ref().is_none_or(Movers::may_sleep)
    }

    fn is_due(&self) -> bool {
        self.movers.as_ref().is_some_and(Movers::has_work)
    }

    fn after_turns(&mut self, rings: &mut [Ring]) -> Result<(), DeviceFault> {
        self.answer_moved(rings)?;
        while self.movers.as_mut().is_some_and(Movers::work) {
            self.answer_moved(rings)?;
            if rings.iter().any(Ring::wants_turn) {
                break;
            }
        }
        if !rings.iter().any(Ring::wants_turn) {
            self.tree.read_on();
        }
        if !self.waiters.is_empty() {
            self.answer_waiters(rings, |tree, waiter| {
                if waiter.interrupted {
                    return Err(Errno::EINTR);
                }
                tree.lock_again(waiter.header.nodeid, &waiter.lock)
            })?;
            let retry = Duration::from_millis(FS_LOCK_RETRY_MS);
            self.retry_at = (!self.waiters.is_empty()).then(|| Instant::now() + retry);
        }
        let Some(rest) = self.rest else {
            return Ok(());
        };
        let now = Instant::now();
        if std::mem::take(&mut self.served) {
            self.rest_at = Some(now + REST);
        } else if self.rest_at.is_some_and(|at| at <= now) {
            self.rest_at = None;
            rest();
        }
        Ok(())
    }

    fn wake_at(&self) -> Option<Instant> {
        self.retry_at.into_iter().chain(self.rest_at).min()
    }

    /// Nobody can wait beyond the end of a queue.
    fn drain(&mut self, rings: &mut [Ring]) -> Result<(), DeviceFault> {
        if let Some(movers) = &mut self.movers {
            movers.settle();
        }
        self.answer_moved(rings)?;
        self.answer_waiters(rings, |_, _| Err(Errno::EAGAIN))
    }

    fn backends(&self) -> Vec<BorrowedFd<'_>> {
        let movers = self.movers.iter().map(AsFd::as_fd);
        movers
            .chain(self.lifeline.iter().map(AsFd::as_fd))
            .collect()
    }

    fn interest(&self, index: usize) -> Interest {
        if self.is_of_movers(index) {
            Interest::EVENT
        } else {
            Interest::READ
        }
    }

    fn backend_ready(
        &mut self,
        index: usize,
        _ready: Interest,
        rings: &mut [Ring],
    ) -> Result<(), DeviceFault> {
        if self.is_of_movers(index) {
            return self.answer_moved(rings);
        }
        Err(HostFault::of("waiting process: it is gone, so this")(Errno::ESRCH).into())
    }

    fn resumed(&mut self, rings: &[Ring]) -> Result<(), HostFault> {
        let in_flight = |origin: Origin| {
            rings
                .get(usize::from(origin.queue))
                .is_some_and(|ring| ring.is_replayed(origin.head))
        };
        self.tree
            .go_on(in_flight)
            .map_err(HostFault::of("taking over what the guest holds"))
    }

    /// A process before this one may have died between changing a table and answering; whether it answered is known once the
    /// queue of that request has been started.
    fn begin(&mut self, rings: &[Ring]) -> Result<bool, HostFault> {
        if !self.tree.is_waiting() {
            return Ok(true);
        }
        if let Some(origin) = self.tree.awaited()
            && rings
                .get(usize::from(origin.queue))
                .is_some_and(|ring| !ring.is_running() && !ring.is_broken())
        {
            return Ok(false);
        }
        self.resumed(rings).map(|()| true)
    }

    fn has_state(&self) -> bool {
        self.tree.can_be_saved()
    }

    fn save_state(&mut self, to: BorrowedFd<'_>) -> Result<(), String> {
        self.tree
            .save_to(to)
            .map_err(|error| ipc::log::with_causes(&error))
    }

    fn load_state(&mut self, from: BorrowedFd<'_>) -> Result<(), String> {
        self.tree
            .load_from(from)
            .map_err(|error| ipc::log::with_causes(&error))
    }

    fn reset(&mut self) {
        if self.tree.is_waiting()
            && let Err(errno) = self.tree.go_on(|_| false)
        {
            // The next process finds the same, and says so.
            ipc::log::error!("taking over what the guest held: {}", errno.desc());
        }
        self.waiters.clear();
        self.retry_at = None;
        self.tree.clear();
    }
}
