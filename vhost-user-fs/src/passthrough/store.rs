//! Memory that outlives the serving process.
//!
//! **Job.** The tables of what the guest holds and the note of the request at hand, in memory that is shared with the process
//! that waits outside, so that the next serving process finds them as the last one left them.
//! **Who is not trusted.** Whoever served before may have been killed between any two stores, or by a guest that made it
//! fail: readers take nothing for granted but that each word was once written as a whole.
//! **Why this way.** The tables are not copied there, they live there, as plain words; keeping them costs nothing more than
//! having them. Pages that no entry has needed yet take no memory.

#![allow(unsafe_code)] // mmap: memory that a later process finds again

use std::hint::black_box;
use std::os::fd::{AsRawFd, BorrowedFd, OwnedFd};
use std::sync::atomic::{AtomicU64, Ordering};

use ipc::limits::{MAX_FS_HELD, MAX_FS_INODES};
use nix::errno::Errno;
use nix::sys::memfd::{MFdFlags, memfd_create};
use nix::unistd::{Whence, ftruncate, lseek};

/// What a program of another version must find as it is here to go on with the tables: to be counted up with every change of what
/// their words mean. In the program's file, it can be found by its text.
static LAYOUT: &[u8; 34] = b"kept tables of a folder, layout \x00\x01";

/// Words before the first table.
const HEADER: usize = 64;
/// Words of the undo list: two for each change that one request can make.
const UNDO: usize = 2 * UNDO_ENTRIES;
/// Changes of one request that can be taken back.
pub(crate) const UNDO_ENTRIES: usize = 8192;
/// File systems and mounts that inodes of one guest can be on.
pub(crate) const PLACES: usize = 4096;
/// Units of 16 bytes for the names of inodes: 64 MiB, most of which no guest ever needs.
pub(crate) const NAMES: usize = 1 << 22;
/// Owners of locks that one guest may have at a time.
pub(crate) const LOCKS: usize = 4096;

/// Single words.
#[derive(Debug, Clone, Copy)]
#[repr(usize)]
pub(crate) enum Word {
    /// Flags of the session.
    Agreed,
    /// The tree's descriptor, plus one.
    Root,
    /// [`super::journal`]: queue, head and opcode of the request at hand, with a mark.
    Request,
    /// Its number by the guest.
    Unique,
    /// When it began: nanoseconds since 1970.
    Began,
    /// What it found before it changed anything.
    Before,
    /// Entries of the undo list.
    Undo,
    /// Handles that were ever used: no entry from there on is.
    Handles,
    /// As `Handles`, of inodes.
    Inodes,
    /// As `Handles`, of units for names.
    Names,
    /// The mounts that the descriptors are on: a descriptor, plus one.
    Mounts,
    /// The memory itself, if another program can go on with it: a descriptor, plus one.
    Memory,
    /// Descriptors that the guest may have: what the size of the tables follows from.
    Descriptors,
}

/// A table of entries of [`Table::WORDS`] words.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Table {
    start: usize,
    entries: usize,
    width: usize,
}

impl Table {
    /// Entries at most.
    pub(crate) fn entries(self) -> usize {
        self.entries
    }
}

const ACCESS: i32 = libc::PROT_READ | libc::PROT_WRITE;

/// Maps the beginning of `memory`, in two steps, which are those that the filter of a device process allows.
fn map(memory: &OwnedFd, bytes: usize) -> Result<isize, Errno> {
    let room = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE;
    let none = std::ptr::null_mut();
    // SAFETY: room at an address of the kernel's choice, which nothing may touch.
    let room = unsafe { libc::mmap(none, bytes, libc::PROT_NONE, room, -1, 0) };
    Errno::result(room as isize)?;
    let shared = libc::MAP_SHARED | libc::MAP_NORESERVE | libc::MAP_FIXED;
    // SAFETY: takes the place of the room that was just made and that nobody else knows.
    Errno::result(unsafe {
        libc::mmap(room, bytes, ACCESS, shared, memory.as_raw_fd(), 0) as isize
    })
}

