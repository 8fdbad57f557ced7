//! Threads that move file data to and from guest RAM.
//!
//! **Job.** Takes large reads and writes of files that are open, cuts reads into pieces if there are several, and has the pieces done by threads that
//! do nothing else, and by the thread that serves the queues while it has nothing else to do; tells that one what is finished.
//! **Who is not trusted.** The guest decides how much is moved, how often, and that it all happens at once. What moves at a time is
//! bounded by [`SLOTS`], and guest RAM stays mapped until the kernel is done with it, whatever the front end says meanwhile.
//! A mover has a filter of its own with four calls, none of which opens, closes or names anything.
//! **Why this way.** Copying is what a serving process spends its time with once requests are large, and the only thing that several
//! threads are faster at: what a request means, and what the guest holds, stays with one thread that needs no locks. A piece is
//! done by whoever comes first, so a thread that takes long to wake up costs nothing. Threads never end but with their process.

#![allow(unsafe_code)] // preadv, pwritev2 and guest memory from other threads

use std::collections::VecDeque;
use std::ffi::CString;
use std::mem::MaybeUninit;
use std::ops::Range;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, RawFd};
use std::sync::atomic::{AtomicBool, AtomicI64, AtomicU32, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};

use nix::errno::Errno;
use nix::sys::eventfd::{EfdFlags, EventFd};
use thiserror::Error;

use crate::memory::{GuestBuffers, HeldBuffers};

/// Requests at a time.
const SLOTS: usize = 32;
/// Pieces of one request at most.
const PIECES: usize = 8;
/// Bytes of a piece at least: what takes some times as long as finding somebody for it.
const PIECE: usize = 128 << 10;
/// Pieces begin where pages of the file do, if the request does.
const PAGE: usize = 4096;
/// A mover's stack: it calls nothing that needs more than a page or two.
const STACK: usize = 64 << 10;

/// Why there are no movers.
#[derive(Debug, Error)]
pub enum MoversError {
    /// Nothing can tell that something is finished.
    #[error("eventfd of the threads that move data")]
    Event(#[source] Errno),
    /// The host allows no more threads.
    #[error("starting thread {number} of {count} that move data")]
    Thread {
        /// From 1.
        number: usize,
        /// How many there should be.
        count: usize,
        /// What the host said.
        source: Errno,
    },
    /// A thread would run without its filter.
    #[error("a thread that moves data cannot be confined: {0}")]
    Confined(String),
}

/// A request that is being moved.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[must_use]
pub struct Moving(u16);

/// Movers, and requests that they are at; each has a `T` to remember.
#[derive(Debug)]
pub struct Movers<T> {
    shared: Arc<Shared>,
    slots: Vec<Slot<T>>,
    free: Vec<u16>,
    /// Pieces of a read at most: no more than threads that do them, since the kernel copies the faster the more it is asked for at once.
    parts: usize,
}

#[derive(Debug)]
struct Slot<T> {
    then: Option<T>,
    file: RawFd,
    /// Keeps the memory.
    buffers: HeldBuffers,
    /// Its pieces one after the other, none of which is in two pieces of the request.
    segments: Vec<libc::iovec>,
    /// Bytes that each piece has.
    lengths: [usize; PIECES],
    pieces: usize,
}

#[derive(Debug)]
struct Shared {
    queue: Mutex<Queue>,
    /// Movers wait here for pieces.
    more: Condvar,
    /// The serving thread waits here when it can do nothing else.
    less: Condvar,
    /// Of each slot.
    progress: [Progress; SLOTS],
    /// Requests that are finished and that the serving thread has not taken.
    finished: AtomicU32,
    /// The serving thread sleeps until the event is there.
    asleep: AtomicBool,
    event: EventFd,
}

#[derive(Debug, Default)]
struct Queue {
    /// Those that have pieces which nobody has begun, the oldest first.
    requests: VecDeque<Pieces>,
    /// Slots that are finished.
    finished: Vec<u16>,
    /// Movers that wait.
    idle: usize,
    /// The serving thread waits.
    waited_for: bool,
    /// Of each thread, whether it is confined.
    started: Vec<Result<(), String>>,
}

/// Pieces of one request, of which those in `left` are not begun.
#[derive(Debug)]
struct Pieces {
    all: [Piece; PIECES],
    left: Range<usize>,
}

/// Which end of a request somebody begins at. Guests use buffers again and again, so who moves the same part of each has it in its
/// processor's cache.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum End {
    Front,
    Back,
}

