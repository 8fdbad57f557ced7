//! The inodes that the guest knows.
//!
//! **Job.** Node ids to `O_PATH` descriptors and back: found again by file identity, counted by lookups, gone when the guest
//! has forgotten them as often as it was told about them.
//! **Who is not trusted.** The guest: ids may be invented, forgotten too often or never. An id holds a generation, so that an
//! old one does not name whatever took its place; the number of inodes is bounded by the caller's budget of descriptors.
//! **Why this way.** A descriptor pins its inode and its mount, so while an entry lives no other file can have its identity,
//! and a rename by anyone moves nothing under our feet.

use std::collections::HashMap;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use nix::errno::Errno;

use crate::fuse::wire::ROOT_ID;

/// What makes a file the same file.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
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
}

/// One inode.
#[derive(Debug)]
pub(crate) struct Inode {
    fd: OwnedFd,
    pub(crate) identity: Identity,
    /// `S_IFMT` bits; an inode never changes them.
    pub(crate) kind: u32,
    lookups: u64,
}

impl Inode {
    pub(crate) fn fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

#[derive(Debug)]
struct Slot {
    generation: u32,
    inode: Option<Inode>,
}

/// All inodes.
#[derive(Debug)]
pub(crate) struct Inodes {
    slots: Vec<Slot>,
    free: Vec<u32>,
    by_identity: HashMap<Identity, u32>,
}

/// Node ids are a slot's number plus one, and its generation above that; the root is slot 0 of generation 0.
fn id(slot: u32, generation: u32) -> u64 {
    u64::from(generation) << 32 | (u64::from(slot) + 1)
}

impl Inodes {
    /// With the root only.
    pub(crate) fn new(root: OwnedFd, stat: &libc::statx) -> Self {
        let mut inodes = Self {
            slots: Vec::new(),
            free: Vec::new(),
            by_identity: HashMap::new(),
        };
        let id = inodes.insert(root, stat);
        debug_assert_eq!(id, ROOT_ID);
        inodes
    }

    /// How many there are.
    pub(crate) fn len(&self) -> usize {
        self.by_identity.len()
    }

    fn slot(&self, id: u64) -> Option<u32> {
        let index = u32::try_from(id & 0xffff_ffff).ok()?.checked_sub(1)?;
        let slot = self.slots.get(index as usize)?;
        (u64::from(slot.generation) == id >> 32 && slot.inode.is_some()).then_some(index)
    }

    /// The inode with this id.
    ///
    /// # Errors
    /// `ESTALE` if there is none, or not any more.
    pub(crate) fn get(&self, id: u64) -> Result<&Inode, Errno> {
        self.slot(id)
            .and_then(|index| self.slots[index as usize].inode.as_ref())
            .ok_or(Errno::ESTALE)
    }

    /// A folder.
    ///
    /// # Errors
    /// `ESTALE` as [`get`](Self::get), `ENOTDIR` if it is something else.
    pub(crate) fn folder(&self, id: u64) -> Result<&Inode, Errno> {
        let inode = self.get(id)?;
        if inode.kind == libc::S_IFDIR {
            Ok(inode)
        } else {
            Err(Errno::ENOTDIR)
        }
    }

    /// Counts one more lookup of a file that is known already.
    pub(crate) fn find(&mut self, identity: Identity) -> Option<u64> {
        let index = *self.by_identity.get(&identity)?;
        let slot = self.slots.get_mut(index as usize)?;
        let inode = slot.inode.as_mut()?;
        inode.lookups = inode.lookups.saturating_add(1);
        Some(id(index, slot.generation))
    }

    /// Adds a file that [`find`](Self::find) did not know, as looked up once. `stat` must be the one of `fd`.
    pub(crate) fn insert(&mut self, fd: OwnedFd, stat: &libc::statx) -> u64 {
        let identity = Identity::of(stat);
        let inode = Inode {
            fd,
            identity,
            kind: u32::from(stat.stx_mode) & libc::S_IFMT,
            lookups: 1,
        };
        let index = self.free.pop().unwrap_or_else(|| {
            self.slots.push(Slot {
                generation: 0,
                inode: None,
            });
            // There are fewer slots than descriptors, whose numbers have 31 bits.
            (self.slots.len() - 1) as u32
        });
        let slot = &mut self.slots[index as usize];
        slot.inode = Some(inode);
        self.by_identity.insert(identity, index);
        id(index, slot.generation)
    }

