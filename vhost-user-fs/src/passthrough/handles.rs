//! Open files and folders of the guest.
//!
//! **Job.** File handles to descriptors, and for folders the place that their descriptor stands at.
//! **Who is not trusted.** The guest: handles may be invented, or used after release. The number of handles is bounded by the
//! caller's budget of descriptors.
//! **Why this way.** A handle holds a generation like a node id does, so that a late request does not hit another file. The
//! table lives in the [`Store`], so that the guest's open files outlive this process.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use nix::errno::Errno;

use super::journal::{Change, Journal};
use super::store::{FD, Store, Word, give, lend, take};

/// What is open.
#[derive(Debug)]
pub(crate) enum Handle<T = OwnedFd> {
    /// A regular file.
    File {
        fd: T,
        /// Each write goes to the file's end, wherever that is by then.
        append: bool,
        /// What the guest opened it with.
        flags: u32,
    },
    /// A folder.
    Folder {
        fd: T,
        /// Where the kernel's position is.
        position: u64,
    },
}

/// A position that no folder has: it has to be sought.
const UNKNOWN: u64 = u64::MAX;

// An entry: generation and descriptor; what it is; a folder's position.
const FILE: usize = 0;
const WHAT: usize = 1;
const POSITION: usize = 2;

const IS_FOLDER: u64 = 1;
const APPENDS: u64 = 2;
/// It was not found again where a snapshot goes on; its descriptor stands for nothing.
const LOST: u64 = 4;
/// The guest's flags are above these bits.
const FLAGS: u32 = 32;

/// A handle in a snapshot.
#[derive(Debug)]
pub(crate) struct Kept<'a> {
    pub(crate) number: u64,
    /// `None` if it was lost before.
    pub(crate) handle: Option<Handle<BorrowedFd<'a>>>,
}

/// All handles.
#[derive(Debug)]
pub(crate) struct Handles {
    store: Store,
    used: u32,
    free: Vec<u32>,
}

impl Handles {
    /// None, in a store that has none yet.
    pub(crate) fn new(store: Store) -> Self {
        Self {
            store,
            used: 0,
            free: Vec::new(),
        }
    }

    /// With what a process before this one left.
    pub(crate) fn resume(store: Store) -> Self {
        // Never more than 2^22.
        let used = store.load(Word::Handles) as u32;
        let mut handles = Self {
            store,
            used,
            free: Vec::new(),
        };
        for entry in 0..used {
            if handles.word(entry, FILE) & FD == 0 {
                handles.free.push(entry);
            }
            // What was read of a folder and not given to the guest is gone.
            handles.set(entry, POSITION, UNKNOWN);
        }
        handles
    }

    /// How many there are.
    pub(crate) fn len(&self) -> usize {
        self.used as usize - self.free.len()
    }

    fn word(&self, entry: u32, at: usize) -> u64 {
        self.store.get(self.store.handles, entry as usize, at)
    }

    fn set(&self, entry: u32, at: usize, value: u64) {
        self.store
            .set(self.store.handles, entry as usize, at, value);
    }

    /// Adds one; returns its number, which is never 0.
    ///
    /// # Errors
    /// `ENFILE` if there is no room.
    pub(crate) fn insert(&mut self, journal: &mut Journal, handle: Handle) -> Result<u64, Errno> {
        let entry = match self.free.last() {
            Some(entry) => *entry,
            None if (self.used as usize) < self.store.handles.entries() => self.used,
            None => return Err(Errno::ENFILE),
        };
        let before = self.word(entry, FILE);
        journal
            .note(Change::Handle(entry), before)
            .ok_or(Errno::ENFILE)?;
        if self.free.pop().is_none() {
            self.used += 1;
            self.store.store(Word::Handles, u64::from(self.used));
        }
        let (fd, what, position) = match handle {
            Handle::File { fd, append, flags } => {
                let append = if append { APPENDS } else { 0 };
                (fd, append | u64::from(flags) << FLAGS, 0)
            }
            Handle::Folder { fd, position } => (fd, IS_FOLDER, position),
        };
        self.set(entry, WHAT, what);
        self.set(entry, POSITION, position);
        self.set(entry, FILE, (before & !FD) | give(fd));
        Ok((before & !FD) | (u64::from(entry) + 1))
    }

