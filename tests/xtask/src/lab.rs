//! # `cargo xtask lab`
//!
//! **Job.** Run a command where Linux guests boot: here, when this host's KVM boots Linux, else in the nested
//! machine. The exit status is the command's. **Who is not trusted.** Nobody; the command is the developer's.
//! **Why this way.** One spelling for both kinds of host, which always says which place it uses and why.

use std::os::unix::process::ExitStatusExt;
use std::process::ExitCode;
use std::time::Duration;
use tests::lab::{Flavour, Guest, Nested, Place, chain, place};

pub(crate) fn run(arguments: &[String]) -> Result<ExitCode, String> {
    let mut nested = Nested {
        limit: None,
        interactive: true,
        ..Nested::default()
    };
    let mut force_nested = false;
    let mut rest = arguments.iter();
    let mut command: Vec<String> = Vec::new();
    while let Some(argument) = rest.next() {
        let mut value = |what: &str| {
            rest.next()
                .cloned()
                .ok_or_else(|| format!("{argument} needs {what} behind it"))
        };
        match argument.as_str() {
            "--kernel" => {
                nested.flavour = match value("cloud or full")?.as_str() {
                    "cloud" => Flavour::Cloud,
                    "full" => Flavour::Full,
                    other => {
                        return Err(format!("--kernel {other}: the kernels are cloud and full"));
                    }
                }
            }
            "--mem" => nested.memory = number(argument, &value("a number of MiB")?, 512, 65536)?,
            "--smp" => {
                nested.processors = number(argument, &value("a number of processors")?, 1, 16)?;
            }
            "--timeout" => {
                let seconds = number(argument, &value("a number of seconds")?, 1, 86400)?;
                nested.limit = Some(Duration::from_secs(seconds.into()));
            }
            "--share" => {
                let dir = value("a folder")?;
                let dir = std::fs::canonicalize(&dir).map_err(|e| format!("--share {dir}: {e}"))?;
                nested.share = Some(dir);
            }
            "--qemu" => nested.qemu.push(value("an argument for QEMU")?),
            "--nested" => force_nested = true,
            "--where" => {
                return place(nested.flavour)
                    .map(|place| {
                        println!("{}", describe(&place));
                        ExitCode::SUCCESS
                    })
                    .map_err(|e| chain(&e));
            }
            "--" => {
                command.extend(rest.by_ref().cloned());
            }
            other if other.starts_with('-') => {
                return Err(format!(
                    "{other}: the options are --kernel, --mem, --smp, --timeout, --share, --qemu, --nested and --where"
                ));
            }
            _ => {
                command.push(argument.clone());
                command.extend(rest.by_ref().cloned());
            }
        }
    }
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
    if matches!(place, Place::Here { .. }) && !force_nested {
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

fn number(option: &str, text: &str, least: u32, most: u32) -> Result<u32, String> {
    text.parse()
        .ok()
        .filter(|n| (least..=most).contains(n))
        .ok_or_else(|| format!("{option} {text}: a whole number from {least} to {most} is wanted"))
}
