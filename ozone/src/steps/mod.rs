//! One file per kernel mechanism. Each offers what the outer half (before exec) or the inner half
//! (after exec) of a jail does with it, and knows nothing of the others; the order is `spawn`'s,
//! `inner`'s and `self_lock`'s business.

pub(crate) mod caps;
pub(crate) mod cgroup;
pub(crate) mod devices;
pub(crate) mod dumpable;
pub(crate) mod elf;
pub(crate) mod faults;
pub(crate) mod fds;
pub(crate) mod folder;
pub(crate) mod idmap;
pub(crate) mod landlock;
pub(crate) mod namespaces;
pub(crate) mod no_new_privs;
pub(crate) mod outer_root;
pub(crate) mod parent_death;
pub(crate) mod place;
pub(crate) mod rlimits;
pub(crate) mod root;
pub(crate) mod session;
pub(crate) mod threads;
