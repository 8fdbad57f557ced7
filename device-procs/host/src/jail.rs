//! The inner half of the jail: what only the process itself can do, after exec.
//!
//! **Job.** Asks `ozone` to lock and verify the door, then installs this device's seccomp filter as the last step.
//! **Who is not trusted.** This process, from here on.
//! **Why this way.** The outer half (namespaces, root, identity, limits) was done before exec by the broker; nothing here can
//! be undone, and a failure is the end of the start.

use ipc::spec::DeviceSpec;
use ipc::spec::block::ImageFormat;
use ipc::start::{SandboxMode, SeccompMode, StartMessage};
use ozone::Sandbox;
use ozone::inner::{LockError, Root};
use seccomp_policies::{Action, Policy};
use thiserror::Error;

use crate::fault::HostFault;
use crate::signals;

/// Why the door cannot be locked.
#[derive(Debug, Error)]
pub enum JailError {
    /// A layer is missing that must be there, or cannot be had.
    #[error(transparent)]
    Lock(#[from] LockError),
    /// Signals could not be set up.
    #[error(transparent)]
    Signals(#[from] HostFault),
    /// The filter could not be installed.
    #[error(transparent)]
    Seccomp(#[from] seccomp_policies::Error),
}

const fn policy(device: &DeviceSpec) -> Policy {
    match device {
        DeviceSpec::Block(spec) => match spec.io.format {
            ImageFormat::Raw => Policy::Block,
            ImageFormat::Qcow2 { .. } => Policy::BlockQcow2,
        },
        DeviceSpec::Net(spec) => {
            if spec.vhost {
                Policy::NetVhost
            } else {
                Policy::Net
            }
        }
        DeviceSpec::Fs(_) => Policy::VhostUserFs,
        DeviceSpec::Template(_) => Policy::Template,
    }
}

/// Locks this process. Afterwards only the calls of its policy are possible.
pub(crate) fn lock(start: &StartMessage) -> Result<ozone::inner::Jailed, JailError> {
    lock_as(start, policy(&start.device))
}

/// As [`lock`], as the keeper of a device: [`serve`] follows in those that it starts.
pub(crate) fn lock_keeper(start: &StartMessage) -> Result<ozone::inner::Jailed, JailError> {
    lock_as(start, Policy::FsKeeper)
}

/// In a process that the keeper has started: only the calls of the device's own policy are possible from here on.
pub(crate) fn serve(start: &StartMessage) -> Result<(), JailError> {
    if let Some(action) = action(start) {
        seccomp_policies::install(policy(&start.device), action)?;
    }
    Ok(())
}

/// What the filters of this process do; `None` without any.
pub fn action(start: &StartMessage) -> Option<Action> {
    match start.seccomp {
        SeccompMode::Kill => Some(Action::Kill),
        SeccompMode::Log => Some(Action::Log),
        SeccompMode::Trap => Some(Action::Trap),
        SeccompMode::Disabled => None,
    }
}

fn lock_as(start: &StartMessage, policy: Policy) -> Result<ozone::inner::Jailed, JailError> {
    let mode = match start.sandbox {
        SandboxMode::BestEffort => Sandbox::BestEffort,
        SandboxMode::Strict => Sandbox::Strict,
    };
    let root = match &start.device {
        DeviceSpec::Fs(spec) => Root::Tree {
            readonly: spec.readonly,
            capabilities: spec.capabilities(),
        },
        _ => Root::Empty,
    };
    let jailed = ozone::inner::lock(mode, root)?;
    for layer in &jailed.report().layers {
        if layer.is_on() {
            ipc::log::debug!("jail: {layer}");
        } else {
            ipc::log::error!("jail layer not in force: {layer}");
        }
    }
    // After the lock, which gives signals their default action, and before the filter.
    signals::prepare()?;
    ipc::log::trace!("locked");
    // The way here ran through code that is never needed again. Not later: the filter knows no such call.
    ozone::give_code_back();
    let Some(action) = action(start) else {
        ipc::log::warn!("runs without a seccomp filter, as was asked for");
        return Ok(jailed);
    };
    if action != Action::Kill {
        ipc::log::warn!("the seccomp filter does not kill, as was asked for: {action:?}");
    }
    seccomp_policies::install(policy, action)?;
    Ok(jailed)
}
