//! Events: what happened to the VM, told to every client that has negotiated.

use std::time::Duration;

use ipc::control::Exit;
use ipc::spec::block::IoStop;
use nix::time::{ClockId, clock_gettime};
use serde_json::{Value, json};

use super::command::{DumpProgress, MigrationStatus};
use super::schema;

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
#[derive(Debug, Clone, PartialEq, Eq)]
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
    /// A device process ended, or was ended because it did not answer.
    DeviceCrashed {
        /// Id of the device.
        device: String,
        /// Id that the process had.
        pid: i32,
        /// How it ended by itself; `None` if it was unresponsive.
        how: Option<Exit>,
        /// Requests that it had taken and not answered, if that is known.
        in_flight: Option<u32>,
    },
    /// Another process does its work, with what had been in flight.
    DeviceRecovered {
        /// Id of the device.
        device: String,
        /// Id of the new process.
        pid: i32,
        /// How long there was none, as far as this process knows.
        stall: Duration,
    },
    /// Somebody else's daemon serves again.
    BackEndConnected {
        /// Id of the device.
        device: String,
    },
    /// Somebody else's daemon has left, or was left because it does not do as it should.
    BackEndDisconnected {
        /// Id of the device.
        device: String,
    },
    /// Another process took the place of one that served.
    DeviceUpgraded {
        /// Id of the device.
        device: String,
        /// Id of the new process.
        pid: i32,
        /// How long neither served.
        stall: Duration,
    },
    /// The host failed a request of a disk whose `werror` or `rerror` stops the guest.
    BlockIoError {
        /// Id of the device.
        device: String,
        /// Id of the drive.
        drive: String,
        /// What failed.
        stop: IoStop,
    },
    /// A snapshot has come to its next step.
    Migration(MigrationStatus),
    /// A dump of guest memory is over, perhaps because of this.
    DumpCompleted(DumpProgress, Option<String>),
    /// A device was taken out, and its process is gone.
    DeviceDeleted {
        /// Id of the device.
        device: String,
    },
    /// There will be no other process: the guest sees a device that needs a reset, for good.
    DeviceFailed {
        /// Id of the device.
        device: String,
        /// Why, for people.
        reason: String,
    },
}

impl Event {
    /// Its name on the wire.
    pub const fn name(&self) -> &'static str {
        match self {
            Self::Shutdown(_) => "SHUTDOWN",
            Self::Reset(_) => "RESET",
            Self::Stop => "STOP",
            Self::Resume => "RESUME",
            Self::Powerdown => "POWERDOWN",
            Self::DeviceCrashed { .. } => "DEVICE_CRASHED",
            Self::DeviceRecovered { .. } => "DEVICE_RECOVERED",
            Self::DeviceUpgraded { .. } => "DEVICE_UPGRADED",
            Self::BackEndConnected { .. } => "VHOST_USER_CONNECTED",
            Self::BackEndDisconnected { .. } => "VHOST_USER_DISCONNECTED",
            Self::DeviceDeleted { .. } => "DEVICE_DELETED",
            Self::DeviceFailed { .. } => "DEVICE_FAILED",
            Self::BlockIoError { .. } => "BLOCK_IO_ERROR",
            Self::Migration(_) => "MIGRATION",
            Self::DumpCompleted(..) => "DUMP_COMPLETED",
        }
    }

    /// The message, stamped with the time of this call.
    pub(super) fn message(&self) -> Value {
        let now = clock_gettime(ClockId::CLOCK_REALTIME);
        let (seconds, micros) = now.map_or((-1, -1), |now| (now.tv_sec(), now.tv_nsec() / 1000));
        let mut message = json!({
            "event": self.name(),
            "timestamp": { "seconds": seconds, "microseconds": micros },
        });
        let data = self.data();
        schema::assert_event(self.name(), data.as_ref());
        if let Some(data) = data {
            message["data"] = data;
        }
        message
    }

    /// Its data; `None` for an event that has none.
    fn data(&self) -> Option<Value> {
        Some(match self {
            Self::Shutdown(cause) | Self::Reset(cause) => {
                json!({ "guest": cause.is_guest(), "reason": cause.name() })
            }
            Self::Stop | Self::Resume | Self::Powerdown => return None,
            Self::DeviceCrashed {
                device,
                pid,
                how,
                in_flight,
            } => {
                let mut data = json!({ "device": device, "pid": pid });
                match how {
                    Some(Exit::Signal(signal)) => data["signal"] = json!(signal),
                    Some(Exit::Code(status)) => data["status"] = json!(status),
                    None => data["unresponsive"] = json!(true),
                }
                if let Some(count) = in_flight {
                    data["in-flight"] = json!(count);
                }
                data
            }
            Self::DeviceRecovered { device, pid, stall }
            | Self::DeviceUpgraded { device, pid, stall } => {
                // Milliseconds with three digits behind the point.
                let stall = stall.as_micros() as f64 / 1000.0;
                json!({ "device": device, "pid": pid, "stall-ms": stall })
            }
            Self::DeviceDeleted { device } => {
                json!({ "device": device, "path": format!("/machine/peripheral/{device}") })
            }
            Self::BackEndConnected { device } | Self::BackEndDisconnected { device } => {
                json!({ "device": device })
            }
            Self::DeviceFailed { device, reason } => json!({ "device": device, "reason": reason }),
            Self::DumpCompleted(progress, error) => {
                let mut data = json!({ "result": progress.value() });
                if let Some(error) = error {
                    data["error"] = json!(error);
                }
                data
            }
            Self::Migration(status) => json!({ "status": status.name() }),
            Self::BlockIoError {
                device,
                drive,
                stop,
            } => json!({
                "qom-path": format!("/machine/peripheral/{device}"),
                "device": drive,
                "node-name": drive,
                "operation": if stop.write { "write" } else { "read" },
                "action": "stop",
                "nospace": stop.no_space,
                "reason": if stop.no_space { "No space left on device" } else { "Input/output error" },
            }),
        })
    }
}
