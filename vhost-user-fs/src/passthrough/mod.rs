//! Requests done on the files of the shared tree.
//!
//! **Job.** [`Passthrough`] holds what the guest knows (inodes, open files, locks) and does each request, one file per family:
//! `entries` names, `attributes`, `files`, `folders`, `xattrs`, `locks`.
//! **Who is not trusted.** The guest, and other processes that change the tree meanwhile. Every name is one component that is
//! looked up beneath an open folder without following anything; nothing but regular files and folders is ever opened.
//! **Why this way.** An inode is an `O_PATH` descriptor, so what is checked is what is used: there is no path to swap. Beyond the
//! limit of descriptors `inodes` opens one again where it was last found.

mod attributes;
mod creds;
mod entries;
mod files;
mod folders;
mod handles;
mod inodes;
mod journal;
mod locks;
mod mapping;
mod moved;
mod names;
mod saved;
mod store;
mod sys;
mod xattrmap;
mod xattrs;

use std::ffi::CString;
use std::os::fd::{AsFd, OwnedFd};

use nix::errno::Errno;

use crate::fuse::decode::Layout;
use crate::fuse::reply::{Put, Validity};
use crate::fuse::wire::{self, fopen, init};
use crate::fuse::{Body, InHeader, Name, Request};
use folders::ReadAhead;
use handles::Handles;
use inodes::Inodes;
use journal::Journal;
use locks::Locks;
use store::Word;

pub use creds::may_switch_user;
pub use files::Place;
pub use ipc::spec::ids::Translation;
pub use journal::Origin;
pub use mapping::{Mapped, is_writable};
pub use saved::StateError;
pub use store::Store;
pub use sys::OwnFds;
pub use xattrmap::XattrMap;

/// What the guest may keep of what it has seen (`--cache`).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Cache {
    /// Nothing: every use asks the host.
    Never,
    /// Names, attributes and folders; no file contents.
    Metadata,
    /// Names and attributes for a second; contents as long as the file's times do not change.
    #[default]
    Auto,
    /// Everything, as if nobody else used the tree.
    Always,
}

impl Cache {
    /// Seconds that names and attributes hold; a day stands for ever.
    fn validity(self) -> Validity {
        let seconds = match self {
            Self::Never => 0,
            Self::Auto => 1,
            Self::Metadata | Self::Always => 86400,
        };
        Validity {
            entry: seconds,
            attr: seconds,
        }
    }
}

/// How the tree is shared.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Config {
    /// What the guest may keep.
    pub cache: Cache,
    /// The guest may gather writes.
    pub writeback: bool,
    /// Nothing may change.
    pub readonly: bool,
    /// Extended attributes.
    pub xattr: bool,
    /// Attributes have other names on the host.
    pub xattrmap: Option<XattrMap>,
    /// POSIX access control lists; needs `xattr`.
    pub posix_acl: bool,
    /// The guest is told where mounts are inside of the tree.
    pub announce_submounts: bool,
    /// Folders are read with the attributes of their entries.
    pub readdirplus: bool,
    /// Locks of fcntl(2) hold on the host.
    pub posix_lock: bool,
    /// Locks of flock(2) hold on the host.
    pub flock: bool,
    /// Files that are not cached can be mapped shared.
    pub allow_mmap: bool,
    /// New files belong to the guest's user: this process may take any user and group of its user namespace.
    pub switch_user: bool,
    /// The guest's users are others on the host.
    pub users: Translation,
    /// The guest's groups are others on the host.
    pub groups: Translation,
    /// Files that the guest opens with `O_NOATIME` keep their time of access.
    pub noatime: bool,
    /// Inodes, open files and locks at most, together.
    pub descriptors: usize,
    /// Bytes of one `WRITE` at most; the guest's queue may allow less.
    pub max_write: u32,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            cache: Cache::Auto,
            writeback: false,
            readonly: false,
            xattr: false,
            xattrmap: None,
            posix_acl: false,
            announce_submounts: false,
            readdirplus: true,
            posix_lock: false,
            flock: false,
            allow_mmap: false,
            switch_user: false,
            users: Translation::default(),
            groups: Translation::default(),
            noatime: false,
            descriptors: 1024,
            max_write: 1 << 20,
        }
    }
}

