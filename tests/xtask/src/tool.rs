//! # Running cargo and friends
//!
//! **Job.** Start a program with this terminal as its own and turn a failure into a message.
//! **Who is not trusted.** Nobody. **Why this way.** The tool's own output is the best report there is, so it is not
//! captured.

use std::path::PathBuf;
use std::process::Command;

/// The target that `.cargo/config.toml` builds for, and the folder of its programs.
pub(crate) const TARGET: &str = "x86_64-unknown-linux-gnu";

/// The project's folder.
pub(crate) fn root() -> PathBuf {
    // tests/xtask lies two folders below it
    let own = PathBuf::from(env!("CARGO_MANIFEST_DIR"));
    own.ancestors()
        .nth(2)
        .map_or_else(|| own.clone(), PathBuf::from)
}

/// `cargo` in the project's folder.
pub(crate) fn cargo(arguments: &[&str]) -> Command {
    let mut command = Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    command.args(arguments).current_dir(root());
    command
}

/// Runs it to its end; anything but success is an error.
pub(crate) fn run(command: &mut Command) -> Result<(), String> {
    let shown = show(command);
    eprintln!("+ {shown}");
    match command.status() {
        Ok(status) if status.success() => Ok(()),
        Ok(status) => Err(format!("{shown} ended with {status}")),
        Err(error) => Err(format!("cannot start {shown}: {error}")),
    }
}

/// What it writes to standard output.
pub(crate) fn output(command: &mut Command) -> Result<String, String> {
    let shown = show(command);
    let output = command
        .output()
        .map_err(|e| format!("cannot start {shown}: {e}"))?;
    if output.status.success() {
        return Ok(String::from_utf8_lossy(&output.stdout).into_owned());
    }
    Err(format!(
        "{shown} ended with {}: {}",
        output.status,
        String::from_utf8_lossy(&output.stderr)
    ))
}

/// Whether `cargo NAME` is installed.
pub(crate) fn has_subcommand(name: &str) -> bool {
    cargo(&[name, "--version"])
        .output()
        .is_ok_and(|o| o.status.success())
}

/// The folder of the product's release programs, after building them.
pub(crate) fn build_release() -> Result<PathBuf, String> {
    run(&mut cargo(&[
        "build",
        "--release",
        "--workspace",
        "--exclude",
        "xtask",
        "--bins",
    ]))?;
    let target =
        std::env::var_os("CARGO_TARGET_DIR").map_or_else(|| root().join("target"), PathBuf::from);
    Ok(target.join(TARGET).join("release"))
}

fn show(command: &Command) -> String {
    let mut words = vec![command.get_program().to_string_lossy().into_owned()];
    words.extend(command.get_args().map(|a| a.to_string_lossy().into_owned()));
    words.join(" ")
}
