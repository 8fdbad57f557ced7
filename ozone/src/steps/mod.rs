//! One file per kernel mechanism. Each offers what the outer half (before exec) or the inner half
//! (after exec) of a jail does with it, and knows nothing of the others; the order is `spawn`'s,
//! `inner`'s and `self_lock`'s business.

pub(crate) mod caps;
pub(crate) mod dumpable;
pub(crate) mod fds;
pub(crate) mod idmap;
pub(crate) mod landlock;
pub(crate) mod namespaces;
pub(crate) mod no_new_privs;
pub(crate) mod parent_death;
pub(crate) mod rlimits;
pub(crate) mod root;
pub(crate) mod threads;