impl Queue {
    /// A piece of the oldest request.
    fn take(&mut self, end: End) -> Option<Piece> {
        let request = self.requests.front_mut()?;
        let at = match end {
            End::Front => request.left.next(),
            End::Back => request.left.next_back(),
        };
        let piece = at.and_then(|at| request.all.get(at)).copied();
        if request.left.is_empty() {
            self.requests.pop_front();
        }
        piece
    }

    /// How many there are, as far as it matters to whoever may wake `most` threads.
    fn count(&self, most: usize) -> usize {
        let mut count = 0;
        for request in &self.requests {
            count += request.left.len();
            if count > most {
                break;
            }
        }
        count
    }
}

#[derive(Debug, Default)]
struct Progress {
    /// Pieces that are not done.
    left: AtomicU32,
    /// Bytes, or an error number below zero.
    results: [AtomicI64; PIECES],
}

/// One system call.
#[derive(Debug, Clone, Copy)]
struct Piece {
    segments: *const libc::iovec,
    count: libc::c_int,
    file: RawFd,
    offset: i64,
    write: bool,
    slot: u16,
    number: u8,
}

// SAFETY: the segments are in a slot's vector, and name guest RAM which that slot keeps mapped; neither is touched by the slot's
// owner until all pieces are done.
unsafe impl Send for Piece {}

