//! Descriptors: exactly the listed ones, on exactly the listed numbers.
//!
//! Sources may lie on each other's targets, so all are copied out of the way first.

use crate::sys::process as sys;
use nix::errno::Errno;
use std::os::fd::RawFd;

/// A descriptor to be placed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Placement {
    /// Its number now.
    pub(crate) source: RawFd,
    /// Its number after exec.
    pub(crate) target: RawFd,
}

/// What the child needs until exec, moved out of the targets' way.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Kept {
    pub(crate) binary: RawFd,
    pub(crate) report: RawFd,
    pub(crate) parent: RawFd,
}

/// Places the descriptors and marks all others to be closed at exec. `list` is used as scratch.
pub(crate) fn place(list: &mut [Placement], kept: Kept) -> Result<Kept, Errno> {
    let above = list.iter().map(|p| p.target + 1).max().unwrap_or(0);
    let kept = Kept {
        binary: sys::copy_above(kept.binary, above)?,
        report: sys::copy_above(kept.report, above)?,
        parent: sys::copy_above(kept.parent, above)?,
    };
    for placement in list.iter_mut() {
        placement.source = sys::copy_above(placement.source, above)?;
    }
    sys::close_at_exec(0, u32::MAX)?;
    for placement in list.iter() {
        sys::copy_to(placement.source, placement.target)?;
    }
    Ok(kept)
}