/// In [`Word::Agreed`]: there is a session, whatever flags it has. `FUSE_INIT` has no such flag.
const SESSION: u64 = 1 << 63;

/// What becomes of a request.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Outcome {
    /// The reply is in the buffer.
    Reply,
    /// The protocol has no reply for it.
    Silent,
    /// It is for a lock that somebody else has: [`Passthrough::lock_again`].
    Waits,
}

/// The shared tree.
#[derive(Debug)]
pub struct Passthrough {
    config: Config,
    own: OwnFds,
    store: Store,
    journal: Journal,
    inodes: Inodes,
    handles: Handles,
    locks: Locks,
    ahead: ReadAhead,
    /// What a process before this one left has not been taken over yet.
    waiting: bool,
    /// Files can appear in a shared memory region of the device.
    window: bool,
    /// The front end knows what is there, and asks for no state while anything is.
    window_is_watched: bool,
    /// The host's name of `security.capability`, if it is another.
    mapped_capability: Option<CString>,
}

impl Passthrough {
    /// Shares the folder `root` (an `O_PATH` descriptor is enough), with its tables in `store`, which has none yet. Makes
    /// `own` the working folder of this process, and its file mode mask empty.
    ///
    /// # Errors
    /// `root` is no folder or cannot be looked at, `own` is none.
    pub fn new(root: OwnedFd, own: OwnFds, store: Store, config: Config) -> Result<Self, Errno> {
        sys::work_in(&own)?;
        // The guest's mask was applied by its kernel, or comes with the request.
        nix::sys::stat::umask(nix::sys::stat::Mode::empty());
        let stat = sys::stat(root.as_fd())?;
        if u32::from(stat.stx_mode) & libc::S_IFMT != libc::S_IFDIR {
            return Err(Errno::ENOTDIR);
        }
        Ok(Self {
            mapped_capability: mapped_capability(&config),
            config,
            own,
            store,
            journal: Journal::new(store),
            inodes: Inodes::new(store, root, &stat)?,
            handles: Handles::new(store),
            locks: Locks::new(store),
            ahead: ReadAhead::default(),
            waiting: false,
            window: false,
            window_is_watched: false,
        })
    }

    /// Makes `root` the root in `store`, which has none yet, for a process after this one: it then [resumes](Self::resume).
    ///
    /// # Errors
    /// `root` is no folder or cannot be looked at.
    pub fn plant(root: OwnedFd, store: Store) -> Result<(), Errno> {
        let stat = sys::stat(root.as_fd())?;
        if u32::from(stat.stx_mode) & libc::S_IFMT != libc::S_IFDIR {
            return Err(Errno::ENOTDIR);
        }
        Inodes::new(store, root, &stat).map(drop)
    }

    /// Shares the folder that a process before this one shared, with what it left in `store`, as soon as
    /// [`go_on`](Self::go_on) is called. `root`, if there is one, is the same folder as then, by another mount; it is compared
    /// and not used.
    ///
    /// # Errors
    /// `ESTALE` if `root` is another folder by now.
    pub fn resume(
        root: Option<&OwnedFd>,
        own: OwnFds,
        store: Store,
        config: Config,
    ) -> Result<Self, Errno> {
        sys::work_in(&own)?;
        // The guest's mask was applied by its kernel, or comes with the request.
        nix::sys::stat::umask(nix::sys::stat::Mode::empty());
        let then = store::lend(&store, store.load(Word::Root)).ok_or(Errno::ESTALE)?;
        let file = |fd| sys::stat(fd).map(|s| (s.stx_dev_major, s.stx_dev_minor, s.stx_ino));
        if let Some(root) = root
            && file(then)? != file(root.as_fd())?
        {
            return Err(Errno::ESTALE);
        }
        Ok(Self {
            mapped_capability: mapped_capability(&config),
            config,
            own,
            store,
            journal: Journal::new(store),
            inodes: Inodes::empty(store),
            handles: Handles::new(store),
            locks: Locks::new(store),
            ahead: ReadAhead::default(),
            waiting: true,
            window: false,
            window_is_watched: false,
        })
    }

