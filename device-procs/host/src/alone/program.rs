//! The outside of a device's program that a person or a manager starts.
//!
//! **Job.** Words from the system to a [`Command`], the answers to questions about the program itself, and for a device that is to be
//! served the order: descriptors, log, back ends, then [`serve`](super::serve).
//! **Who is not trusted.** Nobody yet: what the front end and the guest say is never read on this side.
//! **Why this way.** A user meets the same words, exit statuses (2 for a wrong line, 1 for what fails later) and messages with
//! every one of these programs, so they come from one place.

use std::error::Error;
use std::fmt::Display;
use std::os::fd::OwnedFd;
use std::process::ExitCode;

use ipc::spec::DeviceSpec;
use thiserror::Error;

use super::cli::{Common, LogError};
use super::{Alone, AloneError};

/// What was asked for: to serve with `O`, or something about the program.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Command<O> {
    /// Serve.
    Serve(O),
    /// `--help`
    Help,
    /// `--version`
    Version,
    /// `--print-capabilities`
    Capabilities,
}

/// What a program says of itself.
#[derive(Debug)]
pub struct About {
    /// Its name, which begins its messages.
    pub name: &'static str,
    /// Its version.
    pub version: &'static str,
    /// The answer to `--print-capabilities` (QEMU's conventions for back-end programs).
    pub capabilities: &'static str,
    /// The text of `--help`.
    pub help: fn() -> String,
}

/// Why a device is not served.
#[derive(Debug, Error)]
enum ServeError<E: Error + 'static> {
    #[error(transparent)]
    Log(#[from] LogError),
    #[error(transparent)]
    Backend(E),
    #[error(transparent)]
    Alone(#[from] AloneError),
}

impl About {
    /// Does what was asked for; `serve` if that is to serve.
    pub fn answer<O, E: Display>(
        &self,
        asked: Result<Command<O>, E>,
        serve: impl FnOnce(O) -> ExitCode,
    ) -> ExitCode {
        match asked {
            Ok(Command::Serve(options)) => return serve(options),
            Ok(Command::Help) => print!("{}", (self.help)()),
            Ok(Command::Version) => println!("{} {}", self.name, self.version),
            Ok(Command::Capabilities) => println!("{}", self.capabilities),
            Err(error) => {
                eprintln!("{}: {error}", self.name);
                return ExitCode::from(2);
            }
        }
        ExitCode::SUCCESS
    }

    /// Serves the device that `open` opens, as `common` says.
    pub fn serve<E: Error + 'static>(
        &self,
        common: Common,
        open: impl FnOnce() -> Result<(DeviceSpec, Vec<OwnedFd>), E>,
    ) -> ExitCode {
        match self.try_serve(common, open) {
            Ok(()) => ExitCode::SUCCESS,
            Err(error) => {
                let line = ipc::log::with_causes(&error);
                if ipc::log::descriptor().is_some() {
                    ipc::log::error!("{line}");
                } else {
                    eprintln!("{}: {line}", self.name);
                }
                ExitCode::FAILURE
            }
        }
    }

    fn try_serve<E: Error + 'static>(
        &self,
        common: Common,
        open: impl FnOnce() -> Result<(DeviceSpec, Vec<OwnedFd>), E>,
    ) -> Result<(), ServeError<E>> {
        // First, since its number must not be given to anything else.
        let inherited = super::inherit(&common.socket)?;
        let log = common.open_log()?;
        let (device, backends) = open().map_err(ServeError::Backend)?;
        // Whatever is wrong before this is for who starts it.
        ipc::log::init(self.name, common.log_level, log);
        let alone = Alone {
            device,
            backends,
            socket: common.socket,
            seccomp: common.seccomp,
            sandbox: common.sandbox,
            log_level: common.log_level,
            keep: common.keep,
        };
        Ok(super::serve(&alone, inherited)?)
    }
}

/// The `main` of a device's program: `alone` does what a person's or a manager's words say, `managed` serves the broker that started it.
pub fn main(
    name: &'static str,
    alone: impl FnOnce(std::vec::IntoIter<String>) -> ExitCode,
    managed: impl FnOnce() -> ExitCode,
) -> ExitCode {
    let words: Result<Vec<String>, _> = std::env::args_os()
        .map(std::ffi::OsString::into_string)
        .collect();
    let Ok(mut words) = words else {
        eprintln!("{name}: arguments must be UTF-8");
        return ExitCode::from(2);
    };
    if is_asked_for(&words) {
        return alone(words.split_off(1).into_iter());
    }
    managed()
}

/// Whether these are the words of a person or a manager: options. A broker gives the program's name and the device's id, which it
/// never begins with a dash.
fn is_asked_for(words: &[String]) -> bool {
    words.get(1).is_some_and(|word| word.starts_with('-')) || words.len() > 2
}