    /// The guest forgets `count` lookups. Returns whether the inode is gone now.
    pub(crate) fn forget(&mut self, id: u64, count: u64) -> bool {
        let Some(index) = self.slot(id).filter(|_| id != ROOT_ID) else {
            return false;
        };
        let slot = &mut self.slots[index as usize];
        let Some(inode) = slot.inode.as_mut() else {
            return false;
        };
        inode.lookups = inode.lookups.saturating_sub(count);
        if inode.lookups > 0 {
            return false;
        }
        self.by_identity.remove(&inode.identity);
        slot.inode = None;
        slot.generation = slot.generation.wrapping_add(1);
        self.free.push(index);
        true
    }

    /// Forgets all but the root: the guest starts over. Ids of before stay invalid.
    pub(crate) fn clear(&mut self) {
        for (index, slot) in self.slots.iter_mut().enumerate().skip(1) {
            if let Some(inode) = slot.inode.take() {
                self.by_identity.remove(&inode.identity);
                slot.generation = slot.generation.wrapping_add(1);
                // As in `insert`.
                self.free.push(index as u32);
            }
        }
        self.by_identity.shrink_to_fit();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::passthrough::sys;
    use std::fs::File;

    fn open(path: &std::path::Path) -> (OwnedFd, libc::statx) {
        let fd = OwnedFd::from(File::open(path).unwrap());
        let stat = sys::stat(fd.as_fd()).unwrap();
        (fd, stat)
    }

    fn table() -> (tempfile::TempDir, Inodes) {
        let dir = tempfile::tempdir().unwrap();
        let (fd, stat) = open(dir.path());
        (dir, Inodes::new(fd, &stat))
    }

    #[test]
    fn inodes_live_as_long_as_they_are_looked_up() {
        let (dir, mut inodes) = table();
        std::fs::write(dir.path().join("a"), b"").unwrap();
        let (fd, stat) = open(&dir.path().join("a"));
        assert_eq!(inodes.find(Identity::of(&stat)), None);
        let id = inodes.insert(fd, &stat);
        assert_eq!(inodes.find(Identity::of(&stat)), Some(id));
        assert!(!inodes.forget(id, 1));
        assert!(inodes.get(id).is_ok());
        assert_eq!(inodes.folder(id).unwrap_err(), Errno::ENOTDIR);
        assert!(inodes.forget(id, 1));
        assert_eq!(inodes.get(id).unwrap_err(), Errno::ESTALE);
        assert_eq!(inodes.len(), 1);
    }

    #[test]
    fn an_old_id_does_not_name_what_took_its_place() {
        let (dir, mut inodes) = table();
        std::fs::write(dir.path().join("a"), b"").unwrap();
        let add = |inodes: &mut Inodes| {
            let (fd, stat) = open(&dir.path().join("a"));
            inodes.insert(fd, &stat)
        };
        let first = add(&mut inodes);
        inodes.forget(first, u64::MAX);
        let second = add(&mut inodes);
        assert_ne!(first, second);
        assert_eq!(
            first & 0xffff_ffff,
            second & 0xffff_ffff,
            "the slot is used again"
        );
        assert_eq!(inodes.get(first).unwrap_err(), Errno::ESTALE);
        assert!(
            !inodes.forget(first, 1),
            "forgetting an old id does not hurt the new one"
        );
        inodes.clear();
        assert_eq!(inodes.get(second).unwrap_err(), Errno::ESTALE);
        assert!(inodes.get(ROOT_ID).is_ok());
    }

    #[test]
    fn the_root_stays_and_invented_ids_are_stale() {
        let (_dir, mut inodes) = table();
        assert!(!inodes.forget(ROOT_ID, u64::MAX));
        assert!(inodes.folder(ROOT_ID).is_ok());
        for id in [0, 2, 3, u64::MAX, 1 << 32, (1 << 32) | 1, 0xffff_ffff] {
            assert_eq!(inodes.get(id).unwrap_err(), Errno::ESTALE, "{id:#x}");
            assert!(!inodes.forget(id, 1));
        }
    }
}
