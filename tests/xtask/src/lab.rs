//! # `cargo xtask lab`
//!
//! **Job.** Run a command where Linux guests boot: here, when this host's KVM boots Linux, else in the nested
//! machine. The exit status is the command's. **Who is not trusted.** Nobody; the command is the developer's.
//! **Why this way.** One spelling for both kinds of host, which always says which place it uses and why.

use clap::{ValueEnum, value_parser};
use std::os::unix::process::ExitStatusExt;
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;
use tests::lab::{Flavour, Guest, Nested, Place, chain, place};

/// Run a command where Linux guests boot: here, or in a nested machine. The exit status is the command's.
#[derive(Debug, clap::Args)]
pub(crate) struct Options {
    /// The nested machine's kernel.
    #[arg(long, value_enum, default_value_t = Kernel::Cloud)]
    kernel: Kernel,
    /// The nested machine's memory in MiB.
    #[arg(long, value_name = "MIB", value_parser = value_parser!(u32).range(512..=65_536))]
    mem: Option<u32>,
    /// The nested machine's processors.
    #[arg(long, value_name = "N", value_parser = value_parser!(u32).range(1..=16))]
    smp: Option<u32>,
    /// End the nested machine after so many seconds; without, it may take any time.
    #[arg(long, value_name = "S", value_parser = value_parser!(u32).range(1..=86_400))]
    timeout: Option<u32>,
    /// A folder of this host that can be written to from the nested machine.
    #[arg(long, value_name = "DIR")]
    share: Option<PathBuf>,
    /// One more argument for the nested machine's QEMU; may be given again.
    #[arg(long, value_name = "ARG", allow_hyphen_values = true)]
    qemu: Vec<String>,
    /// The nested machine even if guests boot here.
    #[arg(long)]
    nested: bool,
    /// Only say where guests boot, and why there.
    #[arg(long = "where")]
    tell: bool,
    /// What to run, a shell by default; one word is a line for a shell.
    #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
    command: Vec<String>,
}

/// Debian's kernels.
#[derive(Debug, Clone, Copy, ValueEnum)]
enum Kernel {
    /// Small, for cloud machines.
    Cloud,
    /// With every driver.
    Full,
}

impl From<Kernel> for Flavour {
    fn from(kernel: Kernel) -> Self {
        match kernel {
            Kernel::Cloud => Self::Cloud,
            Kernel::Full => Self::Full,
        }
    }
}

impl Options {
    fn machine(&self) -> Result<Nested, String> {
        let mut nested = Nested {
            flavour: self.kernel.into(),
            limit: self.timeout.map(|s| Duration::from_secs(s.into())),
            qemu: self.qemu.clone(),
            interactive: true,
            ..Nested::default()
        };
        if let Some(dir) = &self.share {
            let whole = dir.canonicalize();
            nested.share = Some(whole.map_err(|e| format!("--share {}: {e}", dir.display()))?);
        }
        nested.memory = self.mem.unwrap_or(nested.memory);
        nested.processors = self.smp.unwrap_or(nested.processors);
        Ok(nested)
    }
}

pub(crate) fn run(options: Options) -> Result<ExitCode, String> {
    let nested = options.machine()?;
    if options.tell {
        println!(
            "{}",
            describe(&place(nested.flavour).map_err(|e| chain(&e))?)
        );
        return Ok(ExitCode::SUCCESS);
    }
    let mut command = options.command;
    if command.is_empty() {
        command.push("bash".into());
    }
    let place = place(nested.flavour).map_err(|e| chain(&e))?;
    let guest = Guest::ready(nested.flavour).map_err(|e| chain(&e))?;
    eprintln!("lab: {}", describe(&place));
    eprintln!(
        "lab: guest kernel {} and {}, initrd {}",
        guest.kernel.bzimage.display(),
        guest.kernel.elf.display(),
        guest.initrd.display()
    );
    if matches!(place, Place::Here { .. }) && !options.nested {
        return directly(&command);
    }
    let status = nested.run(&command).map_err(|e| chain(&e))?;
    Ok(ExitCode::from(u8::try_from(status).unwrap_or(1)))
}

fn describe(place: &Place) -> String {
    match place {
        Place::Here { why } => format!("running on this machine: {why}"),
        Place::Nested { why } => format!("running in the nested machine: {why}"),
    }
}

fn directly(command: &[String]) -> Result<ExitCode, String> {
    let words = match command {
        [line] => vec!["bash".to_owned(), "-c".into(), line.clone()],
        words => words.to_vec(),
    };
    let status = std::process::Command::new(&words[0])
        .args(&words[1..])
        .status()
        .map_err(|e| format!("cannot start {}: {e}", words[0]))?;
    let code = status
        .code()
        .unwrap_or_else(|| 128 + status.signal().unwrap_or(0));
    Ok(ExitCode::from(u8::try_from(code).unwrap_or(1)))
}
