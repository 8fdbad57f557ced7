//! Every event with its data.

use super::commands::{DUMP_RESULT, MIGRATION_STATUS};
use super::types::{Enum, EventDef, Type, event, may, must};

/// Why the VM went down or was reset (QAPI `ShutdownCause`, those that occur here).
const CAUSE: Type = Type::Enum(&Enum {
    name: "ShutdownCause",
    values: &[
        "host-error",
        "host-qmp-quit",
        "host-qmp-system-reset",
        "host-signal",
        "guest-shutdown",
        "guest-reset",
        "guest-panic",
    ],
});

const DEVICE: super::types::Member = must("device", Type::ID, "id of the device");

/// All events.
pub static EVENTS: &[EventDef] = &[
    event(
        "SHUTDOWN",
        &[
            must("guest", Type::Bool, "whether it came from inside the guest"),
            must("reason", CAUSE, "why"),
        ],
        "The VM has shut down; with `-no-shutdown` it is still there and can be reset",
    ),
    event(
        "RESET",
        &[
            must("guest", Type::Bool, "whether it came from inside the guest"),
            must("reason", CAUSE, "why"),
        ],
        "The VM was reset",
    ),
    event("STOP", &[], "The vCPUs have stopped"),
    event("RESUME", &[], "The vCPUs run again"),
    event("POWERDOWN", &[], "The guest was asked to power off"),
    event(
        "DEVICE_CRASHED",
        &[
            DEVICE,
            must("pid", Type::INT, "id that the process had"),
            may("signal", Type::INT, "the signal that ended it"),
            may(
                "status",
                Type::INT,
                "its exit status, if it ended by itself",
            ),
            may(
                "unresponsive",
                Type::Bool,
                "true if it was ended because it did not answer as it should",
            ),
            may(
                "in-flight",
                Type::UINT,
                "requests that it had taken and not answered, which the next process answers; absent if that is not known",
            ),
        ],
        "A device's process has ended; unless DEVICE_FAILED follows, another one takes its place",
    ),
    event(
        "DEVICE_RECOVERED",
        &[
            DEVICE,
            must("pid", Type::INT, "id of the new process"),
            must(
                "stall-ms",
                Type::Number,
                "milliseconds for which nobody served, as far as the control process knows",
            ),
        ],
        "Another process does the work of one that ended, with what had been in flight",
    ),
    event(
        "VHOST_USER_DISCONNECTED",
        &[DEVICE],
        "Somebody else's daemon, to which a `-chardev` leads, has left a device, or was left because it does not do as it \
         should; DEVICE_CRASHED follows with what was in flight, or DEVICE_FAILED with `restart=off`. As QEMU's \
         NETDEV_VHOST_USER_DISCONNECTED, for devices of every kind",
    ),
    event(
        "VHOST_USER_CONNECTED",
        &[DEVICE],
        "A daemon listens at that `-chardev` again and has taken the device over; DEVICE_RECOVERED follows",
    ),
    event(
        "DEVICE_UPGRADED",
        &[
            DEVICE,
            must("pid", Type::INT, "id of the new process"),
            must(
                "stall-ms",
                Type::Number,
                "milliseconds for which neither process served; for a shared folder since the command, which is longer",
            ),
        ],
        "A process of the program that is there now has taken the place of one that served (`device-upgrade`, `block_resize`, `netdev_replace`)",
    ),
    event(
        "MIGRATION",
        &[must("status", MIGRATION_STATUS, "the step")],
        "A snapshot has come to its next step, as `query-migrate` tells",
    ),
    event(
        "DUMP_COMPLETED",
        &[
            must(
                "result",
                Type::Object(&DUMP_RESULT),
                "as `query-dump` tells it",
            ),
            may("error", Type::TEXT, "why it failed"),
        ],
        "A file of `dump-guest-memory` is written, or could not be",
    ),
    event(
        "BLOCK_IO_ERROR",
        &[
            must("qom-path", Type::TEXT, "path of the device"),
            must("device", Type::ID, "id of the `-drive`"),
            may("node-name", Type::ID, "the same"),
            must(
                "operation",
                Type::Enum(&Enum {
                    name: "IoOperationType",
                    values: &["read", "write"],
                }),
                "what failed; flushes and discards count as writes",
            ),
            must(
                "action",
                Type::Enum(&Enum {
                    name: "BlockErrorAction",
                    values: &["stop"],
                }),
                "what is done about it",
            ),
            may("nospace", Type::Bool, "whether the host has no space left"),
            must("reason", Type::TEXT, "why, for people"),
        ],
        "The host has failed a request of a disk whose `werror` or `rerror` stops the guest. STOP follows if it ran; `cont` \
         tries the request again. Failures that the guest is told of are in the log only",
    ),
    event(
        "DEVICE_DELETED",
        &[DEVICE, must("path", Type::TEXT, "path that the device had")],
        "A device was taken out by `device_del`, and its process is gone",
    ),
    event(
        "DEVICE_FAILED",
        &[DEVICE, must("reason", Type::TEXT, "why, for people")],
        "A device is given up: the guest sees one that needs a reset, for good; the VM goes on",
    ),
];
