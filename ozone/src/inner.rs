//! The inner half of a jail: what a device process does to itself after exec.
//!
//! Job: become non-dumpable, deny itself the file system (but for a tree that it serves), TCP and signals through Landlock, and
//! check that everything the outer half should have done is done.
//! Not trusted: whoever started this process. A device started by hand, or by a broker that left
//! something out, must not serve a guest.
//! Why this way: [`Jailed`] can only be had from [`lock`], so code that demands one cannot run
//! outside a jail. The seccomp filter comes after this: the checks make calls that it forbids.

use crate::{
    layer::{Layer, LayerReport, Sandbox, State},
    steps::{caps, dumpable, faults, landlock, no_new_privs, root, threads},
};
use nix::{
    errno::Errno,
    fcntl::{OFlag, open},
    sys::{
        resource::{Resource, getrlimit},
        stat::Mode,
    },
    unistd,
};
use std::{fmt, os::fd::AsFd};

/// Proof that this process is in its jail. Neither cloned nor made by hand.
#[derive(Debug)]
pub struct Jailed {
    report: JailReport,
    capabilities: u64,
}

impl Jailed {
    /// What the jail consists of.
    #[must_use]
    pub fn report(&self) -> &JailReport {
        &self.report
    }

    /// The capabilities that are left, one bit each: none but for a process that serves a [tree](Root::Tree).
    #[must_use]
    pub fn capabilities(&self) -> u64 {
        self.capabilities
    }
}

/// The root that the outer half made.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Root {
    /// Nothing is there.
    Empty,
    /// The tree that the process serves ([`SharedTree`](crate::SharedTree)).
    Tree {
        /// Its mounts are read-only.
        readonly: bool,
        /// Capabilities that the process may have, one bit each.
        capabilities: u64,
    },
}

/// What the inner half did and found.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct JailReport {
    /// Landlock's ABI version in the running kernel; 0 without Landlock.
    pub landlock_abi: i32,
    /// Every layer that can be seen from the inside.
    pub layers: Vec<LayerReport>,
}

impl fmt::Display for JailReport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Landlock ABI {}", self.landlock_abi)?;
        for layer in self.layers.iter().filter(|l| !l.is_on()) {
            write!(f, "; {layer}")?;
        }
        Ok(())
    }
}

/// Why a process does not get its [`Jailed`].
#[derive(Debug, thiserror::Error)]
pub enum LockError {
    /// Threads that were started before would not be covered.
    #[error("the jail must be locked before threads are started; there are {0}")]
    Threads(u64),
    /// A layer is missing that every host can give.
    #[error("this process is not in a jail: {0}")]
    NotJailed(LayerReport),
    /// A layer is missing and the mode is strict.
    #[error("strict sandbox refused: {0}")]
    Refused(LayerReport),
    /// Landlock's calls failed in a way that an old kernel does not explain.
    #[error("cannot restrict this process with Landlock")]
    Landlock(#[from] ::landlock::RulesetError),
    /// A check could not be made.
    #[error("cannot check the jail: {what}")]
    Check {
        /// What was looked at.
        what: &'static str,
        /// What the kernel said.
        source: Errno,
    },
}

/// Locks the jail from the inside and checks all of it that can be seen from there.
///
/// In [`Sandbox::BestEffort`] the layers that depend on the host's kernel or configuration
/// (namespaces, empty root, Landlock) may be missing and are reported; the others may not.
///
/// # Errors
/// [`LockError`]; the process should then end.
///
/// SIGSEGV and SIGBUS get their default action.
pub fn lock(mode: Sandbox, root: Root) -> Result<Jailed, LockError> {
    let check = |what| move |source| LockError::Check { what, source };
    let mut layers = Vec::with_capacity(12);
    let mut note = |layer, state| layers.push(LayerReport { layer, state });

    faults::report_plainly().map_err(check("fault signals"))?;
    let off = dumpable::switch_off().map_err(check("dumpable"))?;
    note(Layer::NotDumpable, must(off, "the process can be dumped"));

    let sets = caps::read().map_err(check("capabilities"))?;
    let mut left = 0;
    match root {
        Root::Empty => note(
            Layer::Capabilities,
            match (sets.usable_are_empty(), sets.bounding) {
                (false, _) => State::Lacking("the process has capabilities"),
                (true, 0) => State::On,
                (true, _) => State::Partly("the bounding set is not empty"),
            },
        ),
        Root::Tree { capabilities, .. } => {
            left = sets.main.permitted & capabilities;
            // Exec handed them over as inheritable and ambient ones, which have no use any more.
            caps::keep(left).map_err(check("capabilities"))?;
            note(
                Layer::TreeCapabilities,
                match (
                    sets.main.permitted & !capabilities,
                    sets.bounding & !capabilities,
                ) {
                    (0, 0) => State::On,
                    (0, _) => State::Partly("the bounding set has others"),
                    _ => State::Lacking("the process has other capabilities"),
                },
            );
        }
    }
    let set = no_new_privs::is_set().map_err(check("no_new_privs"))?;
    note(Layer::NoNewPrivileges, must(set, "no_new_privs is not set"));

    if root == Root::Empty {
        let plain = !unistd::getuid().is_root() && unistd::getgid().as_raw() != 0;
        note(
            Layer::Identity,
            must(plain, "the process is user 0 or group 0"),
        );
    }

    let (_, core) = getrlimit(Resource::RLIMIT_CORE).map_err(check("limits"))?;
    note(
        Layer::Limits,
        must(core == 0, "the process may write core files"),
    );

    let first = unistd::getpid().as_raw() == 1;
    note(
        Layer::PidNamespace,
        must(first, "the process is not the first of a pid namespace"),
    );

    let (layer, fault) = match root {
        Root::Empty => (Layer::EmptyRoot, root::fault()),
        Root::Tree { readonly, .. } => (Layer::TreeRoot, root::tree_fault(readonly)),
    };
    let fault = fault.map_err(check("root folder"))?;
    note(layer, fault.map_or(State::On, State::Lacking));

    // Counted last before Landlock, while /proc could still be there; an empty root has none, and
    // then no thread can hide either: the process was executed with one and this crate starts none.
    match threads::count() {
        Ok(1) | Err(_) => {}
        Ok(more) => return Err(LockError::Threads(more)),
    }
    let landlock = match root {
        Root::Empty => landlock::deny_all()?,
        Root::Tree { readonly, .. } => {
            let flags = OFlag::O_PATH | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC;
            let tree = open("/", flags, Mode::empty()).map_err(check("root folder"))?;
            landlock::only_tree(tree.as_fd(), readonly)?
        }
    };
    layers.extend(landlock.layers);

    for layer in &layers {
        let may_be_missing = matches!(
            layer.layer,
            Layer::PidNamespace
                | Layer::EmptyRoot
                | Layer::LandlockFiles
                | Layer::LandlockTcp
                | Layer::LandlockScopes
        );
        match layer.state {
            State::On => {}
            _ if mode == Sandbox::Strict => return Err(LockError::Refused(layer.clone())),
            State::Off(_) | State::Lacking(_) if !may_be_missing => {
                return Err(LockError::NotJailed(layer.clone()));
            }
            _ => {}
        }
    }
    Ok(Jailed {
        report: JailReport {
            landlock_abi: landlock.abi,
            layers,
        },
        capabilities: left,
    })
}

fn must(on: bool, otherwise: &'static str) -> State {
    if on {
        State::On
    } else {
        State::Lacking(otherwise)
    }
}
