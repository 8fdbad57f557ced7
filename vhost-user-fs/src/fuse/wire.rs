//! Numbers and fixed layouts of the FUSE ABI (Linux `include/uapi/linux/fuse.h`), version 7.41.
//!
//! All integers are in the byte order of the host, which is the guest's: virtio-fs does not translate (virtio 1.3, 5.11.6.1).

/// `FUSE_KERNEL_VERSION`.
pub const MAJOR: u32 = 7;
/// The minor version that is told to the guest. Everything up to it is understood; what is optional has a flag.
pub const MINOR: u32 = 41;
/// The oldest minor version that is served: 7.27 came with Linux 4.18, before virtio-fs.
pub const OLDEST_MINOR: u32 = 27;

/// Bytes of `fuse_in_header`.
pub const IN_HEADER: usize = 40;
/// Bytes of `fuse_out_header`.
pub const OUT_HEADER: usize = 16;
/// Bytes of `fuse_write_in`.
pub const WRITE_IN: usize = 40;
/// Bytes of `fuse_write_out`.
pub const WRITE_OUT: usize = 8;
/// Bytes of `fuse_dirent` without the name.
pub const DIRENT: usize = 24;
/// Bytes of `fuse_entry_out`.
pub const ENTRY_OUT: usize = 128;

/// A `SETUPMAPPING` that names an inode and no open file.
pub const NO_HANDLE: u64 = u64::MAX;

/// The inode number of the root.
pub const ROOT_ID: u64 = 1;

macro_rules! numbers {
    ($(#[$doc:meta])* $group:ident: $type:ty { $($name:ident = $value:expr,)* }) => {
        $(#[$doc])*
        #[allow(missing_docs)] // the names are the protocol's own
        pub mod $group {
            $(pub const $name: $type = $value;)*
        }
    };
}

numbers!(
    /// `enum fuse_opcode`.
    opcode: u32 {
        LOOKUP = 1, FORGET = 2, GETATTR = 3, SETATTR = 4, READLINK = 5, SYMLINK = 6, MKNOD = 8, MKDIR = 9, UNLINK = 10,
        RMDIR = 11, RENAME = 12, LINK = 13, OPEN = 14, READ = 15, WRITE = 16, STATFS = 17, RELEASE = 18, FSYNC = 20,
        SETXATTR = 21, GETXATTR = 22, LISTXATTR = 23, REMOVEXATTR = 24, FLUSH = 25, INIT = 26, OPENDIR = 27, READDIR = 28,
        RELEASEDIR = 29, FSYNCDIR = 30, GETLK = 31, SETLK = 32, SETLKW = 33, ACCESS = 34, CREATE = 35, INTERRUPT = 36,
        DESTROY = 38, BATCH_FORGET = 42, FALLOCATE = 43, READDIRPLUS = 44, RENAME2 = 45, LSEEK = 46, COPY_FILE_RANGE = 47,
        SETUPMAPPING = 48, REMOVEMAPPING = 49, SYNCFS = 50, TMPFILE = 51, STATX = 52,
    }
);

numbers!(
    /// Flags of `FUSE_INIT`; from bit 32 on they travel in `flags2`.
    init: u64 {
        ASYNC_READ = 1, POSIX_LOCKS = 1 << 1, ATOMIC_O_TRUNC = 1 << 3, BIG_WRITES = 1 << 5, DONT_MASK = 1 << 6,
        FLOCK_LOCKS = 1 << 10, AUTO_INVAL_DATA = 1 << 12, DO_READDIRPLUS = 1 << 13, READDIRPLUS_AUTO = 1 << 14,
        ASYNC_DIO = 1 << 15, WRITEBACK_CACHE = 1 << 16, PARALLEL_DIROPS = 1 << 18, POSIX_ACL = 1 << 20,
        MAX_PAGES = 1 << 22, CACHE_SYMLINKS = 1 << 23, MAP_ALIGNMENT = 1 << 26, SUBMOUNTS = 1 << 27, HANDLE_KILLPRIV_V2 = 1 << 28,
        SETXATTR_EXT = 1 << 29, INIT_EXT = 1 << 30, HAS_INODE_DAX = 1 << 33, DIRECT_IO_ALLOW_MMAP = 1 << 36,
    }
);

numbers!(
    /// `valid` of `fuse_setattr_in`.
    fattr: u32 {
        MODE = 1, UID = 1 << 1, GID = 1 << 2, SIZE = 1 << 3, ATIME = 1 << 4, MTIME = 1 << 5, FH = 1 << 6,
        ATIME_NOW = 1 << 7, MTIME_NOW = 1 << 8, KILL_SUIDGID = 1 << 11,
    }
);

numbers!(
    /// `open_flags` of `fuse_open_out`.
    fopen: u32 {
        DIRECT_IO = 1, KEEP_CACHE = 1 << 1, CACHE_DIR = 1 << 3, PARALLEL_DIRECT_WRITES = 1 << 6,
    }
);

numbers!(
    /// Flags of single requests.
    flag: u32 {
        GETATTR_FH = 1, FSYNC_FDATASYNC = 1, LK_FLOCK = 1, WRITE_CACHE = 1, WRITE_KILL_SUIDGID = 1 << 2,
        RELEASE_FLUSH = 1, RELEASE_FLOCK_UNLOCK = 1 << 1, OPEN_KILL_SUIDGID = 1, SETXATTR_ACL_KILL_SGID = 1,
        ATTR_SUBMOUNT = 1, ATTR_DAX = 1 << 1, SETUPMAPPING_WRITE = 1, SETUPMAPPING_READ = 1 << 1,
    }
);

/// `fuse_in_header`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct InHeader {
    /// Bytes of the whole request, with this header.
    pub len: u32,
    /// One of [`opcode`].
    pub opcode: u32,
    /// The guest's number for this request.
    pub unique: u64,
    /// The inode that the request is about.
    pub nodeid: u64,
    /// File system user of the calling process.
    pub uid: u32,
    /// File system group of the calling process.
    pub gid: u32,
}

impl InHeader {
    /// From a copy of the first bytes of a request. Any bytes are a header; what it says is checked where it is used.
    pub fn read(bytes: &[u8; IN_HEADER]) -> Self {
        let u32_at = |at: usize| {
            let mut word = [0; 4];
            word.copy_from_slice(&bytes[at..at + 4]);
            u32::from_ne_bytes(word)
        };
        let u64_at = |at: usize| {
            let mut word = [0; 8];
            word.copy_from_slice(&bytes[at..at + 8]);
            u64::from_ne_bytes(word)
        };
        Self {
            len: u32_at(0),
            opcode: u32_at(4),
            unique: u64_at(8),
            nodeid: u64_at(16),
            uid: u32_at(24),
            gid: u32_at(28),
        }
    }
}
