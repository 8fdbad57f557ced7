//! Landlock: denies all file system access, TCP, and signals and abstract sockets out of the jail.
//!
//! Whatever the running kernel's ABI offers is switched on; no rule gives anything back.
//! Descriptors that are open already keep working.

use crate::layer::{Layer, LayerReport, State};
use landlock::{
    ABI, Access, AccessFs, AccessNet, CompatLevel, Compatible, LandlockStatus, PathBeneath,
    RestrictionStatus, Ruleset, RulesetAttr, RulesetCreatedAttr, RulesetError, RulesetStatus,
    Scope,
};

/// What the kernel enforces.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LandlockReport {
    /// The kernel's ABI version; 0 without Landlock.
    pub abi: i32,
    /// Files, TCP and scopes, one layer each.
    pub layers: [LayerReport; 3],
}

/// From this ABI on no right to open, make, change or remove a file is left out.
const FILES_COMPLETE: i32 = 3;
const TCP: i32 = 4;
const SCOPES: i32 = 6;

/// The kernel's version of Landlock; 0 without Landlock.
#[must_use]
pub fn abi() -> u32 {
    crate::sys::process::landlock_abi()
}

/// Restricts the calling thread, and whatever it starts, for good.
pub(crate) fn deny_all() -> Result<LandlockReport, RulesetError> {
    let newest = ABI::V9; // the newest that the crate knows; older kernels ignore what they lack
    let status = Ruleset::default()
        .set_compatibility(CompatLevel::BestEffort)
        .handle_access(AccessFs::from_all(newest))?
        .handle_access(AccessNet::from_all(newest))?
        .scope(Scope::from_all(newest))?
        .create()?
        .restrict_self()?;
    Ok(report(enforced_abi(&status)))
}

/// As [`deny_all`], but leaves the files of `tree`: with `readonly` for reading, else for everything but executing, devices
/// and device ioctls. A kernel whose Landlock has no right for it (ABI 1) refuses every rename between folders.
pub(crate) fn only_tree(
    tree: std::os::fd::BorrowedFd<'_>,
    readonly: bool,
) -> Result<LandlockReport, RulesetError> {
    let newest = ABI::V9;
    let all = AccessFs::from_all(newest);
    let read = AccessFs::ReadFile | AccessFs::ReadDir;
    let allowed = if readonly {
        read
    } else {
        read | AccessFs::WriteFile
            | AccessFs::Truncate
            | AccessFs::Refer
            | AccessFs::MakeReg
            | AccessFs::MakeDir
            | AccessFs::MakeSym
            | AccessFs::MakeFifo
            | AccessFs::MakeSock
            | AccessFs::MakeChar // a whiteout of overlayfs is one; the mount's nodev makes all others useless
            | AccessFs::RemoveFile
            | AccessFs::RemoveDir
    };
    let status = Ruleset::default()
        .set_compatibility(CompatLevel::BestEffort)
        .handle_access(all)?
        .handle_access(AccessNet::from_all(newest))?
        .scope(Scope::from_all(newest))?
        .create()?
        .add_rule(PathBeneath::new(tree, allowed))?
        .restrict_self()?;
    Ok(report(enforced_abi(&status)))
}

/// The kernel's version of Landlock if it enforces anything, otherwise 0.
fn enforced_abi(status: &RestrictionStatus) -> i32 {
    match status.landlock {
        _ if status.ruleset == RulesetStatus::NotEnforced => 0,
        LandlockStatus::Available {
            effective_abi,
            kernel_abi,
        } => kernel_abi.unwrap_or(effective_abi as i32),
        LandlockStatus::NotEnabled | LandlockStatus::NotImplemented => 0,
    }
}

fn report(abi: i32) -> LandlockReport {
    let files = match abi {
        0 => State::Lacking("the kernel has no Landlock"),
        n if n < FILES_COMPLETE => State::Partly("this ABI does not cover truncation or linking"),
        _ => State::On,
    };
    let since = |first, why| {
        if abi >= first {
            State::On
        } else {
            State::Lacking(why)
        }
    };
    LandlockReport {
        abi,
        layers: [
            LayerReport {
                layer: Layer::LandlockFiles,
                state: files,
            },
            LayerReport {
                layer: Layer::LandlockTcp,
                state: since(TCP, "needs Landlock ABI 4"),
            },
            LayerReport {
                layer: Layer::LandlockScopes,
                state: since(SCOPES, "needs Landlock ABI 6"),
            },
        ],
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn older_kernels_are_told_apart() {
        let on = |abi| report(abi).layers.map(|l| l.is_on());
        assert_eq!(on(0), [false, false, false]);
        assert_eq!(on(2), [false, false, false]);
        assert!(matches!(report(2).layers[0].state, State::Partly(_)));
        assert_eq!(on(4), [true, true, false]);
        assert_eq!(on(7), [true, true, true]);
    }
}
