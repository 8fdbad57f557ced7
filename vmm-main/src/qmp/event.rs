//! Events: what happened to the VM, told to every client that has negotiated.

use nix::time::{ClockId, clock_gettime};
use serde_json::{Value, json};

/// Why the VM went down or was reset (QAPI `ShutdownCause`).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Cause {
    /// The host could not go on.
    HostError,
    /// QMP's `quit`.
    HostQmpQuit,
    /// QMP's `system_reset`.
    HostQmpSystemReset,
    /// SIGTERM, SIGINT or SIGHUP.
    HostSignal,
    /// The guest powered off.
    GuestShutdown,
    /// The guest rebooted.
    GuestReset,
    /// The guest panicked or triple-faulted.
    GuestPanic,
}

impl Cause {
    /// Its name on the wire.
    pub const fn name(self) -> &'static str {
        match self {
            Self::HostError => "host-error",
            Self::HostQmpQuit => "host-qmp-quit",
            Self::HostQmpSystemReset => "host-qmp-system-reset",
            Self::HostSignal => "host-signal",
            Self::GuestShutdown => "guest-shutdown",
            Self::GuestReset => "guest-reset",
            Self::GuestPanic => "guest-panic",
        }
    }

    /// Whether it came from inside the guest.
    pub const fn is_guest(self) -> bool {
        matches!(
            self,
            Self::GuestShutdown | Self::GuestReset | Self::GuestPanic
        )
    }
}

/// Something that happened.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Event {
    /// The VM has shut down.
    Shutdown(Cause),
    /// The VM was reset.
    Reset(Cause),
    /// The vCPUs have stopped.
    Stop,
    /// The vCPUs run again.
    Resume,
    /// The guest was asked to power off.
    Powerdown,
}

/// Names of all events, for `query-events`.
pub(super) const NAMES: [&str; 5] = ["SHUTDOWN", "RESET", "STOP", "RESUME", "POWERDOWN"];

impl Event {
    /// Its name on the wire.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Shutdown(_) => NAMES[0],
            Self::Reset(_) => NAMES[1],
            Self::Stop => NAMES[2],
            Self::Resume => NAMES[3],
            Self::Powerdown => NAMES[4],
        }
    }

    /// The message, stamped with the time of this call.
    pub(super) fn message(self) -> Value {
        let now = clock_gettime(ClockId::CLOCK_REALTIME);
        let (seconds, micros) = now.map_or((-1, -1), |now| (now.tv_sec(), now.tv_nsec() / 1000));
        let mut message = json!({
            "event": self.name(),
            "timestamp": { "seconds": seconds, "microseconds": micros },
        });
        if let Self::Shutdown(cause) | Self::Reset(cause) = self {
            message["data"] = json!({ "guest": cause.is_guest(), "reason": cause.name() });
        }
        message
    }
}
