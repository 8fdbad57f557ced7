//! What the guest holds of the tree, as bytes that go into a snapshot and come out of it.
//!
//! **Job.** Writes the session, the inodes that the guest knows, by their paths, and what it has open; finds all that again
//! for a guest that goes on, under the same numbers.
//! **Who is not trusted.** Whoever made the snapshot: sizes are held against limits before anything is allocated, entries against the
//! tables that they go into, and a path is looked up beneath the tree and through no link, as everything here is. The most that a
//! forged one reaches is a file of this tree, which the guest could have looked up itself.
//! **Why this way.** Descriptors end with their process, and a file handle of the kernel's means nothing on a copy of the tree, so
//! paths it is. Where the tree is the same one, a file must be the same one too, by inode number and time of birth; in a copy
//! these differ for all files, and path and type have to do. What is not found is stale for the guest, and all else goes on.

use std::collections::HashMap;
use std::ffi::{CStr, CString};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use ipc::codec::{CodecError, decode_within, encode_within};
use ipc::limits::MAX_DEVICE_STATE;
use nix::errno::Errno;
use serde::{Deserialize, Serialize};
use thiserror::Error;

use super::handles::{Handle, Handles};
use super::inodes::{self, Found, Inodes};
use super::locks::Locks;
use super::store::Word;
use super::{Passthrough, ReadAhead, SESSION, sys};
use crate::fuse::Name;
use crate::fuse::wire::ROOT_ID;

/// Of this layout.
const VERSION: u32 = 1;
/// Bytes of a path at most, with its end (Linux, `PATH_MAX`).
const PATH: usize = libc::PATH_MAX as usize;
/// Folders above a file, for one that is found through them.
const DEPTH: usize = 256;
/// Descriptors that stay free for files that the guest opens next, in sixteenths of all.
const SPARE: usize = 4;

/// Why there is no state, or why it cannot be gone on from.
#[derive(Debug, Error)]
pub enum StateError {
    /// Locks are not part of it.
    #[error("locks that hold on the host cannot be saved")]
    Locks,
    /// Mappings are not part of it.
    #[error("files that the guest has mapped (DAX) cannot be saved")]
    Mappings,
    /// More than a snapshot holds.
    #[error("the guest knows of more files than a snapshot holds ({MAX_DEVICE_STATE} bytes)")]
    Large(#[source] CodecError),
    /// Not what [`Passthrough::save`] wrote.
    #[error("the snapshot's state of this folder cannot be understood")]
    Damaged(#[source] CodecError),
    /// Of a later program.
    #[error(
        "the snapshot's state of this folder has version {0}; this program reads version {VERSION}"
    )]
    Version(u32),
    /// An entry that no table has.
    #[error("the snapshot's state of this folder has {what} that cannot be")]
    Entry {
        /// Which kind.
        what: &'static str,
    },
    /// The session needs what the folder's options do not give.
    #[error(
        "the guest's session uses FUSE flags {0:#x}, which the options of this folder do not give"
    )]
    Session(u64),
    /// The tables or the tree cannot be used.
    #[error("{what}")]
    Host {
        /// What was tried.
        what: &'static str,
        /// What the kernel said.
        source: Errno,
    },
}

#[derive(Debug, Serialize, Deserialize)]
struct Saved {
    version: u32,
    /// [`Word::Agreed`]
    agreed: u64,
    /// Inode number and birth of the tree's root.
    root: (u64, u64),
    /// Entries of inodes and of handles that were ever used, and a generation that none of them has had.
    inodes: (u32, u32),
    handles: (u32, u32),
    known: Vec<SavedInode>,
    open: Vec<SavedHandle>,
}

/// A file, as it is found again.
#[derive(Debug, Serialize, Deserialize)]
struct SavedFile {
    ino: u64,
    birth: u64,
    /// Beneath the root, without a slash in front; empty for the root, `None` if it has none any more.
    path: Option<Vec<u8>>,
}

#[derive(Debug, Serialize, Deserialize)]
struct SavedInode {
    id: u64,
    lookups: u32,
    kind: u32,
    file: SavedFile,
}

#[derive(Debug, Serialize, Deserialize)]
struct SavedHandle {
    number: u64,
    what: SavedOpen,
    file: SavedFile,
}

#[derive(Debug, Clone, Copy, Serialize, Deserialize)]
enum SavedOpen {
    File { append: bool, flags: u32 },
    Folder,
}

/// Names of open files in the tree: what is in front of each path.
struct Paths {
    prefix: Vec<u8>,
}

impl Paths {
    fn new(tree: &Passthrough) -> Result<Self, Errno> {
        let mut text = [0; PATH];
        let root = tree.inodes.get(ROOT_ID)?.fd();
        let len = tree.own.path(root, &mut text)?;
        let mut prefix = text[..len].to_vec();
        if prefix != b"/" {
            prefix.push(b'/');
        }
        Ok(Self { prefix })
    }