impl Piece {
    fn call(&self) -> i64 {
        loop {
            // SAFETY: see `Send`; the kernel reads and writes inside of the segments only, and the file is open until the request is
            // finished, by the promise of `Movers`' callers.
            let result = unsafe {
                if self.write {
                    libc::pwritev2(self.file, self.segments, self.count, self.offset, 0)
                } else {
                    libc::preadv(self.file, self.segments, self.count, self.offset)
                }
            };
            match Errno::result(result) {
                Ok(count) => return count as i64,
                Err(Errno::EINTR) => {}
                Err(errno) => return -i64::from(errno as i32),
            }
        }
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, Queue> {
        // A panic ends the process, so nobody sees a poisoned lock.
        self.queue.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Does a piece.
    fn run(&self, piece: &Piece) {
        let result = piece.call();
        let Some(progress) = self.progress.get(usize::from(piece.slot)) else {
            return;
        };
        if let Some(place) = progress.results.get(usize::from(piece.number)) {
            place.store(result, Ordering::Relaxed);
        }
        // Whoever sees 0 sees all results.
        if progress.left.fetch_sub(1, Ordering::AcqRel) != 1 {
            return;
        }
        let mut queue = self.lock();
        queue.finished.push(piece.slot);
        // Not after the lock: who has settled looks at this to know whether there is something, and must see all.
        self.finished.fetch_add(1, Ordering::SeqCst);
        if queue.waited_for {
            self.less.notify_one();
        }
        drop(queue);
        if self.asleep.swap(false, Ordering::SeqCst) {
            // Never full: it is written once for each time that the serving thread went to sleep.
            let _ = self.event.write(1);
        }
    }

    /// Waits until so many threads have said whether they are confined.
    fn wait_for_start(&self, count: usize) -> Result<(), MoversError> {
        let mut queue = self.lock();
        while queue.started.len() < count {
            queue = self
                .less
                .wait(queue)
                .unwrap_or_else(PoisonError::into_inner);
        }
        match queue.started.last() {
            Some(Err(why)) => Err(MoversError::Confined(why.clone())),
            _ => Ok(()),
        }
    }

    fn serve(&self) -> ! {
        loop {
            let mut queue = self.lock();
            let piece = loop {
                if let Some(piece) = queue.take(End::Back) {
                    break piece;
                }
                queue.idle += 1;
                queue = self
                    .more
                    .wait(queue)
                    .unwrap_or_else(PoisonError::into_inner);
                queue.idle -= 1;
            };
            drop(queue);
            self.run(&piece);
        }
    }
}

/// What a thread starts with.
struct Mover {
    shared: Arc<Shared>,
    confine: Box<dyn Fn() -> Result<(), String> + Send>,
    name: CString,
}

/// Starts a thread without what the standard library does for one: a second heap, a stack for signals and a look at the stack's
/// bounds take pages for as long as the process lives, and calls that no filter would allow otherwise.
fn begin_thread(mover: Box<Mover>) -> Result<(), Errno> {
    let result = |code| match code {
        0 => Ok(()),
        code => Err(Errno::from_raw(code)),
    };
    let mut attributes = MaybeUninit::<libc::pthread_attr_t>::uninit();
    let mut thread = MaybeUninit::<libc::pthread_t>::uninit();
    // SAFETY: filled in here, which is what makes them valid.
    result(unsafe { libc::pthread_attr_init(attributes.as_mut_ptr()) })?;
    // SAFETY: initialised above; the size is above the least and a multiple of a page.
    result(unsafe { libc::pthread_attr_setstacksize(attributes.as_mut_ptr(), STACK) })?;
    // SAFETY: initialised above.
    result(unsafe {
        libc::pthread_attr_setdetachstate(attributes.as_mut_ptr(), libc::PTHREAD_CREATE_DETACHED)
    })?;
    let mover = Box::into_raw(mover);
    // SAFETY: `main_of_mover` takes what it is given for itself.
    let created = result(unsafe {
        libc::pthread_create(
            thread.as_mut_ptr(),
            attributes.as_ptr(),
            main_of_mover,
            mover.cast(),
        )
    });
    if created.is_err() {
        // SAFETY: made above, and nobody else has it.
        drop(unsafe { Box::from_raw(mover) });
    }
    created
}

extern "C" fn main_of_mover(mover: *mut libc::c_void) -> *mut libc::c_void {
    // SAFETY: `begin_thread` made it, for this thread alone. It is never given back, as the thread never ends.
    let mover: &'static Mover = unsafe { &*mover.cast::<Mover>() };
    // For process lists only.
    let _ = nix::sys::prctl::set_name(&mover.name);
    let confined = (mover.confine)();
    let mut queue = mover.shared.lock();
    queue.started.push(confined);
    mover.shared.less.notify_one();
    drop(queue);
    mover.shared.serve();
}

impl<T> Movers<T> {
    /// Starts `count` threads, each of which calls `confine` first: they must have no more rights than the one that serves will
    /// have.
    ///
    /// # Errors
    /// [`MoversError`]
    pub fn start(
        count: usize,
        confine: impl Fn() -> Result<(), String> + Send + Clone + 'static,
    ) -> Result<Self, MoversError> {
        let event = EventFd::from_flags(EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK)
            .map_err(MoversError::Event)?;
        let queue = Queue {
            requests: VecDeque::with_capacity(SLOTS),
            finished: Vec::with_capacity(SLOTS),
            // Threads take no memory from the heap, so that there is one heap.
            started: Vec::with_capacity(count),
            ..Queue::default()
        };
        let shared = Arc::new(Shared {
            queue: Mutex::new(queue),
            more: Condvar::new(),
            less: Condvar::new(),
            progress: Default::default(),
            finished: AtomicU32::new(0),
            asleep: AtomicBool::new(false),
            event,
        });
        for number in 1..=count {
            let mover = Box::new(Mover {
                shared: shared.clone(),
                confine: Box::new(confine.clone()),
                name: CString::new(format!("mover{number}")).unwrap_or_default(),
            });
            begin_thread(mover).map_err(|source| MoversError::Thread {
                number,
                count,
                source,
            })?;
            shared.wait_for_start(number)?;
        }
        Ok(Self {
            shared,
            slots: (0..SLOTS)
                .map(|_| Slot {
                    then: None,
                    file: -1,
                    buffers: HeldBuffers::default(),
                    segments: Vec::new(),
                    lengths: [0; PIECES],
                    pieces: 0,
                })
                .collect(),
            // Below 2^16.
            free: (0..SLOTS as u16).rev().collect(),
            parts: (count + 1).min(PIECES),
        })
    }

    /// Whether one more request can be moved now.
    #[must_use]
    pub fn has_room(&self) -> bool {
        !self.free.is_empty()
    }

    /// Fills `buffers` from `file`, in pieces if others are being moved already. One that is alone stays whole, and is left to this
    /// thread: until another one is awake, and has told that it is done, most of it is moved. `file` must stay open until the request is [finished](Self::finished) or
    /// [`uses`](Self::uses) says otherwise. `None` if there is no [room](Self::has_room).
    pub fn read(
        &mut self,
        file: BorrowedFd<'_>,
        offset: i64,
        buffers: &GuestBuffers<'_>,
    ) -> Option<Moving> {
        let piece = if self.in_flight() == 0 {
            usize::MAX
        } else {
            let part = buffers.len().div_ceil(self.parts);
            part.next_multiple_of(PAGE).max(PIECE)
        };
        self.begin(file, offset, buffers, piece, false)
    }

    /// As [`read`](Self::read), writes `buffers`. A file system has one write to a file at a time, so this is one piece.
    pub fn write(
        &mut self,
        file: BorrowedFd<'_>,
        offset: i64,
        buffers: &GuestBuffers<'_>,
    ) -> Option<Moving> {
        self.begin(file, offset, buffers, usize::MAX, true)
    }

    fn begin(
        &mut self,
        file: BorrowedFd<'_>,
        offset: i64,
        buffers: &GuestBuffers<'_>,
        piece_bytes: usize,
        write: bool,
    ) -> Option<Moving> {
        let number = self.free.pop()?;
        let slot = self.slots.get_mut(usize::from(number))?;
        let progress = self.shared.progress.get(usize::from(number))?;
        slot.file = file.as_raw_fd();
        slot.buffers.hold(buffers);
        slot.segments.clear();
        slot.lengths = [0; PIECES];
        // Ends of the pieces in the list.
        let mut ends = [0; PIECES];
        let mut at = 0;
        for segment in slot.buffers.pieces() {
            let mut segment = *segment;
            while segment.iov_len > 0 {
                let room = piece_bytes - slot.lengths[at];
                if room == 0 {
                    // `PIECES` of them hold all.
                    at += 1;
                    continue;
                }
                let len = segment.iov_len.min(room);
                slot.segments.push(libc::iovec {
                    iov_base: segment.iov_base,
                    iov_len: len,
                });
                slot.lengths[at] += len;
                ends[at] = slot.segments.len();
                // Inside of the segment, or its end.
                segment.iov_base = segment.iov_base.cast::<u8>().wrapping_add(len).cast();
                segment.iov_len -= len;
            }
        }
        slot.pieces = at + 1;
        // Not shared with anyone until the pieces are queued.
        progress.left.store(slot.pieces as u32, Ordering::Relaxed);
        let nothing = Piece {
            segments: std::ptr::null(),
            count: 0,
            file: slot.file,
            offset,
            write,
            slot: number,
            number: 0,
        };
        let mut pieces = [nothing; PIECES];
        let (mut first, mut offset) = (0, offset);
        for (at, (piece, end)) in pieces.iter_mut().zip(ends).take(slot.pieces).enumerate() {
            piece.segments = slot.segments.as_ptr().wrapping_add(first);
            // At most MAX_CHAIN_SEGMENTS.
            piece.count = (end - first) as libc::c_int;
            piece.offset = offset;
            // Below `PIECES`.
            piece.number = at as u8;
            first = end;
            // At most 4 GiB in all; an end beyond what a file can have is refused by the kernel.
            offset = offset.saturating_add(slot.lengths[at] as i64);
        }
        let mut queue = self.shared.lock();
        queue.requests.push_back(Pieces {
            all: pieces,
            left: 0..slot.pieces,
        });
        // One is for this thread.
        let wanted = queue.count(queue.idle).saturating_sub(1).min(queue.idle);
        drop(queue);
        for _ in 0..wanted {
            self.shared.more.notify_one();
        }
        Some(Moving(number))
    }

    /// What to give back when a request is finished. To be called before [`finished`](Self::finished) is.
    pub fn remember(&mut self, moving: Moving, then: T) {
        if let Some(slot) = self.slots.get_mut(usize::from(moving.0)) {
            slot.then = Some(then);
        }
    }

    /// Does one piece itself; `false` if there is none.
    pub fn work(&mut self) -> bool {
        let piece = self.shared.lock().take(End::Front);
        if let Some(piece) = &piece {
            self.shared.run(piece);
        }
        piece.is_some()
    }

    /// Whether there are pieces that nobody has begun.
    #[must_use]
    pub fn has_work(&self) -> bool {
        self.in_flight() > 0 && !self.shared.lock().requests.is_empty()
    }

    /// Requests that were begun and not taken by [`finished`](Self::finished).
    #[must_use]
    pub fn in_flight(&self) -> usize {
        self.slots.len() - self.free.len()
    }

    /// Whether [`finished`](Self::finished) has something.
    #[must_use]
    pub fn has_finished(&self) -> bool {
        self.shared.finished.load(Ordering::SeqCst) > 0
    }

    /// A request that is finished: bytes from its start without a gap, or an error if there is not one byte.
    pub fn finished(&mut self) -> Option<(T, Result<usize, Errno>)> {
        if !self.has_finished() {
            return None;
        }
        let number = self.shared.lock().finished.pop()?;
        self.shared.finished.fetch_sub(1, Ordering::SeqCst);
        let slot = self.slots.get_mut(usize::from(number))?;
        let progress = self.shared.progress.get(usize::from(number))?;
        // Pairs with the last piece's.
        let _ = progress.left.load(Ordering::Acquire);
        let mut done = 0;
        let mut error = None;
        for (result, want) in progress.results.iter().zip(slot.lengths).take(slot.pieces) {
            match usize::try_from(result.load(Ordering::Relaxed)) {
                Ok(count) => {
                    done += count;
                    if count < want {
                        break;
                    }
                }
                Err(_) => {
                    // An error number, so it is small.
                    let code = -result.load(Ordering::Relaxed) as i32;
                    error = Some(Errno::from_raw(code));
                    break;
                }
            }
        }
        slot.buffers.release();
        slot.file = -1;
        self.free.push(number);
        let result = match error {
            Some(errno) if done == 0 => Err(errno),
            _ => Ok(done),
        };
        Some((slot.then.take()?, result))
    }

    /// Whether a request that is not finished uses this descriptor.
    #[must_use]
    pub fn uses(&self, file: BorrowedFd<'_>) -> bool {
        self.in_flight() > 0 && self.slots.iter().any(|slot| slot.file == file.as_raw_fd())
    }

    /// Does pieces, and waits for those that others do, until nothing is left to be done.
    pub fn settle(&mut self) {
        while self.work() {}
        let mut queue = self.shared.lock();
        queue.waited_for = true;
        while queue.finished.len() < self.in_flight() {
            queue = self
                .shared
                .less
                .wait(queue)
                .unwrap_or_else(PoisonError::into_inner);
        }
        queue.waited_for = false;
    }

    /// The serving thread is about to sleep: the event tells it from here on. `false` if it must not, since something is finished.
    #[must_use]
    pub fn may_sleep(&self) -> bool {
        if self.in_flight() == 0 {
            return true;
        }
        self.shared.asleep.store(true, Ordering::SeqCst);
        if self.has_finished() {
            self.shared.asleep.store(false, Ordering::SeqCst);
            return false;
        }
        true
    }
}

impl<T> AsFd for Movers<T> {
    /// Told once when something is finished after [`may_sleep`](Self::may_sleep); never to be read.
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.shared.event.as_fd()
    }
}

impl<T> Drop for Movers<T> {
    fn drop(&mut self) {
        // The kernel must not write to memory that is about to go away.
        self.settle();
    }
}

#[cfg(test)]
mod tests {
    use std::fs::File;
    use std::rc::Rc;

