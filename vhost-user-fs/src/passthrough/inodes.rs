//! The inodes that the guest knows.
//!
//! **Job.** Node ids to `O_PATH` descriptors and back: found again by file identity, counted by lookups, gone when the guest
//! has forgotten them as often as it was told about them.
//! **Who is not trusted.** The guest: ids may be invented, forgotten too often or never. An id holds a generation, so that an
//! old one does not name whatever took its place; the number of inodes is bounded by the caller's budget of descriptors.
//! **Why this way.** A descriptor pins its inode and its mount, so while an entry has one no other file can have its identity,
//! and a rename by anyone moves nothing under our feet. When there are no more descriptors, the entry that has had its for the
//! longest gives it up, if its file is still where it was last looked up; with the next request for it the file is opened anew from
//! there, and must be the same one by identity and time of birth. What someone else has moved meanwhile is the caller's to look for.
//! A file with several names may lose the last one that was looked up while the guest goes on to use it by another, which it need not look
//! up again; so the others are remembered as well, by this process only. An entry has 40 bytes and its name in the [`Store`], and 4 to 9
//! bytes in the index that finds it again: a guest's cache decides how many there are.

use std::collections::BTreeSet;
use std::hash::{BuildHasher, RandomState};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use ipc::limits::{MAX_FS_NAMES_OF_ONE, MAX_FS_OTHER_NAMES};
use nix::errno::Errno;

use super::journal::{Change, Journal};
use super::names::Names;
use super::store::{FD, PLACES, Store, Word, give, lend, take};
use super::sys;
use crate::fuse::Name;
use crate::fuse::wire::ROOT_ID;

/// Folders above a file that are opened to open it; deeper ones must be known to be found.
const DEPTH: usize = 256;

/// What makes a file the same file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Identity {
    /// Device number of the file system.
    pub(crate) dev: (u32, u32),
    /// Inode number on it.
    pub(crate) ino: u64,
    /// The mount through which it was reached: the same file may be writable through one and not through another.
    pub(crate) mount: u64,
}

impl Identity {
    pub(crate) fn of(stat: &libc::statx) -> Self {
        Self {
            dev: (stat.stx_dev_major, stat.stx_dev_minor),
            ino: stat.stx_ino,
            mount: stat.stx_mnt_id,
        }
    }

    fn dev_word(self) -> u64 {
        u64::from(self.dev.0) << 32 | u64::from(self.dev.1)
    }
}

/// One inode.
#[derive(Debug)]
pub(crate) struct Inode<'a> {
    fd: BorrowedFd<'a>,
    pub(crate) identity: Identity,
    /// `S_IFMT` bits; an inode never changes them.
    pub(crate) kind: u32,
}

impl<'a> Inode<'a> {
    pub(crate) fn fd(&self) -> BorrowedFd<'a> {
        self.fd
    }
}

// An entry: inode number; generation and lookups; descriptor, type and place; time of birth; folder and name where it was last
// looked up.
const INO: usize = 0;
const COUNT: usize = 1;
const WHAT: usize = 2;
const BIRTH: usize = 3;
const WHERE: usize = 4;
/// Words of an entry.
pub(crate) const WORDS: usize = 5;

/// Nanoseconds since 1970, or 0 where a file system does not tell.
pub(crate) fn birth(stat: &libc::statx) -> u64 {
    if stat.stx_mask & libc::STATX_BTIME == 0 {
        return 0;
    }
    let seconds = stat.stx_btime.tv_sec.cast_unsigned();
    seconds
        .wrapping_mul(1_000_000_000)
        .wrapping_add(u64::from(stat.stx_btime.tv_nsec))
}

/// An inode in a snapshot.
#[derive(Debug)]
pub(crate) struct Known<'a> {
    pub(crate) id: u64,
    pub(crate) lookups: u32,
    /// `S_IFMT` bits.
    pub(crate) kind: u32,
    pub(crate) ino: u64,
    /// See [`birth`].
    pub(crate) birth: u64,
    /// `None` for one without a descriptor now.
    pub(crate) fd: Option<BorrowedFd<'a>>,
}

/// An inode that a snapshot knows, and what was found of it.
#[derive(Debug)]
pub(crate) struct Found<'a> {
    pub(crate) id: u64,
    pub(crate) lookups: u32,
    /// `S_IFMT` bits.
    pub(crate) kind: u32,
    /// `None` if it is not there any more.
    pub(crate) stat: Option<libc::statx>,
    /// `None` if it is to be opened when it is needed.
    pub(crate) fd: Option<OwnedFd>,
    /// The folder's entry, and its name there.
    pub(crate) at: Option<(u32, Name<'a>)>,
}

/// An open folder: an entry's, or one that was opened for the moment.
enum Folder<'a> {
    Known(BorrowedFd<'a>),
    Opened(OwnedFd),
}

impl AsFd for Folder<'_> {
    fn as_fd(&self) -> BorrowedFd<'_> {
        match self {
            Self::Known(fd) => *fd,
            Self::Opened(fd) => fd.as_fd(),
        }
    }
}

/// All inodes.
#[derive(Debug)]
pub(crate) struct Inodes {
    store: Store,
    /// Entries that are free, below `used`.
    free: Vec<u32>,
    /// Entries that were ever used.
    used: u32,
    /// Inodes that there are, and how many of them have a descriptor.
    count: usize,
    open: usize,
    names: Names,
    /// Entries and places of names that they had when they were last looked up by them, which was before they were by those they have in
    /// their entries.
    others: BTreeSet<(u32, u64)>,
    /// The entry that gave its descriptor up last.
    hand: u32,
    /// There was no other that could, and nothing has changed since.
    barren: bool,
    /// Entries that the request at hand is about.
    needed: [u32; 2],
    index: Index,
    places: Vec<(u64, u64)>,
    /// Entries without a lookup, which go when the request at hand is done.
    doomed: Vec<u32>,
}