    fn entry(&self, number: u64) -> Option<u32> {
        let entry = u32::try_from(number & 0xffff_ffff).ok()?.checked_sub(1)?;
        let file = self.word(entry, FILE);
        (entry < self.used && file & FD != 0 && file >> 32 == number >> 32).then_some(entry)
    }

    fn get(&self, number: u64) -> Result<Handle<BorrowedFd<'_>>, Errno> {
        let entry = self.entry(number).ok_or(Errno::EBADF)?;
        let fd = lend(&self.store, self.word(entry, FILE) & FD).ok_or(Errno::EBADF)?;
        let what = self.word(entry, WHAT);
        if what & LOST != 0 {
            return Err(Errno::ESTALE);
        }
        Ok(if what & IS_FOLDER == 0 {
            Handle::File {
                fd,
                append: what & APPENDS != 0,
                flags: (what >> FLAGS) as u32,
            }
        } else {
            Handle::Folder {
                fd,
                position: self.word(entry, POSITION),
            }
        })
    }

    /// Handles that were ever used.
    pub(crate) fn used(&self) -> u32 {
        self.used
    }

    /// A generation that no handle has had.
    pub(crate) fn next_generation(&self) -> u32 {
        let had = (0..self.used).map(|entry| (self.word(entry, FILE) >> 32) as u32);
        had.max().unwrap_or(0).wrapping_add(1)
    }

    /// All that are open, for a snapshot.
    pub(crate) fn all(&self) -> impl Iterator<Item = Kept<'_>> {
        (0..self.used).filter_map(|entry| {
            let file = self.word(entry, FILE);
            if file & FD == 0 {
                return None;
            }
            let number = (file & !FD) | (u64::from(entry) + 1);
            Some(Kept {
                number,
                handle: self.get(number).ok(),
            })
        })
    }

    /// For a guest that goes on from a snapshot: `used` handles, none of them open, with a generation that none has had. The
    /// caller has closed all.
    pub(crate) fn empty_for(store: Store, used: u32, generation: u32) {
        for entry in 0..used as usize {
            store.set(store.handles, entry, FILE, u64::from(generation) << 32);
            store.set(store.handles, entry, WHAT, 0);
        }
        store.store(Word::Handles, u64::from(used));
    }

    /// Opens handle `number` of a snapshot. `lost` says that the descriptor stands for nothing.
    pub(crate) fn plant(store: Store, number: u64, handle: Handle, lost: bool) {
        let Some(entry) = (number as u32).checked_sub(1) else {
            return;
        };
        let entry = entry as usize;
        let (fd, what) = match handle {
            Handle::File { fd, append, flags } => {
                let append = if append { APPENDS } else { 0 };
                (fd, append | u64::from(flags) << FLAGS)
            }
            Handle::Folder { fd, .. } => (fd, IS_FOLDER),
        };
        let lost = if lost { LOST } else { 0 };
        store.set(store.handles, entry, WHAT, what | lost);
        store.set(store.handles, entry, POSITION, UNKNOWN);
        store.set(store.handles, entry, FILE, (number & !FD) | give(fd));
    }

    /// An open regular file.
    ///
    /// # Errors
    /// `EBADF`; `ESTALE` if it was not found again where a snapshot goes on.
    pub(crate) fn file(&self, number: u64) -> Result<BorrowedFd<'_>, Errno> {
        self.file_to_write(number).map(|(fd, _)| fd)
    }

    /// An open regular file, and whether it is written at its end only.
    ///
    /// # Errors
    /// As [`file`](Self::file).
    pub(crate) fn file_to_write(&self, number: u64) -> Result<(BorrowedFd<'_>, bool), Errno> {
        match self.get(number)? {
            Handle::File { fd, append, .. } => Ok((fd, append)),
            Handle::Folder { .. } => Err(Errno::EBADF),
        }
    }

    /// An open regular file, and the flags that the guest opened it with.
    ///
    /// # Errors
    /// As [`file`](Self::file).
    pub(crate) fn file_and_flags(&self, number: u64) -> Result<(BorrowedFd<'_>, u32), Errno> {
        match self.get(number)? {
            Handle::File { fd, flags, .. } => Ok((fd, flags)),
            Handle::Folder { .. } => Err(Errno::EBADF),
        }
    }

    /// An open folder and its position.
    ///
    /// # Errors
    /// As [`file`](Self::file).
    pub(crate) fn folder(&self, number: u64) -> Result<(BorrowedFd<'_>, u64), Errno> {
        match self.get(number)? {
            Handle::Folder { fd, position } => Ok((fd, position)),
            Handle::File { .. } => Err(Errno::EBADF),
        }
    }

    /// Tells where a folder's descriptor stands now.
    pub(crate) fn moved(&mut self, number: u64, position: u64) {
        if let Some(entry) = self.entry(number) {
            self.set(entry, POSITION, position);
        }
    }

    /// Takes a handle out.
    ///
    /// # Errors
    /// `EBADF`.
    pub(crate) fn remove(&mut self, number: u64) -> Result<Handle, Errno> {
        let entry = self.entry(number).ok_or(Errno::EBADF)?;
        let folder = self.word(entry, WHAT) & IS_FOLDER != 0;
        let fd = self.take(entry).ok_or(Errno::EBADF)?;
        Ok(if folder {
            Handle::Folder { fd, position: 0 }
        } else {
            Handle::File {
                fd,
                append: false,
                flags: 0,
            }
        })
    }

    fn take(&mut self, entry: u32) -> Option<OwnedFd> {
        let file = self.word(entry, FILE);
        let next = (file >> 32) as u32;
        self.set(entry, FILE, u64::from(next.wrapping_add(1)) << 32);
        self.free.push(entry);
        take(file & FD)
    }

    /// Closes all.
    pub(crate) fn clear(&mut self) {
        for entry in 0..self.used {
            if self.word(entry, FILE) & FD != 0 {
                drop(self.take(entry));
            }
        }
    }
}

