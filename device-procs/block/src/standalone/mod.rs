//! `block` started by hand or by a manager: a disk for any vhost-user front end.
//!
//! **Job.** From options to an open image; `device_host::alone` does the rest.
//! **Who is not trusted.** The front end, which this process never reads from, and the image's maker.
//! **Why this way.** The process that serves is the one that a VM's broker would start, in the same jail; this one only opens.

mod cli;

use std::path::PathBuf;
use std::process::ExitCode;

use device_host::alone::cli::{LogError, is_asked_for as asked_for};
use device_host::alone::{self, Alone, AloneError};
use ipc::image::ImageError;
use ipc::spec::DeviceSpec;
use thiserror::Error;

use cli::{Command, Options};

#[derive(Debug, Error)]
enum DiskError {
    #[error(transparent)]
    Log(#[from] LogError),
    #[error("--file {}", .0.display())]
    Image(PathBuf, #[source] ImageError),
    #[error(transparent)]
    Alone(#[from] AloneError),
}

/// Whether these are the words of a person or a manager.
#[must_use]
pub fn is_asked_for(words: &[String]) -> bool {
    asked_for(words)
}

/// The program, with the arguments after its name.
pub fn run(arguments: impl Iterator<Item = String>) -> ExitCode {
    match cli::parse(arguments) {
        Ok(Command::Help) => {
            print!("{}", cli::help());
            ExitCode::SUCCESS
        }
        Ok(Command::Version) => {
            println!("block {}", env!("CARGO_PKG_VERSION"));
            ExitCode::SUCCESS
        }
        Ok(Command::Capabilities) => {
            println!("{}", cli::CAPABILITIES);
            ExitCode::SUCCESS
        }
        Ok(Command::Serve(options)) => match serve(*options) {
            Ok(()) => ExitCode::SUCCESS,
            Err(error) => {
                let line = ipc::log::with_causes(&error);
                if ipc::log::descriptor().is_some() {
                    ipc::log::error!("{line}");
                } else {
                    eprintln!("block: {line}");
                }
                ExitCode::FAILURE
            }
        },
        Err(error) => {
            eprintln!("block: {error}");
            ExitCode::from(2)
        }
    }
}

fn serve(options: Options) -> Result<(), DiskError> {
    let Options { file, disk, common } = options;
    // First, since its number must not be given to anything else.
    let inherited = alone::inherit(&common.socket)?;
    let log = common.open_log()?;
    let image = ipc::image::open(&file, disk.readonly, disk.direct)
        .map_err(|e| DiskError::Image(file, e))?;
    // Whatever is wrong before this is for who starts it.
    ipc::log::init("block", common.log_level, log);
    let alone = Alone {
        device: DeviceSpec::Block(disk),
        backends: vec![image.into()],
        socket: common.socket,
        seccomp: common.seccomp,
        sandbox: common.sandbox,
        log_level: common.log_level,
        keep: common.keep,
    };
    Ok(alone::serve(&alone, inherited)?)
}
