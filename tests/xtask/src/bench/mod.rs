//! # `cargo xtask bench`
//!
//! **Job.** The benches by name. **Who is not trusted.** The machine: its load drifts, so all candidates take turns
//! in one run, and medians are compared. **Why this way.** A figure alone says little; beside the peers', taken in the
//! same minute, it says which way we moved.

mod firecracker;
mod front_end;
mod jail;
mod meter;
mod peers;
mod recovery;
mod restore;
mod shares;
mod startup;

use std::process::ExitCode;

pub(crate) fn run(arguments: &[String]) -> Result<ExitCode, String> {
    match arguments.split_first() {
        Some((name, rest)) if name == "startup" => startup::run(rest),
        Some((name, rest)) if name == "fs" => front_end::run("vhost-user-fs", rest),
        Some((name, rest)) if name == "block" => front_end::run("block", rest),
        Some((name, rest)) if name == "net" => front_end::run("net", rest),
        Some((name, rest)) if name == "jail" => jail::run(rest),
        Some((name, rest)) if name == "restore" => restore::run(rest),
        Some((name, rest)) if name == "recovery" => recovery::run(rest),
        Some((name, rest)) if name == "shares" => shares::run(rest),
        _ => {
            Err("the benches are: startup, fs, block, net, jail, restore, recovery, shares".into())
        }
    }
}
