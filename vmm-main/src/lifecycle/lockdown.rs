//! What this process gives up before the first guest instruction.
//!
//! **Job.** Capabilities, no_new_privs, dumps, Landlock once for the process while it has one thread; then one seccomp
//! filter per thread, each installed by the thread itself.
//! **Who is not trusted**: this very process, once the guest runs.
//! **Why this way.** All layers but seccomp are inherited by threads that start later, so the order is: lock, start threads,
//! filter.

use ipc::log::{debug, error};
use ipc::start::{SandboxMode, SeccompMode};
use ozone::{Sandbox, SelfLockError};
use seccomp_policies::{Action, Policy};

/// What a thread's start hook gives back.
type HookResult = Result<(), Box<dyn std::error::Error + Send + Sync>>;

/// Locks the process. Call it with one thread.
pub(super) fn lock(mode: SandboxMode) -> Result<(), SelfLockError> {
    let report = ozone::self_lock(match mode {
        SandboxMode::BestEffort => Sandbox::BestEffort,
        SandboxMode::Strict => Sandbox::Strict,
    })?;
    for layer in report.layers {
        if layer.is_on() {
            debug!("control process: {layer}");
        } else {
            error!("control process: jail layer not in force: {layer}");
        }
    }
    Ok(())
}

/// Installs `policy` for the calling thread as `mode` says.
pub(crate) fn filter(policy: Policy, mode: SeccompMode) -> Result<(), seccomp_policies::Error> {
    let action = match mode {
        SeccompMode::Kill => Action::Kill,
        SeccompMode::Log => Action::Log,
        SeccompMode::Trap => Action::Trap,
        SeccompMode::Disabled => return Ok(()),
    };
    seccomp_policies::install(policy, action)
}

/// [`filter`] as the first thing of a new thread.
pub(super) fn hook(policy: Policy, mode: SeccompMode) -> HookResult {
    filter(policy, mode).map_err(Into::into)
}
