//! # Where Linux guests boot
//!
//! **Job.** Decide between this host's own `/dev/kvm` and the nested machine, and say why.
//! **Who is not trusted.** The host's KVM: only a guest that reached its init proves it.
//! **Why this way.** The trial uses QEMU and a stock kernel, so a fault of the product can never be taken for a
//! fault of the host. The answer holds until the host is booted anew, so it is kept for that long.

use super::kernel::{Flavour, cache_dir};
use super::{Guest, LabError, in_nested, packages};
use crate::console::{Console, ConsoleError};
use std::fs::{self, OpenOptions};
use std::io;
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::time::Duration;

/// How long a stock kernel may take to its init; hardware needs less than a second.
const BOOT_LIMIT: Duration = Duration::from_secs(15);

/// The answer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Place {
    /// On this machine directly.
    Here {
        /// How that is known.
        why: String,
    },
    /// In the nested machine.
    Nested {
        /// Why not here.
        why: String,
    },
}

/// Where Linux guests boot on this host.
///
/// # Errors
/// When they boot nowhere, because something is missing that cannot be installed.
pub fn place(flavour: Flavour) -> Result<Place, LabError> {
    if !cfg!(target_arch = "x86_64") {
        return Err(LabError::Host(
            "its guests are x86-64 ones and this host is not".into(),
        ));
    }
    if in_nested() {
        return Ok(Place::Here {
            why: "this is the nested machine".into(),
        });
    }
    if let Err(error) = OpenOptions::new().read(true).write(true).open("/dev/kvm") {
        return Ok(Place::Nested {
            why: format!("/dev/kvm cannot be opened ({error})"),
        });
    }
    let known = verdict_file()?;
    if let Ok(text) = fs::read_to_string(&known)
        && let Some((answer, why)) = text.split_once('\n')
    {
        let why = why.trim().to_owned();
        return Ok(if answer == "here" {
            Place::Here { why }
        } else {
            Place::Nested { why }
        });
    }
    let place = try_to_boot(&Guest::ready(flavour)?)?;
    let text = match &place {
        Place::Here { why } => format!("here\n{why}\n"),
        Place::Nested { why } => format!("nested\n{why}\n"),
    };
    fs::write(&known, text).map_err(LabError::file("write", &known))?;
    Ok(place)
}

/// The file that keeps the answer for as long as the host runs.
fn verdict_file() -> Result<PathBuf, LabError> {
    let path = "/proc/sys/kernel/random/boot_id";
    let boot = fs::read_to_string(path).map_err(LabError::file("read", path))?;
    let dir = cache_dir();
    fs::create_dir_all(&dir).map_err(LabError::file("create", &dir))?;
    Ok(dir.join(format!("kvm-on-boot-{}", boot.trim())))
}

fn try_to_boot(guest: &Guest) -> Result<Place, LabError> {
    packages::ensure(&["qemu-system-x86"])?;
    let (output, writer) = io::pipe().map_err(LabError::system("make a pipe"))?;
    let errors = writer
        .try_clone()
        .map_err(LabError::system("copy a descriptor"))?;
    let child = Command::new("setpriv")
        .args(["--pdeathsig", "KILL", "qemu-system-x86_64"])
        .args([
            "-M",
            "microvm",
            "-accel",
            "kvm",
            "-cpu",
            "host,arch-capabilities=off",
            "-m",
            "256",
            "-nodefaults",
            "-no-reboot",
        ])
        .args(["-display", "none", "-serial", "stdio", "-append"])
        .arg("console=ttyS0 quiet panic=-1 reboot=t run=true")
        .arg("-kernel")
        .arg(&guest.kernel.elf)
        .arg("-initrd")
        .arg(&guest.initrd)
        .stdin(Stdio::null())
        .stdout(writer)
        .stderr(errors)
        .spawn()
        .map_err(|source| LabError::Start {
            program: "qemu-system-x86_64".into(),
            source,
        })?;
    let _child = KilledOnDrop(child);
    let mut console = Console::new(output, None);
    let came = console.wait_for_any(
        &["GUEST-UP", "KVM internal error", "error: kvm run failed"],
        BOOT_LIMIT,
    );
    Ok(match came {
        Ok((0, _)) => Place::Here { why: "a stock kernel boots on /dev/kvm (tried with QEMU)".into() },
        Ok(_) => Place::Nested {
            why: "/dev/kvm takes a guest but stops a stock kernel with an internal error (tried with QEMU)".into(),
        },
        Err(ConsoleError::Late { .. }) => Place::Nested {
            why: format!("a stock kernel does not reach its init on /dev/kvm within {BOOT_LIMIT:?} (tried with QEMU)"),
        },
        Err(error) => Place::Nested {
            why: format!("QEMU cannot use /dev/kvm: {}", error.to_string().replace('\n', " ")),
        },
    })
}

/// A child process that does not outlive its owner.
#[derive(Debug)]
pub(crate) struct KilledOnDrop(pub(crate) Child);

impl Drop for KilledOnDrop {
    fn drop(&mut self) {
        // Either call fails only when the child has ended already.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}
