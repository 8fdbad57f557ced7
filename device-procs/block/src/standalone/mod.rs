//! `block` started by hand or by a manager: a disk for any vhost-user front end.
//!
//! **Job.** From options to an open image; `device_host::alone` does the rest.
//! **Who is not trusted.** The front end, which this process never reads from, and the image's maker.
//! **Why this way.** The process that serves is the one that a VM's broker would start, in the same jail; this one only opens.

mod cli;

use std::fs::OpenOptions;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use device_host::alone::{self, Alone, AloneError};
use ipc::image::ImageError;
use ipc::spec::DeviceSpec;
use thiserror::Error;

use cli::{Command, Options};

#[derive(Debug, Error)]
enum DiskError {
    #[error("-D {0}")]
    Log(PathBuf, #[source] io::Error),
    #[error("--file {}", .0.display())]
    Image(PathBuf, #[source] ImageError),
    #[error(transparent)]
    Alone(#[from] AloneError),
}

/// Whether these are the words of a person or a manager: options. A broker gives the program's name and the device's id, which it
/// never begins with a dash.
#[must_use]
pub fn is_asked_for(words: &[String]) -> bool {
    words.get(1).is_some_and(|word| word.starts_with('-')) || words.len() > 2
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
    // First, since its number must not be given to anything else.
    let inherited = alone::inherit(&options.socket)?;
    let log = open_log(options.log.as_deref())?;
    let disk = &options.disk;
    let image = ipc::image::open(&options.file, disk.readonly, disk.direct)
        .map_err(|e| DiskError::Image(options.file.clone(), e))?;
    // Whatever is wrong before this is for who starts it.
    ipc::log::init("block", options.log_level, log);
    let alone = Alone {
        device: DeviceSpec::Block(options.disk),
        backends: vec![image.into()],
        socket: options.socket,
        seccomp: options.seccomp,
        sandbox: options.sandbox,
        log_level: options.log_level,
        keep: options.keep,
    };
    Ok(alone::serve(&alone, inherited)?)
}

fn open_log(path: Option<&Path>) -> Result<OwnedFd, DiskError> {
    let Some(path) = path else {
        return io::stderr()
            .as_fd()
            .try_clone_to_owned()
            .map_err(|e| DiskError::Log("standard error".into(), e));
    };
    OpenOptions::new()
        .append(true)
        .create(true)
        .mode(0o600)
        .open(path)
        .map(OwnedFd::from)
        .map_err(|e| DiskError::Log(path.to_owned(), e))
}