    fn of(&self, tree: &Passthrough, fd: BorrowedFd<'_>) -> Option<Vec<u8>> {
        let mut text = [0; PATH];
        let len = tree.own.path(fd, &mut text).ok()?;
        if len == PATH {
            return None;
        }
        if text[..len] == self.prefix[..self.prefix.len() - 1] || text[..len] == *self.prefix {
            return Some(Vec::new());
        }
        // One that is gone ends in " (deleted)": there is no such file, or it is another one, which its identity tells.
        text[..len].strip_prefix(&*self.prefix).map(<[u8]>::to_vec)
    }
}

/// A path that leads to nothing but a file beneath: components, none of them special.
fn checked(path: &[u8]) -> Option<CString> {
    let path = CString::new(path).ok()?;
    let bytes = path.as_bytes();
    let fine = bytes.len() < PATH
        && bytes
            .split(|byte| *byte == b'/')
            .all(|part| CString::new(part).is_ok_and(|part| Name::new(&part).is_ok()));
    fine.then_some(path)
}

fn kind_of(stat: &libc::statx) -> u32 {
    u32::from(stat.stx_mode) & libc::S_IFMT
}

/// Finds files of a snapshot again.
struct Finder<'a> {
    root: BorrowedFd<'a>,
    /// The tree is the very one that the snapshot was made of.
    same_tree: bool,
}

impl Finder<'_> {
    fn find(&self, file: &SavedFile, kind: u32) -> Option<(OwnedFd, libc::statx)> {
        let path = file.path.as_deref()?;
        let path = if path.is_empty() {
            c".".to_owned()
        } else {
            checked(path)?
        };
        let fd = sys::find_beneath(self.root, &path).ok()?;
        let stat = sys::stat(fd.as_fd()).ok()?;
        let same = (stat.stx_ino, inodes::birth(&stat)) == (file.ino, file.birth);
        (kind_of(&stat) == kind && (same || !self.same_tree)).then_some((fd, stat))
    }
}

impl Passthrough {
    /// Whether all that the guest holds can be part of a snapshot.
    pub fn can_be_saved(&self) -> bool {
        // Nobody can be asked for the locks of a description that somebody else holds a part of.
        !self.config.posix_lock && !self.config.flock
    }

    /// What the guest holds. No request is at hand.
    ///
    /// # Errors
    /// See [`StateError`].
    pub fn save(&mut self) -> Result<Vec<u8>, StateError> {
        let host = |what| move |source| StateError::Host { what, source };
        if !self.can_be_saved() {
            return Err(StateError::Locks);
        }
        if self.has_mappings() && !self.window_is_watched {
            return Err(StateError::Mappings);
        }
        if self.waiting {
            self.go_on(|_| false).map_err(host("what the guest held"))?;
        }
        let root = sys::stat(self.inodes.get(ROOT_ID).map_err(host("the root"))?.fd())
            .map_err(host("the root"))?;
        let paths = Paths::new(self).map_err(host("the root's path"))?;
        let mut known: Vec<SavedInode> = Vec::new();
        let mut closed = Vec::new();
        let mut by_id: HashMap<u64, Vec<u8>> = HashMap::new();
        by_id.insert(ROOT_ID, Vec::new());
        for inode in self.inodes.all() {
            let path = inode.fd.and_then(|fd| paths.of(self, fd));
            match (&path, inode.fd) {
                (Some(path), _) if inode.kind == libc::S_IFDIR => {
                    by_id.insert(inode.id, path.clone());
                }
                (_, None) => closed.push(known.len()),
                _ => {}
            }
            known.push(SavedInode {
                id: inode.id,
                lookups: inode.lookups,
                kind: inode.kind,
                file: SavedFile {
                    ino: inode.ino,
                    birth: inode.birth,
                    path,
                },
            });
        }
        for at in closed {
            let path = self.last_path(known[at].id, &by_id);
            known[at].file.path = path;
        }
        let open = self.handles.all().map(|kept| {
            let (what, fd) = match kept.handle {
                Some(Handle::File { fd, append, flags }) => {
                    (SavedOpen::File { append, flags }, Some(fd))
                }
                Some(Handle::Folder { fd, .. }) => (SavedOpen::Folder, Some(fd)),
                None => (SavedOpen::Folder, None),
            };
            let stat = fd.and_then(|fd| sys::stat(fd).ok());
            SavedHandle {
                number: kept.number,
                what,
                file: SavedFile {
                    ino: stat.map_or(0, |stat| stat.stx_ino),
                    birth: stat.map_or(0, |stat| inodes::birth(&stat)),
                    path: fd.and_then(|fd| paths.of(self, fd)),
                },
            }
        });
        let saved = Saved {
            version: VERSION,
            agreed: self.store.load(Word::Agreed),
            root: (root.stx_ino, inodes::birth(&root)),
            inodes: (self.inodes.used(), self.inodes.next_generation()),
            handles: (self.handles.used(), self.handles.next_generation()),
            open: open.collect(),
            known,
        };
        encode_within::<MAX_DEVICE_STATE, _>(&saved).map_err(StateError::Large)
    }

