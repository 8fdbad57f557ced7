//! One client's bytes without a socket and a thread, for fuzz targets.
//!
//! **Job.** [`converse`] takes a client's bytes in pieces and gives what the client would be sent; commands that are for
//! main are answered with an error. **Who is not trusted.** The bytes. **Why this way.** Compiled only with
//! `cfg(fuzzing)`; everything but the socket is the code that serves clients.

use std::sync::Arc;
use std::sync::mpsc::channel;

use nix::sys::eventfd::{EfdFlags, EventFd};

use super::command::{Inbox, Outbox};
use super::descriptors::Descriptors;
use super::session::{Info, Session, Step};

/// Answers to `pieces`, as they would be sent. `forwarded` is shown each command that is for main.
pub fn converse<'a>(
    info: &Arc<Info>,
    pieces: impl Iterator<Item = &'a [u8]>,
    mut forwarded: impl FnMut(&super::VmCommand),
) -> Vec<String> {
    let mut session = Session::default();
    let mut descriptors = Descriptors::default();
    let mut answers = Vec::new();
    let (sender, inbox) = channel();
    let Ok(wake) = EventFd::from_flags(EfdFlags::EFD_NONBLOCK) else {
        return answers;
    };
    let outbox = Outbox {
        sender,
        wake: Arc::new(wake),
    };
    for piece in pieces {
        // With each piece a descriptor, as a client may pass one.
        let fd = std::fs::File::open("/dev/null").ok().map(Into::into);
        session.push(piece, fd);
        while let Some(step) = session.step(info, 0, &mut descriptors) {
            match step {
                Step::Answer(value) => answers.push(value),
                Step::HangUp(value) => {
                    answers.push(value);
                    return answers;
                }
                Step::Forward(forward) => {
                    let command = forward.build(0, info, &outbox);
                    forwarded(&command);
                    // A reply that is dropped answers with an error.
                    drop(command);
                    answers.extend(inbox.try_iter().filter_map(|message| match message {
                        Inbox::Answer { message, .. } => Some(message),
                        _ => None,
                    }));
                }
            }
        }
    }
    answers
}
