//! # `start`: the start message of a device process
//!
//! It comes in a sealed memfd, and is the only thing that a device process reads before its jail.

use ipc::PROTOCOL_VERSION;
use ipc::log::Level;
use ipc::spec::DeviceSpec;
use ipc::start::{SandboxMode, SeccompMode, StartMessage, from_memfd};
use nix::sys::memfd::{MFdFlags, memfd_create};

/// A start message with everything on.
pub fn message(device: DeviceSpec) -> StartMessage {
    StartMessage {
        version: PROTOCOL_VERSION,
        device,
        backend_fds: 1,
        userfault: false,
        beside: false,
        instead: false,
        seccomp: SeccompMode::Kill,
        sandbox: SandboxMode::Strict,
        log_level: Level::Error,
    }
}

/// One input.
pub fn run(data: &[u8]) {
    let file = memfd_create(c"start", MFdFlags::MFD_CLOEXEC).expect("memfd_create");
    nix::sys::uio::pwrite(&file, data, 0).expect("pwrite");
    let Ok(message) = from_memfd(file) else {
        return;
    };
    assert_eq!(message.version, PROTOCOL_VERSION);
    // One message has one encoding, so nothing was hidden behind or inside of it.
    assert_eq!(ipc::codec::encode(&message).expect("it was decoded"), data);
    let _ = message.device.binary();
    crate::planted!(matches!(&message.device, DeviceSpec::Net(net) if net.queue_pairs == 16));
}