    /// Takes over what was left. `in_flight` tells whether the reply to a request is still owed.
    ///
    /// # Errors
    /// `ESTALE` if nothing was left.
    pub fn go_on(&mut self, in_flight: impl Fn(Origin) -> bool) -> Result<(), Errno> {
        // First: it takes changes of the tables back.
        self.waiting = false;
        self.journal = Journal::resume(self.store, in_flight);
        self.inodes = Inodes::resume(self.store)?;
        self.handles = Handles::resume(self.store);
        self.locks = Locks::resume(self.store);
        Ok(())
    }

    /// Where the request came from whose fate decides what [`go_on`](Self::go_on) does; `None` if it need not be called, or can
    /// be told that nothing is in flight.
    pub fn awaited(&self) -> Option<Origin> {
        self.waiting.then(|| Journal::at_hand(self.store)).flatten()
    }

    /// Whether [`go_on`](Self::go_on) is still to be called.
    pub fn is_waiting(&self) -> bool {
        self.waiting
    }

    /// A request begins, before [`serve`](Self::serve) and the like. `replayed` says that a process before this one took it.
    pub fn begin(&mut self, origin: Origin, header: &InHeader, replayed: bool) {
        self.journal
            .begin(origin, header.opcode, header.unique, replayed);
    }

    /// The reply has been published.
    pub fn end(&mut self) {
        self.journal.end();
        self.inodes.sweep();
    }

    /// How requests of this guest are laid out.
    pub fn layout(&self) -> Layout {
        Layout {
            setxattr_ext: self.agreed(init::SETXATTR_EXT),
        }
    }

    /// Descriptors that the guest holds: of inodes, open files and locks.
    pub fn held(&self) -> usize {
        self.inodes.open() + self.handles.len() + self.locks.len()
    }

    /// Whether one more descriptor may be opened for the guest.
    fn room(&mut self) -> Result<(), Errno> {
        while self.held() >= self.config.descriptors {
            if !self.inodes.evict() {
                return Err(Errno::ENFILE);
            }
        }
        Ok(())
    }

    /// The request at hand is about these inodes, so they need descriptors.
    fn need(&mut self, nodes: [u64; 2]) -> Result<(), Errno> {
        self.inodes.need(nodes);
        for node in nodes {
            self.need_open(node)?;
        }
        Ok(())
    }

    fn need_open(&mut self, node: u64) -> Result<(), Errno> {
        if self.inodes.is_closed(node) {
            self.room()?;
            return match self.inodes.reopen(node) {
                Err(Errno::ESTALE) => self.find_moved(node),
                other => other,
            };
        }
        Ok(())
    }

    /// A name is about to go. If the guest knows what it stands for, that must be open, as it cannot be found again.
    fn keep_open(&mut self, parent: u64, name: Name<'_>) -> Result<(), Errno> {
        if self.inodes.all_open() {
            return Ok(());
        }
        let Ok(stat) = sys::stat_at(self.inodes.folder(parent)?.fd(), name) else {
            return Ok(());
        };
        match self.inodes.closed(&stat) {
            Some(node) => self.need_open(node),
            None => Ok(()),
        }
    }

    /// Forgets everything that the guest was told: it is gone, or starts over.
    pub fn clear(&mut self) {
        self.handles.clear();
        self.locks.clear();
        self.inodes.clear();
        self.ahead = ReadAhead::default();
        self.store.store(Word::Agreed, 0);
    }

