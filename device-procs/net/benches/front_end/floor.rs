//! # The floor
//!
//! **Job.** A loop of `write` or `read` on a tap: what the kernel's half of a packet costs. Its frames lie as the card's do: as many of
//! them, as far apart, in as many pieces, taken one after the other; a loop over one buffer that never leaves the cache would be a
//! floor for nobody. **Who is not trusted.** Nobody.
//! **Why this way.** No process in between, no ring, no wake-up: nobody who uses these calls can be faster. The loop has a thread of its own,
//! and whoever made the frames stays awake meanwhile, so that frames come from another processor's cache, as they do for a card.
//! It can have a filter, as every process that a guest reaches has: what the kernel takes for that is nothing that a card can save.

use std::io::{IoSlice, IoSliceMut};
use std::os::fd::{AsFd, OwnedFd};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::sys::uio::{readv, writev};
use nix::time::{ClockId, clock_gettime};
use nix::unistd::{read, write};

use crate::card::{HEADERS_FIRST, LARGE, LARGE_FRAME, PAGE, SIZE, SMALL_FRAME};
use crate::loads::{Load, NET_HEADER};

/// Pieces of the largest frame: its headers, then pages.
const PIECES: usize = 18;

/// `return SECCOMP_RET_ALLOW`: whatever a filter says of a call without arguments that matter, the kernel has it in a bitmap, so that all
/// filters that allow `read` cost the same.
const ALLOW: seccompiler::sock_filter = seccompiler::sock_filter {
    code: (libc::BPF_RET | libc::BPF_K) as u16,
    jt: 0,
    jf: 0,
    k: libc::SECCOMP_RET_ALLOW,
};

/// Does `work` in another thread while this one keeps its processor; how much of its own the other one used.
fn elsewhere<T: Send>(filtered: bool, work: impl FnOnce() -> T + Send) -> (T, Duration) {
    let used = || Duration::from(clock_gettime(ClockId::CLOCK_THREAD_CPUTIME_ID).unwrap());
    let done = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let other = scope.spawn(|| {
            if filtered {
                seccompiler::apply_filter(&[ALLOW]).unwrap();
            }
            let before = used();
            let result = work();
            let time = used() - before;
            done.store(true, Ordering::Release);
            (result, time)
        });
        while !done.load(Ordering::Acquire) && !other.is_finished() {
            std::hint::spin_loop();
        }
        other.join().unwrap()
    })
}

#[derive(Debug)]
pub(crate) struct Floor {
    /// The loop is behind a filter, as the card's process is.
    filtered: bool,
    taps: Vec<OwnedFd>,
    /// What was prepared for the load that is sent.
    sent: Option<Load>,
    /// A queue's frames after the other's.
    frames: Vec<u8>,
    /// Where each tap's frames are put; the next place.
    places: Vec<(Vec<u8>, usize)>,
}

impl Floor {
    /// Frames have the same header, and may be as large, as those of the card.
    pub(crate) fn new(taps: Vec<OwnedFd>, filtered: bool) -> Self {
        use device_host::tap;
        for fd in &taps {
            tap::set_header_len(fd.as_fd(), NET_HEADER as i32).unwrap();
            tap::set_offloads(fd.as_fd(), tap::CSUM | tap::TSO4).unwrap();
            let file = fd.as_fd();
            let flags = nix::fcntl::fcntl(file, nix::fcntl::F_GETFL).unwrap();
            let flags = nix::fcntl::OFlag::from_bits_retain(flags) | nix::fcntl::OFlag::O_NONBLOCK;
            nix::fcntl::fcntl(file, nix::fcntl::F_SETFL(flags)).unwrap();
        }
        let place = || (vec![0; usize::from(SIZE) * SMALL_FRAME], 0);
        Self {
            filtered,
            sent: None,
            frames: Vec::new(),
            places: taps.iter().map(|_| place()).collect(),
            taps,
        }
    }

    /// Frames of a queue, and bytes from one to the next.
    fn layout(load: &Load) -> (usize, usize) {
        if load.segmented() {
            (usize::from(LARGE), LARGE_FRAME)
        } else {
            (usize::from(SIZE), SMALL_FRAME)
        }
    }

    fn prepare(&mut self, load: &Load) {
        if self.sent.replace(*load) == Some(*load) {
            return;
        }
        let (count, apart) = Self::layout(load);
        self.frames = vec![0; self.taps.len() * count * apart];
        for (at, frame) in self.frames.chunks_exact_mut(apart).enumerate() {
            let packet = load.packet(2 * (at / count) + 1);
            frame[..packet.len()].copy_from_slice(&packet);
        }
    }

    /// Frames, the time that they took, and the processor time.
    pub(crate) fn send(&mut self, load: &Load, slice: Duration) -> (usize, Duration, Duration) {
        self.prepare(load);
        let ((sent, time), used) = elsewhere(self.filtered, || self.write(load, slice));
        (sent, time, used)
    }

    fn write(&self, load: &Load, slice: Duration) -> (usize, Duration) {
        let (count, apart) = Self::layout(load);
        let len = NET_HEADER + load.size;
        let start = Instant::now();
        let mut sent = 0;
        loop {
            // As many from each queue as the card takes from a full one.
            for (tap, frames) in self
                .taps
                .iter()
                .zip(self.frames.chunks_exact(count * apart))
            {
                for frame in frames.chunks_exact(apart) {
                    let done = if load.segmented() {
                        let (first, rest) = frame[..len].split_at(HEADERS_FIRST);
                        let mut pages = std::iter::once(first).chain(rest.chunks(PAGE));
                        let mut pieces = 0;
                        let all: [IoSlice<'_>; PIECES] = std::array::from_fn(|_| {
                            let piece = pages.next();
                            pieces += usize::from(piece.is_some());
                            IoSlice::new(piece.unwrap_or(&[]))
                        });
                        writev(tap, &all[..pieces])
                    } else {
                        write(tap, &frame[..len])
                    };
                    assert_eq!(done.unwrap(), len);
                    sent += 1;
                }
            }
            let time = start.elapsed();
            if time >= slice {
                return (sent, time);
            }
        }
    }

    /// Takes `frames` frames from each queue; the time, and the processor time.
    pub(crate) fn receive(&mut self, load: &Load, frames: usize) -> (Duration, Duration) {
        elsewhere(self.filtered, || self.read(load, frames))
    }

    fn read(&mut self, load: &Load, frames: usize) -> Duration {
        let (size, count) = (load.buffer(), load.buffers());
        let start = Instant::now();
        for (tap, (memory, next)) in self.taps.iter().zip(&mut self.places) {
            for _ in 0..frames {
                if *next + count > usize::from(SIZE) {
                    *next = 0;
                }
                let place = &mut memory[*next * SMALL_FRAME..];
                if count == 1 {
                    read(tap, &mut place[..size]).unwrap();
                } else {
                    let mut buffers = place.chunks_exact_mut(SMALL_FRAME);
                    let mut all: [IoSliceMut<'_>; PIECES] = std::array::from_fn(|_| {
                        IoSliceMut::new(match buffers.next() {
                            Some(buffer) => &mut buffer[..size],
                            None => &mut [],
                        })
                    });
                    readv(tap, &mut all[..count]).unwrap();
                }
                *next += count;
            }
        }
        start.elapsed()
    }

    /// The queue in which a frame waits.
    pub(crate) fn queue_with_frame(&mut self) -> usize {
        let (buffer, _) = &mut self.places[0];
        let found = self
            .taps
            .iter()
            .position(|tap| read(tap, buffer) != Err(Errno::EAGAIN));
        found.expect("the frame is in a queue")
    }
}