/// Node ids are an entry's number plus one, and its generation above that; the root is entry 0 of generation 0.
fn id(entry: u32, generation: u32) -> u64 {
    u64::from(generation) << 32 | (u64::from(entry) + 1)
}

fn lookups(count: u64) -> u32 {
    // The low half.
    count as u32
}

fn generation(count: u64) -> u32 {
    (count >> 32) as u32
}

fn counted(generation: u32, lookups: u32) -> u64 {
    u64::from(generation) << 32 | u64::from(lookups)
}

/// The low half of a `WHAT`: the type's four bits, and the number of the place.
fn kind_and_place(kind: u32, place: u32) -> u64 {
    u64::from(kind >> 12 | place << 4)
}

impl Inodes {
    /// None at all.
    pub(crate) fn empty(store: Store) -> Self {
        Self {
            store,
            free: Vec::new(),
            used: 0,
            count: 0,
            open: 0,
            names: Names::new(store),
            others: BTreeSet::new(),
            hand: 0,
            barren: false,
            needed: [0; 2],
            index: Index::new(),
            places: Vec::new(),
            doomed: Vec::new(),
        }
    }

    /// With the root only, in a store that has none yet.
    ///
    /// # Errors
    /// There is no room for even that.
    pub(crate) fn new(store: Store, root: OwnedFd, stat: &libc::statx) -> Result<Self, Errno> {
        let mut inodes = Self::empty(store);
        let id = inodes.insert(&mut Journal::new(store), Some(root), stat, None)?;
        debug_assert_eq!(id, ROOT_ID);
        store.store(Word::Root, store.get(store.inodes, 0, WHAT) >> 32);
        Ok(inodes)
    }

    /// With what a process before this one left; entries without a lookup are closed.
    ///
    /// # Errors
    /// There is no root.
    pub(crate) fn resume(store: Store) -> Result<Self, Errno> {
        let mut inodes = Self {
            // Never more than 2^22.
            used: store.load(Word::Inodes) as u32,
            ..Self::empty(store)
        };
        for place in 0..PLACES {
            let (dev, mount) = (
                store.get(store.places, place, 0),
                store.get(store.places, place, 1),
            );
            if mount == 0 {
                break;
            }
            // Stored with one added.
            inodes.places.push((dev, mount - 1));
        }
        let mut named = Vec::new();
        for entry in 0..inodes.used {
            let what = inodes.word(entry, WHAT);
            let known = (what & FD) as usize >> 4 < inodes.places.len();
            if lookups(inodes.word(entry, COUNT)) > 0 && what != 0 && known {
                let hash = inodes.index.hash(inodes.word(entry, INO));
                inodes.count += 1;
                inodes.open += usize::from(what >> 32 != 0);
                inodes.index_insert(hash, entry);
                named.extend(Names::place(inodes.word(entry, WHERE)));
            } else {
                inodes.set(entry, WHERE, 0);
                inodes.empty_entry(entry);
            }
        }
        inodes.names = Names::resume(store, named);
        inodes.get(ROOT_ID)?;
        Ok(inodes)
    }

    /// How many there are.
    #[cfg(test)]
    pub(crate) fn len(&self) -> usize {
        self.count
    }

    /// Entries that were ever used.
    pub(crate) fn used(&self) -> u32 {
        self.used
    }

    /// A generation that no inode but the root has had.
    pub(crate) fn next_generation(&self) -> u32 {
        let had = (1..self.used).map(|entry| generation(self.word(entry, COUNT)));
        had.max().unwrap_or(0).wrapping_add(1)
    }

