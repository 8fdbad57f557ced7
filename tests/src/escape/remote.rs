//! # Calls of a thread that was taken over
//!
//! **Job.** [`Machine`] for a live thread of the product: a tracer stops it and makes its calls, behind its own filter.
//! **Who is not trusted.** The thread. **Why this way.** No probe can stand in for the control process: what a hijacked thread of
//! it can do is what this one can, with the descriptors, the filter and the Landlock domain that it has.

use super::{Machine, Stop};
use crate::trace::Tracee;

/// Bytes that attempts may put into the thread's memory.
const ROOM: u64 = 256 * 1024;
/// The instruction `int $0x80`.
const GATE: [u8; 2] = [0xcd, 0x80];

/// A thread.
#[derive(Debug)]
pub struct Remote {
    tracee: Tracee,
    /// Memory of its own that nothing else uses.
    from: u64,
    used: u64,
}

impl Remote {
    /// Takes thread `tid` over, with its filter in force.
    ///
    /// # Errors
    /// It may not be traced, or has ended, or has not even memory to give.
    pub fn take(tid: i32) -> std::io::Result<Self> {
        let mut tracee = Tracee::stop_behind_filter(tid)?;
        let protection = (libc::PROT_READ | libc::PROT_WRITE) as u64;
        let flags = (libc::MAP_PRIVATE | libc::MAP_ANONYMOUS) as u64;
        let from = tracee.call(libc::SYS_mmap, &[0, ROOM, protection, flags, u64::MAX, 0])?;
        let from = u64::try_from(from).map_err(|_| std::io::Error::other("no memory"))?;
        Ok(Self {
            tracee,
            from,
            used: 0,
        })
    }

    /// As [`Self::take`], for a thread that may not ask for memory: it has what the guest would leave there for it, at the end of
    /// the guest's.
    ///
    /// # Errors
    /// It may not be traced, or has ended, or its process has no guest memory.
    pub fn take_with_guest_memory(tid: i32) -> std::io::Result<Self> {
        let tracee = Tracee::stop_behind_filter(tid)?;
        let maps = std::fs::read_to_string(format!("/proc/{tid}/maps"))?;
        let ranges = maps
            .lines()
            .filter(|line| line.contains(" rw-s ") && line.contains("/memfd:"));
        let parsed = ranges.filter_map(|line| {
            let (from, to) = line.split(' ').next()?.split_once('-')?;
            let number = |text| u64::from_str_radix(text, 16).ok();
            Some((number(from)?, number(to)?))
        });
        let (_, end) = parsed
            .max_by_key(|(from, to)| to - from)
            .filter(|(from, to)| to - from > ROOM)
            .ok_or_else(|| std::io::Error::other(format!("no guest memory:\n{maps}")))?;
        Ok(Self {
            tracee,
            from: end - ROOM,
            used: 0,
        })
    }

    /// The signal that the thread died of, if it did.
    #[must_use]
    pub fn died_of(&self) -> Option<i32> {
        self.tracee.died_of()
    }
}

fn outcome(result: i64) -> Result<u64, Stop> {
    if (-4095..0).contains(&result) {
        Err(Stop::Errno(i32::try_from(-result).unwrap_or(0)))
    } else {
        Ok(result.cast_unsigned())
    }
}

impl Machine for Remote {
    fn call(&mut self, number: i64, args: &[u64]) -> Result<u64, Stop> {
        outcome(self.tracee.call(number, args).map_err(|_| Stop::Gone)?)
    }

    fn call32(&mut self, number: u32) -> Result<u64, Stop> {
        let result = self
            .tracee
            .call_by(&GATE, i64::from(number), &[])
            .map_err(|_| Stop::Gone)?;
        // The 32-bit table answers 32 bits.
        outcome(i64::from(result as i32))
    }

    fn put(&mut self, bytes: &[u8]) -> Result<u64, Stop> {
        let at = self.from + self.used;
        // Aligned for whatever the kernel reads there.
        self.used += (bytes.len() as u64).next_multiple_of(16).max(16);
        if self.used > ROOM {
            return Err(Stop::Gone);
        }
        self.set(at, bytes)?;
        Ok(at)
    }

    fn get(&mut self, address: u64, length: usize) -> Result<Vec<u8>, Stop> {
        let mut bytes = vec![0; length];
        self.tracee
            .read(address, &mut bytes)
            .map_err(|_| Stop::Gone)?;
        Ok(bytes)
    }

    fn set(&mut self, address: u64, bytes: &[u8]) -> Result<(), Stop> {
        self.tracee.write(address, bytes).map_err(|_| Stop::Gone)
    }
}
