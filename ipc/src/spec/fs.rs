//! A shared folder as its device process sees it: no path, only properties; the folder is the root of the process's own
//! namespaces.

use serde::{Deserialize, Serialize};

use super::ids::Translation;
use crate::start::FD_BACKEND;

/// The tree's root: a descriptor made in the jail, with `O_PATH`.
pub const FD_TREE: i32 = FD_BACKEND;
/// A `/proc` in which the jail's own processes are and nothing else, made in the jail: files that were looked up are opened
/// anew through its `self/fd`. Where the host allows no such mount it is that folder of the process itself, which no other
/// process can use in its place.
pub const FD_PROCESSES: i32 = FD_BACKEND + 1;
/// A packet socket to the broker, for [`crate::keeper`].
pub const FD_KEEPER: i32 = FD_BACKEND + 2;
/// Descriptors from [`FD_TREE`] on.
pub const BACKEND_FDS: u32 = 3;
/// One more if it is to take the place of another process: a packet socket to that one's keeper.
pub const FD_HERITAGE: i32 = FD_BACKEND + 3;

/// What the guest may keep of what it has seen.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
pub enum FsCache {
    /// Nothing.
    Never,
    /// Names and attributes.
    Metadata,
    /// Names and attributes for a second, contents as long as the file's times do not change.
    #[default]
    Auto,
    /// Everything.
    Always,
}

/// What the `vhost_user_fs` process is told when the broker starts it. Its back-end descriptors are [`FD_TREE`],
/// [`FD_PROCESSES`] and [`FD_KEEPER`].
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct FsSpec {
    /// Device id, for logs.
    pub id: String,
    /// Name that the guest mounts by: 1 to 36 bytes (virtio 1.3, 5.11.4).
    pub tag: String,
    /// Nothing in the tree may change; its mount is read-only.
    pub readonly: bool,
    /// What the guest may keep.
    pub cache: FsCache,
    /// Extended attributes are passed through.
    pub xattr: bool,
    /// POSIX access control lists; needs `xattr`.
    pub posix_acl: bool,
    /// The guest's users are others on the host; not with `posix_acl`.
    pub users: Translation,
    /// The guest's groups are others on the host; not with `posix_acl`.
    pub groups: Translation,
    /// Request queues beside the high-priority one: 1 to 8.
    pub request_queues: u16,
    /// Entries of a queue: a power of two, 8 to 1024.
    pub queue_size: u16,
    /// Bytes of the window into which files are mapped for the guest, a multiple of [`DAX_UNIT`](crate::limits::DAX_UNIT); 0 for none.
    pub window: u64,
}

impl FsSpec {
    /// Virtqueues: the high-priority one and the request queues (virtio 1.3, 5.11.2).
    pub const fn num_queues(&self) -> u16 {
        1 + self.request_queues
    }

    /// The capabilities that serving such a tree takes, one bit each (include/uapi/linux/capability.h). They mean something
    /// in the process's own user namespace only.
    pub const fn capabilities(&self) -> u64 {
        const CHOWN: u64 = 1;
        const DAC_OVERRIDE: u64 = 1 << 1;
        const DAC_READ_SEARCH: u64 = 1 << 2;
        const FOWNER: u64 = 1 << 3;
        const FSETID: u64 = 1 << 4;
        const SETGID: u64 = 1 << 6;
        const SETUID: u64 = 1 << 7;
        const SETFCAP: u64 = 1 << 31;
        if self.readonly {
            return DAC_READ_SEARCH;
        }
        let needed = CHOWN | DAC_OVERRIDE | FOWNER | FSETID | SETGID | SETUID;
        needed | if self.xattr { SETFCAP } else { 0 }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_tree_that_cannot_change_takes_the_right_to_read_only() {
        let mut spec = FsSpec {
            id: "fs0".into(),
            tag: "share".into(),
            readonly: true,
            cache: FsCache::Auto,
            xattr: true,
            posix_acl: false,
            users: Translation::default(),
            groups: Translation::default(),
            request_queues: 1,
            queue_size: 1024,
            window: 0,
        };
        assert_eq!(spec.capabilities(), 1 << 2);
        spec.readonly = false;
        let all = [0, 1, 3, 4, 6, 7, 31]
            .iter()
            .fold(0, |set, bit| set | 1 << bit);
        assert_eq!(spec.capabilities(), all);
        spec.xattr = false;
        assert_eq!(spec.capabilities(), all & !(1 << 31));
    }
}
