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

use clap::Subcommand;
use std::process::ExitCode;

/// Measure, and print ratios beside peers where there are some.
#[derive(Debug, Subcommand)]
pub(crate) enum Bench {
    Startup(startup::Options),
    /// The shared folder beside other virtio-fs daemons.
    Fs(front_end::Options),
    /// A disk beside qemu-storage-daemon, fio's `io_uring` and any back end's socket.
    Block(front_end::Options),
    /// Packets through a card's process beside a plain loop on a tap and dpdk-testpmd.
    Net(front_end::Options),
    Jail(jail::Options),
    Restore(restore::Options),
    Recovery(recovery::Options),
    Shares(shares::Options),
}

pub(crate) fn run(bench: &Bench) -> Result<ExitCode, String> {
    match bench {
        Bench::Startup(options) => startup::run(options),
        Bench::Fs(options) => front_end::run("vhost-user-fs", options),
        Bench::Block(options) => front_end::run("block", options),
        Bench::Net(options) => front_end::run("net", options),
        Bench::Jail(options) => jail::run(options),
        Bench::Restore(options) => restore::run(options),
        Bench::Recovery(options) => recovery::run(options),
        Bench::Shares(options) => shares::run(options),
    }
}
