//! Inherited descriptors that nobody asked for.
//!
//! **Job.** Close everything above standard error except a list. Kata and libvirt start a VMM with descriptors that the
//! command line names; those go to the broker, and the control process must not keep them.
//! **Why this way.** `close_range` in the gaps: no reading of `/proc`, which may not be there.

#![allow(unsafe_code)] // descriptors that no Rust value owns

use std::os::fd::RawFd;

/// Closes every descriptor from 3 on that is not in `keep`.
///
/// Must be called while every descriptor that a Rust value owns is in `keep`.
pub(crate) fn close_all_but(keep: &[RawFd]) {
    for (first, last) in gaps(keep) {
        // SAFETY: the caller lists all descriptors that something owns; the others came with exec.
        unsafe { libc::close_range(first, last, 0) };
    }
}

/// The inclusive ranges from 3 on between the numbers in `keep`.
fn gaps(keep: &[RawFd]) -> Vec<(u32, u32)> {
    let mut keep: Vec<u32> = keep
        .iter()
        .filter_map(|&fd| u32::try_from(fd).ok())
        .collect();
    keep.sort_unstable();
    let mut ranges = Vec::new();
    let mut from = 3;
    for fd in keep.into_iter().filter(|&fd| fd >= 3) {
        if from < fd {
            ranges.push((from, fd - 1));
        }
        from = fd + 1;
    }
    ranges.push((from, u32::MAX));
    ranges
}

#[cfg(test)]
mod tests {
    use super::gaps;

    #[test]
    fn gaps_lie_between_what_is_kept() {
        assert_eq!(gaps(&[]), [(3, u32::MAX)]);
        assert_eq!(gaps(&[3]), [(4, u32::MAX)]);
        assert_eq!(gaps(&[9, 0, 4, 5, 5]), [(3, 3), (6, 8), (10, u32::MAX)]);
    }
}