    /// Does a request, other than `READ` and `WRITE`, and puts the reply's body into `reply`, which is empty and will get at
    /// most `room` bytes.
    ///
    /// # Errors
    /// What the guest is told.
    pub fn serve(
        &mut self,
        request: &Request<'_>,
        reply: &mut Vec<u8>,
        room: usize,
    ) -> Result<Outcome, Errno> {
        if self.config.readonly && changes_files(&request.body) {
            return Err(Errno::EROFS);
        }
        let header = &request.header;
        let node = header.nodeid;
        if self.store.load(Word::Agreed) == 0
            && let Some(instead) = without_session(&request.body)
        {
            return instead;
        }
        self.need(nodes(header, &request.body))?;
        match request.body {
            Body::Lookup { name } => self.lookup(node, name, reply)?,
            Body::Forget { nlookup } => {
                self.forget(node, nlookup);
                return Ok(Outcome::Silent);
            }
            Body::BatchForget(entries) => {
                for (node, nlookup) in entries.iter() {
                    self.forget(node, nlookup);
                }
                return Ok(Outcome::Silent);
            }
            Body::GetAttr { .. } => self.get_attr(node, reply)?,
            Body::SetAttr(set) => self.set_attr(node, &set, reply)?,
            Body::Statx { .. } => self.statx(node, reply)?,
            Body::ReadLink => self.read_link(node, reply)?,
            Body::Symlink { name, target } => self.symlink(header, name, target, reply)?,
            Body::Mknod {
                name,
                mode,
                rdev,
                umask,
            } => self.mknod(header, name, (mode, umask), rdev, reply)?,
            Body::Mkdir { name, mode, umask } => self.mkdir(header, name, (mode, umask), reply)?,
            Body::Unlink { name } => self.unlink(node, name, false)?,
            Body::Rmdir { name } => self.unlink(node, name, true)?,
            Body::Rename {
                name,
                newdir,
                newname,
                flags,
            } => self.rename((node, name), (newdir, newname), flags)?,
            Body::Link { oldnodeid, name } => self.link(oldnodeid, node, name, reply)?,
            Body::Open { flags, open_flags } => self.open(node, flags, open_flags, reply)?,
            Body::Create {
                name,
                flags,
                mode,
                umask,
                open_flags,
            } => self.create(header, name, (mode, umask), (flags, open_flags), reply)?,
            Body::TmpFile { flags, mode, umask } => {
                self.tmpfile(header, (mode, umask), flags, reply)?;
            }
            // Their data goes between guest memory and file, which only the caller has, as it has the shared memory region.
            Body::Read { .. }
            | Body::Write { .. }
            | Body::SetupMapping { .. }
            | Body::RemoveMapping(_) => return Err(Errno::EIO),
            Body::Flush { lock_owner, .. } => self.flush(node, lock_owner)?,
            Body::Fsync { fh, datasync } => self.fsync(fh, datasync)?,
            Body::Release {
                fh,
                release_flags,
                lock_owner,
            } => self.release(node, fh, release_flags, lock_owner)?,
            Body::OpenDir { .. } => self.open_folder(node, reply)?,
            Body::ReadDir { fh, offset, size } => {
                self.read_folder(node, fh, offset, room.min(size as usize), false, reply)?;
            }
            Body::ReadDirPlus { fh, offset, size } => {
                self.read_folder(node, fh, offset, room.min(size as usize), true, reply)?;
            }
            Body::ReleaseDir { fh } => self.release_folder(fh)?,
            Body::FsyncDir { fh, datasync } => self.fsync_folder(fh, datasync)?,
            Body::StatFs => self.stat_fs(node, reply)?,
            Body::Access { mask } => self.access(header, mask)?,
            Body::SetXattr {
                name,
                value,
                flags,
                setxattr_flags,
            } => self.set_xattr_once(node, name, value, (flags, setxattr_flags))?,
            Body::GetXattr { name, size } => self.get_xattr(node, name, size, reply)?,
            Body::ListXattr { size } => self.list_xattr(node, size, reply)?,
            Body::RemoveXattr { name } => self.remove_xattr_once(node, name)?,
            Body::Lseek { fh, offset, whence } => self.lseek(fh, offset, whence, reply)?,
            Body::Fallocate {
                fh,
                offset,
                length,
                mode,
            } => self.fallocate(fh, offset, length, mode)?,
            Body::CopyFileRange {
                fh_in,
                off_in,
                fh_out,
                off_out,
                len,
                flags,
                nodeid_out: _,
            } => self.copy_range((fh_in, off_in), (fh_out, off_out), len, flags, reply)?,
            Body::GetLk(lock) => self.get_lock(node, &lock, reply)?,
            Body::SetLk { lock, wait } => {
                if !self.set_lock(node, &lock, wait)? {
                    return Ok(Outcome::Waits);
                }
            }
            Body::SyncFs => self.sync_file_system(node)?,
            // Only those that wait can be interrupted, and they are not known here.
            Body::Interrupt { .. } => return Ok(Outcome::Silent),
            Body::Init {
                major,
                minor,
                max_readahead,
                flags,
            } => self.init(major, minor, max_readahead, flags, reply)?,
            Body::Destroy => self.clear(),
        }
        Ok(Outcome::Reply)
    }

