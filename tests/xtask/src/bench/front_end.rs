//! # `cargo xtask bench fs`, `bench block` and `bench net`
//!
//! **Job.** A device beside others of its kind: the crate's `benches/front_end` with its options, built for release.
//! **Who is not trusted.** The machine's load; see the parent module.
//! **Why this way.** The load generators need the devices' crates, which this program has no other use for.

use crate::tool;
use std::path::PathBuf;
use std::process::{Command, ExitCode};

/// The load generator reads its own line, and explains it.
#[derive(Debug, clap::Args)]
#[command(disable_help_flag = true)]
pub(crate) struct Options {
    /// --help tells them.
    #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
    options: Vec<String>,
}

/// Its own status is this program's: it has said itself what is wrong.
pub(crate) fn run(package: &str, options: &Options) -> Result<ExitCode, String> {
    let program = built(package)?;
    let status = Command::new(&program)
        .args(&options.options)
        .status()
        .map_err(|e| format!("cannot start {}: {e}", program.display()))?;
    if let Some(code) = status.code() {
        return Ok(ExitCode::from(u8::try_from(code).unwrap_or(1)));
    }
    Err(format!("{} ended with {status}", program.display()))
}

/// The load generator, once cargo has built it.
fn built(package: &str) -> Result<PathBuf, String> {
    let mut command = tool::cargo(&["bench", "--quiet", "--no-run", "--package", package]);
    command.args(["--bench", "front_end"]);
    command.arg("--message-format=json-render-diagnostics");
    let said = tool::output(&mut command)?;
    let mut programs = said.lines().filter_map(|line| {
        let message: serde_json::Value = serde_json::from_str(line).ok()?;
        let found = message["target"]["name"] == "front_end";
        let program = message["executable"].as_str().filter(|_| found)?;
        Some(PathBuf::from(program))
    });
    programs
        .next()
        .ok_or_else(|| format!("cargo built no front_end for {package}"))
}
