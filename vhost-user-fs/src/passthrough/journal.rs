//! The note of the request at hand, for a process that comes after this one.
//!
//! **Job.** Before a request changes a table its old word is noted, so that the next process takes the change back if the reply
//! was never published, and does the request anew: the guest's counts come out as if it had been done once. For changes of
//! files there is no way back; the note says that the request may have been done, and each such request knows how to tell.
//! **Who is not trusted.** Whoever wrote the note was killed at any point in it.
//! **Why this way.** A request is done to its end before the next begins, so one note is enough. It costs a few stores into
//! memory that is at hand, no system call.

use super::store::{FD, Store, UNDO_ENTRIES, Word, take};

/// Set in [`Word::Request`] while a request is at hand.
const AT_HAND: u64 = 1 << 63;

/// A word that is about to change.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Change {
    /// Lookups of an inode.
    Inode(u32),
    /// The descriptor of a handle that is given out.
    Handle(u32),
}

impl Change {
    const HANDLE: u64 = 1 << 32;

    fn word(self) -> u64 {
        match self {
            Self::Inode(entry) => u64::from(entry),
            Self::Handle(entry) => u64::from(entry) | Self::HANDLE,
        }
    }

    fn of(word: u64) -> Self {
        // The low half.
        let entry = word as u32;
        if word & Self::HANDLE == 0 {
            Self::Inode(entry)
        } else {
            Self::Handle(entry)
        }
    }
}

/// A request that the process before this one was at when it died.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Again {
    /// When it was begun: nanoseconds since 1970.
    pub(crate) began: u64,
    /// What it found before it changed a file; 0 if it did not get that far.
    pub(crate) before: u64,
}

/// Where a request came from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Origin {
    /// Its queue.
    pub queue: u16,
    /// Its first descriptor.
    pub head: u16,
}

/// The note.
#[derive(Debug)]
pub(crate) struct Journal {
    store: Store,
    noted: usize,
    /// The word of the request that has to be done again.
    interrupted: Option<u64>,
    again: Option<Again>,
}

fn request(origin: Origin, opcode: u32) -> u64 {
    AT_HAND
        | u64::from(origin.queue & 0xff) << 48
        | u64::from(origin.head) << 32
        | u64::from(opcode)
}

impl Journal {
    pub(crate) fn new(store: Store) -> Self {
        Self {
            store,
            noted: 0,
            interrupted: None,
            again: None,
        }
    }

    /// Where the request came from that was at hand, if there was one.
    pub(crate) fn at_hand(store: Store) -> Option<Origin> {
        let word = store.load(Word::Request);
        (word & AT_HAND != 0).then_some(Origin {
            queue: (word >> 48 & 0xff) as u16,
            head: (word >> 32) as u16,
        })
    }

    /// Takes the changes of a request back that was at hand and whose reply was not published, as `in_flight` tells.
    pub(crate) fn resume(store: Store, in_flight: impl Fn(Origin) -> bool) -> Self {
        let mut journal = Self::new(store);
        if Self::at_hand(store).is_some_and(in_flight) {
            journal.roll_back();
            journal.interrupted = Some(store.load(Word::Request));
        } else {
            // The next request may come on the same descriptor.
            store.store(Word::Request, 0);
        }
        journal
    }

    fn roll_back(&self) {
        let store = self.store;
        let noted = (store.load(Word::Undo) as usize).min(UNDO_ENTRIES);
        for at in (0..noted).rev() {
            let before = store.get(store.undo, at, 1);
            match Change::of(store.get(store.undo, at, 0)) {
                Change::Inode(entry) => store.set(store.inodes, entry as usize, 1, before),
                Change::Handle(entry) => {
                    let entry = entry as usize;
                    let now = store.get(store.handles, entry, 0);
                    store.set(store.handles, entry, 0, before);
                    if now & FD != before & FD {
                        drop(take(now & FD));
                    }
                }
            }
        }
        store.store(Word::Undo, 0);
    }