/// All of it. Cheap to copy; never unmapped.
#[derive(Debug, Clone, Copy)]
pub struct Store {
    words: &'static [AtomicU64],
    pub(crate) inodes: Table,
    pub(crate) handles: Table,
    pub(crate) places: Table,
    pub(crate) undo: Table,
    pub(crate) locks: Table,
    pub(crate) names: Table,
}

impl Store {
    /// For a guest that may have `descriptors` of inodes, files and locks. To be made before processes are forked that shall
    /// share it.
    ///
    /// # Errors
    /// `EINVAL` for more than [`MAX_FS_HELD`], `ENOMEM`.
    pub fn new(descriptors: usize) -> Result<Self, Errno> {
        Self::laid_out(descriptors, |bytes| {
            let none = std::ptr::null_mut();
            let shared = libc::MAP_SHARED | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE;
            // SAFETY: a new mapping at an address of the kernel's choice; anonymous, so all words are zero.
            Errno::result(unsafe { libc::mmap(none, bytes, ACCESS, shared, -1, 0) as isize })
        })
    }

    /// As [`new`](Self::new), in memory that another program can go on with, which gets it as a descriptor ([`Store::adopt`]).
    ///
    /// # Errors
    /// As [`new`](Self::new), and `EFBIG` where the limit of a file's size is below [`bytes`](Self::bytes).
    pub fn new_to_hand_over(descriptors: usize) -> Result<Self, Errno> {
        let memory = memfd_create(c"folder", MFdFlags::MFD_CLOEXEC)?;
        let store = Self::laid_out(descriptors, |bytes| {
            ftruncate(&memory, bytes as i64)?;
            map(&memory, bytes)
        })?;
        store.store(Word::Descriptors, descriptors as u64);
        store.store(Word::Memory, give(memory));
        Ok(store)
    }

    /// The tables that another process had, of a program with the same [`layout`](Self::layout), for `descriptors` as there. The
    /// descriptors that they name are to be put on their numbers before they are used.
    ///
    /// # Errors
    /// `EPROTO` if the memory is no such tables, `ENOMEM`.
    pub fn adopt(memory: &OwnedFd) -> Result<Self, Errno> {
        let size = lseek(memory, 0, Whence::SeekEnd)?;
        let head = HEADER * size_of::<u64>();
        if size < head as i64 {
            return Err(Errno::EPROTO);
        }
        let first = Self::at(map(memory, head)?, HEADER);
        let descriptors = first
            .get(Word::Descriptors as usize)
            .map_or(0, |word| word.load(Ordering::Acquire));
        let descriptors = usize::try_from(descriptors).map_err(|_| Errno::EPROTO)?;
        if !(1..=MAX_FS_HELD).contains(&descriptors) {
            return Err(Errno::EPROTO);
        }
        Self::laid_out(descriptors, |bytes| {
            // Shorter, a look at its end would be the end of this process.
            if size != bytes as i64 {
                return Err(Errno::EPROTO);
            }
            map(memory, bytes)
        })
    }

    /// Bytes of memory for `descriptors`, most of which are never touched.
    pub fn bytes(descriptors: usize) -> u64 {
        let words = HEADER
            + UNDO
            + 2 * PLACES
            + 3 * LOCKS
            + 3 * (descriptors + 1)
            + super::inodes::WORDS * MAX_FS_INODES
            + 2 * NAMES;
        (words * size_of::<u64>()) as u64
    }

    /// What a program must have in common with another one to go on with its tables: the version of their layout, and their sizes.
    pub fn layout() -> u64 {
        let sizes = [
            HEADER,
            UNDO_ENTRIES,
            PLACES,
            LOCKS,
            MAX_FS_INODES,
            super::inodes::WORDS,
            NAMES,
        ];
        // FNV-1a, of words.
        let hash = sizes.iter().fold(0xcbf2_9ce4_8422_2325_u64, |hash, size| {
            (hash ^ *size as u64).wrapping_mul(0x0100_0000_01b3)
        });
        // Read from where it is, not known beforehand.
        let [.., high, low] = *black_box(LAYOUT);
        u64::from(u16::from_be_bytes([high, low])) << 48 | hash >> 16
    }