    fn forget(&mut self, node: u64, count: u64) {
        if self.inodes.forget(&mut self.journal, node, count) {
            self.locks.forget(node);
        }
    }

    /// What this end wants of the flags that a guest may offer.
    fn wanted(&self) -> u64 {
        let mut flags = init::ASYNC_READ
            | init::ATOMIC_O_TRUNC
            | init::BIG_WRITES
            | init::AUTO_INVAL_DATA
            | init::ASYNC_DIO
            | init::PARALLEL_DIROPS
            | init::MAX_PAGES
            | init::HANDLE_KILLPRIV_V2
            | init::SETXATTR_EXT
            | init::INIT_EXT;
        let mut choose = |on: bool, flag: u64| {
            if on {
                flags |= flag;
            }
        };
        let config = &self.config;
        choose(
            config.readdirplus,
            init::DO_READDIRPLUS | init::READDIRPLUS_AUTO,
        );
        choose(config.writeback && !config.readonly, init::WRITEBACK_CACHE);
        // The mask is applied here then, if the folder has no default list.
        choose(config.posix_acl, init::POSIX_ACL | init::DONT_MASK);
        choose(config.posix_lock, init::POSIX_LOCKS);
        choose(config.flock, init::FLOCK_LOCKS);
        choose(config.announce_submounts, init::SUBMOUNTS);
        choose(config.cache == Cache::Always, init::CACHE_SYMLINKS);
        choose(config.allow_mmap, init::DIRECT_IO_ALLOW_MMAP);
        choose(self.window, init::MAP_ALIGNMENT | init::HAS_INODE_DAX);
        flags
    }