    /// A request begins. `replayed` says that a process before this one took it from the queue.
    pub(crate) fn begin(&mut self, origin: Origin, opcode: u32, unique: u64, replayed: bool) {
        let word = request(origin, opcode);
        let same = self.interrupted == Some(word) && self.store.load(Word::Unique) == unique;
        self.again = (replayed && same).then(|| Again {
            began: self.store.load(Word::Began),
            before: self.store.load(Word::Before),
        });
        self.interrupted = None;
        self.noted = 0;
        self.store.store(Word::Undo, 0);
        if self.again.is_none() {
            self.store.store(Word::Request, 0);
            self.store.store(Word::Before, 0);
            self.store.store(Word::Began, 0);
            self.store.store(Word::Unique, unique);
        }
        self.store.store(Word::Request, word);
    }

    /// The reply is published.
    pub(crate) fn end(&mut self) {
        self.again = None;
        self.store.store(Word::Request, 0);
    }

    /// Whether the request at hand may have been done already.
    pub(crate) fn again(&self) -> Option<Again> {
        self.again
    }

    /// Notes a table's word before it changes; `None` if no more changes can be noted.
    #[must_use]
    pub(crate) fn note(&mut self, change: Change, before: u64) -> Option<()> {
        if self.noted >= UNDO_ENTRIES {
            return None;
        }
        self.store
            .set(self.store.undo, self.noted, 0, change.word());
        self.store.set(self.store.undo, self.noted, 1, before);
        self.noted += 1;
        self.store.store(Word::Undo, self.noted as u64);
        Some(())
    }

    /// Changes that can still be noted.
    pub(crate) fn room(&self) -> usize {
        UNDO_ENTRIES - self.noted
    }

    /// Notes the time, before something is made that might be found made already.
    pub(crate) fn note_time(&self) {
        self.store.store(Word::Began, super::sys::coarse_time());
    }

    /// Notes what was found before a file is changed.
    pub(crate) fn note_before(&self, value: u64) {
        self.store.store(Word::Before, value);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const ORIGIN: Origin = Origin { queue: 1, head: 7 };

    #[test]
    fn what_was_not_published_is_taken_back_and_done_again() {
        let store = Store::new(10).unwrap();
        let mut journal = Journal::new(store);
        journal.begin(ORIGIN, 35, 99, false);
        journal.note(Change::Inode(3), 5).unwrap();
        store.set(store.inodes, 3, 1, 6);
        journal.note(Change::Inode(3), 6).unwrap();
        store.set(store.inodes, 3, 1, 7);
        journal.note_before(42);
        let mut next = Journal::resume(store, |origin| origin == ORIGIN);
        assert_eq!(store.get(store.inodes, 3, 1), 5);
        next.begin(ORIGIN, 35, 99, true);
        assert_eq!(next.again().unwrap().before, 42);
        next.end();
        next.begin(ORIGIN, 35, 99, false);
        assert_eq!(next.again(), None);
    }

    #[test]
    fn what_was_published_stays() {
        let store = Store::new(10).unwrap();
        let mut journal = Journal::new(store);
        journal.begin(ORIGIN, 35, 99, false);
        journal.note(Change::Inode(3), 5).unwrap();
        store.set(store.inodes, 3, 1, 6);
        let mut next = Journal::resume(store, |_| false);
        assert_eq!(store.get(store.inodes, 3, 1), 6);
        next.begin(ORIGIN, 35, 99, true);
        assert_eq!(next.again(), None, "the guest has used the descriptor anew");
    }

    #[test]
    fn another_request_on_the_same_descriptor_is_not_the_interrupted_one() {
        let store = Store::new(10).unwrap();
        let mut journal = Journal::new(store);
        journal.begin(ORIGIN, 35, 99, false);
        let mut next = Journal::resume(store, |_| true);
        next.begin(ORIGIN, 35, 100, true);
        assert_eq!(next.again(), None);
        for n in 0..UNDO_ENTRIES as u32 {
            next.note(Change::Handle(n), 0).unwrap();
        }
        assert_eq!((next.room(), next.note(Change::Inode(0), 0)), (0, None));
    }
}
