//! Lock-down of the control process.
//!
//! Job: give up every capability, set `no_new_privs`, become non-dumpable, and deny the process
//! all files, TCP and outside signals through Landlock.
//! Not trusted: the process itself, once the guest runs.
//! Why this way: all of it is per thread and inherited, so it must happen while there is one
//! thread; the vCPU and QMP threads are started after it and add their own seccomp filters.

use crate::{
    layer::{Layer, LayerReport, Sandbox, State},
    steps::{caps, dumpable, faults, landlock, no_new_privs, threads},
};
use nix::errno::Errno;

/// What the control process gave up.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SelfReport {
    /// Landlock's ABI version in the running kernel; 0 without Landlock.
    pub landlock_abi: i32,
    /// The layers.
    pub layers: Vec<LayerReport>,
}

/// Why the control process could not be locked down.
#[derive(Debug, thiserror::Error)]
pub enum SelfLockError {
    /// The other threads would keep their rights.
    #[error("lock-down must come before threads are started; there are {0}")]
    Threads(u64),
    /// A step failed.
    #[error("lock-down failed: {what}")]
    Step {
        /// What was tried.
        what: &'static str,
        /// What the kernel said.
        source: Errno,
    },
    /// Landlock's calls failed in a way that an old kernel does not explain.
    #[error("cannot restrict this process with Landlock")]
    Landlock(#[from] ::landlock::RulesetError),
    /// A layer is missing and the mode is strict.
    #[error("strict sandbox refused for the control process: {0}")]
    Refused(LayerReport),
}

/// Does `work` while others of this process's user may look into it, as its broker then does. For the last moment before
/// untrusted code runs, after [`self_lock()`].
///
/// # Errors
/// [`SelfLockError::Step`]; the process should then end.
pub fn while_open_to_inspection<T>(work: impl FnOnce() -> T) -> Result<T, SelfLockError> {
    let step = |source| SelfLockError::Step {
        what: "switching dumps off",
        source,
    };
    dumpable::switch_on().map_err(step)?;
    let done = work();
    if dumpable::switch_off().map_err(step)? {
        Ok(done)
    } else {
        Err(step(Errno::EPERM))
    }
}

/// For a process that does nothing but start others with [`spawn()`](crate::spawn()): keeps the rights that the next start
/// takes, if it has them, and gives up all others. Both hold for what it starts, too. The host must allow it to make user
/// namespaces, since nothing else of a jail is possible afterwards.
///
/// # Errors
/// [`SelfLockError`]; the process should then end.
pub fn keep_starting() -> Result<(), SelfLockError> {
    /// `CAP_SETGID`, `CAP_SETUID`: to map another user into a namespace.
    const MAPPING: u64 = 1 << 6 | 1 << 7;
    let step = |what| move |source| SelfLockError::Step { what, source };
    match threads::count_lasting().map_err(step("counting threads"))? {
        1 => {}
        more => return Err(SelfLockError::Threads(more)),
    }
    faults::report_plainly().map_err(step("resetting fault signals"))?;
    let own = caps::read().map_err(step("reading capabilities"))?;
    caps::keep(own.main.permitted & MAPPING).map_err(step("dropping capabilities"))?;
    no_new_privs::set().map_err(step("setting no_new_privs"))?;
    if dumpable::switch_off().map_err(step("switching dumps off"))? {
        Ok(())
    } else {
        Err(step("switching dumps off")(Errno::EPERM))
    }
}

/// Locks this process down. Descriptors that are open keep working; nothing can be opened by path
/// afterwards.
///
/// # Errors
/// [`SelfLockError`]; the process should then end.
pub fn self_lock(mode: Sandbox) -> Result<SelfReport, SelfLockError> {
    let step = |what| move |source| SelfLockError::Step { what, source };
    match threads::count_lasting().map_err(step("counting threads"))? {
        1 => {}
        more => return Err(SelfLockError::Threads(more)),
    }
    faults::report_plainly().map_err(step("resetting fault signals"))?;
    // An unprivileged process cannot empty its bounding set; without privileges, and with
    // no_new_privs, nothing in it can be had.
    let sealed = caps::seal();
    caps::clear().map_err(step("dropping capabilities"))?;
    no_new_privs::set().map_err(step("setting no_new_privs"))?;
    let sets = caps::read().map_err(step("reading capabilities"))?;
    if !sets.usable_are_empty() {
        return Err(step("dropping capabilities")(Errno::EPERM));
    }
    let off = dumpable::switch_off().map_err(step("switching dumps off"))?;
    if !off {
        return Err(step("switching dumps off")(Errno::EPERM));
    }
    let landlock = landlock::deny_all()?;
    let capabilities = match sealed {
        Ok(()) => State::On,
        Err(_) => State::Partly("the bounding set cannot be emptied without CAP_SETPCAP"),
    };
    let mut layers = vec![
        LayerReport {
            layer: Layer::Capabilities,
            state: capabilities,
        },
        LayerReport {
            layer: Layer::NoNewPrivileges,
            state: State::On,
        },
        LayerReport {
            layer: Layer::NotDumpable,
            state: State::On,
        },
    ];
    layers.extend(landlock.layers);
    let missing = layers
        .iter()
        .find(|l| matches!(l.state, State::Off(_) | State::Lacking(_)));
    match missing {
        Some(layer) if mode == Sandbox::Strict => Err(SelfLockError::Refused(layer.clone())),
        _ => Ok(SelfReport {
            landlock_abi: landlock.abi,
            layers,
        }),
    }
}