    /// Writes what [`save`](Self::save) gives to `file`, which is empty.
    ///
    /// # Errors
    /// See [`StateError`].
    pub fn save_to(&mut self, file: BorrowedFd<'_>) -> Result<(), StateError> {
        let bytes = self.save()?;
        let mut done = 0;
        while done < bytes.len() {
            done += sys::write_at(file, &bytes[done..], done as u64).map_err(|source| {
                StateError::Host {
                    what: "writing what the guest holds",
                    source,
                }
            })?;
        }
        Ok(())
    }

    /// [Loads](Self::load) what is in `file`.
    ///
    /// # Errors
    /// See [`StateError`].
    pub fn load_from(&mut self, file: BorrowedFd<'_>) -> Result<(), StateError> {
        const PIECE: usize = 64 << 10;
        let mut bytes = Vec::new();
        loop {
            let start = bytes.len();
            bytes.resize(start + PIECE, 0);
            let read = sys::read_at(file, &mut bytes[start..], start as u64).map_err(|source| {
                StateError::Host {
                    what: "reading what the guest held",
                    source,
                }
            })?;
            bytes.truncate(start + read);
            // One byte more than there may be is refused by the decoder.
            if read == 0 || bytes.len() > MAX_DEVICE_STATE {
                break;
            }
        }
        self.load(&bytes)
    }

    /// The path of an inode without a descriptor, by where it was last looked up.
    fn last_path(&self, id: u64, folders: &HashMap<u64, Vec<u8>>) -> Option<Vec<u8>> {
        let mut parts: Vec<Vec<u8>> = Vec::new();
        let mut at = id;
        let above = loop {
            if let Some(path) = folders.get(&at) {
                break path;
            }
            let (parent, name) = self.inodes.last_seen(at)?;
            let name = CStr::from_bytes_until_nul(&name).ok()?.to_bytes().to_vec();
            parts.push(name);
            if parts.len() > DEPTH {
                return None;
            }
            at = parent;
        };
        let mut path = above.clone();
        for part in parts.into_iter().rev() {
            if !path.is_empty() {
                path.push(b'/');
            }
            path.extend(part);
        }
        Some(path)
    }

    /// Goes on with what [`save`](Self::save) gave, in place of what is held now.
    ///
    /// # Errors
    /// See [`StateError`]; this is of no further use then.
    pub fn load(&mut self, bytes: &[u8]) -> Result<(), StateError> {
        let host = |what| move |source| StateError::Host { what, source };
        let saved: Saved =
            decode_within::<MAX_DEVICE_STATE, _>(bytes).map_err(StateError::Damaged)?;
        if !self.can_be_saved() {
            return Err(StateError::Locks);
        }
        self.check(&saved)?;
        if self.waiting {
            self.go_on(|_| false).map_err(host("what the guest held"))?;
        }
        self.clear();
        // Decides how files are opened.
        self.store.store(Word::Agreed, saved.agreed);
        let lost = self.plant_all(&saved).map_err(host("the tables"))?;
        self.inodes = Inodes::resume(self.store).map_err(host("the tables"))?;
        self.handles = Handles::resume(self.store);
        self.locks = Locks::resume(self.store);
        self.ahead = ReadAhead::default();
        let all = saved.known.len() + saved.open.len();
        if lost > 0 {
            ipc::log::warn!(
                "{lost} of {all} files that the guest knows or has open were not found again: it is told that they are stale"
            );
        } else {
            ipc::log::info!("{all} files that the guest knows or has open were found again");
        }
        Ok(())
    }

    /// Whether the tables can hold it.
    fn check(&self, saved: &Saved) -> Result<(), StateError> {
        let wrong = |what| Err(StateError::Entry { what });
        if saved.version != VERSION {
            return Err(StateError::Version(saved.version));
        }
        let foreign = saved.agreed & !(self.wanted() | SESSION);
        if foreign != 0 {
            return Err(StateError::Session(foreign));
        }
        if saved.agreed == 0 && !(saved.known.is_empty() && saved.open.is_empty()) {
            return wrong("files without a session");
        }
        let (inodes, handles) = (saved.inodes.0 as usize, saved.handles.0 as usize);
        if !(1..=self.store.inodes.entries()).contains(&inodes)
            || handles > self.store.handles.entries()
        {
            return wrong("more files than the tables hold");
        }
        // Both were written in the order of their entries.
        let mut last = 1;
        for inode in &saved.known {
            let entry = inode.id & 0xffff_ffff;
            let kinds = [
                libc::S_IFREG,
                libc::S_IFDIR,
                libc::S_IFLNK,
                libc::S_IFIFO,
                libc::S_IFSOCK,
                libc::S_IFCHR,
                libc::S_IFBLK,
            ];
            if entry <= last
                || entry > inodes as u64
                || inode.lookups == 0
                || !kinds.contains(&inode.kind)
            {
                return wrong("an inode");
            }
            last = entry;
        }
        let mut last = 0;
        for handle in &saved.open {
            let entry = handle.number & 0xffff_ffff;
            if entry <= last || entry > handles as u64 {
                return wrong("an open file");
            }
            last = entry;
        }
        if saved.open.len() + 1 > self.config.descriptors {
            return wrong("more open files than there may be");
        }
        Ok(())
    }

