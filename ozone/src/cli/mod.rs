//! The command `ozone`: arguments in, exit status out.
//!
//! Job: read the arguments ([`args`]), and start a VM in its outer jail or clean up behind one.
//! Not trusted: whoever composed the arguments may repeat what a tenant wrote, so a name is one
//! path component and nothing else, and unknown or repeated arguments are errors.
//! Why this way: the arguments are the manual's, in its order and with its spelling; each error
//! names the argument, the value and what is allowed.

mod args;
mod help;

pub(crate) use args::{Cgroup, Options};

use crate::{cleanup, exec, plan};
use std::{ffi::OsString, process::ExitCode};

/// What the arguments ask for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Request {
    /// A VM in a jail.
    Launch(Options),
    /// No trace of one.
    Clean(Options),
    /// [`help::TEXT`].
    Help,
    /// The version.
    Version,
}

/// Runs the command with its arguments, without the program's name, to the end.
///
/// Must be called before the process opens anything or starts a thread. When the VM was ended by a
/// signal, this process ends by the same one.
#[must_use]
pub fn run(args: Vec<OsString>) -> ExitCode {
    let outcome = match args::parse(args) {
        Ok(Request::Help) => {
            print!("{}", help::TEXT);
            return ExitCode::SUCCESS;
        }
        Ok(Request::Version) => {
            println!("ozone {}", env!("CARGO_PKG_VERSION"));
            return ExitCode::SUCCESS;
        }
        Ok(Request::Clean(options)) => cleanup::run(&options).map(|()| 0),
        Ok(Request::Launch(options)) => plan::plan(&options).and_then(|plan| exec::run(&plan)),
        Err(fault) => Err(fault),
    };
    match outcome {
        Ok(status) => ExitCode::from(status),
        Err(fault) => {
            eprintln!("ozone: {fault}");
            ExitCode::FAILURE
        }
    }
}
