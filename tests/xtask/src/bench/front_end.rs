//! # `cargo xtask bench fs`, `bench block` and `bench net`
//!
//! **Job.** A device beside others of its kind: the crate's `benches/front_end` with its options, built for release.
//! **Who is not trusted.** The machine's load; see the parent module.
//! **Why this way.** The load generators need the devices' crates, which this program has no other use for.

use crate::tool;
use std::process::ExitCode;

/// The load generator reads its own line, and explains it.
#[derive(Debug, clap::Args)]
#[command(disable_help_flag = true)]
pub(crate) struct Options {
    /// --help tells them.
    #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
    options: Vec<String>,
}

pub(crate) fn run(package: &str, options: &Options) -> Result<ExitCode, String> {
    let mut command = tool::cargo(&["bench", "--quiet", "--package", package]);
    command
        .args(["--bench", "front_end", "--"])
        .args(&options.options);
    tool::run(&mut command)?;
    Ok(ExitCode::SUCCESS)
}
