//! What a connection has come to, for a process that comes after this one.
//!
//! **Job.** One page, shared with the process that waits outside of a stand-alone daemon's jail: features, memory regions and
//! queues as the front end described them, and the numbers of the descriptors that came with them. The table of descriptors is
//! shared with that process as well, so that they are still open when the next one is started; the front end notices nothing.
//! **Who is not trusted.** Whoever served before and was killed: a number may be wrong, which is then a failing call, and
//! sizes are checked as if a front end had sent them.
//! **Why this way.** Messages are rare, so the whole state is written after each. One that was at hand at the moment of death
//! may have been obeyed or not, and cannot be told; then, and only then, the connection ends.

#![allow(unsafe_code)] // shared memory, and descriptors that are known by their numbers only

use std::fs::File;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::sync::atomic::{AtomicU64, Ordering};

use ipc::limits::{MAX_MEMORY_REGIONS, MAX_QUEUES};
use nix::errno::Errno;

/// Words of the head, of a memory region, of a queue.
const HEAD: usize = 16;
const REGION: usize = 5;
const QUEUE: usize = 7;
const QUEUES: usize = HEAD + MAX_MEMORY_REGIONS * REGION;
const WORDS: usize = QUEUES + MAX_QUEUES as usize * QUEUE;

/// To be counted up with every change of what the words mean.
const LAYOUT: u64 = 1;

/// Single words.
#[derive(Debug, Clone, Copy)]
#[repr(usize)]
pub(crate) enum Word {
    /// The connection's descriptor.
    Socket,
    /// Not 0 while a message is obeyed.
    Busy,
    Features,
    ProtocolFeatures,
    Regions,
    /// The in-flight region: descriptor, offset in it, shape.
    InflightFile,
    InflightOffset,
    InflightShape,
    /// The channel for requests of this end: descriptor.
    Channel,
    /// The request on it whose answer is, or may be, owed; 0 for none.
    Asked,
}

/// Of a region.
pub(crate) const GUEST: usize = 0;
pub(crate) const SIZE: usize = 1;
pub(crate) const USER: usize = 2;
pub(crate) const OFFSET: usize = 3;
pub(crate) const FILE: usize = 4;

/// Of a queue.
pub(crate) const STATE: usize = 0;
pub(crate) const DESCRIPTORS: usize = 1;
pub(crate) const AVAILABLE: usize = 2;
pub(crate) const USED: usize = 3;
pub(crate) const KICK: usize = 4;
pub(crate) const CALL: usize = 5;
pub(crate) const ERROR: usize = 6;