    use nix::sys::memfd::{MFdFlags, memfd_create};
    use vm_memory::{Bytes, GuestAddress};

    use super::*;
    use crate::memory::{GuestRam, Region, SegmentList};

    const RAM: u64 = 4 << 20;

    fn file(bytes: &[u8]) -> File {
        let file = File::from(memfd_create(c"file", MFdFlags::MFD_CLOEXEC).unwrap());
        nix::sys::uio::pwrite(&file, bytes, 0).unwrap();
        file
    }

    fn ram() -> Rc<GuestRam> {
        let file = File::from(memfd_create(c"ram", MFdFlags::MFD_CLOEXEC).unwrap());
        file.set_len(RAM).unwrap();
        let region = Region::new(0, RAM, 0, &file, 0).unwrap();
        Rc::new(GuestRam::new(vec![region]).unwrap())
    }

    fn bytes(len: usize) -> Vec<u8> {
        (0..len)
            .map(|n| (n % 251) as u8 ^ (n >> 12) as u8)
            .collect()
    }

    fn movers(count: usize) -> Movers<u32> {
        Movers::start(count, || Ok(())).unwrap()
    }

    /// All that is begun, in the order of what was remembered.
    fn finish(movers: &mut Movers<u32>) -> Vec<(u32, Result<usize, Errno>)> {
        movers.settle();
        let mut all: Vec<_> = std::iter::from_fn(|| movers.finished()).collect();
        all.sort_by_key(|(then, _)| *then);
        all
    }