    /// Fills the tables; returns how many files were not found.
    fn plant_all(&mut self, saved: &Saved) -> Result<usize, Errno> {
        let root = self
            .own
            .reopen(self.inodes.get(ROOT_ID)?.fd(), libc::O_PATH)?;
        let stat = sys::stat(root.as_fd())?;
        let finder = Finder {
            root: root.as_fd(),
            same_tree: (stat.stx_ino, inodes::birth(&stat)) == saved.root,
        };
        self.inodes.empty_for(saved.inodes.0, saved.inodes.1);
        Handles::empty_for(self.store, saved.handles.0, saved.handles.1);
        let mut lost = 0;
        let mut folders: HashMap<&[u8], u32> = HashMap::new();
        folders.insert(b"", 0);
        for inode in saved.known.iter().filter(|one| one.kind == libc::S_IFDIR) {
            if let Some(path) = &inode.file.path {
                // Was checked to be above 1.
                folders.insert(path, (inode.id as u32) - 1);
            }
        }
        let most = self.config.descriptors;
        let mut room = (most - most / 16 * SPARE).saturating_sub(saved.open.len() + 1);
        for inode in &saved.known {
            let found = finder.find(&inode.file, inode.kind);
            let path = inode.file.path.as_deref().unwrap_or_default();
            let (above, name) = match path.iter().rposition(|byte| *byte == b'/') {
                Some(at) => (&path[..at], &path[at + 1..]),
                None => (&b""[..], path),
            };
            let name = CString::new(name).unwrap_or_default();
            let at = found
                .as_ref()
                .and_then(|_| Some((*folders.get(above)?, Name::new(&name).ok()?)));
            let (fd, stat) = found.map_or((None, None), |(fd, stat)| (Some(fd), Some(stat)));
            let opens_later = at.is_some() && stat.as_ref().is_some_and(Inodes::is_recognizable);
            let fd = match fd {
                Some(fd) if room > 0 => {
                    room -= 1;
                    Some(fd)
                }
                _ => None,
            };
            let stat = stat.filter(|_| fd.is_some() || opens_later);
            lost += usize::from(stat.is_none());
            self.inodes.plant(Found {
                id: inode.id,
                lookups: inode.lookups,
                kind: inode.kind,
                at: at.filter(|_| stat.is_some()),
                stat,
                fd,
            })?;
        }
        for handle in &saved.open {
            let opened = self.open_again(&finder, handle);
            let is_lost = opened.is_none();
            lost += usize::from(is_lost);
            let stand_in = || self.own.reopen(finder.root, libc::O_PATH);
            let handle_ = match (handle.what, opened) {
                (_, Some(handle)) => handle,
                (SavedOpen::File { append, flags }, None) => Handle::File {
                    fd: stand_in()?,
                    append,
                    flags,
                },
                (SavedOpen::Folder, None) => Handle::Folder {
                    fd: stand_in()?,
                    position: 0,
                },
            };
            Handles::plant(self.store, handle.number, handle_, is_lost);
        }
        Ok(lost)
    }

    fn open_again(&self, finder: &Finder<'_>, handle: &SavedHandle) -> Option<Handle> {
        match handle.what {
            SavedOpen::File { append, flags } => {
                let (found, _) = finder.find(&handle.file, libc::S_IFREG)?;
                // What it was cut to then it is not cut to once more.
                let flags = flags & !libc::O_TRUNC.cast_unsigned();
                let host = self.host_flags(flags).ok()?;
                Some(Handle::File {
                    fd: self.own.reopen(found.as_fd(), host).ok()?,
                    append,
                    flags,
                })
            }
            SavedOpen::Folder => {
                let (found, _) = finder.find(&handle.file, libc::S_IFDIR)?;
                let flags = libc::O_RDONLY | libc::O_DIRECTORY;
                Some(Handle::Folder {
                    fd: self.own.reopen(found.as_fd(), flags).ok()?,
                    position: 0,
                })
            }
        }
    }
}

#[cfg(test)]
mod tests;