/// The page. Cheap to copy; never unmapped.
#[derive(Debug, Clone, Copy)]
pub struct Record(&'static [AtomicU64; WORDS]);

impl Record {
    /// Of no connection. To be made before processes are forked that shall share it.
    ///
    /// # Errors
    /// `ENOMEM`.
    pub fn new() -> Result<Self, Errno> {
        // SAFETY: a new mapping at an address of the kernel's choice; anonymous, so all words are zero.
        let address = Errno::result(unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                WORDS * size_of::<u64>(),
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_SHARED | libc::MAP_ANONYMOUS,
                -1,
                0,
            ) as isize
        })?;
        let address =
            std::ptr::with_exposed_provenance::<[AtomicU64; WORDS]>(address.cast_unsigned());
        // SAFETY: that many words were mapped, page-aligned, and are never unmapped; they are only accessed as atomics, by
        // this process and those forked from it.
        Ok(Self(unsafe { &*address }))
    }

    /// What a program must have in common with another one to go on with its connections.
    #[must_use]
    pub fn layout() -> u64 {
        LAYOUT << 32 | WORDS as u64
    }

    /// The page's words, while nobody serves.
    #[must_use]
    pub fn words(&self) -> Vec<u64> {
        let words = self.0.iter();
        words.map(|word| word.load(Ordering::Acquire)).collect()
    }

    /// A page with the [`words`](Self::words) of another program's, of the same [`layout`](Self::layout), whose descriptors have
    /// the numbers that they had there.
    ///
    /// # Errors
    /// `EPROTO` for another number of words, `ENOMEM`.
    pub fn of(words: &[u64]) -> Result<Self, Errno> {
        if words.len() != WORDS {
            return Err(Errno::EPROTO);
        }
        let record = Self::new()?;
        for (word, value) in record.0.iter().zip(words) {
            word.store(*value, Ordering::Release);
        }
        Ok(record)
    }

    /// Whether there is a connection to go on with.
    pub fn is_connected(&self) -> bool {
        self.load(Word::Socket) != 0
    }

    /// Calls `with` for each descriptor that the connection has.
    pub fn descriptors(&self, mut with: impl FnMut(RawFd)) {
        let words = [Word::Socket, Word::InflightFile, Word::Channel].map(|word| self.load(word));
        let regions = (0..MAX_MEMORY_REGIONS).map(|index| self.region(index, FILE));
        let queues = (0..usize::from(MAX_QUEUES))
            .flat_map(|index| [KICK, CALL, ERROR].map(|at| self.queue(index, at)));
        for stored in words.into_iter().chain(regions).chain(queues) {
            if let Some(fd) = number(stored) {
                with(fd);
            }
        }
    }

    pub(crate) fn load(&self, word: Word) -> u64 {
        self.0[word as usize].load(Ordering::Acquire)
    }

    pub(crate) fn store(&self, word: Word, value: u64) {
        self.0[word as usize].store(value, Ordering::Release);
    }

    /// A word of region `index`; 0 if there is none.
    pub(crate) fn region(&self, index: usize, at: usize) -> u64 {
        let word = self.0[..QUEUES].get(HEAD + index * REGION + at);
        word.map_or(0, |word| word.load(Ordering::Acquire))
    }

    pub(crate) fn set_region(&self, index: usize, words: [u64; REGION]) {
        for (at, value) in words.into_iter().enumerate() {
            if let Some(word) = self.0[..QUEUES].get(HEAD + index * REGION + at) {
                word.store(value, Ordering::Release);
            }
        }
    }

    /// A word of queue `index`; 0 if there is none.
    pub(crate) fn queue(&self, index: usize, at: usize) -> u64 {
        let word = self.0.get(QUEUES + index * QUEUE + at);
        word.map_or(0, |word| word.load(Ordering::Acquire))
    }

    pub(crate) fn set_queue(&self, index: usize, words: [u64; QUEUE]) {
        for (at, value) in words.into_iter().enumerate() {
            if let Some(word) = self.0.get(QUEUES + index * QUEUE + at) {
                word.store(value, Ordering::Release);
            }
        }
    }
}

/// A descriptor's number as it is stored: one added, so that 0 is none.
pub(crate) fn stored(fd: Option<&impl AsRawFd>) -> u64 {
    // Descriptors are not negative.
    fd.map_or(0, |fd| u64::from(fd.as_raw_fd().cast_unsigned()) + 1)
}

fn number(stored: u64) -> Option<RawFd> {
    RawFd::try_from(stored.checked_sub(1)?).ok()
}

/// The descriptor that the process before this one had under a stored number.
pub(crate) fn adopt(stored: u64) -> Option<OwnedFd> {
    let number = number(stored)?;
    // SAFETY: its owner was the process that wrote the number, which is dead, and this is asked once a number. If it wrote a
    // wrong one, a call on it fails or reaches another file of the same connection; no use here would break memory.
    Some(unsafe { OwnedFd::from_raw_fd(number) })
}

/// A look at the descriptor of an owner that gives its number only.
pub(crate) fn look(owner: &impl AsRawFd) -> BorrowedFd<'_> {
    // SAFETY: the owner keeps it open as long as it is borrowed.
    unsafe { BorrowedFd::borrow_raw(owner.as_raw_fd()) }
}

/// As [`adopt`], as a file.
pub(crate) fn adopt_file(stored: u64) -> Option<File> {
    adopt(stored).map(File::from)
}

/// Puts `with` under the number `target`, whose owner goes on with it.
pub(crate) fn replace(target: RawFd, with: &OwnedFd) -> Result<(), Errno> {
    // SAFETY: the owner of `target` does not care which stream it owns; what was there is closed.
    Errno::result(unsafe { libc::dup3(with.as_raw_fd(), target, libc::O_CLOEXEC) }).map(drop)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_page_goes_to_another_program_as_it_is() {
        let record = Record::new().unwrap();
        record.store(Word::Socket, 7);
        record.set_queue(usize::from(MAX_QUEUES) - 1, [1, 2, 3, 4, 5, 6, 0]);
        let words = record.words();
        let other = Record::of(&words).unwrap();
        assert!(other.is_connected());
        let mut descriptors = Vec::new();
        other.descriptors(|fd| descriptors.push(fd));
        assert_eq!(descriptors, [6, 4, 5]);
        // Another page.
        record.store(Word::Socket, 0);
        assert!(other.is_connected());
        for wrong in [&words[1..], &[]] {
            assert_eq!(Record::of(wrong).unwrap_err(), Errno::EPROTO);
        }
    }
}
