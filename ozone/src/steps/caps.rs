//! Capabilities: none in any of the five sets, and no way to get one.
//!
//! Bounding, ambient, inheritable, effective, permitted are emptied; the securebits are locked so
//! that user 0 and set-user-id changes grant nothing either.

use crate::sys::process::{self as sys, CapSets};
use nix::errno::Errno;
use std::ffi::{c_int, c_ulong};

/// More than any kernel has: the loops end at the kernel's own last one.
const MANY: c_ulong = 64;

// include/uapi/linux/securebits.h; each bit's lock is the next higher bit.
const NOROOT: c_int = 1;
const NO_SETUID_FIXUP: c_int = 1 << 2;
const KEEP_CAPS_LOCKED: c_int = 1 << 5;
const NO_CAP_AMBIENT_RAISE: c_int = 1 << 6;
const LOCKED: c_int = NOROOT | NO_SETUID_FIXUP | NO_CAP_AMBIENT_RAISE;
const SECUREBITS: c_int = LOCKED | LOCKED << 1 | KEEP_CAPS_LOCKED;

/// Empties the bounding set and locks the securebits. Must come before the process changes its
/// user, which costs it the `CAP_SETPCAP` that this needs, and keeps that change from touching
/// capabilities. Without that capability the bounding set stays; `no_new_privs` makes it worthless.
pub(crate) fn seal() -> Result<(), Errno> {
    for capability in 0..MANY {
        match sys::drop_from_bounding_set(capability) {
            Ok(()) => {}
            Err(Errno::EINVAL) if capability > 0 => break,
            Err(errno) => return Err(errno),
        }
    }
    sys::set_securebits(SECUREBITS)
}

/// Empties the four other sets of the calling thread.
pub(crate) fn clear() -> Result<(), Errno> {
    sys::clear_ambient_set()?;
    sys::clear_capabilities()
}

/// What the calling thread has in each of its five sets.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct FiveSets {
    pub(crate) main: CapSets,
    pub(crate) bounding: u64,
    pub(crate) ambient: u64,
}

impl FiveSets {
    /// Whether nothing is left but, perhaps, the bounding set.
    pub(crate) fn usable_are_empty(&self) -> bool {
        let CapSets {
            effective,
            permitted,
            inheritable,
        } = self.main;
        effective | permitted | inheritable | self.ambient == 0
    }
}

/// Reads the five sets back.
pub(crate) fn read() -> Result<FiveSets, Errno> {
    let mut sets = FiveSets {
        main: sys::capabilities()?,
        bounding: 0,
        ambient: 0,
    };
    for capability in 0..MANY {
        match sys::in_bounding_set(capability) {
            Ok(on) => sets.bounding |= u64::from(on) << capability,
            Err(Errno::EINVAL) if capability > 0 => break,
            Err(errno) => return Err(errno),
        }
        sets.ambient |= u64::from(sys::in_ambient_set(capability)?) << capability;
    }
    Ok(sets)
}
