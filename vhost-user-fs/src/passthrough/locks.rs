//! Locks that hold on the host too.
//!
//! **Job.** Locks of fcntl(2) by the guest's lock owners, as locks of open file descriptions of the host, one description for
//! each owner and inode; locks of flock(2) on the guest's open file itself.
//! **Who is not trusted.** The guest: the number of owners that hold locks is bounded.
//! **Why this way.** An open file description is the only lock owner of the host that is not this process as a whole. Nothing
//! here waits, since the host's waiting calls would take a thread each: who wants to wait for a lock is told so, and asks again
//! ([`Passthrough::lock_again`]). That changes nothing that a process after this one would not find as well, so such a request
//! needs no note.

use std::collections::HashMap;
use std::os::fd::{BorrowedFd, OwnedFd};

use nix::errno::Errno;

use super::store::{LOCKS, Store, Word, give, lend, take};
use super::{Passthrough, sys};
use crate::fuse::decode::Lock;
use crate::fuse::reply::Put;

/// One description per inode and owner. The descriptions are in the [`Store`], with node and owner, so that they outlive this
/// process.
#[derive(Debug)]
pub(super) struct Locks {
    store: Store,
    /// Node and owner to an entry.
    held: HashMap<(u64, u64), usize>,
}

// An entry: the node, the owner, the descriptor.
const NODE: usize = 0;
const OWNER: usize = 1;
const FILE: usize = 2;

impl Locks {
    /// None, in a store that has none yet.
    pub(super) fn new(store: Store) -> Self {
        Self {
            store,
            held: HashMap::new(),
        }
    }

    /// With those that a process before this one left.
    pub(super) fn resume(store: Store) -> Self {
        let mut locks = Self::new(store);
        for entry in 0..LOCKS {
            let at = |word| store.get(store.locks, entry, word);
            if at(FILE) != 0 {
                locks.held.insert((at(NODE), at(OWNER)), entry);
            }
        }
        locks
    }

    pub(super) fn len(&self) -> usize {
        self.held.len()
    }

    fn has(&self, node: u64, owner: u64) -> bool {
        self.held.contains_key(&(node, owner))
    }

    fn get(&self, node: u64, owner: u64) -> Option<BorrowedFd<'_>> {
        let entry = *self.held.get(&(node, owner))?;
        lend(&self.store, self.store.get(self.store.locks, entry, FILE))
    }

    fn insert(&mut self, node: u64, owner: u64, fd: OwnedFd) -> Result<(), Errno> {
        let store = self.store;
        let entry = (0..LOCKS)
            .find(|entry| store.get(store.locks, *entry, FILE) == 0)
            .ok_or(Errno::ENOLCK)?;
        store.set(store.locks, entry, NODE, node);
        store.set(store.locks, entry, OWNER, owner);
        store.set(store.locks, entry, FILE, give(fd));
        self.held.insert((node, owner), entry);
        Ok(())
    }

    fn close(store: Store, entry: usize) {
        let stored = store.get(store.locks, entry, FILE);
        store.set(store.locks, entry, FILE, 0);
        drop(take(stored));
    }

    /// Ends all locks of one owner on one inode.
    pub(super) fn release(&mut self, node: u64, owner: u64) {
        if let Some(entry) = self.held.remove(&(node, owner)) {
            Self::close(self.store, entry);
        }
    }

    /// Ends all locks on an inode.
    pub(super) fn forget(&mut self, node: u64) {
        self.end(|inode| inode == node);
    }

    pub(super) fn clear(&mut self) {
        self.end(|_| true);
    }

    fn end(&mut self, which: impl Fn(u64) -> bool) {
        let store = self.store;
        self.held.retain(|(inode, _), entry| {
            let ends = which(*inode);
            if ends {
                Self::close(store, *entry);
            }
            !ends
        });
    }
}