    #[test]
    fn pieces_end_up_where_they_belong_whoever_moves_them() {
        let (ram, len) = (ram(), 1 << 20);
        let data = bytes(len);
        let source = file(&data);
        for count in [1, 3] {
            let mut movers = movers(count);
            for round in 0..20u32 {
                let zeros = vec![0; 2 * len];
                ram.map().write_slice(&zeros, GuestAddress(0)).unwrap();
                // One that stays whole, and one in pieces.
                for start in [0, len as u64] {
                    let mut list = SegmentList::default();
                    // Lengths that no piece is a multiple of.
                    for (at, len) in [(0, 100_000), (100_000, len as u32 - 100_000)] {
                        let at = GuestAddress(start + at);
                        ram.resolve(at, len, &mut list).unwrap();
                    }
                    let moving = movers.read(source.as_fd(), 0, &list.buffers(&ram)).unwrap();
                    movers.remember(moving, 2 * round + u32::from(start > 0));
                }
                assert!(movers.uses(source.as_fd()));
                let both = [(2 * round, Ok(len)), (2 * round + 1, Ok(len))];
                assert_eq!(finish(&mut movers), both);
                assert!(!movers.uses(source.as_fd()));
                for start in [0, len as u64] {
                    let mut found = vec![0; len];
                    ram.map()
                        .read_slice(&mut found, GuestAddress(start))
                        .unwrap();
                    assert!(found == data, "{start} in round {round} with {count}");
                }
            }
        }
    }

