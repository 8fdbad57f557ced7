//! # Debian packages
//!
//! **Job.** Install what is missing, and say so, since a user should know why a command takes long.
//! **Who is not trusted.** Nobody: packages come through apt, which checks their signatures.
//! **Why this way.** Only missing packages reach apt, so a machine that has them needs no network.

use super::{LabError, run_program};
use std::process::Command;

/// Installs those of `wanted` that are missing.
///
/// # Errors
/// When apt is not there, is not allowed to install, or cannot find a package.
pub fn ensure(wanted: &[&str]) -> Result<(), LabError> {
    let missing: Vec<&str> = wanted.iter().copied().filter(|p| !installed(p)).collect();
    if missing.is_empty() {
        return Ok(());
    }
    if !nix::unistd::geteuid().is_root() {
        return Err(LabError::Host(format!(
            "these Debian packages are missing and only root may install them: {}",
            missing.join(" ")
        )));
    }
    eprintln!("installing from Debian: {}", missing.join(" "));
    if run_program(apt("install").arg("-y").args(&missing)).is_ok() {
        return Ok(());
    }
    // The package lists may be absent or old: a fresh image has none.
    refresh_lists()?;
    run_program(apt("install").arg("-y").args(&missing)).map(drop)
}

/// Fetches the package lists anew.
pub(crate) fn refresh_lists() -> Result<(), LabError> {
    eprintln!("fetching Debian's package lists");
    run_program(&mut apt("update")).map(drop)
}

fn apt(verb: &str) -> Command {
    let mut command = Command::new("apt-get");
    command.env("DEBIAN_FRONTEND", "noninteractive");
    command
        .args(["-q", "-o", "DPkg::Lock::Timeout=300"])
        .arg(verb);
    if verb == "install" {
        command.arg("--no-install-recommends");
    }
    command
}

fn installed(package: &str) -> bool {
    Command::new("dpkg-query")
        .args(["-W", "-f", "${db:Status-Status}", package])
        .output()
        .is_ok_and(|o| o.status.success() && o.stdout == b"installed")
}