/// `struct flock` for a range of the protocol, whose end is its last byte.
fn host_lock(lock: &Lock) -> Result<libc::flock, Errno> {
    let start = i64::try_from(lock.start).map_err(|_| Errno::EINVAL)?;
    // No length means up to the end, wherever it is.
    let len = match i64::try_from(lock.end) {
        Ok(i64::MAX) | Err(_) => 0,
        Ok(end) => end - start + 1,
    };
    Ok(libc::flock {
        // Checked by the decoder to be one of the three.
        l_type: lock.kind as libc::c_short,
        l_whence: libc::SEEK_SET as libc::c_short,
        l_start: start,
        l_len: len,
        l_pid: 0,
    })
}

impl Passthrough {
    /// The description that holds an owner's locks on an inode.
    fn lock_file(&mut self, node: u64, owner: u64) -> Result<BorrowedFd<'_>, Errno> {
        if !self.locks.has(node, owner) {
            if self.locks.len() >= LOCKS {
                return Err(Errno::ENOLCK);
            }
            self.room()?;
            let inode = self.inodes.get(node)?;
            if inode.kind != libc::S_IFREG {
                return Err(Errno::EBADF);
            }
            // A lock for writing needs a file that is open for writing; a read-only tree has none.
            let flags = if self.config.readonly {
                libc::O_RDONLY
            } else {
                libc::O_RDWR
            };
            let fd = match self.own.reopen(inode.fd(), flags) {
                Err(Errno::EACCES | Errno::EPERM | Errno::EROFS | Errno::ETXTBSY) => {
                    self.own.reopen(inode.fd(), libc::O_RDONLY)?
                }
                other => other?,
            };
            self.locks.insert(node, owner, fd)?;
        }
        self.locks.get(node, owner).ok_or(Errno::ENOLCK)
    }

    pub(super) fn get_lock(
        &mut self,
        node: u64,
        lock: &Lock,
        out: &mut Vec<u8>,
    ) -> Result<(), Errno> {
        if !self.config.posix_lock || lock.flock {
            return Err(Errno::ENOSYS);
        }
        let mut host = host_lock(lock)?;
        let fd = self.lock_file(node, lock.owner)?;
        sys::range_lock(fd, libc::F_OFD_GETLK, &mut host)?;
        let start = host.l_start.cast_unsigned();
        let end = match host.l_len {
            0 => i64::MAX.cast_unsigned(),
            len => (host.l_start.saturating_add(len) - 1).cast_unsigned(),
        };
        // A holder that is no process of this guest has no number there.
        out.u64(start)
            .u64(end)
            .u32(u32::from(host.l_type.cast_unsigned()))
            .u32(0);
        Ok(())
    }

    /// Whether a lock that was not free, and is to be waited for, is had by now.
    ///
    /// # Errors
    /// What the guest is told.
    pub fn lock_again(&mut self, node: u64, lock: &Lock) -> Result<bool, Errno> {
        // The session in which it was asked for may be over.
        if self.store.load(Word::Agreed) == 0 {
            return Err(Errno::ESTALE);
        }
        self.need([node, node])?;
        self.set_lock(node, lock, true)
    }

    /// Sets a lock or ends it. `Ok(false)` if it has to be waited for.
    pub(super) fn set_lock(&mut self, node: u64, lock: &Lock, wait: bool) -> Result<bool, Errno> {
        let allowed = if lock.flock {
            self.config.flock
        } else {
            self.config.posix_lock
        };
        if !allowed {
            return Err(Errno::ENOSYS);
        }
        let unlock = i64::from(lock.kind) == i64::from(libc::F_UNLCK);
        let result = if lock.flock {
            let operation = if unlock {
                libc::LOCK_UN
            } else if i64::from(lock.kind) == i64::from(libc::F_RDLCK) {
                libc::LOCK_SH
            } else {
                libc::LOCK_EX
            };
            sys::flock(self.handles.file(lock.fh)?, operation)
        } else {
            if unlock && !self.locks.has(node, lock.owner) {
                return Ok(true);
            }
            let mut host = host_lock(lock)?;
            let fd = self.lock_file(node, lock.owner)?;
            sys::range_lock(fd, libc::F_OFD_SETLK, &mut host)
        };
        match result {
            Err(Errno::EAGAIN | Errno::EACCES) if wait => Ok(false),
            Err(Errno::EACCES) => Err(Errno::EAGAIN),
            other => other.map(|()| true),
        }
    }
}