    #[test]
    fn a_file_that_ends_early_ends_a_read_in_pieces_as_well() {
        let ram = ram();
        let len = 5 * PIECE / 2;
        let source = file(&bytes(len));
        let folder = File::open("/").unwrap();
        let mut movers = movers(2);
        // The first one stays whole.
        let all = [(&source, 1 << 30), (&source, 0), (&folder, 0)];
        for (then, (file, offset)) in (1..).zip(all) {
            let mut list = SegmentList::default();
            ram.resolve(GuestAddress(0), 1 << 20, &mut list).unwrap();
            let moving = movers
                .read(file.as_fd(), offset, &list.buffers(&ram))
                .unwrap();
            movers.remember(moving, then);
        }
        let found = finish(&mut movers);
        assert_eq!(found, [(1, Ok(0)), (2, Ok(len)), (3, Err(Errno::EISDIR))]);
    }

    #[test]
    fn a_read_has_no_more_pieces_than_there_are_threads_for_it() {
        let ram = ram();
        let source = file(&bytes(1 << 20));
        let cases = [
            (1, 1 << 20, 2),
            (3, 1 << 20, 4),
            (20, 1 << 20, PIECES),
            (3, 200 << 10, 2),
            (1, 64 << 10, 1),
        ];
        for (count, len, pieces) in cases {
            let mut movers = movers(count);
            let mut last = 0;
            // The first one is alone and stays whole.
            for then in [0, 1] {
                let mut list = SegmentList::default();
                ram.resolve(GuestAddress(0), len, &mut list).unwrap();
                let moving = movers.read(source.as_fd(), 0, &list.buffers(&ram)).unwrap();
                last = usize::from(moving.0);
                movers.remember(moving, then);
            }
            assert_eq!(movers.slots[last].pieces, pieces, "{len} with {count}");
            let size = len as usize;
            assert_eq!(finish(&mut movers), [(0, Ok(size)), (1, Ok(size))]);
        }
    }