    fn at(address: isize, words: usize) -> &'static [AtomicU64] {
        let address = std::ptr::with_exposed_provenance::<AtomicU64>(address.cast_unsigned());
        // SAFETY: as many words were mapped, page-aligned, and are never unmapped; they are only accessed as atomics, by
        // this process and those that it shares them with.
        unsafe { std::slice::from_raw_parts(address, words) }
    }

    fn laid_out(
        descriptors: usize,
        map: impl FnOnce(usize) -> Result<isize, Errno>,
    ) -> Result<Self, Errno> {
        if descriptors > MAX_FS_HELD {
            return Err(Errno::EINVAL);
        }
        let mut next = HEADER;
        let mut table = |entries: usize, width: usize| {
            let start = next;
            next += entries * width;
            Table {
                start,
                entries,
                width,
            }
        };
        let undo = table(UNDO_ENTRIES, UNDO / UNDO_ENTRIES);
        let places = table(PLACES, 2);
        let locks = table(LOCKS, 3);
        // One more: the root is there before anything is counted.
        let handles = table(descriptors + 1, 3);
        let inodes = table(MAX_FS_INODES, super::inodes::WORDS);
        let names = table(NAMES, 2);
        Ok(Self {
            words: Self::at(map(next * size_of::<u64>())?, next),
            inodes,
            handles,
            places,
            undo,
            locks,
            names,
        })
    }

    pub(crate) fn load(&self, word: Word) -> u64 {
        self.words[word as usize].load(Ordering::Acquire)
    }

    /// Stores are seen by a later process in the order of the program.
    pub(crate) fn store(&self, word: Word, value: u64) {
        self.words[word as usize].store(value, Ordering::Release);
    }

    /// Word `at` of an entry; 0 if there is no such entry.
    pub(crate) fn get(&self, table: Table, entry: usize, at: usize) -> u64 {
        self.word(table, entry, at)
            .map_or(0, |word| word.load(Ordering::Acquire))
    }

    /// Sets word `at` of an entry; nothing happens if there is no such entry.
    pub(crate) fn set(&self, table: Table, entry: usize, at: usize, value: u64) {
        if let Some(word) = self.word(table, entry, at) {
            word.store(value, Ordering::Release);
        }
    }

    fn word(&self, table: Table, entry: usize, at: usize) -> Option<&AtomicU64> {
        if entry >= table.entries || at >= table.width {
            return None;
        }
        self.words.get(table.start + entry * table.width + at)
    }

    /// Keeps something open for as long as the tables are used: what the descriptors in them need.
    pub fn keep_open(&self, fd: Option<OwnedFd>) {
        if let Some(fd) = fd {
            self.store(Word::Mounts, give(fd));
        }
    }

    /// The memory, for another program.
    pub fn memory(&self) -> Option<BorrowedFd<'_>> {
        lend(self, self.load(Word::Memory))
    }

    /// Whether a process before this one has left something.
    pub fn is_used(&self) -> bool {
        self.load(Word::Root) != 0
    }

    /// Calls `with` for each descriptor that an entry of any table holds.
    pub fn descriptors(&self, mut with: impl FnMut(i32)) {
        let mut see = |number: u64| {
            if let Some(fd) = number_of(number) {
                with(fd);
            }
        };
        see(self.load(Word::Root));
        see(self.load(Word::Mounts));
        see(self.load(Word::Memory));
        for entry in 0..self.inodes.entries.min(self.load(Word::Inodes) as usize) {
            see(self.get(self.inodes, entry, 2) >> 32);
        }
        for entry in 0..self.handles.entries.min(self.load(Word::Handles) as usize) {
            see(self.get(self.handles, entry, 0) & FD);
        }
        for entry in 0..LOCKS {
            see(self.get(self.locks, entry, 2));
        }
    }
}

/// The low half of a word: a descriptor plus one, so that zero is none.
pub(crate) const FD: u64 = 0xffff_ffff;

fn number_of(stored: u64) -> Option<i32> {
    i32::try_from(stored)
        .ok()?
        .checked_sub(1)
        .filter(|n| *n >= 0)
}

