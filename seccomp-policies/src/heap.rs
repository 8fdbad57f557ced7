//! The allocator's manners under a filter.
//!
//! Job: after [`settle`] libc's allocator makes one kind of call only: `mmap` of plain anonymous memory, when the heap must grow.
//! Not trusted: nobody; this is about calls that a filter then need not allow.
//! Why this way: by default the heap grows and shrinks with `brk`, takes large blocks with `mmap`, grows them with `mremap`
//! and gives them back with `munmap`, and each thread gets an arena of its own with `mprotect` and `madvise`. The policies
//! answer those with errors, and what libc does then is its own documented way out. The price: what a process once
//! used stays its own until it ends.

#![allow(unsafe_code)] // mallopt(3)

/// Makes libc's allocator keep what it has. The filters rely on it: with trimming on, an answered `brk` would be taken for
/// a heap that has shrunk. [`install`](crate::install()) calls it; a program with threads calls it first in `main` as well,
/// since arenas that exist already stay.
pub fn settle() {
    for (option, value) in [
        (libc::M_ARENA_MAX, 1),
        // As unsigned, more than any heap has.
        (libc::M_TRIM_THRESHOLD, -1),
        (libc::M_MMAP_MAX, 0),
    ] {
        // SAFETY: sets a number under the allocator's own lock.
        unsafe { libc::mallopt(option, value) };
    }
}