    /// All but the root, for a snapshot.
    pub(crate) fn all(&self) -> impl Iterator<Item = Known<'_>> {
        (1..self.used).filter_map(|entry| {
            let (count, what) = (self.word(entry, COUNT), self.word(entry, WHAT));
            (lookups(count) > 0 && what != 0).then(|| Known {
                id: id(entry, generation(count)),
                lookups: lookups(count),
                kind: (what as u32 & 0xf) << 12,
                ino: self.word(entry, INO),
                birth: self.word(entry, BIRTH),
                fd: lend(&self.store, what >> 32),
            })
        })
    }

    /// Where an inode was last looked up: the folder's id, and the name, [to be checked](Names::checked).
    pub(crate) fn last_seen(&self, id_: u64) -> Option<(u64, [u8; 256])> {
        let place = self.word(self.number(id_)?, WHERE);
        let name = self.names.get(place)?;
        // The low half.
        let parent = place as u32;
        Some((id(parent, generation(self.word(parent, COUNT))), name))
    }

    /// For a guest that goes on from a snapshot: `used` entries, of which only the root is known, with a generation that none
    /// has had. The caller has [cleared](Self::clear) this.
    pub(crate) fn empty_for(&mut self, used: u32, generation: u32) {
        for entry in 1..used {
            for at in 0..WORDS {
                self.set(entry, at, 0);
            }
            self.set(entry, COUNT, counted(generation, 0));
        }
        self.store.store(Word::Inodes, u64::from(used));
    }

    /// Adds an inode that a snapshot knows, for [`resume`](Self::resume). One that is not there any more is stale for the
    /// guest until it forgets it.
    ///
    /// # Errors
    /// `EXDEV` for more mounts than can be told apart.
    pub(crate) fn plant(&mut self, found: Found<'_>) -> Result<(), Errno> {
        let Some(entry) = (found.id as u32).checked_sub(1) else {
            return Ok(());
        };
        let (ino, birth, place) = match &found.stat {
            Some(stat) => (stat.stx_ino, birth(stat), self.place_for(stat)?),
            // No file has this number, and the root's place is as good as any.
            None => (0, 0, 0),
        };
        self.set(entry, INO, ino);
        self.set(entry, BIRTH, birth);
        let fd = found.fd.map_or(0, give);
        self.set(entry, WHAT, fd << 32 | kind_and_place(found.kind, place));
        let named = found
            .at
            .and_then(|(parent, name)| Some(self.names.insert(name)? | u64::from(parent)));
        self.set(entry, WHERE, named.unwrap_or(0));
        let count = counted((found.id >> 32) as u32, found.lookups);
        self.set(entry, COUNT, count);
        Ok(())
    }

    /// How many of them have a descriptor.
    pub(crate) fn open(&self) -> usize {
        self.open
    }

    /// Whether all of them have one.
    pub(crate) fn all_open(&self) -> bool {
        self.open == self.count
    }

    fn word(&self, entry: u32, at: usize) -> u64 {
        self.store.get(self.store.inodes, entry as usize, at)
    }

    fn set(&self, entry: u32, at: usize, value: u64) {
        self.store.set(self.store.inodes, entry as usize, at, value);
    }

    /// An entry that is in use.
    fn entry(&self, entry: u32) -> Option<Inode<'_>> {
        if lookups(self.word(entry, COUNT)) == 0 {
            return None;
        }
        let what = self.word(entry, WHAT);
        let (dev, mount) = *self.places.get((what & FD) as usize >> 4)?;
        Some(Inode {
            fd: lend(&self.store, what >> 32)?,
            identity: Identity {
                dev: ((dev >> 32) as u32, dev as u32),
                ino: self.word(entry, INO),
                mount,
            },
            kind: (what as u32 & 0xf) << 12,
        })
    }

    fn number(&self, id: u64) -> Option<u32> {
        let entry = u32::try_from(id & 0xffff_ffff).ok()?.checked_sub(1)?;
        let count = self.word(entry, COUNT);
        (entry < self.used && u64::from(generation(count)) == id >> 32 && lookups(count) > 0)
            .then_some(entry)
    }

    /// The inode with this id.
    ///
    /// # Errors
    /// `ESTALE` if there is none, or not any more.
    pub(crate) fn get(&self, id: u64) -> Result<Inode<'_>, Errno> {
        self.number(id)
            .and_then(|entry| self.entry(entry))
            .ok_or(Errno::ESTALE)
    }

    /// A folder.
    ///
    /// # Errors
    /// `ESTALE` as [`get`](Self::get), `ENOTDIR` if it is something else.
    pub(crate) fn folder(&self, id: u64) -> Result<Inode<'_>, Errno> {
        let inode = self.get(id)?;
        if inode.kind == libc::S_IFDIR {
            Ok(inode)
        } else {
            Err(Errno::ENOTDIR)
        }
    }

    fn place(&self, identity: Identity) -> Option<u32> {
        let wanted = (identity.dev_word(), identity.mount);
        // One or two in most trees.
        let at = self.places.iter().position(|place| *place == wanted)?;
        u32::try_from(at).ok()
    }

    /// As [`place`](Self::place), and makes one.
    fn place_for(&mut self, stat: &libc::statx) -> Result<u32, Errno> {
        let identity = Identity::of(stat);
        match self.place(identity) {
            Some(place) => Ok(place),
            None if self.places.len() < PLACES => {
                let (dev, mount) = (identity.dev_word(), identity.mount);
                let at = self.places.len();
                self.store.set(self.store.places, at, 0, dev);
                self.store
                    .set(self.store.places, at, 1, mount.wrapping_add(1));
                self.places.push((dev, mount));
                // Below `PLACES`.
                Ok(at as u32)
            }
            None => Err(Errno::EXDEV),
        }
    }

    fn search(&self, stat: &libc::statx) -> Option<u32> {
        let identity = Identity::of(stat);
        let place = self.place(identity)?;
        self.index.find(self.index.hash(identity.ino), |entry| {
            self.is_file(entry, stat, place)
        })
    }

    /// Whether an entry is this file. One without a descriptor does not pin its inode's number, which another may have by now.
    fn is_file(&self, entry: u32, stat: &libc::statx, place: u32) -> bool {
        let what = self.word(entry, WHAT);
        self.word(entry, INO) == stat.stx_ino
            && (what & FD) as u32 >> 4 == place
            && (what >> 32 != 0
                || (self.word(entry, BIRTH) == birth(stat)
                    && what as u32 & 0xf == u32::from(stat.stx_mode) >> 12))
    }

    /// Whether a file can be told from another one that gets its inode number later.
    pub(crate) fn is_recognizable(stat: &libc::statx) -> bool {
        birth(stat) != 0
    }

    /// Whether an inode has no descriptor and cannot be opened again, since there was no room for its name.
    pub(crate) fn is_lost(&self, id: u64) -> bool {
        self.is_closed(id)
            && self
                .number(id)
                .is_some_and(|entry| self.word(entry, WHERE) == 0)
    }

    /// The number that an inode has on its file system.
    pub(crate) fn number_on_host(&self, id: u64) -> Option<u64> {
        self.number(id).map(|entry| self.word(entry, INO))
    }

    /// Where a file is now, if it is known: a folder that is known, and a name.
    pub(crate) fn seen_at(&mut self, stat: &libc::statx, at: (u64, Name<'_>)) {
        if let Some(entry) = self.search(stat) {
            self.found_at(entry, stat, Some(at));
        }
    }

    /// Gives an inode a descriptor that has none, which the caller has opened and looked at.
    pub(crate) fn recover(
        &mut self,
        id: u64,
        fd: OwnedFd,
        stat: &libc::statx,
    ) -> Result<(), Errno> {
        let entry = self.number(id).ok_or(Errno::ESTALE)?;
        if self.search(stat) != Some(entry) {
            return Err(Errno::ESTALE);
        }
        self.set(entry, WHAT, give(fd) << 32 | self.word(entry, WHAT) & FD);
        self.open += 1;
        Ok(())
    }

    /// Counts one more lookup of a file that is known already. `at` says where it was found: a folder that is known, and a name.
    pub(crate) fn find(
        &mut self,
        journal: &mut Journal,
        stat: &libc::statx,
        at: Option<(u64, Name<'_>)>,
    ) -> Option<u64> {
        let entry = self.search(stat)?;
        let before = self.word(entry, COUNT);
        journal.note(Change::Inode(entry), before)?;
        // One that is doomed by this very request lives again.
        let more = lookups(before).saturating_add(1);
        self.set(entry, COUNT, counted(generation(before), more));
        self.found_at(entry, stat, at);
        Some(id(entry, generation(before)))
    }

    /// Remembers where a file was found, for when it is to be opened again.
    fn found_at(&mut self, entry: u32, stat: &libc::statx, at: Option<(u64, Name<'_>)>) {
        let Some((parent, name)) = at.and_then(|(node, name)| Some((self.number(node)?, name)))
        else {
            return;
        };
        let before = self.word(entry, WHERE);
        if self.is_place(before, (parent, name)) {
            return;
        }
        self.set(entry, WHERE, 0);
        let is_folder = u32::from(stat.stx_mode) & libc::S_IFMT == libc::S_IFDIR;
        if stat.stx_nlink > 1 && !is_folder {
            self.remember_other(entry, before, (parent, name));
        } else {
            self.names.remove(before);
            self.forget_others(entry);
        }
        let mut place = self.names.insert(name);
        if place.is_none() && !self.others.is_empty() {
            for (_, other) in std::mem::take(&mut self.others) {
                self.names.remove(other);
            }
            place = self.names.insert(name);
        }
        // Without room for its name it keeps its descriptor.
        if let Some(place) = place {
            self.set(entry, WHERE, place | u64::from(parent));
            self.barren = false;
        }
    }

    fn is_place(&self, place: u64, (parent, name): (u32, Name<'_>)) -> bool {
        place as u32 == parent && self.names.is(place, name)
    }

    /// Places of other names of an entry.
    fn others(&self, entry: u32) -> Vec<u64> {
        let all = self.others.range((entry, 0)..=(entry, u64::MAX));
        all.map(|(_, place)| *place).collect()
    }

    fn forget_other(&mut self, entry: u32, place: u64) {
        if self.others.remove(&(entry, place)) {
            self.names.remove(place);
        }
    }

    fn forget_others(&mut self, entry: u32) {
        for place in self.others(entry) {
            self.forget_other(entry, place);
        }
    }

    /// A file with several names was last looked up at the place `before`, and is now `at` another one.
    fn remember_other(&mut self, entry: u32, before: u64, at: (u32, Name<'_>)) {
        if before != 0 {
            self.others.insert((entry, before));
        }
        let mut others = self.others(entry);
        if let Some(same) = others.iter().position(|place| self.is_place(*place, at)) {
            self.forget_other(entry, others.swap_remove(same));
        }
        let full = others.len() > MAX_FS_NAMES_OF_ONE || self.others.len() > MAX_FS_OTHER_NAMES;
        if full {
            for place in &others {
                if !self.is_at(entry, *place) {
                    self.forget_other(entry, *place);
                }
            }
        }
        let still = self.others(entry).len() > MAX_FS_NAMES_OF_ONE;
        if still || self.others.len() > MAX_FS_OTHER_NAMES {
            self.forget_other(entry, before);
        }
    }

    /// An entry's file is not where it was last looked up. Whether it is at another place that is known, which is the one to look at now.
    fn is_elsewhere(&mut self, entry: u32) -> bool {
        let places = self.others(entry);
        let Some(place) = places.into_iter().find(|place| self.is_at(entry, *place)) else {
            return false;
        };
        let before = self.word(entry, WHERE);
        self.others.remove(&(entry, place));
        self.set(entry, WHERE, place);
        self.names.remove(before);
        true
    }

    /// The request at hand is about the inodes `ids`, which keep their descriptors until the next one.
    pub(crate) fn need(&mut self, ids: [u64; 2]) {
        // The root always keeps its own.
        self.needed = ids.map(|id| self.number(id).unwrap_or(0));
    }

    /// Whether an inode is known and has no descriptor now.
    pub(crate) fn is_closed(&self, id: u64) -> bool {
        self.open < self.count
            && self
                .number(id)
                .is_some_and(|entry| self.word(entry, WHAT) >> 32 == 0)
    }

    /// The known inode of a file that has no descriptor now.
    pub(crate) fn closed(&self, stat: &libc::statx) -> Option<u64> {
        let entry = self.search(stat)?;
        let id = id(entry, generation(self.word(entry, COUNT)));
        self.is_closed(id).then_some(id)
    }

    /// The folder of a place of an entry's file, and the name there.
    fn folder_of(&self, entry: u32, mut place: u64) -> Result<(Folder<'_>, [u8; 256]), Errno> {
        let mut chain = Vec::new();
        let mut at = entry;
        let mut folder = loop {
            let name = self.names.get(place).ok_or(Errno::ESTALE)?;
            let parent = place as u32;
            chain.push((at, name));
            if let Some(fd) = lend(&self.store, self.word(parent, WHAT) >> 32) {
                break Folder::Known(fd);
            }
            if chain.len() > DEPTH {
                return Err(Errno::ESTALE);
            }
            at = parent;
            place = self.word(at, WHERE);
        };
        while let Some((at, name)) = chain.pop() {
            if chain.is_empty() {
                return Ok((folder, name));
            }
            folder = Folder::Opened(self.open_at(at, &folder, &name)?);
        }
        Err(Errno::ESTALE)
    }

    /// Opens an entry's file by its name in a folder.
    fn open_at(&self, entry: u32, folder: &Folder<'_>, name: &[u8; 256]) -> Result<OwnedFd, Errno> {
        let name = Names::checked(name).ok_or(Errno::ESTALE)?;
        // Whatever is there now, it is not what the guest means.
        let fd =
            sys::open_beneath(folder.as_fd(), name, libc::O_PATH, 0).map_err(
                |errno| match errno {
                    Errno::EMFILE | Errno::ENFILE | Errno::ENOMEM => errno,
                    _ => Errno::ESTALE,
                },
            )?;
        let stat = sys::stat(fd.as_fd())?;
        let place = self.place(Identity::of(&stat)).ok_or(Errno::ESTALE)?;
        if self.is_file(entry, &stat, place) {
            Ok(fd)
        } else {
            Err(Errno::ESTALE)
        }
    }

    /// Gives an inode a descriptor again. The caller has made room for it.
    ///
    /// # Errors
    /// `ESTALE` if the file is not where it was last looked up.
    pub(crate) fn reopen(&mut self, id: u64) -> Result<(), Errno> {
        let entry = self.number(id).ok_or(Errno::ESTALE)?;
        let fd = match self.open_where_it_was(entry) {
            Err(Errno::ESTALE) if self.is_elsewhere(entry) => self.open_where_it_was(entry)?,
            other => other?,
        };
        self.set(entry, WHAT, give(fd) << 32 | self.word(entry, WHAT) & FD);
        self.open += 1;
        self.barren = false;
        Ok(())
    }

    fn open_where_it_was(&self, entry: u32) -> Result<OwnedFd, Errno> {
        let (folder, name) = self.folder_of(entry, self.word(entry, WHERE))?;
        self.open_at(entry, &folder, &name)
    }

    /// Closes the descriptor of an inode that can be opened again; `false` if there is none. Folders keep theirs longer, since
    /// others are opened through them.
    pub(crate) fn evict(&mut self) -> bool {
        if self.barren {
            return false;
        }
        for folders in [false, true] {
            for _ in 0..self.used {
                self.hand = (self.hand + 1) % self.used;
                let entry = self.hand;
                let what = self.word(entry, WHAT);
                let is_folder = what as u32 & 0xf == libc::S_IFDIR >> 12;
                if what >> 32 == 0
                    || entry == 0
                    || is_folder != folders
                    || self.needed.contains(&entry)
                    || self.word(entry, WHERE) == 0
                {
                    continue;
                }
                if self.is_at(entry, self.word(entry, WHERE)) || self.is_elsewhere(entry) {
                    self.set(entry, WHAT, what & FD);
                    drop(take(what >> 32));
                    self.open -= 1;
                    return true;
                }
                // It was moved or removed; until it is found again it keeps its descriptor.
                self.forget_places(entry);
            }
        }
        self.barren = true;
        false
    }

    fn forget_places(&mut self, entry: u32) {
        let place = self.word(entry, WHERE);
        self.set(entry, WHERE, 0);
        self.names.remove(place);
        self.forget_others(entry);
    }

    /// Whether an entry's file is at this place.
    fn is_at(&self, entry: u32, place: u64) -> bool {
        let Ok((folder, name)) = self.folder_of(entry, place) else {
            return false;
        };
        Names::checked(&name)
            .and_then(|name| sys::stat_at(folder.as_fd(), name).ok())
            .is_some_and(|stat| {
                self.place(Identity::of(&stat))
                    .is_some_and(|place| self.is_file(entry, &stat, place))
            })
    }

    /// Adds a file that [`find`](Self::find) did not know, as looked up once. `stat` must be the one of `fd`; `at` as there.
    /// Without a descriptor it is opened when it is needed, for which it must be [recognizable](Self::is_recognizable).
    ///
    /// # Errors
    /// `ENFILE` if there is no room, `EXDEV` for more mounts than can be told apart.
    pub(crate) fn insert(
        &mut self,
        journal: &mut Journal,
        fd: Option<OwnedFd>,
        stat: &libc::statx,
        at: Option<(u64, Name<'_>)>,
    ) -> Result<u64, Errno> {
        let identity = Identity::of(stat);
        let place = self.place_for(stat)?;
        let entry = match self.free.last() {
            Some(entry) => *entry,
            None if (self.used as usize) < self.store.inodes.entries() => self.used,
            None => return Err(Errno::ENFILE),
        };
        let before = self.word(entry, COUNT);
        journal
            .note(Change::Inode(entry), before)
            .ok_or(Errno::ENFILE)?;
        if self.free.pop().is_none() {
            self.used += 1;
            self.store.store(Word::Inodes, u64::from(self.used));
        }
        self.set(entry, INO, identity.ino);
        let kind = u32::from(stat.stx_mode) & libc::S_IFMT;
        let is_open = fd.is_some();
        let what = fd.map_or(0, give) << 32 | kind_and_place(kind, place);
        self.set(entry, WHAT, what);
        self.set(entry, BIRTH, birth(stat));
        self.set(entry, COUNT, counted(generation(before), 1));
        self.count += 1;
        self.open += usize::from(is_open);
        self.barren = false;
        self.found_at(entry, stat, at);
        self.index_insert(self.index.hash(identity.ino), entry);
        Ok(id(entry, generation(before)))
    }

    /// The guest forgets `count` lookups. Returns whether the inode has none left; it goes with [`sweep`](Self::sweep).
    pub(crate) fn forget(&mut self, journal: &mut Journal, id: u64, count: u64) -> bool {
        let Some(entry) = self.number(id).filter(|_| id != ROOT_ID) else {
            return false;
        };
        let before = self.word(entry, COUNT);
        // A count that has reached its end is not known any more.
        if lookups(before) == u32::MAX || journal.note(Change::Inode(entry), before).is_none() {
            return false;
        }
        let left = u64::from(lookups(before)).saturating_sub(count);
        // Not more than before.
        self.set(entry, COUNT, counted(generation(before), left as u32));
        if left == 0 {
            self.doomed.push(entry);
        }
        left == 0
    }

    /// Closes what has no lookups: the request that forgot it is done.
    pub(crate) fn sweep(&mut self) {
        while let Some(entry) = self.doomed.pop() {
            let gone = lookups(self.word(entry, COUNT)) == 0 && self.word(entry, WHAT) != 0;
            if gone {
                self.index_remove(entry);
                self.count -= 1;
                self.close(entry);
            }
        }
    }

    /// Makes an entry free.
    fn close(&mut self, entry: u32) {
        self.forget_places(entry);
        self.open -= usize::from(self.word(entry, WHAT) >> 32 != 0);
        self.barren = false;
        self.empty_entry(entry);
    }

    fn empty_entry(&mut self, entry: u32) {
        let what = self.word(entry, WHAT);
        let next = generation(self.word(entry, COUNT)).wrapping_add(1);
        self.set(entry, COUNT, counted(next, 0));
        self.set(entry, WHAT, 0);
        drop(take(what >> 32));
        self.free.push(entry);
    }

    /// Forgets all but the root: the guest starts over. Ids of before stay invalid.
    pub(crate) fn clear(&mut self) {
        for entry in 1..self.used {
            if self.word(entry, WHAT) != 0 {
                self.close(entry);
            }
        }
        self.doomed.clear();
        self.names = Names::new(self.store);
        self.others.clear();
        self.index = Index::new();
        self.count = 1;
        self.index_insert(self.index.hash(self.word(0, INO)), 0);
    }

    fn index_insert(&mut self, hash: u32, entry: u32) {
        let store = self.store;
        self.index.insert(hash, entry, self.count, |entry| {
            store.get(store.inodes, entry as usize, INO)
        });
    }

    fn index_remove(&mut self, entry: u32) {
        let store = self.store;
        let hash = self.index.hash(self.word(entry, INO));
        self.index.remove(hash, entry, |entry| {
            store.get(store.inodes, entry as usize, INO)
        });
    }
}

/// Inode numbers to entries: open addressing with linear probing. Slots hold an entry's number plus one.
#[derive(Debug)]
struct Index {
    slots: Vec<u32>,
    /// Unknown to guests, who choose inode numbers on some file systems.
    seed: u64,
}

impl Index {
    fn new() -> Self {
        Self {
            slots: vec![0; 64],
            seed: RandomState::new().hash_one(0) | 1,
        }
    }

    fn hash(&self, ino: u64) -> u32 {
        // Both halves of the product have something of every bit.
        let mixed = u128::from(ino ^ self.seed) * 0x9e37_79b9_7f4a_7c15;
        ((mixed >> 64) ^ (mixed >> 32)) as u32
    }

    fn mask(&self) -> usize {
        self.slots.len() - 1
    }

    fn find(&self, hash: u32, is: impl Fn(u32) -> bool) -> Option<u32> {
        let mut at = hash as usize & self.mask();
        loop {
            let entry = self.slots[at].checked_sub(1)?;
            if is(entry) {
                return Some(entry);
            }
            at = (at + 1) & self.mask();
        }
    }

    /// Adds `entry` as the one that makes `count` of them.
    fn insert(&mut self, hash: u32, entry: u32, count: usize, ino: impl Fn(u32) -> u64) {
        if count * 8 >= self.slots.len() * 7 {
            let more = vec![0; self.slots.len() * 2];
            let old = std::mem::replace(&mut self.slots, more);
            for entry in old.into_iter().filter_map(|slot| slot.checked_sub(1)) {
                self.put(self.hash(ino(entry)), entry);
            }
        }
        self.put(hash, entry);
    }

    fn put(&mut self, hash: u32, entry: u32) {
        let mut at = hash as usize & self.mask();
        while self.slots[at] != 0 {
            at = (at + 1) & self.mask();
        }
        self.slots[at] = entry + 1;
    }

    fn remove(&mut self, hash: u32, entry: u32, ino: impl Fn(u32) -> u64) {
        let mask = self.mask();
        let mut hole = hash as usize & mask;
        while self.slots[hole] != entry + 1 {
            if self.slots[hole] == 0 {
                return;
            }
            hole = (hole + 1) & mask;
        }
        // What was pushed on by the one that goes moves back.
        let mut at = hole;
        loop {
            at = (at + 1) & mask;
            let Some(other) = self.slots[at].checked_sub(1) else {
                break;
            };
            let home = self.hash(ino(other)) as usize & mask;
            if (at.wrapping_sub(home) & mask) >= (at.wrapping_sub(hole) & mask) {
                self.slots[hole] = self.slots[at];
                hole = at;
            }
        }
        self.slots[hole] = 0;
    }
}

#[cfg(test)]
mod tests {
    use std::ffi::CString;
    use std::fs::File;
    use std::path::Path;

    use super::*;
    use crate::passthrough::journal::Origin;
    use crate::passthrough::sys;

    fn open(path: &Path) -> (OwnedFd, libc::statx) {
        let fd = OwnedFd::from(File::open(path).unwrap());
        let stat = sys::stat(fd.as_fd()).unwrap();
        (fd, stat)
    }

    struct Table {
        dir: tempfile::TempDir,
        store: Store,
        journal: Journal,
        inodes: Inodes,
    }

    fn table() -> Table {
        let dir = tempfile::tempdir().unwrap();
        let (fd, stat) = open(dir.path());
        let store = Store::new(2000).unwrap();
        Table {
            store,
            journal: Journal::new(store),
            inodes: Inodes::new(store, fd, &stat).unwrap(),
            dir,
        }
    }

    impl Table {
        fn add(&mut self, name: &str) -> u64 {
            let path = self.dir.path().join(name);
            if !path.exists() {
                std::fs::write(&path, b"").unwrap();
            }
            let (fd, stat) = open(&path);
            let name = CString::new(name).unwrap();
            let at = Some((ROOT_ID, Name::new(&name).unwrap()));
            self.inodes
                .insert(&mut self.journal, Some(fd), &stat, at)
                .unwrap()
        }

        fn find(&mut self, name: &str) -> Option<u64> {
            let (_fd, stat) = open(&self.dir.path().join(name));
            let name = CString::new(name).unwrap();
            let at = Some((ROOT_ID, Name::new(&name).unwrap()));
            self.inodes.find(&mut self.journal, &stat, at)
        }

        fn forget(&mut self, id: u64, count: u64) -> bool {
            let gone = self.inodes.forget(&mut self.journal, id, count);
            self.inodes.sweep();
            gone
        }
    }

    const ORIGIN: Origin = Origin { queue: 1, head: 0 };

    #[test]
    fn inodes_live_as_long_as_they_are_looked_up() {
        let mut table = table();
        std::fs::write(table.dir.path().join("a"), b"").unwrap();
        assert_eq!(table.find("a"), None);
        let id = table.add("a");
        assert_eq!(table.find("a"), Some(id));
        assert!(!table.forget(id, 1));
        assert!(table.inodes.get(id).is_ok());
        assert_eq!(table.inodes.folder(id).unwrap_err(), Errno::ENOTDIR);
        assert!(table.forget(id, 1));
        assert_eq!(table.inodes.get(id).unwrap_err(), Errno::ESTALE);
        assert_eq!(table.inodes.len(), 1);
    }

    #[test]
    fn an_old_id_does_not_name_what_took_its_place() {
        let mut table = table();
        let first = table.add("a");
        table.forget(first, u64::MAX);
        let second = table.add("a");
        assert_ne!(first, second);
        assert_eq!(first as u32, second as u32, "the entry is used again");
        assert_eq!(table.inodes.get(first).unwrap_err(), Errno::ESTALE);
        assert!(
            !table.forget(first, 1),
            "forgetting an old id does not hurt the new one"
        );
        table.inodes.clear();
        assert_eq!(table.inodes.get(second).unwrap_err(), Errno::ESTALE);
        assert!(table.inodes.get(ROOT_ID).is_ok());
    }

    #[test]
    fn the_root_stays_and_invented_ids_are_stale() {
        let mut table = table();
        assert!(!table.forget(ROOT_ID, u64::MAX));
        assert!(table.inodes.folder(ROOT_ID).is_ok());
        for id in [0, 2, 3, u64::MAX, 1 << 32, (1 << 32) | 1, 0xffff_ffff] {
            assert_eq!(table.inodes.get(id).unwrap_err(), Errno::ESTALE, "{id:#x}");
            assert!(!table.forget(id, 1));
        }
    }

    #[test]
    fn many_are_found_again_in_any_order_of_coming_and_going() {
        let mut table = table();
        let name = |n: u32| format!("f{n}");
        let mut ids: Vec<_> = (0..600).map(|n| Some(table.add(&name(n)))).collect();
        for n in (0..600).step_by(3) {
            let id = ids[n as usize].take().unwrap();
            assert!(table.forget(id, 1));
        }
        for n in 0..600 {
            assert_eq!(table.find(&name(n)), ids[n as usize], "{n}");
        }
        let other = Inodes::resume(table.store).unwrap();
        assert_eq!((other.len(), table.inodes.len()), (401, 401));
        for id in ids.into_iter().flatten() {
            assert!(other.get(id).is_ok());
        }
    }

    #[test]
    fn what_a_request_counted_is_taken_back_with_it() {
        let mut table = table();
        let old = table.add("old");
        table.journal.begin(ORIGIN, 1, 1, false);
        assert_eq!(table.find("old"), Some(old));
        let new = table.add("new");
        assert!(!table.inodes.forget(&mut table.journal, old, 1));
        assert!(table.inodes.forget(&mut table.journal, old, 1));
        // The process dies here.
        table.journal = Journal::resume(table.store, |origin| origin == ORIGIN);
        table.inodes = Inodes::resume(table.store).unwrap();
        assert_eq!(table.inodes.get(new).unwrap_err(), Errno::ESTALE);
        assert!(table.inodes.get(old).is_ok());
        assert!(table.forget(old, 1), "counted once, as before");
    }

    #[test]
    fn what_gave_its_descriptor_up_is_opened_again_if_it_is_the_same() {
        let mut table = table();
        let ids: Vec<u64> = (0..4).map(|n| table.add(&format!("f{n}"))).collect();
        let fd = |table: &Table, id| table.inodes.get(id).is_ok();
        table.inodes.need([ids[1], 0]);
        // The third has another name by now, and the fourth is gone.
        let path = |name: &str| table.dir.path().join(name);
        std::fs::rename(path("f2"), path("moved")).unwrap();
        std::fs::remove_file(path("f3")).unwrap();
        assert!(table.inodes.evict());
        assert!(!table.inodes.evict(), "all others must keep theirs");
        assert!(!fd(&table, ids[0]) && table.inodes.is_closed(ids[0]));
        assert!(ids[1..].iter().all(|id| fd(&table, *id)));
        assert_eq!((table.inodes.open(), table.inodes.len()), (4, 5));
        // Found where it is, it is the same inode, and can give its own up.
        assert_eq!(table.find("moved"), Some(ids[2]));
        assert!(table.inodes.evict());
        assert!(table.inodes.is_closed(ids[2]));
        // Another process finds it so.
        table.inodes = Inodes::resume(table.store).unwrap();
        assert_eq!((table.inodes.open(), table.inodes.len()), (3, 5));
        for id in [ids[0], ids[2]] {
            assert!(table.inodes.is_closed(id));
            table.inodes.reopen(id).unwrap();
            assert!(fd(&table, id));
        }
    }

    #[test]
    fn what_was_never_opened_is_opened_when_it_is_needed() {
        let mut table = table();
        let path = table.dir.path().join("a");
        std::fs::write(&path, b"").unwrap();
        let (fd, stat) = open(&path);
        drop(fd);
        assert!(Inodes::is_recognizable(&stat));
        let at = Some((ROOT_ID, Name::new(c"a").unwrap()));
        let id = table
            .inodes
            .insert(&mut table.journal, None, &stat, at)
            .unwrap();
        assert!(table.inodes.is_closed(id) && !table.inodes.is_lost(id));

        assert_eq!(table.find("a"), Some(id));
        table.inodes.reopen(id).unwrap();
        assert!(table.inodes.get(id).is_ok());
        // One whose name nobody kept is lost until it is found again.
        let path = table.dir.path().join("b");
        std::fs::write(&path, b"").unwrap();
        let (fd, stat) = open(&path);
        let id = table
            .inodes
            .insert(&mut table.journal, None, &stat, None)
            .unwrap();
        assert!(table.inodes.is_lost(id));
        assert_eq!(table.inodes.reopen(id), Err(Errno::ESTALE));
        table.inodes.recover(id, fd, &stat).unwrap();
        assert!(table.inodes.get(id).is_ok() && table.inodes.all_open());
    }

    #[test]
    fn another_file_in_its_place_is_not_the_inode() {
        let mut table = table();
        let (id, other) = (table.add("a"), table.add("b"));
        table.inodes.need([other, 0]);
        assert!(table.inodes.evict());
        let (file, kept) = (table.dir.path().join("a"), table.dir.path().join("kept"));
        std::fs::rename(&file, &kept).unwrap();
        std::fs::write(&file, b"another").unwrap();
        assert_eq!(table.inodes.reopen(id), Err(Errno::ESTALE));
        assert_eq!(table.find("a"), None);
        std::fs::rename(&kept, &file).unwrap();
        table.inodes.reopen(id).unwrap();
        // The name of a link is none of a file.
        table.inodes.need([other, 0]);
        assert!(table.inodes.evict());
        std::fs::rename(&file, &kept).unwrap();
        std::os::unix::fs::symlink(&kept, &file).unwrap();
        assert_eq!(table.inodes.reopen(id), Err(Errno::ESTALE));
    }

    #[test]
    fn some_names_of_a_file_are_remembered_and_those_that_are_left_before_others() {
        let mut table = table();
        let (id, other) = (table.add("a"), table.add("b"));
        table.inodes.need([other, 0]);
        let path = table.dir.path().to_owned();
        let names = (0..2 * MAX_FS_NAMES_OF_ONE).map(|n| format!("name-{n}"));
        for name in names.clone() {
            std::fs::hard_link(path.join("a"), path.join(&name)).unwrap();
            assert_eq!(table.find(&name), Some(id));
            assert_eq!(table.find(&name), Some(id), "once more is no more");
        }
        assert_eq!(table.inodes.others.len(), MAX_FS_NAMES_OF_ONE);
        // All but the first are gone, and another one comes, and goes.
        for name in names {
            std::fs::remove_file(path.join(&name)).unwrap();
        }
        std::fs::hard_link(path.join("a"), path.join("again")).unwrap();
        for name in ["a", "again", "a", "again"] {
            assert_eq!(table.find(name), Some(id));
        }
        assert!(table.inodes.evict() && table.inodes.is_closed(id));
        std::fs::remove_file(path.join("again")).unwrap();
        table.inodes.reopen(id).unwrap();
        assert!(table.inodes.evict() && table.inodes.is_closed(id));

        // With one name, or forgotten, it has no others.
        assert_eq!(table.find("a"), Some(id));
        std::fs::hard_link(path.join("a"), path.join("last")).unwrap();
        assert_eq!(table.find("last"), Some(id));
        assert!(!table.inodes.others.is_empty());
        assert!(table.forget(id, u64::MAX));
        assert!(table.inodes.others.is_empty());
    }

    #[test]
    fn a_folder_that_gave_its_descriptor_up_is_gone_through() {
        let mut table = table();
        std::fs::create_dir(table.dir.path().join("d")).unwrap();
        let folder = table.add("d");
        let (fd, stat) = open(&{
            let path = table.dir.path().join("d/file");
            std::fs::write(&path, b"").unwrap();
            path
        });
        let at = Some((folder, Name::new(c"file").unwrap()));
        let file = table
            .inodes
            .insert(&mut table.journal, Some(fd), &stat, at)
            .unwrap();
        assert!(table.inodes.evict() && table.inodes.evict());
        assert!(table.inodes.is_closed(folder) && table.inodes.is_closed(file));
        table.inodes.reopen(file).unwrap();
        assert!(table.inodes.get(file).is_ok());
        assert!(table.inodes.is_closed(folder), "opened for the moment only");
        assert!(table.inodes.evict());
        table.inodes.reopen(folder).unwrap();
    }
}
