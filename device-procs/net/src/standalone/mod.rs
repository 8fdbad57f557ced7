//! `net` started by hand or by a manager: a card for any vhost-user front end.
//!
//! **Job.** From options to an open tap; `device_host::alone` does the rest.
//! **Who is not trusted.** The front end, which this process never reads from.
//! **Why this way.** The process that serves is the one that a VM's broker would start, in the same jail; this one only opens. The
//! control queue is the front end's, as with every vhost-user card.

mod cli;

use std::process::ExitCode;

use device_host::alone::cli::{LogError, is_asked_for as asked_for};
use device_host::alone::{self, Alone, AloneError};
use ipc::spec::DeviceSpec;
use ipc::tap::TapError;
use thiserror::Error;

use cli::{Command, Options};

#[derive(Debug, Error)]
enum CardError {
    #[error(transparent)]
    Log(#[from] LogError),
    #[error("--tap {0}: {1}")]
    Tap(String, TapError),
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
            println!("net {}", env!("CARGO_PKG_VERSION"));
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
                    eprintln!("net: {line}");
                }
                ExitCode::FAILURE
            }
        },
        Err(error) => {
            eprintln!("net: {error}");
            ExitCode::from(2)
        }
    }
}

fn serve(options: Options) -> Result<(), CardError> {
    let Options { tap, card, common } = options;
    // First, since its number must not be given to anything else.
    let inherited = alone::inherit(&common.socket)?;
    let log = common.open_log()?;
    let queues =
        ipc::tap::open(&tap, card.queue_pairs).map_err(|error| CardError::Tap(tap, error))?;
    // Whatever is wrong before this is for who starts it.
    ipc::log::init("net", common.log_level, log);
    let alone = Alone {
        device: DeviceSpec::Net(card),
        backends: queues,
        socket: common.socket,
        seccomp: common.seccomp,
        sandbox: common.sandbox,
        log_level: common.log_level,
        keep: common.keep,
    };
    Ok(alone::serve(&alone, inherited)?)
}
