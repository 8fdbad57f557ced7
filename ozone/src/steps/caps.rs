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
    seal_but(&[])?;
    sys::set_securebits(SECUREBITS)
}

/// Drops all but `kept` from the bounding set, and keeps a change of the user from touching the
/// other sets.
fn seal_but(kept: &[u8]) -> Result<(), Errno> {
    for capability in 0..MANY {
        if kept.iter().any(|k| c_ulong::from(*k) == capability) {
            continue;
        }
        match sys::drop_from_bounding_set(capability) {
            Ok(()) => {}
            Err(Errno::EINVAL) if capability > 0 => break,
            Err(errno) => return Err(errno),
        }
    }
    sys::set_securebits(NOROOT | NO_SETUID_FIXUP)
}

/// As root: leaves exactly `granted` in all five sets, for this process and what it executes, while
/// `become_user` changes the user. With an empty list that is no capability at all.
pub(crate) fn grant<E>(
    granted: &[u8],
    become_user: impl FnOnce() -> Result<(), E>,
) -> Result<Result<(), E>, Errno> {
    seal_but(granted)?;
    if let Err(error) = become_user() {
        return Ok(Err(error));
    }
    let mask = granted.iter().fold(0, |mask, c| mask | 1u64 << c);
    let now = sys::capabilities()?;
    sys::clear_ambient_set()?;
    sys::set_capabilities(CapSets {
        inheritable: mask,
        ..now
    })?;
    for capability in granted {
        sys::raise_ambient(c_ulong::from(*capability))?;
    }
    sys::set_securebits(SECUREBITS)?;
    sys::set_capabilities(CapSets {
        effective: mask,
        permitted: mask,
        inheritable: mask,
    })?;
    Ok(Ok(()))
}

/// include/uapi/linux/capability.h: the names, by number.
const NAMES: [&str; 41] = [
    "CAP_CHOWN",
    "CAP_DAC_OVERRIDE",
    "CAP_DAC_READ_SEARCH",
    "CAP_FOWNER",
    "CAP_FSETID",
    "CAP_KILL",
    "CAP_SETGID",
    "CAP_SETUID",
    "CAP_SETPCAP",
    "CAP_LINUX_IMMUTABLE",
    "CAP_NET_BIND_SERVICE",
    "CAP_NET_BROADCAST",
    "CAP_NET_ADMIN",
    "CAP_NET_RAW",
    "CAP_IPC_LOCK",
    "CAP_IPC_OWNER",
    "CAP_SYS_MODULE",
    "CAP_SYS_RAWIO",
    "CAP_SYS_CHROOT",
    "CAP_SYS_PTRACE",
    "CAP_SYS_PACCT",
    "CAP_SYS_ADMIN",
    "CAP_SYS_BOOT",
    "CAP_SYS_NICE",
    "CAP_SYS_RESOURCE",
    "CAP_SYS_TIME",
    "CAP_SYS_TTY_CONFIG",
    "CAP_MKNOD",
    "CAP_LEASE",
    "CAP_AUDIT_WRITE",
    "CAP_AUDIT_CONTROL",
    "CAP_SETFCAP",
    "CAP_MAC_OVERRIDE",
    "CAP_MAC_ADMIN",
    "CAP_SYSLOG",
    "CAP_WAKE_ALARM",
    "CAP_BLOCK_SUSPEND",
    "CAP_AUDIT_READ",
    "CAP_PERFMON",
    "CAP_BPF",
    "CAP_CHECKPOINT_RESTORE",
];

/// The number of a capability.
pub(crate) fn by_name(name: &str) -> Option<u8> {
    NAMES.iter().position(|n| *n == name).map(|n| n as u8)
}

/// Empties the four other sets of the calling thread.
pub(crate) fn clear() -> Result<(), Errno> {
    sys::clear_ambient_set()?;
    sys::clear_capabilities()
}

/// Leaves the calling thread no capability but those in the bit set `kept`, as effective and permitted, and nothing for what
/// it executes. Says whether the bounding set could be reduced to them and the securebits be locked, which takes a capability.
pub(crate) fn keep(kept: u64) -> Result<bool, Errno> {
    let list: Vec<u8> = (0..64).filter(|c| kept & 1 << c != 0).collect();
    let sealed = seal_but(&list).and_then(|()| sys::set_securebits(SECUREBITS));
    sys::clear_ambient_set()?;
    sys::set_capabilities(CapSets {
        effective: kept,
        permitted: kept,
        inheritable: 0,
    })?;
    Ok(sealed.is_ok())
}

/// As [`keep`], and what it executes has these capabilities too. Can be asked for again by that program.
pub(crate) fn keep_and_pass_on(kept: u64) -> Result<(), Errno> {
    let list: Vec<u8> = (0..64).filter(|c| kept & 1 << c != 0).collect();
    // Without CAP_SETPCAP, which `keep` copes with as well: no_new_privs makes what is left worthless.
    let sealed = seal_but(&list).is_ok();
    sys::set_capabilities(CapSets {
        effective: kept,
        permitted: kept,
        inheritable: kept,
    })?;
    for capability in (0..MANY).filter(|c| kept & 1 << c != 0) {
        if !sys::in_ambient_set(capability)? {
            sys::raise_ambient(capability)?;
        }
    }
    if sealed {
        // As above.
        let _ = sys::set_securebits(SECUREBITS);
    }
    Ok(())
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