impl<T: AsFd> AsFd for Handle<T> {
    fn as_fd(&self) -> BorrowedFd<'_> {
        match self {
            Self::File { fd, .. } | Self::Folder { fd, .. } => fd.as_fd(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::passthrough::journal::Origin;

    fn file() -> Handle {
        Handle::File {
            fd: std::fs::File::open("/dev/null").unwrap().into(),
            append: true,
            flags: 0,
        }
    }

    fn folder() -> Handle {
        Handle::Folder {
            fd: std::fs::File::open("/").unwrap().into(),
            position: 7,
        }
    }

    #[test]
    fn a_released_handle_is_bad_even_when_its_slot_is_used_again() {
        let store = Store::new(10).unwrap();
        let (mut journal, mut handles) = (Journal::new(store), Handles::new(store));
        let first = handles.insert(&mut journal, file()).unwrap();
        assert!(handles.file_to_write(first).unwrap().1);
        assert_eq!(handles.folder(first).unwrap_err(), Errno::EBADF);
        handles.remove(first).unwrap();
        assert_eq!(handles.remove(first).unwrap_err(), Errno::EBADF);
        let second = handles.insert(&mut journal, folder()).unwrap();
        assert_eq!(handles.len(), 1);
        assert_eq!(handles.file(first).unwrap_err(), Errno::EBADF);
        assert_eq!(handles.folder(second).unwrap().1, 7);
        for invented in [0, 2, u64::MAX, 0xffff_ffff, second + (1 << 32)] {
            assert_eq!(handles.file(invented).unwrap_err(), Errno::EBADF);
            assert_eq!(handles.remove(invented).unwrap_err(), Errno::EBADF);
        }
        handles.clear();
        assert_eq!(handles.len(), 0);
        assert_eq!(handles.folder(second).unwrap_err(), Errno::EBADF);
    }

    #[test]
    fn open_files_outlive_their_process_but_those_of_an_unanswered_request() {
        let store = Store::new(10).unwrap();
        let (mut journal, mut handles) = (Journal::new(store), Handles::new(store));
        let kept = handles.insert(&mut journal, folder()).unwrap();
        let origin = Origin { queue: 1, head: 0 };
        journal.begin(origin, 14, 1, false);
        let lost = handles.insert(&mut journal, file()).unwrap();
        Journal::resume(store, |_| true);
        let handles = Handles::resume(store);
        assert_eq!(handles.folder(kept).unwrap().1, UNKNOWN);
        assert_eq!(handles.file(lost).unwrap_err(), Errno::EBADF);
        assert_eq!(handles.len(), 1);
    }
}