    /// Starts over with a guest (virtio 1.3, 5.11.6: a session begins with `FUSE_INIT`).
    fn init(
        &mut self,
        major: u32,
        minor: u32,
        max_readahead: u32,
        offered: u64,
        reply: &mut Vec<u8>,
    ) -> Result<(), Errno> {
        if major < wire::MAJOR || (major == wire::MAJOR && minor < wire::OLDEST_MINOR) {
            ipc::guest_warn!(
                "the guest's FUSE is {major}.{minor}: at least 7.{} is needed",
                wire::OLDEST_MINOR
            );
            return Err(Errno::EPROTO);
        }
        if major > wire::MAJOR {
            // The guest asks again with this major version.
            reply.u32(wire::MAJOR).u32(wire::MINOR).zeros(56);
            return Ok(());
        }
        self.clear();
        let mut agreed = self.wanted() & offered;
        if agreed & init::INIT_EXT == 0 {
            agreed &= 0xffff_ffff;
        }
        self.store.store(Word::Agreed, agreed | SESSION);
        let max_write = self.config.max_write;
        // 4096 is the smallest page of any guest.
        let pages = (max_write / 4096).clamp(1, u32::from(u16::MAX)) as u16;
        reply.u32(wire::MAJOR).u32(wire::MINOR).u32(max_readahead);
        // The low word, then what else fuse_init_out has.
        reply.u32((agreed & 0xffff_ffff) as u32);
        // Requests in the background: unlimited; congestion at three quarters of it.
        reply.u16(u16::MAX).u16(u16::MAX / 4 * 3).u32(max_write);
        reply
            .u32(1)
            .u16(pages)
            .u16(mapping::ALIGNMENT_SHIFT)
            .u32((agreed >> 32) as u32)
            .zeros(28);
        ipc::log::info!("FUSE 7.{minor} session, flags {agreed:#x}");
        Ok(())
    }

    fn agreed(&self, flag: u64) -> bool {
        self.store.load(Word::Agreed) & flag != 0
    }

    /// `open_flags` of an answer to `OPEN` and `CREATE`.
    fn open_reply_flags(&self) -> u32 {
        match self.config.cache {
            Cache::Never | Cache::Metadata => fopen::DIRECT_IO | fopen::PARALLEL_DIRECT_WRITES,
            Cache::Auto => 0,
            Cache::Always => fopen::KEEP_CACHE,
        }
    }
}

fn mapped_capability(config: &Config) -> Option<CString> {
    config
        .xattrmap
        .as_ref()
        .and_then(XattrMap::mapped_capability)
}

/// The inodes whose descriptors a request needs; 0 is none.
fn nodes(header: &InHeader, body: &Body<'_>) -> [u64; 2] {
    match body {
        Body::Forget { .. }
        | Body::BatchForget(_)
        | Body::Flush { .. }
        | Body::Fsync { .. }
        | Body::Release { .. }
        | Body::ReleaseDir { .. }
        | Body::FsyncDir { .. }
        | Body::Lseek { .. }
        | Body::Fallocate { .. }
        | Body::CopyFileRange { .. }
        | Body::Interrupt { .. }
        | Body::RemoveMapping(_)
        | Body::Init { .. }
        | Body::Destroy => [0; 2],
        Body::Rename { newdir, .. } => [header.nodeid, *newdir],
        Body::Link { oldnodeid, .. } => [header.nodeid, *oldnodeid],
        _ => [header.nodeid, 0],
    }
}

/// What is said in place of doing a request that comes before a session has begun: a guest that had one with a daemon before
/// this one has numbers of inodes which would be other files here.
fn without_session(body: &Body<'_>) -> Option<Result<Outcome, Errno>> {
    match body {
        Body::Init { .. } | Body::Destroy => None,
        Body::Forget { .. } | Body::BatchForget(_) | Body::Interrupt { .. } => {
            Some(Ok(Outcome::Silent))
        }
        _ => Some(Err(Errno::ESTALE)),
    }
}

/// Requests that a read-only tree refuses before they reach the file system. `OPEN` is looked at where it is done.
fn changes_files(body: &Body<'_>) -> bool {
    matches!(
        body,
        Body::SetAttr(_)
            | Body::Symlink { .. }
            | Body::Mknod { .. }
            | Body::Mkdir { .. }
            | Body::Unlink { .. }
            | Body::Rmdir { .. }
            | Body::Rename { .. }
            | Body::Link { .. }
            | Body::Create { .. }
            | Body::TmpFile { .. }
            | Body::Write { .. }
            | Body::SetXattr { .. }
            | Body::RemoveXattr { .. }
            | Body::Fallocate { .. }
            | Body::CopyFileRange { .. }
    )
}
