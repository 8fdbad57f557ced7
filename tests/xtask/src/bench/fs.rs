//! # `cargo xtask bench fs`
//!
//! **Job.** The shared folder beside other daemons: `vhost-user-fs/benches/front_end` with its options, built for release.
//! **Who is not trusted.** The machine's load; see the parent module.
//! **Why this way.** The load generator needs the daemon's crate, which this program has no other use for.

use crate::tool;
use std::process::ExitCode;

pub(crate) fn run(arguments: &[String]) -> Result<ExitCode, String> {
    let mut command = tool::cargo(&["bench", "--quiet", "--package", "vhost-user-fs"]);
    command.args(["--bench", "front_end", "--"]).args(arguments);
    tool::run(&mut command)?;
    Ok(ExitCode::SUCCESS)
}
