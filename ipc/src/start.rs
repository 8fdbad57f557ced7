//! The message that a device process finds on descriptor 4 when it starts, and the numbers of all its descriptors.
//!
//! **Job.** The broker seals a memfd that holds one [`StartMessage`]; the process reads and closes it before it locks
//! itself down. **Who is not trusted**: nobody yet at this point, but the process refuses another protocol version or a
//! descriptor count that does not fit its spec, so a half-replaced installation is told as such.
//! **Why this way.** Arguments and environments are visible in /proc to others of the same user; a sealed memfd is not.

use std::fs::File;
use std::io::{Read, Seek, SeekFrom, Write};
use std::os::fd::{OwnedFd, RawFd};

use nix::errno::Errno;
use nix::fcntl::{FcntlArg, SealFlag, fcntl};
use nix::sys::memfd::{MFdFlags, memfd_create};
use serde::{Deserialize, Serialize};
use thiserror::Error;

use crate::PROTOCOL_VERSION;
use crate::codec::{self, CodecError};
use crate::limits::MAX_START_MESSAGE;
use crate::log::Level;
use crate::spec::DeviceSpec;

/// The log pipe: standard error of a device process. 0 and 1 are the same pipe, so that no other file is needed.
pub const FD_LOG: RawFd = 2;
/// The vhost-user socket, a connected `SOCK_STREAM` unix socket whose other end the control process has.
pub const FD_VHOST_USER: RawFd = 3;
/// The sealed memfd with the start message.
pub const FD_START: RawFd = 4;
/// The first back-end descriptor; the spec says how many there are.
pub const FD_BACKEND: RawFd = 5;

/// What the kernel does with a system call that the filter does not allow.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
pub enum SeccompMode {
    /// The process is killed at once.
    #[default]
    Kill,
    /// The call is logged and let through; for finding what a policy lacks. Warned about on start.
    Log,
    /// The thread gets SIGSYS. Warned about on start.
    Trap,
    /// No filter (`-disable-seccomp`). Warned about on start and shown in QMP.
    Disabled,
}

/// What to do when the host cannot give a layer of the jail.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
pub enum SandboxMode {
    /// Go on with the layers that remain and say which are missing.
    #[default]
    BestEffort,
    /// Refuse to start.
    Strict,
}

/// Everything a device process is told.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct StartMessage {
    /// [`PROTOCOL_VERSION`] of the broker.
    pub version: u32,
    /// What to be.
    pub device: DeviceSpec,
    /// Back-end descriptors from [`FD_BACKEND`] on.
    pub backend_fds: u32,
    /// Behind them is a `/dev/userfaultfd`: its control process watches what it looks at in guest RAM.
    pub userfault: bool,
    /// Another process serves the same back end until this one is asked to: what is kept there may change before that.
    pub beside: bool,
    /// Another process serves another back end until this one is asked to: what comes to this one's before that is for nobody.
    pub instead: bool,
    /// What the filter does with other calls.
    pub seccomp: SeccompMode,
    /// Whether a missing layer ends the process.
    pub sandbox: SandboxMode,
    /// Least important level that is logged.
    pub log_level: Level,
}

/// Why there is no start message.
#[derive(Debug, Error)]
pub enum StartError {
    /// The memfd could not be made, sealed or read.
    #[error("start message: {call} failed")]
    Memfd {
        /// The system call.
        call: &'static str,
        /// What the kernel said.
        source: Errno,
    },
    /// The memfd could not be written or read.
    #[error("start message cannot be transferred")]
    Io(#[from] std::io::Error),
    /// The bytes are no start message.
    #[error("start message is malformed")]
    Codec(#[from] CodecError),
    /// It is larger than allowed.
    #[error("start message is larger than {MAX_START_MESSAGE} bytes")]
    TooLarge,
    /// The two binaries are not from one build.
    #[error(
        "start message has protocol version {got}, this binary speaks {PROTOCOL_VERSION}: install all binaries from one build"
    )]
    Version {
        /// The broker's version.
        got: u32,
    },
}

/// Writes `message` into a new sealed memfd, positioned at its start.
pub fn to_memfd(message: &StartMessage) -> Result<OwnedFd, StartError> {
    let failed = |call| move |source| StartError::Memfd { call, source };
    let bytes = codec::encode(message)?;
    if bytes.len() > MAX_START_MESSAGE {
        return Err(StartError::TooLarge);
    }
    let fd = memfd_create(
        c"start",
        MFdFlags::MFD_CLOEXEC | MFdFlags::MFD_ALLOW_SEALING,
    )
    .map_err(failed("memfd_create"))?;
    let mut file = File::from(fd);
    file.write_all(&bytes)?;
    file.seek(SeekFrom::Start(0))?;
    let seals = SealFlag::F_SEAL_WRITE
        | SealFlag::F_SEAL_SHRINK
        | SealFlag::F_SEAL_GROW
        | SealFlag::F_SEAL_SEAL;
    fcntl(&file, FcntlArg::F_ADD_SEALS(seals)).map_err(failed("fcntl(F_ADD_SEALS)"))?;
    Ok(file.into())
}

/// Reads the start message and closes the memfd.
pub fn from_memfd(fd: OwnedFd) -> Result<StartMessage, StartError> {
    let mut bytes = Vec::with_capacity(1024);
    File::from(fd)
        .take(MAX_START_MESSAGE as u64 + 1)
        .read_to_end(&mut bytes)?;
    if bytes.len() > MAX_START_MESSAGE {
        return Err(StartError::TooLarge);
    }
    // The version is the first field, so that a message of another layout still tells its version.
    if let Some(version) = bytes.first_chunk::<4>().map(|b| u32::from_le_bytes(*b))
        && version != PROTOCOL_VERSION
    {
        return Err(StartError::Version { got: version });
    }
    Ok(codec::decode(&bytes)?)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::spec::template::TemplateSpec;

    fn message(version: u32) -> StartMessage {
        StartMessage {
            version,
            device: DeviceSpec::Template(TemplateSpec {
                id: "t0".into(),
                greeting: *b"ahoy",
            }),
            backend_fds: 0,
            userfault: false,
            beside: false,
            instead: false,
            seccomp: SeccompMode::Kill,
            sandbox: SandboxMode::Strict,
            log_level: Level::Warn,
        }
    }

    #[test]
    fn a_start_message_survives_and_is_sealed() {
        let fd = to_memfd(&message(PROTOCOL_VERSION)).unwrap();
        let mut writer = File::from(fd.try_clone().unwrap());
        assert!(
            writer.write_all(b"x").is_err(),
            "a sealed memfd must not take writes"
        );
        drop(writer);
        assert_eq!(from_memfd(fd).unwrap(), message(PROTOCOL_VERSION));
    }

    #[test]
    fn another_version_is_named() {
        let fd = to_memfd(&message(PROTOCOL_VERSION + 1)).unwrap();
        assert!(
            matches!(from_memfd(fd), Err(StartError::Version { got }) if got == PROTOCOL_VERSION + 1)
        );
    }
}
