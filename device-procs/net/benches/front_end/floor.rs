//! # The floor
//!
//! **Job.** A loop of `write` or `read` on a tap: what the kernel's half of a packet costs. **Who is not trusted.** Nobody.
//! **Why this way.** No process in between, no ring, no wake-up: nobody who uses these calls can be faster.

use std::os::fd::{AsFd, OwnedFd};
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::unistd::{read, write};

use crate::loads::{Load, NET_HEADER};

#[derive(Debug)]
pub(crate) struct Floor {
    taps: Vec<OwnedFd>,
    buffer: Vec<u8>,
}

impl Floor {
    /// Frames have the same header, and may be as large, as those of the card.
    pub(crate) fn new(taps: Vec<OwnedFd>) -> Self {
        use device_host::tap;
        for fd in &taps {
            tap::set_header_len(fd.as_fd(), NET_HEADER as i32).unwrap();
            tap::set_offloads(fd.as_fd(), tap::CSUM | tap::TSO4).unwrap();
            let file = fd.as_fd();
            let flags = nix::fcntl::fcntl(file, nix::fcntl::F_GETFL).unwrap();
            let flags = nix::fcntl::OFlag::from_bits_retain(flags) | nix::fcntl::OFlag::O_NONBLOCK;
            nix::fcntl::fcntl(file, nix::fcntl::F_SETFL(flags)).unwrap();
        }
        Self {
            taps,
            buffer: vec![0; 0x1_2000],
        }
    }

    pub(crate) fn send(&mut self, load: &Load, slice: Duration) -> (usize, Duration) {
        let packets: Vec<Vec<u8>> = (0..self.taps.len())
            .map(|n| load.packet(2 * n + 1))
            .collect();
        let start = Instant::now();
        let mut sent = 0;
        loop {
            // As many from each queue as the card takes from a full one.
            for (tap, packet) in self.taps.iter().zip(&packets) {
                for _ in 0..256 {
                    assert_eq!(write(tap, packet).unwrap(), packet.len());
                    sent += 1;
                }
            }
            let time = start.elapsed();
            if time >= slice {
                return (sent, time);
            }
        }
    }

    /// Takes `frames` frames from each queue.
    pub(crate) fn receive(&mut self, frames: usize) -> Duration {
        let start = Instant::now();
        for tap in &self.taps {
            for _ in 0..frames {
                read(tap, &mut self.buffer).unwrap();
            }
        }
        start.elapsed()
    }

    /// The queue in which a frame waits.
    pub(crate) fn queue_with_frame(&mut self) -> usize {
        let found = self
            .taps
            .iter()
            .position(|tap| read(tap, &mut self.buffer) != Err(Errno::EAGAIN));
        found.expect("the frame is in a queue")
    }
}
