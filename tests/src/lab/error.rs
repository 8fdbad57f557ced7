//! # What can go wrong while the lab is set up or runs
//!
//! **Job.** One enum for the lab. **Who is not trusted.** Other programs: their standard error is part of the
//! message. **Why this way.** Whoever reads it has to act (install, become root, free memory), so each variant
//! names the thing to act on.

use std::io;
use std::path::PathBuf;

/// A failure of the lab itself, never of what was run in it.
#[derive(Debug, thiserror::Error)]
pub enum LabError {
    /// A program could not be started.
    #[error("cannot start {program}")]
    Start {
        /// The program.
        program: String,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// A program ended with a failure.
    #[error("{program} ended with {status}: {stderr}")]
    Failed {
        /// The program with its arguments.
        program: String,
        /// Its exit status.
        status: std::process::ExitStatus,
        /// The end of what it wrote to standard error.
        stderr: String,
    },
    /// A file operation failed.
    #[error("cannot {action} {path}")]
    File {
        /// What was tried, for example "read".
        action: &'static str,
        /// On which file.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// Another system call failed.
    #[error("cannot {action}")]
    System {
        /// What was tried.
        action: &'static str,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// The host misses something that the lab cannot install.
    #[error("this host cannot run the lab: {0}")]
    Host(String),
    /// A kernel image is not laid out as expected.
    #[error("{path} is not a kernel image that the lab can unpack: {reason}")]
    Image {
        /// The image.
        path: PathBuf,
        /// What is wrong with it.
        reason: String,
    },
    /// The emulator stands still: nothing was found out about what ran in it.
    #[error("the nested machine says nothing, and its kernel does not answer an NMI:\n{0}")]
    Frozen(String),
    /// The emulator gave the nested machine's kernel an interrupt that KVM had held off, and that kernel crashed: nothing was found
    /// out about what ran in it.
    #[error(
        "the emulator interrupted KVM between a guest's exit and STGI, of which the nested machine's kernel died:\n{0}"
    )]
    Interrupted(String),
    /// The nested machine ended before the command did.
    #[error("the nested machine ended before the command did; its last output:\n{0}")]
    Ended(String),
    /// The nested machine ran out of time before the command had ended.
    #[error("the nested machine {reason}; its last output:\n{output}")]
    Machine {
        /// What happened.
        reason: String,
        /// QEMU's messages.
        output: String,
    },
}

impl LabError {
    pub(crate) fn file(
        action: &'static str,
        path: impl Into<PathBuf>,
    ) -> impl FnOnce(io::Error) -> Self {
        let path = path.into();
        move |source| Self::File {
            action,
            path,
            source,
        }
    }

    pub(crate) fn system<E: Into<io::Error>>(action: &'static str) -> impl FnOnce(E) -> Self {
        move |source| Self::System {
            action,
            source: source.into(),
        }
    }
}
