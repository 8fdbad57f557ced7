//! The steps that build a jail, one kernel mechanism each.
//!
//! Job: start a device process in its jail ([`spawn()`]), let that process lock the door from the
//! inside and check that it is locked ([`inner::lock`]), lock the control process down
//! ([`self_lock()`]), and put a whole VM into an outer jail ([`cli::run`], the command `ozone`).
//! Not trusted: the process inside the jail, from its first instruction after the harness. The
//! caller is trusted: it is the broker, or the control process before the guest runs.
//! Why this way: every layer is a small file under `steps/` that does one thing and says whether it
//! could. A layer that the host cannot give is reported with the reason, and [`Sandbox::Strict`]
//! turns the report into a refusal; a step that fails for any other reason ends the start.

mod cleanup;
pub mod cli;
mod exec;
mod fault;
pub mod inner;
mod inside;
pub mod keeper;
mod layer;
mod plan;
mod self_lock;
pub mod spawn;
mod steps;
pub mod successor;
mod sys;
pub mod tree;
mod watch;

pub use layer::{Layer, LayerReport, Sandbox, State};
pub use self_lock::{
    SelfLockError, SelfReport, keep_starting, self_lock, while_open_to_inspection,
};
pub use spawn::{Child, DeviceLaunch, Pending, SharedTree, SpawnError, spawn};
pub use steps::idmap::Identity;
pub use steps::landlock::{LandlockReport, abi as landlock_abi};
pub use steps::rlimits::Limits;
pub use sys::code::give_code_back;
