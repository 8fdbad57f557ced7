//! `net` started by hand or by a manager: a card for any vhost-user front end.
//!
//! **Job.** From options to an open tap; `device_host::alone` does the rest.
//! **Who is not trusted.** The front end, which this process never reads from.
//! **Why this way.** The process that serves is the one that a VM's broker would start, in the same jail; this one only opens. The
//! control queue is the front end's, as with every vhost-user card.

mod cli;

use std::process::ExitCode;

use ipc::spec::DeviceSpec;
use ipc::tap::TapError;
use thiserror::Error;

use cli::{ABOUT, Options};

/// Why there is no card.
#[derive(Debug, Error)]
#[error("--tap {0}: {1}")]
struct CardError(String, TapError);

/// The program, with the arguments after its name.
pub fn run(arguments: impl Iterator<Item = String>) -> ExitCode {
    ABOUT.answer(cli::parse(arguments), |options| {
        let Options { tap, card, common } = options;
        ABOUT.serve(common, || match ipc::tap::open(&tap, card.queue_pairs) {
            Ok(queues) => Ok((DeviceSpec::Net(card), queues)),
            Err(error) => Err(CardError(tap, error)),
        })
    })
}