    #[test]
    fn as_many_as_there_are_slots_are_written_at_once_and_no_more() {
        let ram = ram();
        let data = bytes(SLOTS * 0x1000);
        ram.map().write_slice(&data, GuestAddress(0)).unwrap();
        let target = file(b"");
        let mut movers = movers(2);
        for slot in 0..SLOTS as u64 {
            assert!(movers.has_room());
            let mut list = SegmentList::default();
            ram.resolve(GuestAddress(slot * 0x1000), 0x1000, &mut list)
                .unwrap();
            let at = (slot * 0x1000).cast_signed();
            let moving = movers
                .write(target.as_fd(), at, &list.buffers(&ram))
                .unwrap();
            movers.remember(moving, slot as u32);
        }
        let mut list = SegmentList::default();
        ram.resolve(GuestAddress(0), 1, &mut list).unwrap();
        assert!(!movers.has_room());
        let more = movers.write(target.as_fd(), 0, &list.buffers(&ram));
        assert_eq!(more, None);
        let done = finish(&mut movers);
        assert_eq!(done.len(), SLOTS);
        assert!(done.iter().all(|(_, result)| *result == Ok(0x1000)));
        let mut found = vec![0; data.len()];
        nix::sys::uio::pread(&target, &mut found, 0).unwrap();
        assert!(found == data);
        assert_eq!((movers.in_flight(), movers.has_work()), (0, false));
    }

    #[test]
    fn whoever_sleeps_is_woken_when_something_is_finished() {
        use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
        let ram = ram();
        let source = file(&bytes(1 << 20));
        let mut movers = movers(1);
        assert!(movers.may_sleep(), "nothing is begun");
        for round in 0..200 {
            for then in [0, 1] {
                let mut list = SegmentList::default();
                ram.resolve(GuestAddress(0), 1 << 20, &mut list).unwrap();
                let moving = movers.read(source.as_fd(), 0, &list.buffers(&ram)).unwrap();
                movers.remember(moving, then);
            }
            // The other thread does all or a part of it.
            if round % 2 == 0 {
                while movers.work() {}
            }
            let mut done = Vec::new();
            while done.len() < 2 {
                if movers.may_sleep() {
                    let mut fds = [PollFd::new(movers.as_fd(), PollFlags::POLLIN)];
                    let most = PollTimeout::from(60_000u16);
                    assert_eq!(poll(&mut fds, most), Ok(1), "round {round}");
                    movers.shared.event.read().unwrap();
                }
                // Nothing, if whoever was slow to tell of the first one has told now.
                done.extend(movers.finished());
            }
            done.sort_by_key(|(then, _)| *then);
            assert_eq!(done, [(0, Ok(1 << 20)), (1, Ok(1 << 20))]);
        }
    }

    #[test]
    fn a_thread_that_cannot_be_confined_is_told() {
        let refused = Movers::<()>::start(1, || Err("no filter".to_owned()));
        assert!(matches!(refused, Err(MoversError::Confined(why)) if why == "no filter"));
    }
}
