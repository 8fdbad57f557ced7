//! Why there is no VM.
//!
//! **Job.** Every reason for which a start fails, in words that name the option at fault.

use std::path::PathBuf;

use ipc::spec::vm::BootSpec;
use nix::errno::Errno;
use thiserror::Error;

use crate::affinity::AffinityError;
use crate::broker::ClientError;
use crate::kvm;
use crate::lifecycle::daemon::DaemonError;
use crate::machine::microvm;
use crate::memory;
use crate::qmp;
use crate::virtio::core::CoreError;
use crate::virtio::remote::RemoteError;
use crate::virtio::window::WindowError;

/// Why there is no VM.
#[derive(Debug, Error)]
pub(in crate::lifecycle) enum StartError {
    /// The broker refused something, or could not be started.
    #[error(transparent)]
    Broker(#[from] ClientError),
    /// A device process ended before it served.
    #[error("device {id}: its process ended {how}{}{last_words}", if last_words.is_empty() { "" } else { ": " })]
    DeviceEnded {
        /// The device.
        id: String,
        /// How it ended.
        how: String,
        /// Its last log line.
        last_words: String,
    },
    /// A device process does not speak vhost-user as it should.
    #[error(transparent)]
    Device(#[from] RemoteError),
    /// A device cannot be put behind its registers.
    #[error(transparent)]
    Transport(#[from] CoreError),
    /// KVM.
    #[error(transparent)]
    Kvm(#[from] kvm::Error),
    /// The topology.
    #[error("-smp: {0}")]
    Topology(#[from] kvm::topology::Error),
    /// Guest RAM.
    #[error(transparent)]
    Memory(#[from] memory::Error),
    /// The snapshot to go on from.
    #[error(transparent)]
    Incoming(#[from] crate::lifecycle::incoming::IncomingError),
    /// The board.
    #[error(transparent)]
    Machine(#[from] microvm::Error),
    /// Kernel, initrd or command line cannot be used.
    #[error("{option} {value}")]
    Boot {
        /// The option at fault.
        option: &'static str,
        /// Its value.
        value: String,
        /// Why.
        source: microvm::Error,
    },
    /// QMP.
    #[error(transparent)]
    Qmp(#[from] qmp::ServerError),
    /// The serial port's other end.
    #[error(transparent)]
    Chardev(#[from] crate::chardev::ChardevError),
    /// An inherited socket is not what the command line says.
    #[error("{option} fd={fd}: {what}")]
    Inherited {
        /// The option.
        option: String,
        /// Its descriptor.
        fd: i32,
        /// What is wrong.
        what: &'static str,
    },
    /// Processors that were asked for.
    #[error(transparent)]
    Affinity(#[from] AffinityError),
    /// A shared folder's window.
    #[error(transparent)]
    Window(#[from] WindowError),
    /// Lock-down.
    #[error(transparent)]
    Lock(#[from] ozone::SelfLockError),
    /// A seccomp filter.
    #[error("system call filter of a thread")]
    Filter(#[from] seccomp_policies::Error),
    /// `-daemonize`.
    #[error(transparent)]
    Daemon(#[from] DaemonError),
    /// Signals, or the epoll of the main loop.
    #[error("{call} failed")]
    System {
        /// The call.
        call: &'static str,
        /// What the kernel said.
        source: Errno,
    },
}

pub(super) fn failed(call: &'static str) -> impl FnOnce(Errno) -> StartError {
    move |source| StartError::System { call, source }
}

/// The error with the option that it is about.
pub(super) fn why_boot_failed(boot: &BootSpec, source: microvm::Error) -> StartError {
    use crate::boot::Error;
    let path = |path: &Option<PathBuf>| {
        path.as_ref()
            .map_or_else(String::new, |path| path.display().to_string())
    };
    let (option, value) = match &source {
        microvm::Error::Boot(
            Error::ReadInitrd(_) | Error::EmptyInitrd | Error::InitrdRange { .. },
        ) => ("-initrd", path(&boot.initrd)),
        microvm::Error::Boot(Error::CommandLine { .. } | Error::CommandLineNul(_)) => {
            ("-append", boot.cmdline.clone())
        }
        microvm::Error::Boot(Error::Write { .. }) => return source.into(),
        microvm::Error::Boot(_) => ("-kernel", path(&boot.kernel)),
        _ => return source.into(),
    };
    StartError::Boot {
        option,
        value,
        source,
    }
}