/// A descriptor that the tables own, as a number that can be stored. It stays open until [`take`].
pub(crate) fn give(fd: OwnedFd) -> u64 {
    use std::os::fd::IntoRawFd;
    // Descriptors are not negative.
    u64::from(fd.into_raw_fd().cast_unsigned()) + 1
}

/// A look at a descriptor that the tables own. `stored` must have come from [`give`]; the entry that holds it must stay.
pub(crate) fn lend<'s>(_store: &'s Store, stored: u64) -> Option<BorrowedFd<'s>> {
    let number = number_of(stored)?;
    // SAFETY: the tables own it (`give`), and only a method that changes them takes it away. If whoever served before left a
    // wrong number, a call on it fails or reaches another file of the same guest; there is no other kind of descriptor whose
    // use here would break memory.
    Some(unsafe { BorrowedFd::borrow_raw(number) })
}

/// Takes a descriptor out of the tables; the caller clears the entry.
pub(crate) fn take(stored: u64) -> Option<OwnedFd> {
    use std::os::fd::FromRawFd;
    let number = number_of(stored)?;
    // SAFETY: as for `lend`; the entry that held it is cleared, so nobody uses or closes it again.
    Some(unsafe { OwnedFd::from_raw_fd(number) })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tables_do_not_overlap_and_nothing_is_outside() {
        let store = Store::new(10).unwrap();
        for (n, table) in [
            store.undo,
            store.places,
            store.locks,
            store.handles,
            store.inodes,
            store.names,
        ]
        .into_iter()
        .enumerate()
        {
            store.set(table, 0, 0, n as u64 + 1);
            store.set(table, table.entries - 1, table.width - 1, n as u64 + 11);
            store.set(table, table.entries, 0, 99);
            store.set(table, 0, table.width, 99);
            assert_eq!(store.get(table, table.entries, 0), 0);
        }
        for (n, table) in [
            store.undo,
            store.places,
            store.locks,
            store.handles,
            store.inodes,
            store.names,
        ]
        .into_iter()
        .enumerate()
        {
            assert_eq!(store.get(table, 0, 0), n as u64 + 1);
            let last = store.get(table, table.entries - 1, table.width - 1);
            assert_eq!(last, n as u64 + 11);
        }
        assert_eq!(Store::new(MAX_FS_HELD + 1).unwrap_err(), Errno::EINVAL);
    }

    #[test]
    fn another_process_finds_the_tables_and_nothing_else_in_their_place() {
        let store = Store::new_to_hand_over(10).unwrap();
        store.set(store.names, NAMES - 1, 1, 7);
        store.store(Word::Undo, 3);
        let memory = store.memory().unwrap().try_clone_to_owned().unwrap();
        let other = Store::adopt(&memory).unwrap();
        assert_eq!(other.get(other.names, NAMES - 1, 1), 7);
        assert_eq!(other.handles.entries(), 11);
        other.store(Word::Undo, 4);
        assert_eq!(store.load(Word::Undo), 4);
        let size = lseek(&memory, 0, Whence::SeekEnd).unwrap();
        assert_eq!(size, Store::bytes(10) as i64);
        for wrong in [0, 8, size - 8, size + 8] {
            ftruncate(&memory, wrong).unwrap();
            assert_eq!(Store::adopt(&memory).unwrap_err(), Errno::EPROTO, "{wrong}");
        }
        ftruncate(&memory, size).unwrap();
        for wrong in [0, 11, MAX_FS_HELD as u64 + 1, u64::MAX] {
            store.store(Word::Descriptors, wrong);
            assert_eq!(Store::adopt(&memory).unwrap_err(), Errno::EPROTO, "{wrong}");
        }
        assert!(Store::new(10).unwrap().memory().is_none());
    }

    #[test]
    fn a_stored_number_is_a_descriptor_or_none() {
        assert_eq!(number_of(0), None);
        assert_eq!(number_of(1), Some(0));
        assert_eq!(number_of(u64::from(u32::MAX)), None);
        assert_eq!(number_of(u64::MAX), None);
    }
}
